"""Weights whose spectral norm is learned: sigmaReparam."""

from collections import defaultdict
from collections.abc import Mapping
from fnmatch import fnmatchcase
from functools import cache
from typing import Any, Literal, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase as BatchOrInstanceNorm

from .checks import check_counts, check_positive
from .precision import without_autocast
from .rms_norm import RmsNorm

T = TypeVar("T", bound=nn.Module)
NORMS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, BatchOrInstanceNorm, RmsNorm)
"""What `remove_norms` removes."""


THEIR_U = "spectral_normed_weight.u"
PUBLISHED = {
    "spectral_normed_weight.weight": "weight",  # is `weight` too, of which a file may hold one
    THEIR_U: "u",
    "sigma": "gamma",
    "effective_spectral_norm": None,
    "spectral_normed_weight.spectral_norm": None,
}
"""Names of the published code by ours; the norms are measured anew."""
SETTLED = 50
"""Iterations that bring averages of singular vectors to those of averaged weights."""


class Reparametrised:
    """What a linear map or convolution is besides, once its weight is (gamma / s) W for a matrix W, the parameter, and
    its spectral norm s = v^T W u. Singular vectors u, and v, follow W by power iterations.

    Attributes:
        every_forward: make an iteration in each forward pass in training, not by `advance`.
        plain: the class that it is of otherwise.
    """

    every_forward = False
    plain: type[nn.Module]

    @property
    def weight(self) -> Tensor:
        # Copies, as the next iteration writes over them, which may come before the backward pass.
        v = self.v.clone() if self.training else None
        return normalised(self._parameters["weight"], self.gamma, self.u.clone(), v)

    def forward(self, x: Tensor) -> Tensor:
        if self.every_forward and self.training:
            self.advance()
        return super().forward(x)

    @torch.no_grad()
    def advance(self) -> None:
        """Make a power iteration."""
        u, v = iterated(*_float(self._parameters["weight"], self.u, len(self.gamma)))
        self.u.copy_(u.view_as(self.u))
        self.v.copy_(v)

    def __reduce__(self) -> tuple:
        """By the plain class: this one is made when it is needed, and pickle finds it under no name."""
        return _blank, (self.plain,), self.__getstate__()

    @torch.no_grad()
    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        W, u = _float(self._parameters["weight"], self.u, len(self.gamma))
        self.v.copy_(F.normalize(W @ u, dim=1))  # which is not kept


def normalised(W: Tensor, gamma: Tensor, u: Tensor, v: Tensor | None = None) -> Tensor:
    """(gamma / s) W with s = v^T W u, for each of n equal blocks of rows.

    Args:
        W: (out, ...).
        gamma: (n,).
        u: (in,), or (n, in).
        v: (n, out / n, 1); None for one iteration from u.
    """
    with without_autocast(W):
        blocks, u = _float(W, u, len(gamma))
        if v is None:
            u, v = iterated(blocks.detach(), u)
        norms = v.mT.to(blocks.dtype) @ blocks @ u
        factor = gamma.view(-1, 1, 1) / norms.clamp(min=torch.finfo(norms.dtype).tiny)  # zeros stay zeros
        return (factor.expand(-1, blocks.shape[1], 1).reshape(-1, *[1] * (W.ndim - 1)) * W).to(W.dtype)


