"""The figures of a step: what they are made of, and where a machine cannot say."""

import re
import time
from pathlib import Path

import pytest
import torch
from tiny import batch, documents

from distft.core.types import LossTerms, StepReport, TrainState
from distft.metrics import METRICS, Meters, RunFacts
from distft.metrics.throughput import ThroughputMetric, peak_flops

TERMS = LossTerms(loss_sum=torch.zeros(()))
REPORT = StepReport(step=1, loss=2.5, grad_norm=0.75, lr=1e-4, denominator=40.0)


def facts(device: str = "cpu", *, world: int = 1, start: TrainState | None = None) -> RunFacts:
    return RunFacts(
        world=world,
        device_name=device,
        flops_per_token=3e9,
        flops_per_squared_length=1e6,
        start=start or TrainState(),
    )


class Clock:
    """time.perf_counter, moved by hand."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)


def test_throughput_is_tokens_of_all_ranks_over_wall_time(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    metric = ThroughputMetric(facts("NVIDIA H200", world=2, start=TrainState(tokens=1_000)))
    clock.now += 60.0  # loading, the first evaluation
    metric.start()
    metric.micro(batch(documents([300, 100])), TERMS)
    metric.micro(batch(documents([200])), TERMS)
    clock.now += 0.5
    metric.step(TrainState(step=1, tokens=2_200), REPORT)
    figures = metric.read()
    assert figures["step_s"] == pytest.approx(0.5)
    assert figures["tokens_per_s"] == pytest.approx(1_200 / 0.5)
    flops = 1_200 * 3e9 + 2 * (300**2 + 100**2 + 200**2) * 1e6  # this rank's documents stand for both
    assert figures["mfu"] == pytest.approx(flops / (0.5 * 2 * 989e12))


def test_each_step_is_measured_by_itself_and_pauses_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    metric = ThroughputMetric(facts("NVIDIA A100-SXM4-80GB"))
    metric.start()
    for step, (seconds, tokens) in enumerate([(2.0, 100), (1.0, 400)], 1):
        metric.micro(batch(documents([10])), TERMS)
        clock.now += seconds
        metric.step(TrainState(step=step, tokens=tokens), REPORT)
    assert metric.read()["tokens_per_s"] == pytest.approx(300.0)
    assert metric.read()["mfu"] == pytest.approx((300 * 3e9 + 10**2 * 1e6) / 312e12)
    clock.now += 30.0  # an evaluation
    metric.start()
    clock.now += 0.25
    metric.step(TrainState(step=3, tokens=500), REPORT)
    assert metric.read() == {"step_s": pytest.approx(0.25), "tokens_per_s": pytest.approx(400.0), "mfu": pytest.approx(
        100 * 3e9 / (0.25 * 312e12))}  # fmt: skip


@pytest.mark.parametrize(
    ("product", "tera"),
    [
        ("NVIDIA H200", 989.0),
        ("NVIDIA H100 80GB HBM3", 989.0),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA A100-SXM4-40GB", 312.0),
        ("NVIDIA L40S", 362.0),
        ("NVIDIA L40", 181.0),
        ("NVIDIA L4", 121.0),
        ("NVIDIA A10", 125.0),
        ("NVIDIA A10G", 70.0),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("NVIDIA B200", 2250.0),
    ],
)
def test_peaks_by_product_name(product: str, tera: float) -> None:
    assert peak_flops(product) == tera * 1e12


@pytest.mark.parametrize("product", ["cpu", "Some Accelerator 9000"])
def test_no_peak_no_utilisation(product: str) -> None:
    metric = ThroughputMetric(facts(product))
    metric.step(TrainState(step=1, tokens=10), REPORT)
    assert metric.read()["mfu"] is None
    assert metric.read()["tokens_per_s"] > 0


def test_loss_metric_is_the_steps_report() -> None:
    metric = METRICS["loss"].build(facts())
    metric.step(TrainState(step=1), REPORT)
    assert metric.read() == {"loss": 2.5, "lr": 1e-4, "grad_norm": 0.75}


def test_memory_on_a_cpu_is_the_processs_peak() -> None:
    metric = METRICS["memory"].build(facts())
    first = metric.read()["memory_gib"]
    ballast = torch.ones(2**26)  # 256 MiB, written to
    second = metric.read()["memory_gib"]
    peak = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text()) if Path("/proc").is_dir() else None
    assert ballast.numel() == 2**26
    assert 0.05 < first <= second
    if peak is not None:
        assert second == pytest.approx(int(peak[1]) / 2**20, rel=0.05)


class Kept:
    def __init__(self, *, every_step: bool) -> None:
        self.every_step, self.records, self.closed = every_step, [], False

    def write(self, record: dict) -> None:
        self.records.append(record)

    def close(self) -> None:
        self.closed = True


def test_a_record_has_the_keys_others_parse() -> None:
    """design.md's list for metrics.jsonl, in its order but for learning rate and norm."""
    sink = Kept(every_step=True)
    meters = Meters([spec.build(facts()) for spec in METRICS.values()], [sink], epoch_at=lambda samples: samples / 64)
    meters.start()
    meters.micro(batch(documents([10])), TERMS)
    state = TrainState(step=1, samples=8, tokens=320, tokens_loss=100)
    meters.step(state, REPORT, log=True)
    meters.evaluated(state, {"eval_loss": 3.0, "eval_tokens": 50.0})
    meters.close()
    step, evaluation = sink.records
    assert set(step) == {
        "step", "epoch", "samples", "tokens", "tokens_loss", "loss", "lr", "grad_norm", "step_s", "tokens_per_s",
        "mfu", "memory_gib",
    }  # fmt: skip
    assert [step[key] for key in ("step", "epoch", "samples", "tokens", "tokens_loss")] == [1, 0.125, 8, 320, 100]
    assert evaluation == {
        "step": 1, "epoch": 0.125, "samples": 8, "tokens": 320, "tokens_loss": 100, "eval_loss": 3.0, "eval_tokens": 50,
    }  # fmt: skip
    assert sink.closed


def test_the_log_interval_thins_out_what_people_read_and_not_the_file() -> None:
    file, screen = Kept(every_step=True), Kept(every_step=False)
    meters = Meters([METRICS["loss"].build(facts())], [file, screen], epoch_at=float)
    for step in (1, 2, 3):
        meters.step(TrainState(step=step), REPORT, log=step == 2)
    assert [record["step"] for record in file.records] == [1, 2, 3]
    assert [record["step"] for record in screen.records] == [2]
