"""Sound -> one raw feature vector per video frame: wav2vec2 as released, or log-mel that needs no download.

Raw features are cached on disk; only the projection behind them is trained (float/model.py). Sound: float32, mono,
16 kHz.
Shapes: B batch, n samples, T video frames, F raw feature width.
"""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shared.engine.products import use_fast_products
from shared.errors import UserError, load_whole, opening

if TYPE_CHECKING:
    from transformers import Wav2Vec2Config, Wav2Vec2Model

SAMPLE_RATE = 16000
MEL_BANDS, SUB_FRAMES = 40, 4  # log-mel: bands, and 10 ms slices in one video frame of 40 ms
WINDOW_SECONDS, FFT_SIZE = 0.025, 512
SILENCE_POWER = 1e-8
SPEECH_SPREAD = (
    2.5  # least deviation of a clip's log energies that speech has; of speech at hand 2.7 to 4.9, of noise 0.65
)
SLICES_AT_ONCE = 2048  # of log-mel, so that long sound needs no large spectrum
CHUNK_SAMPLES = SAMPLE_RATE  # that wav2vec2's convolutions take at once; longer ones take more memory and more time
WHOLE_FRAMES = 1000  # a clip of so many frames (40 s) is heard whole
CONTEXT_SECONDS = 4.0  # sound to either side of a piece of a longer one
OLD_WEIGHT_NORM = {"weight_g": "parametrizations.weight.original0", "weight_v": "parametrizations.weight.original1"}


def frames_of(samples: int, fps: float) -> int:
    """Video frames that a sound of so many samples covers, rounded up."""
    return math.ceil(samples * fps / SAMPLE_RATE)


def normalise_waveform(wave: Tensor) -> Tensor:
    """Zero mean and unit variance over the last axis, as wav2vec2's feature extractor does; silence stays zero."""
    mean, variance = wave.mean(-1, keepdim=True), wave.var(-1, unbiased=False, keepdim=True)
    return (wave - mean) / torch.sqrt(variance + 1e-7)


def pad_to_samples(wave_Bn: Tensor, samples: int) -> Tensor:
    """Repeat the last sample until there are `samples`."""
    missing = samples - wave_Bn.shape[-1]
    return wave_Bn if missing <= 0 else torch.cat([wave_Bn, wave_Bn[..., -1:].expand(*wave_Bn.shape[:-1], missing)], -1)


def pad_to_frames(wave_Bn: Tensor, frames: int, fps: float) -> Tensor:
    """Repeat the last sample until the sound fills its frames; for whole clips and for training windows alike."""
    return pad_to_samples(wave_Bn, int(frames * SAMPLE_RATE / fps))


def config_of(path: str, instead: str = "use --audio-features logmel, which needs none") -> "Wav2Vec2Config":
    """The configuration of a wav2vec2 folder; a UserError says how to get the model when it is not there, or what to
    do instead.
    """
    from transformers import Wav2Vec2Config

    if not (Path(path) / "config.json").is_file():
        raise UserError(
            f"{path}: no wav2vec2 model here (config.json is missing); download the model's folder, give its path, "
            f"or {instead}"
        )
    with opening(f"wav2vec2 in {path}", "copy its config.json again"):
        kind = json.loads((Path(path) / "config.json").read_text(encoding="utf-8")).get("model_type", "wav2vec2")
        if kind != "wav2vec2":
            raise UserError(f"{path}: a {kind}, not a wav2vec2; give the folder of such a model, or {instead}")
        return Wav2Vec2Config.from_pretrained(path)


def resample_features(features_BTc: Tensor, frames: int) -> Tensor:
    """Linear interpolation over time to `frames`, end points kept: (B, T', c) -> (B, frames, c)."""
    moved = features_BTc.transpose(1, 2)
    return F.interpolate(moved, size=frames, mode="linear", align_corners=True).transpose(1, 2)


