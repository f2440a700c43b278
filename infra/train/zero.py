"""DeepSpeed ZeRO behind the Engine contract: the only file that knows DeepSpeed."""

import datetime
import importlib
import math
import os
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu")  # read at import; `infra.device` has set it where there are GPUs to use

import deepspeed
import deepspeed.ops
import torch
import torch.distributed as dist
from deepspeed.utils import logger, safe_get_full_fp32_param, safe_get_full_optimizer_state
from torch.distributed import distributed_c10d

from infra.train import world
from infra.train.engine import STATE_KEYS, Saved, buffers, clip, load_optimizer, load_weights, parameters
from infra.train.optim import AdamW, parameter_groups
from infra.train.recompute import recompute as recompute_blocks
from infra.train.scale import LossScale
from infra.train.settings import Offload, Precision, settings
from infra.train.task import Batch, Losses, Update
from infra.train.unspread import Unspread

LONG_SECONDS = 1800  # until a collective of all workers is given up; the board misses who hangs long before


def start(backend: str, timeout_seconds: float = 120) -> None:
    """Join the process group that the environment names (RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT).

    DeepSpeed's own groups take torch's default time-out of 30 minutes whatever the launcher says: it is set here, so
    that the loss of a peer is an error within `timeout_seconds` in what a step needs. The group of all workers, by
    which `world` meets, is given LONG_SECONDS, since in it some wait until another has saved or exported. The
    shared-memory op is left out: it needs a compiler, and a kill during its build hangs every later start.
    """
    logger.setLevel("ERROR")
    _leave_out_the_compiler()
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    distributed_c10d.default_pg_timeout = datetime.timedelta(seconds=timeout_seconds)
    deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False)
    distributed_c10d._set_pg_timeout(datetime.timedelta(seconds=LONG_SECONDS))


def _leave_out_the_compiler() -> None:
    """Below ZeRO 3, some 3 s of every start would go to importing torch's compiler, which nobody uses here.

    DeepSpeed imports its Muon optimizer to see that ours is another one, and Muon is decorated with `torch.compile`.
    Torch's optimizers import the compiler to keep it out of their methods; the mark that they set is set here.
    """
    compiled = torch.compile
    torch.compile = lambda function=None, **_: function or (lambda function: function)  # type: ignore[assignment]
    try:
        importlib.import_module("deepspeed.runtime.zero.muon.original_muon")
    finally:
        torch.compile = compiled
    if "torch._dynamo" not in sys.modules:
        for method in vars(torch.optim.Optimizer).values():
            if (plain := getattr(method, "__wrapped__", None)) is not None:
                plain.__dynamo_disable = plain


