"""A run with a part of an installed package, from `distft train` to its manifest, its report and `distft reproduce`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PARTS = """
import torch
from pydantic import Field

from distft.core.registry import Params
from distft.optim import OPTIMIZERS, OptimizerSpec


class SgdParams(Params):
    learning_rate: float = Field(default=0.1, gt=0)
    weight_decay: float = Field(default=0.0, ge=0)


def register():
    OPTIMIZERS.add(OptimizerSpec(
        name="acme_sgd", params=SgdParams,
        build=lambda params, groups: torch.optim.SGD(groups, lr=params.learning_rate),
    ))
"""


@pytest.mark.slow
def test_a_run_uses_it_and_keeps_its_version(tmp_path: Path) -> None:
    site = tmp_path / "site"
    info = site / "acme_parts-1.5.dist-info"
    info.mkdir(parents=True)
    (site / "acme.py").write_text(PARTS)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: acme-parts\nVersion: 1.5\n")
    (info / "entry_points.txt").write_text("[distft.plugins]\nparts = acme:register\n")

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        environment = os.environ | {"PYTHONPATH": f"{site}{os.pathsep}{ROOT}"}
        command = [sys.executable, "-m", "distft.cli", *words]
        return subprocess.run(
            command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False, timeout=300
        )

    short = [
        'optim={name = "acme_sgd", learning_rate = 0.5}', "engine.name='solo'", "train.epochs=", "train.max_steps=2",
        "eval=", "train.global_batch_size=4",
    ]  # fmt: skip
    changes = [word for change in short for word in ("--set", change)]
    done = run("train", "recipes/tiny-full.toml", "--nproc", "1", "--output-dir", str(tmp_path / "runs"), *changes)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "runs/tiny-full"
    manifest = json.loads((folder / "manifest.json").read_text())
    plugin = {"distribution": "acme-parts", "version": "1.5", "entry_point": "parts", "parts": ["optimizer acme_sgd"]}
    assert manifest["plugins"] == [plugin]
    records = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    losses = [record["loss"] for record in records if "loss" in record]
    assert len(losses) == 2
    assert losses[0] != losses[1]

    info.rename(site / "acme_parts-1.6.dist-info")
    newer = site / "acme_parts-1.6.dist-info/METADATA"
    newer.write_text(newer.read_text().replace("1.5", "1.6"))
    compared = run("reproduce", str(folder), "--only-check", "--json")
    assert "plugin acme-parts" in compared.stdout + compared.stderr
    said = compared.stdout + compared.stderr
    assert "1.5" in said
    assert "1.6" in said
