"""A stream is the same for any number of processes, and takes no more memory than its buffer."""

import io
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from hf_diffusion.data.images import load_images
from hf_diffusion.data.splits import load_unaugmented
from tests.data.making import (
    folder_of,
    labelled_parquet,
    same,
    truncate,
)


def take(stream, count: int) -> list[dict]:
    return list(itertools.islice(stream, count))


def test_a_stream_has_the_attributes_of_the_set_and_every_image_once_in_an_epoch():
    stream, data = load_images("digits", streaming=True, max_train_samples=40), load_images("digits")
    assert (stream.channels, stream.size, stream.class_names) == (data.channels, data.size, data.class_names)
    batches_of_epoch = take(stream.stream(0, batch_size=8), 5)
    pixels = torch.cat([batch["x_0"] for batch in batches_of_epoch]).flatten(1)
    wanted = data.fetch(range(40), 0)["x_0"].flatten(1)
    found = (pixels[:, None] == wanted).all(-1)
    assert (found.any(0)).all() and (found.any(1)).all()
    assert not torch.equal(pixels, wanted)  # shuffled
    assert torch.cat([batch["indices"] for batch in batches_of_epoch]).tolist() == list(range(40))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_does_not_depend_on_processes_workers_or_where_it_was_resumed(workers):
    def opened():
        return load_images("digits", streaming=True, max_train_samples=21, random_flip=True, seed=4, shuffle_buffer=8)

    whole = take(opened().stream(0, batch_size=8), 8)  # three epochs of 21
    ranks = [take(opened().stream(0, rank, 2, 4, num_workers=workers), 8) for rank in range(2)]
    for batch, left, right in zip(whole, *ranks):
        assert same(batch, {key: torch.cat([left[key], right[key]]) for key in batch})
    assert all(map(same, whole[6:], take(opened().stream(48, batch_size=8, num_workers=workers), 2)))
    assert not torch.equal(whole[0]["x_0"], whole[3]["x_0"])


