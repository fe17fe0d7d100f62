"""The data sets as they lie on people's disks: each reader takes a folder and a split and gives records.

All readers: Found(no records) where the set has no such split; MissingData where the set itself is not there. Rows
that cannot be used are left out, counted and named; rows whose file is not there are counted.
"""

import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import Any

from multimodal.data.audio import AUDIO_SUFFIXES
from multimodal.data.records import (
    CAPTION_KEYS,
    FILE_KEYS,
    SPLIT_NAMES,
    Folder,
    Found,
    ListRecords,
    MissingData,
    Packer,
    captions_of,
    clean,
    json_items,
    jsonl_rows,
    kind_by_name,
    kind_of,
    labels_of,
    not_text,
    read_csv,
    text_lines,
)
from shared.errors import UserError
from shared.media.folders import files_in

CLOTHO_SPLITS = {"train": "development", "val": "validation", "test": "evaluation"}
VOX_SPLITS = {1: "train", 2: "val", 3: "test"}
CLIP_FOLDERS = ("", "audio", "audios", "wavs", "waveforms", "clips")  # where clips lie, with or without the split
AUDIOCAPS_STEPS = (
    "its clips are handed out by its authors (https://forms.gle/2wF54Y1Ft2LtPdhW8); lay them into audio/train/, "
    "audio/val/ and audio/test/, named ID_START.wav or as listed in multimodal/README.md"
)


def remedy(name: str, folder: Path) -> str:
    """How to get a data set that is not there."""
    if name in ("coco", "clotho", "audiocaps", "voxceleb"):
        return (
            f"python multimodal/download_datasets.py --datasets {name} --data-root {folder.parent} fetches it, "
            "--config small trains on the sample data"
        )
    return f"lay it there, or give its place with --set data.paths='{{{name}: FOLDER}}'"


def no_file(name: str, path: Path, split: str) -> Found:
    """For a list that is not there: no records of this split, but a training split is needed."""
    if split == "train":
        raise MissingData(f"data set {name}: no file {path}; {remedy(name, path.parent)}")
    return Found(ListRecords())


# --- COCO -------------------------------------------------------------------------------------------------------------


def read_coco(folder: Path, split: str) -> Found:
    """train2017/ and val2017/ with annotations/captions_*2017.json, and instances_*2017.json where they are.

    Its test2017 has no captions, so there is no test split; Karpathy's has one.
    """
    if split == "test":
        return Found(ListRecords())
    year = f"{split}2017"
    path = folder / "annotations" / f"captions_{year}.json"
    if not path.exists():
        return no_file("coco", path, split)
    bad: list[str] = []
    captions: dict[int | str, list[str]] = {}
    names: dict[int | str, str] = {}
    for place, (kind, entry) in enumerate(json_items(path, ("images", "annotations"))):
        try:
            if not isinstance(entry, dict):
                raise TypeError(f"{entry!r} is no object")
            if kind == "images":
                key = _number(entry["id"])
                names.setdefault(key, str(entry.get("file_name") or f"{coco_name(key)}.jpg"))
            else:
                captions.setdefault(_number(entry["image_id"]), []).extend(captions_of(entry))
                if not any(name in entry for name in CAPTION_KEYS):
                    raise KeyError("caption")
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            bad.append(f"{kind} entry {place}: {_said(error)}")
    labels = read_coco_labels(folder / "annotations" / f"instances_{year}.json", bad)
    files, packer, bases = Folder(folder / year), Packer("coco"), unique_bases(names.values())
    missing = 0
    for key in sorted(names, key=lambda key: (isinstance(key, str), key)):
        texts = captions.get(key)
        if texts is None:  # in the list of pictures, without an entry of its own
            continue
        file = (files.find(names[key]) or files.find(bases.get(names[key], ""))) if texts else None
        if file is None:
            missing += 1
        else:
            own = None if labels is None else labels.get(key, ())
            packer.add(f"coco/{coco_name(key)}", file, texts, "image", own)
    return Found(packer.records(), missing, bad).checked(path)


def unique_bases(names: Iterable[str]) -> dict[str, str]:
    """The last part of listed names, by the name: what lay in several folders may lie in one. Not where two names end
    alike, since whose file it is cannot be told then.
    """
    ends = {name: re.split(r"[/\\]", name)[-1] for name in names}
    counts = Counter(ends.values())
    return {name: end for name, end in ends.items() if counts[end] == 1}


