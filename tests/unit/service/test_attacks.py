"""Attacks on the API: other projects' ids on every route that has one, names, bodies, rows, slowness, keys, secrets."""

from __future__ import annotations

import gzip
import hmac
import json
import logging
import re
import select
import socket
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2 as httpx
import openai
import pytest
from service_server import ADMIN_KEY, CHAT, ServiceServer, jsonl, serving, wait_until
from sqlalchemy import event

from distft.core.errors import DataError
from distft.service import http_guard
from distft.service.auth import find_caller
from distft.service.errors import ApiError
from distft.service.job_recipe import scan_rows
from distft.service.logs import JsonLines


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServiceServer]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DISTFT_API_KEY", ADMIN_KEY)
        with serving(tmp_path_factory.mktemp("attacked"), file_mib=0.2, slowest_upload_s=5.0) as running:
            yield running


@pytest.fixture
def http(server: ServiceServer) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.root, headers={"Authorization": f"Bearer {ADMIN_KEY}"}, timeout=60) as client:
        yield client


@pytest.fixture(scope="module")
def keys(server: ServiceServer) -> dict[str, str]:
    """Keys of another project, by role."""
    with server.client() as client:
        project = client.post("/organization/projects", body={"name": "attackers"}, cast_to=dict)["id"]
        path = f"/organization/projects/{project}/api_keys"
        made = {
            role: client.post(path, body={"name": role, "role": role}, cast_to=dict)["value"]
            for role in ("viewer", "member", "admin")
        }
    return {**made, "project": project}


@pytest.fixture(scope="module")
def owned(server: ServiceServer, keys: dict[str, str]) -> dict[str, str]:
    """One of everything that has an id: name of the route's parameter -> id, of the first project."""
    with server.client() as client:
        file_id = client.files.create(file=("r.jsonl", jsonl(CHAT)), purpose="fine-tune").id
        job_id = client.fine_tuning.jobs.create(model="tiny", training_file=file_id, suffix="hidden").id
        wait_until(lambda: client.fine_tuning.jobs.retrieve(job_id).status == "succeeded")
        upload = client.uploads.create(filename="u", purpose="fine-tune", bytes=1, mime_type="text/plain")
        checkpoint = client.fine_tuning.jobs.checkpoints.list(job_id).data[0].fine_tuned_model_checkpoint
        third = client.post("/organization/projects", body={"name": "third"}, cast_to=dict)["id"]
        granted = client.fine_tuning.checkpoints.permissions.create(checkpoint, project_ids=[third]).data[0]
        hook = client.post("/webhooks", body={"url": "https://example.com/x"}, cast_to=dict)
        return {
            "file_id": file_id, "fine_tuning_job_id": job_id, "upload_id": upload.id, "checkpoint": checkpoint,
            "permission_id": granted.id, "webhook_id": hook["id"],
            "model": client.fine_tuning.jobs.retrieve(job_id).fine_tuned_model or "",
            "artifact_id": made_artifact(client, client.fine_tuning.jobs.retrieve(job_id).fine_tuned_model or ""),
        }  # fmt: skip


def made_artifact(client: openai.OpenAI, model: str) -> str:
    body = {"kind": "export", "models": [model], "format": "safetensors"}
    artifact_id = client.post("/artifacts", body=body, cast_to=dict)["id"]
    wait_until(lambda: client.get(f"/artifacts/{artifact_id}", cast_to=dict)["status"] == "succeeded")
    return artifact_id


BODIES: dict[str, Any] = {
    "/v1/uploads/{upload_id}/complete": {"json": {"part_ids": ["part_x"]}},
    "/v1/uploads/{upload_id}/parts": {"files": {"data": ("p", b"x")}},
    "/v1/fine_tuning/jobs/{fine_tuning_job_id}/priority": {"json": {"priority": 5}},
    "/v1/fine_tuning/checkpoints/{checkpoint}/permissions": {"json": {"project_ids": ["proj_x"]}},
}


def absent(name: str) -> str:
    """An id of the same form that nobody has."""
    return re.sub(r"[A-Za-z0-9]{8,}(?=$|:ckpt)", lambda found: "x" * len(found[0]), name)


