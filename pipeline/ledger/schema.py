"""Tables and transactions of the ledger, on SQLite or PostgreSQL.

Trials and accounts store running totals, so that a charge scans no table; audit.py compares them with sums of the
charges. A trial's total has one bucket for each kind of charge:

  adapt, validate, tune   paid from the trial's allotment
  curve, evaluate         recorded without a limit
  replay                  diverged adapt, validate or tune calls, paid from what the trial's accounts have free
  replay_unlimited        diverged curve or evaluate calls, recorded without a limit; reported as part of `replay`

The last column of each table is the record's checksum (checksum.py).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import sqlalchemy as sa
from sqlalchemy import BigInteger, Column, ForeignKey, Integer, MetaData, Table, Text, select
from sqlalchemy.dialects import sqlite
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.pool import StaticPool

from pipeline.budget import BUDGETED_PHASES, LIMITED_UNITS, UNITS, Phase
from pipeline.errors import ConfigError, LedgerError, first_line, masked, one_line
from pipeline.ledger.checksum import CHECKSUM, LATER, RESTORE, DamagedRecord

SCHEMA = 2
BUSY_S = 30.0
"""How long a transaction waits for one of another process before it fails."""
DAMAGED = f" (damaged): {RESTORE}"
OPENING = 0xFA2EB0C5
"""Number of the PostgreSQL lock held while tables are created."""
BUCKETS = (*(phase.value for phase in Phase if phase is not Phase.TUNE), "replay_unlimited", Phase.TUNE.value)
"""In the order of the columns: the last one was added later."""

Number = BigInteger().with_variant(Integer, "sqlite")  # SQLite numbers rows only in INTEGER columns, also of 64 bits


def bucket(phase: Phase, diverged: bool) -> str:
    """Return the column group of a trial to which a charge is added: its phase, or a replay group if it diverged."""
    if not diverged:
        return phase.value
    return "replay" if phase in BUDGETED_PHASES else "replay_unlimited"


def _checksum() -> Column[int]:
    return Column(CHECKSUM, BigInteger, nullable=False)


def _counts(*names: str) -> list[Column[int]]:
    return [Column(name, BigInteger, nullable=False, server_default="0") for name in names]


metadata = MetaData()
META = Table("ledger_meta", metadata, Column("key", Text, primary_key=True), Column("value", Text, nullable=False))
ACCOUNT = Table(
    "ledger_account",
    metadata,
    Column("name", Text, primary_key=True),
    *(Column(f"limit_{unit}", BigInteger) for unit in LIMITED_UNITS),
    *_counts(*(f"held_{unit}" for unit in LIMITED_UNITS), *(f"spent_{unit}" for unit in UNITS)),
    _checksum(),
)
TRIAL = Table(
    "ledger_trial",
    metadata,
    Column("no", Number, primary_key=True),
    Column("storage", Text, nullable=False),
    Column("trial", Text, nullable=False),
    Column("open", sa.Boolean, nullable=False),
    *(Column(f"limit_{unit}", BigInteger) for unit in LIMITED_UNITS),
    *_counts(*(f"{name}_{unit}" for name in BUCKETS for unit in UNITS)),
    _checksum(),
    sa.UniqueConstraint("storage", "trial"),
    info={LATER: len(UNITS)},
)
TUNE_COLUMNS = [f"{Phase.TUNE.value}_{unit}" for unit in UNITS]
"""Columns of the trial table that a ledger of an earlier version lacks. They are added to it."""
MEMBER = Table(
    "ledger_member",
    metadata,
    Column("trial_no", ForeignKey("ledger_trial.no"), primary_key=True),
    Column("account", ForeignKey("ledger_account.name"), primary_key=True),
    _checksum(),
)
CHARGE = Table(
    "ledger_charge",
    metadata,
    Column("trial_no", ForeignKey("ledger_trial.no"), primary_key=True),
    Column("call", BigInteger, primary_key=True),
    Column("digest", Text, primary_key=True),
    Column("phase", Text, nullable=False),
    Column("diverged", sa.Boolean, nullable=False),
    *_counts(*UNITS),
    Column("at", sa.Float, nullable=False),
    _checksum(),
)
REFUND = Table(
    "ledger_refund",
    metadata,
    Column("no", Number, primary_key=True),
    *(Column(c.name, c.type, nullable=False) for c in CHARGE.columns if c.name != CHECKSUM),
    Column("refunded_at", sa.Float, nullable=False),
    _checksum(),
)
STORAGE = Table(
    "ledger_storage",
    metadata,
    Column("storage", Text, primary_key=True),
    Column("path", Text, nullable=False),
    Column("host", Text, nullable=False),
    Column("since", sa.Float, nullable=False),
    _checksum(),
)
"""Where each storage was when its latest run opened the ledger, and when that was."""

PURSE = Table(
    "ledger_purse",
    metadata,
    Column("name", Text, primary_key=True),
    Column("limit_micro_usd", BigInteger),
    _checksum(),
)
"""The money of an account (money.py)."""
PART = Table(
    "ledger_part",
    metadata,
    Column("storage", Text, primary_key=True),
    Column("purse", Text, primary_key=True),
    *(Column(name, BigInteger, nullable=False) for name in ("reserved", "settled", "unsettled")),
    _checksum(),
)
"""What each storage reserved on a purse and paid from it."""
PAYMENT = Table(
    "ledger_payment",
    metadata,
    Column("storage", Text, primary_key=True),
    Column("call_id", Text, primary_key=True),
    Column("trial", Text, nullable=False),
    Column("upper", BigInteger, nullable=False),
    Column("price", BigInteger),
    Column("at", sa.Float, nullable=False),
    Column("settled_at", sa.Float),
    _checksum(),
)
"""The payment of each HTTP call: its upper bound, and its price once it is known."""
MONEY = (PURSE, PART, PAYMENT)
"""Tables that a ledger of an earlier version lacks. They are created in it, once."""


class Database:
    """Transactions on one database. Errors of SQLAlchemy are raised as LedgerError with one line."""

    def __init__(self, url: str) -> None:
        try:
            parsed = sa.make_url(url)
            self.name = parsed.render_as_string(hide_password=True)
            self.dialect = parsed.get_backend_name()
            if self.dialect not in ("sqlite", "postgresql"):
                raise LedgerError(f"the ledger {self.name} cannot be used: expected sqlite:///PATH or postgresql://...")
            self.in_memory = self.dialect == "sqlite" and parsed.database in (None, "", ":memory:")
            options: dict[str, Any] = {"poolclass": StaticPool} if self.in_memory else {}
            if self.dialect == "sqlite":
                options["connect_args"] = {"timeout": BUSY_S, "check_same_thread": False}
            self._writer = sa.create_engine(parsed, **options)
        except (SQLAlchemyError, ImportError) as exc:
            raise LedgerError(f"the ledger {url.split('@')[-1]!r} cannot be used: {_first_line(exc)}") from exc
        # SQLite has one writer at a time: threads of this process wait here instead of polling the file's lock.
        self._turn = threading.Lock() if self.dialect == "sqlite" else nullcontext()
        if self.dialect == "sqlite":
            sa.event.listen(self._writer, "connect", _prepare_memory if self.in_memory else _prepare_file)
            sa.event.listen(self._writer, "begin", _begin)
            self._reader = self._writer.execution_options(farebox_begin="BEGIN")
        else:
            self._reader = self._writer.execution_options(isolation_level="REPEATABLE READ")
        self._create()

    def _create(self) -> None:
        with self.write() as db:
            if self.dialect == "postgresql":  # its CREATE TABLE IF NOT EXISTS fails when two sessions run it at once
                db.execute(select(sa.func.pg_advisory_xact_lock(OPENING)))
            present = {name for name in sa.inspect(db).get_table_names() if name in metadata.tables}
            if not present:
                metadata.create_all(db)
                db.execute(sa.insert(META), {"key": "schema", "value": str(SCHEMA)})
            elif META.name not in present:
                raise LedgerError(f"the ledger {self.name} has no table {META.name}{DAMAGED}")
            schema = db.execute(select(META.c.value).where(META.c.key == "schema")).scalar_one_or_none()
            if schema != str(SCHEMA):
                raise ConfigError(
                    f"the ledger {self.name} has schema {schema}, and this version of farebox reads {SCHEMA}: another "
                    "version made it; use another storage=DIR or budget.global.url, or delete it"
                )
            absent = sorted(set(metadata.tables) - present) if present else []
            if set(absent) == {table.name for table in MONEY} and not _marked(db):
                metadata.create_all(db, MONEY)
                absent = []
            if absent:
                raise LedgerError(f"the ledger {self.name} has no table {', '.join(absent)}{DAMAGED}")
            if not _marked(db):
                db.execute(sa.insert(META), {"key": "money", "value": "1"})
            columns = {column["name"] for column in sa.inspect(db).get_columns(TRIAL.name)}
            for name in (name for name in TUNE_COLUMNS if name not in columns):
                db.execute(sa.text(f"ALTER TABLE {TRIAL.name} ADD COLUMN {name} BIGINT NOT NULL DEFAULT 0"))

    @contextmanager
    def write(self) -> Iterator[sa.Connection]:
        """Open a transaction on the latest committed state; it is committed unless an exception is raised."""
        with self._transaction(self._writer) as db:
            yield db

    @contextmanager
    def read(self) -> Iterator[sa.Connection]:
        """Open a consistent snapshot. It does not wait for writers, and they do not wait for it."""
        with self._transaction(self._reader) as db:
            yield db

    @contextmanager
    def _transaction(self, engine: sa.Engine) -> Iterator[sa.Connection]:
        try:
            with self._turn, engine.begin() as db:
                yield db
        except SQLAlchemyError as exc:
            raise LedgerError(f"the ledger {self.name} cannot be used: {_first_line(exc)}{_advice(exc)}") from exc
        except DamagedRecord as exc:
            raise LedgerError(f"the ledger {self.name} is damaged: {exc}; {RESTORE}") from exc
        except UnicodeError as exc:  # SQLite quotes the damaged bytes in its own message
            raise LedgerError(f"the ledger {self.name} cannot be used{DAMAGED}") from exc

    def check(self) -> None:
        """Verify the structure and the indexes of a SQLite file. Raises LedgerError when it is damaged."""
        if self.dialect == "sqlite":
            with self.read() as db:
                result = str(db.exec_driver_sql("PRAGMA integrity_check(1)").scalar_one())
                if result != "ok":
                    raise LedgerError(f"the ledger {self.name} is malformed{DAMAGED}: {one_line(result)}")

    def insert_new(self, table: Table) -> sa.Insert:
        """Return an INSERT that does nothing for rows that exist."""
        if self.dialect == "sqlite":
            return sqlite.insert(table).on_conflict_do_nothing()
        from sqlalchemy.dialects import postgresql  # imports the drivers of PostgreSQL

        return postgresql.insert(table).on_conflict_do_nothing()

    def close(self) -> None:
        """Close the connections; the next transaction opens new ones."""
        self._writer.dispose()


def _marked(db: sa.Connection) -> bool:
    """Return whether the tables of money were created, so that a ledger without them is damaged."""
    return db.execute(select(META.c.value).where(META.c.key == "money")).scalar_one_or_none() is not None


def _first_line(exc: BaseException) -> str:
    """Return the first line of the database's own message."""
    return masked(first_line(getattr(exc, "orig", None) or exc))


