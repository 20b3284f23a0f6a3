"""Images to tokens, a model of them, a round of DDO against its own samples, and images again, as stages."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from gentrain.config import ConfigError
from gentrain.data.base import TensorItems
from gentrain.data.digits import Digits
from gentrain.data.pool import KnownLikelihood
from gentrain.data.tokens import Tokens, Walks
from gentrain.methods.token_ddo import TokenDDO
from gentrain.models.vq import VQ, load_vq
from gentrain.noise import Noise
from gentrain.recipes import tokenize
from gentrain.recipes.base import load_recipe, run_recipe
from gentrain.recipes.evaluate import read_metrics
from gentrain.recipes.generate import Generate
from gentrain.recipes.tokenize import Tokenize
from gentrain.training.roles import load_network
from gentrain.training.run import open_run
from tests.methods.captioned import CaptionedPatches

SHORT: dict[str, Any] = {"engine": "torch", "optimizer": {"name": "adamw", "lr": 2e-3}}
TRAINING: dict[str, Any] = {"samples": 320, "batch_size": 32, "log_every": 64, "checkpoint_every": 160, "keep_last": 2}
MODEL = {"name": "token_transformer", "vocabulary": 8, "layers": 1, "heads": 2, "head_dim": 4}


def on_tokens(method: Any, **more: Any) -> dict[str, Any]:
    data = {"name": "tokens", "directory": "${output:tokens}"}
    return SHORT | {"data": data, "model": MODEL, "method": method, "training": TRAINING, **more}


def round_of(**method: Any) -> dict[str, Any]:
    method = {"name": "token_ddo", "pool": "${output:fakes}", "alpha": 1, "beta": 0.5, **method}
    return on_tokens(method, roles={"reference": {"weights": "${output:start}"}})


STAGES: dict[str, Any] = {
    "vq": {
        "name": "train",
        "run": SHORT | {"data": "digits", "method": "vq_autoencoder", "training": TRAINING,
                        "model": {"name": "vq", "channels": [8, 8], "codes": 8, "code_dim": 3, "norm_groups": 4}},
    },
    "tokens": {"name": "tokenize", "autoencoder": "${output:vq}"},
    "start": {"name": "train", "run": on_tokens("maximum_likelihood")},
    "fakes": {"name": "generate", "run": "${output:start}", "count": 70, "decoded": False},
    "scale": {"name": "calibrate", "run": round_of(), "steps": 8},
    "said": {"name": "reference_likelihood", "run": "${output:start}", "pool": "${output:fakes}"},
    "best": {
        "name": "train_best", "run": round_of(beta="${output:scale}", known="${output:said}"), "before": "${output:start}",
        "count": 60, "data": "digits", "likelihood": 40,
    },
    "drawn": {"name": "generate", "run": "${output:best}", "count": 60, "sampler": {"name": "autoregressive", "guidance": 2, "top_k": 5}},
    "nats": {"name": "likelihood", "run": "${output:best}", "count": 100},
    "scores": {"name": "evaluate", "data": "digits", "samples": {"after": "${output:drawn}"}},
}  # fmt: skip


def run(place: Path, stages: dict[str, Any]) -> Path:
    (place / "recipe.yaml").write_text(yaml.safe_dump({"stages": stages, "output": str(place / "out")}, sort_keys=False))
    run_recipe(load_recipe(place / "recipe.yaml"), lambda line: None)
    return place / "out"


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(tmp_path_factory.mktemp("tokens"), STAGES)


def test_the_tokens_are_those_of_the_autoencoder(out: Path) -> None:
    network, _ = load_network(out / "vq")
    for split in ("train", "held_out"):
        images, tokens = Digits().split(split), Tokens(str(out / "tokens")).split(split)
        assert torch.equal(tokens.label, images.label) and tokens.x.shape == (len(images), 16)
        assert torch.equal(tokens.x, network.encode(images.x))
    told = {metric["name"]: metric["value"] for metric in read_metrics(out / "tokens")}
    held_out = Digits().split("held_out").x
    error = (network.decode(network.encode(held_out)) - held_out).abs().mean().item()
    assert told["reconstruction error, held out"] == pytest.approx(error, rel=0.02)
    assert told["codes in use"] == Tokens(str(out / "tokens")).split("train").x.unique().numel() <= 8
    assert 1 < told["perplexity of the codes"] <= told["codes in use"]


def test_pools_hold_tokens_and_samples_are_images(out: Path) -> None:
    fakes, drawn = (load_file(out / name / "samples.safetensors")["x"] for name in ("fakes", "drawn"))
    assert fakes.dtype == torch.int64 and fakes.shape == (70, 16) and fakes.max() < 8
    assert drawn.dtype == torch.float32 and drawn.shape == (60, 1, 8, 8) and (out / "drawn" / "grid.png").is_file()
    assert not (out / "fakes" / "grid.png").exists()
    assert (
        json.loads((out / "fakes" / "info.json").read_text())["other_law"],
        json.loads((out / "drawn" / "info.json").read_text())["other_law"],
    ) == (None, "guidance 2")
    told = [metric["definition"] for metric in read_metrics(out / "scores") if metric["name"].endswith(", after")]
    assert told and all(each.endswith("drawn with autoregressive, guidance 2, top_k 5") for each in told)
    Generate(str(out / "start"), count=70).execute(out.parent / "decoded")
    with torch.no_grad():
        again = load_vq(out / "tokens" / "tokenizer").decode(fakes)
    torch.testing.assert_close(load_file(out.parent / "decoded" / "samples.safetensors")["x"], again)


def test_a_round_begins_with_its_reference_and_beta_is_calibrated(out: Path) -> None:
    method: Any = open_run(out / "best" / "trials" / "000").method
    assert method.beta == json.loads((out / "scale" / "calibration.json").read_text())["beta"]
    lines = [json.loads(line) for line in (out / "best" / "trials" / "000" / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["log_ratio_square"] > 0 and lines[-1]["reference_loss"] > 0
    told = json.loads((out / "best" / "promotion.json").read_text())
    assert list(told["distances"])[:2] == ["before", "trained at 160"]
    assert {row["name"].partition(",")[0] for row in read_metrics(out / "best")} == {"energy distance", "nats per sample"}


def test_what_the_reference_said_once_is_what_it_would_say_in_each_step(out: Path, tmp_path: Path) -> None:
    """The curve is that of a round that asks it, with labels dropped or not; and it is asked no more."""
    losses = []
    for known in (None, "${output:said}"):
        run(out.parent, STAGES | {"asked": {"name": "train", "run": round_of(known=known)}})
        lines = [json.loads(line) for line in (out / "asked" / "metrics.jsonl").read_text().splitlines()]
        losses.append([[line[key] for key in ("loss/model", "reference_loss", "log_ratio_data", "log_ratio_fake")] for line in lines])
    for asked, known in zip(*losses, strict=True):
        assert asked == pytest.approx(known, rel=1e-4, abs=1e-4)
    method: Any = open_run(out / "asked").method
    model, _ = load_network(out / "start")
    items = KnownLikelihood(str(out / "said"), "", "").beside("data", Tokens(str(out / "tokens")).split("train"), digest(out))
    batch = items.batch(torch.arange(90))

    def never(*_: Any) -> None:
        raise AssertionError("the reference was asked")

    nets = SimpleNamespace(model=model, reference=SimpleNamespace(token_log_prob=never))
    noise = Noise(1, torch.arange(90))
    found = method.ratio(nets, batch, noise)
    assert found.log_ratio.abs().max() < 1e-3 and 0 < (~found.kept).sum() < 90
    torch.testing.assert_close(found.loss, found.reference_loss, rtol=1e-5, atol=1e-5)


def digest(out: Path) -> str:
    return str(json.loads((out / "fakes" / "info.json").read_text())["weights"])


def test_what_the_reference_said_of_others_is_refused(out: Path, tmp_path: Path) -> None:
    known, tokens = KnownLikelihood(str(out / "said"), "reference", "method.known"), Tokens(str(out / "tokens")).split("train")
    with pytest.raises(ConfigError, match="is what other weights") as caught:
        known.beside("data", tokens, "0" * 64)
    assert caught.value.key == "method.known"
    for others in (tokens.x.flip(0), tokens.x[1:]):
        with pytest.raises(ConfigError, match="is of other tokens than the data has now"):
            known.beside("data", TensorItems(others, tokens.label[: len(others)]), digest(out))
    with pytest.raises(ConfigError, match="is of other tokens than the data has now"):
        known.beside("data", TensorItems(tokens.x, tokens.label.flip(0)), digest(out))
    with pytest.raises(ConfigError, match="is missing or damaged"):
        known.beside("other", tokens, digest(out))
    with pytest.raises(ConfigError, match="held in memory"):
        known.beside("data", Walks().split("train"), digest(out))
    with pytest.raises(ConfigError, match="name a pool, or leave it out") as caught:
        TokenDDO(known="somewhere")
    assert caught.value.key == "known"
    shutil.copytree(out / "said", tmp_path / "stale")
    said = load_file(out / "said" / "fake.safetensors")
    save_file(said, tmp_path / "stale" / "fake.safetensors", {"weights": "0" * 64, "rows": ""})
    with pytest.raises(ConfigError, match="is what other weights"):
        run(out.parent, STAGES | {"stale": {"name": "train", "run": round_of(known=str(tmp_path / "stale"))}})
    Generate(str(out / "best"), count=70, decoded=False).execute(tmp_path / "others")
    with pytest.raises(ConfigError, match="were drawn by other weights"):
        run(tmp_path, {"said": {"name": "reference_likelihood", "run": str(out / "start"), "pool": str(tmp_path / "others")}})
    with pytest.raises(ConfigError, match="only what a token model says"):
        run(tmp_path, {"said": {"name": "reference_likelihood", "run": str(out / "vq"), "pool": str(out / "fakes")}})


def test_the_likelihood_is_exact(out: Path) -> None:
    model, run = load_network(out / "best")
    items = run.data.split("held_out")
    (metric,) = read_metrics(out / "nats")
    rows = items.batch(torch.arange(len(items)))  # type: ignore[attr-defined]
    nats = -model.log_prob(rows["x"], {"label": rows["label"]})
    assert metric["low"] < metric["value"] < metric["high"] and abs(metric["value"] - nats.mean().item()) < 3 * nats.std().item() / 10


def test_what_is_no_pool_of_the_reference_is_refused(out: Path, tmp_path: Path) -> None:
    Generate(str(out / "start"), count=70, decoded=True).execute(tmp_path / "images")
    changed = {"other": {"name": "train", "run": round_of(pool=str(tmp_path / "images"))}}
    with pytest.raises(ConfigError, match="is drawn with decoded: false"):
        run(out.parent, STAGES | changed)
    with pytest.raises(ConfigError, match="were drawn with guidance 2, which are no samples"):
        run(out.parent, STAGES | {"fakes": STAGES["fakes"] | {"sampler": {"name": "autoregressive", "guidance": 2}}})


def test_tokens_that_changed_are_refused(out: Path, tmp_path: Path) -> None:
    shutil.copytree(out / "tokens", tmp_path / "tokens")
    data = Tokens(str(tmp_path / "tokens"))
    data.fit()
    path = tmp_path / "tokens" / "train.safetensors"
    save_file({key: value.flip(0) for key, value in load_file(path).items()}, path)
    with pytest.raises(ValueError, match="is not the file that was written"):
        data.split("train")
    manifest = json.loads((tmp_path / "tokens" / "manifest.json").read_text())
    (tmp_path / "tokens" / "manifest.json").write_text(json.dumps(manifest | {"licence": "another"}))
    with pytest.raises(ValueError, match="not those that the run began with"):
        Tokens(str(tmp_path / "tokens"), digest=data.digest).fit()
    (tmp_path / "tokens" / "manifest.json").write_text("{}")
    with pytest.raises(ConfigError, match="make tokens with a stage `tokenize`"):
        _ = Tokens(str(tmp_path / "tokens")).shape


class Unlabelled(Digits):
    """Images without a word about them, which must be fitted before they are read."""

    fitted = False

    def fit(self) -> None:
        self.fitted = True

    def split(self, name: str) -> Any:
        if not self.fitted:
            raise RuntimeError("not fitted")
        return [{"x": x} for x in super().split(name).x[:12]]


def autoencoder_of(monkeypatch: pytest.MonkeyPatch, data: Any) -> None:
    network = VQ(channels=(8, 8), codes=8, code_dim=3, norm_groups=4).build(data.shape, 0)
    monkeypatch.setattr(tokenize, "load_network", lambda directory: (network, SimpleNamespace(data=data)))


def test_images_without_labels_become_tokens_of_no_class(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    autoencoder_of(monkeypatch, Unlabelled())
    Tokenize("runs/vq").execute(tmp_path / "tokens")
    for split in ("train", "held_out"):
        assert Tokens(str(tmp_path / "tokens")).split(split).label.tolist() == [-1] * 12


def test_images_whose_captions_would_be_lost_or_that_cannot_be_fitted_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    autoencoder_of(monkeypatch, CaptionedPatches())
    with pytest.raises(ConfigError, match="captioned_patches has captions, which tokens would lose") as caught:
        Tokenize("runs/vq").execute(tmp_path / "tokens")
    assert caught.value.key == "data"
    changed = Unlabelled()
    monkeypatch.setattr(changed, "fit", lambda: (_ for _ in ()).throw(ValueError("the images have changed")))
    autoencoder_of(monkeypatch, changed)
    with pytest.raises(ConfigError, match="the images have changed") as caught:
        Tokenize("runs/vq").execute(tmp_path / "tokens")
    assert caught.value.key == "data" and not (tmp_path / "tokens").exists()


def test_other_autoencoders_and_images_are_refused(out: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not a vq_autoencoder"):
        run(tmp_path, {"tokens": {"name": "tokenize", "autoencoder": str(out / "start")}})
    with pytest.raises(ConfigError, match=r"learnt images of shape \(1, 8, 8\)"):
        run(tmp_path, {"tokens": {"name": "tokenize", "autoencoder": str(out / "vq"), "data": "mnist5k"}})
    with pytest.raises(ConfigError, match="cannot be exported"):
        run(tmp_path, {"export": {"name": "export", "run": str(out / "best")}})
