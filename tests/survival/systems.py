"""The five systems as runs of seconds: the command of each, and where it leaves what is compared."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from shared.config import save_config
from tests.bagel.conftest import TINY as BAGEL
from tests.dit.small import tiny
from tests.multimodal.small import QUICK as MULTIMODAL
from tests.opens2v.cases import QUICK as OPENS2V

GLOBAL = 12  # samples (bagel: packs) of one optimizer step, two at a time on 1, 2 or 3 ranks
MICRO = 2
COMMON = ["--device", "cpu", "--precision", "fp32", "--logging-steps", "1", "--keep-last", "3"]
FLOAT = ["--config", "small", "--dim-h", "32", "--fmt-depth", "1", "--num-heads", "2", "--eval-steps", "1000"]
PICTURES = ["--input-size", "32", "--dim-w", "12", "--dim-m", "4", "--set", "model.channels={4: 8, 8: 8, 16: 8, 32: 8}"]


@dataclass(frozen=True)
class System:
    """A name, a script, its settings by (folder for files, ranks), and the folder of its checkpoints in a run's."""

    name: str
    script: str
    flags: Callable[[Path, int], list[str]]
    place: str = "."

    def arguments(self, files: Path, output: Path, world: int, steps: int, save: int) -> list[str]:
        """The whole command line behind the interpreter."""
        steps_and_saves = ["--total-steps", str(steps), "--save-steps", str(save), "--output-dir", str(output)]
        return [self.script, *self.flags(files, world), *COMMON, *steps_and_saves]


def batches(world: int) -> list[str]:
    """The same samples in every optimizer step, whatever the number of ranks."""
    return ["--batch-size", str(MICRO), "--global-batch-size", str(GLOBAL)]


def accumulation(world: int) -> list[str]:
    """The same, for a system whose batch is not counted in samples."""
    return ["--gradient-accumulation-steps", str(GLOBAL // MICRO // world)]


def dit(files: Path, world: int) -> list[str]:
    path = files / "dit.yaml"
    if not path.exists():
        save_config(tiny(training={"eval_steps": None, "sample_steps": None}), path)
    return ["--config", str(path), *batches(world)]


def float_sound(files: Path, world: int) -> list[str]:
    return [*FLOAT, "--synthetic", *batches(world)]


def float_pictures(files: Path, world: int) -> list[str]:
    return ["--config", "small", *PICTURES, "--eval-steps", "1000", *batches(world)]


def bagel(files: Path, world: int) -> list[str]:
    sizes = ["--tokens-per-batch", "400", "--max-sequence-length", "400", "--num-epochs", "9"]
    return [*BAGEL, *sizes, *accumulation(world)]


def opens2v(files: Path, world: int) -> list[str]:
    base = ["--base-steps", "4", "--base-batch-size", str(GLOBAL)]
    return [*OPENS2V, *base, "--warmup-steps", "0", "--no-visualize", *batches(world)]


def multimodal(files: Path, world: int) -> list[str]:
    batch = ["--batch-size", str(MICRO), "--grad-accum", str(GLOBAL // MICRO // world)]
    return [*MULTIMODAL, "--stages", "3", "--epochs", "99", *batch]


def float_whole(files: Path, world: int) -> list[str]:
    """Phase 1, the features of the sample clips, and phase 2 on them."""
    return [*FLOAT, *PICTURES, *batches(world), "--max-steps", "8"]


def multimodal_whole(files: Path, world: int) -> list[str]:
    """All three stages."""
    batch = ["--batch-size", str(MICRO), "--grad-accum", str(GLOBAL // MICRO // world)]
    return [*MULTIMODAL, *batch]


SYSTEMS = [
    System("dit", "dit/train.py", dit),
    System("float phase 1", "float/train_autoencoder.py", float_pictures),
    System("float phase 2", "float/train.py", float_sound),
    System("bagel", "bagel/train.py", bagel),
    System("opens2v", "opens2v/train.py", opens2v),
    System("multimodal", "tests/survival/multimodal.py", multimodal, place="stage3_finetune"),
    System("whole float", "float/train.py", float_whole),
    System("whole multimodal", "tests/survival/multimodal.py", multimodal_whole, place="stage3_finetune"),
]


def chosen(names: list[str] | None) -> list[System]:
    """The systems of these names, all of them without a list."""
    known = {system.name: system for system in SYSTEMS}
    if unknown := set(names or []) - known.keys():
        raise SystemExit(f"error: unknown systems {sorted(unknown)}; known: {list(known)}")
    return [known[name] for name in names] if names else SYSTEMS
