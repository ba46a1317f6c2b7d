"""Which drawings make up the classes of the datasets, and the prompts that are candidates for them.

Classes are listed generously; those with too few distinct drawings are dropped when the datasets are built.
"""

from __future__ import annotations

from dataclasses import dataclass

from tools.embedded.captions import DIGITS


@dataclass(frozen=True)
class IconClass:
    """An icon belongs to a class when its name is one of these words or begins with one of them."""

    name: str
    mdi: tuple[str, ...]  # as Material Design Icons calls the thing
    tabler: tuple[str, ...]  # as Tabler does


ICONS = (
    IconClass("arrow", ("arrow",), ("arrow", "arrows")),
    IconClass("box", ("archive", "package", "cube"), ("archive", "package", "cube", "box")),
    IconClass(
        "building",
        ("store", "office building", "hospital", "school", "castle", "city", "church", "warehouse", "factory", "bank"),
        ("building", "home 2", "school", "bank"),
    ),
    IconClass("calendar", ("calendar",), ("calendar",)),
    IconClass("camera", ("camera", "video", "webcam", "cctv"), ("camera", "video", "device cctv")),
    IconClass("clock", ("clock", "timer", "alarm", "watch"), ("clock", "alarm", "device watch", "stopwatch")),
    IconClass("cloud", ("cloud",), ("cloud",)),
    IconClass(
        "computer",
        ("monitor", "laptop", "desktop", "television", "tablet"),
        ("device desktop", "device laptop", "device imac", "device tv", "device tablet", "device ipad"),
    ),
    IconClass("file", ("file",), ("file",)),
    IconClass("folder", ("folder",), ("folder",)),
    IconClass("home", ("home",), ("home",)),
    IconClass("letter", ("alpha",), ("letter", "square letter", "circle letter")),
    IconClass("lock or key", ("lock", "shield lock", "key"), ("lock", "key")),
    IconClass("mail", ("email", "mailbox", "mail"), ("mail", "mailbox")),
    IconClass("message", ("message", "comment", "chat", "forum"), ("message", "messages")),
    IconClass(
        "money",
        ("currency", "cash", "credit card", "wallet", "piggy bank"),
        ("currency", "coin", "cash", "credit card", "wallet", "pig money"),
    ),
    IconClass("number", ("numeric",), ("number", "square number", "circle number", "hexagon number")),
    IconClass("phone", ("phone", "cellphone"), ("phone", "device mobile")),
    IconClass("picture", ("image", "panorama"), ("photo",)),
    IconClass("shield", ("shield", "security"), ("shield",)),
    IconClass("user", ("account", "human"), ("user",)),
    IconClass(
        "vehicle",
        ("car", "truck", "bus", "van", "taxi", "train", "airplane", "bike", "motorbike", "tractor"),
        ("car", "truck", "bus", "train", "plane", "bike", "motorbike", "tractor", "tram", "scooter", "ambulance"),
    ),
)

# An emoji class is a union of Unicode subgroups.
EMOJI: dict[str, tuple[str, ...]] = {
    "mammal": ("animal-mammal",),
    "bird, fish or insect": ("animal-bird", "animal-marine", "animal-bug"),
    "fruit or vegetable": ("food-fruit", "food-vegetable"),
    "meal": ("food-prepared", "food-asian"),
    "vehicle": ("transport-ground",),
    "place": ("place-building", "place-religious", "place-other", "place-geographic"),
    "sky and weather": ("sky & weather",),
    "clothing": ("clothing",),
    "person at work": ("person-role",),
    "person doing sport": ("person-sport",),
    "person doing an activity": ("person-activity",),
    "face": (
        "face-smiling",
        "face-affection",
        "face-tongue",
        "face-hand",
        "face-neutral-skeptical",
        "face-sleepy",
        "face-unwell",
        "face-hat",
        "face-glasses",
        "face-concerned",
        "face-negative",
    ),
    "hand gesture": (
        "hand-fingers-open",
        "hand-fingers-partial",
        "hand-single-finger",
        "hand-fingers-closed",
        "hands",
    ),
    "sport or game": ("sport", "game"),
    "office supplies": ("office", "book-paper", "writing"),
    "household object or tool": ("household", "tool"),
    "button with letters": ("alphanum", "keycap"),
}

# Candidates, listed before any accuracy was read. The template of a dataset is the one with the best zero-shot
# accuracy on its val split; all of them together are its ensemble. A shift set takes those of its fit dataset.
TEMPLATES: dict[str, tuple[str, ...]] = {
    "icons": (
        "an icon of a {}",
        "{} icon",
        "{}",
        "a picture of a {}",
        "a symbol of a {}",
        "an outline icon of a {}",
    ),
    "emoji": (
        "an emoji of a {}",
        "an emoji of {}",
        "{} emoji",
        "{}",
        "a picture of a {}",
        "a drawing of a {}",
    ),
    "digits": (
        "a picture of a {}",
        "the number {}",
        "an icon of the number {}",
        "a picture of the digit {}",
        "digit {}",
        "{}",
    ),
}
DIGIT_CLASSES = DIGITS
