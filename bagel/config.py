"""Settings of BAGEL. The model sections default to BAGEL-7B-MoT; the presets in configs/ change them."""

from pathlib import Path
from typing import Literal

from pydantic import model_validator

from shared.config import MAX_BATCH, MAX_EPOCHS, MAX_STEPS, RunSection, Section, TrainingSection, setting

PRESETS = Path(__file__).resolve().parent / "configs"
SAMPLE_DATA = Path(__file__).resolve().parent / "sample_data"


class LanguageConfig(Section):
    """Qwen2 with two experts."""

    fixed_on_resume = True
    vocab_size: int = setting(152064, "rows of the embedding and the head", ge=5)
    hidden_size: int = setting(3584, "width", ge=4)
    intermediate_size: int = setting(18944, "inner width of the MLP", ge=1)
    num_hidden_layers: int = setting(28, "layers", ge=1)
    num_attention_heads: int = setting(28, "query heads", ge=1)
    num_key_value_heads: int = setting(4, "heads of keys and values", ge=1)
    rope_theta: float = setting(1e6, "base of the rotary frequencies", gt=1)
    rms_norm_eps: float = setting(1e-6, "epsilon of the norms", gt=0)

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @model_validator(mode="after")
    def _divides(self) -> "LanguageConfig":
        if (
            self.hidden_size % self.num_attention_heads
            or self.hidden_size // self.num_attention_heads % 2
            or self.hidden_size % 4
        ):
            raise ValueError(
                f"hidden_size {self.hidden_size} must be divisible by 4 and by num_attention_heads "
                f"{self.num_attention_heads}, with an even head width"
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} must be a multiple of num_key_value_heads "
                f"{self.num_key_value_heads}"
            )
        return self


class VisionConfig(Section):
    """SigLIP tower; num_hidden_layers is the number that runs (26 of the 27 in SigLIP's file)."""

    fixed_on_resume = True
    hidden_size: int = setting(1152, "width", ge=1)
    intermediate_size: int = setting(4304, "inner width of the MLP", ge=1)
    num_hidden_layers: int = setting(26, "layers that run", ge=1)
    num_attention_heads: int = setting(16, "heads", ge=1)
    num_channels: Literal[3] = setting(3, "colour channels")
    patch_size: int = setting(14, "patch side, pixels", ge=1)
    image_size: int = setting(980, "largest image side, pixels; sets the position table", ge=1, le=16384)
    layer_norm_eps: float = setting(1e-6, "epsilon of the norms", gt=0)
    rope: bool = setting(False, "2-D rotary positions in place of the learned table")

    @property
    def patches_per_side(self) -> int:
        return self.image_size // self.patch_size

    @model_validator(mode="after")
    def _divides(self) -> "VisionConfig":
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not divisible by num_attention_heads {self.num_attention_heads}"
            )
        if self.image_size % self.patch_size:
            raise ValueError(f"image_size {self.image_size} is not a multiple of patch_size {self.patch_size}")
        return self


class AutoencoderConfig(Section):
    """The frozen code of pictures."""

    fixed_on_resume = True
    kind: Literal["flux", "conv", "pixel"] = setting(
        "flux", "flux: the FLUX autoencoder; conv: a small one, trained first in the same run; pixel: cells of pixels"
    )
    ch: int = setting(128, "channels of the finest level (flux, conv)", ge=32, multiple_of=32)
    ch_mult: list[int] = setting([1, 2, 4, 4], "channel factors of the levels, finest first (flux)")
    num_res_blocks: int = setting(2, "residual blocks a level (flux)", ge=1)
    z_channels: int = setting(16, "latent channels; pixel: 3 x downsample^2", ge=1)
    downsample: int = setting(8, "pixels of a latent cell's side; flux: 2^(levels - 1); conv: 2, 4, 8, ...", ge=1)
    steps: int = setting(1400, "training steps of 16 pictures (conv)", ge=1, le=MAX_STEPS)
    scale_factor: float = setting(0.3611, "latent = scale_factor * (z - shift_factor)", gt=0)
    shift_factor: float = setting(0.1159, "see scale_factor")

    @model_validator(mode="after")
    def _agrees(self) -> "AutoencoderConfig":
        side = 2 ** (len(self.ch_mult) - 1)
        if self.kind == "flux" and self.downsample != side:
            raise ValueError(f"downsample {self.downsample} must be 2^(levels - 1) = {side} for ch_mult {self.ch_mult}")
        if self.kind == "conv" and (self.downsample < 2 or self.downsample & (self.downsample - 1)):
            raise ValueError(f"downsample {self.downsample} must be 2, 4, 8, ... for a convolutional autoencoder")
        if self.kind == "pixel" and self.z_channels != 3 * self.downsample**2:
            raise ValueError(
                f"z_channels {self.z_channels} must be 3 x downsample^2 = {3 * self.downsample**2} for pixel cells"
            )
        return self


