import gzip
import os
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from models.data.images import cifar10, cifar100, digits, mnist, patches

DATA = Path(os.environ.get("DYNASCOPE_DATA", "/nonexistent"))
RNG = np.random.default_rng(0)


def test_digits_are_those_of_the_library():
    from sklearn.datasets import load_digits

    images, labels = digits("float32")
    np.testing.assert_array_equal(16 * images, np.asarray(load_digits(return_X_y=True)[0]).reshape(-1, 8, 8))
    assert (images.shape, images.dtype) == ((1797, 8, 8), jnp.float32)
    assert (float(images.min()), float(images.max())) == (0.0, 1.0)
    # Class counts and the mean pixel of the published set.
    assert np.bincount(labels).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    assert 16 * float(images.mean()) == pytest.approx(4.884165, abs=1e-5)


@pytest.mark.parametrize("dtype", ["float16", bool, "complex64"])
def test_pixels_have_a_dtype_that_holds_them(dtype):
    with pytest.raises(ValueError, match=r"^dtype must be float32 or float64, got"):
        digits(dtype)


@pytest.mark.parametrize("shape", [(1, 6), (2, 3), (4, 1), (1, 1), (4, 6)])
def test_patches_are_the_slices(shape):
    images = np.arange(2 * 3 * 24.0).reshape(2, 3, 4, 6)
    h, w = shape
    slices = [
        images[..., top : top + h, left : left + w].reshape(2, 3, h * w)
        for top in range(0, 4, h)
        for left in range(0, 6, w)
    ]
    np.testing.assert_array_equal(patches(images, shape), np.stack(slices, axis=2))


def test_patches_of_colour_images_hold_the_channels_of_a_pixel_side_by_side():
    images = np.arange(5 * 4 * 6 * 3.0).reshape(5, 4, 6, 3)
    grey = [np.asarray(patches(images[..., channel], (2, 3))) for channel in range(3)]
    expected = np.stack(grey, axis=-1).reshape(5, 4, 18)
    np.testing.assert_array_equal(patches(images, (2, 3), colour=True), expected)
    with pytest.raises(ValueError, match=r"^images must have shape \(\.\.\., H, W, C\), got shape \(4, 4\)"):
        patches(np.zeros((4, 4)), (2, 2), colour=True)


@pytest.mark.parametrize("shape", [(3, 2), (2, 4), (0, 2), (-1, 2)])
def test_patches_that_do_not_tile(shape):
    with pytest.raises(ValueError, match=r"^shape must tile images of 4 by 6"):
        patches(np.zeros((4, 6)), shape)


def test_patches_of_no_image():
    with pytest.raises(ValueError, match=r"^images must have shape"):
        patches(np.zeros(4), (1, 1))


def idx(array):
    """An array of bytes as an IDX file."""
    sizes = np.array([2048 + array.ndim, *array.shape], ">i4")
    return sizes.tobytes() + array.astype(np.uint8).tobytes()


def write_mnist(folder, part="train", pixels=None, labels=(3, 9)):
    pixels = RNG.integers(0, 256, (2, 4, 5)) if pixels is None else pixels
    folder.mkdir(parents=True, exist_ok=True)
    names = (folder / f"{part}-images-idx3-ubyte.gz", folder / f"{part}-labels-idx1-ubyte.gz")
    for path, array in zip(names, (pixels, np.array(labels)), strict=True):
        path.write_bytes(gzip.compress(idx(array)))
    return (pixels, *names)


@pytest.mark.parametrize(("folder", "split", "part"), [("", "train", "train"), ("mnist", "test", "t10k")])
def test_mnist_reads_what_was_written(tmp_path, folder, split, part):
    pixels, *_ = write_mnist(tmp_path / folder, part)
    images, labels = mnist(tmp_path, split, "float32")
    assert (images.dtype, labels.dtype, labels.tolist()) == (jnp.float32, jnp.int32, [3, 9])
    np.testing.assert_allclose(images, pixels / 255, rtol=1e-7)


def test_broken_mnist_files_are_named(tmp_path):
    pixels, images, labels = write_mnist(tmp_path)
    whole = images.read_bytes()
    for content, message in (
        (whole[:-9], "is truncated or no gzip file"),
        (b"no gzip", "is truncated or no gzip file"),
        (gzip.compress(idx(np.array([1]))), "must start with the magic number 2051, got 2049"),
        (gzip.compress(b""), "must start with the magic number 2051, got nothing"),
        (gzip.compress(idx(pixels)[:-1]), "must hold 2 x 4 x 5 bytes, got a file of another length"),
        (gzip.compress(idx(pixels)[:11]), "must hold 2 bytes, got a file of another length"),
    ):
        images.write_bytes(content)
        with pytest.raises(ValueError, match=rf"train-images-idx3-ubyte\.gz {message}"):
            mnist(tmp_path)
    images.write_bytes(whole)
    for broken, message in (([1], "one label for each of 2 images, got 1"), ([1, 10], "from 0 to 9, got 10")):
        labels.write_bytes(gzip.compress(idx(np.array(broken))))
        with pytest.raises(ValueError, match=rf"train-labels-idx1-ubyte\.gz must h.*{message}"):
            mnist(tmp_path)
    labels.unlink()
    with pytest.raises(FileNotFoundError, match=r"train-labels-idx1-ubyte\.gz is missing: it belongs beside"):
        mnist(tmp_path)


