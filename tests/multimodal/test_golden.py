"""The recorded cases: log-mel, picture preprocessing, tokenizer, learning rate, retrieval with ties, contrastive
losses.
"""

import numpy as np
import pytest
import torch
from PIL import Image

from multimodal.config import TrainingConfig
from multimodal.data.audio import log_mel, mel_filters, mel_power
from multimodal.data.image import center_crop, normalise
from multimodal.data.text import TextTokenizer
from multimodal.evaluation.retrieval import ranks_of_targets, summarise
from multimodal.modules.contrastive import contrastive_loss
from shared.loop import lr_at
from shared.media.pictures import to_pixels
from tests.multimodal.golden import numbers, tensors


def test_log_mel_agrees_with_librosa():
    case = tensors("log_mel")
    assert torch.allclose(mel_filters(), case["mel_filterbank_slaney"], atol=1e-7)
    power = case["mel_power"][:-1]
    assert torch.allclose(mel_power(case["waveform"]), power, atol=5e-5 * power.max(), rtol=1e-4)
    assert torch.allclose(log_mel(case["waveform"]), case["log_mel"], atol=5e-5)
    padded = torch.nn.functional.pad(case["waveform"], (0, 8000))
    assert torch.allclose(log_mel(padded), case["log_mel_zero_padded_half_second"], atol=5e-5)


def test_log_mel_agrees_with_whispers_extractor():
    from transformers import WhisperFeatureExtractor

    waveform = torch.randn(16000 * 3, generator=torch.Generator().manual_seed(3)) * 0.1
    oracle = WhisperFeatureExtractor(feature_size=80)(
        waveform.numpy(), sampling_rate=16000, padding=False, return_tensors="np"
    )["input_features"][0]
    assert np.abs(log_mel(waveform).numpy() - oracle.T).max() < 5e-5


def test_picture_preprocessing():
    case = tensors("image_preprocess")
    pixels = normalise(to_pixels(center_crop(Image.fromarray(case["image_uint8_hwc"].numpy()), 224)))
    assert torch.allclose(pixels[:, ::7, ::7], case["pixels_every_7th"], atol=1e-6)
    assert torch.allclose(pixels.double().sum((1, 2)), case["channel_sum"], atol=1e-2)


@pytest.mark.parametrize("case", numbers("tokenizer_cases"), ids=lambda case: case["text"][:12] or "empty")
def test_tokenizer(case):
    tokenizer = TextTokenizer()
    assert tokenizer.encode(case["text"]) == case["ids"]
    assert tokenizer.tokens(case["text"]) == case["tokens"]
    assert tokenizer.decode(case["ids"]) == case["decoded"]


def test_learning_rate():
    case = numbers("cosine_schedule")
    training = TrainingConfig(learning_rate=case["base_lr"], warmup_steps=case["warmup_steps"])
    assert [lr_at(step, training, case["total_steps"]) for step in range(case["total_steps"])] == pytest.approx(
        case["lr"], rel=1e-12
    )


def test_retrieval_with_ties_and_several_captions():
    case, expected = tensors("retrieval"), numbers("retrieval")
    similarity, owner = case["multi.similarity"], case["multi.caption_owner"].tolist()
    captions = [[c for c, o in enumerate(owner) if o == i] for i in range(len(similarity))]
    # A similarity is the product with unit vectors: every score keeps its exact value.
    to_text = ranks_of_targets(similarity, torch.eye(14), captions)
    to_image = ranks_of_targets(similarity.T, torch.eye(6), [[o] for o in owner])
    assert [ranks[0] for ranks in to_text] == case["multi.image_to_text_rank0"].tolist()
    assert [ranks[0] for ranks in to_image] == case["multi.text_to_image_rank0"].tolist()
    for ranks, direction in ((to_text, "image_to_text"), (to_image, "text_to_image")):
        found = summarise(ranks)
        for name, value in expected["multi"][direction].items():
            assert found[name] == pytest.approx(value), name


def test_retrieval_of_pairs():
    case, expected = tensors("retrieval"), numbers("retrieval")["paired"]
    image, text = case["paired.image_features"].float(), case["paired.text_features"].float()
    for queries, candidates, name in ((image, text, "image_to_text"), (text, image, "text_to_image")):
        ranks = ranks_of_targets(queries, candidates, [[i] for i in range(6)])
        assert [r[0] for r in ranks] == case[f"paired.{name}_rank0"].tolist()
        found = summarise(ranks)
        for measure in ("R@1", "R@5", "R@10", "mean_rank", "median_rank"):
            assert found[measure] == pytest.approx(expected[f"{name}_{measure}"]), measure


def test_constant_embeddings_do_not_score():
    ranks = ranks_of_targets(torch.ones(50, 4), torch.ones(50, 4), [[i] for i in range(50)])
    assert summarise(ranks)["R@1"] == pytest.approx(1 / 50)


@pytest.mark.parametrize("kind,case", [("infonce", "clip"), ("siglip", "siglip")])
def test_contrastive_losses(kind, case):
    data, facts = tensors("contrastive_loss"), numbers("contrastive_loss")
    image, text = (data[f"{name}_features"].clone().requires_grad_() for name in ("image", "text"))
    log_scale = torch.tensor(facts[f"log_logit_scale_{case}"], requires_grad=True)
    bias = torch.tensor(facts["logit_bias_siglip"], requires_grad=True)
    loss = contrastive_loss(kind, image, text, log_scale.exp(), bias)
    loss.backward()
    expected = facts["scalars"][f"{case}.single"]
    assert loss.item() == pytest.approx(expected["loss"], abs=1e-5)
    assert log_scale.grad.item() == pytest.approx(expected["grad_log_logit_scale"], abs=1e-5)
    if expected["grad_logit_bias"] is not None:
        assert bias.grad.item() == pytest.approx(expected["grad_logit_bias"], abs=1e-5)
    assert torch.allclose(image.grad, data[f"{case}.single.grad_image"], atol=1e-5)
    assert torch.allclose(text.grad, data[f"{case}.single.grad_text"], atol=1e-5)
