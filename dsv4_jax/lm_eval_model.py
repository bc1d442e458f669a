"""A model as lm-eval sees it, and its tasks; the one file that needs the package lm-eval."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import json
import math
import numbers
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from lm_eval import evaluator
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.task import Task
from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text
from lm_eval.tasks import TaskManager
from lm_eval.tasks.manager import TaskDict

from dsv4_jax.errors import InputError, shown
from dsv4_jax.infer import generate
from dsv4_jax.scoring import Row, Score, score_rows, windows
from dsv4_jax.served_model import ServedModel
from dsv4_jax.tokenizer import TextStream, Tokenizer

NEW_TOKENS = 256  # at most, of a generation whose task does not say; lm-eval's own number
PROMPTS = 8  # continued at once
FEWSHOT_SEED = 1234  # lm-eval's own
NO_METRICS = ("alias", "name", "sample_len", "sample_count")  # in lm-eval's results
NO_VALUE = "N/A"
GENERATION_KEYS = ("do_sample", "max_gen_toks", "temperature", "top_p", "until")


class Generation(NamedTuple):
    """How a task wants prompts to be continued."""

    new_tokens: int  # at most
    temperature: float
    top_p: float
    until: list[str]  # texts that end a continuation and are no part of it


class EvaluatedModel(TemplateLM):
    """A model that answers lm-eval's requests.

    Texts become ids as lm-eval's models of transformers make them: context and continuation are
    encoded together, with BOS in front. What is too long loses its beginning.
    """

    def __init__(self, model: ServedModel, *, context: int, batch_tokens: int):
        """Wrap a model.

        Args:
          context: most tokens before one that is predicted.
          batch_tokens: see `score_rows`.
        """
        super().__init__()
        self.max_length = context
        self._model, self._batch_tokens = model, batch_tokens

    @property
    def eot_token_id(self) -> int:
        return self._model.tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        return self._model.tokenizer.bos_id

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: object
    ) -> list[int]:
        """Return the ids of a text, after BOS unless that is not wanted."""
        prefix = [] if add_special_tokens is False else [self.prefix_token_id]
        return [*prefix, *self._model.tokenizer.encode(string).tolist()]

    def loglikelihood(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """Return of each (context, continuation) the latter's log-likelihood and greediness."""
        for request in requests:
            if not request.args[1]:
                raise InputError(f"lm_eval: {_of(request)}: expected a continuation, got none")
        return super().loglikelihood(requests, disable_tqdm)

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **_: object
    ) -> list[tuple[float, bool]]:
        rows = []
        for texts, context, continuation in requests:
            if not continuation:  # nothing that is scored would be this text's
                raise InputError(
                    "lm_eval: expected a continuation that adds tokens to its context, got "
                    f"{shown(texts)}, in which they merge; leave the task out"
                )
            if len(continuation) > self.max_length:
                raise InputError(
                    f"lm_eval: expected continuations of at most {self.max_length} tokens, the "
                    f"context, got {len(continuation)} in {shown(texts)}; raise --context, or "
                    "leave the task out"
                )
            tokens = (context + continuation)[-(self.max_length + 1) :]
            rows.append(Row(tokens, len(tokens) - len(continuation)))
        return [(score.log_likelihood, score.greedy) for score in self._score(rows)]

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Return the log-likelihood of each text, every token of which is scored once."""
        parts = [
            list(windows(self.tok_encode(text), context=self.max_length, stride=self.max_length))
            for (text,) in (request.args for request in requests)
        ]
        scores = iter(self._score([row for rows in parts for row in rows]))
        return [math.fsum(next(scores).log_likelihood for _ in rows) for rows in parts]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Return a continuation of each context, up to the first of the texts that end it."""
        texts = [""] * len(requests)
        for generation, chosen in self._groups(requests):
            room = self.max_length - generation.new_tokens
            prompts = {i: self.tok_encode(requests[i].args[0])[-room:] for i in chosen}
            order = sorted(chosen, key=lambda index: -len(prompts[index]))
            for start in range(0, len(order), PROMPTS):
                part = order[start : start + PROMPTS]
                found = self._continue([prompts[index] for index in part], generation)
                for index, text in zip(part, found, strict=True):
                    texts[index] = text
        return texts

    def _groups(self, requests: list[Instance]) -> Iterator[tuple[Generation, list[int]]]:
        """Yield the indices of requests that are to be continued in the same way."""
        groups: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            groups.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(index)
        for key, chosen in groups.items():
            yield generation_of(json.loads(key), self.max_length), chosen

    def _continue(self, prompts: list[list[int]], generation: Generation) -> list[str]:
        model = self._model
        texts = _Texts(model.tokenizer, len(prompts), generation.until)
        generate(
            model.config, model.params, prompts, max_new_tokens=generation.new_tokens,
            temperature=generation.temperature, top_p=generation.top_p, stop=self.eot_token_id,
            runtime=dataclasses.replace(model.runtime, batch_invariant=True),
            on_tokens=texts.put,
        )
        return texts.end()

    def _score(self, rows: list[Row]) -> list[Score]:
        model = self._model
        return score_rows(
            model.config, model.runtime, model.params, rows, batch_tokens=self._batch_tokens
        )


