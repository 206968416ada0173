"""Mistakes of people who export: each says what is wrong, what is allowed and the fix; nothing half-written is left."""

import json
import logging
import resource
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import export_kit as kit
import pytest
from tokenizers import Regex, Tokenizer, models, pre_tokenizers

from distft.core.errors import DistftError
from distft.export_formats import llama_cpp, llama_cpp_quantizer
from distft.export_formats.command import main


@dataclass(frozen=True)
class Mistake:
    """What is done, and what has to be said of it."""

    words: tuple[str, ...]
    said: tuple[str, ...]
    code: int
    prepare: Callable[[Path], Any] = lambda model: None


def edit(file: str, **changes: Any) -> Callable[[Path], None]:
    def change(model: Path) -> None:
        content = json.loads((model / file).read_text())
        (model / file).write_text(json.dumps(content | changes))

    return change


def without_tokenizer(model: Path) -> None:
    for file in model.glob("*token*"):
        file.unlink()
    (model / "chat_template.jinja").unlink()


def with_pieces_of_its_own(model: Path) -> None:
    made = kit.byte_level()
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(r"\d| ?\p{L}+|\s"), "isolated"), pre_tokenizers.ByteLevel(use_regex=False)]
    )
    kit.save_tokenizer(made, model)


def with_words(model: Path) -> None:
    from tokenizers import trainers

    made = Tokenizer(models.WordLevel(unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.train_from_iterator(kit.SENTENCES, trainers.WordLevelTrainer(special_tokens=kit.SPECIAL, show_progress=False))
    kit.save_tokenizer(made, model)


def with_too_many_ids(model: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.add_tokens([f"more{number}" for number in range(60)])
    tokenizer.save_pretrained(model)


def with_rows(model: Path) -> None:
    rows = [json.dumps({"prompt": "fine"}), json.dumps({"question": "what?"})]
    (model.parent / "rows.jsonl").write_text("\n".join(rows))


def break_weights(model: Path) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    tensors = load_file(model / "model.safetensors")
    tensors["model.norm.weight"][3] = torch.nan
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})


def enlarge_weights(model: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][0, 0] = 1e6
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})


def with_a_score(model: Path) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    tensors = load_file(model / "model.safetensors") | {"score.weight": torch.ones(1, 64)}
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})


def drop_weights(model: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(model / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})


def with_one_stop(model: Path) -> None:
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": 2}))
    (model / "chat_template.jinja").unlink()  # or the end of its answers would be looked at first


