"""Emotions: seven classes, the speech emotion recogniser, and the labels of the public data sets."""

import math
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from float.modules.audio import SAMPLE_RATE, config_of, convolved, moments, rename_weight_norm
from shared.engine.products import use_fast_products
from shared.errors import UserError

if TYPE_CHECKING:
    from transformers import Wav2Vec2Config, Wav2Vec2Model

EMOTIONS = ("angry", "disgust", "fear", "happy", "neutral", "sad", "surprise")
HEARD_SECONDS = 40  # that the recogniser hears at once
WITHOUT = "use --emotion-source label or none, which need none"
FROM_SPEECH = "S2E"  # what `--emo` says when the voice itself decides
# RAVDESS codes 01 to 08 (calm counts as neutral); MEAD folder names (contempt has no class)
RAVDESS_CLASSES = {1: 4, 2: 4, 3: 3, 4: 5, 5: 0, 6: 2, 7: 1, 8: 6}
MEAD_CLASSES = {
    "angry": 0,
    "disgusted": 1,
    "fear": 2,
    "happy": 3,
    "neutral": 4,
    "sad": 5,
    "surprised": 6,
    "contempt": None,
}


def one_hot(index: int) -> Tensor:
    """(7,) with a one at the emotion."""
    vector = torch.zeros(len(EMOTIONS))
    vector[index] = 1.0
    return vector


def emotion_index(name: str) -> int:
    """The class of an emotion's name."""
    if name.lower() not in EMOTIONS:
        raise UserError(f"--emo {name}: not an emotion; use one of {', '.join(EMOTIONS)}, or {FROM_SPEECH}")
    return EMOTIONS.index(name.lower())


def ravdess_emotion(stem: str) -> int | None:
    """The class in a RAVDESS file name such as 02-01-06-01-02-01-12, None for other names."""
    fields = stem.removesuffix("_processed").split("-")
    if len(fields) != 7 or not all(field.isdigit() and len(field) == 2 for field in fields):
        return None
    return RAVDESS_CLASSES.get(int(fields[2]))


class ClassificationHead(nn.Module):
    """Mean over time is taken before; dense, tanh, projection to the classes."""

    def __init__(self, width: int, classes: int = len(EMOTIONS)):
        super().__init__()
        self.dense, self.out_proj = nn.Linear(width, width), nn.Linear(width, classes)

    def forward(self, pooled: Tensor) -> Tensor:
        return self.out_proj(torch.tanh(self.dense(pooled)))


class SpeechClassifier(nn.Module):
    """wav2vec2 and a head, with the names of r-f/wav2vec-english-speech-emotion-recognition."""

    def __init__(self, wav2vec2: "Wav2Vec2Model"):
        super().__init__()
        self.wav2vec2 = wav2vec2
        self.classifier = ClassificationHead(wav2vec2.config.hidden_size)
        use_fast_products(self)

    def forward(self, wave_Bn: Tensor, mean: Tensor | float = 0.0, deviation: Tensor | float = 1.0) -> Tensor:
        """mean, deviation: what normalises the sound. Sound of more than HEARD_SECONDS is heard in pieces of equal
        length, so that memory does not grow with it.
        """
        count = max(1, math.ceil(wave_Bn.shape[-1] / (HEARD_SECONDS * SAMPLE_RATE)))
        total = torch.zeros((), device=wave_Bn.device)
        for piece in wave_Bn.tensor_split(count, -1):
            piece = (piece - mean) / deviation
            hidden, _ = self.wav2vec2.feature_projection(convolved(self.wav2vec2, piece))
            total = total + self.wav2vec2.encoder(hidden)[0].mean(1) / count
        return self.classifier(total)


class Audio2Emotion(nn.Module):
    """Frozen speech emotion recogniser: normalised sound of a whole clip -> probabilities of the seven emotions."""

    def __init__(self, model: SpeechClassifier):
        super().__init__()
        self.wav2vec2_for_emotion = model.eval().requires_grad_(False)

    @classmethod
    def from_config(cls, config: "Wav2Vec2Config") -> "Audio2Emotion":
        """Random weights of a given configuration (transformers.Wav2Vec2Config)."""
        from transformers import Wav2Vec2Model

        return cls(SpeechClassifier(Wav2Vec2Model(config)))

    @classmethod
    def from_pretrained(cls, path: str) -> "Audio2Emotion":
        """Weights from a local folder such as checkpoints/wav2vec-english-speech-emotion-recognition."""
        from transformers import Wav2Vec2Model

        from shared.engine.checkpoint import load_strict, load_weights

        model = SpeechClassifier(Wav2Vec2Model(config_of(path, WITHOUT)))
        files = [Path(path) / name for name in ("model.safetensors", "pytorch_model.bin")]
        found = next((file for file in files if file.is_file()), None)
        if found is None:
            raise UserError(f"{path}: no weights here; model.safetensors or pytorch_model.bin expected")
        state = {name: value for name, value in load_weights(found).items() if not name.endswith("masked_spec_embed")}
        load_strict(model, rename_weight_norm(state), what=str(found), allow_missing=("wav2vec2.masked_spec_embed",))
        return cls(model)

    def train(self, mode: bool = True) -> "Audio2Emotion":
        """Always in eval mode."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, wave_Bn: Tensor) -> Tensor:
        """Normalised sound (B, n) -> probabilities (B, 7)."""
        return self.wav2vec2_for_emotion(wave_Bn).softmax(-1)

    @torch.no_grad()
    def hear(self, wave_n: Tensor) -> Tensor:
        """Sound (n,) as it is read -> probabilities (7,)."""
        return self.wav2vec2_for_emotion(wave_n[None], *moments(wave_n))[0].softmax(-1)
