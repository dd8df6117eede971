"""Samplers: which tokens a completion has, what it depends on, and what sampling leaves untouched."""

import sys
import types
from collections import Counter

import pytest
import torch

from larpo.data import endings
from larpo.sampling import Distinct, Sampled, TransformersSampler, VLLMSampler, prompt_tokens, temperature_at
from tests.helpers.tiny_tokenizer import WORDS, tiny_llama, tiny_tokenizer

EOS = WORDS.index("<eos>")
PROMPTS = ["a", "b c d e", "c d", "film"]


pytestmark = pytest.mark.usefixtures("one_thread")


def tiny_model(spread=1.0, dropout=0.0):
    return tiny_llama(initializer_range=spread, attention_dropout=dropout)


def sampler(max_new_tokens=6, model=None, **options):
    return TransformersSampler(model or tiny_model(spread=0.2), tiny_tokenizer(), max_new_tokens, **options)


def forced_model(favourites):
    """A model whose most likely token at every step is the next of `favourites`, counted from where the prompt ends."""
    model = tiny_model()
    step = iter(favourites)

    def favour(module, inputs, output):
        output.logits[:, -1] = -100.0
        output.logits[:, -1, next(step)] = 100.0
        return output

    model.register_forward_hook(favour)
    return model


# --- tokens


def test_a_completion_ends_with_its_end_token_and_nothing_follows():
    a, b = WORDS.index("a"), WORDS.index("b")
    model = forced_model([a, b, EOS, a, a])
    (one,), (two,) = sampler(5, model)(["a", "c d"], 1, 1.0, seed=0)
    assert one.token_ids == two.token_ids == (a, b, EOS)
    assert one.finished
    assert one.text == "a b"


def test_the_end_token_as_the_last_allowed_token_still_counts_as_finished():
    a = WORDS.index("a")
    ((one,),) = sampler(2, forced_model([a, EOS]))(["a"], 1, 1.0, seed=0)
    assert one.token_ids == (a, EOS) and one.finished


def test_a_completion_cut_off_has_no_end_token_and_is_not_finished():
    a = WORDS.index("a")
    ((one,),) = sampler(3, forced_model([a, a, a]))(["a"], 1, 1.0, seed=0)
    assert one.token_ids == (a, a, a) and not one.finished


def test_padding_tokens_that_the_model_samples_are_kept():
    a, pad = WORDS.index("a"), WORDS.index("<pad>")
    ((one,),) = sampler(3, forced_model([a, pad, a]))(["a"], 1, 1.0, seed=0)
    assert one.token_ids == (a, pad, a)


@pytest.mark.parametrize("eos_token_ids", [(), (WORDS.index("f"),), (EOS, WORDS.index("f"))])
def test_what_ends_a_completion_can_be_chosen(eos_token_ids):
    f, a = WORDS.index("f"), WORDS.index("a")
    ((one,),) = sampler(4, forced_model([a, f, a, a]), eos_token_ids=eos_token_ids)(["a"], 1, 1.0, seed=0)
    assert one.token_ids == ((a, f) if f in eos_token_ids else (a, f, a, a))


def test_several_end_tokens_of_the_model_are_all_heeded():
    model = tiny_model()
    model.generation_config.eos_token_id = [EOS, 7]
    assert sampler(model=model).ending.token_ids == (EOS, 7)
    model.generation_config.eos_token_id = None
    assert sampler(model=model).ending.token_ids == (EOS,)  # the tokenizer's


def closing_with(token, eos="<eos>"):
    """A tokenizer whose chat template closes turns with another special token than EOS."""
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = eos
    tokenizer.add_special_tokens({"additional_special_tokens": [token]})
    tokenizer.chat_template = tokenizer.chat_template.replace("<eos>", token)
    return tokenizer


def test_a_completion_ends_where_the_chat_template_closes_the_turn():
    a, b, f = (WORDS.index(word) for word in "abf")
    sample = TransformersSampler(forced_model([a, b, f, a]), closing_with("f"), 4)  # of which the model's settings know nothing
    ((one,),) = sample([[{"role": "user", "content": "a"}]], 1, 1.0, seed=0)
    assert one.token_ids == (a, b, f) and one.finished and one.text == "a b"


