"""Write the messages of a chat as a prompt of DeepSeek-V4, and its completion as a message.

The rules are those of `encoding/encoding_dsv4.py` in DeepSeek's model repositories.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence

from dsv4_jax.completion import parse_completion
from dsv4_jax.encoding_texts import (
    AFTER_TOOLS,
    ASSISTANT,
    BEFORE_TOOLS,
    BOS,
    CONTROL_TOKENS,
    DSML,
    END_THINK,
    EOS,
    LATEST_REMINDER,
    MAX_EFFORT,
    RESPONSE_FORMAT,
    TASKS,
    THINK,
    USER,
)
from dsv4_jax.errors import InputError, shown
from dsv4_jax.messages import Message, ToolCall, ToolResult, is_thinking, read_messages

__all__ = ["Segment", "encode_messages", "parse_completion", "render_messages"]

# A piece of a prompt, and whether it is a control token of the format: all else is literal text.
Segment = tuple[str, bool]

_EFFORTS = (None, "high", "max")
_CONTROL = re.compile(f"({'|'.join(map(re.escape, CONTROL_TOKENS))})")


@dataclasses.dataclass(frozen=True)
class _Chat:
    messages: Sequence[Message]
    thinking: bool
    dropping: bool  # the reasoning before the last user message
    last_user: int  # -1 if there is none


def encode_messages(
    messages: Sequence[Mapping],
    *,
    thinking_mode: str,
    context: Sequence[Mapping] | None = None,
    drop_thinking: bool = True,
    add_bos: bool = True,
    reasoning_effort: str | None = None,
) -> str:
    """Return the prompt of a chat as text; arguments and errors are those of render_messages.

    To turn a prompt into ids, give the segments to `Tokenizer.encode_segments`: in the text, the
    control tokens cannot be told from what a user wrote.
    """
    segments = render_messages(
        messages,
        thinking_mode=thinking_mode,
        context=context,
        drop_thinking=drop_thinking,
        add_bos=add_bos,
        reasoning_effort=reasoning_effort,
    )
    return "".join(text for text, _ in segments)


def render_messages(
    messages: Sequence[Mapping],
    *,
    thinking_mode: str,
    context: Sequence[Mapping] | None = None,
    drop_thinking: bool = True,
    add_bos: bool = True,
    reasoning_effort: str | None = None,
) -> list[Segment]:
    """Return the prompt of a chat in segments: control tokens, and literal text.

    Args:
      messages: in OpenAI's form, with DeepSeek's additional roles and fields.
      thinking_mode: `chat` or `thinking`.
      context: messages before these, encoded already: only what follows them is rendered.
      drop_thinking: leave out what came to be before the last user message: reasoning and developer
        messages. No effect in mode `chat` or with tools.
      add_bos: begin with BOS if there is no context.
      reasoning_effort: None, `high` (the same) or `max`, which only mode `thinking` knows.
    Raises:
      InputError: an argument, or something in a message, is of no use; the message says where.
    """
    thinking = is_thinking(thinking_mode)
    if reasoning_effort not in _EFFORTS:
        raise InputError(
            f"reasoning_effort: expected None, 'high' or 'max', got {shown(reasoning_effort)}; "
            "choose one of them"
        )
    earlier = _joined([] if context is None else read_messages(context, "context"))
    later = _joined(read_messages(messages, "messages"))
    every = [*earlier, *later]
    dropping = drop_thinking and not any(message.tools for message in every)
    if thinking and dropping:
        # As in the format's source, a developer message that ends the context is not dropped from
        # it, so that it hides one message of those to render.
        earlier, every = _without_old_developers(earlier), _without_old_developers(every)
    chat = _Chat(_with_sorted_results(every), thinking, dropping, _last_user(every))
    segments = [(BOS, True)] if add_bos and not earlier else []
    for index in range(len(earlier), len(every)):
        if index == 0 and thinking and reasoning_effort == "max":
            segments += _fixed(MAX_EFFORT)
        segments += _message(chat, index)
        segments += _transition(chat, index)
    return [segment for segment in segments if segment[0]]


def _joined(messages: Sequence[Message]) -> list[Message]:
    """Join user messages in a row, but no text to a task; the later one's task is lost."""
    joined: list[Message] = []
    for message in messages:
        last = joined[-1] if joined else None
        both_user = last is not None and last.role == message.role == "user"
        if both_user and (last.task is None or isinstance(message.blocks[0], ToolResult)):
            joined[-1] = dataclasses.replace(last, blocks=last.blocks + message.blocks)
        else:
            joined.append(message)
    return joined


