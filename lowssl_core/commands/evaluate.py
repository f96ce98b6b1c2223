"""`lowssl evaluate`: how good an encoder is, with labels or without."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from lowssl_core.command_line import Command

if TYPE_CHECKING:
    from lowssl_core.evaluation.results import Results
    from lowssl_core.evaluation.tasks import EvaluationOptions

MODEL_HELP = (
    "a checkpoint of lowssl-pretrain, an encoder's file, an .onnx file, default (the encoder that comes with LowSSL), "
    "timm:NAME (published weights, if they are on this machine) or untrained:NAME"
)
DATA_HELP = "a folder or zip of images, tar shards, cifar10 or photos; PATH::SPLIT chooses a part"


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    tasks = parser.add_subparsers(dest="task", metavar="TASK", required=True)
    _add_knn(tasks.add_parser("knn", help="k-NN accuracy on features, no training", description=_run_knn.__doc__))
    _add_linear(tasks.add_parser("linear", help="a linear classifier on frozen features", description=_LINEAR))
    _add_semi(tasks.add_parser("semi", help="fine-tuning with 1 %% and 10 %% of the labels", description=_SEMI))
    _add_quality(tasks.add_parser("quality", help="label-free quality on any images", description=_QUALITY))
    _add_detect(tasks.add_parser("detect", help="Mask R-CNN on COCO-format data: box and mask AP", description=_DETECT))


_LINEAR = (
    "Accuracy of a linear classifier on frozen features. fast: on features computed once, the learning rate chosen on "
    "held-out training images; paper: the paper's protocol, on augmented images, 100 epochs."
)
_SEMI = (
    "Fine-tune the whole network on a share of the labels, from the hidden layers of the method's own head, and score "
    "it on the held-out images."
)
_QUALITY = (
    "RankMe, LiDAR, alpha-ReQ, alignment, uniformity, feature deviation and retrieval under augmentation: what can be "
    "said of an encoder without labels."
)
_DETECT = "Fine-tune a Mask R-CNN with FPN on COCO-format data and report box and mask AP."


def _add_subjects(parser: argparse.ArgumentParser) -> None:
    """What every task takes."""
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument(
        "--branch",
        action="append",
        choices=("student", "teacher", "recalibrated"),
        help="judge this branch of a checkpoint only (may be repeated; default: all it has)",
    )
    parser.add_argument("--device", default="auto", help="auto (default), cpu, cuda, cuda:1 ...")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results as JSON")


def _add_labelled(parser: argparse.ArgumentParser) -> None:
    """What tasks with labels take."""
    _add_subjects(parser)
    parser.add_argument("--data", required=True, help=f"labelled images to learn from: {DATA_HELP}")
    parser.add_argument(
        "--eval-data", help="labelled images to score on (default: the test split of --data, or its validation split)"
    )


def _add_features(parser: argparse.ArgumentParser) -> None:
    """What tasks on features take."""
    parser.add_argument("--cache", type=Path, metavar="DIR", help="keep features there for the next call, and resume")
    parser.add_argument("--yardsticks", action="store_true", help="judge raw pixels and the untrained network as well")


def _add_knn(parser: argparse.ArgumentParser) -> None:
    _add_labelled(parser)
    _add_features(parser)
    parser.add_argument(
        "--k", type=int, nargs="+", default=[10, 20, 100, 200], metavar="K", help="neighbors (default 10 20 100 200)"
    )
    parser.set_defaults(run_task=_run_knn)


def _add_linear(parser: argparse.ArgumentParser) -> None:
    _add_labelled(parser)
    _add_features(parser)
    parser.add_argument(
        "--protocol", choices=("fast", "paper"), default="fast", help="fast (default): cached features; paper"
    )
    _add_training(parser)
    parser.set_defaults(run_task=_run_linear)


def _add_semi(parser: argparse.ArgumentParser) -> None:
    _add_labelled(parser)
    parser.add_argument(
        "--percent", type=float, nargs="+", default=[1.0, 10.0], metavar="P", help="of the labels (default 1 10)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the lists of labelled images (default 0)")
    parser.add_argument(
        "--list", type=Path, metavar="FILE", help="use the images named in FILE, a name a line, instead of --percent"
    )
    _add_training(parser)
    parser.set_defaults(run_task=_run_semi)


def _add_training(parser: argparse.ArgumentParser) -> None:
    """What tasks that train take."""
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="keep the state of training there; the same command goes on from it"
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="change the protocol, e.g. epochs=10"
    )
    parser.add_argument("--workers", type=int, default=0, help="processes that load images (default 0)")


def _add_quality(parser: argparse.ArgumentParser) -> None:
    _add_subjects(parser)
    parser.add_argument("--data", required=True, help=f"images, labels are not used: {DATA_HELP}")
    parser.add_argument("--images", type=int, default=1000, help="how many to look at, drawn by chance (default 1000)")
    parser.add_argument("--views", type=int, default=10, help="augmented copies of each (default 10)")
    parser.add_argument("--seed", type=int, default=0, help="of the draw (default 0)")
    parser.add_argument("--yardsticks", action="store_true", help="judge raw pixels and the untrained network as well")
    parser.set_defaults(run_task=_run_quality)


def _add_detect(parser: argparse.ArgumentParser) -> None:
    from lowssl_core.detection.command import add_detect_arguments, run_detect

    add_detect_arguments(parser)
    parser.set_defaults(run_task=run_detect)


def _options(arguments: argparse.Namespace) -> "EvaluationOptions":
    from lowssl_core.compute import choose_device
    from lowssl_core.evaluation.subjects import BRANCHES
    from lowssl_core.evaluation.tasks import EvaluationOptions

    return EvaluationOptions(
        model=arguments.model,
        data=arguments.data,
        eval_data=getattr(arguments, "eval_data", None),
        branches=arguments.branch or BRANCHES,
        yardsticks=getattr(arguments, "yardsticks", False),
        cache=getattr(arguments, "cache", None),
        device=choose_device(arguments.device),
    )


def _run_knn(arguments: argparse.Namespace) -> "Results":
    """k-NN accuracy: each held-out image is given the class of its nearest training images."""
    from lowssl_core.errors import UserError
    from lowssl_core.evaluation.tasks import judge_knn

    if min(arguments.k) < 1:
        raise UserError(f"--k {min(arguments.k)}: wanted whole numbers from 1")
    return judge_knn(_options(arguments), sorted(set(arguments.k)))


def _run_quality(arguments: argparse.Namespace) -> "Results":
    from lowssl_core.errors import UserError
    from lowssl_core.evaluation.tasks import judge_quality

    for name, least in (("images", 2), ("views", 2), ("seed", 0)):
        if getattr(arguments, name) < least:
            raise UserError(f"--{name} {getattr(arguments, name)}: wanted a whole number from {least}")
    options = _options(arguments)
    return judge_quality(options, images=arguments.images, views=arguments.views, seed=arguments.seed)


def _run_linear(arguments: argparse.Namespace) -> "Results":
    from lowssl_core.errors import UserError
    from lowssl_core.evaluation.training_tasks import judge_linear, judge_linear_paper

    options = _options(arguments)
    if arguments.protocol == "paper":
        return judge_linear_paper(
            options, overrides=arguments.set, out=arguments.out, workers=_workers(arguments.workers)
        )
    for name in ("set", "out"):
        if getattr(arguments, name):
            raise UserError(
                f"--{name} goes with --protocol paper: the fast one has nothing to set, and --cache to keep"
            )
    return judge_linear(options)


def _run_semi(arguments: argparse.Namespace) -> "Results":
    from lowssl_core.errors import UserError
    from lowssl_core.evaluation.training_tasks import judge_semi

    if arguments.seed < 0:
        raise UserError(f"--seed {arguments.seed}: wanted a whole number from 0")
    return judge_semi(
        _options(arguments),
        percents=arguments.percent,
        seed=arguments.seed,
        names_file=arguments.list,
        overrides=arguments.set,
        out=arguments.out,
        workers=_workers(arguments.workers),
    )


def _workers(number: int) -> int:
    from lowssl_core.errors import UserError

    if number < 0:
        raise UserError(f"--workers {number}: wanted a number of processes, 0 or more")
    return number


def _run(arguments: argparse.Namespace) -> int:
    import sys

    from lowssl_core.errors import UserError
    from lowssl_core.interruption import StoppedError

    if arguments.json is not None and arguments.json.is_dir():
        raise UserError(f"--json {arguments.json} is a folder; give the file to write")
    if arguments.task == "detect":  # under torchrun it is many processes, of which one has results
        return int(arguments.run_task(arguments))
    try:
        results: Results = arguments.run_task(arguments)
    except StoppedError:
        if getattr(arguments, "out", None) or getattr(arguments, "cache", None):
            print("what is done so far is kept: the same command goes on from there", file=sys.stderr)
        raise
    print(results.table())
    if arguments.json is not None:
        results.write_json(arguments.json)
    return 0


command = Command(
    name="evaluate",
    help="judge an encoder: k-NN, linear, semi-supervised, label-free quality, detection",
    add_arguments=_add_arguments,
    run=_run,
)