_DAMAGE = ("malformed", "not a database", "no such table", "no such column", "Could not decode", "unsupported file")
"""Parts of SQLite's messages about a file whose bytes were changed."""


def _advice(exc: BaseException) -> str:
    """Return what the user can do, to append to a message; empty when nothing is known."""
    message = _first_line(exc)
    if any(sign in message for sign in _DAMAGE):
        return DAMAGED
    if "full" in message or "readonly" in message or "disk I/O" in message:
        return ": make room, or make it writable, and type the same command again; it continues"
    return ""


def _prepare_memory(connection: Any, _record: object) -> None:
    connection.isolation_level = None  # _begin starts transactions, not sqlite3


def _prepare_file(connection: Any, _record: object) -> None:
    connection.isolation_level = None
    connection.execute("PRAGMA synchronous=FULL")  # committed charges survive a power failure
    until = time.monotonic() + BUSY_S
    while True:
        try:
            (mode,) = connection.execute("PRAGMA journal_mode=WAL").fetchone()
            break
        except connection.OperationalError as exc:  # changing the mode does not wait for other connections
            if "locked" not in str(exc) or time.monotonic() > until:
                raise
            time.sleep(0.01)
    if mode != "wal":
        raise LedgerError(f"SQLite cannot write a write-ahead log there (journal mode {mode}); use a local disk")


def _begin(connection: sa.Connection) -> None:
    connection.exec_driver_sql(connection.get_execution_options().get("farebox_begin", "BEGIN IMMEDIATE"))
