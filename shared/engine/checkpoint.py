"""One checkpoint format for every system, strategy and number of ranks.

A checkpoint is a folder: model.safetensors (trainable weights and buffers), ema.safetensors, optimizer.safetensors,
trainer.json, config.yaml, and manifest.json (sizes and SHA-256 of all files), written last. Saving is atomic: a
temporary folder next to its place is renamed into it, so what is visible is complete; what was damaged later is
detected by its hashes.

Large ones hold shards/00001-of-00004.safetensors and so on in place of the three: each rank's rows of all tensors,
named model.NAME, ema.NAME, optimizer.NAME.exp_avg. That is the sharded layout of torch.distributed.checkpoint, whose
HuggingFaceStorageReader loads it. Its writer is not used: it holds each file a second time in memory and hashes
nothing, and its other format needs pickle.
"""

import contextlib
import functools
import hashlib
import itertools
import json
import os
import pickle
import shutil
import struct
import time
import uuid
import zipfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from shared.config import read_yaml
from shared.engine.dist import (
    DistInfo,
    background_thread,
    from_main,
    gather_objects,
    new_gloo_group,
    raise_together,
)
from shared.errors import CheckpointError, UserError, reason_of, remove_parts, sync_file, write_text

FORMAT = 1
TENSOR_FILES = ("model.safetensors", "ema.safetensors", "optimizer.safetensors")
SHARDS = "shards"  # the folder of the ranks' own files
Spec = tuple[str, tuple, torch.dtype] | tuple[str, tuple, torch.dtype, int]  # name, shape, dtype, in a shard: first row
OLD = ".tmp-old-"  # a checkpoint that is being replaced: its name and the process follow


