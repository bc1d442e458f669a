"""Pack a tokenized corpus into batches: an endless, resumable one and a held-out one.

Every batch is a dict of int32 arrays `[rows, seq_len]`: `tokens`, `segment_ids` (0 is padding,
then 1, 2, ... for the pieces of a row) and `positions` (from 0 in every piece).

A document is BOS, its text, EOS. It is cut into pieces of `seq_len` tokens, each of which starts
with the last token of the piece before, so that every token but BOS is predicted exactly once: the
first token of a piece is context only. A piece is a document of its own for the model, as nothing
before it is in the row.
"""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import lzma
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grain
import numpy as np

from dsv4_jax.corpus import held_out_texts, read_corpus
from dsv4_jax.errors import InputError
from dsv4_jax.files import write_atomically
from dsv4_jax.tokenizer import Tokenizer, tokenizer_of_run

if TYPE_CHECKING:
    from dsv4_jax.run_config import DataConfig

Batch = dict[str, np.ndarray]

TOKENS_FILE = "tokens.bin"  # the encoded corpus in a run's workdir

# Rows that are filled side by side, first fit. 64 waste 1 to 3 % of the standard library at 256 to
# 4,096 tokens; a resume packs at most so many rows again.
_ROWS_PACKED_AT_ONCE = 64


@dataclasses.dataclass(frozen=True)
class Documents:
    """Encoded documents, end to end."""

    tokens: np.ndarray  # int32 [token]
    starts: np.ndarray  # of each document, and the end of the last

    @classmethod
    def join(cls, documents: list[np.ndarray]) -> Documents:
        """Lay documents end to end."""
        lengths = [len(document) for document in documents]
        return cls(np.concatenate(documents), np.cumsum([0, *lengths]))

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, part: slice) -> Documents:
        """Return neighbouring documents, without a copy."""
        first, stop, _ = part.indices(len(self))
        starts = self.starts[first : stop + 1]
        return Documents(self.tokens[starts[0] : starts[-1]], starts - starts[0])


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenizedCorpus:
    """What a run trains on and is scored on."""

    tokenizer: Tokenizer
    train: Documents
    held_out: Documents
    held_out_text: bytes  # UTF-8 of the held-out documents: bits per byte are over these


class Pieces:
    """Documents cut to 2 to `seq_len` tokens, as a random-access source of grain."""

    def __init__(self, documents: Documents, seq_len: int):
        begins, ends = documents.starts[:-1], documents.starts[1:]
        counts = -(-(ends - begins - 1) // (seq_len - 1))
        document = np.repeat(np.arange(len(documents)), counts)
        place = np.arange(len(document)) - np.repeat(np.cumsum(counts) - counts, counts)
        self._tokens = documents.tokens
        self._starts = begins[document] + place * (seq_len - 1)
        self._stops = np.minimum(self._starts + seq_len, ends[document])

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: int) -> Batch:
        return {"tokens": self._tokens[self._starts[index] : self._stops[index]]}


class TrainIterator(grain.DatasetIterator):
    """Endless batches of one host, of which `grain.checkpoint` saves and restores the place.

    The state is the same on all hosts and for any number of them. It names the data, so that it is
    refused where the same place would be other text.
    """

    def __init__(self, batches: grain.DatasetIterator, rows: slice, identity: dict[str, Any]):
        super().__init__(batches)
        self._batches, self._rows, self._identity = batches, rows, identity

    def __next__(self) -> Batch:
        return {name: array[self._rows] for name, array in next(self._batches).items()}

    def get_state(self) -> dict[str, Any]:
        return {"identity": dict(self._identity), "batches": self._batches.get_state()}

    def set_state(self, state: dict[str, Any]) -> None:
        """Go to a saved place.

        Raises:
          InputError: the state was saved with other text, tokenizer, `seq_len` or seed.
        """
        for name, saved in state["identity"].items():
            now = self._identity.get(name)
            if now != saved:
                raise InputError(
                    f"{name}: expected {saved}, as in the checkpoint, got {now}; resume with the "
                    "same data or start in a new workdir"
                )
        self._batches.set_state(state["batches"])


def prepare_corpus(
    config: DataConfig, *, vocab_size: int, workdir: str | os.PathLike
) -> TokenizedCorpus:
    """Read, split and encode the source of a run.

    The tokenizer and the encoded text are kept in the workdir and made again only where the text
    or the tokenizer is another. At most `config.held_out_bytes` are held out for scoring: documents
    in the order of their hashes, the last one cut.

    Raises:
      InputError: the source, the tokenizer or the workdir cannot be used.
    """
    corpus = read_corpus(
        config.source, text_field=config.text_field, held_out_fraction=config.held_out_fraction
    )
    train = [document.text for document in corpus.train]
    held_out = held_out_texts(corpus, config.held_out_bytes)
    tokenizer = tokenizer_of_run(
        train, path=config.tokenizer, workdir=workdir, vocab_size=vocab_size
    )
    documents = _encode(tokenizer, [*train, *held_out], Path(workdir, TOKENS_FILE))
    return TokenizedCorpus(
        tokenizer=tokenizer,
        train=documents[: len(train)],
        held_out=documents[len(train) :],
        held_out_text="".join(held_out).encode(),
    )


