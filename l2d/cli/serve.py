"""Serve a checkpoint to any OpenAI client: `python -m l2d serve DIR [--host --port --budget ...]`.

The application is transformers' own (`transformers serve`); `l2d.cli.serving` puts the checkpoint into it.
"""

import argparse
import contextlib
import socket

from l2d.cli.session import add_sampler_arguments, sampler_from, session_from

USUAL_LENGTH = 1024
"""Most tokens of an answer where neither the request nor the command says so."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `python -m l2d serve`."""
    add_sampler_arguments(parser)
    parser.add_argument("--host", default="localhost", help="address to listen on; 0.0.0.0 is every one")
    parser.add_argument("--port", type=int, default=8000, help="0 takes a free one")


def run(given: argparse.Namespace) -> None:
    """Serve until SIGTERM or SIGINT, after which running requests are finished. Raises `ValueError`."""
    from transformers.utils import logging
    from transformers.utils.import_utils import is_serve_available

    if not is_serve_available():
        raise ValueError("serve needs fastapi, uvicorn and openai, which are not installed: pip install 'l2d[serve]'.")
    listening = _listen(given.host, given.port)
    with contextlib.closing(listening):
        session = session_from(given)
        length = session.answer_length(given.max_new_tokens, USUAL_LENGTH)
        import uvicorn

        from l2d.cli.serving.application import build_application

        logging.get_logger("transformers.cli.serving").setLevel(logging.ERROR)  # one line for every request
        app = build_application(session, given.folder, sampler_from(given), given.temperature, length)
        host, port = listening.getsockname()[:2]
        used = session.model.sampler(sampler_from(given))
        address = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
        print(f"{given.folder} at {address}/v1: T = {used.budget}, {used.solver}.", flush=True)
        uvicorn.Server(uvicorn.Config(app, log_level="warning")).run(sockets=[listening])


def _listen(host: str, port: int) -> socket.socket:
    """A socket that accepts connections from now on; they wait until the model is loaded. Raises `ValueError`."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=2048)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"host={host!r}, port={port} cannot be listened on ({reason}): choose another.") from error
