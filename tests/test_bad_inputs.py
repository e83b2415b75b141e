"""The table of bad inputs: what a user gives, the exit status, and the sentence that helps.

Status 2 is wrong usage, 1 a failure. 0 is an odd input that is dealt with; a warning or the output
says how. No row may end in a traceback, and a refused training leaves no file behind.
"""

import os
import shutil
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


# Before datasets is imported: it would reach for the network.
os.environ.setdefault("HF_UPDATE_DOWNLOAD_COUNTS", "0")

import datasets
import numpy as np
import pytest
from accelerate import Accelerator
from PIL import Image

from hf_diffusion import cli
from hf_diffusion.loop.checkpoints import MANIFEST
from hf_diffusion.loop.engines import check_engine
from hf_diffusion.training import train_classifier, train_ddgan, train_ddpm


SCRIPTS = {"ddpm": train_ddpm.main, "classifier": train_classifier.main, "ddgan": train_ddgan.main}
SHORT = (
    "--train_batch_size 4 --max_train_steps 1 --sample_steps none --num_sample_images 1"
    " --model_channels 8 --num_res_blocks 1"
)
NARROW = "--norm_num_groups 4 --num_head_channels 8 --channel_mult 1,2"
SETTINGS = {
    "ddpm": f"{SHORT} {NARROW} --ddpm_num_inference_steps 1",
    "classifier": f"{SHORT} {NARROW}",
    "ddgan": f"{SHORT} --channel_mult 1,2 --discriminator_channels 8 --latent_dim 4 --latent_embed_dim 8"
    " --time_embed_dim 8",
}
DIGITS = "--dataset_name digits --max_train_samples 8"


@dataclass(frozen=True)
class Row:
    """`words` of the command line: {name} is a file of the material, {new} a fresh folder."""

    what: str
    program: str
    words: str
    status: int
    sentence: str
    env: tuple[tuple[str, str], ...] = ()


def data(what: str, folder: str, status: int, sentence: str, more: str = "") -> Row:
    return Row(what, "ddpm", f"--train_data_dir {{{folder}}} --output_dir {{new}} {more}", status, sentence)


def setting(what: str, program: str, words: str, status: int, sentence: str) -> Row:
    return Row(what, program, f"{DIGITS} --output_dir {{new}} {words}", status, sentence)


