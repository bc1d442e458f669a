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
from collections.abc import Iterator

import ml_dtypes
import numpy as np

from dsv4_jax.arrays import CHUNK_BYTES, FLOAT32, cast, check_finite, chunks, largest
from dsv4_jax.errors import InputError

E8M0 = np.dtype(ml_dtypes.float8_e8m0fnu)
E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)
E2M1 = np.dtype(ml_dtypes.float4_e2m1fn)

E8M0_BIAS, E8M0_LARGEST, E8M0_NAN = 127, 254, 255


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
    check_finite(values)
    rows, columns = values.shape
    if columns % form.per_byte:
        raise InputError(f"expected an even number of columns for {form.name}, got {columns}")
    codes = np.empty(form.codes_shape(values.shape), np.uint8)
    scales = np.empty(form.scales_shape(values.shape), np.uint8)
    per_scale = form.block[0]
    step = per_scale * max(1, CHUNK_BYTES // (columns * per_scale))
    for start in range(0, rows, step):
        part = slice(start, min(start + step, rows))
        scale_part = slice(start // per_scale, -(-part.stop // per_scale))
        codes[part], scales[scale_part] = _encode(values[part].astype(np.float32), form)
    return Block(codes, scales, form)


def _encode(values: np.ndarray, form: Format) -> tuple[np.ndarray, np.ndarray]:
    """Return the stored codes and scales of some rows."""
    rows, columns = values.shape
    scale_rows, scale_columns = form.scales_shape(values.shape)
    padded = (scale_rows * form.block[0], scale_columns * form.block[1])
    if padded != values.shape:
        values = np.pad(values, ((0, padded[0] - rows), (0, padded[1] - columns)))
    tiles = values.reshape(scale_rows, form.block[0], scale_columns, form.block[1])
    exponent = _scale_exponents(np.max(np.abs(tiles), axis=(1, 3)), form)
    tiles = tiles * np.ldexp(np.float32(1), -exponent)[:, None, :, None]
    # The upper half of a float32, its last bit set if the lower half is not 0, rounds to a format
    # of at least two bits fewer as the whole does: all the rest is a table.
    bits = tiles.view(np.uint32)
    upper = (bits >> 16).astype(np.uint16) | ((bits & 0xFFFF) != 0)
    codes = _rounded(form)[upper].reshape(padded)[:rows, :columns]
    return pack(codes, form), (exponent + E8M0_BIAS).astype(np.uint8)


@functools.cache
def _rounded(form: Format) -> np.ndarray:
    """Return the nearest code of every float32 whose lower half is 0; NaN's are not used."""
    values = (np.arange(1 << 16, dtype=np.uint32) << 16).view(np.float32)
    with np.errstate(all="ignore"):
        return values.astype(form.codes).view(np.uint8)


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
    codes = np.empty(shape, np.uint8)
    new = np.empty(FP8.scales_shape(shape), np.uint8)
    table, exact = _shifted_codes()
    for row, start in enumerate(range(0, shape[0], FP8.block[0])):
        part = slice(start, start + FP8.block[0])
        scales = block.scales[part]
        new[row] = _tile_scales(scales)
        per_group = np.repeat(new[row], FP8.block[1] // FP4.block[1])[: scales.shape[1]]
        shift = np.maximum(scales.astype(np.int16) - per_group, SMALLEST_SHIFT) - SMALLEST_SHIFT
        repeats = FP4.block[1] // FP4.per_byte
        index = np.repeat(shift.astype(np.uint16) << 8, repeats, axis=1)[:, : block.values.shape[1]]
        index |= block.values[part]
        np.take(table, index, out=codes[part].view(np.uint16), mode="wrap")
        if shift.min() < SAFE_SHIFT - SMALLEST_SHIFT and not np.all(exact[index]):
            raise InputError(
                "expected FP4 scales near enough to each other for FP8 to hold every value, got "
                f"scales 2^{int(scales.min()) - E8M0_BIAS} to 2^{int(scales.max()) - E8M0_BIAS} "
                "in a row of tiles; convert to bfloat16 instead"
            )
    return Block(codes, new, FP8)


# Exponents by which FP4 codes are multiplied to become FP8 codes. Down to the safe one E4M3 holds
# every product; at the smallest one it holds none but 0, and so below.
LARGEST_SHIFT, SAFE_SHIFT, SMALLEST_SHIFT = 6, -8, -13


def _tile_scales(scales: np.ndarray) -> np.ndarray:
    """Return the FP8 scales of a row of tiles, given the FP4 scales of their groups."""
    starts = np.arange(0, scales.shape[1], FP8.block[1] // FP4.block[1])
    largest = np.maximum.reduceat(scales.max(axis=0), starts)
    return np.maximum(largest, LARGEST_SHIFT) - np.uint8(LARGEST_SHIFT)


@functools.cache
def _shifted_codes() -> tuple[np.ndarray, np.ndarray]:
    """Return, for every shift and byte, two FP8 codes as a word, and whether they are exact."""
    shifts = np.arange(SMALLEST_SHIFT, LARGEST_SHIFT + 1)[:, None, None]
    values = np.ldexp(_code_values(FP4), shifts)
    codes = values.astype(E4M3)
    exact = np.all(codes.astype(np.float32) == values, axis=-1)
    return codes.view(np.uint16).reshape(-1), exact.reshape(-1)


def check_scales(scales: np.ndarray) -> None:
    """Raise an InputError unless all scales are finite and above 0."""
    if scales.dtype == np.uint8:
        if scales.size and scales.max() == E8M0_NAN:
            raise InputError(f"expected finite scales, got E8M0 byte {E8M0_NAN}, which is NaN")
    elif not np.all((scales > 0) & (scales < np.inf)):
        bad = scales[~((scales > 0) & (scales < np.inf))][0]
        raise InputError(f"expected finite scales above 0, got {bad}")


def check_block(block: Block) -> None:
    """Raise what `decode` would raise, where possible without decoding."""
    if block.form is None:
        check_finite(block.values)
        return
    check_scales(block.scales)
    check_codes(block.values, block.form)
    if may_overflow(block.scales, block.form):
        decode(block, FLOAT32)


def check_codes(codes: np.ndarray, form: Format) -> None:
    """Raise an InputError if a stored byte is no number."""
    if form is FP8 and any(np.any((part & 0x7F) == 0x7F) for part in chunks(codes)):
        raise InputError("expected finite values, got an E4M3 code that is NaN")


def may_overflow(scales: np.ndarray, form: Format) -> bool:
    """Say whether there are codes whose product with one of the scales is beyond float32."""
    return _multipliers(scales).max(initial=0) * form.largest > np.finfo(np.float32).max


def absmax(block: Block) -> float:
    """Return the largest magnitude of a whole, valid matrix, decoding no more than is needed.

    Blocks are looked at from the largest scale down, until no code of the next could exceed what
    was found: mostly a few of them.
    """
    if block.form is None:
        return largest(block.values)
    tiles, scales, form = _tiles(block), block.scales, block.form
    values = np.abs(_code_values(form)[:, 0])
    step = max(1, CHUNK_BYTES // tiles[0, 0].size)
    found = 0.0
    for rows, columns in _by_scale(scales):
        for start in range(0, len(rows), step):
            place = rows[start : start + step], columns[start : start + step]
            multipliers = _multipliers(scales[place])
            if multipliers.max() * form.largest <= found:
                return found
            products = values[_unsigned(tiles[place], form).max(axis=(1, 2))] * multipliers
            found = max(found, float(products.max()))
    return found


def _unsigned(codes: np.ndarray, form: Format) -> np.ndarray:
    """Return the larger code of each byte without its sign; such codes have the order of values."""
    return codes & 0x7F if form.per_byte == 1 else np.maximum(codes & 7, codes >> 4 & 7)


def _by_scale(scales: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield the places of the blocks of one power of two after the other, from the largest down."""
    if scales.dtype == np.uint8:
        counts = np.bincount(scales.reshape(-1), minlength=256)
        for byte in np.flatnonzero(counts)[::-1]:
            yield np.nonzero(scales == byte)
    else:
        order = np.argsort(scales, axis=None)[::-1]
        yield np.unravel_index(order, scales.shape)


def _multipliers(scales: np.ndarray) -> np.ndarray:
    """Return stored scales as float64."""
    return (scales.view(E8M0) if scales.dtype == np.uint8 else scales).astype(np.float64)


def _tiles(block: Block) -> np.ndarray:
    """View the stored bytes of a matrix by scale: [row, column, rows of a block, its bytes]."""
    form = block.form
    rows, columns = block.scales.shape
    height, width = form.block[0], form.block[1] // form.per_byte
    padding = rows * height - block.values.shape[0], columns * width - block.values.shape[1]
    values = np.pad(block.values, [(0, size) for size in padding]) if any(padding) else block.values
    return values.reshape(rows, height, columns, width).swapaxes(1, 2)
