"""`distft serve`: the data folder, its database, the first key, and a web server over them."""

from __future__ import annotations

import argparse
import contextlib
import ipaddress
import os
import secrets
import signal
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from distft.core.errors import DONE, BusyError, DistftError, FileSystemError, MachineError, Problem, RecipeError
from distft.core.optional import why_not
from distft.service.options import parser

if TYPE_CHECKING:
    from distft.service.settings import ServiceSettings

NEEDS = ("fastapi", "uvicorn", "sqlalchemy", "alembic", "python_multipart")
TINY = {
    "tiny": {
        "path": "demo:tiny-llama",
        "chat_template": "plain",
        "methods": ("supervised",),
        "recipe": {
            "model": {"init": "random", "dtype": "float32"},
            "method": {"name": "full"},
            "optim": {"learning_rate": 3e-3},
        },
    }
}
"""What is trained where no `--models` says otherwise: the model that comes with distft, from random weights."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; its exit code is that of the error, if any."""
    options = parser().parse_args(argv)
    try:
        missing = [why for package in NEEDS if (why := why_not(package))]
        if missing:
            raise MachineError(f"{'; '.join(missing)}: pip install 'distft[serve]'")
        _serve(options)
    except DistftError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return DONE


def _serve(options: argparse.Namespace) -> None:
    os.umask(0o077)  # what people upload and train is theirs alone
    settings = _settings(options)
    folder_id = _prepare(settings.data)
    from filelock import FileLock, Timeout

    from distft.service.app import create_app
    from distft.service.auth import KEY_VARIABLE, first_key
    from distft.service.database import ServiceDatabase
    from distft.service.errors import ApiError
    from distft.service.http_server import HttpServer
    from distft.service.logs import log_as_json

    lock = FileLock(settings.data / "server.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise BusyError(f"--data {settings.data}: another server works with this folder") from None
    with contextlib.ExitStack() as held:
        held.callback(lock.release)
        database = ServiceDatabase(options.database or f"sqlite:///{settings.data / 'service.sqlite'}")
        held.callback(database.close)
        database.migrate()
        database.belong_to(folder_id)
        with database.reading() as session:
            _refuse_open_host(options.host, session)
        try:
            made = first_key(database)
            os.environ.pop(KEY_VARIABLE, None)  # nothing that is started from here needs it
        except ApiError as error:
            raise MachineError(error.message) from None
        log_as_json()
        listening = _listen(options.host, options.port)

        def tell() -> None:
            host, port = listening.getsockname()[:2]
            address = f"http://{f'[{host}]' if ':' in host else host}:{port}"
            if made is not None:
                print(f"first admin key (shown once): {made}", flush=True)
                print(f"the control room: {address}/  sign in there with this key", flush=True)
            print(f"listening on {address}", flush=True)

        server = HttpServer(create_app(settings, database), when_listening=tell)
        for number in (signal.SIGINT, signal.SIGTERM):  # uvicorn stops on them, and then raises them again
            signal.signal(number, lambda *_: None)
        server.run(sockets=[listening])


def _settings(options: argparse.Namespace) -> ServiceSettings:
    from distft.service.settings import ServiceSettings, SettingsFile, read_settings

    if options.models is not None:
        content = read_settings(options.models)
    else:
        content = SettingsFile.model_validate({"models": TINY})
    if options.site is not None and options.runner != "slurm":
        raise RecipeError("distft serve", [Problem(message="--site  goes with --runner slurm")])
    return ServiceSettings(
        data=options.data.expanduser().resolve(),
        models=content.models,
        limits=content.limits,
        runner=options.runner,
        site=options.site,
    )


def _prepare(data: Path) -> str:
    """Make the data folder; return its id, which its database knows."""
    name = data / "folder-id"
    try:
        data.mkdir(parents=True, exist_ok=True)
        if not name.exists():
            name.write_text(secrets.token_hex(16), encoding="utf-8")
        return name.read_text(encoding="utf-8").strip()
    except OSError as error:
        raise FileSystemError(f"--data {data}: cannot be written ({error.strerror})") from None


def _refuse_open_host(host: str, session: object) -> None:
    """Refuse an address that others reach while nobody has chosen a key.

    Raises:
        MachineError: there is none.
    """
    from distft.service.auth import KEY_VARIABLE, has_admin_key

    if is_loopback(host) or os.environ.get(KEY_VARIABLE) or has_admin_key(session):  # pyright: ignore[reportArgumentType]
        return
    raise MachineError(
        f"--host {host}: without a key this machine alone may ask  set {KEY_VARIABLE}, or leave --host out"
    )


def is_loopback(host: str) -> bool:
    """Return whether an address is reached from this machine alone."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _listen(host: str, port: int) -> socket.socket:
    from distft.service.http_server import listen

    try:
        return listen(host, port)
    except (OSError, OverflowError) as error:
        raise MachineError(f"--host {host} --port {port}: cannot listen there ({error})") from None
