"""The generator of a run, and the small text-to-video base that is trained first when no base weights are given."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from opens2v.config import Config, codec_factors
from opens2v.data.video import normalise
from opens2v.dataset import Samples, collate_opens2v_batch, readable_samples, training_set
from opens2v.model import RefWanBlock, RefWanTransformer3DModel, is_reference_name
from opens2v.modules.codec import ConvCodec, codec_loss
from opens2v.modules.conditions import Encoders, clip_token_width, hash_text, load_codec
from opens2v.modules.encoders import PatchCodec, PixelImages
from opens2v.modules.lora import TrainableSet, add_lora, enable_trainable
from opens2v.objective import RefImageFlowMatching
from opens2v.weights.wan import cast_base, holds_fused_path, load_generator_checkpoint, read_generator_state
from shared.data import BatchPlan, MapStream
from shared.engine.checkpoint import find_checkpoint
from shared.engine.dist import DistInfo, barrier
from shared.engine.recompute import checkpoint
from shared.errors import Stopped, UserError, written_aside
from shared.loop import FitResult, fit
from shared.rng import keyed_generator, keyed_rand, keyed_randn, seed_everything

_WEIGHTS, _CODEC_FRAMES, _CODEC_NOISE = 521, 522, 523  # random streams
_CODEC_CLIPS = 24  # clips that the codec is fitted to
CODEC_LEARNING_RATE = 2e-3  # peak, of the convolutional auto-encoder
_CODEC_NOISE_LEVEL = 0.15  # largest noise on the way to its decoder, in units of the latents' scale


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
        absolute_positions=model.absolute_positions, ref_in_self_attention=model.ref_in_self_attention,
        position_base=model.position_base,
    )  # fmt: skip


def new_transformer(config: Config, **changes: Any) -> RefWanTransformer3DModel:
    """The transformer with weights that depend on the seed alone."""
    seed_everything(config.run.seed, _WEIGHTS)
    return RefWanTransformer3DModel(**{**transformer_settings(config), **changes})


def prepare_generator(config: Config, model: RefWanTransformer3DModel, *, precision: str) -> TrainableSet:
    """LoRA first (peft freezes everything else), then the names that train; the base goes into its own precision.

    precision: of the arithmetic. Without autocast nothing may multiply mixed types: under fp32 a base that is meant to
    lie in bf16 is rounded to it and held in fp32.
    """
    if config.adapter is not None:
        adapter = config.adapter
        seed_everything(config.run.seed, _WEIGHTS, 1)
        add_lora(
            model, rank=adapter.r, alpha=adapter.lora_alpha, dropout=adapter.lora_dropout,
            target_modules=adapter.target_modules, scope=adapter.scope,
        )  # fmt: skip
    if config.training.gradient_checkpointing:
        model.enable_gradient_checkpointing(checkpoint)
    trainable = enable_trainable(model, train_fused_path=config.model.train_fused_path)
    cast_base(model, {"fp32": torch.float32, "bf16": torch.bfloat16}[config.model.base_dtype])
    if precision == "fp32":
        cast_base(model, torch.float32)
    return trainable


def load_generator(
    config: Config, path: str | Path, *, precision: str = "fp32"
) -> tuple[RefWanTransformer3DModel, TrainableSet]:
    """The frozen base with its trainable parts. precision: see prepare_generator."""
    state = read_generator_state(path, use_ema=config.model.use_ema)
    model = new_transformer(config, fused_path=config.model.train_fused_path or holds_fused_path(state))
    load_generator_checkpoint(model, path, state=state)
    return model, prepare_generator(config, model, precision=precision)


# --- the small base ---------------------------------------------------------------------------------------------------


def base_path(config: Config) -> Path:
    """Where the base of this run lies: generator_ckpt, or what the run trains first."""
    return Path(config.model.generator_ckpt or Path(config.run.output_dir) / "base" / "generator.safetensors")


def ensure_base(config: Config, info: DistInfo) -> Path:
    """The base weights; a small base is trained now when none are given. All ranks call it."""
    path = base_path(config)
    if config.model.generator_ckpt is not None:
        return path
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
    try:
        with safe_open(str(path), "pt") as file:
            return int((file.metadata() or {}).get("steps", 0))
    except (SafetensorError, ValueError, OSError) as error:
        raise UserError(f"small base {path}: cannot be read ({error}); delete it and it is made again") from None


def base_config(config: Config, world: int, **changes: Any) -> Config:
    """The settings under which the base, or with changes its codec, is trained: every parameter, no references, text
    dropped now and then.

    With a global batch size the base's step takes base_batch_size samples over all ranks, so that any number of them
    trains the same base; without one, every rank takes so many.
    """
    training, batch_size = config.training, config.training.base_batch_size
    if training.global_batch_size is not None:
        if batch_size % world:
            raise UserError(
                f"training.base_batch_size {batch_size} does not divide over {world} ranks, and with global_batch_size "
                f"the base's step has so many samples; use a multiple of {world}"
            )
        batch_size //= world
    settings = dict(
        total_steps=training.base_steps, batch_size=batch_size, warmup_steps=50, global_batch_size=None,
        gradient_accumulation_steps=1, learning_rate=training.base_learning_rate, lr_scheduler_type="cosine",
        min_lr_ratio=0.05, p_drop_ref=0.0, p_drop_both=0.0, p_drop_text=0.1, ema_decay=0.995, eval_steps=None,
        early_stopping_patience=None, gradient_checkpointing=False, save=True,
    )  # fmt: skip
    changed = training.model_copy(update={**settings, **changes})
    return config.model_copy(update={"training": changed, "adapter": None})


def train_base(config: Config, info: DistInfo, path: Path, steps: int) -> None:
    """Make the codec, train the whole transformer, and write both beside each other.

    With base_with_references the reference modules are trained along: a base that never saw a subject picture gives
    them little to hold on to. It is then frozen all the same, and they go on alone.
    """
    codec_path = path.parent / "codec.safetensors"
    if config.model.codec == "conv":
        train_codec(config, info, codec_path)
    else:
        fit_codec(training_set(config, load_subjects=False), codec_path, config.run.seed, info)
    codec = load_codec(config.model.codec, path.parent)
    together = config.training.base_with_references
    drops = dict(p_drop_text=0.1, p_drop_ref=0.1, p_drop_both=0.05) if together else {}
    config = base_config(config, info.world, **drops)
    dataset = training_set(config, load_subjects=together)
    model = new_transformer(config)
    if together:
        model.open_reference_paths()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(together or not is_reference_name(name))
    image = PixelImages() if together and config.model.clip_path != "off" else None
    encoders = Encoders(codec, hash_text(config.model), image).to(info.device)
    objective = RefImageFlowMatching(config, encoders, with_references=together)

    def export(folder: Path, weights: dict[str, Tensor], ema: dict[str, Tensor] | None) -> None:
        write_base(folder / "generator.safetensors", {**weights, **(ema or {})}, steps, together)

    result = fit(
        config=config, info=info, model=model, stream=_stream(config, dataset, info), losses=objective.losses,
        export=export, wrap_classes=(RefWanBlock,), output_dir=path.parent, title="small text-to-video base",
    )  # fmt: skip
    _take(result, path.parent, "generator.safetensors", path, steps, info)


def train_codec(config: Config, info: DistInfo, path: Path) -> None:
    """Train the convolutional auto-encoder on the clips and on the subjects' pictures, which it also has to code."""
    if path.exists():
        return
    steps = config.training.codec_steps or config.training.base_steps
    config = base_config(
        config, info.world, total_steps=steps, learning_rate=CODEC_LEARNING_RATE, ema_decay=0.0,
        weight_decay=0.0, adam_beta2=0.99, compile=False,
    )  # fmt: skip
    if config.training.max_steps is not None:
        steps = min(steps, config.training.max_steps)
    dataset, folder = training_set(config), path.parent / "codec"
    seed_everything(config.run.seed, _WEIGHTS, 2)
    model = ConvCodec()
    model.first.start_from(normalise(torch.stack(_some_clips(dataset, config.run.seed, 128)))[:, :, 0])

    def losses(model: Any, batches: list[dict], step: int) -> Iterator[tuple[Tensor, dict]]:
        for batch in batches:
            key, slots = (config.run.seed, _CODEC_NOISE, step), batch["slot"]
            clips = normalise(batch["frames"].to(info.device))
            pictures = batch["ref_pixels"].to(info.device)[:, 0].unsqueeze(2)
            loss = torch.zeros((), device=info.device)
            # Half of the samples show their motion, half one frame, some the subject's picture: a step costs half as
            # much as with all of all. Chosen by slot, so that any number of ranks trains the same.
            for part, (frames, share, chosen) in enumerate(
                (
                    (clips, 1 / 2, slots % 2 == step % 2),
                    (clips[:, :, [step % clips.shape[2]]], 1 / 2, slots % 2 != step % 2),
                    (pictures, 3 / 8, slots % 8 < 3),
                )
            ):
                weight = chosen.float().mean() / share * (0.25 if part == 2 else 1.0)
                chosen = chosen if chosen.any() else torch.ones_like(chosen)  # weight 0: all ranks run the same
                rows = chosen.nonzero().squeeze(1)  # counted on the host: a mask on a GPU would make it wait
                frames, places = frames[rows.to(frames.device, non_blocking=True)], slots[rows]
                latent = (ConvCodec.channels, (frames.shape[2] - 1) // 4 + 1, *(n // 4 for n in frames.shape[-2:]))
                level = keyed_rand((1,), key=(*key, 0), slots=places, device=info.device)[:, :, None, None, None]
                noise = keyed_randn(latent, key=(*key, 1 + part), slots=places, device=info.device)
                rebuilt, size = model(frames, _CODEC_NOISE_LEVEL * level * noise)
                loss = loss + weight.to(info.device) * codec_loss(rebuilt.float(), frames, size.float())
            yield loss / len(batches), {}

    def export(folder: Path, weights: dict[str, Tensor], ema: dict[str, Tensor] | None) -> None:
        trained = ConvCodec()
        trained.load_state_dict({**trained.state_dict(), **weights})
        trained.measure(normalise(torch.stack(_some_clips(dataset, config.run.seed, 128))))
        save_file({name: value.contiguous() for name, value in trained.state_dict().items()}, folder / path.name)

    result = fit(
        config=config, info=info, model=model, stream=_stream(config, dataset, info), losses=losses, export=export,
        output_dir=folder, title="small video auto-encoder",
    )  # fmt: skip
    _take(result, folder, path.name, path, steps, info)


def _stream(config: Config, dataset: Samples, info: DistInfo) -> MapStream:
    plan = BatchPlan(len(dataset), config.training.batch_size, info.world, 1, config.run.seed, drop_last=False)
    return MapStream(dataset, plan, info, collate=collate_opens2v_batch, num_workers=config.training.num_workers)


def _take(result: FitResult, folder: Path, name: str, path: Path, steps: int, info: DistInfo) -> None:
    """Put the file that the last checkpoint of a finished phase holds where the next phase looks for it."""
    if result.step < steps:
        raise Stopped(f"{folder}: stopped at step {result.step} of {steps}; the same command goes on from there")
    if info.is_main:
        # A run that was killed after its last save has trained nothing now: then the newest complete one is taken.
        checkpoint = result.checkpoint or find_checkpoint(folder)
        with written_aside(path) as temporary:
            shutil.copyfile(checkpoint / name, temporary)
    barrier()


def write_base(path: Path, weights: dict[str, Tensor], steps: int, with_references: bool = False) -> None:
    """Base weights under diffusers names, float32; the reference modules as well where they were trained with it."""
    names = [name for name in weights if with_references or not is_reference_name(name)]
    base = {name: weights[name].contiguous() for name in names}
    save_file(base, path, metadata={"steps": str(steps), "format": json.dumps("opens2v small base")})


def fit_codec(dataset: Any, path: Path, seed: int, info: DistInfo) -> None:
    """The patch codec of a data set; made once, by rank 0, from a window of some clips."""
    if info.is_main and not path.exists():
        codec = PatchCodec().fit(normalise(torch.stack(_some_clips(dataset, seed, _CODEC_CLIPS))))
        with written_aside(path) as temporary:
            save_file({name: value.contiguous() for name, value in codec.state_dict().items()}, temporary)
    barrier()


def _some_clips(dataset: Any, seed: int, count: int) -> list[Tensor]:
    """The frames of up to `count` clips that can be read."""
    order = torch.randperm(len(dataset), generator=keyed_generator(seed, _CODEC_FRAMES)).tolist()
    return [item["frames"] for item in readable_samples(dataset, order, count)]


def latent_shape(config: Config, frames: int, height: int, width: int) -> tuple[int, int, int, int]:
    """(channels, latent frames, h, w) of a video."""
    temporal, spatial = codec_factors(config.model)
    return 16, (frames - 1) // temporal + 1, height // spatial, width // spatial
