"""Downloads the source packages by name and version, checks their sha256 and unpacks them."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tarfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from tools.embedded.settings import DOWNLOADS, UNPACKED


@dataclass(frozen=True)
class Package:
    """One registry package, pinned by version and digest."""

    registry: str  # "npm" or "pypi"
    name: str
    version: str
    sha256: str

    @property
    def archive(self) -> Path:
        suffix = ".tgz" if self.registry == "npm" else "-py3-none-any.whl"
        return DOWNLOADS / f"{self.name}-{self.version}{suffix}"

    @property
    def folder(self) -> Path:
        return UNPACKED / f"{self.name}-{self.version}"


NOTO = Package(
    "npm", "emoji-datasource-google", "16.0.0", "fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438"
)
TWEMOJI = Package(
    "npm", "emoji-datasource-twitter", "16.0.0", "f64a530c63bca463bd8317fdc4615ce63a53a0c65018e4ce2d848aaba7a28877"
)
FLUENT = Package("npm", "fluentui-emoji", "1.3.0", "ec892e607e854859b812c7d827801756adc19955b0ef56d4ae8afcddd19492c5")
FONTS = Package("pypi", "qtawesome", "1.4.2", "dbf08524428fa2df73918ce362153254cd44f089380576d84bfaad8f40eece45")
TABLER = Package("pypi", "pytablericons", "1.0.1", "0c9bac8a016daa912273f22911d5d7039bafbb2de0a78a7152944a3aaaaa7b29")
PACKAGES = (NOTO, TWEMOJI, FLUENT, FONTS, TABLER)


def sha256(path: Path) -> str:
    """Digest of a file's bytes."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def fetch(package: Package) -> Path:
    """The folder with the package's files, downloaded and unpacked if it is not there yet."""
    DOWNLOADS.mkdir(parents=True, exist_ok=True)
    if not package.archive.exists():
        _download(package)
    found = sha256(package.archive)
    if found != package.sha256:
        raise SystemExit(f"{package.archive.name}: sha256 {found}, expected {package.sha256}; delete it and try again")
    if not (package.folder / ".complete").exists():
        _unpack(package)
    return package.folder


def _download(package: Package) -> None:
    print(f"  downloading {package.name} {package.version}", flush=True)
    if package.registry == "npm":
        command = ["npm", "pack", "--silent", f"{package.name}@{package.version}"]
    else:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        command.append(f"{package.name}=={package.version}")
    subprocess.run(command, cwd=DOWNLOADS, check=True, stdout=subprocess.DEVNULL)


def _unpack(package: Package) -> None:
    if package.archive.suffix == ".tgz":
        with tarfile.open(package.archive) as tar:
            tar.extractall(package.folder, filter="data")
    else:
        with zipfile.ZipFile(package.archive) as wheel:
            wheel.extractall(package.folder)
    (package.folder / ".complete").touch()
