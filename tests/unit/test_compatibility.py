"""A recipe against its model's config and its rows: every command finds what does not fit, with its line, at once."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from distft import check, job, train_options
from distft.bench import command as bench
from distft.demo.files import locate_path
from distft.eval import command as evaluation
from distft.model import skeleton
from distft.plan import command as plan

LLAMA = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 1024, "hidden_size": 64,
    "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64,
    "bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0,
}  # fmt: skip
Main = Callable[[str], int]
VERBS: dict[str, Main] = {
    "check": lambda path: check.main([path]),
    "train": lambda path: job.run(train_options.parser().parse_args([path, "--resume", "never"])),
    "plan": lambda path: plan.main([path, "--gpu", "80"]),
    "eval": lambda path: evaluation.main([path, "--model", "base"]),
    "bench": lambda path: bench.main([path, "--steps", "1", "--nproc", "1"]),
}


def recipe(folder: Path, *, config: dict[str, Any] | None = None, rows: list[str] | None = None, more: str = "") -> str:
    """A recipe of one row a step; its [model] path is in line 4, what `more` says begins in line 16."""
    model = folder / "model"
    if not model.exists():
        model.mkdir()
        (model / "config.json").write_text(json.dumps(LLAMA | (config or {})))
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (model / name).write_bytes((Path(locate_path("demo:tiny-llama")) / name).read_bytes())
    texts = rows or ["disk is slow"] * 8
    for split in ("train", "valid"):
        (folder / f"{split}.jsonl").write_text(
            "".join(json.dumps({"text": f"{split} {text}"}) + "\n" for text in texts)
        )
    (folder / "recipe.toml").write_text(
        f"""name = "run"
output_dir = "{folder}/runs"
[model]
path = "{model}"
init = "random"
dtype = "float32"
[data]
cache_dir = "{folder}/cache"
train = [{{ path = "{folder}/train.jsonl", format = "text" }}]
eval = [{{ path = "{folder}/valid.jsonl", format = "text" }}]
packing = false
[log]
tensorboard = false
console = "off"
# the rest
{more}
"""
    )
    return str(folder / "recipe.toml")


def says(main: Main, path: str, capsys: pytest.CaptureFixture[str], *parts: str) -> None:
    """It ends with 2 and these parts, in one line of its message, and no traceback."""
    capsys.readouterr()
    assert main(path) == 2
    told = capsys.readouterr().err
    assert "Traceback" not in told
    (line,) = [line for line in told.splitlines() if parts[0] in line]
    for part in parts:
        assert part in line, line


# -- the model's folder ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", VERBS)
def test_a_folder_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str], verb: str) -> None:
    path = recipe(tmp_path)
    text = Path(path).read_text()
    Path(path).write_text(text.replace(f'"{tmp_path}/model"', f'"{tmp_path}/my-model"'))
    says(VERBS[verb], path, capsys, "[model] path", "line 4", "config.json" if verb == "plan" else "no such folder")


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ("my-model", "did you mean {folder}/model?"),
        ("models/llama/8b", "{folder} is there, models in it is not"),
        ("recipe.toml", "is a file, not a folder"),
        ("empty", "the folder has no config.json (it holds: nothing)"),
    ],
)
def test_what_is_there_instead(tmp_path: Path, capsys: pytest.CaptureFixture[str], written: str, message: str) -> None:
    path = recipe(tmp_path)
    (tmp_path / "empty").mkdir()
    text = Path(path).read_text()
    Path(path).write_text(text.replace(f'"{tmp_path}/model"', f'"{tmp_path}/{written}"'))
    says(VERBS["train"], path, capsys, "[model] path", "line 4", message.format(folder=tmp_path))


def test_the_command_line_says_it_before_it_starts_anything(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from distft.cli import main as command

    path = recipe(tmp_path, more='[engine]\nname = "ddp"')
    text = Path(path).read_text()
    Path(path).write_text(text.replace(f'"{tmp_path}/model"', '"./no/model"'))
    with pytest.raises(SystemExit) as ended:
        command(["train", path, "--nproc", "2"])
    said = capsys.readouterr().err
    assert ended.value.code == 2
    assert "line 4" in said
    assert "no such folder" in said


def test_a_tokenizers_folder_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = recipe(tmp_path)
    text = Path(path).read_text()
    Path(path).write_text(text.replace("[data]", f'tokenizer = "{tmp_path}/none"\n[data]'))
    for verb in ("check", "train"):
        says(VERBS[verb], path, capsys, "[model] tokenizer", "line 7", "no such folder")


# -- names of modules ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", VERBS)
def test_a_name_that_matches_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str], verb: str) -> None:
    path = recipe(tmp_path, more='[method]\nname = "lora"\ntarget_modules = [\n  "q_proj",\n  "v_prj",\n]')
    says(VERBS[verb], path, capsys, '"v_prj" is no module of the model', "line 20", 'did you mean "v_proj"')
    assert not (tmp_path / "runs/run/manifest.json").exists(), "nothing was started"


def test_a_second_look_builds_no_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would import torch, which takes longer than the whole check."""
    path = recipe(tmp_path, more='[train]\nglobal_batch_size = 8\n[method]\nname = "lora"\ntarget_modules = ["q_proj"]')
    assert check.main([path]) == 0
    code = "import sys; from distft.check import main; code = main(sys.argv[1:]); assert 'torch' not in sys.modules; "
    command = [sys.executable, "-c", code + "raise SystemExit(code)", path]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    wrong = Path(path).read_text().replace("q_proj", "q_prj")
    Path(path).write_text(wrong)
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert 'did you mean "q_proj"' in done.stderr
    config = tmp_path / "model/config.json"  # another model, under the same path
    config.write_text(json.dumps({"model_type": "gpt2", "vocab_size": 1024, "n_embd": 64, "n_head": 4, "n_layer": 1}))
    assert check.main([path]) == 2


