import json

import pytest
import torch
from transformers import AutoImageProcessor, AutoModel

from m3i_scale import load_backbone
from m3i_scale.errors import ConfigError, DataError, ExportError


def test_tokens_are_those_of_the_stock_class(vit_folder):
    images_BCHW = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    backbone = load_backbone(vit_folder)
    assert backbone.image_size == 32
    assert not backbone.training
    pooled_BD, tokens_BLD = backbone(images_BCHW)
    processor = AutoImageProcessor.from_pretrained(vit_folder)
    model = AutoModel.from_pretrained(vit_folder, add_pooling_layer=False).eval()
    hidden = model(**processor(list(images_BCHW), return_tensors="pt")).last_hidden_state
    torch.testing.assert_close(tokens_BLD, hidden[:, 1:])
    torch.testing.assert_close(pooled_BD, hidden[:, 1:].mean(dim=1))
    torch.testing.assert_close(load_backbone(vit_folder, "cls")(images_BCHW)[0], hidden[:, 0])


def test_gradients_reach_its_parameters(vit_folder):
    backbone = load_backbone(vit_folder)
    backbone(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))[1].sum().backward()
    assert all(parameter.grad is not None for parameter in backbone.parameters())


@pytest.mark.parametrize("images", [torch.zeros(1, 3, 32, 32), torch.zeros(1, 3, 64, 64, dtype=torch.uint8)])
def test_images_of_another_type_or_size_are_refused(vit_folder, images):
    with pytest.raises(DataError) as caught:
        load_backbone(vit_folder)(images)
    assert caught.value.where == "images_BCHW"


def test_an_unknown_pool_is_refused(vit_folder):
    with pytest.raises(ConfigError) as caught:
        load_backbone(vit_folder, "max")
    assert "mean" in caught.value.fix


def test_what_is_no_model_folder(tmp_path):
    with pytest.raises(ConfigError):
        load_backbone(tmp_path / "nowhere" / "deep" / "model")
    with pytest.raises(ExportError):
        load_backbone(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "vit"}))
    with pytest.raises(ExportError):
        load_backbone(tmp_path)
