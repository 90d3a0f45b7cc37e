"""The data sets: every layout loads, every damage is named, subsets and noise are as stated."""

import dataclasses
import io
import os
import pickle
import struct
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from benchmarks import data
from benchmarks.data.augment import normalize, random_crop_flip

REAL_CIFAR10 = Path(__file__).parents[3] / "shared" / "data" / "cifar10"


class Python2Pickler(pickle._Pickler):
    """Writes bytes and str as Python 2's byte strings, as the official files have them."""

    dispatch = pickle._Pickler.dispatch.copy()

    def save_byte_string(self, obj):
        content = obj if isinstance(obj, bytes) else obj.encode("latin-1")
        self.write(pickle.BINSTRING + struct.pack("<i", len(content)) + content)
        self.memoize(obj)

    dispatch[bytes] = save_byte_string
    dispatch[str] = save_byte_string


def python2_dumps(obj):
    file = io.BytesIO()
    Python2Pickler(file, protocol=2).dump(obj)
    return file.getvalue().replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n")


def write_batch(path, labels_key, labels, dumps=python2_dumps):
    """Writes a batch whose image i has the constant planes (i, i + 50, i + 100)."""
    planes = np.arange(len(labels))[:, None] + np.array([0, 50, 100])
    rows = np.repeat(planes, 1024, axis=1).astype(np.uint8)
    rows[:, 1] = 200  # the red of row 0, column 1
    path.write_bytes(dumps({b"data": rows, labels_key: list(labels), b"batch_label": b"x"}))


def write_cifar10(folder, dumps=python2_dumps):
    folder.mkdir()
    for number in range(1, 6):
        write_batch(folder / f"data_batch_{number}", b"labels", [0, 1, 2, number], dumps)
    write_batch(folder / "test_batch", b"labels", [9, 8], dumps)
    names = [f"name {i}".encode() for i in range(10)]
    (folder / "batches.meta").write_bytes(dumps({b"label_names": names, b"num_vis": 3072}))


def encode(format, colour, size=(32, 32)):
    file = io.BytesIO()
    Image.new("RGB", size, colour).save(file, format)
    return file.getvalue()


def write_parquet(path, images, labels, label_column="label", **others):
    structs = [{"bytes": image, "path": None} for image in images]
    type_ = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    table = pa.table(
        {"img": pa.array(structs, type_), label_column: pa.array(labels, pa.int64())} | others
    )
    path.parent.mkdir(exist_ok=True)
    pq.write_table(table, path)


@pytest.fixture(scope="module")
def digits():
    return data.load()


class TestDigits:
    def test_has_the_declared_form(self, digits):
        assert digits.name == "digits"
        assert digits.train_images.shape == (1437, 32, 32, 1)
        assert digits.test_images.shape == (360, 32, 32, 1)
        assert digits.train_images.dtype == digits.test_images.dtype == np.uint8
        assert digits.train_labels.dtype == digits.test_labels.dtype == np.int32
        assert digits.class_names == tuple("0123456789")
        assert digits.num_classes == 10

    def test_split_is_stratified_and_deterministic(self, digits):
        again = data.load("digits")
        np.testing.assert_array_equal(again.test_images, digits.test_images)
        counts = np.bincount(digits.test_labels)
        assert counts.min() >= 34
        assert counts.max() <= 38

    def test_statistics_are_those_of_the_train_images(self, digits):
        scaled = digits.train_images / 255
        np.testing.assert_allclose(digits.mean, scaled.mean((0, 1, 2)), rtol=1e-12)
        np.testing.assert_allclose(digits.std, scaled.std((0, 1, 2)), rtol=1e-10)