class ModelConfig(Section):
    """The whole model, where its weights come from, and which of them train."""

    language: LanguageConfig = LanguageConfig()
    vision: VisionConfig = VisionConfig()
    autoencoder: AutoencoderConfig = AutoencoderConfig()
    model_path: str | None = setting(
        None,
        "folder of released form: llm_config.json, vit_config.json, ae.safetensors, "
        "ema.safetensors, tokenizer.json; its sizes replace the sections above",
    )
    llm_path: str | None = setting(None, "folder of a plain Qwen2.5 to start from; needs vae_path")
    vit_path: str | None = setting(None, "with llm_path: folder of a SigLIP; null: a tower from random weights")
    vae_path: str | None = setting(None, "with llm_path: ae.safetensors of FLUX")
    from_scratch: bool = setting(
        False, "start from random weights; model_path, if given, then only gives sizes and tokenizer"
    )
    tokenizer: str | None = setting(
        None,
        "bytes, sample (bytes and words of the scenes), or a folder with a tokenizer; null: model_path's",
        fixed=True,
    )
    initializer_range: float | None = setting(
        0.02, "standard deviation of matrices that start from random; null: by the width, 1/sqrt(inputs)", gt=0
    )
    vision_initializer_range: float | None = setting(
        0.02,
        "the same for the vision tower and the connector; narrow ones want more, or their "
        "features drown in the fixed position codes, whose values reach 1",
        gt=0,
    )
    vision_steps: int = setting(
        0,
        "training steps, of 16 pictures, in which a vision tower of random weights first learns what words are said "
        "about a picture",
        ge=0,
    )
    copy_init_moe: bool = setting(
        True, "where the loaded weights hold no generation expert, copy the understanding expert"
    )
    latent_patch_size: int = setting(2, "latent cells of a token's side", fixed=True, ge=1)
    max_latent_size: int = setting(64, "latent tokens of the largest image's side", ge=1)
    interpolate_pos: bool = setting(
        False, "stretch the position tables over each image instead of using their corner", fixed=True
    )
    timestep_shift: float = setting(1.0, "shift of the training times towards noise", gt=0)
    attention: Literal["auto", "dense", "sliced", "flex"] = setting(
        "auto", "auto: flex on CUDA, else dense; sliced: a former name of dense"
    )
    logits_chunk: int | None = setting(
        None, "text tokens whose logits exist at once in training, the same losses in less memory; null: all", ge=1
    )
    freeze_und: bool = setting(False, "train the generation side only: no gradient through text and ViT tokens")
    freeze_llm: bool = setting(False, "freeze the language model")
    freeze_vit: bool = setting(False, "freeze the vision tower")
    use_lora: bool = setting(
        False, "freeze the model and train low-rank adapters beside the projections of the experts", fixed=True
    )
    lora_rank: int = setting(16, "rank of the adapters", fixed=True, ge=1)
    lora_alpha: float = setting(32.0, "adapters count alpha / rank times", fixed=True, gt=0)
    lora_dropout: float = setting(0.0, "dropout on the adapters' input", ge=0, lt=1)
    lora_target: Literal["und", "gen", "both"] = setting("both", "which expert gets adapters", fixed=True)
    quantization: Literal["none", "nf4", "int8"] = setting(
        "none", "storage of the frozen projections; needs use_lora", fixed=True
    )

    @property
    def latent_width(self) -> int:
        """Numbers in one latent token."""
        return self.latent_patch_size**2 * self.autoencoder.z_channels

    @property
    def latent_stride(self) -> int:
        """Pixels of one latent token's side."""
        return self.latent_patch_size * self.autoencoder.downsample

    @model_validator(mode="after")
    def _agrees(self) -> "ModelConfig":
        for name in ("lora_rank", "lora_alpha", "lora_dropout", "lora_target"):
            if not self.use_lora and getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"{name} {getattr(self, name)} changes nothing without use_lora; add --use-lora")
        if self.quantization != "none" and not self.use_lora:
            raise ValueError(
                f"quantization {self.quantization} stores frozen weights, which cannot be trained; add --use-lora, "
                f"or use --quantization none"
            )
        if self.llm_path is not None and self.model_path is not None:
            raise ValueError("model_path and llm_path are two starts; give one of them")
        if self.llm_path is None and (self.vit_path is not None or self.vae_path is not None):
            raise ValueError("vit_path and vae_path belong to llm_path; give --llm-path, or --model-path alone")
        if self.use_lora and (self.freeze_und or self.freeze_llm):
            raise ValueError(
                "use_lora already freezes the model; leave out freeze_und and freeze_llm, and choose with --lora-target"
            )
        return self


