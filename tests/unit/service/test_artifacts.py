"""Artifacts over HTTP, with a stand-in for the command: what is refused, made, found again, cut off and handed out."""

from __future__ import annotations

import io
import json
import os
import tarfile
import tracemalloc
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest
from markupsafe import escape
from page_client import PageClient
from service_server import ADMIN_KEY, CHAT, ServiceServer, jsonl, serving, wait_until
from sqlalchemy import update

from distft.core.errors import FileSystemError
from distft.export_formats import EXPORT_FORMATS
from distft.merging.hows import HOWS
from distft.service.artifact_archive import FolderArchive
from distft.service.make_artifact import without_paths
from distft.service.settings import ServedBase
from distft.service.tables import ArtifactRow, JobRow

EXPORT = {"kind": "export", "format": "safetensors"}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServiceServer]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DISTFT_API_KEY", ADMIN_KEY)
        with serving(tmp_path_factory.mktemp("artifacts"), artifacts_per_project=5) as running:
            models: Any = running.settings.models
            models["typo"] = ServedBase(path="demo:tiny-lama")
            models["elsewhere"] = ServedBase(path="other/base")
            models["random"] = ServedBase(path="demo:tiny-llama", recipe={"model": {"init": "random"}})
            yield running


class Owner:
    """A project with keys of each role, and models of it that jobs have made."""

    def __init__(self, server: ServiceServer, name: str) -> None:
        self.server = server
        admin = httpx.Client(base_url=server.root, headers={"Authorization": f"Bearer {ADMIN_KEY}"}, timeout=60)
        with admin:
            project = admin.post("/v1/organization/projects", json={"name": name}).json()["id"]
            path = f"/v1/organization/projects/{project}/api_keys"
            self.keys = {
                role: admin.post(path, json={"name": role, "role": role}).json()["value"]
                for role in ("viewer", "member", "admin")
            }
        self.http = self.client("member")

    def client(self, role: str) -> httpx.Client:
        headers = {"Authorization": f"Bearer {self.keys[role]}"}
        return httpx.Client(base_url=f"{self.server.root}/v1", headers=headers, timeout=60)

    def model(self, *, base: str = "tiny", kind: str = "adapter", plan: str = "") -> str:
        """A model that a job has made, and how the stand-in command takes it."""
        with self.server.client(self.keys["member"]) as client:
            file_id = client.files.create(file=("rows.jsonl", jsonl(CHAT)), purpose="fine-tune").id
            job = client.fine_tuning.jobs.create(model=base, training_file=file_id)
            wait_until(lambda: client.fine_tuning.jobs.retrieve(job.id).status == "succeeded")
            name = client.fine_tuning.jobs.retrieve(job.id).fine_tuned_model
        assert name is not None
        final = self.server.folder(job.id).run / "final"
        final.mkdir()
        (final / {"adapter": "adapter_config.json", "whole": "config.json"}[kind]).write_text('{"peft_type": "LORA"}')
        self.run_of(name, job.id).joinpath("plan").write_text(plan)
        return name

    def run_of(self, model: str, job_id: str | None = None) -> Path:
        with self.server.database.reading() as session:
            job_id = job_id or session.query(JobRow.id).where(JobRow.fine_tuned_model == model).scalar()
        return self.server.folder(job_id).run

    def ask(self, *models: str, **body: Any) -> httpx.Response:
        return self.http.post("/artifacts", json={**EXPORT, "models": models, **body})

    def make(self, *models: str, **body: Any) -> str:
        answer = self.ask(*models, **body)
        assert answer.status_code == 200, answer.text
        assert answer.json()["status"] == "queued"
        return answer.json()["id"]

    def get(self, artifact_id: str) -> dict[str, Any]:
        return self.http.get(f"/artifacts/{artifact_id}").json()

    def ended(self, artifact_id: str) -> dict[str, Any]:
        wait_until(lambda: self.get(artifact_id)["status"] not in ("queued", "running"))
        return self.get(artifact_id)

    def is_running(self, artifact_id: str) -> bool:
        return self.get(artifact_id)["status"] == "running"

    def folder(self, artifact_id: str) -> Path:
        return self.server.settings.artifacts / artifact_id


@pytest.fixture
def owner(server: ServiceServer, request: pytest.FixtureRequest) -> Iterator[Owner]:
    made = Owner(server, request.node.name.removeprefix("test_").replace("_", "-")[:40].strip("-"))
    with made.http:
        yield made


