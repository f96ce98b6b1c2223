"""A plain Flower app, as its tutorials write one: FedAvg, a round that trains nothing, in two kinds."""

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

if TYPE_CHECKING:
    from torch import nn

# Not annotated, or Flower does not find them.
server = ServerApp()
client = ClientApp()


@server.main()
def main(grid: Grid, context: Context) -> None:
    """Run the rounds, and write down when each was over: a list of times in seconds, the start's first."""
    settings, times = context.run_config, Path(str(context.run_config["times"]))
    devices, moments = int(settings["devices"]), list[float]()

    def note(number: int, arrays: ArrayRecord) -> None:
        moments.append(time.time())
        new = times.with_suffix(".new")
        new.write_text(json.dumps(moments))
        new.replace(times)

    strategy = FedAvg(fraction_evaluate=0.0, min_train_nodes=devices, min_available_nodes=devices)
    arrays = ArrayRecord([np.zeros(1, np.float32)])
    if settings["backbone"]:
        arrays = ArrayRecord(_network(str(settings["backbone"]), int(settings["batch"])).state_dict())
    try:
        strategy.start(grid, arrays, num_rounds=int(settings["rounds"]), evaluate_fn=note)
    except Exception as error:  # Flower's own log of it is hard to find
        times.with_suffix(".failed").write_text(f"{type(error).__name__}: {error}")
        raise


@client.train()
def train(message: Message, context: Context) -> Message:
    """Send back what came; where there is a backbone, by way of a network, whose training would stand between."""
    arrays = message.content.array_records["arrays"]
    if context.run_config["backbone"]:
        network = _network(str(context.run_config["backbone"]), int(context.run_config["batch"]))
        network.load_state_dict(arrays.to_torch_state_dict())
        arrays = ArrayRecord(network.state_dict())
    content = RecordDict({"arrays": arrays, "metrics": MetricRecord({"num-examples": 1})})
    return Message(content=content, reply_to=message)


def _network(backbone: str, batch: int) -> "nn.Module":
    """MoCo's network, by way of torch, which rounds of one number do not import."""
    from lowssl_core.backbones import BackboneConfig
    from lowssl_core.methods import MoCoConfig

    return MoCoConfig(queue_length=batch).build(BackboneConfig(name=backbone), batch).online
