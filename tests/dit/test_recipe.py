"""The parts of a recipe of today by their algebra: equal to the plain form when off, and to cases solved by hand."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from dit import generate, metrics, train
from dit.config import POWER_LENGTHS, PRESETS, Config, refuse_unused
from dit.dataset import BucketPlan, TextImageDataset, bucket_shapes
from dit.model import DiTModel
from dit.objective import muon_groups
from dit.weights.averages import averaged_to, combination, exponent, profile
from dit.weights.open import build_model
from shared.config import load_config, save_config
from shared.engine.checkpoint import newest_checkpoint
from shared.errors import UserError
from shared.log import read_metrics
from shared.optim import MuonWithAdamW, adamw, orthogonalised
from tests import launching
from tests.dit.small import encoder_folder, picture, tiny
from tests.dit.test_train import same_weights


def model_of(**options) -> DiTModel:
    torch.manual_seed(0)
    model = DiTModel(32, 4, 2, input_size=8, patch_size=1, text_dim=16, text_len=8, **options)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape) * 0.05
    return model


def inputs(count: int = 3) -> dict:
    generator = torch.Generator().manual_seed(1)
    return {
        "noisy_latents": torch.randn(count, 4, 8, 8, generator=generator),
        "timesteps": torch.rand(count, generator=generator),
        "text_embeddings": torch.randn(count, 8, 16, generator=generator),
        "text_pooled": torch.randn(count, 16, generator=generator),
    }


@pytest.mark.parametrize("pos", ["sincos", "rope2d"])
@pytest.mark.parametrize("text", ["cross", "joint"])
def test_routing_changes_nothing_in_use_and_nothing_where_no_token_passes_by(pos, text):
    model = model_of(route_share=0.5, route_start=1, route_end=3, pos=pos, text_conditioning=text)
    plain = model_of(pos=pos, text_conditioning=text)
    plain.load_state_dict(model.state_dict())
    draws = torch.rand(3, 64)
    assert torch.equal(model.eval()(**inputs(), route_draws=draws), plain.eval()(**inputs()))
    model.train()
    assert not torch.allclose(model(**inputs(), route_draws=draws), plain.train()(**inputs()), atol=1e-6)
    model.route_share = 0.0
    assert torch.allclose(model(**inputs(), route_draws=draws), plain(**inputs()), atol=1e-5)


def test_tokens_that_pass_by_are_those_with_the_largest_draws_and_come_back_as_they_were():
    model = model_of(route_share=0.75, route_start=0, route_end=4, pos="rope2d").train()
    seen = []
    model.blocks[0].register_forward_pre_hook(lambda block, arguments: seen.append(arguments[0].shape))
    tokens = []
    model.final_layer.register_forward_pre_hook(lambda layer, arguments: tokens.append(arguments[0]))
    draws = torch.rand(3, 64)
    model(**inputs(), route_draws=draws)
    assert seen[0][1] == 16
    embedded = model.x_embedder(inputs()["noisy_latents"])
    passed = draws.argsort(1)[:, 16:]
    for row in range(3):
        assert torch.equal(tokens[0][row, passed[row]], embedded[row, passed[row]])
        assert not torch.allclose(tokens[0][row, draws[row].argsort()[:16]], embedded[row, draws[row].argsort()[:16]])


def test_value_residual_at_share_zero_is_the_plain_block_and_gradients_reach_the_share():
    model, plain = model_of(value_residual=True), model_of()
    plain.load_state_dict({name: value for name, value in model.state_dict().items() if "value_share" not in name})
    assert not torch.allclose(model(**inputs()), plain(**inputs()), atol=1e-6)
    for block in model.blocks[1:]:
        block.attn.value_share.data.zero_()
    assert torch.allclose(model(**inputs()), plain(**inputs()), atol=1e-6)
    model(**inputs()).square().mean().backward()
    assert all(block.attn.value_share.grad != 0 for block in model.blocks[1:])


def test_recomputed_blocks_give_the_same_gradients_with_every_part_on():
    options = {"value_residual": True, "route_share": 0.5, "route_start": 1, "route_end": 3, "align_width": 6}
    gradients = []
    for checkpointing in (False, True):
        model = model_of(**options, align_layer=2, align_hidden=8, pos="rope2d", qk_norm=True, mlp="swiglu").train()
        model.gradient_checkpointing = checkpointing
        draws = torch.rand(3, 64, generator=torch.Generator().manual_seed(3))
        found, projected, kept = model(**inputs(), route_draws=draws, align=True)
        assert projected.shape == (3, 32, 6) and torch.equal(kept, draws.argsort(1)[:, :32].sort(1).values)
        (found.square().mean() + projected.square().mean()).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    assert torch.allclose(*gradients, atol=1e-6)


def test_muon_turns_a_matrix_as_torch_does():
    torch.manual_seed(0)
    for shape in ((24, 8), (8, 24), (16, 16)):
        start = torch.randn(shape)
        one, other = (nn.Parameter(start.clone()) for _ in range(2))
        config = tiny(training={"optimizer": "muon", "learning_rate": 1.0})
        groups = [{"names": ["w"], "weight_decay": 0.1, "lr_scale": 0.02, "muon": 1}]
        ours = adamw(groups, {"w": one}, config.training)
        theirs = torch.optim.Muon([other], lr=0.02, weight_decay=0.1, momentum=0.95, nesterov=True)
        assert isinstance(ours, MuonWithAdamW)
        for step in range(3):
            for group in ours.param_groups:
                group["lr"] = 0.02
            gradient = torch.randn(shape, generator=torch.Generator().manual_seed(step))
            one.grad, other.grad = gradient.clone(), gradient.clone()
            ours.step()
            theirs.step()
        assert (one - other).norm() / (other - start).norm() < 0.02  # theirs turns in bf16


def test_turned_matrices_have_singular_values_near_one_and_leaving_out_leaves_all():
    values = torch.linalg.svdvals(orthogonalised(torch.randn(40, 16), 5, MuonWithAdamW.coefficients))
    assert 0.5 < values.min() and values.max() < 1.3
    weight = nn.Parameter(torch.randn(6, 4))
    before = weight.detach().clone()
    optimizer = adamw(
        [{"names": ["w"], "weight_decay": 0.1, "lr_scale": 1.0, "muon": 3}], {"w": weight}, tiny().training
    )
    weight.grad, optimizer.found_inf = torch.full((6, 4), float("nan")), torch.ones(())
    optimizer.step()
    assert torch.equal(weight, before) and optimizer.state[weight]["step"] == 0
    weight.grad, optimizer.found_inf = torch.randn(6, 4), torch.zeros(())
    optimizer.grad_scale = torch.tensor(2.0)
    optimizer.step()
    assert not torch.equal(weight, before) and weight.isfinite().all()


def test_muon_takes_the_matrices_of_the_blocks_and_adamw_the_rest():
    config = tiny(training={"optimizer": "muon"})
    model = build_model(config)
    groups = muon_groups(model, config)
    names = [name for group in groups for name in group["names"]]
    assert sorted(names) == sorted(name for name, p in model.named_parameters() if p.requires_grad)
    turned = {name: group["muon"] for group in groups if "muon" in group for name in group["names"]}
    assert turned["blocks.0.attn.qkv.weight"] == 3 and turned["blocks.1.mlp.fc2.weight"] == 1
    assert not any("adaLN" in name or "embedder" in name or "final" in name for name in turned)
    for strategy in ("fsdp", "zero1", "zero2", "zero3"):
        with pytest.raises(UserError, match="muon"):
            refuse_unused(tiny(training={"optimizer": "muon"}, run={"strategy": strategy}))


def run(tmp_path, name: str, config: Config, *arguments: str) -> list[float]:
    save_config(config, tmp_path / f"{name}.yaml")
    out = tmp_path / name
    train.main(["--config", str(tmp_path / f"{name}.yaml"), "--output-dir", str(out), *arguments])
    return [row["train/loss"] for row in read_metrics(out / "metrics.jsonl") if "train/loss" in row]


def everything(tmp_path, **training) -> Config:
    return tiny(
        run={"device": "cpu", "precision": "fp32"},
        model={"value_residual": True, "route_share": 0.5, "route_start": 1, "route_end": 2, "qk_norm": True,
               "norm": "rmsnorm", "mlp": "swiglu", "pos": "rope2d", "drop_path": 0.1},
        repa={"encoder_path": encoder_folder(tmp_path / "dino"), "layer": 1, "hidden": 8},
        flow={"timestep_sampling": "logit_normal", "shift": "auto", "contrastive": 0.05},
        training={"optimizer": "muon", "power_ema": True, "total_steps": 4, **training},
    )  # fmt: skip


def test_all_parts_together_resume_to_the_bit(tmp_path):
    config = everything(tmp_path)
    straight = run(tmp_path, "straight", config)
    run(tmp_path, "broken", config, "--max-steps", "2")
    assert run(tmp_path, "broken", config) == straight and len(straight) == 4
    names = [tmp_path / name / "checkpoints" / "checkpoint-step-4" for name in ("straight", "broken")]
    assert same_weights(*names)
    rows = read_metrics(tmp_path / "straight" / "metrics.jsonl")
    assert all(-1 <= row["train/alignment"] <= 1 for row in rows if "train/loss" in row)


def test_a_held_out_loss_is_the_plain_one_for_any_number_of_pictures(tmp_path):
    """The contrastive term is training's alone: runs with it and without compare, and 7 pictures make no pairs."""
    plain, contrastive = (
        run(tmp_path, name, tiny(flow={"contrastive": share}, training={"total_steps": 1, "eval_samples": 7}))
        and [row for row in read_metrics(tmp_path / name / "metrics.jsonl") if "val/loss" in row]
        for name, share in (("plain", 0.0), ("contrastive", 0.05))
    )
    assert plain[0]["val/constant_loss"] == contrastive[0]["val/constant_loss"]


