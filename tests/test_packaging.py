"""What the README, the Makefile, the pins and the build promise of each other."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from pathlib import Path

import pytest

import tilewise

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
SKIPPED_FOLDERS = {
    ".git",
    ".venv",
    "build",
    "dist",
    ".hypothesis",
    ".mypy_cache",
    ".pytest_cache",
    ".ruff_cache",
    "__pycache__",
}


def _pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return dict(line.split("==") for line in lines if line and not line.startswith("#"))


def _requirements() -> set[str]:
    project = PROJECT["project"]
    lists = [PROJECT["build-system"]["requires"], project["dependencies"], *project["optional-dependencies"].values()]
    names = {re.match(r"[\w.-]+", requirement)[0] for requirements in lists for requirement in requirements}
    return {name.lower().replace("_", "-") for name in names} - {"tilewise"}


def _files() -> list[Path]:
    folders = (folder for folder in ROOT.iterdir() if folder.name not in SKIPPED_FOLDERS)
    found = [path for top in folders for path in (top.rglob("*") if top.is_dir() else [top])]
    return [path for path in found if path.is_file() and not SKIPPED_FOLDERS & set(path.parts) and path.suffix != ".so"]


def test_everything_required_is_pinned_exactly_once():
    pins = _pins()
    assert _requirements() - set(pins) == set()
    assert all(re.fullmatch(r"\d[\w.]*", version) for version in pins.values()), "a plain version, no local part"
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line]
    assert lines == sorted(set(lines))


def test_the_frameworks_are_the_promised_ones():
    assert _pins()["torch"] == "2.13.0"
    assert _pins()["jax"] == "0.10.2"


def test_nothing_names_a_package_index_or_a_path_of_some_machine():
    # Put together here, so that this file passes its own test.
    banned = ["index" + "-url", "pypi" + ".org", "download.py" + "torch", "/wor" + "k/", "/roo" + "t/", "/hom" + "e/"]
    found = [
        f"{path.relative_to(ROOT)}: {word}"
        for path in _files()
        for word in banned
        if word.encode() in path.read_bytes()
    ]
    assert not found


def test_continuous_integration_runs_the_readmes_test_command_and_nothing_else():
    script = ROOT / ".ci" / "run"
    commands = [line for line in script.read_text().splitlines() if line and not line.startswith("#")]
    assert commands == ["set -eu", 'cd "$(dirname "$0")/.."', "exec make test </dev/null"]
    assert os.access(script, os.X_OK)
    assert "make test" in (ROOT / "README.md").read_text()


def test_every_command_that_the_documents_name_exists_and_is_listed():
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.search(r"^\.PHONY: (.*)$", makefile, re.M)[1].split())
    listed = subprocess.run(
        ["make", "--no-print-directory", "help"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    assert set(re.findall(r"^make ([\w-]+)", listed, re.M)) == targets
    for document in ("README.md", "CONTRIBUTING.md"):
        text = (ROOT / document).read_text()
        named = set(re.findall(r"^\s*make ([\w-]+)", text, re.M)) | set(re.findall(r"`make ([\w-]+)", text))
        assert named and named <= targets, document


def test_the_documents_point_at_files_that_exist():
    for document in ("README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "CHANGELOG.md"):
        links = re.findall(r"\]\((?!https?:)([^)#]+)", (ROOT / document).read_text())
        assert [link for link in links if not (ROOT / link).exists()] == [], document
    paths = re.findall(
        r"`((?:src|native|tests|tools|examples|benchmarks)/[\w./-]+)`", (ROOT / "ARCHITECTURE.md").read_text()
    )
    assert paths
    assert [path for path in paths if not (ROOT / path).exists()] == []


def test_the_readmes_tour_runs():
    tour = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)[1]
    assert len(tour.splitlines()) <= 24
    ran = subprocess.run([sys.executable, "-W", "error", "-c", tour], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr


def test_the_version_is_stated_once():
    assert "version" in PROJECT["project"]["dynamic"]
    assert re.fullmatch(r"\d+\.\d+\.\d+", tilewise.__version__)
    assert f"## {tilewise.__version__}" in (ROOT / "CHANGELOG.md").read_text()


def _require(tmp_path: Path, python: str = sys.executable, **environment: str) -> subprocess.CompletedProcess[str]:
    """tools/require.sh on a machine whose PATH holds nothing."""
    command = ["/bin/sh", str(ROOT / "tools" / "require.sh"), python]
    return subprocess.run(command, env={"PATH": str(tmp_path), **environment}, capture_output=True, text=True)


def test_a_missing_compiler_is_named_with_its_cure(tmp_path: Path):
    answer = _require(tmp_path)
    assert (answer.returncode, answer.stdout) == (0, "OFF\n")
    assert "apt install g++" in answer.stderr
    asked = _require(tmp_path, TILEWISE_NATIVE="ON")
    assert asked.returncode == 1 and "apt install g++" in asked.stderr
    refused = _require(tmp_path, TILEWISE_NATIVE="OFF")
    assert (refused.returncode, refused.stdout, refused.stderr) == (0, "OFF\n", "")


def _fake_python(folder: Path, fails_on: str) -> str:
    """A python3 that fails whenever its program mentions a word, and is otherwise content."""
    fake = folder / "python3"
    fake.write_text(f'#!/bin/sh\ncase "$*" in *{fails_on}*) exit 1 ;; *--version) echo Python 3.9.2 ;; esac\n')
    fake.chmod(0o755)
    return str(fake)


@pytest.mark.parametrize(
    ("fails_on", "message"),
    [
        ("version_info", "Python 3.11 to 3.13 needed"),
        ("ensurepip", "apt install python3-venv"),
        ("Python.h", "apt install g++ python3-dev"),
    ],
)
def test_what_python_lacks_is_named_with_its_cure(tmp_path: Path, fails_on: str, message: str):
    answer = _require(tmp_path, _fake_python(tmp_path, fails_on))
    assert message in answer.stderr
    assert answer.returncode == (0 if fails_on == "Python.h" else 1)


def test_no_python_at_all_is_named_with_its_cure(tmp_path: Path):
    answer = _require(tmp_path, "python3")
    assert answer.returncode == 1 and "apt install python3 python3-venv" in answer.stderr


def _wheel_without_compiler(folder: Path, native: str) -> subprocess.CompletedProcess[str]:
    """Build the wheel where the PATH holds the build's own tools alone, in a build folder below `folder`."""
    tools = folder / "tools"
    tools.mkdir()
    for name in ("cmake", "ninja"):
        found = shutil.which(name, path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
        if not found:
            pytest.skip(f"no {name} here")
        (tools / name).symlink_to(found)
    command = [sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "--wheel-dir", str(folder)]
    command += [f"--config-settings=build-dir={folder}/build", str(ROOT)]
    hidden = {"CC": "", "CXX": "", "PATH": str(tools), "TILEWISE_NATIVE": native}
    return subprocess.run(command, env={**os.environ, **hidden}, capture_output=True, text=True)


@pytest.mark.parametrize("native", ["AUTO", "OFF"])
def test_without_a_compiler_the_package_installs_as_pure_python(tmp_path: Path, native: str):
    built = _wheel_without_compiler(tmp_path, native)
    assert built.returncode == 0, built.stderr
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert "tilewise/py.typed" in names and "tilewise/__init__.py" in names
    assert not [name for name in names if name.endswith(".so")]
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    program = (
        "import numpy, tilewise; x = numpy.ones((1, 1, 4, 2)); "
        "print(tilewise.attention(x, x, x).sum(), tilewise.__file__)"
    )
    # -S: an editable install hooks itself in before the path is asked; then NumPy's folder has to be named.
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path / "site"), sysconfig.get_path("purelib")])}
    ran = subprocess.run(
        [sys.executable, "-S", "-c", program], env=environment, capture_output=True, text=True, cwd=tmp_path
    )
    assert ran.stdout.split()[0] == "8.0" and str(tmp_path) in ran.stdout, ran.stderr


def test_without_a_compiler_asking_for_native_kernels_is_an_error(tmp_path: Path):
    assert _wheel_without_compiler(tmp_path, "ON").returncode != 0
    assert not list(tmp_path.glob("*.whl"))
