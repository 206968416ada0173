"""Training on the model's own answers: the same on every engine, however it is cut, and after a stop anywhere."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from harness import STEPS, WHOLE_GRIDS, Bench, Run, label
from transformers import AutoConfig, AutoModelForCausalLM

from distft.eval.command import evaluate
from distft.eval.subject import choose, read

REWARD = 'rollout={answers_per_prompt=4, max_new_tokens=12, updates=UPDATES, rewards=[{name="function", function='
REWARD += '"reward_of_letters:judge"}, {name="regex", pattern="[aeiou]", weight=0.25}]}'
REFILL = 'rollout={answers_per_prompt=2, max_new_tokens=12, updates=UPDATES, refill=2, rewards=[{name="regex", '
REFILL += 'pattern="[aeiou]"}]}'
"""Rewards of 0 and 1, which are often equal."""
METHODS = {
    "full": ['method.name="full"'],
    "lora": ['method={name="lora", r=4}'],
    "qlora": ['method={name="qlora", r=4}'],
}
OBJECTIVES = {
    "dapo": 'objective={name="grpo", clip_low=0.02, clip_high=0.02, beta=0.1}',
    "grpo-kl": 'objective={name="grpo", loss="grpo", beta=0.1}',
    "dr_grpo": 'objective={name="grpo", loss="dr_grpo", scale="none"}',
    "rloo": 'objective={name="rloo"}',
    "reinforce": 'objective={name="reinforce"}',
    "distill": 'objective={name="distill", teacher="TEACHER", divergence="js", mixture=0.3}',
    "ppo": 'objective={name="ppo", beta=0.0, clip_value=0.02}',
    "ppo-kl": 'objective={name="ppo", beta=0.1, kl="k3"}',
    "ppo-own": 'objective={name="ppo", critic="own", beta=0.1}',
}
AT_TEMPERATURE = ("ppo-kl", "grpo-kl")
"""With a reference, whose log-probabilities are at it too."""
OF_LIKELY_TOKENS = ("dapo", "distill")
"""Drawn from them; what is said of them is as of all tokens."""
CASES = {
    "dapo-full-3": ("dapo", "full", 3),
    "ppo-kl-lora-3": ("ppo-kl", "lora", 3),
    "distill-lora-1": ("distill", "lora", 1),
}
if WHOLE_GRIDS:
    CASES |= {
        "dapo-full-1": ("dapo", "full", 1),
        "grpo-kl-lora-2": ("grpo-kl", "lora", 2),
        "dr_grpo-full-1": ("dr_grpo", "full", 1),
        "rloo-qlora-1": ("rloo", "qlora", 1),
        "reinforce-full-2": ("reinforce", "full", 2),
        "grpo-kl-qlora-1": ("grpo-kl", "qlora", 1),
        "distill-full-1": ("distill", "full", 1),
        "ppo-full-1": ("ppo", "full", 1),
        "ppo-kl-full-2": ("ppo-kl", "full", 2),
        "ppo-own-lora-2": ("ppo-own", "lora", 2),
        "refill-full-3": ("dapo", "full", 3),
    }
"""Name -> objective, method and updates on the same answers."""
STOPPED = [case for case in CASES if WHOLE_GRIDS or case.startswith("dapo")]
"""Those that are also stopped, and gone on with."""
LAYOUTS = [("ddp", 2), ("zero3", 2), ("fsdp2", 2), ("fsdp2", 4)] if WHOLE_GRIDS else [("fsdp2", 2)]
CUT = 4
"""In the middle of three updates on the same answers, and between two pairs."""


def overrides(engine: str, case: str, *more: str, micro: int = 1) -> list[str]:
    objective, method, updates = CASES[case]
    return [
        f'engine.name="{engine}"', *METHODS[method], OBJECTIVES[objective],
        (REFILL if case.startswith("refill") else REWARD).replace("UPDATES", str(updates)),
        *(["rollout.temperature=0.8"] if objective in AT_TEMPERATURE else []),
        *(["rollout.top_p=0.9"] if objective in OF_LIKELY_TOKENS else []),
        "data.packing=false", "data.eval=[]", "data.max_length=272", f"train.max_steps={STEPS}",
        f"train.micro_batch_size={micro}", 'checkpoint.every_steps="off"', "optim.learning_rate=3e-3", *more,
    ]  # fmt: skip


def make_teacher(bench: Bench) -> None:
    """Make a model of the same tokenizer that is wider, deeper, and has an untied head filled up by a few rows."""
    folder = bench.folder / "teacher"
    config = AutoConfig.from_pretrained(bench.folder / "model")
    config.hidden_size, config.num_hidden_layers, config.vocab_size = 96, 3, config.vocab_size + 5
    config.num_attention_heads, config.num_key_value_heads, config.head_dim = 4, 2, 24
    config.tie_word_embeddings = False
    torch.manual_seed(11)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((bench.folder / "model" / name).read_bytes())


def launch(bench: Bench, layout: tuple[str, int], tag: str) -> dict[str, Run]:
    """Each case whole, cut and gone on with; alone also with a larger micro-batch."""
    engine, world = layout
    cases, extra = {}, {}
    if not (bench.folder / "teacher").exists():
        make_teacher(bench)
    for case in CASES:
        cases[case] = overrides(engine, case)
        if world == 1:
            cases[f"micro-{case}"] = overrides(engine, case, micro=4)
    for case in STOPPED:
        cases[f"cut-{case}"] = cases[case]
        extra[f"cut-{case}"] = {"fault": f"term:rank={world - 1},point=step,step={CUT};raise:point={case}"}
    teacher = str(bench.folder / "teacher")
    cases = {name: [value.replace("TEACHER", teacher) for value in case] for name, case in cases.items()}
    runs = bench.launch(world, cases, tag=tag, extra=extra, timeout_s=1800)
    for name in extra:
        assert f"after step {CUT}; the state is saved" in runs[name].error, runs[name].error
    return runs | bench.launch(world, {name: cases[name] for name in extra}, tag=tag, timeout_s=1800)


@pytest.fixture(scope="module")
def solo(bench: Bench) -> dict[str, Run]:
    return launch(bench, ("solo", 1), "rollouts-solo")


@pytest.fixture(scope="module", params=LAYOUTS, ids=label)
def several(request: pytest.FixtureRequest, bench: Bench, solo: dict[str, Run]) -> dict[str, Run]:
    return launch(bench, request.param, f"rollouts-{label(request.param)}")


def answers(run: Run) -> list[tuple[str, ...]]:
    """Everything that was written and what it was worth, without what rounds otherwise on other ranks."""
    assert run.folder is not None
    lines = [
        json.loads(line)
        for path in sorted((run.folder / "rollouts").glob("step-*.jsonl"))
        for line in path.read_text().splitlines()
    ]
    return [(line["id"], line["number"], line["answer"], str(line["rewards"]), line["unscored"]) for line in lines]


def weights(run: Run) -> str:
    assert run.folder is not None
    files = sorted((run.folder / "final").glob("*.safetensors"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


REFILL_FIGURES = ("reward_regex", "refilled_answers", "written_per_answer", "equal_answers")
FIGURES = ("loss", "grad_norm", "kl", "reward_total", "reward_function", "answer_tokens", "tokens", "tokens_loss")


def test_ranks_engines_and_micro_batches_write_and_learn_the_same(
    several: dict[str, Run], solo: dict[str, Run]
) -> None:
    for case in CASES:
        reference = solo[case]
        for run in (several[case], solo[f"micro-{case}"]):
            assert answers(run) == answers(reference), case
            refills = case.startswith("refill")
            for figure in (
                (*REFILL_FIGURES, *(name for name in FIGURES if name != "reward_function")) if refills else FIGURES
            ):
                right = reference.column(figure) if figure in reference.steps[0] else []
                assert (run.column(figure) if right else []) == pytest.approx(right, rel=1e-4, abs=1e-6), (case, figure)
            if refills:
                assert 0 < max(run.column("refilled_answers")) < 1, "some groups were equal, and some were not"
                assert 1 < max(run.column("written_per_answer")) <= 3
        for run in (several[case], reference):
            assert 0 < run.column("sampler_gap")[0] < 1e-5, "what is trained is what has written"
            assert run.column("sampler_gap")[0] < run.column("sampler_gap_max")[0] < 1e-4
            assert run.column("sampler_ess")[0] == pytest.approx(1, abs=1e-8)


def test_a_teacher_is_approached(solo: dict[str, Run]) -> None:
    divergence = solo["distill-lora-1"].column("divergence")
    assert solo["distill-lora-1"].column("loss") == pytest.approx(divergence, rel=1e-6)
    assert max(divergence[-2:]) < min(divergence[:2]), divergence


def test_runs_are_looked_at_again(solo: dict[str, Run], tmp_path: Path) -> None:
    """Neither a teacher nor the weights of before training are needed to ask the models."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"prompt": "disk", "completion": "full"}) + "\n")
    answers = f'eval.answers=[{{name="asked", path="{rows}", max_new_tokens=4, scores=[{{name="exact_match"}}]}}]'
    for case in ("dapo-full-3", "distill-lora-1"):
        run = solo[case]
        assert run.folder is not None
        recipe, folder = read(str(run.folder), [answers], None)
        for model in ("base", "final"):
            evaluate(choose(recipe, folder, model, f"{model}-again"))
            assert (run.folder / f"eval/{model}-again/asked.jsonl").is_file(), case


