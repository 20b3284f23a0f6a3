"""Jobs of SLURM: what is rendered, what its commands are told, and a job through a signal before the time limit to its end."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gentrain.cluster import slurm as slurm_place
from gentrain.cluster.attempts import ATTEMPTS
from gentrain.cluster.places import Handle, PlaceError, State, Submission
from gentrain.cluster.slurm import Slurm
from gentrain.config import ConfigError
from gentrain.training.run import METRICS
from tests.slurm import MISSING, cluster, until

CANARY = "canary-77d2"
SUBMISSION = Submission(
    name="rings",
    config="method: flow_matching\n",
    command=("gentrain", "train", "config.yaml"),
    directory=Path("/shared/runs/rings"),
    output="/shared/runs/rings",
    secrets=("BUCKET_TOKEN",),
    under_ray=True,
    workers=(4, 8),
    cpus_per_worker=4,
    gpus_per_worker=1.0,
)
# A job inherits nothing: this gentrain is tested. Ray's niceness of 15 leaves workers next to nothing of a machine that others use, too.
ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(Path(__file__).parents[2]), "RAY_worker_niceness": "0"}
PLACE: dict[str, Any] = {"nodes": 2, "cpus_per_node": 16, "gpus_per_node": 2, "venv": "/shared/venv"}


def _script(submission: Submission = SUBMISSION, **settings: Any) -> str:
    return Slurm(**(PLACE | settings)).render(submission)["job.sbatch"]


def _directives(script: str) -> list[str]:
    return [line.removeprefix("#SBATCH ") for line in script.splitlines() if line.startswith("#SBATCH ")]


@pytest.mark.parametrize("settings", [{}, {"nodes": 1, "cpus_per_node": 32, "gpus_per_node": 4}, {"array": ["seed=1", "seed=2"]}])
def test_the_script_is_one_that_bash_can_read(settings: dict[str, Any]) -> None:
    script = _script(**settings)
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    assert "0.0.0.0" not in script
    assert ("ray start" in script) == (settings.get("nodes", 2) > 1)  # one node has a session of its own, on loopback


def test_the_configuration_becomes_options_of_sbatch() -> None:
    settings = {"memory_gib": 64, "time_limit_min": 90, "partition": "gpu", "account": "lab", "options": ["--qos=high"], "signal_s": 30}
    assert _directives(_script(**settings)) == [
        "--job-name=rings",
        "--nodes=2",
        "--ntasks-per-node=1",
        "--cpus-per-task=16",
        "--partition=gpu",
        "--account=lab",
        "--gpus-per-node=2",
        "--mem=64G",
        "--time=90",
        "--signal=B:USR1@30",
        "--requeue",
        "--chdir=/shared/runs/rings/submission",
        "--open-mode=append",
        "--output=/shared/runs/rings/submission/%j.log",
        "--export=BUCKET_TOKEN",
        "--qos=high",
    ]
    assert "--export=NIL" in _directives(_script(replace(SUBMISSION, secrets=())))


def test_what_the_shell_reads_is_quoted() -> None:
    """The environment, the command and the overrides arrive as they are, whatever is in them."""
    nasty = "a 'b' \"c\" $(touch /tmp/x) ; d"
    script = _script(
        replace(SUBMISSION, command=("gentrain", "train", nasty)), environment={"WORDS": nasty}, array=[f"note={shlex.quote(nasty)}"]
    )
    begin = script.partition("\nfail()")[0]
    show = begin + '\nprintf "%s\\n" "$WORDS" "${command[@]}"\n'
    printed = subprocess.run(
        ["bash"], input=show, capture_output=True, text=True, check=True, env=os.environ | {"SLURM_ARRAY_TASK_ID": "0"}
    )
    assert printed.stdout.splitlines() == [nasty, "gentrain", "train", nasty, f"note={nasty}", "output=/shared/runs/rings/0"]


def test_what_a_cluster_has_for_setup_may_use_variables_that_are_not_there(tmp_path: Path) -> None:
    """Profiles, and what activates modules and environments, do; the script's own lines may not."""
    done, _ = _ended(tmp_path, "exit 0", ['echo "[$NOT_THERE_3]"'])
    assert done.returncode == 0 and "[]" in done.stdout
    assert _script(setup=["module load cuda"]).partition("module load cuda\n")[2].startswith("set -u\n")


