"""What BAGEL costs: a packed batch beside a padded one and the released form, its sampling, loader and scaling.

python scripts/bench/bagel.py [--parts peers precision use start loader scaling] [--rounds 5] [--output DIR]
bash scripts/bench.sh --system bagel
"""

import sys
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from scripts.bench.bench import Bench, BenchOptions, Job, Row, run_benchmark
from shared.config import load_config
from shared.errors import command

if __name__ == "__main__" and {"-h", "--help"} & set(sys.argv):
    load_config(BenchOptions, description=__doc__)

import json
import tempfile
from typing import Any

import torch
from PIL import Image

from bagel.config import PRESETS, Config, LanguageConfig, ModelConfig, VisionConfig
from bagel.data.tokenizer import SpecialTokens, load_tokenizer
from bagel.dataset import UnifiedGenerationDataset, open_dataset, transforms_of
from bagel.model import Bagel
from bagel.objective import with_latents
from bagel.packing import Draws, Dropout, PackBuilder, PackFormat, PackStream, PlanItem, make_packer
from bagel.plan import dense_flops_per_token, workload
from bagel.train import complete
from bagel.weights.pretrained import build_model, load_autoencoder, read_config
from shared.engine.dist import DistInfo
from shared.plan.measure import ASSUMED_UTILISATION, GPUS

MARKS = SpecialTokens(8188, 8189, 8190, 8191)


def settings(*words: str) -> Config:
    """A preset with changes; without data, the sample data."""
    return complete(load_config(Config, presets=PRESETS, argv=["--config", *words]))


def build(layers: int = 4, width: int = 256) -> Bagel:
    """A model of 11.3 M parameters, or of another depth or width."""
    language = LanguageConfig(
        vocab_size=8192, hidden_size=width, intermediate_size=3 * width, num_hidden_layers=layers,
        num_attention_heads=width // 32, num_key_value_heads=2,
    )  # fmt: skip
    vision = VisionConfig(
        hidden_size=128, intermediate_size=512, num_hidden_layers=3, num_attention_heads=4, patch_size=14,
        image_size=224,
    )  # fmt: skip
    return Bagel(ModelConfig(language=language, vision=vision, max_latent_size=16)).initialize()


def make_pack(repeats: int = 1) -> dict[str, Any]:
    """1072 tokens: text to image at 256 px (290 tokens) twice, a question about a picture of 112 px (150) twice and an
    edit at 128 px (192), with latents drawn in place of encoded ones; `repeats` times that.
    """
    layout = PackFormat(MARKS, 16, 16, 14, 16, False, 2, 16)
    generator = torch.Generator().manual_seed(0)

    def text(length: int, loss: int = 0) -> PlanItem:
        return PlanItem("text", ids=torch.randint(8000, (length - 2,), generator=generator).tolist(), loss=loss)

    def seen(side: int) -> PlanItem:
        return PlanItem("vit_image", size=(side, side), image=torch.rand(3, side, side, generator=generator) * 2 - 1)

    draw = [text(32), PlanItem("vae_image", size=(256, 256), loss=1)]
    look = [seen(112), text(20), text(64, loss=1)]
    edit = [PlanItem("vae_image", size=(128, 128)), seen(84), text(22), PlanItem("vae_image", size=(128, 128), loss=1)]
    builder = PackBuilder(layout)
    for items in (draw, look, edit, draw, look) * repeats:
        builder.add(items, Draws.keyed(generator, items), Dropout())
    pack = builder.pack()
    pack["packed_latents"] = torch.randn(pack["packed_noise"].shape, generator=generator)
    return pack


