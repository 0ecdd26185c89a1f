"""VAN: a convolutional pyramid on large kernel attention. "Visual Attention Network", arXiv 2202.09741."""

from collections.abc import Sequence

import torch
from timm.layers import LayerNorm2d, LayerScale2d, calculate_drop_path_rates
from torch import Tensor, nn

from ..backbone import Hierarchical, Stage, check_lengths
from ..layers import VanAttention
from ..layers.block import Block
from ..layers.conv_norm import ConvNorm
from ..layers.depthwise_mlp import DepthwiseMlp
from ..layers.fuse import fuse_scale, is_batch_norm, scale_and_shift, scale_input, scale_output
from ..layers.init import by_fan_out, init_weights
from ..layers.layout import channels_last
from ..layers.pointwise import Pointwise
from ..registry import Family, Variant, Weights, register_family
from ..weights.layouts import Flatten, renumber

# Hugging Face's names, then the official ones.
HF_RULES = [
    (r"^van\.encoder\.stages\.(\d)\.embeddings\.convolution\.", renumber("patch_embed{0}.proj.", 1)),
    (r"^van\.encoder\.stages\.(\d)\.embeddings\.normalization\.", renumber("patch_embed{0}.norm.", 1)),
    (r"^van\.encoder\.stages\.(\d)\.layers\.(\d+)\.", renumber("block{0}.{1}.", 1)),
    (r"^van\.encoder\.stages\.(\d)\.normalization\.", renumber("norm{0}.", 1)),
    (r"^van\.layernorm\..*", ""),  # in the file, never applied
    (r"^classifier\.", "head."),
    (r"\.pre_normomalization\.", ".norm1."),
    (r"\.post_normalization\.", ".norm2."),
    (r"\.attention\.pre_projection\.conv\.", ".attn.proj_1."),
    (r"\.attention\.attention_layer\.attention\.depth_wise\.", ".attn.spatial_gating_unit.conv0."),
    (r"\.attention\.attention_layer\.attention\.depth_wise_dilated\.", ".attn.spatial_gating_unit.conv_spatial."),
    (r"\.attention\.attention_layer\.attention\.point_wise\.", ".attn.spatial_gating_unit.conv1."),
    (r"\.attention\.post_projection\.", ".attn.proj_2."),
    (r"\.attention_scaling\.weight$", ".layer_scale_1"),
    (r"\.mlp_scaling\.weight$", ".layer_scale_2"),
    (r"\.mlp\.in_dense\.", ".mlp.fc1."),
    (r"\.mlp\.depth_wise\.", ".mlp.dwconv.dwconv."),
    (r"\.mlp\.out_dense\.", ".mlp.fc2."),
]
OFFICIAL_RULES = [
    (r"^patch_embed1\.", "stem."),
    (r"^patch_embed(\d)\.", renumber("stages.{0}.downsample.", -1)),
    (r"^norm(\d)\.", renumber("stages.{0}.norm.", -1)),
    (r"^block(\d)\.", renumber("stages.{0}.blocks.", -1)),
    (r"\.layer_scale_(\d)$", r".ls\1.gamma"),
    (r"\.attn\.proj_(\d)\.", r".mixer.proj\1."),
    (r"\.attn\.spatial_gating_unit\.conv0\.", ".mixer.lka.depthwise."),
    (r"\.attn\.spatial_gating_unit\.conv_spatial\.", ".mixer.lka.dilated."),
    (r"\.attn\.spatial_gating_unit\.conv1\.", ".mixer.lka.pointwise."),
    (r"\.mlp\.dwconv\.dwconv\.", ".mlp.dwconv."),
    # 1 x 1 convolutions are kept as linear maps.
    (r"\.(proj[12]|pointwise|fc[12])\.weight$", r".\1.weight", Flatten()),
]


class VanBlock(Block):
    """`Block` of convolutions and batch norms, which `fuse` merges into its products.

    Args: those of `Block`.
    """

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.register_buffer("shortcut", None)  # what multiplies the input in a merged block

    def fuse(self) -> None:
        """Merge norms and layer scales for inference.

        With norm1 as s x + t the first half, x + g1 (proj2(y) + s x + t), is (1 + g1 s) x + g1 (proj2(y) + t).
        """
        if not (is_batch_norm(self.norm1) and self.mixer.shortcut):
            return
        scale, shift = scale_and_shift(self.norm1)
        gain = getattr(self.ls1, "gamma", torch.ones_like(scale)).detach().double()
        scale_input(self.mixer.proj1, scale, shift)
        scale_output(self.mixer.proj2, gain, gain * shift)
        self.mixer.shortcut = False
        self.shortcut = (1 + gain * scale)[:, None, None].to(self.norm1.running_mean)
        scale_input(self.mlp.fc1, *scale_and_shift(self.norm2))
        fuse_scale(self, "ls2", self.mlp)
        for name in ("norm1", "norm2", "ls1"):
            setattr(self, name, nn.Identity())

    @channels_last
    def forward(self, x: Tensor) -> Tensor:
        if self.shortcut is None:
            return super().forward(x)
        x = torch.addcmul(self.mixer(x), x, self.shortcut)
        return x + self.ls2(self.mlp(x))


def _init_weights(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d | Pointwise):
        init_weights(module, nn.Conv2d | Pointwise, by_fan_out(module))
    else:
        init_weights(module)


