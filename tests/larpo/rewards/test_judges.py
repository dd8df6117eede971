"""How rewards are asked: in batches, of whole lists, several calls at a time, behind an address, and never twice."""

import asyncio
import contextvars
import functools
import logging
import math
import os
import signal
import socket
import sys
import threading
from collections import Counter

import pytest

from larpo.rewards import Endpoint, Judge, Memory, RewardError, combined, judge, judged, score
from larpo.rewards.finding import from_settings, settings_that_count
from tests.helpers import HANGS, prepared
from tests.helpers.stand_in_server import StandIn

PROMPTS, COMPLETIONS = ["p", "p", "p", "q", "q"], ["a", "bb", "ccc", "dddd", "eeeee"]


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    monkeypatch.setattr(judge, "FIRST_WAIT", 0.01)


def lengths(body, number):
    return {"scores": [len(text) for text in body["completions"]]}


class Counting:
    """A reward that says what it was asked."""

    def __init__(self):
        self.identity, self.calls = "counting", []

    def __call__(self, prompts, completions, **columns):
        self.calls.append(list(completions))
        return [float(len(text)) for text in completions]


# --- how it is asked


def test_calls_of_a_coroutine_have_context_variables_of_their_own():
    seen = contextvars.ContextVar("seen", default=0)

    async def reward(prompts, completions, **columns):
        seen.set(seen.get() + 1)
        return [float(seen.get())]

    assert score(Judge(reward=reward, max_in_flight=1), None, ["p", "p"], ["a", "b"]) == [1.0, 1.0]


def test_a_coroutine_is_asked_for_each_completion_so_many_at_a_time():
    now, most, calls = 0, 0, []

    async def slow(prompts, completions, answer, **columns):
        nonlocal now, most
        calls.append((prompts, completions, answer))
        now, most = now + 1, max(most, now + 1)
        await asyncio.sleep(0.01)
        now -= 1
        return [float(len(text)) for text in completions]

    few = Judge(reward=slow, max_in_flight=2)
    assert score(few, None, PROMPTS, COMPLETIONS, answer=[0, 1, 2, 3, 4]) == [1.0, 2.0, 3.0, 4.0, 5.0]
    assert most == 2 and sorted(calls) == [([p], [c], [i]) for i, (p, c) in enumerate(zip(PROMPTS, COMPLETIONS, strict=True))]


def test_a_coroutine_is_asked_from_a_notebook_too_and_keeps_its_client():
    loops = []

    async def reward(prompts, completions, **columns):
        loops.append(asyncio.get_running_loop())
        return [1.0] * len(completions)

    async def notebook():
        return score(reward, None, ["p"], ["a"])

    assert asyncio.run(notebook()) == score(functools.partial(reward), None, ["p"], ["a"]) == [1.0]
    assert loops[0] is loops[1]  # a client belongs to the loop in which it was first used


@pytest.mark.parametrize(
    ("asking", "calls"),
    [
        (dict(), [COMPLETIONS]),
        (dict(batch_size=2), [COMPLETIONS[:2], COMPLETIONS[2:4], COMPLETIONS[4:]]),
        (dict(groupwise=True), [COMPLETIONS[:3], COMPLETIONS[3:]]),
        (dict(groupwise=True, max_in_flight=2), [COMPLETIONS[:3], COMPLETIONS[3:]]),
    ],
)
def test_batches_and_whole_lists(asking, calls):
    reward = Counting()
    assert score(Judge(reward=reward, **asking), None, PROMPTS, COMPLETIONS) == [1.0, 2.0, 3.0, 4.0, 5.0]
    assert sorted(reward.calls) == calls


def test_a_function_is_called_in_as_many_threads_as_it_may_be():
    together = threading.Barrier(12)

    def slow(prompts, completions, **columns):
        together.wait(timeout=HANGS)
        return [float(len(text)) for text in completions]

    one = Judge(reward=slow, batch_size=1, max_in_flight=12)
    assert score(one, None, ["p"] * 12, ["aa"] * 12) == [2.0] * 12


def test_a_reward_that_raises_is_asked_again_as_often_as_it_may_be():
    calls = []

    def flaky(prompts, completions, **columns):
        calls.append(completions)
        if len(calls) < 3:
            raise ConnectionError("busy")
        return [1.0] * len(completions)

    assert score(Judge(reward=flaky, retries=2), None, ["p"], ["a"]) == [1.0] and len(calls) == 3
    calls.clear()
    with pytest.raises(RewardError, match="reward 'flaky' raised ConnectionError: busy"):
        score(Judge(reward=flaky, retries=1), None, ["p"], ["a"])


