"""From a folder of videos to the annotation file: shots, times, masks, pictures, found subjects, resuming."""

import csv
import json
import struct
from fractions import Fraction

import av
import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from opens2v import prepare
from opens2v.data.shots import find_shots
from opens2v.dataset import OpenS2VAdapterDataset
from shared.errors import UserError

SIZE = dict(num_frames=5, height=32, width=48, ref_height=32, ref_width=32)


def scene(ground, colour, place) -> np.ndarray:
    """A textured square on a plain ground, (64, 96, 3)."""
    frame = np.full((64, 96, 3), ground, np.uint8)
    frame[20:44, place : place + 24] = colour
    frame[20:44:4, place : place + 24] = 255
    return frame


def write_clip(path, frames, times_ms) -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=30)
        stream.width, stream.height, stream.pix_fmt = frames[0].shape[1], frames[0].shape[0], "yuv420p"
        stream.time_base = stream.codec_context.time_base = Fraction(1, 1000)
        for frame, time in zip(frames, times_ms, strict=True):
            picture = av.VideoFrame.from_ndarray(frame, format="rgb24")
            picture.pts, picture.time_base = int(time), Fraction(1, 1000)
            container.mux(stream.encode(picture))
        container.mux(stream.encode())


@pytest.fixture()
def videos(tmp_path):
    """steady.mp4, cut.mp4 (a cut before frame 20), phone.mp4 (no constant rate, turned by 90 degrees), and captions."""
    folder = tmp_path / "videos"
    folder.mkdir()
    steady = [scene((40, 90, 40), (200, 40, 40), 10 + place) for place in range(30)]
    other = [scene((60, 60, 160), (230, 220, 40), 60 - place) for place in range(20)]
    write_clip(folder / "steady.mp4", steady, np.arange(30) * 40)
    write_clip(folder / "cut.mp4", [*steady[:20], *other], np.arange(40) * 40)
    write_clip(folder / "phone.mp4", steady, np.cumsum(np.random.default_rng(0).integers(20, 60, 30)))
    data = bytearray((folder / "phone.mp4").read_bytes())
    place = data.index(b"tkhd") + 4 + 4 + 4 * 9
    data[place : place + 36] = struct.pack(">9i", 0, 1 << 16, 0, -(1 << 16), 0, 0, 64 << 16, 0, 1 << 30)
    (folder / "phone.mp4").write_bytes(data)
    for name in ("steady", "cut", "phone"):
        (folder / f"{name}.txt").write_text("A red square slides to the right.")
    return folder


@pytest.fixture()
def masks(tmp_path):
    folder = tmp_path / "masks"
    folder.mkdir()
    mask = np.zeros((64, 96), np.uint8)
    mask[20:44, 10:34] = 255
    late = np.zeros((64, 96), np.uint8)
    late[20:44, 55:79] = 255
    Image.fromarray(mask).save(folder / "steady.png")
    Image.fromarray(mask).save(folder / "cut.png")
    Image.fromarray(late).save(folder / "cut_000025.png")
    Image.fromarray(np.rot90(mask, -1)).save(folder / "phone.png")
    return folder


def run(videos, output, *more) -> dict:
    prepare.main(["--videos", str(videos), "--output", str(output), *map(str, more)])
    return json.loads((output / "step5/merge_final_json/part1.json").read_text())


def test_shots_masks_times_and_turned_videos(videos, masks, tmp_path):
    shots, seconds = find_shots(videos / "cut.mp4")
    assert [(shot.start, shot.end) for shot in shots] == [(0, 20), (20, 40)] and seconds[10] == pytest.approx(0.4)
    entries = run(videos, tmp_path / "out", "--masks", masks)
    by_video = {}
    for entry in entries.values():
        by_video.setdefault(entry["metadata"]["path"], []).append(entry)
    assert [len(by_video[name]) for name in ("cut.mp4", "phone.mp4", "steady.mp4")] == [2, 1, 1]
    late = by_video["cut.mp4"][1]
    assert late["annotation"]["ann_frame_data"]["ann_frame_idx"] == 25 and late["metadata"]["face_cut"] == [20, 40]
    assert by_video["phone.mp4"][0]["metadata"]["resolution"] == {"height": 96, "width": 64}
    dataset = OpenS2VAdapterDataset(
        tmp_path / "out/step5/merge_final_json/part1.json", videos, **SIZE, ref_augment=False
    )
    for index in range(len(dataset)):
        item = dataset.sample(index, 0)
        red = (item["ref_pixels"][0] + 1).mean((1, 2))
        assert item["subject_names"] == ["red square"] and item["prompts"].startswith("A red square")
        if "cut_step1-20" in item["key"]:
            assert red[0] > 1.2 and red[1] > 1.2  # the yellow one of the second shot
        else:
            assert red[0] > red[2] + 0.3
    assert Image.open(tmp_path / "out/contact_sheet.png").size[0] > 500


