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
from typing import Any

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from multimodal.config import ITEMS, PRESETS, Config, TrainingConfig, stage_epochs
from shared.config import accumulation_steps, check_resume, fixed_settings, load_config, load_saved, save_config
from shared.errors import BadSample, UserError, command, write_text

if __name__ == "__main__" and {"-h", "--help"} & set(sys.argv):
    load_config(Config, presets=PRESETS, default="default", description=__doc__)  # answers before torch is imported

import torch

from multimodal.data.sources import Data, PairedStream, data_folder, fingerprint_of, make_datasets, open_data
from multimodal.data.text import TextTokenizer, find_glove, load_word_vectors
from multimodal.evaluation.report import write_reports
from multimodal.model import MultimodalModel
from multimodal.modules.blocks import Block
from multimodal.modules.linear_path import fit_linear_path
from multimodal.objective import StageModule
from multimodal.plan import print_plan
from multimodal.trainer import (
    EPOCH_NAME,
    STAGE_NAMES,
    STEP_NAME,
    Place,
    Trainer,
    adamw_of,
    best_metric_of,
    choose_trainable,
    make_network,
    make_stage_module,
    metrics_of,
    parameter_groups,
)
from multimodal.weights.files import NAMES, load_start, missing_for_training, put, read_payload, unpack_training
from shared.engine.checkpoint import CheckpointStore, find_checkpoint, frozen_digest
from shared.engine.dist import barrier, from_main, init_distributed, shutdown
from shared.engine.preflight import preflight
from shared.log import Board
from shared.loop import FitResult, finished_checkpoint, fit, is_done
from shared.rng import keyed_generator, keyed_seed

MAX_WARMUP = 2000
TRIED = 100  # samples of a split, one of which must be readable
CARRIED = "carried"  # a stage that goes on from a file of another run
_INITIAL_WEIGHTS, _WORDS = 613, 614


