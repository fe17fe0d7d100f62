"""Settings of generate.py, metrics.py and precompute.py. No torch import, so --help is quick."""

from typing import Literal

from dit.config import FLOW_SAMPLERS, NOISE_SAMPLERS, Config
from shared.config import Section, setting

METRICS = ("loss", "caption", "recon", "vae", "colour", "memory", "fid", "clip")


class GenerateOptions(Section):
    """What to draw and how."""

    checkpoint: str = setting("", "run folder, checkpoint folder, or a weights file beside its config.yaml")
    output: str = setting("samples.png", "grid.png, or a folder", "out")
    prompt: list[str] = setting([], "captions")
    prompts: str | None = setting(None, "file of captions: .txt, one a line, or .jsonl with prompt, text or caption")
    captions: str | None = setting(None, "captions of a data set: coco:PATH, cub:PATH or custom:PATH (held-out split)")
    labels: list[int] = setting([], "classes, for a class-conditional model")
    num: int | None = setting(None, "use so many of the captions, drawn by --seed", ge=1)
    images_per_prompt: int = setting(1, "pictures of each caption", ge=1)
    negative: str | None = setting(None, "caption to lead away from, in place of the null condition")
    sampler: str = setting("auto", f"auto, {', '.join(NOISE_SAMPLERS)}; {', '.join(FLOW_SAMPLERS)}")
    steps: int | None = setting(None, "sampling steps; null: as trained", "num_inference_steps", ge=1)
    cfg_scale: float | None = setting(None, "guidance scale; null: as trained", "guidance_scale", ge=0)
    cfg_interval: list[float] = setting([0.0, 1.0], "noise levels, low and high, between which guidance acts")
    cfg_channels: int | None = setting(None, "guide only the first channels; 3 is the public DiT's habit", ge=1)
    cfg_rescale: float = setting(0.0, "bring the guided spread back by this share", ge=0, le=1)
    shift: float | None = setting(None, "time shift of the sampling grid (flow)", gt=0)
    image_size: int | None = setting(None, "side of the pictures, pixels; null: as trained", ge=8)
    batch_size: int = setting(16, "pictures at a time", ge=1)
    seed: int = setting(0, "seed of the first picture", ge=0, le=2**63 - 1)
    ema: bool = setting(True, "use the averaged weights")
    dtype: Literal["fp32", "bf16"] = setting("fp32", "precision of the network")
    device: str = setting("auto", "auto, cpu, cuda or cuda:N")
    vae: str | None = setting(None, "VAE by path or hub id, in place of the trained-with one")
    text_encoder: str | None = setting(None, "text encoder by path or hub id, in place of the trained-with one")
    npz: bool = setting(False, "also write samples.npz with arr_0 uint8 (N, H, W, 3), the ADM suite's form")
    grid: bool = setting(False, "also write grid.png into the folder")
    latents_only: bool = setting(False, "write latents.safetensors and no pictures")
    uint8: Literal["round", "adm"] = setting("round", "to 8 bits: nearest, or the ADM reference scripts' rule")


class MetricsOptions(Section):
    """What to measure."""

    checkpoint: str = setting("", "run folder or checkpoint folder")
    output: str | None = setting(None, "JSON file; null: metrics.json in the run folder", "out")
    metrics: str = setting("loss,caption,recon,vae,colour,memory", f"comma-separated, of {', '.join(METRICS)}")
    split: Literal["val", "train"] = setting("val", "pictures to measure on")
    num: int = setting(256, "pictures at most", ge=2)
    data_root: str | None = setting(None, "data folder in place of the trained-with one", "dataset_path")
    ema: bool = setting(True, "use the averaged weights")
    cfg_scale: float | None = setting(None, "guidance scale of drawn pictures; null: as trained", ge=0)
    steps: int | None = setting(None, "sampling steps; null: as trained", ge=1)
    seed: int = setting(0, "seed of the drawn pictures", ge=0, le=2**63 - 1)
    features: Literal["inception", "random"] = setting("inception", "fid: random is for tests only")
    inception_weights: str | None = setting(None, "fid: local weights file")
    clip_path: str | None = setting(
        None, "clip: a CLIP model by path or hub id, another one than the model's text encoder"
    )
    vae: str | None = setting(None, "VAE by path or hub id, in place of the trained-with one")
    text_encoder: str | None = setting(None, "text encoder by path or hub id, in place of the trained-with one")
    device: str = setting("auto", "auto, cpu, cuda or cuda:N")


class CacheSection(Section):
    """What to write."""

    out: str = setting("", "folder that receives the cache")
    shard_size: int = setting(4096, "pictures a shard", ge=1)
    dtype: str = setting("float16", "float16, bfloat16 or float32; float32 reproduces the encoders exactly")
    mirrored: bool = setting(
        True, "also encode the mirrored pictures (the encoder is not exactly symmetric)", "flip_variant"
    )
    crops: int = setting(0, "random crops a picture in place of the mirrored one; 0: the centre", ge=0)
    text: bool = setting(True, "also encode the captions", "encode_text")
    codec: str | None = setting(None, "run folder or file of a fitted codec")
    batch: int = setting(32, "pictures a forward pass of the encoder", ge=1)


class PrecomputeOptions(Config):
    """The run's settings, and the cache's."""

    cache: CacheSection = CacheSection()
