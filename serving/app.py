"""The routes: REST as published for OpenVLA and OpenVLA-OFT, health, metrics, and the status page."""

import asyncio
import json
import time
from collections.abc import Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request, Response, WebSocket
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from robot_data.episode import dimension_names

from . import schema
from .guard import Guard, loopback_hosts
from .observations import MAX_NAME, sends_arrays
from .openpi import Connection
from .service import Answer, Service, ServingError
from .wire import WireError, dump_json, load_json


PAGE = Path(__file__).with_name("page.html")
# What the page needs and no more: nothing from elsewhere, and no other page around it.
CONTENT_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src 'self' blob: data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
COMPACT = (",", ":")  # as Starlette separates


@dataclass(frozen=True)
class Settings:
    """
    Args:
        host (`str`): Name that the server is bound to.
        token (`str`, *optional*): See [`Guard`].
        max_body (`int`): Bytes of a request, or of a websocket's frame.
        body_timeout (`float`): In seconds, for a body to arrive.
        send_timeout (`float`): In seconds, for a websocket's client to read an answer.
        legacy_errors (`bool`): Answer failures of `/act` as the published server does: `"error"`, with status 200.
    """

    host: str = "127.0.0.1"
    token: str | None = None
    max_body: int = 16 * 2**20
    body_timeout: float = 10.0
    send_timeout: float = 10.0
    legacy_errors: bool = False


def create_app(service: Service, settings: Settings) -> FastAPI:
    """The ASGI application of a service, which it closes when it ends."""

    @asynccontextmanager
    async def lifespan(app: FastAPI):
        yield
        await asyncio.to_thread(service.close)

    # The pages of the documentation would load their scripts from elsewhere: /openapi.json remains.
    app = FastAPI(
        title="OpenVLA policy server",
        version="1",
        description=schema.DESCRIPTION,
        docs_url=None,
        redoc_url=None,
        lifespan=lifespan,
    )
    app.add_middleware(
        Guard,
        token=settings.token,
        hosts=loopback_hosts(settings.host),
        max_body=settings.max_body,
        body_timeout=settings.body_timeout,
    )
    app.add_exception_handler(ServingError, _error_response)
    app.add_exception_handler(ClientDisconnect, _gone_response)
    app.add_exception_handler(Exception, _unexpected_response)
    _add_action_routes(app, service, settings)
    _add_status_routes(app, service)
    return app


def _add_action_routes(app: FastAPI, service: Service, settings: Settings) -> None:
    @app.post("/act", openapi_extra={"requestBody": schema.ACT_REQUEST}, responses=schema.ACT_RESPONSES)
    async def act(request: Request) -> Response:
        """The action for one observation."""
        try:
            return await _act(request, service)
        except ServingError as error:
            if settings.legacy_errors:
                return JSONResponse("error")
            return _error_response(request, error)

    @app.post("/reset", openapi_extra={"requestBody": schema.RESET_REQUEST}, responses=schema.RESET_RESPONSES)
    async def reset(request: Request) -> Response:
        """Forget a session: what waits or runs for it is answered with 409."""
        try:
            fields = load_json(await request.body())
        except WireError as error:
            raise ServingError(400, 1007, "malformed", str(error)) from error
        session_id = fields.get("session_id") if isinstance(fields, dict) else None
        if not isinstance(session_id, str) or not 0 < len(session_id) <= MAX_NAME:
            raise ServingError(422, 1007, "invalid", f"`session_id` must be a text of 1 to {MAX_NAME} characters.")
        return JSONResponse({"dropped": service.reset(session_id)})

    @app.websocket("/")
    async def websocket(websocket: WebSocket) -> None:
        await Connection(websocket, service, settings.send_timeout).serve()


