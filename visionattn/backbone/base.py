"""What both scaffolds share: timm's model contract and input checks."""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any, ClassVar

import torch
from timm.layers import Format
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..errors import VisionattnError
from ..layers.direct import is_direct, is_watched
from ..layers.fuse import fuse_modules
from ..layers.key_driven_gqa import changing_allocations, kept
from ..layers.position import resize_table
from .mechanics import Mechanics

FORMATS = tuple(fmt.value for fmt in Format)
"""Layouts of features."""


def check_output_format(output_fmt: str) -> None:
    """Refuse a layout of features that is none of `FORMATS`."""
    if output_fmt not in FORMATS:
        raise VisionattnError(f"expected output_fmt one of {', '.join(FORMATS)}, got {output_fmt!r}")


class InputCheck(nn.Module):
    """Passes images on, and refuses those that are too small. On a CPU they are laid out as the stages want them.

    Args:
        size: smallest height and width in pixels.
        name: of the model, for the message.
    """

    def __init__(self, size: int, name: str) -> None:
        super().__init__()
        self.size, self.name = size, name

    def forward(self, x: Tensor) -> Tensor:
        return _checked(x, self.size, self.name)


@torch.fx.wrap
def _checked(x: Tensor, size: int, name: str) -> Tensor:
    H, W = x.shape[-2:]
    if not torch.compiler.is_compiling() and min(H, W) < size:
        raise VisionattnError(f"{name} expects at least {size} x {size} input, got {H} x {W}")
    return x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 and is_direct(x) else x


