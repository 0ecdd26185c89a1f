"""Self-attention with a temperature of its own for every query and value."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .checks import check_counts, check_positive
from .pointwise import Pointwise
from .self_attention import SelfAttention
from .size_constant import size_constant
from .symbolic import Size, fixed

TOKENS = "shared", "mlp", None
POSITIONS = "length", "index", None


@size_constant
def log_counts(length: Size, position: str, device: torch.device, dtype: torch.dtype) -> Tensor:
    """log n: of all tokens (1, 1) for the position "length", of each and those before it (N, 1) for "index"."""
    if position == "length":
        return torch.full((1, 1), length, device=device, dtype=dtype).log()
    return torch.arange(1, length + 1, device=device, dtype=dtype)[:, None].log()


def _alpha(beta: Tensor) -> Tensor:
    """Of sigma(alpha) = exp(-exp(beta))."""
    rate = beta.double().exp()
    return (-rate - (-torch.expm1(-rate)).log()).to(beta.dtype)


def _qkv(weight: Tensor) -> Tensor:
    """Of a linear map, (3 C, C); the other way round it is of a GPT-2 that has convolutions."""
    if weight.shape[0] != 3 * weight.shape[1]:
        raise ValueError(f"expected (3 C, C), got {tuple(weight.shape)}")
    return weight


OFFICIAL = [
    (r"^c_attn\.(?=weight)", "qkv.", _qkv),
    (r"^c_attn\.", "qkv."),
    (r"^c_proj\.", "proj."),
    (r"^beta$", "alpha_q", _alpha),
]


class SelectiveSelfAttention(SelfAttention):
    """Self-attention whose queries and values are scaled, by token and head: what is similar to a token, and to how
    many it attends, are two things then.

    "Selective Attention: Enhancing Transformer through Principled Context Control", arXiv 2411.12892. Each of q, k and
    v that is chosen is multiplied by its inverse temperature

        tau = tanh(f(x)) + 1 + sigma(alpha) log n

    of a token and, as more tokens share a softmax, of their number n. It is at least 0, at most 2 + log n, and 1 in the
    beginning: a fresh layer is plain attention, but for 1 % of log n. What is published has no function f of the token,
    the form of which is ours. The queries of its language models are scaled by 1 + exp(-exp(beta)) log n: their
    weights are those of `token=None, position="index", on="q"`, and their mask of later tokens is not in this layer.

    Cost: 4 N C^2 + 2 N^2 C multiply-adds for N tokens and C channels, and for each that is scaled N C, or
    N C^2 hidden_ratio with "mlp".

    Args:
        dim: channels C.
        num_heads: attention heads; must divide `dim`.
        qkv_bias: bias of the query, key and value projections.
        token: f, "shared" for a product of what is scaled, after a GELU, with a vector per head, "mlp" for two layers
            of their own on the input, None for 0.
        position: n, "length" for all tokens, "index" for those up to this one, as when later ones are masked; None
            leaves the last term out.
        on: what is scaled, some of the letters q, k and v.
        hidden_ratio: hidden channels of "mlp", as a share of `dim`.

    Raises:
        ValueError: if `num_heads` does not divide `dim`, or an option is none of these.

    Shape:
        (B, N, C) to (B, N, C); the grid of the patches is accepted and ignored.

    Example:
        >>> import torch
        >>> SelectiveSelfAttention(64, num_heads=4)(torch.randn(1, 15, 64)).shape
        torch.Size([1, 15, 64])
    """

    layouts = {
        "linear": OFFICIAL,
        "conv": [(r"^c_(attn|proj)\.weight$", r"c_\1.weight", Tensor.t), *OFFICIAL],
    }

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        qkv_bias: bool = True,
        token: str | None = "shared",
        position: str | None = "length",
        on: str = "qv",
        hidden_ratio: float = 0.25,
        device=None,
        dtype=None,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__(dim, num_heads, qkv_bias, **dd)
        for name, value, known in (("token", token, TOKENS), ("position", position, POSITIONS)):
            if value not in known:
                raise ValueError(f"expected {name} one of {', '.join(map(str, known))}, got {value!r}")
        if not (isinstance(on, str) and on and set(on) <= set("qkv") and len(set(on)) == len(on)):
            raise ValueError(f"expected on to be some of the letters q, k and v, got {on!r}")
        check_positive(hidden_ratio=hidden_ratio)
        self.token, self.position, self.on = token, position, on
        for part in on:
            if token == "shared":
                vectors = torch.empty(num_heads, dim // num_heads, **dd)
                self.register_parameter(f"temp_{part}", nn.Parameter(vectors))
            elif token == "mlp":
                hidden = int(dim * hidden_ratio)
                check_counts(**{"dim * hidden_ratio": hidden})
                layers = Pointwise(dim, hidden, **dd), nn.GELU(), Pointwise(hidden, num_heads, **dd)
                self.add_module(f"temp_{part}", nn.Sequential(*layers))
            if position is not None:
                self.register_parameter(f"alpha_{part}", nn.Parameter(torch.empty((), **dd)))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Temperatures of 1, nearly; projections are left as they are."""
        for part in self.on:
            if self.token == "shared":
                nn.init.zeros_(getattr(self, f"temp_{part}"))
            elif self.token == "mlp":
                last = getattr(self, f"temp_{part}")[2]
                nn.init.zeros_(last.weight)
                nn.init.zeros_(last.bias)
            if self.position is not None:
                nn.init.constant_(getattr(self, f"alpha_{part}"), -4.5)

    def adapt_state_dict(self, state_dict: dict[str, Tensor], made_for: Mapping[str, Any]) -> dict[str, Tensor]:
        """Takes scalars that are kept as one number in a row, as torch does when it loads them."""
        return {k: v.reshape(()) if k.startswith("alpha_") and v.numel() == 1 else v for k, v in state_dict.items()}

    def heads(self, x: Tensor) -> list[Tensor]:
        """Queries, keys and values (B, heads, N, d), scaled."""
        q, k, v = super().heads(x)
        parts = ("q", q), ("k", k), ("v", v)
        return [r * self.temperature(part, r, x).to(r.dtype) if part in self.on else r for part, r in parts]

    def temperature(self, part: str, r: Tensor, x: Tensor) -> Tensor:
        """tau (B, heads, N, 1), or what that expands from.

        Args:
            part: "q", "k" or "v".
            r: what it scales (B, heads, N, d).
            x: the input (B, N, C).
        """
        tau = r.new_ones(1, 1)
        if self.position is not None:
            tau = 1 + getattr(self, f"alpha_{part}").sigmoid() * _log_counts(r, self.position)
        if self.token == "shared":
            tau = tau + (F.gelu(r) @ getattr(self, f"temp_{part}").unsqueeze(2)).tanh()
        elif self.token == "mlp":
            tau = tau + getattr(self, f"temp_{part}")(x).mT.unsqueeze(3).tanh()
        return tau

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, token={self.token!r}, position={self.position!r}, on={self.on!r}"


@torch.fx.wrap
def _log_counts(r: Tensor, position: str) -> Tensor:
    (length,) = fixed(r.shape[2])
    return log_counts(length, position, r.device, torch.promote_types(r.dtype, torch.float32))
