"""Draw pictures from captions with a trained DiT.

  python dit/generate.py --checkpoint outputs/dit --prompt "a red heart" "a blue car" --output hearts.png
  python dit/generate.py --checkpoint outputs/dit --prompts captions.txt --output pictures/ --npz
  torchrun --nproc_per_node=8 dit/generate.py --captions coco:data/coco --num 30000 ...     shared over the ranks
Without captions it draws held-out ones of the run's own data. An --output ending in .png is a grid of all pictures;
otherwise a folder with 000000.png ... and prompts.jsonl. Picture i depends on --seed + i alone, not on batch size or
number of ranks.
"""

import json
import sys
from pathlib import Path
from typing import NamedTuple

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from dit.config import GenerateOptions
from shared.config import load_config
from shared.errors import UserError, command

if __name__ == "__main__" and {"-h", "--help"} & set(sys.argv):
    load_config(GenerateOptions, description=__doc__)

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file

from dit.config import Config, DataConfig
from dit.data.readers import read
from dit.dataset import TextImageDataset
from dit.modules.text import condition_of
from dit.sampling.drawing import Drawing, draw_latents, grid, to_uint8
from dit.weights.open import Trained, load_trained, saved_settings
from shared.engine.dist import DistInfo, barrier, gather_objects, init_distributed, shutdown
from shared.metrics import colour_caption
from shared.rng import keyed_generator

_DRAW = 41  # random stream


class Request(NamedTuple):
    """One picture to draw."""

    number: int
    text: str
    label: int | None
    seed: int


def requests(options: GenerateOptions, config: Config) -> list[Request]:
    """Every picture that is asked for, in order."""
    sources = [bool(options.prompt), options.prompts is not None, options.captions is not None, bool(options.labels)]
    if sum(sources) > 1:
        raise UserError("say what to draw with one of --prompt, --prompts, --captions, --labels, not with several")
    classes = config.model.num_classes
    if classes is None and options.labels:
        raise UserError("this model is not class-conditional: give --prompt")
    if classes is not None and (any(sources[:3]) or options.negative is not None):
        raise UserError("this model is class-conditional: give --labels, without --prompt and --negative")
    known = range(classes or 0)
    if strange := [label for label in options.labels if label not in known]:
        raise UserError(f"--labels {strange[0]}: the model knows the classes 0 to {len(known) - 1}")
    if not any(sources) and classes is None:
        wanted: list[tuple[str, int | None]] = [(text, None) for text in held_out_captions(config)]
    elif classes is not None:
        wanted = [(f"class {label}", label) for label in options.labels or range(min(16, classes))]
    else:
        wanted = [(text, None) for text in _texts(options)]
    if not wanted:
        raise UserError("there is nothing to draw: --prompts and --captions name no caption; give --prompt TEXT")
    if options.num is not None and options.num < len(wanted):
        chosen = torch.randperm(len(wanted), generator=keyed_generator(options.seed, _DRAW))[: options.num]
        wanted = [wanted[index] for index in sorted(chosen.tolist())]
    wanted = [pair for pair in wanted for _ in range(options.images_per_prompt)]
    return [Request(index, text, label, options.seed + index) for index, (text, label) in enumerate(wanted)]


