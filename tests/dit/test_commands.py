"""Drawing and measuring with a finished run, and the messages of generate.py and metrics.py."""

import json

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file

from dit import generate, metrics, train
from shared.config import save_config
from shared.errors import UserError
from tests.dit.small import tiny


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A finished tiny run."""
    folder = tmp_path_factory.mktemp("run")
    save_config(tiny(run={"output_dir": str(folder / "out"), "device": "cpu"}), folder / "tiny.yaml")
    train.main(["--config", str(folder / "tiny.yaml")])
    return folder / "out"


def test_pictures_do_not_depend_on_the_batch(trained, tmp_path):
    prompts = ["a red heart", "a blue car", "a dog"]
    for size in (1, 3):
        generate.main(
            [
                "--checkpoint",
                str(trained),
                "--prompt",
                *prompts,
                "--output",
                str(tmp_path / str(size)),
                "--batch-size",
                str(size),
                "--npz",
            ]
        )
    one, three = (np.load(tmp_path / str(size) / "samples.npz")["arr_0"] for size in (1, 3))
    assert one.shape == (3, 32, 32, 3) and np.abs(one.astype(int) - three).max() <= 1
    lines = [json.loads(line) for line in (tmp_path / "3" / "prompts.jsonl").read_text().splitlines()]
    assert [line["prompt"] for line in lines] == prompts and lines[2]["seed"] == 2
    single = tmp_path / "single"
    generate.main(["--checkpoint", str(trained), "--prompt", "a dog", "--seed", "2", "--output", str(single)])
    assert np.abs(np.asarray(Image.open(single / "000000.png")).astype(int) - three[2]).max() <= 1


def test_generate_reads_files_and_every_option_acts(trained, tmp_path):
    (tmp_path / "p.jsonl").write_text('{"prompt": "a cat"}\n{"text": "a dog"}\n')
    base = ["--checkpoint", str(trained), "--prompts", str(tmp_path / "p.jsonl")]
    generate.main([*base, "--output", str(tmp_path / "plain.png")])
    plain = np.asarray(Image.open(tmp_path / "plain.png"))
    for option in (
        ["--steps", "5"],
        ["--sampler", "heun"],
        ["--sampler", "sde"],
        ["--shift", "3"],
        ["--cfg-scale", "1"],
        ["--negative", "a dog"],
        ["--cfg-interval", "0.2", "0.5"],
        ["--cfg-rescale", "0.7"],
        ["--cfg-channels", "2"],
        ["--no-ema"],
        ["--seed", "7"],
        ["--images-per-prompt", "2"],
        ["--image-size", "48"],
        ["--num", "1"],
    ):
        generate.main([*base, "--output", str(tmp_path / "other.png"), *option])
        other = np.asarray(Image.open(tmp_path / "other.png"))
        assert other.shape != plain.shape or not np.array_equal(plain, other) or option[0] in ("--cfg-interval",), (
            option
        )
    generate.main([*base, "--latents-only", "--output", str(tmp_path / "latents")])
    assert load_file(tmp_path / "latents" / "latents.safetensors")["latents"].shape == (2, 4, 4, 4)
    generate.main(
        [
            "--checkpoint",
            str(trained),
            "--captions",
            "cub:dit/sample_data/CUB_200_2011",
            "--num",
            "2",
            "--output",
            str(tmp_path / "c.png"),
        ]
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt", "x", "--labels", "1"], "not with several"),
        (["--labels", "1"], "not class-conditional"),
        (["--prompt", "x", "--sampler", "ddim"], "not a sampler of the flow"),
        (["--prompt", "x", "--image-size", "33"], "multiple of 8"),
        (["--prompts", "nowhere.txt"], "nowhere.txt"),
        (["--prompts", "."], "--prompts .: no such file"),
        (["--prompts", "empty.txt"], "nothing to draw"),
        (["--prompts", "binary.txt"], "binary.txt: not UTF-8"),
        (["--prompts", "list.json"], "list.json: .json is not read"),
        (["--prompts", "number.jsonl"], "number.jsonl:2: expected a JSON object with a text"),
        (["--prompt", "x", "--seed", str(2**63)], "seed"),
        (["--prompt", "x", "--vae", "elsewhere"], "type pool"),
        (["--prompt", "x", "--steps", "many"], "steps"),
    ],
)
def test_generate_says_what_is_wrong(trained, tmp_path, capsys, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    files = {
        "empty.txt": b"\n",
        "binary.txt": b"\xff\xfe",
        "number.jsonl": b'{"text": "a"}\n{"text": 5}\n',
        "list.json": b"[]",
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(SystemExit) as left:
        generate.main(["--checkpoint", str(trained), "--output", str(tmp_path / "x.png"), *arguments])
    assert left.value.code == 2 and message in capsys.readouterr().err
    assert not (tmp_path / "x.png").exists()


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"prompt": ["a"]}, "give --labels"),
        ({"labels": [0], "negative": "b"}, "without --prompt and --negative"),
        ({"labels": [1, 3]}, "--labels 3: the model knows the classes 0 to 2"),
        ({"labels": [-1]}, "--labels -1"),
    ],
)
def test_a_class_conditional_model_is_asked_for_its_classes(asked, message):
    config = tiny(model={"text_conditioning": "none", "num_classes": 3})
    with pytest.raises(UserError, match=message):
        generate.requests(generate.GenerateOptions(checkpoint="x", **asked), config)
    drawn = generate.requests(generate.GenerateOptions(checkpoint="x"), config)
    assert [request.label for request in drawn] == [0, 1, 2]


def test_metrics_write_figures_and_a_report(trained, tmp_path):
    found = metrics.main(
        [
            "--checkpoint",
            str(trained),
            "--output",
            str(tmp_path / "m.json"),
            "--num",
            "12",
            "--metrics",
            "loss,caption,recon,vae,colour,memory,fid",
            "--features",
            "random",
        ]
    )
    written = json.loads((tmp_path / "m.json").read_text())
    assert (
        written["loss"] == found["loss"] and 0.2 < found["loss"]["ratio"] < 1.5 and len(found["loss"]["by_level"]) == 10
    )
    assert "tests only" in found["fid"]["features"] and found["fid"]["fid"] >= 0
    assert found["memory"]["held_out_to_training"] > 0 and found["vae"]["psnr"] > 5
    assert (trained / "report.html").stat().st_size > 5000


def test_fid_without_weights_says_which_file(trained, capsys):
    with pytest.raises(SystemExit) as left:
        metrics.main(["--checkpoint", str(trained), "--metrics", "fid"])
    assert left.value.code == 2 and "inception-2015-12-05" in capsys.readouterr().err


@pytest.mark.parametrize("clip", ["./nowhere", None])
def test_a_wrong_clip_is_refused_before_the_run_is_opened(monkeypatch, tmp_path, capsys, clip):
    monkeypatch.setattr(metrics, "load_asked", lambda *_: pytest.fail("the run was opened"))
    with pytest.raises(SystemExit) as left:
        metrics.main(
            ["--checkpoint", str(tmp_path), "--metrics", "loss,clip", *(["--clip-path", clip] if clip else [])]
        )
    assert left.value.code == 2 and "--clip-path" in capsys.readouterr().err
