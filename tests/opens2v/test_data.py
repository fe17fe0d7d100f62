"""The data set over the public layout: the mini set's expected values, the rules of sampling, and every kind of
damage.
"""

import hashlib
import json
import random
import shutil

import av
import numpy as np
import pytest
import torch
from PIL import Image

from opens2v.config import SAMPLE_DATA, Config
from opens2v.data.augment import in_its_place, recolour
from opens2v.data.cache import content_of
from opens2v.data.clips import frame_indices, generic_caption, usable_range
from opens2v.data.cross_frames import cluster_of
from opens2v.data.subjects import (
    SubjectFilter,
    decode_rle,
    encode_rle,
    open_picture,
    place_in_frame,
    select_subjects,
)
from opens2v.data.video import cover_resize, crop_window, read_frames, to_uint8, write_video
from opens2v.dataset import (
    MultiPartOpenS2VAdapterDataset,
    OpenS2VAdapterDataset,
    collate_opens2v_batch,
    create_opens2v_dataloader,
)
from shared.errors import BadSample, UserError
from tests.opens2v.cases import EXPECTED, MINI, PARTS, part_paths

SIZES = dict(num_frames=13, height=64, width=96, ref_height=32, ref_width=32, ref_augment=False)
SAMPLE_PATHS = ("step5/merge_final_json/{}.json", "step0/videos/{}", "step5/final_output/{}/foreground")
COLOUR = 2.0  # grey levels by which decoders may differ
SUBJECT_CASES = [(sample, expected) for sample, expected in EXPECTED["samples"].items()]


def dataset(name: str = "dataset1", **options) -> OpenS2VAdapterDataset:
    return OpenS2VAdapterDataset(*part_paths(name), **{**SIZES, **options})


def entry_of(sample: str) -> tuple[OpenS2VAdapterDataset, str, dict]:
    name, key = sample.split("/")
    part = dataset(name)
    return part, *part.part.entry(part.part.annotations.find(key))


# --- masks ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", EXPECTED["rle_cases"], ids=lambda case: f"{case['kind']}-{case['size']}")
def test_run_lengths_decode_and_encode(case):
    mask = decode_rle(case["counts"], case["size"])
    assert hashlib.sha256(mask.tobytes()).hexdigest() == case["sha256_row_major"]
    assert int(mask.sum()) == case["area"]
    if case["rows"] is not None:
        assert ["".join(map(str, row)) for row in mask] == case["rows"]
    assert encode_rle(mask) == {"size": case["size"], "counts": case["counts"]}


def test_run_lengths_round_trip_and_refuse_damage():
    draw = np.random.default_rng(0)
    for _ in range(50):
        mask = (draw.random(draw.integers(1, 40, 2)) < draw.random()).astype(np.uint8)
        coded = encode_rle(mask)
        assert np.array_equal(decode_rle(coded["counts"], coded["size"]), mask)
    for counts in ("021O20N0131M", "9220", "9~2", "P"):
        with pytest.raises(ValueError, match="part1/clip"):
            decode_rle(counts, [4, 6], "part1/clip, mask 1")


# --- frames -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", EXPECTED["frame_index_cases"], ids=lambda case: str(case["python_random_seed"]))
def test_frame_indices(case):
    rng = random.Random(case["python_random_seed"])
    assert frame_indices(case["start"], case["end"], case["n"], case["stride"], rng) == case["indices"]


def test_an_empty_range_is_refused_and_ranges_fall_back():
    with pytest.raises(BadSample, match="is empty"):
        frame_indices(5, 5, 3, 1, random.Random(0))
    assert usable_range({"face_cut": [1, 4], "cut": [0, 9]}) == (1, 4)
    assert usable_range({"cut": [0, 9]}) == (0, 9)
    assert usable_range({"num_frames": 7}) == (0, 7)


@pytest.mark.parametrize("wanted", [[5, 9], [59], [30, 40, 41], [58, 59, 60, 70], [0], [200, 201]])
def test_seeking_gives_the_frames_of_decoding_all(wanted):
    path = MINI / "step0/videos/dataset1/clip0001_part1.mp4"
    whole = read_frames(path, range(60))
    assert np.array_equal(read_frames(path, wanted), whole[[min(place, 59) for place in wanted]])