# -- positions -------------------------------------------------------------------------------------------------------


LONG = " ".join(["disk"] * 90)


@pytest.mark.parametrize("verb", ["check", "train", "eval"])
def test_rows_longer_than_the_models_positions(tmp_path: Path, capsys: pytest.CaptureFixture[str], verb: str) -> None:
    path = recipe(tmp_path, rows=["short", LONG] * 4, more="[train]\nglobal_batch_size = 1")
    says(VERBS[verb], path, capsys, "and the model has 64 positions", "[data] max_length", "set [data] max_length = 64")


def test_held_out_rows_count_too_and_short_ones_are_fine(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = recipe(tmp_path, more="[train]\nglobal_batch_size = 1")
    assert check.main([path]) == 0, "max_length alone, 2048, hurts nobody"
    (tmp_path / "valid.jsonl").write_text(json.dumps({"text": LONG}) + "\n")
    says(VERBS["check"], path, capsys, "[[data.eval]]", "64 positions")
    Path(path).write_text(Path(path).read_text().replace("packing = false", 'max_length = 64\nlong_rows = "truncate"'))
    assert check.main([path]) == 0


@pytest.mark.parametrize(
    ("config", "positions"),
    [
        ({}, 64),
        ({"rope_scaling": {"rope_type": "linear", "factor": 4.0}}, 256),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, 128),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}}, 128),
        (
            {
                "rope_scaling": {
                    "rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 4,
                    "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                }
            },
            64,
        ),
        ({"model_type": "gpt2", "n_positions": 96}, 96),
        ({"model_type": "opt", "max_position_embeddings": 80}, 80),
        ({"model_type": "bloom", "n_head": 4}, None),
        ({"model_type": "falcon", "alibi": True}, None),
        ({"model_type": "mamba"}, None),
        ({"model_type": "mpt", "attn_config": {"alibi": True}}, None),
    ],
)  # fmt: skip
def test_how_many_positions_a_config_means(tmp_path: Path, config: dict[str, Any], positions: int | None) -> None:
    base = LLAMA if "model_type" not in config else {"hidden_size": 64}
    (tmp_path / "config.json").write_text(json.dumps(base | config))
    assert skeleton.num_positions(AutoConfig.from_pretrained(tmp_path)) == positions


