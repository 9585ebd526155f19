import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from tminus.service import errors
from tminus.service.errors import ServiceError

ROOT = Path(__file__).parents[2]
SERVICE = sorted((ROOT / "service").glob("**/*.py"))
CLIENT = [file for file in SERVICE if ROOT / "service" / "client" in file.parents]
MODEL = sorted((ROOT / "model").glob("**/*.py"))
# From the bottom up: a layer imports from those before it and from itself. A folder is a layer; so are the files that
# stand at the top of service/, the words that everybody uses.
LAYERS = ("words", "images", "scheduling", "engine", "worker", "jobs", "access", "api", "startup", "ray_serve", "cli")
WORDS = {
    "byte_budget",
    "errors",
    "metrics",
    "model_info",
    "preview",
    "spec",
    "threads",
    "tracing",
    "turns",
    "work",
}
APART = {"client", "page"}  # the client imports nothing of the rest; the page is no Python
# What of model/ needs no torch, and may be asked for anywhere.
PURE_MODEL = {
    *(f"tminus.model{name}" for name in ("", ".catalogue", ".config", ".files", ".hub", ".pixels", ".sampler_tables")),
    *("tminus.model.archives", "tminus.model.timesteps", "tminus.model.trajectory", "tminus.model.scheduler_kinds"),
    *("tminus.model.formats", "tminus.model.formats.flags"),
    *("tminus.model.training", "tminus.model.training.config"),
}
MAY_RENDER_HTTP = {"tminus.service.api.answers.problems"}


