"""Count the parameters of a model from its configuration alone."""

from __future__ import annotations

import dataclasses

from flax.linen import meta
from flax.traverse_util import flatten_dict

from dsv4_jax.config import ModelConfig
from dsv4_jax.model import param_shapes
from dsv4_jax.params import split_trainable


@dataclasses.dataclass(frozen=True, kw_only=True)
class ParamCount:
    """Trainable parameters of a model, as the report counts them."""

    total: int  # of the main model
    active: int  # of these, what one token multiplies with: no embedding, its own experts only
    mtp: int  # more, in the multi-token prediction block


def count_params(config: ModelConfig) -> ParamCount:
    """Count the trainable parameters without creating any.

    The routers' selection bias and the hash-routing tables are not trained and not counted.

    Source: fact sheet 1.5 and 13 A.
    """
    trainable, _ = split_trainable(meta.unbox(param_shapes(config)))
    sizes = {path: leaf.size for path, leaf in flatten_dict(trainable).items()}
    mtp = sum(size for path, size in sizes.items() if "mtp" in path)
    main = {path: size for path, size in sizes.items() if "mtp" not in path}
    embedding = main[("embedding",)]
    experts = sum(size for path, size in main.items() if "experts" in path)
    total = sum(main.values())
    used_experts = experts * config.num_experts_per_tok // config.n_routed_experts
    return ParamCount(total=total, active=total - embedding - experts + used_experts, mtp=mtp)
