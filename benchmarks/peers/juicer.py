"""How fast Data-Juicer's `image_captioning_mapper` captions a folder of pictures in Ray mode, without a GPU.

Run it with the interpreter of an environment of its own (Python 3.11, 1.8 GB, no CUDA, no torchvision); it imports
nothing of this project:

    python -m venv peer
    peer/bin/pip install torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu
    peer/bin/pip install ray==2.60.0 transformers==5.23.0 datasets pyarrow pandas pillow psutil regex tqdm loguru \\
        pydantic "jsonargparse[signatures]" dill==0.3.8 multiprocess==0.70.16 emoji==2.2.0 beautifulsoup4 \\
        mwparserfromhell tomli tomli-w httpx wget jsonlines lz4 zstandard tabulate gitpython dep-logic aiohttp aiofiles
    peer/bin/pip install --no-deps py-data-juicer==1.6.1
    peer/bin/python benchmarks/peers/juicer.py --images FOLDER --model FOLDER --max-new-tokens 20

Of what the package asks for, streamlit and uv are left out: the mapper does not need them. Its extra `generic` pins
torch 2.8.0 and transformers 4.57.1; the versions above are those of the others on the same machine. Nothing of
Data-Juicer is changed on disk.

Logs go to stderr. stdout ends with one JSON object: `images`; `seconds` of the whole run, from the first import to the
exported file; `seconds_of_captioning`, from the begin of the first batch to the end of the last one, with the decoding
of pictures, without the loading of the model before it; `images_per_second` of captioning; `version`. Of the numbers of
workers tried the fastest is told, and all are in `tried`.

What makes it comparable, each in Data-Juicer's favour or neutral:

* The mapper calls `generate(max_new_tokens=128, do_sample=True)`, with no option for either. A subclass replaces these
  two arguments: greedy, and as many tokens as the others.
* A model folder is read in the dtype that its config.json names; a copy of that file names `--dtype`. The mapper
  itself has no such option. The weights are the same file.
* Its loader makes paths absolute in batches of 1,000 rows. That merges fewer rows to one block, and one block is one
  task, whatever `num_proc` says. Rows here name their pictures in a column that the loader does not look at (its own
  option `image_key`), in files of one batch each: so two workers share even few pictures.
* Its own memory demand (16 GB a worker) is set to 2 GB, and its batches of the dataset to the size of the model's.
  Original rows are not kept.
* Ray is started before it with just the cores asked for. OMP_NUM_THREADS is Ray's: the cores of a worker.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from contextlib import redirect_stdout
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

BEGAN = time.time()
os.environ.pop("OMP_NUM_THREADS", None)
# The package installs what it misses when it is first used; here a miss is an error. Workers inherit all four.
os.environ |= {"PIP_NO_INDEX": "1", "UV_OFFLINE": "1", "HF_HUB_OFFLINE": "1", "RAY_JOB": "1"}

import ray  # noqa: E402
import torch  # noqa: E402
from data_juicer.config import init_configs  # noqa: E402
from data_juicer.core.executor.ray_executor import RayExecutor  # noqa: E402
from data_juicer.ops.base_op import OPERATORS  # noqa: E402
from data_juicer.ops.mapper.image_captioning_mapper import ImageCaptioningMapper  # noqa: E402
from data_juicer.utils.mm_utils import SpecialTokens  # noqa: E402
from data_juicer.utils.model_utils import get_model  # noqa: E402
from loguru import logger  # noqa: E402

IMPORTS = time.time() - BEGAN


@OPERATORS.register_module("timed_captioning_mapper")
class TimedCaptioningMapper(ImageCaptioningMapper):
    """Data-Juicer's mapper, greedy and to a length; each batch leaves a note of its time in the folder `notes`."""

    def __init__(self, *args, new_tokens: int = 20, notes: str = "", **kwargs):
        super().__init__(*args, **kwargs)
        self.new_tokens = new_tokens
        self.notes = notes

    def _batched_generate(self, images, prompts, model, processor):
        def generate(**inputs):
            return model.generate(**inputs | {"max_new_tokens": self.new_tokens, "do_sample": False})

        bounded = SimpleNamespace(device=model.device, generate=generate)
        return super()._batched_generate(images, prompts, bounded, processor)

    def process_batched(self, samples, rank=None):
        model, _ = get_model(self.model_key, rank, self.use_cuda())  # kept for the worker's life
        began = time.time()
        result = super().process_batched(samples, rank)
        note = {
            "began": began,
            "ended": time.time(),
            "images": len(samples[self.image_key]),
            "dtype": str(model.dtype).removeprefix("torch."),
            "threads": torch.get_num_threads(),
            "worker": os.getpid(),
        }
        Path(self.notes, f"{os.getpid()}-{time.time_ns()}.json").write_text(json.dumps(note))
        return result


