import jax.numpy as jnp
import numpy as np
import pytest

from models.data.images import digits, patches


def test_digits_are_those_of_the_library():
    images, labels = digits("float32")
    assert (images.shape, images.dtype) == ((1797, 8, 8), jnp.float32)
    assert (float(images.min()), float(images.max())) == (0.0, 1.0)
    # Class counts and the mean pixel of the published set.
    assert np.bincount(labels).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    assert 16 * float(images.mean()) == pytest.approx(4.884165, abs=1e-5)


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


@pytest.mark.parametrize("shape", [(3, 2), (2, 4), (0, 2), (-1, 2)])
def test_patches_that_do_not_tile(shape):
    with pytest.raises(ValueError, match=r"^shape must tile images of 4 by 6"):
        patches(np.zeros((4, 6)), shape)


def test_patches_of_no_image():
    with pytest.raises(ValueError, match=r"^images must have shape"):
        patches(np.zeros(4), (1, 1))
