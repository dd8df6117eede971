"""The list side: token log-probs -> candidates and their scores, one program per candidate -> loss of each list and its
gradient, one program per list.

A list of m candidates is visited in tiles of I x J pairs, so any m works and nothing of size m x m exists. Nothing is
sorted: ranks are counted by comparison. Candidate i stands before j if its value is larger, or equal and earlier in the
input; where TIES is "mean" or "skip", equal values share the first of their ranks and several candidates may be best or
worst. There are no atomics, and sums have a fixed order. A program reads back only what it wrote to `work` for its own list,
after the barrier between the two phases; lists with overlapping borders would share that part, but their loss is NaN anyway.
"""

import triton
import triton.language as tl

from .math import LN2, LOG2E, logistic, one_minus_exp

FINITE: tl.constexpr = tl.constexpr(1e300)  # what infinite relevance counts as: its difference from another's is a number


@triton.jit
def segment(cu_ptr, size, i, segments, n):
    """-> the items of segment i, start:stop, and whether its borders are wrong: not in order, or not from 0 to n over all.
    Without borders every segment has `size` items.

    Borders may hold anything: they are clamped, so that no read leaves the buffer.
    """
    if cu_ptr is None:
        start = i.to(tl.int64) * size
        stop = start + size
        wrong = stop > n
    else:
        start, stop = tl.load(cu_ptr + i), tl.load(cu_ptr + i + 1)
        wrong = (start > stop) | (start < 0) | (stop > n) | ((i == 0) & (start != 0)) | ((i == segments - 1) & (stop != n))
    return tl.minimum(tl.maximum(start, 0), n), tl.minimum(tl.maximum(stop, 0), n), wrong


@triton.jit(do_not_specialize=["N", "T"])
def candidate_logps(
    logps_ptr,  # [N] float32, 0 where ignored
    mean_mask_ptr,  # [N] int8: the mean over the tokens that count; None: the sum
    cu_tokens_ptr,  # [S+1] int64, or None: every candidate has T tokens
    ref_ptr,  # [S] float32, or None
    out_ptr,  # [S] float32: L
    share_ptr,  # [S] float32: dL/dl of each token of the candidate
    scores_ptr,  # [S] float32: g, or None where none are asked for
    N,
    T,
    beta,
    TOKENS: tl.constexpr,
):
    s = tl.program_id(0)
    start, stop, wrong = segment(cu_tokens_ptr, T, s, tl.num_programs(0), N)
    total = tl.zeros([TOKENS], tl.float32)
    count = tl.zeros([TOKENS], tl.int32)
    for t in range(start, stop, TOKENS):
        at = t + tl.arange(0, TOKENS)
        total += tl.load(logps_ptr + at, mask=at < stop, other=0.0)
        if mean_mask_ptr is not None:
            count += tl.load(mean_mask_ptr + at, mask=at < stop, other=0).to(tl.int32)
    logp = tl.sum(total)
    share = 1.0
    if mean_mask_ptr is not None:
        share = 1.0 / tl.maximum(tl.sum(count), 1).to(tl.float32)
        logp *= share
    logp = tl.where(wrong, float("nan"), logp)
    tl.store(out_ptr + s, logp)
    tl.store(share_ptr + s, tl.where(wrong, float("nan"), share))
    if scores_ptr is not None:
        if ref_ptr is not None:
            logp -= tl.load(ref_ptr + s)
        tl.store(scores_ptr + s, beta * logp)


@triton.jit
def discount(rank):
    return 1.0 / tl.log2(1.0 + rank)


@triton.jit
def value(relevance_ptr, i, stop):
    """Relevance as a number to compute with, float64."""
    r = tl.load(relevance_ptr + i, mask=i < stop, other=0.0)
    return tl.minimum(tl.maximum(r, -FINITE), FINITE)


@triton.jit
def gain_difference(r_i, r_j, top):
    """(2^r_i - 2^r_j) / 2^top for r_i, r_j <= top, float32 with its relative accuracy, however close or large they are."""
    apart = tl.abs(r_i - r_j).to(tl.float32)
    size = tl.exp2((tl.maximum(r_i, r_j) - top).to(tl.float32)) * one_minus_exp(apart * -LN2)
    return tl.where(r_i < r_j, -size, size)


@triton.jit
def before(a_i, a_j, i, j):
    """Whether i stands before j in falling order of a, ties in input order."""
    return (a_i > a_j) | ((a_i == a_j) & (i < j))


@triton.jit
def at_or_after(a_i, a_j, i, j):
    """Whether i is j or stands after it in that order."""
    return (a_i < a_j) | ((a_i == a_j) & (i >= j))


