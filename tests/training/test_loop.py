"""The loop against a loop written by hand, and what it leaves behind: metrics, checkpoints, learning rates, averages."""

from __future__ import annotations

import json
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from gentrain.config import ConfigError
from gentrain.data.loader import Loader
from gentrain.models.denoiser import Denoiser
from gentrain.noise import Noise, derive
from gentrain.training.callbacks import MetricsFile
from gentrain.training.checkpoint import CheckpointError
from gentrain.training.loop import Diverged, Outcome, train
from gentrain.training.roles import build_network
from gentrain.training.run import CHECKPOINTS, METRICS
from gentrain.training.storage import LocalStorage
from gentrain.training.world import World
from tests.distributed.cases import TIMES, Job, newest, records, run_of, state_of, train_all, values
from tests.reliability.troubled import troubled

ALONE = World(0, 1, torch.device("cpu"))


def _train(settings: dict[str, Any], stop_at: int | None = None) -> tuple[str, str]:
    return train_all(ALONE, [Job(settings, stop_at)])[0]


class _Nets:
    group = None


def test_the_loop_is_the_one_written_by_hand(tmp_path: Path) -> None:
    """flow_matching with dropout, two micro-batches, clipping, warm-up and cosine, decay, averages: equal to the last bit."""
    settings = values(tmp_path / "run", "flow_matching")
    assert _train(settings) == ("finished", "")
    run = run_of(settings)
    network = build_network(run, "model")
    optimizer = torch.optim.AdamW(network.parameters(), lr=1, betas=(0.9, 0.999), weight_decay=0.1, fused=True)
    average = [p.detach().clone() for p in network.parameters()]
    loader = iter(Loader(run.data.split("train"), seed=5, batch_size=12, micro_batches=2))
    lines = []
    for step in range(6):
        torch.manual_seed(derive(5, "torch", step * 12, 0))
        losses = []
        for batch in next(loader):
            nets = _Nets()
            nets.model = Denoiser(network, run.path, run.prediction)  # type: ignore[attr-defined]
            loss = run.method.loss(nets, batch, Noise(derive(5, "update", 0, 0), batch["index"])).value  # type: ignore[attr-defined]
            (loss / 2).backward()
            losses.append(loss.item())
        for p in network.parameters():
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad  # a parameter that no loss reaches decays like the others
        norm = torch.nn.utils.clip_grad_norm_(network.parameters(), 0.5).item()
        lr = 0.01 * run.schedule.factor(_clock(step))
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        optimizer.zero_grad()
        torch._foreach_lerp_(average, [p.detach() for p in network.parameters()], 1 - 0.5 ** (12 / 30))
        lines.append((sum(losses) / 2, norm, lr))
    for (loss, norm, lr), line in zip(lines, records(tmp_path / "run"), strict=True):
        assert line["loss/model"] == pytest.approx(loss, rel=1e-6)
        assert line["grad_norm/model"] == pytest.approx(norm, rel=1e-6)
        assert line["lr/model"] == lr
    state = state_of(tmp_path / "run")
    for (name, p), ema in zip(network.named_parameters(), average, strict=True):
        assert torch.equal(state[f"model.weights/{name}"], p)
        assert torch.equal(state[f"model.ema/{name}"], ema)
        assert torch.equal(state[f"model.optimizer/exp_avg_sq/{name}"], optimizer.state[p]["exp_avg_sq"])
    assert len({lr for _, _, lr in lines}) == 5  # up and down again


def _clock(step: int) -> Any:
    from gentrain.methods.base import Clock

    return Clock(step * 12, 12, 72)


