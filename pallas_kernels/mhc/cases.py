"""Hyper-connections of released models, at 4,096 tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp

from pallas_kernels.case import Case
from pallas_kernels.mhc import read_streams, write_and_read, write_streams

TOKENS, STREAMS = 4096, 4
WIDTHS = {"Flash": 4096, "Pro": 7168}
GATING = {"rms_eps": 1e-6, "hc_eps": 1e-6, "iterations": 20}
GATES = 2 * STREAMS + STREAMS**2


def cases() -> Iterator[Case]:
    """Yield the three operations and their gradients."""
    for model, d in WIDTHS.items():
        hidden = jax.ShapeDtypeStruct((1, TOKENS, d), jnp.bfloat16)
        streams = jax.ShapeDtypeStruct((1, TOKENS, STREAMS * d), jnp.bfloat16)
        written = hidden, _floats(STREAMS, 1, TOKENS), _floats(STREAMS, STREAMS, 1, TOKENS)
        mixing = _floats(d, STREAMS, GATES), _floats(3), _floats(GATES)
        reading, writing = 2 * STREAMS * d * (GATES + 2), 2 * STREAMS * d * (STREAMS + 1)
        x, y = 2 * TOKENS * STREAMS * d, 2 * TOKENS * d  # bytes of streams, and of one vector
        weights = 4 * STREAMS * d * GATES
        # Backward passes do twice the operations. They read the streams, what was written to them
        # and the gradients of all results. Where gates were computed, the forward pass runs as
        # well, for what it keeps of them.
        operations = (
            ("read", read_streams, (streams, *mixing), reading, x + y, 2 * x + y),
            ("write", write_streams, (streams, *written), writing, 2 * x + y, 3 * x + 2 * y),
            ("write and read", write_and_read, (streams, *written, *mixing), reading + writing,
             2 * x + 2 * y, 3 * x + 3 * y),
        )  # fmt: skip
        for name, function, arguments, flops, moved, moved_back in operations:
            options = {} if function is write_streams else GATING
            reads = function is not write_streams
            moved, moved_back = moved + reads * weights, moved_back + 2 * reads * weights
            yield Case(
                "mhc", f"{model}: {name}", _forward(function, options), arguments,
                TOKENS * flops, moved, covered=reads,
            )
            yield Case(
                "mhc", f"{model}: {name}, gradient", _gradient(function, options),
                (arguments, jax.eval_shape(_forward(function, options)("xla"), *arguments)),
                (2 + reads) * TOKENS * flops, moved_back + reads * moved,
            )


def _floats(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def _forward(function: Callable, options: dict) -> Callable:
    return lambda implementation: lambda *arguments: function(
        *arguments, **options, implementation=implementation
    )


def _gradient(function: Callable, options: dict) -> Callable:
    """Run an operation, for what it keeps, and its backward pass."""

    def run(implementation):
        def both(arguments, grads):
            call = _forward(function, options)(implementation)
            return jax.vjp(call, *arguments)[1](grads)

        return both

    return run