class CheckpointStore:
    """The checkpoint manager: the checkpoints of one run, in `root`, all of one trajectory.

    identity, in every manifest as "run": the trajectory's id, and its parent where it began at another checkpoint.
    """

    def __init__(self, root: Path, info: DistInfo, *, keep_last: int | None = 2, keep_every: int | None = None):
        self.root, self.info, self.keep_last, self.keep_every = Path(root), info, keep_last, keep_every
        self.identity = new_identity()
        self._writer = background_thread("checkpoint")
        self._pending: Future | None = None
        self._group: Any = None  # on which the writing threads of all ranks agree
        self._copied: dict[str, list[Tensor]] = {}  # kept from save to save: fresh memory costs more than the copying
        self._verified: dict[Path, tuple] = {}  # checkpoints written or hashed by this process, as they were then

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
        sharded: bool = False,
    ) -> Path:
        """Write one checkpoint; all ranks call it. Any rank's error is raised on all, and nothing half-written stays.

        tensors: file name -> (specs [(name, shape, dtype)], values in that order); drawing a value may be a collective.
        sharded: every rank writes its own `tensors`; else rank 0 alone. extra(folder): rank 0 writes further files.
        best: the best checkpoint so far, which is kept. background: copy the values now (into memory that a writing
        rank keeps for all of them) and write in a thread; an error comes up in the next save() or wait(). A checkpoint
        of that name and step that this trajectory wrote stays.
        """
        self.wait()
        final = self.root / name
        if from_main(self.info.is_main and self._is_own(final, step)):
            return final
        drawn = {file: (specs, iter(values)) for file, (specs, values) in tensors.items()}
        writes, error = sharded or self.info.is_main, None
        if background:
            drawn = {file: (specs, iter(self._copies(file, values, writes))) for file, (specs, values) in drawn.items()}
        elif sharded:  # all collectives before the first write: a rank whose disk is full leaves none waiting
            drawn = {file: (specs, iter(list(values))) for file, (specs, values) in drawn.items()}
        if sharded and self._group is None:
            self._group = new_gloo_group()
        if writes:
            job = functools.partial(self._write, final, step, trainer, drawn, meta, extra, best, sharded)
            if background:
                self._pending = self._writer.submit(attempt, job)
                return final
            error = attempt(job)
        for _, values in drawn.values():  # gathering is a collective: every rank draws all, written or not
            for _ in values:
                pass
        if not background:
            raise_together(error)
        return final

    def rewrite(
        self, folder: Path, *, trainer: dict, extra: Callable[[Path], None] | None = None, best: str | None = None
    ) -> None:
        """Give the newest checkpoint another trainer.json, and with `extra` other further files; a collective.

        Its tensors are not written again (hard links). As for a new one, what is visible is always whole.
        """
        self.wait()
        error = None
        if self.info.is_main:
            error = attempt(functools.partial(self._rewrite, folder, trainer, extra, best))
        raise_together(error)

    def wait(self) -> None:
        """Let a save in the background end; a collective. Raises its error on all ranks."""
        error = None if self._pending is None else self._pending.result()
        self._pending = None
        raise_together(error)

    def _copies(self, file: str, values: Iterator[Tensor], keep: bool) -> list[Tensor]:
        """This rank's own copies of the values, safe from the next optimizer step; pinned, so that a GPU copies into
        them at its own pace.
        """
        if not keep:
            for _ in values:
                pass
            return []
        before, copies = iter(self._copied.get(file, [])), []
        for value in values:
            place = next(before, None)
            if place is None or (place.shape, place.dtype) != (value.shape, value.dtype):
                place = torch.empty(value.shape, dtype=value.dtype, pin_memory=value.is_cuda)
            copies.append(place.copy_(value.detach(), non_blocking=True))
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self._copied[file] = copies
        return copies

    # --- writing ------------------------------------------------------------------------------------------------------

    def _is_own(self, final: Path, step: int) -> bool:
        try:
            manifest = read_manifest(final)
        except CheckpointError:
            return False
        return manifest["step"] == step and manifest.get("run") == self.identity and self.is_whole(final)

    def _write(
        self,
        final: Path,
        step: int,
        trainer: dict,
        drawn: dict,
        meta: dict,
        extra: Callable | None,
        best: str | None,
        sharded: bool,
    ) -> None:
        """Everything from the temporary folder to the removal of older checkpoints; of a sharded one, on every rank."""
        with self._shared_temporary(final) if sharded else self._temporary(final) as temporary:
            files: dict[str, dict] = {}

            def write() -> None:
                for file, parts in drawn.items():
                    files[file] = write_safetensors(temporary / file, *parts)

            if sharded:
                raise_together(attempt(write), self._group)
                for others in gather_objects(files, self._group):
                    files |= others
                if not self.info.is_main:
                    return
            else:
                write()
            self._write_rest(temporary, trainer, meta, step, extra, files)
            self._commit(temporary, final)
        self.point(final.name, best)
        self._prune(best)

    def _rewrite(self, final: Path, trainer: dict, extra: Callable | None, best: str | None) -> None:
        manifest = read_manifest(final)
        files = {name: entry for name, entry in manifest["files"].items() if name != "trainer.json"}
        if extra is not None:
            files = {name: entry for name, entry in files.items() if name in TENSOR_FILES or _is_shard(name)}
        meta = {name: value for name, value in manifest.items() if name not in ("format", "step", "files", "sha256")}
        with self._temporary(final) as temporary:
            for name in files:
                (temporary / name).parent.mkdir(parents=True, exist_ok=True)
                _link(final / name, temporary / name)
            self._write_rest(temporary, trainer, meta, manifest["step"], extra, files)
            self._commit(temporary, final)
        self.point(final.name, best)

    @contextlib.contextmanager
    def _temporary(self, final: Path) -> Iterator[Path]:
        self.root.mkdir(parents=True, exist_ok=True)
        self.recover()
        temporary = self.root / f".tmp-{final.name}-{os.getpid()}"
        temporary.mkdir()
        try:
            yield temporary
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    @contextlib.contextmanager
    def _shared_temporary(self, final: Path) -> Iterator[Path]:
        """The same folder on all ranks, made and removed by rank 0."""
        with contextlib.ExitStack() as stack:
            made: list[Path] = []
            error = (
                attempt(lambda: made.append(stack.enter_context(self._temporary(final)))) if self.info.is_main else None
            )
            raise_together(error, self._group)
            temporary = next(path for path in gather_objects(made, self._group) if path)[0]
            if not temporary.is_dir():
                error = CheckpointError(
                    f"{self.root} is another folder on rank {self.info.rank} than on rank 0; a checkpoint in shards "
                    "needs an --output-dir that all nodes share"
                )
            raise_together(error, self._group)
            yield temporary

    def recover(self) -> None:
        """Finish or undo what a killed run of this folder was doing: called when no other writes in it."""
        for left in sorted(self.root.glob(".tmp-*")):
            name = left.name.removeprefix(OLD).rpartition("-")[0]
            if left.name.startswith(OLD) and not (self.root / name).exists():
                left.rename(self.root / name)  # killed between the two renames of a replacement
            else:
                _remove(left)
        remove_parts(self.root)

    def _write_rest(
        self, folder: Path, trainer: dict, meta: dict, step: int, extra: Callable | None, files: dict
    ) -> None:
        write_text(folder / "trainer.json", json.dumps(trainer, indent=1), sync=True)
        if extra is not None:
            extra(folder)
        write_manifest(folder, {"format": FORMAT, "step": step, **meta, "run": self.identity}, files)

    def _commit(self, temporary: Path, final: Path) -> None:
        old = self.root / f"{OLD}{final.name}-{os.getpid()}"
        _sync_folder(temporary)
        if os.path.lexists(final):  # damaged, of another trajectory, or written again
            final.rename(old)
        os.rename(temporary, final)
        _sync_folder(self.root)
        _remove(old)
        self._verified[final] = _signature(final)

    def point(self, latest: str | None, best: str | None) -> None:
        """Write the marks `latest` and `best`, which are for people: nothing is decided by them while training."""
        for mark, target in (("latest", latest), ("best", best)):
            if target is not None:
                write_text(self.root / mark, target + "\n", sync=True)

    def _prune(self, best: str | None) -> None:
        """Delete what is older than the `keep_last` newest whole checkpoints, but for the best one, those of keep_every
        and those marked "keep". A damaged one takes no place among them, so that the last whole one always stays.
        """
        if self.keep_last is None:
            return
        whole = 0
        for step, path in self.listed():
            if whole < self.keep_last:
                whole += self.is_whole(path)
                continue
            if path.name == best or (self.keep_every and step % self.keep_every == 0) or _is_kept(path):
                continue
            trash = self.root / f".tmp-del-{path.name}-{os.getpid()}"
            path.rename(trash)
            _remove(trash)

    def set_aside(self, reason: str, *, after: int | None = None) -> Path | None:
        """Move checkpoints out of the way, into a folder next to `root`: all, or those after a step and those that
        cannot be read. The log of their steps is copied there. None where there was nothing to move.
        """
        steps = {path: step for step, path in self.listed()}
        moved = [path for path in self.folders() if after is None or steps.get(path, after + 1) > after]
        if not moved:
            return None
        place = self.root.with_name(f"{self.root.name}.{reason}-{time.strftime('%Y%m%d-%H%M%S')}")
        for number in itertools.count(2):
            if not place.exists():
                break
            place = place.with_name(f"{place.name.partition('~')[0]}~{number}")
        place.mkdir()
        for path in moved:
            path.rename(place / path.name)
        for name in ("metrics.jsonl", "config.yaml"):
            with contextlib.suppress(OSError):
                shutil.copy2(self.root.parent / name, place / name)
        with contextlib.suppress(OSError):
            if not (self.root / (self.root / "best").read_text().strip()).exists():
                (self.root / "best").unlink()
        return place

    # --- reading ------------------------------------------------------------------------------------------------------

    def folders(self) -> list[Path]:
        """Every folder that looks like a checkpoint, readable or not; so does a link whose disk is not there."""
        found = self.root.iterdir() if self.root.is_dir() else ()
        return sorted(path for path in found if (path.is_dir() or path.is_symlink()) and not path.name.startswith("."))

    def listed(self) -> list[tuple[int, Path]]:
        """(step, folder) of every checkpoint that has a readable manifest, newest first; contents are not checked."""
        found = []
        for path in self.folders():
            with contextlib.suppress(CheckpointError):
                found.append((read_manifest(path)["step"], path))
        return sorted(found, reverse=True, key=lambda item: (item[0], item[1].name))

    def is_whole(self, path: Path) -> bool:
        """Whether all files have the right hash. What this process wrote or hashed is not hashed a second time, unless
        a file was touched.
        """
        with contextlib.suppress(OSError, CheckpointError):
            if self._verified.get(path) != _signature(path):
                verify(path)
                self._verified[path] = _signature(path)
            return True
        return False

    def hash_together(self) -> None:
        """Hash the newest checkpoint, every rank a part of its files, so that rank 0 need not do it alone while the
        others wait. What differs, or lies where not all ranks see it, is left to look().
        """
        listed = self.listed() if self.info.is_main else []
        newest = from_main(listed[0][1] if listed and self.info.world > 1 else None)
        if newest is None:
            return
        found: dict[str, dict] = {}
        with contextlib.suppress(OSError, CheckpointError):
            files = sorted(read_manifest(newest)["files"].items(), key=lambda item: -item[1]["bytes"])
            for name, _ in files[self.info.rank :: self.info.world]:
                found[name] = _describe(newest / name)
        every = {name: entry for part in gather_objects(found) for name, entry in part.items()}
        if self.info.is_main:
            with contextlib.suppress(OSError, CheckpointError):
                verify(newest, every)
                self._verified[newest] = _signature(newest)

    def newest_valid(self) -> tuple[Path | None, list[str]]:
        """The newest checkpoint whose files all have the right hash, and sentences on the others; rank 0 decides."""
        return from_main(self.look() if self.info.is_main else None)

    def look(self) -> tuple[Path | None, list[str]]:
        """newest_valid() of this process alone."""
        readable = self.listed()
        known = {path for _, path in readable}
        passed_over = [
            f"{path}: manifest.json is missing or unreadable" for path in self.folders() if path not in known
        ]
        for _, path in readable:
            if self.is_whole(path):
                return path, passed_over
            try:
                verify(path)
            except CheckpointError as error:
                passed_over.append(str(error))
            except OSError as error:  # a disk that cannot read it any more
                passed_over.append(f"{error.filename or path}: {error.strerror}")
        return None, passed_over