def test_losses_of_one_update_add_up_and_its_gradient_is_of_their_sum(tmp_path: Path) -> None:
    """The first student update of relay, from a graph built by hand in one piece."""
    settings = values(tmp_path / "run", {"name": "relay", "train_critic": False}, {"name": "torch", "gradient_clipping": None}, samples=12)
    settings["model"] = {"name": "dropout_mlp", "dropout": 0}
    _train(settings)
    run = run_of(settings)
    nets = _Nets()
    nets.group = type("Group", (), {"mean": staticmethod(torch.Tensor.detach)})()  # type: ignore[assignment]
    networks = {role: build_network(run, name) for role, name in [("student", "teacher"), ("teacher", "teacher"), ("reference", "teacher")]}
    for role, network in networks.items():
        setattr(nets, role, Denoiser(network, run.path, run.prediction))
    nets.critic = build_network(run, "critic")  # type: ignore[attr-defined]
    value = torch.zeros(())
    for batch in next(iter(Loader(run.data.split("train"), seed=5, batch_size=12, micro_batches=2))):
        for number, loss in enumerate([run.method.student_through_teacher, run.method.student_through_critic]):  # type: ignore[attr-defined]
            value = value + loss(nets, batch, Noise(derive(5, "update", 0, number), batch["index"])).value / 2
    value.backward()
    line = records(tmp_path / "run")[0]
    assert line["loss/student"] == pytest.approx(value.item(), rel=1e-5)
    gradients = [p.grad for p in networks["student"].parameters() if p.grad is not None]
    assert line["grad_norm/student"] == pytest.approx(torch.nn.utils.get_total_norm(gradients).item(), rel=1e-5)


def test_a_record_is_the_mean_since_the_last_one(tmp_path: Path) -> None:
    _train(values(tmp_path / "every", "flow_matching"))
    _train(values(tmp_path / "third", "flow_matching", log_every=36))
    every, third = records(tmp_path / "every"), records(tmp_path / "third")
    assert [line["samples"] for line in third] == [36, 72]
    for key in ("loss/model", "grad_norm/model", "loss_low_noise"):
        assert third[1][key] == pytest.approx(sum(line[key] for line in every[3:]) / 3, rel=1e-6)


def test_metrics_of_a_killed_attempt_are_not_repeated(tmp_path: Path) -> None:
    """Lines beyond the checkpoint, and one cut short by the kill, are dropped; the others stay, times included."""
    whole = values(tmp_path / "whole", "flow_matching")
    _train(whole)
    settings = values(tmp_path / "killed", "flow_matching", checkpoint_every=36)
    _train(settings, stop_at=3)
    metrics = tmp_path / "killed" / METRICS
    before = metrics.read_text()
    with metrics.open("a") as file:
        file.write(json.dumps({"samples": 48, "loss/model": 9}) + "\n" + '{"samples": 6')
    assert _train(settings) == ("finished", "")
    assert metrics.read_text().startswith(before)
    assert records(tmp_path / "killed") == records(tmp_path / "whole")
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert all(line["samples_per_second"] > 0 for line in lines)
    assert [line["seconds"] for line in lines] == sorted(line["seconds"] for line in lines)
    assert set(lines[0]) - set(records(tmp_path / "killed")[0]) == set(TIMES)


def test_checkpoints_come_when_due_and_at_the_end_and_finished_runs_stay_as_they_are(tmp_path: Path) -> None:
    settings = values(tmp_path, "flow_matching", samples=70, checkpoint_every=30, keep_last=9)
    assert _train(settings) == ("finished", "")
    names = sorted(int(path.name) for path in (tmp_path / CHECKPOINTS).iterdir() if path.is_dir())
    assert names == [36, 60, 72]  # whole batches; the run is rounded up to them
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert _train(settings) == ("finished", "")
    assert {path for path in before if path.is_file() and before[path] != path.stat().st_mtime_ns} <= {tmp_path / METRICS}
    assert len(records(tmp_path)) == 6


def test_a_stop_before_the_first_step_publishes_a_start_to_resume_from(tmp_path: Path) -> None:
    settings = values(tmp_path, "flow_matching")
    assert _train(settings, stop_at=0) == ("stopped", "")
    first = newest(tmp_path)
    assert first.name == "0" * 12
    written = first.stat().st_mtime_ns
    assert _train(settings, stop_at=0) == ("stopped", "")
    assert first.stat().st_mtime_ns == written  # never rewritten while LATEST names it
    assert _train(settings) == ("finished", "")


def test_the_average_follows_the_warm_up_of_its_half_life(tmp_path: Path) -> None:
    settings = values(tmp_path, "flow_matching", ema_half_life=20, ema_warmup=0.5)
    run = run_of(settings)
    seen: list[dict[str, torch.Tensor]] = []

    class Weights(MetricsFile):
        def after_step(self, trainer: Any) -> None:
            seen.append(trainer.roles.engines["model"].weights())

    assert train(run, ALONE, lambda: False, [Weights]) is Outcome.FINISHED
    average = torch.zeros(2, 7, dtype=torch.float64)
    for step, weights in enumerate(seen):
        half_life = min(20, 0.5 * 12 * step)
        decay = 0.5 ** (12 / half_life) if half_life else 0.0
        average = decay * average + (1 - decay) * weights["output.weight"].double()
    torch.testing.assert_close(state_of(tmp_path)["model.ema/output.weight"].double(), average, rtol=1e-6, atol=1e-6)


