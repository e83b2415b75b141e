"""Showing a page in a browser until Ctrl-C."""

import importlib.util
import os
import threading
from typing import TYPE_CHECKING

from hf_diffusion.config.options import UsageError


if TYPE_CHECKING:
    import gradio


HOST = "127.0.0.1"


def require_gradio() -> None:
    """UsageError, with what to do, where gradio is missing or too old."""
    how = "install it by `pip install 'hf-diffusion[space]'`"
    if importlib.util.find_spec("gradio") is None:
        raise UsageError(f"a page in the browser needs gradio; {how}")
    import gradio

    if int(gradio.__version__.split(".")[0]) < 6:
        raise UsageError(f"a page in the browser needs gradio 6 or later, not {gradio.__version__}; {how}")


def serve(page: "gradio.Blocks", port: int | None, host: str = HOST) -> None:
    """Serve a page, say where, and wait; a Ctrl-C ends it.

    port: None takes a free one. UsageError for a port that is taken.
    """
    from hf_diffusion.space.app import launch

    # A request of gradio to its makers, and one of the browser, would leave this machine.
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    try:
        where = {"server_name": host, "server_port": port}
        _, address, _ = launch(page, **where, prevent_thread_lock=True, quiet=True, show_error=True)
    except OSError as error:
        raise UsageError(f"--port {port}: {host} has no free port there ({error}); leave it out") from None
    print(f"open {address} in a browser; Ctrl-C ends it", flush=True)
    try:
        threading.Event().wait()
    except KeyboardInterrupt:
        print("\nended", flush=True)
    finally:
        page.close(verbose=False)
