"""A server of a reward over loopback, in a thread, that remembers what it was asked."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Answer = tuple[int, Any]  # status, and JSON or text


@dataclass
class JudgeServer:
    """answer(body, number of the request) says what comes back."""

    answer: Callable[[dict, int], Answer]
    url: str = ""
    bodies: list[dict] = field(default_factory=list)
    headers: list[dict] = field(default_factory=list)
    most_at_a_time: int = 0
    _now: int = 0
    _lock: Any = field(default_factory=threading.Lock)

    def asked(self) -> list[str]:
        """Completions, in every request that was answered."""
        return [completion for body in self.bodies for completion in body["completions"]]


@contextlib.contextmanager
def serving(answer: Callable[[dict, int], Answer]) -> Iterator[JudgeServer]:
    state = JudgeServer(answer)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with state._lock:
                number = len(state.headers)
                state.headers.append(dict(self.headers))
                state._now += 1
                state.most_at_a_time = max(state.most_at_a_time, state._now)
            status, said = state.answer(body, number)
            with state._lock:
                state._now -= 1
                if status == 200:
                    state.bodies.append(body)
            content = (said if isinstance(said, str) else json.dumps(said)).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    state.url = f"http://127.0.0.1:{server.server_address[1]}/score"
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
