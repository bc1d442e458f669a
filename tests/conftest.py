"""Set up every test: eight simulated CPU devices, signatures checked."""

from __future__ import annotations

import os

from typecheck import check_shapes

os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)
os.environ.setdefault("JAX_PLATFORMS", "cpu")

check_shapes()