@triton.jit
def in_rest(a_i, a_j, i, j, TIES: tl.constexpr):
    """Whether i is among those that ListMLE draws j from."""
    if TIES == "efron":
        rest = a_i <= a_j
    else:
        rest = at_or_after(a_i, a_j, i, j)
    return rest


@triton.jit
def rank_change(rank_i, rank_j, cut, WEIGHTING: tl.constexpr):
    """What LambdaRank weights the difference of two gains by: how far apart in discount the ranks by score are."""
    if WEIGHTING == "dcg":
        d_i = tl.where(rank_i <= cut, discount(rank_i), 0.0)
        d_j = tl.where(rank_j <= cut, discount(rank_j), 0.0)
        change = tl.abs(d_i - d_j)
    else:
        apart = tl.maximum(tl.abs(rank_i - rank_j), 1.0)  # only i = j is 0 apart, and that is no pair
        lower = tl.maximum(rank_i, rank_j)
        change = discount(apart) - discount(apart + 1.0)
        change *= tl.where(lower > cut, 1.0 / (1.0 - discount(tl.maximum(lower, 2.0))), 1.0)
    return change


@triton.jit
def compare_with_list(
    of_list,
    i,
    g_i,
    r_i,
    left,
    OBJECTIVE: tl.constexpr,
    TIES: tl.constexpr,
    SUFFIXES: tl.constexpr,
    I: tl.constexpr,
    J: tl.constexpr,
):
    """-> how many candidates stand before i and after it by relevance, how many before it by score (LambdaRank), and with
    SUFFIXES the largest score from i on, and the sum of exp(score - largest).

    left: the share of those tied with i that its log-sum-exp runs over.
    """
    scores_ptr, relevance_ptr, _work_ptr, start, stop, _S = of_list
    peak = g_i
    total = tl.zeros([I], tl.float32)
    ahead = tl.zeros([I], tl.int32)
    behind = tl.zeros([I], tl.int32)
    ahead_by_score = tl.zeros([I], tl.int32)
    for j0 in range(start, stop, J):
        j = j0 + tl.arange(0, J)
        g_j = tl.load(scores_ptr + j, mask=j < stop, other=-float("inf"))
        r_j = tl.load(relevance_ptr + j, mask=j < stop, other=0.0)
        real = (j < stop)[None, :]
        if TIES == "order":
            j_first = real & before(r_j[None, :], r_i[:, None], j[None, :], i[:, None])
            j_last = real & before(r_i[:, None], r_j[None, :], i[:, None], j[None, :])
        else:
            j_first = real & (r_j[None, :] > r_i[:, None])
            j_last = real & (r_j[None, :] < r_i[:, None])
        ahead += tl.sum(j_first.to(tl.int32), 1)
        behind += tl.sum(j_last.to(tl.int32), 1)
        if OBJECTIVE == "lambdarank":
            higher = real & before(g_j[None, :], g_i[:, None], j[None, :], i[:, None])
            ahead_by_score += tl.sum(higher.to(tl.int32), 1)
        if SUFFIXES:
            in_suffix = real
            if OBJECTIVE == "listmle":
                in_suffix = real & in_rest(r_j[None, :], r_i[:, None], j[None, :], i[:, None], TIES)
            g = tl.where(in_suffix, g_j[None, :], -float("inf"))
            new_peak = tl.maximum(peak, tl.max(g, 1))
            base = tl.where(new_peak == -float("inf"), 0.0, new_peak)
            e = tl.exp2((g - base[:, None]) * LOG2E)
            if TIES == "efron":
                e *= tl.where(r_j[None, :] == r_i[:, None], left[:, None], 1.0)
            total = total * tl.exp2((peak - base) * LOG2E) + tl.sum(e, 1)
            peak = new_peak
    return ahead, behind, ahead_by_score, peak, total


@triton.jit
def suffix_weight(relevance_ptr, i, left, ahead, start, stop, top, target, temperature, OBJECTIVE: tl.constexpr):
    """a_i: what the term of the suffix from i on is multiplied by."""
    if OBJECTIVE == "listmle":
        part = tl.where(ahead < stop - start - 1, left, 0.0)  # the last one's own term is 0
    elif OBJECTIVE == "contrastive":
        part = (ahead == 0).to(tl.float32)
    else:
        part = exp_below(value(relevance_ptr, i, stop), top, temperature) / target
    return part