# -- steps -----------------------------------------------------------------------------------------------------------


WARM_UPS = {
    "steps": (
        "[train]\nglobal_batch_size = 8\n[schedule]\nwarmup_steps = 1000", 4, "[schedule] warmup_steps = 1000",
        "epochs = 1, which is 1 step",
    ),
    "as many": (
        "[train]\nglobal_batch_size = 4\nepochs = 1\n[schedule]\nwarmup_steps = 2", 5, "warmup_steps = 2", "2 steps",
    ),
    "ratio": ("[train]\nglobal_batch_size = 2\n[schedule]\nwarmup_ratio = 0.95", 4, "warmup_ratio = 0.95", "4 steps"),
    "into the decay": (
        '[train]\nglobal_batch_size = 1\n[schedule]\nname = "wsd"\nwarmup_steps = 4\ndecay_ratio = 0.75',
        5, "warmup_steps = 4", "the decay of 6 does not fit behind it",
    ),
    "into the decay, in a run of max_steps": (
        '[train]\nmax_steps = 10\n[schedule]\nname = "wsd"\nwarmup_ratio = 0.5\ndecay_ratio = 0.6',
        5, "warmup_ratio = 0.5", "max_steps = 10",
    ),
    "no evaluation for the best": (
        "[train]\nglobal_batch_size = 1\n[eval]\nevery_steps = 9\nat_end = false\n[checkpoint]\nbest = true",
        4, "[eval] every_steps = 9", "no evaluation finds a best state",
    ),
}  # fmt: skip


@pytest.mark.parametrize("verb", ["check", "train"])
@pytest.mark.parametrize("case", WARM_UPS)
def test_a_warm_up_that_does_not_end(tmp_path: Path, capsys: pytest.CaptureFixture[str], case: str, verb: str) -> None:
    more, line, key, message = WARM_UPS[case]
    says(VERBS[verb], recipe(tmp_path, more=more), capsys, key, message, f"line {15 + line}")


def test_the_message_is_that_of_max_steps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = []
    both = "[schedule]\nwarmup_steps = 1000\n[train]\nglobal_batch_size = 8\n"
    for more in (both + "epochs = 1", both + "max_steps = 1"):
        assert check.main([recipe(tmp_path, more=more)]) == 2
        told.append(re.sub(r"(epochs|max_steps) = 1(, which is 1 step of these rows)?", "", capsys.readouterr().err))
    assert told[0] == told[1]


def test_steps_that_have_room(tmp_path: Path) -> None:
    for more in (
        "[train]\nglobal_batch_size = 1\n[schedule]\nwarmup_steps = 7",
        "[train]\nglobal_batch_size = 8\n[schedule]\nwarmup_ratio = 0.9",  # of one step
        '[train]\nglobal_batch_size = 1\n[schedule]\nname = "wsd"\nwarmup_steps = 2\ndecay_ratio = 0.75',
        "[train]\nglobal_batch_size = 1\n[eval]\nevery_steps = 9\n[checkpoint]\nbest = true",
    ):
        assert check.main([recipe(tmp_path, more=more)]) == 0


# -- the head that an objective trains ---------------------------------------------------------------------------------

REWARD = '[objective]\nname = "reward"\n'
GRANITE = {"model_type": "granite", "architectures": ["GraniteForCausalLM"]}
LABELS = {"architectures": ["LlamaForSequenceClassification"], "id2label": {"0": "bad", "1": "good"}}


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize(
    ("config", "message"),
    [
        (GRANITE, "transformers has no granite model with a scalar head"),
        (LABELS, "LlamaForSequenceClassification of the folder has 2 labels, and a reward is one number"),
    ],
)
def test_a_model_without_the_objectives_head(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], verb: str, config: dict[str, Any], message: str
) -> None:
    says(VERBS[verb], recipe(tmp_path, config=config, more=REWARD), capsys, message, "line 4")


