"""What the reference modules promise: nothing at step 0, the base untouched, everything moving, absent subjects
silent.
"""

import warnings

import pytest
import torch
from torch import nn

from opens2v.config import ModelConfig
from opens2v.model import RefWanTransformer3DModel, is_reference_name, tanh_gelu
from opens2v.modules.causal import KeyValueCache, attention_runs, causal_frame_mask, frame_blocks
from opens2v.modules.conditions import Conditions, text_length
from opens2v.modules.lora import add_lora, enable_trainable, lora_pattern, merge_lora, scale_lora
from opens2v.sampling.video import SamplerSettings, VideoSampler
from opens2v.weights.wan import cast_base, load_generator_checkpoint, read_generator_state, to_original_name
from shared.errors import UserError
from tests.opens2v.cases import REFERENCE, TINY, tensors, tiny_model

SELF = {"ref_in_self_attention": True}


def references(batch: int = 2, subjects: int = 2) -> dict:
    draw = torch.Generator().manual_seed(1)
    return {
        "ref_clip": torch.randn(batch, subjects, 9, 20, generator=draw),
        "ref_latents": torch.randn(batch, subjects, 16, 4, 4, generator=draw),
        "ref_mask": torch.tensor([[True, False], [True, True]])[:batch, :subjects],
    }


def shaken(model: RefWanTransformer3DModel) -> RefWanTransformer3DModel:
    """Reference modules with random weights, so that no path is hidden."""
    draw = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if is_reference_name(name):
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=draw))
    return model


@pytest.mark.parametrize(
    "options",
    [{}, {"fused_path": True}, {"clip_path": "separate", "clip_proj_type": "mlp"}, {"clip_path": "off"}, SELF],
)
@torch.no_grad()
def test_output_at_step_0_equals_the_base_exactly(options):
    case, model = tensors("tiny_noncausal"), tiny_model(**options)
    base = model(case["x"], case["t"], case["context"]).sample
    assert torch.equal(model(case["x"], case["t"], case["context"], **references()).sample, base)


@pytest.mark.parametrize("options", [{}, {"fused_path": True}, {"clip_path": "separate"}, SELF])
def test_after_two_steps_every_trainable_tensor_moved_and_no_base_tensor(options):
    case, model = tensors("tiny_noncausal"), tiny_model(**options)
    add_lora(model, rank=2, alpha=2, target_modules=["to_q", "to_k", "to_v", "to_out"], scope=["attn1", "attn2"])
    enable_trainable(model, train_fused_path=True)
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, weight_decay=0)
    first_step = set()
    for step in range(2):
        loss = (model(case["x"], case["t"], case["context"], **references()).sample - case["target"]).square().mean()
        loss.backward()
        if step == 0:
            first_step = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
        optimizer.step()
        optimizer.zero_grad()
    for name, value in model.named_parameters():
        moved = not torch.equal(value, before[name])
        assert moved == (is_reference_name(name) or "lora_" in name), name
    zero_values = ("v_vae", "v_fused", "add_v_proj", "v_ref", "gate_clip", "lora_B")
    assert all(any(part in name for part in zero_values) for name in first_step)


@torch.no_grad()
def test_a_sample_without_subject_gets_exactly_the_base():
    case, model = tensors("tiny_noncausal"), shaken(tiny_model(fused_path=True))
    given = references()
    base = model(case["x"], case["t"], case["context"]).sample
    given["ref_mask"] = torch.tensor([[False, False], [True, True]])
    output = model(case["x"], case["t"], case["context"], **given).sample
    assert torch.equal(output[0], base[0]) and not torch.equal(output[1], base[1])
    given["ref_latents"][1, 1] += 5  # a masked subject does not matter
    given["ref_mask"][1, 1] = False
    one = model(case["x"], case["t"], case["context"], **given).sample
    given["ref_latents"][1, 1] -= 9
    torch.testing.assert_close(one, model(case["x"], case["t"], case["context"], **given).sample, atol=0, rtol=0)


