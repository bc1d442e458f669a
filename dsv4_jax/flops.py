"""Count the floating-point operations of a function by a walk over its jaxpr."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import jax
from jax.extend import core
from jax.interpreters import partial_eval

# Counted as nothing: they move, reinterpret or order data.
_FREE = frozenset(
    """
    all_gather all_gather_invariant all_to_all axis_index bitcast_convert_type broadcast_in_dim
    concatenate copy debug_callback debug_print device_put dynamic_slice dynamic_update_slice
    empty empty2 gather iota layout_constraint name optimization_barrier pad pbroadcast
    platform_index ppermute pvary random_unwrap random_wrap reshape reshard rev scatter
    sharding_constraint slice sort split squeeze stack stop_gradient tile top_k transpose unstack
    """.split()
)

# One operation per output element.
_ARITHMETIC = frozenset(
    """
    abs add add_any and ceil clamp clz convert_element_type cumlogsumexp cummax cummin cumprod
    cumsum div eq eq_to floor ge gt is_finite le le_to lt lt_to max min mul mulhi ne neg
    nextafter not one_minus_square or pmax pmin population_count psum psum_invariant random_bits
    random_fold_in random_seed random_split reduce_precision reduce_scatter rem
    rng_bit_generator round select_n shift_left shift_right_arithmetic shift_right_logical sign
    square sub threefry2x32 xor
    """.split()
)

# One transcendental operation per output element, and the arithmetic that XLA adds to it.
_TRANSCENDENTAL = dict.fromkeys(
    """
    acos acosh asin asinh atan atan2 atanh cbrt cos cosh erf erf_inv erfc exp expm1 log log1p
    log2 pow rsqrt sin sinh sqrt tan tanh
    """.split(),
    0,
) | {"exp2": 1, "logistic": 3}

# One operation per element that they remove.
_REDUCTIONS = frozenset(
    """
    argmax argmin reduce_and reduce_max reduce_min reduce_or reduce_prod reduce_sum reduce_xor
    """.split()
)

# One operation per update.
_SCATTERS = frozenset("scatter-add scatter-max scatter-min scatter-mul scatter-sub".split())

# Their body runs once.
_CALLS = frozenset(
    "call closed_call custom_jvp_call custom_vjp_call eval_jaxpr jit remat2".split()
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Flops:
    """Floating-point operations, in XLA's categories."""

    matmul: int = 0  # of matrix products and convolutions; a multiply-add is two
    elementwise: int = 0  # of arithmetic, comparisons, selections, casts and reductions
    transcendental: int = 0  # calls of exp, log, sqrt and their like

    @property
    def total(self) -> int:
        """Matmul and elementwise operations: what XLA reports as "flops"."""
        return self.matmul + self.elementwise

    def __add__(self, other: Flops) -> Flops:
        return Flops(
            matmul=self.matmul + other.matmul,
            elementwise=self.elementwise + other.elementwise,
            transcendental=self.transcendental + other.transcendental,
        )

    def __mul__(self, times: int) -> Flops:
        return Flops(
            matmul=self.matmul * times,
            elementwise=self.elementwise * times,
            transcendental=self.transcendental * times,
        )


def count_flops(fn: Callable, *args, **kwargs) -> Flops:
    """Count the operations of `fn(*args, **kwargs)` without compiling or running it.

    A loop counts as often as it runs, a `cond` as its dearest branch, a `shard_map` as the sum
    over its devices, and code whose result is not used not at all. Matrix products are exact:
    2 * batch * m * n * k; a `ragged_dot` counts each row once, as if its groups filled all rows.
    The rest follows XLA's cost analysis of the operations as written, before XLA merges or
    simplifies any: one per output element, for a reduction one per element that it removes.
    Two rules differ: sorting is free, and a cumulative sum is one per element, since XLA's
    algorithm for it depends on the device.

    Args:
      args, kwargs: arrays or `jax.ShapeDtypeStruct`s, in any pytree.
    Raises:
      ValueError: a primitive has no rule, such as a `while`, whose length is not known.
    """
    return flops_of(jax.make_jaxpr(fn)(*args, **kwargs))


def flops_of(jaxpr: core.ClosedJaxpr) -> Flops:
    """Count the operations of a traced function, as `count_flops` does."""
    jaxpr = jaxpr.jaxpr
    live, _ = partial_eval.dce_jaxpr(jaxpr, used_outputs=True)
    return _count_jaxpr(live)


def _count_jaxpr(jaxpr: core.Jaxpr | core.ClosedJaxpr) -> Flops:
    return sum(map(_count_equation, jaxpr.eqns), Flops())


