"""Attention through a few agents between queries and keys."""

import math

import torch
import torch.nn.functional as F
from timm.layers import to_2tuple, trunc_normal_
from torch import Tensor, nn
from torch.autograd import Function

from .adaptive_pool import adaptive_pool, pool_shares
from .cache import ParameterCache
from .checks import check_counts
from .depthwise import depthwise
from .direct import in_own_precision, is_direct, replayed, replays
from .heads import check_heads, split_heads
from .pointwise import Pointwise
from .precision import without_autocast
from .size_constant import size_constant
from .symbolic import Size, fixed, for_batch, is_exporting, is_symbolic

SIDE = 7
"""Of the tables of biases that are interpolated to the map, whatever its size."""
FEW_AGENTS = 9
"""Agents up to which products of their own are faster than fused attention without gradients, too."""
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
        tables = (getattr(self, f"{name}_bias") for name in ("an", "na", "ah", "ha", "aw", "wa", "ac", "ca"))
        return [table for table in tables if table is not None]

    def reset_parameters(self) -> None:
        for table in self.tables:
            trunc_normal_(table, std=0.02)

    def forward(self, x: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        return self.proj(_agent_attention(self, self.qkv(x), grid))

    def biases(self, height: Size, width: Size) -> tuple[Tensor, Tensor]:
        """P and R, (heads, n, N) each, what is added to the logits of agents and keys, and of agents and queries, on a
        map of that size; the class token first if there is one."""
        size = height, width
        with without_autocast(self.an_bias):
            to_keys = self._on_map(self.an_bias, self.ah_bias, self.aw_bias, self.ac_bias, size)
            return to_keys, self._on_map(self.na_bias, self.ha_bias, self.wa_bias, self.ca_bias, size)

    def _on_map(self, table: Tensor, rows: Tensor, cols: Tensor, token: Tensor | None, size: tuple) -> Tensor:
        """A table (heads, n, 7, 7), those of rows (heads, n, H0), of columns (heads, n, W0) and of the class token
        (heads, n, 1), as one (heads, agents, N)."""
        dtype = torch.promote_types(table.dtype, torch.float32)
        # Infinity times 0, which weights of products may be, is no number.
        table, rows, cols = (x.to(dtype).clamp(min=torch.finfo(dtype).min / 4) for x in (table, rows, cols))
        rows, cols = _resized(rows, size[0]), _resized(cols, size[1])
        if not is_symbolic(*size) and size == (SIDE, SIDE):
            bias = table + rows[..., None] + cols[:, :, None]
        else:  # rows of the table resized, those of rows, and 1, times columns to resize it by, 1, and those of columns
            to_rows, to_cols = (_line(SIDE, length, table.device, dtype) for length in size)
            ones = to_rows.new_ones(()).expand(*rows.shape, 1)
            left = torch.cat([to_rows.mT @ table, rows[..., None], ones], -1)
            right = torch.cat([to_cols, torch.ones_like(to_cols[:1])]).expand(*cols.shape[:2], -1, -1)
            bias = left @ torch.cat([right, cols[:, :, None]], 2)
        bias = bias.flatten(2) if token is None else torch.cat([token.to(dtype), bias.flatten(2)], 2)
        built = (math.isqrt(self.agent_num),) * 2
        if self.agent_shape == built:
            return bias
        return F.interpolate(bias.mT.unflatten(2, built), self.agent_shape, mode="bilinear").flatten(2).mT

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, map_size={self.map_size}, agent_shape={self.agent_shape}"


def _resized(table: Tensor, length: Size) -> Tensor:
    """(heads, n, L) to (heads, n, length), linearly, with half-pixel centres."""
    old = table.shape[-1]
    same = not is_symbolic(length) and old == length
    return table if same else table @ _line(old, length, table.device, table.dtype)


@size_constant
def _line(old: int, length: Size, device: torch.device, dtype: torch.dtype) -> Tensor:
    """(old, length) weights by which an axis is interpolated linearly."""
    place, source = (torch.arange(n, device=device, dtype=dtype) for n in (old, length))
    source = ((source + 0.5) * old / length - 0.5).clamp(0, old - 1)
    return (1 - (source - place[:, None]).abs()).clamp(min=0)


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
    heads, first = layer.num_heads, int(layer.class_token)
    if qkv.ndim == 4:
        H, W = fixed(*qkv.shape[1:3])
    else:
        H, W = grid or (math.isqrt(qkv.shape[1] - first),) * 2
    shape = tuple(layer.agent_shape)
    direct = (
        is_direct(qkv, *layer.tables)
        and (torch.is_grad_enabled() or math.prod(shape) <= FEW_AGENTS)
        and qkv.numel() > 0
    )

    def biases() -> list[Tensor]:
        to_keys, to_agents = (bias.to(qkv.dtype) for bias in layer.biases(H, W))
        return [to_keys, to_agents if direct else to_agents.mT.contiguous()]

    biases = layer._cache((H, W, shape, qkv.dtype, direct), layer.tables, biases)
    attend = AgentProducts.apply if direct else _plain
    out, values = attend(qkv.flatten(1, -2), *biases, (H, W), shape, heads, first)
    local = layer.dwc(values.permute(0, 3, 1, 2)).flatten(2).mT  # (B, N, C)
    out = out + (F.pad(local, (0, 0, first, 0)) if first else local)
    return out.unflatten(1, (H, W)) if qkv.ndim == 4 else out


def _plain(
    tokens: Tensor, to_keys: Tensor, to_agents: Tensor, grid: tuple, shape: tuple[int, int], heads: int, first: int
) -> tuple[Tensor, Tensor]:
    """(B, N, 3C) projections, those of `first` class tokens first, and biases (heads, n, N) and (heads, N, n), to the
    output (B, N, C) and the map of the values (B, H, W, C)."""
    patches = tokens[:, first:].unflatten(1, grid).chunk(3, -1)
    q, k, v = split_heads(tokens, heads)
    (agents,) = split_heads(pooled(patches[0], shape), heads, 1)
    collected = F.scaled_dot_product_attention(agents, k, v, attn_mask=for_batch(to_keys[None], agents))
    out = F.scaled_dot_product_attention(q, agents, collected, attn_mask=for_batch(to_agents[None], q))
    out = out.transpose(1, 2)
    if is_exporting():  # other formats have no fused attention, whose layout this is
        out = out.clone(memory_format=torch.contiguous_format)
    return out.flatten(2), patches[2]


class AgentProducts(Function):
    """`_plain`, of biases (heads, n, N) both, by products that start from the biases and write results where they
    belong. It keeps the weights, as fused attention on CPUs does where a bias is trained."""

    @staticmethod
    def forward(
        ctx,
        tokens: Tensor,
        to_keys: Tensor,
        to_agents: Tensor,
        grid: tuple[int, int],
        shape: tuple[int, int],
        heads: int,
        first: int,
    ) -> tuple[Tensor, Tensor]:
        (B, N, C), given, tokens = tokens.shape, tokens, tokens.contiguous()
        C //= 3
        scale = (C // heads) ** -0.5
        shares = _shares(grid, shape, tokens.device, tokens.dtype)
        agents = torch.bmm(shares.expand(B, -1, -1), tokens[:, first:, :C])
        (q, k, v), (a,) = split_heads(tokens, heads), split_heads(agents, heads, 1)
        asked, seen = (bias.expand(B, -1, -1, -1).clone() for bias in (to_agents, to_keys))
        for i in range(B):
            asked[i].baddbmm_(a[i], q[i].mT, alpha=scale)
            seen[i].baddbmm_(a[i], k[i].mT, alpha=scale)
        torch._softmax(asked, 2, False, out=asked)
        torch._softmax(seen, 3, False, out=seen)
        collected, out = torch.empty_like(a), tokens.new_empty(B, N, C)
        (by_head,) = split_heads(out, heads, 1)
        for i in range(B):
            torch.bmm(seen[i], v[i], out=collected[i])
            torch.bmm(asked[i].mT, collected[i], out=by_head[i])
        ctx.save_for_backward(given, to_keys, to_agents, shares, agents, asked, seen, collected)
        ctx.args, ctx.scale = (grid, shape, heads, first), scale
        return out, tokens[:, first:, 2 * C :].contiguous().unflatten(1, grid)

    @staticmethod
    @in_own_precision
    def backward(ctx, grad: Tensor, dvalues: Tensor) -> tuple[Tensor | None, ...]:
        tokens, to_keys, to_agents, shares, agents, asked, seen, collected = ctx.saved_tensors
        if replays(grad):

            def compute(tokens: Tensor, to_keys: Tensor, to_agents: Tensor) -> tuple[Tensor, Tensor]:
                return _plain(tokens, to_keys, to_agents.mT, *ctx.args)

            inputs, wanted = [tokens, to_keys, to_agents], ctx.needs_input_grad[:3]
            return *replayed(compute, inputs, wanted, (grad, dvalues)), None, None, None, None
        (*_, heads, first), scale, C, tokens = ctx.args, ctx.scale, agents.shape[2], tokens.contiguous()
        dtokens, dagents = torch.empty_like(tokens), torch.empty_like(agents)
        dtokens[:, :first, 2 * C :] = 0
        dtokens[:, first:, 2 * C :] = dvalues.flatten(1, 2)
        (q, k, v), (dq, dk, dv) = split_heads(tokens, heads), split_heads(dtokens, heads)
        (a,), (da,), (grad,) = (split_heads(x, heads, 1) for x in (agents, dagents, grad.contiguous()))
        dasked, dseen, dcollected = torch.empty_like(asked), torch.empty_like(seen), torch.empty_like(collected[0])
        for i in range(len(tokens)):
            torch.bmm(asked[i], grad[i], out=dcollected)
            torch.bmm(collected[i], grad[i].mT, out=dasked[i])
            torch.bmm(dcollected, v[i].mT, out=dseen[i])
            dv[i].baddbmm_(seen[i].mT, dcollected)
        torch._softmax_backward_data(dasked, asked, 2, asked.dtype, grad_input=dasked)
        torch._softmax_backward_data(dseen, seen, 3, seen.dtype, grad_input=dseen)
        for i in range(len(tokens)):
            torch.baddbmm(dq[i], dasked[i].mT, a[i], beta=0, alpha=scale, out=dq[i])
            torch.baddbmm(dk[i], dseen[i].mT, a[i], beta=0, alpha=scale, out=dk[i])
            torch.baddbmm(da[i], dasked[i], q[i], beta=0, alpha=scale, out=da[i])
            da[i].baddbmm_(dseen[i], k[i], alpha=scale)
        dtokens[:, first:, :C].baddbmm_(shares.mT.expand(len(tokens), -1, -1), dagents)
        return dtokens, dseen.sum(0), dasked.sum(0), None, None, None, None


@size_constant
def _shares(grid: tuple[int, int], shape: tuple[int, int], device: torch.device, dtype: torch.dtype) -> Tensor:
    """(n, N) weights of the means that `pooled` takes."""
    rows, cols = (pool_shares(old, new, device, dtype) for old, new in zip(grid, shape, strict=True))
    return torch.kron(rows, cols)
