"""Settings of OpenS2V: sections, the flat keys of the user's guide, and the checks that need no data."""

import difflib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import model_validator

from shared.config import MAX_BATCH, MAX_EPOCHS, MAX_STEPS, RunSection, Section, TrainingSection, extra_of, setting
from shared.errors import UserError

PRESETS = Path(__file__).parent / "configs"
SAMPLE_DATA = Path(__file__).parent / "sample_data"

NEGATIVE_PROMPT = (  # the standard one of Wan2.1
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，JPEG压缩残留，丑陋的，残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，静止不动的画面，杂乱的背景，三条腿，背景人很多，倒着走"
)
ATTENTION = ["to_q", "to_k", "to_v", "to_out"]


class OpenS2VRunSection(RunSection):
    """The shared run settings and the guide's flags."""

    output_dir: str = setting("outputs/opens2v", "folder that receives the run", "logdir")
    auto_resume: bool = setting(
        True, "go on from the newest checkpoint of the output folder; --no-auto-resume: start anew"
    )
    visualize: bool = setting(True, "write sample videos; --no-visualize: none")
    wandb_save_dir: str | None = setting(None, "folder of Weights & Biases' own files; null: output_dir")
    disable_wandb: bool = setting(False, "do not log to Weights & Biases, whatever the file says")
    seed: int = setting(
        42,
        "seed of data order, noise and new weights; 0: draw one, the same on all ranks",
        fixed=True,
        ge=0,
        le=2**63 - 1,
    )