def test_crop_is_x_first_and_an_empty_window_means_no_crop():
    frames = np.arange(2 * 6 * 8 * 3).reshape(2, 6, 8, 3)
    assert np.array_equal(crop_window(frames, [1, 5, 2, 4]), frames[:, 2:4, 1:5])
    for crop in (None, [5, 5, 0, 6], [9, 20, 0, 6]):
        assert crop_window(frames, crop) is frames
    assert crop_window(frames, [-3, 99, 0, 99]).shape == frames.shape


def test_frames_cover_the_target_and_lie_in_minus_one_to_one():
    frames = np.full((2, 30, 50, 3), 255, np.uint8)
    out = cover_resize(frames, 32, 32)
    assert out.shape == (3, 2, 32, 32) and torch.equal(out, torch.ones_like(out))
    assert cover_resize(np.zeros((1, 64, 96, 3), np.uint8), 32, 48).min() == -1


def test_video_with_tags_that_are_not_utf8_and_odd_sizes(tmp_path):
    path, frames = tmp_path / "clip.mp4", np.random.default_rng(0).integers(0, 255, (5, 33, 49, 3)).astype(np.uint8)
    with av.open(str(path), "w") as container:
        container.metadata["title"] = "QQQQQQQQ"
        stream = container.add_stream("libx264", rate=10)
        stream.metadata["handler_name"] = "QQQQQQQQ"
        stream.width, stream.height, stream.pix_fmt = 48, 32, "yuv420p"
        for picture in frames[:, :32, :48]:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")))
        container.mux(stream.encode())
    data = path.read_bytes()
    assert b"QQQQQQQQ" in data
    path.write_bytes(data.replace(b"QQQQQQQQ", b"\xff\xfe\xe9\x80QQQQ"))
    with pytest.raises(UnicodeDecodeError), av.open(str(path)) as container:
        _ = container.metadata, [stream.metadata for stream in container.streams]
    assert read_frames(path, [0, 4]).shape == (2, 32, 48, 3)
    write_video(tmp_path / "made.mp4", frames, fps=8, settings={"seed": 1})
    assert read_frames(tmp_path / "made.mp4", [0]).shape == (1, 32, 48, 3)
    assert {item.name for item in tmp_path.iterdir()} == {"clip.mp4", "made.mp4", "made.png", "made.json"}


# --- subjects ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sample, expected", SUBJECT_CASES, ids=[name for name, _ in SUBJECT_CASES])
def test_subjects_of_the_mini_set(sample, expected):
    part, key, entry = entry_of(sample)
    found = part.part.subjects(key, entry)
    wanted = [one for one in expected["subjects"] if not one.get("empty")]
    assert [one.annotation_idx for one in found] == [
        one["annotation_idx"] for one in wanted
    ]  # the empty mask is left out
    for subject, one in zip(found, wanted, strict=True):
        assert (subject.class_name, subject.gme_score, subject.aes_score) == (
            one["class_name"],
            one["gme_score"],
            one["aes_score"],
        )
        assert list(subject.image.size) == one["size_wh"] and subject.mask_area == one["mask_area"]
        assert subject.crop_ratio == pytest.approx(one["crop_ratio"])
        mean = np.array(subject.image).reshape(-1, 3).mean(0)
        assert np.abs(mean - one["mean_rgb_on_white"]).max() < COLOUR
    for name in ("first", "best_score"):
        assert select_subjects(found, name, 1, random.Random(0))[0].annotation_idx == expected[name]
    for place, colour in expected["frame_mean_rgb"].items():
        frame = part.part.frames(entry, [int(place)])[0]
        assert list(frame.shape[:2]) == expected["cropped_hw"]
        assert np.abs(frame.reshape(-1, 3).mean(0) - colour).max() < COLOUR
    for count, indices in expected["indices_seed0"].items():
        assert frame_indices(*usable_range(entry["metadata"]), int(count), 3, random.Random(0)) == indices


