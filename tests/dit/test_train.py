"""Training as a whole: draws, resume, accumulation, ranks, the cache, drawing and measuring, and the messages."""

import errno
import re
import shutil

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file

from dit import precompute, train
from dit.config import PRESETS, Config
from dit.dataset import TextImageDataset, collate, unit
from dit.evaluation.held_out import errors, prepare
from dit.modules.text import HashTextEncoder
from dit.modules.vae import PoolCodec
from dit.train import Trainer
from dit.weights import convert
from dit.weights.open import build_model
from shared.config import load_config, save_config
from shared.engine.checkpoint import newest_checkpoint
from shared.engine.dist import DistInfo
from shared.log import read_metrics
from shared.metrics import paired_p
from shared.rng import seed_everything
from tests import launching
from tests.dit.small import tiny


@pytest.fixture
def settings(tmp_path):
    """A file with the tiny settings, and the arguments that use it."""

    def write(**sections) -> list[str]:
        path = tmp_path / "tiny.yaml"
        save_config(tiny(run={"output_dir": str(tmp_path / "out"), "device": "cpu"}, **sections), path)
        return ["--config", str(path)]

    return write


def make_trainer(config: Config) -> tuple[Trainer, TextImageDataset]:
    torch.manual_seed(0)
    dataset = TextImageDataset.from_config(config, is_train=True)
    encoder = HashTextEncoder(width=config.model.text_dim, length=config.model.text_len)
    trainer = Trainer(build_model(config), PoolCodec(), encoder, None, config)
    for parameter in trainer.model.parameters():
        parameter.data = torch.randn(parameter.shape) * 0.05
    return trainer, dataset


def batch_of(dataset: TextImageDataset, indices: range, slots: range | None = None) -> dict:
    batch = collate([dataset.sample(index, 0) for index in indices])
    return {**batch, "slot": torch.tensor(list(slots or indices))}


def weights_of(folder) -> dict:
    return {
        name: value for file in ("model", "ema") for name, value in load_file(folder / f"{file}.safetensors").items()
    }


def same_weights(first, second) -> bool:
    one, two = weights_of(first), weights_of(second)
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("objective", ["flow", "ddpm"])
def test_a_batch_of_eight_equals_two_of_four(objective):
    trainer, dataset = make_trainer(tiny(diffusion={"objective": objective}, sample={"sampler": "auto"}))
    model, gradients = trainer.model, []
    for batches in ([batch_of(dataset, range(8))], [batch_of(dataset, range(4)), batch_of(dataset, range(4, 8))]):
        model.zero_grad()
        for loss, _ in trainer.losses(model, batches, 3):
            loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert (gradients[0] - gradients[1]).abs().max() <= 1e-6 * gradients[0].abs().max()


def test_the_flow_loss_starts_at_one_plus_the_variance_of_the_latents():
    config = tiny()
    trainer, dataset = make_trainer(config)
    trainer.model = build_model(config)
    batch = batch_of(dataset, range(128))
    loss = trainer.training_step(batch)
    assert abs(loss.item() - (1 + trainer.latents(batch, 0).square().mean().item())) < 0.15
    noise = tiny(diffusion={"objective": "ddpm"}, sample={"sampler": "auto"})
    trainer, dataset = make_trainer(noise)
    trainer.model = build_model(noise)
    assert abs(trainer.training_step(batch).item() - 1.0) < 0.1


def test_captions_are_dropped_as_often_as_asked():
    trainer, dataset = make_trainer(tiny(diffusion={"cfg_dropout": 0.25}))
    seen = []

    def spy(noisy, t, drop, **condition):
        seen.append(drop)
        return torch.zeros_like(noisy)

    for step in range(60):
        list(trainer.losses(spy, [batch_of(dataset, range(8))], step))
    share = torch.cat(seen).double().mean().item()
    assert 0.18 < share < 0.32


