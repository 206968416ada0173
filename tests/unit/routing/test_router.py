"""`distft router train`: the right adapter on held-out requests, used by chat and eval; Arrow beside it; mistakes."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from routers import ASKS, requests, write, write_router
from transformers import AutoModelForCausalLM, AutoTokenizer

from distft.model.adapters.pool import FIRST, AdapterPool
from distft.router import main
from distft.routing import features
from distft.routing.router import RoutedPool, choice
from distft.routing.router_recipe import RouterTable


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_router(tmp_path_factory.mktemp("routing"))


@pytest.mark.slow
def test_it_chooses_right_on_held_out_requests(world: Path) -> None:
    told = json.loads((world / "router" / "router.json").read_text())
    assert told["held_out"]["num_rows"] == 90
    assert told["held_out"]["accuracy"] >= 0.95
    assert told["held_out"]["low"] < told["held_out"]["accuracy"] <= told["held_out"]["high"]
    assert sum(sum(row.values()) for row in told["held_out"]["chosen"].values()) == 90
    assert told["arrow"]["accuracy"] < told["held_out"]["accuracy"], "adapters of random numbers have no direction"
    assert told["loss"]["last"] < 0.2 * told["loss"]["first"]
    routed = RoutedPool(world / "router", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(world / "router")
    for name in ASKS:
        right = sum(
            routed.choose(tokenizer(row["prompt"])["input_ids"]) == {name: 1.0} for row in requests(name, 20, 5)
        )
        assert right >= 19


@pytest.mark.slow
def test_it_is_made_again(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from distft.reproduce.command import main as reproduce

    def made_again(*words: str) -> tuple[int, dict[str, Any]]:
        capsys.readouterr()
        code = reproduce([str(world / "router"), "--json", *words])
        return code, json.loads(capsys.readouterr().out)

    code, told = made_again()
    assert (code, told["verdict"]) == (0, "equal")
    assert told["files"] == len([path for path in (world / "router").iterdir() if path.name != "router.json"])
    assert made_again("--only-check")[1]["verdict"] == "inputs as they were"
    rows = world / "dog.jsonl"
    before = rows.read_text()
    rows.write_text(before.splitlines()[0].replace("dog", "hound") + "\n" + before.split("\n", 1)[1])
    code, told = made_again()
    rows.write_text(before)
    assert (code, told["verdict"], told["changed"]) == (4, "other inputs", ["dog"])
    report = json.loads((world / "router/router.json").read_text())
    other = report | {"recipe": report["recipe"] | {"router": {"num_steps": 9}}}
    (world / "router/router.json").write_text(json.dumps(other))
    code, told = made_again()
    (world / "router/router.json").write_text(json.dumps(report))
    assert (code, told["different"]) == (1, ["router.safetensors"])
    adapter = world / "red/adapter_config.json"
    kept = adapter.read_bytes()
    adapter.write_bytes(kept + b" ")
    code, told = made_again()
    adapter.write_bytes(kept)
    assert (code, told["changed"]) == (4, [str(world / "red")])


def test_chat_answers_with_what_it_chooses(world: Path, tmp_path: Path) -> None:
    from distft.chat.models import ChatModels
    from distft.chat.session import Session
    from distft.generation.completion import SamplingParams

    models = ChatModels(str(world / "router"), {}, tmp_path, with_base=True)
    assert models.names == ("tuned", "base", "red", "dog", "rain")
    how = SamplingParams(max_new_tokens=8)
    said: list[str] = []
    session = Session(models, how, name="tuned", compare=False, write=said.append)
    for text, name in (("the red ball", "red"), ("the little dog", "dog")):
        session.take("/new")
        reply = session.ask(text)[0]
        assert reply.chosen == name
        assert f"  [{name}]" in said
        lm: Any = AutoModelForCausalLM.from_pretrained(world / "base", dtype=torch.float32)
        beside = PeftModel.from_pretrained(lm, world / name).eval()
        ids = torch.tensor([models._ids([{"role": "user", "content": text}])])
        alone = beside.generate(input_ids=ids, max_new_tokens=8, do_sample=False, eos_token_id=[2, 4], pad_token_id=0)
        assert reply.text == models.tokenizer.decode(alone[0, ids.shape[1] :], skip_special_tokens=True)
        session.take("/adapter rain")
        assert session.ask(text)[0].text != reply.text
        session.take("/adapter tuned")


def test_eval_asks_each_question_of_the_adapter_that_is_chosen(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from distft.eval.command import main as evaluate

    tokenizer = AutoTokenizer.from_pretrained(world / "base")
    rows = []
    for name in ("red", "dog"):
        lm: Any = AutoModelForCausalLM.from_pretrained(world / "base", dtype=torch.float32)
        beside = PeftModel.from_pretrained(lm, world / name).eval()
        for row in requests(name, 4, 9):
            ids = tokenizer(row["prompt"], return_tensors="pt")["input_ids"]
            made = beside.generate(
                input_ids=ids, max_new_tokens=6, do_sample=False, eos_token_id=[2, 4], pad_token_id=0
            )
            answer = tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True)
            rows.append({"prompt": row["prompt"], "completion": answer})
    write(tmp_path / "asked.jsonl", rows)
    (tmp_path / "run.toml").write_text(f'''
name = "run"
output_dir = "{tmp_path}"
[model]
path = "{world / "base"}"
dtype = "float32"
[method]
name = "lora"
[[data.train]]
path = "{world / "red.jsonl"}"
format = "prompt_completion"
[[eval.answers]]
name = "asked"
path = "{tmp_path / "asked.jsonl"}"
format = "prompt_completion"
max_new_tokens = 6
scores = [{{ name = "exact_match" }}]
''')
    words = [str(tmp_path / "run.toml"), "--model", str(world / "router"), "--json"]
    capsys.readouterr()
    assert evaluate(words) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["label"] == "router"
    assert told["figures"]["asked.exact_match"] == 1.0, "each answer is that of its adapter alone"
    assert told["chosen"] == {"red": 4, "dog": 4}
    assert (tmp_path / "run" / "eval" / "router" / "asked.jsonl").is_file()


def test_arrow_s_directions_are_the_first_singular_vectors(world: Path) -> None:
    pool = AdapterPool(world / "red", dtype=torch.float32)
    made = features.arrow_prototypes(pool)[FIRST]
    assert len(made) == 6
    for path, layer in pool.layers():
        right = torch.linalg.svd(layer.get_delta_weight(FIRST)).Vh[0]
        assert abs(float(right @ made[path])) == pytest.approx(1.0, abs=1e-5)
        assert float(made[path].norm()) == pytest.approx(1.0, abs=1e-5)


def test_one_a_mixture_or_the_base() -> None:
    names, shares = ("a", "b", "c"), torch.tensor([0.5, 0.1, 0.4])
    assert choice(shares, names, RouterTable()) == {"a": 1.0}
    mixture = choice(shares, names, RouterTable(choose="mixture"))
    assert mixture == {"a": pytest.approx(5 / 9), "c": pytest.approx(4 / 9)}
    assert choice(shares, names, RouterTable(min_confidence=0.6)) == {}


def test_a_choice_for_each_token(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against PEFT's own switching with one cache, and the base's states read at once."""
    from distft.chat.models import ChatModels
    from distft.generation.completion import Prompt, SamplingParams
    from distft.routing.token_generator import TokenRoutedGenerator

    text = (world / "router.toml").read_text().replace(f'output_dir = "{world}"', f'output_dir = "{tmp_path}"')
    (tmp_path / "router.toml").write_text(text.replace("[[adapters]]", '[router]\nper = "token"\n[[adapters]]', 1))
    assert main(["train", str(tmp_path / "router.toml"), "--min-accuracy", "0.9"]) == 0
    told = json.loads((tmp_path / "router/router.json").read_text())["held_out"]
    assert (told["per"], told["num_rows"]) == ("token", 90)
    assert 0 < told["low"] <= told["accuracy"] <= told["high"] <= 1

    routed = RoutedPool(tmp_path / "router", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "router")
    base: Any = AutoModelForCausalLM.from_pretrained(world / "base", dtype=torch.float32)
    beside: Any = PeftModel.from_pretrained(base, world / "red", adapter_name="red").eval()
    for name in ("dog", "rain"):
        beside.load_adapter(world / name, adapter_name=name)
    order = ["red", "dog", "dog", "rain", "red", "rain", "dog", "red"]
    looked: list[torch.Tensor] = []

    def in_turn(features_D: torch.Tensor) -> dict[str, float]:
        looked.append(features_D)
        return {order[len(looked) - 1]: 1.0}

    monkeypatch.setattr(routed, "choose_by", in_turn)
    prompt = tokenizer("a girl named Lily saw the")["input_ids"]
    heard: list[int] = []
    made = TokenRoutedGenerator(routed, tokenizer, [], heard=lambda row, token: heard.append(token)).generate(
        [Prompt(seed_key="a", ids=prompt)], SamplingParams(max_new_tokens=8, logprobs=True)
    )
    assert made is not None
    ids, cache, wanted, logprobs = list(prompt), None, list[int](), list[float]()
    with torch.no_grad():
        for name in order:
            beside.set_adapter(name)
            out = beside(input_ids=torch.tensor([ids]), past_key_values=cache, use_cache=True)
            cache, token = out.past_key_values, int(out.logits[0, -1].argmax())
            logprobs.append(float(out.logits[0, -1].log_softmax(-1)[token]))
            wanted.append(token)
            ids = [token]
        assert list(made[0].ids) == wanted == heard
        assert made[0].logprobs == pytest.approx(logprobs, abs=1e-4)
        with beside.disable_adapter():
            whole = torch.tensor([[*prompt, *wanted[:-1]]])
            states = beside(input_ids=whole, output_hidden_states=True).hidden_states
    state_LD = states[round(routed.layer * (len(states) - 1))][0]
    for number, features_D in enumerate(looked):
        mean_D = state_LD[: len(prompt) + number].mean(0)
        torch.testing.assert_close(features_D, mean_D, atol=1e-5, rtol=1e-4)

    models = ChatModels(str(tmp_path / "router"), {}, tmp_path, with_base=False)
    pieces: list[str] = []
    messages = [{"role": "user", "content": "the little dog"}]
    reply = models.reply("tuned", messages, SamplingParams(max_new_tokens=8), pieces.append)
    if reply.chosen == "dog":
        alone = models.reply("dog", messages, SamplingParams(max_new_tokens=8), lambda piece: None)
        assert reply.text == alone.text
    assert "dog" in reply.chosen
    assert "".join(pieces) == reply.text


