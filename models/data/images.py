"""Images: readers of real images in their official file formats, and their cut into tokens."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from dynamics.arguments import ArrayLike, as_real, require_choice, require_dtype

Split = Literal["train", "test"]

_IDX_IMAGES, _IDX_LABELS = 2051, 2049  # the magic numbers of unsigned bytes in three dimensions and in one
_CIFAR_PIXELS = 3 * 32 * 32


def digits(dtype: Any = None) -> tuple[Float[Array, "1797 8 8"], Int[Array, "1797"]]:
    """The handwritten digits that come with scikit-learn: 1797 images of 8 by 8 pixels, ten classes.

    Source: alpaydin1998.

    Args:
        dtype: floating dtype of the images; JAX's default where None.

    Returns:
        Images with pixels in [0, 1], shape (1797, 8, 8), and labels 0 to 9, shape (1797,).

    Example:
        >>> images, labels = digits()
        >>> images.shape, labels[:5].tolist()
        ((1797, 8, 8), [0, 1, 2, 3, 4])
    """
    from sklearn.datasets import load_digits  # takes a second to import

    pixels, labels = load_digits(return_X_y=True)
    return _to_unit(pixels.reshape(-1, 8, 8), 16, dtype), jnp.asarray(labels, jnp.int32)


def mnist(
    data_dir: str | Path | None, split: Split | str = "train", dtype: Any = None
) -> tuple[Float[Array, "N H W"], Int[Array, " N"]]:
    """MNIST: handwritten digits, 60,000 to train on and 10,000 to test on, 28 by 28 pixels, ten classes.

    The files are the official ones, such as `train-images-idx3-ubyte.gz`. They say how large they are.

    Source: lecun1998.

    Args:
        data_dir: folder that holds the files, or `mnist/` with them.
        split: which part.
        dtype: floating dtype of the images; JAX's default where None.

    Returns:
        Images with pixels in [0, 1], shape (N, H, W), and labels, shape (N,), int32.

    Raises:
        FileNotFoundError: a file is missing, or no folder was given.
        ValueError: a file is truncated or is something else.

    Example:
        >>> images, labels = mnist("data", "test")  # doctest: +SKIP
        >>> images.shape  # doctest: +SKIP
        (10000, 28, 28)
    """
    part = {"train": "train", "test": "t10k"}[_require_split(split)]
    names = (f"{part}-images-idx3-ubyte.gz", f"{part}-labels-idx1-ubyte.gz")
    image_path, label_path = _find(data_dir, ("", "mnist"), names, every=True)
    pixels, labels = _read_idx(image_path, _IDX_IMAGES), _read_idx(label_path, _IDX_LABELS)
    if len(pixels) != len(labels):
        raise ValueError(
            f"{label_path} must have one label for each of {len(pixels)} images, got {len(labels)}"
        )
    _require_labels(label_path, labels, 10)
    return _to_unit(pixels, 255, dtype), jnp.asarray(labels, jnp.int32)


def cifar10(
    data_dir: str | Path | None, split: Split | str = "train", dtype: Any = None
) -> tuple[Float[Array, "N 32 32 3"], Int[Array, " N"]]:
    """CIFAR-10: colour images of ten classes, 50,000 to train on and 10,000 to test on, 32 by 32 pixels.

    The files are those of the official binary version, `data_batch_1.bin` to `data_batch_5.bin` and
    `test_batch.bin`. The batches that are there are read, one after another; any number of records will do.

    Source: krizhevsky2009.

    Args:
        data_dir: folder that holds the files, or `cifar-10-batches-bin/` with them, or `cifar-10/` with
            either.
        split: which part.
        dtype: floating dtype of the images; JAX's default where None.

    Returns:
        Images with channels red, green, blue in [0, 1], shape (N, 32, 32, 3), and labels, shape (N,), int32.

    Raises:
        FileNotFoundError: there is no such file, or no folder was given.
        ValueError: a file is truncated or is something else.

    Example:
        >>> images, labels = cifar10("data")  # doctest: +SKIP
        >>> images.shape  # doctest: +SKIP
        (50000, 32, 32, 3)
    """
    train = [f"data_batch_{batch}.bin" for batch in range(1, 6)]
    names = train if _require_split(split) == "train" else ["test_batch.bin"]
    folder = "cifar-10-batches-bin"
    paths = _find(data_dir, ("", folder, "cifar-10", f"cifar-10/{folder}"), names)
    parts = [_read_cifar(path, classes=(10,)) for path in paths]
    labels, pixels = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    return _to_unit(pixels, 255, dtype), jnp.asarray(labels[:, 0], jnp.int32)


def cifar100(
    data_dir: str | Path | None,
    split: Split | str = "train",
    dtype: Any = None,
    *,
    labels: Literal["fine", "coarse"] | str = "fine",
) -> tuple[Float[Array, "N 32 32 3"], Int[Array, " N"]]:
    """CIFAR-100: colour images, 50,000 to train on and 10,000 to test on, of 100 classes in 20 coarse ones.

    The files are those of the official binary version, `train.bin` and `test.bin`, of any number of records.

    Source: krizhevsky2009.

    Args:
        data_dir: folder that holds the files, or `cifar-100-binary/` with them, or `cifar-100/` with
            either.
        split: which part.
        dtype: floating dtype of the images; JAX's default where None.
        labels: "fine" for the 100 classes, "coarse" for the 20.

    Returns:
        Images with channels red, green, blue in [0, 1], shape (N, 32, 32, 3), and labels, shape (N,), int32.

    Raises:
        FileNotFoundError: there is no such file, or no folder was given.
        ValueError: a file is truncated or is something else.

    Example:
        >>> images, labels = cifar100("data", labels="coarse")  # doctest: +SKIP
        >>> int(labels.max())  # doctest: +SKIP
        19
    """
    require_choice("labels", labels, ("fine", "coarse"))
    folder = "cifar-100-binary"
    folders = ("", folder, "cifar-100", f"cifar-100/{folder}")
    (path,) = _find(data_dir, folders, [f"{_require_split(split)}.bin"])
    both, pixels = _read_cifar(path, classes=(20, 100))
    return _to_unit(pixels, 255, dtype), jnp.asarray(both[:, 0 if labels == "coarse" else 1], jnp.int32)


def patches(images: ArrayLike, shape: tuple[int, int], *, colour: bool = False) -> Array:
    """Images cut into patches, one token each: (..., H, W) to (..., H W / (h w), h w) for patches (h, w).

    The patches come row by row, and so do the pixels of each. Whole rows are patches (1, W). Colour images
    (..., H, W, C) give tokens of h w C numbers, the channels of a pixel side by side.

    Args:
        images: the images; trailing axes H, W, and C for colour.
        shape: height and width of a patch.
        colour: whether the last axis is that of the channels.

    Raises:
        ValueError: the patches do not tile the images, or these have too few axes.

    Example:
        >>> patches([[1, 2, 3, 4], [5, 6, 7, 8]], (2, 2)).tolist()
        [[1.0, 2.0, 5.0, 6.0], [3.0, 4.0, 7.0, 8.0]]
    """
    images = as_real("images", images)
    axes = ("H", "W", "C") if colour else ("H", "W")
    if images.ndim < len(axes) or images.size == 0:
        raise ValueError(f"images must have shape (..., {', '.join(axes)}), got shape {images.shape}")
    *batch, height, width, channels = images.shape if colour else (*images.shape, 1)
    h, w = shape
    if h < 1 or w < 1 or height % h or width % w:
        raise ValueError(f"shape must tile images of {height} by {width} pixels, got {h} by {w}")
    grid = images.reshape(*batch, height // h, h, width // w, w * channels)
    return jnp.swapaxes(grid, -3, -2).reshape(*batch, -1, h * w * channels)


def _require_split(split: Any) -> str:
    require_choice("split", split, ("train", "test"))
    return split


def _find(
    data_dir: str | Path | None, folders: Sequence[str], names: Sequence[str], *, every: bool = False
) -> list[Path]:
    """The files of these names in the first of the folders that holds any; `every` wants all of them."""
    where = f"a folder with {folders[-1]}/{names[0]}"
    if data_dir is None:
        raise FileNotFoundError(f"no data folder was given: pass --data-dir DIR, {where}")
    root = Path(data_dir)
    if not root.is_dir():
        raise FileNotFoundError(f"{root} is no folder: pass --data-dir DIR, {where}")
    for folder in folders:
        paths = [root / folder / name for name in names]
        found = [path for path in paths if path.is_file()]
        if every and 0 < len(found) < len(paths):
            (missing, *_) = (path for path in paths if path not in found)
            raise FileNotFoundError(f"{missing} is missing: it belongs beside {found[0].name}")
        if found:
            return found
    raise FileNotFoundError(f"{names[0]} is missing from {root}: pass --data-dir DIR, {where}")


def _read_idx(path: Path, magic: int) -> np.ndarray:
    """An IDX file of unsigned bytes, compressed with gzip: the magic number, the sizes, the numbers."""
    try:
        content = gzip.decompress(path.read_bytes())
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path} is truncated or no gzip file: {error}") from None
    if len(content) < 4 or int.from_bytes(content[:4], "big") != magic:
        found = int.from_bytes(content[:4], "big") if len(content) >= 4 else "nothing"
        raise ValueError(f"{path} must start with the magic number {magic}, got {found}")
    dims = magic % 256
    sizes = np.frombuffer(content, ">i4", count=min(dims, len(content) // 4 - 1), offset=4)
    if len(sizes) < dims or len(content) != 4 + 4 * dims + int(np.prod(sizes, dtype=object)):
        raise ValueError(
            f"{path} must hold {' x '.join(map(str, sizes))} bytes, got a file of another length"
        )
    return np.frombuffer(content, np.uint8, offset=4 + 4 * dims).reshape(sizes)


def _read_cifar(path: Path, classes: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Labels (N, len(classes)) and pixels (N, 32, 32, 3) of a file of records: label bytes, then pixels."""
    content = np.frombuffer(path.read_bytes(), np.uint8)
    record = len(classes) + _CIFAR_PIXELS
    if not len(content) or len(content) % record:
        raise ValueError(f"{path} must hold records of {record} bytes each, got {len(content)} bytes")
    records = content.reshape(-1, record)
    labels = records[:, : len(classes)]
    for column, count in enumerate(classes):
        _require_labels(path, labels[:, column], count)
    # The colours come one after another.
    return labels, records[:, len(classes) :].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)


