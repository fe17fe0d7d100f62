"""The network: exact sizes, any subset of modalities, masks, exact attention in chunks, recomputation."""

import math
from types import SimpleNamespace

import pytest
import torch

from multimodal import model
from multimodal.config import Config
from multimodal.data.image import MEAN, STD, normalise
from multimodal.data.text import TextTokenizer
from multimodal.model import (
    AUDIO_FEATURES,
    AUDIO_PARTS,
    GLIDE_EDGES,
    HUES,
    IMAGE_FEATURES,
    IMAGE_PARTS,
    RHYTHM_GROUPS,
    RIPPLE_EDGES,
    SIZES,
    LinearPath,
    create_model,
    picture_statistics,
    sound_statistics,
)
from multimodal.modules import linear_path
from multimodal.modules.blocks import Attention, Block, Tower
from multimodal.modules.linear_path import fit_linear_path
from multimodal.trainer import choose_trainable, make_stage_module, parameter_groups
from scripts.bench import multimodal as benchmark
from shared.errors import BadSample

TOTALS = {"tiny": 14_784_789, "small": 35_593_493, "base": 80_128_597, "large": 200_918_869}
BASE_PARTS = {
    "image_tower": 37_829_632,
    "text_tower": 12_610_560,
    "audio_tower": 15_762_944,
    "fusion_tower": 6_305_792,
    "image_patches": 393_728,
    "audio_patches": 131_584,
    "words": 4_915_200,
    "word_projection": 153_600,
    "embed.image": 262_144,
    "to_fusion.text": 262_656,
    "fused_output": 262_656,
    "classifier": 42_064,
    "match_head": 513,
}


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return create_model("mini", 7, embed_dim=64, image_size=32, image_patch=8).eval()


@pytest.fixture(scope="module")
def inputs():
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(5, 16000, (3, 10), generator=generator)
    ids[1, 6:] = 0
    return {
        "images": torch.randn(3, 3, 32, 32, generator=generator),
        "input_ids": ids,
        "audio": torch.randn(3, 64, 80, generator=generator),
    }


@pytest.mark.parametrize("size", TOTALS)
def test_parameter_totals(size):
    with torch.device("meta"):
        assert create_model(size).num_parameters() == TOTALS[size]
        assert create_model(size, 1251).num_parameters() == TOTALS[size] + (1251 - 80) * 513


def test_parameters_of_each_part_of_base():
    with torch.device("meta"):
        network = create_model("base")
    assert {name: sum(p.numel() for p in network.get_submodule(name).parameters()) for name in BASE_PARTS} == BASE_PARTS
    assert sum(p.numel() for p in Block(512, 8).parameters()) == 12 * 512**2 + 13 * 512


def test_the_benchmark_compares_like_with_like():
    with torch.device("meta"):
        ours, theirs = benchmark.our_model(), benchmark.their_model()
    trained = {name: p.numel() for name, p in ours.network.named_parameters() if p.requires_grad}
    assert sum(p.numel() for p in theirs.parameters()) == 10_659_073
    assert sum(trained.values()) == 10_698_241 == 10_659_073 + trained["word_projection.weight"] + 13 * 192 - 192


def test_the_presets_build():
    with torch.device("meta"):
        assert {name: len(create_model(name).image_tower.blocks) for name in SIZES} == {
            "mini": 4,
            "tiny": 12,
            "small": 12,
            "base": 12,
            "large": 12,
        }


@pytest.mark.parametrize(
    "names", [("images",), ("input_ids",), ("audio",), ("images", "audio"), ("images", "input_ids", "audio")]
)
def test_every_subset_of_modalities(network, inputs, names):
    found = network(**{name: inputs[name] for name in names})
    modalities = {"images": "image", "input_ids": "text", "audio": "audio"}
    assert {f"{modalities[name]}_embeds" for name in names} == {key for key in found if key.endswith("_embeds")}
    assert (
        found["fused_features"].shape == (3, 64)
        and found["logits"].shape == (3, 7)
        and found["match_logits"].shape == (3,)
    )
    for name in names:
        assert torch.allclose(found[f"{modalities[name]}_embeds"].norm(dim=1), torch.ones(3), atol=1e-6)
    assert found["logit_scale"].shape == () and found["logit_scale"].item() == pytest.approx(1 / 0.07, rel=1e-5)
    assert "fused_features" not in network(images=inputs["images"], fuse=False)


