"""Batches on the device: the same in the same order, whoever fetches them."""

import threading
import time

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


def test_every_batch_arrives_whole_and_in_order_on_the_device(device):
    feed, seen = DeviceFeed(batches(9, []), device), []
    for batch in feed:
        # long enough for the next copies to overtake it, if they could
        busy = batch["x_0"].clone()
        for _ in range(20):
            busy = busy @ torch.eye(256, device=device)
        assert {value.device.type for value in batch.values()} == {device.type}
        seen.append((busy.unique().tolist(), batch["x_0"].unique().tolist(), batch["indices"].tolist()))
    assert seen == [([float(i)], [float(i)], [i] * (1 if i == 8 else 2)) for i in range(9)]


# "meta" is a device that computes nothing, and which every machine has.
ELSEWHERE = pytest.mark.parametrize("elsewhere", ["meta", pytest.param("cuda", marks=pytest.mark.gpu)])


@ELSEWHERE
def test_a_thread_keeps_one_batch_and_no_more_on_another_device_than_the_cpu(elsewhere):
    fetched, threads = [], []

    def stream():
        for batch in batches(5, fetched):
            threads.append(threading.current_thread())
            yield batch

    feed = DeviceFeed(stream(), torch.device(elsewhere))
    for count in range(2, 6):
        assert next(feed)["x_0"].device.type == elsewhere
        until = time.monotonic() + 20
        while len(fetched) < count and time.monotonic() < until:
            time.sleep(0.001)
        time.sleep(0.01)
        assert len(fetched) == count
    assert next(feed)["x_0"].shape[0] == 1 and list(feed) == []
    assert len(set(threads)) == 1 and threads[0] is not threading.current_thread()


def test_the_cpu_gets_no_batch_before_it_asks():
    fetched = []
    feed = DeviceFeed(batches(3, fetched), torch.device("cpu"))
    next(feed)
    assert fetched == [0]
    assert next(feed)["indices"].tolist() == [1, 1]


@ELSEWHERE
def test_the_end_and_an_error_of_the_stream_reach_the_loop(elsewhere):
    feed = DeviceFeed(batches(1, []), torch.device(elsewhere))
    next(feed)
    for _ in range(2):
        with pytest.raises(StopIteration):
            next(feed)

    def broken():
        yield {"x_0": torch.zeros(1)}
        raise ValueError("too many images are corrupt")

    feed = DeviceFeed(broken(), torch.device(elsewhere))
    next(feed)
    with pytest.raises(ValueError, match="too many images are corrupt"):
        next(feed)
