"""Trained adapters leave for diffusers and ComfyUI and come back in; base weights come in from everywhere."""

import json
import shutil

import pytest
import torch
from diffusers import WanTransformer3DModel
from diffusers.loaders import WanLoraLoaderMixin
from safetensors.torch import load_file, save_file

from opens2v import export, train
from opens2v.model import is_reference_name
from opens2v.modules.lora import add_lora
from opens2v.weights.base import load_generator
from opens2v.weights.export import load_init
from opens2v.weights.open import load_trained_model
from opens2v.weights.wan import load_generator_checkpoint, read_generator_state, to_original_name
from shared.errors import UserError
from tests.launching import losses
from tests.opens2v.cases import QUICK, REFERENCE, tiny_model

# No positions of our own and the velocity as output: what diffusers' class computes.
PLAIN = ["--no-absolute-positions", "--prediction", "velocity", "--patch-size", "2"]
STEPS = ["--base-steps", "2", "--total-steps", "2", "--warmup-steps", "0", "--learning-rate", "0.1"]


@pytest.fixture(scope="module", params=[8.0, 2.0])
def run(request, tmp_path_factory):
    """A run with LoRA of rank 2, of a strength that is not 1."""
    folder = tmp_path_factory.mktemp("run") / "out"
    lora = ["--r", "2", "--lora-alpha", str(request.param), "--ema-decay", "0.5"]
    train.main([*QUICK, *PLAIN, *STEPS, *lora, "--output-dir", str(folder)])
    return folder


def inputs():
    generator = torch.Generator().manual_seed(1)
    x, text = torch.randn(1, 16, 2, 4, 8, generator=generator), torch.randn(1, 24, 16, generator=generator)
    return x, torch.tensor([500.0]), text


def theirs(run, folder) -> WanTransformer3DModel:
    """diffusers' model with the run's bare base."""
    model, *_ = load_trained_model(run)
    base = WanTransformer3DModel.from_config(export.diffusers_config(model))
    base.load_state_dict(load_file(run / "base/generator.safetensors"))
    return base.eval()


@torch.no_grad()
def differences(run, model) -> tuple[float, float]:
    """(largest difference of diffusers' output from ours, largest change that LoRA makes)."""
    own, bare = load_trained_model(run)[0], theirs(run, None)
    wanted, without = own(*inputs()).sample, bare(*inputs()).sample
    return (model(*inputs()).sample - wanted).abs().max().item(), (wanted - without).abs().max().item()


@pytest.mark.parametrize("names", ["diffusers", "comfyui"])
def test_lora_gives_the_same_output_in_diffusers(run, tmp_path, names):
    export.main(["--checkpoint", str(run), "--output", str(tmp_path), "--what", "lora", "--names", names])
    file = next(tmp_path.glob("*.safetensors"))
    if names == "comfyui":
        stored = load_file(file)
        assert stored["diffusion_model.blocks.0.self_attn.q.alpha"] in (8.0, 2.0)
        assert stored["diffusion_model.blocks.0.cross_attn.o.lora_A.weight"].shape == (2, 32)
    model = theirs(run, tmp_path)
    state = WanLoraLoaderMixin.lora_state_dict(str(tmp_path), weight_name=file.name)
    WanLoraLoaderMixin.load_lora_into_transformer(state, model)
    difference, change = differences(run, model)
    assert difference < 1e-5 < 1e-3 < change


def test_merged_weights_give_the_same_output_in_diffusers(run, tmp_path):
    export.main(["--checkpoint", str(run), "--output", str(tmp_path), "--what", "merged"])
    model = WanTransformer3DModel.from_pretrained(str(tmp_path / "transformer"))
    difference, change = differences(run, model)
    assert difference < 1e-5 < 1e-3 < change


@pytest.mark.parametrize("names", ["original", "comfyui"])
def test_merged_weights_under_the_original_names_are_a_base_again(run, tmp_path, names):
    export.main(["--checkpoint", str(run), "--output", str(tmp_path), "--what", "merged", "--names", names])
    state = read_generator_state(tmp_path / f"wan_{names}.safetensors")
    assert state.keys() == load_file(run / "base/generator.safetensors").keys()


