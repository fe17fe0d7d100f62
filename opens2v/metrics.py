"""Does the generator use the subject picture, and are its videos more than noise? Everything here runs offline.

    python opens2v/metrics.py --checkpoint OUT --output OUT/metrics.json            figures, and OUT/report.html
    python opens2v/metrics.py --checkpoint OUT --eval-json Open-Domain_Eval.json --eval-images FOLDER --output-dir
    VIDEOS
                                                                                     videos <id>.mp4 for OpenS2V-Eval

The clips are the held-back part of every clip of the run (all of it where nothing is held back); the captions call the
subject `subject`, so that only the picture says what it is. "Unseen" are the entries that training left out by
without_keys.
"""

import sys
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import json
from typing import Any, Literal

from shared.config import Section, load_config, setting
from shared.errors import UserError, check_output, command, write_text, written_aside


class MetricsOptions(Section):
    """What to measure."""

    checkpoint: str = setting("", "run folder, checkpoint folder, or model.pt")
    config_path: str | None = setting(None, "settings of the run, when they do not lie beside the checkpoint")
    generator_ckpt: str | None = setting(None, "base weights, when they are not where the run had them")
    output: str | None = setting(None, "metrics.json; null: in the run folder")
    device: str = setting("auto", "auto, cpu, cuda or cuda:N")
    windows: int = setting(3, "windows of every clip whose losses are compared", ge=1)
    seeds: int = setting(5, "noise seeds of the generated videos", ge=1)
    max_clips: int = setting(32, "clips that are looked at", ge=2)
    others: int = setting(2, "other subjects that each clip is drawn with", ge=1)
    steps: int | None = setting(None, "denoising steps; null: 50, small presets 20", ge=1)
    guidance_scale: float | None = setting(None, "guidance; null: 5, small presets 1.5", ge=0)
    use_ema: bool = setting(True, "averaged weights, where the checkpoint has them")
    dtype: Literal["fp32", "bf16"] | None = setting(
        None, "precision of the generator's arithmetic; null: bf16 where the base lies in bf16 and the device has it"
    )
    batch_size: int | None = setting(None, "clips at a time; null: 1, small presets 16", ge=1)
    offload: bool = setting(False, "keep the text encoder on the CPU")
    eval_json: str | None = setting(None, "OpenS2V-Eval prompt file: draw its videos instead of measuring")
    eval_images: str | None = setting(
        None, "folder that the img_paths of --eval-json are relative to; null: that of the file"
    )
    output_dir: str | None = setting(None, "folder of the videos of --eval-json")


def clips_for(config: Any, options: MetricsOptions) -> tuple[Any, list[list[dict]]]:
    """The data set of held-back windows with background, and its samples: windows x clips."""
    from opens2v.dataset import readable_samples, validation_set

    data = config.data.model_copy(update={"without_keys": [], "is_cross_frame": False})
    dataset = validation_set(
        config.model_copy(update={"data": data}), seed=7, load_background=True, generic_caption_probability=1.0
    )
    order = range(len(dataset))
    first = readable_samples(dataset, order, min(len(order), options.max_clips))
    if len(first) < 2:
        raise UserError("the measures compare subjects with one another; the data set has one clip only")
    places = {dataset.identity(index)[1]: index for index in order}
    more = [[dataset.sample(places[item["key"]], window) for item in first] for window in range(1, options.windows)]
    return dataset, [first, *more]


