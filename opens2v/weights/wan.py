"""Base weights of Wan2.1 in every public form: original and diffusers names, wrapped, prefixed, sharded or in a
folder.
"""

import json
import re
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from opens2v.model import RefWanTransformer3DModel, is_reference_name
from shared.engine.checkpoint import load_strict
from shared.errors import UserError

# Original (Wan, Self-Forcing, LongLive) -> diffusers. norm3 of the original is norm2 of diffusers: the numbers swap.
_ORIGINAL_TO_DIFFUSERS = (
    (r"text_embedding\.0\.", "condition_embedder.text_embedder.linear_1."),
    (r"text_embedding\.2\.", "condition_embedder.text_embedder.linear_2."),
    (r"time_embedding\.0\.", "condition_embedder.time_embedder.linear_1."),
    (r"time_embedding\.2\.", "condition_embedder.time_embedder.linear_2."),
    (r"time_projection\.1\.", "condition_embedder.time_proj."),
    (r"img_emb\.proj\.0\.", "condition_embedder.image_embedder.norm1."),
    (r"img_emb\.proj\.1\.", "condition_embedder.image_embedder.ff.net.0.proj."),
    (r"img_emb\.proj\.3\.", "condition_embedder.image_embedder.ff.net.2."),
    (r"img_emb\.proj\.4\.", "condition_embedder.image_embedder.norm2."),
    (r"head\.head\.", "proj_out."),
    (r"head\.modulation$", "scale_shift_table"),
    (r"(blocks\.\d+)\.modulation$", r"\1.scale_shift_table"),
    (r"(blocks\.\d+)\.norm3\.", r"\1.norm2."),
    (r"(blocks\.\d+)\.ffn\.0\.", r"\1.ffn.net.0.proj."),
    (r"(blocks\.\d+)\.ffn\.2\.", r"\1.ffn.net.2."),
    (r"(blocks\.\d+)\.(self|cross)_attn\.([qkv])\.", r"\1.\2_attn.to_\3."),
    (r"(blocks\.\d+)\.(self|cross)_attn\.o\.", r"\1.\2_attn.to_out.0."),
    (r"(blocks\.\d+)\.cross_attn\.k_img\.", r"\1.cross_attn.add_k_proj."),
    (r"(blocks\.\d+)\.cross_attn\.v_img\.", r"\1.cross_attn.add_v_proj."),
    (r"(blocks\.\d+)\.cross_attn\.norm_k_img\.", r"\1.cross_attn.norm_added_k."),
    (r"(blocks\.\d+)\.self_attn\.", r"\1.attn1."),
    (r"(blocks\.\d+)\.cross_attn\.", r"\1.attn2."),
)
_DIFFUSERS_TO_ORIGINAL = (
    (r"condition_embedder\.text_embedder\.linear_1\.", "text_embedding.0."),
    (r"condition_embedder\.text_embedder\.linear_2\.", "text_embedding.2."),
    (r"condition_embedder\.time_embedder\.linear_1\.", "time_embedding.0."),
    (r"condition_embedder\.time_embedder\.linear_2\.", "time_embedding.2."),
    (r"condition_embedder\.time_proj\.", "time_projection.1."),
    (r"condition_embedder\.image_embedder\.norm1\.", "img_emb.proj.0."),
    (r"condition_embedder\.image_embedder\.ff\.net\.0\.proj\.", "img_emb.proj.1."),
    (r"condition_embedder\.image_embedder\.ff\.net\.2\.", "img_emb.proj.3."),
    (r"condition_embedder\.image_embedder\.norm2\.", "img_emb.proj.4."),
    (r"proj_out\.", "head.head."),
    (r"scale_shift_table$", "head.modulation"),
    (r"(blocks\.\d+)\.scale_shift_table$", r"\1.modulation"),
    (r"(blocks\.\d+)\.norm2\.", r"\1.norm3."),
    (r"(blocks\.\d+)\.ffn\.net\.0\.proj\.", r"\1.ffn.0."),
    (r"(blocks\.\d+)\.ffn\.net\.2\.", r"\1.ffn.2."),
    (r"(blocks\.\d+)\.(attn[12])\.to_out\.0\.", r"\1.\2.o."),
    (r"(blocks\.\d+)\.(attn[12])\.to_([qkv])\.", r"\1.\2.\3."),
    (r"(blocks\.\d+)\.attn2\.add_k_proj\.", r"\1.attn2.k_img."),
    (r"(blocks\.\d+)\.attn2\.add_v_proj\.", r"\1.attn2.v_img."),
    (r"(blocks\.\d+)\.attn2\.norm_added_k\.", r"\1.attn2.norm_k_img."),
    (r"(blocks\.\d+)\.attn1\.", r"\1.self_attn."),
    (r"(blocks\.\d+)\.attn2\.", r"\1.cross_attn."),
)
_WRAPPERS = (
    "model.",
    "module.",
    "_fsdp_wrapped_module.",
    "_checkpoint_wrapped_module.",
    "_orig_mod.",
    "base_model.model.",
)
_KEEP_FLOAT32 = ("time_embedder", "scale_shift_table", "norm1", "norm2", "norm3")


