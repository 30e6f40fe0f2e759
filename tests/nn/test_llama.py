"""The LLaMA model: its sizes, its laws, and what must survive a move, a cast, a compilation and a checkpoint."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn
from torch._dynamo.testing import CompileCounter

from leantrain.errors import UsageError
from leantrain.nn import PRESETS, Llama, num_parameters
from leantrain.nn.llama import Block


def small(**changes: object) -> Llama:
    torch.manual_seed(0)
    sizes: dict[str, object] = {"vocab_size": 50, "context": 16, "hidden": 24, "layers": 2, "heads": 3}
    return Llama(**{**sizes, **changes})  # type: ignore[arg-type]


def tokens(*shape: int, below: int = 50, seed: int = 0) -> torch.Tensor:
    return torch.randint(below, shape, generator=torch.Generator().manual_seed(seed))


def matrices_of_layers(model: nn.Module) -> list[nn.Linear]:
    """Chosen as galore-torch's training script chooses what to project."""
    return [
        module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and any(key in name for key in ("attn", "mlp"))
    ]


# --- sizes ---


@pytest.mark.parametrize(
    ("preset", "total", "in_layers", "unit"),
    [
        ("60M", 58.07, 25.30, 0.01),
        ("130M", 134.11, 84.93, 0.01),
        ("350M", 367.97, 302.38, 0.01),
        ("1B", 1339.1, 1207.9, 0.1),
        ("7B", 6738.4, 6476.0, 0.1),
    ],
)
def test_presets_have_the_parameters_of_the_published_models(
    preset: str, total: float, in_layers: float, unit: float
) -> None:
    with torch.device("meta"):
        model = Llama(vocab_size=32_000, preset=preset)
    assert num_parameters(model) / 1e6 == pytest.approx(total, abs=unit / 2)
    projected = sum(module.weight.numel() for module in matrices_of_layers(model))
    assert projected / 1e6 == pytest.approx(in_layers, abs=unit / 2)


@pytest.mark.parametrize(
    ("preset", "vocab_size", "least", "most"),
    [
        ("tiny", 256, 0.3e6, 0.5e6),
        ("1M", 256, 1.0e6, 1.1e6),
        ("9M", 32_000, 8.9e6, 9.1e6),
        ("20M", 32_000, 19e6, 20.5e6),
        ("3B", 32_000, 2.6e9, 2.8e9),
    ],
)
def test_the_other_presets_have_about_the_parameters_of_their_name(
    preset: str, vocab_size: int, least: float, most: float
) -> None:
    with torch.device("meta"):
        assert least <= num_parameters(Llama(vocab_size=vocab_size, preset=preset)) <= most


@given(
    vocab=st.integers(1, 40),
    head_dim=st.integers(1, 4).map(lambda n: 2 * n),
    heads=st.integers(1, 4),
    mlp=st.integers(1, 20),
    layers=st.integers(1, 3),
    tied=st.booleans(),
    length=st.integers(1, 9),
)
@settings(max_examples=25, deadline=None)
def test_any_sizes_give_the_formulas_parameters_and_one_logit_per_token(
    vocab: int, head_dim: int, heads: int, mlp: int, layers: int, tied: bool, length: int
) -> None:
    hidden = head_dim * heads
    model = Llama(vocab, 9, hidden=hidden, mlp_hidden=mlp, layers=layers, heads=heads, tied=tied)
    in_layer = 4 * hidden**2 + 3 * hidden * mlp + 2 * hidden
    assert num_parameters(model) == layers * in_layer + hidden + vocab * hidden * (1 if tied else 2)
    assert model(tokens(2, length, below=vocab)).shape == (2, length, vocab)


def test_a_size_beside_a_preset_replaces_the_presets() -> None:
    model = Llama(vocab_size=10, preset="tiny", layers=1)
    assert len(model.layers) == 1
    assert model.embedding.embedding_dim == PRESETS["tiny"].hidden


def test_the_mlp_width_follows_the_hidden_width() -> None:
    # 512 -> 1376 and 768 -> 2048 are the published pairs.
    for hidden, mlp_hidden in ((512, 1376), (768, 2048), (1024, 2736), (256, 688)):
        with torch.device("meta"):
            model = Llama(vocab_size=8, hidden=hidden, layers=1, heads=8)
        assert model.get_submodule("layers.0.mlp.up_proj").weight.shape == (mlp_hidden, hidden)


# --- what the function is ---


@pytest.mark.parametrize("changed", [0, 5, 11])
def test_a_token_changes_its_own_and_later_logits_only(changed: int) -> None:
    model = small()
    before = tokens(2, 12)
    after = before.clone()
    after[:, changed] = (after[:, changed] + 1) % 50
    difference = (model(before) - model(after)).abs().amax((0, 2))
    assert (difference[:changed] == 0).all()
    assert (difference[changed:] > 0).all()


