"""Class names are sorted by number, compared as the tokenizer sees them, and kept with their classes."""

from __future__ import annotations

import pytest
from open_clip import tokenize

from pipeline.data.layouts.class_names import (
    check_names,
    check_prompts,
    distinct_ids,
    ends,
    in_order,
    prompt_form,
    same_prompt,
)
from pipeline.errors import DataError

ALIKE = [
    ("box", "Box"),
    ("arrow", "arrow "),
    ("hot dog", "hot_dog"),
    ("hot dog", "hot \t dog"),
    ("R&B", "R&amp;B"),
    ("R&B", "R&amp;amp;B"),
    ("caf\u00e9", "cafe\u0301"),
    ("caf\u00e9", "caf&eacute;"),
    ("class1", "class 1"),
    ("\u00bd cup", "\u00bdcup"),
    ("ice-cream", "ice - cream"),
    ("\ufeffarrow", "arrow"),
    ("\uff42ox", "box"),
]
APART = [("box", "boxes"), ("hot dog", "hotdog"), ("C", "C++"), ("1", "11"), ("it's", "it s"), ("F-16", "F 16")]


@pytest.mark.parametrize(("one", "other"), ALIKE)
def test_names_with_the_same_prompt_have_the_same_form(one: str, other: str) -> None:
    assert prompt_form(one) == prompt_form(other)
    prompts = [f"a photo of a {name.replace('_', ' ')}." for name in (one, other)]
    assert tokenize(prompts)[0].tolist() == tokenize(prompts)[1].tolist()


@pytest.mark.parametrize(("one", "other"), APART)
def test_names_with_different_prompts_have_different_forms(one: str, other: str) -> None:
    assert prompt_form(one) != prompt_form(other)
    assert tokenize([one])[0].tolist() != tokenize([other])[0].tolist()


def test_two_classes_with_the_same_prompt_are_rejected_unless_allowed() -> None:
    names = ("missile", "sunglasses", "Missile", "sunglasses")
    assert same_prompt(names) == [(0, 2), (1, 3)]
    with pytest.raises(DataError, match=r"'missile' and 'Missile', which have the same prompt \(2 such pairs\)"):
        check_prompts("here", names, allow=False)
    check_prompts("here", names, allow=True)
    with pytest.raises(DataError, match=r"the name of class 1 \('_ '\) has no text"):
        check_prompts("here", ("cat", "_ "), allow=True)
    assert distinct_ids(("crane", "cat", "crane")) == ("crane#0", "cat", "crane#2")


@pytest.mark.parametrize(
    ("names", "wanted", "order"),
    [
        (map(str, range(12)), [*map(str, range(12))], "folders in numeric order"),
        (["010", "9", "001"], ["001", "9", "010"], "folders in numeric order"),
        (["c10", "c9", "c1"], ["c1", "c9", "c10"], "folders in numeric order"),
        (["10", "9", "cat"], ["10", "9", "cat"], "folders in text order (2 of 3 are numbered)"),
        (["a1", "b10", "a9"], ["a1", "a9", "b10"], "folders in text order (3 of 3 are numbered)"),
        (["10_dog", "1_cat", "2_fox"], ["1_cat", "2_fox", "10_dog"], "folders in numeric order"),
        (["7-2", "1", "7-1"], ["1", "7-1", "7-2"], "folders in text order ('7-1' and '7-2' have the same number)"),
        (["dog", "Cat"], ["Cat", "dog"], "folders in text order"),
        ([], [], "folders in text order"),
    ],
)
def test_whole_numbers_are_sorted_by_number_and_everything_else_as_text(
    names: list[str], wanted: list[str], order: str
) -> None:
    assert in_order(names, "folders") == (wanted, order)


@pytest.mark.parametrize("names", [("1", "01"), ("c07", "c7")])
def test_two_names_with_the_same_number_are_rejected(names: tuple[str, str]) -> None:
    with pytest.raises(DataError, match="are the same number: rename or merge one of them"):
        in_order(names, "folders")


@pytest.mark.parametrize(
    ("names", "line"),
    [
        (("cat", "dog"), "2 class names are given, here has 3 classes: expected one for each"),
        (("Dog", "cat", "red fox"), "class name 'Dog' is given to the class 'cat', but is the name of label 1"),
        (("aardvark", "cat", "dog"), "class name 'cat' is given to the class 'dog', but is the name of label 0"),
        (("0 tabby", "1 corgi", "2 red"), "begin with numbers or ids ('0 tabby'): expected only names"),
        (('"tabby"', "'corgi'", '"red"'), "have quotes, commas or dashes"),
        (("- tabby", "- corgi", "- red"), "have quotes, commas or dashes ('- tabby'): expected only names"),
        (("tabby,", "corgi,", "red,"), "have quotes, commas or dashes"),
        (("1, tabby", "2, corgi", "3, red"), "begin with numbers or ids ('1, tabby'): expected only names"),
    ],
)
def test_class_names_that_do_not_match_the_classes_are_rejected(names: tuple[str, ...], line: str) -> None:
    with pytest.raises(DataError) as caught:
        check_names("here", ("cat", "dog", "red_fox"), names)
    assert line in str(caught.value)


@pytest.mark.parametrize(
    ("ids", "names"),
    [
        (("cat", "dog", "fox"), ("tabby cat", "dog", "red fox")),
        (("mouse", "rodent", "cat"), ("computer mouse", "mouse", "cat")),
        (("0", "1", "2"), ("1", "2", "3")),
        (("a320", "b747", "c150"), ("2012 Audi", "2011 BMW", "2010 Fiat")),
    ],
)
def test_class_names_that_match_are_accepted(ids: tuple[str, ...], names: tuple[str, ...]) -> None:
    check_names("here", ids, names)


def test_class_names_that_begin_with_ids_are_rejected() -> None:
    with pytest.raises(DataError, match="begin with numbers or ids"):
        check_names("here", ("n01440764", "n01443537"), ("n01440764 tench", "n01443537 goldfish"))


def test_labels_are_shown_at_both_ends() -> None:
    names = tuple("abcdefgh")
    assert ends(names, ("x", *names[1:])) == "0 = a (x), 1 = b, ..., 6 = g, 7 = h"
    assert ends(names[:2], names[:2]) == "0 = a, 1 = b"
