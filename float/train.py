"""Train FLOAT: phase 1 (motion auto-encoder) if none is given, features of the clips, phase 2 (flow on motion).

  python float/train.py --config small --output-dir outputs/float           a CPU, the sample clips, about 6 minutes
  python float/train.py --config small --data-root RAW --output-dir OUT     raw videos, prepared first
  python float/train.py --config default --autoencoder-path float.pth --data-root datasets        one GPU
  torchrun --nproc_per_node=8 float/train.py --config official ...          eight
  python float/train.py --config official --dry-run                         the plan only
The same command again resumes, in either phase. The guide's flags: --config-file, --batch-size, --learning-rate,
--num-epochs, --resume, --output-dir, --device, --num-workers.
"""

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from float.config import AUTOENCODER_PRESETS, PRESETS, AutoencoderConfig, Config, data_root, features_dir
from shared.config import accumulation_steps, load_config
from shared.errors import UserError, check_output, command, write_text

if TYPE_CHECKING:
    from float.dataset import FLOATDataset
    from float.model import MotionGenerator
    from float.weights.open import Autoencoder
    from shared.engine.dist import DistInfo
    from shared.loop import FitResult

PHASE_ONE = "autoencoder"  # folder of phase 1 within the run's output
VALIDATED = {f"val/{name}" for name in ("loss", "loss_flow", "loss_vel", "loss_prev")}
PREPARED = "clips"  # folder of the clips made of raw videos
TRAINED_ON = "trained_on.json"  # which auto-encoder phase 2 of a run learns the motion of


# --- what can be wrong, before anything expensive ---------------------------------------------------------------------