def test_filters_and_their_fall_back():
    part, key, entry = entry_of(next(iter(EXPECTED["samples"])))
    subjects, tags = part.part.subjects(key, entry), entry["word_tags"]

    def kept(**rules) -> list[str]:
        return [one.class_name for one in SubjectFilter(**rules).apply(subjects, tags)]

    assert kept() == ["robot", "blue ball", "meadow"]
    assert kept(min_gme_score=0.35) == ["robot", "blue ball"]
    assert kept(min_aes_score=4.5) == ["blue ball", "meadow"]
    assert kept(max_crop_ratio=0.5) == ["robot", "blue ball"]
    assert kept(min_crop_ratio=0.1) == ["robot", "meadow"]
    assert kept(subject_tag_groups=("subject",)) == ["robot"]
    twins = [subjects[0], subjects[0], subjects[1]]
    assert [one.class_name for one in SubjectFilter(dedup_iou=0.9).apply(twins, tags)] == ["robot", "blue ball"]
    assert kept(min_gme_score=0.99) == ["robot", "blue ball", "meadow"]  # nothing is left: the unfiltered list


def test_random_selection_is_keyed_and_without_replacement():
    part = dataset(subject_selection="random", max_subjects_per_sample=2)
    first, again, later = (
        part.sample(0, 0),
        part.sample(0, 0),
        [part.sample(0, epoch)["subject_names"] for epoch in range(8)],
    )
    assert torch.equal(first["ref_pixels"], again["ref_pixels"]) and torch.equal(first["frames"], again["frames"])
    assert len(set(first["subject_names"])) == 2 and len({tuple(names) for names in later}) > 1
    with pytest.raises(ValueError, match="is not one of first, random, best_score"):
        dataset(subject_selection="best")


def test_recolouring_keeps_greys_and_unmasked_pixels():
    pixels = np.array([[[255, 255, 255], [128, 128, 128], [200, 30, 30]]], np.uint8)
    turned = recolour(pixels, 2.0)
    assert np.abs(turned[0, :2].astype(int) - pixels[0, :2]).max() <= 1 and not np.array_equal(
        turned[0, 2], pixels[0, 2]
    )
    assert np.array_equal(recolour(pixels, 2.0, np.zeros((1, 3), bool)), pixels)


def test_a_subject_moves_to_another_scene_with_its_name():
    sample = OpenS2VAdapterDataset(
        *(SAMPLE_DATA / path.format("dataset1") for path in SAMPLE_PATHS), num_frames=5, height=32, width=48,
        ref_height=32, ref_width=32, ref_augment=False, keep_decoded=True, load_background=True,
        only_keys=["anim_monkey", "anim_jack-o-lantern"], other_scene_probability=1.0,
    )  # fmt: skip
    monkey = [key for _, key in map(sample.identity, range(2))].index(
        next(key for _, key in map(sample.identity, range(2)) if "monkey" in key)
    )
    for epoch in range(20):
        item = sample.sample(monkey, epoch)
        if "night sky" in item["prompts"]:
            break
    assert item["prompts"].startswith("A monkey moves before a dark night sky") and item["subject_names"] == ["monkey"]
    night = sample.sample(1 - monkey, 0)["background_pixels"]
    share_of_scene = (item["frames"] - night[:, None]).abs().amax(0).lt(1e-3).float().mean()
    assert 0.6 < share_of_scene < 0.95, "the night stands behind, the monkey before it"


