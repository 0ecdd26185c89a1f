"""NaLaFormer: a pyramid of linear attention that is aware of the query's length, and of softmax attention below.

"NaLaFormer: Norm-Aware Linear Attention for Transformer Models", arXiv 2506.21137, later "Norm x Direction: Restoring
the Missing Query Norm in Vision Linear Attention". Its weights are not released; how the whole network calls its
parameters is not published either, so that the names are ours.
"""

from collections.abc import Sequence
from functools import partial
from itertools import pairwise

from timm.layers import LayerNorm2d, calculate_drop_path_rates
from torch import Tensor, nn

from ..backbone import Hierarchical, Stage, check_lengths
from ..layers import ConvPosEnc, NormAwareLinearAttention
from ..layers.block import Block
from ..layers.conv_norm import ConvNorm
from ..layers.init import init_weights
from ..layers.layout import channels_last
from ..layers.pointwise import Pointwise, Pointwise2d
from ..registry import Family, Variant, Weights, register_family


class NormAwareMixer(NormAwareLinearAttention):
    """Norm-aware linear attention of (B, H, W, C)."""

    forward = channels_last(NormAwareLinearAttention.forward)


class ConvMlp(nn.Module):
    """MLP that adds a 3 x 3 depthwise convolution of the hidden map to it: (B, H, W, C) to (B, H, W, C).

    Args:
        dim: channels in and out.
        hidden_dim: channels between.
    """

    last_product = "fc2"

    def __init__(self, dim: int, hidden_dim: int, device=None, dtype=None) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.fc1 = Pointwise(dim, hidden_dim, **dd)
        self.act = nn.GELU()
        self.dwconv = ConvPosEnc(hidden_dim, **dd)
        self.fc2 = Pointwise(hidden_dim, dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.dwconv(self.act(self.fc1(x))))


class PositionedBlock(Block):
    """`Block` with a convolutional position encoding before either branch.

    Args: those of `Block`.
    """

    def __init__(self, dim: int, mixer: nn.Module, mlp: nn.Module, *, device=None, dtype=None, **kwargs) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__(dim, mixer, mlp, **kwargs, **dd)
        self.cpe1, self.cpe2 = ConvPosEnc(dim, **dd), ConvPosEnc(dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        x = self.cpe1(x)
        x = self.cpe2(x + self.drop_path1(self.ls1(self.mixer(self.norm1(x)))))
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))


def _stem(in_chans: int, dim: int, **dd) -> nn.Sequential:
    """Four convolutions with batch norms, GELU between them: to a quarter of the image's size."""
    widths, layers = (in_chans, dim // 2, dim // 2, dim // 2, dim), []
    for (before, after), stride in zip(pairwise(widths), (2, 1, 1, 2), strict=True):
        layers += [ConvNorm(before, after, 3, stride, bias=True, **dd), nn.GELU()]
    return nn.Sequential(*layers[:-1])


class NaLaFormer(Hierarchical):
    """NaLaFormer.

    Args:
        in_chans: channels of the image.
        num_classes: classes of the head, 0 for none.
        global_pool: pooling of the head's hidden layer.
        embed_dims: channels of each stage.
        depths: blocks of each stage.
        num_heads: attention heads of each stage.
        mlp_ratio: hidden channels of the MLP per channel.
        layer_scales: of each stage, initial layer scale.
        kernels: of each stage, that of `NormAwareLinearAttention`.
        feature_dim: channels of the head's hidden layer.
        drop_rate: dropout rate before the head.
        drop_path_rate: stochastic depth rate of the last block; it grows linearly from 0.
    """

    first_conv = "stem.0.proj"
    feature_norm = staticmethod(partial(LayerNorm2d, eps=1e-6))  # that of the blocks; none is published

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dims: Sequence[int] = (64, 128, 256, 512),
        depths: Sequence[int] = (2, 2, 6, 2),
        num_heads: Sequence[int] = (1, 2, 4, 8),
        mlp_ratio: float = 4.0,
        layer_scales: Sequence[float] = (1.0, 1.0, 1.0, 1.0),
        kernels: Sequence[str] = ("norm_aware", "norm_aware", "softmax", "softmax"),
        feature_dim: int = 1024,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device=None,
        dtype=None,
    ) -> None:
        dd, stages = {"device": device, "dtype": dtype}, []
        check_lengths(
            embed_dims=embed_dims, depths=depths, num_heads=num_heads, layer_scales=layer_scales, kernels=kernels
        )
        rates = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)
        per_stage = zip(embed_dims, num_heads, layer_scales, kernels, rates, strict=True)
        for i, (dim, heads, scale, kernel, drop_paths) in enumerate(per_stage):
            blocks = [
                PositionedBlock(
                    dim, NormAwareMixer(dim, heads, kernel, **dd), ConvMlp(dim, int(dim * mlp_ratio), **dd),
                    norm_layer=partial(nn.LayerNorm, eps=1e-6), layer_scale=scale, drop_path=rate, **dd,
                )
                for rate in drop_paths
            ]  # fmt: skip
            downsample = ConvNorm(embed_dims[i - 1], dim, 3, 2, bias=True, **dd) if i else None
            stages.append(Stage(blocks, dim, downsample=downsample))
        hidden = Pointwise2d(embed_dims[-1], feature_dim, **dd), nn.BatchNorm2d(feature_dim, **dd), nn.SiLU()
        super().__init__(
            _stem(in_chans, embed_dims[0], **dd), stages, norm=nn.Sequential(*hidden), num_features=feature_dim,
            num_classes=num_classes, in_chans=in_chans, global_pool=global_pool, drop_rate=drop_rate, **dd,
        )  # fmt: skip
        self.apply(partial(init_weights, kinds=nn.Conv2d))  # linear maps keep torch's default
        init_weights(self.head)  # which is a convolution in the published code


