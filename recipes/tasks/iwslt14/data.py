"""German and English sentences, tokenized and in sub-words, binarized by ``fairseq-preprocess``.

``iwslt14`` is the paper's data set, prepared as fairseq's ``prepare-iwslt14.sh`` prepares it, with the Python ports of
the same tools: Moses' tokenizer out of sacremoses, and subword-nmt. ``office-help`` stands in for it: the help pages of
LibreOffice, split by page.
"""

from __future__ import annotations

import html
import os
import random
import re
import subprocess
import tarfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from recipes.machinery import office_help
from recipes.machinery.data import Download, fetch, filled, made_of
from recipes.machinery.fairseq_tools import command

SPLITS = ("train", "valid", "test")
Corpus = dict[str, list["Pair"]]

_TEST_SETS = ("TED.dev2010", "TEDX.dev2012", "TED.tst2010", "TED.tst2011", "TED.tst2012")
_VALID_EVERY = 23  # lines
_DROPPED = ("<url>", "<talkid>", "<keywords>")  # lines of the training set
_TAGS = re.compile(r"</?(?:title|description)>")
_SEGMENT = re.compile(r'<seg id="\d+">\s*(.*?)\s*</seg>')


# The address is fairseq's. No sha256 is on record; the MD5 sum was published by a user of fairseq's copy. It tells this
# file from others; against forgery it is no help, which is why the archive is only ever read as text.
ARCHIVE = Download(
    ("http://dl.fbaipublicfiles.com/fairseq/data/iwslt14/de-en.tgz",),
    "10936dfdf616504ddbd844e91b94ef4a",
    algorithm="md5",
    instead="Without it, --set data.name=office-help takes LibreOffice's help pages, which are no IWSLT14.",
)


@dataclass(frozen=True)
class Pair:
    """A sentence in two languages.

    Attributes:
        german: tokenized, lower case, tokens apart by blanks.
        english: likewise.
        reference: the English sentence as it was written.
    """

    german: str
    english: str
    reference: str


@dataclass(frozen=True)
class Data:
    """The table ``[data]``.

    Attributes:
        name: ``"iwslt14"`` or ``"office-help"``.
        merges: of the byte-pair encoding, which both languages share.
        valid: how many sentences of the validation set are used, from its beginning; 0 for all that there are.
        test: likewise. ``office-help`` holds out as many pages as it takes, and so needs both.
        longest: tokens of a sentence of ``office-help``, in either language.

    Raises:
        ValueError: an unknown name, or numbers out of range.
    """

    name: str
    merges: int
    valid: int = 0
    test: int = 0
    longest: int = 60

    def __post_init__(self) -> None:
        if self.name not in CORPORA:
            raise ValueError(f"Invalid data.name: {self.name!r}. Accepted: {', '.join(CORPORA)}.")
        least = 1 if self.name == "office-help" else 0
        for key, lowest in (("merges", 1), ("valid", least), ("test", least), ("longest", 3)):
            if getattr(self, key) < lowest:
                raise ValueError(f"Invalid data.{key}: {getattr(self, key)}. Accepted for {self.name}: >= {lowest}.")

    def folder(self, folder: Path) -> Path:
        """Where :meth:`prepare` puts it, below the folder of all data sets."""
        return folder / "iwslt14" / f"{self.name}-{made_of(self, __file__, office_help.__file__)}"

    def prepare(self, folder: Path) -> Path:
        """Make what is needed, unless it is there.

        Args:
            folder: of all data sets.

        Returns:
            A folder with ``binary`` for fairseq, ``{split}.de`` and ``{split}.en`` in sub-words, and the references
            ``{split}.ref``, one a line.

        Raises:
            SystemExit: the data set cannot be had; says what to do.
        """
        return filled(self.folder(folder), lambda making: write(CORPORA[self.name](self, folder), making, self.merges))


def fetch_iwslt14(folder: Path) -> Path:
    """The archive of the evaluation campaign."""
    return fetch(ARCHIVE, folder)


def fetch_office_help(folder: Path) -> Path:
    """LibreOffice's help pages in both languages; returns the folder of their packages."""
    for package in office_help.PACKAGES.values():
        fetch(package, folder)
    return folder / "downloads"


def iwslt14(data: Data, folder: Path) -> Corpus:
    """The splits that the literature uses: 160,239, 7,283 and 6,750 sentences.

    Raises:
        SystemExit: as :func:`recipes.machinery.data.fetch`.
    """
    train, test = read_iwslt14(fetch_iwslt14(folder))
    kept = list(clean(tokenize(train), 1, 175, ratio=1.5))
    return {
        "train": [pair for line, pair in enumerate(kept, 1) if line % _VALID_EVERY],
        "valid": kept[_VALID_EVERY - 1 :: _VALID_EVERY][: data.valid or None],
        "test": list(tokenize(test))[: data.test or None],
    }


def read_iwslt14(archive: Path) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """The (German, English) lines of the training set and of the five sets that are tested on."""
    with tarfile.open(archive) as files:
        texts = {
            Path(member.name).name: content.read().decode()
            for member in files
            if member.isfile() and (content := files.extractfile(member)) is not None
        }
    train = [list(_training_lines(texts[f"train.tags.de-en.{language}"])) for language in ("de", "en")]
    test = [
        [
            segment.replace("’", "'")  # as fairseq's script has it
            for name in _TEST_SETS
            for segment in _SEGMENT.findall(texts[f"IWSLT14.{name}.de-en.{language}.xml"])
        ]
        for language in ("de", "en")
    ]
    return list(zip(*train, strict=True)), list(zip(*test, strict=True))


