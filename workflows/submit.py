"""Send a line of the command to a Ray cluster as a job, and come back to it."""

import dataclasses
import hashlib
import os
import shlex
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import tyro

from infra import strict
from infra.capacity import inventory, missing
from infra.cluster import Cluster
from infra.jobs import STOP_SECONDS, Job, Jobs
from workflows.commands import DECODE
from workflows.line import batches, placed, strings, with_options, words
from workflows.parse import parse
from workflows.secret import refuse_secrets

ROOT = Path(__file__).parents[1]
PACKAGES = ("workflows", "captioner", "t2i", "infra")
KINDS = (".py", ".jinja")  # of the files that make up the packages
PREFIX = "rescribe-"
ADDRESS = ["--cluster.address", "auto"]  # of the cluster that a job is in


@dataclasses.dataclass(frozen=True, kw_only=True)
class SubmitOptions:
    """A line sent twice is one job, wherever it stands; one that failed or was stopped is sent anew and continues."""

    address: str = ""  # of the job server, http://HEAD:8265; none: RAY_API_SERVER_ADDRESS
    shared: tyro.conf.UseAppendAction[tuple[str, ...]] = ()  # a folder that every node mounts under the same path
    python: str = ""  # interpreter on the nodes, by absolute path; none: the one that Ray runs its workers with
    pip: bool = False  # Ray installs requirements.lock on each node; else the nodes have its packages already
    autoscaling: bool = False  # the cluster grows on demand: what its nodes of now lack is no reason to refuse
    free_gb: float = 1.0  # of disk, on every node
    again: bool = False  # send a line that has ended well once more, as when its corpus has changed
    follow: bool = False  # print what the job prints, until it ends
    json: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class _JobOptions:
    id: tyro.conf.Positional[str]  # as `submit` printed it
    address: str = ""  # of the job server, http://HEAD:8265; none: RAY_API_SERVER_ADDRESS
    json: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class _StatusOptions:
    id: tyro.conf.Positional[str] = ""  # none: all jobs that were submitted
    address: str = ""
    json: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class _LogsOptions:
    id: tyro.conf.Positional[str]
    address: str = ""
    follow: bool = False  # until the job ends; the exit code then says whether it ended well
    json: bool = False


def submit(arguments: list[str], understand: Callable[[list[str]], Any]) -> dict[str, Any]:
    """Send a recipe or a step to a Ray cluster: `rescribe submit --address http://HEAD:8265 -- run demo --store s3://...`.

    `understand` parses the line as the command would and returns its options, without doing anything.
    """
    options, line = _split(arguments)
    refuse_secrets(words(line))  # before anything could repeat them
    asked = understand(with_options(line, ADDRESS))
    refuse_secrets(strings(asked))  # those of a recipe's file too: configs are written to manifests
    address = _address(options.address)
    jobs = Jobs(address)
    nodes = jobs.nodes()
    here = bool(nodes) and all(node.host == socket.gethostname() for node in nodes)
    line = placed(line, asked, None if here else options.shared)
    environment = _environment(options.pip)
    head = next((node for node in nodes if node.head), None)
    python = options.python or ("python" if options.pip else head and head.python)
    if not python:
        raise RuntimeError(
            "The cluster does not say which Python runs its workers. Give it: --python /opt/venv/bin/python."
        )
    identity = PREFIX + line[0].replace("_", "-") + "-" + _digest([_code(), python, options.pip, line])
    attempts = jobs.attempts(identity)
    job = attempts[-1] if attempts else None
    if job is None or (job.over and (job.state != "SUCCEEDED" or options.again)):
        if not options.autoscaling:
            _refuse(asked, line, nodes, options.free_gb)
        name = identity if job is None else f"{identity}-{len(attempts) + 1}"
        sent_line = with_options(line, ADDRESS)
        entrypoint = "exec " + shlex.join([python, "-m", "workflows", *sent_line])
        with tempfile.TemporaryDirectory(prefix="rescribe-") as folder:
            _copy_code(folder)
            metadata = {"line": shlex.join(line)}
            sent = jobs.submit(name, entrypoint, environment | {"working_dir": folder}, metadata)
        say = f"Submitted {name}." if sent else f"{name} was submitted by another client just now."
        job = jobs.open(name)
    else:
        say = f"{job.id} was submitted before and {_standing(job)}."
        if job.state == "SUCCEEDED":
            say += " Give --again to send it once more: what is done already is found again."
    _say(say)
    if options.follow:
        job = _follow(jobs, job.id, address)
    elif not job.over:
        _say(f"rescribe logs {job.id} --follow --address {address}")
    return _ended(job, options.json, checked=options.follow)


def status(arguments: list[str]) -> dict[str, Any]:
    """Say how a job stands, or all of them: `rescribe status [ID] --address http://HEAD:8265`."""
    options = parse(_StatusOptions, arguments, "rescribe status")
    jobs = Jobs(_address(options.address))
    if options.id:
        job = jobs.open(options.id)
        print(f"{job.id}  {job.state}  {_seconds(job)} s  {job.line}")
        if job.state == "FAILED":
            _say(job.message.strip().splitlines()[-1] if job.message.strip() else "It left no message.")
        return _described(job)
    known = jobs.known(PREFIX)
    for job in known:
        print(f"{job.id}  {job.state}  {_seconds(job)} s  {job.line}")
    if not known:
        _say("No job of rescribe was submitted to this cluster since it was started.")
    return {"jobs": [_described(job) for job in known]}


