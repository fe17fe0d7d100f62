"""What the guides say exists: every named file and folder, every command, every flag and preset of it."""

import functools
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.launching import ENVIRONMENT, ROOT

SYSTEMS = ("float", "opens2v", "bagel", "dit", "multimodal")
GUIDES = [*ROOT.glob("*.md"), *(path for name in SYSTEMS for path in (ROOT / name).glob("*.md"))]
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
WITH_SUBCOMMANDS = ("multimodal/embed.py",)
STARTS = ("python ", "bash ", "torchrun ", "sbatch ", "deepspeed ", "./")
OTHER_PROGRAMS = (
    "cd",
    "git",
    "pip",
    "source",
    "export",
    "tensorboard",
    "unzip",
    "mkdir",
    "ls",
    "docker",
    "kubectl",
    "cp",
)


def commands(guide: Path) -> list[str]:
    """The guide's commands: fenced shell blocks, indented blocks, and inline code that starts with a program's name.

    Continuation lines are joined; comments and output are left out.
    """
    found, text = [], guide.read_text(encoding="utf-8")
    blocks = re.findall(r"```(?:bash|sh|shell|console)\n(.*?)```", text, re.DOTALL)
    rest = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    blocks += re.findall(r"(?:^    .*\n?)+", rest, re.MULTILINE)
    for block in blocks:
        lines = re.sub(r"\\\n\s*", " ", block).splitlines()
        fenced = not block.startswith("    ")
        found += [
            line.strip().removeprefix("$ ")
            for line in lines
            if line.strip() and not line.strip().startswith("#") and (fenced or line.strip().startswith(STARTS))
        ]
    inline = re.findall(r"`((?:python|bash|torchrun|sbatch) [^`]+)`", rest)
    return found + [" ".join(line.split()) for line in inline]


CASES = [(guide, line) for guide in GUIDES for line in dict.fromkeys(commands(guide))]


@functools.cache
def help_of(script: str, *subcommand: str) -> str:
    module = script.removesuffix(".py").replace("/", ".")
    how = ["-m", module] if script.startswith(("shared", "scripts", "tests")) else [str(ROOT / script)]
    done = subprocess.run(
        [sys.executable, *how, *subcommand, "--help"],
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
        timeout=120,
        cwd=ROOT,
    )
    assert done.returncode == 0, f"{script} --help ends with {done.returncode}: {done.stderr[-500:]}"
    return done.stdout


def check_flags(script: str, words: list[str], known: set[str] | frozenset = frozenset()) -> None:
    text = help_of(script, *(words[:1] if script in WITH_SUBCOMMANDS else ()))
    for word in words:
        flag = word.split("=")[0]
        if flag.startswith("--") and flag not in known:
            spelled = re.escape(flag.replace("_", "-"))  # - and _ are alike in all flags
            assert re.search(rf"(?<![\w-]){spelled}(?![\w-])", text.replace("_", "-")), f"{script} has no {flag}"
    check_preset(script, words)


def check_preset(script: str, words: list[str]) -> None:
    """A preset that is named by --config must lie in the system's configs, unless it is a file of the reader's."""
    system = script.split("/")[0]
    if system not in SYSTEMS or "--config" not in words[:-1]:
        return
    given = words[words.index("--config") + 1]
    if given.isupper() or "|" in given or "/" in given or given.endswith((".yaml", ".yml", ".json")):
        return
    folder = ROOT / system / "configs"
    presets = {path.stem for path in folder.rglob("*.yaml")} | {path.name for path in folder.iterdir() if path.is_dir()}
    assert given in presets, f"{script}: no preset {given}; there are {sorted(presets)}"


