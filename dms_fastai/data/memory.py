"""How much memory there is, and how much of it is free."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import torch

try:
    import resource
except ImportError:  # Windows
    resource = None

__all__ = ["free_memory", "machine_memory"]

CGROUP, GROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def machine_memory() -> float:
    """Bytes of memory that the machine has; infinity where the system does not say."""
    try:
        return float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    except (AttributeError, ValueError, OSError):
        return float("inf")


def free_memory(device: torch.device) -> float:
    """Bytes of memory that are free on `device`, within the limits that a container or a shell sets on this process."""
    if device.type == "cuda":
        reserved = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return float(torch.cuda.mem_get_info(device)[0] + reserved)
    return min(_system(), *_limits(), machine_memory()) if device.type == "cpu" else machine_memory()


def _table(file: Path) -> dict[str, int]:
    """Names and numbers of a file of the kernel's, in its own units."""
    with contextlib.suppress(OSError):
        words = (line.replace(":", " ").split() for line in file.read_text().splitlines())
        return {word[0]: int(word[1]) for word in words if len(word) > 1 and word[1].isdecimal()}
    return {}


def _system() -> float:
    """What the system could give without swapping."""
    return 1024 * _table(Path("/proc/meminfo")).get("MemAvailable", float("inf"))


def _limits() -> Iterator[float]:
    """What is left of each limit on this process; memory that shows a file can be read again, and so counts as free."""
    for folder, limit, used, kept in _groups():
        with contextlib.suppress(OSError, ValueError):  # no such group, or "max"
            most, now = (int((folder / name).read_text()) for name in (limit, used))
            stat = _table(folder / "memory.stat")
            yield most - now + sum(stat.get(f"{kept}{name}", 0) for name in ("active_file", "inactive_file"))
    if resource is not None:
        own = _table(Path("/proc/self/status"))
        for limit, used in (("RLIMIT_AS", "VmSize"), ("RLIMIT_DATA", "VmData")):
            most = resource.getrlimit(getattr(resource, limit))[0]
            if most != resource.RLIM_INFINITY:
                yield most - 1024 * own.get(used, 0)
    yield float("inf")


def _groups() -> Iterator[tuple[Path, str, str, str]]:
    """The control groups of this process, and those that they are in; with the names of their files and numbers."""
    with contextlib.suppress(OSError):
        for line in GROUPS.read_text().splitlines():
            _, names, path = line.split(":", 2)
            if not names:
                root, files = CGROUP, ("memory.max", "memory.current", "")
            elif "memory" in names.split(","):
                root, files = CGROUP / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_")
            else:
                continue
            own = root / path.lstrip("/")
            yield from ((folder, *files) for folder in (own, *own.parents) if folder.is_relative_to(root))
