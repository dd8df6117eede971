"""Sampling from a server: what it is asked for, what is made of its answers, and what is left when it fails."""

import contextlib
import json
import os
import signal
import sys
import threading
import time
import traceback
import types

import pytest

from larpo.runs.intact import Damaged
from larpo.sampling import Sampled
from larpo.serving.asking import sampling_limits
from larpo.serving.client import ServerError
from larpo.serving.sampler import ServedModel, ServerSampler
from larpo.serving.settings import server_settings
from tests.helpers import HANGS, prepared
from tests.helpers.stand_in_server import StandIn, completion
from tests.helpers.tiny_tokenizer import WORDS, tiny_tokenizer

A, B, EOS = (WORDS.index(word) for word in ("a", "b", "<eos>"))


def choice(*ids, logps=None, **others):
    return {
        "text": " ".join(WORDS[i] for i in ids if i != EOS),
        "token_ids": list(ids),
        "logprobs": {"token_logprobs": logps or [-float(i) for i in ids]},
        **others,
    }


def sampler(server, folder=None, max_new_tokens=4, bos=False, **settings):
    ours = {"top_k", "top_p", "eos_token_ids", "stop", "min_new_tokens"}
    own = {name: settings.pop(name) for name in ours & settings.keys()}
    model = ServedModel("policy", "start", patience=settings.pop("patience", 0.0))
    given = {"base_url": server.base_url, "model": "policy", "allow_stale_weights": True, "retries": 0} | settings
    tokenizer = tiny_tokenizer(bos=bos)
    kept = folder and folder / "kept/answers.jsonl"
    return ServerSampler(server_settings(given), tokenizer, sampling_limits(tokenizer, max_new_tokens, **own), model, kept=kept)


def of_prompt(body):
    """The answer a server gives every time it is asked for this prompt: its first token, n times."""
    return completion([choice(body["prompt"][0], EOS)] * body["n"])


# --- what is asked for, and what is made of it


def test_the_very_tokens_that_were_sampled_come_back_with_their_log_likelihoods():
    with StandIn(lambda body, _: completion([choice(A, EOS), choice(A, B, finish_reason="length")])) as server:
        sample = sampler(server, bos=True, top_k=5, top_p=0.9, min_new_tokens=1, stop=["\n"], extra_body={"priority": 3})
        (found, _) = sample(["b", "c d"], 2, 0.7, seed=1)
    assert found == [
        Sampled("a", (A, EOS), True, (1, B), (-float(A), -float(EOS))),
        Sampled("a b", (A, B), False, (1, B), (-float(A), -float(B))),
    ]
    asked = {tuple(body.pop("prompt")): body for body in server.asked}
    seeds = [body.pop("seed") for body in asked.values()]
    assert len(asked) == len(set(seeds)) == 2 and (1, B) in asked
    drawn = dict(n=2, temperature=0.7, top_p=0.9, top_k=5, min_p=0.0, repetition_penalty=1.0)
    ends = dict(max_tokens=4, min_tokens=1, stop=["\n"], stop_token_ids=[EOS], ignore_eos=False)
    told = dict(return_token_ids=True, logprobs=1, priority=3)
    assert asked[1, B] == dict(path="/v1/completions", model="policy", **drawn, **ends, **told)


def test_where_fewer_come_than_were_asked_for_the_rest_is_asked_for_again_with_another_seed():
    with StandIn(lambda body, number: completion([choice(A + number, EOS)] * min(2, body["n"]))) as server:
        (found,) = sampler(server)(["a"], 5, 1.0, seed=0)
    assert [one.token_ids[0] for one in found] == [A, A, A + 1, A + 1, A + 2]
    assert [body["n"] for body in server.asked] == [5, 3, 1] and len({body["seed"] for body in server.asked}) == 3


def test_completions_that_were_aborted_or_that_nobody_asked_for_are_none(tmp_path):
    aborted = choice(B, finish_reason="abort")
    with StandIn(lambda body, _: completion([aborted, *[choice(A, EOS)] * 3])) as server:
        (found,) = sampler(server)(["a"], 2, 1.0, seed=0)
        assert [one.token_ids for one in found] == [(A, EOS)] * 2
    with StandIn(lambda body, _: completion([aborted])) as server:
        for _ in range(2):  # and are not taken for answers later
            with pytest.raises(ServerError, match="gave 0 of 2 completions of a prompt, and none when asked 3 times more; 0"):
                sampler(server, tmp_path)(["a"], 2, 1.0, seed=0)
    assert len(server.asked) == 6


