"""Distances against cases worked out by hand, colour words, the CLIP score of a tiny model, paired differences."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from shared.errors import UserError
from shared.metrics import (
    ClipScorer,
    agreement,
    clip_score,
    colour_caption,
    frechet_distance,
    frechet_gaussians,
    gaussian_of,
    kernel_distance,
    named_colours,
    paired_p,
    picture_features,
    precision_recall,
)

CPU = torch.device("cpu")


# --- distances --------------------------------------------------------------------------------------------------------


def test_gaussians_with_known_distances():
    mean, spread = np.zeros(3), np.diag([1.0, 4.0, 9.0])
    assert frechet_gaussians(mean, spread, mean, spread) == pytest.approx(0, abs=1e-9)
    assert frechet_gaussians(mean, spread, mean + 2, spread) == pytest.approx(12)
    assert frechet_gaussians(mean, spread, mean, 4 * spread) == pytest.approx(1 + 4 + 9)
    assert frechet_gaussians(mean, spread, mean, spread[::-1, ::-1]) == pytest.approx(2 * (3 - 1) ** 2)
    rotation = np.linalg.qr(np.random.default_rng(0).normal(size=(3, 3)))[0]
    turned = [rotation @ matrix @ rotation.T for matrix in (spread, 4 * spread)]
    assert frechet_gaussians(mean, turned[0], mean, turned[1]) == pytest.approx(14)


def test_covariances_of_low_rank_stay_finite():
    rows = np.random.default_rng(0).normal(size=(5, 40))
    assert frechet_distance(rows, rows + 1) == pytest.approx(40, rel=1e-6)


def test_one_feature_and_bad_rows():
    mean, covariance = gaussian_of(np.array([[0.0], [2.0]]))
    assert mean.tolist() == [1.0] and covariance.tolist() == [[2.0]]
    for wrong, message in ((np.zeros((1, 3)), "at least 2"), (np.full((2, 2), np.nan), "finite")):
        with pytest.raises(ValueError, match=message):
            gaussian_of(wrong)
    with pytest.raises(ValueError, match="3 and 4 wide"):
        frechet_distance(np.zeros((2, 3)), np.zeros((2, 4)))
    with pytest.raises(ValueError, match="two or more rows on each side, found 1 and 5"):
        kernel_distance(np.zeros((1, 3)), np.zeros((5, 3)))


def test_tensors_and_arrays_give_the_same_distances():
    first, second = torch.randn(2, 60, 5, generator=torch.Generator().manual_seed(0))
    assert frechet_distance(first, second) == frechet_distance(first.numpy(), second.numpy())
    assert frechet_distance(first, first + 1) == pytest.approx(5, rel=1e-5)
    assert kernel_distance(first, second, subsets=3) == kernel_distance(first.numpy(), second.numpy(), subsets=3)


def test_kernel_distance_by_hand():
    """Rows of 1 against rows of -1, one feature: the kernel is 8 within a side and 0 across."""
    ones = np.ones((6, 1))
    assert kernel_distance(ones, -ones, subsets=2) == pytest.approx(8 + 8 - 0)
    same = np.random.default_rng(0).normal(size=(1000, 4))
    assert abs(kernel_distance(same[:500], same[500:], subsets=20)) < 0.1


def test_precision_and_recall_of_a_part_of_the_truth():
    generator = np.random.default_rng(0)
    left, right = generator.normal(size=(200, 2)), generator.normal(size=(200, 2)) + 50
    precision, recall = precision_recall(left, np.concatenate([left + 0.01, right]))
    assert precision > 0.95 and 0.4 < recall < 0.6
    assert precision_recall(left, right) == (0.0, 0.0)


def test_features_of_pictures_of_several_sizes_keep_their_order():
    class Mean(nn.Module):
        def forward(self, x):
            assert x.dtype == torch.uint8 and x.ndim == 4
            return x.float().mean((2, 3))

    sides = (4, 4, 6, 4, 5, 5, 5)
    pictures = [np.full((side, side + 1, 3), 10 * row, np.uint8) for row, side in enumerate(sides)]
    found = picture_features(Mean(), pictures, device=CPU, batch_size=2)
    assert found.tolist() == [[10.0 * row] * 3 for row in range(len(sides))]


def test_paired_differences():
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(40, generator=generator)
    assert paired_p(noise + 1) < 1e-4 and paired_p(noise - 1) > 0.999 and 0.05 < paired_p(noise) < 0.95
    assert paired_p(torch.zeros(5)) == paired_p(torch.ones(1)) == 1.0


# --- colours ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "colours"),
    [
        ("A rendered picture of a hundred covered cards", set()),
        ("he tried to steal a bluebird, greenhouse, blackened", set()),
        ("A violet, gray and Red-handed thing, GOLDEN", {"purple", "grey", "red", "yellow"}),
        ("cyan turquoise teal", {"teal"}),
        ("", set()),
        ("\u4ee5\u84dd\u8272\u4e3a\u4e3b\uff0c\u7ea2\u82f9\u679c", {"blue", "red"}),  # mostly blue, a red apple
        ("\u7c89\u7ea2\u8272\u7684\u82b1", {"pink"}),  # a pink flower
        ("\u9752\u86d9\u3001\u9ec4\u74dc\u548c\u6a59\u5b50", set()),  # a frog, a cucumber and an orange
        ("\u7eff\u8272\u7684\u9752\u86d9", {"green"}),  # a green frog
    ],
)
def test_colours_are_whole_words(text, colours):
    assert named_colours(text) == named_colours(text, white=True) == colours


def test_white_counts_only_when_asked_for():
    assert named_colours("a WHITE cup, \u767d\u8272") == set()
    assert named_colours("a white cup") == set() and named_colours("a WHITE cup", white=True) == {"white"}
    assert named_colours("\u767d\u8272", white=True) == {"white"} and named_colours("\u767d\u83dc", white=True) == set()
    assert colour_caption(("a white cup", "a hundred", "a grey cup")) == "a grey cup"
    assert agreement(np.zeros((3, 4, 4, 3), np.uint8), ["white", "a white cup", "hundred"]) == {"pictures": 0.0}


# --- CLIP score -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """A tiny CLIP of random weights with a tokenizer of single letters."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

    folder = tmp_path_factory.mktemp("clip")
    letters = [chr(code) for code in range(97, 123)]
    words = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: number for number, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "pad_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {**size, "vocab_size": len(words), "eos_token_id": 53, "bos_token_id": 52, "pad_token_id": 53}
    torch.manual_seed(0)
    config = CLIPConfig(text_config=text, vision_config={**size, "image_size": 32, "patch_size": 16}, projection_dim=8)
    CLIPModel(config).save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(folder)
    return str(folder)


