"""What `star_attention` does with a call: star, dense and why, or decoding."""

from __future__ import annotations

from hf_attn_plugins.core.decision import CallFacts, Decision, causal_pairs, later_rows
from hf_attn_plugins.star.batch_plans import prompts_of
from hf_attn_plugins.star.context_rows import is_context
from hf_attn_plugins.star.options import StarOptions
from hf_attn_plugins.star.plan import DENSE_BELOW, Plan


def decide(call: CallFacts, options: StarOptions) -> Decision:
    """The decision for one call; prompts of a padded or packed batch have a plan each.

    Without a block size, prompts below `plan.DENSE_BELOW` tokens are dense; so is a prompt whose blocks see everything.
    `options` are those of the call's layer.
    """
    goes_on = is_context(call.start)
    later = None if goes_on else later_rows(call)
    if later is not None:
        return later
    earlier = [call.start or 0] * call.batch if goes_on else []  # tokens of a context whose later rows these are
    lengths = [call.start + call.rows] * call.batch if goes_on and call.start else _lengths(call)
    plans = [options.plan_of(n) for n in lengths]
    sparse = [plan for plan in plans if not plan.is_dense]
    causal = causal_pairs(lengths) - causal_pairs(earlier)
    if not sparse:
        return Decision("dense", _why_dense(max(plans, key=lambda plan: plan.length), options), {}, causal, causal)
    heads = len(options.layer_heads)
    if heads and heads == call.kv_heads:
        return Decision("dense", f"all {heads} key heads of this layer are dense", {}, causal, causal)
    longest = max(sparse, key=lambda plan: plan.length)
    sizes = {
        "blocks": longest.num_blocks,
        "block_size": longest.block_size,
        "anchor_size": longest.anchor_size,
        "query_size": len(longest.query),
    }
    if longest.halo_size:
        sizes["halo_size"] = longest.halo_size
    if heads:
        sizes["dense_heads"] = heads
    dense = len(plans) - len(sparse)
    reason = f"{dense} of {len(plans)} prompts are dense: one block each" if dense else ""
    attended = sum(plan.attended_pairs() for plan in plans)
    attended -= sum(options.plan_of(n).attended_pairs() for n in earlier)
    if heads and call.kv_heads:
        attended += (causal - attended) * heads // call.kv_heads
    return Decision("star", reason, sizes, attended, causal)


def _lengths(call: CallFacts) -> list[int]:
    """Lengths of the prompts in all rows of the batch; whole rows where they cannot be read."""
    mask = call.mask
    plain = mask.key_padding is None and mask.query_segments is None
    if plain or call.traced:
        return [call.rows] * call.batch
    prompts = prompts_of(mask, call.batch, call.rows)
    if prompts is None:  # tokens of a prompt are apart: its plan counts what lies between them
        return [call.rows] * call.batch
    return [end - first for _, first, end in prompts] or [0]


def _why_dense(plan: Plan, options: StarOptions) -> str:
    if options.block_size is None and plan.length < DENSE_BELOW:
        return f"{plan.length} tokens, below {DENSE_BELOW}"
    if plan.num_blocks > 1:
        return f"{plan.length} tokens: anchor and halo leave no gap before any of the {plan.num_blocks} blocks"
    return f"{plan.length} tokens are one block of {plan.block_size}"
