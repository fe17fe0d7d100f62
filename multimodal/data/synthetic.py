"""Coloured shapes and tones with captions, drawn on the fly: pairs that a small model learns in a minute."""

import io
from dataclasses import dataclass
from itertools import product

import numpy as np
from PIL import Image, ImageDraw

from multimodal.data.audio import SAMPLE_RATE
from multimodal.data.records import Found, ListRecords, Record

COLOURS = {
    "red": (214, 40, 40),
    "green": (40, 160, 60),
    "blue": (40, 80, 220),
    "yellow": (240, 210, 40),
    "purple": (130, 50, 170),
    "black": (20, 20, 20),
    "orange": (245, 140, 30),
    "pink": (245, 130, 180),
}
SHAPES = ("square", "circle", "triangle", "ring")
PLACES = {"left": 0.27, "right": 0.73}
GROUNDS = {"white": (255, 255, 255), "grey": (150, 150, 150)}
PITCHES = {"very low": 130, "low": 220, "middle": 440, "high": 880, "very high": 1760}
PATTERNS = {"steady": (1, 0), "beating fast": (8, 1), "beating slowly": (3, 1), "rising": (1, 2), "falling": (1, 3)}
TIMBRES = ("pure", "buzzing")
SIDE, SECONDS = 64, 2.0


@dataclass(frozen=True)
class Drawing:
    """A shape on a ground; `wobble` moves it a little."""

    colour: str
    shape: str
    place: str
    ground: str
    wobble: int

    def read(self) -> bytes:
        """PNG."""
        draws = np.random.default_rng(self.wobble)
        picture = Image.new("RGB", (SIDE, SIDE), GROUNDS[self.ground])
        canvas, radius = ImageDraw.Draw(picture), SIDE * draws.uniform(0.16, 0.22)
        x, y = SIDE * (PLACES[self.place] + draws.uniform(-0.04, 0.04)), SIDE * draws.uniform(0.35, 0.65)
        box, fill = (x - radius, y - radius, x + radius, y + radius), COLOURS[self.colour]
        if self.shape == "square":
            canvas.rectangle(box, fill)
        elif self.shape == "circle":
            canvas.ellipse(box, fill)
        elif self.shape == "ring":
            canvas.ellipse(box, outline=fill, width=5)
        else:
            canvas.polygon([(x, box[1]), (box[0], box[3]), (box[2], box[3])], fill)
        buffer = io.BytesIO()
        picture.save(buffer, "PNG")
        return buffer.getvalue()


@dataclass(frozen=True)
class Tone:
    """A tone with a course over time; `wobble` detunes it a little."""

    pitch: str
    pattern: str
    timbre: str
    wobble: int

    def read(self) -> bytes:
        """WAV, 16 kHz mono."""
        import soundfile

        draws = np.random.default_rng(self.wobble)
        time = np.arange(int(SECONDS * SAMPLE_RATE)) / SAMPLE_RATE
        beat, course = PATTERNS[self.pattern]
        bend = {2: time / SECONDS, 3: -time / SECONDS}.get(course, 0 * time)
        phase = 2 * np.pi * np.cumsum(PITCHES[self.pitch] * 2 ** (bend + draws.uniform(-0.1, 0.1))) / SAMPLE_RATE
        wave = np.sin(phase) if self.timbre == "pure" else np.sign(np.sin(phase)) * 0.5
        wave *= 0.5 + 0.5 * np.cos(2 * np.pi * beat * time) if course == 1 else 1
        buffer = io.BytesIO()
        soundfile.write(
            buffer,
            (0.3 * wave + 0.002 * draws.standard_normal(len(wave))).astype(np.float32),
            SAMPLE_RATE,
            format="WAV",
            subtype="PCM_16",
        )
        return buffer.getvalue()


def synthetic_records(split: str, items: int, seed: int = 0) -> Found:
    """`items` drawings and as many tones; validation holds each combination once, drawn with other wobbles than
    training.

    Labels of a drawing: its colour, and 8 + its shape.
    """
    held_out = split != "train"
    pictures, tones = [*product(COLOURS, SHAPES, PLACES, GROUNDS)], [*product(PITCHES, PATTERNS, TIMBRES)]
    records = ListRecords()
    for number in range(min(items, len(pictures)) if held_out else items):
        colour, shape, place, ground = pictures[number % len(pictures)]
        caption = f"a {colour} {shape} on the {place} of a {ground} ground"
        labels = (list(COLOURS).index(colour), len(COLOURS) + SHAPES.index(shape))
        records.append(
            Record(
                f"synthetic/{split}/picture{number}",
                Drawing(colour, shape, place, ground, _wobble(seed, held_out, number)),
                (caption, f"{ground} picture, {colour} {shape}, {place}"),
                "synthetic",
                "image",
                labels,
            )
        )
    for number in range(min(items, len(tones)) if held_out else items):
        pitch, pattern, timbre = tones[number % len(tones)]
        records.append(
            Record(
                f"synthetic/{split}/tone{number}",
                Tone(pitch, pattern, timbre, _wobble(seed, held_out, number)),
                (f"a {timbre} tone, {pitch}, {pattern}", f"a {pattern} sound of {pitch} pitch, {timbre}"),
                "synthetic",
                "audio",
            )
        )
    return Found(records)


def _wobble(seed: int, held_out: bool, number: int) -> int:
    return seed * 10_000_019 + number + held_out * 5_000_011
