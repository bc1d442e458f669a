"""Hybrid attention: sliding window, compressed sparse (CSA) and heavily compressed (HCA)."""

from dsv4_jax.attention.block import Attention, Places

__all__ = ["Attention", "Places"]
