"""Every documented record form loads; every malformed one is named by line and code; nothing else is lost."""

import io
import json
import tarfile
from collections import Counter
from pathlib import Path

import pytest
import torch

from bagel.config import DataConfig
from bagel.data.format import FORMATS
from bagel.data.sources import load_image
from bagel.data.sources import open_records as open_files
from bagel.data.tokenizer import FolderTokenizer, tokenizer_folder
from bagel.dataset import DataFormatError
from bagel.packing import Dropout, PackStream, make_collate
from shared.engine.dist import DistInfo
from shared.errors import BadSample, UserError
from tests.bagel.conftest import LAYOUT

GOOD = {"text_prompt": "A red apple", "image_path": "images/apple.png"}


def kinds(dataset, index: int = 0) -> list[str]:
    """The plan as short words: t text, v ViT, n noise, c clean latents; a star for a loss, a question mark for cfg."""
    names = {"text": "t", "vit_image": "v"}
    return [
        names.get(item.type, "n" if item.loss else "c")
        + "*" * bool(item.loss and item.type == "text")
        + "?" * item.enable_cfg
        for item in dataset.plan(index, 0)
    ]


@pytest.mark.parametrize("name", FORMATS)
def test_every_documented_example_loads(name, open_records):
    dataset = open_records(FORMATS[name]["examples"])
    assert len(dataset) == len(FORMATS[name]["examples"]) and not dataset.errors
    assert all(record.kind == name for record in dataset.records)
    samples = [dataset.sample(index, 0) for index in range(len(dataset))]
    pack = make_collate(LAYOUT, Dropout(), 0)(samples)
    assert pack["sequence_length"] == sum(dataset.length(index, 0) for index in range(len(dataset)))


@pytest.mark.parametrize(
    "record, plan",
    [
        (GOOD, ["t?", "n"]),
        ({"image_path": "images/cat.png", "question": "What?", "answer": "A cat."}, ["v", "t", "t*"]),
        (
            {
                "source_image_path": "images/cat.png",
                "instruction": "Make it red",
                "target_image_path": "images/apple.png",
            },
            ["c?", "v?", "t?", "n"],
        ),
        (
            {"image_list": ["images/apple.png", "images/green.png"], "instruction_list": ["green"]},
            ["c?", "v?", "t?", "n"],
        ),
        (
            {
                "conversations": [
                    {"role": "system", "type": "text", "content": "s"},
                    {"role": "user", "type": "text", "content": "draw"},
                    {"role": "assistant", "type": "text", "content": "here"},
                    {"role": "assistant", "type": "image", "image_path": "images/cat.png"},
                    {"role": "assistant", "type": "text", "content": "done"},
                ]
            },
            ["t", "t", "t*", "n", "c?", "v?", "t*"],
        ),
        (
            {
                "sequence": [
                    {"type": "image", "image_path": "images/cat.png", "context": False},
                    {"type": "text", "content": "a", "loss": 1},
                ]
            },
            ["t*"],
        ),
        (
            {
                "sequence": [
                    {"type": "image", "image_path": "images/cat.png", "loss": 1, "context": False},
                    {"type": "text", "content": "a", "loss": 1},
                ]
            },
            ["n", "t*"],
        ),
        (
            {
                "image": ["images/cat.png", "images/apple.png"],
                "conversations": [{"from": "human", "value": "one <image> two <image>"}, {"from": "gpt", "value": "x"}],
            },
            ["t", "v", "t", "v", "t*"],
        ),
        (
            {
                "image": "images/cat.png",
                "conversations": [{"from": "human", "value": "say"}, {"from": "gpt", "value": "x"}],
            },
            ["v", "t", "t*"],
        ),
        ({"conversations": [{"role": "assistant", "type": "text", "content": "plain text to learn"}]}, ["t*"]),
    ],
)
def test_records_become_the_documented_plans(record, plan, open_records):
    assert kinds(open_records([record])) == plan


