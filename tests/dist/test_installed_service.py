"""The wheel in an environment of its own, outside of the repository: `distft serve`, and a first job to its end.

The environment has the dependencies of the one that runs this test, and of `distft` the wheel alone.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import sysconfig
import time
import venv
from pathlib import Path

import openai
import pytest

ROOT = Path(__file__).resolve().parents[2]
ROWS = b"".join(
    b'{"messages": [{"role": "user", "content": "say %d"}, {"role": "assistant", "content": "it is %d"}]}\n' % (n, n)
    for n in range(16)
)


@pytest.mark.dist
@pytest.mark.slow
def test_a_first_job_where_only_the_wheel_is(tmp_path: Path) -> None:
    source, wheels = tmp_path / "source", tmp_path / "wheels"
    source.mkdir()
    tree = subprocess.run(["git", "archive", "HEAD"], cwd=ROOT, check=True, capture_output=True).stdout
    subprocess.run(["tar", "x"], cwd=source, input=tree, check=True)
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q", "-w", str(wheels), "."]
    subprocess.run(build, cwd=source, check=True, env=clean_environment())
    (wheel,) = wheels.glob("distft-*.whl")
    home = tmp_path / "environment"
    venv.EnvBuilder(with_pip=False).create(home)
    (site,) = home.glob("lib/python3*/site-packages")
    # the folder alone: its own .pth files, that of an editable install among them, are not read
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    install = [sys.executable, "-m", "pip", "install", "--no-deps", "-q", "--target", str(site), str(wheel)]
    subprocess.run(install, check=True, env=clean_environment())
    python, elsewhere = home / "bin" / "python", tmp_path / "elsewhere"
    elsewhere.mkdir()
    where = subprocess.run(
        [python, "-c", "import distft; print(distft.__file__)"], cwd=elsewhere, env=clean_environment(), check=True,
        capture_output=True, text=True,
    ).stdout  # fmt: skip
    assert where.strip() == str(site / "distft" / "__init__.py")
    key = "sk-distft-of-a-newcomer"
    server = subprocess.Popen(
        [python, "-m", "distft.cli", "serve", "--port", "0", "--data", "data"], cwd=elsewhere,
        env={**clean_environment(), "DISTFT_API_KEY": key}, stdout=subprocess.PIPE, text=True,
        stderr=(tmp_path / "log").open("wb"),
    )  # fmt: skip
    try:
        assert server.stdout is not None
        said = re.fullmatch(r"listening on (http://\S+)\n", server.stdout.readline())
        assert said is not None, (tmp_path / "log").read_text(encoding="utf-8")
        with openai.OpenAI(api_key=key, base_url=f"{said[1]}/v1", timeout=120) as client:
            file_id = client.files.create(file=("rows.jsonl", ROWS), purpose="fine-tune").id
            job = client.fine_tuning.jobs.create(model="tiny", training_file=file_id)
            end = time.monotonic() + 900
            while job.status not in ("succeeded", "failed"):
                assert time.monotonic() < end
                time.sleep(0.5)
                job = client.fine_tuning.jobs.retrieve(job.id)
            assert job.status == "succeeded", job
            answer = client.chat.completions.create(
                model=job.fine_tuned_model, messages=[{"role": "user", "content": "say 3"}], max_tokens=8
            )
            assert answer.usage is not None
            assert answer.usage.completion_tokens > 0
    finally:
        server.kill()
        server.wait()


def clean_environment() -> dict[str, str]:
    """The environment's variables without those that would let the repository in."""
    return {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "DISTFT_API"))}
