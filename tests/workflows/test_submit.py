"""Lines sent to a real Ray cluster: they outlive their client, are done once, can be stopped, and carry no secret."""

import hashlib
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from pathlib import Path

import pytest
import s3fs
from ray._private.accelerators.nvidia_gpu import NvidiaGPUAcceleratorManager as Nvidia
from ray.scripts.scripts import start

from infra import device
from infra.capacity import Node
from infra.jobs import Job, Jobs
from tests.workflows import head
from workflows import submit
from workflows.__main__ import main
from workflows.corpora.shapes import ShapesConfig, write_shards

ROOT = Path(__file__).parents[2]
OF_NODES = {"HF_TOKEN": "hf_ofTheNodes0123456789abcdef", "AWS_SECRET_ACCESS_KEY": "ofTheNodes/K7MDENGbPxRfiCY"}
OF_CLIENT = {"HF_TOKEN": "hf_ofTheClient0123456789abcde", "AWS_SECRET_ACCESS_KEY": "ofTheClient/K7MDENGbPxRfiC"}


@pytest.fixture(scope="module")
def cluster(s3_server):
    where = {"AWS_ENDPOINT_URL": s3_server, "AWS_ACCESS_KEY_ID": "nodes", "AWS_DEFAULT_REGION": "us-east-1"}
    with head.Cluster([OF_NODES | where] * 2) as started:
        yield started


@pytest.fixture(autouse=True)
def client(monkeypatch):
    """The token in the client's environment, secrets of its own, and an address that Ray would rather take."""
    settings = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": head.TOKEN, **OF_CLIENT}
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")  # what a client asked of S3 would fail
    monkeypatch.setenv("RAY_ADDRESS", "192.0.2.1:6379")


@pytest.fixture
def corpus(tmp_path):
    write_shards(ShapesConfig(samples=40, labelled=8, shard_size=20), str(tmp_path / "corpus"))
    return str(tmp_path / "corpus" / "{00000..00001}.tar")


def command(capsys, *arguments):
    """The exit code, the JSON object and what was said."""
    code = 0
    try:
        main([*arguments, "--json"])
    except SystemExit as exit_:
        code = exit_.code
    output = capsys.readouterr()
    lines = output.out.strip().splitlines()
    return code, json.loads(lines[-1]) if lines else None, output.err + "\n".join(lines[:-1])


