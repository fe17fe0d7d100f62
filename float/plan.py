"""The dry run of both phases: sizes, memory and time, measured on fake tensors."""

from typing import TYPE_CHECKING

from float.config import AutoencoderConfig, Config
from shared.errors import UserError

if TYPE_CHECKING:
    from shared.plan.table import Workload

RECOGNISER_PARAMETERS = 315_700_000  # wav2vec2-large with its head
WAV2VEC_PARAMETERS = 94_400_000


def workload(config: Config) -> "Workload":
    """Phase 2: transformer and audio projection train; the encoders ran before (precompute.py) and take no memory."""
    import torch

    from float.model import FMTBlock
    from float.modules.audio import raw_audio_width
    from float.weights.open import make_generator
    from shared.plan.table import Workload

    model, data = config.model, config.data

    def build(config: Config):
        return make_generator(model, data, gradient_checkpointing=config.training.gradient_checkpointing)

    def step(config: Config):
        batch, length, before = config.training.batch_size, data.sequence_length, data.prev_frames
        motion = model.dim_m if model.whiten_motion else model.dim_w
        width = raw_audio_width(
            model.audio_features, model.wav2vec_model_path, only_last_features=model.only_last_features
        )

        def loss(generator):
            output = generator(
                torch.rand(batch),
                torch.randn(batch, length, motion),
                torch.randn(batch, length, width),
                torch.randn(batch, motion),
                torch.randn(batch, 1, model.dim_e),
                torch.randn(batch, before, motion),
                torch.randn(batch, before, width),
                pose_BN7=torch.randn(batch, before + length, 7) if model.pose_condition else None,
                window_only=config.training.window_only,
            )
            return output.float().square().mean()

        return loss

    return Workload("FLOAT phase 2, motion flow", build, step, (FMTBlock,), built_once=True)


def print_plan(config: Config) -> None:
    """The plan of phase 2, and what the encoders hold that ran before."""
    from shared.plan.table import plan_run

    _settle_precision(config)
    print(plan_run(workload(config), config))
    model, data = config.model, config.data
    frozen = {"motion auto-encoder": _autoencoder_size(config)}
    if model.audio_features == "wav2vec2":
        frozen["wav2vec2"] = WAV2VEC_PARAMETERS
    if data.emotion_source in ("ser", "mixed"):
        frozen["emotion recogniser"] = RECOGNISER_PARAMETERS
    listed = ", ".join(f"{name} {count:,}" for name, count in frozen.items())
    print(f"frozen encoders     run before, in precompute.py, and are not in this memory: {listed} parameters")


def autoencoder_workload(config: AutoencoderConfig) -> "Workload":
    """Phase 1 with its discriminators; the perceptual stack is left out of the memory."""
    import torch

    from float.modules.discriminators import AutoencoderWithJudges
    from shared.plan.table import Workload

    model = config.model
    adversarial = config.training.lambda_adversarial > 0 or config.training.lambda_style > 0

    def build(config: AutoencoderConfig):
        return AutoencoderWithJudges(model, config.data, adversarial=adversarial)

    def step(config: AutoencoderConfig):
        shape = (config.training.batch_size, 3, model.input_size, model.input_size)

        def loss(network):
            pair, both_ways = (torch.randn(shape), torch.randn(shape)), config.training.both_ways
            output, _, terms = network(*pair, judge=adversarial, penalise=False, both_ways=both_ways)
            return output.float().abs().mean() + sum(terms.values())

        return loss

    return Workload("FLOAT phase 1, motion auto-encoder", build, step)


def print_autoencoder_plan(config: AutoencoderConfig) -> None:
    """The plan of phase 1."""
    from shared.plan.table import plan_run

    _settle_precision(config)
    print(plan_run(autoencoder_workload(config), config))


def _settle_precision(config: Config | AutoencoderConfig) -> None:
    """The precision that a GPU run of these settings would take."""
    from float.config import settle

    if config.run.strategy == "none" and (config.run.world_size or 1) > 1:
        raise UserError("--strategy none plans for one rank; choose another strategy or --world-size 1")
    settle(config, steps_per_epoch=1, device_type="cuda")


def _autoencoder_size(config: Config) -> int:
    import torch

    from float.weights.open import make_autoencoder

    with torch.device("meta"):
        return sum(parameter.numel() for parameter in make_autoencoder(config.model).parameters())
