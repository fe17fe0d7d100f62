"""Rules of the repository that a reader relies on, checked over the syntax trees of all tracked files."""

import ast
import re
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from tests.launching import ROOT

SYSTEMS = ("float", "opens2v", "bagel", "dit", "multimodal")
MAX_LINES, MAX_COLUMNS, MAX_FUNCTION = 400, 120, 60
LONGER = {("shared/loop.py", "fit"): 120}  # the loop reads from top to bottom
MACHINE_PATH = re.compile(r"(?<![\w.}/~-])/(?:work|root|tmp/lead)(?=[/\s\"'`,;:)]|$)")


@cache
def tracked() -> list[Path]:
    names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout.decode()
    return [ROOT / name for name in names.split("\0") if name and (ROOT / name).is_file()]


@cache
def sources() -> dict[str, str]:
    """Every Python file by its path below the root."""
    return {path.relative_to(ROOT).as_posix(): path.read_text() for path in tracked() if path.suffix == ".py"}


@cache
def nodes(source: str) -> list[ast.AST]:
    """All nodes of the syntax tree."""
    return list(ast.walk(ast.parse(source)))


def check(*rules) -> None:
    """Fail with what the rules find in all files, one a line, as file:line: text."""
    found = [(name, *fault) for rule in rules for name, source in sources().items() for fault in rule(name, source)]
    if found:
        pytest.fail("\n".join(f"{name}:{line}: {text}" for name, line, text in found), pytrace=False)


# --- rules: (file name, source) -> (line, what is wrong) --------------------------------------------------------------


def imported(source: str) -> Iterator[tuple[int, str]]:
    """(line, module) of every import; `from a import b` counts as a and as a.b."""
    for node in nodes(source):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.lineno, "." * node.level + (node.module or "")


def foreign_imports(name: str, source: str) -> Iterator[tuple[int, str]]:
    """shared knows no system, a system knows no other, and nothing outside tests knows the tests."""
    home = name.split("/")[0]
    if home == "shared":
        forbidden = {*SYSTEMS, "tests"}
    elif home in SYSTEMS:
        forbidden = {*SYSTEMS, "tests"} - {home}
    else:
        return
    for line, module in imported(source):
        if module.split(".")[0] in forbidden:
            yield line, f"{home} imports {module}"


def relative_imports(name: str, source: str) -> Iterator[tuple[int, str]]:
    """`python SYSTEM/train.py` has no package, so that a relative import fails there."""
    yield from ((line, f"imports {module}") for line, module in imported(source) if module.startswith("."))


def rebound_float(name: str, source: str) -> Iterator[tuple[int, str]]:
    """`import float` and `import float.model` hide the builtin; `from float.model import X` does not."""
    for node in nodes(source):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "float" and alias.asname in (None, "float"):
                    yield node.lineno, f"import {alias.name} hides the builtin float"


def unsafe_loads(name: str, source: str) -> Iterator[tuple[int, str]]:
    """A pickle runs what it holds."""
    for node in nodes(source):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("torch.load", "torch.serialization.load"):
            safe = {word.arg: ast.unparse(word.value) for word in node.keywords}.get("weights_only")
            if safe != "True":
                yield node.lineno, "torch.load without weights_only=True"


def long_files(name: str, source: str) -> Iterator[tuple[int, str]]:
    lines = source.splitlines()
    if len(lines) > MAX_LINES:
        yield len(lines), f"{len(lines)} lines, at most {MAX_LINES}"


def long_lines(name: str, source: str) -> Iterator[tuple[int, str]]:
    for number, line in enumerate(source.splitlines(), 1):
        if len(line) > MAX_COLUMNS:
            yield number, f"{len(line)} columns, at most {MAX_COLUMNS}"


def long_functions(name: str, source: str) -> Iterator[tuple[int, str]]:
    for node in nodes(source):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = node.end_lineno - node.lineno + 1
            allowed = LONGER.get((name, node.name), MAX_FUNCTION)
            if length > allowed:
                yield node.lineno, f"{node.name} has {length} lines, at most {allowed}"


# --- the rules over all files -----------------------------------------------------------------------------------------


