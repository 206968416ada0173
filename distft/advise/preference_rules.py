"""Rules on what is trained: right answers, preferences between answers, or a reward model; and with which settings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from distft.advise.situation import Rule, Situation, SoFar, always, gives, is_adapter
from distft.advise.sources import (
    ETHAYARAJH,
    HANDBOOK,
    HONG,
    LLAMA2,
    MENG,
    OUYANG,
    RAFAILOV,
    SCHULMAN,
    SHAO,
    TUNSTALL,
)

FEW_PREFERENCES = 1000
LENGTH_DECIDES = 0.75
"""Share of pairs with the longer (or the shorter) answer chosen from which length alone tells most of them apart."""


def _is(*objectives: str) -> Callable[[Situation, SoFar], bool]:
    return lambda _, so_far: so_far["objective"] in objectives


def _rate(adapters: float, all_weights: float) -> Callable[[Situation, SoFar], Any]:
    return lambda _, so_far: adapters if is_adapter(so_far) else all_weights


def _pairs(situation: Situation) -> bool:
    return situation.rows_hold == "pairs"


def _length_decides(situation: Situation) -> bool:
    return situation.longer is not None and max(situation.longer, 1 - situation.longer) >= LENGTH_DECIDES


PREFERENCE_RULES: tuple[Rule, ...] = (
    Rule(
        name="a-signal-is-a-reward-model",
        decides="objective",
        says="A signal for reinforcement learning or best-of-n: a reward model on pairs.",
        why="What is optimised or sampled needs a number for any answer. Look at its accuracy and calibration on "
        "held-out pairs first: a policy finds whatever the reward model has wrong.",
        source=f"{OUYANG}; Gao et al. 2022, https://arxiv.org/abs/2210.10760",
        when=lambda situation, _: situation.goal == "reward",
        gives=gives("reward"),
    ),
    Rule(
        name="labels-are-kto",
        decides="objective",
        says="Single answers that are labelled as good or bad, no pairs: KTO.",
        why="Thumbs and complaints come one at a time; it takes them as they are, and from 1B to 30B did as well as "
        "DPO on pairs.",
        source=ETHAYARAJH,
        when=lambda situation, _: situation.rows_hold == "labels",
        gives=gives("kto"),
    ),
    Rule(
        name="one-stage-is-orpo",
        decides="objective",
        says="Pairs and a model without supervised fine-tuning (`--pretrained`): ORPO, both in one stage.",
        why="Its loss holds the likelihood of the chosen answer; DPO only moves a policy that can answer already.",
        source=HONG,
        when=lambda situation, _: _pairs(situation) and situation.pretrained,
        gives=gives("orpo"),
    ),
    Rule(
        name="lengths-that-differ-are-simpo",
        decides="objective",
        says="Pairs of which length alone tells three in four: SimPO.",
        why="Its reward is a mean per token. DPO's is a sum over them, and learns to write longer answers first.",
        source=f"{MENG}; Park et al. 2024, https://arxiv.org/abs/2403.19159",
        when=lambda situation, _: _pairs(situation) and _length_decides(situation),
        gives=gives("simpo"),
    ),
    Rule(
        name="pairs-are-dpo",
        decides="objective",
        says="Other pairs: DPO, on a model that is fine-tuned already, such as by SFT on the chosen answers.",
        why="No reward model and no sampling, a reference that keeps the policy near what it can do, and the most "
        "experience of all.",
        source=f"{RAFAILOV}; {TUNSTALL}",
        when=lambda situation, _: _pairs(situation),
        gives=gives("dpo"),
    ),
    Rule(
        name="prompts-are-graded",
        decides="objective",
        says="Prompts without answers, and a grader that says what an answer is worth: GRPO.",
        why="The model learns from what it writes itself, each answer against the others to its prompt, so that no "
        "second model has to learn what an answer is worth. A prompt whose answers are all worth the same teaches "
        "nothing.",
        source=SHAO,
        when=lambda situation, _: situation.rows_hold == "prompts",
        gives=gives("grpo"),
    ),
    Rule(
        name="answers-are-supervised",
        decides="objective",
        says="Rows with right answers: supervised fine-tuning; preferences come after it, if at all.",
        why="Preferences refine a model that can do the task; they are for where several answers are right and some "
        "are better.",
        source=f"{OUYANG}; {TUNSTALL}",
        when=always,
        gives=gives("sft"),
    ),
    Rule(
        name="beta-of-simpo",
        decides="beta",
        says="SimPO: beta 2.5.",
        why="It scales a mean per token, not a sum; 2 to 2.5 did best on four models.",
        source=MENG,
        when=_is("simpo"),
        gives=gives(2.5),
    ),
    Rule(
        name="beta-of-a-tenth",
        decides="beta",
        says="DPO, KTO and ORPO: beta 0.1.",
        why="Where the papers started. Smaller lets the policy go further from its reference, larger holds it; for "
        "ORPO it is the weight of the odds ratio beside the likelihood.",
        source=f"{RAFAILOV}; {ETHAYARAJH}; {HONG}",
        when=_is("dpo", "kto", "orpo"),
        gives=gives(0.1),
    ),
    Rule(
        name="few-pairs-keep-the-likelihood",
        decides="sft_weight",
        says=f"DPO on fewer than {FEW_PREFERENCES:,} pairs: the chosen answer's likelihood beside it, sft_weight = 1.",
        why="The margin of a few pairs, above all of pairs that are nearly alike, widens soonest by making both "
        "answers unlikely; this term holds the chosen one.",
        source="Pang et al. 2024, RPO, https://arxiv.org/abs/2404.19733; Pal et al. 2024, "
        "https://arxiv.org/abs/2402.13228",
        when=lambda situation, so_far: so_far["objective"] == "dpo" and situation.rows < FEW_PREFERENCES,
        gives=gives(1.0),
    ),
    Rule(
        name="rewards-around-zero",
        decides="center",
        says="Reward models: center 0.01.",
        why="Pairs say nothing of where rewards lie; a small pull to zero makes them comparable between prompts.",
        source="Eisenstein et al. 2023, https://arxiv.org/abs/2312.09244",
        when=_is("reward"),
        gives=gives(0.01),
    ),
    Rule(
        name="rate-of-reward-models",
        decides="learning_rate",
        says="Reward models: 1e-5 for all weights, 1e-4 for adapters.",
        why="Llama 2's rate below 70B, and ten times that for LoRA.",
        source=f"{LLAMA2}; {SCHULMAN}",
        when=_is("reward"),
        gives=_rate(1e-4, 1e-5),
    ),
    Rule(
        name="rate-of-orpo",
        decides="learning_rate",
        says="ORPO: 5e-6 for all weights, 5e-5 for adapters.",
        why="Zephyr's ORPO recipes. Above DPO's, because its supervised part has to teach.",
        source=f"{HONG}; {HANDBOOK}",
        when=_is("orpo"),
        gives=_rate(5e-5, 5e-6),
    ),
    Rule(
        name="rate-of-graded-answers",
        decides="learning_rate",
        says="GRPO: 1e-6 for all weights, 1e-5 for adapters.",
        why="DeepSeekMath's rate, and ten times that for LoRA.",
        source=f"{SHAO}; {SCHULMAN}",
        when=_is("grpo"),
        gives=_rate(1e-5, 1e-6),
    ),
    Rule(
        name="rate-of-preferences",
        decides="learning_rate",
        says="DPO, KTO and SimPO: 5e-7 for all weights, 5e-6 for adapters.",
        why="Zephyr's DPO recipes; a fortieth of supervised fine-tuning's, because these break a model sooner than "
        "they teach one.",
        source=f"{TUNSTALL}; {HANDBOOK}; {MENG}",
        when=_is("dpo", "kto", "simpo"),
        gives=_rate(5e-6, 5e-7),
    ),
    Rule(
        name="epochs-of-few-preferences",
        decides="epochs",
        says=f"DPO, KTO and SimPO below {FEW_PREFERENCES:,} rows: 3 epochs.",
        why="Zephyr's DPO knew its training pairs after one epoch, and still gained until the third.",
        source=TUNSTALL,
        when=lambda situation, so_far: (
            so_far["objective"] in ("dpo", "kto", "simpo") and situation.rows < FEW_PREFERENCES
        ),
        gives=gives(3),
    ),
    Rule(
        name="one-epoch-of-preferences",
        decides="epochs",
        says="From there on, and for reward models of any number of pairs: 1 epoch.",
        why="A second pass widens the margin and seldom betters the answers; reward models overfit in it.",
        source=f"{HANDBOOK}; {OUYANG}; {LLAMA2}",
        when=_is("dpo", "kto", "simpo", "reward"),
        gives=gives(1),
    ),
)
