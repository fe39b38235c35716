"""`python -m hf_attn_plugins.eval`: the same as `hf-attn eval`."""

import sys

from hf_attn_plugins.cli import main

sys.exit(main(["eval", *sys.argv[1:]]))