def _count_equation(eqn: core.JaxprEqn) -> Flops:
    name = eqn.primitive.name
    if name in _FREE:
        return Flops()
    if name in _STRUCTURED:
        return _STRUCTURED[name](eqn)
    if name in _CALLS:
        return _count_jaxpr(*core.jaxprs_in_params(eqn.params))
    if name in _ARITHMETIC:
        return Flops(elementwise=_output_size(eqn))
    if name in _TRANSCENDENTAL:
        size = _output_size(eqn)
        return Flops(transcendental=size, elementwise=size * _TRANSCENDENTAL[name])
    if name in _REDUCTIONS:
        return Flops(elementwise=_size(eqn.invars[0]) - _size(eqn.outvars[0]))
    if name in _SCATTERS:
        _, _, updates = eqn.invars
        return Flops(elementwise=_size(updates))
    raise ValueError(
        f"count_flops: expected primitives of known cost, got {name!r}; give loops a static "
        "length, count a kernel by its reference, or add a rule to dsv4_jax/flops.py"
    )


def _count_dot(eqn: core.JaxprEqn) -> Flops:
    (contracting, _), _ = eqn.params["dimension_numbers"]
    depth = math.prod(eqn.invars[0].aval.shape[axis] for axis in contracting)
    return Flops(matmul=2 * _output_size(eqn) * depth)


def _count_ragged_dot(eqn: core.JaxprEqn) -> Flops:
    numbers = eqn.params["ragged_dot_dimension_numbers"]
    (contracting, _), _ = numbers.dot_dimension_numbers
    lhs, _, group_sizes = (var.aval.shape for var in eqn.invars)
    depth = math.prod(lhs[axis] for axis in contracting)
    flops = 2 * _output_size(eqn) * depth
    if set(numbers.lhs_ragged_dimensions) & set(contracting):
        flops //= group_sizes[-1]  # each group contracts its own rows only
    return Flops(matmul=flops)


def _count_conv(eqn: core.JaxprEqn) -> Flops:
    """Count the products inside the input, those with padding or dilation holes left out."""
    lhs, rhs = (var.aval.shape for var in eqn.invars)
    out = eqn.outvars[0].aval.shape
    numbers = eqn.params["dimension_numbers"]
    products = out[numbers.out_spec[0]] * out[numbers.out_spec[1]] * rhs[numbers.rhs_spec[1]]
    for i, (stride, (pad, _), hole, step) in enumerate(
        zip(
            eqn.params["window_strides"],
            eqn.params["padding"],
            eqn.params["lhs_dilation"],
            eqn.params["rhs_dilation"],
            strict=True,
        )
    ):
        extent = (lhs[numbers.lhs_spec[2 + i]] - 1) * hole + 1
        places = (
            row * stride + tap * step - pad
            for row in range(out[numbers.out_spec[2 + i]])
            for tap in range(rhs[numbers.rhs_spec[2 + i]])
        )
        products *= sum(0 <= place < extent and place % hole == 0 for place in places)
    return Flops(matmul=2 * products)


def _count_integer_pow(eqn: core.JaxprEqn) -> Flops:
    """Count the multiplications of repeated squaring, and a division for a negative power."""
    power = abs(eqn.params["y"])
    steps = power.bit_length() + power.bit_count() - 2 + (eqn.params["y"] < 0)
    return Flops(elementwise=max(steps, 0) * _output_size(eqn))


def _count_scan(eqn: core.JaxprEqn) -> Flops:
    return _count_jaxpr(eqn.params["jaxpr"]) * eqn.params["length"]


def _count_cond(eqn: core.JaxprEqn) -> Flops:
    return max(map(_count_jaxpr, eqn.params["branches"]), key=lambda flops: flops.total)


def _count_shard_map(eqn: core.JaxprEqn) -> Flops:
    mesh, axes = eqn.params["mesh"], eqn.params["newly_manual_axes"]
    return _count_jaxpr(eqn.params["jaxpr"]) * math.prod(mesh.shape[axis] for axis in axes)


def _count_hi_primitive(eqn: core.JaxprEqn) -> Flops:
    """Count what the primitive stands for: remat and custom derivatives, from jax 0.12 on."""
    primitive = eqn.params["_prim"]
    return count_flops(primitive.expand, *primitive.in_avals)


_STRUCTURED = {
    "dot_general": _count_dot,
    "ragged_dot_general": _count_ragged_dot,
    "conv_general_dilated": _count_conv,
    "integer_pow": _count_integer_pow,
    "scan": _count_scan,
    "cond": _count_cond,
    "shard_map": _count_shard_map,
    "call_hi_primitive": _count_hi_primitive,
}


def _output_size(eqn: core.JaxprEqn) -> int:
    return sum(map(_size, eqn.outvars))


def _size(var) -> int:
    return math.prod(var.aval.shape)