@triton.jit
def prepare(
    of_list,
    share_ptr,
    cut,
    top,
    target,
    temperature,
    OBJECTIVE: tl.constexpr,
    WEIGHTING: tl.constexpr,
    TIES: tl.constexpr,
    SUFFIXES: tl.constexpr,
    I: tl.constexpr,
    J: tl.constexpr,
):
    """Writes level, part and log of every candidate to the work space.

    With SUFFIXES its logsumexp from there on, as the largest score and the log of the rest (a sum of the two would round away
    differences of large scores), and a, 0 if all of these scores are -inf. For pairs its rank by score (LambdaRank), or how
    many are before and after it by relevance.

    -> the ideal DCG, and numbers of candidates: without relevance or with wrong borders; with none before them; with none
    after them (of the best and the worst there are several only where ties are not ordered); that know how many are before
    and after them (all, unless some are tied).
    """
    scores_ptr, relevance_ptr, work_ptr, start, stop, S = of_list
    ideal = 0.0
    unknown = tl.zeros([I], tl.int32)
    num_best = tl.zeros([I], tl.int32)
    num_worst = tl.zeros([I], tl.int32)
    num_ranks = tl.zeros([I], tl.int32)
    for i0 in range(start, stop, I):
        i = i0 + tl.arange(0, I)
        g_i = tl.load(scores_ptr + i, mask=i < stop, other=-float("inf"))
        r_i = tl.load(relevance_ptr + i, mask=i < stop, other=0.0)
        share = tl.load(share_ptr + i, mask=i < stop, other=0.0)
        unknown += ((r_i != r_i) | (share != share)).to(tl.int32)
        left = tl.full([I], 1.0, tl.float32)
        if TIES == "efron":
            left = share_left(relevance_ptr, i, r_i, start, stop, I, J)
        ahead, behind, ahead_by_score, peak, total = compare_with_list(
            of_list, i, g_i, r_i, left, OBJECTIVE, TIES, SUFFIXES, I, J
        )
        if OBJECTIVE == "lambdarank":
            level = 1.0 + ahead_by_score.to(tl.float32)
            if WEIGHTING != "none":
                position = 1.0 + ahead.to(tl.float32)
                gain = gain_difference(value(relevance_ptr, i, stop), 0.0, top)
                ideal += tl.sum(tl.where((i < stop) & (position <= cut), gain * discount(position), 0.0))
            part = level
        elif OBJECTIVE == "pairwise":
            level = ahead.to(tl.float32)
            part = behind.to(tl.float32)
        else:
            level = peak
            tl.store(work_ptr + 2 * S + i, tl.log(total), mask=i < stop)
            part = suffix_weight(relevance_ptr, i, left, ahead, start, stop, top, target, temperature, OBJECTIVE)
            part = tl.where((peak == -float("inf")) & (total == 0.0), 0.0, part)
        tl.store(work_ptr + i, level, mask=i < stop)
        tl.store(work_ptr + S + i, part, mask=i < stop)
        if TIES == "skip" or TIES == "mean":
            num_best += ((i < stop) & (ahead == 0)).to(tl.int32)
            num_worst += ((i < stop) & (behind == 0)).to(tl.int32)
            num_ranks += ((i < stop) & (ahead + behind == stop - start - 1)).to(tl.int32)
    return ideal, tl.sum(unknown), tl.sum(num_best), tl.sum(num_worst), tl.sum(num_ranks)


@triton.jit
def add_suffix_gradient(d, of_list, i, g_i, r_i, OBJECTIVE: tl.constexpr, TIES: tl.constexpr, J: tl.constexpr):
    """d + the sum over j of a_j times the probability that i has among the suffix from j on."""
    _scores_ptr, relevance_ptr, work_ptr, start, stop, S = of_list
    for j0 in range(start, stop, J):
        j = j0 + tl.arange(0, J)
        r_j = tl.load(relevance_ptr + j, mask=j < stop, other=0.0)
        level_j = tl.load(work_ptr + j, mask=j < stop, other=1.0)
        part_j = tl.load(work_ptr + S + j, mask=j < stop, other=0.0)
        log_j = tl.load(work_ptr + 2 * S + j, mask=j < stop, other=0.0)
        in_suffix = (i < stop)[:, None] & (j < stop)[None, :]
        if OBJECTIVE == "listmle":
            in_suffix = in_suffix & in_rest(r_i[:, None], r_j[None, :], i[:, None], j[None, :], TIES)
        p = tl.exp2(((g_i[:, None] - level_j[None, :]) - log_j[None, :]) * LOG2E)
        if TIES == "efron":
            p *= tl.where(r_i[:, None] == r_j[None, :], part_j[None, :], 1.0)
        else:
            p *= part_j[None, :]
        d += tl.sum(tl.where(in_suffix & (part_j > 0)[None, :], p, 0.0), 1)
    return d


