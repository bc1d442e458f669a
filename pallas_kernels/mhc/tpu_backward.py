"""The gradients of hyper-connections on TPU: again a block of tokens with all streams in VMEM.

The block is gone through twice: to compute the new streams again and the gradient of what was read
in its gates; then, with the gradients of all gates, for the streams' own. The gradient of the
weights stays in VMEM while the grid's steps, one after the other, add to it. Of 4,096 tokens of
width 4,096, `write_and_read` moves 134 MB of streams, 134 MB of gradients of the new ones and 67 MB
of y and the gradient of u in, 134 MB and 34 MB of gradients out: 503 MB.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from pallas_kernels.blocks import pad_axes
from pallas_kernels.cost import estimate
from pallas_kernels.mhc.gates import Affine, Gating, gate_gradients, matrix_of
from pallas_kernels.mhc.streams import expand, expand_gradient, for_product, split
from pallas_kernels.mhc.tpu import (
    LANES,
    PRODUCT,
    SUBLANES,
    VMEM_BYTES,
    Plan,
    folded,
    from_blocks,
    put,
    rounded,
    spread,
    vectors,
)
from pallas_kernels.target import TPU, target_platform

# Pairs of parts whose products make up that of two float32: without what is below 2^-16 of it. Its
# sum with the streams' gradient is rounded to bfloat16.
LEFT, RIGHT = (0, 0, 1), (0, 1, 0)
PARTS = 3  # of a float32, which multiply streams in bfloat16 exactly


def backward_weights(fn: Float[Array, "n d r"], dtype) -> Float[Array, "gates columns"]:
    """Lay the weights out for a product with the gradients of gates."""
    fn = pad_axes(fn.reshape(-1, fn.shape[2]), {1: SUBLANES}).T
    if dtype == jnp.float32:
        return fn
    parts = split(fn, 2)
    return jnp.concatenate([parts[i] for i in RIGHT])


def backward(
    x: Float[Array, "tokens n d"],
    written: tuple[Float[Array, "tokens d"], Float[Array, "g tokens"]] | None,
    mixing: tuple[Float[Array, "n d r"], Float[Array, " a"]] | None,
    kept: Float[Array, "k tokens"] | None, grads: tuple[Array, ...], gating: Gating,
) -> tuple[Array, ...]:
    """Return the gradients of `forward`.

    Args:
      kept: the last result of `forward`, if there were weights.
      grads: in the other results.
    Returns:
      Gradients in x, in y and its gates, in the weights and in what the gates' sigmoids and softmax
      took; of these what was given.
    """
    tokens, n, d = x.shape
    plan, grads = Plan(x, gating), list(grads)
    operands, specs, outputs = [plan.streams(x)], [plan.streams_spec], []
    outputs.append((operands[0].shape, x.dtype, plan.streams_spec))

    def take(array, spec):
        operands.append(array)
        specs.append(spec)

    def take_gates(gates):
        gates = plan.gates(gates)
        take(gates, plan.gates_spec(gates.shape[1]))
        return gates.shape

    if written is not None:
        y = plan.rows(written[0])
        take(y, plan.rows_spec)
        shape = take_gates(written[1])
        take(plan.streams(grads.pop(0)), plan.streams_spec)
        outputs.append((y.shape, y.dtype, plan.rows_spec))
        outputs.append((shape, jnp.float32, plan.gates_spec(shape[1])))
    if mixing is not None:
        fn = backward_weights(pad_axes(mixing[0], {1: LANES}), x.dtype)
        take(fn, plan.resident(fn.shape))
        take(mixing[1], pl.BlockSpec(memory_space=pltpu.SMEM))
        take_gates(kept)
        take(plan.rows(grads[0]), plan.rows_spec)
        take_gates(grads[1])
        rows = rounded(gating.logits)
        outputs.append(((rows, fn.shape[1]), jnp.float32, plan.resident((rows, fn.shape[1]))))
        shape = (plan.blocks.tokens, rows, plan.block)
        outputs.append((shape, jnp.float32, plan.gates_spec(rows)))
    name = f"streams_{'write' * (written is not None)}{'read' * (mixing is not None)}_gradient"
    shapes = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype, _ in outputs]
    flops = 4 * x.size * gating.logits * (mixing is not None)
    results = list(pl.pallas_call(
        _kernel(plan, written is not None, mixing is not None, x.dtype),
        grid=(plan.blocks.tokens,),
        in_specs=specs,
        out_specs=[spec for *_, spec in outputs],
        out_shape=shapes,
        scratch_shapes=_scratch(plan, written is not None, mixing is not None),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("arbitrary",), vmem_limit_bytes=VMEM_BYTES
        ),
        cost_estimate=estimate(flops, operands, shapes),
        interpret=target_platform() != TPU,
        name=name,
    )(*operands))
    done = [results.pop(0).reshape(plan.tokens, n, -1)[:tokens, :, :d]]
    if written is not None:
        done.append(results.pop(0)[:tokens, :d])
        done.append(from_blocks(results.pop(0))[: gating.written, :tokens])
    if mixing is not None:
        fn, activations = results
        done.append(fn[: gating.logits].T.reshape(n, -1, gating.logits)[:, :d])
        done.append(from_blocks(activations)[: gating.logits, :tokens])
    return tuple(done)


def _scratch(plan: Plan, writes: bool, reads: bool) -> list:
    """Return what a kernel needs for itself, in the order in which it takes it."""
    n, block, rows = plan.gating.streams, plan.block, rounded(plan.gating.logits)
    shapes = []
    if writes:
        shapes += [(plan.gating.written, block, LANES)] * 2  # the gates, sums of their gradients
    if reads:
        shapes += [
            (n + 1, block, LANES),  # pre and the norm's factor, of all tokens
            (n, block, LANES),  # sums of the gradients of pre
            (n, block, plan.pieces.size),  # what comes through the gates, of a piece
            (plan.gating.sums, 1, block),
            (PARTS * rows, block), (PARTS * rows, block),  # parts of gates' gradients
            (rounded(n + 1), block),
        ]  # fmt: skip
    return [pltpu.VMEM(shape, jnp.float32) for shape in shapes]


def _row(sums: Float[Array, "tokens lanes"]) -> Float[Array, "1 tokens"]:
    """Add up lanes."""
    return jnp.sum(sums.T, axis=0, keepdims=True)


def _kernel(plan: Plan, writes: bool, reads: bool, dtype):
    pieces, gating = plan.pieces, plan.gating
    n = gating.streams

    def kernel(*refs):
        refs = list(refs)
        x = refs.pop(0)
        y, gates, new_grad = (refs.pop(0) for _ in range(3)) if writes else (None,) * 3
        fn, affine, kept, u_grad, next_grad = (
            (refs.pop(0) for _ in range(5)) if reads else (None,) * 5
        )
        x_grad = refs.pop(0)
        y_grad, gates_grad = (refs.pop(0), refs.pop(0)) if writes else (None, None)
        fn_grad, values_grad = (refs.pop(0), refs.pop(0)) if reads else (None, None)
        wide, sums = (refs.pop(0), refs.pop(0)) if writes else (None, None)
        # The block of the streams' gradient holds the new streams until a piece of it is due.
        new = x_grad if writes else x

        def gates_of(rows):
            values = pieces.gates(wide, rows, gating.written)
            return values[:n], matrix_of(values[n:], n)

        if writes:
            spread(wide, gates[...], gating.written)
            sums[...] = jnp.zeros_like(sums)
        if reads:
            factors, pre_sums, through, rounds, left, right, turn = refs
            pre_sums[...] = jnp.zeros_like(pre_sums)

            def write_again(c, _):
                for rows in pieces.rows:
                    if writes:
                        written = y[rows, pieces.of(c)].astype(jnp.float32)
                        parts = expand(pieces.load(x, rows, c), written, *gates_of(rows))
                        pieces.store(new, rows, c, parts)
                    grad = u_grad[rows, pieces.of(c)].astype(jnp.float32)
                    for m, part in enumerate(pieces.load(new, rows, c)):
                        pre_sums[m, rows] += folded(part * grad)
                return 0

            jax.lax.fori_loop(0, pieces.count, write_again, 0)
            found = gate_gradients(
                vectors(kept, gating.logits), kept[pl.ds(gating.logits, 1), :], Affine(affine),
                [_row(pre_sums[m]) for m in range(n)], vectors(next_grad, gating.written),
                gating, rounds,
            )
            values_grad[...] = jnp.zeros_like(values_grad)
            put(values_grad, found.activations)
            turn[...] = jnp.zeros_like(turn)
            put(turn, [*found.pre, found.norm])
            spread(factors, turn[...], n + 1)
            in_gates = _Products(fn, fn_grad, found.raw, left, right, gating, dtype)

            @pl.when(pl.program_id(0) == 0)
            def _():
                fn_grad[...] = jnp.zeros_like(fn_grad)

        def step(c, _):
            if reads:
                for m in range(n):
                    at = pieces.of(c, m)
                    in_gates.add_weight_gradient(at, new[:, at])
                    through[m] = in_gates.gradient(at)
            for rows in pieces.rows:
                grads = [0] * n
                if writes:
                    grads = pieces.load(new_grad, rows, c)
                if reads:
                    *pre, norm = pieces.gates(factors, rows, n + 1)
                    grad = u_grad[rows, pieces.of(c)].astype(jnp.float32)
                    for m, part in enumerate(pieces.load(new, rows, c)):
                        grads[m] += through[m, rows] + pre[m] * grad + norm * part
                if writes:
                    xs, written = pieces.load(x, rows, c), y[rows, pieces.of(c)]
                    _add_gate_sums(sums, rows, grads, xs, written.astype(jnp.float32))
                    grads, in_y = expand_gradient(grads, *gates_of(rows))
                    y_grad[rows, pieces.of(c)] = in_y.astype(y_grad.dtype)
                pieces.store(x_grad, rows, c, grads)
            return 0

        jax.lax.fori_loop(0, pieces.count, step, 0)
        if writes:
            gates_grad[...] = jnp.zeros_like(gates_grad)
            put(gates_grad, [_row(sums[i]) for i in range(gating.written)])

    return kernel


def _add_gate_sums(sums, rows, grads: list[Array], xs: list[Array], y: Array) -> None:
    """Add a piece's part of the gradients of post and comb."""
    n = len(xs)
    for m, grad in enumerate(grads):
        sums[m, rows] += folded(grad * y)
        for i, x in enumerate(xs):
            sums[n + i * n + m, rows] += folded(grad * x)


