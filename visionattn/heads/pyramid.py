"""Maps of several resolutions from any backbone, and what a model over a backbone passes on to it."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from timm.layers import LayerNorm2d
from torch import Tensor, nn

from ..backbone import Backbone, Isotropic, Mechanics
from ..errors import VisionattnError

STRIDES = (4, 8, 16, 32)


def by_size(images: Sequence[Tensor]) -> list[list[int]]:
    """Numbers of the images, those of one size together: none is to be padded for the sake of another."""
    groups: dict[torch.Size, list[int]] = {}
    for i, image in enumerate(images):
        groups.setdefault(image.shape, []).append(i)
    return list(groups.values())


class SimplePyramid(nn.Module):
    """Maps of several strides from a single one, by deconvolutions and max pooling.

    "Exploring Plain Vision Transformer Backbones for Object Detection", arXiv 2203.16527. The paper's 1 x 1 and 3 x 3
    convolutions after these belong to the heads' own pyramids here.

    Args:
        dim: channels C of the map.
        stride: of the map.
        strides: of the maps to make, the coarsest last.

    Attributes:
        channels: of the maps, C for strides from `stride` up and half of those for each doubling of the resolution.

    Shape:
        (B, C, H, W) to a list of (B, C_i, H * stride / strides[i], W * stride / strides[i]).

    Raises:
        VisionattnError: if the map is coarser than those to make, or a stride is not a power of 2 away.
    """

    def __init__(self, dim: int, stride: int, strides: Sequence[int]) -> None:
        super().__init__()
        self.channels, self.scales = [], nn.ModuleList()
        for target in strides:
            doublings = math.log2(stride / target)
            if doublings % 1 or stride > strides[-1]:
                raise VisionattnError(f"expected a patch_size of 2, 4, 8, 16 or 32, got {stride}")
            layers, width = [], dim
            for i in range(int(doublings)):
                if i:
                    layers += [LayerNorm2d(width), nn.GELU()]
                layers.append(nn.ConvTranspose2d(width, width // 2, 2, 2))
                width //= 2
            if doublings < 0:
                layers.append(nn.MaxPool2d(2 ** -int(doublings)))
            self.scales.append(nn.Sequential(*layers))
            self.channels.append(width)

    def forward(self, x: Tensor) -> list[Tensor]:
        return [scale(x) for scale in self.scales]


class FeatureMaps(nn.Module):
    """The maps that a head for dense prediction takes from a backbone.

    Those of a hierarchical backbone are its stages' outputs, normalised as in the family's published models for dense
    prediction. Those of an isotropic one are made from its last block's normalised patches by a `SimplePyramid`.

    Args:
        backbone: what makes the features. Its head, and stages that are not needed, are removed.
        strides: of the maps.

    Attributes:
        channels: of the maps.

    Shape:
        (B, C, H, W) with H and W multiples of 32 to a list of (B, C_i, H / strides[i], W / strides[i]).
    """

    def __init__(self, backbone: Backbone, strides: Sequence[int]) -> None:
        super().__init__()
        self.backbone, self.pyramid = backbone, None
        reductions = [info["reduction"] for info in backbone.feature_info]
        if isinstance(backbone, Isotropic):
            self.pyramid = SimplePyramid(backbone.num_features, backbone.patch_size, strides)
            self.channels, self.indices = self.pyramid.channels, [len(reductions) - 1]
        elif set(strides) <= set(reductions):
            self.indices = [reductions.index(stride) for stride in strides]
            self.channels = [backbone.feature_info[i]["num_chs"] for i in self.indices]
        else:
            hint = ": make it with patch_size=4" if reductions[0] == 1 else ""
            raise VisionattnError(
                f"expected a backbone with maps of strides {strides}, got one with {reductions}{hint}"
            )
        backbone.prune_intermediate_layers(self.indices, prune_norm=self.pyramid is None)

    def forward(self, x: Tensor) -> list[Tensor]:
        final_norm = self.pyramid is not None
        maps = self.backbone.forward_intermediates(x, self.indices, norm=final_norm, intermediates_only=True)
        return maps if self.pyramid is None else self.pyramid(maps[0])


class OverBackbone(Mechanics):
    """What a training script asks of a model, answered by the backbone inside.

    Attributes:
        backbone_name: name of the backbone among the modules.
    """

    backbone_name: ClassVar[str]

    @property
    def inner(self) -> Backbone:
        """The backbone."""
        return self.get_submodule(self.backbone_name)

    @property
    def pretrained_cfg(self) -> dict:
        """timm's description of the backbone's weights, for how to prepare images."""
        return self.inner.pretrained_cfg

    @property
    def in_chans(self) -> int:
        """Channels of the images."""
        return self.inner.in_chans

    def adapt_state_dict(self, state_dict: dict[str, Tensor], made_for: Mapping[str, Any]) -> dict[str, Tensor]:
        """Makes the backbone's part of a state dict fit; see `Backbone.adapt_state_dict`."""
        prefix = f"{self.backbone_name}."
        inside = {k.removeprefix(prefix): v for k, v in state_dict.items() if k.startswith(prefix)}
        adapted = {prefix + k: v for k, v in self.inner.adapt_state_dict(inside, made_for).items()}
        return {k: v for k, v in state_dict.items() if not k.startswith(prefix)} | adapted

    def no_weight_decay(self) -> set[str]:
        """Names of parameters without weight decay, besides those with one dimension."""
        return {f"{self.backbone_name}.{name}" for name in self.inner.no_weight_decay()}

    def group_matcher(self, coarse: bool = False) -> dict:
        """Patterns that group parameters by depth, for layer-wise learning rates: the backbone's groups, then one."""

        def within(pattern: str) -> str:
            return rf"^{re.escape(self.backbone_name)}\.(?:{pattern.replace('^', '')})"

        return {
            group: within(patterns) if isinstance(patterns, str) else [(within(p), depth) for p, depth in patterns]
            for group, patterns in self.inner.group_matcher(coarse).items()
        }

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the backbone's activations in the backward pass instead of keeping them."""
        self.inner.set_grad_checkpointing(enable)

    def learning_rates(self) -> dict[str, float]:
        """Factors on the peak learning rate by pattern of names; see `Mechanics.learning_rates`."""
        return {f"{self.backbone_name}.{name}": factor for name, factor in self.inner.learning_rates().items()}

    def advance(self, epoch: float) -> None:
        """Follow the backbone's own schedules; see `Mechanics.advance`."""
        self.inner.advance(epoch)
