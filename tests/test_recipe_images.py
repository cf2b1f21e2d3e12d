"""The recipes imagenet and cifar100: their data, models and configurations, exact resumption, two processes."""

from __future__ import annotations

import gzip
import io
import json
import os
import subprocess
import sys
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import debian
import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torchvision.transforms import functional

from recipes import run
from recipes.machinery import config, data, fashion_mnist, vision
from recipes.machinery.run import Run
from recipes.tasks.cifar100 import data as small_pictures
from recipes.tasks.cifar100.augment import Augmentation, augment, move
from recipes.tasks.cifar100.task import Data, Look, Model
from recipes.tasks.imagenet import task as imagenet
from recipes.tasks.imagenet.data import Data as ImageNet

RUN = config.RECIPES / "run.py"
CONFIGS = [
    *(("cifar100", name) for name in ("paper", "small")),
    *(("imagenet", name) for name in ("paper", "paper-resnet34", "small")),
]
METRICS = {f"{split} {metric}" for split in ("valid", "test") for metric in ("accuracy", "loss")}
LABELS = ["sing_adamw", "adamw", "adamw_gc", "adabelief", "sgd"]  # of Table 1
CLASSES = {"adamw": "AdamW", "adabelief": "AdaBelief", "sgd": "SGD"}  # of the others, SING

Start = Callable[..., dict[str, Any]]


def idx(array: np.ndarray) -> bytes:
    """A file as MNIST's are."""
    return bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes() + array.tobytes()


