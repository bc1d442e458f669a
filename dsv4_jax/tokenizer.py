"""Turn text into token ids and back by a byte-level BPE, given or trained here."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from dsv4_jax.errors import InputError
from dsv4_jax.files import write_atomically

BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
TOKENIZER_FILE = "tokenizer.json"  # its name in a run's workdir

_BYTES = tuple(sorted(pre_tokenizers.ByteLevel.alphabet()))  # the 256 bytes as BPE spells them
_BYTE_FF = "ÿ"  # byte 0xff as BPE spells it; it is never part of UTF-8
_PART = 1 << 18  # characters that are encoded at once: longer documents are cut
_PARTS_AT_ONCE = 256  # bounds the memory of the library's results
_TRAINING_CHARACTERS = 8_000_000  # more text makes hardly better merges, but takes longer
# Whatever a lossy tokenizer changes: spaces, line ends, case, composed and compatible characters.
_PROBE = "  Hello\r\n\tworld \u00e9 e\u0301 \ufb01 \u6f22\u5b57 \U0001f600 \x00 1234567  "


class Tokenizer:
    """A lossless byte-level BPE with a begin and an end of document.

    Text is literal: no text encodes to BOS, EOS or any other control token, not even their
    names. So documents and prompts cannot forge them.
    """

    def __init__(self, specification: str, place: str):
        """Build from the content of a `tokenizer.json`; `place` names it in errors.

        Raises:
          InputError: it is no tokenizer, not byte-level, or has no BOS or EOS.
        """
        self.specification = specification
        self._full = _build(specification, place)
        self._literal = _build(_without_control_tokens(specification), place)
        self.bos_id = self._id_of(BOS, place)
        self.eos_id = self._id_of(EOS, place)
        for byte in _BYTES:
            self._id_of(byte, place)
        self.vocab_size = 1 + max(self._full.get_vocab(with_added_tokens=True).values())
        if self.decode(self.encode(_PROBE)) != _PROBE:
            raise InputError(
                f"{place}: expected a byte-level BPE that keeps every byte, but encoding and "
                "decoding changes text; use a byte-level tokenizer"
            )

    def encode(self, text: str) -> np.ndarray:
        """Return the int32 ids of a text, without BOS and EOS."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InputError(
                f"text: expected characters with a UTF-8 form, got {text[error.start]!a} at "
                f"character {error.start}; take it out"
            ) from error
        return np.concatenate([np.zeros(0, np.int32), *self._encode_parts(_parts(text))])

    def encode_documents(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Return the int32 ids of each document as BOS, its text, EOS, on all cores."""
        cut = [_parts(text) for text in texts]
        encoded = self._encode_parts([part for parts in cut for part in parts])
        bos, eos = np.array([self.bos_id], np.int32), np.array([self.eos_id], np.int32)
        return [np.concatenate([bos, *(next(encoded) for _ in parts), eos]) for parts in cut]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Return the text of ids, BOS and EOS left out.

        An id that has no token becomes U+FFFD, as does any piece of a character: a model may have
        more ids than its tokenizer.
        """
        ids = np.asarray(ids, np.int64).tolist()
        unknown = self._full.token_to_id(_BYTE_FF)
        known = [i if i >= 0 and self._full.id_to_token(i) is not None else unknown for i in ids]
        return self._full.decode(known, skip_special_tokens=True)

    def _encode_parts(self, parts: Sequence[str]) -> Iterator[np.ndarray]:
        for first in range(0, len(parts), _PARTS_AT_ONCE):
            batch = parts[first : first + _PARTS_AT_ONCE]
            for encoding in self._literal.encode_batch_fast(batch, add_special_tokens=False):
                yield np.array(encoding.ids, np.int32)

    def _id_of(self, token: str, place: str) -> int:
        found = self._full.token_to_id(token)
        if found is None:
            raise InputError(
                f"{place}: expected a byte-level BPE with {BOS} and {EOS}, but it has no token "
                f"{token!r}; use a DeepSeek tokenizer or let the run train its own"
            )
        return found


def tokenizer_of_run(
    texts: Sequence[str], *, path: str | None, workdir: str | Path, vocab_size: int
) -> Tokenizer:
    """Return the tokenizer of a run: the named one, the workdir's, or a new one kept there.

    Args:
      texts: what a new tokenizer is trained on.
      path: a `tokenizer.json` to use instead of the workdir's.
      vocab_size: of the model.
    """
    kept = Path(workdir, TOKENIZER_FILE)
    if path is None and not kept.exists():
        tokenizer = train_tokenizer(texts, vocab_size=vocab_size)
        write_atomically(kept, tokenizer.specification.encode())
    return load_tokenizer(kept if path is None else path, vocab_size=vocab_size)


def load_tokenizer(path: str | Path, *, vocab_size: int) -> Tokenizer:
    """Read a `tokenizer.json` whose ids fit a model's vocabulary.

    Raises:
      InputError: the file cannot be read or used, or has more ids than the model.
    """
    try:
        specification = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"data.tokenizer: cannot read {path}: {error}; check the path") from error
    tokenizer = Tokenizer(specification, str(path))
    if tokenizer.vocab_size > vocab_size:
        raise InputError(
            f"{path}: expected at most {vocab_size} token ids (the model's vocab_size), got "
            f"{tokenizer.vocab_size}; use another tokenizer or a larger model.vocab_size"
        )
    return tokenizer


def train_tokenizer(texts: Sequence[str], *, vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE: BOS is 0, EOS is 1, then the 256 bytes, then merges.

    Every n-th part of the texts is used, so that about 8 million characters at most are read.
    """
    smallest = 2 + len(_BYTES)
    if vocab_size < smallest:
        raise InputError(
            f"model.vocab_size: expected at least {smallest} (256 bytes, BOS and EOS) to train a "
            f"tokenizer, got {vocab_size}; raise it or name a data.tokenizer"
        )
    parts = [part for text in texts for part in _parts(text)]
    every = -(-sum(map(len, parts)) // _TRAINING_CHARACTERS)
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS, EOS],
        initial_alphabet=list(_BYTES),
        show_progress=False,
    )
    tokenizer.train_from_iterator(parts[:: max(1, every)], trainer)
    return Tokenizer(tokenizer.to_str(), "the trained tokenizer")


def _parts(text: str) -> list[str]:
    return [text[first : first + _PART] for first in range(0, len(text), _PART)]


def _build(specification: str, place: str) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer.from_str(specification)
    except Exception as error:  # the library raises no narrower class
        reason = " ".join(str(error).split())
        raise InputError(
            f"{place}: expected a tokenizer.json, got a file that does not load ({reason}); "
            "name a good file, or delete it if it is the workdir's own"
        ) from error


def _without_control_tokens(specification: str) -> str:
    """Drop what a `tokenizer.json` does to text beside the BPE itself."""
    fields = json.loads(specification)
    fields.update(added_tokens=[], post_processor=None, truncation=None, padding=None)
    return json.dumps(fields)
