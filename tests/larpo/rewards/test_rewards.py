"""Rewards: how several are summed, what a failing one does, and what a reward model is shown."""

import logging
import sys
import types

import pytest
import torch

from larpo import rewards
from larpo.rewards import from_name, score, sequence_classifier

PROMPTS, COMPLETIONS = ["p", "p", "q"], ["a", "bb", "ccc"]


pytestmark = pytest.mark.usefixtures("one_thread")


def length(prompts, completions, **columns):
    return [float(len(text)) for text in completions]


def gives(*values):
    def constant(prompts, completions, **columns):
        return list(values)

    return constant


def fails(prompts, completions, **columns):
    raise KeyError("answer")


# --- the weighted sum


def test_rewards_are_summed_by_weight():
    assert score(length, None, PROMPTS, COMPLETIONS) == [1.0, 2.0, 3.0]
    assert score([length, gives(1, 0, 1)], [0.5, -2.0], PROMPTS, COMPLETIONS) == [-1.5, 1.0, -0.5]


def test_a_reward_without_an_opinion_leaves_the_sum_to_the_others():
    partly = gives(None, 5.0, None)
    assert score([partly, length], None, PROMPTS, COMPLETIONS) == [1.0, 7.0, 3.0]
    assert score([partly], None, PROMPTS, COMPLETIONS) == [None, 5.0, None]
    assert score([partly, gives(None, None, 0.0)], None, PROMPTS, COMPLETIONS) == [None, 5.0, 0.0]


def test_numbers_of_numpy_and_torch_are_numbers():
    import numpy

    for values in (
        numpy.array([1.0, 2.0, 3.0]),
        torch.tensor([1.0, 2.0, 3.0]),
        [numpy.float32(1), True + 1, torch.tensor(3.0)],
    ):
        out = score([lambda prompts, completions, values=values, **columns: values], None, PROMPTS, COMPLETIONS)
        assert out == [1.0, 2.0, 3.0] and all(type(value) is float for value in out)


def test_prompts_completions_and_columns_reach_every_reward_by_name():
    seen = []

    def reward(*, prompts, completions, **columns):
        seen.append((prompts, completions, columns))
        return [0.0] * 3

    score([reward, reward], None, PROMPTS, COMPLETIONS, answer=[1, 2, 3], step=7)
    assert seen == [(PROMPTS, COMPLETIONS, {"answer": [1, 2, 3], "step": 7})] * 2


def test_a_reward_that_changes_its_arguments_changes_those_of_no_other():
    import numpy

    messages = [[{"role": "user", "content": text}] for text in PROMPTS]
    lists = {"completion_ids": [[3, 1], [2], [9, 8]], "facts": [{"a": [1]}, {"a": [2]}, {"a": [3]}], "where": [(1, [2])] * 3}
    given = lists | {"level": numpy.arange(3.0), "embedding": torch.zeros(3), "shared": {"words": {"x"}}}
    seen = []

    def careless(prompts, completions, completion_ids, facts, where, level, embedding, shared):
        seen.append(repr((prompts, completions, completion_ids, facts, where, level, embedding, shared)))
        scores = [float(len(text)) for text in completions]
        prompts[0][0]["content"] = "another"
        completions.sort(reverse=True)
        completion_ids[0].clear()
        facts[1]["a"].append(5)
        where[2][1].append(7)
        level += 1
        embedding += 1
        shared["words"].add("y")
        return scores

    before = repr((messages, COMPLETIONS, *given.values()))
    assert score([careless, careless, length], None, messages, COMPLETIONS, **given) == [3.0, 6.0, 9.0]
    assert seen == [before] * 2 and repr((messages, COMPLETIONS, *given.values())) == before


def test_what_is_no_container_is_handed_on_as_it_is():
    judge = object()

    def reward(prompts, completions, judge_model):
        return [float(judge_model is judge)] * 3

    assert score(reward, None, PROMPTS, COMPLETIONS, judge_model=judge) == [1.0] * 3


@pytest.mark.parametrize(
    ("returned", "shown"),
    [
        ({0.1: "a", 0.2: "b", 0.3: "c"}, "dict"),
        ({0.1: "a", 0.2: "b", 0.3: "c"}.keys(), "dict_keys"),
        ({"a": 0.1, "b": 0.2, "c": 0.3}.values(), "dict_values"),
        ({0.1, 0.2, 0.3}, "set"),
        (frozenset({0.1, 0.2, 0.3}), "frozenset"),
        (b"abc", "bytes"),
        ((x for x in (1.0, 2.0, 3.0)), "generator"),
        (torch.zeros(3, 1), r"Tensor of shape \(3, 1\)"),
        (torch.tensor(1.0), r"Tensor of shape \(\)"),
    ],
)
def test_only_what_has_an_order_is_taken_for_scores(returned, shown):
    with pytest.raises(ValueError, match=f"reward 'reward' returned {shown}; expected a list of floats or None"):

        def reward(prompts, completions):
            return returned

        score(reward, None, PROMPTS, COMPLETIONS)


