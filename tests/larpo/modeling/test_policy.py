"""A model whose forward accepts rows: what libraries see of it, and that it is afterwards what it was."""

import copy
import inspect
import pickle

import pytest
import torch

from larpo.modeling.policy import Policy, accepts_rows, attach, attached, detach
from larpo.modeling.row_checks import _difference
from larpo.modeling.row_layouts import TokenizedCandidate, packed_rows, padded_rows, shared_rows
from tests.helpers import tiny

GPT_BIGCODE = dict(n_embd=32, n_layer=2, n_head=4, n_positions=256)
ROWS = padded_rows([TokenizedCandidate([5, 6], [7, 8, 9]), TokenizedCandidate([5, 6], [11])], pad_token_id=0)


def model_of(model_type):
    model = tiny.causal_lm(model_type, **(GPT_BIGCODE if model_type == "gpt_bigcode" else {}))
    if hasattr(model.base_model, "wpe"):
        torch.nn.init.normal_(model.base_model.wpe.weight)  # as trained: 0.02 moves no token
    return model


def eager_logps(model):
    with torch.no_grad():
        out = model(input_ids=ROWS["input_ids"], attention_mask=ROWS["attention_mask"]).logits.log_softmax(-1)
    return torch.stack([out[0, [1, 2, 3], [7, 8, 9]].sum(), out[1, 1, 11]])


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gpt_bigcode"])
def test_an_attached_model_shows_its_own_signature_and_rows(model_type):
    model = model_of(model_type)
    own = inspect.signature(model.forward).parameters
    attach(model, Policy(model))
    seen = inspect.signature(model.forward).parameters
    assert {name: p for name, p in seen.items() if name not in ("rows", "router_loss")} == dict(own)
    assert seen["rows"].kind is inspect.Parameter.KEYWORD_ONLY
    assert model._supports_logits_to_keep()


@pytest.mark.parametrize("model_type", ["gpt2", "gpt_bigcode"])
def test_an_attached_model_samples_behind_left_padding_as_it_does_without(model_type):
    """The positions of learned embeddings: transformers passes them to a forward that shows them."""
    model = model_of(model_type)
    ids = torch.tensor([[5, 6, 7, 8, 9, 10]])
    alone = model.generate(input_ids=ids, max_new_tokens=8, do_sample=False, eos_token_id=None)[0, 6:]
    attach(model, Policy(model))
    padded = torch.cat([torch.zeros(1, 5, dtype=torch.long), ids], dim=1)
    mask = torch.tensor([[0] * 5 + [1] * 6])
    found = model.generate(input_ids=padded, attention_mask=mask, max_new_tokens=8, do_sample=False, eos_token_id=None)
    assert found[0, 11:].tolist() == alone.tolist()


def test_an_attached_model_computes_only_the_logits_that_generation_reads():
    model = model_of("llama")
    attach(model, Policy(model))
    widths = []
    model.lm_head.register_forward_hook(lambda module, inputs, output: widths.append(output.shape[1]))
    model.generate(input_ids=torch.tensor([[5, 6, 7, 8]]), max_new_tokens=2, do_sample=False)
    assert set(widths) == {1}


def test_a_typing_error_in_generate_is_still_caught():
    model = model_of("llama")
    attach(model, Policy(model))
    with pytest.raises(ValueError, match="positoin_ids"):
        model.generate(input_ids=torch.tensor([[5, 6]]), positoin_ids=torch.tensor([[0, 1]]), max_new_tokens=1)


def test_detach_gives_everything_back():
    model = model_of("llama")
    before = dict(vars(model))
    attach(model, Policy(model))
    assert accepts_rows(model)
    detach(model)
    assert vars(model) == before and not accepts_rows(model)


def test_a_forward_of_the_instance_is_given_back():
    """accelerate's hooks (device_map) stand there."""
    from accelerate.hooks import ModelHook, add_hook_to_module

    model = add_hook_to_module(model_of("llama"), ModelHook())
    hooked, expected = vars(model)["forward"], eager_logps(model)
    torch.testing.assert_close(attach(model, Policy(model))(rows=ROWS), expected)
    detach(model)
    assert vars(model)["forward"] is hooked


def test_copies_and_pickles_of_an_attached_model_ask_themselves():
    model = model_of("llama")
    attach(model, Policy(model))
    copied, stored = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    attach(stored, Policy(stored))
    with torch.no_grad():
        for other in (copied, stored):
            for p in other.parameters():
                p.mul_(1.1)
            other.tie_weights()
    for other in (copied, stored):
        torch.testing.assert_close(other(rows=ROWS), eager_logps(other))
        assert (other(rows=ROWS) - model(rows=ROWS)).abs().max() > 1e-3
        detach(other)
        assert not accepts_rows(other)


def test_attached_for_a_while_leaves_a_model_as_it_was():
    model = model_of("llama")
    with attached(model, Policy(model)) as inside:
        torch.testing.assert_close(inside(rows=ROWS), eager_logps(model))
    assert not accepts_rows(model)
    own = Policy(model)
    attach(model, own)  # a trainer is at work
    with attached(model, Policy(model)):
        pass
    assert accepts_rows(model) and model._larpo_policy is own


