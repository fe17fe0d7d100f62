"""What `metrics.py` measures. Every figure stands beside the trivial answer that it has to beat."""

import json
from collections import Counter
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from bagel.config import Config, MetricsOptions
from bagel.data.scenes import SceneFile
from bagel.dataset import UnifiedGenerationDataset, open_dataset
from bagel.evaluation.pictures import (
    Judges,
    clip_score,
    colour_agreement,
    consistency,
    fid,
    named_colour_agreement,
)
from bagel.evaluation.scenes import scene_bars, scene_figures, scene_headline
from bagel.evaluation.text import bert_score, bleu, guarded, meteor, ngram_baselines, rouge
from bagel.evaluation.validation import Conversation, conversations, fixed_pack, grid, held_out_packs
from bagel.objective import with_latents
from bagel.packing import Draws, Dropout, Pack, PackBuilder, PlanItem
from bagel.sampling.generation import Guidance
from bagel.weights.open import Opened
from shared.data import to_device
from shared.errors import UserError
from shared.report.page import Bar, Sample, write_report
from shared.rng import keyed_generator

CANDIDATES = 10  # captions of which the right one must be first
_CANDIDATES = 321  # random stream


Figures = dict[str, Any]  # by name; what cannot be computed is None, with the reason under name_reason
SampleFiles = list[tuple[Path, str, str]]  # (file, caption, group)


def evaluate(opened: Opened, options: MetricsOptions, judges: Judges, folder: Path) -> tuple[Figures, SampleFiles]:
    """Everything that these records allow. Files go into `folder`. At most max_records of each set are used."""
    held_out, train = _datasets(opened, options)
    figures: Figures = {
        "checkpoint": str(options.checkpoint),
        "records": min(len(held_out), options.max_records),
    }
    figures |= held_out_figures(opened, held_out, train, options)
    figures |= _best_of_run(opened, figures)
    folder.mkdir(parents=True, exist_ok=True)
    samples: SampleFiles = []
    composed = next((source for source in held_out.records.sources if isinstance(source, SceneFile)), None)
    if composed is not None:  # their truth is known: everything is counted
        return figures | scene_figures(opened, composed, options, folder, samples), samples
    if train is not None:
        figures |= ranking_figures(opened, train, None, options.max_records)
        ranked = ranking_figures(opened, held_out, train, options.max_records)
        figures |= {f"held_out_{name}": value for name, value in ranked.items()}
    figures |= answer_figures(opened, held_out, options, judges, folder, samples)
    sets = [("held_out", held_out)] + ([("train", train)] if train is not None else [])
    for name, dataset in sets:
        figures |= {
            f"{name}_{key}": value
            for key, value in picture_figures(opened, dataset, options, judges, folder, name, samples).items()
        }
    return figures, samples


def _datasets(
    opened: Opened, options: MetricsOptions
) -> tuple[UnifiedGenerationDataset, UnifiedGenerationDataset | None]:
    """(held-out records, training records for baselines)."""
    config = (opened.config or Config(data=opened.data)).model_copy(deep=True)
    data = config.data
    held_out, train = options.data or data.val_data_path, options.train_data or data.train_data_path
    if held_out is None:
        raise UserError("no records to evaluate: give --data FILE")
    data.flip_probability = 0.0
    data.image_root = options.image_root or data.image_root

    def opens(path: str) -> UnifiedGenerationDataset:
        return open_dataset(config, opened.model_config, opened.tokenizer, path)

    return opens(held_out), None if train is None else opens(train)


def _encoded(opened: Opened, pack: Pack) -> Pack:
    device = next(opened.model.parameters()).device
    return with_latents(to_device(pack, device), opened.autoencoder, opened.model_config)


# --- held-out losses --------------------------------------------------------------------------------------------------


