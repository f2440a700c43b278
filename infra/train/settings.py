"""What DeepSpeed is told: plain data, made without DeepSpeed, so that it can be printed anywhere."""

from typing import Any, Literal

Precision = Literal["fp32", "bf16"]


def settings(stage: int, precision: Precision, micro_batch: int, micro_steps: int, clip_norm: float) -> dict[str, Any]:
    """The DeepSpeed configuration for an Update: `micro_batch` rows a worker at once, `micro_steps` times a step."""
    return {
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": micro_steps,
        "gradient_clipping": clip_norm,
        # Autocast: matrix products in bf16 on fp32 weights, so that modules need not know of it.
        "torch_autocast": {"enabled": precision == "bf16", "dtype": "bfloat16"},
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
    }