def test_training_and_sampling_know_one_end():
    from larpo.data.tokenization import tokenize_row

    row = {"prompt": [{"role": "user", "content": "a"}], "completions": ["b c", "d"], "scores": [1.0, 0.0]}
    tokenizers = [closing_with("f"), closing_with("<bos>"), tiny_tokenizer()]
    no_end = tiny_tokenizer()
    no_end.chat_template = no_end.chat_template.replace(" <eos>", "")  # EOS is appended
    for tokenizer in (*tokenizers, no_end):
        ending = endings.ending_of(tokenizer)
        for row_of in (row, {**row, "prompt": "a"}):
            for ids in tokenize_row(row_of, tokenizer)["completion_ids"]:
                assert ids[-1] in ending.token_ids and not set(ids[:-1]) & set(ending.token_ids)


def test_a_template_that_refuses_short_conversations_ends_nothing():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('no system message') }}"
    assert endings.ending_of(tokenizer).token_ids == (EOS,)


# --- strings that end a completion


def test_a_string_ends_a_completion_in_the_token_that_completes_it():
    a, b, c = (WORDS.index(word) for word in "abc")
    ((one,),) = sampler(5, forced_model([c, a, b, a, a]), stop=["a b"])(["d"], 1, 1.0, seed=0)
    assert one.token_ids == (c, a, b) and one.finished and one.text == "c "


def test_a_string_that_began_in_the_prompt_ends_nothing():
    b = WORDS.index("b")
    ((one,),) = sampler(2, forced_model([b, b]), stop=["a b"])(["a"], 1, 1.0, seed=0)
    assert one.token_ids == (b, b) and not one.finished


def test_rows_of_a_batch_end_by_themselves_at_tokens_or_strings():
    model = tiny_model(spread=0.3)
    plain = sampler(8, model)(PROMPTS, 3, 1.0, seed=2)
    stopped = sampler(8, model, stop=["good", "film"])(PROMPTS, 3, 1.0, seed=2)
    ends = {EOS, WORDS.index("good"), WORDS.index("film")}
    lengths = set()
    for one in (one for found in stopped for one in found):
        at = next((i for i, token in enumerate(one.token_ids) if token in ends), None)
        assert one.finished is (at is not None) and (at is None or at == len(one.token_ids) - 1)
        assert "good" not in one.text and "film" not in one.text
        lengths.add(len(one.token_ids))
    assert len(lengths) > 2
    assert plain != stopped


def test_nothing_ends_before_the_fewest_tokens_that_are_asked_for():
    a, b = WORDS.index("a"), WORDS.index("b")
    ((one,),) = sampler(5, forced_model([a, b, a, b, a]), stop=["a b"], min_new_tokens=2)(["d"], 1, 1.0, seed=0)
    assert one.token_ids == (a, b, a, b) and one.text == "a b "
    drawn = sampler(6, min_new_tokens=3)(PROMPTS, 20, 1.0, seed=0)
    lengths = [len(one.token_ids) for found in drawn for one in found]
    assert min(lengths) >= 4 and any(one.token_ids[-1] == EOS for found in drawn for one in found)


def test_tokens_are_named_and_must_be_there():
    assert endings.token_ids_of(tiny_tokenizer(), ["<eos>", "f"]) == (EOS, WORDS.index("f"))
    with pytest.raises(ValueError, match=r"eos_token: the tokenizer has no token '<\|im_end\|>'"):
        endings.token_ids_of(tiny_tokenizer(), "<|im_end|>")


def test_prompt_tokens_are_the_prompts_own_with_special_tokens_or_the_template():
    def names(ids):
        return [WORDS[i] for i in ids]

    assert names(prompt_tokens(tiny_tokenizer(bos=True), "a b")) == ["<bos>", "a", "b"]
    messages = [{"role": "user", "content": "a b"}]
    assert names(prompt_tokens(tiny_tokenizer(bos=True), messages)) == ["<user>", "a", "b", "<eos>", "<assistant>"]
    ((one,),) = sampler()([messages], 1, 1.0, seed=0)
    assert names(one.prompt_ids) == ["<user>", "a", "b", "<eos>", "<assistant>"]


def test_a_prompt_without_tokens_is_an_error():
    with pytest.raises(ValueError, match="prompt '' has no tokens"):
        sampler()([""], 1, 1.0, seed=0)


