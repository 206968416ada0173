"""`distft chat`: answers are transformers' own, streamed; adapters and the base are switched; mistakes are named."""

import io
import json
from pathlib import Path
from typing import Any

import export_kit as kit
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from distft.chat.command import main
from distft.chat.models import ChatModels
from distft.chat.session import Session
from distft.generation.completion import SamplingParams

HOW = SamplingParams(max_new_tokens=12)


@pytest.fixture
def folders(tmp_path: Path) -> dict[str, Path]:
    base = kit.save_model(tmp_path / "base")
    return {
        "base": base,
        "first": kit.save_adapter(tmp_path / "first", base),
        "second": kit.save_adapter(tmp_path / "second", base, seed=1, r=2),
    }


def answer(folders: dict[str, Path], name: str, messages: list[dict[str, str]]) -> str:
    """Return what plain transformers and PEFT write."""
    from peft import PeftModel

    tokenizer = AutoTokenizer.from_pretrained(folders["base"])
    lm: Any = AutoModelForCausalLM.from_pretrained(folders["base"], dtype=torch.float32)
    if name != "base":
        lm = PeftModel.from_pretrained(lm, folders[name])
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
    written = lm.eval().generate(input_ids=ids, max_new_tokens=12, do_sample=False, eos_token_id=[2, 4], pad_token_id=0)
    return tokenizer.decode(written[0, ids.shape[1] :], skip_special_tokens=True)


def test_each_model_answers_as_transformers_does_and_history_is_read(folders: dict[str, Path], tmp_path: Path) -> None:
    models = ChatModels(str(folders["first"]), {"second": folders["second"]}, tmp_path, with_base=True)
    assert models.names == ("tuned", "base", "second")
    said: list[str] = []
    session = Session(models, HOW, name="tuned", compare=True, write=said.append, system="Be brief.")
    history = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "the little dog"}]
    first = answer(folders, "first", history)
    assert [reply.text for reply in session.ask("the little dog")] == [first, answer(folders, "base", history)]
    history += [{"role": "assistant", "content": first}, {"role": "user", "content": "and the cat"}]
    assert session.take("/adapter second")
    replies = session.ask("and the cat")
    assert replies[0].text == answer(folders, "second", history)
    assert session.messages[-1] == {"role": "assistant", "content": replies[0].text}
    assert len({reply.text for reply in replies} | {first}) == 3, "the models differ, or nothing was tested"
    assert "second answers\n" in said
    assert any(piece.startswith("second: ") for piece in said)


def test_pieces_come_one_by_one_and_make_the_text(folders: dict[str, Path], tmp_path: Path) -> None:
    models = ChatModels(str(folders["first"]), {}, tmp_path, with_base=False)
    pieces: list[str] = []
    reply = models.reply("tuned", [{"role": "user", "content": "ball"}], HOW, pieces.append)
    assert "".join(pieces) == reply.text
    assert len(pieces) > 3
    drawn = SamplingParams(max_new_tokens=12, temperature=1.0, seed=3)
    texts = {models.reply("tuned", [{"role": "user", "content": "ball"}], drawn, pieces.append).text for _ in range(2)}
    assert len(texts) == 1, "the seed decides"
    assert texts != {reply.text}


def test_commands(folders: dict[str, Path], tmp_path: Path) -> None:
    models = ChatModels(str(folders["first"]), {}, tmp_path, with_base=False)
    said: list[str] = []
    session = Session(models, HOW, name="tuned", compare=False, write=said.append)

    def take(line: str) -> str:
        said.clear()
        assert session.take(line)
        return "".join(said)

    take("one day")
    file = tmp_path / "saved.jsonl"
    assert "saved 2 messages" in take(f"/save {file}")
    assert json.loads(file.read_text())["messages"][0] == {"role": "user", "content": "one day"}
    assert "Is a directory" in take(f"/save {tmp_path}")
    assert "the file's name is missing" in take("/save")
    assert "a new conversation" in take("/system Be kind.")
    assert session.messages == [{"role": "system", "content": "Be kind."}]
    assert "no such model  did you mean tuned?  allowed: tuned, base" in take("/adapter tund")
    assert "no such command  did you mean /save?" in take("/sve x")
    assert "the base answers as well" in take("/base")
    assert "base: " in take("hello")
    assert "/adapter NAME" in take("/help")
    assert take("  ") == ""
    assert not session.take("/quit")


def test_one_answer_as_json_and_lines_of_standard_input(
    folders: dict[str, Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [str(folders["first"]), "--base", "--max-new-tokens", "12"]
    assert main([*words, "--prompt", "the park", "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    messages = [{"role": "user", "content": "the park"}]
    assert made["prompt"] == "the park"
    assert [one["model"] for one in made["answers"]] == ["tuned", "base"]
    assert [one["text"] for one in made["answers"]] == [answer(folders, name, messages) for name in ("first", "base")]
    monkeypatch.setattr("sys.stdin", io.StringIO("the park\n/quit\nnever asked\n"))
    assert main(words) == 0
    assert capsys.readouterr().out == "".join(
        f"{one['model']}: {one['text']} … (cut at 12 tokens)\n" for one in made["answers"]
    )


MISTAKES = {
    "json without a prompt": (["FIRST", "--json"], "--json: is for one answer  give --prompt TEXT", 2),
    "no such source": (["nowhere"], "there is no such folder", 2),
    "an adapter that is none": (["FIRST", "--adapter", "x=BASE"], "holds no adapter_config.json", 2),
    "a name that is taken": (["FIRST", "--adapter", "tuned=FIRST"], "cannot be named 'tuned'", 2),
    "one name twice": (["FIRST", "--adapter", "a=FIRST", "--adapter", "a=SECOND"], "one name is given twice", 2),
    "an adapter of another base": (["FIRST", "--adapter", "b=OTHER"], "take adapters of one base", 2),
    "an adapter beside a whole model": (["BASE", "--adapter", "a=FIRST"], "goes beside the base of another adapter", 2),
    "a base that nobody knows": (["BASE", "--base"], "--base: it belongs to no run  leave --base out", 2),
    "a reward model": (["REWARD"], "a reward model gives a number and writes no text", 2),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_named(
    name: str, folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words, said, code = MISTAKES[name]
    places = {key.upper(): str(folder) for key, folder in folders.items()}
    if "b=OTHER" in words:
        places["OTHER"] = str(
            kit.save_adapter(tmp_path / "other", kit.save_model(tmp_path / "base2", num_hidden_layers=1))
        )
    if words == ["REWARD"]:
        reward = tmp_path / "reward"
        reward.mkdir()
        (reward / "config.json").write_text(json.dumps({"architectures": ["LlamaForSequenceClassification"]}))
        places["REWARD"] = str(reward)
    for key, place in places.items():
        words = [word.replace(key, place) for word in words]
    assert main([*words, "--max-new-tokens", "2", *([] if "--json" in words else ["--prompt", "x"])]) == code
    message = capsys.readouterr().err
    assert said in message
    assert "Traceback" not in message
