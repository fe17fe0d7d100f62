"""Parameter groups by name, AdamW, and the learning rate as a pure function of the step."""

import math

import torch
from torch import Tensor, nn

from shared.config import TrainingSection


def decay_groups(model: nn.Module, weight_decay: float, lr_scales: dict[str, float] | None = None) -> list[dict]:
    """Trainable parameters as groups {names, weight_decay, lr_scale}; vectors and scalars (norms, biases) get no decay.

    lr_scales: name prefix -> factor on the learning rate; the longest prefix that fits counts.
    """
    groups: dict[tuple[float, float], list[str]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            scales = lr_scales or {}
            prefix = max((p for p in scales if name.startswith(p)), key=len, default=None)
            scale = 1.0 if prefix is None else scales[prefix]
            groups.setdefault((weight_decay if parameter.ndim > 1 else 0.0, scale), []).append(name)
    return [{"names": names, "weight_decay": decay, "lr_scale": scale} for (decay, scale), names in groups.items()]


class FusedAdamW(torch.optim.AdamW):
    """torch's fused AdamW with the two attributes that its step() looks for, as GradScaler sets them.

    Both are read on the device by the fused kernel: gradients are divided by grad_scale, and where found_inf is not
    zero the whole step is left out. So clipping and skipping cost neither a pass over the gradients nor a wait.
    """

    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None


class FusedAdam(torch.optim.Adam):
    """torch's fused Adam, whose weight decay is a part of the gradient; attributes as FusedAdamW's."""

    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None


class FusedSGD(torch.optim.SGD):
    """torch's fused SGD without momentum, so without state; attributes as FusedAdamW's."""

    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None


FusedOptimizer = FusedAdamW | FusedAdam | FusedSGD


def adamw(groups: list[dict], parameters: dict[str, nn.Parameter], training: TrainingSection) -> FusedOptimizer:
    """AdamW (Loshchilov and Hutter 2019) over named groups, or what training.optimizer names of adamw, adam and sgd;
    fused, which is fastest on CPU and CUDA alike.
    """
    lists = [
        {
            "params": [parameters[name] for name in group["names"]],
            "weight_decay": group["weight_decay"],
            "lr_scale": group["lr_scale"],
        }
        for group in groups
        if group["names"]
    ]
    if training.optimizer == "sgd":
        return FusedSGD(lists, lr=training.learning_rate, fused=True)
    kind = FusedAdam if training.optimizer == "adam" else FusedAdamW
    return kind(
        lists,
        lr=training.learning_rate,
        betas=(training.adam_beta1, training.adam_beta2),
        eps=training.adam_epsilon,
        fused=True,
    )


def lr_at(step: int, training: TrainingSection, total_steps: int) -> float:
    """The learning rate of optimizer step `step`, counted from 0.

    Warm-up: peak (step + 1) / warmup. Then, with p the share of the rest that is done: constant 1, linear 1 - p,
    cosine (1 + cos pi p) / 2, wsd 1 until p = 0.8 and linear to 0 after it; scaled so that it ends at min_lr_ratio.
    """
    peak, warmup = training.learning_rate, training.warmup_steps
    if step < warmup:
        return peak * (step + 1) / warmup
    done = min(1.0, (step - warmup) / max(1, total_steps - warmup))
    shape = {
        "constant": 1.0,
        "linear": 1 - done,
        "cosine": (1 + math.cos(math.pi * done)) / 2,
        "wsd": min(1.0, (1 - done) / 0.2),
    }[training.lr_scheduler_type]
    return peak * (training.min_lr_ratio + (1 - training.min_lr_ratio) * shape)
