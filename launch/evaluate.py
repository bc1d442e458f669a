"""Evaluate a checkpoint.

    python launch/evaluate.py --checkpoint=DIR --tasks=perplexity,lm_eval:NAME [--output=FILE]

`--tasks` names tasks of this package, and by `lm_eval:NAME` tasks and groups of the package lm-eval
(the extra `eval`); each NAME has an `lm_eval:` of its own.
"""

from __future__ import annotations

import sys
from pathlib import Path

from absl import flags

from dsv4_jax import cli
from dsv4_jax.evaluate import TASKS, Settings, evaluate, table, task_form
from dsv4_jax.served_model import DTYPES
from dsv4_jax.terminal import say

CHECKPOINT = flags.DEFINE_string(
    "checkpoint", None, "folder of safetensors, of Orbax's files, or a training's workdir"
)
TOKENIZER = flags.DEFINE_string("tokenizer", None, "tokenizer.json; none: the checkpoint's own")
DTYPE = flags.DEFINE_enum(
    "dtype", None, DTYPES, "of weights and computation; none: as the checkpoint is stored"
)
TASK_NAMES = flags.DEFINE_string(
    "tasks", None, f"with commas between: {', '.join(map(task_form, TASKS))}"
)
OUTPUT = flags.DEFINE_string("output", None, "file for the results as JSON")
TEXT = flags.DEFINE_string(
    "text", None, "perplexity: a text file, a directory of text or a .jsonl file; none: the "
    "held-out text of a training's workdir"
)
TEXT_FIELD = flags.DEFINE_string("text_field", "text", "key of the text in lines of .jsonl files")
CONTEXT = flags.DEFINE_integer(
    "context", None, "most tokens before one that is predicted; none: perplexity takes the length "
    "of the training's rows, or up to 4096; lm_eval all that the model has positions for"
)
STRIDE = flags.DEFINE_integer(
    "stride", None, "perplexity: tokens that each window scores; none: the context"
)
BATCH_TOKENS = flags.DEFINE_integer("batch_tokens", 4096, "tokens of a batch")
LENGTHS = flags.DEFINE_list(
    "needle_lengths", None, "needle: tokens of the prompts, with commas between; none: a quarter, "
    "a half and all of what perplexity takes for its context"
)
DEPTHS = flags.DEFINE_list(
    "needle_depths", "0,0.25,0.5,0.75,1", "needle: places of the fact in its text, from 0, the "
    "beginning, to 1, just before the question"
)
SAMPLES = flags.DEFINE_integer("needle_samples", 20, "needle: prompts of each length and depth")
PLOT = flags.DEFINE_string(
    "needle_plot", None, "needle: file for a heat map, a PNG (needs the extra plot)"
)
INCLUDE = flags.DEFINE_string(
    "lm_eval_include", None, "folder with task files of your own; functions that they name are run"
)
FEWSHOT = flags.DEFINE_integer(
    "lm_eval_fewshot", None, "examples in each prompt; none: as the task has it"
)
LIMIT = flags.DEFINE_integer("lm_eval_limit", None, "documents of each task; none: all")


def main() -> None:
    cli.require(CHECKPOINT, TASK_NAMES)
    settings = Settings(
        text=TEXT.value, text_field=TEXT_FIELD.value, context=CONTEXT.value, stride=STRIDE.value,
        batch_tokens=BATCH_TOKENS.value, lm_eval_include=INCLUDE.value,
        lm_eval_fewshot=FEWSHOT.value, lm_eval_limit=LIMIT.value,
        needle_lengths=cli.numbers(LENGTHS, int), needle_depths=cli.numbers(DEPTHS, float),
        needle_samples=SAMPLES.value, needle_plot=PLOT.value,
    )
    results = evaluate(
        CHECKPOINT.value, TASK_NAMES.value, settings, tokenizer=TOKENIZER.value, dtype=DTYPE.value,
        output=OUTPUT.value,
    )
    for line in table(results):
        say(line)


if __name__ == "__main__":
    # lm-eval imports a package `evaluate`, for which this file must not be taken.
    here = Path(__file__).resolve().parent
    sys.path[:] = [path for path in sys.path if Path(path).resolve() != here]
    cli.run(main)