class DataConfig(Section):
    """Which clips, and what is made of them. In a guide's YAML this section is called `opens2v`."""

    json_paths: list[str] = setting(
        [], "annotation files (.json, .jsonl or folders), one per part; empty: the sample data", fixed=True
    )
    video_base_paths: list[str] = setting([], "video folders, one per part")
    background_base_paths: list[str] = setting([], "folders of background pictures (called `foreground`), one per part")
    scenes: str | None = setting(
        None,
        "drawings (`sample`, the .json of a sheet, or a folder): without json_paths scenes are composed of them, with "
        "json_paths see other_subject_probability",
        fixed=True,
    )
    val_json_paths: list[str] = setting(
        [], "annotation files of the validation clips, one per part; empty: see train_share"
    )
    val_video_base_paths: list[str] = setting([], "video folders of the validation clips")
    index_dir: str | None = setting(
        None, "folder of the indexes of large annotation files; null: beside them, or where that is read-only in "
        "the user's cache folder"
    )  # fmt: skip
    num_training_frames: int = setting(21, "frames of a training clip", "num_frames", ge=1, le=10_001, fixed=True)
    num_training_frames_unit: Literal["pixel", "latent"] = setting("pixel", "unit of num_training_frames", fixed=True)
    pixel_height: int = setting(480, "height of the video, pixels", "height", ge=16, le=8192, fixed=True)
    pixel_width: int = setting(832, "width of the video, pixels", "width", ge=16, le=8192, fixed=True)
    ref_height: int = setting(256, "height of a subject picture for the VAE path, pixels", ge=8, le=8192, fixed=True)
    ref_width: int = setting(256, "width of a subject picture for the VAE path, pixels", ge=8, le=8192, fixed=True)
    ref_place: Literal["canvas", "frame"] = setting(
        "canvas", "a subject picture for the VAE path fills its canvas, or lies in it as large and as high as in the "
        "annotated frame; a picture that is of no frame fills it", fixed=True
    )  # fmt: skip
    ref_clip_size: int = setting(224, "side of a subject picture for the image encoder, pixels", ge=16, fixed=True)
    sample_stride: int = setting(3, "frames from one training frame to the next", ge=1, fixed=True)
    target_fps: float | None = setting(
        None, "when set, the stride follows from the clip's frame rate (16 suits Wan)", gt=0
    )
    max_subjects_per_sample: int = setting(1, "subject pictures of a sample", ge=1, fixed=True)
    subject_selection: Literal["first", "random", "best_score"] = setting("first", "which subjects are taken")
    is_cross_frame: bool = setting(False, "take the subject picture from another clip of the same long video")
    cross_frames_cluster_path: str | None = setting(None, "cluster_videos.json")
    cross_frames_base_path: str | None = setting(
        None, "folder with one pair file per cluster, or cross_frames_pairs.json"
    )
    cross_min_similarity: float = setting(0.6, "least picture similarity of a pair", ge=0)
    cross_max_similarity: float = setting(0.98, "largest picture similarity of a pair; above are near duplicates", ge=0)
    min_gme_score: float | None = setting(None, "least text-picture score of a subject (0.2 to 0.5)")
    min_aes_score: float | None = setting(None, "least aesthetic score of a subject (3 to 6)")
    min_crop_ratio: float | None = setting(None, "least share of the frame that a cut-out covers", ge=0, le=1)
    max_crop_ratio: float | None = setting(None, "largest share of the frame that a cut-out covers", ge=0, le=1)
    subject_tag_groups: list[Literal["subject", "object", "background", "pre_define"]] | None = setting(
        None, "word_tags groups of usable subjects"
    )
    dedup_iou: float | None = setting(
        None, "drop a subject whose mask overlaps a kept one by more (0.9 is sensible)", ge=0, le=1
    )
    use_bbox: bool = setting(False, "cut subjects out with the background inside their box")
    ref_augment: bool = setting(True, "flip, turn, scale and recolour subject pictures a little")
    caption_key: str = setting("face_cap_qwen", "metadata field of the caption")
    max_retries: int = setting(
        10, "other samples that create_opens2v_dataloader tries in place of a broken one; train.py tries 20", ge=0
    )
    strict: bool = setting(False, "stop at the first broken sample")
    load_background: bool = setting(
        False, "load the background pictures, for loops of your own; train.py has no use for them"
    )
    recolour_probability: float = setting(
        0.0, "share of samples whose subject changes colour, in video and picture alike", ge=0, le=1
    )
    other_scene_probability: float = setting(
        0.0, "share of samples whose subject is shown in front of another clip's background (still cameras)", ge=0, le=1
    )
    other_subject_probability: float = setting(
        0.0, "share of samples whose subject gives its place to a drawing of `scenes` (still cameras)", ge=0, le=1
    )
    generic_caption_probability: float = setting(
        0.0, "share of samples whose caption calls the subject `subject`", ge=0, le=1
    )
    train_share: float = setting(
        1.0, "leading share of each clip that is trained on; the rest is for validation", gt=0, le=1
    )
    only_keys: list[str] = setting([], "use only entries whose key contains one of these")
    without_keys: list[str] = setting([], "leave out entries whose key contains one of these")
    keep_decoded: bool = setting(False, "keep decoded clips at training size in memory (small sets)")
    cache_dir: str | None = setting(None, "folder of precompute.py")
    use_cached_text: bool = setting(False, "text features from cache_dir")
    use_cached_latents: bool = setting(False, "video latents from cache_dir")
    use_cached_clip: bool = setting(False, "picture features from cache_dir")

    @model_validator(mode="after")
    def _ranges(self) -> "DataConfig":
        for name in ("crop_ratio", "similarity"):
            least, most = (f"cross_{end}_{name}" if name == "similarity" else f"{end}_{name}" for end in ("min", "max"))
            low, high = getattr(self, least), getattr(self, most)
            if low is not None and high is not None and low > high:
                raise ValueError(f"{least} {low} is above {most} {high}: no subject would be left")
        return self


# What a choice among clips is, and means nothing for composed scenes.
OF_CLIPS = (
    "sample_stride", "target_fps", "subject_selection", "is_cross_frame", "cross_frames_cluster_path",
    "cross_frames_base_path", "cross_min_similarity", "cross_max_similarity", "min_gme_score", "min_aes_score",
    "min_crop_ratio", "max_crop_ratio", "subject_tag_groups", "dedup_iou", "use_bbox", "ref_augment", "ref_place",
    "caption_key",
    "load_background", "recolour_probability", "other_scene_probability", "other_subject_probability",
    "generic_caption_probability", "only_keys", "without_keys", "val_json_paths", "val_video_base_paths",
    "background_base_paths", "video_base_paths",
)  # fmt: skip