def test_a_hidden_modality_equals_an_absent_one(network, inputs):
    absent = network(images=inputs["images"], input_ids=inputs["input_ids"])["fused_features"]
    hidden = network(**inputs, modality_mask={"audio": torch.zeros(3, dtype=torch.bool)})["fused_features"]
    assert torch.allclose(absent, hidden, atol=1e-5)
    mixed = network(**inputs, modality_mask={"audio": torch.tensor([True, False, True])})["fused_features"]
    whole = network(**inputs)["fused_features"]
    assert torch.allclose(mixed[1], absent[1], atol=1e-5) and torch.allclose(mixed[[0, 2]], whole[[0, 2]], atol=1e-5)


def test_more_padding_changes_nothing(network, inputs):
    ids = torch.nn.functional.pad(inputs["input_ids"], (0, 6))
    audio = torch.nn.functional.pad(inputs["audio"], (0, 0, 0, 32), value=9.0)
    mask = torch.arange(96).expand(3, -1) < 64
    plain, padded = network(**inputs), network(images=inputs["images"], input_ids=ids, audio=audio, audio_mask=mask)
    for name in ("text_embeds", "audio_embeds", "fused_features", "logits"):
        assert torch.allclose(plain[name], padded[name], atol=1e-5), name


def test_frames_that_are_no_multiple_of_16_are_filled_up_and_masked(network, inputs):
    short = inputs["audio"][:, :50]
    filled = torch.cat([short, short.amin((1, 2), keepdim=True).expand(-1, 14, 80)], 1)
    by_hand = network.encode_audio(filled, torch.arange(64).expand(3, -1) < 50)
    assert torch.allclose(network.encode_audio(short), by_hand, atol=1e-6)


def test_empty_text_and_silence_are_finite(network):
    found = network(
        input_ids=torch.tensor([[1, 2, 0, 0]]),
        attention_mask=torch.tensor([[1, 0, 0, 0]]),
        audio=torch.zeros(1, 16, 80),
        audio_mask=torch.zeros(1, 16, dtype=torch.bool),
    )
    assert all(torch.isfinite(value).all() for value in found.values())


def test_another_resolution(network, inputs):
    assert network.encode_image(torch.randn(2, 3, 48, 64)).shape == (2, 64)
    assert torch.allclose(
        network.encode_image(inputs["images"]), network(images=inputs["images"])["image_embeds"], atol=1e-6
    )


@pytest.mark.parametrize(
    "arguments,message",
    [
        ({}, "at least one"),
        (
            {"images": torch.zeros(2, 3, 32, 32), "audio": torch.zeros(3, 16, 80)},
            "audio has batch size 3, images has 2",
        ),
        ({"images": torch.zeros(1, 3, 30, 32)}, r"multiples of 8, found \(1, 3, 30, 32\)"),
        ({"audio": torch.zeros(1, 16, 64)}, "audio: expected"),
        ({"input_ids": torch.ones(1, 78, dtype=torch.long)}, "78 tokens"),
        (
            {"images": torch.zeros(1, 3, 32, 32), "attention_mask": torch.ones(1, 4)},
            "attention_mask is given without input_ids",
        ),
        (
            {"input_ids": torch.ones(1, 8, dtype=torch.long), "attention_mask": torch.ones(1, 4)},
            "attention_mask has shape",
        ),
        ({"images": torch.zeros(1, 3, 32, 32), "modality_mask": {"sound": torch.ones(1)}}, "'sound'"),
    ],
)
def test_wrong_arguments_are_named(network, arguments, message):
    with pytest.raises(ValueError, match=message):
        network(**arguments)
    with pytest.raises(ValueError, match="huge"):
        create_model("huge")


