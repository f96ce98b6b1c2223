"""How a method runs on a device: memory format, precision, compilation, synchronised BatchNorm."""

import ctypes
import platform
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from lowssl_core.distributed import world_size
from lowssl_core.errors import UserError
from lowssl_core.methods.heads import Network
from lowssl_core.methods.method import Method

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
            network = getattr(method, name)
            setattr(method, name, nn.SyncBatchNorm.convert_sync_batchnorm(network))  # type: ignore[no-untyped-call]
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
