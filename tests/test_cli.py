"""Bad input on the command line ends in one helpful line and exit status 2; bugs do not."""

from __future__ import annotations

import math
import os
import runpy
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from absl.testing import flagsaver

from dsv4_jax import cli

ROOT = Path(__file__).parents[1]
TINY = ROOT / "configs" / "tiny.py"
B11 = "B11: bad command lines, refused in one line"  # name of the count of cases
CONFIG = f"""
from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

def get_config(steps="4"):
    config = {{
        "model": dict(
            vocab_size=300, hidden_size=16, layer_types=("window",), moe_types=("learned",),
            num_attention_heads=2, head_dim=8, qk_rope_head_dim=4, index_head_dim=8, o_groups=2,
            max_position_embeddings=256, num_nextn_predict_layers=0,
        ),
        "runtime": dict(remat=False),
        "data": dict(source=r"{Path(__file__)}", tokenizer=placeholder(str)),
        "stages": dict(stage1=dict(tokens=128 * int(steps), seq_len=32, batch_tokens=128,
                                   attention="dense")),
        "optimizer": dict(learning_rate=1e-2, end_learning_rate=1e-3, warmup_steps=2,
                          decay_fraction=0.3),
        "train": dict(eval_every=2, checkpoint_every=2),
        "mesh": dict(data=1, fsdp=1, expert=1, tensor=1),
    }}
    return ConfigDict(config).lock()
"""


LOGGING = """
from absl import logging

from dsv4_jax import cli


def main():
    logging.info("a detail")
    logging.warning("a warning")
    try:
        raise ValueError("raised elsewhere, too")
    except ValueError:
        logging.exception("an error")


cli.run(main)
"""


@pytest.fixture(scope="module")
def launcher():
    """The launcher's own names, its flags defined; what it does to the process is undone."""
    cache = jax.config.jax_compilation_cache_dir
    with flagsaver.flagsaver():
        yield runpy.run_path(str(ROOT / "launch" / "train.py"))
    jax.config.update("jax_compilation_cache_dir", cache)


@pytest.fixture
def config_file(tmp_path):
    path = tmp_path / "config.py"
    path.write_text(CONFIG)
    return path


@pytest.fixture
def command(launcher, monkeypatch, capsys):
    """Run the launcher with arguments; return its exit status and standard error."""

    def run(*arguments, main=launcher["main"]) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["train.py", *map(str, arguments)])
        with flagsaver.flagsaver(), pytest.raises(SystemExit) as ended:
            cli.run(main)
        return ended.value.code, capsys.readouterr().err

    return run


def assert_refused(outcome: tuple[int, str], *parts: str) -> None:
    status, error = outcome
    assert status == cli.BAD_INPUT
    assert error.startswith("train.py: ")
    assert error.count("\n") == 1 and error.endswith("\n")
    assert "Traceback" not in error
    for part in parts:
        assert part in error