TABLE = [
    # --- images ---
    data("a data folder that is not there", "nowhere", 1, "nowhere' does not exist; pass a folder of images"),
    data("a file that is no data", "text", 1, "is neither a folder nor a .parquet, .zip or .tar file"),
    data("an empty folder", "empty", 1, "holds no images; put files such as .png or .jpg into it"),
    data("a folder of other files", "no_images", 1,
        "holds no images, but 1 file (notes.txt) of other kinds; put files such as .png"),
    data("nothing but truncated images", "truncated_all", 1, "no image can be decoded: "),
    data("a truncated image", "truncated_one", 0, "skipped a corrupt image: "),
    data("more corrupt images than allowed", "truncated_one", 1,
        "more than max_bad_images=0 images cannot be decoded: ",
         "--max_bad_images 0"),
    data("a zero-byte image", "zero_byte", 0, "the file is empty"),
    data("mixed sizes", "mixed_sizes", 1, "pass --resolution to bring all images to one size"),
    data("an odd size late in the set", "odd_late", 1,
        "while the set began with 8x8; pass --resolution", "--train_batch_size 100"),
    data("mixed modes", "mixed_modes", 0, "images of modes ['L', 'RGB', 'RGBA'] are brought to 4 channels of 8 bits"),
    data("an animated GIF", "animated", 0, "of animations only the first frame is used"),
    data("a 16-bit PNG", "deep", 0, "trained 1 steps"),
    data("a floating-point TIFF", "floating", 1,
        "has floating-point pixels of unknown range; store images with 8 or 16 bits"),
    data("a 1-pixel image", "pixel", 1, "sample_size"),
    data("sides that cannot be halved", "seven", 1, "sample_size"),
    data("names in other scripts", "names", 0, "trained 1 steps", "--class_conditional"),
    data("a broken zip", "broken_zip", 1, "broken.zip' is damaged, incomplete or not"),
    data("a zip without images", "empty_zip", 1,
        "holds no images, but 1 file (readme.txt) of other kinds; put files such as .png"),
    data("a truncated parquet", "broken_parquet", 1, "broken.parquet' is damaged, incomplete or not"),
    data("a parquet without images", "no_image_column", 1,
        "the data set has no image column: its columns are ['number']"),
    data("an image column that is not there", "labelled", 1,
        "column 'img' is not in the data set; its columns are ['image', 'label']",
         "--image_column img"),
    data("a class id out of range", "label_range", 1, "row 1 has label -1"),
    data("class ids with a gap", "label_gap", 1, "ids up to 3 without [2]; ids must be 0..n-1"),
    data("a row without a class", "label_none", 1, "row 1 has no label in column 'label'"),
    data("a split that is not there", "good", 1,
        "split 'validation' is unknown; good has train (4), of which a part is train[:80%]", "--split validation"),
    data("classes asked of images without", "flat", 1,
        "class_conditional is set, but flat has no labels", "--class_conditional"),
    Row("a data set name that is no id", "ddpm", "--dataset_name a/b/c/d --output_dir {new}", 1, "data set 'a/b/c/d'"),
    # --- the output folder ---
    Row("a used output folder", "ddpm", f"{DIGITS} --output_dir {{used}}", 1,
        "is not empty; go on with its run by --resume_from_checkpoint latest, begin anew by --overwrite_output_dir"),
    Row("an output folder that is a file", "ddpm", f"{DIGITS} --output_dir {{text}}", 1, "is a file; give a folder"),
    Row("an output folder under a file", "ddpm", f"{DIGITS} --output_dir {{text}}/run", 1, "cannot be written"),
    # --- settings ---
    Row("no data", "ddpm", "--output_dir {new}", 2, "give the data to train on: --data with a folder of images"),
    setting("an unknown flag", "ddgan", "--num_timestep 2", 2,
        "unknown flag --num_timestep; did you mean --num_timesteps?"),
    setting("a configuration that is not there", "classifier", "--config {nowhere}", 2,
        "cannot read the configuration file"),
    setting("a configuration that is a folder", "ddpm", "--config {empty}", 2, "cannot read the configuration file"),
    setting("an unknown key", "ddpm", "--config {unknown_key}", 2,
        "lerning_rate: there is no such setting; did you mean learning_rate?"),
    setting("a value of a wrong type", "ddgan", "--config {wrong_type}", 2,
        "learning_rate: got 'fast'; allowed: a number"),
    setting("a configuration that is no YAML", "ddpm", "--config {no_yaml}", 2, "is not valid YAML (line 2"),
    setting("a binary configuration", "ddpm", "--config {binary}", 2, "is not text in UTF-8"),
    setting("a batch of 0", "ddpm", "--train_batch_size 0", 2, "train_batch_size: got 0; allowed: at least 1"),
    setting("a negative learning rate", "classifier", "--learning_rate -1", 2,
        "learning_rate: got -1.0; allowed: above 0"),
    setting("a learning rate that is no number", "ddpm", "--learning_rate nan", 2,
        "--learning_rate: got 'nan'; allowed: a number"),
    setting("a seed below 0", "ddgan", "--seed -3", 2, "seed: got -3; allowed: at least 0"),
    setting("two channels", "ddpm", "--channels 2", 2, "--channels: got '2'; allowed: 1, 3, 4 or none"),
    setting("more sampling steps than timesteps", "ddpm", "--ddpm_num_steps 5 --ddpm_num_inference_steps 6", 2,
        "6 is more than ddpm_num_steps 5"),
    setting("a batch that the discriminator cannot group", "ddgan", "--train_batch_size 6", 2,
        "train_batch_size 6 is no multiple of 4"),
    setting("a process of too many steps", "ddgan", "--num_timesteps 17", 2,
        "num_timesteps: got 17; allowed: at least 1 and at most 16"),
    setting("rates that fall", "ddgan", "--beta_min 5 --beta_max 1", 1, "beta_min"),
    setting("a held-out split that is not there", "classifier", "--eval_split test", 1, "split 'test' is unknown"),
    setting("groups that do not divide", "ddpm", "--norm_num_groups 3", 1, "groups"),
    setting("fp16 on the CPU", "ddpm", "--mixed_precision fp16", 1,
        "mixed_precision fp16 needs a GPU; on the CPU give bf16 or no"),
    Row("FSDP on the CPU", "ddpm", f"{DIGITS} --output_dir {{new}}", 1,
        "FSDP needs several GPUs: accelerate would train on this cpu without it",
        (("ACCELERATE_USE_FSDP", "true"), ("FSDP_VERSION", "2"))),
    # --- checkpoints ---
    setting("a checkpoint that is not there", "ddpm", "--resume_from_checkpoint {nowhere}", 1,
        "there is no checkpoint"),
    setting("a folder that is no checkpoint", "ddgan", "--resume_from_checkpoint {good}", 1,
        "manifest.json is missing or damaged"),
    setting("a damaged checkpoint", "ddpm", "--resume_from_checkpoint {damaged}", 1,
        "model.safetensors is different from what was saved"),
    setting("a checkpoint without its optimizer", "ddpm", "--resume_from_checkpoint {incomplete}", 1,
        "optimizer.bin is missing"),
    setting("a checkpoint of another run", "ddpm", "--seed 9 --resume_from_checkpoint {checkpoint}", 1,
        "seed was 0 and is 9"),
    setting("a checkpoint of another method", "classifier", "--resume_from_checkpoint {checkpoint}", 1,
        "belongs to another run: "),
    Row("none but damaged checkpoints", "ddpm",
        f"{DIGITS} --output_dir {{all_damaged}} --resume_from_checkpoint latest", 1, "damaged"),
    # --- pipelines and the command line ---
    Row("a pipeline that is not there", "cli", "sample {nowhere}", 1, "is neither a folder here nor a name"),
    Row("a folder without a pipeline", "cli", "info {good}", 1, "holds no pipeline: it has no model_index.json"),
    Row("an index that is no JSON", "cli", "info {bad_index}", 1, "model_index.json"),
    Row("weights cut short", "cli", "sample {bad_weights}", 1, "safetensors"),
    Row("a pipeline without weights", "cli", "sample {no_weights}", 1, "diffusion_pytorch_model"),
    Row("no command", "cli", "", 2, "required: command"),
    Row("an unknown command", "cli", "trian", 2, "invalid choice: 'trian'"),
    Row("no images to draw", "cli", "sample {pipeline} --num_images 0", 2, "num_images: got 0; allowed: at least 1"),
    Row("a number that is a word", "cli", "sample {pipeline} --num_images many", 2,
        "--num_images: got 'many'; allowed: a whole number or none"),
    Row("a class that is not there", "cli", "sample {pipeline} --class_labels 77", 2, "77"),
    Row("no sampling steps", "cli", "sample {pipeline} --num_inference_steps 0", 2,
        "num_inference_steps: got 0; allowed: at least 1"),
    Row("more steps than there are", "cli", "sample {pipeline} --num_inference_steps 5000", 1, "5000"),
    Row("a device that is not there", "cli", "sample {pipeline} --device tpu7", 1, "tpu7"),
    Row("a picture in a place that is a folder", "cli",
        "sample {pipeline} --num_images 10 --num_inference_steps 1 --output {empty}", 2,
        "does not end in the name of a picture's format; use .png"),
    Row("an unknown metric", "cli", "evaluate {pipeline} --metrics fid", 2, "--metrics fid: choose from fd, kd"),
    Row("an evaluation of nothing", "cli", "evaluate {nowhere}.npz --dataset_name digits --output_dir {new}", 1,
        "is not there"),
    Row("an array that is none", "cli", "evaluate {bad_npz} --dataset_name digits --output_dir {new}", 1, "bad.npz"),
    Row("labels of another number", "cli", "evaluate {uneven_npz} --dataset_name digits --output_dir {new}", 1,
        "labels (2,) for 3 images"),
    Row("a sweep of an unknown setting", "cli", "evaluate {pipeline} --sweep steps=1,2", 2,
        "--sweep steps=1,2: write NAME=A,B"),
    Row("a push of nothing", "cli", "push {empty} me/it", 1, "empty"),
    Row("a push without a repository", "cli", "push {pipeline}", 2,
        "give the folder and the repository, or --pending OUTPUT_DIR"),
    Row("an outbox that is not there", "cli", "push --pending {nowhere}", 1, "there is no folder"),
    Row("a conversion into a used folder", "cli", "convert {pipeline} {good} --to diffusers", 1,
        "holds something already; give another folder"),
    Row("a conversion of nothing", "cli", "convert {nowhere}.pt {new} --from openai", 1, "there is no file"),
    Row("a conversion of text", "cli", "convert {text} {new} --from openai", 1, "text"),
]  # fmt: skip


