"""SING by name in tools on top of the frameworks: PEFT, TRL, sentence-transformers, and what others call directly.

Of adapters and open_clip the calls are repeated, as adapters 1.3.0 and open_clip 3.3.0 make them.
"""

from __future__ import annotations

import copy
import functools
import logging
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from datasets import Dataset
from peft import (
    IA3Config,
    LNTuningConfig,
    LoraConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
    losses,
)
from test_with_transformers import FULL_BATCH, arguments, assert_close, bert, rows, said, trained
from timm.optim import create_optimizer_v2
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
    Trainer,
)
from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer, SFTConfig, SFTTrainer
from trl.scripts import sft

from sing_plugins import SING
from sing_plugins.step import sync_lookahead

CPU = {"use_cpu": True, "bf16": False, "report_to": "none", "save_strategy": "no", "disable_tqdm": True}
WORDS = [f"w{number}" for number in range(20)]


@pytest.fixture(autouse=True)
def nothing_left_behind() -> Iterator[None]:
    """TRL trains in bfloat16 by default, and an old Accelerate lets nobody else in the process do otherwise."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def inner(optimizer: Any) -> Any:
    """What a framework has put its own wrapper around."""
    return getattr(optimizer, "optimizer", optimizer)


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: param.detach().clone() for name, param in model.named_parameters()}


def moved(model: nn.Module, since: dict[str, Tensor]) -> set[str]:
    return {name for name, param in model.named_parameters() if not torch.equal(param, since[name])}


def trainable(model: nn.Module) -> set[str]:
    return {name for name, param in model.named_parameters() if param.requires_grad}


def sizes(optimizer: torch.optim.Optimizer) -> int:
    return sum(len(group["params"]) for group in optimizer.param_groups)


def tokenizer() -> PreTrainedTokenizerFast:
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "bos_token": "[BOS]", "eos_token": "[EOS]"}
    words = WordLevel({word: place for place, word in enumerate([*special.values(), *WORDS])}, unk_token="[UNK]")
    made = Tokenizer(words)
    made.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=made, model_max_length=32, **special)


def sentence(generator: torch.Generator, length: int = 6) -> str:
    return " ".join(WORDS[place] for place in torch.randint(0, len(WORDS), (length,), generator=generator))


# ---------------------------------------------------------------------------------------------------------------- PEFT


def classifier() -> nn.Module:
    model = bert()
    model.classifier = model.classifier[1]
    return model


TARGETS = {"target_modules": ["query", "value"], "task_type": "SEQ_CLS"}
ADAPTERS = {
    "LoRA": LoraConfig(**TARGETS),
    "DoRA": LoraConfig(use_dora=True, **TARGETS),
    "IA3": IA3Config(feedforward_modules=[], **TARGETS),
}
NORMS = LoraConfig(modules_to_save=["classifier", "LayerNorm"], **TARGETS)
# An adapter that has more entries than what it adapts.
LARGE = LoraConfig(r=48, target_modules="all-linear", modules_to_save=["classifier", "LayerNorm"], task_type="SEQ_CLS")
NORM_TUNING = LNTuningConfig(target_modules=["LayerNorm"], task_type="SEQ_CLS")


def adapted(config: Any) -> PeftModel:
    model = classifier()
    torch.manual_seed(1)
    return get_peft_model(model, copy.deepcopy(config))


def peft_trainer(folder: Path, model: nn.Module, optim: str = "sing_adamw", **options: Any) -> Trainer:
    return Trainer(model=model, args=arguments(folder, optim, **options), train_dataset=rows())


@pytest.mark.parametrize("kind", ADAPTERS)
def test_an_adapter_is_trained_as_in_a_loop_by_hand_and_its_base_is_left_alone(kind: str, tmp_path: Path) -> None:
    model = adapted(ADAPTERS[kind])
    names, before = trainable(model), weights(model)
    training = peft_trainer(tmp_path, model, max_grad_norm=0.0, **FULL_BATCH)
    ours = trained(training)
    assert type(inner(training.optimizer)) is SING
    assert moved(model, before) == names

    by_hand, batch = adapted(ADAPTERS[kind]), {key: torch.stack([row[key] for row in rows()]) for key in rows()[0]}
    params = {name: param for name, param in by_hand.named_parameters() if param.requires_grad}
    decayed = {param for group in training.optimizer.param_groups if group["weight_decay"] for param in group["params"]}
    decayed_names = {name for name, param in model.named_parameters() if param in decayed}
    groups = [
        {"params": [param for name, param in params.items() if name in decayed_names], "weight_decay": 0.1},
        {"params": [param for name, param in params.items() if name not in decayed_names], "weight_decay": 0.0},
    ]
    optimizer = SING(groups, lr=5e-3, eps=1e-13)
    for _ in range(7):
        optimizer.zero_grad()
        by_hand(**batch).loss.backward()
        optimizer.step()
    assert_close(ours, weights(by_hand))


@pytest.mark.parametrize("config", [NORMS, LARGE, NORM_TUNING], ids=["modules_to_save", "large rank", "LN tuning"])
def test_norms_that_an_adapter_trains_are_trained_and_a_line_says_so(
    config: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = adapted(config)
    names, before = trainable(model), weights(model)
    norms = {name for name in names if "LayerNorm" in name}
    assert len(norms) == 10
    theirs = peft_trainer(tmp_path, adapted(config), "adamw_torch").create_optimizer()
    training = peft_trainer(tmp_path, model)
    training.train()
    assert sizes(training.optimizer) == sizes(theirs) == len(names)
    assert moved(model, before) == names
    (line,) = [line for line in said(caplog) if "freeze=" in line]
    assert "0 tensors frozen; 10 left to train (freeze=none), since most of what is around them is frozen" in line


def test_an_explicit_freeze_freezes_the_norms_of_an_adapter(tmp_path: Path) -> None:
    model = adapted(NORMS)
    before = weights(model)
    training = peft_trainer(tmp_path, model, optim_args="freeze=layernorm")
    training.train()
    assert trainable(model) == {name for name in trainable(adapted(NORMS)) if "LayerNorm" not in name}
    assert moved(model, before) == trainable(model)


def moved_without_a_rate(model: nn.Module, optimizer: Any) -> set[str]:
    """What six steps with a learning rate of 0 move, in which Lookahead merges: what it has slow weights of."""
    before = weights(model)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    for _ in range(6):
        for param in model.parameters():
            param.grad = torch.ones_like(param) if param.requires_grad else None
        optimizer.step()
    return moved(model, before)


def load_an_adapter(model: PeftModel) -> None:
    """As ``load_best_model_at_end`` does."""
    loaded = {name: value + 1 for name, value in get_peft_model_state_dict(model).items()}
    set_peft_model_state_dict(model, loaded)


def merge_and_begin_anew(model: PeftModel) -> None:
    """As ReLoRA does: merge into the base, and initialize the adapter again."""
    model.merge_adapter()
    model.unmerge_adapter()
    for module in model.modules():
        if hasattr(module, "reset_lora_parameters"):
            module.reset_lora_parameters("default", init_lora_weights=True)


def merge_into_a_base_that_is_trained_too(model: PeftModel) -> None:
    model.merge_adapter(safe_merge=True)


def merge_without_a_trace(model: PeftModel) -> None:
    """``weight.data += delta``."""
    model.merge_adapter()


@pytest.mark.parametrize(
    "change", [load_an_adapter, merge_and_begin_anew, merge_into_a_base_that_is_trained_too, merge_without_a_trace]
)
def test_lookahead_does_not_pull_back_what_peft_has_changed(change: Any, tmp_path: Path) -> None:
    model = adapted(ADAPTERS["LoRA"])
    if "merge_into" in change.__name__ or "trace" in change.__name__:
        for name, param in model.named_parameters():
            param.requires_grad_(param.requires_grad or "query.base_layer" in name)
    training = peft_trainer(tmp_path, model, max_steps=7)
    training.train()
    before = weights(model)
    change(model)
    changed = moved(model, before) & trainable(model)
    assert changed
    if change is merge_without_a_trace:
        sync_lookahead(training.optimizer)
    assert not changed & moved_without_a_rate(model, training.optimizer)


# ----------------------------------------------------------------------------------------------------------------- TRL


def llama(kind: type[nn.Module] = LlamaForCausalLM, **options: Any) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4 + len(WORDS),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        initializer_range=0.2,
        pad_token_id=0,
        bos_token_id=2,
        eos_token_id=3,
        **options,
    )
    return kind(config).double()


def texts(count: int = 12) -> Dataset:
    generator = torch.Generator().manual_seed(1)
    return Dataset.from_dict({"text": [sentence(generator) for _ in range(count)]})


def preferences(count: int = 16) -> Dataset:
    generator = torch.Generator().manual_seed(1)
    made = {key: [sentence(generator) for _ in range(count)] for key in ("prompt", "chosen", "rejected")}
    return Dataset.from_dict(made)


def trl_options(folder: Path, **options: Any) -> dict[str, Any]:
    given = {"learning_rate": 5e-3, "max_steps": 7, "logging_steps": 1, "optim": "sing_adamw", "max_length": 32}
    return {"output_dir": str(folder), **CPU, **given, **options}


def assert_trained_by_sing(training: Trainer, before: dict[str, Tensor], names: set[str]) -> None:
    assert type(inner(training.optimizer)) is SING
    assert moved(training.model, before) == names
    logged = [line["loss"] for line in training.state.log_history if "loss" in line]
    assert len(logged) == 7
    assert all(map(math.isfinite, logged))


def test_supervised_fine_tuning_equals_a_loop_by_hand(tmp_path: Path) -> None:
    config = SFTConfig(**trl_options(tmp_path, per_device_train_batch_size=12, lr_scheduler_type="constant"))
    config.adam_epsilon, config.weight_decay = 1e-13, 0.1
    model, before = llama(), weights(llama())
    training = SFTTrainer(model=model, args=config, train_dataset=texts(), processing_class=tokenizer())
    batch = training.data_collator([training.train_dataset[place] for place in range(12)])
    training.train()
    assert_trained_by_sing(training, before, {name for name in before if "norm" not in name})

    by_hand = llama()
    matrices = [param for name, param in by_hand.named_parameters() if "norm" not in name]
    optimizer = SING(matrices, lr=5e-3, weight_decay=0.1, eps=1e-13)
    for _ in range(7):
        optimizer.zero_grad()
        by_hand(**batch).loss.backward()
        optimizer.step()
    for name, param in training.model.named_parameters():  # TRL computes the loss in float32
        torch.testing.assert_close(param, by_hand.get_parameter(name), rtol=0, atol=1e-6)


def test_supervised_fine_tuning_of_an_adapter(tmp_path: Path) -> None:
    training = SFTTrainer(
        model=llama(),
        args=SFTConfig(**trl_options(tmp_path)),
        train_dataset=texts(),
        processing_class=tokenizer(),
        peft_config=LoraConfig(target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"),
    )
    names, before = trainable(training.model), weights(training.model)
    assert names == {name for name in before if "lora" in name}
    training.train()
    assert_trained_by_sing(training, before, names)


def test_preference_optimization_trains_the_policy_and_not_the_reference(tmp_path: Path) -> None:
    model, reference = llama(), llama()
    before = weights(model)
    training = DPOTrainer(
        model=model,
        ref_model=reference,
        args=DPOConfig(**trl_options(tmp_path)),
        train_dataset=preferences(),
        processing_class=tokenizer(),
    )
    training.train()
    assert_trained_by_sing(training, before, {name for name in before if "norm" not in name})
    assert not moved(reference, before)


def test_a_reward_model_is_trained(tmp_path: Path) -> None:
    model = llama(LlamaForSequenceClassification, num_labels=1)
    before = weights(model)
    training = RewardTrainer(
        model=model,
        args=RewardConfig(**trl_options(tmp_path)),
        train_dataset=preferences(),
        processing_class=tokenizer(),
    )
    training.train()
    assert_trained_by_sing(training, before, {name for name in before if "norm" not in name})


def test_the_command_of_trl_takes_the_name(tmp_path: Path) -> None:
    line = ["--model_name_or_path", "m", "--dataset_name", "d", "--output_dir", str(tmp_path), "--use_cpu"]
    line += ["--optim", "sing_adamw", "--optim_args", "freeze=none"]
    _, config, *_ = sft.make_parser().parse_args_and_config(line)
    assert (config.optim, config.optim_args) == ("sing_adamw", "freeze=none")


# ------------------------------------------------------------------------------------------------ sentence-transformers


@pytest.fixture(scope="module")
def sentence_encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("encoder")
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=4 + len(WORDS),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=32,
        initializer_range=0.2,
    )
    BertModel(config).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def sentence_trainer(encoder: Path, folder: Path, **options: Any) -> SentenceTransformerTrainer:
    generator = torch.Generator().manual_seed(1)
    pairs: dict[str, Any] = {key: [sentence(generator) for _ in range(16)] for key in ("first", "second")}
    pairs["label"] = [place % 3 for place in range(16)]
    model = SentenceTransformer(str(encoder), device="cpu")  # with mean pooling, which it adds by itself
    given = {"learning_rate": 5e-3, "weight_decay": 0.1, "max_steps": 7, "logging_steps": 1, "optim": "sing_adamw"}
    args = SentenceTransformerTrainingArguments(output_dir=str(folder), **CPU, **given, **options)
    torch.manual_seed(2)
    loss = losses.SoftmaxLoss(model, sentence_embedding_dimension=16, num_labels=3)
    return SentenceTransformerTrainer(model=model, args=args, train_dataset=Dataset.from_dict(pairs), loss=loss)


def test_a_sentence_encoder_and_the_weights_of_its_loss_are_trained(sentence_encoder: Path, tmp_path: Path) -> None:
    training = sentence_trainer(sentence_encoder, tmp_path)
    before = weights(training.loss)
    training.train()
    assert type(inner(training.optimizer)) is SING
    # The pooler's output is not used: it has no gradient.
    names = {name for name in before if "LayerNorm" not in name and "pooler" not in name}
    assert any(name.startswith("classifier") for name in names)
    assert moved(training.loss, before) == names
    logged = [line["loss"] for line in training.state.log_history if "loss" in line]
    assert len(logged) == 7
    assert all(map(math.isfinite, logged))


def test_learning_rates_by_name_are_kept_and_biases_are_not_decayed(sentence_encoder: Path, tmp_path: Path) -> None:
    training = sentence_trainer(sentence_encoder, tmp_path, learning_rate_mapping={"classifier": 0.02})
    optimizer = training.create_optimizer()
    of = {param: group for group in optimizer.param_groups for param in group["params"]}
    for name, param in training.loss.named_parameters():
        if "LayerNorm" in name:
            assert not param.requires_grad
            assert param not in of
        else:
            assert of[param]["lr"] == (0.02 if "classifier" in name else 5e-3)
            assert of[param]["weight_decay"] == (0.0 if "bias" in name else 0.1), name


# ------------------------------------------------------------------------------------------------------------- adapters


class AsAdaptersDoes(Trainer):
    """AdapterTrainer makes the groups, and asks for the class without telling which model it is for."""

    def create_optimizer(self, *given: Any) -> Any:
        if self.optimizer is None:
            names = self.get_decay_parameter_names(self.model)
            named = [(name, param) for name, param in self.model.named_parameters() if param.requires_grad]
            groups = [
                {"params": [p for name, p in named if name in names], "weight_decay": self.args.weight_decay},
                {"params": [p for name, p in named if name not in names], "weight_decay": 0.0},
            ]
            kind, options = Trainer.get_optimizer_cls_and_kwargs(self.args)
            self.optimizer = kind(groups, **options)
        return self.optimizer


@pytest.mark.parametrize("optim", ["sing_adamw", "sing_adamw_torch"])
def test_groups_made_without_the_model_are_trained_as_they_are(
    optim: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "sing_plugins")
    model = classifier()
    before = weights(model)
    training = AsAdaptersDoes(model=model, args=arguments(tmp_path, optim, weight_decay=0.1), train_dataset=rows())
    training.train()
    assert inner(training.optimizer).standardizes_gradients
    assert [group["weight_decay"] for group in training.optimizer.param_groups] == [0.1, 0.0]
    assert sizes(training.optimizer) == len(before)
    assert moved(model, before) == set(before) == trainable(model)
    (line,) = [line for line in said(caplog) if "freeze" in line or "frozen" in line]
    assert "got parameters and not a model, so no normalization layer is frozen" in line


@pytest.mark.parametrize(("freeze", "refused"), [("layernorm", True), ("norm", True), ("none", False)])
def test_only_an_explicit_freeze_is_refused_where_the_model_is_not_told(
    freeze: str, refused: bool, tmp_path: Path
) -> None:
    args = arguments(tmp_path, optim_args=f"freeze={freeze}", max_steps=1)
    training = AsAdaptersDoes(model=classifier(), args=args, train_dataset=rows())
    if refused:
        with pytest.raises(ValueError, match=f"Invalid freeze: '{freeze}' for parameters .* Pass the model"):
            training.train()
    else:
        training.train()
        assert type(inner(training.optimizer)) is SING


# ------------------------------------------------------------------------------------------------------------ open_clip


class TwoTowers(nn.Module):
    """Shaped as CLIP: a tower for images, one for words, a temperature of no dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.visual = nn.Sequential(nn.Conv2d(1, 8, 4, stride=4), nn.Flatten(), nn.LayerNorm(32), nn.Linear(32, 8))
        self.token_embedding = nn.Embedding(20, 8)
        self.ln_final = nn.LayerNorm(8)
        self.text_projection = nn.Parameter(torch.randn(8, 8) / 3)
        self.logit_scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, images: Tensor, words: Tensor) -> Tensor:
        texts = self.ln_final(self.token_embedding(words)).mean(1) @ self.text_projection
        logits = nn.functional.normalize(self.visual(images)) @ nn.functional.normalize(texts).T
        return nn.functional.cross_entropy(logits * self.logit_scale.exp(), torch.arange(len(images)))