def test_references_and_lora_start_a_second_stage(run, tmp_path):
    export.main(["--checkpoint", str(run), "--output", str(tmp_path), "--what", "references"])
    base = ["--generator-ckpt", str(run / "base/generator.safetensors")]
    more = [*QUICK, *PLAIN, *STEPS, *base, "--learning-rate", "0"]
    reference = load_file(tmp_path / export.REFERENCE_FILE)
    assert reference and all(is_reference_name(name) for name in reference)
    for place, source in enumerate((tmp_path / export.REFERENCE_FILE, run)):
        folder = tmp_path / f"second{place}"
        train.main([*more, "--r", "2", "--init-from", str(source), "--output-dir", str(folder)])
        found = load_trained_model(folder, use_ema=False)[0].state_dict()
        assert all(torch.equal(found[name], value) for name, value in reference.items())
        train.main([*more, "--r", "2", "--init-from", str(source), "--output-dir", str(folder), "--total-steps", "3"])
        assert losses(folder).keys() == {1, 2, 3}
    with pytest.raises(UserError, match="does not fit.*merge LoRA with export.py"):
        train.main.__wrapped__([*more, "--init-from", str(run), "--output-dir", str(tmp_path / "no")])
    with pytest.raises(UserError, match="init_from nowhere: not found"):
        train.main.__wrapped__([*more, "--init-from", "nowhere", "--output-dir", str(tmp_path / "no")])


def adapted(alpha: float):
    """A tiny model with LoRA of rank 2 on its attention."""
    model = tiny_model()
    add_lora(model, rank=2, alpha=alpha, target_modules=["to_q", "to_k", "to_v", "to_out"], scope=["attn1", "attn2"])
    return model.eval()


def spelled(lora: dict, layer_name, sides: tuple[str, str]) -> dict:
    """LoRA by layer and side under the names of another program."""
    names = {"lora_A": sides[0], "lora_B": sides[1]}
    return {f"{layer_name(name.rsplit('.', 1)[0])}.{names[name[-6:]]}.weight": v for name, v in lora.items()}


def original(layer: str) -> str:
    return to_original_name(f"{layer}.weight").removesuffix(".weight")


AB, DOWN_UP = ("lora_A", "lora_B"), ("lora_down", "lora_up")
LORA_FORMS = {  # how others call a layer, its two sides, and whether alpha lies beside
    "diffusers": (lambda layer: f"transformer.{layer}", AB, False),
    "comfyui": (lambda layer: f"diffusion_model.{original(layer)}", AB, True),
    "comfyui, down and up": (lambda layer: f"diffusion_model.{original(layer)}", DOWN_UP, True),
    "kohya": (lambda layer: f"lora_unet_{original(layer).replace('.', '_')}", DOWN_UP, True),
    "peft": (lambda layer: f"base_model.model.{layer}", AB, False),
    "original": (lambda layer: original(layer), AB, False),
}


@torch.no_grad()
@pytest.mark.parametrize("place", ["file", "folder", "pt", "bin in a folder"])
@pytest.mark.parametrize("form", LORA_FORMS)
def test_lora_of_other_programs_comes_in_with_its_strength(tmp_path, form, place):
    trained, model = adapted(8.0), adapted(2.0)
    for name, parameter in trained.named_parameters():
        if "lora_B" in name:
            parameter.normal_(0, 0.3)
    lora = export.lora_of({name: value for name, value in trained.state_dict().items() if "lora_" in name})
    layer_name, sides, has_alpha = LORA_FORMS[form]
    if not has_alpha:
        lora = {name: value * (8.0 / 2 if name.endswith("lora_B") else 1) for name, value in lora.items()}
    state = {name: value.contiguous() for name, value in spelled(lora, layer_name, sides).items()}
    if has_alpha:
        state |= {f"{layer_name(name.rsplit('.', 1)[0])}.alpha": torch.tensor(8.0) for name in lora}
    path = (
        tmp_path / {"file": "a.safetensors", "folder": "a.safetensors", "pt": "a.pt", "bin in a folder": "a.bin"}[place]
    )
    if place in ("file", "folder"):
        save_file(state, path)
    else:
        torch.save({"generator_lora": state, "step": 3} if place == "pt" else state, path)
    load_init(model, tmp_path if "folder" in place else path)
    given = torch.randn(1, 16, 2, 4, 8), torch.tensor([500.0]), torch.randn(1, 24, 32)
    wanted = trained(*given).sample
    assert (
        (model(*given).sample - wanted).abs().max() < 1e-5 < 1e-2 < (tiny_model()(*given).sample - wanted).abs().max()
    )


