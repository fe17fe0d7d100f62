"""The joint objective over micro-packs, frozen parts, and pictures encoded together."""

import math

import pytest
import torch
from torch.testing import assert_close

from bagel import objective
from bagel.config import TrainingConfig
from bagel.modules.vision import FluxAutoencoder
from bagel.objective import with_latents
from bagel.weights.pretrained import build_model
from tests.bagel.tiny import gradients, packs_of


@pytest.mark.parametrize("reweighting", [False, True])
def test_micro_packs_give_the_gradient_of_one_pack(tiny, reweighting):
    """Record 2 answers about a picture (text to learn, no latents), record 0 draws (no text), 3 does both: unequal
    counts.
    """
    config, model = tiny
    training = TrainingConfig(text_loss_weight=0.25, ce_loss_reweighting=reweighting)
    whole = gradients(model, packs_of(config, [[0, 2, 3, 4, 6]]), training)
    parts = gradients(model, packs_of(config, [[2, 6], [], [0], [3, 4]]), training)
    assert parts[0] == pytest.approx(whole[0], abs=1e-6)
    assert whole[1].keys() == parts[1].keys()
    for name, gradient in whole[1].items():
        assert_close(parts[1][name], gradient, atol=1e-6, rtol=1e-5, msg=lambda text, name=name: f"{name}: {text}")
    other = gradients(
        model, packs_of(config, [[2, 6], [], [0], [3, 4]]), training.model_copy(update={"loss_normalization": "micro"})
    )
    assert abs(other[0] - whole[0]) > 1e-3


def test_the_mean_over_ranks_is_the_loss_of_one_rank(tiny, monkeypatch):
    """Two ranks with unequal counts of tokens; the second half of the step's counts comes from the other rank."""
    config, model = tiny
    training, packs = TrainingConfig(), packs_of(config, [[2, 6, 0], [3, 4]])
    alone = sum(loss.item() for loss, _ in objective.joint_losses(model, packs, training, 1))
    whole = objective.count_targets(packs, training.ce_loss_reweighting)
    monkeypatch.setattr(objective, "sum_over_ranks", lambda own: whole)
    ranks = [next(objective.joint_losses(model, [pack], training, 2))[0].item() for pack in packs]
    assert sum(ranks) / 2 == pytest.approx(alone, rel=1e-5)


def test_a_step_without_text_or_pictures_counts_zero_not_nan(tiny):
    config, model = tiny
    for group in ([0], [2], []):
        loss, grads = gradients(model, packs_of(config, [group]), TrainingConfig())
        assert math.isfinite(loss) and all(torch.isfinite(grad).all() for grad in grads.values())


def test_freezing_the_understanding_side_leaves_it_without_gradients(tiny):
    config, _ = tiny
    torch.manual_seed(0)
    model = build_model(config.model.model_copy(update={"freeze_und": True}))
    gradients(model, packs_of(config, [[0, 2, 3]]), TrainingConfig())
    trained = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    outside = {name.split(".")[0] if "lm_head" not in name else "lm_head" for name in trained if "_moe_gen" not in name}
    assert outside == {"lm_head", "time_embedder", "vae2llm", "llm2vae"}


def test_pictures_padded_together_differ_only_when_asked(tiny):
    config = tiny[0].model.model_copy(deep=True)
    config.autoencoder = config.autoencoder.model_copy(
        update=dict(kind="flux", ch=32, ch_mult=[1, 1], z_channels=4, downsample=2, num_res_blocks=1)
    )
    torch.manual_seed(0)
    autoencoder = FluxAutoencoder(config.autoencoder).requires_grad_(False)
    images = [torch.rand(3, 8, 8), torch.rand(3, 16, 8), torch.rand(3, 8, 8)]
    pack = {
        "vae_images": images,
        "packed_noise": torch.zeros(0, 16),
        "patchified_vae_latent_shapes": [[2, 2], [4, 2], [2, 2]],
        "posterior_noise": [torch.randn(4, 4, 4), torch.randn(4, 8, 4), torch.randn(4, 4, 4)],
    }
    single = with_latents(pack, autoencoder, config)["packed_latents"]
    together = with_latents(pack, autoencoder, config, together=True)["packed_latents"]
    alone = with_latents(
        {
            **pack,
            "vae_images": images[1:2],
            "posterior_noise": pack["posterior_noise"][1:2],
            "patchified_vae_latent_shapes": [[4, 2]],
        },
        autoencoder,
        config,
    )["packed_latents"]
    assert single.shape == together.shape == (16, 16)
    assert_close(single[4:12], alone, atol=1e-5, rtol=1e-5)
    assert_close(single[4:12], together[4:12], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(single[:4], together[:4])