def test_an_artifact_is_made_and_its_tar_is_its_folder(owner: Owner) -> None:
    model = owner.model()
    artifact_id = owner.make(model, format="gguf", level="Q8_0")
    made = owner.ended(artifact_id)
    assert (made["object"], made["status"], made["error"]) == ("artifact", "succeeded", None)
    assert (made["kind"], made["models"], made["settings"]) == (
        "export", [model], {"format": "gguf", "level": "Q8_0"})  # fmt: skip
    assert made["proof"]["levels"][0]["checks"][0]["bound"] == "1e-3"
    assert made["created_at"] <= made["started_at"] <= made["finished_at"]
    content = owner.folder(artifact_id) / "content"
    files = {str(path.relative_to(content)): path.read_bytes() for path in content.rglob("*") if path.is_file()}
    assert len(files) == 3
    assert made["bytes"] == sum(map(len, files.values())) == 12_804
    answer = owner.http.get(f"/artifacts/{artifact_id}/content")
    assert int(answer.headers["content-length"]) == len(answer.content)
    assert answer.headers["content-type"] == "application/x-tar"
    assert answer.headers["content-disposition"] == f'attachment; filename="{artifact_id}.tar"'
    with tarfile.open(fileobj=io.BytesIO(answer.content)) as tar:
        unpacked = {}
        for member in tar.getmembers():
            assert member.isreg()
            assert (member.uid, member.gid, member.uname) == (0, 0, "")
            taken = tar.extractfile(member)
            assert taken is not None
            unpacked[member.name.removeprefix(f"{artifact_id}/")] = taken.read()
    assert unpacked == files
    client = owner.client("member")
    assert client.delete(f"/models/{model}").status_code == 200
    assert owner.http.get(f"/artifacts/{artifact_id}/content").status_code == 200, "the model's end is not its end"
    assert owner.ask(model).status_code == 404
    assert client.delete(f"/artifacts/{artifact_id}").json()["deleted"] is True
    assert not owner.folder(artifact_id).exists()
    assert owner.http.get(f"/artifacts/{artifact_id}/content").status_code == 404


def test_archives_are_streamed_and_hold_no_links(tmp_path: Path) -> None:
    folder = tmp_path / "made"
    folder.mkdir()
    with (folder / "large").open("wb") as sparse:
        sparse.truncate(100 << 20)
    (folder / "last").write_bytes(b"x" * 513)
    tracemalloc.start()
    archive = FolderArchive(folder, "top")
    size, digest = 0, b""
    for chunk in archive.chunks():
        size, digest = size + len(chunk), (digest + chunk)[-20_000:]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert size == archive.num_bytes
    assert size % tarfile.RECORDSIZE == 0
    assert b"x" * 513 in digest
    assert peak < 8 << 20, "one chunk at a time"
    (folder / "large").write_bytes(b"shorter")
    with pytest.raises(OSError, match="shorter than it was"):
        list(archive.chunks())
    for make in (lambda path: os.symlink("/etc/passwd", path), os.mkfifo):
        path = folder / "odd"
        make(path)
        with pytest.raises(FileSystemError, match="odd: is neither a file nor a folder"):
            FolderArchive(folder, "top")
        path.unlink()
    (folder / "large").unlink()
    (folder / "large").symlink_to("/etc/passwd")
    with pytest.raises(OSError, match="large"):  # a link that came after the look
        list(archive.chunks())


