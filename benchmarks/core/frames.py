"""Tables by pandas: means over seeds, how they are shown, Markdown and CSV."""

import json
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import tabulate

from benchmarks.core import records
from benchmarks.core.records import Record

Row = dict[str, Any]

tabulate.MIN_PADDING = 0  # or columns are wider than their header
_CELLS = tabulate.DataRow("| ", " | ", " |")
_RULE = tabulate.Line("| ", "-", " | ", " |")
_FORMAT = tabulate.TableFormat(None, _RULE, None, None, _CELLS, _CELLS, 0, None)


def markdown(rows: Iterable[Any], header: list[str] | None = None) -> str:
    """Returns a Markdown table of rows of texts; what a row lacks is a dash.

    Args:
        rows: By column; or in order, where names come twice.
        header: In that case, the columns' names.
    """
    frame = pd.DataFrame(list(rows), columns=header, dtype=object).fillna("-")
    frame = frame.replace(r"\|", r"\|", regex=True).rename(
        columns=lambda name: name.replace("|", r"\|")
    )
    # `disable_numparse`: numbers are texts by now, with the digits that they are to have.
    return frame.to_markdown(index=False, tablefmt=_FORMAT, disable_numparse=True)


def cross(rows: Iterable[Row], column: Callable[[Row], str], cell: Callable[[Row], str]) -> str:
    """Returns a Markdown table of texts: one line per method, columns by what `column` says."""
    lines: dict[str, dict[str, str]] = {}
    for row in rows:
        lines.setdefault(row["method"], {"method": row["method"]})[column(row)] = cell(row)
    return markdown(lines.values())


def csv(rows: Iterable[Mapping[Any, Any]]) -> str:
    """Returns a CSV file of rows; what a row lacks is empty."""
    return pd.DataFrame(list(rows), dtype=object).to_csv(index=False, lineterminator="\n")


def line(record: Record, **more: Any) -> Row:
    """Returns a run's configuration, final metrics and hardware, as a line of a CSV file."""
    return {
        **record["config"],
        "hyperparameters": settings(record["config"]["hyperparameters"]),
        **record["final"],
        **more,
        **{key: record["hardware"][key] for key in ("backend", "device", "count")},
    }


def by_seed(seeds: Mapping[int, Record], value: Callable[[Record], float | None]) -> pd.Series:
    """Returns a number of each run, by seed."""
    return pd.Series({seed: value(record) for seed, record in seeds.items()}, dtype=float)


def numbers(
    seeds: Mapping[int, Record], read: Callable[[Record], Mapping[str, Any]]
) -> dict[str, pd.Series]:
    """Returns numbers of each run by name, each by seed."""
    rows = {seed: read(record) for seed, record in seeds.items()}
    frame = pd.DataFrame.from_dict(rows, orient="index", dtype=float)
    return {str(name): frame[name] for name in frame}


def spread(values: pd.Series | Sequence[float | None]) -> dict[str, Any]:
    """Returns mean and standard deviation, None where a value is missing or one seed has none."""
    values = pd.Series(values, dtype=float)
    mean, std = values.mean(skipna=False), values.std(skipna=False)
    return {"mean": _known(mean), "std": _known(std), "seeds": len(values)}


def paired(values: pd.Series, baseline: pd.Series) -> dict[str, Any]:
    """Returns the mean difference over the common seeds and its standard error."""
    common = values.index.intersection(baseline.index)
    found = values[common] - baseline[common]
    error = found.sem(skipna=False) if found.notna().all() else None
    return {
        "mean": _known(found.mean(skipna=False)),
        "standard_error": _known(error),
        "seeds": len(found),
    }


def resolved(found: Mapping[str, Any]) -> int:
    """Returns the sign of a difference that is more than two standard errors from 0, else 0."""
    mean, error = found["mean"], found["standard_error"]
    if mean is None or error is None or abs(mean) <= 2 * error:
        return 0
    return 1 if mean > 0 else -1


def _known(value: Any) -> float | None:
    return None if pd.isna(value) else float(value)


def number(value: float | None, form: str = "", missing: str = "-") -> str:
    """Formats a number, or says that it is missing."""
    return missing if value is None else format(value, form)


def percent(spread: Mapping[str, Any] | None) -> str:
    """Formats a spread of fractions in percent."""
    return _with_error(spread, "std", 100, ".2f", ".2f")


def difference(found: Mapping[str, Any] | None) -> str:
    """Formats a paired difference of fractions in points."""
    return _with_error(found, "standard_error", 100, "+.2f", ".2f")


def mean_std(found: Mapping[str, Any] | None, form: str = ".3g", error_form: str = ".2g") -> str:
    """Formats a spread."""
    return _with_error(found, "std", 1, form, error_form)


def _with_error(
    found: Mapping[str, Any] | None, error: str, scale: float, form: str, error_form: str
) -> str:
    if found is None or found["mean"] is None:
        return "-"
    text = f"{scale * found['mean']:{form}}"
    return text if found[error] is None else f"{text} ± {scale * found[error]:{error_form}}"


def settings(hyperparameters: Mapping[str, float]) -> str:
    """Formats hyper-parameters."""
    return " ".join(f"{key}={value:g}" for key, value in hyperparameters.items())


def all_settings(runs: records.Runs) -> str:
    """Formats the hyper-parameters of all methods that have some."""
    configs = [next(iter(seeds.values()))["config"] for seeds in runs.values()]
    return "; ".join(
        f"{config['method']}: {settings(config['hyperparameters'])}"
        for config in configs
        if config["hyperparameters"]
    )


def made_on(record: Record, *packages: str) -> str:
    """Says which hardware and versions a record was made with."""
    hardware = record["hardware"]
    unit = "core(s)" if hardware["backend"] == "cpu" else "device(s)"
    return f"{hardware['device']}, {hardware['count']} {unit}; {software(record, *packages)}"


def software(record: Record, *packages: str) -> str:
    """Lists the versions of packages, of those that a record has."""
    versions = record["versions"]
    return ", ".join(f"{name} {versions[name]}" for name in packages if name in versions)


def seeds_of(runs: Iterable[Mapping[int, Record]]) -> str:
    """Lists the seeds of all methods."""
    return ", ".join(map(str, sorted({seed for seeds in runs for seed in seeds})))


def fill(*notes: str) -> list[str]:
    """Wraps paragraphs for a Markdown file, without the empty ones."""
    return [textwrap.fill(note, 100) for note in notes if note]


def write(folder: Path, files: Mapping[str, Any]) -> None:
    """Writes texts, and data as JSON, to files of these names."""
    for name, content in files.items():
        text = content if isinstance(content, str) else json.dumps(content, indent=1) + "\n"
        records.write_text(folder / name, text)
