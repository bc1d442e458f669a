"""Turn chats into what a model learns from: prompts, and answers that count in the loss."""

from __future__ import annotations

import ast
import re
import textwrap
import warnings
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from dsv4_jax.encoding import Segment, render_messages
from dsv4_jax.encoding_texts import THINKING
from dsv4_jax.errors import InputError, shown
from dsv4_jax.messages import read_messages

_LONGEST_CODE, _LONGEST_ANSWER = 600, 240  # characters in chats about functions


class Part(NamedTuple):
    """A stretch of an example."""

    segments: list[Segment]
    learned: bool  # whether its tokens count in the loss


Example = list[Part]


def read_examples(record: Mapping, thinking: str) -> list[Example]:
    """Return what is to be learned from a chat.

    Learned is what the assistant writes: reasoning, answer, tool calls, and EOS. Before it comes
    just the prompt that the model would be asked with. An answer whose prompt goes on from the
    answer before is part of the same example. Where V4's format leaves the reasoning of earlier
    turns out, each turn is so an example of its own. What follows the last answer is not used.

    Args:
      record: has `messages` in OpenAI's form, with DeepSeek's additional roles and fields; an
        assistant's of `weight` 0 is only read. It may have `tools`, which become the system's, and
        `thinking`.
      thinking: how the model thinks before an answer, "off", "high" or "max", where the record
        does not say.
    Raises:
      InputError: a message is of no use, or there is no answer to learn.
    """
    messages = _messages(record)
    if record.get("thinking") is not None:
        thinking = record["thinking"]
    if not isinstance(thinking, str) or thinking not in THINKING:
        raise InputError(
            f"thinking: expected one of {', '.join(THINKING)}, got {shown(thinking)}; correct it "
            "or leave it out"
        )
    mode, effort = THINKING[thinking]
    examples, seen = [], None
    for index in filter(lambda index: _is_learned(messages[index]), range(len(messages))):
        before = messages[:index]
        prompt = render_messages(before, thinking_mode=mode, reasoning_effort=effort)
        answer = render_messages(
            messages[index : index + 1], thinking_mode=mode, context=before, add_bos=False
        )
        if not answer:
            continue
        goes_on = seen is not None and prompt[: len(seen)] == seen
        if not goes_on:
            examples.append([])
        new = prompt[len(seen) :] if goes_on else prompt
        examples[-1] += [Part(new, False)] * bool(new) + [Part(answer, True)]
        seen = prompt + answer
    if not examples:
        raise InputError(
            "messages: expected one with the role assistant, whose answer is learned, got none; "
            "take the line out"
        )
    return examples


def _messages(record: Mapping) -> list[Mapping]:
    """Check the messages of a record, and give them its tools."""
    messages, tools = record.get("messages"), record.get("tools")
    if not isinstance(messages, list):
        found = "nothing" if messages is None else shown(messages)
        raise InputError(f"messages: expected a list, got {found}; put the chat's messages there")
    read_messages(messages, "messages")
    for index, message in enumerate(messages):
        if message.get("weight") not in (None, 0, 1):
            raise InputError(
                f"messages[{index}].weight: expected 0 or 1, got {shown(message['weight'])}; "
                "correct it or leave it out"
            )
    if not tools:
        return messages
    first = messages[0] if messages else {}
    if first.get("role") != "system":
        first, messages = {"role": "system"}, [{}, *messages]
    if first.get("tools"):
        raise InputError(
            "tools: expected them once, got some in messages[0], too; take one of them out"
        )
    return [{**first, "tools": tools}, *messages[1:]]


def _is_learned(message: Mapping) -> bool:
    return message["role"] == "assistant" and message.get("weight") != 0


def function_chats(source: str) -> Iterator[dict]:
    """Make chats of a Python file: a function's code is asked about, its docstring answers.

    They are a small corpus that every interpreter has. The answer is the docstring's first
    paragraph, if it is ASCII and not long; files that do not parse give none.
    """
    try:
        with warnings.catch_warnings(action="ignore"):
            tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError):
        return
    lines = re.split(r"\r\n|\r|\n", source)  # as Python counts them
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and (text := ast.get_docstring(node)):
            answer = " ".join(re.split(r"\n\s*\n", text.strip())[0].split())
            code = _without_docstring(node, lines)
            short = len(answer) <= _LONGEST_ANSWER and len(code) <= _LONGEST_CODE
            if answer.isascii() and answer and code and short:
                yield {"messages": [
                    {"role": "user", "content": f"What does this function do?\n\n{code}"},
                    {"role": "assistant", "content": answer},
                ]}


def _without_docstring(function: ast.FunctionDef, lines: list[str]) -> str:
    """Return the code of a function but its docstring; nothing if they share a line."""
    docstring = function.body[0]
    head = lines[function.lineno - 1 : docstring.lineno - 1]
    body = lines[docstring.end_lineno : function.end_lineno] if head else []
    return textwrap.dedent("\n".join(head + body))
