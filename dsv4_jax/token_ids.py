"""Refuse token ids that a vocabulary does not have."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dsv4_jax.errors import InputError


def check_token_ids(ids: Sequence[int] | np.ndarray, vocab_size: int) -> None:
    """Refuse ids outside a vocabulary, which an embedding look-up would clamp or wrap in silence.

    Raises:
      InputError: an id is no integer, negative, or `vocab_size` or more.
    """
    ids = np.asarray(ids)
    if ids.size and ids.dtype.kind not in "iu":
        raise InputError(f"token ids: expected integers, got {ids.dtype}; encode the text first")
    outside = np.argwhere((ids < 0) | (ids >= vocab_size))
    if len(outside):
        index = tuple(outside[0].tolist())
        raise InputError(
            f"token ids: expected 0 to {vocab_size - 1} (vocab_size {vocab_size}), got "
            f"{ids[index]} at index {index}; use the tokenizer of this model"
        )
