"""safetensors, peft and ollama: what is written, read by the libraries that load it."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import export_kit as kit
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from distft.core.errors import DataError, NumericError, RecipeError
from distft.data.templates import read_template
from distft.export_formats import go_template, ollama, peft_adapter
from distft.export_formats.proof_rows import BUILT_IN_CHATS

IDS = torch.tensor([[1, 280, 300, 310, 275, 290, 333, 301]])


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def test_a_merged_folder_computes_what_base_and_adapter_do(tmp_path: Path) -> None:
    from peft import PeftModel

    base = kit.save_model(tmp_path / "base")
    adapter = kit.save_adapter(tmp_path / "adapter", base)
    made = kit.export(adapter, tmp_path / "out", "--as", "safetensors", "--num-rows", "3")
    assert all(check["ok"] for check in kit.checks(made).values())
    assert kit.checks(made)["logits"]["value"] < 1e-3
    beside = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), adapter).eval()
    alone = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    torch.testing.assert_close(logits(alone), logits(beside), atol=1e-4, rtol=1e-4)
    assert "lm_head.weight" not in load_file(tmp_path / "out" / "model.safetensors"), "tied: stored once"
    assert alone.generation_config.eos_token_id == [2, 4]
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == kit.CHATML
    assert made["levels"][0]["commands"] == ["vllm serve PATH", "transformers chat PATH"]


def test_a_large_model_is_split_and_its_index_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from distft.export_formats import safetensors_folder

    monkeypatch.setattr(safetensors_folder, "MAX_FILE_BYTES", 100_000)
    model = kit.save_model(tmp_path / "model", tie_word_embeddings=False)
    out = tmp_path / "out"
    kit.export(model, out, "--as", "safetensors", "--num-rows", "2")
    files = sorted(out.glob("model-*.safetensors"))
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert len(files) > 3
    assert set(index["weight_map"].values()) == {file.name for file in files}
    found = {name: tensor for file in files for name, tensor in load_file(file).items()}
    want = load_file(model / "model.safetensors")
    assert found.keys() == want.keys() == index["weight_map"].keys()
    assert all(torch.equal(found[name], want[name]) for name in want)


def test_a_reward_model_is_compared_by_its_rewards(tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoModelForSequenceClassification

    model = kit.save_model(tmp_path / "model")
    config = AutoConfig.from_pretrained(model, num_labels=1)
    made = AutoModelForSequenceClassification.from_config(config, dtype=torch.float32)
    made.save_pretrained(model)
    certificate = kit.export(model, tmp_path / "out", "--as", "safetensors", "--num-rows", "3")
    assert kit.checks(certificate)["rewards"] | {"detail": ""} == {
        "name": "rewards", "compared": "largest difference of a reward of prompts", "count": 3, "value": 0.0,
        "bound": "at most 0.001", "ok": True, "detail": "",
    }  # fmt: skip


def test_an_adapter_of_a_reward_model_keeps_its_head(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As PEFT's own folder says it: rank-stabilised, the head saved whole; merged, and beside its base."""
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification as Rewards

    base = kit.save_model(tmp_path / "base")
    adapter = kit.save_reward_adapter(tmp_path / "adapter", base, use_rslora=True)
    fresh = Rewards.from_pretrained(base, num_labels=1, dtype=torch.float32)
    want = logits(PeftModel.from_pretrained(fresh, adapter).eval())

    whole = kit.export(adapter, tmp_path / "whole", "--as", "safetensors", "--num-rows", "3")
    torch.testing.assert_close(logits(Rewards.from_pretrained(tmp_path / "whole")), want, atol=1e-5, rtol=1e-4)
    beside = kit.export(adapter, tmp_path / "beside", "--as", "peft", "--num-rows", "3")
    fresh = Rewards.from_pretrained(base, num_labels=1, dtype=torch.float32)
    torch.testing.assert_close(logits(PeftModel.from_pretrained(fresh, tmp_path / "beside")), want)
    config = json.loads((tmp_path / "beside/adapter_config.json").read_text())
    assert (config["modules_to_save"], config["use_rslora"], config["task_type"]) == (["score"], False, "SEQ_CLS")
    for made in (whole, beside):
        found = kit.checks(made)["rewards"]
        assert (found["ok"], found["count"]) == (True, 3)
        assert found["value"] < 1e-5
    for words in (("--as", "gguf"), ("--as", "ollama"), ("--as", "fp8"), ("--as", "awq")):
        with pytest.raises(RecipeError, match="a reward model gives a number"):
            kit.export(adapter, tmp_path / "no", *words)

    write = peft_adapter._write

    def with_another_head(params: Any, inputs: Any, folder: Path, level: str) -> Any:
        done = write(params, inputs, folder, level)
        file = folder / "adapter_model.safetensors"
        tensors = load_file(file)
        tensors["base_model.model.score.weight"] *= 1.01
        save_file(tensors, file, metadata={"format": "pt"})
        return done

    planted = {"peft": replace(peft_adapter.SPEC, write=with_another_head)}
    monkeypatch.setattr("distft.export_formats.EXPORT_FORMATS._specs", planted)
    with pytest.raises(NumericError, match=r"rewards: .* allowed at most 0\.001"):
        kit.export(adapter, tmp_path / "out", "--as", "peft", "--num-rows", "2")


