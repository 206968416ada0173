"""The HTTP server of `distft serve`: uvicorn, told what this service needs of it."""

from __future__ import annotations

import gc
import socket
from collections.abc import Callable

import uvicorn
from fastapi import FastAPI


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens.

    An answer is written as head and body. asyncio lets both go at once on sockets that it has made itself, not on
    those that it is handed: there the body would wait for the client to acknowledge the head, which clients do after
    40 ms. Connections inherit the option from the socket that accepts them.

    Raises:
        OSError: the address cannot be had.
    """
    family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
    listening = socket.create_server((host, port), family=family, backlog=2048)
    listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listening


class HttpServer(uvicorn.Server):
    """Serves an application, and says once when it accepts."""

    def __init__(self, app: FastAPI, *, when_listening: Callable[[], None]) -> None:
        """Make it; `run(sockets=[listen(...)])` serves until the process is told to stop."""
        super().__init__(
            uvicorn.Config(
                app, log_config=None, access_log=False, server_header=False, timeout_graceful_shutdown=10, lifespan="on"
            )
        )  # fmt: skip
        self._when_listening = when_listening

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start the application, and say that it accepts unless it could not be started."""
        await super().startup(sockets)
        if self.should_exit:
            return
        # Modules, routes and mapped classes (150,000 objects) live as long as the process. Looking through them again
        # at each collection of the oldest generation would stop all requests for nearly a tenth of a second.
        gc.collect()
        gc.freeze()
        self._when_listening()
