"""A video of a subject: from a prompt, one or more subject pictures and a trained checkpoint.

    python opens2v/generate.py --checkpoint OUT --output out.mp4                        a held-back clip of the run
    python opens2v/generate.py --checkpoint OUT --ref-image a.png,b.png --prompt "..." --output out.mp4
    python opens2v/generate.py --checkpoint OUT --prompt-file list.jsonl --output-dir FOLDER

list.jsonl holds {"prompt": ..., "ref_image": [...], "output": "name.mp4"} a line.
Beside every mp4 lie its first frame (.png) and its settings (.json).
"""

import sys
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import json
from dataclasses import asdict, dataclass
from typing import Any, Literal

from shared.config import Section, load_config, setting
from shared.errors import UserError, check_output, command


class GenerateOptions(Section):
    """What to draw, and how."""

    checkpoint: str = setting("", "run folder, checkpoint folder, or model.pt")
    config_path: str | None = setting(None, "settings of the run, when they do not lie beside the checkpoint")
    generator_ckpt: str | None = setting(None, "base weights, when they are not where the run had them")
    prompt: str | None = setting(None, "what the video shows")
    ref_image: list[str] = setting([], "subject pictures, comma separated; transparency becomes white", "ref_images")
    prompt_file: str | None = setting(None, "jsonl with prompt, ref_image and output a line")
    output: str = setting("out.mp4", "the video")
    output_dir: str | None = setting(None, "folder of the videos of --prompt-file")
    num_frames: int | None = setting(None, "pixel frames, 4k + 1; null: as trained", ge=1)
    height: int | None = setting(None, "pixels; null: as trained", ge=16)
    width: int | None = setting(None, "pixels; null: as trained", ge=16)
    steps: int | None = setting(None, "denoising steps; null: 50, small presets 20", ge=1)
    sampler: Literal["unipc", "euler"] = setting("unipc", "solver")
    shift: float | None = setting(None, "shift of the noise levels; null: as trained", gt=0)
    guidance: Literal["text", "both", "dual"] = setting(
        "both", "text: 2 passes; both: text and subject together; dual: 3 passes"
    )
    guidance_scale: float | None = setting(None, "strength of text guidance; null: 5, small presets 1.5", "cfg", ge=0)
    img_guidance_scale: float = setting(3.0, "strength of subject guidance, mode dual", ge=0)
    negative_prompt: str | None = setting(None, "what to steer away from; null: that of the run")
    fps: float | None = setting(
        None, "frames per second of the file; null: as the training clips move", ge=0.1, le=1000
    )
    seed: int = setting(42, "noise", ge=0, le=2**63 - 1)
    rembg: Literal["none", "white"] = setting("none", "white: take off a plain ground of the subject picture")
    lora_scale: float = setting(1.0, "factor on the LoRA layers", ge=0)
    ref_scale: float = setting(1.0, "factor on what the subject adds; 0 gives the base", ge=0)
    use_ema: bool = setting(True, "averaged weights, where the checkpoint has them")
    offload: bool = setting(False, "keep the text encoder on the CPU")
    vae_tiling: bool = setting(False, "decode in overlapping tiles: slower, a fraction of the memory (Wan's VAE)")
    dtype: Literal["fp32", "bf16"] | None = setting(
        None, "precision of the generator's arithmetic; null: bf16 where the base lies in bf16 and the device has it"
    )
    device: str = setting("auto", "auto, cpu, cuda or cuda:N")
    side_by_side: bool = setting(False, "put the subject picture left of every frame")


@dataclass
class Request:
    """One video to draw."""

    prompt: str
    ref_images: list[str]
    output: Path


def requests_of(options: GenerateOptions) -> list[Request]:
    """The videos that the options ask for; none when neither prompt nor list is given."""
    if options.prompt_file is not None:
        return _listed(options, Path(options.prompt_file))
    if options.prompt is None and not options.ref_image:
        return []
    if options.prompt is None:
        raise UserError("--ref-image is given without --prompt; say what the subject does")
    return [request_of(options.prompt, options.ref_image, Path(options.output), "--ref-image")]


