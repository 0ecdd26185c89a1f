"""NAT, DiNAT, DiNAT_s and the isotropic models of the same papers.

"Neighborhood Attention Transformer", arXiv 2204.07143, and "Dilated Neighborhood Attention Transformer", arXiv
2209.15001. NAT is a pyramid on neighbourhood attention with a convolutional stem and downsampling; DiNAT dilates every
second layer; DiNAT_s has Swin's patch embedding and merging; the isotropic models are plain ones for comparison.
"""

from collections import OrderedDict
from collections.abc import Sequence
from functools import partial

from timm.layers import LayerNorm2d, PatchEmbed, calculate_drop_path_rates
from torch import Tensor, nn

from ..backbone import Hierarchical, Isotropic, Stage, check_lengths
from ..layers import NeighborhoodAttention2d, TokenNeighborhoodAttention, TokenRelPosAttention
from ..layers.block import Block
from ..layers.init import init_weights
from ..layers.patch import PatchMerging, PatchStem
from ..layers.pointwise import Mlp
from ..registry import Family, Variant, Weights, register_family
from ..weights.layouts import renumber

# Hugging Face's names, then the official ones.
HF_RULES = [
    (r"^(?:dinat|nat)\.embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^(?:dinat|nat)\.embeddings\.norm\.", "patch_embed.norm."),
    (r"^(?:dinat|nat)\.encoder\.levels\.(\d+)\.layers\.(\d+)\.", r"levels.\1.blocks.\2."),
    (r"^(?:dinat|nat)\.encoder\.levels\.(\d+)\.downsample\.", r"levels.\1.downsample."),
    (r"^(?:dinat|nat)\.layernorm\.", "norm."),
    (r"^classifier\.", "head."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"\.attention\.self\.query\.(\w+)$", r".attn.qkv.\1#0"),
    (r"\.attention\.self\.key\.(\w+)$", r".attn.qkv.\1#1"),
    (r"\.attention\.self\.value\.(\w+)$", r".attn.qkv.\1#2"),
    (r"\.attention\.self\.rpb$", ".attn.rpb"),
    (r"\.attention\.output\.dense\.", ".attn.proj."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"\.output\.dense\.", ".mlp.fc2."),
    (r"\.layer_scale_parameters$", ".{gamma1|gamma2}"),
]
OFFICIAL_RULES = [
    (r"^patch_embed\.", "stem."),
    (r"^(?:levels|layers)\.(\d+)\.downsample\.", renumber("stages.{0}.downsample.", 1)),
    (r"^(?:levels|layers)\.(\d+)\.blocks\.", r"stages.\1.blocks."),
    (r"^layers\.(\d+)\.", r"blocks.\1."),
    (r"^norm(\d)\.", r"feature_norms.\1."),  # of the dense prediction code
    (r"^.*\.attn\.relative_position_index$", ""),
    (r"\.attn\.", ".mixer."),
    (r"gamma(\d)", r"ls\1.gamma"),
]
LAYOUTS = {"official": OFFICIAL_RULES, "hf": HF_RULES + OFFICIAL_RULES}


