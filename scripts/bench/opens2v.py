"""What OpenS2V costs: the transformer beside diffusers' Wan, training with and without a cache, a drawn clip, the
loader, scaling.

    python scripts/bench/opens2v.py [--parts peers precision use start loader scaling] [--rounds 5] [--output DIR]
    bash scripts/bench.sh --system opens2v
"""

import sys
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from scripts.bench.bench import Bench, BenchOptions, Job, Row, alternate, planned_step, run_benchmark, training_step
from shared.config import load_config
from shared.errors import command

if __name__ == "__main__" and {"-h", "--help"} & set(sys.argv):
    load_config(BenchOptions, description=__doc__)

import json
import statistics
import tempfile

import torch
from torch import nn

from opens2v.config import SAMPLE_DATA, Config, pixel_frames
from opens2v.dataset import collate_opens2v_batch, create_dataset, training_set
from opens2v.model import WAN_1_3B, RefWanTransformer3DModel
from opens2v.modules.conditions import Conditions
from opens2v.modules.encoders import TEXT_ROWS as WAN_TEXT_ROWS
from opens2v.modules.lora import enable_trainable
from opens2v.plan import workload
from opens2v.sampling.video import SamplerSettings, VideoSampler
from opens2v.train import parse, sample_paths
from opens2v.weights.base import latent_shape, new_transformer
from shared.data import BatchPlan, MapStream
from shared.engine.dist import DistInfo
from shared.engine.products import use_fast_products

WAN_SMALL = dict(
    patch_size=(1, 2, 2), num_attention_heads=3, attention_head_dim=128, in_channels=16, out_channels=16, text_dim=256,
    freq_dim=256, ffn_dim=1536, num_layers=6, rope_max_seq_len=64,
)  # fmt: skip
TEXT_ROWS = 128
CLIP_VIT_H = dict(hidden_size=1280, intermediate_size=5120, num_attention_heads=16, image_size=224, patch_size=14)
UMT5_XXL = dict(vocab_size=32, d_model=4096, d_kv=64, d_ff=10240, num_heads=64, feed_forward_proj="gated-gelu")
CLIP_LAYERS, UMT5_LAYERS = 32, 24


def settings(*words: str) -> Config:
    """A preset with changes, on the sample data."""
    return parse(["--config", *words])


def video_step(model: nn.Module, frames: int = 5, batch: int = 1, height: int = 16, width: int = 24) -> Job:
    """Forward, mean square and backward on made-up latents of so many frames."""
    x, t = torch.randn(batch, 16, frames, height, width), torch.full((batch,), 500.0)
    text = torch.randn(batch, TEXT_ROWS, model.config.text_dim)
    return training_step(model, lambda: model(x, t, text, return_dict=False)[0].square().mean())


def peers(bench: Bench) -> None:
    """All weights trained beside diffusers' class, references off; then the adapters' step with and without a cache."""
    from diffusers.models.transformers.transformer_wan import WanTransformer3DModel

    theirs = WanTransformer3DModel(**WAN_SMALL)
    ours = RefWanTransformer3DModel.from_base(theirs)
    count = sum(parameter.numel() for parameter in theirs.parameters())
    note = f"{count:,} parameters in both, 480 tokens of 5 frames, {TEXT_ROWS} of text, no references"
    bench.training_pair("video step", video_step(ours), video_step(theirs), peer="diffusers Wan", note=note)
    del ours, theirs
    adapter_pair(bench)
    cached_pair(bench)


def adapter_pair(bench: Bench) -> None:
    """A step of the reference modules on the frozen 1.3B base, with two subjects, beside diffusers' model with its text
    attention alone trained; blocks are counted as in cached_pair. A clip of 21 frames of 240 x 416 with pictures of 128
    pixels has more picture tokens for each of its own than one of 480 x 832 with pictures of 256.
    """
    from diffusers.models.transformers.transformer_wan import WanTransformer3DModel

    shape, jobs = (1, 16, 6, 30, 52), []
    for layers in (1, 2):
        theirs = WanTransformer3DModel(**{**WAN_1_3B, "num_layers": layers})
        for name, parameter in theirs.named_parameters():
            parameter.requires_grad_("attn2" in name)
        jobs += [adapter_step(layers, shape, subjects=2, side=16), adapters_step(theirs, shape)]
    later = WAN_1_3B["num_layers"] - 1
    times = [
        (own + later * (own_two - own), other + later * (other_two - other))
        for own, other, own_two, other_two in zip(*alternate(jobs, bench.rounds), strict=True)
    ]
    ours, theirs_ms = (1000 * statistics.median(values) for values in zip(*times, strict=True))
    note = "Wan-1.3B, 2,340 tokens, 128 rows of text of 512, 1,026 of two pictures, with AdamW; theirs: attn2 trained"
    ratio = statistics.median(own / other for own, other in times)
    bench.add(
        Row("peers", "adapter step, two subjects", ratio, 1.05, ours=ours, theirs=theirs_ms, peer="diffusers Wan",
            note=note)
    )  # fmt: skip