@pytest.mark.parametrize("masked", [False, True])
def test_chunked_attention_is_exact_with_its_gradients(masked):
    torch.manual_seed(2)
    mask = torch.ones(2, 50, dtype=torch.bool)
    mask[1, 20:] = False
    outputs = []
    for kind in ("sdpa", "chunked"):
        torch.manual_seed(3)
        attention = Attention(128, 2, kind=kind, chunk=16)
        x = torch.randn(2, 50, 128, generator=torch.Generator().manual_seed(4)).requires_grad_()
        result = attention(x, mask if masked else None)
        result.square().sum().backward()
        outputs.append([result.detach(), x.grad, attention.qkv.weight.grad, attention.output.bias.grad])
    for left, right in zip(*outputs, strict=True):
        assert torch.allclose(left, right, atol=1e-5, rtol=1e-5)


def test_recomputation_gives_the_same_gradients(inputs):
    gradients = []
    for enabled in (False, True):
        torch.manual_seed(5)
        network = create_model("mini", 7, embed_dim=64, image_size=32, image_patch=8, dropout=0.1).train()
        network.set_grad_checkpointing(enabled)
        torch.manual_seed(6)
        network(**inputs)["logits"].square().sum().backward()
        gradients.append({name: p.grad for name, p in network.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, value in gradients[0].items():
        assert torch.allclose(value, gradients[1][name], rtol=1e-6, atol=1e-7), name


def kept_bytes(enabled: bool) -> int:
    """Bytes that `large` keeps for the backward pass of a whole forward, parameters left out: saved tensors and block
    inputs.
    """
    with torch.device("meta"):
        network = create_model("large").train()
        batch = {
            "images": torch.empty(2, 3, 224, 224),
            "input_ids": torch.ones(2, 32, dtype=torch.long),
            "audio": torch.empty(2, 1024, 80),
        }
    network.set_grad_checkpointing(enabled)
    own = {id(p) for p in network.parameters()}
    seen: dict[int, torch.Tensor] = {}

    def note(value: torch.Tensor) -> torch.Tensor:
        if id(value) not in own and not (value._base is not None and id(value._base) in own):
            seen[value.untyped_storage()._cdata] = value
        return value

    def keep_input(_: torch.nn.Module, arguments: tuple) -> None:
        note(arguments[0])

    if enabled:  # these are kept by the recomputation itself
        for module in network.modules():
            if isinstance(module, Block):
                module.register_forward_pre_hook(keep_input)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda value: value):
        network(**batch)
    return sum(value.untyped_storage().nbytes() for value in seen.values())


def test_recomputation_keeps_less_than_a_tenth():
    share = kept_bytes(True) / kept_bytes(False)
    assert 0.02 < share < 0.10


@pytest.mark.parametrize("first_only", [False, True])
def test_a_block_adds_its_products_onto_the_residual(first_only):
    block = Block(64, 1, dropout=0.5)
    x, mask = torch.randn(2, 5, 64), torch.ones(2, 5, dtype=torch.bool)
    alone = block.attention(block.norm1(x), mask, first_only) + (x[:, :1] if first_only else x)
    alone = alone + block.contract(torch.nn.functional.gelu(block.expand(block.norm2(alone))))
    fused = block.eval()(x, mask, first_only)
    assert torch.allclose(fused, alone, atol=1e-6)
    gradients = [torch.autograd.grad(value.square().sum(), list(block.parameters())) for value in (fused, alone)]
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(*gradients, strict=True))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.allclose(block(x, mask, first_only).float(), alone, atol=0.05)


def test_embeddings_alone_are_those_of_the_whole_pass(network, inputs):
    whole, alone = network(**inputs), network(**inputs, fuse=False)
    for name in ("image_embeds", "text_embeds", "audio_embeds"):
        assert torch.allclose(whole[name], alone[name], atol=1e-6), name
    assert torch.equal(network.encode_text(inputs["input_ids"]), alone["text_embeds"])


