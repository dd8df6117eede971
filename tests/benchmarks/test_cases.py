"""Benchmark inputs: the right shapes, the right logits, the same ones every time."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from benchmarks.core import cases
from larpo import offline
from tests.helpers.real_data import real_data

TENSORS = ("hidden", "weight", "labels", "relevance", "ref_logps")


@pytest.fixture(
    scope="module",
    params=[*cases.OPENBOOKQA, *(pytest.param(name, marks=pytest.mark.slow) for name in (cases.SAMPLED, *cases.DOCUMENTS))],
)
def real(request):
    return cases.build(request.param, progress=False)


def only(case, candidates):
    """Some of its candidates: the logits of all take seconds."""
    rows = {name: getattr(case, name)[candidates] for name in ("hidden", "labels", "relevance", "ref_logps")}
    return replace(case, **rows)


def answer_logps(case):
    """[S] float32 log-likelihoods of the answers, and the mean entropy of their tokens in nats."""
    answer = case.labels != -100
    logps = case.logits[answer].float().log_softmax(-1)
    picked = torch.zeros(case.labels.shape)
    picked[answer] = logps.gather(1, case.labels[answer][:, None]).squeeze(1)
    return picked.sum(1), -(logps.exp() * logps).sum(-1).mean()


def assert_well_formed(case):
    s, t, width = case.hidden.shape
    assert case.labels.shape == (s, t) and case.labels.dtype == torch.int64
    assert case.weight.shape[1] == width and case.weight.dtype == case.hidden.dtype
    assert case.relevance.shape == case.ref_logps.shape == (s,)
    assert s % case.list_sizes == 0
    answer = case.labels != -100
    assert answer.any(1).all()
    assert case.labels[answer].min() >= 0 and case.labels[answer].max() < len(case.weight)
    assert case.hidden.isfinite().all() and case.ref_logps.isfinite().all()
    assert case.masked == pytest.approx(1 - answer.sum().item() / (s * t))


def assert_logits_well_formed(case):
    assert case.logits.shape == (*case.labels.shape, len(case.weight)) and case.logits.dtype == case.hidden.dtype
    assert case.logits is case.logits  # computed once


# --- made-up cases


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", ["T256-H24-V77-m2", "T96-H16-V300-m3-peaked", "T512-H8-V31-m4-peaked-masked0.25"])
def test_made_up_cases_are_what_their_name_says(name, dtype):
    case = cases.build(name, dtype)
    assert_well_formed(case)
    assert_logits_well_formed(case)
    tokens, width, vocabulary, m = (int(part[1:]) for part in name.split("-")[:4])
    assert case.labels.numel() == tokens
    assert (case.hidden.shape[-1], len(case.weight), case.list_sizes) == (width, vocabulary, m)
    assert case.masked == (0.25 if "masked" in name else 0)
    assert case.hidden.dtype == dtype


def test_a_name_may_say_how_long_candidates_are():
    assert cases.build("T48-H8-V31-m2-length6-masked0.5").labels.shape == (8, 6)
    with pytest.raises(ValueError, match="multiple of m times the candidates' length 5"):
        cases.build("T48-H8-V31-m2-length5")


def test_masked_tokens_are_a_prompt():
    labels = cases.build("T512-H8-V31-m4-masked0.25").labels
    prompt = labels.shape[1] // 4
    assert (labels[:, :prompt] == -100).all()
    assert (labels[:, prompt:] >= 0).all()


@pytest.mark.parametrize(("name", "std"), [("T512-H256-V500-m2", 1.0), ("T512-H256-V500-m2-peaked", 20.0)])
def test_logits_have_the_promised_spread(name, std):
    assert cases.build(name).logits.std().item() == pytest.approx(std, rel=0.05)


def test_peaked_labels_are_drawn_from_the_logits():
    case = cases.build("T8192-H32-V50-m2-peaked")
    probabilities = case.logits.flatten(0, 1).double().softmax(-1)
    counts = case.labels.flatten().bincount(minlength=50)
    deviation = (probabilities * (1 - probabilities)).sum(0).sqrt()
    assert ((counts - probabilities.sum(0)).abs() < 5 * deviation).all()
    # Drawn token by token, not from the average: minus the log-likelihood is the entropy, on average.
    logps, entropy = answer_logps(case)
    assert 0.1 < entropy < 2
    mean = -logps.sum().item() / case.labels.numel()
    assert mean == pytest.approx(entropy.item(), abs=0.05)


@pytest.mark.parametrize("name", ["T1024-H256-V2000-m4", "T1024-H256-V2000-m4-peaked"])
def test_the_reference_is_a_few_nats_from_the_policy(name):
    assert_a_few_nats_apart(cases.build(name))


def assert_a_few_nats_apart(case):
    """Scores that saturate every sigmoid make all gradients zero, and a benchmark's check of them vacuous."""
    logps, _ = answer_logps(case)
    lists = (logps - case.ref_logps).view(-1, case.list_sizes)
    assert 1 < lists.std(1).mean() < 10


@pytest.mark.parametrize("name", ["T256-H24-V77-m2", "T256-H24-V77-m2-peaked"])
def test_the_seed_decides_everything(name):
    first, again, other = (cases.build(name, seed=seed) for seed in (3, 3, 4))
    for field in TENSORS:
        assert torch.equal(getattr(first, field), getattr(again, field))
        assert not torch.equal(getattr(first, field), getattr(other, field))


