"""Describe a training run, and read it once from an `ml_collections.ConfigDict`."""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Iterable, Mapping

from ml_collections import ConfigDict

from dsv4_jax.config import (
    SEEDS,
    ModelConfig,
    Runtime,
    check_choice,
    check_field_types,
    is_seed,
)
from dsv4_jax.errors import InputError

LARGEST = 2**31 - 1  # of sizes and counts, which are int32 in compiled programs


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The text to train on and how it is cut into rows.

    Raises:
      InputError: a value is ill-typed or out of range; so for all configs in this file.
    """

    source: str = "stdlib"  # or "needle", a text file, directory or .jsonl; see `read_corpus`
    text_field: str = "text"  # key of the text in each line of a .jsonl file
    tokenizer: str | None = None  # path of a tokenizer.json; None trains one of vocab_size entries
    seq_len: int  # tokens per row; 4096 first, later 16K, 64K and 1M (report 4.2.2)
    batch_size: int  # rows per optimizer step, over all hosts and micro-batches
    seed: int = 0  # seed of the shuffle
    held_out_fraction: float = 0.03  # share of the source that is never trained on
    held_out_bytes: int = 262_144  # most UTF-8 bytes of it that an evaluation reads

    def __post_init__(self):
        check_field_types(self)
        _check_rules(
            self,
            ("source", self.source != "", 'a path, "stdlib" or "needle"'),
            ("text_field", self.text_field != "", "a key"),
            ("tokenizer", self.tokenizer != "", "a path or None"),
            ("seq_len", self.seq_len >= 2, "at least 2: a token and its successor"),
            ("batch_size", self.batch_size >= 1, "at least 1"),
            ("seed", is_seed(self.seed), SEEDS),
            ("held_out_fraction", 0 < self.held_out_fraction < 1, "between 0 and 1, exclusive"),
            ("held_out_bytes", self.held_out_bytes >= 1, "at least 1"),
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """Muon for matrices, AdamW for the rest, and the learning-rate schedule of both.

    Source: report sections 2.4 and 4.2.2.
    """

    name: str = "muon"  # "muon", or "adamw" for all weights
    learning_rate: float  # peak, per step; Muon's and AdamW's
    end_learning_rate: float  # after the decay
    warmup_steps: int  # steps of linear rise from 0
    decay_fraction: float  # share of the steps, at the end, in cosine decay
    weight_decay: float = 0.1  # decoupled, times the learning rate
    beta1: float = 0.9  # AdamW: decay of the mean of gradients
    beta2: float = 0.95  # AdamW: decay of the mean of squared gradients
    eps: float = 1e-20  # AdamW: floor of the denominator
    muon_momentum: float = 0.95  # Muon: decay of the momentum
    muon_rms: float = 0.18  # Muon: root mean square of an update's entries
    muon_dtype: str = "float32"  # Muon: of the Newton-Schulz products, or "bfloat16"
    clip_norm: float = 1.0  # largest global gradient norm; unpublished for V4
    train_indexer: bool = False  # False freezes the indexers, which the loss does not reach

    def __post_init__(self):
        check_field_types(self)
        check_choice("OptimizerConfig.name", self.name, ("muon", "adamw"))
        check_choice("OptimizerConfig.muon_dtype", self.muon_dtype, ("float32", "bfloat16"))
        _check_rules(
            self,
            *((name, _is_positive(getattr(self, name)), "a positive number")
              for name in ("learning_rate", "eps", "muon_rms", "clip_norm")),
            *((name, 0 <= getattr(self, name) < 1, "at least 0 and below 1")
              for name in ("beta1", "beta2", "muon_momentum")),
            (
                "end_learning_rate",
                0 <= self.end_learning_rate <= self.learning_rate,
                f"between 0 and learning_rate ({self.learning_rate})",
            ),
            ("warmup_steps", self.warmup_steps >= 0, "at least 0"),
            ("decay_fraction", 0 <= self.decay_fraction <= 1, "between 0 and 1"),
            ("weight_decay", _is_non_negative(self.weight_decay), "a number of at least 0"),
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The length of a run, its losses beside the main one, and what it writes when.

    Source: report sections 2.1 and 4.2.2 for the weights.
    """

    steps: int  # optimizer steps
    accumulation: int = 1  # micro-batches per step
    mtp_weight: float = 0.3  # of the multi-token prediction loss
    mtp_weight_in_decay: float = 0.1  # the same from the start of the learning-rate decay
    balance_weight: float = 1e-4  # of the sequence-wise expert balance loss
    bias_update_rate: float = 1e-3  # step of the routers' selection bias
    skip_non_finite: bool = True  # a batch of infinite or NaN loss or gradient moves nothing
    most_skips: int = 10  # such batches in a row that end the run
    eval_every: int  # steps between evaluations of the held-out text
    checkpoint_every: int  # steps between checkpoints
    keep_checkpoints: int = 2  # newest checkpoints that are kept
    checkpoint_patience: float = 1800.0  # seconds that writing one may take
    log_every: int = 1  # steps between log lines
    seed: int = 0  # seed of the initial weights
    sample_prompt: str = "def "  # text that the final sample continues
    sample_tokens: int = 128  # length of the final sample, tokens
    sample_temperature: float = 0.8  # of the final sample; 0 takes the likeliest token
    sample_top_p: float = 0.95  # probability mass that the final sample draws from

    def __post_init__(self):
        check_field_types(self)
        counts = (
            "steps accumulation most_skips eval_every checkpoint_every keep_checkpoints log_every"
        )
        weights = "mtp_weight mtp_weight_in_decay balance_weight bias_update_rate"
        _check_rules(
            self,
            *((name, getattr(self, name) >= 1, "at least 1") for name in counts.split()),
            *((name, _is_non_negative(getattr(self, name)), "a number of at least 0")
              for name in (*weights.split(), "sample_temperature")),
            ("checkpoint_patience", _is_positive(self.checkpoint_patience), "a positive number"),
            ("seed", is_seed(self.seed), SEEDS),
            ("sample_tokens", self.sample_tokens >= 1, "at least 1"),
            ("sample_top_p", 0 < self.sample_top_p <= 1, "above 0 and at most 1"),
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Devices along each mesh axis; their product divides the number of devices."""

    data: int = 1  # copies of the parameters
    fsdp: int = 1  # parts of the parameters, gathered for use
    expert: int = 1  # parts of the routed experts
    tensor: int = 1  # parts of heads and expert widths

    def __post_init__(self):
        check_field_types(self)
        _check_rules(
            self,
            *((field.name, getattr(self, field.name) >= 1, "at least 1")
              for field in dataclasses.fields(self)),
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One training run: a section for each of its parts.

    Raises:
      InputError: sections contradict each other; the message names the dotted keys.
    """

    model: ModelConfig
    runtime: Runtime
    data: DataConfig
    optimizer: OptimizerConfig
    train: TrainConfig
    mesh: MeshConfig

    @classmethod
    def from_config_dict(cls, config_dict: ConfigDict | Mapping) -> RunConfig:
        """Read a mapping of sections, such as `get_config()` in configs/ returns.

        Raises:
          InputError: one line with the dotted key that is unknown, missing, ill-typed or out of
            range, what was expected there and what came.
        """
        if not isinstance(config_dict, (ConfigDict, Mapping)):
            raise InputError(f"config: expected a mapping of sections, got {config_dict!r}")
        check_known("", config_dict, _SECTIONS)
        return cls(**{
            name: _read_section(name, kind, config_dict[name] if name in config_dict else {})
            for name, kind in _SECTIONS.items()
        })

    def to_dict(self) -> dict[str, dict]:
        """Return the sections as JSON types; `from_config_dict` reads them back."""
        return {
            name: {key: _jsonable(getattr(getattr(self, name), key)) for key in _fields(kind)}
            for name, kind in _SECTIONS.items()
        }

    def __post_init__(self):
        _check_sizes(self)
        rows, parts = self.data.batch_size, self.train.accumulation
        context = self.model.max_position_embeddings
        rules = (
            ("data.batch_size", rows, rows % parts == 0,
             f"a multiple of train.accumulation ({parts})"),
            ("data.seq_len", self.data.seq_len, self.data.seq_len <= context,
             f"at most model.max_position_embeddings ({context})"),
            ("train.sample_tokens", self.train.sample_tokens, self.train.sample_tokens < context,
             f"less than model.max_position_embeddings ({context})"),
        )
        for key, value, holds, expected in rules:
            if not holds:
                raise InputError(f"{key}: expected {expected}, got {value}")


_SECTIONS = {
    "model": ModelConfig,
    "runtime": Runtime,
    "data": DataConfig,
    "optimizer": OptimizerConfig,
    "train": TrainConfig,
    "mesh": MeshConfig,
}


def _read_section(section: str, kind: type, values: ConfigDict | Mapping):
    if not isinstance(values, (ConfigDict, Mapping)):
        raise InputError(f"{section}: expected a section of keys, got {values!r}")
    fields = _fields(kind)
    check_known(f"{section}.", values, fields)
    for name, field in fields.items():
        required = field.default is dataclasses.MISSING
        if required and name not in values:
            raise InputError(
                f"{section}.{name}: expected {field.type}, got nothing; it has no default, set it "
                f"in the config or by --config.{section}.{name}=VALUE"
            )
    try:
        return kind(**{key: _hashable(values[key]) for key in values})
    except InputError as error:
        # The types name themselves; here the reader knows them by their section.
        message = str(error).removeprefix(f"{kind.__name__}.")
        raise InputError(f"{section}.{message}") from error


def _fields(kind: type) -> dict[str, dataclasses.Field]:
    """Return the fields that a config sets: all but the runtime's mesh, made of `MeshConfig`."""
    fields = {field.name: field for field in dataclasses.fields(kind)}
    if kind is Runtime:
        del fields["mesh"]
    return fields


def check_known(prefix: str, given: Iterable[str], known: Iterable[str]) -> None:
    """Raise an InputError for the first given key that is not known, with the closest known."""
    for key in given:
        if key not in known:
            close = _closest(str(key), list(known))
            hint = f"did you mean {prefix}{close}?" if close else f"known: {', '.join(known)}"
            raise InputError(f"{prefix}{key}: expected a known key, got an unknown one; {hint}")


def is_misspelling(text: str, other: str) -> bool:
    """Say whether at most two letters inserted, deleted or replaced make one text the other."""
    return abs(len(text) - len(other)) <= 2 and _edits(text, other) <= 2


def _closest(key: str, known: list[str]) -> str | None:
    """Return the known key of which this is a misspelling, or one that has much in common."""
    # difflib alone finds no short key of which one letter is left.
    misspelt = [name for name in known if is_misspelling(key, name)]
    if misspelt:
        return min(misspelt, key=lambda name: _edits(key, name))
    return next(iter(difflib.get_close_matches(key, known, n=1)), None)


def _edits(text: str, other: str) -> int:
    """Return the Levenshtein distance of two texts."""
    row = list(range(len(other) + 1))
    for i, letter in enumerate(text, start=1):
        above, row = row, [i]
        for j, wanted in enumerate(other):
            row.append(min(above[j + 1] + 1, row[j] + 1, above[j] + (letter != wanted)))
    return row[-1]


def _check_sizes(config: RunConfig) -> None:
    """Raise an InputError for the first whole number, seeds aside, that JAX would not take."""
    for section, kind in _SECTIONS.items():
        for name, field in _fields(kind).items():
            value = getattr(getattr(config, section), name)
            is_size = field.type == "int" and name not in ("seed", "hash_seed")
            if is_size and value > LARGEST:
                raise InputError(f"{section}.{name}: expected at most 2^31 - 1, got {value}")


def _check_rules(config, *rules: tuple[str, bool, str]) -> None:
    """Raise an InputError for the first (field, whether it holds, what is expected) that fails."""
    for name, holds, expected in rules:
        if not holds:
            value = getattr(config, name)
            raise InputError(f"{type(config).__name__}.{name}: expected {expected}, got {value!r}")


def _is_positive(value: float) -> bool:
    return 0 < value < math.inf


def _is_non_negative(value: float) -> bool:
    return 0 <= value < math.inf


def _hashable(value):
    return tuple(value) if isinstance(value, list) else value


def _jsonable(value):
    return list(value) if isinstance(value, tuple) else value
