"""FocalNet: a pyramid, or an isotropic model, on focal modulation. "Focal Modulation Networks", arXiv 2203.11926."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch.nn.functional as F
from timm.layers import LayerNorm2d, calculate_drop_path_rates
from torch import Tensor, nn

from ..backbone import Hierarchical, Isotropic, Stage, check_lengths
from ..layers import FocalModulation, TokenFocalModulation
from ..layers.block import Block
from ..layers.focal_modulation import fit_tensor
from ..layers.fuse import fuse_scale
from ..layers.init import init_weights
from ..layers.patch import PatchConv2d
from ..layers.pointwise import Mlp
from ..registry import Family, Variant, Weights, register_family
from ..weights.layouts import Flatten, renumber

# Hugging Face's names, then the official ones.
HF_RULES = [
    (r"^focalnet\.embeddings\.mask_token$", ""),
    (r"^focalnet\.embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^focalnet\.embeddings\.norm\.", "patch_embed.norm."),
    (r"^focalnet\.encoder\.stages\.(\d)\.layers\.", r"layers.\1.blocks."),
    (r"^focalnet\.encoder\.stages\.(\d)\.downsample\.projection\.", r"layers.\1.downsample.proj."),
    (r"^focalnet\.encoder\.stages\.(\d)\.downsample\.norm\.", r"layers.\1.downsample.norm."),
    (r"^focalnet\.layernorm\.", "norm."),
    (r"^classifier\.", "head."),
    (r"\.modulation\.projection_in\.", ".modulation.f."),
    (r"\.modulation\.projection_context\.", ".modulation.h."),
    (r"\.modulation\.projection_out\.", ".modulation.proj."),
    (r"\.modulation\.layernorm\.", ".modulation.ln."),
]
BLOCK_RULES = [
    (r"\.modulation\.focal_layers\.(\d)\.0\.", r".mixer.focal_layers.\1."),
    (r"\.modulation\.ln\.", ".mixer.norm."),
    (r"\.modulation\.", ".mixer."),
    (r"\.gamma_(\d)$", r".ls\1.gamma"),
    # 1 x 1 convolutions are kept as linear maps.
    (r"\.(mixer\.f|mixer\.proj|mlp\.fc[12])\.weight$", r".\1.weight", lambda weight: weight.flatten(1)),  # timm's
    (r"\.(mixer\.h)\.weight$", r".\1.weight", Flatten()),
]
OFFICIAL_RULES = [
    (r"^patch_embed\.", "stem."),
    (r"^layers\.(\d)\.downsample\.", renumber("stages.{0}.downsample.", 1)),
    (r"^layers\.(\d)\.blocks\.", r"stages.\1.blocks."),
    (r"^norm(\d)\.", r"feature_norms.\1."),  # of the dense prediction code
    *BLOCK_RULES,
]
TIMM_RULES = [
    (r"^layers\.(\d)\.", r"stages.\1."),
    (r"^head\.fc\.", "head."),
    (r"\.norm(\d)_post\.", r".norm\1."),
    *BLOCK_RULES,
]
ISOTROPIC_RULES = [(r"^patch_embed\.", "stem."), (r"^layers\.0\.blocks\.", "blocks."), *BLOCK_RULES]


class PatchEmbedding(nn.Module):
    """Strided convolution, then LayerNorm: to 1 / stride of the map's size.

    With `overlap` kernels are 7 x 7 for stride 4 and 3 x 3 for stride 2; else they are patches of that size. With `pad`
    the map is padded with zeros at the bottom and right to a multiple of the stride.

    Shape:
        (B, C_in, H, W) to (B, C, H', W') with H' = H // stride, (H + 1) // 4 or ceil(H / 2) if patches overlap.
    """

    def __init__(
        self, in_chans: int, dim: int, stride: int, overlap: bool, norm: bool = True, pad: bool = False,
        drop: float = 0.0, device=None, dtype=None,
    ) -> None:  # fmt: skip
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.pad_to = stride if pad else 1
        if overlap:
            self.proj = nn.Conv2d(in_chans, dim, *((7, 4, 2) if stride == 4 else (3, 2, 1)), **dd)
        else:
            self.proj = PatchConv2d(in_chans, dim, stride, **dd)
        self.norm = LayerNorm2d(dim, eps=1e-5, **dd) if norm else nn.Identity()
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        if self.pad_to > 1 and self.proj.stride[0] > 1:
            x = F.pad(x, (0, -x.shape[3] % self.pad_to, 0, -x.shape[2] % self.pad_to))
        return self.drop(self.norm(self.proj(x)))


class PostNormBlock(Block):
    """x + norm1(mixer(x)), then x + norm2(mlp(x)), otherwise as `Block`."""

    def fuse(self) -> None:
        """Merge the layer scales into the norms, for inference."""
        fuse_scale(self, "ls1", self.norm1)
        fuse_scale(self, "ls2", self.norm2)

    def forward(self, x: Tensor, *args) -> Tensor:
        x = x + self.drop_path1(self.ls1(self.norm1(self.mixer(x, *args))))
        return x + self.drop_path2(self.ls2(self.norm2(self.mlp(x))))


def _block(
    dim: int, mixer: FocalModulation, mlp_ratio: float, drop: float, use_postln: bool, scale: float | None,
    drop_path: float, **dd,
) -> Block:  # fmt: skip
    mlp = Mlp(dim, int(dim * mlp_ratio), drop=drop, **dd)
    return (PostNormBlock if use_postln else Block)(dim, mixer, mlp, layer_scale=scale, drop_path=drop_path, **dd)


def _init_linear(model: nn.Module) -> None:
    """Linear maps, but not those that the published code writes as a convolution, which keep PyTorch's default."""
    for name, module in model.named_modules():
        if not name.endswith(".mixer.h"):
            init_weights(module)


