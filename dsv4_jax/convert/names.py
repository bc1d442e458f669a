"""The ways in which checkpoints name the same tensors.

The original names are DeepSeek's. Those of transformers' modules differ and stack the experts. What
transformers' `save_pretrained` writes is a hybrid: mostly original names below `model.`.

Source: fact sheet 10.4; the hybrid was taken from files written by transformers 5.23 and 5.24.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from typing import NamedTuple

import numpy as np

from dsv4_jax.convert.table import MTP_PREFIX, Tensor
from dsv4_jax.errors import InputError, shown


class Place(NamedTuple):
    """Where the values of a tensor are in a file."""

    name: str
    expert: int | None = None  # its index in a stack of experts
    half: int = 0  # of the rows that an expert has there
    halves: int = 1


class Naming(NamedTuple):
    """One way to name tensors."""

    name: str
    title: str
    place: Callable[[Tensor], Place]
    scale_suffix: str  # written; read are both of SCALE_SUFFIXES


SCALE_SUFFIXES = ("scale", "weight_scale_inv")


def _original(tensor: Tensor) -> Place:
    return Place(tensor.name)


# Hybrid names that are not "model." and the original name.
_HYBRID = {
    "embed.weight": "model.embed_tokens.weight",
    "head.weight": "head.weight",
    "hc_head_fn": "model.hc_head.hc_fn",
    "hc_head_base": "model.hc_head.hc_base",
    "hc_head_scale": "model.hc_head.hc_scale",
}


def _hybrid(tensor: Tensor) -> Place:
    if tensor.name.startswith(MTP_PREFIX):
        return Place(tensor.name)
    name = _HYBRID.get(tensor.name, f"model.{tensor.name}")
    return Place(name.replace(".attn.kv_norm.", ".attn.norm."))


# The half of an expert's rows that each of its matrices is, and how many there are.
_HALVES = {"w1": (0, 2), "w3": (1, 2), "w2": (0, 1)}


def _hf(tensor: Tensor) -> Place:
    if tensor.expert is None or tensor.name.startswith(MTP_PREFIX):
        return Place(tensor.hf)
    return Place(tensor.hf, tensor.expert, *_HALVES[tensor.name.split(".")[-2]])


def _hf_apart(tensor: Tensor) -> Place:
    if tensor.expert is None or tensor.name.startswith(MTP_PREFIX):
        return Place(tensor.hf)
    return Place(f"model.{tensor.name}".replace(".ffn.", ".mlp."))


ORIGINAL = Naming("deepseek", "DeepSeek's original names", _original, "scale")
HF = Naming("hf", "names of transformers' modules", _hf, "weight_scale_inv")
# Quantised experts have scales of their own, which transformers stacks as it loads.
HF_APART = Naming(
    "hf", "names of transformers' modules, experts apart", _hf_apart, "weight_scale_inv"
)
HYBRID = Naming("hybrid", "names written by transformers' save_pretrained", _hybrid, "scale")
NAMINGS = (ORIGINAL, HF, HF_APART, HYBRID)


class FileTensor(NamedTuple):
    """A tensor of a file: one of the model's, or those of all experts of a layer."""

    name: str
    tensors: tuple[Tensor, ...]  # in the order of their values
    stack: int | None  # experts; None: it is a single tensor
    halves: int  # tensors that lie behind one another in the rows of an expert

    def shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape in the file, given that of one of the model's tensors."""
        if self.stack is None:
            return shape
        return (self.stack, shape[0] * self.halves, *shape[1:])

    def pick(self, values: np.ndarray, index: int) -> np.ndarray:
        """Return what belongs to one of `tensors`."""
        if self.stack is None:
            return values
        return values.reshape(len(self.tensors), -1, *values.shape[2:])[index]


def file_tensors(naming: Naming, tensors: Iterable[Tensor]) -> list[FileTensor]:
    """Return the tensors of the files that hold a model's tensors."""
    together: dict[str, list[tuple[Place, Tensor]]] = {}
    for tensor in tensors:
        place = naming.place(tensor)
        together.setdefault(place.name, []).append((place, tensor))
    found = []
    for name, placed in together.items():
        placed.sort(key=lambda pair: (pair[0].expert or 0, pair[0].half))
        first = placed[0][0]
        stack = None if first.expert is None else len(placed) // first.halves
        found.append(FileTensor(name, tuple(t for _, t in placed), stack, first.halves))
    return found


def scale_name(name: str, suffix: str) -> str:
    """Return the name of the scales of a quantised tensor."""
    stem, _, last = name.rpartition(".")
    return f"{stem}.{suffix}" if last == "weight" else f"{name}_scale_inv"


def naming_of(names: Collection[str], tensors: Iterable[Tensor]) -> Naming:
    """Return the naming that most names of a checkpoint follow.

    Raises:
      InputError: none of the names is one of DeepSeek-V4's.
    """
    tensors = list(tensors)
    hits = {
        naming: sum(naming.place(tensor).name in names for tensor in tensors) for naming in NAMINGS
    }
    best = max(NAMINGS, key=hits.get)
    if not hits[best]:
        found = ", ".join(map(shown, sorted(names)[:3]))
        raise InputError(
            "expected tensors of DeepSeek-V4, such as 'layers.0.attn.wq_a.weight' or "
            f"'model.layers.0.self_attn.q_a_proj.weight', got {found or 'none'}"
        )
    return best
