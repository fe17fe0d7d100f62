"""Drawing at scale, figures of pictures, the guide's objects and files, and the ends that runs used to come to."""

import contextlib
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn
from torch.distributed.run import get_args_parser
from torch.utils.data import DataLoader

from dit import generate, metrics, precompute, train
from dit.config import Config, GenerateOptions, MetricsOptions, PrecomputeOptions, refuse_unused
from dit.dataset import TextImageDataset
from dit.evaluation.figures import Extractor, Pictures, RandomFeatures, figures, inception_score, reference_of, ssim
from dit.model import DiTModel
from dit.modules.vae import PoolCodec
from dit.objective import NoiseObjective, Trainer
from dit.weights import guide
from dit.weights.convert import load_pretrained, read_state
from dit.weights.guide import read_guide_folder
from dit.weights.open import build_model, load_codec
from shared.config import save_config
from shared.engine.dist import DistInfo
from shared.errors import UserError
from shared.flags import leaves_of
from shared.log import read_metrics
from tests import launching
from tests.dit.small import picture, tiny
from tests.dit.test_train import same_weights, weights_of

CPU = torch.device("cpu")


def trained_run(folder, **sections):
    save_config(tiny(run={"output_dir": str(folder / "out"), "device": "cpu"}, **sections), folder / "tiny.yaml")
    train.main(["--config", str(folder / "tiny.yaml")])
    return folder / "out"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A finished tiny run."""
    return trained_run(tmp_path_factory.mktemp("run"))


@pytest.mark.parametrize("options", [GenerateOptions, MetricsOptions, PrecomputeOptions, Config])
def test_the_first_name_of_every_flag_passes_through_torchrun(options):
    for leaf in leaves_of(options):
        flag = "--" + leaf.path.rsplit(".", 1)[-1].replace("_", "-")
        known = get_args_parser().parse_args(["--nproc_per_node=2", "script.py", flag, "4"])
        assert known.training_script_args == [flag, "4"], flag


def test_what_is_drawn_stays_and_what_is_missing_is_drawn(trained, tmp_path, capsys):
    base = ["--checkpoint", str(trained), "--prompt", *"abcdefg", "--batch-size", "2", "--output", str(tmp_path / "o")]
    generate.main([*base, "--npz"])
    whole = np.load(tmp_path / "o" / "samples.npz")["arr_0"]
    first = (tmp_path / "o" / "000000.png").stat().st_mtime_ns
    for name in ("000003.png", "000006.png", "samples.npz"):
        (tmp_path / "o" / name).unlink()
    generate.main([*base, "--npz"])
    assert np.array_equal(np.load(tmp_path / "o" / "samples.npz")["arr_0"], whole)
    assert (tmp_path / "o" / "000000.png").stat().st_mtime_ns == first
    settings = json.loads((tmp_path / "o" / "prompts.jsonl").read_text().splitlines()[0])["settings"]
    assert (settings["steps"], settings["sampler"], settings["cfg_scale"]) == (2, "euler", 5.0)
    with pytest.raises(SystemExit):
        generate.main([*base, "--steps", "3"])
    assert "other prompts, seeds or settings" in capsys.readouterr().err


@pytest.mark.distributed
@pytest.mark.slow
def test_two_ranks_draw_and_measure_as_one(trained, tmp_path):
    prompts = tmp_path / "p.txt"
    prompts.write_text("\n".join(f"picture {n}" for n in range(11)))
    base = ["--checkpoint", str(trained), "--prompts", str(prompts), "--batch-size", "3"]
    generate.main([*base, "--output", str(tmp_path / "one")])
    launching.run(2, "dit/generate.py", *base, "--output", str(tmp_path / "two"))
    for number in range(11):
        pair = [np.asarray(Image.open(tmp_path / name / f"{number:06d}.png")) for name in ("one", "two")]
        assert np.array_equal(*pair)
    figures_of = ["--pictures", str(tmp_path / "one"), "--reference", str(tmp_path / "two"), "--features", "random"]
    one = metrics.main([*figures_of, "--output", str(tmp_path / "1.json")])
    launching.run(2, "dit/metrics.py", *figures_of, "--output", str(tmp_path / "2.json"))
    assert json.loads((tmp_path / "2.json").read_text())["fid"] == json.loads((tmp_path / "1.json").read_text())["fid"]
    assert one["fid"]["fid"] < 1e-6


def test_more_pictures_than_captions_are_refused(trained, tmp_path, capsys):
    with pytest.raises(SystemExit):
        generate.main(["--checkpoint", str(trained), "--prompt", "a", "b", "--count", "9", "--output", str(tmp_path)])
    assert "there are 2 captions" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_custom_captions_without_a_held_out_split_are_taken_all(trained, tmp_path, capsys):
    picture(tmp_path / "data" / "0.png")
    (tmp_path / "data" / "0.txt").write_text("a lonely square")
    out = tmp_path / "o"
    generate.main(["--checkpoint", str(trained), "--captions", f"custom:{tmp_path / 'data'}", "--output", str(out)])
    assert "a lonely square" in (out / "prompts.jsonl").read_text() and "no held-out split" in capsys.readouterr().err


def test_classes_are_drawn_evenly():
    config = tiny(model={"text_conditioning": "none", "num_classes": 4})
    drawn = generate.requests(GenerateOptions(checkpoint="x", count=10), config)
    assert [request.label for request in drawn] == [0, 0, 0, 1, 1, 2, 2, 2, 3, 3]


# --- figures ---


def test_ssim_and_inception_score_in_cases_solved_by_hand():
    images = torch.rand(2, 3, 24, 24) * 2 - 1
    assert ssim(images, images) == pytest.approx(1.0)
    flat, other = torch.full((1, 1, 16, 16), -0.5), torch.full((1, 1, 16, 16), 0.5)
    assert ssim(flat, other) == pytest.approx((2 * -0.25 + 4e-4) / (0.5 + 4e-4))
    assert inception_score(np.eye(5, dtype=np.float32).repeat(20, 0)[np.arange(100).reshape(5, 20).T.ravel()])[
        0
    ] == pytest.approx(5.0)
    assert inception_score(np.full((50, 5), 0.2, np.float32))[0] == pytest.approx(1.0)


def test_figures_come_from_folders_npz_files_and_adms_statistics_alike(tmp_path):
    made, real = np.random.default_rng(0).integers(0, 256, (2, 40, 24, 24, 3), dtype=np.uint8)
    (tmp_path / "made").mkdir()
    for number, pixels in enumerate(made):
        Image.fromarray(pixels).save(tmp_path / "made" / f"{number:06d}.png")
    (tmp_path / "made" / "._000000.png").write_bytes(b"what a Mac leaves beside a file")
    np.savez(tmp_path / "made.npz", arr_0=made)
    np.savez_compressed(tmp_path / "real.npz", arr_0=real)
    extractor, info = Extractor(RandomFeatures(), device=CPU), DistInfo()
    sets = [Pictures(tmp_path / "made"), Pictures(tmp_path / "made.npz"), Pictures(made)]
    assert isinstance(sets[1].array, np.memmap) and len({one.digest() for one in sets}) == 1
    reference = reference_of(tmp_path / "real.npz", extractor, info)
    found = [figures(extractor.all(one, info), reference) for one in sets]
    assert found[0] == found[1] == found[2]
    assert {"fid", "sfid", "kid", "precision", "recall", "inception_score"} <= found[0].keys()
    true = extractor.all(Pictures(real), info)
    moments = {name: value for name, value in zip(("mu", "sigma", "mu_s", "sigma_s"),
               (*reference.pooled, *reference.spatial), strict=True)}  # fmt: skip
    np.savez(tmp_path / "adm.npz", arr_0=real, **moments)
    again = figures(extractor.all(sets[0], info), reference_of(tmp_path / "adm.npz", extractor, info))
    assert again == found[0] and figures(true, reference)["fid"] < 1e-6
    halves = [extractor.all(sets[0], DistInfo(rank=rank, world=1)).pooled for rank in (0,)]
    assert halves[0].shape == (40, 64)


REAL = np.random.default_rng(1).integers(0, 256, (8, 24, 24, 3), dtype=np.uint8)
ODD_ARCHIVES = {  # what a file given as --reference holds: arrays, or bytes
    "nothing": b"",
    "a page": b"<html>404</html>",
    "no arr_0": {"images": REAL},
    "no pictures": {"arr_0": REAL[:0]},
    "one picture": {"arr_0": REAL[:1]},
    "objects": {"mu": np.array([0, None], dtype=object), "sigma": np.eye(2)},
    "no sigma": {"mu": np.zeros(64)},
    "no sigma_s": {"mu": np.zeros(64), "sigma": np.eye(64), "mu_s": np.zeros(112)},
    "other widths": {"mu": np.zeros(64), "sigma": np.eye(63)},
    "another network": {"mu": np.zeros(64), "sigma": np.eye(64), "mu_s": np.zeros(5), "sigma_s": np.eye(5)},
    "a row": {"mu": np.zeros((1, 64)), "sigma": np.eye(64)},
    "not a number": {"mu": np.full(64, np.nan), "sigma": np.eye(64)},
}


@pytest.mark.parametrize("name", ODD_ARCHIVES)
def test_an_archive_that_is_no_reference_is_named(tmp_path, capsys, name):
    held, path = ODD_ARCHIVES[name], tmp_path / "reference.npz"
    path.write_bytes(held) if isinstance(held, bytes) else np.savez_compressed(path, **held)
    np.savez(tmp_path / "made.npz", arr_0=REAL)
    with pytest.raises(SystemExit) as left:
        metrics.main(["--pictures", str(tmp_path / "made.npz"), "--reference", str(path), "--features", "random",
                      "--output", str(tmp_path / "found.json")])  # fmt: skip
    error = capsys.readouterr().err
    assert left.value.code == 2 and str(path) in error and not (tmp_path / "found.json").exists()
    assert not name.startswith("no ") or f"holds {name}" in error


def test_damage_anywhere_in_an_archive_is_named(tmp_path):
    np.savez_compressed(tmp_path / "whole.npz", mu=np.zeros(64), sigma=np.random.default_rng(0).normal(size=(64, 64)))
    whole, extractor = (tmp_path / "whole.npz").read_bytes(), Extractor(RandomFeatures(), device=CPU)
    for place in range(0, len(whole) - 64, len(whole) // 24):
        (tmp_path / "hurt.npz").write_bytes(whole[:place] + bytes(60) + whole[place + 60 :])
        with contextlib.suppress(UserError):  # nothing else comes out
            reference_of(tmp_path / "hurt.npz", extractor, DistInfo())


def test_a_folder_of_pictures_is_read_whole_and_as_training_reads_it(tmp_path):
    kinds = ("png", "tif", "gif", "avif", "jfif")
    for number, kind in enumerate(kinds):
        format = {"tif": "TIFF", "jfif": "JPEG"}.get(kind, kind.upper())
        Image.fromarray(REAL[number]).save(tmp_path / f"{number}.{kind}", format)
    Image.fromarray(np.full((24, 24), 10_000, np.uint16)).save(tmp_path / "9.png")
    found = Pictures(tmp_path)
    assert len(found) == 6 and found[5].shape == (24, 24, 3) and found[5].max() == 39
    (tmp_path / "9.png").write_bytes((tmp_path / "3.avif").read_bytes()[:-200])
    with pytest.raises(UserError, match="9.png: not a readable picture"):
        found[5]


def test_clean_resizing_is_pillows_antialiased_bicubic():
    from dit.evaluation.figures import _resized_cleanly

    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    found = _resized_cleanly(pixels)
    channel = Image.fromarray(pixels[..., 1].astype(np.float32)).resize((299, 299), Image.Resampling.BICUBIC)
    assert found.shape == (299, 299, 3) and np.allclose(found[..., 1], np.asarray(channel).clip(0, 255))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--checkpoint is not set"),
        (["--pictures", "."], "needs --reference"),
        (["--pictures", "nowhere", "--reference", ".", "--features", "random"], "nowhere: no such"),
        (["--pictures", ".", "--reference", ".", "--features", "random", "--metrics", "loss"], "measures fid alone"),
        (["--pictures", ".", "--reference", "."], "Inception weights"),
    ],
)
def test_what_cannot_be_measured_is_refused_at_once(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as left:
        metrics.main(arguments)
    assert left.value.code == 2 and message in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_what_is_measured_is_opened_once(trained, tmp_path, monkeypatch):
    """The file of the FID network was opened twice, the held-out pictures four times."""
    from shared.media import inception as media

    class Mean(nn.Module):
        def forward(self, x):
            return x.float().mean((2, 3))

    torch.jit.script(Mean()).save(str(tmp_path / "mean.pt"))
    opened, look, make = [], media._is_torchscript, TextImageDataset.from_config
    monkeypatch.setattr(media, "_is_torchscript", lambda path: opened.append("weights") or look(path))

    def counted(*given, is_train):
        opened.append("train" if is_train else "val")
        return make(*given, is_train=is_train)

    monkeypatch.setattr(TextImageDataset, "from_config", counted)
    found = metrics.main(["--checkpoint", str(trained), "--metrics", "loss,fid", "--count", "2", "--steps", "1",
                          "--inception-weights", str(tmp_path / "mean.pt")])  # fmt: skip
    assert opened == ["weights", "val", "train"] and found["fid"]["fid"] >= 0


def test_an_unconditional_model_is_measured_by_what_applies(tmp_path):
    out = trained_run(tmp_path, model={"text_conditioning": "none"})
    found = metrics.main(["--checkpoint", str(out), "--count", "8"])
    assert "loss" in found and "caption" not in found


# --- the ends of runs ---


def test_a_model_without_a_null_row_ends_its_run_and_draws_unguided(tmp_path, capsys):
    for label in range(3):
        for number in range(8):
            picture(tmp_path / "data" / f"c{label}" / f"{number}.png")
    out = trained_run(
        tmp_path,
        data={"dataset_name": "custom", "dataset_path": str(tmp_path / "data"), "val_fraction": 0.2},
        model={"text_conditioning": "none", "num_classes": 3, "class_dropout": 0.0},
        training={"batch_size": 4, "total_steps": 1},
    )
    assert (out / "checkpoints" / "checkpoint-step-1").is_dir() and list((out / "samples").glob("step_*.png"))
    generate.main(["--checkpoint", str(out), "--labels", "1", "--output", str(tmp_path / "x.png")])
    with pytest.raises(SystemExit):
        generate.main(
            ["--checkpoint", str(out), "--labels", "1", "--cfg-scale", "4", "--output", str(tmp_path / "y.png")]
        )
    assert "nothing can be led away from" in capsys.readouterr().err
    assert (
        tiny(model={"text_conditioning": "none", "num_classes": 3, "class_dropout": 0.3}).diffusion.cfg_dropout == 0.3
    )
    with pytest.raises(ValueError, match="both name one share"):
        tiny(
            model={"text_conditioning": "none", "num_classes": 3, "class_dropout": 0.3}, diffusion={"cfg_dropout": 0.2}
        )


def test_epoch_checkpoints_stay(tmp_path):
    out = trained_run(
        tmp_path, training={"total_steps": None, "num_epochs": 3, "batch_size": 98, "save_every_n_epochs": 1,
                            "save_steps": 1, "keep_last": 2},
    )  # fmt: skip
    names = {path.name for path in (out / "checkpoints").iterdir() if path.is_dir()}
    assert {f"checkpoint-epoch-{epoch}" for epoch in (1, 2, 3)} <= names and "checkpoint-step-1" not in names
    assert tiny(training={"keep_last": None}).training.keep_last > 1000


def test_a_sample_without_a_caption_among_many_ends_neither_drawing_nor_measuring(tmp_path, capsys):
    data = picture(tmp_path / "0.png").read_bytes()

    def write(missing: tuple[int, ...]) -> None:
        with tarfile.open(tmp_path / "0.tar", "w") as archive:
            for number in range(12):
                for kind, held in (("png", data), ("txt", b"a square"))[: 1 if number in missing else 2]:
                    member = tarfile.TarInfo(f"{number:02d}.{kind}")
                    member.size = len(held)
                    archive.addfile(member, io.BytesIO(held))

    write(())
    sections = {"dataset_name": "custom", "dataset_path": str(tmp_path / "0.tar"), "val_fraction": 0.5}
    out = trained_run(tmp_path, data=sections, training={"batch_size": 2, "total_steps": 1, "eval_samples": 2})
    write((1, 5, 8))
    words = ["--checkpoint", str(out), "--steps", "1"]
    metrics.main([*words, "--count", "3", "--metrics", "memory"])
    generate.main([*words, "--captions", f"custom:{tmp_path / '0.tar'}", "--output", str(tmp_path / "a")])
    assert "3 samples are left out" in capsys.readouterr().err and len(list((tmp_path / "a").glob("*.png"))) == 9
    generate.main([*words, "--output", str(tmp_path / "b.png")])
    with pytest.raises(SystemExit):
        generate.main([*words, "--prompt", "half \ud800", "--output", str(tmp_path / "c")])
    assert "not UTF-8 text" in capsys.readouterr().err and not (tmp_path / "c").exists()


def test_prompts_are_drawn_without_held_out_pictures(tmp_path):
    picture(tmp_path / "data" / "0.png")
    (tmp_path / "data" / "0.txt").write_text("a square")
    out = trained_run(
        tmp_path,
        data={"dataset_name": "custom", "dataset_path": str(tmp_path / "data")},
        training={"batch_size": 1, "total_steps": 1, "sample_prompts": ["a red square", "a blue one"]},
    )
    assert Image.open(next((out / "samples").glob("step_*.png"))).width >= 32


def test_a_run_goes_on_when_the_weights_it_began_with_are_gone(tmp_path, capsys):
    begun = tmp_path / "begun.safetensors"
    first = trained_run(tmp_path / "a")
    shutil.copy(first / "checkpoints" / "checkpoint-step-4" / "model.safetensors", begun)
    arguments = ["--config", str(tmp_path / "a" / "tiny.yaml"), "--output-dir", str(tmp_path / "b")]
    train.main([*arguments, "--pretrained", str(begun), "--max-steps", "2"])
    begun.unlink()
    train.main([*arguments, "--pretrained", str(begun), "--max-steps", "3"])
    train.main([*arguments, "--resume", "latest"])
    assert (tmp_path / "b" / "checkpoints" / "checkpoint-step-4").is_dir()


@pytest.mark.parametrize(
    ("sections", "name"),
    [
        ({"diffusion": {"objective": "flow", "snr_gamma": 5.0}}, "diffusion.snr_gamma"),
        ({"diffusion": {"objective": "flow", "criterion": "huber"}}, "diffusion.criterion"),
        ({"diffusion": {"objective": "ddpm"}, "flow": {"shift": 3.0}, "sample": {"sampler": "auto"}}, "flow.shift"),
        ({"model": {"mlp": "swiglu", "mlp_ratio": 3.0}}, "model.mlp_ratio"),
        ({"data": {"dataset_name": "custom", "use_bbox": True}}, "data.use_bbox"),
        ({"flow": {"contrastive": 0.05}, "training": {"batch_size": 3}}, "training.batch_size"),
        ({"training": {"muon_learning_rate": 0.1}}, "training.muon_learning_rate"),
        ({"model": {"route_start": 1}}, "model.route_start"),
        ({"model": {"class_dropout": 0.3}}, "model.class_dropout"),
        ({"vae": {"pretrained_model_name": "dit"}}, "vae.pretrained_model_name dit is not read by vae.type pool"),
        ({"text": {"pretrained_model_name": "dit"}}, "text.pretrained_model_name dit .* set it to clip or language"),
        ({"data": {"dataset_name": "custom", "buckets": True, "crop": "resize"}}, "data.crop resize"),
    ],
)
def test_settings_that_would_change_nothing_are_refused(sections, name):
    with pytest.raises(UserError, match=name):
        refuse_unused(tiny(**sections))


def test_a_null_condition_that_was_never_trained_is_not_led_away_from():
    classes = {"text_conditioning": "none", "num_classes": 3}
    assert not tiny(model=classes, diffusion={"cfg_dropout": 0.0}).can_guide
    assert not tiny(diffusion={"cfg_dropout": 0.0, "null_text": "learned"}).can_guide
    assert tiny(model={**classes, "pretrained_path": "x"}, diffusion={"cfg_dropout": 0.0}).can_guide
    assert tiny(model=classes).can_guide and tiny(diffusion={"cfg_dropout": 0.0}).can_guide


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"dataset_name": "custom", "dataset_path": "nowhere", "buckets": True}, "data.buckets=false"),
        ({"dataset_name": "scenes", "flip_guard": True, "keep_in_memory": False}, "composed anew in every epoch"),
    ],
)
def test_what_no_cache_can_hold_is_refused_before_anything_is_read(tmp_path, capsys, data, message):
    save_config(tiny(data={**data, "flip": 0}), tmp_path / "x.yaml")
    with pytest.raises(SystemExit):
        precompute.main(["--config", str(tmp_path / "x.yaml"), "--out", str(tmp_path / "cache")])
    assert message in capsys.readouterr().err and not (tmp_path / "cache").exists()


def test_the_noise_table_goes_to_the_device_once():
    objective = NoiseObjective(Config().diffusion)
    at = torch.zeros(2, dtype=torch.long, device="meta")
    objective._alphas(at)
    table = objective.alphas_cumprod
    objective._alphas(at)
    assert table.device.type == "meta" and objective.alphas_cumprod is table


def test_huber_is_the_squared_error_near_zero_and_linear_beyond():
    from dit.config import DiffusionConfig
    from dit.objective import NoiseObjective

    objective = NoiseObjective(DiffusionConfig(criterion="huber"))
    noise, t = torch.zeros(2, 1, 1, 1), torch.tensor([5, 5])
    output = torch.tensor([0.5, 3.0]).reshape(2, 1, 1, 1)
    assert torch.allclose(objective.error(output, noise, noise, noise, t), torch.tensor([0.125, 2.5]))


@pytest.mark.parametrize("part", ["contrastive", "drop_path"])
def test_cuts_of_a_batch_change_no_loss(part):
    config = tiny(flow={"contrastive": 0.2} if part == "contrastive" else {}, model={"drop_path": 0.5})
    from dit.dataset import collate

    dataset = TextImageDataset.from_config(config, is_train=True)
    from dit.modules.text import HashTextEncoder

    torch.manual_seed(0)
    trainer = Trainer(build_model(config), PoolCodec(), HashTextEncoder(width=16, length=8), None, config)
    for parameter in trainer.model.parameters():
        parameter.data = torch.randn(parameter.shape) * 0.1
    trainer.model.train()
    totals = []
    for size in (8, 4, 2):
        batches = []
        for first in range(0, 8, size):
            batch = collate([dataset.sample(index, 0) for index in range(first, first + size)])
            batches.append({**batch, "slot": torch.arange(first, first + size)})
        totals.append(sum(loss.item() for loss, _ in trainer.losses(trainer.model, batches, 3)))
    assert totals[0] == pytest.approx(totals[1], rel=1e-5) == pytest.approx(totals[2], rel=1e-5)


# --- public weights ---


@pytest.mark.parametrize("size", [32, 64, 128])
@pytest.mark.parametrize("additional", [False, True])
def test_pixart_of_every_size_computes_the_same(tmp_path, size, additional):
    from diffusers import PixArtTransformer2DModel

    torch.manual_seed(0)
    theirs = PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=24, in_channels=4, out_channels=8, num_layers=1,
        cross_attention_dim=48, sample_size=size, patch_size=2, caption_channels=20,
        use_additional_conditions=additional,
    ).eval()  # fmt: skip
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.08)
    theirs.save_pretrained(tmp_path)

    def ours(scale: float) -> DiTModel:
        return DiTModel(
            48, 1, 2, input_size=size, use_pooled_text=False, text_dim=20, text_len=5, conditioning="adaln_single",
            cross_norm="none", learn_sigma=True, pos_scale=scale,
        ).eval()  # fmt: skip

    scale = 0.5 if size == 128 else 1.0
    with pytest.raises(UserError, match="pos-scale"):
        load_pretrained(ours(0.7), tmp_path)
    model = ours(scale)
    load_pretrained(model, tmp_path)
    x, t, text = torch.randn(1, 4, size, size), torch.tensor([500]), torch.randn(1, 5, 20)
    sizes = {"resolution": None, "aspect_ratio": None}
    if additional:
        sizes = {"resolution": torch.tensor([[8.0 * size] * 2]), "aspect_ratio": torch.tensor([[1.0]])}
    with torch.no_grad():
        wanted = theirs(x, encoder_hidden_states=text, timestep=t, added_cond_kwargs=sizes).sample
        found = model(x, t, text)
    assert (found - wanted).abs().max() <= 2e-5 * wanted.abs().max()


# --- the guide's objects and files ---


def clip_folder(path):
    """A tiny CLIP text tower with a tokenizer of letters."""
    from transformers import CLIPTextConfig, CLIPTextModel

    words = [*(chr(n) for n in range(97, 123)), *(f"{chr(n)}</w>" for n in range(97, 123)), "<|startoftext|>"]
    words.append("<|endoftext|>")
    path.mkdir()
    (path / "vocab.json").write_text(json.dumps({word: number for number, word in enumerate(words)}))
    (path / "merges.txt").write_text("#version: 0.2\n")
    (path / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "pad_token": "<|endoftext|>"})
    )
    torch.manual_seed(0)
    config = CLIPTextConfig(
        vocab_size=54, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        eos_token_id=53, bos_token_id=52, pad_token_id=53,
    )  # fmt: skip
    CLIPTextModel(config).save_pretrained(path)
    return str(path)


def guide_config(tmp_path, **training) -> Config:
    return tiny(
        run={"device": "cpu", "precision": "fp32", "output_dir": str(tmp_path / "out")},
        text={"type": "clip", "pretrained_model_name": clip_folder(tmp_path / "clip")},
        model={"text_len": 77},
        training={"guide_files": True, "total_steps": 4, **training},
    )


def test_the_guides_objects_train(tmp_path):
    from transformers import CLIPTextModel

    config = guide_config(tmp_path)
    encoder = CLIPTextModel.from_pretrained(tmp_path / "clip").eval()
    dataset = TextImageDataset(settings=config.data)
    loader = DataLoader(dataset, batch_size=8, shuffle=True, num_workers=0, drop_last=True)
    trainer = Trainer(
        model=build_model(config), vae_encoder=PoolCodec(), text_encoder=encoder, train_dataloader=loader, config=config
    )
    assert trainer.train_dataloader is loader and trainer.device == CPU and trainer.current_epoch == 0
    result = trainer.train()
    assert result.finished and trainer.global_step == 3  # of the steps 0 to 3
    assert trainer.training_step({"image": torch.randn(2, 3, 32, 32), "text_embeddings": torch.randn(2, 77, 16)}) > 0
    with pytest.raises(UserError, match="CLIPTextModel"):
        Trainer(build_model(config), PoolCodec(), nn.Linear(2, 2), loader, config)


def test_the_guides_four_files_are_written_and_resumed_from(tmp_path, monkeypatch):
    config = guide_config(tmp_path)
    save_config(config, tmp_path / "guide.yaml")
    base = ["--config", str(tmp_path / "guide.yaml")]
    train.main(base)
    folder = tmp_path / "out" / "checkpoints" / "checkpoint-step-2"
    names = ("model.pt", "optimizer.pt", "scheduler.pt", "training_state.json")
    assert all((folder / name).is_file() for name in names)
    assert json.loads((folder / "training_state.json").read_text())["global_step"] == 2
    model = build_model(config)
    model.load_state_dict(torch.load(folder / "model.pt", weights_only=True))
    optimizer = torch.optim.AdamW(model.parameters())  # as the guide loads it
    optimizer.load_state_dict(torch.load(folder / "optimizer.pt", weights_only=True))
    alone = tmp_path / "checkpoint-epoch-10"
    alone.mkdir()
    for name in names:
        shutil.copy(folder / name, alone / name)
    opened, read = [], guide.read_weights_file
    monkeypatch.setattr(guide, "read_weights_file", lambda path: opened.append(path.name) or read(path))
    train.main([*base, "--resume", str(alone), "--output-dir", str(tmp_path / "again"), "--ema-decay", "0"])
    assert opened == ["model.pt", "optimizer.pt"]  # each once: they may be gigabytes
    last = [tmp_path / name / "checkpoints" / "checkpoint-step-4" for name in ("out", "again")]
    one, two = (load_file(place / "model.safetensors") for place in last)
    assert all(torch.equal(one[name], two[name]) for name in one)
    kept = torch.load(alone / "optimizer.pt", weights_only=True)
    (alone / "optimizer.pt").write_bytes(b"nothing")
    with pytest.raises(SystemExit):
        train.main([*base, "--resume", str(alone), "--output-dir", str(tmp_path / "bad")])
    assert not (tmp_path / "bad").exists()
    for change in ({"step": torch.tensor(-3.0)}, {"exp_avg": torch.full_like(kept["state"][0]["exp_avg"], torch.nan)}):
        state = {**kept["state"], 0: {**kept["state"][0], **change}}
        torch.save({**kept, "state": state}, alone / "optimizer.pt")
        with pytest.raises(UserError, match=r"optimizer.pt: not the state of an AdamW"):
            read_guide_folder(alone, model)
    (alone / "optimizer.pt").unlink()
    weights = torch.load(alone / "model.pt", weights_only=True)
    torch.save({f"_orig_mod.{name}": value for name, value in weights.items()}, alone / "model.pt")  # as compiled
    read_guide_folder(alone, model)
    torch.save({name: value.to(torch.complex64) for name, value in weights.items()}, alone / "model.pt")
    with pytest.raises(UserError, match=r"model.pt: .* no finite decimal"):
        read_guide_folder(alone, model)
    torch.save(weights, alone / "model.pt")
    trainer = Trainer(build_model(config), PoolCodec(), None, None, config)
    trainer.load_checkpoint(alone)
    trainer.save_checkpoint(tmp_path / "saved")
    assert (tmp_path / "saved" / "model.pt").is_file()


def test_another_vae_is_seen_when_a_run_goes_on(tmp_path, capsys):
    from tests.dit.test_encoders import tiny_vae

    tiny_vae(tmp_path / "vae")
    config = tiny(
        run={"device": "cpu", "output_dir": str(tmp_path / "out")},
        vae={"type": "sd", "pretrained_model_name": str(tmp_path / "vae")},
    )
    save_config(config, tmp_path / "sd.yaml")
    train.main(["--config", str(tmp_path / "sd.yaml"), "--max-steps", "2"])
    shutil.copytree(tmp_path / "vae", tmp_path / "elsewhere")  # the same in another place is the same
    elsewhere = ["--config", str(tmp_path / "sd.yaml"), "--vae-path", str(tmp_path / "elsewhere")]
    train.main([*elsewhere, "--max-steps", "3"])
    torch.manual_seed(1)
    tiny_vae(tmp_path / "other", scaling_factor=0.13025)
    with pytest.raises(SystemExit):
        train.main(["--config", str(tmp_path / "sd.yaml"), "--vae-path", str(tmp_path / "other")])
    assert "vae.content" in capsys.readouterr().err


def test_a_killed_drawing_leaves_what_it_drew(trained, tmp_path):
    prompts = tmp_path / "p.txt"
    prompts.write_text("\n".join(f"picture {n}" for n in range(400)))
    out = tmp_path / "o"
    process = subprocess.Popen(
        [sys.executable, "dit/generate.py", "--checkpoint", str(trained), "--prompts", str(prompts), "--output",
         str(out), "--batch-size", "2", "--steps", "30"],
        cwd=launching.ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    try:
        for _ in range(3000):  # a full machine takes a minute to start it
            if len(list(out.glob("*.png"))) >= 4:
                break
            __import__("time").sleep(0.1)
    finally:
        process.kill()
        process.wait()
    drawn = sorted(out.glob("[0-9]*.png"))
    assert 4 <= len(drawn) < 400 and all(Image.open(path).size == (32, 32) for path in drawn)


def test_weights_helper_compares(trained):
    step = trained / "checkpoints" / "checkpoint-step-4"
    assert same_weights(step, step) and weights_of(step) and read_metrics(trained / "metrics.jsonl")


@pytest.mark.parametrize("content", [b"", b"no weights", b"\x10\x00\x00\x00\x00\x00\x00\x00{}"])
def test_a_damaged_file_of_a_codec_or_of_weights_is_named(tmp_path, content):
    place = tmp_path / "diffusion_pytorch_model.safetensors"
    place.write_bytes(content)
    for read in (lambda: load_codec(PoolCodec(), place), lambda: read_state(tmp_path)):
        with pytest.raises(UserError, match=f"{place}: cannot be read as weights"):
            read()