def request_of(prompt: Any, pictures: Any, output: Path, where: str, folder: Path | None = None) -> Request:
    """A video to draw as a list or the command line gives it. pictures: None, a file or a list of files, in `folder`.

    Looked at before anything is loaded: UserError, which says where, for what is no text or not there.
    """
    named = [pictures] if isinstance(pictures, str) else pictures or []
    if not isinstance(prompt, str) or not isinstance(named, list) or not all(isinstance(one, str) for one in named):
        raise UserError(f"{where}: the prompt must be a text, and its pictures a file name or a list of them")
    paths = [str(one if folder is None else folder / one) for one in named]
    missing = next((path for path in paths if not Path(path).is_file()), None)
    if missing is not None:
        raise UserError(f"{where}: reference picture {missing}: not found")
    return Request(prompt, paths, output)


def _listed(options: GenerateOptions, path: Path) -> list[Request]:
    found: list[Request] = []
    if not path.exists():
        raise UserError(f"--prompt-file {path}: not found")
    folder = Path(options.output_dir or Path(options.output).parent)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"--prompt-file {path}: not UTF-8 ({error}); save it as UTF-8") from None
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            pictures, prompt = record.get("ref_image") or record.get("img_paths"), record["prompt"]
        except (ValueError, KeyError, AttributeError):
            raise UserError(
                f'--prompt-file {path}, line {number}: expected {{"prompt": ..., "ref_image": [...]}}'
            ) from None
        where = f"--prompt-file {path}, line {number}"
        target = inside(folder, record.get("output", f"{number:04d}.mp4"), where)
        found.append(request_of(prompt, pictures, target, where, path.parent))
        if any(one.output.resolve() == target.resolve() for one in found[:-1]):
            raise UserError(f"{where}: output {target.name} was named before; give each video a name of its own")
    if not found:
        raise UserError(f"--prompt-file {path}: holds no prompt")
    return found


def inside(folder: Path, name: Any, where: str) -> Path:
    """The path of a file that a list names; UserError for one that would lie outside of the folder."""
    if not isinstance(name, str):
        raise UserError(f"{where}: output is {name!r}, a file name is needed")
    target = folder / name
    if name == "" or not target.resolve().is_relative_to(folder.resolve()) or target.resolve() == folder.resolve():
        raise UserError(f"{where}: output {name!r} lies outside of {folder}; give a name inside of it")
    return target


def without_plain_ground(image: Any) -> Any:
    """The picture with the plain colour of its border made white.

    White becomes what lies within 24 grey levels of the border's median and is connected to the border.
    """
    import numpy as np
    from PIL import Image
    from scipy import ndimage

    pixels = np.array(image)
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    near = np.abs(pixels.astype(int) - np.median(border, 0)).max(-1) <= 24
    labels, _ = ndimage.label(near)
    touching = np.unique(np.concatenate([labels[0], labels[-1], labels[:, 0], labels[:, -1]]))
    pixels[np.isin(labels, touching[touching > 0])] = 255
    return Image.fromarray(pixels)


