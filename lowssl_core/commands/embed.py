"""`lowssl embed`: the embeddings of many images as one file."""

import argparse
from pathlib import Path

from lowssl_core.command_line import Command
from lowssl_core.commands.evaluate import DATA_HELP, MODEL_HELP


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", metavar="PATH", help=DATA_HELP)
    parser.add_argument("--checkpoint", required=True, metavar="MODEL", help=MODEL_HELP)
    parser.add_argument(
        "--out", required=True, type=Path, metavar="FILE", help="the file to write: .parquet, .npy or .csv"
    )
    parser.add_argument(
        "--branch", choices=("student", "teacher"), default="student", help="weights of a checkpoint (default student)"
    )
    parser.add_argument("--device", default="auto", help="auto (default), cpu, cuda, cuda:1 ...")


def _run(arguments: argparse.Namespace) -> int:
    import sys

    from lowssl_core.compute import choose_device
    from lowssl_core.evaluation.embedding_file import write_embeddings, writer_for
    from lowssl_core.evaluation.subjects import open_subject
    from lowssl_core.interruption import StoppedError
    from lowssl_core.sources import open_source

    writer_for(arguments.out)
    source = open_source(arguments.path)
    subject = open_subject(arguments.checkpoint, branch=arguments.branch, device=choose_device(arguments.device))
    try:
        features = write_embeddings(arguments.out, subject.embedder, source, origin=arguments.path)
    except StoppedError:
        print("what is embedded so far is kept: the same command goes on from there", file=sys.stderr)
        raise
    count, width = features.values.shape
    print(f"wrote {arguments.out}: {count:,} embeddings of {width} numbers, model {features.model}")
    if features.set_aside:
        named = [f"{name} ({reason})" for name, reason in list(features.set_aside.items())[:5]]
        more = len(features.set_aside) - len(named)
        print(f"left out: {', '.join(named)}{f' and {more} more' if more else ''}", file=sys.stderr)
    return 0


command = Command(
    name="embed",
    help="write the embeddings of images to a Parquet, npy or CSV file",
    add_arguments=_add_arguments,
    run=_run,
)
