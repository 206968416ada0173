"""The judge against a stand-in endpoint on this machine: marks, patience, its cache, and a key that is never shown."""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from score_kit import answer

from distft.core.errors import MachineError
from distft.scores import judge
from distft.scores.endpoint import Endpoint
from distft.scores.judge import JudgeParams

KEY = "sk-test-1234567890abcdef"


def completion(text: Any) -> bytes:
    return json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}]}).encode()


class StandIn(ThreadingHTTPServer):
    """Answers as `replies` says: (question, how often it was asked before) -> (status, body, headers)."""

    daemon_threads = True

    def __init__(self, replies: Callable[[str, int], tuple[int, bytes, dict[str, str]]]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.replies = replies
        self.asked: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"


class Handler(BaseHTTPRequestHandler):
    server: StandIn

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        question = body["messages"][0]["content"]
        with self.server.lock:
            before = sum(old["messages"][0]["content"] == question for old in self.server.asked)
            self.server.asked.append({"path": self.path, **body})
            self.server.headers.append(dict(self.headers))
        status, reply, headers = self.server.replies(question, before)
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(reply))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(reply)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., StandIn]]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    running: list[StandIn] = []

    def start(replies: Callable[[str, int], Any]) -> StandIn:
        def full(question: str, before: int) -> tuple[int, bytes, dict[str, str]]:
            reply = replies(question, before)
            return reply if isinstance(reply, tuple) else (200, reply, {})

        server = StandIn(full)
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        running.append(server)
        return server

    yield start
    for server in running:
        server.shutdown()
        server.server_close()


def scored(server: StandIn, texts: list[str], *, waits: list[float] | None = None, cache: Path | None = None, **more):
    params = JudgeParams(url=server.url, model="m", prompt="Q {prompt} R {reference} A {answer}", **more)
    endpoint = Endpoint(
        url=params.url,
        model=params.model,
        key=KEY,
        max_tokens=params.max_tokens,
        timeout_s=params.timeout_s,
        retries=params.retries,
        cache=cache,
        sleep=(waits if waits is not None else []).append,
    )
    answers = [answer(text, "right", number) for number, text in enumerate(texts, 1)]
    return judge.judge(params, endpoint)(answers)


def test_asks_at_temperature_zero_with_the_key_and_reads_the_mark(stand_in) -> None:
    server = stand_in(lambda question, _: completion(f"Fine.\nScore: {len(question.split()[-1])}"))
    found = scored(server, ["abc", "abcdefg"])
    assert found.rows["judge"] == (3.0, 7.0)
    assert found.totals == {"judge": 5.0}
    assert {one["path"] for one in server.asked} == {"/v1/chat/completions"}
    assert {one["temperature"] for one in server.asked} == {0}
    assert {one["messages"][0]["content"] for one in server.asked} == {"Q  R right A abc", "Q  R right A abcdefg"}
    assert {one["Authorization"] for one in server.headers} == {f"Bearer {KEY}"}


@pytest.mark.parametrize(
    "bad",
    [
        (429, b"slow down", {"Retry-After": "7"}),
        (500, b"oops", {}),
        (503, b"", {}),
        (200, b"<html>garbage", {}),
        (200, b'{"choices": []}', {}),
        (200, completion(None), {}),
    ],
    ids=["429", "500", "503", "html", "empty", "null"],
)
def test_is_asked_again_after_what_may_pass(stand_in, bad) -> None:
    waits: list[float] = []
    server = stand_in(lambda _, before: bad if before < 2 else completion("Score: 8"))
    assert scored(server, ["x"], waits=waits).rows["judge"] == (8.0,)
    assert len(server.asked) == 3
    assert len(waits) == 2
    if bad[0] == 429:
        assert waits == [7.0, 7.0]
    else:
        assert 0.75 <= waits[0] <= 1.25
        assert 1.5 <= waits[1] <= 2.5


def test_rows_without_a_mark_stay_unscored_and_are_named(stand_in) -> None:
    replies = {"silly": "I like it.", "high": "Score: 11", "fine": "Score: 9"}
    server = stand_in(lambda question, _: completion(replies[question.split()[-1]]))
    found = scored(server, ["fine", "silly", "high"], max_unscored=0.7)
    assert found.rows["judge"][0] == found.totals["judge"] == 9.0
    assert all(math.isnan(value) for value in found.rows["judge"][1:])
    assert found.unscored == {
        "valid.jsonl row 2": "no mark in its answer: 'I like it.'",
        "valid.jsonl row 3": "mark 11 is not between 1 and 10",
    }
    with pytest.raises(MachineError, match=r"gave no mark for 2 of 3 answers .*row 2: no mark"):
        scored(server, ["fine", "silly", "high"])


