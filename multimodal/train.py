"""Train the image, text and audio model in three stages.

  python multimodal/train.py --config small --output-dir outputs/multimodal      a laptop, with the data that ship here
  python multimodal/train.py --data-root ./data --output-dir ./outputs --model-size base --batch-size 8 --epochs 100
  bash scripts/train_multimodal.sh --gpus 8 --config large --data-root ./data    eight GPUs
  ... --dry-run                                                                  the plan only
The same command again resumes.
"""

import json
import sys
import time
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from multimodal.config import PRESETS, Config, TrainingConfig, stage_epochs
from shared.config import check_resume, fixed_settings, load_config, save_config
from shared.errors import UserError, command

if __name__ == "__main__" and {"-h", "--help"} & set(sys.argv):
    load_config(Config, presets=PRESETS, default="default", description=__doc__)  # answers before torch is imported

import torch

from multimodal.data.sources import Data, PairedStream, data_folder, make_datasets, open_data
from multimodal.data.text import TextTokenizer, find_glove, load_word_vectors
from multimodal.evaluation.report import write_reports
from multimodal.modules.blocks import Block
from multimodal.plan import print_plan
from multimodal.trainer import (
    BETAS,
    STAGE_NAMES,
    WEIGHT_DECAY,
    Progress,
    Trainer,
    choose_trainable,
    make_network,
    make_stage_module,
    parameter_groups,
)
from multimodal.weights.files import NAMES, load_start, put, read_payload
from shared.engine.dist import barrier, init_distributed, shutdown
from shared.engine.preflight import preflight
from shared.log import Board
from shared.loop import FitResult, fit, is_done
from shared.rng import keyed_generator, keyed_seed

MAX_WARMUP = 2000
_INITIAL_WEIGHTS, _WORDS = 613, 614


