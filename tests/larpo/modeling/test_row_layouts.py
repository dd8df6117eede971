"""Padded, packed and shared rows ask the head for the same completion tokens from the right hidden states."""

import pytest
import torch

from larpo.modeling.row_layouts import TokenizedCandidate, backbone_inputs, num_tokens, packed_rows, padded_rows, shared_rows
from tests.helpers.tiny import causal_lm

PROMPT, OTHER = [5, 6, 7], [8]
RAGGED = [
    TokenizedCandidate(PROMPT, [10, 11], 0),
    TokenizedCandidate(PROMPT, [], 0),
    TokenizedCandidate(PROMPT, [12], 0),
    TokenizedCandidate(OTHER, [13, 14, 15, 16], 1),
]
LAYOUTS = {
    "padded": lambda candidates: padded_rows(candidates, 0),
    "packed": packed_rows,
    "shared": lambda candidates: shared_rows(candidates, 0, multiple=8),
}


@pytest.fixture(params=LAYOUTS)
def layout(request):
    return LAYOUTS[request.param]


def _history(rows, place):
    """The tokens that lead up to a flat place, by the positions: what its hidden state has read."""
    row, column = divmod(place, rows["input_ids"].shape[1])
    ids, positions = rows["input_ids"][row].tolist(), rows["position_ids"][row].tolist()
    segments = rows["segments"][row].tolist() if "segments" in rows else [0] * len(ids)
    seen, wanted = [], positions[column]
    for j in range(column, -1, -1):
        if positions[j] == wanted and segments[j] in (segments[column], 0):
            seen.insert(0, ids[j])
            wanted -= 1
    return seen


def test_each_label_is_predicted_behind_its_prompt_and_the_completion_so_far(layout):
    rows = layout(RAGGED)
    borders = rows["cu_seqlens"].tolist()
    assert borders == [0, 2, 2, 3, 7]
    for c, a, b in zip(RAGGED, borders, borders[1:], strict=False):
        assert rows["labels"][a:b].tolist() == c.completion_ids
        for i, place in enumerate(rows["predictor_positions"][a:b].tolist()):
            assert _history(rows, place) == [*c.prompt_ids, *c.completion_ids[:i]]


def test_tokens_that_do_not_count_are_read_and_not_asked_for(layout):
    masks = [[True, False], [], None, [False, False, True, True]]
    rows = layout([c._replace(counted=mask) for c, mask in zip(RAGGED, masks, strict=True)])
    assert rows["input_ids"].tolist() == layout(RAGGED)["input_ids"].tolist()
    assert rows["cu_seqlens"].tolist() == [0, 1, 1, 2, 4] and rows["labels"].tolist() == [10, 12, 15, 16]
    histories = [_history(rows, place) for place in rows["predictor_positions"].tolist()]
    assert histories == [PROMPT, PROMPT, [*OTHER, 13, 14], [*OTHER, 13, 14, 15]]


def test_lists_with_no_completion_tokens_ask_for_nothing(layout):
    rows = layout([TokenizedCandidate(PROMPT, [], 0), TokenizedCandidate(PROMPT, [], 0)])
    assert rows["predictor_positions"].tolist() == rows["labels"].tolist() == []
    assert rows["cu_seqlens"].tolist() == [0, 0, 0]


@pytest.mark.parametrize("name, expected", [("padded", 17), ("packed", 17), ("shared", 11)])
def test_num_tokens_leaves_padding_out_and_counts_a_shared_prompt_once(name, expected):
    assert num_tokens(LAYOUTS[name](RAGGED)) == expected


def test_dtypes_are_what_backbone_and_kernels_take(layout):
    rows = layout(RAGGED)
    narrow = {"cu_seqlens_q", "segments"}
    found = {n: x.dtype for n, x in rows.items() if n != "max_seqlen_q"}
    assert found == {n: torch.int32 if n in narrow else torch.int64 for n in found}


