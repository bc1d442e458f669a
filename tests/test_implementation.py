"""Which implementation of an operation runs."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from dsv4_jax.config import Runtime
from dsv4_jax.errors import InputError
from pallas_kernels.implementation import (
    IMPLEMENTATIONS,
    OPERATIONS,
    any_kernel,
    choose,
    implementation_of,
)
from pallas_kernels.newton_schulz import symmetric_product
from pallas_kernels.target import compiling_for, target_platform


@dataclasses.dataclass
class Described:
    """A device that is not here."""

    platform: str
    device_kind: str


@pytest.mark.parametrize(
    ("platform", "kind", "target", "supported"),
    [
        ("cuda", "NVIDIA H100 80GB HBM3", "gpu", True), ("cuda", "NVIDIA B200", "gpu", True),
        ("cuda", "NVIDIA A100-SXM4-40GB", "gpu", False),
        ("rocm", "AMD Instinct MI300X", "gpu", False),
        ("tpu", "TPU v5 lite", "tpu", True), ("tpu", "TPU7x", "tpu", True),
        ("tpu", "TPU v4", "tpu", False), ("cpu", "cpu", "cpu", False),
        ("METAL", "Metal", "cpu", False),
    ],
)
def test_a_program_is_made_for_the_described_device(platform, kind, target, supported):
    with compiling_for(Described(platform, kind)):
        assert target_platform() == target
        kernel = target if supported else "xla"
        assert choose("newton_schulz", "auto") == kernel
        assert choose("newton_schulz", "auto", worthwhile=False) == "xla"
        assert any_kernel("auto") == supported
        assert not any_kernel("xla")
    assert target_platform() == jax.default_backend() == "cpu"
    with jax.default_device(jax.devices()[1]):
        assert target_platform() == "cpu"


def test_a_named_implementation_is_taken_anywhere():
    for implementation in ("xla", "gpu", "tpu"):
        assert choose("newton_schulz", implementation, worthwhile=False) == implementation


def test_small_matrices_have_no_kernel_unless_it_is_named():
    def primitives(implementation):
        x = jax.ShapeDtypeStruct((2, 64, 64), jnp.float32)
        with compiling_for(Described("tpu", "TPU v5")):
            product = jax.make_jaxpr(lambda x: symmetric_product(x, None, 1.0, 0.0, implementation))
            return str(product(x))

    assert "pallas_call" not in primitives("auto")
    assert "pallas_call" in primitives("tpu")


def test_operations_may_have_implementations_of_their_own():
    assert implementation_of("newton_schulz", "gpu") == "gpu"
    assert implementation_of("newton_schulz", "auto,newton_schulz=xla") == "xla"
    for choices in (*IMPLEMENTATIONS, *(f"xla,{name}=tpu" for name in OPERATIONS)):
        assert Runtime(kernels=choices).kernels == choices


@pytest.mark.parametrize(
    "choices", ["", "cuda", "auto,", "auto,newton_schulz", "auto,attention=xla",
                "newton_schulz=xla", "xla,newton_schulz=fast", "xla,newton_schulz=tpu=gpu",
                "auto,newton_schulz=xla,newton_schulz=gpu"],
)
def test_unknown_choices_are_refused_in_one_line(choices):
    with pytest.raises(InputError) as error:
        Runtime(kernels=choices)
    message = str(error.value)
    assert message.startswith("Runtime.kernels: expected one of auto, xla, gpu, tpu, then perhaps")
    assert message.endswith(f"got {choices!r}") and "\n" not in message


def test_an_unknown_implementation_is_refused():
    with pytest.raises(ValueError, match="newton_schulz: expected implementation to be one of"):
        symmetric_product(jnp.ones((1, 2, 2)), None, 1.0, 0.0, "cuda")