class ImageSizeConfig(Section):
    """Sides allowed for one kind of image; the stride is that of its tokens."""

    max_size: int = setting(1024, "largest long side, pixels", ge=1, le=16384)
    min_size: int = setting(512, "smallest short side, pixels", ge=1)
    max_pixels: int = setting(14 * 14 * 9 * 1024, "largest area, pixels", ge=1)

    @model_validator(mode="after")
    def _ordered(self) -> "ImageSizeConfig":
        if self.min_size > self.max_size:
            raise ValueError(f"min_size {self.min_size} is above max_size {self.max_size}")
        return self


class SceneConfig(Section):
    """Scenes composed on the fly, where train_data_path is `scenes` and val_data_path `scenes:unseen`."""

    fixed_on_resume = True
    drawings: str | None = setting(
        None,
        "JSON object of picture paths, beside it, and names; pictures on white or with transparency; null: shipped",
    )
    objects: int = setting(16, "drawings that are used, the first ones", ge=2)
    side: int = setting(32, "side of a scene, pixels", ge=16)
    unseen_share: float = setting(
        0.1, "share of the combinations of object, ground and place never trained", gt=0, lt=1
    )
    draw: float = setting(0.45, "share of scenes drawn from a sentence", ge=0)
    ask: float = setting(0.2, "share of scenes asked about and described", ge=0)
    edit: float = setting(0.25, "share of scenes that are changed as told", ge=0)
    talk: float = setting(0.1, "share of conversations that draw, ask and change", ge=0)

    @model_validator(mode="after")
    def _something_to_do(self) -> "SceneConfig":
        if not self.draw + self.ask + self.edit + self.talk:
            raise ValueError("draw, ask, edit and talk are all 0: give at least one of them a share")
        return self


