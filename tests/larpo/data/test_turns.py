"""What of a completion counts: the policy's own tokens, and neither the template's nor those of users and tools."""

import pytest
import torch

from larpo.data.collator import ListCollator
from larpo.data.loading import as_lists
from larpo.data.scored_tokens import counted_tokens
from larpo.data.tokenization import marked, tokenize_lists, tokenize_row
from larpo.data.turns import end_of_turn
from tests.helpers import tiny
from tests.helpers.tokenizer_families import CHATML, FAMILIES, with_template

USER = {"role": "user", "content": "hello"}
TOOL = {"role": "tool", "content": "rain: yes"}
CALL = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "rain", "arguments": {"in": "Spain"}}}]}


def says(text, **fields):
    return {"role": "assistant", "content": text, **fields}


# A turn of every kind of template that is about. In each: `body` is what an assistant's message holds.
BODY = "{{ m.content }}{% for c in m.tool_calls or [] %}<call>{{ c.function | tojson }}</call>{% endfor %}"
TURN = "<|{{ m.role }}|>\n" + BODY + "</s>\n"
HEAD = "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
CALLS = "<s>{% for m in messages %}" + TURN + "{% endfor %}" + HEAD

# As Qwen3: thoughts stand only behind the last question, and an empty thought is written for an answer that has none.
THINKING = (
    "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}"
    "{% endfor %}{% for m in messages %}<|{{ m.role }}|>\n{% set text = m.content.split('</think>')[-1].lstrip('\n') %}"
    "{% if m.role == 'assistant' and loop.index0 > ns.last and (loop.last or '</think>' in m.content) %}<think>\n"
    "{% if '</think>' in m.content %}{{ m.content.split('</think>')[0].split('<think>')[-1].strip('\n') }}{% endif %}"
    "{{ '\\n</think>\\n\\n' }}{% endif %}{{ text }}" + BODY.removeprefix("{{ m.content }}") + "</s>\n"
    "{% endfor %}" + HEAD.replace("\n{%", "\n{% if think is defined and not think %}<think>\n\n</think>\n\n{% endif %}{%")
)
# As Mistral's: no header of an answer, and a conversation that it does not foresee is refused.
STRICT = (
    "<s>{% for m in messages %}{% if m.role == 'tool' and not messages[loop.index0 - 1].tool_calls %}"
    "{{ raise_exception('a tool was not called') }}{% endif %}{% if m.role == 'assistant' %} " + BODY + "</s>"
    "{% else %}[{{ m.role }}] {{ m.content }} [/]{% endif %}{% endfor %}"
)
# As gpt-oss: the last turn ends in another token than those before it.
TWO_ENDS = (
    "{% for m in messages %}<|{{ m.role }}|>"
    + BODY
    + "{% if loop.last and m.role == 'assistant' %}</s>{% else %}<|end|>{% endif %}"
)
TWO_ENDS += "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
# As GLM-4: nothing ends a turn but the next one's header.
OPEN = "{% for m in messages %}<|{{ m.role }}|>\n" + BODY + "{% endfor %}" + HEAD
# As Phi-3's: an end of the text behind the end of the turn. As Cohere's: two tokens end a turn. As DeepSeek's: calls of tools
# end in special tokens of their own.
END_OF_TEXT = (
    "{% for m in messages %}<|{{ m.role }}|>\n"
    + BODY
    + "<|end|>\n{% endfor %}"
    + HEAD.replace("{% endif", "{% else %}</s>{% endif")
)
TWO_TOKENS = CALLS.replace("</s>", "<|end|></s>")
SPECIAL_CALLS = CALLS.replace("</call>", "<|end|>")
# Says itself what is the assistant's; the header is in its block, the end is not.
GENERATION = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}<|assistant|>\n" + BODY + "{% endgeneration %}</s>\n"
    "{% else %}<|{{ m.role }}|>\n{{ m.content }}</s>\n{% endif %}{% endfor %}" + HEAD
)


def counted(template, answer, prompt=(USER,), family="byte-level", **columns):
    """The candidate's text, with [[ ]] around what counts, and its whole row."""
    tokenizer = with_template(template, family)
    row = {"prompt": list(prompt), "completions": [answer], "scores": [1.0], **columns}
    tokens = tokenize_row(row, tokenizer)
    return marked(tokenizer, tokens).removeprefix(tokenizer.decode(tokens["prompt_ids"])), tokens