def records(labels, count):
    """Records of label bytes and pixels, as bytes; and the images, height by width by channel."""
    pixels = RNG.integers(0, 256, (count, 3, 32, 32)).astype(np.uint8)
    content = b"".join(bytes(label) + image.tobytes() for label, image in zip(labels, pixels, strict=True))
    return content, np.moveaxis(pixels, 1, 3) / 255


@pytest.mark.parametrize("folder", ["", "cifar-10-batches-bin", "cifar-10/cifar-10-batches-bin"])
def test_cifar10_reads_the_batches_that_are_there_in_order(tmp_path, folder):
    where = tmp_path / folder
    where.mkdir(parents=True, exist_ok=True)
    (second, pixels_2), (fifth, pixels_5) = records([[4], [0]], 2), records([[9]], 1)
    (where / "data_batch_5.bin").write_bytes(fifth)
    (where / "data_batch_2.bin").write_bytes(second)
    images, labels = cifar10(tmp_path, dtype="float32")
    assert (images.dtype, labels.dtype, labels.tolist()) == (jnp.float32, jnp.int32, [4, 0, 9])
    np.testing.assert_allclose(images, np.concatenate([pixels_2, pixels_5]), rtol=1e-7)
    with pytest.raises(FileNotFoundError, match=r"test_batch\.bin is missing from"):
        cifar10(tmp_path, "test")


@pytest.mark.parametrize("folder", ["", "cifar-100-binary", "cifar-100/cifar-100-binary"])
def test_cifar100_has_both_labels(tmp_path, folder):
    (tmp_path / folder).mkdir(parents=True, exist_ok=True)
    content, pixels = records([[19, 99], [2, 7]], 2)
    (tmp_path / folder / "test.bin").write_bytes(content)
    images, fine = cifar100(tmp_path, "test")
    _, coarse = cifar100(tmp_path, "test", labels="coarse")
    assert (images.dtype, fine.tolist(), coarse.tolist()) == (jnp.float64, [99, 7], [19, 2])
    np.testing.assert_allclose(images, pixels, rtol=1e-15)
    with pytest.raises(ValueError, match=r"labels must be one of \('fine', 'coarse'\), got 'both'"):
        cifar100(tmp_path, labels="both")


def test_broken_cifar_files_are_named(tmp_path):
    content, _ = records([[1], [2]], 2)
    for broken in (content[:-1], b""):
        (tmp_path / "data_batch_1.bin").write_bytes(broken)
        message = rf"data_batch_1\.bin must hold records of 3073 bytes each, got {len(broken)} bytes"
        with pytest.raises(ValueError, match=message):
            cifar10(tmp_path)
    (tmp_path / "data_batch_1.bin").write_bytes(records([[10]], 1)[0])
    with pytest.raises(ValueError, match=r"data_batch_1\.bin must hold labels from 0 to 9, got 10"):
        cifar10(tmp_path)
    (tmp_path / "train.bin").write_bytes(records([[20, 0]], 1)[0])
    with pytest.raises(ValueError, match=r"train\.bin must hold labels from 0 to 19, got 20"):
        cifar100(tmp_path)


@pytest.mark.parametrize("read", [mnist, cifar10, cifar100])
def test_what_is_not_there_or_not_known(read, tmp_path):
    with pytest.raises(
        FileNotFoundError, match="no data folder was given: pass --data-dir DIR, a folder with"
    ):
        read(None)
    with pytest.raises(FileNotFoundError, match="nowhere is no folder: pass --data-dir DIR"):
        read(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"is missing from .*: pass --data-dir DIR"):
        read(tmp_path)
    with pytest.raises(ValueError, match=r"split must be one of \('train', 'test'\), got 'valid'"):
        read(tmp_path, "valid")


@pytest.mark.skipif(not (DATA / "mnist").is_dir(), reason="DYNASCOPE_DATA has no mnist")
def test_mnist_is_the_published_set():
    images, labels = mnist(DATA, dtype="float32")
    assert images.shape == (60_000, 28, 28)
    images = np.asarray(images, float)
    # Mean and standard deviation of the published training set, and its labels' counts.
    assert np.mean(images) == pytest.approx(0.13066, abs=1e-5)
    assert np.std(images) == pytest.approx(0.30811, abs=1e-5)
    assert np.bincount(labels)[:3].tolist() == [5923, 6742, 5958]


@pytest.mark.skipif(not (DATA / "cifar-10").is_dir(), reason="DYNASCOPE_DATA has no cifar-10")
def test_cifar10_of_real_images():
    images, labels = cifar10(DATA, "test", "float32")
    assert images.shape == (len(labels), 32, 32, 3)
    # Neighbouring pixels are alike, and so are their colours: no axis is mixed up.
    for axis in (1, 2, 3):
        assert float(jnp.mean(jnp.abs(jnp.diff(images, axis=axis)))) < 0.12
