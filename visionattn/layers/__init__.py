"""Attention blocks and what they share; each is usable alone."""

from .gated_positional_attention import GatedPositionalSelfAttention as GatedPositionalSelfAttention
from .large_kernel_attention import LargeKernelAttention as LargeKernelAttention
from .large_kernel_attention import VanAttention as VanAttention
from .neighborhood_attention import NeighborhoodAttention2d as NeighborhoodAttention2d
from .neighborhood_attention import TokenNeighborhoodAttention as TokenNeighborhoodAttention
from .neighborhood_attention import TokenRelPosAttention as TokenRelPosAttention
