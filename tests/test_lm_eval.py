"""lm-eval's requests get the likelihoods of the full forward pass; local tasks run offline."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import jax
import numpy as np
import pytest
from compiling import quick_jit
from tiny_models import TOKENIZER, write_saved

pytest.importorskip("lm_eval")

from lm_eval.api.instance import Instance
from lm_eval.utils import get_rolling_token_windows

from dsv4_jax import InputError, Transformer, evaluate, lm_eval_model
from dsv4_jax.encoding_texts import BOS
from dsv4_jax.evaluate import Settings
from dsv4_jax.lm_eval_model import EvaluatedModel, generation_of
from dsv4_jax.served_model import ServedModel, open_model

TOLERANCE = 1e-5  # relative, of sums of float32 log-likelihoods
CONTEXT = 40  # tokens
LONGEST = 120  # tokens that the forward pass reads
DOCUMENTS = [
    {"question": "def add(a, b)", "choices": ["return a + b", "return a - b"], "answer": 0},
    {"question": "def sub(a, b) ", "choices": ["return", " pass", "b"], "answer": 1},
]
FEW = {
    "choice": {"output_type": "multiple_choice", "doc_to_text": "{{question}}:",
               "doc_to_choice": "choices", "doc_to_target": "answer",
               "metric_list": [{"metric": "acc"}]},
    "rolling": {"output_type": "loglikelihood_rolling", "doc_to_text": "",
                "doc_to_target": "{{question}}", "metric_list": [{"metric": "bits_per_byte"}]},
    "generation": {"output_type": "generate_until", "doc_to_text": "{{question}}",
                   "doc_to_target": "x", "metric_list": [{"metric": "exact_match"}],
                   "generation_kwargs": {"until": ["\n"], "max_gen_toks": 8}},
    "beams": {"output_type": "generate_until", "doc_to_text": "{{question}}",
              "doc_to_target": "x", "metric_list": [{"metric": "exact_match"}],
              "generation_kwargs": {"until": ["\n"], "num_beams": 4}},
    "code": {"output_type": "generate_until", "doc_to_text": "{{question}}",
             "doc_to_target": "x", "metric_list": [{"metric": "exact_match"}],
             "unsafe_code": True},
    "absent": {"output_type": "loglikelihood_rolling", "doc_to_text": "",
               "doc_to_target": "{{question}}", "metric_list": [{"metric": "bits_per_byte"}]},
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("models") / "saved"
    write_saved(path, "float32")
    return path


pytestmark = pytest.mark.usefixtures("quick_scores", "quick_generation")


@pytest.fixture(scope="module")
def model(folder) -> ServedModel:
    return open_model(folder, skip_mtp=True)


@pytest.fixture(scope="module")
def answering(model) -> EvaluatedModel:
    return EvaluatedModel(model, context=CONTEXT, batch_tokens=256)


@pytest.fixture(scope="module")
def log_softmax(model):
    """The log-probabilities that the plain forward pass gives to all ids after each token."""
    apply = quick_jit(Transformer(model.config, model.runtime).apply)

    def of(tokens: list[int]) -> np.ndarray:
        row = np.resize(np.array(tokens), (1, LONGEST))
        logits = apply({"params": model.params}, row)[0, : len(tokens)]
        return np.asarray(jax.nn.log_softmax(logits), float)

    return of


def requests(kind: str, *arguments: tuple) -> list[Instance]:
    return [Instance(kind, {}, argument, 0, ("task", 0, 1)) for argument in arguments]


def ids(text: str) -> list[int]:
    return [TOKENIZER.bos_id, *TOKENIZER.encode(text).tolist()]


def expected(log_softmax, tokens: list[int], first: int) -> tuple[float, bool]:
    table, targets = log_softmax(tokens)[first - 1 : -1], np.array(tokens[first:])
    total = table[np.arange(len(targets)), targets].sum()
    return total, bool((table.argmax(axis=-1) == targets).all())


def test_likelihoods_are_those_of_the_full_forward_pass(answering, log_softmax):
    pairs = [
        ("def add(a, b):", "\n    return a + b"),
        ("def add(a, b): ", "return"),  # the space goes to the continuation
        ("", "def"),
        ("  ", "x"),
        ("né 漢", "字 \n"),
        (f"{BOS}x", "y"),  # text, though it names a control token
    ]
    found = answering.loglikelihood(requests("loglikelihood", *pairs), disable_tqdm=True)
    for (context, continuation), (total, greedy) in zip(pairs, found, strict=True):
        tokens, first = ids(context + continuation), len(ids(context.rstrip()))
        wanted = expected(log_softmax, tokens, first)
        assert total == pytest.approx(wanted[0], rel=TOLERANCE)
        assert greedy is wanted[1]


def test_the_likeliest_continuation_is_greedy(answering, log_softmax):
    context = "def add(a"
    table = log_softmax(ids(context))[-1]
    order = [token for token in table.argsort()[::-1] if TOKENIZER.decode([token]).isalpha()]
    pairs = [(context, TOKENIZER.decode([order[place]])) for place in (0, -1)]
    found = answering.loglikelihood(requests("loglikelihood", *pairs), disable_tqdm=True)
    for pair, (_, greedy) in zip(pairs, found, strict=True):
        assert greedy is expected(log_softmax, ids("".join(pair)), len(ids(context)))[1]


def test_a_long_context_loses_its_beginning(answering, log_softmax):
    context, continuation = "def add(a, b): " * 9, "\n    return a"
    ((total, _),) = answering.loglikelihood(
        requests("loglikelihood", (context, continuation)), disable_tqdm=True
    )
    tokens, first = ids(context + continuation), len(ids(context.rstrip()))
    assert len(tokens) > CONTEXT + 1
    kept = tokens[-CONTEXT - 1 :]
    wanted, _ = expected(log_softmax, kept, len(kept) - len(tokens) + first)
    assert total == pytest.approx(wanted, rel=TOLERANCE)


@pytest.mark.parametrize("pair, message", [
    (("x", ""), "task task, document 0: expected a continuation, got none"),
    (("d", "ef"), "continuation that adds tokens to its context, got .'d', 'ef'., in which they m"),
    (("x", "a b" * 99), "continuations of at most 40 tokens, the context, got .* raise --context"),
])
def test_continuations_that_cannot_be_scored_are_refused(answering, pair, message):
    with pytest.raises(InputError, match=message):
        answering.loglikelihood(requests("loglikelihood", pair), disable_tqdm=True)


def test_rolling_windows_are_those_of_lm_eval(answering, log_softmax):
    texts = ["def add(a, b):\n" * 7, "", "x", "def sub(a, b):\n    return a - b\n"]
    found = answering.loglikelihood_rolling(
        requests("loglikelihood_rolling", *((text,) for text in texts))
    )
    assert found[1] == 0.0
    for text, total in zip(texts, found, strict=True):
        windows = get_rolling_token_windows(
            TOKENIZER.encode(text).tolist(), TOKENIZER.bos_id, CONTEXT, context_len=1
        )
        wanted = sum(
            expected(log_softmax, [*inputs, targets[-1]], 1 + len(inputs) - len(targets))[0]
            for inputs, targets in windows
        )
        assert total == pytest.approx(wanted, rel=TOLERANCE)


def greedy_text(log_softmax, text: str, count: int) -> list[int]:
    tokens = ids(text)
    for _ in range(count):
        tokens.append(int(log_softmax(tokens)[-1].argmax()))
    return tokens[-count:]


def test_continuations_end_before_the_first_text_that_ends_them(
    answering, log_softmax, monkeypatch
):
    taken = []
    real = lm_eval_model.generate

    def counting(*arguments, **options):
        taken.append(real(*arguments, **options))
        return taken[-1]

    monkeypatch.setattr(lm_eval_model, "generate", counting)
    prompts, new = ["def add(a, b)", "x"], 12
    whole = [TOKENIZER.decode(greedy_text(log_softmax, prompt, new)) for prompt in prompts]
    end = whole[0][len(whole[0]) // 2 :][:2]
    settings = [{"until": [], "max_gen_toks": new}, {"until": [end], "max_gen_toks": new}]
    found = answering.generate_until(requests(
        "generate_until", *((prompt, setting) for setting in settings for prompt in prompts)
    ))
    assert found == whole + [text.split(end)[0] for text in whole]
    assert len(taken) == 2
    assert len(taken[1].tokens[0]) < len(taken[0].tokens[0]) == new


def test_settings_of_generations_are_read_as_lm_eval_does():
    assert generation_of({"until": "\n", "temperature": 0.5, "do_sample": False}, 300) == (
        256, 0.0, 1.0, ["\n"],
    )  # fmt: skip
    assert generation_of(
        {"max_new_tokens": 3, "temperature": 0.5, "top_p": 0.9, "do_sample": True}, 4
    ) == (3, 0.5, 0.9, [])
    with pytest.raises(InputError, match="got num_beams; leave the task out"):
        generation_of({"num_beams": 2}, 300)
    with pytest.raises(InputError, match="max_gen_toks of 1 to 255, .* got 256; choose another"):
        generation_of({}, 256)


@pytest.fixture(scope="module")
def offline(tmp_path_factory):
    """Nothing may be looked up, and what is made of data files lies in a folder of its own."""

    def refuse(*_):
        raise AssertionError("the network was used")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", refuse)
        patch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        patch.setattr("datasets.config.HF_DATASETS_OFFLINE", True)
        yield


@pytest.fixture(scope="module")
def tasks(offline, tmp_path_factory) -> Path:
    """A folder of task files, which are YAML, as JSON is."""
    path = tmp_path_factory.mktemp("tasks")
    (path / "documents.json").write_text(json.dumps(DOCUMENTS))
    for name, task in FEW.items():
        file = path / ("no.json" if name == "absent" else "documents.json")
        data = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(file)}}}
        document = {"task": f"tiny_{name}", "test_split": "test", **data, **task}
        (path / f"{name}.yaml").write_text(json.dumps(document))
    group = {
        "group": "tiny_group", "task": ["tiny_choice", "tiny_rolling"],
        "aggregate_metric_list": [{"metric": "acc"}],
    }  # fmt: skip
    (path / "group.yaml").write_text(json.dumps(group))
    return path


def evaluated(folder, tasks, *names: str, **options) -> dict:
    settings = Settings(lm_eval_include=str(tasks), **options)
    return evaluate.evaluate(folder, ",".join(f"lm_eval:tiny_{name}" for name in names), settings)


def test_local_tasks_run_offline(folder, tasks, log_softmax):
    found = evaluated(folder, tasks, "choice", "rolling", "generation")
    right, nats = 0, 0.0
    for document in DOCUMENTS:
        context = f"{document['question']}:"
        totals = [
            expected(log_softmax, ids(f"{context} {choice}"), len(ids(context)))[0]
            for choice in document["choices"]
        ]
        right += int(np.argmax(totals)) == document["answer"]
        nats -= expected(log_softmax, ids(document["question"]), 1)[0]
    assert found["lm_eval:tiny_choice"]["acc,none"] == right / len(DOCUMENTS)
    size = sum(len(document["question"].encode()) for document in DOCUMENTS)
    assert found["lm_eval:tiny_rolling"]["bits_per_byte,none"] == pytest.approx(
        nats / np.log(2) / size, rel=TOLERANCE
    )
    for metrics in found.values():
        assert (metrics["documents"], metrics["fewshot"]) == (2, 0)
        assert all(isinstance(value, (int, float)) for value in metrics.values())
    assert 0 <= found["lm_eval:tiny_generation"]["exact_match,none"] <= 1


def test_a_group_has_metrics_of_its_own_and_of_its_tasks(folder, tasks):
    found = evaluated(folder, tasks, "group", lm_eval_fewshot=1, lm_eval_limit=1)
    assert found.keys() == {"lm_eval:tiny_group", "lm_eval:tiny_choice", "lm_eval:tiny_rolling"}
    metric = "acc,none"
    assert found["lm_eval:tiny_group"][metric] == found["lm_eval:tiny_choice"][metric]
    assert found["lm_eval:tiny_choice"]["fewshot"] == 1


def test_documents_can_be_limited(folder, tasks):
    assert evaluated(folder, tasks, "rolling", lm_eval_limit=1)["lm_eval:tiny_rolling"][
        "documents"
    ] == 1  # fmt: skip


@pytest.mark.parametrize("name, message", [
    ("choise", "expected the name of a task or a group, got 'tiny_choise'; did you mean tiny_cho"),
    ("beams", "expected generation_kwargs of do_sample, .* got num_beams"),
    ("code", "expected a task that runs no code that models write, got tiny_code"),
    ("absent", "expected a task whose files and data can be read, got tiny_absent with FileNot"),
])
def test_tasks_that_cannot_run_are_refused_before_weights_are_read(
    folder, tasks, monkeypatch, name, message
):
    monkeypatch.setattr("dsv4_jax.served_model.ModelFolder.load", None)
    with pytest.raises(InputError, match=message):
        evaluated(folder, tasks, name)


def test_a_missing_folder_of_tasks_is_refused(folder, tasks):
    with pytest.raises(InputError, match="lm_eval_include: expected a folder of task files"):
        evaluated(folder, tasks / "none", "choice")
