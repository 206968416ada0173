"""An outsider agrees: the losses of TRL's GRPO and RLOO trainers on the same answers, weights and advantages.

Optional: needs TRL in the environment; installs nothing. Where the two mean different things by one name, the settings
make both the same: TRL's `epsilon_high` of cispo is the cap itself, and its KL of RLOO is taken off the reward.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from data_kit import save_tokenizer
from tiny import batch, build, documents
from torch import Tensor

from distft.core.step_figures import addable, read_figures
from distft.model.policy import ModelPolicy
from distft.objectives import OBJECTIVES
from distft.objectives.spec import Objective

trl = pytest.importorskip("trl", reason="TRL is not installed")

PROMPT, LENGTHS, BUDGET, LOW, HIGH, BETA = 3, [30, 7, 18, 5, 12, 21], 40, 0.1, 0.15, 0.3
ADVANTAGE = torch.tensor([1.2, -0.7, 0.4, -1.5, 2.0, 0.1])
GRPO = {
    "grpo": {"loss_type": "grpo"},
    "dapo": {"loss_type": "dapo"},
    "dr_grpo": {"loss_type": "dr_grpo"},
    "cispo": {"loss_type": "cispo", "epsilon_high": 1 + HIGH},
    "gspo": {"loss_type": "grpo", "importance_sampling_level": "sequence"},
}


def near(length: int, seed: int, size: float) -> Tensor:
    return size * torch.randn(length, generator=torch.Generator().manual_seed(seed))


def trainer(kind: str, model: Any, tokenizer: Path, folder: Path, **settings: Any) -> Any:
    from datasets import Dataset
    from transformers import AutoTokenizer

    config = getattr(trl, f"{kind}Config")(
        output_dir=str(folder), per_device_train_batch_size=len(LENGTHS), num_generations=len(LENGTHS), use_cpu=True,
        max_completion_length=BUDGET, bf16=False, report_to=[], gradient_checkpointing=False,
        **({"epsilon": LOW, "epsilon_high": HIGH, "temperature": 1.0} | settings),
    )  # fmt: skip
    made = getattr(trl, f"{kind}Trainer")(
        model=model, reward_funcs=lambda completions, **_: [0.0] * len(completions), args=config,
        train_dataset=Dataset.from_list([{"prompt": "a"}]),
        processing_class=AutoTokenizer.from_pretrained(tokenizer),
    )  # fmt: skip
    made.current_gradient_accumulation_steps = 1
    return made


def padded(values: list[Tensor]) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence(values, batch_first=True)


@pytest.mark.slow
@pytest.mark.parametrize("case", [*GRPO, "rloo", "dapo at 0.6", "rloo at 1.4"])
def test_trl_has_the_same_loss_and_gradient(tiny_config: Path, tmp_path: Path, case: str) -> None:
    case, _, at = case.partition(" at ")
    temperature = float(at or 1.0)
    rows = documents(LENGTHS)
    ours, theirs = build(tiny_config).module, build(tiny_config).module
    made: Any = replace(batch(rows, trained_from=PROMPT), group_sizes=(1,) * len(rows))
    policy = ModelPolicy(ours, temperature=temperature)
    now = policy.token_logprobs(made).detach().split([length - PROMPT for length in LENGTHS])
    old, ref = (
        [tokens + near(len(tokens), 10 * seed + index, size) for index, tokens in enumerate(now)]
        for seed, size in ((1, 0.1), (2, 0.5))
    )
    lm = theirs.transformer
    lm.set_attn_implementation("eager")
    save_tokenizer(tmp_path / "tokenizer")
    kind = "RLOO" if case == "rloo" else "GRPO"
    beta = 0.0 if kind == "RLOO" else BETA
    made_by_trl = trainer(kind, lm, tmp_path / "tokenizer", tmp_path / "out", beta=0.0,
                          temperature=temperature, **GRPO.get(case, {}))  # fmt: skip
    made_by_trl.beta = beta  # at construction it would load a reference model, whose figures are injected here
    answers = [torch.tensor(ids[PROMPT:]) for ids in rows]
    mask = padded([torch.ones(len(ids), dtype=torch.long) for ids in answers])
    prompts = torch.tensor([ids[:PROMPT] for ids in rows])
    given = {
        "prompt_ids": prompts, "prompt_mask": torch.ones_like(prompts), "completion_ids": padded(answers),
        "completion_mask": mask, "advantages": ADVANTAGE, "old_per_token_logps": padded(old),
        "ref_per_token_logps": padded(ref), "num_items_in_batch": mask.sum(),
        "old_logps": torch.stack([tokens.sum() for tokens in old]),
    }  # fmt: skip
    lm.train()
    expected = made_by_trl._compute_loss(lm, given)
    expected.backward()

    ones = torch.ones(len(rows), dtype=torch.float64)
    columns = {f"{name}_D": 0 * ones for name in ("truncated", "unscored", "equal", "writing_s", "judging_s")}
    columns |= {"advantage_D": ADVANTAGE.double(), "counted_D": ones, "budget_D": BUDGET * ones}
    columns |= {"reward_total_D": ones, "old_logprob_S": torch.cat(old), "ref_logprob_S": torch.cat(ref)}
    columns |= {"sampler_logprob_S": torch.cat(old)}
    spec = OBJECTIVES["rloo" if kind == "RLOO" else "grpo"]
    chosen = {"clip_low": LOW, "clip_high": HIGH, "beta": beta} | ({} if kind == "RLOO" else {"loss": case})
    objective = Objective(spec=spec, params=spec.params(**chosen), policy=policy)
    filled = replace(made, columns=columns)
    value = objective.terms(filled).loss_sum / objective.denominator([filled])
    value.backward()
    assert value.item() == pytest.approx(expected.item(), rel=1e-4)
    norm = math.sqrt(sum(param.grad.square().sum().item() for param in lm.parameters()))
    assert norm > 1e-3
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert (mine.grad - other.grad).norm().item() <= 1e-4 * norm


MODES = {"token": (0.96, 1.05), "sequence": (0.9, 1.1)}
"""Bounds of weights: some are outside."""


@pytest.mark.slow
@pytest.mark.parametrize("outside", ["truncate", "mask"])
@pytest.mark.parametrize("how", [*MODES])
def test_trl_corrects_and_reports_the_same(tiny_config: Path, tmp_path: Path, how: str, outside: str) -> None:
    """Weights by TRL's own code for answers of a vLLM server, which here says what is injected."""
    low, cap = MODES[how]
    rows = documents(LENGTHS)
    ours, theirs = build(tiny_config).module, build(tiny_config).module
    made: Any = replace(batch(rows, trained_from=PROMPT), group_sizes=(1,) * len(rows))
    policy = ModelPolicy(ours)
    now = policy.token_logprobs(made).detach().split([length - PROMPT for length in LENGTHS])
    sampler = [tokens + near(len(tokens), 20 + index, 0.05) for index, tokens in enumerate(now)]
    lm = theirs.transformer
    lm.set_attn_implementation("eager")
    save_tokenizer(tmp_path / "tokenizer")
    peer = trainer("GRPO", lm, tmp_path / "tokenizer", tmp_path / "out", beta=0.0, loss_type="dapo")
    peer.use_vllm, peer.vllm_importance_sampling_correction = True, True
    peer.vllm_importance_sampling_mode = f"{how}_{outside}"
    peer.vllm_importance_sampling_clip_min, peer.vllm_importance_sampling_clip_max = low, cap
    prompts, answers = [ids[:PROMPT] for ids in rows], [ids[PROMPT:] for ids in rows]
    said = [tokens.tolist() for tokens in sampler]
    peer._generate = lambda _: (prompts, answers, None, ["a"] * len(rows), said, {}, None, None)
    lm.train()
    given = peer._generate_and_score_completions([{"prompt": "a"}] * len(rows)) | {"advantages": ADVANTAGE}
    expected = peer._compute_loss(lm, given)
    expected.backward()

    ones = torch.ones(len(rows), dtype=torch.float64)
    columns = {f"{name}_D": 0 * ones for name in ("truncated", "unscored", "equal", "writing_s", "judging_s")}
    columns |= {"advantage_D": ADVANTAGE.double(), "counted_D": ones, "budget_D": BUDGET * ones}
    columns |= {"reward_total_D": ones, "sampler_logprob_S": torch.cat(sampler)}
    spec = OBJECTIVES["grpo"]
    bounds = {"correction_outside": outside, "correction_floor": low, "correction_cap": cap}
    params = spec.params(clip_low=LOW, clip_high=HIGH, correction=how, **bounds)
    objective, filled = Objective(spec=spec, params=params, policy=policy), replace(made, columns=columns)
    terms = objective.terms(filled)
    value = terms.loss_sum / objective.denominator([filled])
    value.backward()
    assert value.item() == pytest.approx(expected.item(), rel=1e-4)
    norm = math.sqrt(sum(param.grad.square().sum().item() for param in lm.parameters()))
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert (mine.grad - other.grad).norm().item() <= 1e-4 * norm
    figures = read_figures(terms.figures, torch.cat(addable(terms.figures, rank=0, world=1)).tolist(), world=1)
    logged = {name: values[-1] for name, values in peer._metrics["train"].items()}
    assert 0 < figures["corrected_outside"] < 1
    assert figures["sampler_gap"] == pytest.approx(logged["sampling/sampling_logp_difference/mean"], rel=1e-4)
    assert figures["sampler_gap_max"] == pytest.approx(logged["sampling/sampling_logp_difference/max"], rel=1e-4)
    assert logged["sampling/importance_sampling_ratio/min"] == pytest.approx(low if outside == "truncate" else 0.0)
