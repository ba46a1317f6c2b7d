"""What is true of a picture, in words, and the random captions made of it.

A caption is one *phrase* that is true of the picture (a name, or a category) inside one of several frames.
The phrase is returned with the caption: two pictures of which the same phrase is true must not serve as
each other's negatives for it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tools.embedded.corpus import split_style
from tools.embedded.drawings import Drawing

# Unicode's emoji subgroups in plain words: the narrow one first, then wider ones.
SUBGROUPS: dict[str, tuple[str, ...]] = {
    "alphanum": ("button with letters", "symbol"),
    "animal-amphibian": ("frog", "animal"),
    "animal-bird": ("bird", "animal"),
    "animal-bug": ("insect", "animal"),
    "animal-mammal": ("mammal", "animal"),
    "animal-marine": ("sea animal", "animal"),
    "animal-reptile": ("reptile", "animal"),
    "arrow": ("arrow", "symbol"),
    "arts & crafts": ("arts and crafts",),
    "av-symbol": ("media button", "symbol"),
    "award-medal": ("medal", "award"),
    "body-parts": ("body part",),
    "book-paper": ("book or paper", "office supplies"),
    "cat-face": ("cat face", "animal"),
    "clothing": ("clothing", "piece of clothing"),
    "computer": ("computer", "electronic device"),
    "country-flag": ("flag", "flag of a country"),
    "currency": ("currency", "money"),
    "dishware": ("dishes and cutlery", "household object"),
    "drink": ("drink",),
    "emotion": ("emotion symbol", "symbol"),
    "event": ("celebration", "event"),
    "face-affection": ("loving face", "happy face", "face"),
    "face-concerned": ("worried face", "sad face", "face"),
    "face-costume": ("costume face", "face"),
    "face-glasses": ("face with glasses", "happy face", "face"),
    "face-hand": ("face with hand", "face"),
    "face-hat": ("face with hat", "face"),
    "face-negative": ("angry face", "sad face", "face"),
    "face-neutral-skeptical": ("neutral face", "face"),
    "face-sleepy": ("sleepy face", "face"),
    "face-smiling": ("smiling face", "happy face", "face"),
    "face-tongue": ("face with tongue", "happy face", "face"),
    "face-unwell": ("sick face", "sad face", "face"),
    "family": ("family", "people"),
    "flag": ("flag",),
    "food-asian": ("asian food", "meal", "food"),
    "food-fruit": ("fruit", "fruit or vegetable", "food"),
    "food-prepared": ("prepared food", "meal", "food"),
    "food-sweet": ("dessert", "sweet food", "food"),
    "food-vegetable": ("vegetable", "fruit or vegetable", "food"),
    "game": ("game", "sport or game"),
    "gender": ("gender sign", "symbol"),
    "geometric": ("geometric shape", "shape"),
    "hand-fingers-closed": ("fist", "hand gesture", "hand"),
    "hand-fingers-open": ("open hand", "hand gesture", "hand"),
    "hand-fingers-partial": ("hand with fingers", "hand gesture", "hand"),
    "hand-prop": ("hand with object", "hand"),
    "hand-single-finger": ("pointing finger", "hand gesture", "hand"),
    "hands": ("hands", "hand gesture", "hand"),
    "heart": ("heart", "symbol"),
    "hotel": ("luggage", "object"),
    "household": ("household object", "object"),
    "keycap": ("keycap button", "button", "symbol"),
    "light & video": ("light and video", "electronic device"),
    "lock": ("lock", "object"),
    "mail": ("mail", "object"),
    "math": ("math sign", "symbol"),
    "medical": ("medical", "object"),
    "money": ("money", "object"),
    "monkey-face": ("monkey face", "animal"),
    "music": ("music", "object"),
    "musical-instrument": ("musical instrument", "object"),
    "office": ("office supplies", "object"),
    "other-object": ("object",),
    "other-symbol": ("symbol",),
    "person": ("person",),
    "person-activity": ("person doing an activity", "person"),
    "person-fantasy": ("fantasy character", "person"),
    "person-gesture": ("person making a gesture", "person"),
    "person-resting": ("person resting", "person"),
    "person-role": ("person at work", "worker", "person"),
    "person-sport": ("person doing sport", "athlete", "person"),
    "person-symbol": ("person symbol", "people"),
    "phone": ("phone", "electronic device"),
    "place-building": ("building", "place"),
    "place-geographic": ("landscape", "place"),
    "place-map": ("map", "place"),
    "place-other": ("place",),
    "place-religious": ("religious building", "building", "place"),
    "plant-flower": ("flower", "plant"),
    "plant-other": ("plant",),
    "punctuation": ("punctuation mark", "symbol"),
    "religion": ("religious symbol", "symbol"),
    "science": ("science", "object"),
    "skin-tone": ("skin tone",),
    "sky & weather": ("sky and weather", "weather"),
    "sound": ("sound", "object"),
    "sport": ("sport", "sport or game"),
    "subdivision-flag": ("flag", "flag of a region"),
    "time": ("clock", "time"),
    "tool": ("tool", "object"),
    "transport-air": ("aircraft", "boat or aircraft", "transport"),
    "transport-ground": ("vehicle", "transport"),
    "transport-sign": ("sign", "symbol"),
    "transport-water": ("boat", "boat or aircraft", "transport"),
    "warning": ("warning sign", "sign", "symbol"),
    "writing": ("writing tool", "office supplies"),
    "zodiac": ("zodiac sign", "symbol"),
}
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
AROUND_DIGITS = {"number", "keycap", "digit", "circle", "square"}


@dataclass(frozen=True)
class Truth:
    """Phrases that are true of a picture, and what its captions may add."""

    names: tuple[str, ...]
    categories: tuple[str, ...]
    kind: str  # "emoji" or "icon"
    style: str = ""
    skin: str = ""

    @property
    def phrases(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(self.names + self.categories))


def truth(drawing: Drawing) -> Truth:
    """Names without style words; the categories of an emoji are Unicode's, of an icon its leading word."""
    if drawing.is_glyph:
        parsed = [split_style(name, drawing.style) for name in drawing.names]
        names = tuple(dict.fromkeys(name for name, _ in parsed))
        heads = tuple(dict.fromkeys(name.split()[0] for name in names if " " in name))
        return Truth(names + _digit_names(names), heads, "icon", style=parsed[0][1])
    categories = SUBGROUPS[drawing.subgroup]
    return Truth(drawing.names + _digit_names(drawing.names), categories, "emoji", skin=drawing.skin)


