"""Frozen networks of diffusers and transformers by path."""

from typing import Any

from shared.errors import UserError


def whole(loader: Any, path: str, **arguments: Any) -> Any:
    """loader.from_pretrained(path), refused where its files lack a tensor: the libraries would fill it with random
    numbers and go on. Poolers are left out, as features and text states are read before them.
    """
    model, info = loader.from_pretrained(path, output_loading_info=True, **arguments)
    missing = sorted(name for name in info["missing_keys"] if "pooler" not in name)
    if missing:
        raise UserError(
            f"{path}: its files lack {len(missing)} tensors of {type(model).__name__} by this config.json, the first: "
            f"{missing[0]}; copy the folder again, or give the config.json that belongs to them"
        )
    return model