class ZeroEngine:
    """One Update under ZeRO stage 0, 1, 2 or 3 (arXiv 1910.02054), in fp32, or with matrix products in 16 bits."""

    def __init__(
        self,
        update: Update,
        micro_steps: int,
        saved: Saved | None,
        *,
        stage: int,
        precision: Precision,
        micro_batch: int,
        offload: Offload = "none",
        recompute: bool = False,
    ) -> None:
        self.update = update
        self._stage = stage
        if recompute:
            recompute_blocks(update.module)
        if saved is not None:
            load_weights(update, saved)  # before DeepSpeed copies the weights into its partitions
        world.gather(None)  # who reads slowly is waited for here, and not in DeepSpeed's groups
        groups = parameter_groups(update.module, update.optim)
        moved = {parameter for group in groups if "shapes" in group for parameter in group["params"]}
        self._moved = {key for key, parameter in update.module.named_parameters() if parameter in moved}  # by Muon
        for group in groups:
            group["each"] = stage == 3
        self._optimizer = AdamW(groups, update.optim)
        config = settings(stage, precision, micro_batch, micro_steps, update.optim.clip_norm, offload)
        self._engine: Any = deepspeed.initialize(model=update.module, optimizer=self._optimizer, config=config)[0]
        self._device = self._engine.device
        meta = saved.meta["updates"][update.name] if saved is not None else {}
        self._scale = LossScale(**meta.get("loss_scale", {})) if precision == "fp16" else None
        if saved is not None:
            self._load_optimizer(saved)

    def __call__(self, batch: Batch) -> Losses:
        return self._engine({name: column.to(self._device) for name, column in batch.items()})

    def backward(self, loss: torch.Tensor) -> None:
        self._set_scale()
        # DeepSpeed averages over workers where the contract sums.
        loss = loss * dist.get_world_size()
        if not self._stage:
            loss = loss * self._factor
        self._engine.backward(loss, scale_wrt_gas=False)
        if not self._engine.is_gradient_accumulation_boundary():
            self._engine.step()  # only counts the micro-step; the weights wait for the last one

    def step(self, lr: float) -> float:
        for group in self._engine.optimizer.param_groups:
            group["lr"] = lr
        if self._stage:
            self._engine.step()  # leaves out what is no finite number, and says inf
            norm = float(self._engine.get_global_grad_norm())
        else:
            norm = clip(self.update, self._factor)
            self._engine.step()
        if self._scale:
            self._scale.update(math.isfinite(norm))
        return norm

    @torch.no_grad()
    def stepped(self, sums: dict[str, torch.Tensor]) -> None:
        with Unspread(self.update.name) if self._stage == 3 else nullcontext():
            self.update.module.stepped(sums)  # type: ignore[operator]

    @property
    def _factor(self) -> float:
        return self._scale.value if self._scale else 1.0

    def _set_scale(self) -> None:
        """Give DeepSpeed the scale of this step, in place of the scaler that it makes for itself in fp16."""
        if not self._stage:
            self._engine.torch_autocast_z0_gradscaler = None
            return
        self._engine.optimizer.torch_autocast_gradscaler = None
        if self._scale:
            self._engine.optimizer.override_loss_scale(self._factor)

    @torch.no_grad()
    def state(self) -> dict[str, torch.Tensor]:
        """A collective. At stages 1 and 2 a worker keeps what lies whole in its partition; what is cut is summed."""
        self._link()
        named: dict[str, Any] = dict(parameters(self.update))
        trained = {key: parameter for key, parameter in named.items() if parameter.requires_grad}
        keeper = {key: place % dist.get_world_size() for place, key in enumerate(named)}
        state: dict[str, torch.Tensor] = {}

        def keep(kind: str, key: str, value: torch.Tensor) -> None:
            if keeper[key] == dist.get_rank():
                state[f"{self.update.name}/{kind}/{key}"] = _copy(value)

        for key, parameter in named.items():
            if key not in trained:
                keep("w", key, self._frozen(parameter))
        if self._stage in (1, 2):
            parts = world.gather([_held(parameter) for parameter in trained.values()])
            for (key, parameter), held in zip(list(trained.items()), zip(*parts, strict=True), strict=True):
                keeper[key] = held.index(max(held))
                if max(held) < parameter.numel():
                    continue  # it is cut
                del trained[key]
                if keeper[key] == dist.get_rank():
                    for kind in ("w", *self._kinds(key)):
                        keep(kind, key, parameter._hp_mapping.get_hp_fragment(_key(kind)).view_as(parameter))
        for bucket in _buckets(trained):
            for kind in ("w", *STATE_KEYS):
                keys = [key for key in bucket if kind in ("w", *self._kinds(key))]
                if keys:
                    for key, value in zip(keys, self._whole([named[key] for key in keys], kind), strict=True):
                        keep(kind, key, value)
        if dist.get_rank() == 0:
            state |= {key: _copy(value) for key, value in buffers(self.update).items()}
        return state

    def meta(self) -> dict:
        steps = {float(state["step"]) for state in self._optimizer.state.values() if "step" in state}
        assert len(steps) <= 1, steps
        scale = {"loss_scale": self._scale.meta()} if self._scale else {}
        return {"optimizer_step": max(steps, default=0.0)} | scale

    def _kinds(self, key: str = "") -> list[str]:
        """What the optimizer keeps of a parameter, or of any."""
        states = [state for state in self._optimizer.state.values() if "exp_avg" in state]
        kept = [kind for kind in STATE_KEYS if any(kind in state for state in states)]
        return [kind for kind in kept if kind != "exp_avg_sq"] if key in self._moved else kept

    def _link(self) -> None:
        """ZeRO 1 and 2 link a parameter to its moments before those exist (DeepSpeed 0.19.8): link again."""
        zero: Any = self._engine.optimizer
        if hasattr(zero, "_lazy_init_hp_params_optimizer_state") and self._kinds():
            zero._hp_optimizer_states_linked = False
            zero._lazy_init_hp_params_optimizer_state()

    def _whole(self, parameters: list[Any], kind: str) -> list[torch.Tensor]:
        """Some parameters' weights (`w`) or states of the optimizer, put together from all workers' parts."""
        key = _key(kind)
        if self._stage == 0:
            return [self._optimizer.state[each][key] if key else each for each in parameters]
        if self._stage == 3:
            get: Any = (
                safe_get_full_optimizer_state if key else lambda parameter, _: safe_get_full_fp32_param(parameter)
            )
            return [get(parameter, key) for parameter in parameters]
        # One sum for all: DeepSpeed's own call makes one a parameter, and on gloo the smallest takes milliseconds.
        flat = torch.zeros(sum(parameter.numel() for parameter in parameters), device=self._device)
        parts = flat.split([parameter.numel() for parameter in parameters])
        for parameter, part in zip(parameters, parts, strict=True):
            if parameter._hp_mapping is not None:  # None: no part of it is ours
                at = parameter._hp_mapping.lp_fragment_address
                part.narrow(0, at.start, at.numel).copy_(parameter._hp_mapping.get_hp_fragment(key))
        dist.all_reduce(flat)
        return [part.view_as(parameter) for parameter, part in zip(parameters, parts, strict=True)]

    def _frozen(self, parameter: torch.nn.Parameter) -> torch.Tensor:
        if self._stage < 3:
            return parameter.detach().float()
        with deepspeed.zero.GatheredParameters([parameter]):
            return parameter.detach().float().clone()

    def _load_optimizer(self, saved: Saved) -> None:
        """Exact moments, average and step of a checkpoint, cut to this worker's partition.

        DeepSpeed's own ways refuse another world size or lose state silently (0.19.8): its partitions are filled here.
        """
        if self._stage == 0:
            load_optimizer(self.update, self._optimizer, saved)
            return
        meta = saved.meta["updates"][self.update.name]
        zero: Any = self._engine.optimizer
        flats = zero.fp32_partitioned_groups_flat if self._stage == 3 else zero.single_partition_of_fp32_groups
        trained = [key for key, parameter in self.update.module.named_parameters() if parameter.requires_grad]
        if f"{self.update.name}/exp_avg/{trained[0]}" not in saved:  # it slept until there
            return
        for place, flat in enumerate(flats):
            state = self._optimizer.state[flat]
            group = self._optimizer.param_groups[zero.sub_group_to_group_id[place] if self._stage == 3 else place]
            kinds = ["exp_avg", *(["exp_avg_sq"] if "shapes" not in group else [])]
            kinds += ["ema"] if f"{self.update.name}/ema/{trained[0]}" in saved else []
            state.update({kind: torch.zeros_like(flat) for kind in kinds})
            state["step"] = torch.tensor(meta["optimizer_step"])  # its own tensor: a shared one counts too fast
        self._link()
        for key, parameter in self._engine.module.named_parameters():
            # Below stage 3 without a mapping: no part of it is ours, and none is read.
            if parameter.requires_grad and (self._stage == 3 or parameter._hp_mapping is not None):
                for kind in ("w", *self._kinds(key)):
                    self._fill(parameter, saved[f"{self.update.name}/{kind}/{key}"], None if kind == "w" else kind)

    def _fill(self, parameter: Any, value: torch.Tensor, kind: str | None) -> None:
        zero: Any = self._engine.optimizer
        if self._stage < 3:
            parameter.set_full_hp_param(value.to(self._device), kind)
            return
        partition, _ = zero._get_fp32_opt_state_partition(parameter, release_swap_buffers=False, optim_state_key=kind)
        size = -(-parameter.ds_numel // dist.get_world_size())
        part = value.reshape(-1)[size * dist.get_rank() : size * (dist.get_rank() + 1)]
        partition.data.zero_()  # the last partition is padded
        partition.data[: len(part)].copy_(part)


def _key(kind: str) -> str | None:
    """DeepSpeed's name of a state of the optimizer, and of the weights."""
    return None if kind == "w" else kind


def _held(parameter: Any) -> int:
    """How many elements of a parameter lie in this worker's partition, at stages 1 and 2."""
    return parameter._hp_mapping.lp_fragment_address.numel if parameter._hp_mapping is not None else 0


def _buckets(parameters: dict[str, Any], most: int = 2**26) -> Iterator[list[str]]:
    """Names in their order, in lists of at most `most` elements in all, or of one parameter."""
    bucket, size = [], 0
    for name, parameter in parameters.items():
        if bucket and size + parameter.numel() > most:
            yield bucket
            bucket, size = [], 0
        bucket.append(name)
        size += parameter.numel()
    if bucket:
        yield bucket


def _copy(tensor: Any) -> torch.Tensor:
    return tensor.detach().to("cpu", copy=True).contiguous()
