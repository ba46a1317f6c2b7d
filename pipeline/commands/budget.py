"""`farebox budget`: show the accounts and reservations of a ledger, change a limit, release reservations."""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from pipeline.budget import LIMITED_UNITS, Limits
from pipeline.config import values as checks
from pipeline.config.compose import compose
from pipeline.errors import USD, ConfigError, DamagedFile, LedgerError, dollars
from pipeline.files import strict_json
from pipeline.ledger.ledger import Ledger
from pipeline.ledger.records import Reservation
from pipeline.sweep.purses import money_lines, money_record
from pipeline.sweep.run_ledger import SWEEP_PREFIX, check_name, existing_ledger
from pipeline.sweep.storage import alone, held
from pipeline.sweep.storage_id import host_name, read_id

RECENT_S = 600.0
"""A storage on another machine that was charged in the last so many seconds counts as running."""
LEDGER_KEYS = ("url", "storage", "sweep", "budget.global.url")
"""Keys that name a ledger."""
SETTABLE = (*LIMITED_UNITS, USD)
"""Keys of the limits."""


@dataclass(frozen=True)
class Command:
    """Parsed arguments of a verb."""

    ledger: Ledger
    names: list[str]
    limits: dict[str, int | None]
    """By unit; `USD` in micro-dollars."""


def run(verb: str, arguments: Sequence[str], as_json: bool) -> str:
    """Run `show`, `set` or `release` and return the text to print.

    Raises:
        ConfigError: the arguments are wrong, or a run may be using the storage to release.
        LedgerError: the ledger cannot be read or written.
    """
    command = _parse(verb, arguments)
    with contextlib.closing(command.ledger):
        record = {"show": _show, "set": _set, "release": _release}[verb](command)
    if as_json:
        return strict_json(record, indent=1)
    return {"show": _show_text, "set": _set_text, "release": _release_text}[verb](record)


def _parse(verb: str, arguments: Sequence[str]) -> Command:
    names, limits, overrides = [], dict[str, int | None](), []
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if not equals:
            names.append(argument)
        elif verb == "set" and key in SETTABLE:
            if key in limits:
                raise ConfigError(f"farebox budget set: {key} is given twice")
            limits[key] = _limit(key, value)
        elif key in LEDGER_KEYS:
            overrides.append(f"budget.global.{argument}" if key == "url" else argument)
        else:
            raise ConfigError(f"farebox budget {verb}: no key named {key!r} (known: {', '.join(_keys(verb))})")
    if not overrides:
        raise ConfigError(f"farebox budget {verb}: name a ledger with url=URL, storage=DIR or sweep=NAME")
    if verb == "set" and (len(names) != 1 or not limits):
        raise ConfigError(
            "farebox budget set: expected NAME requests=N images=N usd=N url=URL, with one of the limits or more"
        )
    if verb == "show" and names:
        raise ConfigError(f"farebox budget show: {names[0]!r} is not KEY=VALUE; it takes only the name of a ledger")
    return Command(existing_ledger(compose(overrides)), names, limits)


def _keys(verb: str) -> tuple[str, ...]:
    return (*SETTABLE, *LEDGER_KEYS) if verb == "set" else LEDGER_KEYS


def _limit(unit: str, value: str) -> int | None:
    if value == "none":
        return None
    if unit == USD:
        return checks.dollars(unit, value)
    if not re.fullmatch("0|[1-9][0-9]{0,18}", value):
        raise ConfigError(f"{unit}={value[:40]}: expected a whole number in decimal digits, or none")
    return int(value)


def _show(command: Command) -> dict[str, Any]:
    ledger = command.ledger
    accounts = [
        {"name": a.name, "limits": asdict(a.limits), "reserved": asdict(a.reserved), "spent": asdict(a.spent)}
        for a in ledger.accounts()
    ]
    purses = ledger.money.purses()
    return {
        "ledger": ledger.name,
        "accounts": accounts,
        "money": [money_record(purse) for purse in purses],
        "money_lines": money_lines(purses),
        "reservations": [_record(r) for r in ledger.reservations()],
    }


def _record(reservation: Reservation) -> dict[str, Any]:
    place = reservation.place
    return {
        "storage": reservation.storage,
        "path": place.path if place else None,
        "host": place.host if place else None,
        "since": place.since if place else None,
        "last_charge": reservation.last_charge,
        "open_trials": reservation.trials,
        "reserved": {name: asdict(bill) for name, bill in reservation.reserved.items()},
        "state": state(reservation),
    }


def state(reservation: Reservation) -> str:
    """Return the state of a storage with open trials.

    running     a run holds it
    stopped     no run holds it; the command that started the trials continues them
    deleted     its folder does not exist, or contains another storage
    elsewhere   it is on another machine
    unknown     no run registered it
    """
    place = reservation.place
    if place is None:
        return "unknown"
    if place.host != host_name():
        return "elsewhere"
    folder = Path(place.path)
    try:
        if read_id(folder).id != reservation.storage:
            return "deleted"
    except ConfigError:
        return "deleted"
    except (OSError, DamagedFile):  # it exists and cannot be read
        pass
    return "running" if held(folder) else "stopped"