def module_name(file: Path) -> str:
    return ".".join(("tminus", *file.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__")


def part_of(module: str) -> str:
    """The top folder of a module of ours; of another's, its first name."""
    return module.removeprefix("tminus.").split(".")[0]


def imports(tree: ast.AST, *, lazy: bool) -> Iterator[str]:
    """The modules a file imports; with `lazy`, also those that are imported in functions or for type checking.

    A relative import begins with a dot.
    """
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield "." * node.level + (node.module or "")
        elif lazy or not (
            isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
            or (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test))
        ):
            yield from imports(node, lazy=lazy)


def names(tree: ast.AST) -> set[str]:
    """Every name a file mentions in its code, comments and docstrings apart."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            found.add(node.id)
        elif isinstance(node, ast.Attribute):
            found.add(node.attr)
        elif isinstance(node, ast.alias):
            found |= {node.name, node.asname or ""}
    return found


@cache
def parse(file: Path) -> ast.Module:
    return ast.parse(file.read_text("utf-8"), str(file))


def service_errors(base: type[ServiceError] = ServiceError) -> Iterator[type[ServiceError]]:
    yield base
    for child in base.__subclasses__():
        if child.__module__.startswith("tminus.service."):
            yield from service_errors(child)


def layer_of(module: str) -> str:
    """The layer of a module of service/, by its folder or, at the top, by its name."""
    _, _, name, *deeper = module.split(".")
    if deeper or name in LAYERS:
        return name
    return "words" if name in WORDS else name


def modules_of(layer: str) -> list[str]:
    return [name for file in SERVICE if (name := module_name(file)) != "tminus.service" and layer_of(name) == layer]


def test_every_module_is_in_a_layer() -> None:
    found = {layer_of(name) for file in SERVICE if (name := module_name(file)) != "tminus.service"}
    assert found == {*LAYERS, "client"}
    folders = {path.name for path in (ROOT / "service").iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert folders == {*LAYERS, *APART} - {"words"}


@pytest.mark.parametrize("layer", LAYERS)
def test_a_layer_imports_from_those_below_it_only(layer: str) -> None:
    allowed = set(LAYERS[: LAYERS.index(layer) + 1]) | ({"client"} if layer == "cli" else set())
    for name in modules_of(layer):
        file = ROOT / Path(*name.split(".")[1:])
        file = file.with_suffix(".py") if file.with_suffix(".py").exists() else file / "__init__.py"
        ours = {other for other in imports(parse(file), lazy=True) if part_of(other) == "service"}
        assert not {other for other in ours if layer_of(other) not in allowed}, name


def test_importing_what_is_no_engine_does_not_import_torch() -> None:
    modules = [name for layer in LAYERS if layer != "engine" for name in modules_of(layer)]
    modules += ["tminus.service.engine.protocol"]
    assert {
        "tminus.service.scheduling.scheduler",
        "tminus.service.worker.worker",
        "tminus.service.startup.app",
        "tminus.service.cli.main",
    } <= {*modules}
    program = f"""
import importlib, sys
for name in {modules!r}:
    importlib.import_module(name)
    if "torch" in sys.modules or any(key.startswith("tminus.model") for key in sys.modules.keys() - {PURE_MODEL!r}):
        sys.exit(name)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, f"{done.stderr.strip()} imports torch or model"


def test_model_imports_nothing_from_service() -> None:
    for file in MODEL:
        assert not [name for name in imports(parse(file), lazy=True) if part_of(name) == "service"], file


def test_no_modules_of_model_import_each_other() -> None:
    """Also not for type checking."""
    graph = {module_name(file): {*imports(parse(file), lazy=True)} for file in MODEL}
    TopologicalSorter(graph).prepare()  # it raises CycleError


def test_torch_enters_the_service_in_its_engine_only() -> None:
    heavy = {"torch", "model", "safetensors", "diffusers", "torchvision"}
    for file in SERVICE:
        layer = layer_of(module_name(file)) if file != ROOT / "service" / "__init__.py" else "words"
        if layer == "engine":
            continue
        tree = parse(file)
        lazy = layer == "cli"  # the commands load what they need when they run
        found = {name for name in imports(tree, lazy=not lazy) if part_of(name) in heavy}
        assert not found - PURE_MODEL - {"safetensors.numpy"}, file  # numpy is all it brings
        assert lazy or "torch" not in names(tree), file


def test_pure_modules_know_no_loop_no_clock_and_no_framework() -> None:
    pure = ["spec", "work", "model_info", "errors", "api.request.classes"]
    for name in (*modules_of("scheduling"), *(f"tminus.service.{each}" for each in pure)):
        file = ROOT / Path(*name.split(".")[1:])
        tree = parse(file / "__init__.py" if file.is_dir() else file.with_suffix(".py"))
        imported = {module.split(".")[0] for module in imports(tree, lazy=True)}
        apart = {"asyncio", "time", "datetime", "torch", "fastapi", "starlette", "pydantic", "logging"}
        assert not imported & apart, name


def test_the_client_needs_nothing_of_the_server() -> None:
    program = """
import sys
import tminus.service.client
ours = {name for name in sys.modules if name.startswith("tminus.service.")}
ours = {name for name in ours if not name.startswith("tminus.service.client")}
heavy = {"torch", "numpy", "pydantic", "fastapi", "starlette", "uvicorn", "sqlalchemy", "PIL", "websockets"}
sys.exit(", ".join(ours | heavy & sys.modules.keys()) or 0)
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, f"the client imports {done.stderr}"
    for file in CLIENT:
        outside = {name for name in imports(parse(file), lazy=True) if not name.startswith(".")}
        assert {name.partition(".")[0] for name in outside} <= {"httpx", "websockets"} | sys.stdlib_module_names
        # tminus_client, the client's other name, has its folder and nothing above it.
        assert not {name for name in imports(parse(file), lazy=True) if name.startswith("..")}


def test_modules_are_absolute_printless_and_say_what_lives_in_them() -> None:
    """HTTPException is the routes', print the command line's, and a relative import the client's, which has two names.

    The client's shared modules do no I/O: tests/unasync.py writes what does from `_async`.
    """
    for file in SERVICE + MODEL:
        tree = parse(file)
        used, imported = names(tree), {*imports(tree, lazy=True)}
        assert ast.get_docstring(tree), file
        assert "print" not in used or file.parent.name == "cli", file
        assert file in MODEL or ("HTTPException" in used) == (module_name(file) in MAY_RENDER_HTTP), file
        if file not in CLIENT:
            assert not [name for name in imported if name.startswith(".")], file
        elif file.name not in ("_async.py", "_sync.py"):
            assert not {name.partition(".")[0] for name in imported} & {"asyncio", "socket", "threading", "ssl"}, file


# --- errors ---


def test_every_error_has_a_code_of_its_own_and_a_fitting_status() -> None:
    every = list(service_errors())
    assert len(every) > 8
    codes = [error.code for error in every]
    assert len(set(codes)) == len(codes)
    assert all(400 <= error.status <= 599 for error in every)
    assert all(error.title for error in every)
    assert len({error.title for error in every}) == len(every)
    assert all(vars(errors)[error.__name__] is error for error in every), "all of them live in errors.py"