GGUF = ("--as", "gguf", "--num-rows", "2")
F32 = (*GGUF, "--level", "F32")
MISTAKES = {
    "unknown format": Mistake(("--as", "ggfu"), ("--as ggfu  unknown format", 'did you mean "gguf"', "safetensors"), 2),
    "unknown level": Mistake((*GGUF, "--level", "Q4_K"), ("--level Q4_K", "did you mean Q4_K_M", "Q8_0"), 2),
    "level of a format without": Mistake(("--as", "safetensors", "--level", "F16"), ("safetensors has no levels",), 2),
    "K level of narrow rows": Mistake(
        (*GGUF, "--level", "Q4_K_M"), ("rows of 64 numbers are no multiple of 256", "say nothing", "Q8_0"), 3
    ),
    "rows for a level that takes none": Mistake(
        (*F32, "--calibration", "rows.jsonl"), ("--calibration: gguf F32 fits its rounding to no rows",), 2
    ),
    "calibration rows that are not there": Mistake(
        (*GGUF, "--level", "Q4_K_M", "--calibration", "nowhere.jsonl"), ("nowhere.jsonl",), 3,
        lambda model: kit.save_model(model, hidden_size=256, intermediate_size=256, head_dim=64),
    ),
    "a further end in llama.cpp": Mistake(
        F32,
        ("<|im_end|> (id 4) ends an answer there, and not in the source", "eos_token_id of its generation_config.json"),
        5,
        with_one_stop,
    ),
    "max-drop without a run": Mistake((*F32, "--max-drop", "0.1"), ("--max-drop: the source belongs to no run",), 2),
    "unknown setting": Mistake((*F32, "--set", "threads=2"), ("--set threads=2  is no setting of gguf",), 2),
    "wrong value": Mistake(("--as", "ollama", "--set", "context=-1"), ("--set context", "greater than or equal"), 2),
    "no tokenizer": Mistake(F32, ("the folder holds no tokenizer.json",), 3, without_tokenizer),
    "a whole model as an adapter": Mistake(("--as", "peft"), ("a whole model, and this format holds adapters",), 2),
    "a reward model as gguf": Mistake(
        F32,
        ("a reward model gives a number, and llama.cpp would load it as a model that writes text",),
        2,
        edit("config.json", architectures=["LlamaForSequenceClassification"], num_labels=1),
    ),
    "a reward model that its config calls a language model": Mistake(
        F32, ("score.weight: llama.cpp's llama has no such tensor",), 3, with_a_score
    ),
    "the same as safetensors": Mistake(
        ("--as", "safetensors"), ("computes without score.weight", "…ForSequenceClassification"), 3, with_a_score
    ),
    "a model that llama.cpp does not know": Mistake(
        F32, ('model_type "gpt_neox" is a model that llama.cpp does not know', "allowed: llama, mistral"), 3,
        lambda model: kit.save_model(model, "gpt_neox"),
    ),
    "a window that llama.cpp does not compute": Mistake(
        F32, ("sliding_window = 32 is not computed by llama.cpp's mistral",), 3,
        lambda model: kit.save_model(model, "mistral", sliding_window=32),
    ),
    "a head that is wider": Mistake(
        F32, ("head_dim = 32 is not computed by llama.cpp's qwen2  allowed: 16",), 3,
        lambda model: kit.save_model(model, "qwen2", tokenizer=kit.byte_level()),
    ),
    "another activation": Mistake(
        F32, ('activation "relu" is none of llama.cpp\'s llama  allowed: silu',), 3,
        edit("config.json", hidden_act="relu"),
    ),
    "a rotation that is not written": Mistake(
        F32, ('rope_type "dynamic" is not written for llama.cpp  allowed: default, linear, llama3',), 3,
        edit("config.json", rope_parameters={"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}),
    ),
    "pieces that have no name": Mistake(
        F32, ("llama.cpp has no pre_tokenizer", "the pieces of gpt-2, smollm", "safetensors instead"), 3,
        with_pieces_of_its_own,
    ),
    "a tokenizer of words": Mistake(F32, ("tokenizer: llama.cpp has no model WordLevel  allowed: BPE",), 3, with_words),
    "more tokens than rows": Mistake(
        F32, ("the tokenizer has ids up to", "and the embedding 448 rows"), 3, with_too_many_ids
    ),
    "a row of another kind": Mistake(
        (*F32, "--rows", "ROWS"), ("rows.jsonl line 2: allowed:", '{"prompt": text}'), 3, with_rows
    ),
    "rows that are not there": Mistake((*F32, "--rows", "ROWS"), ("--rows", "cannot be read"), 3),
    "numbers that are none": Mistake(F32, ("model.norm.weight: holds numbers that are not finite",), 3, break_weights),
    "numbers too large for F16": Mistake(
        (*GGUF, "--level", "F16"), ("holds 1e+06, more than F16 can (65504)  allowed: F32, BF16",), 3, enlarge_weights
    ),
    "weights that are missing": Mistake(
        ("--as", "safetensors"), ("has no weights for model.layers.1.mlp.up_proj.weight, which would be random",), 3,
        drop_weights,
    ),
    "weights that are missing, as gguf": Mistake(
        F32, ("has no weights for model.layers.1.mlp.up_proj.weight, which would be random",), 3, drop_weights
    ),
    "no chat template for Ollama": Mistake(
        ("--as", "ollama"), ("the tokenizer has no chat template, and Ollama serves chats",), 3,
        lambda model: (model / "chat_template.jinja").unlink(),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_named_and_nothing_is_left(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging, "raiseExceptions", False)  # transformers logs to the stream of an earlier test
    mistake = MISTAKES[name]
    model = kit.save_model(tmp_path / "model")
    mistake.prepare(model)
    words = [str(tmp_path / "rows.jsonl") if word == "ROWS" else word for word in mistake.words]
    capsys.readouterr()
    out = tmp_path / "exports" / "out"
    code = main([str(model), "--out", str(out), *words])
    message = capsys.readouterr().err
    for part in mistake.said:
        assert part in message
    assert code == mistake.code
    assert "Traceback" not in message
    assert not out.parent.exists() or list(out.parent.iterdir()) == []


def test_a_source_that_is_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    run = tmp_path / "run"
    (run / "checkpoints" / "step-00000010").mkdir(parents=True)
    (run / "recipe.toml").touch()
    (run / "manifest.json").touch()
    said = {
        "missing": "there is no such folder",
        "empty": "it is neither a run, a checkpoint, a model nor an adapter",
        "run": "the run has no final/: it has not ended yet  allowed: a checkpoint of it (step-00000010)",
    }
    for name, text in said.items():
        assert main([str(tmp_path / name), "--as", "gguf", "--out", str(tmp_path / "out")]) == 2
        assert text in capsys.readouterr().err
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "base_model_name_or_path": "nobody/none"})
    )
    kit.save_tokenizer(kit.byte_fallback(), adapter)
    assert main([str(adapter), "--as", "safetensors", "--out", str(tmp_path / "out")]) == 2
    assert "its base nobody/none is no folder here" in capsys.readouterr().err


def test_what_is_there_is_not_written_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine").touch()
    assert main(["anything", "--as", "gguf", "--out", str(out)]) == 2
    assert "is there already  name a folder that is not" in capsys.readouterr().err
    assert [path.name for path in out.iterdir()] == ["mine"]


def test_a_disk_that_takes_no_more_leaves_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = kit.save_model(tmp_path / "model")
    out = tmp_path / "exports" / "out"
    limit, action = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, limit[1]))  # the file would have 480,000 bytes
        code = main([str(model), "--out", str(out), *F32])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, action)
    assert code == 8
    message = capsys.readouterr().err
    assert "cannot be written (" in message
    assert "nothing of it is left  fix: free the disk" in message
    assert list(out.parent.iterdir()) == []


