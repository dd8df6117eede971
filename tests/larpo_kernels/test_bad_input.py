"""Bad input gets a sentence: the argument's name, what it is, what it should be; and nothing is touched."""

import inspect
import math

import pytest
import torch

import larpo_kernels as lk

ON_GPU = torch.cuda.is_available()
needs_values = pytest.mark.skipif(ON_GPU, reason="values on a GPU are not inspected: that would stop the host")


def good_input(device):
    """A valid call of fused_listwise_loss: 4 candidates of 3 tokens in lists of 2, vocabulary 7."""
    generator = torch.Generator().manual_seed(0)
    return {
        "logits": torch.randn(4, 3, 7, generator=generator).to(device),
        "labels": torch.randint(0, 7, (4, 3), generator=generator).to(device),
        "relevance": torch.tensor([1.0, 0.0, 0.5, 2.0], device=device),
        "list_sizes": 2,
        "ref_logps": torch.zeros(4, device=device),
    }


def packed_input(device):
    """The same, packed: 12 tokens."""
    good = good_input(device)
    return {
        **good,
        "logits": good["logits"].flatten(0, 1),
        "labels": good["labels"].flatten(),
        "cu_seqlens": torch.tensor([0, 3, 6, 9, 12], device=device),
    }


def set_label(value):
    def spoil(arguments):
        labels = arguments["labels"].clone()
        labels.view(-1)[5] = value
        return labels

    return spoil


def set_relevance(value):
    return lambda arguments: torch.tensor([1.0, value, 0.5, 2.0], device=arguments["logits"].device)


def reshaped(name, *shape):
    return lambda arguments: torch.zeros(shape, dtype=arguments[name].dtype, device=arguments[name].device)


def cast(name, dtype):
    return lambda arguments: arguments[name].to(dtype)


def borders(*ends, dtype=torch.int64):
    return lambda arguments: torch.tensor(ends, dtype=dtype, device=arguments["logits"].device)


def elsewhere(name):
    return lambda arguments: arguments[name].to("meta")


def always(value):
    return lambda arguments: value