def loss_figures(generator: Any, samples: list[list[dict]], unseen: list[int], chunk: int) -> dict[str, float]:
    """Losses with the own, another's and no subject picture, seen and unseen subjects, and x0 error by noise level."""
    import torch

    from opens2v.data.video import normalise
    from opens2v.dataset import collate_opens2v_batch
    from opens2v.evaluation.subject_use import PairedErrors, paired_errors, subject_region
    from opens2v.sampling.scheduler import FlowMatchScheduler

    config, found, x0 = generator.config, [], {}
    scheduler = FlowMatchScheduler(config.training.timestep_shift)
    with generator.autocast:
        for window, items in enumerate(samples):
            batch = collate_opens2v_batch(items)
            conditions = generator.encoders.conditions(batch)
            region = None
            if "background_pixels" in batch:
                size = tuple(conditions.latents_BCFhw.shape[2:])
                region = subject_region(normalise(batch["frames"]), batch["background_pixels"], size).to(
                    conditions.latents_BCFhw.device
                )
            variance_2C = generator.encoders.codec.variance
            arguments = (generator.module, conditions, region, scheduler, config.model, variance_2C)
            found.append(paired_errors(*arguments, seed=window, chunk=chunk))
            if window == 0:
                for sigma in (0.3, 0.5, 0.7):
                    errors = paired_errors(*arguments, sigmas=(sigma,), seed=window, references="next", chunk=chunk)
                    x0[f"x0_error_sigma_{sigma}"] = sigma**2 * errors.whole_BB.diagonal().mean().item()
    fields = ("subject_BB", "subject_none_B", "whole_BB", "whole_none_B")
    errors = PairedErrors(*(torch.stack([getattr(one, field) for one in found]).mean(0) for field in fields))
    names = [item["key"] for item in samples[0]]
    seen = [index for index in range(len(names)) if index not in unseen]
    figures = {f"seen_{name}": value for name, value in errors.summary(seen, names).items()} if seen else {}
    if unseen:
        figures |= {f"unseen_{name}": value for name, value in errors.summary(unseen, names).items()}
    return figures | x0


class Drawn:
    """Videos of clips with references, drawn in batches with noise by seed; the same (clip, reference, seed) once."""

    def __init__(self, generator: Any, items: list[dict], batch: int):
        from opens2v.data.video import normalise, to_uint8
        from opens2v.dataset import collate_opens2v_batch
        from opens2v.evaluation.preview import reference_picture

        self.generator, self.items, self.batch = generator, items, batch
        self.videos: dict[tuple[int, int, int], Any] = {}
        self.conditions = generator.encoders.conditions(collate_opens2v_batch(items))
        self.backgrounds = [
            to_uint8(item["background_pixels"][:, None])[0] if "background_pixels" in item else None for item in items
        ]
        self.truth = [to_uint8(normalise(item["frames"])) for item in items]
        self.references = [reference_picture(item["ref_pixels"][0]) for item in items]

    def draw(self, jobs: list[tuple[int, int]], seed: int) -> None:
        """Draw (clip, whose reference) pairs; every pair of a clip starts from the same noise."""
        import torch

        from opens2v.data.video import to_uint8
        from opens2v.modules.conditions import Conditions

        for first in range(0, len(jobs), self.batch):
            part = jobs[first : first + self.batch]
            clips, others = (torch.tensor([job[k] for job in part]) for k in (0, 1))
            given = self.conditions.with_references_of(others.to(self.conditions.text_BRD.device))
            conditions = Conditions(
                None, self.conditions.text_BRD[clips], given.clip_BNSC, given.ref_latents_BNChw, given.ref_mask_BN
            )
            # The sampler keys noise by place in the batch; clips of one batch share it by drawing each clip's place.
            videos = self.generator.draw(conditions, places=clips.tolist(), seed=seed)
            for (clip, other), video in zip(part, videos, strict=True):
                self.videos[clip, other, seed] = to_uint8(video)


