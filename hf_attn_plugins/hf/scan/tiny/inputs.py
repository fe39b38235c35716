"""Inputs for a model that nobody described: by the names in its forward's signature, tried until one set runs."""

from __future__ import annotations

import inspect
import itertools
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hf_attn_plugins.hf.scan.tiny.sizes import FIRST_SPECIAL, IMAGE, LENGTH, PATCH

BATCH, TARGET = 2, 26
HIDDEN = 9  # positions of the second row that padding hides
SAMPLES = 6400  # of a waveform
FRAMES = 64  # of a spectrogram
MAX_SETS = 60
# Arguments with a default that some model cannot do with.
NEEDED = ("dataset_index", "flattened_patches", "lang_ids")


@dataclass(frozen=True)
class Inputs:
    """One call's keyword arguments, and the same with padding.

    Attributes:
        plain: keyword arguments without a padding mask.
        padded: the same with `HIDDEN` positions of row 1 hidden, or None where the model takes no mask.
        side: "left" or "right", the side that is padded.
        length: positions of the padded sequence.
    """

    plain: dict[str, Any]
    padded: dict[str, Any] | None = None
    side: str = "right"
    length: int = LENGTH
    visible: Tensor | None = field(default=None, compare=False)


def inputs_for(model: Any, runs: Callable[[dict[str, Any]], Any]) -> tuple[Inputs, Any]:
    """The first set of inputs that the model's forward takes, and its output.

    Args:
        model: a `PreTrainedModel`.
        runs: calls the model with keyword arguments.

    Raises:
        ValueError: no set runs; the text is the first error that the model gave.
    """
    why = ""
    asked: set[str] = set()
    parameters = set(inspect.signature(model.forward).parameters)
    for more in ((), ("use_cache",), asked):
        if more is asked and not asked:
            break
        for plain in itertools.islice(_sets(model, tuple(sorted(more))), MAX_SETS):
            try:
                output = runs(plain)
            except (MemoryError, KeyboardInterrupt, TimeoutError):
                raise
            except Exception as error:
                text = " ".join(str(error).split())[:160]
                why = why or f"{type(error).__name__}: {text} (inputs {', '.join(plain)})"
                asked |= set(re.findall(r"\w+", text)) & parameters - set(plain) - {"self", "kwargs", "labels"}
                continue
            return _with_padding(model, plain), output
    raise ValueError(why or "no inputs are known for its forward")


def _sets(model: Any, more: tuple[str, ...] = ()) -> Iterator[dict[str, Any]]:
    """Sets of inputs, the likeliest first; `more` are names that an error asked for."""
    parameters = inspect.signature(model.forward).parameters
    needed = [*more] + [
        n for n, p in parameters.items()
        if n in NEEDED or (p.default is p.empty and p.kind == p.POSITIONAL_OR_KEYWORD)
    ]  # fmt: skip
    main = getattr(model, "main_input_name", "input_ids")
    config = model.config
    text = "input_ids" in parameters
    starts: list[list[str]] = []
    if main in parameters and main != "input_ids":
        starts.append([main])
    if text:
        starts.append(["input_ids"])
    for name in ("pixel_values", "input_features", "input_values"):
        if name in parameters:
            starts.append([name])
            if text:
                starts.append(["input_ids", name])
    if "inputs_embeds" in parameters and not text:
        starts.append(["inputs_embeds"])
    starts.append([])
    for start in starts:
        names = list(dict.fromkeys([*start, *needed]))
        if "decoder_input_ids" in parameters and getattr(config, "is_encoder_decoder", False):
            names.append("decoder_input_ids")
        names = list(dict.fromkeys(names))
        options = [list(_candidates(name, model)) for name in names]
        for chosen in itertools.islice(itertools.product(*options), 24):
            whole: dict[str, Any] = {}
            for each in chosen:
                whole.update(each)
            yield whole


