"""DeepSeek-V4 in JAX and Flax."""

from dsv4_jax.config import ModelConfig, Runtime
from dsv4_jax.errors import InputError
from dsv4_jax.model import Features, Transformer, init_params, param_shapes

__all__ = [
    "Features", "InputError", "ModelConfig", "Runtime", "Transformer", "init_params",
    "param_shapes",
]
