"""Encoding clips with the frozen encoders, and the cache of what comes out.

One safetensors file per clip: motion (T, d), motion_flipped (T, d) when mirrored versions are cached, pose (T, 6)
against the first frame where it is a condition, audio_raw (T, F), emotion (7), has_emotion (1). The header's metadata
names the clip, its material and the encoders; other encoders or other material under the same name mean: encode again.
Nothing is removed, and no file that this program did not write is replaced.
"""

import hashlib
import json
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from float.config import DataConfig, ModelConfig
from float.data.clips import Clip
from float.data.face import FaceBox
from float.data.frames import ClipReader, in_batches
from float.data.media import is_silent, to_tensor
from float.data.pose import clip_tracker
from float.modules.audio import SAMPLE_RATE, SPEECH_SPREAD, AudioEncoder, LogMelEncoder, make_audio_encoder
from float.modules.emotion import EMOTIONS, Audio2Emotion, one_hot
from float.weights.open import Autoencoder, weights_hash
from shared.errors import BadSample, UserError, written_aside

ENCODE_BATCH = 32
MAX_SHIFT_SECONDS = 0.1  # sound and picture may differ by so much; more is cut to the shorter one with a note
FORMAT = 2
SAMPLED_BYTES = 1 << 16  # of the beginning and the end of a file stand for it


class ClipEncoder:
    """The frozen encoders of phase 2, on one device."""

    def __init__(self, model: ModelConfig, data: DataConfig, autoencoder: Autoencoder, device: torch.device):
        self.model, self.data, self.device = model, data, device
        self.autoencoder = autoencoder.to(device)
        self.audio: AudioEncoder | LogMelEncoder = make_audio_encoder(
            model.audio_features, model.wav2vec_model_path, only_last_features=model.only_last_features
        ).to(device)
        self.recogniser = None
        if data.emotion_source in ("ser", "mixed"):
            self.recogniser = Audio2Emotion.from_pretrained(model.audio2emotion_path).to(device)
        self.flipped = data.use_augmentation and data.horizontal_flip_prob > 0
        self.hash = self._hash()

    def _hash(self) -> str:
        """Changes with the encoders' weights and with every setting that changes what is cached."""
        data, model = self.data, self.model
        settings: list[Any] = [FORMAT, data.video_fps, data.face_crop, data.emotion_source, self.flipped]
        settings += [data.feature_dtype, model.input_size, model.audio_features, model.only_last_features]
        settings += [SPEECH_SPREAD] if isinstance(self.audio, LogMelEncoder) else []
        settings += ["pose"] if model.pose_condition else []
        parts = [json.dumps(settings), weights_hash(self.autoencoder), weights_hash(self.audio)]
        parts += [weights_hash(self.recogniser)] if self.recogniser is not None else []
        return hashlib.sha256("".join(parts).encode()).hexdigest()[:16]

    def encode(self, clip: Clip, boxes: dict[str, FaceBox]) -> tuple[dict[str, Tensor], list[str]]:
        """All cached tensors of a clip, and sentences on what was odd. BadSample when it cannot be used.

        Frames are encoded as they are read: memory does not grow with the clip's pictures.
        """
        reader = ClipReader(self.model.input_size, self.data, boxes)
        first = reader.first(clip)
        wave = reader.sound(clip, first)
        if is_silent(wave):
            raise BadSample(f"{clip.audio}: is silent; there is nothing to learn from")
        parts: dict[str, list[Tensor]] = defaultdict(list)
        tracker = None
        for frames in in_batches(reader.frames(clip, first), ENCODE_BATCH):
            parts["motion"].append(self.motion(frames))
            if self.flipped:
                parts["motion_flipped"].append(self.motion(frames[:, :, ::-1]))
            if self.model.pose_condition:
                tracker = tracker or clip_tracker(frames[0], self.data)
                parts["pose"].append(tracker(to_tensor(frames)))
        if not parts:
            raise BadSample(f"{clip.video}: holds no frame with sound")
        tensors = {name: torch.cat(rows) for name, rows in parts.items()}
        count, wave = self._same_length(len(tensors["motion"]), wave, clip, reader.notes)
        tensors = {name: rows[:count] for name, rows in tensors.items()}
        tensors["audio_raw"] = self.audio_features(wave)[:count]
        emotion = self._emotion(clip, wave)
        tensors["has_emotion"] = torch.tensor([emotion is not None])
        tensors["emotion"] = torch.zeros(len(EMOTIONS)) if emotion is None else emotion
        for name, value in tensors.items():
            if not torch.isfinite(value.float()).all():
                raise BadSample(
                    f"{clip.video}: encoding gave numbers that are not finite ({name}); check the encoder's weights"
                )
        return tensors, reader.notes

    def _same_length(self, frames: int, wave: np.ndarray, clip: Clip, notes: list[str]) -> tuple[int, np.ndarray]:
        """Cut the longer of picture and sound: -> frames, sound."""
        picture, sound = frames / self.data.video_fps, len(wave) / SAMPLE_RATE
        if abs(picture - sound) >= MAX_SHIFT_SECONDS:
            notes.append(f"{clip.clip_id}: {picture:.2f} s of picture, {sound:.2f} s of sound; cut to the shorter")
        count = max(1, min(frames, int(sound * self.data.video_fps + 1e-6)))
        return count, wave[: round(count / self.data.video_fps * SAMPLE_RATE)]

    @torch.no_grad()
    def motion(self, frames: np.ndarray) -> Tensor:
        """Motion latents (T, d), float32 on the CPU, of frames (T, S, S, 3)."""
        return self.autoencoder.encode_motion(to_tensor(frames).to(self.device)).float().cpu()

    def audio_features(self, wave: np.ndarray) -> Tensor:
        """Raw features (T, F) of a whole clip, on the CPU."""
        dtype = getattr(torch, self.data.feature_dtype)
        pieces = self.audio.pieces(torch.from_numpy(np.ascontiguousarray(wave)).to(self.device), self.data.video_fps)
        return torch.cat([piece.to("cpu", dtype) for piece in pieces])

    def _emotion(self, clip: Clip, wave: np.ndarray) -> Tensor | None:
        source = self.data.emotion_source
        if source == "none":
            return None
        if source in ("label", "mixed") and clip.emotion is not None:
            return one_hot(clip.emotion)
        return self.speech_emotion(wave) if self.recogniser is not None else None

    def speech_emotion(self, wave: np.ndarray) -> Tensor:
        """Probabilities (7,) that the recogniser hears; UserError when the settings load none."""
        if self.recogniser is None:
            raise UserError("the emotion is to come from the voice, but no recogniser is loaded; name one with --emo")
        return self.recogniser.hear(torch.from_numpy(np.ascontiguousarray(wave)).to(self.device)).float().cpu()


