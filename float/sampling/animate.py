"""Portrait + sound -> frames: the trained parts put together, window by window.

Shapes: T frames of the clip, L frames of a window, F raw audio width, d motion width, S picture side.
"""

import functools
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count, cycle, islice, tee
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from float.config import PRESETS, Config, data_root
from float.data.clips import Clip, find_clips
from float.data.face import RELEASED, Framing, default_detector, read_boxes
from float.data.frames import ClipReader, in_batches
from float.data.media import to_tensor, to_uint8
from float.data.pose import VALUES, as_condition, clip_tracker
from float.model import MotionGenerator, Pass
from float.modules.audio import AudioEncoder, LogMelEncoder, frames_of, make_audio_encoder
from float.modules.autoencoder import edit_motion
from float.sampling.motion import SamplingOptions, sample_windows
from float.sampling.still import StillHead
from float.weights.open import Autoencoder, load_autoencoder, load_generator, make_generator
from shared.config import load_saved
from shared.engine.checkpoint import open_run
from shared.errors import UserError
from shared.flow import check_solver

FREE, STILL = "free", "still"  # what --pose says beside a video
POSE_BATCH = 32  # frames whose pose is read at once
FRAMING_CLIPS, FRAMING_SIDE = 8, 256  # how many clips a run's framing is measured on, in which size


def sampling_options(config: Config, **changes: Any) -> SamplingOptions:
    """The sampler's settings of a run, with the changes that are not None. UserError for an unknown solver."""
    model = config.model
    same = ("nfe", "a_cfg_scale", "r_cfg_scale", "e_cfg_scale", "reference_guidance")
    chosen: dict[str, Any] = {name: model[name] for name in same}
    chosen |= {"method": model.ode_method, "atol": model.ode_atol, "rtol": model.ode_rtol}
    chosen["noise_scale"] = config.training.sigma_max  # where the path that was trained begins
    options = SamplingOptions(**chosen | {name: value for name, value in changes.items() if value is not None})
    check_solver(options.method)
    return options


@dataclass
class Portrait:
    """A source picture, encoded: identity latent (1, d), own motion (1, d), features for the decoder."""

    identity: Tensor
    motion: Tensor
    features: list[Tensor]