def video_figures(drawn: Drawn, options: MetricsOptions, unseen: list[int]) -> dict[str, float]:
    """Noise detector, foreground area, motion, and whether a video looks more like its own subject than another's."""
    import numpy as np

    from opens2v.evaluation import subject_use as use

    count = len(drawn.items)
    pairs = [(i, (i + 1 + k) % count) for i in range(count) for k in range(min(options.others, count - 1))]
    for seed in range(options.seeds):
        drawn.draw(sorted({*pairs, *((i, i) for i in range(count))}), seed)
    figures: dict[str, float] = {}
    for group, members in (("seen", [i for i in range(count) if i not in unseen]), ("unseen", unseen)):
        if not members:
            continue
        rows = [(i, drawn.videos[i, i, seed]) for i in members for seed in range(options.seeds)]
        figures[f"{group}_autocorrelation"] = float(np.mean([use.spatial_autocorrelation(video) for _, video in rows]))
        real = [use.spatial_autocorrelation(drawn.truth[i]) for i in members]
        figures[f"{group}_autocorrelation_of_real_clips"] = float(np.mean(real))
        for name in ("motion", "motion_variance"):
            figures[f"{group}_{name}"] = float(np.mean([use.motion(video)[name] for _, video in rows]))
            figures[f"{group}_{name}_of_real_clips"] = float(
                np.mean([use.motion(drawn.truth[i])[name] for i in members])
            )
        usable = {i: ground for i in members if (ground := drawn.backgrounds[i]) is not None}
        if not usable:
            continue
        areas = [
            np.mean([use.foreground_area(drawn.videos[i, i, seed], ground) for seed in range(options.seeds)])
            / max(1e-6, use.foreground_area(drawn.truth[i], ground))
            for i, ground in usable.items()
        ]
        figures[f"{group}_foreground_area_over_truth"] = float(np.median(areas))
        figures[f"{group}_foreground_area_within_half_and_double_percent"] = 100 * float(
            np.mean([0.5 <= a <= 2 for a in areas])
        )
        wins = []
        for i, j in pairs:
            if i not in usable:
                continue
            subject = use.subject_pixels(drawn.references[i])
            for seed in range(options.seeds):
                own, other = (use.colour_likeness(drawn.videos[i, k, seed], usable[i], subject) for k in (i, j))
                wins.append(1.0 if own > other else 0.5 if own == other else 0.0)
        figures[f"{group}_own_subject_wins_percent"] = 100 * float(np.mean(wins))
    return figures


def bars_of(figures: dict[str, float], has_unseen: bool) -> list:
    """The figures that say whether the preset learned, with the targets of the small preset and what chance gives."""
    from shared.report.page import Bar

    area = "foreground area over the truth, median"
    rows: list[tuple[str, str, float | None, Literal["at least", "at most"], float | None]] = [
        ("seen_subject_below_none_percent", "subject region, loss below no reference, %", 5, "at least", 0),
        ("seen_subject_below_other_percent", "subject region, loss below another's reference, %", 6, "at least", 0),
        ("seen_subject_win_percent", "pairs in which the own reference has the lower loss, %", 85, "at least", 50),
        ("seen_whole_below_other_percent", "whole frame, loss below another's reference, %", 3, "at least", 0),
        ("seen_autocorrelation", "spatial autocorrelation of generated frames (noise 0)", 0.85, "at least", 0),
        ("seen_foreground_area_over_truth", f"{area}, lower bound", 0.5, "at least", None),
        ("seen_foreground_area_over_truth", f"{area}, upper bound", 2.0, "at most", None),
        (
            "seen_own_subject_wins_percent",
            "video is nearer to its own subject than to another's, %",
            75,
            "at least",
            50,
        ),
        ("unseen_subject_below_other_percent", "unseen subjects: loss below another's, %", 3, "at least", 0),
        ("unseen_subject_win_percent", "unseen subjects: pairs won, %", 70, "at least", 50),
        ("unseen_own_subject_wins_percent", "unseen subjects: nearer to its own subject, %", None, "at least", 50),
    ]
    return [
        Bar(text, figures.get(name), target, direction, chance)
        for name, text, target, direction, chance in rows
        if has_unseen or name.startswith("seen")
    ]


