"""Logs of pods, from a stand-in for kubectl that breaks off, is away, and repeats what it has said."""

from __future__ import annotations

from pathlib import Path

import pytest

from gentrain.cluster import kubectl as module
from gentrain.cluster.kuberay import KubeRay
from gentrain.cluster.places import PlaceError, State
from tests.cluster.test_kuberay import stand_in

# Call n of `logs` prints log.n, or log, and ends with the status in log.n.status. `get` fails while there is a file `away`.
_KUBECTL = """#!/bin/bash
printf '%s\\n' "$*" >> "$RECORD/argv"
case "$*" in
  *' get '*) if [[ -e $RECORD/away ]]; then echo 'connection refused' >&2; exit 1; fi ;;&
  *' get pods'*) cat "$RECORD/pods" ;;
  *' logs '*)
    n=$(grep -c ' logs ' "$RECORD/argv")
    cat "$RECORD/log.$n" 2>/dev/null || cat "$RECORD/log"
    if [[ -e $RECORD/log.$n.status ]]; then echo 'unexpected EOF' >&2; exit "$(cat "$RECORD/log.$n.status")"; fi ;;
esac
"""
_HANDLE = {"name": "job", "kind": "rayjob"}


class Pods:
    """What Kubernetes tells, turn by turn: each pause of who follows is a turn."""

    def __init__(self, folder: Path, states: list[State]):
        self._folder, self.states, self.pauses = folder, states, 0

    def state(self) -> State:
        return self.states[0] if len(self.states) == 1 else self.states.pop(0)

    def say(self, text: str, call: int | None = None, status: int | None = None) -> None:
        """Lines `seconds text`; of one call of `logs`, or of every other one."""
        name = "log" if call is None else f"log.{call}"
        stamped = [f"2026-01-01T00:00:{float(time):012.9f}Z {line}\n" for time, line in (each.split(" ", 1) for each in text.splitlines())]
        (self._folder / name).write_text("".join(stamped))
        if status is not None:
            (self._folder / f"{name}.status").write_text(str(status))

    def told(self) -> list[str]:
        return [line.split(" logs ")[1] for line in (self._folder / "argv").read_text().splitlines() if " logs " in line]


@pytest.fixture
def pods(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Pods:
    stand_in(tmp_path, monkeypatch, _KUBECTL, "pod/a")
    found = Pods(tmp_path, [State.RUNNING])
    monkeypatch.setattr(KubeRay, "status", lambda self, handle: found.state())

    def sleep(seconds: float) -> None:
        found.pauses += 1
        assert found.pauses < 100 and seconds >= 1  # who follows does not spin

    monkeypatch.setattr(module.time, "sleep", sleep)
    return found


def _logs(follow: bool, **settings: str) -> list[str]:
    return list(KubeRay(image="x", **settings).logs(_HANDLE, follow))


def test_logs_so_far_are_those_of_the_pods(pods: Pods) -> None:
    pods.say("1 one\n2 two")
    assert _logs(follow=False) == ["one", "two"]
    assert pods.told() == ["pod/a --timestamps --tail=-1"]


def test_no_line_is_lost_or_repeated_by_a_lost_connection(pods: Pods) -> None:
    """Kubernetes begins again with the second that is asked for; lines may have one time, and a line no text."""
    pods.states = [State.RUNNING, State.RUNNING, State.SUCCEEDED]
    pods.say("1.5 one\n1.6 \n1.6 two", call=1, status=1)
    pods.say("1.5 one\n1.6 \n1.6 two\n1.6 three\n2 four", call=2)
    pods.say("2 four\n2 five")
    assert _logs(follow=True) == ["one", "", "two", "three", "four", "five"]
    first, second, last = pods.told()
    assert first == "pod/a --timestamps --tail=-1 --follow"
    assert second == "pod/a --timestamps --since-time=2026-01-01T00:00:01.600000000Z --follow"
    assert last == "pod/a --timestamps --since-time=2026-01-01T00:00:02.000000000Z"  # the rest, once it is over
    assert pods.pauses == 2


def test_lines_of_one_answer_may_be_out_of_order(pods: Pods) -> None:
    """Output and errors are two streams."""
    pods.say("2 two\n1 one\n3 three")
    assert _logs(follow=False) == ["two", "one", "three"]


def test_each_start_of_a_job_is_followed_once(pods: Pods, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pods.states = [State.RUNNING, State.PENDING, State.RUNNING, State.SUCCEEDED]
    turns = ["", "pod/b\n", "pod/b\n"]
    monkeypatch.setattr(module.time, "sleep", lambda seconds: (tmp_path / "pods").write_text(turns.pop(0)))
    pods.say("1 one", call=1)
    pods.say("1 one of the next")  # it has a clock of its own
    assert _logs(follow=True) == ["one", "one of the next"]
    assert [line.split()[0] for line in pods.told()] == ["pod/a", "pod/b", "pod/b"] and turns == []


def test_kubernetes_may_be_away_for_a_time(
    pods: Pods, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    now, back, away = [1000.0], [1500.0], tmp_path / "away"

    def sleep(seconds: float) -> None:
        now[0] += seconds
        away.touch() if now[0] < back[0] else away.unlink(missing_ok=True)

    monkeypatch.setattr(module.time, "sleep", sleep)
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    pods.states = [State.RUNNING] * 101 + [State.SUCCEEDED]
    pods.say("1 one", call=1, status=1)
    pods.say("1 one\n2 two")
    assert _logs(follow=True) == ["one", "two"]
    assert now[0] >= 1500 and caplog.text.count("connection refused") == 1  # said once
    pods.states, back[0] = [State.RUNNING], 1e9
    with pytest.raises(PlaceError, match="connection refused"):
        _logs(follow=True)
    assert now[0] < 2500


def test_who_never_answers_is_told_at_once(pods: Pods, tmp_path: Path) -> None:
    (tmp_path / "away").touch()
    for follow in (False, True):
        with pytest.raises(PlaceError, match="connection refused"):
            _logs(follow)
    assert pods.pauses == 0


def test_a_log_that_may_not_be_read_is_an_error(pods: Pods) -> None:
    pods.say("", call=1, status=1)
    with pytest.raises(PlaceError, match="logs pod/a --timestamps --tail=-1: unexpected EOF"):
        _logs(follow=False)


def test_the_end_is_read_again_when_that_breaks_off(pods: Pods) -> None:
    pods.states = [State.SUCCEEDED]
    pods.say("1 one", call=1, status=1)
    pods.say("1 one\n2 two")
    assert _logs(follow=True) == ["one", "two"]
