"""Portrait + sound -> frames: the trained parts put together, window by window.

Shapes: T frames of the clip, L frames of a window, F raw audio width, d motion width, S picture side.
"""

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from float.config import PRESETS, Config
from float.data.media import to_tensor, to_uint8
from float.model import MotionGenerator
from float.modules.audio import AudioEncoder, LogMelEncoder, frames_of, normalise_waveform, pad_to_frames
from float.modules.autoencoder import edit_motion
from float.sampling.motion import SamplingOptions, sample_windows
from float.weights.open import Autoencoder, chosen_checkpoint, load_autoencoder, load_generator, make_generator
from shared.config import load_saved
from shared.errors import UserError

CONTEXT_SECONDS = 4.0  # sound to either side of a window that a streamed wav2vec2 sees


def sampling_options(config: Config, **changes: Any) -> SamplingOptions:
    """The sampler's settings of a run, with the changes that are not None."""
    model = config.model
    same = ("nfe", "a_cfg_scale", "r_cfg_scale", "e_cfg_scale", "reference_guidance")
    chosen: dict[str, Any] = {name: model[name] for name in same}
    chosen |= {"method": model.ode_method, "atol": model.ode_atol, "rtol": model.ode_rtol}
    chosen["noise_scale"] = config.training.sigma_max  # where the path that was trained begins
    return SamplingOptions(**chosen | {name: value for name, value in changes.items() if value is not None})


@dataclass
class Portrait:
    """A source picture, encoded: identity latent (1, d), own motion (1, d), features for the decoder."""

    identity: Tensor
    motion: Tensor
    features: list[Tensor]


class Animator:
    """Generator and auto-encoder on one device. `generator` may be the wrapped model of a running training."""

    def __init__(self, generator: Any, autoencoder: Autoencoder, config: Config, device: torch.device):
        self.generator, self.autoencoder = generator, autoencoder.to(device).eval()
        self.config, self.device = config, device

    @property
    def module(self) -> MotionGenerator:
        """The bare generator, for its constants."""
        return getattr(self.generator, "module", self.generator)

    @torch.no_grad()
    def portrait(self, picture: np.ndarray) -> Portrait:
        """Encode a prepared picture, uint8 (S, S, 3)."""
        identity, motion, features = self.autoencoder.encode_source(to_tensor(picture)[None].to(self.device))
        return Portrait(identity, motion, features)

    def _velocity(
        self, t_B: Tensor, x: Tensor, wa: Tensor, wr: Tensor, we: Tensor, prev_x: Tensor, prev_wa: Tensor
    ) -> Tensor:
        """The generator in the sampler's form: raw sound goes in, rows of NaN stand for no sound (see _windows)."""
        no_sound, no_previous = wa[:, 0, 0].isnan(), prev_wa[:, 0, 0].isnan()
        return self.generator(
            t_B,
            x,
            wa.nan_to_num(),
            wr,
            we,
            prev_x,
            prev_wa.nan_to_num(),
            null_audio_B=no_sound,
            has_previous_B=~no_previous,
            window_only=True,
        ).float()

    @torch.no_grad()
    def motion_windows(
        self,
        audio_windows: Iterator[Tensor],
        motion_1d: Tensor,
        emotion: Tensor | Iterator[Tensor],
        options: SamplingOptions,
    ) -> Iterator[Tensor]:
        """Motion latents (1, L, d), window after window.

        audio_windows: raw features (1, n, F). motion: the portrait's own, (1, d). emotion: (7,), or one (7,) per
        window.
        """
        data = self.config.data
        wr = self.module.whiten(motion_1d)
        we = (
            emotion.to(self.device)[None, None]
            if isinstance(emotion, Tensor)
            else (e.to(self.device)[None, None] for e in emotion)
        )
        windows = sample_windows(
            self._velocity,
            (window.to(self.device).float() for window in audio_windows),
            wr,
            we,
            num_frames=data.sequence_length,
            num_prev_frames=data.prev_frames,
            options=options,
            null_audio=float("nan"),
        )
        for window in windows:
            yield self.module.unwhiten(window)

    @torch.no_grad()
    def frames(
        self,
        portrait: Portrait,
        motions: Iterator[Tensor],
        *,
        total: int,
        edit: Callable[[Tensor], Tensor] | None = None,
        batch: int = 8,
    ) -> Iterator[np.ndarray]:
        """Decoded frames uint8 (S, S, 3), `total` of them, from windows of motion (1, L, d)."""
        made = 0
        for window in motions:
            for part in window[0].split(batch):
                part = part[: total - made]
                if not len(part):
                    return
                part = part if edit is None else edit(part)
                count = len(part)
                features = [feature.expand(count, *feature.shape[1:]) for feature in portrait.features]
                images = self.autoencoder.decode(portrait.identity.expand(count, -1), part, features)
                yield from to_uint8(images)
                made += count

    def editor(self, targets: dict[int, float], deltas: dict[int, float]) -> Callable[[Tensor], Tensor] | None:
        """A function that edits motion latents along single directions; None when there is nothing to edit."""
        if not targets and not deltas:
            return None
        wrong = [k for k in (*targets, *deltas) if not 0 <= k < self.config.model.dim_m]
        if wrong:
            raise UserError(f"direction {wrong[0]}: there are {self.config.model.dim_m}, numbered from 0")
        basis = self.autoencoder.dec.direction(None)
        return lambda motion: edit_motion(motion, basis, targets, deltas)