# -- adapters ------------------------------------------------------------------------------------------------------

ADAPTERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rsLoRA": {"use_rslora": True},
    "rsLoRA, ranks and alphas of their own": {
        "use_rslora": True,
        "rank_pattern": {"q_proj": 8, "layers.1.mlp.down_proj": 2},
        "alpha_pattern": {"v_proj": 32},
    },
    "one layer of two": {"layers_to_transform": [1]},
    "chosen by an expression": {"target_modules": r".*\.(q|o)_proj"},
}


QUICK = ("plain", "rsLoRA, ranks and alphas of their own")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in QUICK else [pytest.mark.slow]) for name in ADAPTERS]
)
def test_a_reader_that_knows_alpha_and_r_alone_computes_the_same(name: str, tmp_path: Path) -> None:
    from peft import PeftModel

    base = kit.save_model(tmp_path / "base")
    adapter = kit.save_adapter(tmp_path / "adapter", base, **ADAPTERS[name])
    out = tmp_path / "out"
    made = kit.export(adapter, out, "--as", "peft", "--num-rows", "2")
    assert all(check["ok"] for check in kit.checks(made).values())
    # The least reader: the base's own weights + alpha / r * B @ A, from the files, without PEFT.
    config, tensors = (
        json.loads((out / "adapter_config.json").read_text()),
        load_file(out / "adapter_model.safetensors"),
    )
    assert (config["use_rslora"], config["rank_pattern"], config["alpha_pattern"]) == (False, {}, {})
    read = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    with torch.no_grad():
        for key in [key for key in tensors if key.endswith("lora_A.weight")]:
            up, down = tensors[key.replace("lora_A", "lora_B")], tensors[key]
            assert down.shape[0] == config["r"]
            layer = read.get_submodule(key.removeprefix("base_model.model.").removesuffix(".lora_A.weight"))
            layer.weight += config["lora_alpha"] / config["r"] * up @ down
    fresh = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    with_peft = PeftModel.from_pretrained(fresh, adapter).eval()
    torch.testing.assert_close(logits(read), logits(with_peft), atol=1e-4, rtol=1e-4)
    if name == "rsLoRA":
        assert config["lora_alpha"] / 4 == pytest.approx(8 / math.sqrt(4))


def test_a_wrong_scale_in_the_adapter_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = kit.save_model(tmp_path / "base")
    adapter = kit.save_adapter(tmp_path / "adapter", base, use_rslora=True)
    write = peft_adapter._write

    def with_old_alpha(params: Any, inputs: Any, folder: Path, level: str) -> Any:
        done = write(params, inputs, folder, level)
        file = folder / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"lora_alpha": 8}))
        return done

    spec = peft_adapter.SPEC
    planted = {"peft": replace(spec, write=with_old_alpha)}
    monkeypatch.setattr("distft.export_formats.EXPORT_FORMATS._specs", planted)
    with pytest.raises(NumericError, match="products: ") as caught:
        kit.export(adapter, tmp_path / "out", "--as", "peft", "--num-rows", "2")
    assert "distributions: " in str(caught.value)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"use_dora": True}, "use_dora = True: servers read no such adapter"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save = ['lm_head']: servers read no such adapter"),
        ({"bias": "all"}, "bias = 'all': servers read no such adapter"),
        ({"trainable_token_indices": [3]}, "trainable_token_indices"),
        ({"lora_bias": True}, "lora_bias = True"),
        ({"target_modules": ["embed_tokens", "q_proj"]}, "is no LoRA of a linear layer, which is all that"),
    ],
)
def test_adapters_that_servers_cannot_read_are_refused(config: dict[str, Any], said: str, tmp_path: Path) -> None:
    base = kit.save_model(tmp_path / "base", tie_word_embeddings=False)
    adapter = kit.save_adapter(tmp_path / "adapter", base, **config)
    with pytest.raises(RecipeError) as caught:
        kit.export(adapter, tmp_path / "out", "--as", "peft", "--num-rows", "2")
    assert said in str(caught.value)
    assert "--as safetensors" in str(caught.value)


# -- Ollama --------------------------------------------------------------------------------------------------------

GEMMA = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n'"
    " + m.content + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