def step_over(model: Bagel, packs: list[dict[str, Any]]) -> Job:
    """Forward, backward, clipping to norm 1 and AdamW on each pack."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True)

    def step() -> None:
        for pack in packs:
            losses = model(pack)
            (losses["ce"].mean() + losses["mse"].mean()).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()

    return step


def sample_packs(config: Config, count: int) -> tuple[list[dict], list[dict]]:
    """The first packs of the sample data under these settings, and the same samples padded to their longest."""
    model = read_config(config.model)
    tokenizer = load_tokenizer(model)
    dataset = open_dataset(config, model, tokenizer, config.data.train_data_path)
    packer, autoencoder = make_packer(dataset, config.data, 1), load_autoencoder(model)
    packed, padded = [], []
    for _ in range(count):
        samples = [dataset.sample(index, epoch) for epoch, index in packer.next_pack()]
        lengths = [dataset.layout.length(sample["items"]) for sample in samples]
        for target, together in ((packed, False), (padded, True)):
            builder = PackBuilder(dataset.layout)
            for sample, length in zip(samples, lengths, strict=True):
                items = list(sample["items"])
                missing = max(lengths) - length
                if together and missing > 2:  # a text without loss, its two marks included
                    items.append(PlanItem("text", ids=[32] * (missing - 2)))
                builder.add(items, Draws.keyed(torch.Generator().manual_seed(length), items), Dropout())
            target.append(with_latents(builder.pack(), autoencoder, model))
    return packed, padded


def peers(bench: Bench) -> None:
    """Packed against padded on the sample data."""
    for budget, count in ((1024, 4), (4096, 1)):
        config = settings("small_captions", "--tokens-per-batch", str(budget))
        packed, padded = sample_packs(config, count)
        useful, filled = (sum(pack["sequence_length"] for pack in packs) for packs in (packed, padded))
        model = read_config(config.model)
        rows = load_tokenizer(model).vocab_size
        ours, theirs = (build_model(model, rows=rows) for _ in range(2))
        note = f"{count} packs of the sample data, small preset: {useful:,} useful tokens, {filled:,} with padding"
        bench.pair(
            f"useful token, packs of {budget:,}", step_over(ours, packed), step_over(theirs, padded),
            peer="padded batch", bar=0.6, work=(useful, useful), note=note,
        )  # fmt: skip


def precision(bench: Bench) -> None:
    """The step of 1072 tokens in bf16 and fp32."""
    bench.precision("step, 1072 tokens", step_over(build(), [make_pack()]))


def use(bench: Bench) -> None:
    """A picture, a text token, reading samples."""
    from bagel.inferencer import InterleaveInferencer

    config = settings("small_captions")
    model_config = read_config(config.model)
    tokenizer = load_tokenizer(model_config)
    model = build_model(model_config, rows=tokenizer.vocab_size).eval()
    inferencer = InterleaveInferencer(
        model, load_autoencoder(model_config), tokenizer, *transforms_of(config.data, model_config), tokenizer.special
    )
    side = config.data.vae_image.max_size
    bench.time(
        f"sampling a picture, small preset, {side} px, guided, 25 steps",
        lambda: inferencer(text="A red apple", image_shapes=(side, side), num_timesteps=26), unit="ms a picture",
    )  # fmt: skip
    picture, tokens = Image.new("RGB", (side, side), (200, 30, 30)), 60

    def answer() -> None:
        inferencer(image=picture, text="What?", understanding_output=True, max_think_token_n=tokens)

    bench.time("sampling text about a picture, small preset", answer, per=tokens, unit="ms a token at most")
    dataset = open_dataset(config, model_config, tokenizer, config.data.train_data_path)
    bench.time("loading, small preset", lambda: [dataset.sample(i, 0) for i in range(32)], per=32, unit="ms a sample")


def start(bench: Bench) -> None:
    """From the command to the first step."""
    bench.startup("--config", "small_captions")


def loader(bench: Bench) -> None:
    """The 7B preset's loader, with pictures of full size, beside a step of the planned length."""
    with tempfile.TemporaryDirectory() as folder:
        config = settings("7b", "--train-data-path", str(write_records(Path(folder))))
        note = f"packs of {config.data.tokens_per_batch:,} tokens, pictures of 1024 px"
        flops = dense_flops_per_token(config.model.language) * config.data.tokens_per_batch
        step = flops / (ASSUMED_UTILISATION * GPUS["h100"].bf16_tflops * 1e12), "h100 by the linear layers' FLOPs"
        bench.starving("7b", open_stream(config), step, note=note)


