"""The dry run: the full-size preset, built and run symbolically, without memory for a single weight."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils.flop_counter import FlopCounterMode

from opens2v.config import Config, pixel_frames
from opens2v.model import RefWanBlock, RefWanTransformer3DModel
from opens2v.modules.conditions import clip_token_width
from opens2v.objective import causal_arguments
from opens2v.weights.base import latent_shape, prepare_generator, transformer_settings
from shared.plan.measure import FrozenPart
from shared.plan.table import Workload, plan_run

CLIP_PARAMETERS, CLIP_TOKENS = 630_766_080, 257
UMT5_PARAMETERS, UMT5_EMBEDDING = 5_680_910_336, 256_384 * 4096
VAE_PARAMETERS = 126_892_531
# Bytes that Wan's VAE needs beside its weights for each pixel of a frame, whatever the number of frames (81 at most):
# counted on fake tensors, float32. Encoding comes before the forward pass, decoding (of sample videos) after a step.
VAE_ENCODE_BYTES, VAE_DECODE_BYTES = 15_100, 20_500


def workload(config: Config) -> Workload:
    """One micro-step of the generator with its frozen encoders."""

    def build(config: Config) -> nn.Module:
        # On the meta device first: peft moves its layers to where the base's lie, and fake weights cannot be moved.
        with unset_fake_temporarily(), torch.device("meta"):
            model = RefWanTransformer3DModel(**transformer_settings(config))
            prepare_generator(config, model, precision=config.run.precision or "bf16")
        for module in model.modules():  # numbers that a step can be run with, where they are not fake
            for name, tensor in module._parameters.items():
                if tensor is not None:
                    value = torch.empty(tensor.shape, dtype=tensor.dtype).uniform_(-0.05, 0.05)
                    module._parameters[name] = nn.Parameter(value, requires_grad=tensor.requires_grad)
            for name, tensor in module._buffers.items():
                if tensor is not None:
                    module._buffers[name] = torch.ones(tensor.shape, dtype=tensor.dtype)
        return model

    def step(config: Config) -> Callable[[nn.Module], Tensor]:
        return lambda model: symbolic_loss(config, model)

    size = f"{pixel_frames(config)} frames of {config.data.pixel_height} x {config.data.pixel_width}"
    checkpointing = "on" if config.training.gradient_checkpointing else "off"
    title = f"opens2v, {size}" + ("" if config.run.plan_table else f", checkpointing {checkpointing}")
    return Workload(title, build, step, (RefWanBlock,), frozen_parts, built_in_fp32=True, built_once=True)


def symbolic_loss(config: Config, model: nn.Module) -> Tensor:
    """The training forward on inputs of the right shapes."""
    batch, slots, data = config.training.batch_size, config.data.max_subjects_per_sample, config.data
    channels, frames, height, width = latent_shape(config, pixel_frames(config), data.pixel_height, data.pixel_width)
    ref_height, ref_width = latent_shape(config, 1, data.ref_height, data.ref_width)[2:]
    latents = torch.randn(batch, channels, frames, height, width)
    arguments = causal_arguments(config.model, latents)
    timestep = torch.rand(batch, frames) if config.model.causal else torch.rand(batch)
    clip_tokens = CLIP_TOKENS if config.model.image_encoder == "clip" else 17
    clip = None if config.model.clip_path == "off" else torch.randn(batch, slots, clip_tokens, clip_token_width(config))
    output = model(
        latents,
        timestep * 1000,
        torch.randn(batch, config.model.text_rows, config.model.text_dim),
        ref_clip=clip,
        ref_latents=torch.randn(batch, slots, channels, ref_height, ref_width),
        ref_mask=torch.ones(batch, slots, dtype=torch.bool),
        return_dict=False,
        **arguments,
    )[0]
    return (output.float()[:, :channels] - latents).square().mean()


def frozen_parts(config: Config) -> list[FrozenPart]:
    """The encoders that run beside the generator on the device; cached ones do not."""
    model, data, batch = config.model, config.data, config.training.batch_size
    parts = []
    if model.codec == "wan":
        flops = batch * vae_encode_flops(pixel_frames(config), data.pixel_height, data.pixel_width)
        flops = 0.0 if data.use_cached_latents else flops
        draws = config.run.visualize and (config.training.val_num_samples or config.training.val_prompts)
        per_pixel = VAE_DECODE_BYTES if draws else 0 if data.use_cached_latents else VAE_ENCODE_BYTES
        workspace = per_pixel * data.pixel_height * data.pixel_width
        name = f"Wan VAE, fp32, with workspace to {'draw samples' if draws else 'encode'}"
        parts.append(FrozenPart(name, VAE_PARAMETERS, 4 * VAE_PARAMETERS, flops, workspace))
    if model.image_encoder == "clip" and model.clip_path != "off" and not data.use_cached_clip:
        flops = 2.0 * CLIP_PARAMETERS * CLIP_TOKENS * batch * data.max_subjects_per_sample
        parts.append(FrozenPart("CLIP ViT-H/14, bf16", CLIP_PARAMETERS, 2 * CLIP_PARAMETERS, flops))
    if model.text_encoder == "umt5" and not data.use_cached_text:
        flops = 2.0 * (UMT5_PARAMETERS - UMT5_EMBEDDING) * model.text_rows * batch
        of_card = FrozenPart("UMT5-XXL encoder, bf16", UMT5_PARAMETERS, 2 * UMT5_PARAMETERS, flops)
        of_host = FrozenPart(
            "UMT5-XXL encoder, bf16, in host memory", UMT5_PARAMETERS, 0, host_bytes=2 * UMT5_PARAMETERS
        )
        parts.append(of_host if model.text_encoder_cpu_offload else of_card)
    return parts


def vae_encode_flops(frames: int, height: int, width: int) -> float:
    """FLOPs of encoding one clip with Wan's VAE, counted on fake tensors."""
    from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan

    with FakeTensorMode(), torch.no_grad():
        vae = AutoencoderKLWan()
        counter = FlopCounterMode(display=False)
        with counter:
            vae.encode(torch.empty(1, 3, frames, height, width))
        return float(counter.get_total_flops())


def print_plan(config: Config) -> None:
    """Write the plan to the console."""
    print(plan_run(workload(config), config))
