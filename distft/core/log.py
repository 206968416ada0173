"""Other people's noise: said once for all libraries, so that a run's output is about the run."""

from __future__ import annotations

import logging
import os
import warnings

_NOISE = (
    (FutureWarning, r"`torch\.distributed\..* is deprecated"),  # DeepSpeed 0.19 calls names that torch 2.13 renamed
    (FutureWarning, r"`is_gradient_checkpointing` is deprecated"),  # PEFT 0.21 under transformers 5.23
    (UserWarning, r"Paged optimizers are not supported on CPU"),  # same arithmetic, said in the guide
)
_LOGGERS = {
    "bitsandbytes.backends.cpu.ops": logging.ERROR,  # optional kernels from a hub, absent without network
    "torch.distributed.elastic": logging.ERROR,
}


def quiet_libraries() -> None:
    """Drop messages that a user can do nothing about; warnings and errors of other kinds stay."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # we fork no process after tokenising
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    for category, message in _NOISE:
        warnings.filterwarnings("ignore", category=category, message=message)
    for name, level in _LOGGERS.items():
        logging.getLogger(name).setLevel(level)