class ModelConfig(Section):
    """The generator, its base weights and the frozen encoders."""

    fixed_on_resume = True

    generator_ckpt: str | None = setting(None, "base weights: diffusers folder, .safetensors or .pt, in either naming")
    use_ema: bool = setting(False, "take generator_ema of a .pt base")
    init_from: str | None = setting(
        None,
        "trained adapters that a new run starts from: a run, a checkpoint, a model.pt, or LoRA and reference modules "
        "of another program, a file or a folder",
    )
    base_model_path: str | None = setting(None, "folder with transformer, vae, text_encoder and tokenizer")
    image_encoder_path: str | None = setting(None, "folder of the CLIP picture encoder")
    codec: Literal["wan", "patch", "conv"] = setting(
        "wan", "video to latents: Wan's VAE, components of 4 x 4 patches, or a small convolutional auto-encoder"
    )
    text_encoder: Literal["umt5", "hash", "hash_ordered"] = setting(
        "umt5", "text to rows: UMT5-XXL, or hashed words, ordered: each with a trace of the word before"
    )
    image_encoder: Literal["clip", "pixels"] = setting(
        "clip", "subject picture to tokens: CLIP ViT-H/14, or mean colours of cells"
    )
    base_dtype: Literal["fp32", "bf16"] = setting("bf16", "precision in which the frozen base lies in memory")
    text_encoder_cpu_offload: bool = setting(False, "keep the text encoder on the CPU")
    num_layers: int = setting(30, "transformer blocks", ge=1)
    num_attention_heads: int = setting(12, "attention heads", ge=1)
    attention_head_dim: int = setting(128, "width of a head", ge=6)
    ffn_dim: int = setting(8960, "hidden width of the feed-forward layers", ge=1)
    freq_dim: int = setting(256, "channels of the time embedding's sinusoid", ge=2)
    text_dim: int = setting(4096, "width of the text rows", ge=1)
    text_rows: int = setting(512, "text rows, padding included", ge=1)
    patch_size: int = setting(2, "latent pixels along each side of a token", ge=1)
    prediction: Literal["velocity", "gaussian"] = setting(
        "velocity", "what the base gives: the velocity (Wan), or mean and variance of the clean video (small base)"
    )
    absolute_positions: bool = setting(
        False, "add fixed positions in frame, row and column to the video tokens (small base: learns a scene sooner)"
    )
    position_base: float = setting(
        10000.0,
        "slowest wavelength of fixed positions, in positions over 2 pi; small grids want about their side",
        gt=1,
    )
    clip_path: Literal["shared", "separate", "off"] = setting(
        "shared", "keys and values of the CLIP path: the text's, own ones, or no path"
    )
    clip_proj_type: Literal["linear", "mlp"] = setting("linear", "projection of the CLIP tokens")
    vae_pos_embed: Literal["sincos2d", "none"] = setting("sincos2d", "positions of the picture's latent pixels")
    train_fused_path: bool = setting(False, "a third path over both kinds of tokens")
    ref_in_self_attention: bool = setting(
        False, "self-attention also looks at what the base itself makes of the subject pictures, with layers of its own"
    )
    causal: bool = setting(False, "block-causal attention over frames (Self-Forcing, LongLive)")
    num_frame_per_block: int = setting(3, "latent frames of a causal block", ge=1)
    independent_first_frame: bool = setting(False, "the first latent frame is a causal block of its own")
    teacher_forcing: bool = setting(False, "noisy blocks see the clean frames of earlier ones; needs causal")
    noise_augmentation_max_timestep: int = setting(
        0, "teacher forcing: noise the clean frames up to this timestep", ge=0, lt=1000
    )
    local_attn_size: int = setting(-1, "causal window in latent frames; -1: all", ge=-1)

    @model_validator(mode="after")
    def _consistent(self) -> "ModelConfig":
        if self.teacher_forcing and not self.causal:
            raise ValueError("teacher_forcing needs causal: true; a bidirectional model has no earlier blocks")
        if self.noise_augmentation_max_timestep and not self.teacher_forcing:
            raise ValueError(
                "noise_augmentation_max_timestep needs teacher_forcing: true; there are no clean frames to noise"
            )
        if self.local_attn_size == 0 or (self.local_attn_size > 0 and not self.causal):
            raise ValueError("local_attn_size needs causal: true and at least one frame; use -1 for all frames")
        return self


