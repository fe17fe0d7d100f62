"""The dry run: the model at full size on fake tensors, a representative pack, and what a step will cost."""

from collections import Counter
from collections.abc import Callable, Sequence
from itertools import cycle

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from bagel.config import Config, LanguageConfig, ModelConfig
from bagel.data.tokenizer import SpecialTokens
from bagel.dataset import transforms_of
from bagel.model import Bagel
from bagel.modules.lora import add_adapters
from bagel.modules.quantization import QuantizedLinear, quantize_projections
from bagel.modules.transformer import MoTDecoderLayer
from bagel.modules.vision import EncoderLayer, FluxAutoencoder
from bagel.packing import Draws, Dropout, Pack, PackBuilder, PackFormat, PlanItem
from bagel.weights.pretrained import read_config
from shared.data import to_device
from shared.plan.measure import FrozenPart
from shared.plan.table import Workload, plan_run

SHRINK = [share / 16 for share in range(16, 0, -1)]  # of the largest side, until one picture of each kind fits


def largest_samples(config: Config, model: ModelConfig, share: float = 1.0) -> dict[str, list[PlanItem]]:
    """A drawing, a question and an edit of square pictures, at a share of the largest side that the settings allow."""
    vae, vit, edit = transforms_of(config.data, model)
    side = round(vae.max_size * share)
    drawn, changed = vae.sides(side, side)[::-1], edit.sides(side, side)[::-1]
    seen = vit.sides(*2 * (round(vit.max_size * share),))[::-1]
    words = PlanItem("text", ids=[4] * 62)
    target = PlanItem("vae_image", size=drawn, loss=1)
    return {
        "drawing": [words, target],
        "question": [PlanItem("vit_image", size=seen), words, PlanItem("text", ids=[4] * 254, loss=1)],
        "edit": [PlanItem("vae_image", size=drawn), PlanItem("vit_image", size=changed), words, target],
    }


def representative_pack(config: Config, model: ModelConfig) -> tuple[Pack, list[tuple[int, int]], str]:
    """A pack with one sample of each kind, pictures as large as lets them fit, and more of them until it is full (with
    packing=samples: batch_size samples); the sizes of the pictures to encode; and in words what it holds, and what does
    not fit the settings.
    """
    layout = PackFormat(
        SpecialTokens(0, 1, 2, 3),
        model.latent_stride,
        model.max_latent_size,
        model.vision.patch_size,
        model.vision.patches_per_side,
        model.interpolate_pos,
        model.latent_patch_size,
        model.autoencoder.z_channels,
    )
    data, batch_size = config.data, config.training.batch_size
    by_samples = data.packing == "samples"
    budget = batch_size if by_samples else data.tokens_per_batch * batch_size
    lengths = {kind: layout.length(items) for kind, items in largest_samples(config, model).items()}
    fits = [kind for kind, length in lengths.items() if length <= data.max_sequence_length]
    share = 1.0
    if not by_samples:
        least = {
            name: sum(layout.length(largest_samples(config, model, name)[kind]) for kind in fits) for name in SHRINK
        }
        share = next((name for name in SHRINK if least[name] <= budget), SHRINK[-1])
    kinds = {kind: items for kind, items in largest_samples(config, model, share).items() if kind in fits}
    builder, held, sizes = PackBuilder(layout), Counter[str](), []
    turn = cycle(kinds or {"text": []})
    while len(builder.lists["sample_lens"]) < budget if by_samples else builder.length < budget:
        kind = next(turn)
        room = budget - builder.length
        if kind == "text" or (not by_samples and layout.length(kinds[kind]) > room):
            kind = next((name for name in kinds if layout.length(kinds[name]) <= room), "text")
        items = [PlanItem("text", ids=[4] * max(0, room - 2), loss=1)] if kind == "text" else kinds[kind]
        builder.add(items, Draws([1.0] * len(items), iter([0.0] * len(items))), Dropout())
        sizes += [item.size for item in items if item.type == "vae_image"]
        held[kind] += 1
    pack = builder.pack()
    latents = len(pack["packed_vae_token_indexes"])
    pack["packed_vit_tokens"] = torch.zeros(len(pack["packed_vit_token_indexes"]), 3 * model.vision.patch_size**2)
    pack["packed_latents"] = pack["packed_noise"] = torch.zeros(latents, model.latent_width)
    words = ", ".join(f"{count} {kind}{'s' if count > 1 else ''}" for kind, count in held.items())
    words += f"; {len(sizes)} pictures to encode"
    if share < 1:
        words += f", {max(map(max, sizes), default=0)} px a side so that one of each kind fits"
    for kind in lengths:
        if kind not in fits:
            words += f"; no {kind} of the largest size: {lengths[kind]:,} tokens, {data.max_sequence_length:,} allowed"
    return pack, sizes, words


def _build(config: Config, model: ModelConfig) -> nn.Module:
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16 if model.use_lora else default)  # a frozen base is kept in bf16
    try:
        net = Bagel(model)
    finally:
        torch.set_default_dtype(default)
    if model.quantization != "none":
        quantize_projections(net, model.quantization)
    net.freeze()
    if model.use_lora:
        add_adapters(net, model)
    net.checkpoint_layers(config.training.gradient_checkpointing)
    return net


