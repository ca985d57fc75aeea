"""What the rows of ``training.py`` say: ratios, what was asked for, and the tables of docs/training.md."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Row = dict[str, Any]

KEY = ("model", "pixels", "mixer", "compiled", "processes", "fsdp2", "memory_cap_gib")
SPEEDUPS = {1024: 1.0, 16384: 1.5}  # tokens -> how much faster than softmax attention
DATA_WAIT = 0.05
SCALING = 1.85
GAP_CLOSED = 0.8


def _plain(row: Row) -> bool:
    return "seconds_per_step" in row and not row["fsdp2"] and row["memory_cap_gib"] is None


def comparisons(rows: list[Row]) -> list[Row]:
    """GSPN-2 against softmax attention, from one run on one GPU."""
    alone = [row for row in rows if _plain(row) and row["processes"] == 1]
    known = {(row["model"], row["pixels"], row["compiled"], row["mixer"], row["run"]): row for row in alone}
    found = []
    for (model, pixels, compiled, mixer, run), row in known.items():
        other = known.get((model, pixels, compiled, "softmax", run))
        if mixer != "gspn2" or other is None:
            continue
        speedup, wanted = (
            row["pictures_per_second"] / other["pictures_per_second"],
            SPEEDUPS.get(row["tokens"]),
        )
        judged = {} if wanted is None else {"wanted": wanted, "met": speedup >= wanted}
        same = {name: row[name] for name in ("model", "pixels", "tokens", "compiled")}
        found.append({**same, "speedup": speedup, **judged})
    return found


def scaling(rows: list[Row]) -> list[Row]:
    """DDP on several GPUs against one, at the same batch per GPU, of one commit."""
    plain = [row for row in rows if _plain(row)]
    place = ("model", "pixels", "mixer", "compiled", "batch_per_gpu", "commit")
    alone = {tuple(row[name] for name in place): row for row in plain if row["processes"] == 1}
    found = []
    for row in plain:
        one = alone.get(tuple(row[name] for name in place))
        if row["processes"] == 1 or one is None:
            continue
        speedup = row["pictures_per_second"] / one["pictures_per_second"]
        wanted = SCALING * row["processes"] / 2
        judged = {"speedup": speedup, "wanted": wanted, "met": speedup >= wanted}
        found.append({**{name: row[name] for name in place}, "processes": row["processes"], **judged})
    return found


def capped(rows: list[Row]) -> list[Row]:
    """What trains under FSDP2 within a memory that one GPU alone cannot do with."""
    found = []
    for row in rows:
        if not row["fsdp2"] or row["memory_cap_gib"] is None:
            continue
        place = ("model", "pixels", "mixer", "compiled", "memory_cap_gib")
        others = [
            other
            for other in rows
            if other["processes"] == 1 and all(other[name] == row[name] for name in place)
        ]
        if others:
            alone = others[0]
            found.append(
                {
                    **{name: row[name] for name in place},
                    "processes": row["processes"],
                    "shared_gpu": row.get("shared_gpu", False),
                    "alone": alone.get("error", "trains"),
                    "fsdp2": row.get("error", "trains"),
                    "memory_gib": row.get("memory_gib"),
                    "met": "error" in alone and "error" not in row,
                }
            )
    return found


def summary(rows: list[Row]) -> dict[str, Any]:
    """Everything that follows from the rows."""
    waits = [row["data_wait"] for row in rows if _plain(row)]
    return {
        "comparisons": comparisons(rows),
        "scaling": scaling(rows),
        "capped": capped(rows),
        "most_data_wait": max(waits, default=None),
        "data_wait_met": max(waits, default=1.0) < DATA_WAIT,
    }


def _place(row: Row) -> str:
    kind = "compiled" if row["compiled"] else "eager"
    return f"{row['model']} | {row['pixels']} | {(row['pixels'] // 16) ** 2} | {kind}"


def _commits(rows: list[Row]) -> str:
    """Where rows were measured; those with a cap on memory, where it was elsewhere, by themselves."""
    made: dict[bool, list[str]] = {}
    for row in rows:
        made.setdefault(row["memory_cap_gib"] is not None, []).append(row["commit"][:8])
    names = {kind: ", ".join(dict.fromkeys(commits)) for kind, commits in made.items()}
    if len(set(names.values())) == 1:
        return f"commit {next(iter(names.values()))}"
    return f"commit {names[False]} (memory capped: {names[True]})"


def render(result: Row) -> str:
    """Markdown of a result file."""
    rows = result["rows"]
    lines = [f"{result['gpu']}, torch {result['torch']}, {_commits(rows)}; batch per GPU.", ""]
    lines += _speed_table(rows)
    for title, table in (("Several GPUs, DDP", _scaling_table), ("Memory capped", _capped_table)):
        found = table(rows)
        if found:
            lines += ["", f"{title}:", "", *found]
    return "\n".join(lines)


def _speed_table(rows: list[Row]) -> list[str]:
    lines = [
        "| model | pixels | tokens | | mixer | batch | pictures/s | ms | memory | data wait | faster |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    ratios = {(c["model"], c["pixels"], c["compiled"]): c["speedup"] for c in comparisons(rows)}
    alone = [row for row in rows if row["processes"] == 1 and row["memory_cap_gib"] is None]
    order: Callable[[Row], Any] = lambda row: (row["model"], row["compiled"], row["pixels"], row["mixer"])  # noqa: E731
    for row in sorted(alone, key=order):
        if "error" in row:
            lines.append(f"| {_place(row)} | {row['mixer']} | | {row['error'].split(':')[0]} | | | | |")
            continue
        ratio = ratios.get((row["model"], row["pixels"], row["compiled"]))
        faster = f"{ratio:.2f}x" if ratio and row["mixer"] == "gspn2" else ""
        lines.append(
            f"| {_place(row)} | {row['mixer']} | {row['batch_per_gpu']} | {row['pictures_per_second']:.1f} | "
            f"{row['seconds_per_step'] * 1e3:.1f} | {row['memory_gib']:.1f} GiB | {row['data_wait']:.1%} | "
            f"{faster} |"
        )
    return lines


def _scaling_table(rows: list[Row]) -> list[str]:
    found = scaling(rows)
    if not found:
        return []
    lines = ["| model | pixels | tokens | | mixer | GPUs | times faster |", "|---|---|---|---|---|---|---|"]
    return lines + [
        f"| {_place(row)} | {row['mixer']} | {row['processes']} | {row['speedup']:.2f} |" for row in found
    ]


def _capped_table(rows: list[Row]) -> list[str]:
    found = capped(rows)
    if not found:
        return []
    lines = ["| model | pixels | tokens | | cap | one GPU | FSDP2 |", "|---|---|---|---|---|---|---|"]
    for row in found:
        used = f", {row['memory_gib']:.1f} GiB" if row["memory_gib"] is not None else ""
        alone, split = (text.split(":")[0] for text in (row["alone"], row["fsdp2"]))
        where = f"on {row['processes']} GPUs"
        if row["shared_gpu"]:
            where = f"in each of {row['processes']} processes, on one GPU"
        lines.append(f"| {_place(row)} | {row['memory_cap_gib']:g} GiB | {alone} | {split}{used} {where} |")
    return lines


def distillation(result: Row) -> str:
    """Markdown of a result of ``distillation.py``."""
    lines = [
        f"{result['gpu']}, torch {result['torch']}, commit {result['rows'][-1]['commit'][:8]}.",
        "",
        "| minutes | validation on | teacher | stage 0 | gap closed |",
        "|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        for name, share in row["gap_closed"].items():
            teacher, untrained = (row["ends"][end][f"val_{name}"] for end in ("teacher", "untrained"))
            lines.append(
                f"| {row['seconds'] / 60:.1f} | {name.replace('_', ' ')} | {teacher:.4f} | {untrained:.4f} | "
                f"{share:.1%} |"
            )
    return "\n".join(lines)