def test_shared_knows_no_system_and_no_system_another():
    check(foreign_imports)


def test_imports_are_absolute():
    check(relative_imports)


def test_no_file_hides_the_builtin_float():
    check(rebound_float)


def test_no_pickle_is_loaded():
    check(unsafe_loads)


def test_files_functions_and_lines_are_short():
    check(long_files, long_functions, long_lines)


@pytest.mark.parametrize("system", SYSTEMS)
def test_every_system_has_a_readme(system):
    names = {path.relative_to(ROOT).as_posix() for path in tracked()}
    if any(name.startswith(f"{system}/") for name in names) and f"{system}/README.md" not in names:
        pytest.fail(f"{system}/README.md is missing", pytrace=False)


def test_no_text_names_a_place_on_one_machine():
    found = []
    for path in tracked():
        name = path.relative_to(ROOT).as_posix()
        data = path.read_bytes()
        if not name.startswith("tests/reference/") and b"\0" not in data[:8192]:
            lines = data.decode("utf-8", "replace").splitlines()
            found += [
                f"{name}:{i}: {line.strip()[:100]}" for i, line in enumerate(lines, 1) if MACHINE_PATH.search(line)
            ]
    if found:
        pytest.fail("\n".join(found), pytrace=False)


# --- the rules themselves ---------------------------------------------------------------------------------------------

BROKEN = [
    (foreign_imports, "shared/x.py", "from dit.model import DiTModel"),
    (foreign_imports, "shared/x.py", "def f():\n    import float.model as m"),
    (foreign_imports, "dit/x.py", "import bagel.modules.vae"),
    (foreign_imports, "float/x.py", "from tests.launching import run"),
    (relative_imports, "dit/x.py", "from .model import DiTModel"),
    (rebound_float, "tests/x.py", "import float"),
    (rebound_float, "tests/x.py", "def f():\n    import float.model"),
    (rebound_float, "tests/x.py", "import math, float.model"),
    (unsafe_loads, "dit/x.py", "torch.load(path)"),
    (unsafe_loads, "dit/x.py", "torch.load(path, weights_only=False)"),
    (long_files, "dit/x.py", "x = 1\n" * 401),
    (long_lines, "dit/x.py", "x = " + "1" * 117),
    (long_functions, "dit/x.py", "def f():\n" + "    x = 1\n" * 60),
    (long_functions, "shared/loop.py", "def fit():\n" + "    x = 1\n" * 120),
    (long_functions, "dit/loop.py", "class A:\n    def fit(self):\n" + "        x = 1\n" * 60),
]
SOUND = [
    (foreign_imports, "dit/x.py", "from dit.model import DiTModel\nimport shared.flow"),
    (foreign_imports, "tests/x.py", "from dit.model import A\nfrom float.model import B"),
    (rebound_float, "float/x.py", "from float.model import X\nimport float.model as model"),
    (unsafe_loads, "dit/x.py", "torch.load(path, map_location='cpu', weights_only=True)\njson.load(file)"),
    (long_files, "dit/x.py", "x = 1\n" * 400),
    (long_lines, "dit/x.py", "x = " + "1" * 116),
    (long_functions, "dit/x.py", "def f():\n" + "    x = 1\n" * 59),
    (long_functions, "shared/loop.py", "def fit():\n" + "    x = 1\n" * 119),
]


@pytest.mark.parametrize(("rule", "name", "source"), BROKEN)
def test_a_rule_finds_what_breaks_it(rule, name, source):
    assert len(list(rule(name, source))) == 1


@pytest.mark.parametrize(("rule", "name", "source"), SOUND)
def test_a_rule_lets_the_rest_pass(rule, name, source):
    assert list(rule(name, source)) == []


def test_machine_paths_are_told_from_others():
    for place in ("work", "root", "tmp/lead"):
        assert all(MACHINE_PATH.search(text.format(place)) for text in ("/{}/x", "see '/{}'", "a=/{}/b", "/{}"))
        assert not any(
            MACHINE_PATH.search(text.format(place)) for text in ("a/{}/b", "/{}space", "$OUT/{}/x", "./{}/x")
        )
