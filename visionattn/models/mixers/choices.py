"""What a mixer is at a place, what it is called with and handed, and how its tables are resized."""

from collections.abc import Callable
from functools import wraps
from typing import Any

from torch import Tensor, nn

from ... import layers
from ...layers.agent_attention import resize_axis_tables
from ...layers.mixer_gate import resize_token_mlps
from ...layers.reduced_attention import resize_token_mixing
from ...layers.self_guided_attention import GlobalEnhancedAttention
from .blocks import BalancedHeads, PluggedIn
from .entry import Place


def heads(layer: Callable[..., nn.Module], **kwargs: Any) -> Callable[[Place], tuple]:
    """A class that takes the heads of the place, and these arguments."""
    return lambda at: (layer, {"num_heads": at.num_heads, **kwargs})


def doubled(layer: type[nn.Module], *widths: str) -> Callable[..., nn.Module]:
    """A class of whose arguments these widths are twice the channels unless they are given."""

    @wraps(layer, updated=())
    def made(dim: int, **kwargs: Any) -> nn.Module:
        return layer(dim, **dict.fromkeys(widths, 2 * dim) | kwargs)

    return made


def gate(host: str, gate: Callable[..., nn.Module], **kwargs: Any) -> Callable[[Place], tuple]:
    """A gate after a host, with these arguments of the gate."""
    return lambda at: (PluggedIn, {"host": host, "gate": gate, "num_heads": at.num_heads, **kwargs})


def softmax_at_ends(layer: Callable[..., nn.Module]) -> Callable[[Place], tuple]:
    """A class that leaves the first and the last block of a network to softmax attention."""
    return lambda at: (layers.SelfAttention if at.outermost else layer, {"num_heads": at.num_heads, "qkv_bias": True})


def neighborhood(at: Place) -> tuple:
    """Neighbourhoods of 7 x 7, or 3 x 3 on small maps, every other one dilated where that fits."""
    kernel = 7 if at.native >= 7 else 3
    dilation = 2 if at.index % 2 and 2 * kernel <= at.native else 1
    return layers.NeighborhoodAttention2d, {
        "num_heads": at.num_heads, "kernel_size": kernel, "dilation": dilation
    }  # fmt: skip


def dual(at: Place) -> tuple:
    """DaViT's windows and channels in turn."""
    if at.index % 2:
        return layers.ChannelAttention, {"num_heads": at.num_heads}
    return layers.WindowAttention2d, {"num_heads": at.num_heads, "window_size": at.window}


def guided_pair(at: Place) -> tuple:
    """SG-Former's two kinds in turn; a stage of one block has what its last stage has."""
    if at.depth == 1:  # as in the last stage of SG-Former
        return GlobalEnhancedAttention, {"num_heads": at.num_heads}
    if at.depth % 2:
        raise ValueError(f"a pair of blocks cannot fill a stage of {at.depth}")
    if at.index % 2:
        return layers.SelfGuidedAttention, {"num_heads": at.num_heads, "sections": ((1 / 2, 2), (1 / 2, 1))}
    return layers.HybridScaleAttention, {
        "num_heads": at.num_heads, "sr_ratio": 1 if at.last_stage else 2, "window_size": at.window
    }  # fmt: skip


def call_pair(layer: nn.Module, x: Tensor, grid: tuple[int, int], state: Tensor | None) -> tuple:
    """The first of a pair hands the significance on to the second, and that nothing."""
    if isinstance(layer, layers.HybridScaleAttention):
        found = layer(x)
        return found[0], found[1]
    return (layer(x) if state is None else layer(x, state)), None


def call_reversed(layer: nn.Module, x: Tensor, grid: tuple[int, int], state: Tensor | None) -> tuple:
    """The message (B, N) goes on from block to block."""
    found = layer(x, state)
    return found[0], found[1]


def call_balanced(layer: BalancedHeads, x: Tensor, grid: tuple[int, int], state: Tensor | None) -> tuple:
    """In training the load-balance losses are summed up from block to block."""
    y = layer(x, grid)
    if not (layer.training and layer.balance and layer.router.top_k):
        return y, state
    loss = layer.balance * layer.router.aux_loss(x)
    return y, loss if state is None else state + loss


def routed(at: Place) -> tuple:
    """A third of the heads is always on, and of the others as many as make three quarters."""
    shared = 0 if at.num_heads == 1 else max(1, at.num_heads // 3)
    kept = max(1, 3 * at.num_heads // 4 - shared)
    return BalancedHeads, {"num_heads": at.num_heads, "shared": shared, "top_k": kept}


def zero_controller(layer: nn.Module) -> None:
    """No message falls silent at first."""
    nn.init.zeros_(layer.message_controller.fc2.weight)


def keep_predictor(given: dict, own: dict, grid: tuple[int, int], find: Callable) -> dict:
    """A predictor of another grid stays as it is drawn, as nothing trains it."""
    fits = all(value.shape == own[key].shape for key, value in given.items())
    return given if fits else given | {key: value for key, value in own.items() if ".predictor." in key}


def resize_axes(given: dict, own: dict, grid: tuple[int, int], find: Callable) -> dict:
    """The tables of agents."""
    return resize_axis_tables(given, own)


def resize_gate(given: dict, own: dict, grid: tuple[int, int], find: Callable) -> dict:
    """The MLP over tokens."""
    old = find(given["token_mlp.fc1.weight"].shape[1]) if "token_mlp.fc1.weight" in given else None
    return given if old in (None, grid) else resize_token_mlps(given, old, grid)


def resize_alignment(given: dict, own: dict, grid: tuple[int, int], find: Callable) -> dict:
    """The matrix over tokens."""
    old = find(len(given["align.weight"])) if "align.weight" in given else None
    if old in (None, grid):
        return given
    return given | {"align.weight": resize_token_mixing(given["align.weight"], old, grid)}


def halo(at: Place) -> tuple:
    """Blocks that fit the map."""
    return layers.HaloAttention2d, {
        "num_heads": at.num_heads, "block_size": 7 if at.window == 7 else 4, "halo_size": 3
    }  # fmt: skip


def gqa(kind: str) -> Callable[[Place], tuple]:
    """Half as many heads of keys and values as of queries; with two or fewer an allocation leaves nothing to choose."""

    def layer(at: Place) -> tuple:
        if at.num_heads % 2 or (kind != "gqa" and at.num_heads < 6):
            raise ValueError(f"expected an even num_heads, of 6 or more if kind is not 'gqa', got {at.num_heads}")
        per_sample = {"per_sample": True} if kind == "kdgqa" else {}
        return layers.KeyDrivenGQA, {"num_heads": at.num_heads, "kind": kind, "qkv_bias": True, **per_sample}

    return layer


def reset(layer: nn.Module) -> None:
    """The layer's own beginning."""
    layer.reset_parameters()
