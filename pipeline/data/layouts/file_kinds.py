"""Classify files by name and by first bytes: images, archives, system files, Git LFS pointers."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from pipeline.errors import DataError
from pipeline.untrusted import LFS_POINTER

IMAGES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".webp", ".avif", ".bmp", ".gif", ".tif", ".tiff"),
    *(".jp2", ".j2k", ".jpx", ".ppm", ".pgm", ".pbm", ".pnm"),
)
"""Endings of image files, in lower case."""
NOT_DECODED = (".heic", ".heif", ".jxl", ".svg", ".tga", ".dng", ".cr2", ".nef", ".arw", ".exr", ".dcm")
"""Endings of image formats that cannot be decoded."""
TABLES = (".parquet", ".arrow")
ARCHIVES = (".zip", ".tar", ".gz", ".tgz", ".bz2", ".xz", ".7z", ".rar", ".zst")
SYSTEM_FILES = {".ds_store", "thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r"}
SYSTEM_FOLDERS = {"__macosx", "@eadir", "#recycle", "$recycle.bin", "system volume information", "lost+found"}
_MAGIC = (
    *(b"\xff\xd8\xff", b"\x89PNG\r\n", b"GIF8", b"II*\0", b"MM\0*", b"\0\0\0\x0cjP  ", b"\xff\x4f\xff\x51"),
    *(b"P5\n", b"P6\n", b"P4\n", b"qoif", b"8BPS"),
)
POINTER_SIZES = range(120, 200)
"""Possible sizes of a Git LFS pointer in bytes."""
SYSTEM = "system files (.DS_Store, Thumbs.db, ._*, __MACOSX, @eaDir)"
HIDDEN = "hidden files and folders"


def hidden_reason(name: str, is_folder: bool) -> str:
    """Return the reason to skip an entry with this name; an empty string for other names."""
    system = name.startswith("._") or name.lower() in (SYSTEM_FOLDERS if is_folder else SYSTEM_FILES)
    return SYSTEM if system else HIDDEN if name.startswith(".") else ""


def entries(where: Path) -> Iterator[os.DirEntry[str]]:
    """Yield the entries of a folder.

    Raises:
        DataError: The folder cannot be listed.
    """
    try:
        with os.scandir(where) as scan:
            yield from scan
    except OSError as error:
        raise DataError(f"{where} cannot be listed ({error.strerror})") from error


def has_images(where: Path) -> bool:
    """Return True when a folder directly contains an image, or a link with the name of an image."""
    return any(
        ends_in(entry.name, IMAGES) and not hidden_reason(entry.name, False) and (entry.is_file() or entry.is_symlink())
        for entry in entries(where)
    )


def is_image(path: Path) -> bool:
    """Return True when the first bytes of a file are those of an image format."""
    head = _head(path)
    return (
        head.startswith(_MAGIC)
        or (head[:4] == b"RIFF" and head[8:12] == b"WEBP")
        or (head[4:8] == b"ftyp" and head[8:12] in (b"avif", b"avis", b"heic", b"heix", b"mif1"))
        or (head[:2] == b"BM" and head[6:10] == bytes(4))
    )


def is_pointer(path: Path) -> bool:
    """Return True when a file is a Git LFS pointer. Call it only for files whose size is in POINTER_SIZES."""
    return _head(path).startswith(LFS_POINTER)


def _head(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(48)
    except OSError:
        return b""


def ends_in(name: str, endings: tuple[str, ...]) -> bool:
    """Return True when a file name has one of these endings, ignoring case."""
    return name.lower().endswith(endings)
