"""Settings of FLOAT: phase 1 (AutoencoderConfig, configs/autoencoder/), phase 2 (Config, configs/). No torch here."""

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationInfo, field_validator, model_validator

from shared.config import (
    MAX_BATCH,
    MAX_EPOCHS,
    MAX_STEPS,
    RunSection,
    Section,
    TrainingSection,
    load_saved,
    save_config,
    setting,
    validate,
)
from shared.errors import write_text
from shared.flags import leaves_of, section_of

PRESETS = Path(__file__).parent / "configs"
AUTOENCODER_PRESETS = PRESETS / "autoencoder"
SAMPLE_DATA = Path(__file__).parent / "sample_data"
CHANNELS = {4: 512, 8: 512, 16: 512, 32: 512, 64: 256, 128: 128, 256: 64, 512: 32, 1024: 16}
Box = list[float]  # left, top, right, bottom as shares of the picture side
MOUTH_BOX: Box = [0.28, 0.47, 0.72, 0.82]


class ModelConfig(Section):
    """The networks, the conditions' dropout and the sampler."""

    input_size: int = setting(
        512, "side of the pictures, pixels, a power of two", "image_size", fixed=True, ge=16, le=4096
    )
    dim_w: int = setting(512, "width of identity and motion latents", fixed=True, ge=1)
    dim_h: int = setting(1024, "width of the transformer", fixed=True, ge=8)
    dim_m: int = setting(20, "orthonormal directions of motion", fixed=True, ge=1)
    dim_a: int = setting(512, "width of projected audio features", fixed=True, ge=1)
    dim_e: Literal[7] = setting(7, "emotions: angry, disgust, fear, happy, neutral, sad, surprise", fixed=True)
    fmt_depth: int = setting(12, "blocks of the transformer", fixed=True, ge=1)
    num_heads: int = setting(16, "attention heads, a divisor of dim_h", fixed=True, ge=1)
    mlp_ratio: float = setting(4.0, "hidden width of a block's feed-forward part over dim_h", fixed=True, gt=0)
    attention_window: int = setting(2, "frames to either side that a frame attends to", fixed=True, ge=0)
    autoencoder: Literal["lia", "compact"] = setting(
        "lia", "lia: the released network; compact: learns in CPU minutes", fixed=True
    )
    channels: dict[int, int] = setting(CHANNELS, "channels of the auto-encoder by picture side", fixed=True)
    audio_features: Literal["wav2vec2", "logmel"] = setting("wav2vec2", "logmel needs no download", fixed=True)
    only_last_features: bool = setting(True, "wav2vec2: last layer only; false: all layers side by side", fixed=True)
    whiten_motion: bool = setting(
        False,
        "run the flow on the dim_m whitened coordinates of the motion; for newly trained auto-encoders",
        fixed=True,
    )
    relative_motion: bool = setting(
        False,
        "run the flow on the motion minus the reference's own, which is added back at the portrait: what tells people "
        "apart in a new auto-encoder's motion falls out; the released model is absolute",
        fixed=True,
    )
    pose_condition: bool = setting(
        False,
        "phase 2 is also given the head's pose, six values a frame against the reference picture's (turn, nod, tilt, "
        "x, y, size), so that generate.py --pose can hold the head or take its movement from a video",
        fixed=True,
    )
    audio_dropout_prob: float = setting(0.1, "training: share of samples without sound", ge=0, le=1)
    ref_dropout_prob: float = setting(0.1, "training: share of samples without reference motion", ge=0, le=1)
    emotion_dropout_prob: float = setting(0.1, "training: share of samples without emotion", ge=0, le=1)
    prev_frame_dropout_prob: float = setting(
        0.5, "training: share without previous motion, and, drawn apart, previous sound", ge=0, le=1
    )
    pose_dropout_prob: float = setting(
        0.5, "pose_condition: share of training samples without the pose, from which a free head is learned", ge=0, le=1
    )
    ode_method: str = setting("euler", "euler, midpoint, heun, rk4, or a torchdiffeq method", "torchdiffeq_ode_method")
    nfe: int = setting(10, "time points of the sampler; one more than its steps", ge=2)
    ode_atol: float = setting(1e-5, "absolute tolerance of adaptive methods", "atol", gt=0)
    ode_rtol: float = setting(1e-5, "relative tolerance of adaptive methods", "rtol", gt=0)
    a_cfg_scale: float = setting(2.0, "guidance by sound")
    r_cfg_scale: float = setting(1.0, "guidance by reference motion; acts with reference_guidance only")
    e_cfg_scale: float = setting(1.0, "guidance by emotion")
    reference_limit: float | None = setting(
        None,
        "with whiten_motion: sampling holds the portrait's own motion within so many deviations of the training "
        "frames' and adds what lies beyond to the result: so faces unlike any known one speak; null: as it is",
        gt=0,
    )
    reference_guidance: bool = setting(False, "a further pass without reference motion")
    autoencoder_path: str | None = setting(
        None, "trained auto-encoder: a phase-1 run, a .safetensors file or float.pth; null: train one first"
    )
    fmt_path: str | None = setting(
        None, "start the transformer from float.pth or a file of weights; null: from scratch", "ckpt_path"
    )
    wav2vec_model_path: str = setting("checkpoints/wav2vec2-base-960h", "folder of wav2vec2-base-960h")
    audio2emotion_path: str = setting(
        "checkpoints/wav2vec-english-speech-emotion-recognition", "folder of the speech emotion recogniser"
    )

    @model_validator(mode="after")
    def _fits_together(self) -> "ModelConfig":
        if self.dim_h % self.num_heads:
            raise ValueError(f"dim_h {self.dim_h} is not divisible by num_heads {self.num_heads}")
        if self.input_size & (self.input_size - 1):
            raise ValueError(f"input_size {self.input_size} is not a power of two")
        if self.dim_m > self.dim_w:
            raise ValueError(f"dim_m {self.dim_m} directions do not fit into dim_w {self.dim_w}")
        if self.reference_limit is not None and not self.whiten_motion:
            raise ValueError(
                f"reference_limit {self.reference_limit} counts deviations of whitened motion; set whiten_motion, or "
                "reference_limit null"
            )
        sides = [2**exponent for exponent in range(2, self.input_size.bit_length())]
        missing = [side for side in sides if side not in self.channels]
        if missing:
            raise ValueError(f"channels lacks the sides {missing} of input_size {self.input_size}")
        return self


