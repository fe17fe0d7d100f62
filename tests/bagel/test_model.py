"""The whole model against the recorded cases: losses, gradients, text, pictures, edits; and packs that lack a kind."""

import pytest
import torch
from torch.testing import assert_close

from bagel.data.tokenizer import SpecialTokens
from bagel.model import training_times
from bagel.modules.vision import FluxAutoencoder, to_uint8
from bagel.packing import patchify, unpatchify
from bagel.sampling.context import Context
from bagel.sampling.generation import (
    Block,
    Drawing,
    Guidance,
    clean_latents,
    continue_text,
    draw,
    extend,
    guide,
    latent_block,
    text_block,
    vit_block,
)
from tests.bagel.golden import FLOAT, LOOSE, TINY_TOKENS, Case, build, grad_norms_match, names, vae_config

TOKENS = SpecialTokens.from_names(TINY_TOKENS)


def pack_of(case: Case) -> dict:
    """The recorded pack in our form: latents without padding, splits rebuilt from the recorded masks."""
    pack = case.under("in.")
    patch = case.info["config"]["latent_patch_size"]
    latents = [
        patchify(latent[:, : rows * patch, : columns * patch], patch)
        for latent, (rows, columns) in zip(
            pack["padded_latent"], case.info["patchified_vae_latent_shapes"], strict=True
        )
    ]
    split_lens, attn_modes = [], []
    for number in range(len(case.info["sample_lens"])):
        lens, modes = splits_of_mask(pack[f"mask_{number}"].bool())
        split_lens, attn_modes = split_lens + lens, attn_modes + modes
    return {
        **pack,
        "packed_latents": torch.cat(latents),
        "packed_noise": pack["noise"],
        "sample_lens": case.info["sample_lens"],
        "split_lens": split_lens,
        "attn_modes": attn_modes,
        "vit_token_seqlens": pack["vit_token_seqlens"].tolist(),
    }


def splits_of_mask(mask: torch.Tensor) -> tuple[list[int], list[str]]:
    """Splits that give this mask: a block sees ahead; noise is not seen by the last token unless it is in it."""
    lens, modes, start, length = [], [], 0, len(mask)
    while start < length:
        stop = int(mask[start].nonzero().max()) + 1
        noise = stop < length and not bool(mask[stop:, start].any())
        lens.append(stop - start)
        modes.append("causal" if stop - start == 1 else "noise" if noise else "full")
        start = stop
    return lens, modes


@pytest.mark.parametrize("name", names("bagel_loss_"))
def test_training_losses_and_gradients(name):
    case = Case(name)
    model, pack = build(case), pack_of(case)
    und, gen, rows = model.embed(pack, *noisy(case, pack))
    assert_close(rows.join((und, gen)), case["out.embedded_sequence"], **FLOAT)
    losses = model(pack)
    assert_close(losses["ce"], case["out.ce"], **FLOAT)
    assert_close(losses["mse"], case["out.mse"], **LOOSE)
    weights = pack["ce_loss_weights"] if case.info["ce_loss_reweighting"] else torch.ones_like(losses["ce"])
    ce, mse = (losses["ce"] * weights).sum() / weights.sum(), losses["mse"].mean()
    total = case.info["ce_weight"] * ce + case.info["mse_weight"] * mse
    for found, key in ((ce, "ce"), (mse, "mse"), (total, "total")):
        assert found.item() == pytest.approx(case.info["out"][key], rel=1e-5)
    total.backward()
    grad_norms_match(model, case.info["out_param_grad_norms"])
    parameters = dict(model.named_parameters())
    for parameter, expected in case.under("out.grad.").items():
        assert_close(
            torch.zeros_like(expected) if parameters[parameter].grad is None else parameters[parameter].grad,
            expected,
            **LOOSE,
        )


def noisy(case: Case, pack: dict) -> tuple[torch.Tensor, torch.Tensor]:
    t = training_times(pack["packed_timesteps"], case.info["config"]["timestep_shift"])
    return (1 - t[:, None]) * pack["packed_latents"] + t[:, None] * pack["packed_noise"], t