def write_records(folder: Path, count: int = 24) -> Path:
    """Pictures of 1024 px to draw and to describe."""
    lines, noise = [], torch.randint(0, 255, (64, 64, 3), dtype=torch.uint8).numpy()
    for number in range(count):
        Image.fromarray(noise).resize((1024, 1024)).save(folder / f"{number}.jpg", quality=90)
        if number % 2:
            lines.append({"text_prompt": "a picture", "image_path": f"{number}.jpg"})
        else:
            say = [("user", "image", f"{number}.jpg"), ("user", "text", "What is it?"), ("assistant", "text", "Noise.")]
            turns = [
                {"role": role, "type": kind, "image_path" if kind == "image" else "content": value}
                for role, kind, value in say
            ]
            lines.append({"conversations": turns})
    (folder / "train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder / "train.jsonl"


def open_stream(config: Config) -> PackStream:
    """The stream of a training run, with bytes for the tokenizer that needs files."""
    model = ModelConfig(from_scratch=True, tokenizer="bytes")
    tokenizer = load_tokenizer(model)
    dataset: UnifiedGenerationDataset = open_dataset(config, read_config(model), tokenizer, config.data.train_data_path)
    from bagel.packing import make_collate

    return PackStream(
        dataset, config.data, DistInfo(), batch_size=1, accumulation=1,
        collate=make_collate(dataset.layout, Dropout(), 0), num_workers=config.training.num_workers,
        prefetch_factor=config.training.prefetch_factor,
    )  # fmt: skip


def scaling(bench: Bench) -> None:
    """Tokens of a pack, parameters, records on disk."""
    model = build()
    packs = {pack["sequence_length"]: step_over(model, [pack]) for pack in map(make_pack, (1, 2, 3, 4))}
    meaning = "ms a training step: samples attend to themselves only, so a longer pack costs as its tokens"
    bench.scaling("tokens of a pack", packs, meaning)
    pack, by_size = make_pack(), {}
    for width in (128, 256, 384):
        network = build(width=width)
        by_size[sum(p.numel() for p in network.parameters())] = step_over(network, [pack])
    bench.scaling("parameters", by_size, "ms a training step: below 1, for one token meets one expert of the two")
    with tempfile.TemporaryDirectory() as folder:
        jobs = {}
        for count in (30, 120, 480):
            path = Path(folder) / f"{count}.jsonl"
            path.write_text(DIALOGUE * count)
            config = settings("small_captions", "--train-data-path", str(path))
            jobs[count] = lambda config=config: open_stream(config)
        bench.scaling("records on disk", jobs, "ms to open the set and fill an epoch's packs: each line is read once")


DIALOGUE = """{"conversations": [{"role": "user", "type": "text", "content": "Why?"}, \
{"role": "assistant", "type": "text", "content": "So."}]}
"""


def gpu(bench: Bench) -> None:
    """7B width with as many layers as fit: all weights trained, AdamW in fp32, packs of the preset."""
    from scripts.bench.gpu import largest_that_fits, utilisation

    def attempt(layers: int) -> None:
        config = settings("7b", "--train-data-path", str(PRESETS / "7b.yaml"))
        config.run.strategy, config.run.world_size = None, None
        config.model.language.num_hidden_layers = layers
        title = f"BAGEL, 7B width, {layers} layers, {config.data.tokens_per_batch:,} tokens"
        utilisation(bench, title, workload(config), config, bar=0.45)

    largest_that_fits([12, 10, 8, 6, 4, 2, 1], attempt)


PARTS = {part.__name__: part for part in (peers, precision, use, start, loader, scaling, gpu)}


@command
def main(argv: list[str] | None = None) -> list[Row]:
    """Measure, print, and write the table where --output says."""
    return run_benchmark("bagel", PARTS, argv, __doc__)


if __name__ == "__main__":
    main()
