"""What a trained model writes at the end of its run."""

from __future__ import annotations

import numpy as np

from dsv4_jax.chat import chat_prompt
from dsv4_jax.errors import InputError
from dsv4_jax.files import write_atomically
from dsv4_jax.infer import generate
from dsv4_jax.rounded_weights import round_weights
from dsv4_jax.run import Run
from dsv4_jax.run_config import CHAT
from dsv4_jax.stage_model import transformer_of
from dsv4_jax.terminal import say
from dsv4_jax.train_state import TrainState


def sample_prompt(run: Run) -> np.ndarray:
    """Return the token ids that the final sample continues, or answers."""
    plan, tokenizer, data = run.config.train, run.corpus.tokenizer, run.config.data
    if data.format == CHAT:
        question = [{"role": "user", "content": plan.sample_prompt}]
        prompt = chat_prompt(tokenizer, question, data.thinking)
    else:
        prompt = np.array([tokenizer.bos_id, *tokenizer.encode(plan.sample_prompt)], np.int32)
    room = run.config.model.max_position_embeddings - plan.sample_tokens
    if len(prompt) > room:
        raise InputError(
            f"train.sample_prompt: expected at most {room} tokens, which leave room for "
            f"sample_tokens={plan.sample_tokens} in max_position_embeddings, got {len(prompt)}; "
            "shorten it"
        )
    return prompt


def write_sample(run: Run, state: TrainState, prompt: np.ndarray) -> None:
    """Print the prompt and what the model makes of it, and keep both in the workdir."""
    plan, tokenizer = run.config.train, run.corpus.tokenizer
    params = round_weights(state.params, run.config.model, run.config.runtime.linears)
    new = generate(
        run.config.model, params, prompt, max_new_tokens=plan.sample_tokens,
        temperature=plan.sample_temperature, top_p=plan.sample_top_p, seed=plan.seed,
        stop=tokenizer.eos_id, runtime=transformer_of(run.config, run.config.stages[-1]).runtime,
    )
    between = "\n\n" if run.config.data.format == CHAT else ""
    text = plan.sample_prompt + between + tokenizer.decode(new.tokens[0])
    write_atomically(run.workdir / "sample.txt", text.encode())
    say(f"sample:\n{text}")
