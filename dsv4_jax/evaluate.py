"""Evaluate a checkpoint: a table of tasks, each of which yields rows of metrics."""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

from dsv4_jax.corpus import held_out_texts, read_corpus, read_documents
from dsv4_jax.errors import InputError
from dsv4_jax.figures import check_figure
from dsv4_jax.files import check_file, write_atomically
from dsv4_jax.needle_eval import (
    answer_tokens,
    check_haystacks,
    measure_retrieval,
    retrieval_table,
    shares_of,
    shortest_prompt,
)
from dsv4_jax.needle_plot import FLAG, write_plot
from dsv4_jax.run_config import CHAT
from dsv4_jax.scoring import check_windows, score_rows, windows
from dsv4_jax.served_model import ModelFolder, ServedModel, check_model
from dsv4_jax.terminal import say, timed

LONGEST_CONTEXT = 4096  # of perplexity, unless another is asked for

Results = dict[str, dict[str, float | int | str]]  # value by row and metric
Measure = Callable[[ServedModel], Results]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """What the tasks may be told.

    Raises:
      InputError: a number is out of its range.
    """

    text: str | None = None  # source of perplexity's text; see `corpus.read_corpus`
    text_field: str = "text"  # key of the text in each line of a .jsonl file
    context: int | None = None  # most tokens before one that is predicted; None: the task's choice
    stride: int | None = None  # tokens scored in a window of perplexity; None: the context
    batch_tokens: int = 4096  # of a batch
    lm_eval_include: str | None = None  # folder of lm-eval's task files
    lm_eval_fewshot: int | None = None  # examples in a prompt; None: the task's own number
    lm_eval_limit: int | None = None  # documents of a task; None: all
    needle_lengths: tuple[int, ...] | None = None  # tokens of prompts; None: up to the usual
    needle_depths: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)  # of the fact in its text
    needle_samples: int = 20  # prompts of each length and depth
    needle_plot: str | None = None  # file for the heat map, a PNG; None: none

    def __post_init__(self):
        least = {
            "context": 1, "stride": 1, "batch_tokens": 1, "lm_eval_fewshot": 0,
            "lm_eval_limit": 1, "needle_samples": 1,
        }  # fmt: skip
        for name, smallest in least.items():
            value = getattr(self, name)
            if value is not None and value < smallest:
                raise InputError(f"{name}: expected at least {smallest}, got {value}")


def evaluate(
    checkpoint: str | os.PathLike, tasks: str, settings: Settings, *,
    tokenizer: str | None = None, dtype: str | None = None, output: str | None = None,
) -> Results:
    """Run tasks on a checkpoint; all that can be refused is, before the weights are read.

    Args:
      checkpoint: see `served_model.open_model`; so for the tokenizer and the dtype.
      tasks: names of `TASKS` with commas between them, after a name and a colon its argument.
      output: file for the results, written anew after each task; None: none.
    Raises:
      InputError: one line with what cannot be used.
    """
    chosen = parse_tasks(tasks)
    if output is not None:
        check_file(output, "output")
    folder = check_model(checkpoint, tokenizer, dtype, skip_mtp=True)
    measures = [TASKS[name](folder, settings, argument) for name, argument in chosen]
    model = folder.load()
    results = {}
    for (name, argument), measure in zip(chosen, measures, strict=True):
        say(f"task {name}:{argument}" if argument else f"task {name}")
        results |= measure(model)
        if output is not None:
            document = {"checkpoint": str(checkpoint), **_describe(model), "results": results}
            data = json.dumps(document, indent=1, ensure_ascii=False) + "\n"
            write_atomically(Path(output), data.encode(), "output")
    return results


def parse_tasks(tasks: str) -> list[tuple[str, str]]:
    """Return the names and arguments of tasks.

    Raises:
      InputError: a task is unknown, is named twice, or has no argument or one too many.
    """
    chosen = []
    for item in tasks.split(","):
        name, _, argument = item.strip().partition(":")
        if name not in TASKS:
            close = difflib.get_close_matches(name, TASKS, n=1)
            hint = f"did you mean {close[0]}?" if close else f"for lm-eval's write lm_eval:{name}"
            known = ", ".join(map(task_form, TASKS))
            raise InputError(f"tasks: expected {known}, got {name!r}; {hint}")
        if bool(argument) != (name in WITH_ARGUMENT):
            raise InputError(f"tasks: expected {task_form(name)}, got {item.strip()!r}")
        if (name, argument) in chosen:
            raise InputError(f"tasks: expected each task once, got {item.strip()!r} again")
        chosen.append((name, argument))
    return chosen


def task_form(name: str) -> str:
    """Return how a task of the table is written."""
    return f"{name}:NAME" if name in WITH_ARGUMENT else name


def table(results: Results) -> list[str]:
    """Write results as lines of text: row, metric, value; retrieval as a table of its own."""
    needles = {row: results[row] for row in results if row.startswith("needle/")}
    if needles:
        rest = {row: results[row] for row in results if row not in needles}
        return [*table(rest), *retrieval_table(needles)]
    cells = [
        (row, metric, f"{value:.6g}" if isinstance(value, float) else f"{value}")
        for row, metrics in results.items() for metric, value in metrics.items()
    ]
    wide = [max((len(cell[column]) for cell in cells), default=0) for column in (0, 1)]
    return [f"{row:<{wide[0]}}  {metric:<{wide[1]}}  {value}" for row, metric, value in cells]


