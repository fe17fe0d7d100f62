"""Picture files to square tensors: uint8 where they travel, [-1, 1] where they are used."""

import io
import math
from collections.abc import Callable

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from shared.errors import BadSample
from shared.media.pictures import as_rgb

Crop = tuple[int, int, int, int]  # top, left of the window; height, width of the resized picture it was cut from


def decode(data: bytes, name: str) -> Image.Image:
    """RGB picture: turned upright by EXIF, transparency laid on white, 16 bits scaled to 8. BadSample if broken."""
    try:
        return as_rgb(Image.open(io.BytesIO(data)))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise BadSample(f"{name}: not a readable picture ({error})") from None


def crop_to_box(image: Image.Image, box: tuple[float, float, float, float]) -> Image.Image:
    """The square, clipped to the picture, of which a box (x, y, width, height; pixels) fills three quarters a side."""
    x, y, width, height = box
    side = max(width, height) / 0.75
    left, top = x + width / 2 - side / 2, y + height / 2 - side / 2
    window = (
        max(0, round(left)),
        max(0, round(top)),
        min(image.width, round(left + side)),
        min(image.height, round(top + side)),
    )
    return image.crop(window) if window[2] > window[0] and window[3] > window[1] else image


def to_square(
    image: Image.Image, size: int, *, crop: str = "center", draw: Callable[[], float] = lambda: 0.5
) -> tuple[Image.Image, Crop]:
    """A size x size picture and where it lay.

    center: the ADM rule (Dhariwal and Nichol 2021): halve by BOX while the shorter side is at least twice the size,
    BICUBIC to the size, cut the centre. random: the same, any window. random_resized: a square of 80 to 100 % of the
    area. resize: no cutting. draw() gives uniform numbers in [0, 1) for the random ones.
    """
    if crop == "resize":
        return image.resize((size, size), Image.Resampling.BICUBIC, reducing_gap=None), (0, 0, size, size)
    if crop == "random_resized":
        side = min(image.size) * math.sqrt(0.8 + 0.2 * draw())
        left, top = draw() * (image.width - side), draw() * (image.height - side)
        scale = size / side
        where = (round(top * scale), round(left * scale), round(image.height * scale), round(image.width * scale))
        return image.resize((size, size), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side)), where
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    spare_x, spare_y = image.width - size, image.height - size
    if crop == "random":
        left, top = int(draw() * (spare_x + 1)), int(draw() * (spare_y + 1))
    else:
        left, top = spare_x // 2, spare_y // 2
    return image.crop((left, top, left + size, top + size)), (top, left, image.height, image.width)


def unit(pixels: Tensor) -> Tensor:
    """float32 in [-1, 1] from uint8; what is float already is in that range and stays."""
    return pixels if pixels.is_floating_point() else pixels.float().div_(127.5).sub_(1.0)


def to_uint8(images: Tensor, *, rule: str = "round") -> np.ndarray:
    """(B, H, W, 3) uint8 from [-1, 1]. round: nearest. adm: clamp(127.5 x + 128), truncated, as ADM's scripts do."""
    scaled = 127.5 * images.float() + (128.0 if rule == "adm" else 127.5)
    scaled = scaled if rule == "adm" else scaled.round()
    return scaled.clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()


def grid(pictures: np.ndarray, columns: int, *, enlarge: int = 1) -> Image.Image:
    """One picture of many (B, H, W, 3), row by row, with a thin white gap."""
    count, height, width, _ = pictures.shape
    rows = -(-count // columns)
    canvas = np.full((rows * (height + 2) - 2, columns * (width + 2) - 2, 3), 255, dtype=np.uint8)
    for index, picture in enumerate(pictures):
        top, left = index // columns * (height + 2), index % columns * (width + 2)
        canvas[top : top + height, left : left + width] = picture
    image = Image.fromarray(canvas)
    return image.resize((image.width * enlarge, image.height * enlarge), Image.Resampling.NEAREST)
