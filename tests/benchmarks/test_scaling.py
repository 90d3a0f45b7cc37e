"""Programs at scale: the reading of XLA's text, what methods compute and send, the command."""

import importlib.util
import json
import re

import jax
import jax.numpy as jnp
import pytest

from benchmarks.core import hlo
from benchmarks.core.hlo import Collective
from benchmarks.scaling import __main__ as scaling
from benchmarks.scaling import experiment, programs, workloads
from benchmarks.scaling import report as scaling_report
from benchmarks.scaling.experiment import Run, measure, search

TEXT = """\
HloModule jit_step, is_scheduled=true

%add (x: f32[], y: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%x, %y)
}

%condition (carry: (s32[], f32[4])) -> pred[] {
  %bound = s32[]{:T(128)} constant(7)
  %carry.1 = (s32[]{:T(128)}, f32[4]{0:T(128)}) parameter(0)
  %count = s32[]{:T(128)} get-tuple-element(%carry.1), index=0
  ROOT %less = pred[]{:T(512)} compare(%count, %bound), direction=LT
}

%body (carry: (s32[], f32[4])) -> (s32[], f32[4]) {
  %fused = f32[4]{0} fusion(%get), kind=kCustom, calls=%all-reduce-scatter.3
  %go = (f32[4]{0}, f32[4]{0}) fusion(%fused), kind=kLoop, calls=%piece
  %by = s32[]{:T(128)} constant(STEP)
  %was = s32[]{:T(128)} get-tuple-element(%carry), index=0
  %next = s32[]{:T(128)} add(%was, %by)
  ROOT %both = (s32[], f32[4]{0}) tuple(%next, %fused)
}

%all-reduce-scatter.3 (p: f32[16]) -> f32[4] {
  %all-reduce.9 = f32[16]{0} all-reduce(%p), replica_groups=mesh['a'=4,'b'=2] {'a'}, to_apply=%add
}

%piece (p: f32[4]) -> f32[8] {
  %all-gather.7 = f32[8]{0} all-gather(%p), channel_id=35, replica_groups=[4,2]<=[8], \
frontend_attributes={chain_id="0"}
}

ENTRY %main (p: f32[4,16]) -> f32[4,16] {
  %all-reduce.4 = (f32[4,16]{1,0}, bf16[3]{0}, /*index=2*/f32[]) all-reduce(%a, %b, %c), \
replica_groups={{0,1,2,3},{4,5,6,7}}
  %all-gather = f32[16,4]{1,0} all-gather(%p), replica_groups=[2,4]<=[8], dimensions={0}
  %reduce-scatter.1 = f32[2,4]{1,0:T(8,128)} reduce-scatter(%all-gather), dimensions={0}
  %start = (f32[4]{0}, f32[16]{0}) all-gather-start(%d), replica_groups=[2,4]<=[8]
  %all-gather-done = f32[16]{0} all-gather-done(%start)
  %cps = (pred[6]{0}, pred[6]{0}, u32[], u32[]) collective-permute-start(%e)
  %first = (f32[4]{0}, f32[8]{0}) fusion(%d), kind=kCustom, calls=%piece
  %two = s32[] constant(2)
  %copied = s32[] copy(%two)
  %carry = (s32[], f32[4]{0}) tuple(%copied, %d)
  %while.1 = (s32[], f32[4]{0}) while(%carry), condition=%condition, body=%body
  ROOT %get = f32[4,16]{1,0} get-tuple-element(%all-reduce.4), index=0
}
""".replace("STEP", "1")


def test_collectives_are_read_with_their_groups_loops_and_the_shapes_of_whole_arrays():
    assert hlo.collectives(hlo.read(TEXT), devices=8) == [
        Collective(0, "all-reduce", "f32", (4, 16), 4),
        Collective(0, "all-reduce", "bf16", (3,), 4),
        Collective(0, "all-reduce", "f32", (), 4),
        Collective(1, "all-gather", "f32", (16, 4), 4),
        Collective(2, "reduce-scatter", "f32", (16, 4), 8),
        Collective(3, "all-gather", "f32", (16,), 4),
        Collective(4, "collective-permute", "pred", (6,), 8),
        # One that goes on beside what the loop computes, and is one all the same.
        Collective(5, "all-gather", "f32", (8,), 2),
        Collective(6, "reduce-scatter", "f32", (16,), 4, times=5),
    ]


