"""One checkpoint format for every system, strategy and number of ranks.

A checkpoint is a folder: model.safetensors (trainable weights and buffers), ema.safetensors, optimizer.safetensors,
trainer.json, config.yaml, and manifest.json (sizes and SHA-256 of all files), written last. It is written beside its
place and renamed into it, so what is visible is complete; what was damaged later is told apart by its hashes.
"""

import functools
import hashlib
import json
import os
import shutil
import struct
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from shared.config import read_yaml
from shared.engine.dist import DistInfo, from_main, raise_together
from shared.errors import CheckpointError, UserError, write_text

FORMAT = 1


class CheckpointStore:
    """The checkpoints of one run, in `root`."""

    def __init__(self, root: Path, info: DistInfo, *, keep_last: int = 2, keep_every: int | None = None):
        self.root, self.info, self.keep_last, self.keep_every = Path(root), info, keep_last, keep_every
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future | None = None
        self._copied: dict[str, list[Tensor]] = {}  # kept from save to save: fresh memory costs more than the copying

    def save(
        self,
        name: str,
        *,
        step: int,
        trainer: dict,
        tensors: dict[str, tuple[list, Iterable[Tensor]]],
        meta: dict,
        extra: Callable[[Path], None] | None = None,
        best: str | None = None,
        background: bool = False,
    ) -> Path:
        """Write one checkpoint; all ranks call it. Any rank's error is raised on all, and nothing half-written stays.

        tensors: file name -> (specs [(name, shape, dtype)], values in that order); drawing a value may be a collective.
        extra(folder): rank 0 writes further files. best: the best checkpoint so far, which is kept.
        background: copy the values now (into memory that rank 0 keeps for all of them) and write in a thread; an error
        comes up in the next save() or wait().
        """
        self.wait()
        final = self.root / name
        if from_main(final.exists() and _is_valid(final)):
            return final
        drawn = {file: (specs, iter(values)) for file, (specs, values) in tensors.items()}
        error: Exception | None = None
        if background:
            drawn = {file: (specs, iter(self._copies(file, values))) for file, (specs, values) in drawn.items()}
        if self.info.is_main:
            job = functools.partial(self._write, final, step, trainer, drawn, meta, extra, best)
            if background:
                self._pending = self._writer.submit(_attempt, job)
                return final
            error = _attempt(job)
        for _, values in drawn.values():  # gathering is a collective: every rank draws all, written or not
            for _ in values:
                pass
        if not background:
            raise_together(error)
        return final

    def wait(self) -> None:
        """Let a save in the background end; a collective. Raises its error on all ranks."""
        error = None if self._pending is None else self._pending.result()
        self._pending = None
        raise_together(error)

    def _copies(self, file: str, values: Iterator[Tensor]) -> list[Tensor]:
        """Rank 0's own copies of the values, safe from the next optimizer step."""
        if not self.info.is_main:
            for _ in values:
                pass
            return []
        before, copies = iter(self._copied.get(file, [])), []
        for value in values:
            place = next(before, None)
            if place is None or (place.shape, place.dtype) != (value.shape, value.dtype):
                place = torch.empty_like(value, device="cpu")
            copies.append(place.copy_(value.detach()))
        self._copied[file] = copies
        return copies

    def _write(
        self, final: Path, step: int, trainer: dict, drawn: dict, meta: dict, extra: Callable | None, best: str | None
    ) -> None:
        """Rank 0: everything from the temporary folder to the removal of older checkpoints."""
        temporary = self.root / f".tmp-{final.name}-{os.getpid()}"
        try:
            self._make_room(temporary)
            files = {file: write_safetensors(temporary / file, *parts) for file, parts in drawn.items()}
            self._write_rest(temporary, trainer, meta, step, extra, files)
            self._commit(temporary, final)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        self._point(final.name, best)
        self._prune(best)

    def _make_room(self, temporary: Path) -> None:
        self.root.mkdir(parents=True, exist_ok=True)
        for left in self.root.glob(".*"):  # of a run that was killed while it wrote
            if left.is_dir():
                shutil.rmtree(left, ignore_errors=True)
            else:
                left.unlink(missing_ok=True)
        temporary.mkdir()

    def _write_rest(
        self, folder: Path, trainer: dict, meta: dict, step: int, extra: Callable | None, files: dict
    ) -> None:
        write_text(folder / "trainer.json", json.dumps(trainer, indent=1), sync=True)
        if extra is not None:
            extra(folder)
        for path in sorted(folder.rglob("*")):
            if path.is_file() and path.name not in files:
                files[str(path.relative_to(folder))] = _describe(path)
        manifest = {"format": FORMAT, "step": step, **meta, "files": files}
        manifest["sha256"] = _digest(manifest)
        write_text(folder / "manifest.json", json.dumps(manifest, indent=1), sync=True)

    def _commit(self, temporary: Path, final: Path) -> None:
        damaged = self.root / f".tmp-damaged-{final.name}-{os.getpid()}"
        if final.exists():  # found damaged above
            final.rename(damaged)
        _sync_folder(temporary)
        os.rename(temporary, final)
        _sync_folder(self.root)
        shutil.rmtree(damaged, ignore_errors=True)

    def _point(self, name: str, best: str | None) -> None:
        for mark, target in (("latest", name), ("best", best)):
            if target is not None:
                write_text(self.root / mark, target + "\n", sync=True)

    def _prune(self, best: str | None) -> None:
        found = self.listed()
        keep = {path for _, path in found[: self.keep_last]}
        for step, path in found:
            if path in keep or path.name == best or (self.keep_every and step % self.keep_every == 0):
                continue
            trash = self.root / f".tmp-del-{path.name}"
            path.rename(trash)
            shutil.rmtree(trash, ignore_errors=True)

    def listed(self) -> list[tuple[int, Path]]:
        """(step, folder) of every checkpoint that has a readable manifest, newest first; contents are not checked."""
        found = []
        for path in self.root.glob("*/manifest.json") if self.root.exists() else ():
            if not path.parent.name.startswith("."):
                try:
                    found.append((int(json.loads(path.read_text())["step"]), path.parent))
                except (ValueError, KeyError, TypeError, OSError):
                    continue
        return sorted(found, reverse=True, key=lambda item: (item[0], item[1].name))

    def newest_valid(self) -> tuple[Path | None, list[str]]:
        """The newest checkpoint whose files all have the right hash, and sentences on the others; rank 0 decides."""
        return from_main(self.look() if self.info.is_main else None)

    def look(self) -> tuple[Path | None, list[str]]:
        """newest_valid() of this process alone."""
        readable = self.listed()
        folders = sorted(path for path in self.root.iterdir() if path.is_dir()) if self.root.is_dir() else []
        known = {path for _, path in readable}
        passed_over = [
            f"{path}: manifest.json is missing or unreadable"
            for path in folders
            if path not in known and not path.name.startswith(".")
        ]
        for _, path in readable:
            try:
                verify(path)
            except CheckpointError as error:
                passed_over.append(str(error))
            else:
                return path, passed_over
        return None, passed_over


