"""Attention blocks and what they share; each is usable alone."""

from .large_kernel_attention import LargeKernelAttention as LargeKernelAttention
from .large_kernel_attention import VanAttention as VanAttention
from .neighborhood_attention import NeighborhoodAttention2d as NeighborhoodAttention2d
