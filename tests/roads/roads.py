"""Every shipped preset, shrunk in width, depth, resolution and steps, and every other switch left as it is."""

import shlex
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from tests.launching import ROOT, run
from tests.roads import encoders, opening

STEPS = 4
FEW = f"--total-steps {STEPS} --save-steps 1 --logging-steps 1 --eval-steps 2 --device cpu --keep-last 2".split()
Command = Callable[[Path], tuple[int, list[str]]]  # the run's folder -> ranks, command line


@dataclass(frozen=True)
class Road:
    """One preset: how it trains when it is small, and what is done with the run."""

    system: str
    preset: str
    flags: Callable[[Path], list[str]]
    script: str = "train.py"
    place: str = "."  # where below the output folder the last checkpoints lie
    after: dict[str, Command] = field(default_factory=dict)  # name -> a command on the finished run
    opened: tuple[opening.Opener, ...] = ()  # open what the run and the commands wrote in the library it is for
    made: tuple[str, ...] = ()  # files that training leaves, as patterns below the run's folder
    ranks: int = 1

    @property
    def name(self) -> str:
        """Such as `dit xl`."""
        kind = "" if self.script == "train.py" else f" {self.script.removesuffix('.py')}"
        return f"{self.system}{kind} {self.preset}{f' on {self.ranks} ranks' if self.ranks > 1 else ''}"

    def train(self, files: Path, output: Path) -> list[str]:
        """The training command, without the interpreter."""
        config = ["--config", self.preset]
        return [f"{self.system}/{self.script}", *config, *self.flags(files), "--output-dir", str(output)]

    def plan(self) -> list[str]:
        """The dry run of the preset as it is shipped."""
        return [f"{self.system}/{self.script}", "--config", self.preset, "--dry-run"]


def on_run(line: str, ranks: int = 1) -> Command:
    """A command in which RUN stands for the run's folder."""
    return lambda folder: (ranks, [word.replace("RUN", str(folder)) for word in shlex.split(line)])


# --- dit --------------------------------------------------------------------------------------------------------------


def dit(preset: str) -> Road:
    def flags(files: Path) -> list[str]:
        depth = 7 if preset == "recipe_512" else 2  # at 7 tokens pass by a block in the middle
        small = f"--hidden-size 32 --num-layers {depth} --num-heads 2 --batch-size 4 --num-workers 1 --sample-steps 4"
        small += " --sample.steps 2 --eval-samples 4"
        words = [*small.split(), *FEW]
        if preset in ("small", "showcase"):
            return [*words, "--vae.codec-steps", "4", "--data.image-size", "32"]
        if preset == "small_cub":
            return [*words, "--data.image-size", "32"]
        words += ["--data.image-size", "64", "--vae.pretrained-model-name", str(encoders.picture_vae(files / "sd"))]
        if preset == "xl":
            classes = str(encoders.class_folders(files / "classes"))
            return [*words, "--dataset-path", classes, "--val-fraction", "0.25"]
        words += ["--text.pretrained-model-name", str(encoders.clip_text(files / "clip")), "--model.text-dim", "16"]
        if preset == "prx":  # whose own VAE has 16 channels, and whose text encoder is no CLIP
            words += "--text.type clip --model.in-channels 4 --model.text-len 77".split()
        if preset.startswith(("recipe", "jit", "prx")):
            return [*words, "--dataset-path", str(encoders.captioned(files / "captioned")), "--val-fraction", "0.25"]
        if preset == "large":
            return [*words, "--dataset-path", str(encoders.downloaded(files / "downloaded") / "coco")]
        epochs = [] if preset == "flow_256" else "--num-samples 8 --save-every-n-epochs 1".split()
        return [*words, "--dataset-path", "sample", *epochs]

    asked = "--labels 0 2" if preset == "xl" else "--prompt 'a red heart' 'a blue car'"
    after = {
        "generate": on_run(f"dit/generate.py --checkpoint RUN {asked} --steps 2 --output RUN/grid.png"),
        "metrics": on_run("dit/metrics.py --checkpoint RUN --metrics loss --output RUN/metrics.json"),
    }
    if preset == "xl":
        many = "dit/generate.py --checkpoint RUN --labels 0 2 --images-per-prompt 2 --steps 2 --output RUN/many"
        after["generate on 2 ranks"] = on_run(many, ranks=2)
    epochs = ("checkpoints/checkpoint-epoch-1",) if preset in ("default", "train_config") else ()
    return Road("dit", preset, flags, after=after, made=("samples/step_*.png", *epochs))