def test_arrow_chooses_without_training(world: Path, tmp_path: Path) -> None:
    text = (world / "router.toml").read_text().replace(f'output_dir = "{world}"', f'output_dir = "{tmp_path}"')
    (tmp_path / "router.toml").write_text(
        text.replace("[[adapters]]", '[router]\nclassifier = "arrow"\n[[adapters]]', 1)
    )
    assert main(["train", str(tmp_path / "router.toml")]) == 0
    told = json.loads((tmp_path / "router/router.json").read_text())
    assert told["held_out"] == told["arrow"]
    assert (told["loss"], (tmp_path / "router/router.safetensors").exists()) == (None, False)
    routed = RoutedPool(tmp_path / "router", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "router")
    chosen = [routed.choose(tokenizer(row["prompt"])["input_ids"]) for row in requests("dog", 30, 1)]
    counts = {name: sum(weights == {name: 1.0} for weights in chosen) for name in ASKS}
    assert counts == told["arrow"]["chosen"]["dog"], "as on the held-out rows, which are these"


MISTAKES: dict[str, tuple[Any, tuple[str, ...], int]] = {
    "an unknown key": (
        ("[[adapters]]", "[router]\nlayr = 0.5\n[[adapters]]"), ("line 4", "layr", "did you mean layer?"), 2
    ),
    "one adapter": (None, ("adapters", "at least 2 items"), 2),
    "a name twice": (('name = "dog"', 'name = "red"'), ('[[adapters]] name = "red" is there twice',), 2),
    "no adapter there": (("/dog\"", "/nowhere\""), ("nowhere\" holds no adapter", "in PEFT's form"), 2),
    "no rows": (("rows = ", "# rows = "), ("red: belongs to no run, and has no rows",), 2),
    "a setting without effect": (("[[adapters]]", "[router]\ntop_k = 3\n[[adapters]]"), ("top_k: has no effect",), 2),
    "a setting of training for Arrow": (
        ("[[adapters]]", '[router]\nclassifier = "arrow"\nlayer = 0.5\n[[adapters]]'),
        ("line 5", '[router] layer: has no effect with classifier = "arrow"'), 2,
    ),
    "the same rows for two": (("dog.jsonl", "red.jsonl"), ("every request of its rows is another adapter's",), 2),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_named(name: str, world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change, said, code = MISTAKES[name]
    text = (world / "router.toml").read_text().replace(f'output_dir = "{world}"', f'output_dir = "{tmp_path}"')
    text = text.replace(*change, 1) if change else "[[adapters]]".join(text.split("[[adapters]]")[:2])
    (tmp_path / "router.toml").write_text(text)
    assert main(["train", str(tmp_path / "router.toml")]) == code
    message = capsys.readouterr().err
    for part in said:
        assert part in message, message
    assert "Traceback" not in message
    assert not (tmp_path / "router").exists()


def test_a_router_that_chooses_badly_and_one_whose_adapter_has_changed(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import shutil

    from distft.core.errors import RecipeError

    text = (world / "router.toml").read_text().replace(f'output_dir = "{world}"', f'output_dir = "{tmp_path}"')
    for name in ASKS:  # rows that say nothing of which adapter is meant
        write(tmp_path / f"{name}.jsonl", requests("rain", 60, len(name)))
        text = text.replace(f'rows = "{world / name}.jsonl"', f'rows = "{tmp_path / name}.jsonl"', 1)
        text = text.replace(f'eval_rows = "{world / name}-held.jsonl"', "")
    (tmp_path / "router.toml").write_text(text)
    assert main(["train", str(tmp_path / "router.toml"), "--min-accuracy", "0.9"]) == 5
    assert "less than --min-accuracy 0.9; nothing was kept" in capsys.readouterr().err
    assert not (tmp_path / "router").exists()
    shutil.copytree(world / "router", tmp_path / "copy")
    config = json.loads((tmp_path / "copy" / "router.json").read_text())
    config["adapters"][0]["sha256"] = "0" * 64
    (tmp_path / "copy" / "router.json").write_text(json.dumps(config))
    with pytest.raises(RecipeError, match="is not the adapter that it was trained with"):
        RoutedPool(tmp_path / "copy", dtype=torch.float32)