@pytest.mark.parametrize("world", [1, 2])
def test_a_corrupt_image_in_a_stream_is_replaced_by_the_next_good_one(tmp_path, world):
    folder = folder_of(tmp_path / "set", {"a": 4, "b": 4})
    clean = take(load_images(train_data_dir=str(folder), streaming=True).stream(0, batch_size=8), 2)
    clean = {key: torch.cat([batch[key] for batch in clean]) for key in clean[0]}
    broken = load_images(train_data_dir=str(folder)).fetch([3], 0)["x_0"][0]
    place = next(p for p in range(8) if torch.equal(clean["x_0"][p], broken))
    truncate(folder / "a" / "03.png")
    streams = [load_images(train_data_dir=str(folder), streaming=True) for _ in range(world)]
    parts = [next(data.stream(0, rank, world, 8 // world)) for rank, data in enumerate(streams)]
    seen = {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
    expected = [p + 1 if p == place else p for p in range(8)]
    assert torch.equal(seen["x_0"], clean["x_0"][expected])
    assert torch.equal(seen["labels"], clean["labels"][expected])
    assert sum(data.skipped for data in streams) == 1


def test_one_corrupt_image_counts_once_however_often_the_stream_meets_it(tmp_path):
    folder = folder_of(tmp_path / "set", {"": 4})
    truncate(folder / "01.png")
    data = load_images(train_data_dir=str(folder), streaming=True, max_bad_images=1)
    take(data.stream(0, batch_size=4), 5)
    assert data.skipped == 1


def test_a_stream_needs_class_names(tmp_path):
    path = str(labelled_parquet(tmp_path / "s.parquet", ["oak", "ash"], datasets.Value("string")))
    with pytest.raises(ValueError, match="classes are unknown before the stream was read; load with streaming=False"):
        load_images(train_data_dir=path, streaming=True)
    assert load_images(train_data_dir=path, streaming=True, label_column="none").class_names is None


def test_classes_that_are_numbered_anew_are_so_in_the_batches():
    stream, data = (load_images("digits", streaming=way, max_train_samples=20) for way in (True, False))
    before = next(stream.stream(0, batch_size=20))["labels"]
    names = [*reversed(data.class_names), "another"]
    for _ in range(2):
        stream.use_classes(names)
        after = next(stream.stream(0, batch_size=20))["labels"]
        assert [names[label] for label in after] == [data.class_names[label] for label in before]
        names = [names[-1], *names[:-1]]


def test_what_is_held_out_of_a_stream_is_kept_and_shares_no_row_with_the_training():
    arguments = {"dataset_name": "digits", "streaming": True, "split": "train[:90%]"}
    data = load_images(**arguments)
    held_out, set_aside = load_unaugmented(arguments, data, "train[90%:]"), load_images("digits", split="train[90%:]")
    assert len(held_out) == len(set_aside) == 180 and held_out.class_names == set_aside.class_names
    ours, theirs = (found.fetch(range(180), 0) for found in (held_out, set_aside))
    assert sorted(ours["x_0"].flatten(1).tolist()) == sorted(theirs["x_0"].flatten(1).tolist())
    assert ours["labels"].bincount().equal(theirs["labels"].bincount()) and ours["indices"].tolist() == list(
        range(180)
    )
    with pytest.raises(ValueError, match="split 'train.80%:.' shares rows with the training"):
        load_unaugmented(arguments, data, "train[80%:]")


@pytest.mark.slow
def test_a_stream_ten_times_larger_than_the_memory_it_may_take_trains_to_its_end(tmp_path):
    """The buffer of 1000 images and the headroom make the memory; the kernel refuses more."""
    size, headroom = 12_500, 24 * 2**20  # bytes of an image, which is noise and cannot be compressed
    count = 10 * (1000 * size + headroom) // size
    path, rng = tmp_path / "noise.parquet", np.random.default_rng(0)
    schema = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])}
    ).arrow_schema
    with pq.ParquetWriter(path, schema, compression="none") as writer:
        for start in range(0, count, 200):
            rows = range(start, min(start + 200, count))
            images = []
            for pixels in rng.integers(0, 256, (len(rows), 64, 64, 3), np.uint8):
                Image.fromarray(pixels).save(buffer := io.BytesIO(), "PNG", compress_level=0)
                images.append({"bytes": buffer.getvalue(), "path": None})
            writer.write_table(pa.table({"image": images, "label": [row % 2 for row in rows]}, schema=schema))
    assert path.stat().st_size > 10 * (1000 * size + headroom) * 0.95
    steps = count // 256
    flags = f"--train_data_dir {path} --streaming --resolution 8 --train_batch_size 256 --max_train_steps {steps}"
    flags += " --class_conditional --model_channels 8 --norm_num_groups 4 --num_head_channels 8 --channel_mult 1,2"
    flags += " --num_res_blocks 1 --sample_steps none --logging_steps 10 --ddpm_num_inference_steps 1"
    flags += f" --num_sample_images 2 --output_dir {tmp_path / 'run'}"
    command = [sys.executable, "tests/training/altered_ddpm.py", "limited", *flags.split()]
    environment = {**os.environ, "HEADROOM": str(headroom), "DATA": str(count * size), "MALLOC_ARENA_MAX": "2"}
    done = subprocess.run(
        command, cwd=Path(__file__).parents[2], env=environment, capture_output=True, text=True, timeout=400
    )
    assert done.returncode == 0, done.stderr
    assert "the limit holds" in done.stdout and f"trained {steps} steps" in done.stdout
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all(0 < record["data_wait"] < 1 for record in records) and "data_wait=" in done.stderr
    # without the first record, in which the buffer is filled, and the last, in which datasets waits
    # for the readers of a file at its end
    speed = [record["images_per_second"] for record in records[1:-1]]
    assert min(speed[len(speed) // 2 :]) > 0.5 * np.median(speed[: len(speed) // 2]), speed  # as fast at the end
