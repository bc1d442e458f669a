"""What is learned from chats: the answers, each behind the prompt that asks for it."""

from __future__ import annotations

import json
import random
import warnings

import numpy as np
import pytest

from dsv4_jax import InputError, tokenized
from dsv4_jax.chat import chat_prompt
from dsv4_jax.chat_corpus import answers_of, held_out_examples, read_chats
from dsv4_jax.chats import Example, function_chats, read_examples
from dsv4_jax.completion import parse_completion
from dsv4_jax.corpus import read_stdlib
from dsv4_jax.data import fitting, held_out_batches, make_train_iterator
from dsv4_jax.encoding_texts import EOS, THINKING
from dsv4_jax.run_config import DataConfig, StageConfig
from dsv4_jax.tokenized import TOKENS_FILE, prepare_corpus
from dsv4_jax.tokenizer import train_tokenizer

F4 = "F4: resumed, all batches are those of a stream without an end"

VOCAB_SIZE = 300
TOKENIZER = train_tokenizer(["the quick brown fox " * 9], vocab_size=VOCAB_SIZE)
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"a": 1}}}
CALL = {"id": "1", "function": {"name": "add", "arguments": '{"a": "x", "b": [2]}'}}


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def answer(text: str, **fields) -> dict:
    return {"role": "assistant", "content": text, **fields}


TWO = [user("Q1"), answer("A1", reasoning_content="R1"), user("Q2"),
       answer("A2", reasoning_content="R2")]
TOOLS = [
    {"role": "system", "content": "S"}, user("Q1"),
    answer("", reasoning_content="R1", tool_calls=[CALL]),
    {"role": "tool", "tool_call_id": "1", "content": "3"},
    answer("A1", reasoning_content="R2"), user("Q2"), answer("A2", reasoning_content="R3"),
]
CHATS = {
    "one": {"messages": TWO[:2]},
    "two": {"messages": TWO},
    "system": {"messages": [{"role": "system", "content": "S"}, *TWO]},
    "tools": {"messages": TOOLS, "tools": [TOOL]},
    "undeclared tools": {"messages": TOOLS},
    "task": {"messages": [{**user("Q"), "task": "title"}, answer("T")]},
    "trailing question": {"messages": [*TWO, user("Q3")]},
    "reminder": {"messages": [
        TWO[0], TWO[1], {"role": "latest_reminder", "content": "L"}, TWO[3], user("Q3"),
        answer("A3", reasoning_content="R3"),
    ]},
    "late tools": {"messages": [
        *TWO, {"role": "system", "content": "S", "tools": [TOOL]}, user("Q3"),
        answer("A3", reasoning_content="R3"),
    ]},
    "developer": {"messages": [{"role": "developer", "content": "D"}, *TWO]},
    "assistant first": {"messages": [answer("A0", reasoning_content="R0"), *TWO]},
    "unfinished": {"messages": [TWO[0], answer("A1", reasoning_content="R1", wo_eos=True)]},
}


def learned(example: Example) -> list[tuple[int, int]]:
    """Return the begin and end of each learned stretch in the ids of an example."""
    places, at = [], 0
    for part in example:
        size = len(TOKENIZER.encode_segments(part.segments))
        if part.learned:
            places.append((at, at + size))
        at += size
    return places


def ids_of(example: Example) -> np.ndarray:
    return np.concatenate([TOKENIZER.encode_segments(part.segments) for part in example])


@pytest.mark.parametrize("thinking", THINKING)
@pytest.mark.parametrize("name", CHATS)
def test_each_answer_is_learned_once_behind_its_own_prompt(name, thinking):
    """Before it are the ids of the prompt that a user would send; it parses to the message."""
    record = CHATS[name]
    messages = record["messages"]
    if "tools" in record:
        messages = [{**messages[0], "tools": [TOOL]}, *messages[1:]]
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    found = []
    for example in read_examples(record, thinking):
        ids = ids_of(example)
        for begin, end in learned(example):
            index = answers[len(found)]
            found.append(index)
            prompt = chat_prompt(TOKENIZER, messages[:index], thinking)
            assert ids[:begin].tolist() == prompt.tolist()
            text = b"".join(
                EOS.encode() if i == TOKENIZER.eos_id else TOKENIZER.bytes_of(i)
                for i in ids[begin:end].tolist()
            ).decode()
            if messages[index].get("wo_eos"):
                assert EOS not in text
                text += EOS
            if messages[index - 1].get("task"):
                assert text == f"{messages[index]['content']}{EOS}"
                continue
            parsed = parse_completion(text, thinking_mode=THINKING[thinking][0])
            assert parsed["content"] == messages[index]["content"]
            if thinking != "off":
                assert parsed["reasoning_content"] == messages[index]["reasoning_content"]
            calls = messages[index].get("tool_calls", [])
            assert [call["function"] for call in parsed.get("tool_calls") or []] == [
                call["function"] for call in calls
            ]
    assert found == answers


