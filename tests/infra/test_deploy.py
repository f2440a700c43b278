"""The image and the manifests, as far as they can be tried without Docker, Kubernetes and AWS.

They are read: every field is known, every name that is used is defined, every command exists with its options, and what
was promised of safety and of leaving in peace is in them. `kubectl kustomize` is run where there is one.
"""

import importlib.metadata
import json
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import click
import jsonschema
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from infra.cluster import CLUSTERS
from tests.commands import check_command, parse_ray
from tests.infra.kubernetes import KINDS

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "infra" / "deploy"
MANIFESTS = sorted((DEPLOY / "kubernetes").glob("*.yaml"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
LOCK = dict(line.split("==") for line in (ROOT / "requirements.lock").read_text().split("\n") if "==" in line[:60])
UNITS = {"": 1, "m": 1e-3, "Mi": 2**20, "Gi": 2**30}


def documents() -> list[dict]:
    return [document for path in MANIFESTS for document in yaml.safe_load_all(path.read_text())]


def of_kind(kind: str) -> list[dict]:
    return [document for document in documents() if document["kind"] == kind]


CLUSTER = of_kind("RayCluster")[0]
HEAD = CLUSTER["spec"]["headGroupSpec"]
GROUPS = {group["groupName"]: group for group in CLUSTER["spec"]["workerGroupSpecs"]}
PODS = {"head": HEAD["template"]["spec"]} | {name: group["template"]["spec"] for name, group in GROUPS.items()}
START = {"head": HEAD["rayStartParams"]} | {name: group["rayStartParams"] for name, group in GROUPS.items()}


def quantity(text: str | int) -> float:
    number, unit = re.fullmatch(r"([0-9.]+)(\w*)", str(text)).groups()
    return float(number) * UNITS[unit]


def leaves(value, path=()):
    """(path, value) of all that is no table and no list."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from leaves(inner, (*path, key))
    elif isinstance(value, list):
        for place, inner in enumerate(value):
            yield from leaves(inner, (*path, place))
    else:
        yield path, value


# Kubernetes


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.name)
def test_every_field_is_known(path):
    for document in yaml.safe_load_all(path.read_text()):
        faults = jsonschema.Draft202012Validator(KINDS[document["kind"]]).iter_errors(document)
        assert not [f"{fault.json_path}: {fault.message}" for fault in faults]


def test_a_wrong_field_is_refused():
    """The schema above is strict everywhere: a value of another kind is refused, wherever it stands."""
    accepts = jsonschema.Draft202012Validator(KINDS["RayCluster"]).is_valid
    assert accepts(CLUSTER)
    places = {tuple(str(key) for key in path if isinstance(key, str)): path for path, _ in leaves(CLUSTER)}
    for path in places.values():
        broken = json.loads(json.dumps(CLUSTER))
        place = broken
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = {"no": "such"}
        assert not accepts(broken), path


def test_the_kustomization_names_what_there_is():
    kustomization = of_kind("Kustomization")[0]
    there = {path.name for path in MANIFESTS} - {"kustomization.yaml", "rayjob.yaml"}  # a job is started by hand
    assert set(kustomization["resources"]) == there
    assert len(kustomization["resources"]) == len(there)
    assert [namespace["metadata"]["name"] for namespace in of_kind("Namespace")] == [kustomization["namespace"]]
    names = [(document["kind"], document["metadata"]["name"]) for document in documents() if "metadata" in document]
    assert len(set(names)) == len(names)


@pytest.mark.skipif(not shutil.which("kubectl"), reason="needs kubectl")
def test_kustomize_renders_them():
    done = subprocess.run(
        ["kubectl", "kustomize", str(DEPLOY / "kubernetes")], capture_output=True, text=True, timeout=30
    )
    assert done.returncode == 0, done.stderr
    rendered = {document["kind"]: document for document in yaml.safe_load_all(done.stdout)}
    assert rendered["RayCluster"]["spec"] == CLUSTER["spec"]
    assert rendered["RayCluster"]["metadata"]["namespace"] == "rescribe"


def test_what_is_referred_to_exists():
    accounts = {account["metadata"]["name"] for account in of_kind("ServiceAccount")}
    assert {pod["serviceAccountName"] for pod in PODS.values()} == accounts
    name = CLUSTER["metadata"]["name"]
    assert [job["spec"]["clusterSelector"]["ray.io/cluster"] for job in of_kind("RayJob")] == [name]
    for pod in PODS.values():
        volumes = [volume["name"] for volume in pod["volumes"]]
        assert len(set(volumes)) == len(volumes)
        for container in pod["containers"]:
            assert {mount["name"] for mount in container["volumeMounts"]} == set(volumes)
    (policy,) = of_kind("NetworkPolicy")
    assert policy["spec"]["podSelector"]["matchLabels"] == {"ray.io/cluster": name}


def test_every_command_exists_with_its_options():
    for pod in PODS.values():
        for container in pod["containers"]:
            for path, _ in list(leaves(container)):
                if path[-2:-1] == ("command",) and path[-1] == 0:
                    place = container
                    for key in path[:-1]:
                        place = place[key]
                    check_command(place)
    for job in of_kind("RayJob"):
        check_command(shlex.split(job["spec"]["entrypoint"]))
    for parameters in START.values():  # KubeRay makes options of them
        parse_ray(["start", *(f"--{name}={value}" for name, value in parameters.items())])
    for wrong in (["ray", "health-chek"], ["ray", "start", "--hed"], ["rescribe", "rum"]):
        with pytest.raises((click.UsageError, AssertionError)):
            check_command(wrong)
    with pytest.raises(click.UsageError):
        check_command(["ray", "drain-node", "--reason", "BAD", "--reason-message", ""])


def test_the_probes_ask_where_ray_answers_without_a_token():
    from ray._private.ray_constants import DEFAULT_DASHBOARD_AGENT_LISTEN_PORT
    from ray.dashboard.http_server_agent import PUBLIC_EXACT_PATHS

    for pod in PODS.values():
        for container in pod["containers"]:
            assert container["startupProbe"]["exec"]["command"] == ["ray", "health-check"]
            for name in ("readinessProbe", "livenessProbe"):
                asked = container[name]["httpGet"]
                assert asked["path"] in PUBLIC_EXACT_PATHS
                assert asked["port"] == DEFAULT_DASHBOARD_AGENT_LISTEN_PORT


@pytest.mark.parametrize("name", PODS)
def test_a_pod_has_no_more_rights_than_it_needs(name):
    pod = PODS[name]
    assert pod["securityContext"]["runAsNonRoot"]
    assert pod["securityContext"]["runAsUser"] > 0
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    for container in pod["containers"]:
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        assert {"/tmp", "/home/rescribe", "/dev/shm"} == {mount["mountPath"] for mount in container["volumeMounts"]}
    sidecar = CLUSTER["spec"]["autoscalerOptions"]["securityContext"]
    assert sidecar == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
    (namespace,) = of_kind("Namespace")
    assert namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"
    if name != "head":
        assert pod["automountServiceAccountToken"] is False


def test_the_token_is_on_and_nobody_else_is_let_in():
    assert CLUSTER["spec"]["authOptions"] == {"mode": "token"}
    assert HEAD["serviceType"] == "ClusterIP"
    (policy,) = of_kind("NetworkPolicy")
    assert policy["spec"]["policyTypes"] == ["Ingress"]
    inside, operator = policy["spec"]["ingress"]
    assert inside == {"from": [{"podSelector": policy["spec"]["podSelector"]}]}
    assert set(operator["from"][0]) == {"namespaceSelector", "podSelector"}  # both at once
    assert [port["port"] for port in operator["ports"]] == [8265]


def test_no_secret_is_written_down():
    for path in (*MANIFESTS, DEPLOY / "aws.yaml", DEPLOY / "Dockerfile"):
        text = path.read_text()
        assert not re.search(r"AKIA[0-9A-Z]{16}|aws_secret|AWS_SECRET|BEGIN .*PRIVATE KEY|RAY_AUTH_TOKEN\b", text), path
        assert "kind: Secret" not in text
    for pod in PODS.values():
        for container in pod["containers"]:
            for variable in container.get("env", []):
                if re.search("TOKEN|KEY|SECRET|PASSWORD", variable["name"]):
                    assert set(variable) == {"name", "valueFrom"}


@pytest.mark.parametrize("name", PODS)
def test_the_object_store_fits_the_pod(name):
    pod, (container,) = PODS[name], PODS[name]["containers"]
    (shared,) = [volume["emptyDir"] for volume in pod["volumes"] if volume["name"] == "shm"]
    store, size = quantity(START[name]["object-store-memory"]), quantity(shared["sizeLimit"])
    assert shared["medium"] == "Memory"
    assert store < size
    assert size <= quantity(container["resources"]["limits"]["memory"]) / 2  # it counts as the pod's memory
    assert container["resources"]["requests"] == container["resources"]["limits"]


def test_the_groups_hold_what_an_elastic_cluster_asks_for():
    elastic = CLUSTERS["elastic"]()
    limits = {name: pod["containers"][0]["resources"]["limits"] for name, pod in PODS.items()}
    cpus = {name: quantity(limit["cpu"]) for name, limit in limits.items()}
    gpus = {name: limit.get("nvidia.com/gpu", 0) for name, limit in limits.items()}
    assert gpus == {"head": 0, "gpu": elastic.gpus_per_worker, "decoding": 0}
    assert gpus["gpu"] >= elastic.gpus_per_actor
    assert cpus["gpu"] >= max(elastic.cpus_per_worker, elastic.cpus_per_actor)
    assert START["gpu"]["num-gpus"] == "1"
    assert START["decoding"]["num-gpus"] == "0"
    assert START["head"]["num-cpus"] == "0"
    assert CLUSTER["spec"]["enableInTreeAutoscaling"]
    for group in GROUPS.values():
        assert group["minReplicas"] == group["replicas"] == 0 < group["maxReplicas"]
    job = shlex.split(of_kind("RayJob")[0]["spec"]["entrypoint"])
    assert job[job.index("--cluster") + 1] == elastic.name
    assert job[job.index("--store") + 1].startswith("s3://")  # pods come and go: nothing of theirs is kept


def matches(labels: dict[str, str], pod: dict) -> bool:
    """Whether Kubernetes puts the pod on a machine of these labels: terms are alternatives, expressions all hold."""
    required = pod["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
    test = {
        "In": lambda one: labels.get(one["key"]) in one["values"],
        "NotIn": lambda one: labels.get(one["key"]) not in one["values"],
    }
    return any(
        all(test[one["operator"]](one) for one in term["matchExpressions"]) for term in required["nodeSelectorTerms"]
    )


@pytest.mark.parametrize(
    ("spot", "lasting"),
    [
        ({"eks.amazonaws.com/capacityType": "SPOT"}, {"eks.amazonaws.com/capacityType": "ON_DEMAND"}),
        ({"karpenter.sh/capacity-type": "spot"}, {"karpenter.sh/capacity-type": "on-demand"}),
        ({"cloud.google.com/gke-spot": "true"}, {}),
        ({"kubernetes.azure.com/scalesetpriority": "spot"}, {}),
    ],
)
def test_workers_go_to_spot_machines_and_the_head_never(spot, lasting):
    for name, pod in PODS.items():
        assert matches(spot, pod) == (name != "head")
        assert matches(lasting, pod) == (name == "head")
        tolerated = {toleration["key"] for toleration in pod.get("tolerations", [])}
        taints = {"nvidia.com/gpu", "cloud.google.com/gke-spot", "kubernetes.azure.com/scalesetpriority"}
        assert tolerated == (set() if name == "head" else taints)


def test_a_pod_that_has_to_go_may_finish_its_checkpoint():
    """The notice is given before SIGTERM, work goes on until the drain is over, and then there is time to stop."""
    for name in GROUPS:
        pod, (container,) = PODS[name], PODS[name]["containers"]
        grace = pod["terminationGracePeriodSeconds"]
        drain = {variable["name"]: variable["value"] for variable in container["env"]}
        notice = container["lifecycle"]["preStop"]["exec"]["command"]
        assert notice[:4] == ["ray", "drain-node", "--reason", "DRAIN_NODE_REASON_PREEMPTION"]
        assert 60 <= float(drain["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"]) <= grace - 20
        assert 60 <= int(notice[notice.index("--deadline-remaining-seconds") + 1]) <= grace - 10
    from ray._private import ray_constants

    assert hasattr(ray_constants, "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S")  # a name that Ray reads


# AWS


def aws() -> dict:
    return yaml.safe_load((DEPLOY / "aws.yaml").read_text())


def test_ray_takes_the_cluster_of_aws():
    from ray.autoscaler._private.util import prepare_config, validate_config

    prepared = prepare_config(aws())
    validate_config(prepared)
    with pytest.raises(jsonschema.ValidationError):
        validate_config(prepared | {"idle_timeout_minuts": 5})


def test_the_commands_of_aws_exist_and_listen_on_loopback():
    config = aws()
    started = []
    for line in config["head_start_ray_commands"] + config["worker_start_ray_commands"]:
        words = shlex.split(line)
        check_command(words)
        started.append(words)
    hosts = [word for words in started for word in words if word.startswith("--dashboard-host")]
    assert hosts == ["--dashboard-host=127.0.0.1"]
    assert not [word for words in started for word in words if "0.0.0.0" in word]


def test_the_workers_of_aws_are_spot_and_the_head_is_not():
    types, head = aws()["available_node_types"], aws()["head_node_type"]
    for name, kind in types.items():
        market = kind["node_config"].get("InstanceMarketOptions", {})
        assert (market.get("MarketType") == "spot") == (name != head)
        assert kind["node_config"]["MetadataOptions"] == {"HttpTokens": "required"}
        assert all(disk["Ebs"]["Encrypted"] for disk in kind["node_config"]["BlockDeviceMappings"])
        if name != head:
            assert kind["min_workers"] == 0 < kind["max_workers"]
    assert types[head]["resources"] == {"CPU": 0}
    assert sum(kind.get("max_workers", 0) for kind in types.values()) == aws()["max_workers"]
    elastic, gpu = CLUSTERS["elastic"](), types["gpu"]["resources"]
    assert gpu["CPU"] >= gpu["GPU"] * elastic.cpus_per_worker


def test_the_token_of_aws_lies_where_ray_looks():
    image_home = re.search(r"HOME=(\S+)", (DEPLOY / "Dockerfile").read_text())
    assert image_home
    assert aws()["file_mounts"] == {f"{image_home[1]}/.ray/auth_token": "~/.ray/auth_token"}


# Watching


def test_every_command_on_watching_exists():
    from tensorboard.program import TensorBoard

    text = (ROOT / "docs" / "watching.md").read_text()
    lines = [line for block in text.split("```")[1::2] for line in block.splitlines()]
    commands = [shlex.split(line) for line in lines if re.match(r"(ray|rescribe|curl|pip|tensorboard) ", line)]
    assert {words[0] for words in commands} == {"ray", "rescribe", "curl", "pip", "tensorboard"}
    port = None
    for words in commands:
        if words[0] in ("ray", "rescribe"):
            check_command(words)
            port = next((word.split("=")[1] for word in words if word.startswith("--metrics-export-port")), port)
        elif words[0] == "pip":
            assert set(Requirement(words[-1]).extras) <= PROJECT["optional-dependencies"].keys()
        elif words[0] == "tensorboard":
            TensorBoard().configure([*words])
        else:
            assert words[-1] == f"http://127.0.0.1:{port}/metrics"
    assert (ROOT / re.search(r"`(\S*grafana\S*)`", text)[1]).exists()
    (scraped,) = yaml.safe_load(re.search(r"```yaml\n(.*?)```", text, re.DOTALL)[1])["scrape_configs"]
    from ray._private.ray_constants import PROMETHEUS_SERVICE_DISCOVERY_FILE

    assert scraped["file_sd_configs"] == [{"files": [f"/tmp/ray/{PROMETHEUS_SERVICE_DISCOVERY_FILE}"]}]


# The image


def instructions() -> list[tuple[str, str]]:
    text = re.sub(r"^#.*\n", "", (DEPLOY / "Dockerfile").read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    return [(line.split()[0], line.split(maxsplit=1)[1]) for line in text.split("\n") if line.strip()]


def test_the_image_is_pinned_and_runs_as_nobody_special():
    steps = instructions()
    assert ("ARG", "BASE=python:3.11.14-slim-bookworm") in steps
    assert {value.split()[0] for name, value in steps if name == "FROM"} == {"${BASE}"}
    last = len(steps) - 1 - [name for name, _ in reversed(steps)].index("USER")
    assert steps[last][1] == "1000:1000"
    assert not [value for name, value in steps[last:] if name == "RUN"]
    assert PODS["head"]["securityContext"]["runAsUser"] == 1000
    environment = next(value for name, value in steps if name == "ENV")
    assert "RAY_AUTH_MODE=token" in environment.split()
    for name, value in steps:
        assert name not in ("ADD", "ENTRYPOINT", "EXPOSE")
        if name == "RUN" and "apt-get install" in value:
            assert "--no-install-recommends" in value
            assert value.rstrip().endswith("rm -rf /var/lib/apt/lists/*")
        for installed in re.findall(r"pip install [^;&]*", value if name == "RUN" else ""):
            assert "--no-cache-dir" in installed
            assert "--constraint /wheel/requirements.lock" in installed
        if name in ("HEALTHCHECK", "CMD"):
            check_command(json.loads(value[value.index("[") :]))


def test_what_is_copied_exists_and_is_sent():
    ignore = (DEPLOY / "Dockerfile.dockerignore").read_text().split("\n")
    sent = {line[1:] for line in ignore if line.startswith("!")}
    copied = {source for name, value in instructions() if name == "COPY" for source in value.split()[:-1]}
    assert copied == sent
    assert all((ROOT / source).exists() for source in copied)


def test_every_package_of_the_image_is_pinned():
    """The lock constrains all that pip would bring, so that two builds bring the same."""
    waiting = [Requirement(text) for text in PROJECT["dependencies"]] + [Requirement("boto3")]
    seen, loose = set(), set()
    while waiting:
        requirement = waiting.pop()
        name = canonicalize_name(requirement.name)
        if (name, frozenset(requirement.extras)) in seen:
            continue
        seen.add((name, frozenset(requirement.extras)))
        if name not in LOCK:
            loose.add(name)
            continue
        assert requirement.specifier.contains(LOCK[name], prereleases=True), requirement
        for text in importlib.metadata.requires(name) or []:
            inner = Requirement(text)
            extras = requirement.extras or {""}
            if inner.marker is None or any(inner.marker.evaluate({"extra": extra}) for extra in extras):
                waiting.append(inner)
    assert {name for name in loose if not re.match("nvidia-|cuda-|triton", name)} == set()  # torch pins those itself


def test_versions_agree():
    assert CLUSTER["spec"]["rayVersion"] == LOCK["ray"] == importlib.metadata.version("ray")
    images = {pod["containers"][0]["image"] for pod in PODS.values()} | {aws()["docker"]["image"].split("/")[-1]}
    assert images == {f"rescribe:{PROJECT['version']}", f"rescribe:{PROJECT['version']}-cpu"}
    assert PODS["gpu"]["containers"][0]["image"] == f"rescribe:{PROJECT['version']}"


def test_the_wheel_holds_all_that_is_read(tmp_path):
    """Templates too: an image without them would fail at the end of a run."""
    source, packages = tmp_path / "source", ("infra", "captioner", "t2i", "workflows")
    for name in packages:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    build = "from setuptools.build_meta import build_wheel; build_wheel('..')"
    subprocess.run([sys.executable, "-c", build], cwd=source, check=True, capture_output=True, timeout=60)
    (wheel,) = tmp_path.glob("rescribe-*.whl")
    with zipfile.ZipFile(wheel) as opened:
        held = {name for name in opened.namelist() if ".dist-info/" not in name}
    wanted = {path.relative_to(ROOT).as_posix() for name in packages for path in (ROOT / name).rglob("*.*")}
    wanted = {name for name in wanted if "__pycache__" not in name and not name.startswith("infra/deploy/")}
    assert held == {name.removeprefix("workflows/python/") for name in wanted}
    assert {name for name in held if name.endswith(".jinja")}
