"""Threads for what may hang in the outside world: folders of a dead server, name servers that don't answer.

They are not those that commits and the log run in: whoever fills these, the image goes on. Imports nothing of
BAT OS.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


class Threads:
    """A bounded number of threads, in which work is given up as soon as its caller is cancelled.

    Args:
        name: of the threads, for whoever looks at the process.
        most: threads that may be busy, or hang, at once; more work waits.
    """

    def __init__(self, name: str, most: int) -> None:
        self._pool = ThreadPoolExecutor(most, thread_name_prefix=name)

    async def run(self, work: Callable[[], T]) -> T:
        """Returns what `work` returned.

        A cancelled caller does not wait: `work` that has begun goes on unseen, so it may change only what its
        caller throws away then.
        """
        return await asyncio.get_running_loop().run_in_executor(self._pool, work)
