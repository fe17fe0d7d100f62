"""Held-out figures: fixed times, the constant predictor, ranked captions; and mirrored pictures of training."""

import types

import pytest
import torch
from PIL import Image
from torch.testing import assert_close

from bagel.data.sources import load_image, to_tensor
from bagel.evaluation import figures as evaluation
from bagel.evaluation.figures import ranking_figures
from bagel.evaluation.validation import TIMES, fixed_pack
from bagel.model import training_times

GOOD = {"text_prompt": "A red apple", "image_path": "images/apple.png"}
QUESTIONS = [
    {"image_path": f"images/{name}.png", "question": "What?", "answer": f"{name} number {number}"}
    for number in range(4)
    for name in ("apple", "green", "cat")
]


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("t", TIMES)
def test_validation_times_are_the_same_whatever_the_shift_of_training(open_records, t, shift):
    pack = fixed_pack(open_records([GOOD, GOOD]), [0, 1], t, shift)
    assert_close(training_times(pack["packed_timesteps"], shift), torch.full_like(pack["packed_timesteps"], t))


def test_the_constant_predictor_knows_the_mean_picture(open_records):
    """Its error is the mean square of the noise where the picture is the mean one, and more elsewhere."""
    pack = fixed_pack(open_records([GOOD]), [0], 0.5, 1.0)
    pack["packed_latents"] = torch.randn(pack["packed_noise"].shape)
    shape = tuple(pack["patchified_vae_latent_shapes"][0])
    errors = evaluation._constant_errors(pack, {shape: pack["packed_latents"]})
    assert_close(torch.tensor(errors), pack["packed_noise"].square().mean(-1))
    without = torch.tensor(evaluation._constant_errors(pack, {}))
    assert_close(without, (pack["packed_noise"] - pack["packed_latents"]).square().mean(-1))


@pytest.mark.parametrize("knows, share", [(True, 1.0), (False, 0.0)])
def test_the_right_caption_counts_when_it_is_the_likeliest_of_ten(open_records, monkeypatch, knows, share):
    dataset = open_records(QUESTIONS)
    asked = []

    def nats(opened, data, index, given, answers):
        asked.extend([index] * len(answers))
        right = data.plan(index, 0)[given].ids
        return [float((answer == right) != knows) for answer in answers]

    monkeypatch.setattr(evaluation, "_mean_nats", nats)
    found = ranking_figures(types.SimpleNamespace(), dataset, None)
    assert found == {"caption_first_of_10": share, "caption_pictures": 12}
    assert all(asked.count(index) == evaluation.CANDIDATES for index in range(12))


def test_captions_in_one_pack_are_as_likely_as_alone(open_records, tiny):
    opened = types.SimpleNamespace(model=tiny[1], autoencoder=None, model_config=tiny[1].config)
    dataset, answers = open_records(QUESTIONS), [[70, 71, 72], [80], [90, 91]]
    with torch.no_grad():
        together = evaluation._mean_nats(opened, dataset, 1, 2, answers)
        alone = [evaluation._mean_nats(opened, dataset, 1, 2, [answer])[0] for answer in answers]
    assert len(set(together)) == 3
    assert_close(torch.tensor(together), torch.tensor(alone), atol=1e-5, rtol=1e-5)


def test_pictures_have_their_planned_size_and_are_mirrored_as_often_as_asked(open_records, pictures):
    plain, mirrored, some = (open_records([GOOD], flip_probability=share) for share in (0.0, 1.0, 0.5))
    item = plain.sample(0, 0)["items"][1]
    assert tuple(item.image.shape[1:]) == item.size and item.size[0] != item.size[1]
    upright = load_image(pictures / "images" / "apple.png").resize(item.size[::-1], Image.Resampling.BICUBIC)
    assert torch.equal(item.image, to_tensor(upright)) and not torch.equal(item.image, item.image.flip(2))
    for epoch in range(4):
        assert torch.equal(plain.sample(0, epoch)["items"][1].image, item.image)
        assert torch.equal(mirrored.sample(0, epoch)["items"][1].image, item.image.flip(2))
    flips = [not torch.equal(some.sample(0, epoch)["items"][1].image, item.image) for epoch in range(40)]
    assert 8 < sum(flips) < 32
