"""What DiT costs: beside diffusers' DiT and PixArt, from pictures and from the cache, its loader, its scaling.

    python scripts/bench/dit.py [--parts peers precision use start loader scaling] [--rounds 5] [--output DIR]
    bash scripts/bench.sh --system dit
The peers do the same work on the same shapes with the same number of parameters: forward, mean square and backward.
"""

import sys
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from scripts.bench.bench import Bench, BenchOptions, Row, planned_step, run_benchmark, training_step
from shared.config import load_config
from shared.errors import command

if __name__ == "__main__" and {"-h", "--help"} & set(sys.argv):
    load_config(BenchOptions, description=__doc__)

import contextlib
import io
import json
import tempfile

import torch
from torch import nn

from dit.config import PRESETS, Config
from dit.model import DiTModel
from dit.plan import workload
from shared.data import BatchPlan, MapStream
from shared.engine.dist import DistInfo

WIDTH, LAYERS, HEADS, CLASSES = 384, 12, 6, 1000  # DiT-S/2
TEXT_DIM, TEXT_TOKENS, REAL_TOKENS = 512, 77, 30
SAMPLE = ("--data-root", "sample", "--set", "data.num_samples=null", "--set", "data.flip_guard=false")


def settings(*words: str) -> Config:
    """A preset with changes."""
    return load_config(Config, presets=PRESETS, argv=["--config", *words])


def class_models() -> tuple[nn.Module, nn.Module]:
    """Ours and diffusers' DiT-S/2 with 1000 classes, latents of 16 x 16."""
    from diffusers import DiTTransformer2DModel

    ours = DiTModel(WIDTH, LAYERS, HEADS, input_size=16, text_conditioning="none", num_classes=CLASSES)
    theirs = DiTTransformer2DModel(
        num_attention_heads=HEADS, attention_head_dim=WIDTH // HEADS, in_channels=4, num_layers=LAYERS, sample_size=16
    )
    return ours, theirs


def text_models() -> tuple[nn.Module, nn.Module]:
    """Ours and diffusers' PixArt: shared modulation, cross-attention to captions, latents of 32 x 32; 12 layers."""
    from diffusers import PixArtTransformer2DModel

    ours = DiTModel(
        WIDTH, LAYERS, HEADS, input_size=32, text_conditioning="cross", use_pooled_text=False, text_dim=TEXT_DIM,
        text_len=TEXT_TOKENS, conditioning="adaln_single", cross_norm="none",
    )  # fmt: skip
    theirs = PixArtTransformer2DModel(
        num_attention_heads=HEADS, attention_head_dim=WIDTH // HEADS, in_channels=4, out_channels=4, num_layers=LAYERS,
        cross_attention_dim=WIDTH, sample_size=32, patch_size=2, caption_channels=TEXT_DIM,
        use_additional_conditions=False,
    )  # fmt: skip
    return ours, theirs