AGENT = [CALL, TOOL, says("yes")]
CALLED = '<call>{"name": "rain", "arguments": {"in": "Spain"}}</call>'
DIALOGUE = [says("yes"), USER, says("46")]


@pytest.mark.parametrize(
    ("template", "answer", "expected"),
    [
        (CALLS, AGENT, f"[[{CALLED}</s>]]\n<|tool|>\nrain: yes</s>\n<|assistant|>\n[[yes</s>]]"),
        (CALLS, DIALOGUE, "[[yes</s>]]\n<|user|>\nhello</s>\n<|assistant|>\n[[46</s>]]"),
        (THINKING, AGENT, f"[[{CALLED}</s>]]\n<|tool|>\nrain: yes</s>\n<|assistant|>\n<think>\n\n</think>\n\n[[yes</s>]]"),
        (THINKING, DIALOGUE, "[[yes</s>]]\n<|user|>\nhello</s>\n<|assistant|>\n<think>\n\n</think>\n\n[[46</s>]]"),
        (STRICT, AGENT, f"[[ {CALLED}</s>]][tool] rain: yes [/][[ yes</s>]]"),
        (STRICT, DIALOGUE, "[[ yes</s>]][user] hello [/][[ 46</s>]]"),
        (TWO_ENDS, AGENT, f"[[{CALLED}<|end|>]]<|tool|>rain: yes<|end|><|assistant|>[[yes</s>]]"),
        (TWO_ENDS, DIALOGUE, "[[yes<|end|>]]<|user|>hello<|end|><|assistant|>[[46</s>]]"),
        (END_OF_TEXT, DIALOGUE, "[[yes<|end|>]]\n<|user|>\nhello<|end|>\n<|assistant|>\n[[46<|end|>]]"),
        (TWO_TOKENS, DIALOGUE, "[[yes<|end|></s>]]\n<|user|>\nhello<|end|></s>\n<|assistant|>\n[[46<|end|></s>]]"),
        (SPECIAL_CALLS, AGENT, f"[[{CALLED[:-7]}<|end|></s>]]\n<|tool|>\nrain: yes</s>\n<|assistant|>\n[[yes</s>]]"),
        (SPECIAL_CALLS, [CALL], f"[[{CALLED[:-7]}<|end|></s>]]"),
        (STRICT.replace("</call>", "<|end|>"), AGENT, f"[[ {CALLED[:-7]}<|end|></s>]][tool] rain: yes [/][[ yes</s>]]"),
        (OPEN, DIALOGUE, "[[yes]]<|user|>\nhello<|assistant|>\n[[46</s>]]"),
        (GENERATION, AGENT, f"[[{CALLED}</s>]]\n<|tool|>\nrain: yes</s>\n[[<|assistant|>\nyes</s>]]"),
        (GENERATION, DIALOGUE, "[[yes</s>]]\n<|user|>\nhello</s>\n[[<|assistant|>\n46</s>]]"),
    ],
)
def test_turns_of_tools_and_users_do_not_count(template, answer, expected):
    text, tokens = counted(template, answer)
    assert text == expected
    own = sum(len(part.split("]]")[0]) > 0 for part in expected.split("[[")[1:])
    turns = sum(message["role"] == "assistant" for message in answer)
    assert own == turns and ("completion_mask" in tokens) == (turns > 1)


# --- where an answer begins


THOUGHT = "<think>\nsums\n</think>\n\n46"


