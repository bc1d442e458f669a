"""The kernels of sparse attention, interpreted, against every logit written out."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.sparse_attention import (
    Seen,
    claims,
    gpu_chosen,
    reference,
    sparse_attention,
    tpu_queries,
)
from pallas_kernels.sparse_attention.index import Bits, Blocks, Entries, Shares, Split, Window
from pallas_kernels.sparse_attention.seen import pack_chosen

pytestmark = pytest.mark.heavy  # a minute of compiling

KERNELS = ("gpu", "tpu")
ROUNDING = 1e-5  # of the largest value: float32 sums in another order
BFLOAT16 = 2**-6  # of the largest value: weights and results rounded, in other places
WINDOW, RATIO = 20, 4


def documents(*lengths):
    """Return the layout of a row of documents: first keys, and the entries that are seen."""
    first_key, first, end, complete = [], [], [], 0
    for length in lengths:
        start = len(first_key)
        first_key += [start] * length
        first += [complete] * length
        end += [complete + (i + 1) // RATIO for i in range(length)]
        complete += length // RATIO
    return np.array([first_key, first, end], np.int32)


# Name, rows of documents, heads, channels, chosen entries. A document ends within a tile of keys
# and of entries; one is shorter than the window, one than a block, one a single token.
CASES = {
    "one token": ([[1]], 4, 16, 8),
    "one short of a tile": ([[31]], 16, 32, 8),
    "documents": ([[70, 3, 62], [1, 100, 34]], 16, 32, 8),
    "more heads than a group": ([[50]], 80, 24, 40),
}


def operands(rows, heads, channels, chosen, dtype="float32"):
    rng = np.random.default_rng(0)
    layout = np.stack([documents(*lengths) for lengths in rows], axis=1)
    first_key, first, end = layout
    b, t = first_key.shape
    count = max(1, t // RATIO)
    picks = np.full((b, t, chosen), -1, np.int32)
    for row, query in np.ndindex(b, t):
        seen = rng.permutation(np.arange(first[row, query], end[row, query]))[: chosen - 2]
        places = rng.permutation(chosen)[: len(seen)]  # what is missing may lie between
        picks[row, query, places] = seen

    def normal(*shape):
        return jnp.asarray(rng.standard_normal(shape), dtype)

    arrays = (
        normal(b, t, heads, channels), normal(b, t, channels), normal(b, count, channels),
        jnp.asarray(rng.standard_normal(heads), jnp.float32),
    )
    return arrays, Seen(*map(jnp.asarray, (first_key, first, end, picks)))


def of_kind(kind, arrays, seen):
    """Return the operands of a window, a range or a choice of entries, and the mask of these."""
    q, keys, entries, sink = arrays
    if kind == "window":
        return (q, keys, None, sink), Seen(seen.first_key), None
    if kind == "range":
        mask = reference.range_mask(seen.first, seen.end, entries.shape[1])
        return arrays, seen._replace(chosen=None), mask
    return arrays, seen, reference.chosen_mask(seen.chosen, entries.shape[1])


def written_out(arrays, seen, mask):
    """Return output, log total, and what to differentiate: the definition, in float32."""
    key_mask = reference.window_mask(seen.first_key, WINDOW)

    def attend(q, keys, entries, sink):
        b, t, _, channels = q.shape
        none = jnp.zeros((b, 0, channels), q.dtype)
        shown = (jnp.zeros((b, t, 0), bool), none) if entries is None else (mask, entries)
        return reference.sparse_attention(q, keys, shown[1], sink, key_mask, shown[0])

    return attend


def close(actual, wanted, tolerance):
    actual, wanted = np.asarray(actual, np.float64), np.asarray(wanted, np.float64)
    assert actual.shape == wanted.shape
    return np.abs(actual - wanted).max() <= tolerance * max(np.abs(wanted).max(), 1e-3)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("kind", ("window", "range", "chosen"))
@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients_are_those_of_the_definition(case, kind, kernel):
    check_values_and_gradients(case, kind, kernel)


@pytest.mark.parametrize("case", CASES)
def test_entries_gather_what_queries_give_them(case, monkeypatch):
    """As on GPU if there are many entries; here in parts of a few queries, the last one short."""
    monkeypatch.setattr(gpu_chosen, "MANY", 0)
    monkeypatch.setattr(gpu_chosen, "BYTES", 50 * 4 * 32 * 32)
    check_values_and_gradients(case, "chosen", "gpu")


def check_values_and_gradients(case, kind, kernel):
    arrays, seen, mask = of_kind(kind, *operands(*CASES[case]))
    definition = written_out(arrays, seen, mask)
    wanted, pull_back = jax.vjp(definition, *arrays)
    found, pull_back_kernel = jax.vjp(
        lambda *arrays: sparse_attention(*arrays, seen, WINDOW, kernel), *arrays
    )
    for actual, value in zip(found, wanted, strict=True):
        assert close(actual, value, ROUNDING)
    rng = np.random.default_rng(1)
    grads = tuple(jnp.asarray(rng.standard_normal(x.shape), x.dtype) for x in wanted)
    names = ("q", "keys", "entries", "sink")
    for name, actual, value in zip(
        names, pull_back_kernel(grads), pull_back(grads), strict=True
    ):
        assert (actual is None and value is None) or close(actual, value, ROUNDING), name


@pytest.mark.parametrize("kernel", KERNELS)
def test_bfloat16_is_summed_in_float32(kernel):
    arrays, seen, mask = of_kind("chosen", *operands(*CASES["documents"], dtype="bfloat16"))
    definition = written_out(arrays, seen, mask)
    precise = [x.astype(jnp.float32) for x in arrays]
    (wanted, _), pull_back = jax.vjp(definition, *precise)
    (found, total), pull_back_kernel = jax.vjp(
        lambda *arrays: sparse_attention(*arrays, seen, WINDOW, kernel), *arrays
    )
    assert (found.dtype, total.dtype) == (jnp.bfloat16, jnp.float32)
    assert close(found, wanted, BFLOAT16)
    grad = jnp.asarray(np.random.default_rng(1).standard_normal(found.shape), jnp.bfloat16)
    values = pull_back((grad.astype(jnp.float32), jnp.zeros_like(total)))
    for actual, value in zip(pull_back_kernel((grad, jnp.zeros_like(total))), values, strict=True):
        assert close(actual, value, BFLOAT16)


def test_the_plain_implementation_is_the_definition():
    arrays, seen, mask = of_kind("chosen", *operands(*CASES["documents"]))
    wanted, pull_back = jax.vjp(written_out(arrays, seen, mask), *arrays)
    found, pull_back_plain = jax.vjp(
        lambda *arrays: sparse_attention(*arrays, seen, WINDOW, "xla"), *arrays
    )
    for actual, value in zip((*found, *pull_back_plain(wanted)), (*wanted, *pull_back(wanted)),
                             strict=True):
        np.testing.assert_array_equal(actual, value)


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_query_that_sees_no_key_gets_nothing(kernel):
    (q, keys, entries, sink), seen = operands([[40]], 16, 32, 8)
    nothing = seen._replace(
        first_key=jnp.arange(40, dtype=jnp.int32)[None] + 1, first=seen.end, chosen=None
    )
    out, log_total = sparse_attention(q, keys, entries, sink, nothing, WINDOW, kernel)
    np.testing.assert_array_equal(out, 0)
    assert close(log_total, np.broadcast_to(sink, log_total.shape), ROUNDING)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("kind", ("range", "chosen"))
def test_entries_in_many_blocks_are_found(kind, kernel):
    """The ranges of queries move over 5,000 entries: ten blocks on TPU, two rows of words."""
    rng = np.random.default_rng(0)
    t, count, channels, chosen = 40, 5000, 16, 24
    first = np.sort(rng.integers(0, count, t))
    end = np.maximum.accumulate(np.minimum(first + rng.integers(0, 700, t), count))
    first[-1], end[-1] = count, count  # nothing is left, past the last block
    picks = np.full((1, t, chosen), -1, np.int32)
    for query in range(t):
        seen = rng.permutation(np.arange(first[query], end[query]))[:chosen]
        picks[0, query, : len(seen)] = seen
    arrays = tuple(
        jnp.asarray(rng.standard_normal(shape), jnp.float32)
        for shape in ((1, t, 4, channels), (1, t, channels), (1, count, channels), (4,))
    )
    seen = Seen(jnp.zeros((1, t), jnp.int32), *(
        jnp.asarray(x, jnp.int32) for x in (first[None], end[None], picks)
    ))
    arrays, seen, mask = of_kind(kind, arrays, seen)
    wanted, pull_back = jax.vjp(written_out(arrays, seen, mask), *arrays)
    found, pull_back_kernel = jax.vjp(
        lambda *arrays: sparse_attention(*arrays, seen, WINDOW, kernel), *arrays
    )
    for actual, value in zip(
        (*found, *pull_back_kernel(wanted)), (*wanted, *pull_back(wanted)), strict=True
    ):
        assert close(actual, value, ROUNDING)


@pytest.mark.parametrize("kernel", ("xla", *KERNELS))
@pytest.mark.parametrize("kind", ("window", "range", "chosen"))
@pytest.mark.parametrize("before", (1, 128, 130))
def test_queries_of_a_rows_end_are_those_of_the_row(before, kind, kernel):
    """Their keys begin before them: within a block of a TPU's, at one's end, in the next."""
    (q, *rest), seen, _ = of_kind(kind, *operands([[70, 3, 62], [1, 100, 34]], 16, 32, 8))
    wanted = sparse_attention(q, *rest, seen, WINDOW, "xla")
    at_end = jax.tree.map(lambda x: x[:, before:], seen)
    found = sparse_attention(q[:, before:], *rest, at_end, WINDOW, kernel)
    for actual, value in zip(found, wanted, strict=True):
        assert close(actual, value[:, before:], ROUNDING)


def test_blocks_that_are_read_exist_past_the_last_entry():
    blocks = tpu_queries.blocks_of(4, WINDOW)
    (q, keys, entries, sink), seen = operands([[40]], 4, 16, 8)
    past = jnp.full((1, 40), entries.shape[1], jnp.int32)
    x = tpu_queries.fitted(
        q, keys, entries, sink, seen._replace(first=past, end=past, chosen=None), blocks
    )
    assert int(x.first.min()) == int(x.last.max()) == 0


@pytest.mark.parametrize("kernel", ("xla", *KERNELS))
def test_without_an_entry_there_is_the_window_alone(kernel):
    (q, keys, _, sink), seen = operands([[3]], 4, 16, 8)
    nothing = jnp.zeros((1, 3), jnp.int32)
    seen = Seen(seen.first_key, nothing, nothing)
    sink = sink.astype(jnp.bfloat16)  # of any dtype

    def loss(entries, *arrays):
        return jnp.sum(jnp.sin(sparse_attention(*arrays, entries, sink, seen, WINDOW, kernel)[0]))

    grads = jax.grad(loss, argnums=(0, 1, 2))(jnp.zeros((1, 0, 16)), q, keys)
    wanted = jax.grad(loss, argnums=(1, 2))(None, q, keys)
    assert grads[0].shape == (1, 0, 16)
    for actual, value in zip(grads[1:], wanted, strict=True):
        assert close(actual, value, ROUNDING)


def test_what_does_not_fit_together_is_refused():
    (q, keys, entries, sink), seen = operands([[8]], 4, 16, 8)
    for wrong in ((q, keys[:, 1:], entries, sink, seen), (q, keys, entries[..., 1:], sink, seen),
                  (q, keys, entries, sink, Seen(seen.first_key))):
        with pytest.raises(ValueError, match=r"sparse_attention: expected q \[b, t, h, k\]"):
            sparse_attention(*wrong, WINDOW, "gpu")
    with pytest.raises(ValueError, match="as many keys as queries, to be differentiated, got 8"):
        late = jax.tree.map(lambda x: x[:, 1:], seen)
        jax.vjp(lambda q: sparse_attention(q, keys, entries, sink, late, WINDOW), q[:, 1:])
    many = jnp.zeros((1, 8, 129, 16)), keys, None, jnp.zeros(129), Seen(seen.first_key)
    with pytest.raises(ValueError, match="at most 128 heads and 524288 queries"):
        sparse_attention(*many, WINDOW, "tpu")
    with pytest.raises(ValueError, match="got their bits"):
        words = seen._replace(chosen=None, words=pack_chosen(seen.chosen, entries.shape[1]))
        sparse_attention(q, keys, entries, sink, words, WINDOW, "gpu")


def test_chosen_entries_are_packed_to_bits():
    rng = np.random.default_rng(0)
    count = 9000
    chosen = np.stack([rng.permutation(count)[:50] for _ in range(6)]).reshape(2, 3, 50)
    chosen[0, 0, 7] = -1
    chosen[1, 2] = -1
    words = np.asarray(pack_chosen(jnp.asarray(chosen, jnp.int32), count))
    bits = Bits(count)
    entry = np.arange(count)
    places = [bits.word(int(e)) for e in entry], [bits.bit(int(e)) for e in entry]
    unpacked = (words[:, :, places[0]] >> np.array(places[1])) & 1
    wanted = np.zeros((2, 3, count), int)
    for row, query in np.ndindex(2, 3):
        wanted[row, query, chosen[row, query][chosen[row, query] >= 0]] = 1
    np.testing.assert_array_equal(unpacked, wanted)
    assert len(set(zip(*places, strict=True))) == count


class WindowOneShort(Window):
    """A window that leaves out the earliest key."""

    def first(self, query, first_key):
        return super().first(query, first_key) + 1


class EndIncluded(Entries):
    """A range that shows the entry at its end, too."""

    def sees(self, end, entry):
        return entry <= end


class SharedBits(Bits):
    """Bits of which the next 128 entries use one again."""

    def bit(self, entry):
        return super().bit(entry + 1)


class GroupsSwapped(Shares):
    """Shares of which a group's follow those of the group after it."""

    def row(self, slot, group):
        return super().row(slot, self.groups - 1 - group)


