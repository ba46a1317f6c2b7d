"""Empty ledgers on SQLite, or on the server of FAREBOX_TEST_LEDGER, and changes behind a ledger's back."""

from __future__ import annotations

import os
from pathlib import Path

import sqlalchemy as sa

from pipeline.ledger.checksum import CHECKSUM, checksum
from pipeline.ledger.schema import REFUND, metadata

SERVER = os.environ.get("FAREBOX_TEST_LEDGER")
MEMORY = Path("/dev/shm")  # thousands of short-lived files: no need to wait for a disk


def empty(folder: Path) -> str:
    """The URL of a ledger with nothing in it."""
    if SERVER is None:
        return f"sqlite:///{folder / 'ledger.db'}"
    engine = sa.create_engine(SERVER)
    metadata.drop_all(engine)
    engine.dispose()
    return SERVER


def tamper(url: str, statement: str, reseal: bool = False) -> None:
    """Change the tables behind the ledger's back; with `reseal`, give every record a checksum that fits it again."""
    engine = sa.create_engine(url)
    with engine.begin() as db:
        db.execute(sa.text(statement))
        for table in metadata.sorted_tables if reseal else ():
            for row in db.execute(sa.select(table)).all() if CHECKSUM in table.c else ():
                keys = [column == value for column, value in zip(table.c, row, strict=True) if column.primary_key]
                values = row[1:-1] if table is REFUND else row[:-1]
                db.execute(sa.update(table).where(*keys).values({CHECKSUM: checksum(table, values)}))
    engine.dispose()
