"""No token, key or password is in anything that a run writes or prints, and no run is told from another by one."""

import json

import pytest
import torch
import yaml

from larpo import commands
from larpo.align import AlignConfig, load_config
from larpo.align.config import differences
from larpo.config import LarPOConfig
from larpo.runs.identity import changed
from larpo.runs.secrets import is_secret, masked, without_secrets
from tests.helpers import align_runs
from tests.helpers.train_runs import model_and_lists, settings_of, train

SECRET = "Xq7vNotToBeSeen"


def everything_in(folder) -> bytes:
    return b"\n".join(path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file())


SECRETS = "token hub_token use_auth_token hf_token api_key OPENAI_API_KEY password client_secret aws_secret_access_key"
NO_SECRETS = (
    "eos_token pad_token image_token forced_bos_token max_new_tokens tokenizer token_ids pad_token_id num_input_tokens_seen "
    "alora_invocation_tokens key dataloader_pin_memory trust_remote_code keep_models"
)


@pytest.mark.parametrize("name", [*SECRETS.split(), "Authorization", "X-Api-Key", "apiKey", "accessToken"])
def test_names_of_secrets(name):
    assert is_secret(name)
    assert masked({"a": [{name: SECRET}]}) == {"a": [{name: "***"}]}
    assert without_secrets({"a": {name: SECRET, "b": 1}}) == {"a": {"b": 1}}


@pytest.mark.parametrize("name", NO_SECRETS.split())
def test_names_that_are_no_secrets(name):
    assert masked({name: "value"}) == {name: "value"} == without_secrets({name: "value"})


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (f"https://me:{SECRET}@host/x.jsonl", "https://***@host/x.jsonl"),
        (f"https://host/x?a=1&token={SECRET}&b=2", "https://host/x?a=1&token=***&b=2"),
        (f'{{"r": 8, "api_key": "{SECRET}",', '{"r": 8, "api_key": "***",'),
        (f"Authorization: Bearer {SECRET}", "Authorization: ***"),
        (f"vllm serve x --api-key {SECRET} --max-tokens 5", "vllm serve x --api-key *** --max-tokens 5"),
        (f"serve.sh --token '{SECRET}'", "serve.sh --token '***'"),
        ("serve.sh --api-key $MY_KEY --token-ids 5", "serve.sh --api-key $MY_KEY --token-ids 5"),
        ("hf_" + "a1B2" * 8, "***"),
        ("a basic understanding: the bearer certificates", "a basic understanding: the bearer certificates"),
        ("org/model", "org/model"),
    ],
)
def test_secrets_inside_a_text(text, shown):
    assert masked(text) == shown


def test_the_value_that_is_masked_stays_as_it_was():
    settings = {"token": SECRET, "inner": [{"password": SECRET}]}
    masked(settings), without_secrets(settings)
    assert settings == {"token": SECRET, "inner": [{"password": SECRET}]}


def test_a_run_of_the_loop_writes_no_secret_and_goes_on_with_another(tmp_path, monkeypatch):
    monkeypatch.setattr("larpo.align.plots.draw", lambda *args: {})
    secrets = dict(model_init_kwargs={"token": SECRET}, training={"hub_token": SECRET})
    result = align_runs.align(tmp_path / "run", iterations=1, eval_k=1, **secrets)
    assert SECRET.encode() not in everything_in(tmp_path)
    assert "token: '***'" in result.summary.read_text(encoding="utf-8")
    other = dict(model_init_kwargs={"token": "another"}, training={"hub_token": "another"})
    assert align_runs.align(tmp_path / "run", iterations=1, eval_k=1, **other).metrics == result.metrics
    with pytest.raises(ValueError, match="holds another run: k was 4 and is 3; training was") as caught:
        align_runs.align(tmp_path / "run", iterations=1, eval_k=1, k=3, training={"hub_token": SECRET, "beta": 0.7})
    assert SECRET not in str(caught.value)


def test_larpo_train_writes_no_secret_and_goes_on_with_another(tmp_path, monkeypatch):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    given = model_and_lists(tmp_path)

    def train_with(secret, **more):
        options = {"hub_token": secret, "model_init_kwargs": {"token": secret, "dtype": "float32"}, "max_steps": 1, **more}
        elsewhere = tmp_path.parent / f"{tmp_path.name}.yaml"
        return train(settings_of(given, tmp_path / "out", file=elsewhere, report_to="tensorboard", **options))

    trainer = train_with(SECRET)
    assert trainer.args.hub_token == SECRET and trainer.args.model_init_kwargs["token"] == SECRET
    written = everything_in(tmp_path)
    assert SECRET.encode() not in written and any((tmp_path / "board").rglob("*tfevents*"))
    found = torch.load(tmp_path / "out" / "training_args.bin", weights_only=False)
    assert (found.hub_token, found.model_init_kwargs, found.max_steps) == (None, {"dtype": "float32"}, 1)
    train_with("another")  # the same run
    with pytest.raises(ValueError, match=r"beta was 0\.1 and is 0\.5") as caught:
        train_with(SECRET, beta=0.5)
    assert SECRET not in str(caught.value) and "token" not in str(caught.value)


