"""Measure a trained DiT on pictures that it did not see, and write the run's report.

  python dit/metrics.py --checkpoint outputs/dit --output outputs/dit/metrics.json
  python dit/metrics.py --checkpoint OUT --metrics loss,caption,fid --inception-weights FILE.pth
  python dit/metrics.py --pictures pictures/ --reference VIRTUAL_imagenet256_labeled.npz --inception-weights FILE.pth

scenes, loss, caption, recon, vae, colour and memory need no download; scenes counts what is right in drawn scenes. fid
(FID, sFID, Inception score, precision, recall, KID) needs the Inception weights, clip a CLIP model; both say what to
provide. Under torchrun the work is shared.
"""

import functools
import json
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from dit.config import METRICS, DrawOptions, GenerateOptions, MetricsOptions
from shared.config import load_config
from shared.errors import UserError, check_output, command

if __name__ == "__main__" and {"-h", "--help"} & set(sys.argv):
    load_config(MetricsOptions, description=__doc__)

import numpy as np
import torch
from torch import Tensor

from dit.data.cache import key_of
from dit.data.scenes import SceneDataset
from dit.dataset import TextImageDataset, spread, spread_captions, unit
from dit.evaluation.figures import Extractor, Pictures, RandomFeatures, figures, psnr, reference_of, ssim
from dit.evaluation.held_out import errors, held_out_noise, prepare, readable
from dit.evaluation.scenes import scene_bars, scene_figures, scene_grid, scene_headline
from dit.generate import Drawer, Request, batches_of, draw_folder, guidance
from dit.sampling.drawing import grid, to_uint8
from dit.weights.open import Trained, load_asked, run_of
from shared.engine.dist import DistInfo, gather_objects, init_distributed, shutdown
from shared.errors import write_text
from shared.media.inception import FIDInception, ScriptedFeatures, inception
from shared.metrics import ClipScorer, agreement, clip_score, colour_caption, paired_p
from shared.report.page import Bar, Sample, write_report

OF_PICTURES = ["loss", "caption", "recon", "vae", "colour", "memory"]  # what --metrics auto measures
OF_SCENES = ["scenes", "loss", "caption", "recon", "vae"]