class DataConfig(Section):
    """Clips, windows, and what is cached of them."""

    data_root: str | None = setting("datasets", "folder of clips; null: the sample data of this repository")
    features_dir: str | None = setting(None, "cache of encoded clips; null: features/ in the output folder")
    video_fps: float = setting(25.0, "frames per second that clips are read at", "fps", gt=0)
    audio_sample_rate: Literal[16000] = setting(16000, "samples per second of the sound")
    sequence_length: int = setting(16, "frames of a window, L", fixed=True, ge=1)
    prev_frames: int = setting(4, "frames of context before it, P", "num_prev_frames", fixed=True, ge=1)
    wav2vec_sec: float = setting(0.64, "seconds of a window; seconds x frames per second = sequence_length", gt=0)
    train_split: str = setting("train", "split to train on")
    val_split: str = setting("test", "split to validate on")
    emotion_source: Literal["ser", "label", "mixed", "none"] = setting(
        "ser", "ser: recogniser on the clip's sound; label: the data set's; mixed: label where there is one"
    )
    max_bad_share: float = setting(
        0.01, "largest share of a split's clips that may be unusable (silent, unreadable); one always may", ge=0, le=1
    )
    drop_last: bool = setting(True, "leave out the last incomplete batch of an epoch")
    pin_memory: Literal[True] = setting(True, "batches for a GPU lie in pinned memory", hidden=True)
    use_augmentation: bool = setting(
        True, "flip and colour frames in phase 1, cache flipped motion, add noise to previous motion in phase 2"
    )
    horizontal_flip_prob: float = setting(0.5, "share of mirrored clips or frames", ge=0, le=1)
    color_jitter_prob: float = setting(
        0.3, "phase 1: share of frame pairs whose two pictures get other colours, each its own", ge=0, le=1
    )
    gaussian_noise_prob: float = setting(
        0.2, "phase 2: share of windows whose previous motion is made noisy", ge=0, le=1
    )
    gaussian_noise_std: float = setting(0.05, "its standard deviation, as a share of the motion's", ge=0)
    face_crop: bool | None = setting(
        None,
        "crop clips to the face (boxes.json or the detector); null: those whose frames are not square; false: none",
    )
    mouth_box: Box = setting(
        MOUTH_BOX,
        "mouth in a cropped picture: left, top, right, bottom as shares of the side (for losses and scores; the mouth "
        "branch of the compact auto-encoder keeps the default box)",
    )
    eye_box: Box = setting([0.2, 0.3, 0.8, 0.52], "eyes and brows in a cropped picture")
    feature_dtype: Literal["float32", "float16"] = setting("float32", "number type of cached raw audio features")

    @model_validator(mode="after")
    def _window_length(self) -> "DataConfig":
        frames = int(self.wav2vec_sec * self.video_fps + 1e-6)
        if frames != self.sequence_length:
            raise ValueError(
                f"wav2vec_sec {self.wav2vec_sec} x video_fps {self.video_fps:g} = {frames} frames, "
                f"sequence_length is {self.sequence_length}; "
                f"set wav2vec_sec {self.sequence_length / self.video_fps:g}"
            )
        if self.prev_frames > self.sequence_length:
            raise ValueError(f"prev_frames {self.prev_frames} is more than sequence_length {self.sequence_length}")
        for name in ("mouth_box", "eye_box"):
            box = getattr(self, name)
            if len(box) != 4 or not (0 <= box[0] < box[2] <= 1 and 0 <= box[1] < box[3] <= 1):
                raise ValueError(f"{name} {box} is not left, top, right, bottom within 0 and 1")
        return self


