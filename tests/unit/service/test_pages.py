"""The control room over HTTP: who gets in, what forms are taken, what texts come out escaped, what each page shows."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from dataclasses import replace

import openai
import pytest
from page_client import PageClient
from service_server import ADMIN_KEY, CHAT, ServiceServer, jsonl, serving, wait_until
from sqlalchemy import update

from distft.service.pages import job_pages
from distft.service.pages.door import COOKIE, local_path
from distft.service.pages.sessions import IDLE_S, LASTS_S
from distft.service.runner import RunnerState
from distft.service.tables import PageSessionRow

EVIL = "<script>alert(1)</script>"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServiceServer]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DISTFT_API_KEY", ADMIN_KEY)
        with serving(tmp_path_factory.mktemp("pages"), file_mib=0.2, slowest_upload_s=2.0) as running:
            yield running


@pytest.fixture
def client(server: ServiceServer) -> Iterator[openai.OpenAI]:
    server.runner.ends_at_once = True
    with server.client() as made:
        yield made


@pytest.fixture
def visitor(server: ServiceServer) -> PageClient:
    return PageClient(server.root)


def key_of(client: openai.OpenAI, name: str, role: str) -> str:
    """A key of a new project."""
    project = client.post("/organization/projects", body={"name": name}, cast_to=dict)
    path = f"/organization/projects/{project['id']}/api_keys"
    return client.post(path, body={"name": "k", "role": role}, cast_to=dict)["value"]


def trained(client: openai.OpenAI, **more: object) -> str:
    """Id of a job that has ended."""
    file_id = client.files.create(file=("rows.jsonl", jsonl(CHAT)), purpose="fine-tune").id
    job = client.fine_tuning.jobs.create(model="tiny", training_file=file_id, **more)  # type: ignore[arg-type]
    wait_until(lambda: client.fine_tuning.jobs.retrieve(job.id).status in ("succeeded", "failed"))
    return job.id


def test_nobody_gets_in_without_a_key(server: ServiceServer) -> None:
    stranger = PageClient(server.root, None)
    answer = stranger.get("/jobs?status=failed")
    assert (answer.status_code, answer.headers["location"]) == (303, "/login?back=/jobs%3Fstatus%3Dfailed")
    assert stranger.get("/nothing").headers["location"] == "/login?back=/nothing"
    assert stranger.get("/jobs", headers={"HX-Request": "true"}).headers["hx-redirect"] == "/login"
    assert stranger.post("/jobs/x/cancel", form=False).headers["location"] == "/login"
    wrong = stranger.post("/login", {"key": "sk-wrong-key-of-nobody"}, form=False)
    assert wrong.status_code == 401
    assert "No such key" in wrong.text
    assert not stranger.http.cookies
    login = stranger.text("/login?back=//evil.example/")
    assert 'name="back" value="/"' in login
    answer = stranger.post("/login", {"key": ADMIN_KEY, "back": "/jobs?status=failed"}, form=False)
    assert (answer.status_code, answer.headers["location"]) == (303, "/jobs?status=failed")
    cookie = answer.headers["set-cookie"]
    assert "HttpOnly" in cookie
    assert "SameSite=strict" in cookie
    assert "Secure" not in cookie, "this server is not behind TLS"
    proxied = PageClient(server.root, None)
    behind = proxied.post("/login", {"key": ADMIN_KEY}, form=False, headers={"X-Forwarded-Proto": "https"})
    assert "Secure" in behind.headers["set-cookie"]
    assert stranger.get("/v1/files").status_code == 401, "a session is no key of the API"
    assert ADMIN_KEY not in stranger.text("/jobs")


@pytest.mark.parametrize("path", ["//evil.example", "/\\evil.example", "https://evil.example", "evil", "/a\nb", ""])
def test_nobody_is_led_to_another_site(path: str) -> None:
    assert local_path(path) == "/"
    assert local_path("/jobs?status=failed") == "/jobs?status=failed"


def test_sessions_are_new_and_end(server: ServiceServer, client: openai.OpenAI) -> None:
    fixed = PageClient(server.root, None)
    fixed.http.cookies.set(COOKIE, "chosen-by-somebody-else", domain="127.0.0.1", path="/")
    assert fixed.get("/jobs").status_code == 303
    fixed.post("/login", {"key": ADMIN_KEY}, form=False)
    token = fixed.http.cookies.get(COOKIE)
    assert token is not None
    assert "chosen" not in token
    stored = b"".join(path.read_bytes() for path in server.data.glob("service.sqlite*"))
    assert token.encode() not in stored, "its hash is kept, not the cookie"
    second = PageClient(server.root)
    fixed.post("/login", {"key": ADMIN_KEY}, form=False)
    old = PageClient(server.root, None)
    old.http.cookies.set(COOKIE, token)
    assert old.get("/jobs").status_code == 303, "the session before a new one is over"
    assert second.get("/jobs").status_code == 200, "another browser's goes on"

    token = fixed.token()
    assert fixed.http.post(f"{server.root}/logout", data={"csrf": token}, allow_redirects=False).status_code == 403
    assert fixed.get("/jobs").status_code == 200
    assert fixed.post("/logout").headers["location"] == "/login"
    assert fixed.get("/jobs").status_code == 303

    for column, seconds in (("created_at", LASTS_S), ("seen_at", IDLE_S)):
        late = PageClient(server.root)
        assert late.get("/jobs").status_code == 200
        with server.database.writing() as session:
            session.execute(update(PageSessionRow).values({column: int(time.time()) - seconds - 5}))
        assert late.get("/jobs").status_code == 303

    key = key_of(client, "leavers", "member")
    leaver = PageClient(server.root, key)
    assert leaver.get("/jobs").status_code == 200
    projects = client.get("/organization/projects", cast_to=dict)["data"]
    project = next(entry["id"] for entry in projects if entry["name"] == "leavers")
    keys = f"/organization/projects/{project}/api_keys"
    client.delete(f"{keys}/{client.get(keys, cast_to=dict)['data'][0]['id']}", cast_to=dict)
    assert leaver.get("/jobs").status_code == 303, "a session ends with its key"


def test_where_a_run_stands_with_its_runner_is_said_once_and_shown(
    server: ServiceServer, client: openai.OpenAI, visitor: PageClient
) -> None:
    server.runner.ends_at_once = False
    file_id = client.files.create(file=("rows.jsonl", jsonl(CHAT)), purpose="fine-tune").id
    job_id = client.fine_tuning.jobs.create(model="tiny", training_file=file_id).id
    wait_until(lambda: job_id in server.runner.alive)
    told = RunnerState(key="1", waits=True, words=f"in a queue {EVIL}", event="It is in a queue.", is_setback=True)
    server.runner.states[job_id] = told
    wait_until(lambda: "in a queue &lt;script&gt;" in visitor.text(f"/jobs/{job_id}"))
    page = visitor.text(f"/jobs/{job_id}")
    assert "… in the cluster&#39;s queue" in page
    assert "… in the cluster&#39;s queue" in visitor.text("/jobs")
    assert "Warning: </strong>It is in a queue." in page
    server.runner.states[job_id] = replace(told, words="in a long queue")
    wait_until(lambda: "in a long queue" in visitor.text(f"/jobs/{job_id}"))
    server.runner.states[job_id] = replace(told, key="2", waits=False, words="on node1", event="It began.")
    wait_until(lambda: "It began." in visitor.text(f"/jobs/{job_id}"))
    assert "▶ running" in visitor.text(f"/jobs/{job_id}")
    server.runner.write_steps(server.folder(job_id), range(1, 5))
    server.runner.end(server.folder(job_id))
    wait_until(lambda: client.fine_tuning.jobs.retrieve(job_id).status == "succeeded")
    assert "on node1" not in visitor.text(f"/jobs/{job_id}"), "it is over"
    events = [event.message for event in client.fine_tuning.jobs.list_events(job_id, limit=100)]
    assert (events.count("It is in a queue."), events.count("It began.")) == (1, 1)


def test_forms_of_other_sites_are_refused(server: ServiceServer, client: openai.OpenAI, visitor: PageClient) -> None:
    server.runner.ends_at_once = False
    file_id = client.files.create(file=("rows.jsonl", jsonl(CHAT)), purpose="fine-tune").id
    job = client.fine_tuning.jobs.create(model="tiny", training_file=file_id).id
    path, token = f"/jobs/{job}/cancel", visitor.token()
    attempts = [
        visitor.post(path, form=False),
        visitor.post(path, {"csrf": "0" * 64}, form=False),
        visitor.post(path, {"csrf": PageClient(server.root).token()}, form=False),
        visitor.post(path, origin="https://evil.example"),
        visitor.post(path, origin="null"),
        visitor.post(path, origin=None),
        visitor.post(path, headers={"Sec-Fetch-Site": "cross-site"}),
        visitor.post(path, headers={"Sec-Fetch-Site": "same-site"}),
    ]
    assert [answer.status_code for answer in attempts] == [403] * 8
    foreign = PageClient(server.root, None).post("/login", {"key": ADMIN_KEY}, form=False, origin="https://evil")
    assert foreign.status_code == 403
    assert client.fine_tuning.jobs.retrieve(job).status != "cancelled"
    same = visitor.post(path, {"csrf": token}, form=False, origin=None, headers={"Sec-Fetch-Site": "same-origin"})
    assert (same.status_code, same.headers["location"]) == (303, f"/jobs/{job}")
    assert client.fine_tuning.jobs.retrieve(job).status == "cancelled"
    assert visitor.get(path).status_code in (404, 405), "reading changes nothing"


def test_every_page_has_its_headers(visitor: PageClient, client: openai.OpenAI) -> None:
    job = trained(client)
    for path in ("/jobs", f"/jobs/{job}", "/nothing", "/jobs/ftjob-none", "/static/room.css"):
        headers = visitor.get(path).headers
        policy = headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert "frame-ancestors 'none'" in policy
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["referrer-policy"] == "same-origin"
        assert headers["x-frame-options"] == "DENY"
    assert visitor.get("/jobs").headers["cache-control"] == "no-store"
    text = visitor.text(f"/jobs/{job}")
    assert not re.search(r" style=| on\w+=|<script>|<style", text), "the policy forbids all of these"
    assert not re.search(r"(?:src|href|action)=\"(?:https?:)?//", text)
    for name in re.findall(r'"(/static/[^"]+)"', text):
        answer = visitor.get(name)
        assert answer.status_code == 200
        assert "immutable" in answer.headers["cache-control"]
    for name in ("/static/../base.html", "/static/%2e%2e%2fweb.py", "/static/web.py", "/static/none.css"):
        assert visitor.get(name).status_code == 404, name


def test_jobs_are_listed_and_shown(visitor: PageClient, client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch) -> None:
    job = trained(client, suffix="mine")
    listed = visitor.text("/jobs?status=succeeded")
    assert f'href="/jobs/{job}"' in listed
    assert f'href="/jobs/{job}"' not in visitor.text("/jobs?status=failed")
    assert visitor.get("/jobs?status=odd").status_code == 400
    shown = visitor.text(f"/jobs/{job}")
    for part in ("mine", "● succeeded", "Step 4/4: training loss=0.2500", "<svg", ":ckpt-step-4", "Report"):
        assert part in shown, part
    assert "hx-trigger" not in shown, "it is over: nothing is asked any more"
    assert visitor.get(f"/jobs/{job}/recipe.toml").text.startswith("name =")
    assert "attachment" in visitor.get(f"/jobs/{job}/recipe.toml").headers["content-disposition"]
    assert "Files validated" in visitor.text(f"/jobs/{job}/events")
    assert visitor.text(f"/jobs/{job}/checkpoints").count(":ckpt-step-") >= 4
    monkeypatch.setattr(job_pages, "EACH", 3)
    for _ in range(4):
        last = client.fine_tuning.jobs.create(
            model="tiny", training_file=client.fine_tuning.jobs.retrieve(job).training_file
        )
    first, seen = visitor.text("/jobs"), set()
    assert f'href="/jobs/{last.id}"' in first
    while True:
        seen |= set(re.findall(r'href="/jobs/(ftjob-\w+)"', first))
        older = re.search(r'href="(/jobs\?after=[^"]+)"', first)
        if older is None:
            break
        first = visitor.text(older[1].replace("&amp;", "&"))
    assert seen == {entry.id for entry in client.fine_tuning.jobs.list(limit=100)}


def test_a_running_job_is_paused_moved_and_resumed(
    visitor: PageClient, client: openai.OpenAI, server: ServiceServer
) -> None:
    server.runner.ends_at_once = False
    file_id = client.files.create(file=("rows.jsonl", jsonl(CHAT)), purpose="fine-tune").id
    job = client.fine_tuning.jobs.create(model="tiny", training_file=file_id).id
    path = f"/jobs/{job}"
    wait_until(lambda: job in server.runner.alive)
    server.runner.write_steps(server.folder(job), range(1, 3))
    wait_until(lambda: "Step 2/4" in visitor.text(path))
    shown = visitor.text(path)
    assert 'hx-trigger="every 2s"' in shown
    assert f'action="{path}/pause"' in shown
    assert visitor.post(f"{path}/pause").status_code == 303
    assert f'action="{path}/resume"' in visitor.text(path)
    server.runner.end(server.folder(job), code=75, reason="preempted: asked")
    wait_until(lambda: "‖ paused" in visitor.text(path))
    assert visitor.post(f"{path}/priority", {"priority": "7"}).status_code == 303
    assert 'value="7"' in visitor.text(path)
    assert visitor.post(f"{path}/priority", {"priority": "101"}).status_code == 400
    assert visitor.post(f"{path}/resume").status_code == 303
    wait_until(lambda: server.runner.starts.count(job) == 2)
    assert "1 restart" in visitor.text(path)
    assert visitor.post(f"{path}/cancel").status_code == 303
    refused = visitor.post(f"{path}/resume")
    assert (refused.status_code, "cannot be resumed" in refused.text) == (400, True)


def test_texts_of_people_and_models_come_out_escaped(
    visitor: PageClient, client: openai.OpenAI, server: ServiceServer
) -> None:
    job = trained(client)
    folder = server.folder(job)
    rollouts = folder.run / "rollouts"
    rollouts.mkdir()
    line = jsonl({"prompt": f"prompt {EVIL}", "answer": f"answer {EVIL}", "reward": 0.5})
    (rollouts / "step-00000004.jsonl").write_bytes(line)
    shown = visitor.text(f"/jobs/{job}")
    assert "prompt &lt;script&gt;" in shown
    assert "answer &lt;script&gt;" in shown
    assert EVIL not in shown
    missing = visitor.get("/jobs/<img src=x>")
    assert (missing.status_code, "<img" in missing.text, "&lt;img" in missing.text) == (404, False, True)
    assert EVIL not in visitor.get(f"/nothing/{EVIL}").text
    assert EVIL not in visitor.get(f"/login?back=/{EVIL}").text
    with server.client() as other, pytest.raises(openai.BadRequestError):
        other.fine_tuning.jobs.create(model="tiny", training_file="file-x", suffix=EVIL)


def test_another_projects_jobs_are_not_there(client: openai.OpenAI, server: ServiceServer) -> None:
    job = trained(client, suffix="theirs")
    other = PageClient(server.root, key_of(client, "others", "admin"))
    for path in ("", "/events", "/checkpoints", "/recipe.toml", "/report"):
        hidden, none = other.get(f"/jobs/{job}{path}"), other.get(f"/jobs/ftjob-{'x' * 24}{path}")
        assert hidden.status_code == none.status_code == 404
        assert "theirs" not in hidden.text
    for verb in ("pause", "resume", "cancel"):
        assert other.post(f"/jobs/{job}/{verb}").status_code == 404
    assert other.post(f"/jobs/{job}/priority", {"priority": 3}).status_code == 404
    assert other.get(f"/compare?job={job}&job={job}").status_code == 404
    assert other.get(f"/jobs?after={job}").status_code == 404
    assert job not in other.text("/jobs")
    viewer = PageClient(server.root, key_of(client, "viewers", "viewer"))
    assert "New job" not in viewer.text("/jobs")
    assert "ask for one of the role member" in viewer.text("/jobs")


@pytest.mark.slow
def test_reports_are_made_in_a_sandbox(visitor: PageClient, client: openai.OpenAI, server: ServiceServer) -> None:
    one, two = trained(client), trained(client)
    for path in (f"/jobs/{one}/report", f"/compare?job={one}&job={two}"):
        answer = visitor.get(path)
        assert answer.status_code == 200, answer.text
        policy = answer.headers["content-security-policy"]
        assert policy.startswith("sandbox; default-src 'none'")
        assert "script" not in policy
        assert str(server.data) not in answer.text, "a page shows no path of the server"
        began = time.monotonic()
        assert visitor.get(path).text == answer.text
        assert time.monotonic() - began < 0.5, "it is made once"
    assert "Not enough" not in visitor.text("/compare")


def test_reports_of_runs_that_have_not_begun(visitor: PageClient, client: openai.OpenAI, server: ServiceServer) -> None:
    file_id = client.files.create(file=("rows.jsonl", jsonl({"broken": 1})), purpose="fine-tune").id
    job = client.fine_tuning.jobs.create(model="tiny", training_file=file_id).id
    wait_until(lambda: client.fine_tuning.jobs.retrieve(job).status == "failed")
    assert visitor.get(f"/jobs/{job}/report").status_code == 404
    assert "row 1 is broken" in visitor.text(f"/jobs/{job}")
