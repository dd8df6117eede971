"""Bad input gets a sentence: the argument's name, what it is, what it should be; before anything is computed or touched."""

import inspect
import math

import pytest
import torch

import larpo_kernels as lk
from larpo_kernels.linear import walk

FROM_LOGITS = [lk.token_logps, lk.sequence_logps, lk.fused_listwise_loss]
FROM_HIDDEN = [lk.linear_token_logps, lk.linear_sequence_logps, lk.fused_linear_listwise_loss]
FUNCTIONS = [*FROM_LOGITS, *FROM_HIDDEN, lk.listwise_loss]
needs_values = pytest.mark.skipif(
    torch.cuda.is_available(), reason="values on a GPU are not inspected: that would stop the host"
)


def good_input(device, packed=False):
    """What every function takes: 4 candidates of 3 tokens in lists of 2, hidden size 5, vocabulary 7."""
    generator = torch.Generator().manual_seed(0)
    logits, hidden, weight, bias = (torch.randn(size, generator=generator) for size in ((4, 3, 7), (4, 3, 5), (7, 5), 7))
    good = {
        "logits": logits,
        "hidden": hidden.requires_grad_(),
        "weight": weight.requires_grad_(),
        "bias": bias.requires_grad_(),
        "labels": torch.randint(0, 7, (4, 3), generator=generator),
        "relevance": torch.tensor([1.0, 0.0, 0.5, 2.0]),
        "ref_logps": torch.zeros(4),
        "scores": torch.zeros(4),
        "list_sizes": 2,
    }
    if packed:
        good |= {name: good[name].flatten(0, 1) for name in ("logits", "hidden", "labels")}
        good["cu_seqlens"] = torch.tensor([0, 3, 6, 9, 12])
    return {
        name: x.detach().to(device).requires_grad_(x.requires_grad) if isinstance(x, torch.Tensor) else x
        for name, x in good.items()
    }


def of(function, arguments):
    """Those of the arguments that the function takes."""
    takes = inspect.signature(function).parameters
    return {name: value for name, value in arguments.items() if name in takes}


# ---- how a good value becomes a bad one


def always(value):
    return lambda good, device: value


def reshaped(*shape):
    return lambda good, device: torch.zeros(shape, dtype=good.dtype, device=device)


def cast(dtype):
    return lambda good, device: good.to(dtype)


def numbers(*values, dtype=None):
    return lambda good, device: torch.tensor(values, dtype=dtype, device=device)


def set_label(value):
    def spoil(labels, device):
        labels = labels.clone()
        labels.view(-1)[5] = value
        return labels

    return spoil


def elsewhere(good, device):
    return good.to("meta")


class ShardedTensor(torch.Tensor):
    """Stands in for a DTensor, which needs processes."""

    device_mesh = "DeviceMesh('cuda', [0, 1])"


def sharded(good, device):
    return good.detach().as_subclass(ShardedTensor)


def transposed(good, device):
    return good.detach().t()


def in_a_row(good, device):
    return good[None]


