"""Prove statements about index functions for all shapes at once, with the solver Z3.

A `Symbol` stands for any int32 of a range. Python's operators and `index_math` work on it as they
do on integers, so that a kernel's own functions, given symbols, return what they would compute.
Everything computed on the way is remembered: that none of it leaves int32 is one of the statements.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

import z3

from pallas_kernels.index_math import where

SMALLEST, LARGEST = -(2**31), 2**31 - 1
TIME_LIMIT_S = 5.0


class Verdict(NamedTuple):
    """What became of one statement."""

    statement: str
    proved: bool
    seconds: float
    counterexample: dict[str, int] | None = None  # None: proved, or nothing found in time

    def __str__(self) -> str:
        if self.proved:
            return "proved"
        if self.counterexample is None:
            return f"no answer within {TIME_LIMIT_S:g} s"
        found = ", ".join(f"{name} = {value}" for name, value in self.counterexample.items())
        return f"REFUTED by {found}"


class Condition:
    """A truth that depends on symbols."""

    def __init__(self, term: z3.BoolRef, proof: Proof):
        self.term, self.proof = term, proof

    def __and__(self, other: Condition | bool) -> Condition:
        return Condition(z3.And(self.term, _term(other)), self.proof)

    def __or__(self, other: Condition | bool) -> Condition:
        return Condition(z3.Or(self.term, _term(other)), self.proof)

    __rand__, __ror__ = __and__, __or__

    def __invert__(self) -> Condition:
        return Condition(z3.Not(self.term), self.proof)

    def implies(self, other: Condition | bool) -> Condition:
        return Condition(z3.Implies(self.term, _term(other)), self.proof)

    def same_as(self, other: Condition | bool) -> Condition:
        return Condition(self.term == _term(other), self.proof)

    def __bool__(self) -> bool:
        raise TypeError("a symbolic condition has no truth of its own: use index_math.where, &, |, ~")


class Symbol:
    """An integer expression over variables."""

    def __init__(self, term: z3.ArithRef, proof: Proof):
        self.term, self.proof = term, proof

    def _computed(self, term: z3.ArithRef) -> Symbol:
        return self.proof.computed(term)

    def __add__(self, other): return self._computed(self.term + _term(other))
    def __radd__(self, other): return self._computed(_term(other) + self.term)
    def __sub__(self, other): return self._computed(self.term - _term(other))
    def __rsub__(self, other): return self._computed(_term(other) - self.term)
    def __mul__(self, other): return self._computed(self.term * _term(other))
    def __rmul__(self, other): return self._computed(_term(other) * self.term)
    def __neg__(self): return self._computed(-self.term)

    # For a divisor above 0 the solver's integer division rounds down, as Python's does.
    def __floordiv__(self, other): return self._computed(self.term / _divisor(other))
    def __mod__(self, other): return self._computed(self.term % _divisor(other))

    def __lt__(self, other): return Condition(self.term < _term(other), self.proof)
    def __le__(self, other): return Condition(self.term <= _term(other), self.proof)
    def __gt__(self, other): return Condition(self.term > _term(other), self.proof)
    def __ge__(self, other): return Condition(self.term >= _term(other), self.proof)
    def __eq__(self, other): return Condition(self.term == _term(other), self.proof)
    def __ne__(self, other): return Condition(self.term != _term(other), self.proof)

    __hash__ = None


@where.register
def _(condition: Condition, a, b):
    return Symbol(z3.If(condition.term, _term(a), _term(b)), condition.proof)


class Proof:
    """Statements about one kernel's index functions."""

    def __init__(self, name: str):
        self.name = name
        self._assumed: list[z3.BoolRef] = []
        self._computed: list[z3.ArithRef] = []
        self._variables: list[z3.ArithRef] = []
        self._statements: list[tuple[str, z3.BoolRef]] = []

    def integer(self, name: str, low, high) -> Symbol:
        """Return any integer from low to high, both included."""
        variable = z3.Int(name)
        self._variables.append(variable)
        self._assumed += [variable >= _term(low), variable <= _term(high)]
        return Symbol(variable, self)

    def computed(self, term: z3.ArithRef) -> Symbol:
        """Return a result and remember that int32 must hold it."""
        self._computed.append(term)
        return Symbol(term, self)

    def assume(self, condition: Condition) -> None:
        """Take for granted what the kernel's caller guarantees."""
        self._assumed.append(condition.term)

    def state(self, statement: str, condition: Condition | bool) -> None:
        """Add what is to hold for all values of the symbols."""
        self._statements.append((statement, _term(condition)))

    def verdicts(self) -> list[Verdict]:
        """Prove or refute each statement, and that int32 holds all that was computed."""
        held = [z3.And(term >= SMALLEST, term <= LARGEST) for term in self._computed]
        statements = [*self._statements, ("nothing overflows int32", z3.And(held))]
        return [self._decide(*statement) for statement in statements]

    def _decide(self, statement: str, claim: z3.BoolRef) -> Verdict:
        solver = z3.Solver()
        solver.set("timeout", round(TIME_LIMIT_S * 1000))
        solver.add(*self._assumed, z3.Not(claim))
        start = time.perf_counter()
        answer = solver.check()
        seconds = time.perf_counter() - start
        if answer == z3.unsat:
            return Verdict(statement, True, seconds)
        found = None
        if answer == z3.sat:
            model = solver.model()
            found = {
                str(v): model.eval(v, model_completion=True).as_long() for v in self._variables
            }
        return Verdict(statement, False, seconds, found)


def _term(value) -> z3.ExprRef:
    return value.term if isinstance(value, (Symbol, Condition)) else z3.BoolVal(value) if isinstance(
        value, bool
    ) else z3.IntVal(value)


def _divisor(value: int) -> z3.ArithRef:
    if not isinstance(value, int) or value <= 0:
        raise TypeError(f"division of a symbol: expected an int above 0 to divide by, got {value!r}")
    return z3.IntVal(value)
