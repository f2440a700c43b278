"""A server before an S3 server that fails as real ones do: errors, silence, cut bodies, lost answers, refusals."""

import hashlib
import http.client
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

ERRORS = {
    "500": (500, "InternalError", "We encountered an internal error. Please try again."),
    "503": (503, "SlowDown", "Please reduce your request rate."),
    "409": (409, "ConditionalRequestConflict", "A conflicting operation is in progress."),
    "403": (403, "AccessDenied", "Access Denied"),
    "key": (403, "InvalidAccessKeyId", "The AWS Access Key Id you provided does not exist in our records."),
    "signature": (403, "SignatureDoesNotMatch", "The request signature we calculated does not match."),
}


class Proxy:
    """Passes requests on to `upstream`, but for those that meet a fault.

    `faults` are probabilities by kind: a key of ERRORS, "slow" (half a second), "cut" (the answer breaks off in the
    middle of its body) or "lost" (the request is carried out, and its answer never comes). Whether a request meets one
    is a function of the seed, the request and how often it was made, not of the order that threads take. Where there is
    a `script(method, path, count)`, it says the fault, or None; count is of the requests so far.
    """

    def __init__(self, upstream, seed=0, script=None, **faults):
        self.faults, self.seed, self.script = faults, seed, script
        self.met, self.requests = Counter(), []
        self.signed = []  # (access key, method, path) of each request
        self._upstream, self._asked, self._lock = urlsplit(upstream), Counter(), threading.Lock()
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_):
                pass

            def __getattr__(self, name):  # do_GET, do_PUT, ...
                if name.startswith("do_"):
                    return lambda: proxy._answer(self)
                raise AttributeError(name)

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 64

            def handle_error(self, *_):
                pass  # a client that was cut off and went away

        self._server = Server(("127.0.0.1", 0), Handler)
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._server.shutdown()
        self._server.server_close()

    def _fault(self, method, path, piece):
        with self._lock:
            self.requests.append((method, path))
            request = f"{self.seed} {method} {path} {piece}"
            count, self._asked[request] = self._asked[request], self._asked[request] + 1
            if self.script:
                fault = self.script(method, path, len(self.requests))
            else:
                drawn = int(hashlib.sha256(f"{request} {count}".encode()).hexdigest()[:8], 16) / 2**32
                fault = None
                for kind, probability in self.faults.items():
                    if 0 <= drawn < probability:
                        fault = kind
                    drawn -= probability
            self.met[fault] += 1
            return fault

    def _answer(self, handler):
        body = handler.rfile.read(int(handler.headers.get("Content-Length") or 0))
        key = handler.headers.get("Authorization", "").partition("Credential=")[2].partition("/")[0]
        self.signed.append((key, handler.command, handler.path))
        fault = self._fault(handler.command, handler.path, handler.headers.get("Range"))
        if fault in ERRORS:
            self._refuse(handler, *ERRORS[fault])
            return
        if fault == "slow":
            time.sleep(0.5)
        upstream = http.client.HTTPConnection(self._upstream.hostname, self._upstream.port, timeout=30)
        try:
            upstream.request(handler.command, handler.path, body or None, dict(handler.headers))
            response = upstream.getresponse()
            data = response.read()
        finally:
            upstream.close()
        if fault == "lost":
            handler.close_connection = True
            return
        handler.send_response(response.status)
        for name, value in response.getheaders():
            if name.lower() not in ("content-length", "transfer-encoding", "connection", "server", "date"):
                handler.send_header(name, value)
        length = response.getheader("Content-Length") if handler.command == "HEAD" else len(data)
        handler.send_header("Content-Length", str(length or 0))
        handler.end_headers()
        if fault == "cut" and data:
            handler.wfile.write(data[: len(data) // 2])
            handler.close_connection = True
        else:
            handler.wfile.write(data)

    def _refuse(self, handler, status, code, message):
        text = f'<?xml version="1.0"?><Error><Code>{code}</Code><Message>{message}</Message></Error>'.encode()
        handler.send_response(status)
        handler.send_header("Content-Type", "application/xml")
        handler.send_header("Content-Length", str(len(text)))
        handler.end_headers()
        if handler.command != "HEAD":
            handler.wfile.write(text)
