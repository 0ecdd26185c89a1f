"""HaloNet: residual bottlenecks with halo attention in place of (some of) their convolutions.

"Scaling Local Self-Attention for Parameter Efficient Visual Backbones", arXiv 2103.12731. The trained models and the
layer's details are timm's, on the layouts of its ResNets and RegNets; `halonet_h0` to `halonet_h7` are the paper's.
"""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate
from operator import mul

from timm.layers import DropPath, EcaModule, SEModule, calculate_drop_path_rates, make_divisible, to_ntuple
from torch import Tensor, nn

from ..backbone import Hierarchical, Stage, check_lengths
from ..errors import VisionattnError
from ..layers import HaloAttention2d
from ..layers.conv_norm import ConvNorm, product_norm
from ..layers.covariance_norm import is_summed, normed_sum, with_every
from ..layers.init import by_fan_out, init_weights
from ..layers.layout import channels_last
from ..layers.pointwise import Pointwise, Pointwise2d
from ..registry import Family, Variant, Weights, register_family

RULES = [
    (r"^stem\.(conv|bn)\.", r"stem.0.\1."),
    (r"^stem\.conv(\d)\.", lambda m: f"stem.{2 * int(m[1]) - 2}."),
    (r"^stages\.(\d+)\.(\d+)\.", r"stages.\1.blocks.\2."),
    (r"^final_conv\.conv\.", "norm.0."),
    (r"^final_conv\.bn\.", "norm.1."),
    (r"^head\.fc\.", "head."),
    (r"\.conv2_kxk\.conv\.", ".mixer."),
    (r"\.self_attn\.(pos_embed\.)?", ".mixer."),
    (r"\.post_attn\.", ".norm2."),
    (r"\.conv(\d)_\w+\.conv\.", r".conv\1."),
    (r"\.conv(\d)_\w+\.bn\.", r".norm\1."),
    (r"\.attn\.", ".gate."),
    (r"(^stem\.\d|\.shortcut)\.conv\.", r"\1.proj."),
    (r"(^stem\.\d|\.shortcut)\.bn\.", r"\1.norm."),
    # 1 x 1 convolutions are kept as linear maps.
    (r"(^norm\.0|\.conv[13]|\.mixer\.kv|\.mixer\.q)\.weight$", r"\1.weight", lambda weight: weight.flatten(1)),
]
ACTIVATIONS = {"relu": partial(nn.ReLU, inplace=True), "silu": partial(nn.SiLU, inplace=True)}


