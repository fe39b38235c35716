"""Tiny random checkpoints of several families, single-file and sharded, and the fingerprint of a folder."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    GemmaConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FAMILIES = {
    "llama": lambda **k: LlamaConfig(**{**SIZES, **k}),
    "qwen2": lambda **k: Qwen2Config(**{**SIZES, **k}),
    "qwen3": lambda **k: Qwen3Config(**{**SIZES, **k}),
    "mistral": lambda **k: MistralConfig(**{**SIZES, "sliding_window": None, **k}),
    "gemma": lambda **k: GemmaConfig(**{**SIZES, **k}),
}


def model_of(family: str, dtype: torch.dtype = torch.float32, **changes: object) -> PreTrainedModel:
    """A random causal LM whose weights are large enough for attention to matter."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(FAMILIES[family](**changes), dtype=dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(6)
            else:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def checkpoint(folder: Path, family: str = "llama", sharded: bool = False, **changes: object) -> Path:
    """Save a random model of a family to a new folder."""
    size = {"max_shard_size": "20KB"} if sharded else {}
    model_of(family, **changes).save_pretrained(folder, **size)
    (folder / "notes.txt").write_text("left alone")
    return folder


def fingerprint(folder: Path) -> dict[str, object]:
    """Every path below a folder with its bytes or link target."""
    found: dict[str, object] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        found[name] = path.readlink() if path.is_symlink() else "folder" if path.is_dir() else path.read_bytes()
    return found


def checkpoint_with_code(folder: Path, **changes: object) -> Path:
    """A Llama whose config and model are classes of Python files that lie beside its weights."""
    checkpoint(folder, "llama", **changes)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n\n\n"
        "class Config(LlamaConfig):\n    model_type = 'own'\n\n\n"
        "class Model(LlamaForCausalLM):\n    config_class = Config\n"
    )
    return folder
