"""Pack a tokenized corpus into batches: resumable ones to train on, stage by stage, and held-out.

Every batch is a dict of int32 arrays `[rows, seq_len]`: `tokens`, `segment_ids` (0 is padding,
then 1, 2, ... for the pieces of a row), `positions` (from 0 in every piece) and, of chats alone,
`loss_mask` (1 where a token is learned, 0 where it is only read).

A document is BOS, its text, EOS. It is cut into pieces of `seq_len` tokens, each of which starts
with the last token of the piece before, so that every token but BOS is predicted exactly once: the
first token of a piece is context only. A piece is a document of its own for the model, as nothing
before it is in the row. An example of a chat is a document, too, but is trained on whole or not at
all: an answer without its prompt teaches nothing of use.
"""

from __future__ import annotations

import functools
import hashlib
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import grain
import numpy as np

from dsv4_jax.errors import InputError
from dsv4_jax.run_config import DataConfig, StageConfig, stage_name
from dsv4_jax.tokenized import LOSS_MASK, TOKENS, Documents, TokenizedCorpus

Batch = dict[str, np.ndarray]

# Rows that are filled side by side, first fit. 64 waste 1 to 3 % of the standard library at 256 to
# 4,096 tokens; a resume packs at most so many rows again.
_ROWS_PACKED_AT_ONCE = 64


_ALL = slice(None)


class Pieces:
    """Documents cut to 2 to `seq_len` tokens, as a random-access source of grain."""

    def __init__(self, documents: Documents, seq_len: int, chosen: np.ndarray | slice = _ALL):
        """Cut the documents of these numbers."""
        begins, ends = documents.starts[:-1][chosen], documents.starts[1:][chosen]
        counts = -(-(ends - begins - 1) // (seq_len - 1))
        document = np.repeat(np.arange(len(begins)), counts)
        place = np.arange(len(document)) - np.repeat(np.cumsum(counts) - counts, counts)
        self._arrays = documents.arrays
        self._starts = begins[document] + place * (seq_len - 1)
        self._stops = np.minimum(self._starts + seq_len, ends[document])

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: int) -> Batch:
        part = slice(self._starts[index], self._stops[index])
        return {name: array[part] for name, array in self._arrays.items()}


def fitting(documents: Documents, seq_len: int) -> np.ndarray:
    """Say of each document whether it is trained on in rows of `seq_len` tokens.

    Of text all are, as they may be cut; of chats those that fit into a row.
    """
    if documents.loss_mask is None:
        return np.ones(len(documents), bool)
    return np.diff(documents.starts) <= seq_len


class DocumentOrder:
    """The endless order in which a run takes its documents: all of them in every epoch, shuffled.

    A place in the order is the number of documents before it.
    """

    def __init__(self, documents: Documents, seed: int):
        self._count, self._seed = len(documents), seed
        self._lasting = functools.lru_cache(maxsize=2)(self._shuffled)

    def __len__(self) -> int:
        """Return the documents of one epoch."""
        return self._count

    def epoch(self, number: int) -> np.ndarray:
        """Return the numbers of the documents in the order of one epoch."""
        return self._lasting(number)

    def after(self, place: int, tokens: int, lengths: np.ndarray) -> int:
        """Return the first place by which at least so many tokens were read from another one.

        Args:
          lengths: tokens that are read of each document.
        """
        count = len(self)
        number, offset = divmod(place, count)
        read = np.cumsum(lengths[self.epoch(number)])
        tokens += int(read[offset - 1]) if offset else 0
        full, rest = divmod(tokens, int(read[-1]))
        if full:
            read = np.cumsum(lengths[self.epoch(number + full)])
        return (number + full) * count + int(np.searchsorted(read, rest, side="left") + (rest > 0))

    def _shuffled(self, number: int) -> np.ndarray:
        return np.random.default_rng((self._seed, number)).permutation(len(self))


