"""Text generation: the data, packing, a step, the scores, the command with a tiny decoder."""

import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from benchmarks.core.records import read_record
from benchmarks.data import webnlg
from benchmarks.generation import __main__ as command
from benchmarks.generation import experiment
from benchmarks.generation.experiment import Pretrained, corpus_scores
from benchmarks.models import llama
from benchmarks.models.llama import Llama, LlamaConfig
from benchmarks.models.lora import DecoderTask

LETTERS = "\0abcdefghijklmnopqrstuvwxyz |&\n"
CONFIG = LlamaConfig(len(LETTERS), 16, 2, 2, 1, 24)
END = 0


class Letters:
    """A tokenizer of single letters."""

    def encode(self, text):
        return SimpleNamespace(ids=[max(LETTERS.find(letter), 1) for letter in text.lower()])

    def decode(self, ids):
        return "".join(LETTERS[i] for i in ids)


def entry(category, name, count=2):
    triples = ((name, "is_in", "town"),)
    return {"category": category, "triples": triples, "texts": [f"{name} is here"] * count}


@pytest.fixture
def files(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    parts = {
        "train": [entry("Food", name) for name in ("tea", "pie", "jam", "egg")],
        "dev": [entry("Food", "bun"), entry("Food", "none", 0)],
        "test": [entry("Food", "fig"), entry("Moon", "io"), entry("Moon", "eros", 3)],
    }
    for part, entries in parts.items():
        lines = "".join(json.dumps(each) + "\n" for each in entries)
        (folder / f"webnlg_v1.6_en_{part}.jsonl").write_text(lines)
    return folder


def test_entries_are_read_and_said(files):
    found = webnlg.load(files)
    assert {part: len(entries) for part, entries in found.items()} == {
        "train": 4,
        "dev": 1,
        "test": 3,
    }
    assert found["test"][1].prompt() == "io | is in | town\n"
    path = files / "webnlg_v1.6_en_dev.jsonl"
    path.write_text('{"category": "Food"}\n')
    with pytest.raises(ValueError, match=r"dev.jsonl, line 1: must be an object with category"):
        webnlg.load(files)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"has no webnlg_v1.6_en_dev.jsonl"):
        webnlg.load(files)


def test_examples_are_packed_whole():
    examples = [([1, 2], [3, 0]), ([4], [5, 0]), ([6] * 9, [0]), ([7], [8, 8, 0])]
    packed, left_out = webnlg.pack(examples, 8)
    assert left_out == 1
    assert packed.ids.tolist() == [[1, 2, 3, 0, 4, 5, 0, 0], [7, 8, 8, 0, 0, 0, 0, 0]]
    assert packed.segments.tolist() == [[1, 1, 1, 1, 2, 2, 2, 0], [1, 1, 1, 1, 0, 0, 0, 0]]
    assert packed.positions.tolist()[0] == [0, 1, 2, 3, 0, 1, 2, 0]
    assert packed.learned.tolist()[0] == [False, False, True, True, False, True, True, False]
    with pytest.raises(ValueError, match="--length 3: no example is so short"):
        webnlg.pack(examples[:1], 3)


def decoder(top, **options):
    return Llama(CONFIG, top=top, rngs=nnx.Rngs(0), **options)


@pytest.mark.parametrize("top", [1, 2])
def test_the_loss_is_the_texts_mean_and_does_not_see_the_other_examples(top):
    task = DecoderTask(decoder(top), rank=2, alpha=4)
    params, _ = task.init(0)
    params = jax.tree.map(lambda x: x + 0.3, params)  # B is zero at the start
    examples = [([1, 2], [3, 0]), ([4], [5, 6, 0])]
    both, _ = webnlg.pack(examples, 9)

    def loss(rows):
        return float(task.loss(params, ((), task.batch((task.frozen, rows), 0)))[0])

    each = [loss(webnlg.pack([example], 9)[0]) for example in examples]
    assert loss(both) == pytest.approx((2 * each[0] + 3 * each[1]) / 5, rel=1e-4)

    fewer = DecoderTask(decoder(top), rank=2, alpha=4, most=5)  # logits, and the same loss
    kept = fewer.below(fewer.frozen, both)
    assert float(fewer.loss(params, ((), (fewer.frozen, kept, both)))[0]) == pytest.approx(
        loss(both), rel=1e-5
    )

    model = task.model(params, task.frozen)
    ids = jnp.asarray([[4, 5, 6, 0]])
    logits = model(ids, jnp.arange(4)[None], llama.causal_mask(jnp.ones_like(ids)))[0]
    chances = jax.nn.log_softmax(logits)
    assert each[1] == pytest.approx(-float(chances[[0, 1, 2], [5, 6, 0]].mean()), rel=1e-4)


