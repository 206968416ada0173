"""A real PostgreSQL for the length of a test: started here where it is installed."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def binaries() -> Path | None:
    """Folder of PostgreSQL's programs; initdb is not on the PATH of Debian."""
    folders = [*sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)]
    if named := shutil.which("initdb"):
        folders.append(Path(named).parent)
    return next((folder for folder in folders if (folder / "initdb").is_file()), None)


@contextmanager
def postgres() -> Iterator[str]:
    """URL of a server whose data are in a new folder; `binaries` says whether there can be one.

    The folder is none of pytest's: PostgreSQL refuses to run as root, and each start of pytest shuts its folders off
    from other users, also from those of a server that runs in one.
    """
    programs = binaries()
    assert programs is not None
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory(prefix="postgres-") as place:
        folder = Path(place)
        folder.chmod(0o777)
        as_user = ["runuser", "-u", "postgres", "--"] if os.getuid() == 0 else []
        data = folder / "data"
        control = [str(programs / "pg_ctl"), "-D", str(data), "-w", "-l", str(folder / "log")]
        listen = f"-p {port} -c listen_addresses=127.0.0.1 -c unix_socket_directories={folder}"
        made = [str(programs / "initdb"), "-D", str(data), "-A", "trust", "-U", "distft"]
        for command in (made, [*control, "-o", listen, "start"]):
            subprocess.run([*as_user, *command], check=True, capture_output=True, cwd="/")
        try:
            yield f"postgresql+psycopg://distft@127.0.0.1:{port}/postgres"
        finally:
            command = [*as_user, *control, "-t", "300", "-m", "immediate", "stop"]
            done = subprocess.run(command, check=False, capture_output=True, text=True, cwd="/")
            log = (folder / "log").read_text(encoding="utf-8", errors="replace")
            assert done.returncode == 0, f"{done.stdout}{done.stderr}\n{log[-3000:]}"


def end_connections(url: str) -> int:
    """End every connection of clients to the server; return how many there were."""
    import psycopg

    with psycopg.connect(url.replace("+psycopg", ""), autocommit=True) as connection:
        ended = connection.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
            " WHERE pid <> pg_backend_pid() AND backend_type = 'client backend'"
        ).fetchall()
    return len(ended)
