"""Encoding clips with the frozen encoders, and the cache of what comes out.

One safetensors file per clip: motion (T, d), motion_flipped (T, d) when mirrored versions are cached, audio_raw (T, F),
emotion (7), has_emotion (1). The header's metadata names the clip and the hash of the encoders; another hash means:
encode again.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from float.config import DataConfig, ModelConfig
from float.data.clips import Clip
from float.data.face import FaceBox
from float.data.frames import clip_frames
from float.data.media import is_silent, read_audio, to_tensor
from float.modules.audio import SAMPLE_RATE, AudioEncoder, LogMelEncoder, make_audio_encoder, normalise_waveform
from float.modules.emotion import EMOTIONS, Audio2Emotion, one_hot
from float.weights.open import Autoencoder, weights_hash
from shared.errors import BadSample, UserError, written_aside

ENCODE_BATCH = 32
MAX_SHIFT_SECONDS = 0.1  # sound and picture may differ by so much; more is cut to the shorter one with a note
FORMAT = 1


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
        settings: list[Any] = [
            FORMAT,
            self.data.video_fps,
            self.data.face_crop,
            self.data.emotion_source,
            self.flipped,
            self.data.feature_dtype,
        ]
        settings += [self.model.input_size, self.model.audio_features, self.model.only_last_features]
        parts = [json.dumps(settings), weights_hash(self.autoencoder), weights_hash(self.audio)]
        parts += [weights_hash(self.recogniser)] if self.recogniser is not None else []
        return hashlib.sha256("".join(parts).encode()).hexdigest()[:16]

    def encode(self, clip: Clip, boxes: dict[str, FaceBox]) -> tuple[dict[str, Tensor], list[str]]:
        """All cached tensors of a clip, and sentences on what was odd. BadSample when it cannot be used."""
        notes: list[str] = []
        frames = np.stack(list(clip_frames(clip, self.model.input_size, self.data, boxes)) or [np.zeros(0)])
        if frames.ndim != 4:
            raise BadSample(f"{clip.video}: holds no frame")
        wave = read_audio(clip.audio)
        if is_silent(wave):
            raise BadSample(f"{clip.audio}: is silent; there is nothing to learn from")
        frames, wave = self._same_length(frames, wave, clip, notes)
        tensors = {"motion": self.motion(frames), "audio_raw": self.audio_features(wave)[: len(frames)]}
        if self.flipped:
            tensors["motion_flipped"] = self.motion(frames[:, :, ::-1])
        emotion = self._emotion(clip, wave)
        tensors["has_emotion"] = torch.tensor([emotion is not None])
        tensors["emotion"] = torch.zeros(len(EMOTIONS)) if emotion is None else emotion
        for name, value in tensors.items():
            if not torch.isfinite(value.float()).all():
                raise BadSample(
                    f"{clip.video}: encoding gave numbers that are not finite ({name}); check the encoder's weights"
                )
        return tensors, notes

    def _same_length(
        self, frames: np.ndarray, wave: np.ndarray, clip: Clip, notes: list[str]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Cut the longer of picture and sound."""
        picture, sound = len(frames) / self.data.video_fps, len(wave) / SAMPLE_RATE
        if abs(picture - sound) >= MAX_SHIFT_SECONDS:
            notes.append(f"{clip.clip_id}: {picture:.2f} s of picture, {sound:.2f} s of sound; cut to the shorter")
        count = max(1, min(len(frames), int(sound * self.data.video_fps + 1e-6)))
        return frames[:count], wave[: round(count / self.data.video_fps * SAMPLE_RATE)]

    @torch.no_grad()
    def motion(self, frames: np.ndarray) -> Tensor:
        """Motion latents (T, d), float32 on the CPU, of frames (T, S, S, 3)."""
        parts = [
            self.autoencoder.encode_motion(to_tensor(frames[start : start + ENCODE_BATCH]).to(self.device))
            .float()
            .cpu()
            for start in range(0, len(frames), ENCODE_BATCH)
        ]
        return torch.cat(parts)

    def audio_features(self, wave: np.ndarray) -> Tensor:
        """Raw features (T, F) of a whole clip, on the CPU."""
        features = self.audio.encode_clip(
            torch.from_numpy(np.ascontiguousarray(wave)).to(self.device), self.data.video_fps
        )
        return features.to("cpu", getattr(torch, self.data.feature_dtype))

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
        normalised = normalise_waveform(torch.from_numpy(np.ascontiguousarray(wave)).to(self.device))
        return self.recogniser(normalised[None])[0].float().cpu()


def feature_path(folder: Path, clip_id: str) -> Path:
    """Where a clip's features lie."""
    return folder / f"{clip_id}.safetensors"


def is_encoded(path: Path, encoder_hash: str) -> bool:
    """Whether a clip's features are there, whole, and of these encoders."""
    try:
        with safe_open(str(path), "pt") as file:
            return (file.metadata() or {}).get("encoders") == encoder_hash
    except (OSError, SafetensorError):
        return False


def write_features(path: Path, tensors: dict[str, Tensor], clip: Clip, encoder_hash: str) -> None:
    """Write aside and rename."""
    metadata = {"encoders": encoder_hash, "clip_id": clip.clip_id, "identity": clip.identity}
    with written_aside(path) as temporary:
        save_file({name: value.contiguous() for name, value in tensors.items()}, temporary, metadata)


def remove_unlisted(clips: list[Clip], folder: Path) -> None:
    """Remove features of clips that are not among these."""
    listed = {feature_path(folder, clip.clip_id) for clip in clips}
    for path in set(folder.glob("*.safetensors")) - listed:
        path.unlink()


def encode_clips(
    encoder: ClipEncoder, clips: list[Clip], boxes: dict[str, FaceBox], folder: Path, *, rank: int = 0, world: int = 1
) -> dict[str, list[str]]:
    """Encode what is missing; every rank takes its share. -> encoded, kept: ids; bad, notes: sentences.

    A clip that cannot be used is left out and listed; files of other encoders are replaced.
    """
    done: dict[str, list[str]] = {"encoded": [], "kept": [], "bad": [], "notes": []}
    for clip in clips[rank::world]:
        path = feature_path(folder, clip.clip_id)
        if is_encoded(path, encoder.hash):
            done["kept"].append(clip.clip_id)
            continue
        try:
            tensors, notes = encoder.encode(clip, boxes)
        except BadSample as error:
            done["bad"].append(str(error))
            path.unlink(missing_ok=True)
            continue
        write_features(path, tensors, clip, encoder.hash)
        done["encoded"].append(clip.clip_id)
        done["notes"] += notes
    return done
