"""CPU seconds of one training step at a fixed size: 11.3 M parameters, a pack of 1072 tokens, one thread, fp32.

    OMP_NUM_THREADS=1 python bagel/benchmark.py [--attention dense] [--repeats 9]

The pack holds text to image at 256 x 256 (290 tokens) twice, a question about a picture of 112 x 112 (150) twice, and
an edit at 128 x 128 (192). A step is forward, backward, clipping to norm 1 and AdamW. The figure is process time: other
work on the machine does not count, except that it slows caches and clocks.
"""

import sys
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import statistics
import time
from typing import Any, Literal

from shared.config import Section, load_config, setting
from shared.errors import command


class Options(Section):
    """Command line."""

    attention: Literal["sliced", "dense"] = setting("sliced", "how packs attend")
    fused: bool = setting(True, "fused AdamW, as in training")
    repeats: int = setting(9, "timed steps, after two that are not counted", ge=1)


def build(attention: str) -> Any:
    """The model of the benchmark."""
    from bagel.config import LanguageConfig, ModelConfig, VisionConfig
    from bagel.model import Bagel

    language = LanguageConfig(
        vocab_size=8192,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=2,
    )
    vision = VisionConfig(
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=3,
        num_attention_heads=4,
        patch_size=14,
        image_size=224,
    )
    return Bagel(ModelConfig(language=language, vision=vision, max_latent_size=16, attention=attention)).initialize()


def make_pack() -> dict[str, Any]:
    """The pack of 1072 tokens, with latents drawn in place of encoded ones."""
    import torch

    from bagel.generation import SpecialTokens
    from bagel.packing import Draws, Dropout, PackBuilder, PackFormat, PlanItem

    layout = PackFormat(SpecialTokens(8188, 8189, 8190, 8191), 16, 16, 14, 16, False, 2, 16)
    generator = torch.Generator().manual_seed(0)

    def text(length: int, loss: int = 0) -> PlanItem:
        return PlanItem("text", ids=torch.randint(8000, (length - 2,), generator=generator).tolist(), loss=loss)

    def seen(side: int) -> PlanItem:
        return PlanItem("vit_image", size=(side, side), image=torch.rand(3, side, side, generator=generator) * 2 - 1)

    draw = [text(32), PlanItem("vae_image", size=(256, 256), loss=1)]
    look = [seen(112), text(20), text(64, loss=1)]
    edit = [PlanItem("vae_image", size=(128, 128)), seen(84), text(22), PlanItem("vae_image", size=(128, 128), loss=1)]
    builder = PackBuilder(layout)
    for items in (draw, look, edit, draw, look):
        builder.add(items, Draws.keyed(generator, items), Dropout())
    pack = builder.pack()
    pack["packed_latents"] = torch.randn(pack["packed_noise"].shape, generator=generator)
    return pack


@command
def main(argv: list[str] | None = None) -> None:
    """Time the steps and print the median."""
    options = load_config(Options, argv=argv, description=__doc__)
    import torch

    from shared.dist import keep_freed_memory

    keep_freed_memory()  # as training does
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model, pack = build(options.attention), make_pack()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=options.fused)
    seconds = []
    for _ in range(options.repeats + 2):
        began = time.process_time()
        losses = model(pack)
        (losses["ce"].mean() + losses["mse"].mean()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.process_time() - began)
    count = sum(parameter.numel() for parameter in model.parameters())
    print(
        f"{count:,} parameters, {pack['sequence_length']} tokens {pack['sample_lens']}, torch {torch.__version__}, "
        f"fp32, 1 thread, {options.attention} attention: median {statistics.median(seconds[2:]):.3f} CPU s a step "
        f"(least {min(seconds[2:]):.3f})"
    )


if __name__ == "__main__":
    main()
