"""A prompt that runs once gives every candidate what a row of its own gives it; where it would not, it is refused."""

import pytest
import torch

import larpo_kernels as lk
from larpo.modeling import prefix_sharing
from larpo.modeling.row_layouts import TokenizedCandidate, backbone_inputs, padded_rows, shared_rows
from tests.helpers.tiny import VOCAB, causal_lm

WINDOW = 4  # shorter than the prompts, so that it cuts between prompt and completion too


def _candidates():
    """Two lists of ragged candidates behind prompts of 7 and 4 tokens, one completion empty."""
    draw = torch.Generator().manual_seed(0)
    tokens = lambda n: torch.randint(3, VOCAB, (n,), generator=draw).tolist()  # noqa: E731
    lists = [(tokens(7), (6, 3, 0, 5)), (tokens(4), (2, 6))]
    return [TokenizedCandidate(prompt, tokens(n), i) for i, (prompt, lengths) in enumerate(lists) for n in lengths]


CANDIDATES = _candidates()
TOKENS = torch.tensor([len(c.completion_ids) for c in CANDIDATES])

MODELS = {
    "llama": ("llama", {}),
    "gpt2": ("gpt2", {}),
    "mistral, all layers sliding": ("mistral", {"sliding_window": WINDOW}),
    "qwen2, sliding and full": (
        "qwen2",
        {
            "use_sliding_window": True,
            "sliding_window": WINDOW,
            "max_window_layers": 1,
            "layer_types": ["full_attention", "sliding_attention"],
        },
    ),
    "gemma2, sliding and full": ("gemma2", {"sliding_window": WINDOW, "attn_logit_softcapping": None}),
    "gemma3, sliding and full": (
        "gemma3_text",
        {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]},
    ),
}


def _model(name, attention, dtype=torch.float32):
    model_type, config = MODELS[name]
    if model_type == "gemma2" and attention == "sdpa":
        pytest.skip("transformers' gemma2 has no sdpa")
    return _attentive(causal_lm(model_type, attn_implementation=attention, dtype=dtype, **config))


def _attentive(model):
    """Weights wide enough that a wrong mask shows."""
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    return model


def _logps(model, rows):
    inputs = backbone_inputs(rows, model.config, model.dtype)
    hidden = model.base_model(**inputs, use_cache=False).last_hidden_state.flatten(0, 1)
    weight = model.get_output_embeddings().weight
    return lk.linear_sequence_logps(hidden[rows["predictor_positions"]], weight, rows["labels"], cu_seqlens=rows["cu_seqlens"])


def _gradients(model, rows):
    model.zero_grad()
    logps = _logps(model, rows)
    (logps * torch.linspace(-1, 1, len(logps), dtype=logps.dtype)).sum().backward()
    return logps.detach(), {name: p.grad for name, p in model.named_parameters()}


APART, SHARED = padded_rows(CANDIDATES, 0), shared_rows(CANDIDATES, 0, multiple=8)


@pytest.mark.parametrize("attention, dtype", [("sdpa", torch.float64), ("sdpa", torch.float32), ("eager", torch.float32)])
@pytest.mark.parametrize("name", MODELS)
def test_log_likelihoods_and_all_gradients_are_those_of_separate_rows(name, attention, dtype):
    """float64 only with sdpa: eager attention takes its softmax in float32, most norms their root mean square too."""
    model = _model(name, attention, dtype)
    assert prefix_sharing.supports_prefix_sharing(model.config) is None
    logps, gradients = _gradients(model, APART)
    shared_logps, shared_gradients = _gradients(model, SHARED)
    exact = dtype == torch.float64
    torch.testing.assert_close(shared_logps, logps, atol=1e-10 if exact else 2e-4, rtol=0)
    for key, expected in gradients.items():
        error = (shared_gradients[key] - expected).norm() / expected.norm().clamp(min=1e-3)
        assert error < (1e-6 if exact else 1e-4), key
    assert prefix_sharing.check_prefix_sharing(shared_logps, logps, TOKENS, dtype) is None


