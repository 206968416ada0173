"""Tasks of lm-eval on our generator: what the library's own model class answers on the same weights."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from data_kit import save_tokenizer, table_of
from generating import ALONE, RULE, generator
from lm_tasks import need_library, task_files
from tiny import build

from distft.core.errors import DataError, RecipeError
from distft.data.render import Renderer, load_renderer
from distft.engine.params import EngineParams
from distft.engine.solo import SoloEngine, open_engine
from distft.evaluation.build import build_eval_sets
from distft.evaluation.eval_sets import EvalResult, EvalSet
from distft.recipe import AnswersTable


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_config: Path) -> Path:
    """A model that reads 48 tokens, with weights, tokenizer and task files."""
    need_library()
    made = save_tokenizer(tmp_path_factory.mktemp("model"))
    config = json.loads((tiny_config / "config.json").read_text())
    (made / "config.json").write_text(json.dumps({**config, "vocab_size": 512, "max_position_embeddings": 64}))
    build(made).module.transformer.save_pretrained(made)
    task_files(made)
    (made / "pairs.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    return made


@pytest.fixture(scope="module")
def engine(folder: Path) -> SoloEngine:
    opened = open_engine("solo", EngineParams(), ALONE)
    opened.setup(build(folder, fill=False, init="pretrained"), RULE, micros_per_step=1)
    return opened


@pytest.fixture(scope="module")
def renderer(folder: Path) -> Renderer:
    return load_renderer(folder, chat_template="chatml")


def asked(folder: Path, renderer: Renderer, task: str, **settings: Any) -> EvalSet:
    table = AnswersTable(name="set", path=f"lm-eval:{folder / task}.yaml", **settings)
    (made,) = build_eval_sets(
        [table],
        table_of({"path": str(folder / "pairs.jsonl"), "format": "prompt_completion"}),
        renderer,
        seed=3,
        progress=lambda rows: None,
    )
    return made


def taken(eval_set: EvalSet, engine: SoloEngine, renderer: Renderer) -> EvalResult:
    own = generator(engine, engine.model, stop_ids=(renderer.tokenizer.eos_token_id,))
    own._decode = renderer.write
    found = eval_set.run(own, engine)
    assert found is not None
    return found


CASES = [("choose", True)]
SLOW = [("write", False), ("write", True), ("choose", False), ("text", False)]  # a text is no chat


@pytest.mark.parametrize(("task", "as_chat"), [*CASES, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW)])
def test_as_the_librarys_own_model(
    folder: Path, engine: SoloEngine, renderer: Renderer, task: str, as_chat: bool
) -> None:
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    eval_set = asked(folder, renderer, task, ask_as="chat" if as_chat else "text")
    found = taken(eval_set, engine, renderer)

    tokenizer = renderer.tokenizer
    tokenizer.chat_template = renderer.template.text
    tokenizer.pad_token = tokenizer.eos_token
    lm = engine.model.transformer
    before = lm.config._attn_implementation
    lm.set_attn_implementation("sdpa")
    try:
        theirs = lm_eval.simple_evaluate(
            HFLM(pretrained=lm, tokenizer=tokenizer, batch_size=4, max_length=64, device="cpu"),
            tasks=[json.loads((folder / f"{task}.yaml").read_text())],
            bootstrap_iters=0,
            fewshot_random_seed=3,
            apply_chat_template=as_chat,
        )
    finally:
        lm.set_attn_implementation(before)
    samples = {one["doc_id"]: one for one in theirs["samples"][task]}
    assert len(found.answers) == eval_set.rows == len(samples) == 6
    for number, answer in enumerate(found.answers):
        right = samples[number]
        assert answer.prompt == right["arguments"][0][0]
        if task == "write":
            assert answer.text == right["resps"][0][0]
        if task == "choose":
            assert answer.logprobs == pytest.approx([one[0][0] for one in right["resps"]], abs=1e-3)
    ((_, scored),) = found.scored
    assert list(scored.totals) == list(eval_set.figures())
    for name, value in scored.totals.items():
        assert value == pytest.approx(theirs["results"][task][f"{name},none"], rel=1e-5), name
    if task == "write":
        assert ("<|im_start|>" in eval_set.first_prompt) == as_chat
        assert len({answer.text for answer in found.answers}) > 1
        assert found.answer_tokens > 6


def test_a_second_time_shows_the_same_rows_and_draws_nothing_of_ours(
    folder: Path, engine: SoloEngine, renderer: Renderer
) -> None:
    random.seed(8)
    torch.manual_seed(8)
    expected = (random.getstate(), torch.random.get_rng_state())
    eval_set = asked(folder, renderer, "write")
    first, second = (taken(eval_set, engine, renderer) for _ in range(2))
    assert random.getstate() == expected[0]
    assert torch.equal(torch.random.get_rng_state(), expected[1])
    assert [one.prompt for one in first.answers] == [one.prompt for one in second.answers]
    assert first.totals == second.totals
    again = asked(folder, renderer, "write")
    assert (again.rows_sha256, again.settings) == (eval_set.rows_sha256, eval_set.settings)
    assert asked(folder, renderer, "write", num_fewshot=1).rows_sha256 != eval_set.rows_sha256
    assert asked(folder, renderer, "write", max_rows=3).rows == 3


def test_mistakes_name_the_set(folder: Path, renderer: Renderer, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r'(?s)"set".*none.yaml"  no such file'):
        asked(folder, renderer, "none")
    broken = tmp_path / "broken.yaml"
    broken.write_text((folder / "write.yaml").read_text().replace("lm_test.jsonl", "gone.jsonl"))
    with pytest.raises(DataError, match=r'"set": lm-eval task broken: cannot be loaded: .*gone.jsonl'):
        asked(folder, renderer, str(tmp_path / "broken"))


def test_a_wish_to_stop_ends_a_task(folder: Path, engine: SoloEngine, renderer: Renderer) -> None:
    eval_set = asked(folder, renderer, "write")
    own = generator(engine, engine.model, stop=lambda: True)
    assert eval_set.run(own, engine) is None