class _GuideNames(TrainingSection):
    """The loop's settings under the guide's names."""

    optimizer: Literal["adamw", "adam", "sgd"] = setting(  # type: ignore[assignment]  # wider than the shared section's
        "adamw", "adam: weight decay is a part of the gradient; sgd: without momentum", fixed=True
    )
    max_grad_norm: float | None = setting(
        1.0, "clip the gradient norm to this; null: no clipping", "grad_clip", "gradient_clip_val", ge=0
    )
    logging_steps: int = setting(100, "optimizer steps between log lines", "log_every", "log_interval", ge=1)
    save_steps: int | None = setting(
        5000,
        "optimizer steps between checkpoints; null: only at the end",
        "save_every",
        "save_checkpoint_interval",
        ge=1,
    )
    eval_steps: int | None = setting(
        1000, "optimizer steps between validations; null: only at the end", "eval_every", "val_check_interval", ge=1
    )
    keep_last: int = setting(
        5,
        "newest checkpoints kept; the best one is kept beside them",
        "save_total_limit",
        "max_checkpoints_to_keep",
        ge=2,
    )
    warmup_steps: int | None = setting(  # type: ignore[assignment]  # a number once settle() has run
        None,
        "steps of linear warm-up; null: lr_warmup_epochs, else 0",
        "num_warmup_steps",
        instead_of=("lr_warmup_epochs",),
        ge=0,
        le=MAX_STEPS,
    )
    min_lr_ratio: float | None = setting(  # type: ignore[assignment]  # a number once settle() has run
        None, "last learning rate as a share of the peak; null: lr_min, else 0", instead_of=("lr_min",), ge=0, le=1
    )
    lr_warmup_epochs: float | None = setting(
        None, "epochs of warm-up, where warmup_steps is null", instead_of=("warmup_steps",), ge=0, le=MAX_EPOCHS
    )
    lr_min: float | None = setting(
        None, "last learning rate, where min_lr_ratio is null", instead_of=("min_lr_ratio",), ge=0
    )
    use_amp: bool = setting(False, "mixed precision on a GPU where --precision is not given")
    amp_dtype: Literal["float16", "bfloat16"] = setting("float16", "its number type")

    @field_validator("lr_scheduler_type", mode="before")
    @classmethod
    def _none_is_constant(cls, value: Any, info: ValidationInfo) -> Any:
        return "constant" if value in (None, "none") else value


