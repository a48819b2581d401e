"""The heads beside that of the language model: scores of a whole text, of each token, of the bounds of an answer.

Each is a mixin of the generic class of transformers, with the cache under either of its names. It builds its base model
itself, for the generic constructors would look that up in transformers' registry, where remote code is not.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_layers import (
    GenericForQuestionAnswering,
    GenericForSequenceClassification,
    GenericForTokenClassification,
)
from transformers.modeling_outputs import QuestionAnsweringModelOutput, TokenClassifierOutput

from .arguments_qwen import QWenSequenceClassifierOutput, cache_argument, one_cache
from .loading_qwen import LEFTOVERS

if TYPE_CHECKING:
    _Model = PreTrainedModel
else:
    _Model = object  # what stands in the list of base classes behind these

_OTHER_HEADS = [r"^lm_head\.", *LEFTOVERS]


class SequenceClassification(GenericForSequenceClassification, _Model):
    """All of `QWenForSequenceClassification` but the model that it stands on."""

    base_model_prefix = "transformer"
    transformer_class: type
    _keys_to_ignore_on_load_unexpected = _OTHER_HEADS

    def __init__(self, config: Any):
        super(GenericForSequenceClassification, self).__init__(config)
        self.num_labels = config.num_labels
        self.transformer = self.transformer_class(config)
        self.score = nn.Linear(config.n_embd, self.num_labels, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        cache: Any = None,
        **kwargs: Any,
    ) -> QWenSequenceClassifierOutput | tuple:
        """Logits (B, num_labels) of the last token that is not `config.pad_token_id`; arguments as `QWenModel.forward`.

        Args:
            labels: (B,) classes, or (B,) or (B, num_labels) values of a regression, by `config.problem_type`.

        Raises:
            ValueError: several rows and no `config.pad_token_id`; as `QWenModel.forward`.
        """
        outputs = super().forward(
            input_ids,
            attention_mask,
            position_ids,
            inputs_embeds=inputs_embeds,
            labels=labels,
            use_cache=use_cache,
            **cache_argument(one_cache(past_key_values, cache)),
            **kwargs,
        )
        return outputs if isinstance(outputs, tuple) else QWenSequenceClassifierOutput(**outputs)


class TokenClassification(GenericForTokenClassification, _Model):
    """All of `QWenForTokenClassification` but the model that it stands on."""

    base_model_prefix = "transformer"
    transformer_class: type
    _keys_to_ignore_on_load_unexpected = _OTHER_HEADS

    def __init__(self, config: Any):
        super(GenericForTokenClassification, self).__init__(config)
        self.num_labels = config.num_labels
        self.transformer = self.transformer_class(config)
        dropout = getattr(config, "classifier_dropout", None)
        self.dropout = nn.Dropout(0.1 if dropout is None else dropout)
        self.score = nn.Linear(config.n_embd, self.num_labels)
        self.post_init()

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        cache: Any = None,
        **kwargs: Any,
    ) -> TokenClassifierOutput | tuple:
        """Logits (B, T, num_labels); other arguments as `QWenModel.forward`.

        Args:
            labels: (B, T) classes, not shifted; -100 is left out of the loss.
        """
        return super().forward(
            input_ids,
            attention_mask,
            position_ids,
            inputs_embeds=inputs_embeds,
            labels=labels,
            use_cache=use_cache,
            padding_is_read=labels is not None,
            **cache_argument(one_cache(past_key_values, cache)),
            **kwargs,
        )


class QuestionAnswering(GenericForQuestionAnswering, _Model):
    """All of `QWenForQuestionAnswering` but the model that it stands on."""

    base_model_prefix = "transformer"
    transformer_class: type
    _keys_to_ignore_on_load_unexpected = _OTHER_HEADS

    def __init__(self, config: Any):
        super(GenericForQuestionAnswering, self).__init__(config)
        self.transformer = self.transformer_class(config)
        self.qa_outputs = nn.Linear(config.n_embd, 2)
        self.post_init()

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        start_positions: torch.Tensor | None = None,
        end_positions: torch.Tensor | None = None,
        cache: Any = None,
        **kwargs: Any,
    ) -> QuestionAnsweringModelOutput | tuple:
        """`start_logits` and `end_logits`, (B, T) each; other arguments as `QWenModel.forward`.

        Args:
            start_positions, end_positions: (B,), where the answer begins and ends; beyond the text, none.
        """
        return super().forward(
            input_ids,
            attention_mask,
            position_ids,
            inputs_embeds=inputs_embeds,
            start_positions=start_positions,
            end_positions=end_positions,
            padding_is_read=True,  # tokens are weighed against all others of their row
            **cache_argument(one_cache(past_key_values, cache)),
            **kwargs,
        )
