"""What networks share in which everything but the token mixer is fixed, so that mixers can be compared.

A design of this project: no figure of it is published. The mixers are those of `mixers`, the networks those of
`isotropic.py` and `pyramid.py`.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from timm.layers import to_2tuple
from torch import Tensor, nn

from ..arguments import UNFIT, check_arguments, check_types, hints, made_with
from ..backbone.mechanics import Mechanics
from ..errors import VisionattnError, one_line
from ..layers import ConvPosEnc
from ..layers.block import Block
from ..layers.checks import check_counts
from ..layers.init import init_weights
from ..layers.pointwise import Mlp
from ..layers.position import grid_of
from ..layers.symbolic import Size, is_symbolic
from ..registry import find
from .mixers import MIXERS, Place, find_mixer, mix

LAYER_NORM = partial(nn.LayerNorm, eps=1e-6)
TOLERANCE = 0.03
"""Share by which the parameters of a block may miss those of a block with softmax attention."""


def hidden_width(dim: int, parameters: int) -> int:
    """Hidden channels of the MLP that give a block the parameters of one with softmax attention and a ratio of 4.

    Args:
        dim: channels C.
        parameters: of the mixer.

    Raises:
        VisionattnError: if no multiple of 8 comes near.
    """
    reference = 12 * dim**2 + 9 * dim
    hidden = 8 * round((reference - parameters - dim) / (2 * dim + 1) / 8)
    missed = parameters + (2 * dim + 1) * hidden + dim - reference
    if hidden < 8 or abs(missed) > TOLERANCE * reference:
        raise VisionattnError(
            f"no MLP makes a block of {dim} channels equal to one with softmax attention, of {reference} parameters, "
            f"when its mixer has {parameters}: give an mlp_ratio"
        )
    return hidden


class MixerBlock(Block):
    """A pre-norm block with a mixer of the list. It takes and returns what the mixer hands on, in a pair with its
    input and output, if it hands anything on.

    Args:
        dim: channels C.
        mixer: name of the mixer.
        place: where it stands.
        mixer_kwargs: arguments of its layer.
        mlp_ratio: hidden channels of the MLP per channel; None for equal parameters.
        position: add a 3 x 3 depthwise convolution first.
        stride: of the map, in pixels.
        drop_path: probability of dropping a branch of a sample.

    Raises:
        VisionattnError: if there is no such mixer, or it cannot stand there.

    Shape:
        (B, H, W, C) to the same, or (B, N, C) and the grid (H, W) to (B, N, C).
    """

    def __init__(
        self,
        dim: int,
        mixer: str,
        place: Place,
        mixer_kwargs: Mapping[str, Any] | None = None,
        mlp_ratio: float | None = None,
        position: bool = False,
        stride: int = 16,
        drop_path: float = 0.0,
        device=None,
        dtype=None,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        make = partial(_make, mixer, dim, kwargs=mixer_kwargs or {})
        if mlp_ratio is None:
            counted = make(replace(place, grid=(place.native,) * 2), device="meta")
            hidden = hidden_width(dim, _count(counted))
        else:
            hidden = int(dim * mlp_ratio)
        layer = make(place, **dd)
        if mixer_kwargs and not MIXERS[mixer].state:
            _try(mixer, dim, place, make(place, device="meta").eval())
        super().__init__(dim, layer, Mlp(dim, hidden, **dd), norm_layer=LAYER_NORM, drop_path=drop_path, **dd)
        self.mixer_name, self.grid, self.stride = mixer, place.grid, stride
        self.position = ConvPosEnc(dim, **dd) if position else nn.Identity()

    def forward(self, x: Tensor | tuple[Tensor, Any], grid: tuple[int, int] | None = None) -> Tensor | tuple:
        x, state = x if isinstance(x, tuple) else (x, None)
        mixer = MIXERS[self.mixer_name]
        if mixer.fixed:
            self._check_grid(grid or tuple(x.shape[1:3]))
        x = self.position(x)
        y, state = mix(mixer, self.mixer, self.norm1(x), grid, state)
        x = x + self.drop_path1(y)
        x = x + self.drop_path2(self.mlp(self.norm2(x)))
        return (x, state) if mixer.state else x

    def _check_grid(self, grid: tuple[Size, Size]) -> None:
        if is_symbolic(*grid):
            raise VisionattnError(f"a graph of mixer {self.mixer_name} has a fixed height and width")
        if grid != self.grid:
            made, given = (" x ".join(str(side * self.stride) for side in sides) for sides in (self.grid, grid))
            raise VisionattnError(f"mixer {self.mixer_name} is made for images of {made} (img_size), got {given}")


class WeighingNorm(nn.LayerNorm):
    """LayerNorm of tokens, each then times what it has behind its channels, if that is there.

    Shape:
        (..., C + 1) or (..., C) to (..., C).
    """

    def forward(self, x: Tensor) -> Tensor:
        C = self.normalized_shape[0]
        if x.shape[-1] == C:
            return super().forward(x)
        return super().forward(x[..., :C]) * x[..., C:]


class WeighingNorm2d(WeighingNorm):
    """`WeighingNorm` of maps (B, C + 1, H, W) or (B, C, H, W)."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def init_mixers(module: nn.Module) -> None:
    """Truncated normals for all matrices and kernels, then what a mixer begins with; for `nn.Module.apply`."""
    init_weights(module, nn.Linear | nn.Conv2d)
    if isinstance(module, MixerBlock) and (start := MIXERS[module.mixer_name].start):
        start(module.mixer)