def test_bytes_and_what_a_ring_sends_of_them():
    found = hlo.collectives(hlo.read(TEXT), devices=8)
    assert [item.bytes for item in found] == [256, 6, 4, 256, 256, 64, 6, 32, 320]
    ring = 2 * 0.75 * (256 + 6 + 4) + 0.75 * (256 + 64 + 320) + 7 / 8 * 256 + 0.5 * 32 + 6
    assert sum(item.sent_bytes for item in found) == ring


@pytest.mark.parametrize(("step", "times"), [(1, 5), (2, 3), (5, 1)])
def test_a_loop_counts_by_its_own_step(step, times):
    text = TEXT.replace("%by = s32[]{:T(128)} constant(1)", f"%by = s32[] constant({step})")
    assert hlo.collectives(hlo.read(text), devices=8)[-1].times == times


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("direction=LT", "direction=NE"),
        ("copy(%two)", "parameter(1)"),
        ("add(%was", "multiply(%was"),
    ],
)
def test_a_loop_of_unknown_length_is_not_guessed(old, new):
    with pytest.raises(ValueError, match="turns an unknown number of times"):
        hlo.collectives(hlo.read(TEXT.replace(old, new)), devices=8)


def flops_of(function, *arguments):
    return hlo.flops(hlo.read(jax.jit(function).lower(*arguments).compile().as_text()))


def test_products_in_a_loop_count_as_often_as_it_turns():
    def chain(x, ws):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, ws)[0]

    def again(x, ws):
        block = jax.checkpoint(lambda x, w: (jnp.tanh(x @ w), None))
        return jax.lax.scan(block, x, ws)[0].sum()

    x, ws = jnp.ones((8, 16)), jnp.ones((5, 16, 16))
    once = 2 * 8 * 16 * 16
    assert flops_of(chain, x, ws) == 5 * once
    assert flops_of(jax.grad(lambda *a: chain(*a).sum(), argnums=(0, 1)), x, ws) == 3 * 5 * once
    # Of those that are computed again, the last one is not needed for the gradient itself.
    assert flops_of(jax.value_and_grad(again, argnums=(0, 1)), x, ws) == 4 * 5 * once


@pytest.mark.parametrize(("stride", "padding"), [(1, "SAME"), (2, "VALID"), (2, "SAME")])
def test_a_convolution_counts_no_product_with_its_padding(stride, padding):
    def convolve(x, w):
        names = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(
            x, w, (stride, stride), padding, dimension_numbers=names
        )

    x, w = jnp.ones((2, 9, 9, 3)), jnp.ones((3, 3, 3, 4))
    # Of ones, each output is the number of its products.
    assert flops_of(convolve, x, w) == 2 * int(convolve(x, w).sum())


def test_a_batch_of_products_that_is_written_as_a_convolution():
    text = """\
ENTRY %main (p: f32[32,8,16]) -> f32[32,8,4] {
  %a = f32[32,8,16]{2,1,0} parameter(0)
  %b = f32[32,16,4]{2,1,0} parameter(1)
  ROOT %c = f32[32,8,4]{2,1,0} convolution(%a, %b), \
window={size=32 stride=31 pad=0_0 lhs_dilate=32}, dim_labels=0bf_0io->0bf
}
"""
    assert hlo.flops(hlo.read(text)) == 32 * 2 * 8 * 16 * 4


def test_the_largest_batch_is_found_with_few_programs():
    tried = []

    def fits(number, most):
        tried.append(number)
        return number <= most

    for most in (0, 1, 5, 64, 100):
        tried.clear()
        assert search(lambda number, most=most: fits(number, most)) == most
        assert len(tried) <= 15


ROWS = 4
PLACES = {
    "data": ("adamw", "adamw_per_device", "sam", "sam_per_device"),
    "sharded": ("adamw", "stale_sam"),
}


@pytest.fixture(scope="module")
def found():
    rows = {}
    for layout, methods in PLACES.items():
        for method in methods:
            run = Run("local:4", "decoder_tiny", layout, method, ROWS)
            rows[layout, method] = recorded(run)
    return rows


def recorded(run):
    return {"config": run._asdict(), "versions": {}, **measure(run)}


def row(found, layout, method):
    return scaling_report._row(found[layout, method])


