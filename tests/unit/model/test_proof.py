"""What the proof of a model finds: each fall-back, each refusal, planted faults, and where it keeps its verdict."""

from __future__ import annotations

import functools
import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import model_folder, small_config
from transformers import CONFIG_MAPPING

from distft.core.errors import RecipeError
from distft.model import attention, cross_entropy, load, proof, reference
from distft.model.paths import SINGLE, VARLEN
from distft.model.proof_verdict import ProofVerdict
from distft.model.proving import path_of, verdict_on
from distft.recipe import ModelTable

CPU = torch.device("cpu")


def proven(
    config: Any, *, wanted: str = "auto", max_length: int = 256, precision: torch.dtype | None = None
) -> ProofVerdict:
    attention.register()
    names = proof.attentions(wanted, CPU, torch.float32)
    given: dict[str, Any] = {"device": CPU, "dtype": torch.float32, "max_length": max_length, "precision": precision}
    return proof.prove(config, load.untrained, attentions=names, **given)


@pytest.mark.parametrize(
    ("kind", "head", "kernel", "documents", "generation"),
    [
        ("llama", "chunked", VARLEN, "packed", "batched"),
        ("gemma2", "chunked", VARLEN, "packed", "batched"),  # caps on scores and logits
        ("gpt_oss", "chunked", VARLEN, "packed", "batched"),  # sinks
        ("cohere2", "chunked", VARLEN, "packed", "batched"),  # a scale of logits
        ("minicpm3", "chunked", VARLEN, "packed", "batched"),  # a scale of hidden states
        ("modernbert-decoder", "own", VARLEN, "packed", "batched"),  # a layer between trunk and logits
        ("apertus", "chunked", VARLEN, "packed", "batched"),  # grows its rounding a thousandfold
        pytest.param(
            "hrm_text", "chunked", VARLEN, "packed", "batched", marks=pytest.mark.slow
        ),  # passes its blocks many times
        pytest.param(
            "afmoe", "chunked", VARLEN, "packed", "batched", marks=pytest.mark.slow
        ),  # views what attention gives
        ("biogpt", "chunked", VARLEN, "packed", "batched"),  # does not name its blocks
        ("stablelm", "chunked", "sdpa", "packed", "batched"),
        pytest.param(  # a mask of as many tokens as it has positions
            "gpt_neo", "chunked", "eager", "single", "batched", marks=pytest.mark.slow
        ),
        ("lfm2", "chunked", SINGLE, "single", "batched"),  # a convolution along the row
        pytest.param("falcon_h1", "chunked", SINGLE, "single", "batched", marks=pytest.mark.slow),
        ("bloom", "chunked", "eager", "single", "batched"),  # ALiBi counts from the row's beginning
        ("qwen3_next", "chunked", SINGLE, "single", "batched"),
        pytest.param("recurrent_gemma", "chunked", SINGLE, "single", "single", marks=pytest.mark.slow),
        ("mamba", "chunked", SINGLE, "single", "uncached"),
    ],
)
def test_the_fastest_right_path_is_found(kind: str, head: str, kernel: str, documents: str, generation: str) -> None:
    path = proven(small_config(kind)).path
    assert path is not None
    assert (path.head, path.attention, path.documents, path.generation) == (head, kernel, documents, generation)


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("bert", "it is not causal"),
        ("trocr", "its own loss is of the tokens that it reads"),
        ("bart", "its own loss is of the tokens that it reads"),
        ("reformer", "is_decoder=True"),
    ],
)
def test_what_has_no_right_path_is_refused_with_the_reason(kind: str, said: str) -> None:
    verdict = proven(CONFIG_MAPPING[kind]())
    assert verdict.path is None
    assert said in verdict.reason


def test_an_attention_that_drops_a_term_is_refused_by_name() -> None:
    """Transformers' sdpa has no caps."""
    verdict = proven(small_config("gemma2"), wanted="sdpa")
    with pytest.raises(RecipeError) as caught:
        path_of(verdict, source="recipe.toml", line=7, attention="sdpa")
    message = str(caught.value)
    assert "line 7" in message
    assert 'set [model] attention = "auto"' in message
    assert caught.value.exit_code == 2


def test_ropes_that_depend_on_the_longest_text_are_packed_only_within_the_original_positions() -> None:
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
    config = small_config("llama", max_position_embeddings=512, rope_parameters=rope)
    config.max_position_embeddings = 512
    within, beyond = proven(config, max_length=512).path, proven(config, max_length=2048).path
    assert within is not None
    assert beyond is not None
    assert (within.documents, beyond.documents) == ("packed", "single")