@pytest.mark.faults
@pytest.mark.parametrize(("argument", "parts"), [
    ("--conifg=x", ["Unknown command line flag 'conifg'", "Did you mean: config ?", "--help"]),
    ("--workdr=x", ["Unknown command line flag 'workdr'", "Did you mean: workdir ?", "--help"]),
    ("--zzz=x", ["Unknown command line flag 'zzz'", "--help"]),
    ("--confg.data.source=x", ["flag 'confg.data.source'; did you mean --config.data.source?"]),
    ("--configs.data.source=x", ["flag 'configs.data.source'; did you mean --config.data.source?"]),
    ("--noconfig.data.source", ["'noconfig.data.source'; did you mean --config.data.source?"]),
    ("--noconfig.runtime.remat=1", ["--noconfig.runtime.remat=1 does not take an argument"]),
    ("--flagfile=/no/such", ["Unable to open flagfile", "/no/such"]),
    ("--verbosity=loud", ["flag --verbosity=loud: "]),
    ("--config.", ["--config.: expected a known key", "known: "]),
    ("--config..train.eval_every=3", ["--config.: expected a known key", "known: "]),
    ("--config.train.eval_every[0]=3", ["did you mean --config.train.eval_every?"]),
    ("--config.optimiser.name=adamw", ["--config.optimiser: ", "did you mean --config.optimizer?"]),
    ("--config.data.sorce=3", ["--config.data.sorce: ", "did you mean --config.data.source?"]),
    ("--config.train.zzz=3", ["--config.train.zzz: ", "known: ", "eval_every"]),
    ("--config.stages.stage1.token=3", ["did you mean --config.stages.stage1.tokens?"]),
    ("--config.stages.stage2.tokens=3", ["--config.stages.stage2: ", "--config.stages.stage1?"]),
    ("--config.stages.stage1.tokens=many", ["stages.stage1.tokens: expected int, got 'many'"]),
    ("--config.stages.stage1.tokens=0", ["stages.stage1.tokens: expected at least 1, got 0"]),
    ("--config.stages.stage1.attention=all", ["expected one of dense, indexer, sparse"]),
    ("--config.stages={}", ["stages: expected sections stage1, stage2", "got nothing"]),
    ("--config.train.eval_every.x=3", ["--config.train.eval_every.x: ", "no key below a value"]),
    ("--config.train.eval_every=many", ["eval_every: expected int, got 'many'", "has 2"]),
    ("--config.train.eval_every=1.5", ["--config.train.eval_every: expected int, got '1.5'"]),
    ("--config.train.eval_every=", ["--config.train.eval_every: expected int, got ''"]),
    ("--config.train.eval_every", ["Missing value", "config.train.eval_every"]),
    ("--config.runtime.remat=maybe", ["--config.runtime.remat: expected bool, got 'maybe'"]),
    ("--config.optimizer.learning_rate=a:b", ["learning_rate: expected float, got 'a:b'"]),
    ("--config.train={}x", ["--config.train: expected ConfigDict, got '{}x'"]),
    ("--config.train={'eval_every': 3}", ["train.checkpoint_every: expected int, got nothing"]),
    ("--config.model.vocab_size=1" + 20 * "0", ["model.vocab_size: expected at most 2^31 - 1"]),
    ("--config.model.layer_types=()", ["model.layer_types: expected at least one layer"]),
    ("--config.model={}", ["model.vocab_size: expected int, got nothing"]),
    ("--config.data=None", ["--config.data: expected ConfigDict, got 'None'"]),
    ("--config.train.eval_every=0", ["train.eval_every: expected at least 1, got 0"]),
    ("--config.optimizer.learning_rate=nan", ["optimizer.learning_rate: ", "got nan"]),
    ("--config.optimizer.learning_rate=inf", ["optimizer.learning_rate: ", "got inf"]),
    ("--config.model.layer_types=('cas',)", ["model.layer_types: ", "'cas'"]),
    ("--config.model.o_groups=3", ["model.o_groups: expected a divisor", "got 3"]),
    (
        "--config.stages.stage1={'tokens': 9, 'seq_len': 512, 'batch_tokens': 512}",
        ["stages.stage1.seq_len: ", "max_position_embeddings (256)", "got 512"],
    ),
    ("--config.stages.stage1.seq_len=33", ["batch_tokens: expected a multiple of seq_len (33)"]),
    ("--config.mesh.fsdp=3", ["mesh: ", "8 devices", "fsdp 3"]),
    ("--config.mesh.data=8", ["mesh: ", "'batch' of size 4"]),
    ("--wandb_project=", ["wandb_project: expected the name of a project, got none"]),
    ("--config.data.source=/no/such", ["data.source: ", "'/no/such' does not exist"]),
    ("--config.data.tokenizer=/no/such", ["data.tokenizer: cannot read /no/such"]),
    ("--config.model.vocab_size=200", ["model.vocab_size: expected at least 270", "got 200"]),
    ("extra", ["expected flags only, got 'extra'"]),
])
def test_a_bad_argument_is_refused_in_one_line(
    command, config_file, tmp_path, argument, parts, record_property
):
    workdir = tmp_path / "run"
    outcome = command(f"--config={config_file}", f"--workdir={workdir}", argument)
    assert_refused(outcome, *parts)
    record_property(B11, 1)


VALUES = runpy.run_path(str(TINY))["get_config"]().to_dict()  # by section, all keys there are
VALUES["stages.stage1"] = VALUES.pop("stages")["stage1"]
KEYS = [(section, name) for section, values in VALUES.items() for name in values]
CHOSEN = [  # keys of names, and of texts that may not be empty
    *(f"runtime.{name}" for name in ("dtype", "moe", "cache")), "optimizer.name",
    "optimizer.muon_dtype", "data.source", "data.text_field", "data.tokenizer",
]