def _remove(path: Path) -> None:
    """Remove a folder or a link to one, as far as that goes."""
    with contextlib.suppress(OSError):
        path.unlink() if path.is_symlink() or not path.is_dir() else shutil.rmtree(path, ignore_errors=True)


def _is_shard(name: str) -> bool:
    return name.startswith(f"{SHARDS}/")


def new_identity(parent: str | None = None, settings: str | None = None) -> dict[str, str | None]:
    """A trajectory: its id; its parent, the SHA-256 of the manifest that it began at; the settings of its beginning."""
    return {"id": uuid.uuid4().hex[:16], "parent": parent, "settings": settings}


def read_manifest(folder: Path) -> dict:
    """The manifest of a checkpoint, its form checked; CheckpointError where it is missing or no manifest."""
    path = folder / "manifest.json"
    try:
        if not path.is_file():
            raise ValueError("no file")
        manifest = json.loads(path.read_text(encoding="utf-8"))
        step, files, digest = manifest["step"], manifest["files"], manifest["sha256"]
        sound = isinstance(step, int) and step >= 0 and isinstance(files, dict) and isinstance(digest, str)
        for name, entry in files.items():
            inside = not Path(name).is_absolute() and ".." not in Path(name).parts
            sound = sound and inside and isinstance(entry["bytes"], int) and isinstance(entry["sha256"], str)
        if not sound:
            raise ValueError("another form")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise CheckpointError(f"{folder}: manifest.json is missing or unreadable; use another checkpoint") from None
    return manifest


