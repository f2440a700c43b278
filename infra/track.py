"""MLflow and Weights & Biases: where a Cluster's `track` names them, the scalars of a training go there, too.

Where they are and who we are, they find in the environment of the process, as they do elsewhere (MLFLOW_TRACKING_URI,
MLFLOW_EXPERIMENT_NAME; WANDB_API_KEY, WANDB_PROJECT, WANDB_MODE): no address and no key passes through us.
"""

import importlib.util
import math
import os
import queue
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from infra.gauges import place_of

PROJECT = "rescribe"  # where the environment names none
BEGIN_SECONDS = 60  # until it has begun, at most
DRAIN_SECONDS = 30  # for what is still to be told at the end

Tell = Callable[[int, Mapping[str, float]], None]
"""`tell(step, figures)`."""


def check_installed(names: Sequence[str]) -> None:
    """ValueError where one of them is not installed: said before anything is made."""
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(
            f"--cluster.track names {missing[0]}, which is not installed. Install rescribe[{missing[0]}], here and on "
            "the machines that train, or leave it out."
        )


@contextmanager
def tracked(names: Sequence[str], folder: str) -> Iterator[Tell]:
    """What tells each of `names` the scalars of the training in `folder`, under one run that a restart continues.

    They are told from a thread: training waits for none of them. Raises ValueError where one is not installed or cannot
    begin, as without a key; what goes wrong later is said once, and training goes on.
    """
    check_installed(names)
    title = "/".join(filter(None, place_of(folder)))
    with ExitStack() as stack:
        tells = [stack.enter_context(_queued(name, title)) for name in names]

        def tell(step: int, figures: Mapping[str, float]) -> None:
            finite = {name: float(value) for name, value in figures.items() if math.isfinite(value)}
            for each in tells:
                each(step, finite)

        yield tell


@contextmanager
def _queued(name: str, title: str) -> Iterator[Tell]:
    begun: queue.SimpleQueue[Exception | None] = queue.SimpleQueue()
    waiting: queue.SimpleQueue[tuple[int, Mapping[str, float]] | None] = queue.SimpleQueue()

    def work() -> None:
        try:
            tell, close = _OPEN[name](title)
        except Exception as error:
            begun.put(error)
            return
        begun.put(None)
        said = False
        while (told := waiting.get()) is not None:
            try:
                tell(*told)
            except Exception as error:
                if not said:
                    print(f"rescribe: {name} took no figures: {error} Training goes on.", file=sys.stderr, flush=True)
                said = True
        close()

    thread = threading.Thread(target=work, name=name, daemon=True)
    thread.start()
    try:
        failed = begun.get(timeout=BEGIN_SECONDS)
    except queue.Empty:
        raise ValueError(f"{name} did not answer for {BEGIN_SECONDS} s. Check its address.") from None
    if failed is not None:
        raise ValueError(f"{name} could not begin: {failed}") from failed
    try:
        yield lambda step, figures: waiting.put((step, figures))
    finally:
        waiting.put(None)
        thread.join(DRAIN_SECONDS)


def _mlflow(title: str) -> tuple[Tell, Callable[[], None]]:
    import mlflow  # pyright: ignore[reportMissingImports]
    from mlflow.entities import Metric  # pyright: ignore[reportMissingImports]

    client, name = mlflow.MlflowClient(), os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
    known = client.get_experiment_by_name(name)
    experiment = known.experiment_id if known else client.create_experiment(name)
    found = client.search_runs([experiment], filter_string=f"tags.rescribe = '{title}'", max_results=1)
    run = found[0] if found else client.create_run(experiment, run_name=title, tags={"rescribe": title})
    identity = run.info.run_id
    client.update_run(identity, status="RUNNING")

    def tell(step: int, figures: Mapping[str, float]) -> None:
        now = int(time.time() * 1000)
        client.log_batch(identity, metrics=[Metric(key, value, now, step) for key, value in figures.items()])

    return tell, lambda: client.set_terminated(identity)


def _wandb(title: str) -> tuple[Tell, Callable[[], None]]:
    import wandb  # pyright: ignore[reportMissingImports]

    run: Any = wandb.init(
        project=os.environ.get("WANDB_PROJECT", PROJECT),
        id=title.replace("/", "-"),
        name=title,
        resume="allow",
        # Nothing of the machine, the command or the code: it is told figures.
        settings=wandb.Settings(console="off", disable_code=True, disable_git=True, x_disable_meta=True),
    )
    return lambda step, figures: run.log(dict(figures), step=step), run.finish


_OPEN: dict[str, Callable[[str], tuple[Tell, Callable[[], None]]]] = {"mlflow": _mlflow, "wandb": _wandb}
