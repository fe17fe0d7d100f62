"""Throughput of training: tokens a second, padding, and the share of the device's peak."""

import time
from collections.abc import Sequence
from typing import Any

import torch

from bagel.config import ModelConfig
from bagel.flops import counted_flops, peak_tflops, reference_flops, utilisation
from bagel.modules.attention import PackLayout
from shared.engine.dist import DistInfo


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