class _Texts:
    """The texts of continuations that grow, each up to the first text that ends it."""

    def __init__(self, tokenizer: Tokenizer, count: int, until: list[str]):
        self._streams = [TextStream(tokenizer) for _ in range(count)]
        self._texts, self._until = [""] * count, until

    def put(self, row: int, ids: list[int]) -> bool:
        """Take more ids of a continuation; say whether a text has ended it."""
        self._texts[row] += self._streams[row].put(ids)
        return any(end in self._texts[row] for end in self._until)

    def end(self) -> list[str]:
        return [
            postprocess_generated_text(text + stream.end(), self._until, None)
            for text, stream in zip(self._texts, self._streams, strict=True)
        ]


def generation_of(settings: dict, context: int) -> Generation:
    """Read a task's `generation_kwargs`.

    Raises:
      InputError: there is a key that is not known here, or no room for a prompt in the context.
    """
    given = normalize_gen_kwargs(settings, NEW_TOKENS)
    unknown = sorted(given.keys() - set(GENERATION_KEYS))
    if unknown:
        raise InputError(
            f"lm_eval: expected generation_kwargs of {', '.join(GENERATION_KEYS)}, got "
            f"{', '.join(map(str, unknown))}; leave the task out"
        )
    if not 1 <= given["max_gen_toks"] < context:
        raise InputError(
            f"lm_eval: expected max_gen_toks of 1 to {context - 1}, less than the context, got "
            f"{given['max_gen_toks']}; choose another --context, or leave the task out"
        )
    temperature = float(given.get("temperature", 0)) if given["do_sample"] else 0.0
    until = [text for text in given["until"] if text]
    return Generation(given["max_gen_toks"], temperature, float(given.get("top_p", 1)), until)


def load_tasks(name: str, *, include: str | None, fewshot: int | None, context: int) -> TaskDict:
    """Read a task or a group of tasks, with their data.

    Args:
      include: a folder with task files beside lm-eval's own.
      fewshot: examples in each prompt, unless a task must have none; None: as the tasks say.
    Raises:
      InputError: there is no such task, it cannot be loaded, or asks for what there is not.
    """
    if include is not None and not Path(include).is_dir():
        raise InputError(f"lm_eval_include: expected a folder of task files, got {include!r}")
    try:
        manager = _manager(include)
        if name in manager.all_tasks:
            loaded = manager.load([name])
    except Exception as error:  # tasks and readers of data are programs of others
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise InputError(
            f"lm_eval: expected a task whose files and data can be read, got {name} with {reason}; "
            "mend it, or see that its data is there"
        ) from error
    if name not in manager.all_tasks:
        close = difflib.get_close_matches(name, manager.all_tasks, n=3)
        hint = f"did you mean {', '.join(close)}?" if close else "name one of lm-eval's"
        raise InputError(f"lm_eval: expected the name of a task or a group, got {name!r}; {hint}")
    for task in loaded["tasks"].values():
        _prepare(task, fewshot, context)
    return loaded


def run_tasks(
    loaded: TaskDict, model: ServedModel, *, context: int, batch_tokens: int, limit: int | None
) -> dict[str, dict]:
    """Return the metrics of each task, and of groups, with how many examples and documents."""
    answering = EvaluatedModel(model, context=context, batch_tokens=batch_tokens)
    found = evaluator.evaluate(answering, loaded, limit=limit, log_samples=False)
    results = {}
    for name, metrics in found["results"].items():
        kept = {
            key: _plain(value) for key, value in metrics.items()
            if key not in NO_METRICS and value != NO_VALUE
        }  # fmt: skip
        if name in found["n-samples"]:
            kept["documents"] = found["n-samples"][name]["effective"]
            kept["fewshot"] = found["n-shot"][name]
        results[f"lm_eval:{name}"] = kept
    return results


def _prepare(task: Task, fewshot: int | None, context: int) -> None:
    """Refuse a task that cannot be run here; set what lm-eval's own command sets."""
    name = task.task_name
    if getattr(task, "UNSAFE_CODE", False):
        raise InputError(
            f"lm_eval: expected a task that runs no code that models write, got {name}"
        )
    if getattr(task, "MULTIMODAL", False):
        raise InputError(f"lm_eval: expected a task on text, got {name}, which has images")
    if task.OUTPUT_TYPE == "generate_until":
        generation_of(task.config.generation_kwargs or {}, context)
    stated = task.get_config("num_fewshot")
    if stated is None or (fewshot is not None and stated != 0):
        task.set_config(key="num_fewshot", value=fewshot or 0)
    task.set_fewshot_seed(seed=FEWSHOT_SEED)


@functools.cache
def _manager(include: str | None) -> TaskManager:
    return TaskManager(include_path=include)


def _of(request: Instance) -> str:
    return f"task {request.task_name}, document {request.doc_id}"


def _plain(value: object) -> float | int | str:
    """Return a metric as JSON has it: lm-eval's may be NumPy's, or no number."""
    if isinstance(value, (int, str)):
        return value
    return float(value) if isinstance(value, numbers.Real) else str(value)
