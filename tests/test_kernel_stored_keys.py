"""The indexer's kernels over a cache, interpreted, against scores sorted and the model's choice."""

from __future__ import annotations

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv4_jax.attention.cached import StoredEntries, select_entries
from dsv4_jax.attention.indexer import IndexQueries
from dsv4_jax.cache_format import decode_index_key, encode_index_key, round_index
from pallas_kernels.indexer import claims, gpu, gpu_stored, keys, select_stored, tpu_stored
from pallas_kernels.indexer.index import Merge, Packed, Tiled
from pallas_kernels.sparse_attention.index import Split

pytestmark = pytest.mark.heavy  # a minute of compiling

KERNELS = ("gpu", "tpu")
LAYER = 1
# Rows, tokens, heads, channels, entries, best, and what each query sees: nothing, fewer than are
# kept, as many, one more, all; lengths that are no multiple of a tile; the last parts empty.
SHAPES = [
    ((1, 5, 3, 32, 300, 20), (0, 7, 20, 21, 300)),
    ((2, 2, 16, 64, 90, 16), (90, 33, 1, 64)),
]


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Few entries make many parts, rounds, merges, tiles and chunks."""
    monkeypatch.setattr(gpu, "TILES", gpu.Tiles(64, 16, 8, 3))
    monkeypatch.setattr(gpu, "PROGRAMS", 64)
    monkeypatch.setattr(tpu_stored, "TILED", Tiled(256, 128, 128))


def cache_and_queries(shape, form: str):
    """Return what asks a cache, and the cache: small numbers, whose scores are exact and tie."""
    b, t, heads, channels, entries, _ = shape
    rng = np.random.default_rng(0)
    if form == "served":
        codes = rng.integers(0, 256, (3, b, entries, channels // 2))
        scales = rng.integers(126, 129, (3, b, entries, channels // 32))
        stored = jnp.asarray(np.concatenate([codes, scales], axis=-1), jnp.uint8)
    else:
        stored = jnp.asarray(rng.integers(-2, 3, (3, b, entries, channels)), form)
    queries = jnp.asarray(rng.integers(-2, 3, (b, t, heads, channels)), jnp.float32)
    return queries, jnp.asarray(rng.integers(-2, 3, (b, t, heads)), jnp.float32), stored


def wanted_numbers(queries, weights, stored, end, topk: int) -> list[list[int]]:
    """Return the best numbers of each query by sorting scores in NumPy."""
    form = "served" if stored.dtype == jnp.uint8 else str(stored.dtype)
    rows = decode_index_key(stored[LAYER], queries.shape[3], form, jnp.dtype("float32"))
    hits = np.einsum("btij,bcj->btic", *(np.asarray(x, np.float64) for x in (queries, rows)))
    scores = np.einsum("btic,bti->btc", np.maximum(hits, 0), np.asarray(weights, np.float64))
    if form == "served":
        scores = scores.astype(jnp.bfloat16).astype(np.float64)
    return [
        sorted(np.argsort(-scores[at][: end[at]], kind="stable")[:topk].tolist())
        for at in np.ndindex(end.shape)
    ]


def existing(numbers) -> list[list[int]]:
    return [sorted(x[x >= 0].tolist()) for x in np.asarray(numbers).reshape(-1, numbers.shape[2])]


@pytest.mark.parametrize("kernel", ("xla", *KERNELS))
@pytest.mark.parametrize("form", ("served", "float32"))
@pytest.mark.parametrize(("shape", "ends"), SHAPES, ids=str)
def test_the_choice_is_exact_and_ties_go_to_the_lowest_number(shape, ends, form, kernel):
    arrays = cache_and_queries(shape, form)
    end, topk = np.reshape(ends, shape[:2]), shape[5]
    if kernel == "gpu":
        assert gpu_stored.parts_for(end.size, shape[4], topk) > 1
    found = select_stored(*arrays, jnp.int32(LAYER), jnp.asarray(end, jnp.int32), topk, kernel)
    assert existing(found) == wanted_numbers(*arrays, end, topk)


@pytest.mark.parametrize("kernel", KERNELS)
def test_equal_scores_of_all_entries_give_the_first_ones(kernel):
    """Also of both zeros: heads without weight make 0 and -0."""
    shape = (1, 2, 2, 32, 400, 30)
    queries, _, stored = cache_and_queries(shape, "served")
    weights, end = jnp.asarray([[[0.0, 0.0], [-0.0, -0.0]]]), jnp.asarray([[400, 250]])
    found = select_stored(queries, weights, stored, LAYER, end, 30, kernel)
    assert existing(found) == [list(range(30))] * 2


@pytest.mark.parametrize("kernel", KERNELS)
def test_what_lies_beyond_the_end_is_of_no_account(kernel):
    """Bytes of infinite numbers there, and an end beyond the cache."""
    queries, weights, stored = cache_and_queries((1, 1, 2, 32, 150, 20), "served")
    spoilt = stored.at[LAYER, :, 100:].set(255)
    choose = jax.jit(lambda stored, end: select_stored(
        queries, weights, stored, LAYER, end[None, None], 20, kernel
    ))
    np.testing.assert_array_equal(choose(spoilt, 100), choose(stored, 100))
    np.testing.assert_array_equal(choose(stored, 5000), choose(stored, 150))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("form", ("served", "bfloat16"))
def test_the_choice_is_that_of_the_model(form, kernel):
    """Keys and queries as models make them; scores of neighbours differ by more than rounding."""
    b, t, heads, channels, entries, topk = 2, 1, 4, 64, 100, 12
    rng = np.random.default_rng(1)
    rows, queries = (
        jnp.asarray(rng.standard_normal(shape), jnp.float32)
        for shape in ((3, b, entries, channels), (b, t, heads, channels))
    )
    weights = jnp.asarray(rng.standard_normal((b, t, heads)), jnp.float32)
    stored, end = encode_index_key(rows, form), jnp.asarray([[100], [70]])
    config = SimpleNamespace(index_head_dim=channels, index_topk=topk)
    entries = StoredEntries(stored, jnp.int32(LAYER), config, form)
    numbers = select_entries(entries, IndexQueries(queries, weights, None), end)
    found = select_stored(round_index(queries, form), weights, stored, LAYER, end, topk, kernel)
    assert existing(found) == existing(numbers)


def test_every_byte_is_decoded_as_the_cache_does():
    codes = jnp.arange(256, dtype=jnp.uint8).reshape(16, 16)
    scales = jnp.arange(1, 241, 15, dtype=jnp.uint8)[:, None]
    stored = jnp.concatenate([codes, scales], axis=1)
    wanted = decode_index_key(stored, 32, "served", jnp.dtype("float32"))
    np.testing.assert_array_equal(keys.decoded(stored, 32, jnp.float32), wanted)


def test_a_cache_that_offsets_do_not_reach_is_cut_or_refused():
    """Pallas has offsets of 64 bits from 2^32 bytes on, of 32 bits below, and these have a sign."""
    def cache(layers, rows):
        return jax.ShapeDtypeStruct((layers, rows, 2**18, 68), jnp.uint8)

    assert gpu_stored.fits(128, cache(2, 120)) and gpu_stored.fits(128, cache(1, 100))
    assert gpu_stored.fits(128, cache(1, 300))
    assert not gpu_stored.fits(128, cache(1, 128))
    arrays = [
        jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((120, 1, 4, 128), (120, 1, 4))
    ]

    def layers(count):
        end = jax.ShapeDtypeStruct((120, 1), jnp.int32)
        program = jax.make_jaxpr(lambda *x: select_stored(*x[:3], 0, x[3], 16, "gpu"))(
            *arrays, cache(count, 120), end
        )
        calls = [e for e in program.eqns if e.primitive.name == "pallas_call"]
        return calls[0].invars[2].aval.shape[0]

    assert (layers(2), layers(3)) == (1, 3)


def test_what_does_not_fit_together_is_refused():
    queries, weights, stored = cache_and_queries(SHAPES[0][0], "served")
    end = jnp.ones((1, 5), jnp.int32)
    for wrong in ((queries, weights[:, 1:], stored), (queries, weights, stored[..., 1:]),
                  (queries, weights, stored[:, :, :0])):
        with pytest.raises(ValueError, match=r"indexer: expected queries \[b, t, i, j\]"):
            select_stored(*wrong, LAYER, end, 4)
    many, weights = (jnp.zeros((1, 17, 4, *rest)) for rest in ((32,), ()))
    with pytest.raises(ValueError, match="expected at most 16 tokens.* got 17 tokens"):
        select_stored(many, weights, stored, LAYER, jnp.ones((1, 17), jnp.int32), 4, "gpu")
    odd, stored = jnp.zeros((1, 1, 4, 48)), jnp.zeros((1, 1, 9, 26), jnp.uint8)
    with pytest.raises(ValueError, match="a power of two.* 48 channels"):
        select_stored(odd, weights[:, :1], stored, 0, end[:, :1], 4, "gpu")


class OverlappingParts(Split):
    """Parts that each end one entry too late."""

    def piece(self, begin, end, part):
        first, last = super().piece(begin, end, part)
        return first, last + 1


class OneGroupLess(Merge):
    """Groups that leave out the last parts."""

    @property
    def groups(self):
        return self.parts // self.size - 1


class ScalesOneOff(Packed):
    """Scales that begin one byte too late."""

    def scale(self, group):
        return super().scale(group) + 1


class RowsOneOff(Tiled):
    """Tiles whose scores lie one row too far."""

    def row(self, step, tile):
        return super().row(step, tile) + 1


@pytest.mark.parametrize(
    ("broken", "kernel"),
    [
        ({"split": OverlappingParts}, "GPU, entries"), ({"packed": ScalesOneOff}, "GPU, packed"),
        ({"merge": OneGroupLess}, "GPU, the best"), ({"tiled": RowsOneOff}, "TPU, entries"),
    ],
)
def test_index_functions_that_are_one_off_are_refuted(broken, kernel):
    found = [proof for proof in claims.proofs(**broken) if proof.kernel.startswith(kernel)]
    refuted = [v for v in found[-1].verdicts() if not v.proved]
    assert any(verdict.counterexample for verdict in refuted)
