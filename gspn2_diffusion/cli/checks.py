"""What ``gspn2 doctor`` looks at. Each check is a small function that returns rows and never raises."""

from __future__ import annotations

import ctypes
import importlib.metadata
import platform
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from gspn2_diffusion import __version__
from gspn2_diffusion.cli import defaults
from gspn2_diffusion.cli.console import describe, fast_imports

if TYPE_CHECKING:
    import torch

Status = Literal["ok", "note", "broken"]
REQUIRED = (
    "torch",
    "diffusers",
    "transformers",
    "accelerate",
    "safetensors",
    "numpy",
    "pillow",
    "typer",
    "rich",
)
OPTIONAL = ("peft", "gradio")
CUPY_NAMES = ("cupy-cuda13x", "cupy-cuda12x", "cupy")


@dataclass(frozen=True)
class Check:
    """One row of the report. "note" is worth knowing, "broken" makes ``gspn2 doctor`` fail."""

    name: str
    status: Status
    value: str
    detail: str = ""


def guarded(name: str, check: Callable[[], Iterator[Check]]) -> Iterator[Check]:
    """The rows of ``check``; whatever it raises becomes a broken row instead."""
    try:
        yield from check()
    except Exception as error:
        yield Check(name, "broken", "failed", describe(error))


def installed(name: str) -> str | None:
    """Version of an installed distribution; costs no import of it."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def check_python() -> Iterator[Check]:
    """Interpreter, platform and this package."""
    status: Status = "ok" if sys.version_info >= (3, 10) else "broken"
    yield Check("python", status, platform.python_version(), f"{platform.system()} {platform.machine()}")
    yield Check("gspn2-diffusion", "ok", __version__)


def check_packages() -> Iterator[Check]:
    """Required packages are there and in the range we ask for; optional ones are listed if there."""
    ranges = _required_ranges()
    for name in REQUIRED:
        version = installed(name)
        wanted = ranges.get(name)
        if version is None:
            yield Check(name, "broken", "missing", f"pip install {name}")
        elif wanted is not None and not wanted.contains(version, prereleases=True):
            yield Check(name, "broken", version, f"gspn2-diffusion needs {name}{wanted}")
        else:
            yield Check(name, "ok", version)
    yield from (Check(name, "ok", version, "optional") for name in OPTIONAL if (version := installed(name)))


def _required_ranges() -> dict[str, Any]:
    """What our own package metadata asks for, by name; empty when run from a tree that is not installed."""
    try:
        from packaging.requirements import Requirement

        lines = importlib.metadata.requires("gspn2-diffusion") or []
    except (ImportError, importlib.metadata.PackageNotFoundError):
        return {}
    parsed = (Requirement(line) for line in lines if "extra ==" not in line)
    return {item.name.lower(): item.specifier for item in parsed}


def check_torch() -> Iterator[Check]:
    """torch starts, and for which CUDA it was built."""
    with fast_imports():
        import torch

    built_for = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built for CPU only"
    yield Check("torch build", "ok", torch.__version__, f"{built_for}, {torch.get_num_threads()} CPU threads")


def check_imports() -> Iterator[Check]:
    """The pipeline can be imported with the installed libraries."""
    start = time.perf_counter()
    with fast_imports():
        import gspn2_diffusion

        name = gspn2_diffusion.GSPN2Pipeline.__name__
    yield Check("imports", "ok", name, f"in {time.perf_counter() - start:.1f} s")


def check_driver() -> Iterator[Check]:
    """The NVIDIA driver, and whether torch sees the GPUs behind it."""
    import torch

    cuda = _driver_cuda_version()
    if cuda is None:
        yield Check("driver", "ok", "none", "no NVIDIA driver: pictures are drawn on the CPU")
        return
    yield Check("driver", "ok", _driver_version() or "unknown", f"for CUDA up to {cuda}")
    if not torch.cuda.is_available():
        yield Check("torch CUDA", "note", "off", f"a driver is there, but {_why_no_cuda()}")


def _why_no_cuda() -> str:
    import torch

    if not torch.version.cuda:
        return "this torch is built for CPU only"
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return describe(error)
    return "torch finds no GPU"


def _driver_cuda_version() -> str | None:
    """Newest CUDA version the driver can run, None without a driver."""
    number = ctypes.c_int()
    try:
        library = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
        failed = library.cuDriverGetVersion(ctypes.byref(number))
    except OSError:
        return None
    return None if failed else f"{number.value // 1000}.{number.value % 1000 // 10}"


def _driver_version() -> str | None:
    """The driver's own version, such as "580.82", from NVML."""
    text = ctypes.create_string_buffer(96)
    try:
        library = ctypes.CDLL("nvml.dll" if sys.platform == "win32" else "libnvidia-ml.so.1")
        if library.nvmlInit_v2() != 0:
            return None
        try:
            failed = library.nvmlSystemGetDriverVersion(text, ctypes.c_uint(len(text)))
        finally:
            library.nvmlShutdown()
    except (OSError, AttributeError):
        return None
    return None if failed else text.value.decode()


def check_gpus() -> Iterator[Check]:
    """Every GPU that torch sees."""
    import torch

    if not torch.cuda.is_available():
        yield Check("GPU", "ok", "none")
        return
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        detail = f"sm_{gpu.major}{gpu.minor}, {gpu.total_memory / 2**30:.0f} GiB"
        yield Check(f"GPU {index}", "ok", gpu.name, f"{detail}, {gpu.multi_processor_count} multiprocessors")


