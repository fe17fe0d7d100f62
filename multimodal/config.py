"""Settings of the image, text and audio model. One documented line a field. No torch import, so --help is quick."""

from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

from pydantic import field_validator, model_validator

from shared.config import MAX_BATCH, MAX_EPOCHS, MAX_STEPS, RunSection, Section, TrainingSection, setting

PRESETS = Path(__file__).parent / "configs"
SAMPLE_DATA = Path(__file__).parent / "sample_data"
DatasetName = Literal[
    "coco",
    "clotho",
    "audiocaps",
    "voxceleb",
    "flickr30k",
    "audioset",
    "esc50",
    "fsd50k",
    "jsonl",
    "shards",
    "synthetic",
]
ITEMS = {"image": "picture", "audio": "sound", "voice": "voice"}  # a kind of item, in words
DATASETS: tuple[str, ...] = get_args(DatasetName)
ALL = ("coco", "clotho", "audiocaps", "voxceleb")  # what `all` of the downloader stands for


class ModelConfig(Section):
    """The network. Fixed on resume."""

    fixed_on_resume: ClassVar[bool] = True

    size: Literal["mini", "tiny", "small", "base", "large"] = setting(
        "base", "tiny 15 M, small 35 M, base 80 M, large 200 M parameters; mini 7 M for runs on a CPU", "model_size"
    )
    embed_dim: int = setting(512, "width of embeddings and fused features", ge=8)
    num_classes: int = setting(80, "outputs of the classifier", ge=1)
    image_size: int = setting(224, "side of the square pictures, pixels; a multiple of image_patch", ge=16, le=4096)
    image_patch: int = setting(16, "side of an image patch, pixels", ge=1)
    max_text_length: int = setting(64, "text tokens, [CLS] and [SEP] included", ge=3, le=77)
    dropout: float = setting(0.0, "dropout of the residual branches while training", ge=0, lt=1)
    init_std: float = setting(
        0.02, "standard deviation of the towers' initial weights; at width 192 a short run learns from 0.07 only", gt=0
    )
    linear_path: bool = setting(
        False, "add a linear map of colours, edges, words, bands and rhythm to each embedding, fitted in closed form"
    )
    attention: Literal["auto", "sdpa", "chunked"] = setting(
        "auto", "sdpa: fused kernels; chunked: query chunks, exact; auto: chunked where no fused kernel fits"
    )
    attention_chunk: int = setting(128, "queries of one chunk", ge=1)

    @model_validator(mode="after")
    def _fits(self) -> "ModelConfig":
        if self.image_size % self.image_patch:
            raise ValueError(f"image_size {self.image_size} is not a multiple of image_patch {self.image_patch}")
        return self


def not_blank(value: str | None) -> str | None:
    """Itself; ValueError for a place without a name, as "$DATA" is where DATA is not set: it would pass for none."""
    if value is not None and not value.strip():
        raise ValueError("is empty; name a place, or leave the setting out")
    return value


def check_paths(paths: dict[str, str]) -> None:
    """ValueError for a place of a data set that nobody knows, or that has no name."""
    for place in paths.values():
        not_blank(place)
    if unknown := sorted(set(paths) - set(DATASETS)):
        raise ValueError(f"paths names no data set called {unknown[0]}; known are {', '.join(DATASETS)}")


