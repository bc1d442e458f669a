"""Cross-entropy of the tokens that follow, within their documents."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from dsv4_jax.attention.layout import tokens_ahead
from dsv4_jax.chunks import join, map_chunks, split
from dsv4_jax.shapes import Array, Bool, Float, Hidden, Int, Logits, Tokens
from pallas_kernels import cross_entropy
from pallas_kernels.implementation import XLA
from pallas_kernels.target import CPU, target_platform


def shifted_targets(
    tokens: Tokens, segment_ids: Tokens | None, shift: int, loss_mask: Tokens | None = None
) -> tuple[Int[Array, "b t"], Float[Array, "b t"]]:
    """Return the token `shift` places on and a weight: 1 where it is to be predicted, else 0.

    It is where it is of the same document and its `loss_mask` is not 0.
    """
    targets, counts = tokens_ahead(tokens, segment_ids, shift)
    if loss_mask is not None:
        counts &= tokens_ahead(loss_mask, segment_ids, shift)[0] > 0
    return targets, counts.astype(jnp.float32)


def token_nats(
    hidden: Hidden, head: Float[Array, "d v"], targets: Int[Array, "b t"],
    weights: Float[Array, "b t"], *, implementation: str = XLA,
) -> Float[Array, ""]:
    """Return the weighted sum of -log softmax(hidden head)[target], in nats.

    In plain JAX logits exist for a stretch of tokens at a time, in float32. Where the gradient is
    wanted it is made while they exist, so that they are computed once.

    Args:
      implementation: "xla", a kernel's, or "auto".
    """
    chosen = cross_entropy.choose_for(hidden, head, implementation)
    if chosen == XLA:
        return _token_nats(hidden, head, targets, weights)
    flat = (x.reshape(-1, *x.shape[2:]) for x in (hidden, targets, weights))
    hidden, targets, weights = flat
    return cross_entropy.token_nats(hidden, head, targets, weights, chosen)


@jax.custom_vjp
def _token_nats(hidden, head, targets, weights):
    head = head.astype(hidden.dtype)

    def nats(stretch):
        hidden, targets = stretch
        return _nats(_logits(hidden, head), targets)[0]

    return jnp.sum(weights * map_chunks(nats, (hidden, targets), _elements(hidden, head)))


def _token_nats_forward(hidden, head, targets, weights):
    """Return the nats and their gradients.

    With e = weights (softmax - one-hot) these are e head^T, hidden^T e and each token's own nats.
    """
    factors = head.astype(hidden.dtype)

    def stretch(grad_head, piece):
        hidden, targets, weights = piece
        logits = _logits(hidden, factors)
        nats, log_total = _nats(logits, targets)
        one_hot = targets[..., None] == jnp.arange(logits.shape[-1])
        error = weights[..., None] * (jnp.exp(logits - log_total[..., None]) - one_hot)
        error = error.astype(hidden.dtype)
        grad_hidden = jnp.einsum("btv,dv->btd", error, factors)
        product = jnp.einsum("btd,btv->dv", hidden, error, preferred_element_type=jnp.float32)
        return grad_head + product, (nats, grad_hidden)

    pieces = split((hidden, targets, weights), _elements(hidden, head))
    start = jnp.zeros(head.shape, jnp.float32)
    grad_head, outs = jax.lax.scan(stretch, start, pieces)
    nats, grad_hidden = (join(out, hidden.shape[1]) for out in outs)
    gradients = grad_hidden, grad_head.astype(head.dtype), nats.astype(weights.dtype)
    return jnp.sum(weights * nats), gradients


def _token_nats_backward(gradients, scale):
    grad_hidden, grad_head, grad_weights = ((scale * g).astype(g.dtype) for g in gradients)
    return grad_hidden, grad_head, None, grad_weights


_token_nats.defvjp(_token_nats_forward, _token_nats_backward)


def token_scores(
    hidden: Hidden, head: Float[Array, "d v"], targets: Int[Array, "b t"]
) -> tuple[Float[Array, "b t"], Bool[Array, "b t"]]:
    """Return log softmax(hidden head)[target] in nats, and whether the target is the likeliest id.

    Logits exist for a stretch of tokens at a time, in float32.
    """
    head = head.astype(hidden.dtype)

    def scores(stretch):
        hidden, targets = stretch
        logits = _logits(hidden, head)
        return -_nats(logits, targets)[0], jnp.argmax(logits, axis=-1) == targets

    outs = jax.lax.map(scores, split((hidden, targets), _elements(hidden, head)))
    return tuple(join(out, hidden.shape[1]) for out in outs)


# On a CPU the logits pay for their way through the cache by three products: pieces may be larger
# than those of attention. At [4096, 128] x [128, 4096] on 2 cores, value and gradients: pieces of
# 256 tokens 43 ms, of 64 57 ms, of 4096 72 ms.
LARGER_PIECES = 4


def _elements(hidden: Hidden, head: Float[Array, "d v"]) -> int:
    """Return how many logits a token position counts for in `chunks`."""
    logits = hidden.shape[0] * head.shape[1]
    return -(-logits // LARGER_PIECES) if target_platform() == CPU else logits


def _logits(hidden: Hidden, head: Float[Array, "d v"]) -> Logits:
    return jnp.einsum("btd,dv->btv", hidden, head, preferred_element_type=jnp.float32)


def _nats(logits: Logits, targets: Int[Array, "b t"]) -> tuple[Array, Array]:
    """Return -log softmax(logits)[target] and the logarithm of the softmax's denominator."""
    log_total = jax.nn.logsumexp(logits, axis=-1)
    return log_total - jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0], log_total


def next_token_loss(
    hidden: Hidden, head: Float[Array, "d v"], tokens: Tokens, segment_ids: Tokens | None = None
) -> Float[Array, ""]:
    """Return the mean cross-entropy of each token's successor in its document, nats per token.

    Where no token has a successor it is 0.
    """
    targets, weights = shifted_targets(tokens, segment_ids, 1)
    return token_nats(hidden, head, targets, weights) / jnp.maximum(jnp.sum(weights), 1)
