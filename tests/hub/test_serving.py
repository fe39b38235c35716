"""`transformers serve` on the loopback address: two chats at once, by an exported kernel, with sdpa's tokens."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import pytest

from hf_attn_plugins.hf.inputs.load import demo_folder
from hf_attn_plugins.hub.repository import export
from tests.hub import serving

pytestmark = [pytest.mark.slow, pytest.mark.multi_process]
for needed in ("kernels", "fastapi", "uvicorn", "openai"):
    pytest.importorskip(needed)

FORWARD, VARLEN = "our-lab/hf-attn-plugins", "our-lab/hf-attn-flash"
CHATS = [
    [{"role": "user", "content": "Name three rivers of Europe. " * 12}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is a glacier?"}],
]
BATCHING = ["--continuous-batching", "--cb-num-blocks", "64", "--cb-block-size", "32", "--cb-max-batch-tokens", "256"]


@pytest.fixture(scope="module")
def model():
    try:
        return str(demo_folder())
    except ImportError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def names(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub")
    export(folder / "forward")
    export(folder / "varlen", interface="varlen", name="hf-attn-flash")
    return f"{FORWARD}={folder / 'forward'}:{VARLEN}={folder / 'varlen'}"


@contextlib.contextmanager
def served(model, names, attention, *options):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable, serving.__file__, model, "--device", "cpu", "--dtype", "float32", "--attn-implementation",
        attention, "--host", "127.0.0.1", "--port", str(port), *options,
    ]  # fmt: skip
    server = subprocess.Popen(command, env={**os.environ, "LOCAL_KERNELS": names, "HF_HUB_OFFLINE": "1"})
    try:
        deadline = time.monotonic() + 240
        while True:
            assert server.poll() is None, "the server ended"
            with contextlib.suppress(urllib.error.URLError):
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
                break
            assert time.monotonic() < deadline, "the server did not come up"
            time.sleep(0.5)
        yield f"http://127.0.0.1:{port}/v1/chat/completions"
    finally:
        server.terminate()
        try:
            server.wait(20)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


def answers(address, model):
    def ask(messages):
        body = {"model": model, "messages": messages, "max_tokens": 16, "temperature": 0, "stream": False}
        request = urllib.request.Request(address, json.dumps(body).encode(), {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=240) as response:
            return json.load(response)["choices"][0]["message"]["content"]

    with ThreadPoolExecutor(len(CHATS)) as pool:
        return list(pool.map(ask, CHATS))


@pytest.fixture(scope="module")
def wanted(model, names):
    with served(model, names, "sdpa") as address:
        found = answers(address, model)
    assert all(found) and found[0] != found[1]
    return found


@pytest.mark.parametrize(("attention", "options"), [(FORWARD, []), (VARLEN, BATCHING)])
def test_two_chats_at_once_have_the_tokens_of_sdpa(attention, options, model, names, wanted):
    with served(model, names, attention, *options) as address:
        assert answers(address, model) == wanted
