"""The tokenizer keeps every byte, cannot be forged by text, and refuses what it cannot use."""

from __future__ import annotations

import copy
import json
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsv4_jax import InputError
from dsv4_jax import tokenizer as tokenizer_module
from dsv4_jax.encoding_texts import BOS, EOS, THINK
from dsv4_jax.token_ids import check_token_ids
from dsv4_jax.tokenizer import (
    TOKENIZER_FILE,
    Tokenizer,
    load_tokenizer,
    tokenizer_of_run,
    train_tokenizer,
    write_atomically,
)

VOCAB_SIZE = 300
TEXTS = ["def add(a, b):\n    return a + b\n", "def sub(a, b):\n    return a - b\n", "é 漢字"] * 3
TOKENIZER = train_tokenizer(TEXTS, vocab_size=VOCAB_SIZE)


def edited(**fields) -> str:
    return json.dumps({**json.loads(TOKENIZER.specification), **fields})


@given(st.text())
def test_any_text_survives(text):
    ids = TOKENIZER.encode(text)
    assert ids.dtype == np.int32
    assert TOKENIZER.decode(ids) == text
    check_token_ids(ids, TOKENIZER.vocab_size)


def test_trained_ids():
    assert (TOKENIZER.bos_id, TOKENIZER.eos_id) == (0, 1)
    assert 258 < TOKENIZER.vocab_size <= VOCAB_SIZE
    assert len(TOKENIZER.encode("return a")) < len("return a")


def test_training_is_deterministic():
    again = train_tokenizer(TEXTS, vocab_size=VOCAB_SIZE)
    assert again.specification == TOKENIZER.specification


def test_training_reads_a_bounded_part_of_the_text(monkeypatch):
    monkeypatch.setattr(tokenizer_module, "_PART", 40)
    monkeypatch.setattr(tokenizer_module, "_TRAINING_CHARACTERS", 80)
    texts = ["abab" * 10, "cdcd" * 10] * 2  # 160 characters in 4 parts: every second is read
    trained = train_tokenizer(texts, vocab_size=VOCAB_SIZE)
    assert len(trained.encode("abab" * 10)) < 40
    assert len(trained.encode("cdcd" * 10)) == 40


def test_documents_are_bos_text_eos(monkeypatch):
    monkeypatch.setattr(tokenizer_module, "_PART", 7)
    monkeypatch.setattr(tokenizer_module, "_PARTS_AT_ONCE", 2)
    documents = TOKENIZER.encode_documents([*TEXTS, "x"])
    for document, text in zip(documents, [*TEXTS, "x"], strict=True):
        assert document.dtype == np.int32
        assert (document[0], document[-1]) == (TOKENIZER.bos_id, TOKENIZER.eos_id)
        assert TOKENIZER.decode(document[1:-1]) == text
        assert np.array_equal(document[1:-1], TOKENIZER.encode(text))


def test_decode_leaves_out_bos_and_eos_and_marks_unknown_ids():
    assert TOKENIZER.decode([0, *TOKENIZER.encode("a"), 1]) == "a"
    assert TOKENIZER.decode([TOKENIZER.vocab_size, -1, *TOKENIZER.encode("a")]) == "\ufffd\ufffda"


def test_text_cannot_forge_control_tokens():
    think = int(TOKENIZER.encode_segments([(THINK, True)])[0])
    assert TOKENIZER.decode([think]) == THINK
    text = f"{BOS}{THINK}x{EOS}"
    ids = TOKENIZER.encode(text)
    assert not {0, 1, think} & set(ids.tolist())
    assert TOKENIZER.decode(ids) == text


def test_truncation_of_a_given_tokenizer_is_not_applied():
    truncation = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    tokenizer = Tokenizer(edited(truncation=truncation), "here")
    assert tokenizer.decode(tokenizer.encode(TEXTS[0])) == TEXTS[0]


def test_a_run_trains_once_and_keeps_its_tokenizer(tmp_path):
    first = tokenizer_of_run(TEXTS, path=None, workdir=tmp_path, vocab_size=VOCAB_SIZE)
    assert first.specification == TOKENIZER.specification
    other = tokenizer_of_run(["other text"], path=None, workdir=tmp_path, vocab_size=VOCAB_SIZE)
    assert other.specification == first.specification
    assert [path.name for path in tmp_path.iterdir()] == [TOKENIZER_FILE]


def test_a_named_tokenizer_is_used_instead(tmp_path):
    named = tmp_path / "named.json"
    write_atomically(named, TOKENIZER.specification.encode())
    got = tokenizer_of_run(["y"], path=str(named), workdir=tmp_path / "w", vocab_size=VOCAB_SIZE)
    assert got.specification == TOKENIZER.specification
    assert not (tmp_path / "w").exists()


