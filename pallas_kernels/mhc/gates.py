"""The arithmetic of gates, as kernels do it: on vectors of tokens, one for each gate.

The small matrices of tokens are lists of such vectors: neither platform has registers of their
shape. On GPU a vector is [tokens]; on TPU it is [1, tokens], tokens on lanes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

Vectors = list[Array]
Matrix = list[Vectors]
Ref = Any


class Gating(NamedTuple):
    """What is known of the gates when a kernel is made."""

    streams: int
    width: int  # of a stream, without what fills a block
    rms_eps: float
    hc_eps: float
    iterations: int

    @property
    def logits(self) -> int:
        """How many numbers determine the gates of a token."""
        return 2 * self.streams + self.streams**2

    @property
    def written(self) -> int:
        """How many gates of a token `write_streams` takes: post, then comb row by row."""
        return self.streams + self.streams**2

    @property
    def sums(self) -> int:
        """How many vectors of sums the gradient of Sinkhorn's iteration keeps."""
        return max(1, (self.iterations - 1) * 2 * self.streams)


class Affine(NamedTuple):
    """The scales of the three kinds of gates and the offset of each, read one by one."""

    ref: Ref  # [3 + logits]

    def __call__(self, gate: int, streams: int) -> tuple[Array, Array]:
        """Return scale and offset of a gate."""
        return self.ref[min(gate // streams, 2)], self.ref[3 + gate]


def inverse_norm(squares: Array, gating: Gating) -> Array:
    """Return one over the root mean square of a token's streams, from their sum of squares."""
    return jax.lax.rsqrt(squares / (gating.streams * gating.width) + gating.rms_eps)


def activations(raw: Vectors, inverse: Array, affine: Affine, gating: Gating) -> Vectors:
    """Return what the sigmoids and the softmax take.

    Args:
      raw: products of the streams, as they are, with the weights; the first gates' suffice.
    """
    values = []
    for gate, product in enumerate(raw):
        scale, offset = affine(gate, gating.streams)
        values.append(product * inverse * scale + offset)
    return values


def sigmoid(x: Array) -> Array:
    return 1 / (1 + jnp.exp(-x))


def read_gates(values: Vectors, gating: Gating) -> Vectors:
    """Return pre."""
    return [sigmoid(value) + gating.hc_eps for value in values[: gating.streams]]


def write_gates(values: Vectors, gating: Gating) -> Vectors:
    """Return post, then comb row by row."""
    n = gating.streams
    post = [2 * sigmoid(value) for value in values[n : 2 * n]]
    matrix = [[x + gating.hc_eps for x in row] for row in softmax(values, gating)]
    return post + flat(sinkhorn(matrix, gating))


def softmax(values: Vectors, gating: Gating) -> Matrix:
    """Return the softmax of each row of comb's logits."""
    rows = []
    for row in matrix_of(values[2 * gating.streams :], gating.streams):
        highest = row[0]
        for x in row[1:]:
            highest = jnp.maximum(highest, x)
        row = [jnp.exp(x - highest) for x in row]
        inverse = 1 / sum(row)
        rows.append([x * inverse for x in row])
    return rows


def flat(matrix: Matrix) -> Vectors:
    return [x for row in matrix for x in row]


def matrix_of(vectors: Sequence[Array], n: int) -> Matrix:
    return [list(vectors[n * i : n * (i + 1)]) for i in range(n)]


def transposed(matrix: Matrix) -> Matrix:
    return [list(column) for column in zip(*matrix, strict=True)]


def by_rows(matrix: Matrix, eps: float) -> tuple[Matrix, Vectors]:
    """Divide each row by its sum and eps; return these sums, too."""
    sums = [sum(row) + eps for row in matrix]
    inverses = [1 / total for total in sums]
    divided = [[x * inverse for x in row] for row, inverse in zip(matrix, inverses, strict=True)]
    return divided, sums


def by_columns(matrix: Matrix, eps: float) -> tuple[Matrix, Vectors]:
    divided, sums = by_rows(transposed(matrix), eps)
    return transposed(divided), sums


def sinkhorn(
    matrix: Matrix, gating: Gating, keep: Callable[[Array, Vectors], None] = lambda *_: None
) -> Matrix:
    """Divide by the sums of columns and rows in turn.

    Args:
      keep: is called with the number of each round and its sums of rows, then of columns.
    """

    def step(k, vectors):
        divided, row_sums = by_rows(matrix_of(vectors, gating.streams), gating.hc_eps)
        divided, column_sums = by_columns(divided, gating.hc_eps)
        keep(k, row_sums + column_sums)
        return tuple(flat(divided))

    start = tuple(flat(by_columns(matrix, gating.hc_eps)[0]))
    vectors = jax.lax.fori_loop(0, gating.iterations - 1, step, start)
    return matrix_of(vectors, gating.streams)


def sinkhorn_gradient(matrix: Matrix, gradient: Matrix, gating: Gating, sums: Ref) -> Matrix:
    """Return the gradient in the matrix: run the rounds, keeping their sums, then undo each.

    With y = x / (sum x + eps) and G = dL/dlog y, the gradient of L in log x is G - y sum(G), and x
    is y times its sum.

    Args:
      sums: room for `gating.sums` vectors.
    """
    n = gating.streams

    def keep(k, vectors):
        for i, vector in enumerate(vectors):
            sums[k * 2 * n + i] = vector

    def undo(k, vectors):
        k = gating.iterations - 2 - k
        kept = [sums[k * 2 * n + i] for i in range(2 * n)]
        x, log_gradient = matrix_of(vectors[: n * n], n), matrix_of(vectors[n * n :], n)
        x = [[a * s for a, s in zip(row, kept[n:], strict=True)] for row in x]
        log_gradient = _undo_rows(x, log_gradient)
        x = [[a * s for a in row] for row, s in zip(x, kept[:n], strict=True)]
        log_gradient = transposed(_undo_rows(transposed(x), transposed(log_gradient)))
        return tuple(flat(x) + flat(log_gradient))

    x = sinkhorn(matrix, gating, keep)
    # The last division first, before the factor x: a large common part of the gradient cancels.
    last = []
    for column, grads in zip(transposed(x), transposed(gradient), strict=True):
        common = sum(a * g for a, g in zip(column, grads, strict=True))
        last.append([a * (g - common) for a, g in zip(column, grads, strict=True)])
    vectors = tuple(flat(x) + flat(transposed(last)))
    vectors = jax.lax.fori_loop(0, gating.iterations - 1, undo, vectors)
    log_gradient = [g / a for g, a in zip(vectors[n * n :], flat(matrix), strict=True)]
    return matrix_of(log_gradient, n)


def _undo_rows(x: Matrix, log_gradient: Matrix) -> Matrix:
    """Take off each row of a gradient in logarithms what dividing it by its sum cancels.

    Args:
      x: the matrix as it was after it was divided by rows.
    """
    totals = [sum(row) for row in log_gradient]
    return [
        [g - a * total for g, a in zip(grads, row, strict=True)]
        for grads, row, total in zip(log_gradient, x, totals, strict=True)
    ]


class GateGradients(NamedTuple):
    """What is left for the gradients of streams and weights, a vector each."""

    pre: Vectors
    activations: Vectors  # the gradient in what the sigmoids and the softmax take
    raw: Vectors  # the gradient in the products of streams and weights
    norm: Array  # the gradient of the streams' norm is this times the streams


def gate_gradients(
    raw: Vectors, squares: Array, affine: Affine, pre_gradient: Vectors,
    written_gradient: Vectors, gating: Gating, sums: Ref,
) -> GateGradients:
    """Return the gradients of a token's gates.

    Args:
      written_gradient: in post, then in comb row by row.
      sums: room for `gating.sums` vectors.
    """
    n = gating.streams
    inverse = inverse_norm(squares, gating)
    values = activations(raw, inverse, affine, gating)
    post_gradient, comb_gradient = written_gradient[:n], written_gradient[n:]
    result = []
    for value, grad in zip(values[:n], pre_gradient, strict=True):
        result.append(grad * sigmoid(value) * sigmoid(-value))
    for value, grad in zip(values[n : 2 * n], post_gradient, strict=True):
        result.append(2 * grad * sigmoid(value) * sigmoid(-value))
    rows = softmax(values, gating)
    matrix = [[x + gating.hc_eps for x in row] for row in rows]
    grads = sinkhorn_gradient(matrix, matrix_of(comb_gradient, n), gating, sums)
    for row, grad in zip(rows, grads, strict=True):
        common = sum(a * g for a, g in zip(row, grad, strict=True))
        result += [a * (g - common) for a, g in zip(row, grad, strict=True)]
    scaled = [g * affine(gate, n)[0] for gate, g in enumerate(result)]
    along = sum(g * product for g, product in zip(scaled, raw, strict=True))
    norm = -along * inverse * inverse * inverse / (n * gating.width)
    return GateGradients(
        read_gates(values, gating), result, [g * inverse for g in scaled], norm
    )