def _positions_that_run_on(rows):
    rows["position_ids"] = torch.arange(rows["position_ids"].shape[1]).expand_as(rows["position_ids"]).clone()


def _candidates_that_see_each_other(rows):
    rows["segments"] = rows["segments"].clamp(max=0)


def _no_mask(rows):
    del rows["segments"]


def _candidates_that_miss_the_prompt(rows):
    rows["segments"] = rows["segments"] + 1


BROKEN = [_positions_that_run_on, _candidates_that_see_each_other, _no_mask, _candidates_that_miss_the_prompt]


@pytest.mark.parametrize("breaks", BROKEN)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_check_sees_rows_that_are_wrong(name, dtype, breaks):
    model = _model(name, "sdpa", dtype)
    rows = dict(SHARED)
    breaks(rows)
    with torch.no_grad():
        apart, wrong, right = _logps(model, APART), _logps(model, rows), _logps(model, SHARED)
    assert prefix_sharing.check_prefix_sharing(right, apart, TOKENS, dtype) is None
    assert "nats" in prefix_sharing.check_prefix_sharing(wrong, apart, TOKENS, dtype)


@pytest.mark.parametrize("name", [name for name in MODELS if "sliding" in name])
def test_the_check_sees_a_forgotten_window(name):
    """Every layer gets the mask without a window, as a 4-D mask in place of the dict would do it."""
    model = _model(name, "eager")
    with torch.no_grad():
        apart = _logps(model, APART)
        full = prefix_sharing._additive_mask(SHARED["segments"], SHARED["position_ids"], None, torch.float32)
        hidden = model.base_model(
            SHARED["input_ids"], position_ids=SHARED["position_ids"], attention_mask=full, use_cache=False
        )
        weight = model.get_output_embeddings().weight
        wrong = lk.linear_sequence_logps(
            hidden.last_hidden_state.flatten(0, 1)[SHARED["predictor_positions"]],
            weight,
            SHARED["labels"],
            cu_seqlens=SHARED["cu_seqlens"],
        )
    assert prefix_sharing.check_prefix_sharing(wrong, apart, TOKENS, torch.float32) is not None


def test_the_check_sees_numbers_that_are_not_finite_and_takes_an_empty_batch():
    some = torch.tensor([-1.0, -2.0])
    assert "candidate 1" in prefix_sharing.check_prefix_sharing(
        torch.tensor([-1.0, torch.nan]), some, some.abs(), torch.float32
    )
    assert prefix_sharing.check_prefix_sharing(some[:0], some[:0], some[:0], torch.float32) is None


def _config(model_type="llama", attention="sdpa", **config):
    from transformers import AutoConfig

    made = AutoConfig.for_model(model_type, **config)
    made._attn_implementation = attention
    return made


@pytest.mark.parametrize(
    "reason, config",
    [
        ("'flash_attention_2' takes no mask", {"attention": "flash_attention_2"}),
        ("None takes no mask", {"attention": None}),
        ("'gpt_neo' is not known", {"model_type": "gpt_neo"}),
        ("'mamba' is not known", {"model_type": "mamba"}),
        ("'lfm2' is not known", {"model_type": "lfm2"}),
        ("'bloom' is not known", {"model_type": "bloom"}),
        ("not causal", {"model_type": "gemma3_text", "use_bidirectional_attention": True}),
    ],
)
def test_a_model_that_would_be_wrong_is_refused_with_the_reason(reason, config):
    assert reason in prefix_sharing.supports_prefix_sharing(_config(**config))


@pytest.mark.parametrize("kind", ["linear_attention", "chunked_attention"])
def test_layers_that_are_no_attention_over_all_tokens_are_refused(kind):
    config = _config("qwen2")
    config.layer_types = ["full_attention", kind]
    assert f"layer types {kind}" in prefix_sharing.supports_prefix_sharing(config)


def test_the_text_part_of_a_composite_config_is_what_counts():
    config = _config("gemma3")
    config.text_config._attn_implementation = "sdpa"
    assert prefix_sharing.supports_prefix_sharing(config) is None


