"""The record formats: how each is recognised and checked, and what it means as a sequence of texts and pictures.

A record becomes a list of Steps. The rules follow section "Data format" of the README: text of the assistant and
pictures of the assistant are learned; text and pictures of the user are conditions.
"""

import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from bagel.data.tokenizer import SPECIAL_STRINGS
from bagel.packing import PlanItem

MAX_WEIGHT = 1000


class RecordFault(Exception):
    """A record that cannot be used: one of the codes of the README, and what was found."""

    def __init__(self, code: str, message: str):
        super().__init__(message)
        self.code = code


@dataclass
class Step:
    """One text or one picture of a record, in order.

    target: it is learned. latents, vision: a picture (or, for a target, its clean copy) is given to what follows as
    latents, as ViT tokens. enable_cfg: may be left out as a condition.
    """

    text: str | None = None
    image: str | None = None
    target: bool = False
    latents: bool = False
    vision: bool = False
    enable_cfg: bool = False


class Choice:
    """What is chosen in a record for one epoch: a number below n, one of several paraphrases."""

    turns = 2  # edits of a chain that one sample may hold

    def number(self, count: int) -> int:
        """A number below `count`."""
        raise NotImplementedError

    def text(self, options: Sequence[str]) -> str:
        """One of the texts."""
        return options[self.number(len(options))]


def image_items(
    source: str,
    vae_size: tuple[int, int],
    vit_size: tuple[int, int],
    *,
    target: int,
    latents: bool,
    vision: bool,
    enable_cfg: bool,
) -> list[PlanItem]:
    """A picture's copies in their order: `target` times to be generated, clean latents, ViT tokens. Sizes: (height,
    width), pixels.
    """
    items = [PlanItem("vae_image", size=vae_size, source=source, loss=1, repeats=k > 0) for k in range(target)]
    if latents:
        items.append(PlanItem("vae_image", size=vae_size, source=source, enable_cfg=int(enable_cfg)))
    if vision:
        items.append(PlanItem("vit_image", size=vit_size, source=source, enable_cfg=int(enable_cfg)))
    return items


# --- recognising ------------------------------------------------------------------------------------------------------


def format_of(record: Any) -> str:
    """The name of the record's format; raises a RecordFault when none or several fit."""
    if not isinstance(record, dict):
        raise RecordFault("E_TYPE", f"a record is an object, found {type(record).__name__}")
    for key in ("video", "videos", "audio", "audios"):
        if record.get(key):
            raise RecordFault("E_FORMAT", f"the record has '{key}': only texts and pictures are read; leave it out")
    marks = {
        "conversations": "conversations" in record or "messages" in record,
        "text_to_image": "text_prompt" in record or "captions" in record,
        "understanding": "answer" in record or "caption" in record,
        "editing": "source_image_path" in record or "target_image_path" in record,
        "multi_turn_editing": "image_list" in record or "instruction_list" in record,
        "interleaved": "sequence" in record,
    }
    found = [name for name, present in marks.items() if present]
    if len(found) != 1:
        raise RecordFault(
            "E_FORMAT",
            f"the record fits {' and '.join(found)}; split it"
            if found
            else f"no known format has the keys {sorted(map(str, record))[:8]}; bagel/data/format.json lists them",
        )
    return _conversation_kind(record) if found == ["conversations"] else found[0]


def _conversation_kind(record: dict) -> str:
    if "conversations" in record and "messages" in record:
        raise RecordFault("E_FORMAT", "'conversations' and 'messages' are both given; leave one out")
    name = "messages" if "messages" in record else "conversations"
    turns = _field(record, name, list)
    if not turns:
        raise RecordFault("E_FIELD", f"'{name}' is empty")
    if not all(isinstance(turn, dict) for turn in turns):
        raise RecordFault("E_TYPE", f"every item of '{name}' must be an object")
    by_role, by_from = [any(key in turn for turn in turns) for key in ("role", "from")]
    if by_role and by_from:
        raise RecordFault("E_FORMAT", f"items of '{name}' mix 'role' and 'from'")
    if not (by_role or by_from):
        raise RecordFault("E_FIELD", f"items of '{name}' have neither 'role' nor 'from'")
    if name == "messages":
        return "messages"
    if by_from:
        return "llava"
    return "conversation" if any(turn.get("type") == "image" for turn in turns) else "text_only"


