"""A server of the OpenAI-compatible API over loopback that answers as a test wants, and remembers what it was asked."""

from __future__ import annotations

import http.server
import json
import threading
from collections.abc import Callable, Sequence
from typing import Any


class StandIn:
    """`answer(body, number)`, number from 0, gives an object, a status of an error, or None: it hangs up without a word.

    A body without "prompt" and "messages" is not passed on: GET /models lists `models`.
    """

    def __init__(self, answer: Callable[[dict, int], Any], models: Sequence[str] = ("policy",)):
        self.answer, self.models = answer, models
        self.asked: list[dict] = []
        self.keys: list[str | None] = []
        self._lock = threading.Lock()

    def __enter__(self) -> StandIn:
        stand_in = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                self._say(200, {"object": "list", "data": [{"id": one, "object": "model"} for one in stand_in.models]})

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with stand_in._lock:
                    number = len(stand_in.asked)
                    stand_in.asked.append(body | {"path": self.path})
                    stand_in.keys.append(self.headers.get("Authorization"))
                said = stand_in.answer(body, number)
                if said is None:
                    self.close_connection = True
                elif isinstance(said, int):
                    shown = (stand_in.keys[number] or "").removeprefix("Bearer ")  # as some servers do
                    self._say(said, {"error": {"message": f"status {said} was asked for by {shown}"}})
                else:
                    self._say(200, said)

            def _say(self, status, value):
                content = json.dumps(value).encode()
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

    @property
    def base_url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}/v1"


def completion(choices: Sequence[dict], prompt_tokens: int | None = None) -> dict:
    """An answer of /v1/completions; a choice has text, finish_reason and what else a test wants."""
    usage = None if prompt_tokens is None else {"prompt_tokens": prompt_tokens, "completion_tokens": 0, "total_tokens": 0}
    numbered = [{"index": i, "finish_reason": "stop"} | one for i, one in enumerate(choices)]
    return {"id": "x", "object": "text_completion", "created": 0, "model": "m", "choices": numbered, "usage": usage}
