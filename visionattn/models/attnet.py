"""AttNet: a convolutional pyramid on attentive convolution.

"Attentive Convolution: Unifying the Expressivity of Self-Attention with Convolutional Efficiency", arXiv 2510.20092.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from timm.layers import LayerNorm2d, calculate_drop_path_rates
from torch import Tensor, nn

from ..backbone import Hierarchical, Stage, check_lengths
from ..layers import AttentiveConv2d
from ..layers.block import Block
from ..layers.conv_norm import ConvNorm
from ..layers.gated_mlp import GatedMlp
from ..layers.init import init_weights
from ..layers.layout import channels_last
from ..layers.norm import ChannelNorm
from ..registry import Family, Variant, Weights, register_family
from ..weights.layouts import Flatten

RULES = [
    (r"^downsample_layers\.0\.([02])\.0\.", r"stem.\1.proj."),
    (r"^downsample_layers\.0\.([02])\.1\.", r"stem.\1.norm."),
    (r"^downsample_layers\.(\d)\.0\.", r"stages.\1.downsample.proj."),
    (r"^downsample_layers\.(\d)\.1\.", r"stages.\1.downsample.norm."),
    (r"^stages\.(\d)\.(\d+)\.", r"stages.\1.blocks.\2."),
    (r"\.token_mixer\.", ".mixer."),
    (r"\.channel_mixer\.norm_layer\.", ".mlp.norm."),
    (r"\.channel_mixer\.", ".mlp."),
    (r"\.layer_scale_(\d)\.", r".ls\1."),
    (r"\.norm_(\d)\.", r".norm\1."),
    # 1 x 1 convolutions are kept as linear maps.
    (r"((?:^|_|\.)proj|fc[12])\.weight$", r"\1.weight", Flatten()),
]


class AttentiveMixer(AttentiveConv2d):
    """Attentive convolution of (B, H, W, C)."""

    forward = channels_last(AttentiveConv2d.forward)


class AttNetMlp(GatedMlp):
    """Gated MLP of (B, H, W, C)."""

    forward = channels_last(GatedMlp.forward)


class AttNet(Hierarchical):
    """AttNet.

    Args:
        in_chans: channels of the image.
        num_classes: classes of the head, 0 for none.
        global_pool: pooling before the norm and the head.
        depths: blocks of each stage.
        dims: channels of each stage.
        exp_rates: width of the MLP's first product per channel before the gating's share of 2 / 3, for each stage.
        kernel_sizes: of the attentive convolutions, for each stage.
        conv_bias: bias of the projections of the attentive convolutions.
        use_layer_scale: scale the branches, by 1e-6 at the start.
        glu_dconv: convolve the gates of the MLPs, for each stage.
        glu_norm: normalise the gated products of the MLPs, for each stage.
        act_layer: activation of kernels and gates.
        drop_rate: dropout rate of the MLPs and the head.
        drop_path_rate: stochastic depth rate of the last block; it grows linearly from 0.
    """

    layouts = {"official": RULES}
    feature_norm = staticmethod(partial(LayerNorm2d, eps=1e-6))  # that of the blocks; none is published
    first_conv = "stem.0.proj"
    averaged_weights = False

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        depths: Sequence[int] = (2, 3, 12, 3),
        dims: Sequence[int] = (48, 96, 224, 384),
        exp_rates: Sequence[float] = (8, 8, 4, 4),
        kernel_sizes: Sequence[int] = (3, 3, 3, 3),
        conv_bias: bool = True,
        use_layer_scale: bool = True,
        glu_dconv: Sequence[bool] = (True, True, True, True),
        glu_norm: Sequence[bool] = (True, True, True, True),
        act_layer: type[nn.Module] = nn.GELU,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device=None,
        dtype=None,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        check_lengths(
            depths=depths,
            dims=dims,
            exp_rates=exp_rates,
            kernel_sizes=kernel_sizes,
            glu_dconv=glu_dconv,
            glu_norm=glu_norm,
        )
        rates = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)
        stages = []
        for i, dim in enumerate(dims):
            hidden_dim = int(2 * int(dim * exp_rates[i]) / 3)
            blocks = [
                Block(
                    dim,
                    AttentiveMixer(dim, kernel_sizes[i], act_layer, conv_bias, **dd),
                    AttNetMlp(dim, hidden_dim, glu_dconv[i], glu_norm[i], act_layer, drop_rate, **dd),
                    norm_layer=partial(nn.LayerNorm, eps=1e-6),
                    layer_scale=1e-6 if use_layer_scale else None,
                    drop_path=rate,
                    **dd,
                )
                for rate in rates[i]
            ]
            stages.append(Stage(blocks, dim, downsample=ConvNorm(dims[i - 1], dim, 3, 2, **dd) if i else None))
        stem = nn.Sequential(
            ConvNorm(in_chans, dims[0] // 2, 3, 2, **dd), nn.GELU(), ConvNorm(dims[0] // 2, dims[0], 3, 2, **dd)
        )
        super().__init__(
            stem, stages, norm=ChannelNorm(dims[-1], eps=1e-5, **dd), norm_after_pool=True,
            num_classes=num_classes, in_chans=in_chans, global_pool=global_pool, drop_rate=drop_rate, **dd,
        )  # fmt: skip
        self.apply(partial(init_weights, kinds=nn.Linear | nn.Conv2d))

    def adapt_state_dict(self, state_dict: dict[str, Tensor], made_for: Mapping[str, Any]) -> dict[str, Tensor]:
        """Merges layer scales into the products before them, or adds scales of 1: the published code is not of one mind
        about which variants have them."""
        state_dict = dict(state_dict)
        for name, block in self.named_modules():
            if not isinstance(block, Block):
                continue
            for scale, product in (("ls1", "mixer.proj"), ("ls2", "mlp.fc2")):
                key, weight = f"{name}.{scale}.gamma", f"{name}.{product}.weight"
                if hasattr(getattr(block, scale), "gamma") and weight in state_dict:
                    state_dict.setdefault(key, torch.ones_like(state_dict[weight][:, 0]))
                elif key in state_dict and weight in state_dict:
                    gamma, bias = state_dict.pop(key), f"{name}.{product}.bias"
                    state_dict[weight] = state_dict[weight] * gamma[:, None]
                    if bias in state_dict:
                        state_dict[bias] = state_dict[bias] * gamma
        return state_dict


PAGE = (
    "https://unioulu-my.sharepoint.com/:f:/g/personal/hayu23_univ_yo_oulu_fi/"
    "EtaWTnsh1ytNgsIYetHHwt4B1RxG_HDHN70a3NOq3fustw?e=MZ4w5w"
)


def _variant(
    name: str, depths: Sequence[int], dims: Sequence[int], gmacs: float, drop_path: float, weight_decay: float,
    mixup: float, top1: float | None = None, layer_scale: bool = True, norm: bool = True,
) -> Variant:  # fmt: skip
    kwargs = {"depths": depths, "dims": dims, "use_layer_scale": layer_scale, "glu_norm": (norm,) * 4}
    recipe = {"drop_path_rate": drop_path, "weight_decay": weight_decay, "mixup": mixup}
    weights = Weights(top1=top1, page=PAGE, note=f"file AttNet_{name}_<epoch>_<top1>.pth")
    return Variant(kwargs, gmacs, {"in1k": weights}, recipe)


XS_DIMS = (40, 80, 160, 320)
VARIANTS = {
    "attnet_xxs": _variant(
        "XXS", (2, 2, 4, 2), (32, 64, 128, 240), 0.531, 0.0, 0.015, 0.05, layer_scale=False, norm=False
    ),
    "attnet_xs": _variant("XS", (2, 2, 7, 2), XS_DIMS, 1.004, 0.02, 0.025, 0.1, norm=False),
    "attnet_s": _variant("S", (2, 3, 10, 3), XS_DIMS, 1.327, 0.05, 0.025, 0.3, layer_scale=False, norm=False),
    "attnet_t1": _variant("T1", (2, 3, 12, 3), (48, 96, 224, 384), 2.421, 0.1, 0.025, 0.6),
    "attnet_t2": _variant("T2", (3, 3, 16, 3), (64, 128, 288, 512), 5.089, 0.2, 0.05, 0.8, top1=84.4),
    "attnet_t3": _variant("T3", (4, 4, 26, 4), (72, 144, 320, 576), 9.382, 0.4, 0.05, 0.8),
    "attnet_t4": _variant("T4", (5, 5, 28, 5), (96, 192, 384, 768), 16.725, 0.5, 0.05, 0.8),
    "test_attnet": Variant({"depths": (1, 1, 2, 1), "dims": (16, 32, 48, 64)}, 0.001337, img_size=32),
}
FAMILY = Family(
    "attnet",
    (
        (
            "Attentive Convolution: Unifying the Expressivity of Self-Attention with Convolutional Efficiency",
            "2510.20092",
        ),
    ),
    "https://github.com/price112/Attentive-Convolution",
    "mit",
)
register_family(FAMILY, AttNet, VARIANTS)
