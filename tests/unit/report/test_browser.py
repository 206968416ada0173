"""The pages in a real browser: nothing on the console, nothing asked of the network, nothing that axe-core finds."""

import html
import importlib.resources
import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from run_kit import made

from distft.compare import main as compare
from distft.report.command import main as report

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
BROWSER = next(filter(None, map(shutil.which, NAMES)), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="needs Chromium (apt-get install chromium)")
QUIET = ("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync", "--hide-scrollbars",
         "--force-device-scale-factor=1")  # fmt: skip


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("pages")
    hostile = "<script>console.log('row')</script><img src='http://127.0.0.1:9/x.png'>" + "x" * 300
    pairs = [
        {"reward_chosen": gap, "reward_rejected": 0.0, "tokens_chosen": 4.0 + gap, "tokens_rejected": 4.0,
         "logprob_chosen": -2.0, "logprob_rejected": -9.0}
        for gap in (1.0, -1.0, 0.5)
    ]  # fmt: skip
    fallen = [pair | {"logprob_chosen": -8.0} for pair in pairs]
    made_one = made(folder, "one").whole().evaluated([1, 1, 0], [0, 0, 1], hostile=hostile)
    one = made_one.judged(pairs, fallen, answer_tokens=(60, 90)).folder
    two = made(folder, "two").whole().folder
    three = made(folder, "three").whole().rolled_out(hostile=hostile).folder
    assert report([str(three), "--no-data"]) == 0
    assert report([str(one), "--no-data"]) == 0
    assert compare([str(one), str(two), "--out", str(folder / "compare.html")]) == 0
    return [one / "report.html", three / "report.html", folder / "compare.html"]


def opened(page: Path, folder: Path, *flags: str) -> tuple[str, dict, bytes]:
    """(what the browser printed, its log of the network, a picture)."""
    assert BROWSER is not None
    shot, log = folder / "shot.png", folder / "net.json"
    command = [BROWSER, "--headless", *QUIET, *flags, f"--user-data-dir={folder}/profile", "--enable-logging=stderr",
               f"--log-net-log={log}", f"--screenshot={shot}", page.as_uri()]  # fmt: skip
    env = os.environ | {"HOME": str(folder)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, env=env)
    assert shot.exists(), done.stderr[-3000:]
    return done.stderr, json.loads(log.read_text()), shot.read_bytes()


def asked(net: dict) -> list[str]:
    """Addresses that a page asked for; a browser's own questions come from no page."""
    told = [event.get("params", {}) for event in net["events"]]
    return [one["url"] for one in told if one.get("initiator", "not an origin") != "not an origin" and "url" in one]


@pytest.mark.parametrize("number", [0, 1, 2], ids=["report", "answers", "compare"])
def test_it_opens_without_a_word_and_without_a_request(pages: list[Path], number: int, tmp_path: Path) -> None:
    said, net, picture = opened(pages[number], tmp_path, "--window-size=1280,2000")
    assert ":CONSOLE" not in said
    assert asked(net) == []
    assert picture[:8] == b"\x89PNG\r\n\x1a\n"
    assert len(picture) > 30_000, "an empty page is a small picture"


def test_a_request_would_have_been_seen(tmp_path: Path) -> None:
    page = tmp_path / "asks.html"
    page.write_text('<img src="http://127.0.0.1:9/x.png"><script>console.error("seen")</script>' + "<p>text</p>" * 40)
    said, net, _ = opened(page, tmp_path)
    assert ":CONSOLE" in said
    assert asked(net) == ["http://127.0.0.1:9/x.png"]


@pytest.mark.parametrize(
    "flags", [("--window-size=1280,2000",), ("--window-size=390,844", "--blink-settings=preferredColorScheme=0")]
)
@pytest.mark.parametrize("number", [0, 1, 2], ids=["report", "answers", "compare"])
def test_axe_finds_nothing(pages: list[Path], number: int, flags: tuple[str, ...], tmp_path: Path) -> None:
    """The page allows no script, so a copy without that rule carries axe-core and says in its title what it found."""
    axe = pytest.importorskip("axe_core_python", reason="axe-core-python is not installed")
    script = (importlib.resources.files(axe) / "axe.min.js").read_text(encoding="utf-8")
    text = pages[number].read_text(encoding="utf-8")
    text, count = re.subn(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", text)
    assert count == 1
    told = (
        "found => { document.title = 'AXE' + JSON.stringify([found.passes.length, found.violations.map(v => v.id)]) }"
    )
    copy = tmp_path / "copy.html"
    copy.write_text(f"{text}<script>{script}</script><script>axe.run(document).then({told})</script>", encoding="utf-8")
    assert BROWSER is not None
    command = [BROWSER, "--headless", *QUIET, *flags, f"--user-data-dir={tmp_path}/profile",
               "--virtual-time-budget=30000", "--dump-dom", copy.as_uri()]  # fmt: skip
    env = os.environ | {"HOME": str(tmp_path)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, env=env)
    said = re.search(r"<title>AXE(.*?)</title>", done.stdout)
    assert said, done.stderr[-2000:]
    passes, violations = json.loads(html.unescape(said[1]))
    assert violations == []
    assert passes > 15