def prx_models() -> tuple[nn.Module, nn.Module]:
    """Ours with the parts of a recipe of today, and diffusers' PRX: latents of 32 x 32 with 16 channels; 12 layers."""
    from diffusers import PRXTransformer2DModel

    ours = DiTModel(
        WIDTH, LAYERS, HEADS, input_size=32, in_channels=16, use_pooled_text=False, text_dim=TEXT_DIM,
        text_len=TEXT_TOKENS, norm="rmsnorm", cross_norm="rmsnorm", qk_norm=True, mlp="swiglu", pos="rope2d",
    )  # fmt: skip
    theirs = PRXTransformer2DModel(
        context_in_dim=TEXT_DIM, hidden_size=WIDTH, num_heads=HEADS, depth=LAYERS, axes_dim=[WIDTH // HEADS // 2] * 2
    )
    return ours, theirs


def class_step(model: nn.Module, batch: int = 4) -> tuple:
    """The inputs of a step and the step of ours: (x, t, labels, target, job)."""
    x, target = torch.randn(2, batch, 4, 16, 16)
    t, labels = torch.randint(0, 1000, (batch,)), torch.randint(0, CLASSES, (batch,))
    return x, t, labels, target, training_step(model, lambda: (model(x, t, labels=labels) - target).square().mean())


def peers(bench: Bench) -> None:
    """Training steps beside diffusers, and the step with and without a cache of latents."""
    ours, theirs = class_models()
    x, t, labels, target, own = class_step(ours)
    other = training_step(theirs, lambda: (theirs(x, t, labels).sample - target).square().mean())
    sizes = f"{_count(ours):,} and {_count(theirs):,} parameters (theirs repeats the embedders), 64 tokens, batch 4"
    bench.training_pair("DiT-S/2 step", own, other, peer="diffusers DiT", note=sizes)

    ours, theirs = text_models()
    x, target = torch.randn(2, 1, 4, 32, 32)
    t, text = torch.tensor([500]), torch.randn(1, TEXT_TOKENS, TEXT_DIM)
    mask = torch.arange(TEXT_TOKENS)[None] < REAL_TOKENS
    own = training_step(ours, lambda: (ours(x, t, text, text_mask=mask) - target).square().mean())

    def loss() -> torch.Tensor:
        found = theirs(
            x, encoder_hidden_states=text, timestep=t, added_cond_kwargs={}, encoder_attention_mask=mask.long()
        )
        return (found.sample - target).square().mean()

    sizes = f"{_count(ours):,} and {_count(theirs):,} parameters, 256 tokens, {TEXT_TOKENS} of text, batch 1"
    bench.training_pair("text-to-image step", own, training_step(theirs, loss), peer="diffusers PixArt", note=sizes)

    modern, prx = prx_models()
    x16, target16 = torch.randn(2, 1, 16, 32, 32)
    own = training_step(modern, lambda: (modern(x16, t, text, text_mask=mask) - target16).square().mean())
    other = training_step(prx, lambda: (prx(x16, t, text, attention_mask=mask).sample - target16).square().mean())
    sizes = f"{_count(modern):,} and {_count(prx):,} parameters, 256 tokens, {TEXT_TOKENS} of text, batch 1"
    bench.training_pair("text-to-image step, recipe of today", own, other, peer="diffusers PRX", note=sizes)
    cached_pair(bench)


def cached_pair(bench: Bench, side: int = 256) -> None:
    """The default preset's step from cached latents and text, and from a picture through SD's VAE and CLIP's tower."""
    from diffusers import AutoencoderKL
    from transformers import CLIPTextConfig, CLIPTextModel

    from dit.weights.open import build_model

    config = settings("default")
    model = build_model(config)
    vae = AutoencoderKL(
        block_out_channels=(128, 256, 512, 512), down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4, layers_per_block=2, latent_channels=4,
    ).eval()  # fmt: skip
    tower = CLIPTextModel(CLIPTextConfig(hidden_size=512, intermediate_size=2048, num_attention_heads=8)).eval()
    picture, ids = torch.randn(1, 3, side, side), torch.randint(0, 40000, (1, TEXT_TOKENS))
    latents, states = torch.randn(1, 4, side // 8, side // 8), torch.randn(1, TEXT_TOKENS, TEXT_DIM)

    def train(latents: torch.Tensor, states: torch.Tensor) -> None:
        model.zero_grad(set_to_none=True)
        found = model(latents, torch.tensor([500]), states, text_pooled=states[:, 0])
        (found - latents).square().mean().backward()

    def from_picture() -> None:
        with torch.no_grad():
            encoded = vae.encode(picture).latent_dist.mean
            text = tower(input_ids=ids).last_hidden_state
        train(encoded, text)

    note = f"the guide's 211.8 M parameters, one picture of {side} px; encoders of full size with random weights"
    bench.pair(
        "rate of training from cached latents", lambda: train(latents, states), from_picture,
        peer="encoding on the fly", bar=2.0, direction="at least", note=note,
    )  # fmt: skip


def precision(bench: Bench) -> None:
    """The class-conditional step in bf16 and fp32."""
    bench.precision("DiT-S/2 step", class_step(class_models()[0])[-1])


def use(bench: Bench) -> None:
    """Drawing pictures and reading samples."""
    from dit.dataset import TextImageDataset
    from dit.objective import make_objective
    from dit.sampling.drawing import Drawing, draw_latents
    from dit.weights.open import build_model

    config = settings("small")
    model = build_model(config).eval()
    objective = make_objective(config.diffusion, config.flow, learn_sigma=False, latent_size=config.latent_size)
    count, sample = 4, config.sample
    condition = {
        "text_embeddings": torch.randn(count, config.model.text_len, config.model.text_dim),
        "text_pooled": torch.randn(count, config.model.text_dim),
    }
    shape = (config.model.in_channels, config.latent_side, config.latent_side)
    drawing = Drawing(sampler=sample.sampler, steps=sample.steps, cfg_scale=sample.cfg_scale)

    def draw() -> None:
        draw_latents(
            model, objective, condition, list(range(count)), shape, drawing=drawing, device=torch.device("cpu")
        )

    bench.time(f"sampling, small preset, guided Heun, {sample.steps} steps", draw, per=count, unit="ms a picture")
    dataset = TextImageDataset.from_config(settings("default", *SAMPLE), is_train=True)
    bench.time(
        "loading, 256 px from files", lambda: [dataset.sample(i, 0) for i in range(16)], per=16, unit="ms a sample"
    )
    with tempfile.TemporaryDirectory() as folder:
        cached = cached_dataset(Path(folder))[1]
        bench.time(
            "loading, 256 px from the cache", lambda: [cached.sample(i, 0) for i in range(64)], per=64,
            unit="ms a sample",
        )  # fmt: skip


def cached_dataset(folder: Path) -> tuple[Config, object]:
    """The sample pictures at the default preset's sizes in a cache; pooled colours stand for the VAE's latents."""
    from dit import precompute
    from dit.data.cache import CachedDataset
    from dit.dataset import TextImageDataset

    words = ["default", *SAMPLE, "--set", "vae.type=pool", "--set", "text.type=hash"]
    with contextlib.redirect_stdout(io.StringIO()):
        precompute.main(["--config", *words, "--device", "cpu", "--out", str(folder)])
    config = settings(*words, "--cache-dir", str(folder))
    return config, CachedDataset(config, TextImageDataset.from_config(config, is_train=True))


def start(bench: Bench) -> None:
    """From the command to the first step."""
    bench.startup("--config", "small")


def loader(bench: Bench) -> None:
    """The default preset's loader beside a step of the planned length."""
    from dit.dataset import TextImageDataset, collate

    with tempfile.TemporaryDirectory() as folder:
        config, cached = cached_dataset(Path(folder))
        training = config.training
        pictures = settings("default", *SAMPLE)
        plain = TextImageDataset.from_config(pictures, is_train=True)
        for name, data, source in (("cached latents", cached, config), ("pictures", plain, pictures)):
            order = BatchPlan(len(data), training.batch_size)
            stream = MapStream(
                data, order, DistInfo(), collate=collate, num_workers=training.num_workers,
                prefetch_factor=training.prefetch_factor,
            )  # fmt: skip
            note = f"batch {training.batch_size}, 256 px"
            bench.starving(f"default, {name}", stream, planned_step(workload(source), source), note=note)


def scaling(bench: Bench) -> None:
    """Tokens, batch, parameters, pictures on disk."""
    model = DiTModel(WIDTH, 4, HEADS, input_size=16, text_conditioning="none", num_classes=CLASSES)

    def step(network: nn.Module, side: int, batch: int):
        x, labels = torch.randn(batch, 4, side, side), torch.zeros(batch, dtype=torch.long)
        return training_step(network, lambda: network(x, torch.zeros(batch), labels=labels).square().mean())

    bench.scaling(
        "tokens of a picture", {(side // 2) ** 2: step(model, side, 1) for side in (16, 32, 48, 64)},
        "ms a training step, 4 layers: the linear layers cost as the tokens, attention as their square",
    )  # fmt: skip
    bench.scaling(
        "batch", {batch: step(model, 16, batch) for batch in (1, 2, 4, 8)},
        "ms a training step: below 1 the weights' traffic is shared by more pictures",
    )  # fmt: skip
    by_size = {}
    for width in (192, 384, 576, 768):
        network = DiTModel(width, 4, width // 64, input_size=16, text_conditioning="none", num_classes=1)
        by_size[_count(network)] = step(network, 16, 2)
    bench.scaling("parameters", by_size, "ms a training step at 64 tokens: as the parameters, for they do all the work")
    with tempfile.TemporaryDirectory() as folder:
        jobs = {count: open_pictures(Path(folder) / str(count), count) for count in (250, 1000, 4000)}
        bench.scaling("pictures on disk", jobs, "ms to open the set: each picture's line and file is looked at once")


def open_pictures(folder: Path, count: int):
    """A folder of `count` pictures with captions, and the job that opens it as a data set."""
    from PIL import Image

    from dit.dataset import TextImageDataset

    (folder / "images").mkdir(parents=True)
    picture = io.BytesIO()
    Image.new("RGB", (64, 64), (200, 30, 30)).save(picture, "JPEG")
    lines = []
    for number in range(count):
        (folder / "images" / f"{number}.jpg").write_bytes(picture.getvalue())
        lines.append(json.dumps({"image": f"images/{number}.jpg", "caption": f"picture {number}"}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    config = settings("default", "--set", "data.dataset_name=custom", "--data-root", str(folder))
    return lambda: TextImageDataset.from_config(config, is_train=True)


def gpu(bench: Bench) -> None:
    """DiT-XL/2 at 256 px from cached latents."""
    from scripts.bench.gpu import utilisation

    config = settings("xl")
    config.training.batch_size = 64
    utilisation(bench, "DiT-XL/2, 256 px, cached latents, batch 64", workload(config), config, bar=0.5)


def _count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


PARTS = {part.__name__: part for part in (peers, precision, use, start, loader, scaling, gpu)}


@command
def main(argv: list[str] | None = None) -> list[Row]:
    """Measure, print, and write the table where --output says."""
    return run_benchmark("dit", PARTS, argv, __doc__)


if __name__ == "__main__":
    main()
