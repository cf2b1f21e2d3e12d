"""Multiple choice with four endings: SWAG, and two stand-ins in SWAG's format."""

from __future__ import annotations

import csv
import io
import json
import random
import re
import struct
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import pairwise, takewhile
from pathlib import Path
from typing import Any

from recipes.machinery import data
from recipes.machinery.data import SEED, Download, fetch, filled, made_of, read_deb, split

ENDINGS = tuple(f"ending{number}" for number in range(4))
COLUMNS = ("video-id", "sent1", "sent2", *ENDINGS, "label")  # those of SWAG's that are used
SPLITS = ("train", "validation", "test")
_MADE = made_of(SPLITS, __file__, data.__file__)
Row = dict[str, Any]

_SWAG = "https://raw.githubusercontent.com/rowanz/swagaf/master/data/{}.csv"
SWAG = {
    "train": Download((_SWAG.format("train"),), "5748b51126ac255c5a6f26e1ba473b51116d6c822aeb25e63ecba282c9d0e610"),
    "test": Download((_SWAG.format("val"),), "c0497b2cd7f3e6b7df995524b1853f62285d60d110d659b19545ca80b2903234"),
}
AUSTEN = Download.debian(
    "r/r-cran-janeaustenr/r-cran-janeaustenr_1.0.0-1_all.deb",
    "df6bddf211906d1ff404f8ff662c21b34e6660e7f54a311084e749050c019c95",
)
EXAMS = (
    Download.debian(
        "h/hamexam/hamexam_1.7.0-3_all.deb", "3ec136089caf21374e66af249351d50e38567ec08fa3184e6558287791b488bb"
    ),
    Download.debian(
        "f/fccexam/fccexam_1.0.7-1.1_all.deb", "e5f2047e3659d70a1424088ff6234e7ba82373dae9a44afa3a25bf49d150f090"
    ),
)
# data set -> split -> file in the folder of all data sets
FILES: dict[str, dict[str, str]] = {
    "swag": {split: f"swag/downloads/{download.name}" for split, download in SWAG.items()},
    **{name: {split: f"{name}-{_MADE}/{split}.json" for split in SPLITS} for name in ("austen", "exams")},
}

HELD_OUT_NOVELS = {"Persuasion": "validation", "NORTHANGER ABBEY": "test"}  # by their first line; the shortest ones
SENTENCE_WORDS = range(5, 31)
SHARE = 0.15  # of the exams' topics, for validation and for test each

_CHAPTER = re.compile(r"chapter [ivxlc\d]+", re.IGNORECASE)
_NO_TEXT = re.compile(r"volume [iv]+|\W*", re.IGNORECASE)
_END = re.compile(r"the end|finis|a note on the text", re.IGNORECASE)
_SENTENCE_END = re.compile(
    r"(?:(?<!\bMr)(?<!\bMrs)(?<!\bMessrs)(?<!\bDr)(?<!\bSt)(?<!\bEsq)(?<!\bRev)\.|[!?])[\"')_]*\s+(?=[\"'(_]*[A-Z])"
)
_EXAM = re.compile(r"usr/share/(?:ham|fcc)exam/[A-Z]\d?R?/(?P<id>[\w-]+)")
_KEY = re.compile(r"\S+ \(?(?P<key>[A-D])\)?.*")
_CHOICE = re.compile(r"[A-D]\.\s*(?P<text>.*)")
_FIGURE = re.compile(r"\bfig(?:ure|\.)\s*\S*\d", re.IGNORECASE)
# "All of the above", "Both A & B", "*** this answer left blank"
_PLACEHOLDER = re.compile(
    r"\*.*|(?i:all|any|both|either|neither|none|only one)\b.*(?:\b(?i:above|answers?|choices|these)\b|\b[A-D]\b).*"
)


def read(file: Path) -> list[Row]:
    """The questions of a file with SWAG's columns.

    Args:
        file: ``.csv`` as SWAG's own, or ``.json``: a list of objects, or one object a line.

    Returns:
        Those of :data:`COLUMNS` that there are, and ``label`` as a number from 0 to 3.

    Raises:
        ValueError: a column is missing.
    """
    text = file.read_bytes().decode()
    if file.suffix == ".csv":
        rows = list(csv.DictReader(io.StringIO(text, newline="")))
    elif text.lstrip().startswith("["):
        rows = json.loads(text)
    else:
        rows = [json.loads(line) for line in text.split("\n") if line.strip()]
    missing = [column for column in COLUMNS[1:] if rows and column not in rows[0]]
    if missing:
        raise ValueError(f"Invalid file: {file} has no {', '.join(missing)}. Expected: {', '.join(COLUMNS[1:])}.")
    return [{name: row[name] for name in COLUMNS if name in row} | {"label": int(row["label"])} for row in rows]


def prepare_swag(folder: Path) -> Path:
    """Download SWAG's training set, and its validation set, whose labels are public; returns their folder."""
    return {split: fetch(download, folder / "swag") for split, download in SWAG.items()}["train"].parent


def prepare_austen(folder: Path) -> Path:
    """Make the three files of continuations of sentences in Jane Austen's novels, split by novel."""

    def make() -> dict[str, list[Row]]:
        package = fetch(AUSTEN, folder)
        ((_, database),) = read_deb(package, lambda name: name.endswith("janeaustenr/data/Rdata.rdb"))
        parts: dict[str, list[Row]] = {name: [] for name in SPLITS}
        for lines in character_vectors(database):
            parts[HELD_OUT_NOVELS.get(lines[0], "train")] += continuations(lines[0], chapters(lines))
        return parts

    return _write(folder, "austen", make)


