"""A toy run for the tests of shared/: a small transformer with keyed noise, dropout, a frozen layer and odd sizes.

As a script it runs a JSON list of cases one after another in one launch: python tests/shared/toy.py CASES.json
"""

import errno
import json
import os
import sys
import time
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch
import torch.distributed as dist
from torch import nn

from shared.config import RunSection, Section, TrainingSection, accumulation_steps
from shared.data import BatchPlan, MapStream
from shared.engine import checkpoint, preflight
from shared.engine.dist import init_distributed
from shared.engine.parallel import built_once
from shared.engine.strategy import ensure_group
from shared.errors import UserError, command
from shared.loop import fit
from shared.rng import keyed_randn

WIDTH, CLASSES = 33, 65


class Config(Section):
    run: RunSection = RunSection()
    training: TrainingSection = TrainingSection()


class Block(nn.Module):
    def __init__(self, dropout: float):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x):
        return x + self.dropout(self.down(torch.tanh(self.up(self.norm(x)))))


class Toy(nn.Module):
    """tied: head and table are one tensor. branches: each batch uses one of two; fixed_order runs both."""

    def __init__(self, dropout=0.0, tied=False, branches=None):
        super().__init__()
        self.table = nn.Embedding(CLASSES, WIDTH)
        self.frozen = nn.Linear(WIDTH, WIDTH).requires_grad_(False)
        self.blocks = nn.ModuleList(Block(dropout) for _ in range(2))
        self.head = nn.Linear(WIDTH, CLASSES, bias=not tied)
        self.register_buffer("calls", torch.zeros(3))
        if tied:
            self.head.weight = self.table.weight
        self.branches = branches
        if branches:
            self.branch_a, self.branch_b = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, tokens, noise, use_a=True):
        x = self.frozen(self.table(tokens)) + noise
        if self.branches == "fixed_order":
            x = x + float(use_a) * self.branch_a(x) + float(not use_a) * self.branch_b(x)
        elif self.branches == "divergent":
            x = x + (self.branch_a(x) if use_a else self.branch_b(x))
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class Tokens:
    fingerprint = "toy"

    def __init__(self, bad=(), mark=""):
        self.bad = set(bad)
        if mark:
            self.fingerprint = f"toy {mark}"

    def __len__(self):
        return 101

    def __getitem__(self, index):
        return self.sample(index, 0)

    def sample(self, index, epoch):
        from shared.errors import BadSample
        from shared.rng import keyed_generator

        if index in self.bad:
            raise BadSample(f"sample {index} is broken")
        return {"tokens": torch.randint(0, CLASSES, (6,), generator=keyed_generator(7, index, epoch)), "index": index}


def collate(items):
    return {
        "tokens": torch.stack([item["tokens"] for item in items]),
        "index": torch.tensor([item["index"] for item in items]),
    }


def losses(case):
    def hook(model, batches, step):
        for batch in batches:
            noise = 0.1 * keyed_randn((6, WIDTH), key=(5, 1, step), slots=batch["slot"])
            use_a = True if case.get("branches") is None else int(batch["slot"][0]) % 2 == 0
            logits = model(batch["tokens"], noise, use_a)
            loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), batch["tokens"][:, 1:].flatten())
            if step == case.get("hang_at") and dist.get_rank() == 1:
                launcher = os.getppid()
                while os.getppid() == launcher:  # not longer, or the test would leave a process behind
                    time.sleep(0.2)
                os._exit(1)
            if step == case.get("nan_at") and int(batch["slot"].min()) == 0:
                loss = loss * float("nan")
            yield loss / len(batches), {"first_index": batch["index"][0].float()}

    return hook


def validate(model, step):
    tokens = torch.arange(12).reshape(2, 6)
    logits = model(tokens.to(next(model.module.parameters()).device), torch.zeros(2, 6, WIDTH))
    return {"loss": nn.functional.cross_entropy(logits.flatten(0, 1).float(), tokens.flatten()), "draw": torch.rand(())}


def run_case(case, info):
    torch.manual_seed(3)
    kind = (case.get("dropout", 0.0), case.get("tied", False), case.get("branches"))
    model, values = Toy(*kind), None
    if case.get("once"):
        apart = case["once"] == "apart"  # nodes that do not share a disk: each builds its own
        folder = Path(case["output_dir"]) / f"disk{info.rank if apart else 0}"
        place = RunSection(strategy=case.get("strategy"), output_dir=str(folder))
        if info.rank and place.strategy == "fsdp" and not apart:
            next(model.parameters()).data.add_(1)  # which nobody asks for
        model = built_once(lambda first=model: first, place, info)
        assert info.rank or not folder.exists() or not any(folder.iterdir()), "the first weights were left behind"
    if case.get("meta"):
        values = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}.__getitem__
        with torch.device("meta"):
            model = Toy(*kind)
    own = case.get(f"rank_{info.rank}", {})  # what is other on this rank
    if "code" in own:
        preflight.code_digest = lambda config: own["code"]
    if "shift" in own:
        next(model.get_submodule(own["shift"]).parameters()).data.add_(1)
    training = {
        "batch_size": 2,
        "total_steps": 20,
        "learning_rate": 3e-3,
        "weight_decay": 0.01,
        "logging_steps": 1,
        "ema_decay": 0.9,
        "save_steps": None,
        "eval_steps": 10,
        **case.get("training", {}),
        **own.get("training", {}),
    }
    config = Config(
        run={
            "strategy": case.get("strategy"),
            "precision": "fp32",
            "device": "cpu",
            "output_dir": case["output_dir"],
            **({"seed": info.rank} if case.get("other_settings") else {}),
            **case.get("run", {}),
            **own.get("run", {}),
        },
        training=training,
    )
    plan = BatchPlan(101, config.training.batch_size, info.world, accumulation_steps(config.training, info.world), 11)
    stream = MapStream(
        Tokens(case.get("bad", ()), info.rank if case.get("other_data") else ""),
        plan,
        info,
        collate=collate,
        num_workers=case.get("num_workers", 0),
        bad_samples=Path(case["output_dir"]) / "bad_samples.jsonl",
    )
    return fit(
        config=config,
        info=info,
        model=model,
        stream=stream,
        losses=losses(case),
        validate=validate,
        wrap_classes=(Block, *case.get("units", ())),
        first_values=values,
    )


def full_disk(file):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), file.name)


def error_file(output_dir, rank):
    """Next to the run's folder, not in it: a refused run's first rank removes a folder that is still empty."""
    return Path(f"{output_dir}.error_{rank}.txt")


@command
def main(argv=None):
    cases = json.loads(Path((argv or sys.argv[1:])[0]).read_text())
    info = init_distributed("cpu", timeout_seconds=float(os.environ.get("TOY_TIMEOUT", 60)))
    ensure_group()
    for case in cases:
        if case.get("full_disk_of_rank") == info.rank:
            checkpoint.sync_file = full_disk
        try:
            run_case(case, info)
        except (RuntimeError, UserError, OSError) as error:
            if not case.get("expect"):
                raise
            error_file(case["output_dir"], info.rank).write_text(str(error))


if __name__ == "__main__":
    main()
