"""Read the messages of a chat, which are not to be trusted, into checked records."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

from dsv4_jax.encoding_texts import TASKS
from dsv4_jax.errors import InputError, shown

ROLES = ("system", "developer", "user", "assistant", "tool", "latest_reminder")
_WITHOUT_CONTENT = ("system", "assistant")  # whose content may be missing or None


@dataclass(frozen=True)
class Parameter:
    """An argument of a tool call: a string as it is, anything else as JSON."""

    name: str
    text: str
    is_string: bool


@dataclass(frozen=True)
class ToolCall:
    """A call of a tool by the assistant; without an id its result cannot be told from others."""

    name: str
    parameters: tuple[Parameter, ...]
    call_id: str


@dataclass(frozen=True)
class ToolResult:
    """What a tool returned to a call."""

    text: str
    call_id: str


@dataclass(frozen=True)
class Message:
    """A message that can be rendered: a tool's became a user's, made of blocks like all of them."""

    role: str
    content: str = ""
    blocks: tuple[str | ToolResult, ...] = ()  # of a user: texts and results, instead of content
    reasoning: str = ""
    tools: tuple[str, ...] = ()  # the JSON of each function
    response_format: str = ""  # JSON, or nothing
    calls: tuple[ToolCall, ...] = ()
    task: str | None = None
    ends: bool = True  # with EOS


def read_messages(value: object, where: str) -> list[Message]:
    """Check a list of messages in OpenAI's form, with DeepSeek's additional fields and roles.

    What does not belong to a message's role is checked, but not kept: so are a user's `tools`.

    Args:
      where: what the list is called in errors.
    Raises:
      InputError: something is missing, unknown or of a wrong type; the message says where.
    """
    return [
        _read_message(message, f"{where}[{index}]")
        for index, message in enumerate(_list(value, where))
    ]


def is_thinking(thinking_mode: object) -> bool:
    """Return whether a thinking_mode is `thinking` and not `chat`; an InputError if neither."""
    if thinking_mode not in ("chat", "thinking"):
        raise _wrong("thinking_mode", "'chat' or 'thinking'", thinking_mode, "choose one of them")
    return thinking_mode == "thinking"


def _read_message(value: object, where: str) -> Message:
    fields = _object(value, where)
    role, task = fields.get("role"), fields.get("task")
    if role not in ROLES:
        raise _wrong(f"{where}.role", f"one of {', '.join(ROLES)}", role, "use one of them")
    if task is not None and task not in tuple(TASKS):
        raise _wrong(f"{where}.task", f"one of {', '.join(TASKS)}", task, "use one or leave it out")
    if fields.get("wo_eos") not in (None, False, True):
        raise _wrong(f"{where}.wo_eos", "true or false", fields["wo_eos"], "correct or remove it")
    message = Message(
        role,
        content=_content(fields, role, f"{where}.content"),
        reasoning=_optional_text(fields, "reasoning_content", where),
        tools=_tools(fields, f"{where}.tools"),
        response_format=_response_format(fields, f"{where}.response_format"),
        calls=_calls(fields, f"{where}.tool_calls"),
        task=task,
        ends=not fields.get("wo_eos"),
    )
    if role == "tool":
        result = ToolResult(message.content, _optional_text(fields, "tool_call_id", where))
        return Message("user", blocks=(result,))
    if role == "user":
        return Message("user", blocks=(message.content,), task=task)
    return message


def _content(fields: Mapping, role: str, where: str) -> str:
    value = fields.get("content")
    if value is None and role in _WITHOUT_CONTENT:
        return ""
    if isinstance(value, list | tuple) and role == "tool":
        parts = (_content_part(part, f"{where}[{index}]") for index, part in enumerate(value))
        return "\n\n".join(parts)
    text = _text(value, where, f"give the text of the {role} message as one string")
    if not text and role == "developer":
        raise _wrong(where, "some text", text, "write it or remove the message")
    return text


def _content_part(value: object, where: str) -> str:
    part = _object(value, where)
    kind = _required_text(part, "type", where)
    return _required_text(part, "text", where) if kind == "text" else f"[Unsupported {kind}]"


def _tools(fields: Mapping, where: str) -> tuple[str, ...]:
    functions = []
    for index, value in enumerate(_list(fields.get("tools") or [], where)):
        tool = _object(value, f"{where}[{index}]")
        function_where = f"{where}[{index}].function"
        functions.append(_json(_object(tool.get("function"), function_where), function_where))
    return tuple(functions)


def _response_format(fields: Mapping, where: str) -> str:
    value = fields.get("response_format")
    return _json(value, where) if value else ""


def _calls(fields: Mapping, where: str) -> tuple[ToolCall, ...]:
    values = _list(fields.get("tool_calls") or [], where)
    return tuple(_call(value, f"{where}[{index}]") for index, value in enumerate(values))


def _call(value: object, where: str) -> ToolCall:
    call = _object(value, where)
    function_where = f"{where}.function"
    function = _object(call.get("function"), function_where)
    arguments = _required_text(function, "arguments", function_where)
    return ToolCall(
        _required_text(function, "name", function_where),
        _parameters(arguments, f"{function_where}.arguments"),
        _optional_text(call, "id", where) or _optional_text(function, "id", function_where),
    )


def _parameters(arguments: str, where: str) -> tuple[Parameter, ...]:
    try:
        values = json.loads(arguments)
    except (ValueError, RecursionError):  # models do write such arguments: they stay as they are
        values = {"arguments": arguments}
    if not isinstance(values, dict):
        raise _wrong(where, "the JSON of an object", arguments, "name each argument in an object")
    parameters = []
    for name, value in values.items():
        is_string = isinstance(value, str)
        text = _text(value, where) if is_string else _json(value, where)
        parameters.append(Parameter(_text(name, where), text, is_string))
    return tuple(parameters)


def _json(value: object, where: str) -> str:
    try:
        text = json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise _wrong(where, f"a value that has a JSON form ({reason})", value, "use one") from error
    return _text(text, where)


def _list(value: object, where: str) -> list | tuple:
    if not isinstance(value, list | tuple):
        raise _wrong(where, "a list", value, "put what it holds into a list")
    return value


def _object(value: object, where: str) -> Mapping:
    if not isinstance(value, Mapping):
        raise _wrong(where, "an object with named fields", value, "give a dict")
    return value


def _required_text(fields: Mapping, name: str, where: str) -> str:
    return _text(fields.get(name), f"{where}.{name}")


def _optional_text(fields: Mapping, name: str, where: str) -> str:
    return "" if fields.get(name) is None else _required_text(fields, name, where)


def _text(value: object, where: str, advice: str = "give one") -> str:
    if not isinstance(value, str):
        raise _wrong(where, "a string", value, advice)
    try:
        value.encode()
    except UnicodeEncodeError as error:
        expected = "characters with a UTF-8 form"
        raise _wrong(where, expected, value[error.start], "take it out") from error
    return value


def _wrong(where: str, expected: str, got: object, advice: str) -> InputError:
    found = "nothing" if got is None else shown(got)
    return InputError(f"{where}: expected {expected}, got {found}; {advice}")