def prepare_exams(folder: Path) -> Path:
    """Make the three files of exam questions, split by topic."""

    def make() -> dict[str, list[Row]]:
        packages = [fetch(package, folder) for package in EXAMS]
        files = [file for package in packages for file in read_deb(package, lambda n: bool(_EXAM.fullmatch(n)))]
        return split_by_topic(list(exam_questions(files)))

    return _write(folder, "exams", make)


def _write(folder: Path, name: str, make: Callable[[], dict[str, list[Row]]]) -> Path:
    def write(making: Path) -> Path:
        for part, rows in make().items():
            (making / f"{part}.json").write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
        return making

    return filled(folder / f"{name}-{_MADE}", write)


def character_vectors(database: bytes) -> Iterator[list[str]]:
    """The objects of an R lazy-load database (``.rdb``) that has nothing but character vectors.

    Each object is its length as four bytes and a zlib stream, in which R has serialized it (version 3, big-endian):
    ``X\\n``, three versions, the name of the encoding, then flags, length and elements; an element is flags, length
    in bytes and content.

    Raises:
        ValueError: something else is in it.
    """
    at = 0
    while at < len(database):
        stream = zlib.decompressobj()
        content = stream.decompress(database[at + 4 :])
        at = len(database) - len(stream.unused_data)
        position = 18 + struct.unpack_from(">I", content, 14)[0]
        kind, count = struct.unpack_from(">II", content, position)
        if not content.startswith(b"X\n\0\0\0\3") or kind != 16:
            raise ValueError("Not a database of character vectors without attributes, serialized by R in version 3.")
        position += 8
        elements = []
        for _ in range(count):
            (length,) = struct.unpack_from(">i", content, position + 4)
            position += 8
            elements.append(content[position : position + max(0, length)].decode())
            position += max(0, length)
        yield elements


def chapters(lines: Iterable[str]) -> list[list[str]]:
    """The sentences of each chapter of a novel, from its lines; what stands before the first chapter is left out."""
    found: list[list[str]] = []
    paragraph: list[str] = []
    for line in (*takewhile(lambda line: not _END.fullmatch(line), map(str.strip, lines)), ""):
        if line and not _NO_TEXT.fullmatch(line) and not _CHAPTER.fullmatch(line):
            paragraph.append(line)
            continue
        if paragraph and found:
            found[-1] += sentences(" ".join(paragraph))
        paragraph = []
        if _CHAPTER.fullmatch(line):
            found.append([])
    return found


def sentences(paragraph: str) -> list[str]:
    """The sentences of a paragraph; quotation marks that are at its end stay with a sentence."""
    ends = [0, *(match.end() for match in _SENTENCE_END.finditer(paragraph)), len(paragraph)]
    parts = (paragraph[begin:end] for begin, end in pairwise(ends))
    return [" ".join(part.split()) for part in parts if part.strip()]


def continuations(novel: str, texts: Sequence[Sequence[str]]) -> list[Row]:
    """Questions which of four sentences comes next.

    The wrong ones are drawn from the sentences of the same novel's other chapters that come next somewhere else, so
    that nothing but the sentence before tells them from the right one.

    Args:
        novel: its name.
        texts: the sentences of each chapter.
    """
    chance = random.Random(f"{SEED} {novel}")
    pairs = [
        (chapter, first, second)
        for chapter, text in enumerate(texts)
        for first, second in pairwise(text)
        if len(first.split()) in SENTENCE_WORDS and len(second.split()) in SENTENCE_WORDS
    ]
    rows = []
    for number, (chapter, first, second) in enumerate(pairs):
        endings: list[str] = []
        while len(endings) < len(ENDINGS) - 1:
            other, _, sentence = chance.choice(pairs)
            if other != chapter and sentence not in (*endings, second):
                endings.append(sentence)
        label = chance.randrange(len(ENDINGS))
        endings.insert(label, second)
        rows.append(_row(f"{novel} {chapter + 1} {number}", first, endings, label))
    return rows


def exam_questions(files: Iterable[tuple[str, bytes]]) -> Iterator[Row]:
    """The questions that words alone decide, each once.

    Left out are those with a figure, with choices such as "all of the above", and without four different choices.

    Args:
        files: path and content of each question: a line with its key, the question, and four choices.

    Yields:
        In SWAG's format; the ``video-id`` is the question's.
    """
    seen = set()
    for path, content in files:
        head, *lines = content.decode("utf-8", errors="replace").strip().splitlines()
        key, name = _KEY.fullmatch(head.strip()), _EXAM.fullmatch(path)
        choices = [match["text"].strip() for match in map(_CHOICE.fullmatch, map(str.strip, lines)) if match]
        question = " ".join(" ".join(line for line in lines if not _CHOICE.fullmatch(line.strip())).split())
        alike = " ".join(re.findall(r"\w+", " ".join([question, *sorted(choices)]).lower()))
        if (
            key
            and name
            and len({choice.lower() for choice in choices}) == len(choices) == len(ENDINGS)
            and not _FIGURE.search(question)
            and not any(_PLACEHOLDER.fullmatch(choice) for choice in choices)
            and all(choices)
            and alike not in seen
        ):
            seen.add(alike)
            yield _row(name["id"], question, choices, "ABCD".index(key["key"]))


def split_by_topic(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """All questions of a topic (``E0A`` of ``E0A01``, ``1-10B`` of ``1-10B2``) are in one split."""
    topic = {row["video-id"]: re.sub(r"\d+$", "", row["video-id"]) for row in rows}
    topics = sorted(set(topic.values()))
    parts = zip(SPLITS, split(topics, round(SHARE * len(topics))).values(), strict=True)
    return {name: [row for row in rows if topic[row["video-id"]] in set(part)] for name, part in parts}


def _row(name: str, first: str, endings: Sequence[str], label: int) -> Row:
    return dict(zip(COLUMNS, (name, first, "", *endings, label), strict=True))
