"""What a parameter is to its layer: a gain or an offset of a normalization, a LayerScale, or something to train.

Frameworks are never imported: their classes are known by name. By name alone a class is taken for a norm only with
safeguards, and for the bare gains that blocks keep there is one table, :data:`DECLARED`, read off the sources of timm
and transformers. A class that is missing there is trained, which is the harmless side.
"""

from __future__ import annotations

import re
from typing import Literal

import torch
from torch import nn
from torch.nn.parameter import is_lazy

Kind = Literal["layernorm", "layerscale", "norm"]

# The largest entry of a gain below which its layer is a gate that is still closed. Gates start at 0 or, as LayerScale,
# between 1e-6 and 0.01; transformers draws the gains of EfficientNet's BatchNorms from N(0, 0.02). A LayerScale of 0.1
# (BEiT, and 0.09998 in half precision) lets its block do its work even if frozen: the matrices in it grow to match. The
# largest entry decides and not the mean: the norms of a pretrained language model may be small but for a few channels.
NEAR_ZERO = 0.095

# class, or module.class where the name alone says too little -> (kind, attributes). None is a gain that is trained:
# it is named like a norm or stands in place of one, and is no more decayed than a norm is.
DECLARED: dict[str, tuple[Kind | None, str]] = {
    # LayerScale as a bare parameter of the block whose residual branch it multiplies: timm
    "timm.models.beit.Block": ("layerscale", "gamma_1 gamma_2"),
    "timm.models.edgenext.ConvBlock": ("layerscale", "gamma"),
    "timm.models.fasternet.MLPBlock": ("layerscale", "layer_scale"),
    "timm.models.iformer.Residual": ("layerscale", "gamma"),
    "timm.models.metaformer.Scale": ("layerscale", "scale"),  # also of the shortcut: res_scale
    "timm.models.mlp_mixer.ResBlock": ("layerscale", "ls1 ls2"),
    "timm.models.rdnet.DenseBlock": ("layerscale", "gamma"),
    "ClassAttentionBlock": ("layerscale", "gamma1 gamma2"),
    "ConvNeXtBlock": ("layerscale", "gamma"),
    "EvaBlock": ("layerscale", "gamma_1 gamma_2"),
    "LayerScaleBlock": ("layerscale", "gamma_1 gamma_2"),
    "LayerScaleBlockClassAttn": ("layerscale", "gamma_1 gamma_2"),
    "MetaNeXtBlock": ("layerscale", "gamma"),
    "SplitTransposeBlock": ("layerscale", "gamma gamma_xca"),
    "XCABlock": ("layerscale", "gamma1 gamma2 gamma3"),
    # transformers
    "BeitLayer": ("layerscale", "lambda_1 lambda_2"),
    "ConvNextLayer": ("layerscale", "layer_scale_parameter"),
    "DINOv3ConvNextLayer": ("layerscale", "gamma"),
    "Data2VecVisionLayer": ("layerscale", "lambda_1 lambda_2"),
    "DinatLayer": ("layerscale", "layer_scale_parameters"),
    "EdgeTamVideoMemoryFuserCXBlock": ("layerscale", "scale"),
    "EfficientFormerMeta3D": ("layerscale", "layer_scale_1 layer_scale_2"),
    "EfficientFormerMeta4D": ("layerscale", "layer_scale_1 layer_scale_2"),
    "FocalNetLayer": ("layerscale", "gamma_1 gamma_2"),
    "GroundingDinoFusionLayer": ("layerscale", "vision_param text_param"),
    "Inkling2VisionEncoderLayer": ("layerscale", "lambda_1 lambda_2"),
    "InternVLVisionLayer": ("layerscale", "lambda_1 lambda_2"),
    "LwDetrViTLayer": ("layerscale", "gamma_1 gamma_2"),
    "MMGroundingDinoFusionLayer": ("layerscale", "vision_param text_param"),
    "NatLayer": ("layerscale", "layer_scale_parameters"),
    "PoolFormerLayer": ("layerscale", "layer_scale_1 layer_scale_2"),
    "QianfanOCRVisionLayer": ("layerscale", "lambda_1 lambda_2"),
    "Qwen3OmniMoeConvNeXtBlock": ("layerscale", "gamma"),
    "Sam2VideoMemoryFuserCXBlock": ("layerscale", "scale"),
    "Sam3LiteTextLayerScaledResidual": ("layerscale", "layer_scale"),
    "Sam3TrackerVideoMemoryFuserCXBlock": ("layerscale", "scale"),
    "Step3p7VisionEncoderLayer": ("layerscale", "lambda_1 lambda_2"),
    "SwiftFormerConvEncoder": ("layerscale", "layer_scale"),
    "SwiftFormerEncoderBlock": ("layerscale", "layer_scale_1 layer_scale_2"),
    "SwiftFormerLocalRepresentation": ("layerscale", "layer_scale"),
    "VanLayerScaling": ("layerscale", "weight"),
    "VibeVoiceAcousticTokenizerConvNext1dLayer": ("layerscale", "gamma ffn_gamma"),
    "VibeVoiceAsrConvNext1dLayer": ("layerscale", "gamma ffn_gamma"),
    "WavTokenizerConvNeXtBlock": ("layerscale", "gamma"),
    # norms that the rules by name would miss or take for another kind
    "CohereLayerNorm": ("layernorm", "weight"),  # of queries and keys: a matrix of (heads, channels)
    "GradiumPhononTTSTimestepNorm": ("layernorm", "weight"),  # RMSNorms by what they do, as the next five
    "PocketTTSTimestepNorm": ("layernorm", "weight"),
    "SimpleNorm": ("layernorm", "weight"),
    "SimpleNorm2d": ("layernorm", "weight"),
    "SimpleNorm2dFp32": ("layernorm", "weight"),
    "SimpleNormFp32": ("layernorm", "weight"),
    "MCTCTLayerNorm": ("layernorm", "singleton_weight singleton_bias"),
    "InplaceAbn": ("norm", "weight bias"),
    # no norms: they add to their input, squash it, or only scale it
    "GlobalResponseNorm": (None, "weight bias"),
    "GRN": (None, "gamma beta"),
    "ConvNextV2GRN": (None, "weight bias gamma beta"),
    "DyT": (None, "alpha weight bias gamma beta"),
    "DynamicTanh": (None, "alpha weight bias gamma beta"),
    "Derf": (None, "alpha weight bias gamma beta s shift"),
    "timm.models.mlp_mixer.Affine": (None, "alpha beta"),
}

