"""The trainer of one stage: what a step's loss is, how it is validated, and which files a checkpoint gets."""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from multimodal.config import Config, TrainingConfig, stage_epochs
from multimodal.data.records import Kind
from multimodal.data.sources import model_inputs
from multimodal.dataset import CaptionedDataset
from multimodal.evaluation.held_out import ValidationBatches, embed_split, measure
from multimodal.model import MultimodalModel, create_model
from multimodal.modules.contrastive import CachedStep, Pairing, total_loss
from multimodal.objective import AlignModel, FinetuneModel, PretrainModel, StageModule
from multimodal.weights.files import FORMAT_VERSION, NAMES, put, save_aside
from shared.data import to_device
from shared.engine.checkpoint import load_tensors
from shared.engine.dist import DistInfo, mean_over_ranks
from shared.log import read_metrics
from shared.rng import keyed_rand

STAGE_NAMES = {1: "stage1_single", 2: "stage2_align", 3: "stage3_finetune"}
# AdamW's beta 1, beta 2, epsilon and weight decay of each stage, where the settings name none
ADAMW = {1: (0.9, 0.95, 1e-8, 0.05), 2: (0.9, 0.98, 1e-6, 0.1), 3: (0.9, 0.98, 1e-6, 0.05)}
STEP_NAME, EPOCH_NAME = "step_{step:08d}", "epoch_{epoch:04d}"  # folders of a stage's checkpoints
PREFIX = "network."
_DRAWS, _VALIDATION_STEP = 612, 0  # random stream; validation masks and negatives are those of one fixed step
_VALIDATION_SEED_SHIFT = 1_000_003
_PART_NUMBER = {"image": 0, "audio": 1, "voice": 2, "text": 3}
VALIDATION_BATCHES = 64  # stages 1 and 3: batches that the masked and matching losses are measured on


@dataclass(frozen=True)
class Place:
    """Where a stage lies in the whole run."""

    stage: int
    first_epoch: int  # epochs of the stages before
    first_step: int
    steps_per_epoch: int


def make_network(config: Config, vocabulary: int) -> MultimodalModel:
    """The towers of these settings over `vocabulary` token ids, with fresh weights."""
    model = config.model
    return create_model(
        model.size,
        model.num_classes,
        embed_dim=model.embed_dim,
        image_size=model.image_size,
        image_patch=model.image_patch,
        dropout=model.dropout,
        attention=model.attention,
        attention_chunk=model.attention_chunk,
        vocabulary=vocabulary,
        contrastive_loss=config.training.contrastive_loss,
        init_std=model.init_std,
        linear_path=model.linear_path,
    )


def make_stage_module(config: Config, stage: int, network: MultimodalModel) -> StageModule:
    """The module of a stage."""
    training = config.training
    network.set_grad_checkpointing(training.gradient_checkpointing)
    if stage == 1:
        return PretrainModel(network, masked_words=training.text_pretraining == "mlm")
    if stage == 2:
        return AlignModel(network, image_keep=training.patch_keep, audio_keep=training.audio_keep)
    return FinetuneModel(network)


def choose_trainable(
    module: StageModule, config: Config, stage: int, kinds: list[Kind], *, classify: bool, framed: bool
) -> None:
    """Freeze what a stage does not train, and what its data never reach: later a parameter without gradient is an
    error.

    classify: the stage has class labels. framed: voices come with video frames.
    """
    network = module.network
    image = ["image_patches", "image_class", "image_positions", "image_tower"]
    audio = ["audio_patches", "audio_class", "audio_bands", "audio_tower"]
    text = ["words", "word_projection", "text_positions", "text_tower"]
    has_image = "image" in kinds or ("voice" in kinds and framed)
    has_audio, has_text = "audio" in kinds or "voice" in kinds, "image" in kinds or "audio" in kinds
    trained = (image if has_image else []) + (audio if has_audio else [])
    if stage == 1:
        trained = (image if "image" in kinds else []) + (audio if "audio" in kinds else [])
        trained += text if config.training.text_pretraining == "mlm" else []
    else:
        modalities = [
            name for name, present in (("image", has_image), ("text", has_text), ("audio", has_audio)) if present
        ]
        trained += (text if stage == 3 or config.training.train_words else text[1:]) if has_text else []
        sigmoid = config.training.contrastive_loss == "siglip"
        trained += ["log_scale", *["bias"] * sigmoid] if "image" in kinds else []
        sounds = "audio" in kinds or ("voice" in kinds and framed)
        # Voices without frames are compared with nothing: their speakers are told from the fusion alone.
        trained += [f"embed.{name}" for name in modalities if name != "audio" or sounds]
        trained += ["audio_log_scale", *["audio_bias"] * sigmoid] if sounds else []
        if stage == 3:
            fused = [name for name in modalities if has_text or classify]
            trained += [f"{part}.{name}" for name in fused for part in ("to_fusion", "modality_vectors")]
            trained += ["fuse_token", "fusion_tower", "fused_output"] if fused else []
            trained += (["match_head"] if has_text else []) + (["classifier"] if classify else [])
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(any(name == item or name.startswith(item + ".") for item in trained))
    if isinstance(module, PretrainModel):
        module.image_decoder.requires_grad_("image" in kinds)
        module.audio_decoder.requires_grad_("audio" in kinds)


