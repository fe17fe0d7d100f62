"""A setting that no preset gives and no test names is one that nobody knows to work."""

import importlib
import re
from pathlib import Path

import pytest

from shared.flags import leaves_of
from tests.launching import ROOT

SCHEMAS = {
    "bagel": ["bagel.config:Config"],
    "dit": ["dit.config:Config"],
    "float": ["float.config:Config", "float.config:AutoencoderConfig"],
    "multimodal": ["multimodal.config:Config"],
    "opens2v": ["opens2v.config:Config"],
}


def words_of(system: str) -> set[str]:
    """Every word in the system's presets and in the tests that could be meant: its own, the shared, the root's."""
    files = [*(ROOT / system / "configs").rglob("*.yaml"), *(ROOT / system / "configs").rglob("*.json")]
    for folder in (f"tests/{system}", "tests/shared", "tests/survival"):
        files += (ROOT / folder).rglob("*.py")
    files += (ROOT / "tests").glob("*.py")
    text = "\n".join(path.read_text(encoding="utf-8") for path in files if path.name != Path(__file__).name)
    return {word.replace("-", "_").strip("_") for word in re.findall(r"[A-Za-z0-9_-]+", text)}


def unnamed(system: str) -> list[str]:
    """The system's settings that stand in none of its presets and in no test, under none of their names."""
    words, found = words_of(system), []
    for schema in SCHEMAS[system]:
        module, _, name = schema.partition(":")
        for leaf in leaves_of(getattr(importlib.import_module(module), name)):
            if not {flag.replace("-", "_") for flag in leaf.flags} & words:
                found.append(leaf.path)
    return sorted(set(found))


@pytest.mark.parametrize("system", SCHEMAS)
def test_every_setting_stands_in_a_preset_or_in_a_test(system):
    assert unnamed(system) == []
