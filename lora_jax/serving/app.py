"""The server as an ASGI application: routes, who may use them, and errors in OpenAI's form."""

import asyncio
import contextlib
import hmac
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping
from typing import Any

from starlette import applications, exceptions, requests, responses, routing
from starlette.middleware import Middleware, cors

import lora_jax
from lora_jax.serving import page, refusal, server
from lora_jax.serving.replies import answers
from lora_jax.serving.requests import fields

_OPEN = ("/health", "/")  # without an API key: alive or not, and the page, which asks for the key
_GONE = 499  # nginx's status for a client that has left; nobody gets it


def make(serving: server.Server) -> applications.Starlette:
    """The application."""

    def post(path: str, answer: Callable[[dict[str, Any]], Awaitable[Any]]) -> routing.Route:
        async def endpoint(request: requests.Request) -> responses.Response:
            return await _answered(serving, request, answer)

        return routing.Route(path, endpoint, methods=["POST"])

    def get(path: str, answer: Callable[[requests.Request], Any]) -> routing.Route:
        async def endpoint(request: requests.Request) -> responses.Response:
            return _response(answer(request))

        return routing.Route(path, endpoint, methods=["GET"])

    async def chat_page(_: requests.Request) -> responses.Response:
        return responses.HTMLResponse(
            page.page(),
            headers={"content-security-policy": page.POLICY, "referrer-policy": "no-referrer"},
        )

    def openai(prefix: str) -> list[routing.Route]:
        def one(request: requests.Request) -> Any:
            return serving.models.one(request.path_params["id"])

        return [
            post(f"{prefix}/chat/completions", serving.chat),
            post(f"{prefix}/completions", serving.completion),
            post(f"{prefix}/responses", serving.response),
            get(f"{prefix}/models", lambda _: {"object": "list", "data": serving.models.listed()}),
            get(f"{prefix}/models/{{id:path}}", one),
        ]

    async def ping(_: requests.Request) -> responses.Response:
        return responses.Response()

    @contextlib.asynccontextmanager
    async def lifespan(_: applications.Starlette) -> AsyncIterator[None]:
        serving.start()
        yield
        serving.stop()

    limits = serving.limits
    middleware = [Middleware(_Counted, serving=serving)]
    if limits.allow_origin:
        middleware.append(
            Middleware(
                cors.CORSMiddleware,
                allow_origins=limits.allow_origin,
                allow_methods=["GET", "POST"],
                allow_headers=["*"],
                expose_headers=["x-request-id", "retry-after"],
            )
        )
    if limits.api_key is not None:
        middleware.append(Middleware(_Guarded, key=limits.api_key))
    return applications.Starlette(
        routes=[
            *openai("/v1"),
            *openai(""),  # for clients whose address lacks the /v1
            post("/v1/load_lora_adapter", serving.load_adapter),
            post("/v1/unload_lora_adapter", serving.unload_adapter),
            post("/tokenize", serving.tokenize),
            post("/detokenize", serving.detokenize),
            get("/tokenizer_info", lambda _: serving.tokenizer_info()),
            get("/health", lambda _: serving.health()),
            routing.Route("/", chat_page, methods=["GET"]),
            routing.Route("/ping", ping, methods=["GET", "POST"]),
            get("/version", lambda _: {"version": lora_jax.__version__}),
            get("/metrics", lambda _: serving.metrics_text()),
        ],
        middleware=middleware,
        exception_handlers={
            refusal.Refusal: _refused,
            exceptions.HTTPException: _http_error,
            Exception: _failed,
        },
        lifespan=lifespan,
    )


async def _answered(
    serving: server.Server,
    request: requests.Request,
    answer: Callable[[dict[str, Any]], Awaitable[Any]],
) -> responses.Response:
    """Reads the body and answers it, unless the client leaves before the answer is there."""

    async def found() -> responses.Response:
        given = await answer(fields.parse(body))
        if not isinstance(given, answers.Answer):
            return _response(given)
        headers = {"x-request-id": given.id}
        if given.streams:
            return _Events(given, headers)
        return _response(await given.whole(), headers)

    with serving.admitted():
        try:
            async with asyncio.timeout(serving.limits.timeout):
                body = await _body(request, serving.limits.max_body)
            return await _unless_gone(request.receive, found())
        except TimeoutError:
            raise refusal.Refusal("The body took too long to arrive.", status=408) from None
        except (requests.ClientDisconnect, _Gone):
            return responses.Response(status_code=_GONE)