class Run:
    """One call of train.py: data, the stages one after another, and the report at the end, however it ends."""

    def __init__(self, config: Config):
        self.config, self.output_dir = config, Path(config.run.output_dir)
        self.tokenizer = TextTokenizer(config.tokenizer, config.model.max_text_length)
        self.data: Data = open_data(config)
        self.epochs = stage_epochs(config.training)
        if self.epochs.get(1) and not {"image", "audio"} & set(self.data.kinds):
            raise UserError(
                "stage 1 trains on pictures and sounds with captions, none of the data sets has them; use --stages 3"
            )
        if self.epochs.get(2) and not self.data.contrasted:
            raise UserError("stage 2 compares voices with video frames, and there are none (mp4/); use --stages 3")
        self.start: dict[str, Any] | None = None  # of a checkpoint that --resume names
        self.resume = self._resume_points()
        self.info = init_distributed(config.run.device, 60 * config.run.timeout_minutes)
        self.classify = self.data.labelled(config.training.label_set)
        preflight(
            config,
            self.info,
            metrics=metrics_of(config, self.data.val, classify=self.classify, contrast=self.data.contrasted),
            checks_resume=not Path(config.run.resume).is_file(),  # a .pt of the guide: _resume_points has read it
        )
        self._check_batch()
        self._check_settings()
        self._check_readable()
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
        state = self._initial_weights() if self.start is None else self.start["model_state_dict"]
        if self.info.is_main:
            self.output_dir.mkdir(parents=True, exist_ok=True)
            save_config(self.config, self.output_dir / "config.yaml")
            rows = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in self.data.bad)
            if rows:
                write_text(self.output_dir / "bad_rows.jsonl", rows)
            print("\n".join(self.data.notes), flush=True)
        barrier()
        try:
            for stage, epochs in self.epochs.items():
                if self.start is not None and stage < self.start["stage"]:
                    continue  # its result is in the checkpoint that the run starts from
                results[stage], state = self._stage(stage, epochs, state)
                stopped = results[stage].interrupted or results[stage].stopped_by
                if not results[stage].finished or results[stage].interrupted:
                    reason = f"stopped in stage {stage} by {stopped}; the same command goes on from there"
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
        folder, resume = self.stage_dir(stage), self.resume[stage]
        done = finished_checkpoint(folder) if resume == "auto" else None
        if done is not None and not self._grows(stage, epochs, done):
            if self.info.is_main:
                print(f"{STAGE_NAMES[stage]} is done, see {folder}", flush=True)
            result = FitResult(0, True, checkpoint=done)
        else:
            result = self._fit(stage, epochs, state, resume)
            done = result.checkpoint
        if done is None:  # --no-save
            return result, state
        if result.finished and stage == max(self.epochs) and self.info.is_main:
            put(done / "model.pt", self.output_dir / "checkpoints" / NAMES[1])
        barrier()
        # The next stage starts from the last weights, not the best: retrieval still improves when the loss has risen.
        return result, read_payload(done)[0]["model_state_dict"]

    def _fit(self, stage: int, epochs: int, state: dict, resume: str) -> FitResult:
        folder = self.stage_dir(stage)
        network = make_network(self.config, self.tokenizer.vocabulary)
        network.load_state_dict(state)
        module = make_stage_module(self.config, stage, network)
        datasets = make_datasets(self.config, self.data.train, self.tokenizer, stage=stage, training=True)
        val = make_datasets(self.config, self.data.val, self.tokenizer, stage=stage, training=False)
        val = {kind: dataset for kind, dataset in val.items() if kind in datasets}
        if stage > 1 and self.config.model.linear_path:
            self._set_linear_path(network, stage, resume)
        classify = self.classify and stage == 3
        choose_trainable(module, self.config, stage, list(datasets), classify=classify, framed=self.data.framed)
        stream = PairedStream(datasets, self.config, self.info, folder / "bad_samples.jsonl")
        if resume == CARRIED:
            assert self.start is not None
            store = CheckpointStore(folder / "checkpoints", self.info)
            frozen = frozen_digest(module) if self.info.is_main else None
            resume = str(unpack_training(self.start, store, frozen))
        config = self._stage_config(stage, epochs, stream, resume)
        per_epoch = stream.epoch_steps
        before = sum(self.epochs[number] for number in self.epochs if number < stage)
        trainer = Trainer(
            config,
            Place(stage, before, before * per_epoch, per_epoch),
            module,
            datasets,
            val,
            self.info,
            self.output_dir,
            classify=classify,
            tokenizer_sha256=self.tokenizer.sha256,
        )
        board = Board(
            self.output_dir / "logs" / "tensorboard" / STAGE_NAMES[stage],
            folder / "metrics.jsonl",
            self.config.run.tensorboard and self.info.is_main,
        )

        def after_step(bare: StageModule, step: int) -> None:
            trainer.after_step(bare, step)
            if (step + 1) % config.training.logging_steps == 0:
                board.update()

        training = config.training
        assert training.weight_decay is not None, "the stage's settings hold a number"
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
                weight_decay=training.weight_decay,
                tower_scale=training.tower_lr_scale,
                word_scale=training.word_lr_scale,
            ),
            checkpoint_name=STEP_NAME,
            epoch_checkpoint_name=EPOCH_NAME,
            title=f"{STAGE_NAMES[stage]}, {self.config.model.size}",
        )
        board.close()
        return result

    def _set_linear_path(self, network: MultimodalModel, stage: int, resume: str) -> None:
        """That of the checkpoint a stage goes on from; else one that is zero yet is fitted to the training data."""
        before = self._resumed_from(stage, resume) if resume != CARRIED else None
        if before is not None:
            network.load_state_dict(read_payload(before)[0]["model_state_dict"])
        elif not network.linear.state_dict()["text.weight"].any():
            plain = make_datasets(self.config, self.data.train, self.tokenizer, stage=stage, training=False)
            fitted = fit_linear_path(network, plain) if self.info.is_main else None
            network.linear.load_state_dict(from_main(fitted))

    def _stage_config(self, stage: int, epochs: int, stream: PairedStream, resume: str) -> Config:
        training: TrainingConfig = self.config.training
        steps = training.total_steps or epochs * stream.epoch_steps
        metric, mode = best_metric_of(self.config, stage, contrast=self.data.contrasted)
        before = self._resumed_from(stage, resume)
        if before is not None:
            # Scores of two metrics do not compare: a stage keeps the one that it began with.
            was = load_saved(Config, before / "config.yaml").training
            if training.best_metric not in ("auto", was.best_metric) and stage > 1:
                raise UserError(
                    f"{before} chose its best by {was.best_metric}, now --best-metric is {training.best_metric}; "
                    "leave it out, or use another --output-dir"
                )
            metric, mode = was.best_metric, was.best_mode
        changes = {
            "num_epochs": epochs,
            **adamw_of(training, stage),
            "warmup_steps": training.warmup_steps or min(MAX_WARMUP, round(training.warmup_ratio * steps)),
            "eval_steps": training.eval_steps or training.eval_every_n_epochs * stream.epoch_steps,
            "best_metric": metric,
            "best_mode": mode,
        }
        run = self.config.run.model_copy(
            update={"resume": resume, "tensorboard": False, "output_dir": str(self.stage_dir(stage))}
        )
        return self.config.model_copy(update={"run": run, "training": training.model_copy(update=changes)})

    def _initial_weights(self) -> dict:
        torch.manual_seed(keyed_seed(self.config.run.seed, _INITIAL_WEIGHTS))
        network = make_network(self.config, self.tokenizer.vocabulary)
        training, wish = self.config.training, self.config.training.word_embeddings
        path = None
        if wish == "auto":
            path = find_glove(data_folder(self.config, "glove").parent, network.words.embedding_dim)
        elif wish != "none":
            path = Path(wish)
            if not path.is_file():
                raise UserError(
                    f"--word-embeddings {path}: no such file; multimodal/download_datasets.py --datasets glove fetches "
                    "GloVe, or use --word-embeddings none"
                )
        if path is not None:
            generator = keyed_generator(self.config.run.seed, _WORDS)
            share = load_word_vectors(network.words, self.tokenizer, path, generator)
            self.data.notes.append(f"word vectors from {path}: {share:.1%} of the tokens are covered")
        if training.init_from:
            load_start(network, training.init_from, self.tokenizer, reset_head=training.reset_head)
        return network.state_dict()

    # --- where to go on -----------------------------------------------------------------------------------------------

    def _resume_points(self) -> dict[int, str]:
        """run.resume for each stage, and self.start: the checkpoint that --resume names.

        With a checkpoint's path the stages before it are not trained, and those after it start again.
        """
        wish = self.config.run.resume
        path = Path(wish)
        if wish in ("auto", "none") or path.resolve() == self.output_dir.resolve():
            return dict.fromkeys(self.epochs, wish if wish == "none" else "auto")
        if not path.exists():
            there = sorted(path.parent.glob("checkpoint_epoch_*.pt"), key=lambda found: (len(found.name), found.name))
            known = ", ".join(found.name for found in there) or "no checkpoint_epoch_N.pt"
            raise UserError(
                f"--resume {wish}: no such file or folder; {path.parent} holds {known} (--save-every and --keep-last "
                "decide which); --resume auto takes the newest one"
            )
        if path.is_file():
            payload, _ = read_payload(path)
            lacking = missing_for_training(payload)
            folder = path.resolve().parent.parent / str(payload.get("training_state"))
            own = (folder / "manifest.json").exists() and folder.is_relative_to(self.output_dir.resolve())
            point = str(folder) if own else CARRIED
            if not own and lacking and lacking[0] != "optimizer_state_dict":
                raise UserError(f"--resume {path}: has no {', '.join(lacking)}, so it is damaged; copy it again")
            if not own and lacking:
                raise UserError(
                    f"--resume {path}: holds no optimizer state; only checkpoint_epoch_N.pt does. --init-from {path} "
                    "starts from its weights alone"
                )
        else:
            if any((path / name).is_dir() for name in STAGE_NAMES.values()):
                there = sorted(
                    path.glob("checkpoints/checkpoint_epoch_*.pt"), key=lambda own: (len(own.name), own.name)
                )
                newest = f"one of its files, such as {there[-1]}" if there else "a checkpoint folder below its stages"
                raise UserError(
                    f"--resume {wish}: the folder of another run; give {newest}, or make it the --output-dir to go on "
                    "in it"
                )
            folder = find_checkpoint(path)
            payload, point = read_payload(folder)[0], str(folder)
        stage = payload["stage"]
        if stage not in self.epochs:
            raise UserError(f"--resume {wish}: of stage {stage}, and this run has the stages {[*self.epochs]} alone")
        self.start = payload
        return {number: point if number == stage else "none" for number in self.epochs}

    def _resumed_from(self, stage: int, resume: str) -> Path | None:
        """The checkpoint folder that a stage goes on from."""
        if resume == "none":
            return None
        if resume != "auto":
            return Path(resume)
        return CheckpointStore(self.stage_dir(stage) / "checkpoints", self.info).newest_valid()[0]

    def _check_batch(self) -> None:
        """Refuse a contrast of one pair with itself, whose loss is zero whatever the model does."""
        training = self.config.training
        micro = accumulation_steps(training, self.info.world) if training.gradient_cache else 1
        if max(self.epochs) > 1 and training.batch_size * self.info.world * micro < 2:
            raise UserError(
                "stages 2 and 3 tell a pair from the others of its batch, and here is one pair alone: "
                "use --batch-size 2 or more, or --grad-accum 8 with the gradient cache, which makes one batch of "
                "all micro-steps"
            )
        if max(self.epochs) == 3 and training.batch_size == 1:
            self.data.notes.append("batch_size 1: a micro-batch has no wrong partners, so stage 3 trains no matching")

    def _check_readable(self) -> None:
        """Refuse a split of which nothing can be read, before anything is written."""
        for split, records in (("training", self.data.train), ("validation", self.data.val)):
            datasets = make_datasets(self.config, records, self.tokenizer, stage=2, training=False)
            for kind, dataset in datasets.items():
                places = range(0, len(dataset), max(1, len(dataset) // TRIED))
                faults = []
                for place in places:
                    try:
                        dataset[place]
                        break
                    except BadSample as error:
                        faults.append(str(error))
                else:
                    raise UserError(
                        f"none of {len(places)} {ITEMS[kind]}s of the {split} split can be read; give others, or "
                        f"leave that data set out; the first: {faults[0]}"
                    )

    def _check_settings(self) -> None:
        """Refuse other settings than those of the stages that are there, before anything is written."""
        training = self.config.training
        now = training.batch_size * self.info.world * accumulation_steps(training, self.info.world)
        for stage, wish in self.resume.items():
            folder = self.stage_dir(stage)
            listed = CheckpointStore(folder / "checkpoints", self.info).listed()
            if wish == CARRIED and self.start is not None:
                saved, what, is_over = self.start["trainer_state"], Path(self.config.run.resume), False
            elif wish not in ("auto", "none"):
                saved, what, is_over = json.loads((Path(wish) / "trainer.json").read_text()), Path(wish), False
            elif wish == "auto" and listed and (listed[0][1] / "trainer.json").exists():
                saved, what, is_over = json.loads((listed[0][1] / "trainer.json").read_text()), folder, is_done(folder)
            else:
                continue
            if differing := check_resume(saved["fixed_settings"], fixed_settings(self.config)):
                raise UserError(
                    f"{what} was trained with other settings: {'; '.join(differing)}; use the same, or another "
                    "--output-dir"
                )
            if not is_over and not self.config.run.allow_data_change:
                self._check_samples(stage, saved["run_state"]["fingerprint"], what)
            was = saved["run_state"]["global_batch"]
            if was not in (None, now) and not is_over:
                raise UserError(
                    f"{what} takes {was} pairs a step, now a step would take {now}, and the epochs that are left "
                    f"could not be counted; use --global-batch-size {was}, or start another --output-dir with "
                    f"--init-from {what}"
                )

    def _check_samples(self, stage: int, was: str | None, what: Path) -> None:
        """Refuse another list of samples than the one that a stage began with."""
        datasets = make_datasets(self.config, self.data.train, self.tokenizer, stage=stage, training=False)
        if was is not None and (now := fingerprint_of(datasets)) != was:
            raise UserError(
                f"{what} was trained on another list of samples (fingerprint {was}, now {now}); use the same data, or "
                "--allow-data-change"
            )

    def _grows(self, stage: int, epochs: int, done: Path) -> bool:
        """Whether a finished stage is now planned longer than it ran, and no later one has begun from it."""
        training, saved = self.config.training, json.loads((done / "trainer.json").read_text())["run_state"]
        limit = training.max_steps or training.total_steps
        if limit:
            grows = saved["step"] < limit
        else:
            before = sum(number for other, number in self.epochs.items() if other < stage)
            grows = read_payload(done)[0]["epoch"] - before < epochs
        later = [other for other in self.epochs if other > stage and self._begun(other)]
        if grows and later and self.info.is_main:
            print(
                f"{STAGE_NAMES[stage]} stays at {saved['step']} steps: {STAGE_NAMES[later[0]]} has begun from it; "
                "another --output-dir trains it longer",
                flush=True,
            )
        return grows and not later

    def _begun(self, stage: int) -> bool:
        return bool(CheckpointStore(self.stage_dir(stage) / "checkpoints", self.info).listed())


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