class Run:
    """One call of train.py."""

    def __init__(self, config: Config):
        self.config, self.output_dir = config, Path(config.run.output_dir)
        self.tokenizer = TextTokenizer(config.tokenizer, config.model.max_text_length)
        self.data: Data = open_data(config)
        self.epochs = stage_epochs(config.training)
        if self.epochs.get(1) and not {"image", "audio"} & set(self.data.kinds):
            raise UserError(
                "stage 1 trains on pictures and sounds with captions, and none of the data sets has them; use --stages "
                "3"
            )
        self.resume = self._resume_points()
        self._check_settings()
        self.info = init_distributed(config.run.device, 60 * config.run.timeout_minutes)
        preflight(config, self.info)
        self.classify = self.data.labelled(config.training.label_set)
        if not self.classify and config.training.label_set != "none":
            self.data.notes.append(
                f"label_set {config.training.label_set}: the data have no such labels, so stage 3 trains without "
                "classification"
            )

    def stage_dir(self, stage: int) -> Path:
        """The folder of a stage: its log, its metrics and the checkpoints that a run resumes from."""
        return self.output_dir / STAGE_NAMES[stage]

    def train(self) -> dict[int, FitResult]:
        """All stages that are not done; the report is written however this ends."""
        began, reason, results = time.time(), "finished", {}
        if self.info.is_main:
            self.output_dir.mkdir(parents=True, exist_ok=True)
            save_config(self.config, self.output_dir / "config.yaml")
            print("\n".join(self.data.notes), flush=True)
        barrier()
        try:
            state = self._initial_weights()
            for stage, epochs in self.epochs.items():
                results[stage], state = self._stage(stage, epochs, state)
                if not results[stage].finished:
                    reason = (
                        f"stopped in stage {stage} by {results[stage].stopped_by}; the same command goes on from there"
                    )
                    break
        except BaseException as error:
            reason = f"{type(error).__name__}: {error}"
            raise
        finally:
            if self.info.is_main:
                self._report(reason, time.time() - began)
        shutdown()
        return results

    def _report(self, reason: str, seconds: float) -> None:
        with torch.device("meta"):
            network = make_network(self.config, self.tokenizer.vocabulary)
        write_reports(self.config, self.data, self.info, network, reason=reason, seconds=seconds, epochs=self.epochs)

    # --- one stage ----------------------------------------------------------------------------------------------------

    def _stage(self, stage: int, epochs: int, state: dict) -> tuple[FitResult, dict]:
        folder = self.stage_dir(stage)
        resume = self.resume[stage]
        if resume == "auto" and is_done(folder) and self._has_weights(folder) and not self._grows(folder, epochs):
            if self.info.is_main:
                print(f"{STAGE_NAMES[stage]} is done, see {folder}", flush=True)
            return FitResult(0, True), self._stage_weights(folder, state)
        trainer, stream = self._trainer(stage, epochs, state, resume)
        config, module = trainer.config, trainer.module
        board = Board(
            self.output_dir / "logs" / "tensorboard" / STAGE_NAMES[stage],
            folder / "metrics.jsonl",
            self.config.run.tensorboard and self.info.is_main,
        )

        def after_step(bare: torch.nn.Module, step: int) -> None:
            trainer.after_step(bare, step)
            if (step + 1) % config.training.logging_steps == 0:
                board.update()

        result = fit(
            config=config,
            info=self.info,
            model=module,
            stream=stream,
            losses=trainer.losses,
            validate=trainer.validate,
            after_step=after_step,
            export=trainer.export,
            output_dir=folder,
            wrap_classes=(Block,),
            groups=parameter_groups(
                module,
                stage,
                weight_decay=config.training.weight_decay,
                tower_scale=config.training.tower_lr_scale,
                word_scale=config.training.word_lr_scale,
            ),
            checkpoint_name="step_{step:08d}",
            epoch_checkpoint_name="epoch_{epoch:04d}",
            title=f"{STAGE_NAMES[stage]}, {self.config.model.size}",
        )
        board.close()
        if result.finished and stage == max(self.epochs) and self.info.is_main:
            put(
                folder / "checkpoints" / self._mark(folder, "latest") / "model.pt",
                self.output_dir / "checkpoints" / NAMES[1],
            )
        barrier()
        return result, self._stage_weights(folder, state)

    def _trainer(self, stage: int, epochs: int, state: dict, resume: str) -> tuple[Trainer, PairedStream]:
        """The module of a stage over these weights, its data and its trainer."""
        folder = self.stage_dir(stage)
        network = make_network(self.config, self.tokenizer.vocabulary)
        network.load_state_dict(state)
        module = make_stage_module(self.config, stage, network)
        datasets = make_datasets(self.config, self.data.train, self.tokenizer, stage=stage, training=True)
        val = make_datasets(self.config, self.data.val, self.tokenizer, stage=stage, training=False)
        val = {kind: dataset for kind, dataset in val.items() if kind in datasets}
        classify = self.classify and stage == 3
        choose_trainable(module, self.config, stage, list(datasets), classify=classify, framed=self.data.framed)
        stream = PairedStream(datasets, self.config, self.info, folder / "bad_samples.jsonl")
        config = self._stage_config(stage, epochs, stream, resume)
        before = [number for number in self.epochs if number < stage]
        progress = Progress(
            stage,
            sum(self.epochs[number] for number in before),
            sum(self.epochs[number] for number in before) * stream.steps_per_epoch,
            stream.steps_per_epoch,
        )
        progress.best = self._best_so_far(stage, resume)
        trainer = Trainer(
            config,
            stage,
            module,
            datasets,
            val,
            self.info,
            progress,
            classify=classify,
            tokenizer_sha256=self.tokenizer.sha256,
        )
        trainer.output_dir = self.output_dir
        return trainer, stream

    def _stage_config(self, stage: int, epochs: int, stream: PairedStream, resume: str) -> Config:
        training: TrainingConfig = self.config.training
        steps = training.total_steps or epochs * stream.steps_per_epoch
        beta1, beta2, epsilon = BETAS[stage]
        changes = {
            "num_epochs": epochs,
            "adam_beta1": beta1,
            "adam_beta2": beta2,
            "adam_epsilon": epsilon,
            "weight_decay": WEIGHT_DECAY[stage] if training.weight_decay is None else training.weight_decay,
            "warmup_steps": training.warmup_steps or min(MAX_WARMUP, round(training.warmup_ratio * steps)),
            "eval_steps": training.eval_steps or training.eval_every_n_epochs * stream.steps_per_epoch,
        }
        run = self.config.run.model_copy(
            update={"resume": resume, "tensorboard": False, "output_dir": str(self.stage_dir(stage))}
        )
        return self.config.model_copy(update={"run": run, "training": training.model_copy(update=changes)})

    def _initial_weights(self) -> dict:
        torch.manual_seed(keyed_seed(self.config.run.seed, _INITIAL_WEIGHTS))
        network = make_network(self.config, self.tokenizer.vocabulary)
        training = self.config.training
        wish = training.word_embeddings
        path = (
            find_glove(data_folder(self.config, "glove").parent, network.words.embedding_dim)
            if wish == "auto"
            else None
        )
        if wish not in ("auto", "none"):
            path = Path(wish)
            if not path.is_file():
                raise UserError(
                    f"--word-embeddings {path}: no such file; multimodal/download_datasets.py --datasets glove fetches "
                    "GloVe, or use --word-embeddings none"
                )
        if path is not None:
            share = load_word_vectors(
                network.words, self.tokenizer, path, keyed_generator(self.config.run.seed, _WORDS)
            )
            self.data.notes.append(f"word vectors from {path}: {share:.1%} of the tokens are covered")
        if training.init_from:
            load_start(network, training.init_from, self.tokenizer, reset_head=training.reset_head)
        return network.state_dict()

    # --- where to go on -----------------------------------------------------------------------------------------------

    def _resume_points(self) -> dict[int, str]:
        """run.resume for each stage. A checkpoint's path leaves the stages before it as they are and starts later ones
        anew.
        """
        wish = self.config.run.resume
        if wish in ("auto", "none"):
            return dict.fromkeys(self.epochs, wish)
        path = Path(wish)
        folder = path
        if path.is_file():
            payload, _ = read_payload(path)
            folder = path.resolve().parent.parent / payload["training_state"]
            if not (folder / "manifest.json").exists():
                raise UserError(
                    f"--resume {path}: its optimizer state lay in {folder} and is gone; --init-from {path} starts from "
                    "its weights alone"
                )
        stage = next(
            (number for number, name in STAGE_NAMES.items() if name in (folder.parent.parent.name, folder.name)), None
        )
        if folder == self.output_dir:
            return dict.fromkeys(self.epochs, "auto")
        if stage is None or not folder.exists():
            raise UserError(
                f"--resume {wish}: neither a checkpoint_epoch_N.pt nor a checkpoint folder of a stage; auto takes the "
                "newest one"
            )
        return {
            number: "auto" if number < stage else str(folder) if number == stage else "none" for number in self.epochs
        }

    def _check_settings(self) -> None:
        """Refuse other settings than those of the stages that are there, before anything is written."""
        for stage, wish in self.resume.items():
            folder = self.stage_dir(stage)
            if wish == "none" or not (folder / "checkpoints" / "latest").exists():
                continue
            path = folder / "checkpoints" / self._mark(folder, "latest") / "trainer.json"
            if not path.exists():
                continue
            saved = json.loads(path.read_text())["fixed_settings"]
            if differing := check_resume(saved, fixed_settings(self.config)):
                raise UserError(
                    f"{folder} was trained with other settings: {'; '.join(differing)}; use the same, or another "
                    "--output-dir"
                )

    def _has_weights(self, folder: Path) -> bool:
        return any((folder / "checkpoints" / mark).exists() for mark in ("best", "latest"))

    def _grows(self, folder: Path, epochs: int) -> bool:
        """Whether the stage is now planned longer than it ran."""
        training = self.config.training
        if training.max_steps or training.total_steps:
            return int((folder / "DONE").read_text()) < (training.max_steps or training.total_steps)
        payload, _ = read_payload(folder / "checkpoints" / self._mark(folder, "latest"))
        before = sum(number for stage, number in self.epochs.items() if STAGE_NAMES[stage] < folder.name)
        return payload["epoch"] - before < epochs

    def _mark(self, folder: Path, mark: str) -> str:
        return (folder / "checkpoints" / mark).read_text().strip()

    def _stage_weights(self, folder: Path, state: dict) -> dict:
        """The weights that the next stage starts from: the last ones.

        The contrastive validation loss rises with the temperature while retrieval still improves, so its minimum comes
        early.
        """
        if not (folder / "checkpoints" / "latest").exists():
            return state
        return read_payload(folder / "checkpoints" / self._mark(folder, "latest"))[0]["model_state_dict"]

    def _best_so_far(self, stage: int, resume: str) -> float | None:
        """The best validation loss that best_model.pt stands for, where it is of this stage and of the run that
        resumes.
        """
        path = self.output_dir / "checkpoints" / NAMES[0]
        if resume == "none" or not path.exists():
            return None
        payload, _ = read_payload(path)
        return payload["best_val_loss"] if payload["stage"] == stage else None


@command
def main(argv: list[str] | None = None) -> None:
    """Read the settings, then plan or train."""
    config = load_config(Config, presets=PRESETS, argv=argv, default="default", description=__doc__)
    if not config.training.use_amp:
        config.run.precision = "fp32"
    try:
        stage_epochs(config.training)
    except ValueError as error:
        raise UserError(str(error)) from None
    if config.run.dry_run:
        print_plan(config)
    else:
        Run(config).train()


if __name__ == "__main__":
    main()