def _field(record: dict, name: str, kind: type | tuple, default: Any = None) -> Any:
    """A field of a type; missing or empty is E_FIELD, another type E_TYPE."""
    value = record.get(name, default)
    if value is None or value == "":
        raise RecordFault("E_FIELD", f"'{name}' is missing or empty")
    if not isinstance(value, kind) or isinstance(value, bool) and kind is not bool:
        wanted = " or ".join(item.__name__ for item in (kind if isinstance(kind, tuple) else (kind,)))
        raise RecordFault("E_TYPE", f"'{name}' must be {wanted}, found {type(value).__name__}")
    return value


def _texts(record: dict, name: str) -> list[str]:
    """A string, or a list of strings of which one is drawn."""
    value = _field(record, name, (str, list))
    texts = value if isinstance(value, list) else [value]
    if not texts or not all(isinstance(text, str) and text.strip() for text in texts):
        raise RecordFault("E_FIELD", f"'{name}' must hold one or more non-empty strings")
    return texts


def _paths(value: Any, name: str) -> list[str]:
    paths = value if isinstance(value, list) else [value]
    if not paths:
        raise RecordFault("E_FIELD", f"'{name}' is empty")
    for path in paths:
        if not isinstance(path, str):
            raise RecordFault("E_TYPE", f"'{name}' must be a path or a list of paths, found {type(path).__name__}")
        if not path:
            raise RecordFault("E_FIELD", f"'{name}' is empty")
    return paths


# --- each format ------------------------------------------------------------------------------------------------------


def steps_of(record: dict, kind: str, draw: Choice) -> list[Step]:
    """The record as steps; `draw` chooses among paraphrases and turns. Raises a RecordFault."""
    if not isinstance(record.get("id") or "", (str, int)) or isinstance(record.get("id"), bool):
        raise RecordFault("E_TYPE", f"'id' must be a string, found {type(record['id']).__name__}")
    weight = 1.0 if record.get("weight") is None else record["weight"]
    if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 < weight <= MAX_WEIGHT:
        raise RecordFault("E_TYPE", f"'weight' must be a number above 0 and at most {MAX_WEIGHT}, found {weight!r}")
    steps = [step for step in _READERS[kind](record, draw) if step.image is not None or (step.text or "").strip()]
    if not any(step.target for step in steps):
        raise RecordFault("E_NO_TARGET", "nothing to learn: no text or picture of the assistant")
    return steps


ROLES = {
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "system": "system",
    "developer": "system",
}
IMAGE_MARK, OTHER_MARKS = "<image>", ("<video>", "<audio>")


def _conversation(record: dict, draw: Choice) -> list[Step]:
    """Turns of any form in use: role with type, role with content, from with value, lists of parts.

    `<image>` in a turn stands for the next of the record's pictures: given by the user, or to be drawn by the
    assistant. Pictures without a mark go first. What the assistant says at "weight": 0 or "loss": false is not learned.
    """
    pending = [*_paths_or_none(record)]
    given, marks = len(pending), 0
    steps: list[Step] = []
    speakers = []
    if record.get("system"):
        steps.append(Step(text=_field(record, "system", str)))
    for turn in record["messages"] if "messages" in record else record["conversations"]:
        key = "role" if "role" in turn else "from"
        name = str(_field(turn, key, str)).lower()
        if name not in ROLES:
            raise RecordFault("E_ROLE", f"{key} {name!r}: expected one of {', '.join(ROLES)}")
        speakers.append(ROLES[name])
        is_target = ROLES[name] == "assistant" and turn.get("weight") != 0 and turn.get("loss") != 0
        for part in _parts_of(turn):
            if isinstance(part, Picture):
                marks += part.path is None
                path = part.path or (pending.pop(0) if pending else None)
                if path is None:
                    continue  # counted below
                steps.append(Step(image=path, target=is_target))
            elif part.strip():
                steps.append(Step(text=part, target=is_target))
    if marks and marks != given:
        raise RecordFault("E_IMAGE_COUNT", f"{marks} {IMAGE_MARK} marks for {given} images")
    _check_order(speakers)
    first = 1 if record.get("system") else 0
    return _with_conditions([*steps[:first], *(Step(image=path) for path in pending), *steps[first:]])


