"""ConViT: a vision transformer with gated positional self-attention.

"ConViT: Improving Vision Transformers with Soft Convolutional Inductive Biases", arXiv 2103.10697.
"""

from functools import partial

from timm.layers import PatchEmbed, calculate_drop_path_rates
from torch import nn

from ..backbone import Isotropic
from ..errors import VisionattnError
from ..layers import GatedPositionalSelfAttention, SelfAttention
from ..layers.block import Block
from ..layers.init import init_weights
from ..layers.pointwise import Mlp
from ..registry import Family, Variant, Weights, register_family

# The official layout and timm's are the same.
RULES = [
    (r"^pos_embed$", "pos_embed.weight"),
    (r"^patch_embed\.", "stem."),
    (r"^.*\.attn\.rel_indices$", ""),
    (r"\.attn\.", ".mixer."),
]


class ConViT(Isotropic):
    """ConViT.

    Args:
        in_chans: channels of the image.
        num_classes: classes of the head, 0 for none.
        global_pool: "token" (the class token), "avg", "max", "avgmax" or "".
        img_size: image size in pixels that the position embedding is made for.
        patch_size: side of a patch in pixels.
        embed_dim: channels, of all heads together.
        depth: blocks.
        num_heads: attention heads.
        mlp_ratio: hidden channels of the MLP per channel.
        qkv_bias: bias of the query, key and value projections.
        qk_scale: factor of the attention logits, head_dim**-0.5 if None.
        drop_rate: dropout rate of the position embedding, MLPs, attention outputs and head.
        attn_drop_rate: dropout rate of the attention weights.
        drop_path_rate: stochastic depth rate of the last block; it grows linearly from 0.
        local_up_to_layer: number of leading blocks with gated positional attention; the class token joins after them.
        locality_strength: how concentrated the initial positional attention is.
        use_pos_embed: add a learned position embedding to the patches.

    Raises:
        VisionattnError: if `local_up_to_layer` leaves no block for the class token.
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
        num_heads: int = 4,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = False,
        qk_scale: float | None = None,
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        local_up_to_layer: int = 10,
        locality_strength: float = 1.0,
        use_pos_embed: bool = True,
        device=None,
        dtype=None,
    ) -> None:
        if not 0 <= local_up_to_layer < depth:
            raise VisionattnError(f"expected 0 <= local_up_to_layer < depth {depth}, got {local_up_to_layer}")
        dd = {"device": device, "dtype": dtype}
        norm_layer = partial(nn.LayerNorm, eps=1e-6)
        gated = partial(GatedPositionalSelfAttention, locality_strength=locality_strength)
        blocks = [
            Block(
                embed_dim,
                (gated if i < local_up_to_layer else SelfAttention)(
                    embed_dim,
                    num_heads,
                    qkv_bias=qkv_bias,
                    qk_scale=qk_scale,
                    attn_drop=attn_drop_rate,
                    proj_drop=drop_rate,
                    **dd,
                ),
                Mlp(embed_dim, int(embed_dim * mlp_ratio), drop=drop_rate, **dd),
                norm_layer=norm_layer,
                drop_path=rate,
                **dd,
            )
            for i, rate in enumerate(calculate_drop_path_rates(drop_path_rate, depth))
        ]
        super().__init__(
            PatchEmbed(img_size, patch_size, in_chans, embed_dim, strict_img_size=False, **dd), blocks,
            norm=norm_layer(embed_dim, **dd), embed_dim=embed_dim, patch_size=patch_size, img_size=img_size,
            pos_embed=use_pos_embed, class_token=local_up_to_layer,
            num_classes=num_classes, in_chans=in_chans, global_pool=global_pool, drop_rate=drop_rate, **dd,
        )  # fmt: skip
        self.apply(init_weights)
        for block in blocks[:local_up_to_layer]:
            if block.mixer.use_local_init:
                block.mixer.local_init()


def _variant(dim: int, heads: int, gmacs: float, top1: float, name: str = "") -> Variant:
    weights = Weights(
        (f"https://dl.fbaipublicfiles.com/convit/{name}.pth",) if name else (),
        f"timm/{name}.fb_in1k" if name else None,
        top1,
        note="" if name else "not released",
    )
    return Variant({"embed_dim": dim * heads, "num_heads": heads}, gmacs, {"fb_in1k": weights}, {"drop_path_rate": 0.1})


VARIANTS = {
    "convit_tiny": _variant(48, 4, 1.252, 73.1, name="convit_tiny"),
    "convit_tiny_plus": _variant(64, 4, 2.131, 76.7),
    "convit_small": _variant(48, 9, 5.747, 81.3, name="convit_small"),
    "convit_small_plus": _variant(64, 9, 10.002, 82.2),
    "convit_base": _variant(48, 16, 17.505, 82.4, name="convit_base"),
    "convit_base_plus": _variant(64, 16, 30.740, 82.5),
    "test_convit": Variant(
        {"embed_dim": 64, "num_heads": 4, "depth": 4, "local_up_to_layer": 3, "patch_size": 8, "img_size": 32},
        0.0036,
        img_size=32,
    ),
}
FAMILY = Family(
    "convit",
    (("ConViT: Improving Vision Transformers with Soft Convolutional Inductive Biases", "2103.10697"),),
    "https://github.com/facebookresearch/convit",
    "apache-2.0",
)
register_family(FAMILY, ConViT, VARIANTS)
