"""Rounds of DDO as stages: samples of the reference, beta from a probe, trials of a round, their best checkpoint, the next round."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from gentrain import cli
from gentrain.catalogue import stages_table
from gentrain.cluster import tune
from gentrain.cluster.session import session
from gentrain.cluster.sweeps import read_record
from gentrain.config import ConfigError
from gentrain.metrics.base import proportion
from gentrain.metrics.distances import energy_distance
from gentrain.models.adapters import digest_of
from gentrain.recipes.base import Stopped, load_recipe, run_recipe
from gentrain.recipes.evaluate import read_held_out, read_metrics
from gentrain.recipes.generate import Generate
from gentrain.recipes.likelihood import Likelihood
from gentrain.recipes.train_best import Contest, TrainBest
from gentrain.training.roles import load_weights
from gentrain.training.run import open_run

RUN: dict[str, Any] = {
    "data": {"name": "spiral", "held_out": 200},
    "model": {"name": "mlp", "width": 16, "depth": 1},
    "path": "variance_exploding",
    "prediction": "edm",
    "sampler": {"name": "heun", "steps": 3},
    "engine": "torch",
    "optimizer": {"name": "adamw", "lr": 1e-3},
    "training": {"samples": 640, "batch_size": 32, "log_every": 64, "checkpoint_every": 320, "keep_last": 2},
}


def round_of(reference: str, pool: str, **method: Any) -> dict[str, Any]:
    method = {"name": "ddo", "pool": pool, "times": "log_normal", "alpha": 1, "beta": 5, **method}
    return RUN | {"method": method, "roles": {"reference": {"weights": reference}}}


STAGES: dict[str, Any] = {
    "start": {"name": "train", "run": RUN | {"method": {"name": "diffusion", "times": "log_normal"}}},
    "fakes": {"name": "generate", "run": "${output:start}", "count": 70},
    "scale": {"name": "calibrate", "run": round_of("${output:start}", "${output:fakes}"), "steps": 12},
    "round": {
        "name": "train_best", "run": round_of("${output:start}", "${output:fakes}", beta="${output:scale}"),
        "choices": {"method.alpha": [1, 3]}, "before": "${output:start}", "count": 150, "likelihood": 50,
    },
    "fakes2": {"name": "generate", "run": "${output:round}", "count": 70},
    "round2": {"name": "train", "run": round_of("${output:round}", "${output:fakes2}", beta="${output:scale}")},
}  # fmt: skip


def run(place: Path, stages: dict[str, Any]) -> Path:
    (place / "recipe.yaml").write_text(yaml.safe_dump({"stages": stages, "output": str(place / "out")}, sort_keys=False))
    run_recipe(load_recipe(place / "recipe.yaml"), lambda line: None)
    return place / "out"


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(tmp_path_factory.mktemp("rounds"), STAGES)


def test_samples_are_kept_with_the_digest_of_their_weights(out: Path) -> None:
    info = json.loads((out / "fakes" / "info.json").read_text())
    assert info["weights"] == digest_of(load_weights(str(out / "start")))
    assert info["weights"] == digest_of(load_weights(str(out / "round" / "before")))
    assert digest_of(load_weights(str(out / "round"))) == json.loads((out / "fakes2" / "info.json").read_text())["weights"]


def test_beta_is_a_share_of_one_over_the_spread_and_becomes_part_of_the_configuration(out: Path) -> None:
    found = json.loads((out / "scale" / "calibration.json").read_text())
    last = json.loads((out / "scale" / "probe" / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["samples"] == 12 * 32
    assert found["beta"] == pytest.approx(0.3 * last["log_ratio_square"] ** -0.5, rel=0.01)
    for number, alpha in enumerate((1, 3)):
        method: Any = open_run(out / "round" / "trials" / f"{number:03d}").method
        assert (method.alpha, method.beta) == (alpha, found["beta"])
    probe: Any = open_run(out / "scale" / "probe").method
    assert (probe.alpha, probe.beta) == (0, 1.0)


def test_the_nearest_checkpoint_of_all_trials_is_the_stages_run(out: Path) -> None:
    told = json.loads((out / "round" / "promotion.json").read_text())
    places = {"before": "before", "method.alpha=1": "trials/000", "method.alpha=3": "trials/001"}
    assert {label.partition(" at ")[0] for label in told["distances"]} == set(places)
    assert told["distances"][told["promoted"]] == min(told["distances"].values())
    trial, _, samples = told["promoted"].partition(" at ")
    best, source = open_run(out / "round"), open_run(out / "round" / places[trial])
    assert best.storage.names() == [f"{int(samples or 640):012d}"] and best.method == source.method
    with best.storage.open(best.storage.names()[0]) as copy, source.storage.open(best.storage.names()[0]) as original:
        copy.verify()
        assert copy.hashes == original.hashes
    labels = list(dict.fromkeys(["before", told["promoted"]]))
    rows = read_metrics(out / "round")
    names = [f"energy distance, {label}" for label in labels] + [f"bits per dim, variational bound, {label}" for label in labels]
    assert [row["name"] for row in rows] == names
    (direct,), _ = Likelihood(str(out / "round"), 50).measure()
    assert rows[-1]["value"] == direct.value


def test_what_is_compared_are_samples_of_each_checkpoint_with_the_same_noise(out: Path, tmp_path: Path) -> None:
    told = json.loads((out / "round" / "promotion.json").read_text())["distances"]
    real = read_held_out(open_run(out / "start").data, 150)["x"]
    for place, label in (("round/trials/000", "method.alpha=1"), ("start", "before")):
        newest = open_run(out / place).storage.latest()
        Generate(str(out / place), count=150).execute(tmp_path / place)
        x = load_file(tmp_path / place / "samples.safetensors")["x"]
        assert told[label if label == "before" else f"{label} at {int(str(newest))}"] == pytest.approx(energy_distance(x, real))
    assert len(set(told.values())) == len(told)


def contest(out: Path, **settings: Any) -> dict[str, Any]:
    return (
        STAGES["round"]
        | {"run": round_of(str(out / "start"), str(out / "fakes")), "before": str(out / "start"), "likelihood": 0}
        | settings
    )


def longer(out: Path) -> dict[str, Any]:
    run = round_of(str(out / "start"), str(out / "fakes"))
    return run | {"training": run["training"] | {"samples": 1920, "keep_last": 3}}


def test_too_few_samples_for_the_judges_features_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "drawn" / "1").mkdir(parents=True)
    (tmp_path / "drawn" / "1" / "info.json").write_text("{}")
    monkeypatch.setattr(Contest, "compared", lambda *_: (torch.zeros(20, 30), torch.zeros(50, 30)))
    run: Any = SimpleNamespace(directory=tmp_path, storage=SimpleNamespace(latest=lambda: "1"), data=None)
    with pytest.raises(ConfigError, match="count: 20 samples cannot give a covariance of 30 features; use more"):
        Contest(metric="frechet distance", by="frechet").value(run)


@pytest.mark.parametrize("patience, seen", [(1, 960), (2, 1280)])
def test_a_trial_that_comes_no_nearer_ends_and_its_best_checkpoint_is_kept(
    out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, patience: int, seen: int
) -> None:
    distances = {"before": [9.0], "000": [3.0, 2.0, 2.5, 2.2, 1.0, 0.5]}
    monkeypatch.setattr(Contest, "value", lambda self, run: distances[run.directory.name].pop(0))
    monkeypatch.setattr(TrainBest, "_distance", lambda self, contest, label, candidate: proportion(label, torch.ones(3), "lower", ""))
    stages = {"round": contest(out, run=longer(out), choices={}, patience=patience)}
    found = run(tmp_path, stages) / "round"
    told = json.loads((found / "promotion.json").read_text())
    assert told["promoted"] == "trained at 640" and list(told["distances"])[-1] == f"trained at {seen}"
    assert open_run(found).storage.names() == ["000000000640"]
    assert [trial["status"] for trial in read_record(found)["trials"].values()] == ["stopped early"]


def test_the_beginning_stays_where_no_trial_is_nearer_and_a_trial_that_forgets_the_data_is_over(out: Path, tmp_path: Path) -> None:
    """A step of 1 takes the model away from the data: the guard ends that trial, and the other has learnt next to nothing."""
    run_ = round_of(str(out / "start"), str(out / "fakes"))
    stages = {"round": contest(out, run=run_, choices={"optimizer.lr": [1.0, 1e-12]})}
    found = run(tmp_path, stages) / "round"
    record = read_record(found)["trials"]
    assert record["000"]["status"] == "diverged" and "more than 2 times the reference's" in record["000"]["error"]
    assert record["001"]["status"] in ("finished", "stopped early")
    told = json.loads((found / "promotion.json").read_text())["distances"]
    assert not any(label.startswith("optimizer.lr=1.0") for label in told) and told["before"] == pytest.approx(
        told["optimizer.lr=1e-12 at 320"]
    )


def test_a_round_that_is_stopped_goes_on_with_its_trials(out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stages = {"round": contest(out)}
    whole = json.loads((run(tmp_path, stages) / "round" / "promotion.json").read_text())["distances"]
    again = tmp_path / "again"
    again.mkdir()
    real = tune.advance

    def until(trial: str) -> None:
        def stopped(values: Any, sweep: Path, name: str, settings: Any) -> dict[str, Any]:
            trained = [samples for samples, _ in read_record(sweep)["trials"][name]["rungs"]]
            return {"told": "interrupted", "done": True} if (name, trained) == (trial, [320]) else real(values, sweep, name, settings)

        monkeypatch.setattr(tune, "advance", stopped)
        with pytest.raises(Stopped):
            run(again, stages)

    trials = again / "out" / "round" / "trials"
    until("000")
    assert not (trials / "001").exists() and read_record(trials.parent)["trials"]["000"]["status"] == "waiting"
    until("001")
    kept = trials / "000" / "metrics.jsonl"
    written = kept.stat().st_mtime_ns
    monkeypatch.setattr(tune, "advance", real)
    found = run(again, stages) / "round"
    assert json.loads((found / "promotion.json").read_text())["distances"] == whole
    assert kept.stat().st_mtime_ns == written


@pytest.mark.cluster
@pytest.mark.timeout(300)
def test_trials_under_ray_tune_are_those_of_one_process(out: Path, tmp_path: Path) -> None:
    found = {}
    for name, concurrent in (("alone", 0), ("tune", 2)):
        (tmp_path / name).mkdir()
        with session():
            place = run(tmp_path / name, {"round": contest(out, concurrent=concurrent)}) / "round"
        found[name] = json.loads((place / "promotion.json").read_text())
        assert {trial["status"] for trial in read_record(place)["trials"].values()} <= {"finished", "stopped early"}
    assert found["alone"]["promoted"] == found["tune"]["promoted"]
    assert found["alone"]["distances"] == pytest.approx(found["tune"]["distances"], rel=1e-5)


def test_a_plan_says_what_each_stage_holds(out: Path, tmp_path: Path) -> None:
    """Stages hold nothing of each other, so a fleet has what the trainer before it had."""
    under_ray = STAGES["start"]["run"] | {"cluster": {"place": "ray", "workers": 2, "gpus_per_worker": 1}}
    stages = STAGES | {
        "start": {"name": "train", "run": under_ray},
        "fakes": STAGES["fakes"] | {"actors": 3},
        "round": contest(out, concurrent=None),
        "round2": contest(out, run=longer(out), choices={}, actors=2),
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({"stages": stages, "output": str(tmp_path / "out")}, sort_keys=False))
    recipe = load_recipe(tmp_path / "recipe.yaml")
    assert {name: stage.held for name, stage in recipe.stages.items()} == {
        "start": "2 workers under Ray Train, each with a core and 1 GPUs",
        "fakes": "a fleet of at most 3 actors, a core and, where there are any, a GPU each",
        "scale": "this process",
        "round": "2 trials, as many at a time as there is room for, each: an actor of Ray Tune with a core",
        "fakes2": "this process",
        "round2": "this process, and between its trainings a fleet of at most 2 actors",
    }
    assert [name for name, stage in recipe.stages.items() if stage.under_ray] == ["start", "round"]
    table = stages_table(recipe.stages)
    assert list(table.columns[2].cells) == [stage.held for stage in recipe.stages.values()]


@pytest.mark.parametrize("concurrent, status", [(2, 0), (0, cli.MEND)])
def test_a_recipe_whose_trials_ray_runs_is_sent_with_a_cluster_of_its_own(
    out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], concurrent: int, status: int
) -> None:
    recipe = {"stages": {"round": contest(out, concurrent=concurrent)}, "output": str(tmp_path / "out")}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    arguments = ["submit", str(tmp_path / "recipe.yaml"), "--dry-run", "cluster.submit={name: slurm, nodes: 2}"]
    assert cli._guarded(lambda **options: cli.app(args=arguments, **options)) == status
    printed = capsys.readouterr()
    assert ("ray start" in printed.out) == (status == 0) and ("2 nodes for a run in one process" in printed.err) == (status != 0)


def test_mistakes_in_a_round_are_told_as_the_recipe_loads(out: Path, tmp_path: Path) -> None:
    for changes, key, message in (
        ({"patience": 2}, "stages.round.run.training.keep_last", "keep at least 3"),
        ({"choices": {"method.alfa": [1]}}, "stages.round.run.method.alfa", r"trial 000 \(method.alfa=1\): unknown key"),
        ({"choices": {"method.alpha": [1, -1]}}, "stages.round.run.method.alpha", r"trial 001"),
        ({"actors": 2, "concurrent": 2}, "stages.round.actors", "holds its core while it draws"),
        ({"choices": {"method.alpha": []}}, "stages.round.choices.method.alpha", "is empty"),
        ({"choices": {"output": ["x"]}}, "stages.round.choices.output", "the same for all trials"),
    ):
        with pytest.raises(ConfigError, match=message) as caught:
            run(tmp_path, {"round": contest(out, **changes)})
        assert caught.value.key == key
    with pytest.raises(ConfigError, match="is not a run's directory"):
        run(tmp_path, {"round": contest(out, before=str(tmp_path / "none"))})


def test_a_finished_recipe_is_skipped_and_a_pool_of_another_round_refused(out: Path) -> None:
    said: list[str] = []
    run_recipe(load_recipe(out.parent / "recipe.yaml"), said.append)
    assert all("skipped" in line for line in said) and len(said) == len(STAGES)
    stages = STAGES | {"round2": {"name": "train", "run": round_of("${output:round}", "${output:fakes}", beta="${output:scale}")}}
    with pytest.raises(ConfigError, match="were drawn by other weights"):
        run(out.parent, stages)


def test_a_number_far_from_the_spread_is_refused(out: Path, tmp_path: Path) -> None:
    stages = {"scale": {"name": "calibrate", "run": round_of(str(out / "start"), str(out / "fakes"), beta=1e6), "steps": 2}}
    with pytest.raises(ConfigError, match="is certain of every sample") as caught:
        run(tmp_path, stages)
    assert caught.value.key == "run.method.beta"
    with pytest.raises(ConfigError, match="this is a run of diffusion"):
        run(tmp_path, {"scale": {"name": "calibrate", "run": STAGES["start"]["run"]}})