def test_a_reward_model_cannot_answer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    answers = '[[eval.answers]]\nname = "a"\nscores = [{ name = "exact_match" }]\n'
    path = recipe(tmp_path, more=REWARD + answers)
    says(VERBS["check"], path, capsys, 'objective "reward" trains a scalar head, which cannot answer', "line 18")


def test_rows_of_another_objective_name_those_that_fit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = recipe(tmp_path, more=REWARD, rows=[f"disk {number} is slow" for number in range(64)])
    says(VERBS["check"], path, capsys, "such rows are trained by the objectives sft", "line 17")


# -- another model as the reference ------------------------------------------------------------------------------------

TOKENS = {"model": {"vocab": {"a": 0}}, "added_tokens": [{"content": "<s>", "id": 1}]}
REFERENCES: dict[str, tuple[dict[str, dict[str, Any]], str]] = {
    "is not there": ({}, "no such folder"),
    "is an adapter": ({"adapter_config.json": {}}, "is an adapter, which is no model by itself"),
    "has no config": ({"tokenizer.json": TOKENS}, "the folder has no config.json (it holds: tokenizer.json)"),
    "is wider": ({"config.json": LLAMA | {"hidden_size": 128}}, "another architecture than the model that is trained"),
    "is of another family": (
        {"config.json": LLAMA | {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}},
        "architectures: ['Qwen2ForCausalLM'], here ['LlamaForCausalLM']",
    ),
    "has other positions": (
        {"config.json": LLAMA | {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}},
        "rope_parameters: {",
    ),
    "has another tokenizer": (
        {"config.json": LLAMA, "tokenizer.json": TOKENS},
        "has another tokenizer than the model that is trained: its ids mean other tokens",
    ),
}


@pytest.mark.parametrize(
    ("fault", "verb"), [*((fault, "check") for fault in REFERENCES), *(("is wider", verb) for verb in VERBS)]
)
def test_a_reference_is_the_trained_model_with_other_weights(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], fault: str, verb: str
) -> None:
    files, message = REFERENCES[fault]
    for name, content in files.items():
        (tmp_path / "other").mkdir(exist_ok=True)
        (tmp_path / "other" / name).write_text(json.dumps(content))
    more = f'[objective]\nname = "dpo"\nreference = "{tmp_path}/other"\n'
    says(VERBS[verb], recipe(tmp_path, more=more), capsys, message, "line 18")


def test_an_objective_without_a_reference_takes_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    more = f'[objective]\nname = "orpo"\nreference = "{tmp_path}/other"\n'
    says(VERBS["check"], recipe(tmp_path, more=more), capsys, "it belongs to dpo, kto, bco  remove it", "line 18")


# -- a teacher ---------------------------------------------------------------------------------------------------------

DISTILL = '[objective]\nname = "distill"\nteacher = "OTHER"\n[rollout]\nmax_new_tokens = 4\n'


@pytest.mark.parametrize("fault", ["is not there", "has no config", "has another tokenizer"])
def test_a_teacher_has_the_trained_models_tokenizer(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], fault: str
) -> None:
    files, message = REFERENCES[fault]
    for name, content in files.items():
        (tmp_path / "other").mkdir(exist_ok=True)
        (tmp_path / "other" / name).write_text(json.dumps(content))
    path = Path(recipe(tmp_path, more=DISTILL.replace("OTHER", f"{tmp_path}/other")))
    path.write_text("".join(line for line in path.read_text().splitlines(keepends=True) if line[:4] != "eval"))
    says(VERBS["check"], str(path), capsys, message, "line 17")
