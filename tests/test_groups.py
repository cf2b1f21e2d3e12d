"""Param-group rules on the models of real libraries."""

from __future__ import annotations

import copy
import logging
import pickle
import re
from collections.abc import Callable

import pytest
import timm
import torch
import transformers
from problems import MatricesOnly
from torch import nn

import sing_plugins
from sing_plugins import create_optimizer, param_groups, unfreeze
from sing_plugins.groups import choose, exempt_from_decay, split_decay


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


def freeze(model: nn.Module, how: str) -> list[str]:
    choice = choose(model, how)
    choice.apply(model)
    return [owned.name for owned in choice.frozen]


def exempt(model: nn.Module) -> list[str]:
    parameters = exempt_from_decay(model)
    return [name for name, parameter in model.named_parameters() if parameter in parameters]


def trained(model: nn.Module) -> nn.Module:
    """Its gains are as after a training, and no longer at the 1e-5 where many of them begin."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "gamma" in name:
                parameter.fill_(0.5)
    return model


@pytest.mark.parametrize("name", MODELS)
def test_layernorm_family_is_frozen_in_every_spelling_and_nothing_else(name: str) -> None:
    create, pattern = MODELS[name]
    model = trained(create())
    expected = {n for n, _ in model.named_parameters() if re.search(pattern, n)}
    assert expected
    assert set(freeze(model, "layernorm")) == expected == names_where(model, trainable=False)


@pytest.mark.parametrize("name", MODELS)
def test_biases_and_norms_are_not_decayed_and_all_the_rest_is(name: str) -> None:
    model = MODELS[name][0]()
    groups = param_groups(model, weight_decay=0.1, freeze="none")
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]
    decayed, exempt = (set(group["params"]) for group in groups)
    assert decayed | exempt == set(model.parameters())
    norms = set(freeze(trained(model), "norm"))
    for parameter_name, parameter in model.named_parameters():
        is_exempt = parameter_name.endswith("bias") or parameter_name in norms
        assert parameter in (exempt if is_exempt else decayed), parameter_name


def test_norm_freezes_batch_norm_too_and_layernorm_does_not() -> None:
    model = timm.create_model("resnet18", num_classes=3)
    assert freeze(model, "layernorm") == []
    frozen = freeze(model, "norm")
    assert len(frozen) == 24  # all but the last ones of the 8 blocks, which begin at zero
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
    assert exempt(model) == [name for name, _ in model.named_parameters() if name.startswith("1.")]


def test_matrices_are_no_normalization_whatever_their_class_is_called() -> None:
    class NormedLinear(nn.Linear):
        pass

    class NormalizedConv(nn.Conv2d):
        pass

    model = nn.Sequential(NormedLinear(3, 3), NormalizedConv(2, 2, 1))
    assert exempt(model) == ["0.bias", "1.bias"]
    assert freeze(model, "norm") == []


def test_recurrent_and_attention_biases_are_not_decayed() -> None:
    model = nn.ModuleDict({"lstm": nn.LSTM(3, 3), "attention": nn.MultiheadAttention(4, 2)})
    assert exempt(model) == [
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
    assert split_decay(made, exempt_from_decay(model), 0.0) == [
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


@pytest.mark.parametrize("rank", ["", "0", "none"])
def test_a_rank_that_is_no_number_is_the_first(
    rank: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", rank)
    param_groups(net(), 0.1)
    assert len(caplog.records) == 1


def test_freezing_everything_is_an_error_and_freezes_nothing() -> None:
    model = nn.Sequential(nn.LayerNorm(2), nn.LayerNorm(2))
    with pytest.raises(ValueError, match="Invalid freeze: 'layernorm' would freeze all 4 trainable parameters"):
        param_groups(model)
    assert names_where(model, trainable=False) == set()


def test_model_without_trainable_parameters_is_an_error() -> None:
    with pytest.raises(ValueError, match="no parameter with requires_grad=True"):
        param_groups(nn.Linear(2, 2).requires_grad_(False))


def test_unknown_freeze_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"Invalid freeze: 'layernorms' for sing\. Accepted: layernorm, norm, none"):
        param_groups(nn.Linear(2, 2), freeze="layernorms")


def test_freezing_after_data_parallel_wrapping_is_an_error_if_it_is_asked_for(caplog: pytest.LogCaptureFixture) -> None:
    """DDP would wait for the gradients of the frozen parameters for ever."""
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        model = nn.parallel.DistributedDataParallel(nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2)))
        with pytest.raises(ValueError, match="already wrapped in DistributedDataParallel"):
            param_groups(model, freeze="layernorm")
        assert names_where(model, trainable=False) == set()
        assert param_groups(model, freeze="none")
        assert not caplog.records
        groups = param_groups(model)
        assert "0 tensors frozen; 2 not frozen, since the model is in DistributedDataParallel already" in caplog.text
        assert names_where(model, trainable=False) == set()
        assert sum(len(group["params"]) for group in groups) == 4
    finally:
        torch.distributed.destroy_process_group()


def test_thawing_after_data_parallel_wrapping_is_an_error_too() -> None:
    """DDP does not average the gradients of what was frozen when it wrapped the model."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        net = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))
        param_groups(net)
        model = nn.parallel.DistributedDataParallel(net)
        param_groups(model)  # the same again is no change
        with pytest.raises(ValueError, match=r"'none' for a model that is already wrapped .* before wrapping\.$"):
            param_groups(model, freeze="none")
        with pytest.raises(ValueError, match="already wrapped"):
            unfreeze(model)
        assert names_where(net, trainable=False) == {"1.weight", "1.bias"}
    finally:
        torch.distributed.destroy_process_group()