def bad_values(section: str, name: str) -> list[tuple]:
    """List what a key of a number, flag or name refuses, each as (key, value, parts of why)."""
    key, kind = f"{section}.{name}", type(VALUES[section][name])
    numbers = {int: (-1, 2**32), float: (-1.0, math.nan, math.inf)}.get(kind, ())
    if name in ("tokens", "seq_len"):  # so many tokens there may be; so long a row is in no batch
        numbers = (-1, 0)
    bad = [(key, number, [f"train.py: {key}: expected ", f", got {number}"]) for number in numbers]
    if kind in (int, float, bool):
        expected = f"train.py: --config.{key}: expected {kind.__name__}, got 'many'"
        bad.append((key, "many", [expected]))
    if kind is tuple:
        bad.append((key, "3", [f"train.py: {key}: expected tuple[str, ...], got (3,)"]))
    if key in CHOSEN:
        bad.append((key, "", [f"train.py: {key}: expected ", ", got ''"]))
    return bad


@pytest.mark.faults
@pytest.mark.parametrize(
    ("key", "value", "parts"), [bad for section, name in KEYS for bad in bad_values(section, name)]
)
def test_every_key_refuses_bad_values(command, tmp_path, key, value, parts, record_property):
    outcome = command(f"--config={TINY}", f"--workdir={tmp_path}", f"--config.{key}={value}")
    assert_refused(outcome, *parts)
    assert not any(tmp_path.iterdir())
    record_property(B11, 1)


@pytest.mark.faults
@pytest.mark.parametrize(("section", "name"), [
    *KEYS, *((None, section) for section in VALUES if "." not in section), (None, "stages"),
])
def test_every_misspelt_key_gets_a_suggestion(command, tmp_path, section, name, record_property):
    prefix, below = f"--config.{section}." if section else "--config.", "" if section else ".x"
    for misspelt in (f"{name}{name[-1]}", f"{name[0]}{name}{name[-1]}"):  # one edit, two
        argument = f"{prefix}{misspelt}{below}=1"
        outcome = command(f"--config={TINY}", f"--workdir={tmp_path}", argument)
        assert_refused(
            outcome, f"{prefix}{misspelt}: expected a known key", f"did you mean {prefix}{name}?"
        )
    record_property(B11, 2)


@pytest.mark.faults
@pytest.mark.parametrize(("section", "name"), [key for key in KEYS if len(key[1]) <= 4])
def test_half_of_a_short_key_is_enough(command, tmp_path, section, name, record_property):
    misspelt = f"xx{name[2:]}"
    argument = f"--config.{section}.{misspelt}=1"
    outcome = command(f"--config={TINY}", f"--workdir={tmp_path}", argument)
    assert_refused(outcome, f"did you mean --config.{section}.{name}?")
    record_property(B11, 1)


@pytest.mark.faults
@pytest.mark.parametrize(("content", "parts"), [
    ("this is no Python\n", [":1: ", "SyntaxError"]),
    ("x = 1\n", ["a function get_config()", "got none"]),
    ("def get_config():\n    return None\n", ["get_config()", "got none"]),
    ("def get_config():\n    return 5\n", ["get_config()", "got a value of type int"]),
    ("def get_config():\n    return undefined\n", [":2: ", "NameError", "undefined"]),
    ("\nimport no_such_module\n", [":2: ", "ModuleNotFoundError"]),
    (
        "from ml_collections import ConfigDict\n\ndef get_config():\n"
        "    return ConfigDict({'model': 1})\n",
        ["model: expected a section of keys, got 1"],
    ),
    (
        "from ml_collections import ConfigDict\n\ndef get_config():\n"
        "    return ConfigDict({'modle': {}})\n",
        ["modle: ", "did you mean model?"],
    ),
    (
        "from ml_collections import ConfigDict\n\ndef get_config():\n"
        "    return ConfigDict({1: 2})\n",
        ["1: expected a known key", "known: model"],
    ),
    (
        "from ml_collections import FrozenConfigDict\n\ndef get_config():\n"
        "    return FrozenConfigDict({'model': {}})\n",
        ["config.py: expected a config file that runs", "FrozenConfigDict is immutable"],
    ),
    (
        "from ml_collections import ConfigDict, config_dict\n\ndef get_config():\n"
        "    return ConfigDict({'train': {'steps': config_dict.required_placeholder(int)}})\n",
        ["config.py: expected a config file that runs", "RequiredValueError"],
    ),
    ("import sys\nsys.exit(3)\n", [":2: expected a config file that runs", "SystemExit: 3"]),
    ("get_config = 5\n", ["config.py: expected a config file that runs", "not callable"]),
    ("\0\1", ["expected a config file that runs"]),
])
def test_a_bad_config_file_is_refused_in_one_line(
    command, tmp_path, content, parts, record_property
):
    path = tmp_path / "config.py"
    path.write_text(content)
    assert_refused(command(f"--config={path}", f"--workdir={tmp_path / 'run'}"), *parts)
    record_property(B11, 1)