def verify(path: Path) -> dict:
    """The manifest of a checkpoint whose files agree with it in size and hash; CheckpointError names what differs."""
    try:
        manifest = json.loads((path / "manifest.json").read_text())
        claimed = manifest.pop("sha256")
        files = dict(manifest["files"])
    except (OSError, ValueError, KeyError, TypeError):
        raise CheckpointError(f"{path}: manifest.json is missing or unreadable; use another checkpoint") from None
    if _digest(manifest) != claimed:
        raise CheckpointError(f"{path}: manifest.json was changed after it was written; use another checkpoint")
    if manifest.get("format") != FORMAT:
        raise CheckpointError(f"{path}: checkpoint format {manifest.get('format')}, this code reads {FORMAT}")
    for name, expected in files.items():
        try:
            found = (path / name).stat().st_size
        except OSError:
            raise CheckpointError(f"{path}: {name} is missing; use another checkpoint") from None
        if found != expected["bytes"]:
            raise CheckpointError(
                f"{path}: {name} has {found} bytes, {expected['bytes']} were written; use another checkpoint"
            )
        if _describe(path / name)["sha256"] != expected["sha256"]:
            raise CheckpointError(f"{path}: {name} is damaged (its SHA-256 differs); use another checkpoint")
    return manifest


# --- reading weights --------------------------------------------------------------------------------------------------