@pytest.mark.slow
def test_what_counts_along_the_packed_row_is_not_packed() -> None:
    """Llama 4 scales scores by the place in the row, beyond a length that no document reaches and packed rows do."""
    path = proven(small_config("llama4_text"), max_length=32).path
    assert path is not None
    assert (path.attention, path.documents, path.generation) == (SINGLE, "single", "batched")


@pytest.mark.parametrize("kind", ["llama", "gemma2", "gpt_oss", "apertus", "hrm_text", "granite"])
def test_in_single_precision_tolerances_follow_the_models_own_rounding(kind: str) -> None:
    """As on a GPU, whose kernels have no double precision."""
    path = proven(small_config(kind), precision=torch.float32).path
    assert path is not None
    assert path.describe() == ""


def drop(*, cap: bool = False, sink: bool = False) -> Callable[..., torch.Tensor]:
    right: Callable[..., torch.Tensor] = attention._capped

    def without(*given: Any) -> torch.Tensor:
        *rest, softcap, sink_H = given
        return right(*rest, None if cap else softcap, None if sink else sink_H)

    return without


def leaking(*given: Any, cu_seq_lens_q: torch.Tensor, **more: Any) -> Any:
    return RIGHT(*given, cu_seq_lens_q=cu_seq_lens_q[[0, -1]], **more)


RIGHT = attention.varlen_attention
FAULTS: list[tuple[str, Any, str, Any, dict[str, Any]]] = [
    ("gemma2", attention, "_capped", drop(cap=True), {"final_logit_softcapping": None}),
    ("gpt_oss", attention, "_capped", drop(sink=True), {}),
    ("granite", cross_entropy.LogitRule, "finish", lambda self, product_SV: product_SV, {"logits_scaling": 4.0}),
    ("cohere", cross_entropy.LogitRule, "finish", lambda self, product_SV: product_SV, {}),
    ("llama", attention, "varlen_attention", leaking, {}),
    ("apertus", attention, "varlen_attention", leaking, {}),
    ("hrm_text", attention, "varlen_attention", leaking, {}),
    ("mistral", attention, "_window_mask", lambda length, window, device: None, {"sliding_window": 8}),
]


@pytest.mark.parametrize(
    "precision",
    [pytest.param(torch.float64, id="double", marks=pytest.mark.slow), pytest.param(torch.float32, id="single")],
)
@pytest.mark.parametrize(("kind", "where", "name", "wrong", "settings"), FAULTS, ids=[fault[0] for fault in FAULTS])
def test_a_planted_fault_is_found(
    kind: str,
    where: Any,
    name: str,
    wrong: Any,
    settings: dict[str, Any],
    precision: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A cap of 50 on scores, sinks, scales of logits, borders of documents, windows: dropped, none is taken."""
    config = small_config(kind, **settings)
    monkeypatch.setattr(where, name, wrong)
    verdict = proven(config, precision=precision)
    monkeypatch.undo()
    attention.register()
    assert verdict.path is not None
    assert "differs by" in verdict.attempts[0].difference or "loss " in verdict.attempts[0].difference
    assert verdict.path.head == "own" if where is cross_entropy.LogitRule else verdict.path.attention != VARLEN


@pytest.mark.slow
def test_a_mistake_of_our_own_is_no_reason_to_refuse_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is raised with its traceback, and no verdict is kept."""
    monkeypatch.setenv("DISTFT_CACHE", str(tmp_path / "cache"))
    folder = model_folder("llama", tmp_path / "llama")
    table = ModelTable(path=str(folder), dtype="float32")
    with monkeypatch.context() as planted:
        planted.delattr(attention, "_window_mask")
        with pytest.raises(NameError, match="_window_mask"):
            verdict_on(table, folder, max_length=256)
        planted.setattr(attention, "_window_mask", None, raising=False)
        with pytest.raises(TypeError, match="not callable"):
            verdict_on(table, folder, max_length=256)
    with monkeypatch.context() as planted:
        planted.delattr(cross_entropy.LogitRule, "is_plain", raising=False)
        planted.delattr(reference.Reference, "_hold_losses")
        with pytest.raises(AttributeError, match="_hold_losses"):
            verdict_on(table, folder, max_length=256)
    assert not list((tmp_path / "cache" / "proofs").glob("*.json"))
    path = verdict_on(table, folder, max_length=256).path
    assert path is not None
    assert path.describe() == ""


def test_what_was_tried_is_told() -> None:
    verdict = proven(small_config("stablelm"))
    lines = verdict.tried()
    assert len(lines) == len(verdict.attempts) > 0
    assert lines[0].startswith(f"not packed, {VARLEN}, head chunked: ")
    assert verdict.attempts[0].difference in lines[0]


@pytest.mark.parametrize("given", [{"position_bias": torch.zeros(1)}, {"is_causal": False}, {"indices": [1]}])
def test_attention_refuses_what_it_does_not_know(given: dict[str, Any]) -> None:
    heads = torch.zeros(1, 2, 4, 8)
    bounds = torch.tensor([0, 4], dtype=torch.int32)
    module = torch.nn.Identity()
    attention.varlen_attention(module, heads, heads, heads, None, cu_seq_lens_q=bounds, position_ids=bounds)
    with pytest.raises(ValueError, match="does not know"):
        attention.varlen_attention(module, heads, heads, heads, None, cu_seq_lens_q=bounds, **given)


def test_capped_losses_and_gradients_in_chunks_equal_plain_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cross_entropy, "CHUNK_BYTES", 4 * 50 * 3)
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(50, (10,), generator=generator)
    rule = cross_entropy.LogitRule(hidden_scale=0.5, scale=3.0, cap=2.0)
    found = []
    for loss in (None, cross_entropy.full_loss, cross_entropy.chunked_loss, cross_entropy.chunked_sum):
        hidden, weight, bias = (
            torch.randn(shape, generator=torch.Generator().manual_seed(seed)).requires_grad_()
            for seed, shape in enumerate([(10, 6), (50, 6), (50,)])
        )
        if loss is None:  # the definition
            logits = 2.0 * torch.tanh(3.0 * (0.5 * hidden @ weight.T + bias) / 2.0)
            value = torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
        else:
            value = loss(hidden, weight, bias, labels, rule).sum()
        value.backward()
        found.append((value.detach(), hidden.grad, weight.grad, bias.grad))
    for other in found[1:]:
        for got, right in zip(other, found[0], strict=True):
            torch.testing.assert_close(got, right, rtol=1e-5, atol=1e-6)


