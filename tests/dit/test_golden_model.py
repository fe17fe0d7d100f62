"""The model against golden numbers of the public DiT, and its counts."""

import pytest
import torch

from dit.model import DiTModel, modulate, position_table_1d, position_table_2d, timestep_sinusoid, unpatchify
from tests.dit.golden import MANIFEST, assert_close, cases, golden_model


def test_time_sinusoids_equal_the_reference():
    golden = cases("embeddings")
    # float32 exp differs in its last bit between processors, which turns an angle of t radians by up to t / 2^24.
    allowed = 1e-6 + golden["t"][:, None] / 2**24
    for dim in (256, 64, 7):
        assert ((timestep_sinusoid(golden["t"], dim) - golden[f"sin_embed_dim{dim}"]).abs() <= allowed).all()
    other = timestep_sinusoid(golden["t"], 256, max_period=100)
    assert ((other - golden["sin_embed_dim256_max_period_100"]).abs() <= allowed).all()


def test_position_tables_equal_the_reference():
    golden = cases("embeddings")
    assert_close(position_table_1d(8, golden["pos1d_dim8_pos"]), golden["pos1d_dim8"], 1e-12)
    for dim, grid in MANIFEST["config"]["pos"]:
        assert_close(position_table_2d(dim, grid, grid), golden[f"pos2d_dim{dim}_grid{grid}"], 1e-12)


def test_first_half_of_the_position_table_is_the_column():
    table = position_table_2d(16, 2, 3).reshape(2, 3, 16)
    assert torch.equal(table[0, :, :8], table[1, :, :8]) and torch.equal(table[:, 0, 8:], table[:, 2, 8:])
    assert not torch.equal(table[:, 0, :8], table[:, 1, :8])


def test_block_and_its_gradients_equal_the_reference():
    golden, block = cases("dit_forward"), golden_model().blocks[0]
    x, c = golden["block.x"].clone().requires_grad_(), golden["block.c"].clone().requires_grad_()
    output = block(x, c)
    assert_close(output, golden["block.out"])
    (output * golden["block.out_weight"]).sum().backward()
    assert_close(x.grad, golden["block.grad_x"])
    assert_close(c.grad, golden["block.grad_c"])
    named = dict(block.named_parameters())
    gradients = [key for key in golden if key.startswith("block.grad.")]
    assert len(gradients) >= 4
    for key in gradients:
        assert_close(named[key.removeprefix("block.grad.")].grad, golden[key])


def test_parts_equal_the_reference():
    golden, model = cases("dit_forward"), golden_model()
    x, c = golden["block.x"], golden["block.c"]
    with torch.no_grad():
        assert_close(modulate(x, golden["modulate.shift"], golden["modulate.scale"]), golden["modulate.out"])
        assert_close(model.blocks[0].attn(x), golden["attn.out"])
        assert_close(model.blocks[0].mlp(x), golden["mlp.out"])
        assert_close(model.final_layer(x, c), golden["final.out"])
        assert_close(unpatchify(golden["unpatchify.in"], (4, 4), 2), golden["unpatchify.out"])
        assert_close(model.x_embedder(golden["full.x"]), golden["patch_embed.out"])
        assert_close(model.t_embedder(golden["full.t"]), golden["t_embedder.out"])
        assert_close(model.y_embedder(golden["full.y"]), golden["y_embedder.out"])
        assert_close(model.y_embedder(golden["full.y"], torch.ones(3, dtype=torch.bool)), golden["y_embedder.null_out"])


def test_whole_model_equals_the_reference():
    golden, model = cases("dit_forward"), golden_model()
    with torch.no_grad():
        assert_close(model(golden["full.x"], golden["full.t"], labels=golden["full.y"]), golden["full.out"])
        null = model(golden["full.x"], golden["full.t"], labels=golden["full.y"], drop=torch.ones(3, dtype=torch.bool))
    assert_close(null, golden["full.out_null"])


def test_names_and_shapes_are_the_official_ones():
    model = golden_model()
    assert {name: list(value.shape) for name, value in model.state_dict().items()} == MANIFEST["state_dict_shapes"]
    assert sum(p.numel() for p in model.parameters()) == MANIFEST["param_count_trainable"]


def test_zeros_at_initialisation_are_the_official_ones():
    model = DiTModel(48, 2, 4, input_size=8, num_classes=10, text_conditioning="none", learn_sigma=True)
    zero = sorted(name for name, value in model.state_dict().items() if not value.any())
    assert zero == sorted(MANIFEST["zero_at_init"])


@pytest.mark.parametrize(
    ("options", "count"),
    [
        ({}, 211_815_184),
        ({"use_pooled_text": False}, 210_830_608),
        ({"conditioning": "adaln_single"}, 157_555_984),
        ({"text_conditioning": "none"}, 172_048_144),
        ({"input_size": 64}, 211_815_184),
    ],
)
def test_parameter_counts_are_those_of_the_specification(options, count):
    with torch.device("meta"):
        assert sum(p.numel() for p in DiTModel(**options).parameters()) == count


@pytest.mark.parametrize("conditioning", ["cross", "joint", "pooled", "none"])
@pytest.mark.parametrize("adaln", ["adaln_zero", "adaln_single"])
def test_output_is_exactly_zero_at_initialisation(conditioning, adaln):
    model = DiTModel(
        32, 2, 4, input_size=8, text_conditioning=conditioning, conditioning=adaln, text_dim=16, text_len=5
    )
    output = model(
        torch.randn(2, 4, 8, 8),
        torch.tensor([3.0, 700.0]),
        torch.randn(2, 5, 16),
        text_mask=torch.ones(2, 5, dtype=torch.bool),
        text_pooled=torch.randn(2, 16),
    )
    assert output.shape == (2, 4, 8, 8) and not output.any()


def test_every_block_is_the_identity_at_initialisation():
    model = DiTModel(32, 2, 4, input_size=8, text_dim=16, text_len=5)
    x = torch.randn(2, 16, 32)
    for block in model.blocks:
        assert torch.equal(block(x, torch.randn(2, 32), torch.randn(2, 5, 32)), x)
