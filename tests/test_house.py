"""The house: what may import what, what an import costs, and whether the documents say what is there.

- imports between the three packages, read from the sources and seen at run time
- every command that a document shows is parsed by that command's own parser
- no import runs in a circle or takes another module's private name; packages, modules and functions are small
- public functions, classes and methods have docstrings; links resolve; the version is the same everywhere

Run: `python -m pytest tests/test_house.py`
"""

import argparse
import ast
import importlib
import importlib.util
import re
import runpy
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.conftest import REPOSITORY
from tests.environments import CONSTRAINTS
from tests.versions import CORE, requirements

PACKAGES = ("l2d", "lm_eval_ext", "training")
DOCUMENTS = [
    *sorted(REPOSITORY.glob("*.md")),
    *sorted((REPOSITORY / "docs").rglob("*.md")),
    REPOSITORY / "training" / "recipes" / "README.md",
    REPOSITORY / "tests" / "benchmarks" / "RESULTS.md",
]
MAY_IMPORT = {"l2d": {"l2d"}, "lm_eval_ext": {"l2d", "lm_eval_ext"}, "training": {"l2d", "training"}}


def sources(package: str) -> list[Path]:
    """All Python files of a package."""
    return sorted((REPOSITORY / package).rglob("*.py"))


def run(code: str, *options: str) -> str:
    """Standard output of `code` in a new interpreter in the repository."""
    command = [sys.executable, *options, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY)
    assert done.returncode == 0, done.stderr
    return done.stdout


# ---- imports -----------------------------------------------------------------------------------------------------


