"""Extractive question answering: SQuAD v1.1, and questions to LibreOffice's help in SQuAD's format."""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from recipes.machinery import data, office_help
from recipes.machinery.data import SEED, Download, fetch, filled, made_of, split
from recipes.machinery.office_help import Paragraph

_SQUAD = "https://rajpurkar.github.io/SQuAD-explorer/dataset/{}-v1.1.json"
SQUAD = {
    "train": Download((_SQUAD.format("train"),), "3527663986b8295af4f7fcdff1ba1ff3f72d07d61a20f487cb238a6ef92fd955"),
    "test": Download((_SQUAD.format("dev"),), "95aa6a52d5d6a735563366753ca50492a658031da74f301ac5238b03966972c9"),
}
OFFICE_HELP_QA = "office-help-qa"
SPLITS = ("train", "validation", "test")
_FOLDER = f"{OFFICE_HELP_QA}-{made_of(SPLITS, __file__, office_help.__file__, data.__file__)}"
# data set -> split -> file in the folder of all data sets
FILES: dict[str, dict[str, str]] = {
    "squad": {split: f"downloads/{download.name}" for split, download in SQUAD.items()},
    OFFICE_HELP_QA: {split: f"{_FOLDER}/{split}.json" for split in SPLITS},
}

SHARE = 0.1  # of the pages, for validation and for test each
CONTEXT_WORDS = 60  # that a context has at most
ANSWER_WORDS = range(3, 21)
PARAGRAPH_WORDS = 4  # that a paragraph beside the answer's has at least
_SENTENCE = re.compile(r".+?[.!?](?=\s+[A-Z(\"“]|\s*$)")

Article = dict[str, Any]  # as in SQuAD's files: title, paragraphs


def read(file: Path) -> list[dict[str, Any]]:
    """The questions of a file in SQuAD's format, as the hub's data set has them.

    Returns:
        ``id``, ``title``, ``context``, ``question`` and ``answers`` with lists ``text`` and ``answer_start``.
    """
    return [
        {
            "id": asked["id"],
            "title": article.get("title", ""),
            "context": paragraph["context"],
            "question": asked["question"],
            "answers": {key: [answer[key] for answer in asked["answers"]] for key in ("text", "answer_start")},
        }
        for article in json.loads(file.read_text(encoding="utf-8"))["data"]
        for paragraph in article["paragraphs"]
        for asked in paragraph["qas"]
    ]


def prepare_squad(folder: Path) -> Path:
    """Download SQuAD's two files; returns the folder that they are in."""
    return {split: fetch(download, folder) for split, download in SQUAD.items()}["train"].parent


def prepare_office_help_qa(folder: Path) -> Path:
    """Make the three files of questions to LibreOffice's help, split by page; returns their folder."""

    def write(making: Path) -> Path:
        articles = list(filter(None, (ask(*page) for page in sorted(office_help.read("en", folder).items()))))
        for name, part in split_articles(articles).items():
            text = json.dumps({"version": OFFICE_HELP_QA, "data": part}, indent=0)
            (making / f"{name}.json").write_text(text, encoding="utf-8")
        return making

    return filled(folder / _FOLDER, write)


def split_articles(articles: Sequence[Article]) -> dict[str, list[Article]]:
    """Shuffled; :data:`SHARE` for validation and for test each, the rest for training."""
    return dict(zip(SPLITS, split(articles, round(SHARE * len(articles))).values(), strict=True))


def ask(page: str, paragraphs: Iterable[Paragraph]) -> Article | None:
    """The questions to one page: a heading asks, the first sentence below it answers.

    The context is the answer's paragraph and others of the same page, without the headings and in an order of chance:
    in the page's own order, the answer would be at the beginning too often.

    Args:
        page: the page's path.
        paragraphs: the page's paragraphs and headings.

    Returns:
        None where the page has no question whose answer has to be found.
    """
    chance = random.Random(f"{SEED} {page}")
    sections = _sections(paragraphs)
    texts = dict.fromkeys(text for _, section in sections for text in section if len(text.split()) >= PARAGRAPH_WORDS)
    times = Counter(heading for heading, _ in sections)
    asked = []
    for number, (heading, section) in enumerate(sections):
        answer = _first_sentence(section[0]) if section else ""
        if times[heading] > 1 or len(answer.split()) not in ANSWER_WORDS:
            continue
        context = _context(section[0], [text for text in texts if answer not in text], chance)
        if context:
            answers = [{"text": answer, "answer_start": context.index(answer)}]
            qas = [{"id": f"{page}#{number}", "question": heading, "answers": answers}]
            asked.append({"context": context, "qas": qas})
    return {"title": page, "paragraphs": asked} if asked else None


def _sections(paragraphs: Iterable[Paragraph]) -> list[tuple[str, list[str]]]:
    """Headings, each with the texts below it."""
    found: list[tuple[str, list[str]]] = []
    for paragraph in paragraphs:
        if paragraph.tag != "p":
            found.append((paragraph.text, []))
        elif found:
            found[-1][1].append(paragraph.text)
    return found


def _first_sentence(text: str) -> str:
    match = _SENTENCE.match(text)
    return match[0] if match else ""


def _context(paragraph: str, others: Sequence[str], chance: random.Random) -> str:
    """The paragraph among others, as many as :data:`CONTEXT_WORDS` allow; empty where there is not even one."""
    chosen, room = [paragraph], CONTEXT_WORDS - len(paragraph.split())
    for text in chance.sample(others, len(others)):
        if len(text.split()) <= room:
            chosen.append(text)
            room -= len(text.split())
    return " ".join(chance.sample(chosen, len(chosen))) if len(chosen) > 1 and room >= 0 else ""