def _show_text(record: dict[str, Any]) -> str:
    text = [f"ledger {record['ledger']}"]
    for account in record["accounts"]:
        name = account["name"]
        kind = "ceiling of sweep" if name.startswith(SWEEP_PREFIX) else "budget"
        limit = Limits(**account["limits"]).text or "none"
        text.append(f"{kind} {name.removeprefix(SWEEP_PREFIX)}: limit {limit}; {_amounts(account)}")
        for reservation in record["reservations"]:
            if name in reservation["reserved"]:
                bill = reservation["reserved"][name]
                text.append(
                    f"  {bill['requests']:,} requests and {bill['images']:,} images reserved by {_owner(reservation)}"
                )
    text += record["money_lines"]
    if not record["accounts"]:
        text.append("no accounts")
    return "\n".join(text)


def _amounts(account: dict[str, Any]) -> str:
    return "; ".join(
        f"{account[kind]['requests']:,} requests and {account[kind]['images']:,} images {kind}"
        for kind in ("reserved", "spent")
    )


def _owner(record: dict[str, Any]) -> str:
    where = f" at {record['path']} on {record['host']}" if record["path"] else ""
    since = f" since {_clock(record['since'])}" if record["since"] else ""
    last = f", last charge {_clock(record['last_charge'])}" if record["last_charge"] else ", no charge yet"
    return (
        f"{record['open_trials']:,} open trials of storage {record['storage']}{where}{since}{last} ({record['state']})"
    )


def _clock(seconds: float) -> str:
    return datetime.fromtimestamp(seconds).astimezone().isoformat(timespec="seconds", sep=" ")


def _set(command: Command) -> dict[str, Any]:
    ledger, (name,) = command.ledger, command.names
    check_name(name)
    before, usd = ledger.limits(name), ledger.money.limit(name)
    limits = replace(before or Limits(), **{unit: n for unit, n in command.limits.items() if unit != USD})
    try:
        if before is None:
            ledger.open_account(name, limits)
        else:
            ledger.set_limits(name, limits)
        if USD in command.limits:
            ledger.money.set_limit(name, command.limits[USD])
    except LedgerError as error:
        raise ConfigError(
            f"{error}; reservations are released when their trials end, or with farebox budget release"
        ) from error
    record = {"budget": name, "created": before is None}
    now = _limits(limits, command.limits.get(USD, usd))
    return record | {"before": _limits(before or Limits(), usd), "limits": now}


def _limits(limits: Limits, usd: int | None) -> dict[str, int | float | None]:
    """Return limits by unit, money in dollars."""
    return asdict(limits) | {USD: None if usd is None else usd / 1e6}


def _limits_text(limits: dict[str, Any]) -> str:
    units = Limits(limits["requests"], limits["images"]).text
    money = "" if limits[USD] is None else dollars(round(limits[USD] * 1e6))
    return " and ".join(filter(None, (units, money))) or "none"


def _set_text(record: dict[str, Any]) -> str:
    limit = _limits_text(record["limits"])
    if record["created"]:
        return f"created budget {record['budget']}: limit {limit}"
    return f"budget {record['budget']}: limit {limit}; before: {_limits_text(record['before'])}"


def _release(command: Command) -> dict[str, Any]:
    ledger = command.ledger
    reservations = {r.storage: r for r in ledger.reservations()}
    for name in command.names:
        if name not in reservations:
            known = ", ".join(reservations) or "none"
            raise ConfigError(
                f"no open trials of a storage {name!r} in {ledger.name}; storages with open trials: {known}"
            )
        _refuse_running(reservations[name])
    deleted = [name for name, reservation in reservations.items() if state(reservation) == "deleted"]
    chosen = list(dict.fromkeys(command.names or deleted))
    for name in chosen:
        reservation = reservations[name]
        with contextlib.ExitStack() as lock:
            if state(reservation) == "stopped" and reservation.place is not None:
                lock.enter_context(alone(Path(reservation.place.path)))
            for trial in ledger.trials(name):
                if trial.open:
                    ledger.release(name, trial.trial)
            ledger.money.release(name)
    kept = [_record(r) for name, r in reservations.items() if name not in chosen]
    return {"ledger": ledger.name, "released": [_record(reservations[name]) for name in chosen], "kept": kept}


def _refuse_running(reservation: Reservation) -> None:
    """Raise ConfigError if a run may still charge the trials of a storage."""
    status, name = state(reservation), reservation.storage
    if status == "running" and reservation.place is not None:
        raise ConfigError(f"a run is using storage {name} at {reservation.place.path}: stop it, or wait until it ends")
    started = reservation.place.since if reservation.place else 0.0
    age = time.time() - max(reservation.last_charge or 0.0, started)
    if status in ("elsewhere", "unknown") and abs(age) < RECENT_S:
        raise ConfigError(
            f"storage {name} was charged or opened {age:.0f} s ago, and not on this machine: a run may be using it; "
            f"stop the run, and release the storage {RECENT_S / 60:.0f} minutes after its last charge"
        )


def _release_text(record: dict[str, Any]) -> str:
    text = [f"released: {_owner(r)}" for r in record["released"]] or ["nothing released"]
    text += [f"kept: {_owner(r)}" for r in record["kept"]]
    if record["kept"]:
        text.append("to release one that is kept: farebox budget release STORAGE, with its id")
    return "\n".join(text)