def test_each_node_gets_its_accelerators_threads_and_interface() -> None:
    lines = _script(replace(SUBMISSION, interface="ib0")).splitlines()
    assert "export PATH=/shared/venv/bin:$PATH OMP_NUM_THREADS=4" in lines  # those of a worker
    assert "start_limit_s=300 interface=ib0 step=(--gpus-per-node=2)" in lines


@pytest.mark.parametrize("says, found", [("printf '2: ib0 inet 10.0.0.%d/8 x\\n' 7 8", "at <10.0.0.7>"), ("exit 1", "set cluster.network")])
def test_the_head_is_at_the_first_address_of_its_interface(tmp_path: Path, says: str, found: str) -> None:
    for name, text in (("ip", says), ("srun", 'rm -rf "${@: -1}"')):
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    script, refused, _ = _script(replace(SUBMISSION, interface="ib0", output=str(tmp_path))).partition("# Ray wants a number")
    assert refused
    given = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "7"}
    show = f'{script}\necho "at <$address>" >&2'
    told = subprocess.run(["bash", "-c", show], env=given, capture_output=True, text=True, timeout=60)
    assert found in told.stderr


AWAIT = "while :; do sleep 0.02; done"


def _ended(tmp_path: Path, command: str, setup: Sequence[str] = (), **environment: str) -> tuple[subprocess.CompletedProcess[str], str]:
    """The script itself, with a stand-in for scontrol: how it ended, and what scontrol was told."""
    (tmp_path / "scontrol").write_text(f'#!/bin/bash\necho "$*" >> {tmp_path}/told\n')
    (tmp_path / "scontrol").chmod(0o755)
    sent = replace(SUBMISSION, command=("bash", "-c", command), workers=(1, 1), output=str(tmp_path))
    (tmp_path / "submission").mkdir()
    script = _script(sent, nodes=1, restarts=1, setup=list(setup))
    given = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "7"} | environment
    done = subprocess.run(["bash", "-c", script], env=given, capture_output=True, text=True, timeout=60)
    return done, (tmp_path / "told").read_text() if (tmp_path / "told").exists() else ""


@pytest.mark.parametrize(
    "command, restarted, status, requeued",
    [
        (f"trap 'exit 75' USR1; kill -USR1 $PPID; {AWAIT}", 0, 75, True),
        (f"kill -USR1 $PPID; {AWAIT}", 0, 75, True),  # the signal came before the command could tell what it means
        (f"trap 'exit 75' USR1; kill -USR1 $PPID; {AWAIT}", 1, 75, False),  # cluster.submit.restarts are used
        (f"trap 'exit 0' USR1; kill -USR1 $PPID; {AWAIT}", 0, 0, False),  # it was at its end anyway
        (f"trap 'exit 1' USR1; kill -USR1 $PPID; {AWAIT}", 0, 1, False),
        (f"kill -TERM $PPID; {AWAIT}", 0, 75, False),  # gentrain stop
        # gentrain stop just before the time limit, or after it: what is stopped does not come back
        (f"trap '' USR1; trap 'kill -USR1 $PPID; sleep 0.5; exit 75' TERM; kill -TERM $PPID; {AWAIT}", 0, 75, False),
        (f"trap 'kill -USR1 $PPID; {AWAIT}' TERM; kill -TERM $PPID; {AWAIT}", 0, 75, False),
        (f"trap '' TERM; trap 'kill -TERM $PPID; sleep 0.5; exit 75' USR1; kill -USR1 $PPID; {AWAIT}", 0, 75, False),
        (f"trap 'kill -TERM $PPID; {AWAIT}' USR1; kill -USR1 $PPID; {AWAIT}", 0, 75, False),
        ("exit 3", 0, 3, False),
    ],
)
def test_how_a_job_ends(tmp_path: Path, command: str, restarted: int, status: int, requeued: bool) -> None:
    done, told = _ended(tmp_path, command, SLURM_RESTART_COUNT=str(restarted))
    assert done.returncode == status, done.stderr
    assert (tmp_path / "submission" / "7.status").read_text() == f"{status}\n"
    assert told == ("requeue 7\n" if requeued else "")
    assert ("start 2 of this job goes on" in done.stdout) == requeued


