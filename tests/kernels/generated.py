"""FlexAttention as PyTorch's inductor compiles it for an NVIDIA GPU that is not there: the Triton code of its kernels.

A call is traced on the CPU. Its graphs are given tensors without data on "cuda:0", and inductor is stopped once it has
written its code. The kernels in it are compiled ahead of time, or run on the CPU in Triton's interpreter.

PyTorch keeps some of its answers about GPUs, so this runs in a process of its own (test_flex_generated.py).
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch._dynamo.device_interface
import torch._functorch.config
import torch._higher_order_ops.flex_attention
import torch._inductor.graph
import torch._inductor.scheduler
from torch._guards import TracingContext, tracing
from torch._inductor.async_compile import AsyncCompile
from torch._inductor.compile_fx import compile_fx, compile_fx_inner
from torch._inductor.runtime import triton_heuristics
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import _pytree

from hf_attn_plugins.kernels.flex import attend as flex
from hf_attn_plugins.kernels.triton.static import CHIPS, _read_nvidia

CUDA = torch.device("cuda", 0)
KERNELS = re.compile(r"async_compile\.triton\('(\w+)', '''(.*?)''', device_str='cuda'\)", re.S)
XBLOCK, R0_BLOCK = 64, 32  # of the small kernels beside attention, where inductor would try several


class Stop(Exception):
    """Raised by inductor once its code is there, and by a graph that is not to run."""


@contextlib.contextmanager
def flex_for(arch: str, use: Callable[[str], Callable[..., Any]]) -> Iterator[None]:
    """Let the kernel "flex" compile on CPU tensors what it would on a GPU of this architecture, gradients as well.

    Args:
        use: takes the code of a graph (forward or backward) and returns what runs instead.
    """
    from torch.nn.attention import flex_attention as public

    torch.compiler.reset()

    def inner(graph: Any, inputs: list[Any], **more: Any) -> Any:
        with pretending(arch):
            code = code_of(graph, inputs, more)
        return use(code)

    def compiled(compile: bool) -> Any:
        def run(*inputs: Any) -> Any:
            out, aux = public.flex_attention(*inputs, return_aux=public.AuxRequest(lse=True))
            return out, aux.lse

        backend = functools.partial(compile_fx, inner_compile=inner)
        return torch.compile(run, fullgraph=True, dynamic=False, backend=backend)

    with (
        mock.patch.object(flex, "flex_attention", functools.cache(compiled)),
        mock.patch.object(flex, "needs_gradient", lambda *tensors: False),
        mock.patch.object(public, "_validate_device", lambda *tensors: None),
        torch._functorch.config.patch(force_non_lazy_backward_lowering=True),
    ):
        yield


@contextlib.contextmanager
def pretending(arch: str) -> Iterator[None]:
    """Let PyTorch and Triton believe in one GPU of this architecture, which nothing may use."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime.driver import driver

    number, shared = CHIPS[arch].arch, CHIPS[arch].block_shared
    assert isinstance(number, int)
    facts = SimpleNamespace(
        name=arch, major=number // 10, minor=number % 10, multi_processor_count=108, regs_per_multiprocessor=65536,
        max_threads_per_multi_processor=2048, max_threads_per_block=1024, warp_size=32, total_memory=80 << 30,
        shared_memory_per_block=49152, shared_memory_per_block_optin=shared, gcnArchName="", L2_cache_size=40 << 20,
    )  # fmt: skip
    answers = {
        "is_available": True, "get_device_properties": facts, "get_device_capability": (facts.major, facts.minor),
        "current_device": 0, "device_count": 1, "_exchange_device": 0, "_maybe_exchange_device": 0,
        "get_rng_state": torch.zeros(16, dtype=torch.uint8), "set_rng_state": None,
        "get_compute_capability": number, "is_triton_capable": True, "raise_if_triton_unavailable": None,
    }  # fmt: skip
    interface = torch._dynamo.device_interface.CudaInterface
    hop = sys.modules["torch._higher_order_ops.flex_attention"]
    active = SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", number, 32), get_current_device=lambda: 0,
        get_active_torch_device=lambda: CUDA,
        utils=SimpleNamespace(get_device_properties=lambda index: {"max_shared_mem": shared}),
    )  # fmt: skip
    with contextlib.ExitStack() as stack:
        for owner in (torch.cuda, interface, interface.Worker):
            for name, answer in answers.items():
                if hasattr(owner, name):
                    said = staticmethod(lambda *given, answer=answer: answer)
                    stack.enter_context(mock.patch.object(owner, name, said))
        stack.enter_context(mock.patch.object(torch.version, "cuda", "13.0"))
        stack.enter_context(mock.patch.object(torch._inductor.scheduler, "has_triton", lambda: True))
        stack.enter_context(mock.patch.object(hop, "_permute_strides", _permuted))
        stack.enter_context(mock.patch.object(driver, "_active", active))
        stack.enter_context(mock.patch.object(AsyncCompile, "use_process_pool", lambda *given: False))
        yield


def _permuted(out: Any, strides: Any) -> Any:
    """PyTorch's own function copies, which a tensor without data on a GPU that is not there cannot."""
    found, step = [0] * out.dim(), 1
    for dim in sorted(range(out.dim()), key=lambda dim: strides[dim]):
        found[dim], step = step, step * out.shape[dim]
    return out.new_empty_strided(out.shape, found)


