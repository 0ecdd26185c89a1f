"""What attention blocks weigh by: the slow path that returns weights, apart from the fast one and equal to it.

`LAYERS` has a function for every class of blocks. It computes what the layer computes, by the layer's own parameters
and the equation of its paper, from weights that it forms in full, and returns these maps with the output made of them.
A block joins by an entry; a class without one, and without one of a class it is derived from, has no maps.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any

from torch import Tensor, nn

from ..errors import VisionattnError
from ..layers import (
    AgentAttention,
    AggregatedAttention,
    AttentiveConv2d,
    CausalSelfAttention,
    ChannelAttention,
    CogAttention,
    ContMix2d,
    CosineAttention,
    FlowAttention,
    FocalModulation,
    GatedPositionalSelfAttention,
    HaloAttention2d,
    HiLoAttention,
    HybridScaleAttention,
    KeyDrivenGQA,
    LargeKernelAttention,
    LinearLogNormalAttention,
    MixtureOfHeadAttention,
    NeighborhoodAttention2d,
    NormAwareLinearAttention,
    PartialChannelAttention,
    PartialSelfAttention,
    PartialSpatialAttention,
    PolarizedSelfAttention,
    RecursiveGatedConv,
    ReducedAttention,
    ReversedAttention,
    SelfAttention,
    SelfGuidedAttention,
    ShiftedWindowAttention2d,
    SparseAttention,
    StripeAttention2d,
    SubspaceAttention,
    TokenAttentiveConv2d,
    TokenFocalModulation,
    TokenNeighborhoodAttention,
    WindowAttention2d,
)
from ..layers.self_guided_attention import (
    GlobalEnhancedAttention,
)
from ..models.attnet import AttentiveMixer
from ..models.hornet import GatedConvMixer
from ..models.mixers.blocks import SoftCausalAttention
from ..models.nalaformer import NormAwareMixer
from .everywhere import (
    agent_attention,
    causal_attention,
    channel_attention,
    enhanced_attention,
    flow_attention,
    gated_attention,
    mixture_of_head_attention,
    norm_aware_attention,
    partial_self_attention,
    reduced_attention,
    reversed_attention,
    self_attention,
    self_guided_attention,
    soft_causal_attention,
    sparse_attention,
)
from .gating import (
    attentive_conv,
    focal_modulation,
    large_kernel_attention,
    partial_channel_attention,
    partial_spatial_attention,
    polarized_attention,
    recursive_gated_conv,
    subspace_attention,
)
from .map import Explained
from .nearby import (
    aggregated_attention,
    context_mixing,
    cosine_attention,
    halo_attention,
    hilo_attention,
    hybrid_scale_attention,
    neighborhood_attention,
    shifted_window_attention,
    stripe_attention,
    window_attention,
)
from .other_weights import cog_attention, key_driven_gqa, log_normal_attention


def layer_maps(layer: nn.Module, *args: Any, **kwargs: Any) -> Explained:
    """Maps of a layer, and its output computed from them.

    Args:
        layer: an attention block, in evaluation mode.
        *args: what it is called with.
        **kwargs: likewise.

    Raises:
        VisionattnError: if nobody has written how it weighs.
    """
    if (entry := entry_of(layer)) is None:
        raise VisionattnError(f"{type(layer).__name__} has no maps: they are those of {', '.join(_names())}")
    return entry(layer, *args, **kwargs)


def entry_of(layer: nn.Module) -> Callable[..., Explained] | None:
    """The function of `LAYERS` for a layer, that of the nearest class it is derived from."""
    return next((LAYERS[each] for each in type(layer).__mro__ if each in LAYERS), None)


def _names() -> list[str]:
    return [each.__name__ for each in LAYERS]


def _of_tokens(entry: Callable[..., Explained], first: bool = False) -> Callable[..., Explained]:
    """The function of a layer on sequences, of one on maps (B, H, W, C), or (B, C, H, W) with `first`."""

    @wraps(entry)
    def explain(layer: nn.Module, x: Tensor, grid: tuple[int, int]) -> Explained:
        x = x.unflatten(1, tuple(grid))
        maps, out = entry(layer, x.permute(0, 3, 1, 2) if first else x)
        return maps, (out.permute(0, 2, 3, 1) if first else out).flatten(1, 2)

    return explain


def _channels_last(entry: Callable[..., Explained]) -> Callable[..., Explained]:
    """The function of a layer on maps (B, H, W, C), of one on (B, C, H, W)."""

    @wraps(entry)
    def explain(layer: nn.Module, x: Tensor) -> Explained:
        maps, out = entry(layer, x.permute(0, 3, 1, 2))
        return maps, out.permute(0, 2, 3, 1)

    return explain


LAYERS: dict[type[nn.Module], Callable[..., Explained]] = {
    SelfAttention: self_attention,
    ReducedAttention: reduced_attention,
    ReversedAttention: reversed_attention,
    CogAttention: cog_attention,
    KeyDrivenGQA: key_driven_gqa,
    LinearLogNormalAttention: log_normal_attention,
    MixtureOfHeadAttention: mixture_of_head_attention,
    AgentAttention: agent_attention,
    CausalSelfAttention: causal_attention,
    SoftCausalAttention: soft_causal_attention,
    GatedPositionalSelfAttention: gated_attention,
    SparseAttention: sparse_attention,
    PartialSelfAttention: partial_self_attention,
    NormAwareLinearAttention: norm_aware_attention,
    NormAwareMixer: _channels_last(norm_aware_attention),
    ChannelAttention: channel_attention,
    FlowAttention: flow_attention,
    WindowAttention2d: window_attention,
    ShiftedWindowAttention2d: shifted_window_attention,
    StripeAttention2d: stripe_attention,
    HiLoAttention: hilo_attention,
    HybridScaleAttention: hybrid_scale_attention,
    SelfGuidedAttention: self_guided_attention,
    GlobalEnhancedAttention: enhanced_attention,
    NeighborhoodAttention2d: neighborhood_attention,
    TokenNeighborhoodAttention: _of_tokens(neighborhood_attention),
    CosineAttention: cosine_attention,
    AggregatedAttention: aggregated_attention,
    HaloAttention2d: halo_attention,
    ContMix2d: context_mixing,
    FocalModulation: focal_modulation,
    TokenFocalModulation: _of_tokens(focal_modulation),
    LargeKernelAttention: large_kernel_attention,
    RecursiveGatedConv: recursive_gated_conv,
    GatedConvMixer: _channels_last(recursive_gated_conv),
    AttentiveConv2d: attentive_conv,
    AttentiveMixer: _channels_last(attentive_conv),
    TokenAttentiveConv2d: _of_tokens(attentive_conv, first=True),
    PartialChannelAttention: partial_channel_attention,
    PartialSpatialAttention: partial_spatial_attention,
    PolarizedSelfAttention: polarized_attention,
    SubspaceAttention: subspace_attention,
}
"""How the maps of a layer are computed: `f(layer, *inputs)` returns them, and the output made of them."""
