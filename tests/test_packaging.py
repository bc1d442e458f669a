"""The README's promises hold, and the package installs and imports only what it should."""

from __future__ import annotations

import ast
import configparser
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from setuptools import find_packages

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
PACKAGES = ("dsv4_jax", "pallas_kernels")
SOURCES = sorted(path for name in PACKAGES for path in (ROOT / name).rglob("*.py"))
TEST_MARKER = "<!-- test command -->"

# Prints nothing and exits with 0, or says which forbidden thing happened.
IMPORT_EVERYTHING = """
import importlib, pkgutil, sys

NETWORK = {"socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto"}
used = []
sys.addaudithook(lambda event, args: used.append((event, args)) if event in NETWORK else None)

import dsv4_jax
foreign = ["torch", "transformers", "tensorflow"]
loaded = sorted(sys.modules.keys() & foreign)
assert not loaded, f"import dsv4_jax also imported {loaded}"
# Third parties may try them, but must do without.
sys.modules.update(dict.fromkeys(foreign))
for module in pkgutil.walk_packages(dsv4_jax.__path__, "dsv4_jax."):
    if module.name != "dsv4_jax.lm_eval_model":  # needs an extra; imported only for its tasks
        importlib.import_module(module.name)
assert "lm_eval" not in sys.modules
assert not used, f"importing dsv4_jax used the network: {used}"
"""


def setup_cfg() -> configparser.ConfigParser:
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    return parser


def code_blocks(language: str = "") -> list[str]:
    """Return the README's fenced blocks of one language; of all languages if none is given."""
    return re.findall(rf"^```{language or '[a-z]+'}\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)


def imported_modules(path: Path, *, top_level_only: bool) -> list[str]:
    """Return the names of the modules that a source file imports."""
    tree = ast.parse(path.read_text())
    names = []
    for node in tree.body if top_level_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: a relative import"
            names.append(node.module)
    return names


def test_readme_has_exactly_two_one_line_commands():
    commands = code_blocks("sh")
    assert len(code_blocks()) == len(commands) + len(code_blocks("python"))
    assert len(commands) == 2
    train, test = (command.removesuffix("\n") for command in commands)
    assert "\n" not in train + test
    assert "launch/train.py --config=configs/tiny.py --workdir=" in train
    assert "'.[test]'" in test and "pytest" in test
    for path in ("launch/train.py", "configs/tiny.py"):
        assert (ROOT / path).is_file()


def test_ci_runs_the_test_command_of_the_readme():
    lines = README.splitlines()
    assert lines.count(TEST_MARKER) == 1
    assert lines[lines.index(TEST_MARKER) + 2] == code_blocks("sh")[1].removesuffix("\n")
    assert TEST_MARKER in (ROOT / ".ci" / "run").read_text()
    assert os.access(ROOT / ".ci" / "run", os.X_OK)


def test_readme_examples_run_one_after_the_other(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {}
    for example in code_blocks("python"):
        exec(compile(example, "README.md", "exec", dont_inherit=True), names)
    logits, jnp = names["logits"], names["jnp"]
    assert logits.shape == (1, 128, names["config"].vocab_size)
    assert logits.dtype == jnp.float32
    assert jnp.isfinite(logits).all()
    assert names["params"]["embedding"].dtype == jnp.bfloat16
    assert (tmp_path / "exported" / "model.safetensors").is_file()


def test_readme_maps_every_file_below_what_it_imports():
    mapped = re.findall(r"^\| `(dsv4_jax/[\w/]+\.py)` \|", README, re.MULTILINE)
    files = {path.relative_to(ROOT).as_posix(): path for path in SOURCES}
    modules = {name for name in files if name.startswith("dsv4_jax") and "__init__" not in name}
    assert len(mapped) == len(set(mapped))
    assert set(mapped) == modules
    for index, name in enumerate(mapped):
        imports = {
            module.replace(".", "/") + ".py"
            for module in imported_modules(files[name], top_level_only=True)
        }
        assert not imports & set(mapped[index:]), f"{name} imports a file below it in the map"


def test_only_the_packages_are_installed():
    include = setup_cfg()["options.packages.find"]["include"].split()
    found = find_packages(str(ROOT), include=include)
    assert {name.partition(".")[0] for name in found} == set(PACKAGES)
    assert "dsv4_jax.attention" in found


def test_the_changelog_begins_with_the_version():
    headings = re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert headings[0] == setup_cfg()["metadata"]["version"]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_sources_import_neither_torch_nor_pickle(path: Path):
    forbidden = {"cloudpickle", "dill", "pickle", "shelve", "torch", "transformers"}
    roots = {name.partition(".")[0] for name in imported_modules(path, top_level_only=False)}
    assert not roots & forbidden


def test_imports_need_neither_torch_nor_a_network():
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", IMPORT_EVERYTHING],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )
    assert done.returncode == 0, done.stderr
