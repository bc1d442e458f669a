"""Continue a text, or answer messages.

    python launch/generate.py --checkpoint=DIR --prompt="def " [--temperature=0.8 ...]
    python launch/generate.py --checkpoint=DIR --chat --thinking=high [--prompt=...]

Without --prompt every line of standard input is one.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path

import jax
from absl import flags

from dsv4_jax import cli
from dsv4_jax.chat import WriteOptions, run_prompts
from dsv4_jax.config import CACHE_FORMATS
from dsv4_jax.encoding_texts import THINKING

CHECKPOINT = flags.DEFINE_string(
    "checkpoint", None, "workdir of a training, or a folder of safetensors or of Orbax's files"
)
PROMPT = flags.DEFINE_string("prompt", None, "text to continue, or message to answer")
CHAT = flags.DEFINE_bool("chat", False, "answer prompts as messages of a chat")
THINK = flags.DEFINE_enum("thinking", "off", THINKING, "in a chat: thinking before an answer")
TOKENIZER = flags.DEFINE_string("tokenizer", None, "a tokenizer.json; none: the checkpoint's")
DTYPE = flags.DEFINE_enum("dtype", None, ["float32", "bfloat16"], "none: as it is stored")
NEW = flags.DEFINE_integer("max_new_tokens", 256, "tokens to write at most")
TEMPERATURE = flags.DEFINE_float("temperature", 1.0, "0 takes the likeliest token")
TOP_P = flags.DEFINE_float("top_p", 1.0, "mass of the likeliest tokens that are drawn from")
SEED = flags.DEFINE_integer("seed", 0, "of what is drawn")
CACHE = flags.DEFINE_enum("cache", "float32", CACHE_FORMATS, "precision of the cache")
CSA = flags.DEFINE_enum("csa", None, ["sparse", "dense"], "none: as the checkpoint was trained")
SPECULATE = flags.DEFINE_bool("speculate", False, "draft by multi-token prediction")
CHUNK = flags.DEFINE_integer(
    "chunk", WriteOptions.chunk, "tokens of a prompt that are read at once"
)


def main() -> None:
    cli.require(CHECKPOINT)
    compiled = Path(CHECKPOINT.value, "compiled")
    if jax.config.jax_compilation_cache_dir is None and compiled.is_dir():
        jax.config.update("jax_compilation_cache_dir", str(compiled))
    options = WriteOptions(
        max_new_tokens=NEW.value, temperature=TEMPERATURE.value, top_p=TOP_P.value,
        seed=SEED.value, cache=CACHE.value, csa=CSA.value, speculate=SPECULATE.value,
        chunk=CHUNK.value,
    )
    run_prompts(
        CHECKPOINT.value, _prompts(), options, chat=CHAT.value, thinking=THINK.value,
        tokenizer=TOKENIZER.value, dtype=DTYPE.value,
    )


def _prompts() -> Iterable[str]:
    if PROMPT.value is not None:
        return [PROMPT.value]
    return (line.rstrip("\n") for line in sys.stdin)


if __name__ == "__main__":
    cli.run(main)