class Measurement:
    """One evaluation: the held-out pictures, the drawn ones (made when first wanted), and a method for every metric."""

    def __init__(
        self,
        trained: Trained,
        measured: TextImageDataset,
        options: MetricsOptions,
        info: DistInfo,
        scorer: ClipScorer | None = None,
    ) -> None:
        self.trained, self.options, self.info, self.scorer = trained, options, info, scorer
        self.training_set = measured if options.split == "train" else measured_set(options, trained, "train")
        self.measured: Any = measured  # a SceneDataset has the same methods
        self.held = prepare(
            measured, self.training_set, trained.codec, trained.text_encoder, count=options.count, device=info.device
        )
        self._drawn: np.ndarray | None = None
        self._found: dict[str, Tensor] = {}

    def loss(self) -> dict:
        """Held-out loss at fixed levels, against the constant predictor."""
        right, constant = self._errors("right"), self._errors("constant")
        return {
            "mean": right.mean().item(),
            "constant": constant.mean().item(),
            "ratio": (right.mean() / constant.mean()).item(),
            "by_level": dict(zip(map(str, self._levels()), right.mean(1).tolist(), strict=True)),
            "ratio_by_level": dict(
                zip(map(str, self._levels()), (right.mean(1) / constant.mean(1)).tolist(), strict=True)
            ),
        }

    def caption(self) -> dict:
        """What a wrong caption and none cost, for the first captions and for those that name colours ("described")."""
        if not self.held.condition:
            raise UserError("--metrics caption: this model reads neither captions nor labels")
        right, shuffled = self._errors("right"), self._errors("shuffled")
        found = {
            "shuffled_cost_percent": 100 * (shuffled.mean() / right.mean() - 1).item(),
            "p": paired_p((shuffled - right).mean(0)),
        }
        if self.trained.config.can_guide:
            null = self._errors("null")
            found["null_cost_percent"] = 100 * (null.mean() / right.mean() - 1).item()
            found["null_p"] = paired_p((null - right).mean(0))
        if self.trained.text_encoder is not None:
            if self.held.prompts != self.held.captions:
                described = self.held._replace(condition=self.held.prompt_condition)
                right, shuffled = (
                    errors(self.trained.model, self.trained.objective, described, self.info, kind=kind)
                    for kind in ("right", "shuffled")
                )
            found["described_cost_percent"] = 100 * (shuffled.mean() / right.mean() - 1).item()
            found["described_p"] = paired_p((shuffled - right).mean(0))
        return found

    @torch.no_grad()
    def recon(self) -> dict:
        """The clean latent predicted in one step from every level: its error, and the picture's PSNR."""
        objective, held, found = self.trained.objective, self.held, {}
        for row, level in enumerate(objective.levels):
            t_B = torch.full((len(held.latents),), level, device=held.latents.device)
            noise = held_out_noise(held.latents, row, torch.arange(len(held.latents)))
            noisy = objective.noisy(held.latents, noise, t_B)
            parts = []
            for part in torch.arange(len(noisy)).split(32):
                x, t, rows = noisy[part], t_B[part], {name: value[part] for name, value in held.condition.items()}
                parts.append(objective.clean(self.trained.model(x, objective.model_time(t), **rows), x, t))
            clean = torch.cat(parts)
            found[str(round(level, 4))] = {
                "latent_mse": (clean - held.latents).square().mean().item(),
                "psnr": psnr(self._decode(clean), held.images),
            }
        return found

    def vae(self) -> dict:
        """Round trip through the codec: the ceiling of any result."""
        back = self._decode(self.held.latents)
        return {"psnr": psnr(back, self.held.images), "ssim": ssim(back, self.held.images)}

    def scenes(self) -> dict:
        """What is right in drawn scenes: object, ground, place, size; squared error and seams against the true ones."""
        if not isinstance(self.measured, SceneDataset):
            raise UserError("--metrics scenes: this run's pictures are not composed, so nobody knows what is right")
        config = self.trained.config
        return scene_figures(self.measured, self.drawn, config.vae_factor * config.model.patch_size)

    def colour(self) -> dict:
        """Whether drawn pictures show the colours of their captions; the real pictures' figure is the ceiling."""
        return {
            "drawn": agreement(self.drawn, self.held.prompts),
            "real": agreement(to_uint8(self.held.images), self.held.prompts),
        }

    def memory(self) -> dict:
        """Distance of drawn pictures to the nearest training picture; far below that of held-out ones: memorised."""
        seen = unit(torch.stack([sample["image"] for sample in readable(self.training_set, 2048)])).flatten(1)
        seen = torch.cat([seen, seen.unflatten(1, self.held.images.shape[1:]).flip(3).flatten(1)])
        drawn = torch.from_numpy(self.drawn).permute(0, 3, 1, 2).float().flatten(1) / 127.5 - 1
        scale = seen.shape[1] ** 0.5
        nearest = [
            torch.cdist(rows, seen).min(1).values.div(scale).mean().item()
            for rows in (drawn, self.held.images.flatten(1))
        ]
        return {"drawn_to_training": nearest[0], "held_out_to_training": nearest[1]}

    def clip(self) -> dict:
        """Mean of max(100 cos(picture, caption), 0), and how often the right caption comes first of all."""
        return clip_score(list(self.drawn), self.held.prompts, self.scorer, device=self.info.device)

    @property
    def drawn(self) -> np.ndarray:
        """One picture (S, S, 3) uint8 for every held-out caption, drawn by all ranks together."""
        if self._drawn is None:
            labels = self.held.condition.get("labels")
            wanted = [
                Request(row, prompt, None if labels is None else int(labels[row]), self.options.seed + row)
                for row, prompt in enumerate(self.held.prompts)
            ]
            drawer = drawer_of(self.trained, self.options, self.info)
            parts = batches_of(wanted, self.options.batch_size, self.info)
            mine = [(part[0].number, drawer.pictures(drawer.latents(part))) for part in parts]
            pairs = sorted((pair for rank in gather_objects(mine) for pair in rank), key=lambda pair: pair[0])
            self._drawn = np.concatenate([pictures for _, pictures in pairs])
        return self._drawn

    def _errors(self, kind: str) -> Tensor:
        if kind not in self._found:
            self._found[kind] = errors(self.trained.model, self.trained.objective, self.held, self.info, kind=kind)
        return self._found[kind]

    def _levels(self) -> list[float]:
        return [round(level, 4) for level in self.trained.objective.levels]

    def _decode(self, latents: Tensor) -> Tensor:
        with torch.no_grad():
            return torch.cat([self.trained.codec.decode(part).cpu().float() for part in latents.split(16)])


