"""Param-group rules on the models of real libraries."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable

import pytest
import timm
import torch
import transformers
from torch import nn

from sing_plugins import param_groups
from sing_plugins.groups import exempt_from_decay, freeze_parameters, split_decay


def hf(config_class: type, **options: int) -> Callable[[], nn.Module]:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    return lambda: transformers.AutoModel.from_config(config_class(**{**sizes, "vocab_size": 32, **options}))


MODELS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    # model: what must be frozen, as a pattern in the parameter's name
    "BERT (LayerNorm)": (hf(transformers.BertConfig), r"LayerNorm"),
    "Llama (LlamaRMSNorm)": (hf(transformers.LlamaConfig, num_key_value_heads=2), "norm"),
    "T5 (T5LayerNorm)": (
        lambda: transformers.T5Model(
            transformers.T5Config(vocab_size=32, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
        ),
        "layer_norm",
    ),
    "ViT (LayerNorm)": (lambda: timm.create_model("test_vit"), "norm"),
    "ViT with LayerScale": (lambda: timm.create_model("test_vit2"), r"norm|gamma"),
    "ConvNeXt (LayerNorm2d, bare LayerScale)": (
        lambda: timm.create_model("convnext_atto_ols", depths=(1, 1, 1, 1), dims=(8, 8, 8, 8)),
        r"norm|gamma|stem\.2|downsample\.0",
    ),
}


def names_where(model: nn.Module, trainable: bool) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad == trainable}


@pytest.mark.parametrize("name", MODELS)
def test_layernorm_family_is_frozen_in_every_spelling_and_nothing_else(name: str) -> None:
    create, pattern = MODELS[name]
    model = create()
    expected = {n for n, _ in model.named_parameters() if re.search(pattern, n)}
    assert expected
    assert set(freeze_parameters(model, "layernorm")) == expected == names_where(model, trainable=False)


@pytest.mark.parametrize("name", MODELS)
def test_biases_and_norms_are_not_decayed_and_all_the_rest_is(name: str) -> None:
    model = MODELS[name][0]()
    groups = param_groups(model, weight_decay=0.1, freeze="none")
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]
    decayed, exempt = (set(group["params"]) for group in groups)
    assert decayed | exempt == set(model.parameters())
    norms = set(freeze_parameters(model, "norm"))
    for parameter_name, parameter in model.named_parameters():
        is_exempt = parameter_name.endswith("bias") or parameter_name in norms
        assert parameter in (exempt if is_exempt else decayed), parameter_name


def test_norm_freezes_batch_norm_too_and_layernorm_does_not() -> None:
    model = timm.create_model("resnet18", num_classes=3)
    assert freeze_parameters(model, "layernorm") == []
    frozen = freeze_parameters(model, "norm")
    assert len(frozen) == 40
    assert all("bn" in name or "downsample.1" in name for name in frozen)


@pytest.mark.parametrize(
    "layer",
    [
        nn.LayerNorm((4, 3, 3)),
        nn.RMSNorm(4),
        nn.GroupNorm(2, 4),
        nn.BatchNorm1d(4),
        nn.InstanceNorm2d(4, affine=True),
        nn.SyncBatchNorm(4),
        timm.layers.LayerNorm2d(4),
        timm.layers.RmsNorm2d(4),
        timm.layers.BatchNormAct2d(4),
        timm.models.vision_transformer.LayerScale(4),
        transformers.models.mistral.modeling_mistral.MistralRMSNorm(4),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_every_normalization_layer_is_exempt_from_decay(layer: nn.Module) -> None:
    model = nn.Sequential(nn.Linear(2, 2, bias=False), layer)
    assert exempt_from_decay(model) == [name for name, _ in model.named_parameters() if name.startswith("1.")]


def test_matrices_are_no_normalization_whatever_their_class_is_called() -> None:
    class NormedLinear(nn.Linear):
        pass

    class NormalizedConv(nn.Conv2d):
        pass

    model = nn.Sequential(NormedLinear(3, 3), NormalizedConv(2, 2, 1))
    assert exempt_from_decay(model) == ["0.bias", "1.bias"]
    assert freeze_parameters(model, "norm") == []


def test_recurrent_and_attention_biases_are_not_decayed() -> None:
    model = nn.ModuleDict({"lstm": nn.LSTM(3, 3), "attention": nn.MultiheadAttention(4, 2)})
    assert exempt_from_decay(model) == [
        "lstm.bias_ih_l0",
        "lstm.bias_hh_l0",
        "attention.in_proj_bias",
        "attention.out_proj.bias",
    ]


def test_names_that_the_framework_excludes_are_not_decayed() -> None:
    model = timm.create_model("test_vit")
    assert {"pos_embed", "cls_token"} <= model.no_weight_decay()
    groups = param_groups(model, 0.1, "none", no_weight_decay=model.no_weight_decay())
    assert model.pos_embed in set(groups[1]["params"])


def test_tied_weights_are_counted_once() -> None:
    model = transformers.BertForMaskedLM(
        transformers.BertConfig(
            vocab_size=32, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
        )
    )
    assert model.cls.predictions.decoder.weight is model.bert.embeddings.word_embeddings.weight
    groups = param_groups(model, 0.1)
    grouped = [parameter for group in groups for parameter in group["params"]]
    assert len(grouped) == len(set(grouped)) == len(names_where(model, trainable=True))


def test_groups_that_a_framework_made_keep_their_options_and_gain_the_rules() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    made = [{"params": list(model.parameters()), "weight_decay": 0.1, "lr_scale": 0.5}]
    assert split_decay(model, made) == [
        {"params": [model[0].weight], "weight_decay": 0.1, "lr_scale": 0.5},
        {"params": [model[0].bias, model[1].weight, model[1].bias], "weight_decay": 0.0, "lr_scale": 0.5},
    ]


def test_one_line_says_what_was_frozen_and_how_many_tensors_are_in_each_group(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2), nn.Linear(2, 2))
    with caplog.at_level(logging.INFO, "sing_plugins"):
        param_groups(model, 0.1)
    assert [record.getMessage() for record in caplog.records] == [
        "SING: freeze=layernorm: 2 tensors frozen (1.weight, 1.bias); "
        "trained: 2 tensors with weight_decay=0.1, 2 tensors with weight_decay=0."
    ]


def test_other_processes_of_a_job_are_silent(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    param_groups(nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2)), 0.1)
    assert not caplog.records


def test_freezing_everything_is_an_error_and_freezes_nothing() -> None:
    model = nn.Sequential(nn.LayerNorm(2), nn.LayerNorm(2))
    with pytest.raises(ValueError, match="Invalid freeze: 'layernorm' would freeze all 4 trainable parameters"):
        param_groups(model)
    assert names_where(model, trainable=False) == set()


def test_model_without_trainable_parameters_is_an_error() -> None:
    with pytest.raises(ValueError, match="no parameter with requires_grad=True"):
        param_groups(nn.Linear(2, 2).requires_grad_(False))


def test_unknown_freeze_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"Invalid freeze: 'layernorms'\. Accepted: layernorm, norm, none"):
        param_groups(nn.Linear(2, 2), freeze="layernorms")


def test_freezing_after_data_parallel_wrapping_is_an_error(tmp_path: object) -> None:
    """DDP would wait for the gradients of the frozen parameters for ever."""
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        model = nn.parallel.DistributedDataParallel(nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2)))
        with pytest.raises(ValueError, match="already wrapped in DistributedDataParallel"):
            param_groups(model)
        assert names_where(model, trainable=False) == set()
        assert param_groups(model, freeze="none")
    finally:
        torch.distributed.destroy_process_group()