def test_examples_of_a_batch_do_not_mix() -> None:
    model = small().double()
    batch = tokens(3, 7)
    alone = torch.cat([model(example[None]) for example in batch])
    torch.testing.assert_close(model(batch), alone, rtol=1e-12, atol=1e-12)


def test_the_order_of_earlier_tokens_matters() -> None:
    model = small()
    forward, backward = torch.tensor([[3, 4, 5, 6]]), torch.tensor([[5, 4, 3, 6]])
    assert (model(forward)[0, -1] - model(backward)[0, -1]).abs().max() > 1e-6


@pytest.mark.parametrize("option", [{"rope_base": 100.0}, {"norm_eps": 1e-2}, {"tied": True}])
def test_every_option_changes_the_logits(option: dict[str, object]) -> None:
    assert not torch.allclose(small()(tokens(1, 9)), small(**option)(tokens(1, 9)), atol=1e-6)


def test_every_norm_has_the_epsilon_that_was_given() -> None:
    norms = [module for module in small(norm_eps=0.25).modules() if isinstance(module, nn.RMSNorm)]
    assert [norm.eps for norm in norms] == [0.25] * 5


@pytest.mark.parametrize("tied", [False, True])
def test_logits_and_gradients_equal_those_of_transformers_with_the_same_weights(tied: bool) -> None:
    transformers = pytest.importorskip("transformers", reason="the reference implementation is not installed")
    ours = small(mlp_hidden=40, tied=tied)
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=3,
        max_position_embeddings=16, rms_norm_eps=1e-6, tie_word_embeddings=tied, attn_implementation="eager",
    )  # fmt: skip
    theirs = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in ours.parameters():  # norms away from 1, matrices large enough for attention to choose
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    names = {name: their_name(name) for name, _ in ours.named_parameters()}
    state = {names[name]: tensor for name, tensor in ours.state_dict().items()}
    missing, unexpected = theirs.load_state_dict(state, strict=False)
    assert not unexpected
    assert missing == (["lm_head.weight"] if tied else [])

    batch = tokens(2, 16)
    ours_logits, theirs_logits = ours(batch), theirs(batch, use_cache=False).logits
    torch.testing.assert_close(ours_logits, theirs_logits, rtol=1e-5, atol=1e-5)
    for logits in (ours_logits, theirs_logits):
        nn.functional.cross_entropy(logits.flatten(0, 1), tokens(32, seed=1)).backward()
    reference = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, reference[names[name]].grad, rtol=1e-4, atol=1e-6)


def their_name(name: str) -> str:
    for ours, theirs in {
        "embedding.": "embed_tokens.", "attn.": "self_attn.", "attention_norm.": "input_layernorm.",
        "ffn_norm.": "post_attention_layernorm.",
    }.items():  # fmt: skip
        name = name.replace(ours, theirs)
    return "lm_head.weight" if name == "head.weight" else f"model.{name}"


# --- initialisation ---


def test_matrices_start_normal_and_those_that_write_to_the_residual_stream_smaller() -> None:
    torch.manual_seed(0)
    model = Llama(vocab_size=300, hidden=128, layers=8, heads=4)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            assert (parameter == 1).all(), name
            continue
        expected = 0.02 / 4 if re.search(r"(o|down)_proj", name) else 0.02  # sqrt(2 * 8 layers) = 4
        # The smallest has 16,384 elements: its standard deviation is known to 0.6%, and 5% is eight of those.
        assert parameter.std().item() == pytest.approx(expected, rel=0.05), name
        assert abs(parameter.mean().item()) < 0.05 * expected, name


def test_an_untrained_model_predicts_nearly_uniformly() -> None:
    logits = small(hidden=96, heads=4)(tokens(4, 16))
    loss = nn.functional.cross_entropy(logits.flatten(0, 1), tokens(64, seed=1))
    assert loss.item() == pytest.approx(torch.tensor(50.0).log().item(), abs=0.1)


# --- what must survive ---


@pytest.mark.parametrize("tied", [False, True])
def test_a_model_made_on_the_meta_device_equals_one_made_directly(tied: bool) -> None:
    with torch.device("meta"):
        model = small(tied=tied)
    assert model(tokens(2, 5).to("meta")).shape == (2, 5, 50)
    model.to_empty(device="cpu")
    torch.manual_seed(0)
    model.reset_parameters()
    direct = small(tied=tied)
    torch.manual_seed(0)
    direct.reset_parameters()
    assert torch.equal(model(tokens(2, 16)), direct(tokens(2, 16)))


def test_everything_a_model_holds_is_a_parameter() -> None:
    model = small()
    assert not list(model.buffers())
    assert set(model.state_dict()) == {name for name, _ in model.named_parameters()}


