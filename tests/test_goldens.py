"""Parity with outputs recorded from the published code."""

from pathlib import Path

import golden
import numpy as np
import pytest
import torch

import visionattn
from visionattn.backbone import Isotropic
from visionattn.weights import convert_state_dict

NO_MODELS = ("mixers", "methods")
GOLDENS = sorted(p for p in (Path(__file__).parent / "goldens").glob("*/*.npz") if p.parent.name not in NO_MODELS)


LARGE = (
    "focalnet_large_fl4-224x224", "davit_base_fl-224x224.timm", "moh_vit_small_75", "moh_vit_small_75-160x256",
    "sgformer_s-224x448", "overlock_xt-160x224", "van_b2-192x256", "hornet_small_gf-192x256", "hornet_tiny_7x7-ls0",
)  # fmt: skip


@pytest.mark.parametrize(
    "path", [pytest.param(p, id=p.stem, marks=[pytest.mark.slow] if p.stem in LARGE else []) for p in GOLDENS]
)
def test_parity(path):
    meta, arrays = golden.load(path)
    model = visionattn.create_model(meta["create"]["name"], **meta["create"]["kwargs"]).eval()
    state_dict = convert_state_dict(golden.fill_state_dict(meta["keys"]), model)
    model.load_state_dict(state_dict, strict=True)
    for dtype in (torch.float32, torch.float64):
        tolerance = meta["tolerance"][str(dtype).removeprefix("torch.")]
        if tolerance is None:  # a selection turns on ties
            continue
        model.to(dtype)
        x = torch.from_numpy(golden.fixed_input(tuple(meta["input_shape"]))).to(dtype)
        with torch.no_grad():
            features, stages = model.forward_intermediates(x)
            if isinstance(model, Isotropic):  # recorded as the patches after the final norm
                stages = model.forward_intermediates(x, indices=1, norm=True, intermediates_only=True)
            found = {"logits": model.forward_head(features)}
        found |= {f"feat_{i}": stage[:, ::8, ::2, ::2] for i, stage in enumerate(stages)}
        for name, expected in arrays.items():
            if name.startswith("extra_"):  # the family's own tests look at these
                continue
            error = np.abs(found[name].numpy() - expected).max()
            assert error <= tolerance * np.abs(expected).max(), (name, dtype, error)


@pytest.mark.parametrize("path", GOLDENS, ids=lambda path: path.stem)
def test_parameter_count(path):
    meta, _ = golden.load(path)
    with torch.device("meta"):
        model = visionattn.create_model(meta["create"]["name"], **meta["create"]["kwargs"])
    unused = sum(int(np.prod(shape)) for name, shape, _ in meta["keys"] if name.startswith("van.layernorm."))
    assert sum(p.numel() for p in model.parameters()) == meta["num_params"] - unused
