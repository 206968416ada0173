"""Files that cannot be imported: what is said, at which line; and how the tool is found out."""

from pathlib import Path

import pytest
from import_kit import keys, made

from distft.core.errors import RecipeError
from distft.importers import IMPORTERS

AXOLOTL = """\
base_model: a/b
datasets:
  - path: rows.jsonl
    type: alpaca
micro_batch_size: 1
gradient_accumulation_steps: 1
learning_rate: 1e-4
"""
MISTAKES = {
    "empty": ("", 1, "the file is empty; expected keys and values"),
    "list": ("- a\n- b\n", 1, "the file is a list"),
    "text": ("just text\n", 1, "the file is a single value"),
    "tab": ("base_model: a\n\tlr: 1\n", 2, "not valid YAML"),
    "bracket": ("base_model: [a\n", 2, "not valid YAML"),
    "colon": ("base_model: a: b\n", 1, "not valid YAML: mapping values are not allowed here"),
    "python": ("base_model: !!python/object/apply:os.system ['true']\n", 1, "not valid YAML"),
    "zero byte": ("base_model: a\nrl: d\x00o\n", 2, "not valid YAML: character #x0000"),
    "two documents": ("base_model: a\n---\nbase_model: b\n", 2, "not valid YAML"),
    "twice": (AXOLOTL + "learning_rate: 2e-4\n", 8, "learning_rate  is set twice: here and in line 7"),
    "twice inside": (AXOLOTL.replace("    type: alpaca", "    type: alpaca\n    type: oasst"), 5, "type  is set twice"),
    "number key": ("base_model: a\n5: b\n", 2, "5  is no text, and no key of any tool"),
    "mapping key": ("? {a: 1}\n: b\n", 1, "a key must be a word"),
    "itself": ("base_model: &a\n  inner: *a\n", 2, "refers to itself"),
    "date": ("base_model: 2024-02-31\n", None, "not valid YAML"),
    "rate": (AXOLOTL.replace("1e-4", "fast"), 7, 'learning_rate = "fast"  must be a number'),
    "infinite": (AXOLOTL.replace("1e-4", ".inf"), 7, "must be a number"),
    "flag as number": (AXOLOTL.replace("1e-4", "true"), 7, "must be a number"),
    "whole": (
        AXOLOTL.replace("micro_batch_size: 1", "micro_batch_size: 1.5"),
        5,
        "must be a whole number of at least 1",
    ),
    "negative": (AXOLOTL.replace("micro_batch_size: 1", "micro_batch_size: -1"), 5, "of at least 1"),
    "flag": (AXOLOTL + "sample_packing: maybe\n", 8, "must be true or false"),
    "list for text": (AXOLOTL.replace("a/b", "[a, b]"), 1, "must be text"),
    "mapping for list": (AXOLOTL.replace("  - path", "    path"), 2, "must be a list: one entry, with a dash in front"),
    "text in list": (
        AXOLOTL.replace("  - path: rows.jsonl\n    type: alpaca", "  - rows.jsonl"),
        3,
        "must be a mapping",
    ),
    "text for mapping": (AXOLOTL + "fsdp_config: [full]\n", 8, "must be a mapping of keys to values"),
    "optimizer": (AXOLOTL + "optimizer: adamw_tortch\n", 8, "is not an optimizer here"),
    "checkpointing": (AXOLOTL + "gradient_checkpointing: sometimes\n", 8, "must be true or false"),
    "deepspeed": (AXOLOTL + "deepspeed: {zero_optimization: {stage: 4}}\n", 8, "stage of the mapping is 4"),
    "sharding": (AXOLOTL + "fsdp_config: {sharding_strategy: SOME}\n", 8, "sharding strategy some is not known"),
    "inline template": (AXOLOTL + "chat_template_jinja: '{{ messages }}'\n", 8, "write it to a .jinja file"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_told_at_its_line(name: str, tmp_path: Path) -> None:
    text, line, said = MISTAKES[name]
    with pytest.raises(RecipeError) as caught:
        made(tmp_path, text)
    assert said in str(caught.value)
    found = next(problem for problem in caught.value.problems if said in str(problem))
    assert found.line == line, str(caught.value)
    assert caught.value.exit_code == 2


def test_mistakes_are_told_all_at_once(tmp_path: Path) -> None:
    text = AXOLOTL.replace("1e-4", "fast") + "optimizer: nope\nneftune_noise_alpha: 5\nlr_scheduler: zigzag\n"
    with pytest.raises(RecipeError) as caught:
        made(tmp_path, text)
    assert [problem.line for problem in caught.value.problems] == [7, 8, 9, 10]


def test_json_has_mistakes_too(tmp_path: Path) -> None:
    for text, said in (
        ('{"model": "a",\n "training_file": }', "line 2   not valid JSON"),
        ('{"model": "a", "model": "b"}', "model  is set twice"),
        ("[1]", "the file is a list"),
        ("[" * 100_000, "nested too deeply"),
    ):
        with pytest.raises(RecipeError) as caught:
            made(tmp_path, text, name="job.json")
        assert said in str(caught.value)


def test_json_with_tabs_keeps_its_lines(tmp_path: Path) -> None:
    text = '{\n\t"model": "a/b",\n\t"training_file": "x.jsonl",\n\t"seed": -3\n}\n'
    with pytest.raises(RecipeError, match="line 4   seed = -3  must be a whole number of at least 0"):
        made(tmp_path, text, name="job.json")


def test_a_few_lines_that_mean_millions_are_refused(tmp_path: Path) -> None:
    lines = ["a: &a [x, x, x, x, x, x, x, x, x]"]
    lines += [f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]" for old, new in zip("abcdefgh", "bcdefghi", strict=True)]
    with pytest.raises(RecipeError, match="too large, too deep"):
        made(tmp_path, "\n".join(lines))
    with pytest.raises(RecipeError, match="larger than 1 MiB"):
        made(tmp_path, "base_model: a\n" + "# comment\n" * 200_000)


def test_files_that_are_not_there_or_no_text(tmp_path: Path) -> None:
    made(tmp_path, AXOLOTL, name="lora.yaml")
    from distft.importers.config_file import read_config

    with pytest.raises(RecipeError, match=r"no such file  did you mean .*lora.yaml\?"):
        read_config(tmp_path / "lora.yml")
    with pytest.raises(RecipeError, match=r"is a folder, not a file  it holds: lora.yaml"):
        read_config(tmp_path)
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecipeError, match="cannot be read as text"):
        read_config(tmp_path / "bytes.yaml")


def test_a_merge_key_and_a_byte_order_mark_are_read(tmp_path: Path) -> None:
    text = "\ufeffcommon: &c\n  path: rows.jsonl\n  type: alpaca\n" + AXOLOTL.replace(
        "  - path: rows.jsonl\n    type: alpaca", "  - <<: *c\n    split: train"
    )
    imported = made(tmp_path, text)
    assert 'path = "rows.jsonl"' in imported.toml
    assert keys(imported.unknown) == {"common"}


def test_a_file_of_no_tool_says_what_each_would_have(tmp_path: Path) -> None:
    with pytest.raises(RecipeError) as caught:
        made(tmp_path, "model: a\nepochs: 3\n")
    said = str(caught.value)
    assert "it is not clear of which tool the file is; its keys: model, epochs" in said
    assert all(spec.told_by in said for spec in IMPORTERS.values())
    assert "--from" in said


def test_a_file_of_two_tools_is_not_guessed(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="it may be of Axolotl or of LLaMA-Factory: it has keys of each"):
        made(tmp_path, AXOLOTL + "model_name_or_path: a/b\nfinetuning_type: lora\n")
    imported = made(tmp_path, AXOLOTL + "model_name_or_path: a/b\nfinetuning_type: lora\n", tool="axolotl")
    assert keys(imported.unknown) == {"model_name_or_path", "finetuning_type"}
    with pytest.raises(RecipeError, match="it may be of LLaMA-Factory or of TRL"):
        made(tmp_path, "model_name_or_path: a/b\nstage: sft\ndataset_name: c/d\n")
    with pytest.raises(RecipeError, match=r"--from axolotel  is no tool that is known here  did you mean axolotl\?"):
        made(tmp_path, AXOLOTL, tool="axolotel")


def test_deepspeed_files_are_read_where_they_are(tmp_path: Path) -> None:
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "mine.json").write_text(
        '{"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}, '
        '"offload_optimizer": {"device": "cpu"}}, '
        '"gradient_clipping": 0.3, "bf16": {"enabled": true}, "optimizer": {"type": "AdamW"}, "sparse_attention": {}}'
    )
    imported = made(tmp_path, AXOLOTL + "deepspeed: configs/mine.json\n")
    assert 'name = "zero3"\noffload = "all"' in imported.toml
    said = " ".join(imported.changed["engine.name"])
    assert "stage 3 of mine.json" in said
    assert "its optimizer is not read" in said
    assert "not read: sparse_attention" in said
    assert "max_grad_norm = 0.3" in imported.toml
    nowhere = made(tmp_path, AXOLOTL + "deepspeed: configs/ds.json\n")
    assert keys(nowhere.left) == {"deepspeed"}
    (tmp_path / "configs" / "ds.json").write_text("{")
    with pytest.raises(RecipeError, match=r"deepspeed = .*not valid JSON"):
        made(tmp_path, AXOLOTL + "deepspeed: configs/ds.json\n")