def _require_labels(path: Path, labels: np.ndarray, classes: int) -> None:
    if not len(labels) or labels.max() >= classes:
        found = f"got {labels.max()}" if len(labels) else "got none"
        raise ValueError(f"{path} must hold labels from 0 to {classes - 1}, {found}")


def _to_unit(pixels: np.ndarray, largest: int, dtype: Any) -> Array:
    """Whole numbers as numbers in [0, 1]."""
    return jnp.asarray(pixels, require_dtype(dtype)) / largest


def shuffled(
    data: Literal["digits", "mnist"], data_dir: Path | None, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """All images of a data set, flat, in a random order, and their labels.

    Args:
        data: "digits", which come with scikit-learn, or "mnist", both of its parts.
        data_dir: folder of MNIST.
        seed: of the order.

    Raises:
        ValueError: `data` is neither, or MNIST is not there.

    Example:
        >>> images, labels = shuffled("digits", None, 0)
        >>> images.shape, labels.shape
        ((1797, 64), (1797,))
    """
    require_choice("data", data, ("digits", "mnist"))
    parts = [digits()] if data == "digits" else [mnist(data_dir, split) for split in ("train", "test")]
    both = zip(*parts, strict=True)
    images, labels = (np.concatenate([np.asarray(part) for part in pair]) for pair in both)
    order = np.random.default_rng(seed).permutation(len(images))
    return images.reshape(len(images), -1)[order], labels[order]