def test_a_drawing_takes_the_subjects_place_in_clip_and_picture():
    folder = [SAMPLE_DATA / path.format("dataset1") for path in SAMPLE_PATHS]
    settings: dict = dict(
        num_frames=5, height=64, width=96, ref_height=48, ref_width=48, ref_augment=False, load_background=True,
        only_keys=["anim_monkey"], scenes=str(SAMPLE_DATA / "drawings.json"),
    )  # fmt: skip
    plain = OpenS2VAdapterDataset(*folder, **settings)
    drawn = OpenS2VAdapterDataset(*folder, **settings, other_subject_probability=1.0)
    seen = set()
    for epoch in range(4):
        truth, item = plain.sample(0, epoch), drawn.sample(0, epoch)
        assert torch.equal(truth["frame_indices"], item["frame_indices"]) and item["prompts"].startswith("A subject ")
        seen.add(item["ref_pixels"].numpy().tobytes())
        scene = truth["background_pixels"][:, None]
        places = [(clip["frames"] - scene).abs().amax(0).gt(0.2) for clip in (truth, item)]
        bottoms = [[int(mask.any(1).nonzero().max()) for mask in place] for place in places]
        assert max(abs(a - b) for a, b in zip(*bottoms, strict=True)) <= 4, "on the monkey's floor, in every frame"
        outside = torch.nn.functional.max_pool2d(places[0].float(), 15, 1, 7) == 0
        assert (item["frames"] - scene).abs().amax(0)[outside].lt(0.05).float().mean() > 0.97, "the clip's own ground"
    assert len(seen) > 1, "another drawing in another epoch"
    assert torch.equal(drawn.sample(0, 0)["frames"], drawn.sample(0, 0)["frames"])


def test_a_subject_picture_stands_as_in_the_frame_where_wanted():
    """The annotated frame is the clip's first; both sizes of frame, of another shape than the clip's."""
    folder = [SAMPLE_DATA / path.format("dataset1") for path in SAMPLE_PATHS]
    for height, width in ((72, 128), (64, 96)):
        part = OpenS2VAdapterDataset(
            *folder, num_frames=1, height=height, width=width, ref_height=height, ref_width=width, ref_augment=False,
            load_background=True, ref_place="frame", only_keys=["anim_monkey", "anim_penguin", "anim_racing_car"],
        )  # fmt: skip
        for index in range(len(part)):
            assert part.positions is not None
            subject = part.part.subjects(*part.part.entry(part.positions[index]))[0]
            place = place_in_frame(subject.mask, (height, width))
            assert place is not None and subject.mask.shape == (144, 256)
            factor = max(height / 144, width / 256)
            shown = (part.sample(index, 0)["ref_pixels"][0] < 0.9).any(0)
            rows, columns = shown.any(1).nonzero().flatten(), shown.any(0).nonzero().flatten()
            bottom = (np.flatnonzero(subject.mask.any(1))[-1] + 1 - 72) * factor + height / 2
            assert abs(int(rows[-1]) + 1 - bottom) <= 1.5 and abs(len(rows) - place[1]) <= 2
            found = np.flatnonzero(subject.mask.any(0))
            middle = ((found[0] + found[-1] + 1) / 2 - 128) * factor + width / 2
            assert abs(int(columns[0] + columns[-1] + 1) / 2 - middle) <= 1.5
    assert place_in_frame(np.zeros((4, 4), np.uint8), (8, 8)) is None


def test_a_drawing_replaces_nothing_where_the_camera_moves_or_a_frame_is_empty():
    ground, drawing = np.zeros((8, 8, 3), np.uint8), np.full((5, 5, 4), 255, np.uint8)
    where = np.zeros((2, 8, 8), bool)
    assert in_its_place(where, ground, drawing) is None
    where[:, 2:4, 3:5] = True
    shown = in_its_place(where, ground, drawing)
    assert shown is not None and np.array_equal(shown[0].any(-1), where), "as large as the subject, at its place"
    assert shown[1] == (2, 2, 0)
    for none in (~where, where & [[[1]], [[0]]]):
        assert in_its_place(none, ground, drawing) is None


def test_captions_lose_the_subjects_noun():
    assert (
        generic_caption("An elephant moves. Then the elephant sleeps.", "elephant")
        == "A subject moves. Then The subject sleeps."
    )
    assert generic_caption("A green dragon flies.", "dragon") == "A green subject flies."
    assert generic_caption("A monkey moves.", "monkey", "elephant") == "An elephant moves."
    assert generic_caption("A robot (toy) waves.", "robot (toy)") == "A subject waves."
    assert generic_caption("A robot waves.", " ") == "A robot waves."


