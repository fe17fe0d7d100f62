"""The public recorded cases: base in both modes, keys, schedule, rotary embedding and the cross-attention."""

import json

import pytest
import torch
from diffusers import WanTransformer3DModel
from diffusers.models.transformers.transformer_wan import WanRotaryPosEmbed
from torch.nn import functional

from opens2v.model import WAN_1_3B, RefWanTransformer3DModel, is_reference_name
from opens2v.modules.adapter import DualPathCrossAttention, ReferenceTokens, clip_projection, sincos_2d, subject_mask
from opens2v.modules.causal import causal_frame_mask, rotary_table, rotate
from opens2v.modules.lora import add_lora, enable_trainable
from opens2v.sampling.scheduler import FlowMatchScheduler, velocity_of
from opens2v.weights.wan import to_diffusers_name, to_original_name
from tests.opens2v.cases import REFERENCE, tensors, tiny_model

CLOSE = dict(atol=2e-4, rtol=0)
NAMES = {
    "q": "to_q",
    "k": "to_k",
    "v": "to_v",
    "o": "to_out.0",
    "k_img": "add_k_proj",
    "v_img": "add_v_proj",
    "norm_k_img": "norm_added_k",
}


def attention_state(case: dict, prefix: str) -> dict:
    """The weights of a recorded attention under our names."""
    state = {}
    for name, value in case.items():
        if name.startswith(prefix):
            first, *rest = name.removeprefix(prefix).split(".")
            state[".".join([NAMES.get(first, first), *rest])] = value
    return state


def test_bidirectional_output_loss_and_gradients():
    case, model = tensors("tiny_noncausal"), tiny_model()
    output = model(case["x"], case["t"], case["context"]).sample
    torch.testing.assert_close(output, case["y"], **CLOSE)
    loss = (output - case["target"]).square().mean()
    loss.backward()
    torch.testing.assert_close(loss, case["loss"], atol=1e-5, rtol=0)
    for name in ("blocks.0.attn1.to_q.weight", "blocks.0.attn2.to_k.weight"):
        torch.testing.assert_close(model.get_parameter(name).grad, case[f"grad_diffusers.{name}"], atol=1e-6, rtol=1e-4)


def test_a_sample_alone_gives_what_it_gives_in_a_batch():
    case, model = tensors("tiny_noncausal"), tiny_model()
    outputs, grads = [], []
    for repeats in (1, 2):
        x, t, text = (case[name][:1].repeat_interleave(repeats, 0) for name in ("x", "t", "context"))
        model.zero_grad()
        output = model(x, t, text).sample
        output.square().mean().backward()
        outputs.append(output[0])
        grads.append({name: value.grad for name, value in model.named_parameters() if value.grad is not None})
    torch.testing.assert_close(*outputs, atol=1e-6, rtol=1e-5)
    assert any("scale_shift_table" in name for name in grads[0])
    for name, value in grads[0].items():
        torch.testing.assert_close(value, grads[1][name], atol=1e-6, rtol=1e-4, msg=name)


@pytest.mark.parametrize(
    "output, options, clean, augmented",
    [
        ("y_block_causal", {}, False, False),
        ("y_block_causal_local", {"local_window": 3}, False, False),
        ("y_teacher_forced", {"teacher_forcing": True}, True, False),
        ("y_teacher_forced_aug", {"teacher_forcing": True}, True, True),
    ],
)
@torch.no_grad()
def test_block_causal_and_teacher_forced_outputs(output, options, clean, augmented):
    case, model = tensors("tiny_causal"), tiny_model()
    more = {"clean_hidden_states": case["clean_x"]} if clean else {}
    more |= {"clean_timestep": case["aug_t"]} if augmented else {}
    found = model(case["x"], case["t"], case["context"], frame_mask=causal_frame_mask(6, 3, **options), **more).sample
    torch.testing.assert_close(found, case[output], **CLOSE)


def test_frame_masks():
    case = tensors("tiny_causal")
    for name, options in (
        ("block_causal", {}),
        ("block_causal_local", {"local_window": 3}),
        ("teacher_forced", {"teacher_forcing": True}),
    ):
        assert torch.equal(causal_frame_mask(6, 3, **options), case[f"frame_mask_{name}"].bool()), name


@torch.no_grad()
def test_a_timestep_per_token_equals_one_per_frame():
    case, model = tensors("tiny_causal"), tiny_model()
    per_token = case["t"].repeat_interleave(24, 1)
    mask = causal_frame_mask(6, 3)
    a = model(case["x"], case["t"], case["context"], frame_mask=mask).sample
    assert torch.equal(a, model(case["x"], per_token, case["context"], frame_mask=mask).sample)


