"""Objectives on the model's own answers equal plain loops: one answer at a time, the paper's formula."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import batch, build, documents
from torch import Tensor

from distft.core.step_figures import add_figures, addable, read_figures
from distft.core.types import Batch
from distft.model.policy import ModelPolicy
from distft.objectives import OBJECTIVES
from distft.objectives.spec import Objective

PROMPT, LENGTHS, BUDGET = 3, [30, 7, 18, 5, 12, 21], 40
ADVANTAGE = torch.tensor([1.2, -0.7, 0.4, -1.5, 2.0, 0.1], dtype=torch.float64)
CLIP_LOW, CLIP_HIGH, BETA = 0.1, 0.15, 0.3
BOUNDS = {"token": (0.96, 1.05), "sequence": (0.8, 1.1)}
"""Of the correction's weights."""


def drift(length: int, seed: int, size: float) -> Tensor:
    """How far old, sampler's and reference's log-probabilities are from today's, by token."""
    return size * torch.randn(length, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def clipped(ratio: Tensor, advantage: Tensor) -> Tensor:
    """PPO's, written as its two cases: a ratio that has gone far enough the right way has no gradient."""
    if advantage > 0:
        return -torch.where(ratio > 1 + CLIP_HIGH, (1 + CLIP_HIGH) * advantage, ratio * advantage)
    return -torch.where(ratio < 1 - CLIP_LOW, (1 - CLIP_LOW) * advantage, ratio * advantage)


def plain(
    loss: str,
    now: list[Tensor],
    old: list[Tensor],
    ref: list[Tensor],
    sampler: list[Tensor],
    how: str,
    unbiased: bool,
    outside: str = "truncate",
) -> Tensor:
    losses, count = [], sum(len(tokens) for tokens in now)
    for index, tokens in enumerate(now):
        gap, advantage = tokens - old[index], ADVANTAGE[index]
        if loss == "cispo":
            by_token = -gap.exp().detach().clamp(max=1 + CLIP_HIGH) * advantage * tokens
        elif loss == "gspo":
            by_token = clipped(gap.mean().exp().expand(len(tokens)), advantage)
        elif loss == "sequence":
            by_token = clipped(gap.sum().exp(), advantage) / len(tokens) * torch.ones_like(tokens)
        else:
            by_token = clipped(gap.exp(), advantage)
        weight = (old[index] - sampler[index]).detach()
        if how != "none":
            weight = (weight if how == "token" else weight.sum()).exp()
            low, cap = BOUNDS[how]
            inside = (weight >= low) & (weight <= cap)
            bound = torch.where(weight > cap, cap, low)
            by_token = by_token * torch.where(inside, weight, bound if outside == "truncate" else 0.0)
        back = ref[index] - tokens
        level = {"gspo": gap.mean(), "sequence": gap.sum()}.get(loss, gap)
        by_token = by_token + BETA * (back.exp() - 1 - back) * (level.exp() if unbiased else 1.0)
        losses.append(
            by_token.sum() / count if loss in ("dapo", "cispo")
            else by_token.mean() / len(now) if loss in ("grpo", "gspo")
            else by_token.sum() / (len(now) * BUDGET) if loss == "dr_grpo"
            else by_token.sum() / len(now)
        )  # fmt: skip
    return torch.stack(losses).sum()


BOUNDED = {
    how: {"correction": how, "correction_floor": low, "correction_cap": cap} for how, (low, cap) in BOUNDS.items()
}
CASES = {
    **{f"grpo-{loss}": ("grpo", {"loss": loss}, loss, "none") for loss in ("grpo", "dapo", "dr_grpo", "gspo", "cispo")},
    "rloo": ("rloo", {}, "sequence", "none"),
    "reinforce": ("reinforce", {}, "sum", "none"),
    "biased": ("grpo", {"loss": "dapo", "unbiased_kl": False}, "dapo", "none"),
    "token": ("grpo", {"loss": "dapo", **BOUNDED["token"]}, "dapo", "token"),
    "sequence": ("grpo", {"loss": "grpo", **BOUNDED["sequence"]}, "grpo", "sequence"),
    "token-mask": ("grpo", {"correction_outside": "mask", **BOUNDED["token"]}, "dapo", "token"),
    "sequence-mask": (
        "rloo",
        {"correction_outside": "mask", **BOUNDED["sequence"]},
        "sequence",
        "sequence",
    ),
}


def columns(now: list[Tensor], old: list[Tensor], ref: list[Tensor], sampler: list[Tensor]) -> dict[str, Tensor]:
    ones = torch.ones(len(now), dtype=torch.float64)
    return {
        "advantage_D": ADVANTAGE, "counted_D": ones, "budget_D": BUDGET * ones, "reward_total_D": ADVANTAGE + 1,
        "truncated_D": 0 * ones, "unscored_D": 0 * ones, "equal_D": 0 * ones, "writing_s_D": ones, "judging_s_D": ones,
        "old_logprob_S": torch.cat(old),
        "ref_logprob_S": torch.cat(ref), "sampler_logprob_S": torch.cat(sampler),
    }  # fmt: skip


AT_TEMPERATURE = {"rloo": 0.6, "grpo-dapo": 1.7, "token": 0.6}


@pytest.mark.parametrize("case", [*CASES, *(f"{case}-at-{value}" for case, value in AT_TEMPERATURE.items())])
def test_loss_and_gradient_equal_a_plain_loop(tiny_config: Path, case: str) -> None:
    case, _, at = case.partition("-at-")
    temperature = float(at or 1.0)
    name, params, loss, how = CASES[case]
    spec = OBJECTIVES[name]
    rows = documents(LENGTHS)
    ours, theirs = build(tiny_config).module, build(tiny_config).module
    theirs.transformer.set_attn_implementation("eager")
    now = []
    for ids in rows:
        logits = (theirs.transformer(torch.tensor([ids])).logits[0, :-1].double() / temperature).log_softmax(-1)
        now.append(logits.gather(1, torch.tensor(ids[1:])[:, None])[PROMPT - 1 :, 0])
    old, ref, sampler = (
        [tokens.detach() + drift(len(tokens), 10 * seed + index, size) for index, tokens in enumerate(now)]
        for seed, size in ((1, 0.15), (2, 0.5), (3, 0.05))
    )
    expected = plain(loss, now, old, ref, sampler, how, params.get("unbiased_kl", True),
                     params.get("correction_outside", "truncate"))  # fmt: skip
    expected.backward()
    settings: dict[str, Any] = {"beta": BETA, "clip_low": CLIP_LOW, "clip_high": CLIP_HIGH, **params}
    policy = ModelPolicy(ours, temperature=temperature)
    objective = Objective(spec=spec, params=spec.params(**settings), policy=policy)
    made = replace(batch(rows, trained_from=PROMPT), group_sizes=(1,) * 6, columns=columns(now, old, ref, sampler))
    terms = objective.terms(made)
    value = terms.loss_sum / objective.denominator([made])
    value.backward()
    assert value.item() == pytest.approx(expected.item(), rel=1e-5)
    norm = math.sqrt(sum(param.grad.square().sum().item() for param in theirs.parameters()))
    assert norm > 1e-3
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert (mine.grad - other.grad).norm().item() <= 2e-5 * norm
    total, count = terms.figures["reward_total"].tolist()
    assert total / count == pytest.approx(float((ADVANTAGE + 1).mean()))
    gaps = [a - b for a, b in zip(old, sampler, strict=True)]
    weights = [gap.sum().exp() for gap in gaps] if how == "sequence" else torch.cat(gaps).exp().tolist()
    figures = read_figures(terms.figures, torch.cat(addable(terms.figures, rank=0, world=1)).tolist(), world=1)
    assert figures["sampler_gap_max"] == pytest.approx(max(float(gap.abs().max()) for gap in gaps), rel=1e-5)
    effective = float(sum(weights)) ** 2 / sum(float(weight) ** 2 for weight in weights)
    assert figures["sampler_ess"] == pytest.approx(effective / len(weights), rel=1e-5)
    if how != "none":
        low, cap = BOUNDS[how]
        outside = sum(not low <= float(weight) <= cap for weight in weights)
        assert 0 < outside < len(weights)
        assert figures["corrected_outside"] == pytest.approx(outside / len(weights))
    assert set(spec.figures(objective.params)) <= set(figures)


def test_figures_of_ranks_become_one() -> None:
    """Means, largest values and effective sample sizes of two ranks, one of which has seen nothing."""
    seen = {"gap": ([0.5], [0.25]), "mean": ([3.0, 2.0], [1.0, 2.0]), "share": ([3.0, 5.0, 2.0], [1.0, 1.0, 1.0])}
    empty = {"gap": ([-math.inf],), "mean": ([0.0, 0.0],), "share": ([0.0, 0.0, 0.0],)}
    ranks: list[dict[str, Tensor]] = []
    for given in (seen, empty):
        ranks.append({})
        for micro in range(len(given["gap"])):
            add_figures(ranks[-1], {name: torch.tensor(parts[micro]) for name, parts in given.items()})
    sums = sum(torch.cat(addable(figures, rank=rank, world=2)) for rank, figures in enumerate(ranks))
    assert isinstance(sums, Tensor)
    expected = {"gap": 0.5, "mean": 4 / 4, "share": 16 / 18}
    assert read_figures(ranks[0], sums.tolist(), world=2) == pytest.approx(expected)
    nothing = torch.cat(addable(ranks[1], rank=0, world=1)).tolist()
    assert all(math.isnan(value) for value in read_figures(ranks[1], nothing, world=1).values())
    lost = torch.cat(addable({"gap": torch.tensor([math.nan])}, rank=1, world=2)).tolist()
    assert math.isnan(read_figures({"gap": torch.tensor([math.nan])}, lost, world=2)["gap"])


def test_figures_say_what_was_clipped(tiny_config: Path) -> None:
    """By counts made here: ratios beyond the clip that the advantage would take further."""
    rows, module = documents(LENGTHS), build(tiny_config).module
    made: Batch = replace(batch(rows, trained_from=PROMPT), group_sizes=(1,) * 6)
    policy = ModelPolicy(module)
    flat = policy.token_logprobs(made).detach().double()
    now = list(flat.split([length - PROMPT for length in LENGTHS]))
    old = [tokens + drift(len(tokens), index, 0.3) for index, tokens in enumerate(now)]
    spec = OBJECTIVES["grpo"]
    params = spec.params(clip_low=CLIP_LOW, clip_high=CLIP_HIGH)
    terms = spec.terms(params, policy, replace(made, columns=columns(now, old, old, now)))
    ratios = [(a - b).exp() for a, b in zip(now, old, strict=True)]
    low = sum(int((r < 1 - CLIP_LOW).sum()) for r, a in zip(ratios, ADVANTAGE, strict=True) if a < 0)
    high = sum(int((r > 1 + CLIP_HIGH).sum()) for r, a in zip(ratios, ADVANTAGE, strict=True) if a > 0)
    assert min(low, high) >= 3
    assert terms.figures["clipped_low"].tolist() == [low, sum(LENGTHS) - 6 * PROMPT]
    assert terms.figures["clipped_high"].tolist() == [high, sum(LENGTHS) - 6 * PROMPT]
    gap = sum(float((a - b).abs().sum()) for a, b in zip(old, now, strict=True))
    assert terms.figures["sampler_gap"][0].item() == pytest.approx(gap, rel=1e-4)


KL, VF, CLIP_VALUE, GAMMA, LAM = 0.2, 0.3, 0.05, 0.95, 0.9


@pytest.mark.parametrize(
    ("estimator", "critic_is"), [("k1", "trunk"), ("k3", "trunk"), ("k3", "own"), ("k1", "own-lora")]
)
def test_ppo_equals_a_plain_loop(tiny_config: Path, estimator: str, critic_is: str) -> None:
    """Advantages from the sums that define them, not by the recursion; losses token by token.

    A critic of its own is transformers' model a second time, whose logits nobody looks at.
    """
    rows = documents(LENGTHS)
    own, method = critic_is != "trunk", "lora" if critic_is == "own-lora" else "full"
    ours = build(tiny_config, method, head="lm_critic" if own else "lm_value").module
    theirs = build(tiny_config, method).module
    reader = build(tiny_config).module if own else theirs
    for model in (theirs, reader):
        model.transformer.set_attn_implementation("eager")
    critic = torch.nn.Linear(64, 1)
    with torch.no_grad():
        critic.weight.copy_(0.3 * torch.randn(1, 64, generator=torch.Generator().manual_seed(5)))
        critic.bias.fill_(0.2)
        ours.value_head.weight.copy_(critic.weight)
        ours.value_head.bias.copy_(critic.bias)
    now, values = [], []
    for ids in rows:
        out = theirs.transformer(torch.tensor([ids]))
        read = reader.transformer(torch.tensor([ids]), output_hidden_states=True)
        logits = out.logits[0, :-1].double().log_softmax(-1)
        now.append(logits.gather(1, torch.tensor(ids[1:])[:, None])[PROMPT - 1 :, 0])
        values.append(critic(read.hidden_states[-1][0, PROMPT - 1 : -1])[:, 0].double())
    old, ref, old_value = (
        [tokens.detach() + drift(len(tokens), 10 * seed + index, 0.15) for index, tokens in enumerate(base)]
        for seed, base in ((1, now), (2, now), (3, values))
    )
    advantages, returns = [], []
    for index, reward in enumerate(ADVANTAGE):
        gap = ref[index] - old[index]
        paid = -KL * (-gap if estimator == "k1" else gap.exp() - 1 - gap)
        paid[-1] += reward
        after = torch.cat([old_value[index][1:], torch.zeros(1, dtype=torch.float64)])
        errors = paid + GAMMA * after - old_value[index]
        size = len(errors)
        made = [sum((GAMMA * LAM) ** (s - t) * errors[s] for s in range(t, size)) for t in range(size)]
        advantages.append(torch.stack([torch.as_tensor(value) for value in made]))
        returns.append(advantages[-1] + old_value[index])
    flat = torch.cat(advantages)
    white = ((flat - flat.mean()) * torch.rsqrt(flat.var() + 1e-8)).split([len(part) for part in advantages])
    losses = []
    for index, tokens in enumerate(now):
        for place, token in enumerate(tokens):
            advantage = white[index][place]
            policy_loss = clipped((token - old[index][place]).exp(), advantage)
            value, target, before = values[index][place], returns[index][place], old_value[index][place]
            kept = before + (value - before).clamp(-CLIP_VALUE, CLIP_VALUE)
            losses.append(policy_loss + VF * 0.5 * max((value - target) ** 2, (kept - target) ** 2))
    expected = torch.stack(losses).mean()
    expected.backward()

    spec = OBJECTIVES["ppo"]
    settings: dict[str, Any] = {"critic": "own" if own else "trunk"}
    settings |= {"beta": KL, "kl": estimator, "gamma": GAMMA, "lam": LAM, "vf_coef": VF, "clip_value": CLIP_VALUE}
    params = spec.params(clip_low=CLIP_LOW, clip_high=CLIP_HIGH, **settings)
    targets = params.token_targets(ADVANTAGE.tolist(), *([part.numpy() for part in of] for of in (old, ref, old_value)))
    columned = columns(now, old, ref, now) | {
        "advantage_S": torch.tensor(np.concatenate(targets[0])),
        "return_S": torch.tensor(np.concatenate(targets[1])),
        "old_value_S": torch.cat(old_value),
    }
    objective = Objective(spec=spec, params=params, policy=ModelPolicy(ours))
    made_batch = replace(batch(rows, trained_from=PROMPT), group_sizes=(1,) * 6, columns=columned)
    terms = objective.terms(made_batch)
    value = terms.loss_sum / objective.denominator([made_batch])
    value.backward()
    assert value.item() == pytest.approx(expected.item(), rel=1e-5)
    critics = zip((ours.value_head.weight, ours.value_head.bias), (critic.weight, critic.bias), strict=True)
    pairs = [*critics, *zip(ours.lm.parameters(), theirs.lm.parameters(), strict=True)]
    if own:
        trunk = [param for name, param in reader.transformer.named_parameters() if not name.startswith("lm_head")]
        pairs += zip(ours.critic.parameters(), trunk, strict=True)
        assert all(mine.requires_grad and mine.grad.any() for mine in ours.critic.parameters())
    pairs = [(mine, other) for mine, other in pairs if mine.requires_grad]
    norm = math.sqrt(sum(other.grad.square().sum().item() for _, other in pairs))
    for mine, other in pairs:
        assert (mine.grad - other.grad).norm().item() <= 2e-5 * norm
    shares = read_figures(terms.figures, torch.cat(addable(terms.figures, rank=0, world=1)).tolist(), world=1)
    assert shares["value"] == pytest.approx(torch.cat(values).mean().item(), rel=1e-4)
    assert 0.1 < shares["value_clipped"] < 0.9
    assert set(spec.figures(params)) <= set(terms.figures)


@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
def test_a_critic_of_its_own_starts_as_the_model_and_is_left_out(tiny_config: Path, method: str) -> None:
    """Whole and in the model's type under every method; forwards without values do not run it."""
    built = build(tiny_config, method, head="lm_critic")
    module, base = built.module, build(tiny_config).module
    started = dict(base.trunk.named_parameters())
    assert started.keys() == dict(module.critic.named_parameters()).keys()
    for name, param in module.critic.named_parameters():
        assert torch.equal(param, started[name]), name
        assert param.requires_grad, name
    assert [len(row) for row in built.rows] == [len(built.blocks) // 2] * 2
    assert not any("critic" in name for name, _ in module.lm.named_parameters())
    ran: list[int] = []
    module.critic.register_forward_hook(lambda *_: ran.append(1))
    made, policy = batch(documents([9, 4]), trained_from=PROMPT), ModelPolicy(module)
    policy.loss_sum(made)
    logprobs = policy.token_logprobs(made)
    assert not ran
    before, _ = policy.token_logprobs_and_values(made)
    assert ran
    assert torch.equal(before, logprobs)


def test_a_critic_starts_at_zero_and_is_not_what_is_saved(tiny_config: Path) -> None:
    built = build(tiny_config, head="lm_value")
    assert not built.module.value_head.weight.any()
    assert not built.module.value_head.bias.any()
    assert built.module.value_head.weight.requires_grad
    made = batch(documents([9, 4]), trained_from=PROMPT)
    logprobs, values = ModelPolicy(built.module).token_logprobs_and_values(made)
    assert torch.equal(logprobs, ModelPolicy(build(tiny_config).module).token_logprobs(made))
    assert values.tolist() == [0.0] * len(logprobs)
    assert not any("value_head" in name for name, _ in built.module.transformer.named_parameters())


NAN = math.nan
REWARDS = np.array([[1.0, 0.0, 0.0, 1.0], [2.0, NAN, 4.0, NAN], [3.0, 3.0, 3.0, 3.0], [NAN, NAN, NAN, NAN]])


def test_advantages_by_hand() -> None:
    grpo, rloo, reinforce = (OBJECTIVES[name].params for name in ("grpo", "rloo", "reinforce"))
    half = 0.5 / (math.sqrt(1 / 3) + 1e-4)
    wide = 1 / (math.sqrt(2) + 1e-4)
    expected = np.array([[half, -half, -half, half], [-wide, NAN, wide, NAN], [0.0] * 4, [NAN] * 4])
    np.testing.assert_allclose(grpo().advantages(REWARDS), expected)
    np.testing.assert_allclose(grpo(scale="none").advantages(REWARDS)[1], [-1, NAN, 1, NAN])
    known = REWARDS[~np.isnan(REWARDS)]
    spread = known.std(ddof=1) + 1e-4
    np.testing.assert_allclose(grpo(scale="batch").advantages(REWARDS)[0], np.array([0.5, -0.5, -0.5, 0.5]) / spread)
    np.testing.assert_allclose(rloo().advantages(REWARDS)[0], [2 / 3, -2 / 3, -2 / 3, 2 / 3])
    np.testing.assert_allclose(rloo().advantages(REWARDS)[1], [-2, NAN, 2, NAN])
    np.testing.assert_allclose(reinforce().advantages(REWARDS)[2], (3 - known.mean()) / spread)
