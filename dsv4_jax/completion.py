"""Read a completion of DeepSeek-V4 as an assistant message: reasoning, content, tool calls."""

from __future__ import annotations

import json
import re
from typing import TypedDict

from dsv4_jax.encoding_texts import BOS, DSML, END_THINK, EOS, THINK
from dsv4_jax.errors import InputError, shown
from dsv4_jax.messages import is_thinking

_CALLS, _CALLS_END = f"\n\n<{DSML}tool_calls", f"</{DSML}tool_calls>"
_CALL, _CALL_END = f"<{DSML}invoke", f"</{DSML}invoke"
_PARAMETER, _PARAMETER_END = f"<{DSML}parameter", f"/{DSML}parameter"
_CALL_NAME = re.compile(r'\s*name="(.*)">\n\n?', re.DOTALL)  # a call without parameters has both
_PARAMETER_NAME = re.compile(r' name="(.*?)" string="(true|false)">', re.DOTALL)
_FORBIDDEN = re.compile("|".join(map(re.escape, (BOS, EOS, THINK, END_THINK, DSML))))
_SHOWN = 60  # characters of the completion in an error


class Function(TypedDict):
    """The function of a tool call; `arguments` is JSON."""

    name: str
    arguments: str


class ToolCall(TypedDict):
    """A tool call in OpenAI's form, but without an id: the model writes none."""

    type: str
    function: Function


class AssistantMessage(TypedDict):
    """An assistant message in OpenAI's form."""

    role: str
    content: str
    reasoning_content: str
    tool_calls: list[ToolCall]


def parse_completion(text: str, *, thinking_mode: str) -> AssistantMessage:
    """Return the assistant message that a completion says.

    Args:
      text: all that the model wrote after the prompt, EOS included; after tool calls EOS may be
        missing.
      thinking_mode: of the prompt. In mode `thinking` the completion begins with the reasoning.
    Raises:
      InputError: the completion breaks the format; the message says at which character.
    """
    thinking = is_thinking(thinking_mode)
    if not isinstance(text, str):
        raise InputError(f"completion: expected a string, got {shown(text)}; decode the ids first")
    reader = _Reader(text)
    reasoning = content = ""
    if thinking:
        reasoning, stop = reader.until(END_THINK, _CALLS)
        if stop == _CALLS:
            raise reader.error(f"{END_THINK} before the tool calls", len(reasoning))
    content, stop = reader.until(EOS, _CALLS)
    before_stop = reader.index - len(stop)
    tool_calls = _tool_calls(reader) if stop == _CALLS else []
    if text[reader.index :] not in (("", EOS) if stop == _CALLS else ("",)):
        raise reader.error(f"{EOS} and nothing after it", reader.index)
    reader.refuse_control_tokens(0, len(reasoning))
    reader.refuse_control_tokens(before_stop - len(content), before_stop)
    return {
        "role": "assistant",
        "content": content,
        "reasoning_content": reasoning,
        "tool_calls": tool_calls,
    }


class _Reader:
    def __init__(self, text: str):
        self.text = text
        self.index = 0

    def until(self, *stops: str) -> tuple[str, str]:
        """Return the text up to the first of the stops, and that stop; go on behind it."""
        # One search for all, so that a far stop is not looked for again at each near one.
        found = re.compile("|".join(map(re.escape, stops))).search(self.text, self.index)
        if found is None:
            raise self.error(" or ".join(stop.strip() for stop in stops) + " to follow", self.index)
        before = self.text[self.index : found.start()]
        self.index = found.end()
        return before, found.group()

    def refuse_control_tokens(self, first: int, end: int) -> None:
        found = _FORBIDDEN.search(self.text, first, end)
        if found is not None:
            raise self.error("no control token here", found.start())

    def error(self, expected: str, index: int) -> InputError:
        got = shown(self.text[index : index + _SHOWN]) if index < len(self.text) else "its end"
        return InputError(
            f"completion, character {index}: expected {expected}, got {got}; sample it again, with "
            "more tokens if it was cut off"
        )


def _tool_calls(reader: _Reader) -> list[ToolCall]:
    tool_calls = []
    while _line_ends_before(reader, _CALL, _CALLS_END) == _CALL:
        tool_calls.append(_tool_call(reader))
    return tool_calls


def _tool_call(reader: _Reader) -> ToolCall:
    start = reader.index
    head, stop = reader.until(_PARAMETER, _CALL_END)
    name = _CALL_NAME.fullmatch(head)
    if name is None:
        raise reader.error('name="...", > and a line end', start)
    arguments: dict[str, str] = {}
    while stop == _PARAMETER:
        start = reader.index
        key, value = _parameter(reader)
        if key in arguments:
            raise reader.error(f"no second parameter {shown(key)}", start)
        arguments[key] = value
        stop = _line_ends_before(reader, _PARAMETER, _CALL_END)
    pairs = ", ".join(f"{_json(key)}: {value}" for key, value in arguments.items())
    return {"type": "function", "function": {"name": name[1], "arguments": f"{{{pairs}}}"}}


def _parameter(reader: _Reader) -> tuple[str, str]:
    """Return the name of a parameter and its value as JSON."""
    start = reader.index
    text, _ = reader.until(_PARAMETER_END)
    head = _PARAMETER_NAME.match(text)
    if head is None or not text.endswith("<"):
        raise reader.error('name="..." string="true|false">VALUE<' + _PARAMETER_END, start)
    value = text[head.end() : -1]
    if head[2] == "true":
        return head[1], _json(value)
    try:
        json.loads(value)
    except (ValueError, RecursionError) as error:
        raise reader.error("the value as JSON", start + head.end()) from error
    return head[1], value


def _line_ends_before(reader: _Reader, *stops: str) -> str:
    """Return which of the stops comes next; only the rest of a tag may stand before it."""
    start = reader.index
    between, stop = reader.until(*stops)
    if between != ">\n":
        raise reader.error("> and a line end before " + " or ".join(stops), start)
    return stop


def _json(value: str) -> str:
    return json.dumps(value, ensure_ascii=False)