async def _body(request: requests.Request, most: int) -> bytes:
    """The body, at most `most` bytes of it.

    Pages of other sites can send anything to this machine but JSON, without asking it first.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json" and not kind.endswith("+json"):
        raise refusal.Refusal("The Content-Type must be application/json.", status=415)
    too_large = refusal.Refusal(f"The body is larger than {most} bytes.", status=413)
    announced = request.headers.get("content-length", "")
    if announced.isdigit() and (len(announced) > 18 or int(announced) > most):
        raise too_large
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > most:
            raise too_large
        parts.append(part)
    return b"".join(parts)


class _Gone(Exception):
    """The client has left."""


async def _unless_gone(
    receive: Callable[[], Awaitable[Any]], work: Coroutine[Any, Any, Any]
) -> Any:
    """The result of `work`, which is cancelled if the client leaves. Raises: _Gone then."""

    async def gone() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise _Gone
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


class _Events(responses.Response):
    """An answer as server-sent events."""

    media_type = "text/event-stream"

    def __init__(self, answer: answers.Answer, headers: Mapping[str, str]):
        more = {"cache-control": "no-cache", "x-accel-buffering": "no"}
        super().__init__(headers={**headers, **more})
        del self.headers["content-length"]
        self._answer = answer

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def sent() -> None:
            start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
            await send(start)
            async with contextlib.aclosing(self._answer.events()) as events:
                async for event in events:
                    part = {"body": event.encode(), "more_body": True}
                    await send({"type": "http.response.body", **part})
            await send({"type": "http.response.body", "body": b""})

        try:
            with contextlib.suppress(_Gone):
                await _unless_gone(receive, sent())
        finally:
            self._answer.abort()


class _Guarded:
    """Lets pass what has the key."""

    def __init__(self, app: Any, key: str):
        self._app, self._key = app, key.encode()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http" and scope["path"] not in _OPEN:
            given = dict(scope["headers"]).get(b"authorization", b"")
            scheme, _, token = given.partition(b" ")
            same = hmac.compare_digest(token.strip(), self._key)
            if not (same and scheme.lower() == b"bearer"):
                error = refusal.Refusal(
                    "The API key is missing or wrong: Authorization: Bearer KEY",
                    status=401, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"},
                )  # fmt: skip
                return await _error(error)(scope, receive, send)
        await self._app(scope, receive, send)


class _Counted:
    """Counts the responses by their status."""

    def __init__(self, app: Any, serving: server.Server):
        self._app, self._responses = app, serving.metrics.responses

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def counted(message: Any) -> None:
            if message["type"] == "http.response.start":
                self._responses.add(1, str(message["status"]))
            await send(message)

        try:
            await self._app(scope, receive, counted if scope["type"] == "http" else send)
        except Exception:
            self._responses.add(1, "500")
            raise


def _response(content: Any, headers: Mapping[str, str] | None = None) -> responses.Response:
    if isinstance(content, str):
        return responses.PlainTextResponse(content, headers=headers)
    return responses.JSONResponse(content, headers=headers)


def _error(error: refusal.Refusal) -> responses.Response:
    return responses.JSONResponse(error.body, error.status, headers=error.headers)


async def _refused(_: requests.Request, error: Exception) -> responses.Response:
    assert isinstance(error, refusal.Refusal)
    return _error(error)


async def _http_error(request: requests.Request, error: Exception) -> responses.Response:
    assert isinstance(error, exceptions.HTTPException)
    message = f"{request.method} {request.url.path}: {error.detail}"
    if error.status_code == 404:
        message += "; here are /v1/chat/completions, /v1/completions, /v1/responses, /v1/models"
    return _error(refusal.Refusal(message, status=error.status_code, headers=error.headers))


async def _failed(_: requests.Request, error: Exception) -> responses.Response:
    """What is an error of this program: the log has it, the client only that there is one."""
    print(f"error in lora_jax, please report it: {error!r}", file=sys.stderr)
    return _error(refusal.Refusal("An error in the server; its log has more.", status=500))
