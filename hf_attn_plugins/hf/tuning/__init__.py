"""The parts of `hap.tune`: `heads.py` orders key heads, `measuring.py` measures options, `search.py` chooses them."""
