"""Base weights of Wan2.1 in every public form: original and diffusers names, wrapped, prefixed, sharded."""

import json
import re
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from opens2v.model import RefWanTransformer3DModel, is_reference_name
from shared.engine.checkpoint import load_strict, read_weights_file
from shared.errors import CheckpointError, UserError
from shared.media.folders import files_in

# Original (Wan, Self-Forcing, LongLive) -> diffusers. norm3 of the original is norm2 of diffusers: the numbers swap.
_NAMES = (  # beginnings of names: original, diffusers
    ("text_embedding.0.", "condition_embedder.text_embedder.linear_1."),
    ("text_embedding.2.", "condition_embedder.text_embedder.linear_2."),
    ("time_embedding.0.", "condition_embedder.time_embedder.linear_1."),
    ("time_embedding.2.", "condition_embedder.time_embedder.linear_2."),
    ("time_projection.1.", "condition_embedder.time_proj."),
    ("img_emb.proj.0.", "condition_embedder.image_embedder.norm1."),
    ("img_emb.proj.1.", "condition_embedder.image_embedder.ff.net.0.proj."),
    ("img_emb.proj.3.", "condition_embedder.image_embedder.ff.net.2."),
    ("img_emb.proj.4.", "condition_embedder.image_embedder.norm2."),
    ("head.head.", "proj_out."),
    ("head.modulation", "scale_shift_table"),
)
_BLOCK_NAMES = (  # behind blocks.N.
    ("modulation", "scale_shift_table"),
    ("norm3.", "norm2."),
    ("ffn.0.", "ffn.net.0.proj."),
    ("ffn.2.", "ffn.net.2."),
    *((f"{old}_attn.{x}.", f"{new}.to_{x}.") for old, new in (("self", "attn1"), ("cross", "attn2")) for x in "qkv"),
    ("self_attn.o.", "attn1.to_out.0."),
    ("cross_attn.o.", "attn2.to_out.0."),
    ("cross_attn.k_img.", "attn2.add_k_proj."),
    ("cross_attn.v_img.", "attn2.add_v_proj."),
    ("cross_attn.norm_k_img.", "attn2.norm_added_k."),
    ("self_attn.", "attn1."),
    ("cross_attn.", "attn2."),
)
_WRAPPERS = (
    "model.diffusion_model.",  # ComfyUI's checkpoints
    "diffusion_model.",
    "model.",
    "module.",
    "_fsdp_wrapped_module.",
    "_checkpoint_wrapped_module.",
    "_orig_mod.",
    "base_model.model.",
    "transformer.",  # LoRA of diffusers
)
_NO_GENERATORS = ("Wan2.1_VAE.pth",)  # beside the generator in the original folders
_KEEP_FLOAT32 = ("time_embedder", "scale_shift_table", "norm1", "norm2", "norm3")


def _renamed(name: str, wanted: int) -> str:
    """The name with its beginning taken from column `wanted` of the tables."""
    block = re.match(r"blocks\.\d+\.", name)
    head = block[0] if block else ""
    for row in _BLOCK_NAMES if block else _NAMES:
        if name.startswith(row[1 - wanted], len(head)):
            return head + row[wanted] + name[len(head) + len(row[1 - wanted]) :]
    return name


def to_diffusers_name(name: str) -> str:
    """The diffusers name of an original Wan name; a name of another kind is returned as it is."""
    return _renamed(name, 1)


def to_original_name(name: str) -> str:
    """The original Wan name of a diffusers name."""
    return _renamed(name, 0)


def strip_wrappers(name: str) -> str:
    """A parameter name without the prefixes that training wrappers leave, wherever they stand."""
    for wrapper in ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_orig_mod."):
        name = name.replace(wrapper, "")
    changed = True
    while changed:
        changed = False
        for wrapper in _WRAPPERS:
            if name.startswith(wrapper):
                name, changed = name[len(wrapper) :], True
    return name


def normalise_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict under diffusers names without wrappers; the given one is left as it is."""
    state = {strip_wrappers(name): value for name, value in state.items()}
    if any(".self_attn.q." in name for name in state):
        state = {to_diffusers_name(name): value for name, value in state.items()}
    return state


def read_generator_state(path: str | Path, *, use_ema: bool = False) -> dict[str, Tensor]:
    """Base weights under diffusers names from a .pt, .pth, .bin or .safetensors file, or a folder that holds them: a
    diffusers folder (its transformer or the whole model), or one with a single file such as LongLive's.

    use_ema takes `generator_ema` of a .pt where it is there. LoRA of this project's own model.pt is merged in. Raises
    UserError for what cannot be read.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(
            f"generator_ckpt {path}: no such file or folder; give the folder of Wan2.1-T2V-1.3B or its weights file"
        )
    state: dict[str, Tensor] = {}
    for file in _files_of(path) if path.is_dir() else [path]:
        part = _unwrapped(read_tensors_file(file), file, use_ema)
        twice = next((name for name in part if name in state), None)
        if twice is not None:
            raise UserError(
                f"generator_ckpt {path}: {twice} lies in {file.name} and in another of its files; name the one meant"
            )
        state |= part
    return normalise_state(state)


def read_tensors_file(path: Path, what: str = "generator_ckpt") -> Mapping:
    """What a weights file holds, a mapping; UserError, beginning with what the file was given as, for another."""
    try:
        loaded = read_weights_file(path)
    except CheckpointError as error:
        raise CheckpointError(f"{what} {error}") from None
    if not isinstance(loaded, dict):
        raise UserError(f"{what} {path}: holds {type(loaded).__name__}, a dict of tensors is needed")
    return loaded


