"""TensorBoard event files, step on the x axis."""

from __future__ import annotations

from pathlib import Path
from typing import Any


class TensorboardSink:
    """One scalar per figure: train/… for steps, eval/… for evaluations."""

    every_step = False

    def __init__(self, folder: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder))

    def write(self, record: dict[str, Any]) -> None:
        """Write a record; position keys but the step are figures too."""
        group = "train" if "loss" in record else "eval"
        for name, value in record.items():
            if name != "step" and value is not None:
                self._writer.add_scalar(f"{group}/{name}", value, record["step"])

    def close(self) -> None:
        """Flush."""
        self._writer.close()
