"""Weights & Biases, when the recipe names a project."""

from __future__ import annotations

from typing import Any

from distft.core.errors import MachineError


class WandbSink:
    """Logs the same records as the file."""

    every_step = False

    def __init__(self, project: str, name: str, config: dict[str, Any]) -> None:
        try:
            import wandb
        except ImportError as error:
            raise MachineError('[log] wandb needs the wandb package: pip install "distft[wandb]"') from error
        library: Any = wandb
        self._run = library.init(project=project, name=name, config=config)

    def write(self, record: dict[str, Any]) -> None:
        """Log one record with one call."""
        self._run.log({k: v for k, v in record.items() if v is not None}, step=record["step"])

    def close(self) -> None:
        """Mark the run as finished."""
        self._run.finish()