def test_a_coroutine_that_does_not_answer_is_given_up_and_asked_again():
    calls = []

    async def hangs(prompts, completions, **columns):
        calls.append(completions)
        await asyncio.sleep(HANGS if len(calls) < 3 else 0)
        return [1.0]

    assert score(Judge(reward=hangs, timeout=0.01, retries=2), None, ["p"], ["a"]) == [1.0] and len(calls) == 3
    calls.clear()
    with pytest.raises(RewardError, match=r"reward 'hangs' raised TimeoutError: no answer within 0\.01 seconds"):
        score(Judge(reward=hangs, timeout=0.01), None, ["p"], ["a"])
    assert len(calls) == 1


# --- what it has said


def test_what_was_answered_before_an_error_is_not_asked_again(tmp_path):
    """As in a process that was killed: another one reads what the first has left, of which the last line may be cut."""
    asked, broken = [], True

    async def reward(prompts, completions, **columns):
        asked.extend(completions)
        if broken and completions == ["dddd"]:
            raise ConnectionError("away")
        return [float(len(completions[0]))]

    one = Judge(reward=reward, max_in_flight=1, version="1")
    with pytest.raises(RewardError, match="away"):
        judged([one], PROMPTS, COMPLETIONS, {}, memory=Memory(tmp_path))
    assert asked == COMPLETIONS[:4]
    (file,) = tmp_path.rglob("*.jsonl")
    file.write_text(file.read_text()[:-4])  # the third answer is cut
    asked.clear()
    broken = False
    assert judged([one], PROMPTS, COMPLETIONS, {}, memory=Memory(tmp_path)) == [[1.0, 2.0, 3.0, 4.0, 5.0]]
    assert asked == COMPLETIONS[2:]
    asked.clear()
    assert judged([one], PROMPTS[::-1], COMPLETIONS[::-1], {}, memory=Memory(tmp_path)) == [[5.0, 4.0, 3.0, 2.0, 1.0]]
    assert asked == []


def asks(url, folder):
    one = from_settings({"url": url, "batch_size": 1, "max_in_flight": 2})
    found = judged([one], ["p"] * 9, [str(i) for i in range(9)], {}, memory=Memory(folder))
    (folder / "said").write_text(str(found))


@pytest.mark.slow
def test_a_process_that_is_killed_has_kept_what_it_was_told(tmp_path):
    process = None

    def answer(body, number):
        if number == 6:
            os.kill(process.pid, signal.SIGKILL)
        return {"scores": [float(text) for text in body["completions"]]}

    with StandIn(answer) as server:
        lives = []
        for _ in range(2):
            process = prepared.start(asks, server.url, tmp_path)
            process.join(HANGS)
            lives.append(process.exitcode)
    assert lives == [-9, 0] and (tmp_path / "said").read_text() == f"{[[float(i) for i in range(9)]]}"
    asked = Counter(server.completions)
    assert set(asked) == {str(i) for i in range(9)} and asked.total() <= 9 + 2  # what was in flight


def test_ranks_know_what_others_were_told_and_a_damaged_line_is_asked_again(tmp_path, monkeypatch):
    def told(rank, **found):
        monkeypatch.setenv("RANK", str(rank))
        one = Memory(tmp_path).of("judge", {})
        one.put({question: [value] for question, value in found.items()})
        return one

    told(0, one=1.0, two=2.0)
    (file,) = tmp_path.rglob("*.jsonl")
    file.write_text("\n" + file.read_text().replace('"two"', '"two') + '{"question": "three", "val')
    assert "two" not in told(1) and told(1, two=3.0)["one"] == [1.0]
    told(0, three=None)
    last = told(0)
    assert [last[question] for question in ("one", "two", "three")] == [[1.0], [3.0], [None]]


def test_a_question_is_all_that_a_judge_is_given(tmp_path):
    reward = Counting()
    one, memory = Judge(reward=reward, batch_size=8), Memory(tmp_path)
    judged([one], ["p", "p", "q"], ["a", "a", "a"], {"answer": [1, 1, 1]}, memory=memory)
    assert reward.calls == [["a", "a"]]  # of p and of q, once each
    judged([one], ["p"], ["a"], {"answer": [2]}, memory=memory)
    assert len(reward.calls) == 2
    whole = Judge(reward=reward, groupwise=True)
    for completions in (["a", "b"], ["a", "b"], ["a", "c"]):
        judged([whole], ["p", "p"], completions, {}, memory=memory)
    assert reward.calls[2:] == [["a", "b"], ["a", "c"]]


