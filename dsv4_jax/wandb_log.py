"""Metrics to Weights & Biases, by its package, which is imported only for runs that ask for it."""

from __future__ import annotations

import importlib.util
import uuid
from pathlib import Path

from dsv4_jax.errors import InputError
from dsv4_jax.files import write_atomically

FLAG = "wandb_project"
ID_FILE = "wandb_id"  # of the workdir; names the run at W&B


def check_wandb(project: str) -> None:
    """Refuse a project that could not be logged to.

    Raises:
      InputError: it has no name, or the package wandb is not installed.
    """
    if not project:
        raise InputError(f"{FLAG}: expected the name of a project, got none; name one")
    if importlib.util.find_spec("wandb") is None:
        raise InputError(
            f"{FLAG}: expected the package wandb, got none; install it by "
            "pip install 'dsv4_jax[wandb]'"
        )


class WandbLog:
    """A run at W&B; one that goes on stays the same there.

    What W&B has of steps that come again, of a run that was cut off before it could save them, it
    keeps: they are equal.

    Args:
      config: of the run, shown beside its metrics.
    Raises:
      InputError: W&B does not take the run.
    """

    def __init__(self, project: str, workdir: Path, config: dict):
        import wandb

        self._histogram = wandb.Histogram
        try:
            self._run = wandb.init(
                project=project, id=_run_id(workdir), resume="allow", dir=workdir, config=config
            )
        except wandb.Error as error:
            raise InputError(
                f"{FLAG}: expected W&B to take the run, got {str(error).rstrip('.')!r}; log in by "
                "`wandb login`, or set WANDB_MODE=offline"
            ) from error

    def metrics(self, step: int, values: dict[str, float | list[float]]) -> None:
        """Record the metrics of a step, lists as histograms."""
        if step >= self._run.step:
            self._run.log({
                name: self._histogram(x) if isinstance(x, list) else x
                for name, x in values.items()
            }, step=step)

    def close(self) -> None:
        self._run.finish()


def _run_id(workdir: Path) -> str:
    """Return the name that a workdir's run has at W&B, drawn when it is first asked for."""
    path = workdir / ID_FILE
    if not path.exists():
        write_atomically(path, uuid.uuid4().hex.encode())
    return path.read_text()
