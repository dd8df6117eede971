"""Bad input to the linear ops gets a sentence, before anything is computed; nothing is touched."""

import inspect
import re

import pytest
import torch

import larpo_kernels as lk
from tests.larpo_kernels.test_bad_input import always, cast, elsewhere, needs_values, refuses, reshaped, set_label


def good_input(device):
    """A valid call of fused_linear_listwise_loss: 4 candidates of 3 tokens in lists of 2, hidden size 5, vocabulary 7."""
    generator = torch.Generator().manual_seed(0)
    return {
        "hidden": torch.randn(4, 3, 5, generator=generator).to(device).requires_grad_(),
        "weight": torch.randn(7, 5, generator=generator).to(device).requires_grad_(),
        "bias": torch.randn(7, generator=generator).to(device).requires_grad_(),
        "labels": torch.randint(0, 7, (4, 3), generator=generator).to(device),
        "relevance": torch.tensor([1.0, 0.0, 0.5, 2.0], device=device),
        "list_sizes": 2,
    }


def packed_input(device):
    good = good_input(device)
    hidden = good["hidden"].detach().flatten(0, 1).requires_grad_()
    borders = torch.tensor([0, 3, 6, 9, 12], device=device)
    return {**good, "hidden": hidden, "labels": good["labels"].flatten(), "cu_seqlens": borders}


class ShardedTensor(torch.Tensor):
    """Stands in for a DTensor, which needs processes."""

    device_mesh = "DeviceMesh('cuda', [0, 1])"


def sharded(name):
    return lambda arguments: arguments[name].detach().as_subclass(ShardedTensor)


def transposed(arguments):
    return arguments["weight"].detach().t()


# id: (layout, argument, how to spoil it, error, what the message must hold beside the argument's name)
CASES = {
    "hidden_1d": (good_input, "hidden", reshaped("hidden", 5), ValueError, [r"\[5\]", r"\[S, T, H\]"]),
    "hidden_4d": (good_input, "hidden", reshaped("hidden", 1, 4, 3, 5), ValueError, [r"1\D+4\D+3\D+5", r"\[N, H\]"]),
    "hidden_of_integers": (good_input, "hidden", cast("hidden", torch.int64), TypeError, ["int64", "float32"]),
    "hidden_list": (good_input, "hidden", always([[1.0]]), TypeError, ["list", "Tensor"]),
    "hidden_sharded": (good_input, "hidden", sharded("hidden"), TypeError, ["DTensor", "full_tensor"]),
    "hidden_of_another_model": (good_input, "hidden", reshaped("hidden", 4, 3, 6), ValueError, [r"7\D+5", "6", "weight"]),
    "weight_transposed": (good_input, "weight", transposed, ValueError, [r"\[V, H\]", "5", r"\[5, 7\]"]),
    "weight_1d": (good_input, "weight", reshaped("weight", 5), ValueError, [r"\[5\]", r"\[V, H\]"]),
    "weight_of_integers": (good_input, "weight", cast("weight", torch.int8), TypeError, ["int8", "float32"]),
    "weight_list": (good_input, "weight", always([[1.0]]), TypeError, ["list", "Tensor"]),
    "weight_sharded": (good_input, "weight", sharded("weight"), TypeError, ["DTensor", "full_tensor", "FSDP"]),
    "weight_not_gathered": (good_input, "weight", reshaped("weight", 0), ValueError, ["empty", "ZeRO-3", "[Gg]ather"]),
    "weight_without_rows": (good_input, "weight", reshaped("weight", 0, 5), ValueError, ["empty", r"\[0, 5\]"]),
    "weight_elsewhere": (good_input, "weight", elsewhere("weight"), ValueError, ["meta", "hidden"]),
    "bias_too_short": (good_input, "bias", reshaped("bias", 6), ValueError, ["6", "7"]),
    "bias_2d": (good_input, "bias", reshaped("bias", 7, 1), ValueError, [r"7\D+1", r"\[V\]"]),
    "bias_of_integers": (good_input, "bias", cast("bias", torch.int64), TypeError, ["int64", "float32"]),
    "bias_bool": (good_input, "bias", always(True), TypeError, ["bool", "Tensor"]),
    "bias_elsewhere": (good_input, "bias", elsewhere("bias"), ValueError, ["meta", "hidden"]),
    "labels_of_other_shape": (good_input, "labels", reshaped("labels", 4, 2), ValueError, [r"4\D+2", r"4\D+3"]),
    "labels_of_floats": (good_input, "labels", cast("labels", torch.float32), TypeError, ["float32", "integer"]),
    "labels_elsewhere": (good_input, "labels", elsewhere("labels"), ValueError, ["meta", "hidden"]),
    "label_is_v": (good_input, "labels", set_label(7), ValueError, ["7", r"\[0, 7\)", "-100"]),
    "label_negative": (good_input, "labels", set_label(-1), ValueError, ["-1", r"\[0, 7\)", "-100"]),
    "ignore_index_text": (good_input, "ignore_index", always("none"), TypeError, ["'none'", "int or None"]),
    "schedule_unknown": (good_input, "schedule", always("hold"), ValueError, ["hold", "list_hold", "recompute"]),
    "schedule_none": (good_input, "schedule", always(None), ValueError, ["None", "list_hold"]),
    "schedule_without_backward": (good_input, "schedule", always("score_only"), ValueError, ["score_only", "grad"]),
    "schedule_of_a_frozen_head": (good_input, "schedule", always("frozen_head"), ValueError, ["frozen_head", "weight"]),
    "budget_negative": (good_input, "memory_budget", always(-1), ValueError, ["-1", "bytes"]),
    "budget_float": (good_input, "memory_budget", always(1e9), (ValueError, TypeError), ["1000000000", "bytes"]),
    "budget_text": (good_input, "memory_budget", always("2GB"), (ValueError, TypeError), ["2GB", "bytes"]),
    "budget_bool": (good_input, "memory_budget", always(True), (ValueError, TypeError), ["True", "bytes"]),
    "tail_threshold_zero": (good_input, "tail_threshold", always(0.0), ValueError, ["0.0", "between 0 and 1"]),
    "tail_threshold_one": (good_input, "tail_threshold", always(1), ValueError, ["1", "between 0 and 1"]),
    "tail_threshold_nan": (good_input, "tail_threshold", always(float("nan")), ValueError, ["nan", "between 0 and 1"]),
    "tail_threshold_bool": (good_input, "tail_threshold", always(True), TypeError, ["bool", "probability"]),
    "tail_threshold_text": (good_input, "tail_threshold", always("2**-12"), TypeError, ["str", "probability"]),
    "backend_unknown": (good_input, "backend", always("cuda"), ValueError, ["cuda", "torch", "triton"]),
    "softcap_zero": (good_input, "softcap", always(0.0), ValueError, ["0", "> 0"]),
    "logit_scale_text": (good_input, "logit_scale", always("1"), TypeError, ["str", "float"]),
    "borders_missing": (packed_input, "cu_seqlens", always(None), ValueError, ["12"]),
    "borders_beside_padding": (
        good_input,
        "cu_seqlens",
        lambda a: torch.tensor([0, 12], device=a["hidden"].device),
        ValueError,
        ["packed", "padded"],
    ),
    "relevance_too_short": (good_input, "relevance", reshaped("relevance", 3), ValueError, ["3", "4"]),
    "lists_do_not_sum": (good_input, "list_sizes", always([2, 1]), ValueError, ["3", "4"]),
    "objective_unknown": (good_input, "objective", always("dpo"), ValueError, ["dpo", "pairwise"]),
    "beta_zero": (good_input, "beta", always(0.0), ValueError, ["0", "> 0"]),
}
VALUES = ("label_is_v", "label_negative")  # told apart from good input by values alone
FUNCTIONS = [lk.fused_linear_listwise_loss, lk.linear_sequence_logps, lk.linear_token_logps]


