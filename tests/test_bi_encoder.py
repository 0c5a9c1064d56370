import numpy as np
import pytest
import torch

from fastrank.bi_encoder import bi_encoder_scores
from fastrank.data import RankingList
from fastrank.train.demo import base_weights

FOLDER = base_weights()


def test_cosines_equal_those_of_each_text_encoded_alone():
    from sentence_transformers import SentenceTransformer

    long = "a very long text about tensors and their strides " * 40
    lists = [
        RankingList("sum of a tensor", ("add all elements", long, "", "emoji 🙂 مرحبا")),
        RankingList("nothing found", ()),
        RankingList("add all elements", ("add all elements", "open a socket")),
    ]
    actual = bi_encoder_scores(FOLDER, lists, max_length=64, max_batch_tokens=100)
    model = SentenceTransformer(str(FOLDER), device="cpu")
    model.max_seq_length = 64
    assert [scores.shape for scores in actual] == [(4,), (0,), (2,)]
    for ranking, scores in zip(lists, actual, strict=True):
        assert scores.dtype == np.float32
        with torch.inference_mode():
            query, *documents = (model.encode(text) for text in (ranking.query, *ranking.documents))
        expected = [float(query @ document) for document in documents]
        np.testing.assert_allclose(scores, expected, atol=1e-5)
    assert actual[2][0] == pytest.approx(1, abs=1e-5) and actual[2][1] < 0.5


def test_no_lists_give_no_scores():
    assert bi_encoder_scores(FOLDER, []) == []
