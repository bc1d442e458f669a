"""The kernels of the indexer's loss, interpreted, against every logit and score written out."""

from __future__ import annotations

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiling import quick_jit

from pallas_kernels.index_loss import claims, index_loss
from pallas_kernels.index_loss.index import Slots
from pallas_kernels.sparse_attention import Seen
from pallas_kernels.sparse_attention.index import Entries
from pallas_kernels.sparse_attention.seen import pack_chosen

KERNELS = ("gpu", "tpu")
ROUNDING = 1e-5  # of the largest value: float32 sums in another order
BFLOAT16 = 2**-6  # of the largest value: gradients of q . k are rounded before they are summed
CHOSEN, RANGE, WARM_UP = "chosen", "range", "range and its best"
FORMS = (CHOSEN, RANGE, WARM_UP)
# Rows, tokens, heads, channels, index heads, index channels, entries, chosen: one of each; two
# tiles of entries on GPU; many heads and several blocks of entries, of which chosen ones are few.
SHAPES = {
    "one": (1, 1, 1, 16, 1, 8, 1, 4), "small": (2, 21, 3, 16, 5, 8, 70, 12),
    "blocks": (1, 40, 80, 24, 3, 16, 1200, 40),
}
QUICK = [("small", CHOSEN), ("small", WARM_UP)]


