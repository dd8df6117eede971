"""RLRF: refinements as candidates with exact tokens, trained on behind the original prompt; feedback on the naming task."""

import random
from dataclasses import replace

import pytest
import torch
from datasets import Dataset

from larpo.candidates import Candidate, PromptList, to_rows
from larpo.recipes import rlrf
from larpo.recipes.harness import online
from larpo.recipes.refinements import ORIGINAL, REFINEMENT, refine
from larpo.recipes.tasks import naming, naming_feedback, toy_lm
from larpo.sampling import Sampled, TransformersSampler
from tests.helpers import tiny


def ids(text):
    """Tokens of the sampler below: a letter each, and 0 at the end."""
    return (*map(ord, text), 0)


class Says:
    """A sampler that gives the texts it was made with, in turn, and remembers what it was asked."""

    def __init__(self, *texts):
        self.texts, self.calls = iter(texts), []

    def __call__(self, prompts, k, temperature, *, seed):
        self.calls.append((list(prompts), k, temperature, seed))
        drawn = [[next(self.texts) for _ in range(k)] for _ in prompts]
        return [[Sampled(t, ids(t), True, (7, 7)) for t in texts] for texts in drawn]


def length(*, prompts, completions, **_):
    """A reward: the number of letters; none for an answer with an x."""
    texts = [c if isinstance(c, str) else c[0]["content"] for c in completions]
    return [None if "x" in text else len(text) for text in texts]


def ask(prompt, candidate):
    return f"{prompt}: {candidate.completion} has {candidate.score:g}"


def answers(prompt, *texts):
    candidates = tuple(Candidate(text, completion_ids=ids(text)) for text in texts)
    return PromptList(prompt, candidates, prompt_ids=(1, *map(ord, prompt)))


def test_refinements_join_their_originals_behind_the_original_prompt():
    lists = [answers("p", "aa", "b"), answers("q", "ccc")]
    sampler = Says("aaaa", "", "b", "bb", "ccc", "cc")
    found = refine(sampler, lists, ask, length, k=2, temperature=0.7, seed=5)
    assert sampler.calls == [(["p: aa has 2", "p: b has 1", "q: ccc has 3"], 2, 0.7, 5)]
    assert [(one.prompt, one.prompt_ids) for one in found.lists] == [("p", (1, 112)), ("q", (1, 113))]
    assert [[(c.completion, c.score, c.source) for c in one.candidates] for one in found.lists] == [
        [("aaaa", 4, REFINEMENT), ("aa", 2, ORIGINAL), ("bb", 2, REFINEMENT), ("b", 1, ORIGINAL), ("", 0, REFINEMENT)],
        [("ccc", 3, ORIGINAL), ("cc", 2, REFINEMENT)],
    ]
    assert all(c.completion_ids == ids(c.completion) for one in found.lists for c in one.candidates)
    assert found.gains == [2, -2, 0, 1, 0, -1]
    assert found.counts == {"refinements": 6, "empty": 1, "unchanged": 2, "duplicates": 2, "unscored": 0}
    assert lists == [answers("p", "aa", "b"), answers("q", "ccc")]  # as they were


def test_only_the_promising_are_refined_and_lists_without_candidates_stay():
    lists = [answers("p", "a", "aaa", "aa"), answers("none")]
    sampler = Says("aaaa")
    found = refine(sampler, lists, ask, length, promising=1, seed=0)
    assert sampler.calls[0][0] == ["p: aaa has 3"]
    assert [len(one.candidates) for one in found.lists] == [4, 0]
    silent = Says()
    assert refine(silent, lists[1:], ask, length, seed=0).lists == lists[1:]
    assert silent.calls == []


def test_a_score_or_a_source_that_is_there_stays_and_a_refinement_without_reward_is_last_and_counted():
    one = replace(answers("p", "a", "b"), candidates=(Candidate("a", 0.5, "iteration 1"), Candidate("b", -9.0, "iteration 2")))
    found = refine(Says("ax", "bb"), [one], ask, length, seed=0)
    first, last = ("bb", 2, REFINEMENT), ("ax", None, REFINEMENT)
    order = [first, ("a", 0.5, "iteration 1"), ("b", -9, "iteration 2"), last]
    assert [(c.completion, c.score, c.source) for c in found.lists[0].candidates] == order
    assert found.gains == [11]
    assert found.counts["unscored"] == 1
    assert all(c.completion_ids is None for c in found.lists[0].candidates)  # as their originals
    to_rows(found.lists)