@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        (fails, RuntimeError, "reward 'fails' raised KeyError: 'answer'"),
        (gives(1.0, 2.0), ValueError, "reward 'constant' returned 2 values; expected one for each of the 3 completions"),
        (gives("1.5", 1, 2), ValueError, "reward 'constant' returned a value that is no finite number: .*'1.5'"),
        (gives("good", 1, 2), ValueError, "reward 'constant' returned a value that is no finite number: .*'good'"),
        (gives(1, float("nan"), 2), ValueError, "reward 'constant' returned a value that is no finite number: got nan, where"),
        (gives(1, -float("inf"), 2), ValueError, "reward 'constant' returned a value that is no finite number: got -inf"),
        (lambda prompts, completions: None, ValueError, "returned NoneType; expected a list of floats or None"),
        (lambda prompts, completions: "abc", ValueError, "returned str; expected a list"),
    ],
)
def test_a_bad_reward_is_named_or_skipped_and_counted(bad, error, message, caplog):
    with pytest.raises(error, match=message):
        score([length, bad], None, PROMPTS, COMPLETIONS)
    with caplog.at_level(logging.WARNING, logger="larpo.rewards"):
        assert score([length, bad], None, PROMPTS, COMPLETIONS, on_error="skip") == [1.0, 2.0, 3.0]
    (warning,) = caplog.messages
    assert warning.endswith("skipped for 3 completions")
    assert score(bad, None, PROMPTS, COMPLETIONS, on_error="skip") == [None] * 3


