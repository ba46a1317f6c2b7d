"""Sort class names, and check that the tokenizer distinguishes them.

CLIP's tokenizer repairs broken Unicode, unescapes HTML, normalises white space and lowers case, then splits a prompt
into words, single digits and punctuation. Two names that differ in nothing else give the same prompt, so that one of
the two classes can never be predicted.
"""

from __future__ import annotations

import hashlib
import html
import re
import unicodedata
from collections.abc import Iterable, Sequence

from pipeline.errors import DataError

_TOKEN = re.compile(r"'(?:s|t|re|ve|m|ll|d)|[^\W\d_]+|\d|[^\w\s]+")
"""CLIP's pattern without `_`, which is replaced by a space first."""
_NUMBERED = re.compile(r"(\D*?)([0-9]+)(\D.*)?", re.DOTALL)
_LISTED = re.compile(r"- .*|[\"'].*[\"'],?|.*,")
"""A name with the syntax of a YAML, JSON or CSV file."""
_LEADING = re.compile(r"(\S+?)[\s,;:]+\S")
SHOWN = 2
"""Number of labels that a message shows at each end of the list."""


def prompt_form(name: str) -> str:
    """Return a class name as the tokenizer reads it: names with the same form have the same prompt."""
    if not name.isascii():
        import ftfy  # slow to import, and ASCII text needs no repair

        name = ftfy.fix_text(name)
    cleaned = html.unescape(html.unescape(name)).replace("_", " ").lower()
    if (
        not cleaned.isascii()
    ):  # \d matches decimal digits only; the tokenizer splits off every number, such as a fraction
        cleaned = "".join(f" {c} " if unicodedata.category(c).startswith("N") else c for c in cleaned)
    return " ".join(_TOKEN.findall(cleaned))


def same_prompt(names: Sequence[str]) -> list[tuple[int, int]]:
    """Return the pairs of labels (first, later) whose names have the same prompt."""
    first_of: dict[str, int] = {}
    pairs = []
    for label, name in enumerate(names):
        first = first_of.setdefault(prompt_form(name), label)
        if first != label:
            pairs.append((first, label))
    return pairs


def prompt_note(names: Sequence[str]) -> str:
    """Return a line about the classes that have the same prompt; an empty string if there are none."""
    pairs = same_prompt(names)
    if not pairs:
        return ""
    first, later = (names[label] for label in pairs[0])
    return f"pairs of classes with the same prompt: {len(pairs):,}, the first is {first!r} and {later!r}"


def in_order(names: Iterable[str], kind: str) -> tuple[list[str], str]:
    """Sort class names: by number if all are numbered (after the same prefix, as c1 and 1_cat), else as text.

    Args:
        names: The names.
        kind: What they are, for messages: "class folders".

    Returns:
        The sorted names, and a description of their order.

    Raises:
        DataError: Two names are the same number, as 1 and 01.
    """
    names = sorted(names)
    matches = [_NUMBERED.fullmatch(name) for name in names]
    numbers = {name: int(match[2]) for name, match in zip(names, matches, strict=True) if match}
    prefixes = {match[1] for match in matches if match}
    mixed = f" ({len(numbers):,} of {len(names):,} are numbered)" if numbers else ""
    if not names or len(numbers) < len(names) or len(prefixes) > 1:
        return names, f"{kind} in text order{mixed}"
    name_of: dict[int, str] = {}
    for name, number in numbers.items():
        if (other := name_of.setdefault(number, name)) != name:
            if any(match and match[3] for match in matches):
                return names, f"{kind} in text order ({other!r} and {name!r} have the same number)"
            raise DataError(f"{kind} {other!r} and {name!r} are the same number: rename or merge one of them")
    return [name_of[number] for number in sorted(name_of)], f"{kind} in numeric order"


def check_names(place: str, ids: Sequence[str], names: Sequence[str]) -> None:
    """Check that class names given by a card or a file match the classes, in label order.

    Raises:
        DataError: The number of names is wrong, they are in another order than the classes, or they begin with a number
            or an id.
    """
    if len(names) != len(ids):
        raise DataError(f"{len(names)} class names are given, {place} has {len(ids)} classes: expected one for each")
    if tuple(names) == tuple(ids):
        return
    label_of = {prompt_form(own): label for label, own in enumerate(ids)}
    moved = [(i, label_of[form]) for i, form in enumerate(map(prompt_form, names)) if label_of.get(form, i) != i]
    shifted = 2 * len(moved) > len(ids) and not all(own.isdecimal() for own in ids)
    if shifted or (moved and set(map(prompt_form, names)) == set(label_of)):
        label, other = moved[0]
        raise DataError(
            f"{place}: class name {names[label]!r} is given to the class {ids[label]!r}, but is the name of label "
            f"{other}: write the names in label order ({', '.join(ids[:3])}{', ...' if len(ids) > 3 else ''})"
        )
    leading = [match[1] if (match := _LEADING.match(name)) else "" for name in names]
    numbers = [list(map(str, range(start, start + len(names)))) for start in (0, 1)]
    if len(names) > 1 and (leading in numbers or (leading == list(ids) and all(map(_has_digit, ids)))):
        raise DataError(f"{place}: the class names begin with numbers or ids ({names[0]!r}): expected only names")
    if len(names) > 1 and all(map(_LISTED.fullmatch, names)):
        raise DataError(f"{place}: the class names have quotes, commas or dashes ({names[0]!r}): expected only names")


def _has_digit(text: str) -> bool:
    return any(character.isdigit() for character in text)


def check_prompts(place: str, names: Sequence[str], allow: bool) -> None:
    """Check that no class name is empty for the tokenizer, and (without `allow`) that no two have the same prompt.

    Raises:
        DataError: Naming the first class, or the first two classes.
    """
    if empty := [label for label, name in enumerate(names) if not prompt_form(name)]:
        raise DataError(f"{place}: the name of class {empty[0]} ({names[empty[0]]!r}) has no text")
    if (pairs := same_prompt(names)) and not allow:
        first, later = pairs[0]
        more = f" ({len(pairs):,} such pairs)" if len(pairs) > 1 else ""
        raise DataError(
            f"{place} has the classes {names[first]!r} and {names[later]!r}, which have the same prompt{more}: "
            "rename or merge one, or type duplicates=allow (in the card, duplicates: allow)"
        )


def ids_digest(ids: Sequence[str]) -> str:
    """Return the digest of class ids by which a card identifies the classes that its names were written for."""
    return hashlib.sha256("\0".join(ids).encode(errors="surrogatepass")).hexdigest()[:16]


def distinct_ids(ids: Sequence[str]) -> tuple[str, ...]:
    """Return the class ids, with the label appended to those that occur more than once: crane#134."""
    return tuple(f"{own}#{label}" if ids.count(own) > 1 else own for label, own in enumerate(ids))


def ends(ids: Sequence[str], names: Sequence[str]) -> str:
    """Return the labels and classes at both ends of the list: '0 = n01 tench, ..., 9 = n10 cock'."""
    labels = list(range(len(ids)))
    shown = [f"{i} = {ids[i]}" + (f" ({names[i]})" if names[i] != ids[i] else "") for i in labels]
    return ", ".join(shown if len(ids) <= 2 * SHOWN else [*shown[:SHOWN], "...", *shown[-SHOWN:]])
