"""The released float.pth: load it into our modules, or write a run in its layout.

  python float/weights/released.py --checkpoint outputs/float_official --output float.pth
The file is one flat dict of tensors: motion_autoencoder.*, audio_encoder.audio_projection.*, fmt.*. The weights are
not part of this repository; their licence forbids commercial use.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from shared.config import Section, load_config, setting
from shared.errors import UserError, check_output, command, written_aside

if TYPE_CHECKING:
    from torch import Tensor, nn

    from float.model import MotionGenerator
    from float.weights.open import Autoencoder

# encoders that come from their own model folders; the released loader passes over them too
FOREIGN = ("audio_encoder.wav2vec2.", "emotion_encoder.")


@dataclass
class NameReport:
    """Which names of a file did not fit."""

    loaded: int = 0
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    mismatched: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        parts = [f"{self.loaded} tensors loaded"]
        for name in ("missing", "unexpected", "mismatched"):
            names = getattr(self, name)
            if names:
                parts.append(f"{len(names)} {name}: {', '.join(names[:4])}{', ...' if len(names) > 4 else ''}")
        return "; ".join(parts)


def _parts(autoencoder: "Autoencoder", generator: "MotionGenerator") -> dict[str, "nn.Module"]:
    """Modules by the prefix of their names in the file."""
    return {
        "motion_autoencoder.": autoencoder,
        "audio_encoder.audio_projection.": generator.audio_encoder.audio_projection,
        "fmt.": generator.fmt,
    }


def load_released_checkpoint(path: str | Path, autoencoder: "Autoencoder", generator: "MotionGenerator") -> NameReport:
    """Copy the parameters of a released file into both modules. UserError when a parameter is missing or of another
    shape.

    Buffers are computed here and need not be in the file; unknown names are reported, not refused. A pos_embed of
    another window length is not copied: it is a fixed table.
    """
    from float.weights.open import read_weights

    state, report = read_weights(path), NameReport()
    own: dict[str, Tensor] = {}
    for prefix, module in _parts(autoencoder, generator).items():
        own |= {prefix + name: value.data for name, value in module.named_parameters()}
    for name, target in own.items():
        if name not in state:
            report.missing.append(name)
        elif state[name].shape != target.shape:
            if name != "fmt.pos_embed":
                report.mismatched.append(f"{name} {tuple(state[name].shape)} instead of {tuple(target.shape)}")
        else:
            target.copy_(state[name])
            report.loaded += 1
    computed = {
        prefix + name for prefix, module in _parts(autoencoder, generator).items() for name, _ in module.named_buffers()
    }
    report.unexpected = [
        name for name in state if name not in own and name not in computed and not name.startswith(FOREIGN)
    ]
    if report.missing or report.mismatched:
        raise UserError(f"{path} does not fit the model ({report}); use --config official for the released file")
    return report


def released_state(autoencoder: "Autoencoder", generator: "MotionGenerator") -> dict[str, "Tensor"]:
    """All parameters under their released names, CPU."""
    return {
        prefix + name: value.detach().cpu().contiguous()
        for prefix, module in _parts(autoencoder, generator).items()
        for name, value in module.named_parameters()
    }


def export_released_layout(path: str | Path, autoencoder: "Autoencoder", generator: "MotionGenerator") -> int:
    """Write both modules as one flat file that the released tool can read; returns the number of tensors."""
    import torch

    if len(generator.motion_mean) != generator.fmt.dim_w or bool(generator.motion_mean.any()):
        raise UserError("a run with whiten_motion has a flow space of its own, which the released layout cannot hold")
    if generator.fmt.p_embedder is not None:
        raise UserError("a run with pose_condition has a weight that the released layout does not know")
    path, state = Path(path), released_state(autoencoder, generator)
    with written_aside(path) as temporary:
        torch.save(state, temporary)
    return len(state)


class ExportOptions(Section):
    """What to write where."""

    checkpoint: str | None = setting(None, "run of float/train.py or one of its checkpoints")
    output: str = setting("float.pth", "file to write")


@command
def main(argv: list[str] | None = None) -> int:
    """Export a run."""
    options = load_config(ExportOptions, argv=argv, description=__doc__)
    if options.checkpoint is None:
        raise UserError("--checkpoint is missing; give the output folder of float/train.py")
    check_output(options.output)
    import torch

    from float.sampling.animate import load_run

    animator = load_run(options.checkpoint, torch.device("cpu"))
    count = export_released_layout(options.output, animator.autoencoder, animator.generator)
    print(f"{options.output}: {count} tensors in the released layout")
    return count


if __name__ == "__main__":
    main()
