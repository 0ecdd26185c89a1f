"""What is known of a token mixer, and how it is called."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from inspect import signature, unwrap
from itertools import product
from typing import Any

from torch import Tensor, nn

from ...arguments import hints


@dataclass(frozen=True)
class Place:
    """Where in a network a mixer stands, by which its arguments may go.

    Args:
        num_heads: attention heads there.
        grid: (height, width) of the map at the image size that the network is made for.
        native: side of the map by which kernels and windows are chosen, whatever the image size.
        index: of the block in its stage.
        depth: blocks of the stage.
        last_stage: of a pyramid.
        outermost: the first or the last of the network's blocks with this mixer.
    """

    num_heads: int
    grid: tuple[int, int] = (14, 14)
    native: int = 14
    index: int = 0
    depth: int = 1
    last_stage: bool = False
    outermost: bool = False

    @property
    def num_tokens(self) -> int:
        return self.grid[0] * self.grid[1]

    @property
    def window(self) -> int:
        """Side of windows: 7, as in the papers, where the native map consists of such, else 8."""
        return 8 if self.native % 7 else 7


Call = Callable[[nn.Module, Tensor, tuple[int, int], Any], tuple[Tensor, Any]]

Resize = Callable[
    [dict[str, Tensor], dict[str, Tensor], tuple[int, int], Callable[[int], tuple[int, int] | None]], dict[str, Tensor]
]


@dataclass(frozen=True)
class Mixer:
    """What is known of a mixer.

    Args:
        layer: its class and the arguments that a place gives it besides the channels.
        kind: what it takes and returns: "tokens" (B, N, C), called with the keyword `grid`; "map" (B, C, H, W); "last"
            (B, H, W, C).
        everywhere: it may fill all four stages of the pyramid, and not only the last two.
        fixed: its number of tokens is that of the construction.
        several: it cannot do with a single token.
        call: of one that takes a state from the block before it, or hands one to the next: takes layer, input, grid and
            state (None in the first block of a stage) and returns output and state. Maps of a state are (B, N).
        final: what becomes of the last state: "weigh" tokens by it before the mean, add it to the "loss", or nothing.
        start: what follows the truncated normal that all matrices are drawn from.
        init: what `start`, or the layer, begins with, in words; empty if nothing is special.
        resize: makes the state dict of a layer fit one for another grid: takes it, the other's, the other's grid, and
            what finds the grid of a number of tokens.
        variants: further rows of a comparison, by name: arguments in place of the layer's own.
        remark: what a reader of a comparison must know.
        paper: arXiv id.
    """

    layer: Callable[[Place], tuple[Callable[..., nn.Module], dict[str, Any]]]
    kind: str
    paper: str = ""
    everywhere: bool = True
    fixed: bool = False
    several: bool = False
    call: Call | None = None
    final: str = ""
    start: Callable[[nn.Module], None] | None = None
    init: str = ""
    resize: Resize | None = None
    variants: Mapping[str, dict[str, Any]] = field(default_factory=dict)
    remark: str = ""

    @property
    def state(self) -> bool:
        """Whether something travels from block to block."""
        return self.call is not None

    def make(self, dim: int, place: Place, device=None, dtype=None, **kwargs: Any) -> nn.Module:
        """The layer.

        Args:
            dim: channels C.
            place: where it stands.
            device: of the parameters.
            dtype: of the parameters.
            **kwargs: in place of what the place gives.

        Raises:
            ValueError: if the layer cannot be made so.
        """
        layer, arguments = self.layer(place)
        known, taken = self.options, _options(layer, arguments)
        # Where several classes take turns, each takes of the arguments what is its own.
        kwargs = {name: value for name, value in kwargs.items() if name in taken or name not in known}
        return layer(dim, **arguments | kwargs, device=device, dtype=dtype)

    @cached_property
    def options(self) -> dict[str, Any]:
        """Types, by name, of the arguments that its layers take, wherever in a network they stand."""
        found: dict[str, Any] = {}
        for i, n, end in product((0, 1), (1, 2), (False, True)):
            found |= _options(*self.layer(Place(8, index=i, depth=n, outermost=end)))
        own = {"dim", "head_dim", "device", "dtype"} | (set() if self.fixed else {"num_tokens"})
        return {name: hint for name, hint in found.items() if name not in own}


def _options(layer: Callable[..., nn.Module], arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Types of the arguments of a layer's class, and of the classes that it passes others on to."""
    layer, found = unwrap(layer), {}
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in signature(layer).parameters.values()):
        for each in (arguments["gate"],) if "gate" in arguments else getattr(layer, "onward", layer.__mro__[1:2]):
            found |= hints(each)
    return found | hints(layer)


def mix(
    mixer: Mixer, layer: nn.Module, x: Tensor, grid: tuple[int, int] | None = None, state: Any = None
) -> tuple[Tensor, Any]:
    """What a mixer returns, in the layout of its input, and its state.

    Args:
        mixer: what is known of it.
        layer: the layer.
        x: tokens (B, N, C) with their grid, or a map (B, H, W, C) without one.
        grid: (height, width) of the tokens.
        state: what the block before handed on.
    """
    of_tokens = mixer.kind == "tokens"
    size = (x.shape[1], x.shape[2]) if grid is None else grid
    if of_tokens == (grid is None):  # the other layout
        x = x.flatten(1, 2) if of_tokens else x.unflatten(1, size)
    if mixer.kind == "map":
        x = x.permute(0, 3, 1, 2)
    if mixer.call is not None:
        y, state = mixer.call(layer, x, size, state)
    else:
        y = layer(x, grid=size) if of_tokens else layer(x)
    if mixer.kind == "map":
        y = y.permute(0, 2, 3, 1)
    if of_tokens == (grid is None):
        y = y.unflatten(1, size) if of_tokens else y.flatten(1, 2)
    return y, state