def audio_windows(
    encoder: AudioEncoder | LogMelEncoder, wave_n: Tensor, *, fps: float, length: int, stream: bool
) -> Iterator[Tensor]:
    """Raw features (1, n, F) of windows of `length` frames.

    stream=False, and log-mel always: features of the whole clip at once. stream=True: wav2vec2 sees the window and
    CONTEXT_SECONDS to either side, so that memory does not grow with the clip; the features then differ slightly from
    those of the whole clip.
    """
    total = frames_of(len(wave_n), fps)
    if not stream or isinstance(encoder, LogMelEncoder):
        yield from encoder.encode_clip(wave_n, fps)[None].split(length, 1)
        return
    wave_n = pad_to_frames(normalise_waveform(wave_n)[None], total, fps)[0]
    context, samples = round(CONTEXT_SECONDS * fps), len(wave_n) / total
    for start in range(0, total, length):
        first, last = max(0, start - context), min(total, start + length + context)
        piece = wave_n[round(first * samples) : round(last * samples)]
        features = encoder.raw_features(piece[None], last - first)
        yield features[:, start - first : min(start + length, total) - first]


def run_folder(path: Path) -> Path:
    """The output folder of a run, from itself, one of its checkpoints, or a file in one."""
    folders = [folder for folder in (path, *path.parents[:3]) if (folder / "config.yaml").is_file()]
    if folders:
        return folders[-1] if folders[0].parent.name == "checkpoints" else folders[0]
    raise UserError(f"{path}: no config.yaml here or above; give the output folder of float/train.py")


def autoencoder_source(config: Config, output_dir: Path) -> str:
    """Where the auto-encoder of a run lies: the one it was given, or the one it trained itself."""
    return config.model.autoencoder_path or str(output_dir / "autoencoder")


def load_run(path: str | Path, device: torch.device) -> Animator:
    """Everything of a trained run (its best checkpoint), of one of its checkpoints, or of the released float.pth."""
    path = Path(path)
    if not path.exists():
        raise UserError(
            f"--checkpoint {path}: no such file or folder; give the output folder of float/train.py, or float.pth"
        )
    if path.is_file() and path.suffix in (".pth", ".pt"):
        config = load_saved(Config, PRESETS / "official.yaml")
        source = str(path)
    else:
        folder = run_folder(path)
        config = load_saved(Config, folder / "config.yaml")
        source = autoencoder_source(config, folder)
    generator = make_generator(config.model, config.data)
    load_generator(generator, path)
    autoencoder = load_autoencoder(config.model, source)
    print(f"motion generator of {chosen_checkpoint(path)}", file=sys.stderr)
    return Animator(generator.to(device).eval(), autoencoder, config, device)