class DataConfig(Section):
    """Records, pictures, and how they fill packs."""

    train_data_path: str | None = setting(
        None, "records: .jsonl, .json, .parquet or .tar (webdataset); several separated by commas"
    )
    val_data_path: str | None = setting(None, "records for validation; null: no validation")
    image_root: str | None = setting(None, "folder that relative picture paths start from; null: the record file's own")
    max_sequence_length: int = setting(16384, "longest sample, tokens", ge=4)
    truncate_text: bool = setting(
        False, "cut the last answer of a record that is too long instead of skipping the record"
    )
    strict_data: bool = setting(False, "stop at the first malformed record instead of skipping and listing it")
    escape_special_tokens: bool = setting(
        False, "read the four marks as plain text where they occur in a record's text"
    )
    packing: Literal["tokens", "samples", "reference"] = setting(
        "tokens",
        "tokens: packs of at most tokens_per_batch; samples: batch_size samples a pack; reference: the released loop",
        fixed=True,
    )
    tokens_per_batch: int = setting(32768, "tokens of a full pack", "max_num_tokens", fixed=True, ge=8, le=10**8)
    buffer_size: int = setting(50, "samples that wait for a pack they fit in", "max_buffer_size", fixed=True, ge=1)
    expected_num_tokens: int = setting(32768, "a pack is emitted from this length on (reference)", fixed=True, ge=1)
    prefer_buffer_before: int = setting(16384, "below this length the buffer comes first (reference)", fixed=True, ge=0)
    scenes: SceneConfig = SceneConfig()
    vae_image: ImageSizeConfig = ImageSizeConfig()
    vit_image: ImageSizeConfig = ImageSizeConfig(max_size=980, min_size=224, max_pixels=2007040)
    edit_vit_image: ImageSizeConfig | None = setting(
        None, "sides of a picture that the vision tower sees beside its latents, in an edit; null: as vit_image"
    )
    max_malformed_share: float = setting(
        0.01, "share of the records that may be malformed; above it the run stops before training", ge=0, le=1
    )
    text_cond_dropout_prob: float = setting(0.1, "chance that a text condition is left out", ge=0, le=1)
    vae_cond_dropout_prob: float = setting(
        0.3, "chance that the latents of a condition picture are left out", ge=0, le=1
    )
    vit_cond_dropout_prob: float = setting(
        0.3, "chance that the ViT tokens of a condition picture are left out", ge=0, le=1
    )
    drawn_copies: int = setting(
        1,
        "times that a picture to draw stands in a training sample, each with its own noise and time: what is given "
        "before it is read once for all of them",
        fixed=True,
        ge=1,
    )
    question_weight: float = setting(
        1.0, "times a record that answers about a given picture comes an epoch, beside its own weight", gt=0
    )
    flip_probability: float = setting(0.0, "chance of mirroring the pictures of a sample", ge=0, le=1)
    pad_images_together: bool = setting(
        False, "encode all pictures of a pack on one zero-padded canvas, as the released code does"
    )

    @model_validator(mode="after")
    def _fits(self) -> "DataConfig":
        if self.packing != "samples" and self.max_sequence_length > self.tokens_per_batch:
            raise ValueError(
                f"max_sequence_length {self.max_sequence_length} is above tokens_per_batch {self.tokens_per_batch}: "
                f"such a sample fits in no pack; lower the first or raise the second"
            )
        return self


class TrainingConfig(TrainingSection):
    """The guide's names and defaults over those of the loop."""

    batch_size: int = setting(1, "packs per rank and micro-step; with packing=samples: samples", ge=1, le=MAX_BATCH)
    gradient_accumulation_steps: int = setting(8, "micro-steps of one optimizer step", "grad_accum", ge=1, le=MAX_BATCH)
    num_epochs: int | None = setting(3, "passes over the data", "epochs", "num_train_epochs", ge=1, le=MAX_EPOCHS)
    learning_rate: float = setting(2e-5, "peak learning rate", "lr", ge=0, le=100)
    adam_beta2: float = setting(0.95, "AdamW beta 2", "beta2", ge=0, lt=1)
    adam_epsilon: float = setting(1e-15, "AdamW epsilon", "eps", gt=0)
    warmup_ratio: float = setting(0.0, "warm-up as a share of all steps; used when warmup_steps is 0", ge=0, le=1)
    best_metric: str = setting("val/loss", "metric that decides which checkpoint is best", "metric_for_best")
    vision_weight_decay: float | None = setting(
        None, "weight decay of the vision tower and the connector; null: that of the rest", ge=0
    )
    text_loss_weight: float = setting(1.0, "weight of the cross entropy of text", "ce_weight", ge=0)
    image_loss_weight: float = setting(1.0, "weight of the squared error of velocities", "mse_weight", ge=0)
    ce_loss_reweighting: bool = setting(False, "weight the tokens of an answer of n tokens by 1/sqrt(n)")
    loss_normalization: Literal["window", "micro"] = setting(
        "window", "mean over the tokens of all ranks and micro-steps of a step; micro: mean of the micro-steps' means"
    )
    export: bool = setting(
        True,
        "put trained_model.pt into every checkpoint and, at the end, a folder that --model-path takes into "
        "the output folder",
    )
    fp16: bool = setting(False, "the guide's name of --precision fp16")
    bf16: bool = setting(False, "the guide's name of --precision bf16")
    deepspeed: str | None = setting(None, "a DeepSpeed file, whose zero stage chooses --strategy")
    sample_records: int = setting(
        8, "held-out prompts that are drawn, and pictures that are described, as samples; 0: none", ge=0
    )
    validation_records: int = setting(256, "records of the validation set that are used", ge=1)

    @model_validator(mode="after")
    def _weights(self) -> "TrainingConfig":
        if self.text_loss_weight == 0 and self.image_loss_weight == 0:
            raise ValueError("text_loss_weight and image_loss_weight are both 0: nothing would be learned")
        return self


