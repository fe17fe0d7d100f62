"""What can be found wrong before anything is trained, encoded or fitted; and the lock of the output folder."""

import contextlib
import datetime
import difflib
import fcntl
import importlib.util
import os
import shutil
import socket
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from shared.config import accumulation_steps, flat_settings, foreign_settings, is_place, read_yaml
from shared.data import check_shared_memory
from shared.engine.checkpoint import attempt, find_checkpoint
from shared.engine.dist import DistInfo, StopFlag, raise_together, same_settings_on_all_ranks
from shared.engine.parallel import check_strategy
from shared.engine.recompute import check_float8
from shared.engine.state import code_digest, versions
from shared.engine.strategy import choose_precision
from shared.errors import UserError, at_end, check_output, in_command
from shared.media.folders import files_in

LEAST_FREE = 1_000_000  # bytes: with less not even the log of a run fits
WORKERS_PER_CORE = 16
LOCK = ".lock"
_held: dict[str, tuple[int, int]] = {}  # real path -> (open file, how often it is held)


def preflight(
    config: Any,
    info: DistInfo,
    *,
    phases: Collection[Any] = (),
    metrics: Collection[str] | None = None,
    folders: Mapping[str, str | Path | None] | None = None,
    checks_resume: bool = True,
) -> None:
    """Check all that can be checked before a run costs time; called right after init_distributed. Writes nothing but
    the lock of the output folder, which goes when the command ends.

    phases: settings of further phases. metrics: names that a validation gives, such as "val/loss". folders: setting ->
    folder in Hugging Face's form, or None. checks_resume: false where run.resume names another form of checkpoint,
    which the caller has looked at. UserError on all ranks for the first thing that is wrong.
    """
    StopFlag.start_clock()
    compare_ranks(config, info)
    raise_together(attempt(lambda: _check(config, info, [config, *phases], metrics, folders or {})))
    if checks_resume and config.run.resume not in ("auto", "none"):
        raise_together(attempt(lambda: _check_resume(Path(config.run.resume), config)))
    taking = info.is_main and in_command()  # elsewhere fit() holds it while it trains
    raise_together(attempt(lambda: at_end(_take(Path(config.run.output_dir)).close)) if taking else None)


def compare_ranks(config: Any, info: DistInfo) -> None:
    """Refuse ranks that started with other settings, code or libraries; places and devices may differ. A collective."""
    settings = {name: value for name, value in flat_settings(config).items() if not is_place(name)}
    try:
        taken = choose_precision(config.run.precision, info.device)
    except UserError as error:  # raised by _check, once all know that they were started alike
        taken = str(error)
    same_settings_on_all_ranks({**settings, "precision taken": taken, **versions(), "code": code_digest(config)})


def _check(
    config: Any, info: DistInfo, phases: list, metrics: Collection[str] | None, folders: Mapping[str, Any]
) -> None:
    run, training = config.run, config.training
    choose_precision(run.precision, info.device)
    check_strategy(run, info.world)
    for phase in phases:
        accumulation_steps(phase.training, info.world)
        _check_workers(phase.training.num_workers)
        check_shared_memory(phase.training.num_workers)
    if training.keep_products and not training.gradient_checkpointing:
        raise UserError("--keep-products says what --gradient-checkpointing keeps: give that too")
    if training.keep_products and training.compile:
        raise UserError("--keep-products looks into the blocks that --compile closes: give one of them")
    if training.float8:
        check_float8(choose_precision(run.precision, info.device), info.device, run.strategy, training.compile)
    if training.total_steps is None and training.num_epochs is None:
        raise UserError("neither total_steps nor num_epochs is set; give --total-steps N or --num-epochs N")
    _check_loggers(run)
    if metrics is not None and training.best_metric not in metrics:
        near = difflib.get_close_matches(training.best_metric, metrics, 1, 0.0)
        raise UserError(
            f"--best-metric {training.best_metric}: no validation gives it"
            f"{f'; did you mean {near[0]}?' if near else ''} ({', '.join(sorted(metrics))})"
        )
    for name, folder in folders.items():
        check_folder(name, folder)
    if info.is_main:
        _check_output(config)


def _check_workers(count: int) -> None:
    most = WORKERS_PER_CORE * max(4, os.cpu_count() or 1)
    if count > most:
        raise UserError(
            f"--num-workers {count}: this machine has {os.cpu_count()} cores; use at most {most}, best 2 to 8 a rank"
        )


def _check_loggers(run: Any) -> None:
    for flag, wanted, package in (("tensorboard", run.tensorboard, "tensorboard"), ("wandb", run.wandb, "wandb")):
        if wanted and importlib.util.find_spec(package) is None:
            raise UserError(f"--{flag} needs the package {package}: pip install {package}; or use --no-{flag}")