def _with_sorted_results(messages: Sequence[Message]) -> list[Message]:
    """Put tool results within a message in the order of the calls of the last assistant."""
    order: dict[str, int] = {}
    done = []
    for message in messages:
        if message.role == "assistant" and message.calls:
            order = {call.call_id: index for index, call in enumerate(message.calls)}
            order.pop("", None)
        results = [block for block in message.blocks if isinstance(block, ToolResult)]
        in_order = iter(sorted(results, key=lambda result: order.get(result.call_id, 0)))
        blocks = (
            next(in_order) if isinstance(block, ToolResult) else block for block in message.blocks
        )
        done.append(dataclasses.replace(message, blocks=tuple(blocks)))
    return done


def _last_user(messages: Sequence[Message]) -> int:
    indices = (i for i, message in enumerate(messages) if message.role in ("user", "developer"))
    return max(indices, default=-1)


def _without_old_developers(messages: Sequence[Message]) -> list[Message]:
    last_user = _last_user(messages)
    return [
        message
        for index, message in enumerate(messages)
        if index >= last_user or message.role != "developer"
    ]


def _message(chat: _Chat, index: int) -> Iterator[Segment]:
    message = chat.messages[index]
    if message.role in ("user", "developer"):
        yield USER, True
    if message.role == "latest_reminder":
        yield LATEST_REMINDER, True
    if message.role == "user":
        yield from _blocks(message.blocks)
    elif message.role == "assistant":
        yield from _assistant(chat, index)
    else:
        yield message.content, False
    if message.role in ("system", "developer"):
        yield from _demands(message)


def _blocks(blocks: Sequence[str | ToolResult]) -> Iterator[Segment]:
    for index, block in enumerate(blocks):
        if index:
            yield "\n\n", False
        if isinstance(block, ToolResult):
            yield f"<tool_result>{block.text}</tool_result>", False
        else:
            yield block, False


def _demands(message: Message) -> Iterator[Segment]:
    """Render the tools and the format of the reply, below a system or developer message."""
    if message.tools:
        yield from _fixed("\n\n" + BEFORE_TOOLS)
        yield "\n".join(message.tools), False
        yield from _fixed(AFTER_TOOLS)
    if message.response_format:
        yield from _fixed("\n\n" + RESPONSE_FORMAT)
        yield message.response_format, False


def _assistant(chat: _Chat, index: int) -> Iterator[Segment]:
    message = chat.messages[index]
    answers_task = index > 0 and chat.messages[index - 1].task is not None
    if chat.thinking and not answers_task and (not chat.dropping or index > chat.last_user):
        yield message.reasoning, False
        yield END_THINK, True
    yield message.content, False
    if message.calls:
        yield from _fixed(f"\n\n<{DSML}tool_calls>\n")
        for call in message.calls:
            yield from _call(call)
        yield from _fixed(f"</{DSML}tool_calls>")
    if message.ends:
        yield EOS, True


def _call(call: ToolCall) -> Iterator[Segment]:
    yield from _fixed(f'<{DSML}invoke name="')
    yield call.name, False
    yield from _fixed('">\n')
    for index, parameter in enumerate(call.parameters):
        yield from _fixed(("\n" if index else "") + f'<{DSML}parameter name="')
        yield parameter.name, False
        yield from _fixed(f'" string="{"true" if parameter.is_string else "false"}">')
        yield parameter.text, False
        yield from _fixed(f"</{DSML}parameter>")
    yield from _fixed(f"\n</{DSML}invoke>\n")


def _transition(chat: _Chat, index: int) -> Iterator[Segment]:
    """Render what makes the model answer, if an answer or a reminder or nothing follows."""
    message = chat.messages[index]
    if index + 1 < len(chat.messages):
        if chat.messages[index + 1].role not in ("assistant", "latest_reminder"):
            return
    is_user = message.role in ("user", "developer")
    if message.task == "action" or (message.task is None and is_user):
        old = message.task is None and chat.dropping and index < chat.last_user
        yield ASSISTANT, True
        yield (THINK if chat.thinking and not old else END_THINK), True
    if message.task is not None:
        yield TASKS[message.task], True


def _fixed(text: str) -> list[Segment]:
    """Split a text of the format itself at its control tokens."""
    return [(piece, index % 2 == 1) for index, piece in enumerate(_CONTROL.split(text))]
