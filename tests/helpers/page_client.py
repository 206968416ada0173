"""A browser without scripts, for tests of the pages: it keeps cookies, and sends the forms that a page has."""

from __future__ import annotations

import re
from typing import Any

import requests
from service_server import ADMIN_KEY


class PageClient:
    """One visitor of a server."""

    def __init__(self, root: str, key: str | None = ADMIN_KEY) -> None:
        self.root, self.http = root, requests.Session()
        if key is not None:
            answer = self.post("/login", {"key": key}, form=False)
            assert answer.status_code == 303, answer.text

    def get(self, path: str, **options: Any) -> requests.Response:
        return self.http.get(self.root + path, allow_redirects=False, timeout=60, **options)

    def text(self, path: str) -> str:
        answer = self.get(path)
        assert answer.status_code == 200, (answer.status_code, answer.text)
        return answer.text

    def token(self) -> str:
        """The token that forms of this session carry."""
        found = re.search(r'name="csrf" value="([0-9a-f]{64})"', self.text("/jobs"))
        assert found is not None
        return found[1]

    def post(
        self,
        path: str,
        fields: dict[str, Any] | None = None,
        *,
        form: bool = True,
        origin: str | None = "",
        **more: Any,
    ) -> requests.Response:
        """Send a form as a browser does; `form=False`: without its token, `origin=None`: from nowhere."""
        fields = dict(fields or {}) | ({"csrf": self.token()} if form else {})
        headers = more.pop("headers", {}) | ({} if origin is None else {"Origin": origin or self.root})
        return self.http.post(
            self.root + path, data=fields, headers=headers, allow_redirects=False, timeout=120, **more
        )
