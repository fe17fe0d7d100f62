"""The settings of a schema, their argparse flags, and the flags' texts laid over a YAML tree."""

import argparse
import difflib
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel

from shared.errors import UserError


class StrictLoader(yaml.SafeLoader):
    """YAML without repeated keys, which PyYAML would overwrite silently."""


def _mapping_without_repeats(loader: StrictLoader, node: yaml.MappingNode) -> dict:
    seen: dict = {}
    for key_node, _ in node.value:
        key = loader.construct_object(key_node, deep=True)
        if isinstance(key, (list, dict)):
            raise yaml.constructor.ConstructorError(None, None, "a key is not a plain value", key_node.start_mark)
        if key in seen:
            raise yaml.constructor.ConstructorError(
                None, None, f"duplicate key '{key}', first in line {seen[key]}", key_node.start_mark
            )
        seen[key] = key_node.start_mark.line + 1
    return yaml.SafeLoader.construct_mapping(loader, node, deep=True)


StrictLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping_without_repeats)


def extra_of(field: Any) -> dict:
    """What setting() noted besides the limits: flags, hidden, fixed."""
    return field.json_schema_extra or {}


def section_of(annotation: Any) -> type[BaseModel] | None:
    """The section class of an annotation such as ModelConfig or ModelConfig | None."""
    options = typing.get_args(annotation) or (annotation,)
    return next((item for item in options if isinstance(item, type) and issubclass(item, BaseModel)), None)


class Leaf(typing.NamedTuple):
    """One setting of a schema."""

    path: str  # dotted name
    annotation: Any
    field: Any
    fixed: bool  # may not change on resume

    @property
    def flags(self) -> list[str]:
        """Its short name and its further names."""
        return [self.path.rsplit(".", 1)[-1], *extra_of(self.field).get("flags", ())]

    @property
    def common(self) -> bool:
        """Whether --help names it among the first."""
        section, _, name = self.path.rpartition(".")
        return extra_of(self.field).get("common", False) or (section in ("run", "training") and name in COMMON)

    @property
    def hidden(self) -> bool:
        """Whether it has no flag."""
        return extra_of(self.field).get("hidden", False)


def leaves_of(schema: type[BaseModel], prefix: str = "", fixed: bool = False) -> Iterator[Leaf]:
    """Every setting below `schema`."""
    for name, field in schema.model_fields.items():
        section = section_of(field.annotation)
        if section is not None:
            yield from leaves_of(section, f"{prefix}{name}.", fixed or getattr(section, "fixed_on_resume", False))
        else:
            yield Leaf(f"{prefix}{name}", field.annotation, field, fixed or extra_of(field).get("fixed", False))


def _spellings(names: list[str]) -> list[str]:
    return list(dict.fromkeys("--" + form for name in names for form in (name.replace("_", "-"), name)))


# What most commands are given; in this order they open --help, with those that a system marks itself (common=True).
COMMON = "output_dir total_steps num_epochs batch_size learning_rate strategy precision resume dry_run".split()


class _Parser(argparse.ArgumentParser):
    """Reports what it cannot read as a UserError, without the long list of flags."""

    def error(self, message: str) -> typing.NoReturn:
        raise UserError(f"{message} (--help lists the flags)")


class _Help(argparse.RawDescriptionHelpFormatter):
    """One spelling of each name, and the dotted name only where a setting has no other."""

    def _format_action_invocation(self, action: argparse.Action) -> str:
        flags = [flag for flag in action.option_strings if "_" not in flag]
        flags = [flag for flag in flags if "." not in flag] or flags
        value = "" if action.nargs == 0 else " " + self._format_args(action, action.dest.upper())
        return ", ".join(flags) + value


def unknown_flag(text: str, leaves: list[Leaf]) -> UserError:
    """What to say of an argument that is no flag: the dotted flags it may stand for, or the nearest flag."""
    name = text.partition("=")[0]
    if not name.startswith("--"):
        return UserError(f"{text}: not expected here; a value follows its flag, and --help lists the flags")
    wanted = name[2:].replace("-", "_")
    several = [f"--{leaf.path}" for leaf in leaves if wanted in leaf.flags and not leaf.hidden]
    if several:
        return UserError(f"{name}: names several settings; use {' or '.join(several)}")
    known = [flag for leaf in leaves if not leaf.hidden for flag in (*leaf.flags, leaf.path)]
    near = difflib.get_close_matches(wanted, known, 1, 0.72)  # below it the names have nothing in common
    advice = f"; did you mean --{near[0].replace('_', '-')}?" if near else ""
    return UserError(f"{name}: no such flag{advice} (--help lists the flags)")