@pytest.fixture
def clothes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data folder whose Fashion-MNIST is a small package of the official form: label k has a bright row k."""
    random = np.random.default_rng(0)
    files = {}
    for part, count in (("train", 60), ("t10k", 21)):
        labels = random.integers(0, 10, count, dtype=np.uint8)
        pixels = random.integers(0, 100, (count, 28, 28), dtype=np.uint8)
        pixels[np.arange(count), labels * 2 + 4] = 255
        for name, array in ((f"{part}-images-idx3", pixels), (f"{part}-labels-idx1", labels)):
            files[f"usr/share/datasets/fashion-mnist/{name}-ubyte.gz"] = gzip.compress(idx(array))
    package = tmp_path / "clothes_1_all.deb"
    package.write_bytes(debian.package({"usr/share/doc/readme": b"clothes", **files}))
    download = data.Download((package.as_uri(),), data.digest(package))
    monkeypatch.setattr(fashion_mnist, "PACKAGE", download)
    return tmp_path


@pytest.fixture
def photographs(tmp_path: Path) -> Path:
    """A data folder whose ImageNet has three classes, each of a colour of its own."""
    random = np.random.default_rng(0)
    for split, count in (("train", 6), ("val", 3)):
        for name in range(3):
            folder = tmp_path / "imagenet" / split / f"n{name}"
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = random.integers(0, 80, (40, 52, 3), dtype=np.uint8)
                pixels[..., name] += 150
                Image.fromarray(pixels).save(folder / f"{number}.png")
    return tmp_path


@pytest.fixture
def start(tmp_path: Path) -> Start:
    """Start recipes/run.py in this process; returns the record."""

    def started(task: str, name: str, folder: Path, results: str, *changes: str, more: tuple[str, ...] = ()) -> Any:
        settings = [argument for change in changes for argument in ("--set", change)]
        places = ["--data", str(folder), "--work", str(tmp_path / "work"), "--results", str(tmp_path / results)]
        code = run.main([task, name, *settings, *places, *more])
        files = list((tmp_path / results).rglob("*.json"))
        return json.loads(files[0].read_text()) if files else code

    return started


def outcome(record: dict[str, Any]) -> dict[str, Any]:
    return {key: record[key] for key in ("status", "metrics", "optimizer_class", "curve", "evaluations", "spikes")}


@pytest.mark.parametrize(("task", "name"), CONFIGS)
def test_configurations_have_the_optimizers_of_the_table(task: str, name: str) -> None:
    labels = config.labels(task, name)
    added = [label for label in labels if label not in LABELS]
    assert [label for label in labels if label not in added] == LABELS
    assert bool(added) == ((task, name) == ("cifar100", "small"))
    for label in labels:
        settings = config.load(task, name, label)
        vision.Training(**settings["train"])
        optimizer = vision.create_optimizer(nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)), settings.optimizer)
        assert type(optimizer).__name__ == CLASSES.get(label, "SING")
        assert [group["weight_decay"] for group in optimizer.param_groups] == [0.0, settings.optimizer["weight_decay"]]
        assert settings["tune"]["lr"]


def test_centralization_alone_is_neither_normalized_nor_looking_ahead() -> None:
    for task, name in CONFIGS:
        settings = config.load(task, name, "adamw_gc")
        optimizer = vision.create_optimizer(nn.Linear(2, 2), settings.optimizer)
        group = optimizer.param_groups[0]
        kept = [group[feature] for feature in ("centralize", "normalize", "softplus_beta", "lookahead_k")]
        assert kept == [True, False, None, None]


def test_warmup_of_the_paper_is_five_epochs() -> None:
    for task, name in CONFIGS:
        training = vision.Training(**config.load(task, name)["train"])
        steps = 1000 * training.epochs
        if name != "small":
            assert round(training.warmup * steps) == 5000


def test_cifar_resnet18_is_the_papers_and_its_norms_are_frozen() -> None:
    model = Model(**config.load("cifar100", "paper")["model"]).build(3, 100)
    assert sum(parameter.numel() for parameter in model.parameters()) == 11_220_132
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 100)
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    norms = {name for name, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)}
    assert frozen == {f"{name}.{kind}" for name in norms for kind in ("weight", "bias")}
    assert all(bool(module.weight.eq(1).all()) for module in model.modules() if isinstance(module, nn.BatchNorm2d))


def test_frozen_norms_reach_no_optimizer() -> None:
    settings = config.load("cifar100", "small")
    model = Model(**settings["model"]).build(1, 10)
    trained = sum(parameter.requires_grad for parameter in model.parameters())
    for label in LABELS:
        optimizer = vision.create_optimizer(model, config.load("cifar100", "small", label).optimizer)
        assert sum(len(group["params"]) for group in optimizer.param_groups) == trained


def test_augmentation_is_torchvisions_crop_flip_and_rotation() -> None:
    pictures = torch.rand(12, 3, 17, 17)
    pixels = torch.randint(-4, 5, (12, 2))
    mirrored = torch.arange(12) % 2 == 0
    degrees = torch.linspace(-15, 15, 12)
    moved = move(pictures, pixels * 2 / 17, mirrored, torch.deg2rad(degrees))
    for one, (x, y), flip, angle, got in zip(pictures, pixels.tolist(), mirrored, degrees.tolist(), moved, strict=True):
        expected = functional.crop(functional.pad(one, [4]), 4 + y, 4 + x, 17, 17)
        expected = functional.hflip(expected) if flip else expected
        expected = functional.rotate(expected, angle)
        differs = (expected - got).abs().amax(dim=0) > 1e-6
        assert differs.float().mean() < 0.01  # a pixel that lies between two others may go either way


def test_augmentation_that_does_nothing_changes_nothing_and_the_seed_decides() -> None:
    pictures = torch.rand(8, 1, 28, 28)
    assert augment(pictures, Augmentation()).equal(pictures)
    torch.manual_seed(1)
    one = augment(pictures, Augmentation(padding=4, flip=True, rotation=15))
    torch.manual_seed(1)
    assert augment(pictures, Augmentation(padding=4, flip=True, rotation=15)).equal(one)
    assert not augment(pictures, Augmentation(padding=4, flip=True, rotation=15)).equal(one)


def test_pixels_are_normalized_with_the_data_sets_values() -> None:
    source = small_pictures.SOURCES["cifar100"]
    shown = Look(source)(torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1).expand(2, 3, 1, 1))
    expected = torch.tensor([[-0.5071 / 0.2675, -0.4867 / 0.2565, -0.4408 / 0.2761], [0.4929 / 0.2675, 0, 0]])
    assert torch.allclose(shown[0].flatten(), expected[0])
    assert shown[1, 0].item() == pytest.approx(expected[1, 0].item())


def test_clothes_are_read_out_of_the_package_and_divided(clothes: Path) -> None:
    sets = Data("fashion-mnist", train=40, valid=15).load(clothes)
    assert {split: len(part) for split, part in sets.items()} == {"train": 40, "valid": 15, "test": 21}
    for part in sets.values():
        pixels, labels = part.tensors
        assert pixels.shape[1:] == (1, 28, 28)
        assert pixels.dtype == torch.uint8
        assert (pixels[torch.arange(len(labels)), 0, labels * 2 + 4] == 255).all()
    pictures = [picture.numpy().tobytes() for split in ("train", "valid") for picture in sets[split].tensors[0]]
    assert len(set(pictures)) == 55
    assert set(Data("fashion-mnist", train=60, valid=0).load(clothes)) == {"train", "test"}
    with pytest.raises(ValueError, match=r"data\.train, data\.valid: 50, 15\. There are 60"):
        Data("fashion-mnist", train=50, valid=15).load(clothes)


def test_what_cannot_be_downloaded_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nowhere = (tmp_path / "nowhere").as_uri()
    for module, name, prepare, known in (
        (small_pictures, "ARCHIVE", small_pictures.cifar100, "cifar-100-python.tar.gz"),
        (fashion_mnist, "PACKAGE", fashion_mnist.prepare, "dataset-fashion-mnist"),
    ):
        download = getattr(module, name)
        monkeypatch.setattr(module, name, replace(download, urls=(f"{nowhere}/{download.name}",)))
        with pytest.raises(SystemExit, match=rf"{known}[\s\S]*curl[\s\S]*{download.digest}"):
            prepare(tmp_path)


def test_cifar100_with_other_files_than_the_official_ones_is_not_opened(tmp_path: Path) -> None:
    (tmp_path / "cifar-100-python").mkdir()
    (tmp_path / "cifar-100-python" / "train").write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")
    with pytest.raises(SystemExit, match="md5"):
        small_pictures.read_cifar100(tmp_path)


def test_cifar100_pictures_have_their_channels_first() -> None:
    pixels = np.arange(2 * 4 * 4 * 3, dtype=np.uint8).reshape(2, 4, 4, 3)
    pictures = small_pictures._channels_first(pixels, [7, 99])
    assert pictures.pixels[1, 2, 0, 3] == pixels[1, 0, 3, 2]
    assert pictures.labels.tolist() == [7, 99]


@pytest.mark.parametrize("label", ["sing_adamw", "sgd"])
def test_cifar100_paper_configuration_runs(label: str, clothes: Path, start: Start) -> None:
    changes = ("data.name=fashion-mnist", "data.train=8", "data.valid=5", "train.epochs=1", "train.batch_size=4")
    record = start("cifar100", "paper", clothes, "results", *changes, more=("--optimizer", label))
    assert record["status"] == "finished"
    assert record["optimizer_class"].endswith(CLASSES.get(label, "SING"))
    assert set(record["metrics"]) == METRICS


SMALL = ("data.train=32", "data.valid=12", "train.epochs=3", "train.batch_size=8", "train.evaluate_every=1")


def test_cifar100_goes_on_exactly(clothes: Path, start: Start) -> None:
    whole = start("cifar100", "small", clothes, "whole", *SMALL)
    assert start("cifar100", "small", clothes, "parts", *SMALL, more=("--stop-after", "4")) == run.STOPPED
    parts = start("cifar100", "small", clothes, "parts", *SMALL, more=("--resume",))
    assert outcome(parts) == outcome(whole)
    assert len(whole["evaluations"]) == 3


def test_without_a_validation_set_only_the_test_set_counts(clothes: Path, start: Start) -> None:
    record = start("cifar100", "small", clothes, "results", *SMALL, "data.valid=0", "train.epochs=1")
    assert set(record["metrics"]) == {"test accuracy", "test loss"}
    assert record["evaluations"] == []


def test_imagenet_blurs_before_the_convolutions_that_ffcv_blurs_before() -> None:
    model = imagenet.Model("resnet18").build(1000)
    blurred = {name.removesuffix(".0") for name, module in model.named_modules() if isinstance(module, imagenet.Blur)}
    assert blurred == {f"layer{layer}.0.{conv}" for layer in (2, 3, 4) for conv in ("conv1", "downsample.0")}
    assert sum(parameter.numel() for parameter in model.parameters()) == 11_689_512
    assert all(bool(module.weight.eq(1).all()) for module in model.modules() if isinstance(module, nn.BatchNorm2d))


def test_blur_is_the_binomial_filter_with_zeros_around() -> None:
    dot = torch.zeros(1, 2, 3, 3)
    dot[0, 1, 1, 1] = 16
    assert imagenet.Blur(2)(dot)[0, 1].tolist() == [[1, 2, 1], [2, 4, 2], [1, 2, 1]]
    assert imagenet.Blur(2)(dot)[0, 0].eq(0).all()
    assert imagenet.Blur(1)(torch.ones(1, 1, 5, 5))[0, 0, 0, 0] == 9 / 16


def test_imagenet_folder_gives_the_papers_sizes_and_holds_out_what_is_tuned_with(photographs: Path) -> None:
    settings = {**config.load("imagenet", "paper")["data"], "classes": 3, "valid": 5}
    sets: Any = ImageNet(**settings).load(photographs)
    assert {split: len(part) for split, part in sets.items()} == {"train": 13, "valid": 5, "test": 9}
    assert {split: tuple(part[0][0].shape) for split, part in sets.items()} == {
        "train": (3, 192, 192),
        "valid": (3, 224, 224),
        "test": (3, 224, 224),
    }
    assert sorted(sets["train"].indices + sets["valid"].indices) == list(range(18))
    for part in sets.values():
        assert all(image.mean(dim=(1, 2)).argmax() == label for image, label in part)  # each class has its colour
    crop, flip = sets["train"].dataset.transform.transforms[:2]
    assert (crop.scale, crop.ratio, flip.p) == ((0.08, 1.0), (3 / 4, 4 / 3), 0.5)
    assert sets["test"].transform.transforms[0].size == 256


def test_imagenet_that_is_not_there_or_has_other_classes_is_told(photographs: Path) -> None:
    with pytest.raises(SystemExit, match=r"nowhere/train is not there.*--set data\.path"):
        ImageNet(path="nowhere").load(photographs)
    with pytest.raises(SystemExit, match=r"folders for 3 classes, but data\.classes is 1000"):
        ImageNet().load(photographs)
    with pytest.raises(ValueError, match=r"data\.format: 'ffcv'\. Accepted: folder, webdataset, fashion-mnist"):
        ImageNet(format="ffcv")
    (photographs / "imagenet" / "val" / "n0").rename(photographs / "imagenet" / "val" / "n7")
    with pytest.raises(SystemExit, match="different names"):
        ImageNet(classes=3, valid=5).load(photographs)


def test_imagenet_comes_out_of_webdataset_shards_too(photographs: Path) -> None:
    shards = photographs / "shards"
    shards.mkdir()
    for split, folder in (("train", "train"), ("validation", "val")):
        with tarfile.open(shards / f"imagenet1k-{split}-0000.tar", "w") as tar:
            for file in sorted((photographs / "imagenet" / folder).rglob("*.png")):
                picture = io.BytesIO()
                Image.open(file).save(picture, "JPEG")
                label = file.parent.name.removeprefix("n").encode()
                for suffix, content in (("jpg", picture.getvalue()), ("cls", label)):
                    member = tarfile.TarInfo(f"{file.parent.name}_{file.stem}.{suffix}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    sets: Any = ImageNet(path="shards", format="webdataset", classes=3, valid=5).load(photographs)
    assert {split: len(part) for split, part in sets.items()} == {"train": 13, "valid": 5, "test": 9}
    for part in sets.values():
        assert all(image.mean(dim=(1, 2)).argmax() == label for image, label in part)


def test_clothes_stand_in_for_imagenet_as_files(clothes: Path, start: Start) -> None:
    changes = ("data.valid=20", "train.batch_size=8", "train.epochs=1")
    record = start("imagenet", "small", clothes, "results", *changes)
    assert record["optimizer_class"] == "sing_plugins.SING"
    assert set(record["metrics"]) == METRICS
    files = clothes / "fashion-mnist-folder"
    train, test = fashion_mnist.read(clothes)
    for split, pictures in (("train", train), ("val", test)):
        written = {int(file.stem): file for file in (files / split).rglob("*.png")}
        assert len(written) == len(pictures.labels)
        for number, file in written.items():
            assert int(file.parent.name) == pictures.labels[number]
            assert (np.asarray(Image.open(file)) == pictures.pixels[number, 0].numpy()).all()


def test_the_mirror_image_has_its_say() -> None:
    class Left(nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return images[:, 0, 0, :1] * torch.tensor([1.0, -1.0])

    image = torch.tensor([-1.0, 3.0]).expand(1, 3, 2, 2)
    batch = (image, torch.tensor([0]))
    assert not imagenet.Evaluation()(Left(), batch)["accuracy"].item()
    assert imagenet.Evaluation(flip_average=True)(Left(), batch)["accuracy"].item()


TINY = ("data.classes=3", "data.valid=4", "data.train_size=32", "data.eval_size=40", "train.batch_size=4")
ON_A_CPU = ("train.precision=no", "train.workers=1", "train.epochs=2")


@pytest.mark.parametrize("name", ["paper", "paper-resnet34"])
def test_imagenet_paper_configuration_runs(name: str, photographs: Path, start: Start) -> None:
    record = start("imagenet", name, photographs, "results", *TINY, *ON_A_CPU, "train.epochs=1")
    assert record["status"] == "finished"
    assert record["optimizer_class"] == "sing_plugins.SING"
    assert set(record["metrics"]) == METRICS


def test_imagenet_goes_on_exactly_with_images_loaded_by_another_process(photographs: Path, start: Start) -> None:
    whole = start("imagenet", "paper", photographs, "whole", *TINY, *ON_A_CPU)
    assert start("imagenet", "paper", photographs, "parts", *TINY, *ON_A_CPU, more=("--stop-after", "1")) == run.STOPPED
    parts = start("imagenet", "paper", photographs, "parts", *TINY, *ON_A_CPU, more=("--resume",))
    assert outcome(parts) == outcome(whole)


@pytest.mark.parametrize(
    ("task", "table"),
    [(task, table) for task in ("cifar100", "imagenet") for table in ("data", "model", "loss")]
    + [("cifar100", "augment"), ("imagenet", "evaluation")],
)
def test_an_unknown_key_is_refused_before_data_is_looked_for(task: str, table: str, tmp_path: Path) -> None:
    settings = config.load(task, "paper")
    settings.tables[table]["colour"] = 1
    with pytest.raises(TypeError, match="colour"):
        config.task_module(task).train(Run(settings, tmp_path, tmp_path, None))


def test_two_processes_see_what_one_sees_and_write_one_record(tmp_path: Path) -> None:
    """RDE, since it has no batch statistics: 21 test pictures are no multiple of anything, so some are seen twice."""
    changes = ["data.train=64", "data.valid=10", "data.test=21", "model.depth=1", "train.epochs=2"]
    changes += ["train.batch_size=16"]
    records = {}
    for processes in (1, 2):
        results = tmp_path / f"results{processes}"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
        command += [str(RUN), "rde", "small", "--optimizer", "adamw"]
        command += [argument for change in changes for argument in ("--set", change)]
        command += ["--data", str(tmp_path), "--work", str(tmp_path / "work"), "--results", str(results)]
        environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
        assert done.returncode == 0, done.stdout + done.stderr
        (file,) = results.rglob("*.json")
        records[processes] = json.loads(file.read_text())
    one, two = records[1], records[2]
    assert [step for step, _ in two["curve"]] == [step for step, _ in one["curve"]]
    assert np.allclose(two["curve"], one["curve"], rtol=1e-3)
    assert two["metrics"] == pytest.approx(one["metrics"], rel=1e-3)
    assert two["metrics"]["test accuracy"] * 21 == pytest.approx(round(two["metrics"]["test accuracy"] * 21), abs=1e-3)