class Generator:
    """A loaded checkpoint that draws videos."""

    def __init__(self, options: GenerateOptions):
        import torch

        from opens2v.config import frame_unit
        from opens2v.modules.encoders import WanVAE, check_frames
        from opens2v.modules.lora import scale_lora
        from opens2v.weights.open import load_trained_generator, precision_of, settings_of
        from shared.engine.dist import init_distributed

        self.options = options
        if options.num_frames is not None:
            check_frames(options.num_frames, "--num-frames")
        unit = frame_unit(settings_of(Path(options.checkpoint), options.config_path)[0].model)
        for name, value in (("--height", options.height), ("--width", options.width)):
            if value is not None and value % unit:
                low = value // unit * unit
                raise UserError(f"{name} {value} is not a multiple of {unit}; use {low or unit} or {low + unit}")
        self.device = init_distributed(options.device).device
        self.module, self.encoders, self.config, self.weights = load_trained_generator(
            options.checkpoint,
            config_path=options.config_path,
            base=options.generator_ckpt,
            use_ema=options.use_ema,
            device=self.device,
            precision=options.dtype,
            offload=options.offload,
        )
        if options.vae_tiling:
            if not isinstance(self.encoders.codec, WanVAE):
                raise UserError("--vae-tiling: only Wan's VAE decodes in tiles; the small codecs need no such saving")
            self.encoders.codec.vae.enable_tiling()
        if options.lora_scale != 1:
            scale_lora(self.module, options.lora_scale)
        precision = precision_of(self.config, options.dtype, self.device)
        self.autocast = torch.autocast(self.device.type, torch.bfloat16, enabled=precision == "bf16")

    def sampler_settings(self) -> Any:
        """The sampler of the options, with the run's values where they leave it open."""
        from opens2v.sampling.video import sampler_settings

        options = self.options
        names = ("sampler", "shift", "guidance", "guidance_scale", "img_guidance_scale", "ref_scale", "seed")
        return sampler_settings(self.config, steps=options.steps, **{name: getattr(options, name) for name in names})

    def latent_shape(self) -> tuple[int, int, int, int]:
        """Shape of a video's latents; UserError for a length that causal blocks do not fill."""
        from opens2v.config import pixel_frames
        from opens2v.modules.causal import frame_blocks
        from opens2v.weights.base import latent_shape

        options, data, model = self.options, self.config.data, self.config.model
        shape = latent_shape(
            self.config,
            options.num_frames or pixel_frames(self.config),
            options.height or data.pixel_height,
            options.width or data.pixel_width,
        )
        if model.causal:
            try:
                frame_blocks(shape[1], model.num_frame_per_block, model.independent_first_frame)
            except ValueError as error:
                raise UserError(f"--num-frames: {error}") from None
        return shape

    def draw(self, conditions: Any, *, places: list[int] | None = None, seed: int | None = None) -> Any:
        """Videos (B, 3, F, H, W) in [-1, 1]. places, seed: what the noise of each video is keyed by."""
        from opens2v.sampling.video import VideoSampler

        negative = self.options.negative_prompt
        rows = self.encoders.encode_text([self.config.training.negative_prompt if negative is None else negative])[0]
        settings = self.sampler_settings()
        settings.seed = settings.seed if seed is None else seed
        sampler = VideoSampler(self.module, self.module, self.config.model, settings, self.encoders.codec.variance)
        with self.autocast:
            latents = sampler.sample(conditions, rows, self.latent_shape(), places)
        return self.encoders.codec.decode(latents)

    def run(self, request: Request) -> Path:
        """Draw one video and write it with its first frame and settings."""
        import numpy as np

        from opens2v.evaluation.preview import conditions_for, open_picture

        pictures = [open_picture(path) for path in request.ref_images]
        if self.options.rembg == "white":
            pictures = [without_plain_ground(picture) for picture in pictures]
        conditions = conditions_for(self.config, self.encoders, [request.prompt], [pictures])
        shown = np.array(pictures[0]) if pictures else None
        return self.write(request.output, self.draw(conditions)[0], shown, request.prompt, request.ref_images)

    def write(self, output: Path, video: Any, reference: Any, prompt: str, ref_images: list[str]) -> Path:
        """The mp4 with everything that made it."""
        from opens2v.data.video import to_uint8, write_video
        from opens2v.evaluation.preview import side_by_side
        from opens2v.sampling.video import video_rate

        frames = to_uint8(video)
        if self.options.side_by_side and reference is not None:
            frames = side_by_side(reference, frames)
        settings = {
            "prompt": prompt, "ref_images": ref_images, "checkpoint": str(self.weights), "frames": len(frames),
            "sampler": asdict(self.sampler_settings()), "options": self.options.model_dump(),
        }  # fmt: skip
        return write_video(output, frames, self.options.fps or video_rate(self.config), settings)

    def run_held_back(self, output: Path) -> Path:
        """Draw the first held-back clip of the run's own data; the subject picture is shown beside it."""
        from opens2v.dataset import collate_opens2v_batch, readable_samples, validation_set
        from opens2v.evaluation.preview import reference_picture

        dataset = validation_set(self.config)
        item = readable_samples(dataset, range(len(dataset)), 1)[0]
        conditions = self.encoders.conditions(collate_opens2v_batch([item]))
        self.options.side_by_side = True
        reference = reference_picture(item["ref_pixels"][0])
        return self.write(output, self.draw(conditions)[0], reference, item["prompts"], [item["key"]])


@command
def main(argv: list[str] | None = None) -> list[Path]:
    options = load_config(GenerateOptions, argv=argv, description=__doc__)
    if not options.checkpoint:
        raise UserError("--checkpoint is needed: a run folder, one of its checkpoints, or a model.pt")
    requests = requests_of(options)
    places: list[Path | str] = [request.output for request in requests]
    for place in places or [options.output]:
        check_output(place, (".mp4", ".m4v", ".mov", ""))
    generator = Generator(options)
    written = [generator.run(request) for request in requests] or [generator.run_held_back(Path(options.output))]
    for path in written:
        print(path)
    return written


if __name__ == "__main__":
    main()
