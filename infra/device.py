"""Which device a process computes on: what the Cluster gave it, whatever else its machine has."""

import ctypes
import os
import socket


def variables(gpus: float) -> dict[str, str]:
    """What is to stand in the environment of a process that was given so many GPUs: without any, it finds no CUDA."""
    return {"DS_ACCELERATOR": "cuda"} if gpus else {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}


def take(gpus: float) -> None:
    """Have this process compute on the GPUs that Ray gave it; without any, on the CPU, with CUDA hidden from it.

    Comes before CUDA is asked for anything. RuntimeError where there ought to be a GPU and torch finds none; ValueError
    where this torch never will.
    """
    os.environ.update(variables(gpus))
    if not gpus:
        return
    import torch  # slow to import: who was given none may never need it

    if torch.cuda.is_available():
        return
    here, version = socket.gethostname(), torch.__version__
    if torch.version.cuda is None:
        raise ValueError(
            f"{here} gave a process a GPU, but torch {version} was built without CUDA. Install a build that has it, or "
            "choose --cluster laptop."
        )
    raise RuntimeError(
        f"{here} gave a process a GPU, but torch {version} finds none. See whether `nvidia-smi` shows it there, in the "
        f"container too, and whether its driver is new enough for CUDA {torch.version.cuda}."
    )


def count() -> int:
    """The NVIDIA GPUs of this machine that this process may see, as Ray counts them where it starts."""
    if not has_driver():
        return 0
    from ray._private.accelerators.nvidia_gpu import NvidiaGPUAcceleratorManager as Nvidia  # there is no public way

    visible = Nvidia.get_current_process_visible_accelerator_ids()
    found = Nvidia.get_current_node_num_accelerators()
    return found if visible is None else min(found, len(visible))


def has_driver() -> bool:
    """Whether NVIDIA's driver is installed here: Ray counts by its library, and Ray itself takes long to import."""
    try:
        ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return False
    return True
