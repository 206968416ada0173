"""Sessions that write: each has its turn, and what is to be done afterwards is done once, if at all."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import select

from distft.service import database
from distft.service.auth import make_project
from distft.service.database import ServiceDatabase, afterwards, next_position
from distft.service.tables import CounterRow, ProjectRow, ServiceTable


def test_migrations_make_the_tables_that_the_code_reads(tmp_path: Path) -> None:
    rows = ServiceDatabase(f"sqlite:///{tmp_path / 'rows.sqlite'}")
    rows.migrate()
    with rows.engine.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), ServiceTable.metadata) == []
    rows.close()


def test_writers_queue_and_none_is_turned_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(database, "BUSY_S", 0)  # SQLite itself lets nobody wait
    rows = ServiceDatabase(f"sqlite:///{tmp_path / 'rows.sqlite'}")
    rows.migrate()
    done: list[int] = []

    def write(number: int) -> int:
        with rows.writing() as session:
            position = next_position(session, "turns")
            time.sleep(0.005)
            afterwards(session, lambda: done.append(number))
            assert number not in done, "not before it is committed"
        return position

    with ThreadPoolExecutor(16) as pool:
        positions = list(pool.map(write, range(40)))
    assert sorted(positions) == list(range(1, 41)), "none is lost, none is given out twice"
    assert sorted(done) == list(range(40))
    with suppress(RuntimeError), rows.writing() as session:
        make_project(session, "gone")
        afterwards(session, lambda: done.append(-1))
        raise RuntimeError
    assert -1 not in done
    with rows.reading() as session:
        assert session.scalar(select(CounterRow.value).where(CounterRow.name == "turns")) == 40
        assert session.scalar(select(ProjectRow)) is None
    rows.close()