@pytest.mark.distributed
@pytest.mark.slow
def test_two_ranks_train_all_parts_as_one(tmp_path):
    config = everything(tmp_path, global_batch_size=8, batch_size=4, num_workers=0)
    one = run(tmp_path, "one", config)
    save_config(config, tmp_path / "two.yaml")
    launching.run(2, "dit/train.py", "--config", str(tmp_path / "two.yaml"), "--output-dir", str(tmp_path / "two"))
    two = [row["train/loss"] for row in read_metrics(tmp_path / "two" / "metrics.jsonl") if "train/loss" in row]
    assert np.allclose(one, two, rtol=1e-5)
    averages = [averaged_to(0.1, newest_checkpoint(tmp_path / name), tmp_path / name) for name in ("one", "two")]
    assert all(torch.allclose(value, averages[1][name], atol=1e-4) for name, value in averages[0].items())


def test_alignment_needs_a_folder_and_a_layer(tmp_path):
    with pytest.raises(ValueError, match="hidden_size"):
        tiny(repa={"encoder_path": str(tmp_path)})
    with pytest.raises(ValueError, match="the model has 2 blocks"):
        tiny(repa={"encoder_path": encoder_folder(tmp_path / "dino"), "layer": 3})
    assert json.loads((tmp_path / "dino" / "config.json").read_text())["hidden_size"] == 12


