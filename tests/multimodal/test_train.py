"""Training end to end on synthetic data: files, resume, reports, measures, search, messages."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from multimodal import embed, generate, metrics, train
from multimodal.config import ITEMS
from multimodal.data.sources import SAMPLE_DATA, read_records
from multimodal.data.synthetic import synthetic_records
from multimodal.model import create_model
from multimodal.weights.files import load_model, read_payload
from multimodal.weights.open import Embedder
from shared.engine.checkpoint import load_strict
from shared.errors import UserError
from tests.launching import final_tensors, losses, same_bits
from tests.multimodal.files import picture, wav, write_shard
from tests.multimodal.small import run

KIND = {"png": "image", "wav": "audio"}
STAGES = ("stage1_single", "stage2_align", "stage3_finetune")
WHOLE = ("--grad-accum", "2", "--dropout", "0.1", "--epochs", "3")


pytestmark = pytest.mark.usefixtures("small_network")


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """Three stages of one epoch (4 steps of 2 micro-batches of 8) without a break."""
    return run(tmp_path_factory.mktemp("whole") / "out", *WHOLE)


def test_all_files_of_the_guide_are_there(whole):
    epochs = {f"checkpoint_epoch_{number}.pt" for number in (1, 2, 3)}
    assert {path.name for path in (whole / "checkpoints").glob("*.pt")} == {"best_model.pt", "final_model.pt"} | epochs
    for stage in STAGES:
        assert (whole / stage / "DONE").exists() and len(losses(whole / stage)) == 4
    final = torch.load(whole / "checkpoints" / "final_model.pt", weights_only=True)
    assert (final["stage"], final["epoch"], final["stage_step"], final["format_version"]) == (3, 3, 4, 1)
    network = create_model("mini", 12, embed_dim=32, image_size=32, image_patch=8)
    network.load_state_dict(torch.load(whole / "checkpoints" / "best_model.pt", weights_only=True)["model_state_dict"])
    assert not [name for name in final["model_state_dict"] if "decoder" in name]
    first = torch.load(whole / "checkpoints" / "checkpoint_epoch_1.pt", weights_only=True)
    assert any(name.startswith("image_decoder") for name in first["pretrain_state_dict"])


def test_each_stage_moves_its_own_part(whole):
    one, two, three = (
        torch.load(whole / "checkpoints" / f"checkpoint_epoch_{i}.pt", weights_only=True)["model_state_dict"]
        for i in (1, 2, 3)
    )
    changed = {name for name in two if not torch.equal(one[name], two[name])}
    towers = {f"{name}_tower.norm.weight" for name in ("image", "text", "audio")}
    assert towers | {"word_projection.weight", "log_scale"} <= changed
    assert not [name for name in changed if name.startswith(("words", "fus", "to_fusion", "classifier", "match_head"))]
    assert {"words.weight", "fusion_tower.norm.weight", "classifier.1.weight", "match_head.weight"} <= {
        name for name in three if not torch.equal(two[name], three[name])
    }


def test_losses_are_finite_and_named(whole):
    rows = [json.loads(line) for line in (whole / STAGES[2] / "metrics.jsonl").read_text().splitlines()]
    names = {name for row in rows for name in row}
    wanted = "loss grad_norm lr image_imagetext audio_audiotext image_match audio_match class logit_scale".split()
    assert {f"train/{name}" for name in wanted} <= names
    assert {f"val/{name}" for name in ("loss", "image_text_to_item_R@10", "mAP", "micro_F1")} <= names
    assert all(value is not None for row in rows for value in row.values())


@pytest.mark.parametrize(
    "stop", [("--stages", "1"), pytest.param(("--stage-epochs", "1", "1", "0"), marks=pytest.mark.slow)]
)
def test_a_run_continued_across_stages_is_the_same(whole, tmp_path, stop):
    folder = tmp_path / "out"
    run(folder, *WHOLE, *stop)
    run(folder, *WHOLE)
    assert same_bits(final_tensors(folder / STAGES[2]), final_tensors(whole / STAGES[2]))


@pytest.mark.parametrize("stage", [pytest.param(1, marks=pytest.mark.slow), 2, pytest.param(3, marks=pytest.mark.slow)])
def test_a_run_continued_inside_a_stage_is_the_same(whole, tmp_path, stage):
    folder = tmp_path / "out"
    for earlier in STAGES[: stage - 1]:
        shutil.copytree(whole / earlier, folder / earlier)
    shutil.rmtree(folder / STAGES[stage - 1], ignore_errors=True)
    run(folder, *WHOLE, "--max-steps", "2", "--stages", *map(str, range(1, stage + 1)))
    for earlier in STAGES[: stage - 1]:  # --max-steps bounds every stage, also those that are there already
        shutil.rmtree(folder / earlier)
        shutil.copytree(whole / earlier, folder / earlier)
    run(folder, *WHOLE, "--stages", *map(str, range(1, stage + 1)))
    assert losses(folder / STAGES[stage - 1]) == losses(whole / STAGES[stage - 1])
    assert same_bits(final_tensors(folder / STAGES[stage - 1]), final_tensors(whole / STAGES[stage - 1]))


def test_a_fitted_path_stays_as_it_is_until_the_end(tmp_path, monkeypatch):
    """Fitted once, in the first stage that aligns; a run that is continued takes it from its checkpoint."""
    flags = ("--linear-path", "--stage-epochs", "0", "1", "1", "--stages", "2", "3", "--label-set", "none")
    whole, parts = run(tmp_path / "whole", *flags), tmp_path / "parts"
    run(parts, *flags, "--max-steps", "2")

    def fit_again(*_):
        raise AssertionError("fitted twice")

    monkeypatch.setattr(train, "fit_linear_path", fit_again)
    run(parts, *flags)
    a, b = (read_payload(own / "checkpoints" / "final_model.pt")[0]["model_state_dict"] for own in (whole, parts))
    path = {name for name in a if name.startswith("linear.")}
    assert len(path) == 5 and all(a[name].any() for name in path)
    assert all(torch.equal(a[name], b[name]) for name in path)


def test_a_run_over_shards_continued_is_the_same(tmp_path):
    members = {}
    for record in synthetic_records("train", 24).records:
        data, name = record.source.read(), record.id.rpartition("/")[2]
        suffix = "png" if record.kind == "image" else "wav"
        members |= {f"{name}.{suffix}": data, f"{name}.txt": record.captions[0].encode()}
    place = write_shard(tmp_path / "data" / "train-0.tar", dict(list(members.items())[:30]))
    write_shard(place / "train-1.tar", dict(list(members.items())[30:]))
    flags = ("--datasets", "shards", "--set", f"data.paths={{shards: {place}}}", "--stages", "2", "--label-set", "none")
    whole = run(tmp_path / "whole", *flags, "--total-steps", "6")
    parts = run(tmp_path / "parts", *flags, "--total-steps", "6", "--max-steps", "3")
    run(tmp_path / "parts", *flags, "--total-steps", "6")
    assert losses(parts / STAGES[1]) == losses(whole / STAGES[1]) and len(losses(whole / STAGES[1])) == 6
    assert same_bits(final_tensors(parts / STAGES[1]), final_tensors(whole / STAGES[1]))


def test_resuming_from_the_guides_checkpoint_file(whole, tmp_path):
    folder = tmp_path / "out"
    shutil.copytree(whole, folder)
    run(folder, *WHOLE, "--resume", str(folder / "checkpoints" / "checkpoint_epoch_2.pt"))
    assert same_bits(final_tensors(folder / STAGES[2]), final_tensors(whole / STAGES[2]))
    shutil.rmtree(folder / STAGES[1])
    with pytest.raises(SystemExit) as leaving:
        run(folder, "--resume", str(folder / "checkpoints" / "checkpoint_epoch_2.pt"))
    assert leaving.value.code == 2


def test_the_gradient_cache_trains_like_one_large_batch(tmp_path):
    """Stage 2: two micro-batches of eight with the cache, and one batch of sixteen."""
    cached = run(tmp_path / "cached", "--stages", "2", "--batch-size", "8", "--grad-accum", "2")
    direct = run(tmp_path / "direct", "--stages", "2", "--batch-size", "16")
    plain = run(tmp_path / "plain", "--stages", "2", "--batch-size", "8", "--grad-accum", "2", "--no-gradient-cache")
    one, two, three = (losses(folder / STAGES[1]) for folder in (cached, direct, plain))
    assert one == pytest.approx(two, rel=2e-4) and one[1] == pytest.approx(two[1], rel=1e-6)
    assert abs(three[1] - one[1]) > 0.1  # halves of the batch are an easier problem


def test_reports(whole):
    report = json.loads(next((whole / "reports").glob("report_*.json")).read_text())
    parts = "run environment model data notes epochs retrieval classification best files plots"
    assert set(report) == set(parts.split())
    assert report["run"]["exit_reason"] == "finished" and [row["stage"] for row in report["epochs"]] == [1, 2, 3]
    assert report["retrieval"]["image_text_to_item"]["R@10"] >= 0 and "mAP" in report["classification"]
    assert {Path(entry["path"]).name for entry in report["files"]} >= {"best_model.pt", "final_model.pt"}
    text = next((whole / "reports").glob("report_*.md")).read_text()
    assert "## Retrieval" in text and all((whole / "reports" / name).exists() for name in report["plots"])


def test_a_crash_leaves_a_report(tmp_path, monkeypatch):
    from multimodal.trainer import Trainer

    def broken(*_):
        raise ZeroDivisionError("planned")

    monkeypatch.setattr(Trainer, "losses", broken)
    with pytest.raises(ZeroDivisionError):
        run(tmp_path / "out", "--stages", "2")
    report = json.loads(next((tmp_path / "out" / "reports").glob("*.json")).read_text())
    assert "planned" in report["run"]["exit_reason"]


@pytest.mark.slow
def test_sigmoid_loss_masked_words_and_patch_dropping(tmp_path):
    flags = "--contrastive-loss siglip --unimodal-text mlm --patch-keep 0.5 --audio-keep 0.5 --ema-decay 0.9"
    folder = run(tmp_path / "out", *flags.split(), "--max-steps", "2", "--grad-accum", "2")
    names = set(json.loads((folder / STAGES[0] / "metrics.jsonl").read_text().splitlines()[0]))
    assert "train/masked_text" in names
    state = torch.load(folder / "checkpoints" / "final_model.pt", weights_only=True)["model_state_dict"]
    assert state["bias"].item() != -10 and state["audio_bias"].item() != -10


def test_one_kind_of_data_alone(tmp_path):
    records = [record for record in synthetic_records("train", 32).records if record.kind == "audio"]
    place = tmp_path / "data" / "jsonl"
    place.mkdir(parents=True)
    for number, record in enumerate(records):
        (place / f"{number}.wav").write_bytes(record.source.read())
    (place / "train.jsonl").write_text(
        "\n".join(json.dumps({"file": f"{i}.wav", "captions": record.captions}) for i, record in enumerate(records))
    )
    flags = ("--datasets", "jsonl", "--data-root", str(tmp_path / "data"), "--label-set", "none", "--max-steps", "1")
    folder = run(tmp_path / "out", *flags)
    network, _, _ = load_model(folder)
    assert network.config["num_classes"] == 12
    start = json.loads(next((folder / "reports").glob("*.json")).read_text())
    assert any("held out by the hash" in note for note in start["notes"]) and "audio_text_to_item" in start["retrieval"]


# --- after training ---------------------------------------------------------------------------------------------------


def test_measures_and_report_page(whole, tmp_path):
    final = whole / "checkpoints" / "final_model.pt"
    metrics.main(["--checkpoint", str(final), "--output", str(tmp_path / "m.json")])
    found = json.loads((tmp_path / "m.json").read_text())
    image = found["retrieval"]["synthetic_image"]
    assert (
        image["items"] == 64
        and image["captions"] == 128
        and image["text_to_item"]["chance_R@10"] == pytest.approx(10 / 64)
    )
    assert image["text_to_item"]["R@10_low"] <= image["text_to_item"]["R@10"] <= image["text_to_item"]["R@10_high"]
    assert "mAP" in found["classification"]["synthetic_image"] and (whole / "report.html").exists()


def test_measuring_data_that_the_run_has_not_seen(whole, tmp_path):
    command = ["--checkpoint", str(whole), "--data-root", str(SAMPLE_DATA), "--datasets", "coco", "clotho"]
    metrics.main([*command, "--output", str(tmp_path / "m.json")])
    found = json.loads((tmp_path / "m.json").read_text())["retrieval"]
    assert (found["coco"]["items"], found["clotho"]["items"]) == (40, 16)
    assert "--datasets coco clotho" in json.loads((whole / "report.json").read_text())["command"]


def test_zero_shot_on_a_folder_for_each_class(whole, tmp_path):
    for record in synthetic_records("val", 64).records[:16]:
        place = tmp_path / "classes" / record.captions[0].split()[1]
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{record.id.rpartition('/')[2]}.png").write_bytes(record.source.read())
    metrics.main(
        ["--checkpoint", str(whole), "--output", str(tmp_path / "m.json"), "--zeroshot", str(tmp_path / "classes")]
    )
    found = json.loads((tmp_path / "m.json").read_text())["zeroshot"]
    assert found["items"] == 16 and found["classes"] == found["chance"] ** -1


def test_retrieval_sheets(whole, tmp_path):
    generate.main(["--checkpoint", str(whole), "--output", str(tmp_path / "s.png"), "--prompt", "a red circle"])
    assert (tmp_path / "s.png").stat().st_size > 1000
    generate.main(["--checkpoint", str(whole), "--output", str(tmp_path / "s.json"), "--rows", "3"])
    rows = json.loads((tmp_path / "s.json").read_text())
    assert len(rows) == 3 and len(rows[0]["found_items"]) == 5


def test_encode_and_search(whole, tmp_path, capsys):
    folder = SAMPLE_DATA / "coco" / "val2017"
    index = str(tmp_path / "e.safetensors")
    command = ["encode", "--checkpoint", str(whole), "--images", str(folder), "--output", index]
    embed.main([*command, "--dtype", "fp16"])
    picture = read_records("coco", SAMPLE_DATA / "coco", "val").records[3].source
    capsys.readouterr()
    search = ["search", "--index", index, "--checkpoint"]
    embed.main([*search, str(whole), "--query-image", str(picture), "--top-k", "3"])
    lines = capsys.readouterr().out.splitlines()
    assert (
        len(lines) == 3 and lines[0].endswith(picture.name) and float(lines[0].split()[0]) == pytest.approx(1, abs=1e-2)
    )
    other = str(whole / "checkpoints" / "checkpoint_epoch_1.pt")
    with pytest.raises(SystemExit):
        embed.main([*search, other, "--query-text", "x"])
    assert "other weights" in capsys.readouterr().err


# --- messages ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags,message",
    [
        (("--model-size", "huge"), "model.size"),
        (("--data-root", "/nowhere", "--datasets", "coco", "jsonl"), "--datasets coco --data-root /nowhere fills it"),
        (("--data-root", "/nowhere", "--datasets", "jsonl"), "no such folder; --config small"),
        (("--stages", "4"), "1, 2, 3"),
        (("--init-from", "nowhere.pt"), "no such file"),
        (("--word-embeddings", "gone.txt"), "no such file"),
        (("--resume", "nowhere"), "--resume nowhere"),
        (("--global-batch-size", "13"), "not divisible"),
        (("--tokenizer", "gone.json"), "no such file"),
        (("--batch-size", "x"), "batch_size"),
    ],
)
def test_bad_input_ends_with_2_and_one_sentence(tmp_path, capsys, flags, message):
    with pytest.raises(SystemExit) as leaving:
        run(tmp_path / "out", *flags)
    error = capsys.readouterr().err
    assert leaving.value.code == 2 and message in error and "Traceback" not in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("split", ["training", "validation"])
@pytest.mark.parametrize("suffix", ["png", "wav"])
def test_a_list_of_which_nothing_can_be_read_ends_with_2_and_leaves_nothing(tmp_path, capsys, split, suffix):
    for name in ("train", "val"):
        rows = [{"file": f"{name}{number}.{suffix}", "caption": f"a thing {number}"} for number in range(20)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        for row in rows:
            make = picture if suffix == "png" else wav
            (tmp_path / row["file"]).write_bytes(b"no media") if split.startswith(name) else make(
                tmp_path / row["file"]
            )
    with pytest.raises(SystemExit) as leaving:
        run(
            tmp_path / "out", "--set", f"data.paths={{jsonl: {tmp_path}}}", "--datasets", "jsonl", "--label-set", "none"
        )
    error = capsys.readouterr().err
    assert leaving.value.code == 2 and f"none of 20 {ITEMS[KIND[suffix]]}s of the {split} split can be read" in error
    assert f"{split[:3]}" in error and error.count("\n") == 1 and not (tmp_path / "out").exists()


def test_other_settings_are_refused_before_anything_is_written(whole, tmp_path, capsys):
    folder = tmp_path / "out"
    shutil.copytree(whole, folder)
    shutil.rmtree(folder / STAGES[2])  # the stages before it are done and would be taken as they are
    before = (folder / "config.yaml").read_text()
    with pytest.raises(SystemExit) as leaving:
        run(folder, "--grad-accum", "2", "--dropout", "0.1", "--embed-dim", "64")
    assert leaving.value.code == 2 and "model.embed_dim was 32, is 64" in capsys.readouterr().err
    assert (folder / "config.yaml").read_text() == before and not (folder / STAGES[2]).exists()


def test_odd_texts_and_sets_are_named(whole, tmp_path, capsys):
    (tmp_path / "texts.txt").write_bytes(b"caf\xe9\n")
    (tmp_path / "meta").mkdir()
    (tmp_path / "meta" / "esc50.csv").write_text("a,b\n1,2\n")
    (tmp_path / "empty" / "meta").mkdir(parents=True)
    (tmp_path / "empty" / "meta" / "esc50.csv").write_text("filename,category\n")
    cases = [
        (embed, ("encode", "--texts", str(tmp_path / "texts.txt")), "convert it to UTF-8"),
        (metrics, ("--zeroshot", "coco80"), "measured on coco"),
        (metrics, ("--zeroshot", str(tmp_path)), "no column filename"),
        (metrics, ("--zeroshot", str(tmp_path / "empty")), "esc50.csv lists no sound"),
    ]
    for command, flags, message in cases:
        with pytest.raises(SystemExit) as leaving:
            command.main([*flags, "--checkpoint", str(whole), "--output", str(tmp_path / "x.parquet")])
        assert leaving.value.code == 2 and message in capsys.readouterr().err
        assert not (tmp_path / "x.parquet").exists()


def test_speakers_are_identified_from_voices_alone(tmp_path, capsys):
    """As the sentence about missing videos says; nothing is compared with anything then."""
    for place in (f"id1000{speaker}/v{video}/00001.wav" for speaker in range(4) for video in range(30)):
        wav(tmp_path / "voxceleb" / "wav" / place, 0.5)
    common = ("--datasets", "voxceleb", "--data-root", str(tmp_path), "--label-set", "voxceleb1", "--num-classes", "4")
    folder = run(tmp_path / "out", *common, "--stages", "3", "--max-steps", "2")
    best = read_payload(folder)[0]
    assert best["best_metric"] == "val/loss" and best["stage"] == 3
    metrics.main(["--checkpoint", str(folder), "--output", str(tmp_path / "m.json")])
    found = json.loads((tmp_path / "m.json").read_text())
    assert 0 <= found["classification"]["voxceleb"]["speaker_accuracy"] <= 1 and not found["retrieval"]
    for stages, flags, said in (
        ("2", (), "stage 2 compares voices with video frames"),
        ("3", ("--best-metric", "val/retrieval"), "val/retrieval"),
    ):
        with pytest.raises(SystemExit):
            run(tmp_path / "none", *common, "--stages", stages, *flags)
        assert said in capsys.readouterr().err and not (tmp_path / "none").exists()


def test_another_number_of_classes_needs_reset_head(whole, tmp_path, capsys):
    flags = ("--stages", "3", "--max-steps", "1", "--init-from", str(whole), "--num-classes", "20")
    with pytest.raises(SystemExit):
        run(tmp_path / "out", *flags)
    assert "--reset-head" in capsys.readouterr().err
    run(tmp_path / "out", *flags, "--reset-head")


def test_damaged_or_foreign_checkpoints_are_refused(whole, tmp_path):
    (tmp_path / "bad.pt").write_bytes((whole / "checkpoints" / "best_model.pt").read_bytes()[:5000])
    torch.save({"x": torch.zeros(1)}, tmp_path / "other.pt")
    payload = torch.load(whole / "checkpoints" / "best_model.pt", weights_only=True)
    torch.save({**payload, "tokenizer_sha256": "0" * 64}, tmp_path / "tokenizer.pt")
    for name, message in (
        ("bad.pt", "cannot be read"),
        ("other.pt", "no model_state_dict"),
        ("tokenizer.pt", "another tokenizer"),
        ("gone", "no such"),
    ):
        with pytest.raises(UserError, match=message):
            load_model(tmp_path / name)
    sizes = payload["model_config"]
    of_others = {  # other systems' files have some of the names, with other contents
        **{name: ({key: own for key, own in payload.items() if key != name}, f"its {name} is missing")
           for name in ("config", "stage", "epoch", "tokenizer_sha256")},
        "text": ({**payload, "config": "x"}, "its config is str, not dict"),
        "size": ({**payload, "model_config": {**sizes, "size": "giant"}}, "size 'giant' is not known"),
        "more": ({**payload, "model_config": {**sizes, "foo": 1}}, "describes no model of this version"),
        "none": ({**payload, "model_config": {}}, "has no 'size'"),
        "nine": ({**payload, "stage": 9}, "of stage 9"),
        "list": ({**payload, "model_state_dict": {"a": [1]}}, "other things than named tensors"),
        "unnamed": ({**payload, "tokenizer_sha256": None}, "its tokenizer_sha256 is NoneType"),
    }  # fmt: skip
    for name, (own, message) in of_others.items():
        torch.save(own, tmp_path / f"{name}.pt")
        with pytest.raises(UserError, match=f"{name}.pt: .*{message}"):
            load_model(tmp_path / f"{name}.pt")
    payload["config"]["data"]["gone_setting"] = 1  # made by another version
    torch.save(payload, tmp_path / "settings.pt")
    with pytest.raises(UserError, match="data.gone_setting: unknown"):
        Embedder.load(str(tmp_path / "settings.pt"), device="cpu")
    with pytest.raises(UserError, match="missing"):
        load_strict(create_model("mini"), {}, what="nothing")


@pytest.mark.slow
def test_the_plan_of_large_stays_below_20_gb(capsys):
    train.main(["--config", "large", "--dry-run", "--gpu", "4090"])
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("memory a rank"))
    assert float(line.split()[3]) < 20 and "fits" in line