def _variant(
    embed_dims: Sequence[int], depths: Sequence[int], num_heads: Sequence[int], mlp_ratio: float, gmacs: float,
    drop_path: float, top1: float, layer_scales: Sequence[float] = (1.0, 1.0, 1.0, 1.0),
) -> Variant:  # fmt: skip
    kwargs = {
        "embed_dims": embed_dims, "depths": depths, "num_heads": num_heads, "mlp_ratio": mlp_ratio,
        "layer_scales": layer_scales,
    }  # fmt: skip
    weights = {"in1k": Weights(top1=top1, note="not released")}
    return Variant(kwargs, gmacs, weights, {"drop_path_rate": drop_path})


VARIANTS = {
    # The paper's table gives 8 M parameters; what is configured has 6.1.
    "nalaformer_xt": _variant((32, 64, 128, 384), (2, 2, 2, 2), (1, 2, 4, 12), 3.5, 0.644, 0.1, 79.1),
    "nalaformer_t": _variant((64, 128, 256, 512), (2, 2, 6, 2), (1, 2, 4, 8), 4.0, 2.856, 0.1, 82.6),
    "nalaformer_s": _variant((64, 128, 320, 512), (3, 5, 9, 3), (1, 2, 5, 8), 3.5, 5.033, 0.15, 84.3),
    "nalaformer_b": _variant(
        (96, 192, 384, 512), (4, 6, 12, 6), (1, 2, 6, 8), 4.0, 11.736, 0.4, 85.2, (1.0, 1.0, 1e-6, 1e-6)
    ),
    "nalaformer_l": _variant((96, 192, 448, 640), (4, 7, 19, 8), (1, 2, 7, 10), 3.5, 17.676, 0.55, 85.7, (1e-6,) * 4),
    "test_nalaformer": Variant(
        {
            "embed_dims": (16, 32, 48, 64), "depths": (1, 1, 2, 1), "num_heads": (1, 2, 2, 4), "mlp_ratio": 3.5,
            "feature_dim": 96,
        },
        0.001596,
        img_size=32,
    ),
}  # fmt: skip
FAMILY = Family(
    "nalaformer",
    (("NaLaFormer: Norm-Aware Linear Attention for Transformer Models", "2506.21137"),),
    "https://github.com/ZacharyMeng/NaLaFormer",
    "mit",
)
register_family(FAMILY, NaLaFormer, VARIANTS)