class StageText:
    """The pieces of a range of the documents' order, as a random-access source of grain.

    They are shuffled within each epoch: the parts of a long document do not follow each other.

    Args:
      first, stop: places in the order; None: it has no end.
      seed: of the shuffle.
    """

    def __init__(
        self, documents: Documents, order: DocumentOrder, first: int, stop: int | None, *,
        seq_len: int, seed: int,
    ):
        self._documents, self._order, self._seq_len, self._seed = documents, order, seq_len, seed
        self._first, self._stop = first, stop
        self._fits = fitting(documents, seq_len)
        self._lasting = functools.lru_cache(maxsize=2)(self._part)
        self._epoch = first // len(order)
        self._before = len(self._lasting(self._epoch)[0])
        self._in_epoch = len(Pieces(documents, seq_len, self._fits))

    def __len__(self) -> int:
        if self._stop is None:
            return sys.maxsize
        last = (self._stop - 1) // len(self._order)
        if last == self._epoch:
            return self._before
        return self._before + (last - self._epoch - 1) * self._in_epoch + len(self._pieces_of(last))

    def __getitem__(self, index: int) -> Batch:
        if index < self._before:
            epoch, place = self._epoch, index
        else:
            later, place = divmod(index - self._before, self._in_epoch)
            epoch = self._epoch + 1 + later
        pieces, shuffled = self._lasting(epoch)
        return pieces[shuffled[place]]

    def _part(self, epoch: int) -> tuple[Pieces, np.ndarray]:
        pieces = self._pieces_of(epoch)
        return pieces, np.random.default_rng((self._seed, epoch, 1)).permutation(len(pieces))

    def _pieces_of(self, epoch: int) -> Pieces:
        """Return the pieces of the range that lie in an epoch."""
        begin = epoch * len(self._order)
        stop = None if self._stop is None else max(self._stop - begin, 0)
        chosen = self._order.epoch(epoch)[max(self._first - begin, 0) : stop]
        return Pieces(self._documents, self._seq_len, chosen[self._fits[chosen]])


class TrainIterator:
    """The batches of one host, stage after stage; the last stage has no end.

    The state is the same on all hosts and for any number of them. It names the data, so that it is
    refused where the same place would be other text.
    """

    def __init__(
        self, stages: Sequence[StageConfig], open_stage: Callable[[int], _StageBatches],
        identity: dict[str, Any],
    ):
        self._stages, self._open_stage, self._identity = stages, open_stage, identity
        self._enter(0)

    def __iter__(self) -> TrainIterator:
        return self

    def __next__(self) -> Batch:
        """Return the next batch, of this host's rows."""
        last = self._stage == len(self._stages) - 1
        if self._taken == self._stages[self._stage].steps and not last:
            self._enter(self._stage + 1)
        self._taken += 1
        batch = next(self._batches)
        return {name: array[self._current.rows] for name, array in batch.items()}

    def get_state(self) -> dict[str, Any]:
        """Return the place as JSON types."""
        before = sum(stage.steps for stage in self._stages[: self._stage])
        return {
            "identity": self._identity | self._current.identity,
            "stage": self._stage, "taken": self._taken, "step": before + self._taken,
            "batches": self._batches.get_state(),
        }

    def set_state(self, state: dict[str, Any]) -> None:
        """Go to a saved place.

        Raises:
          InputError: the state was saved with other text, tokenizer, seed or stages.
        """
        stage, taken = state["stage"], state["taken"]
        before = sum(stage.steps for stage in self._stages[:stage])
        if stage >= len(self._stages) or before + taken != state["step"]:
            raise InputError(
                f"stages: expected {state['step'] - taken} steps before {stage_name(stage)}, as in "
                f"the checkpoint, got {before} in {len(self._stages)} stages; change only stages "
                "that have not begun, or start in a new workdir"
            )
        finished = stage + 1 < len(self._stages) and taken >= self._stages[stage].steps
        self._enter(stage + finished)
        now = self._identity | ({} if finished else self._current.identity)
        for name, saved in state["identity"].items():
            if name.startswith("stages.") and finished:
                continue
            if now.get(name) != saved:
                raise InputError(
                    f"{name}: expected {saved}, as in the checkpoint, got {now.get(name)}; resume "
                    "with the same data or start in a new workdir"
                )
        if not finished:
            self._taken = taken
            self._batches.set_state(state["batches"])

    def _enter(self, stage: int) -> None:
        self._stage, self._taken = stage, 0
        self._current = self._open_stage(stage)
        self._batches = iter(self._current.batches)


class _StageBatches(NamedTuple):
    """The batches of a stage over all hosts, and this host's rows of each."""

    batches: grain.IterDataset
    rows: slice
    identity: dict[str, Any]  # what must not change in the middle of the stage