def write_reward(path, text, monkeypatch):
    import importlib

    monkeypatch.syspath_prepend(str(path))
    (path / "their_judge.py").write_text(text)
    importlib.invalidate_caches()
    import linecache

    linecache.clearcache()
    sys.modules.pop("their_judge", None)
    sys.dont_write_bytecode, before = True, sys.dont_write_bytecode
    try:
        return importlib.import_module("their_judge")
    finally:
        sys.dont_write_bytecode = before


def test_a_judge_whose_code_or_settings_change_is_another_one(tmp_path, monkeypatch):
    text = "SCALE = 1\ndef at(scale=1):\n    def reward(**columns):\n        return [scale]\n    return reward\nreward = at()\n"

    def identity(text, name="reward", call=None, **asking):
        found = getattr(write_reward(tmp_path, text, monkeypatch), name)
        return Judge(reward=found if call is None else call(found), **asking).identity

    same = identity(text)
    assert same == identity(text) == identity(text, max_in_flight=3, retries=2, batch_size=4)  # how it is asked
    others = [
        identity(text.replace("SCALE = 1", "SCALE = 2")),  # a value beside the function
        identity(text, "at", lambda at: at(2)),
        identity(text, call=lambda reward: functools.partial(reward, rubric="short")),
        identity(text, groupwise=True),
        identity(text, version="2"),
    ]
    assert len({repr(one) for one in [same, *others]}) == 6
    ask = [Endpoint(url=f"http://a:{port}/x", model=model) for port, model in ((1, None), (2, None), (1, "m"), (2, "m"))]
    assert ask[0].identity != ask[1].identity and ask[2].identity == ask[3].identity


ALIKE = """
import functools
def times(n):
    def around(reward):
        @functools.wraps(reward)
        def inner(**columns):
            return [n * value for value in reward(**columns)]
        return inner
    return around
def one(**columns):
    return [1.0]
decorated = times(2)(one), times(3)(one)
lambdas = (
    lambda **columns: [2.0],
    lambda **columns: [3.0],
)
class Says:
    def __init__(self, n):
        self.n, self.api_key = [n], "s3cret-value"
    def identity(self):
        return self.n
    def __call__(self, **columns):
        return self.n
methods = Says(2.0), Says(3.0)
class Holds:
    def __init__(self, n):
        self.held, self.api_key = Says(n), "s3cret-value"
    def __call__(self, **columns):
        return self.held()
holders = Holds(2.0), Holds(3.0)
"""


@pytest.mark.parametrize("name", ["decorated", "lambdas", "methods"])
def test_what_one_judge_said_is_never_taken_for_anothers(tmp_path, monkeypatch, name):
    judges = [Judge(reward=one, remember=True) for one in getattr(write_reward(tmp_path, ALIKE, monkeypatch), name)]
    for _ in range(2):
        assert judged(judges, ["p"], ["a"], {}, memory=Memory(tmp_path / "kept")) == [[2.0], [3.0]]


def test_judges_that_can_not_be_told_apart_are_refused_and_their_keys_are_in_no_file(tmp_path, monkeypatch):
    two = write_reward(tmp_path, ALIKE, monkeypatch).holders
    memory = Memory(tmp_path / "kept")
    with pytest.raises(ValueError, match="two rewards 'Holds' have the same code and the same plain values"):
        judged([Judge(reward=one, remember=True) for one in two], ["p"], ["a"], {}, memory=memory)
    judges = [Judge(reward=one, remember=True, version=version) for one, version in zip(two, "ab", strict=True)]
    assert judged(judges, ["p"], ["a"], {}, memory=memory) == [[2.0], [3.0]]
    assert "s3cret" not in "".join(path.read_text() for path in (tmp_path / "kept").rglob("*") if path.is_file())


def test_questions_with_other_arrays_are_other_questions(tmp_path):
    import numpy as np

    reward = Counting()
    for value in (1, 2):
        columns = {"answer": [np.array([value])]}
        judged([Judge(reward=reward, batch_size=8)], ["p"], ["a"], columns, memory=Memory(tmp_path))
    assert len(reward.calls) == 2


def test_a_reward_whose_source_nobody_can_read_is_asked_anew(tmp_path, caplog):
    space = {"__name__": "typed"}
    exec("calls = []\ndef reward(prompts, completions, **c):\n    calls.append(completions)\n    return [1.0]", space)
    for _ in range(2):
        judged([Judge(reward=space["reward"], batch_size=1)], ["p"], ["a"], {}, memory=Memory(tmp_path))
    assert len(space["calls"]) == 2 and "the source of reward 'reward' can't be read" in caplog.text


