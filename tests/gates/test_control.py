"""One-step students of the 2-D mixture that are given the quadrant as a control, of which their teacher knows nothing.

A teacher of the mixture without classes, its one-step student, and on that a control branch, by joint distribution matching with the fake
score of the bound and with one that sees the control, and by noise consistency. Distances are squared sliced Wasserstein distances of
10,000 samples, drawn for quadrants of the data's law, from as many fresh points.
"""

from __future__ import annotations

from typing import Any

import pytest

from gentrain.extractors.closed_form import Signs
from gentrain.methods.jdm import JDM
from gentrain.methods.noise_consistency import NoiseConsistency

pytestmark = [pytest.mark.gate, pytest.mark.timeout(3600)]

SAMPLES = 10_000
SEEDS = (0, 1, 2)
CONTROLLED: dict[str, Any] = {
    "jdm": JDM(control=Signs()),
    "jdm, a fake score that sees the control": JDM(control=Signs(), fake_score_conditioning="control"),
    "noise_consistency": NoiseConsistency(control=Signs()),
}
