"""What the multimodal model costs: an image-text step beside transformers' CLIP, its loader, embedding, scaling.

    python scripts/bench/multimodal.py [--parts peers precision use start loader scaling] [--rounds 5] [--output DIR]
    bash scripts/bench.sh --system multimodal

The pair: pictures of 224 px in patches of 16, both towers 192 wide, 12 and 4 blocks, 64 tokens, vocabulary 16,384,
embeddings 512, batch 8, fp32; forward, InfoNCE, backward, AdamW. `as trained` pads captions to their own length in
place of 64.
"""

import sys
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from scripts.bench.bench import Bench, BenchOptions, Job, Row, planned_step, run_benchmark, training_step
from shared.config import load_config
from shared.errors import command

if __name__ == "__main__" and {"-h", "--help"} & set(sys.argv):
    load_config(BenchOptions, description=__doc__)

import tempfile

import torch
from torch import nn

from multimodal.config import PRESETS, Config, stage_epochs
from multimodal.data.audio import log_power
from multimodal.data.sources import PairedStream, make_datasets, open_data
from multimodal.data.text import TextTokenizer
from multimodal.model import MultimodalModel, Widths
from multimodal.modules.contrastive import contrastive_loss
from multimodal.objective import AlignModel
from multimodal.plan import workload
from multimodal.trainer import adamw_of, make_network
from shared.engine.dist import DistInfo

WIDTH, IMAGE_DEPTH, TEXT_DEPTH, TOKENS, EMBED = 192, 12, 4, 64, 512
SHORT = 16  # tokens of a usual batch of captions after padding


def settings(*words: str) -> Config:
    """A preset with changes, and with AdamW's settings of its last stage, which the presets leave to each stage."""
    config = load_config(Config, presets=PRESETS, argv=["--config", *words])
    last = max(stage_epochs(config.training))
    return config.model_copy(update={"training": config.training.model_copy(update=adamw_of(config.training, last))})


def our_model(width: int = WIDTH, depth: int = IMAGE_DEPTH) -> AlignModel:
    """This repository's picture and text towers, 10,698,241 trainable parameters: CLIP's, a projection of the word
    vectors (36,864) and 13 more text positions (2,496), less 192 of other layers at the patches.
    """
    network = MultimodalModel(
        Widths((width, depth), (width, TEXT_DEPTH), (width, 0), (width, 0), width), embed_dim=EMBED
    )
    unused = ("audio", "fus", "to_fusion", "modality", "classifier", "match", "bias", "embed.audio")
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(not name.startswith(unused))
    return AlignModel(network)


