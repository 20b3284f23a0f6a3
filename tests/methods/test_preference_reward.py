from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from gentrain.config import ConfigError, Document
from gentrain.data.preferences import Preferences
from gentrain.methods.diffusion_dpo import DiffusionDPO
from gentrain.methods.preference_reward import PreferenceReward, davidson_log_likelihood
from gentrain.rewards.networks import Learned, TowerSimilarity
from gentrain.rewards.reading import read_scalar
from gentrain.training.loop import Outcome, train
from gentrain.training.roles import build_network, load_network
from gentrain.training.run import RunConfig, parse_run, save_config
from gentrain.training.world import World
from tests.methods.captioned import CaptionedPatches
from tests.methods.toy import batch_of, noise_of

VOTES = torch.tensor([[1, 0, 0], [0, 1, 0], [0, 0, 1], [3, 1, 2]])


def test_the_likelihood_is_davidsons() -> None:
    """Chances p, p' and nu sqrt(p p') over their sum, written out."""
    r, s = (torch.tensor(values, dtype=torch.float64) for values in ([0.3, -1.0, 2.0, 0.5], [1.0, -1.0, -2.0, 0.1]))
    for nu in (0.4, 2.0):
        p, q = np.exp(r.numpy()), np.exp(s.numpy())
        chances = np.stack([p, q, nu * np.sqrt(p * q)], 1)
        expected = (VOTES.numpy() * np.log(chances / chances.sum(1, keepdims=True))).sum(1)
        np.testing.assert_allclose(davidson_log_likelihood(r, s, VOTES, nu), expected, rtol=1e-12)


def test_without_ties_it_is_bradley_and_terrys_and_a_tie_is_half_a_vote_each() -> None:
    r, s = torch.tensor([0.3, -1.0, 2.0, 0.5]).double(), torch.tensor([1.0, -1.0, -2.0, 0.1]).double()
    first, second = np.array([1, 0, 0.5, 4]), np.array([0, 1, 0.5, 2])
    difference = (r - s).numpy()
    expected = -first * np.log1p(np.exp(-difference)) - second * np.log1p(np.exp(difference))
    np.testing.assert_allclose(davidson_log_likelihood(r, s, VOTES, 0.0), expected, rtol=1e-12)
    assert davidson_log_likelihood(torch.tensor([1e4]), torch.tensor([-1e4]), torch.tensor([[1, 0, 0]]), 0.5).item() == 0


def test_equals_tie_with_the_stated_chance() -> None:
    zero = torch.zeros(1, dtype=torch.float64)
    assert davidson_log_likelihood(zero, zero, torch.tensor([[0, 0, 1]]), 0.5).exp().item() == pytest.approx(0.5 / 2.5)


