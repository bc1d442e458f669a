"""Turn chats into what a model learns from: prompts, and answers that count in the loss."""

from __future__ import annotations

import ast
import re
import textwrap
import warnings
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from dsv4_jax.encoding import Segment, Turn, render_turns
from dsv4_jax.encoding_texts import THINKING
from dsv4_jax.errors import InputError, shown

_LONGEST_CODE, _LONGEST_ANSWER = 600, 240  # characters in chats about functions


class Part(NamedTuple):
    """A stretch of an example."""

    segments: list[Segment]
    learned: bool  # whether its tokens count in the loss


Example = list[Part]


def read_examples(record: Mapping, thinking: str) -> list[Example]:
    """Return what is to be learned from a chat.

    Learned is what the assistant writes: reasoning, answer, tool calls, and EOS. The model sees
    before it just the prompt that it would be asked with. Where V4's format leaves the reasoning of
    earlier turns out, each turn is so an example of its own, otherwise the chat is one example.
    What follows the last answer is not used.

    Args:
      record: has `messages` in OpenAI's form, with DeepSeek's additional roles and fields; it may
        have `tools`, which become the system's, and `thinking`.
      thinking: how the model thinks before an answer, "off", "high" or "max", where the record
        does not say.
    Raises:
      InputError: a message is of no use, or none is the assistant's.
    """
    messages = _messages(record)
    thinking = record.get("thinking", thinking)
    if not isinstance(thinking, str) or thinking not in THINKING:
        raise InputError(
            f"thinking: expected one of {', '.join(THINKING)}, got {shown(thinking)}; correct it "
            "or leave it out"
        )
    roles = [m.get("role") if isinstance(m, Mapping) else None for m in messages]
    answers = [index for index, role in enumerate(roles) if role == "assistant"]
    if not answers:
        raise InputError(
            "messages: expected one with the role assistant, whose answer is learned, got none; "
            "take the line out"
        )
    whole = _turns(messages[: answers[-1] + 1], thinking)
    if sum(turn.is_answer for turn in whole) == len(answers):
        return [_example(whole)]
    ends = [index for index in answers if roles[index + 1 : index + 2] != ["assistant"]]
    return [_example(_turns(messages[: index + 1], thinking)) for index in ends]


def _messages(record: Mapping) -> list:
    messages, tools = record.get("messages"), record.get("tools")
    if not isinstance(messages, list):
        found = "nothing" if messages is None else shown(messages)
        raise InputError(f"messages: expected a list, got {found}; put the chat's messages there")
    if not tools:
        return messages
    if not isinstance(tools, list):
        raise InputError(f"tools: expected a list, got {shown(tools)}; put the functions there")
    first = messages[0] if messages and isinstance(messages[0], Mapping) else {}
    if first.get("role") != "system":
        return [{"role": "system", "tools": tools}, *messages]
    if first.get("tools"):
        raise InputError(
            "tools: expected them once, got some in messages[0], too; take one of them out"
        )
    return [{**first, "tools": tools}, *messages[1:]]


def _turns(messages: list, thinking: str) -> list[Turn]:
    mode, effort = THINKING[thinking]
    return render_turns(messages, thinking_mode=mode, reasoning_effort=effort)


def _example(turns: list[Turn]) -> Example:
    return [Part(turn.segments, turn.is_answer) for turn in turns if turn.segments]


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
    lines = source.splitlines()
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
