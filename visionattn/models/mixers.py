"""Token mixers by name, as the skeletons of `skeletons.py` and the comparison take them."""

import fnmatch
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from .. import layers
from ..errors import UnknownModelError
from ..layers.agent_attention import resize_axis_tables
from ..layers.causal_attention import CausalSelfAttention
from ..layers.depthwise import depthwise
from ..layers.pointwise import Pointwise2d
from ..layers.self_guided_attention import GlobalEnhancedAttention


@dataclass(frozen=True)
class Place:
    """Where in a network a mixer stands, by which its arguments may go.

    Args:
        num_heads: attention heads there.
        grid: (height, width) of the map at the image size that the network is made for.
        native: side of the map by which kernels and windows are chosen, whatever the image size.
        index: of the block in its stage.
        depth: blocks of the stage.
        last_stage: of a pyramid.
        outermost: the first or the last of the network's blocks with this mixer.
    """

    num_heads: int
    grid: tuple[int, int] = (14, 14)
    native: int = 14
    index: int = 0
    depth: int = 1
    last_stage: bool = False
    outermost: bool = False

    @property
    def num_tokens(self) -> int:
        return self.grid[0] * self.grid[1]

    @property
    def window(self) -> int:
        """Side of windows: 7, as in the papers, where the native map consists of such, else 8."""
        return 8 if self.native % 7 else 7


Call = Callable[[nn.Module, Tensor, tuple[int, int], Any], tuple[Tensor, Any]]

Resize = Callable[
    [dict[str, Tensor], dict[str, Tensor], tuple[int, int], Callable[[int], tuple[int, int] | None]], dict[str, Tensor]
]


@dataclass(frozen=True)
class Mixer:
    """What is known of a mixer.

    Args:
        layer: its class and the arguments that a place gives it besides the channels.
        kind: what it takes and returns: "tokens" (B, N, C), called with the keyword `grid`; "map" (B, C, H, W); "last"
            (B, H, W, C).
        everywhere: it may fill all four stages of the pyramid, and not only the last two.
        fixed: its number of tokens is that of the construction.
        call: of one that takes a state from the block before it, or hands one to the next: takes layer, input, grid and
            state (None in the first block of a stage) and returns output and state. Maps of a state are (B, N).
        final: what becomes of the last state: "weigh" tokens by it before the mean, add it to the "loss", or nothing.
        start: what follows the truncated normal that all matrices are drawn from.
        init: what `start`, or the layer, begins with, in words; empty if nothing is special.
        resize: makes the state dict of a layer fit one for another grid: takes it, the other's, the other's grid, and
            what finds the grid of a number of tokens.
        variants: further rows of a comparison, by name: arguments in place of the layer's own.
        remark: what a reader of a comparison must know.
        paper: arXiv id.
    """

    layer: Callable[[Place], tuple[Callable[..., nn.Module], dict[str, Any]]]
    kind: str
    paper: str = ""
    everywhere: bool = True
    fixed: bool = False
    call: Call | None = None
    final: str = ""
    start: Callable[[nn.Module], None] | None = None
    init: str = ""
    resize: Resize | None = None
    variants: Mapping[str, dict[str, Any]] = field(default_factory=dict)
    remark: str = ""

    @property
    def state(self) -> bool:
        """Whether something travels from block to block."""
        return self.call is not None

    def make(self, dim: int, place: Place, device=None, dtype=None, **kwargs: Any) -> nn.Module:
        """The layer.

        Args:
            dim: channels C.
            place: where it stands.
            device: of the parameters.
            dtype: of the parameters.
            **kwargs: in place of what the place gives.

        Raises:
            ValueError: if the layer cannot be made so.
        """
        layer, arguments = self.layer(place)
        others = [
            replace(place, index=i, depth=n, outermost=end) for i in (0, 1) for n in (1, 2) for end in (False, True)
        ]
        known = {name for other in others for name in signature(self.layer(other)[0]).parameters}
        taken = signature(layer).parameters
        # Where several classes take turns, each takes of the arguments what is its own.
        kwargs = {name: value for name, value in kwargs.items() if name in taken or name not in known}
        return layer(dim, **arguments | kwargs, device=device, dtype=dtype)


