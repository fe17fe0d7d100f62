"""Pictures as people have them, turned into plain RGB and into tensors."""

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

MOST_PIXELS = 100_000_000  # of a picture; decoding one takes half a GB


def as_rgb(image: Image.Image, *, upright: bool = True) -> Image.Image:
    """RGB of 8 bits: turned by its EXIF note when `upright`, 16 bits scaled to 8, transparency laid on white.

    Decodes the picture, so Pillow's errors for broken files (OSError, ValueError, SyntaxError) come up here; one of
    more than MOST_PIXELS is refused before, as an OSError.
    """
    if image.width * image.height > MOST_PIXELS:
        raise UnidentifiedImageError(f"{image.width} x {image.height} pixels, more than {MOST_PIXELS:,}")
    if image.format == "EPS":  # to draw it, Pillow would start Ghostscript, on whatever a web page called a .jpg
        raise UnidentifiedImageError("it is PostScript, a program, which is not run")
    image.load()
    if upright:
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I") or image.mode == "F":  # convert("RGB") would clip these to white
        values = np.nan_to_num(np.asarray(image, dtype=np.float32), posinf=0.0, neginf=0.0)
        # "I;16" says how many bits there are, "I" and "F" (TIFF) do not: there the values have to
        scale = 257.0 if image.mode.startswith("I;16") or values.max() > 255 else 1.0
        if image.mode == "F" and values.max() <= 1:  # floats from 0 to 1 would all become black
            scale = 1 / 255
        image = Image.fromarray((values / scale).round().clip(0, 255).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def to_pixels(image: Image.Image, *, flip: bool = False) -> Tensor:
    """uint8 (3, H, W) of an RGB picture, mirrored on request: a quarter of the bytes of floats where loader processes
    hand it over and where it is copied to the device.
    """
    pixels_HWC = np.asarray(image)[:, ::-1] if flip else np.asarray(image)
    return torch.from_numpy(np.ascontiguousarray(pixels_HWC.transpose(2, 0, 1)))