# --- the data set -----------------------------------------------------------------------------------------------------


def test_sample_shapes_ranges_and_empty_slots():
    item = dataset(max_subjects_per_sample=4, load_background=True)[0]
    assert item["frames"].shape == (3, 13, 64, 96) and item["frames"].dtype == torch.float32
    assert item["frames"].min() >= -1 and item["frames"].max() <= 1
    assert item["ref_pixels"].shape == (4, 3, 32, 32) and item["ref_clip_pixels"].shape == (4, 3, 224, 224)
    assert item["ref_mask"].tolist() == [True, True, True, False] and item["subject_names"][3] == ""
    assert torch.equal(item["ref_pixels"][3], torch.ones(3, 32, 32))
    assert torch.isnan(item["subject_scores"][3]).all() and item["subject_scores"][0].tolist() == pytest.approx(
        [0.4127, 4.31]
    )
    assert item["frame_indices"].shape == (13,) and item["frame_indices"].dtype == torch.int64
    assert (
        item["meta"]["cut"] == [6, 54]
        and item["meta"]["part"] == "dataset1"
        and item["background_pixels"].shape == (3, 64, 96)
    )
    assert "  " not in item["prompts"] and "background_pixels" not in dataset()[0]


def test_parts_are_joined_and_indices_checked():
    both = MultiPartOpenS2VAdapterDataset(*zip(*(part_paths(name) for name in PARTS), strict=True), **SIZES)
    assert len(both) == 3 and [both.locate(index) for index in (0, 1, 2, -1, -3)] == [
        (0, 0),
        (0, 1),
        (1, 0),
        (1, 0),
        (0, 0),
    ]
    assert both[2]["meta"]["part"] == "dataset1_cluster" == both[-1]["meta"]["part"]
    for index in (3, -4):
        with pytest.raises(IndexError, match="3 samples"):
            both[index]
    with pytest.raises(UserError, match="2, 1 and 2 entries"):
        MultiPartOpenS2VAdapterDataset(["a", "b"], ["v"], ["b", "c"])


def test_cross_frame_subjects_come_from_another_clip_of_any_part():
    pairs = MINI / "step6/cross-frames-pairs"
    options = dict(
        is_cross_frame=True,
        cross_frames_cluster_path=pairs / "cluster_videos.json",
        cross_frames_base_path=pairs / "final_output",
    )
    both = MultiPartOpenS2VAdapterDataset(*zip(*(part_paths(name) for name in PARTS), strict=True), **SIZES, **options)
    own = MultiPartOpenS2VAdapterDataset(*zip(*(part_paths(name) for name in PARTS), strict=True), **SIZES)
    for index in range(3):
        views = both.datasets[both.locate(index)[0]].pairs.other_views(
            own[index]["meta"]["part"], own[index]["key"], "1"
        )
        assert len(views) == 2 and all(view.key != own[index]["key"] for view in views)
        assert both.sample(index, 0)["ref_mask"].all()
    assert {view.part for view in both.datasets[0].pairs.other_views("dataset1", own[0]["key"], "1")} == set(PARTS)
    merged = dataset(is_cross_frame=True, cross_frames_base_path=pairs / "cross_frames_pairs.json")
    assert merged[0]["ref_mask"].all()  # the partner part lies beside this part's files
    none = dataset(**options, cross_min_similarity=0.99, cross_max_similarity=0.995)
    assert torch.equal(none[0]["ref_pixels"], dataset()[0]["ref_pixels"])  # no usable pair: the own frame
    assert cluster_of("a_segment3_part2_step1") == "a" and cluster_of("b_part2_step1") == "b" and cluster_of("c") == "c"


def test_collate_stacks_and_drops_none():
    items = [dataset()[0], None, dataset()[1]]
    batch = collate_opens2v_batch(items)
    assert batch["frames"].shape == (2, 3, 13, 64, 96) and len(batch["prompts"]) == 2 and len(batch["meta"]) == 2
    with pytest.raises(ValueError, match="without any sample"):
        collate_opens2v_batch([None, None])


