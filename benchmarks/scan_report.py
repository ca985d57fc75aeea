"""Tables and plots of what ``line_scan.py`` measured."""

from __future__ import annotations

from typing import Any

import plot

MIXERS = {"gspn2": "GSPN-2", "softmax": "softmax", "linear": "linear"}
LATENT_PIXELS = 16  # pixels of the picture along a token's side: autoencoder f8, patches of 2


def render(result: dict[str, Any]) -> str:
    """Markdown: every case against its targets, GSPN-1's scheme, the mixers, host and compile times."""
    return "\n\n".join([_head(result), _cases(result), _schemes(result), _mixers(result), _rest(result)])


def _head(result: dict[str, Any]) -> str:
    bandwidth = result["copy_bytes_per_second"] / 1e12
    return (
        f"{result['gpu']}, copy bandwidth {bandwidth:.2f} TB/s, {result['dtype']}, four directions, torch "
        f"{result['torch']}, commit {result['commit'][:8]}."
    )


def _cases(result: dict[str, Any]) -> str:
    names, two = ("forward", "backward"), any("apart" in row for row in result["cases"])
    head = [f"{name} ms | target | of copy" + (" | directions apart" if two else "") for name in names]
    lines = [f"| B, H, W, C | {' | '.join(head)} |", "|---" * (9 if two else 7) + "|"]
    for row in result["cases"]:
        cells = [", ".join(map(str, row["shape"]))]
        for name in names:
            target, other = row[f"{name}_target_ms"], row.get("apart", {}).get(f"{name}_ms")
            share = f"{row[f'{name}_share_of_copy']:.0%}"
            cells += [_judged(row[f"{name}_ms"], target), f"{target:.4g}", share]
            if two:
                cells.append("" if other is None else _judged(other, target))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", "Bold: the target is met."])


def _judged(took: float, target: float) -> str:
    return f"**{took:.4g}**" if took <= target else f"{took:.4g}"


def _schemes(result: dict[str, Any]) -> str:
    lines = [
        "| B, H, W, C | GSPN-1's scheme, forward ms | over ours | both passes, over ours |",
        "|---|---|---|---|",
    ]
    for row in result["cases"]:
        if scheme := row.get("gspn1_scheme"):
            both = (scheme["forward_ms"] + scheme["backward_ms"]) / (row["forward_ms"] + row["backward_ms"])
            shape, ratio = ", ".join(map(str, row["shape"])), scheme["forward_ms"] / row["forward_ms"]
            lines.append(f"| {shape} | {scheme['forward_ms']:.1f} | {ratio:.1f}x | {both:.1f}x |")
    return "\n".join(lines)


def _mixers(result: dict[str, Any]) -> str:
    width = result["mixers"]["width"]
    lines = [
        f"Whole mixers, {width:,} channels wide, with projections: GSPN-2, softmax and linear attention.",
        "",
        f"| tokens | {' | '.join(f'{name} ms' for name in MIXERS.values())} |",
        "|---" * (len(MIXERS) + 1) + "|",
    ]
    for row in result["mixers"]["rows"]:
        cells = [f"{row[f'{name}_ms']:.4g}" if f"{name}_ms" in row else "" for name in MIXERS]
        lines.append(f"| {row['tokens']:,} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _rest(result: dict[str, Any]) -> str:
    compiled, growth = result["compile_seconds"], result["growth_exponents"]
    parts = [
        f"Host time of a call: {result['host_microseconds']:.1f} us.",
        f"All {compiled['kernels']} kernels compile in {compiled['cold']:.1f} s and load from the disk cache "
        f"in {compiled['from_cache']:.2f} s.",
    ]
    if growth:
        parts.append(
            "From 512 to 4,096 positions a side at 48 channels the time grows with "
            f"pixels^{growth['forward']:.3f} forward and pixels^{growth['backward']:.3f} backward."
        )
    return " ".join(parts)


def reads(result: dict[str, Any]) -> str:
    """Markdown of a result of ``scan_reads.py``: shares of the copy bandwidth, at the better lookahead."""
    lines = [
        f"{result['gpu']}, commit {result['commit'][:8]}; shares of the copy bandwidth, "
        f"{result['copy_bytes_per_second'] / 1e12:.2f} TB/s.",
        "",
        "| layout | bytes of a position | of one direction | of one block | rows read | columns read | rows "
        "written | columns written |",
        "|---|---|---|---|---|---|---|---|",
    ]
    best: dict[tuple[Any, ...], dict[str, float]] = {}
    for row in result["rows"]:
        shares = best.setdefault((row["name"], row["pitch"], row["wanted"], row["piece"]), {})
        for way in ("read", "written"):
            share = row[f"{way}_bytes_per_second"] / result["copy_bytes_per_second"]
            name = f"{row['scans']} {way}"
            shares[name] = max(shares.get(name, 0.0), share)
    for layout, shares in best.items():
        found = [shares[f"{scans} {way}"] for way in ("read", "written") for scans in ("rows", "columns")]
        lines.append(f"| {' | '.join([*map(str, layout), *(f'{share:.0%}' for share in found)])} |")
    return "\n".join(lines)


def svg(result: dict[str, Any]) -> str:
    """Time of the mixers over pixels, and the share of the copy bandwidth of every case."""
    rows = result["mixers"]["rows"]
    mixers = {
        title: [
            (row["tokens"] ** 0.5 * LATENT_PIXELS, row[f"{name}_ms"]) for row in rows if f"{name}_ms" in row
        ]
        for name, title in MIXERS.items()
    }
    shares = {
        name: [
            (
                row["shape"][0] * row["shape"][1] * row["shape"][2] * row["shape"][3],
                row[f"{name}_share_of_copy"],
            )
            for row in result["cases"]
        ]
        for name in ("forward", "backward")
    }
    return plot.svg(
        [
            plot.Panel("one mixer: ms, by pixels of a side", mixers),
            plot.Panel("share of copy bandwidth, by elements of x", shares, joined=False),
        ]
    )
