"""The kernels of cached attention, interpreted, against all keys of a row in one softmax."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiling import quick_jit
from test_kernels_in_model import CONFIG

from dsv4_jax.cache_format import decode_entry, encode_entry
from pallas_kernels.cached_attention import (
    MOST_SLOTS,
    Cached,
    cached_attention,
    cases,
    claims,
    gpu,
)
from pallas_kernels.cached_attention.index import Column, Ring, Split, Steps, Tiles

KERNELS = ("gpu", "tpu")
SERVED = "served"
SUMS = {"float32": 1e-5, "bfloat16": 2**-7}  # of the largest value: other order; roundings
LAYERS, LAYER = 3, 1


def config_of(width: int, rotated: int):
    return dataclasses.replace(
        CONFIG, head_dim=width, qk_rope_head_dim=rotated, index_head_dim=128
    )


def stored(rng, shape, config, form: str):
    """Return rows of random numbers of many sizes, as a cache stores them."""
    numbers = rng.standard_normal((*shape, config.head_dim)) * 2.0 ** rng.integers(-3, 2, shape)[
        ..., None
    ]
    return coder(encode_entry, config, form)(jnp.asarray(numbers, jnp.float32))


@functools.cache
def coder(code, config, *form):
    return quick_jit(lambda x: code(x, config, *form))


def operands(rows, tokens, heads, form, *, width=64, rotated=8, slots=16, count=0, chosen=0,
             dtype="float32", starts=None, seed=0):
    """Return the arguments of one call, and a config of such rows."""
    rng, config = np.random.default_rng(seed), config_of(width, rotated)
    starts = np.asarray(starts if starts is not None else rng.integers(0, 4 * slots, rows))
    q = jnp.asarray(rng.standard_normal((rows, tokens, heads, width)), dtype)
    new = stored(rng, (rows, tokens), config, form)
    ring = stored(rng, (LAYERS, rows, slots), config, form)
    sink = jnp.asarray(rng.standard_normal(heads), jnp.float32)
    cached = Cached(ring, jnp.int32(LAYER), jnp.asarray(starts, jnp.int32))
    if count:
        entries = stored(rng, (LAYERS, rows, count), config, form)
        cached = cached._replace(entries=entries)
        if chosen:
            picks = np.full((rows, tokens, chosen), -1)
            for row, token in np.ndindex(rows, tokens):
                some = rng.integers(0, min(chosen, count) + 1)
                places = rng.choice(chosen, some, replace=False)
                picks[row, token, places] = rng.choice(count, some, replace=False)
            cached = cached._replace(chosen=jnp.asarray(picks, jnp.int32))
        else:
            end = np.sort(rng.integers(0, count + 1, (rows, tokens)), axis=1)
            end[0, -1] = count
            cached = cached._replace(end=jnp.asarray(end, jnp.int32))
    return (q, new, sink, cached), config


def written_out(q, new, sink, cached: Cached, config, form: str) -> np.ndarray:
    """Attend by the definition: for each query a list of keys by position, in float64."""
    def numbers(x):
        decode = coder(decode_entry, config, form, jnp.dtype("float32"))
        return np.asarray(decode(x), np.float64)

    q, sink = np.asarray(q, np.float64), np.asarray(sink, np.float64)
    ring, new = numbers(cached.ring[cached.layer]), numbers(new)
    entries = None if cached.entries is None else numbers(cached.entries[cached.layer])
    out, slots = np.zeros(q.shape), ring.shape[1]
    for row, token in np.ndindex(q.shape[:2]):
        start = int(cached.start[row])
        kv = []
        for position in range(max(0, start + token - slots + 1), start + token + 1):
            at = position - start
            kv.append(new[row, at] if at >= 0 else ring[row, position % slots])
        if cached.chosen is not None:
            kv += [entries[row, i] for i in np.asarray(cached.chosen[row, token]) if i >= 0]
        elif entries is not None:
            kv += list(entries[row, : int(cached.end[row, token])])
        kv = np.stack(kv)
        logits = q[row, token] @ kv.T / q.shape[3] ** 0.5
        weights = np.exp(logits - logits.max(axis=1, keepdims=True))
        total = weights.sum(axis=1) + np.exp(sink - logits.max(axis=1))
        out[row, token] = weights @ kv / total[:, None]
    return out


def assert_close(actual, wanted, dtype: str) -> None:
    actual = np.asarray(actual, np.float64)
    assert np.abs(actual - wanted).max() <= SUMS[dtype] * np.abs(wanted).max()


CALLS = {
    "window": dict(rows=2, tokens=1, heads=4),
    "window, empty rows, several tokens": dict(rows=3, tokens=3, heads=4, starts=[0, 1, 40]),
    "range": dict(rows=3, tokens=1, heads=3, count=300),
    "range, several tokens": dict(rows=2, tokens=4, heads=4, count=70, slots=40),
    "chosen": dict(rows=2, tokens=2, heads=4, count=300, chosen=90),
    "groups of channels": dict(rows=1, tokens=2, heads=4, width=144, rotated=16, count=50),
    "ragged": dict(rows=2, tokens=1, heads=4, width=24, rotated=4, count=40, chosen=20),
}


def attend(arguments, config, kernel: str, **options):
    call = functools.partial(
        cached_attention, rotated=config.qk_rope_head_dim, implementation=kernel, **options
    )
    return quick_jit(call)(*arguments)


def forms():
    """Return pairs of a call and a form; plain numbers in a few calls only."""
    for name in CALLS:
        quick = name in ("range, several tokens", "chosen")
        yield pytest.param(name, SERVED, marks=[] if quick else pytest.mark.heavy)
        yield pytest.param(name, "float32", marks=pytest.mark.heavy)
    yield pytest.param("range, several tokens", "bfloat16", marks=pytest.mark.heavy)


@pytest.mark.parametrize("kernel", ("xla", *KERNELS))
@pytest.mark.parametrize(("name", "form"), tuple(forms()))
def test_queries_attend_to_what_the_definition_shows(name, form, kernel):
    arguments, config = operands(form=form, **CALLS[name])
    found = attend(arguments, config, kernel)
    assert_close(found, written_out(*arguments, config, form), "float32")


@pytest.mark.heavy
@pytest.mark.parametrize("kernel", KERNELS)
def test_rows_as_released_models_store_them(kernel):
    arguments, config = operands(
        1, 2, 16, SERVED, width=512, rotated=64, slots=128, count=700, dtype="bfloat16"
    )
    found = attend(arguments, config, kernel)
    assert found.dtype == jnp.bfloat16
    assert_close(found, written_out(*arguments, config, SERVED), "bfloat16")


@pytest.mark.heavy
@pytest.mark.parametrize("programs", (1, 4, 264))
def test_any_number_of_pieces_gives_the_same(programs, monkeypatch):
    """Of rows that need all pieces, some and one."""
    monkeypatch.setattr(gpu, "PROGRAMS", programs)
    arguments, config = operands(3, 1, 4, "float32", count=1500, slots=40)
    q, new, sink, cached = arguments
    cached = cached._replace(end=jnp.asarray([[1500], [170], [0]], jnp.int32))
    arguments = q, new, sink, cached
    found = attend(arguments, config, "gpu")
    assert_close(found, written_out(*arguments, config, "float32"), "float32")


@pytest.mark.heavy
@pytest.mark.parametrize("kernel", KERNELS)
def test_a_row_s_bits_do_not_depend_on_its_batch_or_the_size_of_the_cache(kernel, monkeypatch):
    monkeypatch.setattr(gpu, "PROGRAMS", 6)  # so that pieces of the batch would be longer
    (q, new, sink, cached), config = operands(3, 1, 4, SERVED, count=1024, slots=40)
    cached = cached._replace(end=jnp.asarray([[1024], [300], [7]], jnp.int32))
    batch = attend((q, new, sink, cached), config, kernel, invariant=True)
    alone = cached._replace(
        ring=cached.ring[:, 1:2], start=cached.start[1:2], entries=cached.entries[:, 1:2, :512],
        end=cached.end[1:2],
    )
    found = attend((q[1:2], new[1:2], sink, alone), config, kernel, invariant=True)
    np.testing.assert_array_equal(np.asarray(found[0]), np.asarray(batch[1]))


def test_no_copy_of_a_cache_is_made():
    """Before the kernel of a GPU: only views of stored rows, whatever the layer."""
    large = ("Flash: HCA, 1 x 1, context 1,048,576", "Flash: CSA, 1 x 1, context 1,048,576",
             "Flash: window, 128 x 1, context 131,072")  # fmt: skip
    found = {case.name: case for case in cases.cases()}
    for name in large:
        program = jax.make_jaxpr(found[name].run("gpu"))(*found[name].arguments)
        views = {"reshape", "bitcast_convert_type"}
        assert large_results(program.jaxpr) - {"pallas_call"} == views


def large_results(program) -> set[str]:
    """Return what makes arrays of more than four million elements, within functions, too."""
    made = set()
    for equation in program.eqns:
        if equation.primitive.name == "jit":
            made |= large_results(equation.params["jaxpr"].jaxpr)
        elif any(out.aval.size > 2**22 for out in equation.outvars):
            made.add(equation.primitive.name)
    return made


def test_an_end_beyond_the_entries_is_theirs():
    """As of padding after the last token of a cache that is full."""
    (q, new, sink, cached), config = operands(2, 2, 4, SERVED, count=20)
    ends = [cached._replace(end=jnp.full((2, 2), end, jnp.int32)) for end in (20, 21)]
    found = [np.asarray(attend((q, new, sink, x), config, "gpu")) for x in ends]
    np.testing.assert_array_equal(*found)


def test_what_does_not_fit_together_is_refused():
    (q, new, sink, cached), _ = operands(2, 1, 4, SERVED, count=20)
    wrong = [
        (q, new[..., 1:], sink, cached), (q, new, sink[1:], cached),
        (q, new.astype("int32"), sink, cached), (q, new, sink, cached._replace(end=None)),
        (q, new, sink, cached._replace(entries=cached.entries[:1])),
    ]
    for arguments in wrong:
        with pytest.raises(ValueError, match=r"cached_attention: expected q \[b, t, h, k\]"):
            cached_attention(*arguments, rotated=8)
    (q, new, sink, cached), _ = operands(1, 9, 4, "float32")
    with pytest.raises(ValueError, match="at most 8 tokens of a row"):
        cached_attention(q, new, sink, cached, rotated=8, implementation="gpu")
    wide = jnp.zeros((1, 1, MOST_SLOTS + 1, q.shape[3]))
    with pytest.raises(ValueError, match="ring of at most 1024 slots .* got 1025"):
        cached_attention(
            q[:, :1], new[:, :1], sink, cached._replace(ring=wide), rotated=8, implementation="tpu"
        )
    with pytest.raises(ValueError, match="at most 4 tokens, the ring's, got 9"):
        cached_attention(
            q, new, sink, cached._replace(ring=cached.ring[:, :, :4]), rotated=8
        )


class OldestSeen(Ring):
    """A ring whose oldest key is seen one token too long."""

    def sees(self, place, slot, start):
        position = self.position(slot, start)
        return (position >= 0) & (position >= start + place - self.slots)


class NewLeft(Tiles):
    """Tiles of which the new tokens' is taken by no piece that begins with it."""

    def new(self, first, last):
        return super().new(first + 1, last)


class GapLeft(Split):
    """Pieces that are one tile short."""

    def piece(self, tiles, part):
        first, last = super().piece(tiles, part)
        return first, last - 1


class OnePast(Column):
    """Columns that go on past the last one."""

    def at(self, place):
        return super().at(place) + 1


class LastBlockLeft(Steps):
    """Steps without the block of the last entry."""

    def wanted(self, step, end):
        return super().wanted(step, end - 1)


@pytest.mark.parametrize("broken", (
    {"ring": OldestSeen}, {"tiles": NewLeft}, {"split": GapLeft}, {"column": OnePast},
    {"steps": LastBlockLeft},
), ids=str)
def test_index_functions_that_are_one_off_are_refuted(broken):
    refuted = [v for p in claims.proofs(**broken) for v in p.verdicts() if not v.proved]
    assert any(verdict.counterexample for verdict in refuted)
