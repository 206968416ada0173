"""Rates that were measured come back as predictions; what a GPU cannot have done is refused, and nothing is kept."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from plan_kit import SMALL, read, recipe_of, recipe_text, write

from distft.core.accelerators import GIB, named
from distft.core.errors import RecipeError
from distft.plan import calibration
from distft.plan.case import plan
from distft.plan.command import main
from distft.plan.machine import read_machine
from distft.plan.rates import ASSUMED, HardwareRates, Work
from distft.plan.setup import Machine

H200 = named("h200-141gb")
KNOWN = {"matmul": 0.66, "attention": 0.36, "memory": 0.71, "launch_s": 6e-6}
"""What the synthetic GPU reaches at work; its single kernels reach more."""
KERNELS = {
    "matmul_flops_per_s": 0.74 * 989e12,
    "attention_flops_per_s": 0.42 * 989e12,
    "copy_bytes_per_s": 0.88 * 4800e9,
    "launch_s": 5e-6,
    "pcie_bytes_per_s": 41e9,
}
MIXES = {
    # matmul FLOPs, attention FLOPs, bytes moved, operations, micro-batches, bytes rewritten by the update
    "8b-full": (4.0e14, 3.6e13, 2.6e11, 9_000, 8, 1.3e11),
    "8b-full-checkpointed": (5.1e14, 4.6e13, 3.4e11, 12_000, 8, 1.3e11),
    "8b-lora": (2.7e14, 3.6e13, 3.6e11, 15_000, 8, 6e8),
    "8b-lora-32k": (2.7e14, 3.0e14, 3.6e11, 15_000, 4, 6e8),
    "8b-qlora": (2.7e14, 7.2e13, 4.2e11, 18_000, 4, 6e8),
    "0.5b-full": (2.4e13, 6.5e12, 5.5e10, 7_000, 8, 8e9),
    "0.5b-full-32k": (2.4e13, 5.5e13, 5.5e10, 7_000, 2, 8e9),
    "tiny": (1e9, 1e7, 1e7, 2_000, 4, 1e6),
}


def seconds(mix: tuple[float, ...]) -> float:
    """A step's, by the formula that docs/guide.md gives."""
    matmul, attention, moved, operations, micros, rewritten = mix
    bandwidth = KNOWN["memory"] * 4800e9
    busy = matmul / (KNOWN["matmul"] * 989e12) + attention / (KNOWN["attention"] * 989e12) + moved / bandwidth
    return micros * max(busy, operations * KNOWN["launch_s"]) + rewritten / bandwidth


def work(mix: tuple[float, ...]) -> Work:
    matmul, attention, moved, operations, micros, rewritten = mix
    return Work(
        matmul_flops=matmul, attention_flops=attention, moved_bytes=moved, operations=operations, micros=int(micros),
        rewritten_bytes=rewritten,
    )  # fmt: skip


def measurement(**changed: Any) -> dict[str, Any]:
    cases = [
        {
            "name": name, "device": "NVIDIA H200", "world": 1, "step_s": seconds(mix), "work": asdict(work(mix)),
            "allocated_bytes": 40 * GIB, "reserved_bytes": 43 * GIB, "used_bytes": 43 * GIB + 700 * 2**20,
        }
        for name, mix in MIXES.items()
    ]  # fmt: skip
    return {
        "schema": 1, "date": "2026-11-28", "commit": "0123456789abcdef", "device": "NVIDIA H200",
        "versions": {"torch": "2.13.0"}, "kernels": KERNELS, "cases": cases,
    } | changed  # fmt: skip


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "measured.json"


def calibrated(file: Path, said: dict[str, Any], **asked: Any) -> calibration.Calibration:
    file.write_text(json.dumps(said))
    return calibration.read(file, **asked)


def test_known_rates_come_back_as_step_times(file: Path) -> None:
    found = calibrated(file, measurement())
    for name, mix in MIXES.items():
        predicted = calibration.times(work(mix), found.rates, H200).step_s
        assert predicted == pytest.approx(seconds(mix), rel=0.02), name
    for name, value in KNOWN.items():
        assert getattr(found.rates, name) == pytest.approx(value, rel=0.04), name
    assert found.rates.pcie_bytes_per_s == 41e9
    assert found.rates.context_bytes == 700 * 2**20
    assert found.rates.fragmentation == pytest.approx(3 / 40)
    assert found.rates.link == ASSUMED.link, "nothing told it"
    assert found.error is not None
    assert found.error_before is not None
    assert found.error < 0.01 < 0.1 < found.error_before
    assert all(word in found.rates.source for word in ("2026-11-28", "NVIDIA H200", "012345678"))


def test_noise_of_a_few_percent_is_averaged_out(file: Path) -> None:
    noisy = measurement()
    for number, case in enumerate(noisy["cases"]):
        case["step_s"] *= 1 + 0.03 * (-1) ** number
    found = calibrated(file, noisy)
    for name, mix in MIXES.items():
        assert calibration.times(work(mix), found.rates, H200).step_s == pytest.approx(seconds(mix), rel=0.06), name


def test_without_cases_single_kernels_count_and_what_is_untold_stays_assumed(file: Path) -> None:
    found = calibrated(file, measurement(cases=[], kernels={"matmul_flops_per_s": 0.7 * 989e12}))
    assert found.rates.matmul == pytest.approx(0.7)
    assert (found.rates.attention, found.rates.memory) == (ASSUMED.attention, ASSUMED.memory)
    assert found.error is None


