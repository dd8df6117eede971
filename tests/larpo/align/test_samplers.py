"""A run that samples from a server: whose weights its completions are of, and how far the server is from the trainer."""

import contextlib
import json
import logging
import sys
import threading
import types

import pytest

from larpo.align import other_engine
from larpo.align.config import differences
from larpo.align.samplers import Samplers
from larpo.align.status import status
from larpo.modeling.loading import load_causal_lm
from larpo.runs.files import read_rows
from larpo.sampling import TransformersSampler
from larpo.serving.client import ServerError
from tests.helpers import align_runs, tiny
from tests.helpers.align_runs import align, config
from tests.helpers.stand_in_server import StandIn, completion


class Engine:
    """What is behind a server: completions of the weights it has, with their log-likelihoods, as vLLM gives them."""

    def __init__(self, folder=None):
        self.lock = threading.Lock()  # one model, for all the threads of a server
        self.load(folder or align_runs.model_folder())

    def load(self, folder):
        self.model = load_causal_lm(folder).eval()

    def __call__(self, body, _):
        with self.lock:
            return self._answer(body)

    def _answer(self, body):
        prompt = tiny.tokenizer().decode(body["prompt"])
        sample = TransformersSampler(self.model, tiny.tokenizer(), body["max_tokens"])
        (found,) = sample([prompt], body["n"], body["temperature"], seed=body["seed"])
        row = {"prompt_ids": body["prompt"], "completion_ids": [list(one.token_ids) for one in found]}
        (logps,) = other_engine.token_logps(self.model, [row], 0)
        return completion([self._choice(one, of) for one, of in zip(found, logps, strict=True)])

    def _choice(self, one, logps):
        tokens = {"token_ids": list(one.token_ids), "logprobs": {"token_logprobs": logps}}
        return {"text": one.text, "finish_reason": "stop" if one.finished else "length", **tokens}


def of_server(server, **options):
    return {"sampler": "server", "sampler_options": {"base_url": server.base_url, "model": "policy", "retries": 0} | options}


@contextlib.contextmanager
def serving(tmp_path):
    """A server, and the command that has it load what a file names before it answers the next request."""
    engine, named = Engine(), tmp_path / "told"

    def answer(body, number):
        if named.exists():
            engine.load(named.read_text().splitlines()[-1].partition(" ")[2])
        return engine(body, number)

    with StandIn(answer) as server:
        yield server, f"echo {{iteration}} {{checkpoint}} >> {named}", named


def test_a_server_that_is_told_of_new_weights_samples_from_the_policy(tmp_path, caplog):
    with serving(tmp_path) as (server, command, named):
        found = align(tmp_path / "run", **of_server(server, reload_command=command))
    run = tmp_path / "run"
    models = [align_runs.model_folder(), *(str(run / f"iteration-0{i}/model") for i in (1, 2))]
    assert named.read_text().splitlines() == [f"{i} {model}" for i, model in enumerate(models)]  # once each
    for iteration in (1, 2):
        counts = found.metrics[iteration]["sample"]
        name = ["iteration-01/model", align_runs.model_folder()][iteration == 1]
        assert counts["weights"] == {"checkpoint": name, "iteration": iteration - 1, "stale": False}
        for file, at in (("sampled", iteration - 1), ("candidates", iteration - 1), ("evaluation", iteration)):
            rows = read_rows(run / f"iteration-0{iteration}/{file}.parquet")
            assert {row["weights"]["iteration"] for row in rows} == {at}
        assert counts["compared_tokens"] > 20 and counts["logps_apart_most"] < 1e-4
        assert counts["not_exact"] == counts["prompts_not_exact"] == 0
    assert "on average" not in caplog.text


def test_adapters_that_a_server_holds_have_another_name_than_the_model_they_are_on(tmp_path):
    with serving(tmp_path) as (server, command, named):
        adapters = {"reload_command": command, "model": "adapter", "initial_model": "base"}
        align(tmp_path / "run", iterations=1, **of_server(server, **adapters))
        assert named.read_text() == f"1 {tmp_path}/run/iteration-01/model\n"
        assert [body["model"] for body in server.asked] == ["base"] * (4 + 6) + ["adapter"] * 4


