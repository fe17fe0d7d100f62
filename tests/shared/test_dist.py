"""What a user can cause on several ranks ends each with exit code 2, and only after it has left the group: gloo's
threads, left to the end of the interpreter, abort one process in ten. All ranks collect
garbage together, and threads beside the training leave it the cores.
"""

import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from shared.data import ReadAhead
from shared.engine.checkpoint import CheckpointStore
from shared.engine.dist import DistInfo
from tests.launching import ENVIRONMENT, ROOT

REFUSED = f"""
import atexit, sys
sys.path[0] = {str(ROOT)!r}
import torch.distributed
atexit.register(lambda: print("in a group:", torch.distributed.is_initialized()))  # handlers run last to first
from shared.engine.dist import init_distributed, same_on_all_ranks
from shared.errors import command

@command
def main(argv=None):
    info = init_distributed("cpu", 60)
    same_on_all_ranks(info.rank, "settings")

main()
"""

LITTERING = f"""
import gc, sys
sys.path[0] = {str(ROOT)!r}
from shared.engine.dist import init_distributed
from tests.shared import toy

now, collected, losses = [None], set(), toy.losses
gc.callbacks.append(lambda phase, _: collected.add(now[0]))

def littering(case):
    def hook(model, batches, step):
        now[0] = step
        for _ in range(3000):
            litter = []
            litter.append(litter)
        yield from losses(case)(model, batches, step)
    return hook

toy.losses = littering
training = {{"total_steps": 100, "eval_steps": None, "save": False}}
toy.run_case({{"output_dir": sys.argv[1], "strategy": "ddp", "training": training}}, init_distributed("cpu", 60))
print(sorted(collected - {{None}}), gc.isenabled())
"""


def on_two_ranks(script: str, folder: Path) -> list[tuple[int, str, str]]:
    """(exit code, output, errors) of every rank."""
    path = folder / "script.py"
    path.write_text(script)
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        place = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(found.getsockname()[1])}
    ranks = [
        subprocess.Popen(
            [sys.executable, path, folder / "run"],
            env={**ENVIRONMENT, **place, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    said = [rank.communicate(timeout=100) for rank in ranks]
    return [(rank.returncode, *texts) for rank, texts in zip(ranks, said, strict=True)]


@pytest.mark.distributed
def test_a_refusal_leaves_the_group_and_is_exit_code_two(tmp_path):
    for code, output, errors in on_two_ranks(REFUSED, tmp_path):
        assert code == 2 and "rank 1 has other settings than rank 0" in errors, errors
        assert output == "in a group: False\n"


@pytest.mark.distributed
def test_no_rank_collects_garbage_at_a_moment_of_its_own(tmp_path):
    for code, output, errors in on_two_ranks(LITTERING, tmp_path):
        assert code == 0 and output.splitlines()[-1] == "[49, 99] True", output + errors


class Cores:
    """A stream whose samples say on how many cores the thread that reads them calculates."""

    def next_step(self):
        return [torch.tensor(torch.get_num_threads())]

    def state(self):
        return {}

    def close(self):
        pass


def test_what_runs_beside_the_training_calculates_on_one_core_and_leaves_it_the_others(tmp_path):
    before, seen = torch.get_num_threads(), []
    torch.set_num_threads(2)
    try:
        ahead = ReadAhead(Cores(), torch.device("cpu"))
        store = CheckpointStore(tmp_path, DistInfo())
        seen.append(int(ahead.next_step()[0]))
        tensors = {"w.safetensors": ([("w", (3,), torch.float32)], [torch.zeros(3)])}
        store.save(
            "step_1", step=1, trainer={}, meta={}, tensors=tensors, background=True,
            extra=lambda folder: seen.append(torch.get_num_threads()),
        )  # fmt: skip
        store.wait()
        ahead.close()
        with ThreadPoolExecutor(1) as later:
            seen += [torch.get_num_threads(), later.submit(torch.get_num_threads).result()]
    finally:
        torch.set_num_threads(before)
    assert seen == [1, 1, 2, 2]