class _Products:
    """The products of the gates' gradients with weights and with streams."""

    def __init__(self, fn, fn_grad, raw: list[Array], left, right, gating: Gating, dtype):
        self.fn, self.fn_grad, self.rows = fn, fn_grad, rounded(gating.logits)
        self.plain = dtype == jnp.float32
        for ref in (left, right):
            ref[...] = jnp.zeros_like(ref)
        for i, row in enumerate(raw):
            parts = [row] if self.plain else split(row, PARTS)
            for k, part in enumerate(parts):
                left[pl.ds(k * self.rows + i, 1), :] = part.astype(jnp.float32)
            for k, part in enumerate([0] if self.plain else LEFT):
                right[pl.ds(k * self.rows + i, 1), :] = parts[part].astype(jnp.float32)
        count = self.rows if self.plain else PARTS * self.rows
        self.by_gate = left[pl.ds(0, count), :].astype(dtype)
        self.by_token = right[pl.ds(0, count), :].T.astype(dtype)

    def _dot(self, a: Array, b: Array) -> Array:
        exact = jax.lax.Precision.HIGHEST if self.plain else None
        a, b = for_product(a), for_product(b)
        return jax.lax.dot_general(
            a, b, PRODUCT, precision=exact, preferred_element_type=jnp.float32
        )

    def add_weight_gradient(self, at, x: Float[Array, "tokens columns"]) -> None:
        product = self._dot(self.by_gate, x)
        for i in range(0, product.shape[0], self.rows):
            self.fn_grad[:, at] += product[i : i + self.rows]

    def gradient(self, at) -> Float[Array, "tokens columns"]:
        """Return the gradient in streams that comes through the gates' weights."""
        return self._dot(self.by_token, self.fn[:, at])
