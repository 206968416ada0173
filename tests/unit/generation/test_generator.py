"""Writing and weighing, one process: against transformers, in any batch, and what stays as it was."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from generating import generator, opened
from tiny import CPU, batch, documents

from distft.core.errors import MachineError
from distft.core.virtual_tokens import VIRTUAL_ID
from distft.engine.solo import SoloEngine
from distft.generation.batching import BatchLimits, pad_left, split_batches
from distft.generation.completion import Prompt, SamplingParams
from distft.generation.sampling import draws, next_tokens
from distft.model.inference import cache_bytes_per_token

PROMPTS = documents([9, 30, 4, 17, 1, 22], seed=5)


def prompts(rows=PROMPTS) -> list[Prompt]:
    return [Prompt(seed_key=str(index), ids=ids) for index, ids in enumerate(rows)]


def texts(said) -> list[str]:
    return [one.text for one in said]


def test_greedy_answers_are_those_of_transformers_generate(tiny_config: Path) -> None:
    engine, own = opened(tiny_config)
    said = own.generate(prompts(), SamplingParams(max_new_tokens=25))
    lm = engine.model.lm
    lm.config._attn_implementation = "sdpa"
    lm.eval()
    for ids, one in zip(PROMPTS, said, strict=True):
        with torch.no_grad():
            out = lm.generate(torch.tensor([ids]), max_new_tokens=25, do_sample=False, eos_token_id=7, pad_token_id=0)
        new = out[0, len(ids) :].tolist()
        assert one.num_tokens == len(new)
        assert one.ended == (new[-1] == 7)
        assert one.text == " ".join(str(token) for token in new if token != 7)
    assert len(set(texts(said))) > 1


@pytest.mark.parametrize("how", [{}, {"temperature": 1.3}, {"temperature": 0.8, "top_p": 0.7}])
def test_batches_and_order_change_nothing(tiny_config: Path, how: dict) -> None:
    _, own = opened(tiny_config)
    whole = own.generate(prompts(), SamplingParams(max_new_tokens=20, **how))
    for size in (1, 2, 4):
        assert own.generate(prompts(), SamplingParams(max_new_tokens=20, batch_size=size, **how)) == whole
    assert own.generate(prompts()[::-1], SamplingParams(max_new_tokens=20, **how))[::-1] == whole
    if how:
        assert own.generate(prompts(), SamplingParams(max_new_tokens=20, seed=1, **how)) != whole


def test_likely_tokens_alone_are_drawn_and_said_as_of_all(tiny_config: Path) -> None:
    """`top_p` leaves tokens out of the draws, by a plain rule here; log-probabilities are those of every token."""
    engine, own = opened(tiny_config)
    temperature, top_p = 1.4, 0.6
    how = SamplingParams(max_new_tokens=20, temperature=temperature, top_p=top_p, logprobs=True)
    lm = engine.model.lm.eval()
    lm.config._attn_implementation = "sdpa"
    left_out, alone = 0, 0
    for ids, one in zip(PROMPTS, own.generate(prompts(), how), strict=True):
        with torch.no_grad():
            logits = lm(torch.tensor([[*ids, *one.ids]])).logits[0, len(ids) - 1 : -1].double() / temperature
        for token, said, logprob_V in zip(one.ids, one.logprobs, logits.log_softmax(-1), strict=True):
            assert said == pytest.approx(float(logprob_V[token]), abs=1e-5)
            before = float(logprob_V[logprob_V > logprob_V[token]].exp().sum())
            assert before < top_p, "tokens that are likelier have less than top_p together"
            left_out += int((logprob_V < logprob_V[token]).sum())
            alone += before > 0
    assert left_out
    assert alone, "not only the likeliest"


@pytest.mark.parametrize("prefix", [0, 4])
def test_a_prompt_with_several_answers_is_read_once(
    tiny_config: Path, monkeypatch: pytest.MonkeyPatch, prefix: int
) -> None:
    """Each answer is the one that it is alone; rows of one prompt share its first forward, whatever else is there."""
    tuned = {"method": "prefix_tuning", "num_virtual_tokens": prefix} if prefix else {}
    engine, own = opened(tiny_config, **tuned)
    rows = [PROMPTS[0], PROMPTS[3]] * 3 + [PROMPTS[1]] + [PROMPTS[2]] * 2
    virtual = [VIRTUAL_ID + number for number in range(prefix)]
    asked = [Prompt(seed_key=f"answer {number}", ids=[*virtual, *ids]) for number, ids in enumerate(rows)]
    read: list[tuple[int, ...]] = []
    answer = type(engine.model).answer

    def noted(self, input_ids_BL, *args, **kwargs):
        read.append(tuple(input_ids_BL.shape))
        return answer(self, input_ids_BL, *args, **kwargs)

    monkeypatch.setattr(type(engine.model), "answer", noted)
    for how in ({"temperature": 1.0, "logprobs": True}, {"stop": ("3",)}):
        read.clear()
        said = own.generate(asked, SamplingParams(max_new_tokens=20, **how))
        assert read[0] == (4, 30 + prefix), "four prompts, as long as the longest"
        if "temperature" in how:
            assert 4 < read[1][0] <= len(rows), "a row for each answer that goes on"
        alone = own.generate(asked, SamplingParams(max_new_tokens=20, batch_size=1, **how))
        assert [one.ids for one in said] == [one.ids for one in alone]
        for one, other in zip(said, alone, strict=True):
            assert one.logprobs == pytest.approx(other.logprobs, abs=1e-5)
    assert len({one.ids for one in own.generate(asked, SamplingParams(max_new_tokens=20, temperature=1.0))}) > 6


def test_a_stop_text_ends_an_answer_and_is_left_out(tiny_config: Path) -> None:
    _, own = opened(tiny_config)
    plain = texts(own.generate(prompts(), SamplingParams(max_new_tokens=20)))
    mark = plain[0].split()[6]
    stopped = own.generate(prompts(), SamplingParams(max_new_tokens=20, stop=(mark,)))
    for whole, one in zip(plain, stopped, strict=True):
        assert one.text == whole.split(mark)[0]
        assert one.ended == (mark in whole) or one.num_tokens == 20
    assert stopped[0].num_tokens <= 7 < 20


def test_likelihoods_are_those_of_transformers(tiny_config: Path) -> None:
    engine, own = opened(tiny_config)
    pairs = [(ids[:-3] or [1], ids[-3:]) for ids in PROMPTS if len(ids) > 3]
    found = own.loglikelihood(pairs)
    assert own.loglikelihood(pairs, batch_size=1) == [
        (pytest.approx(value, abs=1e-4), greedy) for value, greedy in found
    ]
    engine.model.lm.config._attn_implementation = "eager"
    for (before, after), (value, greedy) in zip(pairs, found, strict=True):
        with torch.no_grad():
            logits = engine.model.lm(torch.tensor([[*before, *after]])).logits[0].log_softmax(-1)
        at = range(len(before) - 1, len(before) + len(after) - 1)
        assert value == pytest.approx(sum(logits[i, t].item() for i, t in zip(at, after, strict=True)), abs=1e-4)
        assert greedy == all(logits[i].argmax() == t for i, t in zip(at, after, strict=True))


def test_what_a_model_writes_greedily_is_weighed_as_greedy(tiny_config: Path) -> None:
    _, own = opened(tiny_config)
    said = own.generate(prompts(), SamplingParams(max_new_tokens=6))
    pairs = [(ids, list(map(int, one.text.split()))) for ids, one in zip(PROMPTS, said, strict=True)]
    assert all(greedy for _, greedy in own.loglikelihood(pairs))


def test_dropout_is_off_and_training_goes_on_as_before(tiny_config: Path) -> None:
    engine, own = opened(tiny_config, "lora", r=4, dropout=0.5)
    for name, param in engine.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(param, std=0.5)
    state = torch.random.get_rng_state()
    first, again = (own.generate(prompts(), SamplingParams(max_new_tokens=12)) for _ in range(2))
    assert first == again
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(module.training for module in engine.model.modules())
    assert engine.model.transformer.config._attn_implementation == "distft_varlen"
    losses = engine.model(**batch(documents([8, 5])).inputs())
    losses.sum().backward()
    assert any(param.grad is not None for param in engine.model.parameters())


METHODS_WITH_PARAMS = {
    "full": {}, "lora": {"r": 4}, "qlora": {"r": 4}, "adalora": {}, "bottleneck": {}, "prompt_tuning": {}, "ia3": {},
    "p_tuning": {}, "prefix_tuning": {}, "vera": {}, "oft": {}, "loha": {}, "lokr": {},
}  # fmt: skip


@pytest.mark.parametrize(
    "method",
    [
        pytest.param(name, marks=[] if name in ("full", "lora", "prefix_tuning") else pytest.mark.slow)
        for name in METHODS_WITH_PARAMS
    ],
)
def test_what_answers_leave_behind_can_be_trained_with(tiny_config: Path, tmp_path: Path, method: str) -> None:
    """Answers are written without autograd, beyond the length whose frequencies dynamic NTK starts with."""
    config = json.loads((tiny_config / "config.json").read_text()) | {"max_position_embeddings": 16}
    config |= {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    losses = []
    for answers in (False, True):
        engine, own = opened(tmp_path, method, **METHODS_WITH_PARAMS[method])
        if answers:
            assert own.generate(prompts(PROMPTS[:2]), SamplingParams(max_new_tokens=6)) is not None
        output = engine.model(**batch(documents([20, 5])).inputs())
        loss = (output[0] if isinstance(output, tuple) else output).sum()  # beside a method's penalty
        loss.backward()
        grads = [param.grad for param in engine.model.parameters() if param.grad is not None]
        assert grads
        losses.append((loss.item(), sum(float(grad.double().square().sum()) for grad in grads)))
    assert losses[0] == losses[1]


def test_a_wish_to_stop_is_granted_in_the_middle(tiny_config: Path) -> None:
    engine, own = opened(tiny_config)
    asked = iter([False, False, True])
    stopped = generator(engine, own._module, stop=lambda: next(asked))
    assert stopped.generate(prompts(), SamplingParams(max_new_tokens=100)) is None
    assert engine.model.training
    assert engine.model.transformer.config._attn_implementation == "distft_varlen"


def test_a_prompt_that_leaves_no_room_loses_its_start(tiny_config: Path) -> None:
    _, own = opened(tiny_config)
    longest = json.loads((tiny_config / "config.json").read_text())["max_position_embeddings"]
    assert own.truncate_prompt(range(longest + 5), 10) == range(15, longest + 5)
    assert own.truncate_prompt(range(20), 10) == range(20)


def test_batches_are_cut_by_length_and_dealt_to_all_ranks() -> None:
    roomy = BatchLimits(rows=4, prompt_tokens=1000, cache_tokens=1000)
    batches = split_batches([5, 9, 1, 9, 7], 10, roomy, world=1)
    assert batches == [[1, 3, 4, 0], [2]]
    assert split_batches([5, 9, 1, 9, 7], 10, roomy, world=2) == [[1, 3, 4], [0, 2]]
    assert split_batches([50, 3, 3], 10, BatchLimits(rows=4, prompt_tokens=60, cache_tokens=1000), world=1) == [
        [0],
        [1, 2],
    ]
    tight = split_batches([50, 40, 3, 3], 10, BatchLimits(rows=4, prompt_tokens=1000, cache_tokens=60), world=1)
    assert tight == [[0], [1], [2, 3]]
    assert split_batches([500], 10, BatchLimits(rows=1, prompt_tokens=1, cache_tokens=1), world=4) == [[0]], (
        "one row is always tried"
    )
    assert split_batches([], 10, roomy, world=2) == []


def test_padding_is_on_the_left_and_positions_count_real_tokens() -> None:
    read = pad_left([[4, 5, 6], [7]], CPU, room=2)
    assert read.ids_BL.tolist() == [[4, 5, 6], [0, 0, 7]]
    assert read.mask_BL is not None
    assert read.mask_BL.tolist() == [[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]]
    assert read.positions_BL.tolist() == [[0, 1, 2], [0, 0, 0]]
    assert pad_left([[4, 5], [6, 7]], CPU).mask_BL is None


def test_draws_follow_the_distribution() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0, -1.0]])
    names = [str(number) for number in range(4000)]
    draw = draws(names, 1, 0, CPU)[:, 0]
    token, _ = next_tokens(logits.expand(4000, 4), draw, 2.0, 1.0, logprobs=False)
    share = torch.bincount(token, minlength=4) / 4000
    assert torch.allclose(share, torch.softmax(logits[0] / 2.0, 0), atol=0.03)
    nucleus, logprobs = next_tokens(logits.expand(4000, 4), draw, 2.0, 0.6, logprobs=True)
    assert set(nucleus.tolist()) == {1, 2}, "the likeliest tokens that reach 0.6"
    of_all = torch.log_softmax(logits[0].double() / 2.0, 0)
    assert torch.allclose(logprobs, of_all[nucleus], atol=1e-12), "said as among all tokens"
    edge = torch.tensor([0.0, math.nextafter(1.0, 0.0)], dtype=torch.float64)
    sure = torch.tensor([[-math.inf, 0.0, 0.0, -math.inf]] * 2)
    assert next_tokens(sure, edge, 1.0, 1.0, logprobs=False)[0].tolist() == [1, 2], "never a token of probability zero"


def test_the_cache_is_counted_as_it_is(tiny_config: Path) -> None:
    engine, own = opened(tiny_config)
    config = engine.model.transformer.config
    from distft.model.inference import generation_mode, new_cache

    cache = new_cache(own._module)
    with engine.evaluating(), generation_mode(own._module):
        own._engine.inference_module(
            input_ids_BL=torch.ones(2, 5, dtype=torch.int64), attention_mask_BK=None,
            position_ids_BL=torch.arange(5)[None], at_S=torch.tensor([4]), cache=cache,
        )  # fmt: skip
    held = sum(
        tensor.numel() * tensor.element_size() for layer in cache.layers for tensor in (layer.keys, layer.values)
    )
    assert held == 2 * 5 * cache_bytes_per_token(config, torch.float32)


class Small:
    """Stands before an engine whose memory holds a few rows."""

    def __init__(self, engine: SoloEngine, rows: int, *, collective_forward: bool = False) -> None:
        self._engine, self._rows, self.collective_forward, self.failed = engine, rows, collective_forward, 0

    def __getattr__(self, name: str):
        return getattr(self._engine, name)

    def inference_module(self, **inputs):
        if inputs["input_ids_BL"].shape[0] > self._rows:
            self.failed += 1
            raise torch.OutOfMemoryError("CUDA out of memory")
        return self._engine.inference_module(**inputs)


def test_where_memory_runs_out_less_is_answered_at_once(tiny_config: Path) -> None:
    engine, own = opened(tiny_config)
    rows = PROMPTS * 3
    whole = own.generate(prompts(rows), SamplingParams(max_new_tokens=10))
    pairs = [(ids[:-1] or [1], ids[-1:]) for ids in rows]
    weighed = own.loglikelihood(pairs)
    small = Small(engine, 5)
    less = generator(small, engine.model)
    assert less.generate(prompts(rows), SamplingParams(max_new_tokens=10)) == whole
    assert (less.share, small.failed) == (0.25, 3), "18 and 9 rows do not fit, nor the other 9; 4 and 5 do"
    assert [value for value, _ in less.loglikelihood(pairs)] == pytest.approx([value for value, _ in weighed], abs=1e-4)
    assert small.failed == 3, "what was learnt is kept"

    with pytest.raises(MachineError, match=r"memory ran out while 1 rows were answered at once.*max_new_tokens"):
        generator(Small(engine, 0), engine.model).generate(prompts(), SamplingParams(max_new_tokens=4))
    with pytest.raises(MachineError, match=r"while 6 rows were answered.*set batch_size = 3 in \[\[eval.answers\]\]"):
        generator(Small(engine, 5, collective_forward=True), engine.model).generate(
            prompts(), SamplingParams(max_new_tokens=4)
        )
