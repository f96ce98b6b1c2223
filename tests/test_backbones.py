"""The contract of a backbone, (B, 3, H, W) to (B, width), and where its features come from."""

import pytest
import torch
from timm.models._efficientnet_blocks import InvertedResidual
from torch import nn

from lowssl_core.backbones import BACKBONES, build_backbone

# The paper's, and the two of this package.
WIDTHS = {
    "mobilenetv2": 1280,
    "resnet18": 512,
    "resnet34": 512,
    "vit_tiny": 192,
    "resnet_tiny": 256,
    "mobilenetv2_tiny": 384,
}

# Of the published architectures, without their classifiers.
NUM_PARAMETERS = {
    "mobilenetv2": 2_223_872,
    "resnet18": 11_176_512,
    "resnet34": 21_284_672,
    "vit_tiny": 5_524_416,
}


def built(name):
    torch.manual_seed(0)
    return build_backbone(name)


def outputs_of(module, kind):
    """A list that fills with the outputs of the submodules of class `kind`, in the order of their calls."""
    outputs = []
    for submodule in module.modules():
        if isinstance(submodule, kind):
            submodule.register_forward_hook(lambda _module, _inputs, output: outputs.append(output))
    return outputs


def test_every_backbone_is_held_to_the_contract():
    assert WIDTHS.keys() == BACKBONES.keys()


@pytest.mark.parametrize("name", WIDTHS)
def test_width_is_as_documented_and_that_of_the_features_at_every_resolution(name):
    backbone, width = built(name)
    assert width == WIDTHS[name]
    backbone.eval()
    with torch.no_grad():
        for size in (224, 128, 64):
            features = backbone(torch.randn(2, 3, size, size))
            assert features.shape == (2, width)
            assert torch.isfinite(features).all()


@pytest.mark.parametrize("name", NUM_PARAMETERS)
def test_backbone_has_the_published_number_of_parameters(name):
    backbone, _ = built(name)
    assert sum(parameter.numel() for parameter in backbone.parameters()) == NUM_PARAMETERS[name]


@pytest.mark.parametrize("name", WIDTHS)
def test_every_parameter_is_trained(name):
    # DDP refuses parameters that take no part in the loss.
    backbone, _ = built(name)
    backbone(torch.randn(2, 3, 64, 64)).square().sum().backward()
    missing = [key for key, parameter in backbone.named_parameters() if parameter.grad is None]
    assert missing == []


@pytest.mark.parametrize(
    ("name", "stride"), [("resnet18", 32), ("mobilenetv2", 32), ("resnet_tiny", 32), ("mobilenetv2_tiny", 8)]
)
def test_convolutional_features_are_averages_over_the_last_map(name, stride):
    backbone, width = built(name)
    backbone.eval()
    maps = outputs_of(backbone, nn.Module)
    with torch.no_grad():
        features = backbone(torch.randn(2, 3, 3 * stride, 2 * stride))
    last_map = [output for output in maps if torch.is_tensor(output) and output.ndim == 4 and output.shape[-1] > 1][-1]
    assert last_map.shape == (2, width, 3, 2)
    expected = sum(last_map[:, :, y, x] for y in range(3) for x in range(2)) / 6
    torch.testing.assert_close(features, expected)
    assert (last_map >= 0).all()  # after the last activation


def test_mobilenetv2_tiny_is_of_inverted_residuals():
    # Sandler et al. 2018, section 3: a 1x1 convolution widens, a depthwise one of 3x3 filters, and a 1x1 narrows
    # without an activation after it; ReLU6 after the others.
    backbone, _ = built("mobilenetv2_tiny")
    blocks = [module for module in backbone.modules() if isinstance(module, InvertedResidual)]
    assert [(block.conv_pw.in_channels, block.conv_pwl.out_channels) for block in blocks] == [
        (16, 32),
        (32, 64),
        (64, 64),
    ]
    for block in blocks:
        wide = block.conv_pw.out_channels
        assert block.conv_dw.groups == block.conv_dw.in_channels == block.conv_dw.out_channels == wide
        assert (block.conv_pw.kernel_size, block.conv_dw.kernel_size, block.conv_pwl.kernel_size) == (
            (1, 1),
            (3, 3),
            (1, 1),
        )
        assert isinstance(block.bn3.act, nn.Identity)
    activations = [module for module in backbone.modules() if isinstance(module, nn.ReLU | nn.ReLU6)]
    assert {type(activation) for activation in activations} == {nn.ReLU6}


def test_vit_tiny_has_twelve_blocks_of_three_heads():
    backbone, _ = built("vit_tiny")
    heads = [module.num_heads for module in backbone.modules() if hasattr(module, "num_heads")]
    assert heads == [3] * 12
    assert outputs_of(backbone, nn.MultiheadAttention) == []


def test_vit_tiny_cuts_patches_of_sixteen():
    backbone, _ = built("vit_tiny")
    convolutions = [module for module in backbone.modules() if isinstance(module, nn.Conv2d)]
    assert [(c.kernel_size, c.stride, c.out_channels) for c in convolutions] == [((16, 16), (16, 16), 192)]


def test_vit_tiny_features_are_the_class_token_after_the_last_norm():
    backbone, _ = built("vit_tiny")
    backbone.eval()
    normed = outputs_of(backbone, nn.LayerNorm)
    with torch.no_grad():
        features = backbone(torch.randn(2, 3, 64, 64))
    tokens = normed[-1]
    if tokens.ndim == 3:
        assert tokens.shape == (2, 1 + 4 * 4, 192)
        tokens = tokens[:, 0]
    torch.testing.assert_close(features, tokens)
    torch.testing.assert_close(features.mean(dim=1), torch.zeros(2), atol=1e-4, rtol=0)
    torch.testing.assert_close(features.var(dim=1, unbiased=False), torch.ones(2), atol=1e-3, rtol=0)


def test_any_timm_model_goes_by_its_name():
    backbone, width = built("mobilenetv2_035")
    backbone.eval()
    with torch.no_grad():
        assert backbone(torch.randn(2, 3, 64, 64)).shape == (2, width)


def test_an_unknown_name_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="resnet18"):
        build_backbone("resnet_eighteen")
