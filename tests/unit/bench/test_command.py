"""The command: mistakes are told at once and together, before anything heavy is imported."""

import subprocess
import sys

import pytest
from bench_kit import wanted
from filelock import FileLock

from distft.bench import provenance
from distft.bench.command import main


def test_every_mistake_at_once(tmp_path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(provenance, "gpus", list)
    recipe = wanted(tmp_path).recipe
    code = main(
        [recipe, "--methods", "lorra", "--engines", "solo,zero", "--micro", "0", "--lengths", "a", "--steps", "0"]
    )
    said = capsys.readouterr().err
    assert code == 2
    assert "5 problems" in said
    assert 'did you mean "lora"' in said
    assert "--micro 0  must be whole numbers" in said
    assert "--steps 0  must be at least 1" in said


def test_a_gpu_is_its_own_limit(tmp_path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(provenance, "gpus", lambda: ["NVIDIA H100"])
    assert main([wanted(tmp_path).recipe, "--limit-gib", "4"]) == 2
    assert "the GPU's own memory is the limit" in capsys.readouterr().err


def test_mistakes_and_help_import_nothing_heavy() -> None:
    code = (
        "import sys, contextlib\nfrom distft.bench.command import main\n"
        "with contextlib.suppress(SystemExit): main(['--help'])\n"
        "main(['recipes/no-such.toml'])\n"
        "heavy = {'torch', 'transformers', 'matplotlib'} & set(sys.modules)\n"
        "sys.exit(str(sorted(heavy)) if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "--limit-gib" in done.stdout
    assert "no such file" in done.stderr


def test_two_benches_do_not_share_a_folder(tmp_path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    out.mkdir()
    with FileLock(out / ".lock"):
        assert main([wanted(tmp_path).recipe, "--output", str(out)]) == 7
    assert "another bench is measuring here" in capsys.readouterr().err
    assert not (out / "cases").exists()