def held_out_captions(config: Config) -> list[str]:
    """Captions of held-out pictures of the run's own data, spread over the set."""
    held_out = TextImageDataset.from_config(config, is_train=False)
    count = min(config.sample.count, len(held_out))
    if count == 0:
        raise UserError("the run's data have no held-out captions; say what to draw with --prompt")
    return [colour_caption(held_out.items[index * len(held_out) // count].captions) for index in range(count)]


def _texts(options: GenerateOptions) -> list[str]:
    if options.prompt:
        return options.prompt
    if options.captions is not None:
        kind, separator, path = options.captions.partition(":")
        if not separator or kind not in ("coco", "cub", "custom"):
            raise UserError(f"--captions {options.captions}: expected coco:PATH, cub:PATH or custom:PATH")
        settings = DataConfig.model_validate({"dataset_name": kind, "dataset_path": path, "image_size": 64})
        return [item.captions[0] for item in read(settings, Path(path), is_train=False).items]
    assert options.prompts is not None  # one of the three is given
    return _prompts_of(Path(options.prompts))


def _prompts_of(path: Path) -> list[str]:
    """The captions of a .txt, one a line, or of a .jsonl."""
    if not path.is_file():
        raise UserError(f"--prompts {path}: no such file; give a .txt with one caption a line, or a .jsonl")
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise UserError(f"--prompts {path}: not UTF-8 ({error}); save it as UTF-8") from None
    numbered = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if path.suffix != ".jsonl":
        return [line.strip() for _, line in numbered]
    found = []
    for number, line in numbered:
        try:
            record = json.loads(line)
            text = next(record[key] for key in ("prompt", "text", "caption") if key in record)
        except (ValueError, StopIteration, TypeError, RecursionError):
            text = None
        if not isinstance(text, str):
            raise UserError(f"{path}:{number}: expected a JSON object with a text under prompt, text or caption")
        found.append(text)
    return found


def draw(
    trained: Trained, wanted: list[Request], options: GenerateOptions, device: torch.device
) -> tuple[torch.Tensor, np.ndarray | None]:
    """Latents, and pictures (N, H, W, 3) uint8 unless only latents are asked for."""
    config = trained.config
    size = options.image_size or config.data.image_size
    unit = config.vae_factor * config.model.patch_size
    if size % unit:
        raise UserError(f"--image-size {size}: must be a multiple of {unit}")
    shape = (config.model.in_channels, size // config.vae_factor, size // config.vae_factor)
    low, high = options.cfg_interval if len(options.cfg_interval) == 2 else (1.0, 0.0)
    if low > high:
        raise UserError(f"--cfg-interval {options.cfg_interval}: give two noise levels, low and high, between 0 and 1")
    drawing = Drawing(
        options.sampler if options.sampler != "auto" else config.sample.sampler,
        options.steps or config.sample.steps,
        config.sample.cfg_scale if options.cfg_scale is None else options.cfg_scale,
        (low, high),
        options.cfg_channels,
        options.cfg_rescale,
        options.shift,
    )
    latents, pictures = [], []
    for first in range(0, len(wanted), options.batch_size):
        part = wanted[first : first + options.batch_size]
        labels = torch.tensor([request.label for request in part]) if part[0].label is not None else None
        condition = condition_of([request.text for request in part], labels, trained.text_encoder, device)
        null = (
            None
            if options.negative is None
            else condition_of([options.negative] * len(part), None, trained.text_encoder, device)
        )
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=options.dtype == "bf16"):
            found = draw_latents(
                trained.model,
                trained.objective,
                condition,
                [request.seed for request in part],
                shape,
                drawing=drawing,
                device=device,
                null=null,
            )
        latents.append(found.cpu())
        if not options.latents_only:
            with torch.no_grad():
                pictures.append(to_uint8(trained.codec.decode(found), rule=options.uint8))
    return torch.cat(latents), np.concatenate(pictures) if pictures else None


def write_folder(
    folder: Path,
    mine: list[Request],
    latents: torch.Tensor,
    pictures: np.ndarray | None,
    options: GenerateOptions,
    info: DistInfo,
) -> None:
    """Pictures of this rank; lists and archives by rank 0."""
    folder.mkdir(parents=True, exist_ok=True)
    if pictures is not None:
        for request, picture in zip(mine, pictures, strict=True):
            Image.fromarray(picture).save(folder / f"{request.number:06d}.png")
    everything = gather_objects(
        [
            (request, latents[row].numpy(), None if pictures is None else pictures[row])
            for row, request in enumerate(mine)
        ]
        if options.npz or options.grid or options.latents_only
        else [(request, None, None) for request in mine]
    )
    if info.is_main:
        rows = sorted((row for part in everything for row in part), key=lambda row: row[0].number)
        settings = options.model_dump(exclude={"prompt", "prompts", "captions", "labels", "output"})
        lines = [
            json.dumps(
                {
                    "file": f"{request.number:06d}.png",
                    "prompt": request.text,
                    "label": request.label,
                    "seed": request.seed,
                    "settings": settings,
                },
                ensure_ascii=False,
            )
            for request, _, _ in rows
        ]
        (folder / "prompts.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        if options.latents_only:
            save_file({"latents": torch.from_numpy(np.stack([row[1] for row in rows]))}, folder / "latents.safetensors")
        if options.npz and not options.latents_only:
            np.savez(folder / "samples.npz", arr_0=np.stack([row[2] for row in rows]))
        if options.grid and not options.latents_only:
            grid(np.stack([row[2] for row in rows]), columns=min(8, len(rows))).save(folder / "grid.png")
    barrier()


@command
def main(argv: list[str] | None = None) -> None:
    options = load_config(GenerateOptions, argv=argv, description=__doc__)
    if not options.checkpoint:
        raise UserError("--checkpoint is not set; give the folder of a training run")
    wanted = requests(options, saved_settings(Path(options.checkpoint))[0])
    info = init_distributed(options.device)
    trained = load_trained(
        options.checkpoint, device=info.device, use_ema=options.ema, vae=options.vae, text_encoder=options.text_encoder
    )
    mine = wanted[info.rank :: info.world]
    nothing: tuple[torch.Tensor, np.ndarray | None] = (torch.zeros(0), np.zeros((0, 1, 1, 3), np.uint8))
    latents, pictures = draw(trained, mine, options, info.device) if mine else nothing
    output = Path(options.output)
    if output.suffix.lower() == ".png":
        if options.latents_only:
            raise UserError("--latents-only writes a folder; give an --output that does not end in .png")
        parts = gather_objects(
            [
                (request.number, picture)
                for request, picture in zip(mine, [] if pictures is None else pictures, strict=True)
            ]
        )
        if info.is_main:
            ordered = [
                picture for _, picture in sorted((pair for part in parts for pair in part), key=lambda pair: pair[0])
            ]
            output.parent.mkdir(parents=True, exist_ok=True)
            grid(np.stack(ordered), columns=min(8, len(ordered))).save(output)
    else:
        write_folder(output, mine, latents, pictures, options, info)
    if info.is_main:
        print(f"{len(wanted)} pictures in {output}")
    shutdown()


if __name__ == "__main__":
    main()