def write_manifest(folder: Path, manifest: dict, files: dict[str, dict]) -> None:
    """Complete a folder's checkpoint. files: those already described; what else lies there is hashed now."""
    for path in sorted(folder.rglob("*")):
        if path.is_file() and str(path.relative_to(folder)) not in files:
            files[str(path.relative_to(folder))] = _describe(path)
    manifest = {**manifest, "files": files}
    manifest["sha256"] = _digest(manifest)
    write_text(folder / "manifest.json", json.dumps(manifest, indent=1), sync=True)


def verify(path: Path, described: dict[str, dict] | None = None) -> dict:
    """The manifest of a checkpoint whose files agree with it in size and hash; CheckpointError names what differs.

    described: what was found of files that need not be read again.
    """
    manifest = read_manifest(path)
    claimed = manifest.pop("sha256")
    if _digest(manifest) != claimed:
        raise CheckpointError(f"{path}: manifest.json was changed after it was written; use another checkpoint")
    if manifest.get("format") != FORMAT:
        raise CheckpointError(f"{path}: checkpoint format {manifest.get('format')}, this code reads {FORMAT}")
    for name, expected in manifest["files"].items():
        if not (path / name).is_file():
            raise CheckpointError(f"{path}: {name} is missing; use another checkpoint")
        found = (path / name).stat().st_size
        if found != expected["bytes"]:
            raise CheckpointError(
                f"{path}: {name} has {found} bytes, {expected['bytes']} were written; use another checkpoint"
            )
        if ((described or {}).get(name) or _describe(path / name))["sha256"] != expected["sha256"]:
            raise CheckpointError(f"{path}: {name} is damaged (its SHA-256 differs); use another checkpoint")
    return manifest