class AdapterConfig(Section):
    """LoRA on the base's attention, beside the reference modules."""

    fixed_on_resume = True

    adapter_type: Literal["lora"] = setting("lora", "the guide's key; LoRA is the only kind", "type")
    r: int = setting(64, "LoRA rank; 0: no LoRA", "rank", ge=0)
    lora_alpha: float = setting(64, "LoRA strength times rank", "alpha", gt=0)
    lora_dropout: float = setting(0.0, "dropout in front of the LoRA layers", "dropout", ge=0, lt=1)
    target_modules: list[str] = setting(ATTENTION, "adapted layers of the attention")
    scope: list[Literal["attn1", "attn2"]] = setting(["attn1", "attn2"], "self-attention, cross-attention")
    adapter_lr: float | None = setting(None, "learning rate of the LoRA layers; null: that of the rest", gt=0, le=100)

    @model_validator(mode="after")
    def _some_layers(self) -> "AdapterConfig":
        lora_pattern(self.target_modules, self.scope)
        return self


def lora_pattern(target_modules: Sequence[str], scope: Sequence[str]) -> str:
    """The regular expression of the adapted layers. diffusers' to_out is (linear, dropout): its linear is to_out.0."""
    unknown = [name for name in target_modules if name.removesuffix(".0") not in ATTENTION]
    if unknown or not target_modules or not scope:
        raise UserError(
            f"adapter.target_modules: {', '.join(unknown) or 'no layer'} not known; there are {', '.join(ATTENTION)}, "
            "the names of diffusers, also for weights that came under the original names q, k, v, o; and a scope"
        )
    layers = [r"to_out\.0" if name.removesuffix(".0") == "to_out" else name for name in target_modules]
    return rf"blocks\.\d+\.({'|'.join(scope)})\.({'|'.join(layers)})"


