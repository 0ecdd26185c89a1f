"""MoH-ViT: TransNeXt whose attention heads are weighed, and in part left out, by every token.

"MoH: Multi-Head Attention as Mixture-of-Head Attention", arXiv 2410.11842, on the pyramid of "TransNeXt: Robust Foveal
Visual Perception for Vision Transformers", arXiv 2311.17132: attention to a neighbourhood and a pooled map, in the last
stage to all positions, and MLPs that are gated by a convolution.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from timm.layers import LayerNorm2d, calculate_drop_path_rates, to_2tuple
from torch import Tensor, nn

from ..backbone import Hierarchical, Stage, check_lengths
from ..layers import AggregatedAttention, CosineAttention, HeadRouter
from ..layers.block import Block
from ..layers.gated_mlp import GatedMlp
from ..layers.init import by_fan_out, init_weights
from ..layers.layout import channels_last
from ..layers.patch import PatchStem
from ..registry import Family, Variant, Weights, register_family
from ..weights.layouts import Flatten, renumber

RULES = [
    (r"^patch_embed1\.", "stem."),
    (r"^patch_embed(\d)\.", renumber("stages.{0}.downsample.", -1)),
    (r"^block(\d)\.", renumber("stages.{0}.blocks.", -1)),
    (r"^norm(\d)\.", renumber("stages.{0}.norm.", -1)),
    (r"\.attn\.(wg(?:_[01])?)\.", r".mixer.router.\1."),
    (r"\.attn\.", ".mixer."),
    (r"\.mlp\.dwconv\.dwconv\.", ".mlp.dwconv."),
    (r"(\.sr\.weight)$", r"\1", Flatten()),  # a 1 x 1 convolution is kept as a linear map
]
UNDECAYED = ("query_embedding", "relative_pos_bias_local", "cpb", "temperature")
"""Parts of the names of parameters without weight decay."""
BALANCE = 0.01
"""Weight of the load-balance loss."""


class Downsample(nn.Module):
    """Convolution of stride 2 and LayerNorm: (B, C, H, W) to (B, C', ceil(H / 2), ceil(W / 2))."""

    def __init__(self, dim: int, out_dim: int, device=None, dtype=None) -> None:
        super().__init__()
        self.proj = nn.Conv2d(dim, out_dim, 3, 2, 1, device=device, dtype=dtype)
        self.norm = LayerNorm2d(out_dim, eps=1e-5, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.proj(x))


class ConvGlu(GatedMlp):
    """MLP gated by a depthwise convolution, of (B, H, W, C)."""

    forward = channels_last(GatedMlp.forward)


class RoutedBlock(Block):
    """A block whose heads are routed. In training it hands on the load-balance losses of the routers so far: as values,
    which a block that is computed again in the backward pass cannot count twice."""

    def forward(self, x: Tensor | tuple[Tensor, tuple]) -> Tensor | tuple[Tensor, tuple]:
        if not self.training:
            return super().forward(x)
        x, losses = x if isinstance(x, tuple) else (x, ())
        y = self.norm1(x)
        x = x + self.drop_path1(self.mixer(y))
        return x + self.drop_path2(self.mlp(self.norm2(x))), (*losses, self.mixer.router.aux_loss(y))


class RoutedStage(Stage):
    """A stage that keeps the load-balance losses of its blocks, those of the last forward pass."""

    losses: Sequence[Tensor] = ()

    def end(self, x: Tensor | tuple[Tensor, tuple]) -> Tensor:
        x, self.losses = x if isinstance(x, tuple) else (x, ())
        return x

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"losses": ()}  # tensors of a graph are not to be copied


def _init_weights(module: nn.Module) -> None:
    init_weights(module)
    if isinstance(module, nn.Conv2d):
        init_weights(module, nn.Conv2d, by_fan_out(module))
    if isinstance(module, AggregatedAttention):
        init_weights(module.sr, draw=by_fan_out(module.sr))  # a convolution where it is published