def test_a_narrow_dtype_holds_the_same_values_rounded():
    wide, narrow = cases.build("T256-H24-V77-m2"), cases.build("T256-H24-V77-m2", torch.bfloat16)
    assert torch.equal(narrow.hidden, wide.hidden.bfloat16())
    assert torch.equal(narrow.weight, wide.weight.bfloat16())
    assert torch.equal(narrow.labels, wide.labels)


def test_blocks_do_not_change_the_drawn_values_of_logits(monkeypatch):
    hidden, weight = torch.randn(20, 16).bfloat16(), torch.randn(103, 16).bfloat16()
    whole = (hidden.double() @ weight.double().T).bfloat16()
    monkeypatch.setattr(cases, "BLOCK_BYTES", 4 * 20 * 16 * 10)  # 10 rows of the vocabulary at a time
    logits = cases.head_logits(hidden, weight, torch.bfloat16)
    # Rounded once: at most one step of bf16 away, where float32's own error crosses a rounding boundary.
    assert (logits == whole).float().mean() > 0.99
    torch.testing.assert_close(logits, whole, rtol=2**-7, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("smollm2", "expected one of smollm2-openbookqa, .* or T<tokens>"),
        ("T256-H24-V77", "expected one of"),
        ("T256-H24-V77-m2-masked1.5", "expected one of"),
        ("T255-H24-V77-m2", "tokens T to be a multiple of m"),
        ("T256-H0-V77-m2", "sizes of at least 1"),
        ("T256-H24-V77-m2-masked0.999", "leaves some of each row's 64 tokens"),
    ],
)
def test_a_name_that_fits_nothing_says_what_would(name, message):
    with pytest.raises(ValueError, match=message):
        cases.build(name)


def test_an_integer_dtype_is_refused():
    with pytest.raises(ValueError, match=r"dtype is torch\.int64; expected a floating-point dtype"):
        cases.build("T256-H24-V77-m2", torch.int64)


def test_answers_only_keeps_every_answer_place_and_drops_the_rest():
    hidden = torch.arange(1.0, 25.0).view(2, 6, 2)
    labels = torch.tensor([[-100, 7, 8, -100, -100, -100], [-100, -100, -100, 1, 2, 3]])
    kept, kept_labels = cases._answers_only(hidden, labels)
    assert kept_labels.tolist() == [[7, 8, -100], [1, 2, 3]]
    assert torch.equal(kept[0], torch.stack([hidden[0, 1], hidden[0, 2], torch.zeros(2)]))
    assert torch.equal(kept[1], hidden[1, 3:])


# --- real cases


@real_data
def test_real_cases_are_well_formed_fit_two_cores_and_are_a_few_nats_from_their_reference(real):
    assert_well_formed(real)
    assert real.weight.shape == (49152, 576)
    assert real.list_sizes == 4
    assert 1000 < real.labels.numel() <= 4096
    few = only(real, slice(8 * real.list_sizes))
    assert_logits_well_formed(few)
    assert_a_few_nats_apart(few)


@real_data
def test_openbookqa_has_the_likelihoods_of_the_model_run_row_by_row():
    model, tokenizer = offline.load_smollm2(progress=False)
    answers, with_prompt = (cases.build(name, progress=False) for name in cases.OPENBOOKQA)
    for field in ("hidden", "labels"):
        kept, whole = (getattr(case, field)[case.labels != -100] for case in (answers, with_prompt))
        assert torch.equal(kept, whole)
    assert torch.equal(answers.relevance, with_prompt.relevance)
    assert answers.relevance.view(-1, 4).sum(1).tolist() == [1.0] * cases.OPENBOOKQA_LISTS
    lists = offline.openbookqa()
    asked = [0, 5, 63]
    logps, _ = answer_logps(only(answers, asked))
    for s, logp in zip(asked, logps.tolist(), strict=True):
        answer = answers.labels[s][answers.labels[s] != -100]
        assert answer[-1] == tokenizer.eos_token_id
        option = tokenizer.decode(answer[:-1])
        (prompt,) = (one.prompt for one in lists if option in one.completions)
        ids = torch.cat([torch.tensor(tokenizer(prompt).input_ids), answer])
        with torch.no_grad():
            logits = model(ids[None]).logits[0, -len(answer) - 1 : -1]
        expected = -F.cross_entropy(logits, answer, reduction="sum")
        assert logp == pytest.approx(expected.item(), abs=1e-3)


@pytest.mark.slow
@real_data
def test_sampled_answers_are_as_likely_as_the_models_entropy_says():
    case = cases.build(cases.SAMPLED, progress=False)
    assert len(case.labels) == cases.SAMPLED_PROMPTS * cases.SAMPLED_PER_PROMPT
    logps, entropy = answer_logps(case)
    tokens = (case.labels != -100).sum()
    assert math.isclose(-logps.sum() / tokens, entropy, abs_tol=0.3)  # a shift by one token costs several nats


@real_data
def test_builds_follow_the_seed_only_where_something_is_drawn():
    first, other = (cases.build(cases.OPENBOOKQA[0], seed=seed, progress=False) for seed in (0, 1))
    assert torch.equal(first.hidden, other.hidden) and torch.equal(first.labels, other.labels)
    assert not torch.equal(first.ref_logps, other.ref_logps)
