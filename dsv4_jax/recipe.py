"""How a cluster of a kind and size shares a model: what a config file has a table of."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping

from ml_collections import ConfigDict

from dsv4_jax.errors import InputError, shown
from dsv4_jax.sharding import POD


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """The shape of a mesh for one kind of device; copies of the model fill up a cluster."""

    expert: int  # devices along these axes
    fsdp: int = 1
    tensor: int = 1
    layout: str = POD
    tokens: int  # that a device takes at once, unless a row is longer
    runtime: Mapping[str, object] = dataclasses.field(default_factory=dict)  # what it changes there
    reason: str  # for this shape

    @property
    def devices(self) -> int:
        """How many devices share a copy of the model, and so the least that are needed."""
        return math.prod((self.expert, self.fsdp, self.tensor))


def with_recipe(config: ConfigDict, recipes: Mapping[str, Recipe], cluster: str) -> ConfigDict:
    """Return a run's config, locked, for a cluster: its mesh, and batches that fall into its rows.

    The tokens of a batch change to the nearest multiple of what all devices take at once. A stage
    with fewer rows than devices stays as it is.

    Args:
      recipes: by the kind of device.
      cluster: `KIND-COUNT`, the count being of devices; "" leaves the config as it is.
    Raises:
      InputError: there is no recipe for this kind, or the count is no multiple of its devices.
    """
    if not cluster:
        return config.lock()
    kind, count = _parse(cluster, recipes)
    recipe = recipes[kind]
    if count % recipe.devices:
        fitting = max(round(count / recipe.devices), 1) * recipe.devices
        raise InputError(
            f"--config: expected a multiple of the {recipe.devices} devices that share the model "
            f"by the recipe for {kind}, got {count}; {kind}-{fitting} would fit"
        )
    with config.unlocked():
        config.mesh.update(
            data=count // recipe.devices, expert=recipe.expert, fsdp=recipe.fsdp,
            tensor=recipe.tensor, layout=recipe.layout,
        )
        config.runtime.update(recipe.runtime)
        for stage in config.stages.values():
            at_once = max(recipe.tokens // stage.seq_len, 1) * stage.seq_len
            at_once *= count // recipe.tensor
            if at_once <= stage.batch_tokens:
                stage.accumulation = round(stage.batch_tokens / at_once)
                stage.batch_tokens = stage.accumulation * at_once
    return config.lock()


def _parse(cluster: str, recipes: Mapping[str, Recipe]) -> tuple[str, int]:
    found = re.fullmatch(r"(\w+)-([1-9][0-9]{0,6})", cluster)
    if found is None or found[1] not in recipes:
        raise InputError(
            f"--config: expected KIND-DEVICES after the file's colon, with a kind of "
            f"{', '.join(recipes)}, got {shown(cluster)}; give one such as "
            f"{next(iter(recipes))}-{next(iter(recipes.values())).devices}"
        )
    return found[1], int(found[2])
