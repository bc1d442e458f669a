"""The split is clean, packing loses nothing, and every resume continues the same stream."""

from __future__ import annotations

import collections
import dataclasses
import gzip
import itertools
import json
import random
import re
import shutil

import grain
import numpy as np
import orbax.checkpoint as ocp
import pytest

from dsv4_jax.corpus import read_corpus
from dsv4_jax.data import (
    DocumentOrder,
    Pieces,
    held_out_batches,
    make_train_iterator,
    pack,
)
from dsv4_jax.errors import InputError
from dsv4_jax.run_config import DataConfig, StageConfig
from dsv4_jax.tokenized import (
    TOKENS_FILE,
    Documents,
    baseline_bits_per_byte,
    prepare_corpus,
)
from dsv4_jax.tokenizer import train_tokenizer

VOCAB_SIZE = 300
SEQ_LEN = 16
EPOCHS = 8  # that the resume tests go through
RESUMED = 301  # batches, of the first, before each of which a run is resumed
B12 = "B12: bad data, refused in one line or cut"  # names of counts of cases
F4 = "F4: resumed, all batches are those of a stream without an end"
F10 = "F10: resumed by another number of hosts, the same global batches"
F11 = "F11: a config that is not that of the checkpoint, refused by name"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Texts of 1 to 120 characters, so that documents are shorter and longer than a row."""
    root = tmp_path_factory.mktemp("texts")
    choose = random.Random(0)
    for number in range(120):
        path = root / f"{number % 7}" / f"{number}.txt"
        path.parent.mkdir(exist_ok=True)
        text = "".join(choose.choices("abcdé漢 \n", k=choose.randint(1, 120)))
        path.write_text(f"{number}{text}", encoding="utf-8")
    return root


def stage_of(steps: int = 1, seq_len: int = SEQ_LEN, rows: int = 8) -> StageConfig:
    return StageConfig(tokens=steps * seq_len * rows, seq_len=seq_len, batch_tokens=seq_len * rows)


ONE = (stage_of(),)  # the last stage, here the only one, has no end


@pytest.fixture(scope="module")
def config(folder):
    return DataConfig(source=str(folder), held_out_fraction=0.1, seed=3)


@pytest.fixture(scope="module")
def corpus(config, tmp_path_factory):
    return prepare_corpus(config, vocab_size=VOCAB_SIZE, workdir=tmp_path_factory.mktemp("work"))


@pytest.fixture(scope="module")
def stream(corpus, config):
    """The batches of the first epochs and the iterator's state before each and after the last."""
    iterator = make_train_iterator(corpus, config, ONE)
    states, batches = [iterator.get_state()], []
    for _ in range(EPOCHS * batches_per_epoch(corpus)):
        batches.append(next(iterator))
        states.append(iterator.get_state())
    return batches, states