def loader_config(**training) -> Config:
    paths = [list(map(str, column)) for column in zip(*(part_paths(name) for name in PARTS), strict=True)]
    data = dict(json_paths=paths[0], video_base_paths=paths[1], background_base_paths=paths[2], num_training_frames=13,
                pixel_height=64, pixel_width=96, ref_height=32, ref_width=32)  # fmt: skip
    return Config(data=data, training={"num_workers": 0, **training})


def test_loader_splits_ranks_and_repeats_its_order():
    orders = []
    for _ in range(2):
        keys = []
        for rank in range(2):
            loader, sampler = create_opens2v_dataloader(loader_config(), rank, 2)
            sampler.set_epoch(1)
            keys.append([batch["key"][0] for batch in loader])
        orders.append(keys)
    assert orders[0] == orders[1] and len(orders[0][0]) == 1 and set(orders[0][0]).isdisjoint(orders[0][1])
    loader, sampler = create_opens2v_dataloader(loader_config(num_workers=1), 0, 1)
    first = [batch["frame_indices"].tolist() for batch in loader]
    sampler.set_epoch(1)
    assert first != [batch["frame_indices"].tolist() for batch in loader]  # epochs reach the workers
    with pytest.raises(UserError, match="3 samples, one batch on 4 ranks takes 4"):
        create_opens2v_dataloader(loader_config(), 0, 4)


# --- damage -----------------------------------------------------------------------------------------------------------


def damaged(tmp_path, change) -> tuple:
    """A copy of the first mini part whose annotation was changed."""
    source = part_paths("dataset1")
    tree = json.loads(source[0].read_text())
    change(tree)
    path = tmp_path / "dataset1.json"
    path.write_text(json.dumps(tree))
    return path, source[1], source[2]


def first_entry(tree: dict) -> dict:
    return tree[next(iter(tree))]


def set_masks_empty(tree: dict) -> None:
    for entry in tree.values():
        for masks in entry["annotation"]["mask_annotation"].values():
            for mask in masks.values():
                mask["counts"] = encode_rle(np.zeros(mask["size"]))["counts"]


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda tree: first_entry(tree)["metadata"].update(path="nowhere.mp4"), "nowhere.mp4: not found"),
        (
            lambda tree: first_entry(tree)["annotation"]["mask_annotation"]["6"]["1"].update(counts="9220"),
            "the runs sum to",
        ),
        (set_masks_empty, "no subject with a mask that is not empty"),
        (lambda tree: first_entry(tree)["metadata"].update(face_cut=[7, 7]), "is empty"),
        (lambda tree: first_entry(tree).pop("metadata"), "needs metadata"),
        (lambda tree: first_entry(tree)["annotation"].pop("mask_map"), "'mask_map' is missing"),
        (lambda tree: first_entry(tree)["metadata"].pop("face_cap_qwen"), "no caption"),
    ],
)
def test_a_broken_sample_is_replaced_or_with_strict_stops(tmp_path, change, message):
    paths = damaged(tmp_path, change)
    with pytest.raises(BadSample, match=message):
        OpenS2VAdapterDataset(*paths, **SIZES).sample(0, 0)
    with pytest.raises(UserError, match=message) as caught:
        OpenS2VAdapterDataset(*paths, **SIZES, strict=True).sample(0, 0)
    assert not isinstance(caught.value, BadSample)
    part = OpenS2VAdapterDataset(*paths, **SIZES)
    if change is set_masks_empty:
        with pytest.warns(UserWarning), pytest.raises(UserError, match="10 samples in a row"):
            part[0]
    else:
        with pytest.warns(UserWarning, match=message):
            assert part[0]["key"] == part.part.annotations.key(1)


def test_a_damaged_video_is_named(tmp_path):
    videos = tmp_path / "videos"
    shutil.copytree(part_paths("dataset1")[1], videos)
    (videos / "clip0001_part1.mp4").write_bytes(b"\0" * 500)
    with pytest.raises(BadSample, match="cannot be decoded"):
        OpenS2VAdapterDataset(part_paths("dataset1")[0], videos, None, **SIZES).sample(0, 0)
    for arguments, message in (
        ((tmp_path / "no.json", videos), "not found"),
        ((part_paths("dataset1")[0], tmp_path / "no"), "video folder"),
    ):
        with pytest.raises(UserError, match=message):
            OpenS2VAdapterDataset(*arguments)


