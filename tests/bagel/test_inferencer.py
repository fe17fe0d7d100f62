"""The inferencer's contexts equal the recorded ones; tasks, seeds and sizes behave as documented."""

import pytest
import torch
from PIL import Image

from bagel.config import AutoencoderConfig, LanguageConfig, ModelConfig, VisionConfig
from bagel.data.sources import ImageTransform
from bagel.inferencer import THINK_TO_ANSWER, THINK_TO_DRAW, InterleaveInferencer
from bagel.model import Bagel
from bagel.modules.vision import build_autoencoder
from bagel.sampling.generation import Guidance
from shared.errors import UserError
from tests.bagel.golden import TINY_TOKENS, Case


class WordTokenizer:
    """One id for each word between spaces."""

    def encode(self, text: str) -> list[int]:
        return [1 + sum(word.encode()) % 50 for word in text.split()]

    def decode(self, ids: list[int]) -> str:
        return " ".join(map(str, ids))


def make_inferencer(**changes) -> InterleaveInferencer:
    torch.manual_seed(0)
    config = ModelConfig(
        language=LanguageConfig(
            vocab_size=64,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
        ),
        vision=VisionConfig(
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            patch_size=4,
            image_size=32,
        ),
        autoencoder=AutoencoderConfig(kind="pixel", downsample=4, z_channels=48),
        max_latent_size=8,
    )
    model = Bagel(config).initialize()
    torch.nn.init.normal_(model.llm2vae.weight, std=0.3)
    case = Case("inferencer_contexts_1").info
    transforms = [ImageTransform(**case[name]) for name in ("vae_transform", "vit_transform")]
    return InterleaveInferencer(
        model, build_autoencoder(config.autoencoder), WordTokenizer(), *transforms, TINY_TOKENS, **changes
    )


def test_contexts_of_interleaved_inputs(monkeypatch):
    case, inferencer = Case("inferencer_contexts_1").info, make_inferencer()
    assert len(THINK_TO_DRAW.split()) == case["think_prompt_word_counts"]["generation"]
    assert len(THINK_TO_ANSWER.split()) == case["think_prompt_word_counts"]["understanding"]
    for row in case["rows"]:
        seen = {}

        def gen_text(context, *_, row=row, seen=seen, **__):
            seen["text_context"] = {"kv_len": context.kv_len, "rope": context.rope}
            return row["fake_generated_text"]

        def gen_image(shape, context, text_scale, image_scale, cfg_text, cfg_img, *_, seen=seen, **__):
            seen["image_shape"] = list(shape)
            for name, value in (("main", context), ("cfg_text", cfg_text), ("cfg_img", cfg_img)):
                seen[name] = {"kv_len": value.kv_len, "rope": value.rope}
            return Image.new("RGB", (8, 8))

        monkeypatch.setattr(inferencer, "gen_text", gen_text)
        monkeypatch.setattr(inferencer, "gen_image", gen_image)
        inputs = [
            item if isinstance(item, str) else Image.new("RGB", tuple(item["image_wh"])) for item in row["inputs"]
        ]
        outputs = inferencer.interleave_inference(
            inputs,
            think=row["think"],
            understanding_output=row["understanding_output"],
            image_shapes=tuple(row["image_shapes"]),
        )
        seen["output_types"] = ["text" if isinstance(item, str) else "image" for item in outputs]
        assert seen == row["out"]


def test_tasks_are_chosen_by_the_documented_rule():
    inferencer, picture = make_inferencer(), Image.new("RGB", (32, 24), (200, 30, 30))
    quick = dict(num_timesteps=3, image_shapes=(32, 32))
    drawn = inferencer.unified_generate("a red cat", **quick)
    assert drawn["task"] == "t2i" and drawn["image"].size == (32, 32) and drawn["text"] is None
    assert inferencer.unified_generate("what is it", picture, max_think_token_n=3)["task"] == "understand"
    edited = inferencer.unified_generate("make it blue", picture, output="image", **quick)
    assert edited["task"] == "edit" and edited["image"].size == (32, 24)
    assert inferencer.unified_generate("hello", output="text", max_think_token_n=3)["task"] == "text"
    with pytest.raises(UserError, match="needs a picture"):
        inferencer.unified_generate("x", task="edit")
    with pytest.raises(UserError, match="takes no picture"):
        inferencer.unified_generate("x", picture, task="t2i")
    with pytest.warns(UserWarning, match="neither"):
        assert inferencer() == {"image": None, "text": None}


def test_seeds_repeat_and_batches_equal_single_runs():
    inferencer = make_inferencer(seed=5)
    settings = dict(num_timesteps=4, image_shapes=(32, 24))
    first = inferencer.unified_generate("a red cat", seed=7, **settings)["image"]
    assert first.tobytes() == inferencer.unified_generate("a red cat", seed=7, **settings)["image"].tobytes()
    assert first.tobytes() != inferencer.unified_generate("a red cat", seed=8, **settings)["image"].tobytes()
    guidance = Guidance(num_timesteps=4)
    batch = inferencer.generate_batch([["a red cat"], ["two blue dogs now"]], guidance=guidance, image_shapes=(32, 24))
    alone = inferencer.generate_batch([["a red cat"]], guidance=guidance, image_shapes=(32, 24))
    difference = [abs(a - b) for a, b in zip(batch[0].tobytes(), alone[0].tobytes(), strict=True)]
    assert max(difference) <= 1


@pytest.mark.parametrize("shape", [(30, 32), (72, 32), (0, 32)])
def test_sizes_that_cannot_be_drawn(shape):
    with pytest.raises(UserError, match="multiples of 8 and at most 64"):
        make_inferencer().unified_generate("a cat", image_shapes=shape, num_timesteps=3)
