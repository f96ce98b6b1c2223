"""`lowssl export`: an encoder as an ONNX file, checked before it is written."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from lowssl_core.command_line import Command

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lowssl_core.encoder import Encoder
    from lowssl_core.evaluation.subjects import BranchName
    from lowssl_core.export.exporting import ExportReport
    from lowssl_core.images import Pixels
    from lowssl_core.sources import Source


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "checkpoint",
        metavar="CHECKPOINT",
        help="a checkpoint of lowssl-pretrain, an encoder's file, default (the encoder that comes with LowSSL), "
        "timm:NAME (published weights, if they are on this machine) or untrained:NAME",
    )
    parser.add_argument("--out", required=True, type=Path, metavar="FILE", help="the file to write (.onnx)")
    parser.add_argument(
        "--precision", choices=("fp32", "fp16", "int8"), default="fp32", help="fp32 (default), fp16 or int8"
    )
    parser.add_argument(
        "--calibrate",
        metavar="PATH",
        help="images that the file is checked on, and int8 is calibrated on: a folder, zip or shards (default: the "
        "photographs that come with the package; int8 takes 200 or more of yours)",
    )
    parser.add_argument(
        "--branch",
        choices=("student", "teacher", "recalibrated"),
        help="weights of a checkpoint (default student)",
    )
    parser.add_argument(
        "--recalibrate-on", metavar="PATH", help="images like those of training, for --branch recalibrated"
    )
    parser.add_argument(
        "--layout",
        choices=("nhwc", "nchw"),
        default="nhwc",
        help="of the input: (B, S, S, 3), the default, or (B, 3, S, S)",
    )
    parser.add_argument("--name", metavar="TEXT", help="for people (default: the run's or the encoder's)")
    parser.add_argument("--version", metavar="TEXT", help="for people (default: twelve digits of the weights' hash)")
    parser.add_argument("--licence", metavar="TEXT", help="of the weights (default: what the encoder says)")
    parser.add_argument(
        "--mobile",
        action="store_true",
        help="write the core graph as well (float NCHW, batch 1), as ONNX and in ORT format",
    )
    parser.add_argument("--force", action="store_true", help="write what misses its bounds all the same")


def _run(arguments: argparse.Namespace) -> int:
    import sys
    from importlib.util import find_spec

    from lowssl_core.errors import UserError

    missing = [package for package in ("onnx", "onnxscript", "onnxruntime") if find_spec(package) is None]
    if missing:
        raise UserError(f"exporting takes {', '.join(missing)}: pip install 'lowssl[export]'")
    from lowssl_core.export.exporting import check_target, export_encoder
    from lowssl_core.export.speed import milliseconds_an_image
    from lowssl_core.meter import Meter
    from lowssl_core.sources import open_source

    check_target(arguments.out)
    calibration = None if arguments.calibrate is None else open_source(arguments.calibrate)
    encoder = _open_encoder(arguments.checkpoint, arguments.branch, arguments.recalibrate_on)
    steps = 4 + 2 * (arguments.precision != "fp32") + arguments.mobile
    with Meter("exporting", total=steps, unit="steps") as meter:
        report = export_encoder(
            encoder,
            arguments.out,
            precision=arguments.precision,
            calibration=None if calibration is None else _pictures(calibration, shrink_to=2 * encoder.info.resize),
            layout=arguments.layout,
            name=arguments.name,
            version=arguments.version,
            licence=arguments.licence,
            mobile=arguments.mobile,
            force=arguments.force,
            on_step=lambda step: meter.advance(note=step),
        )
        meter.advance(note="timing")
        models = [report.model] if report.model is report.fp32 else [report.model, report.fp32]
        times = milliseconds_an_image(models, report.inputs)
    print("\n".join(_summary(report, times)))
    for reason in report.missed:
        print(f"lowssl export: forced: {reason}", file=sys.stderr)
    return 0


def _open_encoder(model: str, branch: "BranchName | None", recalibrate_on: str | None) -> "Encoder":
    """The network that the user named."""
    from lowssl_core.errors import UserError
    from lowssl_core.evaluation.subjects import ACCEPTED_NETWORKS, open_subject, open_subjects
    from lowssl_core.sources import open_source

    if Path(model).suffix.lower() == ".onnx":
        raise UserError(f"{model} is an ONNX file already; give {ACCEPTED_NETWORKS}")
    if recalibrate_on is not None and branch != "recalibrated":
        raise UserError("--recalibrate-on goes with --branch recalibrated")
    if branch is None:
        return open_subject(model).encoder
    if model.startswith(("timm:", "untrained:")):
        raise UserError(f"--branch {branch} goes with a checkpoint or an encoder's file; {model} has no branches")
    source = None if recalibrate_on is None else open_source(recalibrate_on)
    if branch == "recalibrated" and source is None and open_subject(model).name != "recalibrated":
        raise UserError("--branch recalibrated takes --recalibrate-on PATH: images like those of training")
    (subject,) = open_subjects(model, branches=[branch], recalibrate_on=source)
    return subject.encoder


def _pictures(source: "Source", shrink_to: int) -> "Iterator[Pixels]":
    """The images of a source that can be read, in a fixed random order, large ones decoded at a smaller size."""
    import numpy as np

    from lowssl_core.images import BadImage
    from lowssl_core.sources.memory import read_pixels

    for index in np.random.default_rng(0).permutation(len(source)).tolist():
        try:
            yield read_pixels(source, index, shrink_to)
        except BadImage:
            continue


def _summary(report: "ExportReport", times: list[float]) -> list[str]:
    """What was made, a fact a line."""
    from lowssl_core.export.checks import PARITY_BOUND
    from lowssl_core.export.mobile import web_problems

    description = report.description
    sizes = [f"{model.ByteSize() / 1e6:.1f} MB" for model in (report.model, report.fp32)]
    speeds = [f"{time:.3g} ms" for time in times]
    beside = description.precision != "fp32"
    shape = ", ".join(map(str, description.input_shape))
    lines = [
        f"wrote {report.path}",
        f"  encoder    {description.name}: {description.backbone}, {description.branch}, "
        f"{description.width} features, version {description.version}",
        f"  input      images, uint8 ({shape})",
        f"  precision  {description.precision}",
        f"  size       {sizes[0]}" + (f", fp32 {sizes[1]}" if beside else ""),
        f"  speed      {speeds[0]} an image on one thread" + (f", fp32 {speeds[1]}" if beside else ""),
        f"  parity     {description.parity:.1e} from torch at batch 1, 3 and 8 (bound {PARITY_BOUND:.0e})",
    ]
    if description.agreement:
        figures = ", ".join(f"{name.replace('_', ' ')} {value:.5f}" for name, value in description.agreement.items())
        lines.append(f"  agreement  {figures}, with fp32 on {len(report.inputs)} images")
    for path in report.core_files:
        lines.append(f"  core       {path} ({path.stat().st_size / 1e6:.1f} MB)")
    problems = web_problems(report.model)
    lines.append(f"  browser    onnxruntime-web {'cannot load it: ' + '; '.join(problems) if problems else 'loads it'}")
    return lines


command = Command(
    name="export",
    help="write an encoder as an ONNX file for servers, phones and browsers",
    add_arguments=_add_arguments,
    run=_run,
)