class TestPickles:
    @pytest.mark.parametrize("parent", [False, True])
    def test_loads_cifar10_from_its_folder_or_the_parent(self, tmp_path, parent):
        folder = tmp_path / "cifar-10-batches-py"
        write_cifar10(folder)
        dataset = data.load(str(tmp_path if parent else folder))
        assert dataset.name == "cifar10"
        assert dataset.class_names[3] == "name 3"
        assert dataset.train_images.shape == (20, 32, 32, 3)
        assert dataset.train_images.dtype == np.uint8
        assert dataset.train_labels[3::4].tolist() == [1, 2, 3, 4, 5]  # the batches in order
        assert dataset.test_labels.tolist() == [9, 8]
        assert dataset.test_images[1, 0, 0].tolist() == [1, 51, 101]
        assert dataset.test_images[1, 0, 1].tolist() == [200, 51, 101]

    @pytest.mark.parametrize("protocol", [0, 2, 4])
    def test_loads_what_python3_and_todays_numpy_write(self, tmp_path, protocol):
        write_cifar10(tmp_path / "c", dumps=lambda obj: pickle.dumps(obj, protocol=protocol))
        dataset = data.load(tmp_path / "c")
        assert dataset.test_images[1, 0, 1].tolist() == [200, 51, 101]

    def test_loads_cifar100_with_fine_labels(self, tmp_path):
        write_batch(tmp_path / "train", b"fine_labels", [99, 5])
        write_batch(tmp_path / "test", b"fine_labels", [7])
        names = [f"fine {i}".encode() for i in range(100)]
        (tmp_path / "meta").write_bytes(python2_dumps({b"fine_label_names": names}))
        dataset = data.load(tmp_path)
        assert (dataset.name, dataset.num_classes) == ("cifar100", 100)
        assert dataset.train_labels.tolist() == [99, 5]
        assert dataset.class_names[99] == "fine 99"

    def test_reads_big_endian_and_fortran_arrays(self, tmp_path):
        write_cifar10(tmp_path / "c")
        labels = np.asfortranarray(np.array([4, 3], ">i4"))
        rows = np.asfortranarray(np.arange(2 * 3072).reshape(2, 3072).astype(np.uint8))
        (tmp_path / "c" / "test_batch").write_bytes(
            python2_dumps({b"data": rows, b"labels": labels.tolist(), b"big": labels})
        )
        image = data.load(tmp_path / "c").test_images[1]
        np.testing.assert_array_equal(image, rows[1].reshape(3, 32, 32).transpose(1, 2, 0))

    @pytest.mark.parametrize("file", ["test_batch", "data_batch_3", "batches.meta"])
    def test_names_a_missing_file(self, tmp_path, file):
        write_cifar10(tmp_path / "c")
        (tmp_path / "c" / file).unlink()
        with pytest.raises(FileNotFoundError, match=f"{file}: the file is missing.*cifar10 Python"):
            data.load(tmp_path / "c")

    @pytest.mark.parametrize("keep", [0, 1, 100, 5000])
    def test_names_a_truncated_file(self, tmp_path, keep):
        write_cifar10(tmp_path / "c")
        path = tmp_path / "c" / "data_batch_2"
        path.write_bytes(path.read_bytes()[:keep])
        with pytest.raises(ValueError, match=r"data_batch_2: not readable.*cifar10 Python pickles"):
            data.load(tmp_path / "c")

    @pytest.mark.parametrize(
        "content",
        [
            {b"labels": [0]},
            {b"data": [1, 2], b"labels": [0]},
            {b"data": np.zeros((1, 3072), np.float32), b"labels": [0]},
            {b"data": np.zeros((1, 3000), np.uint8), b"labels": [0]},
            {b"data": np.zeros((2, 3072), np.uint8), b"labels": [0]},
            {b"data": np.zeros((1, 3072), np.uint8), b"labels": [10]},
            {b"data": np.zeros((1, 3072), np.uint8), b"labels": [b"cat"]},
        ],
    )
    def test_names_a_batch_with_other_content(self, tmp_path, content):
        write_cifar10(tmp_path / "c")
        (tmp_path / "c" / "test_batch").write_bytes(python2_dumps(content))
        with pytest.raises(ValueError, match=r"test_batch: not a batch.*cifar10 Python pickles"):
            data.load(tmp_path / "c")


