"""Generation equals that of transformers, ends where it should and refuses what it cannot use."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax.linen import meta
from test_hf_parity import CASES, FLASH_LIKE, oracle_of

from dsv4_jax import InputError, Runtime, decode, generate, infer
from dsv4_jax.cache import init_cache
from dsv4_jax.decode import chunk_size
from dsv4_jax.model import param_shapes

pytestmark = pytest.mark.usefixtures("quick_generation")
GREEDY = {"temperature": 0.0}


def prompts_of(name: str, lengths, seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, CASES[name][0].vocab_size, length) for length in lengths]


@pytest.mark.parametrize("name, lengths, new", [
    ("flash-like", (1, 6, 40), 20),
    pytest.param("flash-like", (1, 2, 5, 6, 7, 40), 50, marks=pytest.mark.heavy),
    pytest.param("pro-like", (1, 8, 9, 33), 50, marks=pytest.mark.heavy),
    pytest.param("unrolled", (1, 24, 90), 50, marks=pytest.mark.heavy),
])
def test_greedy_tokens_are_those_of_transformers(name, lengths, new):
    """Every prompt by itself there, all in one batch here, over borders of windows and blocks."""
    oracle, params, _ = oracle_of(name)
    prompts = prompts_of(name, lengths)
    actual = generate(CASES[name][0], params, prompts, max_new_tokens=new, **GREEDY)
    for prompt, tokens in zip(prompts, actual.tokens, strict=True):
        ids = torch.from_numpy(prompt)[None].long()
        expected = oracle.model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=new,
            eos_token_id=None, pad_token_id=0,
        )
        assert tokens.tolist() == expected[0, len(prompt) :].tolist()
    assert actual.stopped == [False] * len(prompts)


def flash(tokens, **options):
    return generate(FLASH_LIKE, oracle_of("flash-like")[1], tokens, **options)


def test_the_stop_token_ends_a_row_and_is_not_part_of_it():
    prompts = prompts_of("flash-like", (3, 9, 12))
    free = flash(prompts, max_new_tokens=20, **GREEDY)
    stop = int(free.tokens[1][7])
    ended = flash(prompts, max_new_tokens=20, stop=[stop], **GREEDY)
    for row, tokens in enumerate(free.tokens):
        full = tokens.tolist()
        assert ended.stopped[row] == (stop in full)
        expected = full[: full.index(stop)] if stop in full else full
        assert ended.tokens[row].tolist() == expected
    assert ended.stopped[1] and flash(prompts[1], max_new_tokens=20, stop=stop, **GREEDY).stopped[0]


@pytest.mark.parametrize("new", [1, 2, 3])
def test_few_tokens(new):
    prompts = prompts_of("flash-like", (3, 9))
    full = flash(prompts, max_new_tokens=6, **GREEDY).tokens
    few = flash(prompts, max_new_tokens=new, **GREEDY)
    assert [tokens.tolist() for tokens in few.tokens] == [t[:new].tolist() for t in full]
    assert few.stats.new_tokens == 2 * new and few.stats.prompt_tokens == 12


def test_tokens_come_one_after_the_other():
    heard: dict[int, list[int]] = {0: [], 1: []}
    result = flash(
        prompts_of("flash-like", (3, 9)), max_new_tokens=12, temperature=1.0,
        on_tokens=lambda row, ids: heard[row].extend(ids),
    )
    assert [heard[row] for row in (0, 1)] == [tokens.tolist() for tokens in result.tokens]


def test_the_seed_and_the_row_decide():
    prompt = prompts_of("flash-like", (9,))[0]
    options = {"max_new_tokens": 12, "temperature": 1.0}
    texts = [flash([prompt, prompt], seed=seed, **options).tokens for seed in (0, 0, 1)]
    lists = [[tokens.tolist() for tokens in text] for text in texts]
    assert lists[0] == lists[1] and lists[0] != lists[2] and lists[0][0] != lists[0][1]
    assert flash(prompt, seed=0, **options).tokens[0].tolist() == lists[0][0]


def test_prompts_are_lists_or_arrays():
    ids = prompts_of("flash-like", (9,))[0]
    forms = (ids, ids.tolist(), jnp.array(ids), ids[None], [jnp.array(ids)], [tuple(ids)])
    texts = [flash(form, max_new_tokens=3, **GREEDY).tokens[0].tolist() for form in forms]
    assert all(text == texts[0] for text in texts)


@pytest.mark.heavy
def test_the_memory_of_reading_does_not_grow_with_the_row():
    """Of the compiled program for one chunk: what it allocates beside weights and cache."""
    config, runtime = dataclasses.replace(FLASH_LIKE, max_position_embeddings=2**20), Runtime()
    params = meta.unbox(param_shapes(config))
    bytes_of = []
    for length in (2**12, 2**16, 2**20):
        cache = jax.eval_shape(lambda n=length: init_cache(config, runtime, rows=1, max_length=n))
        logits, tokens, count = (
            jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in
            (((1, config.vocab_size), jnp.float32), ((1, 512), jnp.int32), ((1,), jnp.int32))
        )
        read = decode._jitted(decode._read)
        program = read.lower(config, runtime, params, cache, logits, tokens, count).compile()
        bytes_of.append(program.memory_analysis().temp_size_in_bytes)
    # The index keys of a short row are less than one tile.
    assert bytes_of[1] <= 1.01 * bytes_of[2] <= 1.02 * bytes_of[1]
    assert bytes_of[0] <= bytes_of[1] < 100e6


def test_chunk_sizes_are_few():
    assert [chunk_size(FLASH_LIKE, n) for n in (1, 64, 65, 128, 500, 512)] == [
        64, 64, 128, 128, 512, 512,
    ]
    wide = dataclasses.replace(FLASH_LIKE, sliding_window=96)
    assert [chunk_size(wide, n) for n in (1, 96, 97, 192, 193)] == [96, 96, 192, 192, 384]


@pytest.mark.parametrize(("tokens", "message"), [
    ([], "prompt: expected at least one token, got none; begin with BOS"),
    ([[1], []], "prompt 1: expected at least one token"),
    ([1, 96], r"prompt: token ids: expected 0 to 95 .* got 96 at index \(1,\)"),
    ([[1], [2, 2**31]], "prompt 1: .* got 2147483648"),
    ([-1], "got -1"),
    ([0.5], "expected integers, got float64"),
    ([True], "expected integers, got bool"),
    ("text", "prompt: expected token ids, got str; encode the text first"),
    ([["text"]], "prompt 0: token ids: expected integers"),
    (7, "prompt: expected token ids, got int"),
    (np.zeros((1, 1, 1), int), "prompt 0: expected one row of ids"),
    ([1] * 250, r"prompt: expected at most 246 tokens.* for 10 .* max_position_embeddings = 256"),
])
def test_a_bad_prompt_is_refused(tokens, message):
    with pytest.raises(InputError, match=message):
        flash(tokens, max_new_tokens=10)


def test_no_bad_prompt_reaches_the_device(monkeypatch):
    """Matrix row B8: one thing wrong in one of several prompts, anywhere."""
    def reached(*_, **__):
        raise AssertionError("a bad prompt has reached the cache")

    monkeypatch.setattr(infer, "init_cache", reached)
    rng, vocab = np.random.default_rng(8), FLASH_LIKE.vocab_size
    wrong = [-1, vocab, 2**31, -(2**31), 2**63 - 1, 0.5, np.nan, True, "a", None, [1]]
    room = FLASH_LIKE.max_position_embeddings - 10
    for number in range(300):
        prompts = [rng.integers(0, vocab, rng.integers(1, 30)).tolist()
                   for _ in range(rng.integers(1, 5))]
        spoilt = int(rng.integers(len(prompts)))
        if number % 15 == 0:
            prompts[spoilt] = []
        elif number % 15 == 1:
            prompts[spoilt] = [0] * (room + int(rng.choice([1, 2**20])))
        else:
            token = wrong[number % len(wrong)]
            place = int(rng.integers(len(prompts[spoilt])))
            # All of them are bools: NumPy makes integers of a mixed list.
            prompts[spoilt] = [
                token if i == place or isinstance(token, bool) else good
                for i, good in enumerate(prompts[spoilt])
            ]
        with pytest.raises(InputError, match="prompt") as error:
            flash(prompts if len(prompts) > 1 else prompts[0], max_new_tokens=10)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(("options", "message"), [
    ({"max_new_tokens": 0}, "max_new_tokens: expected an integer of at least 1, got 0"),
    ({"max_new_tokens": 1.5}, "max_new_tokens: expected an integer"),
    ({"top_p": 0}, "top_p: expected more than 0"),
    ({"temperature": -1}, "temperature: expected 0"),
    ({"seed": -1}, "seed: expected 0 to"),
    ({"seed": "a"}, "seed: expected 0 to"),
    ({"stop": 96}, "stop: token ids: expected 0 to 95"),
    ({"stop": ["a"]}, "stop: token ids: expected integers"),
    ({"chunk": 0}, "chunk: expected an integer of at least 1"),
    ({"max_length": 8}, "leave room for 4 new ones in max_length = 8, got 5"),
    ({"max_length": 300}, "max_length: expected 1 to 256"),
    ({"speculate": True}, "drafting: expected a model with multi-token prediction"),
])
def test_a_setting_out_of_its_range_is_refused(options, message):
    with pytest.raises(InputError, match=message):
        flash([1, 2, 3, 4, 5], **{"max_new_tokens": 4, **options})


def test_the_edges_of_the_context_and_vocabulary_are_accepted():
    full = FLASH_LIKE.max_position_embeddings
    result = flash([0, 95] * ((full - 2) // 2), max_new_tokens=2, **GREEDY)
    assert len(result.tokens[0]) == 2
