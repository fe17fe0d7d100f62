"""Made-up features for a check of the installation: motion that follows the sound, without any clip or encoder."""

from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from float.config import Config, features_dir
from float.data.clips import Clip
from float.data.features import feature_path, write_features
from float.data.pose import VALUES
from float.modules.audio import raw_audio_width
from float.modules.emotion import one_hot
from shared.engine.dist import DistInfo, barrier
from shared.rng import keyed_generator

CLIPS = {"train": 8, "val": 2}
FRAMES = 100
_CLIPS = 331  # random stream


def synthetic_clip(index: int, dim_w: int, audio_width: int, seed: int) -> dict[str, Tensor]:
    """Motion (100, dim_w): sines of the frame; audio (100, F): fixed random mixtures of the same sines, with a little
    noise.
    """
    generator = keyed_generator(seed, _CLIPS, index)
    time = torch.arange(FRAMES)[:, None] / 25
    hertz = 0.5 + 2 * torch.rand(1, dim_w, generator=generator)
    phase = 6.283 * torch.rand(1, dim_w, generator=generator)
    motion = torch.sin(6.283 * hertz * time + phase)
    mixture = torch.randn(dim_w, audio_width, generator=keyed_generator(seed, _CLIPS)) / dim_w**0.5
    audio = motion @ mixture + 0.1 * torch.randn(FRAMES, audio_width, generator=generator)
    return {"motion": motion, "audio_raw": audio, "emotion": one_hot(index % 7), "has_emotion": torch.tensor([True])}


def write_synthetic_features(config: Config, info: DistInfo) -> None:
    """Fill the run's feature cache; rank 0 writes."""
    model = config.model
    width = raw_audio_width(model.audio_features, model.wav2vec_model_path, only_last_features=model.only_last_features)
    if info.is_main:
        print(
            "--synthetic: made-up motion and sound; this checks the installation and makes no talking portrait",
            flush=True,
        )
        for split, count in CLIPS.items():
            for number in range(count):
                clip = Clip(f"synthetic{number:02d}", Path(), Path(), "nobody")
                index = number + (1000 if split == "val" else 0)
                tensors = synthetic_clip(index, model.dim_w, width, config.run.seed)
                if model.pose_condition:  # the head turns with the first directions of motion
                    turns = (tensors["motion"] - tensors["motion"][:1])[:, :VALUES] / 10
                    tensors["pose"] = functional.pad(turns, (0, VALUES - turns.shape[1]))
                write_features(feature_path(features_dir(config) / split, clip.clip_id), tensors, clip, "synthetic")
    barrier()