def _is_kept(path: Path) -> bool:
    return bool(read_manifest(path).get("keep"))


def _signature(path: Path) -> tuple:
    """Changes when a file of the folder is written to."""
    found = [(item, item.stat()) for item in sorted(path.rglob("*"))]
    return tuple((str(item), stat.st_size, stat.st_mtime_ns, stat.st_ino) for item, stat in found)


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without hard links
        shutil.copyfile(source, target)


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


def find_checkpoint(path: Path | str, *, newest: bool = False) -> Path:
    """open_run() without a word. newest: of a run folder always the newest, as resuming wants it."""
    return _choose(Path(path), may_be_best=not newest)[0]


def _choose(path: Path, may_be_best: bool = True) -> tuple[Path, str]:
    for folder in (path, path.parent / "checkpoints" / path.name):
        if (folder / "manifest.json").exists():
            return folder, f"step {verify(folder)['step']}, as named"
    passed_over: list[str] = []
    if (path / "checkpoints").is_dir():
        newest, passed_over = CheckpointStore(path / "checkpoints", DistInfo()).look()
        best = _best_of_early_stopping(path) if newest is not None and may_be_best else None
        if best is not None:
            return best, f"step {verify(best)['step']}, the best by validation; {newest} is the newest"
        if newest is not None:
            step = read_manifest(newest)["step"]
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
    weights = load_tensors(folder, "model")
    return weights | load_tensors(folder, "ema") if prefer_ema else weights


def load_tensors(folder: Path, kind: str) -> dict[str, Tensor]:
    """All of a checkpoint's tensors of one kind, model, ema or optimizer, by name; empty where it has none."""
    stored = StoredTensors(folder, kind)
    return {name: stored[name][...] for name in stored.names}