@pytest.mark.parametrize(
    "guide, line", CASES, ids=[f"{guide.parent.name}-{guide.stem}-{number}" for number, (guide, _) in enumerate(CASES)]
)
def test_the_command_exists_and_knows_its_flags(guide, line):
    words = shlex.split(line, comments=True)
    while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
        words.pop(0)
    words = [word for word in words if word != "..."]
    if not words or words[0] in OTHER_PROGRAMS:
        return
    scripts = [word for word in words if word.endswith((".py", ".sh")) and not word.startswith("--")]
    module = words[words.index("-m") + 1] if "-m" in words else None
    if module and not scripts and module.split(".")[0] in (*SYSTEMS, "shared", "scripts", "tests"):
        place = module.replace(".", "/")
        scripts = [f"{place}/__main__.py" if (ROOT / place).is_dir() else f"{place}.py"]
    if not scripts:
        assert Path(words[0]).name in ("python", "torchrun", "deepspeed", "bash", "ruff", "pre-commit"), (
            f"{guide}: what is {words[0]}?"
        )
        return
    name = scripts[0].removeprefix("./")
    path = ROOT / name if (ROOT / name).exists() else guide.parent / name
    assert path.exists(), f"{guide.name} names {name}, which does not exist"
    rest = words[words.index(scripts[0]) + 1 :] if scripts[0] in words else words[words.index("-m") + 2 :]
    relative = str(path.relative_to(ROOT))
    if path.name in TRAIN_SCRIPTS:
        check_flags(f"{TRAIN_SCRIPTS[path.name]}/train.py", rest, LAUNCHER_FLAGS)
    elif path.name in ("launch.sh", "slurm.sh"):
        system = next((word for word in rest if word in SYSTEMS), None)
        if system is not None:
            entry = rest[rest.index("--entry") + 1] if "--entry" in rest else "train.py"
            check_flags(f"{system}/{entry}", rest, LAUNCHER_FLAGS)
    elif relative == "tests/step_path.py":
        check_flags(f"{rest[0]}/train.py", rest[1:])
    elif path.suffix == ".py":
        check_flags(relative, rest)
    else:
        text = subprocess.run(["bash", str(path), "--help"], capture_output=True, text=True, timeout=60).stdout
        assert all(word.split("=")[0] in text for word in rest if word.startswith("--")), (
            f"{relative} does not know all of {rest}"
        )


def test_commands_are_found_in_every_form(tmp_path):
    guide = tmp_path / "README.md"
    guide.write_text(
        "```bash\npython a.py --x \\\n    --y   # why\n# no\n```\n"
        "| `bash b.sh` | `bagel` |\n\n    python c.py --z\n    text\n"
        "```\n$ python output.py\n```\n"
    )
    assert commands(guide) == ["python a.py --x  --y   # why", "python c.py --z", "bash b.sh"]


@pytest.mark.parametrize("guide", GUIDES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_every_linked_file_exists(guide):
    for target in re.findall(r"\]\(([^)#]+)\)", guide.read_text(encoding="utf-8")):
        if not target.startswith(("http", "mailto:")):
            assert (guide.parent / target).exists(), f"{guide} links {target}"


@pytest.mark.parametrize("guide", ["README.md", "README.zh-CN.md"])
def test_the_tree_has_a_line_for_every_folder(guide):
    """Folders only: SYSTEM stands for each of the five, and names a room that at least one of them has."""
    text = (ROOT / guide).read_text(encoding="utf-8")
    blocks = re.findall(r"^```(\w*)\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    tree = next(block for language, block in blocks if not language and block.startswith("SYSTEM/"))
    named, top = set(), ""
    for line in tree.splitlines():
        name = line.split()[0].rstrip("/")
        top = top if line.startswith(" ") else name
        named.add(name if name == top else f"{top}/{name}")

    def rooms(folder: Path) -> set[str]:
        return {path.name for path in folder.iterdir() if path.is_dir() and path.name != "__pycache__"}

    own = {f"SYSTEM/{room}" for system in SYSTEMS for room in rooms(ROOT / system)} - {"SYSTEM/download"}
    shared = {f"shared/{room}" for room in rooms(ROOT / "shared")}
    assert named == {"SYSTEM", "shared", "scripts", "tests"} | own | shared


def test_the_root_guides_are_short_and_have_the_same_commands():
    """The page that a stranger reads first: 180 lines; what it says to type is the same in both languages."""
    english, chinese = ROOT / "README.md", ROOT / "README.zh-CN.md"

    def typed(guide: Path) -> list[list[str]]:
        return sorted(shlex.split(line, comments=True) for line in commands(guide))

    assert len(english.read_text(encoding="utf-8").splitlines()) <= 180
    assert typed(english) == typed(chinese)
