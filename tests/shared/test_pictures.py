"""Every kind of picture becomes the RGB that a person would see."""

import io

import numpy as np
import pytest
from PIL import EpsImagePlugin, Image

from shared.errors import UserError
from shared.media.pictures import as_rgb


def saved(image: Image.Image, kind: str, **options) -> Image.Image:
    """The picture, written and opened again."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return Image.open(io.BytesIO(buffer.getvalue()))


def test_sixteen_bits_are_scaled():
    ramp = np.arange(256, dtype=np.uint16)[None].repeat(2, 0)
    for picture in (saved(Image.fromarray(ramp * 257), "PNG"), saved(Image.fromarray(ramp.astype(np.uint8)), "PNG")):
        assert np.array_equal(np.asarray(as_rgb(picture))[..., 0], ramp)


def test_a_turned_picture_is_put_upright_on_request():
    image = Image.new("RGB", (30, 10), "red")
    exif = Image.Exif()
    exif[0x0112] = 6
    assert as_rgb(saved(image, "JPEG", exif=exif)).size == (10, 30)
    assert as_rgb(saved(image, "JPEG", exif=exif), upright=False).size == (30, 10)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_what_is_transparent_becomes_white(mode):
    image = Image.new("RGBA", (4, 4), (0, 0, 0, 0))
    image.paste((0, 0, 0, 255), (0, 0, 2, 4))
    options = {"transparency": image.convert("P").getpixel((3, 0))} if mode == "P" else {}
    pixels = np.asarray(as_rgb(saved(image.convert(mode), "PNG", **options)))
    assert (pixels[:, 3] == 255).all() and (mode == "P" or (pixels[:, 0] == 0).all())


@pytest.mark.parametrize("mode", ["1", "L", "CMYK", "RGB"])
def test_other_modes_keep_their_colour(mode):
    assert as_rgb(Image.new("RGB", (3, 3), "white").convert(mode)).getpixel((1, 1)) == (255, 255, 255)


def test_a_picture_that_is_cut_short_raises():
    buffer = io.BytesIO()
    Image.effect_noise((64, 64), 90).save(buffer, "PNG")
    with pytest.raises(OSError):
        as_rgb(Image.open(io.BytesIO(buffer.getvalue()[:500])))


def test_a_dark_picture_of_16_bits_stays_dark():
    dark = Image.fromarray((np.arange(90, dtype=np.uint16) * 2).reshape(9, 10))
    assert dark.mode == "I;16" and np.asarray(as_rgb(dark)).max() <= 1


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_pixel_that_is_no_number_decides_no_scale(value):
    values = np.full((4, 4), 0.25, dtype=np.float32)
    values[0, 0] = value
    found = np.asarray(as_rgb(Image.fromarray(values)))
    assert (found[1:] == 64).all() and (found[0, 0] == 0).all()


def test_a_picture_is_never_a_program_that_is_run(tmp_path, monkeypatch):
    """Pillow draws PostScript with Ghostscript where that is installed."""
    program = tmp_path / "gs"
    program.write_text(f"#!/bin/sh\ntouch {tmp_path}/was-run\nexit 1\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)
    text = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n%%EOF\n"
    with pytest.raises(OSError, match="PostScript"):
        as_rgb(Image.open(io.BytesIO(text)))
    assert not (tmp_path / "was-run").exists()


def test_a_picture_too_large_to_decode_is_refused_by_every_system(tmp_path):
    """From its header: 12,000 x 12,000 in one bit a pixel are 18 kB, and half a GB once decoded."""
    from bagel.data.sources import ImageFault, load_image
    from dit.dataset import decode
    from float.data.media import read_image as read_portrait
    from multimodal.data.image import read_image
    from opens2v.evaluation.preview import open_picture

    path = tmp_path / "large.png"
    Image.new("1", (12_000, 12_000)).save(path)
    for opened in (
        load_image,
        read_portrait,
        read_image,
        open_picture,
        lambda path: decode(path.read_bytes(), "large"),
    ):
        with pytest.raises((UserError, ImageFault), match="12000 x 12000 pixels"):
            opened(path)
