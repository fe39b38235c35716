"""What Linux says of this computer's CPU. Nothing heavy is imported."""

from __future__ import annotations

from pathlib import Path

X86, ARM = ("x86_64", "amd64"), ("aarch64", "arm64")  # `platform.machine()` in lower case


def fields(path: Path = Path("/proc/cpuinfo")) -> dict[str, str]:
    """Name -> value of Linux's list of CPUs, as it stands for the first one that has it; {} where it cannot be read."""
    found: dict[str, str] = {}
    try:
        with path.open(encoding="utf-8", errors="ignore") as file:
            for line in file:
                name, _, value = line.partition(":")
                found.setdefault(name.strip(), value.strip())
    except OSError:
        return {}
    return found
