"""Language models of Hugging Face transformers, built from a configuration with fresh weights."""

from __future__ import annotations

from copy import deepcopy
from typing import TYPE_CHECKING

from torch import Tensor, nn

from leantrain.errors import UsageError
from leantrain.nn.sizes import require_tokens

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


def from_config(config: PretrainedConfig) -> HuggingFaceLM:
    """The causal language model that `config` describes, with freshly drawn weights; nothing is downloaded.

    Args:
        config: For instance `transformers.LlamaConfig(...)` or `transformers.GPT2Config(...)`. It is not
            changed.

    Raises:
        UsageError: transformers is not installed, `config` is no transformers configuration, transformers has
            no causal language model for it, or its attention would see the token it is to predict.

    Examples:
        model = from_config(transformers.GPT2Config(vocab_size=256, n_positions=128, n_embd=64, n_layer=2,
        n_head=4))
    """
    try:
        from transformers import AutoModelForCausalLM, PretrainedConfig
        from transformers.models.auto.modeling_auto import (
            MODEL_FOR_CAUSAL_LM_MAPPING,
            MODEL_FOR_MASKED_LM_MAPPING_NAMES,
        )
    except ImportError as error:
        raise UsageError(
            f"a Hugging Face model needs the package transformers, which cannot be imported ({error}); "
            "install it with: pip install transformers"
        ) from error
    kind = type(config).__name__
    if not isinstance(config, PretrainedConfig):
        raise UsageError(
            f"config must be a transformers configuration such as LlamaConfig(...), got {kind}: {config!r}"
        )
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UsageError(
            f"transformers has no causal language model for {kind}; use a configuration of one, "
            "such as LlamaConfig, GPT2Config, MistralConfig or Qwen2Config"
        )
    # These models are made for filling in masked tokens: unless told otherwise they look ahead, and
    # next-token training would show a loss near 0 that means nothing.
    if config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(config, "is_decoder", False):
        raise UsageError(f"{kind} describes a model that sees the tokens it is to predict; give it is_decoder=True")
    return HuggingFaceLM(AutoModelForCausalLM.from_config(deepcopy(config)))


class HuggingFaceLM(nn.Module):
    """A causal language model of transformers behind our interface: token ids [B, T] in, logits [B, T, V]
    out.

    Args:
        model: Any module whose output has `.logits`; it is kept as `self.model`, and its key-value cache, of
            no use in training, is turned off.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        model.config.use_cache = False
        self.model = model
        self.context: int | None = getattr(model.config, "max_position_embeddings", None)

    def forward(self, inputs: Tensor) -> Tensor:
        require_tokens(inputs, self.context)
        return self.model(input_ids=inputs).logits

    def get_output_embeddings(self) -> nn.Module | None:
        """The module whose matrix makes the logits, as the wrapped model tells it."""
        return self.model.get_output_embeddings()
