"""Laws of examples/: every file passes its own validator, and says what our commands understand."""

import copy
import importlib.util
import json
import math
import os
import re
import shlex
import socket
import subprocess
import sys
import sysconfig
import types
from pathlib import Path

import kubernetes_validate
import pytest
import yaml
from jax._src.clusters.k8s_cluster import K8sCluster
from kubeflow_trainer_api.models import JobsetV1alpha2JobSet
from snippets.rules import PARSERS

EXAMPLES = Path(__file__).parents[2] / "examples"
FILES = ("slurm.sbatch", "kubernetes.yaml", "tpu_pod.sh", "skypilot.yaml", "README.md")


def read(name):
    return (EXAMPLES / name).read_text()


def sky_task():
    return yaml.safe_load(read("skypilot.yaml"))


def resources():
    return {found["kind"]: found for found in yaml.safe_load_all(read("kubernetes.yaml"))}


def job():
    """Returns the one Job that JobSet's controller makes of our JobSet."""
    jobset = resources()["JobSet"]
    (replicated,) = jobset["spec"]["replicatedJobs"]
    name = f"{jobset['metadata']['name']}-{replicated['name']}-0"
    labels = {"jobset.sigs.k8s.io/jobset-name": jobset["metadata"]["name"]}
    head = {"apiVersion": "batch/v1", "kind": "Job"}
    return head | {"metadata": {"name": name, "labels": labels}} | replicated["template"]


def pod_spec():
    return job()["spec"]["template"]["spec"]


def scripts():
    """Returns all shell that the examples hold, by place."""
    found = {
        "slurm.sbatch": read("slurm.sbatch"),
        "tpu_pod.sh": read("tpu_pod.sh"),
        "skypilot.yaml, setup": "#!/bin/bash\n" + sky_task()["setup"],
        "skypilot.yaml, run": "#!/bin/bash\n" + sky_task()["run"],
        "kubernetes.yaml": "#!/bin/bash\n" + pod_spec()["containers"][0]["args"][0],
    }
    for text in re.findall(r"```bash\n(.*?)```", read("README.md"), re.DOTALL):
        found["README.md"] = "#!/bin/bash\n" + text
    return found


def devices():
    """Returns how many devices each file asks for."""
    text = read("README.md")
    local = [int(re.search(rf"{name}=(\d+)", text)[1]) for name in ("PROCESSES", "CPU_DEVICES")]
    slurm = directives()
    limits = pod_spec()["containers"][0]["resources"]["limits"]
    accelerators = sky_task()["resources"]["accelerators"]
    return {
        "slurm.sbatch": int(slurm["nodes"]) * int(slurm["gpus-per-node"]),
        "kubernetes.yaml": job()["spec"]["parallelism"] * limits["nvidia.com/gpu"],
        "tpu_pod.sh": int(re.search(r"TYPE=v5litepod-(\d+)", read("tpu_pod.sh"))[1]),
        "skypilot.yaml": sky_task()["num_nodes"] * int(accelerators.split(":")[1]),
        "README.md": math.prod(local),
    }


def parse(words):
    """Parses the words that follow `python -m`."""
    return words[0], PARSERS[words[0]]().parse_args(words[1:])


def commands(name):
    """Returns our commands in a file, those in comments too: modules and parsed arguments."""
    text = re.sub(r"(?m)^ *(# )?", "", read(name)).replace("\\\n", " ")
    found = []
    for line in re.findall(r"python -m (mistral_jax\..*)", text):
        words = shlex.shlex(line, posix=True, punctuation_chars=True)
        words.whitespace_split = True
        words = list(words)
        ends = [i for i, word in enumerate(words) if set(word) <= set("<>|&;")]
        found.append(parse(words[: min(ends, default=None)]))
    return found


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """Makes programs that only write down how they are called; returns the maker of one."""
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setenv("HOME", str(tmp_path))
    report = "import json, os, sys; print(json.dumps([dict(os.environ), sys.argv[1:]]))"

    def make(name):
        log = tmp_path / f"{Path(name).name}.log"
        program = tmp_path / name
        program.parent.mkdir(parents=True, exist_ok=True)
        program.write_text(
            f'#!/bin/bash\n{sys.executable} -S -c {shlex.quote(report)} "$@" >> {log}\n'
        )
        program.chmod(0o755)
        return lambda: [json.loads(line) for line in log.read_text().splitlines()]

    return make


def run(script, *arguments, **environment):
    subprocess.run(
        ["bash", "-eu", script, *arguments],
        env=os.environ | environment,
        check=True,
        capture_output=True,
    )


# What our commands understand.


@pytest.mark.parametrize("name", FILES)
def test_our_parsers_know_every_command(name):
    other = "convert" if name == "README.md" else "train"
    assert {module for module, _ in commands(name)} == {
        "mistral_jax.sample",
        f"mistral_jax.{other}",
    }


