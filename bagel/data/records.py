"""The record formats: how each is recognised and checked, and what it means as a sequence of texts and pictures.

A record becomes a list of Steps. The rules follow section "Data format" of the README: text of the assistant and
pictures of the assistant are learned; text and pictures of the user are conditions.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

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


Draw = Callable[[int], int]  # draw(n) -> a number below n, keyed by seed, epoch and index


def image_items(
    source: str,
    vae_size: tuple[int, int],
    vit_size: tuple[int, int],
    *,
    target: bool,
    latents: bool,
    vision: bool,
    enable_cfg: bool,
) -> list[PlanItem]:
    """A picture's copies in their order: to be generated, clean latents, ViT tokens. Sizes: (height, width), pixels."""
    items = []
    if target:
        items.append(PlanItem("vae_image", size=vae_size, source=source, loss=1))
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
    marks = {
        "conversations": "conversations" in record,
        "text_to_image": "text_prompt" in record,
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
            else f"no known format has the keys {sorted(map(str, record))[:8]}",
        )
    return _conversation_kind(record) if found == ["conversations"] else found[0]


def _conversation_kind(record: dict) -> str:
    turns = _field(record, "conversations", list)
    if not turns:
        raise RecordFault("E_FIELD", "'conversations' is empty")
    if not all(isinstance(turn, dict) for turn in turns):
        raise RecordFault("E_TYPE", "every item of 'conversations' must be an object")
    by_role, by_from = [any(key in turn for turn in turns) for key in ("role", "from")]
    if by_role and by_from:
        raise RecordFault("E_FORMAT", "items of 'conversations' mix 'role' and 'from'")
    if not (by_role or by_from):
        raise RecordFault("E_FIELD", "items of 'conversations' have neither 'role' nor 'from'")
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


def steps_of(record: dict, kind: str, draw: Draw) -> list[Step]:
    """The record as steps; `draw` chooses among paraphrases and turns. Raises a RecordFault."""
    if not isinstance(record.get("id", ""), (str, int)) or isinstance(record.get("id"), bool):
        raise RecordFault("E_TYPE", f"'id' must be a string, found {type(record['id']).__name__}")
    weight = record.get("weight", 1.0)
    if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 < weight <= MAX_WEIGHT:
        raise RecordFault("E_TYPE", f"'weight' must be a number above 0 and at most {MAX_WEIGHT}, found {weight!r}")
    steps = [step for step in _READERS[kind](record, draw) if step.image is not None or step.text.strip()]
    if not any(step.target for step in steps):
        raise RecordFault("E_NO_TARGET", "nothing to learn: no text or picture of the assistant")
    return steps


def _conversation(record: dict, draw: Draw) -> list[Step]:
    steps, speakers = [], []
    for turn in record["conversations"]:
        role, kind = _field(turn, "role", str), _field(turn, "type", str, "text")
        if role not in ("system", "user", "assistant"):
            raise RecordFault("E_ROLE", f"role {role!r}: expected system, user or assistant")
        if kind not in ("text", "image"):
            raise RecordFault("E_ROLE", f"type {kind!r}: expected text or image")
        speakers.append(role)
        if kind == "text":
            steps.append(Step(text=_field(turn, "content", str), target=role == "assistant"))
        else:
            steps.append(Step(image=_field(turn, "image_path", str), target=role == "assistant"))
    _check_order(speakers)
    return _with_conditions(steps)


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


def _llava(record: dict, draw: Draw) -> list[Step]:
    images = _paths(record["image"], "image") if "image" in record else []
    pending = list(images)
    steps, speakers, marks = [], [], 0
    for turn in record["conversations"]:
        speaker, value = _field(turn, "from", str), _field(turn, "value", str)
        if speaker not in ("human", "gpt", "system"):
            raise RecordFault("E_ROLE", f"from {speaker!r}: expected human, gpt or system")
        speakers.append({"human": "user", "gpt": "assistant", "system": "system"}[speaker])
        parts = value.split("<image>") if speaker == "human" else [value]
        for number, part in enumerate(parts):
            if number > 0:
                marks += 1
                if pending:
                    steps.append(Step(image=pending.pop(0)))
            steps.append(Step(text=part.strip("\n") if len(parts) > 1 else part, target=speaker == "gpt"))
    if marks and marks != len(images):
        raise RecordFault("E_IMAGE_COUNT", f"{marks} <image> marks for {len(images)} images")
    if not marks:
        steps = [Step(image=path) for path in images] + steps
    _check_order(speakers)
    steps = [step for step in steps if step.image is not None or step.text.strip()]
    return _with_conditions(steps)


def _text_to_image(record: dict, draw: Draw) -> list[Step]:
    prompts = _texts(record, "text_prompt")
    image = _field(record, "image_path", str)
    return _with_conditions([Step(text=prompts[draw(len(prompts))]), Step(image=image, target=True)])


def _understanding(record: dict, draw: Draw) -> list[Step]:
    images = _paths(_field(record, "image_path", (str, list)), "image_path")
    if "answer" in record and "caption" in record:
        raise RecordFault("E_FORMAT", "'answer' and its other name 'caption' are both given")
    answer = _texts(record, "answer" if "answer" in record else "caption")
    question = record.get("question", "")
    if not isinstance(question, str):
        raise RecordFault("E_TYPE", f"'question' must be a string, found {type(question).__name__}")
    return _with_conditions(
        [*(Step(image=path) for path in images), Step(text=question), Step(text=answer[draw(len(answer))], target=True)]
    )


def _editing(record: dict, draw: Draw) -> list[Step]:
    sources = _paths(_field(record, "source_image_path", (str, list)), "source_image_path")
    instructions, target = _texts(record, "instruction"), _field(record, "target_image_path", str)
    return _with_conditions(
        [
            *(Step(image=path) for path in sources),
            Step(text=instructions[draw(len(instructions))]),
            Step(image=target, target=True),
        ]
    )


def _multi_turn_editing(record: dict, draw: Draw) -> list[Step]:
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
    start = draw(len(images) - 1)
    end = min(start + 1 + draw(2), len(images) - 1)
    chosen = [texts[turn][draw(len(texts[turn]))] for turn in range(start, end)]
    steps = [Step(image=images[start])]
    if end == start + 2 and end != len(images) - 1 and draw(2) == 0:
        steps += [Step(text=". ".join(chosen)), Step(image=images[end], target=True)]
    else:
        for turn, text in enumerate(chosen, start=start + 1):
            steps += [Step(text=text), Step(image=images[turn], target=True)]
    return _with_conditions(steps)


def _interleaved(record: dict, draw: Draw) -> list[Step]:
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
            text = _field(item, "content", str)
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
    "llava": _llava,
    "text_to_image": _text_to_image,
    "understanding": _understanding,
    "editing": _editing,
    "multi_turn_editing": _multi_turn_editing,
    "interleaved": _interleaved,
}
FORMATS = tuple(_READERS)


def check_texts(steps: Sequence[Step], escape: bool) -> None:
    """Refuse text that holds one of the four marks, which would break the borders of segments, unless it is escaped."""
    for step in steps:
        if step.text is not None and not escape:
            found = [mark for mark in SPECIAL_STRINGS if mark in step.text]
            if found:
                raise RecordFault(
                    "E_SPECIAL_TOKEN",
                    f"a text contains {found[0]}; remove it, or read it as plain text with --escape-special-tokens",
                )


def keyed_draw(generator: torch.Generator) -> Draw:
    """Uniform whole numbers from a generator."""
    return lambda count: int(torch.randint(count, (), generator=generator)) if count > 1 else 0
