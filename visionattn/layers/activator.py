"""A gated MLP with norms, in place of attention: nothing crosses tokens."""

import torch.nn.functional as F
from torch import Tensor, nn

from .checks import check_counts
from .pointwise import Mlp, Pointwise


class ActivatorGate(nn.Module):
    """W3 (LN(GELU(W1 x)) * LN(W2 x)), with one norm for both factors, after the activation.

    "Activator: GLU Activation Function as the Core Component of a Vision Transformer", arXiv 2405.15953.

    **It mixes nothing**: what a token becomes depends on that token alone. A network of these is a bag of patches that
    meet in the last mean, a control to compare mixers with; for dense prediction it is of no use.

    Cost: 3 N C m multiply-adds for N tokens, C channels and hidden width m.

    Args:
        dim: channels C.
        hidden_dim: hidden width m.

    Shape:
        (B, ..., C) to (B, ..., C): maps (B, H, W, C) or sequences (B, N, C); a grid is accepted and ignored.

    Example:
        >>> import torch
        >>> ActivatorGate(32, hidden_dim=64)(torch.randn(2, 15, 32)).shape
        torch.Size([2, 15, 32])
    """

    last_product = "proj_3"

    def __init__(self, dim: int, hidden_dim: int, device=None, dtype=None) -> None:
        super().__init__()
        check_counts(dim=dim, hidden_dim=hidden_dim)
        dd = {"device": device, "dtype": dtype}
        self.proj_1 = Pointwise(dim, hidden_dim, **dd)
        self.proj_2 = Pointwise(dim, hidden_dim, **dd)
        self.norm = nn.LayerNorm(hidden_dim, **dd)
        self.proj_3 = Pointwise(hidden_dim, dim, **dd)

    def forward(self, x: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        # Two products: halves of one would not be contiguous, and the norms, which copy them, cost more than it saves.
        gate, value = F.gelu(self.proj_1(x)), self.proj_2(x)
        return self.proj_3(self.norm(gate) * self.norm(value))


class ActivatorBlock(nn.Module):
    """x + ActivatorGate(LN(x)), then x + MLP(LN(x)) if there is one, with the same norm, as the published block has it.

    "Activator: GLU Activation Function as the Core Component of a Vision Transformer", arXiv 2405.15953. As its gate,
    **it mixes nothing**. Its network has patches of 4 x 4 pixels, four blocks, no position embedding and no norm before
    the mean.

    Cost: 3 N C m multiply-adds, and 2 N C M with an MLP, for hidden widths m and M.

    Args:
        dim: channels C.
        hidden_dim: hidden width m of the gate.
        mlp_dim: hidden width M of the MLP after it, None for no MLP.
        drop: dropout rate after each product of the MLP.

    Shape:
        (B, ..., C) to (B, ..., C): maps (B, H, W, C) or sequences (B, N, C); a grid is accepted and ignored.

    Example:
        >>> import torch
        >>> ActivatorBlock(32, hidden_dim=64)(torch.randn(2, 15, 32)).shape
        torch.Size([2, 15, 32])
    """

    layouts = {"official": [(r"^actgu\.", "gate."), (r"^ffn\.net\.0\.", "mlp.fc1."), (r"^ffn\.net\.3\.", "mlp.fc2.")]}

    def __init__(
        self, dim: int, hidden_dim: int, mlp_dim: int | None = None, drop: float = 0.0, device=None, dtype=None
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.norm = nn.LayerNorm(dim, **dd)
        self.gate = ActivatorGate(dim, hidden_dim, **dd)
        self.mlp = None if mlp_dim is None else Mlp(dim, mlp_dim, drop=drop, **dd)

    def forward(self, x: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        x = x + self.gate(self.norm(x))
        return x if self.mlp is None else x + self.mlp(self.norm(x))
