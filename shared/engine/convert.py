"""Checkpoints from the ranks' shards into one file of each kind, and back; nothing is held but one tensor.

  python -m shared.engine.convert OUT/checkpoints/step_00000500 --output FOLDER
  python -m shared.engine.convert OUT --output OUT/checkpoints/step_00000500_parts --shards 16
The result is a checkpoint like its source, of the same run and step: any number of ranks resumes from it, and every
reader of weights opens it. Its model.safetensors (ema.safetensors) is a file that any library reads.
"""

import argparse
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from torch import Tensor

from shared.engine.checkpoint import (
    SHARDS,
    TENSOR_FILES,
    Spec,
    StoredTensors,
    find_checkpoint,
    read_manifest,
    write_manifest,
    write_safetensors,
)
from shared.engine.strategy import rows_of
from shared.errors import UserError, check_output, command, own_folder


def convert(source: Path, output: Path, shards: int | None = None) -> None:
    """Write the checkpoint that `source` means anew, in so many shards, or in one file of each kind.

    UserError for an output that exists; CheckpointError for a damaged source.
    """
    if output.exists():
        raise UserError(f"--output {output} exists; name a new folder")
    folder = find_checkpoint(source)
    manifest = read_manifest(folder)
    kinds = {
        file.removesuffix(".safetensors"): StoredTensors(folder, file.removesuffix(".safetensors"))
        for file in TENSOR_FILES
    }
    with own_folder(output.parent, output.name) as place:
        new, files = place / "new", {}
        new.mkdir()
        for name in manifest["files"]:
            if name not in TENSOR_FILES and not name.startswith(f"{SHARDS}/"):
                (new / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(folder / name, new / name)
        for number in range(shards or 0):
            name = f"{SHARDS}/{number + 1:05d}-of-{shards:05d}.safetensors"
            parts = [part for kind, stored in kinds.items() for part in _rows(kind, stored, number, shards or 1)]
            files[name] = write_safetensors(new / name, [spec for spec, _ in parts], _read(kinds, parts))
        for kind, stored in kinds.items() if shards is None else ():
            specs: list[Spec] = [(name, tuple(stored[name].shape), stored[name].dtype) for name in stored.tensors]
            if specs:
                values = (stored[name][...] for name in stored.tensors)
                files[f"{kind}.safetensors"] = write_safetensors(new / f"{kind}.safetensors", specs, values)
        write_manifest(new, {name: value for name, value in manifest.items() if name not in ("files", "sha256")}, files)
        os.rename(new, output)


def _rows(kind: str, stored: StoredTensors, place: int, places: int) -> list[tuple[Spec, tuple[str, str]]]:
    """What one shard holds of a kind: its specs, and where each comes from."""
    found: list[tuple[Spec, tuple[str, str]]] = []
    for name, tensor in stored.tensors.items():
        start, stop = rows_of(tuple(tensor.shape), place, places)
        if start < stop:
            shape = (stop - start, *tensor.shape[1:]) if tensor.shape else ()
            found.append(((f"{kind}.{name}", shape, tensor.dtype, start), (kind, name)))
    return found


def _read(kinds: dict[str, StoredTensors], parts: list[tuple[Spec, tuple[str, str]]]) -> Iterator[Tensor]:
    for (_, shape, _, *first), (kind, name) in parts:
        yield kinds[kind][name][first[0] : first[0] + shape[0]] if shape else kinds[kind][name][...]


@command
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="a run folder (its newest checkpoint) or one of its checkpoints")
    parser.add_argument("--output", type=Path, required=True, help="new folder")
    parser.add_argument("--shards", type=int, help="files to cut it into; left out: one file of each kind")
    options = parser.parse_args(argv)
    if options.shards is not None and not 1 <= options.shards < 100_000:
        raise UserError(f"--shards {options.shards}: give a number of files, from 1 up to 99999")
    check_output(options.output, folder=True)
    convert(options.checkpoint, options.output, options.shards)
    print(f"written: {options.output}")


if __name__ == "__main__":
    main()
