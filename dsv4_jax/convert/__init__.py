"""Checkpoints to and from PyTorch."""

from dsv4_jax.convert.load import load_pretrained
from dsv4_jax.convert.quantized import Quantized, dequantize
from dsv4_jax.convert.save import save_pretrained

__all__ = ["Quantized", "dequantize", "load_pretrained", "save_pretrained"]
