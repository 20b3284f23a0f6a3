"""What is sent to KubeRay: valid by its own schemas, and safe; and what kubectl is told."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from gentrain.cluster.kuberay import KubeRay
from gentrain.cluster.kuberay_pods import ASK, LEAVE_HEAD, leave_worker
from gentrain.cluster.places import PlaceError, State, Submission
from gentrain.config import ConfigError

CRDS = os.environ.get("GENTRAIN_KUBERAY_CRDS")
CANARY = "canary-51c0"
SUBMISSION = Submission(
    name="SFD.student_1",
    config="method: flow_matching\noutput: /shared/runs/SFD.student_1\n",
    command=("gentrain", "train", "config.yaml"),
    directory=Path("runs/SFD.student_1"),
    output="/shared/runs/SFD.student_1",
    environment={"HF_HOME": "/shared/cache"},
    secrets=("BUCKET_TOKEN",),
    under_ray=True,
    workers=(2, 4),
    cpus_per_worker=4,
    gpus_per_worker=1.0,
)

IN_BUCKET = replace(SUBMISSION, config="training: {checkpoints: 's3://bucket/run'}\n", under_ray=False)
BY_HAND = {"interactive": True, "claim": None, "storage": None}


def _place(**settings: Any) -> KubeRay:
    values: dict[str, Any] = {
        "image": "registry.example/gentrain@sha256:0", "claim": "runs", "storage": "/shared/runs", "secret": "buckets", "nodes": 2,
        "cpus_per_node": 8, "gpus_per_node": 2, "memory_gib": 64, "time_limit_min": 60, "queue": "research", "labels": {"team": "a"},
    }  # fmt: skip
    return KubeRay(**(values | settings))


def _objects(place: KubeRay, submission: Submission = SUBMISSION) -> dict[str, Any]:
    return {each["kind"]: each for each in yaml.safe_load_all(place.render(submission)["manifest.yaml"])}


def _pods(objects: dict[str, Any]) -> list[dict[str, Any]]:
    spec = objects["RayJob"]["spec"] if "RayJob" in objects else {"rayClusterSpec": objects["RayCluster"]["spec"]}
    cluster = spec["rayClusterSpec"]
    templates = [cluster["headGroupSpec"]["template"], *(group["template"] for group in cluster["workerGroupSpecs"])]
    return [template["spec"] for template in [*templates, *([spec["submitterPodTemplate"]] if "submitterPodTemplate" in spec else [])]]


@cache
def _schema(kind: str) -> Any:
    """Of a CRD's version v1. Kubernetes refuses unknown fields, where the schema does not say otherwise."""
    text = Path(str(CRDS), f"ray.io_{kind.lower()}s.yaml").read_text()
    versions = yaml.load(text, Loader=yaml.CSafeLoader)["spec"]["versions"]
    schema = next(each["schema"]["openAPIV3Schema"] for each in versions if each["name"] == "v1")
    _close(schema)
    schema["properties"]["metadata"] = {}
    return jsonschema.Draft7Validator(schema)


def _close(schema: Any) -> None:
    if isinstance(schema, dict):
        if "properties" in schema and not schema.get("x-kubernetes-preserve-unknown-fields"):
            schema.setdefault("additionalProperties", False)
        if schema.get("x-kubernetes-int-or-string"):
            schema.pop("anyOf", None)
            schema["type"] = ["integer", "string"]
        for part in schema.values():
            _close(part)
    elif isinstance(schema, list):
        for part in schema:
            _close(part)


@pytest.mark.skipif(CRDS is None, reason="GENTRAIN_KUBERAY_CRDS names no directory of KubeRay's CRDs")
@pytest.mark.parametrize("settings", [{}, {"time_limit_min": None, "queue": None, "gpus_per_node": 4}, BY_HAND])
def test_the_manifests_keep_to_the_schemas_of_kuberay(settings: dict[str, Any]) -> None:
    objects = _objects(_place(**settings), IN_BUCKET if "claim" in settings else SUBMISSION)
    kind = "RayCluster" if settings.get("interactive") else "RayJob"
    _schema(kind).validate(objects[kind])
    objects[kind]["spec"]["typo"] = 1
    with pytest.raises(jsonschema.ValidationError, match="typo"):
        _schema(kind).validate(objects[kind])


