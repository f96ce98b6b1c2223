"""`lowssl evaluate detect`: fine-tune a Mask R-CNN on COCO-format data and report its average precision."""

import argparse
from importlib.util import find_spec
from pathlib import Path


def add_detect_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what the command takes."""
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="a checkpoint of lowssl-pretrain, an encoder's file, default, timm:NAME, or untrained:BACKBONE for a "
        "random start",
    )
    for name, use in (("train", "to learn from"), ("val", "to judge on")):
        parser.add_argument(
            f"--{name}", required=True, type=Path, metavar="FILE", help=f"COCO-format annotations {use}, a JSON file"
        )
        parser.add_argument(f"--{name}-images", required=True, type=Path, metavar="DIR", help=f"the images {use}")
    parser.add_argument(
        "--recipe", default="coco-1x", help="coco-1x (default), tiny-1x, or the path of a TOML file", metavar="RECIPE"
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="change the recipe, e.g. optim.lr=0.01"
    )
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder of the run, for its checkpoint")
    parser.add_argument("--resume", action="store_true", help="go on from the folder's checkpoint, if it has one")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures, the settings and the loss curve")
    parser.add_argument("--branch", choices=("student", "teacher"), default="student", help="weights of a checkpoint")
    parser.add_argument("--device", default="auto", help="auto (default), cpu, cuda, cuda:1 ...")
    parser.add_argument("--workers", type=int, help="processes that load images (default: the cores left over)")


def run_detect(arguments: argparse.Namespace) -> int:
    """Run the command, alone or as one of the processes of torchrun; the first prints the table and writes JSON.

    Raises:
        UserError: what the user can mend, in one line.
        StoppedError: a signal came; the checkpoint is written.
    """
    from lowssl_core.errors import UserError

    if find_spec("pycocotools") is None:
        raise UserError("average precision needs pycocotools: install lowssl[evaluation]")
    if arguments.json is not None and arguments.json.is_dir():
        raise UserError(f"--json {arguments.json} is a folder; give the file to write")

    from lowssl_core.compute import choose_device, default_workers, device_of_rank, keep_freed_memory
    from lowssl_core.detection.recipe import load_detection_recipe
    from lowssl_core.detection.run import DetectionOptions, DetectionRun
    from lowssl_core.distributed import process_group

    recipe = load_detection_recipe(arguments.recipe, arguments.set)
    device = choose_device(device_of_rank(arguments.device))
    if device.type == "cpu":
        keep_freed_memory()
    with process_group(device) as ranks:
        options = DetectionOptions(
            model=arguments.model,
            branch=arguments.branch,
            train=arguments.train,
            train_images=arguments.train_images,
            val=arguments.val,
            val_images=arguments.val_images,
            out=arguments.out,
            resume=arguments.resume,
            device=device,
            workers=default_workers() if arguments.workers is None else arguments.workers,
        )
        results = DetectionRun(recipe, options, ranks).execute()
    if results is not None:
        print(results.table())
        if arguments.json is not None:
            results.write_json(arguments.json)
    return 0
