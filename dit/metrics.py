"""Measure a trained DiT on pictures that it did not see, and write the run's report.

  python dit/metrics.py --checkpoint outputs/dit --output outputs/dit/metrics.json
  python dit/metrics.py --checkpoint OUT --metrics loss,caption,fid --inception-weights FILE.pth
scenes, loss, caption, recon, vae, colour and memory need no download; scenes counts what is right in drawn scenes. fid
(with KID, precision, recall) needs the Inception weights, clip a CLIP model; both say what to provide.
"""

import json
import shlex
import sys
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from dit.config import METRICS, MetricsOptions
from shared.config import load_config
from shared.errors import UserError, command

if __name__ == "__main__" and {"-h", "--help"} & set(sys.argv):
    load_config(MetricsOptions, description=__doc__)

import numpy as np
import torch
from torch import Tensor

from dit.data.scenes import SceneDataset
from dit.dataset import TextImageDataset, unit
from dit.evaluation import fid
from dit.evaluation.fid import psnr, ssim
from dit.evaluation.held_out import errors, held_out_noise, prepare
from dit.evaluation.scenes import scene_bars, scene_figures, scene_grid
from dit.modules.text import condition_of
from dit.sampling.drawing import Drawing, draw_pictures, grid, to_uint8
from dit.weights.open import Trained, load_trained
from shared.engine.dist import DistInfo, init_distributed
from shared.errors import write_text
from shared.media.inception import inception
from shared.metrics import (
    agreement,
    clip_score,
    frechet_distance,
    kernel_distance,
    paired_p,
    picture_features,
    precision_recall,
)
from shared.report.page import Bar, Sample, write_report

OF_PICTURES = ["loss", "caption", "recon", "vae", "colour", "memory"]  # what --metrics auto measures
OF_SCENES = ["scenes", "loss", "caption", "recon", "vae"]


class Measurement:
    """One evaluation: the held-out pictures, the drawn ones (made when first wanted), and a method for every metric."""

    def __init__(self, trained: Trained, options: MetricsOptions, info: DistInfo) -> None:
        self.trained, self.options, self.info = trained, options, info
        data = trained.config.data.model_copy(
            update={"dataset_path": options.data_root or trained.config.data.dataset_path, "cache_dir": None}
        )
        config = trained.config.model_copy(update={"data": data})
        self.training_set = TextImageDataset.from_config(config, is_train=True)
        self.measured = (
            self.training_set if options.split == "train" else TextImageDataset.from_config(config, is_train=False)
        )
        measured = self.measured
        if len(measured) < 2:
            raise UserError(
                f"--split {options.split}: {len(measured)} pictures; set data.val_fraction when training, or use "
                "--split train"
            )
        self.held = prepare(
            measured, self.training_set, trained.codec, trained.text_encoder, count=options.num, device=info.device
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
        right, null = self._errors("right"), self._errors("null")
        shuffled = self._errors("shuffled")
        found = {
            "shuffled_cost_percent": 100 * (shuffled.mean() / right.mean() - 1).item(),
            "p": paired_p((shuffled - right).mean(0)),
            "null_cost_percent": 100 * (null.mean() / right.mean() - 1).item(),
            "null_p": paired_p((null - right).mean(0)),
        }
        if self.trained.text_encoder is not None:
            condition = condition_of(self.held.prompts, None, self.trained.text_encoder, self.info.device)
            described = self.held._replace(condition=condition)
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
            clean = torch.cat(
                [
                    objective.clean(
                        self.trained.model(
                            x, objective.model_time(t), **{k: v[part] for k, v in held.condition.items()}
                        ),
                        x,
                        t,
                    )
                    for part, x, t in self._parts(noisy, t_B)
                ]
            )
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
        count = min(len(self.training_set), 2048)
        samples = [self.training_set.sample(index, 0, flip=False)["image"] for index in range(count)]
        seen = unit(torch.stack(samples)).flatten(1)
        seen = torch.cat([seen, seen.unflatten(1, self.held.images.shape[1:]).flip(3).flatten(1)])
        drawn = torch.from_numpy(self.drawn).permute(0, 3, 1, 2).float().flatten(1) / 127.5 - 1
        scale = seen.shape[1] ** 0.5
        nearest = [
            torch.cdist(rows, seen).min(1).values.div(scale).mean().item()
            for rows in (drawn, self.held.images.flatten(1))
        ]
        return {"drawn_to_training": nearest[0], "held_out_to_training": nearest[1]}

    def fid(self) -> dict:
        """Frechet and kernel distance, precision and recall of drawn against held-out pictures."""
        random = self.options.features == "random"
        network = fid.RandomFeatures() if random else inception(self.options.inception_weights)
        real = to_uint8(self.held.images)
        made, true = (
            picture_features(network, list(pictures), device=self.info.device) for pictures in (self.drawn, real)
        )
        precision, recall = precision_recall(made, true)
        return {
            "fid": frechet_distance(made, true),
            "kid": kernel_distance(made, true, subset=min(1000, len(made))),
            "precision": precision,
            "recall": recall,
            "pictures": len(made),
            "reference_sha256": fid.set_digest(real),
            "features": "RANDOM, for tests only"
            if random
            else "inception-v3-compat, 299 pixels by the TF1 bilinear rule",
        }

    def clip(self) -> dict:
        """Mean of max(100 cos(picture, caption), 0), and how often the right caption comes first of all."""
        return clip_score(list(self.drawn), self.held.prompts, self.options.clip_path, device=self.info.device)

    @property
    def drawn(self) -> np.ndarray:
        """One picture (S, S, 3) uint8 for every held-out caption."""
        if self._drawn is None:
            config, parts = self.trained.config, []
            scale = config.sample.cfg_scale if self.options.cfg_scale is None else self.options.cfg_scale
            drawing = Drawing(
                sampler=config.sample.sampler,
                steps=self.options.steps or config.sample.steps,
                cfg_scale=scale,
                shift=config.sample.shift,
            )
            shape = (config.model.in_channels, config.latent_side, config.latent_side)
            whole = condition_of(
                self.held.prompts, self.held.condition.get("labels"), self.trained.text_encoder, self.info.device
            )
            for first in range(0, len(self.held.latents), 32):
                rows = range(first, min(first + 32, len(self.held.latents)))
                condition = {name: value[rows.start : rows.stop] for name, value in whole.items()}
                images = draw_pictures(
                    self.trained.model,
                    self.trained.objective,
                    self.trained.codec,
                    condition,
                    [self.options.seed + row for row in rows],
                    shape,
                    drawing=drawing,
                    device=self.info.device,
                )
                parts.append(to_uint8(images))
            self._drawn = np.concatenate(parts)
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

    @staticmethod
    def _parts(noisy: Tensor, t_B: Tensor) -> list[tuple[slice, Tensor, Tensor]]:
        slices = [slice(first, first + 32) for first in range(0, len(noisy), 32)]
        return [(part, noisy[part], t_B[part]) for part in slices]


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
    )