def test_a_conversation_goes_on_with_the_critique_and_its_refinement_is_a_message():
    prompt, said = [{"role": "user", "content": "hi"}], [{"role": "assistant", "content": "a"}]
    sampler = Says("bb")
    found = refine(
        sampler,
        [PromptList(prompt, (Candidate(said, completion_ids=(3,)),), prompt_ids=(1, 2))],
        lambda prompt, c: [*prompt, *c.completion, {"role": "user", "content": "longer"}],
        length,
        seed=0,
    )
    assert [m["content"] for m in sampler.calls[0][0][0]] == ["hi", "a", "longer"]
    best, second = found.lists[0].candidates
    assert (best.completion, best.completion_ids) == ([{"role": "assistant", "content": "bb"}], ids("bb"))
    assert second.completion == said
    assert found.lists[0].prompt == prompt


def test_what_cannot_be_refined_is_refused():
    lists = [answers("p", "a", "x")]
    with pytest.raises(ValueError, match=r"k >= 1 and promising >= 1 or None, got k=0 and promising=None"):
        refine(Says(), lists, ask, length, k=0, seed=0)
    with pytest.raises(ValueError, match=r"got k=1 and promising=0"):
        refine(Says(), lists, ask, length, promising=0, seed=0)
    with pytest.raises(ValueError, match=r"candidate 1 of prompt 'p' has no score"):  # no reward to be promising by
        refine(Says(), lists, ask, length, promising=1, seed=0)


# --- the loss ------------------------------------------------------------------------------------------------------


def plain_loss(model, reference, lists, beta):
    """DPO on the first best and the last worst of each list, every candidate alone behind the original prompt."""

    def logp(lm, one, candidate):
        tokens = torch.tensor([[*one.prompt_ids, *candidate.completion_ids]])
        scores = lm(input_ids=tokens).logits.double()[0]
        total, start = 0.0, len(one.prompt_ids)
        for place, token in enumerate(candidate.completion_ids):
            row = scores[start + place - 1]
            total = total + row[token] - row.exp().sum().log()
        return total

    losses = []
    for one in lists:
        rewards = [c.score for c in one.candidates]
        best = one.candidates[rewards.index(max(rewards))]
        worst = one.candidates[len(rewards) - 1 - rewards[::-1].index(min(rewards))]
        s = [beta * (logp(model, one, c) - logp(reference, one, c).detach()) for c in (best, worst)]
        losses.append((1 + (s[1] - s[0]).exp()).log())
    return sum(losses) / len(losses)