def _make(name: str, dim: int, place: Place, kwargs: Mapping[str, Any], **dd: Any) -> nn.Module:
    """A mixer, or a line that says why it cannot stand there."""
    mixer = find_mixer(name)
    with _told(name, dim, place):
        check_arguments(f"mixer {name}", kwargs, mixer.options, mixer.options)
        return mixer.make(dim, place, **kwargs, **dd)


def _try(name: str, dim: int, place: Place, layer: nn.Module) -> None:
    """Refuse arguments with which a mixer does not take, or return, a map of its place."""
    x = torch.empty(1, *place.grid, dim, device="meta")
    with _told(name, dim, place):
        found = mix(MIXERS[name], layer, x)[0].shape
        if found != x.shape:
            raise ValueError(f"it makes {tuple(found)} of {tuple(x.shape)} with these arguments; expected the same")


@contextmanager
def _told(name: str, dim: int, place: Place) -> Iterator[None]:
    """Makes one line of what a mixer raises that cannot stand there."""
    try:
        yield
    except VisionattnError:
        raise
    except UNFIT as e:
        raise VisionattnError(f"mixer {name} of {dim} channels and {place.num_heads} heads: {one_line(e)}") from e


class Skeleton(Mechanics):
    """What both networks share."""

    def _expect_several(self, mixer: str) -> None:
        """Refuse images of which the last map has a single place, if the mixer cannot do with that."""
        if MIXERS[mixer].several:
            self.check.size = max(self.check.size, self.feature_info[-1]["reduction"] + 1)

    def no_weight_decay(self) -> set[str]:
        """Names of parameters without weight decay, besides those with one dimension: tables."""
        matrices = {name for name, p in self.named_parameters() if name.endswith(".weight") and p.ndim in (2, 4)}
        return {name for name, p in self.named_parameters() if p.ndim > 1} - matrices

    def adapt_state_dict(self, state_dict: dict[str, Tensor], made_for: Mapping[str, Any]) -> dict[str, Tensor]:
        """Resizes what mixers have for a number of tokens, where the images were of another size."""
        state_dict = super().adapt_state_dict(state_dict, made_for)
        for name, block in self.named_modules():
            if not isinstance(block, MixerBlock) or (resize := MIXERS[block.mixer_name].resize) is None:
                continue
            prefix, own = f"{name}.mixer.", block.mixer.state_dict()
            inside = {key: state_dict[prefix + key] for key in own if prefix + key in state_dict}
            find = partial(grid_of, patch_size=block.stride, img_size=made_for.get("img_size"))
            state_dict |= {prefix + key: value for key, value in resize(inside, own, block.grid, find).items()}
        return state_dict

    def advance(self, epoch: float) -> None:
        """Follow the schedules of mixers that have one."""
        for module in self.modules():
            if isinstance(module, MixerBlock) and hasattr(module.mixer, "advance"):
                module.mixer.advance(epoch)

    def training_loss(self, loss: Tensor, images: Tensor, logits: Tensor, criterion: object = None) -> Tensor:
        """Adds the losses of the mixers that have one."""
        for module in self.modules():
            if isinstance(module, Ending):
                loss, module.loss = loss + module.loss, 0.0
        return loss