# Norms that multiply with 1 + weight.
ONE_PLUS = frozenset(
    {
        "Gemma2RMSNorm",
        "Gemma3RMSNorm",
        "GemmaRMSNorm",
        "MiniMaxM3VLRMSNorm",
        "MoonshineStreamingLayerNorm",
        "MuseGlimmerTextCenteredRMSNorm",
        "MuseSparkTextCenteredRMSNorm",
        "MuseSparkTextInputScaledRMSNorm",
        "NemotronLayerNorm1P",
        "Qwen3NextRMSNorm",
        "Qwen3_5MoeRMSNorm",
        "Qwen3_5RMSNorm",
        "Qwen4ExpTextRMSNorm",
        "RecurrentGemmaRMSNorm",
        "Step3p7RMSNorm",
        "T5Gemma2RMSNorm",
        "T5GemmaRMSNorm",
        "VaultGemmaRMSNorm",
        "VideoPrismLayerNorm",
    }
)

# Class names, for the many norms that are no subclass of torch's.
_LAYER_SCALE_CLASS = re.compile(r"layer_?scale", re.IGNORECASE)
_LAYER_NORM_CLASS = re.compile(r"layer_?norm|rms_?norm|scale_?norm", re.IGNORECASE)
_NORM_CLASS = re.compile(r"norm(?!al)", re.IGNORECASE)
_LAYER_NORM_TYPES = tuple(getattr(nn, name) for name in ("LayerNorm", "RMSNorm") if hasattr(nn, name))
_NORM_TYPES = (nn.GroupNorm, nn.modules.batchnorm._NormBase)
_MATRIX_TYPES = (nn.Linear, nn.Bilinear, nn.Embedding, nn.EmbeddingBag, nn.modules.conv._ConvNd)
# Parameter names
_BIAS = re.compile(r"(^|_)bias($|_)", re.IGNORECASE)  # bias, in_proj_bias, bias_hh_l0
_NORM_GAIN = frozenset({"weight", "gamma", "scale", "scalar", "gain", "g", "a_2"})
_GAIN = re.compile(
    r"(^|_)(gamma|beta|lambda|alpha|(layer_?|logit_?)?scale|ls|gain|gate|temp(erature)?|res(idual)?_?weight)s?(\d|_|$)",
    re.IGNORECASE,
)