def their_model() -> nn.Module:
    """transformers' CLIP of these dimensions: 10,659,073 parameters."""
    from transformers import CLIPConfig, CLIPModel

    shape = {"hidden_size": WIDTH, "intermediate_size": 4 * WIDTH, "num_attention_heads": WIDTH // 64}
    text = {
        "num_hidden_layers": TEXT_DEPTH, "vocab_size": 16384, "max_position_embeddings": TOKENS, "bos_token_id": 1,
        "eos_token_id": 2, "hidden_act": "gelu",
    }  # fmt: skip
    image = {"num_hidden_layers": IMAGE_DEPTH, "image_size": 224, "patch_size": 16, "hidden_act": "gelu"}
    config = CLIPConfig(text_config={**shape, **text}, vision_config={**shape, **image}, projection_dim=EMBED)
    return CLIPModel._from_config(config, attn_implementation="sdpa")


def our_step(module: AlignModel, images: torch.Tensor, ids: torch.Tensor, *, update: bool = True) -> Job:
    """A training step of this repository's towers."""
    trained = [p for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True) if update else None
    batch = {"image": {"images": images, "input_ids": ids, "attention_mask": ids != 0}}

    def loss() -> torch.Tensor:
        found = module(batch)
        return contrastive_loss(
            "infonce", found["image_embeds"], found["imagetext_embeds"], found["logit_scale"], found["logit_bias"]
        )

    return training_step(module, loss, optimizer=optimizer)


def their_step(images: torch.Tensor, ids: torch.Tensor) -> Job:
    """The same with transformers' CLIPModel: the same towers, loss and optimizer."""
    model = their_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    mask = (ids != 0).long()

    def loss() -> torch.Tensor:
        return model(input_ids=ids, attention_mask=mask, pixel_values=images, return_loss=True).loss

    return training_step(model, loss, optimizer=optimizer)


def pairs_of(batch: int = 8, side: int = 224) -> tuple[torch.Tensor, torch.Tensor]:
    """Made-up pictures and captions."""
    return torch.randn(batch, 3, side, side), torch.randint(5, 16000, (batch, TOKENS))


def peers(bench: Bench) -> None:
    """The step beside CLIP's, with captions of full length and as a batch has them."""
    images, ids = pairs_of()
    theirs = their_step(images, ids)
    note = "10,698,241 and 10,659,073 parameters, 197 image and 64 text tokens, batch 8"
    bench.training_pair(
        "image-text step", our_step(our_model(), images, ids), theirs, peer="transformers CLIP", note=note
    )
    short = our_step(our_model(), images, ids[:, :SHORT])
    note = f"captions padded to {SHORT} tokens, as a batch of them is; the peer pads to {TOKENS}"
    bench.pair("image-text step, as trained", short, theirs, peer="transformers CLIP", note=note)


def precision(bench: Bench) -> None:
    """The step in bf16 and fp32."""
    bench.precision("image-text step", our_step(our_model(), *pairs_of(4), update=False))


def use(bench: Bench) -> None:
    """Embedding pictures and sounds, reading samples."""
    config = settings("default", "--set", "data.data_root=null", "--datasets", "coco", "clotho")
    tokenizer = TextTokenizer(config.tokenizer, config.model.max_text_length)
    small = settings("small")
    module = AlignModel(make_network(small, tokenizer.vocabulary)).eval()
    side, count = small.model.image_size, 32
    images, sounds = torch.randn(count, 3, side, side), torch.randn(count, small.data.audio_frames, 80)

    def embed(batch: dict) -> None:
        with torch.inference_mode():
            module(batch)

    bench.time(
        f"embedding, small preset, {side} px",
        lambda: embed({"image": {"images": images}}),
        per=count,
        unit="ms a picture",
    )
    bench.time(
        "embedding, small preset, 2.56 s", lambda: embed({"audio": {"audio": sounds}}), per=count, unit="ms a sound"
    )
    datasets = make_datasets(config, open_data(config).train, tokenizer, stage=2, training=True)
    for kind, dataset in datasets.items():
        bench.time(
            f"loading, default preset, {kind} with caption",
            lambda data=dataset: [data.sample(i, 0) for i in range(16)], per=16, unit="ms a sample",
        )  # fmt: skip


def start(bench: Bench) -> None:
    """From the command to the first step."""
    bench.startup("--config", "small")


def loader(bench: Bench) -> None:
    """The default preset's loader beside a step of the planned length, from files and with the sounds' cache."""
    with tempfile.TemporaryDirectory() as folder:
        for name, words in (("files", []), ("spectrogram cache", ["--set", f"data.mel_cache={folder}"])):
            config = settings("default", "--set", "data.data_root=null", "--datasets", "coco", "clotho", *words)
            tokenizer = TextTokenizer(config.tokenizer, config.model.max_text_length)
            datasets = make_datasets(config, open_data(config).train, tokenizer, stage=2, training=True)
            for dataset in datasets.values() if words else ():
                for index in range(len(dataset)):
                    dataset.sample(index, 0)  # fills the cache
            stream, training = PairedStream(datasets, config, DistInfo(), Path(folder) / "bad.jsonl"), config.training
            note = f"{training.gradient_accumulation_steps} x {training.batch_size} pictures and as many sounds"
            bench.starving(f"default, {name}", stream, planned_step(workload(config), config), note=note)


def scaling(bench: Bench) -> None:
    """Tokens, batch, parameters, length of the sound, samples on disk."""
    module, ids = our_model(depth=4), pairs_of(4)[1]
    by_tokens = {
        (side // 16) ** 2 + 1: our_step(our_model_of(side), torch.randn(4, 3, side, side), ids[:, :SHORT], update=False)
        for side in (112, 224, 336, 448)
    }
    meaning = "ms a training step, 4 blocks: above 1 where attention's square shows"
    bench.scaling("tokens of a picture", by_tokens, meaning)
    by_batch = {batch: our_step(module, *pairs_of(batch), update=False) for batch in (2, 4, 8, 16)}
    bench.scaling("batch", by_batch, "ms a training step: 1, the contrast's square is too small to be seen")
    by_size = {}
    for width in (128, 192, 384):
        model = our_model(width, 4)
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        by_size[trained] = our_step(model, *pairs_of(4), update=False)
    bench.scaling("parameters", by_size, "ms a training step: the word table counts as parameters and costs nothing")
    waves = {seconds: torch.randn(16000 * seconds) for seconds in (5, 10, 20, 40)}
    sounds = {seconds: lambda wave=wave: log_power(wave) for seconds, wave in waves.items()}
    bench.scaling("seconds of sound", sounds, "ms for the spectrogram: one short transform a frame")
    config = settings("default", "--set", "data.data_root=null", "--datasets", "synthetic")
    jobs = {count: lambda count=count: open_data(settings_with(config, count)) for count in (100, 400, 1600)}
    bench.scaling("samples on disk", jobs, "ms to list made-up samples: one record each")


def our_model_of(side: int) -> AlignModel:
    """Four blocks over pictures of another side."""
    network = MultimodalModel(
        Widths((WIDTH, 4), (WIDTH, 1), (WIDTH, 0), (WIDTH, 0), WIDTH), embed_dim=EMBED, image_size=side
    )
    return AlignModel(network)


def settings_with(config: Config, count: int) -> Config:
    """The settings with so many made-up samples."""
    return config.model_copy(update={"data": config.data.model_copy(update={"synthetic_items": count})})


def gpu(bench: Bench) -> None:
    """The large preset, last stage."""
    from scripts.bench.gpu import utilisation

    config = settings("large")
    stage = max(stage_epochs(config.training))
    config.training.gradient_accumulation_steps, config.training.batch_size = 1, 64
    utilisation(bench, f"multimodal large, stage {stage}, batch 64", workload(config), config)


PARTS = {part.__name__: part for part in (peers, precision, use, start, loader, scaling, gpu)}


@command
def main(argv: list[str] | None = None) -> list[Row]:
    """Measure, print, and write the table where --output says."""
    return run_benchmark("multimodal", PARTS, argv, __doc__)


if __name__ == "__main__":
    main()
