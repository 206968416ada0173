"""Every page of the router, attacked with a session: no request ends in a 5xx, and no text comes back as markup."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

import pytest
import requests
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from page_client import PageClient
from pydantic import BaseModel
from service_server import ADMIN_KEY, CHAT, ServiceServer, jsonl, serving, wait_until

from distft.service.drafts import EMPTY
from distft.service.pages.door import PageDoor

PROBES = (
    "<svg onload=probe(1)>",
    "<script>probe(1)</script>",
    '"><img src=x onerror=probe(1)>',
    "'><svg/onload=probe(1)>",
    "{{7*'7'}}",
)
"""Texts that must never come back as they are; the last would be computed by a template."""
ODD: tuple[bytes, ...] = (
    b"", b" ", b"auto", b"0", b"-1", b"7", b"1e999", b"nan", b"9" * 30, b"2147483648", b"99999999999999999999",
    b"\x00", b"a\x00b", b"\xff\xfe", b"\xed\xa0\x80", "\u202e\ufeff𝕏".encode(), b"\r\nx-evil: 1", b"../../etc/passwd",
    b"none", b"file-none", b"[]", b"{}", b'{"type": "multi"}', b'{"a": ' * 3000, b"[" * 5000, b"name = [", b"x" * 400,
    *(probe.encode() for probe in PROBES),
)  # fmt: skip
HUGE = b"h" * 70_000
_KINDS = ("form", "multipart", "json", "nothing", "broken")


@dataclass(frozen=True, kw_only=True)
class PageRoute:
    """A route of a page: what it takes."""

    method: str
    path: str
    queries: tuple[str, ...]
    fields: tuple[str, ...]


def names(parameters: Any) -> tuple[str, ...]:
    """Of parameters, those of a model one by one."""
    found: list[str] = []
    for parameter in parameters:
        kind = parameter.field_info.annotation
        found += kind.model_fields if isinstance(kind, type) and issubclass(kind, BaseModel) else [parameter.alias]
    return tuple(found)


def page_routes(app: Any) -> list[PageRoute]:
    door = PageDoor(None)  # type: ignore[arg-type]
    return [
        PageRoute(
            method=method, path=context.path, queries=names(context.dependant.query_params),
            fields=names(context.dependant.body_params),
        )
        for context in flat(app.routes)
        if door.owns(context.path)
        for method in sorted(context.methods - {"HEAD"})
    ]  # fmt: skip


def flat(routes: Any) -> Iterator[Any]:
    """Routes, also those of routers that were included."""
    for route in routes:
        if hasattr(route, "original_router"):
            yield from flat(route.original_router.routes)
        elif hasattr(route, "dependant"):
            yield route


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServiceServer]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DISTFT_API_KEY", ADMIN_KEY)
        with serving(tmp_path_factory.mktemp("fuzz"), file_mib=0.2, slowest_upload_s=5.0) as running:
            parts = running.app.state.parts

            def answer(request: dict[str, Any]) -> Iterator[dict[str, Any]]:
                text = PROBES[0]
                yield {"event": "piece", "index": 0, "text": text, "prompt_tokens": 3}
                yield {"event": "end", "index": 0, "text": text, "finish_reason": "stop", "logprobs": None,
                       "num_tokens": 2}  # fmt: skip

            patch.setattr(parts.answers, "answer", answer)
            patch.setattr(parts.drafts, "preview", lambda *_: EMPTY | {"done": True})  # which would start processes
            yield running


@pytest.fixture(scope="module")
def known(server: ServiceServer) -> dict[str, list[str]]:
    """Ids that are there, by what routes call them."""
    visitor = PageClient(server.root)
    with server.client() as client:
        file_id = client.files.create(file=(f"{PROBES[0]}.jsonl", jsonl(CHAT)), purpose="fine-tune").id
        job, other = (client.fine_tuning.jobs.create(model="tiny", training_file=file_id) for _ in range(2))
        for made in (job, other):
            wait_until(lambda made=made: client.fine_tuning.jobs.retrieve(made.id).status == "succeeded")
        model = client.fine_tuning.jobs.retrieve(job.id).fine_tuned_model or ""
        body = {"kind": "export", "models": [model], "format": "safetensors"}
        artifact = client.post("/artifacts", body=body, cast_to=dict)["id"]
        wait_until(lambda: client.get(f"/artifacts/{artifact}", cast_to=dict)["status"] == "succeeded")
    draft = visitor.post("/new", {"file_id": file_id}).headers["location"].removeprefix("/new/")
    return {
        "job_id": [job.id], "draft_id": [draft], "file_id": [file_id], "model": [model, "tiny"], "a": [model, "tiny"],
        "b": [model], "checkpoint": [f"{model}:ckpt-step-2"], "job": [job.id, other.id],
        "verb": ["pause", "resume", "cancel"], "artifact_id": [artifact], "kind": ["export", "merge", "combine"],
        "format": ["gguf/Q8_0", "safetensors"], "how": ["ties", "cat"], "others": [f"{model}:ckpt-step-2", model],
        "setting_names": ["density"], "settings": ["0.5"], "other_weights": ["1"], "weight": ["0.5"],
        "which": ["training", "validation", "recipe", "start"], "method": ["supervised", "dpo", "reinforcement"],
        "grader": ["json", "string_check", "text_similarity"], "name": ["htmx.min.js", "room.css"],
        "role": ["viewer", "member", "admin"], "events": ["fine_tuning.job.succeeded"], "url": ["https://example.org/"],
    }  # fmt: skip


@st.composite
def values(draw: st.DrawFn, name: str, known: dict[str, list[str]]) -> bytes:
    right = [value.encode() for value in known.get(name, ())]
    text = st.text(max_size=40).map(lambda made: made.encode("utf-8", "surrogatepass"))
    return draw(st.one_of(st.sampled_from([*right, *right, *ODD] or ODD), text, st.binary(max_size=20)))


def place_of(draw: st.DrawFn, route: PageRoute, known: dict[str, list[str]]) -> str:
    """A path of the route, its parts the right ones or odd ones."""

    def part(found: re.Match[str]) -> str:
        value = draw(values(found[1], known)) if draw(st.booleans()) else known.get(found[1], ["x"])[0].encode()
        return quote(value[:300] or b"x", safe="")

    return re.sub(r"\{(\w+)(?::\w+)?\}", part, route.path)


def pairs_of(
    draw: st.DrawFn, wanted: tuple[str, ...], known: dict[str, list[str]], *, huge: bool
) -> list[tuple[bytes, bytes]]:
    """Fields: some missing, some twice, some that nobody knows."""
    there = [name for name in wanted if draw(st.integers(0, 9)) > 1]
    there += draw(st.lists(st.sampled_from([*wanted, "nobody"]), max_size=2))
    made = [(name.encode(), draw(values(name, known))) for name in there]
    if huge and made and draw(st.integers(0, 19)) == 0:
        made[0] = (made[0][0], HUGE)
    return made


def body_of(draw: st.DrawFn, fields: list[tuple[bytes, bytes]]) -> tuple[bytes, str]:
    """The fields in one of the forms that browsers and attackers send, with its content type."""
    match draw(st.sampled_from(_KINDS)):
        case "multipart":
            parts = []
            for name, value in fields:
                file = b'; filename="\xff<script>.jsonl"' if draw(st.integers(0, 5)) == 0 or name == b"file" else b""
                head = b'--edge\r\nContent-Disposition: form-data; name="' + name + b'"' + file
                parts.append(head + b"\r\n\r\n" + value + b"\r\n")
            return b"".join(parts) + b"--edge--\r\n", "multipart/form-data; boundary=edge"
        case "json":
            return b'{"csrf": 1, "model": ["x"]}', "application/json"
        case "nothing":
            return b"", "application/x-www-form-urlencoded"
        case "broken":
            return b"--edge\r\nContent-Disp", draw(
                st.sampled_from(["multipart/form-data", "multipart/form-data; boundary=edge", "text/plain", "\u00fc/x"])
            )
        case _:
            return urlencode(fields).encode(), "application/x-www-form-urlencoded"


def assert_harmless(answer: Any, route: PageRoute, sent: Any) -> None:
    assert answer.status_code < 500, (route.method, route.path, sent, answer.text[:2000])
    kind = answer.headers.get("content-type", "")
    if kind.startswith("text/html"):
        for probe in PROBES[:-1]:
            assert probe not in answer.text, (route.path, sent, probe)
        assert "7777777" not in answer.text, (route.path, sent)
        assert "x-evil" not in answer.headers, (route.path, sent)


class Attacker:
    """A visitor who is signed in, and signs in again where a request has ended the session."""

    def __init__(self, server: ServiceServer, *, makes_reports: bool) -> None:
        self._server, self._makes_reports = server, makes_reports
        self._sign_in()

    def _sign_in(self) -> None:
        self.visitor = PageClient(self._server.root)
        self._token = self.visitor.token()

    def attack(self, data: st.DataObject, route: PageRoute, known: dict[str, list[str]]) -> None:
        draw: Any = data.draw
        path = place_of(draw, route, known)
        queries = pairs_of(draw, route.queries, known, huge=False) if draw(st.booleans()) else []
        query = f"?{urlencode(queries)}" if queries else ""
        if route.method == "GET":
            if not self._makes_reports and (path.endswith("/report") or path == "/compare"):
                return  # they start processes
            try:
                answer = self.visitor.get(path + query)
            except requests.ConnectionError as error:  # the server has failed and hung up
                raise AssertionError((route, path, query)) from error
            assert_harmless(answer, route, (path, query))
            if answer.headers.get("location", "").startswith("/login"):
                self._sign_in()
            return
        signed = draw(st.sampled_from(["field", "header", "none", "wrong", "twice"]))
        fields = pairs_of(draw, route.fields, known, huge=True)
        token = {"field": self._token, "wrong": "0" * 64, "twice": self._token}.get(signed)
        fields += [(b"csrf", token.encode())] if token is not None else []
        fields += [(b"csrf", b"0" * 64)] if signed == "twice" else []
        body, kind = body_of(draw, fields)
        headers = {"Origin": self._server.root, "Content-Type": kind.encode().decode("latin-1")}
        headers |= {"x-csrf-token": self._token} if signed == "header" else {}
        answer = self.visitor.http.request(
            route.method, self._server.root + path + query, data=body, headers=headers, allow_redirects=False,
            timeout=60,
        )  # fmt: skip
        assert_harmless(answer, route, (path, query, signed, kind, body[:1500]))
        if signed in ("none", "wrong") and route.path != "/login":
            assert 400 <= answer.status_code < 500, (route.path, signed, answer.status_code, body[:500])
        if answer.headers.get("location", "").startswith("/login"):
            self._sign_in()


def test_every_page_is_among_those_that_are_attacked(server: ServiceServer) -> None:
    routes = page_routes(server.app)
    assert len(routes) > 40
    assert {"/", "/login", "/logout", "/jobs/{job_id}/{verb}", "/new/{draft_id}/model", "/playground/answer"} <= {
        route.path for route in routes
    }
    model = next(route for route in routes if route.path == "/new/{draft_id}/model" and route.method == "POST")
    assert {"model", "grader_json", "n_epochs"} <= set(model.fields)


def attack_all(
    server: ServiceServer, known: dict[str, list[str]], examples: int, routes: list[PageRoute], *, makes_reports: bool
) -> None:
    attacker = Attacker(server, makes_reports=makes_reports)

    @settings(
        max_examples=examples, deadline=None, database=None, derandomize=True, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck), report_multiple_bugs=False,
    )  # fmt: skip
    @given(data=st.data())
    def attack(data: st.DataObject) -> None:
        attacker.attack(data, data.draw(st.sampled_from(routes)), known)

    attack()


def test_odd_requests_to_pages_do_no_harm(server: ServiceServer, known: dict[str, list[str]]) -> None:
    attack_all(server, known, 30, page_routes(server.app), makes_reports=False)


@pytest.mark.slow
def test_many_odd_requests_to_each_page_do_no_harm(server: ServiceServer, known: dict[str, list[str]]) -> None:
    for route in page_routes(server.app):
        attack_all(server, known, int(os.environ.get("DISTFT_FUZZ", "25")), [route], makes_reports=True)


@pytest.mark.slow
def test_what_was_planted_is_shown_as_text(server: ServiceServer, known: dict[str, list[str]], tmp_path: Path) -> None:
    """Texts that are kept (names of files, drafts, keys, hooks) come back on every page that shows them, escaped."""
    visitor = PageClient(server.root)
    for probe in PROBES[:-1]:
        visitor.post("/keys", {"project_id": project_of(visitor), "name": probe, "role": "viewer"})
        visitor.post("/files", files={"file": (f"{probe}.jsonl", b"{}")})
        visitor.post("/webhooks", {"url": f"https://example.org/{probe}", "events": "fine_tuning.job.failed"})
    seen = ""
    for route in page_routes(server.app):
        if route.method != "GET":
            continue
        path = re.sub(r"\{(\w+)\}", lambda found: known[found[1]][0], route.path)
        answer = visitor.get(path)
        assert_harmless(answer, route, "planted")
        seen += answer.text
    compared = visitor.get(f"/compare?{urlencode([('job', job) for job in known['job']])}")
    assert_harmless(compared, route, "compared")
    assert compared.status_code == 200
    assert all(job in compared.text for job in known["job"])
    assert "&lt;svg onload=probe(1)&gt;" in seen


def project_of(visitor: PageClient) -> str:
    found = re.search(r'name="project_id" value="(proj_\w+)"', visitor.text("/keys"))
    assert found is not None
    return found[1]
