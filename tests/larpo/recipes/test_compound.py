"""The compound system: the loss of its two lists against plain float64, its metrics, and a tiny run."""

import math
from functools import partial

import pytest
import torch

from larpo.recipes import compound
from larpo.recipes.harness import report
from larpo.recipes.tasks.reading import Lists
from tests.helpers.written_out import assert_equal_losses
from tests.larpo.recipes.test_selection import quiz, tiny

RIGHT = torch.tensor([0.0, 1.0, 0.0, 0.0])


def numbers(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    questions = -20 - torch.randn(3, generator=generator, dtype=torch.float64)
    options = -2 * torch.rand(3, 4, generator=generator, dtype=torch.float64)
    options[2] = options[0]  # two passages that tie in their reward
    return questions, options


def plain(questions, options, arm: str, beta: float, temperature: float):
    """Both lists, candidate by candidate."""

    def list_net(scores, relevance):
        targets = [math.exp(float(r) / temperature) for r in relevance]
        norm = torch.log(sum(torch.exp(s) for s in scores))
        return -sum(target / sum(targets) * (s - norm) for target, s in zip(targets, scores, strict=True))

    rewards = []
    for k in range(len(questions)):
        weights = [math.exp(beta * float(s)) for s in options[k].detach()]
        rewards.append(sum(w for w, right in zip(weights, RIGHT, strict=True) if right) / sum(weights))
    chosen = max(range(len(questions)), key=lambda k: float(questions[k].detach()))
    total = 0.0 * (questions.sum() + options.sum())
    if arm in ("retriever", "both"):
        total = total + list_net(list(questions), rewards)
    if arm in ("answerer", "both"):
        total = total + list_net([beta * s for s in options[chosen]], list(RIGHT))
    return total


@pytest.mark.parametrize("arm", compound.ARMS)
@pytest.mark.parametrize("seed", [0, 1])
def test_loss_and_gradient_of_two_lists_against_plain_float64(arm, seed):
    options = dict(arm=arm, beta=3.0, temperature=0.2)

    def ours(*scores):
        return compound.two_lists(Lists(*scores), RIGHT, **options)

    assert_equal_losses(ours, partial(plain, **options), *numbers(seed))


def test_a_passage_earns_what_its_answer_earns_and_only_the_chosen_one_teaches_the_answer():
    questions, options = (x.clone().requires_grad_() for x in numbers())
    with torch.no_grad():
        options[1] = torch.tensor([-9.0, -0.1, -9.0, -9.0])  # behind passage 1 the right answer is near certain
    loss = compound.two_lists(Lists(questions, options), RIGHT, beta=3.0, temperature=0.1)
    by_question, by_option = torch.autograd.grad(loss, (questions, options))
    assert by_question.argmin() == 1  # its likelihood is pushed up
    others = [k for k in range(3) if k != int(questions.argmax())]
    assert by_option[others].abs().max() == 0
    assert by_option[int(questions.argmax())].argmin() == 1


def test_an_unknown_arm_is_refused():
    with pytest.raises(ValueError, match=r"arm must be one of .*, got 'reader'"):
        compound.two_lists(Lists(*numbers()), RIGHT, beta=1.0, temperature=0.1, arm="reader")


def test_measures_follow_the_retrievers_choice():
    asked = [compound.Case(question, {}, None) for question in quiz(2)]  # options 0 and 1 are right; gold is passage 0, then 1
    options = torch.tensor([[0.0, -1.0, -1.0, -1.0], [-1.0, 0.0, -1.0, -1.0]])
    said = [Lists(torch.tensor([-5.0, -4.0]), options)] * 2
    assert compound.measured(asked, said) == {"right": 0.5, "gold passage": 0.5, "right behind gold": 1.0}
    assert compound.measured(asked, said, first=True) == {"right": 0.5, "gold passage": 0.5, "right behind gold": 1.0}
    said[1] = Lists(torch.tensor([-3.0, -4.0]), options)
    assert compound.measured(asked, said) == {"right": 0.0, "gold passage": 0.0, "right behind gold": 1.0}


def test_training_both_lists_learns_both_and_starts_anew_each_time():
    recipe = compound.Compound(asked=quiz(4), load=tiny, epochs=30, batch_size=2, learning_rate=5e-3)
    policy, cases = recipe.prepared

    def loss():
        with torch.no_grad():
            return sum(recipe.loss(policy, one, arm="answerer").item() for one in cases)

    before = loss()
    recipe.train(cases, 0, arm="both")
    assert loss() < 0.5 * before
    assert compound.measured(cases, [compound.read(policy, one.question, one.rows) for one in cases])["right"] >= 0.75
    recipe.epochs = 0
    recipe.train(cases, 0, arm="both")
    assert loss() == before


def test_arms_without_an_epoch_are_the_start_and_tied_lists_are_counted():
    result = compound.Compound(asked=quiz(8), load=tiny, epochs=0).run((0, 1))
    measures = {
        arm: [[row[name] for name in ("right", "gold passage", "right behind gold")] for row in rows]
        for arm, rows in report.by_arm(result["rows"]).items()
    }
    assert list(measures) == [row["system"] for row in result["table"]]
    for arm, found in measures.items():
        if arm != "BM25's first, start":
            assert found == measures["start"]
    for row in result["rows"][:2]:
        assert row["lists"] == 4
        assert 0 <= row["tied right"] <= row["tied"] <= 4
    figure = pytest.importorskip("matplotlib.figure").Figure()
    compound.Compound().plot(figure, result["rows"])
    assert [len(axes.patches) for axes in figure.axes] == [5, 5]