def test_key_conversion_of_all_825_tensors_in_both_directions():
    recorded = json.loads((REFERENCE / "keys.json").read_text())
    keys = {**recorded["keys"], **recorded["i2v_extra_keys"]}
    assert len(recorded["keys"]) == 825
    for original, entry in keys.items():
        assert to_diffusers_name(original) == entry["diffusers"]
        assert to_original_name(entry["diffusers"]) == original


def test_full_size_names_shapes_and_counts():
    recorded = json.loads((REFERENCE / "keys.json").read_text())["keys"]
    with torch.device("meta"):
        model = RefWanTransformer3DModel(**WAN_1_3B)
        library = WanTransformer3DModel(**WAN_1_3B)
    base = {name: tuple(value.shape) for name, value in model.named_parameters() if not is_reference_name(name)}
    assert base == {entry["diffusers"]: tuple(entry["shape"]) for entry in recorded.values()}
    assert base.keys() == dict(library.named_parameters()).keys()
    trainable = enable_trainable(model)
    assert (trainable.total, trainable.frozen) == (143_689_758, 1_418_996_800)
    with torch.device("meta"):
        rank_64 = dict(rank=64, alpha=64, target_modules=["to_q", "to_k", "to_v", "to_out"])
        assert add_lora(model, **rank_64, scope=["attn1", "attn2"]) == 47_185_920
    assert enable_trainable(model).total == 143_689_758 + 47_185_920


@pytest.mark.parametrize(
    "options, more", [({"fused_path": True}, 141_696_000), ({"clip_path": "separate"}, 141_696_000 - 30)]
)
def test_optional_paths_have_the_documented_size(options, more):
    with torch.device("meta"):
        model = RefWanTransformer3DModel(**WAN_1_3B, **options)
    assert enable_trainable(model, train_fused_path=True).total == 143_689_758 + more