# --------------------------------------------------------------------------------------------------- gains near zero


def test_a_layer_scale_near_zero_is_trained_so_that_its_block_contributes(caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    model = timm.create_model("convnext_atto", num_classes=4, depths=(1, 1, 2, 1), dims=(8, 16, 16, 32))
    optimizer = create_optimizer(model, lr=1e-2)
    gains = {name: parameter for name, parameter in model.named_parameters() if name.endswith(".gamma")}
    assert len(gains) == 5
    assert all(parameter.requires_grad for parameter in gains.values())
    assert "5 not frozen, since with their gain near zero nothing behind it would learn (stages.0.b" in caplog.text
    images, labels = torch.randn(8, 3, 32, 32), torch.arange(8) % 4
    for _ in range(20):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
    model.eval()
    with torch.no_grad():
        logits = model(images)
        for parameter in gains.values():
            parameter.zero_()
        without_blocks = model(images)
    assert (logits - without_blocks).abs().max() > 3e-4 * logits.abs().max()  # 1e-7 of them where gains are frozen


def test_zero_initialized_gates_and_norms_are_not_frozen() -> None:
    resnet = timm.create_model("resnet18", num_classes=3)  # the last BatchNorm of a block begins at zero
    closed = {owned.name for owned in choose(resnet, "norm").closed}
    assert closed == {f"layer{i}.{j}.bn2.{leaf}" for i in (1, 2, 3, 4) for j in (0, 1) for leaf in ("weight", "bias")}
    assert closed.isdisjoint(freeze(resnet, "norm"))

    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.norm = nn.Linear(2, 2), nn.LayerNorm(2)
            self.gamma = nn.Parameter(torch.zeros(1))  # SAGAN's gate: it is no LayerScale
            self.alpha = nn.Parameter(torch.zeros(()))  # ReZero

    assert freeze(Gated(), "norm") == ["norm.weight", "norm.bias"]


def test_gains_whose_values_are_not_there_yet_are_frozen_by_their_type() -> None:
    """As on the meta device, or on the ranks that wait for the first one's weights."""
    with torch.device("meta"):
        assert freeze(nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2)), "layernorm") == ["1.weight", "1.bias"]
    waiting = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))
    with torch.no_grad():
        for parameter in waiting.parameters():
            parameter.zero_()
    assert freeze(waiting, "layernorm") == ["1.weight", "1.bias"]


# ------------------------------------------------------------------------------------- what SING froze, it can undo


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2))