def _encoder_part(model: ModelConfig, sizes: list[tuple[int, int]]) -> FrozenPart | None:
    """The frozen autoencoder and the FLOPs of encoding these pictures."""
    if model.autoencoder.kind != "flux":
        return None
    flops: dict[tuple[int, int], float] = {}
    with FakeTensorMode():
        autoencoder = FluxAutoencoder(model.autoencoder)
        for size in set(sizes):
            with FlopCounterMode(display=False) as counter, torch.no_grad():
                autoencoder.encode(torch.zeros(1, 3, *size))
            flops[size] = float(counter.get_total_flops())
    count = sum(parameter.numel() for parameter in autoencoder.parameters())
    return FrozenPart("FLUX autoencoder", count, 4 * count, sum(flops[size] for size in sizes))


def _packed_part(model: ModelConfig) -> FrozenPart | None:
    """The quantized projections, which are buffers and so not among the measured parameters."""
    if model.quantization == "none":
        return None
    with torch.device("meta"):
        net = Bagel(model)
        quantize_projections(net, model.quantization)
    stored = [module for module in net.modules() if isinstance(module, QuantizedLinear)]
    values = sum(module.in_features * module.out_features for module in stored)
    return FrozenPart(f"{model.quantization} projections", values, sum(module.bytes_stored for module in stored))


def workload(config: Config) -> Workload:
    """One micro-step: a representative pack through the model."""
    model = read_config(config.model)

    def step(config: Config) -> Callable[[nn.Module], Tensor]:
        pack = representative_pack(config, model)[0]

        def loss(net: nn.Module) -> Tensor:
            losses = net(to_device(pack, next(net.parameters()).device))
            return losses["ce"].sum() + losses["mse"].sum()

        return loss

    def frozen_parts(config: Config) -> list[FrozenPart]:
        parts = (_encoder_part(model, representative_pack(config, model)[1]), _packed_part(model))
        return [part for part in parts if part]

    pack, _, contents = representative_pack(config, model)
    title = f"BAGEL, packs of {pack['sequence_length']} tokens ({contents})"
    blocks = (MoTDecoderLayer, EncoderLayer)
    in_parts = not (model.from_scratch or model.use_lora or model.quantization != "none")  # open_released
    return Workload(title, lambda config: _build(config, model), step, blocks, frozen_parts, in_parts)


def print_plan(config: Config) -> None:
    """Measure the step on fake tensors and print the plan."""
    config = config.model_copy(deep=True)
    print(plan_run(workload(config), config))


# FLOPs of a step and the share of the device's peak (MFU): the released formula, and an honest count beside it.


# Dense bf16 peak in TFLOP/s. A name is looked up longest first, so that H200 is not taken for H20.
PEAK_TFLOPS = {
    "H100": 989.0,
    "H800": 989.0,
    "H200": 989.0,
    "A100": 312.0,
    "A800": 312.0,
    "MI300X": 1336.0,
    "L40": 181.05,
    "L20": 119.5,
    "H20": 148.0,
    "910B": 354.0,
    "RTX 3070 Ti": 21.75,
}


def dense_flops_per_token(config: LanguageConfig) -> float:
    """6 FLOPs a weight that a token meets (forward and backward), embedding and head counted for every token."""
    width, head = config.hidden_size, config.head_dim
    attention = width * head * (2 * config.num_attention_heads + 2 * config.num_key_value_heads)
    layer = 3 * width * config.intermediate_size + attention
    return 6.0 * (layer * config.num_hidden_layers + 2 * config.vocab_size * width)


def attention_flops_per_pair(config: LanguageConfig) -> float:
    """12 d heads layers for each (query, key) pair of a sample, masked or not."""
    return 12.0 * config.head_dim * config.num_attention_heads * config.num_hidden_layers


def reference_flops(config: LanguageConfig, sample_lens: Sequence[int]) -> float:
    """The released formula: every token meets the head, attention is counted as full, ViT and VAE are left out."""
    return dense_flops_per_token(config) * sum(sample_lens) + attention_flops_per_pair(config) * sum(
        length**2 for length in sample_lens
    )


def counted_flops(config: ModelConfig, *, tokens: int, pairs: int, predictions: int, vit_lens: Sequence[int]) -> float:
    """Forward and backward: allowed pairs only, the head for predicted tokens only, the vision tower and connector
    included.
    """
    language, vision = config.language, config.vision
    head = 6.0 * language.vocab_size * language.hidden_size
    dense = dense_flops_per_token(language) - 2 * head
    block = 4 * vision.hidden_size**2 + 2 * vision.hidden_size * vision.intermediate_size
    patch = 3 * vision.patch_size**2 * vision.hidden_size
    bridge = vision.hidden_size * language.hidden_size + language.hidden_size**2
    vit = 6.0 * (block * vision.num_hidden_layers + patch + bridge) * sum(vit_lens)
    vit += 12.0 * vision.hidden_size * vision.num_hidden_layers * sum(length**2 for length in vit_lens)
    return dense * tokens + head * predictions + attention_flops_per_pair(language) * pairs + vit


def utilisation(flops: float, seconds: float, peak_tflops: float, world: int = 1) -> float:
    """Share of the peak that was used."""
    return flops / seconds / (peak_tflops * 1e12 * world)


def peak_tflops(device_name: str) -> float | None:
    """The table's peak for a device name such as "NVIDIA H200"; None when it is not in the table."""
    for name in sorted(PEAK_TFLOPS, key=len, reverse=True):
        if name in device_name:
            return PEAK_TFLOPS[name]
    return None