@pytest.mark.parametrize(
    ("stage", "engine", "offload"),
    [
        ("zero1.json", "zero1", None),
        ("ds_z0_config.json", "ddp", None),
        ("deepspeed_zero2_offload.json", "zero2", "optimizer"),
        ("zero3_bf16_cpuoffload_params.json", "zero3", "optimizer"),
        ("zero3_bf16_cpuoffload_all.json", "zero3", "all"),
    ],
)
def test_stages_are_read_from_names(stage: str, engine: str, offload: str | None, tmp_path: Path) -> None:
    imported = made(tmp_path, AXOLOTL + f"deepspeed: somewhere/{stage}\n")
    assert f'name = "{engine}"' in imported.toml
    assert ("offload = " in imported.toml) == (offload is not None)
    if offload:
        assert f'offload = "{offload}"' in imported.toml


def test_settings_of_fsdp_may_be_a_file(tmp_path: Path) -> None:
    (tmp_path / "fsdp.json").write_text('{"offload_params": true, "version": 2, "mystery": 1}')
    imported = made(tmp_path, AXOLOTL + "fsdp: full_shard\nfsdp_config: fsdp.json\n")
    assert 'name = "fsdp2"\noffload = "all"' in imported.toml
    assert keys(imported.unknown) == {"fsdp_config.mystery"}
    (tmp_path / "fsdp.json").unlink()
    assert keys(made(tmp_path, AXOLOTL + "fsdp: full_shard\nfsdp_config: fsdp.json\n").left) == {"fsdp_config"}


def test_empty_texts_ask_for_nothing(tmp_path: Path) -> None:
    more = "wandb_project: ''\nadapter:\nchat_template: ''\ndeepspeed: ''\nlora_model_dir: ''\nneftune_noise_alpha: 0\n"
    imported = made(tmp_path, AXOLOTL + more)
    assert not imported.left
    assert not imported.unknown
