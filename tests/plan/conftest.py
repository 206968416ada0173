"""Models are read once for all tests of a process: what is read does not depend on who asks, and takes most time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from distft.model.adapters import MethodSpec
from distft.model.paths import ForwardPath
from distft.plan import inventory
from distft.plan.inventory import Inventory
from distft.recipe.schema import ModelTable

_READ: dict[tuple[Any, ...], Inventory] = {}
_read = inventory.read


def _once(
    table: ModelTable, folder: Path, method: MethodSpec, params: Any, *, path: ForwardPath | None = None, **more: Any
) -> Inventory:
    said = table.model_dump_json(exclude={"path"})
    config = (folder / "config.json").read_text(encoding="utf-8")
    key = (config, said, method.name, params.model_dump_json(), path, *sorted(more.items()))
    if key not in _READ:
        _READ[key] = _read(table, folder, method, params, path=path, **more)
    return _READ[key]


@pytest.fixture(autouse=True)
def read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inventory, "read", _once)