def test_scores_take_all_references_that_there_are():
    pytest.importorskip("sacrebleu")
    texts = ["the cat sat on the mat", "a dog ran in the park today"]
    references = [["a cat was there", "the cat sat on the mat"], ["a dog ran in the park today"]]
    found = corpus_scores(texts, references)
    assert found == pytest.approx({"bleu": 100.0, "chrf": 100.0, "ter": 0.0})
    worse = corpus_scores(["the cat sat", texts[1]], references)
    assert worse["bleu"] < 100
    assert worse["ter"] > 0


@pytest.fixture
def tiny(monkeypatch):
    pytest.importorskip("sacrebleu")
    state = nnx.to_pure_dict(nnx.state(decoder(0)))
    tensors = {
        "token_embd.weight": state["embed"]["embedding"],
        "output_norm.weight": state["norm"]["scale"],
    }
    for part, leaves in state["stacks"][0].items():
        ((kind, leaf),) = leaves.items()
        for i in range(CONFIG.num_layers):
            tensors[f"blk.{i}.{llama._BLOCK_NAMES[part]}.weight"] = np.asarray(
                leaf[i].T if kind == "kernel" else leaf[i]
            )
    found = Pretrained("tiny", 0, CONFIG, tensors, Letters(), END)
    monkeypatch.setattr(command, "load_pretrained", lambda path: found)


def arguments(files, out, *more):
    sizes = ["--steps=4", "--eval-every=2", "--batch-size=2", "--length=40", "--layers=1"]
    sizes += [
        "--dev-rows=2",
        "--test-sets=2",
        "--new-tokens=5",
        "--seeds=1",
        "--generation-batch=3",
    ]
    return ["--data", str(files), "--out", str(out), *sizes, *more]


def test_every_method_leaves_records_scores_and_texts(tiny, files, tmp_path, capsys):
    assert command.main(arguments(files, tmp_path / "out")) == 0
    printed = capsys.readouterr().out
    for name in ("adamw", "sam", "nbar", "obar", "das", "stale_sam"):
        assert f"| {name} " in printed
        record = read_record(tmp_path / "out" / "runs" / f"{name}_seed0.json")
        assert [entry["step"] for entry in record["evaluations"]] == [2, 4]
        assert len(record["texts"]) == 2
        assert {"bleu_all", "chrf_seen", "ter_unseen"} <= set(record["final"])
        assert record["parameters"] == 2 * (16 * 4) + 4 * (16 + 8)
    assert "dequantized from 4 bits" in printed
    assert "fig | is in | town" in (tmp_path / "out" / "summary.md").read_text()


@pytest.mark.parametrize("batch", [1, 2])
def test_texts_are_in_the_order_of_their_triples(tiny, files, tmp_path, monkeypatch, batch):
    def beginnings(model, ids, lengths, **options):
        rows = zip(np.asarray(ids), np.asarray(lengths).tolist(), strict=True)
        return llama.Generated(np.array([row[-length:][:3] for row, length in rows]), None)

    monkeypatch.setattr(llama, "generate", beginnings)
    data = webnlg.load(files)
    data["test"] = [data["test"][i] for i in (2, 0)]  # the longer one first
    sizes = {"length": 40, "layers": 1, "batch_size": 2, "dev_rows": 2, "test_sets": 2}
    settings = command.Configuration(**sizes, generation_batch=batch)
    comparison = experiment.Generation(data, command.load_pretrained(None), settings, tmp_path)
    assert comparison.generate(comparison._task.init(0)[0]) == ["ero", "fig"]


@pytest.mark.slow
def test_a_stopped_run_ends_with_the_numbers_it_would_have_had(tiny, files, tmp_path, monkeypatch):
    argv = [*arguments(files, tmp_path / "whole"), "--methods=sam"]
    assert command.main(argv) == 0

    class StoppedError(Exception):
        pass

    advance = experiment.Generation.advance

    def stopping(self, run, part, *rest):
        if part == 1:
            raise StoppedError
        return advance(self, run, part, *rest)

    argv = [*arguments(files, tmp_path / "stopped"), "--methods=sam"]
    with monkeypatch.context() as patch:
        patch.setattr(experiment.Generation, "advance", stopping)
        with pytest.raises(StoppedError):
            command.main(argv)
    assert command.main(argv) == 0
    whole, stopped = (
        read_record(tmp_path / name / "runs" / "sam_seed0.json") for name in ("whole", "stopped")
    )
    assert stopped["resumed_after_steps"] == [2]
    for name in ("texts", "trace"):
        assert whole[name] == stopped[name]
    assert whole["final"]["dev_loss"] == stopped["final"]["dev_loss"]


def test_bad_arguments_are_told(tiny, files, tmp_path, capsys):
    for argv, message in (
        (["--steps=0"], "--steps must be 1 or more"),
        (["--methods=sam:lr=0"], "lr must be above 0"),
        (["--layers=3"], "top=3: must be from 0 to the 2 blocks"),
        (["--batch-size=99"], "--batch-size 99 is more than"),
    ):
        assert command.main([*arguments(files, tmp_path / "out"), *argv]) == 2
        assert message in capsys.readouterr().err
    assert command.main(["--out", str(tmp_path)]) == 2
    assert "--data is missing" in capsys.readouterr().err