def test_a_stop_while_the_time_limit_is_cleaned_up_after_keeps_the_job_from_coming_back(tmp_path: Path) -> None:
    over = tmp_path / "over"
    command = f"trap 'touch {over}; exit 75' USR1; kill -USR1 $PPID; {AWAIT}"
    stop = f"(until [[ -e {over} ]]; do sleep 0.02; done; sleep 0.5; kill -TERM $$; sleep 0.2) &"  # a child: the clean-up waits for it
    done, told = _ended(tmp_path, command, [stop])
    assert (done.returncode, told) == (75, ""), done.stderr


@pytest.mark.parametrize("job, task", [("7", "1"), ("8", "0")])
def test_only_the_task_whose_time_is_up_comes_back(tmp_path: Path, job: str, task: str) -> None:
    """The number of a job array is that of one of its tasks, too."""
    environment = {"SLURM_JOB_ID": job, "SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": task}
    _, told = _ended(tmp_path, f"kill -USR1 $PPID; {AWAIT}", **environment)
    assert told == f"requeue 7_{task}\n"
    assert (tmp_path / "submission" / f"7_{task}.status").read_text() == "75\n"


def test_each_trial_of_a_sweep_is_a_task_of_an_array() -> None:
    sent = replace(SUBMISSION, command=("gentrain", "sweep", "config.yaml"), trials=12, config="cluster: {place: ray}\n")
    script = _script(sent, array="trials", at_once=3)
    assert "--array=0-11%3" in _directives(script) and "ray start" in script  # of each task: its nodes and workers
    assert "ray start" not in _script(replace(sent, config="cluster: {}\n"), array="trials", nodes=1, cpus_per_node=16, gpus_per_node=4)
    show = script.partition("\nfail()")[0] + '\nprintf "%s\\n" "${command[@]}"\n'
    printed = subprocess.run(
        ["bash"], input=show, capture_output=True, text=True, check=True, env=os.environ | {"SLURM_ARRAY_TASK_ID": "7"}
    )
    assert printed.stdout.splitlines() == ["gentrain", "sweep", "config.yaml", "--trial=7"]


def test_a_token_is_made_in_the_job_and_secrets_are_named_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BUCKET_TOKEN", CANARY)
    script = _script()
    assert CANARY not in script and "--export=BUCKET_TOKEN" in script
    make = next(line for line in script.splitlines() if line.startswith("RAY_AUTH_TOKEN="))
    tokens = [subprocess.run(["bash", "-c", f'{make}\necho "$RAY_AUTH_TOKEN"'], capture_output=True, text=True).stdout for _ in range(2)]
    assert all(len(token.strip()) == 64 for token in tokens) and tokens[0] != tokens[1]
    monkeypatch.delenv("BUCKET_TOKEN")
    with pytest.raises(ConfigError, match="the environment has no BUCKET_TOKEN"):
        Slurm(**PLACE).submit(SUBMISSION, {})