def test_a_stop_changes_nothing(several: dict[str, Run], solo: dict[str, Run]) -> None:
    """Also among several updates on the same answers, whose probabilities are those of weights that are gone."""
    for runs in (solo, several):
        for case in STOPPED:
            whole, cut = runs[case], runs[f"cut-{case}"]
            assert cut.column("loss") == whole.column("loss"), case
            assert weights(cut) == weights(whole), case
            assert answers(cut) == answers(whole), case


def test_what_is_kept_of_a_rollout(solo: dict[str, Run]) -> None:
    run = solo["dapo-full-3"]
    assert run.folder is not None
    names = sorted(path.name for path in (run.folder / "rollouts").glob("*.jsonl"))
    assert names == ["step-00000000.jsonl", "step-00000003.jsonl"]
    lines = [json.loads(line) for line in (run.folder / "rollouts" / names[0]).read_text().splitlines()]
    assert len(lines) == 8 * 4
    for group in (lines[begin : begin + 4] for begin in range(0, len(lines), 4)):
        assert len({line["prompt"] for line in group}) == 1
        known = [line for line in group if line["reward"] is not None]
        for line in known:
            assert line["reward"] == pytest.approx(line["rewards"]["function"] + 0.25 * line["rewards"]["regex"])
            letters = sum(letter in "etaoin" for letter in line["answer"])
            assert line["rewards"]["function"] == pytest.approx(letters / (1 + len(line["answer"])))
        assert sum(line["advantage"] for line in group) == pytest.approx(0, abs=1e-9)
    total = [line["reward"] for line in lines if line["reward"] is not None]
    assert run.column("reward_total")[0] == pytest.approx(sum(total) / len(total))
    assert len(set(run.column("reward_total"))) == 2, "three updates, the same answers"
    clipped = [a + b for a, b in zip(run.column("clipped_low"), run.column("clipped_high"), strict=True)]
    assert clipped[0] == clipped[3] == 0, "the first update of each rollout compares a policy with itself"
    assert max(clipped) > 0
    divergence = run.column("kl")
    assert divergence[0] == 0, "the first update starts from the reference"
    assert min(divergence[1:]) > 0, "the reference stays where training began"
