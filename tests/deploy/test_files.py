"""What lies in docker/ keeps its promises: no root, pinned versions, time enough to save, one volume for all nodes."""

import re
import shutil
import subprocess

import pytest
import yaml

from tests.training.jobs import ROOT, compose_config

DOCKERFILES = sorted(ROOT.glob("docker/*.Dockerfile"))
PINNED = re.compile(r"docker\.io/[\w/]+:\d+\.\d+\.\d+-[\w.-]+@sha256:[0-9a-f]{64}")
RANKS_SECONDS = "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"


def instructions(path):
    """(instruction, rest) by line, continued lines joined, comments left out."""
    text = re.sub(r"^\s*#.*\n", "", path.read_text(), flags=re.MULTILINE)
    lines = re.sub(r"\\\n\s*", " ", text).splitlines()
    return [tuple(line.split(maxsplit=1)) for line in lines if line.strip()]


def apt_packages(rest):
    """What a RUN instruction installs from Debian."""
    found = re.search(r"apt-get install (.*?) &&", rest)
    return [word for word in found.group(1).split() if not word.startswith("-")] if found else []


def read_yaml(name):
    return list(yaml.safe_load_all((ROOT / "docker" / name).read_text()))


def seconds(text):
    assert re.fullmatch(r"\d+s", text)
    return int(text[:-1])


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_an_image_is_pinned_runs_without_root_and_has_a_first_process_that_hands_signals_on(path):
    lines = instructions(path)
    stages = [rest.split(" AS ") for kind, rest in lines if kind == "FROM"]
    names = [name for _, name in stages]
    for source, _ in stages:
        assert source in names or PINNED.fullmatch(source), source
    last = lines[max(number for number, (kind, _) in enumerate(lines) if kind == "FROM") :]
    assert [rest for kind, rest in last if kind == "USER"] == ["1000:1000"]
    assert ("ENTRYPOINT", '["tini", "--"]') in last
    assert {"HEALTHCHECK", "STOPSIGNAL", "VOLUME"} <= {kind for kind, _ in last}
    packages = [word for kind, rest in lines for word in apt_packages(rest) if kind == "RUN"]
    assert packages
    assert all(re.fullmatch(r"[\w.+-]+=\S+", package) for package in packages), packages
    installs = [rest for kind, rest in lines if kind == "RUN" and "pip install" in rest]
    assert installs
    assert all("-c constraints.txt" in rest for rest in installs)
    assert not any(kind in ("ADD", "COPY") and rest.startswith(". .") for kind, rest in last)


def test_the_gpu_image_can_compile_at_run_time_and_the_cpu_image_has_no_compiler():
    installed = {
        path.stem: {package.split("=")[0] for _, rest in instructions(path) for package in apt_packages(rest)}
        for path in DOCKERFILES
    }
    assert {"gcc", "g++"} <= installed["gpu"]  # g++ brings the C library's headers
    assert not {"gcc", "g++"} & installed["cpu"]


def test_nothing_goes_into_a_build_but_what_is_named():
    lines = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    assert lines[0] == "*"
    for path in DOCKERFILES:
        for kind, rest in instructions(path):
            if kind == "COPY" and "--from" not in rest and "--chown" not in rest:
                for source in rest.split()[:-1]:
                    assert (ROOT / source).exists()
                    assert f"!{source.split('/')[0]}" in lines


def test_compose_has_two_nodes_that_share_a_volume_and_have_time_to_save():
    [compose] = read_yaml("compose.yaml")
    nodes = compose["services"]
    assert list(nodes) == ["node0", "node1"]
    for name, node in nodes.items():
        assert node["hostname"] == name
        assert node["restart"] == "on-failure"
        assert node["volumes"] == ["outputs:/app/outputs"]
        assert seconds(node["stop_grace_period"]) > int(node["environment"][RANKS_SECONDS])
        assert node["environment"]["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] == "1"
        assert "--nnodes=2" in node["command"]
        assert "--rdzv-endpoint=node0:29400" in node["command"]
        check_overrides(node["command"])
    assert "outputs" in compose["volumes"]


def test_the_gpu_overlay_gives_each_node_a_gpu_of_its_own():
    [compose] = read_yaml("compose.gpu.yaml")
    devices = [node["deploy"]["resources"]["reservations"]["devices"][0] for node in compose["services"].values()]
    assert [device["device_ids"] for device in devices] == [["0"], ["1"]]
    assert all(device["capabilities"] == ["gpu"] for device in devices)


def test_the_kubernetes_job_is_elastic_shares_a_volume_and_has_time_to_save():
    claim, job = read_yaml("cluster/kubernetes.yaml")
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    assert (job["apiVersion"], job["kind"]) == ("kubeflow.org/v1", "PyTorchJob")
    worker, policy = job["spec"]["pytorchReplicaSpecs"]["Worker"], job["spec"]["elasticPolicy"]
    assert policy["minReplicas"] <= worker["replicas"] <= policy["maxReplicas"]
    assert worker["restartPolicy"] == "OnFailure"
    pod = worker["template"]["spec"]
    [container] = pod["containers"]
    assert container["name"] == "pytorch"
    environment = {variable["name"]: variable["value"] for variable in container["env"]}
    assert pod["terminationGracePeriodSeconds"] > int(environment[RANKS_SECONDS])
    assert environment["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] == "1"
    assert pod["securityContext"]["runAsNonRoot"]
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    assert {mount["name"] for mount in container["volumeMounts"]} == set(volumes)
    assert volumes["outputs"]["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
    check_overrides(container["args"])


def test_no_pod_gets_a_token_of_the_cluster():
    _, job = read_yaml("cluster/kubernetes.yaml")
    pods = [replica["template"]["spec"] for replica in job["spec"]["pytorchReplicaSpecs"].values()]
    assert [pod["automountServiceAccountToken"] for pod in pods] == [False]


def check_overrides(command):
    """That train.py would take what stands behind it, and that the run has a name to be found by."""
    overrides = command[command.index("train.py") + 1 :]
    assert compose_config(*(re.sub(r"\$\{RUN:-(\w+)\}", r"\1", override) for override in overrides)).run is not None


def test_what_the_gpu_image_compiles_at_run_time_may_be_loaded_where_it_is_written():
    # The file system is read-only, and Docker mounts a tmpfs so that nothing in it can be executed unless told so.
    [environment] = [rest for kind, rest in instructions(ROOT / "docker/gpu.Dockerfile") if "TRITON_CACHE_DIR" in rest]
    caches = re.findall(r"_CACHE_DIR=(\S+)", environment)
    assert len(caches) == 2
    [compose] = read_yaml("compose.yaml")
    for node in compose["services"].values():
        mounts = {path: options.split(",") for path, _, options in (entry.partition(":") for entry in node["tmpfs"])}
        for cache in caches:
            [options] = [options for path, options in mounts.items() if cache.startswith(f"{path}/")]
            assert "exec" in options


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
@pytest.mark.parametrize("name", ["docker/cluster/slurm.sbatch"])
def test_shell_scripts_are_sound(name):
    done = subprocess.run(["shellcheck", name], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout
