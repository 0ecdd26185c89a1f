"""Initial weights."""

import math
from collections.abc import Callable
from functools import partial
from types import UnionType

from timm.layers import trunc_normal_
from torch import Tensor, nn

TRUNCATED = partial(trunc_normal_, std=0.02)


def init_weights(
    module: nn.Module,
    kinds: type[nn.Module] | UnionType = nn.Linear,
    draw: Callable[[Tensor], Tensor] = TRUNCATED,
) -> None:
    """Draw the weight of a module of these kinds, and set its bias to zero; for `nn.Module.apply`.

    Args:
        module: left as it is if it is of another kind.
        kinds: of modules with weight and bias.
        draw: fills a weight in place.
    """
    if isinstance(module, kinds):
        draw(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def by_fan_out(module: nn.Conv2d | nn.Linear) -> Callable[[Tensor], Tensor]:
    """He's normal distribution for the weight of a convolution or linear map, by the outputs that an input reaches."""
    fan_out = len(module.weight) * math.prod(module.weight.shape[2:]) // getattr(module, "groups", 1)
    return partial(nn.init.normal_, std=math.sqrt(2 / fan_out))
