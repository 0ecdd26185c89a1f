"""SG-Former: blocks in pairs, of which the first finds what is significant and the second attends to that in detail.

"SG-Former: Self-guided Transformer with Evolving Token Reallocation", arXiv 2308.12216.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from timm.layers import GroupNorm1, LayerNorm2d, calculate_drop_path_rates, to_2tuple
from torch import Tensor, nn

from ..backbone import Hierarchical, Stage
from ..errors import VisionattnError
from ..layers import ConvPosEnc, HybridScaleAttention, SelfGuidedAttention
from ..layers.block import Block
from ..layers.conv_norm import ConvNorm
from ..layers.init import by_fan_out, init_weights
from ..layers.pointwise import Mlp
from ..layers.position import PositionEmbedding, fit_positions
from ..layers.self_guided_attention import GlobalEnhancedAttention
from ..registry import Family, Variant, Weights, register_family
from ..weights.layouts import renumber

PATCH_SIZE = 4
REDUCED = {
    8: ((1 / 4, 196), (1 / 2, 56), (1 / 4, 28)),
    4: ((1 / 4, 49), (1 / 2, 14), (1 / 4, 7)),
    2: ((1 / 2, 2), (1 / 2, 1)),
}
"""Sections of the guided attention by the ratio of the hybrid one, of all stages but the last."""

RULES = [
    (r"^pos_embed$", "stem.pos_embed.weight"),
    (r"^patch_embed1\.conv\.0\.", "stem.conv1."),
    (r"^patch_embed1\.conv\.2\.", "stem.conv2."),
    (r"^patch_embed1\.conv\.4\.", "stem.conv3."),
    (r"^patch_embed1\.norm\.", "stem.norm."),
    (r"^patch_embed(\d)\.", renumber("stages.{0}.downsample.", -1)),
    (r"(conv\d)\.c\.", r"\1.proj."),
    (r"(conv\d)\.bn\.", r"\1.norm."),
    (r"^block([123])\.(\d*[02468])\.", renumber("pairs{1}.{0}.hybrid.", 0, 2, group=2)),
    (r"^block([123])\.(\d*[13579])\.", renumber("pairs{1}.{0}.guided.", 0, 2, group=2)),
    (r"^pairs([123])\.", renumber("stages.{0}.blocks.", -1)),
    (r"^block4\.", "stages.3.blocks."),
    (r"^norm(\d)\.", renumber("stages.{0}.norm.", -1)),
    (r"\.attn\.", ".mixer."),
    (r"\.mlp\.dwconv\.dwconv\.", ".mlp.act.0.proj."),
    (r"\.hybrid\.mixer\.kv1\.", ".hybrid.mixer.global_kv."),
    (r"\.hybrid\.mixer\.kv2\.", ".hybrid.mixer.local_kv."),
    (r"\.mixer\.f1\.", ".mixer.pools.0."),
    (r"\.mixer\.f2\.", ".mixer.pools.1."),
    (r"\.mixer\.f3\.", ".mixer.pools.2."),
    (r"\.hybrid\.mixer\.q1\.(weight|bias)$", r".hybrid.mixer.q.\1#0"),
    (r"\.hybrid\.mixer\.q2\.(weight|bias)$", r".hybrid.mixer.q.\1#1"),
    (r"\.guided\.mixer\.kv1\.(weight|bias)$", r".guided.mixer.kv.\1#0"),
    (r"\.guided\.mixer\.kv2\.(weight|bias)$", r".guided.mixer.kv.\1#1"),
]


class ConvGroupNorm(ConvNorm):
    """Convolution, then group norm with one group. Arguments as for `ConvNorm`."""

    def __init__(self, in_dim: int, dim: int, *args, device=None, dtype=None, **kwargs) -> None:
        super().__init__(in_dim, dim, *args, **kwargs, norm=False, device=device, dtype=dtype)
        self.norm = GroupNorm1(dim, device=device, dtype=dtype)


class Stem(nn.Module):
    """Three convolutions, LayerNorm and a position embedding: (B, C_in, H, W) to (B, C, ceil(H / 4), ceil(W / 4)).

    Args:
        in_chans: channels of the image.
        dim: channels of the output.
        grid_size: (height, width) of the map that the position table is made for.
    """

    def __init__(self, in_chans: int, dim: int, grid_size: tuple[int, int], device=None, dtype=None) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.conv1 = ConvGroupNorm(in_chans, dim, 3, 2, **dd)
        self.conv2 = ConvGroupNorm(dim, dim, 3, **dd)
        self.conv3 = ConvGroupNorm(dim, dim, 3, 2, **dd)
        self.act = nn.GELU()
        self.norm = nn.LayerNorm(dim, 1e-5, **dd)
        self.pos_embed = PositionEmbedding(grid_size, dim, **dd)
        with torch.no_grad():
            self.pos_embed.weight.copy_(_waves(grid_size, dim).to(self.pos_embed.weight))

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv3(self.act(self.conv2(self.act(self.conv1(x))))).permute(0, 2, 3, 1)
        grid = x.shape[1:3]
        return self.pos_embed(self.norm(x).flatten(1, 2), grid).unflatten(1, grid).permute(0, 3, 1, 2)


def _waves(grid_size: tuple[int, int], dim: int) -> Tensor:
    """Sines and cosines of the column, then of the row: (1, H * W, C)."""
    H, W = grid_size
    frequencies = 10000 ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    rows, cols = (torch.arange(length)[:, None] * frequencies for length in (H, W))
    rows, cols = (torch.cat([angle.sin(), angle.cos()], 1) for angle in (rows, cols))
    waves = torch.cat([cols.expand(H, -1, -1), rows[:, None].expand(-1, W, -1)], 2)
    return waves.flatten(0, 1)[None]


class Merging(nn.Module):
    """Inverted bottleneck that halves the resolution: (B, C, H, W) to (B, C', ceil(H / 2), ceil(W / 2)).

    Args:
        dim: channels C.
        out_dim: channels C'.
    """

    def __init__(self, dim: int, out_dim: int, device=None, dtype=None) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.conv1 = ConvGroupNorm(dim, out_dim, 1, **dd)
        self.conv2 = ConvGroupNorm(out_dim, out_dim, 3, 2, groups=out_dim, **dd)
        self.conv3 = ConvGroupNorm(out_dim, out_dim, 1, **dd)
        self.act = nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        return self.conv3(self.act(self.conv2(self.act(self.conv1(x)))))


class HybridBlock(Block):
    """A block that hands on the significance that its mixer finds, besides its output."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mixed = self.mixer(self.norm1(x))
        x = x + self.drop_path1(self.ls1(mixed[0]))
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x)))), mixed[1]


