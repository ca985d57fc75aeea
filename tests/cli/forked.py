"""Commands in processes of their own without each importing torch: a fork server has imported it for them."""

from __future__ import annotations

import multiprocessing
import os
import sys
from multiprocessing.process import BaseProcess

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    [
        "gspn2_diffusion.pipelines.pipeline_gspn2",
        "gspn2_diffusion.cli",
        "diffusers.models.autoencoders.autoencoder_kl",
        "diffusers.schedulers.scheduling_flow_match_euler_discrete",
        "transformers.models.bert.modeling_bert",
        "transformers.models.bert.tokenization_bert",
        "dynamicprompts.generators",
    ]
)


def command(arguments: list[str], environment: dict[str, str]) -> None:
    """Runs in the child."""
    os.environ.update(environment)
    import torch

    from gspn2_diffusion.cli import run

    torch.set_num_threads(1)  # OMP_NUM_THREADS was read when the server imported torch

    sys.exit(run(arguments))


def start(*arguments: object, **environment: object) -> BaseProcess:
    """``gspn2 ...`` in a new process, in which torch has one thread: all that it can have after a fork."""
    strings = {name: str(value) for name, value in environment.items()}
    process = CONTEXT.Process(target=command, args=([str(a) for a in arguments], strings))
    process.start()
    return process


def finish(process: BaseProcess, seconds: float = 600) -> int | None:
    """The exit code; a process that hangs is killed."""
    process.join(seconds)
    if process.exitcode is None:
        process.kill()
        process.join()
    return process.exitcode