@pytest.mark.parametrize("seed", range(3))
def test_the_maximum_is_the_law_that_votes_were_drawn_from(seed: int) -> None:
    """Expected votes of Davidson's law: its rewards, up to a constant, are where the gradient vanishes."""
    generator = torch.Generator().manual_seed(seed)
    truth = torch.randn(5, generator=generator, dtype=torch.float64)
    i, j = torch.combinations(torch.arange(5)).T
    d, nu = truth[i] - truth[j], 0.7
    votes = torch.stack([(d / 2).exp(), (-d / 2).exp(), torch.full_like(d, nu)], 1)
    votes = votes / votes.sum(1, keepdim=True)
    found = torch.zeros(5, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([found], max_iter=200, tolerance_grad=1e-12, tolerance_change=1e-16, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = -davidson_log_likelihood(found[i], found[j], votes, nu).mean()
        loss.backward()
        return loss

    optimizer.step(closure)  # type: ignore[arg-type]
    result = found.detach()
    assert ((result - result.mean()) - (truth - truth.mean())).abs().max() < 1e-6


class Heads(nn.Module):
    """Logits of three classes for [B, 2]."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def pairs_of(count: int, start: int = 0) -> dict[str, Tensor]:
    batch = batch_of(count, start)
    rejected = {"rejected/x": batch_of(count, start + 5000)["x"], "rejected/label": batch["label"]}
    return batch | rejected | {"votes": torch.tensor([1.0, 0.0, 0.0]).expand(count, 3)}


def test_the_loss_reads_the_class_of_each_row() -> None:
    network, batch = Heads(), pairs_of(16)
    batch["votes"] = torch.tensor([[2.0, 1.0, 1.0]]).expand(16, 3)
    found = PreferenceReward(ties=0.5, centring=0.1).loss(SimpleNamespace(reward_model=network), batch, noise_of(16))
    r, s = (network(batch[key]).gather(1, batch["label"][:, None])[:, 0] for key in ("x", "rejected/x"))
    expected = -davidson_log_likelihood(r, s, batch["votes"], 0.5).mean() + 0.1 * (r + s).square().mean()
    assert found.value.item() == pytest.approx(expected.item(), rel=1e-5)
    assert found.logs["accuracy"].item() == pytest.approx((r > s).float().mean().item())


def test_reading() -> None:
    x, network = torch.randn(4, 2), Heads()
    logits, label = network(x), torch.tensor([2, -1, 0, 1])
    expected = torch.stack([logits[0, 2], logits[1].mean(), logits[2, 0], logits[3, 1]])
    torch.testing.assert_close(read_scalar("class_logit", network, x, {"label": label}), expected)
    torch.testing.assert_close(read_scalar("class_logit", network, x, None), logits.mean(1))

    def denoiser(x: Tensor, t: Tensor, condition: Any) -> Tensor:
        return x * (condition["label"] + 1)[:, None] + t[:, None]

    torch.testing.assert_close(read_scalar("mean_output", denoiser, x, {"label": label}), x.mean(1) * (label + 1))
    reward = Learned(read="class_logit")
    torch.testing.assert_close(reward(x, {"label": label}, {"reward_model": network}), expected)
    assert reward.networks()["reward_model"].classifier and not Learned(read="mean_output").networks()["reward_model"].classifier


def test_a_model_learns_what_is_preferred_and_leaves_ties_alone() -> None:
    """Preferred: the greater first coordinate; within 0.3 it is a tie."""
    network, method = Heads(), PreferenceReward(ties=1.0)
    optimizer, accuracy = torch.optim.Adam(network.parameters(), lr=1e-2), []
    for step in range(150):
        batch = pairs_of(128, 128 * step)
        d = batch["x"][:, 0] - batch["rejected/x"][:, 0]
        batch["votes"] = torch.stack([d > 0.3, d < -0.3, d.abs() <= 0.3], 1).float()
        loss = method.loss(SimpleNamespace(reward_model=network), batch, noise_of(128, step))
        optimizer.zero_grad()
        loss.value.backward()
        optimizer.step()
        decided = 1 - batch["votes"][:, 2].mean().item()
        accuracy.append((loss.logs["accuracy"].item() - 0.5) / decided + 0.5)
    assert sum(accuracy[-20:]) / 20 > 0.97


def test_votes_are_read_and_mistakes_told(tmp_path: Any) -> None:
    file = tmp_path / "pairs.safetensors"
    tensors = {"preferred": torch.zeros(4, 2), "rejected": torch.ones(4, 2), "label": torch.zeros(4, dtype=torch.int64)}
    save_file({**tensors, "votes": VOTES}, file)
    data = Preferences(file=str(file), classes=["a"], held_out=1)
    assert data.voted and torch.equal(data.split("train")[2]["votes"], torch.tensor([0.0, 0.0, 1.0]))
    with pytest.raises(ValueError, match="has votes; leave those out"):
        DiffusionDPO().check_data(data)
    for votes in (VOTES[:3], VOTES - 1, VOTES * 0):
        save_file({**tensors, "votes": votes}, file)
        with pytest.raises(ValueError, match="none negative and at least one for each pair"):
            data.split("train")
    save_file(tensors, file)
    assert not data.voted and torch.equal(data.split("train")[0]["votes"], torch.tensor([1.0, 0.0, 0.0]))
    settings = {"method": "preference_reward", "data": "rings", "model": "cnn", "training": {"samples": 10}}
    with pytest.raises(ConfigError, match="take the data set preferences"):
        parse_run(Document(settings, "x.yaml"))


@pytest.fixture(scope="module")
def matches(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Each prompt with its own picture preferred to that of another; every fifth prompt last, to be held out."""
    root, data = tmp_path_factory.mktemp("matches"), CaptionedPatches()
    parts = [data.split(name) for name in ("train", "held_out")]
    x, caption = torch.cat([part.x for part in parts]), torch.cat([part.caption for part in parts])
    tensors = {"preferred": x, "rejected": torch.cat([part.x.roll(1, 0) for part in parts]), "caption": caption}
    save_file({name: value.contiguous() for name, value in tensors.items()}, root / "pairs.safetensors")
    (root / "prompts.txt").write_text("\n".join(data.captions))
    return root


def matching(root: Path, seed: int = 0, **data: Any) -> RunConfig:
    pairs = {"name": "preferences", "file": str(root / "pairs.safetensors"), "prompts": str(root / "prompts.txt"), "held_out": 8, **data}
    settings = {
        "method": {"name": "preference_reward", "read": "match"},
        "data": pairs,
        "model": {"name": "towers", "width": 16, "channels": [8], "buckets": 256},
        "optimizer": {"name": "adamw", "lr": 0.01},
        "engine": "torch",
        "training": {"samples": 1280, "batch_size": 28, "log_every": 28},
        "seed": seed,
        "output": str(root / f"run{seed}"),
    }
    return parse_run(Document(settings, "x.yaml"))


def test_towers_read_two_images_of_one_prompt(matches: Path) -> None:
    """-log sigmoid(l_w - l_l) with l = exp(t') cos; the bias cancels and has no gradient."""
    run = matching(matches)
    towers: Any = build_network(run, "reward_model")
    batch = run.codec().encode(run.data.split("train").batch(torch.arange(6)), noise_of(6))  # type: ignore[attr-defined]
    loss = run.method.loss(SimpleNamespace(reward_model=towers), batch, noise_of(6)).value  # type: ignore[attr-defined]
    text = towers.text(batch["tokens"])
    logits = [10 * torch.cosine_similarity(towers.image(batch[key]), text) for key in ("x", "rejected/x")]
    torch.testing.assert_close(loss, -torch.nn.functional.logsigmoid(logits[0] - logits[1]).mean())
    loss.backward()
    assert towers.logit_scale.grad.abs() > 0 and towers.logit_bias.grad.abs() == 0


def test_towers_learn_which_image_a_prompt_asks_for(matches: Path) -> None:
    run = matching(matches)
    save_config(run)
    assert train(run, World(0, 1, torch.device("cpu")), lambda: False) is Outcome.FINISHED
    towers, _ = load_network(run.directory)
    reward = TowerSimilarity(model=run.model)  # type: ignore[arg-type]
    reward.check_data(run.data)
    held_out = run.data.split("held_out").batch(torch.arange(8))  # type: ignore[attr-defined]
    asked = {"caption": held_out["caption"]}
    first, second = (reward(held_out[key], asked, {"towers": towers}) for key in ("x", "rejected/x"))
    assert (first > second).float().mean() > 0.7  # prompts never seen; over seeds 0 to 3: 1, 1, 1, 0.75; chance is 0.5


@pytest.mark.parametrize(
    ("data", "message"),
    [({"prompts": None}, "of which data.prompts names none"), ({"prompts": "nowhere.txt"}, "nowhere.txt cannot be read")],
)
def test_pairs_without_prompts_are_refused(matches: Path, data: dict[str, Any], message: str) -> None:
    with pytest.raises((ConfigError, ValueError), match=message):
        matching(matches, **data).codec()


def test_captions_beyond_the_prompts_are_refused(matches: Path, tmp_path: Path) -> None:
    (tmp_path / "few.txt").write_text("one\ntwo")
    with pytest.raises(ValueError, match=r"caption must be \[N\] int64, each a line from 0 to 1"):
        matching(matches, prompts=str(tmp_path / "few.txt")).data.split("train")