def logs(arguments: list[str]) -> dict[str, Any]:
    """Print what a job printed, from its beginning: `rescribe logs ID --follow --address http://HEAD:8265`."""
    options = parse(_LogsOptions, arguments, "rescribe logs")
    address = _address(options.address)
    jobs = Jobs(address)
    if options.follow:
        job = _follow(jobs, options.id, address)
        return _ended(job, options.json, checked=True)
    for text in jobs.follow(options.id, wait=False):
        print(text, end="", flush=True)
    return _described(jobs.open(options.id))


def stop(arguments: list[str]) -> dict[str, Any]:
    """Stop a job; the same line, submitted again, continues it: `rescribe stop ID --address http://HEAD:8265`."""
    options = parse(_JobOptions, arguments, "rescribe stop")
    jobs = Jobs(_address(options.address))
    if not jobs.open(options.id).over:
        _say(f"{options.id} puts its work away, and is killed if that takes longer than {STOP_SECONDS} s.")
    job = jobs.stop(options.id)
    _say(f"{job.id} {_standing(job)}.")
    return _described(job)


def sources() -> list[Path]:
    """The files of the project's packages, relative to ROOT, sorted."""
    found = [path for package in PACKAGES for path in (ROOT / package).rglob("*") if path.suffix in KINDS]
    return sorted(path.relative_to(ROOT) for path in found if path.is_file())


def _split(arguments: list[str]) -> tuple[SubmitOptions, list[str]]:
    """The options of `submit`, and the line: what follows `--`, or all that is not an option of `submit`."""
    if "--" in arguments:
        place = arguments.index("--")
        options = tyro.cli(SubmitOptions, args=arguments[:place], prog="rescribe submit")
        line = arguments[place + 1 :]
    else:
        options, line = tyro.cli(SubmitOptions, args=arguments, prog="rescribe submit", return_unknown_args=True)
    if not line:
        raise ValueError(
            "Say what to submit, as in: rescribe submit --address http://HEAD:8265 -- run demo --store S3."
        )
    if any(token.split("=")[0] == "--cluster.address" for token in line):
        raise ValueError("A job runs on the cluster that it is submitted to. Leave --cluster.address out.")
    return options, line


def _address(given: str) -> str:
    address = given or os.environ.get("RAY_API_SERVER_ADDRESS", "")
    if not address:
        raise ValueError("Say where the job server is: --address http://HEAD:8265, or RAY_API_SERVER_ADDRESS.")
    refuse_secrets([("--address", address)])  # it is printed, to be given again
    return address.rstrip("/")


def _refuse(asked: Any, line: list[str], nodes: Sequence[Any], free_gb: float) -> None:
    cluster: Cluster = asked.cluster
    lacks = missing(cluster, nodes, batches=list(batches(asked)), decodes=line[0] in ("run", *DECODE), free_gb=free_gb)
    if lacks:
        raise ValueError(
            f"This cluster ({inventory(nodes)}) cannot run the line. {' '.join(lacks)} Choose another --cluster, or "
            "give --autoscaling if nodes will join."
        )


def _environment(pip: bool) -> dict[str, Any]:
    """The runtime environment, without the code. Nothing of this process's own environment goes into it: secrets."""
    # `stop` is to be what Ctrl-C is, with time enough to release the folder that is worked on.
    variables = {"RAY_JOB_STOP_SIGNAL": "SIGINT", "RAY_JOB_STOP_WAIT_TIME_S": str(STOP_SECONDS)}
    environment: dict[str, Any] = {"env_vars": variables}
    if pip:
        lock = ROOT / "requirements.lock"
        if not lock.exists():
            raise FileNotFoundError(f"--pip needs {lock}, which only a checkout of the project has.")
        lines = [line.strip() for line in lock.read_text().splitlines()]
        # Ray itself is there, and refuses to be replaced.
        packages = [line for line in lines if line and not line.startswith(("#", "ray=="))]
        environment["pip"] = {"packages": packages}
    return environment


def _copy_code(folder: str) -> None:
    """What is sent: the packages and nothing else, whatever lies beside them."""
    for path in sources():
        target = Path(folder, path)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes((ROOT / path).read_bytes())


def _code() -> str:
    """A hash of what is sent: changed code is another job."""
    return _digest([(str(path), hashlib.sha256((ROOT / path).read_bytes()).hexdigest()) for path in sources()])


def _digest(value: Any) -> str:
    return hashlib.sha256(strict.dumps(value).encode()).hexdigest()[:12]


def _follow(jobs: Jobs, identity: str, address: str) -> Job:
    try:
        for text in jobs.follow(identity):
            print(text, end="", flush=True)
    except KeyboardInterrupt:
        _say(f"\nThe job goes on. Come back to it: rescribe logs {identity} --follow --address {address}")
        raise SystemExit(130) from None
    job = jobs.open(identity)
    _say(f"{job.id} {_standing(job)}.")
    return job


def _ended(job: Job, as_json: bool, checked: bool) -> dict[str, Any]:
    """What the command returns; where the end was waited for and is not a good one, the exit code says so."""
    described = _described(job)
    if checked and job.state != "SUCCEEDED":
        if as_json:
            print(strict.dumps(described))
        raise SystemExit(1)
    return described


def _described(job: Job) -> dict[str, Any]:
    return {"id": job.id, "state": job.state, "line": job.line, "seconds": _seconds(job)}


def _standing(job: Job) -> str:
    return {
        "PENDING": "waits to start",
        "RUNNING": "is running",
        "STOPPED": "is stopped",
        "SUCCEEDED": "has ended well",
        "FAILED": "has failed",
    }[job.state] + f" ({_seconds(job)} s)"


def _seconds(job: Job) -> float:
    return round((job.ended or time.time()) - job.started, 1) if job.started else 0.0


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
