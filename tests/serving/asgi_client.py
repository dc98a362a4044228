"""Asks an ASGI application in this thread, without a socket."""

import asyncio
import json
from typing import NamedTuple


class Answer(NamedTuple):
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self):
        return json.loads(self.body)

    @property
    def error(self):
        found = self.json
        assert list(found) == ["error"] and set(found["error"]) == {
            "message", "type", "param", "code",
        }  # fmt: skip
        return found["error"]

    @property
    def events(self):
        """The data of the server-sent events, which must end with [DONE]."""
        frames = self.body.decode().split("\n\n")
        assert frames.pop() == ""
        data = [frame.removeprefix("data: ") for frame in frames if not frame.startswith(":")]
        assert data.pop() == "[DONE]"
        return [json.loads(each) for each in data]


class Client:
    """One application; use it in one `with`, in which its lifespan is."""

    def __init__(self, app):
        self._app = app
        self._runner = asyncio.Runner()

    def __enter__(self):
        self._runner.__enter__()
        self._lifespan = self._app.router.lifespan_context(self._app)
        self._runner.run(self._lifespan.__aenter__())
        return self

    def __exit__(self, *raised):
        self._runner.run(self._lifespan.__aexit__(None, None, None))
        self._runner.__exit__(*raised)

    def run(self, coroutine):
        return self._runner.run(coroutine)

    def get(self, path, **headers):
        return self.run(self.ask("GET", path, b"", headers))

    def post(self, path, body=None, headers=None, **fields):
        body = json.dumps(fields).encode() if body is None else body
        return self.run(self.ask("POST", path, body, headers or {}))

    async def ask(self, method, path, body=b"", headers=(), *, leaves=None, arrived=None):
        """leaves: an event at which the client leaves. arrived: a list to which parts are added."""
        headers = {"content-type": "application/json"} | dict(headers)
        parts = [{"type": "http.request", "body": body, "more_body": False}]
        sent = [] if arrived is None else arrived
        ended = asyncio.Event()

        async def receive():
            if parts:
                return parts.pop(0)
            await (leaves or ended).wait()
            return {"type": "http.disconnect"}

        async def send(message):
            sent.append(message)

        scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": method,
            "path": path,
            "raw_path": path.encode(),
            "root_path": "",
            "scheme": "http",
            "query_string": b"",
            "headers": [(name.lower().encode(), value.encode()) for name, value in headers.items()],
            "client": ("127.0.0.1", 1),
            "server": ("127.0.0.1", 80),
        }
        await self._app(scope, receive, send)
        if not sent:
            return None
        first = sent[0]
        return Answer(
            first["status"],
            {name.decode(): value.decode() for name, value in first["headers"]},
            b"".join(part.get("body", b"") for part in sent[1:]),
        )