# --- what completions depend on


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_every_prompt_gets_its_own_k_completions_in_order_whatever_the_batches(batch_size):
    model = tiny_model(spread=1.0)
    lists = sampler(4, model, batch_size=batch_size)(PROMPTS, 1, 0.0, seed=0)
    for prompt, (completion,) in zip(PROMPTS, lists, strict=True):
        ids = torch.tensor([prompt_tokens(tiny_tokenizer(), prompt)])
        for token in completion.token_ids:  # greedy decoding by hand, without padding or a cache
            logits = model(ids).logits[0, -1]
            assert token == int(logits.argmax())
            ids = torch.cat([ids, torch.tensor([[token]])], dim=1)
    assert len({completion.token_ids for (completion,) in lists}) > 1
    assert [len(one) for one in sampler(4, model, batch_size=batch_size)(PROMPTS, 3, 1.0, seed=0)] == [3] * 4


def test_the_same_seed_gives_the_same_completions_and_another_seed_others():
    sample = sampler()
    first = sample(PROMPTS, 4, 1.0, seed=3)
    torch.rand(17)
    assert sample(PROMPTS, 4, 1.0, seed=3) == first
    assert sample(PROMPTS, 4, 1.0, seed=4) != first


def test_completions_follow_the_models_distribution_at_the_temperature():
    model, temperature, k = tiny_model(spread=0.3), 0.7, 4000
    model.generation_config.repetition_penalty = 5.0  # and other settings that must not leak in
    model.generation_config.top_k = 1
    (one,) = sampler(1, model, batch_size=k)(["a b c"], k, temperature, seed=0)
    with torch.no_grad():
        expected = (model(torch.tensor([prompt_tokens(tiny_tokenizer(), "a b c")])).logits[0, -1] / temperature).softmax(-1)
    counts = Counter(completion.token_ids[0] for completion in one)
    for token, probability in enumerate(expected.tolist()):
        spread = (probability * (1 - probability) / k) ** 0.5
        assert abs(counts[token] / k - probability) < 4.5 * spread
    assert expected.max() - expected.min() > 0.05  # a uniform distribution would show nothing


def test_top_k_and_top_p_cut_off_what_is_unlikely():
    model = tiny_model(spread=0.2)
    with torch.no_grad():
        likely = model(torch.tensor([[WORDS.index("a")]])).logits[0, -1].argsort(descending=True).tolist()
    for cut in ({"top_k": 2}, {"top_p": 1e-6}):
        (one,) = sampler(1, model, **cut)(["a"], 50, 1.0, seed=0)
        assert {completion.token_ids[0] for completion in one} == set(likely[: cut.get("top_k", 1)])


@pytest.mark.parametrize("adapter", [False, True])
def test_a_prompt_of_several_completions_is_computed_once_and_gives_the_same_ones(monkeypatch, adapter):
    model, tokens = tiny_model(spread=0.3), []
    model.model.register_forward_pre_hook(lambda _, args, given: tokens.append(given["input_ids"].numel()), with_kwargs=True)
    if adapter:
        import peft

        model = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    shared = sampler(1, model)(PROMPTS, 5, 1.0, seed=0)
    assert tokens == [4 * 3, 4 * 5]  # four prompts padded to four tokens, without their last; then that one in every row
    tokens.clear()
    monkeypatch.setattr("larpo.sampling.prompts_once", lambda *arguments: {})
    assert sampler(1, model)(PROMPTS, 5, 1.0, seed=0) == shared and tokens == [4 * 4 * 5]


@pytest.mark.parametrize("model_type", ["gpt2", "mistral", "mamba"])
def test_models_with_other_caches_or_positions_give_the_same_completions_from_prompts_computed_once(monkeypatch, model_type):
    from tests.helpers import tiny

    model = tiny.causal_lm(model_type, spread=2.0, **({"sliding_window": 3} if model_type == "mistral" else {}))
    shared = sampler(4, model)(PROMPTS, 3, 1.0, seed=0)
    monkeypatch.setattr("larpo.sampling.prompts_once", lambda *arguments: {})
    assert sampler(4, model)(PROMPTS, 3, 1.0, seed=0) == shared


# --- what sampling leaves untouched