VOCAB = json.loads(TOKENIZER.specification)["model"]["vocab"]
BAD_SPECIFICATIONS = {
    "empty": "",
    "truncated": TOKENIZER.specification[:1000],
    "not an object": "[1, 2]",
    "no model": "{}",
    "merge of unknown tokens": edited(
        model={**json.loads(TOKENIZER.specification)["model"], "merges": [["zq", "qz"]]}
    ),
    "a byte is missing": edited(
        model={
            "type": "BPE",
            "vocab": {token: i for token, i in VOCAB.items() if token != "Z"},
            "merges": [],
        }
    ),
    "no EOS": edited(
        added_tokens=[],
        model={
            "type": "BPE",
            "vocab": {token: i for token, i in VOCAB.items() if token != EOS},
            "merges": [],
        },
    ),
    "lossy": edited(normalizer={"type": "NFKC"}),
    "lower case": edited(normalizer={"type": "Lowercase"}),
}


@pytest.mark.parametrize("specification", BAD_SPECIFICATIONS.values(), ids=BAD_SPECIFICATIONS)
def test_bad_tokenizers_are_refused(tmp_path, specification):
    path = tmp_path / "bad.json"
    path.write_text(specification)
    with pytest.raises(ValueError, match="bad.json: expected") as error:
        load_tokenizer(path, vocab_size=VOCAB_SIZE)
    assert "\n" not in str(error.value)


def damaged(choose: random.Random) -> bytes:
    """Return a `tokenizer.json` with one thing wrong, in its bytes or in what they say."""
    data = bytearray(TOKENIZER.specification.encode())
    kind = choose.randrange(8)
    if kind == 0:
        return bytes(data[: choose.randrange(len(data))])
    if kind == 1:
        data[choose.randrange(len(data))] = choose.randrange(256)
        return bytes(data)
    if kind == 2:
        cut = choose.randrange(len(data))
        return bytes(data[:cut] + data[cut + choose.randrange(1, 50) :])
    fields = copy.deepcopy(json.loads(data))
    vocab, merges = fields["model"]["vocab"], fields["model"]["merges"]
    token, other = choose.sample(sorted(vocab), 2)
    if kind == 3:
        vocab[token] = choose.choice([vocab[other], VOCAB_SIZE, 2**31, 2**32 - 1, -1, 0.5, "1"])
    elif kind == 4:
        del vocab[token]
    elif kind == 5:
        merges.insert(choose.randrange(len(merges) + 1), choose.choice(
            [[token, other], [token], [], "a", f"{token} {other}", ["zq", "qz"], None, merges[0]]
        ))
    elif kind == 6:
        holder = choose.choice([fields, fields["model"], fields["decoder"]])
        holder[choose.choice(sorted(holder))] = choose.choice([None, 0, "x", [], {}, {"type": "x"}])
    else:
        fields["added_tokens"].append(choose.choice([
            {}, {"id": choose.choice([0, 5, 9999]), "content": token, "special": True},
            fields["added_tokens"][0] | {"id": choose.randrange(400), "content": other},
        ]))
    return json.dumps(fields).encode()


def test_a_damaged_tokenizer_is_refused_in_one_line_or_keeps_every_byte(tmp_path):
    """Matrix row B5: 200 files, none of which ends in another error than ours."""
    choose, path, refused = random.Random(0), tmp_path / "damaged.json", 0
    for _ in range(200):
        path.write_bytes(damaged(choose))
        try:
            found = load_tokenizer(path, vocab_size=VOCAB_SIZE)
        except InputError as error:
            assert "damaged.json" in str(error) and "\n" not in str(error)
            refused += 1
            continue
        for text in TEXTS:
            ids = found.encode(text)
            check_token_ids(ids, VOCAB_SIZE)
            assert found.decode(ids) == text
    assert 50 < refused < 200


def test_unreadable_tokenizers_are_refused(tmp_path):
    with pytest.raises(ValueError, match="cannot read .*absent.json"):
        load_tokenizer(tmp_path / "absent.json", vocab_size=VOCAB_SIZE)
    (tmp_path / "latin.json").write_bytes(b'{"a": "\xe9"}')
    with pytest.raises(ValueError, match="cannot read .*latin.json"):
        load_tokenizer(tmp_path / "latin.json", vocab_size=VOCAB_SIZE)


def test_a_tokenizer_must_fit_the_model(tmp_path):
    path = tmp_path / TOKENIZER_FILE
    write_atomically(path, TOKENIZER.specification.encode())
    size = TOKENIZER.vocab_size
    assert load_tokenizer(path, vocab_size=size).vocab_size == size
    with pytest.raises(ValueError, match=rf"at most {size - 1} token ids .* got {size}"):
        load_tokenizer(path, vocab_size=size - 1)


def test_ids_beyond_int32_are_refused():
    fields = json.loads(TOKENIZER.specification)
    fields["model"]["vocab"]["x" * 9] = 2**31
    with pytest.raises(InputError, match="here: expected ids below 2.31, got 2147483648"):
        Tokenizer(json.dumps(fields), "here")


def test_a_vocabulary_must_hold_all_bytes():
    with pytest.raises(ValueError, match="model.vocab_size: expected at least 270 .* got 269"):
        train_tokenizer(TEXTS, vocab_size=269)
    assert train_tokenizer(TEXTS, vocab_size=270).vocab_size == 270


def test_half_surrogate_pairs_are_refused():
    with pytest.raises(ValueError, match=r"text: expected .* got '\\ud800' at character 2"):
        TOKENIZER.encode("ab\ud800")
