"""Mistakes in [rollout] and around objectives that train on the model's own answers: each named at its line."""

import pytest

from distft.catalog import REGISTRIES
from distft.core.errors import RecipeError
from distft.recipe import parse_recipe

MARK = "# <-"
GOOD = """
name = "run"
[model]
path = "some/model"
[method]
name = "METHOD"
[objective]
name = "grpo"
OBJECTIVE
[data]
packing = false
DATA
[[data.train]]
path = "train.jsonl"
[rollout]
ROLLOUT
[[rollout.rewards]]
name = "exact_match"
REWARD
[train]
max_steps = 10
TRAIN
"""
PLACES = ("METHOD", "OBJECTIVE", "DATA", "ROLLOUT", "REWARD", "TRAIN")
REPLACED: dict[str, tuple[dict[str, str], tuple[str, ...]]] = {
    "an unknown loss": ({"OBJECTIVE": 'loss = "ppo" # <-'}, ('must be one of "grpo", "dapo"',)),
    "a negative beta": ({"OBJECTIVE": "beta = -0.1 # <-"}, ("beta = -0.1", "number >= 0")),
    "a clip above 1": ({"OBJECTIVE": "clip_low = 1.5 # <-"}, ("number > 0 and < 1",)),
    "a cap below 1": ({"OBJECTIVE": 'correction = "token"\ncorrection_cap = 0.5 # <-'}, ("number >= 1",)),
    "TRL's epsilon": ({"OBJECTIVE": "epsilon = 0.2 # <-"}, ("epsilon = 0.2", "unknown key")),
    "another objective's key": ({"OBJECTIVE": "label_smoothing = 0.1 # <-"}, ("belongs to", "dpo")),
    "one answer": ({"ROLLOUT": "answers_per_prompt = 1 # <-"}, ("compares answers to one prompt", "ppo")),
    "no answers": ({"ROLLOUT": "answers_per_prompt = 0 # <-"}, ("whole number >= 1",)),
    "no tokens": ({"ROLLOUT": "max_new_tokens = 0 # <-"}, ("whole number >= 1",)),
    "no updates": ({"ROLLOUT": "updates = 0 # <-"}, ("whole number >= 1",)),
    "all may fail": ({"ROLLOUT": "max_unscored = 1.0 # <-"}, ("number >= 0 and < 1",)),
    "a key of [eval]": ({"ROLLOUT": "max_rows = 7 # <-"}, ("max_rows", "unknown key")),
    "the likeliest answers": ({"ROLLOUT": "temperature = 0.0 # <-"}, ("temperature = 0.0", "number > 0")),
    "no likely tokens": ({"ROLLOUT": "top_p = 0.0 # <-"}, ("top_p = 0.0", "number > 0 and <= 1")),
    "bounds of no correction": ({"OBJECTIVE": "correction_floor = 0.5 # <-"}, ("has no effect", '= "token"')),
    "a floor above 1": ({"OBJECTIVE": 'correction = "token"\ncorrection_floor = 2 # <-'}, ("number >= 0 and <= 1",)),
    "masks of no correction": ({"OBJECTIVE": 'correction_outside = "mask" # <-'}, ("has no effect",)),
    "a server, likely tokens and a temperature": (
        {"METHOD": "lora", "ROLLOUT": 'generator = "vllm"\ntemperature = 0.7\ntop_p = 0.9 # <-'},
        ("before the temperature or after top_p", "temperature = 1.0"),
    ),
    "a critic's model": ({"OBJECTIVE": 'value_model = "a/model" # <-'}, ("starts from [model] path", 'critic = "own"')),
    "a critic of no ppo": ({"OBJECTIVE": 'critic = "own" # <-'}, ("belongs to", "ppo")),
    "TRL's num_generations": ({"ROLLOUT": "num_generations = 8 # <-"}, ("num_generations", "unknown key")),
    "an unknown score": ({"REWARD": '[[rollout.rewards]]\nname = "exact" # <-'}, ("unknown score", "exact_match")),
    "a score's own key": ({"REWARD": "fields = 3 # <-"}, ("fields",)),
    "choices": ({"REWARD": '[[rollout.rewards]]\nname = "multiple_choice" # <-'}, ("weighs choices",)),
    "a figure that is not there": ({"REWARD": 'figure = "rouge1" # <-'}, ('"rouge1" is no figure', "exact_match")),
    "a weight of text": ({"REWARD": 'weight = "much" # <-'}, ("weight", "must be a number")),
    "a server for DoRA": (
        {"METHOD": 'lora"\ndora = true\n#"', "ROLLOUT": 'generator = "vllm" # <-'}, ("without [method] dora",),
    ),
    "a server for another adapter": (
        {"METHOD": "loha", "ROLLOUT": 'generator = { name = "vllm" } # <-'}, ('not the adapter of "loha"',),
    ),
    "a server's batches": (
        {"METHOD": "lora", "ROLLOUT": 'generator = "vllm"\nbatch_size = 4 # <-'}, ("has no effect", "remove it"),
    ),
    "an unknown generator": ({"ROLLOUT": 'generator = "sglang" # <-'}, ("unknown generator", "engine, vllm")),
    "a server without a scheme": (
        {"METHOD": "lora", "ROLLOUT": 'generator = { name = "vllm", url = "host:8000" } # <-'}, ("url", "https?://"),
    ),
    "a key that no server has": (
        {"METHOD": "lora", "ROLLOUT": 'generator = { name = "vllm", port = 8000 } # <-'}, ("port", "unknown key"),
    ),
    "a key of servers for the engine": (
        {"ROLLOUT": 'generator = { name = "engine", url = "http://a" } # <-'}, ("url", "unknown key"),
    ),
    "a rehearsal": ({"TRAIN": "rehearse = true # <-"}, ("answers have not been written yet",)),
    "compiled": ({"TRAIN": "compile = true # <-"}, ("micro-batches of one length",)),
    "dropout": (
        {"METHOD": 'lora"\ndropout = 0.1 # <-\n#"'}, ("answers are written without it", "dropout = 0.0"),
    ),
}  # fmt: skip
WHOLE = {
    "packed": (GOOD.replace("packing = false", "packing = true # <-"), ("prompts, one each", "packing = false")),
    "nothing is rewarded": (
        GOOD[: GOOD.index("[[rollout.rewards]]")].replace("[rollout]", "[rollout] # <-") + "[train]\nmax_steps = 1\n",
        ("rewards  is required",),
    ),
    "held-out rows": (
        GOOD.replace("[rollout]\n", '[[data.eval]] # <-\npath = "valid.jsonl"\n[rollout]\n'),
        ("has no loss to be measured", "[[eval.answers]]"),
    ),
    "a critic's key": (GOOD.replace("OBJECTIVE", "vf_coef = 0.1 # <-"), ("vf_coef", "ppo")),
    "another critic": (
        GOOD.replace('name = "grpo"', 'name = "ppo"').replace("OBJECTIVE", 'critic = "base" # <-'),
        ('must be one of "trunk", "own"',),
    ),
    "a critic without virtual tokens": (
        GOOD.replace('name = "grpo"', 'name = "ppo"').replace("OBJECTIVE", 'critic = "own" # <-')
        .replace("METHOD", "prefix_tuning"),
        ('virtual tokens of "prefix_tuning"', 'critic = "trunk"'),
    ),
    "no critic's loss": (
        GOOD.replace('name = "grpo"', 'name = "ppo"').replace("OBJECTIVE", "beta = 0.0\nvf_coef = 0.0 # <-"),
        ("number > 0",),
    ),
    "refilled, for a mean of all": (
        GOOD.replace('name = "grpo"', 'name = "reinforce"').replace("ROLLOUT", "refill = 2 # <-"),
        ('"reinforce" learns from prompts whose answers', "take grpo or rloo"),
    ),
    "nobody to imitate": (
        GOOD.replace('[objective]\nname = "grpo"', '[objective] # <-\nname = "distill"'), ("teacher  is required",),
    ),
    "nothing but the teacher": (
        GOOD.replace('name = "grpo"', 'name = "distill"\nteacher = "big"').replace("OBJECTIVE", "mixture = 1.0 # <-"),
        ("mixture = 1.0", "number > 0 and < 1"),
    ),
    "a penalty beside a teacher": (
        GOOD.replace('name = "grpo"', 'name = "distill"\nteacher = "big"').replace("OBJECTIVE", "beta = 0.1 # <-"),
        ("beta", "grpo"),
    ),
    "without the objective": (
        GOOD.replace('name = "grpo"', 'name = "sft"').replace("[rollout]", "[rollout] # <-"),
        ('objective "sft" trains on the answers of rows', "grpo, rloo, reinforce, ppo"),
    ),
}  # fmt: skip