ANY = (ValueError, TypeError)
# id: (argument, how it is spoilt, error, what the message must hold beside the argument's name)
PADDED = {
    # shape and rank
    "logits_1d": ("logits", reshaped(7), ValueError, [r"\[7\]", r"\[S, T, V\]"]),
    "logits_4d": ("logits", reshaped(1, 4, 3, 7), ValueError, [r"1\D+4\D+3\D+7", r"\[S, T, V\]"]),
    "no_vocabulary": ("logits", reshaped(4, 3, 0), ValueError, [r"4\D+3\D+0"]),
    "hidden_1d": ("hidden", reshaped(5), ValueError, [r"\[5\]", r"\[S, T, H\]"]),
    "hidden_4d": ("hidden", reshaped(1, 4, 3, 5), ValueError, [r"1\D+4\D+3\D+5", r"\[N, H\]"]),
    "hidden_of_another_model": ("hidden", reshaped(4, 3, 6), ValueError, [r"7\D+5", "6", "weight"]),
    "weight_transposed": ("weight", transposed, ValueError, [r"\[V, H\]", "5", r"\[5, 7\]"]),
    "weight_1d": ("weight", reshaped(5), ValueError, [r"\[5\]", r"\[V, H\]"]),
    "weight_not_gathered": ("weight", reshaped(0), ValueError, ["empty", "ZeRO-3", "[Gg]ather"]),
    "weight_without_rows": ("weight", reshaped(0, 5), ValueError, ["empty", r"\[0, 5\]"]),
    "bias_too_short": ("bias", reshaped(6), ValueError, ["6", "7"]),
    "bias_2d": ("bias", reshaped(7, 1), ValueError, [r"7\D+1", r"\[V\]"]),
    "labels_of_other_shape": ("labels", reshaped(4, 2), ValueError, [r"4\D+2", r"4\D+3"]),
    "labels_1d": ("labels", reshaped(12), ValueError, ["12", r"4\D+3"]),
    "scores_2d": ("scores", reshaped(2, 2), ValueError, [r"2\D+2", r"\[S\]"]),
    "relevance_too_short": ("relevance", reshaped(3), ValueError, ["3", "4"]),
    "relevance_2d": ("relevance", reshaped(2, 2), ValueError, [r"2\D+2", "4"]),
    "ref_logps_too_long": ("ref_logps", reshaped(5), ValueError, ["5", "4"]),
    "ref_logps_scalar": ("ref_logps", reshaped(), ValueError, [r"\[\]", "4"]),
    # kinds
    "logits_of_integers": ("logits", cast(torch.int64), TypeError, ["int64", "float32"]),
    "logits_complex": ("logits", cast(torch.complex64), TypeError, ["complex64", "float32"]),
    "logits_list": ("logits", always([[1.0]]), TypeError, ["list", "Tensor"]),
    "hidden_of_integers": ("hidden", cast(torch.int64), TypeError, ["int64", "float32"]),
    "hidden_list": ("hidden", always([[1.0]]), TypeError, ["list", "Tensor"]),
    "hidden_sharded": ("hidden", sharded, TypeError, ["DTensor", "full_tensor"]),
    "weight_of_integers": ("weight", cast(torch.int8), TypeError, ["int8", "float32"]),
    "weight_list": ("weight", always([[1.0]]), TypeError, ["list", "Tensor"]),
    "weight_sharded": ("weight", sharded, TypeError, ["DTensor", "full_tensor", "FSDP"]),
    "bias_of_integers": ("bias", cast(torch.int64), TypeError, ["int64", "float32"]),
    "bias_bool": ("bias", always(True), TypeError, ["bool", "Tensor"]),
    "labels_of_floats": ("labels", cast(torch.float32), TypeError, ["float32", "integer"]),
    "labels_bool": ("labels", cast(torch.bool), TypeError, ["bool", "integer"]),
    "labels_list": ("labels", always([1, 2]), TypeError, ["list", "Tensor"]),
    "scores_of_integers": ("scores", cast(torch.int64), TypeError, ["int64", "float32"]),
    "scores_list": ("scores", always([0.0] * 4), TypeError, ["list", "Tensor"]),
    "relevance_list": ("relevance", always([1.0, 2.0, 3.0, 4.0]), TypeError, ["list", "Tensor"]),
    "ref_logps_number": ("ref_logps", always(0.0), TypeError, ["float", "Tensor"]),
    "ignore_index_text": ("ignore_index", always("none"), TypeError, ["'none'", "int or None"]),
    # values
    "label_is_v": ("labels", set_label(7), ValueError, ["7", r"\[0, 7\)", "-100"]),
    "label_negative": ("labels", set_label(-1), ValueError, ["-1", r"\[0, 7\)", "-100"]),
    "ref_logps_infinite": ("ref_logps", numbers(0.0, -math.inf, 0.0, 0.0), ValueError, ["finite", "-inf", "1"]),
    "relevance_nan": ("relevance", numbers(1.0, math.nan, 0.5, 2.0), ValueError, ["NaN"]),
    # lists
    "lists_do_not_divide": ("list_sizes", always(3), ValueError, ["3", "4"]),
    "lists_do_not_sum": ("list_sizes", always([2, 1]), ValueError, ["3", "4"]),
    "lists_sum_to_more": ("list_sizes", always((3, 2)), ValueError, ["5", "4"]),
    "list_of_minus_one": ("list_sizes", always([5, -1]), ValueError, ["-1"]),
    "lists_of_size_zero": ("list_sizes", always(0), ValueError, ["0", "1"]),
    "list_sizes_float": ("list_sizes", always(2.0), TypeError, ["float", "int"]),
    "list_sizes_of_floats": ("list_sizes", always([2.0, 2.0]), TypeError, ["2.0", "int"]),
    "list_sizes_text": ("list_sizes", always("22"), TypeError, ["str", "int"]),
    "list_sizes_2d": ("list_sizes", always(torch.tensor([[2], [2]])), ValueError, [r"2\D+1"]),
    "list_sizes_float_tensor": ("list_sizes", always(torch.tensor([2.0, 2.0])), TypeError, ["float32"]),
    "list_sizes_tensor_sum": ("list_sizes", always(torch.tensor([2, 3])), ValueError, ["5", "4"]),
    # choices and numbers
    "objective_unknown": ("objective", always("lambdarnk"), ValueError, ["lambdarnk", "lambdarank"]),
    "objective_class": ("objective", always(lk.ListMLE), ANY, ["ListMLE"]),
    "backend_unknown": ("backend", always("cuda"), ValueError, ["cuda", "torch", "triton"]),
    "reduction_unknown": ("reduction", always("avg"), ValueError, ["avg", "mean"]),
    "beta_zero": ("beta", always(0.0), ValueError, ["0", "> 0"]),
    "beta_negative": ("beta", always(-0.1), ValueError, ["-0.1", "> 0"]),
    "beta_nan": ("beta", always(math.nan), ValueError, ["nan"]),
    "beta_tensor": ("beta", always(torch.tensor(0.1)), TypeError, ["Tensor", "float"]),
    "softcap_zero": ("softcap", always(0.0), ValueError, ["0", "> 0"]),
    "softcap_negative": ("softcap", always(-30.0), ValueError, ["-30", "> 0"]),
    "logit_scale_nan": ("logit_scale", always(math.nan), ValueError, ["nan"]),
    "logit_scale_text": ("logit_scale", always("1"), TypeError, ["str", "float"]),
    "schedule_unknown": ("schedule", always("hold"), ValueError, ["hold", "list_hold", "recompute"]),
    "schedule_none": ("schedule", always(None), ValueError, ["None", "list_hold"]),
    "schedule_without_backward": ("schedule", always("score_only"), ValueError, ["score_only", "grad"]),
    "schedule_of_a_frozen_head": ("schedule", always("frozen_head"), ValueError, ["frozen_head", "weight"]),
    "budget_negative": ("memory_budget", always(-1), ValueError, ["-1", "bytes"]),
    "budget_float": ("memory_budget", always(1e9), ANY, ["1000000000", "bytes"]),
    "budget_text": ("memory_budget", always("2GB"), ANY, ["2GB", "bytes"]),
    "budget_bool": ("memory_budget", always(True), ANY, ["True", "bytes"]),
    "tail_threshold_zero": ("tail_threshold", always(0.0), ValueError, ["0.0", "between 0 and 1"]),
    "tail_threshold_one": ("tail_threshold", always(1), ValueError, ["1", "between 0 and 1"]),
    "tail_threshold_nan": ("tail_threshold", always(math.nan), ValueError, ["nan", "between 0 and 1"]),
    "tail_threshold_bool": ("tail_threshold", always(True), TypeError, ["bool", "probability"]),
    "tail_threshold_text": ("tail_threshold", always("2**-12"), TypeError, ["str", "probability"]),
    "borders_beside_padding": ("cu_seqlens", numbers(0, 3, 6, 9, 12), ValueError, ["packed", "padded"]),
    # devices
    "weight_elsewhere": ("weight", elsewhere, ValueError, ["meta", "hidden"]),
    "bias_elsewhere": ("bias", elsewhere, ValueError, ["meta", "hidden"]),
    "labels_elsewhere": ("labels", elsewhere, ValueError, ["meta", "logits|hidden"]),
    "relevance_elsewhere": ("relevance", elsewhere, ValueError, ["meta"]),
    "ref_logps_elsewhere": ("ref_logps", elsewhere, ValueError, ["meta"]),
}
PACKED = {
    "label_huge": ("labels", set_label(2**40), ValueError, [str(2**40), r"\[0, 7\)"]),
    "borders_missing": ("cu_seqlens", always(None), ValueError, ["12"]),
    "borders_fall": ("cu_seqlens", numbers(0, 6, 3, 9, 12), ValueError, ["6", "3"]),
    "borders_end_early": ("cu_seqlens", numbers(0, 3, 6, 9, 11), ValueError, ["11", "12"]),
    "borders_end_late": ("cu_seqlens", numbers(0, 3, 6, 9, 13), ValueError, ["13", "12"]),
    "borders_start_late": ("cu_seqlens", numbers(1, 3, 6, 9, 12), ValueError, ["1", "0"]),
    "borders_negative": ("cu_seqlens", numbers(0, -3, 6, 9, 12), ValueError, ["-3"]),
    "borders_float": ("cu_seqlens", cast(torch.float32), TypeError, ["float32"]),
    "borders_list": ("cu_seqlens", always([0, 3, 6, 9, 12]), TypeError, ["list", "Tensor"]),
    "borders_2d": ("cu_seqlens", in_a_row, ValueError, [r"1\D+5", r"\[S\+1\]"]),
    "borders_empty": ("cu_seqlens", numbers(dtype=torch.int64), ValueError, [r"\[S\+1\]"]),
    "borders_of_too_few": ("relevance", reshaped(5), ValueError, ["5", "4"]),
    "borders_elsewhere": ("cu_seqlens", elsewhere, ValueError, ["meta"]),
}
CASES = PADDED | PACKED
VALUES = (  # cases told apart from good input by values alone
    *("label_is_v", "label_negative", "label_huge", "list_sizes_tensor_sum", "relevance_nan", "ref_logps_infinite"),
    *("borders_fall", "borders_end_early", "borders_end_late", "borders_start_late", "borders_negative"),
)