class Picture(NamedTuple):
    """A picture in a turn; path None: the next of the record's own."""

    path: str | None = None


def _paths_or_none(record: dict) -> list[str]:
    """The pictures of a conversation under `image` or `images`; null, "" and [] mean none."""
    given = [name for name in ("image", "images") if record.get(name)]
    if len(given) > 1:
        raise RecordFault("E_FORMAT", "'image' and 'images' are both given; leave one out")
    return _paths(record[given[0]], given[0]) if given else []


def _parts_of(turn: dict) -> list["str | Picture"]:
    """The texts and pictures of a turn in order."""
    kind = turn.get("type") or "text"
    if not isinstance(kind, str) or kind not in ("text", "image"):
        raise RecordFault("E_ROLE", f"type {kind!r}: expected text or image")
    if kind == "image":
        return [Picture(_field(turn, "image_path", str))]
    name = "value" if "value" in turn and "content" not in turn else "content"
    value = turn.get(name)
    if value is None or not isinstance(value, (str, list)):
        return _split(_field(turn, name, str))  # raises what is wrong with it
    return _split(value) if isinstance(value, str) else [part for item in value for part in _part(item)]


def _part(item: Any) -> list["str | Picture"]:
    """One part of a content list, as chat services write them: text, image, image_url, with their usual spellings."""
    if isinstance(item, str):
        return _split(item)
    if not isinstance(item, dict):
        raise RecordFault("E_TYPE", f"a part of a turn must be text or an object, found {type(item).__name__}")
    kind = _field(item, "type", str)
    if kind in ("text", "input_text", "output_text"):
        return _split(_field({"text": None, **item}, "text", str) if item.get("text") != "" else "")
    if kind in ("image", "image_url", "input_image"):
        for name in ("image_url", "image", "image_path", "path", "url"):
            value = item.get(name)
            value = value.get("url") if isinstance(value, dict) else value
            if value:
                return [Picture(_paths(value, name)[0])]
        return [Picture()]
    raise RecordFault("E_FORMAT", f"a part of type {kind!r}: only texts and pictures are read; leave the record out")


def _split(text: str) -> list["str | Picture"]:
    """A text cut at its marks, line ends at the marks removed."""
    pieces = text.split(IMAGE_MARK)
    parts: list[str | Picture] = [pieces[0].strip("\n") if len(pieces) > 1 else text]
    for piece in pieces[1:]:
        parts += [Picture(), piece.strip("\n")]
    return parts


def _check_order(speakers: Sequence[str]) -> None:
    if "system" in speakers[1:]:
        started = [number for number, role in enumerate(speakers) if role != "system"]
        if started and "system" in speakers[started[0] :]:
            raise RecordFault("E_ROLE", "roles out of order: a system item comes after the conversation has begun")
    spoken = [role for role in speakers if role != "system"]
    if spoken and spoken[0] == "assistant" and "user" in spoken:
        raise RecordFault("E_ROLE", "roles out of order: the assistant answers before the user has said anything")


def _with_conditions(steps: list[Step], context: Sequence[bool | None] | None = None) -> list[Step]:
    """What of each step is given to the others, from what follows it.

    A condition text may be dropped when the next target is a picture. A condition picture gives latents and ViT tokens
    when any later target is a picture, else ViT tokens alone; a target picture gives both when anything follows.
    context: per step, an explicit choice for pictures, None to decide so.
    """
    for number, step in enumerate(steps):
        later = [other for other in steps[number + 1 :] if other.target]
        chosen = context[number] if context else None
        if step.image is None:
            step.enable_cfg = not step.target and bool(later) and later[0].image is not None
        elif step.target:
            step.latents = step.vision = step.enable_cfg = number + 1 < len(steps) if chosen is None else chosen
        else:
            drawn = any(other.image is not None for other in later)
            step.vision = chosen is not False
            step.latents = step.enable_cfg = drawn and step.vision
    return steps


