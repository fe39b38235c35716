"""`transformers serve` with a kernel from a folder; run as a script, by test_serving.py.

Transformers 5.24 asks for kernels 0.18.2 to 0.19. With an older `kernels` installed, this lifts the check.
"""

from __future__ import annotations

import sys


def main() -> None:
    import kernels
    from transformers.cli.transformers import main as transformers
    from transformers.integrations import hub_kernels

    if not hub_kernels.is_kernels_available():
        hub_kernels.is_kernels_available = lambda *_: True
        hub_kernels.get_kernel_hub = kernels.get_kernel
    sys.argv = ["transformers", "serve", *sys.argv[1:]]
    transformers()


if __name__ == "__main__":
    main()
