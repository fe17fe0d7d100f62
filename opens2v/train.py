"""Train the reference modules of OpenS2V on a frozen text-to-video base.

    python opens2v/train.py --config small                     two CPU cores, shipped data, minutes
    torchrun --nproc_per_node=8 opens2v/train.py --config_path opens2v/configs/80gb.yaml --logdir outputs/opens2v
    python opens2v/train.py --config default --dry-run         the plan of a preset, without a GPU

The same command again goes on from the newest checkpoint; --no-auto-resume starts anew.
"""

import contextlib
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from opens2v.config import PRESETS, SAMPLE_DATA, Config, DataConfig
from shared.config import load_config, load_saved
from shared.errors import UserError, command

if TYPE_CHECKING:
    from shared.engine.dist import DistInfo
    from shared.loop import FitResult

VALIDATED = {f"val/{name}" for name in ("loss", "loss_none", "loss_other", "gap")}


def parse(argv: list[str] | None) -> Config:
    """The configuration of a command line in this project's form or the guide's."""
    config = load_config(
        Config,
        presets=PRESETS,
        argv=guide_arguments(sys.argv[1:] if argv is None else list(argv)),
        default="small",
        description=__doc__,
        aliases={"--config_path": "--config"},
    )
    config.data = with_sample_data(config.data)
    if not config.run.auto_resume:
        config.run.resume = "none"
    if config.run.disable_wandb:
        config.run.wandb = False
    return config


def guide_arguments(argv: list[str]) -> list[str]:
    """The guide's `--set a=1 b=2` and `--set opens2v.key=value` as this project's: one --set each, section `data`, and
    the names that only the guide's YAML has.
    """
    result: list[str] = []
    in_set = False
    for text in argv:
        if text.startswith("--"):
            in_set = text == "--set"
        elif in_set:
            if result[-1] != "--set":
                result.append("--set")
            key, equals, value = text.partition("=")
            key = f"data.{key.removeprefix('opens2v.')}" if key.startswith("opens2v.") else key
            if key == "adapter" and value.lower() in ("null", "none", "~", ""):
                key, value = "adapter.r", "0"
            elif key == "mixed_precision":
                value = {"true": "bf16", "false": "fp32"}.get(value.lower(), value)
            text = f"{GUIDE_NAMES.get(key, key)}{equals}{value}"
        result.append(text)
    return result


GUIDE_NAMES = {"distributed": "run.strategy", "mixed_precision": "run.precision"}


def with_sample_data(data: DataConfig) -> DataConfig:
    """The data section with the shipped data where none is given: the drawings of composed scenes, or the clips."""
    if data.json_paths and not data.other_subject_probability:
        return data.model_copy(update={"scenes": None})  # clips that are given win over the preset's scenes
    if data.scenes is None:
        return data.model_copy(update=sample_paths())
    sheet = str(SAMPLE_DATA / "drawings.json")
    return data.model_copy(update={"scenes": sheet if data.scenes == "sample" else data.scenes})


def sample_paths() -> dict[str, list[str]]:
    """The clips that ship with the repository."""
    return {
        "json_paths": [str(SAMPLE_DATA / "step5/merge_final_json/dataset1.json")],
        "video_base_paths": [str(SAMPLE_DATA / "step0/videos/dataset1")],
        "background_base_paths": [str(SAMPLE_DATA / "step5/final_output/dataset1/foreground")],
    }


def with_drawn_seed(config: Config, info: "DistInfo") -> Config:
    """Seed 0 stands for a drawn one: that of the run in the output folder, or a new one from rank 0."""
    from shared.engine.dist import from_main

    if config.run.seed != 0:
        return config
    saved, seed = Path(config.run.output_dir) / "config.yaml", None
    if info.is_main:
        import secrets

        resumes = saved.exists() and config.run.resume != "none"
        seed = load_saved(Config, saved).run.seed if resumes else 1 + secrets.randbelow(2**31 - 1)
        print(f"seed {seed} ({'of the run that is resumed' if resumes else 'drawn'})", flush=True)
    config.run.seed = from_main(seed)
    return config


