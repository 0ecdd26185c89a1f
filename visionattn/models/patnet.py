"""PATNet: partial convolutions, with attention for the channels that are not convolved.

"Partial Convolution Meets Visual Attention", arXiv 2503.03148, and "Partial Channel Network: Compute Fewer, Perform
Better", arXiv 2502.01303.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from timm.layers import DropPath, LayerScale2d, calculate_drop_path_rates
from torch import Tensor, nn

from ..backbone import Hierarchical, Stage
from ..errors import VisionattnError
from ..layers import PartialChannelAttention, PartialConv2d, PartialSelfAttention, PartialSpatialAttention
from ..layers.conv_norm import ConvNorm, product_norm
from ..layers.fuse import fuse_scale, scale_input
from ..layers.init import init_weights
from ..layers.layout import channels_last
from ..layers.norm_act_product import activated, norm_act_product, small_mlp
from ..layers.pointwise import Pointwise, Pointwise2d
from ..registry import Family, Variant, Weights, register_family
from ..weights.layouts import Flatten, renumber

ACTIVATIONS = {"gelu": nn.GELU, "relu": partial(nn.ReLU, inplace=True)}
RULES = [
    (r"^patch_embed\.", "stem."),
    # Stages and the merging between them are numbered in one sequence.
    (r"^stages\.([135])\.reduction\.", renumber("stages.{0}.downsample.proj.", 1, 2)),
    (r"^stages\.([135])\.norm\.", renumber("stages.{0}.downsample.norm.", 1, 2)),
    (r"^stages\.([0246])\.blocks\.", renumber("stages.{0}.blocks.", 0, 2)),
    (r"^norm([0246])\.", renumber("feature_norms.{0}.", 0, 2)),
    (r"^avgpool_pre_head\.1\.", "hidden."),
    (r"\.spatial_mixing\.partial_conv3\.", ".mixer.conv."),
    (r"\.spatial_mixing\.attn\.cfc1\.", ".mixer.gate."),  # a 1 x 2 kernel over mean and standard deviation
    (r"\.spatial_mixing\.attn\.bn\.", ".mixer.gate_norm."),
    (r"\.spatial_mixing\.attn\.rpe_k\.lookup_table_bias$", ".mixer.rpb"),
    (r"\.spatial_mixing\.attn\.(qkv|proj)\.", r".mixer.\1."),
    (r"\.spatial_mixing\.", ".mixer."),
    (r"\.mlp\.0\.", ".mlp.fc1."),
    (r"\.mlp\.1\.", ".mlp.norm."),
    (r"\.mlp\.3\.", ".mlp.fc2."),
    (r"\.mlp\.4\.conv_attn\.", ".mlp.spatial.gate."),
    (r"\.mlp\.4\.conv\.", ".mlp.spatial.mix."),
    (r"\.mlp\.4\.norm\.", ".mlp.spatial.norm1."),
    (r"\.mlp\.4\.norm2\.", ".mlp.spatial.norm2."),
    (r"\.layer_scale$", ".ls2.gamma"),
    # 1 x 1 and 1 x 2 convolutions are kept as linear maps.
    (r"((?:^hidden|\.spatial\.gate|\.mix|\.fc[12])\.weight)$", r"\1", Flatten()),
    (r"(\.mixer\.gate\.weight)$", r"\1", Flatten((1, 2))),
]


class PartialMlp(nn.Module):
    """MLP with batch norm before the activation, and partial spatial attention of its output if `spatial`.

    Shape:
        (B, C, H, W) to (B, C, H, W).
    """

    fused_pairs = (("fc1", "norm"),)
    last_product = "fc2"  # once the spatial attention is merged

    def __init__(
        self, dim: int, hidden_dim: int, act_layer: Callable[[], nn.Module], spatial: bool, device=None, dtype=None
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.fc1 = Pointwise2d(dim, hidden_dim, bias=False, **dd)
        self.norm = nn.BatchNorm2d(hidden_dim, **dd)
        self.act = act_layer()
        self.fc2 = Pointwise2d(hidden_dim, dim, bias=False, **dd)
        self.spatial = PartialSpatialAttention(dim, **dd) if spatial else nn.Identity()

    def fuse(self) -> None:
        """Merge the products and norms of the spatial attention into fc2, for inference."""
        if isinstance(self.spatial, PartialSpatialAttention):
            self.fc2, self.spatial = self.spatial.merged(self.fc2)

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            return self.spatial(norm_act_product(self.norm, self.act, self.fc2, self.fc1(x)))
        y = small_mlp(self.fc1, self.norm, self.act, self.fc2, x)
        if y is None:
            hidden = product_norm(self.fc1, self.norm, x)
            y = self.fc2(activated(self.act, hidden, self.fc1, self.norm))
        return self.spatial(y)


class PartialBlock(nn.Module):
    """x + mlp(mixer(x)), or, with `two_residuals`, x + mixer(x) and then x + mlp(x).

    Args:
        dim: channels.
        mixer: mixes positions.
        mlp: mixes channels.
        two_residuals: the form of the block.
        layer_scale: initial value of the learned scale of the MLP's branch, None for no scale.
        drop_path: probability of dropping the MLP's branch of a sample.

    Shape:
        (B, H, W, C) to (B, H, W, C).
    """

    def __init__(
        self, dim: int, mixer: nn.Module, mlp: PartialMlp, two_residuals: bool, layer_scale: float | None = None,
        drop_path: float = 0.0, device=None, dtype=None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.mixer, self.mlp, self.two_residuals = mixer, mlp, two_residuals
        self.ls2 = LayerScale2d(dim, layer_scale, device=device, dtype=dtype) if layer_scale else nn.Identity()
        self.drop_path2 = DropPath(drop_path) if drop_path else nn.Identity()

    def fuse(self) -> None:
        """Merge what merging the mixer's norms left over, and the layer scale, for inference."""
        shift = getattr(self.mixer, "shift", None)
        if shift is not None and not self.two_residuals:
            unmoved = shift.new_zeros(self.mixer.widths[0])
            scale_input(self.mlp.fc1, None, torch.cat([unmoved, shift.flatten()]))
            self.mixer.shift = None
        if isinstance(self.mlp.spatial, nn.Identity):
            fuse_scale(self, "ls2", self.mlp)

    @channels_last
    def forward(self, x: Tensor) -> Tensor:
        y = self.mixer(x)
        if self.two_residuals:
            x = y = x + y
        return x + self.drop_path2(self.ls2(self.mlp(y)))