class TrainingConfig(TrainingSection):
    """The loop's settings and the objective's."""

    batch_size: int = setting(1, "samples per rank and micro-step", ge=1, le=MAX_BATCH)
    total_steps: int | None = setting(10000, "optimizer steps of the run", "max_iters", ge=1, le=MAX_STEPS)
    num_epochs: int | None = setting(None, "passes over the data, when total_steps is null", ge=1, le=MAX_EPOCHS)
    learning_rate: float = setting(1e-4, "peak learning rate", "lr", ge=0, le=100)
    weight_decay: float = setting(0.01, "decoupled weight decay of matrices", ge=0)
    adam_epsilon: float = setting(1e-8, "AdamW epsilon", "eps", "adam_eps", gt=0)
    lr_scheduler_type: Literal["constant", "linear", "cosine", "wsd"] = setting(
        "constant", "shape after the warm-up", "lr_scheduler"
    )
    warmup_steps: int = setting(200, "steps of linear warm-up", ge=0, le=MAX_STEPS)
    ema_decay: float = setting(0.0, "decay of the trained weights' moving average; 0: off", "ema_weight", ge=0, lt=1)
    logging_steps: int = setting(10, "optimizer steps between log lines", "print_iters", ge=1)
    save_steps: int | None = setting(500, "optimizer steps between checkpoints", "log_iters", ge=1)
    eval_steps: int | None = setting(
        None, "optimizer steps between validations; null: only at the end", "val_interval", ge=1
    )
    keep_last: int = setting(1_000_000, "newest checkpoints kept", "max_checkpoints", ge=1)
    num_workers: int = setting(4, "loader processes per rank", ge=0)
    gradient_checkpointing: bool = setting(True, "recompute blocks in the backward pass to save memory")
    p_drop_text: float = setting(0.05, "share of samples trained without text", ge=0, le=1)
    p_drop_ref: float = setting(0.05, "share of samples trained without subject", ge=0, le=1)
    p_drop_both: float = setting(0.05, "share of samples trained without either", ge=0, le=1)
    timestep_shift: float = setting(5.0, "shift of the noise levels, in training and sampling", gt=0)
    num_train_timestep: int = setting(1000, "entries of the table of noise levels", ge=2)
    loss_weighting: Literal["gaussian", "none"] = setting("gaussian", "weight of a timestep: a bell around 500, or 1")
    timestep_sampling: Literal["uniform", "logit_normal"] = setting("uniform", "how timesteps are drawn from the table")
    denoising_loss_type: Literal["flow"] = setting(
        "flow", "the guide's key; the squared error of the velocity is the only loss"
    )
    save_full_generator: bool = setting(False, "model.pt holds the frozen base as well")
    gc_interval: int = setting(100, "steps between runs of Python's garbage collector; 0: leave it alone", ge=0)
    val_prompts: list[str] = setting([], "prompts of sample videos; empty: those of held-back samples")
    val_ref_images: list[str] = setting([], "subject pictures of val_prompts, one each")
    val_steps: int = setting(30, "denoising steps of sample videos", ge=1)
    val_num_samples: int = setting(1, "sample videos when val_prompts is empty", ge=0)
    val_batches: int = setting(4, "batches of a validation", ge=1)
    negative_prompt: str = setting(NEGATIVE_PROMPT, "what samples are guided away from")
    base_steps: int = setting(
        0, "steps of the small base that is trained first when generator_ckpt is null; 0: none", ge=0, le=MAX_STEPS
    )
    base_batch_size: int = setting(
        16, "samples per rank and step of the base; with global_batch_size: of all ranks", ge=1, le=MAX_BATCH
    )
    base_learning_rate: float = setting(1e-3, "peak learning rate of the base", gt=0, le=100)
    base_with_references: bool = setting(
        False, "train the small base together with the reference modules; it is frozen afterwards and they go on"
    )
    codec_steps: int | None = setting(
        None, "steps of the convolutional auto-encoder that is trained first; null: base_steps", ge=1, le=MAX_STEPS
    )

    @model_validator(mode="after")
    def _consistent(self) -> "TrainingConfig":
        if self.p_drop_text + self.p_drop_ref + self.p_drop_both > 1:
            raise ValueError("p_drop_text + p_drop_ref + p_drop_both exceeds 1; they exclude one another")
        if self.val_ref_images and len(self.val_ref_images) != len(self.val_prompts):
            raise ValueError(
                f"val_ref_images has {len(self.val_ref_images)} entries, val_prompts {len(self.val_prompts)}; give "
                "one picture per prompt"
            )
        return self


REFUSED = {
    "sharding_strategy": "FSDP2 shards each block over all ranks; leave the key out and choose a --strategy",
    "generator_fsdp_wrap_strategy": "the generator is always wrapped block by block; leave the key out",
    "text_encoder_fsdp_wrap_strategy": "the text encoder is not sharded; use text_encoder_cpu_offload or cached text",
    "wandb_key": "keys are not read from files; set the environment variable WANDB_API_KEY",
    "wandb_entity": "set the environment variable WANDB_ENTITY",
    "ema_start_step": "the average warms up by itself (ema_warmup); leave the key out",
}

# Settings that files of earlier runs name: the first was never read, the second is a constant.
FORMER = (("data", "val_background_base_paths"), ("training", "codec_learning_rate"))


class Config(Section):
    """All settings of a run. A guide's YAML may also give them flat, and call the data section `opens2v`."""

    run: OpenS2VRunSection = OpenS2VRunSection()
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    adapter: AdapterConfig | None = None
    training: TrainingConfig = TrainingConfig()

    @model_validator(mode="before")
    @classmethod
    def _from_guide(cls, values: Any) -> Any:
        return from_guide(values, tuple(cls.model_fields)) if isinstance(values, dict) else values

    @model_validator(mode="after")
    def _consistent(self) -> "Config":
        if self.adapter is not None and self.adapter.r == 0:
            self.adapter = None
        check_sizes(self)
        return self