@pytest.mark.parametrize("kubernetes", ["1.30", "1.37"])
@pytest.mark.parametrize("settings", [{"queue": None, "node_selector": {"pool": "gpu"}}, BY_HAND])
def test_the_manifests_keep_to_the_schemas_of_kubernetes(settings: dict[str, Any], kubernetes: str) -> None:
    """KubeRay's schema leaves parts of a pod open; what it makes of a template is a Pod."""

    def validate(value: dict[str, Any]) -> None:
        kubernetes_validate.validate(value, kubernetes, strict=True)

    objects = _objects(_place(**settings), IN_BUCKET if "claim" in settings else SUBMISSION)
    validate(objects["ConfigMap"])
    validate(objects["NetworkPolicy"])
    pods = _pods(objects)
    for pod in pods:
        whole = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod"}, "spec": pod}
        validate(whole)
        pod["containers"][0]["resources"]["limit"] = {}
        with pytest.raises(kubernetes_validate.ValidationError, match="'limit' was unexpected"):
            validate(whole)
    assert len(pods) == (2 if "claim" in settings else 3)


@pytest.mark.parametrize("interactive", [False, True])
def test_who_has_no_token_and_is_no_part_of_the_run_reaches_nothing(interactive: bool) -> None:
    rendered = _place(interactive=interactive).render(SUBMISSION)["manifest.yaml"]
    assert "0.0.0.0" not in rendered
    objects = _objects(_place(interactive=interactive))
    resource = objects["RayCluster" if interactive else "RayJob"]
    cluster = resource["spec"] if interactive else resource["spec"]["rayClusterSpec"]
    assert cluster["authOptions"] == {"mode": "token"}
    assert cluster["headGroupSpec"]["rayStartParams"]["dashboard-host"] == "$POD_IP"
    assert cluster["headGroupSpec"]["serviceType"] == "ClusterIP"
    assert not [each for each in yaml.scan(rendered) if isinstance(each, yaml.AnchorToken)]  # people read it, and tools without anchors
    policy = objects["NetworkPolicy"]["spec"]
    assert policy["policyTypes"] == ["Ingress"] and all(rule["from"] for rule in policy["ingress"])
    own = {"from": [{"podSelector": policy["podSelector"]}]}
    (operator,) = [rule for rule in policy["ingress"] if rule != own]
    assert own in policy["ingress"] and operator["ports"] == [{"protocol": "TCP", "port": 8265}]
    namespace = {"matchLabels": {"kubernetes.io/metadata.name": "kuberay-system"}}
    pods = {"matchLabels": {"app.kubernetes.io/name": "kuberay-operator"}}
    assert operator["from"] == [{"namespaceSelector": namespace, "podSelector": pods}]  # both in one entry: who is both
    templates = [cluster["headGroupSpec"]["template"], cluster["workerGroupSpecs"][0]["template"]]
    templates += [] if interactive else [resource["spec"]["submitterPodTemplate"]]
    for template in templates:  # or the policy is not about them
        assert policy["podSelector"]["matchLabels"].items() <= template["metadata"]["labels"].items()


def test_every_pod_has_limits_and_no_more_rights_than_it_needs() -> None:
    pods = _pods(_objects(_place()))
    assert len(pods) == 3
    for pod in pods:
        (container,) = pod["containers"]
        assert {"cpu", "memory"} <= container["resources"]["limits"].keys()
        assert container["resources"]["requests"] == container["resources"]["limits"]
        assert pod["securityContext"]["runAsNonRoot"] and pod["securityContext"]["runAsUser"] == 1000
        assert pod["automountServiceAccountToken"] is False
        assert container["securityContext"] == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
        mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
        assert mounts["shared-memory"] == "/dev/shm" and mounts["storage"] == "/shared/runs"
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        assert volumes.keys() == mounts.keys() and pod["securityContext"]["fsGroup"] == 1000  # who may write to the claim
        assert volumes["shared-memory"]["emptyDir"] == {"medium": "Memory", "sizeLimit": "4Gi"}
    head, worker, _ = (pod["containers"][0] for pod in pods)
    assert worker["resources"]["limits"] == {"cpu": "8", "memory": "64Gi", "nvidia.com/gpu": "2"}
    for container in (head, worker):
        assert {"startupProbe", "readinessProbe", "livenessProbe"} <= container.keys()
        alive = container["livenessProbe"]
        assert alive["periodSeconds"] * alive["failureThreshold"] >= 120  # a pause is not yet a death
    cluster = _objects(_place())["RayJob"]["spec"]["rayClusterSpec"]
    (group,) = cluster["workerGroupSpecs"]
    assert group["rayStartParams"]["num-cpus"] == "8" and group["rayStartParams"]["num-gpus"] == "2"
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"  # it holds the driver only
    assert group["replicas"] == group["minReplicas"] == group["maxReplicas"] == 2
    for each in (group, cluster["headGroupSpec"]):
        assert each["rayStartParams"]["object-store-memory"] == str(2 << 30)  # of 4 GiB: NCCL and the data loader need some, too