def read_weights_file(path: Path) -> Any:
    """What a .safetensors or torch file holds, tensors and plain values; CheckpointError for a file that is neither."""
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        mapped = zipfile.is_zipfile(path)  # as load_file does: pages of the file, no copy; torch's old format cannot
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except OSError as error:
        if error.filename is not None:  # the file is not there, or is nobody's to read
            raise
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}); download or copy it again") from None
    except pickle.UnpicklingError:  # torch's own sentence advises to switch the protection off
        with open(path, "rb") as file:
            if file.read(2) not in (b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"):
                raise CheckpointError(
                    f"{path}: cannot be read as weights (neither a .safetensors nor a torch file); download it again"
                ) from None
        raise CheckpointError(
            f"{path}: holds Python objects besides tensors, which could run code and are not loaded; save its state "
            "dict alone, or use a .safetensors file"
        ) from None
    except Exception as error:  # the readers raise many kinds; all mean the same to a user
        reason = reason_of(error)
        raise CheckpointError(f"{path}: cannot be read as weights ({reason}); download or copy it again") from None


def _load_file(path: Path) -> dict[str, Tensor]:
    state = read_weights_file(path)
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


def sampled_digest(model: nn.Module) -> str:
    """SHA-256 over names, shapes and some thousand evenly spread numbers of each trainable parameter: equal first
    weights on all ranks are seen at once, whatever their size.
    """
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter.device.type != "meta":
            flat = parameter.detach().flatten()
            digest.update(f"{name} {parameter.dtype} {tuple(parameter.shape)}".encode())
            digest.update(flat[:: max(1, len(flat) // 4096)].cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def frozen_digest(model: nn.Module) -> str | None:
    """SHA-256 over names, dtypes and bytes of the frozen parameters; None where there are none. Of a sharded model a
    collective.
    """
    digest, any_frozen = hashlib.sha256(), False
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad and parameter.device.type != "meta":
            any_frozen = True
            value = parameter.detach()
            value = value.full_tensor() if isinstance(value, DTensor) else value
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            digest.update(value.cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest() if any_frozen else None


def attempt(action: Callable[[], Any]) -> Exception | None:
    """The error of an action, for raise_together()."""
    try:
        action()
    except Exception as error:  # handed to raise_together, which raises it on all ranks
        return error
    return None


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


def write_safetensors(path: Path, specs: list[Spec], values: Iterator[Tensor]) -> dict:
    """Write tensors one at a time (only one in memory), hashing on the way. Returns {"bytes", "sha256"}."""
    header, offset = {}, 0
    first_rows: dict[str, dict] = {}
    for name, shape, dtype, *first in specs:
        size = torch.Size(shape).numel() * dtype.itemsize
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
        if first:  # as torch.distributed.checkpoint notes where in the whole tensor a shard lies
            first_rows[name] = {"saved_offsets": [first[0], *[0] * (len(shape) - 1)] if shape else []}
    notes = {"DCP_SHARDING_INFO": json.dumps(first_rows), "DCP_VERSION": "1.0"} if first_rows else {}
    text = json.dumps({**header, "__metadata__": {"format": "pt", **notes}}).encode()
    text += b" " * (-len(text) % 8)
    digest, written = hashlib.sha256(), 0
    path.parent.mkdir(exist_ok=True)
    with open(path, "wb") as file:
        for block in _blocks(struct.pack("<Q", len(text)) + text, specs, values):
            file.write(block)
            digest.update(block)
            written += len(block)
        sync_file(file)
    return {"bytes": written, "sha256": digest.hexdigest()}


def _blocks(start: bytes, specs: list[Spec], values: Iterator[Tensor]) -> Iterator[Any]:
    yield start
    for (name, shape, dtype, *_), value in zip(specs, values, strict=True):
        assert tuple(value.shape) == tuple(shape), f"{name}: {tuple(value.shape)} is not {tuple(shape)}"
        flat = value.detach().to("cpu", dtype).contiguous().flatten()
        yield flat.view(torch.uint8).numpy().data if flat.numel() else b""


class Stored:
    """A tensor in files, read when it is sliced: [...] is all of it, [a:b] these rows alone."""

    def __init__(self, parts: list[tuple[int, Any]]):
        self.parts = sorted(parts, key=lambda part: part[0])  # (first row, slice of an open file)
        shape = self.parts[0][1].get_shape()
        self.ends = [first + (part.get_shape() or [1])[0] for first, part in self.parts]
        self.shape = torch.Size([self.ends[-1], *shape[1:]] if shape else [])
        self.dtype = next(dtype for dtype, name in _NAMES.items() if name == self.parts[0][1].get_dtype())
        self.whole = [first for first, _ in self.parts] == [0, *self.ends[:-1]]  # no row is missing or doubled

    def __getitem__(self, rows: Any) -> Tensor:
        if len(self.parts) == 1 and self.parts[0][0] == 0:
            return self.parts[0][1][rows]
        start, stop, _ = slice(None).indices(self.ends[-1]) if rows is ... else rows.indices(self.ends[-1])
        found = [
            part[max(start, first) - first : min(stop, end) - first]
            for (first, part), end in zip(self.parts, self.ends, strict=True)
            if first < stop and end > start
        ]
        return torch.cat(found) if found else self.parts[0][1][0:0]


class StoredTensors:
    """The tensors of safetensors files by name. Of a checkpoint's folder those of one kind (model, ema, optimizer), in
    one file or in shards; none where it has no such file.
    """

    def __init__(self, *paths: Path | str):
        place, kind = Path(paths[0]), ""
        files = [Path(path) for path in paths]
        if place.is_dir():
            kind = f"{paths[1]}."
            files = sorted((place / SHARDS).glob("*.safetensors"))
            if not files:
                files, kind = [path for path in [place / f"{paths[1]}.safetensors"] if path.is_file()], ""
        parts: dict[str, list] = {}
        for path in files:
            try:
                file = safetensors.safe_open(str(path), "pt")
                notes = json.loads((file.metadata() or {}).get("DCP_SHARDING_INFO", "{}"))
                for name in file.keys():
                    if name.startswith(kind):
                        first = (notes.get(name, {}).get("saved_offsets") or [0])[0]
                        parts.setdefault(name.removeprefix(kind), []).append((first, file.get_slice(name)))
            except (OSError, ValueError, safetensors.SafetensorError) as error:
                raise CheckpointError(f"{path}: not a readable safetensors file ({error})") from None
        self.tensors = {name: Stored(found) for name, found in parts.items()}
        self.names = set(self.tensors)
        for name, tensor in self.tensors.items():
            if not tensor.whole:
                raise CheckpointError(f"{place}: rows of {name} are missing or doubled in its shards; copy them again")

    def __getitem__(self, name: str) -> Stored:
        return self.tensors[name]