# id: (layout, argument, how to spoil it, error, what the message must hold beside the argument's name)
CASES = {
    # shape and rank
    "logits_1d": (good_input, "logits", reshaped("logits", 7), ValueError, [r"\[7\]", r"\[S, T, V\]"]),
    "logits_4d": (
        good_input,
        "logits",
        reshaped("logits", 1, 4, 3, 7),
        ValueError,
        [r"1\D+4\D+3\D+7", r"\[S, T, V\]"],
    ),
    "no_vocabulary": (good_input, "logits", reshaped("logits", 4, 3, 0), ValueError, [r"4\D+3\D+0"]),
    "labels_of_other_shape": (
        good_input,
        "labels",
        reshaped("labels", 4, 2),
        ValueError,
        [r"4\D+2", r"4\D+3"],
    ),
    "labels_1d": (good_input, "labels", reshaped("labels", 12), ValueError, ["12", r"4\D+3"]),
    "relevance_too_short": (good_input, "relevance", reshaped("relevance", 3), ValueError, ["3", "4"]),
    "relevance_2d": (good_input, "relevance", reshaped("relevance", 2, 2), ValueError, [r"2\D+2", "4"]),
    "ref_logps_too_long": (good_input, "ref_logps", reshaped("ref_logps", 5), ValueError, ["5", "4"]),
    "ref_logps_scalar": (good_input, "ref_logps", reshaped("ref_logps"), ValueError, [r"\[\]", "4"]),
    # kinds
    "logits_of_integers": (
        good_input,
        "logits",
        cast("logits", torch.int64),
        TypeError,
        ["int64", "float32"],
    ),
    "logits_complex": (
        good_input,
        "logits",
        cast("logits", torch.complex64),
        TypeError,
        ["complex64", "float32"],
    ),
    "logits_list": (good_input, "logits", always([[1.0]]), TypeError, ["list", "Tensor"]),
    "labels_of_floats": (
        good_input,
        "labels",
        cast("labels", torch.float32),
        TypeError,
        ["float32", "integer"],
    ),
    "labels_bool": (good_input, "labels", cast("labels", torch.bool), TypeError, ["bool", "integer"]),
    "labels_list": (good_input, "labels", always([1, 2]), TypeError, ["list", "Tensor"]),
    "relevance_list": (good_input, "relevance", always([1.0, 2.0, 3.0, 4.0]), TypeError, ["list", "Tensor"]),
    "ref_logps_number": (good_input, "ref_logps", always(0.0), TypeError, ["float", "Tensor"]),
    "ignore_index_text": (good_input, "ignore_index", always("none"), TypeError, ["'none'", "int or None"]),
    # labels
    "label_is_v": (good_input, "labels", set_label(7), ValueError, ["7", r"\[0, 7\)", "-100"]),
    "label_negative": (good_input, "labels", set_label(-1), ValueError, ["-1", r"\[0, 7\)", "-100"]),
    "label_huge": (packed_input, "labels", set_label(2**40), ValueError, [str(2**40), r"\[0, 7\)"]),
    # lists
    "lists_do_not_divide": (good_input, "list_sizes", always(3), ValueError, ["3", "4"]),
    "lists_do_not_sum": (good_input, "list_sizes", always([2, 1]), ValueError, ["3", "4"]),
    "lists_sum_to_more": (good_input, "list_sizes", always((3, 2)), ValueError, ["5", "4"]),
    "list_of_minus_one": (good_input, "list_sizes", always([5, -1]), ValueError, ["-1"]),
    "lists_of_size_zero": (good_input, "list_sizes", always(0), ValueError, ["0", "1"]),
    "list_sizes_float": (good_input, "list_sizes", always(2.0), TypeError, ["float", "int"]),
    "list_sizes_of_floats": (good_input, "list_sizes", always([2.0, 2.0]), TypeError, ["2.0", "int"]),
    "list_sizes_text": (good_input, "list_sizes", always("22"), TypeError, ["str", "int"]),
    "list_sizes_2d": (good_input, "list_sizes", always(torch.tensor([[2], [2]])), ValueError, [r"2\D+1"]),
    "list_sizes_float_tensor": (
        good_input,
        "list_sizes",
        always(torch.tensor([2.0, 2.0])),
        TypeError,
        ["float32"],
    ),
    "list_sizes_tensor_sum": (good_input, "list_sizes", always(torch.tensor([2, 3])), ValueError, ["5", "4"]),
    # borders of packed candidates
    "borders_missing": (packed_input, "cu_seqlens", always(None), ValueError, ["12"]),
    "borders_beside_padding": (
        good_input,
        "cu_seqlens",
        borders(0, 3, 6, 9, 12),
        ValueError,
        ["packed", "padded"],
    ),
    "borders_fall": (packed_input, "cu_seqlens", borders(0, 6, 3, 9, 12), ValueError, ["6", "3"]),
    "borders_end_early": (packed_input, "cu_seqlens", borders(0, 3, 6, 9, 11), ValueError, ["11", "12"]),
    "borders_end_late": (packed_input, "cu_seqlens", borders(0, 3, 6, 9, 13), ValueError, ["13", "12"]),
    "borders_start_late": (packed_input, "cu_seqlens", borders(1, 3, 6, 9, 12), ValueError, ["1", "0"]),
    "borders_negative": (packed_input, "cu_seqlens", borders(0, -3, 6, 9, 12), ValueError, ["-3"]),
    "borders_float": (
        packed_input,
        "cu_seqlens",
        borders(0.0, 3.0, 6.0, 9.0, 12.0, dtype=torch.float32),
        TypeError,
        ["float32"],
    ),
    "borders_list": (packed_input, "cu_seqlens", always([0, 3, 6, 9, 12]), TypeError, ["list", "Tensor"]),
    "borders_2d": (
        packed_input,
        "cu_seqlens",
        lambda a: a["cu_seqlens"][None],
        ValueError,
        [r"1\D+5", r"\[S\+1\]"],
    ),
    "borders_empty": (packed_input, "cu_seqlens", borders(), ValueError, [r"\[S\+1\]"]),
    "borders_of_too_few": (packed_input, "relevance", reshaped("relevance", 5), ValueError, ["5", "4"]),
    # choices and numbers
    "objective_unknown": (
        good_input,
        "objective",
        always("lambdarnk"),
        ValueError,
        ["lambdarnk", "lambdarank"],
    ),
    "objective_class": (good_input, "objective", always(lk.ListMLE), (ValueError, TypeError), ["ListMLE"]),
    "backend_unknown": (good_input, "backend", always("cuda"), ValueError, ["cuda", "torch", "triton"]),
    "reduction_unknown": (good_input, "reduction", always("avg"), ValueError, ["avg", "mean"]),
    "beta_zero": (good_input, "beta", always(0.0), ValueError, ["0", "> 0"]),
    "beta_negative": (good_input, "beta", always(-0.1), ValueError, ["-0.1", "> 0"]),
    "beta_nan": (good_input, "beta", always(math.nan), ValueError, ["nan"]),
    "beta_tensor": (good_input, "beta", always(torch.tensor(0.1)), TypeError, ["Tensor", "float"]),
    "softcap_zero": (good_input, "softcap", always(0.0), ValueError, ["0", "> 0"]),
    "softcap_negative": (good_input, "softcap", always(-30.0), ValueError, ["-30", "> 0"]),
    "logit_scale_nan": (good_input, "logit_scale", always(math.nan), ValueError, ["nan"]),
    "logit_scale_text": (good_input, "logit_scale", always("1"), TypeError, ["str", "float"]),
    "ref_logps_infinite": (
        good_input,
        "ref_logps",
        lambda a: torch.tensor([0.0, -math.inf, 0.0, 0.0], device=a["logits"].device),
        ValueError,
        ["finite", "-inf", "1"],
    ),
    "relevance_nan": (good_input, "relevance", set_relevance(math.nan), ValueError, ["NaN"]),
    # devices
    "labels_elsewhere": (good_input, "labels", elsewhere("labels"), ValueError, ["meta", "logits"]),
    "relevance_elsewhere": (good_input, "relevance", elsewhere("relevance"), ValueError, ["meta"]),
    "ref_logps_elsewhere": (good_input, "ref_logps", elsewhere("ref_logps"), ValueError, ["meta"]),
    "borders_elsewhere": (packed_input, "cu_seqlens", elsewhere("cu_seqlens"), ValueError, ["meta"]),
}
VALUES = (  # cases told apart from good input by values alone
    *("label_is_v", "label_negative", "label_huge", "list_sizes_tensor_sum", "relevance_nan", "ref_logps_infinite"),
    *("borders_fall", "borders_end_early", "borders_end_late", "borders_start_late", "borders_negative"),
)