def newest_checkpoint(output_dir: Path) -> Path | None:
    """The newest complete, undamaged checkpoint of a run folder."""
    return CheckpointStore(Path(output_dir) / "checkpoints", DistInfo()).look()[0]


def open_run(path: Path | str, say: Callable[[str], None] | None = None) -> Path:
    """The checkpoint of a finished or running run that a user means by OUT, OUT/NAME or OUT/checkpoints/NAME.

    The one rule, for all systems: of a run folder the newest checkpoint that is whole; of a run that stops early by its
    validation (early_stopping_patience) the best one. One line says which, and names newer ones that are damaged; it
    goes to `say`, by default rank 0's console. CheckpointError where there is none, and where the one named is damaged:
    that is never replaced by another.
    """
    folder, why = _choose(Path(path))
    (say or _print_once)(f"checkpoint: {folder} ({why})")
    return folder


def find_checkpoint(path: Path | str) -> Path:
    """open_run() without a word."""
    return _choose(Path(path))[0]


def _choose(path: Path) -> tuple[Path, str]:
    for folder in (path, path.parent / "checkpoints" / path.name):
        if (folder / "manifest.json").exists():
            return folder, f"step {verify(folder)['step']}, as named"
    passed_over: list[str] = []
    if (path / "checkpoints").is_dir():
        newest, passed_over = CheckpointStore(path / "checkpoints", DistInfo()).look()
        best = _best_of_early_stopping(path) if newest is not None else None
        if best is not None:
            return best, f"step {verify(best)['step']}, the best by validation; {newest} is the newest"
        if newest is not None:
            step = json.loads((newest / "manifest.json").read_text())["step"]
            newer = f"; passed over {'; passed over '.join(passed_over)}" if passed_over else ""
            return newest, f"step {step}, the newest{newer}"
    found = sorted(item.parent.name for item in path.parent.glob("*/manifest.json")) if path.parent.is_dir() else []
    raise CheckpointError(
        f"{path}: {'holds no complete checkpoint' if path.exists() else 'no such checkpoint'}"
        f"{''.join(f'; passed over {sentence}' for sentence in passed_over)}; "
        f"give a run folder or one of its checkpoints{f' ({found})' if found else ''}"
    )


def _best_of_early_stopping(output_dir: Path) -> Path | None:
    try:
        settings = read_yaml(output_dir / "config.yaml")
        patience = settings["training"]["early_stopping_patience"]
        best = output_dir / "checkpoints" / (output_dir / "checkpoints" / "best").read_text().strip()
        verify(best)
    except (OSError, KeyError, TypeError, ValueError, UserError):
        return None
    return None if patience is None else best


