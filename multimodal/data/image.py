"""Pictures to tensors with Pillow: CLIP's resize, crop and normalisation, and keyed random crops for training."""

import functools
import io
import math
import warnings
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from shared.errors import BadSample
from shared.media.pictures import MOST_PIXELS, as_rgb

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".jfif", ".png", ".webp", ".avif", ".tif", ".tiff", ".bmp", ".gif")


def read_image(source: Path | bytes, *, max_side: int | None = None, name: str | None = None) -> Image.Image:
    """An RGB picture, turned upright; grey, palette, CMYK, 16-bit and transparent ones (over white) are converted.

    max_side: a JPEG may be decoded at a smaller scale while its shorter side stays at least this (faster). name: what
    bytes are called where they cannot be read.
    Raises BadSample for what does not decode, is cut short, or has more than 100 million pixels.
    """
    name = name or ("image bytes" if isinstance(source, bytes) else str(source))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the cap below decides
            picture = Image.open(io.BytesIO(source) if isinstance(source, bytes) else source)
            if picture.width * picture.height > MOST_PIXELS:
                raise BadSample(f"{name}: {picture.width} x {picture.height} pixels, more than {MOST_PIXELS:,}")
            if max_side is not None:
                picture.draft("RGB", (max_side, max_side))
            return as_rgb(picture)
    except BadSample:
        raise
    except Exception as error:  # Pillow raises many kinds for broken files
        # Of what it does not know Pillow says the name again, or where in memory it lies.
        reason = "of no kind that is known" if "cannot identify" in str(error) else error
        raise BadSample(f"{name}: cannot be decoded as a picture ({reason})") from None


def normalise(pixels: Tensor) -> Tensor:
    """(..., 3, H, W) float32 from uint8: [0, 1] less CLIP's mean over its std. What is float already stays."""
    if pixels.is_floating_point():
        return pixels
    mean, std = _mean_and_std(pixels.device)
    return pixels.float().div_(255).sub_(mean).div_(std)


@functools.cache
def _mean_and_std(device: torch.device) -> tuple[Tensor, Tensor]:
    return torch.tensor(MEAN, device=device)[:, None, None], torch.tensor(STD, device=device)[:, None, None]


def center_crop(picture: Image.Image, size: int) -> Image.Image:
    """Shorter side to `size` (bicubic, antialiased; the longer is int(size * long / short)), then the middle square."""
    width, height = picture.size
    short, long = min(width, height), max(width, height)
    if long > (most := max(short, MOST_PIXELS // size**2 * short)):  # a line of pixels: the middle of it is enough
        start = (long - most) // 2
        picture = picture.crop((start, 0, start + most, height) if width > height else (0, start, width, start + most))
        (width, height), long = picture.size, most
    longer = int(size * long / short)
    resized = picture.resize((size, longer) if width <= height else (longer, size), Image.Resampling.BICUBIC)
    left, top = round((resized.width - size) / 2), round((resized.height - size) / 2)
    return resized.crop((left, top, left + size, top + size))


def random_resized_crop(
    picture: Image.Image, size: int, generator: torch.Generator, *, scale: float = 0.2, flip: float = 0.5
) -> Image.Image:
    """A crop of `scale` to 1 of the area and 3/4 to 4/3 in shape, resized to a square, mirrored with probability
    `flip`.
    """
    width, height = picture.size
    draw = torch.rand(4, generator=generator).tolist()
    area = width * height * (scale + (1 - scale) * draw[0])
    ratio = math.exp((2 * draw[1] - 1) * math.log(4 / 3))
    wide, high = min(width, math.sqrt(area * ratio)), min(height, math.sqrt(area / ratio))
    left, top = draw[2] * (width - wide), draw[3] * (height - high)
    crop = picture.resize((size, size), Image.Resampling.BICUBIC, box=(left, top, left + wide, top + high))
    if flip and float(torch.rand((), generator=generator)) < flip:
        crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return crop
