from pathlib import Path

import numpy as np
import pytest

from benchmarks.data import text
from benchmarks.lora.experiment import given

REAL_TEXT = Path(__file__).parents[3] / "shared" / "data" / "text"
FEW_SHOT = REAL_TEXT.parent / "fewshot"
TASK = text.Task("Pets", "train.tsv", "test.tsv", ("cat", "dog", "newt"), rare=("newt",))


def write(path, *lines):
    path.write_text("\n".join(["sentence\tlabel", *lines]) + "\n", encoding="utf-8")
    return path


def examples(*counts):
    labels = np.repeat(np.arange(len(counts)), counts).astype(np.int32)
    return text.Examples(np.array([f"s{i}" for i in range(len(labels))], dtype=object), labels)


def test_a_file_is_read_as_it_is(tmp_path):
    path = write(tmp_path / "train.tsv", 'it \'s "fine" , \tdog', "miaow \tcat")
    found = text.read(path, TASK)
    assert list(found.sentences) == ['it \'s "fine" , ', "miaow "]
    assert found.labels.tolist() == [1, 0]


@pytest.mark.parametrize("line", ["no label", "one\tcow", "a\tb\tcat"])
def test_a_bad_line_is_told_with_its_number(tmp_path, line):
    path = write(tmp_path / "train.tsv", "miaow\tcat", line)
    with pytest.raises(ValueError, match="line 3: must be a sentence, a tab and one of cat, dog"):
        text.read(path, TASK)


def test_a_file_without_its_header_is_told(tmp_path):
    path = tmp_path / "train.tsv"
    path.write_text("miaow\tcat\n")
    with pytest.raises(ValueError, match="must start with the header"):
        text.read(path, TASK)


def test_a_folder_or_its_parent(tmp_path):
    folder = tmp_path / "sst2"
    folder.mkdir()
    write(folder / "train.tsv", "fine\t1")
    with pytest.raises(
        FileNotFoundError, match=r"has no validation\.tsv: pass the folder of SST-2"
    ):
        text.load("sst2", folder)
    write(folder / "validation.tsv", "poor\t0")
    for data in (folder, tmp_path):
        pool, test = text.load("sst2", data)
        assert (pool.labels.tolist(), test.labels.tolist()) == ([1], [0])
    with pytest.raises(ValueError, match="'qqp' is unknown; the tasks are sst2, trec, SST-2"):
        text.load("qqp", tmp_path)


def save_splits(folder, pairs=True):
    """Writes a few-shot RTE, or SST-2, of eight examples in each part of each split."""
    labels = ("entailment", "not_entailment") if pairs else ("0", "1")
    second = "the film" if pairs else ""
    for seed in text.SPLITS:
        (folder / f"512-{seed}").mkdir(parents=True)
        for part in ("train", "dev"):
            lines = [f'"{part} {seed} {i}\t{second}\t{labels[i % 2]}' for i in range(8)]
            path = folder / f"512-{seed}" / f"{part}.tsv"
            path.write_text("\n".join(["sentence1\tsentence2\tlabel", *lines]) + "\n")
    path = folder / "test.tsv"
    path.write_text(f"sentence1\tsentence2\tlabel\nvery\u2028good\t{second}\t{labels[1]}\n")


@pytest.mark.parametrize("pairs", [True, False])
def test_splits_that_are_given(tmp_path, pairs):
    name = "RTE" if pairs else "SST-2"
    with pytest.raises(FileNotFoundError, match=f"has no 512-13/train.tsv: .* with {name}/ in it"):
        text.load_splits(name, tmp_path)
    save_splits(tmp_path / name, pairs)
    splits, test = text.load_splits(name, tmp_path)
    assert tuple(splits) == text.SPLITS
    train, dev = splits[21]
    assert train.sentences[1] == (('"train 21 1', "the film") if pairs else '"train 21 1')
    assert dev.labels.tolist() == [0, 1] * 4
    assert (len(test.labels), test.labels[0]) == (1, 1)  # no other sign ends a line


def test_wrong_labels_are_the_training_s_and_the_search_s_alone(tmp_path):
    save_splits(tmp_path / "RTE")
    tested, searched = given("RTE", tmp_path, 0.25, held_out=4)
    train = tested.sample(2)
    assert train.sentences[0][0] == '"train 42 0'
    assert np.sum(train.labels != np.tile([0, 1], 4)) == 2
    assert all(pair[0].startswith('"dev 13') for pair in searched.evaluation.sentences)
    assert tested.evaluation.labels.tolist() == [1]
    clean, dev = given("RTE", tmp_path, 0.0, held_out=4)
    assert clean.sample(2).labels.tolist() == [0, 1] * 4
    assert np.bincount(dev.evaluation.labels).tolist() == [2, 2]
    assert np.sum(searched.evaluation.labels != dev.evaluation.labels) == 1


