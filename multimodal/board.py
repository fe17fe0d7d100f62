"""TensorBoard files that follow a metrics.jsonl."""

import json
from pathlib import Path


class Board:
    """Copies the new lines of a metrics file into event files. Off: does nothing, and tensorboard need not be
    installed.
    """

    def __init__(self, folder: Path, metrics: Path, enabled: bool):
        self.metrics, self.position, self.writer = metrics, 0, None
        if enabled:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                from shared.errors import UserError

                raise UserError(
                    "TensorBoard files need the package tensorboard: pip install tensorboard; or use --no-tensorboard"
                ) from None
            last = _last_step(metrics)
            self.writer = SummaryWriter(str(folder), purge_step=last + 1 if last else None)
            self.position = metrics.stat().st_size if metrics.exists() else 0

    def update(self) -> None:
        """Take in the lines that were added."""
        if self.writer is None or not self.metrics.exists():
            return
        if self.metrics.stat().st_size < self.position:  # a resumed run cut the file back to its checkpoint
            self.position = 0
        with open(self.metrics, "rb") as file:
            file.seek(self.position)
            for line in file:
                if not line.endswith(b"\n"):
                    break
                self.position += len(line)
                row = json.loads(line)
                for name, value in row.items():
                    if name != "step" and isinstance(value, int | float):
                        self.writer.add_scalar(name, value, row["step"])

    def close(self) -> None:
        """Take in the rest and close."""
        self.update()
        if self.writer is not None:
            self.writer.close()


def _last_step(metrics: Path) -> int:
    if not metrics.exists():
        return 0
    steps = [json.loads(line)["step"] for line in metrics.read_text().splitlines() if line.endswith("}")]
    return max(steps, default=0)
