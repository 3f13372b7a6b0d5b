"""Pictures of arrays with known answers."""

import json

import numpy as np
import pytest
import torch
from PIL import Image, ImageChops
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    SiglipVisionConfig,
    SiglipVisionModel,
    TimmWrapperConfig,
    TimmWrapperModel,
)

from m3i_scale.evaluation import NotMeasuredError
from m3i_scale.evaluation.features import load_vision, patch_tokens
from m3i_scale.evaluation.pictures.dense import (
    Attention,
    attention,
    attention_of,
    brightness,
    cosines,
    dense_pca,
    pca_colours,
    similarity,
)
from m3i_scale.evaluation.pictures.draw import RIGHT, Cell, drawable, framed, grid, heat_over, write_pictures
from m3i_scale.evaluation.pictures.ranked import best_of
from m3i_scale.run.callbacks import Picture

GRAY = Image.new("RGB", (64, 64), (128, 128, 128))


def planted(signs=(1, 1, 1)):
    """Two images of 16 patches whose features are three directions of falling strength, rotated into ten channels."""
    rng = np.random.default_rng(0)
    parts_P3 = np.stack([np.repeat([0, 1], 16), np.tile([0, 1], 16), np.tile([0, 0, 1, 1], 8)], axis=1)
    basis_DD = np.linalg.qr(rng.normal(size=(10, 10)))[0]
    strengths = np.array([9.0, 5.0, 2.0]) * signs
    bright_NL = (parts_P3 @ [1.0, 2.0, 3.0]).reshape(2, 16)
    return (parts_P3 * strengths @ basis_DD[:3] + 4.0).reshape(2, 16, 10), bright_NL, parts_P3.reshape(2, 16, 3)


@pytest.mark.parametrize("signs", [(1, 1, 1), (-1, 1, -1)])
def test_planted_directions_are_the_colours_whatever_their_sign(signs):
    tokens_NLD, bright_NL, parts_NL3 = planted(signs)
    colours_NL3, share = pca_colours(tokens_NLD, bright_NL)
    np.testing.assert_array_equal(colours_NL3, 255 * parts_NL3)
    assert share == pytest.approx(1)


def test_one_basis_for_all_images():
    """The first direction tells the images apart: normalized one by one, they would look alike."""
    tokens_NLD, bright_NL, _ = planted()
    colours_NL3, _ = pca_colours(tokens_NLD, bright_NL)
    assert (colours_NL3[0, :, 0] == 0).all()
    assert (colours_NL3[1, :, 0] == 255).all()


def test_equal_features_are_black_and_hold_nothing():
    colours_NL3, share = pca_colours(np.ones((2, 4, 8)), np.arange(8.0).reshape(2, 4))
    assert not colours_NL3.any()
    assert share == 0


def test_brightness_is_that_of_the_patches():
    image = Image.new("RGB", (32, 32), "black")
    image.paste((255, 255, 255), (16, 0, 32, 16))
    assert brightness([image], 2).tolist() == [[0, 255, 0, 0]]


def test_patches_that_are_no_square_are_not_drawn():
    with pytest.raises(NotMeasuredError):
        dense_pca([GRAY], ["gray"], np.zeros((1, 12, 4)))


def test_features_that_are_no_numbers_are_not_drawn():
    tokens_NLD, _, _ = planted()
    tokens_NLD[1, 3, 5] = np.nan
    with pytest.raises(NotMeasuredError):
        dense_pca([GRAY] * 2, ["a", "b"], tokens_NLD)
    with pytest.raises(NotMeasuredError):
        similarity([GRAY] * 2, ["a", "b"], tokens_NLD)
    with pytest.raises(NotMeasuredError):
        attention([GRAY] * 2, ["a", "b"], Attention(tokens_NLD.transpose(0, 2, 1), "T"))


def test_the_marked_patch_is_most_similar_to_itself_and_to_its_like():
    tokens_NLD = np.random.default_rng(1).normal(size=(1, 16, 32))
    tokens_NLD[0, 3] = 2 * tokens_NLD[0, 10]
    assert cosines(tokens_NLD[:, 5], tokens_NLD).argmax() == 5
    assert cosines(tokens_NLD[:, 10], tokens_NLD)[0, 3] == pytest.approx(1)
    assert similarity([GRAY], ["gray"], tokens_NLD).name == "similarity"


def test_attention_of_a_vit_is_what_transformers_gives(vit_folder):
    vision = load_vision(vit_folder, "mean", torch.device("cpu"))
    images = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    before = vision.model.config._attn_implementation
    found = attention_of(vision.model, vision.pixels(images), vision.hidden(images).detach(), vision.patch_count())
    assert vision.model.config._attn_implementation == before
    eager = type(vision.model).from_pretrained(vit_folder, add_pooling_layer=False, attn_implementation="eager").eval()
    with torch.no_grad():
        layers = eager(pixel_values=vision.pixels(images), output_attentions=True).attentions
    np.testing.assert_allclose(found.maps_NHL, layers[-1][:, :, 0, 1:].numpy(), atol=1e-6)
    assert found.maps_NHL.shape == (3, 2, 16)
    picture = attention([GRAY] * 3, ["a", "b", "c"], found)
    assert "class token" in picture.title


SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}


