"""Requests to the process that writes answers, in this process."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

from distft.service.answering import AnswerProcess


def asked(given: Path, prompts: list[str], workdir: Path, **changes: Any) -> list[dict[str, Any]]:
    """Events of requests, one after another."""
    out = io.StringIO()
    common = {"stop": [], "n": 1, "max_tokens": 6, "default_tokens": 6, "temperature": 0.0, "top_p": 1.0, "seed": 1}
    lines = [
        json.dumps(
            {"id": number, "given": str(given), "messages": [{"role": "user", "content": prompt}], "logprobs": None}
            | common
            | changes
        )
        for number, prompt in enumerate(prompts)
    ]  # fmt: skip
    AnswerProcess(workdir, out).run(io.StringIO("\n".join(lines) + "\n"))
    return [json.loads(line) for line in out.getvalue().splitlines()]


def answers(events: list[dict[str, Any]]) -> list[str]:
    assert not [event for event in events if event["event"] in ("refused", "failed")], events
    return [event["text"] for event in events if event["event"] == "end"]
