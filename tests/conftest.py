"""Set up every test: eight simulated CPU devices, signatures checked."""

from __future__ import annotations

import os

import pytest
from typecheck import check_shapes

os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)
os.environ.setdefault("JAX_PLATFORMS", "cpu")

check_shapes()


def pytest_terminal_summary(terminalreporter):
    """Print what tests have recorded of compiled kernels."""
    passed = terminalreporter.getreports("passed")
    rows = [row for report in passed for name, row in report.user_properties if name == "aot"]
    if rows:
        from pallas_kernels.aot import HEADING

        terminalreporter.write_line("\n".join([HEADING, *rows]))


@pytest.fixture(scope="module", autouse=True)
def forget_programs():
    """Drop what a file has compiled: gigabytes of programs slow down all that comes after."""
    yield
    import jax

    jax.clear_caches()


@pytest.fixture(scope="module")
def quick_scores():
    """Compile the scoring of tokens with few optimisations."""
    from compiling import quick_jit  # these import the package, which must come after the above

    from dsv4_jax import scoring

    program = quick_jit(scoring._score, static_argnums=(0, 1))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scoring, "_program", lambda: program)
        yield


@pytest.fixture(scope="module")
def quick_generation():
    """Compile prefill and decode with few optimisations; bits may then depend on the batch."""
    from compiling import QUICK

    from dsv4_jax import decode

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decode, "inference_options", lambda: QUICK)
        decode._jitted.cache_clear()
        yield
    decode._jitted.cache_clear()