# --- behind an address


def test_an_address_is_asked_in_batches_with_the_columns_and_the_key(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("JUDGE_KEY", "sesame-8472")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with StandIn(lengths) as server, caplog.at_level(logging.DEBUG):
        one = from_settings({"url": server.url, "api_key_env": "JUDGE_KEY", "batch_size": 2, "max_in_flight": 2})
        found = judged([one], PROMPTS, COMPLETIONS, {"answer": [1, 2, 3, 4, 5]}, memory=Memory(tmp_path))
    assert found == [[1.0, 2.0, 3.0, 4.0, 5.0]]
    assert len(server.bodies) == 3
    assert {"prompts": ["p", "q"], "completions": ["ccc", "dddd"], "answer": [3, 4]} in server.bodies
    assert {headers["Authorization"] for headers in server.headers} == {"Bearer sesame-8472"} and server.most_at_a_time <= 2
    assert "sesame" not in caplog.text + "".join(path.read_text() for path in tmp_path.rglob("*.json*"))


def test_a_server_that_is_busy_or_away_is_asked_again():
    def at_third(body, number):
        return lengths(body, number) if number >= 2 else (503, "loading")

    with StandIn(at_third) as server:
        assert score(from_settings({"url": server.url}), None, ["p"], ["a"]) == [1.0]
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{nobody.getsockname()[1]}/score"
    with pytest.raises(RewardError, match=rf"reward '{url}' was asked 2 times: no answer \(ConnectError"):
        score(from_settings({"url": url, "retries": 1}), None, ["p"], ["a"])


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ((401, "no key like sesame-8472 is known"), r"it answers 401 Unauthorized: no key like \*\*\* is known"),
        ("<html>", "its answer is no JSON: <html>"),
        ({"score": [1]}, r"its answer has no 'scores'"),
        ({"scores": [1, 2]}, "returned 2 values; expected one for each of the 1 completions"),
        ({"scores": ["high"]}, "returned a value that is no finite number: got 'high'"),
        ('{"scores": [NaN]}', "returned a value that is no finite number: got nan"),
    ],
)
def test_what_is_no_score_is_refused_by_the_judges_name_at_once_and_not_remembered(tmp_path, monkeypatch, answer, said):
    monkeypatch.setenv("JUDGE_KEY", "sesame-8472")
    with StandIn(lambda body, number: answer) as server:
        one = from_settings({"url": server.url, "api_key_env": "JUDGE_KEY"})
        with pytest.raises((RewardError, ValueError), match=f"reward 'http://127.0.0.1.*{said}"):
            judged([one], ["p"], ["a"], {}, memory=Memory(tmp_path))
        assert len(server.headers) == 1 and not list(tmp_path.rglob("*.jsonl"))
        assert judged([one], ["p"], ["a"], {}, on_error="skip") == [[None]]