def test_lengths_are_rounded_up_to_the_multiple():
    assert padded_rows(RAGGED, 0, multiple=1)["input_ids"].shape == (4, 5)
    assert padded_rows(RAGGED, 0, multiple=8)["input_ids"].shape == (4, 8)
    assert shared_rows(RAGGED, 0)["input_ids"].shape == (2, 64)


def test_positions_of_padding_stay_inside_a_position_table():
    """A learned table of as many positions as the longest row must not be read past its end."""
    for rows in (padded_rows(RAGGED, 0), shared_rows(RAGGED, 0)):
        assert rows["position_ids"].max() == 4


def test_a_list_that_comes_back_later_gets_a_row_of_its_own():
    """Only neighbours share: places in `predictor_positions` stay in the order of the candidates."""
    rows = shared_rows([RAGGED[0], RAGGED[3], RAGGED[2]], 0, multiple=1)
    assert rows["input_ids"].shape[0] == 3 and rows["labels"].tolist() == [10, 11, 13, 14, 15, 16, 12]


@pytest.mark.parametrize("most, rows", [(None, 2), (7, 2), (3, 2), (2, 3), (1, 4)])
def test_a_list_of_many_completion_tokens_is_spread_over_rows_with_its_prompt(most, rows):
    made = shared_rows(RAGGED, 0, max_completion_tokens=most)
    assert made["input_ids"].shape[0] == rows
    borders = made["cu_seqlens"].tolist()
    for c, a, b in zip(RAGGED, borders, borders[1:], strict=False):
        for i, place in enumerate(made["predictor_positions"][a:b].tolist()):
            assert _history(made, place) == [*c.prompt_ids, *c.completion_ids[:i]]


def test_a_list_of_several_prompts_is_an_error():
    with pytest.raises(ValueError, match="candidate 1 of list 7 has another prompt"):
        shared_rows([TokenizedCandidate(PROMPT, [1], 7), TokenizedCandidate(OTHER, [1], 7)], 0)


def test_bad_candidates_are_told_by_name(layout):
    with pytest.raises(ValueError, match="candidates: got none"):
        layout([])
    with pytest.raises(ValueError, match=r"candidates\[1\].prompt_ids: got no tokens"):
        layout([RAGGED[0], TokenizedCandidate([], [1])])
    with pytest.raises(ValueError, match=r"candidates\[0\].counted: got 1 values, expected 2"):
        layout([RAGGED[0]._replace(counted=[True])])


def test_a_multiple_below_one_is_an_error():
    for build in (padded_rows, shared_rows):
        with pytest.raises(ValueError, match="multiple: got 0"):
            build(RAGGED, 0, multiple=0)


def test_flash_attention_gets_the_borders_of_packed_sequences():
    config = causal_lm("llama").config
    config._attn_implementation = "flash_attention_2"
    inputs = backbone_inputs(packed_rows(RAGGED), config, torch.bfloat16)
    assert inputs["cu_seq_lens_q"].tolist() == inputs["cu_seq_lens_k"].tolist() == [0, 5, 8, 12, 17]
    assert inputs["max_length_q"] == inputs["max_length_k"] == 5
    assert "attention_mask" not in inputs


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(
    "model_type, config",
    [("llama", {}), ("gpt2", {}), ("mistral", {"sliding_window": 3}), ("gemma3_text", {"sliding_window": 3})],
)
def test_packed_sequences_do_not_see_each_other(model_type, config, attention):
    """transformers tells sequences of a row apart by positions that start again."""
    model = causal_lm(model_type, attn_implementation=attention, **config)

    def hidden(rows):
        inputs = backbone_inputs(rows, model.config, torch.float32)
        return model.base_model(**inputs, use_cache=False).last_hidden_state.flatten(0, 1)[rows["predictor_positions"]]

    with torch.no_grad():
        torch.testing.assert_close(hidden(packed_rows(RAGGED)), hidden(padded_rows(RAGGED, 0)), atol=2e-5, rtol=1e-4)
        merged = packed_rows(RAGGED)
        merged["position_ids"] = torch.arange(merged["input_ids"].shape[1])[None]
        assert (hidden(merged) - hidden(padded_rows(RAGGED, 0))).abs().max() > 0.01
