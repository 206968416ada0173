"""Folders that appear whole or not at all, and *.safetensors files written one tensor at a time.

The library's `save_file` wants all tensors of a file at once. Its format is a header with every name, type, shape and
place, and then the bytes: names, types and shapes are known before any value is, so a file is written as values come.
Source: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from distft.core.errors import FileSystemError
from distft.model.tensor_files import INDEX, SINGLE

MAX_FILE_BYTES = 4 * 2**30
_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class TensorPlan:
    """What is known of a tensor before its values are."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes in the file."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def refuse_existing(out: Path, *sources: Path) -> None:
    """Refuse to write over anything.

    Raises:
        FileSystemError: `out` exists, or is or holds one of the folders that are read.
    """
    for source in sources:
        if out.resolve() == source.resolve() or out.resolve() in source.resolve().parents:
            raise FileSystemError(f"--out {out}: is or holds {source}, which is read  name another folder")
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise FileSystemError(f"--out {out}: exists, and was not overwritten  name another folder, or remove it")


@contextlib.contextmanager
def whole_folder(out: Path, num_bytes: int = 0) -> Iterator[Path]:
    """Give an empty folder beside `out` that takes its name when the block ends without an error.

    With an error it is removed. A killed process leaves it under its temporary name, and the next one removes it.

    Args:
        out: the folder that is to appear.
        num_bytes: what will be written, asked of the disk first.

    Raises:
        FileSystemError: it cannot be written, or the disk is full.
    """
    aside = out.with_name(f".tmp-{out.name}")
    try:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        free = shutil.disk_usage(aside).free
        if free < num_bytes:
            raise FileSystemError(
                f"--out {out}: needs {num_bytes / 2**30:.2f} GiB, and the disk has {free / 2**30:.2f}  free some, "
                "or name a folder on another disk"
            )
        yield aside
        if out.is_dir():
            out.rmdir()  # empty: looked at before
        os.replace(aside, out)
    except OSError as error:
        raise FileSystemError(
            f"--out {out}: cannot be written: {error.strerror or error}; nothing was left there  free disk space or "
            "name a folder that can be written"
        ) from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def write_tensor_file(path: Path, plans: Sequence[TensorPlan], values: Iterator[Tensor]) -> str:
    """Write a file of tensors and return its sha256; `values` are in the order of `plans`, one is held at a time.

    Raises:
        OSError: the file cannot be written.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for plan in plans:
        header[plan.name] = {
            "dtype": _NAMES[plan.dtype], "shape": list(plan.shape), "data_offsets": [end, end + plan.num_bytes],
        }  # fmt: skip
        end += plan.num_bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256(start := len(text).to_bytes(8, "little") + text)
    with path.open("wb") as file:
        file.write(start)
        for plan in plans:
            value = next(values)
            assert (value.dtype, tuple(value.shape)) == (plan.dtype, plan.shape), plan
            content = value.contiguous().reshape(-1).view(torch.uint8).numpy().data
            digest.update(content)
            file.write(content)
            del content, value
        file.flush()
        os.fsync(file.fileno())
    path.chmod(0o644)
    return digest.hexdigest()


def file_names(sizes: Sequence[Sequence[TensorPlan]]) -> list[str]:
    """Return the hub's names for this many files."""
    count = len(sizes)
    return [SINGLE] if count == 1 else [f"model-{index + 1:05d}-of-{count:05d}.safetensors" for index in range(count)]


def write_index(folder: Path, files: Sequence[Sequence[TensorPlan]]) -> None:
    """Write the index of several files; a single file needs none.

    Raises:
        OSError: it cannot be written.
    """
    if len(files) == 1:
        return
    names = file_names(files)
    where = {plan.name: name for name, plans in zip(names, files, strict=True) for plan in plans}
    total = sum(plan.num_bytes for plans in files for plan in plans)
    text = json.dumps({"metadata": {"total_size": total}, "weight_map": where}, indent=2, sort_keys=True)
    (folder / INDEX).write_text(text + "\n", encoding="utf-8")