class Ending:
    """A network or stage that knows what to do with what its last block hands on.

    Attributes:
        final: see `Mixer`.
        loss: of the mixers, in the last forward pass in training mode.
    """

    final: str = ""
    loss: Tensor | float = 0.0

    def end(self, x: Tensor | tuple[Tensor, Any]) -> Tensor:
        """The output of the last block, with the state as a further channel if the head weighs by that."""
        if not isinstance(x, tuple):
            return x
        x, state = x
        if self.final == "loss":
            self.loss = 0.0 if state is None else state
        if self.final == "weigh":
            x = torch.cat([x, state.view(*x.shape[:-1], 1).to(x.dtype)], -1)
        return x

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"loss": 0.0}  # tensors of a graph are not to be copied


def check_sides(img_size: int | tuple[int, int], **counts: int) -> None:
    """Raise ValueError unless both sides of images, and these, are integers from 1 up."""
    for side in to_2tuple(img_size):
        check_counts(img_size=side)
    check_counts(**counts)


def head_count(dim: int, head_dim: int) -> int:
    """Heads of that many channels."""
    if head_dim < 1 or dim % head_dim:
        raise VisionattnError(f"expected a head_dim that divides the {dim} channels, got {head_dim}")
    return dim // head_dim


@dataclass(frozen=True)
class MixerInfo:
    """What `mixer_info` returns.

    Attributes:
        name: of the mixer.
        model: of the skeleton.
        params: of the model.
        mixer_params: of the mixer, in every block that has it.
        hidden: hidden channels of the MLP, in every block that has it.
        fixed: its number of tokens is that of the construction.
        state: something travels from block to block.
        everywhere: it may fill all stages of the pyramid.
        init: what it begins with, besides a truncated normal; empty if that is all.
        variants: further rows of a comparison, by name: `mixer_kwargs`.
        remark: what a reader of a comparison must know.
        paper: arXiv id.
    """

    name: str
    model: str
    params: int
    mixer_params: tuple[int, ...]
    hidden: tuple[int, ...]
    fixed: bool
    state: bool
    everywhere: bool
    init: str
    variants: Mapping[str, dict[str, Any]]
    remark: str
    paper: str


def mixer_info(name: str, model: str = "isotropic_small", **kwargs: Any) -> MixerInfo:
    """What is known of a mixer, and what a skeleton with it is made of.

    Args:
        name: one of `list_mixers()`.
        model: name of the skeleton.
        **kwargs: of the skeleton.

    Raises:
        UnknownModelError: if there is no such mixer or skeleton.
        UnknownArgumentError: if the skeleton does not take one of the arguments, or not of that type.
        VisionattnError: if it cannot stand there.

    Example:
        >>> import visionattn
        >>> info = visionattn.mixer_info("dw7", "isotropic_small")
        >>> info.mixer_params[0], info.hidden[0], info.remark
        (167040, 2088, 'control: local; host of the gates')
    """
    check_types({"name": name, "model": model}, {"name": str, "model": str}, "mixer_info takes ", " as")
    model, _, entry = find(model)
    if not (isinstance(entry.takes, type) and issubclass(entry.takes, Skeleton)):
        raise VisionattnError(f"expected a skeleton, isotropic_small or pyramid_small for one, got {model}")
    mixer, types = find_mixer(name), hints(entry.takes)
    check_arguments(model, kwargs, types.keys() - {"mixer", "device"}, types)
    with made_with(model, kwargs):
        made = entry.takes(**entry.variant.kwargs | kwargs, mixer=name, device="meta")
    blocks = [module for module in made.modules() if isinstance(module, MixerBlock) and module.mixer_name == name]
    return MixerInfo(
        name=name,
        model=model,
        params=_count(made),
        mixer_params=tuple(_count(block.mixer) for block in blocks),
        hidden=tuple(block.mlp.fc1.out_features for block in blocks),
        fixed=mixer.fixed,
        state=mixer.state,
        everywhere=mixer.everywhere,
        init=mixer.init,
        variants=mixer.variants,
        remark=mixer.remark,
        paper=mixer.paper,
    )


def _count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


ORIGIN = "https://github.com/visionattn/visionattn", "apache-2.0"
"""Of the design, and its licence."""
RECIPE = {"mixer": "softmax", "drop_path_rate": 0.1}
"""Of the small ones, with the mixer that they have unless another is given."""