@torch.no_grad()
def held_out_figures(
    opened: Opened, dataset: UnifiedGenerationDataset, train: UnifiedGenerationDataset | None, options: MetricsOptions
) -> Figures:
    """Nats a text token and the velocity loss, with n-gram and constant predictors fitted to the training records."""
    text: list[float] = []
    images: list[float] = []
    constant: list[float] = []
    means = _mean_latents(opened, train, options) if train is not None else {}
    count, shift = min(len(dataset), options.max_records), opened.model_config.timestep_shift
    for pack in held_out_packs(dataset, count, options.tokens_per_batch, shift):
        pack = _encoded(opened, pack)
        losses = opened.model(pack)
        text += losses["ce"].tolist()
        images += losses["mse"].mean(-1).tolist()
        constant += _constant_errors(pack, means)
    figures: Figures = {
        "text_loss": _mean(text),
        "text_tokens": len(text),
        "image_loss": _mean(images),
        "image_loss_constant": _mean(constant),
    }
    if images and constant:
        figures["image_ratio"] = figures["image_loss"] / figures["image_loss_constant"]
    if train is not None and text:
        known, asked = _answers(train, options.baseline_records), _answers(dataset, options.max_records)
        if known and asked:
            baselines = ngram_baselines(known, asked, opened.tokenizer.vocab_size)
            figures |= {f"text_loss_{name}": value for name, value in baselines.items()}
            figures["text_below_unigram"] = 1 - figures["text_loss"] / baselines["unigram"]
    return figures


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _answers(dataset: UnifiedGenerationDataset, most: int) -> list[list[int]]:
    """The learned texts of the first records, with their closing mark."""
    return [
        [*item.ids, dataset.layout.tokens.eos]
        for index in range(min(len(dataset), most))
        for item in dataset.plan(index, 0)
        if item.type == "text" and item.loss
    ]


def _mean_latents(
    opened: Opened, train: UnifiedGenerationDataset, options: MetricsOptions
) -> dict[tuple[int, int], Tensor]:
    """The mean training picture of every latent size: what a predictor that ignores its input knows of a picture."""
    sums: dict[tuple[int, int], Tensor] = {}
    counts: Counter[tuple[int, int]] = Counter()
    for index in range(min(len(train), options.max_records)):
        pack = _encoded(opened, fixed_pack(train, [index], 0.5, 1.0))
        for shape, latents, target in _by_picture(pack):
            if target:
                sums[shape] = sums.get(shape, torch.zeros_like(latents)) + latents
                counts[shape] += 1
    return {shape: total / counts[shape] for shape, total in sums.items()}


def _by_picture(pack: Pack) -> list[tuple[tuple[int, int], Tensor, bool]]:
    """(latent size, latents (N, C), whether it is to be generated) of every picture of a pack."""
    shapes = [tuple(shape) for shape in pack["patchified_vae_latent_shapes"]]
    counts = [rows * columns for rows, columns in shapes]
    times = pack["packed_timesteps"].split(counts)
    return [
        (shape, latents, bool(torch.isfinite(time[0])))
        for shape, latents, time in zip(shapes, pack["packed_latents"].split(counts), times, strict=True)
    ]


def _constant_errors(pack: Pack, means: dict[tuple[int, int], Tensor]) -> list[float]:
    """Squared error of every target token when the velocity is always predicted as minus the mean picture."""
    errors: list[float] = []
    first = 0
    for shape, latents, target in _by_picture(pack):
        if target:
            velocity = pack["packed_noise"][first : first + len(latents)] - latents
            mean = means.get(shape, torch.zeros_like(latents))
            errors += (velocity + mean).square().mean(-1).tolist()
        first += len(latents)
    return errors


def _best_of_run(opened: Opened, figures: Figures) -> Figures:
    """The least held-out text loss that the run logged, apart from that of the weights evaluated here."""
    from shared.log import read_metrics

    if opened.config is None:
        return {}
    rows = read_metrics(Path(opened.config.run.output_dir) / "metrics.jsonl")
    found = [(row["val/text_loss"], row["step"]) for row in rows if row.get("val/text_loss") is not None]
    if not found or not min(found)[0]:
        return {}
    best, step = min(found)
    extra = (
        {"best_text_below_unigram": 1 - best / figures["text_loss_unigram"]} if "text_loss_unigram" in figures else {}
    )
    return {"best_text_loss": best, "best_text_step": step, **extra}


# --- captions ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def ranking_figures(
    opened: Opened, dataset: UnifiedGenerationDataset, others: UnifiedGenerationDataset | None, most: int = 256
) -> Figures:
    """How often the right caption of a picture is the likeliest of ten, by mean log probability a token (chance 0.1).

    The nine others are captions of other pictures of the same records, and of `others` where those are too few. On
    training pictures this measures memory, on held-out pictures understanding. The first `most` such records count.
    """
    cases = _described(dataset, most)
    pool = [answer for _, _, answer in cases]
    pool += [answer for _, _, answer in _described(others, most)] if others is not None else []
    pool = [list(answer) for answer in dict.fromkeys(map(tuple, pool))]
    if len(pool) < CANDIDATES or not cases:
        return {
            "caption_first_of_10": None,
            "caption_first_of_10_reason": "fewer than ten different captions of pictures",
        }
    first = 0
    for number, (index, items, answer) in enumerate(cases):
        order = torch.randperm(len(pool), generator=keyed_generator(_CANDIDATES, number)).tolist()
        distractors = islice((pool[i] for i in order if pool[i] != answer), CANDIDATES - 1)
        losses = _mean_nats(opened, dataset, index, len(items), [answer, *distractors])
        first += losses[0] < min(losses[1:])
    return {"caption_first_of_10": first / len(cases), "caption_pictures": len(cases)}


