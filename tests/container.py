"""The steps of the Dockerfile without a container engine: in an environment of their own, then its server.

- `instructions`: the Dockerfile, parsed
- `python -m tests.container DIR`: runs COPY and RUN in a temporary folder, starts ENTRYPOINT for the checkpoint DIR,
  and asks HEALTHCHECK's question and one of a client (a minute or two; it installs torch)

What needs root or an image is left out: FROM, `useradd`, USER, VOLUME, EXPOSE.
"""

import argparse
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

from tests.conftest import REPOSITORY

DOCKERFILE = REPOSITORY / "Dockerfile"


def instructions() -> list[tuple[str, str]]:
    """Instruction and arguments of each line of the Dockerfile, continued lines joined, without comments."""
    text = re.sub(r"^#.*\n", "", DOCKERFILE.read_text(encoding="utf-8"), flags=re.M).replace("\\\n", " ")
    return [
        (name, rest.strip()) for name, _, rest in (line.partition(" ") for line in text.splitlines() if line.strip())
    ]


def build(root: Path, environment: dict[str, str]) -> Path:
    """Run COPY, ENV and RUN below `root`; returns the working directory."""
    place = root
    for name, rest in instructions():
        if name == "ENV":
            environment |= dict(pair.split("=", 1) for pair in rest.split())
        elif name == "WORKDIR":
            place = root / rest.lstrip("/")
            place.mkdir(parents=True, exist_ok=True)
        elif name == "COPY":
            *sources, target = rest.split()
            for source in sources:
                copy = shutil.copytree if (REPOSITORY / source).is_dir() else shutil.copy
                copy(REPOSITORY / source, place / target)
        elif name == "RUN" and "useradd" not in rest:
            print("$", rest, flush=True)
            subprocess.run(["sh", "-c", rest], cwd=place, env=environment, check=True)
    return place


def serve(place: Path, checkpoint: str, environment: dict[str, str]) -> str:
    """Start the default command for `checkpoint` on a free port; the answer to one prompt."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    steps = dict(instructions())
    command = [port if word == "8000" else word for word in json.loads(steps["ENTRYPOINT"])]
    assert json.loads(steps["CMD"]) == ["/model"]
    process = subprocess.Popen([*command, checkpoint], cwd=place, env=environment)
    try:
        question = json.loads(steps["HEALTHCHECK"].partition("CMD ")[2])
        question = [word.replace("8000", port) for word in question]
        end = time.monotonic() + 120
        while subprocess.run(question, env=environment, cwd=place, stderr=subprocess.DEVNULL).returncode:
            assert process.poll() is None and time.monotonic() < end, "the server did not start"
            time.sleep(1)
        body = json.dumps({"prompt": "2 + 2 =", "max_tokens": 4}).encode()
        address = f"http://127.0.0.1:{port}/v1/completions"
        ask = urllib.request.Request(address, body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(ask) as answer:
            return json.load(answer)["choices"][0]["text"]
    finally:
        process.terminate()
        process.wait(60)


def main() -> None:
    """Build and ask."""
    parser = argparse.ArgumentParser(prog="python -m tests.container", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", metavar="DIR", help="folder of an L2D checkpoint")
    checkpoint = str(Path(parser.parse_args().folder).resolve())
    with tempfile.TemporaryDirectory() as folder:
        venv, root = Path(folder) / "venv", Path(folder) / "root"
        subprocess.run([sys.executable, "-m", "venv", venv], check=True)
        environment = {**os.environ, "PATH": f"{venv / 'bin'}:{os.environ['PATH']}", "TORCH_INDEX": ""}
        environment.pop("PYTHONPATH", None)
        place = build(root, environment)
        environment["HF_HOME"] = str(Path(folder) / "cache")
        print(repr(serve(place, checkpoint, environment)))


if __name__ == "__main__":
    main()
