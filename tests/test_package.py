"""`import hf_diffusion`: every component is found, and none runs before it is asked for."""

import ast
import builtins
import importlib
import pickle
import sys
import threading
from pathlib import Path
from types import ModuleType

import pytest
import torch
from diffusers import DDPMPipeline

import hf_diffusion
from hf_diffusion.lazy_modules import LazyModule, put_into_sys_modules
from hf_diffusion.models.unet_adm import ADMUNet2DModel
from hf_diffusion.schedulers.scheduling_gaussian import DDIMEtaScheduler
from tests.launching import run_claims


CHILD = """
import inspect, pickle, sys, types
import hf_diffusion


def ran():
    return [name for name in hf_diffusion._COMPONENTS if type(sys.modules[name]) is types.ModuleType]

claims["loaded by the package"] = [name for name in ("torch", "numpy", "diffusers") if name in sys.modules]
inspect.getmodule(inspect.currentframe())
claims["dir"] = [name for name in hf_diffusion.__all__ if name in dir(hf_diffusion)]
claims["missing"] = hasattr(hf_diffusion, "NoSuchClass")
claims["ran at once"] = ran()
import torch
from diffusers import DiffusionPipeline
claims["ran by torch and diffusers"] = ran()

@claim
def unpickled():
    with open(PICKLED, "rb") as file:
        return pickle.load(file).__name__

claims["ran by pickle"] = ran()

@claim
def loaded():
    pipe = DiffusionPipeline.from_pretrained(FOLDER)
    unet, scheduler = type(pipe.unet), type(pipe.scheduler)
    assert unet is hf_diffusion.ADMUNet2DModel and scheduler is hf_diffusion.DDIMEtaScheduler
    return float(sum(p.detach().double().sum() for p in pipe.unet.parameters()))

@claim
def exported():
    classes = {name: getattr(hf_diffusion, name) for name in hf_diffusion.__all__}
    return all(cls.__name__ == name for name, cls in classes.items())
"""


@pytest.fixture(scope="module")
def unet():
    torch.manual_seed(0)
    return ADMUNet2DModel(sample_size=8, in_channels=1, out_channels=1, model_channels=8, channel_mult=(1, 2),
                          num_res_blocks=1, attention_resolutions=(), num_heads=2, norm_num_groups=4)  # fmt: skip


@pytest.fixture(scope="module")
def claims(unet, tmp_path_factory):
    folder = tmp_path_factory.mktemp("package")
    # A stock pipeline records the module of each part and nothing else.
    DDPMPipeline(unet, DDIMEtaScheduler()).save_pretrained(folder / "pipeline")
    (folder / "class.pickle").write_bytes(pickle.dumps(hf_diffusion.DDGANScheduler))
    paths = f"FOLDER, PICKLED = {str(folder / 'pipeline')!r}, {str(folder / 'class.pickle')!r}\n"
    return run_claims(paths + CHILD, anew=True)


def test_importing_the_package_loads_neither_torch_nor_diffusers_and_runs_no_component(claims):
    assert claims["loaded by the package"] == claims["ran at once"] == []


def test_importing_torch_and_diffusers_afterwards_runs_no_component(claims):
    assert claims["ran by torch and diffusers"] == []


def test_diffusers_finds_the_parts_of_a_pipeline_after_nothing_but_import_hf_diffusion(claims, unet):
    assert claims["loaded"] == pytest.approx(float(sum(p.detach().double().sum() for p in unet.parameters())))


def test_unpickling_a_class_runs_its_module_alone(claims):
    assert claims["unpickled"] == "DDGANScheduler"
    assert claims["ran by pickle"] == ["hf_diffusion.schedulers.scheduling_ddgan"]


def test_every_public_class_is_listed_and_there(claims):
    assert claims["dir"] == sorted(hf_diffusion.__all__) and claims["exported"] is True
    assert claims["missing"] is False


def test_type_checkers_and_running_code_see_the_same_classes_in_the_same_modules():
    (block,) = [node for node in ast.parse(Path(hf_diffusion.__file__).read_text()).body if isinstance(node, ast.If)]
    shown = {node.module: tuple(alias.name for alias in node.names) for node in block.body}
    assert shown == hf_diffusion._COMPONENTS
    assert sorted(name for names in shown.values() for name in names) == hf_diffusion.__all__


# --- the module that runs when it is asked for something ---


@pytest.fixture
def lazy(tmp_path, monkeypatch):
    """Makes a package of one lazy module with this text."""

    def make(text: str) -> ModuleType:
        package = tmp_path / "package_of_one"
        package.mkdir()
        (package / "__init__.py").touch()
        (package / "one.py").write_text(text)
        monkeypatch.syspath_prepend(tmp_path)
        importlib.invalidate_caches()
        put_into_sys_modules("package_of_one.one")
        return sys.modules["package_of_one.one"]

    yield make
    for name in ("package_of_one.one", "package_of_one"):
        sys.modules.pop(name, None)


def test_a_lazy_module_runs_once_at_its_first_attribute_and_is_an_ordinary_one_then(lazy):
    one = lazy("import builtins\nbuiltins.runs = getattr(builtins, 'runs', 0) + 1\nvalue = 7\n")
    assert one.__file__.endswith("one.py") and not hasattr(one, "__path__") and type(one) is LazyModule
    assert not hasattr(builtins, "runs") and sys.modules["package_of_one"].one is one
    from package_of_one.one import value

    assert (value, one.value, builtins.runs, type(one)) == (7, 7, 1, ModuleType)
    put_into_sys_modules("package_of_one.one")
    assert sys.modules["package_of_one.one"] is one
    with pytest.raises(AttributeError, match="module 'package_of_one.one' has no attribute 'other'"):
        _ = one.other
    del builtins.runs


def test_a_lazy_module_that_fails_tells_its_reason_every_time(lazy):
    one = lazy("early = 1\nimport no_such_library\nlate = 2\n")
    for _ in range(2):
        with pytest.raises(ModuleNotFoundError, match="no_such_library"):
            _ = one.late


def test_a_second_thread_waits_until_a_lazy_module_has_run(lazy):
    one = lazy("import time\nearly = 1\ntime.sleep(0.1)\nlate = 2\n")
    seen = []
    threads = [threading.Thread(target=lambda: seen.append(one.late)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == [2, 2, 2, 2]
