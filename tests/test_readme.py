"""What the guides say exists: every named file, every command, every flag of it."""

import functools
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.launching import ENVIRONMENT, ROOT

GUIDES = [path for path in [*ROOT.glob("README*.md"), *ROOT.glob("*/README.md")] if "sample_data" not in path.parts]
SYSTEMS = ("float", "opens2v", "bagel", "dit", "multimodal")
LAUNCHER_FLAGS = {
    "--gpus",
    "--nodes",
    "--node-rank",
    "--master",
    "--max-restarts",
    "--entry",
    "--print-command",
    "--dry-run",
    "--help",
}
TRAIN_SCRIPTS = {
    "train_rectified_flow.sh": "float",
    "train_opens2v.sh": "opens2v",
    "train_bagel.sh": "bagel",
    "train_dit.sh": "dit",
    "train_multimodal.sh": "multimodal",
}


def commands(guide: Path) -> list[str]:
    """The commands in fenced shell blocks, continuation lines joined, comments and output left out."""
    found = []
    for block in re.findall(r"```(?:bash|sh|shell|console)\n(.*?)```", guide.read_text(encoding="utf-8"), re.DOTALL):
        text = re.sub(r"\\\n\s*", " ", block)
        found += [
            line.removeprefix("$ ").strip()
            for line in text.splitlines()
            if line.strip() and not line.strip().startswith("#")
        ]
    return found


CASES = [(guide, line) for guide in GUIDES for line in commands(guide)]


@functools.cache
def help_of(script: str) -> str:
    done = subprocess.run(
        [sys.executable, str(ROOT / script), "--help"], capture_output=True, text=True, env=ENVIRONMENT, timeout=120
    )
    assert done.returncode == 0, f"{script} --help ends with {done.returncode}: {done.stderr[-500:]}"
    return done.stdout


def check_flags(script: str, words: list[str], known: set[str] = frozenset()) -> None:
    text = help_of(script)
    for word in words:
        flag = word.split("=")[0]
        if "- and _ are alike in all flags" in text:
            flag = flag.replace("_", "-")
        if flag.startswith("--") and flag not in known:
            assert re.search(rf"(?<![\w-]){re.escape(flag)}(?![\w-])", text), f"{script} has no {flag}"


@pytest.mark.parametrize(
    "guide, line", CASES, ids=[f"{guide.parent.name}-{number}" for number, (guide, _) in enumerate(CASES)]
)
def test_the_command_exists_and_knows_its_flags(guide, line):
    words = shlex.split(line, comments=True)
    while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
        words.pop(0)
    if not words or words[0] in ("cd", "git", "pip", "source", "export", "tensorboard", "unzip", "mkdir", "ls"):
        return
    scripts = [word for word in words if word.endswith((".py", ".sh")) and not word.startswith("--")]
    module = words[words.index("-m") + 1] if "-m" in words else None
    if module and not scripts and module.split(".")[0] in (*SYSTEMS, "shared"):
        scripts = [module.replace(".", "/") + ".py"]
    if not scripts:
        assert words[0] in ("python", "torchrun", "deepspeed", "bash"), f"{guide}: what is {words[0]}?"
        return
    name = scripts[0].removeprefix("./")
    path = ROOT / name if (ROOT / name).exists() else guide.parent / name
    assert path.exists(), f"{guide.name} names {name}, which does not exist"
    rest = words[words.index(scripts[0]) + 1 :] if scripts[0] in words else words
    relative = str(path.relative_to(ROOT))
    if path.name in TRAIN_SCRIPTS:
        check_flags(f"{TRAIN_SCRIPTS[path.name]}/train.py", rest, LAUNCHER_FLAGS)
    elif path.name == "launch.sh":
        system = next(word for word in rest if word in SYSTEMS)
        check_flags(f"{system}/train.py", rest, LAUNCHER_FLAGS)
    elif path.suffix == ".py":
        check_flags(relative, rest)
    else:
        text = subprocess.run(["bash", str(path), "--help"], capture_output=True, text=True, timeout=60).stdout
        assert all(word.split("=")[0] in text for word in rest if word.startswith("--")), (
            f"{relative} does not know all of {rest}"
        )


@pytest.mark.parametrize("guide", GUIDES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_every_linked_file_exists(guide):
    for target in re.findall(r"\]\(([^)#]+)\)", guide.read_text(encoding="utf-8")):
        if not target.startswith(("http", "mailto:")):
            assert (guide.parent / target).exists(), f"{guide} links {target}"


@pytest.mark.parametrize("guide", ["README.md", "README.zh-CN.md"])
def test_the_tree_has_a_line_for_every_file(guide):
    text = (ROOT / guide).read_text(encoding="utf-8")
    section = next(part for part in text.split("\n## ") if "\nshared/ " in part)
    named, folder = set(), ""
    for line in section.split("```")[1].strip("\n").splitlines():
        name = line.split()[0]
        folder = name if not line.startswith(" ") else folder
        named.add(f"{folder}{name}" if line.startswith(" ") else name)
    folders = [ROOT / name for name in (*SYSTEMS, "shared")]
    files = {path for folder in folders for path in folder.glob("*.py") if path.name != "__init__.py"}
    files |= {path for path in (ROOT / "scripts").iterdir() if path.is_file()}
    found = {path.relative_to(ROOT).as_posix() for path in files}
    listed = {
        name for name in named if name.split("/")[0] in (*SYSTEMS, "shared", "scripts") and not name.endswith("/")
    }
    assert found == listed
