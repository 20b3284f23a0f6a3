"""docker/: what the images promise, as far as their text shows it. `make gates-containers` carries the instructions out."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

DOCKER = Path(__file__).resolve().parents[1] / "docker"
DOCKERFILES = ["Dockerfile.cpu", "Dockerfile.cuda"]


def _instructions(name: str) -> list[tuple[str, str]]:
    lines = [line for line in (DOCKER / name).read_text().splitlines() if line.strip() and not line.lstrip().startswith("#")]
    return [(word, rest) for word, _, rest in (line.partition(" ") for line in "\n".join(lines).replace("\\\n", " ").splitlines())]


def _slimming(name: str) -> str:
    (found,) = [rest for word, rest in _instructions(name) if word == "RUN" and rest.startswith("find /venv")]
    return found


@pytest.mark.parametrize("name", DOCKERFILES)
def test_an_image_is_pinned_small_and_has_no_rights(name: str) -> None:
    instructions = _instructions(name)
    bases = [rest.split()[0] for word, rest in instructions if word == "FROM"]
    assert len(bases) > 1 and all(re.search(r":\d+\.\d+\.\d+-", base) for base in bases)  # several stages, each of a version
    installs = [rest for word, rest in instructions if word == "RUN" and "pip install" in rest]
    assert installs and all("-c constraints.txt" in each for install in installs for each in install.split("pip install")[1:])
    last = max(number for number, (word, _) in enumerate(instructions) if word == "FROM")
    final = dict(instructions[last:])
    assert final["USER"] == "1000:1000" and not [rest for word, rest in instructions[last:] if word == "RUN" and "pip" in rest]
    assert final["HEALTHCHECK"].startswith("--interval=1m ") and final["HEALTHCHECK"].endswith('CMD ["gentrain", "doctor"]')
    assert final["ENTRYPOINT"] == '["tini", "--", "gentrain"]'
    assert _slimming(name) == _slimming(DOCKERFILES[0])


def test_the_cuda_image_has_deepspeeds_operators_built() -> None:
    built = [rest for word, rest in _instructions("Dockerfile.cuda") if word == "ENV" and "DS_BUILD" in rest]
    assert built and all(word in built[0] for word in ("DS_BUILD_FUSED_ADAM=1", "DS_BUILD_CPU_ADAM=1", "TORCH_CUDA_ARCH_LIST="))


def test_what_is_taken_out_of_the_environment_is_what_nothing_imports(tmp_path: Path) -> None:
    packages = tmp_path / "venv/lib/python3.11/site-packages"
    kept = ["torch/testing/__init__.py", "torch/test.py", "sympy/testing/runtests.py", "torch/bin/protoc", "ray/jars.py", "numpy/tests.py"]
    gone = ["numpy/tests/test_a.py", "numpy/ma/tests/__init__.py", "torch/test/test_api", "torch/bin/test_api", "ray/jars/ray_dist.jar"]
    for name in [*kept, *gone]:
        (packages / name).parent.mkdir(parents=True, exist_ok=True)
        (packages / name).touch()
    subprocess.run(["sh", "-c", _slimming("Dockerfile.cpu").replace("/venv", str(tmp_path / "venv"))], check=True)
    assert sorted(str(path.relative_to(packages)) for path in packages.rglob("*") if path.is_file()) == sorted(kept)


def test_a_cluster_of_containers_asks_for_a_token_and_is_reached_from_here_only() -> None:
    text = (DOCKER / "compose.yaml").read_text()
    assert "0.0.0.0" not in text
    composed = yaml.safe_load(text)
    head, worker = (composed["services"][name] for name in ("head", "worker"))
    assert worker["deploy"]["replicas"] == 2 and worker["depends_on"] == {"head": {"condition": "service_healthy"}}
    assert head["ports"] == ["127.0.0.1:8265:8265"] and "ports" not in worker
    assert composed["secrets"] == {"ray_token": {"environment": "RAY_AUTH_TOKEN"}}
    for node in (head, worker):
        environment: dict[str, Any] = node["environment"]
        assert environment["RAY_AUTH_MODE"] == "token" and environment["RAY_AUTH_TOKEN_PATH"] == "/run/secrets/ray_token"
        assert node["secrets"] == ["ray_token"] and "RAY_AUTH_TOKEN" not in environment  # named, not written
        assert node["cap_drop"] == ["ALL"] and node["security_opt"] == ["no-new-privileges:true"]
        assert node["mem_limit"] == "8g" and node["cpus"] == 2 and node["shm_size"] == "2g"
        check = node["healthcheck"]
        # `up --wait` waits for the first one. Neither imports what takes longer than the check itself.
        assert check["test"][:3] == ["CMD", "python", "-c"] and check["interval"] == "5s"
        compile(check["test"][3], "healthcheck", "exec")
