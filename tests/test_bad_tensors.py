"""One fault of a tensor is one problem, which says its name, what was expected and what came."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable

import checkpoint_files as files
import pytest
from checkpoint_files import CONFIG, Stored, filled, joined
from checkpoint_reading import (
    EVIL_NAMES,
    GOOD,
    MODULES,
    RELEASED,
    check_loaded,
    checked,
    read_all,
)

from dsv4_jax import InputError, load_pretrained
from dsv4_jax.convert.untrusted import CheckpointError
from dsv4_jax.hf_storage import StorageKeys
from dsv4_jax.hf_write import transformers_config

Fault = tuple[Callable[[dict[str, Stored]], object], str, str]  # edit, tensor, what is told


def put(name: str, dtype: str, shape: tuple[int, ...]) -> Callable[[dict], object]:
    return lambda tensors: tensors.update({name: filled(dtype, shape)})


def end_with(name: str, values: bytes) -> Callable[[dict], object]:
    """Change the last bytes of a tensor: those of the last expert of a stack."""

    def edit(tensors: dict[str, Stored]) -> None:
        data = tensors[name].data
        tensors[name] = tensors[name]._replace(data=data[: -len(values)] + values)

    return edit


STACK, TABLE = "model.layers.1.mlp.experts.gate_up_proj", "model.layers.0.mlp.gate.tid2eid"
NORM, QUERY = "model.layers.0.input_layernorm.weight", "model.layers.0.self_attn.q_a_proj.weight"
FP8, FP4, IDS = "layers.0.attn.wq_a.weight", "layers.1.ffn.experts.1.w2.weight", (
    "layers.0.ffn.gate.tid2eid"
)  # fmt: skip
HEADER_FAULTS: dict[str, Fault] = {
    "norm missing": (lambda t: t.pop(NORM), NORM, "missing"),
    "stack missing": (lambda t: t.pop(STACK), STACK, "missing"),
    "expert too many": (put(STACK, "BF16", (3, 16, 8)), STACK, "[2, 16, 8], got [3, 16, 8]"),
    "half an expert": (put(STACK, "BF16", (2, 8, 8)), STACK, "[2, 16, 8], got [2, 8, 8]"),
    "stack laid flat": (put(STACK, "BF16", (32, 8)), STACK, "[2, 16, 8], got [32, 8]"),
    "rows and columns": (put(QUERY, "BF16", (8, 4)), QUERY, "expected shape [4, 8], got [8, 4]"),
    "norm of F64": (put(NORM, "I64", (8,)), NORM, "expected BF16 or F16 or F32, got I64"),
    "table of floats": (put(TABLE, "BF16", (8, 1)), TABLE, "expected I64 or I32, got BF16"),
    "table of bytes": (put(TABLE, "U8", (8, 1)), TABLE, "expected I64 or I32, got U8"),
    "FP8 without scales": (put(QUERY, "F8_E4M3", (4, 8)), QUERY, "expected its scales as"),
    "scales of BF16": (
        put("model.layers.0.self_attn.q_a_proj.weight_scale_inv", "F8_E8M0", (1, 1)),
        "model.layers.0.self_attn.q_a_proj.weight_scale_inv", "unexpected",
    ),
    "layer too many": (
        put(NORM.replace("0", "2"), "BF16", (8,)), NORM.replace("0", "2"), "unexpected"
    ),
}  # fmt: skip
HEADER_FAULTS_OF_RELEASED: dict[str, Fault] = {
    "FP8 missing, scale left": (lambda t: t.pop(FP8), FP8, "missing"),
    "FP4 missing, scale left": (lambda t: t.pop(FP4), FP4, "missing"),
    "FP8 of another kind": (put(FP8, "F8_E5M2", (4, 8)), FP8, "got F8_E5M2"),
    "FP8 as integers": (put(FP8, "I64", (4, 8)), FP8, "got I64"),
    "FP8 as FP4": (put(FP8, "I8", (4, 4)), FP8, "expected F8_E4M3 or BF16 or F16 or F32, got I8"),
    "scale in BF16": (
        put(FP8.replace("weight", "scale"), "BF16", (1, 1)), FP8.replace("weight", "scale"),
        "expected F8_E8M0 or F32, got BF16",
    ),
    "scale too many": (
        put(FP4.replace("weight", "scale"), "F8_E8M0", (8, 2)), FP4.replace("weight", "scale"),
        "expected shape [8, 1], got [8, 2]",
    ),
    "FP4 not packed": (put(FP4, "I8", (8, 8)), FP4, "expected shape [8, 4], got [8, 8]"),
    "table as FP4": (put(IDS, "I8", (8, 1)), IDS, "expected I64 or I32, got I8"),
}  # fmt: skip
VALUE_FAULTS: dict[str, Fault] = {
    "NaN": (end_with(NORM, b"\xc0\x7f"), NORM, "expected finite values, got NaN"),
    "inf": (end_with(NORM, b"\x80\x7f"), NORM, "expected finite values, got NaN or infinity"),
    "-inf of the last expert": (end_with(STACK, b"\x80\xff"), STACK, "expected finite values"),
    "F16": (
        lambda t: (put(NORM, "F16", (8,))(t), end_with(NORM, b"\x00\x7c")(t)), NORM,
        "expected finite values",
    ),
    "F32": (
        lambda t: (put(QUERY, "F32", (4, 8))(t), end_with(QUERY, b"\x00\x00\x80\xff")(t)), QUERY,
        "expected finite values",
    ),
    "id": (end_with(TABLE, struct.pack("<q", 2)), TABLE, "expected ids of 2 experts, got"),
    "negative id": (end_with(TABLE, struct.pack("<q", -1)), TABLE, "got -1 to"),
    "smallest id": (end_with(TABLE, struct.pack("<q", -(2**63))), TABLE, f"got {-(2**63)} to"),
    "id in 32 bits": (
        lambda t: (put(TABLE, "I32", (8, 1))(t), end_with(TABLE, struct.pack("<i", 2**31 - 1))(t)),
        TABLE, f"to {2**31 - 1}",
    ),
}  # fmt: skip
SCALE, EXPERT_SCALE = FP8.replace("weight", "scale"), FP4.replace("weight", "scale")


def float32_scales(value: float) -> Callable[[dict], object]:
    return put_values(SCALE, "F32", (1, 1), struct.pack("<f", value))


def put_values(
    name: str, dtype: str, shape: tuple[int, ...], data: bytes
) -> Callable[[dict], object]:
    return lambda tensors: tensors.update({name: Stored(dtype, shape, data)})


SCALE_FAULTS: dict[str, Fault] = {
    "scale missing": (lambda t: t.pop(SCALE), FP8, "expected its scales as"),
    "scale twice": (
        put(FP8.replace("weight", "weight_scale_inv"), "F8_E8M0", (1, 1)), FP8, "got both"
    ),
    "scale of nothing": (put("norm.scale", "F32", (1,)), "norm.scale", "unexpected"),
    "float scales of FP4": (
        put(EXPERT_SCALE, "F32", (8, 1)), EXPERT_SCALE, "expected F8_E8M0, got F32"
    ),
    "E8M0 NaN": (end_with(EXPERT_SCALE, b"\xff"), FP4, "E8M0 byte 255"),
    "E4M3 NaN": (end_with(FP8, b"\x7f"), FP8, "E4M3 code that is NaN"),
    "scale 0": (float32_scales(0.0), FP8, "above 0, got 0.0"),
    "scale negative": (float32_scales(-2.0), FP8, "above 0, got -2.0"),
    "scale NaN": (float32_scales(float("nan")), FP8, "above 0, got nan"),
    "scale inf": (float32_scales(float("inf")), FP8, "above 0, got inf"),
    "overflow": (
        lambda t: (end_with(FP8, b"\x7e")(t), end_with(SCALE, b"\xfe")(t)), FP8,
        "expected finite values",
    ),
    "overflow of float32 scales": (
        lambda t: (end_with(FP8, b"\x7e")(t), float32_scales(1e38)(t)), FP8,
        "expected finite values",
    ),
}  # fmt: skip
FAULTS = {case: (MODULES, *fault) for case, fault in {**HEADER_FAULTS, **VALUE_FAULTS}.items()}
FAULTS |= {case: (RELEASED, *fault) for case, fault in {
    **HEADER_FAULTS_OF_RELEASED, **SCALE_FAULTS}.items()}  # fmt: skip


@pytest.mark.parametrize("case", FAULTS)
def test_a_fault_is_one_problem(case, tmp_path):
    """And not another one of the scales that a tensor has or lacks."""
    tensors, edit, name, told = FAULTS[case]
    tensors = dict(tensors)
    edit(tensors)
    with pytest.raises(InputError) as caught:
        read_all(files.write_single(tmp_path, tensors))
    message = checked(caught.value, tmp_path)
    problems = getattr(caught.value, "problems", (message,))
    assert len(problems) == 1 and told in message
    assert f"tensor {name!r}: " in problems[0]
    # The same on the way to parameters, where parts of tensors are read.
    config = transformers_config(CONFIG, StorageKeys())
    (tmp_path / "config.json").write_text(json.dumps(config))
    for keep in (False, True):
        with pytest.raises(InputError) as caught:
            load_pretrained(tmp_path, keep_quantized=keep)
        assert f"tensor {name!r}: " in checked(caught.value, tmp_path)


def test_all_faults_are_told_at_once(tmp_path):
    tensors = dict(MODULES)
    cases = ("norm missing", "half an expert", "rows and columns", "table of bytes",
             "layer too many")  # fmt: skip
    for case in cases:
        HEADER_FAULTS[case][0](tensors)
    evil = [name for name in EVIL_NAMES if not name.startswith("mtp.")]  # that is told alone
    tensors |= {name: filled("F32", (1,)) for name in evil}
    with pytest.raises(CheckpointError) as caught:
        read_all(files.write_single(tmp_path, tensors))
    checked(caught.value, tmp_path)
    assert len(caught.value.problems) == len(cases) + len(evil)
    for case in cases:
        _, name, told = HEADER_FAULTS[case]
        assert sum(f"tensor {name!r}: " in p and told in p for p in caught.value.problems) == 1


def test_good_checkpoints_load_in_either_naming_and_every_admitted_dtype(tmp_path):
    """The faults above are told of these very files."""
    read_all(files.write_single(tmp_path / "modules", MODULES))
    for dtype in ("BF16", "F16", "F32"):
        tensors = {
            name: filled("I32" if stored.dtype == "I64" else dtype, stored.shape)
            for name, stored in MODULES.items()
        }
        read_all(files.write_single(tmp_path / dtype, tensors))
    check_loaded(read_all(files.write_single(tmp_path / "released", RELEASED)), joined(*GOOD))


def test_thousands_of_faults_make_a_short_message_and_a_whole_list(tmp_path):
    tensors = RELEASED | {f"x{i}": filled("F32", (0,)) for i in range(5000)}
    with pytest.raises(CheckpointError, match="5000 wrong: .*and 4980 more") as caught:
        read_all(files.write_single(tmp_path, tensors))
    assert len(caught.value.problems) == 5000
