"""Read text sources into documents and split them into a training and a held-out part."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn

from dsv4_jax.errors import InputError
from dsv4_jax.needle import TRAINING_TEXTS, training_text

STDLIB, NEEDLE = "stdlib", "needle"

# Folders of the interpreter's library that are not its own sources, or that test them.
_NOT_LIBRARY = frozenset(
    {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
)


@dataclasses.dataclass(frozen=True)
class Document:
    """One text that training never joins to another."""

    name: str  # where it comes from
    key: str  # what the split hashes
    text: str


@dataclasses.dataclass(frozen=True)
class Corpus:
    """The two parts of a source; no key is in both."""

    train: tuple[Document, ...]  # in the order of names
    held_out: tuple[Document, ...]  # in the order of hashes, which is random but fixed


def read_corpus(source: str, *, text_field: str, held_out_fraction: float) -> Corpus:
    """Read a source and split it.

    - `"stdlib"`: the running interpreter's own library, one document per UTF-8 `.py` file, test
      folders left out. Split by the SHA-256 of the relative path.
    - `"needle"`: texts made to train retrieval, see `needle.training_text`. Split by the SHA-256
      of the text.
    - a directory: one document per file below it, names that begin with a dot left out. Split by
      the SHA-256 of the relative path.
    - a `.jsonl` file (also below a directory): one document per line that is not blank. Split by
      the SHA-256 of the text, so that repeated lines stay in one part.
    - any other file: one document, whose tail is held out.

    Empty documents are left out. The whole source is held in memory.

    Args:
      text_field: the key of the text in each line of a `.jsonl` file.
      held_out_fraction: share of the documents (of the characters of a single text) to hold out,
        above 0 and below 1; where documents are few, one is held out.
    Raises:
      InputError: the source is missing, unreadable, empty, not UTF-8, not JSON lines, or too
        small to be split; the message names the place.
    """
    documents = read_documents(source, text_field=text_field)
    if _is_single_text(source):
        train, held_out = _split_text(documents[0], held_out_fraction)
    else:
        train, held_out = split_documents(documents, held_out_fraction)
    if not (train and held_out):
        empty = "held out" if train else "trained on"
        raise InputError(
            f"data.source: expected something to train on and something to hold out, but at "
            f"data.held_out_fraction={held_out_fraction} nothing of {source} "
            f"({len(documents)} documents) is {empty}; add text or change the fraction"
        )
    return Corpus(tuple(train), tuple(held_out))


def read_documents(
    source: str, *, text_field: str, setting: str = "data.source"
) -> list[Document]:
    """Read the documents of a source, see `read_corpus`, in the order of their names.

    Args:
      setting: that names the source, for messages.
    Raises:
      InputError: as for `read_corpus`.
    """
    with explain_failed_read(source, setting):
        documents = [d for d in _read_source(source, text_field, setting) if d.text]
    if not documents:
        raise InputError(
            f"{setting}: expected text, but there is none in {source}; name a file with text, "
            f'a directory of such files, "{STDLIB}" or "{NEEDLE}"'
        )
    return documents


@contextlib.contextmanager
def explain_failed_read(source: str, setting: str = "data.source") -> Iterator[None]:
    """Turn an error of the system into an InputError."""
    try:
        yield
    except OSError as error:
        raise InputError(
            f"{setting}: cannot read {error.filename or source}: {error.strerror}; check the path "
            "and its permissions"
        ) from error


def held_out_texts(corpus: Corpus, limit: int) -> list[str]:
    """Return the held-out texts up to `limit` bytes of UTF-8, the last one cut between characters.

    Raises:
      InputError: the limit leaves no room for a character.
    """
    kept = []
    for document in corpus.held_out:
        part = document.text.encode()[:limit].decode(errors="ignore")
        limit -= len(part.encode())
        if part:
            kept.append(part)
        if part != document.text:
            break
    if not kept:
        raise InputError("data.held_out_bytes: expected room for a character; raise it")
    return kept


def _is_single_text(source: str) -> bool:
    made = source in (STDLIB, NEEDLE)
    return not made and Path(source).is_file() and Path(source).suffix != ".jsonl"


def _read_source(source: str, text_field: str, setting: str) -> Iterator[Document]:
    if source == STDLIB:
        return read_stdlib()
    if source == NEEDLE:
        return _write_needles()
    if source and Path(source).is_dir():
        return _read_directory(Path(source), text_field)
    if source and Path(source).is_file():
        return _read_file(Path(source), Path(source).name, text_field)
    raise InputError(
        f'{setting}: expected a file, a directory, "{STDLIB}" or "{NEEDLE}", but {source!r} does '
        "not exist; check the path"
    )


def read_stdlib() -> Iterator[Document]:
    """Read the interpreter's own library, one document per file."""
    root = Path(sysconfig.get_path("stdlib"))
    for path in files_below(root, lambda name: name in _NOT_LIBRARY):
        if path.suffix == ".py":
            name, data = path.relative_to(root).as_posix(), path.read_bytes()
            if _is_utf8(data):
                yield Document(name, name, data.decode())


