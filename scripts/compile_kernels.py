"""Compile every CUDA kernel for several GPU architectures, without a GPU or a driver.

    python scripts/compile_kernels.py                       # the architectures we support
    python scripts/compile_kernels.py --arch sm_90 --arch sm_120
    python scripts/compile_kernels.py --quick               # all for sm_90, one of each kernel elsewhere

NVRTC does the work, the same compiler that runs at first use. Ends with 1 if a kernel does not compile.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from gspn2_diffusion.ops import cupy_backend

ARCHITECTURES = ("sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")


@dataclass(frozen=True)
class Result:
    """One kernel variant on one architecture; ``error`` is the compiler's log if it failed."""

    name: str
    arch: str
    seconds: float
    cubin_bytes: int
    error: str = ""


def compile_variants(arch: str, quick: bool) -> list[Result]:
    """Every kernel variant for ``arch`` (``"sm_90"``); failures are results, not exceptions.

    Args:
        quick: of architectures other than sm_90, only one variant of each kernel.
    """

    def build(variant: cupy_backend.Variant) -> Result:
        start = time.perf_counter()
        try:
            size, error = len(cupy_backend.compile_cubin(variant, arch)), ""
        except RuntimeError as failure:
            size, error = 0, str(failure)
        return Result(str(variant), arch, time.perf_counter() - start, size, error)

    chosen = cupy_backend.variants(cupy_backend.cluster_sizes(arch))
    if quick and arch != "sm_90":
        chosen = list({variant.name: variant for variant in chosen}.values())
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(build, chosen))


def _architecture(text: str) -> str:
    if not re.fullmatch(r"sm_\d{2,3}[af]?", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form sm_90")
    return text


def _print_row(result: Result, width: int) -> None:
    size = f"{result.cubin_bytes / 1024:8.1f} KiB" if not result.error else "      FAILED"
    print(f"{result.name:<{width}}  {result.arch:<7}  {result.seconds:6.2f} s  {size}", flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0 all compiled, 1 some did not."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--arch", action="append", type=_architecture, help="such as sm_90; may be repeated")
    parser.add_argument("--quick", action="store_true", help="one variant of each kernel, but all for sm_90")
    options = parser.parse_args(arguments)
    architectures = list(dict.fromkeys(options.arch or ARCHITECTURES))
    failures = []
    total = 0
    start = time.perf_counter()
    for arch in architectures:
        results = compile_variants(arch, options.quick)
        width = max(len(result.name) for result in results)
        for result in results:
            _print_row(result, width)
        total += len(results)
        failures += [result for result in results if result.error]
    for failure in failures:
        print(f"\n{failure.name} for {failure.arch}:\n{failure.error}", file=sys.stderr)
    took = f"{len(architectures)} architectures in {time.perf_counter() - start:.1f} s"
    print(f"{total - len(failures)} of {total} compiled for {took}")
    return 1 if failures or not total else 0


if __name__ == "__main__":
    sys.exit(main())
