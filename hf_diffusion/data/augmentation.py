"""What augmentation draws: a function of the image and the epoch, with no generator to store."""

import numpy as np


# What a number is drawn for.
FLIP, CROP_X, CROP_Y, CAPTION = range(4)


def draws(seed: int, epochs: np.ndarray, indices: np.ndarray, purpose: int) -> np.ndarray:
    """Return one number in [0, 1) for each (epoch, index); it follows from the arguments alone.

    A counter-based generator (the SplitMix64 finalizer, Steele et al. 2014, OOPSLA) instead of a
    stateful one: the augmentation of an image does not depend on the batch, worker or process that
    asks for it.
    """
    state = np.full(len(indices), (seed * 8 + purpose) & 0xFFFFFFFFFFFFFFFF, dtype=np.uint64)
    for value in (epochs, indices):
        state = (state ^ np.asarray(value, dtype=np.int64).astype(np.uint64)) + np.uint64(0x9E3779B97F4A7C15)
        state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        state = state ^ (state >> np.uint64(31))
    return (state >> np.uint64(11)).astype(np.float64) * 2.0**-53