def report(measurement: Measurement, found: dict, options: MetricsOptions, run_folder: Path) -> None:
    """The run's report with its bars, a grid of drawn pictures and the true ones beside it."""
    held, samples, bars = measurement.held, [], []
    folder = run_folder / "samples"
    folder.mkdir(parents=True, exist_ok=True)
    composed = isinstance(measurement.measured, SceneDataset)
    if composed:
        samples.append(scene_grid(measurement.measured, measurement.drawn, folder / "scenes.png"))
    if "scenes" in found:
        bars += scene_bars(measurement.measured, found["scenes"], found.get("caption", {}))
    if "loss" in found:
        bars.append(Bar("held-out loss / constant predictor's", found["loss"]["ratio"], 0.35, "at most", baseline=1.0))
    if "caption" in found:
        bars.append(Bar("shuffled captions cost (%)", found["caption"]["shuffled_cost_percent"], 3.0, baseline=0.0))
        bars.append(Bar("p of that cost", found["caption"]["p"], 0.01, "at most"))
        if "null_cost_percent" in found["caption"]:
            cost, p = (found["caption"][name] for name in ("null_cost_percent", "null_p"))
            bars.append(Bar("no caption costs (%)", cost, 0.0, baseline=0.0, note=f"p {p:.4f}"))
    if "own" in found.get("colour", {}).get("drawn", {}):
        drawn, real = found["colour"]["drawn"], found["colour"]["real"]
        bars.append(
            Bar(
                "caption colour agreement of drawn pictures",
                drawn["own"],
                drawn["shuffled"],
                baseline=drawn["shuffled"],
                note=f"p {drawn['p']:.4f}; real pictures {real['own']:.3f}",
            )
        )
    if not composed:
        count = min(24, len(held.images))
        drawn, real = measurement.drawn[:count], to_uint8(held.images[:count])
        grid(drawn, columns=8, enlarge=2).save(folder / "drawn.png")
        grid(real, columns=8, enlarge=2).save(folder / "real.png")
        samples.append(
            Sample(folder / "drawn.png", f"drawn for held-out captions: {'; '.join(held.prompts[:8])}; ...", "drawn")
        )
        samples.append(Sample(folder / "real.png", "the held-out pictures of the same captions", "real"))
    summary = {
        f"{name}.{key}": value
        for name, group in found.items()
        for key, value in group.items()
        if isinstance(value, int | float | str)
    }
    write_report(
        run_folder,
        title="DiT: text to image",
        command="python dit/metrics.py "
        + shlex.join(
            f"--{key.replace('_', '-')}={value}" for key, value in options.model_dump(exclude_defaults=True).items()
        ),
        summary=summary,
        bars=bars,
        samples=samples,
        curves=["train/loss", "val/loss", "val/constant_loss"],
        headline=scene_headline(found["scenes"]) if "scenes" in found and not measurement.measured.is_train else "",
    )