def test_all_references_masked_gives_zero_gradients_and_no_nan():
    case, model = tensors("tiny_noncausal"), shaken(tiny_model())
    enable_trainable(model)
    given = references() | {"ref_mask": torch.zeros(2, 2, dtype=torch.bool)}
    model(case["x"], case["t"], case["context"], **given).sample.square().mean().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert all(value is not None and not value.any() for value in gradients.values())


def test_gradient_checkpointing_changes_nothing():
    case, found = tensors("tiny_noncausal"), []
    for checkpointing in (False, True):
        model = shaken(tiny_model())
        enable_trainable(model)
        if checkpointing:
            model.enable_gradient_checkpointing()
        model(case["x"], case["t"], case["context"], **references()).sample.square().mean().backward()
        found.append([p.grad for p in model.parameters() if p.requires_grad])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@torch.no_grad()
def test_remembered_reference_keys_change_nothing():
    case, model = tensors("tiny_noncausal"), shaken(tiny_model())
    tokens = model.project_references(**references(), remember=True)
    direct = model(case["x"], case["t"], case["context"], **references()).sample
    for _ in range(2):
        assert torch.equal(model(case["x"], case["t"], case["context"], references=tokens).sample, direct)
    assert len(tokens.memory) == TINY["num_layers"]


@pytest.mark.parametrize("options", [{}, SELF, {"absolute_positions": True}])
@pytest.mark.parametrize("per_block, is_first_alone", [(3, False), (2, False), (1, False), (5, True), (1, True)])
@pytest.mark.parametrize("window", [-1, 3, 1])
@torch.no_grad()
def test_cached_blocks_equal_the_causal_forward(window, per_block, is_first_alone, options):
    case, model = tensors("tiny_causal"), shaken(tiny_model(**options))
    mask = causal_frame_mask(6, per_block, local_window=window, independent_first_frame=is_first_alone)
    whole = model(case["x"], case["t"], case["context"], frame_mask=mask, **references()).sample
    cache, parts, first = KeyValueCache(window=window, store=True), [], 0
    for length in frame_blocks(6, per_block, is_first_alone):
        block = slice(first, first + length)
        first += length
        parts.append(
            model(case["x"][:, :, block], case["t"][:, block], case["context"], cache=cache, **references()).sample
        )
    torch.testing.assert_close(torch.cat(parts, 2), whole, atol=1e-5, rtol=0)


def test_runs_cover_a_mask_and_empty_rows_are_refused():
    runs = attention_runs(causal_frame_mask(6, 3, teacher_forcing=True), 4)
    dense = torch.zeros(48, 48, dtype=torch.bool)
    for queries, keys in runs:
        for part in keys:
            dense[queries, part] = True
    expected = causal_frame_mask(6, 3, teacher_forcing=True).repeat_interleave(4, 0).repeat_interleave(4, 1)
    assert torch.equal(dense, expected) and len(runs) == 4
    with pytest.raises(ValueError, match="attends to nothing"):
        attention_runs(torch.zeros(2, 2), 4)
    assert frame_blocks(4, 3, independent_first_frame=True) == [1, 3]
    with pytest.raises(ValueError, match="4 latent frames do not fill blocks of 3"):
        frame_blocks(4, 3)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("guidance", ["text", "both", "dual"])
@torch.no_grad()
def test_ref_scale_0_draws_the_base_video_and_the_reference_changes_it(guidance, causal):
    model, settings = shaken(tiny_model()).eval(), ModelConfig(causal=causal)
    text, negative = torch.randn(1, 20, 32), torch.zeros(20, 32)
    given = references(1, 2)

    def draw(clip, latents, scale):
        sampler = SamplerSettings(
            steps=3, sampler="euler", guidance=guidance, guidance_scale=2.0, ref_scale=scale, seed=3
        )
        conditions = Conditions(None, text, clip, latents, given["ref_mask"])
        return VideoSampler(model, model, settings, sampler).sample(conditions, negative, (16, 3, 4, 6))

    with_subject = draw(given["ref_clip"], given["ref_latents"], 1.0)
    assert not torch.equal(with_subject, draw(given["ref_clip"], -given["ref_latents"], 1.0))
    bare = draw(given["ref_clip"], given["ref_latents"], 0.0)
    assert torch.equal(bare, draw(-given["ref_clip"], -given["ref_latents"], 0.0))
    assert not torch.equal(bare, with_subject)