def test_the_planner_predicts_with_what_is_kept_and_says_so(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    kept, model = tmp_path / "kept/calibration.json", write(tmp_path / "model", SMALL)
    (tmp_path / "recipe.toml").write_text(recipe_text(model))
    file.write_text(json.dumps(measurement()))
    assert main(["--calibrate", str(file), "--calibration", str(kept)]) == 0
    told = capsys.readouterr().err
    assert all(word in told for word in ("matmul", "h200-141gb", str(kept)))

    monkeypatch.setenv("DISTFT_CALIBRATION", str(kept))
    machine = read_machine("h200", 1, 1)
    assert machine.rates.matmul == pytest.approx(KNOWN["matmul"], rel=0.04)
    assert read_machine("h100-80gb", 1, 1).rates == ASSUMED, "another GPU"
    assert main([str(tmp_path / "recipe.toml"), "--gpu", "h200", "--explain"]) == 0
    said = capsys.readouterr().out
    assert "rates: calibrated 2026-11-28 on NVIDIA H200, commit 012345678" in said
    assert "traced operations x 6" in said
    assert main([str(tmp_path / "recipe.toml"), "--gpu", "h100-80gb", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["cases"][0]["rates"] == "assumed"

    recipe = recipe_of(model, "train.micro_batch_size=1")
    inventory = read(recipe)
    slow, fast = (
        plan(
            recipe, inventory, Machine(gpu=H200, gpus_per_node=1, rates=HardwareRates(launch_s=launch)), liger=False
        ).speed
        for launch in (12e-6, 3e-6)
    )
    assert slow.micro_s == pytest.approx(4 * fast.micro_s), "a tiny model waits for launches"


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"kernels": KERNELS | {"matmul_flops_per_s": 1.2e15}}, "above h200-141gb's peak"),
        ({"kernels": KERNELS | {"attention_flops_per_s": 2e15}}, "above h200-141gb's peak"),
        ({"kernels": KERNELS | {"copy_bytes_per_s": 9e12}}, "above h200-141gb's peak"),
        ({"kernels": KERNELS | {"link_bytes_per_s": 1e12}}, "above h200-141gb's peak"),
        ({"kernels": KERNELS | {"matmul_flops_per_s": -1.0}}, "matmul_flops_per_s"),
        ({"kernels": KERNELS | {"copy_bytes_per_s": 0.0}}, "copy_bytes_per_s"),
        ({"kernels": KERNELS | {"launch_s": 0.5}}, "is no launch"),
        ({"kernels": KERNELS | {"flops": 1e12}}, "kernels.flops"),
        ({"device": "cpu"}, "not in the catalogue"),
        ({"device": "NVIDIA H100 80GB HBM3"}, "measured on NVIDIA H200, the file is of NVIDIA H100"),
        ({"schema": 2}, "this version reads 1"),
        ({"date": "yesterday"}, "date"),
    ],
)
def test_nonsense_is_refused(file: Path, changed: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        calibrated(file, measurement(**changed))


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("step_s", 1e-6, "faster than the peak allows"),
        ("step_s", -2.0, "step_s"),
        ("reserved_bytes", 30 * GIB, "must be all there and grow"),
        ("used_bytes", None, "must be all there and grow"),
        ("used_bytes", 60 * GIB, "belong to somebody else"),
        ("work", {"matmul_flops": 1.0}, "not the fields of this version"),
    ],
)
def test_a_case_that_cannot_have_been_is_refused(file: Path, key: str, value: Any, said: str) -> None:
    wrong = measurement()
    wrong["cases"][0][key] = value
    with pytest.raises(RecipeError, match=said):
        calibrated(file, wrong)


def test_step_times_that_no_rates_explain_are_refused(file: Path) -> None:
    wrong = measurement()
    for number, case in enumerate(wrong["cases"]):
        case["step_s"] *= (1, 6)[number % 2]
    with pytest.raises(RecipeError, match="not those of one GPU at work"):
        calibrated(file, wrong)


def test_another_gpu_than_the_one_meant_a_damaged_file_and_no_file_are_refused(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file.write_text(json.dumps(measurement()))
    kept = tmp_path / "kept.json"
    assert main(["--calibrate", str(file), "--gpu", "h100-80gb", "--calibration", str(kept)]) == 2
    assert "NVIDIA H200 is h200-141gb, not --gpu h100-80gb" in capsys.readouterr().err
    assert main(["--calibrate", str(tmp_path / "none.json"), "--calibration", str(kept)]) == 2
    assert not kept.exists(), "nothing is kept of what is refused"
    file.write_text("{")
    assert main(["--calibrate", str(file), "--calibration", str(kept)]) == 2
    assert main([]) == 2
    assert "RECIPE  is missing" in capsys.readouterr().err
    for text in ("{", '{"schema": 9, "gpus": {}}', '{"schema": 1, "gpus": {"h200-141gb": {"matmul": 0.5}}}'):
        kept.write_text(text)
        with pytest.raises(RecipeError, match="calibrat"):
            calibration.of_gpu(H200, kept)


def test_a_second_gpu_is_kept_beside_the_first(tmp_path: Path) -> None:
    kept = tmp_path / "kept.json"
    for name, share in (("h200-141gb", 0.6), ("h100-80gb", 0.5), ("h200-141gb", 0.7)):
        rates = HardwareRates(matmul=share, source="calibrated")
        gpu = named(name)
        calibration.keep(calibration.Calibration(gpu=gpu, rates=rates, cases=0, error_before=None, error=None), kept)
    assert calibration.of_gpu(named("h100-80gb"), kept).matmul == 0.5
    assert calibration.of_gpu(H200, kept).matmul == 0.7
