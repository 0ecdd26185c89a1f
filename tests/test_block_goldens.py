"""Parity of blocks alone with outputs recorded from the published code, or from the equations of their papers."""

from pathlib import Path

import golden
import numpy as np
import pytest
import torch

from visionattn.layers import FlowAttention, NormAwareLinearAttention
from visionattn.weights import convert_state_dict

GOLDENS = sorted((Path(__file__).parent / "goldens" / "mixers").glob("*.npz"))
BLOCKS = {
    "flow": (FlowAttention, {}),
    "nala": (NormAwareLinearAttention, {}),
}
"""By the beginning of a file's name: the block, and what it calls arguments that have another name in the file."""


@pytest.mark.parametrize("path", GOLDENS, ids=lambda path: path.stem)
def test_parity(path):
    meta, arrays = golden.load(path)
    (block, names) = next(entry for start, entry in BLOCKS.items() if path.stem.startswith(start))
    layer = block(**{names.get(key, key): value for key, value in meta["create"]["kwargs"].items()}).eval()
    published = golden.fill_state_dict(meta["keys"])
    layer.load_state_dict(convert_state_dict(published, layer), strict=True)
    assert sum(p.numel() for p in layer.parameters()) == meta["num_params"]
    for dtype in (torch.float32, torch.float64):
        tolerance = meta["tolerance"][str(dtype).removeprefix("torch.")]
        x = torch.from_numpy(golden.fixed_input(tuple(meta["input_shape"]))).to(dtype)
        with torch.no_grad():
            found = layer.to(dtype)(x)
        error = np.abs(found.numpy() - arrays["output"]).max()
        assert error <= tolerance * np.abs(arrays["output"]).max(), (dtype, error)
