"""Networks from settings, and their weights from files."""

from pathlib import Path

import torch
from torch import Tensor, nn

from float.config import DataConfig, ModelConfig
from float.data.pose import POSE_WIDTH
from float.model import FlowMatchingTransformer, MotionGenerator
from float.modules.audio import raw_audio_width
from float.modules.autoencoder import MotionAutoencoder
from float.modules.compact import CompactAutoencoder
from shared.engine.checkpoint import find_checkpoint, load_strict, load_weights
from shared.errors import UserError

Autoencoder = MotionAutoencoder | CompactAutoencoder
AUTOENCODER_PREFIX = "motion_autoencoder."
WRAPPERS = ("module.", "_orig_mod.", "model.")  # DataParallel, torch.compile, Lightning


def make_autoencoder(model: ModelConfig) -> Autoencoder:
    """The motion auto-encoder with fresh weights."""
    kind = CompactAutoencoder if model.autoencoder == "compact" else MotionAutoencoder
    return kind(model.input_size, model.dim_w, model.dim_m, model.channels)


def make_transformer(
    model: ModelConfig, data: DataConfig, *, gradient_checkpointing: bool = False
) -> FlowMatchingTransformer:
    """The flow matching transformer with fresh weights."""
    return FlowMatchingTransformer(
        dim_w=model.dim_m if model.whiten_motion else model.dim_w,
        dim_a=model.dim_a,
        dim_e=model.dim_e,
        dim_h=model.dim_h,
        depth=model.fmt_depth,
        num_heads=model.num_heads,
        mlp_ratio=model.mlp_ratio,
        attention_window=model.attention_window,
        num_frames=data.sequence_length,
        num_prev_frames=data.prev_frames,
        gradient_checkpointing=gradient_checkpointing,
        pose_width=POSE_WIDTH if model.pose_condition else 0,
    )


def make_generator(model: ModelConfig, data: DataConfig, *, gradient_checkpointing: bool = False) -> MotionGenerator:
    """Transformer and audio projection with fresh weights."""
    width = raw_audio_width(model.audio_features, model.wav2vec_model_path, only_last_features=model.only_last_features)
    return MotionGenerator(
        make_transformer(model, data, gradient_checkpointing=gradient_checkpointing),
        width,
        model.dim_w,
        relative=model.relative_motion,
    )


def check_weights(flag: str, path: str) -> None:
    """UserError unless a run, a checkpoint or a file of weights lies at `path`; reads no weights."""
    if not Path(path).exists():
        raise UserError(f"{flag} {path}: no such checkpoint; give a run, one of its checkpoints, or a file of weights")
    if Path(path).is_dir():
        find_checkpoint(path)


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Tensors by name of a run, a checkpoint or a file, without what wrappers put before every name."""
    state = load_weights(path)
    for prefix in WRAPPERS:
        if state and all(name.startswith(prefix) for name in state):
            state = {name.removeprefix(prefix): value for name, value in state.items()}
    return state


def load_autoencoder(model: ModelConfig, path: str) -> Autoencoder:
    """A trained auto-encoder, frozen and in eval mode; path: a phase-1 run or checkpoint, a file of weights, or
    float.pth.
    """
    autoencoder = make_autoencoder(model)
    state = {
        name.removeprefix(AUTOENCODER_PREFIX): value
        for name, value in read_weights(path).items()
        if name.startswith(AUTOENCODER_PREFIX)
    }
    if not state:
        raise UserError(f"{path}: holds no motion auto-encoder (no tensor named {AUTOENCODER_PREFIX}...)")
    load_strict(autoencoder, state, what=f"auto-encoder of {path}", allow_missing=unsaved_names(autoencoder))
    return autoencoder.eval().requires_grad_(False)


def load_generator(generator: MotionGenerator, path: str | Path, *, start: bool = False) -> None:
    """Weights of a phase-2 run or checkpoint, or the transformer and projection of float.pth. start: training begins
    with them, and a pose condition that they lack with zeros, which changes nothing at first.
    """
    state = {
        name: value
        for name, value in read_weights(path).items()
        if name.startswith(("fmt.", "audio_encoder.audio_", "motion_"))
    }
    state = {name: value for name, value in state.items() if not name.startswith(AUTOENCODER_PREFIX)}
    own = generator.fmt.pos_embed.shape
    if "fmt.pos_embed" in state and state["fmt.pos_embed"].shape != own:
        # a fixed table: other window lengths have their own
        state = {name: value for name, value in state.items() if name not in ("fmt.pos_embed", "fmt.alignment_mask")}
    missing = ["fmt.p_embedder.weight", "motion_pose_"] if start else []
    missing += ["fmt.pos_embed", "fmt.alignment_mask", "motion_mean", "motion_whiten", "motion_unwhiten"]
    if start and generator.fmt.p_embedder is not None:
        nn.init.zeros_(generator.fmt.p_embedder.weight)
    load_strict(generator, state, what=f"motion generator of {path}", allow_missing=missing)


def unsaved_names(module: nn.Module) -> list[str]:
    """Names that a checkpoint may lack: frozen parameters and computed buffers."""
    frozen = [name for name, parameter in module.named_parameters() if not parameter.requires_grad]
    return frozen + [name for name, _ in module.named_buffers()]


def weights_hash(module: nn.Module) -> str:
    """Sixteen hex digits that change with any weight; names and bytes, CPU."""
    import hashlib

    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(_bytes(value))
    return digest.hexdigest()[:16]


def _bytes(value: Tensor) -> bytes:
    return value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
