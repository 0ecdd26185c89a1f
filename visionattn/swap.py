"""Token mixers in the place of the attention of vision transformers, timm's above all."""

import inspect
import logging
import re
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase
from itertools import chain
from types import SimpleNamespace
from typing import Any, TypeVar

import torch
from timm.layers import Attention, AttentionRope
from timm.models import beit, eva, vision_transformer_relpos
from torch import Tensor, nn

from . import layers
from .arguments import UNFIT, check_arguments, check_types
from .backbone import Hierarchical, Isotropic
from .errors import UnknownArgumentError, VisionattnError, one_line
from .layers.projections import Weights, read_projections, transfer_projections
from .models.mixers import MIXERS, Mixer, Place, find_mixer, mix
from .models.skeletons import MixerBlock

_logger = logging.getLogger("visionattn")
T = TypeVar("T", bound=nn.Module)

TIMM = Attention, AttentionRope, eva.EvaAttention, beit.Attention, vision_transformer_relpos.RelPosAttention
NORMS = "q_norm", "k_norm"
RATES = "attn_drop", "proj_drop"
POSITIONS = "rope", "rel_pos_bias", "shared_rel_pos"
"""Modules of timm's models that tell attention where tokens are."""
TAKES = {"model": nn.Module, "mixer": str, "where": str, "keep_weights": bool}


class ReplacedAttention(nn.Module):
    """A token mixer that is called as the attention of a vision transformer is.

    Args:
        layer: the mixer.
        mixer: its name.
        dim: channels C.
        num_heads: attention heads of what it stands for.
        patches: what has the `grid_size`, (height, width), of the map of patches at present, for models that do not
            tell it themselves.
        rates: dropout rates in what it stands for, of weights and output, by `RATES`.
        drop: dropout rate of the output, 0 for a mixer that has its own.

    Shape:
        (B, N, C) to (B, N, C).
    """

    def __init__(
        self,
        layer: nn.Module,
        mixer: str,
        dim: int,
        num_heads: int,
        patches: Any,
        rates: dict[str, float],
        drop: float,
    ) -> None:
        super().__init__()
        self.mixer_name, self.dim, self.num_heads, self.rates = mixer, dim, num_heads, rates
        self.patches = (patches,)  # in a tuple, as it is a module of the model and none of this one
        self.mixer = layer
        self.drop = nn.Dropout(drop)

    @property
    def grid(self) -> tuple[int, int] | None:
        """(height, width) of the map of patches at the model's present image size, if the model knows it."""
        return getattr(self.patches[0], "grid_size", None)

    def forward(
        self,
        x: Tensor,
        grid: tuple[int, int] | None = None,
        *,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        **positions: Any,
    ) -> Tensor:
        """Mix tokens.

        Args:
            x: tokens (B, N, C).
            grid: (height, width) of the patches among the tokens, where the model tells it.
            attn_mask: refused.
            is_causal: refused.
            **positions: rotary tables and biases, which only softmax attention has a use for; ignored.

        Raises:
            VisionattnError: if there is a mask, or the mixer takes maps and the tokens are none.
        """
        if attn_mask is not None or is_causal:
            raise VisionattnError(f"{self.mixer_name} in the place of attention takes no mask")
        mixer, told = MIXERS[self.mixer_name], grid is not None
        grid = grid or self.grid
        if mixer.kind == "tokens":
            return self.drop(self.mixer(x, grid=grid))
        if not told and x.shape[1] != grid[0] * grid[1]:
            raise VisionattnError(
                f"{self.mixer_name} in the place of attention takes maps of {grid[0]} x {grid[1]} patches, "
                f"got {x.shape[1]} tokens"
            )
        return self.drop(mix(mixer, self.mixer, x, grid)[0])

    def extra_repr(self) -> str:
        return self.mixer_name