def test_draws_follow_the_slot_and_not_the_rank():
    trainer, dataset = make_trainer(tiny())
    found = []

    def spy(noisy, t, drop, **condition):
        found.append((noisy, t, drop))
        return torch.zeros_like(noisy)

    list(trainer.losses(spy, [batch_of(dataset, range(4))], 5))
    list(trainer.losses(spy, [batch_of(dataset, range(2, 4))], 5))
    assert all(torch.equal(whole[2:], part) for whole, part in zip(*found, strict=True))


def test_the_posterior_is_drawn_anew_by_step_and_slot():
    class Noisy(PoolCodec):
        posterior = "sample"

        def latents(self, moments, noise=None):
            return moments[:, :4] + noise

    trainer, dataset = make_trainer(tiny())
    plain = trainer.latents(batch_of(dataset, range(4)), 0)
    trainer.vae_encoder = Noisy()
    first, again, later = (trainer.latents(batch_of(dataset, range(4)), step) - plain for step in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, later)
    assert 0.8 < first.std() < 1.2 and not torch.equal(first[0], first[1])
    part = trainer.latents(batch_of(dataset, range(2, 4)), 0) - plain[2:]
    assert torch.allclose(part, first[2:], atol=1e-6)


def test_resume_is_bit_exact(settings, tmp_path):
    arguments = settings(training={"total_steps": 6})
    train.main([*arguments, "--output-dir", str(tmp_path / "straight")])
    for steps in (2, 3, 6):
        train.main([*arguments, "--output-dir", str(tmp_path / "broken"), "--max-steps", str(steps)])
    names = [tmp_path / run / "checkpoints" / "checkpoint-step-6" for run in ("straight", "broken")]
    assert same_weights(*names)
    losses = [
        [row["train/loss"] for row in read_metrics(tmp_path / run / "metrics.jsonl") if "train/loss" in row]
        for run in ("straight", "broken")
    ]
    assert losses[0] == losses[1] and len(losses[0]) == 6


def test_training_writes_what_the_guide_promises(settings, tmp_path):
    train.main([*settings(training={"total_steps": 24, "save_every_n_epochs": 1, "save_steps": 10, "keep_last": 9})])
    out = tmp_path / "out"
    names = {path.name for path in (out / "checkpoints").iterdir()}
    assert {"checkpoint-step-10", "checkpoint-step-20", "checkpoint-epoch-1"} <= names
    assert "Step 24, Loss: " in (out / "train.log").read_text()
    assert Image.open(next((out / "samples").glob("*.png"))).size[0] > 32
    rows = read_metrics(out / "metrics.jsonl")
    assert any("val/ratio" in row for row in rows) and any("val/shuffled_p" in row for row in rows)
    wrong = [
        "--config",
        str(tmp_path / "tiny.yaml"),
        "--resume",
        str(out / "checkpoint-epoch-1"),
        "--max-steps",
        "25",
        "--total-steps",
        "30",
    ]
    train.main(wrong)
    assert "resumed from" in (out / "train.log").read_text()


@pytest.mark.distributed
@pytest.mark.slow
def test_two_ranks_train_as_one(settings, tmp_path):
    arguments = [*settings(training={"total_steps": 4, "global_batch_size": 8, "batch_size": 4}), "--precision", "fp32"]
    train.main([*arguments, "--output-dir", str(tmp_path / "one")])
    for strategy in ("ddp", "zero3"):
        launching.run(2, "dit/train.py", *arguments, "--strategy", strategy, "--output-dir", str(tmp_path / strategy))
        for name, value in weights_of(tmp_path / "one" / "checkpoints" / "checkpoint-step-4").items():
            other = weights_of(tmp_path / strategy / "checkpoints" / "checkpoint-step-4")[name]
            assert (value.float() - other.float()).abs().max() <= 1e-6 * max(1.0, value.float().abs().max()), name


