"""Items and batches: augmentation is keyed, texts are cut and padded, labels and broken files are dealt with."""

import json
from dataclasses import replace

import pytest
import torch

from multimodal.config import Config
from multimodal.data.records import ListRecords
from multimodal.data.sources import SAMPLE_DATA, PairedStream, make_datasets, read_records
from multimodal.data.synthetic import synthetic_records
from multimodal.data.text import TextTokenizer, load_word_vectors
from multimodal.dataset import Augmentation, collate
from multimodal.evaluation.held_out import validation_batch
from shared.engine.dist import DistInfo
from shared.errors import BadSample, UserError
from tests.multimodal.files import dataset, picture


@pytest.fixture(scope="module")
def tokenizer():
    return TextTokenizer()


def test_augmentation_depends_on_seed_epoch_and_index_alone(tokenizer):
    records = synthetic_records("train", 16).records
    own = dataset(records, tokenizer, augmentation=Augmentation(caption_drop=0.3), seed=3)
    again = dataset(records, tokenizer, augmentation=Augmentation(caption_drop=0.3), seed=3)
    for index in (0, 20):
        one, two, other = own.sample(index, 4), again.sample(index, 4), own.sample(index, 5)
        field = "images" if index == 0 else "audio"
        assert torch.equal(one[field], two[field]) and one["input_ids"] == two["input_ids"]
        assert not torch.equal(one[field], other[field])
        assert torch.equal(own[index][field], own[index][field])


def test_caption_drop_leaves_tokens_out_and_keeps_the_ends(tokenizer):
    records = synthetic_records("train", 64).records
    short = dataset(records, tokenizer, augmentation=Augmentation(caption_drop=0.3))
    pairs = [(item["input_ids"], tokenizer.encode(item["caption"])) for item in map(short.sample, range(64), [1] * 64)]
    kept = sum(len(ids) - 2 for ids, _ in pairs) / sum(len(ids) - 2 for _, ids in pairs)
    assert kept == pytest.approx(0.7, abs=0.06)
    for ids, whole in pairs:
        rest = iter(whole)
        assert ids[0] == whole[0] and ids[-1] == whole[-1] and all(number in rest for number in ids)  # in their order
    assert short[0]["input_ids"] == tokenizer.encode(short[0]["caption"])


def test_caption_drop_leaves_one_word_of_the_shortest_caption(tokenizer):
    records = ListRecords(replace(record, captions=("dog",)) for record in synthetic_records("train", 8).records)
    short = dataset(records, tokenizer, augmentation=Augmentation(caption_drop=0.9))
    whole = tokenizer.encode("dog")
    assert all(short.sample(index, epoch)["input_ids"] == whole for index in range(8) for epoch in range(8))


def test_the_mel_cache_gives_the_same_features(tmp_path, tokenizer):
    records = ListRecords(read_records("clotho", SAMPLE_DATA / "clotho", "val").records[:2])
    plain, cached = dataset(records, tokenizer), dataset(records, tokenizer, data={"mel_cache": str(tmp_path)})
    first, second = cached[0]["audio"], cached[0]["audio"]
    assert torch.equal(first, second) and len(list(tmp_path.glob("*.npy"))) == 1
    assert (plain[0]["audio"][:-2] - first[:-2]).abs().max() < 0.01  # fp16, and the edge of the cut


def test_collate_pads_text_to_eight_and_leaves_full_masks_out(tokenizer):
    records = synthetic_records("train", 4).records.by_kind()["audio"]
    batch = collate([dataset(records, tokenizer)[i] for i in range(4)])
    assert batch["input_ids"].shape[1] % 8 == 0 and "audio_mask" not in batch and batch["keys"].shape == (4, 2)
    short = dataset(records, tokenizer, data={"audio_fill": "pad"})
    short.data.audio_frames = 320
    assert collate([short[0]])["audio_mask"].sum() == 200


def test_long_texts_keep_sep_last():
    tokenizer = TextTokenizer(max_length=12)
    ids = tokenizer.encode("word " * 100)
    assert len(ids) == 12 and ids[0] == 1 and ids[-1] == 2
    assert tokenizer.decode([]) == "" and tokenizer.decode([1, 2]) == ""
    with pytest.raises(UserError, match="no such file"):
        TextTokenizer("nowhere.json")


def test_word_vectors(tmp_path, tokenizer):
    path = tmp_path / "glove.txt"
    path.write_text("dog 1 2 3\ncat 3 2 1\nnotaword 0 0 0\n")
    table = torch.nn.Embedding(tokenizer.vocabulary, 3)
    share = load_word_vectors(table, tokenizer, path, torch.Generator().manual_seed(0))
    dog = tokenizer.encode("dog")[1]
    assert table.weight[dog].tolist() == [1, 2, 3] and table.weight[0].tolist() == [0, 0, 0]
    assert share == pytest.approx(2 / 16384)
    assert table.weight[100:].detach().mean(0).tolist() == pytest.approx([2, 2, 2], abs=0.1)
    path.write_text("dog 1 2\n")
    with pytest.raises(UserError, match="line 1 has 2 numbers"):
        load_word_vectors(table, tokenizer, path, torch.Generator())


def test_a_validation_batch_passes_over_broken_files(tmp_path, tokenizer):
    rows = [{"file": f"{name}.png", "caption": name} for name in "abcd"]
    for row in rows:
        picture(tmp_path / row["file"])
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = dataset(read_records("jsonl", tmp_path, "train").records, tokenizer)
    (tmp_path / "c.png").write_bytes(b"broken")
    assert validation_batch(found, 1, 2)["slot"].tolist() == [3, 0]
    assert validation_batch(found, 0, 8)["slot"].tolist() == [0, 1, 3]
    for row in rows:
        (tmp_path / row["file"]).write_bytes(b"broken")
    with pytest.raises(UserError, match="none of 4 validation samples"):
        validation_batch(found, 0, 2)


def test_labels_are_used_where_every_sample_has_them(tmp_path, tokenizer):
    rows = [{"file": f"{name}.png", "caption": name} for name in "abcd"]
    for row in rows:
        picture(tmp_path / row["file"])
    for labelled in (rows[:3], rows):
        for row in labelled:
            row["labels"] = [1]
        (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
        records = {"image": read_records("jsonl", tmp_path, "train").records}
        config = Config(model={"num_classes": 2}, training={"label_set": "images"})
        found = make_datasets(config, records, tokenizer, stage=3, training=False)["image"]
        assert ("labels" in collate([found[0], found[3]])) == (labelled is rows)


class Numbers:
    """200 samples without pictures, of which some are broken."""

    bad = (20, 90, 160)

    def __len__(self):
        return 200

    def sample(self, index, epoch):
        if index in self.bad:
            raise BadSample(f"number {index} is broken")
        return {"id": str(index), "item_key": index}


def test_broken_samples_of_all_ranks_are_counted_together(tmp_path, monkeypatch):
    config = Config(training={"batch_size": 50, "gradient_accumulation_steps": 1, "num_workers": 0})
    ranks = [PairedStream({"image": Numbers()}, config, DistInfo(rank=n, world=2), tmp_path / "bad") for n in (0, 1)]
    for stream in ranks:
        stream.start(0)
        for _ in range(2):
            stream.next_step()
    met = [stream.streams["image"].bad.reasons for stream in ranks]
    assert sorted(map(len, met)) == [1, 2] and sorted({**met[0], **met[1]}) == [20, 90, 160]
    monkeypatch.setattr("shared.data.gather_objects", lambda own: list(map(dict, met)))
    for stream in ranks:
        with pytest.raises(UserError, match="3 of 200 samples cannot be read"):
            stream.agree()
