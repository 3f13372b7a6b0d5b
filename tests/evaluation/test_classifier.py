"""Top-1 and top-5 of a head, by the names of its classes."""

import json

import numpy as np
import pytest
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

from m3i_scale.evaluation import NotMeasuredError
from m3i_scale.evaluation.classifier import Classifier, measure_classifier
from m3i_scale.evaluation.commands import evaluate
from m3i_scale.evaluation.intervals import Clusters
from m3i_scale.evaluation.measures import Side
from m3i_scale.evaluation.samples import Table

HEAD = ["ant", "bee", "cat", "dog", "elk", "fox", "gnu", "hen"]
RANKED_NK = np.array([[2, 0, 1, 3, 4], [0, 2, 1, 3, 4], [0, 1, 3, 4, 2], [0, 1, 3, 4, 5], [3, 0, 1, 2, 4]], np.float32)


def measured(classes, labels, head=HEAD):
    test = Side(Table([], classes, labels=labels), {})
    classifier = Classifier(lambda images: images, head)
    return measure_classifier(classifier, RANKED_NK, test, Clusters("sample", np.arange(len(labels))))


def test_by_name_whatever_the_order_of_the_data():
    found = measured(["dog", "cat", "cow"], [1, 1, 1, 1, 0])  # nobody is a cow
    assert found["top-1"]["value"] == pytest.approx(2 / 5)
    assert found["top-5"]["value"] == pytest.approx(4 / 5)
    assert (found["top-1"]["chance"], found["top-5"]["chance"]) == (1 / 8, 5 / 8)
    assert (found["top-1"]["majority"], found["top-5"]["majority"]) == (pytest.approx(4 / 5), pytest.approx(1))


def test_samples_without_a_label_do_not_count():
    assert measured(HEAD, [2, -1, -1, -1, -1])["top-1"]["value"] == 1


def test_few_classes_have_no_top_5():
    assert "top-5" not in measured(HEAD[:5], [2, 2, 2, 2, 3], HEAD[:5])


@pytest.mark.parametrize(
    ("classes", "labels", "head"),
    [
        (["cow", "cat"], [0, 1, 1, 1, 1], HEAD),
        (["cat", "dog"], [0, 1, 1, 1, 1], ["cat", "dog", "cat"]),
        (["cat"], [-1] * 5, HEAD),
    ],
)
def test_what_names_do_not_tell_is_not_measured(classes, labels, head):
    with pytest.raises(NotMeasuredError):
        measured(classes, labels, head)


def test_two_classes_of_one_name_in_the_order_of_the_head():
    head = ["crane", "cat", "crane"]
    assert measured(head, [2, 0, 0, 0, 1], head)["top-1"]["value"] == pytest.approx(4 / 5)


@pytest.fixture
def stock_classifier(tmp_path):
    """A Hub folder of a ViT with a head for two classes."""
    config = ViTConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, image_size=32, patch_size=8
    )
    ViTForImageClassification(config).save_pretrained(tmp_path)
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    return tmp_path


def evaluated(folder, shards):
    return evaluate(folder, str(shards / "val"), train_data=str(shards / "train"), measures=("classifier", "knn"))


def test_a_stock_classifier_of_other_classes(shards, stock_classifier):
    found = evaluated(stock_classifier, shards)
    assert "LABEL_0" in found["not_measured"]["classifier"]
    assert "knn" in found["measures"]


@pytest.mark.parametrize("names", [["1", "2"], ["0", "1", "2"], []])
def test_a_faulty_head_does_not_keep_the_features_from_being_measured(shards, stock_classifier, names):
    """Numbers from 1 on, names of more classes than the stored head has, and of none."""
    path = stock_classifier / "config.json"
    values = json.loads(path.read_text()) | {"id2label": {name: f"class {name}" for name in names}}
    values.pop("label2id", None)
    path.write_text(json.dumps(values))
    found = evaluated(stock_classifier, shards)
    assert list(found["measures"]) == ["knn"]
    assert "classifier" in found["not_measured"]
