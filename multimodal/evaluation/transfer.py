"""Do pictures find sounds? They were never paired: both were only trained against texts.

Legend: P pictures, S sounds, E embedding width.
"""

import re
from collections import Counter
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from multimodal.evaluation.held_out import Split

DRAWS = 2000
SHORTEST = 3  # letters of a word that may name a class
MOST = 0.2  # share of the items of a kind that a class may have
# Words that captions of anything hold, and that name nothing to be seen and heard.
PLAIN = frozenset(
    """the and with for from that this are was has its one two three four five some several single other over under into
    onto near next side picture image photo photograph drawing icon emoji shows view scene background plain white black
    red green blue yellow orange purple pink brown grey gray dark light bright colour colours color colored coloured
    mostly group object objects middle rendered glossy symbols sound sounds noise noises clip recording recorded played
    playing heard hear short long loud quiet soft low high note notes pitch sample music musical instrument instruments
    being while then there very small large big little made make makes making kind type part""".split()
)


def words_of(captions: list[str]) -> set[str]:
    """The words of an item's captions that may name what it is, plurals without their s."""
    found = {word for text in captions for word in re.findall("[a-z]+", text.lower())}
    found = {word.removesuffix("s") if len(word) > SHORTEST + 1 else word for word in found}
    return {word for word in found if len(word) >= SHORTEST and word not in PLAIN and f"{word}s" not in PLAIN}


def transfer(splits: dict[str, "Split"]) -> dict[str, float | list[str]]:
    """Picture-to-sound retrieval over the classes that captions of both name: mean precision at 5, what random sounds
    would give, and the p of a permutation of the sounds; {} where fewer than three classes are named by both.
    """
    pictures = [split for split in splits.values() if split.kind == "image" and split.captions_CE is not None]
    sounds = [split for split in splits.values() if split.kind == "audio" and split.captions_CE is not None]
    if not pictures or not sounds:
        return {}
    named = [[words_of(texts) for split in part for texts in captions_by_item(split)] for part in (pictures, sounds)]
    shared = _names(named[0]) & _names(named[1])
    picture_rows = [row for row, words in enumerate(named[0]) if words & shared]
    sound_rows = [row for row, words in enumerate(named[1]) if words & shared]
    if len(shared) < 3 or len(picture_rows) < 3 or len(sound_rows) < 6:
        return {}
    pictures_PE = np.concatenate([split.items_IE.numpy() for split in pictures])[picture_rows]
    sounds_SE = np.concatenate([split.items_IE.numpy() for split in sounds])[sound_rows]
    # What a modality has in common says nothing of a single picture or sound: the embeddings of each lie in a cone of
    # their own, and without its mean the same few sounds would be near every picture.
    pictures_PE, sounds_SE = (rows - rows.mean(0) for rows in (pictures_PE, sounds_SE))
    sounds_SE /= np.linalg.norm(sounds_SE, axis=1, keepdims=True) + 1e-9
    scores_PS = pictures_PE @ sounds_SE.T
    words_S = [named[1][row] & shared for row in sound_rows]
    right_PS = np.array([[bool(named[0][row] & own) for own in words_S] for row in picture_rows])
    nearest = np.argsort(-scores_PS, axis=1, kind="stable")[:, :5]

    def precision(right: np.ndarray) -> float:
        return float(np.take_along_axis(right, nearest, 1).mean())

    own, generator = precision(right_PS), np.random.default_rng(0)
    drawn = [precision(right_PS[:, generator.permutation(len(sound_rows))]) for _ in range(DRAWS)]
    return {
        "pictures": len(picture_rows),
        "sounds": len(sound_rows),
        "classes": sorted(shared),
        "precision@5": own,
        "chance": float(right_PS.mean()),
        "p": (1 + sum(value >= own for value in drawn)) / (1 + DRAWS),
    }


def _names(words_by_item: list[set[str]]) -> set[str]:
    """The words that name some of the items, not many of them: `hand` in a third of the pictures names no class."""
    counts = Counter(word for words in words_by_item for word in words)
    return {word for word, count in counts.items() if count <= MOST * len(words_by_item)}


def captions_by_item(split: "Split") -> list[list[str]]:
    """The captions of each item."""
    found: list[list[str]] = [[] for _ in split.ids]
    for owner, text in zip(split.owners, split.caption_texts, strict=True):
        found[owner].append(text)
    return found