def test_cache_trains_as_the_encoders_do(settings, tmp_path):
    arguments = [*settings(data={"flip": 0.5}, training={"total_steps": 2}), "--precision", "fp32"]
    cached = str(tmp_path / "cache")
    command = [*arguments, "--out", cached, "--shard-size", "50", "--cache.dtype", "float32"]
    precompute.main(command)
    damaged = next((tmp_path / "cache").glob("latents_00001_*"))
    damaged.write_bytes(damaged.read_bytes()[:-8])
    whole = next((tmp_path / "cache").glob("latents_00000_*"))
    before = whole.stat().st_mtime_ns
    precompute.main(command)  # mends the damaged shard and leaves the others
    assert whole.stat().st_mtime_ns == before
    train.main([*arguments, "--output-dir", str(tmp_path / "pictures")])
    train.main([*arguments, "--cache-dir", cached, "--output-dir", str(tmp_path / "cached")])
    names = [tmp_path / run / "checkpoints" / "checkpoint-step-2" for run in ("pictures", "cached")]
    losses = [
        [{name: row[name] for name in ("train/loss", "val/loss") if name in row} for row in read_metrics(run)]
        for run in (tmp_path / "pictures" / "metrics.jsonl", tmp_path / "cached" / "metrics.jsonl")
    ]
    assert losses[0] == losses[1] and same_weights(*names)
    with pytest.raises(SystemExit):
        train.main([*arguments, "--cache-dir", cached, "--image-size", "64", "--output-dir", str(tmp_path / "other")])


def test_mirrored_latents_are_encoded_not_mirrored(settings, tmp_path):
    precompute.main([*settings(), "--out", str(tmp_path / "cache"), "--cache.dtype", "float32"])
    moments = load_file(next((tmp_path / "cache").glob("latents_00000_*")))["moments"]
    assert moments.shape[1] == 2
    dataset = TextImageDataset.from_config(tiny(), is_train=True)
    assert torch.equal(moments[5, 1], PoolCodec().moments(unit(dataset.sample(5, 0, flip=True)["image"])[None])[0])


def test_held_out_errors_repeat_and_constant_is_the_baseline():
    config = tiny()
    trainer, dataset = make_trainer(config)
    held_out = TextImageDataset.from_config(config, is_train=False)
    held = prepare(held_out, dataset, PoolCodec(), trainer.text_encoder, count=8, device=torch.device("cpu"))
    first, second = (errors(trainer.model, trainer.objective, held, DistInfo(), batch_size=size) for size in (8, 3))
    assert first.shape == (10, 8) and torch.allclose(first, second, rtol=1e-4)
    shuffled = errors(trainer.model, trainer.objective, held, DistInfo(), kind="shuffled")
    assert not torch.allclose(shuffled, first, rtol=1e-4)
    constant = errors(None, trainer.objective, held, DistInfo(), kind="constant")
    expected = 1 + (held.latents - held.mean_latent).square().mean()
    assert abs(constant.mean() - expected) < 0.3
    assert paired_p(torch.tensor([1.0, 1.1, 0.9, 1.0])) < 0.001 < 0.5 < paired_p(torch.tensor([-1.0, -1.1, 0.1]))


