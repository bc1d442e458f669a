"""The kernels of the indexer, interpreted, against scores written out and sorted."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv4_jax.attention.indexer import index_scores, top_entries
from pallas_kernels.indexer import claims, gpu, reference, select
from pallas_kernels.indexer.index import Programs, Rounds, Steps
from pallas_kernels.sparse_attention import Seen
from pallas_kernels.sparse_attention.seen import unpacked

pytestmark = pytest.mark.heavy  # a minute of compiling

KERNELS = ("gpu", "tpu")
# Rows, tokens, heads, width, entries, best: one entry, fewer than are kept, several rounds.
SHAPES = [
    (1, 1, 1, 8, 1, 4), (2, 9, 4, 16, 200, 20), (1, 5, 16, 32, 70, 100), (1, 12, 3, 8, 600, 64),
]


@pytest.fixture(autouse=True)
def small_rounds(monkeypatch):
    """Few slots need several rounds for few entries; programs take several queries."""
    monkeypatch.setattr(gpu, "TILES", gpu.Tiles(128, 16, 8, 3))
    monkeypatch.setattr(gpu, "PROGRAMS", 5)


def operands(shape, dtype="float32"):
    """Return queries, weights and keys of small integers, whose scores are exact and often tie."""
    b, t, heads, width, entries, _ = shape
    rng = np.random.default_rng(0)

    def integers(*shape):
        return jnp.asarray(rng.integers(-2, 3, shape), dtype)

    first = rng.integers(0, entries, (b, t))
    end = np.minimum(first + rng.integers(0, entries + 1, (b, t)), entries)
    first[0, 0], end[0, 0] = 0, entries
    if t > 1:
        end[-1, -1] = first[-1, -1]  # a query that sees nothing
    seen = Seen(*(jnp.asarray(x, jnp.int32) for x in (first, first, end)))
    return (integers(b, t, heads, width), integers(b, t, heads), integers(b, entries, width)), seen


def mask_of(seen: Seen, entries: int) -> np.ndarray:
    if seen.words is not None:
        return np.asarray(unpacked(seen.words, entries))
    mask = np.zeros((*seen.chosen.shape[:2], entries), bool)
    for row, query in np.ndindex(mask.shape[:2]):
        numbers = np.asarray(seen.chosen[row, query])
        numbers = numbers[numbers >= 0]
        assert (np.diff(numbers) > 0).all()
        mask[row, query, numbers] = True
    return mask


@pytest.mark.parametrize("kernel", ("xla", *KERNELS))
@pytest.mark.parametrize("dtype", ("float32", "bfloat16"))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_choice_is_exact_and_ties_go_to_the_lowest_number(shape, dtype, kernel):
    arrays, seen = operands(shape, dtype)
    entries, topk = shape[4:]
    numbers = np.arange(entries)
    visible = (numbers >= np.asarray(seen.first)[..., None]) & (
        numbers < np.asarray(seen.end)[..., None]
    )
    # The model's own scores and choice; integers make sums exact in any order.
    queries, weights, keys = arrays
    scores = index_scores(queries[:, :, None], weights[:, :, None], keys)[:, :, 0]
    wanted = np.zeros(visible.shape, bool)
    if topk <= entries:
        index, exists = top_entries(scores, jnp.asarray(visible), topk)
        for row, query in np.ndindex(visible.shape[:2]):
            wanted[row, query, np.asarray(index[row, query])[np.asarray(exists[row, query])]] = True
    else:
        wanted = visible
    found = select(*arrays, seen, topk, kernel)
    np.testing.assert_array_equal(mask_of(found, entries), wanted)


@pytest.mark.parametrize("kernel", KERNELS)
def test_scores_of_any_size_and_sign_are_ordered(kernel):
    """Queries along an axis make a key's score any number: zeros of both signs, huge, tiny."""
    rng = np.random.default_rng(0)
    entries, topk = 300, 40
    values = rng.standard_normal(entries) * 10.0 ** rng.integers(-30, 30, entries)
    values[::7], values[3::11] = 0.0, -0.0
    keys = jnp.zeros((1, entries, 8)).at[0, :, 0].set(jnp.asarray(np.abs(values), jnp.float32))
    queries = jnp.zeros((1, 2, 2, 8)).at[0, :, 0, 0].set(1.0)
    weights = jnp.asarray([[[1.0, 0.0], [-1.0, 0.0]]])  # all scores above 0, then all below
    seen = Seen(*(jnp.asarray([[x, x]], jnp.int32) for x in (0, 0, entries)))
    wanted = mask_of(seen._replace(
        chosen=reference.select(queries, weights, keys, seen.first, seen.end, topk)
    ), entries)
    found = select(queries, weights, keys, seen, topk, kernel)
    np.testing.assert_array_equal(mask_of(found, entries), wanted)
    assert wanted[0].sum(axis=1).tolist() == [topk, topk]


