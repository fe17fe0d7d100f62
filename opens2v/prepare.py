"""From a folder of videos to the annotation file that training reads.

    python opens2v/prepare.py --videos VIDEOS --output DATA --masks MASKS
    python opens2v/prepare.py --videos VIDEOS --output DATA --pictures PICTURES --captions captions.csv
    python opens2v/prepare.py --videos VIDEOS --output DATA --detector DINO --segmenter SAM --captions list.jsonl

Captions: VIDEO.txt beside each video, or a table (.csv or .jsonl) with file, caption and, where one is known, subject.
Subjects: masks (VIDEO.png of the first frame, VIDEO_000012.png of frame 12; white is the subject), pictures (VIDEO.png,
transparency becomes white), or a Grounding DINO and a SAM of transformers, given as local folders.
Videos are cut into shots. Beside the annotation file lies contact_sheet.png: look at it. The same command again goes on
where it stopped, and takes in what changed.
"""

import sys
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import json
import re
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from shared.config import Section, load_config, setting
from shared.errors import (
    BadSample,
    UserError,
    check_columns,
    command,
    load_whole,
    opening,
    write_text,
    written_aside,
)
from shared.media.folders import files_in

SUFFIXES = (".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v")


class PrepareOptions(Section):
    """Where the videos are, and where their subjects come from."""

    videos: str = setting("", "folder of videos; stays as it is")
    output: str = setting("", "folder that receives the annotation file and the contact sheet")
    part: str = setting("part1", "name of the annotation file")
    captions: str | None = setting(None, "table of captions, .csv or .jsonl; null: VIDEO.txt beside each video")
    masks: str | None = setting(None, "folder of subject masks")
    pictures: str | None = setting(None, "folder of subject pictures")
    detector: str | None = setting(None, "local folder of a Grounding DINO; needs --segmenter")
    segmenter: str | None = setting(None, "local folder of a SAM; needs --detector")
    device: str = setting("cpu", "where detector and segmenter run")
    detector_threshold: float = setting(0.35, "least score of a detection", ge=0, le=1)
    frames_looked_at: int = setting(5, "frames of a shot in which the subject is looked for", ge=1)
    least_frames: int = setting(9, "shots with fewer frames are left out", ge=1)
    least_area: float = setting(0.005, "least part of the frame that a subject covers", ge=0, le=1)
    largest_area: float = setting(0.9, "largest part of the frame that a subject covers", ge=0, le=1)
    least_sharpness: float = setting(2.0, "least sharpness of a subject's picture (spread of its Laplacian)", ge=0)


@dataclass
class Found:
    """A subject in a shot: the frame that shows it best, and where it is there."""

    name: str
    frame: int
    mask: Any | None = None  # uint8 (H, W); None where a picture stands for it
    picture: str | None = None  # path of a picture
    score: float = 1.0
    seen: tuple[int, int] | None = None  # frames [a, b) in which it was seen


def read_captions(options: PrepareOptions, videos: list[Path]) -> dict[str, tuple[str, str | None]]:
    """(caption, subject or None) by file name; UserError names what is missing or cannot be read."""
    import csv
    import io

    found: dict[str, tuple[str, str | None]] = {}
    if options.captions is None:
        for video in videos:
            beside = video.with_suffix(".txt")
            if beside.exists():
                found[video.name] = (beside.read_text(encoding="utf-8-sig", errors="replace").strip(), None)
    else:
        path = Path(options.captions)
        if path.suffix.lower() not in (".csv", ".jsonl"):
            raise UserError(f"--captions {path}: a .csv or .jsonl is needed")
        try:
            text = path.read_text(encoding="utf-8-sig")
            if path.suffix.lower() == ".csv":  # a caption in quotes may hold line breaks
                reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
                check_columns(f"--captions {path}", reader.fieldnames)
                lines = list(reader)
            else:  # which other signs of a new line may stand in
                lines = [json.loads(line) for line in text.split("\n") if line.strip()]
            for row in lines:
                if None in row:
                    raise ValueError(f"more values than columns for {row['file']}: commas in a caption need quotes")
                caption, subject = row["caption"], row.get("subject") or None
                if not isinstance(caption, str) or not isinstance(subject, str | None):
                    raise ValueError(f"caption {caption!r} and subject {subject!r} of {row['file']} must be texts")
                found[Path(row["file"]).name] = (caption.strip(), subject)
        except (ValueError, KeyError, TypeError, AttributeError, OSError, csv.Error) as error:
            raise UserError(
                f"--captions {path}: cannot be read ({error}); file and caption are needed in each line, as UTF-8"
            ) from None
    without = [video.name for video in videos if not found.get(video.name, ("",))[0]]
    if without:
        raise UserError(
            f"{len(without)} videos have no caption, the first is {without[0]}; write {Path(without[0]).stem}.txt "
            "beside it, or give --captions TABLE"
        )
    return found


