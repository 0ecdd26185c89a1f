"""Self-attention of a sequence with rotary positions and a soft causal mask."""

from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from .direct import in_own_precision, is_direct, replayed, replays
from .self_attention import SelfAttention
from .size_constant import size_constant
from .symbolic import Size, for_batch


@size_constant
def rotary_table(length: Size, head_dim: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosine and sine (N, d / 2) of the angles p * 10000^(-2t / d) for positions p and channel pairs t.

    Args:
        length: positions N.
        head_dim: channels d of a head.
        device: of the tables.
        dtype: of the tables.
    """
    frequency = 10000.0 ** -(torch.arange(0, head_dim, 2, device=device, dtype=dtype) / head_dim)
    angles = torch.arange(length, device=device, dtype=dtype)[:, None] * frequency
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Channels (2t, 2t + 1) of (..., N, d), as pairs, rotated by the angles of a rotary table; in float32 at least."""
    # timm's apply_rot_embed has the same bits, but wants each angle twice and takes 1.4 times as long.
    a, b = x.to(torch.promote_types(x.dtype, torch.float32)).unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2).to(x.dtype)


@size_constant
def causal_halves(length: Size, device: torch.device) -> Tensor:
    """Mask (N, 2N) of queries against keys that are there twice: up to the query, and after it."""
    causal = torch.ones(length, length, dtype=torch.bool, device=device).tril()
    return torch.cat([causal, ~causal], 1)


