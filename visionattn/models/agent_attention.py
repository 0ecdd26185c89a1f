"""Agent Attention: DeiT, PVT, Swin and CSwin whose attention goes through a few agents.

"Agent Attention: On the Integration of Softmax and Linear Attention", arXiv 2312.08874. `agent_windows` has Swin and
CSwin.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from timm.layers import LayerNorm2d, PatchEmbed, calculate_drop_path_rates, to_2tuple
from torch import Tensor, nn

from ..backbone import Isotropic, check_lengths
from ..layers import AgentAttention, SelfAttention
from ..layers.agent_attention import resize_axis_tables
from ..layers.block import Block
from ..layers.init import init_weights
from ..layers.patch import PatchConv2d
from ..layers.pointwise import Mlp, Pointwise
from ..layers.position import PositionEmbedding, fit_positions
from ..registry import Family, Variant, Weights, register_family
from ..weights.layouts import renumber
from .agent_windows import AGENT_RULES, AGENTS, AgentCSwin, AgentPyramid, AgentSwin, make_stages

DEIT_RULES = [
    *AGENT_RULES,
    (r"^pos_embed$", "pos_embed.weight"),
    (r"^patch_embed\.", "stem."),
    (r"\.attn\.", ".mixer."),
]
PVT_RULES = [
    *AGENT_RULES,
    (r"^patch_embed1\.", "stem."),
    (r"^patch_embed(\d)\.", renumber("stages.{0}.downsample.", -1)),
    (r"^pos_embed1$", "stem.pos_embed.weight"),
    (r"^pos_embed(\d)$", renumber("stages.{0}.downsample.pos_embed.weight", -1)),
    (r"^block(\d)\.", renumber("stages.{0}.blocks.", -1)),
    (r"\.attn\.(q|kv)\.", r".mixer.qkv.\1."),
    (r"\.attn\.", ".mixer."),
]


class AgentDeiT(Isotropic):
    """Agent-DeiT.

    Args:
        in_chans: channels of the image.
        num_classes: classes of the head, 0 for none.
        global_pool: "token" (the class token), "avg", "max", "avgmax" or "".
        img_size: image size in pixels that position embedding and biases are made for.
        patch_size: side of a patch in pixels.
        embed_dim: channels.
        depth: blocks.
        num_heads: attention heads.
        agent_num: agents, of four parts of the network: a sixth of the blocks, another, three and one.
        agent_shapes: grid of the agents of each part, None for that of `agent_num`.
        agent_layer: number of leading blocks with agents; the others have plain attention. All have agents if -1.
        attn_kwargs: further arguments of the plain attention, a `SelfAttention`: its `gate`, `clip`, `qk_norm`, ...
        norms: have LayerNorms; without them it takes `sigma_reparam` to train.
        mlp_ratio: hidden channels of the MLP per channel.
        qkv_bias: bias of the query, key and value projections.
        drop_rate: dropout rate of the position embedding and before the head.
        drop_path_rate: stochastic depth rate of the last block; it grows linearly from 0.
    """

    layouts = {"official": DEIT_RULES}
    averaged_weights = False

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "token",
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        embed_dim: int = 192,
        depth: int = 12,
        num_heads: int = 3,
        agent_num: Sequence[int] = (49, 49, 49, 49),
        agent_shapes: Sequence[tuple[int, int] | None] | None = None,
        agent_layer: int = -1,
        attn_kwargs: dict[str, Any] | None = None,
        norms: bool = True,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device=None,
        dtype=None,
    ) -> None:
        dd, norm_layer = {"device": device, "dtype": dtype}, partial(nn.LayerNorm, eps=1e-6) if norms else nn.Identity
        grid = tuple(-(-length // patch_size) for length in to_2tuple(img_size))
        shapes, blocks = agent_shapes or (None,) * 4, []
        for i, rate in enumerate(calculate_drop_path_rates(drop_path_rate, depth)):
            part = (0, 1, 2, 2, 2, 3)[6 * i // depth]
            if agent_layer < 0 or i < agent_layer:
                mixer = AgentAttention(
                    embed_dim, num_heads, grid, agent_num[part], qkv_bias, True, agent_shape=shapes[part], **dd
                )
            else:
                mixer = SelfAttention(embed_dim, num_heads, qkv_bias, **attn_kwargs or {}, **dd)
            mlp = Mlp(embed_dim, int(embed_dim * mlp_ratio), **dd)
            blocks.append(Block(embed_dim, mixer, mlp, norm_layer=norm_layer, drop_path=rate, **dd))
        super().__init__(
            PatchEmbed(img_size, patch_size, in_chans, embed_dim, strict_img_size=False, **dd), blocks,
            norm=norm_layer(embed_dim, **dd), embed_dim=embed_dim, patch_size=patch_size, img_size=img_size,
            pos_embed=True, class_token=-1,
            num_classes=num_classes, in_chans=in_chans, global_pool=global_pool, drop_rate=drop_rate, **dd,
        )  # fmt: skip
        self.apply(init_weights)

    def adapt_state_dict(self, state_dict: dict[str, Tensor], made_for: Mapping[str, Any]) -> dict[str, Tensor]:
        """Resamples the tables of positions and of biases that were made for images of another size."""
        return resize_axis_tables(super().adapt_state_dict(state_dict, made_for), self.state_dict())


class Qkv(nn.Module):
    """Projection to queries, and one to keys and values: (..., C) to (..., 3C)."""

    def __init__(self, dim: int, bias: bool = True, device=None, dtype=None) -> None:
        super().__init__()
        self.q = Pointwise(dim, dim, bias, device, dtype)
        self.kv = Pointwise(dim, 2 * dim, bias, device, dtype)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.q(x), self.kv(x)], -1)


class PositionedPatches(nn.Module):
    """Patches, LayerNorm and a position embedding, which follows the size by bilinear interpolation.

    Args:
        in_chans: channels of the input.
        dim: channels of the output.
        patch_size: side of a patch; what is over at the bottom and right is dropped.
        grid: (height, width) of the map that the positions are made for.

    Shape:
        (B, C_in, H, W) to (B, C, floor(H / patch_size), floor(W / patch_size)).
    """

    def __init__(
        self, in_chans: int, dim: int, patch_size: int, grid: tuple[int, int], device=None, dtype=None
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.proj = PatchConv2d(in_chans, dim, patch_size, **dd)
        self.norm = LayerNorm2d(dim, eps=1e-5, **dd)
        self.pos_embed = PositionEmbedding(grid, dim, mode="bilinear", **dd)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.proj(x))
        return self.pos_embed(x.flatten(2).mT, x.shape[2:]).mT.unflatten(2, x.shape[2:])


class AgentPVT(AgentPyramid):
    """Agent-PVT.

    Args:
        in_chans: channels of the image.
        num_classes: classes of the head, 0 for none.
        global_pool: pooling before the head.
        img_size: image size in pixels that position embeddings and biases are made for.
        embed_dims: channels of each stage.
        depths: blocks of each stage.
        num_heads: attention heads of each stage.
        mlp_ratios: hidden channels of the MLP per channel, of each stage.
        agent_num: agents of each stage.
        agent_shapes: grid of the agents of each stage, None for that of `agent_num`.
        qkv_bias: bias of the query, key and value projections.
        drop_rate: dropout rate before the head.
        drop_path_rate: stochastic depth rate of the last block; it grows linearly from 0.
    """

    layouts = {"official": PVT_RULES}
    averaged_weights = False

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        img_size: int | tuple[int, int] = 224,
        embed_dims: Sequence[int] = (64, 128, 320, 512),
        depths: Sequence[int] = (2, 2, 2, 2),
        num_heads: Sequence[int] = (1, 2, 5, 8),
        mlp_ratios: Sequence[float] = (8, 8, 4, 4),
        agent_num: Sequence[int] = AGENTS,
        agent_shapes: Sequence[tuple[int, int] | None] | None = None,
        qkv_bias: bool = True,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device=None,
        dtype=None,
    ) -> None:
        check_lengths(
            embed_dims=embed_dims, depths=depths, num_heads=num_heads, mlp_ratios=mlp_ratios, agent_num=agent_num,
            agent_shapes=agent_shapes,
        )  # fmt: skip
        dd, shapes = {"device": device, "dtype": dtype}, agent_shapes or (None,) * 4
        grids = [tuple(length // 2 ** (i + 2) for length in to_2tuple(img_size)) for i in range(4)]

        def mixer(i: int, j: int) -> nn.Module:
            attention = AgentAttention(
                embed_dims[i], num_heads[i], grids[i], agent_num[i], qkv_bias, agent_shape=shapes[i], **dd
            )
            attention.qkv = Qkv(embed_dims[i], qkv_bias, **dd)
            return attention

        super().__init__(
            PositionedPatches(in_chans, embed_dims[0], 4, grids[0], **dd),
            make_stages(
                embed_dims, depths, mixer, lambda i: PositionedPatches(*embed_dims[i - 1 : i + 1], 2, grids[i], **dd),
                drop_path_rate, mlp_ratios, 1e-6, **dd,
            ),
            num_classes=num_classes, in_chans=in_chans, global_pool=global_pool, drop_rate=drop_rate, **dd,
        )  # fmt: skip
        self.apply(init_weights)

    def adapt_state_dict(self, state_dict: dict[str, Tensor], made_for: Mapping[str, Any]) -> dict[str, Tensor]:
        """Resamples, bicubically, the tables of positions that were made for images of another size too."""
        state_dict = super().adapt_state_dict(state_dict, made_for)
        for i in range(len(self.stages)):
            name = f"stages.{i}.downsample.pos_embed" if i else "stem.pos_embed"
            key, own = f"{name}.weight", self.get_submodule(name)
            if key in state_dict:
                table = fit_positions(state_dict[key], own, 2 ** (i + 2), made_for.get("img_size"))
                state_dict |= {key: table}
        return state_dict


def _variant(
    model: type[nn.Module], kwargs: dict, gmacs: float, file: str, top1: float, drop_path: float, img_size: int = 224,
    crop_pct: float = 0.875, note: str = "",
) -> Variant:  # fmt: skip
    url = f"https://cloud.tsinghua.edu.cn/f/{file}/?dl=1"
    weights = Weights((url,), None, top1, img_size, crop_pct, cfg={"crop_mode": "squash"}, note=note)
    if img_size != 224:
        kwargs = kwargs | {"img_size": img_size}
    return Variant(kwargs, gmacs, {"in1k": weights}, {"drop_path_rate": drop_path}, img_size, model)


_deit, _pvt, _swin, _cswin = (partial(_variant, model) for model in (AgentDeiT, AgentPVT, AgentSwin, AgentCSwin))
SMALL, BASE = {"embed_dim": 384, "num_heads": 6}, {"embed_dim": 768, "num_heads": 12, "agent_num": (81,) * 4}
SWIN_SMALL = {"depths": (2, 2, 18, 2), "attn_type": "AABB"}
SWIN_BASE = {"embed_dim": 128, "depths": (2, 2, 18, 2), "num_heads": (4, 8, 16, 32), "attn_type": "AAMB2"}
CSWIN_SMALL = {"depths": (3, 6, 29, 2)}
CSWIN_BASE = {"embed_dim": 96, "depths": (3, 6, 29, 2), "num_heads": (4, 8, 16, 32)}
FEWER = "published with 87.2 M parameters, which would be those of 25 agents: then give agent_num=(25, 25, 25, 25)"
VARIANTS = {
    "agent_deit_tiny": _deit({}, 1.168, "57e0904221824ee7b7af", 74.9, 0.0),
    "agent_deit_small": _deit(SMALL, 4.427, "fdd43304372541db8ea7", 80.5, 0.1),
    "agent_deit_base": _deit(BASE, 17.453, "5115f15fdd7e4ab58fbc", 82.0, 0.3, note=FEWER),
    "agent_deit_small_448": _deit(SMALL, 17.642, "a228f86241c445f1969b", 83.1, 0.1, 448),
    "agent_pvt_tiny": _pvt({}, 1.986, "13fdf0e0a7c5498c934f", 78.4, 0.1),
    "agent_pvt_small": _pvt({"depths": (3, 4, 6, 3)}, 3.955, "36b8be9a8863456685a3", 82.2, 0.1),
    "agent_pvt_medium": _pvt({"depths": (3, 4, 18, 3)}, 6.999, "4d00ecacf18b45f9b88c", 83.4, 0.3),
    "agent_pvt_medium_256": _pvt({"depths": (3, 4, 18, 3)}, 9.142, "654df734121643b19c52", 83.8, 0.3, 256),
    "agent_pvt_large": _pvt({"depths": (3, 8, 27, 3)}, 10.339, "040cfe0cfbbe4762ad09", 83.7, 0.3),
    "agent_swin_tiny": _swin({}, 4.499, "a2ddc1190c224f768a41", 82.6, 0.2),
    "agent_swin_small": _swin(SWIN_SMALL, 8.701, "f607172c9fea4d6e99bb", 83.7, 0.3),
    "agent_swin_small_288": _swin(SWIN_SMALL, 14.535, "09760394e93b4046a25e", 84.1, 0.3, 288, 1.0),
    "agent_swin_base": _swin(SWIN_BASE, 15.400, "4fcd2d0114bb490483c3", 84.0, 0.5),
    "agent_swin_base_384": _swin(SWIN_BASE, 46.207, "bb84ee9058954706a557", 84.9, 0.5, 384, 1.0),
    "agent_cswin_tiny": _cswin({}, 4.292, "8c562a74441e46d5902b", 83.1, 0.2),
    "agent_cswin_small": _cswin(CSWIN_SMALL, 6.744, "30eb8af675bc4b7a8747", 83.9, 0.4),
    "agent_cswin_base": _cswin(CSWIN_BASE, 14.870, "c8035b0839b2410c8c9f", 84.7, 0.5),
    "agent_cswin_base_384": _cswin(CSWIN_BASE, 46.177, "1239be0df44b47719432", 85.8, 0.7, 384),
    "test_agent_attention": Variant(
        {
            "embed_dim": 12, "depths": (1, 1, 2, 1), "num_heads": (1, 2, 3, 6), "attn_type": "ABMA1",
            "agent_num": (9, 1, 4, 4), "img_size": 32,
        },
        0.000797, img_size=32, model=AgentSwin,
    ),
    "test_agent_deit": Variant(
        {
            "embed_dim": 64, "depth": 4, "num_heads": 4, "patch_size": 8, "agent_num": (4, 4, 9, 9), "agent_layer": 2,
            "img_size": 32,
        },
        0.003730, img_size=32,
    ),
}  # fmt: skip
FAMILY = Family(
    "agent_attention",
    (("Agent Attention: On the Integration of Softmax and Linear Attention", "2312.08874"),),
    "https://github.com/LeapLabTHU/Agent-Attention",
    "none stated",
)
register_family(FAMILY, AgentDeiT, VARIANTS)
