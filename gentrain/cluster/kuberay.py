"""The place `kuberay`: a RayJob of Kubernetes' KubeRay operator, or a RayCluster to work in, as plain YAML for kubectl."""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import PurePosixPath
from typing import Any, ClassVar, Literal

import yaml
from pydantic import PositiveInt
from typing_extensions import TypedDict

from gentrain.cluster.kubectl import Kubectl
from gentrain.cluster.kuberay_pods import ASK, LEAVE_HEAD, MOUNT, before_its_end, leave_worker, probes, run_script
from gentrain.cluster.places import Allocation, Handle, PlaceError, State, Submission
from gentrain.cluster.room import refuse_cramped
from gentrain.cluster.versions import stamp
from gentrain.config import ConfigError, option, register
from gentrain.training.object_storage import is_local

log = logging.getLogger(__name__)

_STOPPED = "gentrain/stopped"  # annotation of what was asked to stop
_GONE_S = 600  # beyond their grace, for what is left of an earlier job to go: kubectl itself would wait for a week
_GCS, _DASHBOARD, _AGENT = 6379, 8265, 52365


class _Plain(yaml.SafeDumper):
    """Writes what occurs twice twice, without anchors, and texts of several lines as they are."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def represent_str(self, data: str) -> yaml.ScalarNode:
        return self.represent_scalar("tag:yaml.org,2002:str", data, style="|" if "\n" in data else None)


_Plain.add_representer(str, _Plain.represent_str)


class _Handle(TypedDict):
    name: str
    kind: Literal["rayjob", "raycluster"]


@register("kuberay")
@dataclass(kw_only=True)
class KubeRay(Allocation):
    """A RayJob: `nodes` pods that train, and a head that only holds them together."""

    handle: ClassVar[Any] = _Handle

    image: str = option(help="image with gentrain, best by digest")
    namespace: str = option("default", "namespace")
    claim: str | None = option(None, "PersistentVolumeClaim, ReadWriteMany, mounted at `storage`; needed where pods train together")
    secret: str | None = option(None, "Secret whose keys are the variables named in `secrets`")
    interactive: bool = option(False, "a RayCluster that stays until `gentrain stop`, for work by hand, in place of a RayJob")
    head_cpus: PositiveInt = option(2, "cores of the head, which does not train")
    head_memory_gib: PositiveInt = option(8, "of the head", unit="GiB")
    shared_memory_gib: PositiveInt = option(4, "of /dev/shm in each pod, part of its memory", unit="GiB")
    queue: str | None = option(None, "Kueue's LocalQueue, which starts the job when all of it fits")
    labels: dict[str, str] = option(dict, "of the job, such as another scheduler's queue (volcano.sh/queue-name)")
    node_selector: dict[str, str] = option(dict, "labels that the nodes of training pods have")
    operator_namespace: str = option("kuberay-system", "namespace of the KubeRay operator, which may ask the head")
    grace_s: PositiveInt = option(120, "for a checkpoint when pods are taken away", unit="s")

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z0-9._/:@-]+", self.image):
            raise ConfigError(f"expected an image such as registry.example/gentrain:1, got {self.image!r}", key="image")
        for key in ("namespace", "claim", "secret", "queue", "operator_namespace"):
            name = getattr(self, key)
            if name is not None and not re.fullmatch(r"[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?", name):
                raise ConfigError(f"{name!r} is no name in Kubernetes: small letters, digits, `-` and `.`", key=key)

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
        # Waits for what belongs to them: what is left of an earlier job would be taken for a part of this one.
        old = (f"{kind}/{name}", f"configmap/{name}", f"networkpolicy/{name}")
        self._kubectl.tell("delete", *old, "--ignore-not-found", "--cascade=foreground", "--wait", f"--timeout={self.grace_s + _GONE_S}s")
        self._kubectl.tell("apply", "--filename=-", given=self.render(submission)["manifest.yaml"])
        self._own(kind, name)
        return handle

    def status(self, handle: Handle) -> State:
        resource = self._kubectl.get(_resource(handle))
        if resource is None:
            return State.LOST
        status, stopped = resource.get("status") or {}, _STOPPED in (resource["metadata"].get("annotations") or {})
        if handle["kind"] == "raycluster":
            return State.RUNNING if status.get("state") == "ready" else State.PENDING
        match status.get("jobDeploymentStatus", ""):
            case "Complete":
                return State.SUCCEEDED if status.get("jobStatus") == "SUCCEEDED" else _failed(stopped)
            case "Failed" | "ValidationFailed":
                out_of_time = (status.get("reason"), status.get("jobStatus")) == ("DeadlineExceeded", "RUNNING")
                return _failed(stopped or out_of_time)
            case "Suspended" if stopped:
                return State.STOPPED
            case "Running":
                return State.RUNNING
        return State.PENDING

    def logs(self, handle: Handle, follow: bool) -> Iterator[str]:
        """Of each start of the job, one after another; those of earlier starts are gone when they were not followed."""
        name = handle["name"]
        selector = f"ray.io/cluster={name},ray.io/node-type=head" if handle["kind"] == "raycluster" else f"job-name={name}"
        yield from self._kubectl.logs(selector, lambda: self.status(handle).is_over, follow)

    def stop(self, handle: Handle) -> None:
        """The job may not start again, and its command is asked for a checkpoint; where there is nobody to ask, it is held for good.

        What Kueue would let go again is deleted in place of held.
        """
        state = self.status(handle)
        if state.is_over:
            return
        if handle["kind"] == "rayjob":
            mark = {"metadata": {"annotations": {_STOPPED: "true"}}}
            if state is State.RUNNING:
                self._patch(_resource(handle), {**mark, "spec": {"backoffLimit": 0}})
                if self._ask(handle):
                    return
            if self.queue is None:
                self._patch(_resource(handle), {**mark, "spec": {"suspend": True}})
                return
        self._kubectl.tell("delete", _resource(handle), "--wait=false")

    def _ask(self, handle: Handle) -> bool:
        """Whether there is a head that has been asked to stop its command."""
        cluster = ((self._kubectl.get(_resource(handle)) or {}).get("status") or {}).get("rayClusterName")
        asked = False
        for pod in self._kubectl.pods(f"ray.io/cluster={cluster},ray.io/node-type=head") if cluster else ():
            try:
                self._kubectl.tell("exec", pod, "--container=ray-head", "--", "bash", "-c", ASK)
                asked = True
            except PlaceError as error:
                log.warning("%s", error)
        return asked

    def _patch(self, resource: str, patch: dict[str, Any]) -> None:
        self._kubectl.tell("patch", resource, "--type=merge", f"--patch={json.dumps(patch)}")

    def _own(self, kind: str, name: str) -> None:
        """ConfigMap and NetworkPolicy are deleted with the job, whoever deletes it."""
        try:
            uid = self._kubectl.tell("get", f"{kind}/{name}", "--output=jsonpath={.metadata.uid}").strip()
            owner = {"apiVersion": "ray.io/v1", "kind": "RayCluster" if self.interactive else "RayJob", "name": name, "uid": uid}
            for dependent in ("configmap", "networkpolicy"):
                self._patch(f"{dependent}/{name}", {"metadata": {"ownerReferences": [owner]}})
        except PlaceError as error:  # it runs all the same
            log.warning("%s; ConfigMap and NetworkPolicy %s stay when the job is deleted", error, name)

    @property
    def _kubectl(self) -> Kubectl:
        return Kubectl(self.namespace)

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
        if self.storage is not None and any(PurePosixPath(path).is_relative_to(self.storage) for path in (MOUNT, "/dev/shm")):
            raise ConfigError(f"{self.storage} would hide what a pod has there; choose another directory", key="cluster.submit.storage")
        if not submission.under_ray and not self.interactive:
            raise ConfigError("the head does not train; set cluster.place to ray", key="cluster.place")
        if self.storage is None and submission.under_ray:
            message = "the head and the pods that train share the run's directory, wherever checkpoints go; set `claim` and `storage`"
            raise ConfigError(message, key="cluster.submit.claim")
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
        if submission.grace_s >= self.grace_s:
            message = f"workers may take {submission.grace_s:g} s for a checkpoint, and a pod that is taken away has {self.grace_s} s"
            raise ConfigError(f"{message}; lower it, or raise cluster.submit.grace_s", key="cluster.grace_s")
        refuse_cramped(self, submission)

    def _job(self, submission: Submission) -> dict[str, Any]:
        name, limit = _name(submission), 60 * self.time_limit_min if self.time_limit_min else None
        spec = {
            "entrypoint": f"bash {MOUNT}/run.sh",
            "submissionMode": "K8sJobMode",
            "suspend": self.queue is not None,  # until Kueue admits it
            "backoffLimit": self.restarts,  # a new RayCluster each time; the command goes on from its newest checkpoint
            "submitterConfig": {"backoffLimit": 2},
            "shutdownAfterJobFinishes": True,
            "ttlSecondsAfterFinished": 0,  # the log is the submitter's, which stays
            **({"activeDeadlineSeconds": limit} if limit else {}),
            "rayClusterSpec": self._cluster(submission),
            "submitterPodTemplate": {
                "metadata": {"labels": _labels(name)},
                "spec": {
                    **self._pod("ray-job-submitter", name, 1, 2, 0),
                    "restartPolicy": "Never",
                    **({"activeDeadlineSeconds": limit + self.grace_s} if limit else {}),  # or it waits for a head that is gone
                },
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
            lifecycle=before_its_end(LEAVE_HEAD),
        )  # fmt: skip
        assert self.memory_gib is not None
        worker = self._pod(
            "ray-worker", name, self.cpus_per_node, self.memory_gib, self.gpus_per_node, environment,
            probe=("/api/local_raylet_healthz", _AGENT), selector=self.node_selector,
            lifecycle=before_its_end(leave_worker(self.grace_s)),
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
        mounts = {"config": MOUNT, "shared-memory": "/dev/shm"}
        volumes: list[dict[str, Any]] = [
            {"name": "config", "configMap": {"name": name}},
            {"name": "shared-memory", "emptyDir": {"medium": "Memory", "sizeLimit": f"{self.shared_memory_gib}Gi"}},
        ]
        if self.claim is not None and self.storage is not None:
            mounts["storage"] = self.storage
            volumes.append({"name": "storage", "persistentVolumeClaim": {"claimName": self.claim}})
        health = {} if probe is None else probes(*probe)
        return {
            "automountServiceAccountToken": False,
            "enableServiceLinks": False,
            "securityContext": {
                "runAsNonRoot": True, "runAsUser": 1000, "runAsGroup": 1000, "fsGroup": 1000, "seccompProfile": {"type": "RuntimeDefault"},
            },
            "terminationGracePeriodSeconds": self.grace_s,
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
                    **health,
                    **more,
                }
            ],
            "volumes": volumes,
        }  # fmt: skip

    def _environment(self, submission: Submission) -> list[dict[str, Any]]:
        values = {
            "OMP_NUM_THREADS": str(submission.cpus_per_worker),
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_JOB_STOP_WAIT_TIME_S": str(self.grace_s),  # which Ray itself takes for 3: too short for a checkpoint
            **stamp(),
            **submission.environment,
        }
        return [
            {"name": "POD_IP", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}},
            *({"name": key, "value": value.replace("$", "$$")} for key, value in values.items()),  # Kubernetes expands $(NAME)
            *({"name": key, "valueFrom": {"secretKeyRef": {"name": self.secret, "key": key}}} for key in submission.secrets),
        ]

    def _metadata(self, name: str) -> dict[str, Any]:
        gang = {"ray.io/gang-scheduling-enabled": "true"}  # all pods or none, where the operator was given a batch scheduler
        queue = {"kueue.x-k8s.io/queue-name": self.queue} if self.queue is not None else {}
        return {"name": name, "namespace": self.namespace, "labels": {**_labels(name), **gang, **queue, **self.labels}}

    def _config_map(self, submission: Submission) -> dict[str, Any]:
        name = _name(submission)
        metadata = {"name": name, "namespace": self.namespace, "labels": _labels(name)}
        return {
            "apiVersion": "v1",
            "kind": "ConfigMap",
            "metadata": metadata,
            "data": {"config.yaml": submission.config, "run.sh": run_script(submission.command, _DASHBOARD)},
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


def _resource(handle: Handle) -> str:
    return f"{handle['kind']}/{handle['name']}"


def _labels(name: str) -> dict[str, str]:
    return {"app.kubernetes.io/name": "gentrain", "app.kubernetes.io/instance": name}


def _failed(stopped: bool) -> State:
    return State.STOPPED if stopped else State.FAILED


def _name(submission: Submission) -> str:
    """A name that Kubernetes allows; runs of one name in different directories do not meet. KubeRay adds up to 16 letters."""
    digest = hashlib.sha256(submission.output.encode()).hexdigest()[:6]
    slug = re.sub(r"[^a-z0-9]+", "-", submission.name.lower()).strip("-")[:32].rstrip("-")
    return f"r-{slug}-{digest}" if not slug[:1].isalpha() else f"{slug}-{digest}"
