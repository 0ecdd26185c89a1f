"""The pyramid skeleton: maps of falling resolution in blocks with any mixer."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import torch.nn.functional as F
from timm.layers import LayerNorm2d, calculate_drop_path_rates, to_2tuple
from torch import Tensor, nn

from ..backbone import Hierarchical, Stage, check_lengths
from ..errors import VisionattnError
from ..layers.patch import PatchStem
from ..registry import Family, Variant, register_family
from .mixers import Place, find_mixer
from .skeletons import (
    ORIGIN,
    RECIPE,
    Ending,
    MixerBlock,
    Skeleton,
    WeighingNorm2d,
    check_sides,
    head_count,
    init_mixers,
)


class Downsample(nn.Module):
    """LayerNorm and a convolution of 2 x 2 patches, zero-padded at the bottom and right: to half the size.

    Args:
        dim: channels of the input.
        out_dim: channels of the output.

    Shape:
        (B, C, H, W) to (B, C', ceil(H / 2), ceil(W / 2)).
    """

    def __init__(self, dim: int, out_dim: int, device=None, dtype=None) -> None:
        super().__init__()
        self.norm = LayerNorm2d(dim, eps=1e-6, device=device, dtype=dtype)
        self.proj = nn.Conv2d(dim, out_dim, 2, 2, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(F.pad(self.norm(x), (0, x.shape[3] % 2, 0, x.shape[2] % 2)))


class FineStem(PatchStem):
    """A 3 x 3 convolution and LayerNorm, which keep the size. Arguments as for `PatchStem`."""

    def __init__(self, in_chans: int, dim: int, device=None, dtype=None, **kwargs) -> None:
        super().__init__(in_chans, dim, **kwargs, device=device, dtype=dtype)
        self.proj = nn.Conv2d(in_chans, dim, 3, padding=1, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.proj(x))


class MixerStage(Ending, Stage):
    """A stage of blocks with mixers."""


class PyramidSkeleton(Skeleton, Hierarchical):
    """Four stages of blocks on maps, each with a position convolution: local mixers in the first two, then any mixer.

    Args:
        in_chans: channels of the image.
        num_classes: classes of the head, 0 for none.
        global_pool: pooling before the head.
        img_size: image size in pixels that mixers with a number of tokens are made for.
        patch_size: side of a patch of the stem in pixels: 4, or 1 for a 3 x 3 convolution.
        embed_dims: channels of each stage.
        depths: blocks of each stage.
        head_dim: channels of an attention head.
        native_grid: side of the first stage's map at which parameters are equal and windows fit, whatever the image
            size.
        mixer: one of `visionattn.list_mixers()`.
        mixer_kwargs: arguments of its layer.
        everywhere: put the mixer in all four stages, if it may stand there.
        mlp_ratio: hidden channels of the MLP per channel; None for what makes a block's parameters equal to those of
            one with softmax attention and a ratio of 4.
        drop_rate: dropout rate before the head.
        drop_path_rate: stochastic depth rate of the last block; it grows linearly from 0.

    Raises:
        VisionattnError: if there is no such mixer, or it cannot stand there.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        img_size: int | tuple[int, int] = 224,
        patch_size: Literal[1, 4] = 4,
        embed_dims: Sequence[int] = (64, 128, 320, 512),
        depths: Sequence[int] = (2, 2, 6, 2),
        head_dim: int = 32,
        native_grid: int = 56,
        mixer: str = "softmax",
        mixer_kwargs: dict[str, Any] | None = None,
        everywhere: bool = False,
        mlp_ratio: float | None = None,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device=None,
        dtype=None,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        check_lengths(embed_dims=embed_dims, depths=depths)
        if len(depths) != 4:
            raise VisionattnError(f"expected embed_dims and depths of 4 stages, got {len(depths)}")
        check_sides(img_size, patch_size=patch_size, native_grid=native_grid)
        if everywhere and not find_mixer(mixer).everywhere:
            raise VisionattnError(f"mixer {mixer} may fill the last two stages of a pyramid, not all four")
        first = 0 if everywhere else 2
        rates = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)
        stages = []
        for i, (dim, depth) in enumerate(zip(embed_dims, depths, strict=True)):
            stride, late = patch_size * 2**i, i >= first
            grid = tuple(-(-size // stride) for size in to_2tuple(img_size))
            place = Place(head_count(dim, head_dim), grid, native_grid // 2**i, depth=depth, last_stage=i == 3)
            blocks = []
            for j, rate in enumerate(rates[i]):
                here = replace(place, index=j, outermost=(i, j) in ((first, 0), (3, depth - 1)))
                name, kwargs = (mixer, mixer_kwargs) if late else ("dw7", None)
                block = MixerBlock(dim, name, here, kwargs, mlp_ratio, True, stride, drop_path=rate, **dd)
                blocks.append(block)
            downsample = Downsample(embed_dims[i - 1], dim, **dd) if i else None
            stages.append(MixerStage(blocks, dim, downsample=downsample))
            stages[i].final = find_mixer(name).final
            if stages[i].final == "weigh" and i < 3:
                stages[i].final = ""
        norm = WeighingNorm2d if stages[3].final == "weigh" else LayerNorm2d
        stem = PatchStem if patch_size == 4 else FineStem
        super().__init__(
            stem(in_chans, embed_dims[0], norm_eps=1e-6, **dd), stages, norm=norm(embed_dims[-1], eps=1e-6, **dd),
            num_classes=num_classes, in_chans=in_chans, global_pool=global_pool, drop_rate=drop_rate,
            reductions=[patch_size * 2**i for i in range(4)], **dd,
        )  # fmt: skip
        self._expect_several(mixer)
        self.apply(init_mixers)


VARIANTS = {
    "pyramid_small": Variant({}, 2.632, recipe=RECIPE),
    "pyramid_xsmall": Variant(
        {
            "patch_size": 1, "embed_dims": (32, 64, 128, 256), "depths": (1, 1, 4, 1), "native_grid": 32,
            "img_size": 32,
        },
        0.1007, img_size=32,
    ),
    "test_pyramid": Variant(
        {
            "embed_dims": (16, 32, 48, 64), "depths": (1, 1, 2, 1), "head_dim": 8, "native_grid": 8, "img_size": 32,
        },
        0.000869, img_size=32,
    ),
}  # fmt: skip
FAMILY = Family("pyramid", (("Conditional Positional Encodings for Vision Transformers", "2102.10882"),), *ORIGIN)
ALIASES = {"pyramid_s": "pyramid_small", "pyramid_xs": "pyramid_xsmall"}
register_family(FAMILY, PyramidSkeleton, VARIANTS, ALIASES)
