"""The joint objective: cross entropy of text and squared error of velocities, means over a whole step's tokens."""

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from bagel.config import ModelConfig, TrainingConfig
from bagel.modules.attention import PackLayout
from bagel.modules.layers import patchify
from bagel.modules.vae import Autoencoder
from bagel.plan import counted_flops, peak_tflops, reference_flops, utilisation
from shared.engine.dist import DistInfo, sum_over_ranks


@torch.no_grad()
def with_latents(
    pack: dict[str, Any], autoencoder: Autoencoder, config: ModelConfig, *, together: bool = False
) -> dict[str, Any]:
    """The pack with `packed_latents` (N, C), fp32, made of its pictures.

    Pictures of one size are encoded as a batch. together: all on one canvas padded with zeros at the right and bottom,
    as the released code does, which changes latents near the border.
    """
    images, patch = pack["vae_images"], config.latent_patch_size
    groups: dict[tuple[int, int], list[int]] = {}
    for number, image in enumerate(images):
        groups.setdefault(tuple(image.shape[1:]), []).append(number)
    if together and images:
        groups = {tuple(max(sides) for sides in zip(*groups, strict=True)): list(range(len(images)))}
    tokens: list[Tensor] = [images[0].new_zeros(0)] * len(images) if images else []
    for (height, width), members in groups.items():
        canvas = torch.stack([_grown(images[i], height, width) for i in members])
        cells = (height // config.autoencoder.downsample, width // config.autoencoder.downsample)
        noise = torch.stack([_grown(pack["posterior_noise"][i], *cells) for i in members])
        for i, latent in zip(members, autoencoder.encode(canvas, noise).float(), strict=True):
            rows, columns = pack["patchified_vae_latent_shapes"][i]
            tokens[i] = patchify(latent[:, : rows * patch, : columns * patch], patch)
    joined = torch.cat(tokens) if tokens else pack["packed_noise"].new_zeros(0, config.latent_width)
    return {**pack, "packed_latents": joined}


def _grown(image: Tensor, height: int, width: int) -> Tensor:
    """Zeros at the right and bottom up to this size."""
    return F.pad(image, (0, width - image.shape[2], 0, height - image.shape[1]))


def token_weights(pack: dict[str, Any], reweighting: bool) -> Tensor:
    """Weight of every predicted text token: 1, or 1/sqrt(n) in an answer of n."""
    weights = pack["ce_loss_weights"]
    return weights if reweighting else torch.ones_like(weights)


def _weight_sum(pack: dict[str, Any], reweighting: bool) -> float:
    """The sum of token_weights, as the packer wrote it down: a GPU would have to be waited for."""
    if not reweighting:
        return float(len(pack["ce_loss_weights"]))
    return pack["ce_loss_weight_sum"] if "ce_loss_weight_sum" in pack else pack["ce_loss_weights"].sum().item()


def count_targets(packs: Sequence[dict[str, Any]], reweighting: bool) -> Tensor:
    """(sum of text weights, predicted latent tokens) over all packs and ranks, float64 on the CPU."""
    own = [[_weight_sum(pack, reweighting), len(pack["mse_loss_indexes"])] for pack in packs]
    return sum_over_ranks(torch.tensor(own, dtype=torch.float64).sum(dim=0))


def joint_losses(
    model: Callable[[dict], dict[str, Tensor]], packs: Sequence[dict[str, Any]], training: TrainingConfig, world: int
) -> Iterator[tuple[Tensor, dict[str, Any]]]:
    """One (loss, metrics) for each micro-batch; summed over them and averaged over ranks they are

        text_loss_weight * mean over text tokens of CE + image_loss_weight * mean over latent tokens of MSE.

    The means run over all tokens of all ranks and micro-batches (`window`), or are means of each micro-batch's means
    (`micro`, the released rule). A term without a single token counts 0.
    """
    whole = count_targets(packs, training.ce_loss_reweighting) if training.loss_normalization == "window" else None
    for pack in packs:
        counts = count_targets([pack], training.ce_loss_reweighting) * len(packs) if whole is None else whole
        text_tokens, image_tokens = counts.clamp(min=1e-12).tolist()
        losses = model(pack)
        text = (losses["ce"] * token_weights(pack, training.ce_loss_reweighting)).sum() * (world / text_tokens)
        image = losses["mse"].mean(dim=-1).sum() * (world / image_tokens)
        # The loop averages metrics over micro-batches, so each carries its share times their number.
        metrics = {
            "text_loss": text.detach() * len(packs),
            "image_loss": image.detach() * len(packs),
            "tokens": float(pack["sequence_length"]),
        }
        yield training.text_loss_weight * text + training.image_loss_weight * image, metrics


# Throughput of training: tokens a second, padding, and the share of the device's peak.


class SpeedMeter:
    """Times the span from one step's packs to the next and relates it to what was computed in it."""

    def __init__(self, config: ModelConfig, info: DistInfo):
        self.config = config
        self.peak = peak_tflops(torch.cuda.get_device_name(info.device)) if info.device.type == "cuda" else None
        self._began: float | None = None
        self._flops: tuple[float, float] = (0.0, 0.0)
        self._tokens = 0

    def after_step(self, packs: Sequence[dict[str, Any]]) -> dict[str, float]:
        """Figures of the step before, from the second step on; mfu only on devices whose peak is known."""
        now, found = time.perf_counter(), {}
        if self._began is not None:
            seconds = now - self._began
            found["tokens_per_second"] = self._tokens / seconds
            if self.peak is not None:
                found["mfu_ref"], found["mfu"] = (utilisation(flops, seconds, self.peak) for flops in self._flops)
        lengths = [pack.get("static_length") or pack["sequence_length"] for pack in packs]
        self._tokens = sum(pack["sequence_length"] for pack in packs)
        found["padding"] = 1 - self._tokens / sum(
            max(length, pack["sequence_length"]) for length, pack in zip(lengths, packs, strict=True)
        )
        self._flops = (
            sum(reference_flops(self.config.language, pack["sample_lens"]) for pack in packs),
            sum(map(self._counted, packs)),
        )
        self._began = now
        return found

    def _counted(self, pack: dict[str, Any]) -> float:
        pairs = sum(PackLayout(pack["sample_lens"], pack["split_lens"], pack["attn_modes"]).attended_pairs())
        return counted_flops(
            self.config,
            tokens=pack["sequence_length"],
            pairs=pairs,
            predictions=len(pack["ce_loss_indexes"]),
            vit_lens=pack["vit_token_seqlens"],
        )