def test_what_cannot_be_made_is_refused_at_once(owner: Owner) -> None:
    adapter, other = owner.model(), owner.model(base="chat-only")
    whole, far, rootless = owner.model(kind="whole"), owner.model(base="elsewhere"), owner.model(base="random")
    combine: dict[str, Any] = {"kind": "combine", "format": None, "how": "ties", "settings": {"density": 0.5}}
    merge: dict[str, Any] = {"kind": "merge", "format": None}
    cases: list[tuple[tuple[str, ...], dict[str, Any], int, str, str]] = [
        ((adapter,), {"format": None}, 400, "format", "format is missing. Allowed: safetensors, peft"),
        ((adapter,), {"format": "ggup"}, 400, "format", "Did you mean gguf?"),
        ((adapter,), {"format": "gguf", "level": "Q8"}, 400, "level", "Did you mean Q8_0?"),
        ((adapter,), {"level": "F16"}, 400, "level", "has no levels"),
        ((adapter,), {"dtype": "float32"}, 400, "dtype", "no effect on the kind export"),
        ((adapter,), {"colour": 1}, 400, "colour", "Unknown parameter"),
        ((adapter, other), {}, 400, "models", "takes one model"),
        (("tiny",), {}, 400, "models", "is the server's"),
        ((adapter + "x",), {}, 404, "models", "No such model"),
        ((whole,), {"format": "peft"}, 400, "format", "it is a whole model, and this format holds adapters"),
        ((whole,), merge, 400, "models", "was trained whole"),
        ((rootless,), merge, 400, "models", "random weights, which no folder holds"),
        ((adapter,), {**merge, "dtype": "float64"}, 400, "dtype", "Allowed: bfloat16, float16, float32"),
        ((adapter,), combine, 400, "models", "two models at least"),
        ((adapter, adapter), combine, 400, "models", "named twice"),
        ((adapter, far), combine, 400, "models", "have different bases"),
        ((adapter, whole), combine, 400, "models", "was trained whole"),
        ((adapter, other), {**combine, "how": "tie"}, 400, "how", "Did you mean ties?"),
        ((adapter, other), {**combine, "settings": None}, 400, "settings.density", "needs this setting"),
        ((adapter, other), {**combine, "settings": {"density": 2.0}}, 400, "settings.density", "less than or equal"),
        ((adapter, other), {**combine, "settings": {"t": 1}}, 400, "settings", ""),
        ((adapter, other), {**combine, "weights": [1.0]}, 400, "weights", "1 weights for 2 models"),
        ((adapter, other), {**combine, "how": "cat", "settings": None, "rank": 4}, 400, "rank", "sum of the ranks"),
        ((adapter, other), {**combine, "how": "slerp", "settings": {"t": 0.5}, "weights": [1.0, 1.0]}, 400, "weights",
         "takes no weights"),
    ]  # fmt: skip
    for models, body, status, param, words in cases:
        told = owner.ask(*models, **body)
        assert told.status_code == status, (body, told.text)
        error = told.json()["error"]
        assert error["param"].startswith(param), (body, error)
        assert words in error["message"], (body, error)
    assert owner.http.get("/artifacts").json()["data"] == []
    combined = owner.ended(owner.make(adapter, other, **combine))
    assert combined["settings"] == {
        "how": "ties", "weights": [1.0, 1.0], "rank": None,
        "settings": {"density": 0.5, "normalize": True, "scale": 1.0},
    }  # fmt: skip
    assert combined["proof"]["relative_error"] == 0.25
    assert owner.ended(owner.make(rootless, format="safetensors"))["status"] == "succeeded", "only a merge needs a base"


def test_the_commands_own_refusal_is_the_artifacts_error(owner: Owner) -> None:
    made = owner.ended(owner.make(owner.model(plan="refuses")))
    assert (made["status"], made["error"]["message"], made["proof"]) == ("failed", "no <i>room</i>", None)
    assert made["bytes"] == 0
    folder = owner.folder(made["id"])
    assert not (folder / "content").exists()
    assert (folder / "log.txt").exists(), "for those who look after the server"
    told = owner.http.get(f"/artifacts/{made['id']}/content")
    assert (told.status_code, told.json()["error"]["code"]) == (400, "no_content")
    linked = owner.ended(owner.make(owner.model(plan="links")))
    assert linked["error"]["message"] == "link: is neither a file nor a folder"
    gone, first = owner.model(), owner.model(plan="waits")
    running, waiting = owner.make(first), owner.make(gone)
    wait_until(lambda: owner.is_running(running))
    owner.http.delete(f"/models/{gone}")
    (owner.run_of(first) / "go").write_text("go")
    assert owner.ended(waiting)["error"]["message"] == f"The model {gone} is no longer here."
    unnamed = owner.ended(owner.make(owner.model(base="typo")))
    assert unnamed["error"]["message"].startswith("The model typo is not there"), "and the queue goes on"


