"""The objective: cross entropy of text and squared error of velocities, means over a whole step's tokens.

UnifiedTrainer hands fit() what it calls; joint_losses() is the formula.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bagel.config import Config, ModelConfig, TrainingConfig
from bagel.data.tokenizer import Tokenizer
from bagel.dataset import UnifiedGenerationDataset, transforms_of
from bagel.evaluation.validation import held_out_losses, write_samples
from bagel.inferencer import InterleaveInferencer
from bagel.model import SEEING, Bagel
from bagel.modules.lora import save_adapter
from bagel.modules.transformer import MoTDecoderLayer, PackLayout
from bagel.modules.vision import Autoencoder, EncoderLayer
from bagel.packing import Dropout, Pack, PackStream, make_collate, patchify
from bagel.plan import counted_flops, peak_tflops, reference_flops, utilisation
from shared.config import accumulation_steps
from shared.engine.dist import DistInfo, sum_over_ranks
from shared.engine.strategy import choose_precision
from shared.loop import FitResult, TrainedModel, fit, plan_steps
from shared.optim import decay_groups


class UnifiedTrainer:
    """What learns from what: the losses, the validation on fixed noise and times, the samples, the exports."""

    def __init__(
        self,
        config: Config,
        info: DistInfo,
        model: Bagel,
        autoencoder: Autoencoder,
        tokenizer: Tokenizer,
        train_set: UnifiedGenerationDataset,
        val_set: UnifiedGenerationDataset | None = None,
        first_values: Callable[[str], Any] | None = None,  # of a model on the meta device (open_released)
    ):
        self.config, self.info, self.model, self.tokenizer = config, info, model, tokenizer
        self.autoencoder = autoencoder.to(info.device)
        self.train_set, self.val_set, self.first_values = train_set, val_set, first_values
        precision = choose_precision(config.run.precision, info.device)
        self.encodes_in_bf16 = info.device.type == "cuda" and precision == "bf16"
        self.speed = SpeedMeter(model.config, info)
        # Before a strategy shards the model: a checkpoint holds what trains, an export everything. No copy is made.
        trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        state = model.state_dict()
        self.names = list(state)
        frozen = {name: value for name, value in state.items() if name not in trained}
        self.frozen = frozen if first_values is None else {name: first_values(name) for name in frozen}

    def losses(self, model: Any, batches: list[Pack], step: int) -> Iterator[tuple[Tensor, dict]]:
        """The joint loss of every micro-batch, pre-weighted by the tokens of the whole step."""
        # All micro-batches are encoded before the first loss: its weight needs the tokens of the last.
        packs = [self.encoded(pack) for pack in batches]
        speed = self.speed.after_step(packs)
        for loss, metrics in joint_losses(model, packs, self.config.training, self.info.world):
            yield loss, {**metrics, **speed}

    def encoded(self, pack: Pack) -> Pack:
        """The pack with the latents of its pictures."""
        with torch.autocast("cuda", torch.bfloat16, enabled=self.encodes_in_bf16):  # as the released trainer encodes
            return with_latents(
                pack, self.autoencoder, self.model.config, together=self.config.data.pad_images_together
            )

    def validate(self, model: TrainedModel, step: int) -> dict[str, float]:
        """Losses of the held-out records, with the same noise and the same times in every validation."""
        assert self.val_set is not None  # without it fit() gets no validate
        return held_out_losses(
            model, self.val_set, self.encoded, self.config, self.info, self.model.config.timestep_shift
        )

    def sample(self, model: TrainedModel, step: int, folder: Path) -> None:
        """Pictures for held-out prompts and descriptions of held-out pictures; all ranks compute, rank 0 writes."""
        vae, vit, edit = transforms_of(self.config.data, self.model.config)
        inferencer = InterleaveInferencer(
            model, self.autoencoder, self.tokenizer, vae, vit, self.tokenizer.special, edit_vit_transform=edit
        )
        dataset, most = self.val_set or self.train_set, self.config.training.sample_records
        write_samples(inferencer, dataset, folder, step, most=most, writes=self.info.is_main)

    def export(self, folder: Path, weights: dict[str, Tensor], ema: dict[str, Tensor] | None) -> None:
        """Files of a checkpoint that others read: the adapter, or all weights as one plain file, which a strict
        load_state_dict takes: what is frozen and the position tables belong to it.
        """
        chosen = ema or weights
        if self.config.model.use_lora:
            save_adapter(folder, chosen, self.config.model)
        else:
            whole = {name: chosen[name] if name in chosen else self.frozen[name][...] for name in self.names}
            torch.save({name: value.contiguous() for name, value in whole.items()}, folder / "trained_model.pt")

    def train(self) -> FitResult:
        """Run to the planned step."""
        config, training = self.config, self.config.training
        stream = PackStream(
            self.train_set,
            config.data,
            self.info,
            batch_size=training.batch_size,
            accumulation=accumulation_steps(training, self.info.world),
            collate=self.collate(),
            num_workers=training.num_workers,
            prefetch_factor=training.prefetch_factor,
            bad_samples=Path(config.run.output_dir) / "bad_samples.jsonl",
        )
        if self.val_set is not None:
            _check_metric(training, self.val_set)
        if training.warmup_ratio and not training.warmup_steps:
            training.warmup_steps = round(training.warmup_ratio * plan_steps(training, stream))
        self.model.checkpoint_layers(training.gradient_checkpointing)
        if training.compile:  # every pack has its own lengths: symbols from the first graph on
            torch._dynamo.config.assume_static_by_default = False
        return fit(
            config=config,
            info=self.info,
            model=self.model,
            stream=stream,
            losses=self.losses,
            validate=self.validate if self.val_set is not None else None,
            sample=self.sample if training.sample_records else None,
            export=self.export if training.export or config.model.use_lora else None,
            groups=parameter_groups(self.model, training),
            wrap_classes=(MoTDecoderLayer, EncoderLayer),
            first_values=self.first_values,
            checkpoint_name="step_{step}",
            title="BAGEL" if config.data.packing == "samples" else "BAGEL (samples are packs)",
        )

    def collate(self) -> Callable[[list[dict]], Pack]:
        """Samples to packs, with the configured chances of leaving conditions out."""
        data = self.config.data
        dropout = Dropout(data.text_cond_dropout_prob, data.vit_cond_dropout_prob, data.vae_cond_dropout_prob)
        # One static length, so that flex attention is compiled once; the padding is masked and costs little.
        most = data.max_sequence_length if data.packing == "samples" else data.tokens_per_batch
        static = most * self.config.training.batch_size
        return make_collate(self.train_set.layout, dropout, self.config.run.seed, static)


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
        if image is not None:  # None: the picture before it once more
            groups.setdefault((image.shape[1], image.shape[2]), []).append(number)
    if together and groups:
        height, width = (max(sides) for sides in zip(*groups, strict=True))
        groups = {(height, width): [number for members in groups.values() for number in members]}
    tokens: list[Tensor | None] = [None] * len(images)
    for (height, width), members in groups.items():
        canvas = torch.stack([_grown(images[i], height, width) for i in members])
        cells = (height // config.autoencoder.downsample, width // config.autoencoder.downsample)
        noise = torch.stack([_grown(pack["posterior_noise"][i], *cells) for i in members])
        for i, latent in zip(members, autoencoder.encode(canvas, noise).float(), strict=True):
            rows, columns = pack["patchified_vae_latent_shapes"][i]
            tokens[i] = patchify(latent[:, : rows * patch, : columns * patch], patch)
    joined: list[Tensor] = []
    for found in tokens:
        joined.append(joined[-1] if found is None else found)
    empty = pack["packed_noise"][:0]
    return {**pack, "packed_latents": torch.cat(joined) if joined else empty}


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
        # Packs hold unlike numbers of targets. A mean of their means would weigh a token by how few others share its
        # pack, and several ranks would train another model than one; so sums are divided by the whole step's count.
        counts = count_targets([pack], training.ce_loss_reweighting) * len(packs) if whole is None else whole
        text_tokens, image_tokens = counts.clamp(min=1e-12).tolist()
        losses = model(pack)
        # Ranks are averaged when their gradients meet, hence the factor world. A pack without a token of one kind still
        # gives a zero with a graph: every rank must run backward through the same modules.
        text = (losses["ce"] * token_weights(pack, training.ce_loss_reweighting)).sum() * (world / text_tokens)
        image = losses["mse"].mean(dim=-1).sum() * (world / image_tokens)
        # The loop averages metrics over micro-batches, so each carries its share times their number.
        metrics = {
            "text_loss": text.detach() * len(packs),
            "image_loss": image.detach() * len(packs),
            "tokens": float(pack["sequence_length"]),
        }
        yield training.text_loss_weight * text + training.image_loss_weight * image, metrics


# --- throughput -------------------------------------------------------------------------------------------------------


class SpeedMeter:
    """Times the span from one step's packs to the next and relates it to what was computed in it."""

    def __init__(self, config: ModelConfig, info: DistInfo):
        self.config = config
        self.peak = peak_tflops(torch.cuda.get_device_name(info.device)) if info.device.type == "cuda" else None
        self._began: float | None = None
        self._flops: tuple[float, float] | None = None
        self._tokens = 0

    def after_step(self, packs: Sequence[Pack]) -> dict[str, float]:
        """Figures of the step before, from the second step on; mfu only on devices whose peak is known."""
        now, found = time.perf_counter(), {}
        if self._began is not None:
            seconds = now - self._began
            found["tokens_per_second"] = self._tokens / seconds
            if self.peak is not None and self._flops is not None:
                found["mfu_ref"], found["mfu"] = (utilisation(flops, seconds, self.peak) for flops in self._flops)
        self._began, self._tokens = now, sum(pack["sequence_length"] for pack in packs)
        room = sum(max(pack.get("static_length") or 0, pack["sequence_length"]) for pack in packs)
        found["padding"] = 1 - self._tokens / room
        if self.peak is not None:
            self._flops = sum(map(self._released, packs)), sum(map(self._counted, packs))
        return found

    def _released(self, pack: Pack) -> float:
        return reference_flops(self.config.language, pack["sample_lens"])

    def _counted(self, pack: Pack) -> float:
        pairs = sum(PackLayout(pack["sample_lens"], pack["split_lens"], pack["attn_modes"]).attended_pairs())
        return counted_flops(
            self.config,
            tokens=pack["sequence_length"],
            pairs=pairs,
            predictions=len(pack["ce_loss_indexes"]),
            vit_lens=pack["vit_token_seqlens"],
        )


def _check_metric(training: TrainingConfig, val_set: UnifiedGenerationDataset) -> None:
    """A best metric that the validation records cannot give would never find a best checkpoint."""
    targets = val_set.describe()["targets"]
    for name, kind in (("val/text_loss", "texts"), ("val/image_loss", "images")):
        if training.best_metric == name and not targets.get(kind):
            print(f"best_metric {name}: the validation records have no {kind} to learn; val/loss decides", flush=True)
            training.best_metric = "val/loss"


def parameter_groups(model: nn.Module, training: TrainingConfig) -> list[dict]:
    """Trainable parameters by their weight decay; that of the vision tower and the connector may be its own."""
    decay, vision = training.weight_decay, training.vision_weight_decay
    parts = [(False, decay), (True, decay if vision is None else vision)]
    groups = [
        {**group, "names": [name for name in group["names"] if name.startswith(SEEING) == seeing]}
        for seeing, weight_decay in parts
        for group in decay_groups(model, weight_decay)
    ]
    return [group for group in groups if group["names"]]
