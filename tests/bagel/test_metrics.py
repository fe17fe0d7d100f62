"""Text and picture metrics against known values, Chinese included; what cannot be computed says why."""

import math

import pytest
import torch
from PIL import Image

from bagel.config import MetricsOptions
from bagel.evaluation.pictures import (
    clip_score,
    colour_agreement,
    colours_named,
    consistency,
    fid,
    foreground_colour,
    inception_features,
    named_colour_agreement,
    open_judges,
)
from bagel.evaluation.text import BertScorer, NGram, Unavailable, bert_score, bleu, guarded, meteor, rouge, words
from shared.errors import UserError
from shared.metrics import frechet_distance


def test_words_and_chinese_characters():
    assert words("A red-hot Apple, \u7ea2\u8272 2!") == ["a", "red", "hot", "apple", "\u7ea2", "\u8272", "2"]


@pytest.mark.parametrize(
    "text",
    [
        "A small red apple on a white table",
        "\u4ee5\u6a59\u8272\u4e3a\u4e3b\u7684\u5927\u7b11\u7684\u732b\u56fe\u7247\u3002",
    ],
)
def test_equal_texts_score_full_and_unrelated_ones_nothing(text):
    other = "zebra" if text[0] == "A" else "\u98de\u673a\u6c7d\u8f66\u706b\u8f66\u8f6e\u8239"
    assert bleu([text], [text])["bleu"] == pytest.approx(100)
    assert rouge([text], [text])["rougeL"] == 1 and rouge([other], [text])["rougeL"] == 0
    assert next(iter(meteor([text], [text]).values())) > 0.99 and next(iter(meteor([other], [text]).values())) == 0
    assert rouge([""], [text])["rouge1"] == 0 and bleu([""], [text])["bleu"] == 0


def test_chinese_is_scored_by_characters():
    assert "zh" in bleu(["\u7ea2\u8272\u7684\u82f9\u679c"], ["\u7ea2\u8272\u82f9\u679c"])["bleu_signature"]
    assert rouge(["\u7ea2\u8272\u7684\u82f9\u679c"], ["\u7ea2\u8272\u82f9\u679c"])["rouge1"] == pytest.approx(8 / 9)


def test_missing_references_raise_and_missing_models_say_why():
    with pytest.raises(ValueError, match="no reference"):
        rouge([], [])
    with pytest.raises(ValueError, match="1 hypotheses for 2"):
        bleu(["a"], ["a", "b"])
    found = guarded(lambda: bert_score(["a"], ["a"], None), "bertscore_f1")
    assert found["bertscore_f1"] is None and "--bertscore-model" in found["bertscore_f1_reason"]