def test_answers_of_no_weight_are_read_alone():
    messages = [TWO[0], {**TWO[1], "weight": 0}, TWO[2], {**TWO[3], "weight": 1}]
    (example,) = read_examples({"messages": messages}, "off")
    assert answers_of(example) == "A2"
    assert ids_of(example).tolist() == ids_of(read_examples({"messages": TWO}, "off")[0]).tolist()


def test_turns_are_one_example_where_nothing_is_left_out():
    """One example has both answers; with reasoning that is left out of the second's prompt, two."""
    for thinking, name, examples in (
        ("off", "two", 1), ("high", "two", 2), ("high", "tools", 1), ("high", "late tools", 3),
        ("off", "late tools", 1), ("high", "reminder", 2),
    ):
        assert len(read_examples(CHATS[name], thinking)) == examples, (thinking, name)


def test_a_record_says_how_its_assistant_thinks():
    record = {"messages": TWO[:2], "thinking": "high"}
    assert "R1" in answers_of(read_examples(record, "off")[0])
    for unsaid in ({}, {"thinking": None}):
        assert "R1" not in answers_of(read_examples({"messages": TWO[:2], **unsaid}, "off")[0])


@pytest.mark.faults
@pytest.mark.parametrize(("line", "expected"), [
    ("[]", r'chats.jsonl:3: expected an object with "messages", got list'),
    ("{", "chats.jsonl:3: expected a JSON object"),
    ("{}", "chats.jsonl:3: messages: expected a list, got nothing"),
    ('{"messages": "x"}', "chats.jsonl:3: messages: expected a list, got 'x'"),
    ('{"messages": []}', "chats.jsonl:3: messages: expected one with the role assistant"),
    ('{"messages": [{"role": "user", "content": "x"}]}', "expected one with the role assistant"),
    ('{"messages": [1, {"role": "assistant", "content": "x"}]}', r"messages\[0\]: expected an ob"),
    ('{"messages": [{"role": "assistant", "content": 1}]}', r"messages\[0\].content: expected a s"),
    ('{"messages": [{"role": "assistant", "content": "\\ud800"}]}', "UTF-8 form"),
    ('{"messages": [{"role": "bot", "content": "x"}, {"role": "assistant"}]}', "role: expected"),
    ('{"messages": [{"role": "assistant", "content": "x"}], "thinking": 3}', "thinking: expected"),
    ('{"messages": [{"role": "assistant", "content": "x"}], "tools": 3}', "tools: expected a list"),
    ('{"messages": [{"role": "system", "tools": [{"function": {}}]}, {"role": "assistant"}], '
     '"tools": [{"function": {}}]}', r"tools: expected them once, got some in messages\[0\]"),
    ('{"messages": [{"role": "bot"}, {"role": "assistant"}], "tools": [{"function": {}}]}',
     r"messages\[0\].role: expected"),
    ('{"messages": [{"role": "assistant", "content": "x", "weight": 0}]}', "expected one with the"),
    ('{"messages": [{"role": "assistant", "content": "", "wo_eos": true}]}', "expected one with"),
    ('{"messages": [{"role": "assistant", "weight": "x"}]}', r"messages\[0\].weight: expected 0"),
])
def test_bad_lines_are_named(line, expected, tmp_path):
    path = tmp_path / "chats.jsonl"
    path.write_text(f'{json.dumps(CHATS["one"])}\n\n{line}\n', encoding="utf-8")
    with pytest.raises(InputError, match=expected) as caught:
        read_chats(str(path), thinking="off", held_out_fraction=0.5)
    assert "\n" not in str(caught.value)