def test_weights_that_a_server_was_not_told_of_are_written_down_and_seen_in_log_likelihoods(tmp_path, caplog):
    with StandIn(Engine()) as server:
        options = of_server(server, allow_stale_weights=True)
        found = align(tmp_path, **options, logps_tolerance=0.01, training={"learning_rate": 0.02})
    first, second = (found.metrics[i]["sample"] for i in (1, 2))
    assert first["logps_apart_most"] < 1e-4 and not first["weights"]["stale"]
    assert second["logps_apart"] > 0.01 and second["logps_apart_most"] > second["logps_apart"] and second["weights"]["stale"]
    assert read_rows(tmp_path / "iteration-02/sampled.parquet")[0]["weights"]["stale"]
    said = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert sum("nobody tells the server" in one for one in said) == 2  # of either iteration
    (apart,) = (one for one in said if "on average" in one)
    assert all(cause in apart for cause in ("precision", "chat template", "other weights"))


def test_the_gap_is_the_mean_and_the_largest_difference_of_the_same_tokens(caplog):
    model = tiny.causal_lm(spread=2.0)
    row = {"prompt_ids": [5, 6], "completion_ids": [[7, 8, 2], [9, 2]]}
    import torch

    expected = []
    for ids in row["completion_ids"]:
        whole = torch.tensor([row["prompt_ids"] + ids])
        logps = model(whole).logits.double().log_softmax(-1)[0]
        expected.append([logps[i + 1, token].item() for i, token in enumerate(ids)])
    reported = [[expected[0][0] - 0.3, *expected[0][1:]], None]
    found = other_engine.gap(lambda: model, [row | {"sampler_logps": reported}], 0, tolerance=1.0, temperature=1.0)
    assert found["compared_tokens"] == 3
    assert (found["logps_apart"], found["logps_apart_most"]) == pytest.approx((0.1, 0.3), abs=1e-5)
    broken = [row | {"sampler_logps": [[float("nan")] * 3, None]}]
    other_engine.gap(lambda: model, broken, 0, tolerance=1.0, temperature=1.0)
    assert "the sampler's log-likelihoods are nan nats per token from the trainer's" in caplog.text
    nothing = [row | {"sampler_logps": [None, None]}]
    assert other_engine.gap(lambda: 1 / 0, nothing, 0, tolerance=1.0, temperature=1.0) == {}


def test_a_run_goes_on_where_its_server_died_at_another_address(tmp_path):
    engine, budget = Engine(), [9]

    def dying(body, number):
        budget[0] -= 1
        return engine(body, number) if budget[0] >= 0 else None

    settings = {"allow_stale_weights": True, "max_in_flight": 1}
    with StandIn(dying) as server, pytest.raises(ServerError, match=r"5 of 6 prompts are kept, and the same command goes on"):
        align(tmp_path, iterations=1, **of_server(server, **settings))  # 4 held-out prompts, and 5 of the first 6
    assert "in iteration 1 of 1, sample (5 answers of a server of it are kept)" in str(status(tmp_path))
    with StandIn(engine) as server:
        align(tmp_path, iterations=1, **of_server(server, **settings))
        assert len(server.asked) == 1 + 4
    assert not list(tmp_path.rglob("*.jsonl"))  # they are in the stage's file now


