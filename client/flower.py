"""Everything of Flower on a device: a ClientApp that hands the server's message to the agent, and its answer back."""

import os
from pathlib import Path

from flwr.app import Array, ArrayRecord, Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode

from client.channel import ChannelError, Frame, ask

SOCKET = "LOWSSL_AGENT"
"""Environment variable that names the agent's socket."""

_KEY = "lowssl"  # of the record that carries a message's bytes, and of the one array in it

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    """Ask the agent; what it refuses becomes an error reply with its reason."""
    try:
        task = bytes(message.content.array_records[_KEY][_KEY].data)
    except KeyError:
        return _refusal("a message without LowSSL's record", message)
    try:
        answer = ask(Path(os.environ[SOCKET]), Frame({"ask": "task"}, task))
    except ChannelError as error:
        return _refusal(str(error), message, ErrorCode.CLIENT_APP_CRASHED)
    if not answer.header.get("ok"):
        return _refusal(str(answer.header.get("reason")), message)
    # An array, because arrays travel in parts, each tried again.
    array = Array(dtype="uint8", shape=(len(answer.body),), stype="bytes", data=answer.body)
    return Message(RecordDict({_KEY: ArrayRecord({_KEY: array})}), reply_to=message)


def _refusal(reason: str, message: Message, code: int = ErrorCode.CLIENT_APP_RAISED_EXCEPTION) -> Message:
    return Message(Error(code=code, reason=reason), reply_to=message)
