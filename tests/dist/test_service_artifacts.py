"""Artifacts of jobs that trained, made by the commands themselves, through a kill -9 of the server, and then loaded."""

from __future__ import annotations

import io
import json
import tarfile
import time
from pathlib import Path
from typing import Any

import export_kit as kit
import httpx2 as httpx
import openai
import pytest
import torch
from page_client import PageClient
from peft import PeftModel
from service_process import KEY, ServiceProcess
from transformers import AutoModelForCausalLM

pytestmark = [pytest.mark.dist, pytest.mark.slow]
MODELS = """
[models.small]
path = "{base}"
max_tokens = 8
[models.small.recipe]
model = {{ dtype = "float32" }}
method = {{ name = "lora", r = 8, alpha = 16 }}
optim = {{ learning_rate = 3e-3 }}
data = {{ max_length = 64 }}
"""


def rows(words: str) -> bytes:
    chats = [
        [{"role": "user", "content": f"the {thing}"}, {"role": "assistant", "content": words}]
        for thing in ("ball", "dog", "cat", "tree", "mat", "park", "girl", "day")
    ]
    return "".join(json.dumps({"messages": chat}) + "\n" for chat in chats * 3).encode()


def trained(client: openai.OpenAI, words: str, *, held_out: bool) -> Any:
    def upload() -> str:
        return client.files.create(file=("rows.jsonl", rows(words)), purpose="fine-tune").id

    method: Any = {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 3, "batch_size": 8}}}
    more: Any = {"validation_file": upload()} if held_out else {}
    job = client.fine_tuning.jobs.create(model="small", training_file=upload(), seed=3, method=method, **more)
    end = time.monotonic() + 300
    while (job := client.fine_tuning.jobs.retrieve(job.id)).status != "succeeded":
        assert job.status not in ("failed", "cancelled"), job
        assert time.monotonic() < end
        time.sleep(0.2)
    return job


def make(server: ServiceProcess, **body: Any) -> str:
    answer = httpx.post(f"{server.url}/v1/artifacts", json=body, headers=HEADERS, timeout=60)
    assert answer.status_code == 200, answer.text
    return answer.json()["id"]


HEADERS = {"Authorization": f"Bearer {KEY}"}


def get(server: ServiceProcess, artifact_id: str) -> dict[str, Any]:
    return httpx.get(f"{server.url}/v1/artifacts/{artifact_id}", headers=HEADERS, timeout=60).json()


def ended(server: ServiceProcess, artifact_id: str) -> dict[str, Any]:
    end = time.monotonic() + 500
    while (made := get(server, artifact_id))["status"] in ("queued", "running"):
        assert time.monotonic() < end, made
        time.sleep(0.2)
    assert str(server.data) not in json.dumps(made)
    return made


def unpacked(server: ServiceProcess, artifact_id: str, into: Path) -> Path:
    answer = httpx.get(f"{server.url}/v1/artifacts/{artifact_id}/content", headers=HEADERS, timeout=60)
    with tarfile.open(fileobj=io.BytesIO(answer.content)) as tar:
        tar.extractall(into, filter="data")
    return into / artifact_id


def weights(base: Path, adapter: Path | None) -> dict[str, torch.Tensor]:
    """Tensors of the base, or of the base with an adapter, as PEFT merges it."""
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter).merge_and_unload()
    return {name: tensor.detach() for name, tensor in model.state_dict().items()}