def _moved(tensor: Any) -> Any:
    if not isinstance(tensor, FakeTensor):
        return tensor
    bare = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
    return FakeTensor(tensor.fake_mode, bare, CUDA)


def code_of(graph: Any, inputs: list[Any], more: dict[str, Any]) -> str:
    """The code that inductor writes for a graph on the GPU of `pretend`."""
    found: list[str] = []

    def stop(self: Any) -> None:
        found.append(self.codegen()[0].value)
        raise Stop

    for module in graph.modules():
        for node in module.graph.nodes if hasattr(module, "graph") else ():
            node.meta |= {name: _pytree.tree_map(_moved, node.meta[name]) for name in ("val",) if name in node.meta}
            if node.kwargs.get("device") is not None:
                node.kwargs = {**node.kwargs, "device": CUDA}
    inputs = [_moved(each) for each in inputs]
    mode = next(each.fake_mode for each in inputs if isinstance(each, FakeTensor))
    lowering = torch._inductor.graph.GraphLowering
    with tracing(TracingContext(mode)), mock.patch.object(lowering, "compile_to_module", stop):
        try:
            compile_fx_inner(graph, inputs, **more)
        except Exception:
            if not found:
                raise
    return found[0]


class Kernel(NamedTuple):
    """A generated kernel: Triton's function and what its decorator was given."""

    function: Any
    options: dict[str, Any]


def load(name: str, source: str, folder: Path) -> Kernel:
    """The kernel `name` of generated code."""
    given: list[dict[str, Any]] = []

    def decorator(*words: Any, **options: Any) -> Any:
        given.append(options)
        return lambda function: function

    kinds = ("template", "pointwise", "reduction", "persistent_reduction")
    path = folder / f"{name}.py"
    for before, after in ELSEWHERE.items():
        source = source.replace(before, after)
    path.write_text(source + TANH)
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with contextlib.ExitStack() as stack:
        for kind in kinds:
            stack.enter_context(mock.patch.object(triton_heuristics, kind, decorator))
        spec.loader.exec_module(module)
    return Kernel(getattr(module, name), given[0])


ELSEWHERE = {  # the interpreter has no libdevice
    "triton_helpers.set_driver_to_gpu()": "",
    "libdevice.tanh(": "_tanh(",
    "libdevice.exp2(": "tl.math.exp2(",
    "libdevice.log2(": "tl.math.log2(",
}
TANH = """

@triton.jit
def _tanh(x):
    return 2 * tl.sigmoid(2 * x) - 1
"""


def run_in_interpreter(code: str) -> Callable[..., Any]:
    """The code of a graph as a function of CPU tensors, its kernels in Triton's interpreter."""
    folder = Path(tempfile.mkdtemp())

    class Here:
        """Stands for `AsyncCompile`."""

        def triton(self, name: str, source: str, device_str: str) -> Any:
            kernel = load(name, source, folder)
            return SimpleNamespace(run=functools.partial(_launch, kernel))

        def wait(self, names: dict[str, Any]) -> None:
            pass

    changed = {
        "from torch._C import _cuda_getCurrentRawStream as get_raw_stream": "get_raw_stream = id",
        "torch._C._dynamo.guards._empty_strided_cuda": "torch._C._dynamo.guards._empty_strided_cpu",
        "torch.cuda._DeviceGuard(0)": "contextlib.nullcontext()",
        "torch.cuda.set_device(0)": "pass",
        "async_compile = AsyncCompile()": "async_compile = Here()",
    }
    for before, after in changed.items():
        assert before in code, before
        code = code.replace(before, after)
    names: dict[str, Any] = {"Here": Here, "contextlib": contextlib, "__name__": "generated"}
    exec(code, names)

    def run(*inputs: Any) -> Any:
        boxed = len(inputs) == 1 and isinstance(inputs[0], list)
        return names["call"](list(inputs[0] if boxed else inputs))

    return run


def _launch(kernel: Kernel, *given: Any, stream: Any) -> None:
    """What inductor's launcher does, with fixed sizes of blocks."""
    parameters = kernel.function.arg_names
    if "fixed_grid" in kernel.options["inductor_meta"]:
        kernel.function[given[-3:]](*given[:-3])
        return
    blocks = {name: {"XBLOCK": XBLOCK, "R0_BLOCK": R0_BLOCK}[name] for name in parameters if name.endswith("BLOCK")}
    xnumel = given[parameters.index("xnumel")]
    kernel.function[(-(-xnumel // XBLOCK),)](*given, **blocks)


def compile_ahead(arch: str, code: str) -> Callable[..., Any]:
    """Compile the attention kernels of a graph's code by Triton, and print their resources; the graph does not run."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    for name, source in KERNELS.findall(code):
        kernel = load(name, source, Path(tempfile.mkdtemp()))
        meta = kernel.options["triton_meta"]
        if "num_warps" not in kernel.options:
            continue
        compiled = triton.compile(
            ASTSource(kernel.function, meta["signature"], meta["constants"], meta["configs"][0]),
            target=GPUTarget("cuda", CHIPS[arch].arch, 32),
            options={name: kernel.options[name] for name in ("num_warps", "num_stages")},
        )
        registers, spilled, matrix = _read_nvidia(compiled)
        print(f"{arch}: {name}: {registers} registers, {spilled} bytes spilled, {matrix}", flush=True)

    def stop(*given: Any) -> None:
        raise Stop

    return stop