def imported(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and top-level name of every import, wherever it stands, and of `import_module` of a literal."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name.split(".")[0]) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.lineno, (node.module or "").split(".")[0]
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if name in ("import_module", "__import__", "run_module"):
                yield node.lineno, str(node.args[0].value).split(".")[0]


@pytest.mark.parametrize("package", PACKAGES)
def test_packages_import_only_what_they_may(package):
    ours = {*PACKAGES, "tests"}
    found = [
        f"{file.relative_to(REPOSITORY)}:{line} imports {name}"
        for file in sources(package)
        for line, name in imported(ast.parse(file.read_text(encoding="utf-8")))
        if name in ours - MAY_IMPORT[package]
    ]
    assert not found


def test_the_whole_of_l2d_loads_without_the_others():
    modules = [
        ".".join(file.relative_to(REPOSITORY).with_suffix("").parts)
        for file in sources("l2d")
        if file.name not in ("__init__.py", "__main__.py")
    ]
    code = f"import importlib, sys\nfor name in {modules}: importlib.import_module(name)\n"
    code += "print(*sorted(set(n.split('.')[0] for n in sys.modules)))"
    loaded = set(run(code, "-S" if sys.prefix == sys.base_prefix else "-s").split())
    assert "torch" in loaded
    # An installed hook loads the bridge at every start of Python; the package itself is then no dependency of l2d.
    assert not loaded & {"training", "trl", "lm_eval", "datasets"}


HEAVY = ("torch", "transformers", "numpy", "lm_eval", "trl", "peft", "datasets", "accelerate", "scipy")


@pytest.mark.parametrize("package", PACKAGES)
def test_importing_a_package_loads_nothing_heavy(package):
    code = f"import sys, {package}; print(*(name for name in {HEAVY} if name in sys.modules))"
    assert run(code).split() == []


def test_the_hook_at_interpreter_start_loads_nothing_heavy(tmp_path):
    """The line of the `.pth` file as `site` runs it: few modules, and nothing that is not Python's own."""
    hook = REPOSITORY / "lm_eval_ext" / "l2d_lm_eval.pth"
    (tmp_path / hook.name).write_text(hook.read_text(encoding="utf-8"), encoding="utf-8")
    code = (
        f"import sys; sys.path.insert(0, {str(REPOSITORY)!r}); before = set(sys.modules); import site; "
        f"extra = set(sys.modules) - before; site.addsitedir({str(tmp_path)!r}); "
        "print(*sorted(set(sys.modules) - before - extra))"
    )
    assert run(code, "-S", "-I").split() == ["lm_eval_ext", "lm_eval_ext.harness", "lm_eval_ext.harness.plugin"]


# ---- layout ------------------------------------------------------------------------------------------------------

MOST_ENTRIES, MOST_LINES, MOST_LINES_OF_A_FUNCTION = 18, 400, 60


def module_name(file: Path) -> str:
    """Dotted name of a source file; a package's own file has the package's name."""
    parts = file.relative_to(REPOSITORY).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def trees(package: str) -> dict[str, ast.Module]:
    return {module_name(file): ast.parse(file.read_text(encoding="utf-8")) for file in sources(package)}


def imported_names(tree: ast.Module) -> Iterator[tuple[int, str, str | None]]:
    """Line, module and name (`None`: the module itself) of every import, late and type-only ones included."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((node.lineno, node.module or "", alias.name) for alias in node.names)


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Modules that import each other, directly or by way of others."""
    reached: dict[str, set[str]] = {}
    for start in graph:
        pending, seen = list(graph[start]), set()
        while pending:
            if (module := pending.pop()) not in seen:
                seen.add(module)
                pending += graph[module]
        reached[start] = seen
    return sorted({tuple(sorted(m for m in reached[one] if one in reached[m])) for one in graph if one in reached[one]})


@pytest.mark.parametrize("package", PACKAGES)
def test_no_import_runs_in_a_circle(package):
    modules = trees(package)
    graph = {
        module: {
            target
            for _, source, name in imported_names(tree)
            if (target := f"{source}.{name}" if f"{source}.{name}" in modules else source) in modules
        }
        for module, tree in modules.items()
    }
    assert circles(graph) == []


def test_circles_are_found():
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": set()}) == [("b", "c")]


def of_itself(node: ast.Attribute) -> bool:
    """Whether it is an attribute of `self` or `cls`."""
    return getattr(node.value, "id", "") in ("self", "cls")


@pytest.mark.parametrize("package", PACKAGES)
def test_no_private_name_of_another_module_is_imported(package):
    """Nor read as an attribute: `other._name`, where one of our modules defines `_name` and this one does not."""
    modules, defined = trees(package), {}
    for module, tree in modules.items():
        names = {getattr(node, "name", "") or "" for node in ast.walk(tree)}
        stored = [node for node in ast.walk(tree) if isinstance(getattr(node, "ctx", None), ast.Store)]
        names |= {node.id for node in stored if isinstance(node, ast.Name)}
        names |= {node.attr for node in stored if isinstance(node, ast.Attribute) and of_itself(node)}
        defined[module] = {name for name in names if name.startswith("_") and not name.endswith("__")}
    found = []
    for module, tree in modules.items():
        others = set().union(*(names for other, names in defined.items() if other != module)) - defined[module]
        others -= {"_version"}  # of tensors, too
        for line, source, name in imported_names(tree):
            if source.split(".")[0] in PACKAGES and any(part.startswith("_") for part in (name or source).split(".")):
                found.append(f"{module}:{line} imports {name or source}")
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and node.attr in others and not of_itself(node):
                found.append(f"{module}:{node.lineno} reads {node.attr}")
    assert found == []


@pytest.mark.parametrize("package", PACKAGES)
def test_packages_and_modules_are_small(package):
    entries = [entry for entry in (REPOSITORY / package).iterdir() if entry.name != "__pycache__"]
    assert len(entries) <= MOST_ENTRIES
    long = []
    for file in sources(package):
        text = file.read_text(encoding="utf-8")
        if (lines := len(text.splitlines())) > MOST_LINES:
            long.append(f"{module_name(file)}: {lines} lines")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                lines = (node.end_lineno or 0) - node.lineno + 1
                if lines > MOST_LINES_OF_A_FUNCTION:
                    long.append(f"{module_name(file)}.{node.name}: {lines} lines")
    assert long == []


# ---- public names ------------------------------------------------------------------------------------------------


def undocumented(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Line and name of public functions, classes and methods without a docstring."""

    def visit(body: list[ast.stmt], prefix: str) -> Iterator[tuple[int, str]]:
        for node in body:
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) and node.name[0] != "_":
                if ast.get_docstring(node) is None:
                    yield node.lineno, prefix + node.name
                if isinstance(node, ast.ClassDef):
                    yield from visit(node.body, f"{prefix}{node.name}.")

    yield from visit(tree.body, "")


@pytest.mark.parametrize("package", PACKAGES)
def test_public_names_have_docstrings(package):
    found = []
    for file in sources(package):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        if tree.body and ast.get_docstring(tree) is None:
            found.append(f"{file.relative_to(REPOSITORY)}: the module")
        found += [f"{file.relative_to(REPOSITORY)}:{line} {name}" for line, name in undocumented(tree)]
    assert not found


# ---- documents ---------------------------------------------------------------------------------------------------


def test_links_resolve():
    missing = []
    for document in DOCUMENTS:
        text = document.read_text(encoding="utf-8")
        for target in re.findall(r"\]\(([^)\s#]+)[^)]*\)", text):
            if "://" not in target and not (document.parent / target).exists():
                missing.append(f"{document.name}: {target}")
    assert not missing


def test_one_version_everywhere():
    import l2d

    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    changes = (REPOSITORY / "CHANGELOG.md").read_text(encoding="utf-8")
    released = [name for name in re.findall(r"^## \[?([\w.]+)", changes, re.M) if name != "Unreleased"]
    assert project["version"] == l2d.__version__ == released[0]


def test_bounds_and_pins_agree():
    """Every dependency has one lower bound and nothing else, and `constraints.txt` pins a version that it allows."""
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = CONSTRAINTS.read_text(encoding="utf-8").splitlines()
    pins = {canonicalize_name(pin.name): str(pin.specifier) for pin in map(Requirement, lines[1:])}
    for text in [*project["dependencies"], *project["optional-dependencies"]["test"]]:
        asked = Requirement(text)
        assert [bound.operator for bound in asked.specifier] == [">="], text
        assert asked.specifier.contains(pins[canonicalize_name(asked.name)].removeprefix("==")), text
    oldest = requirements("oldest")
    assert all("==" in text for text in oldest) and len(requirements("newest")) == len(oldest)
    assert all((REPOSITORY / "tests" / f"{name}.py").is_file() for name in CORE)


def test_no_module_of_ours_is_exempt_from_type_checks():
    checks = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["mypy"]
    exempt = [name for entry in checks.get("overrides", []) for name in entry["module"]]
    assert not [name for name in exempt if name.split(".")[0] in PACKAGES]


COMMANDS = ("python", "make", "lm_eval", "lm-eval", "l2d-leaderboard", "accelerate", "torchrun", "pip", "git")
FREE = ("pip", "git", "cd", ".", "source", "export", "ruff", "mypy")  # not ours: anything goes


def shown(document: Path) -> Iterator[tuple[str, bool]]:
    """The commands of a document: lines of its shell blocks, indented ones, and (true) those that the text mentions."""
    text = document.read_text(encoding="utf-8").replace("\\\n", " ")
    for block in re.findall(r"^```(?:bash|sh|console)\n(.*?)^```", text, re.M | re.S):
        yield from ((line, False) for line in block.splitlines() if line.strip() and not line.startswith("#"))
    text = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
    starts = "|".join(map(re.escape, COMMANDS))
    yield from ((line, False) for line in re.findall(rf"^ {{4}}((?:{starts}) .*)$", text, re.M))
    yield from ((re.sub(r"\s+", " ", code), True) for code in re.findall(rf"`((?:{starts}) [^`]+)`", text))


ALL_COMMANDS = sorted({(document.name, *command) for document in DOCUMENTS for command in shown(document)})


class Parsed(BaseException):
    """Ends a command once its own parser has accepted the command line."""


def parse(command: list[str], mentioned: bool) -> None:
    """Let a command's own parser read its arguments, and stop there; fails where it would end with a usage error.

    A command that is only mentioned may lack arguments.
    """
    name, *rest = command
    if name == "make":
        rules = (REPOSITORY / "Makefile").read_text(encoding="utf-8")
        for word in rest:
            variable = word.split("=")[0]
            known = f"$({variable})" in rules if "=" in word else re.search(rf"^{word}:", rules, re.M)
            assert known, f"make knows no {word}"
    elif name in ("lm_eval", "lm-eval"):
        run_until_parsed("lm_eval_ext", rest, mentioned)
        check_model_args(rest)
    elif name == "l2d-leaderboard":
        run_until_parsed("lm_eval_ext.leaderboard", rest, mentioned)
    elif name == "accelerate":
        from accelerate.commands.launch import launch_command_parser

        assert rest[0] == "launch", f"accelerate {rest[0]} is not documented"
        if len(rest) > 1:
            given = launch_command_parser().parse_args(rest[1:])
            assert given.module, "our commands are modules: accelerate launch -m"
            parse(["python", "-m", given.training_script, *given.training_script_args], mentioned)
    elif name == "torchrun":
        parse(["python", *rest[rest.index("-m") :]], mentioned)
    elif name == "python":
        assert rest[0] == "-m", f"a module is to be run, not {rest[0]}"
        parse_module(rest[1], rest[2:], mentioned)
    else:
        assert name in FREE, f"{name} is no command of this project"


def parse_module(module: str, arguments: list[str], mentioned: bool) -> None:
    """The same for `python -m MODULE`."""
    found = importlib.util.find_spec(run_by(module))
    assert found is not None, f"there is no module {module} to run"
    if module == "training.train":
        from training.config import option_types
        from training.recipe import read_recipe

        if any(re.fullmatch(r"[A-Z]+\.yaml", word) for word in arguments):  # any recipe of the user's
            names = {word.removeprefix("--") for word in arguments if word.startswith("--")}
            assert names <= {"config", *option_types()}
        else:
            read_recipe(arguments)
    elif module.split(".")[0] in (*PACKAGES, "tests", "lm_eval"):
        run_until_parsed(module, arguments, mentioned)
        if module in ("lm_eval", "lm_eval_ext"):
            check_model_args(arguments)
    else:  # somebody else's tool: its files are to be there
        for word in arguments:
            if word.startswith("tests/"):
                assert (REPOSITORY / word.split("::")[0]).exists(), f"{word} does not exist"


def run_by(module: str) -> str:
    """The module that `python -m` runs: of a package its `__main__`."""
    found = importlib.util.find_spec(module)
    package = found is not None and found.submodule_search_locations is not None
    return f"{module}.__main__" if package else module


def run_until_parsed(module: str, arguments: list[str], mentioned: bool) -> None:
    """Run a module as `python -m` does, up to the point where its arguments are parsed."""
    accept = argparse.ArgumentParser.parse_args

    def ask_for_nothing(parser):
        for action in parser._actions:
            action.required = False
            if isinstance(action, argparse._SubParsersAction):
                for inner in action.choices.values():
                    ask_for_nothing(inner)

    def parse_args(self, args=None, namespace=None):
        if mentioned:
            ask_for_nothing(self)
        accept(self, args, namespace)
        raise Parsed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [module, *arguments])
        patch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
        patch.delitem(sys.modules, run_by(module), raising=False)  # else runpy warns
        try:
            runpy.run_module(module, run_name="__main__", alter_sys=False)
        except Parsed:
            pass
        except SystemExit as end:
            assert end.code in (0, None), f"python -m {module} does not take {shlex.join(arguments)}"


@pytest.mark.parametrize("module", ["l2d", "lm_eval_ext.leaderboard", "l2d.released"])
def test_modules_that_were_imported_before_are_run_without_a_warning(module, recwarn):
    importlib.import_module(run_by(module))
    run_until_parsed(module, [], mentioned=True)
    assert not [warning for warning in recwarn if "sys.modules" in str(warning.message)]


def check_model_args(arguments: list[str]) -> None:
    """`--model_args` of `--model l2d` are ones that we know."""
    given = dict(zip(arguments, arguments[1:], strict=False))
    if given.get("--model") == "l2d" and "--model_args" in given and given["--model_args"] != "help":
        from lm_eval_ext.arguments import ARGUMENTS

        names = {pair.split("=")[0] for pair in given["--model_args"].split(",")}
        assert names <= {"pretrained", *(getattr(argument, "name", argument) for argument in ARGUMENTS)}


def test_documents_show_commands():
    documents = {document for document, _, _ in ALL_COMMANDS}
    assert {"README.md", "CONTRIBUTING.md", "RESULTS.md"} <= documents
    assert len(ALL_COMMANDS) > 20


@pytest.mark.parametrize("document, line, mentioned", ALL_COMMANDS, ids=[f"{d}: {c[:60]}" for d, c, _ in ALL_COMMANDS])
def test_documented_commands_exist(document, line, mentioned, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    check(line, mentioned)


@pytest.mark.parametrize(
    "line",
    [
        "python -m l2d trace demo/l2d --promt x",
        "python -m l2d tracing demo/l2d",
        "python -m training.trian --config training/recipes/gsm8k_lora.yaml",
        "python -m training.train --config training/recipes/gsm8k_lora.yaml --learning_rat 1",
        "accelerate launch -m training.train --config training/recipes/gsm9k_lora.yaml",
        "lm_eval --modle l2d --tasks gsm8k",
        "lm_eval --model l2d --model_args pretrained=DIR,budge=3 --tasks gsm8k",
        "l2d-leaderboard results --output report",
        "python -m pytest tests/test_nothing.py",
        "make tests",
        "l2d-train recipe.yaml",
    ],
)
def test_wrong_commands_are_found(line, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    with pytest.raises((AssertionError, SystemExit, ValueError)):
        check(line, mentioned=False)


def check(line: str, mentioned: bool) -> None:
    """Parse all commands of a line, and look for the files that it names."""
    text = re.sub(r"[\[\]]", "", line).replace("...", "")  # optional parts are taken
    words = [re.sub(r"^[A-Z]$", "1", word) for word in shlex.split(text, comments=True)]
    command: list[str] = []
    for word in [*words, "&&"]:
        if word in ("&&", ";", "|"):
            while command and re.fullmatch(r"[A-Z_]+=.*", command[0]):  # environment variables
                command.pop(0)
            if len(command) > 1:
                parse(command, mentioned)
            command = []
        else:
            command.append(word)
    for word in words:
        if re.fullmatch(r"[a-z_.]+(/[\w.-]+)+\.(yaml|py|md|toml|txt)", word):
            assert (REPOSITORY / word).is_file(), f"{word} does not exist"


# ---- the method page ---------------------------------------------------------------------------------------------


def defined(file: Path) -> set[str]:
    """Names of the functions and classes of a module, methods as `Class.method`."""
    names = set()
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
        for inner in node.body if isinstance(node, ast.ClassDef) else ():
            if isinstance(inner, ast.FunctionDef):
                names.add(f"{node.name}.{inner.name}")
    return names


def test_the_method_page_names_what_exists():
    """Every `FILE`: `NAME`, `NAME` of docs/method.md is a module and what it defines; the page stays one page."""
    text = (REPOSITORY / "docs" / "method.md").read_text(encoding="utf-8")
    references = re.findall(r"`([\w/]+\.py)`:((?:,?\s*`[\w.]+`)+)", text)
    assert len(references) > 15 and 100 <= len(text.splitlines()) <= 160
    for file, names in references:
        missing = set(re.findall(r"`([\w.]+)`", names)) - defined(REPOSITORY / file)
        assert not missing, f"{file} does not define {missing}"
    for file in re.findall(r"`([\w/]+\.py)`", text):
        assert (REPOSITORY / file).is_file(), file


@pytest.mark.parametrize("page", ["promises.md", "threats.md"])
def test_named_tests_exist(page):
    """`FILE::NAME` of a table's row, and `::NAME` after it, are tests of that file."""
    for row in (REPOSITORY / "docs" / page).read_text(encoding="utf-8").splitlines():
        file = None
        for path, name in re.findall(r"`(tests/[\w/]+\.py)?(?:::(test_\w+))?`", row):
            file = path or file
            if file:
                assert (REPOSITORY / file).is_file(), file
            if name:
                assert file and f"def {name}(" in (REPOSITORY / file).read_text(encoding="utf-8"), f"{file}::{name}"
        assert not re.search(r"`(?!tests/)[\w/]*test_\w+\.py", row), f"name the folder: {row}"