def test_sam_has_twice_the_operations_and_a_stale_one_as_many(found):
    base = row(found, "data", "adamw")
    assert row(found, "data", "sam")["flops"] == 2 * base["flops"]
    assert row(found, "sharded", "stale_sam")["flops"] == row(found, "sharded", "adamw")["flops"]
    # And those of the network itself: forward, again for the gradient, and two in the backward
    # pass; what a block ends with, its second hidden matrix, is not needed again.
    width, hidden, words, tokens, layers = 64, 128, 256, 512, 2
    matrices = layers * (4 * width**2 + 3 * width * hidden)
    attention = layers * 2 * tokens * width
    products = 4 * (matrices + attention) - layers * width * hidden + 3 * words * width
    assert base["flops"] == 2 * ROWS * tokens * products


def test_data_parallel_bytes(found):
    whole = 4 * row(found, "data", "adamw")["parameters"]
    sent = {method: row(found, "data", method)["sent_bytes"] for method in PLACES["data"]}
    loss = 2 * 3 / 4 * 4
    assert sent["adamw_per_device"] == sent["sam_per_device"] == 2 * 3 / 4 * whole + loss
    assert sent["sam"] - loss == 2 * (sent["adamw"] - loss)


def test_a_stale_perturbation_has_one_more_sharded_copy_in_its_state(found):
    base, stale = (row(found, "sharded", method) for method in PLACES["sharded"])
    more = (stale["argument_bytes"] - base["argument_bytes"]) / base["parameter_bytes"]
    assert more == pytest.approx(1, abs=0.002)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["nbar", "obar", "das"])
def test_balancing_sends_norms_alone_where_adapters_are_sharded(method):
    runs = [Run("local:4", "lora_tiny", "sharded", name, ROWS) for name in ("adamw", method)]
    base, own = (scaling_report._row(recorded(run)) for run in runs)
    assert own["flops"] == pytest.approx(base["flops"], rel=1e-3)
    assert own["launches"] - base["launches"] <= 1
    assert 0 < own["sent_bytes"] - base["sent_bytes"] < 4096


@pytest.mark.slow
@pytest.mark.parametrize("method", [*programs.METHODS])
def test_every_method_compiles_in_a_layout(method):
    places = [("decoder_tiny", "data"), ("decoder_tiny", "mixed"), ("lora_tiny", "mixed")]
    model, layout = next(place for place in places if programs.apart(*place, method))
    assert measure(Run("local:4", model, layout, method, ROWS))["flops"] > 0


@pytest.fixture
def libtpu(monkeypatch):
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("libtpu is not installed")
    # It ends the process at a flag of CPUs that it does not know, and this suite sets some.
    monkeypatch.delenv("XLA_FLAGS", raising=False)


@pytest.mark.slow
@pytest.mark.usefixtures("libtpu")
def test_tpu_programs_have_the_operations_that_cpu_programs_have():
    runs = [Run(name, "decoder_tiny", "sharded", "sam", ROWS) for name in ("local:4", "v5e:2x2")]
    here, there = map(measure, runs)
    assert there["fits"]
    # TPU's compiler leaves out the logits of the last token, which has no next one.
    assert there["flops"] == pytest.approx(here["flops"], rel=1e-4)


@pytest.mark.slow
@pytest.mark.usefixtures("libtpu")
def test_a_chip_with_less_memory_holds_less():
    run = Run("v5e:2x2", "decoder_tiny", "sharded", "sam", ROWS)
    assert measure(run._replace(memory=100))["fits"]
    assert not measure(run._replace(memory=8))["fits"]


def test_programs_with_less_memory_are_others_and_have_a_table_of_their_own(found, tmp_path):
    compilation = experiment.Compilation(tmp_path)
    whole = Run("v5e:2x2", "decoder_tiny", "sharded", "sam", ROWS)
    less = whole._replace(memory=1900)
    assert compilation.name(less) == compilation.name(whole) + "_in_1900_mib"
    assert compilation.config(less) == {**compilation.config(whole), "memory": 1900}
    record = found["sharded", "adamw"]
    for memory in (None, 1900):
        row = scaling_report._row({**record, "config": {**record["config"], "memory": memory}})
        assert scaling_report._within(row) == ("" if memory is None else ", in 1,900 MiB")
        assert [key[-1] for key in scaling_report._places([row])] == [memory]