def _describe(model: ServedModel) -> dict[str, str]:
    runtime = model.runtime
    return {"compute_dtype": runtime.dtype, "csa": runtime.csa}


def _perplexity(folder: ModelFolder, settings: Settings, _: str) -> Measure:
    """Prepare perplexity per token and bits per byte of a text, in windows.

    A document begins with BOS, which is context alone; its end is not charged.
    """
    context = settings.context or _usual_context(folder)
    stride = settings.stride or context
    check_windows(folder.config, context, stride)
    with timed("reading and encoding the text"):
        texts = read_texts(folder, settings)
        tokens = [document[:-1] for document in folder.tokenizer.encode_documents(texts)]
    rows = [row for ids in tokens for row in windows(ids, context=context, stride=stride)]
    count, size = sum(map(len, tokens)) - len(tokens), sum(len(text.encode()) for text in texts)

    def measure(model: ServedModel) -> Results:
        scores = score_rows(
            model.config, model.runtime, model.params, rows, batch_tokens=settings.batch_tokens
        )
        nats = -math.fsum(score.log_likelihood for score in scores)
        return {"perplexity": {
            "perplexity_per_token": math.exp(nats / count),
            "bits_per_byte": nats / math.log(2) / size,
            "nats_per_token": nats / count,
            "tokens": count, "bytes": size, "documents": len(texts),
            "context": context, "stride": stride,
        }}  # fmt: skip

    return measure


def _usual_context(folder: ModelFolder) -> int:
    """Return the length that a run has trained on, or one that is usual."""
    if folder.stage is not None:
        return folder.stage.seq_len
    return min(LONGEST_CONTEXT, folder.config.max_position_embeddings)


def read_texts(folder: ModelFolder, settings: Settings) -> list[str]:
    """Return the named text, or what a run has held out."""
    if settings.text is not None:
        documents = read_documents(
            settings.text, text_field=settings.text_field, setting="text"
        )
        return [document.text for document in documents]
    if folder.run is None:
        raise InputError(
            "text: expected a file or a directory of text, got nothing; add --text=PATH (a "
            "training's workdir has held-out text, other checkpoints have none)"
        )
    data = folder.run.data
    if data.format == CHAT:
        raise InputError(
            "text: expected a file or a directory of text, got nothing, and the training has held "
            "out chats, which it scores itself; add --text=PATH"
        )
    corpus = read_corpus(
        data.source, text_field=data.text_field, held_out_fraction=data.held_out_fraction
    )
    return held_out_texts(corpus, data.held_out_bytes)


def _lm_eval(folder: ModelFolder, settings: Settings, name: str) -> Measure:
    """Prepare a task or a group of tasks of lm-eval, which is imported here alone."""
    try:
        from dsv4_jax import lm_eval_model
    except ModuleNotFoundError as error:
        raise InputError(
            f"lm_eval: expected the package lm-eval, got none ({error}); install it by "
            "pip install 'dsv4_jax[eval]'"
        ) from error
    context = settings.context or folder.config.max_position_embeddings
    check_windows(folder.config, context, context)
    loaded = lm_eval_model.load_tasks(
        name, include=settings.lm_eval_include, fewshot=settings.lm_eval_fewshot, context=context
    )
    return partial(
        lm_eval_model.run_tasks, loaded, context=context, batch_tokens=settings.batch_tokens,
        limit=settings.lm_eval_limit,
    )


def _needle(folder: ModelFolder, settings: Settings, _: str) -> Measure:
    """Prepare the retrieval of facts from texts of several lengths."""
    lengths = settings.needle_lengths
    if lengths is None:
        lengths = _usual_lengths(folder)
    depths, plot = settings.needle_depths, settings.needle_plot
    check_haystacks(folder.config, folder.tokenizer, lengths, depths)
    if plot is not None:
        check_figure(plot, FLAG)

    def measure(model: ServedModel) -> Results:
        rows = measure_retrieval(
            model, lengths, depths, settings.needle_samples, batch_tokens=settings.batch_tokens
        )
        if plot is not None:
            write_plot(plot, *shares_of(rows))
        return rows

    return measure


def _usual_lengths(folder: ModelFolder) -> tuple[int, ...]:
    """Return a quarter, a half and all of the usual context, as far as a prompt fits into them."""
    room = folder.config.max_position_embeddings - answer_tokens(folder.tokenizer)
    longest = min(_usual_context(folder), room)
    shortest = min(longest, shortest_prompt(folder.tokenizer))
    return tuple(sorted({max(shortest, longest // parts) for parts in (4, 2, 1)}))


# Each function checks all that it can before the weights are there, and returns what measures.
TASKS: dict[str, Callable[[ModelFolder, Settings, str], Measure]] = {
    "perplexity": _perplexity,
    "needle": _needle,
    "lm_eval": _lm_eval,
}
WITH_ARGUMENT = frozenset({"lm_eval"})
