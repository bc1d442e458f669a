"""The letters that name axes in einsum strings and shape annotations, and the array types.

| letter | axis | letter | axis |
|---|---|---|---|
| b | row of the batch | d | model width |
| t | token | n, m | residual stream (read, written) |
| q | query in a block | h | query head |
| s | key slot of a window | k | head width |
| c | compressed entry | r | query rank |
| p | position in a block of tokens | g | output group |
| u | series of the overlapping compressor | o | output rank |
| i | indexer head | e | expert |
| j | indexer width | a | expert of a token |
| l | selected entry | f | expert width |
| z | stacked layer, block of queries | v | vocabulary |
"""

from __future__ import annotations

import jax
import numpy as np
from jaxtyping import Bool, Float, Int, UInt8

Array = jax.Array | np.ndarray  # JAX takes NumPy's arrays wherever it takes its own
Tokens = Int[Array, "b t"]
Hidden = Float[Array, "b t d"]
Streams = Float[Array, "b t n d"]
Queries = Float[Array, "b t h k"]
Keys = Float[Array, "b t k"]
Entries = Float[Array, "b c k"]
Logits = Float[Array, "b t v"]

__all__ = [
    "Array", "Bool", "Entries", "Float", "Hidden", "Int", "Keys", "Logits", "Queries", "Streams",
    "Tokens", "UInt8",
]