def test_random_state_modes_and_settings_are_as_before():
    model = tiny_model(spread=0.2, dropout=0.5).train()
    model.model.layers[0].eval()  # as if frozen
    modes = [module.training for module in model.modules()]
    config, settings = model.generation_config, model.generation_config.to_dict()
    state = torch.get_rng_state()
    sampler(model=model)(PROMPTS, 2, 1.3, seed=0)
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == modes
    assert model.generation_config is config and config.to_dict() == settings
    assert all(parameter.grad is None for parameter in model.parameters())


def test_modes_and_settings_come_back_after_a_failure():
    model = tiny_model().train()
    config = model.generation_config

    def fail(*args):
        raise MemoryError

    model.register_forward_hook(fail)
    with pytest.raises(MemoryError):
        sampler(model=model)(PROMPTS, 1, 1.0, seed=0)
    assert model.training and model.generation_config is config


def test_dropout_is_off_while_sampling():
    model = tiny_model(spread=0.5, dropout=0.9)
    expected = sampler(model=model)(PROMPTS, 2, 1.0, seed=0)
    assert sampler(model=model.train())(PROMPTS, 2, 1.0, seed=0) == expected


def test_a_model_with_adapters_samples_from_the_adapted_policy_and_keeps_its_settings():
    import peft

    base = tiny_model()
    plain = sampler(model=base)(PROMPTS, 1, 0.0, seed=0)
    config = base.generation_config
    adapted = peft.get_peft_model(base, peft.LoraConfig(target_modules=["q_proj", "down_proj"], init_lora_weights=False))
    assert sampler(model=adapted)(PROMPTS, 1, 0.0, seed=0) != plain
    assert adapted.generation_config is config and base.generation_config is config
    with adapted.disable_adapter():
        assert sampler(model=adapted)(PROMPTS, 1, 0.0, seed=0) == plain


# --- arguments


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: sampler(0), "max_new_tokens"),
        (lambda: sampler(batch_size=0), "batch_size"),
        (lambda: sampler(top_p=0), "top_p"),
        (lambda: sampler(top_k=-1), "top_k"),
        (lambda: sampler(4, min_new_tokens=5), "min_new_tokens must be from 0 to max_new_tokens=4, got 5"),
        (lambda: sampler(stop="a"), "stop must be strings that are not empty, got 'a'"),
        (lambda: sampler(stop=[""]), "stop must be strings"),
        (lambda: sampler()(["a"], 0, 1.0, seed=0), "k must be at least 1, got 0"),
        (lambda: sampler()(["a"], 1, -0.1, seed=0), "temperature must be at least 0, got -0.1"),
        (lambda: sampler()(["a"], 2, 0, seed=0), "temperature 0 is greedy.*expected k = 1"),
        (lambda: Distinct(sampler(), tries=0), "tries must be at least 1"),
        (lambda: temperature_at([1.0, 0.9], 0, 3), "temperature schedule must be a number, 3 numbers"),
        (lambda: temperature_at(("cosine", 1.0, 0.9), 0, 3), "temperature schedule"),
        (lambda: temperature_at(1.0, 3, 3), r"iteration must be in \[0, 3\), got 3"),
        (lambda: temperature_at([1.0, -1.0], 1, 2), "at least 0, got -1.0 in iteration 1"),
    ],
)
def test_errors_name_the_argument(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [(0.8, [0.8, 0.8, 0.8]), ([1.0, 0.9, 0.5], [1.0, 0.9, 0.5]), (["linear", 1.0, 0.5], [1.0, 0.75, 0.5])],
)
def test_temperature_schedules(schedule, expected):
    assert [temperature_at(schedule, i, 3) for i in range(3)] == pytest.approx(expected)
    assert temperature_at(("linear", 1.0, 0.5), 0, 1) == 1.0


# --- distinct completions


class Numbered:
    """A sampler whose completions of a prompt are drawn from `choices` of them, and that notes its calls."""

    def __init__(self, choices):
        self.choices, self.calls = choices, []

    def __call__(self, prompts, k, temperature, *, seed):
        self.calls.append((list(prompts), k, seed))
        draws = torch.randint(self.choices, (len(prompts), k), generator=torch.Generator().manual_seed(seed))
        return [[Sampled(str(n), (n,), True, (0,)) for n in row] for row in draws.tolist()]


