"""LITv2: a pyramid of convolutional MLPs at high resolution and HiLo attention at low, merged by deformable sampling.

"Fast Vision Transformers with HiLo Attention", arXiv 2205.13213; the merging is from "Less is More: Pay Less Attention
in Vision Transformers", arXiv 2105.14217. There are no position embeddings: positions come from the padding of the
depthwise convolutions.
"""

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from timm.layers import DropPath, LayerNorm2d, calculate_drop_path_rates
from torch import Tensor, nn
from torchvision.ops import deform_conv2d

from ..backbone import Hierarchical, Stage, check_lengths
from ..layers import HiLoAttention
from ..layers.block import Block
from ..layers.deformable import deformed_patches
from ..layers.depthwise_mlp import DepthwiseMlp
from ..layers.direct import is_direct
from ..layers.init import by_fan_out, init_weights
from ..layers.layout import channels_last
from ..layers.patch import PatchStem
from ..layers.precision import without_autocast
from ..registry import Family, Variant, Weights, register_family
from ..weights.layouts import renumber

RULES = [
    (r"^patch_embed\.", "stem."),
    (r"^layers\.(\d)\.downsample\.dconv\.conv_offset\.", renumber("stages.{0}.downsample.offset.", 1)),
    (r"^layers\.(\d)\.downsample\.dconv\.", renumber("stages.{0}.downsample.reduction.", 1)),
    (r"^layers\.(\d)\.downsample\.norm_layer\.", renumber("stages.{0}.downsample.norm.", 1)),
    (r"^layers\.(\d)\.blocks\.", r"stages.\1.blocks."),
    (r"\.attn\.", ".mixer."),
    (r"\.mlp\.dwconv\.dwconv\.", ".mlp.dwconv."),
    (r"^norm(\d)\.", r"feature_norms.\1."),  # of the dense prediction code
]


class DeformableMerging(nn.Module):
    """Strided 2 x 2 convolution whose taps are shifted by offsets that depend on the input, batch norm and exact GELU.

    It starts as a regular convolution. A last odd row or column is only reached by offsets.

    Cost: N (8 C^2 + 32 C) multiply-adds for N output positions and C channels of the input, besides the interpolation.

    Args:
        dim: channels C of the input.

    Shape:
        (B, C, H, W) to (B, 2C, floor(H / 2), floor(W / 2)).
    """

    fused_pairs = (("reduction", "norm"),)

    def __init__(self, dim: int, device=None, dtype=None) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.reduction = nn.Conv2d(dim, 2 * dim, 2, stride=2, **dd)
        self.offset = nn.Conv2d(dim, 8, 2, stride=2, **dd)  # (vertical, horizontal) shift of each tap, in positions
        self.norm = nn.BatchNorm2d(2 * dim, **dd)
        self.act = nn.GELU()
        nn.init.zeros_(self.offset.weight)
        nn.init.zeros_(self.offset.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.norm(_deformed(self, x)))


@torch.fx.wrap
def _deformed(layer: DeformableMerging, x: Tensor) -> Tensor:
    """The convolution. In float32 at least, as it was trained: half precision misplaces the samples."""
    weight, bias = layer.reduction.weight, layer.reduction.bias
    if is_direct(x, weight, bias):
        patches = deformed_patches(x.permute(0, 2, 3, 1), layer.offset(x), 2)
        return F.linear(patches, weight.permute(0, 2, 3, 1).flatten(1), bias).permute(0, 3, 1, 2)
    dtype = torch.promote_types(weight.dtype, torch.float32)
    with without_autocast(x):
        offset = layer.offset(x.to(weight.dtype)).to(dtype)
        out = deform_conv2d(x.to(dtype), offset, weight.to(dtype), bias.to(dtype), stride=2)
    return out.to(x.dtype)


class ConvMlp(DepthwiseMlp):
    """MLP with a depthwise convolution, of (B, H, W, C)."""

    forward = channels_last(DepthwiseMlp.forward)


class ConvMlpBlock(nn.Module):
    """The second half of a block alone, x + mlp(norm2(x)): (B, H, W, C) to (B, H, W, C)."""

    def __init__(self, dim: int, mlp: nn.Module, drop_path: float = 0.0, device=None, dtype=None) -> None:
        super().__init__()
        self.norm2 = nn.LayerNorm(dim, device=device, dtype=dtype)
        self.mlp = mlp
        self.drop_path2 = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop_path2(self.mlp(self.norm2(x)))


def _init_weights(module: nn.Module) -> None:
    init_weights(module)
    if isinstance(module, nn.Conv2d) and module.groups > 1:
        init_weights(module, nn.Conv2d, by_fan_out(module))


