"""One sequence of tokens."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from timm.layers import nchw_to, to_2tuple, trunc_normal_
from timm.models._features import feature_take_indices
from timm.models.vision_transformer import global_pool_nlc
from torch import Tensor, nn

from ..errors import VisionattnError
from ..layers.norm import allow_single_values
from ..layers.position import PositionEmbedding, fit_positions
from ..layers.symbolic import ceil_div, is_symbolic
from .base import Backbone, check_output_format, in_slices, output_of, recomputed


class Isotropic(Backbone):
    """Patches of one size as a sequence of tokens, then norm, pooling and a linear head.

    Blocks are called as `block(tokens, *arguments)` with what `block_arguments` returns, by default the grid: (height,
    width) of the patch map. Those that hand something on to the next return a pair of their tokens and that, and are
    called with the pair.

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
        *,
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
        super().__init__(embed_dim, num_classes, in_chans, drop_rate, patch_size)
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

    def no_weight_decay(self) -> set[str]:
        """Names of parameters without weight decay, besides those with one dimension."""
        names = {"cls_token": self.cls_token, "pos_embed.weight": self.pos_embed}
        return {name for name, value in names.items() if value is not None}

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
        table = state_dict.get("pos_embed.weight")
        if self.pos_embed is None or table is None:
            return state_dict
        table = fit_positions(table, self.pos_embed, self.patch_size, made_for.get("img_size"))
        return state_dict | {"pos_embed.weight": table}

    def block_arguments(self, x: Tensor, grid: tuple[int, int]) -> tuple:
        """What every block is called with besides its tokens, made once for a forward pass.

        Args:
            x: tokens that the first block gets.
            grid: (height, width) of the patch map.
        """
        return (grid,)

    def end(self, x: Tensor | tuple[Tensor, Any]) -> Tensor:
        """What the last block returns to what the norm gets.

        Args:
            x: tokens, in a pair with what the block would hand on, if it does.
        """
        return output_of(x)

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
        return recomputed(self.blocks[block], x, *args) if self.grad_checkpointing else self.blocks[block](x, *args)

    def forward_tokens(self, x: Tensor) -> Tensor:
        """Image to the tokens (B, N, C) that the last block returns."""
        x, grid = self._embed(x)
        args = self.block_arguments(x, grid)

        def run(x: Tensor) -> Tensor:
            for i in range(len(self.blocks)):
                x = self._run(i, x, *args)
            return self.end(x)

        return in_slices(self.blocks, run, x)

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
            the outputs, or (final features, outputs).
        """
        check_output_format(output_fmt)
        take, last = feature_take_indices(len(self.blocks), indices)
        x, grid = self._embed(x)
        args = self.block_arguments(x, grid)
        intermediates = []
        for i in range(last + 1 if stop_early else len(self.blocks)):
            x = self._run(i, x, *args)
            if i in take:
                tokens = output_of(x)
                patches, token = self._split(self.norm(tokens) if norm else tokens, i)
                if output_fmt != "NLC":
                    patches = nchw_to(patches.transpose(1, 2).unflatten(2, grid), output_fmt)
                intermediates.append((patches, token) if return_prefix_tokens else patches)
        return intermediates if intermediates_only else (self.norm(self.end(x)), intermediates)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove what the given intermediates do not need.

        Args:
            indices: blocks to keep, as in `forward_intermediates`.
            prune_norm: remove the final norm.
            prune_head: remove the head.

        Returns:
            absolute indices of the kept intermediates.
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
