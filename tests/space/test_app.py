"""The page: what it offers of each pipeline, what it draws, how its errors read, its endpoint."""

import inspect
import pickle

import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from diffusers.utils import BaseOutput
from PIL import Image

import hf_diffusion
from hf_diffusion.commands.space import SpaceCommand
from tests.launching import run_claims
from tests.pipelines.tiny import TINY, make_classifier_free, make_points, make_points_in_few_steps


gradio = pytest.importorskip("gradio", reason="gradio is missing: pip install 'hf-diffusion[space]'")
gradio_client = pytest.importorskip("gradio_client")

from hf_diffusion.space import app  # noqa: E402


def values(drawer: app.Drawer, **changes) -> dict:
    """What the fields of the page hold, with these changes."""
    first, _ = app.COUNTS[drawer.kind]
    held = {name: field.value for name, field in drawer.condition_fields().items()}
    held |= {name: drawer.option_field(name).value for name in drawer.options}
    return held | {"num_samples": first, "seed": 0, "num_inference_steps": 3} | changes


def drawn(drawer: app.Drawer, **changes):
    """The last samples, and how many pictures came before them."""
    steps = list(drawer.draw(values(drawer, **changes)))
    assert steps[-1][0] == -1 and all(step >= 0 for step, _ in steps[:-1])
    return steps[-1][1], len(steps) - 1


@pytest.mark.parametrize("cls", TINY, ids=lambda cls: cls.__name__)
def test_every_pipeline_is_offered_as_it_describes_itself_and_draws_what_it_draws_when_called(cls):
    pipe = TINY[cls].make()
    drawer = app.Drawer(pipe)
    assert list(drawer.options) == list(pipe.sampling_options) and drawer.kind == "images"
    page = app.build(pipe, "Tiny")
    (endpoint,) = [fn for fn in page.fns.values() if fn.api_name == "sample"]
    assert set(pipe.sampling_options) <= set(inspect.signature(endpoint.fn).parameters)
    images, shown = drawn(drawer, num_samples=3, seed=5, class_label="dog", prompt="")
    assert shown >= 1
    given = {name: value for name, value in drawer.example.items() if name in pipe.sampling_options}
    options = {**given, "num_inference_steps": 3}
    generators = [torch.Generator().manual_seed(5 + i) for i in range(3)]
    expected = pipe(class_labels=["dog"] * 3, generator=generators, **options).images
    assert [image.tobytes() for image in images] == [image.tobytes() for image in expected]


@pytest.mark.parametrize("make", [make_points, make_points_in_few_steps])
def test_points_are_drawn_as_a_plot_that_has_a_colour_for_each_class(make):
    drawer = app.Drawer(make())
    points, _ = drawn(drawer, num_samples=200)
    assert drawer.kind == "points" and points.shape == (200, 2)
    plot = np.asarray(drawer.shown(np.zeros((4, 2)) + [[0.5], [-0.5], [0.0], [0.9]], values(drawer)))
    for colour in app.COLOURS[:4]:
        assert (plot == [int(colour[i : i + 2], 16) for i in (1, 3, 5)]).all(-1)[:, :400].any(), colour


def test_a_class_is_chosen_by_its_name_where_that_is_its_own_and_each_in_turn():
    drawer = app.Drawer(make_classifier_free())
    assert list(drawer.choices) == ["cat", "dog", "crane (2)", "crane (3)"]
    assert drawer.labels("crane (3)", 2) == [3, 3] and drawer.labels(app.NO_CLASS, 2) is None
    assert drawer.labels(app.EVERY_CLASS, 6) == [0, 1, 2, 3, 0, 1]


def test_another_solver_takes_over_the_process_and_the_pipelines_own_comes_back():
    pipe = make_classifier_free()
    own, drawer = pipe.scheduler, app.Drawer(pipe)
    assert next(iter(drawer.schedulers)) == "LinearDDPM" and "UniPCMultistep" in drawer.schedulers
    ours, _ = drawn(drawer, num_samples=2)
    other, _ = drawn(drawer, num_samples=2, scheduler="UniPCMultistep")
    assert type(pipe.scheduler).__name__ == "UniPCMultistepScheduler" and other != ours
    again, _ = drawn(drawer, num_samples=2, scheduler="LinearDDPM")
    assert pipe.scheduler is own and again == ours


def test_what_is_left_empty_is_left_to_the_pipeline():
    drawer = app.Drawer(make_classifier_free())
    given = drawer.arguments(values(drawer, eta="", guidance_interval="", num_samples=2))
    assert not {"eta", "guidance_interval"} & set(given) and given["class_labels"] == [0, 1]
    given = drawer.arguments(values(drawer, guidance_interval="0.1, 0.5", eta="0.5"))
    assert given["guidance_interval"] == (0.1, 0.5) and given["eta"] == 0.5


