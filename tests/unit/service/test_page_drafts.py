"""A new job on the pages: data, findings, plan, recipe, start; what an edited recipe may change."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from page_client import PageClient
from service_server import ADMIN_KEY, CHAT, ServiceServer, jsonl, serving

from distft.core.errors import RecipeError
from distft.service import preview as preview_command
from distft.service.edited_recipe import changed_keys, from_shown, shown
from distft.service.job_folder import JobFolder
from distft.service.tables import DraftRow

EVIL = "<script>alert(1)</script>"
WRITTEN = """
name = "ftjob-1"
output_dir = "/data/runs"
[model]
path = "/models/tiny"
[method]
name = "lora"
r = 8
[optim]
learning_rate = 0.001
[train]
epochs = 3
[[data.train]]
path = "/data/train.jsonl"
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServiceServer]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DISTFT_API_KEY", ADMIN_KEY)
        with serving(tmp_path_factory.mktemp("drafts"), file_mib=0.2, slowest_upload_s=2.0) as running:
            yield running


@pytest.fixture
def visitor(server: ServiceServer) -> PageClient:
    server.runner.ends_at_once = True
    return PageClient(server.root)


@pytest.fixture
def found(server: ServiceServer, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What drafts are found to hold, without the seconds that looking takes."""
    told: dict[str, Any] = {"done": True}
    drafts = server.app.state.parts.drafts
    looked = type(drafts).preview

    def preview(caller: Any, draft: Any) -> dict[str, Any] | None:
        begun = looked(drafts, caller, draft) if told.get("really") else draft.content.get("training_file")
        from distft.service.drafts import EMPTY

        return EMPTY | told if begun else None

    monkeypatch.setattr(drafts, "preview", preview)
    return told


def begun(visitor: PageClient, *rows: Any, name: str = "rows.jsonl") -> str:
    """Path of a new draft with a file of these rows."""
    answer = visitor.post("/new", files={"file": (name, jsonl(*(rows or (CHAT,))))})
    assert answer.status_code == 303, answer.text
    return answer.headers["location"]


def test_a_draft_is_kept_on_the_server_until_it_is_a_job(
    visitor: PageClient, server: ServiceServer, found: dict[str, Any]
) -> None:
    path = begun(visitor, name=f"a{EVIL[:8]}.jsonl".replace("/", ""))
    assert "a&lt;script&gt;.jsonl" in visitor.text(path)
    form = {"model": "tiny", "method": "dpo", "suffix": "mine", "n_epochs": "4", "beta": "0.2", "goal": "preference"}
    assert visitor.post(f"{path}/model", form).headers["location"] == f"{path}/model"
    again = PageClient(server.root).text(f"{path}/model")
    for part in ('value="mine"', 'value="4"', 'value="0.2"', '<option value="dpo" selected>'):
        assert part in again, part
    found["plan"] = {"fits": True, "lines": ["No plan."], "case": None}
    assert "Start the job" in visitor.text(f"{path}/start")
    first = visitor.post(f"{path}/start", {"priority": "5"}).headers["location"]
    assert re.fullmatch(r"/jobs/ftjob-\w+", first)
    assert visitor.get(path).headers["location"] == first, "a link to the draft leads to its job"
    assert visitor.post(f"{path}/model", form).status_code == 409
    with server.client() as client:
        job = client.fine_tuning.jobs.retrieve(first.removeprefix("/jobs/"))
    assert job.method is not None
    assert (job.method.type, job.model) == ("dpo", "tiny")
    assert job.hyperparameters.n_epochs == 4
    assert "priority</th><td>5" in visitor.text(first)
    assert path not in visitor.text("/new")


def test_what_no_job_can_ask_for_is_said_beside_its_field(visitor: PageClient, found: dict[str, Any]) -> None:
    path = begun(visitor)
    for change, field in (
        ({"n_epochs": "51"}, "n_epochs"),
        ({"n_epochs": "many"}, "n_epochs"),
        ({"batch_size": "0"}, "batch_size"),
        ({"learning_rate_multiplier": "nan"}, "learning_rate_multiplier"),
        ({"suffix": f"../{EVIL}"}, "suffix"),
        ({"model": "chat-only", "method": "dpo"}, "method"),
        ({"model": "gpt-4o"}, "model"),
    ):
        answer = visitor.post(f"{path}/model", {"model": "tiny", "method": "supervised", **change})
        assert answer.status_code == 400, change
        assert f'id="wrong-{field}"' in answer.text, change
        assert EVIL not in answer.text
        for text in change.values():
            assert html.escape(text) in answer.text or text in ("gpt-4o", "nan"), "what was typed is still there"
    assert 'value="auto"' in visitor.text(f"{path}/model"), "nothing of it was kept"


ASKED = {"messages": [{"role": "user", "content": "2 + 2?"}], "answer": "4"}
CHECK = {"type": "string_check", "name": "grader", "operation": "ilike", "input": "{{sample.output_text}}",
         "reference": "{{item.answer}}"}  # fmt: skip
SIMILAR = {"type": "text_similarity", "name": "s", "evaluation_metric": "rouge_1", "input": "a", "reference": "b"}
MULTI = {"type": "multi", "name": "both", "graders": {"check": CHECK, "like": SIMILAR},
         "calculate_output": "0.5 * check + 0.5 * like"}  # fmt: skip


def test_reinforcement_is_chosen_with_a_grader_and_started(
    visitor: PageClient, server: ServiceServer, found: dict[str, Any]
) -> None:
    path = begun(visitor, ASKED)
    base = {"model": "tiny", "method": "reinforcement"}
    similar = {"grader": "text_similarity", "grader_reference": "{{item.answer}}"}
    for change, field, says in (
        ({}, "grader_reference", "{{item.answer}}"),
        ({"grader_reference": "x", "grader_operation": "is"}, "grader_operation", "eq"),
        ({**similar, "grader_metric": "bleu"}, "grader_metric", "rouge_1"),
        ({"grader": "python"}, "grader", "one of"),
        ({"grader": "json"}, "grader_json", "no JSON"),
        ({"grader": "json", "grader_json": "[1]"}, "grader_json", "JSON object"),
        ({"grader": "json", "grader_json": '{"type": NaN}'}, "grader_json", "NaN"),
        ({"grader": "json", "grader_json": "[" * 20_000}, "grader_json", "nested too deeply"),
        ({"grader": "json", "grader_json": '{"a": ' * 900 + "1" + "}" * 900}, "grader", ""),
        ({"grader": "json", "grader_json": json.dumps({"type": "python", "source": EVIL})}, "grader_json", "runs code"),
        ({"grader": "json", "grader_json": json.dumps({**MULTI, "calculate_output": "check +"})}, "grader_json", ""),
        ({"grader": "json", "grader_json": json.dumps({**CHECK, "more": 1})}, "grader_json", "more"),
        ({"grader_reference": "x", "compute_multiplier": "11"}, "compute_multiplier", "10"),
    ):
        answer = visitor.post(f"{path}/model", {**base, **change})
        assert answer.status_code == 400, change
        place = re.search(rf'id="wrong-{field}\w*" role="alert">([^<]*)<', answer.text)
        assert place, (change, re.findall(r'id="wrong-(\w+)"', answer.text))
        assert says in html.unescape(place[1]), (change, place[1])
        assert EVIL not in answer.text
        for name, text in change.items():
            typed = name in ("grader_reference", "grader_json", "compute_multiplier")
            assert not typed or text in html.unescape(answer.text), "what was typed is still there"
    assert '<option value="supervised" selected>' in visitor.text(f"{path}/model"), "nothing of it was kept"
    for grader, fields in (
        (CHECK, {"grader_operation": "ilike", "grader_reference": "{{item.answer}}"}),
        (MULTI, {"grader": "json", "grader_json": json.dumps(MULTI)}),
    ):
        path = begun(visitor, ASKED)
        answer = visitor.post(f"{path}/model", {**base, **fields, "compute_multiplier": "0.5", "n_epochs": "2"})
        assert answer.status_code == 303, answer.text
        page = html.unescape(visitor.text(f"{path}/model"))
        assert 'value="0.5"' in page
        assert ('<option value="json" selected>' in page) == (grader is MULTI)
        assert "{{item.answer}}" in page
        found["plan"] = {"fits": True, "lines": ["No plan."], "case": None}
        job_path = visitor.post(f"{path}/start", {"priority": "0"}).headers["location"]
        with server.client() as client:
            job = client.fine_tuning.jobs.retrieve(job_path.removeprefix("/jobs/"))
        assert job.method is not None
        assert job.method.reinforcement is not None
        assert job.method.reinforcement.grader.model_dump(exclude_none=True) == grader
        assert job.method.reinforcement.hyperparameters is not None
        assert job.method.reinforcement.hyperparameters.compute_multiplier == 0.5


def test_a_draft_of_reinforcement_without_a_grader_says_what_is_missing(
    visitor: PageClient, server: ServiceServer, found: dict[str, Any]
) -> None:
    """As one begins where a model is trained by nothing else."""
    path = begun(visitor, ASKED)
    with server.database.writing() as session:
        row = session.get_one(DraftRow, path.removeprefix("/new/"))
        row.content = {**row.content, "method": "reinforcement"}
    found["really"] = True
    for step in ("", "/model", "/recipe", "/start"):
        assert "Choose a grader first" in visitor.text(path + step)
    assert visitor.post(f"{path}/start").status_code == 400


def test_findings_are_shown_and_escaped(visitor: PageClient, found: dict[str, Any]) -> None:
    path = begun(visitor)
    found["done"] = False
    assert 'hx-trigger="every 1s"' in visitor.text(path)
    sample = {"id": "row 1", "tokens": 9, "trained": 3, "pieces": [[f"ask {EVIL}", False], [f"say {EVIL}", True]]}
    split = {"split": "train", "rows": 7, "tokens": 90, "trained": 30, "cut": 1, "dropped": 0, "messages": [EVIL]}
    entry = {"what": "epochs", "value": "3", "says": "Three passes.", "why": "Few rows.", "rule": "epochs-few"}
    parts = {"weights": 2 << 30, "activations": 1 << 30}
    case = {"gpu": "h100-80gb", "world": 1, "engine": "solo", "parts": parts, "peak_bytes": 3 << 30, "hours": 0.5,
            "gpu_bytes": 79 << 30, "tokens_per_s": 1000.0, "price": 2.0, "cost": 1.0}  # fmt: skip
    found |= {
        "splits": [{**split, "samples": [sample]}], "care": [f"repeats {EVIL}"], "notes": [f"secret {EVIL}"],
        "advice": [entry], "recipe": f'name = "x"  # {EVIL}', "parameters": [10, 1000], "num_steps": 12, "done": True,
        "plan": {"fits": True, "lines": ["fits"], "case": case}, "values": {"n_epochs": 3},
    }  # fmt: skip
    data = visitor.text(path)
    assert "<mark>say &lt;script&gt;" in data
    assert "33.3" in data, "the share of tokens that are trained"
    model = visitor.text(f"{path}/model")
    for part in ("Three passes. Few rows.", "● It fits", "30 min", "1.00", "auto gives 3", "10 of 1,000 parameters"):
        assert part in model, part
    found["plan"] = {"fits": False, "lines": ["does not fit", f"1. smaller {EVIL}"], "case": {**case, "cost": None}}
    for step in ("", "/model", "/recipe", "/start"):
        assert EVIL not in visitor.text(path + step)
    assert "✕ It does not fit" in visitor.text(f"{path}/start")
    assert "Start the job" not in visitor.text(f"{path}/start")
    problem = {"line": 7, "message": f"epochz {EVIL}", "fix": "allowed: epochs"}
    found["error"] = {"code": "invalid_job", "message": "m", "param": None, "problems": [problem]}
    recipe = visitor.text(f"{path}/recipe")
    assert "Line 7: epochz &lt;script&gt;" in recipe
    assert "allowed: epochs" in recipe


def test_drafts_of_others_are_not_there(visitor: PageClient, server: ServiceServer, found: dict[str, Any]) -> None:
    path = begun(visitor)
    with server.client() as client:
        made = []
        for name, role in (("strangers", "member"), ("lookers", "viewer")):
            project = client.post("/organization/projects", body={"name": name}, cast_to=dict)["id"]
            keys = f"/organization/projects/{project}/api_keys"
            made.append(client.post(keys, body={"name": "k", "role": role}, cast_to=dict)["value"])
        file_id = client.files.list(limit=1).data[0].id
    other, viewer = (PageClient(server.root, key) for key in made)
    for step in ("", "/model", "/recipe", "/start"):
        assert other.get(path + step).status_code == 404
    for step in ("model", "recipe", "start", "delete", "training"):
        assert other.post(f"{path}/{step}", {"file_id": "none"}).status_code == 404
    assert other.post("/new", {"file_id": file_id}).status_code == 404, "nor can its file be taken"
    assert path not in other.text("/new")
    assert viewer.get("/new").status_code == 403
    assert viewer.post("/new", files={"file": ("x.jsonl", b"{}")}).status_code == 403
    assert visitor.get(path).status_code == 200
    assert visitor.post(f"{path}/delete").status_code == 303
    assert visitor.get(path).status_code == 404


def test_uploads_of_pages_have_limits_and_need_a_session_first(visitor: PageClient, server: ServiceServer) -> None:
    assert visitor.post("/new", files={"file": ("big", b"x" * 300_000)}).status_code in (400, 413)
    assert visitor.post("/files", files={"file": ("none", b"")}).status_code == 400
    assert "a..b" not in visitor.post("/files", files={"file": ("a/../b", b"row")}).text
    stranger = PageClient(server.root, None)
    assert stranger.post("/new", form=False, files={"file": ("x", b"y" * 10_000)}).headers["location"] == "/login"
    unsigned = visitor.post("/files", form=False, files={"file": ("x.jsonl", b"{}")})
    assert unsigned.status_code == 403


@pytest.mark.parametrize(
    ("old", "new", "keys"),
    [
        ("epochs = 3", "epochs = 5", ["train.epochs"]),
        ("epochs = 3", "max_steps = 9", ["train.epochs", "train.max_steps"]),
        ("r = 8", "r = 16\nalpha = 32", ["method.alpha", "method.r"]),
        ('name = "lora"', 'name = "dora"', ["method.name"]),
        ("[train]", "# a comment\n[train]", []),
    ],
)
def test_how_a_job_is_trained_may_be_edited(old: str, new: str, keys: list[str]) -> None:
    assert changed_keys(WRITTEN, WRITTEN.replace(old, new)) == keys


@pytest.mark.parametrize(
    ("old", "new", "line"),
    [
        ('path = "/models/tiny"', 'path = "/etc"', 5),
        ('path = "/data/train.jsonl"', 'path = "/etc/passwd"', 14),
        ('output_dir = "/data/runs"', 'output_dir = "/tmp"', 3),
        ("r = 8", 'r = 8\nstart = "/other/adapter"', 9),
        ("[train]", 'plugins = ["evil"]\n[train]', 11),
        ("[train]", '[objective]\nteacher = "gpt2"\n[train]', 12),
        ("[train]", '[[rollout.rewards]]\npython = "x.py"\n[train]', 12),
        ("[train]", "[log]\nwandb = true\n[train]", 12),
        ("[train]", "[model]\ntrust_remote_code = true", None),
        ("epochs = 3", "epochs = ", 12),
        ('output_dir = "/data/runs"\n', "", None),
    ],
)
def test_what_is_read_and_executed_is_the_servers(old: str, new: str, line: int | None) -> None:
    with pytest.raises(RecipeError) as refused:
        changed_keys(WRITTEN, WRITTEN.replace(old, new))
    assert line is None or [problem.line for problem in refused.value.problems] == [line]


def test_a_recipe_is_shown_without_paths_and_comes_back(tmp_path: Path) -> None:
    folder = JobFolder(path=tmp_path / "jobs" / "ftjob-abc")
    text = f'name = "ftjob-abc"\noutput_dir = "{folder.path}/runs"\n[data]\ncache_dir = "{tmp_path}/cache"\n'
    assert str(tmp_path) not in shown(text, folder)
    assert from_shown(shown(text, folder).replace("\n", "\r\n"), folder) == text
    other = JobFolder(path=tmp_path / "jobs" / "ftjob-def")
    assert from_shown(shown(text, folder), other) == text.replace("ftjob-abc", "ftjob-def")


@pytest.mark.slow
def test_a_draft_is_really_looked_at_and_its_recipe_runs_as_the_jobs(tmp_path: Path, server: ServiceServer) -> None:
    """The command itself, on a folder as the service fills it: rows, marks, plan, mistakes of an edited recipe."""
    from distft.core.files import read_json_object
    from distft.service.settings import ServedBase

    base = ServedBase(
        path="demo:tiny-llama", chat_template="plain", gpu="h100-80gb", price=2.0,
        recipe={"model": {"init": "random"}, "method": {"name": "full"}, "optim": {"learning_rate": 3e-3}},
    )  # fmt: skip
    hyperparameters = {"n_epochs": 2, "batch_size": 2, "learning_rate_multiplier": 1.0}
    request = {
        "base": base.model_dump_json(), "layout": [1, 1], "seed": 3, "integrations": None, "recipe": None,
        "method": {"type": "supervised", "supervised": {"hyperparameters": hyperparameters}}, "line_bytes": 1 << 20,
    }  # fmt: skip

    def look(name: str, recipe: str | None, *rows: Any, **more: Any) -> dict[str, Any]:
        folder = JobFolder(path=tmp_path / "drafts" / name)
        folder.make({**request, "recipe": recipe, **more})
        (folder.path / "train.jsonl").write_bytes(jsonl(*(rows or (CHAT,) * 4)))
        assert preview_command.main([str(folder.path)]) == 0
        return read_json_object(folder.path / "preview.json")

    first = look("draft-a-1", None)
    assert first["done"]
    assert "error" not in first
    split = first["splits"][0]
    assert (split["rows"], split["trained"] > 0) == (4, True)
    marked = "".join(text for text, trained in split["samples"][0]["pieces"] if trained)
    assert "4" in marked
    assert "2 + 2" not in marked
    assert first["plan"]["fits"]
    case = first["plan"]["case"]
    assert sum(case["parts"].values()) == case["peak_bytes"]
    assert case["cost"] == pytest.approx(2.0 * case["hours"])
    advice = {entry["what"]: entry["value"] for entry in first["advice"]}
    assert (advice["method"], advice["learning_rate"]) == ("full", "2e-05"), "for the recipe's method"
    assert "epochs" in advice
    lora = look("draft-a-5", first["recipe"].replace('name = "full"', 'name = "lora"'))
    advice = {entry["what"]: entry["value"] for entry in lora["advice"]}
    assert (advice["method"], advice["learning_rate"]) == ("lora", "0.0002")
    assert any("3 equal" in line for line in first["care"])
    assert str(tmp_path) not in str(first)
    edited = first["recipe"].replace("epochs = 2", "epochs = 5")
    assert edited != first["recipe"]
    second = look("draft-a-2", edited)
    assert second["changed"] == ["train.epochs"]
    assert (second["values"]["n_epochs"], second["num_steps"]) == (5, 10)
    wrong = look("draft-a-3", first["recipe"].replace("epochs = 2", "epochz = 2"))
    problems = wrong["error"]["problems"]
    line = next(n for n, text in enumerate(first["recipe"].splitlines(), start=1) if text.startswith("epochs = 2"))
    assert [problem["line"] for problem in problems if "epochz" in problem["message"]] == [line]
    assert wrong["recipe"]
    broken = look("draft-a-4", first["recipe"].replace("epochs = 2", "epochs = "))
    assert "TOML" in broken["error"]["problems"][0]["message"]
    inner = {"grader": CHECK, "hyperparameters": {**hyperparameters, "compute_multiplier": 0.5}}
    graded: dict[str, Any] = {"method": {"type": "reinforcement", "reinforcement": inner}}
    asked = look("draft-a-6", None, *(ASKED,) * 4, **graded)
    assert "error" not in asked
    assert (asked["num_steps"], asked["plan"]["fits"]) == (4, True)
    advice = {entry["what"]: entry["value"] for entry in asked["advice"]}
    assert (advice["objective"], advice["learning_rate"]) == ("grpo", "1e-06")
    assert "2 + 2?" in str(asked["splits"][0]["samples"])
    edited = asked["recipe"].replace("answers_per_prompt = 4", "answers_per_prompt = 2")
    assert look("draft-a-7", edited, *(ASKED,) * 4, **graded)["changed"] == ["rollout.answers_per_prompt"]
    without = look("draft-a-8", None, {"messages": ASKED["messages"]}, **graded)
    assert "line 1: the grader names {{item.answer}}" in without["error"]["message"]
    assert without["error"]["param"] == "training_file"
