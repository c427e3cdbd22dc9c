"""A web server on loopback with good photographs and all that may come instead of them."""

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit


class Web:
    """pages: path -> what answers it, given the handler and how often it was asked."""

    def __init__(self) -> None:
        self.pages: dict[str, Callable[[Handler, int], None]] = {}
        self.asked: Counter[str] = Counter()
        self.times: dict[str, list[float]] = {}
        self.agents: set[str] = set()
        self.lock = threading.Lock()
        self.port = 0

    def url(self, path: str, host: str = "127.0.0.1") -> str:
        return f"http://{host}:{self.port}{path}"

    def file(self, path: str, data: bytes, kind: str = "image/jpeg", **headers: str) -> str:
        told = {name.replace("_", "-"): value for name, value in headers.items()}
        self.pages[path] = lambda handler, times: handler.answer(
            200, data, {"Content-Type": kind, **told}
        )
        return self.url(path)

    def status(self, path: str, code: int, **headers: str) -> str:
        told = {name.replace("_", "-"): value for name, value in headers.items()}
        self.pages[path] = lambda handler, times: handler.answer(code, b"", told)
        return self.url(path)

    def page(self, path: str, answer: Callable[["Handler", int], None]) -> str:
        self.pages[path] = answer
        return self.url(path)


class Handler(BaseHTTPRequestHandler):
    web: Web
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        web, path = self.web, urlsplit(self.path).path
        with web.lock:
            web.asked[self.path] += 1
            web.asked[path] += self.path != path
            web.times.setdefault(path, []).append(time.monotonic())
            web.agents.add(self.headers["User-Agent"])
            times = web.asked[path]
        try:
            web.pages.get(path, lambda handler, _: handler.answer(404, b"not here"))(self, times)
        except OSError:  # it has gone
            self.close_connection = True

    def answer(self, code: int, data: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(code)
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def endless(self, piece: bytes, announced: int | None = None) -> None:
        """Until the other side has gone."""
        self.send_response(200)
        if announced is not None:
            self.send_header("Content-Length", str(announced))
        self.send_header("Connection", "close")
        self.end_headers()
        self.close_connection = True
        while True:
            self.wfile.write(piece)

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def web_server() -> Iterator[Web]:
    web = Web()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"web": web}))
    server.daemon_threads = True
    web.port = server.server_port
    thread = threading.Thread(target=server.serve_forever, args=[0.01], daemon=True)
    thread.start()
    try:
        yield web
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