@pytest.mark.timeout(240)
def test_a_job_outlives_its_client_and_the_same_line_does_the_work_once(cluster, capsys, tmp_path, monkeypatch, corpus):
    line = ["submit", "--address", cluster.url, "--follow", "ingest", "--store", "runs", "--corpus", corpus]
    client = subprocess.Popen(
        [sys.executable, "-m", "workflows", *line],
        env={**os.environ, "PYTHONPATH": str(ROOT)}, cwd=tmp_path, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip
    try:
        said = client.stderr.readline()
        assert said.startswith("Submitted "), said
        identity = said.split()[1].rstrip(".")
    finally:
        os.killpg(client.pid, signal.SIGKILL)
        client.communicate()

    code, job, said = command(capsys, "logs", identity, "--follow", "--address", cluster.url)
    assert code == 0, said
    assert job["state"] == "SUCCEEDED"
    assert "rows_in 40  accepted 40" in said
    (manifest,) = (tmp_path / "runs" / "ingest").glob("*/manifest.json")  # where the client stood
    made = manifest.read_bytes()

    monkeypatch.chdir(tmp_path)  # the same words in the same place
    code, again, said = command(capsys, *(word for word in line if word != "--follow"))
    assert code == 0
    assert again["id"] == identity
    assert "was submitted before and has ended well" in said
    code, listed, _ = command(capsys, "status", "--address", cluster.url)
    assert [each["id"] for each in listed["jobs"]].count(identity) == 1
    assert not [each for each in listed["jobs"] if each["id"].startswith(f"{identity}-")]
    assert manifest.read_bytes() == made

    for path in (tmp_path / "runs").rglob("*.json"):
        assert not any(secret in path.read_text() for secret in (*OF_CLIENT.values(), *OF_NODES.values()))


@pytest.mark.timeout(120)
def test_the_sent_code_and_the_nodes_own_secrets_reach_every_worker(cluster):
    """The work is done on the other node, by the code that was sent, with the environment of that node."""
    script = (
        "import hashlib, os, ray; ray.init('auto', log_to_driver=False)\n"
        "@ray.remote(num_cpus=1)\n"
        "def look():\n"
        "    import infra.jobs, workflows.submit, t2i.captions, captioner.styles\n"
        "    values = (os.environ[name].encode() for name in ('HF_TOKEN', 'AWS_SECRET_ACCESS_KEY'))\n"
        "    return infra.jobs.__file__, *(hashlib.sha256(value).hexdigest() for value in values)\n"
        "print('FOUND', *ray.get(look.remote()))"
    )
    jobs = Jobs(cluster.url)
    nodes = jobs.nodes()
    assert {(node.head, node.cpus, node.gpus) for node in nodes} == {(True, 0, 0), (False, head.WORKER_CPUS, 0)}
    assert {node.python for node in nodes} == {sys.executable}
    with tempfile.TemporaryDirectory() as folder:
        submit._copy_code(folder)
        environment = submit._environment(pip=False) | {"working_dir": folder}
        assert jobs.submit("look", shlex.join([sys.executable, "-c", script]), environment, {})
        assert not jobs.submit("look", "true", environment, {})  # the id is taken
    text = "".join(jobs.follow("look"))
    (found,) = [line.split()[1:] for line in text.splitlines() if line.startswith("FOUND")]
    assert "working_dir_files" in found[0]
    assert found[1:] == [hashlib.sha256(value.encode()).hexdigest() for value in OF_NODES.values()]


@pytest.mark.timeout(180)
@pytest.mark.parametrize("seconds", [4, pytest.param(25, marks=pytest.mark.faults)])
def test_a_stopped_job_may_put_its_work_away(cluster, tmp_path, seconds):
    """Longer than the three seconds that Ray leaves a job; a training that saves on a busy machine needs many more."""
    left = tmp_path / "left"
    script = (
        "import time\ntry:\n    print('at work'); time.sleep(600)\n"
        f"finally:\n    time.sleep({seconds}); open({str(left)!r}, 'w')"
    )
    jobs = Jobs(cluster.url)
    name = f"sleeper-{seconds}"
    jobs.submit(name, "exec " + shlex.join([sys.executable, "-c", script]), submit._environment(pip=False), {})
    for text in jobs.follow(name):
        if text.strip().endswith("at work"):
            break
    assert jobs.stop(name).state == "STOPPED"
    assert left.exists()
    assert jobs.stop(name).state == "STOPPED"


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    ("line", "wanted"),
    [
        (
            ("run", "demo", "--cluster", "one_node"),
            "8 training workers of 4 CPU and 1 GPU each, and there is room for 0",
        ),
        (("run", "demo", "--cluster.workers", "9", "9", "--cluster.rows-per-worker", "1"), "there is room for 8"),
        (("run", "demo", "--cluster.workers", "8", "8", "--cluster.rows-per-worker", "1"), "1 CPU beside them"),
        (("run", "demo", "--cluster.cpus-per-worker", "9"), "there is room for 0"),
        (("--free-gb", "1e9", "--", "run", "demo"), "GB of disk left"),
        (("run", "dmeo"), "Did you mean 'demo'?"),
        (("list",), "without a cluster"),
        ((), "Say what to submit"),
        (("run", "demo", "--cluster.address", "auto"), "Leave --cluster.address out"),
        (("run", "demo", "--store", "s3://key:hidden@bucket"), "--store holds credentials within an address"),
    ],
)
def test_what_cannot_be_is_refused_at_once(cluster, capsys, tmp_path, monkeypatch, line, wanted):
    monkeypatch.chdir(tmp_path)
    before = len(Jobs(cluster.url).known(""))
    code, _, said = command(capsys, "submit", "--address", cluster.url, *line)
    assert code == 1
    assert wanted in said
    assert "Traceback" not in said
    assert "hidden" not in said
    assert len(Jobs(cluster.url).known("")) == before