class HeldOutPictures(Pictures):
    """Pictures of a data set, cut to the run's size; read when asked for."""

    def __init__(self, dataset: TextImageDataset, count: int) -> None:
        self.dataset, self.array, self.files = dataset, None, []
        self.indices = sorted(spread(dataset, count)[:count])
        self.name = f"{len(self.indices)} pictures of {dataset.root}"

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> np.ndarray:
        return self.dataset.sample(self.indices[index], 0, flip=False)["image"].permute(1, 2, 0).numpy()


def paper_figures(
    options: MetricsOptions,
    extractor: Extractor,
    trained: Trained | None,
    measured: Callable[[], TextImageDataset],
    info: DistInfo,
) -> dict:
    """FID and its relatives of a folder, an .npz or a checkpoint's pictures, in flat memory and shared over the ranks.

    A checkpoint's pictures are drawn into the run's folder first: the same command again draws what is missing.
    """
    about: dict = {}
    if options.pictures is not None:
        made = Pictures(options.pictures)
    else:
        assert trained is not None  # main() asks for one or the other
        drawer = drawer_of(trained, options, info)
        key = key_of([drawer.settings(), options.count, options.seed, options.split, options.data_root])
        folder = run_of(trained.folder) / f"drawn_{key}"
        draw_folder(drawer, _requests(options, trained, measured), folder, info)
        made, about = Pictures(folder), {"folder": str(folder), **drawer.settings()}
    if options.reference is not None:
        reference = reference_of(options.reference, extractor, info)
    else:
        reference = reference_of(HeldOutPictures(measured(), options.count), extractor, info)
    found = figures(extractor.all(made, info), reference)
    return {
        **found,
        "pictures": len(made),
        "pictures_sha256": made.digest(),
        "reference": reference.name,
        "reference_pictures": reference.pictures,
        "features": extractor.name,
        **about,
    }


