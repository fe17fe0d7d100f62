"""Matched subjects of clips of one long video: a subject's picture from another clip than the target."""

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shared.errors import BadSample, UserError


@dataclass(frozen=True)
class OtherView:
    """Where a subject is seen in another clip."""

    part: str
    key: str
    annotation_idx: str


def cluster_of(key: str) -> str:
    """The long video of a clip: the key before `_segment`, or before `_part` where there is no `_segment`."""
    for mark in ("_segment", "_part"):
        if mark in key:
            return key.split(mark)[0]
    return key


class CrossFramePairs:
    """The pair records, read by cluster when asked for.

    cluster_path: cluster_videos.json (clips by cluster) or None. base_path: folder with CLUSTER.json files, or one json
    {cluster: [pair, ...]}. Pairs outside the similarity range are left out: below are mismatches, above near
    duplicates.
    """

    def __init__(
        self,
        cluster_path: str | Path | None,
        base_path: str | Path,
        *,
        min_similarity: float = 0.6,
        max_similarity: float = 0.98,
    ):
        self.base, self.range = Path(base_path), (min_similarity, max_similarity)
        if not self.base.exists():
            raise UserError(
                f"opens2v.cross_frames_base_path {self.base}: not found; give .../cross-frames-pairs/final_output"
            )
        if cluster_path is not None and not Path(cluster_path).exists():
            raise UserError(
                f"opens2v.cross_frames_cluster_path {cluster_path}: not found; give .../cluster_videos.json"
            )
        self.clusters = None if cluster_path is None else _read(Path(cluster_path))
        self.whole = None if self.base.is_dir() else _read(self.base)
        self._last: tuple[str, list[dict]] = ("", [])

    def other_views(self, part: str, key: str, annotation_idx: str) -> list[OtherView]:
        """Every usable sight of this subject in another clip, in file order."""
        own, found = f"{part}/{key}", []
        for pair in self._pairs(cluster_of(key)):
            similarity = float(pair.get("image_similarity", 0.0))
            if not self.range[0] <= similarity <= self.range[1]:
                continue
            for side, other in (("cur", "aft"), ("aft", "cur")):
                if (
                    pair[f"{side}_id"] == own
                    and str(pair[f"{side}_class_id"]) == annotation_idx
                    and pair[f"{other}_id"] != own
                ):
                    other_part, _, other_key = pair[f"{other}_id"].partition("/")
                    found.append(OtherView(other_part, other_key, str(pair[f"{other}_class_id"])))
        return found

    def choose(self, part: str, key: str, annotation_idx: str, rng: random.Random) -> OtherView | None:
        """One usable sight, uniformly; None where there is none."""
        views = self.other_views(part, key, annotation_idx)
        return rng.choice(views) if views else None

    def _pairs(self, cluster: str) -> list[dict]:
        if self.clusters is not None and cluster not in self.clusters:
            return []
        if self.whole is not None:
            return self.whole.get(cluster, [])
        if self._last[0] != cluster:
            path = self.base / f"{cluster}.json"
            try:
                pairs = _read(path, (dict, list)) if path.exists() else []
            except UserError as error:  # one file of many
                raise BadSample(str(error)) from None
            self._last = (cluster, pairs if isinstance(pairs, list) else pairs.get(cluster, []))
        return self._last[1]


def _read(path: Path, kinds: tuple[type, ...] = (dict,)) -> Any:
    """What a file holds, `kinds` of it; null is an empty dict."""
    try:
        value = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, OSError) as error:
        raise UserError(f"cross-frame file {path}: no valid JSON ({error}); copy it again") from None
    if value is not None and not isinstance(value, kinds):
        raise UserError(f"cross-frame file {path}: holds {type(value).__name__}, an object by cluster is needed")
    return value or {}
