"""OverLoCK: what its specification states beyond the common tests."""

import golden
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import visionattn
from visionattn.layers import ContMix2d, ContMixBlock, DilatedReparamConv2d, dynamic_conv2d
from visionattn.layers.dilated_reparam import BRANCHES
from visionattn.models.overlock import RULES
from visionattn.weights import convert_state_dict
from visionattn.weights.inverse import published_name

# Published arguments; input, parameters, first values, last values, mean of absolute values.
ALONE = [
    (
        {"dim": 32}, (2, 32, 10, 12), 25516, [1.470221, -1.136615, 0.851963, 1.626593],
        [-1.836435, 0.991389, 0.280896], 1.615788,
    ),
    (
        {"dim": 32, "res_scale": True, "ls_init_value": 1}, (2, 32, 10, 12), 25644,
        [0.760640, -0.581548, 1.224424, 0.378503], [-0.290464, -2.277821, -1.022427], 1.193136,
    ),
    (
        {"dim": 32, "ls_init_value": 1}, (2, 32, 10, 12), 25644, [1.655469, -0.898159, 1.097838, 0.596658],
        [0.791484, 3.289846, -0.839617], 1.591503,
    ),
    (
        {"dim": 48, "kernel_size": 13, "num_heads": 3, "mlp_ratio": 3}, (2, 48, 5, 9), 60560,
        [0.848894, -1.511224, -1.324058, 1.129829], [2.383523, 1.054120, 2.587514], 1.664070,
    ),
]  # fmt: skip


class Alone(nn.Module):
    """The stand-alone block where the network has its own, for whose names there are rules."""

    layouts = {"official": RULES}

    def __init__(self, block):
        super().__init__()
        self.stages = nn.ModuleDict({"2": nn.ModuleDict({"blocks": nn.ModuleList([block])})})


def published_state(block):
    """The tensors of the goldens' rule for the published names of a block: those of the network's, but for two."""
    state = {}
    for name, value in Alone(block).state_dict().items():
        theirs = published_name(RULES, name)
        shape = tuple(value.shape)
        if name.endswith(FLAT) and ".se." not in name:
            shape += (1, 1)
        alone = theirs.removeprefix("sub_blocks3.0.").replace("dyconv_proj", "fusion_proj")
        filled = golden.fill_state_dict([[alone, shape, str(value.dtype).removeprefix("torch.")]])[alone]
        state[theirs] = filled
    return state


FLAT = tuple(f"{part}.weight" for part in (
    "q.proj", "k.proj", "v.proj", "taps", "gate.proj", "mix_proj.proj", "mixer.proj", "fc1", "fc2"
))  # fmt: skip


@pytest.mark.parametrize("kwargs, shape, params, first, last, mean", ALONE)
def test_block_alone(kwargs, shape, params, first, last, mean):
    block = ContMixBlock(**kwargs).eval()
    assert sum(p.numel() for p in block.parameters()) == params
    holder = Alone(block)
    holder.load_state_dict(convert_state_dict(published_state(block), holder))
    with torch.no_grad():
        out = block.double()(torch.from_numpy(golden.fixed_input(shape)))
    torch.testing.assert_close(out[0, 0, 0, :4], torch.tensor(first, dtype=out.dtype), rtol=0, atol=1e-6)
    torch.testing.assert_close(out[1, -1, -1, -3:], torch.tensor(last, dtype=out.dtype), rtol=0, atol=1e-6)
    assert abs(out.abs().mean().item() - mean) < 1e-6
