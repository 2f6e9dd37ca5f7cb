"""Folder = process (DESIGN §3): each imports only itself and ipc/, and only workers and kernels may import torch."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import cableway

ROOT = Path(cableway.__file__).parents[1]
MAY_IMPORT = {
    "ipc": {"ipc"},
    "kernels": {"kernels"},
    "enginecore": {"enginecore", "ipc"},
    "frontend": {"frontend", "ipc"},
    "workers": {"workers", "kernels", "ipc"},
}
HEAVY = {"torch", "triton", "cupy", "cuda"}
NEVER = {"pickle", "transformers"}
MAY_IMPORT_HEAVY = {"workers", "kernels"}


def imported(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Absolute names of what a module imports, and where: `from cableway import x` gives `cableway.x`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import"
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def offences(folder: str, source: str) -> list[str]:
    found = []
    for line, name in imported(ast.parse(source)):
        package, _, rest = name.partition(".")
        part = rest.partition(".")[0]
        if package == "cableway" and part and (ROOT / part).is_dir() and part not in MAY_IMPORT[folder]:
            found.append(f"{line}: {name}")
        if package in NEVER or (package in HEAVY and folder not in MAY_IMPORT_HEAVY):
            found.append(f"{line}: {name}")
    return found


@pytest.mark.parametrize("folder", MAY_IMPORT)
def test_folder_imports_only_what_it_may(folder: str) -> None:
    modules = sorted((ROOT / folder).rglob("*.py"))
    assert len(modules) > 1
    found = {str(path.relative_to(ROOT)): offences(folder, path.read_text()) for path in modules}
    assert {path: lines for path, lines in found.items() if lines} == {}


def test_a_crossed_wall_is_seen() -> None:
    assert offences("frontend", "from cableway.workers import runner")
    assert offences("enginecore", "def f():\n    import torch.nn")
    assert offences("workers", "import cableway.frontend.client")
    assert offences("workers", "import torch\nfrom cableway.kernels import registry") == []


@pytest.mark.parametrize("module", ["cableway.frontend.main", "cableway.enginecore.main", "cableway.frontend.cli"])
def test_process_starts_without_torch(module: str) -> None:
    """Nor does anything that it imports from elsewhere bring torch in."""
    code = f"import sys, {module}; print(*sorted({HEAVY | NEVER - {'pickle'}!r} & set(sys.modules)))"
    ran = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert ran.stdout.split() == []
