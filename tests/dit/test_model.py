"""The options of the model, dropped conditions, and other people's weights."""

import argparse

import pytest
import torch
from diffusers import DiTTransformer2DModel, PixArtTransformer2DModel

from dit.config import PRESETS, Config
from dit.model import DiTModel, position_table_1d
from dit.weights.convert import load_pretrained
from dit.weights.open import build_model
from shared.config import load_config
from shared.errors import UserError
from tests.dit.golden import MANIFEST, REFERENCE, assert_close, cases, golden_model

SMALL = {"input_size": 8, "text_dim": 16, "text_len": 6}


def randomised(model: torch.nn.Module) -> torch.nn.Module:
    """Every weight random, so that branches which start at zero count."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * (0.08 if parameter.ndim > 1 else 0.05)
    return model.eval()


def inputs(count: int = 3) -> dict:
    generator = torch.Generator().manual_seed(1)
    mask = torch.arange(6)[None] < torch.tensor([[6], [3], [2]])[:count]
    return {
        "noisy_latents": torch.randn(count, 4, 8, 8, generator=generator),
        "timesteps": torch.tensor([0.0, 417.0, 999.0])[:count],
        "text_embeddings": torch.randn(count, 6, 16, generator=generator),
        "text_mask": mask,
        "text_pooled": torch.randn(count, 16, generator=generator),
    }


@pytest.mark.parametrize(
    "options",
    [
        {"qk_norm": True},
        {"norm": "rmsnorm", "cross_norm": "rmsnorm"},
        {"mlp": "swiglu"},
        {"pos": "rope2d"},
        {"pos": "sincos+rope2d"},
        {"conditioning": "adaln_single"},
        {"text_conditioning": "joint"},
        {"text_conditioning": "joint", "pos": "rope2d"},
        {"text_conditioning": "pooled"},
        {"use_pooled_text": False},
        {"text_mask": False},
        {"patch_size": 4},
        {"learn_sigma": True},
    ],
)
def test_every_option_runs_and_trains_every_weight(options):
    model = randomised(DiTModel(32, 2, 4, **{**SMALL, **options})).train()
    output = model(**inputs())
    assert output.shape == (3, 8 if options.get("learn_sigma") else 4, 8, 8)
    output.square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())
    changed = randomised(DiTModel(32, 2, 4, **SMALL))(**inputs())
    assert changed.shape != output.shape or not torch.allclose(changed, output, atol=1e-4)


@pytest.mark.parametrize("conditioning", ["cross", "joint"])
def test_padding_is_invisible(conditioning):
    model, given = randomised(DiTModel(32, 2, 4, **SMALL, text_conditioning=conditioning)), inputs()
    before = model(**given)
    given["text_embeddings"] = torch.where(given["text_mask"][..., None], given["text_embeddings"], 99.0)
    assert_close(model(**given), before, 1e-6)
    trimmed = {**given, "text_embeddings": given["text_embeddings"][1:2, :3], "text_mask": given["text_mask"][1:2, :3]}
    rows = {name: given[name][1:2] for name in ("noisy_latents", "timesteps", "text_pooled")}
    assert_close(model(**{**trimmed, **rows}), before[1:2], 1e-5)


@pytest.mark.parametrize("null_text", ["empty", "learned"])
def test_dropped_rows_equal_the_null_condition(null_text):
    model, given = randomised(DiTModel(32, 2, 4, **SMALL, null_text=null_text)), inputs()
    if null_text == "empty":
        model.set_null_text(torch.randn(2, 16), torch.tensor([True, True]), torch.randn(16))
    drop = torch.tensor([False, True, False])
    found = model(**given, drop=drop)
    kept = model(**given)
    assert torch.equal(found[0], kept[0]) and torch.equal(found[2], kept[2])
    by_hand = {**given, "text_embeddings": given["text_embeddings"].clone(), "text_mask": given["text_mask"].clone()}
    by_hand["text_embeddings"][1], by_hand["text_mask"][1] = model.null_text_states, model.null_text_mask
    by_hand["text_pooled"] = given["text_pooled"].clone()
    by_hand["text_pooled"][1] = model.null_text_pooled
    assert_close(found, model(**by_hand), 1e-6)


def test_the_guides_positional_call_works():
    model, given = randomised(DiTModel(32, 2, 4, **SMALL)), inputs()
    assert model(given["noisy_latents"], given["timesteps"].long(), given["text_embeddings"]).shape == (3, 4, 8, 8)


def test_other_sizes_use_their_own_tables_by_row_and_column():
    model, given = randomised(DiTModel(32, 2, 4, **SMALL, pos="sincos+rope2d")), inputs()
    given["noisy_latents"] = torch.randn(3, 4, 6, 12)
    assert model(**given).shape == (3, 4, 6, 12)
    (cos, _), token = model._rotation((3, 6), 0, torch.device("cpu")), 1 * 6 + 2  # second row, third column
    expected = torch.cat([position_table_1d(16, torch.tensor([place])) for place in (2, 1)], dim=1).float()
    assert_close(model._position_table((3, 6))[0, token], expected[0])
    assert_close(cos[token, [0, 4]], torch.tensor([1.0, 2.0]).cos())  # half of a head turns with the row, half after it


def test_joint_text_tokens_are_not_the_picture():
    """The picture comes from its own tokens: what the last text tokens hold reaches it through attention alone."""
    model, given = randomised(DiTModel(32, 1, 4, **SMALL, text_conditioning="joint")), inputs()
    for block in model.blocks:
        torch.nn.init.zeros_(block.attn.proj.weight)
    changed = {**given, "text_embeddings": given["text_embeddings"] + 1.0}
    assert_close(model(**changed), model(**given), 1e-6)


@pytest.mark.parametrize("every", [True, 2])
def test_gradient_checkpointing_changes_nothing(every):
    model, given = randomised(DiTModel(32, 3, 4, **SMALL)).train(), inputs()
    gradients = []
    for setting in (False, every):
        model.gradient_checkpointing = setting
        model.zero_grad()
        model(**given).square().mean().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_drop_path_acts_in_training_only():
    model, given = randomised(DiTModel(32, 2, 4, **SMALL, drop_path=0.9)), inputs()
    whole = model(**given)
    assert torch.equal(whole, model(**given))
    assert not torch.equal(whole, model.train()(**given))


def test_presets_have_their_stated_parameters():
    wanted = {
        "default": 211_815_184,
        "flow_256": 211_815_184,
        "large": 520_338_192,
        "xl": 674_834_720,
        "small": 916_200,
        "showcase": 2_334_496,
        "small_cub": 2_338_224,
    }
    for name, count in wanted.items():
        config = load_config(Config, presets=PRESETS, argv=["--config", name])
        with torch.device("meta"):
            model = build_model(config)
        assert sum(p.numel() for p in model.parameters()) == count
        assert f"{count:,}" in (PRESETS / f"{name}.yaml").read_text()


def official_xl_names() -> dict[str, tuple[int, ...]]:
    """Names and shapes of the released DiT-XL/2 at 256 pixels, grown from the golden model's."""
    shapes = {}
    for name, shape in MANIFEST["state_dict_shapes"].items():
        grown = tuple(11 if size == 11 else 1152 * (size // 48) if size % 48 == 0 else size for size in shape)
        numbers = range(28) if name.startswith("blocks.0.") else [0]
        if name.startswith("blocks.1."):
            continue
        for number in numbers:
            shapes[name.replace("blocks.0.", f"blocks.{number}.")] = grown
    return {**shapes, "pos_embed": (1, 256, 1152), "y_embedder.embedding_table.weight": (1001, 1152)}


def test_official_xl_state_loads_strictly_into_the_xl_preset():
    config = load_config(Config, presets=PRESETS, argv=["--config", "xl"])
    with torch.device("meta"):
        model = build_model(config)
        state = {name: torch.empty(shape) for name, shape in official_xl_names().items()}
    assert sum(value.numel() for value in state.values()) == 675_129_632
    assert not any(model.load_state_dict(state, strict=True, assign=True))


def test_official_training_file_prefers_the_average_and_is_read_safely(tmp_path):
    weights = cases("dit_weights")
    other = {name: value + 1 for name, value in weights.items()}
    torch.save({"model": other, "ema": weights, "args": argparse.Namespace(model="x")}, tmp_path / "official.pt")
    model = DiTModel(48, 2, 4, input_size=8, num_classes=10, text_conditioning="none", learn_sigma=True)
    report = load_pretrained(model, tmp_path / "official.pt", strict=True)
    assert not report.missing and not report.unexpected
    assert torch.equal(model.blocks[0].mlp.fc1.weight, weights["blocks.0.mlp.fc1.weight"])

    class Evil:
        def __reduce__(self):
            return (print, ("run",))

    torch.save({"model": Evil()}, tmp_path / "evil.pt")
    with pytest.raises(UserError, match="evil.pt"):
        load_pretrained(model, tmp_path / "evil.pt")


def test_learned_variance_is_cut_off_and_missing_blocks_stay_the_identity():
    model = DiTModel(48, 3, 4, input_size=8, num_classes=10, text_conditioning="none")
    report = load_pretrained(model, REFERENCE / "dit_weights.safetensors")
    assert all(name.startswith("blocks.2.") for name in report.missing) and not report.unexpected
    golden, whole = cases("dit_forward"), golden_model()
    arguments = (golden["full.x"], golden["full.t"])
    assert_close(model.eval()(*arguments, labels=golden["full.y"]), whole(*arguments, labels=golden["full.y"])[:, :4])


def test_cross_attention_leaves_loaded_weights_their_function():
    model = DiTModel(48, 2, 4, input_size=8, text_dim=16, text_len=6, use_pooled_text=False, learn_sigma=True).eval()
    load_pretrained(model, REFERENCE / "dit_weights.safetensors")
    bare = DiTModel(48, 2, 4, input_size=8, text_conditioning="none", learn_sigma=True).eval()
    load_pretrained(bare, REFERENCE / "dit_weights.safetensors")
    given = inputs()
    found = model(given["noisy_latents"], given["timesteps"], given["text_embeddings"], text_mask=given["text_mask"])
    assert_close(found, bare(given["noisy_latents"], given["timesteps"]), 1e-6)


def test_a_file_of_something_else_is_refused(tmp_path):
    torch.save({"state_dict": {"nothing": torch.zeros(2)}}, tmp_path / "other.pt")
    with pytest.raises(UserError, match="not one tensor fits"):
        load_pretrained(DiTModel(32, 1, 4, **SMALL), tmp_path / "other.pt")


def test_diffusers_dit_gives_the_same_pictures(tmp_path):
    torch.manual_seed(0)
    theirs = DiTTransformer2DModel(
        num_attention_heads=4,
        attention_head_dim=12,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        sample_size=8,
        num_embeds_ada_norm=10,
    )
    embedders = [block.norm1.emb for block in randomised(theirs).transformer_blocks]
    for embedder in embedders[1:]:  # converted files hold the same embedder in every block
        embedder.load_state_dict(embedders[0].state_dict())
    theirs.save_pretrained(tmp_path)
    ours = DiTModel(
        48, 2, 4, input_size=8, num_classes=10, text_conditioning="none", learn_sigma=True, time_freq_shift=1
    ).eval()
    report = load_pretrained(ours, tmp_path, strict=True)
    assert not report.missing and not report.unexpected
    x, t, y = torch.randn(3, 4, 8, 8), torch.tensor([0, 417, 999]), torch.tensor([1, 9, 10])
    with torch.no_grad():
        assert_close(ours(x, t, labels=y), theirs(x, t, y).sample, 2e-5)


def test_pixart_gives_the_same_pictures(tmp_path):
    theirs = PixArtTransformer2DModel(
        num_attention_heads=4,
        attention_head_dim=12,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        cross_attention_dim=48,
        sample_size=8,
        caption_channels=16,
        interpolation_scale=1,
    )
    randomised(theirs).save_pretrained(tmp_path)
    ours = DiTModel(
        48, 2, 4, **SMALL, use_pooled_text=False, learn_sigma=True, conditioning="adaln_single", cross_norm="none"
    ).eval()
    report = load_pretrained(ours, tmp_path)
    assert not report.unexpected and all(name.startswith("null_text") for name in report.missing)
    given = inputs()
    with torch.no_grad():
        expected = theirs(
            given["noisy_latents"],
            given["text_embeddings"],
            given["timesteps"].long(),
            encoder_attention_mask=given["text_mask"].float(),
            added_cond_kwargs={"resolution": None, "aspect_ratio": None},
        ).sample
        found = ours(**{name: value for name, value in given.items() if name != "text_pooled"})
    assert_close(found, expected, 2e-5)
