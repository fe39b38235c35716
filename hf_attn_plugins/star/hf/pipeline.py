"""`pipeline("star-text-generation")`: a context and one or many questions in, answers out.

It stands beside the folder `star/` because it is a Transformers pipeline.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import AutoModelForCausalLM, Pipeline
from transformers.pipelines import PIPELINE_REGISTRY

from hf_attn_plugins.hf.inputs import chat as chats
from hf_attn_plugins.star.hf.ask import ask
from hf_attn_plugins.star.hf.encode import encode as encode_context

TASK = "star-text-generation"
_ENCODE = ("block_size", "anchor_size", "halo_size", "dense_heads", "batch_blocks", "max_length", "progress", "resume")


def register_pipeline() -> None:
    """Make the task known to `transformers.pipeline`. Idempotent."""
    if TASK not in PIPELINE_REGISTRY.get_supported_tasks():
        PIPELINE_REGISTRY.register_pipeline(
            TASK, pipeline_class=StarTextGenerationPipeline, pt_model=AutoModelForCausalLM, type="text"
        )


class StarTextGenerationPipeline(Pipeline):
    """Answers questions over a context that is encoded once.

    Call it as `pipe(context, question="...")` or `pipe(context, questions=[...])`, with

    Args:
        context: the text to ask about, or a list of texts.
        question, questions: what is asked of each text; one, or several over one encoding.
        block_size, anchor_size, halo_size, dense_heads, batch_blocks, max_length, progress, resume: as in
            `star.encode`.
        together: questions generated in one batch.
        separator: what stands between context and question, a blank line by default.
        system: a system message, for tokenizers with a chat template.
        chat: False leaves the tokenizer's chat template aside.
        template_args: further variables of the chat template, such as {"enable_thinking": False}.
        max_new_tokens and so on: for `model.generate`.

    Returns:
        {"answer": text} for a question, {"answers": [text, ...]} for questions.
    """

    _load_processor = False  # type: ignore[assignment]
    _load_image_processor = False  # type: ignore[assignment]
    _load_feature_extractor = False  # type: ignore[assignment]
    _load_tokenizer = True  # type: ignore[assignment]

    def _sanitize_parameters(
        self,
        question: str | None = None,
        questions: Sequence[str] | None = None,
        separator: str = "\n\n",
        system: str | None = None,
        chat: bool | None = None,
        template_args: Mapping[str, Any] | None = None,
        together: int = 1,
        **kwargs: Any,
    ) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        if question is not None and questions is not None:
            raise ValueError("pass `question` or `questions`, not both.")
        asked = [question] if question is not None else list(questions or ())
        prepare: dict[str, Any] = {"questions": asked, "separator": separator, "system": system, "chat": chat}
        prepare["template_args"] = template_args
        encode = {name: kwargs.pop(name) for name in _ENCODE if name in kwargs}
        forward = {"encode": encode, "together": together, "generate": kwargs}
        return prepare, forward, {"single": question is not None}

    def preprocess(  # type: ignore[override]
        self,
        context: str,
        questions: list[str],
        separator: str,
        system: str | None,
        chat: bool | None,
        template_args: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        if not questions:
            raise ValueError("nothing was asked: pass question='...' or questions=[...].")
        chat = bool(getattr(self.tokenizer, "chat_template", None)) if chat is None else chat
        context_ids, question_ids = split_prompts(
            self.tokenizer, context + separator, questions, chat=chat, system=system, template_args=template_args
        )
        return {"context_ids": context_ids, "question_ids": question_ids}

    def _forward(  # type: ignore[override]
        self, inputs: dict[str, Any], encode: dict[str, Any], together: int, generate: dict[str, Any]
    ) -> dict[str, Any]:
        cache = encode_context(self.model, inputs["context_ids"], **encode)
        return {"answers": ask(self.model, cache, inputs["question_ids"], together=together, **generate)}

    def postprocess(self, outputs: dict[str, Any], single: bool) -> dict[str, Any]:  # type: ignore[override]
        tokenizer: Any = self.tokenizer
        texts = [tokenizer.decode(answer, skip_special_tokens=True) for answer in outputs["answers"]]
        return {"answer": texts[0]} if single else {"answers": texts}

    def ensure_tensor_on_device(self, **inputs: Any) -> dict[str, Any]:
        """Token ids are lists here; `encode` and `ask` put them on the model's device."""
        return inputs


def split_prompts(
    tokenizer: Any,
    context: str,
    questions: Sequence[str],
    *,
    chat: bool,
    system: str | None = None,
    template_args: Mapping[str, Any] | None = None,
) -> tuple[list[int], list[list[int]]]:
    """Token ids of the context, and of each question with whatever the chat template puts behind it.

    Whole prompts are tokenised and then cut where they still agree with the context alone, so that context + question
    is, token for token, the prompt as it is without a split.

    Args:
        context: everything before a question, separator included.
        chat: whether to render context and question as one user message by the tokenizer's chat template.
        system: a system message before it.
        template_args: further variables of the template.

    Raises:
        ValueError: a system message without a chat template, or a template that does not show context and question
            exactly once (`hf.chat.render`).
    """
    if system is not None and not chat:
        raise ValueError("a system message needs a chat template: put it at the head of the context instead.")

    def render(question: str) -> str:
        if not chat:
            return context + question
        return chats.render(tokenizer, context + question, system=system, arguments=template_args).text

    def tokenize(text: str) -> list[int]:
        # A template writes its special tokens itself.
        return tokenizer(text, add_special_tokens=not chat)["input_ids"]

    # What two unlike questions have in common is the context as the template renders it.
    unlike = [render("A"), render("B")]
    head = unlike[0][: chats.common(unlike)]
    prompts = [tokenize(render(question)) for question in questions]
    length = min(
        chats.common([tokenize(head), *prompts]), *(len(prompt) - 1 for prompt in prompts)
    )  # a query is not empty
    return prompts[0][:length], [prompt[length:] for prompt in prompts]


register_pipeline()  # whoever imports this module first finds the name registered, too
