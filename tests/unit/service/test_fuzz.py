"""The server's own schema, fuzzed over HTTP: no request, however odd, ends in a 500, and none gets past the key."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import requests
from service_server import ADMIN_KEY, serving

pytestmark = pytest.mark.slow


def test_no_request_ends_in_a_500(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import schemathesis
    from hypothesis import HealthCheck, given, settings
    from schemathesis.checks import not_a_server_error

    monkeypatch.setenv("DISTFT_API_KEY", ADMIN_KEY)
    examples = int(os.environ.get("DISTFT_FUZZ", "25"))
    with serving(tmp_path) as server:
        schema = schemathesis.openapi.from_dict(requests.get(f"{server.root}/openapi.json", timeout=30).json())
        schema.config.update(base_url=server.root)
        operations = [result.ok() for result in schema.get_all_operations()]
        assert len(operations) > 35
        for operation in operations:
            if operation.path.endswith("completions"):  # which would load models
                continue

            @settings(max_examples=examples, deadline=None, database=None, suppress_health_check=list(HealthCheck))
            @given(case=operation.as_strategy())
            def attack(case: schemathesis.Case) -> None:
                headers = {"Authorization": f"Bearer {ADMIN_KEY}"}
                case.call_and_validate(base_url=server.root, headers=headers, checks=[not_a_server_error], timeout=60)

            attack()
            if operation.path not in ("/healthz", "/openapi.json"):
                bare = requests.request(operation.method, server.root + operation.path, timeout=60)
                assert bare.status_code == 401, operation.path