@pytest.mark.timeout(60)
def test_folders_that_another_machine_does_not_see_are_refused(cluster, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(socket, "gethostname", lambda: "another")
    code, _, said = command(capsys, "submit", "--address", cluster.url, "run", "demo")
    assert code == 1
    assert "store is runs, on this machine, which the cluster does not see" in said


@pytest.mark.timeout(60)
def test_wrong_tokens_and_addresses_are_sentences(cluster, capsys, monkeypatch):
    monkeypatch.setenv("RAY_AUTH_TOKEN", "00" * 32)
    code, _, said = command(capsys, "status", "--address", cluster.url)
    assert code == 1
    assert "refused the token" in said
    assert head.TOKEN not in said
    for address, wanted in (
        ("http://127.0.0.1:9", "No job server answers"),
        ("auto", "not the address of a job server"),
    ):
        code, _, said = command(capsys, "status", "--address", address)
        assert code == 1
        assert wanted in said


@pytest.mark.timeout(60)
def test_an_unknown_job_is_said(cluster, capsys):
    for verb in ("status", "logs", "stop"):
        code, _, said = command(capsys, verb, "rescribe-run-0", "--address", cluster.url)
        assert code == 1
        assert "knows no job rescribe-run-0" in said


@pytest.mark.long
@pytest.mark.timeout(600)
def test_the_commands_of_the_page(cluster, s3_server, capsys, monkeypatch):
    """As they stand in docs/cluster.md: a run on S3 is stopped halfway, and the same line finishes it."""
    page = (ROOT / "docs" / "cluster.md").read_text()
    block = next(part for part in page.split("```") if "\nrescribe submit" in part)
    settings, first, status, stop, second, logs = block.strip().splitlines()
    settings = dict(each.split("=") for each in settings.removeprefix("export ").split())
    assert settings.keys() == {"RAY_API_SERVER_ADDRESS", "RAY_AUTH_TOKEN"}
    monkeypatch.setenv(
        "RAY_API_SERVER_ADDRESS", settings["RAY_API_SERVER_ADDRESS"].replace("http://HEAD:8265", cluster.url)
    )
    monkeypatch.delenv("RAY_AUTH_MODE")
    files = s3fs.S3FileSystem(endpoint_url=s3_server, key="test", secret="test", use_listings_cache=False)
    bucket = f"test-{uuid.uuid4().hex[:12]}"
    files.mkdir(bucket)

    def run(line, job=""):
        words = line.replace("s3://bucket/", f"s3://{bucket}/").replace("JOB", job).split()
        assert words[0] == "rescribe"
        return command(capsys, *words[1:])

    _, sent, _ = run(first)
    _, same, said = run(first)
    assert same["id"] == sent["id"]
    assert "was submitted before" in said
    until = time.monotonic() + 240
    while not files.glob(f"{bucket}/store/ingest/*/manifest.json"):
        assert time.monotonic() < until
        time.sleep(1)
    code, jobs, _ = run(status)
    assert {job["id"]: job["state"] for job in jobs["jobs"]}[sent["id"]] == "RUNNING"
    code, stopped, _ = run(stop, sent["id"])
    assert stopped["state"] == "STOPPED"
    assert not files.glob(f"{bucket}/store/*/*/lease.json")
    assert not files.glob(f"{bucket}/store/evaluate/*/manifest.json")

    code, after, said = run(second)
    assert after["id"] == sent["id"] + "-2"
    code, after, said = run(logs, after["id"])
    assert code == 0, said
    assert "done already" in said  # the ingest
    (evaluation,) = files.glob(f"{bucket}/store/evaluate/*/manifest.json")
    assert json.loads(files.cat_file(evaluation))["summary"]


class Known:
    """A job server without Ray behind it: jobs by id, and what was sent."""

    def __init__(self, nodes, *states):
        self._nodes, self.sent = nodes, []
        self.jobs = [
            Job(id=str(n), state=state, line="", message="", started=1, ended=2) for n, state in enumerate(states)
        ]

    def nodes(self):
        return self._nodes

    def attempts(self, identity):
        return self.jobs

    def submit(self, identity, entrypoint, runtime_env, metadata):
        self.sent.append((identity, entrypoint, runtime_env, metadata))
        return True

    def open(self, identity):
        return Job(id=identity, state="PENDING", line="", message="", started=1, ended=None)


@pytest.mark.parametrize(
    ("states", "options", "suffix"),
    [
        ((), [], ""),
        (("RUNNING",), [], None),
        (("PENDING",), ["--again"], None),
        (("SUCCEEDED",), [], None),
        (("SUCCEEDED",), ["--again"], "-2"),
        (("FAILED",), [], "-2"),
        (("FAILED", "STOPPED"), [], "-3"),
        (("FAILED", "STOPPED", "RUNNING"), [], None),
    ],
)
def test_what_is_sent_and_when(monkeypatch, tmp_path, states, options, suffix):
    monkeypatch.chdir(tmp_path)
    node = Node(name="n", host=socket.gethostname(), cpus=8, head=True, python="/opt/venv/bin/python")
    known = Known([node], *states)
    monkeypatch.setattr(submit, "Jobs", lambda address: known)
    monkeypatch.setattr(device, "has_driver", lambda: True)
    monkeypatch.setattr(Nvidia, "get_current_node_num_accelerators", staticmethod(lambda: 2))  # here, and not there
    main(["submit", "--address", "http://head:8265", *options, "--", "run", "debug", "--seed", "1"])
    if suffix is None:
        assert known.sent == []
        return
    ((identity, entrypoint, environment, metadata),) = known.sent
    assert re.fullmatch(r"rescribe-run-[0-9a-f]{12}" + suffix, identity)
    line = f"run debug --store {tmp_path}/runs --seed 1"
    assert metadata == {"line": line}
    wanted = line.replace("--store", "--cluster.address auto --store")
    assert entrypoint == f"exec /opt/venv/bin/python -m workflows {wanted}"
    assert environment.keys() == {"env_vars", "working_dir"}
    assert environment["env_vars"].keys() == {"RAY_JOB_STOP_SIGNAL", "RAY_JOB_STOP_WAIT_TIME_S"}


@pytest.mark.parametrize("option", ["--python", "--pip", "--autoscaling", "code"])
def test_another_interpreter_and_other_code_are_another_job(capsys, monkeypatch, tmp_path, option):
    monkeypatch.chdir(tmp_path)
    known = Known([Node(name="n", host=socket.gethostname(), cpus=8, head=True, python="/opt/venv/bin/python")])
    monkeypatch.setattr(submit, "Jobs", lambda address: known)
    line = ["submit", "--address", "http://head:8265", "run", "debug", "--cluster", "one_node"]
    code, _, said = command(capsys, *line)
    assert code == 1
    assert "room for 0" in said
    assert known.sent == []
    command(capsys, *line, "--autoscaling")
    if option == "code":
        monkeypatch.setattr(submit, "_code", lambda: "another")
    command(capsys, *line, "--autoscaling", *{"--python": ["--python", "/other"], "--pip": ["--pip"]}.get(option, []))
    (first, *_), (second, entrypoint, environment, _) = known.sent
    assert (first == second) == (option == "--autoscaling")
    assert ("pip" in environment) == (option == "--pip")
    python = {"--python": "/other", "--pip": "python"}.get(option, "/opt/venv/bin/python")
    assert entrypoint.startswith(f"exec {python} -m workflows run debug ")


def test_ctrl_c_leaves_the_job_alone(capsys, monkeypatch, tmp_path):
    def follow(identity, wait=True):
        yield "at work\n"
        raise KeyboardInterrupt

    known = Known([Node(name="n", host=socket.gethostname(), cpus=8, head=True, python="/opt/venv/bin/python")])
    known.follow = follow
    monkeypatch.setattr(submit, "Jobs", lambda address: known)
    with pytest.raises(SystemExit) as ended:
        main(["submit", "--address", "http://head:8265", "--follow", "run", "debug"])
    assert ended.value.code == 130
    said = capsys.readouterr().err
    ((identity, *_),) = known.sent
    assert f"The job goes on. Come back to it: rescribe logs {identity} --follow --address http://head:8265" in said


def test_an_address_that_holds_a_password_is_not_repeated(capsys):
    for line in (["submit", "run", "debug"], ["status"], ["logs", "x"], ["stop", "x"]):
        code, _, said = command(capsys, *line, "--address", "http://user:hidden@head:8265")
        assert code == 1
        assert "--address holds credentials" in said
        assert "hidden" not in said


def test_a_cluster_that_does_not_say_its_interpreter(capsys, monkeypatch, tmp_path):
    known = Known([Node(name="n", host=socket.gethostname(), cpus=8, head=True)])
    monkeypatch.setattr(submit, "Jobs", lambda address: known)
    code, _, said = command(capsys, "submit", "--address", "http://head:8265", "run", "debug")
    assert code == 1
    assert "--python /opt/venv/bin/python" in said


def test_the_page_starts_nodes_with_options_that_ray_has():
    page = (ROOT / "docs" / "cluster.md").read_text()
    lines = [line for line in page.splitlines() if "ray start" in line and "--" in line and "`" not in line]
    assert len(lines) == 2
    known = {name for parameter in start.params for name in parameter.opts}
    for line in lines:
        assert line.startswith("RAY_AUTH_MODE=token RAY_AUTH_TOKEN=")
        assert {word.split("=")[0] for word in line.split() if word.startswith("--")} <= known


@pytest.mark.timeout(60)
def test_no_secret_is_anywhere(cluster, tmp_path):
    """Last in this file: neither the client's secrets nor the nodes' own are in a log, a package or a record of Ray."""
    for secret in (*OF_CLIENT.values(), *OF_NODES.values(), head.TOKEN):
        assert cluster.files_that_hold(secret) == []
    assert cluster.files_that_hold("dashboard")  # it does find what is there
    for job in Jobs(cluster.url)._client.list_jobs():
        assert not any(secret in str(job) for secret in (*OF_CLIENT.values(), *OF_NODES.values(), head.TOKEN))
