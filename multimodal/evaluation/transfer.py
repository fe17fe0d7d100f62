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
FEWEST = 5  # classes, whose 120 orders can show a p below 0.01
NEAREST = 5
# Words that captions of anything hold, and that name nothing to be seen and heard.
PLAIN = frozenset(
    """the and with for from that this are was has its one two three four five some several single other over under into
    onto near next side picture image photo photograph drawing icon emoji shows view scene background plain white black
    red green blue yellow orange purple pink brown grey gray dark light bright colour colours color colored coloured
    mostly group object objects middle rendered glossy symbols sound sounds noise noises clip recording recorded played
    playing heard hear short long loud quiet soft low high note notes pitch sample music musical instrument instruments
    being while then there very small large big little made make makes making kind type part""".split()
)


def names_of(captions: list[str]) -> set[str]:
    """The words that name an item: those in more than half of its captions, plurals without their s. What single
    captions say besides, such as `upward` or `bright`, names no class.
    """
    counts: Counter[str] = Counter()
    for text in captions:
        words = set(re.findall("[a-z]+", text.lower()))
        counts.update({word.removesuffix("s") if len(word) > SHORTEST + 1 else word for word in words})
    usual = {word for word, count in counts.items() if 2 * count > len(captions) and len(word) >= SHORTEST}
    return {word for word in usual if word not in PLAIN and f"{word}s" not in PLAIN}


def transfer(splits: dict[str, "Split"]) -> dict[str, float | list[str]]:
    """Picture-to-sound retrieval over the classes that captions of both name, each class counted once: the share of a
    class' sounds among the five nearest to its pictures, AUC (the chance that a sound of the class lies nearer than
    another), what other classes' pictures give, and p, how often classes in a random order do as well. {} where
    fewer than five classes are named by both.

    Whole classes are exchanged, not single sounds: those of one instrument resemble each other, and a test that takes
    them apart would find what is not there.
    """
    kinds = [
        [split for split in splits.values() if split.kind == kind and split.captions_CE is not None]
        for kind in ("image", "audio")
    ]
    named = [[names_of(texts) for split in own for texts in captions_by_item(split)] for own in kinds]
    classes = sorted(set().union(*named[0]) & set().union(*named[1]))
    if len(classes) < FEWEST:
        return {}
    places = [[row for row, words in enumerate(own) if words.intersection(classes)] for own in named]
    pictures_PE, sounds_SE = (
        np.concatenate([split.items_IE.numpy() for split in own])[rows] for own, rows in zip(kinds, places, strict=True)
    )
    # What a modality has in common says nothing of a single picture or sound: the embeddings of each lie in a cone of
    # their own, and without its mean the same few sounds would be near every picture.
    pictures_PE, sounds_SE = (rows - rows.mean(0) for rows in (pictures_PE, sounds_SE))
    sounds_SE /= np.linalg.norm(sounds_SE, axis=1, keepdims=True) + 1e-9
    order_PS = np.argsort(-(pictures_PE @ sounds_SE.T), axis=1, kind="stable")
    of_PC, of_SC = (
        np.array([[name in own[row] for name in classes] for row in rows], float)
        for own, rows in zip(named, places, strict=True)
    )
    weight_CP = (of_PC / of_PC.sum(0)).T
    nearest_CC = weight_CP @ of_SC[order_PS[:, :NEAREST]].mean(1)  # pictures of a class by sounds of a class
    rank_PS = order_PS.argsort(1)
    count_C = of_SC.sum(0)
    before = rank_PS @ of_SC - count_C * (count_C - 1) / 2  # pairs of a sound of the class and one of others before it
    auc_CC = weight_CP @ (1 - before / (count_C * np.maximum(len(of_SC) - count_C, 1)))
    generator = np.random.default_rng(0)
    own = float(np.trace(auc_CC))
    drawn = [auc_CC[range(len(classes)), generator.permutation(len(classes))].sum() for _ in range(DRAWS)]
    return {
        "pictures": len(of_PC),
        "sounds": len(of_SC),
        "classes": classes,
        f"precision@{NEAREST}": float(np.trace(nearest_CC)) / len(classes),
        "chance": float(nearest_CC.mean()),
        "AUC": own / len(classes),
        "AUC_chance": float(auc_CC.mean()),
        "p": (1 + sum(bool(value >= own - 1e-9) for value in drawn)) / (1 + DRAWS),
    }


def captions_by_item(split: "Split") -> list[list[str]]:
    """The captions of each item."""
    found: list[list[str]] = [[] for _ in split.ids]
    for owner, text in zip(split.owners, split.caption_texts, strict=True):
        found[owner].append(text)
    return found