def _print_once(text: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        print(text, flush=True)


def load_weights(path: Path | str, *, prefer_ema: bool = True) -> dict[str, Tensor]:
    """Weights by name, from a run folder, a checkpoint folder, a .safetensors or a .pt/.pth file (weights_only).

    Of a checkpoint the averaged weights are taken where there are some, over the trained ones and the buffers.
    """
    path = Path(path)
    if path.is_file():
        return _load_file(path)
    folder = find_checkpoint(path)
    weights = load_file(folder / "model.safetensors")
    if prefer_ema and (folder / "ema.safetensors").exists():
        weights.update(load_file(folder / "ema.safetensors"))
    return weights


def _load_file(path: Path) -> dict[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the readers raise many kinds; all mean the same to a user
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{path}: cannot be read as weights ({reason}); download or copy it again") from None
    for key in ("ema", "model_state_dict", "generator_ema", "generator", "model", "state_dict"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
            break
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise CheckpointError(f"{path}: holds no dict of tensors")
    return state


def load_strict(module: nn.Module, state: dict[str, Tensor], *, what: str, allow_missing: Iterable[str] = ()) -> None:
    """Load a state dict whose names and shapes must all fit.

    what: the file, for the message. allow_missing: name prefixes that may be absent. UserError lists what is missing,
    unexpected or of another shape.
    """
    own = module.state_dict()
    missing = [name for name in own if name not in state and not name.startswith(tuple(allow_missing))]
    unexpected = [name for name in state if name not in own]
    shapes = [
        f"{name} {tuple(state[name].shape)} instead of {tuple(own[name].shape)}"
        for name in own
        if name in state and state[name].shape != own[name].shape
    ]
    faults = [
        f"{len(names)} {kind}: {', '.join(names[:5])}{', ...' if len(names) > 5 else ''}"
        for kind, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", shapes))
        if names
    ]
    if faults:
        raise UserError(f"{what} does not fit this model ({'; '.join(faults)}); check the preset and the file")
    module.load_state_dict(state, strict=False)


# --- small parts ------------------------------------------------------------------------------------------------------


def persistent_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Buffers that belong to the state dict, by name."""
    found = {}
    for prefix, module in model.named_modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set:
                found[f"{prefix}.{name}" if prefix else name] = buffer
    return found


def frozen_digest(model: nn.Module) -> str | None:
    """SHA-256 over names, dtypes and bytes of the frozen parameters; None where there are none."""
    digest, any_frozen = hashlib.sha256(), False
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad and parameter.device.type != "meta":
            any_frozen = True
            digest.update(f"{name} {parameter.dtype} {tuple(parameter.shape)}".encode())
            digest.update(parameter.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest() if any_frozen else None


def _attempt(action: Callable[[], Any]) -> Exception | None:
    try:
        action()
    except Exception as error:  # handed to raise_together, which raises it on all ranks
        return error
    return None


def _is_valid(path: Path) -> bool:
    try:
        verify(path)
    except CheckpointError:
        return False
    return True


def _describe(path: Path) -> dict:
    with open(path, "rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _digest(manifest: dict) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _sync_folder(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# safetensors files written tensor by tensor, with their hash, and read tensor by tensor.


_NAMES = {
    torch.float32: "F32",
    torch.float64: "F64",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def write_safetensors(path: Path, specs: list[tuple[str, tuple, torch.dtype]], values: Iterator[Tensor]) -> dict:
    """Write tensors one at a time (only one in memory), hashing on the way. Returns {"bytes", "sha256"}."""
    header, offset = {}, 0
    for name, shape, dtype in specs:
        size = torch.Size(shape).numel() * dtype.itemsize
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps({**header, "__metadata__": {"format": "pt"}}).encode()
    text += b" " * (-len(text) % 8)
    digest, written = hashlib.sha256(), 0
    with open(path, "wb") as file:
        for block in _blocks(struct.pack("<Q", len(text)) + text, specs, values):
            file.write(block)
            digest.update(block)
            written += len(block)
        file.flush()
        os.fsync(file.fileno())
    return {"bytes": written, "sha256": digest.hexdigest()}


def _blocks(start: bytes, specs: list, values: Iterator[Tensor]) -> Iterator[Any]:
    yield start
    for (name, shape, dtype), value in zip(specs, values, strict=True):
        assert tuple(value.shape) == tuple(shape), f"{name}: {tuple(value.shape)} is not {tuple(shape)}"
        flat = value.detach().to("cpu", dtype).contiguous().flatten()
        yield flat.view(torch.uint8).numpy().data if flat.numel() else b""


class TensorFile:
    """Tensors of a safetensors file by name, read when asked for."""

    def __init__(self, path: Path):
        try:
            self.file = safetensors.safe_open(str(path), "pt")
        except (OSError, safetensors.SafetensorError) as error:
            raise CheckpointError(f"{path}: not a readable safetensors file ({error})") from None
        self.names = set(self.file.keys())

    def __getitem__(self, name: str) -> Tensor:
        return self.file.get_tensor(name)
