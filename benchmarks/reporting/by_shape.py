"""Several recorded tables as one, as rows of text: a shape a row, the names first."""

from __future__ import annotations

from statistics import median

from benchmarks.reporting.tables import best, cells, duration, exponent, floor_seconds, ratio, relative, seconds, shown, size


def by_shape(tables: list[dict]) -> list[list[str]]:
    """Of one side and mode, or of small calls."""
    if tables[0].get("small"):
        return small_calls(tables)
    return prefix(tables) if tables[0]["side"] == "prefix" else heads(tables)


def prefix(tables: list[dict]) -> list[list[str]]:
    """Whole training steps: the prompt run once, against for each candidate."""
    names = ["prompt", "completion", "candidates", "separate", "shared", "speed-up", "bound", "share of the bound"]
    found = [[*names, "peak, separate", "peak, shared", "logps", "d weights"]]
    for t in tables:
        rows = {row["provider"].split()[0]: row for row in t["rows"]}
        if rows.keys() >= {"separate", "ours"}:
            apart, shared = (cells(t, rows[name]) for name in ("separate", "ours"))
            gain = [shared[name] for name in (*names[5:], "logps", "d weights")]
            peaks = [apart["peak"], shared["peak"]]
            found.append([str(t["P"]), str(t["R"]), str(t["m"]), apart["time"], shared["time"], *gain[:3], *peaks, *gain[3:]])
    return found


def heads(tables: list[dict]) -> list[list[str]]:
    """Each of our schedules against others on the same case: their times and peaks as multiples of ours."""
    others = {"torch.compile": "torch.compile", "eager": "eager", "TRL": "trl fused head"}
    times = (f"{name} / ours" for name in ("GEMMs alone", *others))
    theirs = "torch.compile's"
    names = ["beyond gradients", theirs, "eager's", "logps", theirs, "d hidden", theirs]
    found = [["case", "schedule", "time", "GFLOP/s", *times, *names]]
    for t in tables:
        rows = {row["group"] or row["provider"]: row for row in shown(t) if row["status"] == "ok" and row["seconds"]}
        for row in rows.values():
            if not row["provider"].startswith("ours"):
                continue
            text, compiled = cells(t, row), rows.get("torch.compile")
            alone = floor_seconds(t, row["gemms"])
            times = [alone and alone / seconds(row)]
            times += [relative(rows[name], row) if name in rows else None for name in others.values()]
            schedule = row["provider"].removeprefix("ours ").split()[0]
            once = " (1 run)" if row["one_run"] else ""
            found.append(
                [t["case"], schedule, duration(seconds(row)) + once, text["GFLOP/s"]]
                + [ratio(time) for time in times]
                + [beyond(t, x) for x in (row, compiled, rows.get("eager"))]
                + [exponent(x, name) if x else "" for name in ("logps", "d_hidden") for x in (row, compiled)]
            )
    return found


def schedules(rows: list[dict], *, launches: bool = False) -> list[list[str]]:
    """Of gpu_check's step "head": each schedule, forward and backward, against its GEMMs alone."""
    names = ["tokens x H x V", "schedule", "time", "its GEMMs alone", "time / GEMMs alone", "TFLOP/s", "peak"]
    found = [[*names, *(["launch", "on the host"] if launches else [])]]
    for r in rows:
        times = [duration(r["seconds"]), duration(r["GEMMs alone"]), f"{r['time / GEMMs alone']:.3f}"]
        line = [head_shape(r), f"`{r['schedule']}`", *times, f"{r['TFLOP/s']:.0f}", size(r["peak bytes"])]
        found.append([*line, *([r["launch"], duration(r["on the host"])] if launches else [])])
    return found


def head_shape(row: dict) -> str:
    ignored = f" - {row['ignored']}" if row["ignored"] else ""
    return f"{row['T']}{ignored} x {row['H']} x {row['V']}"


def small_calls(tables: list[dict]) -> list[list[str]]:
    """Best and median of the call a user makes, of eager and of a plain Function; ratios are of the best."""
    on_gpu = tables[0]["device"] == "cuda"
    times = [x for name in ("ours", "eager", "plain Function") for x in (f"{name}, best", "median")]
    names = ["candidates x tokens x V", "from", *times, "ours / eager", "ours / plain Function"]
    names += ["kernels, ours", "eager's"] if on_gpu else []
    found = [[*names, "logps", "eager's", "gradient", "eager's", "peak", "eager's"]]
    for t in tables:
        rows = {row["provider"]: row for row in t["rows"] if row["status"] == "ok" and row["seconds"]}
        kernels = "triton" if on_gpu else "torch"
        # older records measured the schedule that auto took, not auto
        called = ("ours auto", f"ours {t['plan'].split(',')[0]}") if t["plan"] else ("ours",)
        ours = next((rows[f"{name} ({kernels})"] for name in called if f"{name} ({kernels})" in rows), None)
        eager, plain = rows.get("eager"), rows.get("plain Function")
        if ours and eager:
            found.append(
                [f"{t['candidates']} x {t['T'] // t['candidates']} x {t['V']}", "hidden" if t["plan"] else "logits"]
                + [f(row) for row in (ours, eager, plain) for f in (_best, _median)]
                + [ratio(other and best(ours) / best(other)) for other in (eager, plain)]
                + [duration(row["kernel_seconds"]) for row in (ours, eager) if on_gpu]
                + [exponent(row, "logps") for row in (ours, eager)]
                + [_worst_gradient(row) for row in (ours, eager)]
                + [size(row["peak_bytes"]) for row in (ours, eager)]
            )
    return found


def _best(row: dict | None) -> str:
    return duration(row and best(row))


def _median(row: dict | None) -> str:
    return duration(row and seconds(row))


def _worst_gradient(row: dict) -> str:
    worst = max((name for name in row["errors"] if name.startswith("d_")), key=lambda name: row["errors"][name] or float("inf"))
    return exponent(row, worst)


def first_calls(rows: list[dict]) -> list[list[str]]:
    """Medians over fresh processes."""
    found = [["first call of a process", "import", "first call", "second call", "imports torch._dynamo"]]
    for row in rows:
        times = [duration(median(row[name])) for name in ("import_s", "first_s", "second_s")]
        found.append([row["call"], *times, "yes" if row["dynamo"] else "no"])
    return found


def beyond(table: dict, row: dict | None) -> str:
    """Peak memory beyond the gradients."""
    peak = row and row["peak_bytes"]
    return "" if peak is None else size(max(0, peak - table["gradient_bytes"]))
