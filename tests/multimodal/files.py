"""Small files and data sets for the tests."""

import io
import tarfile
from pathlib import Path

import numpy as np
import soundfile
from PIL import Image

from multimodal.config import DataConfig
from multimodal.data.records import Records
from multimodal.data.text import TextTokenizer
from multimodal.dataset import CaptionedDataset


def dataset(records: Records, tokenizer: TextTokenizer, **settings) -> CaptionedDataset:
    data = DataConfig(audio_frames=64, **settings.pop("data", {}))
    return CaptionedDataset(records, data, tokenizer, image_size=32, **settings)


def wav(path: Path, seconds: float = 1.0, rate: int = 16000, channels: int = 1) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    time = np.arange(int(seconds * rate)) / rate
    soundfile.write(path, np.stack([0.3 * np.sin(2 * np.pi * 440 * time)] * channels, 1), rate)
    return path


def picture(path: Path, mode: str = "RGB", size: tuple[int, int] = (40, 30)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, 120).save(path)
    return path


def write_shard(path: Path, members: dict[str, bytes]) -> Path:
    """One tar file of these members; returns its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path.parent