class Bottleneck(nn.Module):
    """Pointwise reduction, a mixer of positions, pointwise expansion, and the shortcut.

    Args:
        in_chans: channels in.
        dim: channels out.
        hidden_dim: channels between, in.
        mixer: of `hidden_dim` channels.
        mixer_dim: channels the mixer makes.
        gate: channel attention after the mixer.
        stride: of the mixer.
        downsample: shortcut by convolution where the shape changes, instead of none.
        linear_out: no activation after the shortcut.
        act_layer: activation.
        drop_path: probability of dropping the branch of a sample.

    Shape:
        (B, H, W, C_in) to (B, ceil(H / stride), ceil(W / stride), C).
    """

    fused_pairs = (("conv1", "norm1"), ("mixer", "norm2"), ("conv3", "norm3"))

    def __init__(
        self, in_chans: int, dim: int, hidden_dim: int, mixer: nn.Module, mixer_dim: int, *, gate: nn.Module | None,
        stride: int, downsample: bool, linear_out: bool, act_layer: Callable[[], nn.Module], drop_path: float,
        device=None, dtype=None,
    ) -> None:  # fmt: skip
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.shortcut = None
        if in_chans == dim and stride == 1:
            self.shortcut = nn.Identity()
        elif downsample:
            self.shortcut = ConvNorm(in_chans, dim, 1, stride, **dd)
        self.conv1 = Pointwise2d(in_chans, hidden_dim, bias=False, **dd)
        self.norm1 = nn.BatchNorm2d(hidden_dim, **dd)
        self.act1 = act_layer()
        self.mixer = mixer
        self.norm2 = nn.BatchNorm2d(mixer_dim, **dd)
        self.act2 = act_layer()
        self.gate = gate or nn.Identity()
        self.conv3 = Pointwise2d(mixer_dim, dim, bias=False, **dd)
        self.norm3 = nn.BatchNorm2d(dim, **dd)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()
        self.act3 = nn.Identity() if linear_out else act_layer()

    @channels_last
    def forward(self, x: Tensor) -> Tensor:
        projects, every = type(self.shortcut) is ConvNorm, x
        products = [self.conv3, self.shortcut.proj] if projects else [self.conv3]
        known = projects or self.shortcut is None or type(self.shortcut) is nn.Identity
        direct = known and is_summed(x, products, self.conv3, self.norm3, self.drop_path, self.act3, self.shortcut)
        if direct and projects:
            x, every = with_every(x, self.shortcut.proj.stride[0])
        y = product_norm(self.conv1, self.norm1, x, self.act1)
        y = self.gate(product_norm(self.mixer, self.norm2, y, self.act2))
        if direct:
            terms = [(self.conv3, self.norm3, y)]
            if projects:
                terms.append((self.shortcut.proj, self.shortcut.norm, every))
            return normed_sum(terms, every if isinstance(self.shortcut, nn.Identity) else None, self.act3)
        y = self.drop_path(product_norm(self.conv3, self.norm3, y))
        if self.shortcut is not None:
            y = y.add_(self.shortcut(x))  # no gradient needs what the norm returned
        return self.act3(y)