def from_guide(values: dict[str, Any], fields: tuple[str, ...]) -> dict[str, Any]:
    """The tree of sections for a mapping that may hold the guide's flat keys; ValueError names an unknown one.

    fields: what the schema has at its top level.
    """
    sections: dict[str, type[Section]] = {
        "run": OpenS2VRunSection,
        "model": ModelConfig,
        "data": DataConfig,
        "training": TrainingConfig,
    }
    tree = {name: dict(value) if isinstance(value, dict) else value for name, value in values.items() if name in fields}
    flat = {name: value for name, value in values.items() if name not in tree}
    given = tree.setdefault("data", {})
    if isinstance(flat.get("opens2v"), dict) and isinstance(given, dict):
        tree["data"] = {**flat.pop("opens2v"), **given}
    for section, name in FORMER:
        flat.pop(name, None)
        if isinstance(tree.get(section), dict):
            tree[section] = {key: value for key, value in tree[section].items() if key != name}
    homes = _homes(sections)
    for name, value in flat.items():
        if name in REFUSED and value is not None:
            raise ValueError(f"{name} is not offered: {REFUSED[name]}")
        if name in REFUSED:
            continue
        section, field, value = _guide_key(name, value, homes)
        place = tree.setdefault(section, {})
        if isinstance(place, dict):
            place.setdefault(field, value)
    if isinstance(tree.get("adapter"), dict) and "lr" in tree["adapter"]:
        tree["adapter"] = {**tree["adapter"]}
        tree["adapter"]["adapter_lr"] = tree["adapter"].pop("lr")
    training = tree.get("training")
    if isinstance(training, dict) and training.get("max_checkpoints") == 0:
        training.pop("max_checkpoints")  # 0 keeps all, the default
    if isinstance(training, dict) and training.get("val_interval") == 0:
        training["val_interval"] = None
    return tree


def _homes(sections: dict[str, type[Section]]) -> dict[str, tuple[str, str]]:
    """Setting name (any of its names) -> (section, field)."""
    homes: dict[str, tuple[str, str]] = {}
    for section, kind in sections.items():
        for field, info in kind.model_fields.items():
            for name in (field, *extra_of(info).get("flags", ())):
                homes.setdefault(name, (section, field))
    return homes


def _guide_key(name: str, value: Any, homes: dict[str, tuple[str, str]]) -> tuple[str, str, Any]:
    """Where a flat key of the guide belongs, and its value there."""
    if name == "distributed":
        return "run", "strategy", value
    if name == "mixed_precision":
        return "run", "precision", {True: "bf16", False: "fp32"}.get(value, value)
    if name == "wandb_project":
        return "run", "wandb_project", value or "opens2v"
    if name == "max_checkpoints" and value == 0:
        return "training", "keep_last", 1_000_000
    if name == "val_interval" and value == 0:
        return "training", "eval_steps", None
    if name not in homes:
        near = difflib.get_close_matches(name, [*homes, "opens2v", "adapter"], 1)
        raise ValueError(f"{name}: unknown setting{f'; did you mean {near[0]}?' if near else ''}")
    return (*homes[name], value)


# --- sizes ------------------------------------------------------------------------------------------------------------


TEMPORAL = 4  # pixel frames of a latent frame after the first, in all codecs


def codec_factors(model: ModelConfig) -> tuple[int, int]:
    """(temporal, spatial) reduction of the codec."""
    return TEMPORAL, 8 if model.codec == "wan" else 4


def frame_unit(model: ModelConfig) -> int:
    """What the sides of a frame are multiples of: 16, and the pixels that a token of the transformer covers."""
    return math.lcm(16, codec_factors(model)[1] * model.patch_size)


def pixel_frames(config: Config) -> int:
    """Pixel frames of a training clip."""
    return pixel_count(config.data.num_training_frames, config.data.num_training_frames_unit)