class AudioEncoder(nn.Module):
    """Frozen wav2vec2 whose convolutional features are resampled to video frames before its transformer."""

    def __init__(self, wav2vec2: "Wav2Vec2Model", *, only_last_features: bool):
        super().__init__()
        wav2vec2.eval().requires_grad_(False)
        use_fast_products(wav2vec2)
        self.wav2vec2, self.only_last_features = wav2vec2, only_last_features
        hidden, layers = wav2vec2.config.hidden_size, wav2vec2.config.num_hidden_layers
        self.feature_width = hidden if only_last_features else hidden * layers

    @classmethod
    def from_config(cls, config: "Wav2Vec2Config", *, only_last_features: bool) -> "AudioEncoder":
        """Random weights of a given configuration (transformers.Wav2Vec2Config)."""
        from transformers import Wav2Vec2Model

        return cls(Wav2Vec2Model(config), only_last_features=only_last_features)

    @classmethod
    def from_pretrained(cls, path: str, *, only_last_features: bool) -> "AudioEncoder":
        """Weights from a local folder such as checkpoints/wav2vec2-base-960h."""
        from transformers import Wav2Vec2Model

        config_of(path)
        with opening(f"--wav2vec-model-path {path}", "copy its files again, or use --audio-features logmel"):
            model = load_whole(Wav2Vec2Model, path, local_files_only=True)
        return cls(model, only_last_features=only_last_features)

    def train(self, mode: bool = True) -> "AudioEncoder":
        """Always in eval mode: its dropout and layer drop must not act."""
        return super().train(False)

    @torch.no_grad()
    def raw_features(self, wave_Bn: Tensor, frames: int) -> Tensor:
        """Normalised sound (B, n) -> (B, frames, F): the last hidden state, or those of all layers side by side, first
        layer first.
        """
        features = convolved(self.wav2vec2, wave_Bn)
        hidden, _ = self.wav2vec2.feature_projection(resample_features(features, frames))
        layers: list[Tensor] = []
        # the encoder of transformers 5 does not hand out hidden states when it is called on its own: collect them on
        # the way
        hooks = [
            layer.register_forward_hook(lambda _, __, out: layers.append(out[0] if isinstance(out, tuple) else out))
            for layer in self.wav2vec2.encoder.layers
        ]
        try:
            last = self.wav2vec2.encoder(hidden)[0]
        finally:
            for hook in hooks:
                hook.remove()
        return last if self.only_last_features else torch.cat(layers, -1)

    def pieces(
        self, wave_n: Tensor, fps: float, *, length: int = WHOLE_FRAMES, context: float = CONTEXT_SECONDS
    ) -> Iterator[Tensor]:
        """A clip (n,), not normalised -> raw features (length, F), piece by piece; ceil(n fps / 16000) frames in all.

        A clip of no more than `length` frames is heard whole, as the released tool hears every clip. Of a longer one
        each piece is heard with `context` seconds to either side, so that memory does not grow with the clip.
        """
        total, reach = frames_of(len(wave_n), fps), round(context * fps)
        mean, deviation = moments(wave_n)
        samples = SAMPLE_RATE / fps
        for start in range(0, total, length):
            first, last = max(0, start - reach), min(total, start + length + reach)
            piece = (wave_n[round(first * samples) : round(last * samples)] - mean) / deviation
            if last == total:
                piece = pad_to_samples(piece, int(total * samples) - round(first * samples))
            features = self.raw_features(piece[None], last - first)[0]
            yield features[start - first : min(start + length, total) - first]

    def encode_clip(self, wave_n: Tensor, fps: float) -> Tensor:
        """All of `pieces`, (T, F)."""
        return torch.cat(list(self.pieces(wave_n, fps)))


def moments(wave_n: Tensor) -> tuple[Tensor, Tensor]:
    """What normalise_waveform takes off and divides by."""
    return wave_n.mean(-1, keepdim=True), torch.sqrt(wave_n.var(-1, unbiased=False, keepdim=True) + 1e-7)


