"""Public weights into this model: official DiT and SiT files, diffusers' DiT, PixArt, and our own runs.

Official code and weights of DiT are CC-BY-NC 4.0 and stay so after conversion; SiT is MIT, PixArt Apache-2.0.
"""

import argparse
import json
import re
import sys
from pathlib import Path
from typing import NamedTuple

import torch
import yaml
from torch import Tensor, nn

from dit.model import DiTModel, timestep_sinusoid
from dit.modules.prx import PRXModel
from shared.engine.checkpoint import load_weights, read_weights_file
from shared.errors import UserError
from shared.media.folders import files_in

State = dict[str, Tensor]
BLOCK_PARTS = {
    "norm1.linear": "adaLN_modulation.1",
    "attn1.to_out.0": "attn.proj",
    "attn2.to_out.0": "cross_attn.proj",
    "attn2.to_q": "cross_attn.q",
    "ff.net.0.proj": "mlp.fc1",
    "ff.net.2": "mlp.fc2",
    "scale_shift_table": "scale_shift_table",
}
OTHER_PARTS = {
    "pos_embed.proj": "x_embedder.proj",
    "proj_out_1": "final_layer.adaLN_modulation.1",
    "proj_out_2": "final_layer.linear",
    "adaln_single.emb.timestep_embedder.linear_1": "t_embedder.mlp.0",
    "adaln_single.emb.timestep_embedder.linear_2": "t_embedder.mlp.2",
    "adaln_single.linear": "adaLN_single.1",
    "caption_projection.linear_1": "text_embedder.0",
    "caption_projection.linear_2": "text_embedder.2",
    "proj_out": "final_layer.linear",
}


class LoadReport(NamedTuple):
    """Tensor names: put into the model; of the model but not in the file; in the file but of no use here."""

    loaded: list[str]
    missing: list[str]
    unexpected: list[str]


def load_pretrained(
    model: DiTModel | PRXModel, path: str | Path, strict: bool = False, *, time_scale: float | None = None
) -> LoadReport:
    """Load what fits by name and shape, print the three lists, and fail when nothing fits (or, if strict, when
    anything is left; a PRX is always whole). time_scale: the flow's, which a run of ours must have been trained with.
    """
    path = Path(path)
    state = read_state(path)
    if isinstance(model, PRXModel):
        model.load(state, path)
        return LoadReport(sorted(state), [], [])
    check_pixart(path, state, model)
    state = to_official_names(fold_size_embedders(state, model))
    check_time(path, model, time_scale)
    state = fit_output_channels(state, model)
    compare_positions(state, model)
    own = model.state_dict()
    fits = {name: value for name, value in state.items() if name in own and own[name].shape == value.shape}
    report = LoadReport(
        sorted(fits), sorted(set(own) - set(fits) - {"pos_embed"}), sorted(set(state) - set(fits) - {"pos_embed"})
    )
    if not [name for name in fits if name != "pos_embed"]:
        raise UserError(
            f"{path}: not one tensor fits this model; it holds {_some(list(state))}; the model wants {_some(list(own))}"
        )
    if strict and (report.missing or report.unexpected):
        raise UserError(f"{path}: missing {_some(report.missing)}; unexpected {_some(report.unexpected)}")
    # assign on the meta device, where there is nothing to copy into: a full-size check of names without memory
    model.load_state_dict(fits, strict=False, assign=any(value.is_meta for value in own.values()))
    print(
        f"{path}: {len(report.loaded)} tensors loaded; missing {_some(report.missing)}; unexpected "
        f"{_some(report.unexpected)}",
        file=sys.stderr,
    )
    return report


