"""Videos of held-out clips while training runs: the portrait speaks the clip's own sound."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from float.config import Config, data_root
from float.data.clips import find_clips
from float.data.face import read_boxes
from float.data.frames import clip_frames
from float.data.media import VideoWriter, read_audio
from float.modules.audio import make_audio_encoder
from float.modules.emotion import one_hot
from float.sampling.animate import Animator, audio_windows, sampling_options
from float.weights.open import Autoencoder
from shared.engine.dist import DistInfo

CLIPS = 2  # previews a time
MAX_SECONDS = 4.0


def make_sampler(config: Config, autoencoder: Autoencoder, info: DistInfo) -> Callable[[Any, int, Path], None]:
    """The loop's sample hook: samples/step_NNNNNNNN_CLIP.mp4 for the first held-out clips. All ranks compute, rank 0
    writes.
    """
    model, data = config.model, config.data
    encoder = make_audio_encoder(
        model.audio_features, model.wav2vec_model_path, only_last_features=model.only_last_features
    )
    encoder.to(info.device)
    root = data_root(data)
    clips, boxes = find_clips(root, data.val_split)[:CLIPS], read_boxes(root)

    def sample(trained: Any, step: int, folder: Path) -> None:
        animator = Animator(trained, autoencoder, config, info.device)
        for clip in clips:
            wave = read_audio(clip.audio)[: int(MAX_SECONDS * data.audio_sample_rate)]
            portrait = animator.portrait(next(clip_frames(clip, model.input_size, data, boxes)))
            sound = audio_windows(
                encoder,
                torch.from_numpy(wave).to(info.device),
                fps=data.video_fps,
                length=data.sequence_length,
                stream=False,
            )
            emotion = torch.zeros(model.dim_e) if clip.emotion is None else one_hot(clip.emotion)
            motions = animator.motion_windows(sound, portrait.motion, emotion, sampling_options(config))
            pictures = animator.frames(
                portrait, motions, total=int(len(wave) / data.audio_sample_rate * data.video_fps)
            )
            if info.is_main:
                with VideoWriter(
                    folder / f"step_{step:08d}_{clip.clip_id}.mp4", fps=data.video_fps, wave=wave
                ) as video:
                    for picture in pictures:
                        video.add(picture)
            else:
                for _ in pictures:  # the same passes through the model on every rank
                    pass

    return sample
