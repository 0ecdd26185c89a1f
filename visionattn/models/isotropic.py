"""The isotropic skeleton: tokens of one size in blocks with any mixer."""

from dataclasses import replace
from typing import Any

from timm.layers import PatchEmbed, calculate_drop_path_rates, to_2tuple
from torch import nn

from ..backbone import Isotropic
from ..registry import Family, Variant, register_family
from .mixers import Place, find_mixer
from .skeletons import (
    ORIGIN,
    RECIPE,
    Ending,
    MixerBlock,
    Skeleton,
    WeighingNorm,
    check_sides,
    head_count,
    init_mixers,
)


class IsotropicSkeleton(Ending, Skeleton, Isotropic):
    """Patches of one size, a learned position table, blocks with any mixer, norm, mean, linear head.

    Args:
        in_chans: channels of the image.
        num_classes: classes of the head, 0 for none.
        global_pool: "avg", "max", "avgmax" or "" for none.
        img_size: image size in pixels that the position table, and mixers with a number of tokens, are made for.
        patch_size: side of a patch in pixels.
        embed_dim: channels.
        depth: blocks.
        head_dim: channels of an attention head.
        native_grid: side of the map of patches at which parameters are equal and windows fit, whatever the image size.
        mixer: one of `visionattn.list_mixers()`.
        mixer_kwargs: arguments of its layer.
        mlp_ratio: hidden channels of the MLP per channel; None for what makes a block's parameters equal to those of
            one with softmax attention and a ratio of 4.
        drop_rate: dropout rate after the position embedding and before the head.
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
        patch_size: int = 16,
        embed_dim: int = 384,
        depth: int = 12,
        head_dim: int = 64,
        native_grid: int = 14,
        mixer: str = "softmax",
        mixer_kwargs: dict[str, Any] | None = None,
        mlp_ratio: float | None = None,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device=None,
        dtype=None,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        check_sides(img_size, patch_size=patch_size, native_grid=native_grid, depth=depth)
        grid = tuple(-(-size // patch_size) for size in to_2tuple(img_size))
        place = Place(head_count(embed_dim, head_dim), grid, native_grid, depth=depth)
        blocks = []
        for i, rate in enumerate(calculate_drop_path_rates(drop_path_rate, depth)):
            here = replace(place, index=i, outermost=i in (0, depth - 1))
            blocks.append(
                MixerBlock(embed_dim, mixer, here, mixer_kwargs, mlp_ratio, stride=patch_size, drop_path=rate, **dd)
            )
        self.final = find_mixer(mixer).final
        norm = WeighingNorm if self.final == "weigh" else nn.LayerNorm
        super().__init__(
            PatchEmbed(img_size, patch_size, in_chans, embed_dim, strict_img_size=False, **dd), blocks,
            norm=norm(embed_dim, 1e-6, **dd), embed_dim=embed_dim, patch_size=patch_size, img_size=img_size,
            pos_embed=True, class_token=None,
            num_classes=num_classes, in_chans=in_chans, global_pool=global_pool, drop_rate=drop_rate, **dd,
        )  # fmt: skip
        self._expect_several(mixer)
        self.apply(init_mixers)


VARIANTS = {
    "isotropic_small": Variant({}, 4.574, recipe=RECIPE),
    "isotropic_xsmall": Variant(
        {"patch_size": 4, "embed_dim": 96, "depth": 6, "head_dim": 32, "native_grid": 8, "img_size": 32}, 0.04758,
        img_size=32,
    ),
    "test_isotropic": Variant(
        {"patch_size": 8, "embed_dim": 48, "depth": 4, "head_dim": 8, "native_grid": 4, "img_size": 32}, 0.002063,
        img_size=32,
    ),
}  # fmt: skip
FAMILY = Family(
    "isotropic",
    (("An Image is Worth 16x16 Words: Transformers for Image Recognition at Scale", "2010.11929"),),
    *ORIGIN,
)
ALIASES = {"isotropic_s": "isotropic_small", "isotropic_xs": "isotropic_xsmall"}
register_family(FAMILY, IsotropicSkeleton, VARIANTS, ALIASES)
