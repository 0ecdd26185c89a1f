"""timm's feature extractors (`features_only=True`) with what some lack: gradient checkpointing, layouts, order."""

from collections.abc import Sequence
from typing import Any

from timm.layers import nchw_to
from timm.models._features import FeatureDictNet, FeatureGetterNet, FeatureHookNet, FeatureListNet
from timm.models._features_fx import FeatureGraphNet
from torch import Tensor

from ..errors import VisionattnError
from .base import Backbone, check_output_format
from .hierarchical import Stage, first_channels
from .isotropic import Isotropic


class _Extractor:
    """What ours do differently from timm's.

    Args:
        model: to take features from.
        out_indices: the last n features if an int, or which; they come in the order of the model's.
        output_fmt: layout of the features.
        **kwargs: of timm's extractor.

    Raises:
        VisionattnError: if there are no such features, or not in such a layout.
    """

    def __init__(self, model: Backbone, out_indices: int | Sequence[int], output_fmt: str = "NCHW", **kwargs) -> None:
        check_output_format(output_fmt)
        super().__init__(model, out_indices=_in_order(model, out_indices), output_fmt=output_fmt, **kwargs)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the activations of the blocks in the backward pass instead of keeping them.

        Raises:
            VisionattnError: if the blocks are gone, as in a graph.
        """
        parts = [module for module in self.modules() if isinstance(module, Stage | Isotropic)]
        if not parts:
            raise VisionattnError("features by feature_cls 'fx' cannot be recomputed: choose 'getter'")
        for part in parts:
            part.grad_checkpointing = enable


class _OfOutputs(_Extractor):
    """Features are the outputs of modules: maps of stages, but sequences with a class token of the blocks of others."""

    def __init__(self, model: Backbone, out_indices: int | Sequence[int], output_fmt: str = "NCHW", **kwargs) -> None:
        sequences = isinstance(model, Isotropic) and (output_fmt != "NCHW" or isinstance(self, FeatureDictNet))
        if sequences or getattr(model, "feature_norms", None) is not None:
            raise VisionattnError(f"{model.check.name} makes such features by feature_cls 'getter' alone")
        super().__init__(model, out_indices, output_fmt, **kwargs)

    def forward(self, x: Tensor) -> list[Tensor] | dict[str, Tensor]:
        out = super().forward(x)
        maps, channels = out.values() if isinstance(out, dict) else out, self.feature_info.channels()
        maps = [first_channels(feature, count) for feature, count in zip(maps, channels, strict=True)]
        maps = [nchw_to(feature, self.output_fmt) for feature in maps]
        return dict(zip(out, maps, strict=True)) if isinstance(out, dict) else maps


class FeatureGetter(_Extractor, FeatureGetterNet):
    """Features by `forward_intermediates`."""


class FeatureList(_OfOutputs, FeatureListNet):
    """Features in a list, by the stages alone."""


class FeatureDict(_OfOutputs, FeatureDictNet):
    """Features by their numbers as text."""


class FeatureHooks(_OfOutputs, FeatureHookNet):
    """Features by hooks of the whole model."""


class FeatureGraph(_OfOutputs, FeatureGraphNet):
    """Features by symbolic tracing."""


EXTRACTORS = {
    "getter": FeatureGetter,
    "list": FeatureList,
    "dict": FeatureDict,
    "hook": FeatureHooks,
    "fx": FeatureGraph,
}


def extractor_class(feature_cls: Any) -> Any:
    """The extractor of that name, or a class as it is.

    Raises:
        VisionattnError: if there is no such extractor.
    """
    if not isinstance(feature_cls, str):
        return feature_cls
    if feature_cls.lower() not in EXTRACTORS:
        raise VisionattnError(f"expected feature_cls one of {', '.join(EXTRACTORS)}, got {feature_cls!r}")
    return EXTRACTORS[feature_cls.lower()]


def _in_order(model: Backbone, out_indices: int | Sequence[int]) -> list[int]:
    depth = len(model.feature_info)
    indices = range(-out_indices, 0) if isinstance(out_indices, int) else out_indices
    if not len(indices) or any(not isinstance(i, int) or not -depth <= i < depth for i in indices):
        raise VisionattnError(f"{model.check.name} has features 0 to {depth - 1}, got out_indices {out_indices}")
    return list({i % depth: i for i in sorted(indices, key=lambda i: i % depth)}.values())