def make_parser(
    leaves: list[Leaf], description: str | None, presets: Path | None, default: str | None, aliases: dict[str, str]
) -> argparse.ArgumentParser:
    """The parser of every flag, in both spellings; a short name that several settings share has no flag."""
    parser = _Parser(
        usage="%(prog)s [--config PRESET|FILE.yaml] [--SETTING VALUE ...]"
        if presets is not None
        else "%(prog)s [--SETTING VALUE ...]",
        description=description,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
        formatter_class=_Help,
        epilog="Every setting also has its dotted name (--section.name), and - and _ are alike in all flags.",
    )
    others: dict[str, list[str]] = {}
    for spelling, flag in aliases.items():
        others.setdefault(flag, []).extend(_spellings([spelling.lstrip("-")]))
    taken: set[str] = set()
    in_sections = any("." in leaf.path for leaf in leaves)
    first = parser.add_argument_group("settings that people use" if in_sections else "settings")
    if presets is not None:
        known = ", ".join(sorted(item.stem for item in presets.glob("*.yaml")))
        first.add_argument(
            "--config",
            *others.get("--config", ()),
            dest="--config",
            metavar="PRESET|FILE",
            help=f"preset ({known}) or a YAML file (default: {default})",
        )
        taken.update(["--config", *others.get("--config", ())])
    shown = [leaf for leaf in leaves if not leaf.hidden]
    short_names = [name for leaf in shown for name in set(leaf.flags)]
    flags_of: dict[str, list[str]] = {}
    for leaf in shown:
        names = [leaf.path, *(name for name in leaf.flags if short_names.count(name) == 1)]
        flags = [flag for flag in _spellings(names) if flag not in taken and flag != "--set"]
        flags += [flag for own in list(flags) for flag in others.get(own, ()) if flag not in taken]
        taken.update(flags)
        flags_of[leaf.path] = flags
    groups: dict[str, typing.Any] = {}
    for leaf in sorted(shown, key=_place):
        group = first
        if in_sections and not leaf.common:
            section = leaf.path.rpartition(".")[0]
            group = groups.setdefault(section, None) or parser.add_argument_group(section or "other settings")
            groups[section] = group
        _add_flag(group, leaf, flags_of[leaf.path])
    parser.add_argument(
        "--set", dest="--set", action="append", metavar="KEY=VALUE", help="any setting by its dotted name; repeatable"
    )
    return parser


def _place(leaf: Leaf) -> int:
    """The common ones first, in their order; the rest as the schema has them (sorting is stable)."""
    name = leaf.path.rpartition(".")[2]
    return COMMON.index(name) if leaf.common and name in COMMON else len(COMMON)


def _add_flag(parser: argparse._ActionsContainer, leaf: Leaf, flags: list[str]) -> None:
    path, preset = leaf.path, leaf.field.get_default(call_default_factory=True)
    kinds = _kinds(leaf.annotation)
    text = f"{leaf.field.description or ''} (default: {preset})".replace("%", "%%").strip()
    choices = [str(choice) for kind in kinds if typing.get_origin(kind) is Literal for choice in typing.get_args(kind)]
    metavar = "|".join(choices) if choices else path.rsplit(".", 1)[-1].upper()
    if _is_list(kinds):
        parser.add_argument(*flags, dest=path, nargs="*", metavar=metavar, help=text)
    elif bool in kinds:
        parser.add_argument(*flags, dest=path, nargs="?", const="true", metavar="true|false", help=text)
        negative = [f"--no-{flag[2:]}" for flag in flags if "." not in flag] + [
            f"--no_{flag[2:]}" for flag in flags if "." not in flag
        ]
        parser.add_argument(
            *dict.fromkeys(negative), dest=path, action="store_const", const="false", help=argparse.SUPPRESS
        )
    else:
        parser.add_argument(*flags, dest=path, metavar=metavar, help=text)