class Animator:
    """Generator and auto-encoder on one device.

    call: what runs the generator where that is not the module itself: the wrapped model of a running training. framing:
    how a photo is cropped for this model; None where its training clips show no faces that can be found.
    """

    def __init__(
        self,
        generator: MotionGenerator,
        autoencoder: Autoencoder,
        config: Config,
        device: torch.device,
        *,
        call: Callable[..., Tensor] | None = None,
        framing: Framing | None = RELEASED,
    ):
        self.generator, self.autoencoder = generator, autoencoder.to(device).eval()
        self.config, self.device, self.call, self.framing = config, device, call or generator, framing

    @functools.cached_property
    def encoder(self) -> AudioEncoder | LogMelEncoder:
        """The encoder of the sound that the run was trained with."""
        model = self.config.model
        encoder = make_audio_encoder(
            model.audio_features, model.wav2vec_model_path, only_last_features=model.only_last_features
        )
        return encoder.to(self.device)

    @torch.no_grad()
    def portrait(self, picture: np.ndarray) -> Portrait:
        """Encode a prepared picture, uint8 (S, S, 3)."""
        identity, motion, features = self.autoencoder.encode_source(to_tensor(picture)[None].to(self.device))
        return Portrait(identity, motion, features)

    def first_frame(self, clip: Clip) -> np.ndarray:
        """The first frame of a data set's clip that has both picture and sound, as training sees it."""
        reader = ClipReader(self.config.model.input_size, self.config.data, read_boxes(data_root(self.config.data)))
        return next(reader.frames(clip, reader.first(clip)))

    def velocities(self, t_B: Tensor, *inputs: Tensor, passes: Sequence[Pass], **pose: Tensor) -> Tensor:
        """The generator as the sampler asks for it."""
        return self.call(t_B, *inputs, passes=passes, **pose).float()

    @torch.no_grad()
    def motion_windows(
        self,
        audio_windows: Iterator[Tensor],
        motion_1d: Tensor,
        emotion: Tensor | Iterator[Tensor],
        options: SamplingOptions,
        pose: Iterator[Tensor] | None = None,
    ) -> Iterator[Tensor]:
        """Motion latents (1, L, d), window after window.

        audio_windows: raw features (1, n, F). motion: the portrait's own, (1, d). emotion: (7,), or one (7,) per
        window. pose: what `poses` gives.
        """
        data, we = self.config.data, emotion
        own_1d, limit = self.generator.whiten(motion_1d), self.config.model.reference_limit
        known_1d = own_1d if limit is None else own_1d.clamp(-limit, limit)
        given, wanted = (None, None) if pose is None else tee(pose)
        constant: Tensor | None = None  # of the first window: whose motion it is
        windows = sample_windows(
            self,
            # projected once a window, not in every step of the solver
            (self.call(None, None, window.to(self.device).float()) for window in audio_windows),
            known_1d,
            we.to(self.device)[None, None]
            if isinstance(we, Tensor)
            else (one.to(self.device)[None, None] for one in we),
            num_frames=data.sequence_length,
            num_prev_frames=data.prev_frames,
            options=options,
            pose_windows=given,
        )
        for window in windows:
            if not self.generator.relative:
                window = window + (own_1d - known_1d)[:, None]
            if wanted is not None:
                asked = next(wanted)
                constant = self.generator.pose_constant(window, asked) if constant is None else constant
                window = self.generator.with_pose(window, asked, constant)
            yield self.generator.unwhiten(window, motion_1d)

    def poses(self, source: str) -> Iterator[Tensor] | None:
        """Windows (1, L, 7) of the head's pose without end: FREE, STILL, or that of a video, whose frames are gone
        through back and forth. UserError for a run that has not learned it.
        """
        if source == FREE:
            return None
        model, data = self.config.model, self.config.data
        if not model.pose_condition:
            raise UserError(
                f"--pose {source}: this checkpoint was trained without the head's pose; train with --pose-condition, "
                "or let the head stay with --moving face"
            )
        pose_T6 = torch.zeros(1, VALUES)
        if source != STILL:
            frames = ClipReader(model.input_size, data, {}).frames(Clip(source, Path(source), Path(source), "nobody"))
            tracker, parts = None, []
            for batch in in_batches(frames, POSE_BATCH):
                tracker = tracker or clip_tracker(batch[0], data)
                parts.append(tracker(to_tensor(batch)))
            pose_T6 = torch.cat(parts)
        there, length = range(len(pose_T6)), data.sequence_length
        rows = cycle([*there, *there[-2:0:-1]])
        return (as_condition(pose_T6[list(islice(rows, length))])[None].to(self.device) for _ in count())

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
                features = [feature.expand(len(part), *feature.shape[1:]) for feature in portrait.features]
                images = self.autoencoder.decode(portrait.identity.expand(len(part), -1), part, features)
                yield from to_uint8(images)
                made += len(part)

    def speak(
        self, portrait: Portrait, wave: np.ndarray, emotion: Tensor, options: SamplingOptions
    ) -> Iterator[np.ndarray]:
        """Frames uint8 (S, S, 3) of a portrait that speaks a sound (n,) under one emotion (7,)."""
        data, sound = self.config.data, torch.from_numpy(np.ascontiguousarray(wave)).to(self.device)
        windows = audio_windows(self.encoder, sound, fps=data.video_fps, length=data.sequence_length, stream=False)
        motions = self.motion_windows(windows, portrait.motion, emotion, options)
        return self.frames(portrait, motions, total=frames_of(len(wave), data.video_fps))

    def part(self, portrait: Portrait, picture: np.ndarray, moving: str) -> Callable[[np.ndarray], np.ndarray]:
        """What is shown of every frame: all of it, or the portrait's picture in which only face or lips move."""
        if moving == "all":
            return lambda frame: frame
        rest = next(self.frames(portrait, iter([portrait.motion[None]]), total=1))
        return StillHead(picture, rest, moving, self.config.data, has_face=self.framing is not None)

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

    stream=False: heard as training hears clips (AudioEncoder.pieces). stream=True: wav2vec2 hears each window by itself
    with some seconds to either side, so that the first window is ready soon; the features then differ slightly.
    """
    if isinstance(encoder, AudioEncoder) and stream:
        yield from (piece[None] for piece in encoder.pieces(wave_n, fps, length=length))
        return
    waiting: list[Tensor] = []  # pieces do not end where windows do
    for piece in encoder.pieces(wave_n, fps):
        joined = torch.cat([*waiting, piece])
        whole = len(joined) // length * length
        yield from joined[:whole, None].transpose(0, 1).split(length, 1) if whole else ()
        waiting = [joined[whole:]]
    if waiting and len(waiting[0]):
        yield waiting[0][None]


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
    """Everything of a trained run (shared.engine.checkpoint.open_run says which checkpoint), of one of its checkpoints,
    or of a file of weights with the released names.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(
            f"--checkpoint {path}: no such file or folder; give the output folder of float/train.py, or float.pth"
        )
    if path.is_file() and not is_of_run(path):
        config, source, weights = load_saved(Config, PRESETS / "official.yaml"), str(path), path
        framing: Framing | None = RELEASED
    else:
        folder, weights = run_folder(path), path if path.is_file() else open_run(path)
        config = load_saved(Config, folder / "config.yaml")
        source, framing = autoencoder_source(config, folder), framing_of_run(config, folder)
    generator = make_generator(config.model, config.data)
    load_generator(generator, weights)
    autoencoder = load_autoencoder(config.model, source)
    return Animator(generator.to(device).eval(), autoencoder, config, device, framing=framing)


def is_of_run(path: Path) -> bool:
    """Whether a file of weights lies in a checkpoint of a run; others are taken for the released model's."""
    return (path.parent / "manifest.json").is_file()


def framing_of_run(config: Config, folder: Path) -> Framing | None:
    """How a run's clips frame their faces: written by float/train.py, else measured on the clips where they are at
    hand, else as released.
    """
    saved = folder / "framing.json"
    if saved.is_file():
        values = json.loads(saved.read_text(encoding="utf-8"))
        return Framing(values["margin"], tuple(values["shift"])) if values else None
    try:
        clips = find_clips(data_root(config.data), config.data.train_split)
        return measured_framing(clips, config)
    except UserError:
        return RELEASED


def measured_framing(clips: list[Clip], config: Config) -> Framing | None:
    """The framing of the first frames of some clips; None where they show no faces that the detector finds."""
    detector = default_detector()
    if detector is None or not clips:
        return RELEASED
    reader = ClipReader(max(FRAMING_SIDE, config.model.input_size), config.data, {})
    frames = (next(reader.frames(clip)) for clip in clips[:: max(1, len(clips) // FRAMING_CLIPS)])
    return Framing.of_frames(frames, detector)