def test_the_cause_of_a_failure_is_kept():
    with pytest.raises(RuntimeError) as caught:
        score(fails, None, PROMPTS, COMPLETIONS)
    assert isinstance(caught.value.__cause__, KeyError)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: score([], None, PROMPTS, COMPLETIONS), "rewards is empty"),
        (lambda: score([length], [1.0, 2.0], PROMPTS, COMPLETIONS), "weights has 2 values; expected one for each of the 1"),
        (lambda: score(length, None, PROMPTS[:2], COMPLETIONS), "prompts has 2 values; expected .* the 3 completions"),
        (lambda: score(length, None, PROMPTS, COMPLETIONS, answer=[1]), "answer has 1 values"),
        (lambda: score(length, None, PROMPTS, COMPLETIONS, on_error="ignore"), "on_error must be"),
    ],
)
def test_errors_name_the_argument(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_nothing_to_score_asks_no_reward():
    assert score(fails, None, [], []) == []


def test_text_of_messages_with_parts_and_without_content():
    parts = [{"type": "text", "text": "a"}, {"type": "image"}, {"type": "text", "text": "b"}]
    assert rewards.text_of([{"role": "assistant", "content": parts}, {"role": "tool", "content": None}]) == "ab\n"
    assert rewards.text_of("a") == "a"


# --- by name


def test_a_users_function_or_class_is_found_by_name(monkeypatch):
    class Loaded:
        def __call__(self, **columns):
            return [1.0]

    module = types.ModuleType("their_rewards")
    module.length, module.Loaded, module.number = length, Loaded, 3
    monkeypatch.setitem(sys.modules, "their_rewards", module)
    assert from_name("their_rewards:length") is length
    assert isinstance(from_name("their_rewards:Loaded"), Loaded)
    for name, message in {
        "their_rewards:missing": "can't be loaded: AttributeError",
        "no_such_package:f": "can't be loaded: ModuleNotFoundError",
        "their_rewards:number": "is of type int; expected a function or a class",
        "sentiment": r"is neither one of \['imdb_sentiment'\] nor of the form 'package.module:function'",
    }.items():
        with pytest.raises(ValueError, match=f"reward '{name}' {message}"):
            from_name(name)


# --- a reward model

from tests.helpers.tiny_tokenizer import WORDS, tiny_llama, tiny_tokenizer


def classifier(labels=1, **config):
    return tiny_llama("LlamaForSequenceClassification", initializer_range=0.5, num_labels=labels, **config)


def by_hand(model, words, label=0):
    with torch.no_grad():
        return model(input_ids=torch.tensor([[WORDS.index(word) for word in words.split()]])).logits[0, label].item()


@pytest.mark.parametrize("batch_size", [1, 2, 16])
def test_a_reward_model_scores_prompt_and_completion_in_order_whatever_the_batches(batch_size):
    model = classifier().train()
    reward = sequence_classifier(model, tiny_tokenizer(), batch_size=batch_size)
    scores = reward(prompts=["a b c", "a", "d e"], completions=[" good film .", " bad", " f f f f"])
    texts = ["a b c good film .", "a bad", "d e f f f f"]
    assert scores == pytest.approx([by_hand(model, text) for text in texts], abs=1e-5)
    assert len(set(scores)) == 3


def test_messages_go_through_the_chat_template():
    model, prompt = classifier(), [{"role": "user", "content": "a b"}]
    reward = sequence_classifier(model, tiny_tokenizer(bos=True))
    expected = by_hand(model, "<user> a b <eos> <assistant> good <eos>")  # no second <bos>
    for completion in ("good", [{"role": "assistant", "content": "good"}]):
        assert reward(prompts=[prompt], completions=[completion]) == pytest.approx([expected], abs=1e-5)
    assert reward(prompts=["a"], completions=[" good"]) == pytest.approx([by_hand(model, "<bos> a good")], abs=1e-5)


def test_a_long_text_loses_its_beginning_not_the_completion():
    model, tokenizer = classifier(), tiny_tokenizer()
    reward = sequence_classifier(model, tokenizer, max_length=3)
    assert reward(prompts=["a b c d"], completions=[" good film"]) == pytest.approx([by_hand(model, "d good film")], abs=1e-5)
    assert tokenizer.truncation_side == "right"  # the caller's


def test_one_of_several_labels_is_the_reward():
    model = classifier(3, id2label={0: "NEG", 1: "NEUTRAL", 2: "POS"}, label2id={"NEG": 0, "NEUTRAL": 1, "POS": 2})
    for label, index in (("POS", 2), (1, 1)):
        reward = sequence_classifier(model, tiny_tokenizer(), label=label)
        assert reward(prompts=["a"], completions=[" b"]) == pytest.approx([by_hand(model, "a b", index)], abs=1e-5)
    for label, message in ((None, "the model has 3 labels; label must be one of"), ("GOOD", "got 'GOOD'"), (3, "got 3")):
        with pytest.raises(ValueError, match=message):
            sequence_classifier(model, tiny_tokenizer(), label=label)


def test_a_model_by_name_with_its_tokenizer(tmp_path):
    model = classifier()
    model.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    reward = sequence_classifier(str(tmp_path), dtype=torch.float32)
    assert reward(prompts=["a"], completions=[" b"]) == pytest.approx([by_hand(model, "a b")], abs=1e-5)
    with pytest.raises(ValueError, match=r"\['dtype'\] only apply to a model given by name"):
        sequence_classifier(model, tiny_tokenizer(), dtype=torch.float32)


def test_a_reward_model_with_other_weights_is_another_judge():
    model = classifier(2)
    same, other = (sequence_classifier(model, tiny_tokenizer(), label=label, batch_size=4) for label in (1, 0))
    before = rewards.Judge(reward=same).identity
    assert before == rewards.Judge(reward=sequence_classifier(model, tiny_tokenizer(), label=1)).identity
    assert before != rewards.Judge(reward=other).identity
    with torch.no_grad():
        model.score.weight[0, 0] += 1
    assert before != rewards.Judge(reward=sequence_classifier(model, tiny_tokenizer(), label=1)).identity


def test_of_a_reward_model_whose_weights_are_elsewhere_nothing_is_remembered():
    there = rewards.Judge(reward=sequence_classifier(classifier(2).to("meta"), tiny_tokenizer(), label=1))
    assert there.identity is None


def test_padding_needs_a_pad_token_and_the_model_learns_of_it():
    model = classifier()
    model.config.pad_token_id = None
    with pytest.raises(ValueError, match="tokenizer has no pad token"):
        sequence_classifier(model, tiny_tokenizer(pad=None))
    reward = sequence_classifier(model, tiny_tokenizer())
    scores = reward(prompts=["a b", "a"], completions=[" c d", " b"])
    assert scores == pytest.approx([by_hand(model, "a b c d"), by_hand(model, "a b")], abs=1e-5)


def test_a_reward_model_is_a_reward_among_others():
    reward = sequence_classifier(classifier(), tiny_tokenizer())
    alone = score(reward, None, ["a"], [" b"])
    assert score([reward, gives(1.0)], [2.0, 1.0], ["a"], [" b"]) == pytest.approx([2 * alone[0] + 1.0])