def coco_name(key: int | str) -> str:
    """What a picture of this id is called on disk, without the suffix."""
    return f"{key:012d}" if isinstance(key, int) else key


def read_coco_labels(path: Path, bad: list[str]) -> dict[int | str, tuple[int, ...]] | None:
    """Picture id -> class indices: ranks of the category ids, since the 80 ids run 1..90 with gaps.

    Read entry by entry: as one tree the file of the training set, 448 MB of outlines, takes 2.3 GB.
    """
    if not path.exists():
        return None
    categories: list[int | str] = []
    pairs: dict[int | str, set[int | str]] = {}
    for kind, entry in json_items(path, ("annotations", "categories")):
        try:
            if not isinstance(entry, dict):
                raise TypeError(f"{entry!r} is no object")
            if kind == "categories":
                categories.append(_number(entry["id"]))
            else:
                pairs.setdefault(_number(entry["image_id"]), set()).add(_number(entry["category_id"]))
        except (KeyError, TypeError, ValueError) as error:
            bad.append(f"{path.name}: {kind}: {_said(error)}")
    ordered = sorted(set(categories), key=lambda key: (isinstance(key, str), key))
    rank = {key: place for place, key in enumerate(ordered)}
    unknown = {key for found in pairs.values() for key in found} - rank.keys()
    bad += [f"{path.name}: category {key!r} is not among its categories" for key in sorted(unknown, key=str)]
    return {key: tuple(sorted(rank[one] for one in found if one in rank)) for key, found in pairs.items()}


def coco_class_names(folder: Path) -> list[str]:
    """The 80 names in the order of the class indices."""
    path = folder / "annotations" / "instances_val2017.json"
    try:
        found = {_number(entry["id"]): str(entry["name"]) for _, entry in json_items(path, ("categories",))}
    except (KeyError, TypeError) as error:
        raise UserError(f"{path}: a category {_said(error)}; download it again") from None
    return [found[key] for key in sorted(found, key=lambda key: (isinstance(key, str), key))]


def read_karpathy(folder: Path, split: str, name: str = "coco") -> Found:
    """Karpathy's splits (train includes restval): dataset_coco.json with train2014/ and val2014/ or the folders of
    2017, or dataset_flickr30k.json.
    """
    path = folder / f"dataset_{name}.json"
    if not path.exists():
        raise MissingData(f"data set {name}: no file {path}; download_datasets.py --datasets coco --splits karpathy")
    files, packer, missing, bad = Folder(folder), Packer(name), 0, []
    for place, (_, image) in enumerate(json_items(path, ("images",))):
        try:
            if split_named(image["split"]) != split:
                continue
            texts = captions_of({"captions": [sentence["raw"] for sentence in image["sentences"] or ()]})
            if name == "coco":
                number = coco_name(_number(image["cocoid"]))
                own = f"coco/{number}"
                places = [f"{year}/{number}.jpg" for year in ("train2017", "val2017")]
                places.insert(0, f"{image['filepath']}/{image['filename']}")
            else:
                own, places = f"{name}/{image['filename']}", [f"{top}/{image['filename']}" for top in FLICKR_FOLDERS]
        except (KeyError, TypeError, ValueError) as error:
            bad.append(f"picture {place}: {_said(error)}")
            continue
        file = next((file for file in map(files.find, places) if file is not None), None)
        if file is None or not texts:
            missing += 1
        else:
            packer.add(own, file, texts, "image")
    return Found(packer.records(), missing, bad).checked(path)


FLICKR_FOLDERS = ("flickr30k-images", "flickr30k_images", "Images", "images", "Flicker8k_Dataset", ".")
FLICKR_LISTS = ("results_20130124.token", "results.csv", "captions.txt", "Flickr8k.token.txt")