TURN = {"role": "user", "type": "text", "content": "a"}
MALFORMED = {
    "E_JSON": [
        '{"text_prompt": "a", "image_path"',
        '{"text_prompt": "a", "image_path": "images/apple.png", "weight": NaN}',
    ],
    "E_TYPE": [
        "[1, 2]",
        '"text"',
        {**GOOD, "id": 1.5},
        {**GOOD, "weight": 0},
        '{"text_prompt": "a", "image_path": "images/apple.png", "weight": 1e999}',
        {"text_prompt": "a", "image_path": 7},
        {"conversations": "hello"},
        {"sequence": [{"type": "text", "content": "a", "loss": 2}]},
    ],
    "E_FORMAT": [{"prompt": "a"}, {**GOOD, "answer": "b"}, {"conversations": [TURN, {"from": "gpt", "value": "b"}]}],
    "E_FIELD": [
        {"text_prompt": "a"},
        {"text_prompt": "", "image_path": "images/apple.png"},
        {"conversations": []},
        {"source_image_path": "images/cat.png", "instruction": "x"},
        {"text_prompt": [], "image_path": "images/apple.png"},
    ],
    "E_ROLE": [
        {"conversations": [{**TURN, "role": "bot"}]},
        {"conversations": [{**TURN, "type": "sound"}]},
        {"conversations": [{"from": "robot", "value": "x"}]},
        {"conversations": [{**TURN, "role": "assistant"}, TURN]},
        {"conversations": [TURN, {**TURN, "role": "system"}]},
    ],
    "E_NO_TARGET": [
        {"conversations": [TURN]},
        {"sequence": [{"type": "text", "content": "a"}]},
        {"conversations": [TURN, {"role": "assistant", "type": "text", "content": "  "}]},
    ],
    "E_IMAGE_MISSING": [
        {**GOOD, "image_path": name} for name in ("images/none.png", "images", "x" * 5000, "images/\0.png")
    ],
    "E_IMAGE_DECODE": [{**GOOD, "image_path": "images/text.png"}],
    "E_IMAGE_SIZE": [{**GOOD, "image_path": "images/line.png"}],
    "E_IMAGE_COUNT": [
        {
            "image": "images/cat.png",
            "conversations": [{"from": "human", "value": "<image><image>"}, {"from": "gpt", "value": "x"}],
        },
        {"image_list": ["images/cat.png"], "instruction_list": []},
        {"image_list": ["images/cat.png", "images/apple.png"], "instruction_list": ["a", "b"]},
    ],
    "E_TOO_LONG": [{**GOOD, "text_prompt": "a" * 500}],
    "E_SPECIAL_TOKEN": [{**GOOD, "text_prompt": "a <|im_end|> b"}],
}


@pytest.mark.parametrize("code", MALFORMED)
def test_malformed_records_are_named_by_line_and_nothing_else_is_lost(code, open_records, tmp_path):
    for record in MALFORMED[code]:
        dataset = open_records([GOOD, "", record, {**GOOD, "id": "last"}])
        assert [(error.line, error.code) for error in dataset.errors] == [(3, code)], dataset.errors
        assert len(dataset) == 2 and dataset.records[1].line == 4
        dataset.write_errors(tmp_path / "errors.jsonl")
        written = json.loads((tmp_path / "errors.jsonl").read_text().splitlines()[0])
        assert set(written) == {"file", "line", "id", "code", "message"} and written["message"]
        with pytest.raises(DataFormatError, match=f"data.jsonl:3: {code}"):
            open_records([GOOD, "", record], strict=True)
    with pytest.raises(UserError, match="no valid record"):
        open_records([MALFORMED[code][0]])


def test_a_truncated_picture_is_found_when_it_is_read(open_records):
    dataset = open_records([{**GOOD, "image_path": "images/cut.png"}, GOOD])
    with pytest.raises(BadSample, match="data.jsonl:1: E_IMAGE_DECODE"):
        dataset.sample(0, 0)


