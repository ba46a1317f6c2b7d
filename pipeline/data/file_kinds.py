"""Kinds of files by name and by first bytes: images, archives, files of operating systems, Git LFS pointers."""

from __future__ import annotations

import os
from pathlib import Path

from pipeline.errors import DataError
from pipeline.untrusted import LFS_POINTER

IMAGES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".webp", ".avif", ".bmp", ".gif", ".tif", ".tiff"),
    *(".jp2", ".j2k", ".jpx", ".ppm", ".pgm", ".pbm", ".pnm"),
)
"""Endings of files that are taken for images, in lower case."""
NOT_DECODED = (".heic", ".heif", ".jxl", ".svg", ".tga", ".dng", ".cr2", ".nef", ".arw", ".exr", ".dcm")
"""Endings of image formats that are not decoded here."""
TABLES = (".parquet", ".arrow")
ARCHIVES = (".zip", ".tar", ".gz", ".tgz", ".bz2", ".xz", ".7z", ".rar", ".zst")
SYSTEM_FILES = {".ds_store", "thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r"}
SYSTEM_FOLDERS = {"__macosx", "@eadir", "#recycle", "$recycle.bin", "system volume information", "lost+found"}
_MAGIC = (
    *(b"\xff\xd8\xff", b"\x89PNG\r\n", b"GIF8", b"II*\0", b"MM\0*", b"\0\0\0\x0cjP  ", b"\xff\x4f\xff\x51"),
    *(b"P5\n", b"P6\n", b"P4\n", b"qoif", b"8BPS"),
)
POINTER_SIZES = range(120, 200)
"""Bytes of a Git LFS pointer."""
SYSTEM = "system files (.DS_Store, Thumbs.db, ._*, __MACOSX, @eaDir)"
HIDDEN = "hidden files and folders"


def hidden_reason(name: str, is_folder: bool) -> str:
    """Return why an entry of this name is never used; an empty string for all others."""
    system = name.startswith("._") or name.lower() in (SYSTEM_FOLDERS if is_folder else SYSTEM_FILES)
    return SYSTEM if system else HIDDEN if name.startswith(".") else ""


def entries(where: Path) -> list[os.DirEntry[str]]:
    """Return the entries of a folder.

    Raises:
        DataError: the folder cannot be listed.
    """
    try:
        with os.scandir(where) as found:
            return list(found)
    except OSError as error:
        raise DataError(f"{where} cannot be listed ({error.strerror})") from error


def has_images(where: Path) -> bool:
    """Return True when a folder holds an image directly, or a link with an image's name."""
    return any(
        ends_in(entry.name, IMAGES) and not hidden_reason(entry.name, False) and (entry.is_file() or entry.is_symlink())
        for entry in entries(where)
    )


def is_image(path: Path) -> bool:
    """Return True when a file's first bytes are those of an image format."""
    head = _head(path)
    return (
        head.startswith(_MAGIC)
        or (head[:4] == b"RIFF" and head[8:12] == b"WEBP")
        or (head[4:8] == b"ftyp" and head[8:12] in (b"avif", b"avis", b"heic", b"heix", b"mif1"))
        or (head[:2] == b"BM" and head[6:10] == bytes(4))
    )


def is_pointer(path: Path) -> bool:
    """Return True when a file is a Git LFS pointer; its size is one of POINTER_SIZES then."""
    return _head(path).startswith(LFS_POINTER)


def _head(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(48)
    except OSError:
        return b""


def ends_in(name: str, endings: tuple[str, ...]) -> bool:
    """Return True when a file name has one of these endings, in any case."""
    return name.lower().endswith(endings)
