"""A page on which anybody draws from a diffusion pipeline: `python app.py`, here or as a Space.

It needs gradio, diffusers and the model, whose pipeline's code lies beside its weights. What it
offers is what the pipeline says of itself: the arguments of its call, its classes, the schedulers
that are compatible with its own, the shape of a sample. Change it as you like: it is yours.
"""

import inspect
import queue
import random
import threading
import time
import traceback
import types
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any


try:
    # Before torch: on ZeroGPU it lends a GPU to what it wraps, elsewhere it does nothing.
    from spaces import GPU as lend_gpu
except ImportError:

    def lend_gpu(function):
        return function


import gradio as gr
import numpy as np
import torch
from diffusers import DiffusionPipeline, SchedulerMixin
from PIL import Image, ImageDraw, ImageFont


# Filled in by `hf-diffusion space`: a folder beside this file or a repository on the Hub, the
# commit there, and what the page is called. Only the code of this commit is run.
MODEL: str = "model"
REVISION: str | None = None
TITLE: str = "A diffusion model"

# What is offered of a pipeline that has no `sampling_options`, and what stands beside the button.
USUAL_OPTIONS = ("num_inference_steps", "guidance_scale", "eta")
FOREMOST = ("num_inference_steps", "guidance_scale")
PROMPTS = ("prompt", "negative_prompt")
# By the kind of sample: how many are drawn at first, and at most.
COUNTS = {"images": (16, 64), "points": (500, 5000), "texts": (4, 16)}
EVERY_CLASS, NO_CLASS = "every class in turn", "no class"
HIGHEST_SEED = 2**53 - 1  # beyond, a browser's numbers have gaps
# So many steps are shown, of so many samples.
SHOWN_STEPS, FOLLOWED = {"images": 8, "points": 8, "texts": 64}, 4
READABLE_SIDE = 72  # pixels; smaller images are enlarged to about this, without smoothing
INK, RULE = (40, 40, 40), (220, 220, 220)
COLOURS = "#4e79a7 #f28e2b #59a14f #e15759 #76b7b2 #b07aa1 #9c755f #edc948 #ff9da7 #79706e".split()


class Stopped(Exception):
    """Nobody waits for the samples any more."""