def test_an_8b_config_is_proven_in_seconds_and_then_from_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DISTFT_CACHE", str(tmp_path / "cache"))
    llama8b = {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 4096, "intermediate_size": 14336,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256,
        "max_position_embeddings": 131072, "rope_theta": 500000.0,
        "rope_scaling": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                         "original_max_position_embeddings": 8192, "rope_type": "llama3"},
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(llama8b))
    table = ModelTable(path=str(tmp_path), dtype="float32")
    began = time.process_time()
    verdict = verdict_on(table, tmp_path, max_length=4096)
    assert time.process_time() - began < 5
    assert verdict.path is not None
    assert verdict.path.describe() == ""
    monkeypatch.setattr(proof, "prove", lambda *args, **more: pytest.fail("proven again"))
    assert verdict_on(table, tmp_path, max_length=4096) == verdict
    (tmp_path / "config.json").write_text(json.dumps(llama8b | {"head_dim": 64}))
    with pytest.raises(pytest.fail.Exception):
        verdict_on(table, tmp_path, max_length=4096)


def test_text_trains_the_language_model_of_a_wrapper_alone(tmp_path: Path) -> None:
    folder = model_folder("gemma3", tmp_path / "gemma3")
    for method in ("full", "lora"):
        from tiny import build

        built = build(folder, method, init="pretrained", fill=False)
        trained = [name for name, param in built.module.named_parameters() if param.requires_grad]
        assert trained
        assert not [name for name in trained if "vision" in name or "projector" in name]


@pytest.mark.slow
def test_compiled_blocks_are_taken_where_they_compile_and_keep_the_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """The graph that a compiler would be given, run without one: what a compiler adds is seen where there is one."""
    config, given = small_config("llama"), {"device": CPU, "dtype": torch.float32, "max_length": 256}
    names = proof.attentions("auto", CPU, torch.float32)

    def verdict(of: Any = config, attentions: Any = names) -> ProofVerdict:
        return proof.prove(of, load.untrained, attentions=attentions, compiled=True, **given)

    attention.register()
    plain = torch.compile
    monkeypatch.setattr(torch, "compile", functools.partial(plain, backend="aot_eager"))
    found = verdict()
    assert found.path is not None
    assert found.path.compiled
    assert not found.attempts
    assert ProofVerdict.from_json(found.to_json()) == found

    def fails(function: Any) -> Any:
        raise RuntimeError("no C++ compiler")

    for broken, reason in (
        (fails, "RuntimeError: no C\\+\\+ compiler"),
        (lambda function: lambda *args, **kwargs: function(*args, **kwargs) * 1.001, "loss .* for|gradient of"),
    ):
        monkeypatch.setattr(torch, "compile", broken)
        found = verdict()
        assert found.path is not None, "without a compiler it is trained as it is"
        assert not found.path.compiled
        assert [attempt.path for attempt in found.attempts] == ["compiled"]
        assert re.search(reason, found.attempts[0].difference), found.attempts
    alone = verdict(small_config("lfm2"))
    assert alone.path is not None
    assert not alone.path.compiled
    assert alone.attempts[-1].difference.startswith("one document per forward")
