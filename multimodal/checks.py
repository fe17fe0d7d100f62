"""Arguments of the model's forward: a ValueError names what does not fit."""

from torch import Tensor


def check_image(images: Tensor, patch: int) -> None:
    """Pictures (B, 3, H, W) whose sides the patch divides."""
    if images.ndim != 4 or images.shape[1] != 3 or images.shape[2] % patch or images.shape[3] % patch:
        raise ValueError(
            f"images: expected (batch, 3, height, width) in multiples of {patch}, found {tuple(images.shape)}"
        )


def check_batch(**inputs: Tensor | None) -> None:
    """At least one input, all of one batch size."""
    given = {name: len(value) for name, value in inputs.items() if value is not None}
    if not given:
        raise ValueError(f"at least one of {', '.join(inputs)} is needed")
    first = next(iter(given))
    for name, size in given.items():
        if size != given[first]:
            raise ValueError(f"{name} has batch size {size}, {first} has {given[first]}; they must be equal")


def check_mask(name: str, mask: Tensor | None, of: str, value: Tensor | None) -> None:
    """A mask belongs to an input and has its first two sizes."""
    if mask is None:
        return
    if value is None:
        raise ValueError(f"{name} is given without {of}")
    if mask.shape != value.shape[:2]:
        raise ValueError(f"{name} has shape {tuple(mask.shape)}, {of} wants {tuple(value.shape[:2])}")


def check_modality_mask(masks: dict[str, Tensor] | None, given: dict[str, Tensor | None]) -> None:
    """One bool a sample for inputs that are given."""
    for name, mask in (masks or {}).items():
        if name not in given:
            raise ValueError(f"modality_mask names {name!r}; known are {', '.join(given)}")
        if given[name] is None:
            raise ValueError(f"modality_mask names {name!r}, which is not given")
        if mask.shape != given[name].shape[:1]:
            raise ValueError(
                f"modality_mask[{name!r}] has shape {tuple(mask.shape)}, expected {tuple(given[name].shape[:1])}"
            )