def test_clip_score_does_not_depend_on_the_batch_or_the_kind_of_picture(clip):
    generator = np.random.default_rng(0)
    pictures = generator.integers(0, 256, (5, 40, 40, 3), dtype=np.uint8)
    captions = ["a b", "c", "d e f", "", "long " * 60]
    found = clip_score(pictures, captions, clip, device=CPU)
    again = clip_score([Image.fromarray(picture) for picture in pictures], captions, clip, device=CPU, batch_size=2)
    assert found["score"] == pytest.approx(again["score"], abs=1e-3) and found["among"] == 5 and found["model"] == clip
    cosines = ClipScorer(clip).cosines(captions, pictures)
    assert found["score"] == pytest.approx(np.mean([max(100 * value, 0) for value in cosines]), abs=1e-3)


def test_a_clip_model_that_cannot_be_had_is_named(tmp_path, clip):
    for given, message in (
        (None, "--clip-path FOLDER"),
        (str(tmp_path / "none"), "not a folder"),
        ("./openai/none", "not a folder"),
        (str(tmp_path), "holds no CLIP model"),
    ):
        with pytest.raises(UserError, match=message):
            ClipScorer(given)
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    for file in ("config.json", "vocab.json", "merges.txt"):
        (damaged / file).write_bytes((Path(clip) / file).read_bytes())
    (damaged / "model.safetensors").write_bytes(b"cut")
    with pytest.raises(UserError, match="holds no CLIP model"):
        ClipScorer(str(damaged))