@triton.jit
def add_pair_terms(
    loss, d, of_list, of_i, cut, top, ideal, OBJECTIVE: tl.constexpr, WEIGHTING: tl.constexpr, I: tl.constexpr, J: tl.constexpr
):
    """-> loss + that of the pairs that i wins, d + the gradient of all pairs with i."""
    scores_ptr, relevance_ptr, work_ptr, start, stop, S = of_list
    i, g_i, r_i, level_i, part_i = of_i
    for j0 in range(start, stop, J):
        j = j0 + tl.arange(0, J)
        g_j = tl.load(scores_ptr + j, mask=j < stop, other=0.0)
        r_j = tl.load(relevance_ptr + j, mask=j < stop, other=0.0)
        level_j = tl.load(work_ptr + j, mask=j < stop, other=1.0)
        part_j = tl.load(work_ptr + S + j, mask=j < stop, other=0.0)
        real = (i < stop)[:, None] & (j < stop)[None, :]
        gap = g_j[None, :] - g_i[:, None]
        w = tl.full([I, J], 1.0, tl.float32)
        if OBJECTIVE == "pairwise":
            two = real & (i[:, None] != j[None, :])
            i_wins = two & (level_i == 0.0)[:, None] & (part_j == 0.0)[None, :]
            j_wins = two & (level_j == 0.0)[None, :] & (part_i == 0.0)[:, None]
        else:
            i_wins = real & (r_i[:, None] > r_j[None, :])
            j_wins = real & (r_i[:, None] < r_j[None, :])
            if WEIGHTING != "none":
                x_i, x_j = value(relevance_ptr, i, stop), value(relevance_ptr, j, stop)
                w = tl.abs(gain_difference(x_i[:, None], x_j[None, :], top)) / ideal
                w *= rank_change(level_i[:, None], level_j[None, :], cut, WEIGHTING)
        both_lost = (g_i == -float("inf"))[:, None] & (g_j == -float("inf"))[None, :]
        mute = both_lost | ((w == 0.0) & (tl.abs(gap) == float("inf")))
        i_wins = i_wins & ~mute
        j_wins = j_wins & ~mute
        term, up, down = logistic(gap)
        loss += tl.sum(tl.where(i_wins, w * term, 0.0), 1)
        d += tl.sum(tl.where(j_wins, w * down, 0.0) - tl.where(i_wins, w * up, 0.0), 1)
    return loss, d


@triton.jit(do_not_specialize=["S", "list_size", "k"])
def list_losses(
    scores_ptr,  # [S] float32: g
    cu_lists_ptr,  # [L+1] int64, or None: every list has list_size candidates
    relevance_ptr,  # [S] float64: close rewards keep their order
    loss_ptr,  # [L] float32
    share_ptr,  # [S] float32: dL/dl of each token of the candidate, NaN where its borders are wrong
    c_ptr,  # [S] float32: d loss / d l of each token of the candidate
    work_ptr,  # [3, S] float32, what the first phase leaves for the second
    S,
    list_size,
    beta,
    temperature,
    k,  # cut-off of the DCG, 0 for none
    OBJECTIVE: tl.constexpr,
    WEIGHTING: tl.constexpr,
    TIES: tl.constexpr,
    I: tl.constexpr,
    J: tl.constexpr,
):
    SUFFIXES: tl.constexpr = OBJECTIVE == "contrastive" or OBJECTIVE == "listmle" or OBJECTIVE == "listnet"
    lst = tl.program_id(0)
    start, stop, wrong = segment(cu_lists_ptr, list_size, lst, tl.num_programs(0), S)
    cut = tl.where(k == 0, stop - start, k).to(tl.float32)
    top = 0.0  # the largest relevance
    target = 0.0  # sum of exp((relevance - top) / temperature)
    if OBJECTIVE == "listnet" or WEIGHTING != "none":
        top = list_max(relevance_ptr, start, stop, I)
        if OBJECTIVE == "listnet":
            target = list_sum_exp(relevance_ptr, start, stop, top, temperature, I)
        else:
            top = tl.maximum(top, 0.0)  # of the terms 2^r and 1 of a gain
    of_list = (scores_ptr, relevance_ptr, work_ptr, start, stop, S)
    ideal, unknown, num_best, num_worst, num_ranks = prepare(
        of_list, share_ptr, cut, top, target, temperature, OBJECTIVE, WEIGHTING, TIES, SUFFIXES, I, J
    )
    tl.debug_barrier()
    ideal = tl.where(ideal == 0.0, 1.0, tl.abs(ideal))
    is_number = ~wrong & (start < stop) & (unknown == 0)
    orders = 1.0
    if TIES == "skip" or TIES == "mean":
        orders = tie_share(num_best, num_worst, num_ranks, stop - start, OBJECTIVE, TIES)
    loss = tl.zeros([I], tl.float32)
    for i0 in range(start, stop, I):
        i = i0 + tl.arange(0, I)
        g_i = tl.load(scores_ptr + i, mask=i < stop, other=0.0)
        r_i = tl.load(relevance_ptr + i, mask=i < stop, other=0.0)
        level_i = tl.load(work_ptr + i, mask=i < stop, other=1.0)
        part_i = tl.load(work_ptr + S + i, mask=i < stop, other=0.0)
        d = tl.zeros([I], tl.float32)
        if SUFFIXES:
            log_i = tl.load(work_ptr + 2 * S + i, mask=i < stop, other=0.0)
            own = part_i
            if TIES == "efron":
                own = (part_i > 0).to(tl.float32)
            loss += tl.where((i < stop) & (part_i > 0), own * ((level_i - g_i) + log_i), 0.0)
            d = add_suffix_gradient(d - own, of_list, i, g_i, r_i, OBJECTIVE, TIES, J)
        else:
            of_i = (i, g_i, r_i, level_i, part_i)
            loss, d = add_pair_terms(loss, d, of_list, of_i, cut, top, ideal, OBJECTIVE, WEIGHTING, I, J)
        share = tl.load(share_ptr + i, mask=i < stop, other=0.0)
        d = tl.where(orders > 0, orders * d, 0.0)
        tl.store(c_ptr + i, tl.where(is_number, beta * share * d, float("nan")), mask=i < stop)
    total_loss = tl.where(orders > 0, orders * tl.sum(loss), 0.0)
    tl.store(loss_ptr + lst, tl.where(is_number, total_loss, float("nan")))