class LITv2(Hierarchical):
    """LITv2.

    Args:
        in_chans: channels of the image.
        num_classes: classes of the head, 0 for none.
        global_pool: pooling before the head.
        embed_dim: channels of the first stage; each further stage has twice those of the one before.
        depths: blocks of each stage.
        num_heads: attention heads of each stage.
        mlp_ratio: hidden channels of the MLP per channel.
        qkv_bias: bias of the query, key and value projections.
        qk_scale: factor of the attention logits, head_dim**-0.5 if None.
        has_msa: for each stage, whether its blocks have attention.
        alpha: share of the heads that attend to the pooled map.
        local_ws: for each stage, side of the windows and the pooling; 1 for global attention. Parameters do not depend
            on it where it is not 1.
        drop_rate: dropout rate of the MLPs, attention outputs and head.
        attn_drop_rate: dropout rate of the attention weights.
        drop_path_rate: stochastic depth rate of the last block; it grows linearly from 0.

    Raises:
        VisionattnError: if the arguments of the stages are not of one length.
    """

    layouts = {"official": RULES}
    feature_norm = staticmethod(partial(LayerNorm2d, eps=1e-5))

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dim: int = 96,
        depths: Sequence[int] = (2, 2, 6, 2),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        has_msa: Sequence[int] = (0, 0, 1, 1),
        alpha: float = 0.9,
        local_ws: Sequence[int] = (0, 0, 2, 1),
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device=None,
        dtype=None,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        check_lengths(depths=depths, num_heads=num_heads, has_msa=has_msa, local_ws=local_ws)
        rates = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)
        stages = []
        for i, (heads, attends, window) in enumerate(zip(num_heads, has_msa, local_ws, strict=True)):
            dim = embed_dim * 2**i
            blocks = []
            for rate in rates[i]:
                mlp = ConvMlp(dim, int(dim * mlp_ratio), drop_rate, **dd)
                if attends:
                    mixer = HiLoAttention(
                        dim, heads, qkv_bias=qkv_bias, qk_scale=qk_scale, attn_drop=attn_drop_rate,
                        proj_drop=drop_rate, window_size=window, alpha=alpha, **dd,
                    )  # fmt: skip
                    blocks.append(Block(dim, mixer, mlp, drop_path=rate, **dd))
                else:
                    blocks.append(ConvMlpBlock(dim, mlp, rate, **dd))
            downsample = DeformableMerging(dim // 2, **dd) if i else None
            stages.append(Stage(blocks, dim, downsample=downsample))
        super().__init__(
            PatchStem(in_chans, embed_dim, **dd), stages, norm=LayerNorm2d(stages[-1].dim, eps=1e-5, **dd),
            num_classes=num_classes, in_chans=in_chans, global_pool=global_pool, drop_rate=drop_rate, **dd,
        )  # fmt: skip
        self.apply(_init_weights)

    def learning_rates(self) -> dict[str, float]:
        """The weights of the offsets, but not their biases, were trained at a hundredth of the rate."""
        return {"stages.*.downsample.offset.weight": 0.01}


RELEASES = "https://github.com/ziplab/LITv2/releases/download"


def _variant(
    kwargs: dict, gmacs: float, file: str, top1: float, drop_path: float, img_size: int = 224, **evaluation
) -> Variant:
    weights = Weights((f"{RELEASES}/{file}.pth",), top1=top1, img_size=img_size, **evaluation)
    # The weights of the offsets were trained with a learning rate of their own.
    recipe = {"drop_path_rate": drop_path, "offset_lr_scale": 0.01}
    return Variant(kwargs, gmacs, {"in1k": weights}, recipe, img_size)


def _ablation(alpha: float, gmacs: float, top1: float) -> Variant:
    """The small model with another share of Lo-Fi heads."""
    return _variant({"alpha": alpha}, gmacs, f"v1.1/alpha_{alpha:g}", top1, 0.2)


MEDIUM = {"depths": (2, 2, 18, 2)}
BASE = MEDIUM | {"embed_dim": 128, "num_heads": (4, 8, 16, 32)}
VARIANTS = {
    "litv2_small": _variant({}, 3.724, "v1.0/litv2_s", 82.0, 0.2),
    "litv2_medium": _variant(MEDIUM, 7.463, "v1.0/litv2_m", 83.3, 0.3),
    "litv2_base": _variant(BASE, 13.172, "v1.0/litv2_b", 83.6, 0.5),
    "litv2_base_384": _variant(
        BASE, 39.646, "v1.0/litv2_b_384", 84.7, 0.5, 384, crop_pct=1.0, cfg={"crop_mode": "squash"}
    ),
    "litv2_small_alpha00": _ablation(0.0, 3.955, 81.16),
    "litv2_small_alpha02": _ablation(0.2, 3.870, 81.89),
    "litv2_small_alpha04": _ablation(0.4, 3.804, 81.81),
    "litv2_small_alpha05": _ablation(0.5, 3.758, 81.88),
    "litv2_small_alpha07": _ablation(0.7, 3.731, 81.94),
    "litv2_small_alpha09": _ablation(0.9, 3.724, 82.03),
    "litv2_small_alpha10": _ablation(1.0, 3.735, 81.89),
    "test_litv2": Variant(
        {"embed_dim": 16, "depths": (1, 1, 2, 1), "num_heads": (1, 2, 4, 8), "alpha": 0.5}, 0.001182, img_size=32
    ),
}
FAMILY = Family(
    "litv2",
    (
        ("Fast Vision Transformers with HiLo Attention", "2205.13213"),
        ("Less is More: Pay Less Attention in Vision Transformers", "2105.14217"),
    ),
    "https://github.com/ziplab/LITv2",
    "apache-2.0",
)
register_family(FAMILY, LITv2, VARIANTS)
