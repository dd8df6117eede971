"""What is logged beside the loss."""

from __future__ import annotations

import torch

from larpo.training import training_log


def test_the_time_that_metrics_take_counts_for_throughput_too(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(training_log.time, "monotonic", lambda: clock[0])
    log = training_log.TrainingLog(None, None)

    def slow_metrics(ranks):
        clock[0] += 3
        return {}

    monkeypatch.setattr(log.lists, "pop", slow_metrics)
    rates = []
    for _ in range(2):
        clock[0] += 2
        log._tokens = 10
        rates.append(log.pop(1, torch.device("cpu"))["tokens_per_second"])
    assert rates == [5.0, 2.0]
