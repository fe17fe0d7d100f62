"""Scoring a trained run on held-out clips: reconstruction, and how far generated mouths follow the sound."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from float.data.clips import Clip
from float.data.face import read_boxes
from float.data.frames import ClipReader
from float.data.media import to_tensor
from float.evaluation.formulas import best_lag, best_lag_of_clips, correlation, log_energy, mouth_activity
from float.evaluation.mouth_meter import MouthMeter, read_truth
from float.modules.audio import frames_of
from float.modules.emotion import one_hot
from float.modules.losses import psnr
from float.sampling.animate import Animator, sampling_options
from float.sampling.motion import SamplingOptions

ENCODE_BATCH = 32
SHEET_FRAMES = 7


@dataclass
class Material:
    """A clip in memory: frames uint8 (T, S, S, 3), sound (n,), true mouth opening (T,) or None."""

    clip: Clip
    frames: np.ndarray
    wave: np.ndarray
    truth: np.ndarray | None


@dataclass
class Scores:
    """Numbers by name, and the same per clip."""

    values: dict[str, float] = field(default_factory=dict)
    clips: list[dict[str, Any]] = field(default_factory=list)


def load_material(animator: Animator, clips: list[Clip], root: Path) -> list[Material]:
    """Read clips as the encoders see them; picture and sound cut to the shorter."""
    data, size, boxes = animator.config.data, animator.config.model.input_size, read_boxes(root)
    found = []
    for clip in clips:
        reader = ClipReader(size, data, boxes)
        first = reader.first(clip)
        frames, wave = np.stack(list(reader.frames(clip, first))), reader.sound(clip, first)
        count = min(len(frames), frames_of(len(wave), data.video_fps))
        truth = read_truth(clip)
        truth = None if truth is None else truth[first:]
        found.append(Material(clip, frames[:count], wave[: round(count / data.video_fps * 16000)], truth))
    return found


class Scorer:
    """Runs one animator over material."""

    def __init__(self, animator: Animator, meter: MouthMeter | None):
        self.animator, self.meter, self.config = animator, meter, animator.config

    @torch.no_grad()
    def reconstruct(self, item: Material) -> np.ndarray:
        """The clip from its first frame and its true motion."""
        portrait = self.animator.portrait(item.frames[0])
        driving = to_tensor(item.frames).split(ENCODE_BATCH)
        motions = (self.animator.autoencoder.encode_motion(part.to(self.animator.device))[None] for part in driving)
        return np.stack(list(self.animator.frames(portrait, motions, total=len(item.frames))))

    def generate(self, item: Material, wave: np.ndarray, options: SamplingOptions) -> np.ndarray:
        """The clip's first frame speaking a sound."""
        emotion = torch.zeros(7) if item.clip.emotion is None else one_hot(item.clip.emotion)
        return np.stack(list(self.animator.speak(self.animator.portrait(item.frames[0]), wave, emotion, options)))

    def opening(self, frames: np.ndarray) -> np.ndarray:
        """Mouth opening (T,) by the meter, or by activity where there is none."""
        if self.meter is not None:
            return self.meter.measure(frames)
        return mouth_activity(frames, self.animator.config.data.mouth_box)

    def reference(self, item: Material) -> np.ndarray:
        """What the opening is compared with: the truth, or the proxy on the true frames."""
        return self.opening(item.frames) if item.truth is None else item.truth[: len(item.frames)]

    def score_reconstruction(self, material: list[Material]) -> tuple[Scores, list[np.ndarray]]:
        """PSNR of picture and mouth against copying the first frame, and the mouth read off the reconstruction."""
        box, scores, made = self.animator.config.data.mouth_box, Scores(), []
        for item in material:
            frames = self.reconstruct(item)
            ours, true, copy = (
                to_tensor(frames),
                to_tensor(item.frames),
                to_tensor(item.frames[:1]).expand(len(frames), -1, -1, -1),
            )
            scores.clips.append(
                {
                    "clip": item.clip.clip_id,
                    "psnr": psnr(ours, true),
                    "psnr_copy": psnr(copy, true),
                    "psnr_mouth": psnr(ours, true, box),
                    "psnr_mouth_copy": psnr(copy, true, box),
                    "mouth_r_true_frames": correlation(self.opening(item.frames), self.reference(item)),
                    "mouth_r_reconstruction": correlation(self.opening(frames), self.reference(item)),
                }
            )
            made.append(frames)
        scores.values = _means(scores.clips)
        return scores, made

    def score_generation(
        self, material: list[Material], sounds: list[Material], seeds: list[int]
    ) -> tuple[Scores, list[np.ndarray]]:
        """Each held-out portrait with its own sound, and with every other sound as a contrast; means over seeds.

        *_person: all frames of a person's clips together, which a clip without speech, whose mouth hardly moves, does
        not change; means over people and seeds.
        """
        scores, made = Scores(), []
        joined: dict[tuple[str | None, int], list[tuple[np.ndarray, np.ndarray]]] = {}  # by person and seed
        contrast: dict[tuple[str | None, int], list[tuple[np.ndarray, np.ndarray]]] = {}  # by person and other sound
        config, data = self.animator.config, self.animator.config.data
        for item in material:
            true, rows, person = self.reference(item), [], item.clip.identity
            for seed in seeds:
                options = sampling_options(config, seed=seed)
                frames = self.generate(item, item.wave, options)
                if seed == seeds[0]:
                    made.append(frames)
                opening = self.opening(frames)
                rows.append(_row(opening, true))
                joined.setdefault((person, seed), []).append((opening, true))
            others = [other for other in sounds if other.clip.clip_id != item.clip.clip_id]
            options = sampling_options(config, seed=seeds[0])
            wrong = []
            for k, other in enumerate(others):
                opening = self.opening(self.generate(item, other.wave, options))
                wrong.append(correlation(opening, true))
                contrast.setdefault((person, k), []).append((opening, true))
            energy = log_energy(item.wave, fps=data.video_fps, frames=len(item.frames))
            scores.clips.append(
                {
                    "clip": item.clip.clip_id,
                    **_means(rows),
                    "mouth_r_other_sound": float(np.mean(wrong)) if wrong else 0.0,
                    "mouth_r_log_energy": correlation(energy, true),
                    "worst_lag_frames": max(abs(row["lag_frames"]) for row in rows),
                }
            )
        scores.values = _means(scores.clips)
        scores.values["mouth_r_margin"] = scores.values["mouth_r_own_sound"] - scores.values["mouth_r_other_sound"]
        scores.values["worst_lag_frames"] = max(row["worst_lag_frames"] for row in scores.clips)
        own, wrong = ([best_lag_of_clips(pairs, lags=0)[1] for pairs in one.values()] for one in (joined, contrast))
        scores.values["mouth_r_person"] = float(np.mean(own))
        scores.values["mouth_r_person_margin"] = float(np.mean(own) - (np.mean(wrong) if wrong else 0.0))
        lags = [abs(best_lag_of_clips(pairs)[0]) for pairs in joined.values()]
        scores.values["worst_lag_frames_person"] = float(max(lags))
        return scores, made


