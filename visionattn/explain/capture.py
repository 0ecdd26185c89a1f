"""One forward pass, and the maps of the layers that took part in it."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from ..backbone import Backbone, Isotropic, Stage
from ..backbone.base import output_of
from ..data.images import to_mode
from ..data.preprocessing import create_transform
from ..errors import VisionattnError
from .map import OF_TOKENS, ON_MAP, Map
from .maps import entry_of, layer_maps

Images = Tensor | Image.Image | Sequence[Image.Image]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, and that of every module as it was afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def as_batch(model: nn.Module, images: Images) -> Tensor:
    """Images as the model takes them (B, C, H, W), where it is.

    Args:
        model: from `create_model`.
        images: prepared, (B, C, H, W) or (C, H, W); or pictures, which are prepared as the model's weights want.
    """
    if not isinstance(images, Tensor):
        pictures = [images] if isinstance(images, Image.Image) else images
        prepare, mode = create_transform(model), "L" if getattr(model, "in_chans", 3) == 1 else "RGB"
        images = torch.stack([prepare(to_mode(picture, mode)) for picture in pictures])
    if images.ndim not in (3, 4):
        raise VisionattnError(f"expected images (B, C, H, W), or one (C, H, W), got {tuple(images.shape)}")
    parameter = next(model.parameters())
    return (images[None] if images.ndim == 3 else images).to(parameter.device, parameter.dtype)


def backbone_of(model: nn.Module) -> Backbone | None:
    """The backbone that a model is or has."""
    return next((module for module in model.modules() if isinstance(module, Backbone)), None)


Call = tuple[str, nn.Module, tuple, dict[str, Any], tuple[int, int] | None]
"""Name of a layer, the layer, what it was called with, and height and width of the map there, if they are known."""


@dataclass
class Pass:
    """What is known of a forward pass.

    Args:
        calls: of the layers that have maps, in their order.
        grid: height and width of the map of patches of an isotropic backbone, or of the last block of a pyramid.
    """

    calls: list[Call]
    grid: tuple[int, int] | None = None


@contextmanager
def watch(model: nn.Module) -> Iterator[Pass]:
    """Know the grid of the patches of the forward passes inside."""
    found, backbone, handles = Pass([]), backbone_of(model), []
    if isinstance(backbone, Isotropic):

        def measure(module: nn.Module, args: tuple) -> None:
            found.grid = tuple(-(-length // backbone.patch_size) for length in args[0].shape[-2:])

        handles.append(backbone.check.register_forward_pre_hook(measure))
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def capture(model: nn.Module, layers: str = "*") -> Iterator[Pass]:
    """Watch the layers that have maps in the forward passes inside.

    Args:
        model: any with layers of ours in it.
        layers: shell pattern of their names.

    Raises:
        VisionattnError: if no layer has maps, or none of that name.
    """
    modules = {name: module for name, module in model.named_modules() if entry_of(module) is not None}
    chosen = {name: module for name, module in modules.items() if fnmatchcase(name, layers)}
    if not chosen:
        raise VisionattnError(
            f"no layer {layers}: there are {', '.join(modules)}" if modules else "no layer of this model has maps"
        )
    with watch(model) as found:

        def keep(name: str, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            found.calls.append((name, module, args, kwargs, found.grid))

        def measure(block: nn.Module, args: tuple) -> None:
            found.grid = tuple(output_of(args[0]).shape[1:3])

        handles = [
            module.register_forward_pre_hook(partial(keep, name), with_kwargs=True) for name, module in chosen.items()
        ]
        stages = [module for module in model.modules() if isinstance(module, Stage)]
        handles += [block.register_forward_pre_hook(measure) for stage in stages for block in stage.blocks]
        try:
            yield found
        finally:
            for handle in handles:
                handle.remove()


def maps_of(model: nn.Module, found: Pass) -> Iterator[list[Map]]:
    """The maps of each layer of a pass."""
    backbone = backbone_of(model)
    last = isinstance(backbone, Isotropic) and backbone.class_token_last
    for name, module, args, kwargs, grid in found.calls:
        yield [
            _placed(replace(each, layer=name, logits=None), kwargs.get("grid") or grid, last)
            for each in layer_maps(module, *args, **kwargs)[0]
        ]


def _placed(found: Map, grid: tuple[int, int] | None, last: bool) -> Map:
    """A map over tokens with the grid of these, or on the grid if there is no other token."""
    if found.axes != OF_TOKENS or grid is None:
        return found
    patches = grid[0] * grid[1] if found.patches is None else found.patches.shape[1]
    if found.values.shape[-1] > patches:
        return replace(found, grid=grid, class_token=-1 if last else 0)
    return replace(found, values=found.values.unflatten(3, grid).unflatten(2, grid), axes=ON_MAP)


@torch.no_grad()
def attention_maps(model: nn.Module, images: Images, layers: str = "*") -> list[Map]:
    """What every attention block of a model weighs by: attention, gates, masks, kernels, with named axes.

    Args:
        model: from `create_model`, `create_segmenter`, or anything with blocks of ours that is called with a batch.
        images: prepared, (B, C, H, W) or (C, H, W); or pictures, which are prepared as the model's weights want.
        layers: shell pattern of the names of layers, `stages.2.*` for one.

    Returns:
        the maps, in the order in which the layers were called.

    Raises:
        VisionattnError: if no layer has maps, or none of that name.

    Example:
        >>> import torch, visionattn
        >>> model = visionattn.create_model("test_litv2")
        >>> found = attention_maps(model, torch.randn(1, 3, 64, 64), "stages.2.*")[0]
        >>> found.layer, found.kind, found.part, found.axes[:4]
        ('stages.2.blocks.0.mixer', 'attention', 'high', ('batch', 'head', 'query_row', 'query_col'))
    """
    images = as_batch(model, images)
    with evaluating(model), capture(model, layers) as found:
        model(images)
        return [each for maps in maps_of(model, found) for each in maps]
