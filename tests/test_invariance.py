"""A row's bits do not depend on its batch, its chunks or its cache; speculation changes no token.

Compiled as `generate` compiles: fewer optimisations might make other bits. What must be equal to
the last bit is computed without fused multiply-adds, in a process of its own: XLA takes that choice
from the environment, and makes it itself by the length of a loop otherwise.
"""

from __future__ import annotations

import dataclasses
import multiprocessing
import os

import jax
import numpy as np
import pytest
from test_generate import flash, prompts_of
from test_hf_parity import CASES, FLASH_LIKE, oracle_of

from dsv4_jax import Runtime, generate, init_params
from dsv4_jax.cache import init_cache
from dsv4_jax.chunks import power_of_two_times
from dsv4_jax.decode import decode_step, prefill
from dsv4_jax.infer import INVARIANT

STEPS, LONGEST = 4, 150
UNFUSED = "--xla_cpu_max_isa=AVX"


def logits_of_rows(name: str, runtime: Runtime, prompts, chunk: int, follow) -> np.ndarray:
    """Return the logits after each prompt and after each of the tokens that follow it."""
    config, _ = CASES[name]
    model = config, runtime, oracle_of(name)[1]
    rows = power_of_two_times(2, len(prompts))
    count = np.array([len(p) for p in prompts] + [0] * (rows - len(prompts)))
    tokens = np.zeros((rows, count.max()), np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = prompt
    state = init_cache(config, runtime, rows=rows, max_length=LONGEST + STEPS)
    logits, state = prefill(*model, state, tokens, count, chunk=chunk)
    out = [np.asarray(logits)]
    for step in range(STEPS):
        token = np.array([f[step] for f in follow] + [0] * (rows - len(prompts)), np.int32)
        logits, state = decode_step(*model, state, token, np.arange(rows) < len(prompts))
        out.append(np.asarray(logits))
    return np.stack(out, axis=1)[: len(prompts)]


def batches_that_matter(name: str, form: str, batches: int, most_rows: int) -> list[tuple]:
    """Read a prompt alone, and among others, anywhere, with any padding and chunks.

    Returns what the batches were like that changed a bit of it.
    """
    runtime = Runtime(batch_invariant=True, cache=form)
    rng, vocab = np.random.default_rng(5), CASES[name][0].vocab_size
    prompt, follow = rng.integers(0, vocab, 45), rng.integers(0, vocab, STEPS)
    alone = logits_of_rows(name, runtime, [prompt], 64, [follow])[0]
    differing = []
    for _ in range(batches):
        rows = int(rng.integers(1, most_rows + 1))
        place = int(rng.integers(rows))
        prompts = [rng.integers(0, vocab, rng.integers(1, LONGEST)) for _ in range(rows)]
        follows = [rng.integers(0, vocab, STEPS) for _ in range(rows)]
        prompts[place], follows[place] = prompt, follow
        chunk = int(rng.choice([64, 128]))
        batch = logits_of_rows(name, runtime, prompts, chunk, follows)
        if not np.array_equal(batch[place], alone):
            differing.append((rows, place, chunk))
    return differing


@pytest.fixture(scope="module")
def unfused():
    """A process that computes without fused multiply-adds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XLA_FLAGS", os.environ["XLA_FLAGS"] + " " + UNFUSED)
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            yield pool


@pytest.mark.parametrize("name, form, batches, most_rows", [
    ("flash-like", "float32", 10, 4),
    pytest.param("flash-like", "float32", 500, 16, marks=pytest.mark.heavy),
    pytest.param("pro-like", "bfloat16", 10, 4, marks=pytest.mark.heavy),
    pytest.param("unrolled", "served", 10, 4, marks=pytest.mark.heavy),
])
def test_a_row_s_bits_do_not_depend_on_its_batch(unfused, name, form, batches, most_rows):
    assert unfused.apply(batches_that_matter, (name, form, batches, most_rows)) == []


def predicting():
    """Return a model with a prediction block whose drafts are sometimes right."""
    config = dataclasses.replace(
        FLASH_LIKE, num_nextn_predict_layers=1, initializer_range=0.3, vocab_size=12
    )
    return config, init_params(config, jax.random.key(0))


def speculate(temperature: float, top_p: float, batches: int) -> tuple[list, int, int]:
    """Continue prompts of any length from 1 on, plainly and with drafts.

    Returns the pairs of continuations that differ, the drafts judged and those accepted.
    """
    config, params = predicting()
    rng = np.random.default_rng(6)
    differing, drafted, accepted = [], 0, 0
    for _ in range(batches):
        prompts = [rng.integers(0, config.vocab_size, n) for n in rng.integers(1, 70, 16)]
        options = dict(max_new_tokens=40, temperature=temperature, top_p=top_p, seed=3)
        plain = generate(config, params, prompts, **options)
        ahead = generate(config, params, prompts, speculate=True, **options)
        pairs = zip(plain.tokens, ahead.tokens, strict=True)
        differing += [(a.tolist(), b.tolist()) for a, b in pairs if a.tolist() != b.tolist()]
        drafted, accepted = drafted + ahead.stats.drafted, accepted + ahead.stats.accepted
        assert plain.stats.drafted == 0
    return differing, drafted, accepted


@pytest.mark.parametrize("temperature, top_p, batches", [
    (0.0, 1.0, 1),
    *(pytest.param(*kind, 7, marks=pytest.mark.heavy) for kind in ((0.0, 1.0), (1.0, 0.9))),
])
def test_speculation_changes_no_token(unfused, temperature, top_p, batches):
    """Over 112 prompts if heavy; some drafts are right, some are not."""
    differing, drafted, accepted = unfused.apply(speculate, (temperature, top_p, batches))
    assert differing == []
    assert 0 < accepted < drafted


def test_prediction_while_reading_equals_prediction_token_by_token():
    """The prediction block's cache is the same however the prompt was read."""
    config, params = predicting()
    prompt = np.random.default_rng(7).integers(0, config.vocab_size, 50)
    model = config, INVARIANT, params
    count, states = np.array([50, 0]), []
    tokens = np.stack([prompt, prompt]).astype(np.int32)
    for parts in ([50], [20, 30], [1] * 50):
        state, done = init_cache(config, INVARIANT, rows=2, max_length=64, drafting=True), 0
        for part in parts:
            piece = tokens[:, done : done + part]
            _, state = prefill(*model, state, piece, np.minimum(count, part))
            done += part
        states.append(jax.tree.map(lambda x: np.asarray(x[..., :1, :, :]), state.mtp.streams))
        states[-1] = (states[-1], np.asarray(state.mtp.layer.window[:, 0]))
    for streams, window in states[1:]:
        assert np.abs(streams - states[0][0]).max() <= 1e-5 * np.abs(states[0][0]).max()
        assert np.abs(window - states[0][1]).max() <= 1e-5 * np.abs(states[0][1]).max()


@pytest.mark.heavy
def test_the_size_of_the_cache_and_of_chunks_change_nothing():
    prompt = prompts_of("flash-like", (150,))[0]
    options = {"max_new_tokens": 12, "temperature": 1.0}
    texts = [
        flash(prompt, **options).tokens[0].tolist(),
        flash(prompt, max_length=162, **options).tokens[0].tolist(),
        flash(prompt, chunk=1, **options).tokens[0].tolist(),
    ]
    assert texts[0] == texts[1] == texts[2]