def _renamed(name: str, table: tuple[tuple[str, str], ...]) -> str:
    for pattern, replacement in table:
        name = re.sub(f"^{pattern}", replacement, name)
    return name


def to_diffusers_name(name: str) -> str:
    """The diffusers name of an original Wan name; a name of another kind is returned as it is."""
    return _renamed(name, _ORIGINAL_TO_DIFFUSERS)


def to_original_name(name: str) -> str:
    """The original Wan name of a diffusers name."""
    return _renamed(name, _DIFFUSERS_TO_ORIGINAL)


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
    """Base weights under diffusers names from a .pt, .pth or .safetensors file or a diffusers folder.

    use_ema takes `generator_ema` of a .pt where it is there. Raises UserError for what cannot be read.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(
            f"generator_ckpt {path}: no such file or folder; give the folder of Wan2.1-T2V-1.3B or its weights file"
        )
    if path.is_dir():
        return normalise_state(_read_folder(path))
    try:
        loaded = (
            load_file(path)
            if path.suffix == ".safetensors"
            else torch.load(path, map_location="cpu", weights_only=True)
        )
    except (OSError, RuntimeError, SafetensorError, ValueError, EOFError, KeyError, TypeError) as error:
        raise UserError(
            f"generator_ckpt {path}: cannot be read as weights ({_first_line(error)}); copy or download it again"
        ) from None
    except Exception as error:  # the unpickler has an error class of its own that is not public
        raise UserError(
            f"generator_ckpt {path}: cannot be read as weights ({_first_line(error)}); copy or download it again"
        ) from None
    if not isinstance(loaded, dict):
        raise UserError(f"generator_ckpt {path}: holds {type(loaded).__name__}, a dict of tensors is needed")
    if "critic" in loaded or "generator_lora" in loaded:
        warnings.warn(
            f"{path} comes from distillation (it holds critic or generator_lora): a few-step generator is no velocity "
            "model over the "
            "whole schedule, and flow matching with it frozen will not converge; use the undistilled Wan2.1-T2V-1.3B",
            stacklevel=2,
        )
    order = ("generator_ema", "generator") if use_ema else ("generator", "generator_ema")
    state: Mapping = loaded
    for key in (*order, "model", "state_dict"):
        inner = loaded.get(key)
        if isinstance(inner, Mapping):
            state = inner
            break
    return normalise_state({name: value for name, value in state.items() if isinstance(value, Tensor)})


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


def _read_folder(folder: Path) -> dict[str, Tensor]:
    for candidate in (folder / "transformer", folder):
        index = sorted(candidate.glob("*.safetensors.index.json"))
        files = sorted(candidate.glob("*.safetensors"))
        if index:
            names = sorted(set(json.loads(index[0].read_text())["weight_map"].values()))
            files = [candidate / name for name in names]
        if files:
            missing = [str(file) for file in files if not file.exists()]
            if missing:
                raise UserError(
                    f"generator_ckpt {folder}: {missing[0]} of the weight index is missing; download the folder again"
                )
            state: dict[str, Tensor] = {}
            for file in files:
                state.update(load_file(file))
            return state
        weights = sorted([*candidate.glob("*.pt"), *candidate.glob("*.pth")])
        if weights:
            return torch.load(weights[0], map_location="cpu", weights_only=True)
    raise UserError(
        f"generator_ckpt {folder}: holds no .safetensors, .pt or .pth file; give the folder that holds the transformer"
    )


def load_generator_checkpoint(
    model: RefWanTransformer3DModel, path: str | Path, *, use_ema: bool = False
) -> dict[str, list[str]]:
    """Load base weights (and reference weights where the file has them) into the model, strictly.

    Fails unless what is missing are reference modules, nothing is left over, and all shapes fit. Returns the names by
    "loaded", "new" (reference modules not in the file).
    """
    state, own = read_generator_state(path, use_ema=use_ema), model.state_dict()
    references = [name for name in own if is_reference_name(name)]
    load_strict(model, state, what=f"generator_ckpt {path}", allow_missing=references)
    new = [name for name in own if name not in state]
    if new and not any(is_reference_name(name) for name in state):
        model.reset_reference_parameters()  # key norms start as copies of the base's
    return {"loaded": sorted(state), "new": new}


def cast_base(model: nn.Module, dtype: torch.dtype) -> None:
    """Put the frozen base into `dtype`; time embedder, modulation tables and block norms stay float32, as in the
    library.
    """
    for name, parameter in model.named_parameters():
        if (
            not is_reference_name(name)
            and "lora_" not in name
            and not any(part in name.split(".") for part in _KEEP_FLOAT32)
        ):
            parameter.data = parameter.data.to(dtype)
