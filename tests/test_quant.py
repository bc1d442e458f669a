"""Number formats agree with ml_dtypes, with torch and with their own inverse, bit for bit."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv4_jax.arrays import BFLOAT16, FLOAT32
from dsv4_jax.errors import InputError
from dsv4_jax.quant import (
    E2M1,
    E4M3,
    E8M0,
    FP4,
    FP8,
    Block,
    absmax,
    check_block,
    decode,
    encode,
    fp4_to_fp8,
    pack,
)

FLOAT16, FLOAT64 = np.dtype(np.float16), np.dtype(np.float64)
SCALES = np.arange(255, dtype=np.uint8)  # every E8M0 byte but NaN
E4M3_CODES = np.array([code for code in range(256) if code & 0x7F != 0x7F], np.uint8)


def random_block(rng, form, rows: int, columns: int, scales=(120, 134)) -> Block:
    """Return codes of all finite values and E8M0 scales in a range."""
    if form is FP8:
        codes = rng.choice(E4M3_CODES, (rows, columns))
    else:
        codes = rng.integers(0, 256, (rows, columns // 2), dtype=np.uint8)
    shape = form.scales_shape((rows, columns))
    return Block(codes, rng.integers(*scales, shape, dtype=np.uint8), form)


def torch_decoded(block: Block) -> np.ndarray:
    """Dequantise by torch alone: its own FP8 and E8M0 types, the E2M1 values written out."""
    codes = torch.from_numpy(block.values)
    if block.form is FP8:
        values = codes.view(torch.float8_e4m3fn).double()
    else:
        positive = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
        table = torch.tensor(positive + [-value for value in positive], dtype=torch.float64)
        values = torch.stack([table[(codes & 15).long()], table[(codes >> 4).long()]], -1)
        values = values.flatten(1)
    scales = torch.from_numpy(block.scales)
    scales = scales.view(torch.float8_e8m0fnu) if scales.dtype == torch.uint8 else scales
    rows, columns = block.form.block
    wide = scales.double().repeat_interleave(rows, 0).repeat_interleave(columns, 1)
    return (values * wide[: values.shape[0], : values.shape[1]]).numpy()


def same(x: np.ndarray, y: np.ndarray) -> bool:
    """Compare values and the signs of zeros."""
    return np.array_equal(x, y) and np.array_equal(np.signbit(x), np.signbit(y))


@pytest.mark.parametrize("dtype", [FLOAT64, FLOAT32, BFLOAT16], ids=str)
def test_every_fp4_code_under_every_scale(dtype):
    """255 scales by 16 codes, against ml_dtypes in float64: exact, or refused as too large."""
    codes = np.arange(16, dtype=np.uint8)
    packed = pack(np.tile(codes, 2)[None], FP4)
    for scale in SCALES:
        block = Block(packed, np.array([[scale]], np.uint8), FP4)
        truth = codes.view(E2M1).astype(np.float64) * scale[None].view(E8M0).astype(np.float64)
        if np.abs(truth).max() > ml_dtypes.finfo(dtype).max:
            with pytest.raises(InputError, match="finite"):
                decode(block, dtype)
        else:
            assert same(decode(block, dtype)[0, :16].astype(np.float64), truth)


@pytest.mark.parametrize("dtype", [FLOAT64, FLOAT32, BFLOAT16], ids=str)
def test_every_fp8_code_under_every_scale(dtype):
    codes = E4M3_CODES[None]
    for scale in SCALES:
        block = Block(codes, np.full((1, 2), scale), FP8)
        truth = codes.view(E4M3).astype(np.float64) * scale[None].view(E8M0).astype(np.float64)
        if np.abs(truth).max() > ml_dtypes.finfo(dtype).max:
            with pytest.raises(InputError, match="finite"):
                decode(block, dtype)
            continue
        # Products below 2^-133 are not all bfloat16, below 2^-149 not all float32: rounded once.
        assert same(decode(block, dtype), truth.astype(dtype))
        if scale > 10:
            assert same(decode(block, dtype).astype(np.float64), truth)


@pytest.mark.parametrize("form", [FP8, FP4], ids=["fp8", "fp4"])
@pytest.mark.parametrize("shape", [(1, 2), (128, 128), (130, 258), (300, 64), (5, 1000)])
def test_decoding_agrees_with_torch(form, shape):
    rng = np.random.default_rng(0)
    block = random_block(rng, form, *shape)
    truth = torch_decoded(block)
    for dtype in (FLOAT64, FLOAT32, BFLOAT16):
        assert same(decode(block, dtype).astype(np.float64), truth)
    # Codes of both formats times 2^-7 to 2^6 can be float16, but for the smallest of FP8.
    assert same(decode(block, FLOAT16), truth.astype(FLOAT16))


def test_float32_scales_round_once():
    rng = np.random.default_rng(1)
    block = random_block(rng, FP8, 200, 300)
    scales = rng.uniform(0.001, 3.0, block.scales.shape).astype(np.float32)
    block = Block(block.values, scales, FP8)
    truth = torch_decoded(block)
    assert same(decode(block, FLOAT32), truth.astype(np.float32))
    assert same(decode(block, BFLOAT16), truth.astype(np.float32).astype(BFLOAT16))


@pytest.mark.parametrize("form", [FP8, FP4], ids=["fp8", "fp4"])
@pytest.mark.parametrize("rows", [slice(7, 190), np.array([3, 5, 250])])
@pytest.mark.parametrize("columns", [slice(11, 150), np.array([0, 99, 17])])
def test_parts_decode_as_in_the_whole(form, rows, columns):
    rng = np.random.default_rng(2)
    block = random_block(rng, form, 256, 512)
    values = block.values[rows][:, columns]
    part = Block(values, block.scales, form, rows, columns)
    whole = decode(block, FLOAT32).reshape(256, -1, form.per_byte)
    assert same(decode(part, FLOAT32), whole[rows][:, columns].reshape(values.shape[0], -1))


@settings(deadline=None, max_examples=60)
@given(
    st.sampled_from([FP8, FP4]), st.integers(1, 140), st.integers(1, 140),
    st.integers(0, 245), st.integers(0, 2**32 - 1),
)
def test_encoding_what_was_decoded_keeps_every_value(form, rows, columns, scale, seed):
    """Also through bfloat16, and whatever scale the block had."""
    rng = np.random.default_rng(seed)
    block = random_block(rng, form, rows, 2 * columns, (scale, scale + 1))
    # Codes need not reach up to the largest: a smaller scale then does as well.
    largest = rng.integers(0, 256, dtype=np.uint8)
    smaller = np.where(block.values & 0x77 > largest, block.values & 0x88, block.values)
    block = Block(smaller, block.scales, form)
    values = decode(block, BFLOAT16 if scale > 10 else FLOAT32)
    again = encode(values, form)
    assert same(decode(again, FLOAT64), decode(block, FLOAT64))
    assert again.scales.shape == block.scales.shape and again.values.dtype == np.uint8


@pytest.mark.parametrize("form", [FP8, FP4], ids=["fp8", "fp4"])
def test_encoding_takes_the_smallest_scale_that_holds_the_largest_value(form):
    edge = np.float32(form.largest * 2.0**3)
    above = np.nextafter(edge, np.float32(np.inf))
    for largest, exponent in ((edge, 3), (above, 4), (edge / 2, 2)):
        values = np.zeros((1, 32), np.float32)
        values[0, 5] = -largest
        block = encode(values, form)
        assert block.scales.tolist() == [[127 + exponent]]
    assert encode(np.zeros((1, 32), np.float32), form).scales.tolist() == [[127]]


def test_e2m1_rounds_to_nearest_with_ties_to_even_codes():
    """Source: fact sheet 13 A."""
    given = [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, -0.3, 6.0]
    rounded = [0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0, -0.5, 6.0]
    values = np.zeros((1, 32), np.float32)
    values[0, : len(given)] = given
    assert decode(encode(values, FP4), FLOAT32)[0, : len(given)].tolist() == rounded


@pytest.mark.parametrize("form", [FP8, FP4], ids=["fp8", "fp4"])
def test_encoding_errs_by_half_a_step_at_most(form):
    rng = np.random.default_rng(3)
    values = rng.standard_normal((300, 320)).astype(np.float32)
    block = encode(values, form)
    rows, columns = form.block
    scale = np.ldexp(1.0, block.scales.astype(int) - 127).repeat(rows, 0).repeat(columns, 1)
    x = np.abs(values / scale[:300, :320])
    # Steps of E4M3: 2^-3 of the power of two below, at least 2^-9; of E2M1: 2^-1, at least 2^-1.
    bits, smallest = (3, -6) if form is FP8 else (1, 0)
    step = np.ldexp(1.0, np.maximum(np.frexp(x)[1] - 1, smallest) - bits)
    error = np.abs(decode(block, FLOAT64) / scale[:300, :320] - values / scale[:300, :320])
    assert np.all(error <= step / 2)


@pytest.mark.parametrize("form", [FP8, FP4], ids=["fp8", "fp4"])
def test_encoding_rounds_as_ml_dtypes_does(form):
    """Random values, every code, every midpoint and their float32 neighbours."""
    codes = E4M3_CODES if form is FP8 else np.arange(16, dtype=np.uint8)
    grid = np.unique(codes.view(form.codes).astype(np.float32))
    edges = np.concatenate([grid, (grid[1:] + grid[:-1]) / 2])
    rng = np.random.default_rng(6)
    values = np.concatenate([
        edges, np.nextafter(edges, np.float32(np.inf)), np.nextafter(edges, np.float32(-np.inf)),
        rng.uniform(-form.largest, form.largest, 5000), rng.standard_normal(5000),
    ]).astype(np.float32).clip(-form.largest, form.largest)
    # One row of blocks, each with a largest code, so that its scale is 1.
    width = form.block[1]
    values = np.resize(values, (-(-values.size // (width - 1)), width - 1))
    values = np.hstack([values, np.full((len(values), 1), form.largest, np.float32)]).reshape(1, -1)
    block = encode(values, form)
    assert np.all(block.scales == 127)
    assert same(decode(block, FLOAT32), values.astype(form.codes).astype(np.float32))


def test_nibbles_lie_low_column_first():
    assert pack(np.array([[1, 2, 15, 0]], np.uint8), FP4).tolist() == [[0x21, 0x0F]]


@pytest.mark.parametrize("shape", [(128, 128), (130, 160), (3, 64)])
def test_fp4_to_fp8_is_exact(shape):
    rng = np.random.default_rng(4)
    block = random_block(rng, FP4, *shape, (100, 113))
    converted = fp4_to_fp8(block)
    assert converted.scales.shape == FP8.scales_shape(shape)
    assert same(decode(converted, FLOAT64), decode(block, FLOAT64))
    # The official converter's scale: that of the tile's largest, divided by 2^6.
    assert converted.scales[0, 0] == block.scales[:128, :4].max() - 6


@pytest.mark.parametrize("code, spread", [(0x11, 14), (0x22, 15)])  # 0.5 and 1
def test_fp4_to_fp8_is_refused_where_a_scale_is_out_of_reach(code, spread):
    """Source: fact sheet 13 A: exact while scales of a tile are within 2^14."""
    scales = np.full((2, 4), 127, np.uint8)
    scales[1, 3] -= spread
    block = Block(np.full((2, 64), code, np.uint8), scales, FP4)
    assert same(decode(fp4_to_fp8(block), FLOAT64), decode(block, FLOAT64))
    scales[1, 3] -= 1
    with pytest.raises(InputError, match="bfloat16 instead"):
        fp4_to_fp8(block)


def damaged() -> dict[str, tuple[Block, str]]:
    fp8, fp4 = np.full((2, 4), 0x38, np.uint8), np.full((2, 2), 0x22, np.uint8)
    one = np.full((1, 1), 127, np.uint8)
    found = {
        "E8M0 NaN": (Block(fp8, np.full((1, 1), 255, np.uint8), FP8), "E8M0 byte 255"),
        "FP4 E8M0 NaN": (Block(fp4, np.full((2, 1), 255, np.uint8), FP4), "E8M0 byte 255"),
        "E4M3 NaN": (Block(np.full((2, 4), 0xFF, np.uint8), one, FP8), "finite values"),
        "FP8 overflow": (Block(np.full((2, 4), 0x7E, np.uint8), one * 2, FP8), "finite values"),
        "FP4 overflow": (Block(np.full((2, 2), 0x77, np.uint8), np.full((2, 1), 254, np.uint8),
                               FP4), "finite values"),
        "BF16 NaN": (Block(np.array([np.nan], BFLOAT16)), "finite values"),
        "BF16 inf": (Block(np.array([-np.inf], BFLOAT16)), "finite values"),
        "F32 NaN": (Block(np.array([[1, np.nan]], np.float32)), "finite values"),
        "F16 inf": (Block(np.array([np.inf], np.float16)), "finite values"),
    }  # fmt: skip
    for value in (0.0, -0.0, -1.0, np.nan, np.inf, -np.inf):
        scales = np.array([[value]], np.float32)
        found[f"F32 scale {value}"] = (Block(fp8, scales, FP8), f"above 0, got {value}")
    large = np.array([[1e38]], np.float32)
    found["F32 scale overflow"] = (Block(np.full((2, 4), 0x7E, np.uint8), large, FP8), "finite")
    return found


@pytest.mark.parametrize("case", damaged())
def test_damage_is_refused_in_decoding_and_in_copying(case):
    block, reason = damaged()[case]
    for refuse in (lambda: decode(block, FLOAT32), lambda: check_block(block)):
        with pytest.raises(InputError, match=reason):
            refuse()


@given(data=st.data(), rows=st.integers(1, 300), pairs=st.integers(1, 150))
@settings(max_examples=60, deadline=None)
def test_absmax_is_that_of_all_decoded_values(data, rows, pairs):
    """Whatever scales and codes are, also where the largest scale has small codes only."""
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    form = data.draw(st.sampled_from((FP4, FP8)))
    low = data.draw(st.integers(0, 200))
    block = random_block(rng, form, rows, 2 * pairs, (low, low + data.draw(st.integers(1, 40))))
    keep = data.draw(st.sampled_from((0.0, 0.001, 0.1, 1.0)))
    block.values[rng.random(block.values.shape) > keep] = 0
    if form is FP8 and data.draw(st.booleans()):
        shape = form.scales_shape((rows, 2 * pairs))
        block = Block(block.values, rng.lognormal(size=shape).astype(np.float32), form)
    assert absmax(block) == np.abs(decode(block, FLOAT64)).max()
    for dtype in (BFLOAT16, FLOAT16, FLOAT32):
        values = rng.normal(size=(rows, pairs)).astype(dtype)
        assert absmax(Block(values)) == np.abs(values.astype(np.float64)).max()
        assert absmax(Block(values.T)) == absmax(Block(values))


def test_smallest_scale_is_valid():
    """E8M0 byte 0 is 2^-127, not zero."""
    block = Block(np.full((1, 1), 0x22, np.uint8), np.zeros((1, 1), np.uint8), FP4)
    check_block(block)
    assert decode(block, FLOAT32).tolist() == [[2.0**-127] * 2]


def test_values_too_large_for_float16_are_refused():
    with pytest.raises(InputError, match="finite"):
        decode(Block(np.array([1e6], np.float32)), FLOAT16)
    with pytest.raises(InputError, match="even number of columns"):
        encode(np.ones((2, 3), np.float32), FP4)
    with pytest.raises(InputError, match="finite"):
        encode(np.full((2, 4), np.inf, np.float32), FP8)
