"""What DeepSpeed is told: plain data, made without DeepSpeed, so that it can be printed anywhere."""

from typing import Any, Literal

Precision = Literal["fp32", "bf16", "fp16"]
Offload = Literal["none", "optimizer", "parameters"]
"""What GPU workers keep in the memory of their node: the optimizer's state, or that and the weights."""

BUCKET = 5 * 10**7
"""Gradients that are reduced at once: 200 MB in fp32, held by every worker. DeepSpeed's own choice is ten times so."""


def settings(
    stage: int, precision: Precision, micro_batch: int, micro_steps: int, clip_norm: float, offload: Offload = "none"
) -> dict[str, Any]:
    """The DeepSpeed configuration for an Update: `micro_batch` rows a worker at once, `micro_steps` times a step."""
    host = {"device": "cpu", "pin_memory": True}
    zero: dict[str, Any] = {"stage": stage}
    if stage:
        zero["reduce_bucket_size"] = BUCKET
    if offload != "none":
        zero["offload_optimizer"] = host
    if offload == "parameters":
        zero["offload_param"] = host
    # AdamW of `optim.py` stays, in the memory of a node, too: no other keeps the average of the weights.
    client = {} if offload == "none" else {"zero_force_ds_cpu_optimizer": False}
    return {
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": micro_steps,
        # At stage 0 the engine clips: DeepSpeed does not say what the norm was.
        "gradient_clipping": clip_norm if stage else 0.0,
        # Autocast: matrix products in 16 bits on fp32 weights, so that modules need not know of it.
        "torch_autocast": {
            "enabled": precision != "fp32",
            "dtype": "float16" if precision == "fp16" else "bfloat16",
            # Of linear and convolution layers ZeRO would else add gradients over workers in 16 bits, and gather
            # weights at stage 3 in them.
            "lower_precision_safe_modules": [],
        },
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        **client,
        "steps_per_print": 10**9,
    }
