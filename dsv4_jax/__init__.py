"""DeepSeek-V4 in JAX and Flax."""

from dsv4_jax.config import ModelConfig, Runtime
from dsv4_jax.convert import Quantized, dequantize, load_pretrained, save_pretrained
from dsv4_jax.errors import InputError
from dsv4_jax.infer import Generated, generate
from dsv4_jax.model import Features, Transformer, init_params, param_shapes
from dsv4_jax.rounded_weights import round_weights
from dsv4_jax.token_ids import check_token_ids

__all__ = [
    "Features", "Generated", "InputError", "ModelConfig", "Quantized", "Runtime", "Transformer",
    "check_token_ids", "dequantize", "generate", "init_params", "load_pretrained", "param_shapes",
    "round_weights", "save_pretrained",
]