def check_pixart(path: Path, state: State, model: DiTModel) -> None:
    """Refuse a PixArt whose positions are laid out otherwise: its config says by how much coordinates are divided."""
    if not any(name.startswith("adaln_single.") for name in state):
        return
    places = [place / "config.json" for place in (path / "transformer", path, path.parent)]
    found = next((place for place in places if place.is_file()), None)
    if found is None:
        if model.pos_scale == 1.0:
            print(
                f"warning: no config.json next to {path}: positions are those of PixArt-256 and -512 (a PixArt-1024 "
                "needs --pos-scale 0.5)",
                file=sys.stderr,
            )
        return
    config = json.loads(found.read_text(encoding="utf-8"))
    base = config["sample_size"] // config.get("patch_size", 2)
    divided = config.get("interpolation_scale") or max(config["sample_size"] // 64, 1)
    wanted = base / model.grid[0] / divided  # diffusers: grid / (grid_size / base_size) / interpolation_scale
    if "sincos" not in model.pos or abs(model.pos_scale - wanted) > 1e-9:
        raise UserError(
            f"{path}: its positions are coordinates times {wanted:g} for this size, the model's are {model.pos} times "
            f"{model.pos_scale:g}; set --pos sincos --pos-scale {wanted:g}"
        )


def fold_size_embedders(state: State, model: DiTModel) -> State:
    """PixArt-1024 adds vectors for the picture's size and aspect ratio to that of time. For pictures of one square size
    they are constants, and go into the last bias of the time embedder.
    """
    prefix = "adaln_single.emb."
    if f"{prefix}resolution_embedder.linear_1.weight" not in state:
        return state

    def embedded(name: str, values: list[float]) -> Tensor:
        rows = timestep_sinusoid(torch.tensor(values), state[f"{prefix}{name}.linear_1.weight"].shape[1])
        for layer in ("linear_1", "linear_2"):
            weight, bias = (state[f"{prefix}{name}.{layer}.{kind}"].float() for kind in ("weight", "bias"))
            rows = nn.functional.linear(rows, weight, bias)
            rows = nn.functional.silu(rows) if layer == "linear_1" else rows
        return rows.flatten()

    pixels = float(8 * model.patch_size * model.grid[0])  # PixArt's VAE has 8 pixels a cell
    size = torch.cat([embedded("resolution_embedder", [pixels, pixels]), embedded("aspect_ratio_embedder", [1.0])])
    folded = {
        name: value for name, value in state.items() if not re.search(r"emb\.(resolution|aspect_ratio)_emb", name)
    }
    bias = f"{prefix}timestep_embedder.linear_2.bias"
    folded[bias] = (folded[bias].float() + size).to(folded[bias].dtype)
    return folded


def read_state(path: Path) -> State:
    """The tensors of a file or folder; of an official training file the averaged ones."""
    if path.is_dir() and not (path / "manifest.json").exists() and not (path / "checkpoints").is_dir():
        places = [path / "transformer", path]
        found = [
            file for place in places for file in files_in(place, "diffusion_pytorch_model*.safetensors")
        ] or files_in(path, "*.safetensors")
        if not found:
            raise UserError(f"{path}: holds neither a run, nor a checkpoint, nor .safetensors files")
        return {name: value for file in found for name, value in read_weights_file(file).items()}
    if path.suffix in (".pt", ".pth", ".bin"):
        with torch.serialization.safe_globals(
            [argparse.Namespace]
        ):  # official files keep their arguments beside the weights
            return load_weights(path)
    return load_weights(path)


def to_official_names(state: State) -> State:
    """Names of diffusers' DiT and PixArt in the official ones; other states pass unchanged."""
    state = {name.removeprefix("module.").removeprefix("_orig_mod."): value for name, value in state.items()}
    if not any(name.startswith("transformer_blocks.") for name in state):
        return state
    is_pixart = any(name.startswith("adaln_single.") for name in state)
    renamed: State = {}
    for name, value in state.items():
        block = re.match(r"transformer_blocks\.(\d+)\.(.+)$", name)
        if block is None:
            renamed[_other_name(name)] = value
            continue
        number, rest = block.groups()
        if rest.startswith("norm1.emb."):  # the same embedders are stored in every block
            _keep_equal(renamed, _shared_embedder(rest), value, name)
            continue
        part, _, kind = rest.rpartition(".")
        part, kind = (rest, "") if rest == "scale_shift_table" else (part, f".{kind}")
        if part in BLOCK_PARTS:
            renamed[f"blocks.{number}.{BLOCK_PARTS[part]}{kind}"] = value
        elif not re.fullmatch(r"attn[12]\.to_[qkv]", part):
            renamed[name] = value
    _join_projections(state, renamed)
    if not is_pixart:
        print(
            "note: weights in diffusers' form; weights that were TRAINED with diffusers need model.time_freq_shift: "
            "1, converted official ones 0",
            file=sys.stderr,
        )
    return renamed


def fit_output_channels(state: State, model: DiTModel) -> State:
    """Keep the prediction and drop the learned variance where the model has no use for it.

    Row (row in patch, column in patch, channel) of the final layer: of 2C channels the first C are kept.
    """
    weight = state.get("final_layer.linear.weight")
    cells, channels = model.patch_size**2, model.in_channels
    if weight is None or model.out_channels != channels or len(weight) != cells * 2 * channels:
        return state
    state = dict(state)
    for name in ("final_layer.linear.weight", "final_layer.linear.bias"):
        rows = state[name].reshape(cells, 2 * channels, *state[name].shape[1:])
        state[name] = rows[:, :channels].flatten(0, 1).contiguous()
    return state


def compare_positions(state: State, model: DiTModel) -> None:
    """Warn when a file's position table is not the one computed here; the computed one is used."""
    table, own = state.pop("pos_embed", None), model.pos_embed
    if table is None or own is None:
        return
    if table.shape != own.shape:
        print(
            f"warning: the file's position table is for {table.shape[1]} tokens, the model has {own.shape[1]}; the "
            "computed one is used",
            file=sys.stderr,
        )
    elif not own.is_meta and not table.is_meta and (table - own.cpu()).abs().max() > 1e-4:
        print(
            "warning: the file's position table differs from the computed one by "
            f"{(table - own.cpu()).abs().max():.2e}; the file's is used",
            file=sys.stderr,
        )
        state["pos_embed"] = table
    else:
        state["pos_embed"] = table


def check_time(path: Path, model: DiTModel, time_scale: float | None) -> None:
    """Refuse a run of ours whose time scale or sinusoids differ from this model's."""
    folder = path if path.is_dir() else path.parent
    settings = next(
        (place / "config.yaml" for place in (folder, folder.parent) if (place / "config.yaml").is_file()), None
    )
    if settings is None:
        return
    tree = yaml.safe_load(settings.read_text(encoding="utf-8")) or {}
    scale, shift = tree.get("flow", {}).get("time_scale"), tree.get("model", {}).get("time_freq_shift")
    is_flow = tree.get("diffusion", {}).get("objective") == "flow"
    if is_flow and time_scale is not None and scale is not None and float(scale) != time_scale:
        raise UserError(
            f"{path} was trained with flow.time_scale {scale}, this run has {time_scale}; set --time-scale {scale}"
        )
    if shift is not None and int(shift) != model.t_embedder.freq_shift:
        raise UserError(f"{path} was trained with model.time_freq_shift {shift}; set --time-freq-shift {shift}")


def _other_name(name: str) -> str:
    part, _, kind = name.rpartition(".")
    if name == "scale_shift_table":
        return "final_layer.scale_shift_table"
    return f"{OTHER_PARTS[part]}.{kind}" if part in OTHER_PARTS else name


def _shared_embedder(rest: str) -> str:
    rest = rest.removeprefix("norm1.emb.")
    rest = rest.replace("timestep_embedder.linear_1", "t_embedder.mlp.0").replace(
        "timestep_embedder.linear_2", "t_embedder.mlp.2"
    )
    return rest.replace("class_embedder.embedding_table", "y_embedder.embedding_table")


def _keep_equal(renamed: State, name: str, value: Tensor, source: str) -> None:
    if name in renamed and not value.is_meta and not torch.equal(renamed[name], value):
        raise UserError(f"{source}: differs from the same embedder in block 0; the file is not a converted DiT")
    renamed.setdefault(name, value)


def _join_projections(state: State, renamed: State) -> None:
    """to_q, to_k, to_v -> qkv in self-attention; to_k, to_v -> kv in cross-attention."""
    for name in state:
        found = re.match(r"transformer_blocks\.(\d+)\.(attn[12])\.to_k\.(weight|bias)$", name)
        if found is None:
            continue
        number, attention, kind = found.groups()
        parts = [
            state[f"transformer_blocks.{number}.{attention}.to_{letter}.{kind}"]
            for letter in ("qkv" if attention == "attn1" else "kv")
        ]
        target = "attn.qkv" if attention == "attn1" else "cross_attn.kv"
        renamed[f"blocks.{number}.{target}.{kind}"] = torch.cat(parts)


def _some(names: list[str]) -> str:
    return f"{len(names)} ({', '.join(names[:4])}{', ...' if len(names) > 4 else ''})" if names else "none"
