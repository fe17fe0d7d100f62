"""Checkpoint files say what they are, hold all that a run needs, and are handed on only when they are whole."""

import json
import shutil
import time
from pathlib import Path

import pytest
import torch

from multimodal import metrics
from multimodal.config import PRESETS, Config
from multimodal.evaluation import retrieval
from multimodal.objective import take_rows
from multimodal.trainer import metrics_of
from multimodal.weights import files
from multimodal.weights.open import Embedder
from shared.config import load_config
from shared.engine.checkpoint import verify
from tests.launching import final_tensors, losses, same_bits
from tests.multimodal import small
from tests.multimodal.small import run

ONE, TWO, THREE = "stage1_single", "stage2_align", "stage3_finetune"


pytestmark = pytest.mark.usefixtures("small_network")


def refused(folder: Path, capsys: pytest.CaptureFixture, *flags: str) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as leaving:
        run(folder, *flags)
    assert leaving.value.code == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return error


def load(folder: Path, name: str) -> dict:
    return torch.load(folder / "checkpoints" / name, weights_only=True)


LONG = ("--stages", "2", "--epochs", "6", "--stage-epochs", "1", "6", "1", "--save-every", "1", "--keep-last", "10")


@pytest.fixture(scope="module")
def slow_disk(tmp_path_factory):
    """Six epochs of stage 2, validated at every fourth step, on a disk that takes 0.4 s for every file."""
    patch = pytest.MonkeyPatch()
    real = files.save_aside

    def slow(payload, path):
        time.sleep(0.4)
        real(payload, path)

    patch.setattr("multimodal.trainer.save_aside", slow)
    folder = run(tmp_path_factory.mktemp("slow") / "out", *LONG)
    patch.undo()
    return folder


def test_every_epoch_has_its_file_however_long_writing_takes(slow_disk):
    steps = {n: load(slow_disk, f"checkpoint_epoch_{n}.pt")["stage_step"] for n in range(1, 7)}
    assert steps == {n: 8 * n for n in range(1, 7)}


def test_best_model_is_the_best_by_the_named_metric_and_the_loops_best(slow_disk):
    rows = [json.loads(line) for line in (slow_disk / TWO / "metrics.jsonl").read_text().splitlines()]
    scores = {row["step"]: row["val/retrieval"] for row in rows if "val/retrieval" in row}
    best = load(slow_disk, "best_model.pt")
    assert best["best_metric"] == "val/retrieval" and best["best_mode"] == "max"
    assert best["best_value"] == pytest.approx(max(scores.values())) == pytest.approx(scores[best["stage_step"]])
    loops = (slow_disk / TWO / "checkpoints" / "best").read_text().strip()
    assert best["training_state"] == f"{TWO}/checkpoints/{loops}"


@pytest.mark.parametrize("metric,mode", [("val/loss", "min"), ("val/audio_text_to_item_R@1", "max")])
def test_the_metric_can_be_chosen(tmp_path, metric, mode):
    folder = run(tmp_path / "out", "--stages", "2", "--best-metric", metric)
    best = load(folder, "best_model.pt")
    assert (best["best_metric"], best["best_mode"]) == (metric, mode)


@pytest.mark.parametrize(
    "stages,metric,known",
    [
        (("2",), "val/x", "val/retrieval"),
        (("1", "2", "3"), "val/nothing", "val/retrieval"),  # stage 1 would train to its end before
        (("1",), "val/retrieval", "val/masked_audio_loss"),  # stage 1 alone measures no retrieval
        (("2", "3"), "val/image_match_loss", "val/image_loss"),  # stage 3 gives it, stage 2 does not
        (("2", "3"), "val/mAP", "val/image_loss"),
        (("3",), "val/voice_match_loss", "val/audio_match_loss"),
    ],
)
def test_a_best_metric_that_a_stage_does_not_measure_is_refused_at_once(tmp_path, capsys, stages, metric, known):
    said = refused(tmp_path / "out", capsys, "--stages", *stages, "--best-metric", metric)
    assert f"--best-metric {metric}: no validation gives it" in said and known in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("stages", [("1",), ("1", "2"), ("3",)])
def test_what_the_validation_gives_is_what_is_named(tmp_path, stages):
    config = load_config(Config, presets=PRESETS, argv=[*small.QUICK, "--stages", *stages])
    folder = run(tmp_path / "out", "--stages", *stages, "--max-steps", "1", "--eval-steps", "1")
    text = (folder / (ONE, TWO, THREE)[int(stages[-1]) - 1] / "metrics.jsonl").read_text()
    given = {name for line in text.splitlines() for name in json.loads(line) if name.startswith("val/")}
    named = metrics_of(config, ["image", "audio"], classify=True) - {"auto"}
    assert named <= given and ("val/retrieval" in named) == (stages != ("1",))


