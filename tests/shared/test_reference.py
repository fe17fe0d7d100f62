"""The reference of the settings that each system shows is the one that its schema gives."""

import importlib
from typing import Literal

import pytest

from scripts.settings_reference import main, reference
from shared.config import Section, setting
from shared.errors import UserError
from tests.launching import ROOT

PAGES = {
    "dit/configs/README.md": "dit.config:Config",
    "float/configs/README.md": "float.config:Config",
    "float/configs/autoencoder/README.md": "float.config:AutoencoderConfig",
    "bagel/configs/README.md": "bagel.config:Config",
    "opens2v/configs/README.md": "opens2v.config:Config",
    "multimodal/configs/README.md": "multimodal.config:Config",
}


@pytest.mark.parametrize("page, schema", PAGES.items())
def test_the_page_is_what_the_schema_gives(page, schema, tmp_path):
    """When this fails: python -m scripts.settings_reference SCHEMA --output PAGE."""
    main([schema, "--output", str(tmp_path / "page.md")])
    assert (ROOT / page).read_text(encoding="utf-8") == (tmp_path / "page.md").read_text(encoding="utf-8")


def test_every_setting_has_a_meaning():
    for schema in PAGES.values():
        module, _, name = schema.partition(":")
        text = reference("x", getattr(importlib.import_module(module), name))
        assert not [line for line in text.splitlines() if line.startswith("| `") and line.endswith("|  |")], schema


class Inner(Section):
    """What is inside."""

    kind: Literal["a", "b"] | None = setting(None, "one | two", "sort", fixed=True)
    sizes: list[int] = setting([1, 2], "numbers")


class Outer(Section):
    inner: Inner = Inner()
    rate: float = setting(0.5, "share", ge=0, lt=1)


def test_names_limits_and_defaults_are_shown():
    text = reference("toy", Outer)
    assert "| `kind`* | `sort` | `a` `b` or null | `null` | one \\| two |" in text
    assert "| `sizes` |  | list of int | `[1, 2]` | numbers |" in text
    assert "| `rate` |  | float >= 0, < 1 | `0.5` | share |" in text
    assert "## inner\n\nWhat is inside." in text


def test_a_wrong_name_is_refused():
    with pytest.raises(SystemExit) as stopped:
        main(["dit.config:Nothing"])
    assert stopped.value.code == 2
    for given in ("nowhere", "dit.config:PRESETS", "dit.config:Literal"):
        with pytest.raises(UserError, match="MODULE:CLASS"):
            main.__wrapped__([given])