@pytest.mark.faults
def test_bad_sources_are_refused(tmp_path):
    text, empty = tmp_path / "a.txt", tmp_path / "empty.jsonl"
    text.write_text("x")
    empty.write_text("\n")
    same = tmp_path / "same.jsonl"
    same.write_text(f"{json.dumps(CHATS['one'])}\n" * 3)
    for source, expected in (
        (text, r"expected a .jsonl file of chats, .* got '.*a.txt'"),
        (tmp_path / "absent", "got '.*absent'"),
        ("needle", "got 'needle'"),
        (empty, "at least two different chats, .* got 0 in .*empty.jsonl"),
        (same, "at least two different chats, .* got 3 in .*same.jsonl"),
    ):
        with pytest.raises(InputError, match=expected) as caught:
            read_chats(str(source), thinking="off", held_out_fraction=0.1)
        assert "\n" not in str(caught.value)


def test_functions_of_a_file_become_chats():
    source = '''
def add(a, b):
    """Return the sum.

    More of it.
    """
    return a + b

\f
class C:
    def silent(self):
        return 1

    def method(self):
        "Do it."
    def one(self): "Do one."

    def two(self):
        """Do
        two."""
        if self:
            return 2
'''
    found = {chat["messages"][1]["content"]: chat["messages"][0]["content"]
             for chat in function_chats(source)}
    assert found == {
        "Return the sum.": "What does this function do?\n\ndef add(a, b):\n    return a + b",
        "Do it.": "What does this function do?\n\ndef method(self):",
        "Do two.":
            "What does this function do?\n\ndef two(self):\n    if self:\n        return 2",
    }
    assert list(function_chats("def f(:\n")) == []


def test_the_standard_library_is_a_source_of_chats():
    with warnings.catch_warnings(action="error"):
        corpus = read_chats("stdlib", thinking="off", held_out_fraction=0.03)
    assert len(corpus.train) > 1000 and len(corpus.held_out) > 30
    assert not {chat.key for chat in corpus.train} & {chat.key for chat in corpus.held_out}
    assert len(list(read_stdlib())) > 100


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    path = tmp_path_factory.mktemp("chats") / "chats.jsonl"
    choose = random.Random(0)

    def words() -> str:
        return "".join(choose.choices("abcdé漢 \n", k=choose.randint(1, 40)))

    lines = [{"messages": [
        message for _ in range(choose.randint(1, 3))
        for message in (user(words()), answer(words(), reasoning_content=words()))
    ]} for _ in range(60)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


@pytest.mark.parametrize("thinking", ["off", "high"])
def test_batches_carry_what_is_learned(source, thinking, tmp_path):
    """Over some epochs: the examples, whole, each token learned or not as the example says."""
    config = DataConfig(
        source=str(source), format="chat", thinking=thinking, held_out_fraction=0.1
    )
    corpus = prepare_corpus(config, vocab_size=VOCAB_SIZE, workdir=tmp_path)
    chats = read_chats(str(source), thinking=thinking, held_out_fraction=0.1)
    examples = [example for chat in chats.train for example in chat.examples]
    wanted = []
    for example in examples:
        parts = [corpus.tokenizer.encode_segments(part.segments) for part in example]
        mask = [int(p.learned) for p, ids in zip(example, parts, strict=True) for _ in ids]
        wanted.append((np.concatenate(parts).tolist(), mask))
    stage = StageConfig(tokens=1, seq_len=512, batch_tokens=1024)
    found = []
    batches = make_train_iterator(corpus, config, [stage])
    while len(found) < 40 * len(wanted):  # rows are packed many at once
        batch = next(batches)
        assert set(batch) == {"tokens", "segment_ids", "positions", "loss_mask"}
        assert not batch["loss_mask"][batch["segment_ids"] == 0].any()
        for row in range(2):
            segments = batch["segment_ids"][row]
            for segment in range(1, segments.max() + 1):
                of = segments == segment
                mask = batch["loss_mask"][row][of].tolist()
                found.append((batch["tokens"][row][of].tolist(), mask))
    assert set(map(str, found)) == set(map(str, wanted))
    held_out = held_out_batches(corpus, config, seq_len=512, rows=2)
    kept = held_out_examples(chats, config.held_out_bytes)
    scored = corpus.held_out_text.decode()
    assert scored == "".join(map(answers_of, kept)) and EOS not in scored
    assert sum(batch["loss_mask"].sum() for batch in held_out) == sum(
        len(corpus.tokenizer.encode_segments(part.segments))
        for example in kept for part in example if part.learned
    )


@pytest.mark.faults
def test_resume_at_every_batch_of_chats(source, tmp_path, record_property):
    """Across epochs and the border of two stages, of which the first leaves long chats out."""
    config = DataConfig(source=str(source), format="chat", thinking="high", held_out_fraction=0.1)
    corpus = prepare_corpus(config, vocab_size=VOCAB_SIZE, workdir=tmp_path)
    stages = [StageConfig(tokens=10 * 384, seq_len=96, batch_tokens=384),
              StageConfig(tokens=1, seq_len=512, batch_tokens=1024)]
    assert not fitting(corpus.train, 96).all()
    iterator = make_train_iterator(corpus, config, stages)
    states, batches, resumes, ahead = [], [], 40, 9
    for _ in range(resumes + ahead):
        states.append(iterator.get_state())
        batches.append(next(iterator))
    for step, state in enumerate(states[:resumes]):
        iterator.set_state(json.loads(json.dumps(state)))
        for batch in batches[step : step + ahead]:
            again = next(iterator)
            assert batch.keys() == again.keys()
            for name in batch:
                np.testing.assert_array_equal(again[name], batch[name])
    record_property(F4, resumes)


def test_the_encoded_chats_are_kept(source, tmp_path):
    config = DataConfig(source=str(source), format="chat", held_out_fraction=0.1)
    corpus = prepare_corpus(config, vocab_size=VOCAB_SIZE, workdir=tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenized, "_encode_chats", None)
        again = prepare_corpus(config, vocab_size=VOCAB_SIZE, workdir=tmp_path)
    for name in corpus.train.arrays:
        np.testing.assert_array_equal(again.train.arrays[name], corpus.train.arrays[name])
    assert again.train.starts.tolist() == corpus.train.starts.tolist()
    before = (tmp_path / TOKENS_FILE).read_bytes()
    thinking = DataConfig(
        source=str(source), format="chat", held_out_fraction=0.1, thinking="high"
    )
    other = prepare_corpus(thinking, vocab_size=VOCAB_SIZE, workdir=tmp_path)
    assert len(other.train.tokens) > len(corpus.train.tokens)
    assert (tmp_path / TOKENS_FILE).read_bytes() != before


def test_held_out_examples_are_limited(source):
    chats = read_chats(str(source), thinking="off", held_out_fraction=0.5)
    every = held_out_examples(chats, 10**9)
    sizes = np.cumsum([len(answers_of(example).encode()) for example in every])
    assert len(held_out_examples(chats, int(sizes[2]))) == 3
    assert len(held_out_examples(chats, int(sizes[2]) - 1)) == 2
    assert len(held_out_examples(chats, 1)) == 1


@pytest.mark.faults
def test_held_out_answers_without_text_are_refused(tmp_path):
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(
        json.dumps({"messages": [user(str(number)), answer("")]}) + "\n" for number in range(9)
    ))
    chats = read_chats(str(path), thinking="off", held_out_fraction=0.3)
    with pytest.raises(InputError, match="expected text in the answers that are held out"):
        held_out_examples(chats, 100)