def test_settings_that_cannot_be_met_are_refused(tmp_path, capsys):
    assert "one pair alone" in refused(tmp_path, capsys, "--batch-size", "1", "--grad-accum", "1")
    assert "draws no samples" in refused(tmp_path, capsys, "--set", "training.sample_steps=5")
    assert "no such flag" in refused(tmp_path, capsys, "--sample-steps", "5")
    assert not list(tmp_path.glob("stage*/checkpoints"))


def test_betas_and_epsilon_are_those_that_were_given(tmp_path):
    folder = run(tmp_path / "a", "--stages", "2", "--max-steps", "1", "--beta1", "0.5", "--adam-epsilon", "0.1")
    group = json.loads(next((folder / TWO / "checkpoints").glob("*/trainer.json")).read_text())["parameter_groups"][0]
    assert group["betas"] == [0.5, 0.98] and group["eps"] == 0.1


def test_rates_and_bounds_of_parts_act(tmp_path):
    flags = ("--align-flip", "1", "--attention", "chunked", "--attention-chunk", "8", "--no-mask-duplicates")
    folder = run(
        tmp_path / "a", "--stages", "3", "--max-steps", "1", "--tower-lr-scale", "0", "--max-logit-scale", "12", *flags
    )
    groups = json.loads(next((folder / THREE / "checkpoints").glob("*/trainer.json")).read_text())["parameter_groups"]
    assert min(group["lr"] for group in groups) == 0 < max(group["lr"] for group in groups)
    assert load(folder, "final_model.pt")["model_state_dict"]["log_scale"].exp().item() == pytest.approx(12, abs=1e-4)
    words = ("--train-words", "true", "--word-lr-scale", "20")
    folder = run(tmp_path / "b", "--stages", "2", "--max-steps", "1", *words)
    groups = json.loads(next((folder / TWO / "checkpoints").glob("*/trainer.json")).read_text())["parameter_groups"]
    rates = sorted({group["lr"] for group in groups})
    assert rates[1] == pytest.approx(20 * rates[0])


def test_an_epochs_file_goes_on_in_another_folder_bit_for_bit(slow_disk, tmp_path):
    """In the middle of a stage, and with nothing of the first run but that file."""
    carried = tmp_path / "checkpoint_epoch_3.pt"
    shutil.copy(slow_disk / "checkpoints" / "checkpoint_epoch_3.pt", carried)
    folder = run(tmp_path / "out", *LONG, "--resume", str(carried))
    assert same_bits(final_tensors(folder / TWO), final_tensors(slow_disk / TWO))
    whole = losses(slow_disk / TWO)
    assert losses(folder / TWO) == {step: loss for step, loss in whole.items() if step > 24}
    assert (
        load(folder, "checkpoint_epoch_6.pt")["stage_step"] == 48
        and (folder / "checkpoints" / "best_model.pt").exists()
    )


def test_an_epochs_file_with_averaged_weights_goes_on_too(tmp_path):
    flags = ("--stages", "2", "--stage-epochs", "1", "2", "1", "--save-every", "1", "--ema-decay", "0.9")
    whole = run(tmp_path / "whole", *flags)
    folder = run(tmp_path / "out", *flags, "--resume", str(whole / "checkpoints" / "checkpoint_epoch_1.pt"))
    assert same_bits(final_tensors(folder / TWO), final_tensors(whole / TWO))


def test_a_file_of_a_later_stage_trains_no_earlier_one(tmp_path):
    whole = run(tmp_path / "whole", "--epochs", "3")
    folder = run(tmp_path / "out", "--epochs", "3", "--resume", str(whole / "checkpoints" / "checkpoint_epoch_2.pt"))
    assert not (folder / ONE).exists() and same_bits(final_tensors(folder / THREE), final_tensors(whole / THREE))