class PATNet(Hierarchical):
    """PATNet. What maps have beyond a multiple of the patch sizes is dropped.

    Args:
        in_chans: channels of the image.
        num_classes: classes of the head, 0 for none.
        global_pool: pooling before the head's hidden layer, which there is none of without pooling.
        embed_dim: channels of the first stage; each further stage has twice those of the one before.
        depths: blocks of each stage.
        mlp_ratio: hidden channels of the MLP per channel.
        n_div: the n-th part of the channels is convolved.
        act_layer: activation of the MLPs and the head, "gelu" or "relu".
        use_channel_attn: attention for the channels that are not convolved: of channels, and of positions in the last
            stage.
        use_spatial_attn: partial spatial attention after the MLPs.
        num_heads: heads of the attention in the last stage.
        feature_dim: channels of the head's hidden layer.
        drop_rate: dropout rate before the head.
        attn_drop_rate: dropout rate of the attention weights in the last stage.
        proj_drop_rate: dropout rate of the attention's output in the last stage.
        drop_path_rate: stochastic depth rate of the last block; it grows linearly from 0.
        layer_scale_init_value: initial layer scale of the MLPs, 0 for no layer scale.
        patch_norm: batch norm in the stem.
        fork_feat: a backbone for dense prediction as published: no head, batch norm of every stage's output in
            `forward_intermediates` and `features_only`.

    Raises:
        VisionattnError: if `act_layer` is something else.
    """

    layouts = {"official": RULES}
    feature_norm = nn.BatchNorm2d
    feature_cfg = Hierarchical.feature_cfg | {"feature_cls": "getter"}  # which has the norms of features

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dim: int = 96,
        depths: Sequence[int] = (1, 2, 8, 2),
        mlp_ratio: float = 2.0,
        n_div: int = 4,
        act_layer: str = "relu",
        use_channel_attn: bool = True,
        use_spatial_attn: bool = True,
        num_heads: int = 4,
        feature_dim: int = 1280,
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.1,
        proj_drop_rate: float = 0.1,
        drop_path_rate: float = 0.0,
        layer_scale_init_value: float = 0.0,
        patch_norm: bool = True,
        fork_feat: bool = False,
        device=None,
        dtype=None,
    ) -> None:
        if act_layer not in ACTIVATIONS:
            raise VisionattnError(f"expected act_layer one of {', '.join(ACTIVATIONS)}, got {act_layer}")
        dd = {"device": device, "dtype": dtype}
        act = ACTIVATIONS[act_layer]
        rates = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)
        dims = [embed_dim * 2**i for i in range(len(depths))]

        def mixer(dim: int, last: bool) -> nn.Module:
            if not use_channel_attn:
                return PartialConv2d(dim, n_div, **dd)
            if last:
                return PartialSelfAttention(
                    dim, n_div, num_heads, attn_drop=attn_drop_rate, proj_drop=proj_drop_rate, **dd
                )
            return PartialChannelAttention(dim, n_div, **dd)

        stages = []
        for i, dim in enumerate(dims):
            last = i == len(dims) - 1
            blocks = [
                PartialBlock(
                    dim, mixer(dim, last), PartialMlp(dim, int(dim * mlp_ratio), act, use_spatial_attn, **dd),
                    two_residuals=last, layer_scale=layer_scale_init_value or None, drop_path=rate, **dd,
                )
                for rate in rates[i]
            ]  # fmt: skip
            downsample = ConvNorm(dims[i - 1], dim, 2, 2, padding=0, **dd) if i else None
            stages.append(Stage(blocks, dim, downsample=downsample))
        super().__init__(
            ConvNorm(in_chans, embed_dim, 4, 4, padding=0, norm=patch_norm, **dd), stages,
            feature_norms=[nn.BatchNorm2d(dim, **dd) for dim in dims] if fork_feat else None,
            num_classes=0, in_chans=in_chans, global_pool=global_pool, drop_rate=drop_rate, **dd,
        )  # fmt: skip
        self.hidden, self.hidden_act = nn.Identity(), nn.Identity()
        if not fork_feat:
            self.hidden, self.hidden_act = Pointwise(self.head_hidden_size, feature_dim, bias=False, **dd), act()
            self.reset_classifier(num_classes)
        self.apply(partial(init_weights, kinds=nn.Linear | nn.Conv2d))

    def reset_classifier(self, num_classes: int, global_pool: str | None = None, reset_other: bool = False) -> None:
        """Replace the head.

        Args:
            num_classes: classes of the new head, 0 for none.
            global_pool: new pooling, unchanged if None. One with another number of features has a new hidden layer.
            reset_other: remove the head's hidden layer.
        """
        pooled = self._pooled_size(self.global_pool.pool_type if global_pool is None else global_pool)
        if reset_other:
            self.hidden, self.hidden_act = nn.Identity(), nn.Identity()
        elif isinstance(self.hidden, Pointwise) and self.hidden.in_features != pooled:
            self.hidden = Pointwise(pooled, self.hidden.out_features, bias=False, **self._placement())
            init_weights(self.hidden)
        super().reset_classifier(num_classes, global_pool)

    def _pre_logits_size(self) -> int:
        used = self.global_pool.pool_type and isinstance(self.hidden, Pointwise)
        return self.hidden.out_features if used else super()._pre_logits_size()

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Map of the last stage to logits, or to the pooled features' hidden layer with `pre_logits`."""
        x = self.global_pool(x)
        if self.global_pool.pool_type:
            x = self.hidden_act(self.hidden(x))
        x = self.head_drop(x)
        return x if pre_logits else self._classify(x)