def check(config: Config, world: int) -> None:
    """UserError for what preflight() cannot know and would stop the run later, however long its first phase takes."""
    from float.data.clips import find_clips
    from float.data.media import count_frames
    from float.modules.audio import AudioEncoder, config_of
    from float.modules.emotion import WITHOUT, Audio2Emotion
    from float.weights.open import check_weights, load_generator, make_generator
    from shared.flow import check_solver

    model, data, training = config.model, config.data, config.training
    check_solver(model.ode_method)
    check_output(features_dir(config), flag="--features-dir", folder=True)
    if model.audio_features == "wav2vec2":
        config_of(model.wav2vec_model_path)
        if model.autoencoder_path is None:  # phase 1 takes hours before phase 2 opens it
            AudioEncoder.from_pretrained(model.wav2vec_model_path, only_last_features=model.only_last_features)
    if config.synthetic:
        return
    if data.emotion_source in ("ser", "mixed"):
        config_of(model.audio2emotion_path, WITHOUT)
        if model.autoencoder_path is None:
            Audio2Emotion.from_pretrained(model.audio2emotion_path)
    for flag, path in (("--autoencoder-path", model.autoencoder_path), ("--fmt-path", model.fmt_path)):
        if path is not None:
            check_weights(flag, path)
    if model.fmt_path is not None and model.autoencoder_path is None:  # read now as well: phase 1 comes first
        load_generator(make_generator(model, data), model.fmt_path, start=True)
    root = data_root(data)
    clips, _ = find_clips(root, data.train_split), find_clips(root, data.val_split)
    counts = [count_frames(clip.video, data.video_fps) for clip in clips]
    windows = sum(max(1, count // data.sequence_length) for count in counts if count)
    batch = training.batch_size * world * accumulation_steps(training, world)
    if windows < batch and data.drop_last:
        raise UserError(
            f"{root}: {len(clips)} clips of split '{data.train_split}' make {windows} windows of "
            f"{data.sequence_length} frames, one optimizer step takes {batch}; use --batch-size "
            f"{max(1, windows // world)}, more clips, or --no-drop-last"
        )


# --- phase 1 ----------------------------------------------------------------------------------------------------------


def autoencoder_config(config: Config, *, batch_given: bool = False) -> AutoencoderConfig:
    """The settings of phase 1 within a run: the preset's loop, this run's model, clips, device, and batch if given."""
    phase = load_config(AutoencoderConfig, presets=AUTOENCODER_PRESETS, argv=["--config", config.autoencoder_config])
    phase.model, phase.data = config.model.model_copy(), config.data.model_copy()
    phase.run = config.run.model_copy()
    phase.run.output_dir = str(Path(config.run.output_dir) / PHASE_ONE)
    phase.run.resume = "none" if config.run.resume == "none" else "auto"  # a path means phase 2
    phase.training.max_steps = config.training.max_steps or phase.training.max_steps
    phase.training.num_workers = config.training.num_workers
    if batch_given:
        phase.training.batch_size = config.training.batch_size
    return phase


def train_phase_one(config: Config, info: "DistInfo", *, batch_given: bool) -> "FitResult | None":
    """Train the auto-encoder into the run's folder; None where it is done, or phase 2 has begun on it."""
    from float.train_autoencoder import AutoencoderTrainer
    from shared.rng import seed_everything

    phase = autoencoder_config(config, batch_given=batch_given)
    folder, training = Path(phase.run.output_dir), phase.training
    done = _steps_done(folder)
    seed_everything(config.run.seed, 1)
    trainer = AutoencoderTrainer(phase, info)
    if config.training.total_steps is None and config.training.num_epochs is not None:
        # --num-epochs bounds this phase too; its preset's length is enough for any number of them
        epochs = config.training.num_epochs * trainer.steps_per_epoch
        training.total_steps = min(training.total_steps or epochs, epochs)
    wanted = min(training.total_steps or sys.maxsize, training.max_steps or sys.maxsize)
    if phase.run.resume == "auto" and done is not None:
        begun = (Path(config.run.output_dir) / "checkpoints").is_dir()
        if done < wanted and begun and info.is_main:
            print(
                f"phase 1 stays at its step {done} of {wanted}: phase 2 has learned the motion of this auto-encoder; "
                "to train both further, give another --output-dir",
                flush=True,
            )
        if done >= wanted or begun:
            return None
    if info.is_main:
        print(f"no --autoencoder-path given: phase 1 trains one into {folder}", flush=True)
    return trainer.train()


def _steps_done(folder: Path) -> int | None:
    """The last step of a finished phase 1 whose checkpoint is whole; else None, and it goes on from what is whole."""
    from shared.loop import finished_checkpoint, steps_done

    return steps_done(folder) if finished_checkpoint(folder) is not None else None


# --- between the phases -----------------------------------------------------------------------------------------------


def prepare_features(config: Config, info: "DistInfo", path: str) -> tuple["Autoencoder", dict[str, list[str]]]:
    """The frozen auto-encoder, and the ids of all clips whose features are there, by split."""
    from float.data.clips import find_clips
    from float.data.features import ClipEncoder
    from float.precompute import precompute
    from float.sampling.animate import measured_framing
    from float.weights.open import load_autoencoder, weights_hash

    autoencoder = load_autoencoder(config.model, path)
    output_dir = Path(config.run.output_dir)
    _same_autoencoder(config, output_dir, path, weights_hash(autoencoder), info)
    cache = precompute(config, ClipEncoder(config.model, config.data, autoencoder, info.device), info)
    if info.is_main:
        listed = ", ".join(f"{name.replace('_', ' ')} {count}" for name, count in cache.counts.items())
        print(f"clips: {listed}", flush=True)
        if not (output_dir / "framing.json").exists():
            framing = measured_framing(find_clips(data_root(config.data), config.data.train_split), config)
            values = {} if framing is None else {"margin": framing.margin, "shift": framing.shift}
            write_text(output_dir / "framing.json", json.dumps(values))
    return autoencoder, cache.clips


def _same_autoencoder(config: Config, output_dir: Path, path: str, found: str, info: "DistInfo") -> None:
    """UserError where phase 2 of this folder has learned the motion of another auto-encoder."""
    from shared.engine.dist import barrier

    note = output_dir / TRAINED_ON
    begun = (output_dir / "checkpoints").is_dir() and config.run.resume != "none"
    if begun and note.is_file():
        before = json.loads(note.read_text(encoding="utf-8"))
        if before["weights"] != found:
            raise UserError(
                f"{output_dir}: phase 2 was trained on the auto-encoder of {before['path']} ({before['weights']}), "
                f"this one is {path} ({found}); give that one with --autoencoder-path to go on, another --output-dir "
                "to start on this one, or --resume none to start again here"
            )
    barrier()  # none writes before all have read
    if info.is_main:
        write_text(note, json.dumps({"path": path, "weights": found}))


def datasets(config: Config, clips: dict[str, list[str]] | None = None) -> tuple["FLOATDataset", "FLOATDataset"]:
    """Training and validation windows of the cache; clips: ids by split (train, val), None for all files there."""
    from float.dataset import FLOATDataset

    folder, seed = features_dir(config), config.run.seed
    chosen = clips or {}
    train_set = FLOATDataset(folder / "train", config.data, train=True, seed=seed, clips=chosen.get("train"))
    return train_set, FLOATDataset(folder / "val", config.data, train=False, seed=seed, clips=chosen.get("val"))


# --- the run ----------------------------------------------------------------------------------------------------------


def run(config: Config, info: "DistInfo", *, batch_given: bool = False) -> "FitResult":
    """All phases of one run; where phase 1 is stopped by a signal or the time limit, its result."""
    from float.data.synthetic import write_synthetic_features
    from float.evaluation.preview import make_sampler
    from float.rectified_flow import FlowMatchingTrainer
    from float.weights.open import load_generator, make_generator
    from shared.engine.parallel import built_once
    from shared.rng import seed_everything

    autoencoder, clips = None, None
    if config.synthetic:
        write_synthetic_features(config, info)
    else:
        path = config.model.autoencoder_path
        if path is None:
            path = str(Path(config.run.output_dir) / PHASE_ONE)
            result = train_phase_one(config, info, batch_given=batch_given)
            if result is not None and not result.finished:
                if info.is_main:
                    print(f"phase 1 was stopped at step {result.step}; run the same command again to go on", flush=True)
                return result
        autoencoder, clips = prepare_features(config, info, path)
    train_set, val_set = datasets(config, clips)

    def first_generator() -> "MotionGenerator":
        seed_everything(config.run.seed, 2)
        checkpointing = config.training.gradient_checkpointing
        generator = make_generator(config.model, config.data, gradient_checkpointing=checkpointing)
        if config.model.fmt_path is not None:
            load_generator(generator, config.model.fmt_path, start=True)
        elif config.model.whiten_motion:
            # what tells people apart is no motion: where it falls out, it must not set the scale either
            spread = train_set.all_motion(centred=True) if config.model.relative_motion else None
            generator.set_motion_statistics(train_set.all_motion(), spread_TD=spread)
        if config.model.pose_condition:
            generator.set_pose_statistics(train_set.poses())
        return generator

    generator = built_once(first_generator, config.run, info)
    sampler = None if autoencoder is None else make_sampler(config, generator, autoencoder, info)
    return FlowMatchingTrainer(config, generator, train_set, val_set, info=info, sampler=sampler).train()


def take_raw_videos(config: Config, info: "DistInfo") -> None:
    """Where data_root holds raw videos, make training clips of them in the run's folder and train on these."""
    from float.prepare import PrepareOptions, is_raw, prepare
    from shared.engine.dist import raise_together

    root = data_root(config.data)
    if not is_raw(root):
        return
    clips, error = Path(config.run.output_dir) / PREPARED, None
    if info.is_main:
        print(f"{root}: raw videos; float/prepare.py makes training clips of them in {clips}", flush=True)
        try:
            prepare(PrepareOptions(data_root=str(root), output_dir=str(clips)))
        except (UserError, OSError) as problem:
            error = problem
    raise_together(error)
    config.data.data_root = str(clips)


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
    given: set[str] = set()
    config = load_config(
        Config,
        presets=PRESETS,
        argv=_guide_arguments(argv),
        default="default",
        description=__doc__,
        aliases={"--config-file": "--config"},
        given=given,
    )
    from float.plan import print_plan
    from shared.engine.dist import init_distributed, shutdown
    from shared.engine.preflight import preflight

    if config.run.dry_run:
        print_plan(config)
        return None
    info = init_distributed(config.run.device, config.run.timeout_minutes * 60)
    try:
        batch_given = "training.batch_size" in given
        has_phase_one = not config.synthetic and config.model.autoencoder_path is None
        phases = [autoencoder_config(config, batch_given=batch_given)] if has_phase_one else []
        preflight(config, info, phases=phases, metrics=VALIDATED)
        take_raw_videos(config, info)
        check(config, info.world)
        return run(config, info, batch_given=batch_given)
    finally:
        shutdown()


if __name__ == "__main__":
    main()
