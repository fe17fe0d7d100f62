"""Phase 1 of FLOAT: train the motion auto-encoder on pairs of frames.

  python float/train_autoencoder.py --config small --output-dir outputs/float_autoencoder      a CPU, minutes
  torchrun --nproc_per_node=8 float/train_autoencoder.py --config official --data-root datasets --vgg-path vgg19.pth
The same command again resumes. float/train.py does this phase itself when it is given no auto-encoder.
"""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from float.config import AUTOENCODER_PRESETS, AutoencoderConfig, data_root, settle
from shared.config import accumulation_steps, load_config
from shared.errors import UserError, command

if TYPE_CHECKING:
    from torch import Tensor

    from shared.data import BatchPlan
    from shared.engine.dist import DistInfo
    from shared.loop import FitResult

VALIDATED = {f"val/{name}" for name in ("loss", "psnr", "psnr_copy", "psnr_mouth", "psnr_mouth_copy")}
OF_PHASE_ONE = ("input_size", "dim_w", "dim_m", "channels", "autoencoder")  # of the section model
VALIDATION_FRAMES = 48  # of each held-out clip, evenly spaced


class AutoencoderTrainer:
    """The objective of phase 1 as functions for the loop."""

    def __init__(self, config: AutoencoderConfig, info: "DistInfo"):
        from float.data.clips import find_clips
        from float.data.face import read_boxes
        from float.data.frames import FramePairs, FrameStore
        from float.modules.discriminators import AutoencoderWithJudges
        from float.modules.losses import make_feature_stack

        self.config, self.info = config, info
        data, training, root = config.data, config.training, data_root(config.data)
        boxes, size = read_boxes(root), config.model.input_size
        train_clips, val_clips = find_clips(root, data.train_split), find_clips(root, data.val_split)
        self.pairs = FramePairs(
            FrameStore(train_clips, size, data, boxes),
            pairs_per_second=training.pairs_per_second,
            seed=config.run.seed,
            augment=data.use_augmentation,
        )
        self.held_out = FrameStore(val_clips, size, data, boxes)
        self.model = AutoencoderWithJudges(config.model, data, adversarial=self.is_adversarial)
        self.stack = self.note = None
        if training.lambda_perceptual or training.lambda_component:
            self.stack, self.note = make_feature_stack(training.vgg_path)
            self.stack.to(info.device)

    def _plan(self) -> "BatchPlan":
        from shared.data import BatchPlan

        training, world = self.config.training, self.info.world
        accumulation, drop_last = accumulation_steps(training, world), self.config.data.drop_last
        return BatchPlan(
            len(self.pairs), training.batch_size, world, accumulation, self.config.run.seed, drop_last=drop_last
        )

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps that draw the pairs of an epoch once."""
        return self._plan().steps_per_epoch

    @property
    def is_adversarial(self) -> bool:
        training = self.config.training
        return training.lambda_adversarial > 0 or training.lambda_style > 0

    def losses(self, model: Callable, batches: list[dict], step: int) -> Iterator[tuple["Tensor", dict]]:
        """One weighted sum of all terms per micro-batch."""
        from float.data.frames import finished

        training = self.config.training
        penalise = training.r1_gamma > 0 and step % training.r1_every == 0
        # before the start the discriminators run at weight 0, so that every rank runs the same modules in every step
        started = float(step >= training.adversarial_start)
        for batch in batches:
            output, target, judged = model(
                *finished(batch), judge=self.is_adversarial, penalise=penalise, both_ways=training.both_ways
            )
            terms = self._picture_terms(output.float(), target)
            weights = {
                "l1": training.lambda_l1,
                "l2": training.lambda_l2,
                "box": training.lambda_box,
                "perceptual": training.lambda_perceptual,
                "component": training.lambda_component,
                "adversarial": started * training.lambda_adversarial,
                "style": started * training.lambda_style,
                "discriminator": started,
                "r1": started * training.r1_gamma / 2 * training.r1_every,
            }
            terms |= judged
            total = sum((weights[name] * value for name, value in terms.items()), start=output.new_zeros(()))
            yield total / len(batches), {f"loss_{name}": value.detach() for name, value in terms.items()}

    def _picture_terms(self, output: "Tensor", target: "Tensor") -> dict[str, "Tensor"]:
        from float.modules.losses import box_difference, perceptual_terms

        training, data = self.config.training, self.config.data
        terms = {"l1": (output - target).abs().mean(), "l2": (output - target).square().mean()}
        if training.lambda_box:
            terms["box"] = (
                box_difference(output, target, data.mouth_box) + box_difference(output, target, data.eye_box) / 3
            )
        if self.stack is not None:
            both = perceptual_terms(self.stack, output, target, [data.mouth_box, data.eye_box])
            terms["perceptual"], terms["component"] = both
        return terms

    def validate(self, model: Callable, step: int) -> dict[str, float]:
        """Held-out clips from their first frame: L1, PSNR of picture and mouth, and the same for a copy of that
        frame.
        """
        import torch

        from float.data.media import to_tensor
        from float.modules.losses import psnr

        box, rows = self.config.data.mouth_box, []
        for clip in range(len(self.held_out.clips)):
            frames = self.held_out.all_frames(clip)
            every = max(1, len(frames) // VALIDATION_FRAMES)
            driving = to_tensor(frames[::every]).to(self.info.device)
            source = driving[:1].expand_as(driving)
            output = torch.cat(
                [
                    model(s, d, judge=False, penalise=False)[0]
                    for s, d in zip(source.split(16), driving.split(16), strict=True)
                ]
            )
            rows.append(
                {
                    "loss": float((output.float() - driving).abs().mean()),
                    "psnr": psnr(output, driving),
                    "psnr_copy": psnr(source, driving),
                    "psnr_mouth": psnr(output, driving, box),
                    "psnr_mouth_copy": psnr(source, driving, box),
                }
            )
        return {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}

    def sample(self, model: Callable, step: int, folder: Path) -> None:
        """A sheet: source, driving frames above, what was made of them below."""
        import numpy as np
        from PIL import Image

        from float.data.media import to_tensor, to_uint8

        sheets = []
        for clip in range(min(3, len(self.held_out.clips))):
            frames = self.held_out.all_frames(clip)
            chosen = frames[np.linspace(0, len(frames) - 1, 8).astype(int)]
            driving = to_tensor(chosen).to(self.info.device)
            output = model(driving[:1].expand_as(driving), driving, judge=False, penalise=False)[0]
            sheets += [np.concatenate(list(chosen), 1), np.concatenate(list(to_uint8(output)), 1)]
        if self.info.is_main:
            Image.fromarray(np.concatenate(sheets)).save(folder / f"step_{step:08d}.png")

    def train(self, output_dir: Path | None = None) -> "FitResult":
        """Train to the planned step, resuming what is in the output folder."""
        from float.data.frames import collate_pairs
        from shared.data import MapStream
        from shared.loop import fit

        run, training = self.config.run, self.config.training
        if self.is_adversarial and run.strategy == "zero3":
            raise UserError(
                "--strategy zero3 cannot run the adversarial terms (it hides the weights that are held fixed); "
                "use fsdp or zero2"
            )
        output_dir = Path(output_dir or run.output_dir)
        stream = MapStream(
            self.pairs,
            self._plan(),
            self.info,
            collate=collate_pairs,
            # from memory a step is read at once; processes would each decode and keep all clips
            num_workers=0 if self.pairs.store.in_memory else training.num_workers,
            prefetch_factor=training.prefetch_factor,
            bad_samples=output_dir / "bad_samples.jsonl",
        )
        settle(self.config, steps_per_epoch=self.steps_per_epoch, device_type=self.info.device.type)
        if self.note and self.info.is_main:
            print(self.note)
        return fit(
            config=self.config,
            info=self.info,
            model=self.model,
            stream=stream,
            losses=self.losses,
            validate=self.validate,
            sample=self.sample,
            output_dir=output_dir,
            title="FLOAT phase 1, motion auto-encoder",
        )


@command
def main(argv: list[str] | None = None) -> "FitResult | None":
    """Read the settings, train."""
    given: set[str] = set()
    config = load_config(
        AutoencoderConfig, presets=AUTOENCODER_PRESETS, argv=argv, default="small", description=__doc__, given=given
    )
    idle = sorted(given & {f"model.{name}" for name in type(config.model).model_fields if name not in OF_PHASE_ONE})
    if idle:
        raise UserError(
            f"{', '.join(idle)}: no part of phase 1, where it would change nothing; give it to float/train.py"
        )
    from float.plan import print_autoencoder_plan
    from shared.engine.dist import init_distributed, shutdown
    from shared.engine.preflight import preflight
    from shared.rng import seed_everything

    if config.run.dry_run:
        print_autoencoder_plan(config)
        return None
    info = init_distributed(config.run.device, config.run.timeout_minutes * 60)
    try:
        preflight(config, info, metrics=VALIDATED)
        seed_everything(config.run.seed, 1)
        return AutoencoderTrainer(config, info).train()
    finally:
        shutdown()


if __name__ == "__main__":
    main()
