"""Following a job through a job server that fails on the way: nothing is lost, nothing is told twice."""

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from infra import jobs
from infra.jobs import Jobs

DETAILS = {"type": "SUBMISSION", "submission_id": "one", "entrypoint": "true", "start_time": 1000, "end_time": 3500}


class Server:
    """Answers as Ray's job server does; `script` says, a question each: the state, the log so far, or a failure."""

    def __init__(self, script):
        self.script, self.now, self.asked = iter(script), ("RUNNING", ""), []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                outer.asked.append((self.path, self.headers.get("Authorization")))
                if self.path == "/api/version":
                    return self.answer(200, {"version": "4", "ray_version": "2.60.0", "ray_commit": "x"})
                if self.path.endswith("/missing"):
                    return self.answer(404, "Job missing does not exist")
                if not self.path.endswith("/logs"):
                    outer.now = next(outer.script, outer.now)
                if outer.now == "cut":
                    return self.connection.close()
                if outer.now == "error":
                    return self.answer(500, "Traceback: no agent")
                state, text = outer.now
                return self.answer(200, {"logs": text} if self.path.endswith("/logs") else DETAILS | {"status": state})

            def answer(self, code, value):
                body = (value if isinstance(value, str) else json.dumps(value)).encode()
                self.send_response(code)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_):
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self):
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def serve(monkeypatch):
    started = []
    monkeypatch.setattr(jobs.time, "sleep", lambda seconds: None)

    def start(*script):
        started.append(Server(script))
        return started[-1]

    yield start
    for server in started:
        server.close()


def test_what_is_told_is_the_log_once(serve):
    server = serve(
        ("PENDING", ""), ("RUNNING", "a\n"), "cut", "error", ("RUNNING", "a\n"), "cut", ("RUNNING", "a\nb\n"),
        ("SUCCEEDED", "a\nb\nlast ünicode\n"),
    )  # fmt: skip
    client = Jobs(server.url)
    assert list(client.follow("one")) == ["a\n", "b\n", "last ünicode\n"]
    job = client.open("one")
    assert (job.state, job.over, job.started, job.ended) == ("SUCCEEDED", True, 1.0, 3.5)


def test_a_server_that_stays_away_is_given_up(serve, monkeypatch):
    server = serve(("RUNNING", "a\n"), *["cut"] * 10_000)
    clock = iter(range(0, 1_000_000, 5))
    monkeypatch.setattr(jobs.time, "monotonic", lambda: next(clock))
    telling = Jobs(server.url).follow("one")
    assert next(telling) == "a\n"
    with pytest.raises(ConnectionError, match="No job server answers"):
        next(telling)
    with pytest.raises(RuntimeError, match="500"):
        list(Jobs(serve("error").url).follow("one", wait=False))


def test_a_job_that_is_not_there(serve):
    client = Jobs(serve().url)
    assert client.find("missing") is None
    assert client.attempts("missing") == []
    with pytest.raises(ValueError, match="knows no job missing"):
        client.open("missing")


@pytest.mark.parametrize(
    ("settings", "sent"),
    [
        ({"RAY_AUTH_TOKEN": "ab"}, "Bearer ab"),
        ({"RAY_AUTH_TOKEN": "ab", "RAY_AUTH_MODE": "token"}, "Bearer ab"),
        ({"RAY_AUTH_TOKEN": "ab", "RAY_AUTH_MODE": "disabled"}, None),
        ({"RAY_AUTH_TOKEN_PATH": "FILE"}, "Bearer cd"),
        ({}, None),
    ],
)
def test_the_token_is_sent_whatever_ray_found_when_it_was_loaded(serve, monkeypatch, tmp_path, settings, sent):
    (tmp_path / "token").write_text("cd\n")
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_AUTH_MODE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in settings.items():
        monkeypatch.setenv(name, value.replace("FILE", str(tmp_path / "token")))
    monkeypatch.setenv("RAY_ADDRESS", "192.0.2.1:6379")
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://192.0.2.1:8265")
    server = serve()
    started = time.monotonic()
    Jobs(server.url)
    assert time.monotonic() - started < 20  # it did not try the others
    assert {header for _, header in server.asked} == {sent}


def test_addresses_are_of_job_servers():
    for wrong in ("auto", "127.0.0.1:8265", "ray://host:10001"):
        with pytest.raises(ValueError, match="http://HEAD:8265"):
            Jobs(wrong)
