"""A feature pyramid of one's own over the maps of any backbone.

python examples/own_fpn.py [van_b0]
"""

import sys

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import visionattn


class Pyramid(nn.Module):
    """Maps of one width at all strides of a backbone: each its own, by a product, and the next coarser one's.

    Args:
        backbone: made with `features_only=True`.
        dim: channels of the maps.

    Shape:
        (B, 3, H, W) to maps (B, dim, H / stride, W / stride), rounded up.
    """

    def __init__(self, backbone: nn.Module, dim: int = 128) -> None:
        super().__init__()
        self.backbone = backbone
        widths = backbone.feature_info.channels()
        self.inner = nn.ModuleList(nn.Conv2d(width, dim, 1) for width in widths)
        self.outer = nn.ModuleList(nn.Conv2d(dim, dim, 3, padding=1) for _ in widths)

    def forward(self, images: Tensor) -> list[Tensor]:
        maps = [inner(map) for inner, map in zip(self.inner, self.backbone(images), strict=True)]
        for i in reversed(range(len(maps) - 1)):
            maps[i] = maps[i] + F.interpolate(maps[i + 1], maps[i].shape[2:], mode="nearest")
        return [outer(map) for outer, map in zip(self.outer, maps, strict=True)]


def main() -> None:
    name = sys.argv[1] if len(sys.argv) > 1 else "van_b0"
    pyramid = Pyramid(visionattn.create_model(name, features_only=True)).eval()
    with torch.inference_mode():
        for stride, map in zip(
            pyramid.backbone.feature_info.reduction(), pyramid(torch.randn(1, 3, 200, 333)), strict=True
        ):
            print(f"stride {stride}: {tuple(map.shape)}")


if __name__ == "__main__":
    main()
