"""Recorded cases, the tiny transformer they were made with, and the small settings that the tests train with."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from opens2v.config import SAMPLE_DATA
from opens2v.model import RefWanTransformer3DModel
from opens2v.weights.wan import load_generator_checkpoint

REFERENCE = Path(__file__).resolve().parents[1] / "reference" / "opens2v"
MINI = REFERENCE / "mini_dataset"
EXPECTED: dict[str, Any] = json.loads((REFERENCE / "mini_dataset_expected.json").read_text())
TINY = dict(
    patch_size=(1, 2, 2),
    num_attention_heads=4,
    attention_head_dim=16,
    text_dim=32,
    freq_dim=32,
    ffn_dim=160,
    num_layers=2,
    rope_max_seq_len=1024,
)
PARTS = ("dataset1", "dataset1_cluster")
_TINY_SIZES = (
    "--config small --device cpu --precision fp32 --num-layers 1 --num-attention-heads 2 --attention-head-dim 16 "
    "--ffn-dim 32 --text-dim 16 --text-rows 24 --pixel-height 16 --pixel-width 32 --ref-height 16 --ref-width 16 "
    "--batch-size 2 --base-batch-size 2 --logging-steps 1 --val-steps 2 --val-batches 1"
).split()
NO_ADAPTER = ["--r", "0"]
# Runs of a few seconds. QUICK: the shipped clips with the patch codec; SCENES: the small preset's composed scenes.
QUICK = [
    *_TINY_SIZES, "--codec", "patch", "--prediction", "gaussian", "--patch-size", "2", "--timestep-shift", "3.0",
    "--no-ref-in-self-attention", "--no-base-with-references", "--ref-clip-size", "32", *NO_ADAPTER,
    "--without-keys", "anim_elephant", "anim_girl",
    "--recolour-probability", "0.7", "--other-scene-probability", "0.5", "--generic-caption-probability", "0.5",
    "--json-paths", str(SAMPLE_DATA / "step5/merge_final_json/dataset1.json"),
    "--video-base-paths", str(SAMPLE_DATA / "step0/videos/dataset1"),
    "--background-base-paths", str(SAMPLE_DATA / "step5/final_output/dataset1/foreground"),
]  # fmt: skip
SCENES = [*_TINY_SIZES, "--r", "2"]


def tensors(name: str) -> dict:
    """The tensors of a recorded case."""
    return load_file(REFERENCE / f"{name}.safetensors")


def tiny_model(**reference: Any) -> RefWanTransformer3DModel:
    """The tiny transformer with the recorded base weights."""
    torch.manual_seed(0)
    model = RefWanTransformer3DModel.from_base(TINY, **{"ref_clip_dim": 20, **reference})
    load_generator_checkpoint(model, REFERENCE / "tiny_weights.safetensors")
    return model


def part_paths(name: str) -> tuple[Path, Path, Path]:
    """Annotation file, video folder and background folder of a mini part."""
    return (
        MINI / f"step5/merge_final_json/{name}.json",
        MINI / f"step0/videos/{name}",
        MINI / f"step5/final_output/{name}/foreground",
    )