@pytest.mark.parametrize("tied", [False, True])
def test_a_state_dict_goes_through_safetensors(tied: bool, tmp_path: Path) -> None:
    model, other = small(tied=tied), small(tied=tied)
    other.reset_parameters()
    assert not torch.equal(model(tokens(1, 5)), other(tokens(1, 5)))
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    other.load_state_dict(load_file(tmp_path / "model.safetensors"))
    assert torch.equal(model(tokens(1, 5)), other(tokens(1, 5)))


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [(torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64, torch.float64)],
)
@pytest.mark.parametrize("autocast", [False, True])
def test_rotary_angles_have_at_least_float32_and_the_models_precision(
    dtype: torch.dtype, expected: torch.dtype, autocast: bool
) -> None:
    model = small().to(dtype)
    seen: list[torch.Tensor] = []
    model.layers[0].register_forward_pre_hook(lambda module, inputs: seen.extend(inputs[1]))
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        logits = model(tokens(1, 16))
    assert [table.dtype for table in seen] == [expected, expected]
    assert logits.dtype == (torch.bfloat16 if autocast and dtype != torch.float64 else dtype)


def test_a_bfloat16_model_stays_close_to_its_float32_self_to_the_last_position() -> None:
    model = small(context=512).to(torch.bfloat16)
    batch = tokens(1, 512)
    rounded = model(batch)
    exact = model.float()(batch)
    assert rounded.dtype == torch.bfloat16
    error = (rounded.float() - exact).abs().mean((0, 2))
    assert error[-64:].mean() < 0.02 * exact.std()
    assert error[-64:].mean() < 2 * error[:64].mean()


def test_under_autocast_logits_are_bfloat16_and_gradients_float32() -> None:
    model = small()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(tokens(2, 16))
    assert logits.dtype == torch.bfloat16
    torch.testing.assert_close(logits.float(), model(tokens(2, 16)), rtol=0.05, atol=0.01)
    logits.float().square().mean().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters())


def test_compilation_takes_one_graph_and_no_second_one() -> None:
    torch._dynamo.reset()
    counter = CompileCounter()
    model = small()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for seed in range(3):
        batch = tokens(2, 16, seed=seed)
        assert torch.equal(compiled(batch), model(batch))
        compiled(batch).sum().backward()
    assert counter.frame_count == 1


def test_blocks_are_where_a_sharder_looks_for_them() -> None:
    model = small()
    assert [type(block) for block in model.layers] == [Block, Block]
    assert len(matrices_of_layers(model)) == 2 * 7
    assert model.get_output_embeddings() is model.head
    tied = small(tied=True)
    assert tied.head is None
    assert tied.get_output_embeddings() is tied.embedding


# --- what is refused ---


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden": 25}, r"hidden must be a multiple of heads, got hidden=25 and heads=3 .*1, 5, 25"),
        ({"hidden": 27, "heads": 9}, r"hidden / heads must be even.*hidden=27 and heads=9, which is 3"),
        ({"hidden": -24}, r"hidden must be an integer >= 1, got hidden=-24"),
        ({"layers": 0}, r"layers must be an integer >= 1, got layers=0"),
        ({"heads": 3.0}, r"heads must be an integer >= 1, got heads=3\.0"),
        ({"mlp_hidden": True}, r"mlp_hidden must be an integer >= 1, got mlp_hidden=True"),
        ({"vocab_size": 0}, r"vocab_size must be an integer >= 1, got vocab_size=0"),
        ({"context": -1}, r"context must be an integer >= 1, got context=-1"),
        ({"preset": "60m"}, r"preset '60m' is unknown; did you mean '60M'\? \(allowed: .*350M"),
        ({"hidden": None, "heads": None}, r"needs a preset \(tiny, .*no hidden, heads"),
        ({"rope_base": 0.0}, r"rope_base must be > 0, got rope_base=0\.0"),
        ({"norm_eps": -1e-6}, r"norm_eps must be > 0, got norm_eps=-1e-06"),
        ({"norm_eps": float("nan")}, r"norm_eps must be > 0, got norm_eps=nan"),
    ],
)
def test_sizes_that_cannot_work_are_refused_by_name(changes: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        small(**changes)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (torch.zeros(1, 17, dtype=torch.int64), r"at most context=16 tokens long, got shape \[1, 17\]"),
        (torch.zeros(1, 4), r"token ids of shape \[batch, time\].*got shape \[1, 4\] and dtype float32"),
        (torch.zeros(4, dtype=torch.int64), r"token ids of shape \[batch, time\].*got shape \[4\] and dtype int64"),
        (torch.zeros(1, 4, dtype=torch.bool), r"dtype int64 or int32, got .*bool"),
    ],
)
def test_inputs_that_are_not_tokens_are_refused(inputs: torch.Tensor, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        small()(inputs)
