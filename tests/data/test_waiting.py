"""Processes wait for the first one as long as it takes, and say so."""

import pytest

from tests import waiting_processes
from tests.launching import forked, free_port


@pytest.mark.slow
@pytest.mark.parametrize("ending", ["ends", "fails"])
def test_others_outwait_a_barrier_tell_of_it_and_end_with_a_first_one_that_fails(tmp_path, ending):
    port, logs = str(free_port()), [tmp_path / "0", tmp_path / "1"]
    processes = [forked(waiting_processes.main, [str(rank), port, ending], logs[rank]) for rank in range(2)]
    for process in processes:
        process.join(100)
    first, other = (log.read_text() for log in logs)
    assert [process.exitcode for process in processes] == ([0, 0] if ending == "ends" else [1, 1]), first + other
    assert "1 process waits for the first, which prepares the data" in other and "waits" not in first
    assert ("1 has 1" in other) == (ending == "ends") and "1 has 0" in other
    # it ended with the sentence of the first alone
    assert ("ValueError: no such data" in first) == (ending == "fails") and "Traceback" not in other