def _training_lines(text: str) -> Iterator[str]:
    for line in text.split("\n")[:-1]:
        if not any(tag in line for tag in _DROPPED):
            yield _TAGS.sub("", line).strip()


def office_pages(folder: Path) -> dict[str, list[tuple[str, str]]]:
    """The (German, English) paragraphs of each page, but for those that are the same in both."""
    german, english = (office_help.read(language, folder) for language in ("de", "en"))
    pages = {}
    for page in sorted(german.keys() & english.keys()):
        translated = {paragraph.id: paragraph.text for paragraph in english[page]}
        pairs = [(paragraph.text, translated.get(paragraph.id, "")) for paragraph in german[page]]
        pages[page] = [(de, en) for de, en in pairs if en and de != en]
    return pages


def office(data: Data, folder: Path) -> Corpus:
    """Paragraphs of at least three tokens, as :func:`split_pages` splits them.

    Raises:
        SystemExit: as :func:`recipes.machinery.data.fetch`.
    """
    pages = [list(clean(tokenize(pairs), 3, data.longest)) for pairs in office_pages(folder).values()]
    return split_pages(pages, data.valid, data.test)


def split_pages(pages: Sequence[Sequence[Pair]], valid: int, test: int, seed: int = 0) -> Corpus:
    """Hold whole pages out.

    Args:
        pages: the pairs of each page.
        valid: how many pairs the validation set has, at most: those of its last page that are too many are dropped.
        test: likewise.
        seed: of the order of the pages.

    Returns:
        Splits in which no pair is twice, and which have neither a German nor an English side in common.
    """
    shuffled = iter(random.Random(seed).sample(pages, len(pages)))
    seen: set[str] = set()
    corpus: Corpus = {}
    for split, count in (("test", test), ("valid", valid), ("train", None)):
        pairs: dict[tuple[str, str], Pair] = {}
        for page in shuffled:
            pairs |= {_sides(pair): pair for pair in page if seen.isdisjoint(_sides(pair))}
            if count is not None and len(pairs) >= count:
                break
        seen.update(*pairs)
        corpus[split] = list(pairs.values())[:count]
    return corpus


def _sides(pair: Pair) -> tuple[str, str]:
    return f"de {pair.german}", f"en {pair.english}"


CORPORA: dict[str, Callable[[Data, Path], Corpus]] = {"iwslt14": iwslt14, "office-help": office}


def tokenize(sentences: Iterable[tuple[str, str]]) -> Iterator[Pair]:
    """Moses' tokens, in lower case, of (German, English) sentences."""
    from sacremoses import MosesTokenizer  # type: ignore[import-untyped]

    de, en = MosesTokenizer(lang="de"), MosesTokenizer(lang="en")
    for german, english in sentences:
        tokens = [str(moses.tokenize(text, return_str=True)).lower() for moses, text in ((de, german), (en, english))]
        yield Pair(tokens[0], tokens[1], html.unescape(english))


def clean(pairs: Iterable[Pair], shortest: int, longest: int, ratio: float = float("inf")) -> Iterator[Pair]:
    """Those with ``shortest`` to ``longest`` tokens on both sides, one of which has at most ``ratio`` times more."""
    for pair in pairs:
        low, high = sorted((len(pair.german.split()), len(pair.english.split())))
        if shortest <= low and high <= longest and high <= ratio * low:
            yield pair


def write(corpus: Corpus, folder: Path, merges: int) -> Path:
    """Write a corpus in sub-words and run ``fairseq-preprocess``; returns the folder."""
    segment = learn_sub_words(
        [side for pair in corpus["train"] for side in (pair.german, pair.english)], merges, folder
    )
    for split in SPLITS:
        lines = {
            "de": (segment(pair.german) for pair in corpus[split]),
            "en": (segment(pair.english) for pair in corpus[split]),
            "ref": (pair.reference for pair in corpus[split]),
        }
        for suffix, texts in lines.items():
            (folder / f"{split}.{suffix}").write_text("".join(f"{text}\n" for text in texts))
    subprocess.run(preprocess_command(folder), check=True, stdout=subprocess.DEVNULL)
    return folder


def learn_sub_words(sentences: Sequence[str], merges: int, folder: Path) -> Callable[[str], str]:
    """Learn a byte-pair encoding and keep it as ``codes``; returns the function that writes a sentence in it."""
    from subword_nmt.apply_bpe import BPE  # type: ignore[import-untyped]
    from subword_nmt.learn_bpe import learn_bpe  # type: ignore[import-untyped]

    codes = folder / "codes"
    with codes.open("w") as output:
        learn_bpe(sentences, output, merges)
    with codes.open() as learned:
        process: Callable[[str], str] = BPE(learned).process_line
    return process


def preprocess_command(folder: Path) -> list[str]:
    """How the binarized data are made from the text files beside them."""
    prefixes = {f"{split}pref": folder / split for split in SPLITS}
    languages = {"source-lang": "de", "target-lang": "en", "joined-dictionary": True}
    return command(
        "fairseq-preprocess",
        {**languages, **prefixes, "destdir": folder / "binary", "workers": max(1, (os.cpu_count() or 1) // 2)},
    )
