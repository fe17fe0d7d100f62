"""Three hundred wrong commands: each must end with exit code 2 and one sentence, within seconds, and leave no file.

  python -m tests.survival.wrong_commands [--only dit launch] [--processes]
Seconds are the processor's, so that a busy machine changes nothing. --list prints the commands.
"""

import argparse
import os
import resource
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from tests import forking
from tests.launching import ENVIRONMENT, ROOT

SECONDS = 10.0
TRAINING = ("dit/train.py", "float/train.py", "bagel/train.py", "opens2v/train.py", "multimodal/train.py")
SYSTEMS = ("dit", "float", "bagel", "opens2v", "multimodal")
# In all of them OUT is a new folder, FILE a text file, EMPTY an empty folder, and *.yaml are made by broken_files().
SETTINGS = """
--config smal | --config nowhere.yaml | --config EMPTY | --config FILE | --config deep.yaml | --config twice.yaml
--config list.yaml | --config unknown.yaml | --config boolean.yaml | --config binary.yaml
--learning-rate abc | --learning-rate -1 | --learning-rate nan | --learning-rate | --learning-rat 1 | hello
--batch-size 0 | --batch-size 1.5 | --batch-size 99999999999999999999 | --total-steps 0 | --total-steps 1e3
--strategy ddpp | --strategy none --cpu-offload | --precision fp8 | --precision fp16 | --device tpu | --device cuda:7
--num-workers -1 | --num-workers 100000 | --seed -1 | --seed 99999999999999999999 | --keep-last -1 | --save-steps 0
--resume /nowhere/checkpoint | --resume EMPTY | --output-dir FILE | --output-dir FILE/below | --output-dir=
--set training.learning_rate | --set training.nothing=1 | --set =1 | --wandb | --time-limit-minutes 0 | --ema-decay 1.5
--lr-scheduler-type cosin | --batch-size 4 --global-batch-size 7 | --max-grad-norm -1 | --adam-beta1 1
--logging-steps 0
"""
GENERATING = """
--checkpoint /nowhere | --checkpoint EMPTY | --checkpoint FILE | --checkpoint broken.pt | --chekpoint EMPTY
--checkpoint EMPTY --device tpu
"""
MEASURING = "--checkpoint /nowhere | --checkpoint EMPTY | --checkpoint FILE | --chekpoint EMPTY | --checkpoint"
LAUNCHING = """
| dut | --gpus | --gpus x dit | --gpus 0 dit | --gpus -1 dit | --gpus 99999999999999999999 dit | --nodes 0 dit
--nodes 2 dit | --nodes 2 --master a:1 dit | --nodes 2 --node-rank 2 --master a:1 dit | --entry nothing.py dit
--nodes 2 --node-rank 0 --master host:abc dit | --nodes 2 --node-rank 0 --master :29500 dit | --max-restarts x dit
--nodes 2 --node-rank 0 --gpus 1 --master no.such.host.invalid:29500 dit
--nodes 2 --node-rank 0 --master host:99999 dit | --entry ../run_all.sh dit | --gpus 2 dit --learning-rat 1
--gpus 2 dit --config smal | --gpus 2 dit --config small --global-batch-size 7 --output-dir OUT
"""
OTHERS = [
    "-m shared.report.page /nowhere/report.json --output OUT/index.html",
    "-m shared.report.page FILE --output OUT/index.html",
    "-m shared.report.figure FILE --output OUT/figure.jpg",
    "-m shared.report.figure FILE --output OUT/figure.xyz",
    "-m shared.report.figure",
    "-m scripts.settings_reference nothing:Config --output OUT/page.md",
    "-m scripts.settings_reference dit.config:Nothing --output OUT/page.md",
    "dit/precompute.py --out FILE/below",
    "dit/precompute.py --config smal --out OUT",
    "float/precompute.py --autoencoder-path /nowhere --features-dir OUT",
    "float/train_autoencoder.py --config smal --output-dir OUT",
    "float/train_autoencoder.py --cpu-offload --output-dir OUT",
    "opens2v/precompute.py --config small --generator-ckpt /nowhere --cache-dir OUT",
    "multimodal/embed.py encode --checkpoint /nowhere --images EMPTY --output OUT/a.safetensors",
    "multimodal/embed.py search --checkpoint EMPTY --index FILE --query-text cat",
    "bagel/check_data.py --data-path /nowhere",
    "bagel/weights/export.py --checkpoint EMPTY --output OUT",
    "float/weights/released.py --checkpoint EMPTY --output OUT/float.pth",
    "dit/precompute.py --config small --shard-size 0 --out OUT",
    "multimodal/download_datasets.py --datasets nothing --data-root OUT",
    "multimodal/download_datasets.py --datasets coco --max-retries -1 --data-root OUT",
    "multimodal/weights/export.py --checkpoint EMPTY --output OUT",
    "multimodal/weights/export.py --checkpoint FILE --form onnx --output OUT",
    "opens2v/export.py --checkpoint EMPTY --output OUT",
    "opens2v/export.py --checkpoint FILE --output OUT",
    "opens2v/prepare.py --nothing 1",
    "float/prepare.py --data-root /nowhere --output-dir OUT",
    "float/prepare.py --data-root EMPTY --output-dir OUT",
    "bagel/check_data.py --data-path FILE",
    "bagel/check_data.py --data-path EMPTY",
    "multimodal/embed.py",
    "multimodal/embed.py nothing",
    "multimodal/embed.py page --index /nowhere --output OUT/a.html",
]
SCRIPTS = """
run_all.sh --output-dir FILE | run_all.sh --output-dir FILE/below | run_all.sh --output-dir ""
scripts/test.sh --nothing
run_all.sh --only nothing | run_all.sh --jobs 0 | run_all.sh --preset smal | run_all.sh --nothing | run_all.sh --gpus
run_all.sh --offline --output-dir OUT --max-steps x | run_all.sh --offline --output-dir OUT --gpus x
run_all.sh --offline --output-dir OUT --only dit --strategy ddpp | run_all.sh --offline --output-dir OUT --batch-size x
run_all.sh --offline --output-dir OUT --model-size huge | run_all.sh --offline --output-dir OUT --datasets nothing
scripts/bench.sh --nothing | scripts/bench.sh --system nothing | scripts/gpu_check.sh --nothing
scripts/demo.sh --nothing | scripts/setup_environment.sh --nothing
scripts/setup_environment.sh --python | scripts/setup_environment.sh --python FILE
scripts/train_dit.sh --gpus 2 --learning-rat 1 | scripts/train_opens2v.sh --gpus x
scripts/train_bagel.sh --gpus 2 --config smal | scripts/train_rectified_flow.sh --config smal
scripts/train_multimodal.sh --model-size huge
"""


