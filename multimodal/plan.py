"""--dry-run: one symbolic training step of the heaviest stage, at full size and without memory."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from multimodal.config import Config, stage_epochs
from multimodal.data.records import Kind
from multimodal.data.text import TextTokenizer
from multimodal.modules.blocks import Block
from multimodal.trainer import STAGE_NAMES, choose_trainable, make_network, make_stage_module
from shared.plan.table import Workload, plan_run

TEXT_TOKENS = 32  # captions of COCO and AudioCaps stay below this in 99 % of the cases


def print_plan(config: Config) -> None:
    """Print the plan of the last stage that runs."""
    print(plan_run(workload(config), config))


def workload(config: Config) -> Workload:
    """One micro-step of the last stage that runs: with accumulation, the gradient cache's extra forward included."""
    stage = max(stage_epochs(config.training))
    kinds: list[Kind] = ["image", "audio"]
    labelled = config.training.label_set in ("coco80", "images") and stage == 3
    twice = (
        stage > 1
        and config.training.gradient_cache
        and (config.training.gradient_accumulation_steps > 1 or config.training.global_batch_size is not None)
    )

    def build(config: Config) -> nn.Module:
        network = make_network(config, TextTokenizer(config.tokenizer).vocabulary)
        module = make_stage_module(config, stage, network)
        choose_trainable(module, config, stage, kinds, classify=labelled, framed=False)
        return module

    def step(config: Config) -> Callable[[nn.Module], Tensor]:
        return lambda module: symbolic_loss(config, module, stage, labelled, twice)

    title = f"{config.model.size}, {STAGE_NAMES[stage]}, pictures and sounds with captions of {TEXT_TOKENS} tokens"
    return Workload(title, build, step, (Block,))


def symbolic_loss(config: Config, module: nn.Module, stage: int, labelled: bool, twice: bool) -> Tensor:
    """A number that depends on every output of the stage; twice: behind the forward pass of the gradient cache."""
    batch, draws = inputs(config, stage, labelled)
    if twice:
        with torch.no_grad():
            module(batch, draws, embeddings_only=True)
    outputs = module(batch, draws)
    if stage == 1:
        return torch.stack(list(outputs.values())).sum()
    loss = (outputs["image_embeds"] @ outputs["imagetext_embeds"].T * outputs["logit_scale"]).sum()
    loss = loss + (outputs["audio_embeds"] @ outputs["audiotext_embeds"].T * outputs["audio_logit_scale"]).sum()
    for name in ("image_match", "audio_match", "class_logits"):
        loss = loss + outputs[name].square().sum() if name in outputs else loss
    return loss


def inputs(config: Config, stage: int, labelled: bool) -> tuple[dict, dict]:
    """A made-up micro-batch with its draws, in the shapes of the real one."""
    size, model, training = config.training.batch_size, config.model, config.training
    text = {
        "input_ids": torch.ones(size, TEXT_TOKENS, dtype=torch.int64),
        "attention_mask": torch.ones(size, TEXT_TOKENS, dtype=torch.bool),
    }
    batch: dict[str, dict[str, Tensor]] = {
        "image": {"images": torch.randn(size, 3, model.image_size, model.image_size)},
        "audio": {"audio": torch.randn(size, config.data.audio_frames, 80)},
    }
    patches = {"image": (model.image_size // model.image_patch) ** 2, "audio": config.data.audio_frames // 16 * 5}
    draws: dict[str, dict[str, Tensor]] = {part: {"pairs": torch.rand(size, 5)} for part in batch}
    if stage == 1 or (stage == 2 and min(training.patch_keep, training.audio_keep) < 1):
        for part, count in patches.items():
            draws[part]["patches"] = torch.rand(size, count)
    if stage == 1 and training.text_pretraining == "mlm":
        batch["text"], draws["text"] = text, {"words": torch.rand(size, 3, 80)}
    if stage > 1:
        for own in batch.values():
            own |= {**text, "keys": torch.arange(2 * size).view(size, 2)}
    if labelled:
        batch["image"]["labels"] = torch.zeros(size, model.num_classes)
    return batch, draws
