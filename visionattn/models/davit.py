"""DaViT: attention inside windows and between channels, in turns.

"DaViT: Dual Attention Vision Transformers", arXiv 2204.03645; also the image towers of Florence-2, "Florence-2:
Advancing a Unified Representation for a Variety of Vision Tasks", arXiv 2311.06242. A spatial block refines locally, a
channel block is global at a cost linear in the number of pixels; positions come from depthwise convolutions alone.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch.nn.functional as F
from timm.layers import DropPath, LayerNorm2d, calculate_drop_path_rates
from torch import Tensor, nn

from ..backbone import Hierarchical, Stage, check_lengths
from ..errors import VisionattnError
from ..layers import ChannelAttention, ConvPosEnc, WindowAttention2d
from ..layers.init import init_weights
from ..layers.norm import ChannelNorm
from ..layers.patch import PatchStem
from ..layers.pointwise import Mlp
from ..layers.symbolic import is_symbolic
from ..registry import Family, Variant, Weights, register_family
from ..weights.layouts import renumber

PAIR = ("spatial", "channel")


def _numbered(start: str, types: Sequence[str]) -> list:
    """Rules for the numbers of blocks, which the published layouts count group by group."""
    return [
        (
            rf"^{start}\.(\d)\.{'blocks.' if start == 'stages' else ''}(\d+)\.(?:{which}|{name}_block)\.",
            renumber("stages.{1}.blocks.{0}.", which, times=len(types), group=2),
        )
        for which, name in enumerate(types)
    ]


def _layouts(types: Sequence[str]) -> dict[str, list]:
    official = [
        (r"^patch_embeds\.0\.", "stem."),
        (r"^patch_embeds\.(\d)\.", r"stages.\1.downsample."),
        *_numbered("main_blocks", types),
        (r"\.cpe\.0\.", ".cpe1."),
        (r"\.cpe\.1\.", ".cpe2."),
        (r"\.attn\.", ".mixer."),
        (r"^norms\.", "norm."),
        (r"^norm(\d)\.", r"feature_norms.\1."),  # of the dense prediction code
    ]
    timm = [
        (r"^(stem|stages\.\d\.downsample)\.conv\.", r"\1.proj."),
        *_numbered("stages", types),
        (r"\.attn\.", ".mixer."),
        (r"^head\.norm\.", "norm."),
        (r"^head\.fc\.", "head."),
    ]
    florence2 = [
        (r"^convs\.", "patch_embeds."),
        (r"^blocks\.", "main_blocks."),
        (r"\.conv([12])\.fn\.dw\.", r".cpe\1.proj."),
        (r"\.[a-z]+_attn\.norm\.", ".norm1."),
        (r"\.[a-z]+_attn\.fn\.", ".attn."),
        (r"\.ffn\.norm\.", ".norm2."),
        (r"\.ffn\.fn\.net\.", ".mlp."),
    ]
    return {"official": official, "timm": timm, "florence2": florence2 + official}


class Downsample(nn.Module):
    """LayerNorm, then strided convolution: (B, C, H, W) to (B, C', ceil(H / 2), ceil(W / 2))."""

    def __init__(
        self, dim: int, out_dim: int, kernel_size: int = 2, norm_eps: float = 1e-5, device=None, dtype=None
    ) -> None:
        super().__init__()
        self.norm = LayerNorm2d(dim, eps=norm_eps, device=device, dtype=dtype)
        self.proj = nn.Conv2d(dim, out_dim, kernel_size, 2, (kernel_size - 1) // 2, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        pad_h, pad_w = x.shape[2] % 2, x.shape[3] % 2
        if is_symbolic(pad_h, pad_w):
            # The same in simpler sizes: an odd kernel finds zeros there anyway, an even one leaves a spare row out.
            pad_h = pad_w = 1 - self.proj.kernel_size[0] % 2
        return self.proj(F.pad(self.norm(x), (0, pad_w, 0, pad_h)))


class DualBlock(nn.Module):
    """A residual block with a convolutional position encoding before either branch.

    Args:
        dim: channels.
        mixer: attention.
        mlp: mixes channels; None for a block without that branch.
        norm_eps: epsilon of the norms.
        cpe_act: apply GELU to the convolutions of the position encodings.
        drop_path: probability of dropping a branch of a sample.

    Shape:
        (B, H, W, C) to (B, H, W, C).
    """

    def __init__(
        self,
        dim: int,
        mixer: nn.Module,
        mlp: nn.Module | None,
        *,
        norm_eps: float = 1e-5,
        cpe_act: bool = False,
        drop_path: float = 0.0,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.cpe1 = ConvPosEnc(dim, act=cpe_act, **dd)
        self.norm1 = nn.LayerNorm(dim, norm_eps, **dd)
        self.mixer = mixer
        self.drop_path1 = DropPath(drop_path) if drop_path else nn.Identity()
        self.cpe2 = ConvPosEnc(dim, act=cpe_act, **dd)
        self.mlp = mlp
        if mlp is not None:
            self.norm2 = nn.LayerNorm(dim, norm_eps, **dd)
            self.drop_path2 = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = self.cpe1(x)
        x = x + self.drop_path1(self.mixer(self.norm1(x)))
        x = self.cpe2(x)
        return x if self.mlp is None else x + self.drop_path2(self.mlp(self.norm2(x)))


def _init_weights(module: nn.Module, convolutions: bool = False) -> None:
    init_weights(module)
    if convolutions:
        init_weights(module, nn.Conv2d, partial(nn.init.normal_, std=0.02))


class DaViT(Hierarchical):
    """DaViT.

    Args:
        in_chans: channels of the image.
        num_classes: classes of the head, 0 for none.
        global_pool: pooling before the norm and the head.
        depths: groups of `attention_types` blocks of each stage.
        embed_dims: channels of each stage.
        num_heads: heads of the windows and groups of the channels, of each stage.
        window_size: side of a window.
        mlp_ratio: hidden channels of the MLP per channel.
        qkv_bias: bias of the query, key and value projections.
        attention_types: blocks of a group, "spatial" or "channel".
        ffn: give the blocks an MLP.
        cpe_act: apply GELU to the convolutions of the position encodings.
        down_kernel_size: kernel of the downsampling, 2 or 3.
        overlapped_patch: `down_kernel_size` 3, by its official name.
        channel_attn_v2: channel attention of version 2, as in Florence-2, whose checkpoints have no norm and no head:
            these then stay as they are.
        norm_eps: epsilon of all norms.
        head_norm_first: norm before the pooling.
        weight_init: "conv" to initialise convolutions as the linear maps are, "" for torch's defaults.
        drop_rate: dropout rate before the head.
        drop_path_rate: stochastic depth rate of the last block; it grows linearly from 0.

    Raises:
        VisionattnError: if an attention type, kernel size or initialisation is none of those.
    """

    layouts = _layouts(PAIR)
    feature_norm = staticmethod(partial(LayerNorm2d, eps=1e-5))

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        depths: Sequence[int] = (1, 1, 3, 1),
        embed_dims: Sequence[int] = (96, 192, 384, 768),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        window_size: int = 7,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        attention_types: Sequence[str] = PAIR,
        ffn: bool = True,
        cpe_act: bool = False,
        down_kernel_size: int = 2,
        overlapped_patch: bool = False,
        channel_attn_v2: bool = False,
        norm_eps: float = 1e-5,
        head_norm_first: bool = False,
        weight_init: str = "",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device=None,
        dtype=None,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        for name, value, accepted in (
            ("attention_types", set(attention_types), PAIR),
            ("down_kernel_size", {down_kernel_size}, (2, 3)),
            ("weight_init", {weight_init}, ("", "conv")),
        ):
            if not value or not value <= set(accepted):
                raise VisionattnError(f"expected {name} of {accepted}, got {', '.join(map(repr, sorted(value)))}")

        def mixer(kind: str, dim: int, heads: int) -> nn.Module:
            if kind == "spatial":
                return WindowAttention2d(dim, heads, window_size, qkv_bias, **dd)
            return ChannelAttention(dim, heads, qkv_bias, 2 if channel_attn_v2 else 1, **dd)

        check_lengths(depths=depths, embed_dims=embed_dims, num_heads=num_heads)
        rates = calculate_drop_path_rates(drop_path_rate, [len(attention_types) * n for n in depths], stagewise=True)
        stages = []
        for i, (depth, dim, heads) in enumerate(zip(depths, embed_dims, num_heads, strict=True)):
            blocks = [
                DualBlock(
                    dim,
                    mixer(kind, dim, heads),
                    Mlp(dim, int(dim * mlp_ratio), **dd) if ffn else None,
                    norm_eps=norm_eps,
                    cpe_act=cpe_act,
                    drop_path=rate,
                    **dd,
                )
                for kind, rate in zip(list(attention_types) * depth, rates[i], strict=True)
            ]
            kernel_size = 3 if overlapped_patch else down_kernel_size
            downsample = Downsample(embed_dims[i - 1], dim, kernel_size, norm_eps, **dd) if i else None
            stages.append(Stage(blocks, dim, downsample=downsample))
        super().__init__(
            PatchStem(in_chans, embed_dims[0], kernel_size=7, padding=3, norm_eps=norm_eps, **dd), stages,
            norm=ChannelNorm(embed_dims[-1], norm_eps, **dd), norm_after_pool=not head_norm_first,
            num_classes=num_classes, in_chans=in_chans, global_pool=global_pool, drop_rate=drop_rate, **dd,
        )  # fmt: skip
        if tuple(attention_types) != PAIR:
            self.layouts = _layouts(tuple(attention_types))
        self.image_tower = channel_attn_v2
        self.apply(partial(_init_weights, convolutions=weight_init == "conv"))

    def adapt_state_dict(self, state_dict: dict[str, Tensor], made_for: Mapping[str, Any]) -> dict[str, Tensor]:
        """Adds the norm and the head that the image towers' checkpoints lack, as they are."""
        own = self.state_dict() if self.image_tower else {}
        return {k: v for k, v in own.items() if k.startswith(("norm.", "head."))} | state_dict


def _variant(
    depths: Sequence[int],
    dim: int,
    gmacs: float,
    weights: dict[str, Weights] | None = None,
    drop_path: float | None = None,
    img_size: int = 224,
    **kwargs,
) -> Variant:
    dims = tuple(dim * 2**i for i in range(4))
    kwargs = {"depths": depths, "embed_dims": dims, "num_heads": tuple(d // 32 for d in dims), **kwargs}
    recipe = {} if drop_path is None else {"drop_path_rate": drop_path}
    return Variant(kwargs, gmacs, weights or {}, recipe, img_size)


def _in1k(size: str, top1: float, share: str) -> dict[str, Weights]:
    page = f"https://connecthkuhk-my.sharepoint.com/:u:/g/personal/u3007305_connect_hku_hk/{share}"
    return {"msft_in1k": Weights((), f"timm/davit_{size}.msft_in1k", top1, crop_pct=0.9, page=page)}


def _unreleased(tag: str, top1: float, img_size: int) -> dict[str, Weights]:
    return {tag: Weights(top1=top1, img_size=img_size, crop_pct=1.0, note="not released")}


def _florence2(size: str, repository: str) -> dict[str, Weights]:
    page = f"https://huggingface.co/microsoft/{repository}"
    hub = f"timm/davit_{size}_fl.msft_florence2"
    return {"msft_florence2": Weights((), hub, None, 768, 1.0, 0, page=page, note="keys under vision_tower.")}


DEEP, GIANT = (1, 1, 9, 1), (1, 1, 12, 3)
FLORENCE2 = {"window_size": 12, "overlapped_patch": True, "channel_attn_v2": True, "img_size": 768}
# The huge and giant models of the paper; those that timm calls so do not have its sizes.
PAPER = {"window_size": 16, "overlapped_patch": True, "img_size": 512}
WINDOW12 = {"window_size": 12, "img_size": 384}
VARIANTS = {
    "davit_tiny": _variant(
        (1, 1, 3, 1), 96, 4.522, _in1k("tiny", 82.8, "EcJYlVYP9y5FsDbMP-nwjtABgLmdrNGZBxgR5--Kg3MZ7Q?e=v9OrXB"), 0.1
    ),
    "davit_small": _variant(
        DEEP, 96, 8.773, _in1k("small", 84.2, "ERN_Gzm8oKdIvO01r0X2cscB_owuRAnnQPNGJEVGP23xHQ?e=MVW3ZO"), 0.2
    ),
    "davit_base": _variant(
        DEEP, 128, 15.474, _in1k("base", 84.6, "Ea8kCpdM949CvTM0w7DWbGwBxxiACMSik4zx-emrNY0uKQ?e=aEjC7u"), 0.4
    ),
    "davit_base_window12_384": _variant(DEEP, 128, 46.34, _unreleased("in22k_ft_in1k", 86.9, 384), **WINDOW12),
    "davit_large": _variant(DEEP, 192, 34.540),
    "davit_large_window12_384": _variant(DEEP, 192, 102.805, _unreleased("in22k_ft_in1k", 87.5, 384), **WINDOW12),
    "davit_huge": _variant(DEEP, 256, 61.159),
    "davit_huge_window16_512": _variant(DEEP, 256, 334.30, _unreleased("ft_in1k", 90.2, 512), **PAPER),
    "davit_giant": _variant(GIANT, 384, 192.785),
    "davit_giant_window16_512": _variant(GIANT, 384, 1038.01, _unreleased("ft_in1k", 90.4, 512), **PAPER),
    "davit_base_fl": _variant(DEEP, 128, 189.888, _florence2("base", "Florence-2-base"), num_classes=0, **FLORENCE2),
    "davit_huge_fl": _variant(DEEP, 256, 743.976, _florence2("huge", "Florence-2-large"), num_classes=0, **FLORENCE2),
    "test_davit": _variant((1, 1, 2, 1), 32, 0.03268, img_size=32, overlapped_patch=True),
}
FAMILY = Family(
    "davit",
    (
        ("DaViT: Dual Attention Vision Transformers", "2204.03645"),
        ("Florence-2: Advancing a Unified Representation for a Variety of Vision Tasks", "2311.06242"),
    ),
    "https://github.com/dingmyu/davit",
    "mit",
)
register_family(FAMILY, DaViT, VARIANTS)