def test_classifiers_of_vllm_and_of_text_embeddings_inference():
    """The shapes are those of their documentation: https://docs.vllm.ai, docs/openapi.json of text-embeddings-inference."""

    def vllm(body, number):
        texts = body["input"] if "input" in body else ["".join(m["content"] for m in body["messages"])]
        data = [{"index": i, "label": "GOOD", "probs": [-1.0, float(len(t))], "num_classes": 2} for i, t in enumerate(texts)]
        return {"object": "list", "model": body["model"], "data": data[::-1]}

    with StandIn(vllm) as server:
        one = from_settings({"url": server.url, "api": "vllm_classify", "model": "m", "label": 1})
        assert score(one, None, ["pp", "q"], ["a", "bb"]) == [3.0, 3.0]
        assert server.bodies == [{"input": ["ppa", "qbb"], "model": "m", "use_activation": False}]
        asked = [[{"role": "user", "content": "pp"}]]
        completions = [[{"role": "assistant", "content": text}] for text in ("abc", "d")]
        assert score(one, None, asked * 2, completions) == [5.0, 3.0]
        assert [len(body["messages"]) for body in server.bodies[1:]] == [2, 2]
        with pytest.raises(RewardError, match=r"label of a reward must be one of \[0, 1\], got None"):
            score(from_settings({"url": server.url, "api": "vllm_classify", "model": "m"}), None, ["p"], ["a"])

    def tei(body, number):
        return [[{"label": "b", "score": 0.5}, {"label": "a", "score": float(len(text))}] for (text,) in body["inputs"]]

    with StandIn(tei) as server:
        one = from_settings({"url": server.url, "api": "tei_predict", "label": "a", "extra_body": {"truncate": True}})
        assert score(one, None, ["pp", "q"], ["a", "b"]) == [3.0, 2.0]
        assert server.bodies == [{"inputs": [["ppa"], ["qb"]], "raw_scores": True, "truncate": True}]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (dict(url="localhost/x"), "url of a reward must be an address like http"),
        (dict(url="http://me:word@a/x"), "must hold no user, password or key"),
        (dict(url="http://a/token=abc1"), "must hold no user, password or key"),
        (dict(url="http://a/x?token=abc1"), "must hold no user, password or key"),
        (dict(url="http://a/x", api="vllm"), "must be one of 'json', 'vllm_classify', 'tei_predict', got 'vllm'"),
        (dict(url="http://a/x", api_key_env="NO_SUCH_KEY"), "'NO_SUCH_KEY', and there is no such environment variable"),
        (dict(url="http://a/x", extra_body={"api_key": "x"}), "extra_body of a reward must not hold 'api_key'"),
        (dict(url="http://a/x", timeout=0), "timeout of a reward must be a number of seconds above 0"),
        (dict(url="http://a/x", timout=1), "unknown setting of a reward 'timout'; did you mean 'timeout'"),
        (dict(url="http://a/x", reward="a:b"), "must hold either `reward`, a name, or `url`"),
        (dict(url="http://a/x", label=1), "label of a reward is of a classifier, and api json answers by `scores`; got 1"),
        (dict(reward=len), "must be texts, got builtin_function_or_method; a function goes into a Judge"),
        (dict(reward="a:b", label=1), "unknown setting of a reward 'label'"),
        (dict(reward="math:hypot", timeout=1), "for coroutine functions: nothing ends a call of 'hypot'"),
        (dict(reward="math:hypot", timeout=0), "timeout of a judge must be a number of seconds above 0, got 0"),
        (dict(reward="imdb_sentiment", batch_size=0), "batch_size of a judge must be a whole number of at least 1, got 0"),
        (dict(reward="imdb_sentiment", max_in_flight=4), "needs batch_size or groupwise: 'imdb_sentiment' is asked once"),
        (dict(reward="imdb_sentiment", groupwise=True, batch_size=2), "batch_size and groupwise exclude each other"),
    ],
)
def test_bad_settings_of_a_judge_are_refused(settings, said):
    with pytest.raises(ValueError, match=said):
        from_settings(settings)


def test_settings_that_change_nothing_of_what_is_said_make_no_other_run():
    one = {"url": "http://a/x", "api": "json", "version": "1", "batch_size": 2, "retries": 9, "api_key_env": "K"}
    assert settings_that_count(one) == {"api": "json", "version": "1"} and settings_that_count("a:b") == "a:b"
    assert settings_that_count({"url": "http://a/x", "timeout": 3}) == {"url": "http://a/x"}


# --- what several come to


def test_rewards_are_normalised_within_a_list_before_they_are_weighted():
    """1, 2, 3: mean 2, variance 2/3. 0, 0, 900: mean 300, variance 180000. 7, 7, 7 says nothing, nor does rounding noise."""
    a, b = math.sqrt(2 / 3), math.sqrt(180000)
    expected = [-1 / a - 0.5 * 300 / b, 0 - 0.5 * 300 / b, 1 / a + 0.5 * 600 / b]
    found = combined([[1.0, 2.0, 3.0], [0.0, 0.0, 900.0], [7.0, 7.0, 7.0]], [1.0, 0.5, 2.0], normalise=True)
    assert found == pytest.approx(expected, abs=1e-12)
    assert combined([[0.3, 0.1 + 0.2, 0.3]], normalise=True) == [0.0, 0.0, 0.0]
    assert combined([[1.0, None, 3.0], [None, None, 5.0]], normalise=True) == [-1.0, None, 1.0]
    assert combined([[None, None]], normalise=True) == [None, None]
    cancel = combined([[0.1, 0.2, 0.3], [0.9, 0.8, 0.7]], normalise=True)  # two that say the opposite: no order
    assert len(set(cancel)) == 1 and cancel[0] == pytest.approx(0.0, abs=1e-12)
    assert len(set(combined([[1.1, 2.3, 3.7, 9.0], [8.9, 7.7, 6.3, 1.0]], [3.0, 2.0], normalise=True))) == 4
