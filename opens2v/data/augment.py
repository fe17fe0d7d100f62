"""Random changes of a sample: of its subject picture, of the subject's colours in clip and picture alike, of the scene.

Without them a generator that sees few clips learns each subject by heart and need not look at the picture.
"""

import math
import random

import numpy as np
from PIL import Image, ImageEnhance

FOREGROUND_LEVELS = 12  # grey levels by which a pixel of a subject differs from the background
LARGEST_FOREGROUND = 1 / 3  # share of the frame; above it the difference is the camera's motion, not a subject
LARGEST_LOG_GAMMA = 0.5  # of a recoloured subject
NO_CHANGES = {  # options of a data set whose samples are as they are
    "ref_augment": False,
    "recolour_probability": 0.0,
    "other_scene_probability": 0.0,
    "other_subject_probability": 0.0,
    "generic_caption_probability": 0.0,
}
WHITE = (255, 255, 255)


def augment(image: Image.Image, rng: random.Random) -> tuple[Image.Image, float]:
    """Flip, rotation within 10 degrees on white, mild colour jitter; also the share of the canvas to fill (0.8 to 1).

    Reference and target come from one clip; without this the model learns to copy and paste.
    """
    if rng.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    scale = rng.uniform(0.8, 1.0)
    image = image.rotate(rng.uniform(-10, 10), Image.Resampling.BICUBIC, expand=True, fillcolor=WHITE)
    outside = np.all(np.array(image) >= 250, axis=-1)
    for kind in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
        image = kind(image).enhance(rng.uniform(0.9, 1.1))
    pixels = np.array(image)
    pixels[outside] = 255
    return Image.fromarray(pixels), scale


def hue_rotation(angle: float) -> np.ndarray:
    """3 x 3 rotation of RGB about the grey axis by `angle` radians: colours change, white and greys stay."""
    cosine, sine = np.cos(angle), np.sin(angle)
    third, root = (1 - cosine) / 3, sine / np.sqrt(3)
    return np.array(
        [
            [cosine + third, third - root, third + root],
            [third + root, cosine + third, third - root],
            [third - root, third + root, cosine + third],
        ]
    )


def recolour(pixels: np.ndarray, angle: float, where: np.ndarray | None = None, gamma: float = 1.0) -> np.ndarray:
    """uint8 (..., 3) with rotated hue and raised to `gamma`, in the pixels of the bool mask `where` (...) or in all.

    Black and white stay as they are.
    """
    turned = np.clip(pixels.astype(np.float32) @ hue_rotation(angle).T.astype(np.float32), 0, 255) / 255
    turned = (255 * turned**gamma).round().astype(np.uint8)
    return turned if where is None else np.where(where[..., None], turned, pixels)


def foreground_mask(frames: np.ndarray, background: np.ndarray) -> np.ndarray:
    """bool (..., H, W): where uint8 frames (..., H, W, 3) differ from the background by more than a few grey levels."""
    return np.abs(frames.astype(np.int16) - background.astype(np.int16)).max(-1) > FOREGROUND_LEVELS


def recolour_subject(
    frames: np.ndarray, images: list[Image.Image], where: np.ndarray, rng: random.Random
) -> tuple[np.ndarray, list[Image.Image]]:
    """Frames and subject pictures with the same random change of colour; frames only in the pixels `where`."""
    angle, gamma = rng.uniform(0, 2 * math.pi), math.exp(rng.uniform(-LARGEST_LOG_GAMMA, LARGEST_LOG_GAMMA))
    pictures = [Image.fromarray(recolour(np.array(image), angle, gamma=gamma)) for image in images]
    return recolour(frames, angle, where, gamma), pictures


def show_in_scene(frames: np.ndarray, where: np.ndarray, background: np.ndarray) -> np.ndarray | None:
    """The subject (the pixels `where` of frames) in front of another clip's background.

    None when the two do not suit: another size, or a camera that moves.
    """
    if background.shape != frames.shape[1:] or where.mean() > LARGEST_FOREGROUND:
        return None
    return np.where(where[..., None], frames, background)


def in_its_place(
    where: np.ndarray, background: np.ndarray, drawing: np.ndarray
) -> tuple[np.ndarray, tuple[float, float, float]] | None:
    """uint8 (F, H, W, 3): a drawing (uint8 RGBA, square) in place of the subject (the pixels `where`), as large as that
    is in the first frame, on the same floor, moving along with it; and its place there (see subjects.Place).

    None where a frame shows no subject, or where the difference is the camera's motion.
    """
    if where.mean() > LARGEST_FOREGROUND or not where.any((1, 2)).all():
        return None
    frames: list[np.ndarray] = []
    sprite, place = Image.new("RGBA", (0, 0)), (0.0, 0.0, 0.0)
    for mask in where:
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        if not frames:
            side = int(max(np.ptp(rows), np.ptp(columns))) + 1
            place = int(rows[-1]) + 1 - side, side, (columns[0] + columns[-1] + 1 - where.shape[2]) / 2
            sprite = Image.fromarray(drawing).resize((side, side), Image.Resampling.LANCZOS)
        picture = Image.fromarray(background)
        left, top = round((columns[0] + columns[-1] + 1 - sprite.width) / 2), int(rows[-1]) + 1 - sprite.height
        picture.paste(sprite, (left, top), sprite)
        frames.append(np.array(picture))
    return np.stack(frames), place
