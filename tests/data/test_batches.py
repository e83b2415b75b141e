"""Order and augmentation depend on (seed, epoch, index) alone; memory holds what fits."""

import itertools
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from hf_diffusion.data import row_decoder as data_row_decoder
from hf_diffusion.data.augmentation import draws
from hf_diffusion.data.image_data import batches
from hf_diffusion.data.images import load_images
from tests.data.making import (
    folder_of,
    noise_image,
    positions,
    same,
    truncate,
)


def test_the_flip_of_an_image_depends_on_seed_epoch_and_index_alone(tmp_path):
    folder = folder_of(tmp_path / "set", {"": 12})
    plain = load_images(train_data_dir=str(folder)).fetch(range(12), 0)["x_0"]
    data = load_images(train_data_dir=str(folder), random_flip=True, seed=3, cache_bytes=0)
    cached = load_images(train_data_dir=str(folder), random_flip=True, seed=3)
    together = data.fetch(range(12), 5)["x_0"]
    flipped = draws(3, np.full(12, 5), np.arange(12), 0) < 0.5
    for index in range(12):
        assert torch.equal(together[index], plain[index].flip(-1) if flipped[index] else plain[index])
        assert torch.equal(together[index], data.fetch([index], 5)["x_0"][0])
    assert torch.equal(together, cached.fetch(range(12), 5)["x_0"])
    assert torch.equal(together, cached.fetch(range(12), 5)["x_0"])
    mixed = cached.fetch([1, 1, 1, 1], [5, 6, 7, 8])["x_0"]  # a batch across the end of an epoch
    assert all(torch.equal(mixed[place], data.fetch([1], 5 + place)["x_0"][0]) for place in range(4))


def test_draws_are_uniform_and_unrelated_between_neighbours():
    epochs, indices = (grid.ravel() for grid in np.meshgrid(np.arange(100), np.arange(1000)))
    u = draws(0, epochs, indices, 0)
    assert 0 <= u.min() and u.max() < 1
    assert abs(u.mean() - 0.5) < 5 / np.sqrt(12 * u.size)
    counts = np.bincount((u * 64).astype(int), minlength=64)
    assert ((counts - u.size / 64) ** 2 / (u.size / 64)).sum() < 63 + 5 * np.sqrt(2 * 63)  # chi square, five sigma
    grid = u.reshape(1000, 100)
    others = (grid[1:, :-1], grid[:-1, 1:]), (draws(1, epochs, indices, 0).reshape(1000, 100),) * 2
    others += ((draws(0, epochs, indices, 1).reshape(1000, 100),) * 2,)
    for other in (other for pair in others for other in pair):
        own = grid if other.shape == grid.shape else grid[:-1, :-1]
        assert abs(np.corrcoef(own.ravel(), other.ravel())[0, 1]) < 5 / np.sqrt(own.size)


@pytest.mark.parametrize("cache_bytes", [None, 0])
def test_batches_are_the_same_for_any_number_of_workers(tmp_path, cache_bytes):
    folder = folder_of(tmp_path / "set", {"a": 7, "b": 6})
    truncate(folder / "a" / "03.png")
    asked = positions(13, batch=4, epochs=3)
    state = torch.get_rng_state()
    runs = []
    for workers in (0, 2):
        data = load_images(train_data_dir=str(folder), random_flip=True, cache_bytes=cache_bytes)
        runs.append(list(batches(data, iter(asked), num_workers=workers)))
        assert data.skipped == 1 and data.complete == (cache_bytes is None)
    assert len(runs[0]) == len(asked) and all(map(same, *runs))
    direct = [data.fetch([index for _, index in pairs], [epoch for epoch, _ in pairs]) for pairs in asked]
    assert all(map(same, runs[0], direct))
    assert torch.equal(state, torch.get_rng_state())  # loading moves no global generator