def test_messages_tell_no_path_of_the_server() -> None:
    names = {"/srv/data/jobs/ftjob-a/runs/ftjob-a": "ft:m", "/srv/data/jobs/ftjob-a/runs/ftjob-a/": "", "/m/base": "b"}
    told = without_paths(
        {
            "message": "distft export /srv/data/jobs/ftjob-a/runs/ftjob-a: /m/base/config.json differs from "
            "'/home/somebody/.cache/hub/model.safetensors', (~/x/y.json) and/or https://example.org/a/b or owner/name",
            "lines": ["/srv/data/jobs/ftjob-a/runs/ftjob-a/final/x: 3 problems", 5, None, True],
        },
        names,
    )
    assert told == {
        "message": "distft export ft:m: b/config.json differs from 'model.safetensors', (y.json) and/or "
        "https://example.org/a/b or owner/name",
        "lines": ["final/x: 3 problems", 5, None, True],
    }


def test_a_server_that_was_killed_leaves_nothing_half_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DISTFT_API_KEY", ADMIN_KEY)
    with serving(tmp_path) as first:
        owner = Owner(first, "killed")
        model, other = owner.model(plan="waits"), owner.model()
        artifact_id, behind = owner.make(model), owner.make(other)
        wait_until(lambda: (owner.folder(artifact_id) / "content" / "model.bin").exists())
        (owner.folder(artifact_id) / "content" / "half").write_text("of an earlier try")
        process = json.loads((owner.folder(artifact_id) / "process.json").read_text())["pid"]
        worker: Any = first.app.state.parts.artifact_worker
        monkeypatch.setattr(worker, "stop", worker._stop.set)  # as if it were killed: nobody ends the process
    assert Path(f"/proc/{process}").exists()
    orphan = tmp_path / "artifacts" / "artifact-nobodys"
    orphan.mkdir()
    with serving(tmp_path) as second:
        owner.server, owner.http = second, httpx.Client(
            base_url=f"{second.root}/v1", headers=owner.http.headers, timeout=60)  # fmt: skip
        run = owner.run_of(model)
        wait_until(lambda: (run / "tries").read_text() == "xx")
        assert not orphan.exists()
        assert owner.get(behind)["status"] == "queued", "one at a time, in their order"
        (run / "go").write_text("go")
        assert owner.ended(artifact_id)["status"] == owner.ended(behind)["status"] == "succeeded"
        assert (run / "tries").read_text() == "xx", "made anew once, not twice"
        assert sorted(path.name for path in (owner.folder(artifact_id) / "content").iterdir()) == [
            "below", "empty", "model.bin"]  # fmt: skip
        state = Path(f"/proc/{process}/stat")
        assert not state.exists() or " Z " in state.read_text(), "the earlier server's process was ended"
    with serving(tmp_path) as third:  # one that died between the process's last word and its own
        with third.database.writing() as session:
            session.execute(
                update(ArtifactRow).where(ArtifactRow.id == behind).values(status="running", started=True, bytes=0)
            )
        owner.http = httpx.Client(base_url=f"{third.root}/v1", headers=owner.http.headers, timeout=60)
        assert owner.ended(behind)["bytes"] == 12_804
        assert (owner.run_of(other) / "tries").read_text() == "x", "what was made is taken in"


def test_processes_that_vanish_or_take_too_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DISTFT_API_KEY", ADMIN_KEY)
    with serving(tmp_path, lost_starts=2) as server:
        owner = Owner(server, "slow")
        for plan, status, tries in (("killed", "succeeded", "xxx"), ("always killed", "failed", "xxx")):
            model = owner.model(plan=plan)
            made = owner.ended(owner.make(model))
            assert (made["status"], (owner.run_of(model) / "tries").read_text()) == (status, tries)
        assert made["error"]["message"] == "Its process vanished 3 times without a word."
        limits = server.settings.limits.model_copy(update={"artifact_s": 0.2})
        worker = server.app.state.parts.artifact_worker
        monkeypatch.setattr(worker, "_settings", replace(server.settings, limits=limits))
        late = owner.ended(owner.make(owner.model(plan="waits")))
        assert late["error"]["code"] == "time_limit"
        assert "within 0.2 seconds" in late["error"]["message"]
        assert not (owner.folder(late["id"]) / "content").exists()


