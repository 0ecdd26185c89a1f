"""A gate that an MLP-Mixer block of the same input computes, in place of attention."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from .checks import check_counts
from .pointwise import Mlp, Pointwise
from .position import resample_rows

GATE_NAMES = [
    (r"net\.0\.", "fc1."),
    (r"net\.3\.", "fc2."),
    (r"Mixer\.token_mix\.0\.", "norm1."),
    (r"Mixer\.token_mix\.2\.", "token_mlp."),
    (r"Mixer\.channel_mix\.0\.", "norm2."),
    (r"Mixer\.channel_mix\.1\.", "channel_mlp."),
]


class TokenLinear(nn.Linear):
    """Linear map of the tokens of every channel: (B, N_in, C) to (B, N_out, C)."""

    def forward(self, x: Tensor) -> Tensor:
        # From the left: no transpose, as a product over the last dimension would need twice.
        return torch.baddbmm(self.bias[:, None], self.weight.expand(x.shape[0], -1, -1), x)


class TokenMlp(nn.Module):
    """Two linear maps of the tokens with exact GELU between them, shared by the channels: (B, N, C) to the same.

    Args:
        num_tokens: N.
        hidden_dim: tokens between.
        drop: dropout rate after each product.
    """

    def __init__(self, num_tokens: int, hidden_dim: int, drop: float = 0.0, device=None, dtype=None) -> None:
        super().__init__()
        self.fc1 = TokenLinear(num_tokens, hidden_dim, device=device, dtype=dtype)
        self.act = nn.GELU()
        self.drop1 = nn.Dropout(drop)
        self.fc2 = TokenLinear(hidden_dim, num_tokens, device=device, dtype=dtype)
        self.drop2 = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop2(self.fc2(self.drop1(self.act(self.fc1(x)))))


class MixerGate(nn.Module):
    """A linear map of the input, times an MLP-Mixer block of the input, which so becomes a filter that depends on it.

    "NiNformer: A Network in Network Transformer with Token Mixing Generated Gating Function", arXiv 2403.02411.

        t = x + MLP_tokens(LN(x)),    m = t + MLP_channels(LN(t)),    out = proj(x) * m

    The number of tokens is that of the construction; `resize_token_mlps` makes weights of one grid those of another.

    Cost: N C^2 + 2 N C t + 2 N C c multiply-adds for N tokens, C channels and hidden widths t and c.

    Args:
        dim: channels C.
        num_tokens: N.
        token_dim: hidden width t of the MLP over tokens.
        channel_dim: hidden width c of the MLP over channels.
        drop: dropout rate after each product of the two MLPs.

    Raises:
        ValueError: in forward, if there are not `num_tokens` tokens.

    Shape:
        (B, N, C) to (B, N, C); a grid is accepted and ignored.

    Example:
        >>> import torch
        >>> MixerGate(32, num_tokens=49, token_dim=64, channel_dim=64)(torch.randn(2, 49, 32)).shape
        torch.Size([2, 49, 32])
    """

    layouts = {"official": GATE_NAMES}
    last_product = "proj"  # a scale of the output is one of this factor

    def __init__(
        self, dim: int, num_tokens: int, token_dim: int, channel_dim: int, drop: float = 0.0, device=None, dtype=None
    ) -> None:
        super().__init__()
        check_counts(dim=dim, num_tokens=num_tokens, token_dim=token_dim, channel_dim=channel_dim)
        dd = {"device": device, "dtype": dtype}
        self.num_tokens = num_tokens
        self.norm1 = nn.LayerNorm(dim, **dd)
        self.token_mlp = TokenMlp(num_tokens, token_dim, drop, **dd)
        self.norm2 = nn.LayerNorm(dim, **dd)
        self.channel_mlp = Mlp(dim, channel_dim, drop=drop, **dd)
        self.proj = Pointwise(dim, dim, **dd)

    def forward(self, x: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        if x.shape[1] != self.num_tokens:
            raise ValueError(f"MixerGate is made for {self.num_tokens} tokens, got {x.shape[1]}")
        tokens = x + self.token_mlp(self.norm1(x))
        gate = tokens + self.channel_mlp(self.norm2(tokens))
        return self.proj(x) * gate

    def extra_repr(self) -> str:
        return f"num_tokens={self.num_tokens}"


class NiNBlock(nn.Module):
    """x + MixerGate(LN(x)), then x + MLP(LN(x)), with one norm for both, as the published block has it.

    "NiNformer: A Network in Network Transformer with Token Mixing Generated Gating Function", arXiv 2403.02411. Its
    network has patches of 4 x 4 pixels, four blocks, no position embedding and no norm before the mean.

    Cost: that of `MixerGate` and 2 N C m multiply-adds for the hidden width m of the MLP.

    Args:
        dim: channels C.
        num_tokens: N.
        token_dim: hidden width of the gate's MLP over tokens.
        channel_dim: hidden width of the gate's MLP over channels.
        mlp_dim: hidden width m of the MLP after the gate; the published one has all three alike.
        drop: dropout rate after each product of the three MLPs.

    Raises:
        ValueError: in forward, if there are not `num_tokens` tokens.

    Shape:
        (B, N, C) to (B, N, C); a grid is accepted and ignored.

    Example:
        >>> import torch
        >>> NiNBlock(32, num_tokens=49, token_dim=64, channel_dim=64, mlp_dim=64)(torch.randn(2, 49, 32)).shape
        torch.Size([2, 49, 32])
    """

    layouts = {"official": [*GATE_NAMES, (r"^mgu\.", "gate."), (r"^ffn\.", "mlp.")]}

    def __init__(
        self, dim: int, num_tokens: int, token_dim: int, channel_dim: int, mlp_dim: int, drop: float = 0.0,
        device=None, dtype=None,
    ) -> None:  # fmt: skip
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.norm = nn.LayerNorm(dim, **dd)
        self.gate = MixerGate(dim, num_tokens, token_dim, channel_dim, drop, **dd)
        self.mlp = Mlp(dim, mlp_dim, drop=drop, **dd)

    def forward(self, x: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        x = x + self.gate(self.norm(x))
        return x + self.mlp(self.norm(x))


def resize_token_mlps(
    state_dict: Mapping[str, Tensor], old: tuple[int, int], new: tuple[int, int], prefix: int = 0
) -> dict[str, Tensor]:
    """A state dict whose every `MixerGate` is made for another grid, for use in a model's `adapt_state_dict`.

    The token axis of the matrices is a map and is resampled bilinearly; the first one, which sums over it, is scaled by
    N_old / N_new, so that its sums keep their size.

    Args:
        state_dict: of a model, or of a block, in our layout.
        old: (H, W) that it is for.
        new: (H, W) wanted.
        prefix: tokens in front that belong to no position.
    """

    def resized(key: str, value: Tensor) -> Tensor:
        if key.endswith("token_mlp.fc1.weight"):
            value = resample_rows(value.T, old, new, prefix, mode="bilinear").T.contiguous()
            value[:, prefix:] *= (old[0] * old[1]) / (new[0] * new[1])
        elif key.endswith("token_mlp.fc2.weight"):
            value = resample_rows(value, old, new, prefix, mode="bilinear")
        elif key.endswith("token_mlp.fc2.bias"):
            value = resample_rows(value[:, None], old, new, prefix, mode="bilinear")[:, 0]
        return value

    return {key: resized(key, value) for key, value in state_dict.items()}