# --- the call that training makes, against each candidate alone

COUNTS_FROM_PADDING = ("roberta", "xlm-roberta", "camembert", "data2vec-text", "roberta-prelayernorm", "xlm-roberta-xl")
CANDIDATES = [TokenizedCandidate([5, 6], [7, 8, 9, 20, 30, 31, 32]), TokenizedCandidate([5, 6], [11])]


def alone(model, candidate):
    ids = torch.tensor([[*candidate.prompt_ids, *candidate.completion_ids]])
    with torch.no_grad():
        logps = model(input_ids=ids).logits[0].log_softmax(-1)
    n = len(candidate.prompt_ids)
    return sum(logps[n - 1 + i, token] for i, token in enumerate(candidate.completion_ids))


@pytest.mark.parametrize("model_type", COUNTS_FROM_PADDING)
def test_positions_that_the_model_counts_itself_are_left_to_it(model_type):
    model = tiny.causal_lm(model_type, is_decoder=True, pad_token_id=1, bos_token_id=0)
    for name, p in model.named_parameters():
        if "position_embeddings" in name:
            torch.nn.init.normal_(p)  # as trained: 0.02 moves no token
    expected = torch.stack([alone(model, one) for one in CANDIDATES])
    attach(model, Policy(model))
    with pytest.warns(UserWarning, match="is trained from its logits"):  # a layer stands before the head
        found = model(rows=padded_rows(CANDIDATES, pad_token_id=1))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("first", [TokenizedCandidate([5], []), TokenizedCandidate([5], [7])], ids=["nothing", "one token"])
def test_a_first_row_with_nothing_to_compare_settles_nothing_for_the_rows_after_it(first):
    model = tiny.causal_lm("roberta", is_decoder=True, pad_token_id=1, bos_token_id=0)
    torch.nn.init.normal_(model.base_model.embeddings.position_embeddings.weight)
    expected = torch.stack([alone(model, one) for one in CANDIDATES])
    attach(model, Policy(model))
    with pytest.warns(UserWarning, match="is trained from its logits"):
        model(rows=padded_rows([first], pad_token_id=1))
    torch.testing.assert_close(model(rows=padded_rows(CANDIDATES, pad_token_id=1)), expected)


def test_positions_stay_where_the_model_takes_them():
    model = tiny.causal_lm("gpt2")
    policy = Policy(model)
    attach(model, policy)(rows=ROWS)
    assert [call.with_positions for call in policy.calls.values()] == [True]


def test_a_model_that_reads_padding_on_the_left_is_refused():
    sizes = dict(dim_model=32, num_attention_heads=4, dim_head=8, dim_ff=32, prompt_length=4)
    model = tiny.causal_lm("cpmant", **sizes)
    attach(model, Policy(model))
    with pytest.raises(ValueError, match="CpmAntForCausalLM gives tokens other probabilities in padded rows"):
        model(rows=padded_rows(CANDIDATES, pad_token_id=0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gptj", "gemma2", "bloom", "qwen2_moe"])
def test_rounding_is_not_taken_for_another_model(model_type, dtype):
    more = {"bloom": dict(n_layer=2, n_head=4)}.get(model_type, {})
    model = tiny.causal_lm(model_type, dtype=dtype, **more)
    attach(model, Policy(model))
    assert model(rows=padded_rows(CANDIDATES, pad_token_id=0)).isfinite().all()


def test_the_same_tokens_in_rows_that_share_a_prompt_or_lie_in_one_row_are_compared_too():
    model = tiny.causal_lm("llama")
    policy = Policy(model)
    attach(model, policy)
    expected = torch.stack([alone(model, one) for one in CANDIDATES])
    for rows in (packed_rows(CANDIDATES), shared_rows(CANDIDATES, pad_token_id=0)):
        torch.testing.assert_close(model(rows=rows), expected)
    assert {layout for layout, _ in policy.calls} == {"packed", "shared"}


def test_packed_rows_that_a_model_does_not_keep_apart_are_refused():
    model = tiny.causal_lm("bloom", n_layer=2, n_head=4)  # its mask and positions know one sequence a row
    attach(model, Policy(model))
    with pytest.raises(ValueError, match="in packed rows of candidates"):
        model(rows=packed_rows(CANDIDATES))


def test_logits_that_hide_entries_of_the_vocabulary_or_are_nan_are_no_difference():
    theirs = torch.randn(3, 5)
    theirs[:, 1] = -torch.inf
    theirs[:, 2] = torch.finfo(torch.float32).min
    assert _difference(theirs + 4.0, theirs)[0] < 1e-5  # a constant beside a token's logits is nothing
    assert _difference(theirs, torch.full_like(theirs, torch.nan))[0] == 0
    assert _difference(torch.full_like(theirs, torch.nan), theirs)[0] == torch.inf
    off = theirs.clone()
    off[:, 0] += 3.0
    assert _difference(off, theirs)[0] == pytest.approx(2**0.5)  # 3, 0, 0 less their mean 1: root of (4 + 1 + 1) / 3