def test_guides_form_of_the_settings_is_read():
    guide = load_config(Config, presets=PRESETS, argv=["--config", "train_config"])
    ours = load_config(
        Config,
        presets=PRESETS,
        argv=[
            "--config",
            "default",
            "--data-root",
            "./data/cub_subset",
            "--precision",
            "bf16",
            "--output-dir",
            "./outputs",
            "--tensorboard",
        ],
    )
    first, second = guide.model_dump(), ours.model_dump()
    second["sample"] = first["sample"]
    assert first == second
    fallback = Config.model_validate(
        {"data": {"dataset_path": "x"}, "training": {"mixed_precision": "no"}, "ema": {"enabled": False}}
    )
    assert (fallback.training.batch_size, fallback.training.num_epochs, fallback.run.precision) == (32, 100, "fp32")
    assert (
        fallback.training.max_grad_norm is None
        and fallback.training.ema_decay == 0
        and fallback.data.dataset_name == "coco"
    )
    low = Config.model_validate(
        {"training": {"learning_rate": 2e-4}, "lr_scheduler": {"type": "cosine", "min_lr": 1e-5}}
    )
    assert low.training.min_lr_ratio == pytest.approx(0.05)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data-root", "/nowhere"], "/nowhere"),
        (["--set", "training.batchsize=4"], "batch_size"),
        (["--batch-size", "four"], "batch_size"),
        (["--batch-size", "500"], "smaller --batch-size"),
        (["--image-size", "33"], "image_size 33"),
        (["--set", "model.in_channels=5"], "in_channels"),
        (["--set", "vae.type=sd", "--set", "vae.pretrained_model_name=/nowhere"], "vae.pretrained_model_name /nowhere"),
        (
            ["--set", "text.type=clip", "--set", "text.pretrained_model_name=/nowhere"],
            "text.pretrained_model_name /nowhere",
        ),
        (["--set", "diffusion.rescale_betas_zero_snr=true"], "v_prediction"),
        (["--set", "diffusion.objective=ddpm"], "sample.sampler euler"),
        (["--no-persistent-workers"], "persist"),
        (["--config", "smal"], "small"),
        (["--resume", "/nowhere/checkpoint-epoch-1"], "/nowhere/checkpoint-epoch-1"),
        (["--cache-dir", "/nowhere"], "precompute"),
    ],
)
def test_train_says_what_is_wrong(settings, capsys, arguments, message):
    start = [] if arguments[0] == "--config" else settings()
    with pytest.raises(SystemExit) as left:
        train.main([*start, *arguments])
    assert left.value.code == 2 and message in capsys.readouterr().err


def test_weights_to_start_from_are_read_before_a_codec_is_fitted(tmp_path, capsys):
    (tmp_path / "cut.safetensors").write_bytes(b"")
    save_file({"a": torch.zeros(2)}, tmp_path / "other.safetensors")
    for name, message in (("cut", "cannot be read as weights"), ("other", "not one tensor fits")):
        with pytest.raises(SystemExit) as left:
            out = ["--output-dir", str(tmp_path / "out"), "--pretrained-path", str(tmp_path / f"{name}.safetensors")]
            train.main(["--config", "small", "--device", "cpu", *out])
        assert left.value.code == 2 and message in capsys.readouterr().err
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("codec", [{"type": "pool"}, {"type": "patches", "patch": 8, "decoder_steps": 0}])
def test_weights_to_start_from_are_read_once_and_the_rest_begins_as_without_a_codec(
    settings, tmp_path, monkeypatch, codec
):
    """Names that the file lacks get the weights that the seed gives, whatever was fitted in between."""
    words = settings(vae=codec, training={"total_steps": 1, "learning_rate": 0.0})
    config = load_config(Config, argv=words, presets=PRESETS)
    seed_everything(config.run.seed)
    wanted = build_model(config).state_dict()
    wanted["x_embedder.proj.weight"] = torch.full_like(wanted["x_embedder.proj.weight"], 0.25)
    save_file({"x_embedder.proj.weight": wanted["x_embedder.proj.weight"]}, tmp_path / "some.safetensors")
    read, times = convert.read_state, []
    monkeypatch.setattr(convert, "read_state", lambda path: times.append(path) or read(path))
    train.main([*words, "--pretrained-path", str(tmp_path / "some.safetensors")])
    found = load_file(newest_checkpoint(tmp_path / "out") / "model.safetensors")
    assert len(times) == 1
    assert all(torch.equal(found[name], wanted[name]) for name in found if not name.startswith("null_text"))


def test_an_unknown_key_names_the_nearest(tmp_path, capsys):
    path = tmp_path / "wrong.yaml"
    path.write_text(yaml.safe_dump({"training": {"learning_rat": 1.0}}))
    with pytest.raises(SystemExit):
        train.main(["--config", str(path)])
    assert "learning_rate" in capsys.readouterr().err


