"""Fine-tuning with Hugging Face's Trainer: what the scripts of the recipes share, and how a run of a recipe calls one.

A script is a :class:`Script` and a call of :func:`finetune`; it takes TrainingArguments and its own arguments from the
command line. A run gives it a command line that was made from a configuration (:func:`arguments_of`):

- ``[data]``: ``name``, a data set of recipes/data.py or else of the Hugging Face hub; the rest are arguments of the
  script, such as ``held_out``, or ``train_file`` and ``test_file`` where there is no name.
- ``[model]``: ``name``, a model of recipes/data.py or else of the hub, or a folder.
- ``[train]``: arguments of the script and TrainingArguments under their own names, but for ``batch_size``, which is
  that of all processes together.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset, disable_progress_bars, load_dataset  # type: ignore[import-untyped]
from transformers import (
    AutoTokenizer,
    EvalPrediction,
    HfArgumentParser,
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from recipes.machinery import minilm
from recipes.machinery.data import DATA_SETS
from recipes.machinery.record import Outcome, class_name

if TYPE_CHECKING:
    from recipes.machinery.config import Settings
    from recipes.machinery.run import Run

Row = dict[str, Any]
SPLITS = ("train", "validation", "test")
SEED = 0  # of what is held out
MODELS = {"minilm": minilm.FOLDER}  # of recipes/data.py: their folders in the folder of all data sets


@dataclass
class Arguments:
    """What the scripts take beside TrainingArguments; ``--help`` has the texts."""

    model_name_or_path: str = field(metadata={"help": "a model of the Hugging Face hub, or a folder"})
    dataset: str | None = field(
        default=None, metadata={"help": "a data set of the hub; its validation set is what is called the test set here"}
    )
    train_file: str | None = field(default=None, metadata={"help": "instead of --dataset: the training set"})
    validation_file: str | None = field(default=None, metadata={"help": "instead of --held_out: the validation set"})
    test_file: str | None = field(default=None, metadata={"help": "instead of --dataset: the test set"})
    held_out: float = field(
        default=0.0, metadata={"help": "share of the training set's groups (articles, videos) that are for validation"}
    )
    max_train_samples: int | None = field(default=None, metadata={"help": "train on so many only, drawn at random"})
    max_eval_samples: int | None = field(
        default=None, metadata={"help": "validate on so many only, and test on so many, drawn at random"}
    )
    max_length: int = field(default=384, metadata={"help": "of a sequence, in tokens"})
    num_hidden_layers: int | None = field(default=None, metadata={"help": "take the model's first layers only"})
    freeze_embeddings: bool = field(default=False, metadata={"help": "do not train the token embeddings"})
    threads: int = field(default=0, metadata={"help": "of torch on the CPU, for each process; 0 leaves it to torch"})

    def __post_init__(self) -> None:
        files = self.train_file, self.test_file
        if (self.dataset is None) == (None in files) or (self.dataset is not None and any(files)):
            raise ValueError(
                f"Invalid --dataset: {self.dataset!r} with --train_file {self.train_file!r} and --test_file "
                f"{self.test_file!r}. Accepted: either --dataset, or both files."
            )
        if not 0 <= self.held_out < 1 or (self.held_out and self.validation_file):
            raise ValueError(
                f"Invalid --held_out: {self.held_out} with --validation_file {self.validation_file!r}. Accepted: a "
                "share from 0 to below 1, and only where there is no validation file."
            )


@dataclass(frozen=True)
class Script:
    """What one script adds.

    Attributes:
        path: of the script, from the repository's root.
        arguments: its own arguments.
        model: an Auto class of Transformers.
        read: the rows of a local file, with the columns that the hub's data set has.
        group: of a row: the rows of a group are held out together.
        encode: tokens and labels of rows, from the rows, the tokenizer and the arguments. Columns that the model does
            not take are for ``measure``.
        collator: makes batches, from the tokenizer.
        measure: the metrics, from the encoded data set, the predictions and the arguments.
        metrics: their names.
        files: data set of recipes/data.py → split → its file in the folder of all data sets.
    """

    path: str
    arguments: type[Arguments]
    model: Any
    read: Callable[[Path], list[Row]]
    group: Callable[[Row], str]
    encode: Callable[[list[Row], Any, Any], Dataset]
    collator: Callable[[Any], Any]
    measure: Callable[[Dataset, EvalPrediction, Any], dict[str, float]]
    metrics: tuple[str, ...]
    files: Mapping[str, Mapping[str, str]]

    def parse(self, arguments: Sequence[str] | None) -> tuple[Any, TrainingArguments]:
        """The script's own arguments and Trainer's.

        Raises:
            ValueError: an argument that there is not, or an invalid one.
            SystemExit: an argument without value, or with one of the wrong type; argparse has said so.
        """
        parser = HfArgumentParser((self.arguments, TrainingArguments))  # type: ignore[arg-type]
        own, trainers = parser.parse_args_into_dataclasses(None if arguments is None else list(arguments))
        return own, trainers


class _Trainer(Trainer):
    """A Trainer whose metrics are computed from the data set too: an answer's text is not in the model's inputs."""

    measure: Callable[[Dataset, EvalPrediction], dict[str, float]]

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        self.compute_metrics = lambda prediction: self.measure(dataset, prediction)
        metrics: dict[str, float] = super().evaluate(dataset, ignore_keys, metric_key_prefix)
        return metrics


def finetune(script: Script, arguments: Sequence[str] | None = None, run: Run | None = None) -> Outcome:
    """Train, evaluate on the validation set as TrainingArguments say and at the end, and on the test set at the end.

    Args:
        script: what is trained.
        arguments: the command line; None for the process's own.
        run: where it is told how it goes; None where the script was started by hand.

    Raises:
        ValueError: as :meth:`Script.parse`; a tokenizer without offsets; several GPUs in one process.
    """
    own, trainers = script.parse(arguments)
    if trainers.n_gpu > 1:
        raise ValueError(
            f"Invalid number of GPUs in one process: {trainers.n_gpu}, which multiplies the batch. Accepted: one. "
            f"Start as many processes, torchrun --nproc_per_node={trainers.n_gpu}, or set CUDA_VISIBLE_DEVICES=0."
        )
    if own.threads:
        torch.set_num_threads(own.threads)
    set_seed(trainers.seed)
    tokenizer = AutoTokenizer.from_pretrained(own.model_name_or_path)
    if not tokenizer.is_fast:
        raise ValueError(f"Invalid --model_name_or_path: {own.model_name_or_path!r} has no fast tokenizer.")
    layers = {"num_hidden_layers": own.num_hidden_layers} if own.num_hidden_layers else {}
    model = script.model.from_pretrained(own.model_name_or_path, **layers)
    model.get_input_embeddings().requires_grad_(not own.freeze_embeddings)
    if run:
        disable_progress_bars()
    data = {split: script.encode(rows, tokenizer, own) for split, rows in load(script, own).items()}
    if "validation" not in data:
        trainers.eval_strategy = trainers.eval_strategy.__class__("no")
    trainer = _Trainer(
        model,
        trainers,
        data_collator=script.collator(tokenizer),
        train_dataset=data["train"],
        eval_dataset=data.get("validation", data["test"]),
        processing_class=tokenizer,
    )
    trainer.measure = lambda dataset, prediction: script.measure(dataset, prediction, own)
    if run:
        for callback in (PrinterCallback, ProgressCallback):  # the run tells every step, in its own way
            trainer.remove_callback(callback)
        trainer.add_callback(Teller(run, script.metrics))
    trainer.train(resume_from_checkpoint=trainers.resume_from_checkpoint)

    found: dict[str, float] = {}
    if "validation" in data:
        last = [line for line in trainer.state.log_history if line["step"] == trainer.state.global_step]
        evaluated = {key: value for line in last for key, value in line.items()}
        if f"eval_{script.metrics[0]}" not in evaluated:
            evaluated = trainer.evaluate()
        found |= {f"valid {name}": evaluated[f"eval_{name}"] for name in script.metrics}
    tested = trainer.evaluate(data["test"], metric_key_prefix="test")
    found |= {f"test {name}": tested[f"test_{name}"] for name in script.metrics}
    if not run and trainer.is_world_process_zero():
        print("\n".join(f"{name}: {value:.4g}" for name, value in found.items()))
    return Outcome(found, class_name(trainer.optimizer))


def load(script: Script, own: Arguments) -> dict[str, list[Row]]:
    """The rows of each split that there is."""
    if own.dataset:
        hub = load_dataset(own.dataset)
        rows = {"train": list(hub["train"]), "test": list(hub["validation"])}
    else:
        named = {split: getattr(own, f"{split}_file") for split in SPLITS}
        rows = {split: script.read(Path(file)) for split, file in named.items() if file}
    if own.held_out:
        rows |= hold_out(rows["train"], script.group, own.held_out)
    most = {"train": own.max_train_samples, "validation": own.max_eval_samples, "test": own.max_eval_samples}
    return {
        split: random.Random(SEED).sample(part, min(most[split] or len(part), len(part)))
        for split, part in rows.items()
    }


def hold_out(rows: list[Row], group: Callable[[Row], str], share: float) -> dict[str, list[Row]]:
    """Split by groups, always in the same way.

    Args:
        rows: all of them.
        group: of a row.
        share: of the groups that become the validation set, one at least.
    """
    groups = sorted({group(row) for row in rows})
    held = set(random.Random(SEED).sample(groups, max(1, round(share * len(groups)))))
    return {
        "train": [row for row in rows if group(row) not in held],
        "validation": [row for row in rows if group(row) in held],
    }


class Teller(TrainerCallback):
    """Tells a run its losses, evaluations and checkpoints.

    Args:
        run: the run.
        metrics: the names of what is evaluated.
    """

    def __init__(self, run: Run, metrics: Sequence[str]) -> None:
        self.run = run
        self.metrics = metrics

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if logs and "loss" in logs:
            self.run.step(state.global_step, state.max_steps, float(logs["loss"]))

    def on_evaluate(
        self, args: Any, state: Any, control: Any, metrics: Mapping[str, float] | None = None, **kwargs: Any
    ) -> None:
        if metrics and f"eval_{self.metrics[0]}" in metrics:
            self.run.evaluation(state.global_step, {f"valid {name}": metrics[f"eval_{name}"] for name in self.metrics})

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.run.checkpointed(state.global_step)


@dataclass(frozen=True)
class Optimizer:
    """The table ``[optimizer]``: Trainer's ``optim``, ``learning_rate``, ``weight_decay`` and ``optim_args``."""

    opt: str
    lr: float
    weight_decay: float
    options: Mapping[str, Any]

    @property
    def arguments(self) -> dict[str, Any]:
        options = ",".join(f"{name}={_text(value)}" for name, value in self.options.items())
        named = {"optim": self.opt, "learning_rate": self.lr, "weight_decay": self.weight_decay}
        return {**named, **({"optim_args": options} if options else {})}


