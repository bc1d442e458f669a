"""DeepSeek-V4 in JAX and Flax."""

from dsv4_jax.config import ModelConfig, Runtime
from dsv4_jax.errors import InputError
from dsv4_jax.model import Features, Transformer, init_params, param_shapes
from dsv4_jax.token_ids import check_token_ids

__all__ = [
    "Features", "InputError", "ModelConfig", "Runtime", "Transformer", "check_token_ids",
    "init_params", "param_shapes",
]