def kind(owner: nn.Module, leaf: str) -> Kind | None:
    """What a parameter is: of a LayerNorm or RMSNorm, a LayerScale, of another norm, or none of these.

    Args:
        owner: the module that holds the parameter directly.
        leaf: the parameter's name in it.

    Returns:
        ``"layernorm"``, ``"layerscale"``, ``"norm"`` (BatchNorm, GroupNorm, InstanceNorm and the rest), or None. A
        class that is not torch's is a norm only if it or a base is called one, holds a gain directly, and has no matrix
        anywhere below it: a ``NormedLinear``, and the head of a model that is called after its LayerNorms, are none.
    """
    declared = _declared(owner, leaf)
    if declared is not None:
        return declared[0]
    if isinstance(owner, _LAYER_NORM_TYPES) or _is_norm(owner, _LAYER_NORM_CLASS):
        return "layernorm"
    if _is_called(owner, _LAYER_SCALE_CLASS) and (leaf in _NORM_GAIN or _GAIN.search(leaf)) and _has_no_matrix(owner):
        return "layerscale"
    if isinstance(owner, _NORM_TYPES) or _is_norm(owner, _NORM_CLASS):
        return "norm"
    return None


def gain(owner: nn.Module, leaf: str) -> torch.Tensor | None:
    """The factors with which a norm or a LayerScale multiplies: the parameter, or one plus it.

    Args:
        owner, leaf: as in :func:`kind`.

    Returns:
        A tensor of the parameter's shape, whole if it is sharded; None for an offset, and for a parameter of no
        :func:`kind`.
    """
    what = kind(owner, leaf)
    if what is None or (what != "layerscale" and leaf not in _NORM_GAIN):
        return None
    values: torch.Tensor = getattr(owner, leaf).detach()
    if hasattr(values, "full_tensor"):  # a DTensor
        values = values.full_tensor()
    return values + 1.0 if any(cls.__name__ in ONE_PLUS for cls in type(owner).__mro__) else values


def is_near_zero(owner: nn.Module, leaf: str) -> bool:
    """Whether a gain lets next to nothing through: its largest factor is below :data:`NEAR_ZERO`.

    Args:
        owner, leaf: as in :func:`kind`.

    Returns:
        False for what is no gain, and for values that cannot be seen: on the meta device, not yet initialized, or in
        another process.
    """
    if is_lazy(getattr(owner, leaf)):
        return False
    factors = gain(owner, leaf)
    if factors is None or factors.is_meta or not factors.numel():
        return False
    return bool(factors.abs().max() < NEAR_ZERO)


def is_closed(owner: nn.Module) -> bool:
    """Whether any gain that a module holds directly is near zero; then nothing of it is to be frozen."""
    return any(is_near_zero(owner, leaf) for leaf, _ in owner.named_parameters(recurse=False))


def is_exempt(owner: nn.Module, leaf: str, parameter: nn.Parameter) -> bool:
    """Whether a parameter gets no weight decay: biases, norms, LayerScale, and whatever else looks like a gain.

    Decay pulls a gain to zero, which is no simpler a function. To leave a tensor undecayed is harmless, to freeze it
    is not: so a gain's name and one entry a channel are enough here, and not in :func:`kind`.

    Args:
        owner, leaf: as in :func:`kind`.
        parameter: the parameter itself. The ``weight`` of an ``nn.Linear(n, 1)`` has one entry a channel and is
            decayed all the same: it is a matrix.
    """
    return bool(
        _BIAS.search(leaf)
        or _declared(owner, leaf) is not None
        or kind(owner, leaf) is not None
        or (_GAIN.search(leaf) and _has_one_entry_a_channel(parameter))
    )


def _declared(owner: nn.Module, leaf: str) -> tuple[Kind | None] | None:
    """The table's word on a parameter in a tuple, since that word may be None; None where it has none."""
    for cls in type(owner).__mro__:
        for name in (cls.__name__, f"{cls.__module__}.{cls.__name__}"):
            declared, attributes = DECLARED.get(name, (None, ""))
            if leaf in attributes.split():
                return (declared,)
    return None


def _is_called(owner: nn.Module, pattern: re.Pattern[str]) -> bool:
    return any(pattern.search(cls.__name__) for cls in type(owner).__mro__)


def _is_norm(owner: nn.Module, called: re.Pattern[str]) -> bool:
    gains = (leaf for leaf, _ in owner.named_parameters(recurse=False) if leaf in _NORM_GAIN)
    return _is_called(owner, called) and any(gains) and _has_no_matrix(owner)


def _has_no_matrix(owner: nn.Module) -> bool:
    # A NormedLinear is a matrix even where it has one row.
    return not isinstance(owner, _MATRIX_TYPES) and all(map(_has_one_entry_a_channel, owner.parameters()))


def _has_one_entry_a_channel(parameter: nn.Parameter) -> bool:
    """Whatever the shape: (C,), (C, 1, 1), or a scalar."""
    return not is_lazy(parameter) and parameter.numel() == max(parameter.shape, default=1)
