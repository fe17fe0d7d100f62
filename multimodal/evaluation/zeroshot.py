"""Zero-shot classification: each class is the mean of its name in several sentences.

Legend: I items, C classes, E embedding width.
"""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from multimodal.data.audio import AUDIO_SUFFIXES
from multimodal.data.image import IMAGE_SUFFIXES
from multimodal.data.records import SPLIT_NAMES, Folder, Kind, clean, read_csv
from multimodal.evaluation.retrieval import mean_average_precision
from multimodal.weights.open import Embedder
from shared.errors import UserError
from shared.media.folders import is_junk

TEMPLATES: dict[str, tuple[str, ...]] = {
    "image": (
        "a photo of a {}.",
        "a photo of the {}.",
        "a photo of one {}.",
        "a photo of many {}.",
        "a photo of a small {}.",
        "a photo of a large {}.",
        "a blurry photo of a {}.",
        "a close-up photo of a {}.",
    ),
    "audio": ("this is a sound of {}.", "the sound of {}."),
}


def class_vectors(embedder: Embedder, names: list[str], kind: Kind) -> Tensor:
    """(C, E) unit vectors: each sentence's embedding normalised, averaged, normalised again."""
    templates = TEMPLATES[kind]
    vectors = embedder.texts([template.format(name) for name in names for template in templates])
    return functional.normalize(vectors.view(len(names), len(templates), -1).mean(1), dim=-1)


def single_label(items_IE: Tensor, classes_CE: Tensor, labels: list[int]) -> dict[str, float]:
    """Share of items whose nearest class is theirs, and among the five nearest."""
    ranked = (items_IE @ classes_CE.T).argsort(dim=1, descending=True, stable=True)
    place = (ranked == torch.tensor(labels)[:, None]).int().argmax(1)
    return {
        "items": len(labels),
        "accuracy": float((place < 1).float().mean()),
        "top5": float((place < 5).float().mean()),
        "chance": 1 / len(classes_CE),
    }


def multi_label(items_IE: Tensor, classes_CE: Tensor, labels_IC: Tensor) -> dict[str, float]:
    """hit@1 (the nearest class is among the item's labels) and mAP, over items that have a label."""
    labelled = labels_IC.sum(1) > 0
    scores = (items_IE @ classes_CE.T)[labelled].numpy()
    labels = labels_IC[labelled].numpy().astype(bool)
    hits = labels[np.arange(len(labels)), scores.argmax(1)]
    return {
        "items": len(labels),
        "hit@1": float(hits.mean()),
        "mAP": mean_average_precision(scores, labels),
        "chance": float(labels.mean()),
    }


def labelled_files(folder: Path) -> tuple[list[Path], list[int], list[str], Kind]:
    """Files, class indices, class names and kind, from the ESC-50 layout (meta/esc50.csv, audio/) or a folder for each
    class.
    """
    if (folder / "meta" / "esc50.csv").exists():
        path = folder / "meta" / "esc50.csv"
        rows = read_csv(path, ("filename", "category"))[0]
        if not rows:
            raise UserError(f"--zeroshot {folder}: {path} lists no sound; fetch it again")
        classes = [clean(row["category"].replace("_", " ")) for row in rows]
        if "" in classes:
            raise UserError(f"--zeroshot {folder}: {path}: {rows[classes.index('')]['filename']} has no category")
        names, audio = sorted(set(classes)), Folder(folder / "audio")
        places = [audio.find(row["filename"]) or folder / "audio" / row["filename"] for row in rows]
        return places, [names.index(name) for name in classes], names, "audio"
    folders = sorted(path for path in folder.iterdir() if path.is_dir() and not is_junk(path))
    files = [
        (path, place)
        for place, own in enumerate(folders)
        for path in sorted(own.rglob("*"))
        if path.suffix.lower() in (*IMAGE_SUFFIXES, *AUDIO_SUFFIXES) and not is_junk(path, own)
    ]
    kinds: set[Kind] = {"image" if path.suffix.lower() in IMAGE_SUFFIXES else "audio" for path, _ in files}
    if len(kinds) != 1:
        raise UserError(
            f"--zeroshot {folder}: a folder for each class, all with pictures or all with sounds, or the ESC-50 layout "
            "is "
            f"wanted; found {' and '.join(sorted(kinds)) or 'no such file'}"
        )
    names = [clean(own.name.replace("_", " ")) for own in folders]
    _check_names(folder, folders, names)
    return [path for path, _ in files], [place for _, place in files], names, kinds.pop()


def _check_names(folder: Path, folders: list[Path], names: list[str]) -> None:
    """UserError where folders name no classes, or two the same: of those only one could ever be right."""
    by_name: dict[str, Path] = {}
    for own, name in zip(folders, names, strict=True):
        if not any(letter.isalnum() for letter in name):
            raise UserError(f"--zeroshot {folder}: folder {own.name!r} names no class; rename it")
        other = by_name.setdefault(name.casefold(), own)
        if other is not own:
            raise UserError(f"--zeroshot {folder}: folders {other.name!r} and {own.name!r} name one class; join them")
    splits = {word for words in SPLIT_NAMES.values() for word in words}
    if set(by_name) <= splits:
        raise UserError(
            f"--zeroshot {folder}: its folders are splits ({', '.join(names)}), not classes; give one of them"
        )


def classify_folder(embedder: Embedder, folder: Path) -> dict[str, float]:
    """Zero-shot accuracy on labelled_files."""
    files, labels, names, kind = labelled_files(folder)
    vectors, good = embedder.images(files) if kind == "image" else embedder.sounds(files)
    label_of = dict(zip(files, labels, strict=True))
    return {
        "classes": len(names),
        **single_label(vectors, class_vectors(embedder, names, kind), [label_of[path] for path in good]),
    }