def batches_per_epoch(corpus) -> int:
    tokens = sum(len(piece) for piece in all_pieces(corpus.train, SEQ_LEN))
    return -(-tokens // ONE[0].batch_tokens)


def all_pieces(documents: Documents, seq_len: int) -> list[np.ndarray]:
    pieces = Pieces(documents, seq_len)
    return [pieces[index]["tokens"] for index in range(len(pieces))]


def segments(rows) -> list[tuple[int, ...]]:
    """Return the tokens of every segment of some rows or batches."""
    found = []
    for row in rows:
        for tokens, ids in zip(
            np.atleast_2d(row["tokens"]), np.atleast_2d(row["segment_ids"]), strict=True
        ):
            found += [tuple(tokens[ids == i].tolist()) for i in range(1, ids.max() + 1)]
    return found


def bigrams(sequences) -> collections.Counter:
    """Count (token, next token) within sequences: what a next-token loss is charged for."""
    return collections.Counter(
        pair
        for sequence in sequences
        for pair in zip(list(sequence)[:-1], list(sequence)[1:], strict=True)
    )


def each_document(documents: Documents) -> list[np.ndarray]:
    return [documents[i : i + 1].tokens for i in range(len(documents))]


def assert_same(batches, others):
    assert len(batches) == len(others)
    for batch, other in zip(batches, others, strict=True):
        assert batch.keys() == other.keys()
        for name in batch:
            np.testing.assert_array_equal(batch[name], other[name])


def take(iterator, count):
    return [next(iterator) for _ in range(count)]


# Packing


def test_rows_are_well_formed(stream):
    for batch in stream[0]:
        assert set(batch) == {"tokens", "segment_ids", "positions"}
        for array in batch.values():
            assert array.shape == (8, SEQ_LEN)
            assert array.dtype == np.int32
        for tokens, ids, positions in zip(
            batch["tokens"], batch["segment_ids"], batch["positions"], strict=True
        ):
            length = np.count_nonzero(ids)
            assert ids[0] == 1
            assert set(np.diff(ids[:length])) <= {0, 1}  # contiguous, counted from 1
            assert not ids[length:].any() and not tokens[length:].any()
            begins = np.flatnonzero(np.diff(ids[:length], prepend=0))
            expected = np.arange(length) - begins[ids[:length] - 1]
            np.testing.assert_array_equal(positions[:length], expected)


def test_every_piece_survives_packing_once(corpus):
    source = Pieces(corpus.train, SEQ_LEN)
    epoch = grain.MapDataset.source(source).seed(0).shuffle()
    rows = list(pack(epoch, seq_len=SEQ_LEN, seed=0))
    expected = [tuple(piece.tolist()) for piece in all_pieces(corpus.train, SEQ_LEN)]
    assert collections.Counter(segments(rows)) == collections.Counter(expected)
    filled = sum(np.count_nonzero(row["segment_ids"]) for row in rows)
    assert filled > 0.95 * len(rows) * SEQ_LEN  # measured: 0.96 to 0.99 on real text


@pytest.mark.parametrize("seq_len", [2, 3, 16, 1000])
def test_pieces_predict_every_token_but_bos_once(corpus, seq_len):
    pieces = all_pieces(corpus.train, seq_len)
    assert max(map(len, pieces)) <= seq_len
    assert min(map(len, pieces)) >= 2
    assert bigrams(pieces) == bigrams(each_document(corpus.train))


def test_documents_are_the_texts(corpus, config):
    tokenizer = corpus.tokenizer
    texts = {document.text for document in read(config).train}
    documents = each_document(corpus.train)
    assert {tokenizer.decode(document) for document in documents} == texts
    assert all((d[0], d[-1]) == (tokenizer.bos_id, tokenizer.eos_id) for d in documents)


def read(config):
    return read_corpus(
        config.source, text_field=config.text_field, held_out_fraction=config.held_out_fraction
    )


def test_epochs_differ_in_order(stream):
    batches, _ = stream
    size = len(batches) // EPOCHS
    first, second = segments(batches[:size]), segments(batches[size : 2 * size])
    assert first != second
    assert len(set(first) & set(second)) > 0.8 * len(set(first))  # but not in content


# Determinism and resume


def test_same_seed_same_stream(stream, corpus, config):
    batches, _ = stream
    assert_same(take(make_train_iterator(corpus, config, ONE), len(batches)), batches)


def test_other_seed_other_stream(stream, corpus, config):
    other = dataclasses.replace(config, seed=config.seed + 1)
    assert segments(take(make_train_iterator(corpus, other, ONE), 2)) != segments(stream[0][:2])


@pytest.mark.faults
def test_resume_at_every_batch(stream, corpus, config, record_property):
    batches, states = stream
    iterator = make_train_iterator(corpus, config, ONE)
    ahead = 9  # batches that are compared after each resume: more than one group of packed rows
    assert len(batches) >= RESUMED + ahead
    assert RESUMED > 2 * batches_per_epoch(corpus)  # so that ends of epochs are among them
    for step, state in enumerate(states[:RESUMED]):
        iterator.set_state(json.loads(json.dumps(state)))
        assert_same(take(iterator, ahead), batches[step : step + ahead])
    record_property(F4, RESUMED)


@pytest.mark.faults
def test_resume_of_a_resume(stream, corpus, config, record_property):
    batches, states = stream
    choose, chains = random.Random(0), 50
    for number in range(chains):
        step = choose.randrange(RESUMED)
        state = states[step]
        for _ in range(1 + 2 + number % 2):  # the first, and two or three in a row after it
            iterator = make_train_iterator(corpus, config, ONE)
            iterator.set_state(state)
            assert iterator.get_state() == state
            count = choose.randrange(4)
            assert_same(take(iterator, count), batches[step : step + count])
            step, state = step + count, iterator.get_state()
            assert state == states[step]
    record_property(F4, chains)


def test_resume_through_orbax(stream, corpus, config, tmp_path):
    batches, _ = stream
    size = len(batches) // EPOCHS
    steps = (0, 3, size - 1, size + 2)
    with ocp.CheckpointManager(tmp_path.absolute()) as manager:
        iterator = make_train_iterator(corpus, config, ONE)
        for step in range(steps[-1] + 1):
            if step in steps:
                args = ocp.args.Composite(data=ocp.args.JsonSave(iterator.get_state()))
                manager.save(step, args=args)
            next(iterator)
        manager.wait_until_finished()
        for step in steps:
            resumed = make_train_iterator(corpus, config, ONE)
            args = ocp.args.Composite(data=ocp.args.JsonRestore())
            resumed.set_state(manager.restore(step, args=args)["data"])
            expected = batches[step : step + 9]
            assert_same(take(resumed, len(expected)), expected)


@pytest.mark.parametrize("hosts", [1, 2, 4, 8])
def test_global_batches_do_not_depend_on_the_hosts(stream, corpus, config, hosts):
    batches, states = stream
    count, resumed_at = 12, 5
    shards = []
    for host in range(hosts):
        iterator = make_train_iterator(corpus, config, ONE, shard_index=host, shard_count=hosts)
        shards.append(take(iterator, count))
        assert iterator.get_state() == states[count]  # so hosts may also change on a resume
        iterator.set_state(states[resumed_at])
        assert_same(take(iterator, count - resumed_at), shards[-1][resumed_at:])
    assert_same(joined(shards), batches[:count])


def joined(shards: list[list]) -> list:
    """Join the parts that hosts have of the same batches."""
    return [
        {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        for parts in zip(*shards, strict=True)
    ]


@pytest.mark.faults
@pytest.mark.parametrize(("before", "after"), [*itertools.permutations([1, 2, 4, 8], 2)])
def test_another_number_of_hosts_goes_on(stream, corpus, config, before, after, record_property):
    batches, _ = stream
    saved_at, ahead = batches_per_epoch(corpus) - 5, 10  # across the end of an epoch

    def hosts(count):
        return [
            make_train_iterator(corpus, config, ONE, shard_index=host, shard_count=count)
            for host in range(count)
        ]

    savers, resumed = hosts(before), hosts(after)
    assert_same(joined([take(host, saved_at) for host in savers]), batches[:saved_at])
    states = [json.dumps(host.get_state()) for host in savers]
    assert len(set(states)) == 1
    for host in resumed:
        host.set_state(json.loads(states[0]))
    expected = batches[saved_at : saved_at + ahead]
    assert_same(joined([take(host, ahead) for host in resumed]), expected)
    record_property(F10, 1)


@pytest.mark.faults
def test_a_state_of_other_data_is_refused(stream, corpus, config, record_property):
    state = stream[1][4]
    reseeded = make_train_iterator(corpus, dataclasses.replace(config, seed=4), ONE)
    with pytest.raises(ValueError, match="data.seed: expected .* as in the checkpoint, got"):
        reseeded.set_state(state)
    other = dataclasses.replace(corpus, train=corpus.train[1:])
    with pytest.raises(ValueError, match="data.source .*: expected .* as in the checkpoint"):
        make_train_iterator(other, config, ONE).set_state(state)
    record_property(F11, 2)


@pytest.mark.faults
def test_another_tokenizer_is_named_before_its_tokens(
    stream, corpus, config, tmp_path, record_property
):
    """A tokenizer trained on other text, one of other size, and one whose tokens are the same."""
    state = json.loads(json.dumps(stream[1][4]))
    names = list(state["identity"])
    assert names[0] == "data.tokenizer (SHA-256 of its specification)"
    specification = corpus.tokenizer.specification
    others = [
        train_tokenizer(["other text"], vocab_size=VOCAB_SIZE).specification,
        train_tokenizer(["other text"], vocab_size=270).specification,
        json.dumps(json.loads(specification), indent=3),
    ]
    for number, other in enumerate(others):
        path = tmp_path / f"{number}.json"
        path.write_text(other, encoding="utf-8")
        changed = prepare_corpus(
            dataclasses.replace(config, tokenizer=str(path)),
            vocab_size=VOCAB_SIZE, workdir=tmp_path,
        )
        with pytest.raises(InputError, match=f"^{re.escape(names[0])}: expected .*, got .*; resu"):
            make_train_iterator(changed, config, ONE).set_state(state)
    record_property(F11, len(others))


def append(folder):
    with open(folder / "0" / "7.txt", "a", encoding="utf-8") as file:
        file.write("more")


# What may happen to the source between a checkpoint and the resume.
CHANGES = {
    "a file grows": append,
    "a file is emptied": lambda folder: (folder / "0" / "7.txt").write_bytes(b""),
    "a letter changes": lambda folder: (folder / "0" / "7.txt").write_bytes(b"x"),
    "a file is gone": lambda folder: (folder / "0" / "7.txt").unlink(),
    "a folder is gone": lambda folder: shutil.rmtree(folder / "0"),
    "files are new": lambda folder: [
        (folder / f"new{number}").write_bytes(b"new text") for number in range(9)
    ],
    "a file comes earlier": lambda folder: (folder / "6").rename(folder / "!6"),
}


@pytest.mark.faults
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_source_changed_since_the_checkpoint_is_refused(
    change, folder, config, tmp_path, record_property
):
    source, workdir = tmp_path / "texts", tmp_path / "run"
    shutil.copytree(folder, source)
    config = dataclasses.replace(config, source=str(source))

    def iterator():
        corpus = prepare_corpus(config, vocab_size=VOCAB_SIZE, workdir=workdir)
        return make_train_iterator(corpus, config, ONE)

    first = iterator()
    take(first, 3)
    iterator().set_state(first.get_state())
    change(source)
    with pytest.raises(InputError, match="data.source .*: expected .*; resume with the same data"):
        iterator().set_state(first.get_state())
    record_property(B12, 1)


@pytest.mark.faults
@pytest.mark.parametrize("characters", [13, 14, 15, 16, 29, 30, 31, 1000])
def test_a_document_longer_than_a_row_is_cut(tmp_path, characters, record_property):
    """With BOS and EOS, and one token in each of two pieces, around one, two and many rows."""
    for name, text in (("a", characters * "漢"), ("b", "x")):
        (tmp_path / f"{name}.txt").write_text(text, encoding="utf-8")
    config = DataConfig(source=str(tmp_path))
    corpus = prepare_corpus(config, vocab_size=270, workdir=tmp_path / "run")
    documents = each_document(corpus.train) + each_document(corpus.held_out)
    assert {len(document) for document in documents} == {3 * characters + 2, 3}
    for part in (corpus.train, corpus.held_out):
        pieces = all_pieces(part, SEQ_LEN)
        assert max(map(len, pieces)) <= SEQ_LEN
        assert bigrams(pieces) == bigrams(each_document(part))
    batch = next(make_train_iterator(corpus, config, ONE))
    assert batch["tokens"].shape == (8, SEQ_LEN)
    record_property(B12, 1)


def test_hosts_must_divide_the_batch(corpus, config):
    with pytest.raises(ValueError, match="stages: expected a multiple of the 3 hosts, got b"):
        make_train_iterator(corpus, config, ONE, shard_count=3)


# Stages

# Rows of three lengths; the second one begins in the middle of an epoch and spans more than one.
STAGES = (stage_of(7, 16), stage_of(24, 40, 4), stage_of(3, 8))


@pytest.fixture(scope="module")
def staged(corpus, config):
    """The batches of all stages and some more, and the states as in `stream`."""
    iterator = make_train_iterator(corpus, config, STAGES)
    states, batches = [iterator.get_state()], []
    for _ in range(sum(stage.steps for stage in STAGES) + 20):
        batches.append(next(iterator))
        states.append(iterator.get_state())
    return batches, states


def test_stages_have_their_rows_and_the_last_has_no_end(staged):
    shapes = [batch["tokens"].shape for batch in staged[0]]
    assert shapes == [(8, 16)] * 7 + [(4, 40)] * 24 + [(8, 8)] * (3 + 20)


@pytest.mark.faults
def test_resume_at_every_batch_of_every_stage(staged, corpus, config, record_property):
    batches, states = staged
    iterator = make_train_iterator(corpus, config, STAGES)
    ahead = 4
    for step, state in enumerate(states[:-ahead]):
        iterator.set_state(json.loads(json.dumps(state)))
        assert_same(take(iterator, ahead), batches[step : step + ahead])
    record_property(F4, len(states) - ahead)


@pytest.mark.faults
def test_stages_go_on_on_other_hosts(staged, corpus, config, record_property):
    batches, states = staged
    for hosts in (2, 4):
        shards = []
        for host in range(hosts):
            iterator = make_train_iterator(
                corpus, config, STAGES, shard_index=host, shard_count=hosts
            )
            iterator.set_state(states[5])
            shards.append(take(iterator, 30))
            assert iterator.get_state() == states[35]
        assert_same(joined(shards), batches[5:35])
    record_property(F10, 2)


def documents_seen(corpus, batches) -> collections.Counter:
    """Count in how many segments the beginning of each document is."""
    begins = [tuple(d[:6].tolist()) for d in each_document(corpus.train)]
    assert len(set(begins)) == len(begins)
    seen = collections.Counter(segment[:6] for segment in segments(batches))
    return collections.Counter({begin: seen[begin] for begin in begins})


def test_no_document_comes_twice_before_all_came_once(corpus, config):
    """Two stages share an epoch; what packing leaves over of a stage is all that is missing."""
    tokens = len(corpus.train.tokens)
    stages = tuple(
        StageConfig(tokens=tokens * part // 8, seq_len=length, batch_tokens=2 * length)
        for part, length in ((3, 16), (4, 64), (7, 16))
    )
    iterator = make_train_iterator(corpus, config, stages)
    two = take(iterator, stages[0].steps + stages[1].steps)
    seen = documents_seen(corpus, two)
    assert set(seen.values()) == {0, 1}
    assert sum(seen.values()) == pytest.approx(7 / 8 * len(seen), rel=0.1)
    longer = documents_seen(corpus, take(iterator, stages[2].steps))
    unseen = {begin for begin, count in seen.items() if count == 0}
    # The third stage begins with the eighth that is left, then shuffles the next epoch.
    assert sum(longer[begin] > 0 for begin in unseen) > 0.5 * len(unseen)
    assert max(longer.values()) <= 2


def test_the_order_of_documents_is_read_by_tokens(corpus):
    order = DocumentOrder(corpus.train, seed=5)
    lengths, count = np.diff(corpus.train.starts), len(corpus.train)
    ahead = np.concatenate([order.epoch(epoch) for epoch in range(4)])
    assert all(sorted(order.epoch(epoch)) == list(range(count)) for epoch in range(3))
    read = np.cumsum(lengths[ahead])
    choose = random.Random(0)
    for _ in range(200):
        place, tokens = choose.randrange(count), choose.randrange(1, 2 * len(corpus.train.tokens))
        before = read[place - 1] if place else 0
        found = order.after(place, tokens, lengths)
        assert read[found - 1] - before >= tokens > (read[found - 2] - before if found > 1 else 0)
    assert order.after(3, 0, lengths) == 3


@pytest.mark.faults
@pytest.mark.parametrize(("step", "stages", "message"), [
    (3, (stage_of(7, 32), *STAGES[1:]), r"stages.stage1.seq_len: expected 16, .* got 32"),
    (3, (stage_of(7, 16, 4), *STAGES[1:]), r"stages.stage1.batch_tokens: expected 128, .* got 64"),
    (3, (stage_of(30), *STAGES[1:]), r"stages.stage1 \(its documents\): expected \[0, "),
    (9, (stage_of(6), *STAGES[1:]), r"stages: expected 7 steps before stage2, .* got 6"),
    (9, STAGES[:1], r"stages: expected 7 steps before stage2, .* in 1 stages; change only stages"),
])
def test_stages_that_have_begun_may_not_change(
    staged, corpus, config, step, stages, message, record_property
):
    with pytest.raises(InputError, match=message):
        make_train_iterator(corpus, config, stages).set_state(staged[1][step])
    record_property(F11, 1)


def test_stages_that_have_not_begun_may_change(staged, corpus, config):
    """Also at the end of a stage, and where that was the last one."""
    _, states = staged
    changed = (STAGES[0], stage_of(5, 24))
    expected = take(make_train_iterator(corpus, config, changed), 9)
    iterator = make_train_iterator(corpus, config, changed)
    iterator.set_state(states[7])
    assert_same(take(iterator, 2), expected[7:])
    alone = make_train_iterator(corpus, config, STAGES[:1])
    take(alone, 7)
    iterator.set_state(alone.get_state())
    assert_same(take(iterator, 2), expected[7:])


# The held-out part


def test_held_out_scores_every_token_once(corpus, config):
    batches = held_out_batches(corpus, config, seq_len=SEQ_LEN, rows=6)
    assert_same(batches, held_out_batches(corpus, config, seq_len=SEQ_LEN, rows=6))
    for batch in batches:
        assert all(array.shape == (6, SEQ_LEN) for array in batch.values())
        assert all(array.dtype == np.int32 for array in batch.values())
    documents = each_document(corpus.held_out)
    assert bigrams(segments(batches)) == bigrams(documents)
    decoded = "".join(corpus.tokenizer.decode(document) for document in documents)
    assert decoded.encode() == corpus.held_out_text


def test_held_out_rows_of_hosts(corpus, config):
    whole = held_out_batches(corpus, config, seq_len=SEQ_LEN, rows=6)
    halves = [
        held_out_batches(
            corpus, config, seq_len=SEQ_LEN, rows=6, shard_index=i, shard_count=2
        )
        for i in range(2)
    ]
    assert_same(joined(halves), whole)


@pytest.mark.parametrize("limit", [1, 2, 100, 101, 102, 103, 10**6])
def test_held_out_bytes_bound(config, limit, tmp_path):
    corpus = prepare_corpus(
        dataclasses.replace(config, held_out_bytes=limit), vocab_size=VOCAB_SIZE, workdir=tmp_path
    )
    whole = "".join(document.text for document in read(config).held_out).encode()
    got = corpus.held_out_text
    assert whole.startswith(got)
    longest_character = 3  # bytes in the test's alphabet
    assert min(limit, len(whole)) - longest_character < len(got) <= limit
    decoded = [corpus.tokenizer.decode(document) for document in each_document(corpus.held_out)]
    assert "".join(decoded).encode() == got


def test_held_out_bytes_without_room(tmp_path):
    (tmp_path / "a.txt").write_text("漢字" * 50, encoding="utf-8")
    config = DataConfig(source=str(tmp_path / "a.txt"), held_out_bytes=2)
    with pytest.raises(ValueError, match="data.held_out_bytes: expected room for a character"):
        prepare_corpus(config, vocab_size=VOCAB_SIZE, workdir=tmp_path)


def test_baselines_are_bits_per_byte():
    noise = random.Random(0).randbytes(20_000)
    assert all(8.0 <= figure < 8.2 for figure in baseline_bits_per_byte(noise).values())
    figures = baseline_bits_per_byte(b"ab" * 10_000)
    assert set(figures) == {"gzip", "xz"}
    assert all(0 < figure < 0.1 for figure in figures.values())


# Sources


def test_stdlib_split():
    corpus = read_corpus("stdlib", text_field="text", held_out_fraction=0.03)
    train, held_out = ([d.name for d in part] for part in (corpus.train, corpus.held_out))
    assert len(train) > 300 and train == sorted(train, key=lambda name: name.split("/"))
    assert not set(train) & set(held_out)
    assert round(0.03 * len(train + held_out)) == len(held_out)
    folders = {part for name in train + held_out for part in name.split("/")[:-1]}
    assert "json" in folders and not folders & {"test", "tests", "idle_test", "site-packages"}


def test_directory_split_follows_the_path_alone(folder, config):
    first = read(config)
    assert len(first.held_out) == 12
    assert not {d.name for d in first.train} & {d.name for d in first.held_out}
    assert all((folder / d.name).read_text(encoding="utf-8") == d.text for d in first.train)


def test_hidden_and_empty_files_are_left_out(tmp_path):
    for name in ("a.txt", "b.txt", ".hidden", ".git/c.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"text")
    (tmp_path / "empty.txt").write_bytes(b"")
    corpus = read_corpus(str(tmp_path), text_field="text", held_out_fraction=0.1)
    assert {d.name for d in corpus.train + corpus.held_out} == {"a.txt", "b.txt"}
    assert len(corpus.held_out) == 1  # of few documents, one


def test_the_tail_of_a_text_is_held_out(tmp_path):
    text = "line\r\n" * 100
    (tmp_path / "a.txt").write_bytes(text.encode())
    corpus = read_corpus(str(tmp_path / "a.txt"), text_field="text", held_out_fraction=0.1)
    assert (corpus.train[0].text, corpus.held_out[0].text) == (text[:540], text[540:])


def test_equal_lines_stay_in_one_part(tmp_path):
    lines = [json.dumps({"body": f"text {number % 10}"}) for number in range(50)]
    (tmp_path / "a.jsonl").write_text("\n\n".join(lines) + "\n", encoding="utf-8")
    for source in (tmp_path / "a.jsonl", tmp_path):
        corpus = read_corpus(str(source), text_field="body", held_out_fraction=0.07)
        train, held_out = ([d.text for d in part] for part in (corpus.train, corpus.held_out))
        assert len(train + held_out) == 50
        assert held_out and not set(train) & set(held_out)


BAD_SOURCES = {
    "bad UTF-8": ("a.txt", b"abc\xff", "a.txt: expected UTF-8 text, got byte 0xff at offset 3"),
    "cut character": ("a.txt", "é".encode()[:1], "got byte 0xc3 at offset 0"),
    "empty": ("a.txt", b"", "expected text, but there is none in .*a.txt"),
    "empty lines": ("a.jsonl", b"\n \n", "expected text, but there is none"),
    "empty texts": ("a.jsonl", b'{"text": ""}\n', "expected text, but there is none"),
    "one character": ("a.txt", b"x", "nothing of .*a.txt .* is trained on"),
    "one line": ("a.jsonl", b'{"text": "x"}', "nothing of .* is trained on"),
    "no JSON": ("a.jsonl", b'{"text": "x"}\n{"text": ', "a.jsonl:2: expected a JSON object, got"),
    "deep JSON": ("a.jsonl", b"[" * 100_000, "a.jsonl:1: expected a JSON object, got"),
    "long number": ("a.jsonl", b"1" * 10_000, "a.jsonl:1: expected a JSON object, got"),
    "no object": ("a.jsonl", b"[1]", 'a.jsonl:1: expected an object with a string "text".* list'),
    "no field": ("a.jsonl", b'{"body": "x"}', 'string "text", got body; name the right key'),
    "no string": ("a.jsonl", b'{"text": 1}', 'string "text", got text'),
    "surrogate": ("a.jsonl", rb'{"text": "\ud800"}', "a.jsonl:1: .* half of a surrogate pair"),
    "bad UTF-8 in a line": ("a.jsonl", b"\n\xff", "a.jsonl:2: .* byte 0xff at offset 0"),
    # Text that is no UTF-8
    "stray continuation": ("a.txt", b"ab\x80", "got byte 0x80 at offset 2"),
    "too long a form": ("a.txt", b"\xc0\xaf", "got byte 0xc0 at offset 0"),
    "a surrogate's form": ("a.txt", b"a\xed\xa0\x80", "got byte 0xed at offset 1"),
    "above U+10FFFF": ("a.txt", b"\xf4\x90\x80\x80", "got byte 0xf4 at offset 0"),
    "cut emoji": ("a.txt", "a😀".encode()[:-1], "got byte 0xf0 at offset 1"),
    "UTF-16": ("a.txt", "text".encode("utf-16"), "got byte 0xff at offset 0"),
    "Latin-1": ("a.txt", "naïve".encode("latin-1"), "got byte 0xef at offset 2"),
    "gzip": ("a.txt.gz", gzip.compress(b"text"), "a.txt.gz: .* got byte 0x8b at offset 1"),
    "cut character in a line": ("a.jsonl", b'{"text": "\xc3"}', "a.jsonl:1: .* byte 0xc3"),
    "UTF-16 lines": ("a.jsonl", '{"text": "x"}'.encode("utf-16"), "a.jsonl:1: .* byte 0xff"),
    # Lines that are no JSON
    **{
        name: ("a.jsonl", b'{"text": "x"}\n' + line, "a.jsonl:2: expected a JSON object, got")
        for name, line in {
            "a word": b"text",
            "one brace": b"{",
            "no quotes": b"{text: 1}",
            "single quotes": b"{'text': 'x'}",
            "a comma too many": b'{"text": "x",}',
            "no colon": b'{"text" "x"}',
            "no value": b'{"text":}',
            "an open string": b'{"text": "x}',
            "an open object": b'{"text": "x"',
            "two objects": b'{"text": "x"} {"text": "y"}',
            "carriage returns": b'{"text": "x"}\r{"text": "y"}',
            "a comment": b'{"text": "x"} // mine',
            "a tab in a string": b'{"text": "a\tb"}',
            "a zero byte": b'{"text": "a\0b"}',
            "an unknown escape": rb'{"text": "\x41"}',
            "a short escape": rb'{"text": "\u12"}',
            "a byte order mark": '\ufeff{"text": "x"}'.encode(),
            "deep objects": b'{"text":' * 100_000,
            "Python's None": b'{"text": None}',
        }.items()
    },
    # Lines of other things than an object, or with no text in the field
    **{
        f"line {line}": ("a.jsonl", line, f'a.jsonl:1: .* a string "text", got {kind};')
        for line, kind in {
            b"null": "NoneType", b"true": "bool", b"1.5": "float", b'"text"': "str", b"[]": "list",
            b"{}": "none", b'{"Text": "x"}': "Text", b'{" text": "x"}': " text",
            b'{"": "x"}': "none", b'{"text": {"text": "x"}}': "text", b'{"b": 1, "a": 2}': "a, b",
            b'{"text": null}': "text", b'{"text": false}': "text", b'{"text": 1e999}': "text",
            b'{"text": NaN}': "text", b'{"text": ["x"]}': "text",
            rb'{"a\nb": 1}': r"a\\nb", rb'{"\ud800": 1}': r"\\ud800",
        }.items()
    },
    "many keys": ("a.jsonl", json.dumps({f"k{n}": n for n in range(1000)}).encode(), "got k0, k1"),
    "low surrogate": ("a.jsonl", rb'{"text": "a\udc00"}', "a.jsonl:1: .* half of a surrogate"),
    "pair reversed": ("a.jsonl", rb'{"text": "\udc00\ud800"}', "a.jsonl:1: .* half of a surro"),
    "a later bad line": ("a.jsonl", 99 * b'{"text": "x"}\n' + b"{", "a.jsonl:100: expected a JSON"),
    "one text": ("a.jsonl", 9 * b'{"text": "x"}\n', r"nothing of .* \(9 documents\) is trained"),
}


@pytest.mark.faults
@pytest.mark.parametrize(("name", "content", "message"), BAD_SOURCES.values(), ids=BAD_SOURCES)
def test_bad_sources_are_refused(tmp_path, name, content, message, record_property):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        read_corpus(str(tmp_path / name), text_field="text", held_out_fraction=0.1)
    assert "\n" not in str(error.value) and len(str(error.value)) < 500
    record_property(B12, 1)


@pytest.mark.faults
@pytest.mark.parametrize("source", ["", "absent.txt", "absent/"])
def test_missing_sources_are_refused(source, record_property):
    with pytest.raises(ValueError, match=f"data.source: expected .* but '{source}' does not exist"):
        read_corpus(source, text_field="text", held_out_fraction=0.1)
    record_property(B12, 1)


@pytest.mark.faults
@pytest.mark.parametrize(("key", "message"), [
    ("source", "^data.source: expected a file.* does not exist"),
    ("tokenizer", "^data.tokenizer: cannot read .*null byte; check the path"),
])
def test_a_path_with_a_zero_byte_is_refused(config, key, message, tmp_path, record_property):
    changed = dataclasses.replace(config, **{key: "a\0b"})
    with pytest.raises(InputError, match=message):
        prepare_corpus(changed, vocab_size=VOCAB_SIZE, workdir=tmp_path)
    record_property(B12, 1)


def test_unreadable_files_are_refused(tmp_path, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    (tmp_path / "a.txt").write_bytes(b"text")
    monkeypatch.setattr("pathlib.Path.read_bytes", refuse)  # root may read any file
    with pytest.raises(ValueError, match="cannot read .*a.txt: Permission denied; check the path"):
        read_corpus(str(tmp_path), text_field="text", held_out_fraction=0.1)


def test_a_path_that_no_system_takes_is_refused():
    with pytest.raises(ValueError, match="cannot read x+: File name too long; check the path"):
        read_corpus(300 * "x", text_field="text", held_out_fraction=0.1)


def test_empty_and_binary_directories_are_refused(tmp_path):
    with pytest.raises(ValueError, match="expected text, but there is none"):
        read_corpus(str(tmp_path), text_field="text", held_out_fraction=0.1)
    (tmp_path / "image.png").write_bytes(b"\x89PNG")
    with pytest.raises(ValueError, match="image.png: expected UTF-8 text, got byte 0x89"):
        read_corpus(str(tmp_path), text_field="text", held_out_fraction=0.1)


# The workdir


def test_encoded_text_is_kept_and_made_again_when_stale_or_damaged(config, tmp_path, corpus):
    kept = tmp_path / TOKENS_FILE

    def prepared(**changes):
        changed = dataclasses.replace(config, **changes)
        return prepare_corpus(changed, vocab_size=VOCAB_SIZE, workdir=tmp_path)

    def assert_is_corpus(other):
        for part in ("train", "held_out"):
            expected, got = getattr(corpus, part), getattr(other, part)
            np.testing.assert_array_equal(got.tokens, expected.tokens)
            np.testing.assert_array_equal(got.starts, expected.starts)

    assert_is_corpus(prepared())
    written = kept.stat().st_ino
    assert_is_corpus(prepared())
    assert kept.stat().st_ino == written
    good = kept.read_bytes()
    for damaged in (b"", good[:-4], good[:40], bytes([*good[:-1], good[-1] ^ 1])):
        kept.write_bytes(damaged)
        assert_is_corpus(prepared())
        assert kept.read_bytes() == good
    prepared(held_out_fraction=0.2)
    assert kept.read_bytes() != good
    assert_is_corpus(prepared())


def test_unwritable_workdirs_are_refused(config, tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ValueError, match="workdir: cannot write .*tokenizer.json"):
        prepare_corpus(config, vocab_size=VOCAB_SIZE, workdir=tmp_path / "file")
