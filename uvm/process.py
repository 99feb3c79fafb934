"""The kernel's process: the signals that it obeys, what it says when it crashes or hangs, and when it ends.

`batos.py` calls these; they know no organ. Layer 0.
"""

from __future__ import annotations

import asyncio
import faulthandler
import os
import signal
import sys
import threading
from collections.abc import Callable

MAX_DESCRIPTORS = 65_536


def heed_signals(stop: Callable[[], None], say: Callable[[str], None]) -> None:
    """Has SIGINT, SIGTERM and SIGHUP (a closed terminal) call `stop` on the running loop.

    A second SIGINT ends the process at once, also where its loop is blocked by then; a loop that was blocked
    already at the first hears of neither before it goes on.
    """
    loop = asyncio.get_running_loop()
    if sys.platform == "win32":
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGBREAK):
            signal.signal(number, lambda *_: loop.call_soon_threadsafe(stop))
        return

    def interrupted() -> None:
        say("Ctrl-C again ends the kernel at once")
        stop()
        loop.remove_signal_handler(signal.SIGINT)
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # the system's own, which needs no loop

    loop.add_signal_handler(signal.SIGINT, interrupted)
    loop.add_signal_handler(signal.SIGTERM, stop)
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # as nohup sets it
        loop.add_signal_handler(signal.SIGHUP, stop)


def end_within(seconds: float, say: Callable[[str], None], status: Callable[[], int]) -> None:
    """Ends the process after so long, whatever still runs in a thread; what was committed is safe.

    Args:
        status: asked then for the exit status.
    """

    def end() -> None:
        say(f"Not everything ended within {seconds:g} s; the kernel ends without it. Its threads:")
        faulthandler.dump_traceback()
        os._exit(status())

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()


def tell_where_it_stands() -> None:
    """Has a crash, and SIGABRT (which the watchdog sends a hung kernel), print where each thread stands.

    SIGUSR1 does so without ending the process.
    """
    faulthandler.enable()
    if sys.platform != "win32":
        import resource

        faulthandler.register(signal.SIGUSR1)
        # A core file would hold the secret keys.
        resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))


def admit_many_connections() -> None:
    """Takes as many descriptors as the system gives: each connection is one, a stranger's too for a while."""
    if sys.platform != "win32":
        import resource

        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        limit = MAX_DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, MAX_DESCRIPTORS)
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
