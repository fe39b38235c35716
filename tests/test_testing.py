"""The error rule: what it refuses, and that it holds under `python -O` where code runs for users."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hf_attn_plugins.testing import assert_close_to_reference, closeness

ROOT = Path(__file__).resolve().parent.parent
REF = torch.linspace(-1, 1, 12, dtype=torch.float64).view(3, 4)
INF, NAN = float("inf"), float("nan")


def spoiled(value: float) -> torch.Tensor:
    changed = REF.float()
    changed[1, 2] = value
    return changed


WRONG = {
    "error beyond the limit": (spoiled(0.5), REF.float(), REF, r"error .* > .* at \(1, 2\)"),
    "NaN in the result": (spoiled(NAN), REF.float(), REF, r"error inf > .* at \(1, 2\)"),
    "inf in the result": (spoiled(INF), REF.float(), REF, r"error inf"),
    "inf in plain low precision allows nothing": (REF.float() + 1e30, spoiled(INF), REF, "not finite"),
    "NaN in plain low precision": (REF.float(), spoiled(NAN), REF, "not finite"),
    "NaN in the reference": (REF.float(), REF.float(), spoiled(NAN).double(), "not finite"),
    "another shape": (REF.float()[:1], REF.float(), REF, r"\(1, 4\), the reference \(3, 4\)"),
    "another shape of plain low precision": (REF.float(), REF.float()[:1], REF, "plain low-precision"),
    "every element NaN": (REF.float() * NAN, REF.float(), REF, "error inf"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_said(case):
    out, low, ref, message = WRONG[case]
    with pytest.raises(AssertionError, match=f"logits: .*{message}"):
        assert_close_to_reference(out, low, ref, name="logits")


def test_what_is_right_passes():
    low = REF.to(torch.bfloat16)
    assert closeness(low.clone(), low, REF) is None
    assert closeness(REF.clone(), REF, REF) is None
    assert closeness(REF[:0].float(), REF[:0].float(), REF[:0]) is None


def narrows(condition: ast.expr) -> bool:
    """Whether a condition tells a type checker something and nothing else."""
    if isinstance(condition, ast.BoolOp):
        return all(narrows(value) for value in condition.values)
    if isinstance(condition, ast.Compare):
        return isinstance(condition.ops[0], ast.IsNot) and ast.unparse(condition.comparators[0]) == "None"
    return isinstance(condition, ast.Call) and ast.unparse(condition.func) in ("isinstance", "callable")


def test_no_assert_checks_what_a_user_gave():
    found = []
    for folder in ("hf_attn_plugins", "eval", "patches"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Assert) and not narrows(node.test):
                    found.append(f"{path.relative_to(ROOT)}:{node.lineno}: {ast.unparse(node)}")
    assert not found, "\n".join(found)


OPTIMISED = """
import copy, sys, torch, transformers as hf
import hf_attn_plugins as hap
from hf_attn_plugins.checkpoint import first_layer, verify
from hf_attn_plugins.checkpoint.attach import attach
assert not __debug__, "this line is not run"
torch.manual_seed(0)
model = hf.LlamaForCausalLM(hf.LlamaConfig(vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, pad_token_id=0)).eval()
places = first_layer.audit(model).require()
patched = copy.deepcopy(model)
attach(patched, places, {name: table.roll(1, 0) for name, table in first_layer.build(model, places).items()})
broken = copy.deepcopy(model)
broken.lm_head.weight.data.fill_(float("nan"))
ids = {"random": torch.arange(3, 40).unsqueeze(0)}
for name, other in (("rolled", patched), ("nan", broken)):
    try:
        verify.compare(model, other, ids)
    except ValueError as error:
        print(name, "refused:", error)
from hf_attn_plugins.hf import intercept as interception
function = interception.scaled_dot_product_attention
interception.scaled_dot_product_attention = lambda *a, **k: function(*a, **k) * 1.5
try:
    hap.intercept(model, "tiled_attention", torch.arange(3, 40).unsqueeze(0))
except ValueError as error:
    print("intercept refused:", error)
"""


@pytest.mark.slow
def test_checks_hold_when_python_drops_asserts():
    done = subprocess.run([sys.executable, "-O", "-c", OPTIMISED], capture_output=True, text=True, check=True)
    assert [line.split(":")[0] for line in done.stdout.splitlines()] == [
        "rolled refused", "nan refused", "intercept refused"
    ], done.stdout  # fmt: skip