def noun_of(caption: str, subject: str | None) -> str:
    """The name of the subject: as given, or the first noun phrase of the caption as far as that can be seen."""
    if subject:
        return subject.strip().lower()
    words = caption.strip().rstrip(".").split()
    if words and words[0].lower() in ("a", "an", "the"):
        words = words[1:]
    stops = {"is", "are", "in", "on", "at", "with", "and", "of", "who", "that", "to", "by", "from", "looks", "moves"}
    kept: list[str] = []
    for word in words:
        if word.lower().strip(",") in stops or (kept and word.endswith(("s", "ing")) and len(kept) > 1):
            break
        kept.append(word.lower().strip(",.;"))
        if word.endswith((",", ";")) or len(kept) == 3:
            break
    return " ".join(kept) or "subject"


# --- where subjects come from -----------------------------------------------------------------------------------------


def own_files(folder: Path, video: Path) -> list[Path]:
    """The files of a folder that are named after a video: VIDEO.* and VIDEO_*.*, as far as no longer name fits."""
    found = [path for path in sorted(folder.glob(f"{glob_escape(video.stem)}*")) if path.is_file()]
    longer = [
        path.stem for path in video.parent.glob(f"{glob_escape(video.stem)}_*") if path.suffix.lower() in SUFFIXES
    ]
    return [
        path for path in found
        if path.stem == video.stem or path.stem.startswith(f"{video.stem}_")
        if not any(path.stem == other or path.stem.startswith(f"{other}_") for other in longer)
    ]  # fmt: skip


def from_masks(folder: Path, video: Path, shot: Any, name: str) -> list[Found]:
    """The mask of this shot, if there is one. A number behind the video's name is the frame; without one, frame 0."""
    import numpy as np
    from PIL import Image

    from opens2v.data.subjects import BROKEN_PICTURE

    found = []
    for path in own_files(folder, video):
        number = re.fullmatch(r"(?:_(\d+))?", path.stem.removeprefix(video.stem))
        if path.suffix.lower() != ".png" or number is None or not shot.start <= int(number[1] or 0) < shot.end:
            continue
        try:
            mask = np.array(Image.open(path).convert("L")) > 127
        except BROKEN_PICTURE as error:
            raise BadSample(f"mask {path}: cannot be read ({error})") from None
        found.append(Found(name, int(number[1] or 0), mask.astype(np.uint8)))
    return found


def from_pictures(folder: Path, video: Path, shot: Any, name: str) -> list[Found]:
    """The pictures of this video; they stand for the subject in all its shots."""
    paths = [path for path in own_files(folder, video) if path.suffix.lower() in PICTURES]
    return [Found(name, shot.start, picture=str(path.resolve())) for path in paths]


PICTURES = (".png", ".jpg", ".jpeg", ".webp")


def glob_escape(text: str) -> str:
    """A file name as a pattern that matches only itself."""
    import glob

    return glob.escape(text)