def test_without_llama_cpp_only_on_purpose(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = kit.save_model(tmp_path / "model")
    monkeypatch.setattr(llama_cpp, "missing", lambda: "xllamacpp is not installed")
    out = tmp_path / "exports" / "out"
    assert main([str(model), "--out", str(out), *F32]) == 9
    message = capsys.readouterr().err
    assert "xllamacpp is not installed: nothing has loaded the file" in message
    assert "or write it all the same with --unproven" in message
    assert list(out.parent.iterdir()) == []
    assert main([str(model), "--out", str(out), *F32, "--unproven"]) == 0
    assert "NOT compared" in capsys.readouterr().out
    written = json.loads((out / "certificate.json").read_text())
    assert (written["proven"], written["levels"][0]["checks"]) == (False, [])
    assert "not compared with what it was made of" in (out / "README.md").read_text()


def test_k_levels_say_what_brings_the_quantiser(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = kit.save_model(tmp_path / "model", hidden_size=256, intermediate_size=256, head_dim=64)
    words = [str(model), "--as", "gguf", "--level", "Q4_K_M", "--out", str(tmp_path / "out")]
    monkeypatch.setattr(llama_cpp_quantizer, "_library", lambda: object())
    assert main(words) == 9
    assert "this xllamacpp exports no ggml_quantize_chunk" in capsys.readouterr().err
    monkeypatch.setattr(llama_cpp_quantizer, "why_not", lambda package: f"{package} is not installed")
    assert main(words) == 9
    assert "xllamacpp is not installed  pip install 'distft[export]'" in capsys.readouterr().err


def test_errors_are_the_project_s_own(tmp_path: Path) -> None:
    with pytest.raises(DistftError):
        kit.export(tmp_path, tmp_path / "out", "--as", "gguf")