def test_cancelled_artifacts_leave_nothing(owner: Owner) -> None:
    model = owner.model(plan="waits")
    running, waiting = owner.make(model), owner.make(model)
    wait_until(lambda: (owner.folder(running) / "content" / "model.bin").exists())
    assert owner.http.delete(f"/artifacts/{running}").status_code == 400
    for artifact_id in (waiting, running):
        assert owner.http.post(f"/artifacts/{artifact_id}/cancel").json()["status"] == "cancelled"
        again = owner.http.post(f"/artifacts/{artifact_id}/cancel")
        assert (again.status_code, again.json()["error"]["code"]) == (400, "invalid_cancel")
    wait_until(lambda: owner.http.delete(f"/artifacts/{running}").status_code == 200)  # once its process has ended
    assert not owner.folder(running).exists()
    assert owner.http.delete(f"/artifacts/{waiting}").status_code == 200
    assert (owner.run_of(model) / "tries").read_text() == "x"
    (owner.run_of(model) / "go").write_text("go")
    assert owner.ended(owner.make(model))["status"] == "succeeded", "the next is made"


def test_roles_projects_and_pages_of_the_list(owner: Owner, server: ServiceServer) -> None:
    model = owner.model()
    ids = [owner.make(model) for _ in range(3)]
    for artifact_id in ids:
        assert owner.ended(artifact_id)["status"] == "succeeded"
    with owner.client("viewer") as viewer:
        assert viewer.get(f"/artifacts/{ids[0]}/content").status_code == 200
        refused = [
            viewer.post("/artifacts", json={**EXPORT, "models": [model]}),
            viewer.post(f"/artifacts/{ids[0]}/cancel"),
            viewer.delete(f"/artifacts/{ids[0]}"),
        ]
        assert [answer.status_code for answer in refused] == [403] * 3
    page = owner.http.get("/artifacts", params={"limit": 2}).json()
    assert ([entry["id"] for entry in page["data"]], page["has_more"]) == (ids[:0:-1], True)
    rest = owner.http.get("/artifacts", params={"limit": 2, "after": page["last_id"]}).json()
    assert ([entry["id"] for entry in rest["data"]], rest["has_more"]) == (ids[:1], False)
    stranger = Owner(server, "strangers")
    with stranger.http:
        assert stranger.http.get("/artifacts").json()["data"] == []
        for path in (f"/artifacts/{ids[0]}", f"/artifacts/{ids[0]}/content"):
            assert stranger.http.get(path).status_code == 404
        with owner.client("admin") as admin:
            project = admin.get("/organization/projects").json()["data"]
            theirs = next(entry["id"] for entry in project if entry["name"] == "strangers")
            admin.post(f"/fine_tuning/checkpoints/{model}/permissions", json={"project_ids": [theirs]})
        assert stranger.http.get(f"/models/{model}").status_code == 200, "it may be asked"
        assert stranger.ask(model).status_code == 404, "and not be taken away"
    header = {"Idempotency-Key": "same"}
    body = {**EXPORT, "models": [model]}
    twice = [owner.http.post("/artifacts", json=body, headers=header).json()["id"] for _ in range(2)]
    assert twice[0] == twice[1]
    owner.ended(twice[0])


def test_quotas_count_artifacts(owner: Owner, server: ServiceServer, monkeypatch: pytest.MonkeyPatch) -> None:
    model = owner.model()
    owner.ended(owner.make(model))
    limits: Any = server.app.state.parts.files._limits
    gib = (12_804 * 1.5 + len(jsonl(CHAT)) + 100) / (1 << 30)
    monkeypatch.setattr(server.app.state.parts.files, "_limits", limits.model_copy(update={"project_gib": gib}))
    full = owner.ended(owner.make(model))
    assert (full["status"], full["error"]["code"]) == ("failed", "quota_exceeded")
    assert "12,804 bytes" in full["error"]["message"]
    assert not (owner.folder(full["id"]) / "content").exists()
    with owner.server.client(owner.keys["member"]) as client, pytest.raises(Exception, match="more bytes than it may"):
        client.files.create(file=("large.jsonl", b"x" * 12_000), purpose="fine-tune")
    limits = limits.model_copy(update={"project_gib": 1e-6})
    monkeypatch.setattr(server.app.state.parts.files, "_limits", limits)
    told = owner.ask(model)
    assert (told.status_code, told.json()["error"]["code"]) == (429, "quota_exceeded")
    monkeypatch.undo()
    for _ in range(3):
        owner.ended(owner.make(model))
    told = owner.ask(model)
    assert (told.status_code, "5 artifacts" in told.json()["error"]["message"]) == (429, True)