def _unwrapped(loaded: Mapping, path: Path, use_ema: bool) -> dict[str, Tensor]:
    """The tensors of the generator in what a file holds."""
    is_own = str(loaded.get("format", "")).startswith("opens2v")
    if not is_own and ("critic" in loaded or "generator_lora" in loaded):
        warnings.warn(
            f"{path} comes from distillation (it holds critic or generator_lora): a few-step generator is no velocity "
            "model over the whole schedule, and flow matching with it frozen will not converge; use the undistilled "
            "Wan2.1-T2V-1.3B",
            stacklevel=2,
        )
    state: Mapping = loaded
    found = ""
    order = ("generator_ema", "generator") if use_ema else ("generator", "generator_ema")
    for key in (*order, "model", "state_dict"):
        inner = loaded.get(key)
        if isinstance(inner, Mapping):
            state, found = inner, key
            break
    tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    if is_own and found == "generator_ema":  # averages are kept of what trains; the frozen rest stands beside them
        tensors = {**loaded.get("generator", {}), **tensors}
    if is_own:
        lora = loaded.get("generator_lora_ema" if found == "generator_ema" else "generator_lora") or {}
        adapter = (loaded.get("ref_config") or {}).get("adapter") or {}
        merge_state(tensors, lora, float(adapter.get("lora_alpha", 1)), str(path))
    return tensors


def merge_state(tensors: dict[str, Tensor], lora: Mapping[str, Tensor], alpha: float, source: str) -> None:
    """Add LoRA products alpha / r B A to the weights that they belong to (names as in a model.pt), in float32."""
    for name, down in lora.items():
        if not name.endswith("lora_A.weight"):
            continue
        target = name.replace(".lora_A.weight", ".weight")
        if target not in tensors:
            raise UserError(
                f"generator_ckpt {source}: holds LoRA for {target} and not the layer itself; train with "
                "--save-full-generator, or give the base as --generator-ckpt and this file as --init-from"
            )
        product = lora[name.replace("lora_A", "lora_B")].float() @ down.float()
        tensors[target] = (tensors[target].float() + alpha / len(down) * product).to(tensors[target].dtype)


def _files_of(folder: Path) -> list[Path]:
    """The weights files of a folder: all shards of an index, else the only file; UserError names what is unclear."""
    for candidate in (folder / "transformer", folder):
        for suffix in (".safetensors", ".bin"):
            index = files_in(candidate, f"*{suffix}.index.json")
            usual = candidate / f"diffusion_pytorch_model{suffix}"  # others beside it are its variants
            files = [usual] if usual.exists() else files_in(candidate, f"*{suffix}")
            if index:
                try:
                    names = sorted({str(name) for name in json.loads(index[0].read_bytes())["weight_map"].values()})
                except (ValueError, KeyError, TypeError, AttributeError) as error:
                    raise UserError(
                        f"generator_ckpt {folder}: the weight index {index[0].name} cannot be read "
                        f"({type(error).__name__}: {error}); download the folder again"
                    ) from None
                files = [candidate / name for name in names]
                missing = [str(file) for file in files if not file.exists()]
                if missing:
                    raise UserError(
                        f"generator_ckpt {folder}: {missing[0]} of the weight index is missing; download the folder "
                        "again"
                    )
            if files:
                return files
        files = files_in(candidate, "*.pt", "*.pth")
        files = [file for file in files if file.name not in _NO_GENERATORS and not file.name.startswith("models_")]
        if len(files) > 1:
            raise UserError(
                f"generator_ckpt {folder}: holds {len(files)} weights files ({', '.join(f.name for f in files[:4])}); "
                "name one of them"
            )
        if files:
            return files
    raise UserError(
        f"generator_ckpt {folder}: holds no .safetensors, .bin, .pt or .pth file of a generator; give the folder that "
        "holds the transformer"
    )


def holds_fused_path(state: Mapping[str, Tensor]) -> bool:
    """Whether base weights bring a trained third path: it is kept, frozen, and adds to the output."""
    return any(".k_fused." in name for name in state)


def load_generator_checkpoint(
    model: RefWanTransformer3DModel, path: str | Path, *, use_ema: bool = False, state: dict[str, Tensor] | None = None
) -> dict[str, list[str]]:
    """Load base weights (and reference weights where the file has them) into the model, strictly.

    state: what read_generator_state gave for the path, when it was read already. Fails unless what is missing are
    reference modules, nothing is left over, and all shapes fit. Returns the names by "loaded", "new" (reference modules
    not in the file).
    """
    state = read_generator_state(path, use_ema=use_ema) if state is None else state
    own = model.state_dict()
    references = [name for name in own if is_reference_name(name)]
    load_strict(model, state, what=f"generator_ckpt {path}", allow_missing=references)
    new = [name for name in own if name not in state]
    if new and not any(is_reference_name(name) for name in state):
        model.reset_reference_parameters()  # key norms start as copies of the base's
    return {"loaded": sorted(state), "new": new}


def cast_base(model: nn.Module, dtype: torch.dtype) -> None:
    """Put the frozen base into `dtype`; time embedder, modulation tables and block norms stay float32."""
    for name, parameter in model.named_parameters():
        if (
            not is_reference_name(name)
            and "lora_" not in name
            and not any(part in name.split(".") for part in _KEEP_FLOAT32)
        ):
            parameter.data = parameter.data.to(dtype)
