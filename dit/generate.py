"""Draw pictures from captions with a trained DiT.

  python dit/generate.py --checkpoint outputs/dit --prompt "a red heart" "a blue car" --output hearts.png
  python dit/generate.py --checkpoint outputs/dit --prompts captions.txt --output pictures/ --npz
  torchrun --nproc_per_node=8 dit/generate.py --checkpoint OUT --captions coco2014:data/coco --count 30000 --output fid/
Without captions it draws held-out ones of the run's own data. An --output ending in .png is a grid of all pictures;
otherwise a folder with prompts.jsonl and 000000.png ..., each written as it is drawn: the same command again draws what
is missing. Picture i depends on --seed + i alone, not on batch size or number of ranks.
"""

import io
import json
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from dit.config import GenerateOptions
from shared.config import load_config
from shared.errors import UserError, check_output, command

if __name__ == "__main__" and {"-h", "--help"} & set(sys.argv):
    load_config(GenerateOptions, description=__doc__)

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from dit.config import Config, DataConfig
from dit.data.cache import readable_items
from dit.data.readers import read
from dit.dataset import TextImageDataset, spread_captions
from dit.modules.text import condition_of
from dit.sampling.drawing import Drawing, draw_latents, grid, to_uint8
from dit.weights.open import Trained, load_asked, saved_settings
from shared.engine.dist import DistInfo, barrier, gather_objects, init_distributed, raise_together, shutdown
from shared.errors import read_lines, write_text, written_aside
from shared.metrics import colour_caption
from shared.rng import keyed_generator

