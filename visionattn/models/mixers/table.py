"""Every token mixer by name."""

import fnmatch
from difflib import get_close_matches

from ... import layers
from ...errors import UnknownModelError
from . import choices
from .blocks import DepthwiseMixer, NoMixer, PatchSparseAttention, SoftCausalAttention
from .entry import Mixer

VIT = "2010.11929"
ACTIVATOR = "2405.15953"
POLARIZED = "2107.00782"
ULSAM = "2006.15102"
REDUCED = "2403.01643"
GQA = "2408.08454"
PATNET = "2503.03148"
WHOLE_BATCH = {"per_sample": False}
BATCH_NORM = "has batch norms"

MIXERS: dict[str, Mixer] = {
    "softmax": Mixer(choices.heads(layers.SelfAttention, qkv_bias=True), "tokens", VIT, remark="control"),
    "none": Mixer(lambda at: (NoMixer, {}), "tokens", remark="control: mixes nothing"),
    "activator": Mixer(
        lambda at: (choices.doubled(layers.ActivatorGate, "hidden_dim"), {}),
        "tokens",
        ACTIVATOR,
        remark="control: mixes nothing",
    ),
    "dw7": Mixer(lambda at: (DepthwiseMixer, {}), "map", remark="control: local; host of the gates"),
    "flow": Mixer(
        choices.heads(layers.FlowAttention),
        "tokens",
        "2202.06258",
    ),
    "log_normal": Mixer(
        choices.heads(layers.LinearLogNormalAttention, per_sample=True),
        "tokens",
        "2311.13541",
        variants={"as published, by the whole batch": WHOLE_BATCH},
        remark="statistics per sample",
    ),
    "norm_aware": Mixer(
        choices.heads(layers.NormAwareLinearAttention),
        "map",
        "2506.21137",
        variants={"without positions of its own": {"lepe": False, "rotary": False}},
        remark="brings rotary positions and a 5 x 5 convolution",
    ),
    "mixer_gate": Mixer(
        lambda at: (choices.doubled(layers.MixerGate, "token_dim", "channel_dim"), {"num_tokens": at.num_tokens}),
        "tokens",
        "2403.02411",
        everywhere=False,
        fixed=True,
        resize=choices.resize_gate,
    ),
    "super": Mixer(
        lambda at: (
            layers.ReducedAttention,
            {"num_heads": at.num_heads, "kind": "super", "num_tokens": at.num_tokens},
        ),
        "tokens",
        REDUCED,
        everywhere=False,
        fixed=True,
        resize=choices.resize_alignment,
        init="token matrix: identity and truncated normal",
    ),
    "sparsifiner": Mixer(
        lambda at: (PatchSparseAttention, {"num_heads": at.num_heads, "grid_size": at.grid, "qkv_bias": True}),
        "tokens",
        "2303.13755",
        everywhere=False,
        resize=choices.keep_predictor,
        remark="its predictor, which would learn by a loss of its own, is not trained; the mean is one more key",
    ),
    "optimised": Mixer(choices.heads(layers.ReducedAttention, kind="optimised"), "tokens", REDUCED),
    "efficient": Mixer(choices.heads(layers.ReducedAttention, kind="efficient"), "tokens", REDUCED),
    "gqa": Mixer(choices.gqa("gqa"), "tokens", GQA),
    "kdgqa": Mixer(
        choices.gqa("kdgqa"),
        "tokens",
        GQA,
        variants={"as published, by the whole batch": WHOLE_BATCH},
        remark="allocation per sample",
    ),
    "dgqa_diff": Mixer(choices.gqa("dgqa_diff"), "tokens", GQA, remark="evaluation depends on what was seen before"),
    "dgqa_ema": Mixer(choices.gqa("dgqa_ema"), "tokens", GQA, remark="evaluation depends on what was seen before"),
    "pgqa": Mixer(choices.gqa("pgqa"), "tokens", GQA, remark="draws noise in evaluation too"),
    "selective": Mixer(
        choices.heads(layers.SelectiveSelfAttention, qkv_bias=True),
        "tokens",
        "2411.12892",
        start=choices.reset,
        init="temperatures of 1, but for 1 % of log N",
    ),
    "cog": Mixer(
        choices.softmax_at_ends(layers.CogAttention),
        "tokens",
        "2411.07176",
        everywhere=False,
        remark="first and last layer are softmax attention",
    ),
    "reversed": Mixer(
        choices.heads(layers.ReversedAttention, controller_bias=4.0),
        "tokens",
        "2304.03282",
        everywhere=False,
        call=choices.call_reversed,
        final="weigh",
        start=choices.zero_controller,
        init="message controller: zero, with a constant of 4",
        remark="a message travels through the blocks of a stage; the head weighs tokens by it",
    ),
    "polarized_parallel": Mixer(
        choices.gate("dw7", layers.PolarizedSelfAttention, order="parallel"), "map", POLARIZED, remark="gate after dw7"
    ),
    "polarized_sequential": Mixer(
        choices.gate("dw7", layers.PolarizedSelfAttention, order="sequential"),
        "map",
        POLARIZED,
        remark="gate after dw7",
    ),
    "subspace": Mixer(
        choices.gate("dw7", layers.SubspaceAttention, num_subspaces=4),
        "map",
        ULSAM,
        remark=f"gate after dw7; {BATCH_NORM}",
    ),
    "softmax_polarized_parallel": Mixer(
        choices.gate("softmax", layers.PolarizedSelfAttention, order="parallel"),
        "map",
        POLARIZED,
        remark="gate after softmax",
    ),
    "softmax_polarized_sequential": Mixer(
        choices.gate("softmax", layers.PolarizedSelfAttention, order="sequential"),
        "map",
        POLARIZED,
        remark="gate after softmax",
    ),
    "softmax_subspace": Mixer(
        choices.gate("softmax", layers.SubspaceAttention, num_subspaces=4),
        "map",
        ULSAM,
        remark=f"gate after softmax; {BATCH_NORM}",
    ),
    "halo": Mixer(
        choices.halo,
        "map",
        "2103.12731",
        remark="blocks of 7 (4 where these do not fit) and a halo of 3; no projection of the output",
    ),
    "neighborhood": Mixer(
        choices.neighborhood,
        "last",
        "2209.15001",
        remark="7 x 7, dilations 1 and 2 in turn where they fit; 3 x 3 on smaller maps",
    ),
    "window_channel": Mixer(
        choices.dual,
        "last",
        "2204.03645",
        remark="windows and channels in turn",
    ),
    "hilo": Mixer(
        lambda at: (
            layers.HiLoAttention,
            {"num_heads": at.num_heads, "window_size": 1 if at.last_stage else 2, "qkv_bias": True},
        ),
        "last",
        "2205.13213",
        remark="no windows in the last stage",
    ),
    "lka": Mixer(lambda at: (layers.VanAttention, {}), "map", "2202.09741", remark="convolutional"),
    "focal": Mixer(
        lambda at: (layers.FocalModulation, {"focal_window": 3, "focal_level": 2}),
        "last",
        "2203.11926",
        remark="kernels 3 and 5",
    ),
    "gnconv": Mixer(
        lambda at: (layers.RecursiveGatedConv, {"order": 4}),
        "map",
        "2207.14284",
        remark="order 4",
    ),
    "atconv": Mixer(
        lambda at: (layers.AttentiveConv2d, {}),
        "map",
        "2510.20092",
        remark="pools the raster order",
    ),
    "gpsa": Mixer(
        choices.heads(layers.GatedPositionalSelfAttention),
        "tokens",
        "2103.10697",
        everywhere=False,
        start=choices.reset,
        init="locality",
        remark="all layers are gated",
    ),
    "soft_causal": Mixer(
        choices.heads(SoftCausalAttention, qkv_bias=True),
        "tokens",
        "2404.06773",
        everywhere=False,
        variants={"soft mask in the first epochs": {"soft_mask_epochs": 50}},
        remark="causal in raster order; the mean takes the place of a last token",
    ),
    "pat_ch": Mixer(lambda at: (layers.PartialChannelAttention, {}), "map", PATNET, several=True, remark=BATCH_NORM),
    "pat_sf": Mixer(
        choices.heads(layers.PartialSelfAttention, attn_drop=0.0, proj_drop=0.0, qkv_bias=True),
        "map",
        PATNET,
        everywhere=False,
        remark="with its partial convolution; PAT_sp, which acts inside the MLP, is left out",
    ),
    "agent": Mixer(
        lambda at: (
            layers.AgentAttention,
            {"num_heads": at.num_heads, "map_size": at.grid, "agent_num": 49 if at.window == 7 else 16},
        ),
        "last",
        "2312.08874",
        resize=choices.resize_axes,
        remark="49 agents, 16 where the map is no multiple of 7; biases of one grid, resized for others",
    ),
    "moh": Mixer(
        choices.routed,
        "tokens",
        "2410.11842",
        call=choices.call_balanced,
        final="loss",
        variants={"with load balance": {"balance": 0.01}},
        remark="three quarters of the heads",
    ),
    "self_guided": Mixer(
        choices.guided_pair,
        "last",
        "2308.12216",
        everywhere=False,
        call=choices.call_pair,
        remark="in pairs, of which the first tells the second what is significant",
    ),
    "contmix": Mixer(
        choices.heads(layers.ContMix2d),
        "map",
        "2502.20087",
        remark=f"without context; {BATCH_NORM}",
    ),
}
"""Mixers by name. PAT_sp of PATNet acts inside the MLP and is left out."""


def find_mixer(name: str) -> Mixer:
    """A mixer by its name.

    Args:
        name: one of `list_mixers()`.

    Raises:
        UnknownModelError: if there is no such mixer.
    """
    if not isinstance(name, str) or name not in MIXERS:
        near = get_close_matches(str(name), MIXERS, n=4, cutoff=0.5)
        raise UnknownModelError(
            f"unknown mixer {name}; " + (f"did you mean {', '.join(near)}?" if near else "see visionattn.list_mixers()")
        )
    return MIXERS[name]


def list_mixers(filter: str = "") -> list[str]:
    """Names of token mixers, sorted.

    Args:
        filter: shell pattern, `"*gqa*"`; all names if empty.
    """
    return sorted(name for name in MIXERS if not filter or fnmatch.fnmatch(name, filter))