class VAN(Hierarchical):
    """Visual Attention Network.

    Args:
        in_chans: channels of the image.
        num_classes: classes of the head, 0 for none.
        global_pool: pooling before the head.
        embed_dims: channels of each stage.
        depths: blocks of each stage.
        mlp_ratios: hidden channels of the MLP per channel, for each stage.
        layer_scale: initial layer scale, None for no layer scale.
        norm_eps: epsilon of the LayerNorm after each stage (the published segmentation code has 1e-5).
        drop_rate: dropout rate of the MLPs and the head.
        drop_path_rate: stochastic depth rate of the last block; it grows linearly from 0.
    """

    layouts = {"official": OFFICIAL_RULES, "hf": HF_RULES + OFFICIAL_RULES}
    dilates = True

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dims: Sequence[int] = (64, 128, 320, 512),
        depths: Sequence[int] = (3, 3, 12, 3),
        mlp_ratios: Sequence[float] = (8, 8, 4, 4),
        layer_scale: float | None = 1e-2,
        norm_eps: float = 1e-6,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device=None,
        dtype=None,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        check_lengths(embed_dims=embed_dims, depths=depths, mlp_ratios=mlp_ratios)
        rates = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)
        stages = []
        for i, (dim, ratio) in enumerate(zip(embed_dims, mlp_ratios, strict=True)):
            blocks = [
                VanBlock(
                    dim,
                    VanAttention(dim, **dd),
                    DepthwiseMlp(dim, int(dim * ratio), drop_rate, **dd),
                    norm_layer=nn.BatchNorm2d,
                    layer_scale=layer_scale,
                    drop_path=rate,
                    scale_layer=LayerScale2d,
                    **dd,
                )
                for rate in rates[i]
            ]
            downsample = ConvNorm(embed_dims[i - 1], dim, 3, 2, bias=True, **dd) if i else None
            stages.append(Stage(blocks, dim, downsample=downsample, norm=LayerNorm2d(dim, eps=norm_eps, **dd)))
        super().__init__(
            ConvNorm(in_chans, embed_dims[0], 7, 4, bias=True, **dd), stages,
            num_classes=num_classes, in_chans=in_chans, global_pool=global_pool, drop_rate=drop_rate, **dd,
        )  # fmt: skip
        self.apply(_init_weights)


HUB = "https://huggingface.co/Visual-Attention-Network"
PAGE = "https://cloud.tsinghua.edu.cn/d/0100f0cea37d41ba8d08/"
HALF = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
SMALL, LARGE = (64, 128, 320, 512), (96, 192, 480, 768)


def _in1k(size: str, file: str, mirror: str, top1: float) -> dict[str, Weights]:
    urls = (
        f"{HUB}/VAN-{size}-original/resolve/main/{file}.pth.tar",
        f"https://cloud.tsinghua.edu.cn/f/{mirror}/?dl=1",
    )
    return {"in1k": Weights(urls, f"Visual-Attention-Network/van-{size.lower()}", top1, crop_pct=0.9, cfg=HALF)}


def _in22k(name: str, top1: float, top1_384: float, gmacs_384: float) -> dict[str, Weights]:
    """The 22k backbone, which is on a page, and its fine-tuned versions, which were not released."""
    return {
        "in22k_ft_in1k": Weights(top1=top1, note="not released"),
        "in22k_ft_in1k_384": Weights(
            top1=top1_384,
            img_size=384,
            crop_pct=1.0,
            gmacs=gmacs_384,
            cfg={"crop_mode": "squash"},
            note="not released",
        ),
        "in22k": Weights(num_classes=21841, page=PAGE, note=f"file {name}_22k.pth"),
    }


def _variant(
    embed_dims: Sequence[int], depths: Sequence[int], gmacs: float, weights: dict, drop_path: float | None
) -> Variant:
    recipe = {} if drop_path is None else {"drop_path_rate": drop_path}
    return Variant({"embed_dims": embed_dims, "depths": depths}, gmacs, weights, recipe)


VARIANTS = {
    "van_b0": _variant(
        (32, 64, 160, 256), (3, 3, 5, 2), 0.864, _in1k("Tiny", "van_tiny_754", "aada2242a16245d6a561", 75.4), 0.1
    ),
    "van_b1": _variant(SMALL, (2, 2, 4, 2), 2.495, _in1k("Small", "van_small_811", "dd3eb73692f74a2499c9", 81.1), 0.1),
    "van_b2": _variant(SMALL, (3, 3, 12, 3), 4.993, _in1k("Base", "van_base_828", "58e7acceaf334ecdba89", 82.8), 0.1),
    "van_b3": _variant(SMALL, (3, 5, 27, 3), 8.925, _in1k("Large", "van_large_839", "0201745f6920482490a0", 83.9), 0.2),
    "van_b4": _variant(
        SMALL,
        (3, 6, 40, 3),
        12.144,
        {"in1k": Weights(top1=84.2, crop_pct=0.9, cfg=HALF, page=PAGE, note="file van_b4.pth")}
        | _in22k("van_b4", 85.7, 86.6, 35.687),
        None,
    ),
    "van_b5": _variant(LARGE, (3, 3, 24, 3), 17.129, _in22k("van_b5", 86.3, 87.0, 50.337), None),
    "van_b6": _variant((96, 192, 384, 768), (6, 6, 90, 6), 38.710, _in22k("van_b6", 86.9, 87.8, 113.759), None),
    "test_van": Variant(
        {"embed_dims": (16, 32, 64, 128), "depths": (1, 1, 2, 1), "mlp_ratios": (4, 4, 2, 2)}, 0.001432, img_size=32
    ),
}
FAMILY = Family(
    "van",
    (("Visual Attention Network", "2202.09741"),),
    "https://github.com/Visual-Attention-Network/VAN-Classification",
    "apache-2.0",
)
ALIASES = {"van_tiny": "van_b0", "van_small": "van_b1", "van_base": "van_b2", "van_large": "van_b3"}
register_family(FAMILY, VAN, VARIANTS, ALIASES)
