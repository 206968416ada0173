"""Rows of tokens that a recipe adds: how many, what they start as, who trains them; against PEFT in a plain loop."""

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import batch, build
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from distft.core.errors import DistftError
from distft.demo.files import locate_path
from distft.merging.merging import MergeSource, merge
from distft.model import cross_entropy
from distft.model.adapters import METHODS
from distft.model.adapters.lora import base_alone
from distft.plan import inventory
from distft.recipe import ModelTable

ROWS, ADDED = 1024, {"add_tokens": ("timeout", "zz\u4e00"), "add_special_tokens": ("<|region|>",)}
NEW = [ROWS, ROWS + 1, ROWS + 2]
OLD = 447
"""Id of a token that the vocabulary has."""
EXAMPLE = batch([[5, ROWS, 9, ROWS + 1, 300, ROWS + 2, OLD, 17, ROWS], [8, ROWS + 1, OLD, OLD, 77]])


@pytest.fixture(scope="module", params=["own head", "tied head"])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    tokens = Path(locate_path("demo:tiny-llama"))
    config = LlamaConfig(
        vocab_size=ROWS, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        tie_word_embeddings=request.param == "tied head", initializer_range=0.3,
    )  # fmt: skip
    torch.manual_seed(3)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((tokens / name).read_bytes())
    return folder


def loaded(base: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)


def pieces(base: Path, text: str) -> list[int]:
    return AutoTokenizer.from_pretrained(base)(text, add_special_tokens=False)["input_ids"]


def grown(base: Path, *, rows: int, how: str = "pieces") -> Any:
    """A plain transformers model with the rows that are to be there, made by hand."""
    lm = loaded(base)
    tables = [lm.get_input_embeddings().weight.detach().clone(), lm.get_output_embeddings().weight.detach().clone()]
    lm.resize_token_embeddings(rows, mean_resizing=False)
    texts = [*ADDED["add_tokens"], *ADDED["add_special_tokens"]]
    for old, new in zip(tables, (lm.get_input_embeddings(), lm.get_output_embeddings()), strict=True):
        with torch.no_grad():
            new.weight[ROWS:] = old.mean(0)
            for row, text in zip(NEW, texts, strict=True):
                if how == "pieces":
                    new.weight[row] = old[pieces(base, text)].mean(0)
    return lm


@pytest.mark.parametrize("how", ["pieces", "mean"])
def test_new_rows_start_as_the_mean_of_what_they_replace(base: Path, how: str) -> None:
    model = build(base, init="pretrained", **ADDED, new_rows=how, pad_vocabulary=10).module.transformer
    wanted = grown(base, rows=1030, how=how)
    assert model.config.vocab_size == 1030
    tied = wanted.config.tie_word_embeddings
    for name, tensor in wanted.state_dict().items():
        assert torch.allclose(model.state_dict()[name], tensor, atol=1e-6), name
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == tied
    assert all(param.requires_grad for param in model.parameters())


def test_nothing_grows_where_there_is_room(base: Path, tmp_path: Path) -> None:
    """As in models whose embedding has more rows than the tokenizer has tokens."""
    lm = loaded(base)
    lm.resize_token_embeddings(1100, mean_resizing=False)
    lm.save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((base / name).read_bytes())
    model = build(tmp_path, init="pretrained", **ADDED).module.transformer
    before, after = lm.get_input_embeddings().weight, model.get_input_embeddings().weight
    assert after.shape == before.shape
    assert torch.equal(after[ROWS + 3 :], before[ROWS + 3 :])
    assert torch.allclose(after[ROWS], before[pieces(base, "timeout")].mean(0), atol=1e-6)


