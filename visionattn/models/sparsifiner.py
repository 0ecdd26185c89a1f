"""Sparsifiner: DeiT and LV-ViT whose attention keeps, for every query, a few keys that a predictor chooses.

"Sparsifiner: Learning Sparse Instance-Dependent Attention for Efficient Vision Transformers", arXiv 2303.13755.
"""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from timm.layers import PatchEmbed, calculate_drop_path_rates, to_2tuple
from torch import Tensor, nn

from ..backbone import Isotropic
from ..errors import VisionattnError
from ..layers import SparseAttention
from ..layers.init import init_weights
from ..layers.pointwise import Mlp
from ..layers.position import grid_of, resample_rows
from ..layers.pruning import PruningBlock
from ..layers.symbolic import is_symbolic
from ..registry import Family, Variant, Weights, register_family

RULES = [
    (r"^pos_embed$", "pos_embed.weight"),
    (r"^patch_embed\.", "stem."),
    (r"\.attn\.mask_predictor\.", ".mixer.predictor."),
    (r"\.attn\.", ".mixer."),
]


class ConvStem(nn.Module):
    """LV-ViT's stem: three convolutions at half the image's size, then patches; (B, C_in, H, W) to (B, N, C)."""

    fused_pairs = (("conv1", "bn1"), ("conv2", "bn2"), ("conv3", "bn3"))

    def __init__(
        self, img_size: int | tuple[int, int], patch_size: int, in_chans: int, dim: int, device=None, dtype=None
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        for i, (chans, kernel, stride) in enumerate(((in_chans, 7, 2), (64, 3, 1), (64, 3, 1)), 1):
            self.add_module(f"conv{i}", nn.Conv2d(chans, 64, kernel, stride, kernel // 2, bias=False, **dd))
            self.add_module(f"bn{i}", nn.BatchNorm2d(64, **dd))
        self.proj = nn.Conv2d(64, dim, patch_size // 2, patch_size // 2, **dd)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(self.conv2(x)))
        x = F.relu(self.bn3(self.conv3(x)))
        return self.proj(x).flatten(2).transpose(1, 2)


class Scale(nn.Module):
    """Multiplies by a constant, where others have a learned scale."""

    def __init__(self, dim: int, factor: float, device=None, dtype=None) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor


class Sparsifiner(Isotropic):
    """Sparsifiner on DeiT.

    Trained in two runs, both with a teacher (see `learn_from`): the dense backbone with its published weights, such as
    this model with `attn_keep_rate=1`. In the first, with `phase="recon"`, the predictors learn the teacher's attention
    maps while the model attends to all keys; in the second everything else learns from teacher and labels.

    Args:
        in_chans: channels of the image.
        num_classes: classes of the head, 0 for none.
        global_pool: "token" (the class token), "avg", "max", "avgmax" or "".
        img_size: image size in pixels that position embedding and predictors are made for.
        patch_size: side of a patch in pixels.
        embed_dim: channels.
        depth: blocks.
        num_heads: attention heads.
        mlp_ratio: hidden channels of the MLP per channel.
        qkv_bias: bias of the query, key and value projections.
        qk_scale: factor of the attention logits, head_dim**-0.5 if None.
        drop_rate: dropout rate of the position embedding, MLPs, attention outputs and head.
        attn_drop_rate: dropout rate of the attention weights.
        drop_path_rate: stochastic depth rate of the last block; it grows linearly from 0.
        skip_lam: divisor of the residual branches.
        attn_keep_rate: part of the keys that every query keeps, or one such for every block.
        token_keep_rate: part of the patches left after the first pruning; its square after the second, and so on.
        token_pruning_loc: blocks that prune patches; those of every third are one pruning further.
        reduce_n_factor: tokens per token of the predictor's.
        reduce_c_factor: channels of a head per channel of the predictor's.
        share_inout_proj: use one matrix to reduce tokens and as the basis.
        basis_threshold: entries of the basis up to this size are taken for 0.
        basis_coef_topk: basis rows that every query keeps; None to use the threshold.
        basis_coef_threshold: without `basis_coef_topk`, coefficients up to this are taken for 0.
        attn_score_topk: keep a fixed number of keys; if not, those with a score above the threshold.
        attn_score_threshold: without `attn_score_topk`, the score that a key must exceed.
        phase: "distill" trains all but the predictors, "recon" the predictors alone, without pruning tokens.
    """

    layouts = {"official": RULES}
    learns_from_teacher = True
    stem_layer: type[nn.Module] = staticmethod(partial(PatchEmbed, strict_img_size=False))
    eps = 1e-6  # of the norms

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "token",
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        embed_dim: int = 384,
        depth: int = 12,
        num_heads: int = 6,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        skip_lam: float = 1.0,
        attn_keep_rate: float | Sequence[float] = 0.25,
        token_keep_rate: float = 1.0,
        token_pruning_loc: Sequence[int] = (),
        reduce_n_factor: int = 6,
        reduce_c_factor: int = 2,
        share_inout_proj: bool = False,
        basis_threshold: float = 0.02,
        basis_coef_topk: int | None = 8,
        basis_coef_threshold: float = 0.05,
        attn_score_topk: bool = True,
        attn_score_threshold: float = 1e-4,
        phase: Literal["distill", "recon"] = "distill",
        device=None,
        dtype=None,
    ) -> None:
        if phase not in ("distill", "recon"):
            raise VisionattnError(f"expected phase 'distill' or 'recon', got {phase!r}")
        keep_rates = [attn_keep_rate] * depth if isinstance(attn_keep_rate, (int, float)) else list(attn_keep_rate)
        if len(keep_rates) != depth:
            raise VisionattnError(f"expected an attn_keep_rate for each of {depth} blocks, got {len(keep_rates)}")
        dd = {"device": device, "dtype": dtype}
        norm_layer = partial(nn.LayerNorm, eps=self.eps)
        grid = tuple(-(-size // patch_size) for size in to_2tuple(img_size))
        blocks, arriving = [], 1.0
        for i, rate in enumerate(calculate_drop_path_rates(drop_path_rate, depth)):
            pruning = i in token_pruning_loc and phase != "recon"
            leaving = min(arriving, token_keep_rate ** (i // 3)) if pruning else arriving
            mixer = SparseAttention(
                embed_dim, math.prod(grid) + 1, num_heads,
                qkv_bias=qkv_bias, qk_scale=qk_scale, attn_drop=attn_drop_rate, proj_drop=drop_rate,
                attn_keep_rate=keep_rates[i], reduce_n_factor=reduce_n_factor, reduce_c_factor=reduce_c_factor,
                share_inout_proj=share_inout_proj, basis_threshold=basis_threshold, basis_coef_topk=basis_coef_topk,
                basis_coef_threshold=basis_coef_threshold, attn_score_topk=attn_score_topk,
                attn_score_threshold=attn_score_threshold, grid_size=grid, **dd,
            )  # fmt: skip
            mlp = Mlp(embed_dim, int(embed_dim * mlp_ratio), drop=drop_rate, **dd)
            scale = None if skip_lam == 1 else 1 / skip_lam
            block = PruningBlock(
                embed_dim, mixer, mlp, norm_layer=norm_layer, layer_scale=scale, scale_layer=Scale, drop_path=rate,
                arriving=arriving, leaving=leaving, **dd,
            )  # fmt: skip
            blocks.append(block)
            arriving = leaving
        stem = self.stem_layer(img_size, patch_size, in_chans, embed_dim, **dd)
        super().__init__(
            stem, blocks, norm=norm_layer(embed_dim, **dd), embed_dim=embed_dim, patch_size=patch_size,
            img_size=img_size, pos_embed=True, class_token=-1,
            num_classes=num_classes, in_chans=in_chans, global_pool=global_pool, drop_rate=drop_rate, **dd,
        )  # fmt: skip
        self.aux_head = self._new_head(num_classes) if "aux_head" in self.classifier else None
        self.phase = phase
        self.__dict__["teacher"] = None  # not a module of this one
        self.apply(init_weights)
        for name, parameter in self.named_parameters():
            parameter.requires_grad_((".predictor." in name) == (phase == "recon"))
        for block in blocks:
            block.mixer.reconstruct = phase == "recon"

    def _new_head(self, num_classes: int) -> nn.Module:
        return nn.Linear(self.num_features, num_classes, **self._placement()) if num_classes else nn.Identity()

    def reset_classifier(self, num_classes: int, global_pool: str | None = None, reset_other: bool = False) -> None:
        super().reset_classifier(num_classes, global_pool, reset_other)
        if self.aux_head is not None:
            self.aux_head = self._new_head(num_classes)
        for name, parameter in self.named_parameters():
            if name.startswith(("head.", "aux_head.")):
                parameter.requires_grad_(self.phase != "recon")

    def get_classifier(self) -> nn.Module | tuple[nn.Module, ...]:
        return self.head if self.aux_head is None else (self.head, self.aux_head)

    def adapt_state_dict(self, state_dict: dict[str, Tensor], made_for: Mapping[str, Any]) -> dict[str, Tensor]:
        """Leaves the predictors as they are where weights of the dense backbone are loaded, or where their bases, whose
        number follows the image size, are others; as many bases of another grid are resampled."""
        state_dict = super().adapt_state_dict(state_dict, made_for)
        if self.aux_head is not None and not self.num_classes:
            state_dict = {k: v for k, v in state_dict.items() if not k.startswith("aux_head.")}
        own = {k: v for k, v in self.state_dict().items() if ".predictor." in k}
        for k in own:
            table = state_dict.get(k)
            if k.endswith((".proj_n", ".proj_back_n")) and table is not None and table.shape[1:] == own[k].shape[1:]:
                grid = grid_of(len(table) - 1, self.patch_size, made_for.get("img_size"))
                if grid not in (None, self.grid_size):
                    state_dict[k] = resample_rows(table, grid, self.grid_size, prefix=1)
                    if k.endswith(".proj_n"):
                        state_dict[k] *= len(table) / len(own[k])  # the sum over tokens keeps its size
        same = any(".predictor." in k for k in state_dict) and all(
            k not in state_dict or state_dict[k].shape == v.shape for k, v in own.items()
        )
        return state_dict if same else state_dict | own

    def block_arguments(self, x: Tensor, grid: tuple[int, int]) -> tuple:
        """The grid; pruning leaves a part of it, a number that is the same at every size of the images in a graph."""
        if is_symbolic(*grid) and any(block.leaving < 1 for block in self.blocks):
            raise VisionattnError(
                f"{self.check.name} with pruned tokens (token_keep_rate, token_pruning_loc) has a graph that is right "
                f"at one image size only: export it with fixed height and width (the batch may be dynamic)"
            )
        return super().block_arguments(x, grid)

    def forward_features(self, x: Tensor) -> Tensor:
        """Image to normalised tokens (B, N, C), the class token first."""
        x = self.forward_tokens(x)
        tokens = self.norm(x)
        if self.training and self.teacher is not None:
            self._learned = tokens, self._split(x)[0].detach().ne(0).any(-1)
        return tokens

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Tokens to logits, or to pooled features with `pre_logits`."""
        out = super().forward_head(x, pre_logits)
        if pre_logits or self.aux_head is None or not self.num_classes or not self.global_pool:
            return out
        if self.training and self.teacher is not None:  # who teaches the auxiliary head
            return out
        return out + 0.5 * self.aux_head(self._split(x)[0]).amax(1)

    def learn_from(self, teacher: nn.Module) -> None:
        """Take a teacher, for `training_loss`. It is not a part of the model, nor trained, moved or saved with it.

        Args:
            teacher: the dense backbone, of this package or timm's.
        """
        if self.phase == "recon" and len(_projections(teacher)) != len(self.blocks):
            raise VisionattnError(
                f"{self.check.name} learns from a teacher with {len(self.blocks)} attention layers, "
                f"got {len(_projections(teacher))}"
            )
        if self.phase == "distill" and teacher.num_classes != self.num_classes:
            raise VisionattnError(
                f"{self.check.name} learns from a teacher of {self.num_classes} classes, got {teacher.num_classes}"
            )
        self.__dict__["teacher"] = teacher.eval().requires_grad_(False)

    def training_loss(self, loss: Tensor, images: Tensor, logits: Tensor, criterion: object = None) -> Tensor:
        """The published loss of the phase. "recon": squared errors of the predicted attention maps; "distill": the
        task's, and half each of the divergence from the teacher's logits and the squared error of the patches."""
        if self.teacher is None:
            if self.phase == "recon":
                raise VisionattnError(f"{self.check.name} in phase 'recon' learns from a teacher; it has none")
            return loss
        (tokens, alive), self._learned = self._learned, None
        qkv: list[Tensor] = []
        hooks = [m.register_forward_hook(lambda *args: qkv.append(args[2])) for m in _projections(self.teacher)]
        with torch.no_grad():
            taught = self.teacher.forward_features(images)
        for hook in hooks:
            hook.remove()
        if self.phase == "recon":
            pairs = zip(self.blocks, qkv, strict=True)
            errors = [_map_error(block.mixer, projected) for block, projected in pairs if block.training]  # not frozen
            return 0.01 * torch.stack(errors).mean()
        targets = F.log_softmax(self.teacher.head(taught[:, 0]).float(), 1)
        divergence = F.kl_div(F.log_softmax(logits.float(), 1), targets, reduction="batchmean", log_target=True)
        error = (_patch_outputs(self, tokens) - _patch_outputs(self.teacher, taught))[alive].square().mean()
        return loss + 0.5 * divergence + 0.5 * error


class SparsifinerLV(Sparsifiner):
    """Sparsifiner on LV-ViT: a convolutional stem, and a second head on the patches. Arguments as for `Sparsifiner`.

    The logits are those of the class token and half the largest of the patches', of each class; with a teacher, in
    training mode, those of the class token alone.
    """

    first_conv = "stem.conv1"
    classifier = ("head", "aux_head")
    stem_layer = ConvStem
    eps = 1e-5


def _projections(model: nn.Module) -> list[nn.Module]:
    return [module for name, module in model.named_modules() if name.endswith(".qkv")]


def _map_error(mixer: SparseAttention, qkv: Tensor) -> Tensor:
    """Sum of squares of what the predictor missed of the attention of the teacher, whose projections are given."""
    q, k, _ = qkv.float().unflatten(2, (3, mixer.num_heads, -1)).permute(2, 0, 3, 1, 4)
    attention = (q[:, :, 1:] @ k.transpose(-2, -1) * mixer.scale).softmax(-1)
    predicted, mixer.predicted = mixer.predicted, None
    return (predicted.float() - attention).square().sum()


def _patch_outputs(model: nn.Module, tokens: Tensor) -> Tensor:
    """What a model tells of its patches: their class logits if it has a head for them, or else their features."""
    head = getattr(model, "aux_head", None)
    return (tokens[:, 1:] if head is None else head(tokens[:, 1:])).float()


def _variant(kwargs: dict, gmacs: float, url: str, top1: float, model: type[nn.Module] = Sparsifiner) -> Variant:
    note = "the dense backbone, whose accuracy this is: the predictors are untrained"
    return Variant(kwargs, gmacs, {"dense_in1k": Weights((url,), None, top1, note=note)}, RECIPE, model=model)


RECIPE = {"drop_path_rate": 0.0, "recon_epochs": 5, "distill_epochs": 45, "ema": 0.9999}
DEIT = "https://dl.fbaipublicfiles.com/deit/deit_{}.pth"
LVVIT = "https://github.com/zihangJiang/TokenLabeling/releases/download/1.0/lvvit_{}.pth.tar"
LV = {"mlp_ratio": 3.0, "qkv_bias": False, "skip_lam": 2.0}
VARIANTS = {
    "sparsifiner_deit_small": _variant({}, 4.775, DEIT.format("small_patch16_224-cd65a155"), 79.8),
    "sparsifiner_deit_base": _variant(
        {"embed_dim": 768, "num_heads": 12}, 17.916, DEIT.format("base_patch16_224-b5f2ef4d"), 81.8
    ),
    "sparsifiner_lvvit_s": _variant(LV | {"depth": 16}, 6.786, LVVIT.format("s-26M-224-83.3"), 83.3, SparsifinerLV),
    "sparsifiner_lvvit_m": _variant(
        LV | {"embed_dim": 512, "depth": 20, "num_heads": 8}, 13.069, LVVIT.format("m-56M-224-84.0"), 84.0,
        SparsifinerLV,
    ),
    "test_sparsifiner": Variant(
        {"embed_dim": 64, "depth": 4, "num_heads": 4, "patch_size": 8, "img_size": 32, "reduce_n_factor": 3}, 0.003865,
        img_size=32,
    ),
}  # fmt: skip
FAMILY = Family(
    "sparsifiner",
    (("Sparsifiner: Learning Sparse Instance-Dependent Attention for Efficient Vision Transformers", "2303.13755"),),
    "https://github.com/lim142857/Sparsifiner",
    "mit",
)
register_family(FAMILY, Sparsifiner, VARIANTS)
