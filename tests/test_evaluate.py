"""The evaluation command: its numbers, its files, and bad input refused before weights are read."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from tiny_models import TEXT, TOKENIZER, write_saved, write_workdir

from dsv4_jax import InputError, Transformer, evaluate
from dsv4_jax.evaluate import Settings, parse_tasks, table
from dsv4_jax.served_model import ModelFolder, open_model

ROOT = Path(__file__).parents[1]
TOLERANCE = 1e-5  # relative, of sums of float32 log-likelihoods


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    write_workdir(folder / "run")
    write_saved(folder / "saved", "float32")
    return folder


def run_command(*arguments: object) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, ROOT / "launch" / "evaluate.py", *map(str, arguments)],
        capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


def nats_of(folder: Path, text: str) -> float:
    """Return what the plain forward pass charges for the tokens of a text, all after BOS."""
    model = open_model(folder)
    tokens = np.array([[TOKENIZER.bos_id, *TOKENIZER.encode(text)]])
    logits = jax.jit(Transformer(model.config, model.runtime).apply)(
        {"params": model.params}, tokens
    )
    chosen = np.take_along_axis(jax.nn.log_softmax(logits)[0, :-1], tokens[0, 1:, None], axis=1)
    return -float(chosen.sum(dtype=float))


@pytest.fixture(scope="module")
def done(folders):
    """The command on the held-out text of a workdir, all of which one window reads."""
    return run_command(
        f"--checkpoint={folders / 'run'}", "--tasks=perplexity", "--context=200",
        f"--output={folders / 'new' / 'results.json'}",
    )


def test_the_command_scores_the_held_out_text_of_a_workdir(folders, done):
    assert done.returncode == 0, done.stderr
    document = json.loads((folders / "new" / "results.json").read_text())
    assert document["checkpoint"] == str(folders / "run")
    assert (document["compute_dtype"], document["csa"]) == ("float32", "dense")
    found = document["results"]["perplexity"]
    held_out = TEXT[-found["bytes"] :]
    tokens, nats = len(TOKENIZER.encode(held_out)), nats_of(folders / "run", held_out)
    assert (found["tokens"], found["documents"]) == (tokens, 1)
    assert (found["context"], found["stride"]) == (200, 200)
    assert found["bytes"] == round(0.3 * len(TEXT))
    assert found["nats_per_token"] == pytest.approx(nats / tokens, rel=TOLERANCE)
    assert found["perplexity_per_token"] == pytest.approx(math.exp(nats / tokens), rel=1e-4)
    assert found["bits_per_byte"] == pytest.approx(
        nats / math.log(2) / len(held_out), rel=TOLERANCE
    )


def test_the_command_prints_a_table(done):
    lines = [line.split() for line in done.stdout.splitlines()]
    assert ["perplexity", "context", "200"] in lines
    assert any(line[:2] == ["perplexity", "bits_per_byte"] for line in lines)


def test_bytes_are_those_of_utf8_and_documents_are_scored_one_by_one(folders, tmp_path):
    texts = {"a.txt": "def é(漢字):", "b.txt": "return a"}
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    results = evaluate.evaluate(
        folders / "saved", "perplexity", Settings(text=str(tmp_path), context=64)
    )
    found = results["perplexity"]
    nats = sum(nats_of(folders / "saved", text) for text in texts.values())
    assert found["documents"] == 2
    assert found["bytes"] == sum(len(text.encode()) for text in texts.values())
    assert found["nats_per_token"] * found["tokens"] == pytest.approx(nats, rel=TOLERANCE)


@pytest.fixture
def unread(monkeypatch):
    """Weights that must not be read."""

    def load(self):
        raise AssertionError("the weights were read")

    monkeypatch.setattr(ModelFolder, "load", load)


@pytest.mark.parametrize("checkpoint, tasks, settings, message", [
    ("run", "perplexty", {}, "tasks: .* got 'perplexty'; did you mean perplexity"),
    ("run", "hellaswag", {}, "lm_eval:NAME, got 'hellaswag'; for lm-eval's write lm_eval:hellasw"),
    ("run", "", {}, "tasks: expected perplexity.*, got ''"),
    ("run", "perplexity:x", {}, "tasks: expected perplexity, got 'perplexity:x'"),
    ("run", "lm_eval", {}, "tasks: expected lm_eval:NAME, got 'lm_eval'"),
    ("run", "perplexity,perplexity", {}, "expected each task once, got 'perplexity' again"),
    ("saved", "perplexity", {}, "text: expected .* got nothing; add --text=PATH"),
    ("saved", "perplexity", {"text": "no/such"}, "text: expected .* 'no/such' does not exist"),
    ("run", "perplexity", {"context": 257}, r"context: expected 1 to 256 .* got 257"),
    ("run", "perplexity", {"context": 8, "stride": 9}, "stride: expected 1 to 8 .* got 9"),
    ("none", "perplexity", {}, "checkpoint: expected the folder of a model, got '.*none'"),
])
def test_bad_input_is_refused_before_weights_are_read(
    folders, unread, checkpoint, tasks, settings, message
):
    with pytest.raises(InputError, match=message) as caught:
        evaluate.evaluate(folders / checkpoint, tasks, Settings(**settings))
    assert "\n" not in str(caught.value)


def test_held_out_chats_are_no_text(folders, unread, tmp_path):
    run = Path(shutil.copytree(folders / "run", tmp_path / "run"))
    sections = json.loads((run / "config.json").read_text())
    sections["data"]["format"] = "chat"
    (run / "config.json").write_text(json.dumps(sections))
    with pytest.raises(InputError, match="text: expected .* held out chats, .* add --text=PATH"):
        evaluate.evaluate(run, "perplexity", Settings())


@pytest.mark.parametrize("name", ["context", "stride", "batch_tokens", "lm_eval_limit"])
def test_numbers_below_1_are_refused(name):
    with pytest.raises(InputError, match=f"{name}: expected at least 1, got 0"):
        Settings(**{name: 0})


def test_a_file_that_cannot_be_written_is_refused_before_weights_are_read(
    folders, unread, tmp_path
):
    (tmp_path / "file").write_text("")
    for output, message in (
        (tmp_path, "output: expected a file to write, got the folder"),
        (tmp_path / "file" / "results.json", "output: cannot write"),
    ):
        with pytest.raises(InputError, match=message):
            evaluate.evaluate(folders / "run", "perplexity", Settings(), output=str(output))


def test_lm_eval_that_is_not_installed_is_named(folders, unread, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.delitem(sys.modules, "dsv4_jax.lm_eval_model", raising=False)
    monkeypatch.delattr("dsv4_jax.lm_eval_model", raising=False)
    with pytest.raises(InputError, match="expected the package lm-eval, .*pip install"):
        evaluate.evaluate(folders / "run", "lm_eval:arc_easy", Settings())


def test_the_command_refuses_in_one_line(folders, tmp_path):
    run = Path(shutil.copytree(folders / "run", tmp_path / "run"))
    (run / "tokenizer.json").unlink()
    done = run_command(f"--checkpoint={run}", "--tasks=perplexity")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "expected a tokenizer.json, got none" in done.stderr


def test_tasks_are_parsed_with_their_arguments():
    assert parse_tasks("lm_eval:a, perplexity,lm_eval:b") == [
        ("lm_eval", "a"), ("perplexity", ""), ("lm_eval", "b"),
    ]  # fmt: skip


def test_the_table_aligns_rows_and_metrics():
    lines = table({"a": {"x": 1, "long": 0.123456789}, "row": {"y": "none"}})
    assert lines == ["a    x     1", "a    long  0.123457", "row  y     none"]