HALVES: tuple[Literal["fp16"], Literal["bf16"]] = ("fp16", "bf16")


class Config(Section):
    """Everything a run needs."""

    run: RunSection = RunSection(output_dir="outputs/bagel")
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    training: TrainingConfig = TrainingConfig()

    @model_validator(mode="after")
    def _precision(self) -> "Config":
        wanted: list[Literal["fp16", "bf16"]] = [name for name in HALVES if self.training[name]]
        if len(wanted) == 2:
            raise ValueError("--fp16 and --bf16 exclude each other; give one")
        if wanted and self.run.precision not in (None, wanted[0]):
            raise ValueError(f"--{wanted[0]} contradicts --precision {self.run.precision}; give one")
        if wanted:
            self.run.precision = wanted[0]
        given = self.run.model_fields_set
        if "wandb_project" in given and "wandb" not in given:  # whoever names a project wants it used
            self.run.wandb = True
        return self


class MetricsOptions(Section):
    """Command line of metrics.py."""

    checkpoint: str = setting(
        "outputs/bagel", "a run's output folder, one of its checkpoints, or a folder of released form", "model_path"
    )
    base: str | None = setting(None, "folder of the base weights of a run, if they have moved")
    data: str | None = setting(None, "records to evaluate; null: the run's validation records", "val_data_path")
    train_data: str | None = setting(None, "records for baselines; null: the run's training records", "train_data_path")
    image_root: str | None = setting(None, "folder that relative picture paths start from")
    output: str | None = setting(None, "JSON file; null: metrics.json in the run's folder")
    max_records: int = setting(256, "records evaluated, and training records used for each comparison", ge=1)
    baseline_records: int = setting(10_000, "training records that the n-gram baselines are fitted to", ge=1)
    tokens_per_batch: int = setting(
        16384, "tokens of a pack of the losses; a longer record has a pack of its own", ge=1
    )
    max_pictures: int = setting(12, "pictures drawn from held-out prompts, and as many from training prompts", ge=0)
    scenes: int = setting(
        96, "scenes never trained that are drawn, asked about and changed, where the data are scenes", ge=2
    )
    num_timesteps: int = setting(25, "points of the time grid of drawn pictures", ge=2)
    cfg_text_scale: float = setting(3.0, "guidance by the text")
    max_length: int = setting(64, "longest answer, tokens", ge=1)
    seed: int = setting(0, "seed of noise", ge=0, le=2**63 - 1)
    ema: bool = setting(True, "use averaged weights where there are some")
    device: str = setting("auto", "auto, cpu, cuda or cuda:N")
    nltk_data: str | None = setting(None, "folder with the WordNet corpus, for METEOR")
    bertscore_model: str | None = setting(None, "local folder of an encoder, for BERTScore")
    bertscore_layer: int | None = setting(None, "its layer; null: the last")
    fid_weights: str | None = setting(None, "local Inception weights or TorchScript file, for FID", "inception_weights")
    clip_model: str | None = setting(None, "local folder of a CLIP model, for the CLIP score", "clip_path")
