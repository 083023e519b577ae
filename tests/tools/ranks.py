"""Ranks of one run as forked processes, each with what torchrun would put into its environment."""

import contextlib
import io
import os
import pathlib
import signal
import socket
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from ptq.network.network import Block
from ptq.ranks.torch_world import open_world
from ptq.ranks.world import World
from ptq.run.kept.kept_pass import KeptPass

SECONDS = 300.0


@dataclass(frozen=True)
class Ended:
    """How a rank has ended: its exit status, -9 where it was killed, and what it has printed on both streams."""

    status: int
    text: str


def run_ranks(
    count: int,
    work: Callable[[], int | None],
    folder: pathlib.Path,
    environments: Mapping[int, Mapping[str, str]] | None = None,
) -> list[Ended]:
    """Lets `count` processes do `work` as ranks of one run; its value, 0 for None, is the exit status, 1 an exception.

    Args:
        count: of ranks.
        work: is called in each.
        folder: for what they print.
        environments: what else is in the environment, by rank.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    folder.mkdir(parents=True, exist_ok=True)
    children = []
    for rank in range(count):
        child = os.fork()
        if not child:
            _be(rank, count, port, work, folder / f"rank-{rank}.txt", (environments or {}).get(rank, {}))
        children.append(child)
    return [_awaited(child, folder / f"rank-{rank}.txt") for rank, child in enumerate(children)]


def in_world(work: Callable[[World], int | None]) -> Callable[[], int | None]:
    """Returns work for `run_ranks` that is given the ranks."""

    def started() -> int | None:
        with open_world("cpu") as world:
            return work(world)

    return started


def as_program(work: Callable[[], int | None]) -> Callable[[], int]:
    """Returns `work` as the command line does it: a mistake, or a rank that has ended, is a line and an exit status."""

    def started() -> int:
        import ptq.cli.app as app

        app._dispatch = lambda arguments, program: work() or 0
        return app.main([])

    return started


def killed_after(work: Callable[[], int | None], rank: int, blocks: int) -> Callable[[], int]:
    """Returns `work` as the command line does it, of which one rank is killed when so many blocks have been quantized."""

    def started() -> int:
        keep = KeptPass.keep

        def killed(self: KeptPass, block: Block) -> None:
            keep(self, block)
            if self.folder.name == "quantize" and os.environ.get("RANK") == str(rank) and block.index == blocks - 1:
                os.kill(os.getpid(), signal.SIGKILL)

        KeptPass.keep = killed  # type: ignore[method-assign]
        return as_program(work)()

    return started


def _be(
    rank: int, count: int, port: int, work: Callable[[], int | None], out: pathlib.Path, more: Mapping[str, str]
) -> None:
    status = 1
    try:
        torch.set_num_threads(1)  # a pool of threads does not outlive a fork
        os.environ |= {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(count),
            "LOCAL_WORLD_SIZE": str(count),
        }
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), **more}
        text = io.StringIO()
        try:
            with contextlib.redirect_stdout(text), contextlib.redirect_stderr(text):
                status = work() or 0
        finally:
            out.write_text(text.getvalue())
    except BaseException:
        with out.open("a") as file:
            traceback.print_exc(file=file)
    finally:
        os._exit(status)


def _awaited(child: int, out: pathlib.Path) -> Ended:
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return Ended(os.waitstatus_to_exitcode(status), out.read_text() if out.is_file() else "")
        time.sleep(0.02)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    raise TimeoutError(f"a rank has not ended in {SECONDS:.0f} seconds")