def begins(config: Config) -> bool:
    """Whether a run starts at its first step: no checkpoint to go on from."""
    has_some = any((Path(config.run.output_dir) / "checkpoints").glob("*/manifest.json"))
    return config.run.resume == "none" or (config.run.resume == "auto" and not has_some)


def check_inputs(config: Config) -> None:
    """UserError for paths that are not there, before anything is loaded."""
    from opens2v.data.augment import NO_CHANGES

    model = config.model
    for name, path in (
        ("generator_ckpt", model.generator_ckpt),
        ("init_from", model.init_from if begins(config) else None),
        ("base_model_path", model.base_model_path if model.codec == "wan" or model.text_encoder == "umt5" else None),
        *(("val_ref_images", path) for path in config.training.val_ref_images),
    ):
        if path is not None and not Path(path).exists():
            raise UserError(f"{name} {path}: not found; check the path")
    changes = [name for name in NO_CHANGES if name.startswith(("recolour", "other")) and config.data[name]]
    if changes and config.data.json_paths and not config.data.background_base_paths:
        raise UserError(
            f"data.{changes[0]}: a subject is told from its scene by the scene's picture without it; give "
            "background_base_paths (folders called `foreground`, one per part), or leave it out"
        )
    if model.generator_ckpt is None and config.training.base_steps == 0:
        raise UserError(
            "generator_ckpt is not set; give the folder or file of Wan2.1-T2V-1.3B (--generator-ckpt), or train a "
            "small base first (--config small)"
        )
    if model.generator_ckpt is None and (model.codec == "wan" or model.text_encoder == "umt5"):
        raise UserError(
            "base_steps trains a small base on codec conv or patch and text_encoder hash; for Wan's VAE give "
            "--generator-ckpt"
        )
    if model.codec == "wan" and model.base_model_path is None:
        raise UserError("base_model_path is not set; give the folder Wan2.1-T2V-1.3B-Diffusers (--base-model-path)")


def check_before_base(config: Config) -> None:
    """Open what the run needs after its small base, where that has to be trained first: minutes in vain otherwise."""
    from opens2v.modules.encoders import load_clip
    from opens2v.weights.export import read_trained

    model = config.model
    if model.generator_ckpt is not None:
        return
    if model.image_encoder == "clip" and model.clip_path != "off" and not config.data.use_cached_clip:
        load_clip(model.image_encoder_path)
    if model.init_from is not None and begins(config):
        read_trained(Path(model.init_from))


