"""Held-out losses on fixed noise and times, and samples of a run: pictures for prompts, descriptions of pictures."""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from bagel.config import TrainingConfig
from bagel.data.records import keyed_draw, steps_of
from bagel.data.sources import load_image
from bagel.dataset import UnifiedGenerationDataset
from bagel.inferencer import InterleaveInferencer
from bagel.packing import Draws, Dropout, Pack, PackBuilder
from bagel.sampling.generation import Guidance
from shared.data import to_device
from shared.engine.dist import DistInfo, sum_over_ranks
from shared.rng import keyed_generator

VALIDATION_SEED = 314_159
TIMES = (0.1, 0.3, 0.5, 0.7, 0.9)  # whatever the shift of training, so that runs compare
RECORDS_A_PACK = 8


def fixed_pack(dataset: UnifiedGenerationDataset, indices: Sequence[int], t: float, shift: float) -> Pack:
    """Records as a pack, nothing left out, their pictures at time t of a model trained with `shift`, their noise a
    function of the index.

    No index: an empty pack, for ranks that have no record left.
    """
    raw = math.log(t / (1 - t)) - math.log(shift)  # the shift adds its logarithm to the logit of the time
    builder = PackBuilder(dataset.layout)
    for index in indices:
        items = dataset.sample(index, 0)["items"]
        draws = Draws([1.0] * len(items), iter([raw] * len(items)), keyed_generator(VALIDATION_SEED, index))
        builder.add(items, draws, Dropout())
    return builder.pack()


def held_out_losses(
    model: Callable[[Pack], dict[str, Tensor]],
    dataset: UnifiedGenerationDataset,
    encode: Callable[[Pack], Pack],
    training: TrainingConfig,
    info: DistInfo,
    shift: float,
) -> dict[str, float]:
    """loss (as trained), text_loss (nats a token) and image_loss (mean square of the velocity's error) of the
    validation records; `shift` is that of the training times.
    """
    count = min(len(dataset), training.validation_records)
    totals = torch.zeros(4, dtype=torch.float64)
    for first in range(0, count, RECORDS_A_PACK * info.world):
        start = first + info.rank * RECORDS_A_PACK
        indices = range(start, min(start + RECORDS_A_PACK, count))
        for number, t in enumerate(TIMES):
            pack = encode(to_device(fixed_pack(dataset, indices, t, shift), info.device))
            losses = model(pack)
            if number == 0:  # text does not depend on the time of pictures, which no later token sees
                totals[:2] += torch.tensor([losses["ce"].double().sum().item(), len(losses["ce"])], dtype=torch.float64)
            totals[2:] += torch.tensor(
                [losses["mse"].double().mean(-1).sum().item(), len(losses["mse"])], dtype=torch.float64
            )
    text_sum, text_count, image_sum, image_count = sum_over_ranks(totals).tolist()
    text, image = text_sum / max(1.0, text_count), image_sum / max(1.0, image_count)
    return {
        "loss": training.text_loss_weight * text + training.image_loss_weight * image,
        "text_loss": text,
        "image_loss": image,
    }


@dataclass(frozen=True)
class Conversation:
    """What is given to the model in one record, and what it should answer or draw."""

    inputs: list[Any]  # texts and pictures
    answer: str = ""
    picture: Image.Image | None = None
    size: tuple[int, int] = (0, 0)  # (height, width) of the picture to draw


def conversations(dataset: UnifiedGenerationDataset, most: int) -> tuple[list[Conversation], list[Conversation]]:
    """(records that begin with texts and then draw a picture; records that answer about pictures), at most `most` of
    each.
    """
    prompts: list[Conversation] = []
    questions: list[Conversation] = []
    for index, record in enumerate(dataset.records):
        steps = steps_of(record.value, record.kind, keyed_draw(keyed_generator(0)))
        first = next(number for number, step in enumerate(steps) if step.target)
        given, target = steps[:first], steps[first]
        load = (
            [step.text if step.image is None else _load(record, step.image) for step in given]
            if _wanted(given, target, len(prompts) < most, len(questions) < most)
            else None
        )
        if load and target.image is not None:
            size = next(item.size for item in dataset.plan(index, 0) if item.type == "vae_image")
            prompts.append(Conversation(load, picture=_load(record, target.image), size=size))
        elif load:
            questions.append(Conversation(load, answer=target.text))
    return prompts, questions


def _wanted(given: list[Any], target: Any, prompts: bool, questions: bool) -> bool:
    if target.image is not None:
        return prompts and bool(given) and all(step.image is None for step in given)
    return questions and any(step.image is not None for step in given)


def _load(record: Any, name: str) -> Image.Image:
    return load_image(record.source.picture(name))


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
        pictures = inferencer.generate_batch(
            [case.inputs for case in prompts],
            image_shapes=prompts[0].size,
            guidance=Guidance(num_timesteps=25, cfg_text_scale=3.0, cfg_img_scale=1.0),
        )
    if questions:
        answers = inferencer.generate_batch(
            [case.inputs for case in questions], understanding_output=True, max_length=64
        )
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