def test_nobody_waiting_ends_a_call_at_its_next_step():
    drawer, calls = app.Drawer(make_classifier_free()), []
    drawer.pipe.unet.register_forward_pre_hook(lambda *_: calls.append(1))
    steps = drawer.draw(values(drawer, num_inference_steps=1000, guidance_scale=1.0, num_samples=1))
    next(steps)
    steps.close()
    with drawer.lock:
        assert len(calls) < 500


@pytest.mark.parametrize(
    "changes, sentence",
    [
        ({"seed": -1}, r"the seed must be between 0 and \d+, not -1"),
        ({"seed": 1.5}, "the seed must be a whole number, not 1.5"),
        ({"seed": None}, "the seed must be a whole number, not nothing"),
        ({"num_inference_steps": 0}, "num_inference_steps must be a whole number of at least 1, not 0"),
        ({"eta": "5", "scheduler": "DDIMEta"}, "eta must be between 0 and 1, not 5.0"),
        ({"eta": "much"}, "eta: write a number, or nothing, not 'much'"),
        ({"guidance_interval": "a, b"}, "guidance_interval: write numbers and commas between them, not 'a, b'"),
        ({"class_label": app.NO_CLASS, "guidance_scale": 2.0}, "guidance_scale=2.0 needs class_labels"),
    ],
)
def test_a_mistake_is_answered_in_one_sentence(changes, sentence):
    with pytest.raises(ValueError, match=sentence) as raised:
        drawn(app.Drawer(make_classifier_free()), **changes)
    shown = app.sentence(raised.value)
    assert isinstance(shown, gradio.Error) and "\n" not in shown.message and not shown.print_exception


def test_a_fault_that_is_nobodys_mistake_names_its_kind_and_goes_to_the_log(capsys):
    assert app.sentence(RuntimeError("one\n  two")).message == "RuntimeError: one two"
    assert "RuntimeError" in capsys.readouterr().err
    assert app.sentence(torch.OutOfMemoryError("CUDA ...")).message.endswith("draw fewer at a time")


def test_a_pipeline_whose_samples_cannot_be_shown_is_refused():
    class Vectors(hf_diffusion.ClassifierFreeGuidancePipeline):
        sample_shape = (5,)

    unet, scheduler = make_classifier_free().components["unet"], make_classifier_free().scheduler
    with pytest.raises(ValueError, match="samples of Vectors are no images, points of the plane or texts"):
        app.Drawer(Vectors(unet, scheduler))


# --- the endpoint, and the folder that runs without the package ---


@pytest.fixture(scope="module")
def client(serve):
    address = serve(app.build(make_classifier_free(), "Tiny"))
    return gradio_client.Client(address, verbose=False, download_files=False)


def test_the_endpoint_lists_its_arguments_by_name_each_with_a_default(client):
    (endpoint,) = client.view_api(print_info=False, return_format="dict")["named_endpoints"].items()
    name, described = endpoint
    assert name == "/sample" and all(field["parameter_has_default"] for field in described["parameters"])
    names = [field["parameter_name"] for field in described["parameters"]]
    assert names[:2] == ["class_label", "num_samples"] and {"seed", "scheduler", "eta"} < set(names)


def test_the_endpoint_returns_the_grid_the_steps_and_a_sentence(client):
    grid, steps, note = client.predict(
        api_name="/sample", num_inference_steps=4, num_samples=4, class_label="cat", seed=7
    )
    assert grid["url"].startswith("http") and steps["url"].startswith("http")
    assert note.startswith("4 images in ") and note.endswith(" s, seeds 7 to 10")


def test_the_endpoint_answers_a_mistake_with_its_sentence(client):
    with pytest.raises(gradio_client.exceptions.AppError, match="eta must be between 0 and 1, not 5"):
        client.predict(api_name="/sample", eta="5", scheduler="DDIMEta")


def test_the_folder_of_a_space_draws_without_the_package(saved, tmp_path):
    SpaceCommand(pipeline=str(saved / "tiny_images"), output=tmp_path / "space").run()
    claims = run_claims(
        f"""
        import runpy
        page = runpy.run_path({str(tmp_path / "space" / "app.py")!r})
        drawer = page["Drawer"](page["load"]())
        held = {{name: field.value for name, field in drawer.condition_fields().items()}}
        held |= {{"num_samples": 2, "seed": 3}} | {{name: drawer.option_field(name).value for name in drawer.options}}
        *_, (step, images) = drawer.draw(held | {{"num_inference_steps": 3}})
        claims["images"] = [list(image.tobytes()) for image in images]
        claims["page"] = type(page["build"](drawer.pipe)).__name__
        claims["module"] = type(drawer.pipe).__module__
        """,
        with_package=False,
    )
    drawer = app.Drawer(hf_diffusion.ClassifierFreeGuidancePipeline.from_pretrained(saved / "tiny_images"))
    images, _ = drawn(drawer, num_samples=2, seed=3)
    assert [bytes(image) for image in claims["images"]] == [image.tobytes() for image in images]
    assert claims["page"] == "Blocks" and claims["module"].startswith("diffusers_modules.")