@pytest.mark.parametrize("copied", [lambda m: m, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_the_next_plan_for_a_model_takes_the_freezing_of_the_last_one_back(
    copied: Callable[[nn.Module], nn.Module], caplog: pytest.LogCaptureFixture
) -> None:
    model = net()
    create_optimizer(model)
    model = copied(model)
    assert names_where(model, trainable=False) == {"1.weight", "1.bias"}
    caplog.clear()
    optimizer = create_optimizer(model, freeze="none")
    assert names_where(model, trainable=False) == set()
    assert sum(len(group["params"]) for group in optimizer.param_groups) == 6
    assert "2 that an earlier plan had frozen are trained again (1.weight, 1.bias)" in caplog.text
    create_optimizer(nn.Sequential(model))  # in another model, too
    assert names_where(model, trainable=False) == {"1.weight", "1.bias"}
    param_groups(model, freeze="none")
    assert names_where(model, trainable=False) == set()


def test_unfreeze_gives_a_model_back_and_leaves_what_the_user_froze() -> None:
    model = net()
    model[2].bias.requires_grad_(False)
    create_optimizer(model)
    assert unfreeze(model) == ["1.weight", "1.bias"]
    assert names_where(model, trainable=False) == {"2.bias"}
    assert unfreeze(model) == []
    assert model.state_dict().keys() == net().state_dict().keys()


def test_layers_that_the_user_freezes_later_stay_frozen() -> None:
    backbone, head = net(), nn.Linear(2, 2)
    model = nn.ModuleDict({"backbone": backbone, "head": head})
    create_optimizer(model)
    backbone.requires_grad_(False)
    create_optimizer(model, freeze="none")
    assert names_where(model, trainable=True) == {"head.weight", "head.bias"}
    # And what the user has thawed and frozen by hand is not SING's any more.
    backbone.requires_grad_(True)
    create_optimizer(model)
    backbone[1].requires_grad_(True)
    create_optimizer(model, freeze="none")
    backbone[1].requires_grad_(False)
    assert unfreeze(model) == []


def test_a_plan_that_fails_leaves_flags_and_records_as_they_were() -> None:
    model = net()
    create_optimizer(model)
    with pytest.raises(ValueError, match="matrices only"):
        create_optimizer(model, "sing_picky", hosts={"picky": MatricesOnly}, freeze="none")
    assert names_where(model, trainable=False) == {"1.weight", "1.bias"}
    assert unfreeze(model) == ["1.weight", "1.bias"]


# ------------------------------------------------------------------------------------------------ explicit wishes


def test_norms_left_trainable_while_the_rest_is_frozen_are_not_frozen_by_default(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = hf(transformers.BertConfig)()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("LayerNorm" in name)
    optimizer = create_optimizer(model)
    assert sum(len(group["params"]) for group in optimizer.param_groups) == 6
    assert "6 left to train (freeze=none), since most of what is around them is frozen" in caplog.text
    with pytest.raises(ValueError, match=r"'layernorm' would freeze all 6 trainable parameters. Pass freeze='none'"):
        create_optimizer(model, freeze="layernorm")


def test_norms_of_layers_that_are_trained_are_frozen_even_if_other_layers_are_not() -> None:
    model = hf(transformers.BertConfig, num_hidden_layers=3)()
    model.embeddings.requires_grad_(False)
    model.encoder.layer[0].requires_grad_(False)
    model.encoder.layer[1].requires_grad_(False)
    create_optimizer(model)
    assert {name for name in names_where(model, trainable=True) if "LayerNorm" in name} == set()


# -------------------------------------------------------------------------------------------- the user's own groups

LEGAL: dict[str, Callable[[nn.Sequential], object]] = {
    "single tensors": lambda m: [{"params": m[0].weight}, {"params": m[0].bias}],
    "named parameters": lambda m: [{"params": list(m.named_parameters())}],
    "named parameters without groups": lambda m: m.named_parameters(),
    "generators": lambda m: [{"params": m[0].parameters()}, {"params": m[2].parameters()}],
    "plain parameters": lambda m: list(m.parameters()),
    "an empty group": lambda m: [{"params": []}, {"params": m[2].parameters()}],
}


@pytest.mark.parametrize("name", ["sing_adamw", "sing_rmsprop"])
@pytest.mark.parametrize("case", LEGAL)
def test_groups_are_read_as_torch_reads_them(case: str, name: str) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    expected = torch.optim.AdamW(LEGAL[case](model), lr=0.1).param_groups  # type: ignore[arg-type]
    optimizer = create_optimizer(model, name, groups=LEGAL[case](model))  # type: ignore[arg-type]
    for group, theirs in zip(optimizer.param_groups, expected, strict=True):
        assert [id(param) for param in group["params"]] == [id(param) for param in theirs["params"]]
        assert group.get("param_names") == theirs.get("param_names")


@pytest.mark.parametrize(
    "wrong",
    [
        torch.zeros(3),
        [{"params": {torch.zeros(2)}}],
        [{"params": torch.zeros(2, requires_grad=True) * 1}],
        [{"params": ["a"]}],
    ],
)
def test_groups_that_torch_refuses_are_refused_in_its_words(wrong: object) -> None:
    with pytest.raises((TypeError, ValueError)) as expected:
        torch.optim.AdamW(wrong)  # type: ignore[arg-type]
    model = net()
    with pytest.raises(expected.type, match=re.escape(str(expected.value))):
        create_optimizer(model, groups=wrong)  # type: ignore[arg-type]
    assert names_where(model, trainable=False) == set()


def test_two_groups_stay_two_so_that_a_schedule_with_two_lambdas_fits() -> None:
    model = net()
    made = [{"params": model[0].parameters(), "lr": 0.1}, {"params": [*model[1].parameters(), *model[2].parameters()]}]
    optimizer = create_optimizer(model, lr=0.01, groups=made)
    torch.optim.lr_scheduler.LambdaLR(optimizer, [lambda step: 1.0, lambda step: 0.5])
    assert [(group["lr"], len(group["params"])) for group in optimizer.param_groups] == [(0.1, 2), (0.005, 2)]


def test_a_group_that_decays_keeps_its_place_and_its_exempt_members_come_last() -> None:
    model = net()
    made = [{"params": list(model[0].named_parameters())}, {"params": list(model[2].named_parameters())}]
    optimizer = create_optimizer(model, weight_decay=0.1, groups=made)
    assert [(group["param_names"], group["weight_decay"]) for group in optimizer.param_groups] == [
        (["weight"], 0.1),
        (["weight"], 0.1),
        (["bias"], 0.0),
        (["bias"], 0.0),
    ]
    made = [{"params": [model[0].bias, model[2].bias]}, {"params": [model[0].weight, model[2].weight]}]
    optimizer = create_optimizer(model, weight_decay=0.1, groups=made)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.0, 0.1]


def test_what_the_user_has_frozen_stays_in_the_groups_and_trains_when_thawed() -> None:
    model = net()
    model[0].weight.requires_grad_(False)
    optimizer = create_optimizer(model, lr=0.01, groups=[{"params": list(model.named_parameters())}])
    assert optimizer.param_groups[0]["param_names"] == ["0.weight", "0.bias", "2.weight", "2.bias"]
    model[0].weight.requires_grad_(True)
    before = model[0].weight.detach().clone()
    model(torch.randn(5, 3)).square().sum().backward()
    optimizer.step()
    assert (model[0].weight != before).all()


def test_what_is_thawed_does_not_join_groups_that_leave_it_out() -> None:
    model = net()
    create_optimizer(model)
    optimizer = create_optimizer(model, freeze="none", groups=model[2].parameters())
    assert [group["params"] for group in optimizer.param_groups] == [[model[2].weight, model[2].bias]]


def test_the_users_groups_are_not_rewritten() -> None:
    model = net()
    made = [{"params": list(model.parameters()), "lr": 0.1}]
    create_optimizer(model, weight_decay=0.1, groups=made)
    assert made == [{"params": list(model.parameters()), "lr": 0.1}]


# ------------------------------------------------------------------------------------------------ no_weight_decay


def test_names_in_no_weight_decay_are_checked() -> None:
    model = net()
    with pytest.raises(ValueError, match=r"Invalid no_weight_decay: '2.wieght'. .* Did you mean 2.weight"):
        create_optimizer(model, weight_decay=0.1, no_weight_decay=["2.wieght"])
    assert names_where(model, trainable=False) == set()


def test_any_name_of_a_tied_weight_exempts_it_also_when_compiled() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.head = nn.Embedding(5, 3), nn.Linear(3, 5)
            self.head.weight = self.embedding.weight

    for name in ("embedding.weight", "head.weight", "_orig_mod.head.weight", "module.head.weight"):
        for model in (Tied(), torch.compile(Tied())):
            groups = param_groups(model, 0.1, no_weight_decay=[name])
            assert [(group["weight_decay"], len(group["params"])) for group in groups] == [(0.0, 2)]


def test_public_names_are_complete() -> None:
    assert sing_plugins.unfreeze is unfreeze