class PiecesOverlap(Split):
    """Pieces that each go one query too far."""

    def piece(self, begin, end, part):
        first, last = super().piece(begin, end, part)
        return first, last + 1


class BlocksOneShort(Blocks):
    """Blocks of keys that begin one too late."""

    @property
    def window_steps(self):
        return super().window_steps - 1


class KeysBeforeForgotten(Blocks):
    """Blocks of keys as if none were before the queries' own."""

    def key_block(self, block, step):
        return Blocks(*self._replace(before=0)).key_block(block, step)


class WordsOneOff(Blocks):
    """Bits that are looked for one place too far."""

    def first_bit(self, entry_block):
        return super().first_bit(entry_block) + 1


@pytest.mark.parametrize(
    ("broken", "kernel"),
    [
        ({"window": WindowOneShort}, "window"), ({"window": WindowOneShort}, "gradient of keys"),
        ({"entries": EndIncluded}, "range of entries"), ({"bits": SharedBits}, "chosen entries"),
        ({"split": PiecesOverlap}, "queries shared"), ({"blocks": BlocksOneShort}, "TPU, keys"),
        ({"blocks": KeysBeforeForgotten}, "TPU, keys"),
        ({"blocks": WordsOneOff}, "TPU, entries"),
        ({"shares": GroupsSwapped}, "shares of 1024 entries"),
    ],
)
def test_index_functions_that_are_one_off_are_refuted(broken, kernel):
    (proof, *_) = (proof for proof in claims.proofs(**broken) if proof.kernel.startswith(kernel))
    refuted = [verdict for verdict in proof.verdicts() if not verdict.proved]
    assert any(verdict.counterexample for verdict in refuted)