def filled(values: dict[str, str]) -> str:
    text = GOOD
    for place in PLACES:
        text = text.replace(place, values.get(place, "full" if place == "METHOD" else ""))
    return text


CASES = {name: (filled(values), parts) for name, (values, parts) in REPLACED.items()}
CASES |= {name: (text.replace("METHOD", "full"), parts) for name, (text, parts) in WHOLE.items()}
CASES = {
    name: ("\n".join(line for line in text.splitlines() if line not in PLACES), parts)
    for name, (text, parts) in CASES.items()
}


def test_the_recipe_without_mistakes_loads() -> None:
    recipe = parse_recipe(filled({}), source="good.toml", registries=REGISTRIES)
    assert recipe.rollout.rewards[0]["name"] == "exact_match"
    assert recipe.rollout.rewards[0]["weight"] == 1.0
    again = parse_recipe(recipe.to_toml(), source="again.toml", registries=REGISTRIES)
    assert again == recipe


@pytest.mark.parametrize("name", CASES)
def test_a_mistake_is_named_at_its_line(name: str) -> None:
    text, parts = CASES[name]
    marked = [number for number, line in enumerate(text.splitlines(), start=1) if MARK in line]
    with pytest.raises(RecipeError) as caught:
        parse_recipe(text, source="recipe.toml", registries=REGISTRIES)
    (problem,) = caught.value.problems
    said = str(problem).replace(f" {MARK}", "")
    assert problem.line == (marked[0] if marked else None), said
    for part in parts:
        assert part in said