def arguments_of(function, arguments):
    takes = inspect.signature(function).parameters
    return {name: value for name, value in arguments.items() if name in takes}


@pytest.mark.parametrize(
    ("function", "case"),
    [
        pytest.param(function, case, marks=[needs_values] if case in VALUES else [], id=f"{function.__name__}-{case}")
        for function in FUNCTIONS
        for case, (_, name, *_) in CASES.items()
        if name in inspect.signature(function).parameters
    ],
)
def test_bad_input_is_named_and_nothing_is_touched(function, device, case):
    build, name, spoil, error, fragments = CASES[case]
    arguments = build(device)
    value = spoil(arguments)
    arguments[name] = value.detach() if isinstance(value, torch.Tensor) else value
    refuses(function, arguments_of(function, arguments), name, error, fragments)


@pytest.mark.parametrize(
    "case", ["weight_transposed", "weight_sharded", "weight_not_gathered", "schedule_unknown", "label_is_v"]
)
def test_plan_refuses_what_the_ops_refuse(device, case):
    build, name, spoil, error, fragments = CASES[case]
    arguments = build(device)
    arguments[name] = spoil(arguments)
    if case in VALUES and device != "cpu":
        pytest.skip("values on a GPU are not inspected")
    refuses(lk.plan, arguments_of(lk.plan, arguments), name, error, fragments)


def test_the_good_inputs_are_good(backend, device):
    for build in (good_input, packed_input):
        arguments = build(device)
        lk.fused_linear_listwise_loss(**arguments, backend=backend).loss.backward()
        assert arguments["weight"].grad.isfinite().all()


def test_nothing_runs_before_the_checks(device, monkeypatch):
    """A list that does not sum up is found before the first GEMM."""
    from larpo_kernels.linear import walk

    def unreachable(*args, **kwargs):
        raise AssertionError("walked")

    monkeypatch.setattr(walk, "forward", unreachable)
    with pytest.raises(ValueError, match="list_sizes"):
        lk.fused_linear_listwise_loss(**{**good_input(device), "list_sizes": 3})


def test_float64_needs_the_torch_backend(device):
    pytest.importorskip("triton")
    good = good_input(device)
    hidden, weight = good["hidden"].double(), good["weight"].double()
    with pytest.raises(TypeError, match=re.escape("backend='torch'")):
        lk.linear_token_logps(hidden, weight, good["labels"], backend="triton")


@pytest.mark.parametrize("function", [*FUNCTIONS, lk.plan], ids=lambda f: f.__name__)
def test_options_are_keywords_only(function):
    parameters = inspect.signature(function).parameters.values()
    positional = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    extra = ["relevance"] if function is lk.fused_linear_listwise_loss else []
    assert positional == ["hidden", "weight", "labels", *extra]
