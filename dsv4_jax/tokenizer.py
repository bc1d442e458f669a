"""Turn text into token ids and back by a byte-level BPE, given or trained here."""

from __future__ import annotations

import codecs
import itertools
import json
import operator
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from dsv4_jax.encoding_texts import BOS, CHAT_TOKENS, EOS
from dsv4_jax.errors import InputError
from dsv4_jax.files import write_atomically

TOKENIZER_FILE = "tokenizer.json"  # its name in a run's workdir

# BPE spells printable bytes as themselves and the others, in their order, from character 256 on.
_PRINTABLE = {*range(33, 127), *range(161, 173), *range(174, 256)}
_BYTE_OF_CHARACTER = {chr(byte): byte for byte in _PRINTABLE} | {
    chr(256 + index): byte for index, byte in enumerate(sorted({*range(256)} - _PRINTABLE))
}
_BYTES = tuple(sorted(_BYTE_OF_CHARACTER))
_NO_BYTE = b"\xff"  # never part of UTF-8
_PART = 1 << 18  # characters that are encoded at once: longer documents are cut
_CUT_WITHIN = 1024  # characters before the end of a part in which it may be cut
# Byte-level BPE joins no letter with a space or punctuation behind it.
_CUT = re.compile(r"[^\W\d_](?=[ \n.,;:!?。，、；：！？])")
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
        added = self._full.get_added_tokens_decoder()
        self._silent = frozenset(token_id for token_id, token in added.items() if token.special)
        self.bos_id = self._id_of(BOS, place)
        self.eos_id = self._id_of(EOS, place)
        for byte in _BYTES:
            self._id_of(byte, place)
        self.vocab_size = 1 + max(self._full.get_vocab(with_added_tokens=True).values())
        if self.vocab_size > 2**31:
            raise InputError(
                f"{place}: expected ids below 2^31, got {self.vocab_size - 1}; mend the file"
            )
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

    def encode_segments(self, segments: Iterable[tuple[str, bool]]) -> np.ndarray:
        """Return the int32 ids of a prompt in segments, as `encoding.render_messages` gives them.

        The ids are those that the tokenizer has for the whole text, unless literal text holds the
        name of a control token: that stays text.

        Args:
          segments: texts, each with whether it is a control token of the prompt's format.
        Raises:
          InputError: the tokenizer has no such control token, or a text has no UTF-8 form.
        """
        pieces = [np.zeros(0, np.int32)]
        for is_control, group in itertools.groupby(segments, operator.itemgetter(1)):
            texts = [text for text, _ in group]
            if is_control:
                pieces.append(np.array([self._control_id(text) for text in texts], np.int32))
            else:
                pieces.append(self.encode("".join(texts)))
        return np.concatenate(pieces)

    def encode_documents(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Return the int32 ids of each document as BOS, its text, EOS, on all cores."""
        cut = [_parts(text) for text in texts]
        encoded = self._encode_parts([part for parts in cut for part in parts])
        bos, eos = np.array([self.bos_id], np.int32), np.array([self.eos_id], np.int32)
        return [np.concatenate([bos, *(next(encoded) for _ in parts), eos]) for parts in cut]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Return the text of ids, BOS, EOS and other special tokens left out.

        An id that has no token becomes U+FFFD, as does any piece of a character: a model may have
        more ids than its tokenizer.
        """
        return b"".join(map(self.bytes_of, np.asarray(ids, np.int64).tolist())).decode(
            errors="replace"
        )

    def bytes_of(self, token_id: int) -> bytes:
        """Return the bytes that an id adds to the text that `decode` gives."""
        if token_id in self._silent:
            return b""
        known = 0 <= token_id < self.vocab_size
        token = self._full.id_to_token(token_id) if known else None
        if token is None:
            return _NO_BYTE
        try:
            return bytes(_BYTE_OF_CHARACTER[character] for character in token)
        except KeyError:  # a control token is spelled as text
            return token.encode()

    def _control_id(self, token: str) -> int:
        found = self._full.token_to_id(token)
        if found is None:
            raise InputError(
                f"the tokenizer: expected DeepSeek-V4's control token {token!r}, but it has none, "
                "so it is not V4's; use the tokenizer.json of a V4 model, or one that a run has "
                "trained"
            )
        return found

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


class TextStream:
    """Turn ids that come one after the other into text, as soon as its characters are complete.

    All texts together are what `Tokenizer.decode` gives for all ids together. (The library's
    `DecodeStream` takes quadratic time over ids that make no character.)
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def put(self, ids: Iterable[int]) -> str:
        """Return the text that these ids complete, which may be none."""
        return self._decoder.decode(b"".join(self._tokenizer.bytes_of(int(i)) for i in ids))

    def end(self) -> str:
        """Return what is left: U+FFFD if the last character is not complete."""
        return self._decoder.decode(b"", final=True)


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
    except (OSError, ValueError) as error:  # ValueError: no UTF-8, or a path with a zero byte
        raise InputError(f"data.tokenizer: cannot read {path}: {error}; check the path") from error
    tokenizer = Tokenizer(specification, str(path))
    if tokenizer.vocab_size > vocab_size:
        raise InputError(
            f"{path}: expected at most {vocab_size} token ids (the model's vocab_size), got "
            f"{tokenizer.vocab_size}; use another tokenizer or a larger model.vocab_size"
        )
    return tokenizer


def train_tokenizer(texts: Sequence[str], *, vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE: BOS is 0, EOS is 1, then the 256 bytes, merges and the chat's tokens.

    Every n-th part of the texts is used, so that about 8 million characters at most are read.
    """
    smallest = 2 + len(_BYTES) + len(CHAT_TOKENS)
    if vocab_size < smallest:
        raise InputError(
            f"model.vocab_size: expected at least {smallest} (256 bytes, BOS, EOS and the "
            f"{len(CHAT_TOKENS)} tokens of the chat format) to train a tokenizer, got "
            f"{vocab_size}; raise it or name a data.tokenizer"
        )
    parts = [part for text in texts for part in _parts(text)]
    every = -(-sum(map(len, parts)) // _TRAINING_CHARACTERS)
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(CHAT_TOKENS),
        special_tokens=[BOS, EOS],
        initial_alphabet=list(_BYTES),
        show_progress=False,
    )
    tokenizer.train_from_iterator(parts[:: max(1, every)], trainer)
    tokenizer.add_tokens(list(CHAT_TOKENS))  # as V4's own has them: no special ones
    return Tokenizer(tokenizer.to_str(), "the trained tokenizer")


def _parts(text: str) -> list[str]:
    """Cut a text so that, if there are words and sentences, the ids are those of the whole."""
    parts, first = [], 0
    while first < len(text):
        end = first + _PART
        if end < len(text):
            start = max(first, end - _CUT_WITHIN)
            cuts = [start + match.end() for match in _CUT.finditer(text[start : end + 1])]
            end = cuts[-1] if cuts else end
        parts.append(text[first:end])
        first = end
    return parts


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
