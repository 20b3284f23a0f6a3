import pytest
import torch

from gentrain.config import Document, build
from gentrain.domains.box import Box
from gentrain.models.denoiser import Denoiser
from gentrain.noise import Noise
from gentrain.paths.inside import Inside
from gentrain.paths.reflected_heat import ReflectedHeat
from gentrain.paths.variance_exploding import VarianceExploding
from gentrain.samplers.base import Sampler
from gentrain.samplers.ddim import DDIM
from tests.samplers.toy import CONDITION, SHAPE, noise_for, toy_network


@pytest.mark.parametrize("name", [name for name, each in Sampler.available().items() if not each.of_tokens])
def test_samples_belong_to_their_rows(name: str) -> None:
    """The same images whatever the batch they are drawn in: what lets a fleet of any size draw them."""
    box = Box(-1.0, 1.0)
    one_step = {"steps": 1, "guidance": 1.0}
    special = {"ddim": {"eta": 0.5}, "reflected_sde": {"corrector_steps": 1}, "confined": {"domain": box}, "one_step": one_step}
    special["few_step"] = {"guidance": 1.0}
    special["adaptive_ode"] = {"steps": 200}
    fields = {"steps": 5, "guidance": 2.0, **special.get(name, {})}
    sampler, denoiser = Sampler.available()[name](**fields), Denoiser(toy_network, VarianceExploding(), "edm")
    if name.startswith("reflected"):
        denoiser = Denoiser(toy_network, ReflectedHeat(space=Inside(domain=box)), "eps")
    whole = sampler.sample(denoiser, SHAPE, noise_for(), CONDITION)
    parts = [
        sampler.sample(denoiser, (len(rows), *SHAPE[1:]), Noise(0, rows), {"label": CONDITION["label"][rows]})
        for rows in torch.arange(6).split([1, 3, 2])
    ]
    torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-6, atol=1e-6)


def test_samplers_are_configured_by_name() -> None:
    sampler = build(Sampler, Document({"name": "ddim", "steps": 5, "guidance": 2, "eta": 0.3}, "x.yaml"))
    assert sampler == DDIM(steps=5, guidance=2.0, eta=0.3)
