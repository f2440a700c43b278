"""A chat endpoint on loopback that answers as a test tells it to."""

import base64
import contextlib
import io
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from PIL import Image


def completion(text, **choice):
    return {"choices": [{"index": 0, "message": {"role": "assistant", "content": text}, **choice}]}


def picture(body):
    """The image that a request holds."""
    part = body["messages"][0]["content"][0]
    data = part["image_url"]["url"].split(",", 1)[1]
    return Image.open(io.BytesIO(base64.b64decode(data)))


def prompt(body):
    return body["messages"][0]["content"][1]["text"]


class Endpoint:
    """`answer(body, number)` returns what to say to the request: a dict for JSON, or a function of the handler."""

    def __init__(self, answer):
        self.answer, self.bodies, self.times, self.headers = answer, [], [], []
        self.models_status, self.models = 200, {"data": []}
        self.busy = self.most_busy = 0
        self._lock = threading.Lock()
        endpoint = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self):
                endpoint.headers.append(dict(self.headers))
                say(self, endpoint.models_status, endpoint.models)

            def do_POST(self):
                raw = self.rfile.read(int(self.headers["Content-Length"]))
                body = json.loads(raw)
                with endpoint._lock:
                    endpoint.bodies.append(body)
                    endpoint.times.append(time.monotonic())
                    endpoint.headers.append(dict(self.headers))
                    number = len(endpoint.bodies)
                    endpoint.busy += 1
                    endpoint.most_busy = max(endpoint.most_busy, endpoint.busy)
                try:
                    answer = endpoint.answer(body, number)
                finally:  # before the client hears, for then it may come again at once
                    with endpoint._lock:
                        endpoint.busy -= 1
                with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                    answer(self) if callable(answer) else say(self, 200, answer)

            def log_message(self, *args):
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._server.block_on_close = False
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def close(self):
        self._server.shutdown()
        self._server.server_close()


def say(handler, status, data, headers=None):
    raw = data if isinstance(data, bytes) else json.dumps(data).encode()
    handler.send_response(status)
    for name, value in (headers or {}).items():
        handler.send_header(name, value)
    handler.send_header("Content-Length", str(len(raw)))
    handler.end_headers()
    handler.wfile.write(raw)


def status(code, data=b"", **headers):
    return lambda handler: say(handler, code, data, {name.replace("_", "-"): value for name, value in headers.items()})


def hang(seconds):
    def answer(handler):
        time.sleep(seconds)
        handler.close_connection = True

    return answer


def drip(seconds):
    """One byte at a time: no read of a socket ever waits long."""

    def answer(handler):
        raw = json.dumps(completion("late" + " " * 10_000)).encode()
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(raw)))
        handler.end_headers()
        handler.close_connection = True
        end = time.monotonic() + seconds
        for byte in raw:
            if time.monotonic() > end:
                break
            handler.wfile.write(bytes([byte]))
            time.sleep(0.01)

    return answer


def cut(announced):
    """Half a body, and then the end of the connection; `announced` says by which means the length was told."""

    def answer(handler):
        raw = json.dumps(completion("a caption that was cut")).encode()
        handler.send_response(200)
        if announced == "length":
            handler.send_header("Content-Length", str(len(raw)))
        elif announced == "chunks":
            handler.send_header("Transfer-Encoding", "chunked")
        handler.end_headers()
        half = raw[: len(raw) // 2]
        handler.wfile.write(b"%x\r\n%s\r\n" % (len(half), half) if announced == "chunks" else half)
        handler.close_connection = True

    return answer


def slam(handler):
    """The end of the connection, and no answer at all."""
    handler.close_connection = True