def read_flickr30k(folder: Path, split: str) -> Found:
    """Flickr30k and 8k: Karpathy's dataset_flickr30k.json, else results_20130124.token (`x.jpg#0<TAB>caption`) or the
    tables that Kaggle hands out, all of which is training data then.
    """
    if (folder / "dataset_flickr30k.json").exists():
        return read_karpathy(folder, split, "flickr30k")
    path = next((folder / name for name in FLICKR_LISTS if (folder / name).exists()), folder / FLICKR_LISTS[0])
    if split != "train" or not path.exists():
        return no_file("flickr30k", path, split)
    captions: dict[str, list[str]] = {}
    bad, is_numbered = [], False
    for number, line in text_lines(path):
        found = re.match(r"""\s*"?([^|,;\t#"]+?\.\w+)"?(?:\#\d+)?\s*(\|\s*\d+\s*\||,"\d+",|[,;\t|])(.*)""", line)
        if (
            number == 1 and not found
        ):  # Kaggle's tables have a column for the number of a caption; one row lacks its end
            is_numbered = re.search(r"""[|,;\t]\s*"?\w*number""", line.casefold()) is not None
        rest = found[3] if found else ""
        if found and is_numbered and len(found[2]) == 1:
            rest = re.sub(r"^\s*\d+\s*[|,;\t]?", "", rest)
        if found and (text := clean(rest.strip(' "').replace('""', '"'))):
            captions.setdefault(found[1], []).append(text)
        elif line.strip() and number > 1:  # the first may be a table's head
            bad.append(f"line {number} has no picture and caption")
    files, packer, missing = Folder(folder), Packer("flickr30k"), 0
    for name, texts in captions.items():
        image = next((image for top in FLICKR_FOLDERS if (image := files.find(f"{top}/{name}")) is not None), None)
        if image is None:
            missing += 1
        else:
            packer.add(f"flickr30k/{name}", image, texts, "image")
    return Found(packer.records(), missing, bad).checked(path)


# --- sound ------------------------------------------------------------------------------------------------------------


def read_clotho(folder: Path, split: str) -> Found:
    """clotho_captions_{development,validation,evaluation}.csv (UTF-8) and the folders of those names."""
    name = CLOTHO_SPLITS[split]
    path = folder / f"clotho_captions_{name}.csv"
    if not path.exists():
        return no_file("clotho", path, split)
    rows, bad = read_csv(path, ("file_name", "caption_1"))
    files, packer, missing = Folder(folder / name), Packer("clotho"), 0
    bases = unique_bases(row["file_name"] for row in rows)
    for row in rows:
        texts = [clean(row[key] or "") for key in sorted(key for key in row if key and key.startswith("caption_"))]
        file = files.find(row["file_name"]) or files.find(bases.get(row["file_name"], ""))
        if file is not None and any(texts):
            packer.add(f"clotho/{name}/{file.name}", file, filter(None, texts), "audio")
        else:
            missing += 1
    return Found(packer.records(), missing, bad, packer.repeated).checked(path)


def read_audiocaps(folder: Path, split: str) -> Found:
    """{train,val,test}.csv (one caption a row; several rows a clip) and the clips: see clips_below."""
    path = folder / f"{split}.csv"
    if not path.exists():
        return no_file("audiocaps", path, split)
    captions: dict[tuple[str, str], list[str]] = {}
    rows, bad = read_csv(path, ("youtube_id", "start_time", "caption"))
    numbers: dict[str, tuple[str, str]] = {}  # audiocap_id, another name of a clip
    seen: dict[tuple[str, float], Clip] = {}
    for row in rows:
        key = clip_of(row, seen)
        if key is None:
            bad.append(f"{row['youtube_id']}: start_time {row['start_time']!r} is no number")
        elif text := clean(row["caption"]):
            captions.setdefault(key, []).append(text)
            numbers[row.get("audiocap_id") or ""] = key
    clips = clips_below(folder, split, captions, numbers)
    packer = Packer("audiocaps")
    for key, texts in captions.items():
        if key in clips:
            packer.add(f"audiocaps/{split}/{key[0]}_{key[1]}", clips[key], texts, "audio")
    return Found(packer.records(), len(captions) - len(clips), bad).checked(path)


Clip = tuple[str, str]  # a video's id and the start of the clip in it, in seconds, as the table writes it


def clip_of(row: dict[str, str], seen: dict[tuple[str, float], Clip]) -> Clip | None:
    """The clip of a row, as the first row wrote it: 30 and 30.0 are one start. None where the start is no number."""
    start, own = _seconds(row["start_time"]), (row["youtube_id"].strip(), row["start_time"].strip())
    return None if start is None else seen.setdefault((own[0], start), own)


