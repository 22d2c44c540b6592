"""An OpenAI-compatible endpoint on this machine, which answers what a test says."""

import contextlib
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple

Reply = tuple[int, dict[str, Any], dict[str, str]]  # status, body, headers


class Served(NamedTuple):
    url: str
    asked: list[tuple[dict[str, Any], dict[str, str]]]  # (body, headers), as they came


@contextlib.contextmanager
def serving(answer: Callable[[dict[str, Any], int], Reply]) -> Iterator[Served]:
    """`answer(body, n)` is the reply to the n-th request, from 0."""
    asked: list[tuple[dict[str, Any], dict[str, str]]] = []
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                asked.append((body, dict(self.headers)))
                status, reply, headers = answer(body, len(asked) - 1)
            sent = json.dumps(reply).encode()
            self.send_response(status)
            for name, value in {"Content-Length": str(len(sent)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(sent)

        def log_message(self, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield Served(f"http://127.0.0.1:{server.server_port}/v1", asked)
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def said(text: str, top: dict[str, float] | None = None) -> Reply:
    """An ordinary reply; `top` are log-probabilities of the first token."""
    choice: dict[str, Any] = {"message": {"role": "assistant", "content": text}}
    if top is not None:
        listed = [{"token": token, "logprob": logp} for token, logp in top.items()]
        choice["logprobs"] = {"content": [{"token": text[:1], "top_logprobs": listed}]}
    usage = {"prompt_tokens": 100, "completion_tokens": 2}
    return 200, {"choices": [choice], "usage": usage}, {}
