"""Train FLOAT: phase 1 (motion auto-encoder) if none is given, features of the clips, phase 2 (flow on motion).

  python float/train.py --config small --output-dir outputs/float           a CPU, the sample clips, about 6 minutes
  python float/train.py --config default --autoencoder-path float.pth --data-root datasets        one GPU
  torchrun --nproc_per_node=8 float/train.py --config official ...          eight
  python float/train.py --config official --dry-run                         the plan only
The same command again resumes, in either phase. The guide's flags: --config-file, --batch-size, --learning-rate,
--num-epochs, --resume, --output-dir, --device, --num-workers.
"""

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from float.config import AUTOENCODER_PRESETS, PRESETS, AutoencoderConfig, Config, features_dir
from shared.config import load_config
from shared.errors import UserError, command

if TYPE_CHECKING:
    from float.dataset import FLOATDataset
    from float.weights.open import Autoencoder
    from shared.engine.dist import DistInfo
    from shared.loop import FitResult

PHASE_ONE, FEATURES = "autoencoder", "features"  # folders within the run's output


def autoencoder_config(config: Config) -> AutoencoderConfig:
    """The settings of phase 1 within a run: the preset's loop, this run's model, clips and device."""
    phase = load_config(AutoencoderConfig, presets=AUTOENCODER_PRESETS, argv=["--config", config.autoencoder_config])
    phase.model, phase.data = config.model.model_copy(), config.data.model_copy()
    phase.run = config.run.model_copy()
    phase.run.output_dir = str(Path(config.run.output_dir) / PHASE_ONE)
    phase.run.resume = "none" if config.run.resume == "none" else "auto"  # a path means phase 2
    if config.training.max_steps is not None:
        phase.training.max_steps = config.training.max_steps
    phase.training.num_workers = config.training.num_workers
    return phase


def train_phase_one(config: Config, info: "DistInfo") -> str:
    """Train the auto-encoder into the run's folder unless it is done; returns where it lies."""
    from float.train_autoencoder import AutoencoderTrainer
    from shared.rng import seed_everything

    phase = autoencoder_config(config)
    folder = Path(phase.run.output_dir)
    if phase.run.resume == "auto" and _steps_done(folder) >= _steps_wanted(phase):
        return str(folder)
    if info.is_main:
        print(f"no --autoencoder-path given: phase 1 trains one into {folder}", flush=True)
    seed_everything(config.run.seed, 1)
    result = AutoencoderTrainer(phase, info).train()
    if not result.finished:
        raise UserError(
            f"phase 1 was stopped at step {result.step} by {result.stopped_by}; run the same command again to go on"
        )
    return str(folder)


def _steps_done(folder: Path) -> int:
    done = folder / "DONE"
    return int(done.read_text()) if done.exists() else -1


def _steps_wanted(phase: AutoencoderConfig) -> int:
    training = phase.training
    wanted = [steps for steps in (training.total_steps, training.max_steps) if steps is not None]
    return min(wanted) if wanted else sys.maxsize


def prepare_features(config: Config, info: "DistInfo") -> "Autoencoder":
    """Have an auto-encoder and the features of all clips; returns the frozen auto-encoder."""
    from float.data.features import ClipEncoder
    from float.precompute import precompute
    from float.weights.open import load_autoencoder

    path = config.model.autoencoder_path or train_phase_one(config, info)
    autoencoder = load_autoencoder(config.model, path)
    counts = precompute(config, ClipEncoder(config.model, config.data, autoencoder, info.device), info)
    if info.is_main:
        print("clips: " + ", ".join(f"{name.replace('_', ' ')} {count}" for name, count in counts.items()), flush=True)
    return autoencoder


def datasets(config: Config) -> tuple["FLOATDataset", "FLOATDataset"]:
    """Training and validation windows of the cache."""
    from float.dataset import FLOATDataset

    folder, seed = features_dir(config), config.run.seed
    train_set = FLOATDataset(folder / "train", config.data, train=True, seed=seed)
    return train_set, FLOATDataset(folder / "val", config.data, train=False, seed=seed)


def run(config: Config, info: "DistInfo") -> "FitResult":
    """All phases of one run."""
    from float.data.synthetic import write_synthetic_features
    from float.evaluation.preview import make_sampler
    from float.rectified_flow import FlowMatchingTrainer
    from float.weights.open import load_generator, make_generator
    from shared.rng import seed_everything

    autoencoder = None
    if config.synthetic:
        write_synthetic_features(config, info)
    else:
        autoencoder = prepare_features(config, info)
    train_set, val_set = datasets(config)
    seed_everything(config.run.seed, 2)
    generator = make_generator(config.model, config.data, gradient_checkpointing=config.training.gradient_checkpointing)
    if config.model.fmt_path is not None:
        load_generator(generator, config.model.fmt_path)
    elif config.model.whiten_motion:
        generator.set_motion_statistics(train_set.all_motion())
    sampler = None if autoencoder is None else make_sampler(config, autoencoder, info)
    return FlowMatchingTrainer(config, generator, train_set, val_set, info=info, sampler=sampler).train()


def _guide_arguments(argv: list[str] | None) -> list[str]:
    """A bare file name after --config-file is a file here, not a preset."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    for index, flag in enumerate(arguments[:-1]):
        if flag in ("--config-file", "--config_file") and os.sep not in arguments[index + 1]:
            arguments[index + 1] = os.path.join(os.curdir, arguments[index + 1])
    return arguments


@command
def main(argv: list[str] | None = None) -> "FitResult | None":
    """Read the settings, train."""
    config = load_config(
        Config,
        presets=PRESETS,
        argv=_guide_arguments(argv),
        default="default",
        description=__doc__,
        aliases={"--config-file": "--config"},
    )
    from float.plan import print_plan
    from shared.engine.dist import init_distributed, shutdown

    if config.run.dry_run:
        print_plan(config)
        return None
    info = init_distributed(config.run.device, config.run.timeout_minutes * 60)
    try:
        return run(config, info)
    finally:
        shutdown()


if __name__ == "__main__":
    main()
