"""Saves one checkpoint after another until it is killed, and notes each that counts; forked by a test many times."""

import torch

from infra.train import checkpoint
from infra.train.writer import Writer


def state(step, size=2000):
    """What step `step` saves: told from any other step's by every element."""
    return {f"net/w/{name}": torch.full((size,), float(step)) + torch.arange(size) for name in "abc"}


def run(folder, noted, background, ready):
    """Continue and go on for ever; a line of `noted` is a step whose save has ended."""
    torch.set_num_threads(1)
    saved = checkpoint.restore(folder)
    ready.set()
    step = saved.step if saved else 0
    with Writer(folder, keep=2, background=background) as writer, open(noted, "a") as file:
        while True:
            step += 1
            writer.save(step, state(step), {"of": step}, score=1 / step)
            if background:  # the save before it has ended
                file.write(f"{step - 1}\n")
            else:
                file.write(f"{step}\n")
            file.flush()
