"""Every mixer in both skeletons: it learns, at any size if its own is free; blocks are of equal size; states travel."""

from pathlib import Path

import pytest
import torch
from test_open_sizes import DYNAMIC, agrees
from test_trainer_overfit import fits_digits

import visionattn
from visionattn.errors import UnknownArgumentError, UnknownModelError, VisionattnError
from visionattn.models.mixers import MIXERS, Place
from visionattn.models.skeletons import MixerBlock

EVERY = visionattn.list_mixers()
SIZES = {  # the XS models, tiny; heads of few channels, as some mixers want an even number of them
    "isotropic_xsmall": {"embed_dim": 48, "depth": 4, "head_dim": 8},
    "pyramid_xsmall": {"embed_dims": (16, 16, 48, 64), "depths": (1, 1, 2, 1), "head_dim": 8},
}
CONTROLS = ("activator", "none")
"""Mixers that mix nothing."""
FROZEN = ".predictor."
PLACES = {384: Place(6), 320: Place(10), 512: Place(16, (7, 7), 7), 96: Place(6, (8, 8), 8)}
"""Channels of the table of hidden widths, and where there."""
HIDDEN = {
    **dict.fromkeys(("softmax", "flow", "cog", "selective", "log_normal", "gpsa"), (1536, 1280, 2048, 384)),
    "norm_aware": (1328, 1104, 1776, 320),
    "mixer_gate": (952, 728, 1688, 208),
    "activator": (1152, 960, 1536, 288),
    "reversed": (1440, 1192, 1912, 360),
    "optimised": (1728, 1440, 2304, 432),
    "efficient": (1920, 1600, 2560, 480),
    "super": (1872, 1544, 2560, 456),
    "kdgqa": (1728, 1440, 2304, 432),
    "dw7": (2088, 1736, 2792, 504),
    "polarized_parallel": (1704, 1416, 2280, 408),
    "polarized_sequential": (1760, 1464, 2360, 424),
    "subspace": (2088, 1736, 2792, 504),
    "lka": (1688, 1400, 2264, 392),
    "focal": (1520, 1264, 2032, 368),
    "atconv": (1728, 1440, 2304, 432),
    "hilo": (1632, 1360, 2176, 408),
    "gnconv": (1552, 1288, 2088, 352),  # the design says 1560, of 1008 parameters less than HorNet's layer has
}


def tiny(model, mixer, **kwargs):
    torch.manual_seed(0)
    return visionattn.create_model(model, num_classes=10, mixer=mixer, **SIZES[model] | kwargs)


def alive(model):
    """With every branch alive: some mixers begin with zeros."""
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return model


@pytest.mark.parametrize("model", SIZES)
@pytest.mark.parametrize("mixer", EVERY)
def test_every_mixer_stands_in_both_skeletons(mixer, model):
    network = alive(tiny(model, mixer)).train()
    x = torch.randn(2, 3, 32, 32)
    logits = network(x)
    network.training_loss(logits.square().sum(), x, logits).backward()
    without = [n for n, p in network.named_parameters() if p.grad is None or not p.grad.any()]
    assert [n for n in without if FROZEN not in n] == []
    if MIXERS[mixer].fixed:
        with pytest.raises(ValueError, match=r"tokens?"):
            network.eval()(torch.randn(1, 3, 97, 61))
    else:
        assert network.eval()(torch.randn(1, 3, 97, 61)).shape == (1, 10)


@pytest.mark.parametrize("mixer", HIDDEN)
def test_hidden_widths_are_those_of_the_design(mixer):
    blocks = [MixerBlock(dim, mixer, place, device="meta") for dim, place in PLACES.items()]
    assert tuple(block.mlp.fc1.out_features for block in blocks) == HIDDEN[mixer]


@pytest.mark.parametrize("model", SIZES)
def test_parameters_are_equal(model):
    """Within 3 % of softmax attention's in every block, which the block asserts, and in total."""
    with torch.device("meta"):
        totals = {
            m: sum(p.numel() for p in visionattn.create_model(model, mixer=m, head_dim=16).parameters()) for m in EVERY
        }
    assert max(totals.values()) < 1.03 * totals["softmax"] and min(totals.values()) > 0.97 * totals["softmax"]
    same_mlp = visionattn.create_model(model, mixer="none", mlp_ratio=4.0)
    assert sum(p.numel() for p in same_mlp.parameters()) < 0.8 * totals["softmax"]