def test_transparent_and_palette_pictures_are_laid_on_white(pictures, open_records):
    assert load_image(pictures / "images" / "glass.png").getpixel((0, 0)) == (132, 137, 227)
    assert load_image(pictures / "images" / "palette.png").mode == "RGB"
    dataset = open_records([{**GOOD, "image_path": f"images/{name}.png"} for name in ("glass", "palette")])
    assert [dataset.sample(index, 0)["items"][1].image.shape[0] for index in range(2)] == [3, 3]


def test_a_long_answer_is_cut_and_its_end_is_not_learned(open_records):
    record = {"conversations": [TURN, {"role": "assistant", "type": "text", "content": "b" * 500}]}
    dataset = open_records([record], truncate_text=True)
    assert dataset.length(0, 0) == 400
    pack = make_collate(LAYOUT, Dropout(), 0)([dataset.sample(0, 0)])
    assert LAYOUT.tokens.eos not in pack["packed_label_ids"].tolist()
    assert float(pack["ce_loss_weights"][0]) == pytest.approx(len(pack["packed_label_ids"]) ** -0.5)


def test_choices_are_a_function_of_seed_epoch_and_index(open_records):
    record = {"text_prompt": [f"caption {number}" for number in range(9)], "image_path": "images/apple.png"}
    edit = {"image_list": [f"images/{name}.png" for name in ("apple", "green", "cat")], "instruction_list": ["x", "y"]}
    first, again, other = (open_records([record, edit], seed=seed) for seed in (1, 1, 2))
    chosen = [
        [data.plan(index, epoch)[0].ids or len(data.plan(index, epoch)) for index in (0, 1) for epoch in range(8)]
        for data in (first, again, other)
    ]
    assert chosen[0] == chosen[1] != chosen[2]
    assert len({str(value) for value in chosen[0]}) > 4


def test_every_record_comes_once_an_epoch_and_weights_count(open_records):
    dataset = open_records([GOOD] * 5 + [{**GOOD, "weight": 2.5}])
    counts = [sum(index % 6 == 5 for index in dataset.order(epoch)) for epoch in range(40)]
    assert set(counts) == {2, 3} and sum(counts) / 40 == pytest.approx(2.5, abs=0.3)
    assert sorted(index for index in dataset.order(3) if index % 6 != 5) == [0, 1, 2, 3, 4]
    assert dataset.order(1) == dataset.order(1) != dataset.order(2)


def test_weights_that_make_no_sample_an_epoch_are_refused(open_records):
    dataset = open_records([{**GOOD, "weight": 0.01}] * 50)
    with pytest.raises(UserError, match="sum up to 0.5: an epoch would hold no sample"):
        PackStream(
            dataset, DataConfig(), DistInfo(), batch_size=1, accumulation=1, collate=make_collate(LAYOUT, Dropout(), 0)
        )


def test_half_a_surrogate_pair_becomes_a_question_mark(open_records):
    dataset = open_records(['{"text_prompt": "a \\ud800", "image_path": "images/apple.png"}'])
    assert bytes(dataset.plan(0, 0)[0].ids) == b"a ?"
    sample = FolderTokenizer(tokenizer_folder("sample"))
    assert sample.encode("a \ud800") == sample.encode("a ?")


def test_questions_about_pictures_can_come_more_often(open_records):
    question = {"image_path": "images/apple.png", "question": "What?", "answer": "an apple"}
    dataset = open_records([GOOD, question, {**question, "weight": 2}], question_weight=3.0)
    counts = Counter(index % 3 for index in dataset.order(0))
    assert counts == {0: 1, 1: 3, 2: 6}