def make_train_iterator(
    corpus: TokenizedCorpus, config: DataConfig, stages: Sequence[StageConfig], *,
    shard_index: int = 0, shard_count: int = 1,
) -> TrainIterator:
    """Return the checkpointable batches of one host.

    All stages share one order of the documents; each goes on where the one before has ended. A
    stage's documents are cut into pieces, which are shuffled within an epoch and packed into rows,
    first fit. It has as many tokens as its batches could hold: what packing leaves over of that, 1
    to 3 %, is not seen. Every host packs the same global batches and keeps its own rows, so the
    batches do not depend on the number of hosts.

    Args:
      shard_index: of this host, below `shard_count`.
    Raises:
      InputError: the hosts do not divide the rows of a stage, or no chat fits into one of them.
    """
    order, sizes = DocumentOrder(corpus.train, config.seed), np.diff(corpus.train.starts)
    fits = [fitting(corpus.train, stage.seq_len) for stage in stages]
    for index, stage in enumerate(stages):
        if not fits[index].any():
            raise InputError(
                f"stages.{stage_name(index)}.seq_len: expected at least {sizes.min()}, the tokens "
                f"of the shortest chat, got {stage.seq_len}; raise it"
            )
    firsts = [0]
    for stage, fit in zip(stages[:-1], fits[:-1], strict=True):
        firsts.append(order.after(firsts[-1], stage.steps * stage.batch_tokens, sizes * fit))
    shards = [_rows_of_shard(stage.rows, shard_index, shard_count) for stage in stages]

    def open_stage(index: int) -> _StageBatches:
        stage, first, stop = stages[index], firsts[index], [*firsts, None][index + 1]
        text = StageText(
            corpus.train, order, first, stop, seq_len=stage.seq_len, seed=config.seed
        )
        packed = pack(grain.MapDataset.source(text), seq_len=stage.seq_len, seed=config.seed,
                      names=corpus.train.arrays)
        name = f"stages.{stage_name(index)}"
        identity = {
            f"{name}.seq_len": stage.seq_len,
            f"{name}.batch_tokens": stage.batch_tokens,
            f"{name} (its documents)": [first, stop],
        }
        return _StageBatches(packed.batch(stage.rows), shards[index], identity)

    specification = corpus.tokenizer.specification.encode()
    identity = {
        # First: another tokenizer makes other tokens, too.
        "data.tokenizer (SHA-256 of its specification)": hashlib.sha256(specification).hexdigest(),
        "data.source (SHA-256 of its tokens)": _hash(corpus.train),
        "data.seed": config.seed,
    }
    return TrainIterator(stages, open_stage, identity)


def held_out_batches(
    corpus: TokenizedCorpus,
    config: DataConfig,
    *,
    seq_len: int,
    rows: int,
    shard_index: int = 0,
    shard_count: int = 1,
) -> tuple[Batch, ...]:
    """Return one host's part of the held-out batches, always the same, the last one padded.

    Bits per byte are the summed negative log-likelihoods (base 2) of every token that follows
    another in its segment (of those of the loss mask, where there is one) over
    `len(corpus.held_out_text)`. Each document's EOS is so charged too.

    Args:
      seq_len: tokens per row.
      rows: of a batch, over all hosts.
    Raises:
      InputError: the hosts do not divide the rows.
    """
    part = _rows_of_shard(rows, shard_index, shard_count)
    pieces = grain.MapDataset.source(Pieces(corpus.held_out, seq_len))
    packed = list(pack(pieces, seq_len=seq_len, seed=config.seed, names=corpus.held_out.arrays))
    padding = -len(packed) % rows
    stacked = {
        name: np.pad([row[name] for row in packed], ((0, padding), (0, 0))) for name in packed[0]
    }
    return tuple(
        {name: array[first : first + rows][part] for name, array in stacked.items()}
        for first in range(0, len(packed), rows)
    )


def pack(
    pieces: grain.MapDataset, *, seq_len: int, seed: int, names: Iterable[str] = (TOKENS,)
) -> grain.IterDataset:
    """Pack pieces, which have arrays of these names, into rows of `seq_len` tokens, first fit.

    Grain's other packer, concatenate and split, loses tokens on a resume.
    """
    # Pieces are slices of one array in memory: threads that read ahead would only cost time.
    stream = pieces.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))
    packed = grain.experimental.FirstFitPackIterDataset(
        stream,
        length_struct=dict.fromkeys(names, seq_len),
        num_packing_bins=_ROWS_PACKED_AT_ONCE,
        seed=seed,
    )
    return packed.map(_name_arrays)


def _name_arrays(row: Batch) -> Batch:
    named = {
        "tokens": row["tokens"],
        "segment_ids": row["tokens_segment_ids"],
        "positions": row["tokens_positions"],
    }
    return named | ({LOSS_MASK: row[LOSS_MASK]} if LOSS_MASK in row else {})


def _hash(documents: Documents) -> str:
    found = hashlib.sha256()
    for array in documents.arrays.values():
        found.update(array)
    return found.hexdigest()


def _rows_of_shard(rows: int, index: int, count: int) -> slice:
    if rows % count:
        raise InputError(
            f"stages: expected a multiple of the {count} hosts, got batches of {rows} rows; change "
            "one of them"
        )
    return slice(index * rows // count, (index + 1) * rows // count)