class DataConfig(Section):
    """What is read, and how it is turned into tensors."""

    data_root: str | None = setting(
        "./data", "folder that holds coco/, clotho/, audiocaps/, ...; null: the sample data"
    )
    datasets: list[DatasetName] = setting(["coco", "clotho", "audiocaps"], "which of them to train on", fixed=True)
    paths: dict[str, str] = setting({}, "folder of a data set that does not lie below data_root, by name")
    karpathy: bool = setting(False, "coco: use the Karpathy split (dataset_coco.json) instead of train2017/val2017")
    audio_frames: int = setting(1024, "10 ms frames of a training clip; a multiple of 16", fixed=True, ge=16)
    audio_fill: Literal["repeat_pad", "pad"] = setting("repeat_pad", "short clips: repeat whole, then zeros; or zeros")
    spec_augment: bool = setting(True, "mask one span of frames and one of bands, stages 1 and 2")
    align_crop_scale: float = setting(0.6, "stages 2 and 3: least share of a picture that a crop keeps", gt=0, le=1)
    align_flip: float = setting(
        0.0, "stages 2 and 3: probability of mirroring (captions say left and right)", ge=0, le=1
    )
    caption_drop: float = setting(0.0, "stages 2 and 3: probability of leaving out each token of a caption", ge=0, lt=1)
    mel_cache: str | None = setting(None, "folder for log-mel spectrograms as fp16 .npy, written at first use")
    keep_in_memory: bool = setting(False, "keep decoded pictures and spectrograms in memory (small sets)")
    synthetic_items: int = setting(256, "synthetic: pairs of each kind", ge=8)

    _places = field_validator("data_root", "mel_cache")(not_blank)

    @field_validator("datasets", mode="before")
    @classmethod
    def _names(cls, value: Any) -> Any:
        """Take what the downloader takes: `all` stands for its sets, and glove holds no samples to train on."""
        names = [value] if isinstance(value, str) else value
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            return value  # the field's own check says what is wrong with it
        spread = [own for name in names for own in (ALL if name == "all" else [name])]
        return list(dict.fromkeys(name for name in spread if name != "glove"))

    @model_validator(mode="after")
    def _fits(self) -> "DataConfig":
        if self.audio_frames % 16:
            raise ValueError(f"audio_frames {self.audio_frames} is not a multiple of 16")
        if not self.datasets:
            raise ValueError(f"datasets is empty; name some of {', '.join(DATASETS)}")
        check_paths(self.paths)
        return self


