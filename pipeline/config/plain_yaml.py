"""Read YAML without silent conversions: a value is read as it was typed, or rejected.

Files and command-line values are read by the same rules, a stricter form of YAML 1.2:

- `null`, `Null`, `NULL`, an empty value and, in files, `~` are null. `true`, `True`, `TRUE`, `false`, `False` and
  `FALSE` are booleans.
- A plain scalar is a number if Python writes the number in the same way: 10, -3, 0.5, 1e-05. Everything else is text:
  010, 1_0, 0x10, 1:5, 1e3, .inf, 2024-01-01, yes, off. A key that expects a number rejects such text.
- A key is text. Duplicate keys, anchors, aliases, tags and a second document are rejected.

Files are untrusted: they must be UTF-8 of at most MAX_BYTES without control characters, nested at most MAX_DEPTH deep.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from pipeline.errors import ConfigError, one_line
from pipeline.untrusted import read_regular, text_problem

MAX_BYTES = 2**20
"""Maximum size of a file. Long lists of class names belong in a text file, which a card may name."""
MAX_DEPTH = 20
"""Maximum depth of nested mappings and lists."""
NULL = frozenset(("", "~", "null", "Null", "NULL"))
TRUE = frozenset(("true", "True", "TRUE"))
FALSE = frozenset(("false", "False", "FALSE"))
NUMBER = re.compile(r"-?((0|[1-9][0-9]{0,18})(\.[0-9]*)?|\.[0-9]+)([eE][-+]?[0-9]{1,3})?")
"""A number as it may be typed where a number is expected."""


def read_file(path: Path) -> Any:
    """Read a YAML file as plain data: dicts with text keys, lists, text, numbers, booleans and None.

    Raises:
        ConfigError: The file cannot be read, or is not YAML that this module accepts.
    """
    try:
        text = read_regular(path, MAX_BYTES).decode("utf-8-sig")
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    try:
        return _parse(text)[0]
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"{path} is not valid YAML: {_reason(error)}") from error


def read_value(key: str, text: str) -> Any:
    """Read the value of a KEY=VALUE override.

    `[...]`, `{...}` and quoted values are read as YAML. Anything else is a scalar, in which `#`, colons and spaces have
    no special meaning.

    Raises:
        ConfigError: The value is not valid; the message has the key.
    """
    if problem := text_problem(text):
        raise ConfigError(f"{key}: the value has {problem}")
    if text[:1] in ("[", "{"):
        try:
            value, end = _parse(text)
        except (yaml.YAMLError, ValueError) as error:
            raise ConfigError(f"cannot read {key}={text[:80]}: {_reason(error)}") from error
        if rest := text[end:].strip():
            raise ConfigError(f"cannot read {key}={text[:80]}: {rest[:40]!r} follows the closing bracket")
        return value
    if len(text) > 1 and text[0] == text[-1] and text[0] in "\"'":
        try:
            value, end = _parse(text)
        except (yaml.YAMLError, ValueError):
            return text
        return value if end == len(text) and isinstance(value, str) else text
    return text if text == "~" else scalar(text)  # on the command line ~ is the home folder, not null


def scalar(text: str) -> Any:
    """Convert a plain scalar to None, a boolean or a number, if it is written as Python would write it."""
    if text in NULL:
        return None
    if text in TRUE or text in FALSE:
        return text in TRUE
    if NUMBER.fullmatch(text):
        number = float(text) if set(text) & set(".eE") else int(text)
        if str(number) == text and math.isfinite(number):
            return number
    return text


@dataclass
class _Open:
    """A list or mapping whose end has not been read yet."""

    value: list[Any] | dict[str, Any]
    key: str | None = None
    """In a mapping: the key of the next value."""


@dataclass
class _Builder:
    """Build plain data from YAML events, without recursion."""

    open: list[_Open] = field(default_factory=list)
    documents: int = 0
    value: Any = None
    end: int = 0
    """Position in the text at which the value ends."""

    def add(self, event: Any) -> None:
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
            raise ValueError(f"{_place(event)}: anchors and aliases are not read")
        if getattr(event, "tag", None):
            raise ValueError(f"{_place(event)}: tags ({event.tag[:40]}) are not read")
        if isinstance(event, yaml.DocumentStartEvent):
            self.documents += 1
            if self.documents > 1:
                raise ValueError(f"{_place(event)}: a second document")
        elif isinstance(event, yaml.ScalarEvent):
            self._scalar(event)
        elif isinstance(event, yaml.SequenceStartEvent | yaml.MappingStartEvent):
            value: list[Any] | dict[str, Any] = [] if isinstance(event, yaml.SequenceStartEvent) else {}
            self._put(value, event)
            self.open.append(_Open(value))
            if len(self.open) > MAX_DEPTH:
                raise ValueError(f"{_place(event)}: nested more than {MAX_DEPTH} deep")
        elif isinstance(event, yaml.SequenceEndEvent | yaml.MappingEndEvent):
            self.open.pop()
            self.end = event.end_mark.index

    def _scalar(self, event: yaml.ScalarEvent) -> None:
        if problem := text_problem(event.value, "\n\t"):
            raise ValueError(f"{_place(event)}: {problem}")
        self.end = event.end_mark.index
        top = self.open[-1] if self.open else None
        if top is not None and isinstance(top.value, dict) and top.key is None:
            if event.value in top.value:
                raise ValueError(f"{_place(event)}: the key {event.value!r} occurs twice")
            top.key = event.value
        else:
            self._put(scalar(event.value) if event.style is None else event.value, event)

    def _put(self, value: Any, event: Any) -> None:
        if not self.open:
            self.value = value
            return
        top = self.open[-1]
        if isinstance(top.value, list):
            top.value.append(value)
        elif top.key is None:
            raise ValueError(f"{_place(event)}: a list or a mapping as a key")
        else:
            top.value[top.key], top.key = value, None


def _parse(text: str) -> tuple[Any, int]:
    """Return the data, and the position at which its text ends."""
    builder = _Builder()
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        builder.add(event)
    return builder.value, builder.end


def _place(event: Any) -> str:
    return f"line {event.start_mark.line + 1}"


def _reason(error: Exception) -> str:
    """Return the message of an error in one line, without the excerpt that YAML's errors include."""
    problem, mark = getattr(error, "problem", None), getattr(error, "problem_mark", None)
    return one_line(f"{problem} in line {mark.line + 1}" if problem and mark else str(error))[:160]
