"""Needles in haystacks: the texts, the prompts, what is scored, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tiny_models import write_workdir

from dsv4_jax import InputError, evaluate, needle_eval
from dsv4_jax.cli import read_config_file
from dsv4_jax.config import CSA, WINDOW
from dsv4_jax.corpus import read_corpus
from dsv4_jax.evaluate import Settings, table
from dsv4_jax.infer import Generated
from dsv4_jax.needle import MOST_FACTS, TRAINING_TEXTS, TRAINING_WORDS, training_text
from dsv4_jax.needle_eval import (
    OTHER_FACTS,
    answer_tokens,
    is_answer,
    measure_retrieval,
    shortest_prompt,
    write_prompt,
)
from dsv4_jax.run_config import RunConfig
from dsv4_jax.served_model import ModelFolder, ServedModel, open_model
from dsv4_jax.tokenizer import train_tokenizer
from dsv4_jax.train import train

pytestmark = pytest.mark.usefixtures("quick_generation")
ROOT = Path(__file__).parents[1]
STATEMENT = re.compile(r"They call (\w+) (\w+)\.")
QUESTION = re.compile(r"What do they call (\w+)\? They call \1")
TOKENIZER = train_tokenizer([training_text(number) for number in range(100)], vocab_size=1024)


def test_training_texts_follow_from_their_numbers():
    assert training_text(7) == training_text(7)
    assert len({training_text(number) for number in range(50)}) == 50


@pytest.mark.parametrize("number", range(20))
def test_training_texts_ask_for_what_they_have_said(number):
    text = training_text(number)
    facts, again = {}, 0
    for found in STATEMENT.finditer(text):
        name, value = found.groups()
        if text[: found.start()].endswith(f"What do they call {name}? "):
            assert name in facts
        again += name in facts
        assert facts.setdefault(name, value) == value
    assert 1 <= len(facts) <= MOST_FACTS
    assert len(set(facts.values())) == len(facts)
    assert again > 0


def test_training_texts_have_a_token_for_each_word():
    sizes = [len(TOKENIZER.encode(training_text(number))) for number in range(100)]
    least, most = TRAINING_WORDS
    assert least - 11 < min(sizes) < 2 * least and most / 2 < max(sizes) <= most


def test_the_source_is_split_by_the_hash_of_its_texts():
    corpus = read_corpus("needle", text_field="text", held_out_fraction=0.03)
    train_texts, held_out = ({d.text for d in part} for part in (corpus.train, corpus.held_out))
    assert not train_texts & held_out
    assert len(corpus.train) + len(corpus.held_out) == TRAINING_TEXTS
    assert len(corpus.held_out) == round(0.03 * TRAINING_TEXTS)


@pytest.mark.parametrize("length", [128, 500])
@pytest.mark.parametrize("depth", [0.0, 0.3, 1.0])
def test_prompts_have_the_asked_length_and_the_answer_once_at_the_asked_depth(length, depth):
    prompt = write_prompt(TOKENIZER, length, depth, number=3)
    assert length - 8 < len(prompt.tokens) <= length
    assert prompt.tokens[0] == TOKENIZER.bos_id
    text = TOKENIZER.decode(prompt.tokens)
    np.testing.assert_array_equal(prompt.tokens[1:], TOKENIZER.encode(text))
    assert text.count(prompt.answer) == 1
    question = QUESTION.search(text)
    assert question.end() == len(text)
    facts = {m.group(1): (m.group(2), m.span()) for m in STATEMENT.finditer(text)}
    assert len(facts) == 1 + OTHER_FACTS
    value, (start, end) = facts[question.group(1)]
    assert value == prompt.answer
    hay = text[1 : question.start()]
    assert start / (len(hay) - (end - start)) == pytest.approx(depth, abs=30 / len(hay))
    assert prompt.distance == len(TOKENIZER.encode(text[end:]))


def test_prompts_follow_from_their_numbers():
    first, again, other = (write_prompt(TOKENIZER, 128, 0.5, number) for number in (0, 0, 1))
    np.testing.assert_array_equal(first.tokens, again.tokens)
    assert first.answer == again.answer
    assert not np.array_equal(first.tokens, other.tokens)


def test_the_shortest_prompt_is_as_long_as_it_says():
    least = shortest_prompt(TOKENIZER)
    assert all(len(write_prompt(TOKENIZER, least, 0.5, n).tokens) <= least for n in range(50))


@pytest.mark.parametrize("text, right", [
    (" falcon.", True),
    ("falcon", True),
    (" falcons", False),
    (" falc", False),
    (" hare. falcon.", False),
    ("", False),
])
def test_answers_are_exact(text, right):
    assert is_answer(text, "falcon") is right


def test_shares_count_the_right_answers_of_each_length_and_depth(monkeypatch, folder):
    """A model that finds what begins in the first 60 tokens, and names another animal else."""
    model = open_model(folder)._replace(tokenizer=TOKENIZER)
    batches = []

    def generate(config, params, tokens, **settings):
        batches.append((len(tokens), len(tokens[0])))
        assert settings["temperature"] == 0 and settings["runtime"] == model.runtime
        assert settings["max_new_tokens"] == answer_tokens(TOKENIZER)
        return Generated([answer(prompt) for prompt in tokens], [], None)

    def answer(tokens):
        text = TOKENIZER.decode(tokens)
        name = QUESTION.search(text).group(1)
        start, value = next(
            (m.start(), m.group(2)) for m in STATEMENT.finditer(text) if m.group(1) == name
        )
        known = len(TOKENIZER.encode(text[:start])) < 60
        return TOKENIZER.encode(f" {value}." if known else " unicorn.")

    monkeypatch.setattr(needle_eval, "generate", generate)
    rows = measure_retrieval(model, (100, 200), (0.0, 0.25, 1.0), 3, batch_tokens=400)
    assert {name: row["retrieved"] for name, row in rows.items()} == {
        "needle/100/0": 1, "needle/100/0.25": 1, "needle/100/1": 0,
        "needle/200/0": 1, "needle/200/0.25": 1, "needle/200/1": 0,
    }  # fmt: skip
    assert all(rows_ * 100 <= 400 and length <= 200 for rows_, length in batches)
    assert sum(rows_ for rows_, _ in batches) == 18
    at_end = rows["needle/200/1"]
    assert (at_end["samples"], at_end["window_reach"]) == (3, 7)
    assert at_end["distance"] == 9  # the question's
    assert rows["needle/200/0"]["distance"] > 150


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A workdir of an untrained model with one CSA layer and 256 positions."""
    folder = tmp_path_factory.mktemp("models") / "run"
    write_workdir(folder)
    return folder