def test_secrets_are_named_and_their_values_are_nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BUCKET_TOKEN", CANARY)
    rendered = _place().render(SUBMISSION)
    assert CANARY not in json.dumps(rendered)
    environment = {each["name"]: each for each in _pods(_objects(_place()))[1]["containers"][0]["env"]}
    assert environment["BUCKET_TOKEN"]["valueFrom"] == {"secretKeyRef": {"name": "buckets", "key": "BUCKET_TOKEN"}}
    assert environment["HF_HOME"]["value"] == "/shared/cache"


def test_a_value_arrives_as_it_is() -> None:
    """Kubernetes puts variables in place of $(NAME), and one $ in place of two."""
    sent = replace(SUBMISSION, environment={"WORDS": "$(POD_IP) $$ $HOME"})
    environment = {each["name"]: each.get("value") for each in _pods(_objects(_place(), sent))[1]["containers"][0]["env"]}
    assert environment["WORDS"] == "$$(POD_IP) $$$$ $$HOME"


def test_what_is_cut_off_starts_again_and_goes_on() -> None:
    objects = _objects(_place(restarts=5))
    spec = objects["RayJob"]["spec"]
    assert spec["backoffLimit"] == 5 and spec["entrypoint"] == "bash /etc/gentrain/run.sh"
    assert objects["ConfigMap"]["data"]["config.yaml"] == SUBMISSION.config
    labels = objects["RayJob"]["metadata"]["labels"]
    assert (
        labels["ray.io/gang-scheduling-enabled"] == "true" and labels["kueue.x-k8s.io/queue-name"] == "research" and labels["team"] == "a"
    )
    assert spec["suspend"] is True and _objects(_place(queue=None))["RayJob"]["spec"]["suspend"] is False


@pytest.mark.parametrize("limit", [60, None])
def test_what_is_over_holds_no_accelerators(limit: int | None) -> None:
    """KubeRay itself lets a job that is out of time train on until it deletes the cluster."""
    spec = _objects(_place(time_limit_min=limit))["RayJob"]["spec"]
    assert spec["shutdownAfterJobFinishes"] is True and spec["ttlSecondsAfterFinished"] == 0
    assert spec.get("activeDeadlineSeconds") == (3600 if limit else None)
    # It would wait for the head that was deleted; it may not end before the command's last words are told.
    assert spec["submitterPodTemplate"]["spec"].get("activeDeadlineSeconds") == (3600 + 120 if limit else None)


@pytest.mark.parametrize("interactive", [False, True])
def test_no_pod_is_taken_away_before_the_checkpoint_is_there(interactive: bool) -> None:
    head, worker, *submitter = _pods(_objects(_place(grace_s=90, interactive=interactive)))
    assert _before_its_end(head) == LEAVE_HEAD and _before_its_end(worker) == leave_worker(90)
    assert head["terminationGracePeriodSeconds"] == worker["terminationGracePeriodSeconds"] == 90
    assert not any("lifecycle" in pod["containers"][0] for pod in submitter)
    environment = {each["name"]: each.get("value") for each in head["containers"][0]["env"]}
    assert environment["RAY_JOB_STOP_WAIT_TIME_S"] == "90"  # when the job is deleted KubeRay has Ray stop it, which else kills it after 3 s


def _before_its_end(pod: dict[str, Any]) -> str:
    shell, option, script = pod["containers"][0]["lifecycle"]["preStop"]["exec"]["command"]
    assert (shell, option) == ("bash", "-c")
    return str(script)


