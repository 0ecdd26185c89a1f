"""Stages of falling resolution on maps."""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

from timm.layers import create_classifier, nchw_to
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from ..errors import VisionattnError
from ..layers.dilation import spread, unstride
from ..layers.norm import allow_single_values
from .base import Backbone, check_output_format, in_slices, output_of, recomputed

POOLS = ("", *(fast + kind for fast in ("", "fast") for kind in ("avg", "max", "avgmax", "catavgmax")), "fast")
"""Kinds of global pooling of maps."""


def first_channels(x: Tensor, count: int) -> Tensor:
    """What of a stage's output (B, C, H, W) is its feature."""
    return x if x.shape[1] == count else x[:, :count]


def check_lengths(**values: Sequence | None) -> None:
    """Refuse arguments of stages, by name, that are not of one length. None is no argument.

    Raises:
        VisionattnError: says how long each is.
    """
    lengths = {name: len(value) for name, value in values.items() if value is not None}
    if len(set(lengths.values())) > 1:
        names, numbers = ", ".join(lengths), ", ".join(map(str, lengths.values()))
        raise VisionattnError(f"expected {names} of one length, got {numbers}")


class Stage(nn.Module):
    """One resolution of a hierarchical backbone.

    Args:
        blocks: residual blocks of (B, H, W, C). Those that hand something on to the next return a pair of their map and
            that, and are called with the pair.
        dim: channels of the stage's feature. A stage may return more after these, for the stages behind it.
        downsample: from the output of the stage before, NCHW.
        norm: after the blocks, NCHW.
        in_slices: in inference on CPUs, compute on a part of a large batch after the other, which pays where blocks
            make maps of more channels.

    Shape:
        (B, C', H', W') to (B, C, H, W).
    """

    def __init__(
        self,
        blocks: Sequence[nn.Module],
        dim: int,
        downsample: nn.Module | None = None,
        norm: nn.Module | None = None,
        in_slices: bool = True,
    ) -> None:
        super().__init__()
        self.dim = dim
        self.in_slices = in_slices
        self.downsample = downsample or nn.Identity()
        self.blocks = nn.Sequential(*blocks)
        self.norm = norm or nn.Identity()
        self.grad_checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        x = self.downsample(x).permute(0, 2, 3, 1)
        return in_slices(self, self._mix, x) if self.in_slices else self._mix(x)

    def _mix(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = recomputed(block, x) if self.grad_checkpointing else block(x)
        return self.norm(self.end(x).permute(0, 3, 1, 2))

    def end(self, x: Tensor | tuple[Tensor, Any]) -> Tensor:
        """What the last block returns to what the norm gets.

        Args:
            x: map (B, H, W, C), in a pair with what the block would hand on, if it does.
        """
        return output_of(x)


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
        reductions: of each stage, from 4 on and twice that of the one before if None.
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
        *,
        norm: nn.Module | None = None,
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        reductions: Sequence[int] | None = None,
        norm_after_pool: bool = False,
        num_features: int | None = None,
        feature_norms: Sequence[nn.Module] | None = None,
        device=None,
        dtype=None,
    ) -> None:
        reductions = reductions or [4 * 2**i for i in range(len(stages))]
        num_features = num_features or stages[-1].dim
        super().__init__(num_features, num_classes, in_chans, drop_rate, reductions[-1])
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

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the activations of the blocks in the backward pass instead of keeping them."""
        super().set_grad_checkpointing(enable)
        for stage in self.stages:
            stage.grad_checkpointing = enable

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
            the maps, or (final features, maps).
        """
        check_output_format(output_fmt)
        take, last = feature_take_indices(len(self.stages), indices)
        final = len(self.stages) - 1
        x = self.stem(self.check(x))
        intermediates = []
        for i, stage in enumerate(self.stages[: last + 1] if stop_early else self.stages):
            x = stage(x)
            if i in take:
                feature = x if self.feature_norms is not None else first_channels(x, stage.dim)
                feature = self.norm(feature) if norm and i == final else feature
                feature = feature if self.feature_norms is None else self.feature_norms[i](feature)
                intermediates.append(nchw_to(feature, output_fmt))
        if intermediates_only:
            return intermediates
        return (self._map_norm(x) if i == final else first_channels(x, stage.dim)), intermediates

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove what the given intermediates do not need.

        Args:
            indices: stages to keep, as in `forward_intermediates`.
            prune_norm: remove the final norm.
            prune_head: remove the head.

        Returns:
            absolute indices of the kept intermediates.
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