class Wrong(NamedTuple):
    """A command line whose words OUT, FILE, EMPTY and the yaml names are replaced by paths."""

    group: str
    words: list[str]


def commands() -> list[Wrong]:
    """All of them."""
    found = []
    for script in TRAINING:
        for line in _lines(SETTINGS):
            words = shlex.split(line)
            preset = [] if "--config" in words else ["--config", "small"]
            output = [] if any(word.startswith("--output-dir") for word in words) else ["--output-dir", "OUT"]
            found.append(Wrong(script.split("/")[0], [sys.executable, script, *preset, *words, *output]))
    for system in SYSTEMS:
        for script, lines in (("generate", GENERATING), ("metrics", MEASURING)):
            for line in _lines(lines):
                words = [sys.executable, f"{system}/{script}.py", *shlex.split(line), "--output", "OUT/made.json"]
                found.append(Wrong(f"{system} {script}", words))
    launcher = str(ROOT / "scripts" / "launch.sh")
    found += [Wrong("launch", ["bash", launcher, *shlex.split(line)]) for line in _lines(LAUNCHING)]
    found += [Wrong("script", ["bash", *shlex.split(line)]) for line in _lines(SCRIPTS)]
    found += [Wrong(f"other {line.split()[0]}", [sys.executable, *shlex.split(line)]) for line in OTHERS]
    return found


