"""Optimise weight matrices by Muon and all other leaves by AdamW."""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh

from dsv4_jax.muon_shards import directions
from dsv4_jax.newton_schulz import as_matrices, orthogonalize
from dsv4_jax.params import BATCH, IN, OUT
from dsv4_jax.shapes import Array
from pallas_kernels.implementation import XLA

if TYPE_CHECKING:
    from dsv4_jax.run_config import OptimizerConfig

MUON, ADAMW = RULES = ("muon", "adamw")
MODEL, INDEXERS = LEARNERS = ("model", "indexers")  # each learns from a loss of its own

# Matrices that AdamW updates all the same: lookups and the map to logits.
ADAMW_MATRICES = frozenset({"embedding", "head"})


def make_optimizer(
    config: OptimizerConfig, kinds: dict, learners: Collection[str] = LEARNERS,
    implementation: str = XLA, placed: Placed | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Build the whole optimizer: clip by the global norm, then Muon and AdamW.

    `update` takes the `learning_rate` of the step as a keyword. The gradients of the model and of
    its indexers are clipped apart, so that neither loss changes what the other moves.

    Weight decay is for all leaves, norm weights included: the report exempts none.

    Args:
      kinds: axis kinds of the trainable parameters, `split_trainable(kinds_of(boxed))[0]`.
      learners: which of "model" and "indexers" learn. The leaves of others and their moments stay
        as they are; the state has the same form for any choice.
      implementation: of the products in Newton-Schulz iterations.
      placed: where the moments lie; None: on one device.
    """
    labels = label_leaves(kinds, config)
    transforms = {}
    for learner, rule in itertools.product(LEARNERS, RULES):
        name = f"{learner} {rule}"
        if rule == MUON:
            own = partial(_leaves_labelled, name, labels)
            where = placed and placed._replace(splits=own(placed.splits))
            direction = scale_by_muon(
                own(kinds), momentum=config.muon_momentum, rms=config.muon_rms,
                dtype=config.muon_dtype, implementation=implementation, placed=where,
            )
        else:
            direction = optax.scale_by_adam(b1=config.beta1, b2=config.beta2, eps=config.eps)
        update = optax.chain(
            direction, optax.add_decayed_weights(config.weight_decay), _descend()
        )
        transforms[name] = update if learner in learners else _resting(update)
    clips = (
        optax.masked(
            optax.clip_by_global_norm(config.clip_norm), leaves_of_learner(labels, learner)
        )
        for learner in LEARNERS
    )
    return optax.chain(*clips, optax.partition(transforms, labels))


def _leaves_labelled(name: str, labels: dict, tree: dict) -> dict:
    """Return a tree with what it has for the leaves of one label, as `optax.partition` does."""
    return jax.tree.map(
        lambda label, leaf: leaf if label == name else optax.MaskedNode(), labels, tree
    )


def learner_of(path: tuple[str, ...]) -> str:
    """Say who learns the leaf at a path of the parameters: "model" or "indexers"."""
    return INDEXERS if "indexer" in path else MODEL


def leaves_of_learner(labels: dict, learner: str) -> dict:
    """Return a tree of bools: which leaves of `label_leaves` are this learner's."""
    return jax.tree.map(lambda label: label.startswith(learner), labels)


def _descend() -> optax.GradientTransformationExtraArgs:
    """Multiply updates by minus the learning rate, which `update` is given."""

    def update(updates, state, params=None, *, learning_rate, **_):
        del params
        return jax.tree.map(lambda u: -learning_rate * u, updates), state

    return optax.GradientTransformationExtraArgs(optax.init_empty_state, update)


def _resting(transform: optax.GradientTransformation) -> optax.GradientTransformation:
    """Return a transform with the same state, which neither changes it nor moves anything."""

    def update(updates, state, params=None):
        del params
        return jax.tree.map(jnp.zeros_like, updates), state

    return optax.GradientTransformation(transform.init, update)


def label_leaves(kinds: dict, config: OptimizerConfig) -> dict:
    """Say for each leaf who learns it and by which rule, as in "model muon" or "indexers adamw".

    Muon takes the matrices (leaves with "in" axes) but the embedding and the head. AdamW takes
    those two and all that is no matrix: norm weights, mHC base and scale, attention sinks, and
    the compressor's position bias, which is a table added to scores and maps nothing.

    Source: report sections 2.4 and 4.2.2; the place of the position bias is our choice.
    """

    def label(path: tuple[str, ...], leaf_kinds: tuple[str, ...]) -> str:
        by_adamw = config.name == ADAMW or IN not in leaf_kinds or path[-1] in ADAMW_MATRICES
        return f"{learner_of(path)} {ADAMW if by_adamw else MUON}"

    flat = flatten_dict(kinds)
    return unflatten_dict({path: label(path, leaf_kinds) for path, leaf_kinds in flat.items()})


def learning_rate_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Make the schedule: linear warm-up, constant, cosine decay at the end of the run.

    The first step (count 0) already moves, by 1 / warmup_steps of the peak; the last one
    (count steps - 1) is at `end_learning_rate`, as are all later ones.

    Source: report section 4.2.2; where the decay starts is not published.
    """
    peak, end = config.learning_rate, config.end_learning_rate
    start = decay_start(config, steps)

    def schedule(count):
        step = count + 1
        warmup = jnp.minimum(1.0, step / max(1, config.warmup_steps))
        decayed = jnp.clip((step - start) / max(1, steps - start), 0.0, 1.0)
        return warmup * (end + (peak - end) * 0.5 * (1.0 + jnp.cos(math.pi * decayed)))

    return schedule


def decay_start(config: OptimizerConfig, steps: int) -> int:
    """Return the number of steps taken when the learning rate begins to decay."""
    return steps - round(config.decay_fraction * steps)


def muon(
    learning_rate: optax.ScalarOrSchedule,
    kinds: dict,
    *,
    momentum: float = 0.95,
    weight_decay: float = 0.1,
    rms: float = 0.18,
    dtype: str = "float32",
) -> optax.GradientTransformationExtraArgs:
    """Optimise matrices by Muon: W <- W (1 - lr weight_decay) - lr O, O as in `scale_by_muon`.

    Source: report section 2.4.
    """
    return optax.chain(
        scale_by_muon(kinds, momentum=momentum, rms=rms, dtype=dtype),
        optax.add_decayed_weights(weight_decay),
        optax.scale_by_learning_rate(learning_rate),
    )


class Placed(NamedTuple):
    """How the moments of parameters lie on a mesh."""

    mesh: Mesh
    splits: dict  # a tree as the parameters; leaves are tuples of `AxisSplit`s


class MuonState(NamedTuple):
    """The momentum M: float32, shaped as the parameters."""

    momentum: optax.Updates


def scale_by_muon(
    kinds: dict, *, momentum: float, rms: float, dtype: str, implementation: str = XLA,
    placed: Placed | None = None,
) -> optax.GradientTransformation:
    """Replace gradients G by O, orthogonalised momentum whose elements have a given RMS.

    M <- momentum M + G;  O = orthogonalize(momentum M + G) sqrt(max(n, m)) rms

    An [n, m] matrix with min(n, m) singular values of 1 has RMS 1 / sqrt(max(n, m)). A matrix
    that has seen no gradient gets O = 0.

    Args:
      kinds: a tree as the parameters; leaves are tuples with the kind of each axis.
      dtype: of the factors in Newton-Schulz products, "float32" or "bfloat16".
      implementation: of the symmetric ones of these products.
      placed: where the momentum lies; None: on one device.
    Raises:
      ValueError: by `update`, if a leaf's axes are not batch, then in, then out axes.
    """

    def init(params):
        return MuonState(jax.tree.map(lambda w: jnp.zeros_like(w, dtype=jnp.float32), params))

    def update(gradients, state, params=None):
        del params
        jax.tree_util.tree_map_with_path(_check_kinds, gradients, kinds)

        def accumulate(m, g):
            return momentum * m + g

        def direction(matrices):
            scale = rms * math.sqrt(max(matrices.shape[-2:]))
            return scale * orthogonalize(matrices, dtype=dtype, implementation=implementation)

        moments = jax.tree.map(accumulate, state.momentum, gradients)
        lookahead = jax.tree.map(accumulate, moments, gradients)
        leaves, structure = jax.tree.flatten(lookahead)
        own_kinds = structure.flatten_up_to(kinds)
        if placed is None:
            found = [direction(as_matrices(leaf, own)).reshape(leaf.shape)
                     for leaf, own in zip(leaves, own_kinds, strict=True)]
        else:
            splits = structure.flatten_up_to(placed.splits)
            found = directions(leaves, own_kinds, splits, placed.mesh, direction)
        return jax.tree.unflatten(structure, found), MuonState(moments)

    return optax.GradientTransformation(init, update)


def _check_kinds(path, weight: Array, kinds: tuple[str, ...]) -> None:
    n_batch, n_in, n_out = (kinds.count(kind) for kind in (BATCH, IN, OUT))
    ordered = kinds == (BATCH,) * n_batch + (IN,) * n_in + (OUT,) * n_out
    if not (ordered and n_in and n_out and len(kinds) == weight.ndim):
        raise ValueError(
            f"Muon: expected axes of kind batch (any number), in and out (at least one each), in "
            f"this order, got {kinds} for {jax.tree_util.keystr(path)} of shape {weight.shape}; "
            f"declare it so or leave it to AdamW"
        )