def parameter_groups(
    module: StageModule, stage: int, *, weight_decay: float, tower_scale: float, word_scale: float
) -> list[dict]:
    """Groups for the optimizer: no decay for vectors, tables and tokens; in stage 3 a lower rate for the towers.

    word_scale: rate of the word table relative to the text tower's.
    """
    free = {PREFIX + name for name in module.network.no_weight_decay()}
    heads = tuple(PREFIX + name for name in ("fus", "to_fusion", "modality_vectors", "classifier", "match_head"))
    groups: dict[tuple[float, float], list[str]] = {}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            decay = 0.0 if name in free or parameter.ndim < 2 or "token" in name.split(".")[-1] else weight_decay
            scale = tower_scale if stage == 3 and not name.startswith(heads) else 1.0
            scale *= word_scale if name == PREFIX + "words.weight" else 1.0
            groups.setdefault((decay, scale), []).append(name)
    return [{"names": names, "weight_decay": decay, "lr_scale": scale} for (decay, scale), names in groups.items()]


def adamw_of(training: TrainingConfig, stage: int) -> dict[str, float]:
    """AdamW's settings in a stage, by name: those that are given, else the stage's own."""
    names = ("adam_beta1", "adam_beta2", "adam_epsilon", "weight_decay")
    given = {name: getattr(training, name) for name in names}
    return {name: own if given[name] is None else given[name] for name, own in zip(names, ADAMW[stage], strict=True)}


def best_metric_of(config: Config, stage: int, *, contrast: bool = True) -> tuple[str, str]:
    """The metric that decides which checkpoint of a stage is best, and whether it should be small or large.

    auto: the masked loss in stage 1, retrieval after it. The contrastive loss would be a poor judge: with the
    temperature it rises on held-out pairs while their retrieval still improves. contrast: there are pairs; speakers are
    identified without any.
    """
    name, mode = config.training.best_metric, config.training.best_mode
    if name == "auto" or (
        stage == 1 and name not in ("val/loss", *(f"val/masked_{part}_loss" for part in _PART_NUMBER))
    ):
        name = "val/loss" if stage == 1 or not contrast else "val/retrieval"
    if mode == "auto" or (stage == 1 and config.training.best_metric != name):
        mode = "min" if name.endswith("loss") else "max"
    return name, mode


def metrics_of(config: Config, kinds: Iterable[Kind], *, classify: bool, contrast: bool = True) -> set[str]:
    """The names, as they stand in the log, of what the validation of every stage gives that can choose by them: of
    stages 2 and 3, or of stage 1 where it runs alone; and auto.

    kinds: of the validation data. classify: they have class labels, which stage 3 learns. contrast: there are pairs.
    """
    stages = set(stage_epochs(config.training))
    if stages == {1}:
        parts = [*(kind for kind in kinds if kind != "voice"), *["text"] * (config.training.text_pretraining == "mlm")]
        return {"auto", "val/loss", *(f"val/masked_{part}_loss" for part in parts)}
    found = {"loss", *["retrieval"] * contrast}
    for kind in kinds if contrast else ():
        ways = [f"{kind}_{way}" for way in ("item_to_text", "text_to_item")]
        found |= {f"{kind}_loss", *(f"{way}_{name}" for way in ways for name in ("R@1", "R@10", "MRR"))}
        found |= {f"{kind}_match_loss"} if 2 not in stages and kind != "voice" else set()
    if classify and 2 not in stages:
        voice = config.training.label_set == "voxceleb1"
        found |= {"class_loss", *(("speaker_accuracy",) if voice else ("mAP", "micro_F1"))}
    return {"auto", *(f"val/{name}" for name in found)}


