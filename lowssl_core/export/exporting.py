"""From an encoder to an ONNX file that was checked before it is written."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from itertools import repeat
from pathlib import Path

import torch
from onnx import ModelProto, helper

from lowssl_core.embedding import embed_inputs
from lowssl_core.encoder import Encoder
from lowssl_core.errors import UserError
from lowssl_core.export.checks import (
    GraphRunner,
    check_structure,
    distinct_inputs,
    features_in_mixed_batches,
    measure_agreement,
    measure_parity,
    missed_bounds,
    relative_difference,
)
from lowssl_core.export.description import FEATURES, Description, Layout, Precision
from lowssl_core.export.graph import channels_first, to_onnx
from lowssl_core.export.mobile import core_graph, write_ort
from lowssl_core.export.precision import to_fp16, to_int8
from lowssl_core.files import write_atomically
from lowssl_core.images import Pixels
from lowssl_core.photos import PHOTOGRAPHS, read_photograph
from lowssl_core.tensor_file import tensors_hash
from lowssl_core.views import normalize

PARITY_IMAGES = 16

# Different images that a precision is judged on, and how many are taken at most. Of those of int8 every other one is
# the quantizer's: among 100 that remain, the bound on neighbors forgives two.
LEAST_IMAGES: Mapping[Precision, int] = {"fp32": 8, "fp16": 50, "int8": 200}
MOST_IMAGES: Mapping[Precision, int] = {"fp32": PARITY_IMAGES, "fp16": 200, "int8": 512}


class RefusedExport(UserError):  # noqa: N818 - a verdict
    """An export misses bounds and was not written.

    Attributes:
        missed: each bound in a few words, with the figure.
    """

    def __init__(self, out: Path, missed: list[str]) -> None:
        super().__init__(f"{out} was not written: {'; '.join(missed)} (--force writes it all the same)")
        self.missed = tuple(missed)


@dataclass(frozen=True, kw_only=True)
class ExportReport:
    """What was written.

    Attributes:
        path: the file.
        description: its metadata, with the figures of the checks.
        model: what is in the file.
        fp32: the same encoder and layout in fp32, to compare with; `model` itself where that is fp32.
        inputs: evaluation-style (N, S, S, 3), the images that the checks looked at.
        missed: bounds that were missed, in words: only where it was forced.
        core_files: the core graph in ONNX and in ORT format; none if it was not asked for.
    """

    path: Path
    description: Description
    model: ModelProto
    fp32: ModelProto
    inputs: Pixels
    missed: tuple[str, ...]
    core_files: tuple[Path, ...]


def export_encoder(
    encoder: Encoder,
    out: Path,
    *,
    precision: Precision = "fp32",
    calibration: Iterable[Pixels] | None = None,
    layout: Layout = "nhwc",
    name: str | None = None,
    version: str | None = None,
    licence: str | None = None,
    mobile: bool = False,
    force: bool = False,
    on_step: Callable[[str], None] = lambda _: None,
) -> ExportReport:
    """Export an encoder, check the result on real images, and write it if it passes.

    Checked are the graph by onnx.checker, an fp32 graph's outputs against torch's in batches of 1, 3 and 8, and those
    of a lower precision against fp32's (`checks`). int8 is judged on other images than it was calibrated on.

    Args:
        encoder: on the CPU; it is left as it is.
        out: an .onnx file; it is replaced at once or left as it was.
        precision: of the file.
        calibration: images of any sizes in an order by chance, read only as far as they are needed; None: the
            photographs that come with scikit-image and scikit-learn, which are too few for int8.
        layout: of the input.
        name: for people; None: the encoder's own.
        version: for people; None: the first twelve digits of the weights' hash.
        licence: of the weights; None: what the encoder says.
        mobile: whether to write the core graph as well, as STEM.core.onnx and STEM.core.ort (`mobile`).
        force: write what misses a bound as well. A graph that is broken or not finite is never written.
        on_step: called with what is being done, a few words.

    Raises:
        RefusedExport: a bound is missed.
        UserError: the encoder or the images cannot be used, or `out` is not an .onnx file.
    """
    check_target(out)
    on_step("reading images")
    inputs = _read_inputs(encoder, precision, calibration)
    judged = inputs[1::2] if precision == "int8" else inputs
    on_step("tracing the network")
    fp32 = to_onnx(encoder)
    lower = None
    if precision != "fp32":
        on_step(f"making it {precision}")
        lower = to_fp16(fp32) if precision == "fp16" else to_int8(fp32, encoder.info.backbone, inputs[0::2])
    if layout == "nchw":
        fp32, lower = channels_first(fp32), None if lower is None else channels_first(lower)
    on_step("comparing with torch")
    description = replace(_describe(encoder, name, version, licence), layout=layout)
    description = _check_fp32(fp32, description, encoder, judged[:PARITY_IMAGES])
    if lower is not None:
        on_step("comparing with fp32")
        description = _check_lower(lower, fp32, replace(description, precision=precision), judged)
    assert description.parity is not None
    missed = missed_bounds(precision, description.parity, description.agreement)
    core = None
    if mobile:
        on_step("making the core graph")
        core = core_graph(fp32)
        missed += _missed_by_core(core, encoder, judged[:PARITY_IMAGES])
    if missed and not force:
        raise RefusedExport(out, missed)
    model = fp32 if lower is None else lower
    data = model.SerializeToString()
    write_atomically(out, lambda file: file.write(data))
    return ExportReport(
        path=out,
        description=description,
        model=model,
        fp32=fp32,
        inputs=judged,
        missed=tuple(missed),
        core_files=() if core is None else _write_core(core, out),
    )


def check_target(out: Path) -> None:
    """Refuse a target that cannot become an .onnx file, by a UserError."""
    if out.suffix.lower() != ".onnx":
        raise UserError(f"--out {out}: the file's name ends in .onnx")
    if out.is_dir():
        raise UserError(f"--out {out} is a folder; give the file to write")


def _read_inputs(encoder: Encoder, precision: Precision, calibration: Iterable[Pixels] | None) -> Pixels:
    """The different images that an export is checked with, as evaluation-style input (N, S, S, 3)."""
    least = LEAST_IMAGES[precision]
    if calibration is None and precision == "int8":
        raise UserError(
            f"int8 takes --calibrate PATH: {least} or more different photographs, like those that the encoder will see"
        )
    images = _packaged_pictures() if calibration is None else calibration
    inputs = distinct_inputs(images, encoder.preprocess, MOST_IMAGES[precision])
    if len(inputs) < least:
        raise UserError(f"{precision} is judged on {least} or more different images; here are {len(inputs)}")
    return inputs


def _packaged_pictures() -> Iterator[Pixels]:
    """The packaged photographs, then the quarters of each: 50 pictures."""
    photographs = [read_photograph(photograph) for photograph in PHOTOGRAPHS]
    yield from photographs
    for pixels in photographs:
        height, width = (side // 2 for side in pixels.shape[:2])
        for top in (0, height):
            for left in (0, width):
                yield pixels[top : top + height, left : left + width]


def _describe(encoder: Encoder, name: str | None, version: str | None, licence: str | None) -> Description:
    info = encoder.info
    weights_hash = info.weights_hash or tensors_hash(
        {key: value.cpu().contiguous() for key, value in encoder.backbone.state_dict().items()}
    )
    facts = asdict(info) | {
        "name": name or info.name or info.backbone,
        "version": version or weights_hash[:12],
        "weights_hash": weights_hash,
        "licence": info.licence if licence is None else licence,
    }
    return Description(**facts)


def _check_fp32(fp32: ModelProto, description: Description, encoder: Encoder, inputs: Pixels) -> Description:
    """Compare the graph with torch and give it its metadata; returns them, with the parity."""
    check_structure(fp32, description)
    parity = measure_parity(GraphRunner(fp32), inputs, embed_inputs(encoder.backbone, inputs))
    described = replace(description, parity=parity)
    helper.set_model_props(fp32, described.to_properties())
    return described


def _check_lower(model: ModelProto, fp32: ModelProto, description: Description, inputs: Pixels) -> Description:
    """Compare a graph of lower precision with fp32's and give it its metadata; returns them, with the agreement."""
    check_structure(model, description)
    features, reference = (features_in_mixed_batches(GraphRunner(graph), inputs) for graph in (model, fp32))
    described = replace(description, agreement=measure_agreement(features, reference).as_dict())
    helper.set_model_props(model, described.to_properties())
    return described


def _missed_by_core(core: ModelProto, encoder: Encoder, inputs: Pixels) -> list[str]:
    """As `missed_bounds`, of the core graph, which takes normalized images one by one."""
    normalized = normalize(torch.from_numpy(inputs)).permute(0, 2, 3, 1).numpy()
    expected = embed_inputs(encoder.backbone, inputs).numpy()
    features = GraphRunner(core).run_in_batches(normalized, repeat(1))[FEATURES]
    parity = relative_difference(features, expected)
    return [f"the core graph: {reason}" for reason in missed_bounds("fp32", parity, {})]


def _write_core(core: ModelProto, out: Path) -> tuple[Path, Path]:
    """Write STEM.core.onnx and STEM.core.ort beside `out`."""
    as_onnx, as_ort = out.with_suffix(".core.onnx"), out.with_suffix(".core.ort")
    data = core.SerializeToString()
    write_atomically(as_onnx, lambda file: file.write(data))
    write_ort(core, as_ort)
    return as_onnx, as_ort