def test_the_same_command_again_takes_in_what_changed(videos, masks, tmp_path, capsys):
    run(videos, tmp_path / "out", "--masks", masks)
    capsys.readouterr()
    run(videos, tmp_path / "out", "--masks", masks)
    assert "steady.mp4:" not in capsys.readouterr().out
    (videos / "steady.txt").write_text("A square waits.")
    entries = run(videos, tmp_path / "out", "--masks", masks)
    out = capsys.readouterr().out
    assert "steady.mp4: 1 shots" in out and "cut.mp4:" not in out
    assert any(entry["metadata"]["face_cap_qwen"] == "A square waits." for entry in entries.values())


def test_pictures_stand_for_subjects_and_tables_for_captions(videos, tmp_path):
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    Image.new("RGBA", (20, 30), (200, 10, 10, 255)).save(pictures / "steady.png")
    table = tmp_path / "captions.csv"
    lines = [f"{name}.mp4,A thing moves.,red thing" for name in ("steady", "cut", "phone")]
    table.write_text("\ufefffile,caption,subject\n" + "\n".join(lines), encoding="utf-8")
    entries = run(videos, tmp_path / "out", "--pictures", pictures, "--captions", table)
    assert list(entries) and all(key.startswith("steady") for key in entries)
    item = OpenS2VAdapterDataset(tmp_path / "out/step5/merge_final_json/part1.json", videos, **SIZE).sample(0, 0)
    assert item["subject_names"] == ["red thing"] and item["ref_mask"].tolist() == [True]


def test_blurred_small_and_misfitting_subjects_are_left_out_with_the_reason(videos, masks, tmp_path, capsys):
    Image.fromarray(np.zeros((64, 96), np.uint8)).save(masks / "steady.png")
    Image.new("L", (10, 10), 255).save(masks / "phone.png")
    entries = run(videos, tmp_path / "out", "--masks", masks)
    out = capsys.readouterr().out
    assert all(key.startswith("cut") for key in entries)
    assert "covers 0.0% of frame 0" in out and "the mask is 10 x 10, the frame 64 x 96" in out


@pytest.mark.parametrize(
    "options, message",
    [
        ([], "say where subjects come from"),
        (["--detector", "x"], "say where subjects come from"),
        (["--masks", "nowhere"], "--masks nowhere: not found"),
        (["--masks", ".", "--captions", "captions.txt"], "--captions captions.txt: not found"),
        (["--detector", "nowhere", "--segmenter", "nowhere"], "--detector nowhere: not a folder"),
    ],
)
def test_what_cannot_work_is_said_at_once(videos, tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        prepare.main.__wrapped__(["--videos", str(videos), "--output", str(tmp_path / "out"), *options])
    assert not (tmp_path / "out").exists()
    (videos / "steady.txt").unlink()
    with pytest.raises(UserError, match="1 videos have no caption, the first is steady.mp4"):
        prepare.main.__wrapped__(["--videos", str(videos), "--output", str(tmp_path / "out"), "--masks", "."])
    (videos / "._cut.mp4").write_bytes(b"what a Mac leaves beside a file")
    (videos / "steady.mp4").rename(videos / "cut.mov")
    with pytest.raises(UserError, match="cut.mov and cut.mp4 would have one key"):
        prepare.main.__wrapped__(["--videos", str(videos), "--output", str(tmp_path / "out"), "--masks", "."])


def test_a_detector_and_a_segmenter_find_follow_and_cut_out(videos, tmp_path, monkeypatch):
    """The road through Finder.find with stand-ins for the networks: red is what they see."""

    class Stub(prepare.Finder):
        def __init__(self, *given):
            pass

        def boxes(self, frame, noun):
            red = (frame[..., 0] > 150) & (frame[..., 2] < 120)
            if red.sum() < 50:
                return []
            rows, columns = np.nonzero(red)
            return [(0.9, np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1], float))]

        def mask(self, frame, box):
            x1, y1, x2, y2 = box.astype(int)
            mask = np.zeros(frame.shape[:2], np.uint8)
            mask[y1:y2, x1:x2] = 1
            return mask, 0.9

    monkeypatch.setattr(prepare, "Finder", Stub)
    entries = run(videos, tmp_path / "out", "--detector", tmp_path, "--segmenter", tmp_path)
    assert sum("cut" in key for key in entries) == 2
    steady = next(entry for key, entry in entries.items() if key.startswith("steady"))
    box = steady["annotation"]["ann_frame_data"]["annotations"][0]["bbox"]
    assert box[3] - box[1] == pytest.approx(24, abs=4) and steady["metadata"]["face_cut"] == [0, 30]


