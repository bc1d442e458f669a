"""How tensors are stored: dtypes of safetensors, and what a conversion makes of them."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from dsv4_jax.arrays import BFLOAT16, FLOAT32
from dsv4_jax.convert.table import EXPERT, FLOAT, INTEGER, LINEAR, Tensor
from dsv4_jax.errors import InputError, shown
from dsv4_jax.quant import FP4, FP8, Block, Format, decode, encode, fp4_to_fp8

INT32, INT64, BYTES = np.dtype(np.int32), np.dtype(np.int64), np.dtype(np.uint8)
PLAIN_DTYPES = {"bfloat16": BFLOAT16, "float16": np.dtype(np.float16), "float32": FLOAT32}
DTYPES = (*PLAIN_DTYPES, "fp8", "fp4")  # that weights can be converted to

# dtypes of safetensors that V4 checkpoints use -> of the bytes as viewed here
VIEWED = {
    "F32": FLOAT32, "F16": PLAIN_DTYPES["float16"], "BF16": BFLOAT16, "F8_E4M3": BYTES,
    "F8_E8M0": BYTES, "I8": BYTES, "U8": BYTES, "I32": INT32, "I64": INT64,
}  # fmt: skip
_WRITTEN = {FLOAT32: "F32", PLAIN_DTYPES["float16"]: "F16", BFLOAT16: "BF16", INT32: "I32",
            INT64: "I64"}  # fmt: skip
CODES = {FP4: ("I8", "U8"), FP8: ("F8_E4M3",)}  # dtypes of safetensors; the first is written
FORMS = {LINEAR: (FP8,), EXPERT: (FP4, FP8)}  # that matrices may be quantised in, by kind


class Storage(NamedTuple):
    """How a tensor is stored."""

    dtype: np.dtype  # of its values or codes
    form: Format | None = None
    scales: np.dtype | None = None  # uint8 (E8M0) or float32


def form_of(dtype: str) -> Format | None:
    """Return the format that a safetensors dtype of codes stands for."""
    return next((form for form, codes in CODES.items() if dtype in codes), None)


def written_dtypes(storage: Storage) -> tuple[str, ...]:
    """Return the safetensors dtypes of a tensor and, where it is quantised, of its scales."""
    if storage.form is None:
        return (_WRITTEN[storage.dtype],)
    return CODES[storage.form][0], "F8_E8M0" if storage.scales == BYTES else "F32"


def stored_shapes(shape: tuple[int, ...], form: Format | None) -> tuple[tuple[int, ...], ...]:
    """Return the shapes of a tensor and, where it is quantised, of its scales, as stored."""
    return (shape,) if form is None else (form.codes_shape(shape), form.scales_shape(shape))


def stored_bytes(shape: tuple[int, ...], storage: Storage) -> list[tuple[str, int]]:
    """Return dtype and bytes of what is stored for a tensor of this shape."""
    dtypes = written_dtypes(storage)
    shapes = stored_shapes(shape, storage.form)
    return [
        (dtype, math.prod(stored) * VIEWED[dtype].itemsize)
        for dtype, stored in zip(dtypes, shapes, strict=True)
    ]


def dtype_name(dtype, admitted: Iterable[str] = DTYPES) -> str | None:
    """Return the name of a dtype that weights are to have, given by name or as a dtype.

    Raises:
      InputError: it is not one of the admitted ones, or None.
    """
    name = dtype
    if dtype is not None and not isinstance(dtype, str):
        with contextlib.suppress(TypeError):
            name = np.dtype(dtype).name
    names = ", ".join(admitted)
    if name is not None and name not in names.split(", "):
        raise InputError(f"dtype: expected one of {names} or None, got {shown(dtype)}")
    return name


def released_storage(tensor: Tensor, *, base: bool = False) -> Storage:
    """Return how the released checkpoints store a tensor.

    Args:
      base: of a base model: experts in FP8, scales in float32.
    Source: fact sheet 1.4, 10.1.
    """
    storage = target_storage(tensor, Storage(INT64), "fp8" if base else "fp4")
    return storage._replace(scales=FLOAT32) if base and storage.form else storage


def target_storage(tensor: Tensor, stored: Storage, dtype: str | None) -> Storage:
    """Return how a tensor is to be written.

    Args:
      dtype: None keeps what is stored; see `save_pretrained`.
    """
    if tensor.kind == INTEGER:
        return Storage(INT64)
    if dtype is None:
        return stored
    if dtype in PLAIN_DTYPES:
        return Storage(FLOAT32 if tensor.kind == FLOAT else PLAIN_DTYPES[dtype])
    if tensor.kind not in (EXPERT, LINEAR):
        return Storage(FLOAT32 if tensor.kind == FLOAT else BFLOAT16)
    form = FP4 if dtype == "fp4" and tensor.kind == EXPERT else FP8
    return stored if stored.form is form else Storage(BYTES, form, BYTES)


def restore(block: Block, target: Storage) -> Block:
    """Change how a tensor is stored; what is stored in that way already keeps its bytes.

    Raises:
      InputError: its values do not fit.
    """
    if block.form is target.form and (block.form or block.values.dtype == target.dtype):
        return block
    if target.form is None:
        if target.dtype == INT64:
            return Block(block.values.astype(INT64))
        return Block(decode(block, target.dtype))
    if block.form is FP4 and target.form is FP8:
        return fp4_to_fp8(block)
    return encode(decode(block, FLOAT32), target.form)
