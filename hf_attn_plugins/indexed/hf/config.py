"""`CharacterWordEncoderConfig`: the config of a `CharacterWordEncoder`, registered with AutoConfig."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from hf_attn_plugins.indexed.words import ALPHABET, Vocabulary


class CharacterWordEncoderConfig(PreTrainedConfig):
    """Sizes and settings of a `CharacterWordEncoder`.

    Args:
        alphabet: the characters with an index of their own; padding (0) and the unknown character are added.
        max_word_length: L, the longest word in characters; `Vocabulary` truncates longer words.
        hidden_size: d, columns of the character table and of the position table.
        num_attention_heads, head_dim: heads and their width (None: hidden_size // num_attention_heads).
        combiner: "stack" (`combine.Stack2D` over the heads) or "concatenate".
        combiner_hidden, combiner_outputs: sizes of the 2-D stack.
        learned_positions, tie_positions: see `indexed.modules.WordEncoder`.
        mask_padding: leave padding characters out; False treats them as any other character.
        form: "auto", "tables" or "direct".
    """

    model_type = "character_word_encoder"

    def __init__(
        self,
        alphabet: str = ALPHABET,
        max_word_length: int = 32,
        hidden_size: int = 512,
        num_attention_heads: int = 8,
        head_dim: int | None = None,
        combiner: str = "stack",
        combiner_hidden: int = 16,
        combiner_outputs: int = 1,
        learned_positions: bool = False,
        tie_positions: bool = False,
        mask_padding: bool = True,
        form: str = "auto",
        **kwargs: Any,
    ) -> None:
        self.alphabet, self.max_word_length = alphabet, max_word_length
        self.hidden_size, self.num_attention_heads, self.head_dim = hidden_size, num_attention_heads, head_dim
        self.combiner, self.combiner_hidden, self.combiner_outputs = combiner, combiner_hidden, combiner_outputs
        self.learned_positions, self.tie_positions = learned_positions, tie_positions
        self.mask_padding, self.form = mask_padding, form
        super().__init__(**kwargs)

    def vocabulary(self) -> Vocabulary:
        """The `Vocabulary` of this alphabet and word length."""
        return Vocabulary(self.max_word_length, self.alphabet)


def register() -> None:
    """Make the config known to AutoConfig. Idempotent."""
    AutoConfig.register(CharacterWordEncoderConfig.model_type, CharacterWordEncoderConfig, exist_ok=True)


register()  # whoever imports this module first finds the name registered, too