def test_logits_in_chunks_give_the_same_and_are_not_kept():
    case = Case(names("bagel_loss_")[0])
    results = []
    for chunk in (None, 3):
        model, pack = build(case), pack_of(case)
        model.config.logits_chunk, kept = chunk, []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda x, kept=kept: (kept.append(tuple(x.shape)), x)[1], lambda x: x
        ):
            losses = model(pack)
        whole = (len(losses["ce"]), model.config.language.vocab_size)
        assert (whole in kept) == (chunk is None) and len(losses["ce"]) > 6
        (losses["ce"] * torch.linspace(0.5, 1.0, len(losses["ce"]))).mean().backward()
        results.append([losses["ce"].detach(), *[p.grad for p in model.parameters() if p.grad is not None]])
    for plain, chunked in zip(*results, strict=True):
        assert_close(chunked, plain, atol=1e-6, rtol=1e-5)


def test_gradient_checkpointing_changes_nothing():
    case = Case(names("bagel_loss_")[0])
    results = []
    for enabled in (False, True):
        model, pack = build(case), pack_of(case)
        model.checkpoint_layers(enabled)
        losses = model(pack)
        (losses["ce"].mean() + losses["mse"].mean()).backward()
        results.append([losses["ce"].detach(), *[p.grad for p in model.parameters() if p.grad is not None]])
    for plain, recomputed in zip(*results, strict=True):
        assert_close(recomputed, plain, atol=1e-6, rtol=1e-6)


def test_a_pack_without_pictures_or_text_keeps_every_gradient():
    case = Case(names("bagel_loss_")[0])
    model = build(case)
    none, width, vit = (
        torch.zeros(0, dtype=torch.long),
        model.config.latent_width,
        3 * model.config.vision.patch_size**2,
    )
    pack = {
        "sample_lens": [2],
        "split_lens": [2],
        "attn_modes": ["causal"],
        "packed_text_ids": torch.tensor([60, 61]),
        "packed_text_indexes": torch.tensor([0, 1]),
        "packed_position_ids": torch.tensor([0, 1]),
        "ce_loss_indexes": none,
        "packed_label_ids": none,
        "packed_vit_tokens": torch.zeros(0, vit),
        "packed_vit_position_ids": none,
        "packed_vit_token_indexes": none,
        "vit_token_seqlens": [],
        "packed_latents": torch.zeros(0, width),
        "packed_noise": torch.zeros(0, width),
        "packed_timesteps": torch.zeros(0),
        "packed_latent_position_ids": none,
        "packed_vae_token_indexes": none,
        "mse_loss_indexes": none,
    }
    losses = model(pack)
    (losses["ce"].sum() + losses["mse"].sum()).backward()
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    missing = [name for name, parameter in trained.items() if parameter.grad is None]
    assert missing == [] and all(parameter.grad.abs().max() == 0 for parameter in trained.values())


@pytest.mark.parametrize("name", names("text_gen_"))
def test_text_continuation(name):
    case = Case(name)
    model, context, info = build(case), Context(), case.info
    with torch.no_grad():
        for update in info["prefill"]:
            image = update["type"] == "vit_image"
            block = vit_block(model, case[update["tensor"]], TOKENS) if image else text_block(update["ids"], TOKENS)
            extend(model, [context], [block], store=True)
            assert (context.kv_len, context.rope) == (update["kv_len"], update["rope"])
    assert_close(context.keys[0], case["out.k_cache_prefill_l0"], **FLOAT)
    assert_close(context.values[-1], case["out.v_cache_prefill_last"], **FLOAT)
    logits: list[torch.Tensor] = []
    settings = dict(max_length=info["max_length"], end=info["end_token_id"])
    found = continue_text(model, [context], TOKENS, logits_out=logits, **settings)
    assert found == [info["out_token_ids"]]
    assert_close(torch.cat(logits), case["out.logits"], **FLOAT)
    assert context.kv_len == info["prefill"][-1]["kv_len"]
    other = Context()
    with torch.no_grad():
        extend(model, [other], [text_block([7, 8], TOKENS)], store=True)
    alone = continue_text(model, [other], TOKENS, **settings)[0]
    assert continue_text(model, [other, context, other], TOKENS, **settings) == [alone, info["out_token_ids"], alone]


