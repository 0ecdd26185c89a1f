"""Attention blocks and what they share; each is usable alone."""

from .attentive_conv import AttentiveConv2d as AttentiveConv2d
from .attentive_conv import TokenAttentiveConv2d as TokenAttentiveConv2d
from .causal_attention import CausalSelfAttention as CausalSelfAttention
from .channel_attention import ChannelAttention as ChannelAttention
from .conv_position import ConvPosEnc as ConvPosEnc
from .focal_modulation import FocalModulation as FocalModulation
from .focal_modulation import TokenFocalModulation as TokenFocalModulation
from .gated_positional_attention import GatedPositionalSelfAttention as GatedPositionalSelfAttention
from .halo_attention import HaloAttention2d as HaloAttention2d
from .hilo_attention import HiLoAttention as HiLoAttention
from .large_kernel_attention import LargeKernelAttention as LargeKernelAttention
from .large_kernel_attention import VanAttention as VanAttention
from .neighborhood_attention import NeighborhoodAttention2d as NeighborhoodAttention2d
from .neighborhood_attention import TokenNeighborhoodAttention as TokenNeighborhoodAttention
from .neighborhood_attention import TokenRelPosAttention as TokenRelPosAttention
from .norm_aware_attention import NormAwareLinearAttention as NormAwareLinearAttention
from .partial_attention import PartialChannelAttention as PartialChannelAttention
from .partial_attention import PartialConv2d as PartialConv2d
from .partial_attention import PartialSelfAttention as PartialSelfAttention
from .partial_attention import PartialSpatialAttention as PartialSpatialAttention
from .recursive_gated_conv import GlobalLocalFilter as GlobalLocalFilter
from .recursive_gated_conv import RecursiveGatedConv as RecursiveGatedConv
from .self_attention import SelfAttention as SelfAttention
from .sparse_attention import ConnectivityPredictor as ConnectivityPredictor
from .sparse_attention import SparseAttention as SparseAttention
from .window_attention import WindowAttention2d as WindowAttention2d