def picture(path: Path, size: tuple[int, int] = (8, 8), mode: str = "L", seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    channels = {"L": (), "RGB": (3,), "RGBA": (4,)}[mode]
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, *channels), np.uint8)).save(path)
    return path


def pictures(folder: Path, count: int = 4, **kind) -> Path:
    for number in range(count):
        picture(folder / f"{number:03}.png", seed=number, **kind)
    return folder


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def table_of(path: Path, labels: list | None, feature=None) -> Path:
    if labels is None:
        datasets.Dataset.from_dict({"number": [1, 2]}).to_parquet(path)
        return path
    encoded = [
        {"bytes": picture(path.parent / "one.png", seed=i).read_bytes(), "path": None} for i, _ in enumerate(labels)
    ]
    features = datasets.Features({"image": datasets.Image(), "label": feature})
    datasets.Dataset.from_dict({"image": encoded, "label": labels}, features=features).to_parquet(path)
    return path


def images_of_every_kind(root: Path) -> dict[str, Path]:
    """Folders and files of images; each is named by what is wrong with it."""
    made = {"text": root / "text.txt"} | {name: root / name for name in ("nowhere", "empty", "no_images")}
    made["text"].write_text("no data")
    made["empty"].mkdir()
    made["no_images"].mkdir()
    (made["no_images"] / "notes.txt").write_text("no image")
    for name in ("truncated_all", "truncated_one", "zero_byte", "mixed_sizes", "mixed_modes", "flat"):
        made[name] = pictures(root / name)
    for file in made["truncated_all"].iterdir():
        cut_short(file)
    cut_short(made["truncated_one"] / "001.png")
    (made["zero_byte"] / "002.png").write_bytes(b"")
    picture(made["mixed_sizes"] / "odd.png", (8, 9))
    picture(made["mixed_modes"] / "001.png", mode="RGB")
    picture(made["mixed_modes"] / "002.png", mode="RGBA")
    made["odd_late"] = pictures(root / "odd_late", 100)
    # The first look takes 64 evenly spaced images: not the third.
    picture(made["odd_late"] / "002.png", (8, 9))
    for name in ("animated", "deep", "floating"):
        made[name] = root / name
        made[name].mkdir()
    frames = [Image.new("L", (8, 8), level) for level in (0, 255)]
    frames[0].save(made["animated"] / "a.gif", save_all=True, append_images=frames[1:])
    Image.fromarray(np.full((8, 8), 40000, np.uint16)).save(made["deep"] / "a.png")
    Image.fromarray(np.full((8, 8), 0.5, np.float32)).save(made["floating"] / "a.tiff")
    made["pixel"] = pictures(root / "pixel", size=(1, 1))
    made["seven"] = pictures(root / "seven", size=(7, 7))
    for place in ("Größe/ä b.png", "日本語/絵.png", "emoji 🙂/x.png"):
        picture(root / "Bilder für mich" / place)
    made["names"] = root / "Bilder für mich"
    pictures(root / "good" / "cat")
    made["good"] = root / "good"
    return made


