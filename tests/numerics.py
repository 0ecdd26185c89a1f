"""Models whose every part counts, and what half precision may cost them."""

import copy

import golden
import torch
from torch import Tensor, nn


def filled(model: nn.Module) -> nn.Module:
    """`model` in eval mode with weights of the goldens' kind: outputs of about unit variance, branches that nothing
    silences. As initialised, layer scales of 1e-6 would hide what blocks do."""
    state = {
        key: torch.as_tensor(golden.fill(key, tuple(value.shape))).to(value)
        for key, value in model.state_dict().items()
    }
    model.load_state_dict(state)
    return model.eval()


def rounded_like(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """`model` in float32 with weights and the outputs of its innermost modules rounded to `dtype`."""

    def round_output(module: nn.Module, args: tuple, out: Tensor | tuple) -> Tensor | tuple:
        return out.to(dtype).float() if isinstance(out, Tensor) else out  # tables stay as they are

    model = copy.deepcopy(model).to(dtype).float()
    for module in model.modules():
        if not list(module.children()):
            module.register_forward_hook(round_output)
    return model


@torch.no_grad()
def assert_half_precision(model: nn.Module, x: Tensor, dtype: torch.dtype) -> None:
    """In `dtype`, and under autocast to it, errors are at most three times those of rounding what modules return."""
    half = copy.deepcopy(model).to(dtype)
    exact, x = copy.deepcopy(half).float(), x.to(dtype).float()
    expected = exact(x)
    bound = 3 * _rms(rounded_like(model, dtype)(x) - expected)
    out = half(x.to(dtype))
    assert out.dtype == dtype and _rms(out.float() - expected) < bound
    with torch.autocast(x.device.type, dtype):
        assert _rms(exact(x).float() - expected) < bound


def _rms(x: Tensor) -> float:
    return x.square().mean().sqrt().item()