@pytest.mark.parametrize("train_words", [False, True])
def test_stage_2_trains_the_word_table_on_request_alone(train_words):
    config = Config(training={"train_words": train_words})
    with torch.device("meta"):
        module = make_stage_module(config, 2, create_model("mini"))
    choose_trainable(module, config, 2, ["image"], classify=False, framed=False)
    trained = {name for name, parameter in module.network.named_parameters() if parameter.requires_grad}
    assert ("words.weight" in trained) == train_words and "word_projection.weight" in trained
    assert not [name for name in trained if name.startswith(("fus", "to_fusion", "audio", "classifier"))]
    groups = parameter_groups(module, 2, weight_decay=0.1, tower_scale=0.3, word_scale=6.0)
    rates = {name: group["lr_scale"] for group in groups for name in group["names"]}
    assert rates.pop("network.words.weight", 6.0) == 6.0 and set(rates.values()) == {1.0}


def test_initial_values():
    network = create_model("mini", 80)
    assert network.words.weight[0].abs().max() == 0
    assert network.classifier[1].bias[0].item() == pytest.approx(math.log(0.036 / 0.964))
    qkv = network.image_tower.blocks[0].attention.qkv.weight
    assert qkv.abs().max() <= 0.04 and qkv.std().item() == pytest.approx(0.02 * 0.8796, rel=0.03)
    assert network.image_tower.blocks[0].contract.weight.abs().max() <= 0.04 / math.sqrt(8)
    sigmoid = create_model("mini", contrastive_loss="siglip")(input_ids=torch.ones(1, 8, dtype=torch.long))
    assert sigmoid["logit_scale"].item() == pytest.approx(10) and sigmoid["logit_bias"].item() == -10
    assert Config().training.num_epochs == 100


def test_temperatures_stay_in_range():
    network = create_model("mini")
    torch.nn.init.constant_(network.log_scale, 9.0)
    torch.nn.init.constant_(network.audio_log_scale, -1.0)
    network.clamp_scales()
    assert network.log_scale.item() == pytest.approx(math.log(100)) and network.audio_log_scale.item() == 0
    assert {
        "log_scale",
        "words.weight",
        "image_positions",
        "image_class",
        "image_tower.norm.weight",
    } <= network.no_weight_decay()
    assert "image_tower.blocks.0.expand.weight" not in network.no_weight_decay()


@pytest.mark.parametrize("masked", [False, True])
def test_the_first_token_alone_is_the_whole_towers_first(masked):
    torch.manual_seed(0)
    tower = Tower(128, 2)
    tower.initialise(0.1)
    for parameter in tower.parameters():
        torch.nn.init.normal_(parameter, std=0.2) if parameter.ndim == 1 else None
    mask_BN = torch.rand(3, 9) > 0.4 if masked else None
    if mask_BN is not None:
        mask_BN[:, 0] = True
    results = []
    for first_only in (False, True):
        x_BND = torch.randn(3, 9, 128, generator=torch.Generator().manual_seed(1)).requires_grad_()
        tower.zero_grad()
        found = tower(x_BND, mask_BN, first_only)[:, :1]
        (found * torch.arange(128)).sum().backward()
        results.append([found.detach(), x_BND.grad, *(parameter.grad for parameter in tower.parameters())])
    for whole, first in zip(*results, strict=True):
        assert (whole - first).abs().max() <= 2e-5 * whole.abs().max().clamp_min(1)


def test_the_linear_path_sees_the_same_at_any_size():
    small = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    large = small.repeat_interleave(4, 2).repeat_interleave(4, 3)  # the same picture, 256 pixels a side
    features = picture_statistics(small)
    assert features.shape == (2, IMAGE_FEATURES) and features.isfinite().all()
    assert torch.allclose(picture_statistics(large), features, atol=1e-4)
    assert not torch.allclose(picture_statistics(small.flip(3)), features, atol=0.1)  # places count


