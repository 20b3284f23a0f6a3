"""Who submits with other versions than the place has is told so, before anything is trained."""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import pytest

from gentrain import cli
from gentrain.cluster.kuberay import KubeRay
from gentrain.cluster.local import Local
from gentrain.cluster.places import Place, PlaceError, Submission
from gentrain.cluster.ray_jobs import RayJobs
from gentrain.cluster.slurm import Slurm
from gentrain.cluster.versions import SUBMITTED_WITH, installed, libraries, refuse_others, stamp
from gentrain.config import ConfigError

SUBMISSION = Submission("toy", "a: 1\n", ("gentrain", "train", "config.yaml"), Path("runs/toy"), "/runs/toy", under_ray=True)
PLACES = {
    "ray": (RayJobs, {}),
    "slurm": (Slurm, {"venv": "/venv"}),
    "kuberay": (KubeRay, {"image": "gentrain:1", "claim": "runs", "storage": "/runs", "memory_gib": 8}),
    "local": (Local, {}),
}


def _sent(place: Place) -> str:
    return json.dumps(place.render(SUBMISSION))


@pytest.mark.parametrize("name", PLACES)
def test_a_job_knows_who_submitted_it_unless_it_runs_here(name: str) -> None:
    kind, settings = PLACES[name]
    assert (installed() in _sent(kind(**settings))) == (name != "local")


@pytest.mark.parametrize("name", ["ray", "slurm"])
def test_the_environment_of_a_place_goes_before(name: str) -> None:
    kind, settings = PLACES[name]
    sent = _sent(kind(**settings, environment={SUBMITTED_WITH: ""}))
    assert SUBMITTED_WITH in sent and installed() not in sent


@pytest.mark.parametrize("part", ["gentrain", "Ray", "Python"])
def test_other_versions_are_refused(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = ", ".join(f"{part} 0.0" if word.startswith(part) else word for word in installed().split(", "))
    monkeypatch.setenv(SUBMITTED_WITH, expected)
    with pytest.raises(ConfigError, match=f"submitted with .*{part} 0.0.*, and here are gentrain {version('gentrain')}, Ray"):
        refuse_others()
    for anything in ("", installed()):
        monkeypatch.setenv(SUBMITTED_WITH, anything)
        refuse_others()
    monkeypatch.delenv(SUBMITTED_WITH)
    refuse_others()


@pytest.mark.parametrize("part", ["torch", "deepspeed", "diffusers", "transformers"])
def test_other_libraries_are_told(part: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    (sent,) = stamp().values()
    monkeypatch.setenv(SUBMITTED_WITH, sent)
    refuse_others()
    assert not caplog.records and "+" not in sent  # torch 2.0+cpu is torch 2.0
    other = ", ".join(f"{part} 0.0" if word.startswith(part) else word for word in libraries().split(", "))
    monkeypatch.setenv(SUBMITTED_WITH, f"{installed()}; {other}")
    refuse_others()
    assert f"submitted with {other}, and here are {libraries()}" in caplog.text


def test_no_command_runs_in_a_job_with_other_versions(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv(SUBMITTED_WITH, "gentrain 0.0, Ray 0.0, Python 3.9")
    assert cli._guarded(lambda **options: cli.app(args=["train", "no.yaml"], **options)) == 2
    assert "this was submitted with gentrain 0.0" in capsys.readouterr().err


def test_a_cluster_with_another_ray_is_refused_before_anything_is_sent() -> None:
    place = RayJobs()
    place._refuse_other_ray(SimpleNamespace(_server_ray_version=version("ray")))
    with pytest.raises(PlaceError, match=rf"8265 runs Ray 2.9.3, and here is Ray {version('ray')}; install the same"):
        place._refuse_other_ray(SimpleNamespace(_server_ray_version="2.9.3"))