def pixel_count(frames: int, unit: str) -> int:
    """Pixel frames of a number of frames in a unit; every codec makes four of them a latent frame, after the first."""
    return frames if unit == "pixel" else (frames - 1) * TEMPORAL + 1


def latent_frames(config: Config) -> int:
    """Latent frames of a training clip."""
    return (pixel_frames(config) - 1) // codec_factors(config.model)[0] + 1


def check_sizes(config: Config) -> None:
    """ValueError for sizes that the VAE, the patches or the causal blocks cannot take."""
    data, model = config.data, config.model
    frames = pixel_frames(config)
    if (frames - 1) % 4:
        low = (frames - 1) // 4 * 4 + 1
        raise ValueError(
            f"num_training_frames {frames}: Wan's VAE codes 4k + 1 frames and drops the last {(frames - 1) % 4} "
            f"silently; use {low} or {low + 4}"
        )
    width = model.num_attention_heads * model.attention_head_dim
    if width % 4 or model.attention_head_dim % 2:
        raise ValueError(
            f"num_attention_heads {model.num_attention_heads} of attention_head_dim {model.attention_head_dim}: heads "
            "need an even width, and all together one divisible by 4, for their positions"
        )
    ref_unit = codec_factors(model)[1] * (model.patch_size if model.ref_in_self_attention else 1)
    for name, size, unit in (
        ("pixel_height", data.pixel_height, frame_unit(model)),
        ("pixel_width", data.pixel_width, frame_unit(model)),
        ("ref_height", data.ref_height, ref_unit),
        ("ref_width", data.ref_width, ref_unit),
    ):
        if size % unit:
            raise ValueError(
                f"{name} {size} is not a multiple of {unit}; use {size // unit * unit or unit} or "
                f"{size // unit * unit + unit}"
            )
    first = 1 if model.independent_first_frame else 0
    if model.causal and (latent_frames(config) - first) % model.num_frame_per_block:
        count, block = latent_frames(config), model.num_frame_per_block
        raise ValueError(
            f"num_training_frames {frames} gives {count} latent frames, which causal blocks of {block} do not "
            f"fill{' after one independent frame' if first else ''}; use another number of frames (21 gives 6), "
            "num_frame_per_block "
            f"{', '.join(str(d) for d in range(1, count - first + 1) if (count - first) % d == 0)}, "
            f"independent_first_frame {'false' if first else 'true'}, or causal: false"
        )
    lengths = [len(data.json_paths), len(data.video_base_paths), len(data.background_base_paths)]
    if data.json_paths and (lengths[1] != lengths[0] or lengths[2] not in (0, lengths[0])):
        raise ValueError(
            "opens2v.json_paths, video_base_paths and background_base_paths must be equally long, they have "
            f"{lengths[0]}, {lengths[1]} and {lengths[2]} entries; give one of each per part"
        )
    cached = {
        "use_cached_text": data.use_cached_text,
        "use_cached_latents": data.use_cached_latents,
        "use_cached_clip": data.use_cached_clip,
    }
    wanted = [name for name, value in cached.items() if value]
    if wanted and data.cache_dir is None:
        raise ValueError(f"{', '.join(wanted)} needs cache_dir; run opens2v/precompute.py and give its folder")
    if data.scenes is not None and not data.json_paths:
        if wanted:
            raise ValueError(f"{', '.join(wanted)}: composed scenes never repeat and are not cached; give json_paths")
        usual = DataConfig()
        idle = [name for name in OF_CLIPS if data[name] != usual[name]]
        if idle:
            raise ValueError(
                f"{', '.join(idle)}: for clips alone; composed scenes (data.scenes) have no such choice; give "
                "json_paths or leave it out"
            )
    if data.other_subject_probability and data.scenes is None:
        raise ValueError("other_subject_probability needs drawings: give scenes (`sample`, a sheet or a folder)")
    if len(data.val_json_paths) != len(data.val_video_base_paths):
        raise ValueError(
            f"val_json_paths and val_video_base_paths must be equally long, they have {len(data.val_json_paths)} and "
            f"{len(data.val_video_base_paths)} entries; give one of each per part"
        )
