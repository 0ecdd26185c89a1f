"""HorNet: a convolutional pyramid on recursive gated convolutions.

"HorNet: Efficient High-Order Spatial Interactions with Recursive Gated Convolutions", arXiv 2207.14284.
"""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from timm.layers import LayerNorm2d, calculate_drop_path_rates
from torch import Tensor, nn

from ..backbone import Hierarchical, Stage, check_lengths
from ..errors import VisionattnError
from ..layers import RecursiveGatedConv
from ..layers.block import Block
from ..layers.init import TRUNCATED, init_weights
from ..layers.layout import channels_last
from ..layers.norm import ChannelNorm
from ..layers.patch import PatchConv2d
from ..layers.pointwise import Mlp
from ..layers.recursive_gated_conv import resize_filter
from ..registry import Family, Variant, Weights, register_family
from ..weights.layouts import Flatten

RULES = [
    (r"^downsample_layers\.0\.0\.", "stem.proj."),
    (r"^downsample_layers\.0\.1\.", "stem.norm."),
    (r"^downsample_layers\.(\d)\.0\.", r"stages.\1.downsample.norm."),
    (r"^downsample_layers\.(\d)\.1\.", r"stages.\1.downsample.proj."),
    (r"^stages\.(\d)\.(\d+)\.", r"stages.\1.blocks.\2."),
    (r"\.gamma([12])$", r".ls\1.gamma"),
    (r"\.gnconv\.dwconv\.", ".mixer.filter."),
    (r"\.gnconv\.", ".mixer."),
    (r"\.pwconv([12])\.", r".mlp.fc\1."),
    (r"^norm(\d)\.", r"feature_norms.\1."),  # of the dense prediction code
    # 1 x 1 convolutions are kept as linear maps.
    (r"\.(proj_in|proj_out|pws\.\d)\.weight$", r".\1.weight", Flatten()),
]


class GatedConvMixer(RecursiveGatedConv):
    """Recursive gated convolution of (B, H, W, C)."""

    forward = channels_last(RecursiveGatedConv.forward)


