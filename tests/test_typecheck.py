"""Tests check the shapes in signatures: a wrong one is an error."""

from __future__ import annotations

import jax.numpy as jnp
import pytest
from jaxtyping import TypeCheckError

from dsv4_jax.mhc import collapse


def test_a_shape_that_a_signature_forbids_is_an_error():
    streams = jnp.ones((2, 3, 4, 5))
    assert collapse(streams, jnp.ones((4, 2, 3))).shape == (2, 3, 5)
    with pytest.raises(TypeCheckError, match="problem arose whilst typechecking parameter 'pre'"):
        collapse(streams, jnp.ones((4, 3, 2)))