@pytest.mark.parametrize("prefix", ["", "model.", "module.", "diffusion_model.", "transformer."])
@pytest.mark.parametrize("rename", [str, to_original_name])
def test_reference_modules_come_in_under_every_prefix(tmp_path, prefix, rename):
    trained, model = tiny_model(), tiny_model()
    state = {name: torch.randn_like(value) for name, value in trained.state_dict().items() if is_reference_name(name)}
    torch.save({"generator": {prefix + rename(name): value for name, value in state.items()}}, tmp_path / "a.pt")
    load_init(model, tmp_path / "a.pt")
    assert all(torch.equal(model.state_dict()[name], value) for name, value in state.items())


def test_what_holds_no_adapters_is_refused_as_a_start(tmp_path):
    save_file({name: value.clone() for name, value in tiny_state().items()}, tmp_path / "base.safetensors")
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.pt").write_text("nothing")
    for path, message in (
        (tmp_path / "base.safetensors", "holds neither reference modules nor LoRA"),
        (tmp_path / "empty", "holds no checkpoint and no weights file"),
        (tmp_path / "text.pt", "cannot be read as weights"),
    ):
        with pytest.raises(UserError, match=f"init_from {path}: {message}"):
            load_init(adapted(2.0), path)


@pytest.mark.parametrize(
    "more", ["dora_scale", "lora_magnitude_vector.weight", "diff_b", "lora_B.bias", "lora_mid.weight"]
)
@pytest.mark.parametrize("form", ["diffusers", "kohya", "comfyui"])
def test_an_adapter_that_is_more_than_lora_is_refused(tmp_path, form, more):
    layer_name, sides, _ = LORA_FORMS[form]
    model = adapted(2.0)
    lora = {n.replace(".default.weight", ""): v.clone() for n, v in model.state_dict().items() if "lora_" in n}
    named = spelled(lora, layer_name, sides)
    save_file({**named, f"{layer_name('blocks.0.attn1.to_q')}.{more}": torch.ones(64)}, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match="is no part of plain LoRA"):
        load_init(model, tmp_path / "a.safetensors")


def test_a_folder_of_two_adapters_is_refused_and_one_in_two_spellings_taken(tmp_path):
    model = adapted(2.0)
    lora = {n.replace(".default.weight", ""): v + 0.5 for n, v in model.state_dict().items() if "lora_" in n}
    for number, form in enumerate(("diffusers", "peft")):
        save_file(spelled(lora, *LORA_FORMS[form][:2]), tmp_path / f"{number}.safetensors")
    load_init(model, tmp_path)
    save_file(spelled({n: v + 1 for n, v in lora.items()}, *LORA_FORMS["peft"][:2]), tmp_path / "1.safetensors")
    with pytest.raises(UserError, match="holds two different tensors for blocks."):
        load_init(model, tmp_path)


def test_an_own_full_model_pt_with_lora_is_a_base_with_lora_merged(tmp_path, recwarn):
    folder = tmp_path / "out"
    lora = ["--r", "2", "--lora-alpha", "8", "--ema-decay", "0"]
    train.main([*QUICK, *PLAIN, *STEPS, *lora, "--save-full-generator", "--output-dir", str(folder)])
    file = folder / "checkpoints/checkpoint_opens2v_000002/model.pt"
    config = train.parse([*QUICK, *PLAIN])
    model, _ = load_generator(config, file)
    assert torch.allclose(model(*inputs()).sample, load_trained_model(folder)[0](*inputs()).sample, atol=1e-5)
    assert not [one for one in recwarn if "distillation" in str(one.message)]


def test_the_guides_path_of_a_checkpoint_holds_model_pt(run):
    state = torch.load(run / "checkpoint_opens2v_000002/model.pt", weights_only=True)
    assert state["step"] == 2


