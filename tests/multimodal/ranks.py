"""Run on several ranks by the tests: the recorded losses, the gradient cache, and whole trainings.  ranks.py
CASES.json
"""

import json
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch  # noqa: E402
import torch.distributed as torch_dist  # noqa: E402

from multimodal import train, trainer  # noqa: E402
from multimodal.modules.contrastive import CachedStep, Pairing, contrastive_loss, total_loss  # noqa: E402
from shared.engine.dist import init_distributed  # noqa: E402
from tests.multimodal.golden import numbers, tensors  # noqa: E402
from tests.multimodal.small import shrink  # noqa: E402

PAIRINGS = [Pairing("x", "y", "s", "b", "p", 1.0)]


def golden(kind: str, case: str) -> dict:
    """This rank's loss and gradients of the recorded features."""
    data, facts = tensors("contrastive_loss"), numbers("contrastive_loss")
    rank, rows = torch_dist.get_rank(), slice(4 * torch_dist.get_rank(), 4 * torch_dist.get_rank() + 4)
    image, text = (data[f"{name}_features"][rows].clone().requires_grad_() for name in ("image", "text"))
    log_scale = torch.tensor(facts[f"log_logit_scale_{case}"], requires_grad=True)
    bias = torch.tensor(facts["logit_bias_siglip"], requires_grad=True)
    loss = contrastive_loss(kind, image, text, log_scale.exp(), bias)
    loss.backward()
    return {
        "rank": rank,
        "loss": loss.item(),
        "scale": log_scale.grad.item(),
        "bias": None if bias.grad is None else bias.grad.item(),
        "image": image.grad.tolist(),
        "text": text.grad.tolist(),
    }


class Toy(torch.nn.Module):
    """Two linear towers with dropout, in float64 so that only the method can differ."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.first, self.second = torch.nn.Linear(6, 5).double(), torch.nn.Linear(6, 5).double()
        self.scale = torch.nn.Parameter(torch.tensor([1.5], dtype=torch.float64))
        self.bias = torch.nn.Parameter(torch.tensor([-2.0], dtype=torch.float64))

    def forward(self, batch: tuple[torch.Tensor, torch.Tensor]) -> dict[str, torch.Tensor]:
        unit = torch.nn.functional.normalize
        return {
            "x": unit(self.first(batch[0]), dim=-1),
            "y": unit(self.second(torch.dropout(batch[1], 0.3, True)), dim=-1),
            "s": self.scale.exp().squeeze(),
            "b": self.bias.squeeze(),
        }


def cached_gradients(kind: str, cached: bool, duplicates: bool) -> dict[str, list[float]]:
    """Parameter gradients, averaged over ranks, of four micro-batches of three pairs, by the cache or as one batch."""
    rank, world = torch_dist.get_rank(), torch_dist.get_world_size()
    generator = torch.Generator().manual_seed(11)
    data = torch.randn(2, world * 12, 6, generator=generator, dtype=torch.float64)[:, rank * 12 : (rank + 1) * 12]
    labels = torch.arange(world * 12) // 2 if duplicates else torch.arange(world * 12)
    keys = [{"p": part[:, None].expand(-1, 2)} for part in labels[rank * 12 : (rank + 1) * 12].split(3)]
    batches = list(zip(data[0].split(3), data[1].split(3), strict=True))
    model = Toy()
    torch.manual_seed(100 + rank)
    if cached:
        step = CachedStep(lambda index: model(batches[index]), 4, kind, PAIRINGS, keys)
        for index in range(4):
            with step.replay(index):
                loss = step.surrogate(index, model(batches[index]))
            loss.backward()
    else:
        outputs = [model(batch) for batch in batches]
        merged = {name: torch.cat([o[name] for o in outputs]) for name in "xy"} | {
            name: outputs[0][name] for name in "sb"
        }
        total_loss(kind, PAIRINGS, merged, {"p": torch.cat([key["p"] for key in keys])})[0].backward()
    found = {}
    for name, parameter in model.named_parameters():
        gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()
        torch_dist.all_reduce(gradient)
        found[name] = (gradient / world).flatten().tolist()
    return found


def training(flags: list[str], micro_batch: int) -> None:
    """One run of train.py in which every second micro-batch, all of rank 1's on two ranks, misses the text in the
    fused pass.
    """
    own = trainer.Trainer._draws

    def draws(self, batch, inputs, step, shift=0):
        found = own(self, batch, inputs, step, shift)
        if self.stage == 3:
            found["image"]["pairs"][:, 2] = 1.0 - batch["image"]["slot"].div(micro_batch, rounding_mode="floor") % 2
        return found

    trainer.Trainer._draws = draws
    train.main(flags)
    trainer.Trainer._draws = own


def main() -> None:
    cases = json.loads(Path(sys.argv[1]).read_text())
    shrink()
    train.shutdown = lambda: None  # several runs in one process group
    info = init_distributed("cpu")
    torch.set_num_threads(1)
    for case in cases:
        if case["what"] == "training":
            training(case["flags"], case["micro_batch"])
            continue
        if case["what"] == "golden":
            found = golden(case["kind"], case["name"])
        else:
            found = {
                "rank": info.rank,
                **{
                    name: cached_gradients(case["kind"], cached, case["duplicates"])
                    for name, cached in (("cached", True), ("whole", False))
                },
            }
        Path(case["output"] + f".{info.rank}").write_text(json.dumps(found))
    if torch_dist.is_initialized():
        torch_dist.destroy_process_group()


if __name__ == "__main__":
    main()