def _digit_names(names: tuple[str, ...]) -> tuple[str, ...]:
    """``keycap 7``, ``number circle seven`` and the like are also called ``seven``, ``digit seven``, ..."""
    found: list[str] = []
    for name in names:
        rest = [w for w in name.split() if w not in AROUND_DIGITS]
        if len(rest) == 1 and (rest[0] in DIGITS or (rest[0].isdigit() and len(rest[0]) == 1)):
            word = rest[0] if rest[0] in DIGITS else DIGITS[int(rest[0])]
            found += [word, f"number {word}", f"digit {word}", str(DIGITS.index(word))]
    return tuple(dict.fromkeys(found))


def article(phrase: str) -> str:
    """The phrase with its indefinite article."""
    return ("an " if phrase[:1] in "aeiou" else "a ") + phrase


def caption(about: Truth, rng: np.random.Generator) -> tuple[str, str]:
    """A random caption and the phrase that it states."""
    category_share = 0.35 if about.kind == "emoji" else 0.2
    if about.categories and rng.random() < category_share:
        # The narrow category as often as all wider ones together.
        narrow = rng.random() < 0.5 or len(about.categories) == 1
        phrase = about.categories[0 if narrow else int(rng.integers(1, len(about.categories)))]
        return _frame(phrase, about, rng, plain_style=False), phrase
    phrase = about.names[rng.integers(len(about.names))]
    if about.kind == "emoji" and rng.random() < 0.15:
        category = about.categories[0]
        return (f"{phrase}, {category}" if rng.random() < 0.6 else f"{category}: {phrase}"), phrase
    return _frame(phrase, about, rng, plain_style=True), phrase


def _frame(phrase: str, about: Truth, rng: np.random.Generator, *, plain_style: bool) -> str:
    said = phrase
    if plain_style and about.skin and rng.random() < 0.3:
        said = f"{phrase} with {about.skin} skin"
    frames = [
        (3.0, said),
        (2.0, f"an {about.kind} of {article(said)}"),
        (1.5, f"an {about.kind} of {said}"),
        (1.5, f"{said} {about.kind}"),
        (2.0, f"a picture of {article(said)}"),
        (1.0, f"a symbol of {article(said)}"),
        (0.7, f"a drawing of {article(said)}"),
    ]
    if about.style:
        frames.append((2.0, f"{article(about.style)} {about.kind} of {article(said)}"))
    weights = np.array([w for w, _ in frames])
    return frames[int(rng.choice(len(frames), p=weights / weights.sum()))][1]
