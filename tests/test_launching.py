"""The helper that runs a test file's claims in one child process."""

import pytest

from tests.launching import run_claims


CHILD = """
    import os, importlib.util
    claims["cwd"] = os.getcwd()
    claims["word"] = os.environ["WORD"]
    print("noise on stdout")
    @claim
    def right(): return [1, None, "two"]
    @claim
    def wrong(): raise ValueError("a reason")
    @claim
    def network(): socket.create_connection(("192.0.2.1", 80), timeout=1)
    @claim
    def package(): return importlib.util.find_spec("hf_diffusion") is not None
"""


def test_claims_of_one_child_come_back_as_json_and_an_error_is_a_claim_too(tmp_path):
    claims = run_claims(CHILD, cwd=tmp_path, env={"WORD": "hello"})
    assert claims["cwd"] == str(tmp_path) and claims["word"] == "hello"
    assert claims["right"] == [1, None, "two"]
    assert claims["wrong"] == "ValueError: a reason"
    assert claims["network"].startswith("AssertionError: the network was asked for ('192.0.2.1', 80)")
    assert claims["package"] is True


def test_a_child_without_the_package_cannot_import_it():
    source = "@claim\ndef package(): import hf_diffusion"
    assert run_claims(source, with_package=False)["package"].startswith("ModuleNotFoundError")


def test_a_child_that_fails_shows_its_traceback():
    with pytest.raises(AssertionError, match="ZeroDivisionError"):
        run_claims("1 / 0")