def clips_below(
    folder: Path, split: str, wanted: Iterable[Clip], numbers: dict[str, Clip] | None = None
) -> dict[Clip, Path]:
    """The files of these clips, in SPLIT/, audio/SPLIT/, wavs/SPLIT/ and the like, or in those without the split.

    A file is named by the video's id (with or without Y before it) and the start: ID_30, ID_30.0, ID_000030, ID.30,
    ID_30_40, ID_30.000_40.000, ID_30000_40000 (milliseconds); by ID alone, where only one clip of that video is
    listed; or by its number in the table. Empty files count as missing.
    """
    starts: dict[str, list[Clip]] = {}
    for clip in wanted:
        starts.setdefault(clip[0], []).append(clip)
    found: dict[Clip, Path] = {}
    for top in CLIP_FOLDERS:
        for place in (folder / top / split, *([folder / top] if top else [])):
            for file in files_in(place, "*"):
                if file.suffix.lower() in AUDIO_SUFFIXES:
                    own = _clip_of(file.name.removesuffix(file.suffix), starts) or (numbers or {}).get(file.stem)
                    if own is not None and file.stat().st_size:
                        found.setdefault(own, file)
    return found


def _clip_of(stem: str, starts: dict[str, list[Clip]]) -> Clip | None:
    for name in (stem, stem.removeprefix("Y")):
        if name in starts:
            return starts[name][0] if len(starts[name]) == 1 else None  # whose of them it is cannot be told
        for pattern in (
            r"(.+?)[_.-](\d+(?:\.\d+)?)[_-](\d+(?:\.\d+)?)",
            r"(.+)[_.-](\d+(?:\.\d+)?)",
            r"(.+?)_(\d+\.\d+)",
        ):
            parts = re.fullmatch(pattern, name)
            if parts and parts[1] in starts:
                value = float(parts[2])
                for unit in (1, 1000):
                    for clip in starts[parts[1]]:
                        if _seconds(clip[1]) == value / unit:
                            return clip
    return None