def test_chats_longer_than_a_row_are_left_out_of_training(source, tmp_path):
    """Also where a stage follows: each has the text that its batches take."""
    config = DataConfig(source=str(source), format="chat", held_out_fraction=0.1)
    corpus = prepare_corpus(config, vocab_size=VOCAB_SIZE, workdir=tmp_path)
    sizes = np.diff(corpus.train.starts)
    seq_len = int(np.median(sizes))
    fits = fitting(corpus.train, seq_len)
    assert fits.tolist() == (sizes <= seq_len).tolist() and 0 < fits.sum() < len(fits)
    short = StageConfig(tokens=40 * 4 * seq_len, seq_len=seq_len, batch_tokens=4 * seq_len)
    long = StageConfig(tokens=1, seq_len=512, batch_tokens=1024)
    batches = make_train_iterator(corpus, config, [short, long])
    for _ in range(short.steps):
        batch = next(batches)
        for row in range(4):
            tokens, segments = batch["tokens"][row], batch["segment_ids"][row]
            starts = np.flatnonzero(np.diff(segments, prepend=0) * (segments > 0))
            assert (tokens[starts] == corpus.tokenizer.bos_id).all()
    assert next(batches)["tokens"].shape == (2, 512)
    with pytest.raises(InputError, match=f"expected at least {sizes.min()}, the tokens of the sho"):
        tiny = StageConfig(tokens=1, seq_len=2, batch_tokens=2)
        make_train_iterator(corpus, config, [tiny])
