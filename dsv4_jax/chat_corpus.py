"""Read sources of chats and split them into a training and a held-out part."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from dsv4_jax.chats import Example, function_chats, read_examples
from dsv4_jax.corpus import (
    STDLIB,
    explain_failed_read,
    files_below,
    read_records,
    read_stdlib,
    split_documents,
)
from dsv4_jax.errors import InputError


class Chat(NamedTuple):
    """What is learned from one record of a source."""

    key: str  # what the split hashes: equal chats are in one part
    examples: list[Example]


class ChatCorpus(NamedTuple):
    """The two parts of a source of chats."""

    train: list[Chat]
    held_out: list[Chat]


def read_chats(source: str, *, thinking: str, held_out_fraction: float) -> ChatCorpus:
    """Read a source of chats and split it by the SHA-256 of each.

    - a `.jsonl` file, or a directory with such files below it: one chat per line that is not
      blank, see `chats.read_examples`. Names that begin with a dot are left out.
    - `"stdlib"`: what the functions of the interpreter's own library do, see
      `chats.function_chats`.

    Args:
      thinking: how the model thinks before an answer, where a chat does not say.
      held_out_fraction: share of the chats to hold out; where they are few, one is held out.
    Raises:
      InputError: the source is missing, unreadable or empty, a chat is of no use, or there are too
        few to be split; the message names the line.
    """
    with explain_failed_read(source):
        chats = [
            Chat(json.dumps(record, sort_keys=True), _examples(record, place, thinking))
            for place, record in _read_source(source)
        ]
    train, held_out = split_documents(chats, held_out_fraction) if chats else ([], [])
    if not (train and held_out):
        raise InputError(
            f"data.source: expected at least two different chats, one to train on and one to hold "
            f"out, got {len(chats)} in {source}; add some or name another source"
        )
    return ChatCorpus(train, held_out)


def held_out_examples(corpus: ChatCorpus, limit: int) -> list[Example]:
    """Return held-out examples whose answers have up to `limit` bytes of UTF-8; at least one.

    Raises:
      InputError: the answers are all empty.
    """
    kept, left = [], limit
    for example in (example for chat in corpus.held_out for example in chat.examples):
        left -= len(answers_of(example).encode())
        if left < 0 and kept:
            break
        kept.append(example)
    if not any(map(answers_of, kept)):
        raise InputError(
            "data.source: expected text in the answers that are held out, got none; add chats"
        )
    return kept


def answers_of(example: Example) -> str:
    """Return the text of what is learned, control tokens left out."""
    return "".join(
        text for part in example if part.learned
        for text, is_control in part.segments if not is_control
    )


def _examples(record: object, place: str, thinking: str) -> list[Example]:
    if not isinstance(record, dict):
        raise InputError(
            f'{place}: expected an object with "messages", got {type(record).__name__}; mend the '
            "line"
        )
    try:
        return read_examples(record, thinking)
    except InputError as error:
        raise InputError(f"{place}: {error}") from error


def _read_file(path: Path) -> Iterator[tuple[str, object]]:
    return ((f"{path}:{number}", record) for number, record in read_records(path))


def _read_source(source: str) -> Iterator[tuple[str, object]]:
    """Read records with the places that they are at."""
    path = Path(source)
    if source == STDLIB:
        for document in read_stdlib():
            for number, record in enumerate(function_chats(document.text)):
                yield f"{document.name}:{number}", record
    elif source and path.is_dir():
        for file in files_below(path, lambda name: name.startswith(".")):
            if file.suffix == ".jsonl":
                yield from _read_file(file)
    elif source and path.is_file() and path.suffix == ".jsonl":
        yield from _read_file(path)
    else:
        raise InputError(
            f'data.source: expected a .jsonl file of chats, a directory of such files or "{STDLIB}"'
            f", got {source!r}; check the path, or set data.format=text for text"
        )