@pytest.mark.parametrize("chunk_bytes", [2**28, 2 * 4 * 1030], ids=["at once", "in chunks"])
def test_rows_beside_lora_are_those_of_peft_in_a_plain_loop(
    base: Path, tmp_path: Path, chunk_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Six steps of AdamW, losses and the tensors that are saved; then PEFT reads them beside a base that has grown."""
    monkeypatch.setattr(cross_entropy, "CHUNK_BYTES", chunk_bytes)
    model = build(base, "lora", init="pretrained", params={"r": 4, "trainable_tokens": ["Ġdisk"]}, **ADDED)
    tied = model.module.transformer.config.tie_word_embeddings
    indices = {name: [OLD, *NEW] for name in (["model.embed_tokens"] if tied else ["model.embed_tokens", "lm_head"])}
    plain = get_peft_model(
        grown(base, rows=1027),
        LoraConfig(
            r=4, lora_alpha=32, target_modules="all-linear", trainable_token_indices=indices, task_type="CAUSAL_LM"
        ),
    )
    ours = {name: param for name, param in model.module.lm.named_parameters() if param.requires_grad}
    theirs = {name: param for name, param in plain.named_parameters() if param.requires_grad}
    assert ours.keys() == theirs.keys()
    with torch.no_grad():
        for name, param in theirs.items():
            if "trainable_tokens" in name:
                assert torch.allclose(param, ours[name], atol=1e-6), "they start as rows of the base"
            param.copy_(ours[name])
    steps = [torch.optim.AdamW(each.values(), lr=1e-2) for each in (ours, theirs)]
    for _ in range(6):
        losses = [model.module(**EXAMPLE.inputs()).sum(), plain_loss(plain)]
        assert torch.allclose(*losses, rtol=1e-5), losses
        for loss, step in zip(losses, steps, strict=True):
            step.zero_grad()
            loss.backward()
            step.step()
    for name, param in ours.items():
        assert torch.allclose(param, theirs[name], atol=1e-4), name
    with torch.no_grad():
        trained = model.module(**EXAMPLE.inputs()).sum()
        with base_alone(model.module):
            alone = model.module(**EXAMPLE.inputs()).sum()
        assert torch.allclose(alone, plain_loss(grown(base, rows=1027)), rtol=1e-5)
    METHODS["lora"].save_adapter(model.module.lm, tmp_path, {name: param.detach() for name, param in ours.items()})
    merge(MergeSource(adapter=tmp_path, base=base), tmp_path / "merged", rows=[EXAMPLE.input_ids_T.tolist()])
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    assert merged.get_input_embeddings().weight.shape[0] == 1027
    with torch.no_grad():
        assert torch.allclose(plain_loss(merged), trained, rtol=1e-5), "the base has grown"
    again = build(base, "lora", init="pretrained", **ADDED,
                  params={"r": 4, "trainable_tokens": ["Ġdisk"], "start": str(tmp_path)})  # fmt: skip
    with torch.no_grad():
        assert torch.allclose(again.module(**EXAMPLE.inputs()).sum(), trained, rtol=1e-6), "training goes on from it"


def plain_loss(lm: Any) -> torch.Tensor:
    total = torch.zeros(())
    bounds = EXAMPLE.cu_seqlens.tolist()
    for start, end in itertools.pairwise(bounds):
        ids = EXAMPLE.input_ids_T[start:end]
        logits = lm(input_ids=ids[None]).logits[0, :-1].float()
        total = total + torch.nn.functional.cross_entropy(logits, ids[1:], reduction="sum")
    return total


@pytest.mark.parametrize("head", ["lm_value", "lm_critic"])
def test_a_critic_stands_beside_them(base: Path, head: str) -> None:
    """Also where their adapter wraps the head; a second trunk starts with the same rows."""
    module = build(base, "lora", head=head, init="pretrained", **ADDED).module
    assert module.value_head.weight.shape == (1, 16)
    if head == "lm_critic":
        ids = torch.arange(ROWS + 3)
        rows = module.transformer.get_input_embeddings()(ids)
        assert torch.equal(module.critic.get_input_embeddings()(ids), rows)


def test_a_plan_counts_them(base: Path) -> None:
    """Trained: E numbers a row; all: those of the rows that came, too."""
    tied = json.loads((base / "config.json").read_text())["tie_word_embeddings"]
    tables = 1 if tied else 2

    def counted(method: str, params: dict[str, Any], **model: Any) -> tuple[int, int]:
        table = ModelTable(path=str(base), dtype="float32", **model)
        read = inventory.read(table, base, METHODS[method], METHODS[method].params(**params))
        return read.trained, read.total

    before, after = counted("lora", {"r": 4}), counted("lora", {"r": 4}, **ADDED)
    assert after[0] - before[0] == tables * 3 * 16
    assert after[1] - before[1] == 2 * tables * 3 * 16, "rows of the base, and those that are trained"
    full = [counted("full", {}, **more)[1] for more in ({}, {"add_tokens": ("timeout",), "pad_vocabulary": 64})]
    assert full[1] - full[0] == tables * 64 * 16


WRONG: list[tuple[str, dict[str, Any], dict[str, Any], str]] = [
    ("full", {}, {"add_tokens": ("login",)}, r'\[model\] add_tokens: the tokenizer has "login" already'),
    (
        "full",
        {},
        {"add_special_tokens": ("Ġdisk",)},
        r"\[model\] add_special_tokens: the tokenizer has .* as token 447",
    ),
    ("ia3", {}, {"add_tokens": ("timeout",)}, "under this method the rows of new tokens would not be trained"),
    ("freeze", {"last_blocks": 1}, {"add_tokens": ("timeout",)}, "would not be trained"),
    ("lora", {"trainable_tokens": ["disk"]}, {}, '"disk" is no token of the tokenizer: it reads'),
    ("lora", {"modules_to_save": ["embed_tokens"]}, {"add_tokens": ("timeout",)}, "named in another key too"),
    (
        "lora",
        {"target_modules": ["q_proj", "lm_head"]},
        {"add_tokens": ("timeout",)},
        "lm_head has rows that are trained",
    ),
]


@pytest.mark.parametrize(("method", "params", "model", "message"), WRONG, ids=lambda value: str(value)[:40])
def test_what_cannot_be_is_refused(
    base: Path, method: str, params: dict[str, Any], model: dict[str, Any], message: str
) -> None:
    with pytest.raises(DistftError, match=message):
        build(base, method, fill=False, init="pretrained", params=params, **model)