def snapshot(arguments):
    tensors = {name: value for name, value in arguments.items() if isinstance(value, torch.Tensor)}
    return {name: (None if t.is_meta else t.clone(), t._version, t.shape, t.stride(), t.grad) for name, t in tensors.items()}


def assert_untouched(arguments, before):
    for name, (values, *seen) in before.items():
        tensor = arguments[name]
        assert [tensor._version, tensor.shape, tensor.stride(), tensor.grad] == seen, name
        if values is not None:
            assert torch.equal(tensor.nan_to_num(), values.nan_to_num()), name


def refuses(function, case, device):
    name, spoil, error, fragments = CASES[case]
    arguments = good_input(device, packed=case in PACKED)
    bad = spoil(arguments.get(name), device)
    arguments[name] = bad.detach() if isinstance(bad, torch.Tensor) else bad
    arguments = of(function, arguments)
    before = snapshot(arguments)
    with pytest.raises(error) as caught:
        function(**arguments)
    for fragment in (name, *fragments):
        caught.match(fragment)
    assert_untouched(arguments, before)


def with_marks(function, case):
    return pytest.param(function, case, marks=[needs_values] if case in VALUES else [], id=f"{function.__name__}-{case}")


@pytest.mark.parametrize(
    ("function", "case"),
    [with_marks(f, case) for f in FUNCTIONS for case, (name, *_) in CASES.items() if name in inspect.signature(f).parameters],
)
def test_bad_input_is_named_and_nothing_is_touched(function, case, device):
    refuses(function, case, device)


