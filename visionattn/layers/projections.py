"""What the linear maps of an attention make, and what of it another attention can take over."""

import copy
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

Weights = dict[str, tuple[Tensor, Tensor | None]]

PROJECTIONS = {
    "qkv": "qkv", "qkvg": "qkvg", "qk": "qk", "q": "q", "k": "k", "v": "v", "kv": "kv",
    "q_proj": "q", "k_proj": "k", "v_proj": "v", "proj": "o", "out_proj": "o",
}  # fmt: skip
"""Linear maps of attention by name, and what their rows make, in equal parts."""
PARTS = {"q": "queries", "k": "keys", "v": "values", "g": "gates", "o": "output"}
BIASES = "q_bias", "k_bias", "v_bias"
"""Of BEiT and EVA, beside `qkv`; that of the keys is always 0."""


def _projections(layer: nn.Module) -> Iterator[tuple[str, nn.Linear, str]]:
    """Linear maps of the attention in a layer, by name, with what they make: none where nothing makes queries, and that
    of the output only where something makes values."""
    for prefix, module in layer.named_modules():
        linear = {name: each for name, each in module.named_children() if isinstance(each, nn.Linear)}
        found = {name: linear[name] for name in PROJECTIONS if name in linear}
        makes = "".join(PROJECTIONS[name] for name in found)
        if "q" in makes:
            for name, each in found.items():
                if PROJECTIONS[name] != "o" or "v" in makes:
                    yield f"{prefix}.{name}".removeprefix("."), each, PROJECTIONS[name]
            return


def read_projections(layer: nn.Module) -> Weights:
    """Weight and bias of what a layer's projections make."""
    found: Weights = {}
    for _, linear, makes in _projections(layer):
        weights = linear.weight.chunk(len(makes))
        biases = [None] * len(makes) if linear.bias is None else linear.bias.chunk(len(makes))
        found |= dict(zip(makes, zip(weights, biases, strict=True), strict=True))
    for name in BIASES:
        if isinstance(bias := getattr(layer, name, None), Tensor):
            found[name[0]] = found[name[0]][0], bias
    return {part: found[part] for part in PARTS if part in found}


@torch.no_grad()
def transfer_projections(
    old: nn.Module, new: nn.Module, head_dim: int, norms: Sequence[str] = (), keep: bool = True
) -> dict[str, list[str]]:
    """Copy what means the same from one attention to another.

    Args:
        old: attention.
        new: what gets its weights.
        head_dim: channels of a head of `old`.
        norms: names of norms of queries and keys, which are copied too.
        keep: copy at all.

    Returns:
        names of what was kept, of what is fresh in `new` and of what was dropped.
    """
    told: dict[str, list[str]] = {"kept": [], "fresh": [], "dropped": []}
    known = read_projections(old)
    frozen = {part for _, linear, makes in _projections(old) if not linear.weight.requires_grad for part in makes}
    for _, linear, makes in _projections(new):
        rows = linear.out_features // len(makes)
        for i, part in enumerate(makes):
            weight, bias = known.get(part, (None, None)) if keep else (None, None)
            if part in "kv" and weight is not None:
                weight, bias = _grouped(weight, rows, head_dim), _grouped(bias, rows, head_dim)
            if weight is None or weight.shape != (rows, linear.in_features):
                told["fresh"].append(PARTS[part])
                continue
            told["kept"].append(PARTS[part])
            linear.weight[i * rows : (i + 1) * rows] = weight
            if linear.bias is not None:
                linear.bias[i * rows : (i + 1) * rows] = 0.0 if bias is None else bias
            elif bias is not None:
                told["dropped"].append(f"bias of {PARTS[part]}")
        if makes == "o" and "o" in known and known["o"][1] is None:
            linear.bias = None
        if frozen.issuperset(makes) and told["kept"][-len(makes) :] == [PARTS[part] for part in makes]:
            linear.requires_grad_(False)
    for name in norms if keep else ():
        told["kept"].append(name)
        setattr(new, name, copy.deepcopy(getattr(old, name)))
    told["dropped"] += [PARTS[part] for part in known if PARTS[part] not in told["kept"]]
    told["dropped"] += [name for name in _others(old) if name not in told["kept"]]
    told["fresh"] += [name for name in _others(new) if name not in told["kept"]]
    return told


def _grouped(x: Tensor | None, rows: int, head_dim: int) -> Tensor | None:
    """Heads of keys or values for another number of them: means of runs, or each one several times, if that goes.

    Args:
        x: weight (heads * d, C) or bias (heads * d).
        rows: wanted.
        head_dim: channels d of a head.
    """
    if x is None or len(x) == rows or rows % head_dim or max(rows, len(x)) % min(rows, len(x)):
        return x
    heads = x.unflatten(0, (-1, head_dim))
    if rows > len(x):
        return heads.repeat_interleave(rows // len(x), 0).flatten(0, 1)
    return heads.unflatten(0, (rows // head_dim, -1)).mean(1).flatten(0, 1)


def _others(layer: nn.Module) -> list[str]:
    """Parts of a layer with parameters that are no projections."""
    projections = tuple(f"{name}." for name, _, _ in _projections(layer))
    inner = projections[0].rpartition(".")[0].rpartition(".")[0] + "." if projections else ""
    names = [name for name, _ in layer.named_parameters() if not name.startswith((*projections, *BIASES))]
    return list(dict.fromkeys(name.removeprefix(inner).partition(".")[0] for name in names))