def test_a_judge_that_stays_broken_fails_the_score(stand_in) -> None:
    server = stand_in(lambda *_: (500, f"internal, key {KEY}".encode(), {}))
    with pytest.raises(MachineError, match=r"no mark for 1 of 1 answers.*3 tries, the last: HTTP 500") as failed:
        scored(server, ["x"], retries=2)
    assert len(server.asked) == 3
    assert KEY not in str(failed.value)


@pytest.mark.parametrize(("code", "hint"), [(401, "api_key_env"), (404, "with its version"), (400, ""), (302, "final")])
def test_what_cannot_pass_is_told_at_once_and_without_the_key(stand_in, code: int, hint: str) -> None:
    elsewhere = stand_in(lambda *_: completion("Score: 1"))
    headers = {"Location": f"{elsewhere.url}/chat/completions"}
    server = stand_in(lambda *_: (code, f"refused: Bearer {KEY}".encode(), headers))
    with pytest.raises(MachineError, match=f"HTTP {code}.*{hint}") as failed:
        scored(server, ["x"] * 40, concurrency=1)
    assert KEY not in str(failed.value)
    assert "***" in str(failed.value)
    assert len(server.asked) < 5  # the rest was never sent
    assert not elsewhere.asked  # nor was the key, to where a redirect pointed


def test_nobody_there(stand_in) -> None:
    server = stand_in(lambda *_: completion("Score: 1"))
    server.shutdown()
    server.server_close()
    with pytest.raises(MachineError, match=r"2 tries, the last: .*refused"):
        scored(server, ["x"], retries=1)


def test_too_slow(stand_in) -> None:
    gate = threading.Event()
    server = stand_in(lambda *_: (gate.wait(5), completion("Score: 1"))[1])
    with pytest.raises(MachineError, match="1 tries, the last: TimeoutError"):
        scored(server, ["x"], retries=0, timeout_s=0.05)
    gate.set()


def test_answers_are_kept_by_hash_and_hold_no_key(stand_in, tmp_path: Path) -> None:
    server = stand_in(lambda *_: completion("Score: 4"))
    for _ in range(2):
        assert scored(server, ["one", "two"], cache=tmp_path).rows["judge"] == (4.0, 4.0)
    assert len(server.asked) == 2
    assert scored(server, ["one"], cache=tmp_path, max_tokens=9).totals["judge"] == 4  # another question
    assert len(server.asked) == 3
    notes = [path.read_text() for path in tmp_path.iterdir()]
    assert len(notes) == 3
    assert not any(KEY in note for note in notes)
    for path in tmp_path.iterdir():
        path.write_text("{torn")
    scored(server, ["one"], cache=tmp_path)
    assert len(server.asked) == 4


def test_the_key_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    params = JudgeParams(url="http://127.0.0.1:9/v1", model="m", api_key_env="JUDGE_KEY")
    monkeypatch.delenv("JUDGE_KEY", raising=False)
    with pytest.raises(MachineError, match="environment variable JUDGE_KEY, which is not set"):
        judge.build(params)
    monkeypatch.setenv("JUDGE_KEY", KEY)
    assert callable(judge.build(params))
    endpoint = Endpoint(url="u", model="m", key=KEY, max_tokens=1, timeout_s=1, retries=0, cache=None)
    assert KEY not in repr(endpoint)


@pytest.mark.parametrize(
    ("params", "says"),
    [
        ({"url": "ftp://x/v1"}, "url"),
        ({"url": "https://key@host/v1"}, "url"),
        ({"api_key_env": KEY}, "api_key_env"),
        ({"prompt": "Mark {reply}"}, "prompt names {reply}; known: answer"),
        ({"prompt": "Mark it"}, "does not show the {answer}"),
        ({"prompt": "{answer"}, "literal brace"),
        ({"pattern": r"\d"}, "exactly one group"),
        ({"lowest": 5.0, "highest": 5.0}, "is not below"),
    ],
)
def test_refuses_what_cannot_work(params: dict[str, Any], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        JudgeParams(**{"url": "https://host/v1", "model": "m", **params})