def test_a_checkpoint_that_is_not_there_is_named_with_those_that_are(slow_disk, tmp_path, capsys):
    error = refused(tmp_path / "out", capsys, "--resume", str(slow_disk / "checkpoints" / "checkpoint_epoch_50.pt"))
    assert "checkpoint_epoch_50.pt: no such file" in error and "checkpoint_epoch_6.pt" in error
    error = refused(tmp_path / "out", capsys, *LONG, "--resume", str(slow_disk / "checkpoints" / "best_model.pt"))
    assert "no optimizer state" in error
    carried = str(slow_disk / "checkpoints" / "checkpoint_epoch_3.pt")
    error = refused(tmp_path / "out", capsys, *LONG, "--embed-dim", "64", "--resume", carried)
    assert "model.embed_dim was 32, is 64" in error
    assert "8 pairs a step" in refused(tmp_path / "out", capsys, *LONG, "--batch-size", "4", "--resume", carried)
    assert "of stage 2" in refused(tmp_path / "out", capsys, "--stages", "3", "--resume", carried)
    error = refused(tmp_path / "out", capsys, *LONG, "--synthetic-items", "72", "--resume", carried)
    assert "another list of samples" in error and "--allow-data-change" in error
    error = refused(tmp_path / "out", capsys, *LONG, "--resume", str(slow_disk))
    assert "the folder of another run" in error and "checkpoint_epoch_6.pt" in error
    assert not (tmp_path / "out").exists()


def test_another_batch_size_in_the_middle_of_a_stage_is_refused(tmp_path, capsys):
    flags = ("--stages", "2", "--stage-epochs", "1", "2", "1")
    folder = run(tmp_path / "out", *flags, "--max-steps", "3")
    (folder / TWO / "DONE").unlink()  # as a run that was killed
    assert "takes 8 pairs a step, now a step would take 16" in refused(folder, capsys, *flags, "--batch-size", "16")
    before = (folder / "config.yaml").read_bytes()
    assert "another list of samples" in refused(folder, capsys, *flags, "--synthetic-items", "72")
    assert (folder / "config.yaml").read_bytes() == before


def test_an_earlier_stage_is_not_trained_longer_for_nobody(tmp_path, capsys):
    folder = run(tmp_path / "out", "--stage-epochs", "1", "1", "0")
    run(folder, "--stage-epochs", "2", "2", "0")
    assert "stage1_single stays at 8 steps" in capsys.readouterr().out
    assert max(losses(folder / ONE)) == 8 and max(losses(folder / TWO)) == 16


# --- handing over -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two_stages(tmp_path_factory):
    return run(tmp_path_factory.mktemp("two") / "out", "--stage-epochs", "1", "1", "0", "--save-steps", "4")


def without_stage_two(whole: Path, folder: Path) -> Path:
    shutil.copytree(whole, folder)
    shutil.rmtree(folder / TWO)
    return folder / ONE / "checkpoints"


def test_a_stale_mark_does_not_decide_what_the_next_stage_starts_from(two_stages, tmp_path):
    checkpoints = without_stage_two(two_stages, tmp_path / "out")
    (checkpoints / "latest").write_text("step_00000004\n")  # killed between the renaming and the mark
    (tmp_path / "out" / ONE / "DONE").unlink()
    run(tmp_path / "out", "--stage-epochs", "1", "1", "0", "--save-steps", "4")
    assert same_bits(final_tensors(tmp_path / "out" / TWO), final_tensors(two_stages / TWO))


