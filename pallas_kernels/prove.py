"""Prove statements about index functions for all shapes at once, with the solver Z3.

A `Symbol` stands for any integer of a range. Python's operators and `index_math` work on it as they
do on numbers, so that a kernel's own functions, given symbols, return what they would compute. All
that is computed on the way is remembered: that int32 holds it is one of the statements.
"""

from __future__ import annotations

import time
from typing import NamedTuple

import z3

from pallas_kernels.index_math import div, where

SMALLEST, LARGEST = -(2**31), 2**31 - 1
GRID_LIMIT = 2**16 - 1  # steps of the second and third axis of a CUDA grid
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
        return f"refuted by {found}"


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
        """Return whether the other holds wherever this one does."""
        return Condition(z3.Implies(self.term, _term(other)), self.proof)

    def same_as(self, other: Condition | bool) -> Condition:
        """Return whether both hold or neither."""
        return Condition(self.term == _term(other), self.proof)

    def __bool__(self) -> bool:
        raise TypeError("a condition on symbols is neither true nor false: use where, &, | and ~")


class Symbol:
    """An integer expression over variables."""

    __hash__ = None

    def __init__(self, term: z3.ArithRef, proof: Proof):
        self.term, self.proof = term, proof

    def __add__(self, other: Symbol | int) -> Symbol:
        return self.proof.compute(self.term + _term(other))

    def __sub__(self, other: Symbol | int) -> Symbol:
        return self.proof.compute(self.term - _term(other))

    def __rsub__(self, other: int) -> Symbol:
        return self.proof.compute(other - self.term)

    def __mul__(self, other: Symbol | int) -> Symbol:
        return self.proof.compute(self.term * _term(other))

    __radd__, __rmul__ = __add__, __mul__

    def __floordiv__(self, other: int) -> Symbol:
        return div(self, other)

    def __mod__(self, other: int) -> Symbol:
        return self - div(self, other) * other

    def __lt__(self, other: Symbol | int) -> Condition:
        return Condition(self.term < _term(other), self.proof)

    def __le__(self, other: Symbol | int) -> Condition:
        return Condition(self.term <= _term(other), self.proof)

    def __gt__(self, other: Symbol | int) -> Condition:
        return Condition(self.term > _term(other), self.proof)

    def __ge__(self, other: Symbol | int) -> Condition:
        return Condition(self.term >= _term(other), self.proof)

    def __eq__(self, other: Symbol | int) -> Condition:
        return Condition(self.term == _term(other), self.proof)

    def __ne__(self, other: Symbol | int) -> Condition:
        return Condition(self.term != _term(other), self.proof)


@where.register
def _(condition: Condition, a: Symbol | int, b: Symbol | int) -> Symbol:
    return Symbol(z3.If(condition.term, _term(a), _term(b)), condition.proof)


@div.register
def _(a: Symbol, b: int) -> Symbol:
    if not isinstance(b, int) or b <= 0:
        raise TypeError(f"expected an int above 0 to divide a symbol by, got {b!r}")
    a.proof.divided(a)
    return a.proof.compute(a.term / b)  # the solver's division rounds down


class Proof:
    """Statements about the index functions of one kernel."""

    def __init__(self, operation: str, kernel: str):
        self.operation, self.kernel = operation, kernel
        self._variables: list[z3.ArithRef] = []
        self._premises: list[z3.BoolRef] = []
        self._computed: list[z3.ArithRef] = []
        self._divided: list[z3.BoolRef] = []
        self._statements: list[tuple[str, z3.BoolRef]] = []

    def integer(self, name: str, low: Symbol | int, high: Symbol | int) -> Symbol:
        """Return a symbol for any integer from low to high, both included."""
        variable = z3.Int(name)
        if any(variable.eq(other) for other in self._variables):
            raise ValueError(f"{self.operation}, {self.kernel}: two symbols are named {name!r}")
        self._variables.append(variable)
        self._premises += [variable >= _term(low), variable <= _term(high)]
        return Symbol(variable, self)

    def assume(self, condition: Condition) -> None:
        """Take for granted what callers of the kernel guarantee."""
        self._premises.append(condition.term)

    def compute(self, term: z3.ArithRef) -> Symbol:
        """Return a result; that int32 holds it will be proved, too."""
        self._computed.append(term)
        return Symbol(term, self)

    def divided(self, dividend: Symbol) -> None:
        """Note a dividend: that it is not below 0 will be proved, too."""
        self._divided.append(dividend.term >= 0)

    def state(self, statement: str, condition: Condition) -> None:
        """Add what is to hold whatever the symbols stand for."""
        self._statements.append((statement, condition.term))

    def verdicts(self) -> list[Verdict]:
        """Prove or refute every statement.

        Raises:
          ValueError: nothing fulfils the premises, from which anything would follow.
        """
        if self._solver().check() == z3.unsat:
            raise ValueError(f"{self.operation}, {self.kernel}: nothing fulfils the premises")
        held = z3.And([z3.And(x >= SMALLEST, x <= LARGEST) for x in self._computed])
        statements = [
            *self._statements, ("nothing overflows int32", held),
            ("nothing below 0 is divided", z3.And(self._divided)),
        ]
        return [self._decide(*statement) for statement in statements]

    def _solver(self) -> z3.Solver:
        solver = z3.Solver()
        solver.set("timeout", round(TIME_LIMIT_S * 1000))
        solver.add(*self._premises)
        return solver

    def _decide(self, statement: str, claim: z3.BoolRef) -> Verdict:
        solver = self._solver()
        solver.add(z3.Not(claim))
        start = time.perf_counter()
        answer = solver.check()
        seconds = time.perf_counter() - start
        if answer == z3.unsat:
            return Verdict(statement, True, seconds)
        if answer == z3.unknown:
            return Verdict(statement, False, seconds)
        model = solver.model()
        values = (model.eval(v, model_completion=True).as_long() for v in self._variables)
        return Verdict(
            statement, False, seconds, dict(zip(map(str, self._variables), values, strict=True))
        )


def _term(value: Symbol | Condition | int | bool) -> z3.ExprRef:
    if isinstance(value, (Symbol, Condition)):
        return value.term
    return z3.BoolVal(value) if isinstance(value, bool) else z3.IntVal(value)