@pytest.mark.parametrize("name", names("image_gen_"))
def test_pictures_from_text(name):
    case = Case(name)
    model, main = build(case), Context()
    with torch.no_grad():
        extend(model, [main], [text_block(case.info["prompt_ids"], TOKENS)], store=True)
    stride = model.config.latent_stride
    rows, columns = (side // stride for side in case.info["image_hw"])
    drawing = Drawing(main, Context(), main.copy(), case["in.init_noise"], rows, columns)
    check_variants(case, model, drawing)


def check_variants(case: Case, model, drawing: Drawing) -> None:
    """Every recorded setting, drawn alone and (for one of them) twice in one batch."""
    for number, variant in enumerate(case.info["variants"]):
        guidance = Guidance(**{**variant, "cfg_interval": tuple(variant["cfg_interval"])})
        velocities: list = []
        latent = draw(model, [drawing], guidance, TOKENS, velocities)[0]
        assert_close(torch.stack([step[0] for step in velocities]), case[f"out.variant_{number}.v_t"], **LOOSE)
        assert_close(latent, case[f"out.variant_{number}.latent"], **LOOSE)
    for again in draw(model, [drawing, drawing], guidance, TOKENS):
        assert_close(again, latent, **LOOSE)


@pytest.mark.parametrize("name", names("image_edit_"))
def test_editing(name):
    case = Case(name)
    model, contexts = build(case), {name: Context() for name in ("main", "without_images")}
    autoencoder = FluxAutoencoder(vae_config(case.info["config"]["vae"]))
    autoencoder.load_state_dict(case.weights("weights.vae."))
    stride, patch = model.config.latent_stride, model.config.latent_patch_size
    height, width = case.info["source_vae_hw"]
    with torch.no_grad():
        latents = clean_latents(autoencoder, case["in.source_vae"], patch, noise=case["in.posterior_noise"])
        source = latent_block(model, latents, height // stride, width // stride, 0.0, TOKENS)
        text = text_block(case.info["prompt_ids"], TOKENS)
        main = contexts["main"]
        extend(model, [main], [source], store=True)
        extend(model, [main], [vit_block(model, case["in.source_vit"], TOKENS)], store=True)
        assert_close(main.keys[0], case["out.k_cache_image_l0"], **FLOAT)
        without_text = main.copy()
        extend(model, [main, contexts["without_images"]], [text, text], store=True)
    assert (main.kv_len, main.rope) == (case.info["prefill"][-1]["kv_len"], case.info["prefill"][-1]["rope"])
    rows, columns = (side // stride for side in case.info["image_hw"])
    check_variants(
        case, model, Drawing(main, without_text, contexts["without_images"], case["in.init_noise"], rows, columns)
    )
    with torch.no_grad():
        image = autoencoder.decode(unpatchify(case["out.variant_0.latent"], rows, columns, patch)[None])
    assert_close(image, case["out.variant_0.decoded"], **LOOSE)
    assert (to_uint8(image[0]).int() - case["out.variant_0.uint8"].int()).abs().max() <= 1


def test_renormalisation_is_per_picture_and_never_raises_a_norm():
    generator = torch.Generator().manual_seed(0)
    main, text, image = torch.randn(3, 5, 4, generator=generator)
    for kind in ("global", "channel", "text_channel"):
        guided = guide(main, text, image, Guidance(cfg_text_scale=6.0, cfg_img_scale=1.0, cfg_renorm_type=kind))
        assert guided.norm() <= main.norm() * 1.0001
    both = guide(main, text, main, Guidance(cfg_text_scale=4.0, cfg_img_scale=1.5, cfg_renorm_min=1.0))
    single = guide(main, text, main, Guidance(cfg_text_scale=5.5, cfg_img_scale=1.0, cfg_renorm_min=1.0))
    assert_close(both, single, atol=1e-5, rtol=1e-5)
    assert Block([1, 2]).length == 2


def test_guidance_counts_from_above_the_interval_to_its_end():
    guidance = Guidance(cfg_text_scale=4.0, cfg_interval=(0.4, 0.9))
    assert [guidance.active(t) for t in (0.39, 0.4, 0.41, 0.9, 0.91)] == [False, False, True, True, False]
    assert not Guidance(cfg_text_scale=1.0).active(0.5)


@pytest.mark.parametrize("given, cpu, cuda", [("auto", "dense", "flex"), ("sliced", "dense", "dense")])
def test_the_attention_of_a_device(given, cpu, cuda):
    model = build(Case(names("bagel_loss_")[0]), attention=given)
    assert [model.backend(torch.device(kind)) for kind in ("cpu", "cuda")] == [cpu, cuda]