def test_a_truncated_picture_is_skipped_and_many_stop_the_run(settings, tmp_path, capsys):
    root = tmp_path / "data"
    shutil.copytree(PRESETS.parent / "sample_data" / "CUB_200_2011", root)
    broken = sorted((root / "images").rglob("*.jpg"))
    broken[0].write_bytes(broken[0].read_bytes()[:200])
    train.main([*settings(training={"total_steps": 25}), "--data-root", str(root)])
    listed = (tmp_path / "out" / "bad_samples.jsonl").read_text()
    assert broken[0].name in listed
    for path in broken[:40]:
        path.write_bytes(b"")
    with pytest.raises(SystemExit):
        train.main(
            [
                *settings(training={"total_steps": 25}),
                "--data-root",
                str(root),
                "--output-dir",
                str(tmp_path / "second"),
            ]
        )
    assert "more than 1%" in capsys.readouterr().err


def test_a_damaged_checkpoint_is_passed_over_and_refused_by_name(settings, tmp_path, capsys):
    arguments = settings(training={"total_steps": 6})
    train.main([*arguments, "--max-steps", "4"])
    damaged = tmp_path / "out" / "checkpoints" / "checkpoint-step-4"
    data = bytearray((damaged / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (damaged / "model.safetensors").write_bytes(data)
    with pytest.raises(SystemExit) as left:
        train.main([*arguments, "--resume", str(damaged)])
    assert left.value.code == 2 and "model.safetensors" in capsys.readouterr().err
    train.main([*arguments, "--max-steps", "3"])
    log = (tmp_path / "out" / "train.log").read_text()
    assert "passed over" in log and "at step 2" in log


def test_a_full_disk_leaves_nothing_half_written(settings, tmp_path, capsys, monkeypatch):
    def full(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(SystemExit) as left:
        train.main(settings())
    assert left.value.code == 2 and "disk is full" in capsys.readouterr().err
    folder = tmp_path / "out" / "checkpoints"
    assert not [path for path in folder.iterdir() if not path.name.startswith(".")]


def test_plan_prints_exact_parameters_and_flops(capsys):
    train.main(["--config", "default", "--dry-run", "--gpu", "h100", "--data-root", "x"])
    text = capsys.readouterr().out
    assert "211,815,184" in text and "37.51 G multiply-adds" in text
    frozen = float(re.search(r"frozen encoders +([0-9.]+) GB", text)[1])
    assert 1.0 < frozen < 1.6  # the VAE's working memory, 8 pictures at a time, is the larger part


@pytest.mark.slow
def test_plan_of_xl_on_64_gpus(capsys):
    train.main(["--config", "xl", "--dry-run", "--strategy", "fsdp", "--world-size", "64", "--gpu", "h100"])
    text = capsys.readouterr().out
    assert "674,834,720" in text and "118.6" in text and "fsdp on 64 ranks" in text


@pytest.mark.slow
def test_a_short_run_lowers_the_held_out_loss(settings, tmp_path):
    train.main(
        [
            *settings(
                training={
                    "total_steps": 120,
                    "learning_rate": 5e-3,
                    "eval_steps": 40,
                    "logging_steps": 40,
                    "save_steps": None,
                }
            )
        ]
    )
    rows = [row for row in read_metrics(tmp_path / "out" / "metrics.jsonl") if "val/loss" in row]
    constant = [row["val/constant_loss"] for row in rows]
    assert rows[-1]["val/loss"] <= 0.8 * constant[-1] and rows[-1]["val/loss"] < rows[0]["val/loss"]


def test_a_run_of_another_system_is_not_resumed_and_no_phase_is_trained_before(tmp_path, capsys):
    folder = tmp_path / "other" / "checkpoints" / "step_1"
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text("{}")
    (folder / "config.yaml").write_text("model: {dim_w: 512, dim_m: 20, nfe: 10}\n")
    for given in (tmp_path / "other", folder):
        with pytest.raises(SystemExit) as left:
            train.main(["--config", "small", "--resume", str(given), "--output-dir", str(tmp_path / "out")])
        assert left.value.code == 2 and "is not of this system (its model has" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
