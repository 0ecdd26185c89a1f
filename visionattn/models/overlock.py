"""OverLoCK: a convolutional pyramid that looks twice, the second time guided by what it saw the first time.

"OverLoCK: An Overview-first-Look-Closely-next ConvNet with Context-Mixing Dynamic Kernels", arXiv 2502.20087.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import calculate_drop_path_rates
from torch import Tensor, nn

from ..backbone import Backbone, Hierarchical, Stage, check_lengths
from ..backbone.base import recomputed
from ..layers.conv_norm import ConvNorm
from ..layers.dilated_reparam import DilatedReparamConv2d
from ..layers.init import init_weights
from ..layers.norm import allow_single_values
from ..layers.overview import FeatureNorm, FocusBlock, FocusDownsample, HiddenNorm, Passing, RepConvBlock, with_overview
from ..layers.pointwise import Pointwise2d
from ..registry import Family, Variant, Weights, register_family
from ..weights.layouts import Flatten, renumber

STEM = {
    f"patch_embed1.{3 * i + j}.": f"stem.{2 * i}.{part}." for i in range(4) for j, part in enumerate(("proj", "norm"))
}
REP_CONV = {
    "dwconv.": "cpe.proj.", "proj.0.": "norm1.", "proj.1.": "mixer.reparam.", "proj.2.": "mixer.norm.",
    "proj.3.proj.1.": "se.fc1.", "proj.3.proj.3.": "se.fc2.", "proj.4.": "mlp.fc1.", "proj.6.": "mlp.dwconv.proj.",
    "proj.7.": "mlp.grn.", "proj.8.": "mlp.fc2.", "ls.": "ls1.",
}  # fmt: skip
FOCUS = {
    "rpb1": "mixer.contmix.small_rpb", "rpb2": "mixer.contmix.large_rpb", "x_scale.": "context_scale.",
    "h_scale.": "origin_scale.", "dwconv1.": "cpe1.proj.", "dwconv2.": "cpe2.proj.", "fusion.0.": "fusion.conv.",
    "fusion.1.": "fusion.norm.", "fusion.3.": "fusion.proj.", "fusion.4.": "fusion.grn.",
    "weight_query.0.": "mixer.contmix.q.proj.", "weight_query.1.": "mixer.contmix.q.norm.",
    "weight_key.1.": "mixer.contmix.k.proj.", "weight_key.2.": "mixer.contmix.k.norm.",
    "weight_value.0.": "mixer.contmix.v.proj.", "weight_value.1.": "mixer.contmix.v.norm.",
    "weight_proj.": "mixer.contmix.taps.", "dyconv_proj.0.": "mixer.mix_proj.proj.",
    "dyconv_proj.1.": "mixer.mix_proj.norm.", "lepe.0.": "mixer.lepe.reparam.", "lepe.1.": "mixer.lepe.norm.",
    "se_layer.proj.1.": "mixer.se.fc1.", "se_layer.proj.3.": "mixer.se.fc2.", "gate.0.": "mixer.gate.proj.",
    "gate.1.": "mixer.gate.norm.", "proj.0.": "mixer.norm.", "proj.1.": "mixer.proj.", "mlp.0.": "mlp.fc1.",
    "mlp.2.": "mlp.dwconv.proj.", "mlp.3.": "mlp.grn.", "mlp.4.": "mlp.fc2.",
}  # fmt: skip


RULES = [
    *((f"^{re.escape(old)}", new) for old, new in STEM.items()),
    *((rf"^blocks([1-4])\.(\d+)\.{re.escape(old)}", rf"blocks\1.\2.{new}") for old, new in REP_CONV.items()),
    *((rf"^sub_blocks([34])\.(\d+)\.{re.escape(old)}", rf"sub_blocks\1.\2.{new}") for old, new in FOCUS.items()),
    (r"\.lk_origin\.", ".conv."),
    (r"\.origin_bn\.", ".norm."),
    (r"\.dil_conv_k(\d+)_(\d+)\.", r".branches.\1_\2.conv."),
    (r"\.dil_bn_k(\d+)_(\d+)\.", r".branches.\1_\2.norm."),
    (r"^blocks([12])\.", renumber("stages.{0}.blocks.", -1)),
    (r"^blocks3\.", "stages.2.base."),
    (r"^blocks4\.", "stages.2.overview."),
    (r"^sub_blocks([34])\.", renumber("stages.{0}.blocks.", -1)),
    (r"^patch_embed([23])\.0\.", renumber("stages.{0}.downsample.proj.", -1)),
    (r"^patch_embed([23])\.1\.", renumber("stages.{0}.downsample.norm.", -1)),
    (r"^patch_embed4\.0\.", "stages.2.overview_downsample.proj."),
    (r"^patch_embed4\.1\.", "stages.2.overview_downsample.norm."),
    (r"^patch_embedx\.([xh])_proj\.0\.", r"stages.3.downsample.\1.proj."),
    (r"^patch_embedx\.([xh])_proj\.1\.", r"stages.3.downsample.\1.norm."),
    (r"^high_level_proj\.", "stages.2.context_proj."),
    (r"^aux_head\.0\.", "aux_norm."),
    (r"^aux_head\.2\.", "aux_head."),
    (r"^head\.0\.", "norm.proj."),
    (r"^head\.1\.", "norm.norm."),
    (r"^head\.4\.", "head."),
    (r"^extra_norm\.4\.", "feature_norms.3.overview.norm."),  # of the dense prediction code
    (r"^extra_norm\.(\d)\.", r"feature_norms.\1."),
    (r"^h_proj\.0\.", "feature_norms.3.overview.proj."),
    (r"^h_proj\.1\.", "feature_norms.3.overview.scale."),
    # 1 x 1 convolutions are kept as linear maps.
    (
        r"\.([qkv]\.proj|gate\.proj|mix_proj\.proj|mixer\.proj|fusion\.proj|taps|mlp\.fc[12]|context_proj|overview\.proj)\.weight$",
        r".\1.weight",
        Flatten(),
    ),
    (r"^(aux_head|head|norm\.proj)\.weight$", r"\1.weight", Flatten()),
]


class LookingStage(Stage):
    """The base's last blocks, the overview at half their resolution, and the first look under its guidance.

    Args:
        base: blocks of (B, H, W, C).
        overview: blocks of (B, H, W, C') at half the resolution.
        blocks: blocks of (B, C + C_c, H, W) and the context.
        dims: channels C of the map, C_c of the context and C' of the overview.
        downsample: from the output of the stage before, NCHW.

    Shape:
        (B, C'', H', W') to (B, C + C_c + C' + C_c, H, W): map and context as the blocks leave them, which are the
        stage's feature, then, for the next stage, overview and context, every position of these four times.
    """

    def __init__(
        self, base: Sequence[nn.Module], overview: Sequence[nn.Module], blocks: Sequence[nn.Module],
        dims: tuple[int, int, int], downsample: nn.Module, device=None, dtype=None,
    ) -> None:  # fmt: skip
        (dim, context_dim, overview_dim), dd = dims, {"device": device, "dtype": dtype}
        super().__init__(blocks, dim + context_dim, downsample=downsample)
        self.base = nn.Sequential(*base)
        self.overview_downsample = ConvNorm(dim, overview_dim, 3, 2, **dd)
        self.overview = nn.Sequential(*overview)
        self.context_proj = Pointwise2d(overview_dim, context_dim, **dd)

    def _mix(self, x: Tensor) -> Tensor:
        x = self._run(self.base, x).permute(0, 3, 1, 2)
        overview = self._run(self.overview, self.overview_downsample(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        context = self.context_proj(overview)
        origin = F.interpolate(context, x.shape[2:], mode="bilinear", align_corners=False)
        x = self._run(self.blocks, torch.cat([x, origin], 1), origin)
        return with_overview(x, torch.cat([overview, context], 1))

    def _run(self, blocks: nn.Sequential, x: Tensor, *args: Tensor) -> Tensor:
        for block in blocks:
            x = recomputed(block, x, *args) if self.grad_checkpointing else block(x, *args)
        return x


class FocusStage(Stage):
    """The second look, under the guidance of the overview's context.

    Args:
        blocks: blocks of (B, C + C_c, H, W) and the context.
        dims: channels C of the map and C_c of the context.
        downsample: a `FocusDownsample`.

    Shape:
        what `LookingStage` returns to (B, C + C_c + C, H, W): the stage's feature, then the overview.
    """

    def __init__(self, blocks: Sequence[nn.Module], dims: tuple[int, int], downsample: nn.Module) -> None:
        super().__init__(blocks, sum(dims), downsample=downsample)
        self.context_dim = dims[1]

    def _mix(self, x: Tensor) -> Tensor:
        x = x.permute(0, 3, 1, 2)
        x, overview, origin = x[:, : self.dim], x[:, self.dim : -self.context_dim], x[:, -self.context_dim :]
        for block in self.blocks:
            x = recomputed(block, x, origin) if self.grad_checkpointing else block(x, origin)
        return torch.cat([x, overview], 1)


class OverLoCK(Hierarchical):
    """OverLoCK.

    In training a second head learns from the overview, see `training_loss`.

    Args:
        in_chans: channels of the image.
        num_classes: classes of the head, 0 for none.
        global_pool: pooling after the head's hidden layer.
        embed_dim: channels of the four stages; the context has a quarter of the last's.
        depth: blocks of the first three stages and of the overview.
        sub_depth: blocks of the second look, in the third and the fourth stage.
        kernel_size: of the large kernels of each stage, one of 5, 7, ... 19.
        smk_size: of the small dynamic kernels.
        mlp_ratio: hidden channels of the MLPs per channel in the first three stages and the overview.
        sub_mlp_ratio: likewise in the second look.
        sub_num_heads: half as many as there are groups of channels with a dynamic kernel each, in the second look.
        ls_init_value: initial scale of each stage's shortcuts or branches, None for none.
        res_scale: scale the shortcuts instead of the branches.
        proj_dim: channels of the head's hidden layer.
        deploy: have the large kernels as they are in inference, for which weights of either form are loaded.
        use_ds: have the second head.
        overview_feature: in models for dense prediction, add the overview to the last stage's feature, as the published
            detectors do and the segmenters do not.
        drop_rate: dropout rate before the head.
        drop_path_rate: stochastic depth rate of the last block; it grows linearly from 0.
    """

    layouts = {"official": RULES}
    first_conv = "stem.0.proj"
    classifier = ("head", "aux_head")
    optional = (*Backbone.optional, "aux_norm.")
    feature_norm = FeatureNorm

    def __init__(
        self, in_chans: int = 3, num_classes: int = 1000, global_pool: str = "avg",
        embed_dim: Sequence[int] = (64, 128, 256, 512), depth: Sequence[int] = (4, 4, 6, 2),
        sub_depth: Sequence[int] = (12, 2), kernel_size: Sequence[int] = (17, 15, 13, 7), smk_size: int = 5,
        mlp_ratio: Sequence[float] = (4, 4, 4, 4), sub_mlp_ratio: Sequence[float] = (3, 3),
        sub_num_heads: Sequence[int] = (4, 8), ls_init_value: Sequence[float | None] = (None, None, 1, 1),
        res_scale: bool = True, proj_dim: int = 1024, deploy: bool = False, use_ds: bool = True,
        overview_feature: bool = False, drop_rate: float = 0.0, drop_path_rate: float = 0.0, device=None, dtype=None,
    ) -> None:  # fmt: skip
        dd = {"device": device, "dtype": dtype}
        check_lengths(
            embed_dim=embed_dim, depth=depth, kernel_size=kernel_size, mlp_ratio=mlp_ratio, ls_init_value=ls_init_value
        )
        check_lengths(sub_depth=sub_depth, sub_mlp_ratio=sub_mlp_ratio, sub_num_heads=sub_num_heads)
        dims, context_dim = embed_dim, embed_dim[3] // 4
        rates = calculate_drop_path_rates(drop_path_rate, [*depth, *sub_depth], stagewise=True)

        def rep_convs(i: int) -> list[nn.Module]:
            args = dims[i], kernel_size[i], mlp_ratio[i], ls_init_value[i], res_scale
            return [RepConvBlock(*args, rate, deploy, **dd) for rate in rates[i]]

        def focus_blocks(i: int) -> list[nn.Module]:
            j = i - 2
            return [
                FocusBlock(
                    dims[i], context_dim, sub_num_heads[j], kernel_size[i], smk_size, sub_mlp_ratio[j],
                    ls_init_value[i], res_scale, rate, deploy, refresh=i > 2 or block > 0, **dd,
                )
                for block, rate in enumerate(rates[4 + j])
            ]  # fmt: skip

        half = dims[0] // 2
        stem = nn.Sequential(
            ConvNorm(in_chans, half, 3, 2, **dd), nn.GELU(), ConvNorm(half, half, 3, **dd), nn.GELU(),
            ConvNorm(half, dims[0], 3, 2, **dd), nn.GELU(), ConvNorm(dims[0], dims[0], 3, **dd),
        )  # fmt: skip
        downsamples = [ConvNorm(dims[i], dims[i + 1], 3, 2, **dd) for i in (0, 1)]
        widths = dims[2], context_dim, dims[3]
        looking = LookingStage(rep_convs(2), rep_convs(3), focus_blocks(2), widths, downsamples[1], **dd)
        focus = FocusStage(focus_blocks(3), (dims[3], context_dim), FocusDownsample(widths, **dd))
        super().__init__(
            stem, [Stage(rep_convs(0), dims[0]), Stage(rep_convs(1), dims[1], downsamples[0]), looking, focus],
            norm=HiddenNorm(focus.dim, proj_dim, **dd), num_features=proj_dim,
            num_classes=num_classes, in_chans=in_chans, global_pool=global_pool, drop_rate=drop_rate, **dd,
        )  # fmt: skip
        self.overview_dim, self.deploy, self.use_ds = dims[3], deploy, use_ds
        self.overview_feature = overview_feature
        self.classifier = ("head", "aux_head") if use_ds else "head"
        self.aux_norm, self.aux_head = nn.Identity(), nn.Identity()
        self._reset_aux_head()
        self.apply(_init_weights)

    def _reset_aux_head(self) -> None:
        self._aux_logits = Passing()
        wanted, placement = self.use_ds and self.num_classes > 0 and len(self.stages) == 4, self._placement()
        if not wanted or not isinstance(self.aux_norm, nn.BatchNorm2d):
            self.aux_norm = nn.BatchNorm2d(self.overview_dim, **placement) if wanted else nn.Identity()
            allow_single_values(self)
        self.aux_head = nn.Linear(self.overview_dim, self.num_classes, **placement) if wanted else nn.Identity()

    def reset_classifier(self, num_classes: int, global_pool: str | None = None, reset_other: bool = False) -> None:
        super().reset_classifier(num_classes, global_pool, reset_other)
        self._reset_aux_head()
        self.train(self.training)

    def get_classifier(self) -> nn.Module | tuple[nn.Module, ...]:
        return (self.head, self.aux_head) if isinstance(self.aux_head, nn.Linear) else self.head

    def add_feature_norms(self, indices: Sequence[int]) -> None:
        super().add_feature_norms(indices)
        last = len(self.stages) - 1
        if self.overview_feature and last in indices:
            self.feature_norms[last] = FeatureNorm(self.stages[last].dim, self.overview_dim, **self._placement())
            self.feature_norms[last].apply(_init_weights)

    def group_matcher(self, coarse: bool = False) -> dict:
        """Patterns that group parameters by depth, for layer-wise learning rates."""
        matcher = super().group_matcher(coarse)
        for stage in self.stages[2:3] if not coarse else ():
            parts = [(part, i) for part in ("base", "overview", "blocks") for i in range(len(getattr(stage, part)))]
            order = [(rf"^stages\.(2)\.{part}\.{i}\.", (n,)) for n, (part, i) in enumerate(parts)]
            order += [(r"^stages\.(2)\.(?:overview_downsample|context_proj)", (len(stage.base),))]
            matcher["blocks"] = [*order, *matcher["blocks"], (r"^aux_norm", (99999,))]
        return matcher

    def merge_state_dict(self, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        """Merges large kernels that are stored as several where the model has one."""
        return DilatedReparamConv2d.fold_all(state_dict) if self.deploy else state_dict

    def adapt_state_dict(self, state_dict: dict[str, Tensor], made_for: Mapping[str, Any]) -> dict[str, Tensor]:
        """Leaves the second head as it is where there is none in the file."""
        state_dict = super().adapt_state_dict(state_dict, made_for)
        aux = ("aux_norm.", "aux_head.")
        own = {k: v for k, v in self.state_dict().items() if k.startswith(aux)}
        if not own:
            return {k: v for k, v in state_dict.items() if not k.startswith(aux)}
        return state_dict if any(k.startswith(aux) for k in state_dict) else state_dict | own

    def _map_norm(self, x: Tensor) -> Tensor:
        return super()._map_norm(x[:, : self.stages[-1].dim])

    def forward_features(self, x: Tensor) -> Tensor:
        """Image to the hidden layer of the head at every position of the last map, NCHW."""
        x = self.stages(self.stem(self.check(x)))
        if self.training and isinstance(self.aux_head, nn.Linear):
            overview = x[:, -self.overview_dim :]
            self._aux_logits.value = aux = self.aux_head(self.aux_norm(overview).mean((2, 3)))
            # A part of the output's graph, though none of the output: who trains by another loss has no parameter
            # without a gradient, which not every way to train on several devices allows.
            x = torch.where(torch.ones_like(x[:1, :1, :1, :1], dtype=torch.bool), x, aux.mean().to(x.dtype))
        return self._map_norm(x)

    def training_loss(
        self, loss: Tensor, images: Tensor, logits: Tensor, criterion: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """The task's loss of the head, and 0.4 times that of the head of the overview."""
        aux, self._aux_logits.value = self._aux_logits.value, None
        return loss + 0.4 * criterion(aux.float()) if self.training and aux is not None else loss


class OneHeadedOverLoCK(OverLoCK):
    """OverLoCK that is made without the second head."""

    classifier = "head"


def _init_weights(module: nn.Module) -> None:
    init_weights(module, nn.Conv2d | nn.Linear)


RELEASE = "https://github.com/LMMMEng/OverLoCK/releases/download/v1/"
# Channels, depths of the stages and the overview and of the second look, heads; drop path, crop, GMACs, top-1.
SIZES = {
    "xt": ((56, 112, 256, 336), (2, 2, 3, 2), (6, 2), (4, 6), 0.1, 0.925, (2.863, 2.701), 82.7),
    "t": ((64, 128, 256, 512), (4, 4, 6, 2), (12, 2), (4, 8), 0.15, 0.95, (5.993, 5.646), 84.2),
    "s": ((64, 128, 320, 512), (6, 6, 8, 3), (16, 3), (8, 16), 0.4, 0.95, (10.437, 9.894), 84.8),
    "b": ((80, 160, 384, 576), (8, 8, 10, 4), (20, 4), (6, 9), 0.5, 0.975, (17.963, 17.096), 85.1),
}
VARIANTS = {}
for _size, (_dims, _depth, _sub_depth, _heads, _rate, _crop, _gmacs, _top1) in SIZES.items():
    for _deploy, _suffix in enumerate(("", "_reparam")):
        _kwargs = {"embed_dim": _dims, "depth": _depth, "sub_depth": _sub_depth, "sub_num_heads": _heads}
        _url = f"{RELEASE}overlock_{_size}_in1k_224{_suffix}.pth"
        VARIANTS[f"overlock_{_size}{_suffix}"] = Variant(
            _kwargs | ({"deploy": True} if _deploy else {}),
            _gmacs[_deploy],
            {"in1k": Weights((_url,), top1=_top1, crop_pct=_crop)},
            {"drop_path_rate": _rate},
        )
VARIANTS["test_overlock"] = Variant(
    {
        "embed_dim": (16, 24, 32, 48), "depth": (1, 1, 1, 1), "sub_depth": (2, 1), "kernel_size": (7, 7, 7, 5),
        "sub_num_heads": (2, 2), "proj_dim": 64, "use_ds": False,
    },
    0.003309,
    img_size=32,
    model=OneHeadedOverLoCK,
)  # fmt: skip
FAMILY = Family(
    "overlock",
    (("OverLoCK: An Overview-first-Look-Closely-next ConvNet with Context-Mixing Dynamic Kernels", "2502.20087"),),
    "https://github.com/LMMMEng/OverLoCK",
    "apache-2.0",
)
register_family(FAMILY, OverLoCK, VARIANTS)
