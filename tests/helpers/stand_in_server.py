"""A server over loopback, in a thread, that answers as a test wants and remembers what it was asked."""

from __future__ import annotations

import http.server
import json
import threading
from collections.abc import Callable, Sequence
from email.message import Message
from typing import Any


class StandIn:
    """`answer(body, number)`, number from 0, gives what is said (JSON or text), a status and what is said, the status of an
    error alone, or None: it hangs up without a word.

    GET lists `models`, as the OpenAI-compatible API does.
    """

    def __init__(self, answer: Callable[[dict, int], Any], models: Sequence[str] = ("policy",)):
        self.answer, self.models = answer, models
        self.asked: list[dict] = []  # bodies, each with its path
        self.headers: list[Message] = []  # whose names may be in any case
        self.bodies: list[dict] = []  # of requests that were answered with 200
        self.most_at_a_time = self._now = 0
        self._lock = threading.Lock()

    def __enter__(self) -> StandIn:
        stand_in = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                self._say(200, {"object": "list", "data": [{"id": one, "object": "model"} for one in stand_in.models]})

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                found = stand_in._answered(body, self.path, self.headers)
                if found is None:
                    self.close_connection = True
                else:
                    self._say(*found)

            def _say(self, status, said):
                content = (said if isinstance(said, str) else json.dumps(said)).encode()
                self.send_response(status)
                for name, header in {"Content-Type": "application/json", "Content-Length": len(content)}.items():
                    self.send_header(name, str(header))
                self.send_header("retry-after-ms", "5")  # or every test of an error takes seconds
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *args):
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(self, *error) -> None:
        self._server.shutdown()
        self._server.server_close()

    def _answered(self, body: dict, path: str, headers: Message) -> tuple[int, Any] | None:
        with self._lock:
            number = len(self.asked)
            self.asked.append(body | {"path": path})
            self.headers.append(headers)
            self._now += 1
            self.most_at_a_time = max(self.most_at_a_time, self._now)
        found = self.answer(body, number)
        if isinstance(found, int):  # with the key, which some servers show
            key = (self.keys[number] or "").removeprefix("Bearer ")
            found = found, {"error": {"message": f"status {found} was asked for by {key}"}}
        elif found is not None and not isinstance(found, tuple):
            found = 200, found
        with self._lock:
            self._now -= 1
            if found is not None and found[0] == 200:
                self.bodies.append(body)
        return found

    @property
    def keys(self) -> list[str | None]:
        return [headers.get("Authorization") for headers in self.headers]

    @property
    def completions(self) -> list[str]:
        """Of a judge: those in every request that was answered."""
        return [completion for body in self.bodies for completion in body["completions"]]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    @property
    def base_url(self) -> str:
        return f"{self.url}/v1"


def completion(choices: Sequence[dict], prompt_tokens: int | None = None) -> dict:
    """An answer of /v1/completions; a choice has text, finish_reason and what else a test wants."""
    usage = None if prompt_tokens is None else {"prompt_tokens": prompt_tokens, "completion_tokens": 0, "total_tokens": 0}
    numbered = [{"index": i, "finish_reason": "stop"} | one for i, one in enumerate(choices)]
    return {"id": "x", "object": "text_completion", "created": 0, "model": "m", "choices": numbered, "usage": usage}