@pytest.mark.parametrize(
    ("template", "answer", "columns", "expected"),
    [
        (THINKING, "46", {}, "<think>\n\n</think>\n\n[[46</s>]]"),  # sampling begins before the thought
        (THINKING, "46", {"chat_template_kwargs": {"think": False}}, "[[46</s>]]"),  # the prompt holds it
        (THINKING, THOUGHT, {}, f"[[{THOUGHT}</s>]]"),  # the policy's own
        (THINKING, "<think>\n\n</think>\n\n46", {}, "[[<think>\n\n</think>\n\n46</s>]]"),
        (THINKING, "", {}, "<think>\n\n</think>\n\n[[</s>]]"),
        (CALLS.replace(HEAD, ""), "46", {}, "<|assistant|>\n[[46</s>]]"),  # no generation prompt
        (STRICT, "46", {}, "[[ 46</s>]]"),  # a space is of the first word's token
        (CALLS, "", {}, "[[</s>]]"),
        (CALLS, "46</s>", {}, "[[46</s>]]"),  # sampling ends at the first end
        ("{% for m in messages %}{{ m.keys() | list }}{% endfor %}", "46", {}, "[[['role', 'content']</s>]]"),
    ],
)
def test_an_answer_begins_behind_what_the_template_writes_for_every_one(template, answer, columns, expected):
    assert counted(template, answer, **columns)[0] == expected


def test_an_answer_that_the_prompt_began_counts_from_where_it_goes_on():
    text, _ = counted(CALLS, [says(" is 46"), USER, says("yes")], prompt=[USER, says("it")])
    assert text == "[[ is 46</s>]]\n<|user|>\nhello</s>\n<|assistant|>\n[[yes</s>]]"


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_that_count_are_those_of_the_answers(family):
    """For all kinds of tokenizers: what counts decodes to the answers, and nothing of the text is lost."""
    tokenizer = with_template(CALLS, family)
    tokens = tokenize_row({"prompt": [USER], "completions": [DIALOGUE], "scores": [1.0]}, tokenizer)
    (ids,), (mask,) = tokens["completion_ids"], tokens["completion_mask"]
    own = "".join(tokenizer.convert_ids_to_tokens(id) for id, counts in zip(ids, mask, strict=True) if counts)
    assert own.replace("▁", "") == "yes</s>46</s>"
    everything = tokenizer.decode([*tokens["prompt_ids"], *ids])
    text = tokenizer.apply_chat_template([USER, *DIALOGUE], tokenize=False).rstrip()
    assert everything == tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"])


@pytest.mark.parametrize(
    ("template", "end"),
    [
        (CALLS, "</s>"),
        (TWO_ENDS, "</s>"),
        (END_OF_TEXT, "<|end|>"),
        (TWO_TOKENS, "<|end|></s>"),
        (CHATML.replace("{{ eos_token }}", "<|end|>"), "<|end|>"),
        (OPEN, None),
    ],
)
def test_the_end_of_a_turn_is_what_the_template_writes(template, end):
    assert end_of_turn(with_template(template)) == end


# --- what cannot be settled


SHORTENS = "{% for m in messages %}<|{{ m.role }}|>{{ m.content if loop.last else m.content[:1] }}</s>{% endfor %}"


@pytest.mark.parametrize(
    ("template", "answer", "message"),
    [
        (SHORTENS, DIALOGUE, r"row: the chat template does not tell which part of completions\[0\] .* before message 0"),
        (CALLS, [USER], r"row: completions\[0\] holds no message of the assistant to train on, only of: user"),
    ],
)
def test_a_candidate_whose_own_tokens_cannot_be_told_is_refused(template, answer, message):
    prompt = [{"role": "user", "content": "a"}]
    with pytest.raises(ValueError, match=message):
        counted(template, answer, prompt)


# --- log-likelihoods, lengths, metrics


def rows_of_dialogues():
    return [
        {"prompt": [USER], "completions": [DIALOGUE, AGENT, [says("the rain in Spain")]], "scores": [0.5, 1.0, 0.0]},
        {"prompt": [USER], "completions": [[says("no")], DIALOGUE], "scores": [0.0, 1.0]},
    ]


def by_hand(model, row):
    """(sum of the log-probs of the tokens that count, how many they are) of each candidate, in float64."""
    masks = row.get("completion_mask") or [[True] * len(ids) for ids in row["completion_ids"]]
    found = []
    for ids, mask in zip(row["completion_ids"], masks, strict=True):
        whole = torch.tensor([row["prompt_ids"] + ids])
        logps = model(whole).logits[0, :-1].log_softmax(-1).gather(1, whole[0, 1:, None])[:, 0]
        own = logps[len(row["prompt_ids"]) - 1 :][torch.tensor(mask, dtype=torch.bool)]
        found.append((own.sum().item(), len(own)))
    return found


