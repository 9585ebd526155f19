import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from service import errors
from service.errors import ServiceError

ROOT = Path(__file__).parents[2]
SERVICE = sorted((ROOT / "service").glob("**/*.py"))
MODEL = sorted((ROOT / "model").glob("**/*.py"))
WITH_TORCH = {  # style: no tensor leaves them
    "engine", "known_pixels", "tick_events", "description", "executors", "openvino_executor", "choice", "choice_cache",
    "loading",
}  # fmt: skip
PURE_MODEL = {"model", "model.timesteps"}  # what of model/ needs no torch, and may be asked for anywhere
MAY_RENDER_HTTP = {"problems"}


def module_name(file: Path) -> str:
    return ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports(tree: ast.AST, *, lazy: bool) -> Iterator[str]:
    """The modules a file imports; with `lazy`, also those that are imported in functions or for type checking."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield node.module or ""
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


def parse(file: Path) -> ast.Module:
    return ast.parse(file.read_text("utf-8"), str(file))


def service_errors(base: type[ServiceError] = ServiceError) -> Iterator[type[ServiceError]]:
    yield base
    for child in base.__subclasses__():
        if child.__module__.startswith("service."):
            yield from service_errors(child)


def test_the_files_are_found() -> None:
    assert {"scheduler", "engine", "worker", "app"} <= {file.stem for file in SERVICE}
    assert {"unet", "samplers"} <= {file.stem for file in MODEL}


def test_importing_the_service_but_for_its_engine_does_not_import_torch() -> None:
    modules = [module_name(file) for file in SERVICE if file.stem not in WITH_TORCH]
    assert {"service.scheduler", "service.worker", "service.app", "service.routes_sample", "service.cli"} <= {*modules}
    program = f"""
import importlib, sys
for name in {modules!r}:
    importlib.import_module(name)
    if "torch" in sys.modules or any(key.split(".")[0] == "model" for key in sys.modules.keys() - {PURE_MODEL!r}):
        sys.exit(name)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, f"{done.stderr.strip()} imports torch or model"


def test_the_engine_does_import_torch() -> None:
    """Or the test above would prove nothing."""
    for name in WITH_TORCH:
        assert "torch" in imports(parse(ROOT / "service" / f"{name}.py"), lazy=False)


@pytest.mark.parametrize("file", MODEL, ids=module_name)
def test_model_imports_nothing_from_service(file: Path) -> None:
    assert not [name for name in imports(parse(file), lazy=True) if name.split(".")[0] == "service"]


@pytest.mark.parametrize("file", SERVICE, ids=module_name)
def test_torch_enters_the_service_in_the_engine_and_executors_only(file: Path) -> None:
    if file.stem in WITH_TORCH:
        return
    tree = parse(file)
    lazy = file.stem.startswith("cli")  # the commands load what they need when they run
    heavy = {"torch", "model", "safetensors", "diffusers", "torchvision"}
    found = {name for name in imports(tree, lazy=not lazy) if name.split(".")[0] in heavy}
    assert not found - PURE_MODEL - {"safetensors.numpy"}  # numpy is all it brings
    assert lazy or "torch" not in names(tree)


@pytest.mark.parametrize("file", SERVICE, ids=module_name)
def test_no_http_exception_below_the_routes(file: Path) -> None:
    assert ("HTTPException" in names(parse(file))) == (file.stem in MAY_RENDER_HTTP)


@pytest.mark.parametrize(
    "name", ["job", "scheduler", "admission", "promises", "forecast", "tick_times", "errors", "result_cache"]
)
def test_pure_modules_know_no_loop_no_clock_and_no_framework(name: str) -> None:
    imported = {module.split(".")[0] for module in imports(parse(ROOT / "service" / f"{name}.py"), lazy=True)}
    assert not imported & {"asyncio", "time", "datetime", "torch", "fastapi", "starlette", "pydantic", "logging"}


def test_the_client_needs_nothing_of_the_server() -> None:
    program = """
import sys
import service.client
ours = {name for name in sys.modules if name.startswith("service.") and not name.startswith("service.client")}
heavy = {"torch", "numpy", "pydantic", "fastapi", "starlette", "uvicorn", "sqlalchemy", "PIL"} & sys.modules.keys()
sys.exit(", ".join(ours | heavy) or 0)
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, f"the client imports {done.stderr}"
    for file in (ROOT / "service" / "client").glob("*.py"):
        outside = {name for name in imports(parse(file), lazy=True) if not name.startswith("service.client")}
        assert {name.partition(".")[0] for name in outside} <= {"httpx", "websockets"} | sys.stdlib_module_names


@pytest.mark.parametrize("file", sorted((ROOT / "service" / "client").glob("*.py")), ids=module_name)
def test_only_lines_do_io(file: Path) -> None:
    """So that each call is written once, for threads and for event loops."""
    imported = {name.partition(".")[0] for name in imports(parse(file), lazy=True)}
    assert file.stem in ("line", "async_line") or not imported & {"asyncio", "socket", "threading", "ssl"}


@pytest.mark.parametrize("file", SERVICE, ids=module_name)
def test_nothing_is_printed_but_by_the_command_line(file: Path) -> None:
    assert "print" not in names(parse(file)) or file.stem.startswith("cli")


@pytest.mark.parametrize("file", SERVICE + MODEL, ids=module_name)
def test_each_module_says_what_lives_in_it(file: Path) -> None:
    assert ast.get_docstring(parse(file))


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


@pytest.mark.parametrize("error", list(service_errors()), ids=lambda error: error.code)
def test_every_error_is_explained_in_the_docs(error: type[ServiceError]) -> None:
    text = (ROOT / "docs" / "errors.md").read_text("utf-8")
    assert f"`{error.code}`" in text
    assert str(error.status) in text