def test_loss_and_gradient_of_refined_lists_are_those_behind_the_original_prompt(tmp_path):
    """Real tokens from a sampler, ragged lists, ties within and over a list, upstream gradient other than 1."""
    from larpo.config import LarPOConfig
    from larpo.recipes.harness.trainer import ObjectiveTrainer
    from larpo.recipes.objectives import OBJECTIVES

    model, reference, tokenizer = tiny.causal_lm(seed=0), tiny.causal_lm(seed=1), tiny.tokenizer()
    sampler = TransformersSampler(model, tokenizer, 5)
    prompts, sizes = ["the cat sat on", "a dog ran to the red", "one two"], [3, 1, 2]
    lists = [
        PromptList(p, tuple(Candidate(c.text, completion_ids=c.token_ids) for c in drawn[:n]), prompt_ids=drawn[0].prompt_ids)
        for p, n, drawn in zip(prompts, sizes, sampler(prompts, 3, 1.0, seed=0), strict=True)
    ]
    given = iter([3, 1, 1, 2, 0, 0, 1, 1, 3, 1, 0, 0])  # originals of all lists, then refinements

    def reward(*, prompts, completions, **_):
        return [next(given) for _ in completions]

    found = refine(sampler, lists, ask, reward, seed=1)
    assert [[c.score for c in one.candidates] for one in found.lists] == [[3, 3, 1, 1, 1, 1], [2, 1], [0, 0, 0, 0]]
    assert {tuple(one.prompt_ids) for one in found.lists} == {one.prompt_ids for one in lists}

    trainer = ObjectiveTrainer(
        model,
        reference,
        LarPOConfig(output_dir=str(tmp_path), report_to="none", use_cpu=True, disable_tqdm=True, max_steps=1),
        train_dataset=Dataset.from_list(to_rows(found.lists)),
        processing_class=tokenizer,
        loss=OBJECTIVES["pairwise (DPO)"],
    )
    rows = [trainer.train_dataset[i] for i in range(3)]
    logged = trainer.compute_loss(model, trainer.data_collator(rows))
    ours = dict(model.named_parameters())
    gradient = torch.autograd.grad(1.7 * logged, list(ours.values()))
    again = tiny.causal_lm(seed=0)
    plain = plain_loss(again, tiny.causal_lm(seed=1), found.lists, beta=0.1)
    expected = torch.autograd.grad(1.7 * plain, [dict(again.named_parameters())[name] for name in ours])
    torch.testing.assert_close(logged.double(), plain, rtol=1e-5, atol=1e-6)
    for name, a, b in zip(ours, gradient, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


# --- the naming task -----------------------------------------------------------------------------------------------


def test_marks_account_for_the_whole_reward():
    draw, worth = random.Random(0), {"best": 3, "good": 1, "off": -1, "again": -1, "long": -1}
    seen = set()
    for _ in range(400):
        prompt = draw.choice(naming.PROMPTS)
        words = [w for t, ws in naming.TOPICS.items() if t in prompt for w in ws] + ["saw", "red"]
        completion = " ".join(draw.choices(words, k=draw.randint(0, 4)))
        marks = naming_feedback.marks(prompt, completion)
        seen |= set(marks)
        assert naming.reward(prompt, completion) == max(0, sum(map(worth.get, marks))) / (9 if "and" in prompt else 7)
    assert seen == set(worth)


def test_blank_feedback_tells_nothing_and_has_the_same_form():
    told = naming_feedback.ask("name animals and tools", "dog red emu").split()
    blank = naming_feedback.ask("name animals and tools", "dog red emu", blank=True).split()
    assert told == ["name", "animals", "and", "tools", "|", "dog", "good", "red", "off", "emu", "best", "|", "better"]
    assert [a if a == b else (a, b) for a, b in zip(told, blank, strict=True)] == [
        *["name", "animals", "and", "tools", "|", "dog"],
        *[("good", "?"), "red", ("off", "?"), "emu", ("best", "?"), "|", "better"],
    ]
    unknown = naming_feedback.tokenizer().unk_token_id
    for text in (" ".join(told), " ".join(blank), naming_feedback.ask("name tools", "saw saw axe awl")):
        assert unknown not in naming_feedback.tokenizer()(text).input_ids


def test_the_speaker_heeds_marks_and_without_them_keeps_half():
    draw = random.Random(0)

    def kept(blank):
        """Of 2000 rewritten answers, in which share each word of "emu red dog" still stands in its place."""
        new = [naming_feedback.rewritten("name animals", "emu red dog", draw, blank=blank).split() for _ in range(2000)]
        assert {len(words) for words in new} == {3}
        return [sum(words[i] == word for words in new) / len(new) for i, word in enumerate(["emu", "red", "dog"])]

    emu, red, dog = kept(blank=False)
    assert emu > 0.95
    assert dog > 0.95
    assert red < 0.1
    emu, red, _ = kept(blank=True)
    assert abs(emu - red) < 0.06  # whether a word is worth much or off topic makes no difference
    assert naming_feedback.rewritten("name animals", "dog cat cow owl", draw, blank=False).count(" ") == 2
    assert len(naming_feedback.rewritten("name animals", "", draw, blank=False).split()) == 1


# --- the run -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arm", rlrf.ARMS)
def test_every_arm_trains_on_as_many_completions(arm):
    k, tokenizer = 4, naming_feedback.tokenizer()
    first = naming.scored(["name animals"], [[Sampled(w, ids(w), True, (1,)) for w in ("dog", "emu", "red", "cat")]])
    words = iter(["yak", "owl", "cow", "dog emu"])

    def sampler(prompts, k, temperature, *, seed):
        texts = [[next(words) for _ in range(k)] for _ in prompts]
        return [[Sampled(t, tuple(tokenizer(t).input_ids), True, (1,)) for t in one] for one in texts]

    (one,), measures = rlrf.ARMS[arm](sampler, first, 0)
    assert len(one.candidates) == k
    assert [c.score for c in one.candidates] == sorted((c.score for c in one.candidates), reverse=True)
    refinements = [c.completion for c in one.candidates if c.source == REFINEMENT]
    assert len(refinements) == (0 if arm == "k answers" else k // 2)
    assert ("gain" in measures) == (arm != "k answers")
    if arm == "half refinements of the best":
        assert {c.completion for c in one.candidates} == {"dog", "emu", "yak", "owl"}


def test_first_answers_are_measured_and_the_candidates_of_a_source_are_counted(monkeypatch):
    best = [PromptList(prompt, (Candidate("best", 1.0), Candidate("red", 0.0))) for prompt in naming.PROMPTS]
    taken = []

    def train(policy, tokenizer, lists, loss, **settings):
        taken.append(lists)
        return {"lists": 1}

    monkeypatch.setattr(online, "train", train)
    start = naming.tokenizer(), toy_lm.causal_lm(naming.tokenizer(), seed=0, hidden_size=16)
    recipe = online.Exploration(rounds=1, k=3)
    found = recipe.explored(start, 0, loss=None, source=lambda *_: (best, {"gain": 0.5}))
    assert taken == [best]
    assert found["worthy"] == [10, 10]
    assert found["best"] == [1.0, 1.0]
    assert found["gain"] == [0.5, 0.5]
    assert found["counts"] == {"lists": 1}
    without = recipe.explored(start, 0, loss=None)
    assert {name: found[name] for name in ("reward", "distinct")} == {name: without[name] for name in ("reward", "distinct")}


def test_a_number_of_completions_that_has_no_half_is_refused():
    with pytest.raises(ValueError, match="k must be even and at least 2, got 3"):
        rlrf.Rlrf(k=3)