def _variant(
    embed_dim: int, depths: Sequence[int], act: str, spatial: bool, heads: int, gmacs: float, recipe: dict,
    top1: float | None = None,
) -> Variant:  # fmt: skip
    kwargs = {
        "embed_dim": embed_dim, "depths": depths, "act_layer": act, "use_spatial_attn": spatial, "num_heads": heads,
    }  # fmt: skip
    return Variant(kwargs, gmacs, {"in1k": Weights(top1=top1, crop_pct=0.9, note="not released")}, recipe)


def _recipe(drop_path: float, lr: float, batch_size: int, weight_decay: float, mixup: float) -> dict:
    return {
        "drop_path_rate": drop_path, "lr": lr, "batch_size": batch_size, "weight_decay": weight_decay, "mixup": mixup,
    }  # fmt: skip


# Shape, recipe, GMACs as configured in the published code and as drawn in the papers, the papers' top-1.
SIZES = {
    "t0": ((32, (1, 2, 8, 2), "gelu"), _recipe(0.0, 4e-3, 4096, 0.005, 0.05), 0.233, 0.243, 73.9),
    "t1": ((48, (1, 2, 8, 2), "gelu"), _recipe(0.02, 4e-3, 4096, 0.01, 0.1), 0.540, 0.540, 78.1),
    "t2": ((64, (2, 2, 6, 4), "relu"), _recipe(0.05, 4e-3, 4096, 0.02, 0.1), 1.033, 1.078, 80.2),
    "s": ((96, (2, 2, 9, 4), "relu"), _recipe(0.1, 4e-3, 4096, 0.03, 0.3), 2.705, 2.828, 82.1),
    "m": ((128, (2, 3, 16, 4), "relu"), _recipe(0.2, 2e-3, 2048, 0.05, 0.5), 6.673, 6.996, 83.1),
    "l": ((160, (2, 3, 20, 4), "relu"), _recipe(0.3, 2e-3, 2048, 0.05, 0.7), 11.882, 12.466, 83.9),
}
VARIANTS = {}
for _size, (_shape, _facts, _gmacs, _gmacs_full, _top1) in SIZES.items():
    VARIANTS[f"patnet_{_size}"] = _variant(*_shape, _size == "t1", 4, _gmacs, _facts)
    VARIANTS[f"patnet_{_size}_full"] = _variant(*_shape, True, 4 if _size == "t0" else 6, _gmacs_full, _facts, _top1)
VARIANTS["test_patnet"] = Variant(
    {
        "embed_dim": 16, "depths": (1, 1, 2, 1), "act_layer": "gelu", "feature_dim": 96, "attn_drop_rate": 0.0,
        "proj_drop_rate": 0.0,
    },
    0.0006988,
    img_size=32,
)  # fmt: skip
FAMILY = Family(
    "patnet",
    (
        ("Partial Convolution Meets Visual Attention", "2503.03148"),
        ("Partial Channel Network: Compute Fewer, Perform Better", "2502.01303"),
    ),
    "https://github.com/haiduo/PartialNet",
    "mit",
)
register_family(FAMILY, PATNet, VARIANTS)