def _candidates(name: str, model: Any) -> Iterator[dict[str, Any]]:
    """Values one argument may take, each with what must come along."""
    config = model.config
    generator = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    def ids(*shape: int) -> Tensor:
        vocab = _any(config, "vocab_size", FIRST_SPECIAL)
        return torch.randint(5, max(6, min(96, vocab)), shape, generator=generator)

    channels = _any(config, "num_channels", _any(config, "in_channels", _any(config, "in_chans", 3)))
    size = _any(config, "image_size", IMAGE)
    height, width = (size, size) if isinstance(size, int) else (size[0], size[-1])
    frames = _any(config, "num_frames", 4)
    hidden = _any(config, "hidden_size", _any(config, "d_model", 64))
    if name == "use_cache":
        yield {name: False}
    elif name in ("input_ids",):
        yield {name: ids(BATCH, LENGTH)}
        yield {name: ids(BATCH, _any(config, "num_codebooks", 4), LENGTH)}
        yield {name: ids(BATCH, LENGTH, _any(config, "num_codebooks", 4))}
    elif name == "decoder_input_ids":
        yield {name: ids(BATCH, TARGET)}
        for books in sorted({_any(config, "num_codebooks", 4), _any(config, "num_channels", 4)}):
            yield {name: ids(BATCH, TARGET, books)}
            yield {name: ids(BATCH * books, TARGET)}
    elif name in ("pixel_values", "images", "image", "pixel_values_videos", "hidden_states", "context_pixel_values"):
        if name != "hidden_states":
            shapes = [(BATCH, channels, height, width), (BATCH, frames, channels, height, width),
                      (BATCH, channels, frames, height, width), (BATCH, 1, channels, height, width),
                      (BATCH, 2, channels, height, width)]  # fmt: skip
            if name.endswith("videos"):
                shapes = [*shapes[1:3], shapes[0]]
            for shape in shapes:
                yield {name: noise(*shape)}
        patch = _any(config, "patch_size", PATCH)
        if isinstance(patch, int):
            deep = _any(config, "temporal_patch_size", 1)
            for grid_name in ("grid_thw", "image_grid_thw"):
                grid = torch.tensor([[1, 4, 4]] * BATCH)
                yield {name: noise(BATCH * 16, channels * deep * patch * patch), grid_name: grid}
            flat = {name: noise(BATCH, 16, channels * patch * patch)}
            shapes_of = {"spatial_shapes": torch.tensor([[4, 4]] * BATCH)}
            yield {**flat, **shapes_of, "pixel_attention_mask": torch.ones(BATCH, 16, dtype=torch.long)}
            yield {**flat, **shapes_of, "attention_mask": torch.ones(BATCH, 16, dtype=torch.long)}
            grid = torch.stack(torch.meshgrid(torch.arange(4), torch.arange(4), indexing="ij"), -1).view(1, 16, 2)
            for positions in ("pixel_position_ids", "image_position_ids", "position_ids"):
                yield {**flat, positions: grid.expand(BATCH, 16, 2).contiguous()}
            yield flat
        if name == "hidden_states":
            yield {name: noise(BATCH, LENGTH, hidden)}
    elif name in ("inputs_embeds", "encoder_hidden_states", "queries", "query_embeds", "latents", "codes_embeds"):
        yield {name: noise(BATCH, LENGTH, hidden)}
        yield {name: noise(BATCH, 16, hidden)}
    elif name in ("input_features", "audio_features", "spectrogram", "mel", "input_spectrogram"):
        bins = _any(config, "num_mel_bins", _any(config, "feature_size", _any(config, "n_mels", 16)))
        exact = 2 * _any(config, "max_source_positions", FRAMES // 2)
        yield {name: noise(BATCH, bins, exact)}
        yield {name: noise(BATCH, FRAMES, bins)}
        width = _any(config, "input_dim", _any(config, "feature_projection_input_dim", bins))
        yield {name: noise(BATCH, FRAMES, width)}
        yield {name: noise(BATCH, 1, FRAMES, bins)}
        for mask in ("input_features_mask", "attention_mask", "padding_mask"):
            yield {name: noise(BATCH, bins, exact), mask: torch.ones(BATCH, exact, dtype=torch.long)}
            yield {name: noise(BATCH, FRAMES, bins), mask: torch.ones(BATCH, FRAMES, dtype=torch.bool)}
        lengths = torch.tensor([exact, exact])
        yield {name: noise(BATCH, bins, exact), "feature_attention_mask": torch.ones(BATCH, exact, dtype=torch.long)}
        yield {name: noise(bins, BATCH * exact), "feature_lens": lengths}
    elif name in ("input_values", "audio_values", "waveform", "audio", "input_audio"):
        yield {name: noise(BATCH, SAMPLES)}
        yield {name: noise(BATCH, 1, SAMPLES)}
        bins = _any(config, "num_mel_bins", 16)
        yield {name: noise(BATCH, _any(config, "max_length", FRAMES), bins)}
        yield {name: noise(BATCH, 80, FRAMES)}
    elif name == "bbox":
        yield {name: torch.randint(0, 10, (BATCH, LENGTH, 4), generator=generator).cumsum(-1)}
    elif name in ("xpath_tags_seq", "xpath_subs_seq"):
        yield {name: torch.zeros(BATCH, LENGTH, _any(config, "max_depth", 50), dtype=torch.long)}
    elif name in ("grid_thw", "image_grid_thw"):
        yield {name: torch.tensor([[1, 4, 4]] * BATCH)}
    elif name in ("audio_codes", "codes", "codebook_indices"):
        yield {name: torch.randint(0, 16, (BATCH, _any(config, "num_quantizers", 4), LENGTH), generator=generator)}
        yield {name: torch.randint(0, 16, (BATCH, LENGTH), generator=generator)}
    elif name in ("past_values",):
        channels = _any(config, "num_input_channels", 1)
        length = _any(config, "context_length", LENGTH)
        yield {name: noise(BATCH, length, channels)}
        yield {name: noise(BATCH, length)}
        yield {name: [noise(length), noise(length)], "freq": [0, 0]}
    elif name in ("visual_feats",):
        yield {name: noise(BATCH, 9, _any(config, "visual_feat_dim", 64)), "visual_pos": torch.rand(BATCH, 9, 4)}
    elif name == "states":
        n, acts = _any(config, "state_dim", 17), _any(config, "act_dim", 4)
        yield {name: noise(BATCH, TARGET, n), "actions": noise(BATCH, TARGET, acts), "rewards": noise(BATCH, TARGET, 1),
               "returns_to_go": noise(BATCH, TARGET, 1), "timesteps": torch.arange(TARGET).repeat(BATCH, 1),
               "attention_mask": torch.ones(BATCH, TARGET)}  # fmt: skip
    elif name in ("spatial_shapes",):
        yield {name: torch.tensor([[4, 4]] * BATCH)}
    elif name in ("pixel_attention_mask",):
        yield {name: torch.ones(BATCH, 16, dtype=torch.long)}
    elif name in ("attention_mask", "padding_mask"):
        yield {name: torch.ones(BATCH, LENGTH, dtype=torch.long)}
        yield {}
    elif name in ("input_features_mask", "feature_attention_mask"):
        yield {name: torch.ones(BATCH, 2 * _any(config, "max_source_positions", FRAMES // 2), dtype=torch.long)}
        yield {name: torch.ones(BATCH, FRAMES, dtype=torch.bool)}
    elif name in ("dataset_index", "lang_ids"):
        yield {name: torch.zeros(BATCH, dtype=torch.long)}
    elif name == "flattened_patches":
        width = _any(config, "patch_embed_hidden_size", 64)
        places = torch.cartesian_prod(torch.arange(1.0, 5.0), torch.arange(1.0, 5.0))
        yield {name: torch.cat([places.expand(BATCH, 16, 2), noise(BATCH, 16, width)], -1)}
    elif name == "input_points":
        yield {name: torch.rand(BATCH, 1, 2, 2) * IMAGE}
    elif name == "inputs":
        yield {name: ids(BATCH, LENGTH)}
        yield {name: noise(BATCH, channels, height, width)}


def _any(config: Any, name: str, default: Any) -> Any:
    """A value of the config, or of the first config within it that has it."""
    value = getattr(config, name, None)
    if value is not None:
        return value
    for part in getattr(config, "sub_configs", {}):
        inner = getattr(config, part, None)
        if inner is not None and inner is not config:
            value = _any(inner, name, None)
            if value is not None:
                return value
    return default


def _with_padding(model: Any, plain: dict[str, Any]) -> Inputs:
    parameters = inspect.signature(model.forward).parameters
    if "attention_mask" not in parameters or "attention_mask" in plain:
        return Inputs(plain)
    if "input_ids" in plain and plain["input_ids"].ndim == 2:
        shape, side = plain["input_ids"].shape, "right" if model.config.is_encoder_decoder else "left"
        hidden = HIDDEN
        if not _generates(model):
            side = "right"
    elif "input_values" in plain and plain["input_values"].ndim == 2:
        shape, side = plain["input_values"].shape, "right"
        hidden = int(shape[1] * 0.3)
    elif "input_features" in plain and plain["input_features"].shape[1] == FRAMES:
        shape, side = plain["input_features"].shape[:2], "right"
        hidden = int(shape[1] * 0.3)
    else:
        return Inputs(plain)
    visible = torch.ones(shape, dtype=torch.long)
    visible[1, slice(0, hidden) if side == "left" else slice(shape[1] - hidden, shape[1])] = 0
    return Inputs(plain, {**plain, "attention_mask": visible}, side, shape[1], visible)


def _generates(model: Any) -> bool:
    try:
        return bool(model.can_generate())
    except AttributeError:
        return False