@pytest.mark.parametrize("shift", [1.0, 5.0, 8.0])
def test_schedule(shift):
    recorded, scheduler = tensors("scheduler"), FlowMatchScheduler(shift)
    case = {
        name.removeprefix(f"shift{shift}."): value
        for name, value in recorded.items()
        if name.startswith(f"shift{shift}.")
    }
    for name in ("sigmas", "timesteps", "weights"):
        torch.testing.assert_close(getattr(scheduler, name), case[name], atol=1e-6, rtol=1e-6)
    for name in ("", "_offgrid"):
        t = case["t" + name]
        torch.testing.assert_close(
            scheduler.add_noise(case["x0"], case["noise"], t), case["noisy" + name], atol=1e-6, rtol=0
        )
    torch.testing.assert_close(scheduler.weight_of(case["t"]), case["weight_at_t"], atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(scheduler.weight_of(case["t_offgrid"]), case["weight_offgrid"], atol=1e-6, rtol=1e-6)
    assert torch.equal(scheduler.target(case["x0"], case["noise"]), case["target"])
    for steps in (4, 50):
        torch.testing.assert_close(scheduler.inference_timesteps(steps), case[f"infer{steps}.timesteps"])
        x, sigmas = case["noise"], [*scheduler.inference_sigmas(steps).tolist(), 0.0]
        for sigma, following in zip(sigmas[:-1], sigmas[1:], strict=True):
            x = scheduler.step(0.5 * x - 0.3 * case["x0"], x, sigma, following)
        torch.testing.assert_close(x, case[f"infer{steps}.euler_end"], atol=1e-5, rtol=0)


def test_gaussian_output_leads_to_the_posterior_mean_of_each_pixel():
    variance = torch.tensor([[12.0, 1.0, 0.02], [0.5, 0.1, 0.01]])  # of the first frame, of later ones
    draw = torch.Generator().manual_seed(0)
    by_frame = variance[[0, 1, 1]].T[None, :, :, None, None]
    wanted_mean, spread = torch.tensor([0.7, -0.2, 0.1])[:, None, None, None], -1.5
    wanted_variance = by_frame * torch.exp(10 * torch.tanh(torch.tensor(spread) / 10))
    for mean, inside, output in ((0.0, by_frame, (0.0, 0.0)), (wanted_mean, wanted_variance, (wanted_mean, spread))):
        clean = torch.randn(1, 3, 3, 100, 100, generator=draw) * inside.sqrt() + mean
        noise = torch.randn(clean.shape, generator=draw)
        given = torch.cat([output[0] / by_frame.sqrt() + 0 * clean, output[1] + 0 * clean], 1)
        for sigma in (0.1, 0.5, 0.95):
            noisy = (1 - sigma) * clean + sigma * noise
            rest = noise - clean - velocity_of(given, noisy, torch.tensor([sigma]), "gaussian", variance)
            centred = noisy - noisy.mean((3, 4), keepdim=True)
            correlation = (rest * centred).mean((0, 3, 4)) / (rest.std((0, 3, 4)) * centred.std((0, 3, 4)))
            assert correlation.abs().max() < 0.04, "nothing linear is left to predict"
            assert (rest.mean((0, 3, 4)) / rest.std((0, 3, 4))).abs().max() < 0.04, "nor a mean"
    later = velocity_of(given[:, :, 1:], noisy[:, :, 1:], torch.tensor([0.95]), "gaussian", variance, first_frame=1)
    assert torch.equal(later, velocity_of(given, noisy, torch.tensor([0.95]), "gaussian", variance)[:, :, 1:])


def test_gaussian_output_of_no_spread_gives_its_mean_whatever_the_noise():
    noisy = torch.randn(2, 3, 1, 4, 4)
    output = torch.cat([torch.full_like(noisy, 0.4), torch.full_like(noisy, -60.0)], 1)
    velocity = velocity_of(output, noisy, torch.tensor([0.9, 0.3]), "gaussian", torch.ones(2, 3))
    clean = noisy - torch.tensor([0.9, 0.3])[:, None, None, None, None] * velocity
    torch.testing.assert_close(clean, torch.full_like(noisy, 0.4), atol=2e-3, rtol=0)


def test_rotary_embedding():
    case = tensors("rope")
    table = WanRotaryPosEmbed(128, (1, 2, 2), 1024)
    assert torch.equal(table.freqs_cos[:32, 0::2], case["table128.cos"])
    assert torch.equal(table.freqs_sin[:32, 1::2], case["table128.sin"])
    rope = WanRotaryPosEmbed(16, (1, 2, 2), 1024)
    torch.testing.assert_close(rotate(case["x"], rotary_table(rope, 3, 4, 6)), case["y"], atol=1e-6, rtol=0)
    later = rotate(case["x"], rotary_table(rope, 3, 4, 6, first_frame=5))
    torch.testing.assert_close(later, case["y_start_frame5"], atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    "clip, vae, fused, output",
    [
        (0, 0, 0, "text_only"),
        (1, 0, 0, "text_clip"),
        (0, 1, 0, "text_vae"),
        (1, 1, 0, "default"),
        (1, 1, 1, "with_fused"),
    ],
)
def test_dual_path_attention(clip, vae, fused, output):
    case = tensors("dual_path_attention")
    state = attention_state(case, "w.")
    project = {name: state.pop(name) for name in list(state) if name.startswith(("clip_proj", "vae_proj"))}
    attention = DualPathCrossAttention(48, 4, fused_path=True)
    attention.load_state_dict(state)
    attention.fused_path = bool(fused)
    torch.testing.assert_close(sincos_2d(4, 5, 48), case["pos"])
    clip_tokens = functional.linear(case["clip"], project["clip_proj.weight"], project["clip_proj.bias"])
    latents = case["ref_latent"].flatten(3).transpose(2, 3)
    vae_tokens = functional.linear(latents, project["vae_proj.weight"], project["vae_proj.bias"]) + case["pos"]
    mask = case["ref_mask"].bool()
    references = ReferenceTokens(
        clip_tokens.flatten(1, 2) if clip else None,
        vae_tokens.flatten(1, 2) if vae else None,
        subject_mask(mask, clip_tokens.shape[2]),
        subject_mask(mask, vae_tokens.shape[2]),
        mask.any(1)[:, None, None].float(),
    )
    found = attention(case["x"], case["text"], references)
    torch.testing.assert_close(found, case[f"out_{output}"], atol=1e-5, rtol=0)


def test_separate_clip_path_equals_the_image_to_video_attention():
    case, attention = tensors("i2v_cross_attention"), DualPathCrossAttention(32, 4, clip_path="separate")
    attention.reset_reference_parameters()
    missing, unexpected = attention.load_state_dict(attention_state(case, "attn."), strict=False)
    assert not unexpected and all("vae" in name for name in missing)
    projection = clip_projection("mlp", 24, 32)
    projection.load_state_dict(
        {name.removeprefix("img_emb.proj."): value for name, value in case.items() if name.startswith("img_emb.proj.")}
    )
    tokens = projection(case["img"])
    torch.testing.assert_close(tokens, case["img_emb"], atol=1e-6, rtol=0)
    mask = torch.ones(tokens.shape[:2], dtype=torch.bool)
    found = attention(case["x"], case["text"], ReferenceTokens(tokens, None, mask, None, torch.ones(len(tokens), 1, 1)))
    torch.testing.assert_close(found, case["y"], atol=1e-5, rtol=0)
