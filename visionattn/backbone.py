"""The two scaffolds every family fills in: `Hierarchical` (stages on maps) and `Isotropic` (one sequence of tokens).

They hold what every backbone repeats: timm's model contract (features, intermediates, heads, gradient checkpointing,
parameter groups), input checks and position tables that follow the input size.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, ClassVar

import torch
from timm.layers import Format, create_classifier, nchw_to, to_2tuple, trunc_normal_
from timm.models._features import feature_take_indices
from timm.models.vision_transformer import global_pool_nlc
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .errors import VisionattnError
from .layers.dilation import spread, unstride
from .layers.fuse import fuse_modules
from .layers.norm import allow_single_values
from .layers.position import PositionEmbedding, resample_rows, resize_table
from .layers.symbolic import ceil_div, is_symbolic

POOLS = ("", *(fast + kind for fast in ("", "fast") for kind in ("avg", "max", "avgmax", "catavgmax")), "fast")
"""Kinds of global pooling of maps."""
FORMATS = tuple(fmt.value for fmt in Format)
"""Layouts of features."""


def check_output_format(output_fmt: str) -> None:
    """Refuse a layout of features that is none of `FORMATS`."""
    if output_fmt not in FORMATS:
        raise VisionattnError(f"expected output_fmt one of {', '.join(FORMATS)}, got {output_fmt!r}")


class InputCheck(nn.Module):
    """Passes images on, and refuses those that are too small.

    Args:
        size: smallest height and width in pixels.
        name: of the model, for the message.
    """

    def __init__(self, size: int, name: str) -> None:
        super().__init__()
        self.size, self.name = size, name

    def forward(self, x: Tensor) -> Tensor:
        return _checked(x, self.size, self.name)


@torch.fx.wrap
def _checked(x: Tensor, size: int, name: str) -> Tensor:
    H, W = x.shape[-2:]
    if not torch.compiler.is_compiling() and min(H, W) < size:
        raise VisionattnError(f"{name} expects at least {size} x {size} input, got {H} x {W}")
    return x


class Backbone(nn.Module):
    """What both scaffolds share.

    Attributes:
        layouts: published layouts of the family's checkpoints, name to rules (see `weights.Rule`).
        first_conv: name of the convolution that takes the image.
        classifier: name of the head, or names where there are several.
        feature_cfg: how timm's builder makes a feature extractor of the model.
        optional: beginnings of the names of what models for dense prediction do without, or have besides.
        averaged_weights: whether the published figures are those of averaged weights, where a checkpoint holds both.
        dilates: whether `dilate` can keep the resolution of the last stages.
    """

    layouts: ClassVar[dict[str, list]] = {}
    first_conv: ClassVar[str] = "stem.proj"
    classifier: ClassVar[str | tuple[str, ...]] = "head"
    feature_cfg: ClassVar[dict]
    optional: ClassVar[tuple[str, ...]] = ("norm.", "feature_norms.", "hidden.", "cls_token")
    averaged_weights: ClassVar[bool] = True
    dilates: ClassVar[bool] = False

    def __init__(
        self, num_features: int, num_classes: int, in_chans: int, drop_rate: float, min_input_size: int
    ) -> None:
        super().__init__()
        self.check = InputCheck(min_input_size, type(self).__name__)
        self.num_features = self.head_hidden_size = num_features
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.drop_rate = drop_rate
        self.grad_checkpointing = False
        self.feature_info: list[dict] = []

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        return self.head

    @staticmethod
    def map_size(length: int, reduction: int) -> int:
        """Length of an axis of the feature map of that reduction, for `length` pixels of the image."""
        return ceil_div(length, reduction)

    def pool_size(self, img_size: tuple[int, int]) -> tuple[int, int]:
        """(height, width) of what is pooled, the last map or the grid of the patches, for that of the image."""
        reduction = self.feature_info[-1]["reduction"]
        return self.map_size(img_size[0], reduction), self.map_size(img_size[1], reduction)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Names of parameters without weight decay, besides those with one dimension."""
        return set()

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute activations in the backward pass instead of keeping them."""
        self.grad_checkpointing = enable

    def adapt_state_dict(self, state_dict: dict[str, Tensor], made_for: Mapping[str, Any]) -> dict[str, Tensor]:
        """Last step of a conversion: makes a state dict in our layout fit this model's configuration, where it can.

        Tables of biases by relative position are resampled for windows of another size.

        Args:
            state_dict: in our layout, of any model of the family (or of another; then whatever is returned).
            made_for: arguments of the model that it was made for, as far as they are known.
        """
        tables = {k: tuple(v.shape[1:]) for k, v in self.state_dict().items() if k.endswith(".rpb") and v.ndim == 3}
        return state_dict | {
            k: resize_table(state_dict[k], size)
            for k, size in tables.items()
            if k in state_dict and state_dict[k].ndim == 3
        }

    @torch.jit.ignore
    def fuse(self) -> "Backbone":
        """Merge batch norms into the products next to them, in place, for faster inference.

        Returns:
            This model, whose output is the same up to rounding and whose parameters are others.

        Raises:
            VisionattnError: in training mode.
        """
        if self.training:
            raise VisionattnError("expected a model in eval mode to fuse, got one in training mode: call eval() first")
        fuse_modules(self)
        return self

    @torch.jit.ignore
    def advance(self, epoch: float) -> None:
        """Follow the paper's own schedules. Called before every update of a training run.

        Args:
            epoch: time since the start of the run in epochs, 2.5 in the middle of the third.
        """

    @torch.jit.ignore
    def learning_rates(self) -> dict[str, float]:
        """Factors on the peak learning rate for parameters that the paper trains at another one, by pattern of names.

        Warm-up and end of the schedule are as for the others.
        """
        return {}

    @torch.jit.ignore
    def learn_from(self, teacher: nn.Module) -> None:
        """Take a teacher, for `training_loss`. It is not a part of the model, nor trained, moved or saved with it.

        Args:
            teacher: a model of what the paper distils from, on the device of this one.

        Raises:
            VisionattnError: if the model has no use for a teacher, or not for this one.
        """
        raise VisionattnError(f"{self.check.name} learns from no teacher")

    @torch.jit.ignore
    def training_loss(self, loss: Tensor, images: Tensor, logits: Tensor) -> Tensor:
        """Add the paper's own terms to the loss of a task. Called after a forward pass in training mode.

        Args:
            loss: of the task.
            images: what the model was called with.
            logits: what it returned.

        Returns:
            The loss to minimise.
        """
        return loss

    def _placement(self) -> dict:
        parameter = next(self.parameters())
        return {"device": parameter.device, "dtype": parameter.dtype}


def _recomputed(block: nn.Module, *args) -> Tensor:
    """`block(*args)` with activations recomputed in the backward pass, which must not count for batch norm twice."""
    norms = [m for m in block.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]

    @contextmanager
    def frozen_statistics() -> Iterator[None]:
        momenta, counts = [norm.momentum for norm in norms], [norm.num_batches_tracked for norm in norms]
        for norm in norms:
            norm.momentum, norm.num_batches_tracked = 0.0, None
        try:
            yield
        finally:
            for norm, momentum, count in zip(norms, momenta, counts, strict=True):
                norm.momentum, norm.num_batches_tracked = momentum, count

    # Compiled graphs write to buffers once, at the end of the forward pass, whatever is recomputed.
    if norms and block.training and not torch.compiler.is_compiling():
        return checkpoint(block, *args, use_reentrant=False, context_fn=lambda: (nullcontext(), frozen_statistics()))
    return checkpoint(block, *args, use_reentrant=False)


class Stage(nn.Module):
    """One resolution of a hierarchical backbone.

    Args:
        blocks: residual blocks.
        dim: channels of the output.
        downsample: from the output of the stage before, NCHW.
        norm: after the blocks, NCHW.
        channels_last: the blocks take (B, H, W, C) instead of (B, C, H, W).

    Shape:
        (B, C', H', W') to (B, C, H, W).
    """

    def __init__(
        self,
        blocks: Sequence[nn.Module],
        dim: int,
        downsample: nn.Module | None = None,
        norm: nn.Module | None = None,
        channels_last: bool = False,
    ) -> None:
        super().__init__()
        self.dim = dim
        self.downsample = downsample or nn.Identity()
        self.blocks = nn.Sequential(*blocks)
        self.norm = norm or nn.Identity()
        self.channels_last = channels_last
        self.grad_checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        x = self.downsample(x)
        if self.channels_last:
            x = x.permute(0, 2, 3, 1)
        for block in self.blocks:
            x = _recomputed(block, x) if self.grad_checkpointing else block(x)
        if self.channels_last:
            x = x.permute(0, 3, 1, 2)
        return self.norm(x)


class Hierarchical(Backbone):
    """A stem and stages of falling resolution, then norm, pooling and a linear head.

    Args:
        stem: image to the map of the first stage, NCHW.
        stages: the stages, each after the first halving the resolution.
        norm: before pooling, NCHW.
        num_classes: classes of the head, 0 for none.
        in_chans: channels of the image.
        global_pool: "avg", "max", "avgmax", "catavgmax" (which doubles the features), or these with timm's prefix
            "fast"; "" for none, where the head maps every position.
        drop_rate: dropout rate before the head.
        stem_stride: reduction of the stem.
        norm_after_pool: apply `norm`, which then takes (B, C) too, to the pooled features instead of the map.
        num_features: channels after `norm`, those of the last stage if None.
        feature_norms: a norm of each stage's output, for `forward_intermediates` alone; NCHW.

    Shape:
        (B, in_chans, H, W) to (B, num_classes); stage i of `features_only` is (B, C_i, H_i, W_i).
    """

    feature_cfg = {"out_indices": (0, 1, 2, 3), "flatten_sequential": True}
    feature_norm: ClassVar[Callable[..., nn.Module] | None] = None
    """Norm of stage outputs in the family's models for dense prediction, from channels; None where there are none."""

    def __init__(
        self,
        stem: nn.Module,
        stages: Sequence[Stage],
        norm: nn.Module | None = None,
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        stem_stride: int = 4,
        norm_after_pool: bool = False,
        num_features: int | None = None,
        feature_norms: Sequence[nn.Module] | None = None,
        device=None,
        dtype=None,
    ) -> None:
        reductions = [stem_stride * 2**i for i in range(len(stages))]
        num_features = num_features or stages[-1].dim
        super().__init__(num_features, num_classes, in_chans, drop_rate, min_input_size=reductions[-1])
        self.stem = stem
        self.stages = nn.Sequential(*stages)
        self.norm = norm or nn.Identity()
        self.norm_after_pool = norm_after_pool
        self._check_pool(global_pool)
        self.feature_norms = None if feature_norms is None else nn.ModuleList(feature_norms)
        self.global_pool, self.head_drop, self.head = create_classifier(
            self.num_features, num_classes, global_pool, drop_rate=drop_rate, device=device, dtype=dtype
        )
        self.head_hidden_size = self._pooled_size(global_pool)
        self.feature_info = [
            {"num_chs": stage.dim, "reduction": reductions[i], "module": f"stages.{i}"}
            for i, stage in enumerate(stages)
        ]
        allow_single_values(self)

    def _check_pool(self, global_pool: str) -> None:
        if global_pool not in POOLS:
            accepted = ", ".join(map(repr, POOLS))
            raise VisionattnError(f"{self.check.name} expects global_pool one of {accepted}, got {global_pool!r}")
        if self.norm_after_pool and self._pooled_size(global_pool) != self.num_features:
            raise VisionattnError(
                f"{self.check.name} expects a global_pool that keeps its {self.num_features} features, "
                f"as the norm comes after it, got {global_pool!r}"
            )

    @torch.jit.ignore
    def dilate(self, output_stride: int) -> None:
        """Keep the resolution from the stage of `output_stride` on: later ones take steps of one position and spread
        their kernels, which the same parameters serve.

        With n times the resolution, every n-th position of a stage's output is what it was, but for what its blocks
        draw from the whole map or from rows and columns that used to be dropped.

        Args:
            output_stride: of the last map, one of those of the stages.

        Raises:
            VisionattnError: if no stage has that stride, or the model is dilated already.
        """
        strides = [info["reduction"] for info in self.feature_info]
        if len(set(strides)) < len(strides):
            raise VisionattnError(f"{self.check.name} is dilated already, to strides {strides}")
        if output_stride not in strides:
            raise VisionattnError(f"{self.check.name} expects output_stride one of {strides}, got {output_stride}")
        before = 1
        for stage, info in zip(self.stages, self.feature_info, strict=True):
            factor = max(1, info["reduction"] // output_stride)
            if factor > before:
                unstride(stage.downsample, before)
                spread(stage.blocks, factor)
                info["reduction"] = output_stride
            before = factor

    def add_feature_norms(self, indices: Sequence[int]) -> None:
        """Normalise the outputs of these stages, and of no others, as the family's models for dense prediction do.

        Args:
            indices: stages whose outputs are used.
        """
        if self.feature_norm is not None:
            norms = self.feature_norms or [self.feature_norm(stage.dim, **self._placement()) for stage in self.stages]
            self.feature_norms = nn.ModuleList(norm if i in indices else nn.Identity() for i, norm in enumerate(norms))

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the activations of the blocks in the backward pass instead of keeping them."""
        super().set_grad_checkpointing(enable)
        for stage in self.stages:
            stage.grad_checkpointing = enable

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict:
        """Patterns that group parameters by depth, for layer-wise learning rates."""
        blocks = [
            (r"^stages\.(\d+)\.downsample", (0,)),
            (r"^stages\.(\d+)\.blocks\.(\d+)", None),
            (r"^stages\.(\d+)\.norm", (99999,)),
            (r"^(?:feature_norms|norm)", (99999,)),
        ]
        return {"stem": r"^stem", "blocks": r"^stages\.(\d+)" if coarse else blocks}

    def reset_classifier(self, num_classes: int, global_pool: str | None = None, reset_other: bool = False) -> None:
        """Replace the head.

        Args:
            num_classes: classes of the new head, 0 for none.
            global_pool: new pooling, unchanged if None.
            reset_other: nothing else belongs to the head; accepted as in timm.
        """
        pool = self.global_pool.pool_type if global_pool is None else global_pool
        self._check_pool(pool)
        self.num_classes = num_classes
        self.global_pool, self.head_drop, _ = create_classifier(self.num_features, 0, pool, drop_rate=self.drop_rate)
        self.head_hidden_size = self._pre_logits_size()
        placement = self._placement()
        self.head = nn.Linear(self.head_hidden_size, num_classes, **placement) if num_classes else nn.Identity()
        self.train(self.training)

    def _pooled_size(self, global_pool: str) -> int:
        """Features after a pooling."""
        return self.num_features * (2 if global_pool.endswith("catavgmax") else 1)

    def _pre_logits_size(self) -> int:
        """Features that the head gets with the present pooling."""
        return self._pooled_size(self.global_pool.pool_type)

    def forward_features(self, x: Tensor) -> Tensor:
        """Image to the map of the last stage, NCHW, normalised unless that comes after the pooling."""
        return self._map_norm(self.stages(self.stem(self.check(x))))

    def _map_norm(self, x: Tensor) -> Tensor:
        return x if self.norm_after_pool else self.norm(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Map of the last stage to logits, or to pooled features with `pre_logits`."""
        x = self.global_pool(x)
        x = self.head_drop(self.norm(x) if self.norm_after_pool else x)
        return x if pre_logits else self._classify(x)

    def _classify(self, x: Tensor) -> Tensor:
        return self.head(x) if self.global_pool.pool_type else self.head(x.movedim(1, -1)).movedim(-1, 1)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Outputs of stages.

        Args:
            x: image.
            indices: the last n stages if an int, these stages if a list, all if None.
            norm: apply the final norm to the last stage's output.
            stop_early: do not run stages after the last one asked for.
            output_fmt: layout of the maps, "NCHW", "NHWC" or, with the positions in one sequence, "NLC" or "NCL".
            intermediates_only: do not return the final features.

        Returns:
            The maps, or (final features, maps).
        """
        check_output_format(output_fmt)
        take, last = feature_take_indices(len(self.stages), indices)
        final = len(self.stages) - 1
        x = self.stem(self.check(x))
        intermediates = []
        for i, stage in enumerate(self.stages[: last + 1] if stop_early else self.stages):
            x = stage(x)
            if i in take:
                feature = self.norm(x) if norm and i == final else x
                feature = feature if self.feature_norms is None else self.feature_norms[i](feature)
                intermediates.append(nchw_to(feature, output_fmt))
        if intermediates_only:
            return intermediates
        return (self._map_norm(x) if i == final else x), intermediates

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove what the given intermediates do not need.

        Args:
            indices: stages to keep, as in `forward_intermediates`.
            prune_norm: remove the final norm.
            prune_head: remove the head.

        Returns:
            Absolute indices of the kept intermediates.
        """
        take, last = feature_take_indices(len(self.stages), indices)
        shorter = last < len(self.stages) - 1
        self.stages = self.stages[: last + 1]
        if self.feature_norms is not None:
            self.feature_norms = self.feature_norms[: last + 1]
        self.feature_info = self.feature_info[: last + 1]
        width = self.num_features
        if prune_norm or shorter:
            self.norm = nn.Identity()
            self.num_features = self.feature_info[last]["num_chs"]
        if prune_head or self.num_features != width or shorter:
            self.reset_classifier(0, "", reset_other=True)
        return take


class Isotropic(Backbone):
    """Patches of one size as a sequence of tokens, then norm, pooling and a linear head.

    Blocks are called as `block(tokens, *arguments)` with what `block_arguments` returns, by default the grid: (height,
    width) of the patch map.

    Args:
        stem: patch embedding, image to (B, N, C) tokens in row-major order.
        blocks: residual blocks.
        norm: over the channels of every token, before pooling.
        embed_dim: channels C.
        patch_size: side of a patch in pixels; images are padded with zeros at the bottom and right to a multiple.
        img_size: image size the position table is made for, in pixels; other sizes resample it.
        pos_embed: learn a position embedding of the patches.
        class_token: index of the block before which a class token joins, -1 if it joins before the position embedding,
            which then has a vector for it too, None for no class token.
        num_classes: classes of the head, 0 for none.
        in_chans: channels of the image.
        global_pool: "token" (the class token), "avg", "max", "avgmax" or "" for none.
        drop_rate: dropout rate after the position embedding and before the head.
        class_token_last: the class token comes after the patches instead of before them.

    Shape:
        (B, in_chans, H, W) to (B, num_classes).
    """

    feature_cfg = {"out_indices": 3, "feature_cls": "getter"}

    def __init__(
        self,
        stem: nn.Module,
        blocks: Sequence[nn.Module],
        norm: nn.Module,
        embed_dim: int,
        patch_size: int,
        img_size: int | tuple[int, int],
        pos_embed: bool,
        class_token: int | None,
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = "token",
        drop_rate: float = 0.0,
        class_token_last: bool = False,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__(embed_dim, num_classes, in_chans, drop_rate, min_input_size=patch_size)
        dd = {"device": device, "dtype": dtype}
        self.patch_size = patch_size
        self.grid_size = tuple(-(-size // patch_size) for size in to_2tuple(img_size))
        self.class_token_at = class_token
        self.class_token_last = class_token_last
        self.num_prefix_tokens = 0 if class_token is None or class_token_last else 1
        self.global_pool = self._checked_pool(global_pool)
        self.cls_token = None if class_token is None else nn.Parameter(torch.empty(1, 1, embed_dim, **dd))
        own = int(class_token == -1)
        slots = (0, own) if class_token_last else (own, 0)  # of the class token, before those of the patches and after
        self.pos_embed = PositionEmbedding(self.grid_size, embed_dim, *slots, **dd) if pos_embed else None
        self.stem = stem
        self.pos_drop = nn.Dropout(drop_rate)
        self.blocks = nn.Sequential(*blocks)
        self.norm = norm
        self.head_drop = nn.Dropout(drop_rate)
        self.head = nn.Linear(embed_dim, num_classes, **dd) if num_classes else nn.Identity()
        self.feature_info = [
            {"num_chs": embed_dim, "reduction": patch_size, "module": f"blocks.{i}"} for i in range(len(blocks))
        ]
        if self.cls_token is not None:
            trunc_normal_(self.cls_token, std=0.02)
        allow_single_values(self)

    def _checked_pool(self, global_pool: str) -> str:
        accepted = (
            ("avg", "max", "avgmax", "") if self.class_token_at is None else ("token", "avg", "max", "avgmax", "")
        )
        if global_pool not in accepted:
            raise VisionattnError(f"expected global_pool one of {', '.join(map(repr, accepted))}, got {global_pool!r}")
        return global_pool

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Names of parameters without weight decay, besides those with one dimension."""
        names = {"cls_token": self.cls_token, "pos_embed.weight": self.pos_embed}
        return {name for name, value in names.items() if value is not None}

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict:
        """Patterns that group parameters by depth, for layer-wise learning rates."""
        return {
            "stem": r"^cls_token|pos_embed|stem",
            "blocks": r"^blocks\.(\d+)" if coarse else [(r"^blocks\.(\d+)", None), (r"^norm", (99999,))],
        }

    def reset_classifier(self, num_classes: int, global_pool: str | None = None, reset_other: bool = False) -> None:
        """Replace the head.

        Args:
            num_classes: classes of the new head, 0 for none.
            global_pool: new pooling, unchanged if None.
            reset_other: nothing else belongs to the head; accepted as in timm.
        """
        if global_pool is not None:
            self.global_pool = self._checked_pool(global_pool)
        self.num_classes = num_classes
        placement = self._placement()
        self.head = nn.Linear(self.num_features, num_classes, **placement) if num_classes else nn.Identity()

    def adapt_state_dict(self, state_dict: dict[str, Tensor], made_for: Mapping[str, Any]) -> dict[str, Tensor]:
        """Resamples a position table that was made for images of another size."""
        state_dict = super().adapt_state_dict(state_dict, made_for)
        table, own = state_dict.get("pos_embed.weight"), self.pos_embed
        if own is None or table is None or table.ndim != 3:
            return state_dict
        grid = self._grid_of(table.shape[1] - own.prefix - own.suffix, made_for)
        if grid in (None, own.grid_size):
            return state_dict
        table = resample_rows(table[0], grid, own.grid_size, own.prefix, own.suffix)[None]
        return state_dict | {"pos_embed.weight": table}

    def _grid_of(self, patches: int, made_for: Mapping[str, Any]) -> tuple[int, int] | None:
        """The grid of that many patches in the model that weights were made for, square if it is not known, or None if
        it cannot be told."""
        side = math.isqrt(max(patches, 0))
        sizes = [made_for["img_size"]] if made_for.get("img_size") else []
        for size in (*sizes, side * self.patch_size):
            grid = tuple(-(-length // self.patch_size) for length in to_2tuple(size))
            if math.prod(grid) == patches:
                return grid
        return None

    def block_arguments(self, x: Tensor, grid: tuple[int, int]) -> tuple:
        """What every block is called with besides its tokens, made once for a forward pass.

        Args:
            x: tokens that the first block gets.
            grid: (height, width) of the patch map.
        """
        return (grid,)

    def _embed(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Image to ((B, N, C) tokens with positions, grid)."""
        x = self.check(x)
        grid = ceil_div(x.shape[-2], self.patch_size), ceil_div(x.shape[-1], self.patch_size)
        x = self._with_class_token(self.stem(_pad_to_multiple(x, self.patch_size)), -1)
        if self.pos_embed is not None:
            x = self.pos_embed(x, grid)
        return self.pos_drop(x), grid

    def _with_class_token(self, x: Tensor, block: int) -> Tensor:
        """`x` with the class token, if it joins before `block`."""
        if block != self.class_token_at:
            return x
        token = self.cls_token.expand(x.shape[0], -1, -1)
        return torch.cat([x, token] if self.class_token_last else [token, x], 1)

    def _split(self, x: Tensor, block: int | None = None) -> tuple[Tensor, Tensor]:
        """(patches, class token) of the tokens after `block`, or the last one; the second is empty if none joined."""
        if self.class_token_at is None or (block is not None and block < self.class_token_at):
            return x, x[:, :0]
        return (x[:, :-1], x[:, -1:]) if self.class_token_last else (x[:, 1:], x[:, :1])

    def _run(self, block: int, x: Tensor, *args) -> Tensor:
        x = self._with_class_token(x, block)
        return _recomputed(self.blocks[block], x, *args) if self.grad_checkpointing else self.blocks[block](x, *args)

    def forward_tokens(self, x: Tensor) -> Tensor:
        """Image to the tokens (B, N, C) that the last block returns."""
        x, grid = self._embed(x)
        args = self.block_arguments(x, grid)
        for i in range(len(self.blocks)):
            x = self._run(i, x, *args)
        return x

    def forward_features(self, x: Tensor) -> Tensor:
        """Image to normalised tokens (B, N, C), the class token at its end of the sequence."""
        return self.norm(self.forward_tokens(x))

    def pool(self, x: Tensor) -> Tensor:
        """Normalised tokens to what the head takes, or all of them where there is no pooling."""
        patches, token = self._split(x)
        return token[:, 0] if self.global_pool == "token" else global_pool_nlc(patches, self.global_pool, 0)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Tokens to logits, or to pooled features with `pre_logits`."""
        x = self.head_drop(self.pool(x) if self.global_pool else x)
        return x if pre_logits else self.head(x)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Outputs of blocks.

        Args:
            x: image.
            indices: the last n blocks if an int, these blocks if a list, all if None.
            return_prefix_tokens: return (patches, class token) pairs; the token part is empty where it has not joined.
            norm: apply the final norm to every output.
            stop_early: do not run blocks after the last one asked for.
            output_fmt: layout of the patches, "NCHW" or "NHWC" for maps, "NLC" or "NCL" for tokens.
            intermediates_only: do not return the final features.

        Returns:
            The outputs, or (final features, outputs).
        """
        check_output_format(output_fmt)
        take, last = feature_take_indices(len(self.blocks), indices)
        x, grid = self._embed(x)
        args = self.block_arguments(x, grid)
        intermediates = []
        for i in range(last + 1 if stop_early else len(self.blocks)):
            x = self._run(i, x, *args)
            if i in take:
                patches, token = self._split(self.norm(x) if norm else x, i)
                if output_fmt != "NLC":
                    patches = nchw_to(patches.transpose(1, 2).unflatten(2, grid), output_fmt)
                intermediates.append((patches, token) if return_prefix_tokens else patches)
        return intermediates if intermediates_only else (self.norm(x), intermediates)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove what the given intermediates do not need.

        Args:
            indices: blocks to keep, as in `forward_intermediates`.
            prune_norm: remove the final norm.
            prune_head: remove the head.

        Returns:
            Absolute indices of the kept intermediates.
        """
        take, last = feature_take_indices(len(self.blocks), indices)
        shorter = last < len(self.blocks) - 1
        self.blocks, self.feature_info = self.blocks[: last + 1], self.feature_info[: last + 1]
        if self.class_token_at is not None and self.class_token_at > last:  # it would have joined later
            self.class_token_at, self.cls_token, self.num_prefix_tokens = None, None, 0
        if prune_norm:
            self.norm = nn.Identity()
        if prune_head or shorter:
            self.reset_classifier(0, "")
        return take


@torch.fx.wrap
def _pad_to_multiple(x: Tensor, size: int) -> Tensor:
    """Zeros at the bottom and right of a map (B, C, H, W), up to the next multiples of `size`."""
    pad_h, pad_w = -x.shape[-2] % size, -x.shape[-1] % size
    return nn.functional.pad(x, (0, pad_w, 0, pad_h)) if is_symbolic(pad_h, pad_w) or pad_h or pad_w else x
