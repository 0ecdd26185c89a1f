"""Products over channels alone, behind one class so that how they are executed can change in one place."""

from collections.abc import Callable

from torch import Tensor, nn


class Pointwise(nn.Linear):
    """Linear map of the channels of every position; on maps, what others write as a 1 x 1 convolution.

    Shape:
        (..., C_in) to (..., C_out), channels last.
    """


class Pointwise2d(Pointwise):
    """Linear map of the channels of every position of a channels-first map, in channels_last memory at no extra copy.

    Shape:
        (B, C_in, H, W) to (B, C_out, H, W).
    """

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Mlp(nn.Module):
    """Two pointwise products with an activation between them.

    Args:
        dim: channels in and out.
        hidden_dim: channels between.
        act_layer: activation, exact GELU by default.
        drop: dropout rate after each product.

    Shape:
        (..., C) to (..., C), channels last.
    """

    def __init__(
        self,
        dim: int,
        hidden_dim: int,
        act_layer: Callable[[], nn.Module] = nn.GELU,
        drop: float = 0.0,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        self.fc1 = Pointwise(dim, hidden_dim, device=device, dtype=dtype)
        self.act = act_layer()
        self.drop1 = nn.Dropout(drop)
        self.fc2 = Pointwise(hidden_dim, dim, device=device, dtype=dtype)
        self.drop2 = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop2(self.fc2(self.drop1(self.act(self.fc1(x)))))