class TrainingConfig(TrainingSection):
    """The loop and the three stages."""

    batch_size: int = setting(8, "pairs of each kind per rank and micro-step", ge=1, le=MAX_BATCH)
    num_epochs: int | None = setting(
        100,
        "passes over the image data, all stages together; stage_epochs goes before it",
        "epochs",
        ge=1,
        le=MAX_EPOCHS,
    )
    gradient_accumulation_steps: int = setting(4, "micro-steps of one optimizer step", "grad_accum", ge=1, le=MAX_BATCH)
    learning_rate: float = setting(1e-4, "peak learning rate of each stage", "lr", ge=0, le=100)
    # Null stands for a value of each stage's own; the stages' settings, which shared/ reads, hold numbers.
    weight_decay: float | None = setting(None, "null: 0.05, 0.1, 0.05 in stages 1, 2, 3", ge=0)  # type: ignore[assignment]
    adam_beta1: float | None = setting(None, "AdamW beta 1; null: 0.9", "beta1", ge=0, lt=1)  # type: ignore[assignment]
    adam_beta2: float | None = setting(  # type: ignore[assignment]
        None, "AdamW beta 2; null: 0.95, 0.98, 0.98 in stages 1, 2, 3", "beta2", ge=0, lt=1
    )
    adam_epsilon: float | None = setting(  # type: ignore[assignment]
        None, "AdamW epsilon; null: 1e-8, 1e-6, 1e-6 in stages 1, 2, 3", "eps", gt=0
    )
    best_metric: str = setting(
        "auto",
        "metric that decides best_model.pt; auto: val/loss in stage 1, val/retrieval (mean reciprocal rank) after",
    )
    best_mode: Literal["auto", "min", "max"] = setting(  # type: ignore[assignment]
        "auto", "whether the best metric is the smallest or the largest; auto: losses small, the others large"
    )
    sample_steps: int | None = setting(None, "not used: generate.py draws sheets of a trained model", hidden=True)
    max_logit_scale: float = setting(100.0, "bound of both temperatures (as the factor on cosines)", gt=1)
    lr_scheduler_type: Literal["cosine", "constant", "linear", "wsd"] = setting("cosine", "shape after the warm-up")
    warmup_ratio: float = setting(0.05, "warm-up as a share of a stage, at most 2000 steps", ge=0, le=1)
    warmup_steps: int = setting(0, "warm-up steps of each stage; 0: warmup_ratio decides", ge=0, le=MAX_STEPS)
    stages: list[int] | None = setting(
        None, "which stages to run; null: those with a share, or the last of them with one epoch"
    )
    stage_fractions: list[float] = setting([0.2, 0.4, 0.4], "share of the epochs for each of the three stages")
    stage_epochs: list[int] | None = setting(None, "epochs of each of the three stages; null: stage_fractions")
    contrastive_loss: Literal["infonce", "siglip"] = setting("infonce", "softmax or sigmoid loss", fixed=True)
    gradient_cache: bool = setting(True, "accumulation enlarges the contrastive batch, at one more forward pass")
    mask_duplicates: bool = setting(True, "equal captions in a batch count as positives of one another")
    patch_keep: float = setting(1.0, "stage 2: share of the image patches that the encoder sees", gt=0, le=1)
    audio_keep: float = setting(1.0, "stage 2: share of the audio patches that the encoder sees", gt=0, le=1)
    label_set: Literal["coco80", "images", "voxceleb1", "none"] = setting(
        "coco80", "what the classifier learns: COCO's 80 classes, the labels of own pictures, speakers, or nothing"
    )
    text_pretraining: Literal["embeddings", "mlm"] = setting(
        "embeddings",
        "stage 1, text: pre-trained word vectors, or masked language modelling",
        "unimodal_text",
        fixed=True,
    )
    word_embeddings: str = setting("auto", "GloVe text file; auto: data_root/glove when present; none: random")
    train_words: bool = setting(False, "stage 2 trains the word table too; for runs without pre-trained word vectors")
    word_lr_scale: float = setting(1.0, "learning rate of the word table relative to the text tower's", ge=0)
    tower_lr_scale: float = setting(0.3, "stage 3: learning rate of the towers relative to fusion and heads", ge=0)
    init_from: str | None = setting(None, "start the first stage from these weights")
    reset_head: bool = setting(False, "with init_from: leave out the classifier when its size differs")
    use_amp: bool = setting(True, "mixed precision where the device has it; false: fp32")
    gradient_checkpointing: bool = setting(
        True, "recompute blocks in the backward pass", "checkpointing", "use_checkpoint"
    )
    logging_steps: int = setting(20, "optimizer steps between log lines", "log_every", ge=1)
    save_steps: int | None = setting(None, "optimizer steps between checkpoints", ge=1)
    save_every_n_epochs: int | None = setting(10, "epochs between checkpoints", "save_every", ge=1)
    eval_steps: int | None = setting(None, "optimizer steps between validations; null: eval_every_n_epochs", ge=1)
    eval_every_n_epochs: int = setting(1, "epochs between validations", "eval_every", ge=1)
    keep_last: int = setting(3, "newest checkpoints kept; the best one is kept too", ge=2)
    num_workers: int = setting(4, "loader processes per rank and kind of data", "workers", ge=0)

    _places = field_validator("init_from")(not_blank)

    @model_validator(mode="after")
    def _stages_fit(self) -> "TrainingConfig":
        if self.sample_steps is not None:
            raise ValueError("sample_steps: this training draws no samples; multimodal/generate.py does, afterwards")
        if self.stages is not None and (not self.stages or set(self.stages) - {1, 2, 3}):
            raise ValueError(f"stages {self.stages}: name some of 1, 2, 3")
        if len(self.stage_fractions) != 3 or min(self.stage_fractions) < 0 or sum(self.stage_fractions) <= 0:
            raise ValueError(f"stage_fractions {self.stage_fractions}: three numbers of at least 0 are wanted")
        if self.stage_epochs is not None and (len(self.stage_epochs) != 3 or min(self.stage_epochs) < 0):
            raise ValueError(f"stage_epochs {self.stage_epochs}: three whole numbers of at least 0 are wanted")
        return self


