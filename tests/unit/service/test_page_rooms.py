"""Files, models, playground and what admins look after, on the pages: what each does, who may, and what is escaped."""

from __future__ import annotations

import html
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from page_client import PageClient
from service_server import ADMIN_KEY, CHAT, ServiceServer, jsonl, serving, wait_until

from distft.demo.files import locate_path

EVIL = "<script>alert(1)</script>"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServiceServer]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DISTFT_API_KEY", ADMIN_KEY)
        with serving(tmp_path_factory.mktemp("rooms")) as running:
            yield running


@pytest.fixture(scope="module")
def admin(server: ServiceServer) -> PageClient:
    return PageClient(server.root)


@pytest.fixture(scope="module")
def tuned(server: ServiceServer) -> str:
    """Name of a model that a job made."""
    with server.client() as client:
        file_id = client.files.create(file=("rows.jsonl", jsonl(CHAT)), purpose="fine-tune").id
        job = client.fine_tuning.jobs.create(model="tiny", training_file=file_id)
        wait_until(lambda: client.fine_tuning.jobs.retrieve(job.id).status == "succeeded")
        name = client.fine_tuning.jobs.retrieve(job.id).fine_tuned_model
    assert name is not None
    return name


def made_key(admin: PageClient, project: str, role: str, name: str = "k") -> str:
    """A key of a project, as the page shows it once."""
    answer = admin.post("/keys", {"project_id": project, "name": name, "role": role})
    found = re.search(r"sk-distft-[\w-]+", answer.text)
    assert found is not None, answer.text
    return found[0]


def test_projects_and_keys(server: ServiceServer, admin: PageClient) -> None:
    assert admin.post("/keys/projects", {"name": "guests"}).status_code == 303
    assert admin.post("/keys/projects", {"name": "guests"}).status_code == 409
    assert admin.post("/keys/projects", {"name": f"x{EVIL}"}).status_code == 400
    project = re.findall(r'name="project_id" value="(proj_\w+)"', admin.text("/keys"))[-1]
    member, viewer = made_key(admin, project, "member", EVIL), made_key(admin, project, "viewer")
    listed = admin.text("/keys")
    assert EVIL not in listed
    assert "&lt;script&gt;" in listed
    assert member not in listed
    assert admin.post("/keys", {"project_id": project, "name": "k", "role": "owner"}).status_code == 400
    assert admin.post("/keys", {"project_id": "proj_none", "name": "k", "role": "viewer"}).status_code == 404
    for key in (member, viewer):
        other = PageClient(server.root, key)
        for path in ("/keys", "/webhooks", "/audit", "/models/permissions?checkpoint=x"):
            assert other.get(path).status_code == 403, path
            assert f'href="{path}"' not in other.text("/settings")
        assert other.post("/keys", {"project_id": project, "name": "k", "role": "admin"}).status_code == 403
        assert other.post("/keys/projects", {"name": "mine"}).status_code == 403
        assert other.post("/webhooks", {"url": "https://a.example/", "events": "x"}).status_code in (400, 403)
    looker = PageClient(server.root, viewer)
    for path in ("/jobs", "/files", "/models", "/settings", "/compare"):
        assert looker.get(path).status_code == 200
    for path in ("/new", "/playground"):
        assert looker.get(path).status_code == 403
    assert looker.post("/files", files={"file": ("x", b"y")}).status_code == 403
    assert looker.post("/models/delete", {"model": "tiny"}).status_code == 403
    assert looker.post("/playground/answer", {"model": "tiny"}).status_code == 403
    path = re.findall(r'action="(/keys/\w+/\w+/revoke)"', listed)[-1]
    assert admin.post(path).status_code == 303
    assert [PageClient(server.root, None).post("/login", {"key": viewer}, form=False).status_code] == [401]
    assert "last admin key" in admin.post(re.findall(r'action="(/keys/\w+/\w+/revoke)"', listed)[0]).text
    assert "key.revoke" in admin.text("/audit")


def test_webhooks(admin: PageClient) -> None:
    event = "fine_tuning.job.failed"
    answer = admin.post("/webhooks", {"url": "https://a.example/hook?x=<b>", "events": [event]})
    assert "whsec_" in answer.text
    assert "<b>" not in answer.text
    listed = admin.text("/webhooks")
    assert "whsec_" not in listed, "it is shown once"
    assert admin.post("/webhooks", {"url": "http://a.example/", "events": [event]}).status_code == 400
    assert admin.post("/webhooks", {"url": "https://a.example/"}).status_code == 400, "told of nothing"
    path = re.findall(r'action="(/webhooks/\w+/delete)"', listed)[0]
    assert admin.post(path).status_code == 303
    assert "None yet" in admin.text("/webhooks")
    assert admin.post(path).status_code == 404