class MoHViT(Hierarchical):
    """MoH-ViT, and TransNeXt without routers.

    Args:
        in_chans: channels of the image.
        num_classes: classes of the head, 0 for none.
        global_pool: pooling before the head.
        img_size: size of the images in pixels that `pretrain_size` defaults to; any may be given to the model.
        pretrain_size: size of the images, in pixels, that the weights were first trained at: the position bias measures
            distances by it. Give 224 with an `img_size` at which published weights go on to be trained.
        fixed_pool_size: side of the pooled maps, which makes the cost of the first stages linear; None for maps that
            are `sr_ratios` times smaller.
        embed_dims: channels of each stage.
        num_heads: attention heads of each stage.
        depths: blocks of each stage.
        mlp_ratios: hidden channels of the MLP per channel, of which it has two thirds.
        sr_ratios: how many times smaller the pooled map is in each stage; 1 for attention to all positions.
        shared: heads of each stage that are always on; None for TransNeXt, whose heads count alike.
        top_k: heads of each stage that a token keeps of the others.
        drop_rate: dropout rate before the head.
        drop_path_rate: stochastic depth rate of the last block; it grows linearly from 0.

    Raises:
        VisionattnError: if the arguments of the stages are not of one length.
    """

    layouts = {"official": RULES}

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        img_size: int | tuple[int, int] = 224,
        pretrain_size: int | tuple[int, int] | None = None,
        fixed_pool_size: int | None = None,
        embed_dims: Sequence[int] = (72, 144, 288, 576),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        depths: Sequence[int] = (5, 5, 22, 5),
        mlp_ratios: Sequence[float] = (8, 8, 4, 4),
        sr_ratios: Sequence[int] = (8, 4, 2, 1),
        shared: Sequence[int] | None = (3, 6, 3, 4),
        top_k: Sequence[int] = (0, 0, 6, 12),
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device=None,
        dtype=None,
    ) -> None:
        of_stages = {
            "embed_dims": embed_dims, "num_heads": num_heads, "depths": depths, "mlp_ratios": mlp_ratios,
            "sr_ratios": sr_ratios, "shared": shared or num_heads, "top_k": top_k,
        }  # fmt: skip
        check_lengths(**of_stages)
        dd = {"device": device, "dtype": dtype}
        router = None if shared is None else HeadRouter
        rates = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)
        stages = []
        for i, (dim, heads, _, mlp_ratio, ratio, always, kept) in enumerate(zip(*of_stages.values(), strict=True)):
            grid = tuple(side // (4 * 2**i) for side in to_2tuple(pretrain_size or img_size))
            facts = {"pretrain_size": grid, "shared": always, "top_k": kept, "router": router, **dd}
            routed = router is not None and kept > 0
            blocks = []
            for rate in rates[i]:
                if ratio == 1:
                    mixer = CosineAttention(dim, heads, **facts)
                else:
                    mixer = AggregatedAttention(dim, heads, pool_ratio=ratio, pool_size=fixed_pool_size, **facts)
                mlp = ConvGlu(dim, int(2 * int(dim * mlp_ratio) / 3), norm=False, **dd)
                kind = RoutedBlock if routed else Block
                blocks.append(kind(dim, mixer, mlp, norm_layer=partial(nn.LayerNorm, eps=1e-6), drop_path=rate, **dd))
            downsample = Downsample(embed_dims[i - 1], dim, **dd) if i else None
            norm = LayerNorm2d(dim, eps=1e-6, **dd)
            stages.append((RoutedStage if routed else Stage)(blocks, dim, downsample=downsample, norm=norm))
        super().__init__(
            PatchStem(in_chans, embed_dims[0], kernel_size=7, padding=3, **dd), stages,
            num_classes=num_classes, in_chans=in_chans, global_pool=global_pool, drop_rate=drop_rate, **dd,
        )  # fmt: skip
        self.apply(_init_weights)

    def no_weight_decay(self) -> set[str]:
        """Names of parameters without weight decay, besides those with one dimension."""
        return {name for name, _ in self.named_parameters() if any(part in name for part in UNDECAYED)}

    def adapt_state_dict(self, state_dict: dict[str, Tensor], made_for: Mapping[str, Any]) -> dict[str, Tensor]:
        """Leaves the routers as they are where weights of TransNeXt are loaded, which has none."""
        if any(".router." in k for k in state_dict):
            return state_dict
        return state_dict | {k: v for k, v in self.state_dict().items() if ".router." in k}

    def training_loss(self, loss: Tensor, images: Tensor, logits: Tensor, criterion: object = None) -> Tensor:
        """Adds a hundredth of the mean load-balance loss of the routers."""
        stages = [stage for stage in self.stages if isinstance(stage, RoutedStage)]
        losses = [each for stage in stages for each in stage.losses]
        for stage in stages:
            stage.losses = ()
        return loss + BALANCE * torch.stack(losses).mean() if losses else loss


def _variant(
    size: dict, shared: Sequence[int], top_k: Sequence[int], gmacs: float, drop_path: float, file: str, top1: float
) -> Variant:
    cfg = {"hf_hub_filename": f"moh_transnext_{file}.pth"}  # as the authors' example calls it
    weights = Weights((), f"Chat-UniVi/MoH-ViT-{file[0].upper()}-{file[-2:]}", top1, cfg=cfg)
    return Variant(size | {"shared": shared, "top_k": top_k}, gmacs, {"in1k": weights}, {"drop_path_rate": drop_path})


SMALL: dict[str, Any] = {}
BASE = {"embed_dims": (96, 192, 384, 768), "num_heads": (4, 8, 16, 32), "depths": (5, 5, 23, 5)}
VARIANTS = {
    "moh_vit_small_75": _variant(SMALL, (3, 6, 3, 4), (0, 0, 6, 12), 10.318, 0.45, "small_75", 84.6),
    "moh_vit_small_80": _variant(SMALL, (3, 6, 3, 8), (0, 0, 6, 12), 10.318, 0.45, "small_80", 84.7),
    "moh_vit_base_75": _variant(BASE, (4, 8, 4, 5), (0, 0, 8, 16), 18.349, 0.6, "base_75", 84.9),
    "moh_vit_base_50": _variant(BASE, (2, 2, 2, 4), (2, 4, 6, 8), 18.354, 0.6, "base_50", 84.7),
    "test_moh_vit": Variant(
        {
            "embed_dims": (16, 32, 48, 64), "num_heads": (2, 4, 6, 8), "depths": (1, 1, 2, 1), "shared": (2, 4, 2, 1),
            "top_k": (0, 0, 2, 4), "pretrain_size": 224,
        },
        0.001724,
        img_size=32,
    ),
}  # fmt: skip
FAMILY = Family(
    "moh_vit",
    (
        ("MoH: Multi-Head Attention as Mixture-of-Head Attention", "2410.11842"),
        ("TransNeXt: Robust Foveal Visual Perception for Vision Transformers", "2311.17132"),
    ),
    "https://github.com/SkyworkAI/MoH",
    "apache-2.0",
)
ALIASES = {name.replace("vit", "transnext"): name for name in VARIANTS if name.startswith("moh")}
register_family(FAMILY, MoHViT, VARIANTS, ALIASES)