@pytest.mark.faults
def test_a_missing_config_file_is_refused(command, tmp_path, record_property):
    paths = tmp_path / "none.py", tmp_path, "", 300 * "x"
    for path in paths:
        assert_refused(
            command(f"--config={path}", f"--workdir={tmp_path}"), "--config: ", repr(str(path))
        )
    record_property(B11, len(paths))


@pytest.mark.faults
def test_missing_flags_are_named(command, config_file, tmp_path, record_property):
    assert_refused(command(f"--workdir={tmp_path}"), "--config: expected a value", "configs/")
    assert_refused(command(f"--config={config_file}"), "--workdir: expected a value", "folder")
    assert_refused(command(f"--config={config_file}", "--workdir="), "--workdir: expected a value")
    assert_refused(command("--config.data.seed=3"), "expected --config=FILE before it")
    assert_refused(command("--config.data.seed=3", f"--config={config_file}"), "put it first")
    record_property(B11, 5)


@pytest.mark.faults
def test_a_workdir_that_cannot_be_written_is_refused(
    command, config_file, tmp_path, record_property
):
    (tmp_path / "file").write_text("mine")
    workdirs = (
        tmp_path / "file", tmp_path / "file" / "below", "/proc/none", "/dev/null/none",
        tmp_path / (300 * "x"),
    )
    for workdir in workdirs:
        assert_refused(
            command(f"--config={config_file}", f"--workdir={workdir}"),
            "workdir: ", str(workdir), "choose",
        )
    assert (tmp_path / "file").read_text() == "mine"
    record_property(B11, len(workdirs))


@pytest.mark.faults
@pytest.mark.parametrize(("name", "content", "parts"), [
    ("empty.txt", b"", ["data.source: ", "empty.txt"]),
    ("latin.txt", b"caf\xe9 " * 50, ["latin.txt: expected UTF-8", "0xe9 at offset 3"]),
    ("bad.jsonl", b'{"text": "a"}\n{"text": 5}\n', ["bad.jsonl:2: ", '"text"']),
])
def test_bad_data_is_refused(
    command, config_file, tmp_path, name, content, parts, record_property
):
    source = tmp_path / name
    source.write_bytes(content)
    assert_refused(
        command(
            f"--config={config_file}", f"--workdir={tmp_path / 'run'}",
            f"--config.data.source={source}",
        ),
        *parts,
    )
    record_property(B11, 1)


def test_overrides_reach_the_config(command, launcher, config_file, tmp_path):
    seen = []
    main = seen.append
    arguments = (
        f"--config={config_file}:9", "--config.optimizer.learning_rate=2",
        "--config.data.tokenizer=t", "--config.runtime.remat",
        "--config.model.layer_types=('csa', 'hca')", "--config.train.eval_every", "7",
        f"--workdir={tmp_path}",
    )
    status, error = command(*arguments, main=lambda: main(launcher["CONFIG"].value.to_dict()))
    assert (status, error) == (None, "")
    (config,) = seen
    assert config["optimizer"]["learning_rate"] == 2.0
    assert config["data"]["tokenizer"] == "t"
    assert config["runtime"]["remat"] is True
    assert config["model"]["layer_types"] == ("csa", "hca")
    assert config["train"]["eval_every"] == 7


def test_an_error_of_ours_keeps_its_traceback(launcher, monkeypatch, config_file, tmp_path):
    def main():
        raise KeyError("a bug")

    monkeypatch.setattr(sys, "argv", ["train.py", f"--config={config_file}", "--workdir=w"])
    with flagsaver.flagsaver(), pytest.raises(KeyError, match="a bug"):
        cli.run(main)


def test_the_real_command_exits_with_status_2_and_one_line(tmp_path):
    done = subprocess.run(
        [sys.executable, ROOT / "launch" / "train.py", f"--config={ROOT / 'configs' / 'tiny.py'}",
         f"--workdir={tmp_path}", "--config.optimizer.learning_rat=1"],
        capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=False,
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert "did you mean --config.optimizer.learning_rate?" in done.stderr


def test_libraries_log_warnings_but_no_tracebacks(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(LOGGING)
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert done.stderr.count("\n") == 1 and "a warning" in done.stderr


def test_standard_output_that_is_full_is_told_in_one_line(tmp_path):
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, ROOT / "launch" / "train.py", f"--workdir={tmp_path / 'run'}",
             f"--config={ROOT / 'configs' / 'tiny.py'}"],
            stdout=full, stderr=subprocess.PIPE, text=True, check=False,
        )
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "standard output: cannot write: No space left on device; make room" in done.stderr
