"""The prover proves what is true, refutes what is not, and computes what the kernels compute."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import verify
from pallas_kernels.index_math import cdiv, div, maximum, minimum, mod, where
from pallas_kernels.prove import TIME_LIMIT_S, Proof


def verdicts(proof: Proof) -> dict:
    return {verdict.statement: verdict for verdict in proof.verdicts()}


def pieces(x, size):
    """An index function as kernels have them: the last piece of x, and what is left of it."""
    last = maximum(cdiv(x, size) - 1, 0)
    return last, minimum(x - last * size, where(mod(x, size) == 0, size, mod(x, size)))


def test_an_index_function_is_the_same_on_integers_traced_values_and_symbols():
    proof = Proof("test", "pieces")
    x = proof.integer("x", 1, 1000)
    last, left = pieces(x, 7)
    traced = jax.jit(lambda x: pieces(x, 7))
    for value in (1, 6, 7, 8, 700, 1000):
        wanted = pieces(value, 7)
        assert wanted == tuple(map(int, traced(jnp.int32(value))))
        same = (last == wanted[0]) & (left == wanted[1])
        proof.state(f"at {value}", (x == value).implies(same))
    assert all(verdict.proved for verdict in proof.verdicts())


def test_true_statements_are_proved_and_false_ones_refuted_by_an_example():
    proof = Proof("test", "pieces")
    x = proof.integer("x", 1, 2**20)
    last, left = pieces(x, 128)
    proof.state("pieces cover x", last * 128 + left == x)
    proof.state("no piece is empty", (left >= 1) & (left <= 128))
    proof.state("a piece is full", left == 128)
    proof.state("x is neither", ~((x < 5) | (x >= 5)))
    found = verdicts(proof)
    assert found["pieces cover x"].proved and found["no piece is empty"].proved
    refuted = found["a piece is full"]
    assert not refuted.proved
    assert pieces(refuted.counterexample["x"], 128)[1] != 128
    assert str(refuted) == f"refuted by x = {refuted.counterexample['x']}"
    assert not found["x is neither"].proved


def test_an_overflow_of_int32_is_found_wherever_it_is_computed():
    proof = Proof("test", "offset")
    row = proof.integer("row", 0, 2**20)
    inside = row * 2047
    _ = where(inside > 5, inside, row * 2048)  # both are computed
    overflow = verdicts(proof)["nothing overflows int32"]
    assert not overflow.proved
    assert overflow.counterexample == {"row": 2**20}


def test_a_dividend_below_0_is_found():
    proof = Proof("test", "dividend")
    _ = div(proof.integer("x", -1, 5), 2)
    assert verdicts(proof)["nothing below 0 is divided"].counterexample == {"x": -1}


def test_premises_are_used_and_cannot_contradict_each_other():
    proof = Proof("test", "premises")
    x = proof.integer("x", 0, 10)
    proof.assume(x > 7)
    proof.state("it is large", x >= 8)
    assert all(verdict.proved for verdict in proof.verdicts())
    proof.assume(x < 3)
    with pytest.raises(ValueError, match="test, premises: nothing fulfils the premises"):
        proof.verdicts()


def test_misuse_is_refused():
    proof = Proof("test", "misuse")
    x = proof.integer("x", 0, 10)
    with pytest.raises(TypeError, match="neither true nor false"):
        bool(x > 1)
    for divisor in (0, -2, x):
        with pytest.raises(TypeError, match="expected an int above 0"):
            div(x, divisor)
    with pytest.raises(ValueError, match="two symbols are named 'x'"):
        proof.integer("x", 0, 1)


@pytest.mark.parametrize(
    "proof", tuple(verify.all_proofs()), ids=lambda p: f"{p.operation}: {p.kernel}"
)
def test_every_claim_of_every_kernel_is_proved(proof):
    for verdict in proof.verdicts():
        assert verdict.proved, f"{verdict.statement}: {verdict}"
        assert verdict.seconds < TIME_LIMIT_S


def test_verify_prints_a_table_and_fails_if_anything_is_refuted(capsys, monkeypatch):
    assert verify.main() == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("| operation | kernel |")
    assert all("| proved |" in line for line in lines[2:]) and len(lines) > 2

    def broken():
        proof = Proof("test", "kernel")
        proof.state("it is small", proof.integer("x", 0, 9) < 9)
        yield proof

    monkeypatch.setattr(verify, "all_proofs", broken)
    assert verify.main() == 1
    assert "| test | kernel | it is small | refuted by x = 9 |" in capsys.readouterr().out
