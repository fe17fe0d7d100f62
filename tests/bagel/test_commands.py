"""The commands end to end on a tiny model: train, draw, describe, evaluate, check data."""

import json
import shutil

import pytest
import torch
from PIL import Image

from bagel import check_data, generate, metrics
from bagel.train import main as train
from bagel.weights.open import open_model
from shared.errors import UserError
from shared.media import inception
from tests.bagel.conftest import SAMPLE, TINY
from tests.launching import run


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> str:
    """A tiny run of two steps with samples and its exported folder."""
    output = tmp_path_factory.mktemp("run")
    train([*TINY, "--output-dir", str(output), "--max-steps", "2", "--sample-records", "2"])
    return str(output)


def test_a_run_leaves_what_is_documented(trained, tmp_path):
    from pathlib import Path

    run = Path(trained)
    for name in (
        "config.yaml",
        "train.log",
        "metrics.jsonl",
        "DONE",
        "samples/step_2.png",
        "samples/step_2.json",
        "checkpoints/step_2/manifest.json",
        "checkpoints/step_2/trained_model.pt",
        "model/llm_config.json",
        "model/ema.safetensors",
    ):
        assert (run / name).is_file(), name
    import torch

    weights = torch.load(run / "checkpoints" / "step_2" / "trained_model.pt", weights_only=True)
    assert "language_model.lm_head.weight" in weights


def test_a_run_and_its_exported_folder_draw_the_same(trained, tmp_path):
    pictures = []
    for name, checkpoint in (
        ("run", trained),
        ("folder", f"{trained}/model"),
        ("checkpoint", f"{trained}/checkpoints/step_2"),
    ):
        path = tmp_path / f"{name}.png"
        generate.main(
            [
                "--checkpoint",
                checkpoint,
                "--prompt",
                "A red apple",
                "--output",
                str(path),
                "--num-timesteps",
                "4",
                "--device",
                "cpu",
            ]
        )
        pictures.append(Image.open(path).tobytes())
    assert pictures[0] == pictures[1] == pictures[2]


def test_half_precision_reads_and_draws(trained, tmp_path):
    """As on a GPU, where bf16 is the default."""
    Image.new("RGB", (60, 60), (200, 20, 20)).save(tmp_path / "in.png")
    common = ["--checkpoint", trained, "--device", "cpu", "--precision", "bf16", "--num-timesteps", "3"]
    question = ["--prompt", "What?", "--image", str(tmp_path / "in.png"), "--max-length", "4"]
    generate.main([*common, *question, "--output", str(tmp_path / "answer.json")])
    generate.main([*common, *question, "--task", "edit", "--output", str(tmp_path / "edited.png")])
    generate.main([*common, "--prompt", "A red apple", "--output", str(tmp_path / "drawn.png")])
    assert Image.open(tmp_path / "drawn.png").size == (32, 32)


@pytest.mark.parametrize(
    "file, change, message",
    [
        ("vit_config.json", {"num_hidden_layers": "many"}, "vit_config.json: num_hidden_layers"),
        ("vit_config.json", {"num_hidden_layers": 1}, "num_hidden_layers must be 2 or more"),
        ("bagel_config.json", {"autoencoder": {"kind": "x"}}, "bagel_config.json: autoencoder.kind"),
        ("bagel_config.json", {"max_latent_size": "wide"}, "bagel_config.json: max_latent_size"),
    ],
)
def test_a_model_folder_with_odd_settings_is_refused_by_file(trained, tmp_path, file, change, message):
    shutil.copytree(f"{trained}/model", tmp_path / "model")
    path = tmp_path / "model" / file
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(UserError, match=message):
        open_model(str(tmp_path / "model"), device="cpu")