def _seconds(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def missing_clips(folder: Path, split: str) -> tuple[list[Clip], int]:
    """The clips that AudioCaps' table lists and that are not there, and how many it lists."""
    rows, _ = read_csv(folder / f"{split}.csv", ("youtube_id", "start_time", "caption"))
    seen: dict[tuple[str, float], Clip] = {}
    numbers = {row.get("audiocap_id") or "": clip for row in rows if (clip := clip_of(row, seen)) is not None}
    wanted = list(seen.values())
    present = clips_below(folder, split, wanted, numbers)
    return [clip for clip in wanted if clip not in present], len(wanted)


AUDIOSET_LISTS = {"train": ("balanced_train_segments", "unbalanced_train_segments"), "test": ("eval_segments",)}


def read_audioset(folder: Path, split: str) -> Found:
    """{balanced_train,unbalanced_train,eval}_segments.csv, class_labels_indices.csv and clips, named as AudioCaps'.

    A clip's caption is made of its classes; its labels are their indices.
    """
    paths = [folder / f"{name}.csv" for name in AUDIOSET_LISTS.get(split, ())]
    paths = [path for path in paths if path.exists()]
    if not paths:
        return no_file("audioset", folder / "balanced_train_segments.csv", split)
    if not (table := folder / "class_labels_indices.csv").exists():
        raise MissingData(f"data set audioset: no file {table}, which names the classes; {remedy('audioset', folder)}")
    classes, bad = read_csv(table, ("index", "mid", "display_name"))
    names: dict[str, tuple[int, str]] = {}
    for row in classes:
        if isinstance(index := _number(row["index"]), int):
            names[row["mid"]] = index, row["display_name"]
        else:
            bad.append(f"{table.name}: index {index!r} is no number")
    clips: dict[Clip, list[tuple[int, str]]] = {}
    for path in paths:
        for number, line in text_lines(path):
            parts = [part.strip(' "\n') for part in re.split(r"[,\t]", line)]
            if not line.strip() or line.startswith("#"):
                continue
            if len(parts) < 4 or _seconds(parts[1]) is None:
                bad.append(f"{path.name}: line {number} has no id, start, end and classes")
            else:
                clips[parts[0], parts[1]] = [names[mid] for mid in parts[3:] if mid in names]
    present, packer = clips_below(folder, split, clips), Packer("audioset")
    for clip, own in clips.items():
        if clip in present and own:
            text = sound_of(name for _, name in own)
            if not text:
                continue
            packer.add(
                f"audioset/{clip[0]}_{clip[1]}", present[clip], [text], "audio", sorted(index for index, _ in own)
            )
    records = packer.records()
    return Found(records, len(clips) - len(records), bad).checked(folder)


def sound_of(names: Iterable[str]) -> str:
    """The caption of a sound that only has classes; empty where none has a name."""
    words = list(filter(None, (clean(name.replace("_", " ")).lower() for name in names)))
    return "the sound of " + " and ".join(words) if words else ""


ESC50_FOLDS: dict[int | str, str] = {1: "train", 2: "train", 3: "train", 4: "val", 5: "test"}


def read_esc50(folder: Path, split: str) -> Found:
    """meta/esc50.csv and audio/: folds 1 to 3 train, 4 validates, 5 tests. The caption is made of the class."""
    path = folder / "meta" / "esc50.csv"
    if not path.exists():
        return no_file("esc50", path, split)
    rows, bad = read_csv(path, ("filename", "fold", "target", "category"))
    files, packer, missing = Folder(folder / "audio"), Packer("esc50"), 0
    for row in rows:
        fold, target = _number(row["fold"]), _number(row["target"])
        if not sound_of([row["category"]]):
            bad.append(f"{row['filename']}: its category has no name")
        elif fold not in ESC50_FOLDS or not isinstance(target, int) or target < 0:
            bad.append(
                f"{row['filename']}: fold {row['fold']!r} and target {row['target']!r}, 1 to 5 and 0 to 49 wanted"
            )
        elif ESC50_FOLDS[fold] == split:
            file = files.find(row["filename"])
            if file is None:
                missing += 1
            else:
                packer.add(f"esc50/{file.name}", file, [sound_of([row["category"]])], "audio", [target])
    return Found(packer.records(), missing, bad).checked(path)


def read_fsd50k(folder: Path, split: str) -> Found:
    """FSD50K.ground_truth/{dev,eval}.csv, FSD50K.dev_audio/ FSD50K.eval_audio/. Captions: the classes."""
    part = "eval" if split == "test" else "dev"
    path = folder / "FSD50K.ground_truth" / f"{part}.csv"
    if not path.exists():
        return no_file("fsd50k", path, split)
    rows, bad = read_csv(path, ("fname", "labels", *["split"] * (part == "dev")))
    files, packer, missing = Folder(folder / f"FSD50K.{part}_audio"), Packer("fsd50k"), 0
    for row in rows:
        try:
            own = split if part == "eval" else split_named(row["split"])
        except TypeError as error:
            bad.append(f"{row['fname']}: {error}")
            continue
        if own == split:
            file = files.find(f"{row['fname']}.wav") or files.find(row["fname"])
            if file is None or not (text := sound_of(row["labels"].split(","))):
                missing += 1
            else:
                packer.add(f"fsd50k/{part}/{file.name}", file, [text], "audio")
    return Found(packer.records(), missing, bad).checked(path)


def read_voxceleb(folder: Path, split: str) -> Found:
    """VoxCeleb1 wav/ID/VIDEO/N.wav and VoxCeleb2 {dev/aac,test/aac,aac}/...m4a, with .../mp4/...mp4 for the frames.

    Split by iden_split.txt where it lists a file (VoxCeleb1), else one video of 20 is validation. Label: rank of the
    speaker's id among all that are there.
    """
    tops = [("wav", "mp4"), ("dev/aac", "dev/mp4"), ("test/aac", "test/mp4"), ("aac", "mp4")]
    roots = [(folder / sound, folder / video) for sound, video in tops if (folder / sound).is_dir()]
    if not roots:
        raise MissingData(f"data set voxceleb: neither wav/ nor dev/aac/ in {folder}; {remedy('voxceleb', folder)}")
    people = {path.name for root, _ in roots for path in root.iterdir() if path.is_dir()}
    speakers = {name: rank for rank, name in enumerate(sorted(people))}
    listed, packer = _identification_split(folder / "iden_split.txt"), Packer("voxceleb")
    for root, videos in roots:
        for file in (path for path in files_in(root, "*/*/*") if path.suffix.lower() in AUDIO_SUFFIXES):
            name = file.relative_to(root).as_posix()
            by_list = listed if root.name == "wav" else {}
            own = by_list.get(name, "train") if by_list else ("val" if _is_held_out(file.parent) else "train")
            if own == split:
                video = (videos / name).with_suffix(".mp4")
                labels = (speakers[Path(name).parts[0]],)
                packer.add(f"voxceleb/{name}", file, (), "voice", labels, video if video.exists() else None)
    return Found(packer.records())


def _identification_split(path: Path) -> dict[str, str]:
    """Lines `1|2|3 id.../video/00001.wav`."""
    if not path.exists():
        return {}
    try:
        rows = (line.split() for line in path.read_text().splitlines() if line.strip())
        return {name: VOX_SPLITS[int(number)] for number, name in rows}
    except (ValueError, KeyError) as error:
        raise UserError(f"{path}: lines `1|2|3 id.../video/00001.wav` are wanted ({error}); fetch it again") from None


def _is_held_out(video: Path) -> bool:
    """One video of 20, by the hash of its name: all utterances of a video fall on one side."""
    name = "/".join(video.parts[-2:]).encode()
    return int.from_bytes(hashlib.blake2b(name, digest_size=4).digest(), "little") % 20 == 0


# --- own data ---------------------------------------------------------------------------------------------------------


def read_jsonl(folder: Path, split: str) -> Found:
    """{train,val,test}.jsonl: a file (FILE_KEYS), its captions (CAPTION_KEYS) and perhaps labels a line. A line that
    names a picture and a sound is one of each.
    """
    paths = [folder / f"{name}.jsonl" for name in SPLIT_NAMES[split]]
    path = next((path for path in paths if path.exists()), None)
    if path is None:
        return no_file("jsonl", paths[0], split)
    files, packer, missing, bad = Folder(folder), Packer("jsonl"), 0, []
    try:
        for number, row in jsonl_rows(path):
            try:
                if isinstance(row, Exception):
                    raise row
                named = [row[key] for key in FILE_KEYS if isinstance(row.get(key), str) and row[key].strip()]
                if not named:
                    raise TypeError(f"no file under any of {', '.join(FILE_KEYS)}")
                captions, labels = captions_of(row), labels_of(row)
                if not captions:
                    raise TypeError("no caption")
                for name in one_of_each(named):
                    file = files.find(name)
                    if file is None:
                        missing += 1
                    else:
                        packer.add(f"{split}/{name}", file, captions, kind_of(file.suffix), labels)
            except (ValueError, TypeError) as error:
                bad.append(f"line {number}: {_said(error)}")
    except UnicodeError as error:
        raise not_text(path, error, "lines of JSON") from None
    return Found(packer.records(), missing, bad, packer.repeated).checked(path)


def one_of_each(names: list[str]) -> list[str]:
    """The first name, which may have no suffix, and the first after it that is of the other kind: a list often gives
    one file under several keys, and sometimes a picture and its sound.
    """
    first = kind_by_name(names[0])
    other = (name for name in names if first and kind_by_name(name) not in ("", first))
    return [names[0], *islice(other, 1)]


def _number(value: Any) -> int | str:
    """An id: some files write numbers as text or with a point, also differently in one file."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise TypeError(f"id {value!r}")
    if isinstance(value, str):
        whole = re.fullmatch(r"\s*(-?\d{1,99})(\.0*)?\s*", value)
        return int(whole[1]) if whole else value
    return int(value) if isinstance(value, int) or value.is_integer() else str(value)


def split_named(value: Any) -> str:
    """train, val or test, from the names that lists give their splits; TypeError for any other: a row whose split is
    misspelt must not vanish.
    """
    name = value.strip().casefold() if isinstance(value, str) else value
    if name == "restval":  # Karpathy's name for what he adds to the training split
        return "train"
    for split, names in SPLIT_NAMES.items():
        if name in names:
            return split
    raise TypeError(f"split {value!r} is none of train, val and test")


def _said(error: Exception) -> str:
    """What went wrong with a row, in a few words."""
    if isinstance(error, KeyError):
        return f"has no {error.args[0]}"
    if isinstance(error, json.JSONDecodeError | UnicodeDecodeError):
        return f"not readable as JSON in UTF-8 ({error})"
    return str(error)