def test_no_number_of_a_request_is_too_large_for_a_column(http: httpx.Client, keys: dict[str, str]) -> None:
    """Databases take integers of 64 bits; SQLite's driver raises, past every handler, for one that is larger."""
    document = http.get("/openapi.json").json()
    unbounded: set[str] = set()

    def look(part: Any, name: str) -> None:
        if isinstance(part, list):
            for item in part:
                look(item, name)
        elif isinstance(part, dict):
            if "$ref" in part:
                name = part["$ref"].rpartition("/")[2]
                look(document["components"]["schemas"][name], name)
            if part.get("type") == "integer" and not max(part.get("maximum", 0), part.get("exclusiveMaximum", 0)):
                unbounded.add(name)
            for key, value in part.items():
                look(value, name if key in ("schema", "anyOf", "items", "properties") else f"{name}.{key}")

    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            look([operation.get("parameters", []), operation.get("requestBody", {})], f"{method} {path}")
    assert unbounded == {"CompletionRequest.prompt"}, "token ids are compared with the vocabulary"
    for number in (2**63, 10**30):
        answer = http.get("/v1/audit", params={"after": number}, headers=bearer(keys["admin"]))
        assert answer.status_code == 400
        assert answer.json()["error"]["param"] == "after"
    assert http.get("/v1/audit", params={"after": 2**63 - 1}, headers=bearer(keys["admin"])).json()["data"] == []


def test_no_route_tells_an_id_of_another_project_from_one_that_nobody_has(
    server: ServiceServer, http: httpx.Client, keys: dict[str, str], owned: dict[str, str]
) -> None:
    """Generated from the schema: a new route with an id is attacked, one with an id that is unknown here fails."""
    tried = 0
    for path, operations in http.get("/openapi.json").json()["paths"].items():
        names = re.findall(r"\{(\w+)\}", path)
        for method in operations:
            if path.startswith("/v1/organization/"):
                for role in ("viewer", "member"):
                    told = http.request(method, path.replace("{project_id}", keys["project"]).replace("{key_id}", "k"),
                                        headers=bearer(keys[role]), json={"name": "n"})  # fmt: skip
                    assert told.status_code == 403, (method, path)
                continue
            query = {"after": owned[_listed(path)]} if _pages(operations[method]) and _listed(path) else None
            if not names and query is None:
                continue
            assert not {*names} - {*owned}, f"{path}: say in `owned` what another project would guess"
            for role in ("viewer", "member", "admin"):
                said: list[tuple[int, str]] = []
                for ids in (owned, {name: absent(value) for name, value in owned.items()}):
                    url = path
                    for name in names:
                        url = url.replace(f"{{{name}}}", ids[name])
                    after = {"after": ids[_listed(path)]} if query else None
                    told = http.request(method, url, params=after, headers=bearer(keys[role]), **BODIES.get(path, {}))
                    text = told.text
                    for value in ids.values():
                        text = text.replace(value, "ID")
                    said.append((told.status_code, text))
                assert said[0] == said[1], (role, method, path)
                assert said[0][0] == 404 or (role != "admin" and said[0][0] == 403), (role, method, path, said)
                tried += 1
    assert tried > 60
    with server.client() as client:  # and nothing of it has done anything
        assert client.fine_tuning.jobs.retrieve(owned["fine_tuning_job_id"]).status == "succeeded"
        assert client.files.content(owned["file_id"]).content == jsonl(CHAT)
        assert client.models.retrieve(owned["model"]).id == owned["model"]
        assert client.get(f"/artifacts/{owned['artifact_id']}", cast_to=dict)["status"] == "succeeded"
        assert client.uploads.cancel(owned["upload_id"]).status == "cancelled"
        assert len(list(client.fine_tuning.checkpoints.permissions.list(owned["checkpoint"]))) == 1


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def _pages(operation: dict[str, Any]) -> bool:
    return any(entry["name"] == "after" and entry["in"] == "query" for entry in operation.get("parameters", ()))


def _listed(path: str) -> str:
    """The id by which a list is cut."""
    ids = {"/v1/files": "file_id", "/v1/fine_tuning/jobs": "fine_tuning_job_id", "/v1/artifacts": "artifact_id"}
    return ids.get(path, "")