WITH_DEFAULT = (
    "{% if messages[0].role != 'system' %}<|system|>Be kind.<|end|>{% endif %}{% for m in messages %}"
    "<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
TEMPLATES = {name: str(read_template(name)) for name in ("chatml", "llama3", "plain")}
TEMPLATES |= {"gemma": GEMMA, "a system text of its own": WITH_DEFAULT}


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_go_template_renders_as_the_jinja_template(name: str, tmp_path: Path) -> None:
    kit.save_tokenizer(kit.byte_fallback(), tmp_path, template=TEMPLATES[name])
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)

    def render(chat: Any, ask: bool = True) -> str:
        return str(tokenizer.apply_chat_template(list(chat), tokenize=False, add_generation_prompt=ask))

    written = go_template.write(go_template.find(render))
    chats = [chat for chat in BUILT_IN_CHATS if name != "gemma" or chat[0]["role"] != "system"]
    assert len(chats) >= 4
    for chat in chats:
        assert go_template.render_go(written, chat) == render(chat)


IRREGULAR = {
    "numbers its turns": "{% for m in messages %}[{{ loop.index }}] {{ m.role }}: {{ m.content }}\n{% endfor %}",
    "drops old answers": "{% for m in messages %}{% if m.role != 'assistant' or loop.last %}"
    "{{ m.role }}: {{ m.content }}\n{% endif %}{% endfor %}",
    "writes in capitals": "{% for m in messages %}{{ m.role }}: {{ m.content | upper }}\n{% endfor %}",
    "puts the system text into the question": "{% for m in messages %}{% if m.role == 'system' %}{% else %}"
    "{{ m.role }}: {{ messages[0].content if messages[0].role == 'system' else '' }}{{ m.content }}\n"
    "{% endif %}{% endfor %}",
    "ends a text of a Modelfile": '{% for m in messages %}{{ m.role }}: """{{ m.content }}\n{% endfor %}',
}


@pytest.mark.parametrize("name", IRREGULAR)
def test_a_template_that_go_cannot_say_is_refused(name: str, tmp_path: Path) -> None:
    kit.save_tokenizer(kit.byte_fallback(), tmp_path, template=IRREGULAR[name])
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)

    def render(chat: Any, ask: bool) -> str:
        return str(tokenizer.apply_chat_template(list(chat), tokenize=False, add_generation_prompt=ask))

    with pytest.raises(DataError, match="chat template: cannot be written as a Go template"):
        go_template.write(go_template.find(render))


def test_the_evaluator_follows_go_s_rules_of_spaces_and_conditions() -> None:
    chat = [{"role": "user", "content": " a "}, {"role": "assistant", "content": "b"}]
    turn = '{{ if eq .Role "user" }}[{{ .Content }}]{{ else }}({{ .Content }}){{ end }}'
    one = f"x  {{{{- range .Messages -}}}}  {turn}{{{{ end }}}}\n"
    assert go_template.render_go(one, chat) == "x[ a ](b)\n"
    assert go_template.render_go('{{ if ne (index .Messages 0).Role "user" }}s{{ else }}u{{ end }}', chat) == "u"
    assert go_template.render_go('{{ "{{" }} {{ index .Messages 1 }}', chat).startswith("{{ ")
    with pytest.raises(DataError, match="not in the subset"):
        go_template.render_go("{{ .Prompt }}", chat)
    with pytest.raises(DataError, match="without"):
        go_template.render_go('{{ if eq .Role "user" }}', chat)


def test_an_ollama_folder_says_template_stops_context_and_system(tmp_path: Path) -> None:
    model = kit.save_model(tmp_path / "Model")
    out = tmp_path / "out"
    words = (
        "--as",
        "ollama",
        "--level",
        "Q8_0",
        "--num-rows",
        "2",
        "--set",
        "system=Be brief.",
        "--set",
        "context=128",
    )
    made = kit.export(model, out, *words)
    said = ollama.read_modelfile(out / "Modelfile.Q8_0")
    assert said["FROM"] == ["./Model-Q8_0.gguf"]
    assert said["SYSTEM"] == ["Be brief."]
    assert said["PARAMETER num_ctx"] == ["128"]
    assert sorted(said["PARAMETER stop"]) == ["</s>", "<|im_end|>"]
    assert '{{ if eq .Role "user" }}<|im_start|>user\n{{ .Content }}<|im_end|>\n' in said["TEMPLATE"][0]
    assert {"Go template", "stop texts", "tokenisation"} <= set(kit.checks(made))
    assert made["levels"][0]["commands"] == ["ollama create model -f PATH/Modelfile.Q8_0", "ollama run model"]


def test_a_wrong_go_template_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = kit.save_model(tmp_path / "model")
    written = go_template.write
    monkeypatch.setattr(go_template, "write", lambda around: written(around).replace("user\n", "user "))
    with pytest.raises(NumericError, match="Go template: 6 of 6, allowed 0 that differ"):
        kit.export(model, tmp_path / "out", "--as", "ollama", "--num-rows", "2")
