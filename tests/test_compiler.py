"""Determinism on GPU: what the compiler is asked for, and how its programs are checked."""

from __future__ import annotations

import jax
import pytest

from dsv4_jax.compiler import check_deterministic, compiler_options
from dsv4_jax.errors import InputError

# As XLA 0.10.2 compiles `table.at[ids].add(rows)` for an H100, without and with its option for
# determinism; shortened.
SCATTER = (
    "  ROOT %scatter-add.5.1 = f32[4096,128]{1,0} scatter(%param_0, %bitcast.3, %bitcast.1.1), "
    "update_window_dims={1,2}, index_vector_dim=1, to_apply=%region_0.1"
)
SORTED = (
    "  ROOT %scatter-add.85.1 = f32[4,256,32]{2,1,0} scatter(%param_0.10, %bitcast.1, %bitcast.2), "
    "update_window_dims={1,2,3}, index_vector_dim=1, indices_are_sorted=true, unique_indices=true, "
    "to_apply=%region_1.8"
)
COUNTS = SCATTER.replace("f32[4096,128]{1,0}", "s32[16]{0}")
TUPLE = SCATTER.replace("f32[4096,128]{1,0}", "(s32[16]{0}, /*index=1*/bf16[4,2]{1,0})")
OTHER = (
    '  ROOT %input_scatter_fusion = f32[4096,128]{1,0} fusion(%copy.2, %g.1), kind=kInput, '
    'calls=%fused_scatter, metadata={op_name="jit(f)/scatter(x)"}'
)


def test_a_program_that_adds_in_any_order_is_refused():
    check_deterministic(f"{OTHER}\n{SORTED}\n{COUNTS}\n{OTHER}")
    with pytest.raises(InputError, match="left 2 scatters .* train.deterministic=False") as caught:
        check_deterministic(f"{SCATTER}\n{SORTED}\n{TUPLE}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("backend", "deterministic", "expected"), [
    ("gpu", True, {"xla_gpu_deterministic_ops": True}), ("gpu", False, None),
    ("tpu", True, None), ("tpu", False, None),
])
def test_gpus_alone_are_asked_for_determinism(monkeypatch, backend, deterministic, expected):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    assert compiler_options(deterministic=deterministic) == expected


def test_a_cpu_is_asked_for_the_same_either_way():
    assert compiler_options(deterministic=True) == compiler_options(deterministic=False)
