"""Draw, edit, describe or continue with a trained or released model.

    python bagel/generate.py --checkpoint outputs/bagel --output grid.png            the run's held-out prompts
    python bagel/generate.py --checkpoint outputs/bagel --prompt "A red apple" --output apple.png
    python bagel/generate.py --checkpoint BAGEL-7B-MoT --prompt "Make it blue" --image cat.jpg --task edit
    python bagel/generate.py --checkpoint outputs/bagel --prompt "What is this?" --image cat.jpg --output answer.json
    python bagel/generate.py --checkpoint outputs/bagel --prompts prompts.txt --output grid.png

The last draws one picture for each line, as a batch; the first does so for up to 16 prompts of the run's validation
data. A .png output receives the picture, a .txt the text, a .json both (the picture as a .png beside it).
"""

import sys
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import json
from dataclasses import fields
from typing import TYPE_CHECKING, Any, Literal

from shared.config import Section, load_config, setting
from shared.errors import UserError, check_output, command, read_lines, write_text, written_aside

if TYPE_CHECKING:
    from PIL import Image

    from bagel.inferencer import InterleaveInferencer
    from bagel.weights.open import Opened

SHEET = 16  # prompts of the validation data on a sheet


class Options(Section):
    """Command line."""

    checkpoint: str = setting(
        "outputs/bagel", "a run's output folder, one of its checkpoints, or a folder of released form", "model_path"
    )
    base: str | None = setting(None, "folder of the base weights of a run, if they have moved")
    prompt: str | None = setting(None, "what to draw, to change or to answer")
    prompts: str | None = setting(None, "a text file with one prompt a line; pictures are drawn as one batch")
    image: list[str] = setting([], "pictures that the prompt is about")
    task: Literal["auto", "t2i", "edit", "understand", "text"] = setting(
        "auto", "auto: understand with pictures, else t2i"
    )
    output: str = setting("generated.png", ".png, .txt or .json")
    height: int | None = setting(None, "pixels; null: 1024, or the largest that the model's tables hold", ge=1)
    width: int | None = setting(None, "pixels; null: as height", ge=1)
    seed: int = setting(0, "seed of noise and sampling", ge=0, le=2**63 - 1)
    think: bool = setting(False, "write a thought first (for models tuned with it)")
    max_length: int = setting(512, "longest text, tokens", ge=1)
    do_sample: bool = setting(False, "sample text instead of taking the likeliest token")
    temperature: float = setting(0.3, "temperature of sampled text", gt=0)
    num_timesteps: int = setting(50, "points of the time grid; one less model steps", ge=2)
    timestep_shift: float = setting(3.0, "shift of the grid towards noise", gt=0)
    cfg_text_scale: float | None = setting(None, "guidance by the text; null: 4")
    cfg_img_scale: float | None = setting(None, "guidance by the pictures; null: 1.5, edit: 2")
    cfg_interval: list[float] = setting([], "times in which guidance counts, two numbers; empty: 0.4 1, edit: 0 1")
    cfg_renorm_min: float = setting(0.0, "least factor of the renormalisation; 1: off", ge=0, le=1)
    cfg_renorm_type: Literal["global", "channel", "text_channel"] | None = setting(
        None, "null: global, edit: text_channel"
    )
    ema: bool = setting(True, "use averaged weights where there are some")
    device: str = setting("auto", "auto, cpu, cuda or cuda:N")
    precision: Literal["fp32", "bf16"] | None = setting(None, "null: bf16 on CUDA, else fp32")


def settings_of(options: Options, shape: tuple[int, int]) -> dict[str, Any]:
    """Arguments of unified_generate that were given."""
    given = {
        "think": options.think,
        "max_think_token_n": options.max_length,
        "do_sample": options.do_sample,
        "text_temperature": options.temperature,
        "num_timesteps": options.num_timesteps,
        "timestep_shift": options.timestep_shift,
        "cfg_renorm_min": options.cfg_renorm_min,
        "image_shapes": shape,
    }
    for name in ("cfg_text_scale", "cfg_img_scale", "cfg_renorm_type"):
        if options[name] is not None:
            given[name] = options[name]
    if options.cfg_interval:
        if len(options.cfg_interval) != 2 or options.cfg_interval[0] > options.cfg_interval[1]:
            raise UserError(f"--cfg-interval {options.cfg_interval}: give two rising numbers such as 0.4 1")
        given["cfg_interval"] = tuple(options.cfg_interval)
    return given


def write_picture(path: Path, picture: "Image.Image") -> None:
    """Write aside and rename."""
    with written_aside(path) as temporary:
        picture.save(temporary, format="PNG")


