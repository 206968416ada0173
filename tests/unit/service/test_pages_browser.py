"""The control room in a real browser: the newcomer's path, every page on desk and phone, axe-core, the keyboard."""

from __future__ import annotations

import importlib.resources
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import pytest
from service_process import KEY, service
from service_server import ADMIN_KEY, CHAT, ServiceServer, jsonl, serving, wait_until

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
BROWSER = next(filter(None, map(shutil.which, NAMES)), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="needs Chromium (apt-get install chromium)")
DESK = {"viewport": {"width": 1280, "height": 900}, "color_scheme": "light"}
PHONE = {"viewport": {"width": 375, "height": 760}, "color_scheme": "dark"}
SHOTS = os.environ.get("DISTFT_SHOTS")
"""Folder that pictures of the pages are written to."""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as started:
        running = started.chromium.launch(executable_path=BROWSER, args=["--no-sandbox", "--disable-gpu"])
        yield running
        running.close()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServiceServer]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DISTFT_API_KEY", ADMIN_KEY)
        with serving(tmp_path_factory.mktemp("browser")) as running:
            yield running


@contextmanager
def visit(browser: Any, root: str, *, key: str, **context: Any) -> Iterator[Any]:
    """A page that is signed in; fails on anything on its console, and on any request to another host."""
    visited = browser.new_context(**context)
    page = visited.new_page()
    page.set_default_timeout(240_000)
    said: list[str] = []
    asked: list[str] = []
    page.on("console", lambda message: said.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(f"{root}/")
    page.fill("#key", key)
    page.press("#key", "Enter")
    page.wait_for_url("**/jobs")
    yield page
    visited.close()
    assert said == []
    others = [url for url in asked if not url.startswith(f"{root}/") and urlsplit(url).scheme not in ("data", "blob")]
    assert others == []


def shoot(page: Any, name: str) -> None:
    if SHOTS:
        wide = page.viewport_size["width"]
        page.screenshot(path=f"{SHOTS}/{name}-{wide}.png", full_page=True)


def assert_readable(page: Any) -> None:
    """axe-core finds nothing, and nothing sticks out sideways."""
    axe = pytest.importorskip("axe_core_python", reason="axe-core-python is not installed")
    page.evaluate((importlib.resources.files(axe) / "axe.min.js").read_text(encoding="utf-8"))
    found = page.evaluate("axe.run(document)")
    told = [(fault["id"], [node["html"] for node in fault["nodes"]][:3]) for fault in found["violations"]]
    assert told == [], page.url
    assert len(found["passes"]) > 10
    widths = page.evaluate("[document.documentElement.scrollWidth, document.documentElement.clientWidth]")
    assert widths[0] <= widths[1], f"{page.url} is wider than its window"


def trained(server: ServiceServer) -> str:
    server.runner.ends_at_once = True
    with server.client() as client:
        file_id = client.files.create(file=("rows.jsonl", jsonl(CHAT)), purpose="fine-tune").id
        job = client.fine_tuning.jobs.create(model="tiny", training_file=file_id, suffix="mine")
        wait_until(lambda: client.fine_tuning.jobs.retrieve(job.id).status == "succeeded")
        return job.id


def adapters(server: ServiceServer) -> str:
    """The name of one of two adapters; of each something was made, or was not."""
    names: list[str] = []
    with server.client() as client:
        for plan in ("", "refuses"):
            job = trained(server)
            run = server.folder(job).run
            (run / "plan").write_text(plan)
            (run / "final").mkdir()
            (run / "final" / "adapter_config.json").write_text('{"peft_type": "LORA"}')
            names.append(client.fine_tuning.jobs.retrieve(job).fine_tuned_model or "")
            body = {"kind": "export", "models": names[-1:], "format": "gguf", "level": "Q8_0"}
            made = client.post("/artifacts", body=body, cast_to=dict)["id"]
            wait_until(lambda made=made: is_over(client.get(f"/artifacts/{made}", cast_to=dict)))
        made = client.post("/artifacts", body={"kind": "merge", "models": names[:1]}, cast_to=dict)["id"]
        wait_until(lambda: is_over(client.get(f"/artifacts/{made}", cast_to=dict)))
    return names[0]


def is_over(artifact: dict[str, Any]) -> bool:
    return artifact["status"] in ("succeeded", "failed")


def test_a_job_is_seen_and_stopped_in_a_browser(browser: Any, server: ServiceServer) -> None:
    server.runner.ends_at_once = False
    with server.client() as client:
        file_id = client.files.create(file=("rows.jsonl", jsonl(CHAT)), purpose="fine-tune").id
        job = client.fine_tuning.jobs.create(model="tiny", training_file=file_id).id
    wait_until(lambda: job in server.runner.alive)
    with visit(browser, server.root, key=ADMIN_KEY, **PHONE) as page:
        page.click(f"#to-{job}")
        page.wait_for_selector("text=running")
        server.runner.write_steps(server.folder(job), range(1, 4))
        page.wait_for_selector("text=Step 3/4: training loss")  # by itself, without a reload
        page.wait_for_selector("figure svg path")
        assert_readable(page)
        page.on("dialog", lambda dialog: dialog.accept())
        page.click("#cancel")
        page.wait_for_selector("text=cancelled")
    server.runner.ends_at_once = True


@pytest.mark.slow
@pytest.mark.parametrize("context", [DESK, PHONE, {**DESK, "color_scheme": "dark"}], ids=["desk", "phone", "dark"])
def test_every_page_is_readable(browser: Any, server: ServiceServer, context: dict[str, Any]) -> None:
    job, model = trained(server), adapters(server)
    parts = server.app.state.parts
    drafts = type(parts.drafts)
    case = {"gpu": "h100-80gb", "world": 1, "engine": "solo", "parts": {"weights": 2 << 30, "logits": 1 << 30},
            "peak_bytes": 3 << 30, "hours": 0.5, "gpu_bytes": 79 << 30, "tokens_per_s": 1e3, "price": 2.0,
            "cost": 1.0}  # fmt: skip
    sample = {"id": "row 1", "tokens": 9, "trained": 3, "pieces": [["User: 2 + 2?", False], ["4" * 300, True]]}
    split = {"split": "train", "rows": 7, "tokens": 90, "trained": 30, "cut": 1, "dropped": 0, "messages": ["cut"]}
    entry = {"what": "epochs", "value": "3", "says": "Three passes.", "why": "Few rows.", "rule": "r"}
    problem = {"line": 7, "message": "epochz", "fix": "allowed: epochs"}
    told = {
        "done": True, "splits": [{**split, "samples": [sample]}], "care": ["repeats  0"], "notes": ["a note"],
        "num_steps": 12, "parameters": [10, 1000], "values": {"n_epochs": 3}, "changed": ["train.epochs"],
        "recipe": 'name = "x"\n' * 40, "advice": [entry], "plan": {"fits": True, "lines": ["fits"], "case": case},
        "error": {"code": "c", "message": "m", "param": None, "problems": [problem]},
    }  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(drafts, "preview", lambda *_: told)
        with visit(browser, server.root, key=ADMIN_KEY, **context) as page:
            page.goto(f"{server.root}/new")
            page.set_input_files("#file", {"name": "a.jsonl", "mimeType": "text/plain", "buffer": jsonl(CHAT)})
            page.click("text=Upload")
            page.wait_for_url("**/new/draft-*")
            draft = urlsplit(page.url).path
            paths = ["/jobs", f"/jobs/{job}", f"/jobs/{job}/events", f"/jobs/{job}/checkpoints", "/compare", "/new"]
            paths += [draft, f"{draft}/model", f"{draft}/recipe", f"{draft}/start", "/playground", "/files", "/models"]
            paths += ["/artifacts", f"/artifacts/new?model={quote(model)}"]
            paths += ["/keys", "/webhooks", "/audit", "/settings", "/jobs?status=paused"]
            for number, path in enumerate(paths):
                page.goto(server.root + path)
                shoot(page, f"{number:02}-{path.split('/')[1]}")
                assert_readable(page)
            page.goto(f"{server.root}/keys")
            page.fill("[name=name]", "for a colleague")
            page.press("[name=name]", "Enter")
            page.wait_for_selector("#secret")
            assert page.inner_text("#secret").startswith("sk-distft-")
            page.goto(f"{server.root}/keys")
            assert page.query_selector("#secret") is None, "it is shown once"
            page.click("text=Sign out")
            page.wait_for_url("**/login")
            assert_readable(page)


@pytest.mark.slow
def test_the_keyboard_alone_is_enough(browser: Any, server: ServiceServer) -> None:
    job = trained(server)
    with visit(browser, server.root, key=ADMIN_KEY, **DESK) as page:
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.className") == "skip"
        page.keyboard.press("Enter")
        assert page.evaluate("document.activeElement.id") == "main"
        reached: list[str] = []
        for _ in range(60):
            page.keyboard.press("Tab")
            reached.append(page.evaluate("document.activeElement.id"))
            if reached[-1] == f"to-{job}":
                break
            outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
            assert outline != "none", f"the focus is not seen on {page.evaluate('document.activeElement.outerHTML')}"
        assert reached[-1] == f"to-{job}"
        page.wait_for_timeout(2500)
        assert page.evaluate("document.activeElement.id") == f"to-{job}", "a look at the queue takes no focus away"
        page.keyboard.press("Enter")
        page.wait_for_url(f"**/jobs/{job}")


@pytest.mark.slow
@pytest.mark.parametrize("context", [DESK, PHONE], ids=["desk", "phone"])
def test_the_newcomers_path(browser: Any, tmp_path: Path, context: dict[str, Any]) -> None:
    """Drop data, see the plan, run, look, read the report, ask the model: a real job of the tiny model."""
    models = tmp_path / "models.toml"
    models.write_text(
        '[models.tiny]\npath = "demo:tiny-llama"\nchat_template = "plain"\nmethods = ["supervised"]\n'
        'gpu = "h100-80gb"\nprice = 2.5\n[models.tiny.recipe]\nmodel = { init = "random", dtype = "float32" }\n'
        'method = { name = "full" }\noptim = { learning_rate = 3e-3 }\n'
    )
    rows = tmp_path / "rows.jsonl"
    rows.write_bytes(jsonl(*(sum_of(a, b) for a in range(1, 7) for b in range(1, 7))))
    with service(tmp_path / "data", "--models", str(models)) as running:
        with visit(browser, running.url, key=KEY, **context) as page:
            page.click("text=New job >> nth=0")
            page.wait_for_selector(".drop")
            drop(page, ".drop", "rows.jsonl", rows.read_text())
            page.wait_for_url("**/new/draft-*")
            page.wait_for_selector("#care")
            assert re.search(r"\d", page.inner_text(".sample mark >> nth=0"))
            page.click("text=On to the model")
            page.fill("#suffix", "sums")
            page.fill("#n_epochs", "2")
            page.click("text=Save and plan")
            page.wait_for_selector("svg.memory")
            page.wait_for_selector("#why-n_epochs .reason")
            shoot(page, "path-plan")
            page.reload()
            assert page.input_value("#suffix") == "sums", "a refresh loses nothing"
            page.click("text=On to the start")
            page.click("#start")
            page.wait_for_url("**/jobs/ftjob-*")
            job = page.url
            page.wait_for_selector("#curves")
            shoot(page, "path-live")
            page.wait_for_selector("text=● succeeded")
            shoot(page, "path-done")
            page.click("text=Try the model")
            page.fill("#prompt", "3 + 4 = ?")
            page.click("#ask")
            for side in (1, 2):
                page.wait_for_selector(f".pane:nth-child({side}) .said:text-matches('ended|cut', 'i')")
            shoot(page, "path-playground")
            link = page.url
            assert "prompt=3" in link, "what was asked is in the address"
            page.goto(link)
            assert page.input_value("#prompt") == "3 + 4 = ?"
            page.goto(f"{job}/report")
            assert "sums" in page.content() or "ftjob-" in page.content()
            assert page.evaluate("window.origin") == "null", "the report is in a sandbox"
            shoot(page, "path-report")
        assert running.stop() == 0


@pytest.mark.slow
def test_reinforcement_from_rows_to_a_job(browser: Any, tmp_path: Path) -> None:
    """Choose a grader, see what is wrong with it, the plan and the recipe, change the recipe, and train by it."""
    models = tmp_path / "models.toml"
    models.write_text(
        '[models.tiny]\npath = "demo:tiny-llama"\nchat_template = "plain"\nmax_tokens = 6\n'
        'gpu = "h100-80gb"\n[models.tiny.recipe]\nmodel = { init = "random", dtype = "float32" }\n'
        'method = { name = "full" }\noptim = { learning_rate = 1e-3 }\n'
    )
    rows = [
        {"messages": [{"role": "user", "content": f"say {n % 4}"}], "wanted": "aeio"[n % 4]} for n in range(16)
    ]  # fmt: skip
    with service(tmp_path / "data", "--models", str(models)) as running:
        with visit(browser, running.url, key=KEY, **DESK) as page:
            page.goto(f"{running.url}/new")
            drop(page, ".drop", "asked.jsonl", jsonl(*rows).decode())
            page.wait_for_url("**/new/draft-*")
            page.click("text=Choose the method")  # they are no rows of the method supervised, as is said
            assert not page.is_visible("#grader_input")
            page.select_option("#method", "reinforcement")
            assert page.is_visible("#grader_reference")
            assert not page.is_visible("#grader_json")
            page.select_option("#grader", "json")
            assert page.is_visible("#grader_json")
            assert not page.is_visible("#grader_reference")
            page.select_option("#grader", "string_check")
            page.select_option("#grader_operation", "like")
            page.fill("#grader_reference", "{{item.wished}}")
            page.fill("#n_epochs", "1")
            page.click("text=Save and plan")
            page.wait_for_selector("text=the grader names {{item.wished}}, which is not there")
            page.fill("#grader_reference", "{{item.wanted}}")
            page.click("text=Save and plan")
            page.wait_for_selector("svg.memory")
            page.wait_for_selector("#why-learning_rate_multiplier .reason >> text=Advice for full")
            page.wait_for_selector("#why-objective >> text=GRPO")
            assert_readable(page)
            shoot(page, "reinforcement-plan")
            page.click("text=Look at the recipe")
            recipe = page.input_value("#recipe")
            assert "{{item.wanted}}" in recipe
            page.fill("#recipe", recipe.replace("answers_per_prompt = 8", "answers_per_prompt = 4"))
            page.click("text=Check the recipe")
            page.wait_for_selector("text=with rollout.answers_per_prompt changed")
            page.click("text=On to the start")
            page.click("#start")
            page.wait_for_url("**/jobs/ftjob-*")
            page.wait_for_selector("text=● succeeded")
            assert "reward" in page.inner_text("ol.events")
            page.wait_for_selector("#answers")
            shoot(page, "reinforcement-done")
        assert running.stop() == 0


def sum_of(a: int, b: int) -> dict[str, Any]:
    answer = {"role": "assistant", "content": str(a + b)}
    return {"messages": [{"role": "user", "content": f"{a} + {b} = ?"}, answer]}


def drop(page: Any, where: str, name: str, text: str) -> None:
    """Drop a file on a part of the page."""
    script = f"""() => {{
        const carried = new DataTransfer();
        carried.items.add(new File([{json.dumps(text)}], {json.dumps(name)}, {{type: "application/jsonl"}}));
        const zone = document.querySelector({json.dumps(where)});
        for (const kind of ["dragenter", "dragover", "drop"])
            zone.dispatchEvent(new DragEvent(kind, {{dataTransfer: carried, bubbles: true, cancelable: true}}));
    }}"""
    page.evaluate(script)