class ConvStem(nn.Module):
    """Two strided 3 x 3 convolutions with nothing between them, then LayerNorm: to a quarter of the image's size."""

    def __init__(self, in_chans: int, dim: int, device=None, dtype=None) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.proj = nn.Sequential(
            nn.Conv2d(in_chans, dim // 2, 3, stride=2, padding=1, **dd),
            nn.Conv2d(dim // 2, dim, 3, stride=2, padding=1, **dd),
        )
        self.norm = LayerNorm2d(dim, eps=1e-5, **dd)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.proj(x))


class ConvDownsample(nn.Sequential):
    """Strided 3 x 3 convolution, then LayerNorm: (B, C, H, W) to (B, 2C, ceil(H / 2), ceil(W / 2))."""

    def __init__(self, dim: int, device=None, dtype=None) -> None:
        dd = {"device": device, "dtype": dtype}
        reduction = nn.Conv2d(dim, 2 * dim, 3, stride=2, padding=1, bias=False, **dd)
        super().__init__(OrderedDict(reduction=reduction, norm=LayerNorm2d(2 * dim, eps=1e-5, **dd)))


class DiNAT(Hierarchical):
    """NAT and DiNAT.

    Args:
        in_chans: channels of the image.
        num_classes: classes of the head, 0 for none.
        global_pool: pooling before the head.
        embed_dim: channels of the first stage; each further stage has twice those of the one before.
        depths: blocks of each stage.
        num_heads: attention heads of each stage; one per 32 channels if None.
        mlp_ratio: hidden channels of the MLP per channel.
        kernel_size: attention window.
        dilations: dilation of every block of every stage; 1 everywhere if None.
        layer_scale: initial layer scale, None for no layer scale.
        qkv_bias: bias of the query, key and value projections.
        qk_scale: factor of the attention logits, head_dim**-0.5 if None.
        drop_rate: dropout rate of the MLPs, attention outputs and head.
        attn_drop_rate: dropout rate of the attention weights.
        drop_path_rate: stochastic depth rate of the last block; it grows linearly from 0.
    """

    layouts = LAYOUTS
    dilates = True
    first_conv = "stem.proj.0"
    feature_norm = staticmethod(partial(LayerNorm2d, eps=1e-5))
    stem_layer: type[nn.Module] = ConvStem
    downsample_layer: type[nn.Module] = ConvDownsample

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dim: int = 64,
        depths: Sequence[int] = (3, 4, 6, 5),
        num_heads: Sequence[int] | None = None,
        mlp_ratio: float = 3.0,
        kernel_size: int = 7,
        dilations: Sequence[Sequence[int]] | None = None,
        layer_scale: float | None = None,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device=None,
        dtype=None,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        check_lengths(depths=depths, num_heads=num_heads, dilations=dilations)
        rates = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)
        stages = []
        for i, depth in enumerate(depths):
            dim = embed_dim * 2**i
            blocks = [
                Block(
                    dim,
                    NeighborhoodAttention2d(
                        dim,
                        num_heads[i] if num_heads else dim // 32,
                        kernel_size,
                        dilations[i][j] if dilations else 1,
                        qkv_bias=qkv_bias,
                        qk_scale=qk_scale,
                        attn_drop=attn_drop_rate,
                        proj_drop=drop_rate,
                        **dd,
                    ),
                    Mlp(dim, int(dim * mlp_ratio), drop=drop_rate, **dd),
                    layer_scale=layer_scale,
                    drop_path=rates[i][j],
                    **dd,
                )
                for j in range(depth)
            ]
            downsample = self.downsample_layer(dim // 2, **dd) if i else None
            stages.append(Stage(blocks, dim, downsample=downsample))
        super().__init__(
            self.stem_layer(in_chans, embed_dim, **dd), stages, norm=LayerNorm2d(stages[-1].dim, eps=1e-5, **dd),
            num_classes=num_classes, in_chans=in_chans, global_pool=global_pool, drop_rate=drop_rate, **dd,
        )  # fmt: skip
        self.apply(init_weights)


class DiNATs(DiNAT):
    """DiNAT_s: DiNAT with Swin's patch embedding and patch merging. Arguments as for `DiNAT`."""

    layouts = {  # which calls levels as Swin does
        "official": [(rule[0].replace("levels|layers", "layers|levels"), *rule[1:]) for rule in OFFICIAL_RULES]
    }
    first_conv = "stem.proj"
    stem_layer = PatchStem
    downsample_layer = PatchMerging


class IsotropicDiNAT(Isotropic):
    """Isotropic NAT and DiNAT, and the ViT with relative position bias they are compared with.

    Args: those of `DiNAT` with one `depth`, and
        global_pool: "avg", "max", "avgmax" or "" for none.
        img_size: image size in pixels that the position bias of the global model is made for.
        patch_size: side of a patch in pixels.
        kernel_size: attention window; None for global attention.
        dilation: dilation of every second block.
    """

    layouts = LAYOUTS

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        embed_dim: int = 384,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        kernel_size: int | None = 7,
        dilation: int = 1,
        layer_scale: float | None = None,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device=None,
        dtype=None,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        stem = PatchEmbed(img_size, patch_size, in_chans, embed_dim, nn.LayerNorm, strict_img_size=False, **dd)
        attention = TokenNeighborhoodAttention if kernel_size else TokenRelPosAttention
        blocks = [
            Block(
                embed_dim,
                attention(
                    embed_dim,
                    num_heads,
                    kernel_size or stem.grid_size,
                    dilation if i % 2 else 1,
                    qkv_bias=qkv_bias,
                    qk_scale=qk_scale,
                    attn_drop=attn_drop_rate,
                    proj_drop=drop_rate,
                    **dd,
                ),
                Mlp(embed_dim, int(embed_dim * mlp_ratio), drop=drop_rate, **dd),
                layer_scale=layer_scale,
                drop_path=rate,
                **dd,
            )
            for i, rate in enumerate(calculate_drop_path_rates(drop_path_rate, depth))
        ]
        super().__init__(
            stem, blocks, norm=nn.LayerNorm(embed_dim, **dd), embed_dim=embed_dim, patch_size=patch_size,
            img_size=img_size, pos_embed=False, class_token=None,
            num_classes=num_classes, in_chans=in_chans, global_pool=global_pool, drop_rate=drop_rate, **dd,
        )  # fmt: skip
        self.apply(init_weights)


PYRAMID, PYRAMID_DEEP, SWIN, SWIN_DEEP = (3, 4, 6, 5), (3, 4, 18, 5), (2, 2, 6, 2), (2, 2, 18, 2)
D224, D384 = (8, 4, 2, 1), (13, 6, 3, 1)
ISO_BASE = {"embed_dim": 768, "num_heads": 24}


def _variant(
    model: type[nn.Module], kwargs: dict, gmacs: float, drop_path: float, path: str, tag: str = "in1k",
    top1: float | None = None, hub: str | None = None, size: int = 224,
) -> Variant:  # fmt: skip
    note = "" if top1 else "the head is not 1000 wide: pass num_classes as in the file, or any other to drop it"
    hub = f"shi-labs/{hub}" if hub else None
    weights = Weights(
        (f"https://shi-labs.com/projects/{path}.pth",), hub, top1, size, 1.0 if size == 384 else 0.875, note=note
    )
    return Variant(kwargs, gmacs, {tag: weights}, {"drop_path_rate": drop_path}, size, model)


def _pyramid(
    embed_dim: int, depths: Sequence[int], mlp_ratio: float, dilations: Sequence[int] | None = None, **kwargs
) -> dict:
    """Arguments of a pyramid in which every second block of a stage has the stage's dilation."""
    if dilations:
        kwargs["dilations"] = [[d if j % 2 else 1 for j in range(n)] for n, d in zip(depths, dilations, strict=True)]
    return {"embed_dim": embed_dim, "depths": depths, "mlp_ratio": mlp_ratio, **kwargs}


def _nat(size: str, kwargs: dict, gmacs: float, drop_path: float, top1: float) -> Variant:
    path, hub = f"nat/checkpoints/CLS/nat_{size}", f"nat-{size}-in1k-224"
    return _variant(DiNAT, kwargs, gmacs, drop_path, path, "in1k", top1, hub)


def _dinat(size: str, kwargs: dict, gmacs: float, drop_path: float, top1: float) -> Variant:
    path, hub = f"dinat/checkpoints/imagenet1k/dinat_{size}_in1k_224", f"dinat-{size}-in1k-224"
    return _variant(DiNAT, kwargs, gmacs, drop_path, path, "in1k", top1, hub)


def _dinat_s(size: str, kwargs: dict, gmacs: float, drop_path: float, top1: float) -> Variant:
    return _variant(
        DiNATs, kwargs, gmacs, drop_path, f"dinat/checkpoints/imagenet1k/dinat_s_{size}_in1k_224", "in1k", top1
    )


def _large(model: type, file: str, kwargs: dict, gmacs: float, top1: float | None = None, **rest) -> Variant:
    folder, tag, drop_path = ("imagenet1k", "in22k_ft_in1k", 0.35) if top1 else ("imagenet22k", "in22k", 0.2)
    return _variant(model, kwargs, gmacs, drop_path, f"dinat/checkpoints/{folder}/{file}", tag, top1, **rest)


def _isotropic(name: str, kwargs: dict, gmacs: float, drop_path: float, top1: float) -> Variant:
    return _variant(
        IsotropicDiNAT, kwargs, gmacs, drop_path, f"dinat/checkpoints/isotropic/{name}_in1k_224", "in1k", top1
    )


DEEP_192, K11 = _pyramid(192, PYRAMID_DEEP, 2, D224), {"kernel_size": 11}
VARIANTS = {
    "nat_mini": _nat("mini", _pyramid(64, PYRAMID, 3), 2.695, 0.2, 81.8),
    "nat_tiny": _nat("tiny", _pyramid(64, PYRAMID_DEEP, 3), 4.295, 0.2, 83.2),
    "nat_small": _nat("small", _pyramid(96, PYRAMID_DEEP, 2, layer_scale=1e-5), 7.772, 0.3, 83.7),
    "nat_base": _nat("base", _pyramid(128, PYRAMID_DEEP, 2, layer_scale=1e-5), 13.677, 0.5, 84.3),
    "dinat_mini": _dinat("mini", _pyramid(64, PYRAMID, 3, D224), 2.695, 0.2, 81.8),
    "dinat_tiny": _dinat("tiny", _pyramid(64, PYRAMID_DEEP, 3, D224), 4.295, 0.2, 82.7),
    # Unlike nat_small, dinat_small was trained without layer scale.
    "dinat_small": _dinat("small", _pyramid(96, PYRAMID_DEEP, 2, D224), 7.772, 0.3, 83.8),
    "dinat_base": _dinat("base", _pyramid(128, PYRAMID_DEEP, 2, D224, layer_scale=1e-5), 13.677, 0.5, 84.4),
    "dinat_large": _large(
        DiNAT, "dinat_large_in22k_in1k_224", DEEP_192, 30.458, 86.6, hub="dinat-large-in22k-in1k-224"
    ),
    "dinat_large_384": _large(
        DiNAT, "dinat_large_in22k_in1k_384", _pyramid(192, PYRAMID_DEEP, 2, D384), 89.505, 87.4,
        hub="dinat-large-in22k-in1k-384", size=384,
    ),
    "dinat_large_384_11x11": _large(
        DiNAT, "dinat_large_in22k_in1k_384_11x11", DEEP_192 | K11, 92.085, 87.5,
        hub="dinat-large-11x11-in22k-in1k-384", size=384,
    ),
    "dinat_large_21k": _large(DiNAT, "dinat_large_in22k_224", DEEP_192, 30.458),
    "dinat_large_21k_11x11": _large(DiNAT, "dinat_large_in22k_224_11x11interp", DEEP_192 | K11, 41.043),
    "dinat_s_tiny": _dinat_s("tiny", _pyramid(96, SWIN, 4, D224), 4.491, 0.2, 81.8),
    "dinat_s_small": _dinat_s("small", _pyramid(96, SWIN_DEEP, 4, D224), 8.741, 0.3, 83.5),
    "dinat_s_base": _dinat_s("base", _pyramid(128, SWIN_DEEP, 4, D224), 15.431, 0.5, 83.8),
    "dinat_s_large": _large(DiNATs, "dinat_s_large_in1k_224", _pyramid(192, SWIN_DEEP, 4, D224), 34.476, 86.5),
    "dinat_s_large_384": _large(
        DiNATs, "dinat_s_large_in1k_384", _pyramid(192, SWIN_DEEP, 4, D384), 101.314, 87.4, size=384
    ),
    "dinat_s_large_21k": _large(DiNATs, "dinat_s_large_in22k_224", _pyramid(192, SWIN_DEEP, 4, D224), 34.476),
    "nat_isotropic_small": _isotropic("nat_isotropic_small", {}, 4.308, 0.1, 80.0),
    "dinat_isotropic_small": _isotropic("dinat_isotropic_small", {"dilation": 2}, 4.308, 0.1, 80.8),
    "vitrpb_small": _isotropic("vitrpb_small", {"kernel_size": None}, 4.574, 0.1, 81.2),
    "nat_isotropic_base": _isotropic("nat_isotropic_base", ISO_BASE, 16.941, 0.4, 81.6),
    "dinat_isotropic_base": _isotropic("dinat_isotropic_base", {**ISO_BASE, "dilation": 2}, 16.941, 0.4, 82.1),
    "vitrpb_base": _isotropic("vitrpb_base", {**ISO_BASE, "kernel_size": None}, 17.472, 0.4, 82.5),
    "test_dinat": Variant(
        _pyramid(16, (2, 2, 2, 2), 3, (2, 2, 1, 1), num_heads=(1, 2, 4, 8), kernel_size=3), 0.002889, img_size=32
    ),
}  # fmt: skip
FAMILY = Family(
    "dinat",
    (
        ("Neighborhood Attention Transformer", "2204.07143"),
        ("Dilated Neighborhood Attention Transformer", "2209.15001"),
    ),
    "https://github.com/SHI-Labs/Neighborhood-Attention-Transformer",
    "mit",
)
register_family(FAMILY, DiNAT, VARIANTS)