def _text_to_image(record: dict, draw: Choice) -> list[Step]:
    if "text_prompt" in record and "captions" in record:
        raise RecordFault("E_FORMAT", "'text_prompt' and 'captions' are both given; leave one out")
    prompts = _texts(record, "text_prompt") if "text_prompt" in record else _captions(record)
    image = _field(record, "image_path", str)
    return _with_conditions([Step(text=draw.text(prompts)), Step(image=image, target=True)])


def _captions(record: dict) -> list[str]:
    """`captions` of the released drawing data: an object or a list of captions, or such as JSON text; one is drawn."""
    value = _field(record, "captions", (str, list, dict))
    if isinstance(value, str):
        with suppress(ValueError):
            parsed = json.loads(value)
            value = parsed if isinstance(parsed, (dict, list)) else value
    texts = list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else [value]
    texts = [text for text in texts if isinstance(text, str) and text.strip()]
    if not texts:
        raise RecordFault("E_FIELD", "'captions' holds no text")
    return texts


def _understanding(record: dict, draw: Choice) -> list[Step]:
    images = _paths(_field(record, "image_path", (str, list)), "image_path")
    if "answer" in record and "caption" in record:
        raise RecordFault("E_FORMAT", "'answer' and its other name 'caption' are both given")
    answer = _texts(record, "answer" if "answer" in record else "caption")
    question = "" if record.get("question") is None else record["question"]
    if not isinstance(question, str):
        raise RecordFault("E_TYPE", f"'question' must be a string, found {type(question).__name__}")
    return _with_conditions(
        [*(Step(image=path) for path in images), Step(text=question), Step(text=draw.text(answer), target=True)]
    )


def _editing(record: dict, draw: Choice) -> list[Step]:
    sources = _paths(_field(record, "source_image_path", (str, list)), "source_image_path")
    instructions, target = _texts(record, "instruction"), _field(record, "target_image_path", str)
    return _with_conditions(
        [
            *(Step(image=path) for path in sources),
            Step(text=draw.text(instructions)),
            Step(image=target, target=True),
        ]
    )


def _multi_turn_editing(record: dict, draw: Choice) -> list[Step]:
    """From a drawn start, one turn or two; two turns are joined into one edit half of the time, as in the released data
    loader.
    """
    images = _paths(_field(record, "image_list", list), "image_list")
    turns = _field(record, "instruction_list", list)
    if len(images) < 2 or len(turns) != len(images) - 1:
        raise RecordFault(
            "E_IMAGE_COUNT",
            f"{len(images)} images need {max(1, len(images) - 1)} instructions, found "
            f"{len(turns)}; at least 2 images are needed",
        )
    texts = [_texts({"instruction_list": turn}, "instruction_list") for turn in turns]
    start = draw.number(len(images) - 1)
    end = min(start + 1 + draw.number(draw.turns), len(images) - 1)
    chosen = [draw.text(texts[turn]) for turn in range(start, end)]
    steps = [Step(image=images[start])]
    if end == start + 2 and end != len(images) - 1 and draw.number(2) == 0:
        steps += [Step(text=". ".join(chosen)), Step(image=images[end], target=True)]
    else:
        for turn, text in enumerate(chosen, start=start + 1):
            steps += [Step(text=text), Step(image=images[turn], target=True)]
    return _with_conditions(steps)


