"""Read the source of a run and encode it, once."""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import itertools
import json
import lzma
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dsv4_jax.chat_corpus import answers_of, held_out_examples, read_chats
from dsv4_jax.chats import Example
from dsv4_jax.corpus import held_out_texts, read_corpus
from dsv4_jax.files import write_atomically
from dsv4_jax.run_config import CHAT, DataConfig
from dsv4_jax.tokenizer import Tokenizer, tokenizer_of_run

TOKENS_FILE = "tokens.bin"  # the encoded corpus in a run's workdir
TOKENS, LOSS_MASK = "tokens", "loss_mask"


@dataclasses.dataclass(frozen=True)
class Documents:
    """Encoded documents, end to end."""

    tokens: np.ndarray  # int32 [token]
    starts: np.ndarray  # of each document, and the end of the last
    loss_mask: np.ndarray | None = None  # int32 [token], 1 where it is learned; None: everywhere

    @classmethod
    def join(cls, documents: list[np.ndarray]) -> Documents:
        """Lay documents end to end."""
        lengths = [len(document) for document in documents]
        return cls(np.concatenate(documents), np.cumsum([0, *lengths]))

    @property
    def arrays(self) -> dict[str, np.ndarray]:
        """The tokens, and the loss mask if there is one, as a batch names them."""
        arrays = {TOKENS: self.tokens, LOSS_MASK: self.loss_mask}
        return {name: array for name, array in arrays.items() if array is not None}

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, part: slice) -> Documents:
        """Return neighbouring documents, without a copy."""
        first, stop, _ = part.indices(len(self))
        starts = self.starts[first : stop + 1]
        tokens = slice(starts[0], starts[-1])
        mask = None if self.loss_mask is None else self.loss_mask[tokens]
        return Documents(self.tokens[tokens], starts - starts[0], mask)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenizedCorpus:
    """What a run trains on and is scored on."""

    tokenizer: Tokenizer
    train: Documents
    held_out: Documents
    held_out_text: bytes  # UTF-8 of what is scored of these: bits per byte are over it


def prepare_corpus(
    config: DataConfig, *, vocab_size: int, workdir: str | os.PathLike
) -> TokenizedCorpus:
    """Read, split and encode the source of a run.

    The tokenizer and the encoded text are kept in the workdir and made again only where the text
    or the tokenizer is another. At most `config.held_out_bytes` are held out for scoring: documents
    in the order of their hashes, the last one cut; of chats, whole examples.

    Raises:
      InputError: the source, the tokenizer or the workdir cannot be used.
    """
    source = _read_chats(config) if config.format == CHAT else _read_texts(config)
    tokenizer = tokenizer_of_run(
        source.texts, path=config.tokenizer, workdir=workdir, vocab_size=vocab_size
    )
    documents = _encode(tokenizer, source, Path(workdir, TOKENS_FILE))
    return TokenizedCorpus(
        tokenizer=tokenizer,
        train=documents[: len(source.train)],
        held_out=documents[len(source.train) :],
        held_out_text=source.scored.encode(),
    )


def baseline_bits_per_byte(text: bytes) -> dict[str, float]:
    """Return what `gzip -9` and `xz -9` need for a text, in bits per byte."""
    sizes = {
        "gzip": len(gzip.compress(text, compresslevel=9)),
        "xz": len(lzma.compress(text, preset=9)),
    }
    return {name: 8 * size / len(text) for name, size in sizes.items()}


class _Source(NamedTuple):
    """What was read, before it is encoded."""

    train: list[str] | list[Example]
    held_out: list[str] | list[Example]
    texts: list[str]  # what a tokenizer may be trained on
    scored: str  # the held-out text


def _read_texts(config: DataConfig) -> _Source:
    corpus = read_corpus(
        config.source, text_field=config.text_field, held_out_fraction=config.held_out_fraction
    )
    train = [document.text for document in corpus.train]
    held_out = held_out_texts(corpus, config.held_out_bytes)
    return _Source(train, held_out, train, "".join(held_out))


def _read_chats(config: DataConfig) -> _Source:
    corpus = read_chats(
        config.source, thinking=config.thinking, held_out_fraction=config.held_out_fraction
    )
    train = [example for chat in corpus.train for example in chat.examples]
    held_out = held_out_examples(corpus, config.held_out_bytes)
    texts = [
        text for example in train for part in example
        for text, is_control in part.segments if not is_control
    ]
    return _Source(train, held_out, texts, "".join(map(answers_of, held_out)))


def _encode(tokenizer: Tokenizer, source: _Source, kept: Path) -> Documents:
    """Encode documents, or take them from the file that an earlier call kept.

    The file is a SHA-256 and int32 arrays one after the other, `Documents.arrays`. The hash is over
    the tokenizer, the documents and the arrays, so that a stale or damaged file does not pass.
    """
    documents, is_chat = [*source.train, *source.held_out], isinstance(source.train[0], list)
    key = hashlib.sha256(tokenizer.specification.encode())
    for document in documents:
        content = json.dumps(document) if is_chat else document
        key.update(hashlib.sha256(content.encode()).digest())
    data = _kept(kept, key.digest())
    if data is None:
        encoded = (_encode_chats if is_chat else _encode_texts)(tokenizer, documents)
        data = b"".join(array.astype("<i4").tobytes() for array in encoded.arrays.values())
        write_atomically(kept, hashlib.sha256(key.digest() + data).digest() + data)
        return encoded
    tokens, *mask = np.frombuffer(data, "<i4").reshape(1 + is_chat, -1)
    # No text encodes to BOS: it is where documents start.
    starts = np.append(np.flatnonzero(tokens == tokenizer.bos_id), len(tokens))
    return Documents(tokens, starts, *mask)


def _encode_texts(tokenizer: Tokenizer, texts: list[str]) -> Documents:
    return Documents.join(tokenizer.encode_documents(texts))


def _encode_chats(tokenizer: Tokenizer, examples: list[Example]) -> Documents:
    """Encode examples; neighbouring parts that are both learned, or not, are one text."""
    documents, masks = [], []
    for example in examples:
        stretches = itertools.groupby(example, lambda part: part.learned)
        parts = [
            (tokenizer.encode_segments(s for part in group for s in part.segments), learned)
            for learned, group in stretches
        ]
        documents.append(np.concatenate([ids for ids, _ in parts]))
        masks += [np.full(len(ids), learned, np.int32) for ids, learned in parts]
    return dataclasses.replace(Documents.join(documents), loss_mask=np.concatenate(masks))


def _kept(path: Path, key: bytes) -> bytes | None:
    """Return what a file holds behind its hash, if that is the hash of this key and it."""
    try:
        data = path.read_bytes()
    except OSError:
        return None
    size = hashlib.sha256().digest_size
    return data[size:] if hashlib.sha256(key + data[size:]).digest() == data[:size] else None