class DepthwiseMixer(nn.Module):
    """A depthwise convolution, then a product over channels: (B, C, H, W) to the same. Local, and the host of gates.

    Args:
        dim: channels C.
        kernel_size: of the convolution, odd.
    """

    last_product = "proj"

    def __init__(self, dim: int, kernel_size: int = 7, device=None, dtype=None) -> None:
        super().__init__()
        self.conv = depthwise(dim, kernel_size, device=device, dtype=dtype)
        self.proj = Pointwise2d(dim, dim, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(self.conv(x))


class NoMixer(nn.Module):
    """Passes on what it gets: the block adds its norm, and no position hears of another."""

    def __init__(self, dim: int, device=None, dtype=None) -> None:
        super().__init__()

    def forward(self, x: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        return x


class PluggedIn(nn.Module):
    """A gate after a mixer, which then is its host: (B, C, H, W) to the same.

    Args:
        dim: channels C.
        host: "dw7" or "softmax".
        gate: class of the gate, which takes maps (B, C, H, W).
        num_heads: attention heads of the host "softmax".
        **kwargs: arguments of the gate.
    """

    def __init__(
        self, dim: int, host: str, gate: Callable[..., nn.Module], num_heads: int, device=None, dtype=None, **kwargs
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.host_name = host
        self.host = MIXERS[host].make(dim, Place(num_heads), **dd)
        self.gate = gate(dim, **kwargs, **dd)

    def forward(self, x: Tensor) -> Tensor:
        y, _ = mix(MIXERS[self.host_name], self.host, x.permute(0, 2, 3, 1))
        return self.gate(y.permute(0, 3, 1, 2))


class PatchSparseAttention(nn.Module):
    """Sparsifiner's attention without a class token: the mean of the tokens takes its place, as one more key. The
    predictor, which the choice of keys has no gradient for, stays as it is drawn.

    Args:
        dim: channels C.
        num_heads: attention heads.
        grid_size: (height, width) of the map that the predictor is made for; it is resampled for others.
        **kwargs: of `SparseAttention`.
    """

    def __init__(self, dim: int, num_heads: int, grid_size: tuple[int, int], **kwargs) -> None:
        super().__init__()
        num_tokens = grid_size[0] * grid_size[1] + 1
        self.attention = layers.SparseAttention(dim, num_tokens, num_heads, grid_size=grid_size, **kwargs)
        self.attention.predictor.requires_grad_(False)

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        return self.attention(torch.cat([x.mean(1, keepdim=True), x], 1), grid=grid)[:, 1:]


class SoftCausalAttention(CausalSelfAttention):
    """iLLaMA's attention whose mask, in the first epochs of training, is soft. Arguments as for `CausalSelfAttention`.

    Args:
        dim: channels C.
        num_heads: attention heads.
        soft_mask_rate: factor on the attention weights of later tokens; 0 is causal, 1 bidirectional.
        soft_mask_epochs: epochs, at the start of training, in which the rate falls from 1 to 0.
        **kwargs: of `CausalSelfAttention`.
    """

    def __init__(
        self, dim: int, num_heads: int = 8, soft_mask_rate: float = 0.0, soft_mask_epochs: float = 0.0, **kwargs
    ) -> None:
        super().__init__(dim, num_heads, **kwargs)
        self.soft_mask_rate, self.soft_mask_epochs = soft_mask_rate, soft_mask_epochs
        self.advance(0.0)

    def forward(self, x: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        scheduled = self.training and self.soft_mask_epochs
        return super().forward(x, soft_mask_rate=self.scheduled_rate if scheduled else self.soft_mask_rate)

    def advance(self, epoch: float) -> None:
        """Set the soft mask of training mode. In evaluation mode it stays `soft_mask_rate`."""
        self.scheduled_rate = max(0.0, 1 - epoch / self.soft_mask_epochs) if self.soft_mask_epochs else 0.0


class BalancedHeads(layers.MixtureOfHeadAttention):
    """Mixture-of-head attention that is told the weight of its load-balance loss. Arguments as for the layer.

    Args:
        dim: channels C.
        num_heads: attention heads.
        shared: heads that are always on.
        top_k: heads that a token keeps of the others.
        balance: weight of the loss, 0.01 as published, 0 for none.
        **kwargs: of `MixtureOfHeadAttention`.
    """

    def __init__(self, dim: int, num_heads: int, shared: int, top_k: int, balance: float = 0.0, **kwargs) -> None:
        super().__init__(dim, num_heads, shared, top_k, **kwargs)
        self.balance = balance


def mix(
    mixer: Mixer, layer: nn.Module, x: Tensor, grid: tuple[int, int] | None = None, state: Any = None
) -> tuple[Tensor, Any]:
    """What a mixer returns, in the layout of its input, and its state.

    Args:
        mixer: what is known of it.
        layer: the layer.
        x: tokens (B, N, C) with their grid, or a map (B, H, W, C) without one.
        grid: (height, width) of the tokens.
        state: what the block before handed on.
    """
    of_tokens = mixer.kind == "tokens"
    size = (x.shape[1], x.shape[2]) if grid is None else grid
    if of_tokens == (grid is None):  # the other layout
        x = x.flatten(1, 2) if of_tokens else x.unflatten(1, size)
    if mixer.kind == "map":
        x = x.permute(0, 3, 1, 2)
    if mixer.call is not None:
        y, state = mixer.call(layer, x, size, state)
    else:
        y = layer(x, grid=size) if of_tokens else layer(x)
    if mixer.kind == "map":
        y = y.permute(0, 2, 3, 1)
    if of_tokens == (grid is None):
        y = y.unflatten(1, size) if of_tokens else y.flatten(1, 2)
    return y, state


def find_mixer(name: str) -> Mixer:
    """A mixer by its name.

    Args:
        name: one of `list_mixers()`.

    Raises:
        UnknownModelError: if there is no such mixer.
    """
    if name not in MIXERS:
        near = get_close_matches(str(name), MIXERS, n=4, cutoff=0.5)
        raise UnknownModelError(
            f"unknown mixer {name}; " + (f"did you mean {', '.join(near)}?" if near else "see visionattn.list_mixers()")
        )
    return MIXERS[name]


def list_mixers(filter: str = "") -> list[str]:
    """Names of token mixers, sorted.

    Args:
        filter: shell pattern, `"*gqa*"`; all names if empty.
    """
    return sorted(name for name in MIXERS if not filter or fnmatch.fnmatch(name, filter))


def _heads(layer: Callable[..., nn.Module], **kwargs: Any) -> Callable[[Place], tuple]:
    """A class that takes the heads of the place, and these arguments."""
    return lambda at: (layer, {"num_heads": at.num_heads, **kwargs})


def _gate(host: str, gate: Callable[..., nn.Module], **kwargs: Any) -> Callable[[Place], tuple]:
    return lambda at: (PluggedIn, {"host": host, "gate": gate, "num_heads": at.num_heads, **kwargs})


def _softmax_at_ends(layer: Callable[..., nn.Module]) -> Callable[[Place], tuple]:
    return lambda at: (layers.SelfAttention if at.outermost else layer, {"num_heads": at.num_heads, "qkv_bias": True})


def _neighborhood(at: Place) -> tuple:
    kernel = 7 if at.native >= 7 else 3
    dilation = 2 if at.index % 2 and 2 * kernel <= at.native else 1
    return layers.NeighborhoodAttention2d, {
        "num_heads": at.num_heads, "kernel_size": kernel, "dilation": dilation
    }  # fmt: skip


def _dual(at: Place) -> tuple:
    if at.index % 2:
        return layers.ChannelAttention, {"num_heads": at.num_heads}
    return layers.WindowAttention2d, {"num_heads": at.num_heads, "window_size": at.window}


def _guided_pair(at: Place) -> tuple:
    if at.depth == 1:  # as in the last stage of SG-Former
        return GlobalEnhancedAttention, {"num_heads": at.num_heads}
    if at.depth % 2:
        raise ValueError(f"a pair of blocks cannot fill a stage of {at.depth}")
    if at.index % 2:
        return layers.SelfGuidedAttention, {"num_heads": at.num_heads, "sections": ((1 / 2, 2), (1 / 2, 1))}
    return layers.HybridScaleAttention, {
        "num_heads": at.num_heads, "sr_ratio": 1 if at.last_stage else 2, "window_size": at.window
    }  # fmt: skip


def _call_pair(layer: nn.Module, x: Tensor, grid: tuple[int, int], state: Tensor | None) -> tuple:
    if isinstance(layer, layers.HybridScaleAttention):
        found = layer(x)
        return found[0], found[1]
    return (layer(x) if state is None else layer(x, state)), None


def _call_reversed(layer: nn.Module, x: Tensor, grid: tuple[int, int], state: Tensor | None) -> tuple:
    found = layer(x, state)
    return found[0], found[1]


def _call_balanced(layer: BalancedHeads, x: Tensor, grid: tuple[int, int], state: Tensor | None) -> tuple:
    y = layer(x, grid)
    if not (layer.training and layer.balance and layer.router.top_k):
        return y, state
    loss = layer.balance * layer.router.aux_loss(x)
    return y, loss if state is None else state + loss


def _routed(at: Place) -> tuple:
    shared = 0 if at.num_heads == 1 else max(1, at.num_heads // 3)
    kept = max(1, 3 * at.num_heads // 4 - shared)
    return BalancedHeads, {"num_heads": at.num_heads, "shared": shared, "top_k": kept}


def _zero_controller(layer: nn.Module) -> None:
    nn.init.zeros_(layer.message_controller.fc2.weight)


def _keep_predictor(given: dict, own: dict, grid: tuple[int, int], find: Callable) -> dict:
    fits = all(value.shape == own[key].shape for key, value in given.items())
    return given if fits else given | {key: value for key, value in own.items() if ".predictor." in key}


def _resize_axes(given: dict, own: dict, grid: tuple[int, int], find: Callable) -> dict:
    return resize_axis_tables(given, own)


def _resize_gate(given: dict, own: dict, grid: tuple[int, int], find: Callable) -> dict:
    old = find(given["token_mlp.fc1.weight"].shape[1]) if "token_mlp.fc1.weight" in given else None
    return given if old in (None, grid) else layers.mixer_gate.resize_token_mlps(given, old, grid)


def _resize_alignment(given: dict, own: dict, grid: tuple[int, int], find: Callable) -> dict:
    old = find(len(given["align.weight"])) if "align.weight" in given else None
    if old in (None, grid):
        return given
    return given | {"align.weight": layers.reduced_attention.resize_token_mixing(given["align.weight"], old, grid)}


def _halo(at: Place) -> tuple:
    return layers.HaloAttention2d, {
        "num_heads": at.num_heads, "block_size": 7 if at.window == 7 else 4, "halo_size": 3
    }  # fmt: skip


def _gqa(kind: str) -> Callable[[Place], tuple]:
    def layer(at: Place) -> tuple:
        if at.num_heads % 2 or (kind != "gqa" and at.num_heads < 6):
            raise ValueError(f"expected an even num_heads, of 6 or more if kind is not 'gqa', got {at.num_heads}")
        per_sample = {"per_sample": True} if kind == "kdgqa" else {}
        return layers.KeyDrivenGQA, {"num_heads": at.num_heads, "kind": kind, "qkv_bias": True, **per_sample}

    return layer


def _reset(layer: nn.Module) -> None:
    layer.reset_parameters()


VIT = "2010.11929"
ACTIVATOR = "2405.15953"
POLARIZED = "2107.00782"
ULSAM = "2006.15102"
REDUCED = "2403.01643"
GQA = "2408.08454"
PATNET = "2503.03148"
WHOLE_BATCH = {"per_sample": False}
BATCH_NORM = "has batch norms"

MIXERS: dict[str, Mixer] = {
    "softmax": Mixer(_heads(layers.SelfAttention, qkv_bias=True), "tokens", VIT, remark="control"),
    "none": Mixer(lambda at: (NoMixer, {}), "tokens", remark="control: mixes nothing"),
    "activator": Mixer(
        lambda at: (lambda dim, **kwargs: layers.ActivatorGate(dim, **{"hidden_dim": 2 * dim} | kwargs), {}),
        "tokens",
        ACTIVATOR,
        remark="control: mixes nothing",
    ),
    "dw7": Mixer(lambda at: (DepthwiseMixer, {}), "map", remark="control: local; host of the gates"),
    "flow": Mixer(
        _heads(layers.FlowAttention),
        "tokens",
        "2202.06258",
    ),
    "log_normal": Mixer(
        _heads(layers.LinearLogNormalAttention, per_sample=True),
        "tokens",
        "2311.13541",
        variants={"as published, by the whole batch": WHOLE_BATCH},
        remark="statistics per sample",
    ),
    "norm_aware": Mixer(
        _heads(layers.NormAwareLinearAttention),
        "map",
        "2506.21137",
        remark="brings rotary positions and a 5 x 5 convolution",
    ),
    "mixer_gate": Mixer(
        lambda at: (
            lambda dim, **kwargs: layers.MixerGate(dim, **{"token_dim": 2 * dim, "channel_dim": 2 * dim} | kwargs),
            {"num_tokens": at.num_tokens},
        ),
        "tokens",
        "2403.02411",
        everywhere=False,
        fixed=True,
        resize=_resize_gate,
    ),
    "super": Mixer(
        lambda at: (
            layers.ReducedAttention,
            {"num_heads": at.num_heads, "kind": "super", "num_tokens": at.num_tokens},
        ),
        "tokens",
        REDUCED,
        everywhere=False,
        fixed=True,
        resize=_resize_alignment,
        init="token matrix: identity and truncated normal",
    ),
    "sparsifiner": Mixer(
        lambda at: (PatchSparseAttention, {"num_heads": at.num_heads, "grid_size": at.grid, "qkv_bias": True}),
        "tokens",
        "2303.13755",
        everywhere=False,
        resize=_keep_predictor,
        remark="its predictor, which would learn by a loss of its own, is not trained; the mean is one more key",
    ),
    "optimised": Mixer(_heads(layers.ReducedAttention, kind="optimised"), "tokens", REDUCED),
    "efficient": Mixer(_heads(layers.ReducedAttention, kind="efficient"), "tokens", REDUCED),
    "gqa": Mixer(_gqa("gqa"), "tokens", GQA),
    "kdgqa": Mixer(
        _gqa("kdgqa"),
        "tokens",
        GQA,
        variants={"as published, by the whole batch": WHOLE_BATCH},
        remark="allocation per sample",
    ),
    "dgqa_diff": Mixer(_gqa("dgqa_diff"), "tokens", GQA, remark="evaluation depends on what was seen before"),
    "dgqa_ema": Mixer(_gqa("dgqa_ema"), "tokens", GQA, remark="evaluation depends on what was seen before"),
    "pgqa": Mixer(_gqa("pgqa"), "tokens", GQA, remark="draws noise in evaluation too"),
    "selective": Mixer(
        _heads(layers.SelectiveSelfAttention, qkv_bias=True),
        "tokens",
        "2411.12892",
        start=_reset,
        init="temperatures of 1, but for 1 % of log N",
    ),
    "cog": Mixer(
        _softmax_at_ends(layers.CogAttention),
        "tokens",
        "2411.07176",
        everywhere=False,
        remark="first and last layer are softmax attention",
    ),
    "reversed": Mixer(
        _heads(layers.ReversedAttention, controller_bias=4.0),
        "tokens",
        "2304.03282",
        everywhere=False,
        call=_call_reversed,
        final="weigh",
        start=_zero_controller,
        init="message controller: zero, with a constant of 4",
        remark="a message travels through the blocks of a stage; the head weighs tokens by it",
    ),
    "polarized_parallel": Mixer(
        _gate("dw7", layers.PolarizedSelfAttention, order="parallel"), "map", POLARIZED, remark="gate after dw7"
    ),
    "polarized_sequential": Mixer(
        _gate("dw7", layers.PolarizedSelfAttention, order="sequential"), "map", POLARIZED, remark="gate after dw7"
    ),
    "subspace": Mixer(
        _gate("dw7", layers.SubspaceAttention, num_subspaces=4), "map", ULSAM, remark=f"gate after dw7; {BATCH_NORM}"
    ),
    "softmax_polarized_parallel": Mixer(
        _gate("softmax", layers.PolarizedSelfAttention, order="parallel"), "map", POLARIZED, remark="gate after softmax"
    ),
    "softmax_polarized_sequential": Mixer(
        _gate("softmax", layers.PolarizedSelfAttention, order="sequential"),
        "map",
        POLARIZED,
        remark="gate after softmax",
    ),
    "softmax_subspace": Mixer(
        _gate("softmax", layers.SubspaceAttention, num_subspaces=4),
        "map",
        ULSAM,
        remark=f"gate after softmax; {BATCH_NORM}",
    ),
    "halo": Mixer(
        _halo,
        "map",
        "2103.12731",
        remark="blocks of 7 (4 where these do not fit) and a halo of 3; no projection of the output",
    ),
    "neighborhood": Mixer(
        _neighborhood,
        "last",
        "2209.15001",
        remark="7 x 7, dilations 1 and 2 in turn where they fit; 3 x 3 on smaller maps",
    ),
    "window_channel": Mixer(
        _dual,
        "last",
        "2204.03645",
        remark="windows and channels in turn",
    ),
    "hilo": Mixer(
        lambda at: (
            layers.HiLoAttention,
            {"num_heads": at.num_heads, "window_size": 1 if at.last_stage else 2, "qkv_bias": True},
        ),
        "last",
        "2205.13213",
        remark="no windows in the last stage",
    ),
    "lka": Mixer(lambda at: (layers.VanAttention, {}), "map", "2202.09741", remark="convolutional"),
    "focal": Mixer(
        lambda at: (layers.FocalModulation, {"focal_window": 3, "focal_level": 2}),
        "last",
        "2203.11926",
        remark="kernels 3 and 5",
    ),
    "gnconv": Mixer(
        lambda at: (layers.RecursiveGatedConv, {"order": 4}),
        "map",
        "2207.14284",
        remark="order 4",
    ),
    "atconv": Mixer(
        lambda at: (layers.AttentiveConv2d, {}),
        "map",
        "2510.20092",
        remark="pools the raster order",
    ),
    "gpsa": Mixer(
        _heads(layers.GatedPositionalSelfAttention),
        "tokens",
        "2103.10697",
        everywhere=False,
        start=_reset,
        init="locality",
        remark="all layers are gated",
    ),
    "soft_causal": Mixer(
        _heads(SoftCausalAttention, qkv_bias=True),
        "tokens",
        "2404.06773",
        everywhere=False,
        variants={"soft mask in the first epochs": {"soft_mask_epochs": 50}},
        remark="causal in raster order; the mean takes the place of a last token",
    ),
    "pat_ch": Mixer(lambda at: (layers.PartialChannelAttention, {}), "map", PATNET, remark=BATCH_NORM),
    "pat_sf": Mixer(
        _heads(layers.PartialSelfAttention, attn_drop=0.0, proj_drop=0.0, qkv_bias=True),
        "map",
        PATNET,
        everywhere=False,
        remark="with its partial convolution; PAT_sp, which acts inside the MLP, is left out",
    ),
    "agent": Mixer(
        lambda at: (
            layers.AgentAttention,
            {"num_heads": at.num_heads, "map_size": at.grid, "agent_num": 49 if at.window == 7 else 16},
        ),
        "last",
        "2312.08874",
        resize=_resize_axes,
        remark="49 agents, 16 where the map is no multiple of 7; biases of one grid, resized for others",
    ),
    "moh": Mixer(
        _routed,
        "tokens",
        "2410.11842",
        call=_call_balanced,
        final="loss",
        variants={"with load balance": {"balance": 0.01}},
        remark="three quarters of the heads",
    ),
    "self_guided": Mixer(
        _guided_pair,
        "last",
        "2308.12216",
        everywhere=False,
        call=_call_pair,
        remark="in pairs, of which the first tells the second what is significant",
    ),
    "contmix": Mixer(
        _heads(layers.ContMix2d),
        "map",
        "2502.20087",
        remark=f"without context; {BATCH_NORM}",
    ),
}
"""Mixers by name. PAT_sp of PATNet acts inside the MLP and is left out."""
