"""MLP with a convolution."""

from torch import Tensor, nn

from .depthwise import depthwise
from .pointwise import Pointwise2d


class DepthwiseMlp(nn.Module):
    """MLP with a 3 x 3 depthwise convolution before the activation: (B, C, H, W) to (B, C, H, W).

    Args:
        dim: channels in and out.
        hidden_dim: channels between.
        drop: dropout rate after the activation and after the second product.
    """

    def __init__(self, dim: int, hidden_dim: int, drop: float = 0.0, device=None, dtype=None) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.fc1 = Pointwise2d(dim, hidden_dim, **dd)
        self.dwconv = depthwise(hidden_dim, 3, **dd)
        self.act = nn.GELU()
        self.drop1 = nn.Dropout(drop)
        self.fc2 = Pointwise2d(hidden_dim, dim, **dd)
        self.drop2 = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop2(self.fc2(self.drop1(self.act(self.dwconv(self.fc1(x))))))
