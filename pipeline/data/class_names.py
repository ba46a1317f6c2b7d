"""Class names: their order, and whether the tokenizer can tell them apart.

CLIP's tokenizer repairs broken Unicode, unescapes HTML, folds white space and lowers case, then splits a prompt into
words, single digits and punctuation. Two names that differ in nothing else give one prompt, so that one of the two
classes can never be predicted.
"""

from __future__ import annotations

import hashlib
import html
import re
import unicodedata
from collections.abc import Iterable, Sequence

from pipeline.errors import DataError

_TOKEN = re.compile(r"'(?:s|t|re|ve|m|ll|d)|[^\W\d_]+|\d|[^\w\s]+")
"""CLIP's pattern; `_` does not occur, since names are read with spaces in its place."""
_NUMBERED = re.compile(r"(\D*?)([0-9]+)(\D.*)?", re.DOTALL)
_LISTED = re.compile(r"- .*|[\"'].*[\"'],?|.*,")
"""A name as YAML, JSON or CSV files write it."""
_LEADING = re.compile(r"(\S+?)[\s,;:]+\S")
SHOWN = 2
"""Labels that are shown at each end of the list."""


def prompt_form(name: str) -> str:
    """Return a class name as the tokenizer sees it: two names with one form have one prompt."""
    if not name.isascii():
        import ftfy  # slow to import; ASCII text needs no repair

        name = ftfy.fix_text(name)
    cleaned = html.unescape(html.unescape(name)).replace("_", " ").lower()
    if not cleaned.isascii():  # \d is decimal digits only: the tokenizer takes any number, such as a fraction, alone
        cleaned = "".join(f" {c} " if unicodedata.category(c).startswith("N") else c for c in cleaned)
    return " ".join(_TOKEN.findall(cleaned))


def same_prompt(names: Sequence[str]) -> list[tuple[int, int]]:
    """Return the pairs of labels (first, later) whose names have one prompt."""
    first_of: dict[str, int] = {}
    pairs = []
    for label, name in enumerate(names):
        first = first_of.setdefault(prompt_form(name), label)
        if first != label:
            pairs.append((first, label))
    return pairs


def in_order(names: Iterable[str], kind: str) -> tuple[list[str], str]:
    """Sort class names: by number if all are numbered (after one common prefix, as c1 and 1_cat), else as text.

    Returns:
        The sorted names, and a description of their order; `kind` says what they are, as in "class folders".

    Raises:
        DataError: two names have one number and nothing else, as 1 and 01.
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
                return names, f"{kind} in text order ({other!r} and {name!r} have one number)"
            raise DataError(f"{kind} {other!r} and {name!r} are the same number: rename or merge one of them")
    return [name_of[number] for number in sorted(name_of)], f"{kind} in numeric order"


def check_names(place: str, ids: Sequence[str], names: Sequence[str]) -> None:
    """Check that class names given by a card or a file fit the classes, in label order.

    Raises:
        DataError: another count, names in another order than the classes, or names that begin with a number or an id.
    """
    if len(names) != len(ids):
        raise DataError(f"{len(names)} class names are given, {place} has {len(ids)} classes: wanted one for each")
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
        raise DataError(f"{place}: the class names begin with numbers or ids ({names[0]!r}): wanted the names alone")
    if len(names) > 1 and all(map(_LISTED.fullmatch, names)):
        raise DataError(f"{place}: the class names have quotes, commas or dashes ({names[0]!r}): wanted names alone")


def _has_digit(text: str) -> bool:
    return any(character.isdigit() for character in text)


def check_prompts(place: str, names: Sequence[str], allow: bool) -> None:
    """Check that no class name is empty for the tokenizer, and that no two have one prompt unless `allow`.

    Raises:
        DataError: naming the first class, or the first two classes.
    """
    if empty := [label for label, name in enumerate(names) if not prompt_form(name)]:
        raise DataError(f"{place}: the name of class {empty[0]} ({names[empty[0]]!r}) has no text")
    if (pairs := same_prompt(names)) and not allow:
        first, later = pairs[0]
        more = f" ({len(pairs):,} such pairs)" if len(pairs) > 1 else ""
        raise DataError(
            f"{place} has the classes {names[first]!r} and {names[later]!r}, which have one prompt{more}: rename or "
            "merge one, or type duplicates=allow (in the card, duplicates: allow)"
        )


def ids_digest(ids: Sequence[str]) -> str:
    """Return what a card states of the classes that its class names were written for."""
    return hashlib.sha256("\0".join(ids).encode(errors="surrogatepass")).hexdigest()[:16]


def distinct_ids(ids: Sequence[str]) -> tuple[str, ...]:
    """Return the ids of classes with the label added to those that occur twice, as in crane#134."""
    return tuple(f"{own}#{label}" if ids.count(own) > 1 else own for label, own in enumerate(ids))


def ends(ids: Sequence[str], names: Sequence[str]) -> str:
    """Describe which label each class has, at both ends of the list: '0 = n01 tench, ..., 9 = n10 cock'."""
    labels = list(range(len(ids)))
    shown = [f"{i} = {ids[i]}" + (f" ({names[i]})" if names[i] != ids[i] else "") for i in labels]
    return ", ".join(shown if len(ids) <= 2 * SHOWN else [*shown[:SHOWN], "...", *shown[-SHOWN:]])
