"""The guide's checkpoint files: one dict of tensors and plain values that torch.load reads with weights_only=True."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from multimodal.config import Config
from multimodal.data.text import TextTokenizer
from multimodal.model import MultimodalModel, create_model
from shared.config import validate
from shared.engine.checkpoint import CheckpointStore, load_strict, read_weights_file
from shared.errors import UserError, write_text, written_aside

FORMAT_VERSION = 1
NAMES = ("best_model.pt", "final_model.pt")


def save_aside(payload: dict[str, Any], path: Path) -> None:
    """Write to a temporary name, sync, rename: what is visible is whole."""
    with written_aside(path) as temporary, open(temporary, "wb") as file:
        torch.save(payload, file)
        file.flush()
        os.fsync(file.fileno())


def put(source: Path, target: Path) -> None:
    """Let `target` be the same file as `source` (a hard link where the file system has them), replacing it whole."""
    with written_aside(target) as temporary:
        temporary.unlink(missing_ok=True)
        try:
            os.link(source, temporary)
        except OSError:
            shutil.copyfile(source, temporary)


def checkpoint_file(path: Path | str) -> Path:
    """The file that a user means by OUT (its best model), a checkpoint folder or a .pt file."""
    path = Path(path)
    if path.is_dir():
        places = [path / "model.pt", *(path / "checkpoints" / name for name in NAMES), *(path / name for name in NAMES)]
        file = next((place for place in places if place.exists()), None)
        if file is None:
            raise UserError(f"{path}: holds no best_model.pt or final_model.pt; give a run's folder or a .pt file")
        return file
    if not path.exists():
        raise UserError(f"--checkpoint {path}: no such file or folder")
    return path


def read_payload(path: Path | str) -> tuple[dict[str, Any], Path]:
    """The dict of a checkpoint, and the file read."""
    file = checkpoint_file(path)
    payload = read_weights_file(file)
    wanted = "a checkpoint of multimodal/train.py is wanted"
    if not isinstance(payload, dict) or "model_state_dict" not in payload or "model_config" not in payload:
        raise UserError(f"{file}: holds no model_state_dict and model_config; {wanted}")
    for name, kind in _KINDS.items():
        if not isinstance(payload.get(name), kind):
            found = "is missing" if name not in payload else f"is {type(payload[name]).__name__}, not {kind.__name__}"
            raise UserError(f"{file}: its {name} {found}; {wanted}")
    if payload["stage"] not in (1, 2, 3):
        raise UserError(f"{file}: of stage {payload['stage']}, and there are 1, 2 and 3; {wanted}")
    if not all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in payload["model_state_dict"].items()
    ):
        raise UserError(f"{file}: its model_state_dict holds other things than named tensors; {wanted}")
    return payload, file


# What every reader asks of a checkpoint; other systems' files have some of these names with other contents.
_KINDS = {
    "model_state_dict": dict,
    "model_config": dict,
    "config": dict,
    "stage": int,
    "epoch": int,
    "tokenizer_sha256": str,
}
_TRAINING = (
    *("optimizer_state_dict", "trainer_state", "trained_state_dict", "trained_names", "pretrain_state_dict"),
    *("training_state", "stage_step"),
)


def missing_for_training(payload: dict[str, Any]) -> list[str]:
    """What a checkpoint lacks that a run needs to go on from it alone."""
    return [name for name in _TRAINING if name not in payload]


def unpack_training(payload: dict[str, Any], store: CheckpointStore, frozen: str | None) -> Path:
    """A checkpoint folder that the loop resumes from, out of a checkpoint_epoch_N.pt of another run; a collective.

    frozen: the digest of what this stage does not train, taken from the same file.
    """
    trainer = json.loads(json.dumps(payload["trainer_state"]))
    trainer["run_state"] |= {"best": None, "best_name": None}  # the best one stayed behind
    weights = payload["trained_state_dict"] or {
        **{f"network.{name}": value for name, value in payload["model_state_dict"].items()},
        **payload["pretrain_state_dict"],
    }
    parts = {"model.safetensors": {name: weights[name] for name in payload["trained_names"]}}
    if payload["trained_state_dict"]:
        averaged = {f"network.{name}": value for name, value in payload["model_state_dict"].items()}
        averaged |= payload["pretrain_state_dict"]
        parts["ema.safetensors"] = {name: averaged[name] for name in payload["trained_names"]}
    parts["optimizer.safetensors"] = payload["optimizer_state_dict"]

    def extra(folder: Path) -> None:
        write_text(folder / "config.yaml", yaml.safe_dump(payload["config"], sort_keys=False, allow_unicode=True))
        more = ("optimizer_state_dict", "trainer_state", "trained_state_dict", "trained_names")
        save_aside({name: value for name, value in payload.items() if name not in more}, folder / "model.pt")

    return store.save(
        payload["training_state"].rpartition("/")[2],
        step=payload["stage_step"],
        trainer=trainer,
        tensors={
            file: ([(name, tuple(v.shape), v.dtype) for name, v in own.items()], iter(own.values()))
            for file, own in parts.items()
        },
        meta={"frozen_sha256": frozen, "unpacked": True},
        extra=extra,
    )


def build(model_config: dict[str, Any], file: Path) -> MultimodalModel:
    """The model that a checkpoint's model_config describes."""
    settings = dict(model_config)
    try:
        return create_model(settings.pop("size"), settings.pop("num_classes"), **settings)
    except (KeyError, TypeError, ValueError) as error:
        said = f"has no {error}" if isinstance(error, KeyError) else error
        raise UserError(f"{file}: its model_config describes no model of this version ({said})") from None


def load_model(
    path: Path | str, tokenizer_file: str | None = None
) -> tuple[MultimodalModel, TextTokenizer, dict[str, Any]]:
    """A trained model in eval mode, its tokenizer and its payload. Another tokenizer than the one trained with is
    refused.
    """
    payload, file = read_payload(path)
    config = validate(Config, payload["config"], f"the settings in {file}")
    tokenizer = TextTokenizer(tokenizer_file or config.tokenizer, config.model.max_text_length)
    if tokenizer.sha256 != payload["tokenizer_sha256"]:
        raise UserError(
            f"{file} was trained with another tokenizer (SHA-256 {payload['tokenizer_sha256'][:12]}, {tokenizer.path} "
            f"has {tokenizer.sha256[:12]}); give the same with --tokenizer"
        )
    network = build(payload["model_config"], file)
    load_strict(network, payload["model_state_dict"], what=str(file))
    return network.eval(), tokenizer, payload


def load_start(network: MultimodalModel, path: str, tokenizer: TextTokenizer, *, reset_head: bool) -> None:
    """--init-from: weights of another run. A classifier of another size is refused, or left out with reset_head."""
    payload, file = read_payload(path)
    if payload["tokenizer_sha256"] != tokenizer.sha256:
        raise UserError(f"--init-from {file}: trained with another tokenizer; give the same with --tokenizer")
    state: dict[str, Tensor] = payload["model_state_dict"]
    own = network.state_dict()
    head = [
        name
        for name in state
        if name.startswith("classifier.") and name in own and own[name].shape != state[name].shape
    ]
    if head and not reset_head:
        raise UserError(
            f"--init-from {file}: its classifier has {payload['model_config']['num_classes']} classes, this run "
            f"{network.config['num_classes']}; add --reset-head to start the classifier from fresh weights"
        )
    if head:
        state = {name: value for name, value in state.items() if not name.startswith("classifier.")}
    load_strict(network, state, what=str(file), allow_missing=("classifier.",) if head else ())
