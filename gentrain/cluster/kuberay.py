"""The place `kuberay`: a RayJob of Kubernetes' KubeRay operator, or a RayCluster to work in, as plain YAML for kubectl."""

from __future__ import annotations

import hashlib
import json
import re
import shlex
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import PurePosixPath
from typing import Any

import yaml
from pydantic import PositiveInt

from gentrain.cluster.places import Allocation, Handle, PlaceError, State, Submission
from gentrain.cluster.room import refuse_cramped
from gentrain.cluster.versions import stamp
from gentrain.config import ConfigError, option, register
from gentrain.training.object_storage import is_local

_POLL_S = 5.0  # between questions about a job that is followed
_STOPPED = "gentrain/stopped"  # annotation of what was asked to stop
_MOUNT = "/etc/gentrain"  # where config.yaml and run.sh lie, on every node
_GCS, _DASHBOARD, _AGENT = 6379, 8265, 52365

# The pid, for whoever asks for a checkpoint: `kill` in this container.
_RUN = """#!/usr/bin/env bash
set -euo pipefail
echo $$ > /tmp/gentrain.pid
cd {mount}
exec {command}
"""
_ASK = 'kill -s TERM "$(cat /tmp/gentrain.pid)"'
_ASK_AND_WAIT = f'{_ASK} && while kill -0 "$(cat /tmp/gentrain.pid)"; do sleep 1; done'


