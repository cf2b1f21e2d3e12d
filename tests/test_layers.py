"""What a parameter is to its layer, on real classes of timm and transformers, and the census of all their models."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import model_census
import pytest
import timm
import torch
import transformers
from torch import nn

from sing_plugins import layers


def named_kinds(model: nn.Module) -> dict[str, layers.Kind | None]:
    return {
        f"{prefix}.{leaf}".lstrip("."): layers.kind(owner, leaf)
        for prefix, owner in model.named_modules()
        for leaf, _ in owner.named_parameters(recurse=False)
    }


def only(leaf: str, value: torch.Tensor, class_name: str = "Layer") -> nn.Module:
    """A module of a class of that name, with one parameter."""
    module: nn.Module = type(class_name, (nn.Module,), {})()
    module.register_parameter(leaf, nn.Parameter(value))
    return module


@pytest.mark.parametrize(
    ("name", "layer_scales", "closed"),
    [
        ("convnext_atto", r"\.gamma$", True),
        ("convnextv2_atto", None, False),
        ("poolformer_s12", r"layer_scale\d\.scale$", True),
        ("resmlp_12_224", r"\.ls\d$", True),
        ("xcit_nano_12_p16_224", r"\.gamma\d$", False),  # starts at one, unlike the next
        ("xcit_small_24_p16_224", r"\.gamma\d$", True),
        ("edgenext_xx_small", r"\.gamma(_xca)?$", True),
        ("cait_xxs24_224", r"\.gamma_\d$", True),
        ("beit_base_patch16_224", r"\.gamma_\d$", False),  # at 0.1
        ("beit_large_patch16_224", r"\.gamma_\d$", True),
        ("deit3_small_patch16_224", r"\.ls\d\.gamma$", True),
        ("rdnet_tiny", r"\.gamma$", True),
    ],
)
def test_timm_layer_scale_in_every_spelling(name: str, layer_scales: str | None, closed: bool) -> None:
    with model_census.SmallOnCpu():
        model = timm.create_model(name)
    found = {n for n, kind in named_kinds(model).items() if kind == "layerscale"}
    assert found == {n for n, _ in model.named_parameters() if layer_scales and re.search(layer_scales, n)}
    owners = {model.get_submodule(n.rpartition(".")[0]) for n in found}
    assert {layers.is_closed(owner) for owner in owners} == ({closed} if found else set())


@pytest.mark.parametrize(
    ("owner", "leaf"),
    [
        (timm.layers.grn.GlobalResponseNorm(4), "weight"),  # adds to its input
        (only("gamma", torch.ones(1, 1, 1, 4), "GRN"), "gamma"),
        (only("gamma", torch.zeros(1), "SelfAttention"), "gamma"),  # SAGAN
        (only("resweight", torch.zeros(1), "ReZeroBlock"), "resweight"),
        (only("gamma_1", torch.ones(4), "Block"), "gamma_1"),  # a Block, but not BEiT's
        (only("scale", torch.tensor(1.0), "Scale"), "scale"),  # of a detector's boxes, not PoolFormer's
        (
            timm.models.nfnet.NormFreeBlock(
                4, 4, skipinit=True, conv_layer=timm.layers.ScaledStdConv2d, act_layer=nn.ReLU
            ),
            "skipinit_gain",
        ),
        (timm.layers.ScaledStdConv2d(4, 4, 1), "gain"),
        (timm.models.xcit.XCA(8, 2), "temperature"),
        (only("alpha", torch.ones(1), "DynamicTanh"), "alpha"),
        (only("gamma", torch.ones(4), "DyT"), "gamma"),
        (only("temp", torch.zeros(2), "ZayaQKNorm"), "temp"),  # transformers: a temperature
        (timm.models.mlp_mixer.Affine(4), "alpha"),
        (timm.models.mlp_mixer.Affine(4), "beta"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_other_gains_are_trained_and_not_decayed(owner: nn.Module, leaf: str) -> None:
    assert layers.kind(owner, leaf) is None
    assert layers.gain(owner, leaf) is None
    assert layers.is_exempt(owner, leaf, getattr(owner, leaf))


@pytest.mark.parametrize(
    "owner",
    [
        nn.Linear(4, 1),
        nn.Conv2d(1, 1, 1),
        nn.Embedding(1, 4),
        type("NormedLinear", (nn.Linear,), {})(4, 1),
        type("RMSNormEmbedding", (nn.Embedding,), {})(1, 4),
        only("weight", torch.ones(4, 4), "ConditionalLayerNorm"),
        only("prompt", torch.ones(1, 4), "RobertaPreLayerNormModel"),
    ],
    ids=lambda owner: type(owner).__name__,
)
def test_matrices_are_decayed_whatever_their_shape_and_class(owner: nn.Module) -> None:
    leaf = next(iter(dict(owner.named_parameters())))
    assert layers.kind(owner, leaf) is None
    assert not layers.is_exempt(owner, leaf, getattr(owner, leaf))


def test_a_module_with_norm_in_its_name_and_matrices_below_is_no_norm() -> None:
    class PreNormBlock(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(4))
            self.linear = nn.Linear(4, 4)

    assert layers.kind(PreNormBlock(), "scale") is None


def test_head_of_roberta_pre_layer_norm_is_no_layer_norm() -> None:
    config = transformers.RobertaPreLayerNormConfig(
        vocab_size=8, hidden_size=4, num_hidden_layers=1, num_attention_heads=1, intermediate_size=4
    )
    head = transformers.RobertaPreLayerNormForMaskedLM(config).lm_head
    assert layers.kind(head, "bias") is None
    assert layers.kind(head.layer_norm, "weight") == "layernorm"


@pytest.mark.parametrize(
    ("owner", "kind"),
    [
        (nn.LayerNorm((4, 3)), "layernorm"),
        (nn.RMSNorm(4), "layernorm"),
        (timm.layers.LayerNorm2d(4), "layernorm"),
        (timm.layers.RmsNorm2d(4), "layernorm"),
        (only("weight", torch.ones(4), "SimpleNorm2d"), "layernorm"),  # timm: younger than its oldest version here
        (type("FSDPLlamaRMSNorm", (transformers.models.llama.modeling_llama.LlamaRMSNorm,), {})(4), "layernorm"),
        (transformers.models.cohere.modeling_cohere.CohereLayerNorm((2, 4)), "layernorm"),
        (nn.GroupNorm(2, 4), "norm"),
        (nn.BatchNorm1d(4), "norm"),
        (nn.LazyBatchNorm1d(), "norm"),
        (nn.SyncBatchNorm(4), "norm"),
        (nn.InstanceNorm2d(4, affine=True), "norm"),
        (timm.layers.EvoNorm2dS0(32), "norm"),
        (only("weight", torch.ones(4), "InplaceAbn"), "norm"),  # timm's needs a package that is not to be had any more
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_norms_have_a_kind_and_are_open_at_first(owner: nn.Module, kind: str) -> None:
    assert {layers.kind(owner, leaf) for leaf, _ in owner.named_parameters()} == {kind}
    assert not layers.is_closed(owner)
    assert all(layers.is_exempt(owner, leaf, parameter) for leaf, parameter in owner.named_parameters())


def zero_centered_norms() -> Iterator[tuple[str, str]]:
    """(module, class) of the norms in timm and transformers whose sources hint at a weight of zero or at 1 + weight."""
    hint = re.compile(
        r"Parameter\(torch\.zeros\(|(weight|gamma|scale)\S* \+ (1\b|1\.0|self)|\b1(\.0)? \+ self", re.IGNORECASE
    )
    for library, pattern in ((timm, "*.py"), (transformers, "modeling_*.py")):
        root = Path(library.__file__).parent
        for path in sorted(root.rglob(pattern)):
            if "flax" in path.name or "tf" in path.name.split("_") or "deprecated" in path.parts:
                continue
            for source in re.split(r"^(?=class )", path.read_text(), flags=re.MULTILINE):
                name = re.match(r"class (\w*norm(?!al|\w*(Head|Block|Net))\w*)\(", source, re.IGNORECASE)
                if name and hint.search(source):
                    yield ".".join([library.__name__, *path.relative_to(root).with_suffix("").parts]), name[1]


def test_one_plus_lists_exactly_the_norms_that_let_their_input_through_at_a_weight_of_zero() -> None:
    torch.manual_seed(0)
    input = torch.randn(2, 32, 32, 32)  # channels first and last
    tried = {}
    for module, name in zero_centered_norms():
        cls: Any = getattr(importlib.import_module(module), name)
        if name == "ZayaQKNorm":  # takes a config, and has a temperature only
            continue
        norm = cls((32,) if name == "ChameleonLayerNorm" else 32)
        gains = [leaf for leaf, _ in norm.named_parameters() if layers.gain(norm, leaf) is not None]
        if gains:
            with torch.no_grad():
                for leaf in gains:
                    getattr(norm, leaf).zero_()
                tried[name] = bool(norm(input).abs().mean() > 0.1)
            assert layers.is_closed(norm) != tried[name], name
    assert {"GemmaRMSNorm", "Qwen3NextRMSNorm", "NemotronLayerNorm1P"} <= {name for name in tried if tried[name]}
    assert {name for name in tried if tried[name]} == layers.ONE_PLUS & tried.keys()
    assert {"GemmaRMSNorm", "EvoNorm2dS0", "DebertaLayerNorm"} <= tried.keys()


def test_the_largest_gain_decides_whether_a_layer_is_closed() -> None:
    norm = nn.LayerNorm(100)
    with torch.no_grad():
        norm.weight.fill_(0.01)
    assert layers.is_near_zero(norm, "weight")
    assert layers.is_closed(norm)
    with torch.no_grad():
        norm.weight[3] = -0.2  # the outlier of a pretrained model
    assert not layers.is_closed(norm)


def test_a_closed_norm_is_told_by_its_gain_and_not_by_its_offset() -> None:
    norm = nn.BatchNorm2d(4)
    assert not layers.is_near_zero(norm, "bias")
    nn.init.zeros_(norm.weight)  # the last norm of a block
    assert layers.is_closed(norm)
    assert not layers.is_closed(nn.Linear(4, 4))
    assert not layers.is_closed(only("gamma", torch.zeros(1)))  # of no kind


@pytest.mark.parametrize("owner", [nn.LayerNorm(4, device="meta"), nn.LazyBatchNorm1d(), nn.LayerNorm(0)])
def test_values_that_cannot_be_seen_are_not_near_zero(owner: nn.Module) -> None:
    assert not layers.is_closed(owner)


def test_gain_of_a_sharded_norm_is_whole(tmp_path: Path) -> None:
    from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        norm = nn.LayerNorm(4)
        mesh = init_device_mesh("cpu", (1,))
        norm.weight = nn.Parameter(distribute_tensor(norm.weight.detach() * 1e-3, mesh, [Shard(0)]))
        assert torch.equal(layers.gain(norm, "weight"), torch.full((4,), 1e-3))  # type: ignore[arg-type]
        assert layers.is_closed(norm)
    finally:
        torch.distributed.destroy_process_group()


SAMPLE = {
    "timm": (
        "beit_base_patch16_224",
        "cait_xxs24_224",
        "convnext_atto",
        "convnextv2_atto",
        "deit3_small_patch16_224",
        "dm_nfnet_f0",
        "edgenext_xx_small",
        "nf_resnet50",
        "poolformer_s12",
        "resmlp_12_224",
        "resnet18",
        "swinv2_tiny_window8_256",
        "xcit_nano_12_p16_224",
    ),
    "transformers": (
        "beit",
        "bert",
        "convnext",
        "convnextv2",
        "dinov2",
        "gemma",
        "gemma2",
        "llama",
        "mimi",
        "qwen3_next",
        "sam3_lite_text",
        "vibevoice_acoustic_tokenizer",
    ),
}


def committed() -> tuple[str, dict[tuple[str, str], tuple[str, ...]]]:
    versions, _, *rows = model_census.TABLE.read_text().splitlines()
    return versions, {(cells[0], cells[1]): cells for cells in (tuple(row.split("\t")) for row in rows)}


@pytest.mark.parametrize(
    ("library", "name"),
    [(library, name) for library, names in SAMPLE.items() for name in names if name in model_census.names(library)],
)
def test_models_are_frozen_and_decayed_as_the_committed_table_says(library: str, name: str) -> None:
    """After a change of the rules: python tests/model_census.py, and look at the diff."""
    cells = model_census.row(library, name)
    row = dict(zip(model_census.COLUMNS, cells, strict=True))
    assert row["note"] == ""
    tensors, frozen, more, closed, decayed, exempt = (
        int(row[c]) for c in ("tensors", "frozen_layernorm", "frozen_norm", "closed_layernorm", "decayed", "exempt")
    )
    assert 0 < decayed < tensors == frozen + decayed + exempt
    assert frozen <= more
    assert closed <= exempt
    versions, rows = committed()
    if model_census.version(library) in versions:
        assert cells == rows[library, name]


def test_the_committed_table_has_every_model() -> None:
    versions, rows = committed()
    assert len(rows) > 1500
    for library in SAMPLE:
        if model_census.version(library) in versions:
            assert {name for lib, name in rows if lib == library} == set(model_census.names(library))