class SelfGuidedPair(nn.Module):
    """A block of hybrid-scale attention and one of self-guided attention, which takes the significance that the first
    has found: (B, H, W, C) to (B, H, W, C).

    Args:
        hybrid: the first.
        guided: the second, called with tokens and significance.
    """

    def __init__(self, hybrid: HybridBlock, guided: Block) -> None:
        super().__init__()
        self.hybrid, self.guided = hybrid, guided

    def forward(self, x: Tensor) -> Tensor:
        found = self.hybrid(x)
        return self.guided(found[0], found[1])


def _init_weights(module: nn.Module) -> None:
    init_weights(module)
    if isinstance(module, nn.Conv2d):
        init_weights(module, nn.Conv2d, by_fan_out(module))


class SGFormer(Hierarchical):
    """SG-Former.

    Args:
        in_chans: channels of the image.
        num_classes: classes of the head, 0 for none.
        global_pool: pooling before the head.
        img_size: image size in pixels that the position table is made for; it is resampled for others.
        embed_dims: channels of each of the four stages.
        depths: blocks of each stage, an even number in all but the last.
        num_heads: attention heads of each stage, an even number in all but the last.
        mlp_ratio: hidden channels of the MLP per channel.
        qkv_bias: bias of the query, key and value projections.
        qk_scale: factor of the attention logits, head_dim**-0.5 if None.
        drop_rate: dropout rate of the MLPs, attention outputs and head.
        attn_drop_rate: dropout rate of the attention weights.
        drop_path_rate: stochastic depth rate of the last block; it grows linearly from 0.

    Raises:
        VisionattnError: if the arguments of the stages are not four each, or a stage of pairs has an odd depth.
    """

    layouts = {"official": RULES}
    first_conv = "stem.conv1.proj"
    patch_size = PATCH_SIZE

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        img_size: int | tuple[int, int] = 224,
        embed_dims: Sequence[int] = (64, 128, 256, 512),
        depths: Sequence[int] = (2, 4, 16, 1),
        num_heads: Sequence[int] = (2, 4, 8, 16),
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device=None,
        dtype=None,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        if not len(embed_dims) == len(depths) == len(num_heads) == 4:
            raise VisionattnError(
                f"expected embed_dims, depths and num_heads of 4 stages, "
                f"got {len(embed_dims)}, {len(depths)} and {len(num_heads)}"
            )
        if any(depth % 2 for depth in depths[:-1]):
            raise VisionattnError(f"expected even depths of all stages but the last, as blocks are pairs, got {depths}")

        def block(kind: type[Block], i: int, mixer: type[nn.Module], rate: float, *of_mixer) -> Block:
            dim, hidden = embed_dims[i], int(embed_dims[i] * mlp_ratio)
            mixer = mixer(
                dim, num_heads[i], *of_mixer,
                qkv_bias=qkv_bias, qk_scale=qk_scale, attn_drop=attn_drop_rate, proj_drop=drop_rate, **dd,
            )  # fmt: skip
            # The convolution is a residual branch of the hidden channels, in front of their activation.
            mlp = Mlp(dim, hidden, lambda: nn.Sequential(ConvPosEnc(hidden, **dd), nn.GELU()), drop_rate, **dd)
            return kind(dim, mixer, mlp, norm_layer=partial(nn.LayerNorm, eps=1e-6), drop_path=rate, **dd)

        def pair(i: int, ratio: int, rates: tuple[float, float]) -> SelfGuidedPair:
            return SelfGuidedPair(
                block(HybridBlock, i, HybridScaleAttention, rates[0], ratio),
                block(Block, i, SelfGuidedAttention, rates[1], REDUCED[ratio]),
            )

        rates = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)
        blocks = [
            [pair(i, ratio, both) for both in zip(rates[i][::2], rates[i][1::2], strict=True)]
            for i, ratio in enumerate(REDUCED)
        ]
        blocks.append([block(Block, 3, GlobalEnhancedAttention, rate) for rate in rates[3]])
        stages = [
            Stage(
                blocks[i],
                dim,
                downsample=Merging(embed_dims[i - 1], dim, **dd) if i else None,
                norm=LayerNorm2d(dim, eps=1e-6, **dd),
            )
            for i, dim in enumerate(embed_dims)
        ]
        grid_size = tuple(-(-size // PATCH_SIZE) for size in to_2tuple(img_size))
        super().__init__(
            Stem(in_chans, embed_dims[0], grid_size, **dd), stages,
            num_classes=num_classes, in_chans=in_chans, global_pool=global_pool, drop_rate=drop_rate, **dd,
        )  # fmt: skip
        self.grid_size = grid_size
        self.apply(_init_weights)

    def adapt_state_dict(self, state_dict: dict[str, Tensor], made_for: Mapping[str, Any]) -> dict[str, Tensor]:
        """Resamples a position table that was made for images of another size."""
        state_dict = super().adapt_state_dict(state_dict, made_for)
        key = "stem.pos_embed.weight"
        if key not in state_dict:
            return state_dict
        table = fit_positions(state_dict[key], self.stem.pos_embed, PATCH_SIZE, made_for.get("img_size"))
        return state_dict | {key: table}


PAGE = "https://drive.google.com/drive/folders/1ZJDEwxDffqqqzBC2SzhOkpWpGRweDsE4?usp=sharing"


def _variant(kwargs: dict, gmacs: float, top1: float, drop_path: float) -> Variant:
    weights = Weights(top1=top1, crop_pct=0.9, page=PAGE, note="evaluated: state_dict_ema")
    return Variant(kwargs, gmacs, {"in1k": weights}, {"drop_path_rate": drop_path, "ema_decay": 0.99992})


VARIANTS = {
    "sgformer_s": _variant({}, 4.784, 83.2, 0.1),
    "sgformer_m": _variant({"depths": (2, 6, 28, 2)}, 7.427, 84.1, 0.2),
    "sgformer_b": _variant(
        {"embed_dims": (96, 192, 384, 768), "depths": (4, 6, 24, 2), "num_heads": (4, 6, 12, 24)}, 15.543, 84.7, 0.4
    ),
    "test_sgformer": Variant(
        {"embed_dims": (16, 32, 48, 64), "depths": (2, 2, 2, 1), "num_heads": (2, 2, 2, 2), "img_size": 32},
        0.002629,
        img_size=32,
    ),
}
FAMILY = Family(
    "sgformer",
    (("SG-Former: Self-guided Transformer with Evolving Token Reallocation", "2308.12216"),),
    "https://github.com/OliverRensu/SG-Former",
    "none stated",
)
register_family(FAMILY, SGFormer, VARIANTS)
