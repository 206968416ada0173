"""`distft export --push`: a private repository, a commit message, a start that goes on, and what is said offline."""

import base64
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import export_kit as kit
import huggingface_hub.constants
import pytest

from distft.export_formats.command import main


class Hub:
    """What huggingface_hub asks of the hub to make a repository and to commit to it."""

    def __init__(self) -> None:
        self.private: bool | None = None
        self.files: dict[str, bytes] = {}
        self.messages: list[str] = []
        self.fails = 0
        """Commits that are refused first."""
        self.forbidden = False
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                siblings = [{"rfilename": name} for name in hub.files]
                self.send({"id": "me/model", "sha": "c" * 40, "private": hub.private, "siblings": siblings})

            def do_POST(self) -> None:
                raw = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                if hub.forbidden and not self.path.endswith("/repos/create"):
                    self.send({"error": "no"}, 403)
                elif self.path.endswith("/repos/create"):
                    if hub.private is not None:
                        return self.send({"error": "exists", "url": f"{hub.url}/me/model"}, 409)
                    asked = json.loads(raw)
                    hub.private = asked.get("private", asked.get("visibility") == "private")
                    self.send({"url": f"{hub.url}/me/model", "name": "me/model"})
                elif self.path.endswith("/validate-yaml"):
                    self.send({"errors": [], "warnings": []})
                elif "/preupload/" in self.path:
                    files = [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False, "oid": None}
                             for file in json.loads(raw)["files"]]  # fmt: skip
                    self.send({"files": files})
                elif "/commit/" in self.path:
                    if hub.fails:
                        hub.fails -= 1
                        return self.send({"error": "try later"}, 413)
                    for line in map(json.loads, raw.splitlines()):
                        if line["key"] == "header":
                            hub.messages.append(line["value"]["summary"])
                        else:
                            hub.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
                    self.send({"commitUrl": f"{hub.url}/me/model/commit/1", "commitOid": "1", "success": True})
                else:
                    self.send({"error": self.path}, 404)

            def send(self, content: Any, status: int = 200) -> None:
                data = json.dumps(content).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, format: str, *args: object) -> None:
                """Quiet."""

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    made = Hub()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.utils._http.is_offline_mode", lambda: False, raising=False)
    monkeypatch.setattr("huggingface_hub.hf_api.HfApi.__init__", _with_endpoint(made.url))
    yield made
    made.server.shutdown()
    made.server.server_close()


def _with_endpoint(url: str) -> Any:
    from huggingface_hub import HfApi

    first = HfApi.__init__
    return lambda self, *given, **named: first(self, endpoint=url, token="hf_stand_in")


def command(tmp_path: Path, *words: str) -> list[str]:
    model = tmp_path / "model"
    if not model.exists():
        kit.save_model(model)
    return [str(model), "--out", str(tmp_path / "out"), "--as", "safetensors", "--num-rows", "2", *words]


def test_it_is_pushed_as_it_lies_there(hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hub.fails = 20
    words = command(tmp_path, "--push", "me/model", "--message", "The first one")
    assert main(words) == 9
    message = capsys.readouterr().err
    assert "is whole, and was not pushed to me/model: the hub answered 413" in message
    assert "run the same command again: it goes on" in message
    out = tmp_path / "out"
    made = (out / "certificate.json").stat().st_mtime_ns
    hub.fails = 0
    assert main([*words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["pushed"].endswith("/commit/1")
    assert (out / "certificate.json").stat().st_mtime_ns == made, "it is not exported twice"
    assert hub.private is True
    assert hub.messages == ["The first one"]
    assert hub.files == {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*") if path.is_file()}


def test_what_is_refused(hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def said(code: int, *words: str) -> str:
        assert main(command(tmp_path, *words)) == code
        return capsys.readouterr().err

    assert "--push model  is no name of a repository  owner/name" in said(2, "--push", "model")
    assert "--message and --public: are for --push" in said(2, "--message", "x")
    assert not (tmp_path / "out").exists()
    hub.private = False
    assert "the repository is public, and everybody would read the model" in said(2, "--push", "me/model")
    assert hub.files == {}
    assert main(command(tmp_path, "--push", "me/model", "--public")) == 0
    assert hub.messages == ["safetensors of model"]
    hub.forbidden = True
    assert "the hub does not let this user write there (403)  fix: hf auth login" in said(
        9, "--push", "me/model", "--public"
    )
    (tmp_path / "out" / "config.json").write_text("{}")
    assert "config.json is not what was compared" in said(2, "--push", "me/model")
    assert "holds another export" in said(2, "--push", "me/model", "--rows", "x.jsonl")


def test_without_a_network(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.utils._http.is_offline_mode", lambda: False, raising=False)
    monkeypatch.setattr("huggingface_hub.hf_api.HfApi.__init__", _with_endpoint("http://127.0.0.1:9"))
    assert main(command(tmp_path, "--push", "me/model")) == 9
    message = capsys.readouterr().err
    assert "the hub cannot be reached" in message
    assert "Traceback" not in message
    assert (tmp_path / "out" / "certificate.json").is_file(), "the export is kept"
