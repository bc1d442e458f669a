"""Describe a training run, and read it once from an `ml_collections.ConfigDict`."""

from __future__ import annotations

import bisect
import dataclasses
import difflib
import itertools
import math
from collections.abc import Iterable, Mapping

from ml_collections import ConfigDict

from dsv4_jax.config import (
    CSA,
    SEEDS,
    ModelConfig,
    Runtime,
    check_choice,
    check_field_types,
    is_seed,
)
from dsv4_jax.encoding_texts import THINKING
from dsv4_jax.errors import InputError
from dsv4_jax.sharding import LAYOUTS, MESH_AXES, POD

LARGEST = 2**31 - 1  # of sizes and counts, which are int32 in compiled programs
CHAT = "chat"  # of the formats of data
DENSE, INDEXER, SPARSE = ATTENTION_MODES = ("dense", "indexer", "sparse")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The text to train on and how it is cut into rows.

    Raises:
      InputError: a value is ill-typed or out of range; so for all configs in this file.
    """

    source: str = "stdlib"  # or "needle", a text file, directory or .jsonl; see `read_corpus`
    format: str = "text"  # or "chat": lines of messages, see `chats.read_examples`
    text_field: str = "text"  # key of the text in each line of a .jsonl file
    thinking: str = "off"  # of chats that do not say: "off", "high" or "max" before an answer
    tokenizer: str | None = None  # path of a tokenizer.json; None trains one of vocab_size entries
    seed: int = 0  # seed of the shuffle
    held_out_fraction: float = 0.03  # share of the source that is never trained on
    held_out_bytes: int = 262_144  # most UTF-8 bytes of it that an evaluation reads

    def __post_init__(self):
        check_field_types(self)
        check_choice("DataConfig.format", self.format, ("text", CHAT))
        check_choice("DataConfig.thinking", self.thinking, tuple(THINKING))
        _check_rules(
            self,
            ("source", self.source != "", 'a path, "stdlib" or "needle"'),
            ("text_field", self.text_field != "", "a key"),
            ("tokenizer", self.tokenizer != "", "a path or None"),
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
    clip_norm: float = 1.0  # largest gradient norm, of model and indexers each; unpublished for V4

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
class StageConfig:
    """One part of a run: rows of one length, in batches of one size, for so many tokens.

    Sparse attention is brought in by stages. In "dense" ones CSA layers attend to all compressed
    entries that a query sees, and their indexers rest. In an "indexer" stage the indexers alone
    learn where that attention goes. In "sparse" ones each query attends to the entries that the
    indexer scores best; the indexer goes on learning from the attention among these, and the rest
    of the model from the language loss.

    Source: report 4.2.2; fact sheet 5 (what "dense" is, and the indexer's loss, are unpublished).
    """

    tokens: int  # of all its batches; the last one is filled up
    seq_len: int  # tokens per row
    batch_tokens: int  # tokens per optimizer step, over all hosts and micro-batches
    accumulation: int = 1  # micro-batches per step
    attention: str = "sparse"  # of CSA layers: "dense", "indexer" or "sparse"
    mtp_weight: float | None = None  # None: `train.mtp_weight` and `.mtp_weight_in_decay`
    learning_rate: float | None = None  # for all of the stage; None: the optimizer's schedule

    def __post_init__(self):
        check_field_types(self)
        check_choice("StageConfig.attention", self.attention, ATTENTION_MODES)
        weight, rate = self.mtp_weight, self.learning_rate
        _check_rules(
            self,
            ("tokens", self.tokens >= 1, "at least 1"),
            ("seq_len", self.seq_len >= 2, "at least 2: a token and its successor"),
            ("batch_tokens", self.batch_tokens >= 1, "at least 1"),
            ("accumulation", self.accumulation >= 1, "at least 1"),
            ("mtp_weight", weight is None or _is_non_negative(weight), "a number of at least 0"),
            ("learning_rate", rate is None or _is_positive(rate), "a positive number"),
        )
        _check_rules(
            self,
            (
                "batch_tokens", self.batch_tokens % self.seq_len == 0,
                f"a multiple of seq_len ({self.seq_len})",
            ),
            (
                "accumulation", self.rows % self.accumulation == 0,
                f"a divisor of the {self.rows} rows of a batch",
            ),
        )

    @property
    def rows(self) -> int:
        """Rows of a batch."""
        return self.batch_tokens // self.seq_len

    @property
    def steps(self) -> int:
        """Optimizer steps of the stage."""
        return -(-self.tokens // self.batch_tokens)

    @property
    def csa(self) -> str:
        """How CSA attends, for `Runtime`."""
        return "sparse" if self.attention == SPARSE else "dense"


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The losses of a run beside the main one, and what it writes when.

    Source: report sections 2.1 and 4.2.2 for the weights.
    """

    mtp_weight: float = 0.3  # of the multi-token prediction loss
    mtp_weight_in_decay: float = 0.1  # the same from the start of the learning-rate decay
    balance_weight: float = 1e-4  # of the sequence-wise expert balance loss
    bias_update_rate: float = 1e-3  # step of the routers' selection bias
    deterministic: bool = True  # equal runs have equal bits on GPU, too, where it takes time
    skip_non_finite: bool = True  # a batch of infinite or NaN loss or gradient moves nothing
    most_skips: int = 10  # such batches in a row that end the run
    eval_every: int  # steps between evaluations of the held-out text
    checkpoint_every: int  # steps between checkpoints
    keep_checkpoints: int = 2  # newest checkpoints that are kept
    checkpoint_patience: float = 1800.0  # seconds that writing one may take
    log_every: int = 1  # steps between log lines
    seed: int = 0  # seed of the initial weights
    sample_prompt: str = "def "  # text that the final sample continues; of chats, a question
    sample_tokens: int = 128  # length of the final sample, tokens
    sample_temperature: float = 0.8  # of the final sample; 0 takes the likeliest token
    sample_top_p: float = 0.95  # probability mass that the final sample draws from

    def __post_init__(self):
        check_field_types(self)
        counts = "most_skips eval_every checkpoint_every keep_checkpoints log_every"
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
class SpikeConfig:
    """How a run answers a loss spike: it goes back, then routes by older parameters for a while.

    The batches since the checkpoint that it goes back to count as skipped.

    Source: report 4.2.3, which tells the method and no values; all of these are ours.
    """

    guard: bool = True  # watch for spikes
    window: int = 64  # last steps that tell what is usual; from half of them on it is known
    loss_deviations: float = 10.0  # robust standard deviations above the median that are a spike
    norm_deviations: float = 30.0  # the same of the gradient's norm
    margin: int = 3  # steps before a spike of which no checkpoint is trusted
    lag: int = 8  # anticipatory routing: age, in steps, of the parameters that choose experts
    steps: int = 100  # that it lasts; 0: none of it
    most_rollbacks: int = 3  # without a calm stretch between them, more of which end the run

    def __post_init__(self):
        check_field_types(self)
        _check_rules(
            self,
            ("window", self.window >= 4, "at least 4"),
            *((name, _is_positive(getattr(self, name)), "a positive number")
              for name in ("loss_deviations", "norm_deviations")),
            *((name, getattr(self, name) >= 0, "at least 0") for name in ("margin", "steps")),
            *((name, getattr(self, name) >= 1, "at least 1") for name in ("lag", "most_rollbacks")),
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Devices along each mesh axis; their product divides the number of devices."""

    data: int = 1  # copies of the parameters
    fsdp: int = 1  # parts of the parameters, gathered for use
    expert: int = 1  # parts of the routed experts
    tensor: int = 1  # parts of heads and expert widths
    layout: str = POD  # which devices share weights beside: see `sharding.LAYOUTS`

    def __post_init__(self):
        check_field_types(self)
        check_choice("MeshConfig.layout", self.layout, tuple(LAYOUTS))
        _check_rules(
            self, *((axis, size >= 1, "at least 1") for axis, size in self.sizes.items())
        )

    @property
    def sizes(self) -> dict[str, int]:
        """The devices along each axis."""
        return {axis: getattr(self, axis) for axis in MESH_AXES}

    @property
    def size(self) -> int:
        """The number of devices."""
        return math.prod(self.sizes.values())


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One training run: a section for each of its parts.

    The stages are in a section each of a section `stages`: `stage1`, `stage2` and so on.

    Raises:
      InputError: sections contradict each other; the message names the dotted keys.
    """

    model: ModelConfig
    runtime: Runtime
    data: DataConfig
    stages: tuple[StageConfig, ...]
    optimizer: OptimizerConfig
    train: TrainConfig
    spikes: SpikeConfig
    mesh: MeshConfig

    @classmethod
    def from_config_dict(
        cls, config_dict: ConfigDict | Mapping, model: ModelConfig | None = None
    ) -> RunConfig:
        """Read a mapping of sections, such as `get_config()` in configs/ returns.

        Args:
          model: that the run starts from. What the section `model` does not set, or sets to None,
            is taken from it.
        Raises:
          InputError: one line with the dotted key that is unknown, missing, ill-typed or out of
            range, what was expected there and what came.
        """
        if not isinstance(config_dict, (ConfigDict, Mapping)):
            raise InputError(f"config: expected a mapping of sections, got {config_dict!r}")
        check_known("", config_dict, (*_SECTIONS, STAGES))
        given = {name: config_dict[name] if name in config_dict else {} for name in _SECTIONS}
        if model is not None:
            given["model"] = _with_defaults(given["model"], model)
        sections = {
            name: _read_section(name, kind, given[name]) for name, kind in _SECTIONS.items()
        }
        return cls(stages=_read_stages(config_dict.get(STAGES, {})), **sections)

    def stage(self, number: int, flag: str) -> StageConfig:
        """Return a stage by its number, from 1; `flag` is what names it.

        Raises:
          InputError: there is none.
        """
        if not 1 <= number <= len(self.stages):
            raise InputError(
                f"{flag}: expected a number from 1 to {len(self.stages)}, the stages of --config, "
                f"got {number}"
            )
        return self.stages[number - 1]

    def to_dict(self) -> dict[str, dict]:
        """Return the sections as JSON types; `from_config_dict` reads them back."""
        sections = {name: _section_to_dict(getattr(self, name)) for name in _SECTIONS}
        stages = {stage_name(i): _section_to_dict(stage) for i, stage in enumerate(self.stages)}
        return sections | {STAGES: stages}

    @property
    def stage_ends(self) -> list[int]:
        """The last step of each stage; steps are counted from 1."""
        return list(itertools.accumulate(stage.steps for stage in self.stages))

    @property
    def steps(self) -> int:
        """Optimizer steps of the run."""
        return self.stage_ends[-1]

    def stage_at(self, step: int) -> int:
        """Return the index of the stage that takes a step.

        The run's start belongs to its first stage, all that comes after its end to its last.
        """
        return min(bisect.bisect_left(self.stage_ends, step), len(self.stages) - 1)

    def __post_init__(self):
        _check_sizes(self)
        has_indexer = CSA in self.model.layer_types
        context = self.model.max_position_embeddings
        rules = (
            *((f"{STAGES}.{stage_name(i)}.seq_len", stage.seq_len, stage.seq_len <= context,
               f"at most model.max_position_embeddings ({context})")
              for i, stage in enumerate(self.stages)),
            *((f"{STAGES}.{stage_name(i)}.attention", repr(stage.attention),
               has_indexer or stage.attention != INDEXER,
               "'dense' or 'sparse' for a model without CSA layers")
              for i, stage in enumerate(self.stages)),
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
    "spikes": SpikeConfig,
    "mesh": MeshConfig,
}
STAGES = "stages"
# What a config does not set of the runtime: mesh and layout are `MeshConfig`'s, the rest stages'.
_DERIVED = ("mesh", "layout", "csa", "index_learns")


def defaults() -> dict[str, dict]:
    """Return the sections with the keys that have a default, as JSON types."""
    return {
        name: {key: _jsonable(field.default) for key, field in _fields(kind).items()
               if field.default is not dataclasses.MISSING}
        for name, kind in _SECTIONS.items()
    }


def stage_name(index: int) -> str:
    """Return the name of a stage's section by its index, which is from 0."""
    return f"stage{index + 1}"


def _read_stages(sections: ConfigDict | Mapping) -> tuple[StageConfig, ...]:
    if not isinstance(sections, (ConfigDict, Mapping)):
        raise InputError(f"{STAGES}: expected a section for each stage, got {sections!r}")
    names = [stage_name(i) for i in range(max(1, len(sections)))]
    unknown = [name for name in sections if name not in names]
    if unknown or not sections:
        came = f"{unknown[0]!r}" if unknown else "nothing"
        raise InputError(
            f"{STAGES}: expected sections {names[0]}, stage2 and so on, without a gap, got {came}"
        )
    return tuple(_read_section(f"{STAGES}.{name}", StageConfig, sections[name]) for name in names)


def _with_defaults(section: ConfigDict | Mapping, model: ModelConfig) -> ConfigDict | Mapping:
    if not isinstance(section, (ConfigDict, Mapping)):
        return section
    chosen = {key: value for key, value in section.items() if value is not None}
    return _section_to_dict(model) | chosen


def _section_to_dict(section) -> dict:
    return {key: _jsonable(getattr(section, key)) for key in _fields(type(section))}


def _read_section(section: str, kind: type, values: ConfigDict | Mapping):
    if not isinstance(values, (ConfigDict, Mapping)):
        raise InputError(f"{section}: expected a section of keys, got {values!r}")
    fields = _fields(kind)
    check_known(f"{section}.", values, fields)
    for name, field in fields.items():
        required = field.default is dataclasses.MISSING
        if required and name not in values:
            elsewhere = ", or name a model by --init_from=DIR" if kind is ModelConfig else ""
            raise InputError(
                f"{section}.{name}: expected {field.type}, got nothing; it has no default, set it "
                f"in the config or by --config.{section}.{name}=VALUE{elsewhere}"
            )
    try:
        return kind(**{key: _hashable(values[key]) for key in values})
    except InputError as error:
        # The types name themselves; here the reader knows them by their section.
        message = str(error).removeprefix(f"{kind.__name__}.")
        raise InputError(f"{section}.{message}") from error


def _fields(kind: type) -> dict[str, dataclasses.Field]:
    """Return the fields that a config sets."""
    derived = _DERIVED if kind is Runtime else ()
    return {field.name: field for field in dataclasses.fields(kind) if field.name not in derived}


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
    sections = {name: getattr(config, name) for name in _SECTIONS}
    sections |= {f"{STAGES}.{stage_name(i)}": stage for i, stage in enumerate(config.stages)}
    for section, values in sections.items():
        for name, field in _fields(type(values)).items():
            value = getattr(values, name)
            is_size = field.type == "int" and name not in ("seed", "hash_seed", "tokens")
            if is_size and value > LARGEST:
                raise InputError(f"{section}.{name}: expected at most 2^31 - 1, got {value}")
    if config.steps > LARGEST:
        raise InputError(f"{STAGES}: expected at most 2^31 - 1 steps, got {config.steps}")


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