def test_a_server_of_text_is_counted_and_named_in_a_warning(tmp_path, caplog):
    def text(body, _):
        if not isinstance(body["prompt"], str):
            return 422
        answer = completion([{"text": " good", "finish_reason": "length"}], prompt_tokens=1)
        answer["usage"]["completion_tokens"] = 3
        return answer

    with StandIn(text) as server:
        found = align(tmp_path, iterations=1, memory="none", **of_server(server, allow_stale_weights=True, max_in_flight=1))
    counts = found.metrics[1]["sample"]
    assert (counts["not_exact"], counts["prompts_not_exact"], "logps_apart" in counts) == (24, 6, False)
    assert "24 of 24 completions, and 6 of 6 prompts, have another number of tokens here than in the server" in caplog.text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, r"sampler server needs sampler_options\.base_url"),
        ({"base_url": "localhost:8000"}, r"base_url must be an address like http://localhost:8000/v1, got 'localhost:8000'"),
        (
            {"base_url": "http://me:word@host/v1"},
            r"base_url must hold no user, password or query: a key is read from api_key_env",
        ),
        (
            {"base_url": "http://host/v1", "api_key": "sk-1"},
            r"sampler_options\.api_key must be left out: put the key into an env",
        ),
        ({"base_url": "http://host/v1", "modl": "m"}, r"unknown setting sampler_options\.modl; did you mean 'model'\?"),
        (
            {"base_url": "http://host/v1", "model": "m"},
            r"nothing tells the server of new weights: give .*reload_command, a model",
        ),
        ({"base_url": "http://host/v1", "retries": -1}, r"sampler_options\.retries must be a number of at least 0, got -1"),
    ],
)
def test_bad_settings_of_a_server_are_refused_before_anything_is_done(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        config(tmp_path, sampler="server", sampler_options=options)


def test_a_key_that_is_not_there_and_a_command_that_fails_are_refused_in_a_sentence(tmp_path, monkeypatch):
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    with StandIn(Engine()) as server:
        with pytest.raises(ValueError, match=r"api_key_env is 'NO_SUCH_KEY', and there is no such environment variable"):
            align(tmp_path, **of_server(server, api_key_env="NO_SUCH_KEY", allow_stale_weights=True))
        monkeypatch.setenv("MY_KEY", "s3cret")
        with pytest.raises(ServerError, match=r"after iteration 0 ended with code 3: no room for \*\*\*"):
            align(tmp_path, **of_server(server, api_key_env="MY_KEY", reload_command="echo no room for $MY_KEY; exit 3"))
        with pytest.raises(ServerError, match=r"took more than 0\.1 s"):
            align(tmp_path, **of_server(server, reload_timeout=0.1, reload_command="sleep 5"))
        assert not server.asked
    with pytest.raises(ServerError, match="can't be reached"):
        align(tmp_path, **of_server(server, allow_stale_weights=True))
    assert "s3cret" not in "".join(path.read_text() for path in tmp_path.rglob("*") if path.is_file())


def test_where_a_server_is_and_how_it_is_told_may_change_and_what_it_samples_from_may_not(tmp_path):
    def one(**options):
        return config(tmp_path, sampler="server", sampler_options={"base_url": "http://a/v1", "reload_command": "x"} | options)

    before = json.loads(json.dumps(one().to_dict()))
    assert differences(before, one(base_url="http://b/v1", reload_command="y", max_in_flight=8)) == []
    assert differences(before, one(base_url="http://api-key:8000/v1")) == []  # a host's name is no secret
    assert differences(before, one(model="other")) == ["sampler_options was {} and is {'model': 'other'}"]


# --- vLLM, whose module is a stand-in of the same form, since it needs a GPU


def test_a_run_with_vllm_in_its_process_makes_an_engine_of_every_policy(tmp_path, monkeypatch):
    engines = []

    class LLM:
        def __init__(self, model, **options):
            self.engine, self.top_k = Engine(model), set()
            engines.append((model, options, self.top_k))

        def get_tokenizer(self):
            return tiny.tokenizer()

        def generate(self, prompts, sampling_params, use_tqdm):
            self.top_k.update(one["top_k"] for one in sampling_params)
            return [self._request(*one) for one in zip(prompts, sampling_params, strict=True)]

        def _request(self, prompt, asked):
            body = {"prompt": prompt["prompt_token_ids"], "n": asked["n"], "max_tokens": asked["max_tokens"]}
            answer = self.engine(body | {"temperature": asked["temperature"], "seed": asked["seed"]}, 0)
            return types.SimpleNamespace(outputs=[self._output(one) for one in answer["choices"]])

        def _output(self, one):
            logprobs = zip(one["token_ids"], one["logprobs"]["token_logprobs"], strict=True)
            at_each = [{token: types.SimpleNamespace(logprob=logprob)} for token, logprob in logprobs]
            return types.SimpleNamespace(**{**one, "logprobs": at_each})

    monkeypatch.setitem(sys.modules, "vllm", types.SimpleNamespace(LLM=LLM, SamplingParams=lambda **parameters: parameters))
    options = {"max_model_len": 64}
    for _ in range(2):  # the second time nothing is sampled, and no engine is made
        found = align(tmp_path, iterations=1, sampler="vllm", sampler_options=options, top_k=20)
    start, trained = align_runs.model_folder(), str(tmp_path / "iteration-01" / "model")
    assert engines == [(start, options, {-1}), (start, options, {20}), (trained, options, {-1})]
    counts = found.metrics[1]["sample"]
    assert counts["compared_tokens"] > 20 and counts["logps_apart_most"] < 1e-4 and not counts["weights"]["stale"]


def test_options_of_the_engine_cannot_replace_how_completions_are_drawn(tmp_path):
    models = types.SimpleNamespace(initial=lambda: "m", eos_token_ids=lambda: None)
    samplers = Samplers(config(tmp_path, sampler="vllm", sampler_options={"top_k": 5}), models, None)
    with pytest.raises(TypeError, match="multiple values for keyword argument 'top_k'"):
        samplers.of(0, to_train_on=True, kept=tmp_path, progress=False)
