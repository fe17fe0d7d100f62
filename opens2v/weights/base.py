"""The generator of a run, and the small text-to-video base that is trained first when no base weights are given."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from opens2v.config import Config, codec_factors
from opens2v.dataset import collate_opens2v_batch, create_dataset
from opens2v.model import RefWanBlock, RefWanTransformer3DModel, is_reference_name
from opens2v.modules.conditions import Encoders, clip_token_width, load_patch_codec
from opens2v.modules.encoders import HashText, PatchCodec
from opens2v.modules.lora import TrainableSet, add_lora, enable_trainable
from opens2v.objective import RefImageFlowMatching
from opens2v.weights.wan import cast_base, load_generator_checkpoint
from shared.data import BatchPlan, MapStream
from shared.engine.dist import DistInfo, barrier
from shared.errors import UserError, written_aside
from shared.loop import fit
from shared.rng import keyed_generator, seed_everything

_WEIGHTS, _CODEC_FRAMES = 521, 522  # random streams
_CODEC_CLIPS = 24  # clips that the codec is fitted to


def transformer_settings(config: Config) -> dict[str, Any]:
    """Constructor arguments of the transformer."""
    model = config.model
    return dict(
        patch_size=(1, model.patch_size, model.patch_size), num_attention_heads=model.num_attention_heads,
        attention_head_dim=model.attention_head_dim, in_channels=16,
        out_channels=32 if model.prediction == "gaussian" else 16, text_dim=model.text_dim,
        freq_dim=model.freq_dim, ffn_dim=model.ffn_dim, num_layers=model.num_layers, rope_max_seq_len=1024,
        ref_clip_dim=clip_token_width(config), clip_path=model.clip_path, clip_proj_type=model.clip_proj_type,
        vae_pos_embed=model.vae_pos_embed, fused_path=model.train_fused_path,
        absolute_positions=model.absolute_positions,
    )  # fmt: skip


def new_transformer(config: Config) -> RefWanTransformer3DModel:
    """The transformer with weights that depend on the seed alone."""
    seed_everything(config.run.seed, _WEIGHTS)
    return RefWanTransformer3DModel(**transformer_settings(config))


def prepare_generator(config: Config, model: RefWanTransformer3DModel) -> TrainableSet:
    """LoRA first (peft freezes everything else), then the names that train; the base goes into its own precision."""
    if config.adapter is not None:
        adapter = config.adapter
        seed_everything(config.run.seed, _WEIGHTS, 1)
        add_lora(
            model, rank=adapter.r, alpha=adapter.lora_alpha, dropout=adapter.lora_dropout,
            target_modules=adapter.target_modules, scope=adapter.scope,
        )  # fmt: skip
    if config.training.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    trainable = enable_trainable(model, train_fused_path=config.model.train_fused_path)
    cast_base(model, {"fp32": torch.float32, "bf16": torch.bfloat16}[config.model.base_dtype])
    return trainable


def load_generator(config: Config, path: str | Path) -> tuple[RefWanTransformer3DModel, TrainableSet]:
    """The frozen base with its trainable parts, ready for training."""
    model = new_transformer(config)
    load_generator_checkpoint(model, path, use_ema=config.model.use_ema)
    return model, prepare_generator(config, model)


# --- the small base ---------------------------------------------------------------------------------------------------


def base_path(config: Config) -> Path:
    """Where the base of this run lies: generator_ckpt, or what the run trains first."""
    return Path(config.model.generator_ckpt or Path(config.run.output_dir) / "base" / "generator.safetensors")


def ensure_base(config: Config, info: DistInfo) -> Path:
    """The base weights; a small base is trained now when none are given. All ranks call it."""
    path = base_path(config)
    if config.model.generator_ckpt is not None:
        return path
    if config.training.base_steps == 0:
        raise UserError(
            "generator_ckpt is not set; give the folder or file of Wan2.1-T2V-1.3B, or base_steps to train a small "
            "base first"
        )
    if config.model.codec != "patch" or config.model.text_encoder != "hash":
        raise UserError(
            "base_steps trains a small base on codec patch and text_encoder hash; for Wan's VAE give --generator-ckpt"
        )
    wanted = min(config.training.base_steps, config.training.max_steps or config.training.base_steps)
    if base_steps_done(path) >= wanted:
        return path
    if info.is_main:
        print(
            f"no generator_ckpt is given: training a small base first, {wanted} steps, into {path.parent}", flush=True
        )
    train_base(config, info, path, wanted)
    return path


def base_steps_done(path: Path) -> int:
    """Steps that a small base was trained for; 0 where there is none."""
    if not path.exists():
        return 0
    with safe_open(str(path), "pt") as file:
        return int((file.metadata() or {}).get("steps", 0))


def base_config(config: Config, world: int) -> Config:
    """The settings under which the base is trained: every parameter, no references, text dropped now and then.

    With a global batch size the base's step takes base_batch_size samples over all ranks, so that any number of them
    trains the same base; without one, every rank takes so many.
    """
    batch_size = config.training.base_batch_size
    if config.training.global_batch_size is not None:
        if batch_size % world:
            raise UserError(
                f"training.base_batch_size {batch_size} does not divide over {world} ranks, and with global_batch_size "
                f"the base's step has so many samples; use a multiple of {world}"
            )
        batch_size //= world
    training = config.training.model_copy(
        update=dict(
            total_steps=config.training.base_steps, batch_size=batch_size, warmup_steps=50,
            global_batch_size=None, gradient_accumulation_steps=1, learning_rate=config.training.base_learning_rate,
            lr_scheduler_type="cosine", min_lr_ratio=0.05, p_drop_ref=0.0, p_drop_both=0.0, p_drop_text=0.1,
            ema_decay=0.995, eval_steps=None, gradient_checkpointing=False, save=True,
        )
    )  # fmt: skip
    return config.model_copy(update={"training": training, "adapter": None})


def train_base(config: Config, info: DistInfo, path: Path, steps: int) -> None:
    """Fit the codec, train the whole transformer without references, and write both beside each other."""
    config = base_config(config, info.world)
    dataset = create_dataset(
        config.data, seed=config.run.seed, time_range=(0.0, config.data.train_share), load_subjects=False
    )
    codec = fit_codec(dataset, path.parent / "codec.safetensors", config.run.seed, info)
    model = new_transformer(config)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not is_reference_name(name))
    encoders = Encoders(codec, HashText(config.model.text_dim, config.model.text_rows), None).to(info.device)
    objective = RefImageFlowMatching(config, encoders, with_references=False)
    plan = BatchPlan(len(dataset), config.training.batch_size, info.world, 1, config.run.seed, drop_last=False)
    stream = MapStream(dataset, plan, info, collate=collate_opens2v_batch, num_workers=config.training.num_workers)

    def export(folder: Path, weights: dict[str, Tensor], ema: dict[str, Tensor] | None) -> None:
        write_base(folder / "generator.safetensors", {**weights, **(ema or {})}, steps)

    result = fit(
        config=config, info=info, model=model, stream=stream, losses=objective.losses, export=export,
        wrap_classes=(RefWanBlock,), output_dir=path.parent, title="small text-to-video base",
    )  # fmt: skip
    if result.step < steps:
        raise UserError(f"the base was stopped at step {result.step} of {steps}; the same command goes on from there")
    if info.is_main:
        assert result.checkpoint is not None
        with written_aside(path) as temporary:
            shutil.copyfile(result.checkpoint / "generator.safetensors", temporary)
    barrier()


def write_base(path: Path, weights: dict[str, Tensor], steps: int) -> None:
    """Base weights under diffusers names, float32."""
    base = {name: value.contiguous() for name, value in weights.items() if not is_reference_name(name)}
    save_file(base, path, metadata={"steps": str(steps), "format": json.dumps("opens2v small base")})


def fit_codec(dataset: Any, path: Path, seed: int, info: DistInfo) -> PatchCodec:
    """The patch codec of a data set; made once, by rank 0, from a window of some clips."""
    codec = PatchCodec()
    if info.is_main and not path.exists():
        order = torch.randperm(len(dataset), generator=keyed_generator(seed, _CODEC_FRAMES))[:_CODEC_CLIPS].tolist()
        codec.fit(torch.stack([dataset.sample(index, 0)["frames"] for index in order]))
        with written_aside(path) as temporary:
            save_file({name: value.contiguous() for name, value in codec.state_dict().items()}, temporary)
    barrier()
    return load_patch_codec(path.parent)


def latent_shape(config: Config, frames: int, height: int, width: int) -> tuple[int, int, int, int]:
    """(channels, latent frames, h, w) of a video."""
    temporal, spatial = codec_factors(config.model)
    return 16, (frames - 1) // temporal + 1, height // spatial, width // spatial