@pytest.fixture(scope="module")
def networks(tmp_path_factory):
    """A Grounding DINO and a SAM of random weights, as transformers saves them."""
    folder = tmp_path_factory.mktemp("networks")
    (folder / "vocab.txt").write_text(
        "\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ".", "?", "red", "square"])
    )
    swin = transformers.SwinConfig(
        image_size=64, patch_size=4, embed_dim=8, depths=[1] * 4, num_heads=[1] * 4, window_size=2,
        out_features=["stage2", "stage3", "stage4"],
    )  # fmt: skip
    words = dict(vocab_size=9, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    dino = transformers.GroundingDinoConfig(
        backbone_config=swin, text_config=words, d_model=32, encoder_layers=1, decoder_layers=2,
        encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16, num_queries=6,
        num_feature_levels=3, max_text_len=16,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.GroundingDinoForObjectDetection(dino).save_pretrained(folder / "dino")
    pictures = transformers.GroundingDinoImageProcessor(size={"height": 64, "width": 96})
    tokenizer = transformers.BertTokenizerFast(str(folder / "vocab.txt"))
    transformers.GroundingDinoProcessor(pictures, tokenizer).save_pretrained(folder / "dino")
    size = dict(image_size=64, patch_size=16)
    sam = transformers.SamConfig(
        vision_config=dict(
            hidden_size=16, num_hidden_layers=1, num_attention_heads=2, output_channels=16, mlp_dim=16, window_size=2,
            global_attn_indexes=[0], num_pos_feats=8, **size,
        ),
        prompt_encoder_config=dict(hidden_size=16, image_embedding_size=4, mask_input_channels=4, **size),
        mask_decoder_config=dict(
            hidden_size=16, mlp_dim=16, num_hidden_layers=1, num_attention_heads=2, iou_head_hidden_dim=16
        ),
    )  # fmt: skip
    transformers.SamModel(sam).save_pretrained(folder / "sam")
    reader = transformers.SamImageProcessor(
        size={"longest_edge": 64}, pad_size={"height": 64, "width": 64}, mask_size={"longest_edge": 16},
        mask_pad_size={"height": 16, "width": 16},
    )  # fmt: skip
    transformers.SamProcessor(reader).save_pretrained(folder / "sam")
    return folder


def test_detector_and_segmenter_of_transformers_run_from_local_folders(videos, networks, tmp_path):
    finder = prepare.Finder(str(networks / "dino"), str(networks / "sam"), "cpu", 0.0)
    frame = scene((40, 90, 40), (200, 40, 40), 20)
    found = finder.boxes(frame, "red square")
    assert len(found) == 6 and found[0][0] >= found[-1][0]
    mask, score = finder.mask(frame, np.array([20.0, 20.0, 44.0, 44.0]))
    assert mask.shape == (64, 96) and set(np.unique(mask)) <= {0, 1} and np.isfinite(score)
    where = ["--detector", str(networks / "dino"), "--segmenter", str(networks / "sam"), "--detector-threshold", "0"]
    wide = ["--least-area", "0", "--largest-area", "1", "--least-sharpness", "0", "--frames-looked-at", "2"]
    entries = run(videos, tmp_path / "out", *where, *wide)
    assert all(entry["word_tags"]["subject"] == ["red square"] for entry in entries.values())
    with pytest.raises(UserError, match="cannot be loaded"):
        prepare.Finder(str(tmp_path), str(networks / "sam"), "cpu", 0.0)


def test_a_file_belongs_to_the_video_with_the_longest_name_that_fits(tmp_path):
    for name in ("walk.mp4", "walk_12.mp4", "walk[1].mp4", "walk.png", "walk_3.png", "walk_12.png", "walk_12_7.png"):
        (tmp_path / name).write_bytes(b"")
    for name in ("walker.png", "walk[1].png", "walk1.png"):
        (tmp_path / name).write_bytes(b"")
    owned = {
        video: [path.name for path in prepare.own_files(tmp_path, tmp_path / video) if path.suffix == ".png"]
        for video in ("walk.mp4", "walk_12.mp4", "walk[1].mp4")
    }
    assert owned == {
        "walk.mp4": ["walk.png", "walk_3.png"],
        "walk_12.mp4": ["walk_12.png", "walk_12_7.png"],
        "walk[1].mp4": ["walk[1].png"],
    }


@pytest.mark.parametrize(
    "table, text, message",
    [
        ("a.jsonl", '{"file": "steady.mp4", "caption": null}', "caption None and subject None of steady.mp4"),
        ("a.jsonl", '{"file": "steady.mp4", "caption": "x", "subject": 3}', "must be texts"),
        ("a.jsonl", '["steady.mp4", "x"]', "cannot be read"),
        ("a.csv", "file;caption\nsteady.mp4;x", "file and caption are needed"),
        ("a.csv", "file,caption\nsteady.mp4", "caption None"),
        ("a.csv", "file,caption,caption\nsteady.mp4,x,y", "column 'caption' occurs twice"),
        ("a.csv", "file,caption\nsteady.mp4,\udce4", "as UTF-8"),
        ("a.csv", "file,caption\nsteady.mp4,a red square, sliding", "more values than columns for steady.mp4"),
        ("a.CSV", 'file,caption\nsteady.mp4,"a red square', "unexpected end of data"),
    ],
)
def test_a_table_that_holds_no_captions_says_so(tmp_path, table, text, message):
    (tmp_path / "steady.mp4").write_bytes(b"")
    (tmp_path / table).write_bytes(text.encode("utf-8", "surrogateescape"))
    options = ["--videos", str(tmp_path), "--output", str(tmp_path), "--masks", str(tmp_path)]
    with pytest.raises(UserError, match=message):
        prepare.main.__wrapped__([*options, "--captions", str(tmp_path / table)])


@pytest.mark.parametrize(
    "caption", ["a dog,\nit runs", "a dog\r\nruns", "a dog\u2028runs", "a\x85dog\x0bruns", 'a "dog"']
)
@pytest.mark.parametrize("table", ["a.csv", "a.jsonl", "B.JSONL"])
def test_captions_are_read_as_they_were_written(tmp_path, table, caption):
    (tmp_path / "clip.mp4").write_bytes(b"")
    (tmp_path / "folder.mp4").mkdir()
    with open(tmp_path / table, "w", encoding="utf-8", newline="") as file:
        if table == "a.csv":
            writer = csv.writer(file)
            writer.writerows([("file", "caption"), ("clip.mp4", caption)])
        else:
            file.write(json.dumps({"file": "clip.mp4", "caption": caption}, ensure_ascii=False) + "\n")
    options = dict(videos=str(tmp_path), output=str(tmp_path), masks=str(tmp_path), captions=str(tmp_path / table))
    given = prepare.PrepareOptions(**options)
    videos = prepare.check(given)
    assert [path.name for path in videos] == ["clip.mp4"]
    wanted = caption.replace("\r\n", "\n") if table == "a.csv" else caption  # what JSON escapes is the text's own
    assert prepare.read_captions(given, videos) == {"clip.mp4": (wanted, None)}


def test_two_videos_of_one_name_are_refused(tmp_path):
    for name in ("a.mp4", "a.MOV", "b.mp4"):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(UserError, match="a.MOV and a.mp4 would have one key"):
        prepare.main.__wrapped__(["--videos", str(tmp_path), "--output", str(tmp_path), "--masks", str(tmp_path)])
