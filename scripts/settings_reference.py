"""The reference of a command's settings as Markdown, from its schema.

python -m scripts.settings_reference dit.config:Config --output dit/configs/README.md
"""

import argparse
import importlib
import typing
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from shared.errors import UserError, check_output, command
from shared.flags import Leaf, leaves_of, section_of

LIMITS = {"Ge": ">=", "Gt": ">", "Le": "<=", "Lt": "<"}


def reference(title: str, schema: type[BaseModel]) -> str:
    """One table a section: name, other names, values, default and meaning of every setting.

    A setting marked with * may not change when a run resumes.
    """
    leaves = list(leaves_of(schema))
    lines = [
        f"# Settings of {title}",
        "",
        "Made from the schema. Every setting is a line in YAML, a flag with its dotted or, where no other setting",
        "shares it, its short name (`-` and `_` alike), and a key of `--set`. A star: fixed when a run resumes.",
    ]
    for section in dict.fromkeys(leaf.path.rpartition(".")[0] for leaf in leaves):
        lines += ["", f"## {section or 'top level'}", ""]
        if description := _description(schema, section):
            lines += [description, ""]
        lines += ["| setting | also | values | default | meaning |", "|---|---|---|---|---|"]
        lines += [_row(leaf) for leaf in leaves if leaf.path.rpartition(".")[0] == section]
    return "\n".join(lines) + "\n"


def _description(schema: type[BaseModel], section: str) -> str:
    for name in section.split(".") if section else []:
        schema = section_of(schema.model_fields[name].annotation)
    return " ".join((schema.__doc__ or "").split()) if section else ""


def _row(leaf: Leaf) -> str:
    default = leaf.field.get_default(call_default_factory=True)
    shown = "null" if default is None else str(default).lower() if isinstance(default, bool) else str(default)
    cells = [
        f"`{leaf.path.rpartition('.')[2]}`{'*' if leaf.fixed else ''}",
        ", ".join(f"`{name}`" for name in leaf.flags[1:]),
        _values(leaf),
        f"`{shown}`" if shown else "",
        leaf.field.description or "",
    ]
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _values(leaf: Leaf) -> str:
    bounds = [
        f"{sign} {getattr(limit, name.lower()):g}"
        for limit in leaf.field.metadata
        for name, sign in LIMITS.items()
        if type(limit).__name__ == name
    ]
    return " ".join([_name(leaf.annotation), *([", ".join(bounds)] if bounds else [])])


def _name(annotation: Any) -> str:
    """A type as a reader would say it: `int or null`, `a, b or c`, `list of str`."""
    arguments = typing.get_args(annotation)
    if typing.get_origin(annotation) is typing.Literal:
        return " ".join(f"`{str(choice).lower() if isinstance(choice, bool) else choice}`" for choice in arguments)
    if typing.get_origin(annotation) in (list, dict, tuple):
        return f"{typing.get_origin(annotation).__name__} of {', '.join(_name(item) for item in arguments)}"
    if arguments:
        return " or ".join(_name(item) for item in arguments)
    return "null" if annotation is type(None) else getattr(annotation, "__name__", str(annotation))


@command
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("schema", metavar="MODULE:CLASS", help="the settings, for example dit.config:Config")
    parser.add_argument("--output", type=Path, help="file to write; without it the text is printed")
    options = parser.parse_args(argv)
    if options.output:
        check_output(options.output)
    module, _, name = options.schema.partition(":")
    try:
        schema = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError):
        schema = None
    if not (isinstance(schema, type) and issubclass(schema, BaseModel)):
        raise UserError(f"{options.schema}: no settings class; give MODULE:CLASS, for example dit.config:Config")
    text = reference(options.schema.partition(".")[0], schema)
    if options.output:
        options.output.write_text(text, encoding="utf-8")
    else:
        print(text, end="")


if __name__ == "__main__":
    main()
