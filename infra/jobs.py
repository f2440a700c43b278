"""Ray jobs by id: submit, find, follow, stop; and the nodes that they would run on."""

import logging
import os
import shlex
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from typing import Any, Literal

from infra import storage
from infra.capacity import Node

PATIENCE_SECONDS = 60  # how long a cluster may be silent before its client gives up
STOP_SECONDS = 120  # that a stopped job has to put its work away before it is killed; Ray leaves 3 where none are said
State = Literal["PENDING", "RUNNING", "STOPPED", "SUCCEEDED", "FAILED"]


@dataclass(frozen=True, kw_only=True)
class Job:
    """One submission; `started` and `ended` are seconds since 1970."""

    id: str
    state: State
    line: str
    message: str
    started: float | None
    ended: float | None

    @property
    def over(self) -> bool:
        """Whether it will never run again."""
        return self.state in ("STOPPED", "SUCCEEDED", "FAILED")


class Jobs:
    """The job server of a Ray cluster, `http://HEAD:8265`, spoken to with the token of RAY_AUTH_TOKEN if that is set.

    ConnectionError where nothing answers, PermissionError where the token is refused.
    """

    def __init__(self, address: str) -> None:
        if not address.startswith(("http://", "https://")):
            raise ValueError(f"'{address}' is not the address of a job server. Give it as http://HEAD:8265.")
        from ray.job_submission import JobSubmissionClient  # slow to import: `--help` does without

        logging.getLogger("ray").setLevel(logging.ERROR)
        for name in ("ray.dashboard.modules.dashboard_sdk", "ray.dashboard.modules.job.sdk"):
            logging.getLogger(name).setLevel(logging.ERROR)
        self._address = address
        with _without("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):  # Ray would take these over an address that is given
            self._client: Any = self._ask(JobSubmissionClient, address, headers=_token())

    def submit(self, identity: str, entrypoint: str, runtime_env: dict[str, Any], metadata: dict[str, str]) -> bool:
        """Start a job under an id of our own; False where another client took that id a moment before.

        What is in `runtime_env`, Ray writes to its logs in clear text: no secrets.
        """
        try:
            self._ask(
                self._client.submit_job,
                entrypoint=entrypoint, submission_id=identity, runtime_env=runtime_env, metadata=metadata,
            )  # fmt: skip
        except RuntimeError as error:
            if f"{identity} already exists" in str(error):
                return False
            raise RuntimeError(f"The cluster did not take the job: {_last_line(error)}") from None
        return True

    def find(self, identity: str) -> Job | None:
        """The job of this id, if the cluster knows it."""
        try:
            return _job(self._ask(self._client.get_job_info, identity))
        except RuntimeError as error:
            if "does not exist" in str(error):
                return None
            raise

    def open(self, identity: str) -> Job:
        """The job of this id; ValueError if the cluster does not know it."""
        job = self.find(identity)
        if job is None:
            raise ValueError(
                f"{self._address} knows no job {identity}. `rescribe status` lists the jobs; a cluster that was "
                "started again has forgotten them, and the same line submitted again continues its work."
            )
        return job

    def attempts(self, identity: str) -> list[Job]:
        """The jobs ID, ID-2, ID-3, ... that there are, first to last."""
        found: list[Job] = []
        for number in count(1):
            job = self.find(identity if number == 1 else f"{identity}-{number}")
            if job is None:
                break
            found.append(job)
        return found

    def known(self, prefix: str) -> list[Job]:
        """The jobs whose id begins so, oldest first."""
        jobs = [
            _job(each) for each in self._ask(self._client.list_jobs) if (each.submission_id or "").startswith(prefix)
        ]
        return sorted(jobs, key=lambda job: (job.started or 0, job.id))

    def follow(self, identity: str, wait: bool = True) -> Iterator[str]:
        """What the job prints, from its beginning; until it ends if `wait`, else what there is now.

        A job server that does not answer for a while is asked again, and nothing is lost or told twice.
        """
        told, heard = 0, time.monotonic()
        while True:
            began = time.monotonic()
            try:
                over = self.open(identity).over  # asked first: what is read after the end is all there is
                text = self._ask(self._client.get_job_logs, identity)
                heard = time.monotonic()
            except (ConnectionError, RuntimeError):
                if not wait or time.monotonic() - heard > PATIENCE_SECONDS:
                    raise
                time.sleep(2)
                continue
            if len(text) > told:
                yield text[told:]
                told = len(text)
            if over or not wait:
                return
            # The server sends the whole log each time: reading takes a tenth of the time at most.
            time.sleep(max(1.0, 9 * (time.monotonic() - began)))

    def stop(self, identity: str) -> Job:
        """Interrupt the job as Ctrl-C does, wait until it is over, and return it."""
        if not self.open(identity).over:
            self._ask(self._client.stop_job, identity)
        until = time.monotonic() + STOP_SECONDS + PATIENCE_SECONDS
        while not (job := self.open(identity)).over:
            if time.monotonic() > until:
                raise RuntimeError(f"{identity} was told to stop, but it is {job.state} still. Look at its node.")
            time.sleep(0.5)
        return job

    def nodes(self) -> list[Node]:
        """The living nodes; waits some seconds for one that has just joined to report."""
        until = time.monotonic() + PATIENCE_SECONDS / 2
        while True:
            # Beside the resources this says which interpreter runs the workers, and how full the disks are.
            answer = self._ask(self._client._do_request, "GET", "/nodes?view=summary")
            answer.raise_for_status()
            summary = answer.json()["data"]["summary"]
            nodes = [_node(each) for each in summary if each.get("raylet", {}).get("state") == "ALIVE"]
            if (nodes and all(node.host for node in nodes)) or time.monotonic() > until:
                return nodes
            time.sleep(1)

    def _ask(self, request: Any, *arguments: Any, **named: Any) -> Any:
        import requests
        from ray.exceptions import AuthenticationError

        try:
            return request(*arguments, **named)
        except AuthenticationError:
            raise PermissionError(
                f"{self._address} refused the token. Set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN to the one that its "
                "nodes were started with."
            ) from None
        except (ConnectionError, requests.RequestException):
            raise ConnectionError(
                f"No job server answers at {self._address}. Check the address (`ray start --head` prints it), and "
                "that the head has ray[default]."
            ) from None


@contextmanager
def _without(*names: str) -> Iterator[None]:
    kept = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(kept)


def _token() -> dict[str, str]:
    """The token as a header. Ray sends it only if RAY_AUTH_MODE was `token` when its library was loaded."""
    if os.environ.get("RAY_AUTH_MODE", "token") != "token":
        return {}
    token = os.environ.get("RAY_AUTH_TOKEN", "").strip()
    if not token and (path := os.environ.get("RAY_AUTH_TOKEN_PATH")):
        token = storage.read_bytes(path).decode().strip()
    return {"Authorization": f"Bearer {token}"} if token else {}


def _job(details: Any) -> Job:
    return Job(
        id=details.submission_id,
        state=str(getattr(details.status, "value", details.status)),  # pyright: ignore[reportArgumentType]
        line=(details.metadata or {}).get("line", details.entrypoint),
        message=details.message or "",
        started=details.start_time / 1000 if details.start_time else None,
        ended=details.end_time / 1000 if details.end_time else None,
    )


def _node(summary: dict[str, Any]) -> Node:
    raylet = summary["raylet"]
    total = raylet.get("resourcesTotal") or {}
    disks = summary.get("disk") or {}
    disk = disks.get(raylet.get("tempDir")) or disks.get("/")
    return Node(
        name=raylet.get("nodeManagerAddress") or raylet["nodeId"],
        host=summary.get("hostname"),
        cpus=total.get("CPU", 0),
        gpus=total.get("GPU", 0),
        free_gb=disk["free"] / 2**30 if disk else None,
        head=bool(raylet.get("isHeadNode")),
        python=_interpreter(summary.get("cmdline") or []),
    )


def _interpreter(command: list[str]) -> str | None:
    """The interpreter that a raylet starts its workers with."""
    flag = "--python_worker_command="
    for argument in command:
        if argument.startswith(flag):
            return shlex.split(argument.removeprefix(flag))[0]
    return None


def _last_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else repr(error)