def _interleaved(record: dict, draw: Choice) -> list[Step]:
    items = _field(record, "sequence", list)
    if not items:
        raise RecordFault("E_FIELD", "'sequence' is empty")
    steps, context = [], []
    for item in items:
        if not isinstance(item, dict):
            raise RecordFault("E_TYPE", "every item of 'sequence' must be an object")
        kind, loss, given = _field(item, "type", str), item.get("loss", 0), item.get("context")
        if kind not in ("text", "image"):
            raise RecordFault("E_ROLE", f"type {kind!r}: expected text or image")
        if loss not in (0, 1):
            raise RecordFault("E_TYPE", f"'loss' must be 0 or 1, found {loss!r}")
        if given is not None and not isinstance(given, bool):
            raise RecordFault("E_TYPE", f"'context' must be true or false, found {given!r}")
        if kind == "text":
            text = "" if item.get("content") == "" else str(_field(item, "content", str))
            if not text.strip():
                continue
            steps.append(Step(text=text, target=bool(loss)))
        else:
            steps.append(Step(image=_field(item, "image_path", str), target=bool(loss)))
        context.append(given)
    return _with_conditions(steps, context)


_READERS = {
    "conversation": _conversation,
    "text_only": _conversation,
    "llava": _conversation,
    "text_to_image": _text_to_image,
    "understanding": _understanding,
    "editing": _editing,
    "multi_turn_editing": _multi_turn_editing,
    "interleaved": _interleaved,
    "messages": _conversation,
}
FORMATS = tuple(_READERS)


def _is_utf8(text: str) -> bool:
    try:
        return bool(text.encode())
    except UnicodeEncodeError:
        return False


def check_texts(steps: Sequence[Step], escape: bool) -> None:
    """Refuse text that holds one of the four marks, which would break the borders of segments, or the mark of a picture
    or video that is not there, which would be learned as words; unless it is to be read as plain text. What cannot be
    written as UTF-8 is refused in any case.
    """
    for step in steps:
        # "\udcXX" stands for a byte that is not UTF-8; other halves of a pair, which JSON allows, a text may hold
        if (step.image and not _is_utf8(step.image)) or any("\udc80" <= sign <= "\udcff" for sign in step.text or ""):
            raise RecordFault("E_JSON", "a text or path holds a byte that is not UTF-8; write it anew")
        if step.text is None or escape:
            continue
        if found := [mark for mark in SPECIAL_STRINGS if mark in step.text]:
            raise RecordFault(
                "E_SPECIAL_TOKEN",
                f"a text contains {found[0]}; remove it, or read it as plain text with --escape-special-tokens",
            )
        if found := [mark for mark in (IMAGE_MARK, *OTHER_MARKS) if mark in step.text]:
            what = "this form takes no marks" if found[0] == IMAGE_MARK else "only texts and pictures are read"
            raise RecordFault(
                "E_FORMAT",
                f"a text contains the mark {found[0]}: {what}; leave the record out, or read the mark as plain text "
                "with --escape-special-tokens",
            )


class Keyed(Choice):
    """Uniform choices from a generator."""

    def __init__(self, generator: torch.Generator):
        self.generator = generator

    def number(self, count: int) -> int:
        return int(torch.randint(count, (), generator=self.generator)) if count > 1 else 0


class Shortest(Keyed):
    """From the same start the shortest sample: one turn, the shortest of paraphrases."""

    turns = 1

    def text(self, options: Sequence[str]) -> str:
        return min(options, key=len)


class Scripted(Choice):
    """Given numbers in order, 0 after them; of paraphrases the one with the largest `size`. Notes whether it chose."""

    def __init__(self, numbers: Sequence[int], size: Callable[[str], int]):
        self.numbers, self.size, self.chose = list(numbers), size, False
        self.options: list[str] = []  # every paraphrase that was offered

    def number(self, count: int) -> int:
        self.chose |= count > 1
        return min(self.numbers.pop(0), count - 1) if self.numbers else 0

    def text(self, options: Sequence[str]) -> str:
        self.chose |= len(options) > 1
        self.options += options
        return max(options, key=self.size) if len(options) > 1 else options[0]


def scripts_of(record: dict, kind: str) -> list[list[int]]:
    """The numbers that lead to every choice of pictures which may be the longest: starts of several turns."""
    if kind != "multi_turn_editing" or not isinstance(record.get("image_list"), list):
        return [[]]
    return [[start, 1, 1] for start in range(max(1, len(record["image_list"]) - 1))]  # two turns, not joined