def tables_and_archives(root: Path) -> dict[str, Path]:
    made = {name: root / f"{name.removesuffix('_zip')}.zip" for name in ("broken_zip", "empty_zip")}
    with zipfile.ZipFile(made["empty_zip"], "w") as archive:
        archive.writestr("readme.txt", "no image")
    made["broken_zip"].write_bytes(b"PK\x03\x04 and no more")
    two, number = datasets.ClassLabel(names=["a", "b"]), datasets.Value("int64")
    made["labelled"] = table_of(root / "labelled.parquet", [0, 1], two)
    made["label_range"] = table_of(root / "label_range.parquet", [0, -1], number)
    made["label_gap"] = table_of(root / "label_gap.parquet", [0, 3, 1], number)
    made["label_none"] = table_of(root / "label_none.parquet", [0, None], two)
    made["no_image_column"] = table_of(root / "numbers.parquet", None)
    made["broken_parquet"] = root / "broken.parquet"
    shutil.copy(made["labelled"], made["broken_parquet"])
    cut_short(made["broken_parquet"])
    return made


def settings_files(root: Path) -> dict[str, Path]:
    texts = {"unknown_key": "lerning_rate: 1", "wrong_type": "learning_rate: fast", "no_yaml": "seed: 1\n  broken: ["}
    made = {name: root / f"{name}.yaml" for name in (*texts, "binary")}
    for name, text in texts.items():
        made[name].write_text(text)
    made["binary"].write_bytes(b"\xff\xfe\x00\x01")
    return made