SAME_AS_THE_OPS = ["weight_transposed", "weight_sharded", "weight_not_gathered", "schedule_unknown", "label_is_v"]


@pytest.mark.parametrize(("function", "case"), [with_marks(lk.plan, case) for case in SAME_AS_THE_OPS])
def test_plan_refuses_what_the_ops_refuse(function, case, device):
    refuses(function, case, device)


@pytest.mark.parametrize("packed", [False, True])
def test_the_good_inputs_are_good(packed, backend, device):
    for function in (lk.fused_listwise_loss, lk.fused_linear_listwise_loss):
        assert function(**of(function, good_input(device, packed)), backend=backend).loss.isfinite()


def test_nothing_runs_before_the_checks(device, monkeypatch):
    """A list that does not sum up is found before the first GEMM."""

    def unreachable(*args, **kwargs):
        raise AssertionError("walked")

    monkeypatch.setattr(walk, "forward", unreachable)
    refuses(lk.fused_linear_listwise_loss, "lists_do_not_divide", device)


def test_float64_needs_the_torch_backend(device):
    pytest.importorskip("triton")
    good = good_input(device)
    with pytest.raises(TypeError, match="backend='torch'"):
        lk.linear_token_logps(good["hidden"].double(), good["weight"].double(), good["labels"], backend="triton")


@pytest.mark.parametrize(
    ("build", "fragments"),
    [
        (lambda: lk.LambdaRank(weighting="ndcg"), ["weighting", "ndcg", "dcg2"]),
        (lambda: lk.LambdaRank(weighting="dcg", k=0), ["k", "0"]),
        (lambda: lk.LambdaRank(k=5), ["k", "weighting"]),
        (lambda: lk.ListNet(temperature=0.0), ["temperature", "0"]),
        (lambda: lk.ListNet(temperature=math.nan), ["temperature", "nan"]),
    ],
    ids=["weighting", "k", "k_without_weighting", "cold", "nan"],
)
def test_options_of_an_objective_are_checked_where_it_is_made(build, fragments):
    with pytest.raises(ValueError) as caught:
        build()
    for fragment in fragments:
        caught.match(fragment)


@pytest.mark.parametrize("function", [*FUNCTIONS, lk.plan], ids=lambda function: function.__name__)
def test_options_are_keywords_only(function):
    """Nobody can pass beta where cu_seqlens stands, today or after the next option."""
    parameters = inspect.signature(function).parameters.values()
    positional = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    if function is lk.listwise_loss:
        assert positional == ["scores", "relevance"]
        return
    data = ["logits", "labels"] if function in FROM_LOGITS else ["hidden", "weight", "labels"]
    assert positional == (
        data if function not in (lk.fused_listwise_loss, lk.fused_linear_listwise_loss) else [*data, "relevance"]
    )
