"""ImageNet from the user's own files, through timm: a folder of images or WebDataset shards. Where there are none,
Fashion-MNIST written as such a folder stands in for it."""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from timm.data import create_dataset, create_transform  # type: ignore[attr-defined]
from torch.utils.data import Dataset, Subset

from recipes.machinery import fashion_mnist, vision
from recipes.machinery.data import filled

TRAIN, TEST = "train", "validation"
STAND_IN = {"train": 20_000, "val": 10_000}  # Fashion-MNIST's first images; so many files are enough


@dataclass(frozen=True)
class Data:
    """The table ``[data]``.

    Attributes:
        path: of the folder, absolute or in the folder of all data sets. In it are either the folders ``train`` and
            ``val`` (or ``validation``) with a folder for each class, or shards whose names begin with the two.
        format: ``"folder"``, ``"webdataset"``, or ``"fashion-mnist"``, which makes a folder if it is not there.
        classes: how many there are.
        valid: how many images of the training set are held out for tuning; 0 is accepted.
        train_size: side in pixels of what is trained with.
        eval_size: likewise for evaluation.
        crop: side of the crop in the middle that is evaluated, as a share of the shorter side of an image.
        scale: share of an image that a random crop takes, from and to.
        ratio: width to height of a random crop, from and to.
        seed: of the choice of what is held out.
    """

    path: str = "imagenet"
    format: str = "folder"
    classes: int = 1000
    valid: int = 10_000
    train_size: int = 192
    eval_size: int = 224
    crop: float = 224 / 256
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    seed: int = 0

    def __post_init__(self) -> None:
        if self.format not in FORMATS:
            raise ValueError(f"Invalid data.format: {self.format!r}. Accepted: {', '.join(FORMATS)}.")

    def load(self, folder: Path) -> dict[str, Dataset[Any]]:
        """Normalized images, float32 [3, size, size], and labels, by split; ImageNet's own validation set is ``test``.

        Raises:
            SystemExit: the files are not there, or the two sets do not have the classes that they should have.
        """
        files = folder / self.path
        known, test = (FORMATS[self.format](self, folder, split) for split in (TRAIN, TEST))
        if known.reader.class_to_idx != test.reader.class_to_idx:
            raise SystemExit(f"The training and the validation set in {files} have classes of different names.")
        kept, held_out = vision.hold_out(len(known), self.valid, self.seed)
        sets = {
            "train": Subset(_seen_through(known, self._random()), kept.tolist()),
            "valid": Subset(_seen_through(known, self._centre()), held_out.tolist()),
            "test": _seen_through(test, self._centre()),
        }
        return {split: data for split, data in sets.items() if len(data)}

    def _random(self) -> Any:
        return create_transform(
            self.train_size,
            is_training=True,
            scale=self.scale,
            ratio=self.ratio,
            hflip=0.5,
            color_jitter=0.0,
            interpolation="bilinear",
        )

    def _centre(self) -> Any:
        return create_transform(self.eval_size, crop_pct=self.crop, crop_mode="center", interpolation="bilinear")


def _seen_through(dataset: Any, transform: Any) -> Any:
    """The same images, each transformed; they are not looked for again."""
    other = copy(dataset)
    other.transform = transform
    return other


def _folder(data: Data, folder: Path, split: str) -> Any:
    files = folder / data.path
    names = ("train",) if split == TRAIN else ("val", "validation")
    roots = [files / name for name in names if (files / name).is_dir()]
    if not roots:
        raise SystemExit(
            f"{files / names[0]} is not there. ImageNet comes from https://image-net.org; unpack it so that there is a "
            f"folder for each class in {files / 'train'} and in {files / 'val'}, or name the folder: --set data.path=…"
        )
    dataset: Any = create_dataset("", root=str(roots[0]), search_split=False)
    found = len(dataset.reader.class_to_idx)
    if found != data.classes:
        raise SystemExit(f"{roots[0]} has folders for {found} classes, but data.classes is {data.classes}.")
    return dataset


def _webdataset(data: Data, folder: Path, split: str) -> Any:
    """Shards of samples with an image ``.jpg`` and a label ``.cls``; ``datasets`` copies them into ``folder/cache``.

    timm's own reader of shards gives a stream, of which nothing can be held out and which cannot go on exactly.
    """
    files = folder / data.path
    prefix = TRAIN if split == TRAIN else "val"
    if not any(prefix in file.name for file in files.glob("*.tar")):
        raise SystemExit(
            f"{files} has no shard whose name tells that it is {prefix}, such as imagenet1k-{split}-0000.tar."
        )
    return create_dataset(
        f"hfds/{files}",
        root=str(folder / "cache"),
        split=split,
        input_key="jpg",
        target_key="cls",
    )


def fashion_mnist_folder(folder: Path, name: str = "fashion-mnist-folder") -> Path:
    """Fashion-MNIST's images as files, in the folders that ImageNet has.

    Args:
        folder: of all data sets.
        name: of the folder in it.

    Raises:
        SystemExit: as :func:`recipes.machinery.data.fetch`.
    """

    def write(making: Path) -> Path:
        for (split, count), pictures in zip(STAND_IN.items(), fashion_mnist.read(folder), strict=True):
            for label in set(pictures.labels.tolist()):
                (making / split / str(label)).mkdir(parents=True)
            labelled = zip(pictures.labels[:count].tolist(), pictures.pixels[:count, 0].numpy(), strict=True)
            for number, (label, pixels) in enumerate(labelled):
                Image.fromarray(pixels).save(making / split / str(label) / f"{number:05}.png")
        return making

    return filled(folder / name, write)


def _fashion_mnist(data: Data, folder: Path, split: str) -> Any:
    fashion_mnist_folder(folder, data.path)
    return _folder(data, folder, split)


FORMATS = {"folder": _folder, "webdataset": _webdataset, "fashion-mnist": _fashion_mnist}
