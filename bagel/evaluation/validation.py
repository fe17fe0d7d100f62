"""Held-out losses on fixed noise and times, and samples of a run: pictures for prompts, descriptions of pictures."""

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from bagel.config import Config
from bagel.data.records import Keyed, Step, steps_of
from bagel.dataset import UnifiedGenerationDataset
from bagel.inferencer import InterleaveInferencer
from bagel.packing import Draws, Dropout, Pack, PackBuilder, PlanItem
from bagel.sampling.generation import Guidance
from shared.data import to_device
from shared.engine.dist import DistInfo, sum_over_ranks
from shared.rng import keyed_generator

VALIDATION_SEED = 314_159
TIMES = (0.1, 0.3, 0.5, 0.7, 0.9)  # whatever the shift of training, so that runs compare
SEARCHED = 20_000  # records among which prompts and questions are looked for


def fixed_pack(
    dataset: UnifiedGenerationDataset, indices: Sequence[int], times: float | Sequence[float], shift: float
) -> Pack:
    """Records as a pack, nothing left out, every picture to draw at each of the times of a model trained with `shift`,
    with the same noise, a function of the index.

    The copies of a picture see what is before them and are seen by nothing, so that one pass over texts, given pictures
    and latents serves all times. No index: an empty pack, for ranks that have no record left.
    """
    times = [times] if isinstance(times, float) else times
    raws = [math.log(t / (1 - t)) - math.log(shift) for t in times]  # the shift adds its logarithm to the time's logit
    builder = PackBuilder(dataset.layout)
    for index in indices:
        items: list[PlanItem] = []
        for item in dataset.sample(index, 0)["items"]:
            is_drawn = item.type == "vae_image" and item.loss
            items += [item, *(replace(item, repeats=True, same_noise=True) for _ in times[1:])] if is_drawn else [item]
        drawn = iter(raws * sum(item.type == "vae_image" and item.loss and not item.repeats for item in items))
        builder.add(items, Draws([1.0] * len(items), drawn, keyed_generator(VALIDATION_SEED, index)), Dropout())
    return builder.pack()


def held_out_packs(
    dataset: UnifiedGenerationDataset, count: int, budget: int, shift: float, *, rank: int = 0, world: int = 1
) -> Iterator[Pack]:
    """The first `count` records in packs of at most `budget` tokens, so many for every rank, all of one static length:
    flex attention is compiled once, and its memory does not depend on the records.
    """
    groups: list[list[int]] = [[]]
    room, static = budget, budget
    for index in range(count):
        items = dataset.plan(index, 0)
        drawn = sum(
            item.tokens(dataset.layout.latent_stride, dataset.layout.vit_patch) + 2
            for item in items
            if item.type == "vae_image" and item.loss
        )
        length = dataset.layout.length(items) + (len(TIMES) - 1) * drawn
        static = max(static, length)
        if length > room and groups[-1]:
            groups.append([])
            room = budget
        groups[-1].append(index)
        room -= length
    groups += [[]] * (-len(groups) % world)
    for group in groups[rank::world]:
        yield {**fixed_pack(dataset, group, TIMES, shift), "static_length": static}


def held_out_losses(
    model: Callable[[Pack], dict[str, Tensor]],
    dataset: UnifiedGenerationDataset,
    encode: Callable[[Pack], Pack],
    config: Config,
    info: DistInfo,
    shift: float,
) -> dict[str, float]:
    """loss (as trained), text_loss (nats a token) and image_loss (mean square of the velocity's error) of the
    validation records; a kind that they do not hold is left out. `shift` is that of the training times.
    """
    training, count = config.training, min(len(dataset), config.training.validation_records)
    totals = torch.zeros(4, dtype=torch.float64)
    packs = held_out_packs(dataset, count, config.data.tokens_per_batch, shift, rank=info.rank, world=info.world)
    for pack in packs:
        losses = model(encode(to_device(pack, info.device)))
        text, image = losses["ce"].double(), losses["mse"].double().mean(-1)
        totals += torch.tensor([text.sum().item(), len(text), image.sum().item(), len(image)], dtype=torch.float64)
    text_sum, text_count, image_sum, image_count = sum_over_ranks(totals).tolist()
    found = {}
    if text_count:
        found["text_loss"] = text_sum / text_count
    if image_count:
        found["image_loss"] = image_sum / image_count
    total = training.text_loss_weight * found.get("text_loss", 0.0)
    return {"loss": total + training.image_loss_weight * found.get("image_loss", 0.0), **found}


