"""What a user can cause on several ranks ends each with exit code 2, and only after it has left the group: gloo's
threads, left to the end of the interpreter, abort one process in ten.
"""

import socket
import subprocess
import sys

import pytest

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


@pytest.mark.distributed
def test_a_refusal_leaves_the_group_and_is_exit_code_two(tmp_path):
    script = tmp_path / "refused.py"
    script.write_text(REFUSED)
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        place = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(found.getsockname()[1])}
    ranks = [
        subprocess.Popen(
            [sys.executable, script],
            env={**ENVIRONMENT, **place, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    for rank in ranks:
        output, errors = rank.communicate(timeout=100)
        assert rank.returncode == 2 and "rank 1 has other settings than rank 0" in errors, errors
        assert output == "in a group: False\n"
