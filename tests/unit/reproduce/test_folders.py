"""`distft reproduce` of merged and exported folders: equal by hash, other inputs, damage, and what differs."""

import json
from pathlib import Path
from typing import Any

import export_kit as kit
import pytest

from distft.export_formats import gguf_writer
from distft.reproduce.command import main


def reproduce(folder: Path, capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, dict[str, Any]]:
    capsys.readouterr()
    code = main([str(folder), "--json", *words])
    return code, json.loads(capsys.readouterr().out)


def test_an_export_is_made_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    base = kit.save_model(tmp_path / "base")
    adapter = kit.save_adapter(tmp_path / "adapter", base)
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "out"
    kit.export(Path("adapter"), out, "--as", "ollama", "--level", "Q8_0", "--num-rows", "2", "--set", "context=128")
    monkeypatch.chdir(tmp_path.parent)
    code, told = reproduce(out, capsys)
    assert (code, told["verdict"], told["files"]) == (0, "equal", 2), "the GGUF file and the Modelfile"
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == [], "nothing is left"
    (out / "README.md").write_text("edited")
    assert reproduce(out, capsys, "--only-check") == (
        0,
        {"folder": str(out), "verdict": "inputs as they were", "code": 0},
    )

    scaled = gguf_writer._stored
    monkeypatch.setattr(gguf_writer, "_stored", lambda name, tensor, *more: scaled(name, tensor * 1.5, *more))
    code, told = reproduce(out, capsys)
    assert (code, told["verdict"], told["different"]) == (1, "differs", ["adapter-Q8_0.gguf"])

    kit.save_adapter(adapter, base, seed=5)
    code, told = reproduce(out, capsys)
    assert (code, told["verdict"], told["changed"]) == (4, "other inputs", ["adapter_model.safetensors"])
    kit.save_adapter(adapter, base)
    before = (base / "config.json").read_bytes()
    (base / "config.json").write_bytes(before + b" ")
    code, told = reproduce(out, capsys)
    assert (code, told["verdict"], told["changed"]) == (4, "other inputs", [str(base / "config.json")])
    (base / "config.json").write_bytes(before)
    kit.save_adapter(adapter, base, seed=5)
    with (out / "adapter-Q8_0.gguf").open("ab") as file:
        file.write(b"x")
    assert main([str(out)]) == 4
    assert "adapter-Q8_0.gguf is not what was written there" in capsys.readouterr().err
    assert main([str(out), "--steps", "3"]) == 2
    assert "--steps: is of runs" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words",
    [
        ["--how", "dare_ties", "--density", "0.5", "--seed", "3", "--weights", "1", "-0.5", "--rank", "3"],
        pytest.param(["--how", "cat"], marks=pytest.mark.slow),
        ["--how", "ties", "--density", "0.6", "--whole", "--dtype", "bfloat16"],
    ],
    ids=["drawn", "exact", "whole"],
)
def test_a_combination_is_made_again(tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str]) -> None:
    from distft.adapters import main as adapters

    base = kit.save_model(tmp_path / "base")
    given = [str(kit.save_adapter(tmp_path / name, base, seed=seed)) for seed, name in enumerate(("one", "two"))]
    out = tmp_path / "out"
    assert adapters(["combine", *given, "--out", str(out), *words]) == 0
    code, told = reproduce(out, capsys)
    assert (code, told["verdict"]) == (0, "equal")
    assert told["files"] == len([path for path in out.iterdir() if path.name != "combine.json"])
    report = json.loads((out / "combine.json").read_text())
    (out / "combine.json").write_text(json.dumps(report | {"weights": [1.0, 0.25]}))
    weights = "model.safetensors" if "--whole" in words else "adapter_model.safetensors"
    assert reproduce(out, capsys)[1]["different"] == [weights], "another combination is another file"
    (out / "combine.json").write_text(json.dumps(report))
    kit.save_adapter(tmp_path / "two", base, seed=5)
    code, told = reproduce(out, capsys)
    assert (code, told["verdict"], told["changed"]) == (4, "other inputs", [given[1]])
    kit.save_adapter(tmp_path / "two", base, seed=1)
    assert reproduce(out, capsys, "--only-check")[1]["verdict"] == "inputs as they were"
    kit.save_model(base, seed=9)
    assert reproduce(out, capsys)[1]["changed"] == [str(base / "model.safetensors")]
    with (out / weights).open("ab") as file:
        file.write(b"x")
    assert main([str(out)]) == 4
    assert f"{weights} is not what was written there" in capsys.readouterr().err
    (out / "combine.json").write_text("{}")
    assert main([str(out)]) == 4
    assert "combine.json: cannot be read, or lacks how" in capsys.readouterr().err


def test_a_merge_is_made_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from distft.merge import main as merge

    base = kit.save_model(tmp_path / "base")
    adapter = kit.save_adapter(tmp_path / "adapter", base)
    out = tmp_path / "merged"
    assert merge([str(adapter), "--out", str(out), "--rows", "none", "--dtype", "bfloat16"]) == 0
    code, told = reproduce(out, capsys)
    assert (code, told["verdict"], told["files"]) == (0, "equal", 1)
    first_base = {file: file.read_bytes() for file in base.iterdir()}
    kit.save_model(base, seed=9)  # under the same path
    code, told = reproduce(out, capsys)
    assert (code, told["verdict"], told["changed"]) == (4, "other inputs", [str(base / "model.safetensors")])
    assert main([str(out)]) == 4
    assert f"! {base}/model.safetensors: the base is not what it was" in capsys.readouterr().out
    report = json.loads((out / "merge.json").read_text())
    (out / "merge.json").write_text(json.dumps(report | {"base_sha256": {}}))  # as folders of before have it
    assert reproduce(out, capsys)[1]["different"] == ["model.safetensors"], "it shows in what comes out"
    assert main([str(out)]) == 1
    assert "no hash of the base was written" in capsys.readouterr().out
    (out / "merge.json").write_text(json.dumps(report))
    for file, content in first_base.items():
        file.write_bytes(content)
    assert reproduce(out, capsys)[1]["verdict"] == "equal"
    kit.save_adapter(adapter, base, seed=5)
    code, told = reproduce(out, capsys)
    assert (code, told["verdict"]) == (4, "other inputs")
    (out / "merge.json").write_text('{"source": "x"}')
    assert main([str(out)]) == 4
    assert "merge.json: cannot be read, or lacks base" in capsys.readouterr().err