class TrainingConfig(_GuideNames):
    """Phase 2: rectified flow on motion latents."""

    batch_size: int = setting(8, "windows per rank and micro-step", ge=1, le=MAX_BATCH)
    lr_warmup_epochs: float | None = setting(
        5.0, "epochs of warm-up, where warmup_steps is null", instead_of=("warmup_steps",), ge=0, le=MAX_EPOCHS
    )
    lr_min: float | None = setting(
        1e-6, "last learning rate, where min_lr_ratio is null", instead_of=("min_lr_ratio",), ge=0
    )
    use_amp: bool = setting(True, "mixed precision on a GPU where --precision is not given")
    early_stopping_min_delta: float = setting(1e-4, "smallest gain of best_metric that counts as better", ge=0)
    weight_decay: float = setting(1e-5, "decoupled weight decay of matrices", ge=0)
    early_stopping_patience: int | None = setting(
        10, "stop after so many validations without a better best_metric; null: never", ge=1
    )
    loss_type: Literal["mse", "l1", "huber"] = setting(
        "mse", "distance between predicted and true velocity", fixed=True
    )
    lambda_ot: float = setting(1.0, "weight of the flow term", fixed=True, ge=0)
    lambda_vel: float = setting(1.0, "weight of the term on differences of neighbouring frames", fixed=True, ge=0)
    prev_loss_weight: float = setting(0.0, "weight of the term on the previous frames", fixed=True, ge=0)
    sigma_min: float = setting(0.0, "share of noise left at t = 1", fixed=True, ge=0)
    sigma_max: float = setting(1.0, "scale of the noise at t = 0", fixed=True, gt=0)
    time_sampling: Literal["uniform", "logit_normal"] = setting("uniform", "distribution of training times", fixed=True)

    @model_validator(mode="after")
    def _noise_falls(self) -> "TrainingConfig":
        if self.sigma_min >= self.sigma_max:
            raise ValueError(f"sigma_min {self.sigma_min} must be below sigma_max {self.sigma_max}")
        return self

    @property
    def window_only(self) -> bool:
        """Whether the previous frames' velocity is left out: no loss asks for it (compiled blocks keep one length)."""
        return self.prev_loss_weight == 0 and not self.compile


class AutoencoderTrainingConfig(_GuideNames):
    """Phase 1: the motion auto-encoder. A term with weight 0 is off."""

    batch_size: int = setting(8, "frame pairs per rank and micro-step", ge=1, le=MAX_BATCH)
    learning_rate: float = setting(2e-4, "peak learning rate", "lr", ge=0, le=100)
    lambda_l1: float = setting(1.0, "weight of the mean absolute difference", fixed=True, ge=0)
    lambda_l2: float = setting(0.0, "weight of the mean squared difference", fixed=True, ge=0)
    lambda_box: float = setting(
        0.0, "weight of the mean squared difference in the mouth box (a third of it in the eye box)", fixed=True, ge=0
    )
    lambda_perceptual: float = setting(10.0, "weight of the perceptual distance", fixed=True, ge=0)
    lambda_component: float = setting(
        100.0, "weight of the perceptual distance within eye and mouth boxes", fixed=True, ge=0
    )
    lambda_adversarial: float = setting(
        1.0, "weight of the full-picture, eye and lip adversarial terms", fixed=True, ge=0
    )
    lambda_style: float = setting(
        100.0, "weight of feature style matching in eye and lip discriminators", fixed=True, ge=0
    )
    adversarial_start: int = setting(0, "first step of the adversarial and style terms", fixed=True, ge=0)
    r1_gamma: float = setting(10.0, "weight of the discriminators' gradient penalty", fixed=True, ge=0)
    r1_every: int = setting(16, "steps between gradient penalties", fixed=True, ge=1)
    vgg_path: str | None = setting(
        None, "weights of VGG-19 (torchvision's file); null: a frozen random stack in its place"
    )
    both_ways: bool = setting(
        False, "each pair also the other way round: twice the pictures from the same two encodings", fixed=True
    )
    pairs_per_second: float = setting(1.0, "frame pairs drawn per second of video in one epoch", gt=0)


# what files in the author's style hold besides settings, with the values that change nothing here
DECIDED_ELSEWHERE = {"use_ddp": (False, True), "local_rank": (-1, 0), "rank": (0,), "wandb_entity": (None,)}


