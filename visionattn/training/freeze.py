"""Parts of a model that do not learn."""

import re

from torch import nn

from ..errors import VisionattnError


def freeze(model: nn.Module, parts: tuple[str, ...]) -> list[nn.Module]:
    """Keep parameters as they are.

    Args:
        model: Model to freeze in part.
        parts: Names of modules or parameters, "blocks.0-5" for a range; "backbone" for all but the head and the dropout
            before it.

    Returns:
        The frozen modules, which must stay in eval mode for their batch norms to keep their statistics.

    Raises:
        VisionattnError: If a part does not exist, or nothing is left to learn.
    """
    modules, parameters = dict(model.named_modules()), dict(model.named_parameters())
    frozen = []
    for part in parts:
        for name in _backbone(model) if part == "backbone" else _expand(part):
            if name not in modules and name not in parameters or not name:
                known = ", ".join(dict.fromkeys(name.partition(".")[0] for name in parameters))
                raise VisionattnError(f"freeze: the model has no {name}; its parts are {known}")
            if name in modules:
                frozen.append(modules[name].requires_grad_(False))
            else:
                parameters[name].requires_grad_(False)
    if not any(p.requires_grad for p in model.parameters()):
        raise VisionattnError(f"freeze: [{', '.join(parts)}] leaves nothing to learn")
    return frozen


def _backbone(model: nn.Module) -> list[str]:
    """Names of what is under a head for detection or segmentation, or of all at the top but a classifier and the
    dropout before it."""
    if hasattr(model, "backbone_name"):
        return [model.backbone_name]
    heads = getattr(model, "classifier", ())
    heads = ("head_drop", *((heads,) if isinstance(heads, str) else heads))
    names = [name for name, _ in model.named_children()] + [name for name, _ in model.named_parameters(recurse=False)]
    return [name for name in names if name not in heads]


def _expand(part: str) -> list[str]:
    """ "blocks.0-2" as blocks.0, blocks.1, blocks.2."""
    numbers = re.search(r"(\d+)-(\d+)", part)
    if numbers is None:
        return [part]
    inside = range(int(numbers[1]), int(numbers[2]) + 1)
    return [part[: numbers.start()] + str(i) + part[numbers.end() :] for i in inside]