def _described(dataset: UnifiedGenerationDataset, most: int) -> list[tuple[int, list[PlanItem], list[int]]]:
    """(index, items before the answer, answer) of the first records that answer about a given picture."""
    found = []
    for index in np.flatnonzero(dataset.records.rows["asks"])[:most].tolist():
        items = dataset.plan(index, 0)
        first = next(number for number, item in enumerate(items) if item.loss)
        found.append((index, items[:first], items[first].ids))
    return found


def _mean_nats(
    opened: Opened, dataset: UnifiedGenerationDataset, index: int, given: int, answers: list[list[int]]
) -> list[float]:
    """Nats a token of each answer to the first `given` items of a record, all in one pack."""
    loaded = dataset.sample(index, 0)["items"][:given]
    builder = PackBuilder(dataset.layout)
    for answer in answers:
        plan = [*loaded, PlanItem("text", ids=answer, loss=1)]
        builder.add(plan, Draws([1.0] * len(plan), iter(()), keyed_generator(_CANDIDATES)), Dropout())
    nats = opened.model(_encoded(opened, builder.pack()))["ce"].split([len(answer) + 1 for answer in answers])
    return [each.mean().item() for each in nats]


def answer_figures(
    opened: Opened,
    dataset: UnifiedGenerationDataset,
    options: MetricsOptions,
    judges: Judges,
    folder: Path,
    samples: SampleFiles,
) -> Figures:
    """Generated answers about held-out pictures against the true ones."""
    _, questions = conversations(dataset, options.max_records)
    if not questions:
        return {"bleu": None, "bleu_reason": "no record asks about a picture"}
    inferencer = opened.inferencer(seed=options.seed)
    answers = inferencer.answer_batch([case.inputs for case in questions], options.max_length)
    true = [case.answer for case in questions]
    shown = []
    for number, (case, answer) in enumerate(zip(questions[:8], answers, strict=False)):
        picture = next(item for item in case.inputs if not isinstance(item, str))
        path = folder / f"described_{number}.png"
        picture.resize((128, 128)).save(path)
        samples.append((path, f"model: {answer} | true: {case.answer}", "held-out pictures described"))
        shown.append({"answer": answer, "true": case.answer})
    (folder / "answers.json").write_text(json.dumps(shown, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    return {
        **guarded(lambda: bleu(answers, true), "bleu"),
        **guarded(lambda: rouge(answers, true), "rouge"),
        **guarded(lambda: meteor(answers, true, options.nltk_data), "meteor"),
        **guarded(lambda: bert_score(answers, true, judges.bert), "bertscore_f1"),
        **guarded(
            lambda: {f"caption_{name}": value for name, value in named_colour_agreement(answers, true).items()},
            "caption_colour_named",
        ),
    }


# --- pictures ---------------------------------------------------------------------------------------------------------


def picture_figures(
    opened: Opened,
    dataset: UnifiedGenerationDataset,
    options: MetricsOptions,
    judges: Judges,
    folder: Path,
    name: str,
    samples: SampleFiles,
) -> Figures:
    """Pictures drawn from prompts, against the true pictures of the prompts."""
    prompts, _ = conversations(dataset, options.max_pictures)
    if not prompts:
        return {"colour_agreement": None, "colour_agreement_reason": "no record draws a picture from a text"}
    drawn = draw_prompts(opened, prompts, options)
    true = [case.picture for case in prompts if case.picture is not None]  # a prompt comes with its picture
    pairs = [
        picture for pair in zip(drawn, (image.resize(drawn[0].size) for image in true), strict=True) for picture in pair
    ]
    path = folder / f"{name}_pictures.png"
    grid(pairs, columns=8, scale=max(1, 96 // drawn[0].height)).save(path)
    texts = [case.inputs[-1] for case in prompts]
    samples.append(
        (path, "drawn and true, in pairs: " + "; ".join(texts), f"pictures for {name.replace('_', '-')} prompts")
    )
    described = opened.inferencer(seed=options.seed).answer_batch([[picture] for picture in drawn], options.max_length)
    return {
        **guarded(lambda: clip_score(texts, drawn, judges.clip), "clip_score"),
        **guarded(lambda: colour_agreement(drawn, true), "colour_agreement"),
        **guarded(lambda: fid(drawn, true, judges.features), "fid"),
        **consistency(texts, drawn, described, [], judges.clip, described),
    }


def draw_prompts(opened: Opened, prompts: "Sequence[Conversation]", options: MetricsOptions) -> list[Image.Image]:
    """One picture a prompt, in batches of one size."""
    guidance = Guidance(num_timesteps=options.num_timesteps, cfg_text_scale=options.cfg_text_scale, cfg_img_scale=1.0)
    drawn: dict[int, Image.Image] = {}
    for size in dict.fromkeys(case.size for case in prompts):
        members = [number for number, case in enumerate(prompts) if case.size == size]
        inferencer = opened.inferencer(seed=options.seed)
        pictures = inferencer.draw_batch([prompts[number].inputs for number in members], guidance, size)
        drawn |= dict(zip(members, pictures, strict=True))
    return [drawn[number] for number in range(len(prompts))]


# The report of an evaluated run: what was reached, what it is compared with, and what the samples are.


REMARK = (
    "Pictures and descriptions come from held-out records unless a group says otherwise. The text of so small a set is "
    "soon overfitted: the least held-out text loss of the run and that of the evaluated weights are given apart."
)


def text_bars(figures: Figures) -> list[Bar]:
    """Held-out text in nats a token, beside what counting the training answers can do."""
    unigram, trigram = figures.get("text_loss_unigram"), figures.get("text_loss_3-gram")
    best = figures.get("best_text_loss", figures.get("text_loss"))
    target = None if unigram is None else 0.4 * unigram
    last = figures.get("text_loss")
    return [
        Bar("held-out text, best validation", best, target, "at most", unigram, "target: 60 % below the unigram"),
        Bar("held-out text, best validation", best, trigram, "at most", trigram, "target: the Kneser-Ney 3-gram"),
        Bar("held-out text, weights evaluated", last, None, "at most", unigram, "overfits late"),
    ]


def bars_of(figures: Figures) -> list[Bar]:
    """The figures that the small preset is meant to reach, each with its trivial baseline."""
    if "scenes" in figures:
        return scene_bars(figures)
    get = figures.get
    shuffled = [get(f"{name}_colour_agreement_shuffled") for name in ("train", "held_out")]
    notes = [f"shuffled p = {get(f'{name}_colour_agreement_p')}" for name in ("train", "held_out")]
    seen, unseen = get("caption_first_of_10"), get("held_out_caption_first_of_10")
    colours = [get(f"{name}_colour_agreement") for name in ("train", "held_out")]
    return [
        *text_bars(figures),
        Bar("held-out velocity loss over the constant predictor's", get("image_ratio"), 0.40, "at most", 1.0),
        Bar("right caption first of ten, training pictures", seen, 0.60, "at least", 0.1, "memorisation"),
        Bar("right caption first of ten, held-out pictures", unseen, None, "at least", 0.1),
        Bar("colour agreement, training prompts", colours[0], shuffled[0], "at least", shuffled[0], notes[0]),
        Bar("colour agreement, held-out prompts", colours[1], None, "at least", shuffled[1], notes[1]),
    ]


def write_bagel_report(folder: Path, figures: Figures, samples: SampleFiles, command: str) -> None:
    """report.json, report.md and report.html in `folder`."""
    summary = {
        name: f"null: {figures.get(f'{name}_reason', 'not computed')}" if value is None else value
        for name, value in figures.items()
        if not name.endswith("_reason")
    }
    write_report(
        folder,
        title="BAGEL: text and pictures in one model",
        command=command,
        summary=summary,
        bars=bars_of(figures),
        samples=[Sample(path.relative_to(folder), caption, group) for path, caption, group in samples],
        curves=["train/text_loss", "train/image_loss", "val/text_loss", "val/image_loss"],
        text="" if "scenes" in figures else REMARK,  # scenes are composed anew: nothing is overfitted
        headline=scene_headline(figures) if "scenes" in figures else "",
    )
