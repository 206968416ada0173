"""A prompt that several answers share is computed once: the same losses, rewards and gradients, with fewer tokens."""

from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import model_folder, small_config
from tiny import CPU, build, documents

from distft.core.types import IGNORE, Batch
from distft.data.batch import pack_documents
from distft.model import attention, load, proof
from distft.model.paths import ForwardPath
from distft.model.policy import ModelPolicy
from distft.model.proof import SHARED_PREFIXES
from distft.model.proof_verdict import ProofVerdict

SHARING = ForwardPath(shared_prefixes=True)
GROUPS = {
    "pairs of several lengths": ([(9, (5, 3)), (4, (1, 7)), (2, (2, 2))], 8 + 3 + 1),
    "three answers": ([(6, (4, 5, 6))], 2 * 5),
    "a prompt of one token, which is each answer's own": ([(1, (3, 3)), (7, (2, 2))], 6),
    "single documents": ([(5, (4,)), (3, (2,))], 0),
}
"""Groups as (tokens of the prompt, tokens of each answer), and how many tokens need not be computed again."""


def proven(config: Any) -> ProofVerdict:
    attention.register()
    names = proof.attentions("varlen", CPU, torch.float32)
    given: dict[str, Any] = {"device": CPU, "dtype": torch.float32, "max_length": 256, "shared_prefixes": True}
    return proof.prove(config, load.untrained, attentions=names, **given)


def micro_batch(groups: list[tuple[int, tuple[int, ...]]], *, share: bool) -> Batch:
    """Answers are supervised, prompts are not."""
    made, sizes = [], []
    for number, (prompt, answers) in enumerate(groups):
        [given] = documents([prompt], seed=number, vocabulary=30)
        for index, answer in enumerate(documents(list(answers), seed=100 + number, vocabulary=30)):
            answer[0] = 10 + index  # answers differ from their first token on
            made.append((given + answer, [False] * prompt + [True] * len(answer)))
        sizes.append(len(answers))
    return pack_documents(
        made, group_sizes=tuple(sizes), sample_ids=(), position=0, max_length=64, share_prefixes=share
    )


def computed(folder: Path, batch: Batch, head: str) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Return log-probabilities [S], or rewards [D], and the gradients of a weighted sum of them."""
    model = build(folder, head=head, computed_by=SHARING, seed=3)
    policy = ModelPolicy(model.module)
    values = policy.token_logprobs(batch) if head == "lm" else policy.scores(batch)
    (values * torch.arange(1, len(values) + 1)).sum().backward()
    return values.detach(), {
        name: param.grad for name, param in model.module.named_parameters() if param.grad is not None
    }


@pytest.mark.parametrize("head", ["lm", "scalar"])
@pytest.mark.parametrize("kind", ["llama", "mistral"])
@pytest.mark.parametrize("case", GROUPS)
def test_values_and_gradients_are_the_same(tmp_path: Path, case: str, kind: str, head: str) -> None:
    folder = model_folder(kind, tmp_path / "model", **({"sliding_window": 4} if kind == "mistral" else {}))
    groups, saved = GROUPS[case]
    apart, together = (micro_batch(groups, share=share) for share in (False, True))
    assert apart.num_tokens - together.num_tokens == saved
    assert apart.labels_T[apart.labels_T != IGNORE].tolist() == together.labels_T[together.labels_T != IGNORE].tolist()
    right, gradients = computed(folder, apart, head)
    values, got = computed(folder, together, head)
    torch.testing.assert_close(values, right, rtol=1e-5, atol=1e-6)
    assert got.keys() == gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-4, atol=1e-5, msg=name)
    if head == "lm":
        torch.testing.assert_close(together.sum_by_document(values), apart.sum_by_document(right))


def test_what_attends_to_what_is_counted_once() -> None:
    """A prompt of 4 (3 of it shared) and answers of 2 and 3: 3 x 3 / 2 pairs, and those of each answer."""
    batch = micro_batch([(4, (2, 3))], share=True)
    visible = sum(range(1, 4)) + sum(range(4, 7)) + sum(range(4, 8))
    positions = batch.num_tokens
    assert batch.squared_lengths == 2 * visible - positions
    assert micro_batch([(4, (2, 3))], share=False).squared_lengths == 36 + 49


def test_answers_that_begin_alike_keep_their_labels() -> None:
    """The first supervised token ends what is shared, however far the answers agree."""
    one, two = [5, 6, 7, 8, 9], [5, 6, 7, 8, 4]
    trained = [False, False, True, True, True]
    batch = pack_documents(
        [(one, trained), (two, trained)],
        group_sizes=(2,), sample_ids=(), position=0, max_length=64, share_prefixes=True,
    )  # fmt: skip
    assert batch.input_ids_T.tolist() == [5, 6, 7, 8, 9, 6, 7, 8, 4]
    assert batch.position_ids_T.tolist() == [0, 1, 2, 3, 4, 1, 2, 3, 4]
    assert batch.labels_T.tolist() == [IGNORE, 7, 8, 9, IGNORE, 7, 8, 4, IGNORE]
    assert batch.keys_K is not None
    assert batch.keys_K.tolist() == [0, 0, 1, 2, 3, 4, 0, 5, 6, 7, 8]


@pytest.mark.parametrize(
    ("kind", "settings"),
    [("llama", {}), ("mistral", {"sliding_window": 8}), ("gemma2", {}), ("gpt_oss", {})],
)
def test_models_are_proven_with_it(kind: str, settings: dict[str, Any]) -> None:
    verdict = proven(small_config(kind, **settings))
    assert verdict.path is not None
    assert verdict.path.shared_prefixes, verdict.attempts


@pytest.mark.parametrize("kind", ["lfm2", "mamba"])
def test_what_looks_back_by_other_means_is_not_taken(kind: str) -> None:
    """Convolutions and states do not know where a prompt ends that lies elsewhere."""
    verdict = proven(small_config(kind))
    assert verdict.path is not None
    assert not verdict.path.shared_prefixes
    assert [attempt for attempt in verdict.attempts if attempt.path == SHARED_PREFIXES]


def test_keys_that_are_dropped_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    right = attention.varlen_attention

    def own_keys_alone(*given: Any, key_positions: Any = None, **rest: Any) -> Any:
        return right(*given, **rest)

    monkeypatch.setattr(attention, "varlen_attention", own_keys_alone)
    verdict = proven(small_config("llama"))
    monkeypatch.undo()
    attention.register()
    [attempt] = [attempt for attempt in verdict.attempts if attempt.path == SHARED_PREFIXES]
    assert "loss " in attempt.difference or "differs by" in attempt.difference