@triton.jit
def share_left(relevance_ptr, i, r_i, start, stop, I: tl.constexpr, J: tl.constexpr):
    """1 - l / k for the l-th (from 0) of k candidates of equal relevance: what is left of them, on average, at its turn."""
    size = tl.zeros([I], tl.int32)
    earlier = tl.zeros([I], tl.int32)
    for j0 in range(start, stop, J):
        j = j0 + tl.arange(0, J)
        r_j = tl.load(relevance_ptr + j, mask=j < stop, other=0.0)
        tied = (j < stop)[None, :] & (r_j[None, :] == r_i[:, None])
        size += tl.sum(tied.to(tl.int32), 1)
        earlier += tl.sum((tied & (j[None, :] < i[:, None])).to(tl.int32), 1)
    return 1.0 - earlier.to(tl.float32) / tl.maximum(size, 1).to(tl.float32)


@triton.jit
def tie_share(num_best, num_worst, num_ranks, m, OBJECTIVE: tl.constexpr, TIES: tl.constexpr):
    """What a list's terms are multiplied by: one over the number of equally possible ones, or 0 for a list that is skipped."""
    if TIES == "skip":
        settled = num_best == 1
        if OBJECTIVE == "pairwise":
            settled = settled & (num_worst == 1)
        if OBJECTIVE == "listmle":
            settled = num_ranks == m
        share = settled.to(tl.float32)
    else:
        terms = num_best
        if OBJECTIVE == "pairwise":
            terms = num_best * num_worst - tl.where(num_best == m, m, 0)  # all tied: a candidate makes no pair with itself
        share = 1.0 / tl.maximum(terms, 1).to(tl.float32)
    return share


@triton.jit
def list_max(relevance_ptr, start, stop, M: tl.constexpr):
    """The largest relevance of candidates start:stop, as a number to compute with."""
    top = tl.full([M], -FINITE, tl.float64)
    for j0 in range(start, stop, M):
        j = j0 + tl.arange(0, M)
        top = tl.maximum(top, tl.where(j < stop, value(relevance_ptr, j, stop), -FINITE))
    return tl.max(top)


@triton.jit
def exp_below(x, top, temperature):
    """exp((x - top) / temperature) for x <= top, float32."""
    return tl.exp2((x - top).to(tl.float32) / temperature * LOG2E)


@triton.jit
def list_sum_exp(relevance_ptr, start, stop, top, temperature, M: tl.constexpr):
    total = tl.zeros([M], tl.float32)
    for j0 in range(start, stop, M):
        j = j0 + tl.arange(0, M)
        total += tl.where(j < stop, exp_below(value(relevance_ptr, j, stop), top, temperature), 0.0)
    return tl.sum(total)