def _in_place(schema: type[Section], values: Any) -> Any:
    """A tree whose settings stand in the sections that know them.

    Files in the author's style have use_wandb under training, image_size under data, seed and device at the top. What
    the launcher decides (use_ddp, local_rank, rank) is dropped.
    """
    if not isinstance(values, dict):
        return values
    places: dict[str, str] = {}  # section by setting's name
    for leaf in leaves_of(schema):
        section = leaf.path.rpartition(".")[0]
        places |= {name: section for name in leaf.flags if name not in places}
    sections = [name for name, field in schema.model_fields.items() if section_of(field.annotation) is not None]
    tree = {name: dict(part) if isinstance(part, dict) else part for name, part in values.items()}
    for home in ("", *sections):
        part = tree if home == "" else tree.get(home)
        if not isinstance(part, dict):
            continue
        own = {name for leaf in leaves_of(schema) if leaf.path.rpartition(".")[0] == home for name in leaf.flags}
        for name in [name for name in part if name not in own and name not in sections]:
            if part[name] in DECIDED_ELSEWHERE.get(name, ()):
                del part[name]
            elif name in places and isinstance(tree.setdefault(places[name], {}), dict):
                section, value = places[name], part.pop(name)
                if section == "run" and name.startswith("resume") and value is None:
                    value = "auto"
                tree[section].setdefault(name, value)
    return tree


class _RunSection(RunSection):
    """Where and how a run executes."""

    output_dir: str = setting(
        "experiments", "folder that receives the run: config, logs, checkpoints, samples, report", "logdir"
    )
    run_name: str | None = setting(
        "float_rectified_flow", "name of the run in Weights & Biases", "wandb_run_name", "experiment_name"
    )
    wandb_project: str = setting("float-training", "Weights & Biases project")


class Config(Section):
    """Everything a phase-2 run needs; save and load keep it equal. Config() is the preset default."""

    run: _RunSection = setting({}, "where and how the run executes", hidden=True)
    model: ModelConfig = setting({}, "the networks", hidden=True)
    data: DataConfig = setting({}, "clips and windows", hidden=True)
    training: TrainingConfig = setting({}, "the loop", hidden=True)

    @model_validator(mode="before")
    @classmethod
    def _settings_in_their_place(cls, values: Any) -> Any:
        return _in_place(cls, values)

    autoencoder_config: str = setting("default", "phase-1 preset or file used when autoencoder_path is null")
    synthetic: bool = setting(False, "train on generated motion instead of clips (a check of the installation)")

    def save(self, path: str | Path) -> None:
        """Write as JSON where the name ends in .json, else as YAML."""
        if Path(path).suffix.lower() == ".json":
            write_text(path, json.dumps(self.to_dict(), indent=1, ensure_ascii=False) + "\n")
        else:
            save_config(self, Path(path))

    @classmethod
    def load(cls, path: str | Path) -> "Config":
        """Read what save wrote, YAML or JSON."""
        return load_saved(cls, Path(path))

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return self.model_dump(mode="json")

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Config":
        """Validated settings; a UserError names every fault."""
        return validate(cls, values, "from_dict")


class AutoencoderConfig(Section):
    """Everything a phase-1 run needs."""

    run: RunSection = setting({}, "where and how the run executes", hidden=True)
    model: ModelConfig = setting({}, "the networks", hidden=True)
    data: DataConfig = setting({}, "clips", hidden=True)
    training: AutoencoderTrainingConfig = setting({}, "the loop", hidden=True)


def data_root(data: DataConfig) -> Path:
    """The folder of clips."""
    return SAMPLE_DATA if data.data_root is None else Path(data.data_root)


def features_dir(config: Config) -> Path:
    """The cache folder of a run."""
    return Path(config.data.features_dir or Path(config.run.output_dir) / "features")


def settle(config: Config | AutoencoderConfig, *, steps_per_epoch: int, device_type: str) -> None:
    """Turn epochs, least learning rate and mixed precision of the guide into the loop's settings, once, at start."""
    training = config.training
    if training.warmup_steps is None:
        training.warmup_steps = round((training.lr_warmup_epochs or 0) * steps_per_epoch)
    if training.min_lr_ratio is None:
        peak = training.learning_rate
        training.min_lr_ratio = min(1.0, (training.lr_min or 0) / peak) if peak > 0 else 0.0
    if config.run.precision is None and device_type == "cuda":
        amp: Literal["fp16", "bf16"] = "fp16" if training.amp_dtype == "float16" else "bf16"
        config.run.precision = amp if training.use_amp else "fp32"