# --- float ------------------------------------------------------------------------------------------------------------

CLIPS = str(ROOT / "float" / "sample_data")
PICTURES = ["--set", "model.channels={4: 8, 8: 8, 16: 8, 32: 8}", *"--input-size 32 --dim-w 12 --dim-m 4".split()]


def float_autoencoder(preset: str) -> Road:
    def flags(files: Path) -> list[str]:
        return [*PICTURES, *"--batch-size 2 --num-workers 0 --data-root".split(), CLIPS, *FEW]

    return Road("float", preset, flags, script="train_autoencoder.py")


def float_motion(preset: str) -> Road:
    def flags(files: Path) -> list[str]:
        small = "--dim-h 32 --fmt-depth 1 --num-heads 2 --dim-a 16 --batch-size 4 --num-workers 1 --max-steps"
        small = [*PICTURES, *small.split(), str(STEPS), *FEW]
        if preset == "small":
            return small
        sound = ["--wav2vec-model-path", str(encoders.wav2vec(files / "wav2vec"))]
        sound += ["--audio2emotion-path", str(encoders.emotion(files / "emotion"))]
        return [*small, *sound, "--data-root", CLIPS]

    after = {
        "generate": on_run("float/generate.py --checkpoint RUN --nfe 2 --output RUN/talk.mp4"),
        "metrics": on_run("float/metrics.py --checkpoint RUN --seeds 15 --max-sounds 1 --output RUN/metrics.json"),
    }
    if preset == "small":  # its flow is whitened, for which the released layout has no place
        return Road("float", preset, flags, after=after)
    after["export"] = on_run("float/weights/released.py --checkpoint RUN --output RUN/float.pth")
    return Road("float", preset, flags, after=after, opened=(opening.plain_torch("float.pth"),))


# --- bagel ------------------------------------------------------------------------------------------------------------

SIZES = """model.language.hidden_size=32 model.language.intermediate_size=48 model.language.num_hidden_layers=2
model.language.num_attention_heads=4 model.language.num_key_value_heads=2 model.vision.hidden_size=32
model.vision.intermediate_size=32 model.vision.num_hidden_layers=1""".split()


def bagel_small(preset: str) -> list[str]:
    steps = ["model.autoencoder.steps=4", "model.vision_steps=4"] if preset == "small" else []
    sizes = [word for setting in (*SIZES, *steps) for word in ("--set", setting)]
    return [*sizes, *"--validation-records 8 --num-workers 1".split(), *FEW]


def bagel(preset: str, ranks: int = 1) -> Road:
    """The full-size presets start from a folder of released form: the export of a small run."""

    def flags(files: Path) -> list[str]:
        if preset.startswith("small"):
            return bagel_small(preset)
        sample = ROOT / "bagel" / "sample_data"
        data = ["--train-data-path", str(sample / "train.jsonl"), "--val-data-path", str(sample / "val.jsonl")]
        sizes = "--tokens-per-batch 600 --max-sequence-length 400 --validation-records 8 --num-workers 1"
        kinds = ("vae_image", "vit_image", *(("edit_vit_image",) if preset != "7b_nf4" else ()))
        sides = [f"data.{kind}.{name}" for kind in kinds for name in ("max_size=32", "min_size=16")]
        sides = [word for setting in sides for word in ("--set", setting)]
        return ["--model-path", str(released_bagel(files)), *data, *sizes.split(), *sides, *FEW]

    draw = (
        "bagel/generate.py --checkpoint RUN --prompt 'A red apple' --num-timesteps 3 --height 32 --output RUN/apple.png"
    )
    form = "peft" if preset in ("7b_lora", "7b_nf4") else "folder"
    after = {
        "generate": on_run(f"{draw} --output RUN/apple.png"),
        "metrics": on_run("bagel/metrics.py --checkpoint RUN --output RUN/metrics.json"),
        "export": on_run(f"bagel/weights/export.py --checkpoint RUN --form {form} --output RUN/exported"),
    }
    opened = (opening.peft_adapter("exported") if form == "peft" else opening.safetensors("exported"),)
    if preset.startswith("small"):
        opened += (opening.guide_file_of_bagel,)
    return Road("bagel", preset, flags, after=after, opened=opened, ranks=ranks)


def released_bagel(files: Path) -> Path:
    """A folder of released form, made once by a small run and its export."""
    folder = files / "bagel_released"
    if not folder.exists():
        output = files / "bagel_base"
        words = bagel_small("small_captions")
        run(1, "bagel/train.py", "--config", "small_captions", *words, "--output-dir", str(output))
        run(1, "bagel/weights/export.py", "--checkpoint", str(output), "--output", str(folder))
    return folder


