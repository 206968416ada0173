"""Ranks of a node read weights once between them: here threads in place of processes."""

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import CPU, build
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from distft.core.errors import PeerEnded, RecipeError
from distft.model.shared_reads import dealt_out
from distft.model.tensor_files import TensorFiles

BASE = {
    "vocab_size": 128, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
KINDS = {
    "llama": BASE,
    "tied": BASE | {"tie_word_embeddings": True},
    "mixtral": BASE | {"num_local_experts": 3, "num_experts_per_tok": 2},
    "gpt2": {"vocab_size": 128, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64},
}
"""Plain, tied, experts that are stored one by one, matrices with biases and a head that is the embedding."""


class Ranks:
    """`size` read groups that stand for as many processes."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._meet = threading.Barrier(size, timeout=60)
        self._slot: dict[int, object] = {}

    def exchange(self, rank: int, value: object) -> dict[int, object]:
        """Every rank's value."""
        self._slot[rank] = value
        self._meet.wait()
        everyone = dict(self._slot)
        self._meet.wait()
        return everyone


class Rank:
    """A `ReadGroup`."""

    def __init__(self, ranks: Ranks, rank: int) -> None:
        self._ranks, self.rank, self.size = ranks, rank, ranks.size

    def broadcast(self, tensor: Tensor, source: int) -> None:
        assert tensor.is_contiguous()
        values = self._ranks.exchange(self.rank, tensor)
        theirs = values[source]
        assert isinstance(theirs, Tensor)
        assert theirs.shape == tensor.shape
        assert theirs.dtype == tensor.dtype
        if source != self.rank:
            tensor.copy_(theirs)
        self._ranks.exchange(self.rank, None)

    def raise_together(self, failure: Exception | None) -> None:
        values = self._ranks.exchange(self.rank, failure)
        failed = [value for value in values.values() if isinstance(value, Exception)]
        if failure is not None:
            raise failure
        if failed:
            raise PeerEnded(2, str(failed[0]))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folders = {}
    for kind, settings in KINDS.items():
        torch.manual_seed(3)
        name = "llama" if kind == "tied" else kind
        folders[kind] = tmp_path_factory.mktemp(kind)
        AutoModelForCausalLM.from_config(CONFIG_MAPPING[name](**settings)).save_pretrained(folders[kind])
    return folders


def filled_by(size: int, folder: Path, method: str, monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    """(the model, or the error; the names of what it read) of each rank."""
    read: dict[int, list[str]] = {}
    whole = TensorFiles.read

    def noting(self: TensorFiles, name: str) -> Tensor:
        read.setdefault(threading.get_ident(), []).append(name)
        return whole(self, name)

    models = [build(folder, method, init="pretrained", attention="eager", fill=False) for _ in range(size)]
    monkeypatch.setattr(TensorFiles, "read", noting)
    ranks = Ranks(size)

    def fill(rank: int) -> tuple[object, list[str]]:
        model = models[rank]
        model.read_within(Rank(ranks, rank))
        try:
            for unit in [*model.blocks, model.module]:
                model.fill(unit, CPU)
        except (RecipeError, PeerEnded) as error:
            return error, read.get(threading.get_ident(), [])
        return model, read.get(threading.get_ident(), [])

    start = threading.Barrier(size, timeout=60)  # a pool would else give one thread two ranks
    with ThreadPoolExecutor(size) as pool:
        done = list(pool.map(lambda rank: (start.wait(), fill(rank))[1], range(size)))
    monkeypatch.undo()
    return done


def bits(value: Tensor) -> Tensor:
    """4-bit codes are stored as numbers that they are not, NaN among them."""
    return value.reshape(-1).view(torch.uint8)


@pytest.mark.parametrize("size", [2, 5])
@pytest.mark.parametrize(
    ("kind", "method"), [(kind, "full") for kind in KINDS] + [("llama", "lora"), ("llama", "qlora")]
)
def test_every_rank_has_all_values_and_every_tensor_is_read_once(
    saved: dict[str, Path], monkeypatch: pytest.MonkeyPatch, kind: str, method: str, size: int
) -> None:
    alone = build(saved[kind], method, init="pretrained", attention="eager").module.state_dict()
    models, names = zip(*filled_by(size, saved[kind], method, monkeypatch), strict=True)
    for model in models:
        for name, value in model.module.state_dict().items():
            assert torch.equal(bits(value), bits(alone[name])), name
    every = sorted(name for its in names for name in its)
    assert every == sorted(load_file(saved[kind] / "model.safetensors")), "each once, among all"
    assert sum(1 for its in names if its) > 1, "and not all by one"


def test_where_one_rank_finds_a_damaged_weight_none_goes_on(
    saved: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = load_file(saved["llama"] / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = torch.nan
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps(json.loads((saved["llama"] / "config.json").read_text())))
    errors = [error for error, _ in filled_by(3, tmp_path, "full", monkeypatch)]
    assert sorted(type(error).__name__ for error in errors) == ["PeerEnded", "PeerEnded", "RecipeError"]
    assert all("up_proj.weight holds NaN" in str(error) for error in errors)


def test_random_weights_are_drawn_by_every_rank(saved: dict[str, Path]) -> None:
    model = build(saved["llama"], init="random", fill=False)
    model.read_within(Rank(Ranks(2), 0))  # alone it would wait for the other at the first broadcast
    model.fill(model.module, CPU)
    again = build(saved["llama"], init="random").module.state_dict()
    assert all(torch.equal(value, again[name]) for name, value in model.module.state_dict().items())


def test_neighbours_are_dealt_out_by_bytes() -> None:
    assert dealt_out([4, 4, 4, 4], 2) == [0, 0, 1, 1]
    assert dealt_out([1, 1, 1, 1, 8], 2) == [0, 0, 0, 0, 1]
    assert dealt_out([8, 1, 1], 4) == [1, 3, 3]
    assert dealt_out([0, 0], 2) == [0, 0], "a module without elements"
    assert dealt_out([], 3) == []
    for ranks in range(1, 9):
        readers = dealt_out([7] * 100, ranks)
        assert readers == sorted(readers)
        shares = [readers.count(rank) for rank in range(ranks)]
        assert max(shares) - min(shares) <= 1
