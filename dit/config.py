"""Settings of the text-to-image DiT: default, meaning, unit. No torch import, so --help is quick."""

import json
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import field_validator, model_validator

from shared.config import MAX_STEPS, RunSection, Section, TrainingSection, setting
from shared.errors import UserError

PRESETS = Path(__file__).parent / "configs"
SAMPLE_DATA = Path(__file__).parent / "sample_data" / "CUB_200_2011"
FLOW_SAMPLERS = ("euler", "heun", "midpoint", "rk4", "dopri5", "sde")
POWER_LENGTHS = (0.05, 0.10)  # of the two averages that training.power_ema keeps, as in EDM2
Layout = Literal["coco", "cub", "custom", "scenes"]
NOISE_SAMPLERS = ("ddim", "dpmpp_2m", "dpmpp_2m_karras", "ddpm")


@lru_cache(maxsize=64)
def diffusers_config(path: str, part: str) -> dict[str, Any] | None:
    """The config.json of a model of diffusers on this disk, its own or that of a pipeline's folder `part`; None for a
    hub id, a single file, and what is no model of diffusers.
    """
    for place in (Path(path) / part, Path(path)):
        try:
            tree = json.loads((place / "config.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        return tree if isinstance(tree, dict) and "_class_name" in tree else None
    return None


_NOT_FOR_SCENES = {
    "num_samples": "the number of drawings is data.drawings",
    "crop": "scenes are composed at their size",
    "flip": "a mirrored scene would contradict its sentence",
    "caption_source": "sentences come from the scenes' ground truth",
    "use_bbox": "drawings are cut out of their ground",
    "val_fraction": "what is held out is chosen by unseen_share",
    "cache_dir": "they are composed anew in every epoch, and a cache would hold one",
}


class DataConfig(Section):
    """Pictures with captions."""

    dataset_name: Layout = setting(
        "coco", "layout of the data on disk; scenes: composed on the fly from the drawings of a folder", "datasets"
    )
    dataset_path: str | None = setting(
        None, "folder, or .tar pattern for custom; sample: the pictures that ship with dit/", "data_root", "data_dir"
    )
    num_samples: int | None = setting(None, "use so many pictures, drawn by subset_seed; null: all", ge=1)
    image_size: int = setting(256, "side of the square pictures, pixels", "resolution", fixed=True, ge=8, le=8192)
    crop: Literal["center", "random", "random_resized", "resize"] = setting("center", "how a picture becomes a square")
    flip: float = setting(0.5, "probability of mirroring a training picture", ge=0, le=1)
    flip_guard: bool | Literal["picture"] = setting(
        True,
        "true: mirror nothing when any caption speaks of left or right (in shards: as picture); "
        "picture: spare only those pictures",
    )
    coco_year: Literal["auto", "2017", "2014"] = setting(
        "auto", "coco: which of the lists captions_train2017.json and captions_train2014.json; auto: 2017 where it lies"
    )
    caption_source: Literal["auto", "text", "attributes", "class"] = setting(
        "auto", "where cub captions come from; auto: the first that exists"
    )
    use_bbox: bool = setting(False, "cub: crop to the bird's box, enlarged by a third")
    subset_seed: int = setting(0, "seed of num_samples' draw", ge=0)
    val_fraction: float = setting(
        0.0, "share held out by hash of the name where the data have no split of their own", ge=0, lt=1
    )
    drawings: int | None = setting(
        16, "scenes: use so many drawings, chosen by hash of name and subset_seed; null: all", fixed=True, ge=1
    )
    scene_kinds: list[Literal["one", "two"]] = setting(
        ["one"], "scenes: one object at a place, two with a relation; drawn from evenly", fixed=True
    )
    unseen_share: float = setting(
        0.1, "scenes: share of the combinations that are never trained, chosen by hash", fixed=True, ge=0, lt=1
    )
    on_error: Literal["skip", "raise"] = setting("skip", "missing or broken pictures: skip and list them, or stop")
    buckets: bool = setting(
        False, "train on pictures of several shapes of about image_size squared pixels, each batch of one shape"
    )
    keep_in_memory: bool = setting(False, "keep decoded pictures in memory (small sets)")
    cache_dir: str | None = setting(
        None, "folder written by precompute.py; replaces the frozen encoders during training"
    )

    @model_validator(mode="after")
    def _scenes_are_composed(self) -> "DataConfig":
        """What has no meaning for scenes is refused, not ignored."""
        if self.dataset_name != "scenes":
            return self
        for name, why in _NOT_FOR_SCENES.items():
            if getattr(self, name) != type(self).model_fields[name].default and (name, self[name]) != ("flip", 0):
                raise ValueError(f"{name} {self[name]} does nothing with dataset_name scenes: {why}; leave it out")
        if not self.scene_kinds:
            raise ValueError("scene_kinds is empty; use some of one, two")
        return self


_OF_PRX = {  # ours -> the name in a PRX folder's config.json
    "hidden_size": "hidden_size", "num_layers": "depth", "num_heads": "num_heads", "patch_size": "patch_size",
    "in_channels": "in_channels", "mlp_ratio": "mlp_ratio", "text_dim": "context_in_dim",
    "bottleneck_size": "bottleneck_size", "resolution_embeds": "resolution_embeds",
}  # fmt: skip


class ModelConfig(Section):
    """The network. Fixed on resume."""

    fixed_on_resume: ClassVar[bool] = True

    type: Literal["dit", "prx"] = setting(
        "dit", "dit: ours; prx: PRXTransformer2DModel of diffusers, whose folder --pretrained takes with its sizes"
    )
    hidden_size: int = setting(768, "width", ge=4)
    num_layers: int = setting(16, "blocks", ge=1)
    num_heads: int = setting(12, "attention heads; divides hidden_size", ge=1)
    patch_size: Literal[1, 2, 4, 8, 16, 32] = setting(2, "latent cells per token side")
    in_channels: int = setting(4, "channels of the latent; 3 for pixels", ge=1)
    mlp_ratio: float = setting(4.0, "hidden units of the GELU MLP over width", gt=0)
    text_conditioning: Literal["cross", "joint", "pooled", "none"] = setting(
        "cross", "how text enters; none: class labels or nothing"
    )
    use_pooled_text: bool = setting(True, "add the pooled text vector to the time vector")
    text_dim: int = setting(512, "width of the text states; 512 for CLIP ViT-B/32", ge=1)
    text_len: int = setting(77, "text tokens, padded", ge=2)
    text_mask: bool = setting(True, "hide padding from attention; false: all positions visible, as Stable Diffusion")
    num_classes: int | None = setting(
        None, "class-conditional model with so many classes; needs text_conditioning none", ge=1
    )
    class_dropout: float = setting(
        0.1, "0: the label table has no row for no class; else another name of diffusion.cfg_dropout", ge=0, lt=1
    )
    learn_sigma: bool = setting(False, "also predict the variance (public DiT weights); noise objective only")
    conditioning: Literal["adaln_zero", "adaln_single"] = setting(
        "adaln_zero", "a modulation per block, or one shared by all (PixArt)"
    )
    norm: Literal["layernorm", "rmsnorm"] = setting("layernorm", "normalisation in the blocks, no trained parameters")
    cross_norm: Literal["layernorm", "rmsnorm", "none"] = setting(
        "layernorm", "normalisation before cross-attention; none: PixArt"
    )
    qk_norm: bool = setting(False, "RMSNorm of queries and keys; steadier in bf16 at high learning rates")
    mlp: Literal["gelu", "swiglu"] = setting("gelu", "feed-forward form; both have the same number of parameters")
    pos: Literal["sincos", "rope2d", "sincos+rope2d"] = setting("sincos", "position encoding")
    drop_path: float = setting(0.0, "stochastic depth of the last block, growing linearly from 0", ge=0, lt=1)
    pos_scale: float = setting(
        1.0, "sincos: factor on the coordinates; 0.5 for PixArt-1024 (its interpolation_scale is 2)", gt=0
    )
    time_freq_shift: Literal[0, 1] = setting(0, "0: official DiT and SiT weights; 1: weights trained with diffusers")
    value_residual: bool = setting(
        False, "every block's attention mixes in the values of the first (Zhou et al. 2024, 2410.17897)"
    )
    route_share: float = setting(
        0.0, "share of image tokens that pass by the middle blocks in training (TREAD, 2501.04765)", ge=0, lt=1
    )
    route_start: int = setting(2, "TREAD: number of the first block that they pass by", ge=0)
    route_end: int | None = setting(
        None, "TREAD: number of the block where they join again; null: num_layers - 4", ge=1
    )
    bottleneck_size: int | None = setting(None, "prx: width between the two layers that embed a patch", ge=1)
    resolution_embeds: bool = setting(False, "prx: the latent's size is a part of the condition")
    pretrained_path: str | None = setting(
        None, "start from these weights: ours, DiT, SiT, diffusers' DiT, PixArt or PRX", "pretrained"
    )

    @model_validator(mode="before")
    @classmethod
    def _sizes_of_prx(cls, tree: Any) -> Any:
        """A PRX folder tells its own sizes."""
        path = tree.get("pretrained_path", tree.get("pretrained")) if isinstance(tree, dict) else None
        found = None if path is None else diffusers_config(str(path), "transformer")
        if found is None or found["_class_name"] != "PRXTransformer2DModel":
            return tree
        if tree.get("type") != "prx":
            raise ValueError(f"pretrained_path {path} is a PRX; use --config prx (model.type prx)")
        half = found.get("hidden_size", 1792) // found.get("num_heads", 28) // 2
        wanted = {"axes_dim": [half, half], "theta": 10000, "time_factor": 1000.0, "time_max_period": 10000}
        for name, value in wanted.items():
            if found.get(name) not in (None, value):
                raise ValueError(f"pretrained_path {path}: {name} {found[name]} is not supported, {value} is")
        return tree | {ours: found[theirs] for ours, theirs in _OF_PRX.items() if theirs in found}

    @model_validator(mode="after")
    def _fits(self) -> "ModelConfig":
        if self.hidden_size % self.num_heads or self.hidden_size % 4:
            raise ValueError(
                f"hidden_size {self.hidden_size} must be a multiple of 4 and of num_heads {self.num_heads}"
            )
        if "rope" in self.pos and (self.hidden_size // self.num_heads) % 4:
            raise ValueError(
                f"{self.pos} needs a head width that is a multiple of 4, not {self.hidden_size}/{self.num_heads}"
            )
        if self.num_classes and self.text_conditioning != "none":
            raise ValueError("num_classes needs text_conditioning: none")
        end = max(self.route_start, self.num_layers - 4) if self.route_end is None else self.route_end
        if self.route_share and not self.route_start < end <= self.num_layers:
            raise ValueError(
                f"route_share {self.route_share}: tokens would pass by the blocks from {self.route_start} to {end} of "
                f"{self.num_layers}; set route_start and route_end so that at least one lies between"
            )
        if self.route_share and self.value_residual and self.route_start == 0:
            raise ValueError(
                "route_start 0: value_residual needs the first block's values of all tokens; set 1 or more"
            )
        return self


class RepaConfig(Section):
    """Representation alignment (REPA, Yu et al. 2024, arXiv 2410.06940)."""

    encoder_path: str | None = setting(
        None, "local folder of a frozen vision encoder: DINOv2, DINOv3 or SigLIP classes of transformers; null: off"
    )
    layer: int = setting(8, "block after which tokens are compared, counted from 1", "align_layer", fixed=True, ge=1)
    weight: float = setting(0.5, "weight of the term, minus the mean cosine", "align_weight", gt=0)
    hidden: int = setting(2048, "width of the projector's two hidden layers", "align_hidden", fixed=True, ge=1)
    features: int | None = setting(
        None, "width of the encoder's features; null: what its config.json says", "align_features", fixed=True, ge=1
    )

    @model_validator(mode="after")
    def _width_of_its_own(self) -> "RepaConfig":
        if self.encoder_path is not None and self.features is None:
            try:
                tree = json.loads((Path(self.encoder_path) / "config.json").read_text(encoding="utf-8"))
                self.features = int({**tree, **tree.get("vision_config", {})}["hidden_size"])
            except (OSError, ValueError, KeyError, TypeError, AttributeError):
                raise ValueError(
                    f"encoder_path {self.encoder_path}: no folder with a config.json that tells hidden_size; give a "
                    "local copy of an encoder such as facebook/dinov2-base"
                ) from None
        return self


class VaeConfig(Section):
    """Pictures to latents."""

    type: Literal["sd", "conv", "patches", "pixels", "pool"] = setting(
        "sd",
        "sd: a VAE of diffusers (AutoencoderKL, AutoencoderDC, AutoencoderKLFlux2); conv: a small convolutional one, "
        "trained first in the same run; patches: principal components of patches, fitted here; pixels: none; pool: 8x "
        "averages, for tests",
        fixed=True,
    )
    pretrained_model_name: str = setting(
        "runwayml/stable-diffusion-v1-5",
        "sd: local folder or hub id of a pipeline or a VAE, or one .safetensors file",
        "vae_path",
    )
    factor: int | None = setting(
        None, "sd: pixels per latent cell side; null: what the VAE's own config says", fixed=True, ge=1
    )
    scaling_factor: float | None = setting(
        None, "sd: in place of the VAE's own; needed for a single file, which has none", fixed=True, gt=0
    )
    vae_precision: Literal["auto", "fp32", "bf16"] = setting("auto", "sd: auto is bf16 on a GPU and fp32 on a CPU")
    use_slicing: bool = setting(False, "encode and decode one picture at a time to save memory")
    use_tiling: bool = setting(False, "encode and decode in tiles to save memory")
    posterior: Literal["sample", "mode"] = setting(
        "sample", "latent drawn from the encoder's distribution, or its mean"
    )
    latent_stats: str | None = setting(
        None, "safetensors with mean and std per channel in place of the single factor", fixed=True
    )
    patch: int = setting(8, "patches, conv: pixels per latent cell side", fixed=True, ge=1)
    codec_steps: int = setting(2000, "conv: optimizer steps of its own training", fixed=True, ge=1, le=MAX_STEPS)
    width: int = setting(32, "conv: channels at half the picture's size; doubled with every halving", fixed=True, ge=4)
    decoder_steps: int = setting(
        300, "patches: training steps of the decoder; 0: the linear decoder alone", fixed=True, ge=0
    )
    content: str | None = setting(None, "what the VAE holds, noted by training", hidden=True, fixed=True)

    @model_validator(mode="before")
    @classmethod
    def _without_retired(cls, tree: Any) -> Any:
        """Files of earlier runs name vae_chunk, which changed no number."""
        return {name: value for name, value in tree.items() if name != "vae_chunk"} if isinstance(tree, dict) else tree

    @model_validator(mode="after")
    def _factor_of_its_own(self) -> "VaeConfig":
        own = vae_factor(self.pretrained_model_name) if self.type == "sd" else None
        if own is not None and self.factor not in (None, own):
            raise ValueError(f"factor {self.factor}: the VAE {self.pretrained_model_name} has {own}; leave it out")
        return self


def vae_factor(name: str) -> int | None:
    """Pixels per latent cell side of a VAE on this disk; None where its config cannot be seen."""
    config = diffusers_config(name, "vae")
    if config is not None:
        widths = config.get("encoder_block_out_channels") or config.get("block_out_channels") or []
        return 2 ** (len(widths) - 1) if widths else None
    blocks = {name.split("down", 1)[1].split(".")[1] for name in tensor_names(name) if "encoder.down" in name}
    return 2 ** (len(blocks) - 1) if blocks else None


@lru_cache(maxsize=64)
def tensor_names(path: str) -> tuple[str, ...]:
    """The names in a .safetensors file, from its header; none for anything else."""
    try:
        with open(path, "rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(size)) if size < 100_000_000 and path.endswith(".safetensors") else {}
        return tuple(header)
    except (OSError, ValueError):
        return ()


class TextConfig(Section):
    """Captions to token states."""

    type: Literal["clip", "language", "hash"] = setting(
        "clip",
        "clip: CLIPTextModel; language: T5, UMT5, Gemma, Qwen or another text model of transformers, by path; hash: "
        "words as sums of hashed byte n-grams, needs no weights",
        fixed=True,
    )
    pretrained_model_name: str = setting(
        "openai/clip-vit-base-patch32", "clip, language: local folder or hub id", "text_encoder_path"
    )
    local_files_only: bool = setting(False, "never download")
    content: str | None = setting(None, "what the encoder holds, noted by training", hidden=True, fixed=True)
    context: bool = setting(
        False, "hash: every word carries a trace of its neighbours, so that the order of words counts", fixed=True
    )


class DiffusionConfig(Section):
    """Which objective, and the noise-prediction one."""

    objective: Literal["ddpm", "flow"] = setting("ddpm", "noise prediction, or rectified flow", fixed=True)
    num_train_timesteps: int = setting(1000, "levels of noise", fixed=True, ge=2)
    noise_scheduler: Literal["scaled_linear", "linear", "squaredcos_cap_v2"] = setting(
        "scaled_linear", "betas; linear: public DiT", "beta_schedule", fixed=True
    )
    prediction_type: Literal["epsilon", "v_prediction", "sample"] = setting(
        "epsilon", "what the model predicts", fixed=True
    )
    rescale_betas_zero_snr: bool = setting(False, "no signal at the last level; needs v_prediction", fixed=True)
    snr_gamma: float | None = setting(None, "min-SNR weighting with this cap; 5.0 is usual", gt=0)
    criterion: Literal["mse", "huber"] = setting("mse", "error of the prediction")
    cfg_dropout: float = setting(
        0.1, "share of samples whose caption or label is replaced by the null condition", "text_dropout", ge=0, le=1
    )
    null_text: Literal["empty", "learned"] = setting(
        "empty", "the null condition: the encoded empty caption, or trained", fixed=True
    )

    @model_validator(mode="after")
    def _zero_snr(self) -> "DiffusionConfig":
        if self.rescale_betas_zero_snr and self.prediction_type != "v_prediction":
            raise ValueError(
                "rescale_betas_zero_snr needs prediction_type v_prediction: where there is no signal, noise is no "
                "target"
            )
        return self


class FlowConfig(Section):
    """Rectified flow; t = 0 is noise, t = 1 is data."""

    retired: ClassVar[dict[str, Any]] = {"path": "linear", "loss_weight": "none"}  # in files of earlier runs

    timestep_sampling: Literal["uniform", "logit_normal"] = setting("uniform", "distribution of the training times")
    logit_mean: float = setting(0.0, "logit_normal: mean; below 0 favours noise")
    logit_std: float = setting(1.0, "logit_normal: standard deviation", gt=0)
    shift: float | Literal["auto"] = setting(1.0, "move times towards the noise; auto: sqrt(latent size / 4096)")
    time_scale: float = setting(
        1000.0, "what t is multiplied by before the model sees it; 1 reproduces SiT", fixed=True, gt=0
    )
    prediction: Literal["velocity", "clean"] = setting("velocity", "what the model predicts", fixed=True)
    contrastive: float = setting(
        0.0, "weight of the term that leads away from another sample's velocity; 0.05 is usual", ge=0, lt=1
    )

    @model_validator(mode="before")
    @classmethod
    def _without_retired(cls, tree: Any) -> Any:
        """Runs of earlier versions name these settings; their only value of use was the default."""
        if not isinstance(tree, dict):
            return tree
        for name, value in cls.retired.items():
            if name in tree and tree[name] != value:
                raise ValueError(f"{name} {tree[name]} is no longer offered: no public weights use it; leave it out")
        return {name: value for name, value in tree.items() if name not in cls.retired}

    @field_validator("shift")
    @classmethod
    def _positive(cls, value: float | str) -> float | str:
        if isinstance(value, float) and not value > 0:
            raise ValueError("must be above 0, or auto")
        return value


class TrainingConfig(TrainingSection):
    """The loop; the guide's names are accepted beside."""

    learning_rate: float = setting(
        1e-4, "peak learning rate; 2e-4 for small models, 5e-5 for large", "lr", ge=0, le=100
    )
    lr_scheduler_type: Literal["constant", "linear", "cosine", "wsd"] = setting(
        "constant", "shape after the warm-up", "lr_scheduler"
    )
    max_grad_norm: float | None = setting(None, "clip the gradient norm to this; null: no clipping", "grad_clip", ge=0)
    ema_decay: float = setting(0.9999, "decay of the weights' moving average; 0: off", ge=0, lt=1)
    power_ema: bool = setting(
        False, "also keep two power-function averages (EDM2), so that --ema-length draws with one of any length"
    )
    save_steps: int | None = setting(None, "optimizer steps between checkpoints; null: epochs only", "save_every", ge=1)
    save_every_n_epochs: int | None = setting(10, "epochs between checkpoints; 0 or null: off", ge=1)
    eval_steps: int | None = setting(None, "optimizer steps between evaluations; null: at the end", "eval_every", ge=1)
    eval_every_n_epochs: int | None = setting(None, "epochs between evaluations, in place of eval_steps", ge=1)
    sample_every_n_epochs: int | None = setting(None, "epochs between sample grids, in place of sample_steps", ge=1)
    sample_prompts: list[str] = setting([], "captions of the sample grid; none: the first held-out captions")
    eval_samples: int = setting(256, "held-out pictures of an evaluation", ge=1)
    guide_files: bool = setting(
        False, "write model.pt, optimizer.pt, scheduler.pt and training_state.json into every checkpoint as well"
    )
    optimizer: Literal["adamw", "muon"] = setting(  # type: ignore[assignment]  # wider than the loop's
        "adamw", "muon: matrices of the blocks by Muon (Jordan et al. 2024), the rest by AdamW", fixed=True
    )
    muon_learning_rate: float = setting(0.02, "muon: peak learning rate of the matrices", ge=0, le=100)
    keep_epochs: bool = setting(True, "keep the checkpoints of save_every_n_epochs next to the keep_last newest")
    gradient_checkpointing: bool | int = setting(  # type: ignore[assignment]  # wider than the loop's, which hands it on
        False, "recompute blocks in the backward pass to save memory: all, or with a number every so-manieth"
    )
    num_workers: int = setting(4, "loader processes per rank", "workers", ge=0)
    drop_last: bool = setting(True, "leave out the tail of an epoch that fills no batch")
    persistent_workers: bool = setting(True, "loader processes live on over epochs; false is refused, they always do")

    @field_validator("keep_last", mode="before")
    @classmethod
    def _null_keeps_all(cls, value: Any) -> Any:
        return 1_000_000 if value in (None, "null", "none") else value

    @field_validator("save_every_n_epochs", "eval_every_n_epochs", "sample_every_n_epochs", mode="before")
    @classmethod
    def _zero_is_off(cls, value: Any) -> Any:
        return None if value in (0, "0") else value

    @field_validator("persistent_workers")
    @classmethod
    def _always_persistent(cls, value: bool) -> bool:
        if not value:
            raise ValueError(
                "the data stream reads on over epochs, so its processes always persist; leave it true, or num_workers: "
                "0"
            )
        return value


class SampleConfig(Section):
    """Sample grids during training, and the defaults of generate.py."""

    sampler: str = setting("auto", "auto, or one of the objective's samplers")
    steps: int = setting(50, "sampling steps", "num_inference_steps", ge=1)
    cfg_scale: float = setting(5.0, "guidance scale; 1: none", "guidance_scale", ge=0)
    shift: float | None = setting(None, "time shift of the sampling grid; null: as in training", gt=0)
    count: int = setting(16, "pictures in a sample grid", ge=1)


class Config(Section):
    """Everything one run needs. Also reads the guide's form of the file (lr_scheduler, ema, logging sections)."""

    run: RunSection = RunSection()
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    repa: RepaConfig = RepaConfig()
    vae: VaeConfig = VaeConfig()
    text: TextConfig = TextConfig()
    diffusion: DiffusionConfig = DiffusionConfig()
    flow: FlowConfig = FlowConfig()
    training: TrainingConfig = TrainingConfig()
    sample: SampleConfig = SampleConfig()

    @model_validator(mode="before")
    @classmethod
    def _from_guide(cls, tree: Any) -> Any:
        return translate_guide(tree) if isinstance(tree, dict) else tree

    @model_validator(mode="after")
    def _parts_fit(self) -> "Config":
        if (
            self.model.learn_sigma
            and self.diffusion.objective == "ddpm"
            and self.diffusion.prediction_type == "v_prediction"
        ):
            raise ValueError("model.learn_sigma works with prediction_type epsilon or sample")
        if self.vae.type == "conv" and (self.vae.patch < 2 or self.vae.patch & (self.vae.patch - 1)):
            raise ValueError(f"vae.patch {self.vae.patch}: vae.type conv halves, so a power of two from 2 is wanted")
        if self.data.image_size % (self.vae_factor * self.model.patch_size):
            raise ValueError(
                f"data.image_size {self.data.image_size} must be a multiple of "
                f"{self.vae_factor * self.model.patch_size} "
                f"(latent cell {self.vae_factor} px x patch_size {self.model.patch_size})"
            )
        if self.data.dataset_name == "scenes" and self.model.num_classes:
            raise ValueError("model.num_classes: scenes carry sentences, not classes; leave it out")
        if self.model.type == "prx":
            needs = (self.diffusion.objective, self.flow.prediction, self.model.text_conditioning)
            if needs != ("flow", "velocity", "cross"):
                raise ValueError(
                    "model.type prx predicts a flow's velocity from text: set diffusion.objective flow, "
                    "flow.prediction velocity and model.text_conditioning cross"
                )
        samplers = {"ddpm": NOISE_SAMPLERS, "flow": FLOW_SAMPLERS}[self.diffusion.objective]
        if self.sample.sampler not in ("auto", *samplers):
            raise ValueError(
                f"sample.sampler {self.sample.sampler} does not belong to diffusion.objective "
                f"{self.diffusion.objective}; use auto, {', '.join(samplers)}"
            )
        self._one_dropout()
        if self.repa.encoder_path is not None and self.repa.layer > self.model.num_layers:
            raise ValueError(f"repa.layer {self.repa.layer}: the model has {self.model.num_layers} blocks")
        if self.training.sample_prompts and self.model.text_conditioning == "none":
            raise ValueError("training.sample_prompts need a model that reads text; leave them out")
        return self

    def _one_dropout(self) -> None:
        """Labels are dropped as often as captions; an earlier version had a second number that decided nothing."""
        dropout, default = self.model.class_dropout, 0.1
        if self.model.num_classes is None or dropout in (default, self.diffusion.cfg_dropout):
            return
        if "cfg_dropout" not in self.diffusion.model_fields_set:
            self.diffusion.cfg_dropout = dropout
        else:
            needs = "which needs a row for no class, " if dropout == 0 else ""
            raise ValueError(
                f"diffusion.cfg_dropout {self.diffusion.cfg_dropout} drops labels, {needs}and model.class_dropout is "
                f"{dropout}: both name one share; give one of them"
            )

    @property
    def can_guide(self) -> bool:
        """Whether there is a condition, and a null condition to lead away from: a trained one needs dropped samples."""
        is_trained = self.diffusion.cfg_dropout > 0 or self.model.pretrained_path is not None
        if self.model.text_conditioning != "none":
            return is_trained or self.diffusion.null_text == "empty"
        return self.model.num_classes is not None and self.model.class_dropout != 0 and is_trained

    @property
    def vae_factor(self) -> int:
        """Pixels per latent cell side; 8 for a VAE that is not on this disk and of which nothing is said."""
        of_sd = self.vae.factor or vae_factor(self.vae.pretrained_model_name) or 8
        return {"sd": of_sd, "pool": 8, "pixels": 1, "patches": self.vae.patch, "conv": self.vae.patch}[self.vae.type]

    @property
    def bucket_step(self) -> int:
        """What the sides of data.buckets are multiples of, pixels: a sixteenth of a picture, in whole tokens."""
        unit = self.vae_factor * self.model.patch_size
        return max(1, round(self.data.image_size / 16 / unit)) * unit

    @property
    def latent_side(self) -> int:
        """Latent cells per picture side."""
        return self.data.image_size // self.vae_factor

    @property
    def latent_size(self) -> int:
        """Numbers in one latent."""
        return self.model.in_channels * self.latent_side**2


def refuse_unused(config: Config) -> None:
    """UserError for settings that are given and would change nothing, as other settings decide."""
    kind, default = config.diffusion.objective, Config()
    layout, flow_names = config.data.dataset_name, tuple(f"flow.{name}" for name in FlowConfig.model_fields)
    rules: list[tuple[bool, str, tuple[str, ...]]] = [
        (kind == "ddpm", "diffusion.objective is flow", tuple(f"diffusion.{name}" for name in _OF_NOISE)),
        (kind == "flow", "diffusion.objective is ddpm", (*flow_names, "sample.shift")),
        (config.flow.timestep_sampling != "uniform", "times are uniform", ("flow.logit_mean", "flow.logit_std")),
        (config.model.mlp == "gelu", "the width of swiglu follows from its parameters", ("model.mlp_ratio",)),
        ("sincos" in config.model.pos, "model.pos is rope2d", ("model.pos_scale",)),
        (layout == "cub", f"data.dataset_name is {layout}", ("data.use_bbox", "data.caption_source")),
        (layout == "coco", f"data.dataset_name is {layout}", ("data.coco_year",)),
        (config.vae.type == "sd", f"vae.type is {config.vae.type}", tuple(f"vae.{name}" for name in _OF_SD)),
        (config.vae.type in ("patches", "conv"), f"vae.type is {config.vae.type}", ("vae.patch",)),
        (config.vae.type == "patches", f"vae.type is {config.vae.type}", ("vae.decoder_steps",)),
        (config.vae.type == "conv", f"vae.type is {config.vae.type}", ("vae.codec_steps", "vae.width")),
        (config.model.type == "dit", "model.type is prx", _OF_DIT),
        (config.model.type == "prx", "model.type is dit", ("model.bottleneck_size", "model.resolution_embeds")),
        (config.text.type == "hash", f"text.type is {config.text.type}", ("text.context",)),
        (config.training.optimizer == "muon", "training.optimizer is adamw", ("training.muon_learning_rate",)),
        (config.model.route_share > 0, "model.route_share is 0", ("model.route_start", "model.route_end")),
        (config.model.num_classes is not None, "there are no classes", ("model.class_dropout",)),
    ]
    faults = []
    for is_used, reason, names in rules:
        for name in names:
            section, key = name.split(".")
            value = config[section][key]
            if not is_used and value != default[section][key]:
                faults.append(f"{name} {value} would change nothing: {reason}; leave it out")
    for name, part, reads in (("vae", config.vae, "sd"), ("text", config.text, "clip or language")):
        path = part.pretrained_model_name
        if part.type not in reads.split(" or ") and Path(path).exists():  # a preset may name one of the hub
            faults.append(
                f"{name}.pretrained_model_name {path} is not read by {name}.type {part.type}; set it to {reads}"
            )
    if config.run.strategy not in (None, "none", "ddp"):
        parted = f"under --strategy {config.run.strategy} each rank holds a part of every one; use none or ddp, or"
        if config.training.optimizer == "muon":
            faults.append(f"training.optimizer muon turns whole matrices: {parted} --optimizer adamw")
        if config.training.power_ema:
            faults.append(f"training.power_ema keeps averages of whole tensors: {parted} leave it out")
    if config.model.type == "prx" and config.training.optimizer == "muon":
        faults.append("training.optimizer muon knows the matrices of model.type dit; use --optimizer adamw")
    if config.model.type == "prx" and config.training.gradient_checkpointing not in (False, True):
        faults.append("training.gradient_checkpointing of model.type prx is true or false; it has no every so-manieth")
    if config.repa.features is not None and config.repa.encoder_path is None:
        faults.append("repa.features: the run was begun with an encoder to align with; give its folder: --encoder-path")
    if config.data.buckets and (config.data.cache_dir is not None or config.data.dataset_name == "scenes"):
        faults.append("data.buckets need pictures of their own shapes: leave data.cache_dir and scenes out")
    if config.data.buckets and config.data.crop not in ("center", "random"):
        faults.append(
            f"data.crop {config.data.crop} makes squares, data.buckets cut by center or random; leave one out"
        )
    if config.flow.contrastive and config.training.batch_size % 2:
        faults.append(
            f"training.batch_size {config.training.batch_size}: flow.contrastive compares the samples of a batch in "
            "pairs; use an even one"
        )
    if faults:
        raise UserError("\n       ".join(faults))


_OF_NOISE = (
    "num_train_timesteps", "noise_scheduler", "prediction_type", "rescale_betas_zero_snr", "snr_gamma", "criterion",
)  # fmt: skip
_OF_DIT = (
    "model.use_pooled_text", "model.learn_sigma", "model.conditioning", "model.norm", "model.cross_norm",
    "model.qk_norm", "model.mlp", "model.pos", "model.drop_path", "model.pos_scale", "model.time_freq_shift",
    "model.value_residual", "model.route_share", "repa.encoder_path",
)  # fmt: skip
_OF_SD = ("scaling_factor", "use_slicing", "use_tiling", "latent_stats")


# The guide's place of a setting -> ours. Values are kept, except where _GUIDE_VALUES says otherwise.
_GUIDE_PLACES = {
    "lr_scheduler.type": "training.lr_scheduler_type",
    "lr_scheduler.warmup_steps": "training.warmup_steps",
    "lr_scheduler.min_lr": "training.min_lr",
    "lr_scheduler.total_steps": "training.total_steps",
    "ema.enabled": "ema.enabled",
    "ema.decay": "training.ema_decay",
    "ema.warmup": "training.ema_warmup",
    "logging.tensorboard": "run.tensorboard",
    "logging.wandb": "run.wandb",
    "training.mixed_precision": "run.precision",
    "training.output_dir": "run.output_dir",
    "training.seed": "run.seed",
    "model.use_slicing": "vae.use_slicing",
    "training.use_slicing": "vae.use_slicing",
}
_GUIDE_VALUES = {
    ("training.mixed_precision", "no"): "fp32",
    ("training.mixed_precision", False): "fp32",
    ("lr_scheduler.type", "constant_with_warmup"): "constant",
}


def translate_guide(tree: dict[str, Any]) -> dict[str, Any]:
    """A file in the guide's form, in ours. Unknown keys stay where they are and are refused later by name."""
    tree = {name: dict(section) if isinstance(section, dict) else section for name, section in tree.items()}
    moved: dict[str, Any] = {}
    for place, ours in _GUIDE_PLACES.items():
        section, key = place.split(".")
        if isinstance(tree.get(section), dict) and key in tree[section]:
            value = tree[section].pop(key)
            moved[ours] = _GUIDE_VALUES.get((place, value), value) if isinstance(value, (str, bool)) else value
    for section in ("lr_scheduler", "ema", "logging"):
        if tree.get(section) == {}:
            del tree[section]
    if moved.pop("ema.enabled", True) is False:
        moved["training.ema_decay"] = 0.0
    if "training.min_lr" in moved:  # the guide gives a rate, the schedule wants a share of the peak
        training = tree.get("training") or {}
        peak = float(training.get("learning_rate", training.get("lr", 1e-4)))
        moved["training.min_lr_ratio"] = float(moved.pop("training.min_lr")) / peak if peak else 0.0
    for ours, value in moved.items():
        section, key = ours.split(".")
        tree.setdefault(section, {})
        if isinstance(tree[section], dict):
            tree[section].setdefault(key, value)
    return tree


# Settings of generate.py, metrics.py and precompute.py. No torch import, so --help is quick.


METRICS = ("scenes", "loss", "caption", "recon", "vae", "colour", "memory", "fid", "clip")


class DrawOptions(Section):
    """What to draw with."""

    checkpoint: str = setting("", "run folder, checkpoint folder, or a weights file next to its config.yaml")
    steps: int | None = setting(None, "sampling steps; null: as trained", "num_inference_steps", ge=1)
    cfg_scale: float | None = setting(None, "guidance scale; null: as trained", "guidance_scale", ge=0)
    seed: int = setting(0, "seed of the first picture", ge=0, le=2**63 - 1)
    ema: bool = setting(True, "use the averaged weights")
    ema_length: float | None = setting(
        None,
        "average over this share of the run (0.01 to 0.28), made after training from --power-ema's snapshots",
        ge=0.01,
        le=0.28,
    )
    vae: str | None = setting(None, "VAE by path or hub id, instead of the trained-with one")
    text_encoder: str | None = setting(None, "text encoder by path or hub id, instead of the trained-with one")
    device: str = setting("auto", "auto, cpu, cuda or cuda:N")


class GenerateOptions(DrawOptions):
    """What to draw and how."""

    output: str = setting("samples.png", "grid.png, or a folder", "out")
    prompt: list[str] = setting([], "captions")
    prompts: str | None = setting(None, "file of captions: .txt, one a line, or .jsonl with prompt, text or caption")
    captions: str | None = setting(
        None, "captions of a data set: coco:PATH (coco2014:, coco2017:), cub:PATH or custom:PATH (held-out split)"
    )
    labels: list[int] = setting([], "classes, for a class-conditional model")
    count: int | None = setting(
        None, "so many of the captions, drawn by --seed; of classes: so many pictures, evenly over them", "num", ge=1
    )
    images_per_prompt: int = setting(1, "pictures of each caption", ge=1)
    negative: str | None = setting(None, "caption to lead away from, instead of the null condition")
    sampler: str = setting("auto", f"auto, {', '.join(NOISE_SAMPLERS)}; {', '.join(FLOW_SAMPLERS)}")
    cfg_interval: list[float] = setting([0.0, 1.0], "noise levels, low and high, between which guidance acts")
    cfg_channels: int | None = setting(None, "guide only the first channels; 3 is the public DiT's habit", ge=1)
    cfg_rescale: float = setting(0.0, "bring the guided spread back by this share", ge=0, le=1)
    shift: float | None = setting(None, "time shift of the sampling grid (flow)", gt=0)
    image_size: int | None = setting(None, "side of the pictures, pixels; null: as trained", ge=8, le=8192)
    batch_size: int = setting(16, "pictures at a time", ge=1)
    dtype: Literal["fp32", "bf16"] = setting("fp32", "precision of the network")
    npz: bool = setting(False, "also write samples.npz with arr_0 uint8 (N, H, W, 3), the ADM suite's form")
    grid: bool = setting(False, "also write grid.png into the folder")
    latents_only: bool = setting(False, "write latents.safetensors and no pictures")
    uint8: Literal["round", "adm"] = setting("round", "to 8 bits: nearest, or the ADM reference scripts' rule")


class MetricsOptions(DrawOptions):
    """What to measure."""

    output: str | None = setting(None, "JSON file; null: metrics.json in the run folder", "out")
    metrics: str = setting(
        "auto", f"comma-separated, of {', '.join(METRICS)}; auto: those that need no download and fit the data"
    )
    split: Literal["val", "train"] = setting("val", "pictures to measure on")
    count: int = setting(256, "pictures at most, chosen by the hash of their names", "num", ge=2)
    data_root: str | None = setting(None, "data folder instead of the trained-with one", "dataset_path")
    batch_size: int = setting(32, "pictures drawn at a time", ge=1)
    features: Literal["inception", "random"] = setting("inception", "fid: random is for tests only")
    inception_weights: str | None = setting(None, "fid: local weights file")
    pictures: str | None = setting(
        None, "fid: folder or .npz of made pictures instead of a checkpoint's, such as generate.py writes"
    )
    reference: str | None = setting(
        None, "fid: folder or .npz to compare with (ADM's VIRTUAL_*.npz too); null: the held-out pictures"
    )
    resize: Literal["legacy", "clean"] = setting("legacy", "fid: how pictures become 299 pixels; papers: legacy")
    clip_path: str | None = setting(
        None, "clip: a CLIP model by path or hub id, another one than the model's text encoder"
    )


class CacheSection(Section):
    """What to write."""

    out: str = setting("", "folder that receives the cache")
    shard_size: int = setting(4096, "pictures a shard", ge=1)
    dtype: str = setting("float16", "float16, bfloat16 or float32; float32 reproduces the encoders exactly")
    mirrored: bool = setting(
        True, "also encode the mirrored pictures (the encoder is not exactly symmetric)", "flip_variant"
    )
    crops: int = setting(0, "random crops a picture in place of the mirrored one; 0: the centre", ge=0)
    text: bool = setting(True, "also encode the captions", "encode_text")
    codec: str | None = setting(None, "run folder or file of a fitted codec")
    batch: int = setting(32, "pictures a forward pass of the encoder", ge=1)


class PrecomputeOptions(Config):
    """The run's settings, and the cache's."""

    cache: CacheSection = CacheSection()
