"""Processes for tests, forked from one that has imported torch and negmine, so that each starts within milliseconds.

That process computes nothing, so its children can use threads, unlike those forked from a process in which tests ran.
"""

import multiprocessing as mp
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

IMPORTED_ONCE = ["torch._dynamo.testing", "torch.distributed.fsdp", "torch.nn.parallel", "negmine"]


def context() -> Any:
    """The context of multiprocessing that starts these processes."""
    found = mp.get_context("forkserver")
    found.set_forkserver_preload(IMPORTED_ONCE)
    return found


def started(function: Callable[..., None], *arguments: Any) -> tuple[mp.Process, Connection]:
    """Start function(connection, *arguments) in a process of its own. Return the process and the other end of the connection."""
    ours, theirs = mp.Pipe()
    process = context().Process(target=function, args=(theirs, *arguments), daemon=True)
    process.start()
    theirs.close()
    return process, ours


def _send(connection: Connection, function: Callable, arguments: tuple) -> None:
    connection.send(function(*arguments))


def result_of(function: Callable, *arguments: Any) -> Any:
    """Return function(*arguments), computed in a process of its own."""
    process, connection = started(_send, function, arguments)
    try:
        return connection.recv()
    except EOFError:
        process.join()
        raise AssertionError(f"{function.__name__}{arguments} ended with exit code {process.exitcode}") from None
    finally:
        process.join()