class HorNet(Hierarchical):
    """HorNet.

    Args:
        in_chans: channels of the image.
        num_classes: classes of the head, 0 for none.
        global_pool: pooling before the norm and the head.
        depths: blocks of each stage.
        base_dim: channels of the first stage; each further stage has twice those of the one before.
        orders: gates of the convolutions of each stage.
        gflayer: for each stage, whether it has the global-local filter instead of the 7 x 7 convolution.
        filter_hw: (height, width) of the stored frequency filter of each stage, or None where it has none.
        scale: factor of the filters' output.
        layer_scale_init_value: initial layer scale, 0 for no layer scale.
        head_init_scale: factor of the initial weights of the head.
        uniform_init: initialise by Xavier's uniform distribution instead of a normal one.
        drop_rate: dropout rate before the head.
        drop_path_rate: stochastic depth rate of the last block; it grows linearly from 0.

    Raises:
        VisionattnError: if the arguments of the stages are not of one length, or a stage lacks its filter's size.
    """

    layouts = {"official": RULES}
    feature_norm = staticmethod(partial(LayerNorm2d, eps=1e-6))
    averaged_weights = False
    dilates = True

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        depths: Sequence[int] = (2, 3, 18, 2),
        base_dim: int = 64,
        orders: Sequence[int] = (2, 3, 4, 5),
        gflayer: Sequence[bool] = (False, False, False, False),
        filter_hw: Sequence[tuple[int, int] | None] | None = None,
        scale: float = 1 / 3,
        layer_scale_init_value: float = 1e-6,
        head_init_scale: float = 1.0,
        uniform_init: bool = False,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device=None,
        dtype=None,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        filter_hw = filter_hw or (None,) * len(depths)
        check_lengths(depths=depths, orders=orders, gflayer=gflayer, filter_hw=filter_hw)
        rates = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)
        stages = []
        for i, (order, is_global, size) in enumerate(zip(orders, gflayer, filter_hw, strict=True)):
            if is_global and size is None:
                raise VisionattnError(f"expected (height, width) in filter_hw for stage {i} with gflayer, got None")
            dim = base_dim * 2**i
            filter_args = {"filter": "global_local", "filter_size": tuple(size)} if is_global else {}
            blocks = [
                Block(
                    dim,
                    GatedConvMixer(dim, order, scale, **filter_args, **dd),
                    Mlp(dim, 4 * dim, **dd),
                    norm_layer=partial(nn.LayerNorm, eps=1e-6),
                    layer_scale=layer_scale_init_value if layer_scale_init_value > 0 else None,
                    drop_path=rate,
                    **dd,
                )
                for rate in rates[i]
            ]
            norm, proj = LayerNorm2d(dim // 2, eps=1e-6, **dd), PatchConv2d(dim // 2, dim, 2, **dd)
            downsample = nn.Sequential(OrderedDict(norm=norm, proj=proj)) if i else None
            stages.append(Stage(blocks, dim, downsample=downsample))
        proj, norm = nn.Conv2d(in_chans, base_dim, 4, stride=4, **dd), LayerNorm2d(base_dim, eps=1e-6, **dd)
        super().__init__(
            nn.Sequential(OrderedDict(proj=proj, norm=norm)), stages,
            norm=ChannelNorm(stages[-1].dim, eps=1e-6, **dd), norm_after_pool=True,
            num_classes=num_classes, in_chans=in_chans, global_pool=global_pool, drop_rate=drop_rate, **dd,
        )  # fmt: skip
        draw = nn.init.xavier_uniform_ if uniform_init else TRUNCATED
        self.apply(partial(init_weights, kinds=nn.Linear | nn.Conv2d, draw=draw))
        if num_classes:
            with torch.no_grad():
                self.head.weight.mul_(head_init_scale)
                self.head.bias.mul_(head_init_scale)

    def group_matcher(self, coarse: bool = False) -> dict:
        """Patterns that group parameters by depth, as the published fine-tuning does: pairs of blocks of the third
        stage share a learning rate, as do all blocks of another stage, the last with its downsampling."""
        if coarse:
            return super().group_matcher(coarse)
        third = self.stages[2].blocks if len(self.stages) > 2 else ()
        deep = [(rf"^stages\.2\.blocks\.{j}\.", (min(3 + j // 2, 11),)) for j in range(len(third))]
        stages = [(rf"^stages\.{i}\.", (depth,)) for i, depth in enumerate((1, 2, 3, 12))]
        return {"stem": r"^stem", "blocks": deep + stages}

    def adapt_state_dict(self, state_dict: dict[str, Tensor], made_for: Mapping[str, Any]) -> dict[str, Tensor]:
        """Resizes frequency filters that were stored for images of another size."""
        own = {k: v.shape for k, v in self.state_dict().items() if k.endswith(".complex_weight")}
        return state_dict | {
            k: resize_filter(state_dict[k], *shape[1:3])
            for k, shape in own.items()
            if k in state_dict and state_dict[k].ndim == 4 and state_dict[k].shape[0] == shape[0]
        }


def _gf(stage2: tuple[int, int], stage3: tuple[int, int]) -> dict:
    return {"gflayer": (False, False, True, True), "filter_hw": (None, None, stage2, stage3)}


def _url(share: str) -> tuple[str, ...]:
    return (f"https://cloud.tsinghua.edu.cn/f/{share}/?dl=1",)


def _in1k(
    kwargs: dict, gmacs: float, share: str, top1: float, drop_path: float, clip: float, magnitude: int = 9
) -> Variant:
    recipe = {"drop_path_rate": drop_path, "clip_grad": clip, "randaugment": magnitude}
    return Variant(kwargs, gmacs, {"in1k": Weights(_url(share), top1=top1)}, recipe)


SQUASH_384 = {"img_size": 384, "crop_pct": 1.0, "cfg": {"crop_mode": "squash"}}
PUBLISHED_HEAD = "a head of 10459 classes of ImageNet-22k, as many as the published parameter count says"


def _large(
    kwargs: dict, gmacs: float, share: str, clip: float, fine_tuned: dict[str, Weights], **evaluation
) -> Variant:
    """The 22k classifier, which is published, and the fine-tuned versions, which are not."""
    pretrained = Weights(_url(share), num_classes=10459, note=PUBLISHED_HEAD, **evaluation)
    recipe = {"drop_path_rate": 0.2, "clip_grad": clip, "weight_decay": 0.1}
    img_size = evaluation.get("img_size", 224)
    return Variant(kwargs, gmacs, fine_tuned | {"in22k": pretrained}, recipe, img_size)


GF, GF_384 = _gf((14, 8), (7, 4)), _gf((24, 13), (12, 7))
SMALL, BASE, LARGE = {"base_dim": 96}, {"base_dim": 128}, {"base_dim": 192}
VARIANTS = {
    "hornet_tiny_7x7": _in1k({}, 3.968, "bac9690c72944d19aca1", 82.8, 0.2, 100),
    "hornet_tiny_gf": _in1k(GF, 3.889, "460e759c82324ea6bfa3", 83.0, 0.2, 1),
    "hornet_small_7x7": _in1k(SMALL, 8.814, "8ef64277da0e469ea857", 83.8, 0.4, 5),
    "hornet_small_gf": _in1k(SMALL | GF, 8.694, "959603ca287d4c09ad49", 84.0, 0.4, 1, 12),
    "hornet_base_7x7": _in1k(BASE, 15.567, "13a748487711492e9704", 84.2, 0.5, 5),
    "hornet_base_gf": _in1k(BASE | GF, 15.408, "c212d1d8a3914b47a5c1", 84.3, 0.5, 1, 15),
    "hornet_base_gf_img384": Variant(BASE | GF_384, 45.278, recipe={"drop_path_rate": 0.5}, img_size=384),
    "hornet_large_7x7": _large(
        LARGE,
        34.796,
        "c2fc23caae084a3aa73d",
        5,
        {
            "in22k_ft_in1k": Weights(top1=86.8, note="not released"),
            "in22k_ft_in1k_384": Weights(gmacs=102.255, note="not released", **SQUASH_384),
        },
    ),
    "hornet_large_gf": _large(
        LARGE | GF,
        34.557,
        "8600206ebdfa485f98d0",
        1,
        {"in22k_ft_in1k": Weights(top1=87.0, note="not released")},
    ),
    "hornet_large_gf_img384": _large(
        LARGE | GF_384,
        101.553,
        "eec48d5eca5a48d98fd2",
        1,
        {"in22k_ft_in1k": Weights(top1=87.7, note="not released", **SQUASH_384)},
        **SQUASH_384,
    ),
    "test_hornet": Variant({"base_dim": 16, "depths": (1, 1, 2, 1), **_gf((4, 3), (2, 2))}, 0.001352, img_size=32),
}
FAMILY = Family(
    "hornet",
    (("HorNet: Efficient High-Order Spatial Interactions with Recursive Gated Convolutions", "2207.14284"),),
    "https://github.com/raoyongming/HorNet",
    "mit",
)
register_family(FAMILY, HorNet, VARIANTS)