@pytest.mark.parametrize(
    "settings, changes, message",
    [
        ({"options": ["#SBATCH"]}, {}, "expected an option of sbatch such as --qos=high"),
        ({"options": ["--qos=a\nrm"]}, {}, "expected an option of sbatch"),
        ({"options": ["--export=ALL"]}, {}, "options: '--export=ALL' would send other variables than those in `secrets`"),
        ({"options": ["--export ALL"]}, {}, "would send other variables"),
        ({"options": ["--export-file=3"]}, {}, "would send other variables"),
        ({"options": ["--output=/x"]}, {}, "options: '--output=/x' would undo what gentrain tells sbatch; leave it out"),
        ({"options": ["--signal=B:TERM@60"]}, {}, "set signal_s instead"),
        ({"options": ["--chdir /x"]}, {}, "set output instead"),
        ({"options": ["--array=0-3"]}, {}, "set array instead"),
        ({"options": ["--no-requeue"]}, {}, "set restarts instead"),
        ({"options": ["--ti=10"]}, {}, "set time_limit_min instead"),  # sbatch takes it for --time
        ({"options": ["--mem=8G"], "memory_gib": 64}, {}, "set memory_gib instead"),
        ({"options": ["--qos=high", "--clusters=b"]}, {}, "'--clusters=b' would undo"),
        ({"options": ["--get-user-env"]}, {}, "would undo"),
        ({"options": ["--"]}, {}, "would undo"),
        ({"options": ["--qos=high --export=ALL"]}, {}, "one an entry, got '--qos=high --export=ALL'"),
        ({"options": ['--qos=high "--export=ALL"']}, {}, "one an entry"),
        ({"options": ["--qos high -p gpu"]}, {}, "one an entry"),
        ({"options": ['--"export"=ALL']}, {}, "expected an option of sbatch"),  # which takes the quotes out
        ({"options": ["--ex\\port=ALL"]}, {}, "expected an option of sbatch"),
        ({"venv": "~/venv"}, {}, "venv: expected an absolute directory, got '~/venv'"),
        (
            {"storage": "/elsewhere"},
            {},
            "storage: a run has one directory on all nodes and here",
        ),  # what is written here would not be there
        ({"array": ["seed=1", "seed=2 output=/x"]}, {}, "array: each entry has a directory of its own below `output`"),
        ({}, {"grace_s": 60.5}, "cluster.grace_s: workers may take 60.5 s for a checkpoint, SLURM kills the job 120 s after"),
        ({"signal_s": 100}, {"grace_s": 60}, "lower it to 40 s or less, or raise cluster.submit.signal_s"),
        ({"signal_s": 50}, {"grace_s": 0.5}, "after it has asked; raise cluster.submit.signal_s"),
        ({"time_limit_min": 2, "signal_s": 120}, {}, "signal_s: 120 s before the end of 2 min is no time to train"),
        ({"partition": "gpu\nrm"}, {}, "partition: expected a name"),  # it would be a line of the script
        ({"account": "a b"}, {}, "account: expected a name"),
        ({"array": "trials"}, {}, "add a section `sweep:`, or list overrides"),
        ({"array": "trials"}, {"trials": 3}, "2 nodes for a run in one process"),  # Ray Tune is not part of it
        ({}, {"under_ray": False}, "2 nodes for a run in one process; set cluster.place to ray"),
        ({}, {"workers": (5, 5)}, "5 workers do not fit on 2 nodes with room for 2 each"),
        ({}, {"output": "/a b"}, "cannot write a log below"),
        ({}, {"output": "/%j"}, "cannot write a log below"),
        ({}, {"output": "/a#b"}, "cannot write a log below"),  # the rest would be a comment
    ],
)
def test_what_cannot_work_is_refused(settings: dict[str, Any], changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        _script(replace(SUBMISSION, **changes), **settings)


@pytest.mark.parametrize(
    "options",
    [
        ["--mem=0"],
        ["--mem-per-cpu=4G"],
        ["--nice=-5", '--comment="a b"', "--qos high"],
        ["--time-min=10"],
        ["--nodelist=a,b", "--exclusive", "--no-kill"],
    ],
)
def test_what_gentrain_does_not_tell_sbatch_can_be_told(options: list[str]) -> None:
    assert _directives(_script(replace(SUBMISSION, grace_s=60), options=options))[-len(options) :] == options


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """SLURM's commands, which print what is in files of their names and write down what they are told."""
    for name in ("squeue", "sacct", "scancel"):
        text = f'#!/bin/bash\necho "{name} $*" >> {tmp_path}/told\ncat {tmp_path}/{name}.out 2>/dev/null\n'
        text += f"cat {tmp_path}/{name}.err >&2 2>/dev/null && exit 1\nexit 0\n"
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    return tmp_path


@pytest.mark.parametrize(
    "queue, state",
    [
        ("PENDING 0", State.PENDING),
        ("PENDING 19200", State.PENDING),  # requeued: the status is that of its last start
        ("RUNNING 0", State.RUNNING),
        ("COMPLETED 0", State.SUCCEEDED),
        ("FAILED 256", State.FAILED),
        ("FAILED 19200", State.STOPPED),
        ("CANCELLED 15", State.STOPPED),
        ("TIMEOUT 0", State.FAILED),
        ("COMPLETED 0\nRUNNING 0\nPENDING 0", State.RUNNING),
        ("COMPLETED 0\nFAILED 256\nFAILED 19200", State.FAILED),
        ("COMPLETED 0\nFAILED 19200", State.STOPPED),
    ],
)
def test_what_the_queue_says_of_a_job_and_of_an_array(stand_in: Path, queue: str, state: State) -> None:
    rows = queue.splitlines()
    tasks = range(len(rows)) if len(rows) > 1 else ["N/A"]
    (stand_in / "squeue.out").write_text("".join(f"{task} {row}\n" for task, row in zip(tasks, rows, strict=True)))
    assert Slurm().status({"job": "7", "logs": []}) is state


def test_of_an_old_job_accounting_tells_and_without_it_the_job_is_lost(stand_in: Path) -> None:
    (stand_in / "squeue.err").write_text("slurm_load_jobs error: Invalid job id specified\n")
    (stand_in / "sacct.out").write_text("7|CANCELLED by 1000|0:15\n")
    assert Slurm().status({"job": "7", "logs": []}) is State.STOPPED
    (stand_in / "sacct.out").write_text("7|FAILED|75:0\n")
    assert Slurm().status({"job": "7", "logs": []}) is State.STOPPED
    (stand_in / "sacct.out").unlink()
    assert Slurm().status({"job": "7", "logs": []}) is State.LOST
    (stand_in / "squeue.err").write_text("Unable to contact slurm controller\n")
    with pytest.raises(PlaceError, match="Unable to contact slurm controller"):
        Slurm().status({"job": "7", "logs": []})
    (stand_in / "squeue.err").unlink()
    (stand_in / "squeue.out").write_text("Welcome to the cluster\n")  # as a wrapper may say
    with pytest.raises(PlaceError, match="cannot be read"):
        Slurm().status({"job": "7", "logs": []})


@pytest.mark.parametrize(
    "queue, accounts, written, state",
    [
        ("1 COMPLETED 0", "", {0: 1}, State.FAILED),
        ("1 COMPLETED 0", "", {0: 75}, State.STOPPED),
        ("1 COMPLETED 0", "", {0: 0}, State.SUCCEEDED),
        ("1 COMPLETED 0", "", {1: 0}, State.LOST),  # a task that was killed has written nothing
        ("1 COMPLETED 0", "7_0|FAILED|1:0\n7_1|FAILED|1:0", {}, State.FAILED),
        ("1 PENDING 0", "", {0: 1, 1: 75}, State.PENDING),
        ("", "", {0: 0, 1: 0}, State.SUCCEEDED),
        ("", "", {}, State.LOST),
    ],
)
def test_tasks_that_the_queue_has_forgotten_count(stand_in: Path, queue: str, accounts: str, written: dict[int, int], state: State) -> None:
    (stand_in / "squeue.out").write_text(queue)
    (stand_in / "sacct.out").write_text(accounts)
    for task, status in written.items():
        (stand_in / f"7_{task}.status").write_text(f"{status}\n")
    assert Slurm().status({"job": "7", "logs": [str(stand_in / f"7_{task}.log") for task in (0, 1)]}) is state


def test_a_job_whose_number_was_never_read_is_found_by_its_mark(stand_in: Path) -> None:
    """Who submitted it was killed between sbatch's request and its answer."""
    place = Slurm(array=["seed=1", "seed=2"])
    handle = place.expected(replace(SUBMISSION, directory=stand_in / "rings"))
    others = "5 5 /shared/runs/rings/submission/job.sbatch 0123\n6 6 (null)\n"
    (stand_in / "squeue.out").write_text(others)
    assert place.status(handle) is State.LOST and list(place.logs(handle, follow=True)) == []
    place.stop(handle)
    assert not (stand_in / "told").read_text().count("scancel")
    (stand_in / "squeue.out").write_text(f"{others}7 8 /shared/a b/job.sbatch {handle['mark']}\n")
    assert slurm_place._known(handle) == {"job": "7", "logs": [f"{stand_in}/rings/submission/7_{task}.log" for task in (0, 1)]}
    assert "--name=rings" in (stand_in / "told").read_text()
    assert slurm_place._known({"job": "9", "logs": []}) == {"job": "9", "logs": []}


def test_variables_of_sbatch_undo_nothing(stand_in: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They go before what the script says."""
    (stand_in / "sbatch").write_text(f"#!/bin/bash\nenv > {stand_in}/env\necho '7;main'\n")
    (stand_in / "sbatch").chmod(0o755)
    for name in ("EXPORT", "REQUEUE", "SIGNAL", "OUTPUT", "ARRAY_INX", "QOS", "ACCOUNT", "TIMELIMIT", "MEM_PER_CPU", "GPUS", "PARTITION"):
        monkeypatch.setenv(f"SBATCH_{name}", "x")
    place = Slurm(account="lab", time_limit_min=10, memory_gib=8, gpus_per_node=1)
    sent = replace(SUBMISSION, directory=stand_in / "rings", secrets=())
    assert place.submit(sent, place.expected(sent)) == {"job": "7", "logs": [f"{stand_in}/rings/submission/7.log"]}
    given = (stand_in / "env").read_text().splitlines()
    assert {line for line in given if line.startswith("SBATCH_")} == {"SBATCH_QOS=x", "SBATCH_PARTITION=x"}  # of what is not said


def test_a_line_is_told_once_and_when_it_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log, states, more = tmp_path / "7.log", [State.PENDING, State.RUNNING, State.RUNNING, State.SUCCEEDED], ["a\nb", "c\n", "d"]

    def write(seconds: float) -> None:
        with log.open("a") as file:
            file.write(more.pop(0))

    monkeypatch.setattr(slurm_place.time, "sleep", write)
    monkeypatch.setattr(Slurm, "status", lambda place, handle: states.pop(0))
    assert list(Slurm().logs({"job": "7", "logs": [str(log)]}, follow=True)) == ["a", "bc", "d"]
    assert more == [] and states == []


# --- SLURM itself -----------------------------------------------------------------------------------------------------------

needs_slurm = pytest.mark.skipif(bool(MISSING), reason=f"SLURM is not installed (apt-get install slurm-wlm munge): no {', '.join(MISSING)}")
on_slurm = [needs_slurm, pytest.mark.cluster, pytest.mark.timeout(400)]


@pytest.fixture(scope="module")
def slurm() -> Iterator[None]:
    with cluster():
        yield


def config(directory: Path, samples: int, **settings: Any) -> dict[str, Any]:
    return {
        "method": "flow_matching", "data": "rings", "model": {"name": "mlp", "width": 16}, "engine": "torch", "output": str(directory),
        "training": {"samples": samples, "batch_size": 32, "log_every": 32, "checkpoint_every": 1_000_000}, **settings,
    }  # fmt: skip


def submit(place: Slurm, directory: Path, samples: int, workers: int = 0) -> Handle:
    """A job with so many workers of Ray Train on loopback; 0 = in one process, without Ray."""
    section = {"place": "ray", "workers": workers, "network": {"interface": "lo"}}
    values = config(directory, samples, cluster=section if workers else {})
    submission = Submission(
        name=directory.name, config=json.dumps(values), command=("gentrain", "train", "config.yaml"), directory=directory,
        output=str(directory), under_ray=workers > 0, workers=(max(workers, 1),) * 2, interface="lo" if workers else None,
    )  # fmt: skip
    submission.files.mkdir(parents=True)
    for name, text in place.render(submission).items():
        (submission.files / name).write_text(text)
    return place.submit(submission, place.expected(submission))


def events(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / ATTEMPTS).read_text().splitlines()]


@pytest.mark.usefixtures("slurm")
class TestOnSlurm:
    pytestmark = on_slurm

    def test_the_signal_before_the_time_limit_requeues_a_job_which_goes_on_to_its_end(self, tmp_path: Path) -> None:
        place, directory = Slurm(restarts=1, environment=ENVIRONMENT), tmp_path / "run"
        handle = submit(place, directory, 64_000)
        until(lambda: (directory / METRICS).exists(), 120, "the job trains")
        assert place.status(handle) is State.RUNNING
        subprocess.run(["scancel", "--batch", "--signal=USR1", handle["job"]], check=True)  # as SLURM's own --signal=B:USR1@... does
        lines = list(place.logs(handle, follow=True))
        assert place.status(handle) is State.SUCCEEDED
        noted = events(directory)
        assert [event["event"] for event in noted] == ["started", "stopped", "started", "finished"]
        assert noted[2]["samples"] > 0 == noted[0]["samples"]
        told = [json.loads(line)["samples"] for line in (directory / METRICS).read_text().splitlines()]
        assert told == list(range(32, 64_032, 32))  # none twice, none left out
        assert any("start 2 of this job goes on" in line for line in lines) and any(line.startswith("trained:") for line in lines)

    def test_stopping_an_array_publishes_checkpoints_and_empties_the_queue(self, tmp_path: Path) -> None:
        place, directory = Slurm(array=["seed=1", "seed=2"], at_once=1, environment=ENVIRONMENT), tmp_path / "sweep"
        handle = submit(place, directory, 100_000_000)
        until(lambda: (directory / "0" / METRICS).exists(), 120, "the first task trains")
        place.stop(handle)
        until(lambda: place.status(handle).is_over, 60, "both are over")
        assert place.status(handle) is State.STOPPED
        assert [event["event"] for event in events(directory / "0")] == ["started", "stopped"]
        assert not (directory / "1").exists()
        assert any(line.startswith("0: stopped; a checkpoint is published") for line in place.logs(handle, follow=False))
        place.stop(handle)  # nothing happens

    def test_a_job_that_waits_is_taken_from_the_queue(self, tmp_path: Path) -> None:
        place = Slurm(options=["--begin=now+1hour"])
        expected = {"mark": "0f", "name": "run", "folder": str(tmp_path / "run/submission"), "tasks": [""]}
        place.expected = lambda submission: expected  # type: ignore[method-assign]
        handle = submit(place, tmp_path / "run", 32)
        assert place.status(handle) is State.PENDING
        assert slurm_place._known(expected) == handle  # had the answer of sbatch been lost
        place.stop(expected)
        until(lambda: place.status(handle) is State.STOPPED, 60, "it is over")
        assert not list(place.logs(handle, follow=True))
