"""The Dockerfile: what it copies and starts exists. `python -m tests.container DIR` runs its steps.

Run: `python -m pytest tests/test_container.py`
"""

import json
import shlex

from tests.conftest import REPOSITORY
from tests.container import instructions
from tests.test_house import parse


def test_the_default_command_is_the_server():
    steps = dict(instructions())
    parse([*json.loads(steps["ENTRYPOINT"]), *json.loads(steps["CMD"])], False)
    assert json.loads(steps["ENTRYPOINT"])[2:4] == ["l2d", "serve"]


def test_everything_that_is_copied_is_there_and_not_ignored():
    allowed = (REPOSITORY / ".dockerignore").read_text().split()
    for name, rest in instructions():
        for source in rest.split()[:-1] if name == "COPY" else ():
            assert (REPOSITORY / source).exists() and f"!{source}" in allowed
    packages = {"l2d", "lm_eval_ext", "training"}
    assert packages <= {rest.split()[0] for name, rest in instructions() if name == "COPY"}


def test_the_comments_show_commands_of_the_server():
    text = (REPOSITORY / "Dockerfile").read_text()
    runs = [line.split("l2d ", 1)[1] for line in text.splitlines() if line.startswith("#   docker run")]
    assert len(runs) == 2
    for words in runs:
        parse(["python", "-m", "l2d", "serve", *shlex.split(words.removeprefix("l2d "))], False)
