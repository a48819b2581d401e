"""QWen-1 for transformers 5: the importable form of this model repository.

`import qwen1` registers the classes with transformers' Auto classes, so checkpoints of model type "qwen" load without
`trust_remote_code=True`, and makes `save_pretrained` write the .py files beside the weights.
"""

from .versions_qwen import check_versions as check_versions  # first: older versions lack what follows

# isort: split

from .auto_classes import register
from .cache_qwen import QWenCache, QWenGroupedInt8Cache, QWenInt8Cache
from .configuration_qwen import QWenConfig
from .few_bits_qwen import QWenBitsConfig
from .modeling_qwen import (
    FlashSelfAttention,
    QWenAttention,
    QWenBlock,
    QWenForQuestionAnswering,
    QWenForSequenceClassification,
    QWenForTokenClassification,
    QWenLMHeadModel,
    QWenMLP,
    QWenModel,
    QWenPreTrainedModel,
    RMSNorm,
    RotaryEmbedding,
    apply_rotary_pos_emb,
)
from .qwen_generation_utils import ChatHistory, decode_tokens, get_stop_words_ids, make_context
from .tokenization_qwen import QWenTokenizer, QWenTokenizerFast
from .tools_qwen import (
    Tool,
    ToolCall,
    ToolLoopError,
    ToolReply,
    ToolResult,
    ToolRun,
    ToolStep,
    add_turn,
    parse_reply,
    react_prompt,
    read_messages,
    run_tools,
)

__version__ = "0.1.0"

__all__ = [
    "ChatHistory",
    "FlashSelfAttention",
    "QWenAttention",
    "QWenBitsConfig",
    "QWenBlock",
    "QWenCache",
    "QWenConfig",
    "QWenForQuestionAnswering",
    "QWenForSequenceClassification",
    "QWenForTokenClassification",
    "QWenGroupedInt8Cache",
    "QWenInt8Cache",
    "QWenLMHeadModel",
    "QWenMLP",
    "QWenModel",
    "QWenPreTrainedModel",
    "QWenTokenizer",
    "QWenTokenizerFast",
    "RMSNorm",
    "RotaryEmbedding",
    "Tool",
    "ToolCall",
    "ToolLoopError",
    "ToolReply",
    "ToolResult",
    "ToolRun",
    "ToolStep",
    "add_turn",
    "apply_rotary_pos_emb",
    "decode_tokens",
    "get_stop_words_ids",
    "make_context",
    "parse_reply",
    "react_prompt",
    "read_messages",
    "run_tools",
]

register()