@pytest.mark.parametrize("frames", [16, 256, 1000])
def test_the_linear_path_hears_how_often_a_sound_is_struck(frames):
    """Two bands struck 4 times a second: of the rhythm of their group the part at 3.9 to 4.7 Hz is the strongest."""
    sound = torch.full((1, frames, 80), -1.0)
    sound[:, ::25, 20:22] = 1.0
    features = sound_statistics(sound, None)
    assert features.shape == (1, AUDIO_FEATURES) and features.isfinite().all()
    rhythm = features.split(AUDIO_PARTS, 1)[4].view(-1, RHYTHM_GROUPS)
    assert frames < 256 or (rhythm[5:].argmax(0)[2] == 4 and rhythm[:, 3].abs().max() == 0)
    mask = torch.arange(frames) < frames // 2
    hidden = sound.masked_fill(~mask[None, :, None], 0.7)  # what lies behind the mask does not count
    assert torch.equal(sound_statistics(hidden, mask[None]), sound_statistics(sound, mask[None]))


@pytest.mark.parametrize("frames", [256, 1000])
def test_the_linear_path_hears_whether_a_sound_glides_up_or_down(frames):
    """One band after the other, once in 0.8 seconds: of the ripples that glide up and down the one kind is stronger."""
    time, band = torch.arange(frames)[:, None], torch.arange(80)
    rising = torch.where(((time - band) % 80) < 20, 1.0, -1.0)[None]
    number = (len(GLIDE_EDGES) - 1, 2 * (len(RIPPLE_EDGES) - 1) - 1)
    turns = [sound_statistics(one, None).split(AUDIO_PARTS, 1)[5].view(number)[:, len(RIPPLE_EDGES) - 1 :]
             for one in (rising, rising.flip(2), rising[:, :1].expand_as(rising))]  # fmt: skip
    assert turns[0][2, 0] > 0.8 and turns[1][2, 0] < -0.8  # 1.25 Hz, one cycle over all bands
    assert turns[2].abs().max() < 1e-3  # neither


def test_the_linear_path_sees_what_a_thing_looks_like_on_any_ground():
    """A red disc: the parts of what differs from the border do not change with the ground, the others do."""
    place = torch.linspace(-1, 1, 64)
    disc = (place[:, None] ** 2 + place**2 < 0.4)[None]
    grounds, red = torch.tensor([[1.0, 1, 1], [0, 0, 1], [0, 0, 0]]), torch.tensor([0.9, 0.1, 0.1])
    pixels = torch.where(disc[:, None], red[:, None, None], grounds[:, :, None, None])
    features = picture_statistics(normalise((255 * pixels).round().byte())).split(IMAGE_PARTS, 1)
    assert all(torch.allclose(part[:1].expand(3, -1), part, atol=2e-3) for part in features[2:])
    assert all((part[0] - part[1]).abs().max() > 0.3 for part in features[:2])
    hues_H = features[3][0, :HUES]
    assert hues_H.argmax() == torch.atan2(torch.tensor(1 / 2**0.5), torch.tensor(1 / 6**0.5)).div(math.pi / 6).round()
    even = picture_statistics(normalise(torch.full((1, 3, 64, 64), 128, dtype=torch.uint8)))
    assert even.isfinite().all() and not even.split(IMAGE_PARTS, 1)[2].any()  # nothing differs
    assert (model.PIXEL_MEAN, model.PIXEL_STD) == (MEAN, STD)


class Captioned(list):
    """Pictures with captions, as fit_linear_path reads them."""

    def __init__(self, pictures: torch.Tensor, captions: list[tuple[str, ...]]):
        super().__init__({"images": picture} for picture in pictures)
        self.records = [SimpleNamespace(captions=own) for own in captions]
        self.tokenizer = TextTokenizer()

    def __getitem__(self, index):
        if index == 3:
            raise BadSample("3.png: broken")
        return super().__getitem__(index)