def write_result(path: Path, result: dict[str, Any], prompt: str) -> None:
    """The files of one result."""
    image, text = result["image"], result["text"]
    if path.suffix.lower() == ".png":
        if image is None:
            raise UserError(f"--output {path}: task {result['task']} gives a text; use .txt or .json")
        write_picture(path, image)
    elif path.suffix.lower() == ".txt":
        if text is None:
            raise UserError(f"--output {path}: task {result['task']} gives a picture; use .png or .json")
        write_text(path, text + "\n")
    else:
        picture = path.with_suffix(".png") if image is not None else None
        if picture is not None:
            write_picture(picture, image)
        record = {
            "prompt": prompt,
            "task": result["task"],
            "seed": result["seed"],
            "text": text,
            "image": picture and picture.name,
        }
        write_text(path, json.dumps(record, ensure_ascii=False, indent=1) + "\n")


def check(options: Options) -> list[str] | None:
    """The prompts, None: those of the run's data; refuses what cannot work before a model is loaded."""
    if options.prompt is not None and options.prompts is not None:
        raise UserError("give --prompt TEXT or --prompts FILE, not both")
    check_output(options.output, (".png", ".txt", ".json"))
    if options.prompt is not None:
        return [options.prompt]
    if options.image or options.task not in ("auto", "t2i") or options.think or Path(options.output).suffix != ".png":
        raise UserError(
            "without --prompt one picture is drawn for each of several prompts: no --image, no --think, no other task, "
            "and a .png"
        )
    if options.prompts is None:
        return None
    lines = [line for _, line in read_lines(options.prompts, "--prompts", "give a text file with one prompt a line")]
    if Path(options.prompts).suffix in (".json", ".jsonl", ".csv", ".yaml", ".parquet"):
        raise UserError(
            f"--prompts {options.prompts}: a text file with one prompt a line is read; this is no such file"
        )
    if not lines:
        raise UserError(f"--prompts {options.prompts}: no line with a prompt")
    return lines


def held_out_prompts(opened: "Opened") -> list[str]:
    """Prompts of the run's validation records that ask for a picture and show none."""
    from bagel.dataset import open_dataset
    from bagel.evaluation.validation import conversations

    config = opened.config
    if config is None or config.data.val_data_path is None:
        raise UserError("no prompt: this model has no validation records; give --prompt TEXT or --prompts FILE")
    dataset = open_dataset(config, opened.model_config, opened.tokenizer, config.data.val_data_path)
    found = [" ".join(case.inputs) for case in conversations(dataset, SHEET)[0]]
    if not found:
        path = config.data.val_data_path
        raise UserError(f"no prompt: no record of {path} asks for a picture; give --prompt TEXT or --prompts FILE")
    return found


def draw_all(
    inferencer: "InterleaveInferencer", prompts: list[str], options: Options, shape: tuple[int, int]
) -> "Image.Image":
    """A sheet with one picture for each prompt."""
    from bagel.evaluation.validation import grid
    from bagel.sampling.generation import Guidance

    given, names = settings_of(options, shape), {field.name for field in fields(Guidance)}
    guidance = Guidance(**{name: value for name, value in given.items() if name in names})
    pictures = inferencer.draw_batch([[prompt] for prompt in prompts], guidance, shape)
    return grid(pictures, columns=min(4, len(pictures)), scale=max(1, 128 // max(shape)))


@command
def main(argv: list[str] | None = None) -> None:
    """Read the options, open the model, write the result."""
    options = load_config(Options, argv=argv, description=__doc__)
    prompts = check(options)
    import torch

    from bagel.data.sources import ImageFault, load_image
    from bagel.weights.open import open_model

    try:
        images = [load_image(Path(name)) for name in options.image]
    except ImageFault as fault:
        raise UserError(f"--image: {fault}") from None
    on_cuda = options.device != "cpu" and torch.cuda.is_available()
    half = options.precision == "bf16" or (options.precision is None and on_cuda)
    opened = open_model(
        options.checkpoint,
        model_path=options.base,
        prefer_ema=options.ema,
        device=options.device,
        dtype=torch.bfloat16 if half else None,
    )
    side = min(
        1024, opened.data.vae_image.max_size, opened.model_config.max_latent_size * opened.model_config.latent_stride
    )
    shape = (options.height or side, options.width or options.height or side)
    inferencer = opened.inferencer(seed=options.seed)
    output = Path(options.output)
    if options.prompt is None:
        prompts = prompts or held_out_prompts(opened)
        write_picture(output, draw_all(inferencer, prompts, options, shape))
    else:
        wanted: Literal["auto", "text"] = "text" if output.suffix.lower() == ".txt" and not images else "auto"
        result = inferencer.unified_generate(
            options.prompt, images, options.task, wanted, options.seed, **settings_of(options, shape)
        )
        write_result(output, result, options.prompt)
        print(result["text"] if result["text"] is not None else f"task {result['task']}, seed {result['seed']}")
    print(f"wrote {output}")


if __name__ == "__main__":
    main()
