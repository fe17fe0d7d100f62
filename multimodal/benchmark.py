"""Time one image-text training step against transformers' CLIP of the same dimensions, alternately, in CPU seconds.

    OMP_NUM_THREADS=1 python multimodal/benchmark.py --rounds 10

The setting: pictures of 224 px in patches of 16, both towers 192 wide, 12 and 4 blocks, 64 tokens, vocabulary 16,384,
embeddings 512, batch 8, fp32; forward, InfoNCE, backward, AdamW. `ours, as trained` pads captions to their own length
in place of 64.
"""

import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from shared.config import Section, load_config, setting  # noqa: E402
from shared.errors import command  # noqa: E402

WIDTH, IMAGE_DEPTH, TEXT_DEPTH, TOKENS, EMBED = 192, 12, 4, 64, 512
SHORT = 16  # tokens of a usual batch of captions after padding


class Options(Section):
    """Flags of this command."""

    rounds: int = setting(10, "timed steps of each", ge=1)
    batch_size: int = setting(8, "pairs", ge=1)


@command
def main(argv: list[str] | None = None) -> None:
    """Time and print."""
    options = load_config(Options, argv=argv, description=__doc__)
    import torch

    torch.set_num_threads(1)
    torch.manual_seed(0)
    images = torch.randn(options.batch_size, 3, 224, 224)
    ids = torch.randint(5, 16000, (options.batch_size, TOKENS))
    steps = {
        "transformers CLIP": their_step(images, ids),
        "ours": our_step(images, ids),
        "ours, as trained": our_step(images, ids[:, :SHORT]),
    }
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(options.rounds + 2):
        for name, step in steps.items():
            began = time.process_time()
            step()
            if turn >= 2:
                seconds[name].append(time.process_time() - began)
    reference = statistics.median(seconds["transformers CLIP"])
    for name, values in seconds.items():
        middle = statistics.median(values)
        print(
            f"{name:<20}{middle:.3f} CPU seconds a step ({options.batch_size / middle:.2f} pairs/s), "
            f"{middle / reference:.3f} of transformers"
        )


def our_step(images, ids) -> Callable[[], None]:
    """A training step of this repository's towers."""
    import torch

    from multimodal.contrastive import contrastive_loss

    module = our_model()
    optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=1e-4, fused=True)
    batch = {"image": {"images": images, "input_ids": ids, "attention_mask": ids != 0}}

    def step() -> None:
        found = module(batch)
        contrastive_loss(
            "infonce", found["image_embeds"], found["imagetext_embeds"], found["logit_scale"], found["logit_bias"]
        ).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def their_step(images, ids) -> Callable[[], None]:
    """The same with transformers' CLIPModel: the same towers, loss and optimizer."""
    import torch

    model = their_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step() -> None:
        model(input_ids=ids, attention_mask=(ids != 0).long(), pixel_values=images, return_loss=True).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def our_model():
    """This repository's picture and text towers, 10,698,241 trainable parameters: CLIP's, a projection of the word
    vectors (36,864) and 13 more text positions (2,496), less 192 of other layers at the patches.
    """
    from multimodal.model import MultimodalModel, Widths
    from multimodal.objectives import AlignModel

    network = MultimodalModel(
        Widths((WIDTH, IMAGE_DEPTH), (WIDTH, TEXT_DEPTH), (WIDTH, 0), (WIDTH, 0), WIDTH), embed_dim=EMBED
    )
    unused = ("audio", "fus", "to_fusion", "modality", "classifier", "match", "bias", "embed.audio")
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(not name.startswith(unused))
    return AlignModel(network)


def their_model():
    """transformers' CLIP of these dimensions: 10,659,073 parameters."""
    from transformers import CLIPConfig, CLIPModel

    shape = {"hidden_size": WIDTH, "intermediate_size": 4 * WIDTH, "num_attention_heads": WIDTH // 64}
    text = {
        "num_hidden_layers": TEXT_DEPTH,
        "vocab_size": 16384,
        "max_position_embeddings": TOKENS,
        "eos_token_id": 2,
        "hidden_act": "gelu",
    }
    image = {"num_hidden_layers": IMAGE_DEPTH, "image_size": 224, "patch_size": 16, "hidden_act": "gelu"}
    config = CLIPConfig(text_config={**shape, **text}, vision_config={**shape, **image}, projection_dim=EMBED)
    return CLIPModel._from_config(config, attn_implementation="sdpa")


if __name__ == "__main__":
    main()