def test_bucket_shapes_hold_no_more_pixels_than_the_square():
    shapes = bucket_shapes(256, 16)
    assert (256, 256) in shapes and len(shapes) > 5
    assert all(h % 16 == w % 16 == 0 and h * w <= 256 * 256 and 0.5 <= h / w <= 2 for h, w in shapes)
    assert {(w, h) for h, w in shapes} == set(shapes)


def test_steps_of_buckets_hold_one_shape_and_every_epoch_differs():
    bucket_N = np.array([0] * 10 + [1] * 7 + [2] * 3)
    plan = BucketPlan(20, 2, 1, 2, 5, bucket_N=bucket_N)
    assert plan.steps_per_epoch == 2 + 1
    for epoch in range(3):
        order = plan._order(epoch)
        assert len(order.unique()) == len(order) == 12
        assert all(len(set(bucket_N[order[step : step + 4]])) == 1 for step in range(0, 12, 4))
    assert not torch.equal(plan._order(0), plan._order(1))
    again = BucketPlan(20, 1, 2, 2, 5, bucket_N=bucket_N)  # as many samples a step over two ranks
    keys = [key for micro in range(2) for rank in range(2) for key in again.keys(4, micro, rank)]
    assert keys == [key for micro in range(2) for key in plan.keys(4, micro, 0)]
    with pytest.raises(UserError, match="no shape has"):
        BucketPlan(20, 12, 1, 1, 5, bucket_N=bucket_N)


def test_buckets_train_on_pictures_of_their_own_shape_and_resume(tmp_path):
    data = tmp_path / "data"
    for number in range(40):
        size = [(40, 40), (80, 40), (40, 76)][number % 3]
        picture(data / f"{number:02d}.png", size=size)
        (data / f"{number:02d}.txt").write_text(f"number {number}")
    config = tiny(
        run={"device": "cpu", "precision": "fp32"},
        data={"dataset_name": "custom", "dataset_path": str(data), "buckets": True, "val_fraction": 0.1},
        model={"pos": "rope2d"},
        training={"batch_size": 4, "total_steps": 6},
    )
    dataset = TextImageDataset.from_config(config, is_train=True)
    shapes = {tuple(dataset.sample(index, 0)["image"].shape[1:]) for index in range(len(dataset))}
    assert len(shapes) == 3 and (32, 32) in shapes
    straight = run(tmp_path, "straight", config)
    run(tmp_path, "broken", config, "--max-steps", "3")
    assert run(tmp_path, "broken", config) == straight and len(straight) == 6
    for split in ("val", "train"):
        found = tmp_path / f"{split}.json"
        words = ["--checkpoint", str(tmp_path / "straight"), "--metrics", "loss", "--split", split]
        metrics.main([*words, "--output", str(found), "--device", "cpu"])
        assert json.loads(found.read_text())
    (data / "00.png").write_bytes((data / "00.png").read_bytes()[:60])  # its header is whole, its body is not
    assert len(run(tmp_path, "damaged", config)) == 6


