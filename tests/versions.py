"""`make test-versions`: the smoke set on several versions of Transformers, each in an environment of its own.

    python -m tests.versions [--floor] [VERSION ...]

The environments lie under .cache/versions/. Each holds one Transformers with the tokenizers and huggingface_hub that it
asks for; torch and everything else come from the environment that runs this, by a .pth file, so nothing large is
downloaded. The version at hand is run as well, last, unless --floor or versions are given.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import sysconfig
import time
import venv
from pathlib import Path

ROOT = Path(__file__).parents[1]
PLACE = ROOT / ".cache" / "versions"
FLOOR = "5.0.0"
BETWEEN = ("5.4.0", "5.9.0")
SMOKE = ("tests/core/test_compat.py", "tests/hf/test_compat.py", "tests/hf/test_interface.py", "tests/hf/test_verbs.py",
         "tests/hf/test_scan.py", "tests/star/test_encode.py", "tests/star/test_transformers.py")  # fmt: skip
# What Transformers 5.0 to 5.9 need of another version than 5.24 does, and what these need beside.
BESIDE = (
    "tokenizers>=0.22,<=0.23.0",
    "huggingface_hub>=1.5,<2",
    "httpx",
    "httpcore",
    "h11",
    "anyio",
    "certifi",
    "idna",
)


def environment(version: str) -> Path:
    """The Python of an environment with that Transformers, made where it is missing."""
    folder = PLACE / version
    python, done = folder / "bin" / "python", folder / "done"
    if done.exists():
        return python
    venv.create(folder, with_pip=True, clear=True)
    where = [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    site = Path(subprocess.run(where, check=True, capture_output=True, text=True).stdout.strip())
    # After its own packages, which therefore win. Paths that reach this environment by .pth files are named too.
    ours = dict.fromkeys([sysconfig.get_path("purelib"), *(path for path in sys.path if path.endswith("-packages"))])
    (site / "theirs.pth").write_text("\n".join(ours) + "\n", encoding="utf-8")
    _link_ourselves(site)
    install = [python, "-m", "pip", "install", "-q", "--no-deps", f"transformers=={version}", *BESIDE]
    subprocess.run(install, check=True)
    done.touch()
    return python


def _link_ourselves(site: Path) -> None:
    """Copy what makes this checkout importable: the files that `pip install -e .` left."""
    for file in Path(sysconfig.get_path("purelib")).glob("__editable__*hf_attn_plugins*"):
        (site / file.name).write_bytes(file.read_bytes())


def run(python: Path | str, label: str) -> bool:
    """Run the smoke set; True when it passed."""
    started = time.monotonic()
    command = [python, "-m", "pytest", "-p", "no:cacheprovider", *SMOKE]
    # One thread: on tiny models more of them only wait for each other.
    environ = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    code = subprocess.run(command, cwd=ROOT, env=environ).returncode
    print(
        f"Transformers {label}: {'passed' if code == 0 else 'FAILED'} in {time.monotonic() - started:.0f} s", flush=True
    )
    return code == 0


def main() -> int:
    """Run what the command line asks for; 1 when a version failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--floor", action="store_true", help="only the lowest version that is supported")
    parser.add_argument("versions", nargs="*", help="other versions, such as 5.2.0")
    chosen = parser.parse_args()
    versions = chosen.versions or ([FLOOR] if chosen.floor else [FLOOR, *BETWEEN])
    passed = [run(environment(version), version) for version in versions]
    if not chosen.versions and not chosen.floor:
        passed.append(run(sys.executable, "as installed here"))
    return 0 if all(passed) else 1


if __name__ == "__main__":
    sys.exit(main())