@pytest.mark.parametrize("kernel", ("xla", *KERNELS))
def test_rounded_scores_tie_where_bfloat16_is_too_coarse(kernel):
    """Scores 256, 257, ... lie between neighbours of bfloat16, which are 2 apart, ties to even."""
    entries, topk = 40, 11
    values = np.random.default_rng(0).permutation(256 + np.arange(entries)).astype(np.float32)
    keys = jnp.zeros((1, entries, 16)).at[0, :, 0].set(values)
    queries = jnp.zeros((1, 1, 1, 16)).at[0, 0, 0, 0].set(1.0)
    seen = Seen(*(jnp.full((1, 1), x, jnp.int32) for x in (0, 0, entries)))
    rounded = values.astype(jnp.bfloat16).astype(np.float32)
    wanted = {
        exact: np.sort(np.argsort(-x, kind="stable")[:topk])
        for exact, x in ((True, values), (False, rounded))
    }
    assert set(wanted[True].tolist()) != set(wanted[False].tolist())
    for exact, numbers in wanted.items():
        choose = jax.jit(functools.partial(
            select, topk=topk, implementation=kernel, rounded=not exact
        ))
        found = choose(queries, jnp.ones((1, 1, 1)), keys, seen)
        np.testing.assert_array_equal(np.flatnonzero(mask_of(found, entries)[0, 0]), numbers)


@pytest.mark.parametrize("kernel", KERNELS)
def test_no_array_has_all_tokens_and_entries(kernel, monkeypatch):
    monkeypatch.setattr(gpu, "TILES", gpu.Tiles(8192, 128, 8, 3))
    monkeypatch.setattr(gpu, "PROGRAMS", 264)
    tokens, entries = 65536, 16384
    shapes = ((1, tokens, 64, 128), (1, tokens, 64), (1, entries, 128))
    arrays = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes]
    numbers = [jax.ShapeDtypeStruct((1, tokens), jnp.int32)] * 2

    def run(queries, weights, keys, first, end):
        found = select(queries, weights, keys, Seen(first, first, end), 512, kernel)
        return found.words if found.chosen is None else found.chosen

    program = jax.make_jaxpr(run)(*arrays, *numbers)
    sizes = [v.aval.size for e in program.jaxpr.eqns for v in e.outvars]
    assert max(sizes) <= tokens * 64 * 128  # the queries, filled up
    assert max(s for s in sizes if s != tokens * 64 * 128) <= tokens * 512


def test_what_does_not_fit_together_is_refused():
    (queries, weights, keys), seen = operands(SHAPES[1])
    for wrong in ((queries, weights[:, 1:], keys), (queries, weights, keys[..., 1:]),
                  (queries, weights, keys[:, :0])):
        with pytest.raises(ValueError, match=r"indexer: expected queries \[b, t, i, j\]"):
            select(*wrong, seen, 4)
    with pytest.raises(ValueError, match="and 0$"):
        select(queries, weights, keys, seen, 0)


class OneSlotShort(Rounds):
    """Rounds that each begin one entry too early."""

    def entry(self, first, round_, slot):
        return first + round_ * (self.new - 1) + slot - self.topk


class LastQueryTwice(Programs):
    """Programs that each take one query more than they should."""

    def length(self, program):
        return super().length(program) + 1


class LastBlockLeft(Steps):
    """Steps that leave out the last block."""

    def wanted(self, step, first, last):
        return (step >= first) & (step < last)


@pytest.mark.parametrize(
    ("broken", "kernel"),
    [
        ({"rounds": OneSlotShort}, "GPU, best"), ({"programs": LastQueryTwice}, "GPU, queries"),
        ({"steps": LastBlockLeft}, "TPU, blocks"),
    ],
)
def test_index_functions_that_are_one_off_are_refuted(broken, kernel):
    found = [proof for proof in claims.proofs(**broken) if proof.kernel.startswith(kernel)]
    assert found
    for proof in found[:3]:
        refuted = [v for v in proof.verdicts() if not v.proved]
        assert any(verdict.counterexample for verdict in refuted)
