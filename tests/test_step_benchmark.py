"""The two sides of benchmarks/step.py do the same work."""

import importlib
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch


@pytest.fixture
def step_cases(monkeypatch: pytest.MonkeyPatch) -> Any:
    # The benchmarks are programs beside the package, which import each other as they lie.
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    return importlib.import_module("step_cases")


@pytest.mark.parametrize(
    ("method", "backbone"),
    [("moco", "resnet_tiny"), ("swav", "resnet_tiny"), ("dino", "resnet_tiny"), ("dino", "vit_tiny")],
)
def test_plain_and_fast_step_have_the_same_losses(step_cases: Any, method: str, backbone: str) -> None:
    case = step_cases.Case(method=method, backbone=backbone, batch=4, global_size=32, local_size=18, queue_length=24)
    # The second and third loss see the optimizer, the moving average, the center and the queues.
    fast, plain = (torch.stack(list(islice(step_cases.steps(case, plain=side), 3))) for side in (False, True))
    torch.testing.assert_close(fast, plain, rtol=2e-4, atol=1e-5)
    assert plain.unique().numel() == 3
