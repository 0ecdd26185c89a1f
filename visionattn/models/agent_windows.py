"""Agent-Swin and Agent-CSwin: agent attention at high resolution, where windows and stripes see least, these at low."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from timm.layers import LayerNorm2d, calculate_drop_path_rates, to_2tuple
from torch import Tensor, nn

from ..backbone import Hierarchical, Stage, check_lengths
from ..errors import VisionattnError
from ..layers import AgentAttention, ShiftedWindowAttention2d, StripeAttention2d
from ..layers.agent_attention import resize_axis_tables
from ..layers.block import Block
from ..layers.init import init_weights
from ..layers.patch import PatchMerging, PatchStem
from ..layers.pointwise import Mlp
from ..weights.layouts import renumber

AGENTS = (9, 16, 49, 49)
"""Of each stage."""


class Table:
    """Transform of a published table of relative biases, ((2w - 1)^2, heads), to (heads, 2w - 1, 2w - 1)."""

    def __call__(self, table: Tensor) -> Tensor:
        side = round(len(table) ** 0.5)
        return table.T.unflatten(1, (side, side))

    def back(self, table: Tensor) -> Tensor:
        """The published table again."""
        return table.flatten(1).T


@dataclass(frozen=True)
class AgentTable:
    """Transform of a published table of agents, with axes of one element and, in some, the agents last, to (heads,
    agents, length).

    Args:
        axis: of the published table, whose only element is taken, None if there is none but the first.
        agents_last: the agents are its last axis.
    """

    axis: int | None
    agents_last: bool

    def __call__(self, table: Tensor) -> Tensor:
        table = (table if self.axis is None else table.select(self.axis, 0))[0]
        return table.mT if self.agents_last else table

    def back(self, table: Tensor) -> Tensor:
        """The published table again."""
        table = (table.mT if self.agents_last else table)[None]
        return table if self.axis is None else table.unsqueeze(self.axis)


AGENT_RULES = [
    (rf"\.{name}_bias$", f".{name}_bias", AgentTable(axis, agents_last))
    for name, axis, agents_last in (
        ("ah", 4, False), ("aw", 3, False), ("ac", None, False), ("ha", 3, True), ("wa", 2, True), ("ca", None, True),
    )
]  # fmt: skip
SWIN_RULES = [
    *AGENT_RULES,
    (r"^patch_embed\.", "stem."),
    (r"^layers\.(\d)\.downsample\.", renumber("stages.{0}.downsample.", 1)),
    (r"^layers\.(\d)\.blocks\.", r"stages.\1.blocks."),
    (r"^norm(\d)\.", r"feature_norms.\1."),  # of the dense prediction code
    (r"^.*\.attn_mask$", ""),
    (r"^.*\.attn\.relative_position_index$", ""),
    (r"\.attn\.relative_position_bias_table$", ".mixer.rpb", Table()),
    (r"\.attn\.", ".mixer."),
]
CSWIN_RULES = [
    *AGENT_RULES,
    (r"\.(qkv|proj)\.", r".mixer.\1."),
    (r"^stage1_conv_embed\.0\.", "stem.proj."),
    (r"^stage1_conv_embed\.2\.", "stem.norm."),
    (r"^merge(\d)\.conv\.", r"stages.\1.downsample.proj."),
    (r"^merge(\d)\.norm\.", r"stages.\1.downsample.norm."),
    (r"^(stage1|stage2)\.(\d+)\.attns\.0\.get_v\.", r"\1.\2.mixer.dwc."),
    (r"\.attns\.(\d)\.get_v\.", r".mixer.lepe.\1."),
    (r"\.attns\.0\.", ".mixer."),
    (r"^stage(\d)\.(\d+)\.", renumber("stages.{0}.blocks.{1}.", -1)),
]


def make_stages(
    dims: Sequence[int],
    depths: Sequence[int],
    mixer: Callable[[int, int], nn.Module],
    downsample: Callable[[int], nn.Module],
    drop_path_rate: float,
    mlp_ratios: Sequence[float] = (4.0,) * 4,
    norm_eps: float = 1e-5,
    device=None,
    dtype=None,
) -> list[Stage]:
    """Stages of pre-norm blocks.

    Args:
        dims: channels of each stage.
        depths: blocks of each stage.
        mixer: makes that of a block, from the numbers of its stage and of the block in it.
        downsample: makes what is before a stage but the first, from its number.
        drop_path_rate: stochastic depth rate of the last block; it grows linearly from 0.
        mlp_ratios: hidden channels of the MLP per channel, of each stage.
        norm_eps: epsilon of the norms.
    """
    dd, stages = {"device": device, "dtype": dtype}, []
    for i, rates in enumerate(calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)):
        blocks = [
            Block(
                dims[i],
                mixer(i, j),
                Mlp(dims[i], int(dims[i] * mlp_ratios[i]), **dd),
                norm_layer=partial(nn.LayerNorm, eps=norm_eps),
                drop_path=rate,
                **dd,
            )
            for j, rate in enumerate(rates)
        ]
        stages.append(Stage(blocks, dims[i], downsample=downsample(i) if i else None))
    return stages


class AgentPyramid(Hierarchical):
    """What the pyramids of the family share."""

    def adapt_state_dict(self, state_dict: dict[str, Tensor], made_for: Mapping[str, Any]) -> dict[str, Tensor]:
        """Resamples the tables of biases that were made for maps or windows of other sizes."""
        return resize_axis_tables(super().adapt_state_dict(state_dict, made_for), self.state_dict())


def halved(size: tuple[int, int], times: int) -> tuple[int, int]:
    """A size divided by two, so many times, each time rounded up."""
    return tuple(-(-length // 2**times) for length in size)


class AgentSwin(AgentPyramid):
    """Agent-Swin.

    Args:
        in_chans: channels of the image.
        num_classes: classes of the head, 0 for none.
        global_pool: pooling before the head.
        img_size: image size in pixels that biases are made for; windows are a 32nd of it, 7 at least.
        embed_dim: channels of the first stage; each further stage has twice those of the one before.
        depths: blocks of each stage.
        num_heads: attention heads of each stage.
        attn_type: a letter for each stage, "A" for agent attention, "B" for shifted windows, "M" for agents in the
            first blocks, whose number then comes last, as in "AAMB2".
        agent_num: agents of each stage.
        agent_shapes: grid of the agents of each stage, None for that of `agent_num`.
        mlp_ratio: hidden channels of the MLP per channel.
        qkv_bias: bias of the query, key and value projections.
        drop_rate: dropout rate before the head.
        drop_path_rate: stochastic depth rate of the last block; it grows linearly from 0.

    Raises:
        VisionattnError: if `attn_type` is none.
    """

    layouts = {"official": SWIN_RULES}
    averaged_weights = False
    feature_norm = staticmethod(partial(LayerNorm2d, eps=1e-5))

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        img_size: int | tuple[int, int] = 224,
        embed_dim: int = 96,
        depths: Sequence[int] = (2, 2, 6, 2),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        attn_type: str = "AAAB",
        agent_num: Sequence[int] = AGENTS,
        agent_shapes: Sequence[tuple[int, int] | None] | None = None,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device=None,
        dtype=None,
    ) -> None:
        check_lengths(depths=depths, num_heads=num_heads, agent_num=agent_num, agent_shapes=agent_shapes)
        dd, types = {"device": device, "dtype": dtype}, re.fullmatch(r"([ABM]{4})(\d*)", attn_type)
        if types is None or ("M" in attn_type) != bool(types[2]):
            raise VisionattnError(
                f"expected attn_type of four letters A, B or M, and a number if there is an M, got {attn_type!r}"
            )
        with_agents = [{"A": n, "B": 0, "M": int(types[2] or 0)}[t] for t, n in zip(types[1], depths, strict=True)]
        dims, first = [embed_dim * 2**i for i in range(4)], tuple(-(-length // 4) for length in to_2tuple(img_size))
        shapes, window = agent_shapes or (None,) * 4, max(7, min(to_2tuple(img_size)) // 32)

        def mixer(i: int, j: int) -> nn.Module:
            size = halved(first, i)
            if j < with_agents[i]:
                return AgentAttention(
                    dims[i], num_heads[i], size, agent_num[i], qkv_bias, agent_shape=shapes[i], **dd
                )  # fmt: skip
            return ShiftedWindowAttention2d(dims[i], num_heads[i], size, window, j % 2 == 1, qkv_bias, **dd)

        super().__init__(
            PatchStem(in_chans, embed_dim, **dd),
            make_stages(
                dims, depths, mixer, lambda i: PatchMerging(dims[i - 1], **dd), drop_path_rate, (mlp_ratio,) * 4, **dd
            ),
            norm=LayerNorm2d(dims[-1], eps=1e-5, **dd), num_classes=num_classes, in_chans=in_chans,
            global_pool=global_pool, drop_rate=drop_rate, **dd,
        )  # fmt: skip
        self.apply(init_weights)

    def no_weight_decay(self) -> set[str]:
        """Names of parameters without weight decay, besides those with one dimension."""
        return {name for name, _ in self.named_parameters() if name.endswith(".rpb")}

    def published_buffers(self) -> dict[str, Tensor]:
        """What is in published state dicts beside parameters: which pair of a window has which relative bias and, of
        windows that are shifted, -100 for pairs that are no neighbours on maps of the size that the model is made for.
        """
        found = {}
        for name, layer in self.named_modules():
            if not isinstance(layer, ShiftedWindowAttention2d):
                continue
            block, w = name.replace("stages", "layers").removesuffix(".mixer"), layer.window_size
            place = torch.cartesian_prod(torch.arange(w), torch.arange(w))
            index = (place[:, None] - place + w - 1) @ torch.tensor([2 * w - 1, 1])
            found[f"{block}.attn.relative_position_index"] = index
            if layer.shift and w < min(layer.map_size):
                found[f"{block}.attn_mask"] = _window_mask(layer.map_size, w, layer.shift)
        return found


def _window_mask(map_size: tuple[int, int], window_size: int, shift: int) -> Tensor:
    """(windows, w^2, w^2): 0 for pairs of the same region of a map that is padded and rolled, -100 for others."""
    regions = []
    for length in map_size:
        end = -(-length // window_size) * window_size
        position = torch.arange(end)
        region = (position >= end - window_size).long() + (position >= end - shift)
        regions.append(region.unflatten(0, (-1, window_size)))
    region = 3 * regions[0][:, None, :, None] + regions[1][None, :, None]
    region = region.flatten(0, 1).flatten(1)
    return -100.0 * (region[:, :, None] != region[:, None])


class ConvDownsample(nn.Module):
    """3 x 3 convolution of stride 2, then LayerNorm: (B, C, H, W) to (B, 2C, ceil(H / 2), ceil(W / 2))."""

    def __init__(self, dim: int, device=None, dtype=None) -> None:
        super().__init__()
        self.proj = nn.Conv2d(dim, 2 * dim, 3, 2, 1, device=device, dtype=dtype)
        self.norm = LayerNorm2d(2 * dim, eps=1e-5, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.proj(x))


class AgentCSwin(AgentPyramid):
    """Agent-CSwin: agent attention in the first two stages, attention in stripes in the third, to the map in the last.

    Args:
        in_chans: channels of the image.
        num_classes: classes of the head, 0 for none.
        global_pool: pooling before the head.
        img_size: image size in pixels that biases are made for; stripes are as wide as a 32nd of it.
        embed_dim: channels of the first stage; each further stage has twice those of the one before.
        depths: blocks of each stage.
        num_heads: attention heads of each stage.
        agent_num: agents of each of the first two stages; more are ignored.
        agent_shapes: grid of the agents of each stage, likewise, None for that of `agent_num`.
        mlp_ratio: hidden channels of the MLP per channel.
        qkv_bias: bias of the query, key and value projections.
        drop_rate: dropout rate before the head.
        drop_path_rate: stochastic depth rate of the last block; it grows linearly from 0.
    """

    layouts = {"official": CSWIN_RULES}

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        img_size: int | tuple[int, int] = 224,
        embed_dim: int = 64,
        depths: Sequence[int] = (2, 4, 18, 1),
        num_heads: Sequence[int] = (2, 4, 8, 16),
        agent_num: Sequence[int] = AGENTS,
        agent_shapes: Sequence[tuple[int, int] | None] | None = None,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device=None,
        dtype=None,
    ) -> None:
        check_lengths(depths=depths, num_heads=num_heads, agent_num=agent_num, agent_shapes=agent_shapes)
        dd = {"device": device, "dtype": dtype}
        dims, first = [embed_dim * 2**i for i in range(4)], tuple(-(-length // 4) for length in to_2tuple(img_size))
        shapes, stripe = agent_shapes or (None,) * 4, max(1, min(to_2tuple(img_size)) // 32)

        def mixer(i: int, j: int) -> nn.Module:
            if i < 2:
                return AgentAttention(
                    dims[i], num_heads[i], halved(first, i), agent_num[i], qkv_bias, agent_shape=shapes[i], **dd
                )  # fmt: skip
            return StripeAttention2d(dims[i], num_heads[i], stripe if i == 2 else None, qkv_bias, **dd)

        super().__init__(
            PatchStem(in_chans, embed_dim, kernel_size=7, padding=2, **dd),
            make_stages(
                dims, depths, mixer, lambda i: ConvDownsample(dims[i - 1], **dd), drop_path_rate, (mlp_ratio,) * 4, **dd
            ),
            norm=LayerNorm2d(dims[-1], eps=1e-5, **dd), num_classes=num_classes, in_chans=in_chans,
            global_pool=global_pool, drop_rate=drop_rate, **dd,
        )  # fmt: skip
        self.apply(init_weights)
