"""Training runs in processes of their own that get killed; without a GPU, forks that have torch imported."""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from ports import reserved_port
from script_modules import load_script

ROOT = Path(__file__).parents[1]
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    [
        "datasets",  # the server may also start commands of tests/cli, hence theirs
        "dynamicprompts.generators",
        "gspn2_diffusion.cli",
        "diffusers.models.autoencoders.autoencoder_kl",
        "diffusers.schedulers.scheduling_flow_match_euler_discrete",
        "gspn2_diffusion.pipelines.pipeline_gspn2",
        "gspn2_diffusion.training.denoiser",
        "transformers.models.bert.modeling_bert",
        "transformers.models.bert.tokenization_bert",
    ]
)


def starting() -> Any:
    """How to start a process: CUDA does not survive a fork, and the fork server's imports touch it."""
    return multiprocessing.get_context("spawn") if torch.cuda.is_available() else CONTEXT


def script(name: str) -> Any:
    """A script as a module; `name` is its path from scripts/ on, without the suffix."""
    path = (ROOT / "scripts" / f"{name}.py").resolve()
    sys.path.insert(0, str(path.parent))  # as for a program that is run
    return load_script(path)


def kill_in_step(step: int) -> None:
    """SIGKILL when the weights of optimiser step `step` are half updated."""
    from gspn2_diffusion.training.optim import JointOptimizer

    calls = []

    def broken(self: JointOptimizer, closure: Any = None) -> None:
        calls.append(1)
        for part in self.parts:
            part.step()
            if len(calls) == step:
                os.kill(os.getpid(), signal.SIGKILL)

    JointOptimizer.step = broken  # type: ignore[method-assign,assignment]


def kill_in_write(file: int) -> None:
    """SIGKILL while the checkpoint file number `file` is half written."""
    from gspn2_diffusion.training import checkpoint as ckpt

    whole, calls = ckpt.save_file, []

    def broken(tensors: Any, path: Path) -> None:
        calls.append(1)
        whole(tensors, path)
        if len(calls) == file:
            os.truncate(path, os.path.getsize(path) // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    ckpt.save_file = broken  # type: ignore[assignment]


def terminate_in_step(step: int) -> None:
    """SIGTERM during optimiser step `step`, as a scheduler sends it."""
    from gspn2_diffusion.training.optim import JointOptimizer

    whole, calls = JointOptimizer.step, []

    def noisy(self: JointOptimizer, closure: Any = None) -> None:
        calls.append(1)
        if len(calls) == step:
            os.kill(os.getpid(), signal.SIGTERM)
        whole(self)

    JointOptimizer.step = noisy  # type: ignore[method-assign]


def limit_files(kilobytes: int) -> None:
    """No file may grow beyond this, as on a disk that is full."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (kilobytes * 1024, kilobytes * 1024))


TROUBLES = {f.__name__: f for f in (kill_in_step, kill_in_write, terminate_in_step, limit_files)}


def _run(name: str, options: list[str], trouble: str | None, value: int) -> None:
    torch.set_num_threads(1)
    if trouble is not None:
        TROUBLES[trouble](value)
    script(name).main(options)


def train(name: str, options: list[str], trouble: str | None = None, value: int = 0) -> int | None:
    """Exit code of a script in a new process, negative for a signal."""
    process = starting().Process(target=_run, args=(name, options, trouble, value))
    process.start()
    process.join(600)
    if process.exitcode is None:
        process.kill()
        process.join()
    return process.exitcode


def _join(name: str, options: list[str], environment: dict[str, str]) -> None:
    os.environ.update(environment)
    _run(name, options, None, 0)


def train_together(name: str, options: list[str], processes: int, **environment: str) -> list[int | None]:
    """Exit codes of a script that several processes run together, as torchrun would start them."""
    shared = {
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1",
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": "1",  # else accelerate counts cores, which not every machine lists
        **environment,
    }
    started = []
    with reserved_port() as port:
        for rank in range(processes):
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_PORT": str(port)}
            process = starting().Process(target=_join, args=(name, options, shared | own))
            process.start()
            started.append(process)
        for process in started:
            process.join(600)
            if process.exitcode is None:
                process.kill()
                process.join()
    return [process.exitcode for process in started]