def test_frames_survive_writing():
    assert np.array_equal(
        to_uint8(cover_resize(np.full((1, 16, 16, 3), 77, np.uint8), 16, 16)), np.full((1, 16, 16, 3), 77, np.uint8)
    )


WRONG_FIELDS = {
    "metadata.path null": lambda e: e["metadata"].update(path=None),
    "metadata.path number": lambda e: e["metadata"].update(path=3),
    "metadata null": lambda e: e.update(metadata=None),
    "metadata list": lambda e: e.update(metadata=[]),
    "crop text": lambda e: e["metadata"].update(crop="all"),
    "crop of nulls": lambda e: e["metadata"].update(crop=[None] * 4),
    "face_cut of one": lambda e: e["metadata"].update(face_cut=[3]),
    "face_cut text": lambda e: e["metadata"].update(face_cut="6-54"),
    "fps text": lambda e: e["metadata"].update(fps="30"),
    "fps zero": lambda e: e["metadata"].update(fps=0),
    "annotation null": lambda e: e.update(annotation=None),
    "ann_frame_idx null": lambda e: e["annotation"]["ann_frame_data"].update(ann_frame_idx=None),
    "annotations null": lambda e: e["annotation"]["ann_frame_data"].update(annotations=None),
    "mask_map list": lambda e: e["annotation"].update(mask_map=[]),
    "mask record null": lambda e: next(iter(e["annotation"]["mask_annotation"].values())).update({"1": None}),
    "mask size null": lambda e: next(iter(e["annotation"]["mask_annotation"].values()))["1"].update(size=None),
    "class_name blank": lambda e: e["annotation"]["mask_map"]["1"].update(class_name="  "),
    "picture a number": lambda e: e["annotation"]["mask_map"]["1"].update(image=7),
    "class_name null": lambda e: e["annotation"]["mask_map"]["1"].update(class_name=None),
    "word_tags text": lambda e: e.update(word_tags="robot"),
    "score text": lambda e: e["annotation"]["ann_frame_data"]["annotations"][0].update(gme_score="high"),
    "entry a number": None,
}


@pytest.mark.parametrize("name", WRONG_FIELDS)
def test_a_field_of_a_wrong_type_is_a_bad_sample_that_names_its_key(tmp_path, name):
    def change(tree):
        if WRONG_FIELDS[name] is None:
            tree[next(iter(tree))] = {}
        else:
            WRONG_FIELDS[name](first_entry(tree))

    data = OpenS2VAdapterDataset(*damaged(tmp_path, change), num_frames=5, height=32, width=48, min_gme_score=0.1)
    with pytest.raises(BadSample, match="clip0001_part1"):
        data.sample(0, 0)


def test_a_damaged_picture_of_any_kind_is_a_bad_sample(tmp_path):
    """Pillow's decoders raise OSError, ValueError, SyntaxError and RuntimeError for what is broken."""
    random, picture, path = np.random.default_rng(0), tmp_path / "whole", tmp_path / "broken"
    for kind, places in (("PNG", 200), ("TIFF", 400), ("GIF", 100), ("AVIF", 300), ("WEBP", 300), ("JPEG", 400)):
        Image.fromarray(random.integers(0, 255, (24, 20, 3), np.uint8)).convert("P" if kind == "TIFF" else "RGB").save(
            picture, kind
        )
        whole = picture.read_bytes()
        for _ in range(60):
            broken = bytearray(whole)
            broken[random.integers(0, min(places, len(broken)))] = random.integers(0, 256)
            path.write_bytes(broken)
            try:
                assert open_picture(path, "subject picture").mode == "RGB"
            except BadSample as error:
                assert f"subject picture {path}: cannot be read" in str(error)


