"""What a block and the head may cost (see `budgets`): a change that adds a pass over [tokens, width] fails."""

from typing import Any

import budgets
import pytest
from budgets import Count

EAGER = {
    # operators, passes over bf16 [tokens, width], largest result in the same unit
    "full": (116, 366.0, 3.5),
    "lora": (161, 403.5, 3.5),
    "qlora": (182, 412.0, 3.5),
}
COMPILED = {"full": (40, 173.5), "lora": (88, 214.0)}
WORST_COMPILED = 1.25
"""Of the least possible."""


@pytest.fixture(scope="module")
def eager() -> dict[str, Count]:
    return {method: budgets.eager(method) for method in EAGER}


@pytest.fixture(scope="module")
def compiled() -> dict[str, Count]:
    return {method: budgets.compiled(method) for method in COMPILED}


def spent(count: Count) -> dict[str, Any]:
    return dict(sorted(count.by_name.items(), key=lambda row: -row[1][1]))


@pytest.mark.parametrize("method", EAGER)
def test_a_block_without_compile(eager: dict[str, Count], method: str) -> None:
    operators, passes, largest = EAGER[method]
    count = eager[method]
    assert count.operators <= operators, spent(count)
    assert count.passes <= passes, spent(count)
    assert count.largest <= largest, spent(count)
    assert count.waits == 0, "the host waits for the device"


@pytest.mark.slow
@pytest.mark.parametrize("method", COMPILED)
def test_a_compiled_block_is_one_graph_near_the_least_possible(compiled: dict[str, Count], method: str) -> None:
    operators, passes = COMPILED[method]
    count = compiled[method]
    assert count.operators <= operators, spent(count)
    assert count.passes <= passes, spent(count)
    assert count.passes <= WORST_COMPILED * budgets.least(method)


def test_adapters_cost_less_than_peft_s_own(eager: dict[str, Count]) -> None:
    for method, share in (("lora", 0.80), ("qlora", 0.78)):
        assert eager[method].passes <= share * budgets.eager(method, peft=True).passes


def test_a_pass_more_is_seen(eager: dict[str, Count], monkeypatch: pytest.MonkeyPatch) -> None:
    """The count is no constant: a copy of the attention's output, forward and backward, is four passes."""
    plain = budgets._one_document
    monkeypatch.setattr(budgets, "_one_document", lambda *given, **rest: (plain(*given, **rest)[0].clone(), None))
    assert budgets.eager("full").passes == pytest.approx(eager["full"].passes + 2, abs=0.1)


@pytest.mark.slow
def test_the_head_spends_passes_for_memory() -> None:
    """Its fp32 weight gradient is the largest thing it makes; the logits of all tokens would be as large again."""
    ours, whole = budgets.head("chunked"), budgets.head("all logits")
    gradient = 4 * budgets.VOCABULARY * budgets.WIDTH / budgets.UNIT
    assert ours.largest == pytest.approx(gradient)
    assert {name for name, (_, passes) in ours.by_name.items() if passes > 400} == {"mm", "add_"}, spent(ours)
    assert ours.operators <= 180, spent(ours)
    assert ours.passes <= 2541, spent(ours)
    assert ours.waits == whole.waits == 0
    assert whole.passes <= 880
