"""One machine of a run on several; started by a launcher over ssh, never by hand.

It runs the command that was typed elsewhere, passes on the stops that it finds in a folder of the run, and has it save
and end where the machine that called is gone.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import select
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

from dtrain.errors import RunError
from dtrain.runs.beside import STOPS

if TYPE_CHECKING:
    from dtrain.launchers._orders import Orders

LOOK_S = 0.25
SEEN_S = 20.0
"""How long a folder that was just made may take to be seen here: a network file system keeps what it has read."""


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("host")
    parser.add_argument("orders")


def run(args: argparse.Namespace) -> int:
    from dtrain.launchers._orders import Orders

    if args.orders == "-":
        orders = Orders.from_json(sys.stdin.buffer.readline().decode())
    else:
        orders = Orders.from_word(args.orders)
    return _obey(args.host, orders)


def _obey(host: str, orders: Orders) -> int:
    from dtrain.launchers import afar

    control = Path(orders.control)
    try:
        os.chdir(orders.cwd)
    except OSError as error:
        raise RunError(f"{host}: {orders.cwd}: {error.strerror}; the command is typed in a folder that all machines "
                       f"see") from error  # fmt: skip
    _wait_for(control, host)
    print(afar.BEGUN, file=sys.stderr, flush=True)
    process = subprocess.Popen(
        [sys.executable, "-u", "-m", "dtrain", *orders.launch],
        env={**os.environ, **orders.env, **afar.environment(host, orders)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
        preexec_fn=_begin,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    pumps = [threading.Thread(target=_pump, args=(stream.fileno(), to), daemon=True)
             for stream, to in ((process.stdout, 1), (process.stderr, 2))]  # fmt: skip
    for pump in pumps:
        pump.start()
    code = _see_through(process, control)
    for pump in pumps:
        pump.join(SEEN_S)
    return code


def _begin() -> None:
    """Called in the new process. A stop may be there already: it waits until the command can act on it."""
    from dtrain.runs.process import die_with_parent

    signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)
    die_with_parent(signal.SIGTERM)


def _pump(source: int, to: int) -> None:
    """To its end, also where nobody reads it any more: a run whose words are not heard goes on to its save."""
    while got := os.read(source, 65536):
        with contextlib.suppress(OSError):
            os.write(to, got)


def _wait_for(control: Path, host: str) -> None:
    deadline = time.monotonic() + SEEN_S
    while not control.is_dir():
        if time.monotonic() > deadline:
            raise RunError(f"{host}: {control.parent.parent} is not seen here; run.dir must be on a file system that "
                           f"all machines share")  # fmt: skip
        time.sleep(LOOK_S)


def _see_through(process: subprocess.Popen[bytes], control: Path) -> int:
    """The exit code of the command; that of a shell where a signal ended it."""
    from dtrain.launchers import afar

    passed, listening = 0, True
    while process.poll() is None:
        told = afar.stops(control)
        if listening and select.select([0], [], [], 0)[0] and not os.read(0, 4096):
            listening = False
        if not listening and not told:
            told = [signal.SIGTERM]
        if len(told) > passed:
            process.send_signal(told[passed])
            passed += 1
        time.sleep(LOOK_S * 2)
    return process.returncode if process.returncode >= 0 else 128 - process.returncode
