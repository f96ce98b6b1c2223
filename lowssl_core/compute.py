"""How a method runs on a device: memory format, precision, compilation, synchronised BatchNorm."""

import ctypes
import os
import platform
from dataclasses import dataclass
from typing import Literal, TypeVar, cast

import torch
from timm.layers import convert_sync_batchnorm  # type: ignore[attr-defined]
from torch import nn

from lowssl_core.distributed import world_size
from lowssl_core.errors import UserError
from lowssl_core.methods.heads import Network
from lowssl_core.methods.method import Method

Module = TypeVar("Module", bound=nn.Module)

# Numbers of glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3


@dataclass(frozen=True, kw_only=True)
class ComputeConfig:
    """Speed of a run.

    Attributes:
        precision: "bf16" runs the backbone in bfloat16 autocast on accelerators; heads and losses stay in fp32, and
            so does everything on a CPU.
        channels_last: keep images and convolutions in NHWC order.
        compile: compile the backbone with torch.compile.
    """

    precision: Literal["fp32", "bf16"] = "bf16"
    channels_last: bool = True
    compile: bool = False


def choose_device(name: str) -> torch.device:
    """The device called `name`: "cpu", "cuda", "cuda:1" ..., or "auto" for an accelerator if there is one.

    Raises:
        UserError: no such device here.
    """
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if name == "auto":
        return accelerator if accelerator is not None and accelerator.type == "cuda" else torch.device("cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, ImportError) as error:
        raise UserError(f"--device {name}: not usable here ({str(error).splitlines()[0]}); try auto or cpu") from None
    return device


def device_of_rank(name: str) -> str:
    """The name of this process's device: under torchrun "auto" and "cuda" mean the GPU of its own number."""
    local_rank = os.environ.get("LOCAL_RANK")
    if local_rank is not None and name in ("auto", "cuda") and torch.cuda.is_available():
        return f"cuda:{local_rank}"
    return name


def default_workers() -> int:
    """All cores but the one that trains, shared by the processes of this machine; none on one or two cores."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    share = cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return share - 1 if share > 2 else 0


def synchronise_batchnorm(module: Module) -> Module:
    """A module whose BatchNorm statistics are those of all ranks' images; on GPUs, under torchrun.

    By timm, which knows its layers that are BatchNorm and activation in one: torch's own conversion would drop the
    activations, and leave a MobileNetV2 without any.
    """
    return cast(Module, convert_sync_batchnorm(module))  # type: ignore[no-untyped-call]


def prepare(method: Method, device: torch.device, config: ComputeConfig) -> Method:
    """Move a method to `device` and set it up as `config` says; returns it, changed in place.

    Under torchrun on GPUs the BatchNorm of the networks that `Method.synchronised` names is synchronised over ranks.
    On a CPU the process keeps the memory that a step frees (`keep_freed_memory`).
    """
    method.to(device)
    if device.type == "cpu":
        keep_freed_memory()
    if world_size() > 1 and device.type == "cuda":
        for name in method.synchronised:
            setattr(method, name, synchronise_batchnorm(getattr(method, name)))
    for network in method.modules():
        if not isinstance(network, Network):
            continue
        if config.channels_last:
            network.to(memory_format=torch.channels_last)
        if config.precision == "bf16" and device.type != "cpu":
            network.autocast_dtype = torch.bfloat16
        if config.compile:
            network.backbone.compile()
    return method.train()


def keep_freed_memory() -> None:
    """Let this process keep the memory it frees, up to 1 GiB at a time, where its C library is glibc.

    Each step allocates the same large tensors. By default glibc hands them back to the system in between, and the
    system clears every page of them again: up to a tenth of a small network's step. The peak stays what it is.
    """
    if platform.libc_ver()[0] == "glibc":
        for threshold in (_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD):
            ctypes.CDLL(None).mallopt(threshold, 2**30)