class CausalSelfAttention(SelfAttention):
    """Self-attention with rotary positions whose weights, after the softmax, are scaled down for later tokens.

    "Adapting LLaMA Decoder to Vision Transformer", arXiv 2404.06773. Query i weighs all keys by a softmax; the weights
    of keys after i are then multiplied by `soft_mask_rate`: 1 is bidirectional attention, 0 causal. Nothing is
    renormalised, so that this differs from attention with later keys left out. On a CPU and up to 1024 tokens this is
    computed as it is defined; elsewhere every key is there twice, as itself up to the query and after it with its value
    scaled, which is one fused attention.

    Cost: 4 N C^2 + 4 N^2 C multiply-adds for N tokens and C channels; 4 N C^2 + 2 N^2 C by definition.

    Args:
        dim: channels C.
        num_heads: attention heads; must divide `dim` into even parts.
        qkv_bias: bias of the query, key and value projections.
        qk_scale: factor of the logits, (dim / num_heads)**-0.5 if None.
        attn_drop: dropout rate of the attention weights.
        proj_drop: dropout rate of the output.

    Raises:
        ValueError: if `num_heads` does not divide `dim`, or a head has an odd number of channels.

    Shape:
        (B, N, C) to (B, N, C). Optional further inputs are what layers can share: `rotary`, angles (N, d / 2) or their
        cosine and sine, by default those of positions 0 to N - 1; `soft_mask_rate`, by default 0; `mask`, what
        `causal_halves(N)` returns.

    Example:
        >>> import torch
        >>> CausalSelfAttention(64, num_heads=4)(torch.randn(1, 15, 64), soft_mask_rate=0.5).shape
        torch.Size([1, 15, 64])
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        qkv_bias: bool = False,
        qk_scale: float | None = None,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__(dim, num_heads, qkv_bias, qk_scale, attn_drop, proj_drop, device=device, dtype=dtype)
        if dim // num_heads % 2:
            raise ValueError(f"expected an even number of channels per head, got {dim} / {num_heads}")

    def forward(
        self,
        x: Tensor,
        rotary: Tensor | tuple[Tensor, Tensor] | None = None,
        soft_mask_rate: float | Tensor = 0.0,
        mask: Tensor | None = None,
    ) -> Tensor:
        qkv = self.qkv(x).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        return self.merge(_causal_attention(self, qkv, rotary, soft_mask_rate, mask))

    def last(self, x: Tensor) -> Tensor:
        """What the last token gets, (B, N, C) to (B, 1, C): no key comes after it, so that no mask does anything."""
        weight, bias, (N, C) = self.qkv.weight, self.qkv.bias, x.shape[1:]
        q = F.linear(x[:, -1:], weight[:C], None if bias is None else bias[:C])
        kv = F.linear(x, weight[C:], None if bias is None else bias[C:])
        cos, sin = rotary_table(N, C // self.num_heads, x.device, torch.promote_types(x.dtype, torch.float32))
        q = rotate(q.unflatten(2, (self.num_heads, -1)).transpose(1, 2), cos[-1:], sin[-1:])
        k, v = kv.unflatten(2, (2, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        weights = (q * self.scale @ rotate(k, cos, sin).mT).softmax(-1)
        return self.merge(F.dropout(weights, self.dropout) @ v)


MAX_LENGTH = 1024
"""Tokens up to which attention on a CPU follows its definition: with more, its weights take too much memory."""
PAIRS = 2**18
"""Attention weights that are computed at once there: some copies of them stay in the second cache."""


class _Rotation(Function):
    """Queries, keys and values, the first two rotated by complex factors (N, 2, 1, d / 2), from what a projection
    writes, (B, N, 3, heads, d), to (3, B, heads, N, d)."""

    @staticmethod
    def forward(ctx, packed: Tensor, turn: Tensor) -> Tensor:
        ctx.turn, ctx.shape = turn, packed.shape
        B, N, _, heads, d = packed.shape
        out = packed.new_empty(3, B, heads, N, d)
        _rotate(packed, turn, out.permute(1, 3, 0, 2, 4))
        return out

    @staticmethod
    @in_own_precision
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        if replays(grad):
            like = {"dtype": grad.dtype, "device": grad.device}
            anything = torch.zeros(ctx.shape, **like, requires_grad=True)  # linear, it is the same everywhere
            return *replayed(partial(_plainly_rotated, turn=ctx.turn), [anything], [True], grad), None
        out = grad.new_empty(ctx.shape)
        _rotate(grad.permute(1, 3, 0, 2, 4), ctx.turn.conj(), out)
        return out, None


def _plainly_rotated(packed: Tensor, turn: Tensor) -> Tensor:
    a, b = packed[:, :, :2, :, ::2], packed[:, :, :2, :, 1::2]
    pairs = torch.stack([a * turn.real - b * turn.imag, a * turn.imag + b * turn.real], -1)
    rotated = torch.cat([pairs.reshape(*packed.shape[:2], 2, *packed.shape[3:]), packed[:, :, 2:]], 2)
    return rotated.permute(2, 0, 3, 1, 4)


def _rotate(x: Tensor, turn: Tensor, out: Tensor) -> None:
    """From (B, N, 3, heads, d) to the same, or to (B, N, 2, heads, d) without the values."""
    pairs, out_pairs = (torch.view_as_complex(each.unflatten(-1, (-1, 2)))[:, :, :2] for each in (x, out))
    torch.mul(pairs, turn, out=out_pairs)
    out[:, :, 2:] = x[:, :, 2 : out.shape[2]]


class _Attention(Function):
    """`_attend` that keeps its input and the weights, where the plain form keeps each four times."""

    @staticmethod
    def forward(ctx, qkv: Tensor, mask: Tensor) -> Tensor:
        weights = qkv.new_empty(*qkv.shape[1:4], qkv.shape[3])
        ctx.save_for_backward(qkv, mask, weights)
        return _attend(*qkv, mask, torch.empty_like(qkv[0]), weights)

    @staticmethod
    @in_own_precision
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        qkv, mask, weights = ctx.saved_tensors
        if replays(grad):
            return *replayed(partial(_plain, mask=mask), [qkv], [True], grad), None
        out = torch.empty_like(qkv)
        for (q, k, v), p, g, (dq, dk, dv) in _pieces(qkv, weights, grad, out):
            dp = torch.bmm(g, v.mT).mul_(mask)
            torch._softmax_backward_data(dp, p, -1, p.dtype, grad_input=dp)
            torch.bmm(dp, k, out=dq)
            torch.bmm(dp.mT, q, out=dk)
            torch.bmm(torch.mul(p, mask, out=dp).mT, g, out=dv)
        return out, None


def _plain(qkv: Tensor, mask: Tensor) -> Tensor:
    q, k, v = qkv
    return (q @ k.mT).softmax(-1) * mask @ v


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, out: Tensor, weights: Tensor | None = None) -> Tensor:
    """softmax(q k^T) masked, times v: attention by its definition, some heads after the other, outside autograd.

    Args:
        q, k, v: queries, keys and values (B, heads, N, d).
        mask: factors on the weights (N, N).
        out: gets the result (B, heads, N, d).
        weights: gets the weights (B, heads, N, N) before the mask.
    """
    if weights is None:
        for q_i, k_i, v_i, y in _pieces(q, k, v, out):
            p = torch.bmm(q_i, k_i.mT)
            torch.bmm(torch.softmax(p, -1, out=p).mul_(mask), v_i, out=y)
    else:
        for q_i, k_i, v_i, p, y in _pieces(q, k, v, weights, out):
            torch.softmax(torch.bmm(q_i, k_i.mT, out=p), -1, out=p)
            torch.bmm(p * mask, v_i, out=y)
    return out


def _pieces(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Some heads of all images at a time, of (B, heads, N, ...) and (3, B, heads, N, d), contiguous or of one image."""
    N = tensors[0].shape[-2]
    step = max(1, PAIRS // max(1, N**2))
    return zip(*(x.flatten(-4, -3).split(step, -3) for x in tensors), strict=True)


@size_constant
def _turns(length: Size, head_dim: int, scale: float, device: torch.device, dtype: torch.dtype) -> Tensor:
    return _turns_of(*rotary_table(length, head_dim, device, dtype), scale)


def _turns_of(cos: Tensor, sin: Tensor, scale: float) -> Tensor:
    """Complex factors (N, 2, 1, d / 2) of queries, those of logits included, and keys."""
    turn = torch.complex(cos, sin)[:, None, None]
    return torch.cat([turn * scale, turn], 1)


@size_constant
def _causal_factors(length: Size, device: torch.device, dtype: torch.dtype) -> Tensor:
    return torch.ones(length, length, device=device, dtype=dtype).tril()


def _direct_attention(
    attention: CausalSelfAttention, qkv: Tensor, rotary: Tensor | tuple[Tensor, Tensor] | None, rate: float
) -> Tensor:
    """`_causal_attention` by its definition."""
    constants = qkv.device, qkv.dtype
    if rotary is None:
        turn = _turns(*qkv.shape[3:], attention.scale, *constants)
    else:
        turn = _turns_of(*((rotary.cos(), rotary.sin()) if isinstance(rotary, Tensor) else rotary), attention.scale)
    mask = _causal_factors(qkv.shape[3], *constants)
    if rate:
        mask = mask * (1 - rate) + rate
    packed = qkv.permute(1, 3, 0, 2, 4)
    if torch.is_grad_enabled():
        return _Attention.apply(_Rotation.apply(packed, turn), mask)
    _, B, heads, N, d = qkv.shape
    if B > 1:
        rotated = _Rotation.apply(packed, turn)
        return _attend(*rotated, mask, torch.empty_like(rotated[0]))
    rotated = qkv.new_empty(2, B, heads, N, d)  # the heads of one image's values need not be put together
    _rotate(packed, turn, rotated.permute(1, 3, 0, 2, 4))
    return _attend(*rotated, qkv[2], mask, qkv.new_empty(B, N, heads, d).transpose(1, 2))


@torch.fx.wrap
def _causal_attention(
    attention: CausalSelfAttention,
    qkv: Tensor,
    rotary: Tensor | tuple[Tensor, Tensor] | None,
    soft_mask_rate: float | Tensor,
    mask: Tensor | None,
) -> Tensor:
    """(3, B, heads, N, d) queries, keys and values to (B, heads, N, d)."""
    length, head_dim = qkv.shape[3:]
    if is_direct(qkv) and length <= MAX_LENGTH and not attention.dropout and not isinstance(soft_mask_rate, Tensor):
        given = () if rotary is None else (rotary,) if isinstance(rotary, Tensor) else rotary
        if is_direct(*given) and not any(t.requires_grad or t.dtype != qkv.dtype for t in given):
            return _direct_attention(attention, qkv, rotary, soft_mask_rate)
    if rotary is None:
        rotary = rotary_table(length, head_dim, qkv.device, torch.promote_types(qkv.dtype, torch.float32))
    cos, sin = (rotary.cos(), rotary.sin()) if isinstance(rotary, Tensor) else rotary
    if mask is None:
        mask = causal_halves(length, qkv.device)
    (q, k), v = rotate(qkv[:2], cos, sin), qkv[2]
    k, v = torch.cat([k, k], 2), torch.cat([v, soft_mask_rate * v], 2)
    return F.scaled_dot_product_attention(q, k, v, for_batch(mask, q), attention.dropout, scale=attention.scale)
