"""What is here and what is missing, each absence with its reason and its cure. Looks only; prints nothing."""

from __future__ import annotations

import os
import platform
import shutil
import sys
import sysconfig
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..environment import faults
from ..kernels import cards
from ..version import __version__


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing looked for: `text` says what was found, or why it is missing; `cure` what to do about that."""

    name: str
    present: bool
    text: str
    cure: str = ""


# Installed by these extras of tilewise; what each is for.
EXTRAS = {
    "typer": ("cli", "the command line"),
    "rich": ("cli", "the command line"),
    "matplotlib": ("cli", "pictures of masks"),
    "transformers": ("demo", "Hugging Face models"),
    "ml_dtypes": ("dev", "bfloat16 in NumPy"),
}


def machine() -> list[Finding]:
    """Versions and places."""
    return [
        Finding("tilewise", True, f"{__version__}, {Path(__file__).parents[1]}"),
        Finding("python", True, f"{platform.python_version()}, {sys.executable}"),
        Finding("system", True, f"{platform.system()} {platform.machine()}, {os.cpu_count()} processors"),
    ]


def environment() -> list[Finding]:
    """The variables that are set to what is not understood."""
    return [Finding(variable, False, fault, "unset it, or correct it") for variable, fault in faults().items()]


def kernels() -> list[Finding]:
    """Every kernel's card, asked whether it can run in this process."""
    found = []
    for card in cards():
        missing = card.available()
        if missing:
            found.append(Finding(card.name, False, missing.reason, missing.cure))
        else:
            found.append(Finding(card.name, True, f"{card.summary}; {_where(card.families, card.devices)}"))
    return found


def native() -> list[Finding]:
    """The compiled module: its pages of machine code and its threads; without it, what a build would need."""
    if find_spec("tilewise._native") is None:
        return [_compiler(), _headers()]
    module = import_module("tilewise._native")
    built = module.build_info()
    found = [Finding("compiler", True, str(built["compiler"]))]
    try:
        chosen = module.isa()
    except RuntimeError as error:
        found.append(
            Finding(
                "page",
                False,
                f"{error}{_setting('TILEWISE_ISA')}",
                "unset TILEWISE_ISA, or name a page below that can run here",
            )
        )
    else:
        found.append(Finding("page", True, chosen + _setting("TILEWISE_ISA")))
    for page in built["pages"]:
        if page in built["supported_pages"]:
            found.append(Finding(f"page {page}", True, "can run here"))
        elif page in built["refused_pages"]:
            cure = "Linux 5.16 or later, and no alternate signal stack that is too small for the registers"
            found.append(Finding(f"page {page}", False, built["refused_pages"][page], cure))
        else:
            found.append(Finding(f"page {page}", False, "this processor lacks its instructions", "a newer processor"))
    own = "" if "TILEWISE_NUM_THREADS" in faults() else _setting("TILEWISE_NUM_THREADS")
    settings = own or _setting("OMP_NUM_THREADS")
    found.append(
        Finding("threads", True, f"{module.num_threads()}{settings or ', one per processor allowed to this process'}")
    )
    return found


def frameworks() -> list[Finding]:
    """The frameworks, each really imported: installed is not the same as working."""
    found = [Finding("numpy", True, version("numpy"))]
    for name, devices in (("torch", _torch_devices), ("jax", _jax_devices)):
        if find_spec(name) is None:
            found.append(Finding(name, False, "not installed", f"pip install 'tilewise[{name}]'"))
            continue
        try:
            module = import_module(name)
        # A broken installation may raise anything at all while it is imported, and reporting that is the point here.
        except Exception as error:
            reason = f"installed, but its import fails: {type(error).__name__}: {error}"
            found.append(Finding(name, False, reason, f"pip install --force-reinstall {name}"))
        else:
            found += [Finding(name, True, str(module.__version__)), *devices(module)]
    return found


def extras() -> list[Finding]:
    """The optional packages, looked up and not imported."""
    found = []
    for name, (extra, purpose) in EXTRAS.items():
        try:
            found.append(Finding(name, True, f"{version(name)}, for {purpose}"))
        except PackageNotFoundError:
            found.append(Finding(name, False, f"not installed, for {purpose}", f"pip install 'tilewise[{extra}]'"))
    return found


def _where(families: frozenset[str], devices: frozenset[str]) -> str:
    return f"{', '.join(sorted(families))} on {'any device' if '*' in devices else ', '.join(sorted(devices))}"


def _setting(variable: str) -> str:
    value = os.environ.get(variable)
    return f", {variable}={value}" if value else ""


def _compiler() -> Finding:
    for name in (os.environ.get("CXX", ""), "c++", "g++", "clang++"):
        path = shutil.which(name) if name else None
        if path:
            return Finding("compiler", True, f"{path}; reinstalling tilewise builds the native kernel")
    return Finding("compiler", False, "no C++ compiler found", "apt install g++, then reinstall tilewise")


def _headers() -> Finding:
    header = Path(sysconfig.get_path("include"), "Python.h")
    if header.exists():
        return Finding("headers", True, str(header))
    return Finding("headers", False, f"no {header}", "apt install python3-dev, then reinstall tilewise")


def _torch_devices(torch: Any) -> list[Finding]:
    cuda, built_for = torch.cuda, torch.version.cuda or getattr(torch.version, "hip", None)
    if cuda.is_available():
        names = sorted({cuda.get_device_name(n) for n in range(cuda.device_count())})
        return [Finding("torch GPU", True, f"{cuda.device_count()} x {', '.join(names)}")]
    if built_for is None:
        return [Finding("torch GPU", False, "this build of torch has no GPU support", "install a torch built for GPUs")]
    return [Finding("torch GPU", False, "torch finds no GPU, or no driver for it", "see whether nvidia-smi lists one")]


def _jax_devices(jax: Any) -> list[Finding]:
    try:
        devices = jax.devices()
    except RuntimeError as error:
        return [Finding("jax devices", False, str(error), "unset JAX_PLATFORMS, or name a platform that is here")]
    kinds = sorted({device.device_kind for device in devices})
    return [Finding("jax devices", True, f"{len(devices)} x {', '.join(kinds)}")]