def test_names_are_what_kubernetes_allows() -> None:
    names = []
    for name, output in (("SFD.student_1", "a"), ("SFD.student_1", "b"), ("1" * 63, "a"), ("x" * 63, "a")):
        names.append(_objects(_place(), replace(SUBMISSION, name=name, output=f"/shared/runs/{output}"))["RayJob"]["metadata"]["name"])
    assert len(set(names)) == 4
    assert all(len(name) <= 47 and name[0].isalpha() and set(name) <= set("abcdefghijklmnopqrstuvwxyz0123456789-") for name in names)


@pytest.mark.parametrize(
    "settings, changes, message",
    [
        ({"memory_gib": None}, {}, "memory_gib: a pod has no memory"),
        ({"memory_gib": 4}, {}, "shared_memory_gib = 4 is a part of it"),
        ({"secret": None}, {}, "the job needs BUCKET_TOKEN; name a Secret"),
        ({"claim": None}, {}, "belong together"),
        ({"claim": None, "storage": None}, {"config": IN_BUCKET.config}, "share the run's directory, wherever checkpoints go; set `claim`"),
        (BY_HAND, {"under_ray": False}, "set `claim` and `storage`, or training.checkpoints to a bucket"),
        (BY_HAND, {"under_ray": False, "config": "training: {checkpoints: /tmp/x}\n"}, "or training.checkpoints to a bucket"),
        (BY_HAND, {"under_ray": False, "config": "stages: {a: {run: {}}, b: {run: runs/a}}\n"}, "or training.checkpoints to a bucket"),
        ({}, {"output": "/elsewhere/run"}, "output: /elsewhere/run is not below cluster.submit.storage = /shared/runs"),
        ({}, {"under_ray": False}, "the head does not train; set cluster.place to ray"),
        ({}, {"workers": (5, 5)}, "5 workers do not fit on 2 nodes with room for 2 each"),
        ({"grace_s": 60}, {"grace_s": 60.0}, "cluster.grace_s: workers may take 60 s for a checkpoint, and a pod"),
        ({}, {"config": "plugins: [/home/me/own.py]\n"}, "a pod has no files of this machine"),
        ({}, {"config": "stages: {a: {run: {plugins: [/home/me/own.py]}}, b: {}}\n"}, "a pod has no files of this machine"),
        ({"image": ""}, {}, "image: expected an image such as registry.example/gentrain:1, got ''"),
        ({"image": "gentrain :1"}, {}, "image: expected an image"),
        ({"claim": "My_Runs"}, {}, "claim: 'My_Runs' is no name in Kubernetes"),
        ({"namespace": "a b"}, {}, "namespace: 'a b' is no name in Kubernetes"),
        ({"secret": "-x"}, {}, "secret: '-x' is no name in Kubernetes"),
        ({"queue": ""}, {}, "queue: '' is no name in Kubernetes"),
        ({"storage": "/"}, {}, "storage: / would hide what a pod has there"),
        ({"storage": "/dev/shm"}, {}, "storage: /dev/shm would hide what a pod has there"),
    ],
)
def test_what_cannot_work_is_refused(settings: dict[str, Any], changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        _place(**settings).render(replace(SUBMISSION, **changes))


# --- kubectl, a stand-in that writes down what it is told -------------------------------------------------------------------

_KUBECTL = """#!/bin/bash
printf '%s\\n' "$(printf '%q ' "$@")" >> "$RECORD/argv"
case "$*" in
  *apply*) cat > "$RECORD/applied" ;;
  *' exec '*) exit "$(cat "$RECORD/exec" 2>/dev/null || echo 0)" ;;
  *' get pods'*) cat "$RECORD/pods" ;;
  *jsonpath*) echo uid-1 ;;
  *' get '*) cat "$RECORD/resource" 2>/dev/null ;;
esac
exit "$(cat "$RECORD/status" 2>/dev/null || echo 0)"
"""


def stand_in(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str, pod: str) -> None:
    """Puts the script in kubectl's place; it finds the folder as RECORD, and the name of a pod there."""
    (folder / "bin").mkdir()
    (folder / "bin" / "kubectl").write_text(script)
    (folder / "bin" / "kubectl").chmod(0o755)
    (folder / "pods").write_text(f"{pod}\n")
    monkeypatch.setenv("PATH", f"{folder / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("RECORD", str(folder))


@pytest.fixture
def kubectl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    stand_in(tmp_path, monkeypatch, _KUBECTL, "pod/head-0")
    monkeypatch.setenv("BUCKET_TOKEN", CANARY)
    yield tmp_path
    assert CANARY not in (tmp_path / "argv").read_text()


def _told(record: Path) -> list[str]:
    return [line.strip() for line in (record / "argv").read_text().splitlines()]


def _shows(record: Path, status: dict[str, Any], stopped: bool = False) -> None:
    annotations = {"gentrain/stopped": "true"} if stopped else {}
    (record / "resource").write_text(json.dumps({"metadata": {"annotations": annotations}, "status": status}))


@pytest.mark.parametrize("interactive, kind", [(False, "RayJob"), (True, "RayCluster")])
def test_a_submission_replaces_the_one_that_is_over_and_owns_what_it_brings(kubectl: Path, interactive: bool, kind: str) -> None:
    place = _place(namespace="research", interactive=interactive)
    name = place.submit(SUBMISSION, place.expected(SUBMISSION))["name"]
    resource = f"{kind.lower()}/{name}"
    *told, config_map, policy = (line.removeprefix("--namespace=research ") for line in _told(kubectl))
    assert told == [
        f"get {resource} --ignore-not-found --output=json",
        f"delete {resource} configmap/{name} networkpolicy/{name} --ignore-not-found --cascade=foreground --wait --timeout=720s",
        "apply --filename=-",
        f"get {resource} --output=jsonpath=\\{{.metadata.uid\\}}",
    ]
    assert (kubectl / "applied").read_text() == place.render(SUBMISSION)["manifest.yaml"]
    owner = {"apiVersion": "ray.io/v1", "kind": kind, "name": name, "uid": "uid-1"}
    for line, dependent in ((config_map, "configmap"), (policy, "networkpolicy")):
        *words, patch = shlex.split(line)
        assert words == ["patch", f"{dependent}/{name}", "--type=merge"]
        assert json.loads(patch.removeprefix("--patch=")) == {"metadata": {"ownerReferences": [owner]}}


@pytest.mark.parametrize("interactive, status", [(False, {}), (False, {"jobDeploymentStatus": "Running"}), (True, {"state": "ready"})])
def test_what_runs_under_that_name_is_left_alone(kubectl: Path, interactive: bool, status: dict[str, Any]) -> None:
    """Another checkout, which keeps its own records, may have sent it."""
    _shows(kubectl, status)
    place = _place(interactive=interactive)
    with pytest.raises(ConfigError, match="already; stop it where it was submitted"):
        place.submit(SUBMISSION, place.expected(SUBMISSION))
    assert not [line for line in _told(kubectl) if " get " not in line]


@pytest.mark.parametrize(
    "status, stopped, state",
    [
        ({}, False, State.PENDING),
        ({"jobDeploymentStatus": "Initializing"}, False, State.PENDING),
        ({"jobDeploymentStatus": "Suspended"}, False, State.PENDING),
        ({"jobDeploymentStatus": "Suspended"}, True, State.STOPPED),
        ({"jobDeploymentStatus": "Running", "jobStatus": "RUNNING"}, False, State.RUNNING),
        ({"jobDeploymentStatus": "Retrying", "jobStatus": "FAILED"}, False, State.PENDING),
        ({"jobDeploymentStatus": "Complete", "jobStatus": "SUCCEEDED"}, False, State.SUCCEEDED),
        ({"jobDeploymentStatus": "Failed", "jobStatus": "FAILED"}, False, State.FAILED),
        ({"jobDeploymentStatus": "Failed", "jobStatus": "FAILED"}, True, State.STOPPED),
        ({"jobDeploymentStatus": "Complete", "jobStatus": "STOPPED"}, False, State.FAILED),  # by itself, after an error
        ({"jobDeploymentStatus": "Complete", "jobStatus": "STOPPED"}, True, State.STOPPED),
        ({"jobDeploymentStatus": "Failed", "jobStatus": "RUNNING", "reason": "DeadlineExceeded"}, False, State.STOPPED),
        ({"jobDeploymentStatus": "Failed", "jobStatus": "", "reason": "DeadlineExceeded"}, False, State.FAILED),  # it never ran
        ({"jobDeploymentStatus": "Failed", "jobStatus": "RUNNING", "reason": "SubmissionFailed"}, False, State.FAILED),
    ],
)
def test_what_kuberay_says_of_a_job(kubectl: Path, status: dict[str, Any], stopped: bool, state: State) -> None:
    _shows(kubectl, status, stopped)
    assert _place().status({"name": "job", "kind": "rayjob"}) is state


def test_a_job_that_kubernetes_does_not_know_is_lost_and_no_answer_is_an_error(kubectl: Path) -> None:
    assert _place().status({"name": "job", "kind": "rayjob"}) is State.LOST
    (kubectl / "resource").write_text("Welcome to the cluster")
    with pytest.raises(PlaceError, match="does not print what rayjob/job is, but: Welcome"):
        _place().status({"name": "job", "kind": "rayjob"})
    (kubectl / "status").write_text("1")
    with pytest.raises(PlaceError, match="kubectl --namespace=default get rayjob/job"):
        _place().status({"name": "job", "kind": "rayjob"})


def test_a_running_job_is_asked_for_a_checkpoint_and_does_not_start_again(kubectl: Path) -> None:
    _shows(kubectl, {"jobDeploymentStatus": "Running", "rayClusterName": "job-x7"})
    _place().stop({"name": "job", "kind": "rayjob"})
    patch, pods, ask = (line for line in _told(kubectl) if " get rayjob" not in line)
    assert "patch rayjob/job --type=merge" in patch and '\\"backoffLimit\\":\\ 0' in patch and "gentrain/stopped" in patch
    assert "ray.io/cluster=job-x7\\,ray.io/node-type=head" in pods
    assert shlex.split(ask)[1:] == ["exec", "pod/head-0", "--container=ray-head", "--", "bash", "-c", ASK]


@pytest.mark.parametrize("cluster, pods, exec_", [(None, "", 0), ("job-x7", "", 0), ("job-x7", "pod/head-0\n", 1)])
def test_a_running_job_whose_head_cannot_be_asked_is_held(kubectl: Path, cluster: str | None, pods: str, exec_: int) -> None:
    """Its pods are taken away, and ask for the checkpoint themselves."""
    _shows(kubectl, {"jobDeploymentStatus": "Running"} | ({"rayClusterName": cluster} if cluster else {}))
    (kubectl / "pods").write_text(pods)
    (kubectl / "exec").write_text(str(exec_))
    _place(queue=None).stop({"name": "job", "kind": "rayjob"})
    assert "patch rayjob/job" in _told(kubectl)[-1] and '\\"suspend\\":\\ true' in _told(kubectl)[-1]
    _place(queue="research").stop({"name": "job", "kind": "rayjob"})
    assert _told(kubectl)[-1] == "--namespace=default delete rayjob/job --wait=false"


def test_each_of_two_heads_is_asked(kubectl: Path) -> None:
    """One that is taken away, and the one that takes its place."""
    _shows(kubectl, {"jobDeploymentStatus": "Running", "rayClusterName": "job-x7"})
    (kubectl / "pods").write_text("pod/head-0\npod/head-1\n")
    _place().stop({"name": "job", "kind": "rayjob"})
    assert [line.split()[2] for line in _told(kubectl) if " exec " in line] == ["pod/head-0", "pod/head-1"]


def test_a_job_that_waits_is_held_and_one_that_is_over_is_left_alone(kubectl: Path) -> None:
    _shows(kubectl, {"jobDeploymentStatus": "Suspended"})
    _place(queue=None).stop({"name": "job", "kind": "rayjob"})
    assert '\\"suspend\\":\\ true' in _told(kubectl)[-1]
    _place(queue="research").stop({"name": "job", "kind": "rayjob"})  # Kueue would let it go
    assert _told(kubectl)[-1] == "--namespace=default delete rayjob/job --wait=false"
    _shows(kubectl, {"jobDeploymentStatus": "Complete", "jobStatus": "SUCCEEDED"})
    _place().stop({"name": "job", "kind": "rayjob"})
    assert " get " in _told(kubectl)[-1]
