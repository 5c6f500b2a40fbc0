"""What our engine takes from DeepSpeed's; all else is Any. DeepSpeed has no types of its own."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

class Timer:
    started_: bool
    def stop(self) -> None: ...

class EngineTimers:
    forward_timers: list[str]
    backward_timers: list[str]
    step_timers: list[str]

class Throughput:
    def start(self) -> None: ...

class Monitor:
    enabled: bool
    def write_events(self, event_list: list[tuple[str, float | None, int]]) -> None: ...

class Profiler:
    started: bool
    def start_profile(self, ignore_list: list[type] | None = None) -> None: ...
    def stop_profile(self) -> None: ...

class DeepSpeedEngine(nn.Module):
    module: nn.Module
    optimizer: Any
    basic_optimizer: Any
    lr_scheduler: Any
    training_dataloader: Any
    collate_fn: Callable[[list[Any]], Any] | None
    device: torch.device
    global_rank: int
    global_steps: int
    global_samples: int
    micro_steps: int
    skipped_steps: int
    engine_timers: EngineTimers
    tput_timer: Throughput
    timers: Callable[[str], Timer]
    monitor: Monitor
    flops_profiler: Profiler
    _running_engine_step: bool
    def __init__(
        self,
        args: Any,
        model: nn.Module,
        optimizer: Any = None,
        model_parameters: Any = None,
        training_data: Any = None,
        lr_scheduler: Any = None,
        mpu: Any = None,
        dist_init_required: bool | None = None,
        collate_fn: Callable[[list[Any]], Any] | None = None,
        config: Mapping[str, Any] | str | None = None,
        config_class: Any = None,
        mesh_device: Any = None,
        dont_change_device: bool = False,
    ) -> None: ...
    def __getattr__(self, name: str) -> Any: ...
    def deepspeed_io(
        self,
        dataset: Any,
        batch_size: int | None = None,
        route: str = ...,
        pin_memory: bool = True,
        data_sampler: Any = None,
        collate_fn: Callable[[list[Any]], Any] | None = None,
        num_local_io_workers: int | None = None,
    ) -> Any: ...
    def backward(
        self, loss: torch.Tensor, retain_graph: bool = False, scale_wrt_gas: bool = True
    ) -> torch.Tensor: ...
    def step(self, lr_kwargs: dict[str, Any] | None = None) -> None: ...
    def eval_batch(self, data_iter: Iterator[Any]) -> torch.Tensor: ...
    def train_batch_size(self) -> int: ...
    def train_micro_batch_size_per_gpu(self) -> int: ...
    def gradient_accumulation_steps(self) -> int: ...
    def steps_per_print(self) -> int: ...
    def flops_profiler_enabled(self) -> bool: ...
    def flops_profiler_profile_step(self) -> int: ...
    def destroy(self) -> None: ...
    def _report_progress(self, step: int) -> None: ...
    def _start_timers(self, timer_names: list[str]) -> None: ...
    def _stop_timers(self, timer_names: list[str]) -> None: ...