def _add_status_routes(app: FastAPI, service: Service) -> None:
    @app.get("/healthz", response_class=PlainTextResponse)
    async def healthz() -> str:
        """Whether the process answers at all."""
        return "OK\n"

    @app.get("/readyz", response_class=PlainTextResponse, responses=schema.READY_RESPONSES)
    async def readyz() -> Response:
        """Whether the policy answers: not while shutting down, nor after several failures in a row."""
        is_ready = service.is_ready
        return PlainTextResponse("OK\n" if is_ready else "not ready\n", 200 if is_ready else 503)

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        """For Prometheus."""
        return Response(service.metrics.render(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/status")
    async def status() -> dict[str, Any]:
        """What is loaded, and the times of the latest answers in milliseconds."""
        metrics, dims = service.metrics, service.description["action_dims"]
        return {
            "policy": service.description,
            "dimensions": {key: list(dimension_names(size)) for key, size in dims.items()},
            "is_ready": service.is_ready,
            "seconds_up": round(time.time() - metrics.began, 1),
            "outcomes": dict(metrics.outcomes),
            "open_requests": service.num_open,
            "recent": list(metrics.recent),
        }

    @app.get("/", response_class=HTMLResponse)
    async def page() -> Response:
        """The status page."""
        headers = {"Content-Security-Policy": CONTENT_POLICY, "X-Content-Type-Options": "nosniff"}
        return HTMLResponse(await asyncio.to_thread(PAGE.read_text, encoding="utf-8"), headers=headers)


async def _act(request: Request, service: Service) -> Response:
    content_type = request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
    if content_type == "multipart/form-data":
        fields = await _form_fields(request)
        answer = await _until_gone(request, service.answer("multipart", lambda: fields))
        return _plain_response(answer)
    if content_type != "application/json" and not content_type.endswith("+json"):
        raise ServingError(415, 1003, "malformed", "The body must be application/json or multipart/form-data.")
    body = await request.body()
    message: dict[str, Any] = {}

    def read() -> Any:
        message["fields"], message["is_encoded"] = _json_fields(body)
        return message["fields"]

    answer = await _until_gone(request, service.answer("rest", read))
    if not sends_arrays(message["fields"]):
        return _plain_response(answer)
    return _published_response(answer, "full_image" in message["fields"], message["is_encoded"])


def _json_fields(body: bytes) -> tuple[Any, bool]:
    """Fields of a message, and whether they were a JSON text within the JSON."""
    fields = load_json(body)
    if not isinstance(fields, dict) or "encoded" not in fields:
        return fields, False
    if len(fields) > 1 or not isinstance(fields["encoded"], str):
        raise WireError("`encoded` must be a JSON text, and the only key.")
    return load_json(fields["encoded"]), True


async def _form_fields(request: Request) -> dict[str, Any]:
    """Fields of a form: files are pictures, `state` is a JSON list, and empty ones count as left out."""
    await request.body()
    fields: dict[str, Any] = {}
    try:
        async with request.form(max_files=8, max_fields=16) as form:
            for name, value in form.multi_items():
                if content := await value.read() if isinstance(value, UploadFile) else value:
                    fields[name] = content
        if "state" in fields:
            fields["state"] = load_json(fields["state"])
    except HTTPException as error:
        raise ServingError(400, 1007, "malformed", str(error.detail)) from error
    except WireError as error:
        raise ServingError(400, 1007, "malformed", f"`state` must be a JSON list of numbers. {error}") from error
    return fields


async def _until_gone(request: Request, answer: Coroutine[Any, Any, Answer]) -> Answer:
    """The answer; cancelled when the client has gone, so that nobody computes for it."""
    task, watcher = asyncio.create_task(answer), asyncio.create_task(_disconnected(request))
    try:
        await asyncio.wait({task, watcher}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ServingError(499, 1001, "gone", "The client has gone.")
        return task.result()
    finally:
        task.cancel()
        watcher.cancel()


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _published_response(answer: Answer, is_oft: bool, is_encoded: bool) -> Response:
    """As the published servers answer: an array of json_numpy, or of OpenVLA-OFT a list of them, one per action."""
    actions = answer.prediction.actions  # (K, D)
    value: Any = list(actions) if is_oft else actions[0] if len(actions) == 1 else actions
    if answer.observation.uncertainty:
        value = {"actions": value, "entropy": answer.prediction.entropy}
    content = dump_json(dump_json(value) if is_encoded else value, COMPACT)
    return Response(content, media_type="application/json", headers=_timing_header(answer))


def _plain_response(answer: Answer) -> Response:
    """Numbers that any language reads, for clients that send no arrays."""
    prediction = answer.prediction
    content: dict[str, Any] = {
        "actions": prediction.actions.tolist(),
        "timing_ms": answer.timing(),
        "batch_size": prediction.batch_size,
    }
    if answer.observation.uncertainty:
        content["entropy"] = None if prediction.entropy is None else prediction.entropy.tolist()
    return JSONResponse(content, headers=_timing_header(answer))


def _timing_header(answer: Answer) -> dict[str, str]:
    """https://www.w3.org/TR/server-timing"""
    return {"Server-Timing": ", ".join(f"{stage};dur={spent:.3f}" for stage, spent in answer.timing().items())}


def _error_response(request: Request, error: ServingError) -> Response:
    headers = {"Retry-After": "1"} if error.status in (429, 503) else {}
    # What a request quotes back may hold what UTF-8 does not: escaped, unlike Starlette's JSON.
    content = json.dumps({"detail": error.message})
    return Response(content, error.status, headers, media_type="application/json")


def _gone_response(request: Request, error: ClientDisconnect) -> Response:
    return Response(status_code=499)  # nobody reads it


def _unexpected_response(request: Request, error: Exception) -> Response:
    return JSONResponse({"detail": "The server failed; its log says how."}, 500)