class Drawer:
    """A pipeline, what it offers, and how it is called.

    Raises ValueError for a pipeline whose samples cannot be shown.
    """

    def __init__(self, pipe: DiffusionPipeline):
        self.pipe, self.lock = pipe, threading.Lock()
        pipe.set_progress_bar_config(disable=True)
        self.accepted = inspect.signature(type(pipe).__call__).parameters
        self.kind = self.kind_of_samples()
        self.example = pipe.example_call() if hasattr(pipe, "example_call") else {}
        self.scheduler = getattr(pipe, "scheduler", None)
        self.schedulers = {short_name(cls): cls for cls in compatible_classes(self.scheduler)}
        names = getattr(pipe, "id2label", None) or {}
        count = getattr(pipe, "num_classes", None) if "class_labels" in self.accepted else None
        self.classes = {i: names.get(i, str(i)) for i in range(count or 0)}
        named = list(self.classes.values())
        # A class is chosen by its name, or by its number where others have that name, too.
        self.choices = {name if named.count(name) == 1 else f"{name} ({i})": i for i, name in self.classes.items()}
        hints = typing.get_type_hints(type(pipe).__call__)
        options = getattr(pipe, "sampling_options", USUAL_OPTIONS)
        options = [name for name in options if name in self.accepted and name not in PROMPTS]
        self.options = {name: without_none(hints.get(name)) for name in options}

    def kind_of_samples(self) -> str:
        """What the pipeline draws: "images", "points" of the plane or "texts"."""
        shape = getattr(self.pipe, "sample_shape", None)
        default = self.accepted["output_type"].default if "output_type" in self.accepted else "pil"
        if default == "text":
            return "texts"
        if default == "pil" and (shape is None or len(shape) == 3):
            return "images"
        if shape is not None and tuple(shape) == (2,):
            return "points"
        raise ValueError(f"samples of {type(self.pipe).__name__} are no images, points of the plane or texts")

    # --- what the page asks for ---------------------------------------------------------------

    def condition_fields(self) -> dict[str, gr.components.Component]:
        """Fields for what the samples should be of."""
        fields = {}
        for name in PROMPTS:
            if name in self.accepted:
                shown = self.example.get(name, "")
                shown = shown if isinstance(shown, str) else shown[0]
                fields[name] = gr.Textbox(shown, label=name.replace("_", " ").capitalize())
        if self.classes:
            # A prompt takes the place of a class where images have either.
            either = "prompt" in fields and self.kind == "images"
            has_none = either or getattr(self.pipe, "null_class_id", None) is not None
            choices = [EVERY_CLASS, *([NO_CLASS] if has_none else []), *self.choices]
            fields["class_label"] = gr.Dropdown(choices, value=NO_CLASS if either else EVERY_CLASS, label="Class")
        return fields

    def option_field(self, name: str) -> gr.components.Component:
        """The field of one argument of the call, with its value in the example or its default."""
        hint = self.options[name]
        value = self.example.get(name, self.accepted[name].default)
        label = name.replace("_", " ").capitalize()
        if name == "num_inference_steps" and value is not None:
            return gr.Slider(1, max(100, value), value=value, step=1, label="Steps")
        if name == "guidance_scale":
            return gr.Slider(0, max(15, value), value=value, step=0.1, label="Guidance")
        if hint is bool:
            return gr.Checkbox(value, label=label)
        if typing.get_origin(hint) is typing.Literal:
            return gr.Dropdown([("its own", ""), *typing.get_args(hint)], value=value or "", label=label)
        # A number's field that is empty turns into 0 when it is first shown; a text's stays empty.
        if hint in (int, float) and value is not None:
            return gr.Number(value, label=label)
        shown = ", ".join(map(str, value)) if isinstance(value, (tuple, list)) else value
        return gr.Textbox(shown, label=label, placeholder="its own")

    # --- what is drawn ------------------------------------------------------------------------

    def labels(self, chosen: str, count: int) -> list[int] | None:
        """The class of each sample; None for samples of no class."""
        if chosen == NO_CLASS:
            return None
        if chosen == EVERY_CLASS:
            return [i % len(self.classes) for i in range(count)]
        return [self.choices[chosen]] * count

    def arguments(self, values: dict[str, Any]) -> dict[str, Any]:
        """The arguments of the pipeline's call; what is left empty is left to the pipeline."""
        count, seed = whole("number of samples", values["num_samples"]), whole("seed", values["seed"])
        if not 0 <= seed <= HIGHEST_SEED - count:
            raise ValueError(f"the seed must be between 0 and {HIGHEST_SEED - count}, not {seed}")
        given = {name: parsed(name, values[name], hint) for name, hint in self.options.items()}
        given = {name: value for name, value in given.items() if value is not None}
        given |= {name: [values[name]] * count for name in PROMPTS if values.get(name)}
        labels = self.labels(values["class_label"], count) if "class_label" in values else None
        if labels is not None:
            given["class_labels"] = labels
        elif "prompt" not in given and "batch_size" in self.accepted:
            given["batch_size"] = count
        if "generator" in self.accepted:
            # One for each sample, so that a sample does not depend on how many are drawn with it.
            given["generator"] = [torch.Generator().manual_seed(seed + i) for i in range(count)]
        if self.kind == "points":
            given["output_type"] = "np"
        return given

    def draw(self, values: dict[str, Any]) -> Iterator[tuple[int, Any]]:
        """Pairs (step, samples) of some of the steps, and (-1, samples) of the end.

        The call runs in a thread of its own, and ends at its next step once nobody reads on.
        """
        arguments, left, stopped = self.arguments(values), queue.Queue(), threading.Event()
        known = getattr(self.pipe, "_callback_tensor_inputs", [])
        watched = next((name for name in ("x_0", "latents", "tokens") if name in known), None)

        def after_step(pipe, step, t, tensors):
            if stopped.is_set():
                raise Stopped
            count = getattr(pipe, "num_timesteps", None) or arguments.get("num_inference_steps") or 1
            if step % max(1, -(-count // SHOWN_STEPS[self.kind])) == 0:
                left.put((step, self.decoded(tensors[watched])))
            return {}

        if watched and "callback_on_step_end" in self.accepted:
            arguments["callback_on_step_end"] = after_step
            arguments["callback_on_step_end_tensor_inputs"] = [watched]

        def work():
            try:
                with self.lock:
                    if self.scheduler is not None:
                        name = values.get("scheduler")
                        changed = name is not None and self.schedulers[name] is not type(self.scheduler)
                        config = self.scheduler.config
                        self.pipe.scheduler = self.schedulers[name].from_config(config) if changed else self.scheduler
                    output = self.pipe(**arguments)
                left.put((-1, output.texts if self.kind == "texts" else output.images))
            except BaseException as error:
                left.put((-1, error))

        threading.Thread(target=work, daemon=True).start()
        try:
            step = 0
            while step >= 0:
                step, samples = left.get()
                if isinstance(samples, BaseException):
                    raise samples
                if samples is not None:
                    yield step, samples
        finally:
            stopped.set()

    def decoded(self, latents: torch.Tensor) -> Any:
        """What a step has left, as samples; None where it cannot be shown."""
        if self.kind == "texts":
            return self.pipe.decode(latents) if hasattr(self.pipe, "decode") else None
        if getattr(self.pipe, "vae", None) is not None and hasattr(self.pipe, "decode"):
            # Of a few alone: an autoencoder may cost as much as a step.
            latents = self.pipe.decode(latents[:FOLLOWED], "pt")
        x = latents.detach().float().cpu()
        # Noise of any level fits the picture; samples in [-1, 1] stay as they are.
        x = x / x.flatten(1).std().clamp(min=1)
        if self.kind == "points":
            return x.numpy()
        if x.ndim != 4 or x.shape[1] not in (1, 3):
            return None
        pixels = ((x.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
        return [Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image) for image in pixels]

    def shown(self, samples: Any, values: dict[str, Any]) -> Image.Image | str:
        """Images and texts with the names of their classes, points as a plot coloured by class."""
        labels = self.labels(values["class_label"], len(samples)) if "class_label" in values else None
        if self.kind == "points":
            return scatter(np.asarray(samples), labels, self.classes)
        names = None if labels is None else [self.classes[i] for i in labels]
        if self.kind == "texts":
            return "\n\n".join(samples if names is None else map("{}:\n{}".format, names, samples))
        return tile(samples, names=names)


def compatible_classes(scheduler: SchedulerMixin | None) -> list[type[SchedulerMixin]]:
    """The class of a scheduler, then those that take over its process by `from_config`."""
    if scheduler is None:
        return []
    # diffusers has a stand-in for a class whose library is missing
    others = [cls for cls in getattr(scheduler, "compatibles", []) if issubclass(cls, SchedulerMixin)]
    return [type(scheduler), *sorted(others, key=short_name)]


def short_name(cls: type[SchedulerMixin]) -> str:
    """The name of a scheduler's class without what all such names have."""
    return cls.__name__.removesuffix("Scheduler")


# --- texts of fields as values --------------------------------------------------------------------


def without_none(hint: Any) -> Any:
    """The annotation of an argument that may be None, without the None."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        rest = [part for part in typing.get_args(hint) if part is not types.NoneType]
        return rest[0] if len(rest) == 1 else hint
    return hint


def whole(name: str, value: float | None) -> int:
    """A whole number; ValueError for anything else."""
    if value is None or value != int(value):
        raise ValueError(f"the {name} must be a whole number, not {'nothing' if value is None else f'{value:g}'}")
    return int(value)


def parsed(name: str, value: Any, hint: Any) -> Any:
    """What a field holds, as an argument of the annotated type; None for an empty field."""
    if value is None or value == "":
        return None
    if hint in (int, float):
        try:
            number = float(value)
        except ValueError:
            raise ValueError(f"{name}: write a number, or nothing, not {value!r}") from None
        return whole(name, number) if hint is int else number
    if isinstance(value, str) and typing.get_origin(hint) in (tuple, list, Sequence):
        try:
            return tuple(float(part) for part in value.split(","))
        except ValueError:
            raise ValueError(f"{name}: write numbers and commas between them, not {value!r}") from None
    return value


# --- pictures -------------------------------------------------------------------------------------


def tile(images: Sequence[Image.Image], columns: int | None = None, names: Sequence[str] | None = None) -> Image.Image:
    """Images in rows, each with its name below it."""
    columns = columns or int(np.ceil(len(images) ** 0.5))
    scale = max(1, round(READABLE_SIDE / max(images[0].size)))
    width, height, gap, line = images[0].width * scale, images[0].height * scale, 4, 16 if names else 0
    rows = -(-len(images) // columns)
    grid = Image.new("RGB", (columns * (width + gap) + gap, rows * (height + gap + line) + gap), "white")
    pen, font = ImageDraw.Draw(grid), ImageFont.load_default(12)
    for place, image in enumerate(images):
        x, y = gap + place % columns * (width + gap), gap + place // columns * (height + gap + line)
        grid.paste(image.convert("RGB").resize((width, height), Image.Resampling.NEAREST), (x, y))
        if names:
            name = names[place]
            while font.getlength(name) > width and len(name) > 1:
                name = name[:-2] + "…"
            pen.text((x + width / 2, y + height + 1), name, fill=INK, font=font, anchor="mt")
    return grid


def scatter(points: np.ndarray, labels: Sequence[int] | None, names: dict[int, str], side: int = 400) -> Image.Image:
    """Points (B, 2) of the square [-1.2, 1.2]^2, coloured by class, with a legend."""
    shown = list(dict.fromkeys(labels or []))[:20]
    plot = Image.new("RGB", (side + (130 if shown else 0), side), "white")
    pen, font = ImageDraw.Draw(plot), ImageFont.load_default(12)
    for value in (-1, 0, 1):
        at = side * (value + 1.2) / 2.4
        pen.line((at, 0, at, side), fill=RULE)
        pen.line((0, at, side, at), fill=RULE)
        pen.text((at + 3, side - 15), str(value), fill=INK, font=font)
    for place, (x, y) in enumerate(points):
        colour = COLOURS[(labels[place] if labels else 0) % len(COLOURS)]
        x, y = side * (x + 1.2) / 2.4, side * (1.2 - y) / 2.4
        if 0 <= x < side and 0 <= y < side:
            pen.ellipse((x - 2, y - 2, x + 2, y + 2), fill=colour)
    for row, label in enumerate(shown):
        pen.ellipse((side + 10, 12 + 19 * row, side + 18, 20 + 19 * row), fill=COLOURS[label % len(COLOURS)])
        pen.text((side + 24, 16 + 19 * row), names[label][:16], fill=INK, font=font, anchor="lm")
    return plot


# --- the page -------------------------------------------------------------------------------------


def sentence(error: BaseException) -> gr.Error:
    """What the visitor reads of an error; what is no mistake of theirs goes to the log as well."""
    text = " ".join(str(error).split())
    if isinstance(error, torch.OutOfMemoryError):
        text = "the samples do not fit into memory; draw fewer at a time"
    elif not isinstance(error, (ValueError, TypeError)) or not text:
        traceback.print_exception(error)
        text = f"{type(error).__name__}: {text}"
    return gr.Error(text, duration=30, print_exception=False)


def build(pipe: DiffusionPipeline, title: str = TITLE) -> gr.Blocks:
    """The page of a pipeline; its one function is the endpoint `/sample` of the Space's API."""
    drawer = Drawer(pipe)
    first, most = COUNTS[drawer.kind]
    with gr.Blocks(title=title, analytics_enabled=False) as page:
        gr.Markdown(f"# {title}")
        with gr.Row():
            with gr.Column(scale=2, min_width=300):
                fields = drawer.condition_fields()
                fields["num_samples"] = gr.Slider(1, most, value=first, step=1, label="Number of samples")
                fields |= {name: drawer.option_field(name) for name in FOREMOST if name in drawer.options}
                if len(drawer.schedulers) > 1:
                    names = list(drawer.schedulers)
                    fields["scheduler"] = gr.Dropdown(names, value=names[0], label="Solver")
                fields["seed"] = gr.Number(0, label="Seed of the first sample")
                with gr.Row():
                    again = gr.Button("Another seed", elem_id="another")
                    stop = gr.Button("Stop", elem_id="stop")
                    button = gr.Button("Draw", variant="primary", elem_id="draw")
                more = [name for name in drawer.options if name not in FOREMOST]
                if more:
                    with gr.Accordion("More options", open=False):
                        fields |= {name: drawer.option_field(name) for name in more}
            with gr.Column(scale=3, min_width=300):
                if drawer.kind == "texts":
                    shown = [gr.Textbox(label="Texts", lines=12, elem_id="samples", interactive=False)]
                    note = gr.Markdown(elem_id="note")
                else:
                    look = {"format": "png", "interactive": False, "buttons": ["fullscreen", "download"]}
                    shown = [gr.Image(label="Samples", show_label=False, elem_id="samples", **look)]
                    note = gr.Markdown(elem_id="note")
                    shown.append(gr.Image(label="From noise to samples", show_label=False, elem_id="steps", **look))

        for name, field in fields.items():
            field.elem_id = name

        @lend_gpu
        def sample(*given):
            values = dict(zip(fields, given))
            began, kept = time.monotonic(), []
            try:
                for step, samples in drawer.draw(values):
                    said = f"step {step + 1} ..."
                    if step < 0:
                        seed = int(values["seed"])
                        seeds = f"seeds {seed} to {seed + len(samples) - 1}" if len(samples) > 1 else f"seed {seed}"
                        what = drawer.kind if len(samples) > 1 else drawer.kind.removesuffix("s")
                        said = f"{len(samples)} {what} in {time.monotonic() - began:.1f} s, {seeds}"
                    if drawer.kind == "texts":
                        yield drawer.shown(samples, values), said
                        continue
                    kept.append(samples[:FOLLOWED] if drawer.kind == "images" else samples)
                    yield drawer.shown(samples, values), film(drawer, kept), said
            except Exception as error:
                raise sentence(error) from None

        sample.__doc__ = f"Draw {drawer.kind} from {title}; a stream of its steps, whose last entry is the result."
        sample.__signature__ = inspect.Signature(
            inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=field.value)
            for name, field in fields.items()
        )
        event = {"fn": sample, "inputs": list(fields.values()), "outputs": [*shown, note], "show_progress": "minimal"}
        drawing = button.click(**event, api_name="sample")
        new_seed = again.click(lambda: random.randrange(2**31), outputs=fields["seed"], api_visibility="private")
        drawing_again = new_seed.then(**event, api_visibility="private")
        stop.click(None, cancels=[drawing, drawing_again], api_visibility="private")
    return page


def film(drawer: Drawer, kept: Sequence[Any]) -> Image.Image:
    """The kept steps from left to right: of images a row for each followed one."""
    if drawer.kind == "images":
        return tile([frame[row] for row in range(len(kept[0])) for frame in kept], columns=len(kept))
    return tile([scatter(points, None, {}, side=200) for points in kept], columns=min(4, len(kept)))


def load() -> DiffusionPipeline:
    """The model, with the code that lies beside its weights, on the best device."""
    beside = Path(__file__).with_name(MODEL)
    place = {"pretrained_model_name_or_path": beside if beside.is_dir() else MODEL}
    place |= {} if REVISION is None else {"revision": REVISION}
    pipe = DiffusionPipeline.from_pretrained(**place, trust_remote_code=True, use_safetensors=True)
    return pipe.to("cuda" if torch.cuda.is_available() else "cpu")


def launch(page: gr.Blocks, **options: Any) -> tuple:
    """Serve a page in the visitor's own fonts: nothing is fetched from elsewhere."""
    theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    return page.launch(theme=theme, footer_links=["api"], **options)


if __name__ == "__main__":
    launch(build(load()), show_error=True)