# --- the cache --------------------------------------------------------------------------------------------------------


def feature_path(folder: Path, clip_id: str) -> Path:
    """Where a clip's features lie."""
    return folder / f"{clip_id}.safetensors"


def material_hash(clip: Clip) -> str:
    """Stands for a clip's files, wherever they lie: their sizes, beginnings and ends."""
    digest = hashlib.sha256()
    for path in dict.fromkeys((clip.video, clip.audio)):
        size = path.stat().st_size
        digest.update(str(size).encode())
        with open(path, "rb") as file:
            digest.update(file.read(SAMPLED_BYTES))
            file.seek(max(0, size - SAMPLED_BYTES))
            digest.update(file.read())
    return digest.hexdigest()[:16]


def cached_metadata(path: Path) -> dict[str, str] | None:
    """What a file of the cache says of itself; None where there is none, one word for a damaged one."""
    if not path.exists():
        return None
    try:
        with safe_open(str(path), "pt") as file:
            return file.metadata() or {}
    except (OSError, SafetensorError):
        return {"encoders": "none: damaged"}


def write_features(path: Path, tensors: dict[str, Tensor], clip: Clip, encoder_hash: str, material: str = "") -> None:
    """Write aside and rename."""
    metadata = {"encoders": encoder_hash, "clip_id": clip.clip_id, "identity": clip.identity}
    metadata |= {"material": material, "source": str(clip.video.resolve())}
    with written_aside(path) as temporary:
        temporary.write_bytes(save({name: value.contiguous() for name, value in tensors.items()}, metadata))


@dataclass
class Encoded:
    """What became of the clips: ids of those encoded now and of those found in the cache; sentences on the rest."""

    encoded: list[str] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)
    bad: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def add(self, other: "Encoded") -> None:
        """Take in what another rank did."""
        for name, entries in vars(other).items():
            getattr(self, name).extend(entries)


def encode_clips(
    encoder: ClipEncoder, clips: list[Clip], boxes: dict[str, FaceBox], folder: Path, *, rank: int = 0, world: int = 1
) -> Encoded:
    """Encode what is missing; every rank takes its share. A clip that cannot be used is left out and listed.

    UserError where a file of the cache's name is not the cache's own, or holds a clip of another data folder.
    """
    done = Encoded()
    for clip in clips[rank::world]:
        path = feature_path(folder, clip.clip_id)
        found = cached_metadata(path)
        try:
            material = material_hash(clip)
            if found is not None and found.get("encoders") == encoder.hash and found.get("material") == material:
                done.kept.append(clip.clip_id)
                continue
            _may_replace(path, found, clip, material)
            tensors, notes = encoder.encode(clip, boxes)
        except FileNotFoundError as error:
            done.bad.append(f"{error.filename}: no such file")
            continue
        except BadSample as error:
            done.bad.append(str(error))
            continue
        write_features(path, tensors, clip, encoder.hash, material)
        done.encoded.append(clip.clip_id)
        done.notes += notes
    return done


def _may_replace(path: Path, found: dict[str, str] | None, clip: Clip, material: str) -> None:
    """UserError unless a file of the cache is this clip's own."""
    if found is None:
        return
    if "encoders" not in found:
        raise UserError(f"{path}: was not written by this program; give another --features-dir")
    source = found.get("source", "")
    if found.get("material") not in (None, material) and source != str(clip.video.resolve()) and Path(source).exists():
        raise UserError(
            f"{path}: holds the clip {source}, and {clip.video} has the same id; give another --features-dir"
        )
