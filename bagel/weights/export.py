"""Hand a run's weights on: a folder of released form, one plain file, or adapters as PEFT stores them.

    python bagel/weights/export.py --checkpoint outputs/bagel --output exported
    python bagel/weights/export.py --checkpoint outputs/bagel --output exported --shard-gb 5
    python bagel/weights/export.py --checkpoint outputs/bagel --output trained_model.pt --form file --dtype fp32
    python bagel/weights/export.py --checkpoint outputs/bagel --output adapter --form peft

Adapters are merged into the full weights of the base, also when training kept those in 4 or 8 bits; --form peft leaves
them apart.
"""

import sys
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from typing import Literal

from shared.config import Section, load_config, setting
from shared.errors import UserError, command, written_aside


class Options(Section):
    """Command line."""

    checkpoint: str = setting(
        "outputs/bagel", "a run's output folder, one of its checkpoints, or a folder of released form", "model_path"
    )
    base: str | None = setting(None, "folder of the base weights of a run, if they have moved")
    output: str = setting("exported", "folder to write; a .pt file with --form file")
    form: Literal["folder", "file", "peft"] = setting(
        "folder", "folder: released form; file: one state_dict for torch.load; peft: the adapters alone"
    )
    dtype: Literal["bf16", "fp16", "fp32"] = setting("bf16", "type of the weights")
    shard_gb: float | None = setting(None, "cut the weights of a folder into files of this size, GB; null: one", gt=0)
    ema: bool = setting(True, "take the averaged weights where there are some")


@command
def main(argv: list[str] | None = None) -> None:
    """Open the run, write what is asked for, aside and renamed."""
    options = load_config(Options, argv=argv, description=__doc__)
    output = Path(options.output)
    if options.form == "file" and output.suffix != ".pt":
        raise UserError(f"--output {output}: --form file writes a .pt file; name one")
    if options.form != "file" and output.exists() and not (output.is_dir() and _is_ours(output)):
        raise UserError(f"--output {output} is there and was not written by this command; give another path")
    if options.shard_gb and options.form != "folder":
        raise UserError(f"--shard-gb belongs to --form folder, not to {options.form}; leave it out")
    import torch

    from bagel.modules.lora import adapters, save_peft
    from bagel.weights.open import open_model, tokenizer_files
    from bagel.weights.pretrained import export_folder

    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[options.dtype]
    opened = open_model(
        options.checkpoint,
        model_path=options.base,
        prefer_ema=options.ema,
        device="cpu",
        dtype=torch.float32 if dtype == torch.float32 else None,
        whole_base=options.form != "peft",
        merge=options.form != "peft",
    )
    if options.form == "peft":
        if not adapters(opened.model):
            raise UserError(f"--checkpoint {options.checkpoint} has no adapters; use --form folder or file")
        save_peft(output, opened.model, opened.model_config, dtype)
    elif options.form == "file":
        weights = {name: value.to(dtype).contiguous() for name, value in opened.model.state_dict().items()}
        with written_aside(output) as temporary:
            torch.save(weights, temporary)
    else:
        shard_bytes = round(options.shard_gb * 1e9) if options.shard_gb else None
        export_folder(
            output,
            opened.model_config,
            opened.model.state_dict(),
            opened.autoencoder,
            tokenizer_files(opened.model_config),
            dtype=dtype,
            shard_bytes=shard_bytes,
        )
    print(f"wrote {output}")


def _is_ours(folder: Path) -> bool:
    """Whether a folder is an export that may be written again, or empty."""
    return any((folder / name).is_file() for name in ("bagel_config.json", "adapter_config.json")) or not any(
        folder.iterdir()
    )


if __name__ == "__main__":
    main()