def test_every_layout_fits_the_model_and_the_devices():
    """Read as the commands read it, with as many devices as the file asks for."""
    asked = [
        (arguments.sharding, arguments.mesh, devices()[name], model)
        for name in FILES
        for module, arguments in commands(name)
        for model in (["nano"] if name == "README.md" else ["mistral-7b-v0.1", "mistral-7b-v0.3"])
        if module != "mistral_jax.convert"
    ]
    program = """if True:
        import json, sys, jax
        from mistral_jax.config import ModelConfig
        from mistral_jax.parallel.sharding import read_layout
        for name, mesh, count, model in json.loads(sys.argv[1]):
            config = ModelConfig.from_name(model)
            layout = read_layout(name, config, jax.devices()[:count], mesh=mesh)
            print(layout.mesh.devices.size)
    """
    result = subprocess.run(
        [sys.executable, "-c", program, json.dumps(asked)],
        env=os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "16"},
        capture_output=True,
        text=True,
    )
    assert result.stderr == ""
    assert [int(size) for size in result.stdout.split()] == [count for _, _, count, _ in asked]


# Shell.


@pytest.mark.parametrize("place", scripts())
def test_shellcheck_finds_nothing(place):
    checker = Path(sysconfig.get_path("scripts")) / "shellcheck"
    for check in (["bash", "-n"], [checker, "--shell=bash", "-"]):
        result = subprocess.run(check, input=scripts()[place], capture_output=True, text=True)
        assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


# SLURM.

# Of the options that `man sbatch` lists, those that a job like ours may use.
SBATCH_OPTIONS = {
    *("account", "array", "chdir", "comment", "constraint", "cpus-per-gpu", "cpus-per-task"),
    *("deadline", "dependency", "error", "exclude", "exclusive", "export", "gpus", "gpus-per-node"),
    *("gres", "hint", "job-name", "licenses", "mail-type", "mail-user", "mem", "mem-per-cpu"),
    *("mem-per-gpu", "no-requeue", "nodelist", "nodes", "ntasks", "ntasks-per-node", "open-mode"),
    *("output", "partition", "qos", "requeue", "reservation", "signal", "switches", "time"),
}


def directives():
    found = {}
    for line in read("slurm.sbatch").splitlines():
        if line and not line.startswith("#"):
            break  # Here SLURM stops reading, too.
        if line.startswith("#SBATCH"):
            name, value = re.fullmatch(r"#SBATCH --([a-z-]+)(?:=(\S+))?", line).groups()
            found[name] = value
    return found


def test_every_directive_is_an_option_of_sbatch():
    assert len(directives()) == read("slurm.sbatch").count("#SBATCH")
    assert set(directives()) <= SBATCH_OPTIONS


def test_slurm_starts_one_task_a_gpu(stand_in, tmp_path):
    """JAX gives a task the GPU of its number on the node, out of all that it sees."""
    assert directives()["ntasks-per-node"] == directives()["gpus-per-node"]
    calls = stand_in("srun")
    stand_in("mistral/venv/bin/activate")
    run(EXAMPLES / "slurm.sbatch", SLURM_CPUS_PER_TASK="8")
    [(_, words)] = calls()
    first = words.index("python")
    assert "--gpu-bind=none" in words[:first]
    assert "--cpus-per-task=8" in words[:first]
    module, arguments = parse(words[first + 2 :])
    assert module == "mistral_jax.sample"
    assert arguments.checkpoint.startswith(str(tmp_path))


# Kubernetes.


@pytest.mark.parametrize("version", ["1.33", kubernetes_validate.latest_version()])
@pytest.mark.parametrize("kind", ["ServiceAccount", "Role", "RoleBinding", "Job"])
def test_kubernetes_knows_every_field(kind, version):
    kubernetes_validate.validate((resources() | {"Job": job()})[kind], version, strict=True)


def test_jobset_knows_every_field():
    """Its model drops what it does not know."""
    jobset = resources()["JobSet"]
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    assert JobsetV1alpha2JobSet.from_dict(copy.deepcopy(jobset)).to_dict() == jobset
    jobset["spec"]["restarts"] = 3
    assert JobsetV1alpha2JobSet.from_dict(copy.deepcopy(jobset)).to_dict() != jobset


def test_names_in_the_manifest_lead_somewhere():
    found = resources()
    account = found["ServiceAccount"]["metadata"]["name"]
    assert pod_spec()["serviceAccountName"] == account
    assert found["RoleBinding"]["subjects"] == [{"kind": "ServiceAccount", "name": account}]
    assert found["RoleBinding"]["roleRef"]["name"] == found["Role"]["metadata"]["name"]
    (container,) = pod_spec()["containers"]
    mounted = [mount["name"] for mount in container["volumeMounts"]]
    assert sorted(mounted) == sorted(volume["name"] for volume in pod_spec()["volumes"])


class Api:
    """Answers JAX as Kubernetes would; notes each question as a rule of a role names it."""

    asked: set

    def __init__(self, group):
        self._group = group

    def list_namespaced_pod(self, namespace, field_selector):
        self.asked.add((self._group, "pods", "list"))
        owner = types.SimpleNamespace(controller=True, kind="Job")
        labels = {"job-name": job()["metadata"]["name"]}
        metadata = types.SimpleNamespace(labels=labels, owner_references=[owner])
        return types.SimpleNamespace(items=[types.SimpleNamespace(metadata=metadata)])

    def read_namespaced_job(self, name, namespace):
        self.asked.add((self._group, "jobs", "get"))
        assert name == job()["metadata"]["name"]
        metadata = types.SimpleNamespace(**job()["metadata"])
        spec = types.SimpleNamespace(parallelism=job()["spec"]["parallelism"])
        return types.SimpleNamespace(metadata=metadata, spec=spec)