def test_a_base_with_a_fused_path_keeps_it_frozen_and_uses_it(tmp_path):
    model = tiny_model(fused_path=True)
    with torch.no_grad():
        for block in model.blocks:
            block.attn2.v_fused.weight.normal_()
    save_file({name: value.contiguous() for name, value in model.state_dict().items()}, tmp_path / "base.safetensors")
    size = "--num-layers 2 --num-attention-heads 4 --attention-head-dim 16 --text-dim 32 --freq-dim 32 --ffn-dim 160"
    config = train.parse([*QUICK, *PLAIN, *size.split(), "--r", "0"])
    config.model.image_encoder = "pixels"
    state = {name: value for name, value in load_file(tmp_path / "base.safetensors").items() if "clip_proj" not in name}
    save_file(state, tmp_path / "base.safetensors")
    loaded, trainable = load_generator(config, tmp_path / "base.safetensors")
    assert torch.equal(loaded.blocks[0].attn2.v_fused.weight, model.blocks[0].attn2.v_fused.weight)
    assert not loaded.blocks[0].attn2.v_fused.weight.requires_grad
    assert not any("fused" in group for group in trainable.groups)
    x, t, text = torch.randn(1, 16, 1, 4, 4), torch.tensor([500.0]), torch.randn(1, 8, 32)
    pictures = {"ref_clip": torch.randn(1, 1, 17, 48), "ref_latents": torch.randn(1, 1, 16, 4, 4)}
    assert not torch.equal(loaded(x, t, text, **pictures).sample, loaded(x, t, text).sample)


@pytest.mark.parametrize("form", ["comfyui", "comfyui_model", "bin", "bin_shards", "longlive_folder", "wan_folder"])
def test_base_weights_from_everywhere(tmp_path, form):
    wanted = load_file(REFERENCE / "tiny_weights.safetensors")
    original = {to_original_name(name): value for name, value in tiny_state().items()}
    path = tmp_path / "base.safetensors"
    if form.startswith("comfyui"):
        prefix = "model.diffusion_model." if form == "comfyui_model" else "diffusion_model."
        save_file({prefix + name: value for name, value in original.items()}, path)
    elif form == "bin":
        path = tmp_path
        torch.save(tiny_state(), tmp_path / "diffusion_pytorch_model.bin")
    elif form == "bin_shards":
        path, names = tmp_path, list(tiny_state())
        parts = {"a.bin": names[::2], "b.bin": names[1::2]}
        for file, part in parts.items():
            torch.save({name: tiny_state()[name] for name in part}, tmp_path / file)
        index = {"weight_map": {name: file for file, part in parts.items() for name in part}}
        (tmp_path / "diffusion_pytorch_model.bin.index.json").write_text(json.dumps(index))
    elif form == "longlive_folder":
        path = tmp_path
        torch.save({"generator": {f"model.{name}": v for name, v in original.items()}}, tmp_path / "longlive_base.pt")
    else:
        path = tmp_path
        save_file(original, tmp_path / "diffusion_pytorch_model.safetensors")
        for name in ("Wan2.1_VAE.pth", "models_t5_umt5-xxl-enc-bf16.pth"):
            torch.save({}, tmp_path / name)
    model = tiny_model()
    loaded = load_generator_checkpoint(model, path)["loaded"]
    assert set(loaded) == set(tiny_state()) and wanted


def tiny_state() -> dict[str, torch.Tensor]:
    """The recorded tiny base under diffusers names."""
    return {name: value for name, value in tiny_model().state_dict().items() if not is_reference_name(name)}


@pytest.mark.parametrize("text", ["", "{", '{"weight_map": []}', "[]", '{"metadata": {}}', "\ud800"])
def test_a_damaged_weight_index_is_named(tmp_path, text):
    save_file(tiny_state(), tmp_path / "model-00001-of-00001.safetensors")
    (tmp_path / "model.safetensors.index.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(UserError, match="the weight index model.safetensors.index.json cannot be read"):
        read_generator_state(tmp_path)


def test_two_bases_in_a_folder_are_told_apart(tmp_path):
    """The file that diffusers writes is meant, whatever lies beside it; of two others neither."""
    halved = {name: value / 2 for name, value in tiny_state().items()}
    save_file(tiny_state(), tmp_path / "diffusion_pytorch_model.safetensors")
    for name in ("aa.safetensors", "zz.safetensors"):
        save_file(halved, tmp_path / name)
    assert all(torch.equal(value, tiny_state()[name]) for name, value in read_generator_state(tmp_path).items())
    (tmp_path / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(UserError, match="lies in zz.safetensors and in another of its files; name the one meant"):
        read_generator_state(tmp_path)


def test_several_files_in_a_folder_are_named(tmp_path):
    for name in ("a.pt", "b.pt"):
        torch.save({}, tmp_path / name)
    with pytest.raises(UserError, match=r"holds 2 weights files \(a.pt, b.pt\)"):
        read_generator_state(tmp_path)
    shutil.rmtree(tmp_path)