def test_a_program_that_does_not_fit_is_told_from_one_that_is_wrong(monkeypatch):
    class Step:
        def __init__(self, message):
            self.message = message

        def compile(self, options):
            raise jax.errors.JaxRuntimeError(self.message)

    text = "RESOURCE_EXHAUSTED: Ran out of memory (103.97G)\nSee elsewhere"
    assert experiment._compile(Step(text)) == (None, text.splitlines()[0])
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        experiment._compile(Step("INTERNAL: a mistake"))


def test_the_targets_are_met_and_would_not_be_with_more(found, tmp_path):
    records = [json.loads(json.dumps(each)) for each in found.values()]

    def verdicts(records):
        rows = [scaling_report._row(record) | {"largest": None} for record in records]
        for own in scaling_report._places(rows).values():
            scaling_report._compare(own)
        return {(goal.where, goal.claim): goal.verdict for goal in scaling_report.targets(rows)}

    before = verdicts(records)
    memory_of_cpus = [key for key in before if "temporaries" in key[1] or "compiled" in key[1]]
    assert {before[key] for key in before if key not in memory_of_cpus} == {"met"}
    for record in records:
        if record["config"]["method"] in ("sam_per_device", "stale_sam"):
            record["argument_bytes"] += record["parameter_bytes"]
            extra = Collective(99, "all-reduce", "f32", (8, 8), 4)._asdict()
            record["collectives"] = [*record["collectives"], extra]
    after = verdicts(records)
    assert {key[1] for key in after if before[key] != after[key]} == {
        "exactly the base optimizer's bytes",
        "at most 1 more copies of the parameters",
    }


@pytest.mark.parametrize(
    ("model", "millions"),
    [
        *(("decoder_100m", 109.5), ("decoder_1b", 1139.3), ("decoder_7b", 6607.3)),
        # 32 blocks of two adapters of two factors of 4096 x 8; the published ResNet-50; ViT-B/16
        # without a class token and with a place for each patch.
        *(("lora_7b", 4.2), ("resnet50", 25.6), ("vit_b", 86.6), ("leaves_1k", 1.0)),
    ],
)
def test_the_models_have_their_published_sizes_and_a_loss(model, millions):
    workload = workloads.WORKLOADS[model](lambda x: x)
    count = sum(leaf.size for leaf in jax.tree.leaves(workload.params))
    assert count / 1e6 == pytest.approx(millions, abs=0.06)
    batch = workload.batch(2)
    value, rest = jax.eval_shape(workload.loss, workload.params, workload.rest, batch)
    assert value.shape == ()
    assert jax.tree.structure(rest) == jax.tree.structure(workload.rest)


@pytest.mark.slow
def test_the_command_writes_its_files_and_compiles_nothing_twice(tmp_path, capsys, monkeypatch):
    command = [
        *("--topology", "local:2,local:4", "--models", "decoder_tiny", "--layouts", "data"),
        *("--methods", "adamw,sam", "--rows", "1", "--out", str(tmp_path)),
    ]
    assert scaling.main([*command, "--time", "--rounds", "2"]) == 0
    for name in ("results.csv", "summary.md", "summary.json", "chips.png"):
        assert (tmp_path / name).stat().st_size > 0
    text = capsys.readouterr().out
    assert "times say nothing about scaling" in text
    assert "| decoder_tiny | data" in re.sub(" +", " ", text)
    monkeypatch.setattr(programs, "lower", None)
    assert scaling.main([*command, "--time", "--rounds", "2"]) == 0


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--topology", "v5e"], "--topology 'v5e': write a generation and a shape"),
        (["--topology", "v9:2x2"], "the generations are v4, v5e, v5p, v6e"),
        (["--topology", "local:64"], "--topology local:64 needs as many devices"),
        (["--models", "decoder_2b"], "--models 'decoder_2b': choose"),
        (["--layouts", "fsdp"], "--layouts 'fsdp': choose"),
        (["--methods", "adam"], "--methods 'adam': choose"),
        (["--rows", "0"], "--rows must be 1 or more, got 0"),
        (["--time"], "--time runs on devices that are there: --topology local:N"),
        (["--topology", "local:4", "--memory", "1900"], "--memory is of a TPU's chip"),
    ],
)
def test_misuse_is_one_line(tmp_path, capsys, more, message):
    assert scaling.main([*more, "--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1
