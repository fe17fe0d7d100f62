"""FLOPs of a step and the share of the device's peak (MFU): the released formula, and an honest count beside it."""

from collections.abc import Sequence

from bagel.config import LanguageConfig, ModelConfig

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
