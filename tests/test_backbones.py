"""The contract of a backbone, (B, 3, H, W) to (B, width), and where its features come from."""

import pytest
import torch
from torch import nn

from lowssl_core.backbones import build_backbone

WIDTHS = {"mobilenetv2": 1280, "resnet18": 512, "resnet34": 512, "vit_tiny": 192}

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


@pytest.mark.parametrize("name", WIDTHS)
def test_width_is_the_papers_and_that_of_the_features_at_every_resolution(name):
    backbone, width = built(name)
    assert width == WIDTHS[name]
    backbone.eval()
    with torch.no_grad():
        for size in (224, 128, 64):
            features = backbone(torch.randn(2, 3, size, size))
            assert features.shape == (2, width)
            assert torch.isfinite(features).all()


@pytest.mark.parametrize("name", WIDTHS)
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


@pytest.mark.parametrize("name", ["resnet18", "mobilenetv2"])
def test_convolutional_features_are_averages_over_the_last_map(name):
    backbone, width = built(name)
    backbone.eval()
    maps = outputs_of(backbone, nn.Module)
    with torch.no_grad():
        features = backbone(torch.randn(2, 3, 96, 64))
    last_map = [output for output in maps if torch.is_tensor(output) and output.ndim == 4 and output.shape[-1] > 1][-1]
    assert last_map.shape == (2, width, 3, 2)
    expected = sum(last_map[:, :, y, x] for y in range(3) for x in range(2)) / 6
    torch.testing.assert_close(features, expected)
    assert (last_map >= 0).all()  # after the last activation


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