def test_noise_of_a_sample_does_not_depend_on_its_pack(open_records):
    dataset = open_records([GOOD, {**GOOD, "image_path": "images/cat.png"}])
    collate = make_collate(LAYOUT, Dropout(0.5, 0.5, 0.5), 3)
    both, second = collate([dataset.sample(0, 1), dataset.sample(1, 1)]), collate([dataset.sample(1, 1)])
    count = len(second["packed_noise"])
    assert torch.equal(both["packed_noise"][-count:], second["packed_noise"])
    assert torch.equal(both["packed_timesteps"][-count:], second["packed_timesteps"])


def test_json_parquet_and_webdataset_read_the_same_records(pictures, open_records):
    import pyarrow
    import pyarrow.parquet

    plan = kinds(open_records([GOOD]))
    (pictures / "list.json").write_text(json.dumps({"data": [GOOD]}))
    picture = (pictures / "images" / "apple.png").read_bytes()
    table = pyarrow.table({"text_prompt": ["A red apple"], "image": pyarrow.array([{"bytes": picture, "path": None}])})
    pyarrow.parquet.write_table(table, pictures / "rows.parquet")
    with tarfile.open(pictures / "shard.tar", "w") as tar:
        for name, content in (
            ("0001.png", picture),
            ("0001.json", json.dumps({"text_prompt": "A red apple", "image_path": "png"}).encode()),
            ("0002.jpg", picture),
            ("0002.txt", b"A red apple"),
        ):
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    from bagel.dataset import UnifiedGenerationDataset

    reference = open_records([GOOD])
    expected = reference.sample(0, 0)["items"][1].image
    for name, count in (("list.json", 1), ("rows.parquet", 1), ("shard.tar", 2)):
        dataset = UnifiedGenerationDataset(
            str(pictures / name),
            tokenizer=reference.tokenizer,
            layout=LAYOUT,
            vae_transform=reference.vae_transform,
            vit_transform=reference.vit_transform,
        )
        assert len(dataset) == count and not dataset.errors
        for index in range(count):
            assert kinds(dataset, index) == plan
            assert torch.equal(dataset.sample(index, 0)["items"][1].image, expected)


def test_files_that_cannot_be_read_at_all(pictures):
    for name, message in (("none.jsonl", "no such record file"), ("images", "a folder"), ("data.csv", "unknown kind")):
        (pictures / "data.csv").write_text("a,b")
        with pytest.raises(UserError, match=message):
            open_files(str(pictures / name), None)
    (pictures / "bad.json").write_text('{"rows": []}')
    with pytest.raises(UserError, match="key 'data'"):
        list(open_files(str(pictures / "bad.json"), None)[0].records())
    (pictures / "bom.jsonl").write_bytes(b"\xef\xbb\xbf" + json.dumps(GOOD).encode() + b"\r\n\r\n")
    assert [record.line for record in open_files(str(pictures / "bom.jsonl"), None)[0].records()] == [1]


def test_a_damaged_picture_leaves_its_pack_and_too_many_end_the_run(open_records, tmp_path):
    """One damaged picture is passed over and listed; a second one of 20 is more than 1 %."""

    def first_steps(damaged: int) -> tuple[list, Path]:
        cut = {**GOOD, "image_path": "images/cut.png"}
        dataset = open_records([cut] * damaged + [GOOD] * (20 - damaged))
        listed = tmp_path / f"bad_{damaged}.jsonl"
        stream = PackStream(
            dataset,
            DataConfig(packing="samples"),
            DistInfo(),
            batch_size=20,
            accumulation=1,
            collate=make_collate(LAYOUT, Dropout(), 1),
            bad_samples=listed,
        )
        stream.start(0)
        batch = stream.next_step()[0]
        stream.agree()
        return [index for _, index in batch["keys"]], listed

    kept, listed = first_steps(1)
    assert sorted(kept) == list(range(1, 20))
    assert [json.loads(line)["index"] for line in listed.read_text().splitlines()] == [0]
    with pytest.raises(UserError, match="2 of 20 samples cannot be read"):
        first_steps(2)
