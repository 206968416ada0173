"""The socket that `distft serve` listens on."""

from __future__ import annotations

import socket

import pytest

from distft.service.http_server import listen


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_connections_send_at_once(host: str) -> None:
    """Else each answer waits 40 ms for the client's acknowledgement of its head."""
    with listen(host, 0) as listening, socket.create_connection(listening.getsockname()[:2], timeout=10):
        accepted, _ = listening.accept()
        with accepted:
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) == 1
