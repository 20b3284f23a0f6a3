import pytest
import torch

from gentrain.config import ConfigError, Document, build
from gentrain.data.base import Data
from gentrain.data.core_flux import CoreFlux


@pytest.fixture(scope="module")
def data():
    return CoreFlux(train=600, held_out=200)


def test_the_model_and_its_free_dimensions(data):
    stoichiometry, low, high, reactions = data._model
    assert stoichiometry.shape == (72, 95) and int(torch.linalg.matrix_rank(stoichiometry)) == 67
    pfk = stoichiometry[:, reactions.index("PFK")]  # ATP + F6P -> ADP + FDP + H
    assert sorted(pfk[pfk != 0].tolist()) == [-1, -1, 1, 1, 1]
    bounds = dict(zip(reactions, zip(low.tolist(), high.tolist())))
    assert bounds["ATPM"] == (8.39, 1000) and bounds["EX_glc__D_e"] == (-10, 1000) and bounds["PFK"] == (0, 1000)
    assert abs(float(data._range[reactions.index("Biomass_Ecoli_core"), 1]) - 0.8739) < 1e-4  # the known optimum
    # 95 - 67, less four: fructose, fumarate, glutamine and malate cannot be taken up
    assert data.shape == (24,) and int((data._scale == 0).sum()) == 8


def test_items_are_steady_states_within_their_bounds(data):
    stoichiometry, low, high, _ = data._model
    for name, count in (("train", 600), ("held_out", 200)):
        items = data.split(name)
        fluxes = data.fluxes(items.x)
        assert items.x.shape == (count, 24) and data.domain.contains(items.x).all()
        assert (fluxes @ stoichiometry.T).abs().max() < 1e-9
        assert (fluxes >= low - 1e-9).all() and (fluxes <= high + 1e-9).all()


def test_classes_are_bins_of_the_growth_rate(data):
    items = data.split("train")
    growth = data.growth_rate(items.x)
    for number, (low, high) in enumerate(zip([0, *data.limits], [*data.limits, 1])):
        assert ((growth[items.label == number] >= low) & (growth[items.label == number] <= high)).all()
    assert len(data.class_names) == 5 and data.class_names[1] == "growth rate 0.01 to 0.022"
    assert (items.label.bincount(minlength=5) / 600 - 0.2).abs().max() < 0.08  # 5 standard deviations
    assert data.split("train") is items and not torch.equal(items.x[:200], data.split("held_out").x)
    del data.__dict__["_drawn"]
    assert torch.equal(data.split("train").x, items.x)


def test_mirror_maps_work_on_this_degenerate_polytope(data):
    """Many vertices of a flux polytope are where more facets meet than dimensions."""
    z = 4 * torch.randn(300, 24, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x, _ = data.domain.to_primal(z)
    assert data.domain.contains(x).all() and (data.domain.to_primal(data.domain.to_dual(x[:50]))[0] - x[:50]).abs().max() < 1e-8
    assert data.domain.contains(data.domain.project(10 * z.float())).all() and data.domain.contains(data.domain.reflect(z)).all()


def test_mistakes_are_named(monkeypatch):
    with pytest.raises(ConfigError, match="limits: expected growth rates in ascending order"):
        build(Data, Document({"name": "core_flux", "limits": [0.2, 0.1]}, "x.yaml"))
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="package cobra, which is not installed; pip install --no-deps cobra"):
        _ = CoreFlux().shape
