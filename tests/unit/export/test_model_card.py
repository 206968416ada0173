"""final/README.md: metadata that the hub reads, figures from the run, and a snippet that runs."""

import json
import re
from pathlib import Path

import pytest
import torch
import yaml
from run_kit import Made, made
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from distft.demo.files import locate_path
from distft.export.model_card import YOURS, card, refresh
from distft.run_record import read_run


def written(folder: Made) -> tuple[dict, str]:
    """(metadata, text)."""
    (folder.folder / "final").mkdir(exist_ok=True)
    path = refresh(read_run(folder.folder))
    assert path is not None
    text = path.read_text()
    _, head, body = text.split("---\n", 2)
    return yaml.safe_load(head), body


def test_metadata(tmp_path: Path) -> None:
    data, _ = written(made(tmp_path).whole())
    assert data["library_name"] == "peft"
    assert (data["base_model"], data["base_model_relation"]) == ("owner/base", "adapter")
    assert data["tags"] == ["distft", "sft", "lora"]
    assert data["pipeline_tag"] == "text-generation"
    (model,) = data["model-index"]
    (result,) = model["results"]
    assert result["dataset"] == {"name": "valid", "type": "valid"}
    assert result["metrics"] == [
        {"type": "exact_match", "value": pytest.approx(5 / 6, rel=1e-4), "name": "exact_match"}
    ]
    assert "license" not in data
    assert "datasets" not in data, "files are not on the hub"


def test_the_hub_library_takes_it(tmp_path: Path) -> None:
    from huggingface_hub import ModelCard

    written(made(tmp_path).whole())
    loaded = ModelCard.load(tmp_path / "run/final/README.md")
    (result,) = loaded.data.eval_results
    assert (result.metric_type, result.dataset_name) == ("exact_match", "valid")


def test_a_full_model_of_a_folder_with_a_licence(tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    (base / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Base\n")
    folder = made(tmp_path).recipe(method="full", base=str(base)).metrics()
    manifest = json.loads((folder.folder / "manifest.json").read_text())
    folder.write("manifest.json", manifest | {"model": {"folder": str(base)}})
    data, body = written(folder)
    assert data["license"] == "apache-2.0"
    assert data["library_name"] == "transformers"
    assert "base_model" not in data, "a path of this machine is no id"
    assert "model-index" not in data
    assert "look it up" not in body


def test_what_it_tells(tmp_path: Path) -> None:
    _, body = written(made(tmp_path).whole())
    for told in (
        "# run", "| valid | exact_match | 0.5 \\[0.1876, 0.8124] | 0.8333 \\[0.4365, 0.9699] |", "no clear change",
        "| held-out rows | loss | 2.5 | 1.65 | -0.85 | |", "100 of 1,000", "learning_rate 0.0001",
        "ddp on 2 × NVIDIA H100",
        "Trained on 80 rows of `train.jsonl`", "Up to 1 evaluated rows", "distft reproduce",
        "look it up before you share",
    ):  # fmt: skip
        assert told in body, told


def test_of_a_run_that_nobody_measured(tmp_path: Path) -> None:
    folder = made(tmp_path).recipe().lines("metrics.jsonl", [{"step": 1, "loss": 2.0, "tokens": 5}])
    _, body = written(folder)
    assert "nothing here says that it is better than its base" in body
    assert "not measured on any task" in body


def test_what_people_wrote_stays(tmp_path: Path) -> None:
    folder = made(tmp_path).recipe().metrics()
    written(folder)
    path = folder.folder / "final/README.md"
    path.write_text(path.read_text() + "\nOurs: ask Ada.\n")
    folder.evaluated([1, 0], [1, 1])
    _, body = written(folder)
    assert "exact_match" in body
    assert body.rstrip().endswith("Ours: ask Ada.")
    assert body.count(YOURS) == 1
    path.write_text("# A card of our own\n")
    assert refresh(read_run(folder.folder)) is None
    assert path.read_text() == "# A card of our own\n"


def test_text_of_rows_is_no_markup(tmp_path: Path) -> None:
    folder = made(tmp_path).recipe().metrics().care('a "note" | with <script>x</script>\n# and a heading')
    _, body = written(folder)
    assert "<script>" not in body
    assert not re.search(r"^# and", body, re.MULTILINE)


def test_no_final_no_card(tmp_path: Path) -> None:
    folder = made(tmp_path).whole()
    assert refresh(read_run(folder.folder)) is None
    assert not (folder.folder / "final").exists()


# -- the snippet -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    config = LlamaConfig(
        vocab_size=1024, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(locate_path("demo:tiny-llama")).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("chat", [False, True], ids=["text", "chat"])
@pytest.mark.parametrize("method", ["full", "lora"])
def test_the_snippet_runs(
    tmp_path: Path, base: Path, method: str, chat: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = (
        made(tmp_path).recipe(method=method, base=str(base)).metrics().evaluated([0], [1], hostile=' "quoted" {braced}')
    )
    final = folder.folder / "final"
    lm = AutoModelForCausalLM.from_pretrained(base)
    if method == "lora":
        from peft import LoraConfig, get_peft_model

        lm = get_peft_model(lm, LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"))
    lm.save_pretrained(final)
    tokenizer = AutoTokenizer.from_pretrained(base)
    if chat:
        tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    tokenizer.save_pretrained(final)
    text = card(read_run(folder.folder), final)
    assert ("apply_chat_template" in text) == chat
    assert ("AutoPeftModel" in text) == (method == "lora")
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    capsys.readouterr()
    names: dict = {}
    exec(code, names)
    assert names["written"].shape[1] > names["inputs"]["input_ids"].shape[1]
    assert capsys.readouterr().out


def test_a_preference_run_and_a_reward_model(tmp_path: Path) -> None:
    rows = [
        {"reward_chosen": 1.0 if n < 15 else -1.0, "reward_rejected": 0.0, "tokens_chosen": 4.0, "tokens_rejected": 4.0}
        for n in range(20)
    ]
    likely = [row | {"logprob_chosen": -2.0, "logprob_rejected": -8.0} for row in rows]
    data, body = written(made(tmp_path).whole().judged(likely, likely))
    assert data["pipeline_tag"] == "text-generation"
    assert "| held-out pairs | accuracy | 0.75 \\[0.5313, 0.8881] | 0.75 \\[0.5313, 0.8881] | | |" in body
    assert "| held-out pairs | log-probability per token, chosen answers | -0.5 | -0.5 | | |" in body
    assert "unlikelier" not in body
    _, fallen = written(
        made(tmp_path, "fallen").whole().judged(likely, [row | {"logprob_chosen": -8.0} for row in likely])
    )
    assert "- Of its held-out rows: chosen answers have become unlikelier: -0.500 to -2.000 nats per token." in fallen
    data, body = written(
        made(tmp_path, "reward").recipe(method="full").metrics().judged(rows, rows, objective="reward")
    )
    assert data["pipeline_tag"] == "text-classification"
    assert "| held-out pairs | calibration error |" in body
    assert "log-probability" not in body
    assert "AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1" in body
    assert "generate" not in body
    assert "gives a number and writes no answers" in body
    _, body = written(made(tmp_path, "sft").whole())
    assert "held-out pairs" not in body
