"""The number formats of quantised weights: FP8 in blocks of 128 x 128, FP4 in groups of 32.

A weight [rows, columns] is stored as codes and one scale per block, a multiplier: value = code *
scale. FP8 codes are E4M3, one byte each. FP4 codes are E2M1, two in a byte, the even column in the
low half. Scales are powers of two (E8M0, 2^(byte - 127)) or, for FP8, float32.

All here is NumPy on the host. Every decoded value is the exact product, rounded once to the dtype
asked for (float32 scales: once to float32 before).

Source: fact sheet 10.3; OCP Microscaling Formats 1.0.
"""

from __future__ import annotations

import dataclasses
import functools

import ml_dtypes
import numpy as np

from dsv4_jax.errors import InputError

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
E8M0 = np.dtype(ml_dtypes.float8_e8m0fnu)
E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)
E2M1 = np.dtype(ml_dtypes.float4_e2m1fn)
FLOAT32 = np.dtype(np.float32)

E8M0_BIAS, E8M0_LARGEST, E8M0_NAN = 127, 254, 255
CHUNK_BYTES = 128 * 1024  # of codes decoded at once: what they become stays in cache


@dataclasses.dataclass(frozen=True)
class Format:
    """How the codes and scales of a quantised matrix lie."""

    name: str
    codes: np.dtype  # of the values that a code stands for
    largest: float  # magnitude of a code
    block: tuple[int, int]  # rows and columns that share a scale
    per_byte: int  # codes in a byte

    def codes_shape(self, shape: tuple[int, int]) -> tuple[int, int]:
        """Return the shape of the stored bytes of a matrix [rows, columns]."""
        return shape[0], -(-shape[1] // self.per_byte)

    def scales_shape(self, shape: tuple[int, int]) -> tuple[int, int]:
        """Return the shape of the scales of a matrix [rows, columns]."""
        return -(-shape[0] // self.block[0]), -(-shape[1] // self.block[1])


FP8 = Format("fp8", E4M3, 448.0, (128, 128), 1)
FP4 = Format("fp4", E2M1, 6.0, (1, 32), 2)
FORMATS = {form.name: form for form in (FP8, FP4)}


@dataclasses.dataclass(frozen=True)
class Block:
    """A matrix as it is stored: plain values, or codes with their scales.

    A part of a quantised matrix has the codes of its rows and columns and all scales; `rows` and
    `columns` say which (a packed part has whole bytes), None that it has all.
    """

    values: np.ndarray  # plain values or codes: uint8 for FP4 and FP8
    scales: np.ndarray | None = None  # uint8 (E8M0) or float32
    form: Format | None = None
    rows: np.ndarray | slice | None = None
    columns: np.ndarray | slice | None = None  # of `values`

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self.values.nbytes + (0 if self.scales is None else self.scales.nbytes)


def decode(block: Block, dtype: np.dtype) -> np.ndarray:
    """Return the values of a block in a floating-point dtype.

    Raises:
      InputError: a scale or value is not finite, a float32 scale is not above 0, or a product
        overflows.
    """
    if block.form is None:
        return cast(block.values, dtype)
    check_scales(block.scales)
    per_row = max(1, block.values.shape[1])
    step = max(1, CHUNK_BYTES // per_row)
    form, rows = block.form, block.values.shape[0]
    out = np.empty((rows, block.values.shape[1] * form.per_byte), dtype)
    scale_row = np.arange(block.scales.shape[0] * form.block[0])
    scale_row = scale_row[slice(None) if block.rows is None else block.rows] // form.block[0]
    tabulated = block.scales.dtype == np.uint8 and dtype.itemsize <= 4
    multiply = _look_up if tabulated else _multiply
    for start in range(0, rows, step):
        part = slice(start, min(start + step, rows))
        scales = _spread(block, scale_row[part])
        multiply(block.values[part], scales, form, out[part])
    check_finite(out)
    return out


def _spread(block: Block, scale_rows: np.ndarray) -> np.ndarray:
    """Repeat scales for every stored byte of some rows."""
    form = block.form
    repeats = form.block[1] // form.per_byte
    scales = block.scales[scale_rows]
    if block.columns is None:
        return np.repeat(scales, repeats, axis=1)[:, : block.values.shape[1]]
    columns = np.arange(block.scales.shape[1] * repeats)[block.columns] // repeats
    return scales[:, columns]


def _look_up(codes: np.ndarray, scales: np.ndarray, form: Format, out: np.ndarray) -> None:
    table = _products(form, out.dtype)
    index = np.left_shift(scales, 8, dtype=np.uint16)
    np.take(table, np.bitwise_or(index, codes, out=index), mode="wrap", out=out.view(table.dtype))


def _multiply(codes: np.ndarray, scales: np.ndarray, form: Format, out: np.ndarray) -> None:
    values = _code_values(form)[codes].reshape(*codes.shape[:1], -1)
    wide = np.repeat(scales, form.per_byte, axis=1)
    wide = wide.view(E8M0) if wide.dtype == np.uint8 else wide
    product_dtype = np.promote_types(FLOAT32, out.dtype)
    with np.errstate(over="ignore", invalid="ignore"):
        out[...] = values.astype(product_dtype) * wide.astype(product_dtype)


@functools.cache
def _code_values(form: Format) -> np.ndarray:
    """Return what each byte stands for: float32 [256, codes in a byte]."""
    byte = np.arange(256, dtype=np.uint8)
    if form.per_byte == 1:
        return byte.view(form.codes).astype(np.float32)[:, None]
    return np.stack([byte & 15, byte >> 4], axis=1).view(form.codes).astype(np.float32)


@functools.cache
def _products(form: Format, dtype: np.dtype) -> np.ndarray:
    """Return the products of all 256 E8M0 scales and all 256 bytes, as words that hold a byte's."""
    scales = np.arange(256, dtype=np.uint8).view(E8M0).astype(np.float64)
    with np.errstate(over="ignore", invalid="ignore"):
        products = (scales[:, None, None] * _code_values(form)).astype(dtype)
    words = {2: np.uint16, 4: np.uint32, 8: np.uint64}[dtype.itemsize * form.per_byte]
    return products.reshape(256 * 256, form.per_byte).view(words)[:, 0]


def encode(values: np.ndarray, form: Format) -> Block:
    """Quantise a matrix with E8M0 scales, rounding to nearest, ties to even codes.

    A scale is the smallest power of two under which the block's largest value does not exceed the
    largest code; a block of zeros has scale 1. Values that come from such a block, whatever its
    scale was, are kept exactly.

    Raises:
      InputError: a value is not finite, or FP4 columns are odd.
    """
    values = values.astype(np.float32)
    check_finite(values)
    rows, columns = values.shape
    if columns % form.per_byte:
        raise InputError(f"expected an even number of columns for {form.name}, got {columns}")
    scale_rows, scale_columns = form.scales_shape(values.shape)
    padded = (scale_rows * form.block[0], scale_columns * form.block[1])
    if padded != values.shape:
        values = np.pad(values, ((0, padded[0] - rows), (0, padded[1] - columns)))
    tiles = values.reshape(scale_rows, form.block[0], scale_columns, form.block[1])
    exponent = _scale_exponents(np.max(np.abs(tiles), axis=(1, 3)), form)
    tiles = np.ldexp(tiles, -exponent[:, None, :, None])
    codes = tiles.astype(form.codes).view(np.uint8).reshape(padded)[:rows, :columns]
    return Block(pack(codes, form), (exponent + E8M0_BIAS).astype(np.uint8), form)


def _scale_exponents(largest: np.ndarray, form: Format) -> np.ndarray:
    """Return ceil(log2(largest / largest code)), within what E8M0 holds."""
    mantissa, exponent = np.frexp(largest.astype(np.float64) / form.largest)
    exponent = exponent - (mantissa == 0.5)
    exponent = np.where(largest == 0, 0, exponent)
    return np.clip(exponent, -E8M0_BIAS, E8M0_LARGEST - E8M0_BIAS)


def pack(codes: np.ndarray, form: Format) -> np.ndarray:
    """Put the codes of a row, one per byte, into as few bytes as the format does."""
    if form.per_byte == 1:
        return codes
    return (codes[:, 0::2] & 15) | (codes[:, 1::2] << 4)


def fp4_to_fp8(block: Block) -> Block:
    """Turn FP4 with E8M0 scales into FP8, exactly, as the official converter does.

    Every tile of 128 x 128 gets its largest scale divided by 2^6 (6 * 2^6 is below 448); codes are
    multiplied by what remains of their group's scale.

    Raises:
      InputError: the scales of a tile differ so much that a code cannot be kept.
    """
    check_scales(block.scales)
    shape = block.values.shape[0], block.values.shape[1] * FP4.per_byte
    tile_rows, tile_columns = FP8.scales_shape(shape)
    groups = FP8.block[1] // FP4.block[1]
    rows, columns = block.scales.shape
    scales = np.pad(
        block.scales, ((0, tile_rows * FP8.block[0] - rows), (0, tile_columns * groups - columns))
    )
    tiles = scales.reshape(tile_rows, FP8.block[0], tile_columns, groups)
    new = np.maximum(tiles.max(axis=(1, 3)).astype(np.int32) - 6, 0)
    per_row = np.repeat(new, FP8.block[0], axis=0)[:rows]
    per_group = np.repeat(per_row, groups, axis=1)[:, :columns]
    shift = np.repeat(block.scales.astype(np.int32) - per_group, FP4.block[1], axis=1)
    values = _code_values(FP4)[block.values].reshape(shape)
    values = np.ldexp(values, shift[:, : shape[1]])
    codes = values.astype(E4M3)  # NaN where the value is too large
    if not np.array_equal(codes.astype(np.float32), values):
        raise InputError(
            "expected FP4 scales near enough to each other for FP8 to hold every value, got scales "
            f"2^{int(block.scales.min()) - E8M0_BIAS} to 2^{int(block.scales.max()) - E8M0_BIAS}; "
            "convert to bfloat16 instead"
        )
    return Block(codes.view(np.uint8), new.astype(np.uint8), FP8)


def cast(values: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Change the dtype of plain values.

    Raises:
      InputError: a value is not finite, or does not fit.
    """
    with np.errstate(over="ignore"):
        values = values.astype(dtype, copy=False)
    check_finite(values)
    return values


def check_scales(scales: np.ndarray) -> None:
    """Raise an InputError unless all scales are finite and above 0."""
    if scales.dtype == np.uint8:
        if scales.size and scales.max() == E8M0_NAN:
            raise InputError(f"expected finite scales, got E8M0 byte {E8M0_NAN}, which is NaN")
    elif not np.all((scales > 0) & (scales < np.inf)):
        bad = scales[~((scales > 0) & (scales < np.inf))][0]
        raise InputError(f"expected finite scales above 0, got {bad}")


_EXPONENT_BITS = {
    np.dtype(np.float16): (np.uint16, 0x7C00), BFLOAT16: (np.uint16, 0x7F80),
    FLOAT32: (np.uint32, 0x7F80_0000),
}  # fmt: skip


def check_finite(values: np.ndarray) -> None:
    """Raise an InputError if a floating-point value is NaN or infinite."""
    if values.dtype in _EXPONENT_BITS:  # bits: ml_dtypes' own isfinite is slow
        word, mask = _EXPONENT_BITS[values.dtype]
        bad = np.any((values.view(word) & word(mask)) == mask)
    else:
        bad = values.dtype.kind in "fV" and not np.all(np.isfinite(values.astype(np.float64)))
    if bad:
        raise InputError("expected finite values, got NaN or infinity")


def check_block(block: Block) -> None:
    """Raise what `decode` would raise, where possible without decoding."""
    if block.form is None:
        check_finite(block.values)
        return
    check_scales(block.scales)
    if block.form is FP8 and np.any((block.values & 0x7F) == 0x7F):
        raise InputError("expected finite values, got an E4M3 code that is NaN")
    safe = E8M0_LARGEST - 9  # 448 * 2^(safe - bias) and below are float32
    if block.scales.dtype != np.uint8 or (block.scales.size and block.scales.max() > safe):
        decode(block, FLOAT32)