def test_distinct_completions_differ_and_only_the_missing_are_sampled_again():
    inner = Numbered(choices=6)
    lists = Distinct(inner, tries=50)(["a", "b"], 5, 1.0, seed=0)
    for one in lists:
        assert len(one) == len({completion.token_ids for completion in one}) == 5
    asked = [len(prompts) * k for prompts, k, _ in inner.calls]
    assert asked[0] == 10 and all(later < 10 for later in asked[1:]) and len(asked) > 1
    assert len({seed for _, _, seed in inner.calls}) == len(asked)


def test_distinct_gives_up_after_its_tries_with_what_there_is():
    inner = Numbered(choices=2)
    (one,) = Distinct(inner, tries=3)(["a"], 5, 1.0, seed=0)
    assert len(one) == 2 and len(inner.calls) == 3


def test_distinct_keeps_the_plain_samplers_completions_in_order():
    plain = sampler()(PROMPTS, 3, 1.0, seed=5)
    distinct = Distinct(sampler(), tries=1)(PROMPTS, 3, 1.0, seed=5)
    assert distinct == [list({completion.token_ids: completion for completion in one}.values()) for one in plain]


# --- vLLM: the engine is a stand-in, since it needs a GPU


def test_without_vllm_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ImportError, match="pip install vllm"):
        VLLMSampler("model", 4)


@pytest.mark.parametrize("given", [None, (7,)])
def test_vllm_ends_completions_where_the_other_sampler_does(monkeypatch, given):
    class Engine:
        def get_tokenizer(self):
            return closing_with("f")

        def generate(self, prompts, sampling_params, use_tqdm):
            seen.extend(sampling_params)
            return [types.SimpleNamespace(outputs=[]) for _ in prompts]

    seen = []
    monkeypatch.setitem(sys.modules, "vllm", types.SimpleNamespace(SamplingParams=lambda **parameters: parameters))
    VLLMSampler(Engine(), 8, eos_token_ids=given, stop=["\n\n"], min_new_tokens=2)(["a"], 1, 1.0, seed=0)
    (parameters,) = seen
    # without names of one's own the engine adds what the model's settings say; with them it must not
    assert parameters["stop_token_ids"] == ([EOS, WORDS.index("f")] if given is None else [7])
    assert parameters["ignore_eos"] is (given is not None)
    assert (parameters["stop"], parameters["min_tokens"], parameters["max_tokens"]) == (["\n\n"], 2, 8)


def test_the_vllm_sampler_hands_over_tokens_and_a_seed_per_prompt(monkeypatch):
    seen = {}

    class Engine:
        def __init__(self, **engine):
            seen["engine"] = engine

        def get_tokenizer(self):
            return tiny_tokenizer(bos=True)

        def generate(self, prompts, sampling_params, use_tqdm):
            seen.update(prompts=prompts, parameters=sampling_params)
            logprobs = [{6: types.SimpleNamespace(logprob=-0.5)}, {t: types.SimpleNamespace(logprob=-t) for t in (EOS, 7)}]
            ended = types.SimpleNamespace(text="a", token_ids=[6, EOS], finish_reason="stop", logprobs=logprobs)
            cut = types.SimpleNamespace(text="a b", token_ids=[6, 7], finish_reason="length", logprobs=logprobs)
            return [types.SimpleNamespace(outputs=[ended, cut]) for _ in prompts]

    module = types.SimpleNamespace(LLM=Engine, SamplingParams=lambda **parameters: parameters)
    monkeypatch.setitem(sys.modules, "vllm", module)
    lists = VLLMSampler("folder", 8, top_p=0.9, max_model_len=64)(["a", "b"], 2, 0.7, seed=1)

    assert seen["engine"] == {"model": "folder", "max_model_len": 64}
    assert seen["prompts"] == [{"prompt_token_ids": [1, 6]}, {"prompt_token_ids": [1, 7]}]
    first, second = seen["parameters"]
    assert abs(first.pop("seed") - second.pop("seed")) > 2  # vLLM counts up from it for the n completions
    ending = {"min_tokens": 0, "stop": [], "stop_token_ids": [EOS], "ignore_eos": False}
    assert first == second == {"n": 2, "temperature": 0.7, "top_k": -1, "top_p": 0.9, "max_tokens": 8, "logprobs": 0, **ending}
    assert lists[1] == [Sampled("a", (6, EOS), True, (1, 7), (-0.5, -EOS)), Sampled("a b", (6, 7), False, (1, 7), (-0.5, -7))]