def replace_attention(
    model: T, mixer: str, where: str = "blocks.*.attn", keep_weights: bool = True, **mixer_kwargs: Any
) -> T:
    """Put a token mixer in the place of the attention of a vision transformer.

    For timm's ViT, DeiT, BEiT, EVA and what is built like them, and for isotropic models of ours, whose attention is
    `where="blocks.*.mixer"`. Tokens come in and go out as before; maps are of the model's present image size, after
    timm's `set_input_size` too. Heads, biases and dropout rates are those of the attention, as far as the mixer has
    any; so are dtype, device and mode. Positions that attention itself is told, by rotation or biases, are left out.
    One line is logged that says what became of the weights.

    Args:
        model: changed in place, or not at all if there is an error.
        mixer: one of `visionattn.list_mixers()`.
        where: names of the attention modules, with "*" for what differs between two dots.
        keep_weights: keep the projections of queries, keys and values where the mixer has such, and that of the output
            where it has values. Heads of keys and values are averaged in runs where the mixer has fewer.
        **mixer_kwargs: arguments of the mixer's layer.

    Returns:
        the model.

    Raises:
        UnknownArgumentError: if the mixer does not take one of the arguments, or not of that type.
        VisionattnError: if there is no such mixer, no such module, or the mixer cannot stand there.

    Example:
        >>> import timm, torch, visionattn
        >>> vit = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, num_classes=10)
        >>> visionattn.replace_attention(vit, "flow")(torch.randn(1, 3, 32, 32)).shape
        torch.Size([1, 10])
    """
    given = {"model": model, "mixer": mixer, "where": where, "keep_weights": keep_weights}
    check_types(given, TAKES, "replace_attention takes ", " as")
    find_mixer(mixer)
    names, made = _matching(model, where), {}
    modules = {name: model.get_submodule(name) for name in names}
    told: dict[str, dict[str, None]] = {"kept": {}, "fresh": {}, "dropped": {}}
    for i, (name, module) in enumerate(modules.items()):
        if module in made:  # which has several places
            continue
        made[module], found = _replacement(_look(model, name), mixer, mixer_kwargs, keep_weights, i, len(names))
        for what, parts in found.items():
            told[what] |= dict.fromkeys(parts)
    for name, module in modules.items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, made[module])
    text = "; ".join(f"{what} {', '.join(parts) or 'nothing'}" for what, parts in told.items())
    level = logging.WARNING if told["fresh"] or told["dropped"] else logging.INFO
    _logger.log(level, "%s in the place of %d x %s: %s", mixer, len(names), where, text)
    return model


def _matching(model: nn.Module, where: str) -> list[str]:
    """Names of the modules that a pattern means."""
    wanted, modules = where.split("."), dict(model.named_modules(remove_duplicate=False))
    names = []
    for name in modules:
        parts = name.split(".")
        if name and len(parts) == len(wanted) and all(map(fnmatchcase, parts, wanted)):
            names.append(name)
    if not names:
        patterns = {re.sub(r"\b\d+\b", "*", name): _is_attention(module) for name, module in modules.items() if name}
        likely = [pattern for pattern, is_one in patterns.items() if is_one]
        near = get_close_matches(where, likely or patterns, n=1, cutoff=0.0 if likely else 0.6)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise VisionattnError(f"{type(model).__name__} has no module {where}{hint}")
    return names


@dataclass(frozen=True)
class _Attention:
    """Attention that will be replaced, and what is around it.

    Args:
        told: what errors call it.
        module: the attention.
        layer: the same, or the mixer that has replaced it before.
        dim: channels C.
        weights: of its projections; see `read_projections`.
        patches: what has the `grid_size`, (height, width), of the map of patches, if the model tells it.
        before: tokens in front of the patches.
        behind: tokens after them.
        positions: names of modules of the model that tell attention where tokens are.
        placement: device and dtype.
    """

    told: str
    module: nn.Module
    layer: nn.Module
    dim: int
    weights: Weights
    patches: Any
    before: int
    behind: int
    positions: list[str]
    placement: dict[str, Any]

    def rate(self, name: str) -> float:
        """A dropout rate."""
        if isinstance(self.module, ReplacedAttention):
            return self.module.rates[name]
        value = getattr(self.module, name, 0.0)
        return value.p if isinstance(value, nn.Dropout) else value

    @property
    def grid(self) -> tuple[int, int] | None:
        """(height, width) of the map of patches, if the model tells it."""
        return getattr(self.patches, "grid_size", None)

    @property
    def num_tokens(self) -> int | None:
        """Of all kinds, if the model tells."""
        return None if self.grid is None else self.before + self.grid[0] * self.grid[1] + self.behind


def _look(model: nn.Module, name: str) -> _Attention:
    """What is there, if it is attention that is called with tokens."""
    module, told = model.get_submodule(name), f"{name} of {type(model).__name__}"
    if not _is_attention(module):
        raise VisionattnError(
            f"{told} is {type(module).__name__}; expected attention of timm's ViT, BEiT or EVA, or a layer of ours "
            f"that is called with tokens and their grid"
        )
    replaced = isinstance(module, ReplacedAttention)
    layer = module.mixer if replaced else module
    weights = read_projections(layer)
    dim = module.dim if replaced else weights["q"][0].shape[1]
    if not replaced and "o" in weights and len(weights["o"][0]) != dim:
        raise VisionattnError(f"{told} makes {len(weights['o'][0])} channels of {dim}; expected as many")
    path = name.split(".")
    around = [model.get_submodule(".".join(path[:i])) for i in reversed(range(len(path)))]  # the nearest first
    of_maps = isinstance(around[0], MixerBlock) and MIXERS[around[0].mixer_name].kind != "tokens"
    if of_maps or any(isinstance(each, Hierarchical) for each in around):
        raise VisionattnError(f"{told} is called with a map: tokens are what it could be replaced for")
    owner = next((each for each in around if hasattr(each, "num_prefix_tokens")), model)
    if isinstance(owner, Isotropic):
        patches, tokens = SimpleNamespace(grid_size=owner.grid_size), int(owner.class_token_at is not None)
        before, behind = (0, tokens) if owner.class_token_last else (tokens, 0)
    else:
        one_size = not getattr(owner, "dynamic_img_size", False)
        patches = getattr(owner, "patch_embed", None) if one_size else None
        before, behind = getattr(owner, "num_prefix_tokens", 0), 0
    positions = [each for each in POSITIONS if isinstance(getattr(owner, each, None), nn.Module)]
    parameter = next(chain(module.parameters(), model.parameters()))
    placement = {"device": parameter.device, "dtype": parameter.dtype}
    return _Attention(told, module, layer, dim, weights, patches, before, behind, positions, placement)