def _lines(text: str) -> list[str]:
    parts = text.strip("\n").replace("\n", " | ").split("|")
    return [part.strip() for part in parts]


def broken_files(folder: Path) -> dict[str, str]:
    """What the names in the commands stand for; the files are made."""
    (folder / "empty").mkdir()
    texts = {
        "deep.yaml": "a: " + "[" * 20_000 + "]" * 20_000,
        "twice.yaml": "training:\n  batch_size: 2\n  batch_size: 3\n",
        "list.yaml": "- training\n",
        "unknown.yaml": "training:\n  batchsize: 2\n",
        "boolean.yaml": "run:\n  output_dir: yes\n",
        "broken.pt": "no weights",
        "file": "words\n",
    }
    for name, text in texts.items():
        (folder / name).write_text(text)
    (folder / "binary.yaml").write_bytes(bytes(range(256)))
    names = {name: str(folder / name) for name in (*texts, "binary.yaml")}
    return {**names, "FILE": str(folder / "file"), "EMPTY": str(folder / "empty")}


def fault_of(wrong: Wrong, folder: Path, names: dict[str, str], *, forked: bool) -> str:
    """What is wrong with how a wrong command ends; empty when it ends as it should."""
    out = folder / "out"
    words = [_replaced(word, {**names, "OUT": str(out)}) for word in wrong.words]
    before, cpu, began = _files(folder), _children(), time.monotonic()
    try:
        if forked and words[0] == sys.executable:
            done = forking.run(*words[1:], timeout=120)
        else:
            done = subprocess.run(words, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=120)
    except subprocess.TimeoutExpired:
        return "ran on for two minutes"
    seconds = min(_children() - cpu, time.monotonic() - began)
    faults = []
    if done.returncode != 2:
        faults.append(f"exit {done.returncode}")
    if "Traceback" in done.stderr:
        faults.append("traceback")
    if "error: " not in done.stderr:
        faults.append(f"no sentence ({done.stderr.strip()[-100:]!r})")
    if left := sorted(_files(folder) - before):
        faults.append(f"left {left[:3]}")
        for name in left:
            path = folder / name
            path.unlink() if path.is_file() else None
    if seconds > SECONDS:
        faults.append(f"{seconds:.0f} s")
    return ", ".join(faults)


def _replaced(word: str, names: dict[str, str]) -> str:
    for name, path in names.items():
        if word == name or word.startswith(f"{name}/"):
            return path + word[len(name) :]
    return word


def _files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir() or not any(path.iterdir())}


def _children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[], help="what the groups begin with, such as dit or launch")
    parser.add_argument("--list", action="store_true", help="print the commands and stop")
    parser.add_argument("--processes", action="store_true", help="an interpreter for each, not a fork of this one")
    options = parser.parse_args()
    chosen = [wrong for wrong in commands() if not options.only or wrong.group.startswith(tuple(options.only))]
    if options.list:
        print("\n".join(shlex.join(wrong.words) for wrong in chosen))
        return
    if not options.processes:
        forking.preload()
    missed, began = 0, time.monotonic()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(os.path.realpath(place))
        names = broken_files(folder)
        for wrong in chosen:
            if fault := fault_of(wrong, folder, names, forked=not options.processes):
                missed += 1
                print(f"MISSED | {shlex.join(wrong.words[1:])} | {fault}", flush=True)
    print(f"{len(chosen)} wrong commands, {missed} missed, {time.monotonic() - began:.0f} s")
    sys.exit(1 if missed else 0)


if __name__ == "__main__":
    main()