@pytest.mark.parametrize("layout", ["padded", "packed", "shared"])
def test_log_likelihoods_are_of_the_tokens_that_count(layout):
    from larpo.modeling.policy import Policy, attach

    model = tiny.causal_lm(vocab_size=512, dtype=torch.float64)
    tokens, report = tokenize_lists(as_lists(rows_of_dialogues()), with_template(CALLS))
    assert report.tokens_read > 0 and "not counted" in str(report) and "[[" in report.example
    expected = [pair for row in tokens for pair in by_hand(model, row)]
    batch = ListCollator(layout=layout)(list(tokens))
    assert batch["num_tokens"].tolist() == [n for _, n in expected] == [n for row in tokens for n in counted_tokens(row)]
    with torch.no_grad():
        logps = attach(model, Policy(model))(rows=batch["rows"][0])
    torch.testing.assert_close(
        logps.double(), torch.tensor([x for x, _ in expected], dtype=torch.float64), atol=1e-5, rtol=1e-6
    )


def test_a_trainer_divides_by_the_tokens_that_count(tmp_path):
    from larpo import LarPOConfig, LarPOTrainer

    seen = []

    class Watched(LarPOTrainer):
        def list_loss(self, logps, ref_logps, inputs):
            seen.append(logps)
            return super().list_loss(logps, ref_logps, inputs)

    model = tiny.causal_lm(vocab_size=512)
    options = dict(output_dir=str(tmp_path), report_to=[], use_cpu=True, per_device_eval_batch_size=2, disable_tqdm=True)
    args = LarPOConfig(**options, length_normalized=True, reference_free=True)
    rows, tokenizer = rows_of_dialogues(), with_template(CALLS)
    expected = [x / n for row in rows for x, n in by_hand(model, tokenize_row(row, tokenizer))]
    Watched(model, args=args, eval_dataset=rows, processing_class=tokenizer).evaluate()
    torch.testing.assert_close(torch.cat(seen), torch.tensor(expected), atol=1e-4, rtol=1e-4)


def test_ref_logps_of_all_tokens_are_refused_where_only_some_count():
    from larpo import score_lists

    model, tokenizer = tiny.causal_lm(vocab_size=512), with_template(CALLS)
    scored = score_lists(model, as_lists(rows_of_dialogues()), tokenizer, ref_model=model, progress=False)
    assert scored["num_tokens"][:] == [counted_tokens(tokenize_row(row, tokenizer)) for row in rows_of_dialogues()]
    tokenize_lists(scored, tokenizer)
    row = dict(scored[0])
    row["num_tokens"] = [n + 9 for n in row["num_tokens"]]
    with pytest.raises(ValueError, match=r"ref_logps is of \d+ tokens for completions\[0\], of which \d+ count now"):
        tokenize_row(row, tokenizer)


def test_a_mask_beside_given_tokens_is_kept_and_cut_with_them():
    tokenizer = with_template(CALLS)
    tokens = {"prompt_ids": [5], "completion_ids": [[6, 7, 8], [9]], "completion_mask": [[False, True, True], [True]]}
    row = {"prompt": "a", "completions": ["b", "c"], "scores": [1.0, 0.0], **tokens}
    tokens, _ = tokenize_lists(as_lists([row]), tokenizer, max_length=3)
    assert tokens[0]["completion_ids"] == [[6, 7], [9]] and tokens[0]["completion_mask"] == [[False, True], [True]]
    with pytest.raises(ValueError, match=r"field 'completion_mask\[0\]' .* expected 3 bools"):
        as_lists([row | {"completion_mask": [[True], [True]]}])


def test_a_candidate_of_which_nothing_counts_after_the_cut_is_said_to_be_empty():
    row = {"prompt": [USER], "completions": ["46", THOUGHT], "scores": [1.0, 0.0]}
    tokenizer = with_template(THINKING)
    short = len(tokenize_row(row, tokenizer)["prompt_ids"]) + 3
    with pytest.warns(UserWarning, match="1 completion empty"):
        tokens, report = tokenize_lists(as_lists([row]), tokenizer, max_length=short, max_prompt_length=None)
    assert counted_tokens(tokens[0]) == [0, 3] and report.completions_empty == 1
