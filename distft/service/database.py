"""The database: SQLite in the data folder, or PostgreSQL. Migrations are applied when a server starts."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import sqlalchemy
from sqlalchemy import event, select, update
from sqlalchemy.exc import ArgumentError, DBAPIError, NoSuchModuleError
from sqlalchemy.orm import Session, sessionmaker

from distft.core.errors import MachineError
from distft.service.tables import CounterRow, ServerRow

BUSY_S = 30
"""Seconds that a writer waits for another."""
READERS = 4
"""Sessions that read at the same time: threads that all compute in one interpreter only delay each other."""
_AFTERWARDS = "afterwards"


class ServiceDatabase:
    """Sessions that read, and sessions that write: of SQLite one writer at a time, which waits instead of failing."""

    def __init__(self, url: str) -> None:
        """Open it; nothing is read yet.

        Raises:
            MachineError: the URL is none, or its driver is not installed.
        """
        try:
            self.engine = sqlalchemy.create_engine(url, pool_pre_ping=True, pool_size=16, max_overflow=48)
        except (ArgumentError, NoSuchModuleError, ImportError) as error:
            raise MachineError(f"--database: {error}; for example postgresql+psycopg://USER@HOST/NAME") from None
        self.is_sqlite = self.engine.dialect.name == "sqlite"
        if self.is_sqlite:
            event.listen(self.engine, "connect", _prepare_sqlite)
            event.listen(self.engine, "begin", _begin_sqlite)
        # SQLite's own waiting is a poll in which the newest may win: of fifty writers one waited for half a minute
        self._turn = threading.Lock() if self.is_sqlite else contextlib.nullcontext()
        self._readers, self._depth = threading.BoundedSemaphore(READERS), threading.local()
        self._read = sessionmaker(self.engine, expire_on_commit=False)
        self._write = sessionmaker(self.engine.execution_options(writes=True), expire_on_commit=False)

    def migrate(self) -> None:
        """Bring the tables to this version's form.

        Raises:
            MachineError: the database cannot be reached, or a later version has changed it.
        """
        from alembic import command
        from alembic.config import Config
        from alembic.util import CommandError

        config = Config()
        config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
        try:
            with self.engine.execution_options(writes=True).begin() as connection:
                config.attributes["connection"] = connection
                command.upgrade(config, "head")
        except CommandError as error:
            raise MachineError(f"--database: {error}; it belongs to another version of distft") from None
        except DBAPIError as error:
            raise MachineError(f"--database: {error.orig}") from None

    def belong_to(self, folder_id: str) -> None:
        """Note the data folder that the rows speak of.

        Raises:
            MachineError: they speak of another.
        """
        with self.writing() as session:
            row = session.get(ServerRow, 1)
            if row is None:
                session.add(ServerRow(id=1, folder_id=folder_id))
            elif row.folder_id != folder_id:
                raise MachineError("--database: belongs to the data folder of another server; name its --data, too")

    @contextlib.contextmanager
    def reading(self) -> Iterator[Session]:
        """Give a session that sees one state of the database."""
        depth = getattr(self._depth, "value", 0)
        with contextlib.nullcontext() if depth else self._readers:  # who reads within a reading waits for nobody
            self._depth.value = depth + 1
            try:
                with self._read() as session:
                    yield session
            finally:
                self._depth.value = depth

    @contextlib.contextmanager
    def writing(self) -> Iterator[Session]:
        """Give a session that is committed at the end of the context, and rolled back on an error."""
        assert not getattr(self._depth, "value", 0), "who reads may not wait for a writer: the writer may want to read"
        with self._turn, self._write.begin() as session:
            yield session
        for work in session.info.pop(_AFTERWARDS, ()):
            work()

    def close(self) -> None:
        """Close all connections."""
        self.engine.dispose()


def afterwards(session: Session, work: Callable[[], None]) -> None:
    """Have something done once what a writing session wrote is committed, and not where it is not."""
    session.info.setdefault(_AFTERWARDS, []).append(work)


def next_position(session: Session, name: str) -> int:
    """Return the next number of a counter; numbers of one counter are given out in the order of their commits."""
    changed = session.execute(update(CounterRow).where(CounterRow.name == name).values(value=CounterRow.value + 1))
    if changed.rowcount == 0:  # pyright: ignore[reportAttributeAccessIssue]
        session.add(CounterRow(name=name, value=1))
        session.flush()
        return 1
    return session.execute(select(CounterRow.value).where(CounterRow.name == name)).scalar_one()


def _prepare_sqlite(connection: Any, record: Any) -> None:
    connection.isolation_level = None  # transactions are begun below, not by the driver
    cursor = connection.cursor()
    for pragma in ("journal_mode=WAL", "synchronous=FULL", f"busy_timeout={BUSY_S * 1000}", "foreign_keys=ON"):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


def _begin_sqlite(connection: Any) -> None:
    writes = connection.get_execution_options().get("writes", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")
