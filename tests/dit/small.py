"""Tiny inputs of the tests: folders in every layout, and settings of a model that trains in a moment."""

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from dit.config import Config

TINY = {
    "data": {
        "dataset_name": "cub",
        "dataset_path": "sample",
        "image_size": 32,
        "keep_in_memory": True,
        "flip_guard": "picture",
    },
    "model": {
        "hidden_size": 32,
        "num_layers": 2,
        "num_heads": 2,
        "patch_size": 1,
        "in_channels": 4,
        "text_dim": 16,
        "text_len": 8,
    },
    "vae": {"type": "pool"},
    "text": {"type": "hash"},
    "diffusion": {"objective": "flow"},
    "training": {
        "batch_size": 8,
        "total_steps": 4,
        "learning_rate": 2e-3,
        "num_workers": 0,
        "eval_samples": 8,
        "save_steps": 2,
        "save_every_n_epochs": None,
        "logging_steps": 1,
        "ema_decay": 0.9,
        "max_grad_norm": 1.0,
    },
    "sample": {"steps": 2, "count": 4, "sampler": "euler"},
}


def tiny(**sections: dict) -> Config:
    """The tiny settings with sections updated."""
    return Config.model_validate(
        {name: {**TINY.get(name, {}), **sections.get(name, {})} for name in {*TINY, *sections}}
    )


def picture(
    path: Path, *, size: tuple[int, int] = (24, 20), colour: tuple[int, ...] = (200, 30, 30), mode: str = "RGB"
) -> Path:
    """Write a picture with a light left half, so that mirroring shows."""
    path.parent.mkdir(parents=True, exist_ok=True)
    array = np.zeros((size[1], size[0], 3), dtype=np.uint8) + np.array(colour, dtype=np.uint8)
    array[:, : size[0] // 2] = 250
    Image.fromarray(array).convert(mode).save(path)
    return path


def coco_folder(root: Path, *, year: int = 2017, count: int = 4) -> Path:
    """MS-COCO's layout; picture 2 has no caption, picture 3 no file."""
    for split in ("train", "val"):
        images = [{"id": i + 1, "file_name": f"{i + 1:012d}.jpg", "height": 20, "width": 24} for i in range(count)]
        notes = [
            {"id": 10 * i + k, "image_id": i + 1, "caption": f" a  picture {i + 1}\nnumber {k} "}
            for i in range(count)
            for k in range(2)
        ]
        notes = [note for note in notes if note["image_id"] != 2]
        for image in images:
            if image["id"] != 3:
                picture(root / f"{split}{year}" / image["file_name"])
        (root / "annotations").mkdir(parents=True, exist_ok=True)
        listing = {"info": {}, "licenses": [], "images": images[::-1], "annotations": notes}
        (root / "annotations" / f"captions_{split}{year}.json").write_text(json.dumps(listing))
    return root


def cub_folder(
    root: Path, *, texts: bool = False, attributes: bool = False, split: bool = True, count: int = 4
) -> Path:
    """CUB-200-2011's layout."""
    names = [f"00{1 + i % 2}.Red_Bird/Red_Bird_{i:04d}.jpg" for i in range(count)]
    for name in names:
        picture(root / "images" / name)
    rows = {
        "images.txt": [f"{i + 1} {name}" for i, name in enumerate(names)],
        "image_class_labels.txt": [f"{i + 1} {1 + i % 2}" for i in range(count)],
        "classes.txt": ["1 001.Red_Bird", "2 002.Blue_Footed_Booby"],
        "bounding_boxes.txt": [f"{i + 1} 2.0 2.0 10.0 8.0" for i in range(count)],
    }
    if split:
        rows["train_test_split.txt"] = [f"{i + 1} {int(i != 0)}" for i in range(count)]
    for name, lines in rows.items():
        (root / name).write_text("\n".join(lines) + "\n")
    if texts:
        for name in names:
            path = root / "text_c10" / Path(name).with_suffix(".txt")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(
                "\n".join([f"this bird is red {k}" for k in range(9)] + ["", "caf\xe9 bird"]).encode("latin-1")
            )
    if attributes:
        (root.parent / "attributes.txt").write_text(
            "1 has_wing_color::red\n2 has_bill_shape::all-purpose\n3 has_size::small_(5_-_9_in)\n"
        )
        (root / "attributes").mkdir(exist_ok=True)
        labels = [
            f"{i + 1} {a} {int(a != 2)} 4 1.5" + (" 9 9" if a == 3 else "") for i in range(count) for a in (1, 2, 3)
        ]
        (root / "attributes" / "image_attribute_labels.txt").write_text("\n".join(labels) + "\n")
    return root


def encoder_folder(path) -> str:
    """A tiny DINOv2 with random weights."""
    from transformers import Dinov2Config, Dinov2Model

    torch.manual_seed(0)
    config = Dinov2Config(
        hidden_size=12, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14, mlp_ratio=2
    )
    Dinov2Model(config).save_pretrained(path)
    return str(path)