_DRAW = 41  # random stream
# a folder's name may hold dots, but what ends so is a file of another kind
OTHER_KINDS = ".jpg .jpeg .gif .webp .bmp .tif .tiff .svg .pdf .mp4 .npz .txt .json".split()
LARGEST_GRID = 1024  # pictures in one .png


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
        labels = options.labels or list(range(min(16, classes)))
        if options.count is not None and not options.labels:  # evenly over the classes, as for FID of ImageNet
            labels = [number * classes // options.count for number in range(options.count)]
        wanted = [(f"class {label}", label) for label in labels]
    else:
        wanted = [(text, None) for text in _texts(options)]
    for text in (*(text for text, _ in wanted), options.negative or ""):
        try:
            text.encode()
        except UnicodeEncodeError:
            raise UserError(f"the caption {text!r} is not UTF-8 text, half of a sign stands in it; mend it") from None
    if not wanted:
        raise UserError("there is nothing to draw: --prompts and --captions name no caption; give --prompt TEXT")
    if options.count is not None and options.count > len(wanted):
        more = -(-options.count // len(wanted))
        raise UserError(
            f"--count {options.count}: there are {len(wanted)} captions; leave it out, with --images-per-prompt {more}"
        )
    if options.count is not None and options.count < len(wanted):
        chosen = torch.randperm(len(wanted), generator=keyed_generator(options.seed, _DRAW))[: options.count]
        wanted = [wanted[index] for index in sorted(chosen.tolist())]
    wanted = [pair for pair in wanted for _ in range(options.images_per_prompt)]
    return [Request(index, text, label, options.seed + index) for index, (text, label) in enumerate(wanted)]


def held_out_captions(config: Config) -> list[str]:
    """Captions of held-out pictures of the run's own data, spread over the set."""
    held_out = TextImageDataset.from_config(config, is_train=False)
    if len(held_out) == 0:
        raise UserError("the run's data have no held-out captions; say what to draw with --prompt")
    return [colour_caption(captions) for captions in spread_captions(held_out, config.sample.count)]


def _texts(options: GenerateOptions) -> list[str]:
    if options.prompt:
        return options.prompt
    if options.captions is not None:
        kind, separator, path = options.captions.partition(":")
        name, year = (kind[:4], kind[4:]) if kind.startswith("coco") else (kind, "")
        if not separator or name not in ("coco", "cub", "custom") or year not in ("", "2014", "2017"):
            raise UserError(
                f"--captions {options.captions}: expected coco:PATH, coco2014:PATH, cub:PATH or custom:PATH"
            )
        settings = DataConfig.model_validate(
            {"dataset_name": name, "dataset_path": path, "image_size": 64, "coco_year": year or "auto"}
        )
        found = read(settings, Path(path), is_train=False).items
        if not len(found) and name == "custom":
            print(f"--captions {options.captions}: there is no held-out split, all captions are taken", file=sys.stderr)
            found = read(settings, Path(path), is_train=True).items
        texts = [item.captions[0] for item in readable_items(found)]
        if len(texts) < len(found):
            print(f"--captions {options.captions}: {len(found) - len(texts)} samples are left out", file=sys.stderr)
        return texts
    assert options.prompts is not None  # one of the three is given
    return _prompts_of(Path(options.prompts))


def _prompts_of(path: Path) -> list[str]:
    """The captions of a .txt, one a line, or of a .jsonl."""
    remedy = "give a .txt with one caption a line, or a .jsonl"
    numbered = read_lines(path, "--prompts", remedy)
    if path.suffix in (".json", ".csv", ".yaml", ".parquet"):
        raise UserError(f"--prompts {path}: {path.suffix} is not read; {remedy}")
    if path.suffix != ".jsonl":
        return [line for _, line in numbered]
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


class Drawer:
    """A trained model and the settings to draw with, resolved and checked."""

    def __init__(self, trained: Trained, options: GenerateOptions, device: torch.device) -> None:
        self.trained, self.options, self.device = trained, options, device
        config = trained.config
        self.size = options.image_size or config.data.image_size
        cell, unit = config.vae_factor, config.vae_factor * config.model.patch_size
        if self.size % unit:
            raise UserError(f"--image-size {self.size}: must be a multiple of {unit}")
        self.shape = (config.model.in_channels, self.size // cell, self.size // cell)
        interval = options.cfg_interval
        if len(interval) != 2 or not 0 <= interval[0] <= interval[1] <= 1:
            raise UserError(f"--cfg-interval {interval}: give two noise levels, low and high, between 0 and 1")
        if (options.cfg_channels or 0) > config.model.in_channels:
            raise UserError(
                f"--cfg-channels {options.cfg_channels}: the latents have {config.model.in_channels} channels"
            )
        self.drawing = Drawing(
            options.sampler if options.sampler != "auto" else config.sample.sampler,
            options.steps or config.sample.steps,
            guidance(config, options.cfg_scale),
            (interval[0], interval[1]),
            options.cfg_channels,
            options.cfg_rescale,
            config.sample.shift if options.shift is None else options.shift,
        )

    def settings(self) -> dict[str, Any]:
        """What decides how a picture comes out, as it was used."""
        sampler = self.drawing.sampler
        sampler = self.trained.objective.default_sampler if sampler == "auto" else sampler
        options = self.options
        names = ("negative", "ema", "dtype", "vae", "text_encoder", "uint8")
        return {
            "checkpoint": self.trained.name,
            "image_size": self.size,
            **self.drawing._asdict(),
            "sampler": sampler,
            **{name: getattr(options, name) for name in names},
            **({} if options.ema_length is None else {"ema_length": options.ema_length}),
        }

    def latents(self, part: list[Request]) -> Tensor:
        """The latents (B, C, h, w) of some pictures."""
        labels = [request.label for request in part if request.label is not None]
        encoder = self.trained.text_encoder
        condition = condition_of(
            [request.text for request in part], torch.tensor(labels) if labels else None, encoder, self.device
        )
        negative, null = self.options.negative, None
        if negative is not None:
            null = condition_of([negative] * len(part), None, encoder, self.device)
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.options.dtype == "bf16"):
            return draw_latents(
                self.trained.model,
                self.trained.objective,
                condition,
                [request.seed for request in part],
                self.shape,
                drawing=self.drawing,
                device=self.device,
                null=null,
            )

    def pictures(self, latents: Tensor) -> np.ndarray:
        """(B, H, W, 3) uint8."""
        with torch.no_grad():
            return to_uint8(self.trained.codec.decode(latents), rule=self.options.uint8)


def guidance(config: Config, wanted: float | None) -> float:
    """The guidance scale: the one that is wanted, the run's own, or none where there is nothing to lead away from."""
    if config.can_guide:
        return config.sample.cfg_scale if wanted is None else wanted
    if wanted not in (None, 1.0):
        raise UserError(
            f"--cfg-scale {wanted}: this model was trained without a null condition (class_dropout or cfg_dropout 0, "
            "or neither captions nor classes), so nothing can be led away from; leave it out"
        )
    return 1.0


def batches_of(wanted: list[Request], size: int, info: DistInfo) -> Iterator[list[Request]]:
    """This rank's batches, cut alike for any number of ranks, so that a picture comes out the same to the bit."""
    for number, first in enumerate(range(0, len(wanted), size)):
        if number % info.world == info.rank:
            yield wanted[first : first + size]


def draw_folder(drawer: Drawer, wanted: list[Request], folder: Path, info: DistInfo) -> None:
    """Draw what is missing in a folder; every picture is written as soon as it is drawn, by the rank that drew it."""
    _claim(folder, drawer, wanted, info)
    latents_only = drawer.options.latents_only
    for part in batches_of(wanted, drawer.options.batch_size, info):
        places = [_place(folder, request, latents_only) for request in part]
        if all(place.exists() for place in places):
            continue
        latents = drawer.latents(part)
        pictures = None if latents_only else drawer.pictures(latents)
        for row, place in enumerate(places):
            with written_aside(place) as temporary:
                if pictures is None:
                    save_file({"latent": latents[row].cpu().contiguous()}, temporary)
                else:
                    Image.fromarray(pictures[row]).save(temporary, "PNG")
    barrier()


def _place(folder: Path, request: Request, latents_only: bool) -> Path:
    return folder / (f".latent_{request.number:06d}.safetensors" if latents_only else f"{request.number:06d}.png")


def _claim(folder: Path, drawer: Drawer, wanted: list[Request], info: DistInfo) -> None:
    """Note in prompts.jsonl what the folder holds; refuse to mix it with pictures drawn otherwise."""
    settings, error = drawer.settings(), None
    lines = [
        json.dumps(
            {
                "file": f"{request.number:06d}.png", "prompt": request.text, "label": request.label,
                "seed": request.seed, "settings": settings,
            },
            ensure_ascii=False,
        )
        + "\n"
        for request in wanted
    ]  # fmt: skip
    note, text = folder / "prompts.jsonl", "".join(lines)
    if info.is_main and note.exists() and note.read_text(encoding="utf-8", errors="replace") != text:
        error = UserError(
            f"{folder} holds pictures of other prompts, seeds or settings (see prompts.jsonl); give another --output, "
            "or remove it"
        )
    elif info.is_main:
        write_text(note, text)
    raise_together(error)


def finish_folder(folder: Path, wanted: list[Request], options: GenerateOptions) -> None:
    """The archives over all pictures, by rank 0, one picture in memory at a time."""
    if options.latents_only:
        parts = [_place(folder, request, True) for request in wanted]
        latents = torch.stack([load_file(part)["latent"] for part in parts])
        with written_aside(folder / "latents.safetensors") as temporary:
            save_file({"latents": latents}, temporary)
        for part in parts:
            part.unlink()
        return
    files = [_place(folder, request, False) for request in wanted]
    if options.npz:
        write_npz(folder / "samples.npz", files)
    if options.grid:
        pictures = np.stack([np.asarray(Image.open(file)) for file in files[:LARGEST_GRID]])
        with written_aside(folder / "grid.png") as temporary:
            grid(pictures, columns=min(8, len(pictures))).save(temporary, "PNG")


def write_npz(path: Path, files: list[Path]) -> None:
    """arr_0 uint8 (N, H, W, 3) of picture files, ADM's form, picture by picture."""
    first = np.asarray(Image.open(files[0]).convert("RGB"))
    header = io.BytesIO()
    shape = {"descr": "|u1", "fortran_order": False, "shape": (len(files), *first.shape)}
    np.lib.format.write_array_header_1_0(header, shape)
    with written_aside(path) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive:
        with archive.open("arr_0.npy", "w", force_zip64=True) as member:
            member.write(header.getvalue())
            for file in files:
                member.write(np.ascontiguousarray(np.asarray(Image.open(file).convert("RGB"))).tobytes())


def draw_grid(drawer: Drawer, wanted: list[Request], path: Path, info: DistInfo) -> None:
    """All pictures in one file."""
    mine = [
        (request.number, picture)
        for part in batches_of(wanted, drawer.options.batch_size, info)
        for request, picture in zip(part, drawer.pictures(drawer.latents(part)), strict=True)
    ]
    pairs = sorted((pair for rank in gather_objects(mine) for pair in rank), key=lambda pair: pair[0])
    if info.is_main:
        with written_aside(path) as temporary:
            grid(np.stack([picture for _, picture in pairs]), columns=min(8, len(pairs))).save(temporary, "PNG")


@command
def main(argv: list[str] | None = None) -> None:
    """The command; see the head of the file."""
    options = load_config(GenerateOptions, argv=argv, description=__doc__)
    if not options.checkpoint:
        raise UserError("--checkpoint is not set; give the folder of a training run")
    output = Path(options.output)
    is_grid = output.suffix.lower() == ".png"
    if output.suffix.lower() in OTHER_KINDS:
        raise UserError(f"--output {output}: pictures are written as .png; give a name that ends so, or a folder")
    check_output(output, folder=not is_grid)
    config = saved_settings(Path(options.checkpoint))[0]
    wanted = requests(options, config)
    if is_grid and options.latents_only:
        raise UserError("--latents-only writes a folder; give an --output that does not end in .png")
    if is_grid and len(wanted) > LARGEST_GRID:
        raise UserError(f"--output {output}: one file for {len(wanted)} pictures; give a folder")
    if options.latents_only and (options.npz or options.grid):
        raise UserError("--latents-only writes no pictures, so --npz and --grid have none to show; leave them out")
    guidance(config, options.cfg_scale)
    info = init_distributed(options.device)
    trained = load_asked(options, info.device)
    drawer = Drawer(trained, options, info.device)
    if is_grid:
        draw_grid(drawer, wanted, output, info)
    else:
        draw_folder(drawer, wanted, output, info)
        if info.is_main:
            finish_folder(output, wanted, options)
        barrier()
    if info.is_main:
        print(f"{len(wanted)} pictures in {output}")
    shutdown()


if __name__ == "__main__":
    main()
