"""Parity of blocks alone with outputs recorded from the published code, or from the equations of their papers."""

from collections.abc import Callable
from pathlib import Path

import golden
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from visionattn import layers
from visionattn.weights import convert_state_dict

GOLDENS = sorted((Path(__file__).parent / "goldens" / "mixers").glob("*.npz"))


def _reversed(layer: layers.ReversedAttention, x: Tensor, given: dict[str, Tensor]) -> dict[str, Tensor]:
    return dict(zip(("output", "message_out", "dependency"), layer(x, return_dependency=True), strict=True))


def _key_driven(layer: layers.KeyDrivenGQA, x: Tensor, given: dict[str, Tensor]) -> dict[str, Tensor]:
    found = {"output": layer(x, noise=given.get("noise"))}
    if layer.kind == "kdgqa":
        found["allocation"] = layer.allocate(layer.heads(x)[1])[0]
    elif "cache_out" in given:
        found |= {"allocation": layer.allocation, "cache_out": layer.cache}
    return found


MORE: dict[str, Callable[[nn.Module, Tensor, dict], dict[str, Tensor]]] = {
    "KeyDrivenGQA": _key_driven,
    "ReversedAttention": _reversed,
}
"""By a block's class: what it gives besides its output, by the names of a file's arrays, from the block, its input and
these arrays as tensors; a block that takes one of them returns its output here as "output"."""


@pytest.mark.parametrize("path", GOLDENS, ids=lambda path: path.stem)
def test_parity(path):
    meta, arrays = golden.load(path)
    block, kwargs = meta["create"]["layer"], meta["create"]["kwargs"]
    published = golden.fill_state_dict(meta["keys"])
    for dtype in (torch.float32, torch.float64):
        layer = getattr(layers, block)(**kwargs).eval()
        layer.load_state_dict(convert_state_dict(published, layer), strict=True)
        assert sum(p.numel() for p in layer.parameters()) == meta["num_params"]
        tolerance = meta["tolerance"][str(dtype).removeprefix("torch.")]
        x = torch.from_numpy(golden.fixed_input(tuple(meta["input_shape"]))).to(dtype)
        given = {name: torch.from_numpy(array) for name, array in arrays.items()}
        with torch.no_grad():
            layer = layer.to(dtype)
            found = MORE[block](layer, x, given) if block in MORE else {"output": layer(x)}
        assert found.keys() <= given.keys()
        for name, array in found.items():
            error = np.abs(array.numpy() - arrays[name]).max()
            assert error <= tolerance * np.abs(arrays[name]).max(), (name, dtype, error)
