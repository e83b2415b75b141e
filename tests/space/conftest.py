"""Saved pipelines, and the page of each on loopback."""

from collections.abc import Callable

import pytest

from tests.pipelines.tiny import make_classifier_free, make_points


@pytest.fixture(scope="package")
def saved(tmp_path_factory):
    """Folders of tiny pipelines by name: images of four classes, and points of the plane."""
    folder = tmp_path_factory.mktemp("saved")
    make_classifier_free().save_pretrained(folder / "tiny_images")
    make_points().save_pretrained(folder / "tiny_points")
    return folder


@pytest.fixture(scope="package")
def serve() -> Callable:
    """`serve(page)` is the address at which the page is served until the tests end."""
    pages = []

    def start(page) -> str:
        from hf_diffusion.space.app import launch

        pages.append(page)
        _, address, _ = launch(page, server_name="127.0.0.1", prevent_thread_lock=True, quiet=True, show_error=True)
        return address

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_ANALYTICS_ENABLED", "False")
        yield start
        for page in pages:
            page.close(verbose=False)