def test_steps_that_are_not_finite_leave_no_trace_but_a_count(tmp_path: Path) -> None:
    settings = values(tmp_path, {"name": "relay", "nan_from": 0, "nan_until": 24}, log_every=24)
    assert _train(settings) == ("finished", "")
    first, *rest = records(tmp_path)
    assert "loss/critic" not in first and first["skipped/critic"] == 2 and "loss/student" in first
    assert "NaN" not in (tmp_path / METRICS).read_text()
    assert all(line["skipped/critic"] == 2 and "loss/critic" in line for line in rest)


def test_a_skipped_step_leaves_weights_average_and_optimiser_as_they_were(tmp_path: Path) -> None:
    nan = {"role": "student", "start": 24, "end": 25, "factor": float("nan")}  # in the third step
    for steps in (2, 3):
        assert _train(troubled(tmp_path / str(steps), "torch", **nan), stop_at=steps) == ("stopped", "")
    before, after = (state_of(tmp_path / str(steps)) for steps in (2, 3))
    same = {key for key in before if torch.equal(before[key], after[key])}
    kept = {key for key in before if key.startswith("student.")}
    assert {key.partition("/")[0] for key in kept} == {"student.weights", "student.ema", "student.optimizer"}
    assert same >= kept and "fake_score.optimizer/step" not in same


def test_divergence_before_any_checkpoint_says_so(tmp_path: Path) -> None:
    run = run_of(values(tmp_path, {"name": "relay", "nan_from": 0, "nan_until": 99}, max_skipped=1))
    with pytest.raises(Diverged, match=r"'critic': 2 steps in a row .*max_skipped is 1\); the last good checkpoint is none"):
        train(run, ALONE, lambda: False, [])


def test_skipped_steps_survive_resume(tmp_path: Path) -> None:
    settings = values(tmp_path, {"name": "relay", "nan_from": 0, "nan_until": 1})
    _train(settings, stop_at=3)
    _train(settings)
    assert [line["skipped/critic"] for line in records(tmp_path)] == [1] * 6


def test_a_damaged_checkpoint_is_refused(tmp_path: Path) -> None:
    settings = values(tmp_path, "flow_matching")
    _train(settings, stop_at=2)
    (newest(tmp_path) / "model.ema.00000.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"model\.ema\.00000\.safetensors differs"):
        train(run_of(settings), ALONE, lambda: False)


def test_a_checkpoint_of_another_method_is_refused(tmp_path: Path) -> None:
    _train(values(tmp_path, "flow_matching"), stop_at=1)
    with pytest.raises(CheckpointError, match="'flow_matching', this run is 'relay'; choose another output"):
        train(run_of(values(tmp_path, "relay")), ALONE, lambda: False)


def test_a_batch_that_the_ranks_cannot_share_is_a_mistake_of_the_configuration(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="a multiple of 10"):
        train(run_of(values(tmp_path, "flow_matching")), World(0, 5, torch.device("cpu")), lambda: False)


@contextmanager
def _largest_file(size: int) -> Iterator[None]:
    import signal

    previous, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, previous[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, previous)
        signal.signal(signal.SIGXFSZ, handler)


def test_a_disk_that_is_full_is_reported_and_the_last_checkpoint_stays(tmp_path: Path) -> None:
    settings = values(tmp_path, "flow_matching")
    _train(settings, stop_at=2)
    with (
        _largest_file(1_500),
        pytest.raises(OSError, match=r"no checkpoint could be written under .*ulimit -f.*run the same command again"),
    ):
        train(run_of(settings), ALONE, lambda: False, [])
    with LocalStorage(tmp_path / CHECKPOINTS).open(newest(tmp_path).name) as checkpoint:
        checkpoint.verify()
        assert checkpoint.state["samples"] == 24
    assert not list((tmp_path / CHECKPOINTS).glob(".*"))
    assert _train(settings) == ("finished", "")
