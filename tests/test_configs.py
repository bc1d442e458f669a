"""Test that the files of configs/ load, convert and describe the released models."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
from absl import flags
from ml_collections import config_flags

from dsv4_jax.config import ModelConfig, Runtime
from dsv4_jax.run_config import RunConfig
from dsv4_jax.sizes import ParamCount, count_params

CONFIGS = Path(__file__).parent.parent / "configs"
NAMES = [path.stem for path in sorted(CONFIGS.glob("*.py"))]

# ml_collections imports config files by a deprecated method.
LOADS_MODULE = pytest.mark.filterwarnings(r"ignore:.*load_module\(\):DeprecationWarning")


def load(name: str):
    """Return `get_config()` of one file of configs/."""
    spec = importlib.util.spec_from_file_location(name, CONFIGS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config()


def from_flags(monkeypatch: pytest.MonkeyPatch, *overrides: str) -> RunConfig:
    """Read the tiny config as a launch script does; config_flags looks at `sys.argv` itself."""
    argv = ["train", f"--config={CONFIGS / 'tiny.py'}", *overrides]
    monkeypatch.setattr(sys, "argv", argv)
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", flag_values=values)
    values(argv)
    return RunConfig.from_config_dict(values.config)


def ratios(model: ModelConfig) -> list[int]:
    return [model.ratio(kind) for kind in model.layer_types]


def test_the_configs_are_there():
    assert NAMES == ["finetune", "needle", "tiny", "v4_flash", "v4_pro"]


@pytest.mark.parametrize("name", NAMES)
def test_configs_are_complete_and_locked(name):
    config = load(name)
    tiny = RunConfig.from_config_dict(load("tiny")).model
    written = RunConfig.from_config_dict(config, tiny if name == "finetune" else None).to_dict()
    complete = {key: set(section) for key, section in config.items()}
    if name == "finetune":  # the rest of its model is that of a checkpoint
        assert complete.pop("model") < set(written.pop("model"))
    assert {key: set(section) for key, section in written.items()} == complete
    with pytest.raises(AttributeError):
        config.optimizer.learning_rat = 1.0


@LOADS_MODULE
def test_flags_override_values(monkeypatch):
    config = from_flags(
        monkeypatch,
        "--config.optimizer.learning_rate=1e-3",
        "--config.data.tokenizer=tokenizer.json",
        "--config.model.layer_types=('window', 'csa')",
        "--config.model.moe_types=('hash', 'learned')",
        "--config.mesh.fsdp=2",
    )
    assert config.optimizer.learning_rate == 1e-3
    assert config.data.tokenizer == "tokenizer.json"
    assert config.model.layer_types == ("window", "csa")
    assert config.mesh.fsdp == 2


@LOADS_MODULE
def test_tiny_has_every_part(monkeypatch):
    config = from_flags(monkeypatch)
    model = config.model
    assert ratios(model) == [0, 0, 4, 32, 4, 32, 4]
    assert model.moe_types == ("hash",) * 3 + ("learned",) * 4
    assert model.num_nextn_predict_layers == 1
    assert model.yarn_factor > 1
    assert config.runtime == Runtime()
    assert config.data.tokenizer is None
    stages = config.stages
    assert [stage.attention for stage in stages] == ["dense", "dense", "indexer", "sparse"]
    assert stages[0].seq_len < stages[-1].seq_len
    for stage in stages:  # rows are long enough for compression and top-k to matter
        assert stage.seq_len >= 4 * max(model.sliding_window, model.hca_ratio)
        assert stage.seq_len // model.csa_ratio > model.index_topk


@pytest.mark.parametrize(
    ("name", "schedule", "learning_rate", "rows", "dense", "tokens"),
    [
        ("v4_flash", [0, 0] + [4, 128] * 20 + [4], (2.7e-4, 2.7e-5), 18_432, 1, 32),
        ("v4_pro", [128, 128] + [4, 128] * 29 + [4], (2.0e-4, 2.0e-5), 23_040, 2, 33),
    ],
)
def test_released_schedules_and_recipes(name, schedule, learning_rate, rows, dense, tokens):
    config = RunConfig.from_config_dict(load(name))
    assert ratios(config.model) == schedule
    assert [kind == "hash" for kind in config.model.moe_types] == [
        layer < 3 for layer in range(len(schedule))
    ]
    optimizer = config.optimizer
    assert (optimizer.learning_rate, optimizer.end_learning_rate) == learning_rate
    assert optimizer.warmup_steps == 2000
    stages = config.stages
    assert sorted({stage.seq_len for stage in stages}) == [4096, 16_384, 65_536, 1_048_576]
    main = [stage for stage in stages if stage.attention != "indexer"]
    sizes = [stage.batch_tokens for stage in main]
    assert sizes == sorted(sizes) and sizes[-1] == rows * 4096
    assert sum(stage.tokens for stage in main) == tokens * 10**12
    assert sum(stage.tokens for stage in stages if stage.attention == "dense") == dense * 10**12
    # Sparse from the indexer's warm-up on, at 64K tokens, and never dense again.
    modes = [stage.attention for stage in stages]
    begins = modes.index("indexer")
    assert modes == ["dense"] * begins + ["indexer"] + ["sparse"] * (len(modes) - begins - 1)
    assert stages[begins].seq_len == stages[begins + 1].seq_len == 65_536
    assert (stages[begins].steps, stages[begins].learning_rate) == (1000, 1e-3)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (
            "v4_flash",
            ParamCount(total=284_332_230_231, active=13_270_091_351, mtp=6_610_048_635),
        ),
        (
            "v4_pro",
            ParamCount(total=1_572_997_179_491, active=48_852_379_747, mtp=25_840_145_595),
        ),
    ],
)
def test_parameter_counts_are_the_published_ones(name, expected):
    assert count_params(RunConfig.from_config_dict(load(name)).model) == expected
