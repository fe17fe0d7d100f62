"""Masks, positions, patches, embeddings, time shifts, ViT, autoencoder and one layer against the recorded cases."""

import gzip
import json

import pytest
import torch
from torch.testing import assert_close

from bagel.config import ModelConfig
from bagel.model import (
    Bagel,
    Connector,
    TimestepEmbedder,
    count_parameters,
    sampling_times,
    sincos_table,
    training_times,
)
from bagel.modules.transformer import (
    CAUSAL,
    FULL,
    NOISE,
    MoTDecoderLayer,
    PackedAttention,
    PackLayout,
    Rows,
    flex_ids,
    flex_rule,
    rotary_angles,
    sample_mask,
)
from bagel.modules.vision import FluxAutoencoder, PixelAutoencoder, VisionModel, linear_patch_embedding
from bagel.packing import patchify, position_ids, unpatchify
from bagel.sampling.context import CachedAttention, Context
from shared.errors import UserError
from tests.bagel.golden import (
    FLOAT,
    LOOSE,
    REFERENCE,
    Case,
    grad_norms_match,
    language_config,
    names,
    splits,
    vae_config,
    vision_config,
)


@pytest.mark.parametrize("name", names("mask_"))
def test_masks_match_the_recorded_rule(name):
    case = Case(name)
    samples = case.info["samples"]
    for number, sample in enumerate(samples):
        assert torch.equal(sample_mask(sample["split_lens"], sample["attn_modes"]), case[f"out.sample_{number}"].bool())
    layout = PackLayout(case.info["sample_lens"], **splits(samples))
    length = layout.length
    rule = flex_rule(*flex_ids(layout, length + 3, torch.device("cpu")))
    row = torch.arange(length)
    packed = rule(0, 0, row[:, None].expand(length, length), row[None].expand(length, length))
    assert torch.equal(packed, case["out.packed"].bool())
    assert sum(layout.attended_pairs()) == int(case["out.packed"].sum())