def check_cupy() -> Iterator[Check]:
    """CuPy and the compiler it uses. Missing is only broken if there is a GPU; the backend check says so."""
    found = {name: version for name in CUPY_NAMES if (version := installed(name))}
    if not found:
        yield Check("CuPy", "note", "missing", "the CUDA kernels need it: pip install cupy-cuda13x")
        return
    several = "several CuPy packages overwrite each other; keep one" if len(found) > 1 else ""
    status: Status = "note" if several else "ok"
    yield Check("CuPy", status, " ".join(found.values()), several or next(iter(found)))
    try:
        from cupy_backends.cuda.libs import nvrtc

        major, minor = nvrtc.getVersion()
    except Exception as error:  # a broken installation raises anything, also its own types
        yield Check("NVRTC", "note", "missing", describe(error))
        return
    yield Check("NVRTC", "ok", f"{major}.{minor}")


def check_backend() -> Iterator[Check]:
    """Which implementation of the line scan runs, and why. A GPU without usable kernels is broken."""
    import torch

    from gspn2_diffusion.ops import cupy_backend

    if not torch.cuda.is_available():
        yield Check("backend", "ok", "reference", cupy_backend.availability()[1])
        return
    for index in range(torch.cuda.device_count()):
        with torch.cuda.device(index):
            usable, reason = cupy_backend.availability()
        yield Check(
            f"backend {index}", "ok" if usable else "broken", "cupy" if usable else "reference", reason
        )


def usable_gpus() -> list[int]:
    """Indices of the GPUs on which the kernels run."""
    import torch

    from gspn2_diffusion.ops import cupy_backend

    usable = []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        with torch.cuda.device(index):
            if cupy_backend.availability()[0]:
                usable.append(index)
    return usable


def check_kernels() -> Iterator[Check]:
    """Compile every kernel for every usable GPU, into CuPy's disk cache."""
    import torch

    from gspn2_diffusion.ops import cupy_backend

    for index in usable_gpus():
        with torch.cuda.device(index):
            start = time.perf_counter()
            seconds = cupy_backend.compile_all()
            took = time.perf_counter() - start
        slowest = max(seconds, key=lambda name: seconds[name])
        detail = f"in {took:.1f} s, slowest {slowest} {seconds[slowest]:.1f} s"
        yield Check(f"kernels {index}", "ok", f"{len(seconds)} compiled", detail)


SCAN_TOLERANCE = 1e-5
"""Relative error (norm) that a float32 scan on a GPU may have against the float64 reference."""


def check_scan() -> Iterator[Check]:
    """One small scan on every usable GPU, forward and backward, against the reference."""
    for index in usable_gpus():
        errors = scan_errors(f"cuda:{index}")
        worst = max(errors, key=lambda name: errors[name])
        # Gradients pass through more roundings than the output.
        limits = {name: SCAN_TOLERANCE * (1 if name == "y" else 10) for name in errors}
        right = all(errors[name] <= limits[name] for name in errors)  # False for NaN as well
        detail = f"largest relative error {errors[worst]:.1e} ({worst}) in float32"
        yield Check(f"scan {index}", "ok" if right else "broken", "right" if right else "WRONG", detail)


def scan_errors(device: str, backend: str = "cupy") -> dict[str, float]:
    """Relative error (norm) of the output and each gradient of one small float32 scan on ``device``.

    The problem is ``(B, H, W, C) = (1, 9, 14, 8)``, four directions, two weight groups, with ``u``.
    """
    import torch

    from gspn2_diffusion.ops.line_scan import line_scan

    shapes = {
        "x": (1, 9, 14, 8),
        "weight": (1, 9, 14, 4, 2, 3),
        "lam": (1, 9, 14, 4, 8),
        "u": (1, 9, 14, 4, 8),
    }
    random = torch.Generator().manual_seed(0)
    values = {name: torch.randn(shape, generator=random) for name, shape in shapes.items()}
    incoming = torch.randn(shapes["lam"], generator=random)

    def results(place: str, dtype: torch.dtype, backend: str) -> dict[str, torch.Tensor]:
        inputs = {name: value.to(place, dtype).requires_grad_() for name, value in values.items()}
        y = line_scan(inputs["x"], inputs["weight"], inputs["lam"], inputs["u"], backend=backend)
        y.backward(incoming.to(place, dtype))
        gradients = {f"d{name}": tensor.grad for name, tensor in inputs.items() if tensor.grad is not None}
        return {name: tensor.detach().double().cpu() for name, tensor in {"y": y, **gradients}.items()}

    true = results("cpu", torch.float64, "reference")
    ours = results(device, torch.float32, backend)
    return {name: float((ours[name] - true[name]).norm() / true[name].norm()) for name in true}


def check_model(name: str = defaults.MODEL) -> Iterator[Check]:
    """The embedded model is there and whole."""
    from gspn2_diffusion.files import model_files, model_hash
    from gspn2_diffusion.pipelines.model_folders import check_model_folder, embedded_model_folder

    folder: Path = embedded_model_folder(name)
    label = f"model {name}"
    if not folder.is_dir():
        yield Check(label, "broken", "missing", f"no folder {folder}")
        return
    check_model_folder(str(folder))
    megabytes = sum(file.stat().st_size for file in model_files(folder)) / 1e6
    yield Check(label, "ok", model_hash(folder)[:10], f"{megabytes:.1f} MB")