def _check_resume(path: Path, config: Any) -> None:
    """That there is a run of this system to resume from; its hashes are compared later, which may take minutes."""
    places = [place for place in (path, path.parent / "checkpoints" / path.name) if (place / "manifest.json").is_file()]
    places += [file.parent for below in ("", "*/") for file in path.glob(f"{below}checkpoints/*/manifest.json")]
    if not places:
        find_checkpoint(path, newest=True)  # says what is wrong
    elif other := _other_model(places[0], config):
        raise UserError(
            f"--resume {path}: the checkpoint {places[0]} is not of this system (its model has {other}); give a run "
            "that this command made, or --resume none"
        )


def _other_model(place: Path, config: Any) -> list[str]:
    """Some settings of the model of config.yaml in a folder where it is another system's; else none."""
    try:
        return foreign_settings(type(config), read_yaml(place / "config.yaml"))
    except (UserError, OSError):
        return []  # an earlier or damaged one: what holds its weights is looked at when they are read


def check_folder(name: str, folder: str | Path | None) -> None:
    """Refuse a model folder in Hugging Face's form that lacks its config.json or weights; None is a folder not needed.

    name: the setting, for the message. A folder that is a pipeline (model_index.json) holds such folders.
    """
    if folder is None:
        return
    path, flag = Path(folder), f"--{name.replace('_', '-')}"
    if not path.is_dir():
        raise UserError(f"{flag} {path}: no such folder; give the folder of the downloaded model")
    if (path / "model_index.json").is_file():
        return
    if not (path / "config.json").is_file():
        raise UserError(f"{flag} {path}: config.json is missing; download the folder completely")
    weights = files_in(path, "*.safetensors", "*.bin", "*.pt", "*.pth")
    if not weights or not all(item.stat().st_size for item in weights):
        raise UserError(f"{flag} {path}: the weights (.safetensors or .bin) are missing or empty; download them again")


def _check_output(config: Any) -> None:
    place = check_output(config.run.output_dir, flag="--output-dir", folder=True)
    if other := _other_model(place, config):
        raise UserError(
            f"--output-dir {place}: holds a run of another system (its model has {other}); give another folder"
        )
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < LEAST_FREE:
        raise UserError(
            f"--output-dir {config.run.output_dir}: the disk is full ({free / 1e6:.2f} MB are free); free space and "
            "run the same command again"
        )


# --- the lock of the output folder ------------------------------------------------------------------------------------


@contextlib.contextmanager
def claimed(output_dir: Path) -> Iterator[None]:
    """Hold the output folder's lock: two runs in one folder would mix and delete each other's checkpoints.

    UserError names the process that holds it. A POSIX lock on a file that names host and process: it ends with the
    process, however that ends, and works over NFS. Within one process it may be held several times.
    """
    with contextlib.closing(_take(output_dir)):
        yield


class _Held:
    """One hold of a folder's lock."""

    def __init__(self, key: str, made: bool):
        self.key, self.made = key, made

    def close(self) -> None:
        """Give it back; the last one removes the file, and a folder that was made for it alone."""
        file, count = _held[self.key]
        if count > 1:
            _held[self.key] = (file, count - 1)
            return
        del _held[self.key]
        with contextlib.suppress(OSError):
            if os.path.samestat(os.fstat(file), os.stat(os.path.join(self.key, LOCK))):
                os.unlink(os.path.join(self.key, LOCK))
        os.close(file)
        if self.made:
            with contextlib.suppress(OSError):
                os.rmdir(self.key)


def _take(output_dir: Path) -> _Held:
    made = not output_dir.exists()
    output_dir.mkdir(parents=True, exist_ok=True)
    key = os.path.realpath(output_dir)
    path = os.path.join(key, LOCK)
    if key in _held:
        file, count = _held[key]
        if os.path.exists(path) and os.path.samestat(os.fstat(file), os.stat(path)):
            _held[key] = (file, count + 1)
            return _Held(key, False)
        os.close(file)  # the folder was removed meanwhile
        del _held[key]
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            holder = os.read(file, 200).decode("utf-8", "replace").strip() or "another process"
            os.close(file)
            raise UserError(
                f"{output_dir} is in use by {holder}; wait until that run has ended, or give another --output-dir"
            ) from None
        except OSError:
            pass  # a file system without locks
        if os.path.exists(path) and os.path.samestat(os.fstat(file), os.stat(path)):
            break
        os.close(file)  # its last holder has just removed it
    now = datetime.datetime.now().isoformat(" ", "seconds")
    os.ftruncate(file, 0)
    os.pwrite(file, f"process {os.getpid()} on {socket.gethostname()} since {now}\n".encode(), 0)
    _held[key] = (file, 1)
    return _Held(key, made)
