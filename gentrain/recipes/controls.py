"""How far samples are from the controls that they were drawn for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from gentrain.data.pool import INFO, SAMPLES
from gentrain.metrics.base import Metric, bootstrap_interval
from gentrain.models.control import CONTROL
from gentrain.training.controls import networks_of
from gentrain.training.run import open_run

_BATCH = 100  # images at once


def paired(above: Tensor, below: Tensor, columns: int) -> Tensor:
    """Images [N, C, H, W] each, a row of `columns` of the first above each row of the second: [2 N, C, H, W], the last rows filled up."""
    rows = [(above[first : first + columns], below[first : first + columns]) for first in range(0, len(above), columns)]
    whole = [pair for pair in rows if len(pair[0]) == columns] or rows[:1]
    return torch.cat([part for pair in whole for part in pair])


def condition_error(name: str, place: str, judge: Any = None) -> list[Metric]:
    """How far the samples in a directory are from the controls that they were drawn for; nothing where there were none.

    Args:
        judge: a classifier, which reads the class where that is the control of a run that was trained without one; None = nothing is told
            of such a run.
    """
    info, path = Path(place) / INFO, Path(place) / SAMPLES
    samples = load_file(path)
    if CONTROL not in samples or not info.is_file():
        return []
    run = open_run(json.loads(info.read_text())["run"])
    control = run.method.steering
    assert control is not None
    networks = networks_of(run, control)
    if control.labels and not networks:
        if judge is None:
            return []
        networks = dict.fromkeys(control.networks(), judge)
    codec = run.codec()
    decode = codec.decode if samples["x"].shape[1:] != codec.decoded_shape else torch.nn.Identity()  # as the network drew them
    with torch.no_grad():
        pairs = zip(samples[CONTROL].split(_BATCH), samples["x"].split(_BATCH), strict=True)
        errors = torch.cat([control.error(asked, decode(x), networks) for asked, x in pairs]).double()
    value, low, high = bootstrap_interval(lambda rows: float(rows.mean()), errors)
    definition = f"{control.error_is}, of {control.registered_name}, over {len(errors)} samples, bootstrap interval"
    return [Metric(f"condition error, {name}", value, low, high, "lower", definition)]