# --- opens2v ----------------------------------------------------------------------------------------------------------


def opens2v(preset: str) -> Road:
    def flags(files: Path) -> list[str]:
        few = [*"--num-workers 1 --warmup-steps 0".split(), *FEW]
        if preset == "small":
            sizes = "--num-layers 1 --num-attention-heads 2 --attention-head-dim 16 --ffn-dim 32 --pixel-height 16"
            sizes += " --pixel-width 32 --ref-height 16 --ref-width 16 --text-dim 16 --text-rows 24"
            sizes += " --codec-steps 4 --base-steps 2"
            return [*sizes.split(), *"--base-batch-size 2 --batch-size 2".split(), *few]
        from opens2v.train import sample_paths

        folder = encoders.wan(files / "wan")
        sizes = [word for name, value in encoders.WAN.items() for word in (f"--{name.replace('_', '-')}", str(value))]
        paths = [word for name, value in sample_paths().items() for word in (f"--{name.replace('_', '-')}", value[0])]
        models = ["--generator-ckpt", str(folder), "--base-model-path", str(folder)]
        models += ["--image-encoder-path", str(folder / "image_encoder")]
        frames = "--num-training-frames 5 --pixel-height 32 --pixel-width 48 --ref-height 32 --ref-width 32"
        frames += " --text-rows 12 --batch-size 1 --val-batches 1"
        ranks = [] if preset == "default" else "--r 2 --lora-alpha 4".split()
        return [*sizes, *paths, *models, *frames.split(), *ranks, *few]

    has_lora = preset in ("40gb", "80gb", "140gb")
    measure = "opens2v/metrics.py --checkpoint RUN --windows 1 --seeds 1 --max-clips 2 --others 1 --steps 2"
    export = "opens2v/export.py --checkpoint RUN --what {0} --output RUN/{0}"
    after = {
        "generate": on_run("opens2v/generate.py --checkpoint RUN --steps 2 --output RUN/clip.mp4"),
        "metrics": on_run(f"{measure} --output RUN/metrics.json"),
        **{f"export {what}": on_run(export.format(what)) for what in ("references", "merged", "lora")[: 2 + has_lora]},
    }
    return Road("opens2v", preset, flags, after=after, opened=(opening.wan(has_lora),), made=("samples/*",))


# --- multimodal -------------------------------------------------------------------------------------------------------


def multimodal(preset: str) -> Road:
    """The smallest size of its table, at small pictures and sounds."""

    def flags(files: Path) -> list[str]:
        small = "--model-size mini --image-size 32 --image-patch 8 --embed-dim 32 --audio-frames 64 --num-workers 1"
        steps = f"--stage-epochs 1 1 1 --batch-size 4 --max-steps {STEPS} --save-steps 2 --logging-steps 1"
        words = [*small.split(), *steps.split(), *"--device cpu --eval-steps 2 --keep-last 2".split()]
        if preset == "small":
            return words
        if preset == "few_samples":
            words += ["--datasets", "coco", "clotho"]
        return [*words, "--data-root", str(encoders.downloaded(files / "downloaded"))]

    after = {
        "generate": on_run("multimodal/generate.py --checkpoint RUN --output RUN/sheet.png"),
        "metrics": on_run("multimodal/metrics.py --checkpoint RUN --output RUN/metrics.json"),
        "export": on_run("multimodal/weights/export.py --checkpoint RUN --form transformers --output RUN/exported"),
    }
    opened = (opening.transformers("exported"),)
    return Road("multimodal", preset, flags, place="stage3_finetune", after=after, opened=opened)


DIT = "small small_cub showcase default large flow_256 train_config xl recipe_256 recipe_512 jit_256 prx"
ROADS = [
    *(dit(preset) for preset in DIT.split()),
    *(float_autoencoder(preset) for preset in ("small", "default", "official")),
    *(float_motion(preset) for preset in ("small", "default", "large", "official")),
    *(bagel(preset) for preset in ("small", "small_captions", "7b", "7b_gen", "7b_lora", "7b_nf4")),
    *(bagel(preset, ranks=2) for preset in ("7b", "7b_gen")),  # which name fsdp
    *(opens2v(preset) for preset in ("small", "default", "40gb", "80gb", "140gb")),
    *(multimodal(preset) for preset in ("small", "few_samples", "default", "large")),
]
