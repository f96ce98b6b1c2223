"""fp16 and int8 against fp32 on real photographs, and a network that rounding would ruin."""

import functools
from collections import Counter
from itertools import repeat

import numpy as np
import onnx
import pytest
import torch
from export_models import lively_encoder, tiles
from onnx import ModelProto, TensorProto, helper, numpy_helper
from timm.models.resnet import BasicBlock

from lowssl_core.encoder import Encoder, load_encoder
from lowssl_core.errors import UserError
from lowssl_core.export.checks import GraphRunner, measure_agreement
from lowssl_core.export.graph import to_onnx
from lowssl_core.export.precision import preprocessing, to_fp16, to_int8
from lowssl_core.images import Pixels
from lowssl_core.photos import open_photos


def inputs(encoder: Encoder, count: int) -> Pixels:
    return np.stack([encoder.preprocess(tile) for tile in tiles(count)])


def others(encoder: Encoder) -> Pixels:
    """Held-out regions of the photographs: no pixel of them was seen in `inputs`."""
    source = open_photos(split="test")
    return np.stack([encoder.preprocess(np.asarray(source.read(index))) for index in range(100)])


def features(model: ModelProto, images: Pixels, batch: int = 8) -> torch.Tensor:
    return torch.from_numpy(GraphRunner(model).run_in_batches(images, repeat(batch))["features"])


def weight_types(model: ModelProto) -> Counter[int]:
    return Counter(weight.data_type for weight in model.graph.initializer if len(weight.dims) > 1)


def uneven(encoder: Encoder, *, decades: float, blocks: int) -> Encoder:
    """The same function in other numbers: channels inside residual blocks scaled up to so many powers of ten apart.

    Rectifiers let positive factors through, so what the first convolution multiplies the second one can divide. A
    rounding step for all channels together then wipes out the small ones, as happens in MobileNetV2.
    """
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for block in [part for part in encoder.backbone.modules() if isinstance(part, BasicBlock)][:blocks]:
            factors = 10 ** (decades * torch.rand(block.bn1.num_features, generator=generator) - decades / 2)
            block.bn1.weight *= factors  # type: ignore[operator]
            block.bn1.bias *= factors  # type: ignore[operator]
            block.conv2.weight /= factors[None, :, None, None]
    return encoder


class Exports:
    """An encoder in each precision, made when first asked for."""

    def __init__(self, encoder: Encoder) -> None:
        self.encoder = encoder

    @functools.cached_property
    def fp32(self) -> ModelProto:
        return to_onnx(self.encoder)

    @functools.cached_property
    def fp16(self) -> ModelProto:
        return to_fp16(self.fp32)

    @functools.cached_property
    def int8(self) -> ModelProto:
        return to_int8(self.fp32, self.encoder.info.backbone, inputs(self.encoder, 64))

    @functools.cached_property
    def unseen(self) -> Pixels:
        return others(self.encoder)


EXPORTS = functools.cache(
    lambda name: Exports(load_encoder("default") if name == "default" else lively_encoder(name, 32))
)


@pytest.fixture(params=["default", "mobilenetv2_tiny", "vit_tiny"])
def exports(request: pytest.FixtureRequest) -> Exports:
    return EXPORTS(request.param)


@pytest.fixture
def trained() -> Exports:
    return EXPORTS("default")


def test_fp16_gives_the_features_of_fp32_at_half_the_size(exports: Exports) -> None:
    fp32, fp16, images = exports.fp32, exports.fp16, exports.unseen
    onnx.checker.check_model(fp16, full_check=True)
    assert measure_agreement(features(fp16, images), features(fp32, images)).cosine > 0.9999
    assert fp16.ByteSize() < 0.52 * fp32.ByteSize()
    assert TensorProto.FLOAT16 in weight_types(fp16)


def test_fp16_keeps_normalization_inputs_and_outputs(exports: Exports) -> None:
    fp32, fp16 = exports.fp32, exports.fp16
    assert list(fp16.graph.input) == list(fp32.graph.input)
    assert list(fp16.graph.output) == list(fp32.graph.output)
    assert [node.op_type for node in preprocessing(fp16)] == ["Transpose", "Cast", "Mul", "Add"]
    constants = {weight.name: weight for weight in fp16.graph.initializer}
    for node in preprocessing(fp16)[2:]:
        assert constants[node.input[1]].data_type == TensorProto.FLOAT
    outputs = GraphRunner(fp16).run(exports.unseen[:4])
    np.testing.assert_allclose(np.linalg.norm(outputs["embedding"], axis=1), 1, rtol=1e-6)


def test_weights_beyond_fp16_show_on_any_processor(trained: Exports) -> None:
    model = onnx.load_model_from_string(trained.fp32.SerializeToString())
    weight = next(weight for weight in model.graph.initializer if len(weight.dims) == 4)
    weight.CopyFrom(numpy_helper.from_array(1e6 * numpy_helper.to_array(weight), weight.name))
    images = trained.unseen[:4]
    assert np.isfinite(features(model, images).numpy()).all()
    assert not np.isfinite(features(to_fp16(model), images).numpy()).all()