def iterated(W: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """One power iteration: matrices (n, out, in) and vectors (n, in, 1) to the next ones and v (n, out, 1)."""
    v = F.normalize(W @ u, dim=1, eps=1e-12)
    return F.normalize(W.mT @ v, dim=1, eps=1e-12), v


def _float(W: Tensor, u: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """W as matrices (n, out / n, in) and u as vectors (n, in, 1), in float32 at least."""
    dtype = torch.promote_types(W.dtype, torch.float32)
    return W.reshape(n, len(W) // n, -1).to(dtype), u.reshape(n, -1, 1).to(dtype)


@cache
def _class(plain: type[nn.Module]) -> type[nn.Module]:
    return type(f"Sigma{plain.__name__}", (Reparametrised, plain), {"plain": plain, "__module__": plain.__module__})


def _blank(plain: type[nn.Module]) -> nn.Module:
    return _class(plain).__new__(_class(plain))


def sigma_reparam(
    model: T,
    gamma: float | Literal["norm"] = "norm",
    split: Mapping[str, int] | None = None,
    remove_norms: bool = False,
    every_forward: bool = False,
) -> T:
    """Have every linear map and ungrouped convolution learn the spectral norm of its weight apart from the rest of it.

    sigmaReparam of "Stabilizing Transformer Training by Preventing Attention Entropy Collapse", arXiv 2303.06296: the
    weight is gamma / s(W) times W, with a learned gamma and the spectral norm s(W), which bounds logits. A state dict
    has `gamma` and `u`, a right singular vector, beside `weight`, which is W; such files load into plain models too,
    folded. Call `advance(model)` before the first forward pass of every update; train.py does. Weights of zeros stay
    as they are.

    Cost: three products of a weight with a vector in each forward pass.

    Args:
        model: changed in place; conversion begins with exact singular vectors.
        gamma: "norm" to start at s(W), where the model computes what it did, or a number for all, 1 in the paper.
        split: number of equal blocks of rows that have a gamma each, by pattern of the names of modules:
            `{"*.qkv": 3}` for queries, keys and values.
        remove_norms: put identities in place of norms, as the paper does in vision transformers.
        every_forward: have each forward pass in training make an iteration by itself, as the published code does. It is
            not for gradient checkpointing, which would compute with other vectors the second time, nor for weights that
            a layer reads without a call of the module that has them: these keep their vectors.

    Returns:
        the model.

    Raises:
        ValueError: if `gamma` is none of these, a pattern of `split` is of no module or of one whose rows it does not
            divide, or a weight has no values yet, some that are not finite, or belongs to two modules. The model is
            as it was then.

    Example:
        >>> import torch
        >>> model = sigma_reparam(torch.nn.Linear(8, 4))
        >>> sorted(model.state_dict())
        ['bias', 'gamma', 'u', 'weight']
        >>> type(fold(model)).__name__, sorted(model.state_dict())
        ('Linear', ['bias', 'weight'])
    """
    if gamma != "norm":
        check_positive(**{"gamma 'norm' or a number": gamma})
    split, used, found = split or {}, set(), []
    for pattern, blocks in split.items():
        check_counts(**{f"number of blocks for {pattern!r} in split": blocks})
    owners = _owners(model)
    for name, module in model.named_modules():
        conv = isinstance(module, nn.Conv2d) and module.groups == 1
        if isinstance(module, Reparametrised) or not (isinstance(module, nn.Linear) or conv):
            continue
        patterns = [pattern for pattern in split if fnmatchcase(name, pattern)]
        used.update(patterns)
        blocks = split[patterns[0]] if patterns else 1
        if len(module.weight) % blocks:
            raise ValueError(f"split: {name} has {len(module.weight)} rows, which are no {blocks} equal blocks")
        if isinstance(weight := module._parameters.get("weight"), nn.Parameter):
            _check(name or type(module).__name__, weight, owners[weight])
            if weight.any():
                found.append((module, blocks))
    if unused := split.keys() - used:
        raise ValueError(f"split: no linear map or ungrouped convolution is called {min(unused)}")
    if remove_norms:
        _remove_norms(model)
    for module, blocks in found:
        _reparametrise(module, gamma, blocks, every_forward)
    return model


def _owners(model: nn.Module) -> dict[nn.Parameter, list[str]]:
    """Names of the modules that have each parameter."""
    owners = defaultdict(list)
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            owners[parameter].append(name)
    return owners


def _check(name: str, weight: Tensor, owners: list[str]) -> None:
    """Raise ValueError if a weight has no spectral norm, or more than one module has it."""
    if weight.is_meta:
        raise ValueError(f"{name} is on the device meta; expected weights with values: load or draw them first")
    if not weight.isfinite().all():
        raise ValueError(f"{name} has weights that are not finite, and so no spectral norm")
    if len(owners) > 1:
        raise ValueError(f"{' and '.join(owners)} share a weight, which a gamma each would untie: untie it first")


@torch.no_grad()
def _reparametrise(module: nn.Module, gamma: float | str, blocks: int, every_forward: bool) -> None:
    W = module.weight
    matrices = W.reshape(blocks, len(W) // blocks, -1).to(torch.promote_types(W.dtype, torch.float32))
    left, norms, right = torch.linalg.svd(matrices, full_matrices=False)
    norms = norms.amax(1)
    start = norms if gamma == "norm" else torch.full_like(norms, gamma)
    module.register_parameter("gamma", nn.Parameter(start.to(W.dtype), W.requires_grad))
    module.register_buffer("u", right[:, 0].clone() if blocks > 1 else right[0, 0].clone())
    module.register_buffer("v", left[:, :, :1].clone(), persistent=False)
    module.__class__ = _class(type(module))
    module.every_forward = every_forward


def _remove_norms(model: nn.Module) -> None:
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if isinstance(child, NORMS):
                setattr(parent, name, getattr(child, "act", nn.Identity()))  # timm's norms may come with an activation


def advance(model: nn.Module, iterations: int = 1) -> None:
    """Make a power iteration for every weight that `sigma_reparam` has changed: before the first forward pass of every
    update of a model in training. Those made with `every_forward` do so by themselves.

    Args:
        model: from `sigma_reparam`.
        iterations: how many; more than one where vectors are far off, as averages of them are.
    """
    for module in model.modules():
        if isinstance(module, Reparametrised) and not module.every_forward:
            for _ in range(iterations):
                module.advance()


@torch.no_grad()
def fold(model: T) -> T:
    """The plain model that a model from `sigma_reparam` is in evaluation, with plain names, in place.

    Args:
        model: left as it is where nothing was changed.

    Returns:
        the model.
    """
    for module in model.modules():
        if not isinstance(module, Reparametrised):
            continue
        training, requires_grad = module.training, module._parameters["weight"].requires_grad
        module.training = False
        weight = module.weight
        del module.gamma, module.u, module.v, module.every_forward
        module.__class__, module.training = module.plain, training
        module.weight = nn.Parameter(weight, requires_grad)
    return model


def renamed(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict with the names of the published code as one with ours; others as they are.

    Args:
        tensors: by name. Weights of convolutions are matrices there, and stay so.
    """
    out = dict(tensors)
    for prefix in [key.removesuffix(THEIR_U) for key in tensors if key.endswith(THEIR_U)]:
        for theirs, ours in PUBLISHED.items():
            value = out.pop(prefix + theirs, None)
            if ours and value is not None:
                out.setdefault(prefix + ours, value.view(-1) if ours == "gamma" else value)
    return out


def folded(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict of a model from `sigma_reparam` as that of the plain model; others as they are.

    Args:
        tensors: by name.
    """
    out = dict(tensors)
    for key in tensors:
        prefix = key[:-1]
        names = f"{prefix}weight", f"{prefix}gamma", key
        if key.rpartition(".")[2] != "u" or not tensors.keys() >= set(names):
            continue
        W, gamma, u = (tensors[name] for name in names)
        if gamma.ndim == 1 and len(gamma) and u.numel() * len(W) == W.numel() * len(gamma):
            out[names[0]] = normalised(W, gamma, u)
            del out[names[1]], out[names[2]]
    return out