def test_a_lent_gpu_gets_a_generator_whose_arguments_and_results_can_leave_a_process(monkeypatch):
    """As ZeroGPU does: what it wraps runs in a process of its own, and values are pickled."""

    def lend(function):
        assert inspect.isgeneratorfunction(function)

        def in_another_process(*given):
            for values in function(*pickle.loads(pickle.dumps(given))):
                yield pickle.loads(pickle.dumps(values))

        return in_another_process

    monkeypatch.setattr(app, "lend_gpu", lend)
    page = app.build(make_classifier_free(), "Lent")
    (endpoint,) = [fn for fn in page.fns.values() if fn.api_name == "sample"]
    names = list(inspect.signature(endpoint.fn).parameters)
    given = dict(zip(names, (field.value for field in endpoint.inputs))) | {"num_samples": 1, "num_inference_steps": 2}
    *_, (grid, steps, note) = endpoint.fn(*given.values())
    assert grid.size[0] < steps.size[0] and note.startswith("1 image in ") and note.endswith("seed 0")
    with pytest.raises(gradio.Error, match="the seed must be"):
        list(endpoint.fn(*(given | {"seed": -1}).values()))


def test_a_stock_pipeline_is_offered_the_usual_options_and_drawn_without_steps():
    blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2, "norm_num_groups": 2}
    unet = UNet2DModel(sample_size=8, block_out_channels=(8, 8), layers_per_block=1, **blocks)
    drawer = app.Drawer(DDPMPipeline(unet, DDPMScheduler()))
    images, shown = drawn(drawer, num_samples=2)
    assert list(drawer.options) == ["num_inference_steps"] and len(images) == 2 and shown == 0


def test_small_images_are_enlarged_and_named_and_a_long_name_is_cut():
    images = [Image.new("L", (8, 8), shade) for shade in (0, 100, 255)]
    grid = app.tile(images, names=["short", "a name that is far too long for its image", ""])
    side = 8 * 9
    assert grid.size == (2 * side + 3 * 4, 2 * (side + 4 + 16) + 4)
    assert grid.getpixel((4, 4)) == (0, 0, 0) and grid.getpixel((4 + side + 4, 4)) == (100, 100, 100)


# --- pipelines that are asked by a prompt ---


class FakeText(hf_diffusion.ClassifierFreeGuidancePipeline):
    """Not a text model: what its call takes and returns is that of one."""

    sampling_options = ("num_inference_steps", "temperature", "prompt", "suffix")
    _callback_tensor_inputs = ["tokens"]
    num_classes = None

    def example_call(self):
        return {"prompt": ["once", "twice"], "num_inference_steps": 4}

    def decode(self, tokens):
        return ["".join("░" if token < 0 else chr(token) for token in row) for row in tokens.tolist()]

    def __call__(
        self,
        prompt: str | list[str] | None = None,
        suffix: str | list[str] | None = None,
        batch_size: int | None = None,
        num_inference_steps: int | None = None,
        temperature: float = 1.0,
        generator: list[torch.Generator] | None = None,
        output_type: str = "text",
        callback_on_step_end=None,
        callback_on_step_end_tensor_inputs=("tokens",),
    ):
        texts = [f"{given}, {suffix}" for given in prompt] if prompt else ["nothing"] * batch_size
        tokens = torch.tensor([[ord(letter) for letter in text] for text in texts])
        for step in range(num_inference_steps):
            hidden = tokens.clone()
            hidden[:, step + 1 :] = -1
            callback_on_step_end(self, step, step, {"tokens": hidden})
        return BaseOutput(texts=self.decode(tokens))


def test_a_prompt_is_a_field_and_text_appears_step_by_step():
    unet, scheduler = make_classifier_free(classes=None).components["unet"], make_classifier_free().scheduler
    drawer = app.Drawer(FakeText(unet, scheduler))
    assert drawer.kind == "texts" and list(drawer.options) == ["num_inference_steps", "temperature", "suffix"]
    (field,) = drawer.condition_fields().values()
    assert field.value == "once"
    seen = list(drawer.draw(values(drawer, prompt="ab", suffix="c", num_samples=2)))
    assert seen == [(0, ["a░░░░"] * 2), (1, ["ab░░░"] * 2), (2, ["ab,░░"] * 2), (-1, ["ab, c"] * 2)]
    assert list(drawer.draw(values(drawer, prompt="", num_samples=3)))[-1] == (-1, ["nothing"] * 3)
    page = app.build(drawer.pipe, "Texts")
    (endpoint,) = [fn for fn in page.fns.values() if fn.api_name == "sample"]
    given = [field.value for field in endpoint.inputs]
    *_, (text, note) = endpoint.fn(*given)
    assert text == "\n\n".join(["once, None"] * 4) and note.startswith("4 texts in ")