@pytest.mark.parametrize(
    ("model", "prefix"),
    [
        (Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**SMALL, num_register_tokens=3)), 4),
        (CLIPVisionModel(CLIPVisionConfig(**SMALL, intermediate_size=48)), 1),
    ],
)
def test_attention_of_other_class_tokens(model, prefix):
    model.eval()
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        hidden = model(pixel_values=pixels).last_hidden_state
    found = attention_of(model, pixels, hidden, 16)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        last = model(pixel_values=pixels, output_attentions=True).attentions[-1]
    np.testing.assert_allclose(found.maps_NHL, last[:, :, 0, prefix:].numpy(), atol=1e-6)


def test_attention_of_a_pooling_head():
    model = SiglipVisionModel(SiglipVisionConfig(**SMALL, intermediate_size=48)).eval()
    pixels, weights = torch.randn(2, 3, 32, 32), []
    model.head.attention.register_forward_hook(lambda *call: weights.append(call[-1][1]))
    with torch.no_grad():
        hidden = model(pixel_values=pixels).last_hidden_state  # whose head gives the mean over its heads
    found = attention_of(model, pixels, hidden, 16)
    np.testing.assert_allclose(found.maps_NHL.mean(axis=1), weights[0][:, 0].numpy(), atol=1e-6)
    assert "pooling head" in found.title


def test_a_model_that_does_not_give_its_attention():
    model = TimmWrapperModel(TimmWrapperConfig(architecture="test_vit", do_pooling=False))
    with pytest.raises(NotMeasuredError):
        attention_of(model, torch.zeros(1, 3, 160, 160), torch.zeros(1, 101, 64), 100)


def test_without_a_class_token_it_is_similarity_to_the_mean_and_says_so():
    hidden = torch.randn(2, 8, 4, 4)
    found = attention_of(None, torch.zeros(2, 3, 64, 64), hidden, None)
    tokens = patch_tokens(hidden, None)
    wanted = torch.nn.functional.cosine_similarity(tokens, tokens.mean(dim=1, keepdim=True), dim=-1)
    np.testing.assert_allclose(found.maps_NHL[:, 0], wanted.numpy(), atol=1e-6)
    assert "no class token" in found.title


def test_neighbours_of_planted_clusters():
    scores = np.array([[-np.inf, 0.9, 0.1, 0.8], [0.9, -np.inf, 0.2, 0.3]])
    labels = np.array([0, 0, 1, 1])
    first, second = best_of(scores, [labels == 0, None], count=2)
    assert [(one.number, one.rank, one.right) for one in first] == [(1, 0, True), (3, 1, False)]
    assert [(one.number, one.right) for one in second] == [(0, None), (3, None)]
    assert [one.number for one in best_of(scores, [None, None])[0]] == [1, 3, 2]  # the query itself is none


def test_the_right_one_is_shown_even_when_it_comes_late():
    scores = np.array([[0.9, 0.8, 0.7, 0.1, 0.2]])
    found = best_of(scores, [np.array([False, False, False, True, True])], count=2)[0]
    assert [(one.number, one.rank, one.right) for one in found] == [(0, 0, False), (1, 1, False), (4, 3, True)]


def test_a_grid_has_its_cells_where_they_belong():
    red, blue = Image.new("RGB", (9, 9), "red"), Image.new("RGB", (9, 9), "blue")
    picture = grid([[Cell(red), Cell(blue)], [None, Cell(red, frame=RIGHT)]])
    width, height = picture.size
    at = {(x, y): picture.getpixel((width * x // 4, height * y // 4)) for x in (1, 3) for y in (1, 3)}
    assert at == {(1, 1): (255, 0, 0), (3, 1): (0, 0, 255), (1, 3): (255, 255, 255), (3, 3): (255, 0, 0)}
    assert RIGHT in {color for _, color in picture.getcolors(1 << 16)}
    assert grid([[Cell(red)] * 40]).width < 2_000


def test_heat_grows_with_the_value_and_frames_leave_the_image_alone():
    heat = heat_over(GRAY, np.array([[0.0, 1.0], [0.25, 0.5]]), 0, 1).convert("L")
    corners = [heat.getpixel(place) for place in ((0, 0), (0, 63), (63, 63), (63, 0))]
    assert corners == sorted(set(corners))
    assert ImageChops.difference(framed(GRAY, (0.25, 0.25, 0.5, 0.5)), GRAY).getbbox() == (14, 14, 34, 34)
    assert framed(GRAY, (0.25, 0.25, 0.5, 0.5)).crop((16, 16, 32, 32)).getcolors() == [(256, (128, 128, 128))]
    assert GRAY.getcolors() == [(64 * 64, (128, 128, 128))]


@pytest.mark.parametrize(("text", "drawn"), [("a  café\n漢", "a cafe ?"), ("…", "..."), ("long text here", "long te…")])
def test_letters_that_the_font_has(text, drawn):
    assert drawable(text, 8) == drawn


def test_a_folder_of_pictures_lists_them_and_none_is_large(tmp_path):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (900, 900, 3), dtype=np.uint8))
    entries = write_pictures(tmp_path, [Picture("attention", "T", "A", noise), Picture("views", "V", "B", GRAY)], 7)
    assert json.loads((tmp_path / "pictures.json").read_text()) == {"step": 7, "pictures": entries}
    assert entries[0] == {"name": "attention", "file": "attention.jpg", "title": "T", "alt": "A"}
    assert (tmp_path / "attention.jpg").stat().st_size < 300_000
    assert Image.open(tmp_path / "views.jpg").size == (64, 64)