def runs_and_pipelines(root: Path) -> dict[str, Path]:
    """A finished run, and copies of its checkpoint and pipeline, each damaged in one place."""
    used = root / "used"
    assert train_ddpm.main(f"{DIGITS} {SETTINGS['ddpm']} --class_conditional --output_dir {used}".split()) == 0
    plain = root / "plain"
    assert train_ddpm.main(f"{DIGITS} {SETTINGS['ddpm']} --output_dir {plain}".split()) == 0
    made = {"used": used, "pipeline": used, "checkpoint": plain / "checkpoint-00000001"}
    for name in ("damaged", "incomplete"):
        made[name] = Path(shutil.copytree(made["checkpoint"], root / name))
    cut_short(made["damaged"] / "model.safetensors")
    (made["incomplete"] / "optimizer.bin").unlink()
    made["all_damaged"] = Path(shutil.copytree(plain, root / "all_damaged"))
    (made["all_damaged"] / "checkpoint-00000001" / MANIFEST).unlink()
    for name in ("bad_index", "bad_weights", "no_weights"):
        made[name] = Path(shutil.copytree(used, root / name))
    (made["bad_index"] / "model_index.json").write_text('{"_class_name": ')
    weights = "unet/diffusion_pytorch_model.safetensors"
    cut_short(made["bad_weights"] / weights)
    (made["no_weights"] / weights).unlink()
    made["bad_npz"], made["uneven_npz"] = root / "bad.npz", root / "uneven.npz"
    made["bad_npz"].write_bytes(b"no array")
    np.savez(made["uneven_npz"], images=np.zeros((3, 8, 8), np.uint8), labels=np.zeros(2, np.int64))
    return made


@pytest.fixture(scope="module")
def material(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("material")
    return images_of_every_kind(root) | tables_and_archives(root) | settings_files(root) | runs_and_pipelines(root)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_UPDATE_DOWNLOAD_COUNTS", False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def end_of(main: Callable[[list[str]], int], words: list[str]) -> tuple[int, str]:
    """The exit status as the shell sees it, and what SystemExit prints itself."""
    try:
        return main(words), ""
    except SystemExit as stopped:
        return (1, stopped.code) if isinstance(stopped.code, str) else (stopped.code or 0, "")


@pytest.mark.parametrize("row", TABLE, ids=[row.what for row in TABLE])
def test_bad_input_is_met_by_one_sentence_and_a_status(row, material, tmp_path, capsys, caplog, monkeypatch):
    monkeypatch.chdir(tmp_path)
    new = tmp_path / "new"
    words = [word.format(**material, new=new) for word in row.words.split()]
    for variable, value in row.env:
        monkeypatch.setenv(variable, value)
    if row.program == "cli":
        main = cli.main
    else:
        main, words = SCRIPTS[row.program], SETTINGS[row.program].split() + words
    with caplog.at_level("INFO", logger="hf_diffusion"):
        status, message = end_of(main, words)
    printed = capsys.readouterr()
    said = "\n".join([message, printed.err, caplog.text, printed.out if row.status == 0 else ""])
    assert (status, row.sentence in said) == (row.status, True), said
    assert "Traceback" not in said and "\n" not in message
    if row.status:
        left = [file for file in new.rglob("*") if file.is_file() and file.name != "config.yaml"]
        assert not left, f"half-written: {left}"


@pytest.mark.parametrize("program", SCRIPTS)
def test_a_read_only_output_folder_is_refused_before_training(program, capsys):
    # Not tmp_path, whose parents only its owner may enter.
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o555)
    words = [*SETTINGS[program].split(), *DIGITS.split(), "--output_dir", str(folder / "run")]
    # Permissions do not hold root back, so it acts as nobody.
    root = os.geteuid() == 0
    try:
        if root:
            os.seteuid(65534)
        status, message = end_of(SCRIPTS[program], words)
    finally:
        if root:
            os.seteuid(0)
        folder.chmod(0o755)
        shutil.rmtree(folder)
    assert status == 1
    assert f"output_dir {folder}/run cannot be written (Permission denied); give another folder" in message
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize("engine", ["FSDP", "DeepSpeed"])
def test_a_gan_is_refused_by_engines_that_take_one_network(engine, tmp_path, monkeypatch):
    monkeypatch.setattr("hf_diffusion.loop.engines.parallelism", lambda accelerator: engine)
    words = [*SETTINGS["ddgan"].split(), *DIGITS.split(), "--output_dir", str(tmp_path / "run")]
    status, message = end_of(train_ddgan.main, words)
    assert status == 1 and message.startswith(
        f"train_ddgan.py: {engine} takes one network with its optimizer, and this method trains 2"
    )


@pytest.mark.parametrize(
    "more, sentence",
    [
        ({"dry_run": True}, "dry_run measures a whole network on every process; run it without FSDP"),
        (
            {"push_to_hub": True, "hub_strategy": "every_save"},
            "hub_strategy every_save needs the whole network on one process",
        ),
    ],
)
def test_what_a_sharded_run_cannot_do_is_refused(more, sentence, monkeypatch):
    monkeypatch.setattr("hf_diffusion.loop.engines.parallelism", lambda accelerator: "FSDP")
    config = train_ddpm.DDPMConfig(dataset_name="digits", max_train_steps=1, **more)
    with pytest.raises(ValueError, match=sentence):
        check_engine(Accelerator(cpu=True), config)
