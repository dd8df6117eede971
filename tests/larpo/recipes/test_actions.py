"""TWOSOME, LINVIT, ReAd: losses and gradients against plain float64, and the toy worlds they act in."""

import math
import random

import pytest
import torch

from larpo.recipes import linvit, read, twosome
from larpo.recipes.actions import Menu, action_logits
from larpo.recipes.tasks import corridor, lake, toy_lm
from tests.helpers.written_out import assert_equal_losses

# --- a language model over a menu ----------------------------------------------------------------------------------


def test_menu_is_what_the_model_says_of_each_action_alone():
    words = lake.tokenizer()
    model = toy_lm.causal_lm(words, seed=0, hidden_size=16)
    prompts = [lake.describe(0), lake.describe(6)]
    menu = Menu(words, prompts, lake.ACTIONS)
    assert menu.words.tolist() == [1, 4, 3, 2]
    assert menu.tokens.tolist() == [1, 5, 3, 3]  # down ##wards, up ##wards
    expected = torch.zeros(2, 4)
    for i, prompt in enumerate(prompts):
        for j, action in enumerate(lake.ACTIONS):
            head = words(prompt).input_ids
            tail = words(action, add_special_tokens=False).input_ids
            logp = model(input_ids=torch.tensor([head + tail])).logits[0].log_softmax(-1)
            expected[i, j] = sum(logp[len(head) - 1 + t, token] for t, token in enumerate(tail))
    torch.testing.assert_close(menu.logps(model), expected, rtol=1e-4, atol=1e-4)


def test_a_policy_is_asked_with_the_tokens_it_was_fitted_to():
    """A prompt has its <s> in training, in a menu and in the sampler."""
    from larpo.sampling import prompt_tokens

    words = lake.tokenizer()
    ids = toy_lm.prompt_ids(words, lake.describe(0))
    assert ids[0] == words.bos_token_id
    assert list(prompt_tokens(words, lake.describe(0))) == ids
    assert Menu(words, [lake.describe(0)], ["retreat"]).rows["input_ids"][0, : len(ids)].tolist() == ids


def test_an_action_without_tokens_or_an_unknown_normalisation_is_refused():
    words = lake.tokenizer()
    with pytest.raises(ValueError, match="'' has no tokens"):
        Menu(words, ["you stand"], ["retreat", ""])
    with pytest.raises(ValueError, match="at least one prompt and one action, got 0 and 1"):
        Menu(words, [], ["retreat"])
    with pytest.raises(ValueError, match="got 'letters'"):
        Menu(words, ["you stand"], ["retreat"]).lengths("letters")


# --- TWOSOME -------------------------------------------------------------------------------------------------------


def test_ppo_through_normalised_likelihoods():
    generator = torch.Generator().manual_seed(0)
    logps = -6 * torch.rand(7, 3, generator=generator, dtype=torch.float64)
    lengths = torch.tensor([1.0, 5.0, 3.0], dtype=torch.float64)
    actions = torch.tensor([0, 1, 2, 2, 1, 0, 1])
    advantages = torch.randn(7, generator=generator, dtype=torch.float64)
    old = torch.rand(7, generator=generator, dtype=torch.float64).log()  # far from now: some ratios are clipped

    def plain(l):
        total = 0.0
        for b in range(7):
            weights = [torch.exp(l[b, a] / lengths[a]) for a in range(3)]
            ratio = weights[actions[b]] / sum(weights) / math.exp(old[b])
            clipped = ratio if 0.8 < ratio < 1.2 else torch.tensor(0.8 if ratio < 1 else 1.2, dtype=torch.float64)
            total = total - min(ratio * advantages[b], clipped * advantages[b])
        return total / 7

    assert_equal_losses(lambda l: twosome.ppo_loss(l, lengths, actions, advantages, old), plain, logps)


def test_equal_likelihood_per_token_means_equal_chance_only_if_normalised():
    logps, tokens = torch.tensor([-2.0, -10.0, -6.0]), torch.tensor([1.0, 5.0, 3.0])
    torch.testing.assert_close(action_logits(logps, tokens).softmax(0), torch.full((3,), 1 / 3))
    assert action_logits(logps, torch.ones(3)).softmax(0)[1] < 0.001


def test_the_lake_in_words_is_gymnasiums_lake():
    table = lake.make(slippery=False).unwrapped.P
    for state in range(lake.STATES):
        if state in (5, 7, 11, 12, 15):  # holes and the goal: nobody acts there
            continue
        words = lake.describe(state).split(" : ")[1].split()
        for action, name in enumerate(("left", "down", "right", "up")):
            kind = words[words.index(name) + 2]
            ((_, after, reward, over),) = table[state][action]
            assert kind == ("edge" if after == state else "goal" if reward else "hole" if over else "ice")


def test_without_gymnasium_the_extra_is_named(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "gymnasium", None)
    with pytest.raises(ImportError, match=r"needs gymnasium: pip install 'larpo_kernels\[recipes\]'"):
        lake.make(slippery=False)


# --- LINVIT --------------------------------------------------------------------------------------------------------


def test_regularised_value_and_its_gradient_the_policy():
    q = torch.tensor([0.3, -0.2, 0.5], dtype=torch.float64)
    prior = torch.tensor([0.5, 0.2, 0.3], dtype=torch.float64)

    def plain(x):
        return 0.1 * torch.log(sum(prior[a] * torch.exp(x[a] / 0.1) for a in range(3)))

    assert_equal_losses(lambda x: linvit.regularised(x, prior.log(), 0.1)[0], plain, q)
    x = q.clone().requires_grad_()
    value, policy = linvit.regularised(x, prior.log(), 0.1)
    torch.testing.assert_close(torch.autograd.grad(value, x)[0], policy.detach(), rtol=1e-12, atol=1e-12)
    kl = (policy * (policy.log() - prior.log())).sum()
    torch.testing.assert_close(value, policy @ x - 0.1 * kl, rtol=1e-12, atol=1e-12)  # the maximum that V stands for