class RunConfig(RunSection):
    """Where and how a run executes."""

    output_dir: str = setting("outputs", "folder that receives the run: checkpoints, logs, reports", "logdir")
    tensorboard: bool = setting(True, "write TensorBoard event files to OUT/logs/tensorboard")


def _section(values: dict[str, Any], name: str) -> dict[str, Any]:
    """The section of a tree, made where it is not there; ValueError where something else has its name."""
    found = values.setdefault(name, {})
    if not isinstance(found, dict):
        raise ValueError(f"{name}: expected a section with keys (got {found!r})")
    return found


class Config(Section):
    """A whole run."""

    run: RunConfig = RunConfig()
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    training: TrainingConfig = TrainingConfig()
    tokenizer: str | None = setting(
        None, "tokenizers JSON file; null: the byte-level BPE of 16,384 tokens that ships here"
    )

    _places = field_validator("tokenizer")(not_blank)

    @model_validator(mode="before")
    @classmethod
    def _guide_sections(cls, values: Any) -> Any:
        """Accept the guide's config.yaml: a `paths` section and model.use_checkpoint."""
        if not isinstance(values, dict):
            return values
        values = {key: dict(value) if isinstance(value, dict) else value for key, value in values.items()}
        paths = values.pop("paths", None) or {}
        if not isinstance(paths, dict):
            raise ValueError(f"paths: a section with data_root and output_dir is wanted, not {paths!r}")
        for key, value in paths.items():
            section = {"data_root": "data", "output_dir": "run"}.get(key)
            if section is None:
                raise ValueError(f"paths.{key}: unknown setting; known are data_root and output_dir")
            _section(values, section).setdefault(key, value)
        model = values.get("model")
        if isinstance(model, dict) and "use_checkpoint" in model:
            _section(values, "training").setdefault("use_checkpoint", model.pop("use_checkpoint"))
        return values

    @model_validator(mode="after")
    def _whole(self) -> "Config":
        if not self.training.use_amp and self.run.precision not in (None, "fp32"):
            raise ValueError(
                f"training.use_amp false and run.precision {self.run.precision} contradict; give one of them"
            )
        if self.training.label_set == "voxceleb1" and "voxceleb" not in self.data.datasets:
            raise ValueError("training.label_set voxceleb1 needs voxceleb among data.datasets")
        if self.training.label_set == "coco80" and self.model.num_classes != 80:
            raise ValueError(f"training.label_set coco80 needs model.num_classes 80, not {self.model.num_classes}")
        return self


def stage_epochs(training: TrainingConfig) -> dict[int, int]:
    """Epochs of each stage that runs, in order; every stage with a share has at least one where they suffice."""
    total, asked = training.num_epochs or 1, training.stages or [1, 2, 3]
    if training.stage_epochs is not None:
        planned = {stage: training.stage_epochs[stage - 1] for stage in sorted(set(asked))}
        if not any(planned.values()):
            raise ValueError(f"stages {list(planned)} have no epochs in stage_epochs {training.stage_epochs}")
        return {stage: number for stage, number in planned.items() if number}
    wanted = [stage for stage in sorted(set(asked)) if training.stages or training.stage_fractions[stage - 1]]
    wanted = wanted[-1:] if total == 1 and not training.stages else wanted
    share = sum(training.stage_fractions[stage - 1] for stage in wanted)
    if not share:
        raise ValueError(f"stages {wanted} have no share of the epochs in stage_fractions {training.stage_fractions}")
    exact = [total * training.stage_fractions[stage - 1] / share for stage in wanted]
    epochs = [max(1, int(value)) if total >= len(wanted) else int(value) for value in exact]
    while sum(epochs) > total:  # a minimum of one was given away
        epochs[epochs.index(max(epochs))] -= 1
    by_rest = sorted(range(len(wanted)), key=lambda i: (epochs[i] - exact[i], -i))
    for position in range(total - sum(epochs)):
        epochs[by_rest[position % len(by_rest)]] += 1
    return {stage: number for stage, number in zip(wanted, epochs, strict=True) if number}
