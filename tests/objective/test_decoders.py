"""Predictions f_ψ: what they depend on and what not."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from m3i_scale.objective.build import initialize_module
from m3i_scale.objective.convolution import ConvolutionDecoder
from m3i_scale.objective.decoders import AttentionPool, CrossAttentionDecoder, MeanPool, TransformerDecoder
from m3i_scale.objective.positions import grid_position

GRID = (4, 4)


def transformer(position: str, kind: type[TransformerDecoder] = TransformerDecoder) -> TransformerDecoder:
    decoder = kind(16, 32, 2, 2, position)
    for module in decoder.modules():
        initialize_module(module, module)
    return decoder.eval()


def inputs(position: str) -> list[torch.Tensor | tuple[int, int] | None]:
    visible = torch.tensor([[0, 3, 5], [1, 2, 15]])
    query = torch.tensor([[4, 7], [0, 3]])
    features = torch.randn(2, 16, 64) if position == "relative" else None
    other = torch.randn(2, 16, 64) if position == "relative" else None
    return [torch.randn(2, 1, 16), torch.randn(2, 3, 16), visible, query, GRID, features, other]


@pytest.mark.parametrize("position", ["relative", "absolute"])
def test_order_of_visible_tokens_and_of_queries_does_not_matter(position: str) -> None:
    decoder, given = transformer(position), inputs(position)
    out = decoder(*given)
    assert out.shape == (2, 2, 32)
    turned = list(given)
    turned[1], turned[2] = given[1].flip(1), given[2].flip(1)
    torch.testing.assert_close(decoder(*turned), out, atol=1e-5, rtol=1e-5)
    asked = list(given)
    asked[3] = given[3].flip(1)
    torch.testing.assert_close(decoder(*asked), out.flip(1), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("position", ["relative", "absolute"])
def test_a_query_depends_on_where_it_asks_and_on_every_token(position: str) -> None:
    decoder, given = transformer(position), inputs(position)
    out = decoder(*given)
    moved = list(given)
    moved[3] = torch.tensor([[4, 8], [0, 3]])
    assert not torch.allclose(decoder(*moved)[0, 1], out[0, 1], atol=1e-4)
    for place in (0, 1):  # class token, visible tokens
        changed = list(given)
        changed[place] = given[place] + 1.0
        assert not torch.allclose(decoder(*changed), out, atol=1e-4)


@pytest.mark.parametrize(("kind", "alone"), [(CrossAttentionDecoder, True), (TransformerDecoder, False)])
def test_queries_that_attend_to_visible_tokens_alone_know_nothing_of_each_other(
    kind: type[TransformerDecoder], alone: bool
) -> None:
    decoder, given = transformer("relative", kind), inputs("relative")
    both = decoder(*given)
    given[3] = given[3][:, :1]
    assert torch.allclose(decoder(*given), both[:, :1], atol=1e-5) == alone


def test_a_query_that_attends_to_visible_tokens_alone_reads_all_of_them_and_its_place() -> None:
    decoder, given = transformer("absolute", CrossAttentionDecoder), inputs("absolute")
    out = decoder(*given)
    for place in (0, 1, 2, 3):  # class token, visible tokens, where they lie, where it asks
        changed = list(given)
        changed[place] = given[place] + 1 if place < 2 else torch.tensor([[6, 3, 5], [8, 2, 12]])[:, : 5 - place]
        assert not torch.allclose(decoder(*changed), out, atol=1e-4)


def test_a_relative_query_reads_the_position_of_the_target_view() -> None:
    decoder, given = transformer("relative"), inputs("relative")
    out = decoder(*given)
    other = list(given)
    other[6] = given[6].clone()
    other[6][0, 7] += 1.0  # the second query of sample 0
    changed = decoder(*other)
    assert not torch.allclose(changed[0, 1], out[0, 1], atol=1e-4)
    torch.testing.assert_close(changed[1], out[1])
    unread = list(given)
    unread[6] = given[6].clone()
    unread[6][0, 9] += 1.0  # nobody asks there
    torch.testing.assert_close(decoder(*unread), out)


def test_a_relative_decoder_without_positions_says_so() -> None:
    given = inputs("relative")
    given[5] = None
    with pytest.raises(ValueError, match="needs the positions"):
        transformer("relative")(*given)


def test_absolute_positions_come_from_the_fixed_grid() -> None:
    decoder = transformer("absolute")
    decoder._run = lambda sequence_BSD, count: sequence_BSD[:, -count:]  # without its layers
    decoder.norm = torch.nn.Identity()
    given = inputs("absolute")
    table = grid_position(GRID, 32, torch.device("cpu"))
    torch.testing.assert_close(decoder(*given), decoder.mask_token + table[given[3]])


def test_mean_pool_is_the_normalised_mean() -> None:
    tokens = torch.randn(2, 5, 8)
    torch.testing.assert_close(MeanPool(8)(tokens), F.layer_norm(tokens.mean(dim=1), (8,), eps=1e-6))


def test_attention_pool_is_multi_head_attention_of_the_mean_token() -> None:
    pool = AttentionPool(8, 12, 2)
    tokens = torch.randn(3, 5, 8)
    normal = F.layer_norm(tokens, (8,), eps=1e-6)
    query = pool.query(F.layer_norm(tokens.mean(dim=1), (8,), eps=1e-6))
    key, value = pool.key(normal), pool.value(normal)
    heads = []
    for part in (slice(0, 4), slice(4, 8)):
        attention = torch.einsum("bd,bld->bl", query[:, part], key[..., part]).div(2.0).softmax(dim=-1)
        heads.append(torch.einsum("bl,bld->bd", attention, value[..., part]))
    torch.testing.assert_close(pool(tokens), pool.output(torch.cat(heads, dim=-1)))


def test_the_last_layer_is_the_stock_layer_read_at_the_queries() -> None:
    decoder = transformer("absolute")
    sequence = torch.randn(3, 11, 32)
    torch.testing.assert_close(decoder._run(sequence, 4), torch.nn.Sequential(*decoder.layers)(sequence)[:, -4:])


# ---------------------------------------------------------------- convolutions


def test_a_convolution_answers_at_its_places_and_sees_as_far_as_it_is_deep() -> None:
    decoder = ConvolutionDecoder(16, 1, 3, 4).eval()
    decoder.reset_parameters()
    tokens, visible = torch.randn(2, 3, 16), torch.tensor([[0, 3, 5], [1, 2, 15]])
    query = torch.tensor([[4, 15], [0, 10]])
    out = decoder(torch.zeros(2, 1, 16), tokens, visible, query, GRID, None, None)
    assert out.shape == (2, 2, 16)
    turned = decoder(torch.ones(2, 1, 16), tokens.flip(1), visible.flip(1), query.flip(1), GRID, None, None)
    torch.testing.assert_close(turned, out.flip(1), atol=1e-6, rtol=1e-6)
    changed = tokens.clone()
    changed[0, 0] += 1.0  # patch 0: beside 4, far from 15
    other = decoder(torch.zeros(2, 1, 16), changed, visible, query, GRID, None, None)
    assert not torch.allclose(other[0, 0], out[0, 0], atol=1e-4)
    assert torch.equal(other[0, 1], out[0, 1])
