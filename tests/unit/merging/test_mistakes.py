"""What is not understood is refused with what is wrong and what to do: by the commands, no traceback, no folder."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from merging_kit import add_tokenizer, make_adapter, make_base, tensors
from peft import IA3Config, LoraConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from distft import adapter_sources, adapters, merge
from distft.core import hub

PLAIN = LoraConfig(r=2, target_modules=["q_proj", "down_proj"])
ROWS = ["w3 w4 w5 w6 w7", "w9 w8 w7 w6", "w10 w11 w12"]


@dataclass(frozen=True, kw_only=True)
class Place:
    """A base, another base, an adapter and rows, in a folder of their own."""

    folder: Path

    def __getattr__(self, name: str) -> Path:
        return self.folder / name


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    base = make_base(folder / "base")
    make_base(folder / "wider", hidden_size=32)
    make_base(folder / "other", "gpt2")
    make_base(folder / "full", seed=5)
    make_adapter(folder / "adapter", base, PLAIN)
    make_adapter(folder / "ia3", base, IA3Config(target_modules=["k_proj"], feedforward_modules=[]))
    (folder / "rows.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in ROWS))
    return folder


@pytest.fixture
def place(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    config = tmp_path / "adapter/adapter_config.json"
    raw = json.loads(config.read_text())
    config.write_text(json.dumps({**raw, "base_model_name_or_path": str(tmp_path / "base")}))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return Place(folder=tmp_path)


def said(capsys: pytest.CaptureFixture[str], main: Callable[[list[str]], int], words: list[Any]) -> tuple[int, str]:
    try:
        code = main([str(word) for word in words])
    except SystemExit as end:  # argparse
        code = int(end.code or 0)
    return code, capsys.readouterr().err


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    file = folder / "adapter_model.safetensors"
    held = load_file(file)
    change(held)
    save_file(held, file, metadata={"format": "pt"})


def configure(folder: Path, **values: Any) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


Q = "base_model.model.model.layers.0.self_attn.q_proj"
MERGE: dict[str, tuple[Callable[[Place], Any], list[str], int, str]] = {
    "another width": (
        lambda p: None, ["--base", "{wider}"], 2,
        "B A is made for model.layers.0.self_attn.q_proj.weight of shape (16, 16), and the base has (32, 32)",
    ),
    "another architecture": (
        lambda p: None, ["--base", "{other}"], 2, "the base has no such module (GPT2LMHeadModel)  give the base",
    ),
    "more layers than the base": (
        lambda p: rewrite(p.adapter, lambda t: t.update(
            {k.replace("layers.0", "layers.7"): v.clone() for k, v in t.items()})),
        [], 2, "model.layers.7.self_attn.q_proj: the base has no such module (LlamaForCausalLM)",
    ),
    "no base is named": (lambda p: configure(p.adapter, base_model_name_or_path=None), [], 2,
                         "names no base_model_name_or_path  --base FOLDER or owner/name"),
    "a base that is not there": (lambda p: None, ["--base", "/nowhere"], 2,
                                     "base /nowhere: no such folder  --base FOLDER or owner/name"),
    "a tensor that is not understood": (
        lambda p: rewrite(p.adapter, lambda t: t.update({f"{Q}.lora_E": torch.ones(2)})), [], 2,
        f"1 tensors that are not understood: {Q}.lora_E",
    ),
    "a tensor that is missing": (
        lambda p: rewrite(p.adapter, lambda t: t.pop(f"{Q}.lora_B.weight")), [], 2,
        "model.layers.0.self_attn.q_proj: a without b",
    ),
    "a module that is missing": (
        lambda p: rewrite(p.adapter, lambda t: [t.pop(k) for k in list(t) if k.startswith(Q)]), [], 2,
        "model.layers.0.self_attn.q_proj: target_modules names it, and the file holds nothing of it",
    ),
    "another rank than the config's": (
        lambda p: configure(p.adapter, r=3), [], 2, "A is (2, 16) and B is (16, 2), and the config says rank 3",
    ),
    "a magnitude that is missing": (lambda p: configure(p.adapter, use_dora=True), [], 2,
                                    "no magnitude, and use_dora is True"),
    "a matrix that is a vector": (
        lambda p: rewrite(p.adapter, lambda t: t.update({f"{Q}.lora_A.weight": torch.ones(32)})), [], 2,
        f"{Q}.lora_A.weight has 1 dimensions, not 2",
    ),
    "a number that is a matrix": (
        lambda p: rewrite(p.adapter, lambda t: t.update({f"{Q}.lora_B.weight": torch.tensor(1.0)})), [], 2,
        f"{Q}.lora_B.weight has 0 dimensions, not 2",
    ),
    "tensors in 8 bits": (
        lambda p: rewrite(p.adapter, lambda t: t.update({f"{Q}.lora_A.weight": torch.ones(2, 16, dtype=torch.int8)})),
        [], 2, f"{Q}.lora_A.weight is stored as I8: adapters in 8 bits or less are not understood",
    ),
    "a module to save that is missing": (lambda p: configure(p.adapter, modules_to_save=["lm_head"]), [], 2,
                                         "modules_to_save names lm_head, and the file holds none of its tensors"),
    "a file that was cut": (
        lambda p: (p.adapter / "adapter_model.safetensors").write_bytes(
            (p.adapter / "adapter_model.safetensors").read_bytes()[:-9]), [], 2, "the file is cut:",
    ),
    "pickled weights": (
        lambda p: (p.adapter / "adapter_model.safetensors").rename(p.adapter / "adapter_model.bin"), [], 2,
        "only adapter_model.bin, which can run code when it is read",
    ),
    "values that are not finite": (
        lambda p: rewrite(p.adapter, lambda t: t[f"{Q}.lora_A.weight"].fill_(float("inf"))), [], 2,
        "model.layers.0.self_attn.q_proj.weight is not finite with the adapter in it",
    ),
    "a value beyond the type": (
        lambda p: rewrite(p.adapter, lambda t: t[f"{Q}.lora_A.weight"].fill_(1e6)), ["--dtype", "float16"], 2,
        "does not fit into float16  --dtype bfloat16 or float32",
    ),
    "no tokenizer": (
        lambda p: [path.unlink() for path in p.base.glob("tokenizer*")], ["--rows", "none"], 3,
        "copy tokenizer.json and tokenizer_config.json into the base's folder",
    ),
    "a tokenizer with more tokens": (
        lambda p: (p.base / "tokenizer.json").write_text(
            (p.base / "tokenizer.json").read_text().replace('"w63": 63', '"w63": 164')), ["--rows", "none"], 3,
        "its largest token is 164, and the embedding has 64 rows",
    ),
    "no rows": (lambda p: None, ["--rows", ""], 2, "--rows: 1 problem\n  -        is empty"),
    "rows that are not there": (lambda p: None, ["--rows", "{folder}/nothing.jsonl"], 3, "nothing.jsonl"),
    "a bound that is none": (lambda p: None, ["--max-kl", "-1"], 2, "--max-kl: 1 problem\n  -        -1.0 is no bound"),
    "a bound without a comparison": (lambda p: None, ["--max-kl", "0.1", "--rows", "none"], 2,
                                     "has no effect with --rows none"),
    "four bits of a base that was not": (lambda p: None, ["--quantize"], 2,
                                         "the adapter was not trained beside a 4-bit base  leave --quantize out"),
    "a folder that is there": (lambda p: (p.merged.mkdir(), (p.merged / "notes.txt").write_text("mine")), [], 8,
                               "exists, and was not overwritten  name another folder, or remove it"),
    "the base as output": (lambda p: None, ["--out", "{base}"], 8, "which is read  name another folder"),
    "a folder above the adapter as output": (lambda p: None, ["--out", "{folder}"], 8, "is or holds"),
    "a task of another kind": (lambda p: configure(p.adapter, task_type="SEQ_2_SEQ_LM"), [], 2,
                               "task_type SEQ_2_SEQ_LM is not understood here  understood are CAUSAL_LM, SEQ_CLS"),
}  # fmt: skip
CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "an unknown key": ({"use_flora": True}, "use_flora = true: the key is not known here"),
    "an unknown key, nearly known": ({"use_rslorra": True}, "did you mean use_rslora?"),
    "QALoRA": ({"use_qalora": True}, "QALoRA averages its inputs in groups"),
    "aLoRA": ({"alora_invocation_tokens": [1, 2]}, "acts behind its invocation tokens only"),
    "layers that repeat": ({"layer_replication": [[0, 2], [1, 2]]}, "a model with repeated layers"),
    "KaSA": ({"kasa_config": {"beta": 0.1}}, "KaSA truncates the base weights"),
    "MonteCLoRA": ({"monteclora_config": {"num_samples": 2}}, "draws its weights anew"),
    "LoftQ": ({"loftq_config": {"loftq_bits": 4}}, "LoftQ's initialisation changed the base weights"),
    "PiSSA": ({"init_lora_weights": "pissa"}, "path_initial_model_for_weight_conversion"),
    "PiSSA by iterations": ({"init_lora_weights": "pissa_niter_4"}, "it changed the base weights"),
    "OLoRA": ({"init_lora_weights": "olora"}, "it changed the base weights"),
    "an alpha that is a text": ({"lora_alpha": "16"}, 'lora_alpha = "16": must be a number'),
    "no rank": ({"r": 0}, "r = 0: must be a whole number of at least 1"),
    "a pattern that is none": ({"rank_pattern": {"(q": 4}}, "'(q' is no regular expression"),
    "targets that are no expression": ({"target_modules": "(q_proj"}, "target_modules: '(q_proj' is no regular"),
    "a bias of another kind": ({"bias": "some"}, 'must be "none", "all" or "lora_only"'),
    "a list that is a number": ({"modules_to_save": 3}, "modules_to_save = 3: must be a list of names"),
    "an unknown type": ({"peft_type": "VERA"}, "peft_type 'VERA' is not understood here"),
    "no type": ({"peft_type": None}, "no peft_type"),
}


@pytest.mark.parametrize("case", MERGE)
def test_merge_refuses(case: str, place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    spoil, more, code, message = MERGE[case]
    spoil(place)
    before = sorted(path.name for path in place.folder.iterdir())
    names = {name: str(place.folder / name) for name in ("base", "wider", "other")}
    words = [word.format(folder=place.folder, **names) for word in more]
    defaults = [("--out", place.merged), ("--rows", place.folder / "rows.jsonl")]
    words += [str(part) for pair in defaults if pair[0] not in words for part in pair]
    got, text = said(capsys, merge.main, [place.adapter, *words])
    assert (got, message in text) == (code, True), text
    assert "Traceback" not in text
    left = {path.name for path in place.folder.iterdir()} - {"cache"}
    assert left == set(before), "nothing half-written is left"


@pytest.mark.parametrize("case", CONFIGS)
def test_configs_that_are_not_understood(case: str, place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    values, message = CONFIGS[case]
    configure(place.adapter, **values)
    for main, words in ((merge.main, ["--out", place.merged, "--rows", "none"]), (adapters.main, [])):
        first = [place.adapter] if main is merge.main else ["inspect", place.adapter]
        code, text = said(capsys, main, [*first, *words])
        assert (code, message in text) == (2, True), text


@pytest.mark.parametrize("config", [
    PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2),
    PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2),
], ids=["prompt", "prefix"])  # fmt: skip
def test_prompts_are_refused(config: Any, place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    get_peft_model(AutoModelForCausalLM.from_pretrained(place.base), config).save_pretrained(place.prompt)
    code, text = said(capsys, merge.main, [place.prompt, "--out", place.merged, "--rows", "none"])
    assert code == 2
    assert "trains inputs or prefixes, not weights" in text


ADAPTERS: dict[str, tuple[str, int, str]] = {
    "unknown way": ("combine {a} {a} --how tise --out {o}", 2, "did you mean ties?"),
    "density out of range": ("combine {a} {a} --how ties --density 1.5 --out {o}", 2,
                             "--density = 1.5: input should be less than or equal to 1"),
    "density of zero": ("combine {a} {a} --how dare_ties --density 0 --out {o}", 2, "should be greater than 0"),
    "no density": ("combine {a} {a} --how ties --out {o}", 2, "--density is missing"),
    "a setting of another way": ("combine {a} {a} --how linear --density 0.5 --out {o}", 2,
                                 "--density has no effect on linear  linear takes no settings"),
    "chances beyond 1": ("combine {a} {a} --how della --density 0.98 --epsilon 0.2 --out {o}", 2,
                         "chances from 0.88 to 1.08 must lie between 0 and 1"),
    "weights for fewer": ("combine {a} {a} --how linear --weights 1 --out {o}", 2, "1 for 2 adapters"),
    "weights of slerp": ("combine {a} {a} --how slerp --t 0.5 --weights 1 1 --out {o}", 2, "takes no --weights"),
    "slerp of three": ("combine {a} {a} {a} --how slerp --t 0.5 --out {o}", 2, "takes 2 adapters, and 3 are given"),
    "a rank of cat": ("combine {a} {a} --how cat --rank 3 --out {o}", 2, "cat keeps the sum of the ranks"),
    "a rank beyond the matrix": ("combine {a} {a} --how linear --rank 17 --out {o}", 2, "at most 16"),
    "IA3 has no rank": ("combine {ia3} --how linear --base {base} --out {o}", 2, "none of the adapters has a rank"),
    "IA3 as a product": ("combine {a} {ia3} --how cat --base {base} --out {o}", 2, "is no product of two matrices"),
    "a model without its base": ("combine {full} {a} --how linear --out {o}", 2, "known from its base alone  --base"),
    "a model of another base": ("combine {wider} --how linear --base {base} --out {o}", 2, "(16,) in the base"),
    "a rank of a model": ("combine {full} --how linear --rank 2 --base {base} --out {o}", 2, "leave --rank out"),
    "bases that differ": ("combine {a} {b} --how linear --out {o}", 2, "they have different bases"),
    "a type of an adapter": ("combine {a} --how linear --dtype bfloat16 --out {o}", 2, "leave --dtype out"),
    "output that is read": ("combine {a} {a} --how linear --out {a}", 8, "is or holds"),
    "no output": ("combine {a} {a} --how linear", 2, "--out is missing"),
    "flags of another action": ("inspect {a} --rank 3 --how ties", 2, "--how has no effect on inspect"),
    "an unknown action": ("combien {a}", 2, "did you mean combine?"),
    "two to inspect": ("inspect {a} {a}", 2, "2 adapters for inspect  it takes 1"),
    "one to compare": ("diff {a}", 2, "1 adapters for diff  it takes 2"),
    "IA3 without its base": ("inspect {ia3}", 2, "has peft_type IA3: a look without --base takes plain LoRA"),
    "a model to inspect": ("inspect {full}", 2, "known from its base alone"),
    "an adapter to extract": ("extract {a} --base {base} --rank 2 --out {o}", 2, "is an adapter already"),
    "nothing to extract": ("extract {base} --base {same} --rank 2 --out {o}", 2, "no tensor differs from the base's"),
    "extract with a large rank": ("extract {full} --base {base} --rank 99 --out {o}", 2, "at most 16"),
    "extract of another model": ("extract {other} --base {base} --rank 2 --out {o}", 2, "not there"),
    "resize to a larger rank": ("resize {a} --rank 4 --out {o}", 2, "a larger rank holds nothing more  at most 1"),
    "resize of IA3": ("resize {ia3} --rank 1 --out {o}", 2, "merge it (distft merge), and extract"),
    "a rank of zero": ("resize {a} --rank 0 --out {o}", 2, "must be a whole number of at least 1"),
    "a scale that it has": ("convert {a} --scale plain --out {o}", 2, "its scale is plain already"),
    "an unknown scale": ("convert {a} --scale 2 --out {o}", 2, "allowed: plain, rslora"),
    "IA3 has no scale": ("convert {ia3} --scale rslora --out {o}", 2, "has no scale"),
    "a folder of nothing": ("inspect {empty}", 2, "neither a run, nor a folder with adapter_config.json"),
}  # fmt: skip


@pytest.mark.parametrize("case", ADAPTERS)
def test_adapters_refuses(case: str, place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    line, code, message = ADAPTERS[case]
    place.empty.mkdir()
    if "{b}" in line:
        shutil.copytree(place.adapter, place.second)
        configure(place.second, base_model_name_or_path=str(place.wider))
    if "{same}" in line:
        shutil.copytree(place.base, place.same)
    before = {path.name for path in place.folder.iterdir()}
    names = {name: place.folder / name for name in ("base", "wider", "other", "full", "ia3", "empty", "same")}
    words = line.format(a=place.adapter, b=place.second, o=place.out, **names).split()
    got, text = said(capsys, adapters.main, words)
    assert (got, message in text) == (code, True), text
    assert "Traceback" not in text
    assert {path.name for path in place.folder.iterdir()} == before


def test_the_commands_on_a_run(
    place: Place, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run's folder: its base, its 4-bit storage, its tokenizer and its held-out rows come from its recipe."""
    run = place.folder / "runs/x"
    run.mkdir(parents=True)
    recipe = f"""
name = "x"
[model]
path = "{place.base}"
dtype = "float32"
[method]
name = "qlora"
r = 2
target_modules = ["q_proj", "down_proj"]
[data]
max_length = 16
packing = false
[[data.train]]
path = "{place.folder}/rows.jsonl"
[[data.eval]]
path = "{place.folder}/held-out.jsonl"
"""
    (run / "recipe.toml").write_text(recipe)
    (place.folder / "held-out.jsonl").write_text(json.dumps({"text": "w20 w21 w22 w23"}) + "\n")
    code, text = said(capsys, merge.main, [run, "--out", place.merged])
    assert (code, "the run has no final/" in text) == (2, True)
    shutil.copytree(place.adapter, run / "final")
    assert merge.main([str(run), "--out", str(place.merged), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["base_in_4bit"] == 14
    assert report["comparison"]["num_rows"] == 1
    assert report["comparison"]["kl"] < 1e-6
    start, merged = tensors(place.base), tensors(place.merged)
    assert not torch.equal(start["model.layers.0.self_attn.k_proj.weight"], merged["model.layers.0.self_attn.k_proj.weight"])  # fmt: skip  # noqa: E501
    # A hub id comes through the resolver that models have.
    asked: list[Any] = []
    monkeypatch.setattr(hub, "snapshot", lambda *words: asked.append(words) or place.adapter)
    code, text = said(capsys, adapters.main, ["inspect", "some/adapter"])
    assert (code, asked[0][0], "adapter_model.safetensors" in asked[0][2]) == (0, "some/adapter", True), text
    monkeypatch.undo()
    # The final/ of a run is known to be one; and the merged folder is nothing to merge.
    assert merge.main([str(run / "final"), "--out", str(place.again), "--rows", str(place.folder / "rows.jsonl")]) == 0
    assert "tensors of the base as the run had them" in capsys.readouterr().out
    code, text = said(capsys, merge.main, [place.merged, "--out", place.third])
    assert (code, "is a whole model already" in text) == (2, True)
    (run / "recipe.toml").write_text(recipe.replace('dtype = "float32"', 'dtype = "float32"\ninit = "random"'))
    code, text = said(capsys, merge.main, [run, "--out", place.third])
    assert (code, "the run began from random weights" in text) == (2, True)
    (run / "recipe.toml").write_text(recipe.partition("[[data.eval]]")[0])
    code, text = said(capsys, merge.main, [run, "--out", place.third])
    assert (code, "the run's recipe has no [[data.eval]]" in text) == (2, True)


def test_documents_of_rows_that_hold_several() -> None:
    """Pairs are two documents of one row: the model reads each for itself."""

    class Rows:
        num_rows = 2

        def row(self, index: int) -> tuple[np.ndarray, np.ndarray]:
            ids = np.arange(5, dtype=np.int32) + 10 * index
            return ids, np.ones(5, np.uint8)

        def documents(self, index: int) -> list[int]:
            return [2, 3]

    rows: Any = Rows()
    assert adapter_sources.documents(rows) == [[0, 1], [2, 3, 4], [10, 11], [12, 13, 14]]


def test_the_commands_show_what_they_did(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    add_tokenizer(place.adapter)
    pair = [str(place.adapter)] * 2
    flags = ["--how", "linear", "--weights", "1", "-0.5", "--out", str(place.out)]
    assert adapters.main(["combine", *pair, *flags]) == 0
    shown = capsys.readouterr().out
    assert "in all: relative error" in shown
    assert (place.out / "tokenizer.json").is_file()
    assert adapters.main(["diff", str(place.out), str(place.adapter), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["cosine"] == pytest.approx(1.0, abs=1e-5)
    assert adapters.main(["inspect", str(place.adapter)]) == 0
    assert "4 tensors changed" in capsys.readouterr().out
    assert adapters.main(["inspect", str(place.ia3), "--base", str(place.base), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["peft_type"] == "IA3"
    assert adapters.main(["extract", str(place.full), "--base", str(place.base), "--rank", "4", "--out",
                          str(place.extracted)]) == 0  # fmt: skip
    assert adapters.main(["resize", str(place.extracted), "--rank", "2", "--out", str(place.small)]) == 0
    assert adapters.main(["convert", str(place.small), "--scale", "rslora", "--out", str(place.stable)]) == 0
    assert "scale rslora" in capsys.readouterr().out