class Call:
    """Pickles as the call ``function(*arguments)``."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


class TestMaliciousPickles:
    @pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
    @pytest.mark.parametrize(
        ("call", "refused"),
        [
            (lambda mark: Call(os.system, f"touch {mark}"), "system"),
            (lambda mark: Call(eval, f"open({str(mark)!r}, 'w').close()"), "eval"),
            (lambda mark: Call(mark.touch), "getattr"),
            (lambda mark: Call(np.save, str(mark), 0), "save"),
        ],
    )
    def test_are_refused_and_not_run(self, tmp_path, call, refused, protocol):
        mark = tmp_path / "ran.npy"
        write_cifar10(tmp_path / "c")
        content = pickle.dumps({b"data": call(mark)}, protocol=protocol)
        (tmp_path / "c" / "test_batch").write_bytes(content)
        with pytest.raises(ValueError, match=rf"test_batch.*names the global '.*{refused}'"):
            data.load(tmp_path / "c")
        assert not mark.exists()
        pickle.loads(content)  # the same content does run elsewhere: the test can fail
        assert mark.exists()

    def test_object_arrays_are_refused(self, tmp_path):
        write_cifar10(tmp_path / "c")
        content = {b"data": np.array([{}, []], dtype=object), b"labels": [0, 1]}
        (tmp_path / "c" / "test_batch").write_bytes(python2_dumps(content))
        with pytest.raises(ValueError, match=r"test_batch: not a batch.*data of object"):
            data.load(tmp_path / "c")


class TestParquet:
    @pytest.mark.parametrize("subfolder", [".", "plain_text"])
    def test_jpeg_says_so_in_the_name(self, tmp_path, subfolder):
        images = [encode("JPEG", (200, 100, 50)), encode("JPEG", (0, 0, 0))]
        write_parquet(tmp_path / subfolder / "train-00000-of-00001.parquet", images, [3, 9])
        write_parquet(tmp_path / subfolder / "test-00000-of-00001.parquet", images[:1], [1])
        dataset = data.load(tmp_path)
        assert dataset.name == "cifar10-jpeg"
        assert dataset.train_images.shape == (2, 32, 32, 3)
        assert dataset.train_labels.tolist() == [3, 9]
        assert dataset.train_labels.dtype == np.int32
        assert dataset.class_names[9] == "truck"
        np.testing.assert_allclose(dataset.train_images[0, 5, 5], [200, 100, 50], atol=2)

    def test_webp_says_so_in_the_name(self, tmp_path):
        images = [encode("WEBP", (200, 100, 50)), encode("PNG", (0, 0, 0))]
        for split in ("train", "test"):
            write_parquet(tmp_path / f"{split}.parquet", images, [3, 9])
        dataset = data.load(tmp_path)
        assert dataset.name == "cifar10-webp"
        np.testing.assert_allclose(dataset.train_images[0, 5, 5], [200, 100, 50], atol=8)

    def test_png_is_exact_and_shards_keep_their_order(self, tmp_path):
        colours = [(i, 2 * i, 3 * i) for i in range(4)]
        images = [encode("PNG", colour) for colour in colours]
        write_parquet(tmp_path / "train-00000-of-00002.parquet", images[:2], [0, 1])
        write_parquet(tmp_path / "train-00001-of-00002.parquet", images[2:], [2, 3])
        write_parquet(tmp_path / "test-00000-of-00001.parquet", images, [0, 1, 2, 3])
        dataset = data.load(tmp_path)
        assert dataset.name == "cifar10"
        np.testing.assert_array_equal(dataset.train_images[:, 7, 7], colours)

    def test_cifar100_has_fine_labels(self, tmp_path):
        for split in ("train", "test"):
            path = tmp_path / "cifar100" / f"{split}-00000-of-00001.parquet"
            write_parquet(path, [encode("PNG", (1, 2, 3))], [99], "fine_label", coarse_label=[7])
        dataset = data.load(tmp_path)
        assert (dataset.name, dataset.num_classes) == ("cifar100", 100)
        assert dataset.test_labels.tolist() == [99]

    def test_labels_by_people_are_the_train_rows(self, tmp_path):
        labels = np.arange(8) % 4
        images = [encode("PNG", (i, i, i)) for i in range(8)]
        write_parquet(tmp_path / "train.parquet", images, labels)
        write_parquet(tmp_path / "test.parquet", images[:2], labels[:2])
        assert data.load(tmp_path).human_labels == {}
        path = tmp_path / "human_labels.npz"
        np.savez(path, clean_label=labels.astype(np.uint8), worse_label=9 - np.arange(8))
        dataset = data.load(tmp_path)
        assert list(dataset.human_labels) == ["worse_label"]
        assert dataset.human_labels["worse_label"].dtype == np.int32
        # A subset is chosen by the true labels, and takes its own of the others along.
        taken = data.take(dataset, 4, 1, seed=0)
        shown = taken.train_images[:, 0, 0, 0]
        assert sorted(taken.train_labels) == [0, 1, 2, 3]
        np.testing.assert_array_equal(taken.human_labels["worse_label"], 9 - shown.astype(int))
        np.savez(path, clean_label=labels[::-1], worse_label=labels)
        with pytest.raises(ValueError, match="clean_label is not the labels of the train images"):
            data.load(tmp_path)

    def test_names_a_missing_split(self, tmp_path):
        write_parquet(tmp_path / "train-0.parquet", [encode("PNG", (1, 2, 3))], [0])
        with pytest.raises(FileNotFoundError, match=r"no test\*\.parquet; expected Parquet files"):
            data.load(tmp_path)

    def test_names_a_truncated_file(self, tmp_path):
        for split in ("train", "test"):
            write_parquet(tmp_path / f"{split}.parquet", [encode("PNG", (1, 2, 3))], [0])
        path = tmp_path / "test.parquet"
        path.write_bytes(path.read_bytes()[:-20])
        with pytest.raises(ValueError, match=r"test\.parquet: not readable.*expected Parquet"):
            data.load(tmp_path)

    def test_names_a_file_with_other_columns(self, tmp_path):
        for split in ("train", "test"):
            path = tmp_path / f"{split}.parquet"
            write_parquet(path, [encode("PNG", (1, 2, 3))], [0], "target")
        with pytest.raises(ValueError, match=r"train\.parquet: not readable.*label"):
            data.load(tmp_path)

    @pytest.mark.parametrize(
        "image",
        [encode("JPEG", (9, 9, 9))[:80], b"", None, encode("PNG", (1, 2, 3), size=(8, 8))],
    )
    def test_names_a_damaged_image(self, tmp_path, image):
        good = encode("PNG", (1, 2, 3))
        write_parquet(tmp_path / "train.parquet", [good], [0])
        write_parquet(tmp_path / "test.parquet", [good, image], [0, 1])
        with pytest.raises(ValueError, match=r"test\*\.parquet: image 1 is not usable"):
            data.load(tmp_path)

    @pytest.mark.parametrize("label", [-1, 10, None])
    def test_names_labels_out_of_range(self, tmp_path, label):
        for split in ("train", "test"):
            images = [encode("PNG", (1, 2, 3))] * 2
            write_parquet(tmp_path / f"{split}.parquet", images, [0, label])
        with pytest.raises(ValueError, match=r"train\.parquet: column 'label'.*0\.\.9"):
            data.load(tmp_path)

    @pytest.mark.skipif(not REAL_CIFAR10.is_dir(), reason="../shared/data/cifar10 is absent")
    def test_loads_the_real_test_images(self, tmp_path):
        # The test split twice: the train split has five times as many images to decode.
        (source,) = REAL_CIFAR10.glob("test-*.parquet")
        for split in ("train", "test"):
            (tmp_path / f"{split}.parquet").symlink_to(source)
        dataset = data.load(tmp_path)
        assert dataset.name == "cifar10-jpeg"
        assert dataset.test_images.shape == (10000, 32, 32, 3)
        np.testing.assert_array_equal(np.bincount(dataset.test_labels), [1000] * 10)
        np.testing.assert_allclose(dataset.mean, [0.494, 0.485, 0.450], atol=0.01)


class TestLoad:
    def test_an_unknown_name_is_refused_with_what_is_expected(self):
        with pytest.raises(FileNotFoundError) as error:
            data.load("mnist")
        for part in ("'mnist'", "'digits'", "data_batch_1", "cifar-100-python", "Parquet"):
            assert part in str(error.value)

    def test_a_folder_without_data_is_refused(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="holds no known layout"):
            data.load(tmp_path)

    def test_a_file_is_refused(self, tmp_path):
        path = tmp_path / "cifar-10-python.tar.gz"
        path.touch()
        with pytest.raises(FileNotFoundError, match="is not an existing folder"):
            data.load(path)

    def test_two_data_sets_under_one_folder_are_refused(self, tmp_path):
        write_cifar10(tmp_path / "cifar-10-batches-py")
        (tmp_path / "cifar-100-python").mkdir()
        (tmp_path / "cifar-100-python" / "meta").touch()
        with pytest.raises(ValueError, match="holds several data sets; pass one"):
            data.load(tmp_path)


class TestSubsets:
    @pytest.mark.parametrize("count", [10, 100, 713, 1437])
    def test_take_keeps_the_classes_in_balance(self, digits, count):
        subset = data.take(digits, count, None, seed=0)
        assert len(subset.train_images) == len(subset.train_labels) == count
        share = count * np.bincount(digits.train_labels) / len(digits.train_labels)
        assert np.abs(np.bincount(subset.train_labels, minlength=10) - share).max() <= 1
        np.testing.assert_array_equal(subset.test_images, digits.test_images)

    def test_take_keeps_images_with_their_labels_and_none_twice(self, digits):
        index = np.arange(1437, dtype=np.int32)
        numbered = dataclasses.replace(
            digits,
            train_images=(index[:, None] // [1, 256] % 256).astype(np.uint8)[:, None, :, None],
        )
        subset = data.take(numbered, 500, 100, seed=1)
        chosen = subset.train_images[:, 0, :, 0] @ np.array([1, 256])
        assert len(set(chosen.tolist())) == 500
        np.testing.assert_array_equal(subset.train_labels, digits.train_labels[chosen])
        assert len(subset.test_images) == 100

    def test_subsets_of_one_seed_are_nested_and_seeds_differ(self, digits):
        def images(count, seed):
            return {image.tobytes() for image in data.take(digits, count, None, seed).train_images}

        assert images(50, 0) < images(200, 0)
        assert images(50, 0) != images(50, 1)

    def test_statistics_follow_the_subset(self, digits):
        subset = data.take(digits, 20, None, seed=0)
        np.testing.assert_allclose(subset.mean, (subset.train_images / 255).mean((0, 1, 2)))
        assert subset.mean != digits.mean

    def test_take_fraction(self, digits):
        subset = data.take_fraction(digits, 0.1, seed=0)
        assert len(subset.train_labels) == 144
        assert np.bincount(subset.train_labels).min() >= 13
        whole = data.take_fraction(digits, 1, seed=0)
        np.testing.assert_array_equal(whole.train_images, digits.train_images)

    @pytest.mark.parametrize("fraction", [0, -0.1, 1.5, float("nan")])
    def test_take_fraction_refuses(self, digits, fraction):
        with pytest.raises(ValueError, match="fraction="):
            data.take_fraction(digits, fraction, seed=0)

    @pytest.mark.parametrize(("train", "test"), [(0, None), (1438, None), (None, 0), (None, 361)])
    def test_take_refuses(self, digits, train, test):
        with pytest.raises(ValueError, match=r"(train|test)=.*'digits' has"):
            data.take(digits, train, test, seed=0)


class TestLabelNoise:
    @pytest.mark.parametrize("rate", [0.0, 0.2, 0.4, 0.99])
    def test_exactly_the_rate_is_wrong(self, rate):
        labels = np.arange(1000, dtype=np.int32) % 10
        noisy = data.corrupt_labels(labels, rate, 10, seed=0)
        assert np.sum(noisy != labels) == round(1000 * rate)
        assert noisy.dtype == labels.dtype
        assert set(noisy.tolist()) <= set(range(10))

    def test_wrong_classes_are_uniform(self):
        labels = np.zeros(90_000, np.int32)
        noisy = data.corrupt_labels(labels, 0.5, 10, seed=0)
        counts = np.bincount(noisy, minlength=10)[1:]
        np.testing.assert_allclose(counts, 5000, rtol=0.05)

    def test_is_deterministic_and_leaves_its_input(self):
        labels = np.arange(100, dtype=np.int32) % 10
        first = data.corrupt_labels(labels, 0.4, 10, seed=3)
        np.testing.assert_array_equal(first, data.corrupt_labels(labels, 0.4, 10, seed=3))
        assert np.any(first != data.corrupt_labels(labels, 0.4, 10, seed=4))
        np.testing.assert_array_equal(labels, np.arange(100) % 10)

    @pytest.mark.parametrize("rate", [-0.1, 1.0, float("nan")])
    def test_refuses_a_rate(self, rate):
        with pytest.raises(ValueError, match="rate="):
            data.corrupt_labels(np.zeros(4, np.int32), rate, 10, seed=0)

    def test_refuses_a_single_class(self):
        with pytest.raises(ValueError, match="num_classes=1"):
            data.corrupt_labels(np.zeros(4, np.int32), 0.5, 1, seed=0)


class TestAugmentation:
    def test_normalize_standardizes(self, digits):
        images = normalize(jnp.asarray(digits.train_images), digits.mean, digits.std)
        assert images.dtype == jnp.float32
        np.testing.assert_allclose(images.mean(), 0, atol=1e-4)
        np.testing.assert_allclose(images.std(), 1, atol=1e-4)

    def test_normalize_casts(self):
        images = jnp.full((1, 2, 2, 3), 255, jnp.uint8)
        result = normalize(images, (0.5, 0.0, 1.0), (0.5, 1.0, 2.0), jnp.bfloat16)
        assert result.dtype == jnp.bfloat16
        np.testing.assert_array_equal(result[0, 0, 0].astype(jnp.float32), [1, 1, 0])

    @pytest.mark.parametrize("flip", [False, True])
    @pytest.mark.parametrize("dtype", [np.uint8, np.float32])
    def test_crops_are_windows_of_the_zero_padded_image(self, flip, dtype):
        images = np.random.default_rng(0).integers(1, 256, (64, 6, 8, 3)).astype(dtype)
        crops = np.asarray(random_crop_flip(jax.random.key(0), images, pad=2, flip=flip))
        assert crops.dtype == dtype
        padded = np.pad(images, ((0, 0), (2, 2), (2, 2), (0, 0)))
        found = set()
        for crop, source in zip(crops, padded, strict=True):
            matches = [
                (row, column, step)
                for row in range(5)
                for column in range(5)
                for step in (1, -1)
                if np.array_equal(crop, source[row : row + 6, column : column + 8][:, ::step])
            ]
            assert len(matches) == 1
            found.add(matches[0])
        assert {row for row, _, _ in found} == set(range(5))
        assert {column for _, column, _ in found} == set(range(5))
        assert {step for _, _, step in found} == ({1, -1} if flip else {1})

    def test_no_padding_and_no_flip_is_the_identity(self):
        images = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 1)).astype(np.uint8)
        result = random_crop_flip(jax.random.key(1), images, pad=0, flip=False)
        np.testing.assert_array_equal(result, images)

    def test_jit_gives_the_eager_result(self):
        images = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 1)).astype(np.uint8)
        jitted = jax.jit(random_crop_flip, static_argnames=("pad", "flip"))
        key = jax.random.key(2)
        np.testing.assert_array_equal(jitted(key, images), random_crop_flip(key, images))
