"""Parameter groups by name, AdamW and Muon."""

from typing import Any

import torch
from torch import Tensor, nn

from shared.config import TrainingSection
from shared.engine.products import linear


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


class MuonWithAdamW(FusedAdamW):
    """Muon (Jordan et al. 2024) for the matrices of groups that have "muon", AdamW for the rest.

    "muon" is in how many matrices, one below the other, the rows are cut (3 for queries, keys and values in one). The
    momentum (Nesterov's, 0.95) lies in exp_avg, so that checkpoints and averages need to know nothing of it; exp_avg_sq
    stays zero. Like the fused kernel it divides by grad_scale and leaves a step out by found_inf, on the device. It
    turns whole matrices, so that it works only where a rank holds them whole.
    """

    momentum, steps, coefficients = 0.95, 5, (3.4445, -4.7750, 2.0315)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # no closure is used here
        """One step of all groups."""
        every = self.param_groups
        for group in every:
            if group.get("muon"):
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        self._turn(parameter, group)
        self.param_groups = [group for group in every if not group.get("muon")]
        try:
            super().step()
        finally:
            self.param_groups = every

    def _turn(self, parameter: nn.Parameter, group: dict) -> None:
        state = self.state[parameter]
        if "step" not in state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        assert parameter.grad is not None
        left_out = self.found_inf if self.found_inf is not None else torch.zeros((), device=parameter.device)
        kept = 1.0 - left_out
        gradient = parameter.grad if self.grad_scale is None else parameter.grad / self.grad_scale
        gradient = torch.where(left_out > 0, torch.zeros_like(gradient), gradient)
        buffer = state["exp_avg"]
        buffer.lerp_(gradient, (1 - self.momentum) * kept)
        update = gradient.lerp(buffer, self.momentum)
        parts = [orthogonalised(part, self.steps, self.coefficients) for part in update.chunk(group["muon"])]
        rows, columns = parts[0].shape
        rate = group["lr"] * max(1.0, rows / columns) ** 0.5
        parameter.mul_(1 - group["lr"] * group["weight_decay"] * kept)
        parameter.sub_(torch.cat(parts) * (rate * kept))
        state["step"] += kept


def orthogonalised(matrix: Tensor, steps: int, coefficients: tuple[float, float, float]) -> Tensor:
    """About U V^T of the matrix's singular value decomposition, by Newton-Schulz iterations of fifth order."""
    a, b, c = coefficients
    x = matrix.bfloat16() if matrix.is_cuda else matrix.float()
    x = x.mT if matrix.shape[0] > matrix.shape[1] else x
    x = x / x.norm().clamp_min(1e-7)
    for _ in range(steps):
        gram = linear(x, x)  # symmetric, as is its square
        x = a * x + linear(b * gram + c * linear(gram, gram), x.mT)
    return (x.mT if matrix.shape[0] > matrix.shape[1] else x).to(matrix.dtype)


FusedOptimizer = FusedAdamW | FusedAdam | FusedSGD


def adamw(groups: list[dict], parameters: dict[str, nn.Parameter], training: TrainingSection) -> FusedOptimizer:
    """AdamW (Loshchilov and Hutter 2019) over named groups, or what training.optimizer names of adamw, adam and sgd;
    fused, which is fastest on CPU and CUDA alike. Groups with "muon" are turned by MuonWithAdamW.
    """
    lists = [
        {
            "params": [parameters[name] for name in group["names"]],
            "weight_decay": group["weight_decay"],
            "lr_scale": group["lr_scale"],
            **({"muon": group["muon"]} if "muon" in group else {}),
        }
        for group in groups
        if group["names"]
    ]
    if training.optimizer == "sgd":
        return FusedSGD(lists, lr=training.learning_rate, fused=True)
    kind: type[FusedAdamW] | type[FusedAdam] = FusedAdam if training.optimizer == "adam" else FusedAdamW
    if any("muon" in group for group in groups):
        kind = MuonWithAdamW
    return kind(
        lists,
        lr=training.learning_rate,
        betas=(training.adam_beta1, training.adam_beta2),
        eps=training.adam_epsilon,
        fused=True,
    )


def __getattr__(name: str) -> Any:
    """`from shared.optim import lr_at`: it stands beside the loop that sets the rate."""
    if name == "lr_at":
        from shared.loop import lr_at

        return lr_at
    raise AttributeError(name)


ZERO_STAYS_GATHERED = 10**9  # numbers of a model that ZeRO-3 keeps from the forward to the backward


def zero_bucket(trainable: int) -> int:
    """Numbers that ZeRO reduces, or gathers, at a time: even, as DeepSpeed wants them."""
    return min(trainable + trainable % 2, 50_000_000)