def test_jax_finds_the_processes_with_exactly_the_role(monkeypatch):
    monkeypatch.setattr(Api, "asked", set(), raising=False)
    client = types.SimpleNamespace(
        CoreV1Api=lambda: Api(""),
        BatchV1Api=lambda: Api("batch"),
        exceptions=types.SimpleNamespace(ApiException=RuntimeError),
    )
    package = types.ModuleType("kubernetes")
    package.client = client
    package.config = types.SimpleNamespace(load_incluster_config=lambda: None)
    monkeypatch.setitem(sys.modules, "kubernetes", package)
    for name in ("_core_api", "_batch_api", "_ApiException"):
        monkeypatch.setattr(K8sCluster, name, None, raising=False)
    monkeypatch.setattr(K8sCluster, "_namespace", lambda: "default")
    monkeypatch.setattr(socket, "gethostbyname", lambda host: "10.0.0.3")
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    monkeypatch.setenv("HOSTNAME", "mistral-hosts-0-1")
    monkeypatch.setenv("JOB_COMPLETION_INDEX", "1")
    try:
        assert K8sCluster.is_env_present()
        address = K8sCluster.get_coordinator_address(None, None)
        count = K8sCluster.get_process_count()
    finally:
        for name in ("_pod", "_job", "_controller", "_headless_svc"):
            vars(K8sCluster)[name].__func__.cache_clear()
    assert address.split(":")[0] == "mistral-hosts-0-0.mistral"
    assert count == job()["spec"]["completions"]
    assert resources()["JobSet"]["spec"]["replicatedJobs"][0]["replicas"] == 1
    assert job()["spec"]["completionMode"] == "Indexed"
    assert K8sCluster.get_process_id() == 1
    allowed = {
        (group, resource, verb)
        for rule in resources()["Role"]["rules"]
        for group in rule["apiGroups"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
    }
    assert allowed == Api.asked


# Cloud TPU.


def test_gcloud_reaches_all_hosts(stand_in):
    stand_in("python3")
    calls = stand_in("gcloud")
    for step in ("create", "install", "run", "delete"):
        run(EXAMPLES / "tpu_pod.sh", step)
    words = [found for _, found in calls()]
    assert {tuple(found[:3]) for found in words} == {("compute", "tpus", "tpu-vm")}
    verbs = [found[3] for found in words]
    assert (verbs[:2], verbs[-2:]) == (["create", "scp"], ["ssh", "delete"])
    assert set(verbs[2:-1]) == {"ssh"}
    assert len({word for found in words for word in found if word.startswith("--zone=")}) == 1
    assert all("--worker=all" in found for found in words[1:-1])
    (command,) = [word for word in words[-2] if word.startswith("--command=")]
    assert parse(command.split()[2:])[0] == "mistral_jax.sample"


# SkyPilot.


def test_skypilot_tells_jax_who_it_is(stand_in, tmp_path):
    calls = stand_in("venv/bin/python")
    script = tmp_path / "run.sh"
    script.write_text(sky_task()["run"])
    nodes = {"SKYPILOT_NODE_IPS": "10.0.0.4\n10.0.0.7", "SKYPILOT_NUM_NODES": "2"}
    for rank in "01":
        run(script, **nodes, SKYPILOT_NODE_RANK=rank)
    for rank, (environment, words) in zip("01", calls(), strict=True):
        assert environment["JAX_COORDINATOR_ADDRESS"] == "10.0.0.4:8476"
        assert environment["JAX_NUM_PROCESSES"] == "2"
        assert environment["JAX_PROCESS_ID"] == rank
        assert parse(words[1:])[0] == "mistral_jax.sample"


def test_skypilot_knows_every_field(tmp_path):
    """By its documentation; by its own parser as well, where it is installed."""
    task = sky_task()
    known = {"name", "num_nodes", "resources", "workdir", "file_mounts", "envs", "setup", "run"}
    assert set(task) <= known
    assert set(task["resources"]) <= {"accelerators", "infra", "disk_size", "cpus", "memory"}
    for mount in task["file_mounts"].values():
        assert set(mount) == {"source", "mode"}
        assert mount["mode"] in ("MOUNT", "COPY", "MOUNT_CACHED")
    if importlib.util.find_spec("sky") is not None:
        program = "import sys, sky; print(sky.Task.from_yaml(sys.argv[1]).num_nodes)"
        result = subprocess.run(
            [sys.executable, "-c", program, EXAMPLES / "skypilot.yaml"],
            cwd=EXAMPLES.parent,
            env=os.environ | {"HOME": str(tmp_path)},  # It writes there.
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert result.stdout == "2\n", result.stderr