def test_the_task_writes_results_and_a_plot(folder, tmp_path, monkeypatch):
    plot, output = tmp_path / "new" / "plot.png", tmp_path / "results.json"
    settings = Settings(
        needle_lengths=(240,), needle_depths=(0.0, 1.0), needle_samples=1, needle_plot=str(plot)
    )
    results = evaluate.evaluate(folder, "needle", settings, output=str(output))
    assert json.loads(output.read_text())["results"] == results
    assert list(results) == ["needle/240/0", "needle/240/1"]
    assert all(row["retrieved"] == 0 and row["samples"] == 1 for row in results.values())
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_the_table_has_lengths_and_depths():
    row = {"retrieved": 1.0, "samples": 2}
    results = {
        "perplexity": {"tokens": 5},
        "needle/64/0": row, "needle/64/0.5": row | {"retrieved": 0.5},
        "needle/1024/0": row, "needle/1024/0.5": row | {"retrieved": 0.0},
    }  # fmt: skip
    assert table(results) == [
        "perplexity  tokens  5",
        "                       depth 0  depth 0.5",
        "needle in 64 tokens       1.00       0.50",
        "needle in 1024 tokens     1.00       0.00",
    ]


@pytest.fixture
def unread(monkeypatch):
    """Weights that must not be read."""

    def load(self):
        raise AssertionError("the weights were read")

    monkeypatch.setattr(ModelFolder, "load", load)