def _kinds(annotation: Any) -> tuple:
    """The alternatives of an annotation: (int, NoneType) for int | None."""
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return typing.get_args(annotation)
    return (annotation,)


def accepts_bool(annotation: Any) -> bool:
    """Whether true and false are values of the annotation; pydantic would take them for the numbers 1 and 0."""
    return any(kind in (bool, Any) or True in typing.get_args(kind) for kind in _kinds(annotation))


def from_text(value: Any, annotation: Any) -> Any:
    """A flag's raw text for pydantic.

    One of the choices, None for none/null where the field is optional, a list for lists, YAML for mappings, else the
    text itself.
    """
    kinds = _kinds(annotation)
    if isinstance(value, list) and len(value) != 1:
        return value
    text = value[0] if isinstance(value, list) else value
    choices = {
        str(choice): choice for kind in kinds if typing.get_origin(kind) is Literal for choice in typing.get_args(kind)
    }
    if text in choices:  # before null: `none` is a strategy of its own
        return choices[text]
    if type(None) in kinds and text.lower() in ("none", "null"):
        return None
    if _is_list(kinds):
        if ", " in text and not text.startswith("[") and any(typing.get_args(kind) == (str,) for kind in kinds):
            return [text]  # a sentence, not a list of words
        return [item.strip() for item in text.strip("[] ").split(",") if item.strip()]
    if any(typing.get_origin(kind) is dict or kind is dict for kind in kinds):
        return _from_yaml(text)
    return text


def is_blank(value: Any, leaf: Leaf) -> bool:
    """Whether a flag for a single text got none, which would pass for `not given`: a folder of one's own would be left
    out without a word. Words for a model may be empty, or are looked at by whoever reads them.
    """
    kinds = _kinds(leaf.annotation)
    if str not in kinds or any(word in leaf.path for word in ("prompt", "negative", "query_text")):
        return False
    texts = value if isinstance(value, list) else [value]
    return not any(isinstance(text, bool) or text.strip() for text in texts)


def _is_list(kinds: tuple) -> bool:
    return any(typing.get_origin(kind) is list or kind is list for kind in kinds)


def _from_yaml(text: str) -> Any:
    try:
        return yaml.load(text, StrictLoader)  # noqa: S506  (a SafeLoader)
    except yaml.YAMLError as error:
        raise UserError(f"{text}: not readable as YAML: {' '.join(str(error).split())}") from None


def put(tree: dict, path: str, value: Any, schema: type[BaseModel]) -> None:
    """Lay `value` at a dotted path over the tree, and drop the other names that the YAML may have used for it."""
    *parents, name = path.split(".")
    for parent in parents:
        section = section_of(schema.model_fields[parent].annotation)
        assert section is not None, f"{parent} of {path} is no section"
        schema = section
        if not isinstance(tree.get(parent), dict):
            tree[parent] = {}
        tree = tree[parent]
    for other in extra_of(schema.model_fields[name]).get("flags", ()):
        tree.pop(other, None)
    tree[name] = value


def take_out(tree: dict, path: str, schema: type[BaseModel]) -> None:
    """Take a setting, under any of its names, out of the tree, so that its default counts."""
    put(tree, path, None, schema)
    *parents, name = path.split(".")
    for parent in parents:
        tree = tree[parent]
    del tree[name]


def full_key(key: str, leaves: list[Leaf]) -> str:
    """The dotted name that `key` (dotted or short, any of a setting's names) stands for."""
    parent, _, name = key.rpartition(".")
    found = [leaf.path for leaf in leaves if key == leaf.path] or [
        leaf.path for leaf in leaves if name in leaf.flags and parent in ("", leaf.path.rpartition(".")[0])
    ]
    if len(found) == 1:
        return found[0]
    if found:
        raise UserError(f"--set {key}: names several settings: {', '.join(found)}; give the dotted name")
    known = [f"{leaf.path.rpartition('.')[0]}.{name}".lstrip(".") for leaf in leaves for name in leaf.flags]
    near = difflib.get_close_matches(key, known, 1)
    raise UserError(f"--set {key}: no such setting{f'; did you mean {near[0]}?' if near else ''}")
