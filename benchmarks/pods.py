"""The training steps of the released models, compiled for clusters by launch/aot.py.

    python benchmarks/pods.py [--only=flash:v5p] [--output=benchmarks/results/pods.json]

Each takes minutes; the accounts of those that are compiled replace the same ones in the output, and
a table of all in the output is printed. Needs the extra `aot`.
"""

import json
import subprocess
import sys
from pathlib import Path

from absl import app, flags

ROOT = Path(__file__).parents[1]
ONLY = flags.DEFINE_string("only", "", "compile those whose MODEL:TOPOLOGY contains this")
OUTPUT = flags.DEFINE_string(
    "output", str(ROOT / "benchmarks" / "results" / "pods.json"), "file of the accounts"
)
GIB = 2**30
STAGE = 4  # 4,096 tokens in a row, the full batch
PODS = (
    ("flash", "v5p:4x4x8"), ("flash", "v6e:16x16"), ("flash", "tpu7x:4x4x4"),
    ("flash", "h100:1x16x8"), ("flash", "v5p:8x8x8"), ("flash", "v6e:16x16*4"),
    ("pro", "v5p:8x8x8"), ("pro", "tpu7x:4x8x8"), ("pro", "h100:1x128x8"), ("pro", "v5p:16x16x16"),
)


def compiled(model: str, topology: str) -> dict:
    command = [
        sys.executable, ROOT / "launch" / "aot.py", f"--config={ROOT}/configs/v4_{model}.py",
        f"--topology={topology}", f"--stage={STAGE}",
    ]
    found = subprocess.run(command, capture_output=True, text=True)
    if found.returncode:
        return {"refused": found.stderr.strip().splitlines()[-1]}
    return json.loads(found.stdout.splitlines()[-1])


def row(name: str, account: dict) -> str:
    if "refused" in account:
        return f"| {name} | {account['refused']} |"
    memory, chip = account["memory"], account["chip"]
    parts = (memory[kind] / GIB for kind in ("parameters", "optimizer", "activations"))
    of_experts = [x for x in account["exchanges"] if x["experts"]]
    hidden = sum(x["hidden"] for x in of_experts) / sum(x["seconds"] for x in of_experts)
    mesh = " x ".join(f"{axis} {size}" for axis, size in account["mesh"].items() if size > 1)
    cells = (
        name, f"{account['devices']:,}", mesh, " + ".join(f"{part:.1f}" for part in parts),
        f"{memory['total'] / GIB:.1f} of {chip['memory'] / GIB:.1f}",
        f"{account['compute_seconds']:.1f}", f"{account['exposed_seconds']:.1f}", f"{hidden:.1%}",
        f"{account['mfu']:.1%}", f"{account['lower_seconds']:.0f} + "
        f"{account['compile_seconds']:.0f}", f"{account['compiler_memory'] / GIB:.1f}",
    )
    return f"| {' | '.join(cells)} |"


def main(_) -> None:
    path = Path(OUTPUT.value)
    accounts = json.loads(path.read_text()) if path.exists() else {}
    for model, topology in PODS:
        name = f"{model}:{topology}"
        if ONLY.value in name:
            accounts[name] = compiled(model, topology)
            path.write_text(json.dumps(accounts, indent=1) + "\n")
            print(row(name, accounts[name]), flush=True)
    print("\n| step | devices | mesh | parameters + optimizer + activations, GiB | in all "
          "| computes, s | waits, s | experts' sending hidden | MFU at most "
          "| lowering + compiling, s | GiB |")
    print("|---" * 11 + "|")
    for model, topology in PODS:
        if account := accounts.get(f"{model}:{topology}"):
            print(row(f"{model}:{topology}", account))


if __name__ == "__main__":
    app.run(main)
