"""The list of mutations fits the source; `python -m tests.mutations` says whether the tests notice them.

Run: `python -m pytest tests/test_mutations.py` (about 20 seconds, most of it for the one that is tried)
"""

import ast
import subprocess
import sys

import pytest

from tests.conftest import REPOSITORY
from tests.mutations import Mutation, mutated
from tests.mutations.__main__ import MUTATIONS

AREAS = {"loss", "draws", "noise", "masks", "solver", "guidance", "scoring", "resume", "statistics", "data", "bases"}


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_the_edit_fits_its_file_and_its_tests_are_there(mutation):
    compile(mutated(mutation, REPOSITORY), mutation.file, "exec")
    for test in mutation.tests.split():
        file, _, name = test.partition("::")
        tree = ast.parse((REPOSITORY / file).read_text(encoding="utf-8"))
        names = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
        assert not name or name.partition("[")[0] in names, test


def test_every_area_has_mutations():
    names = [mutation.name for mutation in MUTATIONS]
    assert len(set(names)) == len(names) >= 60
    assert {name.partition(":")[0] for name in names} >= AREAS


def test_texts_that_are_not_there_once_are_errors(tmp_path):
    (tmp_path / "file.py").write_text("a = 1\nb = 1\n")
    assert mutated(Mutation("", "file.py", "a = 1", "a = 2", ""), tmp_path) == "a = 2\nb = 1\n"
    for old, new in (("c", "d"), (" = 1", " = 2"), ("a", "a")):
        with pytest.raises(ValueError, match="not once"):
            mutated(Mutation("", "file.py", old, new, ""), tmp_path)


def test_one_is_tried():
    command = [sys.executable, "-m", "tests.mutations", "--only", "Bonferroni"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "1 caught, 0 survived"