def test_a_server_of_text_is_asked_in_text_and_its_completions_are_tokenised_here():
    def text(body, _):
        if not isinstance(body["prompt"], str):
            return 422
        one, longer = "a b" if body["prompt"] == "c" else "a  b", body["prompt"] == "d"
        answer = completion([{"text": one, "finish_reason": "stop"}], prompt_tokens=2 if longer else 1)
        answer["usage"]["completion_tokens"] = 4 if longer else 3
        return answer

    with StandIn(text) as server:
        (same,), (other,) = sampler(server, max_in_flight=1)(["c", "d"], 1, 1.0, seed=0)
    assert same.token_ids == other.token_ids == (A, B, EOS) and same.finished
    assert (same.exact, same.prompt_exact, other.exact, other.prompt_exact) == (True, True, False, False)
    assert [isinstance(body["prompt"], str) for body in server.asked] == [False, True, True]  # refused once, then it is known


def test_messages_go_to_the_servers_own_chat_template_with_what_theirs_wants():
    def chat(body, _):
        if "messages" not in body:
            return 400
        logprobs = {"content": [{"token": t, "logprob": -1.0, "bytes": None, "top_logprobs": []} for t in ("a", "<eos>")]}
        one = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": "a"}, "logprobs": logprobs}
        return completion([one] * body["n"])

    messages, tools = [{"role": "user", "content": "b"}], [{"type": "function"}]
    with StandIn(chat) as server:
        template = [{"tools": tools, "enable_thinking": False}]
        ((found, _),) = sampler(server)([messages], 2, 1.0, seed=0, template=template)
    asked = server.asked[-1]
    assert (asked["messages"], asked["tools"], asked["chat_template_kwargs"]) == (messages, tools, {"enable_thinking": False})
    assert found.token_ids == (A, EOS) and found.exact and found.logps == (-1.0, -1.0)
    with StandIn(chat) as server, pytest.raises(ServerError, match="ends in the assistant's own words can't be had"):
        sampler(server, max_in_flight=1)([messages, [*messages, {"role": "assistant", "content": "a"}]], 1, 1.0, seed=0)


@pytest.mark.parametrize(("setting", "value"), [("top_k", 3), ("stop", ["\n"]), ("eos_token_ids", (A,)), ("min_new_tokens", 1)])
def test_what_a_server_of_text_would_ignore_is_refused(setting, value):
    name = setting.removesuffix("_ids")
    with StandIn(lambda body, _: completion([{"text": "a"}]) if isinstance(body["prompt"], str) else 422) as server:
        refused = pytest.raises(ServerError, match=rf"^{name} can't be had of the server at .*, which takes text alone")
        with refused:
            sampler(server, **{setting: value})(["a"], 1, 1.0, seed=0)
    with StandIn(lambda body, _: completion([{"text": "a"}])) as server:  # takes token ids, and gives none
        refused = pytest.raises(ServerError, match=rf"^{name} can't be had of the server at .*, which gives no token ids")
        with refused if setting != "top_k" else contextlib.nullcontext():
            sampler(server, **{setting: value})(["a"], 1, 1.0, seed=0)


def test_a_server_that_only_takes_the_likeliest_tokens_is_noticed(caplog):
    with StandIn(lambda body, _: of_prompt(body)) as server:
        sampler(server)(list("abcd"), 2, 1.0, seed=0)
    assert "does the server" in caplog.text and "do_sample" in caplog.text


def test_without_the_client_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "openai", None)
    with (
        StandIn(None) as server,
        pytest.raises(ImportError, match="needs the package openai; install it with: pip install openai"),
    ):
        sampler(server)(["a"], 1, 1.0, seed=0)


# --- a server that fails


def test_errors_of_the_server_are_tried_again():
    with StandIn(lambda body, number: 500 if number % 3 else of_prompt(body)) as server:
        found = sampler(server, retries=4, max_in_flight=1)(["a", "b", "c"], 1, 1.0, seed=0)
    assert [one.token_ids for (one,) in found] == [(A, EOS), (B, EOS), (B + 1, EOS)]
    with StandIn(lambda body, number: 500) as server:
        with pytest.raises(ServerError, match=r"fails when asked for model 'policy', 2 times \(Error code: 500"):
            sampler(server, retries=1)(["a"], 1, 1.0, seed=0)
        assert len(server.asked) == 2


def test_what_had_arrived_when_the_server_died_is_not_asked_for_again(tmp_path):
    prompts = list("abcdef")
    with StandIn(lambda body, number: of_prompt(body) if number < 4 else None) as server:
        sample = sampler(server, tmp_path, max_in_flight=1)
        with pytest.raises(ServerError, match=r"can't be reached .* 4 of 6 prompts are kept, and the same command goes on"):
            sample(prompts, 2, 1.0, seed=3)
    with StandIn(lambda body, number: of_prompt(body)) as server:
        found = sampler(server, tmp_path)(prompts, 2, 1.0, seed=3)
        assert sorted(body["prompt"][0] for body in server.asked) == [WORDS.index(word) for word in "ef"]
        assert [one[0].text for one in found] == prompts and all(len(one) == 2 for one in found)
        sampler(server, tmp_path)(prompts, 2, 1.0, seed=4)
        assert len(server.asked) == 2 + 6  # another seed is another question