class FocalNet(Hierarchical):
    """FocalNet.

    Args:
        in_chans: channels of the image.
        num_classes: classes of the head, 0 for none.
        global_pool: pooling before the head.
        patch_size: stride of the stem.
        embed_dim: channels of the first stage; each further stage has twice those of the one before.
        depths: blocks of each stage.
        mlp_ratio: hidden channels of the MLP per channel.
        patch_norm: LayerNorm after the stem's convolution.
        focal_levels: levels of the modulation in each stage, or one number for all.
        focal_windows: first kernel size of the modulation in each stage, or one number for all.
        use_conv_embed: overlapping patches in the stem and between stages; `patch_size` is then 4.
        use_layerscale: learn a scale of each branch.
        layerscale_value: its initial value.
        use_postln: normalise the output of the branches instead of their input.
        use_postln_in_modulation: LayerNorm before the last projection of the modulation.
        normalize_modulator: divide the sum of contexts in the modulation by their number.
        drop_rate: dropout rate after the stem, of the MLPs and modulations, and before the head.
        drop_path_rate: stochastic depth rate of the last block; it grows linearly from 0.
        pad_to_patch: pad images and maps with zeros to multiples of the patch size instead of dropping what is over, as
            the published code for dense prediction does. The padding takes part in the modulation.
        feature_norms: LayerNorm of each stage's output in `forward_intermediates` and `features_only`, as in the
            published code for dense prediction, instead of one before the head.
        adapt_checkpoints: fit checkpoints of models with other kernel sizes, fewer levels or without `feature_norms`.
            Larger kernels are an exact fit, smaller ones are not, and neither are more levels.
    """

    layouts = {"official": OFFICIAL_RULES, "timm": TIMM_RULES, "hf": HF_RULES + OFFICIAL_RULES}
    dilates = True
    feature_norm = staticmethod(partial(LayerNorm2d, eps=1e-5))
    feature_cfg = Hierarchical.feature_cfg | {"feature_cls": "getter"}  # which has the norms of features

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        patch_size: int = 4,
        embed_dim: int = 96,
        depths: Sequence[int] = (2, 2, 6, 2),
        mlp_ratio: float = 4.0,
        patch_norm: bool = True,
        focal_levels: int | Sequence[int] = 2,
        focal_windows: int | Sequence[int] = 3,
        use_conv_embed: bool = False,
        use_layerscale: bool = False,
        layerscale_value: float = 1e-4,
        use_postln: bool = False,
        use_postln_in_modulation: bool = False,
        normalize_modulator: bool = False,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        pad_to_patch: bool = False,
        feature_norms: bool = False,
        adapt_checkpoints: bool = False,
        device=None,
        dtype=None,
    ) -> None:
        scale, dd = layerscale_value if use_layerscale else None, {"device": device, "dtype": dtype}
        modulation = {
            "proj_drop": drop_rate, "use_postln_in_modulation": use_postln_in_modulation,
            "normalize_modulator": normalize_modulator, **dd,
        }  # fmt: skip
        patch_size = 4 if use_conv_embed else patch_size
        levels, windows = ([n] * len(depths) if isinstance(n, int) else n for n in (focal_levels, focal_windows))
        check_lengths(depths=depths, focal_levels=levels, focal_windows=windows)
        rates = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)
        dims = [embed_dim * 2**i for i in range(len(depths))]
        stages = []
        for i, dim in enumerate(dims):
            blocks = [
                _block(
                    dim, FocalModulation(dim, windows[i], levels[i], **modulation), mlp_ratio, drop=drop_rate,
                    use_postln=use_postln, scale=scale, drop_path=rate, **dd,
                ) for rate in rates[i]
            ]  # fmt: skip
            downsample = PatchEmbedding(dims[i - 1], dim, 2, use_conv_embed, pad=pad_to_patch, **dd) if i else None
            stages.append(Stage(blocks, dim, downsample=downsample))
        norms = [LayerNorm2d(dim, eps=1e-5, **dd) for dim in dims]
        super().__init__(
            PatchEmbedding(
                in_chans, dims[0], patch_size, use_conv_embed, norm=patch_norm, pad=pad_to_patch, drop=drop_rate, **dd
            ),
            stages, reductions=[patch_size * 2**i for i in range(len(dims))], norm=None if feature_norms else norms[-1],
            feature_norms=norms if feature_norms else None,
            num_classes=num_classes, in_chans=in_chans, global_pool=global_pool, drop_rate=drop_rate, **dd,
        )  # fmt: skip
        self.adapt_checkpoints = adapt_checkpoints
        _init_linear(self)

    def adapt_state_dict(self, state_dict: dict[str, Tensor], made_for: Mapping[str, Any]) -> dict[str, Tensor]:
        """Fits kernels, levels and norms to this model with `adapt_checkpoints`."""
        if not self.adapt_checkpoints:
            return state_dict
        own = self.state_dict()
        added = ("feature_norms.", ".focal_layers.")
        fitted = {key: value for key, value in own.items() if any(part in key for part in added)}
        fitted |= {key: fit_tensor(key, value, own[key]) if key in own else value for key, value in state_dict.items()}
        return {k: v for k, v in fitted.items() if k in own or not k.startswith("norm.")}