def test_ids_in_bodies_are_of_the_own_project(http: httpx.Client, keys: dict[str, str], owned: dict[str, str]) -> None:
    bodies: list[tuple[str, Any]] = [
        ("/v1/fine_tuning/jobs", {"model": "tiny", "training_file": owned["file_id"]}),
        ("/v1/chat/completions", {"model": owned["model"], "messages": [{"role": "user", "content": "?"}]}),
        ("/v1/chat/completions", {"model": owned["checkpoint"], "messages": [{"role": "user", "content": "?"}]}),
        ("/v1/completions", {"model": owned["model"], "prompt": "?"}),
        ("/v1/artifacts", {"kind": "export", "models": [owned["model"]], "format": "safetensors"}),
        ("/v1/artifacts", {"kind": "merge", "models": [owned["checkpoint"]]}),
    ]
    for path, body in bodies:
        told = http.post(path, json=body, headers=bearer(keys["admin"]))
        other = json.loads(json.dumps(body).replace(owned["file_id"], absent(owned["file_id"])))
        if "model" in other and other["model"] != "tiny":
            other["model"] = absent(other["model"])
        if "models" in other:
            other["models"] = [absent(name) for name in other["models"]]
        nobody = http.post(path, json=other, headers=bearer(keys["admin"]))
        assert told.status_code == nobody.status_code in (400, 404)
        assert told.json()["error"]["code"] == nobody.json()["error"]["code"]


def test_names_and_ids_are_no_paths(server: ServiceServer, http: httpx.Client, owned: dict[str, str]) -> None:
    before = kept_files(server)
    climbs = ("..", "../..", "..%2f..%2fservice.sqlite", "%2e%2e%2fservice.sqlite", "/etc/passwd", "..\\service.sqlite",
              "service.sqlite%00", "a" * 5000, "%0d%0aX-Set: 1", "file-x\n")  # fmt: skip
    for climb in climbs:
        for path in ("/v1/files/{}", "/v1/files/{}/content", "/v1/models/{}", "/v1/fine_tuning/jobs/{}",
                     "/v1/fine_tuning/jobs/{}/recipe", "/v1/artifacts/{}", "/v1/artifacts/{}/content"):  # fmt: skip
            try:
                told = http.get(path.format(climb))
            except httpx.InvalidURL:
                continue
            if told.status_code == 303:  # the client has made it a path of the pages
                assert told.headers["location"].startswith("/login"), (path, climb)
                continue
            assert told.status_code in (400, 404, 405), (path, climb, told.text)
            assert "SQLite format" not in told.text
            assert "x-set" not in told.headers
    names = ("../x", "a/b", "a\\b", "..", ".", "", "a\r\nX-Set: 1", 'a"; filename="b', "a\x00b", "a\u202eb", "x" * 256)
    for name in names:
        body = {"filename": name, "purpose": "fine-tune", "bytes": 1, "mime_type": "text/plain"}
        assert http.post("/v1/uploads", json=body).status_code == 400, name
        suffix = {"model": "tiny", "training_file": owned["file_id"], "suffix": name}
        assert http.post("/v1/fine_tuning/jobs", json=suffix).status_code == 400, name
        part = f'Content-Disposition: form-data; name="file"; filename="{name}"\r\n\r\nrow\r\n--b--\r\n'
        form = f'--b\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nfine-tune\r\n--b\r\n{part}'
        told = http.post(
            "/v1/files", content=form.encode(), headers={"Content-Type": "multipart/form-data; boundary=b"}
        )
        assert told.status_code == 400 or "/" not in told.json()["filename"], name
        if told.status_code == 200:  # a parser has cut the name: what is kept is harmless
            content = http.get(f"/v1/files/{told.json()['id']}/content")
            assert "x-set" not in content.headers
            http.delete(f"/v1/files/{told.json()['id']}")
    words = {"../../x": "../../../etc/passwd\r\nX-Set: 1"}
    body = {"model": "tiny", "training_file": owned["file_id"], "metadata": words}
    made = http.post("/v1/fine_tuning/jobs", json=body)
    assert made.json()["metadata"] == words, "words, and no more"
    wait_until(lambda: http.get(f"/v1/fine_tuning/jobs/{made.json()['id']}").json()["status"] == "succeeded")
    assert http.delete(f"/v1/fine_tuning/jobs/{made.json()['id']}").status_code == 200
    strange = http.post("/v1/files", data={"purpose": "fine-tune"}, files={"file": ("ünï; x='1'.jsonl", b"{}")}).json()
    shown = http.get(f"/v1/files/{strange['id']}/content").headers["content-disposition"]
    assert shown == "attachment; filename*=utf-8''%C3%BCn%C3%AF%3B%20x%3D%271%27.jsonl"
    http.delete(f"/v1/files/{strange['id']}")
    time.sleep(0.1)
    assert kept_files(server) == before


def kept_files(server: ServiceServer) -> set[Path]:
    """Files of the data folder and beside it, but for the database's own."""
    files = {path for path in server.data.parent.rglob("*") if path.is_file()}
    return {path for path in files if not path.name.startswith("service.sqlite")}