class Backbone(Mechanics, nn.Module):
    """What both scaffolds share.

    Attributes:
        layouts: published layouts of the family's checkpoints, name to rules (see `weights.Rule`).
        first_conv: name of the convolution that takes the image.
        classifier: name of the head, or names where there are several.
        feature_cfg: how timm's builder makes a feature extractor of the model.
        optional: beginnings of the names of what models for dense prediction do without, or have besides.
        averaged_weights: whether the published figures are those of averaged weights, where a checkpoint holds both.
        dilates: whether `dilate` can keep the resolution of the last stages.
    """

    layouts: ClassVar[dict[str, list]] = {}
    first_conv: ClassVar[str] = "stem.proj"
    classifier: ClassVar[str | tuple[str, ...]] = "head"
    feature_cfg: ClassVar[dict]
    optional: ClassVar[tuple[str, ...]] = ("norm.", "feature_norms.", "hidden.", "cls_token")
    averaged_weights: ClassVar[bool] = True
    dilates: ClassVar[bool] = False

    def __init__(
        self, num_features: int, num_classes: int, in_chans: int, drop_rate: float, min_input_size: int
    ) -> None:
        super().__init__()
        self.check = InputCheck(min_input_size, type(self).__name__)
        self.num_features = self.head_hidden_size = num_features
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.drop_rate = drop_rate
        self.grad_checkpointing = False
        self.feature_info: list[dict] = []

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def get_classifier(self) -> nn.Module:
        return self.head

    @torch.no_grad()
    def pool_size(self, img_size: Sequence[int]) -> tuple[int, ...]:
        """(height, width) of what is pooled, the last map or the grid of the patches, for that of the image."""
        reduction = self.feature_info[-1]["reduction"]
        if not any(length % reduction for length in img_size):
            return tuple(length // reduction for length in img_size)
        # Families drop or pad what is over: a copy without memory for weights tells.
        tensors = [*self.parameters(), *self.buffers()]
        shell = copy.deepcopy(self, {id(tensor): tensor.to("meta") for tensor in tensors}).eval()
        size = [max(length, self.check.size) for length in img_size]
        x = torch.empty(1, self.in_chans, *size, device="meta", dtype=tensors[0].dtype)
        return tuple(shell.forward_intermediates(x, 1, intermediates_only=True)[0].shape[2:])

    def no_weight_decay(self) -> set[str]:
        """Names of parameters without weight decay, besides those with one dimension."""
        return set()

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute activations in the backward pass instead of keeping them."""
        self.grad_checkpointing = enable

    def merge_state_dict(self, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        """Weights of the model's names, of which it may have several as one.

        Args:
            state_dict: what a file holds, by the model's names where it has them.
        """
        return state_dict

    def adapt_state_dict(self, state_dict: dict[str, Tensor], made_for: Mapping[str, Any]) -> dict[str, Tensor]:
        """Last step of a conversion: makes a state dict in our layout fit this model's configuration, where it can.

        Tables of biases by relative position are resampled for windows of another size.

        Args:
            state_dict: in our layout, of any model of the family (or of another; then whatever is returned).
            made_for: arguments of the model that it was made for, as far as they are known.
        """
        tables = {k: tuple(v.shape[1:]) for k, v in self.state_dict().items() if k.endswith(".rpb") and v.ndim == 3}
        return state_dict | {
            k: resize_table(state_dict[k], size)
            for k, size in tables.items()
            if k in state_dict and state_dict[k].ndim == 3
        }

    def fuse(self) -> "Backbone":
        """Merge batch norms and layer scales into the products next to them, in place, for faster inference.

        Returns:
            this model, whose output is the same up to rounding and whose parameters are others.

        Raises:
            VisionattnError: in training mode.
        """
        if self.training:
            raise VisionattnError("expected a model in eval mode to fuse, got one in training mode: call eval() first")
        fuse_modules(self)
        return self

    def _placement(self) -> dict:
        parameter = next(self.parameters())
        return {"device": parameter.device, "dtype": parameter.dtype}


def output_of(x: Tensor | tuple[Tensor, Any]) -> Tensor:
    """What a block returns, without what it hands on to the next if that is a pair."""
    return x[0] if isinstance(x, tuple) else x


def recomputed(block: nn.Module, *args) -> Tensor:
    """`block(*args)` with activations recomputed in the backward pass, which must not count twice for batch norm,
    nor for attention that allots its heads over time."""
    norms = [m for m in block.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    allotting = changing_allocations(block)

    @contextmanager
    def frozen_statistics() -> Iterator[None]:
        momenta, counts = [norm.momentum for norm in norms], [norm.num_batches_tracked for norm in norms]
        for norm in norms:
            norm.momentum = None if norm.momentum is None else 0.0  # None takes 0 where no batches are counted
            norm.num_batches_tracked = None
        try:
            with kept(allotting):
                yield
        finally:
            for norm, momentum, count in zip(norms, momenta, counts, strict=True):
                norm.momentum, norm.num_batches_tracked = momentum, count

    # Compiled graphs write to buffers once, at the end of the forward pass, whatever is recomputed.
    if (norms or allotting) and block.training and not torch.compiler.is_compiling():
        contexts = nullcontext(), _Anew(frozen_statistics)
        return checkpoint(block, *args, use_reentrant=False, context_fn=lambda: contexts)
    return checkpoint(block, *args, use_reentrant=False)


class _Anew(ExitStack):
    """A context that is made whenever it is entered: a graph that is kept is recomputed for every backward pass."""

    def __init__(self, make: Callable[[], AbstractContextManager]) -> None:
        super().__init__()
        self.make = make

    def __enter__(self) -> None:
        self.enter_context(self.make())


SLICE = 3 * 2**20
"""Bytes of a map that a stage computes on at once in inference. What its blocks make of it is up to four times as much,
which then stays in the cache, and below the 32 MB from which on glibc returns memory to the system after every use."""


def in_slices(module: nn.Module, call: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """`call(x)`, in inference on a CPU a slice of the batch after the other.

    Args:
        module: what `call` calls.
        call: treats samples independently of each other.
        x: batch of maps or sequences.
    """
    if torch.is_grad_enabled() or not is_direct(x) or x.nbytes <= SLICE or len(x) < 2:
        return call(x)
    modules = list(module.modules())
    if any(m.training for m in modules) or is_watched(*modules):
        return call(x)
    count = min(len(x), -(-x.nbytes // SLICE))
    return torch.cat([call(part) for part in x.split(-(-len(x) // count))])
