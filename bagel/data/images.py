"""Pictures from files to tensors: safe opening, the resize rule, normalisation. Tensors: float32 (3, H, W), [-1, 1]."""

import os
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from shared.media.pictures import as_rgb

MAX_AREA = 200_000_000  # pixels; larger files are refused before they are decoded
DEFAULT_MAX_PIXELS = 14 * 14 * 9 * 1024


class ImageFault(Exception):
    """A picture that cannot be used; `code` is one of the E_IMAGE codes of the data format."""

    def __init__(self, code: str, message: str):
        super().__init__(message)
        self.code = code


def image_size(source: Path | BinaryIO) -> tuple[int, int]:
    """(width, height) from the header alone; raises an ImageFault."""
    with _opened(source) as image:
        return image.size


def load_image(source: Path | BinaryIO) -> Image.Image:
    """The whole picture as RGB, transparency laid on white; raises an ImageFault for what is missing, damaged or too
    large.
    """
    with _opened(source) as image:
        try:
            return as_rgb(image, upright=False)  # as the released loader, whose sizes come from the header
        except (OSError, SyntaxError, ValueError) as error:
            raise ImageFault("E_IMAGE_DECODE", f"{_name(source)} is damaged or cut short ({error})") from None


def _opened(source: Path | BinaryIO) -> Image.Image:
    if isinstance(source, Path) and not os.path.isfile(source):  # unlike Path's, False also for an impossible name
        raise ImageFault("E_IMAGE_MISSING", f"{source} is {'a folder' if os.path.isdir(source) else 'not there'}")
    try:
        image = Image.open(source)
    except (UnidentifiedImageError, Image.DecompressionBombError, OSError, SyntaxError, ValueError) as error:
        raise ImageFault("E_IMAGE_DECODE", f"{_name(source)} is not a readable picture ({error})") from None
    width, height = image.size
    if width < 1 or height < 1 or width * height > MAX_AREA:
        image.close()
        raise ImageFault("E_IMAGE_SIZE", f"{_name(source)} has {width} x {height} pixels; 1 to {MAX_AREA} are allowed")
    return image


def _name(source: Path | BinaryIO) -> str:
    return str(source) if isinstance(source, Path) else "the embedded picture"


def resized_sides(
    width: int,
    height: int,
    *,
    max_size: int,
    min_size: int,
    stride: int,
    max_pixels: int = DEFAULT_MAX_PIXELS,
    images: int = 1,
) -> tuple[int, int]:
    """(width, height) after the released resize rule; both are multiples of `stride`.

    The long side goes down to max_size, the short side up to min_size, sides are rounded to the stride. An area above
    max_pixels / images shrinks the sides by that very ratio (not its root), and a long side still above max_size again.
    """
    scale = max(min(max_size / max(width, height), 1.0), min_size / min(width, height))
    width, height = _scaled(width, height, scale, stride)
    if width * height > max_pixels / images:
        width, height = _scaled(width, height, max_pixels / images / (width * height), stride)
    if max(width, height) > max_size:
        width, height = _scaled(width, height, max_size / max(width, height), stride)
    return width, height


def _scaled(width: int, height: int, scale: float, stride: int) -> tuple[int, int]:
    sides = (round(width * scale), round(height * scale))
    return tuple(max(stride, round(side / stride) * stride) for side in sides)


class ImageTransform:
    """Resizes by the rule and normalises. Sides in pixels; `image_stride` is the side of one token."""

    def __init__(
        self, max_image_size: int, min_image_size: int, image_stride: int, max_pixels: int = DEFAULT_MAX_PIXELS
    ):
        self.max_size, self.min_size, self.stride, self.max_pixels = (
            max_image_size,
            min_image_size,
            image_stride,
            max_pixels,
        )

    def sides(self, width: int, height: int, images: int = 1) -> tuple[int, int]:
        """(width, height) that a picture of this size will have; `images`: pictures that share max_pixels."""
        return resized_sides(
            width,
            height,
            max_size=self.max_size,
            min_size=self.min_size,
            stride=self.stride,
            max_pixels=self.max_pixels,
            images=images,
        )

    def resize_transform(self, image: Image.Image, images: int = 1) -> Image.Image:
        """The resized picture, bicubic with antialiasing."""
        sides = self.sides(*image.size, images)
        return image if sides == image.size else image.resize(sides, Image.Resampling.BICUBIC)

    def __call__(self, image: Image.Image, images: int = 1) -> Tensor:
        """(3, H, W) in [-1, 1]."""
        return to_tensor(self.resize_transform(image, images))


def to_tensor(image: Image.Image) -> Tensor:
    """uint8 RGB to float32 (3, H, W) in [-1, 1]."""
    pixels = torch.from_numpy(np.array(image, dtype=np.uint8)).permute(2, 0, 1)
    return pixels.float() / 127.5 - 1