class Finder:
    """Grounding DINO and SAM from local folders: boxes of a noun in frames, and the mask inside a box."""

    def __init__(self, detector: str, segmenter: str, device: str, threshold: float):
        from transformers import AutoModelForZeroShotObjectDetection, AutoProcessor, SamModel, SamProcessor

        from shared.engine.products import use_fast_products

        for name, path in (("--detector", detector), ("--segmenter", segmenter)):
            if not Path(path).is_dir():
                raise UserError(f"{name} {path}: not a folder; give a local folder of the model")
        with opening(f"--detector {detector}, --segmenter {segmenter}", "download both folders again"):
            self.reader = AutoProcessor.from_pretrained(detector, local_files_only=True)
            self.detector = load_whole(AutoModelForZeroShotObjectDetection, detector, local_files_only=True)
            self.sam_reader = SamProcessor.from_pretrained(segmenter, local_files_only=True)
            self.segmenter = load_whole(SamModel, segmenter, local_files_only=True)
        self.device, self.threshold = device, threshold
        for model in (self.detector, self.segmenter):
            use_fast_products(model.eval().to(device))

    def boxes(self, frame: Any, noun: str) -> list[tuple[float, Any]]:
        """(score, box x1 y1 x2 y2 in pixels) of a noun in a frame (H, W, 3), best first."""
        import torch
        from PIL import Image

        given = self.reader(images=Image.fromarray(frame), text=f"{noun}.", return_tensors="pt").to(self.device)
        with torch.no_grad():
            output = self.detector(**given)
        result = self.reader.post_process_grounded_object_detection(
            output, given["input_ids"], threshold=self.threshold, text_threshold=0.0, target_sizes=[frame.shape[:2]]
        )[0]
        pairs = zip(result["scores"].tolist(), result["boxes"].cpu().numpy(), strict=True)
        return sorted(pairs, key=lambda pair: -pair[0])

    def mask(self, frame: Any, box: Any) -> tuple[Any, float]:
        """(uint8 mask (H, W), score) of what fills a box."""
        import torch
        from PIL import Image

        given = self.sam_reader(Image.fromarray(frame), input_boxes=[[box.tolist()]], return_tensors="pt").to(
            self.device
        )
        with torch.no_grad():
            output = self.segmenter(**given)
        masks = self.sam_reader.image_processor.post_process_masks(
            output.pred_masks.cpu(), given["original_sizes"].cpu(), given["reshaped_input_sizes"].cpu()
        )[0][0]
        best = int(output.iou_scores[0, 0].argmax())
        return masks[best].numpy().astype("uint8"), float(output.iou_scores[0, 0, best])

    def find(self, path: Path, shot: Any, name: str, count: int) -> list[Found]:
        """The noun's best sight: looked for in some frames of the shot, followed from one to the next by its box, and
        cut out where it is large and sharp.
        """
        import numpy as np

        from opens2v.data.shots import overlap, sharpness
        from opens2v.data.video import read_frames

        numbers = np.unique(np.linspace(shot.start, shot.end - 1, count).astype(int)).tolist()
        frames = read_frames(path, numbers)
        track: list[tuple[int, Any, float]] = []
        for number, frame in zip(numbers, frames, strict=True):
            candidates = self.boxes(frame, name)
            if track:  # the same one: it has not jumped to the other side of the picture
                candidates = [one for one in candidates if overlap(one[1], track[-1][1]) > 0.1] or candidates[:1]
            if candidates:
                track.append((number, candidates[0][1], candidates[0][0]))
        if not track:
            return []

        def worth(one: tuple[int, Any, float]) -> float:
            frame = frames[numbers.index(one[0])]
            x1, y1, x2, y2 = np.clip(one[1].round().astype(int), 0, [frame.shape[1], frame.shape[0]] * 2)
            cut = frame[y1:y2, x1:x2]
            return float(np.sqrt(cut.shape[0] * cut.shape[1]) * sharpness(cut)) if min(cut.shape[:2]) > 2 else 0.0

        number, box, score = max(track, key=worth)
        mask, _ = self.mask(frames[numbers.index(number)], box)
        step = max(1, (shot.end - shot.start) // max(1, len(numbers)))
        seen = (max(shot.start, track[0][0] - step), min(shot.end, track[-1][0] + step + 1))
        return [Found(name, number, mask, score=score, seen=seen)]


# --- entries ----------------------------------------------------------------------------------------------------------


def judge(found: Found, frame: Any, options: PrepareOptions) -> str | None:
    """Why a subject is not taken, or None."""
    from opens2v.data.shots import sharpness

    if found.mask is None:
        return None
    if found.mask.shape != frame.shape[:2]:
        return (
            f"the mask is {found.mask.shape[1]} x {found.mask.shape[0]}, the frame {frame.shape[1]} x {frame.shape[0]}"
        )
    area = float(found.mask.mean())
    if not options.least_area <= area <= options.largest_area:
        return f"the subject covers {area:.1%} of frame {found.frame}"
    sharp = sharpness(frame, found.mask)
    if sharp < options.least_sharpness:
        return f"the subject is blurred in frame {found.frame} (sharpness {sharp:.1f})"
    return None


def entry_of(
    video: Path, shot: Any, seconds: Any, shape: tuple[int, int], caption: str, subjects: list[Found]
) -> dict[str, Any]:
    """The entry of a shot in the public layout (opens2v/README.md, Data)."""
    import numpy as np

    from opens2v.data.subjects import encode_rle

    best = next((one for one in subjects if one.mask is not None), subjects[0])
    seen = best.seen or (shot.start, shot.end)
    span = float(seconds[-1] - seconds[0])
    records, masks, mapped = [], {}, {}
    names = sorted({one.name for one in subjects})
    for number, one in enumerate(subjects, 1):
        mapped[str(number)] = {"class_name": one.name} | ({"image": one.picture} if one.picture else {})
        box = [0.0, 0.0, float(shape[1]), float(shape[0])]
        if one.mask is not None:
            rows, columns = np.nonzero(one.mask)
            box = [float(v) for v in (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)]
            masks[str(number)] = {**encode_rle(one.mask), "score": [round(one.score, 5)]}
        records.append({"class_name": one.name, "bbox": box})
    return {
        "metadata": {
            "cut": [shot.start, shot.end], "face_cut": list(seen), "crop": [0, shape[1], 0, shape[0]],
            "fps": round((len(seconds) - 1) / span, 4) if span > 0 else 25.0, "num_frames": len(seconds),
            "resolution": {"height": shape[0], "width": shape[1]}, "path": video.name, "face_cap_qwen": caption,
        },
        "word_tags": {"background": [], "subject": names, "object": [], "pre_define": []},
        "annotation": {
            "ann_frame_data": {
                "ann_frame_idx": best.frame, "annotations": records, "box_format": "xyxy",
                "img_width": shape[1], "img_height": shape[0],
            },
            "mask_map": mapped,
            "mask_annotation": {str(best.frame): masks},
        },
    }  # fmt: skip


def prepare_video(
    video: Path, caption: str, subject: str | None, options: PrepareOptions, finder: Finder | None
) -> tuple[dict[str, dict], list[str]]:
    """(entries by key, what was left out and why) of one video."""
    from opens2v.data.shots import find_shots
    from opens2v.data.video import read_frames

    shots, seconds = find_shots(video)
    name = noun_of(caption, subject)
    entries: dict[str, dict] = {}
    left_out: list[str] = []
    for shot in shots:
        where = f"{video.name}, frames {shot.start} to {shot.end}"
        if shot.end - shot.start < options.least_frames:
            left_out.append(f"{where}: {shot.end - shot.start} frames, fewer than {options.least_frames}")
            continue
        if finder is not None:
            found = finder.find(video, shot, name, options.frames_looked_at)
        elif options.masks is not None:
            found = from_masks(Path(options.masks), video, shot, name)
        else:
            found = from_pictures(Path(str(options.pictures)), video, shot, name)
        if not found:
            left_out.append(f"{where}: no subject {name!r} was found")
            continue
        kept: list[Found] = []
        for one in found:
            frame = read_frames(video, [one.frame])[0]
            reason = judge(one, frame, options)
            if reason is None and (one.mask is None or not kept or one.frame == kept[0].frame):
                kept.append(one)
            elif reason is not None:
                left_out.append(f"{where}: {reason}")
        if kept:
            key = f"{video.stem}_step1-{shot.start}-{shot.end}_step2-{shot.start}-{shot.end}_step4_step5_step6"
            entries[key] = entry_of(video, shot, seconds, frame.shape[:2], caption, kept)
    return entries, left_out


def contact_sheet(entries: dict[str, dict], videos: Path, path: Path, limit: int = 60) -> None:
    """One row a shot: first, annotated and last frame, and the subject's picture as training will see it."""
    import numpy as np
    from PIL import Image

    from opens2v.data.subjects import find_subjects
    from opens2v.data.video import read_frames

    rows = []
    for key, entry in list(entries.items())[:limit]:
        start, end = entry["metadata"]["face_cut"]
        best = entry["annotation"]["ann_frame_data"]["ann_frame_idx"]
        source = videos / entry["metadata"]["path"]
        frames = [read_frames(source, [number])[0] for number in (start, best, end - 1)]
        pictures = [Image.fromarray(frame) for frame in frames]
        pictures += [one.image for one in find_subjects(entry, frames[1], key=key)[:2]]
        row = Image.new("RGB", (5 * 164, 124), (255, 255, 255))
        for place, picture in enumerate(pictures):
            picture = picture.copy()
            picture.thumbnail((160, 120))
            row.paste(picture, (place * 164 + (160 - picture.width) // 2, 2 + (120 - picture.height) // 2))
        rows.append(np.array(row))
    with written_aside(path) as temporary:
        Image.fromarray(np.concatenate(rows)).save(temporary, format="PNG")


def check(options: PrepareOptions) -> list[Path]:
    """The videos; UserError for options that do not go together or places that are not there."""
    for name, value in (("--videos", options.videos), ("--output", options.output)):
        if not value:
            raise UserError(f"{name} is needed")
    folder = Path(options.videos)
    if not folder.is_dir():
        raise UserError(f"--videos {folder}: not a folder")
    sources = [name for name in ("masks", "pictures", "detector") if getattr(options, name) is not None]
    if len(sources) != 1 or (options.detector is None) != (options.segmenter is None):
        raise UserError("say where subjects come from: --masks, --pictures, or --detector and --segmenter together")
    for name in ("masks", "pictures", "captions"):
        value = getattr(options, name)
        if value is not None and not Path(value).exists():
            raise UserError(f"--{name} {value}: not found")
    files = [path for path in files_in(folder, "*") if path.is_file()]
    videos = [path for path in files if path.suffix.lower() in SUFFIXES]
    if not videos:
        raise UserError(f"--videos {folder}: holds no video ({', '.join(SUFFIXES)}); folders in it are not looked into")
    for one, other in pairwise(sorted(videos, key=lambda path: path.stem)):
        if one.stem == other.stem:
            raise UserError(f"--videos {folder}: {one.name} and {other.name} would have one key; rename one of them")
    return videos


@command
def main(argv: list[str] | None = None) -> dict[str, int]:
    """Prepare what is new or changed; returns how many shots there are, and how many were left out."""
    options = load_config(PrepareOptions, argv=argv, description=__doc__)
    videos = check(options)
    captions = read_captions(options, videos)
    finder = None
    if options.detector is not None:
        finder = Finder(options.detector, str(options.segmenter), options.device, options.detector_threshold)
    output = Path(options.output)
    entries: dict[str, dict] = {}
    left_out: list[str] = []
    for video in videos:
        caption, subject = captions[video.name]
        done, digest = (
            output / "step5" / "prepared" / options.part / f"{video.name}.json",
            _digest(options, video, captions),
        )
        saved = json.loads(done.read_text(encoding="utf-8")) if done.exists() else {}
        if saved.get("made_from") != digest:
            try:
                found, reasons = prepare_video(video, caption, subject, options, finder)
            except BadSample as error:
                found, reasons = {}, [str(error)]
            saved = {"made_from": digest, "entries": found, "left_out": reasons}
            write_text(done, json.dumps(saved, ensure_ascii=False))
            print(
                f"{video.name}: {len(found)} shots" + "".join(f"\n  left out: {reason}" for reason in reasons),
                flush=True,
            )
        entries |= saved["entries"]
        left_out += saved["left_out"]
    if not entries:
        raise UserError(
            f"nothing is left of {len(videos)} videos; the last reason: {left_out[-1] if left_out else 'none'}"
        )
    part = output / "step5" / "merge_final_json" / f"{options.part}.json"
    write_text(part, json.dumps(entries, ensure_ascii=False))
    contact_sheet(entries, Path(options.videos), output / "contact_sheet.png")
    print(
        f"{len(entries)} shots of {len(videos)} videos, {len(left_out)} left out; look at "
        f"{output / 'contact_sheet.png'}\n"
        f"python opens2v/train.py --config ... --json-paths {part} --video-base-paths {options.videos}"
    )
    return {"shots": len(entries), "left_out": len(left_out)}


def _digest(options: PrepareOptions, video: Path, captions: dict[str, tuple[str, str | None]]) -> str:
    """Stands for all that a video's entries are made from."""
    import hashlib

    from opens2v.data.clips import file_digest

    files = [video]
    for folder in (options.masks, options.pictures):
        files += own_files(Path(folder), video) if folder else []
    settings = options.model_dump(exclude={"videos", "output", "part", "captions", "masks", "pictures", "device"})
    text = json.dumps([settings, captions[video.name], [file.name for file in files]], sort_keys=True)
    digest = hashlib.sha256(text.encode())
    for file in files:
        digest.update(file_digest(file))
    return digest.hexdigest()[:16]


if __name__ == "__main__":
    main()
