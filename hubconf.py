"""torch.hub entry points: every registered model by its name, with the arguments of `visionattn.create_model`."""

from functools import partial as _partial

import visionattn as _visionattn

dependencies = ["torch", "timm", "safetensors", "huggingface_hub"]


def _entry(_name):
    entry = _partial(_visionattn.create_model, _name)
    entry.__doc__ = f"{_name}; the arguments are those of visionattn.create_model after the name."
    return entry


globals().update({_name: _entry(_name) for _name in _visionattn.list_models()})
