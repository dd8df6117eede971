"""The study of the paper's findings: its arms are runs that exist, and its page says what the rows say."""

import pytest

for package in ("transformers", "datasets", "typer", "matplotlib"):
    pytest.importorskip(package)

from benchmarks import reproduction
from benchmarks.studies import tiny_lm
from larpo import align


@pytest.mark.parametrize("arm", [*reproduction.ARMS, reproduction.CURVES])
def test_every_arm_is_a_run(arm, tmp_path, monkeypatch):
    monkeypatch.setattr(tiny_lm, "folder", lambda: tmp_path)
    config = align.load_config(None, reproduction.settings(arm, 3, tmp_path / "run"))
    assert config.seed == 3 and config.iterations >= 1


def test_every_finding_names_arms_that_are_run():
    assert {arm for arms in reproduction.FINDINGS.values() for arm in arms} == set(reproduction.ARMS)


def test_arms_of_one_finding_differ_by_its_setting_only():
    differences = {}
    for finding, arms in reproduction.FINDINGS.items():
        settings = [reproduction.ARMS[arm] for arm in arms]
        differences[finding] = {name for one in settings for name in one if one != settings[0]}
    assert differences["2. Candidates per prompt"] == {"k"}
    assert differences["5. Temperature"] == {"temperatures"}
    assert differences["3. Memory"] == {"memory", "subset"}
    assert all(reproduction.ARMS[arm]["subset"] == [1, 3] for arm in reproduction.FINDINGS["3. Memory"])
    assert all(reproduction.ARMS[arm]["subset"] == [1, 3] for arm in reproduction.FINDINGS["4. Negatives"])


def rows():
    figures = {"start": 0.0, "kl": 2.0, "win_rate": 0.6, "distinct": 1.0, "steps": 24}
    found = [
        {"arm": arm, "seed": seed, "reward": 0.1 * i + 0.01 * seed, **figures}
        for i, arm in enumerate(reproduction.ARMS)
        for seed in (0, 1)
    ]
    curve = {"1": {"1": 0.1, "2": 0.2}, "0.4": {"1": 0.15, "2": 0.18}}
    return [*found, {"arm": reproduction.CURVES, "seed": 0, "recall_at_n": curve, "best_of_n": curve}]


def test_the_table_gives_mean_and_spread_over_seeds():
    lines = reproduction.table(rows()).splitlines()
    (line,) = (line for line in lines if "| ListMLE |" in line)
    assert "| 2 | 0.21 ± 0.01 | 2.00 ± 0.00 | 0.60 ± 0.00 | 1.00 | 24 |" in line  # 0.2 and 0.21, sd 0.007


def test_a_picture_for_each_finding(tmp_path):
    reproduction.draw(rows(), tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == [f"finding-{i}.png" for i in range(1, 7)]


def test_the_tiny_language_model_is_a_folder_that_loads(tmp_path, monkeypatch):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    monkeypatch.setattr(tiny_lm, "STEPS", 2)
    monkeypatch.setattr(tiny_lm, "VOCAB", 300)
    monkeypatch.setattr(tiny_lm, "text", lambda: ["Movie review: a good film. " * 20] * 8)
    tiny_lm._build(tmp_path / "lm", progress=False)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "lm")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "lm")
    ids = tokenizer("Movie review: a", return_tensors="pt").input_ids
    assert tokenizer.decode(ids[0]) == "Movie review: a"
    assert model.generate(ids, max_new_tokens=2, do_sample=False, pad_token_id=0).shape[1] > ids.shape[1]