def test_int8_keeps_the_features_of_photographs_it_was_not_calibrated_on(exports: Exports) -> None:
    fp32, int8, images = exports.fp32, exports.int8, exports.unseen
    onnx.checker.check_model(int8, full_check=True)
    assert measure_agreement(features(int8, images), features(fp32, images)).centered_cosine > 0.98
    assert int8.ByteSize() < 0.45 * fp32.ByteSize()
    assert list(int8.graph.input) == list(fp32.graph.input)
    assert list(int8.graph.output) == list(fp32.graph.output)


def test_an_image_has_the_same_int8_features_in_every_company(exports: Exports) -> None:
    images = exports.unseen[:12]
    alone, together = (features(exports.int8, images, batch=batch) for batch in (1, 12))
    torch.testing.assert_close(alone, together, rtol=0, atol=1e-5)


def test_int8_weights_have_seven_bits_so_that_no_processor_saturates(trained: Exports) -> None:
    constants = [weight for weight in trained.int8.graph.initializer if weight.data_type == TensorProto.INT8]
    weights = [numpy_helper.to_array(weight).astype(int) for weight in constants if len(weight.dims) > 1]
    assert len(weights) == 13  # every convolution
    largest = max(int(np.abs(weight).max()) for weight in weights)
    # Two products of the largest activation and weight, added up, still fit into 16 bits.
    assert 2 * 255 * largest < 2**15


def test_the_same_images_give_the_same_file(trained: Exports) -> None:
    model, images = to_onnx(trained.encoder), inputs(trained.encoder, 64)
    again = to_int8(model, "resnet_tiny", images)
    assert again.SerializeToString(deterministic=True) == trained.int8.SerializeToString(deterministic=True)
    assert to_fp16(model).SerializeToString(deterministic=True) == trained.fp16.SerializeToString(deterministic=True)
    assert model.SerializeToString(deterministic=True) == trained.fp32.SerializeToString(deterministic=True)


def test_layers_with_uneven_channels_stay_in_fp32_and_the_features_survive() -> None:
    encoder = uneven(load_encoder("default"), decades=3, blocks=2)
    images = others(encoder)
    fp32 = to_onnx(encoder)
    # The rescaled network is the same function, which rounding one activation would ruin ...
    torch.testing.assert_close(features(fp32, images), features(EXPORTS("default").fp32, images))
    assert agreement_with_one_rounded(encoder, fp32, images) < 0.98
    int8 = to_int8(fp32, "resnet_tiny", inputs(encoder, 64))
    assert measure_agreement(features(int8, images), features(fp32, images)).centered_cosine > 0.98
    # ... and some layers of it, not most, are left as they were.
    stayed = weight_types(int8)[TensorProto.FLOAT]
    assert 2 <= stayed <= 6


def agreement_with_one_rounded(encoder: Encoder, fp32: ModelProto, images: Pixels) -> float:
    """The centred cosine when the input of the first block's second convolution is rounded to 8 bits, by hand."""
    model = onnx.load_model_from_string(fp32.SerializeToString())
    convolutions = [node for node in model.graph.node if node.op_type == "Conv"]
    target = convolutions[2]
    model.graph.output.append(helper.make_empty_tensor_value_info(target.input[0]))
    largest = float(GraphRunner(model).run(inputs(encoder, 16))[target.input[0]].max())
    model.graph.output.pop()
    model.graph.initializer.append(numpy_helper.from_array(np.float32(largest / 255), "step"))
    model.graph.initializer.append(numpy_helper.from_array(np.uint8(0), "zero"))
    quantize = helper.make_node("QuantizeLinear", [target.input[0], "step", "zero"], ["levels"])
    restore = helper.make_node("DequantizeLinear", ["levels", "step", "zero"], ["restored"])
    position = list(model.graph.node).index(target)
    target.input[0] = "restored"
    model.graph.node.insert(position, restore)
    model.graph.node.insert(position, quantize)
    return measure_agreement(features(model, images), features(fp32, images)).centered_cosine


def test_a_network_that_int8_cannot_keep_is_as_bad_as_its_figures_say() -> None:
    """When more than half of the layers would have to stay, the result is left to the gate, which sees it."""
    encoder = uneven(load_encoder("default"), decades=4, blocks=4)
    images = others(encoder)
    fp32 = to_onnx(encoder)
    int8 = to_int8(fp32, "resnet_tiny", inputs(encoder, 32))
    assert measure_agreement(features(int8, images), features(fp32, images)).centered_cosine < 0.98
    assert weight_types(int8)[TensorProto.INT8] >= 7


def test_what_cannot_be_calibrated_is_one_line(trained: Exports) -> None:
    images = inputs(trained.encoder, 16)
    with pytest.raises(UserError, match="16 or more photographs; here are 3"):
        to_int8(trained.fp32, "resnet_tiny", images[:3])
    model = onnx.load_model_from_string(trained.fp32.SerializeToString())
    del model.graph.initializer[:]
    with pytest.raises(UserError, match=r"odd has no convolution.*MobileNetV2, ResNet and ViT"):
        to_int8(model, "odd", images)


def test_only_exports_have_a_network_to_round() -> None:
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 4]) for name in ("images", "features")]
    graph = helper.make_graph([helper.make_node("Relu", ["images"], ["features"])], "g", values[:1], values[1:])
    with pytest.raises(UserError, match="not exported by LowSSL"):
        to_fp16(helper.make_model(graph))