@pytest.mark.parametrize("options", [{}, SELF])
def test_padding_of_a_text_counts_as_all_its_rows(options):
    """Output and gradients are those of the padded text, with LoRA on the layers that read it and in bfloat16 too."""
    model = shaken(tiny_model(**options))
    add_lora(model, rank=2, alpha=4.0, target_modules=["to_k", "to_v"], scope=["attn2"])
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(is_reference_name(name) or "lora_" in name)
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)
    case, draw = tensors("tiny_noncausal"), torch.Generator().manual_seed(4)
    text = torch.randn(2, 400, 32, generator=draw)
    text[0, 20:], text[1, 31:] = 0, 0  # of the shorter one some rows stay
    assert text_length(text) == 32 and text_length(text[:, :25]) == 25 and text_length(0 * text) == 0
    found = []
    for length in (None, text_length(text)):
        model.zero_grad()
        output = model(case["x"], case["t"], text, **references(), text_length=length).sample
        output.square().mean().backward()
        found.append([output.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
    for whole, short in zip(*found, strict=True):
        assert (whole - short).abs().max() < 1e-6 * max(1, whole.abs().max())
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        whole, short = (
            model(case["x"], case["t"], text, **references(), text_length=length).sample for length in (None, 32)
        )
    assert (whole - short).abs().mean() < 2e-2 * whole.abs().mean()


@pytest.mark.parametrize("options", [{}, SELF])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("guidance", ["text", "both", "dual"])
@torch.no_grad()
def test_what_is_remembered_of_the_pictures_changes_no_video(guidance, causal, options):
    """Sharded runs work the pictures out in every call; what a pass remembers was made with its own text."""
    model, settings = shaken(tiny_model(**options)).eval(), ModelConfig(causal=causal)
    given, draw = references(1, 2), torch.Generator().manual_seed(5)
    conditions = Conditions(None, torch.randn(1, 20, 32, generator=draw), *given.values())
    sampler = SamplerSettings(steps=2, sampler="euler", guidance=guidance, guidance_scale=2.0, seed=3)
    videos = [
        VideoSampler(model, module, settings, sampler).sample(conditions, torch.zeros(20, 32), (16, 3, 4, 6))
        for module in (model, None)
    ]
    torch.testing.assert_close(*videos, atol=1e-5, rtol=0)


@torch.no_grad()
def test_unipc_and_euler_agree_with_many_steps():
    model = tiny_model().eval()
    conditions = Conditions(
        None, torch.randn(1, 20, 32), None, torch.zeros(1, 1, 16, 4, 4), torch.zeros(1, 1, dtype=torch.bool)
    )
    found = {}
    for name, steps in (("euler", 200), ("unipc", 40)):
        sampler = SamplerSettings(steps=steps, sampler=name, guidance="text", guidance_scale=1.0)
        found[name] = VideoSampler(model, model, ModelConfig(), sampler).sample(
            conditions, torch.zeros(20, 32), (16, 2, 4, 6)
        )
    error = (found["euler"] - found["unipc"]).square().mean() / found["euler"].square().mean()
    assert error < 1e-2


# --- weights and LoRA -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["original", "diffusers", "wrapped", "folder"])
def test_base_weights_load_in_every_form(form, tmp_path):
    model, expected = RefWanTransformer3DModel.from_base(TINY, ref_clip_dim=20), tiny_model()
    state = {name: value for name, value in expected.state_dict().items() if not is_reference_name(name)}
    path = tmp_path / "base.pt"
    if form == "original":
        torch.save({"generator": {to_original_name(name): value for name, value in state.items()}}, path)
    elif form == "wrapped":
        torch.save(
            {
                "generator_ema": {f"model._fsdp_wrapped_module.{to_original_name(n)}": v for n, v in state.items()},
                "critic": {},
            },
            path,
        )
    elif form == "diffusers":
        torch.save(state, path)
    else:
        from safetensors.torch import save_file

        path = tmp_path / "wan"
        (path / "transformer").mkdir(parents=True)
        save_file(state, path / "transformer" / "diffusion_pytorch_model.safetensors")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        report = load_generator_checkpoint(model, path)
    assert any("distillation" in str(item.message) for item in caught) == (form == "wrapped")
    assert len(report["loaded"]) == 69 and all(is_reference_name(name) for name in report["new"])
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items() if name in state)
    assert torch.equal(model.blocks[0].attn2.norm_k_vae.weight, state["blocks.0.attn2.norm_k.weight"])


def test_damaged_or_foreign_weights_are_refused_with_names(tmp_path):
    model, path = RefWanTransformer3DModel.from_base(TINY, ref_clip_dim=20), tmp_path / "base.pt"
    path.write_bytes(b"not a checkpoint")
    with pytest.raises(UserError, match="cannot be read as weights"):
        read_generator_state(path)
    state = read_generator_state(REFERENCE / "tiny_weights.safetensors")
    del state["proj_out.bias"]
    torch.save(state | {"stranger": torch.zeros(1)}, path)
    with pytest.raises(UserError, match=r"1 missing: proj_out.bias; 1 unexpected: stranger"):
        load_generator_checkpoint(model, path)
    with pytest.raises(UserError, match="no such file"):
        read_generator_state(tmp_path / "nowhere")


def test_lora_to_out_is_rewritten_and_unknown_layers_are_refused():
    assert lora_pattern(["to_q", "to_out"], ["attn1"]) == r"blocks\.\d+\.(attn1)\.(to_q|to_out\.0)"
    with pytest.raises(UserError, match="names of diffusers"):
        lora_pattern(["q", "k"], ["attn1"])
    model = tiny_model()
    add_lora(model, rank=2, alpha=2, target_modules=["to_out"], scope=["attn1"])
    names = [name for name, _ in model.named_parameters() if "lora_A" in name]
    assert names == [f"blocks.{i}.attn1.to_out.0.lora_A.default.weight" for i in range(2)]


@torch.no_grad()
def test_merged_lora_gives_the_same_output():
    case, model = tensors("tiny_noncausal"), tiny_model()
    base = model(case["x"], case["t"], case["context"]).sample
    add_lora(model, rank=2, alpha=2, target_modules=["to_q", "to_v"], scope=["attn1", "attn2"])
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.fill_(0.05)
    adapted = model(case["x"], case["t"], case["context"]).sample
    assert not torch.allclose(adapted, base, atol=1e-3)
    merge_lora(model)
    torch.testing.assert_close(model(case["x"], case["t"], case["context"]).sample, adapted, atol=1e-4, rtol=0)


@torch.no_grad()
def test_lora_scale_0_gives_the_base():
    case, model = tensors("tiny_noncausal"), tiny_model()
    base = model(case["x"], case["t"], case["context"]).sample
    add_lora(model, rank=2, alpha=2, target_modules=["to_q", "to_v"], scope=["attn1", "attn2"])
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.fill_(0.05)
    scale_lora(model, 0.0)
    assert torch.equal(model(case["x"], case["t"], case["context"]).sample, base)


@torch.no_grad()
def test_a_bf16_base_keeps_times_and_norms_in_float32():
    case, model = tensors("tiny_noncausal"), tiny_model()
    enable_trainable(model)
    cast_base(model, torch.bfloat16)
    kinds = {name: parameter.dtype for name, parameter in model.named_parameters()}
    assert kinds["blocks.0.attn1.to_q.weight"] == torch.bfloat16
    for name in (
        "condition_embedder.time_embedder.linear_1.weight",
        "blocks.0.scale_shift_table",
        "blocks.0.norm2.weight",
        "vae_proj.weight",
    ):
        assert kinds[name] == torch.float32, name
    with torch.autocast("cpu", torch.bfloat16):
        output = model(case["x"], case["t"], case["context"], **references()).sample
    assert (output.float() - case["y"]).square().mean() < 1e-3


# --- references in self-attention -------------------------------------------------------------------------------------


def self_model() -> RefWanTransformer3DModel:
    """The tiny transformer whose self-attention looks at the pictures, its new values away from zero."""
    model = tiny_model(ref_in_self_attention=True)
    torch.manual_seed(1)
    with torch.no_grad():
        for block in model.blocks:
            block.attn1.v_ref.weight.normal_(std=0.3)
    return model.eval()


def video(batch: int = 2) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    draw = torch.randn(batch, 16, 3, 4, 6, generator=generator), torch.randn(batch, 9, 32, generator=generator)
    return draw[0], torch.tensor([500.0] * batch), draw[1]


@torch.no_grad()
def test_pictures_in_self_attention_start_at_the_base_and_masked_ones_stay_there():
    plain, fresh, model = tiny_model().eval(), tiny_model(ref_in_self_attention=True).eval(), self_model()
    x, t, text = video()
    pictures = references()
    wanted = plain(x, t, text).sample
    assert torch.equal(fresh(x, t, text, **pictures).sample, wanted)
    pictures["ref_mask"] = torch.tensor([[True, False], [False, False]])
    found = model(x, t, text, **pictures).sample
    assert torch.equal(found[1], wanted[1]) and not torch.allclose(found[0], wanted[0], atol=1e-3)
    other = {**pictures, "ref_latents": pictures["ref_latents"].clone()}
    other["ref_latents"][0, 1] += 1  # a subject that is masked out
    assert torch.equal(model(x, t, text, **other).sample[0], found[0])


@torch.no_grad()
def test_pictures_in_self_attention_may_be_remembered():
    model, pictures = self_model(), references()
    x, t, text = video()
    wanted = model(x, t, text, **pictures).sample
    kept = model.project_references(**pictures, remember=True)
    for _ in range(2):
        assert torch.allclose(model(x, t, text, references=kept).sample, wanted, atol=1e-6)


def test_pictures_in_self_attention_train_alone_and_recomputation_changes_nothing():
    gradients = []
    for recompute in (False, True):
        model = self_model().train()
        if recompute:
            model.enable_gradient_checkpointing()
        groups = enable_trainable(model).groups
        assert {"attn1.k_ref", "attn1.v_ref", "attn1.norm_k_ref", "attn2.k_vae"} <= groups.keys()
        x, t, text = video()
        model(x, t, text, **references()).sample.square().mean().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys() and any("k_ref" in name for name in gradients[0])
    assert all(torch.allclose(gradients[0][name], gradients[1][name], atol=1e-7) for name in gradients[0])


def test_the_activation_by_hand_is_torchs():
    x = torch.cat([torch.linspace(-30, 30, 4001), torch.randn(95) * 3]).reshape(1, 8, 512)
    wide = x.double().requires_grad_()
    wanted = torch.nn.functional.gelu(wide, approximate="tanh")
    grad = torch.autograd.grad(wanted.sum(), wide)[0]
    for count in (1, 2, 520):  # a sample; a batch; more than the processor's cache holds, in torch's own way
        values = x.repeat(count, 1, 1).requires_grad_()
        found = tanh_gelu(values)
        assert ("Sigmoid" in type(found.grad_fn).__name__) == (count < 520)
        assert torch.allclose(found.double(), wanted, rtol=1e-6, atol=1e-6)
        assert torch.allclose(torch.autograd.grad(found.sum(), values)[0].double(), grad, rtol=1e-6, atol=2e-6)
