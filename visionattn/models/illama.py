"""iLLaMA: a plain vision transformer made of LLaMA's parts.

"Adapting LLaMA Decoder to Vision Transformer", arXiv 2404.06773. Causal attention with rotary positions, SwiGLU and
RMSNorm; the class token comes last, where it sees every patch.
"""

from collections.abc import Callable
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from timm.layers import DropPath, PatchEmbed, calculate_drop_path_rates
from torch import Tensor, nn

from ..backbone import Isotropic
from ..layers import CausalSelfAttention
from ..layers.block import Block
from ..layers.causal_attention import causal_halves, rotary_table
from ..layers.direct import is_direct, is_watched
from ..layers.init import init_weights
from ..layers.pointwise import Pointwise
from ..layers.rms_norm import RmsNorm
from ..registry import Family, Variant, Weights, register_family

RULES = [
    (r"^pos_embed$", "pos_embed.weight"),
    (r"^patch_embed\.", "stem."),
    (r"\.attn\.", ".mixer."),
]
RMS_NORM = partial(RmsNorm, eps=1e-6)


class SwiGlu(nn.Module):  # as timm's SwiGLU, whose parameters have other names, and whose products are not Pointwise
    """fc2(silu(fc1(x)) * fc3(x)) without biases: (..., C) to (..., C).

    Args:
        dim: channels C.
        hidden_dim: channels between of an ungated MLP; of these, two thirds are used, rounded up to a multiple of 256.
    """

    def __init__(self, dim: int, hidden_dim: float, device=None, dtype=None) -> None:
        super().__init__()
        dd = {"bias": False, "device": device, "dtype": dtype}
        hidden = 256 * -(-int(2 * hidden_dim / 3) // 256)
        self.fc1 = Pointwise(dim, hidden, **dd)
        self.fc2 = Pointwise(hidden, dim, **dd)
        self.fc3 = Pointwise(dim, hidden, **dd)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(_gated(self, self.fc1(x), self.fc3(x)))


@torch.fx.wrap
def _gated(mlp: SwiGlu, gate: Tensor, value: Tensor) -> Tensor:
    if torch.is_grad_enabled() or not is_direct(gate, value) or is_watched(mlp.fc1, mlp.fc3):
        return F.silu(gate) * value
    return F.silu(gate, inplace=True).mul_(value)


@torch.fx.wrap
def _tables(x: Tensor, head_dim: int) -> tuple[tuple[Tensor, Tensor] | None, Tensor | None]:
    """What all blocks share on a sequence (B, N, C): the rotary table and the halves of the causal mask. Both None
    where blocks have what they need at hand."""
    if is_direct(x):
        return None, None
    length, dtype = x.shape[1], torch.promote_types(x.dtype, torch.float32)
    return rotary_table(length, head_dim, x.device, dtype), causal_halves(length, x.device)


class ILLaMA(Isotropic):
    """iLLaMA.

    Args:
        in_chans: channels of the image.
        num_classes: classes of the head, 0 for none.
        global_pool: "token" (the class token), "avg", "max", "avgmax" or "".
        img_size: image size in pixels that the position embedding is made for.
        patch_size: side of a patch in pixels.
        embed_dim: channels.
        depth: blocks.
        num_heads: attention heads.
        mlp_ratio: hidden channels of an ungated MLP of the same cost, per channel.
        qkv_bias: bias of the query, key and value projections.
        qk_scale: factor of the attention logits, head_dim**-0.5 if None.
        drop_rate: dropout rate after the position embedding, the only dropout of features.
        attn_drop_rate: dropout rate of the attention weights.
        drop_path_rate: stochastic depth rate of the last block; it grows linearly from 0.
        norm_layer: makes a norm over the channels.
        soft_mask_rate: factor on the attention weights of later tokens; 0 is causal, 1 bidirectional.
        soft_mask_epochs: epochs, at the start of training, of a rate of its own; the published recipes have 25 or 50.
        soft_mask_schedule: in these epochs the rate is 1 ("constant"), or falls from 1 to 0 ("linear").
    """

    layouts = {"official": RULES}

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "token",
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        embed_dim: int = 192,
        depth: int = 12,
        num_heads: int = 3,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = False,
        qk_scale: float | None = None,
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        norm_layer: Callable[..., nn.Module] = RMS_NORM,
        soft_mask_rate: float = 0.0,
        soft_mask_epochs: float = 0.0,
        soft_mask_schedule: Literal["constant", "linear"] = "linear",
        device=None,
        dtype=None,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        blocks = [
            Block(
                embed_dim,
                CausalSelfAttention(embed_dim, num_heads, qkv_bias, qk_scale, attn_drop=attn_drop_rate, **dd),
                SwiGlu(embed_dim, embed_dim * mlp_ratio, **dd),
                norm_layer=norm_layer,
                drop_path=rate,
                **dd,
            )
            for rate in calculate_drop_path_rates(drop_path_rate, depth)
        ]
        super().__init__(
            PatchEmbed(img_size, patch_size, in_chans, embed_dim, strict_img_size=False, **dd), blocks,
            norm=norm_layer(embed_dim, **dd), embed_dim=embed_dim, patch_size=patch_size, img_size=img_size,
            pos_embed=True, class_token=-1, class_token_last=True,
            num_classes=num_classes, in_chans=in_chans, global_pool=global_pool, drop_rate=drop_rate, **dd,
        )  # fmt: skip
        self.head_drop = nn.Identity()
        self.head_dim = embed_dim // num_heads
        self.soft_mask_rate = soft_mask_rate
        self.soft_mask_epochs, self.soft_mask_schedule = soft_mask_epochs, soft_mask_schedule
        self.advance(0.0)
        self.apply(init_weights)

    def block_arguments(self, x: Tensor, grid: tuple[int, int]) -> tuple:
        rotary, mask = (_tables(x, self.head_dim)[i] for i in range(2))  # which tracers cannot unpack
        return rotary, mask

    def forward(self, x: Tensor) -> Tensor:
        """Image to what the head returns. Of the last block's tokens a head on the class token needs that one alone."""
        block = self.blocks[-1]
        plain = self.global_pool != "token" or self.grad_checkpointing or not is_direct(x)
        if plain or is_watched(*block.modules(), self.norm) or type(block.mixer.qkv) is not Pointwise:
            return super().forward(x)
        x, grid = self._embed(x)
        arguments = self.block_arguments(x, grid)
        for i in range(len(self.blocks) - 1):
            x = self._run(i, x, *arguments)
        token = x[:, -1:] + block.drop_path1(block.mixer.last(block.norm1(x)))
        token = token + block.drop_path2(block.mlp(block.norm2(token)))
        return self.forward_head(self.norm(token))

    def _run(self, block: int, x: Tensor, rotary: tuple[Tensor, Tensor], mask: Tensor) -> Tensor:
        scheduled = self.blocks[block].training and self.soft_mask_epochs  # not where the block is frozen
        return super()._run(block, x, rotary, self.scheduled_rate if scheduled else self.soft_mask_rate, mask)

    def advance(self, epoch: float) -> None:
        """Set the soft mask of training mode. In evaluation mode it stays `soft_mask_rate`, as in what is saved."""
        left = max(0.0, 1 - epoch / self.soft_mask_epochs) if self.soft_mask_epochs else 0.0
        self.scheduled_rate = left if self.soft_mask_schedule == "linear" else float(left > 0)

    def update_soft_mask(self, rate: float) -> None:
        """Set the soft mask of both modes, and leave the schedule."""
        self.soft_mask_rate, self.soft_mask_epochs = rate, 0.0

    def update_drop_path(self, rate: float) -> None:
        """Spread another stochastic depth rate over the blocks; without effect where the model was made with rate 0."""
        for block, drop in zip(self.blocks, calculate_drop_path_rates(rate, len(self.blocks)), strict=True):
            for module in block.modules():
                if isinstance(module, DropPath):
                    module.drop_prob = drop

    def update_dropout(self, rate: float) -> None:
        """Set the dropout rate after the position embedding."""
        self.pos_drop.p = rate


def _weights(tag: str, file: str, top1: float, size: int = 224) -> dict[str, Weights]:
    url = f"https://huggingface.co/techmonsterwang/iLLaMA/resolve/main/illama-{file}-{top1}.pth?download=true"
    # At 384 the image is resized whole, whatever its aspect.
    crop = {"crop_pct": 1.0, "cfg": {"crop_mode": "squash"}} if size == 384 else {}
    return {tag: Weights((url,), None, top1, size, **crop)}


def _variant(dim: int, depth: int, gmacs: float, weights: dict[str, Weights], size: int = 224, **recipe) -> Variant:
    kwargs = {"embed_dim": dim, "depth": depth, "num_heads": dim // 64, "qkv_bias": True, "img_size": size}
    return Variant(kwargs, gmacs, weights, recipe, size)


IN21K = "in21k_ft_in1k"
VARIANTS = {
    "illama_tiny": _variant(
        192, 12, 1.254, _weights("in1k", "tiny-in1k", 75.0),
        drop_path_rate=0.0, soft_mask_schedule="constant", soft_mask_epochs=50, mixup=0.1, cutmix=0.1,
    ),
    "illama_small": _variant(
        384, 12, 4.599, _weights("in1k", "small-in1k", 79.9),
        drop_path_rate=0.1, soft_mask_schedule="linear", soft_mask_epochs=50, mixup=0.5, cutmix=0.5,
    ),
    "illama_base": _variant(
        768, 12, 17.564, _weights("in1k", "base-in1k", 81.6) | _weights(IN21K, "base-in21kin1k-224", 83.6),
        drop_path_rate=0.4, soft_mask_schedule="linear", soft_mask_epochs=25, mixup=0.95, cutmix=1.0,
    ),
    "illama_base_384": _variant(
        768, 12, 55.484,
        _weights("in1k", "base-in1k-384", 83.0, 384) | _weights(IN21K, "base-in21kin1k-384", 85.0, 384),
        384, drop_path_rate=0.8,
    ),
    "illama_large": _variant(
        1024, 24, 62.794, _weights(IN21K, "large-in21kin1k-224", 84.8), drop_path_rate=0.3
    ),
    "illama_large_384": _variant(
        1024, 24, 194.696, _weights(IN21K, "large-in21kin1k-384", 86.0, 384), 384, drop_path_rate=0.3
    ),
    "test_illama": Variant(
        {"embed_dim": 64, "depth": 4, "num_heads": 4, "qkv_bias": True, "patch_size": 8, "img_size": 32}, 0.004865,
        img_size=32,
    ),
}  # fmt: skip
FAMILY = Family(
    "illama",
    (("Adapting LLaMA Decoder to Vision Transformer", "2404.06773"),),
    "https://github.com/techmonsterwang/iLLaMA",
    "none stated",
)
register_family(FAMILY, ILLaMA, VARIANTS)
