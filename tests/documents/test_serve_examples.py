"""Laws of examples/serve: files are valid, and fit the server's options, routes and drain."""

import json
import re
import tomllib

import kubernetes_validate
import pytest
import yaml

from mistral_jax.cli import serve
from mistral_jax.config import CHECKOUT
from mistral_jax.serving.app import PUBLIC

FOLDER = CHECKOUT / "examples" / "serve"


def resources():
    text = (FOLDER / "kubernetes.yaml").read_text()
    return {found["kind"]: found for found in yaml.safe_load_all(text)}


def container():
    (found,) = resources()["Deployment"]["spec"]["template"]["spec"]["containers"]
    return found


def dockerfile():
    """Returns the instructions of the Dockerfile, without comments and continuations."""
    text = (FOLDER / "Dockerfile").read_text().replace("\\\n", " ")
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    return [tuple(line.split(maxsplit=1)) for line in lines]


@pytest.mark.parametrize("kind", ["Deployment", "Service"])
@pytest.mark.parametrize("version", ["1.33", kubernetes_validate.latest_version()])
def test_kubernetes_knows_every_field(kind, version):
    kubernetes_validate.validate(resources()[kind], version, strict=True)


def test_the_server_knows_its_options_and_probes():
    arguments = serve.parser().parse_args(container()["args"])
    assert arguments.api_keys
    assert arguments.port == container()["ports"][0]["containerPort"]
    probes = {name: value for name, value in container().items() if name.endswith("Probe")}
    assert probes.keys() == {"startupProbe", "readinessProbe", "livenessProbe"}
    for probe in probes.values():
        assert probe["httpGet"]["path"] in PUBLIC  # probes have no key
    assert probes["readinessProbe"]["httpGet"]["path"] == "/health"
    # A server that loads or drains is alive.
    assert probes["livenessProbe"]["httpGet"]["path"] == "/v1/models"


def test_a_pod_has_time_to_drain():
    spec = resources()["Deployment"]["spec"]["template"]["spec"]
    arguments = serve.parser().parse_args(container()["args"])
    sleep = int(container()["lifecycle"]["preStop"]["exec"]["command"][1])
    assert spec["terminationGracePeriodSeconds"] > sleep + arguments.drain_seconds


def test_the_service_finds_the_pods():
    labels = resources()["Deployment"]["spec"]["template"]["metadata"]["labels"]
    assert resources()["Service"]["spec"]["selector"].items() <= labels.items()


def test_the_image_starts_the_server_as_a_user_and_without_a_shell():
    instructions = dockerfile()
    values = dict(instructions)
    entry = json.loads(values["ENTRYPOINT"])
    assert entry[:3] == ["python", "-m", "mistral_jax.serve"]
    arguments = serve.parser().parse_args(entry[3:])
    assert arguments.host == "0.0.0.0"
    assert str(arguments.port) == values["EXPOSE"]
    assert values["USER"] != "root"
    user = [name for name, _ in instructions].index("USER")
    assert all(name != "RUN" for name, _ in instructions[user:])
    probe = json.loads(values["HEALTHCHECK"].partition("CMD")[2])
    assert re.search(r":(\d+)(/\w+)", probe[-1]).groups() == (values["EXPOSE"], "/health")
    (extras,) = re.findall(r"\.\[([\w,-]+)\]", (FOLDER / "Dockerfile").read_text())
    project = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["project"]
    assert set(extras.split(",")) <= project["optional-dependencies"].keys()