def _stem(kind: str, in_chans: int, dim: int, pool: bool, act_layer: Callable, **dd) -> nn.Sequential:
    """Strided convolutions with batch norm and activation, and max pooling: to a half or a quarter of the size."""
    if kind == "tiered":
        widths, strides, kernel_size = (in_chans, 3 * dim // 8, dim // 2, dim), (2, 1, 1 if pool else 2), 3
    else:
        widths, strides, kernel_size = (in_chans, dim), (2,), int(kind[0])
    layers = []
    for i, stride in enumerate(strides):
        layers += [ConvNorm(widths[i], widths[i + 1], kernel_size, stride, **dd), act_layer()]
    if pool:
        layers.append(nn.MaxPool2d(3, 2, 1))
    return nn.Sequential(*layers)


def _init_weights(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d | Pointwise):
        init_weights(module, nn.Conv2d | Pointwise, by_fan_out(module))
    else:
        init_weights(module, draw=partial(nn.init.normal_, std=0.01))
    if isinstance(module, Bottleneck) and module.shortcut is not None:
        nn.init.zeros_(module.norm3.weight)


class HaloNet(Hierarchical):
    """HaloNet and its hybrids with convolutions.

    Args:
        layout: for each stage a string with a letter for each block: "c" convolution, "h" halo attention.
        channels: of each stage.
        strides: of the first block of each stage.
        bottle_ratio: hidden channels of a block per channel out, of each stage.
        stem: "tiered" (three 3 x 3 convolutions), "7x7" or "3x3".
        stem_chs: channels of the stem.
        stem_pool: end the stem with max pooling; without it, the last of the "tiered" convolutions is strided instead.
        act_layer: "relu" or "silu".
        block_size: side of the blocks of halo attention.
        halo_size: width of the halo.
        num_heads: attention heads of each stage; one number for all, as of `bottle_ratio`.
        dim_head: query and key channels of a head; by `qk_ratio` if None.
        qk_ratio: query and key channels per hidden channel.
        value_ratio: channels that attention makes per hidden channel.
        channel_attn: in the convolution blocks, "se" (squeeze and excitation), "eca" or None.
        se_ratio: hidden channels of squeeze and excitation per channel.
        group_size: channels of a group of the 3 x 3 convolutions, 0 for one group.
        num_features: channels of a pointwise convolution after the last stage, 0 for none.
        downsample: "conv1x1", the shortcut of blocks that change the shape, or None for none.
        bottle_in: `bottle_ratio` counts per channel in.
        linear_out: no activation after the blocks.
        mask: "pad", or "all" to mask every key outside the map (for training from scratch).
        num_classes: classes of the head, 0 for none.
        in_chans: channels of the image.
        global_pool: pooling before the head.
        drop_rate: dropout rate before the head.
        drop_path_rate: stochastic depth rate of the last block; it grows linearly from 0.

    Raises:
        VisionattnError: if `stem`, `act_layer`, `channel_attn`, `downsample` or a letter of `layout` is unknown, or
            numbers of stages differ.
    """

    layouts = {"timm": RULES}
    first_conv = "stem.0.proj"

    def __init__(
        self,
        layout: Sequence[str] = ("cc", "cc", "ch", "hh"),
        channels: Sequence[int] = (256, 512, 1024, 2048),
        strides: Sequence[int] = (1, 2, 2, 2),
        bottle_ratio: float | Sequence[float] = 0.25,
        stem: str = "tiered",
        stem_chs: int = 64,
        stem_pool: bool = True,
        act_layer: str = "relu",
        block_size: int = 8,
        halo_size: int = 2,
        num_heads: int | Sequence[int] = 8,
        dim_head: int | None = None,
        qk_ratio: float = 1.0,
        value_ratio: float = 1.0,
        channel_attn: str | None = None,
        se_ratio: float | None = None,
        group_size: int = 0,
        num_features: int = 0,
        downsample: str | None = "conv1x1",
        bottle_in: bool = False,
        linear_out: bool = False,
        mask: str = "pad",
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device=None,
        dtype=None,
    ) -> None:
        for name, value, accepted in (
            *(("letters of layout", letter, ("c", "h")) for letter in "".join(layout)),
            ("stem", stem, ("tiered", "7x7", "3x3")),
            ("act_layer", act_layer, tuple(ACTIVATIONS)),
            ("channel_attn", channel_attn, ("se", "eca", None)),
            ("downsample", downsample, ("conv1x1", None)),
        ):
            if value not in accepted:
                raise VisionattnError(f"expected {name} one of {', '.join(map(repr, accepted))}, got {value!r}")
        each, dd = to_ntuple(len(layout)), {"device": device, "dtype": dtype}
        per_stage = {"channels": channels, "strides": strides}
        per_stage |= {"bottle_ratio": each(bottle_ratio), "num_heads": each(num_heads)}
        check_lengths(layout=layout, **per_stage)
        act = ACTIVATIONS[act_layer]

        def block(letter: str, width: int, dim: int, hidden: int, stride: int, heads: int, rate: float) -> Bottleneck:
            mixed, gate = int(value_ratio * hidden) if letter == "h" else hidden, None
            if letter == "h":
                mixer = HaloAttention2d(
                    hidden, mixed, stride, num_heads=heads, block_size=block_size, halo_size=halo_size, mask=mask,
                    dim_head=hidden // heads if dim_head is None and value_ratio != 1 else dim_head, qk_ratio=qk_ratio,
                    **dd,
                )  # fmt: skip
            else:
                if channel_attn == "se":
                    gate = SEModule(hidden, se_ratio or 1 / 16, rd_divisor=8, **dd)
                elif channel_attn == "eca":
                    gate = EcaModule(hidden, **dd)
                groups = hidden // group_size if group_size else 1
                mixer = nn.Conv2d(hidden, hidden, 3, stride, 1, groups=groups, bias=False, **dd)
            return Bottleneck(
                width, dim, hidden, mixer, mixed, gate=gate, stride=stride, downsample=downsample is not None,
                linear_out=linear_out, act_layer=act, drop_path=rate, **dd,
            )  # fmt: skip

        rates = calculate_drop_path_rates(drop_path_rate, [len(letters) for letters in layout], stagewise=True)
        stages, width = [], stem_chs
        for letters, dim, stride, ratio, heads, drop_paths in zip(layout, *per_stage.values(), rates, strict=True):
            blocks = []
            for letter, drop_path in zip(letters, drop_paths, strict=True):
                hidden = make_divisible(ratio * (width if bottle_in else dim))
                blocks.append(block(letter, width, dim, hidden, stride, heads, drop_path))
                width, stride = dim, 1
            stages.append(Stage(blocks, dim, in_slices=False))
        final = None
        if num_features:
            product = Pointwise2d(width, num_features, bias=False, **dd)
            final = nn.Sequential(product, nn.BatchNorm2d(num_features, **dd), act())
        reductions = list(accumulate(strides, mul, initial=4 if stem_pool or stem == "tiered" else 2))[1:]
        super().__init__(
            _stem(stem, in_chans, stem_chs, stem_pool, act, **dd), stages, norm=final, reductions=reductions,
            num_features=num_features or None,
            num_classes=num_classes, in_chans=in_chans, global_pool=global_pool, drop_rate=drop_rate, **dd,
        )  # fmt: skip
        self.apply(_init_weights)
        for module in self.modules():
            if isinstance(module, HaloAttention2d):
                module.reset_parameters()

    def resize_window(self, block_size: int, halo_size: int) -> None:
        """Give all attention layers another window, as `HaloAttention2d.resize`; for fine-tuning."""
        for module in self.modules():
            if isinstance(module, HaloAttention2d):
                module.resize(block_size, halo_size)


def _trained(file: str, hub: str, top1: float, size: int = 256, crop_pct: float = 0.94, **cfg) -> dict[str, Weights]:
    base = "https://github.com/rwightman/pytorch-image-models/releases/download/v0.1-attn-weights"
    weights = Weights((f"{base}/{file}.pth",), f"timm/{hub}", top1, size, crop_pct, cfg=cfg)
    return {hub.split(".")[1]: weights}


def _unreleased(size: int, top1: float | None = None) -> dict[str, Weights]:
    return {"in1k": Weights(top1=top1, img_size=size, crop_pct=0.95, note="not released")}


def _paper(
    blocks: int, expansion: float, value_ratio: float, block_size: int, halo_size: int, num_features: int,
    gmacs: float, size: int, top1: float, randaugment: int,
) -> Variant:  # fmt: skip
    """A model of the paper: `blocks` in the third stage, blocks `expansion` times as wide outside as inside."""
    kwargs = H | {
        "layout": ("hhh", "hhh", "h" * blocks, "hhh"), "channels": tuple(int(expansion * dim) for dim in H["channels"]),
        "bottle_ratio": 1 / expansion, "act_layer": "silu", "block_size": block_size, "halo_size": halo_size,
        "num_heads": (4, 8, 8, 8), "value_ratio": value_ratio, "num_features": num_features,
    }  # fmt: skip
    return Variant(kwargs, gmacs, _unreleased(size, top1), PAPER_RECIPE | {"randaugment": randaugment}, size)


H = {
    "layout": ("hhh", "hhh", "h" * 10, "hhh"), "channels": (64, 128, 256, 512), "bottle_ratio": 1.0, "stem": "7x7",
    "halo_size": 3,
}  # fmt: skip
PAPER_RECIPE = {"epochs": 350, "optimizer": "sgd", "batch_size": 4096, "lr": 1.6, "weight_decay": 2e-5}
HALF = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
VARIANTS = {
    "halonet26t": Variant(
        {}, 3.173, _trained("halonet26t_a1h_256-3083328c", "halonet26t.a1h_in1k", 79.134, crop_pct=0.95),
        {"optimizer": "lamb"}, 256,
    ),
    "halonet50ts": Variant(
        {"layout": ("ccc", "ccch", "chchch", "chc"), "act_layer": "silu", "halo_size": 3, "num_heads": (8, 4, 8, 8)},
        5.270, _trained("halonet50ts_a1h2_256-f3a3daee", "halonet50ts.a1h_in1k", 81.640), {"optimizer": "lamb"}, 256,
    ),
    "sehalonet33ts": Variant(
        {
            "layout": ("cc", "cch", "cch", "hh"), "channels": (256, 512, 1024, 1536), "stem_pool": False,
            "bottle_ratio": (0.25, 0.25, 0.25, 0.333), "act_layer": "silu", "halo_size": 3, "channel_attn": "se",
            "se_ratio": 1 / 16, "num_features": 1280,
        },
        3.530, _trained("sehalonet33ts_256-87e053f9", "sehalonet33ts.ra2_in1k", 80.976), {"optimizer": "rmsprop"}, 256,
    ),
    "eca_halonext26ts": Variant(
        {"act_layer": "silu", "dim_head": 16, "channel_attn": "eca", "group_size": 16}, 2.420,
        _trained("eca_halonext26ts_c_256-06906299", "eca_halonext26ts.c1_in1k", 79.518), {"optimizer": "sgd"}, 256,
    ),
    "haloregnetz_b": Variant(
        {
            "layout": ("cc", "c" * 6, "ccch" * 3, "hh"), "channels": (48, 96, 192, 288), "strides": (2, 2, 2, 2),
            "bottle_ratio": 3.0, "bottle_in": True, "stem": "3x3", "stem_chs": 32, "stem_pool": False,
            "act_layer": "silu", "block_size": 7, "qk_ratio": 0.33, "channel_attn": "se", "se_ratio": 0.25,
            "group_size": 16, "num_features": 1536, "downsample": None, "linear_out": True,
        },
        1.951, _trained("haloregnetz_c_raa_256-c8ad7616", "haloregnetz_b.ra3_in1k", 81.058, 224, **HALF),
        {"optimizer": "rmsprop"},
    ),
    "halonet_h0": _paper(7, 0.5, 1, 8, 3, 0, 2.353, 256, 77.9, 6),
    # As timm has it: the paper's H1 has SiLU and 4 heads in the first stage.
    "halonet_h1": Variant(H, 2.988, _unreleased(256), img_size=256),
    "halonet_h2": _paper(11, 1.25, 1, 8, 3, 0, 3.313, 256, 80.4, 10),
    "halonet_h3": _paper(12, 1.5, 1, 10, 3, 1024, 6.180, 320, 81.9, 14),
    "halonet_h4": _paper(12, 3, 1, 12, 2, 1280, 11.998, 384, 83.3, 17),
    "halonet_h5": _paper(23, 2, 2.5, 14, 2, 1536, 32.246, 448, 84.0, 19),
    "halonet_h6": _paper(24, 2.75, 3, 8, 4, 1536, 52.787, 512, 84.4, 24),
    "halonet_h7": _paper(26, 3.5, 4, 10, 3, 2048, 111.017, 600, 84.9, 31),
    "test_halonet": Variant(
        {
            "layout": ("ch", "hc", "h", "h"), "channels": (32, 48, 64, 128), "stem_chs": 16, "act_layer": "silu",
            "block_size": 4, "halo_size": 1, "num_heads": 2, "channel_attn": "se", "se_ratio": 0.25, "num_features": 96,
        },
        0.001024, img_size=32,
    ),
}  # fmt: skip
FAMILY = Family(
    "halonet",
    (("Scaling Local Self-Attention for Parameter Efficient Visual Backbones", "2103.12731"),),
    "https://github.com/huggingface/pytorch-image-models",
    "apache-2.0",
)
register_family(FAMILY, HaloNet, VARIANTS)