def make_train_iterator(
    corpus: TokenizedCorpus, config: DataConfig, *, shard_index: int = 0, shard_count: int = 1
) -> TrainIterator:
    """Return the endless, checkpointable batches of one host.

    All pieces are shuffled anew in every epoch and packed into rows, first fit. Every host packs
    the same global batches of `config.batch_size` rows and keeps its own rows, so the batches do
    not depend on the number of hosts.

    Args:
      shard_index: of this host, below `shard_count`.
    Raises:
      InputError: the hosts do not divide the rows.
    """
    rows = _rows_of_shard(config.batch_size, shard_index, shard_count)
    pieces = grain.MapDataset.source(Pieces(corpus.train, config.seq_len))
    endless = pieces.seed(config.seed).shuffle().repeat()
    batches = pack(endless, seq_len=config.seq_len, seed=config.seed).batch(config.batch_size)
    specification = corpus.tokenizer.specification.encode()
    identity = {
        # First: another tokenizer makes other tokens, too.
        "data.tokenizer (SHA-256 of its specification)": hashlib.sha256(specification).hexdigest(),
        "data.source (SHA-256 of its tokens)": hashlib.sha256(corpus.train.tokens).hexdigest(),
        "data.seq_len": config.seq_len,
        "data.seed": config.seed,
    }
    return TrainIterator(iter(batches), rows, identity)


def held_out_batches(
    corpus: TokenizedCorpus,
    config: DataConfig,
    *,
    rows: int,
    shard_index: int = 0,
    shard_count: int = 1,
) -> tuple[Batch, ...]:
    """Return one host's part of the held-out batches, always the same, the last one padded.

    Bits per byte are the summed negative log-likelihoods (base 2) of every token that follows
    another in its segment, over `len(corpus.held_out_text)`. Each document's EOS is so charged too.

    Args:
      rows: of a batch, over all hosts.
    Raises:
      InputError: the hosts do not divide the rows.
    """
    part = _rows_of_shard(rows, shard_index, shard_count)
    pieces = grain.MapDataset.source(Pieces(corpus.held_out, config.seq_len))
    packed = list(pack(pieces, seq_len=config.seq_len, seed=config.seed))
    padding = -len(packed) % rows
    stacked = {
        name: np.pad([row[name] for row in packed], ((0, padding), (0, 0))) for name in packed[0]
    }
    return tuple(
        {name: array[first : first + rows][part] for name, array in stacked.items()}
        for first in range(0, len(packed), rows)
    )


def pack(pieces: grain.MapDataset, *, seq_len: int, seed: int) -> grain.IterDataset:
    """Pack pieces into rows of `seq_len` tokens, first fit.

    Grain's other packer, concatenate and split, loses tokens on a resume.
    """
    # Pieces are slices of one array in memory: threads that read ahead would only cost time.
    stream = pieces.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))
    packed = grain.experimental.FirstFitPackIterDataset(
        stream,
        length_struct={"tokens": seq_len},
        num_packing_bins=_ROWS_PACKED_AT_ONCE,
        seed=seed,
    )
    return packed.map(_name_arrays)


def baseline_bits_per_byte(text: bytes) -> dict[str, float]:
    """Return what `gzip -9` and `xz -9` need for a text, in bits per byte."""
    sizes = {
        "gzip": len(gzip.compress(text, compresslevel=9)),
        "xz": len(lzma.compress(text, preset=9)),
    }
    return {name: 8 * size / len(text) for name, size in sizes.items()}


def _name_arrays(row: Batch) -> Batch:
    return {
        "tokens": row["tokens"],
        "segment_ids": row["tokens_segment_ids"],
        "positions": row["tokens_positions"],
    }


def _rows_of_shard(rows: int, index: int, count: int) -> slice:
    if rows % count:
        raise InputError(
            f"data.batch_size: expected a multiple of the {count} hosts, got {rows} rows; change "
            "one of them"
        )
    return slice(index * rows // count, (index + 1) * rows // count)


def _encode(tokenizer: Tokenizer, texts: list[str], kept: Path) -> Documents:
    """Encode documents, or take them from the file that an earlier call kept.

    The file is a SHA-256 and the int32 tokens. The hash is over the tokenizer, the texts and the
    tokens, so that a stale or damaged file does not pass.
    """
    key = hashlib.sha256(tokenizer.specification.encode())
    for text in texts:
        key.update(hashlib.sha256(text.encode()).digest())
    tokens = _kept_tokens(kept, key.digest())
    if tokens is None:
        documents = Documents.join(tokenizer.encode_documents(texts))
        data = documents.tokens.astype("<i4").tobytes()
        write_atomically(kept, hashlib.sha256(key.digest() + data).digest() + data)
        return documents
    # No text encodes to BOS: it is where documents start.
    starts = np.append(np.flatnonzero(tokens == tokenizer.bos_id), len(tokens))
    return Documents(tokens, starts)


def _kept_tokens(path: Path, key: bytes) -> np.ndarray | None:
    try:
        data = path.read_bytes()
    except OSError:
        return None
    size = hashlib.sha256().digest_size
    if hashlib.sha256(key + data[size:]).digest() != data[:size]:
        return None
    return np.frombuffer(data, "<i4", offset=size)