def operands(shape, dtype="float32"):
    """Return arrays, and a range and a choice of entries; some queries see nothing."""
    b, t, h, k, i, j, c, chosen = shape
    rng = np.random.default_rng(0)
    first = np.sort(rng.integers(0, c // 2 + 1, (b, t)), axis=1)
    end = np.maximum.accumulate(np.minimum(first + rng.integers(0, c // 2 + 2, (b, t)), c), axis=1)
    end = np.maximum(end, first)
    first[0, t // 2 :][: t // 3] = end[0, t // 2 :][: t // 3]
    first = np.maximum.accumulate(first, axis=1)
    end = np.maximum(end, first)
    first[-1, -1], end[-1, -1] = max(first[-1, -1], c - 1), c
    picks = np.full((b, t, chosen), -1, np.int32)
    for row, query in np.ndindex(b, t):
        seen = rng.permutation(np.arange(first[row, query], end[row, query]))[:chosen]
        picks[row, query, : len(seen)] = np.sort(seen)

    def normal(*shape):
        return jnp.asarray(rng.standard_normal(shape), dtype)

    arrays = (
        normal(b, t, h, k), normal(b, c, k), normal(b, t, h).astype(jnp.float32) + 3,
        normal(b, t, i, j), normal(b, t, i).astype(jnp.float32), normal(b, c, j),
    )
    seen = Seen(*(jnp.asarray(x, jnp.int32) for x in (first, first, end)))
    return arrays, seen, seen._replace(chosen=jnp.asarray(picks))


def attended(form, seen, choice):
    return {CHOSEN: (choice, None), RANGE: (seen, None), WARM_UP: (seen, choice)}[form]


def by_definition(arrays, given):
    """Return KL, share of the best, and gradients for a slope of 1 and more, in float64."""
    q, entries, log_total, queries, weights, keys = (np.asarray(x, np.float64) for x in arrays)

    def mask(seen):
        number = np.arange(entries.shape[1])
        if seen.chosen is not None:
            return (np.asarray(seen.chosen)[..., None] == number).any(axis=2)
        first, end = (np.asarray(x)[..., None] for x in (seen.first, seen.end))
        return (number >= first) & (number < end)

    seen, best = given
    mass = np.exp(np.einsum("bthk,bck->bthc", q, entries) * q.shape[-1] ** -0.5
                  - log_total[..., None]).sum(axis=2) * mask(seen)
    total = mass.sum(axis=-1, keepdims=True)
    teacher = mass / np.where(total > 0, total, 1)
    hits = np.einsum("btij,bcj->btic", queries, keys)
    score = np.einsum("btic,bti->btc", np.maximum(hits, 0), weights)
    norm = np.sum(np.exp(score) * mask(seen), axis=-1, keepdims=True)
    learner = np.where(mask(seen), np.exp(score) / np.where(norm > 0, norm, 1), 1)
    divergence = np.sum(teacher * (np.log(np.where(teacher > 0, teacher, 1)) - np.log(learner)), -1)
    share = 0 * divergence if best is None else np.sum(teacher * mask(best), axis=-1)
    slope = slopes(divergence.shape)[..., None] * (learner * mask(seen) - teacher)
    of_hits = np.where(hits > 0, weights[..., None] * slope[:, :, None], 0)
    return divergence, share, (
        np.einsum("btic,bcj->btij", of_hits, keys),
        np.einsum("btic,btc->bti", np.maximum(hits, 0), slope),
        np.einsum("btic,btij->bcj", of_hits, queries),
    )


def slopes(shape):
    return np.random.default_rng(1).standard_normal(shape).astype(np.float32)


def close(actual, wanted, tolerance):
    actual, wanted = np.asarray(actual, np.float64), np.asarray(wanted, np.float64)
    assert actual.shape == wanted.shape
    return np.abs(actual - wanted).max() <= tolerance * max(np.abs(wanted).max(), 1e-3)


def differentiated(kernel, arrays, given):
    """Return the result, and the gradients of the divergence for the same slopes."""
    out, pull_back = jax.vjp(lambda *arrays: index_loss(*arrays, *given, kernel), *arrays)
    slope = jnp.asarray(slopes(out[0].shape))
    return out, pull_back((slope, jnp.ones_like(slope)))


def found_by(kernel, arrays, given):
    return quick_jit(functools.partial(differentiated, kernel))(arrays, given)


@pytest.mark.parametrize("kernel", ("xla", *KERNELS))
@pytest.mark.parametrize(
    ("shape", "form"),
    [x if x in QUICK else pytest.param(*x, marks=pytest.mark.heavy)
     for x in itertools.product(SHAPES, FORMS)],
)
def test_values_and_gradients_are_those_of_the_definition(shape, form, kernel):
    arrays, seen, choice = operands(SHAPES[shape])
    given = attended(form, seen, choice)
    divergence, share, gradients = by_definition(arrays, given)
    out, found = found_by(kernel, arrays, given)
    for actual, wanted in zip(out, (divergence, share), strict=True):
        assert close(actual, wanted, ROUNDING)
    for actual in found[:3]:  # of the attention
        assert not np.any(actual)
    for actual, wanted in zip(found[3:], gradients, strict=True):
        assert close(actual, wanted, ROUNDING)


@pytest.mark.heavy
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("form", (CHOSEN, WARM_UP))
def test_bfloat16_is_summed_in_float32(form, kernel):
    arrays, seen, choice = operands(SHAPES["small"], "bfloat16")
    given = attended(form, seen, choice)
    divergence, share, gradients = by_definition(arrays, given)
    out, found = found_by(kernel, arrays, given)
    for actual, wanted in zip(out, (divergence, share), strict=True):
        assert close(actual, wanted, ROUNDING)  # nothing of it is rounded
    assert [x.dtype for x in found[3:]] == [x.dtype for x in arrays[3:]]
    for actual, wanted in zip(found[3:], gradients, strict=True):
        assert close(actual, wanted, BFLOAT16)


@pytest.mark.heavy
@pytest.mark.parametrize("kernel", KERNELS)
def test_an_indexer_that_has_learned_all_has_a_loss_of_nothing(kernel):
    """Of one head, index scores can be the attention's logits: large terms cancel."""
    arrays, seen, _ = operands((1, 24, 1, 64, 2, 64, 70, 1))
    q, entries, log_total, *_ = arrays
    scaled = 8 * q * 64**-0.5
    arrays = (8 * q, entries, log_total + 40, jnp.concatenate([scaled, -scaled], axis=2),
              jnp.broadcast_to(jnp.array([1.0, -1.0]), (1, 24, 2)), entries)
    (divergence, _), (*_, grad, _, _) = found_by(kernel, arrays, (seen, None))
    assert np.abs(divergence).max() < ROUNDING * 40  # of the logarithms it is made from
    assert np.abs(grad).max() < ROUNDING * np.abs(entries).max()


@pytest.mark.heavy
@pytest.mark.parametrize("kernel", ("xla", *KERNELS))
def test_where_nothing_is_attended_to_there_is_nothing_to_learn(kernel):
    arrays, seen, _ = operands(SHAPES["small"])
    (divergence, share), found = found_by(kernel, arrays, (seen._replace(end=seen.first), None))
    assert not np.any(divergence) and not np.any(share)
    for grad in found[3:]:
        np.testing.assert_array_equal(grad, 0)


@pytest.mark.heavy
def test_a_tpu_takes_bits():
    arrays, seen, choice = operands(SHAPES["blocks"])
    bits = seen._replace(words=pack_chosen(choice.chosen, arrays[1].shape[1]))
    for given, same in (((choice, None), (bits, None)), ((seen, choice), (seen, bits))):
        for a, b in zip(*(index_loss(*arrays, *x, "tpu") for x in (given, same)), strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("sparse", (True, False))
def test_no_array_has_all_tokens_and_entries(sparse, kernel):
    t, h, k, i, j, c, chosen = 65536, 64, 512, 64, 128, 16384, 512
    shapes = (1, t, h, k), (1, c, k), (1, t, h), (1, t, i, j), (1, t, i), (1, c, j)
    dtypes = "bfloat16", "bfloat16", "float32", "bfloat16", "float32", "bfloat16"
    arrays = [jax.ShapeDtypeStruct(*x) for x in zip(shapes, dtypes, strict=True)]
    numbers = [jax.ShapeDtypeStruct(s, jnp.int32) for s in ((1, t), (1, t), (1, t, chosen))]

    def run(*arguments):
        first, end, picks = arguments[6:]
        seen = Seen(first, first, end)
        choice = seen._replace(chosen=picks)
        given = (choice, None) if sparse else (seen, choice)
        return differentiated(kernel, arguments[:6], given)

    program = jax.make_jaxpr(run)(*arrays, *numbers)
    sizes = {v.aval.size for e in program.jaxpr.eqns for v in e.outvars}
    assert max(sizes) <= t * h * k  # the queries
    assert max(sizes - {t * h * k, t * i * j}) <= t * chosen


def test_what_does_not_fit_together_is_refused():
    arrays, seen, choice = operands(SHAPES["small"])
    for place in (1, 2, 4, 5):
        wrong = [x[:, 1:] if i == place else x for i, x in enumerate(arrays)]
        with pytest.raises(ValueError, match=r"index_loss: expected q \[b, t, h, k\]"):
            index_loss(*wrong, seen)
    with pytest.raises(ValueError, match="index_loss: expected q"):
        index_loss(*arrays, seen._replace(end=None))
    for given in ((choice, choice), (seen, seen)):
        with pytest.raises(ValueError, match="the best to be a choice from a range"):
            index_loss(*arrays, *given)
    bits = seen._replace(words=pack_chosen(choice.chosen, 70))
    for given in ((bits, None), (seen, bits)):
        with pytest.raises(ValueError, match="got their bits"):
            index_loss(*arrays, *given, "gpu")
    many, seen, _ = operands((1, 2, 129, 16, 1, 8, 4, 1))
    with pytest.raises(ValueError, match="at most 128 heads and 524288 queries"):
        index_loss(*many, seen, None, "gpu")


class OneSlotLate(Slots):
    """Slots of which the first is left out."""

    def slot(self, first, place):
        return super().slot(first + 1, place)


class NextTileToo(Slots):
    """Slots that take the first entry of the next tile."""

    def own(self, tile, first, place, entry):
        start = tile * self.tile
        return (first + place < self.chosen) & (entry >= start) & (entry <= start + self.tile)


class EndRead(Entries):
    """A range whose end is read, too."""

    def row(self, entry, end):
        return super().row(entry, end + 1)


@pytest.mark.parametrize(
    ("broken", "kernel"),
    [({"slots": OneSlotLate}, "GPU, slots"), ({"slots": NextTileToo}, "GPU, slots"),
     ({"entries": EndRead}, "GPU, range")],
)
def test_index_functions_that_are_one_off_are_refuted(broken, kernel):
    (proof, *_) = (proof for proof in claims.proofs(**broken) if proof.kernel.startswith(kernel))
    assert any(verdict.counterexample for verdict in proof.verdicts() if not verdict.proved)
