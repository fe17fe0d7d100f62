"""Videos of held-out clips while training runs: the portrait speaks the clip's own sound."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from float.config import Config, data_root, features_dir
from float.data.clips import find_clips
from float.data.face import read_boxes
from float.data.features import feature_path
from float.data.frames import ClipReader
from float.data.media import VideoWriter, sound_of_wave
from float.dataset import FeatureFile
from float.model import MotionGenerator
from float.sampling.animate import Animator, sampling_options
from float.weights.open import Autoencoder
from shared.engine.dist import DistInfo

CLIPS = 2  # previews a time
MAX_SECONDS = 4.0


def make_sampler(
    config: Config, generator: MotionGenerator, autoencoder: Autoencoder, info: DistInfo
) -> Callable[[Any, int, Path], None]:
    """The loop's sample hook: samples/step_NNNNNNNN_CLIP.mp4 for the first held-out clips with features. All ranks
    compute, rank 0 writes. The emotion is the one that training sees: the cached one.
    """
    model, data = config.model, config.data
    root, cache = data_root(data), features_dir(config) / "val"
    encoded = [clip for clip in find_clips(root, data.val_split) if feature_path(cache, clip.clip_id).is_file()]
    clips = encoded[:CLIPS]
    animator = Animator(generator, autoencoder, config, info.device)

    def sample(trained: Callable, step: int, folder: Path) -> None:
        animator.call = trained
        for clip in clips:
            reader = ClipReader(model.input_size, data, read_boxes(root))
            first = reader.first(clip)
            wave = reader.sound(clip, first)[: int(MAX_SECONDS * data.audio_sample_rate)]
            portrait = animator.portrait(next(reader.frames(clip, first)))
            with FeatureFile(feature_path(cache, clip.clip_id)) as file:
                emotion = file.rows("emotion").float()
            pictures = animator.speak(portrait, wave, emotion, sampling_options(config))
            if info.is_main:
                path = folder / f"step_{step:08d}_{clip.clip_id}.mp4"
                with VideoWriter(path, fps=data.video_fps, sound=sound_of_wave(wave)) as video:
                    for picture in pictures:
                        video.add(picture)
            else:
                for _ in pictures:  # the same passes through the model on every rank
                    pass

    return sample
