"""A process that sends an outbox and can be killed at it: a fork of one that has no torch."""

import multiprocessing
import os
from multiprocessing.process import BaseProcess
from pathlib import Path

from huggingface_hub import HfApi, constants

from hf_diffusion.hub import outbox


def sender(folder: Path, api: HfApi, by_xet: bool) -> BaseProcess:
    """The process, started."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    process = context.Process(target=_send, args=(folder, api.endpoint, api.token, by_xet), daemon=True)
    process.start()
    return process


def _send(folder: Path, endpoint: str, token: str, by_xet: bool) -> None:
    # Both are those of the process that forks, which may have known another server.
    os.environ["HF_ENDPOINT"] = constants.ENDPOINT = endpoint
    constants.HUGGINGFACE_CO_URL_TEMPLATE = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    constants.HF_HUB_DISABLE_XET = not by_xet
    list(outbox.push_pending(folder, HfApi(endpoint=endpoint, token=token)))