def test_a_family_that_ignores_masks_is_caught_by_the_check_as_well():
    """gpt_neo builds its local mask from places in the row."""
    kinds = [[["global", "local"], 1]]
    model = _attentive(causal_lm("gpt_neo", num_layers=2, attention_types=kinds, window_size=WINDOW))
    with torch.no_grad():
        reason = prefix_sharing.check_prefix_sharing(_logps(model, SHARED), _logps(model, APART), TOKENS, torch.float32)
    assert reason is not None


@pytest.mark.parametrize("window", [None, WINDOW])
def test_flex_attention_sees_what_the_additive_mask_shows(window):
    from torch.nn.attention.flex_attention import BlockMask, create_mask

    segments, positions = SHARED["segments"], SHARED["position_ids"]
    config = _config("mistral", "flex_attention", sliding_window=window)
    blocks = prefix_sharing.prefix_masks(segments, positions, config, torch.float32)
    assert isinstance(blocks, BlockMask) and blocks.shape == (2, 1, *segments.shape[1:], *segments.shape[1:])
    dense = create_mask(blocks.mask_mod, *blocks.shape, device="cpu")
    additive = prefix_sharing._additive_mask(segments, positions, window, torch.float32)
    assert torch.equal(dense, additive == 0)


def test_flex_attention_skips_blocks_of_other_candidates():
    """Two candidates of a block each behind a prompt of a block: five of nine blocks are looked at."""
    length = 128
    rows = shared_rows(
        [TokenizedCandidate([1] * length, [2] * length), TokenizedCandidate([1] * length, [2] * length)], 0, multiple=length
    )
    blocks = prefix_sharing.prefix_masks(
        rows["segments"], rows["position_ids"], _config(attention="flex_attention"), torch.float32
    )
    assert (blocks.to_dense()[0, 0] > 0).tolist() == [[True, False, False], [True, True, False], [True, False, True]]


def test_padding_sees_itself_so_that_no_softmax_is_empty():
    mask = prefix_sharing._additive_mask(SHARED["segments"], SHARED["position_ids"], 1, torch.float32)
    assert (SHARED["segments"] == -1).any()
    assert (mask.diagonal(dim1=-2, dim2=-1) == 0).all()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_long_list_beside_a_short_one_is_right_and_padding_stays_finite(attention):
    """A row of mostly padding: NaN there would reach real tokens through weights of zero."""
    candidates = [
        TokenizedCandidate([5, 6], list(range(10, 50)), 0),
        TokenizedCandidate([7], [8], 1),
        TokenizedCandidate([9], [], 2),
    ]
    model = _model("gemma3, sliding and full", attention)
    apart, together = padded_rows(candidates, 0), shared_rows(candidates, 0)
    logps, gradients = _gradients(model, apart)
    shared_logps, shared_gradients = _gradients(model, together)
    torch.testing.assert_close(shared_logps, logps, atol=5e-4, rtol=0)
    for key, expected in gradients.items():
        torch.testing.assert_close(shared_gradients[key], expected, atol=1e-4 * float(expected.abs().max()), rtol=1e-3)


def test_masks_come_in_the_dtype_of_the_queries_and_by_layer_type():
    config = _config("gemma3_text", sliding_window=WINDOW)
    masks = prefix_sharing.prefix_masks(SHARED["segments"], SHARED["position_ids"], config, torch.bfloat16)
    rows, length = SHARED["segments"].shape
    assert {kind: (m.dtype, m.shape) for kind, m in masks.items()} == dict.fromkeys(
        ("sliding_attention", "full_attention"), (torch.bfloat16, (rows, 1, length, length))
    )


def test_a_window_that_the_models_class_does_not_know_is_ignored_as_the_model_does():
    config = _config("llama", sliding_window=WINDOW)
    mask = prefix_sharing.prefix_masks(SHARED["segments"], SHARED["position_ids"], config, torch.float32)
    assert torch.equal(mask, prefix_sharing._additive_mask(SHARED["segments"], SHARED["position_ids"], None, torch.float32))
