"""Stands in for the package wandb where no test may need it."""

from __future__ import annotations

from importlib.machinery import ModuleSpec
from types import ModuleType


class FakeWandb(ModuleType):
    """Has what is used of wandb 0.31, and keeps what it is called with."""

    class Error(Exception):
        pass

    class Histogram:
        def __init__(self, values):
            self.values = values

    def __init__(self, step: int = 0, refusal: str = ""):
        super().__init__("wandb")
        self.__spec__ = ModuleSpec("wandb", None)
        self.step, self.refusal = step, refusal  # step: the next one that W&B takes
        self.opened, self.logged, self.finished = [], [], 0

    def init(self, **options):
        if self.refusal:
            raise self.Error(self.refusal)
        self.opened.append(options)
        return self

    def log(self, values, step):
        self.step = step
        self.logged.append((step, values))

    def finish(self):
        self.finished += 1