def test_exports_merges_and_combinations_of_two_jobs(tmp_path: Path) -> None:
    base = kit.save_model(tmp_path / "base")
    models = tmp_path / "models.toml"
    models.write_text(MODELS.format(base=base), encoding="utf-8")
    server = ServiceProcess(tmp_path / "data", "--models", str(models))
    try:
        with server.client() as client:
            one, two = trained(client, "go on", held_out=False), trained(client, "stop now", held_out=True)
            points = client.fine_tuning.jobs.checkpoints.list(two.id, limit=100).data
        name, point = one.fine_tuned_model, points[-1].fine_tuned_model_checkpoint
        pair = [name, two.fine_tuned_model]
        asked: dict[str, dict[str, Any]] = {
            "peft": {"kind": "export", "models": [name], "format": "peft"},
            "gguf": {"kind": "export", "models": [name], "format": "gguf", "level": "Q8_0"},
            "merge": {"kind": "merge", "models": [name]},
            "point": {"kind": "merge", "models": [point], "dtype": "bfloat16"},
            "cat": {"kind": "combine", "models": pair, "how": "cat", "weights": [0.5, -1e-5]},
            "ties": {"kind": "combine", "models": [name, point], "how": "ties", "rank": 4,
                     "settings": {"density": 0.5, "normalize": False}},
            "awq": {"kind": "export", "models": [name], "format": "awq"},
        }  # fmt: skip
        ids = {key: make(server, **body) for key, body in asked.items()}
        first = server.data / "artifacts" / ids["peft"]
        while not (first / "process.json").exists():
            time.sleep(0.02)
        process = json.loads((first / "process.json").read_text())["pid"]
        time.sleep(2)
        server.kill()
        end = time.monotonic() + 60
        while is_there(process):  # it ends with its server, whether another comes or not
            assert time.monotonic() < end
            time.sleep(0.1)
        server.start()
        made = {key: ended(server, artifact_id) for key, artifact_id in ids.items()}
        awq = made.pop("awq")
        assert awq["status"] == "failed"
        assert "llmcompressor" in awq["error"]["message"] or "multiple of groups" in awq["error"]["message"], awq
        assert {key: entry["status"] for key, entry in made.items()} == dict.fromkeys(made, "succeeded"), made
        kept = {path.name for path in (server.data / "artifacts").iterdir() if (path / "content").exists()}
        assert kept == {*ids.values()} - {ids["awq"]}
        for key in ("peft", "gguf"):
            assert made[key]["proof"]["proven"] is True
            checks = made[key]["proof"]["levels"][0]["checks"]
            assert len(checks) > 2
            assert all(check["ok"] for check in checks)
        assert made["merge"]["proof"]["comparison"]["num_rows"] == 24, "without a validation file: the training rows"
        assert made["merge"]["proof"]["comparison"]["kl"] <= made["merge"]["proof"]["max_kl"]
        assert made["cat"]["proof"]["rank"] == 16
        runs = [server.data / "jobs" / job.id / "runs" / job.id for job in (one, two)]
        plain, ours, theirs = (weights(base, adapter) for adapter in (None, runs[0] / "final", runs[1] / "final"))
        merged = AutoModelForCausalLM.from_pretrained(
            unpacked(server, ids["merge"], tmp_path / "merged"), dtype=torch.float32
        ).state_dict()
        assert {*merged} == {*plain}
        changed = [key for key in plain if not torch.equal(plain[key], ours[key])]
        assert len(changed) > 4
        for key in plain:
            torch.testing.assert_close(merged[key], ours[key], rtol=1e-5, atol=1e-6)
        at_point = AutoModelForCausalLM.from_pretrained(unpacked(server, ids["point"], tmp_path / "point"))
        assert at_point.dtype == torch.bfloat16
        adapter = unpacked(server, ids["peft"], tmp_path / "peft")
        for key, tensor in weights(base, adapter).items():
            torch.testing.assert_close(tensor, ours[key], rtol=1e-5, atol=1e-6)
        combined = weights(base, unpacked(server, ids["cat"], tmp_path / "cat"))
        for key in plain:
            wanted = plain[key] + 0.5 * (ours[key] - plain[key]) - 1e-5 * (theirs[key] - plain[key])
            torch.testing.assert_close(combined[key], wanted, rtol=1e-5, atol=1e-6)
        config = json.loads((unpacked(server, ids["ties"], tmp_path / "ties") / "adapter_config.json").read_text())
        assert config["r"] == 4
        visitor = PageClient(server.url, KEY)
        listed = visitor.text("/artifacts")
        assert "gguf Q8_0" in listed
        report = visitor.text(f"/jobs/{one.id}/report")
        assert ids["gguf"] in report, "how it is run"
        for text in (listed, report):
            assert str(server.data) not in text
    finally:
        server.kill()
        server.end_jobs()


def is_there(process: int) -> bool:
    try:
        return " Z " not in Path(f"/proc/{process}/stat").read_text()
    except FileNotFoundError:
        return False