@pytest.mark.parametrize("items", [48, 2000])  # fewer than features, and more; 49 / 49 is less than 1 as torch divides
def test_the_linear_path_finds_pictures_by_words_that_training_paired(items, monkeypatch):
    """Pictures of one colour and texts that name it: other pictures of these colours are found, ridge as defined."""
    generator = torch.Generator().manual_seed(0)
    names = ("red", "green", "blue", "yellow")
    colours = torch.tensor([[1.5, -1, -1], [-1, 1.5, -1], [-1, -1, 1.5], [1.5, 1.5, -1]])
    which = torch.arange(items + 8) % 4
    pictures = colours[which][:, :, None, None] + 0.1 * torch.randn(items + 8, 3, 8, 8, generator=generator)
    captions = [(f"a {names[n]} square", f"{names[n]}, and nothing else") for n in which.tolist()]
    if items > 48:  # few features in place of 1,841, so that items outnumber them
        monkeypatch.setattr(linear_path, "picture_statistics", lambda x: picture_statistics(x)[:, :192])
        monkeypatch.setattr(linear_path, "PARTS", {"image": (192,)})
    network = create_model("mini", 7, embed_dim=16, image_size=32, image_patch=8, linear_path=True)
    assert torch.equal(network.image_path(pictures), torch.zeros(items + 8, 16))
    if items > 48:
        network.linear["image"] = LinearPath(192, 16)
        monkeypatch.setattr(model, "picture_statistics", linear_path.picture_statistics)
    data = Captioned(pictures[:items], captions[:items])
    network.linear.load_state_dict(fit_linear_path(network, {"image": data}))
    ids, mask = data.tokenizer.batch([f"a {name} picture" for name in names])
    found = network.text_path(ids, mask) @ network.image_path(pictures[items:]).T
    assert torch.equal(found.argmax(0), which[items:])
    again = fit_linear_path(network, {"image": data})
    assert all(torch.equal(again[name], value) for name, value in network.linear.state_dict().items())
    assert fit_linear_path(network, {"image": Captioned(pictures[:0], [])})["text.weight"].count_nonzero() == 0


def test_the_linear_path_is_the_ridge_regression_that_its_docstring_says(monkeypatch):
    """Next to (X^T X + r I)^-1 X^T Y of plain loops, with the singular values halved on the two sides."""
    generator = torch.Generator().manual_seed(0)
    captions = [("a red square", "red, a square"), ("a blue square",), ("a red disc, a disc",), ("one green star",)] * 6
    pictures = torch.randn(len(captions), 3, 8, 8, generator=generator)
    data, network = Captioned(pictures, captions), create_model("mini", 7, embed_dim=64, linear_path=True)
    monkeypatch.setattr(linear_path, "SINGULAR", 0.5)
    network.linear.load_state_dict(fit_linear_path(network, {"image": data}))
    seen = [n for n in range(len(captions)) if n != 3]  # the broken one
    words = [[[w for w in data.tokenizer.encode(text) if w > 3] for text in captions[n]] for n in range(len(captions))]
    known = sorted({w for own in words for text in own for w in text})
    rare = [math.log((len(captions) + 1) / (sum(any(w in t for t in own) for own in words) + 1)) ** 0.35 for w in known]
    weight_V, y_nV, mean_V = torch.tensor(rare).double(), torch.zeros(len(seen), len(known)).double(), 0.0
    for row, n in zip(y_nV, seen, strict=True):
        for text in words[n]:
            counts = torch.tensor([float(text.count(w)) for w in known]).double()
            row += torch.nn.functional.normalize(counts * weight_V, dim=0) / len(words[n])
            mean_V = mean_V + counts * weight_V / len(text) / len(words[n]) / len(seen)
    x_nF = picture_statistics(pictures[seen]).double()
    x_nF -= x_nF.mean(0)
    parts = x_nF.split(IMAGE_PARTS, 1)
    spreads = [part.square().mean(0).sqrt() + 0.1 * part.square().mean().sqrt() for part in parts]
    x_nF = torch.cat([p / s / (4 * p.shape[1]) ** 0.5 for p, s in zip(parts, spreads, strict=True)], 1)
    inverse_nn = (x_nF @ x_nF.T + 2.0 * torch.eye(len(seen), dtype=torch.float64)).inverse()
    b_FV = x_nF.T @ inverse_nn @ y_nV
    expected = x_nF @ b_FV @ (torch.diag(weight_V) - mean_V[:, None]) / b_FV.norm()
    found = network.linear["image"].project(picture_statistics(pictures[seen])) @ network.linear["text"].weight[known].T
    assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()
