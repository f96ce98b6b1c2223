"""`lowssl recalibrate`: an encoder whose BatchNorm statistics are those of evaluation-style images."""

import argparse
from pathlib import Path

from lowssl_core.command_line import Command


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "checkpoint", metavar="CHECKPOINT", help="a checkpoint of lowssl-pretrain, or an encoder's file"
    )
    parser.add_argument("--data", required=True, help="images like those of training: a folder, zip, shards or photos")
    parser.add_argument("--out", required=True, type=Path, metavar="FILE", help="the encoder to write (.safetensors)")
    parser.add_argument("--branch", choices=("student", "teacher"), default="student", help="weights of a checkpoint")
    parser.add_argument("--images", type=int, default=4096, help="how many to look at, drawn by chance (default 4096)")
    parser.add_argument("--device", default="auto", help="auto (default), cpu, cuda, cuda:1 ...")


def _run(arguments: argparse.Namespace) -> int:
    import dataclasses

    from lowssl_core.compute import choose_device
    from lowssl_core.encoder import load_encoder, save_encoder
    from lowssl_core.errors import UserError
    from lowssl_core.recalibration import mixed_batches, recalibrate_batchnorm
    from lowssl_core.sources import open_source

    if arguments.images < 2:
        raise UserError(f"--images {arguments.images}: statistics take at least 2 images")
    if arguments.out.is_dir():
        raise UserError(f"--out {arguments.out} is a folder; give the file to write")
    encoder = load_encoder(arguments.checkpoint, branch=arguments.branch, device=choose_device(arguments.device))
    source = open_source(arguments.data)
    try:
        done = recalibrate_batchnorm(encoder.backbone, mixed_batches(source, encoder, limit=arguments.images))
    except ValueError as error:
        raise UserError(f"--data {arguments.data}: {error}") from None
    if done.layers:
        info = dataclasses.replace(encoder.info, branch="recalibrated")
        print(f"re-estimated {done.layers} BatchNorm layers on {done.images} images ({source.description})")
    else:
        info = encoder.info
        print(f"{info.backbone} has no BatchNorm: nothing to re-estimate, the weights stay as they are")
    info = save_encoder(arguments.out, encoder.backbone, info)
    print(f"wrote {arguments.out} (weights {info.weights_hash[:12]})")
    return 0


command = Command(
    name="recalibrate",
    help="re-estimate an encoder's BatchNorm statistics on evaluation-style images",
    add_arguments=_add_arguments,
    run=_run,
)
