"""The place `ray`: the job server of a Ray cluster that somebody has started."""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import os
import re
import secrets
import shlex
import tempfile
import time
import zipfile
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import urlsplit

import yaml
from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt
from typing_extensions import TypedDict

from gentrain.cluster.attempts import short
from gentrain.cluster.packages import contents, zipped
from gentrain.cluster.places import Handle, Place, PlaceError, State, Submission
from gentrain.cluster.stopping import STOPPED
from gentrain.cluster.versions import stamp
from gentrain.config import ConfigError, option, register

log = logging.getLogger(__name__)

_AWAY_S, _POLL_S = 600.0, 2.0  # how long what is followed may tell nothing while its connection is lost, and between two tries
_START_S = 60.0  # that a head which has just been started may take until it can start a job
_LOOPBACK = ("127.0.0.1", "::1", "localhost")
_STATES = {"PENDING": State.PENDING, "RUNNING": State.RUNNING, "SUCCEEDED": State.SUCCEEDED, "STOPPED": State.STOPPED}


class _Handle(TypedDict):
    id: str


@register("ray")
@dataclass
class RayJobs(Place):
    """A job of a running Ray cluster. Its token comes from RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH."""

    handle: ClassVar[Any] = _Handle

    address: str = option("http://127.0.0.1:8265", "of the cluster's dashboard")
    working_directory: str | None = option(
        None, "directory that is sent and becomes the job's current one; left out: only the configuration"
    )
    ignore: list[str] = option(list, "patterns of names in it that are not sent, beside caches, runs, .git and usual places of secrets")
    size_limit_mib: PositiveInt = option(50, "of what is sent, before compression", unit="MiB")
    wheel: str | None = option(None, "wheel of gentrain whose contents are sent and used; left out: the one installed on the cluster")
    python: str = option("python", "interpreter on the cluster's nodes")
    cpus: NonNegativeFloat = option(0.0, "cores that the command itself takes; more than none for a run with cluster.place inline")
    gpus: NonNegativeFloat = option(0.0, "accelerators that the command itself takes")
    grace_s: PositiveFloat = option(120.0, "for a checkpoint after `gentrain stop`; then the job is killed", unit="s")

    def __post_init__(self) -> None:
        url = urlsplit(self.address)  # of other schemes Ray would import what the address names
        if url.scheme not in ("http", "https") or not url.hostname or url.username is not None or url.path.strip("/") or url.query:
            raise ConfigError(f"expected http://HOST:PORT or https://HOST:PORT, got {self.address!r}", key="address")

    def render(self, submission: Submission) -> dict[str, str]:
        """config.yaml, the request, and a list of what is in the package."""
        if submission.grace_s >= self.grace_s:
            message = (
                f"workers may take {submission.grace_s:g} s for a checkpoint, and Ray kills a job {self.grace_s:g} s after `gentrain stop`"
            )
            raise ConfigError(f"{message}; lower it, or raise cluster.submit.grace_s", key="cluster.grace_s")
        files = self._files(submission)
        listing = "".join(f"{hashlib.sha256(data).hexdigest()}  {len(data):>10}  {name}\n" for name, data in sorted(files.items()))
        request = {"address": self.address, **self._request(submission, "the files of package.txt, zipped")}
        return {"config.yaml": files["config.yaml"].decode(), "job.json": json.dumps(request, indent=1), "package.txt": listing}

    def expected(self, submission: Submission) -> Handle:
        return {"id": f"{submission.name}-{secrets.token_hex(4)}"}

    def submit(self, submission: Submission, handle: Handle) -> Handle:
        with tempfile.TemporaryDirectory() as folder, self._client() as client:
            self._refuse_other_ray(client)
            package = Path(folder, "package.zip")
            package.write_bytes(zipped(self._files(submission)))
            self._warn_of_risks()
            request, until = self._request(submission, str(package)), time.monotonic() + _START_S
            while True:
                try:
                    client.submit_job(submission_id=handle["id"], **request)
                    return handle
                except RuntimeError as error:  # of a head that has begun to answer before it can start a job
                    if "No available agent" not in str(error) or time.monotonic() > until:
                        raise
                time.sleep(0.5)

    def status(self, handle: Handle) -> State:
        with self._client() as client:
            try:
                job = client.get_job_info(handle["id"])
            except RuntimeError as error:
                if _code(error) == 404:
                    return State.LOST
                raise
        if job.driver_exit_code == STOPPED:
            return State.STOPPED
        return _STATES.get(job.status.value, State.FAILED)

    def logs(self, handle: Handle, follow: bool) -> Iterator[str]:
        """Follows through lost connections, for `_AWAY_S` without a new line: what has been told already is not told again."""
        told, lost = 0, 0.0
        while True:
            number = 0
            try:
                if lost:
                    follow = not self._ended(handle)
                for line in self._tail(handle["id"]) if follow else self._so_far(handle["id"]):
                    number += 1
                    if number > told:
                        yield line
                return
            except (_Disconnected, _Away) as error:
                if isinstance(error, _Away) and not lost:
                    raise
                if not lost or number > told:
                    lost = time.monotonic()
                    log.warning("the connection to %s is lost; it is tried for %g s", self.address, _AWAY_S)
                if time.monotonic() - lost > _AWAY_S:
                    raise PlaceError(f"{self.address} has told nothing new for {_AWAY_S:g} s; follow again later") from error
                told = max(told, number)
            time.sleep(_POLL_S)

    def _ended(self, handle: Handle) -> bool:
        if (state := self.status(handle)) is State.LOST:
            raise PlaceError(f"the Ray cluster at {self.address} does not know this job any more; its head has been restarted since")
        return state.is_over

    def stop(self, handle: Handle) -> None:
        if not self.status(handle).is_over:
            with self._client() as client:
                client.stop_job(handle["id"])

    def _request(self, submission: Submission, package: str) -> dict[str, Any]:
        """What the job server is asked for."""
        grace = {"RAY_JOB_STOP_WAIT_TIME_S": str(int(self.grace_s))}  # Ray's own is 3 s: too short for a checkpoint
        variables = {**grace, **stamp(), **self.environment}
        runtime = {"working_dir": package, "env_vars": variables}
        # `exec`: the signal of `stop` must reach the command, not a shell above it.
        entrypoint = "exec " + shlex.join([self.python, "-m", "gentrain.cli", *submission.command[1:]])
        return {
            "entrypoint": entrypoint, "runtime_env": runtime, "metadata": {"run": submission.name, "output": submission.output},
            "entrypoint_num_cpus": self.cpus, "entrypoint_num_gpus": self.gpus,
        }  # fmt: skip

    def _files(self, submission: Submission) -> dict[str, bytes]:
        """What is in the job's directory."""
        config, plugins = _with_plugins(submission.config)
        # Unpacked: Ray would let pip install the wheel on each node with all that it depends on.
        wheel = _unpacked(self.wheel) if self.wheel is not None else {}
        named = {**wheel, **plugins, "config.yaml": config.encode()}
        directory = Path(self.working_directory).resolve() if self.working_directory is not None else None
        if directory is not None and not directory.is_dir():
            raise ConfigError(f"{directory} is no directory; correct the path", key="cluster.submit.working_directory")
        return contents(named, directory, self.ignore, self.size_limit_mib)

    @contextmanager
    def _client(self) -> Iterator[Any]:
        """Ray's client of the job server; what it raises comes out as PlaceError."""
        os.environ.setdefault("RAY_AUTH_MODE", "token")
        import requests
        from ray.exceptions import AuthenticationError
        from ray.job_submission import JobSubmissionClient

        for module in ("dashboard_sdk", "job.sdk"):  # they tell of every step
            logging.getLogger(f"ray.dashboard.modules.{module}").setLevel(logging.ERROR)
        # These would silently take the place of the address given.
        aside = {name: os.environ.pop(name) for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS") if name in os.environ}
        try:
            try:
                client = JobSubmissionClient(self.address)
            finally:
                os.environ.update(aside)
            yield client
        except AuthenticationError as error:
            missing = "couldn't find an authentication token" in str(error)
            what = "there is no token for" if missing else "this token is refused by"
            raise PlaceError(
                f"{what} the Ray cluster at {self.address}; set RAY_AUTH_TOKEN, or RAY_AUTH_TOKEN_PATH, to the one that it was started with"
            ) from error
        except (ConnectionError, requests.exceptions.RequestException) as error:
            raise _Away(f"no Ray cluster answers at {self.address}; start it, or correct cluster.submit.address") from error
        except RuntimeError as error:  # of whatever Ray's client does not want to say otherwise
            if isinstance(error, PlaceError):
                raise
            kind = _Away if _code(error) >= 500 else PlaceError
            raise kind(f"the Ray cluster at {self.address}: {short(str(error))}") from error

    def _refuse_other_ray(self, client: Any) -> None:
        """Of gentrain and Python there the job itself tells."""
        there, here = client._server_ray_version, version("ray")  # what the client asked for when it was made
        if there != here:
            raise PlaceError(f"the cluster at {self.address} runs Ray {there}, and here is Ray {here}; install the same on one of them")

    def _warn_of_risks(self) -> None:
        import requests

        if requests.get(f"{self.address}/api/jobs/", timeout=30, allow_redirects=False).ok:
            log.warning("the Ray cluster at %s asks for no token: whoever reaches it can run code there", self.address)
        url = urlsplit(self.address)
        if url.scheme == "http" and url.hostname not in _LOOPBACK:
            log.warning("%s is not encrypted: who listens reads the token. Use https, or an ssh tunnel to 127.0.0.1", self.address)

    def _so_far(self, identity: str) -> Iterator[str]:
        with self._client() as client:
            text = client.get_job_logs(identity)
        yield from text.removesuffix("\n").split("\n") if text else ()  # as `_tail` counts them

    def _tail(self, identity: str) -> Iterator[str]:
        """Lines as they come. Raises _Disconnected."""
        loop = asyncio.new_event_loop()
        try:
            with self._client() as client:
                chunks, begun = client.tail_job_logs(identity), ""
                while (chunk := _next(loop, chunks)) is not None:
                    *lines, begun = (begun + chunk).split("\n")
                    yield from lines
                if begun:
                    yield begun
        finally:
            loop.run_until_complete(loop.shutdown_asyncgens())
            loop.close()


class _Disconnected(Exception):
    """The stream of a job's log broke off."""


class _Away(PlaceError):
    """Nobody answers, or only that it cannot answer now."""


def _next(loop: asyncio.AbstractEventLoop, chunks: AsyncIterator[str]) -> str | None:
    """None at the end. Raises _Disconnected."""
    import aiohttp

    try:
        return loop.run_until_complete(anext(chunks, None))
    except (aiohttp.ClientError, RuntimeError) as error:
        raise _Disconnected from error


def _code(error: Exception) -> int:
    """The status with which the job server has answered, if that is what an error of Ray's client says; else 0."""
    told = re.match(r"Request failed with status code (\d+)", str(error))  # what follows it may hold any number
    return int(told.group(1)) if told else 0


def _unpacked(path: str) -> dict[str, bytes]:
    """What is in a wheel of pure Python. The job's current directory goes before what is installed."""
    wheel = Path(path).resolve()
    if not wheel.name.endswith("-none-any.whl") or not zipfile.is_zipfile(wheel):
        raise ConfigError(f"{wheel} is no wheel of pure Python; name a file *-none-any.whl", key="cluster.submit.wheel")
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist() if not name.endswith("/")}


def _with_plugins(config: str) -> tuple[str, dict[str, bytes]]:
    """The configuration with its plugins named relative to it, and those files."""
    files: dict[str, bytes] = {}

    def moved(plugin: str) -> str:
        if not plugin.endswith(".py"):
            return plugin
        digest = hashlib.sha256(plugin.encode()).hexdigest()[:8]  # two files may have the same name
        name = f"plugins/{digest}_{re.sub(r'[^A-Za-z0-9_.]', '_', Path(plugin).name)}"
        files[name] = Path(plugin).read_bytes()
        return name

    values = yaml.safe_load(config)
    for part in [values, *(stage.get("run") for stage in values.get("stages", {}).values())]:
        if isinstance(part, dict) and part.get("plugins"):
            part["plugins"] = [moved(plugin) for plugin in part["plugins"]]
    return (yaml.safe_dump(values, sort_keys=False, allow_unicode=True) if files else config), files
