"""`CharacterWordEncoder`: indexed attention as a Transformers model, registered with AutoModel."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import AutoModel, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from hf_attn_plugins.indexed.hf.config import CharacterWordEncoderConfig
from hf_attn_plugins.indexed.modules import WordEncoder


class CharacterWordEncoder(PreTrainedModel):
    """From character indices to one vector per word: embedding, positions, indexed attention, combiner."""

    config_class = CharacterWordEncoderConfig
    base_model_prefix = "encoder"
    main_input_name = "input_ids"

    def __init__(self, config: CharacterWordEncoderConfig) -> None:
        super().__init__(config)
        self.encoder = WordEncoder(
            config.vocabulary().size,
            config.max_word_length,
            config.hidden_size,
            config.num_attention_heads,
            config.head_dim,
            combiner=config.combiner,
            hidden=config.combiner_hidden,
            outputs=config.combiner_outputs,
            learned_positions=config.learned_positions,
            tie_positions=config.tie_positions,
            padding_index=0 if config.mask_padding else None,
            form=config.form,
        )
        self.post_init()

    def _init_weights(self, module: torch.nn.Module) -> None:
        """Change nothing: each module initializes its own weights, and the positions are sinusoids."""

    def forward(self, input_ids: Tensor, return_dict: bool | None = None) -> BaseModelOutput | tuple[Tensor]:
        """Encode words.

        Args:
            input_ids: (W, L') integer character indices as `config.vocabulary().encode` gives, L' <= L.

        Returns:
            `last_hidden_state` (W, output_size), one vector per word. For a word of padding only, the combiner's input
            is zero.

        Raises:
            ValueError: words longer than `config.max_word_length`, or indices that are no integer matrix.
        """
        vectors = self.encoder(input_ids)
        return (vectors,) if return_dict is False else BaseModelOutput(last_hidden_state=vectors)

    def encode(self, words: Sequence[str]) -> Tensor:
        """The vectors (W, output_size) of words given as text, on the model's device."""
        return self.encoder(self.config.vocabulary().encode(words).to(self.device))

    def freeze(self) -> CharacterWordEncoder:
        """Evaluation mode with frozen tables, which are built again after a weight has changed."""
        self.eval()
        self.encoder.freeze()
        return self

    def unfreeze(self) -> CharacterWordEncoder:
        """Undo `freeze`; the model stays in evaluation mode."""
        self.encoder.unfreeze()
        return self


def register() -> None:
    """Make the model known to AutoModel. Idempotent."""
    AutoModel.register(CharacterWordEncoderConfig, CharacterWordEncoder, exist_ok=True)


register()  # whoever imports this module first finds the name registered, too