def _write_needles() -> Iterator[Document]:
    for number in range(TRAINING_TEXTS):
        text = training_text(number)
        yield Document(f"{NEEDLE}:{number}", text, text)


def _read_directory(root: Path, text_field: str) -> Iterator[Document]:
    for path in files_below(root, lambda name: name.startswith(".")):
        yield from _read_file(path, path.relative_to(root).as_posix(), text_field)


def _read_file(path: Path, name: str, text_field: str) -> Iterator[Document]:
    if path.suffix == ".jsonl":
        for number, record in read_records(path):
            text = _text_of_record(record, f"{path}:{number}", text_field)
            yield Document(f"{name}:{number}", text, text)
    else:
        yield Document(name, name, _decode(path.read_bytes(), str(path)))


def read_records(path: Path) -> Iterator[tuple[int, object]]:
    """Read a `.jsonl` file: the number, from 1, and the value of each line that is not blank."""
    for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):
        if line.strip():
            yield number, _read_record(line, f"{path}:{number}")


def _read_record(line: bytes, place: str) -> object:
    text = _decode(line, place)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{place}: expected a JSON object, got {error}; mend the line") from error


def _text_of_record(record: object, place: str, text_field: str) -> str:
    """Take the text out of one line of a `.jsonl` file."""
    if not isinstance(record, dict) or not isinstance(record.get(text_field), str):
        is_object = isinstance(record, dict)
        # Of repr's form, as keys may have line ends.
        found = repr(", ".join(sorted(record)))[1:-1] if is_object else type(record).__name__
        raise InputError(
            f'{place}: expected an object with a string "{text_field}", got {found[:80] or "none"};'
            " name the right key as text_field"
        )
    text = record[text_field]
    if not _is_encodable(text):
        raise InputError(
            f'{place}: expected text in "{text_field}", got half of a surrogate pair, which has '
            "no UTF-8 form; mend the line"
        )
    return text


def split_documents(documents: list, fraction: float) -> tuple[list, list]:
    """Hold out the documents of the smallest hashes of their `key`; equal keys stay together."""
    hashes = [_hash(document.key) for document in documents]
    ranked = sorted(zip(hashes, range(len(documents)), strict=True))
    border, _ = ranked[max(1, round(fraction * len(documents))) - 1]
    train = [d for d, digest in zip(documents, hashes, strict=True) if digest > border]
    return train, [documents[index] for digest, index in ranked if digest <= border]


def _split_text(document: Document, fraction: float) -> tuple[list, list]:
    cut = len(document.text) - max(1, round(fraction * len(document.text)))
    parts = document.text[: max(0, cut)], document.text[max(0, cut) :]
    train, held_out = (
        [dataclasses.replace(document, text=text)] if text else [] for text in parts
    )
    return train, held_out


def _hash(key: str) -> bytes:
    # surrogateescape: names of files may be other bytes than UTF-8.
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def files_below(root: Path, leave_out: Callable[[str], bool]) -> list[Path]:
    """List the regular files below a folder in the order of their relative paths."""
    found = []
    for folder, folders, files in os.walk(root, onerror=_raise):
        folders[:] = [name for name in folders if not leave_out(name)]
        found += [Path(folder, name) for name in files if not leave_out(name)]
    return sorted((path for path in found if path.is_file()), key=lambda p: p.relative_to(root))


def _raise(error: OSError) -> NoReturn:
    raise error


def _decode(data: bytes, place: str) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise InputError(
            f"{place}: expected UTF-8 text, got byte 0x{data[error.start]:02x} at offset "
            f"{error.start}; convert the file or take it out"
        ) from error


def _is_utf8(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


def _is_encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
