"""Gates of channels and of positions, each from a pool over the other axis."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .precision import without_autocast

ORDERS = "parallel", "sequential"


class PolarizedSelfAttention(nn.Module):
    """Gates every channel by what a query finds on the map, and every position by how it meets the mean of the map.

    "Polarized Self-Attention: Towards High-quality Pixel-wise Regression", arXiv 2107.00782. With sigma the logistic
    function, softmaxes over the positions n and q_R, v_R, q_L, v_L products over channels, to 1, C / 2, C / 2, C / 2:

        channel gate    sigma(up(v_R sum_n a_n x_n)),    a = softmax(q_R x)
        spatial gate    sigma(softmax(g . v_L x))        in parallel,    g = q_L mean_n x_n
                        sigma(g . softmax(v_L x))        in sequence

    In parallel both are gates of the input, and what they let pass is added; in sequence the second one is of what the
    first one lets pass. The order of softmax and product is that of the published code; the paper has another one. With
    it a spatial gate in parallel is close to 0.5 everywhere, unless the map is tiny. Where a product over channels
    meets a sum over positions, which commute, the sum comes first here.

    Cost: for N = H W positions and C channels 3 N C + 2 C^2 multiply-adds in parallel, 0.5 N C^2 + 2.5 N C + 1.2 C^2 in
    sequence, and elementwise 2 N C; 1.5 N C^2 in the published code.

    Args:
        dim: channels C.
        order: "parallel" or "sequential".

    Raises:
        ValueError: if there is no such order, or fewer channels than are reduced to one: 2, or 8 in sequence.

    Shape:
        (B, C, H, W) to (B, C, H, W), any H and W.

    Example:
        >>> import torch
        >>> PolarizedSelfAttention(64)(torch.randn(1, 64, 30, 41)).shape
        torch.Size([1, 64, 30, 41])
    """

    def __init__(self, dim: int, order: str = "parallel", device=None, dtype=None) -> None:
        super().__init__()
        if order not in ORDERS:
            raise ValueError(f"expected order one of {', '.join(ORDERS)}, got {order!r}")
        if dim < (least := 2 if order == "parallel" else 8):
            raise ValueError(f"expected dim of at least {least} with order {order!r}, got {dim}")
        dd = {"device": device, "dtype": dtype}
        self.order, half, few = order, dim // 2, dim // 2 // 4
        # The published names and shapes: convolutions, of which most are products with a vector here.
        self.conv_q_right = nn.Conv2d(dim, 1, 1, bias=False, **dd)
        self.conv_v_right = nn.Conv2d(dim, half, 1, bias=False, **dd)
        self.conv_q_left = nn.Conv2d(dim, half, 1, bias=False, **dd)
        self.conv_v_left = nn.Conv2d(dim, half, 1, bias=False, **dd)
        if order == "parallel":
            self.conv_up = nn.Conv2d(half, dim, 1, bias=False, **dd)
        else:
            norm = nn.LayerNorm((few, 1, 1), **dd)
            self.conv_up = nn.Sequential(nn.Conv2d(half, few, 1, **dd), norm, nn.ReLU(), nn.Conv2d(few, dim, 1, **dd))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for conv in (self.conv_q_right, self.conv_v_right, self.conv_q_left, self.conv_v_left):
            nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        return _gated(self, x)

    def extra_repr(self) -> str:
        return f"order={self.order!r}"


@torch.fx.wrap
def _gated(layer: PolarizedSelfAttention, x: Tensor) -> Tensor:
    # In float32 at least: half precision does not tell the values around 0.5 of a spatial gate apart.
    with without_autocast(x):
        full = x.to(torch.promote_types(x.dtype, torch.float32))
        y = full * channel_gate(layer, full)
        if layer.order == "parallel":
            # In channels_last memory in half the time of a sum of gates.
            y = torch.addcmul(y, full, spatial_gate(layer, full))
        else:
            y = y * spatial_gate(layer, y)
    return y.to(x.dtype)


def channel_gate(layer: PolarizedSelfAttention, x: Tensor) -> Tensor:
    """(B, C, 1, 1) of a map (B, C, H, W)."""
    weights = _product(layer.conv_q_right, x).flatten(2).softmax(2)
    pooled = (weights @ x.flatten(2).mT)[..., None].transpose(1, 2)  # (B, C, 1, 1)
    y = _product(layer.conv_v_right, pooled)
    if layer.order == "parallel":
        return _product(layer.conv_up, y).sigmoid()
    first, norm, act, last = layer.conv_up
    y = _product(first, y)
    y = F.layer_norm(y, norm.normalized_shape, norm.weight.to(y.dtype), norm.bias.to(y.dtype), norm.eps)
    return _product(last, act(y)).sigmoid()


def spatial_gate(layer: PolarizedSelfAttention, x: Tensor) -> Tensor:
    """(B, 1, H, W) of a map (B, C, H, W)."""
    query = _product(layer.conv_q_left, x.mean((2, 3), keepdim=True)).flatten(1)  # (B, C / 2)
    if layer.order == "parallel":
        query = query @ layer.conv_v_left.weight.flatten(1).to(query.dtype)  # (B, C)
        weights = (query[:, None] @ x.flatten(2)).softmax(2)
    else:
        weights = query[:, None] @ _product(layer.conv_v_left, x).flatten(2).softmax(2)
    return weights.sigmoid().unflatten(2, x.shape[2:])


def _product(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """conv(x) in the precision of x."""
    return F.conv2d(x, conv.weight.to(x.dtype), None if conv.bias is None else conv.bias.to(x.dtype))
