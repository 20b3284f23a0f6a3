"""What runs in the pods of KubeRay: the command, and what asks it for a checkpoint before a pod is taken away."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from typing import Any

MOUNT = "/etc/gentrain"  # where config.yaml and run.sh lie, in every pod

# KubeRay starts again what has failed, but not what was stopped: so what would fail in the same way again has Ray stop it.
_RUN = r"""#!/usr/bin/env bash
set -euo pipefail
trap : TERM  # of Ray, which signals the command, too
cd {mount}
{command} &
echo $! > /tmp/gentrain.pid
[[ ! -e /tmp/gentrain.stop ]] || kill -s TERM $! || true  # asked before there was a number
while kill -0 $! 2>/dev/null; do wait $! || true; done  # a signal cuts `wait` short
status=0
wait $! || status=$?
rm -f /tmp/gentrain.pid
if [[ $status == [12] && -n ${{RAY_JOB_CONFIG_JSON_ENV_VAR:-}} ]]; then
  echo "gentrain: the command has ended by itself with exit status $status, and is not started again"
  trap 'exit $status' TERM
  job=$(python -c 'import json, os; print(json.loads(os.environ["RAY_JOB_CONFIG_JSON_ENV_VAR"])["metadata"]["job_submission_id"])')
  ray job stop --no-wait --address="http://$POD_IP:{dashboard}" "$job" || true
  for _ in {{1..60}}; do sleep 1; done
fi
exit "$status"
"""

_NUMBER = '"$(cat /tmp/gentrain.pid 2>/dev/null)"'
_SIGNAL = f"kill -s TERM {_NUMBER} 2>/dev/null || true"
ASK = f"touch /tmp/gentrain.stop; {_SIGNAL}"  # run.sh looks for the file once it has told the number
LEAVE_HEAD = f"{_SIGNAL}; while kill -0 {_NUMBER} 2>/dev/null; do sleep 1; done"

# The run hears of it as of any node that is taken away. The pod stays while actors or tasks are left in it: then the checkpoint is there.
_LEAVE_WORKER = r"""
node=$(grep -zhs '^--node_id=' /proc/[0-9]*/cmdline | head -zn 1 | tr -d '\0')  # raylet's
timeout --kill-after=5 30 ray drain-node --node-id="${{node#*=}}" --reason=DRAIN_NODE_REASON_PREEMPTION \
  --reason-message='its pod is taken away' --deadline-remaining-seconds={grace_s}
while grep -zhs '^ray::' /proc/[0-9]*/cmdline | grep -zEqv '^ray::(IDLE|DashboardAgent|RuntimeEnvAgent)'; do
  sleep 1
done
"""


def run_script(command: Sequence[str], dashboard: int) -> str:
    """run.sh: the command in `MOUNT`, beside config.yaml. By hand it does the same, outside of a job of Ray."""
    return _RUN.format(mount=MOUNT, command=shlex.join(command), dashboard=dashboard)


def leave_worker(grace_s: int) -> str:
    """What a training pod does before it is taken away."""
    return _LEAVE_WORKER.format(grace_s=grace_s).strip()


def before_its_end(script: str) -> dict[str, Any]:
    """A container's lifecycle that runs the script before SIGTERM, within the pod's grace."""
    return {"preStop": {"exec": {"command": ["bash", "-c", script]}}}


def probes(path: str, port: int) -> dict[str, Any]:
    """Of a path that Ray answers without the token; there are no others."""
    check = {"httpGet": {"path": path, "port": port}, "periodSeconds": 10, "timeoutSeconds": 5}
    return {
        "startupProbe": {**check, "failureThreshold": 60},
        "readinessProbe": {**check, "failureThreshold": 3},
        "livenessProbe": {**check, "failureThreshold": 12},
    }