def _is_attention(module: nn.Module) -> bool:
    if isinstance(module, (*TIMM, ReplacedAttention)):
        return True
    ours = type(module).__module__.startswith(f"{layers.__name__}.")
    return ours and [*inspect.signature(module.forward).parameters] == ["x", "grid"] and "q" in read_projections(module)


def _replacement(
    old: _Attention, name: str, kwargs: dict[str, Any], keep: bool, index: int, depth: int
) -> tuple[ReplacedAttention, dict[str, list[str]]]:
    """What stands in for attention, and parts of it that are kept, fresh and dropped."""
    mixer = find_mixer(name)
    heads = kwargs.get("num_heads", old.module.num_heads)
    spot = {} if old.grid is None else {"grid": old.grid, "native": min(old.grid)}
    place = Place(heads, **spot, index=index, depth=depth, outermost=index in (0, depth - 1))
    rates = {key: old.rate(key) for key in RATES}
    carried: dict[str, Any] = dict(rates)
    if old.weights:
        carried["qkv_bias"] = any(bias is not None for part, (_, bias) in old.weights.items() if part != "o")
    if has_norms := not isinstance(getattr(old.layer, "q_norm", None), nn.Identity | None):
        carried["qk_norm"] = True
    if mixer.fixed and old.num_tokens is not None:
        kwargs = {"num_tokens": old.num_tokens, **kwargs}

    def made(**options: Any) -> ReplacedAttention:
        layer = mixer.make(old.dim, place, **options)
        rest = 0.0 if "proj_drop" in _parameters(layer) else rates["proj_drop"]
        return ReplacedAttention(layer, name, old.dim, heads, old.patches, rates, rest)

    try:
        check_arguments(f"mixer {name}", kwargs, mixer.options, mixer.options)
        _check(mixer, old, kwargs)
        trial = made(**kwargs, device="meta").eval()
        if isinstance(trial.mixer, layers.CausalSelfAttention) and old.before:
            raise ValueError("its tokens see those before them, and the class token is the first")
        if getattr(trial.mixer, "needs_grid", False):
            _check_grid(old, "patches of a grid")
        x = torch.empty(1, old.num_tokens or kwargs.get("num_tokens", 16), old.dim, device="meta")
        if (found := trial(x).shape) != x.shape:
            raise ValueError(f"it makes {tuple(found)} of {tuple(x.shape)} with these arguments; expected the same")
        takes = _parameters(trial.mixer)
        carried_over = {key: value for key, value in carried.items() if key in takes}
        new = made(**carried_over | kwargs, **old.placement).train(old.module.training)
    except UnknownArgumentError:
        raise
    except UNFIT as error:
        raise VisionattnError(f"{name} cannot stand for {old.told}: {one_line(error)}") from error
    norms = NORMS if has_norms and "qk_norm" in takes else ()
    found = transfer_projections(old.layer, new.mixer, old.dim // old.module.num_heads, norms, keep)
    found["dropped"] += [each for each in old.positions if each not in found["kept"]]
    if rates["attn_drop"] and "attn_drop" not in takes:
        found["dropped"].append("attn_drop")
    return new, found


def _check(mixer: Mixer, old: _Attention, kwargs: dict[str, Any]) -> None:
    """Raise ValueError where a mixer cannot stand, before it is made."""
    if mixer.kind != "tokens":
        _check_grid(old, "maps")
    if mixer.fixed and "num_tokens" not in kwargs:
        raise ValueError("its number of tokens is fixed, and the model does not tell it: give num_tokens")
    if mixer.state and mixer.final != "loss":
        raise ValueError("it hands something on to the next block, which the model does not")
    if kwargs.get("balance"):
        raise ValueError("balance is the weight of a loss, which the model does not add")
    if kwargs.get("soft_mask_epochs"):
        raise ValueError("soft_mask_epochs is of a schedule, which the model does not follow")


def _check_grid(old: _Attention, taken: str) -> None:
    """Raise ValueError unless the tokens are those of a map of known size."""
    if others := old.before + old.behind:
        raise ValueError(f"it takes {taken}, and {others} of the tokens, class or register, are on none")
    if old.grid is None:
        raise ValueError(f"it takes {taken}, and the model does not tell the size of its own")


def _parameters(layer: nn.Module) -> set[str]:
    """Names of the arguments of a layer's class."""
    names: set[str] = set()
    for each in type(layer).__mro__:
        parameters = inspect.signature(each.__init__).parameters
        names |= parameters.keys()
        if all(parameter.kind is not parameter.VAR_KEYWORD for parameter in parameters.values()):
            break  # else the rest goes to the class that it is derived from
    return names
