"""Continue a text, or answer messages, with a model of a folder; the text streams as it comes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

from dsv4_jax.completion import parse_completion
from dsv4_jax.config import CACHE_FORMATS, Runtime, check_choice
from dsv4_jax.decode import CHUNK
from dsv4_jax.encoding import render_messages
from dsv4_jax.encoding_texts import EOS, THINKING
from dsv4_jax.errors import InputError
from dsv4_jax.infer import Stats, cache_length, check_numbers, check_prompts, generate
from dsv4_jax.sampling import check_sampling
from dsv4_jax.served_model import ServedModel, check_model
from dsv4_jax.terminal import say, show
from dsv4_jax.tokenizer import TextStream, Tokenizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class WriteOptions:
    """How text is written."""

    max_new_tokens: int = 256
    temperature: float = 1.0  # V4's own generation_config
    top_p: float = 1.0
    seed: int = 0
    cache: str = "float32"  # precision of the cache, as in `Runtime`
    csa: str | None = None  # as in `Runtime`; None: as the checkpoint was trained
    speculate: bool = False
    chunk: int = CHUNK

    def __post_init__(self):
        check_sampling(self.temperature, self.top_p)
        check_choice("cache", self.cache, CACHE_FORMATS)
        check_numbers(self.seed, max_new_tokens=self.max_new_tokens, chunk=self.chunk)


@dataclasses.dataclass(frozen=True)
class Written:
    """What a model has written."""

    text: str
    stopped: bool  # by the end of the text; else by length
    stats: Stats


def text_prompt(tokenizer: Tokenizer, text: str) -> np.ndarray:
    """Return the ids of a text that is to be continued.

    Raises:
      InputError: the text is empty, or has no UTF-8 form.
    """
    if not text:
        raise InputError("prompt: expected a text to continue, got none; give at least a character")
    return np.concatenate([np.array([tokenizer.bos_id], np.int32), tokenizer.encode(text)])


def chat_prompt(tokenizer: Tokenizer, messages: list[dict], thinking: str) -> np.ndarray:
    """Return the ids of a chat that is to be answered; `thinking` is "off", "high" or "max"."""
    mode, effort = THINKING[thinking]
    segments = render_messages(messages, thinking_mode=mode, reasoning_effort=effort)
    return tokenizer.encode_segments(segments)


def write(
    model: ServedModel, prompt: np.ndarray, options: WriteOptions, out: Callable[[str], None]
) -> Written:
    """Continue a prompt up to the end of the text, and hand the new text on as it comes."""
    stream, texts = TextStream(model.tokenizer), []

    def hand_on(text: str) -> None:
        texts.append(text)
        out(text)

    result = generate(
        model.config, model.params, prompt, max_new_tokens=options.max_new_tokens,
        temperature=options.temperature, top_p=options.top_p, seed=options.seed,
        stop=model.tokenizer.eos_id, runtime=model.runtime, speculate=options.speculate,
        chunk=options.chunk, on_tokens=lambda _, ids: hand_on(stream.put(ids)),
    )
    hand_on(stream.end())
    return Written("".join(texts), result.stopped[0], result.stats)


def run_prompts(
    checkpoint: str | Path, prompts: Iterable[str], options: WriteOptions, *, chat: bool,
    thinking: str = "off", tokenizer: str | None = None, dtype: str | None = None,
) -> None:
    """Write after each prompt on the terminal; in a chat each is the next message of the user.

    What can be refused is refused before the weights are read.

    Raises:
      InputError: the checkpoint, a prompt or a setting cannot be used.
    """
    folder = check_model(checkpoint, tokenizer, dtype, skip_mtp=not options.speculate)
    if options.speculate and not folder.config.num_nextn_predict_layers:
        raise InputError(
            f"{checkpoint}: expected a model with multi-token prediction to speculate with, got "
            "one without; leave --speculate out"
        )
    model, messages = None, []
    for text in prompts:
        if chat:
            messages.append({"role": "user", "content": text})
            prompt = chat_prompt(folder.tokenizer, messages, thinking)
        else:
            prompt = text_prompt(folder.tokenizer, text)
        cache_length(folder.config, check_prompts(folder.config, prompt), options.max_new_tokens)
        if model is None:
            model = _with_runtime(folder.load(), options)
        written = write(model, prompt, options, show)
        say("")
        say(_speed(written.stats))
        if chat:
            messages.append(_answer(written, thinking))


def _with_runtime(model: ServedModel, options: WriteOptions) -> ServedModel:
    runtime: Runtime = dataclasses.replace(
        model.runtime, cache=options.cache, batch_invariant=False,
        csa=model.runtime.csa if options.csa is None else options.csa,
    )
    return model._replace(runtime=runtime)


def _answer(written: Written, thinking: str) -> dict:
    """Return what was written as a message of the chat; an unfinished one as it is."""
    mode, _ = THINKING[thinking]
    try:
        text = written.text + (EOS if written.stopped else "")
        return parse_completion(text, thinking_mode=mode)
    except InputError:
        return {"role": "assistant", "content": written.text}


def _speed(stats: Stats) -> str:
    line = (
        f"[{stats.prompt_tokens} tokens read, {stats.new_tokens} written; first after "
        f"{stats.prefill_seconds:.2f} s"
    )
    if stats.decode_tokens:
        line += f", then {stats.decode_tokens / stats.decode_seconds:,.1f} tokens/s"
    if stats.drafted:
        share = stats.accepted / stats.drafted
        line += (
            f"; {stats.accepted} of {stats.drafted} drafts accepted ({share:.0%}), "
            f"{1 + share:.2f} tokens a step"
        )
    return line + "]"
