"""The record formats as data: what each is recognised by, its fields, and examples that load.

python bagel/data/format.py        writes bagel/data/format.json
"""

import sys
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import json
from typing import Any

SCHEMA_VERSION = 1
COMMON = {
    "id": "string; shown in error messages",
    "weight": "number above 0, at most 1000; how often the record comes in an epoch on average",
}
PATH = "string; absolute, or relative to --image-root, else to the record file's folder"

FORMATS: dict[str, dict[str, Any]] = {
    "conversation": {
        "description": "Turns of system, user and assistant; what the assistant says and draws is learned.",
        "required": {"conversations": "list of {role: system|user|assistant, type: text|image, content or image_path}"},
        "optional": COMMON,
        "examples": [
            {
                "conversations": [
                    {"role": "user", "type": "text", "content": "Please draw a red apple"},
                    {"role": "assistant", "type": "image", "image_path": "images/apple.png"},
                ]
            },
            {
                "conversations": [
                    {"role": "user", "type": "image", "image_path": "images/cat.png"},
                    {"role": "user", "type": "text", "content": "What does this picture show?"},
                    {"role": "assistant", "type": "text", "content": "A cat."},
                ]
            },
        ],
    },
    "llava": {
        "description": "The form of LLaVA; <image> in a human turn marks a picture, else pictures come first.",
        "required": {"conversations": "list of {from: human|gpt|system, value: string}"},
        "optional": {"image": "path or list of paths, as many as there are marks", **COMMON},
        "examples": [
            {
                "id": "llava-1",
                "image": "images/cat.png",
                "conversations": [
                    {"from": "human", "value": "<image>\nWhat is this?"},
                    {"from": "gpt", "value": "A cat."},
                ],
            }
        ],
    },
    "text_to_image": {
        "description": "A picture drawn from a text; of several captions one is drawn for each epoch.",
        "required": {"text_prompt": "string or list of strings", "image_path": PATH},
        "optional": COMMON,
        "examples": [
            {"text_prompt": "A red apple on white", "image_path": "images/apple.png"},
            {"text_prompt": ["An apple", "A red apple"], "image_path": "images/apple.png", "weight": 2},
        ],
    },
    "understanding": {
        "description": "A text about one or more pictures.",
        "required": {
            "image_path": "path or list of paths",
            "answer": "string or list of strings; `caption` is another name",
        },
        "optional": {"question": "string; none by default", **COMMON},
        "examples": [
            {"image_path": "images/cat.png", "question": "What is it?", "answer": "A cat."},
            {"image_path": ["images/cat.png", "images/apple.png"], "caption": "A cat and an apple."},
        ],
    },
    "editing": {
        "description": "A picture changed as told.",
        "required": {
            "source_image_path": "path or list of paths",
            "instruction": "string or list of strings",
            "target_image_path": PATH,
        },
        "optional": COMMON,
        "examples": [
            {
                "source_image_path": "images/apple.png",
                "instruction": "Make it green",
                "target_image_path": "images/green.png",
            }
        ],
    },
    "multi_turn_editing": {
        "description": "A row of edits; a start and one or two turns are drawn each epoch, two may be joined.",
        "required": {
            "image_list": "list of two or more paths",
            "instruction_list": "one entry fewer; each a string or a list of paraphrases",
        },
        "optional": COMMON,
        "examples": [
            {
                "image_list": ["images/apple.png", "images/green.png", "images/cat.png"],
                "instruction_list": ["Make it green", ["Replace it by a cat", "Turn it into a cat"]],
            }
        ],
    },
    "interleaved": {
        "description": "Texts and pictures in any order, each learned or not; `context`: later items see the picture.",
        "required": {
            "sequence": "list of {type: text, content, loss} and {type: image, image_path, loss, context}; loss 0 or 1"
        },
        "optional": COMMON,
        "examples": [
            {
                "sequence": [
                    {"type": "text", "content": "First an apple:"},
                    {"type": "image", "image_path": "images/apple.png", "loss": 1, "context": True},
                    {"type": "text", "content": "It is red.", "loss": 1},
                ]
            }
        ],
    },
    "text_only": {
        "description": "A conversation with texts alone.",
        "required": {"conversations": "as in conversation, or turns with `from`, without pictures"},
        "optional": COMMON,
        "examples": [
            {
                "conversations": [
                    {"role": "user", "type": "text", "content": "Hello"},
                    {"role": "assistant", "type": "text", "content": "Hello, what shall I draw?"},
                ]
            }
        ],
    },
}


def as_json() -> str:
    """The content of format.json."""
    return json.dumps({"schema_version": SCHEMA_VERSION, "formats": FORMATS}, ensure_ascii=False, indent=2) + "\n"


if __name__ == "__main__":
    path = Path(__file__).resolve().parent / "format.json"
    path.write_text(as_json(), encoding="utf-8")
    print(f"wrote {path}")
