"""Flowformer: a pyramid on attention by conservation of flow.

"Flowformer: Linearizing Transformers with Conservation Flows", arXiv 2202.06258. At every resolution all places attend
to all, at a cost linear in their number; positions come from one learned table at the first.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch.nn.functional as F
from timm.layers import LayerNorm2d, LayerScale, calculate_drop_path_rates, to_2tuple
from torch import Tensor, nn

from ..backbone import Hierarchical, Stage, check_lengths
from ..layers import FlowAttention
from ..layers.block import Block
from ..layers.init import init_weights
from ..layers.pointwise import Mlp
from ..layers.position import PositionEmbedding, fit_positions
from ..layers.symbolic import is_symbolic
from ..registry import Family, Variant, Weights, register_family

RULES = [
    (r"^pos_embed$", "stem.pos_embed.weight"),
    (r"^patch_embed\.0\.", "stem."),
    (r"^patch_embed\.(\d)\.", r"stages.\1.downsample."),
    (r"^blocks\.(\d)\.(\d+)\.", r"stages.\1.blocks.\2."),
    (r"\.attn\.", ".mixer."),
    (r"\.gamma$", ".ls2.gamma"),
]
PATCH = 4
"""Side of the patches of the stem in pixels."""


class PatchEmbed(nn.Module):
    """Convolution of patches side by side, of the map with zeros at the bottom and right up to whole patches.

    No patch is of zeros alone, so that attention need not be told of them.

    Args:
        in_chans: channels of the input.
        dim: channels of the output.
        size: of a patch.

    Shape:
        (B, C_in, H, W) to (B, C_out, ceil(H / size), ceil(W / size)).
    """

    def __init__(self, in_chans: int, dim: int, size: int, device=None, dtype=None) -> None:
        super().__init__()
        self.size = size
        self.proj = nn.Conv2d(in_chans, dim, size, size, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        pad_h, pad_w = -x.shape[2] % self.size, -x.shape[3] % self.size
        if is_symbolic(pad_h, pad_w):
            pad_h = pad_w = self.size - 1  # the same in simpler sizes: what makes no whole patch is left out
        return self.proj(F.pad(x, (0, pad_w, 0, pad_h)))


class Stem(PatchEmbed):
    """`PatchEmbed` and a learned position table, resampled for images of another size than `img_size`."""

    def __init__(self, in_chans: int, dim: int, img_size: int | tuple[int, int], device=None, dtype=None) -> None:
        super().__init__(in_chans, dim, PATCH, device, dtype)
        grid = tuple(-(-length // PATCH) for length in to_2tuple(img_size))
        self.pos_embed = PositionEmbedding(grid, dim, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x).permute(0, 2, 3, 1)
        grid = x.shape[1:3]
        return self.pos_embed(x.flatten(1, 2), grid).unflatten(1, grid).permute(0, 3, 1, 2)


class FlowBlock(Block):
    """`Block` with a layer scale of the MLP alone."""

    def __init__(self, dim: int, mixer: nn.Module, mlp: nn.Module, scale: float, device=None, dtype=None, **kwargs):
        dd = {"device": device, "dtype": dtype}
        super().__init__(dim, mixer, mlp, norm_layer=partial(nn.LayerNorm, eps=1e-6), **kwargs, **dd)
        self.ls2 = LayerScale(dim, scale, **dd)


class Flowformer(Hierarchical):
    """Flowformer.

    Args:
        in_chans: channels of the image.
        num_classes: classes of the head, 0 for none.
        global_pool: pooling before the head.
        img_size: image size in pixels that the position table is made for.
        embed_dims: channels of each stage.
        depths: blocks of each stage.
        num_heads: attention heads of every stage.
        mlp_ratio: hidden channels of the MLP per channel.
        qkv_bias: bias of the query, key and value projections.
        layer_scale: initial layer scale of the MLPs.
        drop_rate: dropout rate of the MLPs and the head.
        drop_path_rate: stochastic depth rate of the last block; it grows linearly from 0.

    Raises:
        VisionattnError: if the arguments of the stages are not of one length.
    """

    layouts = {"official": RULES}
    feature_norm = staticmethod(partial(LayerNorm2d, eps=1e-6))  # that of the blocks; none is published
    patch_size = PATCH

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        img_size: int | tuple[int, int] = 224,
        embed_dims: Sequence[int] = (96, 192, 384, 768),
        depths: Sequence[int] = (3, 3, 10, 3),
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        layer_scale: float = 1e-5,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device=None,
        dtype=None,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        check_lengths(embed_dims=embed_dims, depths=depths)
        rates = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)
        stages = []
        for i, dim in enumerate(embed_dims):
            blocks = [
                FlowBlock(
                    dim,
                    FlowAttention(dim, num_heads, qkv_bias, **dd),
                    Mlp(dim, int(dim * mlp_ratio), drop=drop_rate, **dd),
                    layer_scale,
                    drop_path=rate,
                    **dd,
                )
                for rate in rates[i]
            ]
            downsample = PatchEmbed(embed_dims[i - 1], dim, 2, **dd) if i else None
            stages.append(Stage(blocks, dim, downsample=downsample))
        super().__init__(
            Stem(in_chans, embed_dims[0], img_size, **dd), stages, norm=LayerNorm2d(embed_dims[-1], eps=1e-6, **dd),
            num_classes=num_classes, in_chans=in_chans, global_pool=global_pool, drop_rate=drop_rate, **dd,
        )  # fmt: skip
        self.grid_size = self.stem.pos_embed.grid_size
        self.apply(init_weights)

    def no_weight_decay(self) -> set[str]:
        """Names of parameters without weight decay, besides those with one dimension."""
        return {"stem.pos_embed.weight"}

    def adapt_state_dict(self, state_dict: dict[str, Tensor], made_for: Mapping[str, Any]) -> dict[str, Tensor]:
        """Resamples a position table that was made for images of another size."""
        state_dict = super().adapt_state_dict(state_dict, made_for)
        key = "stem.pos_embed.weight"
        if key not in state_dict:
            return state_dict
        table = fit_positions(state_dict[key], self.stem.pos_embed, PATCH, made_for.get("img_size"))
        return state_dict | {key: table}


VARIANTS = {
    "flowformer": Variant(
        {}, 6.870, {"in1k": Weights(top1=80.6, note="not released")}, {"drop_path_rate": 0.2, "re_prob": 0.0}
    ),
    "test_flowformer": Variant(
        {"embed_dims": (16, 32, 48, 64), "depths": (1, 1, 2, 1), "num_heads": 4, "img_size": 32}, 0.000874, img_size=32
    ),
}
FAMILY = Family(
    "flowformer",
    (("Flowformer: Linearizing Transformers with Conservation Flows", "2202.06258"),),
    "https://github.com/thuml/Flowformer",
    "mit",
)
register_family(FAMILY, Flowformer, VARIANTS)
