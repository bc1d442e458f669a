"""Recipes for clusters: meshes and micro-batches of the released models."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
from ml_collections import ConfigDict

from dsv4_jax.errors import InputError
from dsv4_jax.recipe import Recipe, with_recipe
from dsv4_jax.run_config import RunConfig

CONFIGS = Path(__file__).parents[1] / "configs"
FILES = {model: runpy.run_path(CONFIGS / f"v4_{model}.py") for model in ("flash", "pro")}
ALL = [(model, kind) for model, file in FILES.items() for kind in file["RECIPES"]]
PUBLISHED = {"flash": 18_432 * 4096, "pro": 23_040 * 4096}  # tokens of the full batch


@pytest.mark.parametrize(("model", "kind"), ALL)
@pytest.mark.parametrize("copies", [1, 4])
def test_a_cluster_gets_a_mesh_and_micro_batches(model, kind, copies):
    recipe = FILES[model]["RECIPES"][kind]
    devices = copies * recipe.devices
    config = RunConfig.from_config_dict(FILES[model]["get_config"](f"{kind}-{devices}"))
    assert config.mesh.size == devices and config.mesh.data == copies
    for stage in config.stages:
        if stage.rows < devices:
            continue  # rows too long and few for one on each device
        assert stage.rows % (stage.accumulation * devices // config.mesh.tensor) == 0
        assert stage.batch_tokens // stage.accumulation == devices * max(
            recipe.tokens, stage.seq_len
        )
    assert abs(config.stages[3].batch_tokens / PUBLISHED[model] - 1) < 0.1


@pytest.mark.parametrize("model", FILES)
def test_without_a_cluster_the_published_batches_stay(model):
    config = RunConfig.from_config_dict(FILES[model]["get_config"]())
    assert config.stages[3].batch_tokens == PUBLISHED[model]
    assert config.mesh.size == 1
    assert {stage.accumulation for stage in config.stages} == {1}


@pytest.mark.parametrize(("cluster", "message"), [
    ("v5p-100", "expected a multiple of the 512 devices .* got 100; v5p-512 would fit"),
    ("v5p-1300", "got 1300; v5p-1536 would fit"),
    ("v5p", "expected KIND-DEVICES after the file's colon, with a kind of v5p, tpu7x, h100, got"),
    ("v6e-256", "a kind of v5p, tpu7x, h100, got 'v6e-256'; give one such as v5p-512"),
    ("v5p-0", "expected KIND-DEVICES"),
    ("v5p-512-", "expected KIND-DEVICES"),
    ("v5p-" + "9" * 5000, "expected KIND-DEVICES"),
])
def test_other_clusters_are_refused_in_one_line(cluster, message):
    with pytest.raises(InputError, match=message) as caught:
        FILES["pro"]["get_config"](cluster)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


def test_a_recipe_changes_the_runtime_and_rounds_the_batch():
    recipe = Recipe(expert=2, fsdp=2, tokens=32, runtime={"waves": 3}, reason="a test")
    config = with_recipe(ConfigDict({
        "mesh": {"data": 1, "expert": 1, "fsdp": 1, "tensor": 1, "layout": "cluster"},
        "runtime": {"waves": 1, "other": 7},
        "stages": {
            "short": {"seq_len": 16, "batch_tokens": 600, "accumulation": 1},
            "long": {"seq_len": 64, "batch_tokens": 700, "accumulation": 1},
            "few": {"seq_len": 128, "batch_tokens": 256, "accumulation": 1},
        },
    }), {"a": recipe}, "a-8")
    assert config.mesh.to_dict() == {
        "data": 2, "expert": 2, "fsdp": 2, "tensor": 1, "layout": "pod"
    }
    assert config.runtime.to_dict() == {"waves": 3, "other": 7}
    # 8 devices take 2 rows of 16 at once each, or one of 64; they are more than the rows of 128.
    assert config.stages.to_dict() == {
        "short": {"seq_len": 16, "batch_tokens": 512, "accumulation": 2},
        "long": {"seq_len": 64, "batch_tokens": 512, "accumulation": 1},
        "few": {"seq_len": 128, "batch_tokens": 256, "accumulation": 1},
    }
    assert config.is_locked