def test_files(server: ServiceServer, admin: PageClient) -> None:
    path = admin.post("/files", files={"file": ("a.jsonl", EVIL.encode())}).headers["location"]
    shown = admin.text(path)
    assert EVIL not in shown
    assert "&lt;script&gt;" in shown
    content = admin.get(f"{path}/content")
    assert content.content == EVIL.encode()
    assert content.headers["content-type"] == "application/octet-stream"
    assert "attachment" in content.headers["content-disposition"]
    admin.post("/keys/projects", {"name": "file-guests"})
    project = re.findall(r'name="project_id" value="(proj_\w+)"', admin.text("/keys"))[-1]
    other = PageClient(server.root, made_key(admin, project, "member"))
    for hidden in (path, f"{path}/content"):
        assert other.get(hidden).status_code == 404
    assert other.post(f"{path}/delete").status_code == 404
    assert path not in other.text("/files")
    assert admin.post(f"{path}/delete").status_code == 303
    assert admin.get(path).status_code == 404


def test_models_and_who_may_use_them(server: ServiceServer, admin: PageClient, tuned: str) -> None:
    admin.post("/keys/projects", {"name": "model-guests"})
    project = re.findall(r'name="project_id" value="(proj_\w+)"', admin.text("/keys"))[-1]
    other = PageClient(server.root, made_key(admin, project, "admin"))
    assert tuned in admin.text("/models")
    assert tuned not in other.text("/models")
    assert other.get(f"/models/permissions?checkpoint={tuned}").status_code == 404
    assert other.post("/models/delete", {"model": tuned}).status_code == 404
    assert other.post("/playground/answer", {"model": tuned, "prompt": "?"}).status_code == 404
    admin.post("/models/permissions", {"checkpoint": tuned, "project_id": project})
    assert tuned in other.text("/models")
    found = re.search(r'name="permission_id" value="(\w+)"', admin.text(f"/models/permissions?checkpoint={tuned}"))
    assert found is not None
    admin.post("/models/permissions/delete", {"checkpoint": tuned, "permission_id": found[1]})
    assert tuned not in other.text("/models")
    assert admin.post("/models/delete", {"model": "tiny"}).status_code == 403


def test_the_playground_asks_both_with_the_same_seed(
    server: ServiceServer, admin: PageClient, tuned: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[dict[str, Any]] = []

    def answer(request: dict[str, Any]) -> Iterator[dict[str, Any]]:
        asked.append(request)
        yield {"event": "piece", "index": 0, "text": EVIL, "prompt_tokens": 3}
        yield {"event": "end", "index": 0, "text": EVIL, "finish_reason": "stop", "logprobs": None, "num_tokens": 2}

    monkeypatch.setattr(server.app.state.parts.answers, "answer", answer)
    form = {"a": tuned, "b": f"{tuned}:ckpt-step-2", "prompt": f"why {EVIL}", "seed": "11", "temperature": "0.5"}
    both = admin.post("/playground", {**form, "max_tokens": "9"})
    assert both.status_code == 200
    assert EVIL not in both.text
    assert both.text.count("&lt;script&gt;alert(1)&lt;/script&gt;</pre>") == 2
    assert [request["given"].endswith("step-00000002") for request in asked] == [False, True]
    assert {(request["seed"], request["temperature"], request["max_tokens"]) for request in asked} == {(11, 0.5, 9)}
    streamed = admin.post("/playground/answer", {"model": tuned, "prompt": "why"})
    assert streamed.headers["content-type"].startswith("text/event-stream")
    assert "data: [DONE]" in streamed.text
    linked = admin.text(f"/playground?a={tuned}&prompt={EVIL}&seed=11")
    assert EVIL not in linked
    assert 'value="11"' in linked
    assert (
        admin.post("/playground/answer", {"model": "none", "prompt": "?"}).json()["error"]["code"] == "model_not_found"
    )
    right = {"a": tuned, "prompt": "why"}
    for change, says in (
        ({"seed": "many"}, "'many' is no whole number."), ({"seed": "1.5"}, "'1.5' is no whole number."),
        ({"temperature": "3"}, "less than or equal to 2"), ({"temperature": "nan"}, "finite"),
        ({"max_tokens": "0"}, "greater than or equal to 1"), ({"prompt": " "}, "Write a prompt."),
    ):  # fmt: skip
        (field,) = change
        refused = admin.post("/playground", {**right, **change})
        assert refused.status_code == 400
        place = re.search(rf'id="wrong-{field}" role="alert">([^<]*)<', refused.text)
        assert place is not None, refused.text
        assert says in html.unescape(place[1])
        assert f'aria-describedby="wrong-{field}"' in refused.text
        said = admin.post("/playground/answer", {"model": tuned, **right, **change})
        assert (said.status_code, said.json()["error"]["param"]) == (400, field)
    asked.clear()
    assert '<optgroup label="Models of this server">' in admin.text("/playground?a=tiny")
    assert "<option selected>tiny</option>" in admin.text("/playground?a=tiny")
    assert admin.post("/playground", {**right, "a": "tiny", "b": tuned}).status_code == 200
    before, after = (request["given"] for request in asked)
    assert before == locate_path("demo:tiny-llama"), "the base as it was, beside what was made of it"
    assert Path(after).parent.name == "runs"


def test_settings_show_limits_and_no_path(server: ServiceServer, admin: PageClient) -> None:
    shown = admin.text("/settings")
    assert "jobs side by side" in shown
    assert str(server.data) not in shown
    assert "demo:tiny-llama" not in shown
