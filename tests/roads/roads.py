"""Every shipped preset, shrunk in width, depth, resolution and steps, and every other switch left as it is."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from tests.launching import ROOT
from tests.roads import encoders

STEPS = 4
FEW = ["--total-steps", str(STEPS), "--save-steps", "1", "--logging-steps", "1", "--device", "cpu", "--keep-last", "2"]
Commands = Callable[[Path, Path], list[list[str]]]  # (folder of small files, the run's folder) -> command lines


@dataclass(frozen=True)
class Road:
    """One preset: how it trains when it is small, and what is done with the run."""

    system: str
    preset: str
    flags: Callable[[Path], list[str]]
    script: str = "train.py"
    place: str = "."  # where below the output folder the last checkpoints lie
    after: dict[str, Commands] = field(default_factory=dict)  # name -> commands on the finished run
    ranks: int = 1

    @property
    def name(self) -> str:
        """Such as `dit xl`."""
        kind = "" if self.script == "train.py" else f" {self.script.removesuffix('.py')}"
        return f"{self.system}{kind} {self.preset}"

    def train(self, files: Path, output: Path) -> list[str]:
        """The training command, without the interpreter."""
        config = ["--config", self.preset]
        return [f"{self.system}/{self.script}", *config, *self.flags(files), "--output-dir", str(output)]

    def plan(self) -> list[str]:
        """The dry run of the preset as it is shipped."""
        return [f"{self.system}/{self.script}", "--config", self.preset, "--dry-run"]


# --- dit --------------------------------------------------------------------------------------------------------------


def dit(preset: str) -> Road:
    def flags(files: Path) -> list[str]:
        small = [
            "--hidden-size",
            "32",
            "--num-layers",
            "7" if preset == "recipe_512" else "2",  # whose tokens pass by the blocks in the middle
            "--num-heads",
            "2",
            "--batch-size",
            "4",
            "--num-workers",
            "1",
        ]
        small += ["--eval-steps", "2", "--sample-steps", "4", "--sample.steps", "2", "--eval-samples", "4"]
        if preset in ("small", "showcase"):
            return [*small, "--vae.codec-steps", "4", "--data.image-size", "32", *FEW]
        if preset == "small_cub":
            return [*small, "--data.image-size", "32", *FEW]
        small += ["--data.image-size", "64", "--vae.pretrained-model-name", str(encoders.picture_vae(files / "sd"))]
        if preset == "xl":
            classes = str(encoders.class_folders(files / "classes"))
            return [*small, "--dataset-path", classes, "--val-fraction", "0.25", *FEW]
        text = ["--text.pretrained-model-name", str(encoders.clip_text(files / "clip")), "--model.text-dim", "16"]
        return [*small, *text, "--dataset-path", "sample", "--save-every-n-epochs", "1", *FEW]

    prompts = ["--labels", "0", "2"] if preset == "xl" else ["--prompt", "a red heart", "a blue car"]
    after: dict[str, Commands] = {
        "generate": lambda files, run: [
            ["dit/generate.py", "--checkpoint", str(run), *prompts, "--steps", "2", "--output", str(run / "grid.png")]
        ],
        "metrics": lambda files, run: [
            ["dit/metrics.py", "--checkpoint", str(run), "--metrics", "loss", "--output", str(run / "metrics.json")]
        ],
    }
    return Road("dit", preset, flags, after=after)


# --- float ------------------------------------------------------------------------------------------------------------

PICTURES = ["--input-size", "32", "--dim-w", "12", "--dim-m", "4"]


def float_autoencoder(preset: str) -> Road:
    def flags(files: Path) -> list[str]:
        small = [*PICTURES, "--set", "model.channels={4: 8, 8: 8, 16: 8, 32: 8}", "--batch-size", "2"]
        return [
            *small,
            "--num-workers",
            "0",
            "--data-root",
            str(ROOT / "float" / "sample_data"),
            "--eval-steps",
            "2",
            *FEW,
        ]

    return Road("float", preset, flags, script="train_autoencoder.py")


def float_motion(preset: str) -> Road:
    def flags(files: Path) -> list[str]:
        small = [
            *PICTURES,
            "--dim-h",
            "32",
            "--fmt-depth",
            "1",
            "--num-heads",
            "2",
            "--dim-a",
            "16",
            "--batch-size",
            "4",
        ]
        small += ["--set", "model.channels={4: 8, 8: 8, 16: 8, 32: 8}", "--eval-steps", "2", "--max-steps", str(STEPS)]
        small += ["--num-workers", "1", *FEW]
        if preset == "small":
            return small
        sound = ["--wav2vec-model-path", str(encoders.wav2vec(files / "wav2vec"))]
        sound += ["--audio2emotion-path", str(encoders.emotion(files / "emotion"))]
        return [*small, *sound, "--data-root", str(ROOT / "float" / "sample_data")]

    after: dict[str, Commands] = {
        "generate": lambda files, run: [
            ["float/generate.py", "--checkpoint", str(run), "--nfe", "2", "--output", str(run / "talk.mp4")]
        ],
        "export": lambda files, run: [
            ["float/weights/released.py", "--checkpoint", str(run), "--output", str(run / "float.pth")]
        ],
    }
    return Road("float", preset, flags, after=after)


# --- bagel ------------------------------------------------------------------------------------------------------------

LANGUAGE = [
    f"model.language.{name}"
    for name in (
        "hidden_size=32",
        "intermediate_size=48",
        "num_hidden_layers=2",
        "num_attention_heads=4",
        "num_key_value_heads=2",
    )
]
VISION = [f"model.vision.{name}" for name in ("hidden_size=32", "intermediate_size=32", "num_hidden_layers=1")]


def bagel_small(files: Path) -> list[str]:
    sizes = [word for setting in (*LANGUAGE, *VISION) for word in ("--set", setting)]
    return [*sizes, "--sample-records", "2", "--eval-steps", "2", "--num-workers", "1", *FEW]


def bagel(preset: str) -> Road:
    """The full-size presets start from a folder of released form: the export of a small run."""

    def flags(files: Path) -> list[str]:
        if preset.startswith("small"):
            return bagel_small(files)
        sample = ROOT / "bagel" / "sample_data"
        data = ["--train-data-path", str(sample / "train.jsonl"), "--val-data-path", str(sample / "val.jsonl")]
        sizes = ["--tokens-per-batch", "600", "--max-sequence-length", "400", "--gradient-accumulation-steps", "1"]
        sizes += [
            word for kind in ("vae", "vit") for word in ("--set", f"data.{kind}_image={{max_size: 32, min_size: 16}}")
        ]
        flags = ["--model-path", str(released_bagel(files)), *data, *sizes, "--eval-steps", "2", "--num-workers", "1"]
        return [*flags, *(["--strategy", "none"] if preset in ("7b", "7b_gen") else []), *FEW]

    after: dict[str, Commands] = {
        "generate": lambda files, run: [
            [
                "bagel/generate.py",
                "--checkpoint",
                str(run),
                "--prompt",
                "A red apple",
                "--output",
                str(run / "apple.png"),
            ]
        ],
        "metrics": lambda files, run: [
            ["bagel/metrics.py", "--checkpoint", str(run), "--output", str(run / "metrics.json")]
        ],
        "export": lambda files, run: [
            ["bagel/weights/export.py", "--checkpoint", str(run), "--output", str(run / "exported")]
        ],
    }
    return Road("bagel", preset, flags, after=after)


def released_bagel(files: Path) -> Path:
    """A folder of released form, made once by a small run and its export."""
    from tests.launching import run

    folder = files / "bagel_released"
    if not folder.exists():
        output = files / "bagel_base"
        run(1, "bagel/train.py", "--config", "small", *bagel_small(files), "--output-dir", str(output))
        run(1, "bagel/weights/export.py", "--checkpoint", str(output), "--output", str(folder))
    return folder


# --- opens2v ----------------------------------------------------------------------------------------------------------

BLOCKS = ["--num-layers", "1", "--num-attention-heads", "2", "--attention-head-dim", "16", "--ffn-dim", "32"]
PIXELS = ["--pixel-height", "16", "--pixel-width", "32", "--ref-height", "16", "--ref-width", "16"]


def opens2v(preset: str) -> Road:
    def flags(files: Path) -> list[str]:
        few = ["--eval-steps", "2", "--num-workers", "1", "--warmup-steps", "0", *FEW]
        if preset == "small":
            sizes = [*BLOCKS, *PIXELS, "--text-dim", "16", "--text-rows", "24", "--base-steps", "2"]
            return [*sizes, "--base-batch-size", "2", "--batch-size", "2", *few]
        from opens2v.train import sample_paths

        folder = encoders.wan(files / "wan")
        sizes = [word for name, value in encoders.WAN.items() for word in (f"--{name.replace('_', '-')}", str(value))]
        paths = [word for name, value in sample_paths().items() for word in (f"--{name.replace('_', '-')}", value[0])]
        models = ["--generator-ckpt", str(folder), "--base-model-path", str(folder)]
        models += ["--image-encoder-path", str(folder / "image_encoder")]
        frames = ["--num-training-frames", "5", "--pixel-height", "32", "--pixel-width", "48"]
        frames += [
            "--ref-height",
            "32",
            "--ref-width",
            "32",
            "--text-rows",
            "12",
            "--batch-size",
            "1",
            "--val-batches",
            "1",
        ]
        ranks = [] if preset == "default" else ["--r", "2", "--lora-alpha", "4"]
        return [*sizes, *paths, *models, *frames, *ranks, *few]

    after: dict[str, Commands] = {
        "generate": lambda files, run: [
            ["opens2v/generate.py", "--checkpoint", str(run), "--steps", "2", "--output", str(run / "clip.mp4")]
        ],
        "export": lambda files, run: [
            ["opens2v/export.py", "--checkpoint", str(run), "--what", what, "--output", str(run / what)]
            for what in ("references", "merged")
        ],
    }
    return Road("opens2v", preset, flags, after=after)


# --- multimodal -------------------------------------------------------------------------------------------------------


def multimodal(preset: str) -> Road:
    """In a process where the size names stand for narrow towers (tests/multimodal/small.py)."""

    def flags(files: Path) -> list[str]:
        small = [
            "--model-size",
            "mini",
            "--image-size",
            "32",
            "--image-patch",
            "8",
            "--embed-dim",
            "32",
            "--audio-frames",
            "64",
        ]
        data = ["--datasets", "synthetic", "--synthetic-items", "64", "--label-set", "images", "--num-classes", "12"]
        steps = ["--stage-epochs", "1", "1", "1", "--batch-size", "8", "--max-steps", str(STEPS), "--num-workers", "1"]
        return [
            *small,
            *data,
            *steps,
            "--save-steps",
            "1",
            "--logging-steps",
            "1",
            "--device",
            "cpu",
            "--eval-steps",
            "2",
        ]

    after: dict[str, Commands] = {
        "generate": lambda files, run: [
            ["multimodal/generate.py", "--checkpoint", str(run), "--output", str(run / "sheet.png")]
        ],
        "metrics": lambda files, run: [
            ["multimodal/metrics.py", "--checkpoint", str(run), "--output", str(run / "metrics.json")]
        ],
    }
    return Road("multimodal", preset, flags, place="stage3_finetune", after=after)


ROADS = [
    *(
        dit(preset)
        for preset in (
            "small",
            "small_cub",
            "showcase",
            "default",
            "large",
            "flow_256",
            "train_config",
            "xl",
            "recipe_256",
            "recipe_512",
        )
    ),
    *(float_autoencoder(preset) for preset in ("small", "default", "official")),
    *(float_motion(preset) for preset in ("small", "default", "large", "official")),
    *(bagel(preset) for preset in ("small", "small_captions", "7b", "7b_gen", "7b_lora", "7b_nf4")),
    *(opens2v(preset) for preset in ("small", "default", "40gb", "80gb", "140gb")),
    *(multimodal(preset) for preset in ("small", "default", "large")),
]
