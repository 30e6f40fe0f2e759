"""Models of transformers behind our interface."""

from __future__ import annotations

import sys

import pytest
import torch

from leantrain.errors import UsageError
from leantrain.nn import from_config, num_parameters

NEEDS = "transformers is not installed"


def test_without_transformers_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UsageError, match="pip install transformers"):
        from_config(object())  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["LlamaConfig", "GPT2Config"])
def test_a_configuration_becomes_a_model_that_returns_causal_logits(kind: str) -> None:
    transformers = pytest.importorskip("transformers", reason=NEEDS)
    config = {
        "LlamaConfig": lambda: transformers.LlamaConfig(
            vocab_size=50, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=3,
            max_position_embeddings=16,
        ),
        "GPT2Config": lambda: transformers.GPT2Config(
            vocab_size=50, n_embd=24, n_layer=2, n_head=3, n_positions=16, bos_token_id=0, eos_token_id=0
        ),
    }[kind]()  # fmt: skip
    model = from_config(config).eval()
    before = torch.randint(50, (2, 16))
    after = before.clone()
    after[:, 9] = (after[:, 9] + 1) % 50
    logits = model(before)
    assert isinstance(logits, torch.Tensor)
    assert logits.shape == (2, 16, 50)
    assert model.get_output_embeddings() is model.model.lm_head
    difference = (logits - model(after)).abs().amax((0, 2))
    assert difference[:9].max() < 1e-6 < difference[9:].min()
    with pytest.raises(UsageError, match="at most context=16 tokens"):
        model(torch.zeros(1, 17, dtype=torch.int64))


def test_the_key_value_cache_is_off_and_the_users_configuration_untouched() -> None:
    transformers = pytest.importorskip("transformers", reason=NEEDS)
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=3
    )
    model = from_config(config)
    assert model.model(torch.zeros(1, 4, dtype=torch.int64)).past_key_values is None
    assert config.use_cache


def test_a_configuration_can_be_counted_on_the_meta_device() -> None:
    transformers = pytest.importorskip("transformers", reason=NEEDS)
    with torch.device("meta"):
        model = from_config(
            transformers.LlamaConfig(
                hidden_size=512, intermediate_size=1376, num_hidden_layers=8, num_attention_heads=8
            )
        )
    assert num_parameters(model) / 1e6 == pytest.approx(58.07, abs=0.005)


def test_what_is_no_causal_language_model_is_refused() -> None:
    transformers = pytest.importorskip("transformers", reason=NEEDS)
    with pytest.raises(UsageError, match=r"must be a transformers configuration .*got dict: \{'hidden': 3\}"):
        from_config({"hidden": 3})  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="no causal language model for ViTConfig"):
        from_config(transformers.ViTConfig())


def test_a_model_that_looks_ahead_is_refused_until_told_not_to() -> None:
    transformers = pytest.importorskip("transformers", reason=NEEDS)
    sizes = {"vocab_size": 50, "hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 3}
    with pytest.raises(UsageError, match=r"BertConfig describes a model that sees .*is_decoder=True"):
        from_config(transformers.BertConfig(**sizes))
    model = from_config(transformers.BertConfig(**sizes, is_decoder=True))
    assert model(torch.zeros(1, 4, dtype=torch.int64)).shape == (1, 4, 50)
