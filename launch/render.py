"""Renders the examples of this directory anew: python launch/render.py. They are what `gentrain submit CONFIG --dry-run` prints."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path
from unittest.mock import patch

from gentrain import cli

HERE = Path(__file__).resolve().parent
CONFIG = "configs/spiral/edm.yaml"
TRIALS = "configs/sweeps/rings.yaml"
# Directory of the example -> what follows `gentrain submit`. What a place would take from the machine at hand is written out.
EXAMPLES = {
    "local": (CONFIG, "output=/shared/runs/edm"),
    "ray": (CONFIG, "cluster.place=ray", "cluster.workers=[1,2]", "cluster.submit={name: ray, storage: /shared}"),
    "slurm": (
        CONFIG, "output=/shared/runs/edm", "cluster.place=ray", "cluster.workers=8", "cluster.gpus_per_worker=1",
        "cluster.submit={name: slurm, nodes: 2, cpus_per_node: 32, gpus_per_node: 4, time_limit_min: 720, partition: gpu, "
        "venv: /shared/venv}",
    ),
    "slurm_array": (
        CONFIG, "output=/shared/runs/edm_seeds",
        "cluster.submit={name: slurm, array: ['seed=1', 'seed=2', 'seed=3'], at_once: 2, time_limit_min: 60, venv: /shared/venv}",
    ),
    "slurm_trials": (
        TRIALS, "output=/shared/runs/rings",
        "cluster.submit={name: slurm, array: trials, at_once: 4, time_limit_min: 60, venv: /shared/venv}",
    ),
    "slurm_sweep": (
        TRIALS, "output=/shared/runs/rings",
        "cluster.submit={name: slurm, nodes: 2, cpus_per_node: 8, time_limit_min: 60, venv: /shared/venv}", "sweep.concurrent=16",
    ),
    "kuberay": (
        CONFIG, "cluster.place=ray", "cluster.workers=4", "cluster.gpus_per_worker=1",
        "cluster.submit={name: kuberay, image: 'registry.example/gentrain:1', nodes: 4, cpus_per_node: 8, gpus_per_node: 1, "
        "memory_gib: 64, claim: runs, storage: /runs, secret: tokens}",
    ),
}  # fmt: skip


def rendered(example: str) -> dict[str, str]:
    """File name -> text, as `gentrain submit --dry-run` prints them in the repository's root."""
    printed = io.StringIO()
    arguments = ["submit", *EXAMPLES[example], "--dry-run"]
    before = cli.console.file
    here = patch("gentrain.cluster.versions.PYTHON", "3.11"), patch("sys.executable", "/shared/venv/bin/python")
    with contextlib.chdir(HERE.parent), here[0], here[1]:
        cli.console.file = printed
        try:
            status = cli._guarded(lambda **options: cli.app(args=arguments, **options))
        finally:
            cli.console.file = before
    if status:
        raise RuntimeError(f"{' '.join(arguments)} ended with status {status}")
    _, *parts = re.split(r"^# --- (.+)\n", printed.getvalue(), flags=re.MULTILINE)
    return {name: text.rstrip() + "\n" for name, text in zip(parts[::2], parts[1::2], strict=True)}


if __name__ == "__main__":
    for example in EXAMPLES:
        for name, text in rendered(example).items():
            path = HERE / example / name
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)
