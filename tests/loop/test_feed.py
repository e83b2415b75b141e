"""Batches on the device: the same in the same order, whoever looks ahead."""

import pytest
import torch

from hf_diffusion.loop.feed import DeviceFeed


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request) -> torch.device:
    return torch.device(request.param)


def batches(count: int, fetched: list[int]):
    """Batches of two rows, the last one of one, that say so when they are fetched."""
    for i in range(count):
        fetched.append(i)
        rows = 1 if i == count - 1 else 2
        yield {"x_0": torch.full((rows, 256, 256), float(i)), "indices": torch.full((rows,), i)}


@pytest.mark.parametrize("looks_ahead", [False, True])
def test_every_batch_arrives_whole_and_in_order_on_the_device(device, looks_ahead):
    feed, seen = DeviceFeed(batches(9, []), device), []
    for batch in feed:
        # long enough for the next copies to overtake it, if they could
        busy = batch["x_0"].clone()
        for _ in range(20):
            busy = busy @ torch.eye(256, device=device)
        if looks_ahead:
            feed.look_ahead()
        assert {value.device.type for value in batch.values()} == {device.type}
        seen.append((busy.unique().tolist(), batch["x_0"].unique().tolist(), batch["indices"].tolist()))
    assert seen == [([float(i)], [float(i)], [i] * (1 if i == 8 else 2)) for i in range(9)]


def test_a_cuda_device_gets_one_batch_ahead_and_the_cpu_none(device):
    fetched = []
    feed = DeviceFeed(batches(3, fetched), device)
    next(feed)
    feed.look_ahead()
    feed.look_ahead()
    assert fetched == ([0, 1] if device.type == "cuda" else [0])
    assert next(feed)["indices"].tolist() == [1, 1]


def test_the_end_and_an_error_of_the_stream_reach_the_loop(device):
    feed = DeviceFeed(batches(1, []), device)
    next(feed)
    feed.look_ahead()
    with pytest.raises(StopIteration):
        next(feed)

    def broken():
        yield {"x_0": torch.zeros(1)}
        raise ValueError("too many images are corrupt")

    feed = DeviceFeed(broken(), device)
    next(feed)
    with pytest.raises(ValueError, match="too many images are corrupt"):
        feed.look_ahead()
        next(feed)
