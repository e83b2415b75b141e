"""A signal to one process ends the run on all."""

import os
import signal

import pytest
import torch

from hf_diffusion.loop.signals import StopSignal


class Two:
    """An accelerator of two processes; the other has got no signal."""

    num_processes, device = 2, torch.device("cpu")

    def reduce(self, flag, how):
        assert how == "sum" and flag.shape == ()
        return flag + 0


@pytest.fixture
def stop():
    stop = StopSignal(Two())
    yield stop
    stop.restore()


def test_who_waits_hears_of_a_signal_now_and_who_does_not_the_next_time_that_it_asks(stop):
    assert not stop.before() and not stop.anywhere()
    os.kill(os.getpid(), signal.SIGTERM)
    assert stop.anywhere()
    assert [stop.before() for _ in range(3)] == [False, True, True]


def test_a_single_process_hears_of_a_signal_now(stop):
    stop.accelerator.num_processes = 1
    assert not stop.before()
    os.kill(os.getpid(), signal.SIGTERM)
    assert stop.before() and stop.anywhere()