def _requests(options: MetricsOptions, trained: Trained, measured: Callable[[], TextImageDataset]) -> list[Request]:
    """`count` pictures: evenly over the classes, or for the captions in turn, each with the seed of its number."""
    classes, numbers = trained.config.model.num_classes, range(options.count)
    if classes is not None:
        labels = [number * classes // options.count for number in numbers]
        return [Request(n, f"class {label}", label, options.seed + n) for n, label in zip(numbers, labels, strict=True)]
    if trained.text_encoder is None:
        return [Request(number, "", None, options.seed + number) for number in numbers]
    captions = [colour_caption(texts) for texts in spread_captions(measured(), options.count)]
    return [Request(number, captions[number % len(captions)], None, options.seed + number) for number in numbers]


def measured_set(options: MetricsOptions, trained: Trained | None, split: str) -> TextImageDataset:
    """The pictures of a split that a run is measured on, or compared with."""
    assert trained is not None  # --pictures without --checkpoint comes with a --reference
    config = trained.config
    place = options.data_root or config.data.dataset_path
    data = config.data.model_copy(update={"dataset_path": place, "cache_dir": None, "buckets": False})  # all square
    dataset = TextImageDataset.from_config(config.model_copy(update={"data": data}), is_train=split == "train")
    if len(dataset) < 2:
        raise UserError(
            f"--split {split}: {len(dataset)} pictures; set data.val_fraction when training, or use --split train"
        )
    return dataset


def drawer_of(trained: Trained, options: MetricsOptions, info: DistInfo) -> Drawer:
    """generate.py's drawer with the settings of a measurement."""
    shared = options.model_dump(include=set(DrawOptions.model_fields))
    return Drawer(trained, GenerateOptions(**shared, batch_size=options.batch_size), info.device)


def _wanted(options: MetricsOptions, trained: Trained | None) -> list[str]:
    """The names of the metrics: those asked for, or all that apply."""
    if options.metrics != "auto":
        return _asked_for(options)
    if trained is None:
        return ["fid"]
    config = trained.config
    has_condition = config.model.text_conditioning != "none" or config.model.num_classes is not None
    wanted = OF_SCENES if config.data.dataset_name == "scenes" else OF_PICTURES
    return [name for name in wanted if has_condition or name not in ("caption", "colour")]


def _asked_for(options: MetricsOptions) -> list[str]:
    names = [name for name in map(str.strip, options.metrics.split(",")) if name]
    if not names:
        raise UserError(f"--metrics is empty; use auto, or some of {', '.join(METRICS)}")
    return [] if names == ["auto"] else names


def _check(options: MetricsOptions) -> RandomFeatures | FIDInception | ScriptedFeatures | None:
    """Refuse what cannot be measured, before anything is computed. Returns the network of fid, None without fid."""
    wanted = _asked_for(options)
    if options.output:
        check_output(options.output)
    if unknown := [name for name in wanted if name not in METRICS]:
        raise UserError(f"--metrics {unknown[0]}: use some of {', '.join(METRICS)}")
    if not options.checkpoint and options.pictures is None:
        raise UserError("--checkpoint is not set; give the folder of a training run, or --pictures for fid alone")
    if not options.checkpoint and (options.reference is None or wanted not in ([], ["fid"])):
        raise UserError("--pictures without --checkpoint measures fid alone, and needs --reference; give both")
    if "fid" not in wanted and options.checkpoint:
        return None
    network = RandomFeatures() if options.features == "random" else inception(options.inception_weights)
    for name, place in (("pictures", options.pictures), ("reference", options.reference)):
        if place is not None and not Path(place).exists():
            raise UserError(f"--{name} {place}: no such folder or file")
    return network


@command
def main(argv: list[str] | None = None) -> dict:
    """The command; see the head of the file."""
    options = load_config(MetricsOptions, argv=argv, description=__doc__)
    network = _check(options)
    info = init_distributed(options.device)
    # opened first: a wrong --clip-path ends the command within seconds
    scorer = ClipScorer(options.clip_path, device=info.device) if "clip" in _asked_for(options) else None
    trained = None
    if options.checkpoint:
        trained = load_asked(options, info.device)
        guidance(trained.config, options.cfg_scale)
    wanted, found = _wanted(options, trained), {}
    measured = functools.cache(lambda: measured_set(options, trained, options.split))  # fid may need none
    measurement = None
    if trained is not None and set(wanted) - {"fid"}:
        measurement = Measurement(trained, measured(), options, info, scorer)
    for name in wanted:
        if name == "fid":
            assert network is not None  # of _check()
            extractor = Extractor(network, device=info.device, resize=options.resize)
            found[name] = paper_figures(options, extractor, trained, measured, info)
        else:
            found[name] = getattr(measurement, name)()
    if measurement is not None:
        drawn = measurement.drawn  # by all ranks; the report shows some
        found = {name: found[name] for name in wanted} if len(drawn) else found
    if info.is_main:
        _write(options, trained, measurement, found)
    shutdown()
    return found


def _write(options: MetricsOptions, trained: Trained | None, measurement: Measurement | None, found: dict) -> None:
    """The JSON file, the run's report and the console, by rank 0."""
    folder = Path() if trained is None else run_of(trained.folder)
    about: dict = {"pictures": options.pictures, "seed": options.seed}
    if trained is not None:
        about |= {
            "checkpoint": str(trained.folder),
            "split": options.split,
            "pictures": options.pictures or (len(measurement.held.latents) if measurement else options.count),
            "ema": options.ema if options.ema_length is None else options.ema_length,
            "cfg_scale": guidance(trained.config, options.cfg_scale),
            "sampler": trained.config.sample.sampler,
            "steps": options.steps or trained.config.sample.steps,
        }
    output = Path(options.output) if options.output else folder / "metrics.json"
    write_text(output, json.dumps({"about": about, **found}, indent=1) + "\n")
    if measurement is not None:
        report(measurement, found, options, folder)
    for name, group in found.items():
        figures = (
            f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in group.items()
        )
        print(f"{name}: {', '.join(figures)}")


if __name__ == "__main__":
    main()