class _Plain(yaml.SafeDumper):
    """Writes what occurs twice twice, without anchors."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


@register("kuberay")
@dataclass(kw_only=True)
class KubeRay(Allocation):
    """A RayJob: `nodes` pods that train, and a head that only holds them together."""

    image: str = option(help="image with gentrain, best by digest")
    namespace: str = option("default", "namespace")
    claim: str | None = option(None, "PersistentVolumeClaim, ReadWriteMany, mounted at `storage`; left out: checkpoints go to a bucket")
    secret: str | None = option(None, "Secret whose keys are the variables named in `secrets`")
    interactive: bool = option(False, "a RayCluster that stays until `gentrain stop`, for work by hand, in place of a RayJob")
    head_cpus: PositiveInt = option(2, "cores of the head, which does not train")
    head_memory_gib: PositiveInt = option(8, "of the head", unit="GiB")
    shared_memory_gib: PositiveInt = option(4, "of /dev/shm in each pod, part of its memory", unit="GiB")
    queue: str | None = option(None, "Kueue's LocalQueue, which starts the job when all of it fits")
    labels: dict[str, str] = option(dict, "of the job, such as another scheduler's queue (volcano.sh/queue-name)")
    node_selector: dict[str, str] = option(dict, "labels that the nodes of training pods have")
    operator_namespace: str = option("kuberay-system", "namespace of the KubeRay operator, which may ask the head")
    grace_s: PositiveInt = option(120, "for a checkpoint when the head's pod is taken away", unit="s")
    keep_s: PositiveInt = option(3600, "for which pods of a job that is over, and so its log, stay", unit="s")

    def render(self, submission: Submission) -> dict[str, str]:
        self._check(submission)
        name = _name(submission)
        resource = self._cluster_resource(submission) if self.interactive else self._job(submission)
        objects = [self._config_map(submission), self._network_policy(name), resource]
        return {"config.yaml": submission.config, "manifest.yaml": yaml.dump_all(objects, Dumper=_Plain, sort_keys=False, width=140)}

    def expected(self, submission: Submission) -> Handle:
        return {"name": _name(submission), "kind": "raycluster" if self.interactive else "rayjob"}

    def submit(self, submission: Submission, handle: Handle) -> Handle:
        name, kind = handle["name"], handle["kind"]
        if not (state := self.status(handle)).is_over:  # it was sent from a directory that does not know of this one
            message = (
                f"{kind}/{name} of the namespace {self.namespace} is {state.value} already; stop it where it was submitted, or delete it"
            )
            raise ConfigError(message, key="output")
        self._tell("delete", f"{kind}/{name}", "--ignore-not-found", "--wait")
        self._tell("apply", "--filename=-", given=self.render(submission)["manifest.yaml"])
        return handle

    def status(self, handle: Handle) -> State:
        resource = self._get(handle)
        if resource is None:
            return State.LOST
        status, stopped = resource.get("status", {}), _STOPPED in resource["metadata"].get("annotations", {})
        if handle["kind"] == "raycluster":
            return State.RUNNING if status.get("state") == "ready" else State.PENDING
        match status.get("jobDeploymentStatus", ""):
            case "Complete":
                return State.SUCCEEDED if status.get("jobStatus") == "SUCCEEDED" else _failed(stopped)
            case "Failed" | "ValidationFailed":
                return _failed(stopped)
            case "Suspended" if stopped:
                return State.STOPPED
            case "Running":
                return State.RUNNING
        return State.PENDING

    def logs(self, handle: Handle, follow: bool) -> Iterator[str]:
        """Of each start of the job, one after another; those of earlier starts are gone when they were not followed."""
        name, seen = handle["name"], ""
        while True:
            over = not follow or self.status(handle).is_over
            start = (self._get(handle) or {}).get("status", {}).get("jobId", name)
            if start != seen and (over or self.status(handle) is State.RUNNING):
                seen = start
                selector = f"ray.io/cluster={name},ray.io/node-type=head" if handle["kind"] == "raycluster" else f"job-name={name}"
                yield from self._lines("logs", f"--selector={selector}", "--tail=-1", *(["--follow"] if not over else []))
            if over:
                return
            time.sleep(_POLL_S)

    def stop(self, handle: Handle) -> None:
        """The job may not start again, and its command is asked for a checkpoint; before it has started, it is held for good.

        One that waits for Kueue is deleted, for Kueue lets go what is held.
        """
        state = self.status(handle)
        if state.is_over:
            return
        name = handle["name"]
        if handle["kind"] == "raycluster" or (self.queue is not None and state is State.PENDING):
            self._tell("delete", f"{handle['kind']}/{name}", "--wait=false")
            return
        spec: dict[str, Any] = {"backoffLimit": 0} if state is State.RUNNING else {"suspend": True}
        patch = {"metadata": {"annotations": {_STOPPED: "true"}}, "spec": spec}
        self._tell("patch", f"rayjob/{name}", "--type=merge", f"--patch={json.dumps(patch)}")
        if state is State.RUNNING:
            cluster = (self._get(handle) or {})["status"]["rayClusterName"]
            head = f"--selector=ray.io/cluster={cluster},ray.io/node-type=head"
            pod = self._tell("get", "pods", head, "--output=name").split()[0]
            self._tell("exec", pod, "--container=ray-head", "--", "bash", "-c", _ASK)

    # --- what is rendered -------------------------------------------------------------------------------------------------

    def _check(self, submission: Submission) -> None:
        if self.memory_gib is None:
            raise ConfigError("a pod has no memory of its own accord; say how much each needs", key="cluster.submit.memory_gib")
        if self.memory_gib <= self.shared_memory_gib:
            message = f"shared_memory_gib = {self.shared_memory_gib} is a part of it; raise it"
            raise ConfigError(message, key="cluster.submit.memory_gib")
        if submission.secrets and self.secret is None:
            message = f"the job needs {', '.join(submission.secrets)}; name a Secret of the namespace with these keys"
            raise ConfigError(message, key="cluster.submit.secret")
        if (self.claim is None) != (self.storage is None):
            raise ConfigError("`claim` and `storage` belong together: the claim is mounted there", key="cluster.submit.claim")
        if not submission.under_ray and not self.interactive:
            raise ConfigError("the head does not train; set cluster.place to ray", key="cluster.place")
        values = yaml.safe_load(submission.config)
        runs = [run for stage in values.get("stages", {}).values() if isinstance(run := stage.get("run"), dict)]
        for part in runs or [values]:
            if self.storage is None and is_local((part.get("training") or {}).get("checkpoints") or ""):
                message = "pods lose what they write; set `claim` and `storage`, or training.checkpoints to a bucket"
                raise ConfigError(message, key="cluster.submit.claim")
        if self.storage is not None and not PurePosixPath(submission.output).is_relative_to(self.storage):
            message = f"{submission.output} is not below cluster.submit.storage = {self.storage}, and pods lose what they write elsewhere"
            raise ConfigError(message, key="output")
        for part in (values, *runs):
            if any(plugin.endswith(".py") for plugin in part.get("plugins", ())):
                raise ConfigError("a pod has no files of this machine; put the plugins into the image, as modules", key="plugins")
        refuse_cramped(self, submission)

    def _job(self, submission: Submission) -> dict[str, Any]:
        name = _name(submission)
        spec = {
            "entrypoint": f"bash {_MOUNT}/run.sh",
            "submissionMode": "K8sJobMode",
            "suspend": self.queue is not None,  # until Kueue admits it
            "backoffLimit": self.restarts,  # a new RayCluster each time; the command goes on from its newest checkpoint
            "submitterConfig": {"backoffLimit": 2},
            "shutdownAfterJobFinishes": True,
            "ttlSecondsAfterFinished": self.keep_s,
            **({"activeDeadlineSeconds": 60 * self.time_limit_min} if self.time_limit_min else {}),
            "rayClusterSpec": self._cluster(submission),
            "submitterPodTemplate": {
                "metadata": {"labels": _labels(name)},
                "spec": self._pod("ray-job-submitter", name, 1, 2, 0, restartPolicy="Never"),
            },
        }
        return {"apiVersion": "ray.io/v1", "kind": "RayJob", "metadata": self._metadata(name), "spec": spec}

    def _cluster_resource(self, submission: Submission) -> dict[str, Any]:
        metadata = self._metadata(_name(submission))
        return {"apiVersion": "ray.io/v1", "kind": "RayCluster", "metadata": metadata, "spec": self._cluster(submission)}

    def _cluster(self, submission: Submission) -> dict[str, Any]:
        name, environment = _name(submission), self._environment(submission)
        store = str(self.shared_memory_gib * 2**30 // 2)  # the rest is NCCL's and the data loader's
        ports = {"min-worker-port": "10002", "max-worker-port": "19999", "dashboard-agent-listen-port": str(_AGENT)}
        head = self._pod(
            "ray-head", name, self.head_cpus, self.head_memory_gib, 0, environment, probe=("/api/gcs_healthz", _DASHBOARD),
            ports={"gcs": _GCS, "dashboard": _DASHBOARD},
            lifecycle={"preStop": {"exec": {"command": ["bash", "-c", _ASK_AND_WAIT]}}},
        )  # fmt: skip
        assert self.memory_gib is not None
        worker = self._pod(
            "ray-worker", name, self.cpus_per_node, self.memory_gib, self.gpus_per_node, environment,
            probe=("/api/local_raylet_healthz", _AGENT), selector=self.node_selector,
        )  # fmt: skip
        return {
            "rayVersion": version("ray"),
            "authOptions": {"mode": "token"},  # the operator makes the token, as a Secret that the pods read
            "enableInTreeAutoscaling": False,
            "headGroupSpec": {
                "serviceType": "ClusterIP",
                "rayStartParams": {
                    "dashboard-host": "$POD_IP", "num-cpus": "0", "num-gpus": "0", "object-store-memory": store,
                    "ray-client-server-port": "10001", **ports,
                },
                "template": {"metadata": {"labels": _labels(name)}, "spec": head},
            },
            "workerGroupSpecs": [
                {
                    "groupName": "training", "replicas": self.nodes, "minReplicas": self.nodes, "maxReplicas": self.nodes, "numOfHosts": 1,
                    "rayStartParams": {
                        "num-cpus": str(self.cpus_per_node), "num-gpus": str(self.gpus_per_node), "object-store-memory": store, **ports,
                    },
                    "template": {"metadata": {"labels": _labels(name)}, "spec": worker},
                }
            ],
        }  # fmt: skip

    def _pod(
        self, container: str, name: str, cpus: int, memory_gib: int, gpus: int, environment: list[dict[str, Any]] | None = None, *,
        probe: tuple[str, int] | None = None, ports: dict[str, int] | None = None, selector: dict[str, str] | None = None, **more: Any,
    ) -> dict[str, Any]:  # fmt: skip
        resources = {"cpu": str(cpus), "memory": f"{memory_gib}Gi", **({"nvidia.com/gpu": str(gpus)} if gpus else {})}
        mounts = {"config": _MOUNT, "shared-memory": "/dev/shm"}
        volumes: list[dict[str, Any]] = [
            {"name": "config", "configMap": {"name": name}},
            {"name": "shared-memory", "emptyDir": {"medium": "Memory", "sizeLimit": f"{self.shared_memory_gib}Gi"}},
        ]
        if self.claim is not None and self.storage is not None:
            mounts["storage"] = self.storage
            volumes.append({"name": "storage", "persistentVolumeClaim": {"claimName": self.claim}})
        restart = more.pop("restartPolicy", None)
        probes = {} if probe is None else _probes(*probe)
        return {
            "automountServiceAccountToken": False,
            "enableServiceLinks": False,
            "securityContext": {
                "runAsNonRoot": True, "runAsUser": 1000, "runAsGroup": 1000, "fsGroup": 1000, "seccompProfile": {"type": "RuntimeDefault"},
            },
            "terminationGracePeriodSeconds": self.grace_s,
            **({"restartPolicy": restart} if restart else {}),
            **({"nodeSelector": selector} if selector else {}),
            "containers": [
                {
                    "name": container,
                    "image": self.image,
                    "imagePullPolicy": "IfNotPresent",
                    "env": environment or [],
                    **({"ports": [{"name": key, "containerPort": port} for key, port in ports.items()]} if ports else {}),
                    "resources": {"requests": resources, "limits": resources},
                    "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
                    "volumeMounts": [{"name": key, "mountPath": path} for key, path in mounts.items()],
                    **probes,
                    **more,
                }
            ],
            "volumes": volumes,
        }  # fmt: skip

    def _environment(self, submission: Submission) -> list[dict[str, Any]]:
        values = {"OMP_NUM_THREADS": str(submission.cpus_per_worker), "RAY_USAGE_STATS_ENABLED": "0", **stamp(), **submission.environment}
        return [
            {"name": "POD_IP", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}},
            *({"name": key, "value": value} for key, value in values.items()),
            *({"name": key, "valueFrom": {"secretKeyRef": {"name": self.secret, "key": key}}} for key in submission.secrets),
        ]

    def _metadata(self, name: str) -> dict[str, Any]:
        gang = {"ray.io/gang-scheduling-enabled": "true"}  # all pods or none, where the operator was given a batch scheduler
        queue = {"kueue.x-k8s.io/queue-name": self.queue} if self.queue is not None else {}
        return {"name": name, "namespace": self.namespace, "labels": {**_labels(name), **gang, **queue, **self.labels}}

    def _config_map(self, submission: Submission) -> dict[str, Any]:
        script = _RUN.format(mount=_MOUNT, command=shlex.join(submission.command))
        name = _name(submission)
        metadata = {"name": name, "namespace": self.namespace, "labels": _labels(name)}
        return {
            "apiVersion": "v1",
            "kind": "ConfigMap",
            "metadata": metadata,
            "data": {"config.yaml": submission.config, "run.sh": script},
        }

    def _network_policy(self, name: str) -> dict[str, Any]:
        """Only pods of this run reach its pods, and the operator the head's job server."""
        operator = {
            "namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": self.operator_namespace}},
            "podSelector": {"matchLabels": {"app.kubernetes.io/name": "kuberay-operator"}},
        }
        return {
            "apiVersion": "networking.k8s.io/v1",
            "kind": "NetworkPolicy",
            "metadata": {"name": name, "namespace": self.namespace, "labels": _labels(name)},
            "spec": {
                "podSelector": {"matchLabels": _labels(name)},
                "policyTypes": ["Ingress"],
                "ingress": [
                    {"from": [{"podSelector": {"matchLabels": _labels(name)}}]},
                    {"from": [operator], "ports": [{"protocol": "TCP", "port": _DASHBOARD}]},
                ],
            },
        }

    # --- kubectl ----------------------------------------------------------------------------------------------------------

    def _command(self, *arguments: str) -> list[str]:
        return ["kubectl", f"--namespace={self.namespace}", *arguments]

    def _tell(self, *arguments: str, given: str | None = None) -> str:
        """What kubectl prints. Raises PlaceError."""
        command = self._command(*arguments)
        try:
            return subprocess.run(command, input=given or "", capture_output=True, text=True, check=True).stdout
        except FileNotFoundError as error:
            raise PlaceError("kubectl is not installed here; install it, and give it access to the cluster") from error
        except subprocess.CalledProcessError as error:
            raise PlaceError(f"{shlex.join(command)}: {error.stderr.strip() or f'status {error.returncode}'}") from error

    def _get(self, handle: Handle) -> dict[str, Any] | None:
        shown = self._tell("get", f"{handle['kind']}/{handle['name']}", "--ignore-not-found", "--output=json")
        return json.loads(shown) if shown.strip() else None

    def _lines(self, *arguments: str) -> Iterator[str]:
        try:
            process = subprocess.Popen(self._command(*arguments), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True)
        except FileNotFoundError as error:
            raise PlaceError("kubectl is not installed here; install it, and give it access to the cluster") from error
        with process:
            try:
                assert process.stdout is not None
                for line in process.stdout:
                    yield line.rstrip("\n")
            finally:
                process.terminate()


def _probes(path: str, port: int) -> dict[str, Any]:
    """Ray answers these paths, and no others, without the token."""
    check = {"httpGet": {"path": path, "port": port}, "periodSeconds": 10, "timeoutSeconds": 5}
    return {
        "startupProbe": {**check, "failureThreshold": 60},
        "readinessProbe": {**check, "failureThreshold": 3},
        "livenessProbe": {**check, "failureThreshold": 12},
    }


def _labels(name: str) -> dict[str, str]:
    return {"app.kubernetes.io/name": "gentrain", "app.kubernetes.io/instance": name}


def _failed(stopped: bool) -> State:
    return State.STOPPED if stopped else State.FAILED


def _name(submission: Submission) -> str:
    """A name that Kubernetes allows; runs of one name in different directories do not meet. KubeRay adds up to 16 letters."""
    digest = hashlib.sha256(submission.output.encode()).hexdigest()[:6]
    slug = re.sub(r"[^a-z0-9]+", "-", submission.name.lower()).strip("-")[:32].rstrip("-")
    return f"r-{slug}-{digest}" if not slug[:1].isalpha() else f"{slug}-{digest}"