@pytest.mark.parametrize("settings, message", [
    ({"needle_lengths": (250,)}, r"needle_lengths: expected \d+ tokens.* leave room .* got 250"),
    ({"needle_lengths": (240, 20)}, r"needle_lengths: expected \d+ tokens.* need, .* got 20"),
    ({"needle_lengths": ()}, "needle_lengths: expected one or more .* got none"),
    ({"needle_lengths": (-1,)}, "needle_lengths: .* got -1"),
    ({"needle_lengths": (240, 240)}, "needle_lengths: .* different numbers, got 240,240"),
    ({"needle_depths": ()}, "needle_depths: expected one or more .* got none"),
    ({"needle_depths": (0.5, 1.5)}, "needle_depths: expected 0, .* to 1, .* got 1.5"),
    ({"needle_depths": (float("nan"),)}, "needle_depths: .* got nan"),
    ({"needle_plot": "."}, r"needle_plot: expected a file to write, got the folder \."),
    ({"needle_plot": "/dev/null/x.png"}, "needle_plot: cannot write"),
    ({}, r"needle_lengths: expected \d+ tokens.*, got 32"),  # the length that it was trained on
])
def test_bad_input_is_refused_before_weights_are_read(folder, unread, settings, message):
    settings = {"needle_lengths": (240,)} | settings if settings else settings
    with pytest.raises(InputError, match=message) as caught:
        evaluate.evaluate(folder, "needle", Settings(**settings))
    assert "\n" not in str(caught.value)


def test_samples_below_1_are_refused():
    with pytest.raises(InputError, match="needle_samples: expected at least 1, got 0"):
        Settings(needle_samples=0)


def test_matplotlib_that_is_not_installed_is_named(folder, unread, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    settings = Settings(needle_lengths=(240,), needle_plot=str(tmp_path / "plot.png"))
    with pytest.raises(InputError, match=r"the package matplotlib, got none; .*\[plot\]"):
        evaluate.evaluate(folder, "needle", settings)


def test_the_command_refuses_what_is_no_number(folder):
    done = subprocess.run(
        [sys.executable, ROOT / "launch" / "evaluate.py", f"--checkpoint={folder}",
         "--tasks=needle", "--needle_lengths=240,x"],
        capture_output=True, text=True, check=False, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "--needle_lengths: expected whole numbers with commas between, got '240,x'" in (
        done.stderr
    )


@pytest.mark.heavy
def test_the_config_learns_to_retrieve_through_compressed_entries_alone(tmp_path):
    config = RunConfig.from_config_dict(read_config_file(str(ROOT / "configs" / "needle.py")))
    train(config, tmp_path / "run")
    model = open_model(tmp_path / "run")
    trained, depths = config.stages[0].seq_len, (0.0, 0.5)

    def shares(model: ServedModel, length: int) -> list[float]:
        rows = measure_retrieval(model, (length,), depths, 50, batch_tokens=8192)
        assert all(row["distance"] > row["window_reach"] for row in rows.values())
        return [row["retrieved"] for row in rows.values()]

    assert min(shares(model, trained)) > 0.9
    # Of what it was not trained on it finds 0.9 to 1, by the rounding of the machine that trained
    # it; one of the words that a prompt says would be right once in four.
    assert min(shares(model, 2 * trained)) > 0.6
    # The same weights without the entries: only windows are left.
    assert CSA in model.config.layer_types
    blind = dataclasses.replace(
        model.config, layer_types=(WINDOW,) * model.config.num_layers,
        rope_theta=model.config.compress_rope_theta,
    )
    for length in (trained, 2 * trained):
        assert max(shares(model._replace(config=blind), length)) < 0.2