def test_folders_of_runs_before_secrets_were_masked_are_the_same_run():
    before = {"model_init_kwargs": {"token": SECRET, "dtype": "bfloat16"}, "hub_token": SECRET}
    assert changed(before, {"model_init_kwargs": {"dtype": "bfloat16"}, "hub_token": None}) == []
    assert changed(before, {"model_init_kwargs": {"dtype": "float32"}}) == [
        "model_init_kwargs was {'dtype': 'bfloat16'} and is {'dtype': 'float32'}"
    ]


@pytest.mark.parametrize("show", [repr, str, lambda args: args.to_json_string()])
def test_settings_that_are_shown_have_no_secret(tmp_path, show):
    kept = {"token": SECRET, "dtype": "bfloat16"}
    args = LarPOConfig(output_dir=str(tmp_path), use_cpu=True, hub_token=SECRET, model_init_kwargs=dict(kept))
    assert SECRET not in show(args) and "bfloat16" in show(args)
    assert args.hub_token == SECRET and args.model_init_kwargs == kept
    config = align_runs.config(tmp_path, sampler="vllm", sampler_options={"hf_token": SECRET})
    assert SECRET not in repr(config) and "sampler='vllm'" in repr(config)


def test_a_masked_config_read_back_takes_the_token_from_the_environment_or_is_refused(tmp_path, monkeypatch):
    stored = align_runs.config(tmp_path, model_init_kwargs={"token": SECRET, "dtype": "bfloat16"}).to_dict()
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(stored))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with pytest.raises(ValueError, match=r"model_init_kwargs\.token is '\*\*\*'.*set HF_TOKEN"):
        load_config(tmp_path / "config.yaml")
    monkeypatch.setenv("HF_TOKEN", "from-the-environment")
    again = load_config(tmp_path / "config.yaml")
    assert again.model_init_kwargs == {"dtype": "bfloat16"} and differences(stored, again) == []
    for name, value in (
        ("sampler_options", {"api_key": "***"}),
        ("model", "https://***@host/x"),
        ("prompts", "h://x?token=***"),
    ):
        with pytest.raises(ValueError, match="stands for a secret"):
            AlignConfig(**(stored | {"model_init_kwargs": {}, "sampler": "vllm", name: value}))
    with pytest.raises(ValueError, match="stands for a secret"):
        LarPOConfig(output_dir="x", model_init_kwargs={"password": "***"})


def test_settings_without_a_token_are_read_back_as_they_were(tmp_path, monkeypatch):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    stored = json.loads(LarPOConfig(output_dir=str(tmp_path), use_cpu=True, beta=0.3).to_json_string())
    assert stored["hub_token"] is None and LarPOConfig(**stored).beta == 0.3


def test_what_a_reward_says_when_it_fails_has_no_secret():
    from larpo.rewards import RewardError, score

    def judge(prompts, completions):
        raise ConnectionError(f"401 for https://judge/x?api_key={SECRET}")

    with pytest.raises(RewardError, match=r"ConnectionError: 401 for https://judge/x\?api_key=\*\*\*$"):
        score(judge, None, ["p"], ["a"])


def test_a_command_with_a_key_in_it_is_not_written_and_not_run_with_the_mask(tmp_path):
    def one(key):
        command = f"vllm serve {{checkpoint}} --api-key {key}"
        options = {"base_url": "http://a/v1", "model": "m", "reload_command": command}
        return align_runs.config(tmp_path, sampler="server", sampler_options=options)

    assert SECRET not in json.dumps(one(SECRET).to_dict())
    with pytest.raises(ValueError, match=r"options.reload_command is .* stands for a secret that was not written down"):
        one("***")


def test_the_mask_in_one_of_several_rewards_is_refused_and_prompts_may_hold_it(tmp_path):
    rewards = ["a:b", {"url": "http://a/x", "extra_body": {"auth": {"api_key": "***"}}}]
    with pytest.raises(ValueError, match=r"reward.extra_body.auth.api_key is '\*\*\*', which stands for a secret"):
        align_runs.config(tmp_path, reward=rewards)
    align_runs.config(tmp_path, prompts=[{"prompt": "***"}, {"prompt": "b"}], eval_prompts=1)


def test_prompts_are_data_and_not_masked(tmp_path):
    rows = [{"prompt": "my password: x", "token": "a"}, {"prompt": "***", "token": "b"}]
    assert align_runs.config(tmp_path, prompts=rows, eval_prompts=1).to_dict()["prompts"] == rows


def test_errors_that_show_a_setting_do_not_show_its_secret(tmp_path, capsys, monkeypatch):
    text = f'{{"token": "{SECRET}"'
    with pytest.raises(ValueError, match="model_init_kwargs must be a dict or JSON") as caught:
        LarPOConfig(output_dir="x", model_init_kwargs=text)
    assert SECRET not in str(caught.value)
    with pytest.raises(ValueError, match="peft must be a dict or JSON") as caught:
        commands.train_settings(None, ["--model=m", "--train_data=d", "--output_dir=o", "--peft", text])
    assert SECRET not in str(caught.value)
    with pytest.raises(ValueError, match="model_init_kwargs must hold") as caught:
        align_runs.config(tmp_path, model_init_kwargs=text)
    assert SECRET not in str(caught.value)