def train(run: Run, script: Script) -> Outcome:
    """A run of a task: fetches what it needs, and calls the script in this process.

    Raises:
        ValueError: as :func:`arguments_of`; before anything is fetched.
    """
    output = run.work / "trainer"
    arguments = arguments_of(script, run.settings, run.data, output)
    for name in (run.settings[table].get("name") for table in ("data", "model")):
        if name in DATA_SETS:
            DATA_SETS[name].fetch(run.data)
    if run.resumed:
        arguments += ["--resume_from_checkpoint", str(output / f"checkpoint-{steps_told(run)}")]
    return finetune(script, arguments, run)


def steps_told(run: Run) -> int:
    """The step of the checkpoint that belongs to what was told: an interrupted run may have written a later one."""
    told = run.curve.points
    return int(told[-1][0] if told else 0) + len(run.curve.pending)


def commands(script: Script, settings: Settings, data: Path) -> list[list[str]]:
    """How the same is started with the script."""
    output = Path("runs") / settings.task / settings.stem
    return [["python", script.path, *arguments_of(script, settings, data, output)]]


def arguments_of(script: Script, settings: Settings, data: Path, output: Path) -> list[str]:
    """The script's command line for a configuration.

    Args:
        script: the script.
        settings: with the tables that are described above.
        data: the folder of all data sets.
        output: where Trainer keeps its checkpoints.

    Raises:
        ValueError: an unknown entry of a table, or a batch that the processes cannot share.
    """
    table = dict(settings["data"])
    name = table.pop("name", None)
    files = {f"{split}_file": data / file for split, file in script.files.get(name, {}).items()}
    given: dict[str, Any] = {**(files or ({"dataset": name} if name else {})), **table}
    model = dict(settings["model"])
    name = model.pop("name")
    given |= {"model_name_or_path": data / MODELS[name] if name in MODELS else name, **model}
    given |= {"output_dir": output, "seed": settings.seed, "save_total_limit": 2, "report_to": "none"}
    given |= {"logging_steps": 1, "logging_nan_inf_filter": False}  # every loss is told, as it is
    given |= settings["train"]
    batch, processes = given.pop("batch_size"), int(os.environ.get("WORLD_SIZE", "1"))
    if batch % processes:
        raise ValueError(f"Invalid train.batch_size: {batch}. {processes} processes cannot share it equally.")
    given |= {"per_device_train_batch_size": batch // processes}
    try:
        given |= Optimizer(**settings.optimizer).arguments
    except TypeError as error:
        raise ValueError(f"Invalid [optimizer] of {settings.label}: {error}.") from error
    arguments = [text for key, value in given.items() for text in (f"--{key}", _text(value))]
    script.parse(arguments)
    return arguments


def _text(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return ":".join(map(_text, value))  # in optim_args, a comma is between options
    return str(value).lower() if isinstance(value, bool) else str(value)
