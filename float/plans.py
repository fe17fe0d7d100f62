"""The dry run of both phases: sizes, memory and time, measured on fake tensors."""

from float.config import AutoencoderConfig, Config
from shared.errors import UserError

RECOGNISER_PARAMETERS = 315_700_000  # wav2vec2-large with its head
WAV2VEC_PARAMETERS = 94_400_000


def print_plan(config: Config) -> None:
    """Phase 2: transformer and audio projection train; the encoders ran before (precompute.py) and take no memory."""
    import torch

    from float.build import make_generator
    from float.model import FMTBlock
    from shared.plan import describe, make_plan, measure

    model, data, training = config.model, config.data, config.training

    def step(generator):
        batch, length, before = training.batch_size, data.sequence_length, data.prev_frames
        width = generator.audio_encoder.audio_projection[0].in_features
        output = generator(
            torch.rand(batch),
            torch.randn(batch, length, generator.fmt.dim_w),
            torch.randn(batch, length, width),
            torch.randn(batch, generator.fmt.dim_w),
            torch.randn(batch, 1, model.dim_e),
            torch.randn(batch, before, generator.fmt.dim_w),
            torch.randn(batch, before, width),
        )
        return output.float().square().mean()

    _settle_precision(config)
    measured = measure(
        lambda: make_generator(model, data, gradient_checkpointing=training.gradient_checkpointing),
        step,
        config.run.precision,
        (FMTBlock,),
    )
    plan = make_plan("FLOAT phase 2, motion flow", measured, run=config.run, training=training)
    print(describe(plan))
    frozen = {"motion auto-encoder": _autoencoder_size(config)}
    if model.audio_features == "wav2vec2":
        frozen["wav2vec2"] = WAV2VEC_PARAMETERS
    if data.emotion_source in ("ser", "mixed"):
        frozen["emotion recogniser"] = RECOGNISER_PARAMETERS
    listed = ", ".join(f"{name} {count:,}" for name, count in frozen.items())
    print(f"frozen encoders     run before, in precompute.py, and are not in this memory: {listed} parameters")


def print_autoencoder_plan(config: AutoencoderConfig) -> None:
    """Phase 1 with its discriminators; the perceptual stack is left out of the memory."""
    import torch

    from float.autoencoder_model import AutoencoderWithJudges
    from shared.plan import describe, make_plan, measure

    model, training = config.model, config.training
    adversarial = training.lambda_adversarial > 0 or training.lambda_style > 0

    def step(network):
        shape = (training.batch_size, 3, model.input_size, model.input_size)
        output, terms = network(torch.randn(shape), torch.randn(shape), judge=adversarial, penalise=False)
        return output.float().abs().mean() + sum(terms.values())

    _settle_precision(config)
    measured = measure(
        lambda: AutoencoderWithJudges(model, config.data, adversarial=adversarial), step, config.run.precision
    )
    print(describe(make_plan("FLOAT phase 1, motion auto-encoder", measured, run=config.run, training=training)))


def _settle_precision(config: Config | AutoencoderConfig) -> None:
    """The precision that a GPU run of these settings would take."""
    from float.config import settle

    if config.run.strategy == "none" and (config.run.world_size or 1) > 1:
        raise UserError("--strategy none plans for one rank; choose another strategy or --world-size 1")
    settle(config, steps_per_epoch=1, device_type="cuda")


def _autoencoder_size(config: Config) -> int:
    import torch

    from float.build import make_autoencoder

    with torch.device("meta"):
        return sum(parameter.numel() for parameter in make_autoencoder(config.model).parameters())