class Trainer:
    """Stage 1, 2 or 3 over one module; hands its functions to shared/loop.py."""

    def __init__(
        self,
        config: Config,
        place: Place,
        module: StageModule,
        datasets: dict[Kind, CaptionedDataset],
        val: dict[Kind, CaptionedDataset],
        info: DistInfo,
        output_dir: Path,
        *,
        classify: bool,
        tokenizer_sha256: str,
    ):
        self.config, self.place, self.stage, self.info = config, place, place.stage, info
        self.module, self.val, self.kinds = module, val, list(datasets)
        self.output_dir, self.classify, self.tokenizer_sha256 = output_dir, classify, tokenizer_sha256
        network = module.network
        self.model_config = dict(network.config)
        trained = {name for name, parameter in network.named_parameters() if parameter.requires_grad}
        self.frozen = {name: v.detach().clone() for name, v in network.state_dict().items() if name not in trained}
        self.patches = {"image": network.grid**2, "audio": config.data.audio_frames // 16 * 5}
        roots = {str(kind): len(dataset) ** 0.5 for kind, dataset in datasets.items()}
        self.weights = {kind: root * len(roots) / sum(roots.values()) for kind, root in roots.items()}
        self.pairings = self._pairings(datasets)
        rows = read_metrics(output_dir / STAGE_NAMES[self.stage] / "metrics.jsonl")  # of a run that is resumed
        self.val_losses = {row["step"]: row["val/loss"] for row in rows if row.get("val/loss") is not None}

    def _pairings(self, datasets: dict[Kind, CaptionedDataset]) -> list[Pairing]:
        found = []
        if "image" in datasets:
            found.append(Pairing("image_embeds", "imagetext_embeds", "logit_scale", "logit_bias", "image", 1.0))
        sound = ("audio_logit_scale", "audio_logit_bias")
        if "audio" in datasets:
            found.append(Pairing("audio_embeds", "audiotext_embeds", *sound, "audio", 1.0))
        if "voice" in datasets and datasets["voice"].records[0].video is not None:
            found.append(Pairing("voice_embeds", "frame_embeds", *sound, "voice", 0.5))
        return found

    # --- a step -------------------------------------------------------------------------------------------------------

    def losses(self, model: Any, batches: list[dict], step: int) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
        """One pre-weighted loss a micro-batch; with the gradient cache the contrastive terms are those of the whole
        step.
        """
        # Everything random of a step is drawn here, keyed by the sample's slot in it, its place among the samples of
        # all micro-batches and ranks: the same draws on one rank and on eight, and again after a resume.
        inputs = [self._inputs(batch) for batch in batches]
        draws = [self._draws(batch, own, step) for batch, own in zip(batches, inputs, strict=True)]
        if self.stage == 1:
            for own, draw in zip(inputs, draws, strict=True):
                yield self._masked_loss(model(own, draw), len(batches))
            return
        # Accumulation alone does not add negatives: four micro-batches of 8 pairs are no batch of 32. So all of them
        # are embedded once without gradient, and the loss of the whole step tells each embedding its gradient.
        cached = None
        if self.config.training.gradient_cache and len(batches) > 1 and self.pairings:
            keys = [self._keys(own) for own in inputs] if self.config.training.mask_duplicates else None
            cached = CachedStep(
                lambda index: model(inputs[index], draws[index], embeddings_only=True),
                len(batches),
                self.config.training.contrastive_loss,
                self.pairings,
                keys,
            )
        for index, (own, draw) in enumerate(zip(inputs, draws, strict=True)):
            if cached is None:
                outputs = model(own, draw)
                loss, terms = self._contrast(outputs, own)
                loss = loss / len(batches)
            else:
                # The second pass, with gradient and with the random numbers of the first.
                with cached.replay(index):
                    outputs = model(own, draw)
                loss, terms = cached.surrogate(index, outputs), cached.terms
            extra, more = self._supervised(outputs, own)
            yield loss + extra / len(batches), {**terms, **more, **self._temperatures(outputs)}

    def _inputs(self, batch: dict[Kind, dict]) -> dict[str, dict[str, Tensor]]:
        inputs = model_inputs(batch)
        if self.stage == 1 and self.config.training.text_pretraining == "mlm":
            source = inputs["image"] if "image" in inputs else inputs["audio"]
            inputs["text"] = {name: source[name] for name in ("input_ids", "attention_mask")}
        return inputs

    def _draws(self, batch: dict, inputs: dict, step: int, shift: int = 0) -> dict[str, dict[str, Tensor]]:
        """Uniform numbers by part, keyed by the sample's slot in the step: the same on any number of ranks."""
        found: dict[str, dict[str, Tensor]] = {}
        training = self.config.training
        wants_patches = self.stage == 1 or (self.stage == 2 and min(training.patch_keep, training.audio_keep) < 1)
        for part in inputs:
            slots = batch[part]["slot"] if part in batch else batch["image" if "image" in batch else "audio"]["slot"]

            def draw(number: int, *shape: int, part: str = part, slots: Tensor = slots) -> Tensor:
                key = (self.config.run.seed + shift, _DRAWS + 10 * self.stage + number, _PART_NUMBER[part], step)
                return keyed_rand(shape, key=key, slots=slots, device=self.info.device)

            found[part] = {}
            if wants_patches and part in self.patches:
                found[part]["patches"] = draw(0, self.patches[part])
            if self.stage == 3:
                found[part]["pairs"] = draw(1, 5)
            if part == "text":
                found[part]["words"] = draw(2, 3, 80)
        return found

    def _masked_loss(self, outputs: dict[str, Tensor], micro_batches: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Both kinds in every step, weighted by the square root of their sets' sizes (weights average 1)."""
        loss = torch.stack([self.weights.get(part, 1.0) * value for part, value in outputs.items()]).sum()
        return loss / micro_batches, {f"masked_{part}": value.detach() for part, value in outputs.items()}

    def _contrast(self, outputs: dict[str, Tensor], inputs: dict) -> tuple[Tensor, dict[str, Tensor]]:
        if not self.pairings:
            return torch.zeros((), device=self.info.device), {}
        keys = self._keys(inputs) if self.config.training.mask_duplicates else None
        return total_loss(self.config.training.contrastive_loss, self.pairings, outputs, keys)

    def _keys(self, inputs: dict) -> dict[str, Tensor]:
        return {pairing.keys: inputs[pairing.keys]["keys"] for pairing in self.pairings}

    def _supervised(self, outputs: dict[str, Tensor], inputs: dict) -> tuple[Tensor, dict[str, Tensor]]:
        """Stage 3: matching of each part, and classification; means over this micro-batch."""
        terms: dict[str, Tensor] = {}
        for part in ("image", "audio"):
            if f"{part}_match" in outputs:
                weight, target = outputs[f"{part}_match_weight"], outputs[f"{part}_match_target"]
                error = functional.binary_cross_entropy_with_logits(outputs[f"{part}_match"], target, reduction="none")
                terms[f"{part}_match"] = (error * weight).sum() / weight.sum().clamp_min(1)
        if "class_logits" in outputs and self.classify:
            logits = outputs["class_logits"]
            if self.config.training.label_set == "voxceleb1":
                terms["class"] = functional.cross_entropy(logits, inputs["voice"]["labels"].argmax(1))
            else:
                terms["class"] = functional.binary_cross_entropy_with_logits(logits, inputs["image"]["labels"])
        total = torch.zeros((), device=self.info.device)
        for value in terms.values():
            total = total + value
        return total, {name: value.detach() for name, value in terms.items()}

    def _temperatures(self, outputs: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: outputs[name].detach() for name in {pairing.scale for pairing in self.pairings}}

    def after_step(self, module: StageModule, step: int) -> None:
        """Keep the temperatures in range."""
        if self.stage > 1:
            module.network.clamp_scales(self.config.training.max_logit_scale)

    # --- validation ---------------------------------------------------------------------------------------------------

    def validate(self, model: Any, step: int) -> dict[str, float]:
        """val/loss of the stage, its parts, and retrieval; the same numbers on every rank."""
        found: dict[str, float] = {}
        bad: dict[str, float] = {}
        workers = self.config.training.num_workers
        if self.stage != 2:
            found |= self._validation_terms(model)
        if self.stage > 1:
            scales: dict[str, float] = {}
            size = max(32, self.config.training.batch_size)
            for kind, dataset in self.val.items():
                split = embed_split(model, dataset, kind, self.info, batch_size=size, workers=workers)
                name = "logit_scale" if kind == "image" else "audio_logit_scale"
                scales = scales or _scalars(model, dataset, self.info)
                found |= measure(
                    split,
                    loss_kind=self.config.training.contrastive_loss,
                    scale=scales[name],
                    bias=scales[name.replace("scale", "bias")],
                    brief=True,
                    info=self.info,
                )
                bad |= {f"bad_{name}": float(count) for name, count in split.bad_by_set.items()}
        loss = sum(value for name, value in found.items() if name.endswith("_loss"))
        ranks = [value for name, value in found.items() if name.endswith("_MRR")]
        self.val_losses[step] = loss
        return {"loss": loss, **({"retrieval": sum(ranks) / len(ranks)} if ranks else {}), **found, **bad}

    def _validation_terms(self, model: Any) -> dict[str, float]:
        """The masked or matching losses on the first validation batches, with fixed masks and draws."""
        size = self.config.training.batch_size
        count = min(VALIDATION_BATCHES, max(len(dataset) // size for dataset in self.val.values()) or 1)
        turns = -(-count // self.info.world)
        numbers = [(turn * self.info.world + self.info.rank) % count for turn in range(turns)]
        sums: dict[str, float] = {}
        for batch in ValidationBatches(self.val, numbers, size).read(self.config.training.num_workers):
            batch = to_device(batch, self.info.device)
            inputs = self._inputs(batch)
            outputs = model(inputs, self._draws(batch, inputs, _VALIDATION_STEP, _VALIDATION_SEED_SHIFT))
            terms = outputs if self.stage == 1 else self._supervised(outputs, inputs)[1]
            for name, value in terms.items():
                if name != "class":  # measured on the whole split
                    sums[name] = sums.get(name, 0.0) + float(value) / turns
        name = "masked_{}_loss" if self.stage == 1 else "{}_loss"
        return mean_over_ranks({name.format(part): value for part, value in sums.items()})

    # --- files --------------------------------------------------------------------------------------------------------

    def export(self, folder: Path, weights: dict[str, Tensor], ema: dict[str, Tensor] | None) -> None:
        """model.pt in the checkpoint folder; the guide's best_model.pt and checkpoint_epoch_N.pt in OUT/checkpoints.

        Runs in the writer's thread while the next steps are trained, so nothing here asks where training is now: the
        step and the best score are those that trainer.json of this checkpoint holds, the weights are copies.
        """
        trainer = json.loads((folder / "trainer.json").read_text())
        run, chosen = trainer["run_state"], ema or weights
        step = run["step"]
        state = {
            **self.frozen,
            **{name.removeprefix(PREFIX): value for name, value in chosen.items() if name.startswith(PREFIX)},
        }
        epoch, rest = divmod(step, self.place.steps_per_epoch)
        name = STEP_NAME.format(step=step) if rest else EPOCH_NAME.format(epoch=epoch)
        metric, mode = best_metric_of(self.config, self.stage)
        losses = [loss for at, loss in list(self.val_losses.items()) if at <= step]
        payload = {
            "model_state_dict": {key: value.detach().cpu().contiguous() for key, value in state.items()},
            "pretrain_state_dict": {key: value.cpu() for key, value in chosen.items() if not key.startswith(PREFIX)},
            "epoch": self.place.first_epoch + epoch,
            "global_step": self.place.first_step + step,
            "stage": self.stage,
            "stage_step": step,
            "best_val_loss": min(losses, default=None),
            "best_metric": metric,
            "best_mode": mode,
            "best_value": run["best"],
            "config": self.config.model_dump(mode="json"),
            "model_config": self.model_config,
            "tokenizer_sha256": self.tokenizer_sha256,
            "format_version": FORMAT_VERSION,
            "training_state": f"{STAGE_NAMES[self.stage]}/checkpoints/{name}",
        }
        save_aside(payload, folder / "model.pt")
        checkpoints = self.output_dir / "checkpoints"
        if run["best_name"] == name:
            put(folder / "model.pt", checkpoints / NAMES[0])
        if rest == 0:
            # All that training needs to go on from here, on another machine too: see files.unpack_training.
            whole = {
                **payload,
                "optimizer_state_dict": load_tensors(folder, "optimizer"),
                "trainer_state": trainer,
                "trained_state_dict": {key: value.cpu().contiguous() for key, value in weights.items()}
                if ema
                else None,
                "trained_names": list(weights),
            }
            save_aside(whole, checkpoints / f"checkpoint_epoch_{payload['epoch']}.pt")
            self._prune(checkpoints)

    def _prune(self, checkpoints: Path) -> None:
        found = sorted(checkpoints.glob("checkpoint_epoch_*.pt"), key=lambda path: int(path.stem.rpartition("_")[2]))
        for path in found[: -self.config.training.keep_last]:
            path.unlink()


def _scalars(model: Any, dataset: CaptionedDataset, info: DistInfo) -> dict[str, float]:
    """The temperatures and biases, which a sharded module only shows through its forward."""
    ids, mask = to_device(dataset.tokenizer.batch([""]), info.device)
    outputs = model({"audio": {"input_ids": ids, "attention_mask": mask}})
    return {
        name: float(outputs[name]) for name in ("logit_scale", "audio_logit_scale", "logit_bias", "audio_logit_bias")
    }
