"""A tiny model of the small preset and packs of the sample data, for several tests."""

import torch

from bagel.config import PRESETS, Config, TrainingConfig
from bagel.data.tokenizer import ByteTokenizer
from bagel.model import Bagel
from bagel.objective import joint_losses, with_latents
from bagel.packing import Dropout, make_collate
from bagel.weights.pretrained import build_model, load_autoencoder
from shared.config import load_config
from tests.bagel.conftest import SAMPLE, TINY


def make_tiny() -> tuple[Config, Bagel]:
    """The small preset with a tiny model; the output head is random so that every weight gets a gradient."""
    config = load_config(Config, presets=PRESETS, argv=[*TINY], default="small")
    torch.manual_seed(0)
    model = build_model(config.model)
    torch.nn.init.normal_(model.llm2vae.weight, std=0.1)
    return config, model


def packs_of(config: Config, groups: list[list[int]]) -> list[dict]:
    """Packs of these training records, ready for the model."""
    from bagel.dataset import open_dataset

    dataset = open_dataset(config, config.model, ByteTokenizer(), str(SAMPLE))
    collate, autoencoder = make_collate(dataset.layout, Dropout(0.3, 0.3, 0.3), 1), load_autoencoder(config.model)
    return [
        with_latents(collate([dataset.sample(index, 0) for index in group]), autoencoder, config.model)
        for group in groups
    ]


def gradients(model: Bagel, packs: list[dict], training: TrainingConfig) -> tuple[float, dict[str, torch.Tensor]]:
    model.zero_grad()
    total = 0.0
    for loss, _ in joint_losses(model, packs, training, 1):
        loss.backward()
        total += loss.item()
    return total, {
        name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None
    }