def snapshot(arguments):
    tensors = {name: value for name, value in arguments.items() if isinstance(value, torch.Tensor)}
    return {name: (None if t.is_meta else t.clone(), t._version, t.shape, t.stride(), t.grad) for name, t in tensors.items()}


def assert_untouched(arguments, before):
    for name, (values, version, shape, stride, grad) in before.items():
        tensor = arguments[name]
        assert (tensor._version, tensor.shape, tensor.stride(), tensor.grad) == (
            version,
            shape,
            stride,
            grad,
        ), name
        if values is not None:
            assert torch.equal(tensor.nan_to_num(), values.nan_to_num()), name


def refuses(function, arguments, name, error, fragments):
    before = snapshot(arguments)
    with pytest.raises(error) as caught:
        function(**arguments)
    for fragment in (name, *fragments):
        caught.match(fragment)
    assert_untouched(arguments, before)


FUNCTIONS = [lk.fused_listwise_loss, lk.sequence_logps, lk.token_logps]


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
    arguments[name] = spoil(arguments)
    takes = inspect.signature(function).parameters
    refuses(function, {k: v for k, v in arguments.items() if k in takes}, name, error, fragments)


def test_the_good_inputs_are_good(backend, device):
    for build in (good_input, packed_input):
        assert lk.fused_listwise_loss(**build(device), backend=backend).loss.isfinite()


@pytest.mark.parametrize(
    ("changes", "name", "error", "fragments"),
    [
        ({"scores": torch.zeros(2, 2)}, "scores", ValueError, [r"2\D+2", r"\[S\]"]),
        ({"scores": torch.zeros(4, dtype=torch.int64)}, "scores", TypeError, ["int64", "float32"]),
        ({"scores": [0.0] * 4}, "scores", TypeError, ["list", "Tensor"]),
        ({"relevance": torch.zeros(3)}, "relevance", ValueError, ["3", "4"]),
        pytest.param({"relevance": torch.full((4,), math.nan)}, "relevance", ValueError, ["NaN"], marks=needs_values),
        ({"relevance": torch.zeros(4, device="meta")}, "relevance", ValueError, ["meta"]),
        ({"list_sizes": 3}, "list_sizes", ValueError, ["3", "4"]),
        ({"list_sizes": [1, 1]}, "list_sizes", ValueError, ["2", "4"]),
        ({"objective": "dpo"}, "objective", ValueError, ["dpo", "pairwise"]),
        ({"reduction": "batchmean"}, "reduction", ValueError, ["batchmean", "mean"]),
        ({"backend": "numpy"}, "backend", ValueError, ["numpy", "torch"]),
    ],
    ids=str,
)
def test_bad_scores_and_lists_are_named(device, changes, name, error, fragments):
    good = {"scores": torch.zeros(4), "relevance": torch.arange(4.0), "list_sizes": 2}
    arguments = {
        key: value.to(device) if isinstance(value, torch.Tensor) and not value.is_meta else value
        for key, value in {**good, **changes}.items()
    }
    refuses(lk.listwise_loss, arguments, name, error, fragments)


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


@pytest.mark.parametrize("name", ["token_logps", "sequence_logps", "fused_listwise_loss", "listwise_loss"])
def test_options_are_keywords_only(name):
    """Nobody can pass beta where cu_seqlens stands, today or after the next option."""
    parameters = inspect.signature(getattr(lk, name)).parameters.values()
    positional = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    data = {
        "listwise_loss": ["scores", "relevance"],
        "fused_listwise_loss": ["logits", "labels", "relevance"],
    }
    assert positional == data.get(name, ["logits", "labels"])