@dataclass(frozen=True)
class Conversation:
    """What is given to the model in one record, and what it should answer or draw."""

    inputs: list[Any]  # texts and pictures
    answer: str = ""
    picture: Image.Image | None = None
    size: tuple[int, int] = (0, 0)  # (height, width) of the picture to draw


def conversations(dataset: UnifiedGenerationDataset, most: int) -> tuple[list[Conversation], list[Conversation]]:
    """(records that begin with texts and then draw a picture; records that answer about pictures), at most `most` of
    each, among the first SEARCHED records.
    """
    prompts: list[Conversation] = []
    questions: list[Conversation] = []
    for index in range(min(len(dataset), SEARCHED)):
        if len(prompts) >= most and len(questions) >= most:
            break
        if dataset.records.rows[index]["asks"] and len(questions) >= most:
            continue
        record = dataset.records[index]
        steps = steps_of(record.value, record.kind, Keyed(keyed_generator(0)))
        first = next(number for number, step in enumerate(steps) if step.target)
        given, target = steps[:first], steps[first]
        if not _wanted(given, target, len(prompts) < most, len(questions) < most):
            continue
        inputs = [step.text or "" if step.image is None else _load(record, step.image) for step in given]
        if target.image is not None:
            size = next(item.size for item in dataset.plan(index, 0) if item.type == "vae_image")
            prompts.append(Conversation(inputs, picture=_load(record, target.image), size=size))
        else:
            questions.append(Conversation(inputs, answer=target.text or ""))
    return prompts, questions


def _wanted(given: Sequence[Step], target: Step, prompts: bool, questions: bool) -> bool:
    if target.image is not None:
        return prompts and bool(given) and all(step.image is None for step in given)
    return questions and any(step.image is not None for step in given)


def _load(record: Any, name: str) -> Image.Image:
    return record.source.load(name)


def write_samples(
    inferencer: InterleaveInferencer,
    dataset: UnifiedGenerationDataset,
    folder: Path,
    step: int,
    *,
    most: int,
    writes: bool = True,
) -> None:
    """step_N.png: one picture a prompt; step_N.json: prompts, and questions with the model's and the true answers."""
    prompts, questions = conversations(dataset, most)
    written: dict[str, Any] = {"step": step, "prompts": [case.inputs[-1] for case in prompts], "answers": []}
    pictures: list[Image.Image] = []
    if prompts:
        prompts = [case for case in prompts if case.size == prompts[0].size]
        guidance = Guidance(num_timesteps=25, cfg_text_scale=3.0, cfg_img_scale=1.0)
        pictures = inferencer.draw_batch([case.inputs for case in prompts], guidance, prompts[0].size)
    if questions:
        answers = inferencer.answer_batch([case.inputs for case in questions], max_length=64)
        written["answers"] = [
            {"answer": answer, "true": case.answer} for case, answer in zip(questions, answers, strict=True)
        ]
    if not writes:
        return
    folder.mkdir(parents=True, exist_ok=True)
    if pictures:
        grid(pictures, columns=4, scale=max(1, 128 // max(prompts[0].size))).save(folder / f"step_{step}.png")
    (folder / f"step_{step}.json").write_text(
        json.dumps(written, ensure_ascii=False, indent=1) + "\n", encoding="utf-8"
    )


def grid(pictures: list[Image.Image], *, columns: int, scale: int = 1) -> Image.Image:
    """Pictures in rows, each enlarged by whole pixels."""
    width, height = max(image.width for image in pictures) * scale, max(image.height for image in pictures) * scale
    rows = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (columns * (width + 4), rows * (height + 4)), (255, 255, 255))
    for number, image in enumerate(pictures):
        enlarged = image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)
        sheet.paste(enlarged, (number % columns * (width + 4), number // columns * (height + 4)))
    return sheet