def test_position_ids_and_their_limit():
    for row in Case("posids_1").info["rows"]:
        patch, side = row["patch_size"], row["max_num_patches_per_side"]
        for kind in ("extrapolate", "interpolate"):
            found = position_ids(row["img_h"] // patch, row["img_w"] // patch, side, interpolate=kind == "interpolate")
            assert found.tolist() == row[kind]
    with pytest.raises(UserError, match="max_latent_size"):
        position_ids(9, 2, 8)


def test_patch_orders_and_their_inverse():
    case = Case("patch_1")
    rows, columns = case.info["latent_hw"]
    assert torch.equal(patchify(case["in.image"], case.info["vit_patch"]), case["out.vit_patches"])
    latent = case["in.padded_latent"][:, : 2 * rows, : 2 * columns]
    assert torch.equal(patchify(latent, 2), case["out.latent_tokens"])
    assert torch.equal(unpatchify(case["out.latent_tokens"], rows, columns, 2), case["out.unpatchified"][0])


@pytest.mark.parametrize("name", names("embeds_"))
def test_embeddings(name):
    case = Case(name)
    width = case.info["hidden_size"]
    table = sincos_table(width, case.info["max_num_patch_per_side"])
    assert_close(table, case["out.pos_embed_table"], **FLOAT)
    assert_close(table[case["in.position_ids"]], case["out.pos_embed"], **FLOAT)
    embedder = TimestepEmbedder(width)
    connector = Connector(case.info["connector"]["in_dim"], width)
    weights = case.weights()
    for module, part in ((embedder, "mlp."), (connector, "fc")):
        found = {name[name.index(part) :]: value for name, value in weights.items() if part in name}
        module.load_state_dict(found)
    assert_close(embedder.code(case["in.t"]), case["out.timestep_freq"], **FLOAT)
    assert_close(embedder(case["in.t"]), case["out.timestep_embed"], **FLOAT)
    assert_close(connector(case["in.connector_x"]), case["out.connector"], **FLOAT)


def test_times_of_training_and_sampling():
    info = Case("tshift_1").info
    raw = torch.tensor([float(value) for value in info["raw_normal"]])
    for row in info["rows"]:
        assert_close(training_times(raw, row["shift"]), torch.tensor(row["train_t"]), atol=1e-6, rtol=0)
        grid = sampling_times(row["num_timesteps"], row["shift"])
        assert_close(grid[:-1], torch.tensor(row["sample_t"]), atol=1e-6, rtol=0)
        assert_close(grid[:-1] - grid[1:], torch.tensor(row["dt"]), atol=1e-6, rtol=0)
    with pytest.raises(UserError, match="num_timesteps 1"):
        sampling_times(1, 3.0)


@pytest.mark.parametrize("name", names("siglip_"))
def test_vision_tower(name):
    case = Case(name)
    info = case.info
    tower = VisionModel(vision_config(info))
    weights = {name: value for name, value in case.weights().items() if ".rope." not in name}
    tower.load_state_dict(weights)
    side = info["image_size"] // info["patch_size"]
    patches = [patchify(case[f"in.image_{number}"], info["patch_size"]) for number in range(len(info["image_hw"]))]
    cells = [
        position_ids(
            height // info["patch_size"], width // info["patch_size"], side, interpolate=info["interpolate_pos"]
        )
        for height, width in info["image_hw"]
    ]
    assert torch.equal(torch.cat(patches), case["in.patches"])
    assert torch.equal(torch.cat(cells), case["in.position_ids"])
    assert_close(tower(torch.cat(patches), torch.cat(cells), [len(part) for part in patches]), case["out.y"], **FLOAT)


def test_convolution_weight_becomes_a_linear_one():
    convolution = torch.nn.Conv2d(3, 5, 4, stride=4)
    image = torch.randn(3, 8, 12)
    expected = convolution(image[None])[0].flatten(1).T
    found = torch.nn.functional.linear(patchify(image, 4), linear_patch_embedding(convolution.weight), convolution.bias)
    assert_close(found, expected)


@pytest.mark.parametrize("name", names("vae_"))
def test_autoencoder(name):
    case = Case(name)
    autoencoder = FluxAutoencoder(vae_config(case.info))
    autoencoder.load_state_dict(case.weights())
    with torch.no_grad():
        assert_close(autoencoder.encoder(case["in.image"]), case["out.moments"], **LOOSE)
        assert_close(autoencoder.encode(case["in.image"]), case["out.latent_mean"], **LOOSE)
        assert_close(
            autoencoder.encode(case["in.image"], case["in.posterior_noise"]), case["out.latent_sample"], **LOOSE
        )
        assert_close(autoencoder.decode(case["out.latent_sample"]), case["out.decoded"], **LOOSE)


def test_pixel_cells_are_exact():
    code = PixelAutoencoder(
        ModelConfig().autoencoder.model_copy(update=dict(kind="pixel", downsample=2, z_channels=12))
    )
    image = torch.rand(2, 3, 8, 6) * 2 - 1
    assert code.encode(image).shape == (2, 12, 4, 3)
    assert_close(code.decode(code.encode(image)), image)


@pytest.mark.parametrize("name", names("mot_layer_"))
def test_layer_and_its_gradients(name):
    case = Case(name)
    layer = MoTDecoderLayer(language_config(case.info))
    layer.load_state_dict(case.weights())
    rows = Rows(case["in.und_indexes"], case["in.gen_indexes"])
    attention = PackedAttention(PackLayout(case.info["sample_lens"], **splits(case.info["samples"])), rows, "dense")
    cos, sin = rotary_angles(case["in.position_ids"], layer.self_attn.head, case.info["rope_theta"])
    assert_close(cos, case["out.cos"], **FLOAT)
    x = case["in.x"].clone().requires_grad_()
    angles = [(cos[index], sin[index]) for index in (rows.und, rows.gen)]
    y = rows.join(layer(x[rows.und], x[rows.gen], angles, attention, 0, case.info["freeze_und"]))
    assert_close(y, case["out.y"], **FLOAT)
    (y * case["in.grad_y"]).sum().backward()
    assert_close(x.grad, case["out.grad_x"], **LOOSE)
    grad_norms_match(layer, case.info["out_param_grad_norms"])


@pytest.mark.parametrize("name", names("mot_cache_"))
def test_layer_with_a_cache(name):
    case = Case(name)
    layer = MoTDecoderLayer(language_config(case.info))
    layer.load_state_dict(case.weights())
    text, latents = case.info["text_len"], case.info["latent_tokens"]
    context = Context()
    head, theta = layer.self_attn.head, case.info["rope_theta"]
    angles = [rotary_angles(positions, head, theta) for positions in (torch.arange(text), torch.arange(0))]
    rows = Rows(torch.arange(text), torch.arange(0))
    attention = CachedAttention([context], [text], rows, causal=True, store=True)
    y, _ = layer(case["in.x_text"], case["in.x_text"][:0], angles, attention, 0)
    assert_close(y, case["out.y_text"], **FLOAT)
    assert_close(context.keys[0], case["out.k_cache"], **FLOAT)
    assert_close(context.values[0], case["out.v_cache"], **FLOAT)
    rows = Rows(torch.tensor([0, latents + 1]), torch.arange(1, latents + 1))
    angles = [rotary_angles(torch.full((count,), text), head, theta) for count in (2, latents)]
    for store in (False, True):
        before = len(context.keys[0])
        attention = CachedAttention([context], [latents + 2], rows, causal=False, store=store)
        x = case["in.x_image"]
        y = rows.join(layer(x[rows.und], x[rows.gen], angles, attention, 0))
        assert_close(y, case["out.y_image"], **FLOAT)
        assert len(context.keys[0]) == before + (latents + 2) * store
    assert_close(context.keys[0], case["out.k_cache_after"], **FLOAT)
    assert_close(context.values[0], case["out.v_cache_after"], **FLOAT)


def test_dense_and_flex_attention_agree():
    generator = torch.Generator().manual_seed(3)
    for trial in range(6):
        splits_of, modes_of, samples = [], [], []
        for _ in range(1 + trial % 3):
            count = int(torch.randint(1, 6, (), generator=generator))
            lengths = torch.randint(1, 9, (count,), generator=generator).tolist()
            modes = [(CAUSAL, FULL, NOISE)[i] for i in torch.randint(0, 3, (count,), generator=generator).tolist()]
            splits_of, modes_of, samples = splits_of + lengths, modes_of + modes, samples + [sum(lengths)]
        layout = PackLayout(samples, splits_of, modes_of)
        query = torch.randn(layout.length, 4, 8, generator=generator)
        key, value = torch.randn(2, layout.length, 2, 8, generator=generator)
        rows, pairs = Rows(torch.arange(layout.length), torch.arange(0)), [(x, x[:0]) for x in (query, key, value)]
        dense, flex = (PackedAttention(layout, rows, backend)(0, *pairs)[0] for backend in ("dense", "flex"))
        assert_close(flex, dense, atol=2e-6, rtol=1e-5)
        assert sum(layout.attended_pairs()) == sum(int(sample_mask(*splits).sum()) for splits in layout.samples())


def test_full_size_names_and_shapes_equal_the_released_ones():
    with torch.device("meta"):
        model, autoencoder = Bagel(ModelConfig()), FluxAutoencoder(ModelConfig().autoencoder)
    for module, file in ((model, "keys.json.gz"), (autoencoder, "keys_vae.json.gz")):
        with gzip.open(REFERENCE / file) as stream:
            expected = json.load(stream)
        assert {name: list(value.shape) for name, value in module.state_dict().items()} == expected
    assert len(model.state_dict()) == 1223
    counts = count_parameters(model)
    assert counts["total"] == 14_607_260_128
    assert sum(value.numel() for value in autoencoder.parameters()) == 83_819_683
    expected = {
        "understanding expert": 6_525_628_928,
        "generation expert": 6_525_628_928,
        "embedding and head": 1_089_994_752,
        "vision tower": 402_552_736,
        "connector": 16_980_992,
        "time_embedder": 13_769_728,
        "vae2llm": 232_960,
        "llm2vae": 229_440,
        "latent_pos_embed": 14_680_064,
        "vit_pos_embed": 17_561_600,
    }
    assert {name: counts[name] for name in expected} == expected