def write_samples(drawn: Drawn, folder: Path, unseen: list[int], fps: float) -> list:
    """Reference | video files of every clip, and one sheet of all."""
    import numpy as np
    from PIL import Image

    from opens2v.data.video import write_video
    from opens2v.evaluation.preview import side_by_side
    from shared.report.page import Sample

    samples, rows = [], []
    zoom = max(1, 192 // drawn.truth[0].shape[1])
    for i, item in enumerate(drawn.items):
        video = drawn.videos[i, i, 0]
        joined = side_by_side(drawn.references[i], video)
        rows.append(np.concatenate([*drawn.truth[i][[0, -1]], joined[0], *video[1:]], 1))
        name = item["key"].split("_step")[0]
        path = write_video(folder / f"{name}.mp4", joined.repeat(zoom, 1).repeat(zoom, 2), fps)
        what = "unseen subjects" if i in unseen else "seen subjects, later part of the clip"
        samples.append(Sample(path, f"{name}: {item['prompts'][:90]}", f"{what}: reference | video"))
    sheet = np.concatenate(rows).repeat(zoom // 2 or 1, 0).repeat(zoom // 2 or 1, 1)
    with written_aside(folder / "sheet.png") as temporary:
        Image.fromarray(sheet).save(temporary, format="PNG")
    return [
        Sample(folder / "sheet.png", "rows: two true frames, the reference, the generated frames", "overview"),
        *samples,
    ]


def draw_benchmark(options: MetricsOptions, path: Path) -> list[Path]:
    """Videos <id>.mp4 for every entry of an OpenS2V-Eval prompt file; those that are there are passed over."""
    from opens2v.generate import GenerateOptions, Generator, inside, request_of

    if not path.exists():
        raise UserError(f"--eval-json {path}: not found")
    if options.output_dir is None:
        raise UserError("--output-dir is needed: the folder of the videos")
    try:
        entries = json.loads(path.read_text(encoding="utf-8-sig"))
        wanted = {name: (entry["prompt"], entry["img_paths"]) for name, entry in entries.items()}
    except (ValueError, KeyError, AttributeError, TypeError):
        raise UserError(f'--eval-json {path}: expected {{id: {{"prompt": ..., "img_paths": [...]}}}}') from None
    folder, images = Path(options.output_dir), Path(options.eval_images or path.parent)
    requests = []
    for name, (prompt, pictures) in wanted.items():
        where = f"--eval-json {path}, {name}"
        requests.append(request_of(prompt, pictures, inside(folder, f"{name}.mp4", where), where, images))
    generator = Generator(GenerateOptions(**_shared_options(options)))
    for request in requests:
        if not request.output.exists():
            generator.run(request)
    return [request.output for request in requests]


def _shared_options(options: MetricsOptions) -> dict[str, Any]:
    names = "checkpoint config_path generator_ckpt device steps guidance_scale use_ema dtype offload".split()
    return {name: getattr(options, name) for name in names}


@command
def main(argv: list[str] | None = None) -> dict[str, float] | list[Path]:
    options = load_config(MetricsOptions, argv=argv, description=__doc__)
    if not options.checkpoint:
        raise UserError("--checkpoint is needed: a run folder, one of its checkpoints, or a model.pt")
    if options.output:
        check_output(options.output)
    if options.eval_json is not None:
        return draw_benchmark(options, Path(options.eval_json))
    from opens2v.generate import GenerateOptions, Generator
    from opens2v.sampling.video import video_rate
    from shared.report.page import write_report

    generator = Generator(GenerateOptions(**_shared_options(options), sampler="euler"))
    batch = options.batch_size or (1 if generator.config.model.codec == "wan" else 16)
    if generator.config.data.scenes is not None and not generator.config.data.json_paths:
        from opens2v.evaluation.scene_use import measure_scenes

        return measure_scenes(generator, options, batch)
    _, samples = clips_for(generator.config, options)
    held_out = generator.config.data.without_keys
    unseen = [i for i, item in enumerate(samples[0]) if any(text in item["key"] for text in held_out)]
    figures = loss_figures(generator, samples, unseen, batch)
    drawn = Drawn(generator, samples[0], batch)
    figures |= video_figures(drawn, options, unseen)
    output = Path(options.output or Path(options.checkpoint) / "metrics.json")
    text = json.dumps({"checkpoint": str(generator.weights), **figures}, indent=1)
    write_text(output, text)
    run_folder = output.parent
    shown = write_samples(drawn, run_folder / "samples" / "metrics", unseen, video_rate(generator.config))
    write_report(
        run_folder,
        title="OpenS2V: a subject picture becomes a video",
        command=f"python opens2v/train.py --config {run_folder / 'config.yaml'}",
        summary=dict(figures),
        bars=bars_of(figures, bool(unseen)),
        samples=shown,
    )
    for name, value in figures.items():
        print(f"{name}: {value:.4g}")
    return figures


if __name__ == "__main__":
    main()