def test_pages_show_artifacts_and_keep_what_was_typed(owner: Owner, server: ServiceServer) -> None:
    visitor = PageClient(server.root, owner.keys["member"])
    assert "None yet" in visitor.text("/artifacts")
    first, second = owner.model(), owner.model()
    whole = owner.model(kind="whole")
    assert f"/artifacts/new?model={first.replace(':', '%3A')}" in visitor.text("/models")
    with owner.server.client(owner.keys["member"]) as client:
        job = next(iter(client.fine_tuning.jobs.list())).id
    assert "/artifacts/new?model=" in visitor.text(f"/jobs/{job}")
    form = visitor.text(f"/artifacts/new?model={first}")
    for spec in EXPORT_FORMATS.values():
        assert f'label="{spec.name}: {escape(spec.title)}"' in form
        assert all(f'value="{spec.name}/{level}"' in form for level in spec.levels)
    assert all(f">{how.name}: " in form for how in HOWS.values())
    assert f'name="others" value="{second}"' in form
    assert whole not in form
    assert "Combine" not in visitor.text(f"/artifacts/new?model={whole}")
    wrong = {
        "kind": "combine", "model": first, "how": "ties", "weight": "0.75", "others": second, "other_weights": "-2",
        "setting_names": ["density"], "settings": ["<script>7"], "rank": "11",
    }  # fmt: skip
    shown = visitor.post("/artifacts/new", wrong)
    assert shown.status_code == 400
    text = shown.text
    assert 'aria-describedby="wrong-settings.density"' in text
    assert "&#39;&lt;script&gt;7&#39; is no number." in text
    for kept in ('value="0.75"', 'value="-2"', 'value="&lt;script&gt;7"', 'value="11"', 'value="ties" selected'):
        assert kept in text, kept
    assert "<script>7" not in text
    assert (
        "two models at least" in visitor.post("/artifacts/new", wrong | {"settings": ["0.5"], "other_weights": ""}).text
    )
    assert visitor.post("/artifacts/new", {"kind": "odd", "model": first}).status_code == 400
    assert visitor.post("/artifacts/new", {"kind": "merge", "model": f"{first}x"}).status_code == 404
    assert owner.http.get("/artifacts").json()["data"] == []
    assert visitor.post("/artifacts/new", wrong | {"settings": ["0.5"]}).headers["location"] == "/artifacts"
    combined = owner.http.get("/artifacts").json()["data"][0]
    assert (combined["models"], combined["settings"]["weights"]) == ([first, second], [0.75, -2.0])
    assert combined["settings"]["rank"] == 11
    for body in ({"kind": "export", "format": "gguf/Q8_0"}, {"kind": "merge", "dtype": "bfloat16"}):
        assert visitor.post("/artifacts/new", body | {"model": first}).status_code == 303
    ids = [entry["id"] for entry in owner.http.get("/artifacts").json()["data"]]
    for artifact_id in ids:
        assert owner.ended(artifact_id)["status"] == "succeeded"
    listed = visitor.text("/artifacts")
    for part in (
        "ties of 2", "gguf Q8_0", "merged, bfloat16", "1 comparison in llama.cpp 1, all as allowed", "12.5 KiB",
        "kl: &lt;b&gt;both&lt;/b&gt;", "100.00% of 900 positions", "Rank 8, relative error 0.25",
    ):  # fmt: skip
        assert part in listed, part
    assert "hx-trigger" not in listed
    tar = visitor.get(f"/artifacts/{ids[0]}/content")
    assert (tar.status_code, tar.headers["content-type"]) == (200, "application/x-tar")
    assert visitor.post(f"/artifacts/{ids[0]}/delete", form=False).status_code == 403, "without its token"
    assert visitor.post(f"/artifacts/{ids[0]}/delete").status_code == 303
    assert owner.http.get(f"/artifacts/{ids[0]}").status_code == 404
    viewer = PageClient(server.root, owner.keys["viewer"])
    assert "Download" in viewer.text("/artifacts")
    assert "/delete" not in viewer.text("/artifacts")
    assert viewer.get(f"/artifacts/new?model={first}").status_code == 403
    failed = owner.ended(owner.make(owner.model(plan="refuses")))
    assert failed["status"] == "failed"
    assert "no &lt;i&gt;room&lt;/i&gt;" in visitor.text("/artifacts")
