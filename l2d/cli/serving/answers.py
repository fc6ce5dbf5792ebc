"""What goes back to the client: transformers' answers, cut at stop strings, with evaluations in their usage.

- `finish`: a whole answer or a stream of events, completed in place
- `StopCut`: text that comes in pieces, up to the first stop string
"""

import json
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from typing import Any

from fastapi.responses import JSONResponse, StreamingResponse

from l2d.cli.serving.request import Request


class StopCut:
    """Text in pieces, up to the first of `stops`; what may yet become one is held back."""

    def __init__(self, stops: list[str]):
        self.stops, self.text, self.sent = stops, "", 0

    def add(self, piece: str, last: bool = False) -> str:
        """What can be shown now that `piece` came; with `last` also what was held back."""
        self.text += piece
        found = [place for stop in self.stops if (place := self.text.find(stop)) >= 0]
        begun = [
            size for stop in self.stops for size in range(1, len(stop)) if not last and self.text.endswith(stop[:size])
        ]
        end = min(found) if found else len(self.text) - max(begun, default=0)
        shown, self.sent = self.text[self.sent : end], max(self.sent, end)
        return shown


def finish(response: Any, request: Request, done: Callable[[], Any]) -> Any:
    """`response` of one of transformers' handlers, completed; `done` is called when all of it was sent."""
    if isinstance(response, StreamingResponse):
        response.body_iterator = _events(response.body_iterator, request, done)
        return response
    done()
    content = json.loads(response.body)
    for choice in content.get("choices", ()):
        _cut(choice.get("message", choice), StopCut(request.stops), last=True)
    _add_usage(content, request)
    return JSONResponse(content)


async def _events(events: Any, request: Request, done: Callable[[], Any]) -> AsyncIterator[str]:
    cut, chat_or_text = StopCut(request.stops), False
    try:
        async with aclosing(events):
            async for part in events:
                lines = [line.removeprefix("data: ") for line in part.split("\n\n") if line]
                for line in lines:
                    if request.error is not None and '"error"' in line:
                        error = {"message": request.error, "type": "invalid_request_error"}
                        yield f"data: {json.dumps({'error': error})}\n\n"
                        return
                    event = json.loads(line)
                    for choice in event.get("choices", ()):
                        chat_or_text = True
                        _cut(choice.get("delta", choice), cut, last=choice.get("finish_reason") is not None)
                    _add_usage(event.get("response", event), request)
                    yield f"data: {json.dumps(event)}\n\n"
        if chat_or_text:
            yield "data: [DONE]\n\n"
    finally:
        request.cancelled.set()  # if the client went away, generation ends
        done()


def _cut(holder: dict[str, Any], cut: StopCut, last: bool) -> None:
    """Cut the text of a message, a choice or a piece of them."""
    name = "text" if "text" in holder else "content"
    if holder.get(name) or last:
        text = cut.add(holder.get(name) or "", last)
        if text or name in holder:
            holder[name] = text


def _add_usage(content: dict[str, Any], request: Request) -> None:
    if content.get("usage"):
        content["usage"] |= {"nfe_requested": request.nfe_requested, "nfe_computed": request.nfe_computed}
