"""The place `slurm`: one sbatch file, which starts Ray inside its allocation, and goes on after time limits and preemption."""

from __future__ import annotations

import os
import re
import secrets
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import yaml
from pydantic import PositiveInt
from typing_extensions import TypedDict

from gentrain.cluster.places import Allocation, Handle, PlaceError, State, Submission, refuse_missing
from gentrain.cluster.room import refuse_cramped
from gentrain.cluster.stopping import STOPPED
from gentrain.cluster.versions import stamp
from gentrain.config import ConfigError, option, register

_POLL_S = 2.0  # between looks at a log that is followed
_END_S = 60  # for Ray to end after the workers, and the job to be requeued
# Options of sbatch that gentrain sets, or that would take the job away from it -> what to set instead.
_OURS = {
    "nodes": "nodes", "ntasks": "nodes", "ntasks-per-node": "nodes", "cpus-per-task": "cpus_per_node", "gpus": "gpus_per_node",
    "gpus-per-node": "gpus_per_node", "mem": "memory_gib", "time": "time_limit_min", "partition": "partition", "account": "account",
    "array": "array", "signal": "signal_s", "requeue": "restarts", "no-requeue": "restarts", "job-name": "output", "chdir": "output",
    **dict.fromkeys(("output", "error", "input", "open-mode", "wait", "wrap", "clusters", "test-only", "parsable", "get-user-env"), ""),
}  # fmt: skip
# They go before what the script says, and would undo it as those options do; the second ones only where the configuration says it. Others,
# such as SBATCH_QOS, are the user's.
_VARIABLES = {
    f"SBATCH_{name}" for name in (
        "ARRAY_INX", "CLUSTERS", "ERROR", "EXPORT", "GET_USER_ENV", "INPUT", "JOB_NAME", "NO_REQUEUE", "OPEN_MODE", "OUTPUT", "REQUEUE",
        "SIGNAL", "WAIT",
    )
}  # fmt: skip
_VARIABLES_OF = {
    "account": ("SBATCH_ACCOUNT",), "partition": ("SBATCH_PARTITION",), "time_limit_min": ("SBATCH_TIMELIMIT",),
    "memory_gib": ("SBATCH_MEM_PER_NODE", "SBATCH_MEM_PER_CPU", "SBATCH_MEM_PER_GPU"),
    "gpus_per_node": ("SBATCH_GPUS", "SBATCH_GPUS_PER_NODE"),
}  # fmt: skip
_STATES = {
    **dict.fromkeys(("PENDING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "RESV_DEL_HOLD", "SPECIAL_EXIT"), State.PENDING),
    **dict.fromkeys(("CONFIGURING", "RUNNING", "COMPLETING", "SIGNALING", "STAGE_OUT", "SUSPENDED", "RESIZING", "STOPPED"), State.RUNNING),
    "COMPLETED": State.SUCCEEDED,
    "CANCELLED": State.STOPPED,
}

# Ray's own ports are free ones of the moment, so that several jobs may share a node; what Ray writes is new and this user's own. Its file
# ray_current_cluster appears when the head can be reached, with its address.
_CLUSTER = r"""
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN RAY_USAGE_STATS_ENABLED=0
RAY_AUTH_TOKEN=$(od -An -v -N32 -tx1 /dev/urandom | tr -d ' \n')  # of this start of this job; in no file and no argument
temporary=$(mktemp -d -p /tmp)
if [[ -n $interface ]]; then
  address=$(ip -4 -oneline address show dev "$interface" | awk 'NR == 1 {split($4, part, "/"); print part[1]}') || true
else
  address=$(hostname --all-ip-addresses | awk '{print $1}')
fi
[[ -n $address ]] || fail "this node has no IPv4 address${interface:+ on $interface}; set cluster.network.interface"
# Ray wants a number for the one server that nobody uses here.
unused=$(python -c 'import socket; server = socket.create_server(("", 0)); print(server.getsockname()[1])')
ports=(--min-worker-port=0 --max-worker-port=0 --dashboard-agent-listen-port=0)
offer=(--num-cpus="$cpus" --num-gpus="$gpus" --block "${ports[@]}")
on() { srun --overlap --export=ALL --ntasks-per-node=1 --cpus-per-task="$cpus" "${step[@]}" "$@"; }

on --nodes=1 --ntasks=1 --nodelist="$SLURMD_NODENAME" ray start --head --node-ip-address="$address" --port=0 --temp-dir="$temporary" \
  --include-dashboard=false --ray-client-server-port="$unused" "${offer[@]}" >"$temporary/head.log" 2>&1 &
steps+=($!)
deadline=$((SECONDS + start_limit_s))
until [[ -s $temporary/ray_current_cluster ]]; do
  kill -0 "${steps[0]}" 2>/dev/null || fail "the head of the Ray cluster ended: $(tail -n 20 "$temporary/head.log")"
  ((SECONDS < deadline)) || fail "no head of the Ray cluster within $start_limit_s s: $(tail -n 20 "$temporary/head.log")"
  sleep 0.2
done
export RAY_ADDRESS
RAY_ADDRESS=$(<"$temporary/ray_current_cluster")
on --nodes=$((nodes - 1)) --ntasks=$((nodes - 1)) --exclude="$SLURMD_NODENAME" ray start --address="$RAY_ADDRESS" "${offer[@]}" \
  >"$temporary/workers.log" 2>&1 &
steps+=($!)
python -m gentrain.cluster.nodes "$nodes" "$start_limit_s" || fail "not all nodes joined: $(tail -n 20 "$temporary/workers.log")"
"""

_FUNCTIONS = r"""
fail() { echo "gentrain: $*" >&2; exit 1; }
asked='' driver='' temporary='' steps=()
ask() { [[ $asked == TERM ]] || asked=$1; [[ -z $driver ]] || kill -s "$1" "$driver" 2>/dev/null || true; }
trap 'ask USR1' USR1
trap 'ask TERM' TERM
end_ray() {  # and writes down the exit status given
  trap '' USR1 EXIT
  driver=''
  for pid in "${steps[@]}"; do kill -s TERM "$pid" 2>/dev/null || true; done
  until wait; do :; done  # TERM is still noted, and cuts it short
  if [[ -n $temporary ]]; then srun --overlap --export=ALL --ntasks-per-node=1 rm -rf "$temporary" || true; fi
  echo "$1" >"$record" || true
}
trap 'end_ray $?' EXIT
record+=/${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}${SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}.status
rm -f "$record"
"""

_RUN = r"""
status=75
if [[ -z $asked ]]; then
  "${command[@]}" &
  driver=$!
  [[ -z $asked ]] || ask "$asked"  # it came before there was a number to send it to
  while kill -0 "$driver" 2>/dev/null; do wait "$driver" || true; done  # a signal cuts `wait` short
  status=0
  wait "$driver" || status=$?
fi
case $asked$status in USR1138 | TERM138 | TERM143) status=75 ;; esac  # the signal came before the command could tell what it means
if [[ $asked == USR1 && $status == 75 ]]; then
  if ((${SLURM_RESTART_COUNT:-0} < restarts)); then
    end_ray "$status"
    if [[ $asked == USR1 ]]; then  # no TERM has come meanwhile
      echo "gentrain: the time is up; start $((${SLURM_RESTART_COUNT:-0} + 2)) of this job goes on"
      # One task of an array has the array's number for its own job number: all of them would come back.
      scontrol requeue "${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}${SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}"
    fi
  else
    echo "gentrain: the time is up, and cluster.submit.restarts = $restarts are used; gentrain resume goes on"
  fi
fi
exit "$status"
"""


class _Numbered(TypedDict):
    job: str
    logs: list[str]


class _Sent(TypedDict):
    mark: str
    name: str
    folder: str
    tasks: list[str]


@register("slurm")
@dataclass
class Slurm(Allocation):
    """A job of SLURM. The file system is shared: `output` has the same name on all nodes, and here."""

    handle: ClassVar[Any] = _Numbered | _Sent

    partition: str | None = option(None, "partition; left out: SLURM's default")
    account: str | None = option(None, "account; left out: SLURM's default")
    options: list[str] = option(list, "further options of sbatch, such as --qos=high or --constraint=a100")
    venv: str | None = option(None, "virtual environment of gentrain on the nodes; left out: the one of this command")
    setup: list[str] = option(list, "lines of shell before anything else, such as module load cuda")
    signal_s: PositiveInt = option(120, "before the time limit at which a checkpoint is asked for; SLURM may be up to 60 s early", unit="s")
    start_limit_s: PositiveInt = option(300, "for the Ray head, and then for all nodes, to be there", unit="s")
    array: list[str] | Literal["trials"] = option(
        list, "overrides of each task of a job array, such as 'optimizer.lr=1e-3 seed=2', or `trials` of a sweep; empty: one job"
    )
    at_once: PositiveInt | None = option(None, "tasks of the array that run at the same time; left out: any number")

    def __post_init__(self) -> None:
        if self.storage is not None:
            raise ConfigError("a run has one directory on all nodes and here; leave it out, and set `output`", key="storage")
        if self.venv is not None and not os.path.isabs(self.venv):
            raise ConfigError(f"expected an absolute directory, got {self.venv!r}; write it out, `~` too", key="venv")
        for key, text in (("partition", self.partition), ("account", self.account)):
            if text is not None and not re.fullmatch(r"[\w.,:@+-]+", text):
                raise ConfigError(f"expected a name, got {text!r}", key=key)
        for text in self.options:
            # sbatch takes quotes out of a line, also within words, before it looks for options in it.
            if not text.isprintable() or not re.fullmatch(r"--[a-z0-9-]*([= ].*)?", text) or re.search(r" [\"'\\]*-", text):
                raise ConfigError(f"expected an option of sbatch such as --qos=high, one an entry, got {text!r}", key="options")
            if text.startswith("--exp"):
                message = f"{text!r} would send other variables than those in `secrets`; name them there, or in `environment`"
                raise ConfigError(message, key="options")
            given = re.split(r"[=\s]", text[2:])[0]
            clash = next((name for name in _OURS if name.startswith(given)), None)  # sbatch takes what an option begins with for it
            if clash is not None and not (clash == "mem" and self.memory_gib is None):  # --mem=0 is all of it
                remedy = f"set {_OURS[clash]} instead" if _OURS[clash] else "leave it out"
                raise ConfigError(f"{text!r} would undo what gentrain tells sbatch; {remedy}", key="options")
        if self.time_limit_min is not None and self.signal_s >= 60 * self.time_limit_min:
            message = (
                f"{self.signal_s} s before the end of {self.time_limit_min} min is no time to train; lower it, or raise time_limit_min"
            )
            raise ConfigError(message, key="signal_s")

    def variants(self) -> list[list[str]]:
        try:
            entries = [] if self.array == "trials" else [shlex.split(overrides) for overrides in self.array]
        except ValueError as error:
            raise ConfigError(f"{error}; quote an entry as a shell wants it", key="cluster.submit.array") from error
        if any(override.partition("=")[0] == "output" for entry in entries for override in entry):
            raise ConfigError("each entry has a directory of its own below `output`; leave that out", key="cluster.submit.array")
        return entries

    def render(self, submission: Submission) -> dict[str, str]:
        self._check(submission)
        values = {"nodes": self.nodes, "cpus": self.cpus_per_node, "gpus": self.gpus_per_node, "restarts": self.restarts}
        step = [f"--gpus-per-node={self.gpus_per_node}"] if self.gpus_per_node else []
        environment = stamp() | self.environment
        venv = self.venv or sys.prefix
        lines = [
            "#!/usr/bin/env bash",
            *(f"#SBATCH {option}" for option in self._options(submission)),
            "set -eo pipefail",
            "unset SLURM_EXPORT_ENV",
            *self.setup,
            "set -u",  # profiles and scripts of modules do not bear it
            f"export PATH={shlex.quote(f'{venv}/bin')}:$PATH OMP_NUM_THREADS={submission.cpus_per_worker}",
            *(f"export {name}={shlex.quote(value)}" for name, value in environment.items()),
            " ".join(f"{name}={value}" for name, value in values.items()),
            f"start_limit_s={self.start_limit_s} interface={shlex.quote(submission.interface or '')} step=({shlex.join(step)})",
            f"command=({shlex.join(submission.command)})",
            f"record={shlex.quote(f'{submission.output}/submission')}",
            *self._tasks(submission),
        ]
        parts = [_FUNCTIONS, *([_CLUSTER] if self.nodes > 1 else []), _RUN]
        return {"config.yaml": submission.config, "job.sbatch": "\n".join(lines) + "\n" + "".join(parts)}

    def expected(self, submission: Submission) -> Handle:
        tasks = [f"_{number}" for number in range(self._count(submission))] or [""]
        mark = secrets.token_hex(8)
        return {"mark": mark, "name": submission.name, "folder": str(submission.files.resolve()), "tasks": tasks}

    def submit(self, submission: Submission, handle: Handle) -> Handle:
        refuse_missing(submission.secrets)
        said = _VARIABLES.union(*(names for key, names in _VARIABLES_OF.items() if getattr(self, key)))
        environment = {name: value for name, value in os.environ.items() if name not in said}
        # The mark becomes an argument of the script, which does not read it.
        job = _tell("sbatch", "--parsable", str(submission.files / "job.sbatch"), handle["mark"], environment=environment)
        return _numbered(handle, job.strip().partition(";")[0])

    def status(self, handle: Handle) -> State:
        try:
            known = _known(handle)
            return State.LOST if known is None else _combined(_states(known))
        except (ValueError, IndexError) as error:
            raise PlaceError(f"what squeue or sacct prints cannot be read: {error}") from error

    def logs(self, handle: Handle, follow: bool) -> Iterator[str]:
        """Of a job array, each line begins with its task's number."""
        known = _known(handle)
        if known is None:
            return
        read = dict.fromkeys(known["logs"], 0)
        while True:
            over = not follow or self.status(known).is_over  # asked before reading: what is written last is read, too
            for number, name in enumerate(read):
                if not Path(name).exists():
                    continue
                with Path(name).open("rb") as file:
                    file.seek(read[name])
                    for line in file:
                        if line.endswith(b"\n") or over:
                            read[name] += len(line)
                            yield (f"{number}: " if len(read) > 1 else "") + line.decode(errors="replace").rstrip("\n")
            if over:
                return
            time.sleep(_POLL_S)

    def stop(self, handle: Handle) -> None:
        """Of the tasks that run a checkpoint is asked for; those that wait are taken from the queue."""
        known = _known(handle)
        if known is None or self.status(known).is_over:
            return
        _tell("scancel", "--state=PENDING", known["job"])
        try:
            _tell("scancel", "--batch", "--signal=TERM", "--state=RUNNING", known["job"])
        except PlaceError:
            if not self.status(known).is_over:  # all of it waited, or has ended since
                raise

    def _check(self, submission: Submission) -> None:
        if any(not letter.isprintable() or letter in " %#\"'\\" for letter in submission.output):
            raise ConfigError(f"SLURM cannot write a log below {submission.output!r}; use plain names", key="output")
        if self.array == "trials" and not submission.trials:
            raise ConfigError("nothing says what varies; add a section `sweep:`, or list overrides", key="cluster.submit.array")
        alone = not submission.under_ray
        if self.array == "trials":  # no Ray Tune, which is what a sweep needs Ray for
            alone = yaml.safe_load(submission.config).get("cluster", {}).get("place", "inline") == "inline"
        if self.nodes > 1 and alone:
            raise ConfigError(
                f"{self.nodes} nodes for a run in one process; set cluster.place to ray, or nodes to 1", key="cluster.submit.nodes"
            )
        most = self.signal_s - _END_S
        if submission.grace_s > max(most, 0):  # 0: a run in one process, without Ray's end
            remedy = f"lower it to {most} s or less, or raise" if most > 0 else "raise"
            message = (
                f"workers may take {submission.grace_s:g} s for a checkpoint, SLURM kills the job {self.signal_s} s after it has asked; "
                f"{remedy} cluster.submit.signal_s: {_END_S} s are kept for Ray's own end"
            )
            raise ConfigError(message, key="cluster.grace_s")
        refuse_cramped(self, submission)

    def _options(self, submission: Submission) -> list[str]:
        files = f"{submission.output}/submission"
        optional = {
            "partition": self.partition,
            "account": self.account,
            "gpus-per-node": self.gpus_per_node or None,
            "mem": f"{self.memory_gib}G" if self.memory_gib else None,
            "time": self.time_limit_min,
            "array": f"0-{self._count(submission) - 1}" + (f"%{self.at_once}" if self.at_once else "") if self.array else None,
        }
        return [
            f"--job-name={submission.name}",
            f"--nodes={self.nodes}",
            "--ntasks-per-node=1",
            f"--cpus-per-task={self.cpus_per_node}",
            *(f"--{name}={value}" for name, value in optional.items() if value is not None),
            f"--signal=B:USR1@{self.signal_s}",
            "--requeue",
            f"--chdir={files}",
            "--open-mode=append",
            f"--output={files}/{'%A_%a' if self.array else '%j'}.log",
            f"--export={','.join(submission.secrets) or 'NIL'}",  # by name: the values travel with the job, not in this file
            *self.options,
        ]

    def _count(self, submission: Submission) -> int:
        """Tasks of the array."""
        return submission.trials if self.array == "trials" else len(self.array)

    def _tasks(self, submission: Submission) -> list[str]:
        """Each task of an array has a directory of its own."""
        if not self.array:
            return []
        if self.array == "trials":
            return ["command+=(--trial=$SLURM_ARRAY_TASK_ID)"]
        cases = [
            f"  {number}) command+=({shlex.join([*overrides, f'output={submission.output}/{number}'])}) ;;"
            for number, overrides in enumerate(self.variants())
        ]
        return ["case $SLURM_ARRAY_TASK_ID in", *cases, "esac"]


def _tell(*command: str, environment: Mapping[str, str] | None = None) -> str:
    """What a command of SLURM prints. Raises PlaceError."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, stdin=subprocess.DEVNULL, env=environment).stdout
    except FileNotFoundError as error:
        raise PlaceError(f"{command[0]} is not installed here; submit from a machine that has SLURM's commands") from error
    except subprocess.CalledProcessError as error:
        raise PlaceError(f"{shlex.join(command)}: {error.stderr.strip() or f'status {error.returncode}'}") from error


def _numbered(handle: Handle, job: str) -> Handle:
    """With the job's number, and the logs that follow from it."""
    return {"job": job, "logs": [f"{handle['folder']}/{job}{task}.log" for task in handle["tasks"]]}


def _known(handle: Handle) -> Handle | None:
    """With the job's number: where sbatch's answer was never read, from the queue, by the mark. None if there is no such job."""
    if "job" in handle:
        return handle
    shown = _tell("squeue", "--noheader", "--states=all", f"--name={handle['name']}", "--Format=ArrayJobID:30,JobID:30,Command:5000")
    for array, job, *command in map(str.split, shown.splitlines()):
        if command[-1:] == [handle["mark"]]:
            return _numbered(handle, array if array.isdecimal() and array != "0" else job)
    return None


def _states(handle: Handle) -> list[State]:
    """Of each task: from the queue, or else from accounting, or else from the exit status that the task has written beside its log."""
    files = {Path(log).stem.partition("_")[2]: Path(log).with_suffix(".status") for log in handle["logs"]}
    found = _queued(handle["job"])
    if not found or files.keys() - found.keys():  # SLURM forgets each task some minutes after its end
        found = _accounted(handle["job"]) | found
    for task in files.keys() - found.keys():
        with suppress(OSError, ValueError):
            status = int(files[task].read_text())
            found[task] = _state("FAILED" if status else "COMPLETED", status)
    return [*found.values(), *(State.LOST for task in files if task not in found)]


def _queued(job: str) -> dict[str, State]:
    """Number of the task, "" of a job that is no array -> state, of those that the queue still holds."""
    try:
        shown = _tell("squeue", "--noheader", "--array", "--states=all", f"--jobs={job}", "--Format=ArrayTaskID:30,State:30,exit_code:30")
    except PlaceError as error:
        if "Invalid job id" not in str(error):
            raise
        return {}
    rows = map(str.split, shown.splitlines())
    return {task.replace("N/A", ""): _state(state, os.waitstatus_to_exitcode(int(code))) for task, state, code in rows}


def _accounted(job: str) -> dict[str, State]:
    try:
        shown = _tell("sacct", "--noheader", "--allocations", "--parsable2", f"--jobs={job}", "--format=JobID,State,ExitCode")
    except PlaceError:  # this cluster keeps no accounts
        return {}
    rows = (line.split("|") for line in shown.splitlines())
    return {name.partition("_")[2]: _state(state.split()[0], int(code.partition(":")[0])) for name, state, code in rows}


def _state(name: str, status: int) -> State:
    return State.STOPPED if (name, status) == ("FAILED", STOPPED) else _STATES.get(name, State.FAILED)


def _combined(tasks: list[State]) -> State:
    """Of all tasks together: what is not over counts first, then what is worst."""
    order = (State.RUNNING, State.PENDING, State.FAILED, State.LOST, State.STOPPED, State.SUCCEEDED)
    return next((state for state in order if state in tasks), State.LOST)
