"""Transformers' serving application with one L2D checkpoint in it.

- `build_application`: the FastAPI application, whose wrong requests get status 400 and one sentence
"""

import asyncio
from collections.abc import Callable
from typing import Any

import jinja2
from fastapi import FastAPI, HTTPException
from fastapi import Request as HttpRequest
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from transformers.cli.serving.server import build_server

from l2d.cli.serving.answers import finish
from l2d.cli.serving.handlers import ChatHandler, OneModel, OneQueue, ResponsesHandler, TextHandler
from l2d.cli.serving.request import Request
from l2d.cli.session import Session

ENDPOINTS: dict[str, Any] = {
    "/v1/chat/completions": ChatHandler,
    "/v1/completions": TextHandler,
    "/v1/responses": ResponsesHandler,
}
_KEPT = ("/v1/models", "/load_model", "/health")
"""Routes of transformers' application that stay as they are; the others are for several models, or for speech."""


def build_application(
    session: Session, name: str, sampler: dict[str, Any], temperature: float, max_new_tokens: int
) -> FastAPI:
    """The application that serves `session` as `name`.

    Args:
        sampler, temperature, max_new_tokens: what holds where a request says nothing.
    """
    manager, state = OneModel(session, name), OneQueue()
    nobody: Any = None  # all routes of handlers are ours
    app = build_server(manager, nobody, nobody, nobody, nobody, nobody, state)
    app.router.routes[:] = [route for route in app.router.routes if getattr(route, "path", "") in _KEPT]

    def route(path: str, kind: Any) -> None:
        @app.post(path)
        async def answer(http: HttpRequest, body: dict) -> Any:
            kind.check(body)
            request = Request(session, body, sampler, temperature, max_new_tokens)
            handler = kind(manager, state, request, body)
            watch = asyncio.create_task(_watch(http.receive, request))
            try:
                response = await handler.handle_request(body, http.state.request_id)
            except BaseException:
                watch.cancel()
                raise
            return finish(response, request, watch.cancel)

    for path, kind in ENDPOINTS.items():
        route(path, kind)
    for error in (ValueError, HTTPException, RequestValidationError, jinja2.TemplateError):
        app.add_exception_handler(error, _refuse)
    return app


async def _watch(receive: Callable[[], Any], request: Request) -> None:
    """Let the answer end when the client has gone."""
    while (await receive())["type"] != "http.disconnect":
        pass
    request.cancelled.set()


async def _refuse(_: HttpRequest, error: Exception) -> JSONResponse:
    """Status 400 and the error's sentence, as OpenAI's clients read it."""
    text = str(getattr(error, "detail", None) or error)
    if isinstance(error, RequestValidationError):
        text = "the body of a request must be a JSON object."
    status = error.status_code if isinstance(error, HTTPException) and error.status_code >= 500 else 400
    content = {"message": " ".join(text.split()), "type": "invalid_request_error", "param": None, "code": None}
    return JSONResponse({"error": content}, status_code=status)
