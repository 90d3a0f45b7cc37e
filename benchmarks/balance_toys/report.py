"""The tables of `benchmarks.balance_toys`, from its record alone.

python -m benchmarks.balance_toys.report DIR [DIR ...]
"""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.core import command, frames, records
from benchmarks.core.frames import number
from benchmarks.models import toys as problems
from benchmarks.models.toys import BAR_ALPHA

_NOTES = f"""\
`||P - T||^2` is the loss without noise: the product's squared distance from its target. *Steps to
half*: the first record with half of the imbalance at the start, the median over seeds, or a dash
where most seeds never have it. *Collapsed*: the cores shrank to less than a tenth of their
squared norms, so that balance means nothing there. *Rises*: the imbalance ends at least 1 % above
its start. The references were measured independently, with other random numbers.

SAM has the radius rho of the toy's paper and DAS `alpha = rho`, constant. nBAR and oBAR have
`alpha_0 = {BAR_ALPHA}`, the smallest of their paper's 0.5, 1 and 2, with linear decay to 0 over the
run.
"""

# What the runs of full length show, and why.
_COMMENTS = {
    "nop": """\
SGD keeps `|B|`; SAM cuts it the faster the louder the noise. Without noise SAM, nBAR and DAS first
cut it and then *raise* it above its start: they go by the gradients' norms, and by then the larger
core has the larger gradient. For the same reason they do not aim at `B = 0` under noise: at the
minimum both cores have equal expected gradient norms at `|B| = {rest:.3f}` (dotted in the figure),
near which nBAR and DAS stay. oBAR, which compares the norms of the cores themselves, goes to 0 at
every noise level. At `a = 2` SAM shrinks both cores to 0, and its `B` of 0 is no balance; nBAR,
oBAR and DAS do not shrink them.
""",
    "op": """\
nBAR and oBAR are the same method on this loss. SAM collapses under the loudest noise. DAS is drawn
to 0 at every level, without noise too (where it is just leaving again at the end): the start has
`x^T y < 0`, so that `x` must pass through 0, but DAS has `||x||^2` in the denominator of its rate
and holds `x` at a norm of about `alpha / 2`, while `y` shrinks until `x = -y`, from where the
gradient leads to the saddle at 0. From `y = +3 x`, or with half the alpha and `a` up to 1, it
reaches the target.
""",
    "tucker_large_core": """\
The covariance of the cores' squared norms with those of their gradients is negative, and `Q` falls:
DAS follows SAM without SAM's second gradient. What SGD loses is due to its step size; in the limit
of small steps it conserves `Q`.
""",
    "tucker_small_core": """\
With the norms the other way round the covariance is positive after the first steps, and both SAM
and DAS *raise* `Q`: they are not balancing methods whatever the problem.
""",
}


def write(folder: Path) -> str:
    """Writes `summary.md` and `results.csv` from `results.json`; returns the summary."""
    record = records.read_record(folder / "results.json")
    parts = [
        f"Norm balancing on toys: {record['settings']['seeds']} seeds, float64, "
        f"{record['hardware']['device']}, {frames.software(record, 'jax', 'optax')}.",
        _NOTES.strip(),
    ]
    full = problems.toys()
    for name, toy in record["toys"].items():
        rows = [row for row in record["results"] if row["toy"] == name]
        symbol = "|B|" if len(full[name].start) == 2 else "Q"
        parts += [
            f"### {name}",
            f"eta {toy['learning_rate']:g}, rho {toy['rho']:g}, {toy['steps']:,} steps.",
        ]
        if toy["steps"] == full[name].steps:
            parts.append(_COMMENTS[name].format(rest=toy["rest"]).strip())
        parts.append(frames.markdown([_cells(row) for row in rows], _header(symbol, rows)))
    text = "\n\n".join(parts) + "\n"
    frames.write(folder, {"summary.md": text, "results.csv": frames.csv(record["results"])})
    return text


def _header(symbol: str, rows: list[dict[str, Any]]) -> list[str]:
    return [
        "method",
        "noise a",
        f"`{symbol}` at the end (start {rows[0]['start']:.3g})",
        "reference",
        "steps to half",
        "reference",
        "`||P - T||^2` at the end",
        "remark",
    ]


def _cells(row: Mapping[str, Any]) -> list[str]:
    deviation = "" if row["end_std"] is None else f" ± {row['end_std']:.1g}"
    remark = "rises" if row["end"] > 1.01 * row["start"] else ""
    return [
        row["method"],
        f"{row['noise']:g}",
        f"{row['end']:.3g}{deviation}",
        number(row["reference_end"], ".3f", missing=""),
        number(row["steps_to_half"], ",.0f"),
        number(row["reference_steps_to_half"], ",.0f", missing=""),
        f"{row['distance']:.2g}",
        "collapsed" if row["collapsed"] else remark,
    ]


if __name__ == "__main__":
    sys.exit(command.report(write, "benchmarks.balance_toys.report"))