@pytest.mark.parametrize("preset", ["recipe_256", "recipe_512"])
def test_recipes_are_whole(preset):
    config = load_config(Config, presets=PRESETS, argv=["--config", preset, "--data-root", "x"])
    refuse_unused(config)
    with torch.device("meta"):
        model = build_model(config)
    assert sum(p.numel() for p in model.parameters()) > 150e6


def test_clean_pixels_without_a_vae_train_resume_and_draw(tmp_path):
    """The JiT form (Li and He 2025): patches of pixels, the clean picture predicted, the velocity's error."""
    config = tiny(
        run={"device": "cpu", "precision": "fp32"},
        vae={"type": "pixels"},
        model={"in_channels": 3, "patch_size": 8},
        flow={"prediction": "clean", "timestep_sampling": "logit_normal", "logit_mean": -0.8, "logit_std": 0.8},
    )
    straight = run(tmp_path, "straight", config)
    run(tmp_path, "broken", config, "--max-steps", "2")
    assert run(tmp_path, "broken", config) == straight and np.isfinite(straight).all()
    out = tmp_path / "grid.png"
    generate.main(["--checkpoint", str(tmp_path / "straight"), "--prompt", "a red key", "--output", str(out)])
    assert Image.open(out).size == (32, 32)


@pytest.mark.parametrize("length", [0.05, 0.07, 0.12, 0.2])
def test_an_average_of_any_length_after_training_is_the_one_computed_in_training(length):
    last, generator = 640, np.random.default_rng(0)
    weights = np.cumsum(generator.standard_normal(last)) + 30 * np.exp(-np.arange(last) / 80)  # a walk that settles

    def average(updates: int, power: float) -> float:
        found = 0.0
        for step in range(updates):
            found += (1 - (1 - 1 / (step + 1)) ** (power + 1)) * (weights[step] - found)
        return found

    stored = [(updates, exponent(kept)) for updates in range(40, last + 1, 40) for kept in POWER_LENGTHS]
    found = combination(stored, length, last) @ [average(updates, power) for updates, power in stored]
    wanted = average(last, exponent(length))
    assert abs(found - wanted) < 0.01 * weights.std()
    share = profile(last, exponent(length), last)
    steps = (np.arange(last) + 0.5) / last
    spread = (share * steps**2).sum() - (share * steps).sum() ** 2
    assert abs(spread**0.5 - length) < 1e-3  # the length is the spread of the profile


def test_power_averages_survive_a_stop_and_are_drawn_from_by_length(tmp_path):
    def settings(name: str) -> list[str]:
        config = tiny(run={"output_dir": str(tmp_path / name), "device": "cpu"}, training={"power_ema": True})
        save_config(config, tmp_path / f"{name}.yaml")
        return ["--config", str(tmp_path / f"{name}.yaml")]

    train.main(settings("whole"))
    train.main([*settings("parts"), "--max-steps", "2"])
    train.main(settings("parts"))
    whole, parts = (averaged_to(0.05, newest_checkpoint(tmp_path / n), tmp_path / n) for n in ("whole", "parts"))
    running = load_file(newest_checkpoint(tmp_path / "whole") / "averages.safetensors")
    for name, value in whole.items():
        assert torch.equal(value, parts[name]) and torch.allclose(value, running[f"0.{name}"], atol=1e-6)
    drawn = []
    for words in (["--ema-length", "0.05"], ["--ema-length", "0.25"], []):
        place = tmp_path / f"{len(drawn)}.png"
        generate.main(
            ["--checkpoint", str(tmp_path / "whole"), "--prompt", "a red box", "--output", str(place), *words]
        )
        drawn.append(place.read_bytes())
    assert len(set(drawn)) == 3


def test_power_averages_are_refused_where_there_are_none_or_no_rank_has_whole_tensors(tmp_path):
    with pytest.raises(UserError, match="--strategy fsdp .*leave it out"):
        refuse_unused(tiny(training={"power_ema": True}, run={"strategy": "fsdp"}))
    with pytest.raises(UserError, match="train with --power-ema"):
        averaged_to(0.1, tmp_path, tmp_path)
