"""Several recorded tables as one, as rows of text: a shape a row, the names first."""

from __future__ import annotations

from benchmarks.reporting.tables import cells, duration, exponent, floor_seconds, ratio, seconds, shown, size


def by_shape(tables: list[dict]) -> list[list[str]]:
    """Of one side and mode."""
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
    others = {"GEMMs alone": None, "torch.compile": "torch.compile", "eager": "eager", "TRL": "trl fused head"}
    times = (f"{name} / ours" for name in others)
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
            times = [seconds(rows[name]) if name in rows else None for name in others.values() if name]
            schedule = row["provider"].removeprefix("ours ").split()[0]
            once = " (1 run)" if row["one_run"] else ""
            found.append(
                [t["case"], schedule, duration(seconds(row)) + once, text["GFLOP/s"]]
                + [ratio(other and other / seconds(row)) for other in (alone, *times)]
                + [beyond(t, x) for x in (row, compiled, rows.get("eager"))]
                + [exponent(x, name) if x else "" for name in ("logps", "d_hidden") for x in (row, compiled)]
            )
    return found


def beyond(table: dict, row: dict | None) -> str:
    """Peak memory beyond the gradients."""
    peak = row and row["peak_bytes"]
    return "" if peak is None else size(max(0, peak - table["gradient_bytes"]))
