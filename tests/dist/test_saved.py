"""Activations kept for the backward pass: what checkpointing saves it saves on every engine, compiled and not."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import ROOT, WHOLE_GRIDS, run

from distft.model.activation_checkpointing import _KeepHalf

ENGINES = ["solo", "ddp", "fsdp2", "zero3"] if WHOLE_GRIDS else ["solo", "fsdp2"]


@pytest.fixture(scope="module")
def kept(tiny_config: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, dict[str, Any]]]:
    """Engine -> mode -> bytes and loss, one process each."""
    found = {}
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests" / "helpers")])
    for engine in ENGINES:
        out = tmp_path_factory.mktemp("saved") / f"{engine}.json"
        command = [sys.executable, "tests/dist/saved_worker.py", str(tiny_config), engine, str(out)]
        done = run(command, PYTHONPATH=path)
        assert done.returncode == 0, done.stderr[-3000:]
        found[engine] = json.loads(out.read_text())
    return found


@pytest.mark.slow
def test_checkpointing_saves_as_much_on_every_engine_compiled_and_not(kept) -> None:
    """compile used to switch checkpointing off under fsdp2: nobody saw it but the memory."""
    plain = kept["solo"]
    assert 2 * plain["selective"]["bytes"] < plain["off"]["bytes"]
    assert 2 * plain["full"]["bytes"] < plain["selective"]["bytes"]
    for engine, modes in kept.items():
        # fsdp2 holds the root's gathered parameters beside what is saved, in every mode alike.
        gathered = modes["full"]["bytes"] - plain["full"]["bytes"]
        assert 0 <= gathered <= (132_000 if engine == "fsdp2" else 0), engine
        for mode in ("off", "selective", "full"):
            saved = modes[mode]["bytes"] - gathered
            assert saved == pytest.approx(plain[mode]["bytes"], abs=1024), (engine, mode)
            compiled = modes[f"{mode}-compiled"]["bytes"] - gathered
            if mode == "off":  # the partitioner recomputes what costs nothing
                assert 0.5 * saved < compiled <= saved, (engine, mode)
            else:
                assert compiled == pytest.approx(saved, abs=1024), (engine, mode)


@pytest.mark.slow
def test_all_of_them_have_the_same_loss(kept) -> None:
    losses = [case["loss"] for modes in kept.values() for case in modes.values()]
    assert max(losses) - min(losses) <= 1e-6 * max(losses)


@pytest.mark.slow
def test_sharded_gradients_are_reduced_from_the_head_down(kept) -> None:
    """The head in a unit of its own is under way while the blocks compute; with the root's it came last, uncovered."""
    for mode, case in kept["fsdp2"].items():
        names = [name.removeprefix("lm.") for name in case["arrived"]]
        assert names[0] == "lm_head.weight", mode
        assert names.index("model.layers.1.mlp.up_proj.weight") < names.index("model.layers.0.mlp.up_proj.weight")
        assert set(names[-2:]) == {"model.embed_tokens.weight", "model.norm.weight"}, mode


@pytest.mark.parametrize(
    "name",
    [
        *("aten._scaled_dot_product_flash_attention", "aten._scaled_dot_product_cudnn_attention"),
        *("aten._scaled_dot_product_efficient_attention", "aten._flash_attention_forward"),
        *("torch_attn._varlen_attn", "flash_attn._flash_attn_varlen_forward", "flash_attn_3.fwd"),
        "flash_attn._flash_attn_forward",
    ],
)
def test_selective_keeps_the_outputs_of_every_attention(name: str) -> None:
    """Recomputing it is what selective checkpointing is there to spare: by each name that it has."""

    class Context:
        is_recompute = False

    class Named:
        """An operator of a package that is not installed here."""

        def __str__(self) -> str:
            return name

    room, _, short = name.partition(".")
    op = getattr(torch.ops.aten, short) if room == "aten" else Named()
    assert _KeepHalf()(Context(), op) == torch.utils.checkpoint.CheckpointPolicy.MUST_SAVE
    assert _KeepHalf()(Context(), torch.ops.aten.mul) == torch.utils.checkpoint.CheckpointPolicy.PREFER_RECOMPUTE