def model_folder(source: Path, target: Path, dtype: str) -> None:
    """Link a model folder's files, but for the config, which gets another dtype."""
    target.mkdir()
    for file in source.resolve().iterdir():
        if file.name != "config.json":
            (target / file.name).symlink_to(file)
    config = json.loads((source / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(config | {"dtype": dtype}))


def run(options: argparse.Namespace, workers: int, folder: Path) -> dict:
    """Caption all pictures once with so many workers, and say how long it took."""
    began = time.time()
    (folder / "notes").mkdir()
    (folder / "rows").mkdir()
    model_folder(options.model, folder / "model", options.dtype)
    pictures = sorted(str(path) for path in options.images.resolve().iterdir() if path.suffix in (".jpg", ".jpeg"))
    for first in range(0, len(pictures), options.batch):
        rows = [{"text": SpecialTokens.image, "pictures": [path]} for path in pictures[first : first + options.batch]]
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / "rows" / f"{first:08}.jsonl").write_text(lines)
    mapper = {
        "hf_img2seq": str(folder / "model"),
        "image_key": "pictures",
        "keep_original_sample": False,
        "batch_size": options.batch,
        "gpu_batch_size": options.batch,
        "num_proc": workers,
        "num_cpus": options.cores // workers,
        "memory": "2GB",
        "ray_execution_mode": options.mode,
        "new_tokens": options.max_new_tokens,
        "notes": str(folder / "notes"),
    }
    recipe = {
        "executor_type": "ray",
        "ray_address": "local",
        "dataset_path": str(folder / "rows"),
        "export_path": str(folder / "captions.jsonl"),
        "work_dir": str(folder / "work"),
        "skip_op_error": False,
        "process": [{"timed_captioning_mapper": mapper}],
    }
    (folder / "recipe.json").write_text(json.dumps(recipe))
    ray.init(
        address="local", num_cpus=options.cores, include_dashboard=False, log_to_driver=False, _temp_dir=str(folder)
    )
    try:
        RayExecutor(init_configs(["--config", str(folder / "recipe.json")])).run()
    finally:
        ray.shutdown()
        logger.remove()  # closes its files before their folder goes
    seconds = time.time() - began
    exported = [line for file in (folder / "captions.jsonl").iterdir() for line in file.read_text().splitlines()]
    notes = [json.loads(file.read_text()) for file in (folder / "notes").iterdir()]
    captions = [json.loads(line)["text"] for line in exported]
    print("The first caption is:", captions[0])
    if len(captions) != len(pictures) or sum(note["images"] for note in notes) != len(pictures):
        raise RuntimeError(f"{len(pictures)} pictures, but {len(captions)} captions of {len(notes)} batches.")
    captioning = max(note["ended"] for note in notes) - min(note["began"] for note in notes)
    return {
        "images": len(pictures),
        "seconds": round(IMPORTS + seconds, 2),
        "seconds_of_captioning": round(captioning, 2),
        "images_per_second": round(len(pictures) / captioning, 3),
        "workers": len({note["worker"] for note in notes}),
        "threads": sorted({note["threads"] for note in notes}),
        "dtype": sorted({note["dtype"] for note in notes}),
        "version": version("py-data-juicer"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=Path, required=True, help="a folder of .jpg files")
    parser.add_argument("--model", type=Path, required=True, help="a BLIP checkpoint in the Hugging Face layout")
    parser.add_argument("--max-new-tokens", type=int, default=20)
    parser.add_argument("--batch", type=int, default=8, help="pictures per call of the model; its own default")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--cores", type=int, default=2)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2], help="numbers of workers to try")
    parser.add_argument("--mode", choices=("task", "actor"), default="task", help="its default without a GPU is task")
    options = parser.parse_args()
    tried = []
    for workers in options.workers:
        with tempfile.TemporaryDirectory(prefix="dj") as folder, redirect_stdout(sys.stderr):
            tried.append(run(options, workers, Path(folder)))
    print(json.dumps(max(tried, key=lambda row: row["images_per_second"]) | {"tried": tried}))


if __name__ == "__main__":
    main()