def test_bertscore_with_a_tiny_local_model(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    inner = Tokenizer(models.WordLevel({"[UNK]": 0, "[PAD]": 1, "a": 2, "cat": 3, "dog": 4}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="[UNK]", pad_token="[PAD]").save_pretrained(tmp_path)
    torch.manual_seed(0)
    BertModel(
        BertConfig(vocab_size=5, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    ).save_pretrained(tmp_path)
    judges = open_judges(MetricsOptions(bertscore_model=str(tmp_path)))
    assert bert_score(["a cat"], ["a cat"], judges.bert)["bertscore_f1"] == pytest.approx(1, abs=1e-5)
    assert bert_score(["a cat", ""], ["a dog", "a"], BertScorer(str(tmp_path), 0))["bertscore_f1"] < 0.5
    with pytest.raises(UserError, match="--bertscore-layer 2"):
        BertScorer(str(tmp_path), 2)
    (tmp_path / "model.safetensors").write_bytes(b"cut")
    with pytest.raises(UserError, match="holds no such model"):
        BertScorer(str(tmp_path))


def test_a_folder_that_holds_no_clip_model_is_named(tmp_path):
    with pytest.raises(Unavailable, match="--clip-model FOLDER"):
        clip_score(["a"], [RED], None)
    for folder, message in ((tmp_path / "none", "--clip-model .*none: no such folder"), (tmp_path, "config.json")):
        with pytest.raises(UserError, match=message):
            open_judges(MetricsOptions(clip_model=str(folder)))


def test_what_is_given_for_a_metric_is_opened_before_anything_is_drawn(tmp_path):
    """A file of other weights left FID out with a note in the figures, after all pictures were drawn."""
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    (tmp_path / "model.safetensors").write_bytes(b"cut")
    for given in ("fid_weights", "bertscore_model", "clip_model"):
        place = tmp_path / "model.safetensors" if given == "fid_weights" else tmp_path
        with pytest.raises(UserError, match="not the FID Inception weights|holds no (such|CLIP) model"):
            open_judges(MetricsOptions(**{given: str(place)}))


def test_ngrams_count():
    model = NGram([[1, 2, 1, 2], [1, 2]], 2, 4)
    assert model.probability([1], 2) > 0.7 and model.nats([[1, 2]]) < NGram([[1, 2, 1, 2]], 1, 4).nats([[1, 2]])
    assert NGram([[0]], 1, 4).nats([[3]]) == pytest.approx(math.log(8))
    trigram = NGram([[1, 2, 1, 2], [1, 2], [3]], 3, 4)
    for context in ([], [1], [2], [0], [1, 2], [2, 1], [0, 0], [1, 2, 1]):
        assert sum(trigram.probability(context, token) for token in range(4)) == pytest.approx(1)


def test_a_bigram_by_hand():
    """1 follows the beginning twice; 2 follows 1 twice; so 1 and 2 were each seen after one kind of token."""
    model = NGram([[1, 2], [1, 2]], 2, 4)
    lowest = (1 + 2 / 4) / (2 + 2)
    assert model.probability([], 1) == pytest.approx((2 - 0.75 + 0.75 * lowest) / 2)
    assert model.probability([2], 1) == pytest.approx(lowest)


def test_frechet_distance_of_features():
    features = torch.randn(50, 4, generator=torch.Generator().manual_seed(0))
    assert frechet_distance(features, features) == pytest.approx(0, abs=1e-8)
    assert frechet_distance(features, features + 1) == pytest.approx(4)


def solid(colour: tuple[int, int, int]) -> Image.Image:
    image = Image.new("RGB", (32, 32), (255, 255, 255))
    image.paste(colour, (8, 8, 24, 24))
    return image


RED, BLUE, GREEN, YELLOW = (solid(c) for c in ((220, 20, 20), (20, 20, 220), (20, 200, 20), (230, 220, 30)))


def test_fid_with_given_features_and_a_torchscript_file(tmp_path):
    def features(pictures):
        return torch.stack([foreground_colour(picture) for picture in pictures])

    assert fid([RED, BLUE], [RED, BLUE], features=features)["fid"] == pytest.approx(0, abs=1e-9)
    assert "2048" in fid([RED, BLUE], [GREEN, RED], features=features)["fid_warning"]
    for given, message in (
        (dict(features=None), "--fid-weights"),
        (dict(features=features), "two or more"),
    ):
        with pytest.raises(Unavailable, match=message):
            fid([RED], [RED], **given)
    with pytest.raises(UserError, match="no such file"):
        inception_features("none.pt")

    class Mean(torch.nn.Module):
        def forward(self, x):
            return x.float().mean((2, 3))

    torch.jit.script(Mean()).save(str(tmp_path / "mean.pt"))
    assert fid([RED, BLUE], [RED, BLUE], inception_features(str(tmp_path / "mean.pt")))["fid"] == pytest.approx(
        0, abs=1e-6
    )


class Stub:
    """Cosine 0.5 for every pair."""

    def cosines(self, texts, pictures):
        return [0.5] * len(texts)


def test_clip_score_and_consistency():
    assert clip_score(["a"], [RED], Stub()) == {"clip_score": 50}
    found = consistency(["a cat"], [RED], ["a cat"], ["a dog"], Stub(), ["a cat"])
    assert found["consistency"] == pytest.approx((0.5 + 0.5 + 0.5 + 1) / 4) and found["consistency_samples"] == 1
    assert consistency(["a"], [RED], ["a"], [], None)["consistency"] is None


def test_colour_agreement():
    pictures = [RED, BLUE, GREEN, YELLOW]
    found = colour_agreement(pictures, pictures)
    assert found["colour_agreement"] == 1 and found["colour_agreement_shuffled"] == pytest.approx(0.5, abs=0.05)
    assert found["colour_agreement_p"] < 0.1
    assert colour_agreement(pictures, pictures[1:] + pictures[:1])["colour_agreement"] <= 0.5
    assert colours_named("mostly Red, \u4ee5\u84dd\u8272\u4e3a\u4e3b") == {"red", "blue"}
    assert named_colour_agreement(["red", "blue"], ["a red one", "blue"]) == {
        "colour_named": 1.0,
        "colour_named_shuffled": 0.0,
    }