def test_damaged_weights_are_trained_again_before_the_next_stage(two_stages, tmp_path):
    checkpoints = without_stage_two(two_stages, tmp_path / "out")
    last = checkpoints / "epoch_0001"
    data = bytearray((last / "model.pt").read_bytes())
    data[len(data) // 2] ^= 1
    (last / "model.pt").unlink()  # a hard link
    (last / "model.pt").write_bytes(data)
    run(tmp_path / "out", "--stage-epochs", "1", "1", "0", "--save-steps", "4")
    verify(last)
    assert same_bits(final_tensors(tmp_path / "out" / TWO), final_tensors(two_stages / TWO))


# --- numbers that are none --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["items", "captions", "both", "one"])
def test_what_cannot_be_compared_is_found_last(which):
    generator = torch.Generator().manual_seed(0)
    items, captions = torch.randn(50, 8, generator=generator), torch.randn(50, 8, generator=generator)
    for name, value in (("items", items), ("captions", captions)):
        if which in (name, "both"):
            value.fill_(float("nan"))
    if which == "one":
        items[7] = float("nan")
    found = retrieval.retrieval(items, captions, list(range(50)))
    for values in found.values():
        assert values["R@1"] <= (0.1 if which == "one" else 0.0) and values["mAP@10"] < 0.2
    if which == "one":
        assert retrieval.ranks_of_targets(captions, items, [[7]] * 50)[0][0] == 49


def test_a_training_that_diverges_stops_and_leaves_no_final_model(tmp_path, capsys, monkeypatch):
    from multimodal.model import MultimodalModel

    own = MultimodalModel.embedding
    monkeypatch.setattr(
        MultimodalModel, "embedding", lambda self, *rest: own(self, *rest) * (1.0 if self.training else float("nan"))
    )
    error = refused(tmp_path / "out", capsys, "--stages", "2")
    assert "not finite" in error and "--learning-rate" in error
    assert not (tmp_path / "out" / "checkpoints" / "final_model.pt").exists()
    monkeypatch.undo()


def test_a_model_of_nan_is_not_measured(slow_disk, tmp_path, capsys):
    payload = load(slow_disk, "best_model.pt")
    payload["model_state_dict"]["embed.image.weight"].fill_(float("nan"))
    torch.save(payload, tmp_path / "nan.pt")
    with pytest.raises(SystemExit) as leaving:
        metrics.main(["--checkpoint", str(tmp_path / "nan.pt"), "--output", str(tmp_path / "m.json")])
    assert leaving.value.code == 2 and "not finite" in capsys.readouterr().err and not (tmp_path / "m.json").exists()


# --- the same twice ---------------------------------------------------------------------------------------------------


def test_rows_taken_twice_have_one_gradient():
    rows = torch.randint(0, 64, (192,), generator=torch.Generator().manual_seed(1))
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        value = torch.randn(64, 400, 64, requires_grad=True, generator=torch.Generator().manual_seed(2))
        weights = torch.randn(192, 400, 64, generator=torch.Generator().manual_seed(3))
        found = []
        for _ in range(6):
            value.grad = None
            (take_rows(value, rows) * weights).sum().backward()
            found.append(value.grad.clone())
        assert all(torch.equal(found[0], other) for other in found)
        plain = torch.zeros_like(value).index_add(0, rows, weights)
        assert torch.allclose(found[0], plain, atol=1e-4) and torch.equal(take_rows(value, rows), value[rows])
    finally:
        torch.set_num_threads(before)


def test_two_threads_train_stage_three_the_same_twice(tmp_path):
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        one, two = (run(tmp_path / name, "--stages", "3", "--batch-size", "16", "--max-steps", "4") for name in "ab")
    finally:
        torch.set_num_threads(before)
    assert same_bits(final_tensors(one / THREE), final_tensors(two / THREE))


# --- small things -----------------------------------------------------------------------------------------------------


def test_chance_is_that_of_its_direction():
    found = retrieval.chances(16, [item for item in range(16) for _ in range(5)])
    assert found["text_to_item"]["R@10"] == pytest.approx(10 / 16)
    assert found["item_to_text"]["R@10"] == pytest.approx(0.497, abs=1e-3)
    uneven = retrieval.chances(2, [0, 0, 0, 1])
    assert uneven["item_to_text"]["R@1"] == pytest.approx((3 / 4 + 1 / 4) / 2)


def test_padded_sounds_are_embedded_as_in_evaluation(tmp_path):
    folder = run(tmp_path / "out", "--stages", "2", "--max-steps", "1", "--audio-fill", "pad", "--audio-frames", "320")
    embedder = Embedder.load(str(folder), device="cpu")
    from multimodal.data.synthetic import synthetic_records

    records = synthetic_records("val", 64).records.by_kind()["audio"][:3]
    for number, record in enumerate(records):
        (tmp_path / f"{number}.wav").write_bytes(record.source.read())
    vectors, _ = embedder.sounds([tmp_path / f"{number}.wav" for number in range(3)])
    expected = embedder.split(records, "audio").items_IE
    assert (vectors * expected).sum(1).min() > 0.9999


def test_broken_files_are_counted_where_they_are(tmp_path):
    from PIL import Image

    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        for number in range(24):
            Image.new("RGB", (40, 40), (number * 10, 90, 20)).save(tmp_path / name / f"{number}.png")
        for split, numbers in (("train", range(16)), ("val", range(16, 24))):
            rows = [json.dumps({"file": f"{n}.png", "caption": f"{name} {n}"}) for n in numbers]
            (tmp_path / name / f"{split}.jsonl").write_text("\n".join(rows))
    (tmp_path / "one" / "3.png").write_bytes(b"no picture")
    (tmp_path / "one" / "20.png").write_bytes(b"no picture")
    folder = tmp_path / "out"
    run(
        folder, "--datasets", "jsonl", "--set", f"data.paths={{jsonl: {tmp_path / 'one'}}}", "--label-set", "none",
        "--stage-epochs", "1", "1", "0", "--batch-size", "8",
    )  # fmt: skip
    report = json.loads(next((folder / "reports").glob("*.json")).read_text())
    assert {row["split"]: row["bad"] for row in report["data"]} == {"train": 1, "val": 1}
    assert report["retrieval"]["image_text_to_item"]["chance_R@10"] == 1.0 and (folder / "report.html").exists()