def test_planning_on_the_true_model_is_optimal_and_a_strong_prior_wins_where_it_is_trusted():
    env = lake.make(slippery=True, max_steps=20)
    moves, rewards = lake.true_tables(env)
    model = linvit.Model(lake.STATES, len(lake.ACTIONS))
    model.tried += 1e6
    model.moved, model.earned = moves * 1e6, rewards * 1e6
    value = torch.zeros(lake.STATES, dtype=torch.float64)
    for _ in range(20):
        value = (rewards + moves @ value).max(1).values
    optimal = float(value[0])
    assert lake.exact_return(model.plan(None, 0.1, 20, 0.0), env) == pytest.approx(optimal)
    prior = linvit.leaning(torch.zeros(lake.STATES, dtype=torch.int64), 0.9)
    torch.testing.assert_close(model.plan(prior, 1e6, 20, 0.0)[0], prior.exp(), rtol=1e-4, atol=1e-5)
    assert lake.exact_return(model.plan(prior, 1e-4, 20, 0.0), env) == pytest.approx(optimal, rel=0.02)


# --- ReAd ----------------------------------------------------------------------------------------------------------


def test_advantage_weighted_log_likelihood():
    logps = torch.tensor([-1.0, -3.0, -0.5], dtype=torch.float64)
    advantages = torch.tensor([0.1, -0.2, 0.9], dtype=torch.float64)

    def plain(l):
        weights = [min(math.exp(a / 0.2), 20.0) for a in advantages.tolist()]  # e^4.5 is cut
        return -sum(w * x for w, x in zip(weights, l, strict=True)) / 3

    assert_equal_losses(lambda l: read.advantage_weighted(l, advantages, 0.2), plain, logps)
    with pytest.raises(ValueError, match="temperature must be above 0"):
        read.advantage_weighted(logps, advantages, 0.0)


def test_minimum_over_a_list_is_the_old_policy_tilted_by_advantage():
    old, advantages = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.0, 0.1, -0.1])
    drawn = torch.arange(3).repeat_interleave(torch.tensor([50, 30, 20]))  # plans in the old policy's proportions
    logits = torch.zeros(3, requires_grad=True)
    optimizer = torch.optim.LBFGS([logits], max_iter=100)

    def closure():
        optimizer.zero_grad()
        loss = read.advantage_weighted(logits.log_softmax(0)[drawn], advantages[drawn], 0.1)
        loss.backward()
        return loss

    optimizer.step(closure)
    tilted = old * (advantages / 0.1).exp()
    torch.testing.assert_close(logits.detach().softmax(0), tilted / tilted.sum(), rtol=1e-3, atol=1e-4)


def test_neither_agent_passes_the_other_but_through_the_bay():
    ann = ["east", "east", "north", "wait", "wait", "south", "east", "east"]
    ben = ["wait", "wait", "west", "west", "west", "west", "wait", "wait"]
    scripted = iter([action for both in zip(ann, ben, strict=True) for action in both])
    steps, taken = corridor.episode(lambda place: corridor.ACTIONS.index(next(scripted)), most_steps=40)
    assert steps == 8
    assert len(taken) == 16
    assert corridor.move(1, corridor.ACTIONS.index("east"), 2) == 1  # somebody stands there
    assert corridor.move(0, corridor.ACTIONS.index("north"), 4) == 0  # a wall


def test_an_agent_plans_again_until_its_action_has_an_advantage_and_else_does_the_best_it_saw():
    class Draws:
        def choices(self, actions, weights, k=1):
            return [2, 0, 1, 3][:k]

    assert read.choose([1.0] * 5, Draws(), None) == 2
    assert read.choose([1.0] * 5, Draws(), [-0.1, 0.5, -0.3, 0.9, 0.0], tries=4) == 1  # the first that is not below 0
    assert read.choose([1.0] * 5, Draws(), [-0.1, 0.5, -0.3, 0.9, 0.0], tries=2) == 0


def test_a_critic_learns_what_an_action_adds():
    draw = random.Random(0)
    state = corridor.PLACE[0, 4]
    actions = torch.tensor(draw.choices(range(2), k=400))
    torch.manual_seed(0)
    critic = read.Critic()
    critic.fit(read.Steps(torch.full_like(actions, state), actions, (actions == 1).float()), updates=200, seed=0)
    good, bad = critic.advantages(torch.tensor([state, state]), torch.tensor([1, 0])).tolist()
    assert good == pytest.approx(0.5, abs=0.15)
    assert bad == pytest.approx(-0.5, abs=0.15)


def test_steps_are_found_in_the_planners_menu():
    for ann_does in (None, 0, 3):
        for state in (0, 7, len(corridor.STATES) - 1):
            assert corridor.PROMPTS[corridor.place_of(state, ann_does)] == corridor.prompt(corridor.STATES[state], ann_does)


def test_a_plan_is_the_state_and_what_is_decided_of_both_actions():
    places = torch.tensor([corridor.place_of(7), corridor.place_of(7, 3), corridor.place_of(7, 3)])
    assert read.plans(places, torch.tensor([2, 4, read.OPEN])).tolist() == [[7, 2, read.OPEN], [7, 3, 4], [7, 3, read.OPEN]]