def _row(opening: np.ndarray, true: np.ndarray) -> dict[str, float]:
    count = min(len(opening), len(true))
    lag, _ = best_lag(opening, true)
    return {
        "mouth_r_own_sound": correlation(opening, true),
        "lag_frames": float(lag),
        "std_ratio": float(opening[:count].std() / max(true[:count].std(), 1e-9)),
    }


def _means(rows: list[dict]) -> dict[str, float]:
    names = [name for name, value in rows[0].items() if not isinstance(value, str)]
    return {name: float(np.mean([row[name] for row in rows])) for name in names}


def side_by_side(*videos: np.ndarray, enlarge: int = 1) -> Iterator[np.ndarray]:
    """Frames of several clips beside each other, over their common length, enlarged by whole pixels."""
    for frames in zip(*videos, strict=False):
        row = np.concatenate(frames, 1)
        yield row.repeat(enlarge, 0).repeat(enlarge, 1)


def talking_sheet(
    path: Path, frames: np.ndarray, opening: np.ndarray, truth: np.ndarray, wave: np.ndarray, *, fps: float
) -> None:
    """A picture: generated frames, from the widest mouth to the most shut, over the curves of mouth and sound.

    frames: uint8 (T, S, S, 3); opening: the mouth read off them, (T,); truth: that of the true frames; wave: (n,).
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    order = np.argsort(-opening[: len(frames)])
    shown = sorted(order[np.linspace(0, len(order) - 1, SHEET_FRAMES).astype(int)])
    figure, (above, below) = pyplot.subplots(2, 1, figsize=(12, 4), height_ratios=(1.8, 1.7), layout="constrained")
    above.imshow(np.concatenate(list(frames[shown]), 1), interpolation="nearest")
    above.axis("off")
    time = np.arange(len(opening)) / fps
    energy = log_energy(wave, fps=fps, frames=len(opening))
    curves = (
        ("sound, log energy", energy, "0.7"),
        ("mouth, true", truth, "tab:green"),
        ("mouth, generated", opening, "k"),
    )
    for name, values, colour in curves:
        values = values[: len(time)]
        level = (values - values.mean()) / max(float(values.std()), 1e-6)
        below.plot(time[: len(values)], level, label=name, color=colour, linewidth=1.4)
    for index in shown:
        below.axvline(index / fps, color="tab:blue", linewidth=0.6, linestyle=":")
    below.set_xlabel("seconds; dotted: the frames above")
    below.set_yticks([])
    below.legend(loc="upper right", fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)
    pyplot.close(figure)
