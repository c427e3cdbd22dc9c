"""A small HTTP server on loopback that speaks OpenAI's chat protocol, and misbehaves."""

import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

# class, times asked -> status, content (None: no choices; bytes: the body)
Answer = Callable[[str, int], tuple[int, str | bytes | None]]


class Chat:
    """What it was asked, and how many requests it had at a time."""

    def __init__(self, answer: Answer) -> None:
        self.answer = answer
        self.asked: list[str] = []
        self.bodies: list[dict] = []
        self.now = self.most = 0
        self.lock = threading.Lock()
        self.url = ""


@contextmanager
def chat_server(answer: Answer, seconds: float = 0.0) -> Iterator[Chat]:
    """seconds: that an answer takes."""
    chat = Chat(answer)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            name = re.search(r'For the class "(.+?)"', body["messages"][0]["content"])[1]
            with chat.lock:
                chat.asked.append(name)
                chat.bodies.append(body)
                chat.now += 1
                chat.most = max(chat.most, chat.now)
                times = chat.asked.count(name)
            time.sleep(seconds)
            status, content = chat.answer(name, times)
            with chat.lock:
                chat.now -= 1
            self.reply(status, content)

        def reply(self, status: int, content: str | bytes | None) -> None:
            message = {
                "index": 0,
                "finish_reason": "stop",
                "message": {"role": "assistant", "content": content},
            }
            answer = {
                "id": "1",
                "object": "chat.completion",
                "created": 0,
                "model": "m",
                "choices": [] if content is None else [message],
                "usage": {"prompt_tokens": 100, "completion_tokens": 20, "total_tokens": 120},
            }
            whole = answer if status == 200 else {"error": {"message": content}}
            data = content if isinstance(content, bytes) else json.dumps(whole).encode()
            try:
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                if status == 429:
                    self.send_header("retry-after-ms", "10")
                self.end_headers()
                self.wfile.write(data)
            except OSError:  # it did not wait for the answer
                pass

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    chat.url = f"http://127.0.0.1:{server.server_port}/v1"
    thread = threading.Thread(target=server.serve_forever, args=[0.01], daemon=True)
    thread.start()
    try:
        yield chat
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def categories(*names: str) -> str:
    return json.dumps(
        {"categories": [{"name": name, "description": f"a {name}"} for name in names]}
    )