@torch.no_grad()
def convolved(wav2vec2: "Wav2Vec2Model", wave_Bn: Tensor) -> Tensor:
    """wav2vec2's convolutional features (B, T', c), about 50 a second. Long sound goes through in chunks: the first
    layer alone makes 512 channels of 3,200 values a second. A norm over time sees the whole sound all the same.
    """
    count = wave_Bn.shape[-1]
    extractor, strides, kernels = wav2vec2.feature_extractor, wav2vec2.config.conv_stride, wav2vec2.config.conv_kernel
    if count <= CHUNK_SAMPLES:
        return extractor(pad_with_silence(wave_Bn, receptive_field(wav2vec2))).transpose(1, 2)
    first, norm = extractor.conv_layers[0], None
    if isinstance(getattr(first, "layer_norm", None), nn.GroupNorm):  # over time: its mean and variance come first
        norm = first.layer_norm
        total = torch.zeros(2, len(wave_Bn), norm.num_channels, 1, dtype=torch.float64, device=wave_Bn.device)
        outputs = (count - kernels[0]) // strides[0] + 1
        for start in range(0, outputs, CHUNK_SAMPLES // strides[0]):
            stop = min(outputs, start + CHUNK_SAMPLES // strides[0])
            x = first.conv(wave_Bn[:, None, start * strides[0] : (stop - 1) * strides[0] + kernels[0]]).double()
            total += torch.stack([x.sum(-1, keepdim=True), x.square().sum(-1, keepdim=True)])
        mean = total[0] / outputs
        scale = (total[1] / outputs - mean.square() + norm.eps).rsqrt()
        mean, scale = mean.float(), scale.float()
    stride, field = math.prod(strides), receptive_field(wav2vec2)
    outputs = (count - field) // stride + 1
    parts = []
    for start in range(0, outputs, CHUNK_SAMPLES // stride):
        stop = min(outputs, start + CHUNK_SAMPLES // stride)
        x = wave_Bn[:, start * stride : (stop - 1) * stride + field]
        x = x[:, None]
        if norm is not None:
            x = (first.conv(x) - mean) * scale * norm.weight[:, None] + norm.bias[:, None]
            x = first.activation(x)
        for layer in extractor.conv_layers[1 if norm is not None else 0 :]:
            x = layer(x)
        parts.append(x)
    return torch.cat(parts, -1).transpose(1, 2)


def receptive_field(wav2vec2: "Wav2Vec2Model") -> int:
    """Samples that one convolutional feature sees; 400 for wav2vec2."""
    field = 1
    for kernel, stride in zip(
        reversed(wav2vec2.config.conv_kernel), reversed(wav2vec2.config.conv_stride), strict=True
    ):
        field = (field - 1) * stride + kernel
    return field


def pad_with_silence(wave_Bn: Tensor, samples: int) -> Tensor:
    """At least `samples` of sound: shorter ones are followed by zeros."""
    return F.pad(wave_Bn, (0, max(0, samples - wave_Bn.shape[-1])))


def rename_weight_norm(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names of older wav2vec2 files (conv.weight_g, weight_v) in the form of this torch."""
    renamed = {}
    for name, value in state.items():
        stem, _, last = name.rpartition(".")
        renamed[f"{stem}.{OLD_WEIGHT_NORM[last]}" if last in OLD_WEIGHT_NORM else name] = value
    return renamed


def mel_filters(bands: int = MEL_BANDS, *, low: float = 60.0, high: float = 7600.0) -> Tensor:
    """Triangular filters on the mel scale (2595 log10(1 + f / 700)), (bands, FFT_SIZE // 2 + 1)."""
    to_mel = lambda hertz: 2595 * np.log10(1 + np.asarray(hertz) / 700)  # noqa: E731
    edges = 700 * (10 ** (np.linspace(to_mel(low), to_mel(high), bands + 2) / 2595) - 1)
    frequency = np.linspace(0, SAMPLE_RATE / 2, FFT_SIZE // 2 + 1)
    rising = (frequency - edges[:-2, None]) / (edges[1:-1] - edges[:-2])[:, None]
    falling = (edges[2:, None] - frequency) / (edges[2:] - edges[1:-1])[:, None]
    return torch.from_numpy(np.clip(np.minimum(rising, falling), 0, None)).float()


class LogMelEncoder(nn.Module):
    """Log-mel energies, normalised per clip; a video frame holds SUB_FRAMES slices, so F = 160. No weights."""

    feature_width = MEL_BANDS * SUB_FRAMES
    filters: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("filters", mel_filters(), persistent=False)

    @torch.no_grad()
    def encode_clip(self, wave_n: Tensor, fps: float) -> Tensor:
        """A whole clip (n,) -> (T, 160), T = ceil(n fps / 16000); per band zero mean, all bands together unit
        variance. Sound that changes less than speech, such as noise, is not blown up to it, and its level is that of
        pauses, down to -1: a mouth stays shut on silence.
        """
        frames = frames_of(len(wave_n), fps)
        width = int(WINDOW_SECONDS * SAMPLE_RATE)
        centre = (torch.arange(frames * SUB_FRAMES, dtype=torch.float64) + 0.5) / SUB_FRAMES / fps * SAMPLE_RATE
        first = centre.round().long() + FFT_SIZE - width // 2
        level = torch.empty(len(first), MEL_BANDS, device=wave_n.device)
        for block, place in zip(first.split(SLICES_AT_ONCE), level.split(SLICES_AT_ONCE), strict=True):
            # the block's own sound, with silence where it reaches over an end: no padded copy of the whole
            begin, end = int(block[0]) - FFT_SIZE, int(block[-1]) + width - FFT_SIZE
            piece = wave_n[max(0, begin) : max(0, end)].float()
            before = max(0, -begin)
            padded = F.pad(piece, (before, end - begin - before - len(piece)))
            place.copy_(self._log_energies(padded, block - block[0], width))
        level -= level.mean(0)
        spread = level.std()
        level /= spread.clamp(min=SPEECH_SPREAD)
        level -= 1 - (spread / SPEECH_SPREAD).clamp(max=1)
        return level.reshape(frames, self.feature_width)

    def pieces(self, wave_n: Tensor, fps: float) -> Iterator[Tensor]:
        """The same as one piece: log-mel is small, and its levels are those of the whole clip."""
        yield self.encode_clip(wave_n, fps)

    def _log_energies(self, padded_n: Tensor, first_S: Tensor, width: int) -> Tensor:
        """Log-mel energies (S, 40) of windows that begin at `first_S`."""
        window = torch.hann_window(width, periodic=False, device=padded_n.device)
        slices = padded_n[first_S.to(padded_n.device)[:, None] + torch.arange(width, device=padded_n.device)] * window
        power = torch.fft.rfft(slices, FFT_SIZE).abs().square()
        return torch.log(power @ self.filters.T + SILENCE_POWER)


def make_audio_encoder(kind: str, wav2vec_model_path: str, *, only_last_features: bool) -> AudioEncoder | LogMelEncoder:
    """The encoder that a model section asks for."""
    if kind == "logmel":
        return LogMelEncoder()
    return AudioEncoder.from_pretrained(wav2vec_model_path, only_last_features=only_last_features)


def raw_audio_width(kind: str, wav2vec_model_path: str, *, only_last_features: bool) -> int:
    """Width of the raw features without loading weights; wav2vec2-base's where its folder is not there (for plans)."""
    if kind == "logmel":
        return LogMelEncoder.feature_width
    hidden, layers = 768, 12
    if (Path(wav2vec_model_path) / "config.json").is_file():
        config = config_of(wav2vec_model_path)
        hidden, layers = config.hidden_size, config.num_hidden_layers
    return hidden if only_last_features else hidden * layers