def test_a_last_line_that_was_cut_is_asked_for_again_and_others_are_refused(tmp_path):
    with StandIn(lambda body, number: of_prompt(body)) as server:
        sampler(server, tmp_path, max_in_flight=1)(["a", "b"], 1, 1.0, seed=0)
        file = tmp_path / "kept/answers.jsonl"
        file.write_text(file.read_text()[:-9])
        for asked in (3, 3):
            assert [one.text for (one,) in sampler(server, tmp_path)(["a", "b"], 1, 1.0, seed=0)] == ["a", "b"]
            assert len(server.asked) == asked
        file.write_text("{" + file.read_text())
        with pytest.raises(Damaged, match="line 1 is damaged"):
            sampler(server, tmp_path)(["a"], 1, 1.0, seed=0)


def test_no_more_requests_are_in_flight_than_were_allowed():
    def slowly(body, _):
        time.sleep(0.02)
        return of_prompt(body)

    with StandIn(slowly) as server:
        sampler(server, max_in_flight=3)(list("abcdefabcdef"), 1, 1.0, seed=0)
    assert server.most_at_a_time == 3


def test_a_server_that_is_too_slow_is_given_up_in_a_sentence():
    release = threading.Event()
    with StandIn(lambda body, _: release.wait(5) and of_prompt(body)) as server:
        with pytest.raises(ServerError, match=r"gave no answer within 0\.05 seconds, 1 times"):
            sampler(server, timeout=0.05)(["a"], 1, 1.0, seed=0)
        release.set()


def test_a_server_that_takes_new_weights_is_waited_for(monkeypatch):
    monkeypatch.setattr("larpo.serving.sampler.BETWEEN_TRIES", 0.01)
    with StandIn(lambda body, number: 503 if number < 3 else of_prompt(body)) as server:
        ((one,),) = sampler(server, patience=30.0)(["a"], 1, 1.0, seed=0)
        assert one.text == "a" and len(server.asked) == 4
    with StandIn(lambda body, number: 400) as server, pytest.raises(ServerError, match="refuses to sample"):
        sampler(server, patience=30.0)(["a"], 1, 1.0, seed=0)  # what it refuses it will refuse then, too


def test_a_model_that_the_server_does_not_have_is_named_with_those_it_has():
    refused = pytest.raises(ServerError, match="refuses to sample from model 'policy'; the models it lists are base, other")
    with StandIn(lambda body, _: 404, models=["base", "other"]) as server, refused:
        sampler(server)(list("abcd"), 1, 1.0, seed=0)
    assert len(server.asked) == 3  # in every form, for one of the prompts


def samples(base_url, folder):
    sampler(types.SimpleNamespace(base_url=base_url), folder, max_in_flight=2)(list("abcdef"), 2, 1.0, seed=0)


@pytest.mark.slow
def test_a_process_that_is_killed_loses_what_was_in_flight(tmp_path):
    """The client is in a process of its own, of which the server says when it dies."""
    client, asked = [], []

    def answer(body, number):
        asked.append(body["prompt"][0])
        if number == 3:
            os.kill(client[0].pid, signal.SIGKILL)
        return of_prompt(body)

    with StandIn(answer) as server:
        client.append(prepared.start(samples, server.base_url, tmp_path))
        client[0].join(HANGS)
        assert client[0].exitcode == -signal.SIGKILL
        lost = len(asked) - len((tmp_path / "kept/answers.jsonl").read_text().splitlines())
        assert 1 <= lost <= 2
        before = len(asked)
        found = sampler(server, tmp_path)(list("abcdef"), 2, 1.0, seed=0)
    assert [one.text for one, _ in found] == list("abcdef")
    assert len(asked) - before == 6 - (before - lost)


def test_a_key_is_sent_and_shown_nowhere(monkeypatch, tmp_path):
    monkeypatch.setenv("MY_KEY", "s3cret-value")
    monkeypatch.setenv("OPENAI_API_KEY", "of another server")
    with StandIn(lambda body, number: 401 if number else of_prompt(body)) as server:
        sampler(server, tmp_path, api_key_env="MY_KEY")(["a"], 1, 1.0, seed=0)
        with pytest.raises(ServerError, match="wants another key, and this run shows the one in MY_KEY") as error:
            sampler(server, tmp_path, api_key_env="MY_KEY")(["b"], 1, 1.0, seed=0)
        assert server.keys == ["Bearer s3cret-value"] * 2
        with pytest.raises(ServerError, match="this run has none to show"):
            sampler(server)(["b"], 1, 1.0, seed=0)
        assert server.keys[-1] == "Bearer none"
    assert "s3cret" not in "".join(traceback.format_exception(error.value))  # which a launcher's log shows
    assert "s3cret" not in "".join(path.read_text() for path in tmp_path.rglob("*.jsonl"))
    assert json.loads((tmp_path / "kept/answers.jsonl").read_text())["choices"][0]["text"] == "a"
