"""What a step sends: the reading of XLA's text, the targets on a small model, and the command."""

import json
import re
from pathlib import Path

import pytest

from benchmarks.scaling import __main__ as scaling
from benchmarks.scaling import experiment
from benchmarks.scaling import report as scaling_report
from benchmarks.scaling.collectives import Collective, read_collectives, ring_bytes
from benchmarks.scaling.programs import LAYOUTS, Size, build, methods

SMALL = Size(layers=2, width=32, rank=4, batch=16)

TEXT = """\
HloModule jit_step, is_scheduled=true

%add (x: f32[], y: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%x, %y)
}

ENTRY %main (p: f32[4,16]) -> f32[4,16] {
  %all-reduce.4 = (f32[4,16]{1,0}, bf16[3]{0}, /*index=2*/f32[]) all-reduce(%a, %b, %c)
  %all-gather = f32[16,4]{1,0} all-gather(%p), dimensions={0}
  %reduce-scatter.1 = f32[2,4]{1,0:T(8,128)} reduce-scatter(%all-gather), dimensions={0}
  %start = (f32[4]{0}, f32[16]{0}) all-gather-start(%d), dimensions={0}
  %all-gather-done = f32[16]{0} all-gather-done(%start)
  %cps = (pred[6]{0}, pred[6]{0}, u32[], u32[]) collective-permute-start(%e)
  ROOT %get = f32[4,16]{1,0} get-tuple-element(%all-reduce.4), index=0
}
"""


def test_collectives_are_read_with_the_shapes_of_whole_arrays():
    assert read_collectives(TEXT, devices=4) == [
        Collective(0, "all-reduce", "f32", (4, 16)),
        Collective(0, "all-reduce", "bf16", (3,)),
        Collective(0, "all-reduce", "f32", ()),
        Collective(1, "all-gather", "f32", (16, 4)),
        Collective(2, "reduce-scatter", "f32", (8, 4)),
        Collective(3, "all-gather", "f32", (16,)),
        Collective(4, "collective-permute", "pred", (6,)),
    ]


def test_bytes_and_what_a_ring_sends_of_them():
    found = read_collectives(TEXT, devices=4)
    assert [item.bytes for item in found] == [256, 6, 4, 256, 128, 64, 6]
    expected = 2 * 0.75 * (256 + 6 + 4) + 0.75 * (256 + 128 + 64) + 6
    assert ring_bytes(found, devices=4) == expected


def test_a_collective_in_a_loop_is_not_counted_once():
    loop = TEXT.replace("ENTRY %main", "%body").replace("is_scheduled=true", "")
    with pytest.raises(ValueError, match="outside of the entry computation"):
        read_collectives(loop, devices=4)


@pytest.fixture(scope="module")
def rows():
    return {
        (layout, method, devices): experiment.count(
            build(layout, method, devices, SMALL), layout, method, devices
        )
        for layout in LAYOUTS
        for method in methods(layout)
        for devices in (2, 4)
    }


@pytest.mark.parametrize("devices", [2, 4])
def test_data_parallel_bytes(rows, devices):
    gradient = 4 * SMALL.parameters
    for layout in ("jit", "shard_map"):
        sent = {m: rows[layout, m, devices]["bytes"] for m in methods(layout)}
        assert sent.pop("sam") == 2 * gradient
        if layout == "jit":
            assert sent.pop("trace_sam") == 2 * gradient
        else:
            assert "sam_per_device" in sent
        assert set(sent.values()) == {gradient}


def skip_unless_combined(rows):
    """How many collectives there are is XLA's choice; how many bytes is not."""
    if rows["jit", "sgd", 2]["collectives"] > 1:
        pytest.skip("this version of XLA gives each array an all-reduce of its own")


def test_one_all_reduce_a_step_and_two_for_synchronized_sam(rows):
    skip_unless_combined(rows)
    for (layout, method, _), row in rows.items():
        if layout in ("jit", "shard_map"):
            assert row["collectives"] == (2 if method == "sam" else 1)


@pytest.mark.parametrize("devices", [2, 4])
@pytest.mark.parametrize("layout", ["fsdp", "tensor"])
@pytest.mark.parametrize("method", ["nbar", "obar", "das"])
def test_balancing_adds_norms_alone_where_parameters_are_sharded(rows, layout, method, devices):
    row, base = rows[layout, method, devices], rows[layout, "sgd", devices]
    assert scaling_report.norm_collectives(base) == 0
    # Two norms a factor, each a scalar or a sum a row of a factor with `rank` rows.
    largest = 2 * 4 * SMALL.layers * (1 + SMALL.rank)
    assert 0 < row["bytes"] - base["bytes"] <= largest


def test_the_targets_are_met_and_would_not_be_with_more(rows):
    skip_unless_combined(rows)
    found = scaling_report.targets(list(rows.values()))
    assert len(found) == 15
    assert {target.verdict for target in found} == {"met"}
    broken = [dict(row) for row in rows.values()]
    for row in broken:
        if row["method"] == "sam_per_device":
            row["bytes"] += 4
        if row["method"] == "das":
            row["arrays"] = [*row["arrays"], Collective(99, "all-reduce", "f32", (8, 8))._asdict()]
    bad = [t.claim for t in scaling_report.targets(broken) if t.verdict != "met"]
    assert len(bad) == 3  # per-device SAM, and DAS under both shardings
    assert sum("das" in claim for claim in bad) == 2


@pytest.mark.slow
def test_the_command_writes_its_files(tmp_path, capsys):
    command = ["--devices", "1,2", "--width", "16", "--layers", "1", "--out", str(tmp_path)]
    assert scaling.main([*command, "--time", "--rounds", "2"]) == 0
    for name in ("results.json", "results.csv", "summary.md", "bytes.png"):
        assert (tmp_path / name).stat().st_size > 0
    results = json.loads((tmp_path / "results.json").read_text())
    assert all(time["seconds"] > 0 for time in results["times"])
    assert {time["devices"] for time in results["times"]} == {1, 2}
    text = capsys.readouterr().out
    assert "times say nothing about scaling" in text
    assert "| per-device SAM moves exactly SGD's bytes" in text


def test_the_documentations_table_is_what_its_code_computes():
    page = (Path(scaling.__file__).parents[2] / "docs" / "scaling.md").read_text(encoding="utf-8")
    namespace = {}
    for code in re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL):
        exec(code, namespace)
    assert f"\n\n{namespace['table']}\n\n" in page
    # And its formula is that of the benchmark.
    gradient = [Collective(0, "all-reduce", "f32", (1000,))]
    seconds = namespace["ring_seconds"](1000, devices=8, bandwidth=1.0)
    assert seconds == pytest.approx(ring_bytes(gradient, devices=8))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--devices", "0"], "--devices '0' must be whole numbers"),
        (["--devices", "3"], "--width 256 must be a multiple of --devices 3"),
        (["--devices", "64"], "--devices 64 needs as many devices"),
        (["--rounds", "0"], "--rounds must be 1 or more, got 0"),
    ],
)
def test_misuse_is_one_line(tmp_path, capsys, more, message):
    assert scaling.main([*more, "--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1
