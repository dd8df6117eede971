"""Data sets and tokenizers as users have them, and which lists are trained and evaluated on."""

import math

import pytest
from datasets import Dataset

from larpo.trainer import LarPOTrainer
from tests.helpers import tiny
from tests.helpers.trainers import config, moved, trainer


def test_only_some_candidates_of_a_list_can_be_trained_on(tmp_path):
    data = Dataset.from_list(tiny.lists(4, m=6))
    t = trainer(tmp_path, data, list_top=1, list_bottom=2)
    for row, found in zip(data, t.train_dataset, strict=True):
        ordered = sorted(row["scores"], reverse=True)
        assert found["scores"] == [ordered[0], ordered[-2], ordered[-1]]
        assert len(found["completion_ids"]) == 3


def test_a_batch_in_which_nothing_can_be_learned_still_steps(tmp_path):
    data = Dataset.from_list([{"prompt": "the cat", "completions": [" sat"], "scores": [1.0]} for _ in range(2)])
    t = trainer(tmp_path, data)
    t.train()
    assert t.state.log_history[0]["loss"] == 0.0


def test_the_callers_data_and_config_stay_as_they_are(tmp_path, data):
    before = data.to_list()
    args = config(tmp_path)
    described = args.to_json_string()
    tokenizer = tiny.tokenizer()
    LarPOTrainer(tiny.causal_lm(), None, args, train_dataset=data, processing_class=tokenizer)
    assert data.to_list() == before
    assert args.to_json_string() == described
    assert tokenizer.padding_side == "right"


@pytest.mark.parametrize("options", [dict(), dict(precompute_ref_log_probs=True), dict(reference_free=True)], ids=str)
def test_data_as_it_comes_can_be_evaluated_and_predicted(tmp_path, data, options):
    t = trainer(tmp_path, data, moved(tiny.causal_lm()), eval_dataset=data, **options)
    expected = t.evaluate()
    for found in (t.evaluate(data), t.evaluate(data.to_list()), t.evaluate(t.eval_dataset)):
        assert {k: v for k, v in found.items() if "ndcg" in k or "loss" in k} == {
            k: v for k, v in expected.items() if "ndcg" in k or "loss" in k
        }
    assert t.evaluate({"one": data, "two": data})["eval_two_loss"] == expected["eval_loss"]
    assert t.predict(data).metrics["test_loss"] == expected["eval_loss"]


def test_one_list_with_an_order_is_enough(tmp_path, unwarned):
    rows = tiny.lists(3)
    trainer(tmp_path, Dataset.from_list([rows[0], rows[1] | {"scores": [0.5] * 4}, rows[2] | {"scores": [0.5] * 4}]))


def test_lists_of_one_length_can_come_together(tmp_path):
    rows = tiny.lists(64, m=None, seed=3)
    data = Dataset.from_list(rows)
    t = trainer(tmp_path, data, eval_dataset=data, max_steps=2, train_sampling_strategy="group_by_length")
    t.train()
    assert math.isfinite(t.evaluate()["eval_loss"]) and math.isfinite(t.evaluate(data)["eval_loss"])
    lengths = [sum(len(row["prompt_ids"]) + len(c) for c in row["completion_ids"]) for row in t.train_dataset]
    assert t.train_dataset["length"][:] == lengths
    order = list(t._get_train_sampler())
    batches = [[lengths[i] for i in order[a : a + 2]] for a in range(0, 64, 2)]
    apart = sum(max(batch) - min(batch) for batch in batches)
    at_random = sum(abs(a - b) for a in lengths for b in lengths) / 64 / 63 * 32
    assert apart < at_random / 2


class Processor:
    """As transformers.ProcessorMixin: text goes to the tokenizer in it, the rest elsewhere."""

    def __init__(self, tokenizer, chat_template=None):
        self.tokenizer, self.chat_template = tokenizer, chat_template

    def __call__(self, images=None, text=None):
        raise AssertionError("text alone goes to the tokenizer")


TEMPLATE = (
    "{% for m in messages %}{{ m.role }} {{ m.content }}</s>{% endfor %}{% if add_generation_prompt %}assistant {% endif %}"
)


def test_of_a_processor_the_tokenizer_is_taken(tmp_path, data):
    found = []
    for processing_class in (tiny.tokenizer(), Processor(tiny.tokenizer())):
        t = trainer(tmp_path, data, processing_class=processing_class)
        found.append((t.train_dataset.to_list(), t.evaluate(data)["eval_loss"]))
    assert found[0] == found[1] and t.processing_class is processing_class


def test_a_processor_brings_its_chat_template():
    from larpo.data.tokenization import tokenize_row

    prompt, answer = {"role": "user", "content": "a cat"}, {"role": "assistant", "content": "the dog"}
    row = {"prompt": [prompt], "completions": [[answer]], "scores": [1.0]}
    assert tokenize_row(row, Processor(tiny.tokenizer(), TEMPLATE)) == tokenize_row(row, tiny.tokenizer(TEMPLATE))
    assert tiny.tokenizer().chat_template is None


def test_what_tokenises_nothing_is_refused(tmp_path, data):
    for processing_class in ("a-name", Processor(None)):
        with pytest.raises(TypeError, match=r"the tokenizer must be one of transformers, or a processor.*got (str|Processor)"):
            trainer(tmp_path, data, processing_class=processing_class)


def test_splits_are_evaluated_each_and_not_trained_on_together(tmp_path, data):
    from datasets import DatasetDict

    splits = DatasetDict(train=data, test=data.select(range(2)))
    with pytest.raises(TypeError, match="DatasetDict with the splits train, test: choose one"):
        trainer(tmp_path, splits)
    found = trainer(tmp_path, data, eval_dataset=splits).evaluate()
    assert found["eval_test_loss"] != found["eval_train_loss"]


def test_an_evaluation_is_of_every_list_when_training_drops_its_last_batch(tmp_path, data):
    t = trainer(tmp_path, data, eval_dataset=data, dataloader_drop_last=True, per_device_eval_batch_size=4)
    expected = trainer(tmp_path, data, eval_dataset=data, per_device_eval_batch_size=4).evaluate()["eval_loss"]
    for found in (t.evaluate(), t.evaluate(data), t.predict(data).metrics):
        assert next(value for name, value in found.items() if name.endswith("_loss")) == expected
    assert len(t.get_train_dataloader()) == 3 and t.args.dataloader_drop_last


def test_workers_that_persist_evaluate_the_data_they_are_given(tmp_path, data):
    t = trainer(tmp_path, data, eval_dataset=data, dataloader_persistent_workers=True, dataloader_num_workers=1)
    whole, part = t.evaluate()["eval_loss"], t.evaluate(data.select(range(2)))["eval_loss"]
    assert part != whole
    assert t.evaluate(data.select([3]))["eval_loss"] not in (whole, part) and t.evaluate()["eval_loss"] == whole
    assert t.get_eval_dataloader().persistent_workers
    assert not t.get_eval_dataloader(data).persistent_workers  # dropped after one use, it would wait 5 s for each worker