def test_text_batches_and_edits(trained, tmp_path):
    Image.new("RGB", (60, 60), (200, 20, 20)).save(tmp_path / "in.png")
    common = ["--checkpoint", trained, "--device", "cpu", "--num-timesteps", "3", "--max-length", "8"]
    generate.main(
        [*common, "--prompt", "What?", "--image", str(tmp_path / "in.png"), "--output", str(tmp_path / "a.json")]
    )
    assert json.loads((tmp_path / "a.json").read_text())["task"] == "understand"
    generate.main(
        [
            *common,
            "--prompt",
            "blue",
            "--image",
            str(tmp_path / "in.png"),
            "--task",
            "edit",
            "--output",
            str(tmp_path / "e.png"),
        ]
    )
    assert Image.open(tmp_path / "e.png").size == (32, 32)
    (tmp_path / "prompts.txt").write_text("one\n\ntwo\n")
    generate.main([*common, "--prompts", str(tmp_path / "prompts.txt"), "--output", str(tmp_path / "grid.png")])
    generate.main([*common, "--output", str(tmp_path / "held_out.png")])
    assert Image.open(tmp_path / "held_out.png").height > Image.open(tmp_path / "grid.png").height
    generate.main([*common, "--prompt", "Say", "--output", str(tmp_path / "t.txt")])
    assert (tmp_path / "t.txt").exists() and not list(tmp_path.glob(".*"))
    generate.main([*common, "--prompt", "Say", "--output", str(tmp_path / "T.TXT")])
    assert (tmp_path / "T.TXT").read_text() == (tmp_path / "t.txt").read_text()


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--prompt", "a", "--checkpoint", "nowhere"], "no such folder"),
        (["--prompt", "a", "--prompts", "b.txt"], "not both"),
        (["--prompts", "b.txt", "--think"], "no --think"),
        (["--prompts", "."], "--prompts .: no such file"),
        (["--prompts", str(SAMPLE.parent / "images" / "1f34e.jpg")], "not UTF-8"),
        (["--prompt", "a", "--device", "abacus"], "--device abacus: not a device"),
        (["--prompt", "a", "--output", "x.bmp"], "unknown kind"),
        (["--prompt", "a", "--image", "none.png"], "not there"),
        (["--prompt", "a", "--height", "30"], "multiples of 4"),
        (["--prompt", "a", "--task", "edit"], "needs a picture"),
        (["--prompt", "a", "--cfg-interval", "1"], "two rising numbers"),
    ],
)
def test_mistakes_of_generate(flags, message, trained, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        generate.main(["--checkpoint", trained, "--output", str(tmp_path / "x.png"), "--device", "cpu", *flags])
    assert stopped.value.code == 2 and message in capsys.readouterr().err


def test_metrics_write_figures_and_a_report(trained, tmp_path, monkeypatch):
    class Mean(torch.nn.Module):
        def forward(self, x):
            return x.float().mean((2, 3))

    torch.jit.script(Mean()).save(str(tmp_path / "mean.pt"))
    opened, look = [], inception._is_torchscript
    monkeypatch.setattr(inception, "_is_torchscript", lambda path: opened.append(path) or look(path))
    output = tmp_path / "metrics.json"
    metrics.main(
        [
            "--checkpoint",
            trained,
            "--output",
            str(output),
            "--max-pictures",
            "2",
            "--num-timesteps",
            "3",
            "--max-length",
            "4",
            "--device",
            "cpu",
            "--fid-weights",
            str(tmp_path / "mean.pt"),
        ]
    )
    assert len(opened) == 1  # it was opened to be refused early, and again for held-out and training pictures
    figures = json.loads(output.read_text())
    for name in (
        "text_loss",
        "text_loss_unigram",
        "text_loss_3-gram",
        "image_ratio",
        "caption_first_of_10",
        "bleu",
        "rougeL",
        "train_colour_agreement",
        "train_fid",
    ):
        assert isinstance(figures[name], float), name
    for name in ("train_clip_score", "bertscore_f1"):
        assert figures[name] is None and figures[f"{name}_reason"]
    for name in ("report.json", "report.md", "report.html"):
        assert (tmp_path / name).stat().st_size > 500


def test_check_data_names_lines(pictures, capsys):
    path = pictures / "data.jsonl"
    path.write_text(
        '{"text_prompt": "a", "image_path": "images/apple.png"}\n{"text_prompt": "a"}\n'
        '{"text_prompt": "a", "image_path": "images/cut.png"}\n'
    )
    assert (
        check_data.main(
            [
                "--data-path",
                str(path),
                "--config",
                "small_captions",
                "--decode",
                "--output",
                str(pictures / "faults.jsonl"),
            ]
        )
        == 1
    )
    text = capsys.readouterr().out
    assert "data.jsonl:2: E_FIELD" in text and "data.jsonl:3: E_IMAGE_DECODE" in text and "2 faults" in text
    assert len((pictures / "faults.jsonl").read_text().splitlines()) == 2


@pytest.mark.slow
@pytest.mark.distributed
def test_a_sharded_model_writes_and_draws_while_it_trains(tmp_path):
    """The text's fast path calls the layers past forward, where FSDP has their weights gathered too."""
    words = [*TINY, "--max-steps", "1", "--sample-records", "2", "--device", "cpu", "--output-dir", str(tmp_path)]
    run(1, "bagel/train.py", *words, "--strategy", "fsdp")
    assert json.loads((tmp_path / "samples" / "step_1.json").read_text())["answers"]