@pytest.mark.parametrize("key", ["../../out", "/tmp/out", "a/../../out"])
def test_a_key_cannot_lead_out_of_a_folder(tmp_path, key):
    def change(tree):
        tree[key] = tree.pop(next(iter(tree)))

    data = OpenS2VAdapterDataset(*damaged(tmp_path, change), **SIZES)
    with pytest.raises(BadSample, match="the key leads out"):
        data.sample(len(data) - 1, 0)


def test_half_a_character_at_the_end_of_a_text_is_no_fault(tmp_path):
    """What tools that count in UTF-16 leave of an emoji when they cut a caption or a name."""

    def change(tree):
        entry = tree["clip\ud83d"] = tree.pop(next(iter(tree)))
        entry["metadata"]["face_cap_qwen"] = "A robot walks \ud83d"
        entry["annotation"]["mask_map"]["1"]["class_name"] = "robot \ude00"

    data = OpenS2VAdapterDataset(*damaged(tmp_path, change), **SIZES, with_content=True)
    place = data.part.annotations.find("clip\ud83d")
    assert place == len(data) - 1
    item = data.sample(place, 0)
    assert item["prompts"] == "A robot walks ?" and content_of("text", item)


@pytest.mark.parametrize("selection, augment", [("first", False), ("random", False), ("random", True)])
def test_what_a_feature_was_made_from_tells_draws_apart(tmp_path, selection, augment):
    """Draws are keyed by a clip's place; in a list of another order its stored features would be of another sample."""

    def turn_round(tree):
        entries = list(tree.items())
        tree.clear()
        tree.update(reversed(entries))

    more = {**SIZES, "num_frames": 5, "with_content": True, "subject_selection": selection, "ref_augment": augment}
    one = OpenS2VAdapterDataset(*part_paths("dataset1"), **more)
    other = OpenS2VAdapterDataset(*damaged(tmp_path, turn_round), **more)
    moved = []
    for place in range(len(one)):
        a, b = one.sample(place, 0), other.sample(len(one) - 1 - place, 0)
        assert a["key"] == b["key"]
        moved.append(a["frame_indices"].tolist() != b["frame_indices"].tolist())
        assert moved[-1] == (content_of("vae", a) != content_of("vae", b))
        if not augment:
            is_other = a["meta"]["annotation_idx"] != b["meta"]["annotation_idx"]
            assert is_other == (content_of("clip", a) != content_of("clip", b))
        elif place != len(one) - 1 - place:
            assert content_of("clip", a) != content_of("clip", b)
    assert any(moved)


def test_tags_are_part_of_what_a_feature_was_made_from_where_they_choose(tmp_path):
    def change(tree):
        first_entry(tree)["word_tags"]["subject"] = ["nothing"]

    for groups, differ in ((None, False), (["subject"], True)):
        more = {**SIZES, "num_frames": 1, "with_content": True, "subject_tag_groups": groups}
        paths = part_paths("dataset1"), damaged(tmp_path, change)
        old, new = (OpenS2VAdapterDataset(*place, **more).sample(0, 0) for place in paths)
        assert differ == (content_of("clip", old) != content_of("clip", new))


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "3",
        '[{"image_similarity": "high"}]',
        "[null]",
        '{"clip0001": 5}',
        '[{"image_similarity": 0.7, "cur_id": 1}]',
    ],
)
def test_a_damaged_file_of_pairs_is_a_bad_sample_of_its_clips(tmp_path, text):
    """One cluster of many; a table of all clusters that is none stops before the first sample."""
    (tmp_path / "clip0001.json").write_text(text)
    data = dataset(is_cross_frame=True, cross_frames_base_path=tmp_path)
    with pytest.raises(BadSample, match="clip0001"):
        data.sample(0, 0)
    (tmp_path / "all.json").write_text("[1]")
    for name in ("cross_frames_base_path", "cross_frames_cluster_path"):
        paths = {"cross_frames_base_path": tmp_path, name: tmp_path / "all.json"}
        with pytest.raises(UserError, match="all.json: holds list, an object by cluster is needed"):
            dataset(is_cross_frame=True, **paths)