@command
def main(argv: list[str] | None = None) -> dict:
    options = load_config(MetricsOptions, argv=argv, description=__doc__)
    if not options.checkpoint:
        raise UserError("--checkpoint is not set; give the folder of a training run")
    auto = options.metrics == "auto"
    wanted = [] if auto else [name.strip() for name in options.metrics.split(",") if name.strip()]
    unknown = [name for name in wanted if name not in METRICS]
    if unknown:
        raise UserError(f"--metrics {unknown[0]}: use some of {', '.join(METRICS)}")
    if "fid" in wanted and options.features == "inception":
        inception(options.inception_weights)  # refused before anything is computed
    info = init_distributed(options.device)
    trained = load_trained(
        options.checkpoint, device=info.device, use_ema=options.ema, vae=options.vae, text_encoder=options.text_encoder
    )
    measurement = Measurement(trained, options, info)
    if auto:
        wanted = OF_SCENES if isinstance(measurement.measured, SceneDataset) else OF_PICTURES
        wanted = [name for name in wanted if name != "caption" or measurement.held.condition]
    found = {name: getattr(measurement, name)() for name in wanted}
    run_folder = trained.folder.parent.parent if trained.folder.parent.name == "checkpoints" else trained.folder
    about = {
        "checkpoint": str(trained.folder),
        "split": options.split,
        "pictures": len(measurement.held.latents),
        "ema": options.ema,
        "seed": options.seed,
        "cfg_scale": trained.config.sample.cfg_scale if options.cfg_scale is None else options.cfg_scale,
        "sampler": trained.config.sample.sampler,
        "steps": options.steps or trained.config.sample.steps,
    }
    output = Path(options.output) if options.output else run_folder / "metrics.json"
    write_text(output, json.dumps({"about": about, **found}, indent=1) + "\n")
    report(measurement, found, options, run_folder)
    for name, group in found.items():
        print(
            f"{name}: "
            + ", ".join(
                f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in group.items()
            )
        )
    return found


if __name__ == "__main__":
    main()
