"""How many threads to compute with: as many as other processes leave cores for.

Threads of one step wait for the slowest of them. Where another process shares a core with one, all wait for that core:
two threads on two cores, one of which was busy, have been measured to train at a quarter of the speed of one thread.
"""

import os
import time
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Load", "fitting"]

STAT = Path("/proc/stat")
BRIEF = 0.2  # seconds; in a shorter time the system's clock counts too few ticks
KNOWN = 0.8  # of the time that has passed is accounted for, if the system tells the truth


class Load:
    """What other processes take of the cores that this one may use, from now on. Known on Linux alone."""

    def __init__(self):
        self.began = _times()

    def free(self) -> float | None:
        """How many cores the others have left free on average; None if that is not known."""
        if self.began is None:
            return None
        time.sleep(max(0.0, BRIEF - (time.monotonic() - self.began.wall)))
        now = _times()
        wall, own = now.wall - self.began.wall, now.own - self.began.own
        idle, told = now.idle - self.began.idle, now.told - self.began.told
        return idle / wall + own / wall if told > KNOWN * wall * now.cores else None


@dataclass(frozen=True)
class Times:
    """Seconds since some moment: on the clock, of this process, and of its cores, idle and in all."""

    wall: float
    own: float
    idle: float
    told: float
    cores: int


def _times() -> Times | None:
    try:
        lines, cores = STAT.read_text().splitlines(), os.sched_getaffinity(0)
        tick = os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError):  # not Linux
        return None
    of_core = {name: [int(t) / tick for t in rest] for name, *rest in map(str.split, lines) if name.startswith("cpu")}
    spent = [of_core[f"cpu{core}"] for core in cores if f"cpu{core}" in of_core]
    if not spent:
        return None
    # user, nice, system, idle, iowait, irq, softirq, steal; what guests take is part of user.
    idle, told = sum(times[3] + times[4] for times in spent), sum(sum(times[:8]) for times in spent)
    return Times(time.monotonic(), time.process_time(), idle, told, len(spent))


def fitting(free: float | None, threads: int) -> int:
    """How many of `threads` have a core to themselves where `free` cores are; all, if that is not known."""
    return threads if free is None else max(1, min(threads, round(free)))