def cached_pair(bench: Bench, frames: int = 21, height: int = 64, width: int = 96) -> None:
    """Rate of training from cached features over the rate with the encoders in the loop, for Wan's 1.3B base.

    Of deep models, blocks are measured and counted: the base as its first block and 29 later ones, which also carry the
    gradient on to the block before. Pictures of subjects go through the VAE in both.
    """
    from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
    from transformers import CLIPVisionConfig, CLIPVisionModel, UMT5Config, UMT5EncoderModel

    vae = AutoencoderKLWan().eval()
    clip = CLIPVisionModel(CLIPVisionConfig(**CLIP_VIT_H, num_hidden_layers=1)).eval()
    umt5 = UMT5EncoderModel(UMT5Config(**UMT5_XXL, num_layers=1)).eval()
    for model in (clip, umt5):
        use_fast_products(model)
    video, picture = torch.randn(1, 3, frames, height, width), torch.randn(1, 3, 1, 64, 64)
    seen, words = torch.randn(1, 3, 224, 224), torch.randint(32, (1, TEXT_ROWS))
    encoders: list[Job] = [
        torch.no_grad()(job)
        for job in (
            lambda: vae.encode(picture), lambda: vae.encode(video), lambda: clip(pixel_values=seen), lambda: umt5(words)
        )
    ]  # fmt: skip
    shape = (1, 16, (frames - 1) // 4 + 1, height // 8, width // 8)
    times = alternate([adapter_step(1, shape), adapter_step(2, shape), *encoders], bench.rounds)
    latents, everything, parts = [], [], []
    for first, both, reference, target, clip_layer, text_layer in zip(*times, strict=True):
        cached = first + (WAN_1_3B["num_layers"] - 1) * (both - first) + reference
        other = CLIP_LAYERS * clip_layer + UMT5_LAYERS * text_layer
        parts.append((cached, target, other))
        latents.append((cached + target) / cached)
        everything.append((cached + target + other) / cached)
    cached, target, other = (1000 * statistics.median(values) for values in zip(*parts, strict=True))
    clip_of = f"{frames} frames of {height} x {width}"
    alone = f"{clip_of}; by FLOPs 1.29 at 480 x 832, where attention grows and the base costs more than its VAE"
    rows = (
        ("rate of training from cached latents alone", latents, None, target, "Wan's VAE on the video", alone),
        (
            "rate of training from the cache (latents, text, CLIP)", everything, 2.0, target + other,
            "the VAE, CLIP ViT-H and UMT5-XXL", f"{clip_of}, a caption of {TEXT_ROWS} tokens, a picture of a subject",
        ),
    )  # fmt: skip
    for name, ratios, bar, theirs, peer, note in rows:
        ratio = statistics.median(ratios)
        bench.add(Row("peers", name, ratio, bar, "at least", cached, theirs=theirs, peer=peer, note=note))


def adapters_step(model: nn.Module, shape: tuple[int, ...], *, subjects: int = 0, side: int = 8) -> Job:
    """A step of what is trained of a model, with AdamW, and with pictures of side x side latents."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    x, text = torch.randn(shape), torch.zeros(1, WAN_TEXT_ROWS, WAN_1_3B["text_dim"])
    text[:, :TEXT_ROWS] = torch.randn(1, TEXT_ROWS, WAN_1_3B["text_dim"])
    pictures = {
        "ref_clip": torch.randn(1, subjects, 257, 1280),
        "ref_latents": torch.randn(1, subjects, 16, side, side),
    }

    def loss() -> torch.Tensor:
        given = {**pictures, "text_length": TEXT_ROWS} if subjects else {}
        return model(x, torch.tensor([500.0]), text, **given, return_dict=False)[0].square().mean()

    return training_step(model, loss, optimizer=torch.optim.AdamW(trained, lr=1e-4, fused=True))


def adapter_step(layers: int, shape: tuple[int, ...], *, subjects: int = 1, side: int = 8) -> Job:
    """A step of the reference modules on so many frozen blocks of the 1.3B base; see adapters_step."""
    model = RefWanTransformer3DModel(**{**WAN_1_3B, "num_layers": layers})
    enable_trainable(model)
    return adapters_step(model, shape, subjects=subjects, side=side)


def precision(bench: Bench) -> None:
    """The video step in bf16 and fp32."""
    bench.precision("video step", video_step(RefWanTransformer3DModel(**WAN_SMALL)))


def drawing(config: Config, frames: int, steps: int) -> Job:
    """A clip of so many pixel frames drawn by an untrained model of these settings."""
    config.model.prediction = "velocity"  # the other form wants a fitted codec, and costs the same
    model, data = new_transformer(config).eval(), config.data
    shape = latent_shape(config, frames, data.pixel_height, data.pixel_width)
    ref = latent_shape(config, 1, data.ref_height, data.ref_width)
    text = torch.randn(1, config.model.text_rows, config.model.text_dim)
    clip = torch.randn(1, 1, 17, model.config.ref_clip_dim)
    conditions = Conditions(None, text, clip, torch.randn(1, 1, 16, *ref[2:]), torch.ones(1, 1, dtype=torch.bool))
    sampler = VideoSampler(model, model, config.model, SamplerSettings(steps=steps))
    return lambda: sampler.sample(conditions, text[0], shape)


def use(bench: Bench) -> None:
    """A drawn clip, and reading samples."""
    config, steps = settings("small"), 20
    frames = pixel_frames(config)
    name = f"sampling, small preset, {frames} frames, guided UniPC, {steps} steps"
    bench.time(name, drawing(config, frames, steps), per=frames / 16, unit="ms a second of video at 16 frames/s")
    for preset in ("small", "default"):
        chosen = settings(preset)
        data = chosen.data = chosen.data.model_copy(update={"keep_decoded": False})
        dataset = training_set(chosen)
        size = f"{data.num_training_frames} frames of {data.pixel_height} x {data.pixel_width}"
        count = min(4, len(dataset))
        bench.time(
            f"loading, {preset} preset, {size}", lambda d=dataset, n=count: [d.sample(i, 0) for i in range(n)],
            per=count, unit="ms a sample",
        )  # fmt: skip


def start(bench: Bench) -> None:
    """From the command to the first step, which is the small base's."""
    bench.startup("--config", "small")


def loader(bench: Bench) -> None:
    """The default preset's loader beside a step of the planned length."""
    config = settings("default")
    training = config.training
    dataset = training_set(config)
    plan = BatchPlan(len(dataset), training.batch_size, drop_last=False)
    stream = MapStream(
        dataset, plan, DistInfo(), collate=collate_opens2v_batch, num_workers=training.num_workers,
        prefetch_factor=training.prefetch_factor,
    )  # fmt: skip
    bench.starving("default, clips from files", stream, planned_step(workload(config), config))


def scaling(bench: Bench) -> None:
    """Frames, batch, parameters, samples on disk."""
    model = RefWanTransformer3DModel(**{**WAN_SMALL, "num_layers": 2})
    by_tokens = {96 * frames: video_step(model, frames=frames) for frames in (2, 5, 10, 20)}
    meaning = "ms a training step, 2 blocks: from 1 towards 2, for every token attends to every other"
    bench.scaling("tokens of a clip", by_tokens, meaning)
    bench.scaling("batch", {batch: video_step(model, batch=batch) for batch in (1, 2, 4)}, "ms a training step: 1")
    by_size = {}
    for heads in (1, 2, 4):
        network = RefWanTransformer3DModel(
            **{**WAN_SMALL, "num_layers": 2, "num_attention_heads": heads, "ffn_dim": 512 * heads}
        )
        by_size[sum(parameter.numel() for parameter in network.parameters())] = video_step(network)
    bench.scaling("parameters", by_size, "ms a training step: below 1, attention grows with the width alone")
    source = Path(sample_paths()["json_paths"][0])
    with tempfile.TemporaryDirectory() as folder:
        jobs = {}
        for times in (1, 10, 100):
            entries = json.loads(source.read_text())
            many = {f"{key}_{number}": value for number in range(times) for key, value in entries.items()}
            path = Path(folder) / f"part{times}.json"
            path.write_text(json.dumps(many))
            videos = str(SAMPLE_DATA / "step0/videos/dataset1")
            data = settings("small", "--json-paths", str(path), "--video-base-paths", videos).data
            jobs[len(many)] = lambda data=data: create_dataset(data, seed=0)
        bench.scaling("samples on disk", jobs, "ms to open the set: the annotation file is indexed once")


def gpu(bench: Bench) -> None:
    """Adapters on the frozen 1.3B base at 480 x 832: 21 frames, and 81 with recomputed blocks."""
    from scripts.bench.gpu import utilisation

    for preset, frames, checkpointing in (("default", 21, False), ("80gb", 81, True)):
        config = settings(preset)
        config.data.num_training_frames, config.data.num_training_frames_unit = frames, "pixel"
        config.training.gradient_checkpointing = checkpointing
        config.training.batch_size, config.training.gradient_accumulation_steps = 1, 1
        name = f"Wan-1.3B adapters, 480 x 832, {frames} frames{', blocks recomputed' if checkpointing else ''}"
        utilisation(bench, name, workload(config), config, bar=0.5)


PARTS = {part.__name__: part for part in (peers, precision, use, start, loader, scaling, gpu)}


@command
def main(argv: list[str] | None = None) -> list[Row]:
    """Measure, print, and write the table where --output says."""
    return run_benchmark("opens2v", PARTS, argv, __doc__)


if __name__ == "__main__":
    main()
