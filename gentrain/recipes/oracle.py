"""How far models are from an oracle, a model that never knew the forgotten class: part of the stage `unlearning`."""

from __future__ import annotations

from dataclasses import replace

import torch

from gentrain.cluster.generation import generate
from gentrain.config import ConfigError
from gentrain.metrics.base import Metric, bootstrap_interval
from gentrain.metrics.divergence import NOISES, divergence_bound
from gentrain.models.denoiser import Denoiser
from gentrain.noise import Noise, derive
from gentrain.paths.base import same_law
from gentrain.training.roles import build_network, load_network, load_weights
from gentrain.training.run import open_run

BATCH = 100
_FAKE = "fake_score"


def oracle_distances(oracle: str, runs: dict[str, str], forgotten: int, count: int, draws: int) -> dict[str, Metric]:
    """A bound on the divergence of the oracle's law from each model's, given the class, the mean over the classes that remain, in nats.

    On `count` samples of the oracle, not guided, the classes that remain in turn, of which every model reads the same noised versions.
    No model is guided. Of a one-step student its fake score is asked, which was trained to be the score of what the student draws.

    Args:
        oracle: a run. runs: name -> run. draws: noise levels per sample.

    Raises ConfigError when the models have no law that can be compared with the oracle's.
    """
    truth, run = load_network(oracle)
    if run.codec().shape != run.data.shape:
        raise ConfigError(f"{oracle} draws latents, whose models are not compared yet; leave oracle out", key="oracle")
    remaining = [label for label in range(len(run.data.class_names)) if label != forgotten]
    labels = torch.tensor(remaining).repeat(-(-count // len(remaining)))[:count]
    x0 = run.path.space.encode(generate(oracle, replace(run.sampler, guidance=1.0), labels, derive(0, "oracle")))
    found = {}
    for name, place in runs.items():
        other, whose = _law_of(place)
        if not same_law(truth.path, other.path):
            raise ConfigError(f"{place} has another path than {oracle}; train both on one", key="oracle")
        parts = []
        with torch.no_grad():
            for rows in torch.arange(count).split(BATCH):
                noise = Noise(derive(0, "divergence"), rows)
                parts.append(divergence_bound(truth, other, x0[rows], noise, {"label": labels[rows]}, draws))
        interval = bootstrap_interval(lambda sample: float(sample.mean()), torch.cat(parts))
        what = (
            f"nats; bound on KL(oracle || {whose}) at noise-to-signal ratio {NOISES[0]:g}, given the class, on {count} samples "
            f"of the oracle of the classes that remain, unguided, {draws} levels each; bootstrap over the samples"
        )
        found[name] = Metric(f"divergence from the oracle, {name}", *interval, "lower", what)
    return found


def _law_of(directory: str) -> tuple[Denoiser, str]:
    """The denoiser of what a run draws, and what to call it."""
    run = open_run(directory)
    if _FAKE not in run.method.roles:
        denoiser, run = load_network(directory)
        if not isinstance(denoiser, Denoiser):
            raise ConfigError(f"{directory} holds a {run.method.registered_name}, which has no law", key="oracle")
        return denoiser, "model"
    network = build_network(run, _FAKE)
    network.load_state_dict(load_weights(directory, role=_FAKE))
    return Denoiser(network.eval().requires_grad_(False), run.path, run.prediction), "fake score of the student"