class IsotropicFocalNet(Isotropic):
    """FocalNet on one sequence of patches. What an image has beyond a multiple of the patch size is dropped.

    Args: those of `FocalNet` that do not concern stages, and
        global_pool: "avg", "max", "avgmax" or "" for none.
        img_size: without effect, any size will do.
        depth: blocks.
        focal_level: levels of the modulation.
        focal_window: first kernel size of the modulation.
    """

    layouts = {"official": ISOTROPIC_RULES, "hf": HF_RULES + ISOTROPIC_RULES}

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        embed_dim: int = 192,
        depth: int = 12,
        mlp_ratio: float = 4.0,
        patch_norm: bool = True,
        focal_level: int = 3,
        focal_window: int = 3,
        use_layerscale: bool = False,
        layerscale_value: float = 1e-4,
        use_postln: bool = False,
        use_postln_in_modulation: bool = False,
        normalize_modulator: bool = False,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device=None,
        dtype=None,
    ) -> None:
        scale, dd = layerscale_value if use_layerscale else None, {"device": device, "dtype": dtype}
        modulation = {
            "proj_drop": drop_rate, "use_postln_in_modulation": use_postln_in_modulation,
            "normalize_modulator": normalize_modulator, **dd,
        }  # fmt: skip
        blocks = [
            _block(
                embed_dim, TokenFocalModulation(embed_dim, focal_window, focal_level, **modulation), mlp_ratio,
                drop=drop_rate, use_postln=use_postln, scale=scale, drop_path=rate, **dd,
            ) for rate in calculate_drop_path_rates(drop_path_rate, depth)
        ]  # fmt: skip
        stem = PatchEmbedding(in_chans, embed_dim, patch_size, overlap=False, norm=patch_norm, **dd)
        super().__init__(
            stem, blocks, norm=nn.LayerNorm(embed_dim, **dd), embed_dim=embed_dim, patch_size=patch_size,
            img_size=img_size, pos_embed=False, class_token=None,
            num_classes=num_classes, in_chans=in_chans, global_pool=global_pool, drop_rate=drop_rate, **dd,
        )  # fmt: skip
        _init_linear(self)

    def _embed(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        x = self.check(x)
        grid = x.shape[-2] // self.patch_size, x.shape[-1] // self.patch_size
        return self.pos_drop(self.stem(x).flatten(2).transpose(1, 2)), grid


RELEASES = "https://github.com/microsoft/FocalNet/releases/download/v1.0.0"
STORE = "https://projects4jw.blob.core.windows.net/focalnet/release/classification"


def _in1k(name: str, kwargs: dict, gmacs: float, drop_path: float, top1: float) -> Variant:
    urls = f"{RELEASES}/focalnet_{name}.pth", f"{STORE}/focalnet_{name}.pth"
    weights = Weights(urls, f"timm/focalnet_{name}.ms_in1k", top1)
    return Variant(kwargs, gmacs, {"ms_in1k": weights}, {"drop_path_rate": drop_path})


def _in22k(name: str, file: str, kwargs: dict, gmacs: float, note: str = "") -> Variant:
    """Pre-trained only, at the image size that ends the file's name, but for the levels."""
    size = 384 if "384" in file else 224
    urls = (f"{RELEASES}/focalnet_{file}.pth",) * (size == 384) + (f"{STORE}/focalnet_{file}.pth",)
    weights = Weights(
        urls, f"timm/focalnet_{name}.ms_in22k", img_size=size, crop_pct=1.0 if size == 384 else 0.9, num_classes=21842,
        note="outputs 0 to 999 are the ImageNet-1k classes, but for 850, which was not trained" + note,
    )  # fmt: skip
    return Variant({**DEEP, **LARGE, **kwargs}, gmacs, {"ms_in22k": weights}, {"drop_path_rate": 0.5}, size)


def _isotropic(name: str, kwargs: dict, gmacs: float, top1: float) -> Variant:
    weights = {"ms_in1k": Weights((f"{STORE}/focalnet_{name}_16.pth",), None, top1)}
    return Variant(kwargs, gmacs, weights, {"drop_path_rate": 0.2}, model=IsotropicFocalNet)


DEEP = {"depths": (2, 2, 18, 2)}
BASE = {**DEEP, "embed_dim": 128}
LRF, FL3, FL4 = {"focal_levels": 3}, {"focal_levels": 3, "focal_windows": 5}, {"focal_levels": 4}
POST_NORM = {"use_postln": True, "use_layerscale": True}
LARGE = {"use_conv_embed": True, **POST_NORM}
HUGE = {"embed_dim": 352, "use_postln_in_modulation": True}
VARIANTS = {
    "focalnet_tiny_srf": _in1k("tiny_srf", {}, 4.403, 0.2, 82.1),
    "focalnet_tiny_lrf": _in1k("tiny_lrf", LRF, 4.475, 0.2, 82.3),
    "focalnet_small_srf": _in1k("small_srf", DEEP, 8.599, 0.3, 83.4),
    "focalnet_small_lrf": _in1k("small_lrf", DEEP | LRF, 8.715, 0.3, 83.5),
    "focalnet_base_srf": _in1k("base_srf", BASE, 15.241, 0.5, 83.7),
    "focalnet_base_lrf": _in1k("base_lrf", BASE | LRF, 15.397, 0.5, 83.9),
    "focalnet_large_fl3": _in22k("large_fl3", "large_lrf_384", {"embed_dim": 192, **FL3}, 104.905),
    # The one whose modulators are normalised; timm computes it without.
    "focalnet_large_fl4": _in22k(
        "large_fl4", "large_lrf_384_fl4", {"embed_dim": 192, **FL4, "normalize_modulator": True}, 105.042
    ),
    "focalnet_xlarge_fl3": _in22k("xlarge_fl3", "xlarge_lrf_384", {"embed_dim": 256, **FL3}, 185.399),
    "focalnet_xlarge_fl4": _in22k("xlarge_fl4", "xlarge_lrf_384_fl4", {"embed_dim": 256, **FL4}, 185.582),
    "focalnet_huge_fl3": _in22k("huge_fl3", "huge_lrf_224", HUGE | LRF, 118.120),
    "focalnet_huge_fl4": _in22k(
        "huge_fl4", "huge_lrf_224_fl4", HUGE | FL4, 118.821, "; the file may have no head: then pass num_classes=0"
    ),
    "focalnet_tiny_iso": _isotropic("tiny_iso", {}, 1.109, 74.1),
    "focalnet_small_iso": _isotropic("small_iso", {"embed_dim": 384}, 4.299, 80.9),
    "focalnet_base_iso": _isotropic("base_iso", {"embed_dim": 768, **POST_NORM}, 16.921, 82.4),
    # Every option on, and levels and windows of each stage's own.
    "test_focalnet": Variant(
        {
            **LARGE, "embed_dim": 32, "depths": (1, 1, 2, 1), "focal_levels": (4, 3, 2, 1),
            "focal_windows": (3, 5, 3, 7), "use_postln_in_modulation": True, "normalize_modulator": True,
        },
        0.005934, img_size=32,
    ),
}  # fmt: skip
FAMILY = Family(
    "focalnet", (("Focal Modulation Networks", "2203.11926"),), "https://github.com/microsoft/FocalNet", "mit"
)
register_family(FAMILY, FocalNet, VARIANTS)
