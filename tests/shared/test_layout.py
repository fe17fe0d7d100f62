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
AT_THE_TOP = 11  # Python files that a first reader of a folder meets; rooms hold the rest
ROOMS = {"configs", "data", "evaluation", "modules", "sample_data", "sampling", "weights"}
OWN_ROOMS = {"multimodal": {"download"}, "shared": {"engine", "media", "plan", "report"}}
# FLOAT's guide names the file of its path, its loss and its trainer; two files of one idea would be one too many
NAMED_BY_THE_GUIDE = {("float", "objective"): "rectified_flow"}
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


def training_in_parts(name: str, source: str) -> Iterator[tuple[int, str]]:
    """Parts of networks and readers of files know no training script."""
    home, room = [*name.split("/"), ""][:2]
    if home in SYSTEMS and room in ("data", "modules"):
        for line, module in imported(source):
            if module in (f"{home}.train", f"{home}.generate", f"{home}.metrics"):
                yield line, f"{room}/ imports {module}"


def circles(files: dict[str, str]) -> list[list[str]]:
    """Groups of files that import each other, at their top or inside functions."""
    modules = {name.removesuffix(".py").replace("/", "."): name for name in files}
    edges: dict[str, set[str]] = {}
    for module, name in modules.items():
        found = set()
        for node in nodes(files[name]):
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                found |= {node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)}
        edges[module] = (found & modules.keys()) - {module}
    reached: dict[str, set[str]] = {}
    for module in edges:
        seen, todo = set(), [module]
        while todo:
            new = edges[todo.pop()] - seen
            seen |= new
            todo += new
        reached[module] = seen
    groups = {frozenset(b for b in reached[a] if a in reached[b]) for a in edges if a in reached[a]}
    return sorted(sorted(group) for group in groups)


# --- the rules over all files -----------------------------------------------------------------------------------------


def test_shared_knows_no_system_and_no_system_another():
    check(foreign_imports)


def test_imports_are_absolute():
    check(relative_imports)


def test_no_file_hides_the_builtin_float():
    check(rebound_float)


def test_no_pickle_is_loaded():
    check(unsafe_loads)


def test_parts_know_no_training_script():
    check(training_in_parts)


def test_no_files_import_each_other():
    product = {name: source for name, source in sources().items() if not name.startswith("tests/")}
    assert circles(product) == []


@pytest.mark.parametrize("folder", [*SYSTEMS, "shared"])
def test_a_folder_has_few_files_at_its_top_and_rooms_with_the_names_of_all(folder):
    below = [name.split("/")[1:] for name in sources() if name.startswith(f"{folder}/")]
    top = [parts[0] for parts in below if len(parts) == 1 and parts[0] != "__init__.py"]
    assert len(top) <= AT_THE_TOP, sorted(top)
    allowed = OWN_ROOMS.get(folder, set()) | (ROOMS if folder in SYSTEMS else set())
    assert {parts[0] for parts in below if len(parts) > 1} <= allowed


@pytest.mark.parametrize("system", SYSTEMS)
def test_the_same_idea_has_the_same_file_in_every_system(system):
    for name in ("__init__", "config", "dataset", "model", "objective", "train", "generate", "metrics", "plan"):
        assert f"{system}/{NAMED_BY_THE_GUIDE.get((system, name), name)}.py" in sources()
    assert f"{system}/weights/open.py" in sources()


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
    (training_in_parts, "dit/modules/x.py", "from dit.train import Trainer"),
    (training_in_parts, "dit/data/x.py", "def f():\n    import dit.generate"),
]
SOUND = [
    (foreign_imports, "dit/x.py", "from dit.model import DiTModel\nimport shared.flow"),
    (foreign_imports, "tests/x.py", "from dit.model import A\nfrom float.model import B"),
    (rebound_float, "float/x.py", "from float.model import X\nimport float.model as model"),
    (unsafe_loads, "dit/x.py", "torch.load(path, map_location='cpu', weights_only=True)\njson.load(file)"),
    (training_in_parts, "dit/weights/x.py", "from dit.train import Trainer"),
    (training_in_parts, "dit/modules/x.py", "from dit.modules.layers import Block"),
]


@pytest.mark.parametrize(("rule", "name", "source"), BROKEN)
def test_a_rule_finds_what_breaks_it(rule, name, source):
    assert len(list(rule(name, source))) == 1


@pytest.mark.parametrize(("rule", "name", "source"), SOUND)
def test_a_rule_lets_the_rest_pass(rule, name, source):
    assert list(rule(name, source)) == []


def test_a_circle_is_found_and_a_chain_is_not():
    chain = {"a/x.py": "from a.y import f", "a/y.py": "import a.z", "a/z.py": ""}
    assert circles(chain) == []
    assert circles(chain | {"a/z.py": "def f():\n    from a import x"}) == [["a.x", "a.y", "a.z"]]


def test_machine_paths_are_told_from_others():
    for place in ("work", "root", "tmp/lead"):
        assert all(MACHINE_PATH.search(text.format(place)) for text in ("/{}/x", "see '/{}'", "a=/{}/b", "/{}"))
        assert not any(
            MACHINE_PATH.search(text.format(place)) for text in ("a/{}/b", "/{}space", "$OUT/{}/x", "./{}/x")
        )