class OpenS2VTrainer:
    """Holds the models and settings of a run; train() hands the functions to the shared loop.

    config: a Config. info: the rank's place, by default that of torchrun's environment, or alone.
    """

    def __init__(self, config: Config, info: "DistInfo | None" = None):
        from opens2v.data.cache import cached_changes, with_cached_features
        from opens2v.dataset import training_set
        from opens2v.evaluation.preview import Preview
        from opens2v.modules.conditions import load_encoders
        from opens2v.objective import RefImageFlowMatching
        from opens2v.weights.base import ensure_base, load_generator
        from opens2v.weights.export import load_init
        from shared.engine.dist import init_distributed
        from shared.engine.parallel import built_once
        from shared.engine.preflight import preflight
        from shared.engine.strategy import choose_precision

        check_inputs(config)
        if config.run.wandb_save_dir is not None:
            os.environ["WANDB_DIR"] = config.run.wandb_save_dir
        self.info = info or init_distributed(config.run.device, config.run.timeout_minutes * 60)
        preflight(config, self.info, metrics=VALIDATED)
        self.config = config = with_drawn_seed(config, self.info)
        dataset = training_set(config, **cached_changes(config))
        self.dataset = with_cached_features(dataset, config)
        check_before_base(config)
        self.base = ensure_base(config, self.info)
        self.encoders = load_encoders(config, self.base.parent)
        precision = choose_precision(config.run.precision, self.info.device)

        def first_model() -> Any:
            model, self.trainable = load_generator(config, self.base, precision=precision)
            if config.model.init_from is not None and begins(config):
                load_init(model, Path(config.model.init_from))
            return model

        self.model = built_once(first_model, config.run, self.info)
        self.encoders.to(self.info.device)
        self.objective = RefImageFlowMatching(config, self.encoders)
        self.preview = Preview(config, self.encoders, self.objective.scheduler, self.info)

    @property
    def generator(self) -> Any:
        """The transformer, under the guide's name: generator.load_state_dict(checkpoint["generator"], strict=False)."""
        return self.model

    def train(self) -> "FitResult":
        """Run the loop to the planned step, or on from the newest checkpoint."""
        from opens2v.dataset import collate_opens2v_batch
        from opens2v.model import RefWanBlock
        from shared.config import accumulation_steps
        from shared.data import BatchPlan, MapStream
        from shared.loop import fit

        config, training, info = self.config, self.config.training, self.info
        if info.is_main:
            print(self.trainable, flush=True)
        accumulation = accumulation_steps(training, info.world)
        plan = BatchPlan(
            len(self.dataset), training.batch_size, info.world, accumulation, config.run.seed, drop_last=False
        )
        stream = MapStream(
            self.dataset,
            plan,
            info,
            collate=collate_opens2v_batch,
            num_workers=training.num_workers,
            prefetch_factor=training.prefetch_factor,
            bad_samples=Path(config.run.output_dir) / "bad_samples.jsonl",
        )
        return fit(
            config=config,
            info=info,
            model=self.model,
            stream=stream,
            losses=self.objective.losses,
            validate=self.preview.validate,
            sample=self.preview.sample if config.run.visualize else None,
            groups=self.groups(),
            wrap_classes=(RefWanBlock,),
            export=self.export,
            checkpoint_name="checkpoint_opens2v_{step:06d}",
            title="opens2v",
        )

    def groups(self) -> list[dict]:
        """Matrices with weight decay, vectors and gates without, LoRA at its own learning rate."""
        from shared.optim import decay_groups

        training, adapter, scales = self.config.training, self.config.adapter, {}
        if adapter is not None and adapter.adapter_lr is not None:
            factor = adapter.adapter_lr / training.learning_rate
            scales = {name: factor for name, _ in self.model.named_parameters() if "lora_" in name}
        return decay_groups(self.model, training.weight_decay, scales)

    def export(self, folder: Path, weights: dict, ema: dict | None) -> None:
        """The guide's model.pt beside the canonical files: generator, generator_lora, generator_ema, step, format."""
        import json

        import torch

        from opens2v.weights.export import legacy_checkpoint

        step = json.loads((folder / "trainer.json").read_text())["run_state"]["step"]
        state = legacy_checkpoint(self.config, self.model, weights, ema, step)
        torch.save(state, folder / "model.pt")
        link_for_guide(folder.parent.parent, f"checkpoint_opens2v_{step:06d}")


def link_for_guide(output_dir: Path, name: str) -> None:
    """OUT/checkpoint_opens2v_000500, where the guide has it: a link into OUT/checkpoints, as far as the file
    system has links. Links to checkpoints that were since removed go.
    """
    for link in output_dir.glob("checkpoint_opens2v_*"):
        if link.is_symlink() and not link.exists():
            link.unlink()
    link = output_dir / name
    if not link.exists() and not link.is_symlink():
        with contextlib.suppress(OSError):
            link.symlink_to(Path("checkpoints") / name, target_is_directory=True)


@command
def main(argv: list[str] | None = None) -> "FitResult | None":
    config = parse(argv)
    if config.run.dry_run:
        from opens2v.plan import print_plan

        print_plan(config)
        return None
    from shared.engine.dist import shutdown

    result = OpenS2VTrainer(config).train()
    shutdown()
    return result


if __name__ == "__main__":
    main()
