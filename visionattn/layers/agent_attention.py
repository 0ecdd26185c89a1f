"""Attention through a few agents between queries and keys."""

import math

import torch
import torch.nn.functional as F
from timm.layers import to_2tuple, trunc_normal_
from torch import Tensor, nn

from .adaptive_pool import adaptive_pool
from .cache import ParameterCache
from .checks import check_counts
from .depthwise import depthwise
from .heads import check_heads, split_heads
from .pointwise import Pointwise
from .symbolic import Size, fixed, for_batch, is_exporting, is_symbolic

SIDE = 7
"""Of the tables of biases that are interpolated to the map, whatever its size."""
AXES = ("ah_bias", "aw_bias", "ha_bias", "wa_bias")
"""Tables with an axis of the map, their last one."""


class AgentAttention(nn.Module):
    """Attention in two steps: agents collect values from all keys, queries attend to the agents.

    "Agent Attention: On the Integration of Softmax and Linear Attention", arXiv 2312.08874. The agents A are the
    queries, average-pooled to a small grid:

        V_A = softmax(scale A K^T + P) V,    out = softmax(scale Q A^T + R) V_A + DWC(V)

    with learned biases P and R of agent and place, and a depthwise 3 x 3 convolution of the values. The biases are made
    for one size of the map and are interpolated for others. A class token, if there is one, comes first; it takes part
    as a query and as a key, but not in the pooling and the convolution.

    Cost: 4 N C^2 + 4 N n C + 9 N C multiply-adds for N positions, C channels and n agents.

    Args:
        dim: channels C.
        num_heads: attention heads; must divide `dim`.
        map_size: (height, width) of the map that the biases are made for.
        agent_num: agents n, a square number.
        qkv_bias: bias of the query, key and value projections.
        class_token: the input is a sequence of a class token and patches.
        proj: project the output.
        agent_shape: grid to which the queries are pooled, in place of that of the `agent_num` agents that the biases
            are made for; the biases are interpolated.

    Raises:
        ValueError: if `num_heads` does not divide `dim` or `agent_num` is no square number.

    Shape:
        (B, H, W, C) to (B, H, W, C), any H and W; or (B, N, C), with the class token first if there is one, and the
        grid (H, W) of the patches, square by default, to (B, N, C).

    Example:
        >>> import torch
        >>> AgentAttention(64, num_heads=2, map_size=(28, 28), agent_num=16)(torch.randn(1, 30, 41, 64)).shape
        torch.Size([1, 30, 41, 64])
    """

    last_product = "proj"

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        map_size: int | tuple[int, int] = (14, 14),
        agent_num: int = 49,
        qkv_bias: bool = True,
        class_token: bool = False,
        proj: bool = True,
        agent_shape: tuple[int, int] | None = None,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        check_heads(dim, num_heads)
        check_counts(agent_num=agent_num)
        if math.isqrt(agent_num) ** 2 != agent_num:
            raise ValueError(f"expected a square number as agent_num, got {agent_num}")
        dd = {"device": device, "dtype": dtype}
        self.num_heads = num_heads
        self.map_size = to_2tuple(map_size)
        for side in self.map_size:
            check_counts(map_size=side)
        self.agent_num = agent_num
        self.class_token = class_token
        self.agent_shape = tuple(agent_shape or (math.isqrt(agent_num),) * 2)
        self.qkv = Pointwise(dim, 3 * dim, bias=qkv_bias, **dd)
        self.dwc = depthwise(dim, 3, **dd)
        self.proj = Pointwise(dim, dim, **dd) if proj else nn.Identity()
        (H, W), h, n = self.map_size, num_heads, agent_num
        shapes = dict.fromkeys(("an", "na"), (h, n, SIDE, SIDE))
        shapes |= dict.fromkeys(("ah", "ha"), (h, n, H)) | dict.fromkeys(("aw", "wa"), (h, n, W))
        shapes |= dict.fromkeys(("ac", "ca"), (h, n, 1) if class_token else None)
        for name, shape in shapes.items():
            self.register_parameter(f"{name}_bias", None if shape is None else nn.Parameter(torch.empty(shape, **dd)))
        self._cache = ParameterCache()
        self.reset_parameters()

    @property
    def tables(self) -> list[nn.Parameter]:
        """Of the biases."""
        return [p for name, p in self.named_parameters(recurse=False)]

    def reset_parameters(self) -> None:
        for table in self.tables:
            trunc_normal_(table, std=0.02)

    def forward(self, x: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        return self.proj(_agent_attention(self, self.qkv(x), grid))

    def biases(self, height: Size, width: Size) -> tuple[Tensor, Tensor]:
        """P (heads, n, N), what is added to the logits of the agents, and R (heads, N, n), of the queries, on a map of
        that size; the class token first if there is one."""
        size = height, width
        to_keys = self._on_map(self.an_bias, self.ah_bias, self.aw_bias, self.ac_bias, size)
        to_agents = self._on_map(self.na_bias, self.ha_bias, self.wa_bias, self.ca_bias, size)
        return to_keys, to_agents.mT.contiguous()

    def _on_map(self, table: Tensor, rows: Tensor, cols: Tensor, token: Tensor | None, size: tuple) -> Tensor:
        """A table (heads, n, 7, 7), those of rows (heads, n, H0), of columns (heads, n, W0) and of the class token
        (heads, n, 1), as one (heads, agents, N)."""
        dtype = torch.promote_types(table.dtype, torch.float32)
        bias = _resized(_resized(table.to(dtype), size[1]).mT, size[0]).mT
        bias = bias + _resized(rows.to(dtype), size[0])[..., None] + _resized(cols.to(dtype), size[1])[:, :, None]
        bias = bias.flatten(2) if token is None else torch.cat([token.to(dtype), bias.flatten(2)], 2)
        built = (math.isqrt(self.agent_num),) * 2
        if self.agent_shape == built:
            return bias
        return F.interpolate(bias.mT.unflatten(2, built), self.agent_shape, mode="bilinear").flatten(2).mT

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, map_size={self.map_size}, agent_shape={self.agent_shape}"


def _resized(table: Tensor, length: Size) -> Tensor:
    """(heads, n, ..., L) to (heads, n, ..., length), linearly, with half-pixel centres."""
    old = table.shape[-1]
    if is_symbolic(length):  # an interpolation that ONNX has no open size for
        source = ((torch.arange(length, device=table.device) + 0.5) * old / length - 0.5).clamp(0, old - 1)
        weights = 1 - (source - torch.arange(old, device=table.device)[:, None]).abs()
        return table @ weights.clamp(min=0).to(table.dtype)
    if old == length:
        return table
    return F.interpolate(table.flatten(0, -2)[None], length, mode="linear")[0].unflatten(0, table.shape[:-1])


def resize_axis_tables(state_dict: dict[str, Tensor], own: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tables of rows and columns of a state dict for maps of another size, resized linearly.

    Args:
        state_dict: of any model.
        own: state dict of the model that they shall fit.
    """
    keys = [key for key in own if key.endswith(AXES) and key in state_dict and state_dict[key].ndim == 3]
    return state_dict | {key: _resized(state_dict[key], own[key].shape[2]) for key in keys}


def pooled(x: Tensor, shape: tuple[int, int]) -> Tensor:
    """Adaptive average pooling of a map (B, H, W, C), to (B, n, C) in row-major order.

    Args:
        x: map.
        shape: (height, width) of what it is pooled to.
    """
    return adaptive_pool(x.permute(0, 3, 1, 2), shape).flatten(2).mT


@torch.fx.wrap
def _agent_attention(layer: AgentAttention, qkv: Tensor, grid: tuple[int, int] | None) -> Tensor:
    """(B, H, W, 3C) or (B, N, 3C) projections to (B, H, W, C) or (B, N, C)."""
    heads, C, first = layer.num_heads, qkv.shape[-1] // 3, int(layer.class_token)
    if qkv.ndim == 4:
        H, W = fixed(*qkv.shape[1:3])
    else:
        H, W = grid or (math.isqrt(qkv.shape[1] - first),) * 2
    tokens = qkv.flatten(1, -2)
    patches = tokens[:, first:].unflatten(1, (H, W))
    q, k, v = split_heads(tokens, heads)
    (agents,) = split_heads(pooled(patches[..., :C], layer.agent_shape), heads, 1)

    def biases() -> list[Tensor]:
        return [bias.to(qkv.dtype)[None] for bias in layer.biases(H, W)]

    to_keys, to_agents = layer._cache((H, W, layer.agent_shape, qkv.dtype), layer.tables, biases)
    collected = F.scaled_dot_product_attention(agents, k, v, attn_mask=for_batch(to_keys, agents))
    out = F.scaled_dot_product_attention(q, agents, collected, attn_mask=for_batch(to_agents, q))
    local = layer.dwc(patches[..., 2 * C :].permute(0, 3, 1, 2)).flatten(2).mT  # (B, N, C)
    out = out.transpose(1, 2)
    if is_exporting():  # other formats have no fused attention, whose layout this is
        out = out.clone(memory_format=torch.contiguous_format)
    out = out.flatten(2) + (F.pad(local, (0, 0, first, 0)) if first else local)
    return out.unflatten(1, (H, W)) if qkv.ndim == 4 else out