def test_workers_end_when_all_images_are_in_memory(tmp_path):
    data = load_images(train_data_dir=str(folder_of(tmp_path / "set", {"": 8})))
    endless = ((epoch, index) for epoch in itertools.count() for index in range(8))
    stream = batches(data, (list(itertools.islice(endless, 4)) for _ in itertools.count()), num_workers=2)
    seen = [next(stream)["indices"].tolist() for _ in range(12)]
    assert seen == [[0, 1, 2, 3], [4, 5, 6, 7]] * 6
    assert data.complete and not torch.multiprocessing.active_children()
    stream.close()


def test_the_second_epoch_decodes_nothing(tmp_path, monkeypatch):
    calls = []
    real = data_row_decoder.open_image
    data = load_images(train_data_dir=str(folder_of(tmp_path / "set", {"a": 5, "b": 5})))
    monkeypatch.setattr(data_row_decoder, "open_image", lambda row: calls.append(1) or real(row))
    asked = positions(10, batch=4, epochs=3)
    first, rest = asked[:3], asked[3:]  # three batches hold the first epoch
    list(batches(data, first))
    assert len(calls) == 10 and data.complete
    list(batches(data, rest))
    assert len(calls) == 10


def test_images_that_two_threads_decode_at_once_are_counted_once(tmp_path):
    data = load_images(train_data_dir=str(folder_of(tmp_path / "set", {"": 16})))
    decode, both = type(data._decoder).__getitems__, threading.Barrier(2)

    class Decoder:
        def __getitems__(self, request):
            decoded = decode(data_decoder, request)
            both.wait(20)
            return decoded

    class Sources(np.ndarray):
        """Which images are held; whoever has read it lets the other thread read, too."""

        def __getitem__(self, index):
            found = np.asarray(super().__getitem__(index))
            if np.ndim(index) == 1:
                time.sleep(0.05)
            return found

    data_decoder, data._decoder = data._decoder, Decoder()
    data._sources = data._sources.view(Sources)
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(lambda rows: data.fetch(rows, 0), (range(10), range(6, 16)))
    assert data.complete and torch.equal(first["x_0"][6:], second["x_0"][:4])


def test_one_of_two_processes_holds_all_images_after_two_epochs(tmp_path, monkeypatch):
    calls = []
    real = data_row_decoder.open_image
    data = load_images(train_data_dir=str(folder_of(tmp_path / "set", {"": 16})))
    monkeypatch.setattr(data_row_decoder, "open_image", lambda row: calls.append(1) or real(row))
    for pairs in positions(16, batch=4, epochs=2)[::2]:
        before = len(calls)
        data.fetch([index for _, index in pairs], [epoch for epoch, _ in pairs])
        assert len(calls) - before <= 4
    assert data.complete and len(calls) == 16


def test_a_set_larger_than_the_limit_is_not_kept(tmp_path):
    folder = str(folder_of(tmp_path / "set", {"": 4}))
    needed = 4 * 3 * 6 * 8
    assert load_images(train_data_dir=folder, cache_bytes=needed).describe()["kept_in_memory"]
    assert not load_images(train_data_dir=folder, cache_bytes=needed - 1).describe()["kept_in_memory"]


def test_the_fingerprint_tells_data_and_transforms_apart_but_not_places(tmp_path):
    one = str(folder_of(tmp_path / "one" / "set", {"a": 2, "b": 2}))
    two = str(folder_of(tmp_path / "two" / "set", {"a": 2, "b": 2}))
    mark = load_images(train_data_dir=one).fingerprint
    assert mark == load_images(train_data_dir=two).fingerprint
    noise_image(99).save(Path(two) / "a" / "00.png")
    others = [load_images(train_data_dir=two), load_images(train_data_dir=one, resolution=4)]
    others += [load_images(train_data_dir=one, label_column="none"), load_images(train_data_dir=one, random_flip=True)]
    assert len({mark, *(other.fingerprint for other in others)}) == 5