BOMBS: dict[str, tuple[bytes, str]] = {
    "deep lists": (b'{"messages": ' + b"[" * 200_000 + b"]" * 200_000 + b"}", "nested too deeply|not valid JSON"),
    "deep objects": (b'{"messages": ' + b'{"a":' * 100_000 + b"1" + b"}" * 100_000 + b"}", "nested too deeply"),
    "a number of many digits": (b'{"messages": ' + b"9" * 400_000 + b"}", "not valid JSON"),
    "an archive": (gzip.compress(b"x" * 100_000_000), "not valid JSON"),
    "NUL": (b"\0" * 400_000, "not valid JSON"),
    "UTF-16": ('{"messages": []}'.encode("utf-16"), "not valid JSON"),
    "half a character": (b'{"messages": "\xf0\x9f"}', "not valid JSON"),
}


@pytest.mark.parametrize("name", BOMBS)
def test_rows_that_are_bombs(name: str, tmp_path: Path) -> None:
    content, message = BOMBS[name]
    file = tmp_path / "rows.jsonl"
    file.write_bytes(content)
    began = time.monotonic()
    with pytest.raises(DataError, match=rf"training_file, line 1: is ({message})"):
        scan_rows(file, "supervised", name="training_file", line_bytes=1 << 20)
    assert time.monotonic() - began < 5