def towers() -> TwoTowers:
    torch.manual_seed(0)
    return TwoTowers()


@pytest.fixture
def one_process() -> Iterator[None]:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def train_towers(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    generator = torch.Generator().manual_seed(1)
    for _ in range(7):
        images, words = torch.randn(6, 1, 8, 8, generator=generator), torch.randint(0, 20, (6, 4), generator=generator)
        optimizer.zero_grad()
        model(images, words).backward()
        optimizer.step()


@pytest.mark.parametrize(
    "given",
    [
        {"lr": 5e-3, "eps": None},  # --lr 5e-3, and nothing else
        {"lr": None, "eps": None},
        {"lr": 5e-3, "eps": 1e-6, "betas": (0.9, 0.98), "momentum": 0.9},
    ],
)
@pytest.mark.usefixtures("one_process")
def test_a_model_in_ddp_with_open_clips_arguments_is_trained_as_a_whole(
    given: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    create = functools.partial(create_optimizer_v2, weight_decay=0.2, **given)
    net = towers()
    before = weights(net)
    model = nn.parallel.DistributedDataParallel(net)
    optimizer = create(model, "sing_adamw")
    assert type(optimizer) is SING
    copy.deepcopy(optimizer.defaults)  # which it logs
    train_towers(model, optimizer)
    assert sizes(optimizer) == len(before)
    assert moved(net, before) == set(before)
    decays = {param: group["weight_decay"] for group in optimizer.param_groups for param in group["params"]}
    assert {name for name, param in net.named_parameters() if decays[param]} == {
        "visual.0.weight",
        "visual.3.weight",
        "token_embedding.weight",
        "text_projection",
    }
    assert "4 not frozen, since the model is in DistributedDataParallel already" in caplog.text
    assert optimizer.param_groups[0]["eps"] == (given["eps"] or 1e-8)

    alone = towers()
    train_towers(alone, create(alone, "sing_adamw", freeze="none"))
    for name, param in net.named_parameters():
        torch.testing.assert_close(param, alone.get_parameter(name), rtol=0, atol=0)


@pytest.mark.usefixtures("one_process")
def test_an_explicit_freeze_of_a_model_in_ddp_is_refused() -> None:
    model = nn.parallel.DistributedDataParallel(towers())
    with pytest.raises(ValueError, match="Invalid freeze: 'layernorm' for a model that is already wrapped"):
        create_optimizer_v2(model, "sing_adamw", lr=5e-3, weight_decay=0.2, eps=None, freeze="layernorm")