def test_k_shot_takes_k_of_each_class_and_all_of_a_rare_one():
    pool = examples(10, 8, 3)
    sample = text.k_shot(pool, 5, TASK, seed=0)
    assert np.bincount(sample.labels).tolist() == [5, 5, 3]
    assert len(set(sample.sentences)) == 13
    again, other = (text.k_shot(pool, 5, TASK, seed=seed) for seed in (0, 1))
    assert list(again.sentences) == list(sample.sentences) != list(other.sentences)


def test_too_few_examples_are_told():
    with pytest.raises(ValueError, match="--shots 9: the class dog of Pets has 8 training"):
        text.k_shot(examples(10, 8, 3), 9, TASK, seed=0)


def test_what_is_held_out_is_apart_and_has_every_class_s_share():
    rest, held = text.hold_out(examples(100, 60, 40), 20, seed=0)
    assert np.bincount(held.labels).tolist() == [10, 6, 4]
    assert np.bincount(rest.labels).tolist() == [90, 54, 36]
    assert not set(rest.sentences) & set(held.sentences)


def test_a_batch_is_cut_to_its_longest_sentence():
    ids = np.array([[1, 2, 0] + [0] * 17, [1] * 20, [3, 0, 0] + [0] * 17], np.int32)
    tokens = text.Tokens(ids, np.array([2, 20, 1], np.int32), ids % 2)
    found, mask, types = tokens.batch(np.array([2, 0]))
    assert found.shape == (2, 16)
    assert mask.sum(1).tolist() == [1, 2]
    assert found[mask].tolist() == [3, 1, 2]
    np.testing.assert_array_equal(types, found % 2)
    found, mask, types = tokens.batch(np.array([1]))
    assert found.shape == (1, 32)
    assert mask.sum() == 20
    assert tokens._replace(multiple=8).batch(np.array([1]))[0].shape == (1, 24)


def test_the_tokenizer_s_own_padding_and_truncation_are_off(tmp_path):
    pytest.importorskip("tokenizers", reason="tokenizers (extra: lora) is not installed")
    from tests.benchmarks.tiny_bert import save_tokenizer

    save_tokenizer(tmp_path)
    sentences = np.array(["good film", "very " * 30 + "good"])
    tokens = text.tokenize(text.load_tokenizer(tmp_path), sentences, 64)
    assert tokens.lengths.tolist() == [4, 33]
    assert tokens.ids[0, :5].tolist() == [2, 10, 5, 3, 0]
    assert not tokens.types.any()
    pairs = np.empty(1, dtype=object)
    pairs[0] = ("good film", "bad story")
    pair = text.tokenize(text.load_tokenizer(tmp_path), pairs, 64)
    assert pair.ids[0].tolist() == [2, 10, 5, 3, 11, 7, 3]
    assert pair.types[0].tolist() == [0, 0, 0, 0, 1, 1, 1]
    cut = text.tokenize(text.load_tokenizer(tmp_path), sentences, 8)
    assert cut.lengths.tolist() == [4, 8]
    assert cut.ids[1, -1] == 3  # [SEP]


def test_a_folder_without_a_tokenizer_is_told(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds no tokenizer\.json"):
        text.load_tokenizer(tmp_path)


@pytest.mark.skipif(not FEW_SHOT.is_dir(), reason="../shared/data/fewshot is absent")
@pytest.mark.parametrize("name", text.FEW_SHOT)
def test_the_real_splits(name):
    splits, test = text.load_splits(name, FEW_SHOT)
    classes = len(text.TASKS[name].labels)
    for train, _ in splits.values():
        counts = np.bincount(train.labels, minlength=classes)
        assert set(np.delete(counts, [2] if name == "TREC" else [])) == {512}
        assert isinstance(train.sentences[0], tuple) == (name in ("SNLI", "MNLI", "RTE"))
    assert len(test.labels) == {"SST-2": 872, "RTE": 277, "TREC": 500}.get(name, 1000)


@pytest.mark.skipif(not REAL_TEXT.is_dir(), reason="../shared/data/text is absent")
@pytest.mark.parametrize(("name", "train", "test"), [("sst2", 60_614, 872), ("trec", 5_368, 500)])
def test_the_real_files(name, train, test):
    pool, held = text.load(name, REAL_TEXT)
    assert (len(pool.labels), len(held.labels)) == (train, test)
    sample = text.k_shot(pool, 512, text.TASKS[name], seed=0)
    assert len(sample.labels) == {"sst2": 1024, "trec": 5 * 512 + 84}[name]
