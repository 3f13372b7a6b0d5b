import numpy as np
import pytest

from m3i_scale.errors import ConfigError
from m3i_scale.evaluation.towers import class_embeddings, prompts_of, zero_shot_predict


def test_prompts_are_plain_words():
    assert prompts_of("animals-nature_x", ("{}", "a photo of {}")) == [
        "animals nature x",
        "a photo of animals nature x",
    ]


@pytest.mark.parametrize("template", ["no place", "{} and {}"])
def test_refuses_a_template_without_one_place(template):
    with pytest.raises(ConfigError):
        prompts_of("cat", (template,))


def test_mean_of_prompts_by_hand():
    vectors = {"cat": [1, 0], "a cat": [0, 1], "dog": [-1, 0], "a dog": [-1, 0]}

    def encode(captions):
        return np.array([vectors[caption] for caption in captions], dtype=np.float32)

    classes = class_embeddings(["cat", "dog"], encode, ("{}", "a {}"))
    np.testing.assert_allclose(classes, [[2**-0.5, 2**-0.5], [-1, 0]], atol=1e-6)
    # (−0.2, 1): cosine with "cat" 0.55, with "dog" 0.20
    assert zero_shot_predict(np.array([[-0.2, 1.0], [-1.0, 0.1]], dtype=np.float32), classes).tolist() == [0, 1]