def test_a_line_of_a_gigabyte_is_not_read(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    with file.open("wb") as sparse:
        sparse.write(b'{"messages": "')
        sparse.truncate(1 << 30)
    tracemalloc.start()
    with pytest.raises(DataError, match="line 1: is longer than 1,048,576 bytes"):
        scan_rows(file, "supervised", name="training_file", line_bytes=1 << 20)
    assert tracemalloc.get_traced_memory()[1] < 8 << 20
    tracemalloc.stop()


def test_bodies_that_are_bombs(http: httpx.Client, owned: dict[str, str]) -> None:
    packed = gzip.compress(b"{" + b" " * 50_000_000)
    for path in ("/v1/files", "/v1/fine_tuning/jobs", "/v1/chat/completions"):
        told = http.post(path, content=packed, headers={"Content-Encoding": "gzip", "Content-Type": "application/json"})
        assert (told.status_code, told.json()["error"]["code"]) == (415, "unsupported_encoding")
    for body in (b"[" * 100_000, b'{"model": ' * 20_000, b'{"seed": ' + b"9" * 100_000 + b"}", b"\xff\xfe{}", b'"' * 9):
        told = http.post("/v1/fine_tuning/jobs", content=body, headers={"Content-Type": "application/json"})
        assert told.status_code == 400, body[:20]
    for value in (1e308, -1e308, 10**400, "9" * 5000):
        body = {"model": "tiny", "training_file": owned["file_id"], "seed": value}
        assert http.post("/v1/fine_tuning/jobs", json=body).status_code == 400
    fields = {f"f{number}": "x" for number in range(1200)}
    told = http.post("/v1/files", data=fields, files={"file": ("a", b"x")})
    assert told.status_code == 400
    assert (
        http.post("/v1/files", data={"purpose": "fine-tune"}, files={"file": ("a", b"x" * 300_000)}).status_code == 413
    )
    for content in (b"x" * 5_000_000, (b"x" * 100_000 for _ in range(200))):  # announced, and not
        told = http.post("/v1/fine_tuning/jobs", content=content)
        assert (told.status_code, told.json()["error"]["code"]) == (413, "request_too_large"), "and the answer is read"


def test_who_sends_slowly_holds_nobody_up(
    server: ServiceServer, http: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_guard, "PATIENCE", 1)
    head = (
        f"POST /v1/files HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer {ADMIN_KEY}\r\n"
        "Content-Type: multipart/form-data; boundary=b\r\nContent-Length: 100000\r\n\r\n--b\r\n"
        'Content-Disposition: form-data; name="file"; filename="a"\r\n\r\n'
    )
    slow = [socket.create_connection(("127.0.0.1", server.port), timeout=60) for _ in range(200)]
    try:
        for sent in slow:
            sent.sendall(head.encode())
        assert http.get("/v1/fine_tuning/jobs").status_code == 200
        assert not select.select(slow, [], [], 0)[0], "answered while all of them are waited for"
        dripping = slow[0]  # a byte now and then is no upload either
        while not select.select([dripping], [], [], 0.1)[0]:
            dripping.sendall(b"x")
        for sent in slow:
            assert sent.recv(12).split()[1] == b"408"
    finally:
        for sent in slow:
            sent.close()


def test_keys_are_looked_up_by_their_hash(server: ServiceServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is compared with the key itself: the time of a refusal can tell of a hash alone, which helps nobody."""
    asked: list[str] = []
    compared: list[tuple[Any, Any]] = []
    real = hmac.compare_digest

    def record(connection: Any, cursor: Any, statement: str, parameters: Any, *rest: Any) -> None:
        asked.append(repr(parameters))

    def compare(first: Any, second: Any) -> bool:
        compared.append((first, second))
        return real(first, second)

    monkeypatch.setattr(hmac, "compare_digest", compare)
    event.listen(server.database.engine, "before_cursor_execute", record)
    try:
        find_caller(server.database, f"Bearer {ADMIN_KEY}", "req")
        for wrong in (
            ADMIN_KEY[:-1],
            ADMIN_KEY + "x",
            ADMIN_KEY[::-1],
            ADMIN_KEY.upper(),
            "\0",
            "é" * 40,
            "%",
            "' OR 1",
        ):
            with pytest.raises(ApiError):
                find_caller(server.database, f"Bearer {wrong}", "req")
    finally:
        event.remove(server.database.engine, "before_cursor_execute", record)
    assert len(compared) == 1, "only what was found by its whole hash is compared, in constant time"
    assert len(compared[0][0]) == 64
    assert len(asked) >= 9
    assert not any(ADMIN_KEY[:8] in parameters for parameters in asked)


def test_headers_are_not_echoed(server: ServiceServer, http: httpx.Client) -> None:
    told = http.get("/v1/models", headers={"X-Request-Id": "mine", "Idempotency-Key": "x" * 300, "Origin": "https://x"})
    assert told.headers["x-request-id"].startswith("req_")
    assert "access-control-allow-origin" not in told.headers
    assert told.headers["x-content-type-options"] == "nosniff"
    made = http.post("/v1/files", data={"purpose": "fine-tune"}, files={"file": ("a", b"{}")},
                     headers={"Idempotency-Key": ""})  # fmt: skip
    assert made.status_code == 400
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as sent:
        sent.sendall(b"GET /v1/models HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer x\x01y\r\n\r\n")
        assert sent.recv(12).split()[1] in (b"400", b"401")


def test_secrets_are_nowhere(server: ServiceServer, http: httpx.Client, keys: dict[str, str]) -> None:
    lines: list[str] = []

    class Kept(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(JsonLines().format(record))

    logger, handler = logging.getLogger("distft.service"), Kept()
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    try:
        secret = http.post("/v1/webhooks", json={"url": "https://example.com/y"}).json()["secret"]
        file_id = http.post("/v1/files", data={"purpose": "fine-tune"}, files={"file": ("r", jsonl(CHAT))}).json()["id"]
        made = http.post("/v1/fine_tuning/jobs", json={"model": "tiny", "training_file": file_id}).json()["id"]
        wait_until(lambda: http.get(f"/v1/fine_tuning/jobs/{made}").json()["status"] == "succeeded")
        http.get("/v1/models", headers=bearer("sk-distft-a-wrong-key"))
        http.get("/v1/models", params={"api_key": keys["member"]})
        http.get("/v1/nothing", headers=bearer(keys["member"]))
        paths = [f"/v1/fine_tuning/jobs/{made}/events", f"/v1/fine_tuning/jobs/{made}/recipe", "/openapi.json"]
        paths += [f"/v1/organization/projects/{keys['project']}/api_keys", "/v1/webhooks", "/v1/audit?limit=1000"]
        told = [http.get(path).text for path in (*paths, "/metrics")]
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
    assert len(lines) > 10
    secrets = (ADMIN_KEY, keys["viewer"], keys["member"], keys["admin"], "sk-distft-a-wrong-key")
    for word in (*secrets, secret):
        assert not any(word in line for line in (*lines, *told)), word
    for path in server.data.rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            assert not any(word.encode() in content for word in secrets), path


def test_an_openai_client_sees_the_refusal_of_its_own_class(server: ServiceServer, keys: dict[str, str]) -> None:
    with server.client(keys["viewer"]) as client, pytest.raises(openai.PermissionDeniedError):
        client.files.create(file=("r.jsonl", jsonl(CHAT)), purpose="fine-tune")
