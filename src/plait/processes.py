"""What tells a process of this machine from a later one of its number."""

import contextlib
from pathlib import Path

BOOT = Path("/proc/sys/kernel/random/boot_id")


def started(pid: int) -> str:
    """Boot and tick at which a process began; "" if there is none, or it has ended and is not yet reaped."""
    with contextlib.suppress(OSError, IndexError):
        # The name, in parentheses, may hold spaces.
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        if fields[0] != "Z":
            return f"{BOOT.read_text(encoding='utf-8').split('-')[0]}-{fields[19]}"
    return ""
