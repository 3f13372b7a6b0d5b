"""Whole recipes, from images to gradients, against published losses on features that the parts make one by one."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from lightly.loss import BarlowTwinsLoss, DINOLoss, MSNLoss, NegativeCosineSimilarity, NTXentLoss, VICRegLoss
from lightly.models.utils import select_most_similar
from open_clip.loss import CoCaLoss, SigLipLoss
from tiny import random_batch, tiny_objective
from torch import Tensor
from torchvision.transforms.functional import resize
from transformers import AutoModel, BertConfig, BertModel, CLIPModel, SiglipVisionConfig
from transformers.models.siglip.modeling_siglip import SiglipMultiheadAttentionPoolingHead

from m3i_scale.backbones.build import backbone_config
from m3i_scale.config import load_run
from m3i_scale.data.batch import Batch
from m3i_scale.objective.information import Objective
from m3i_scale.objective.inputs import EncodedInput, build_inputs, normalize
from m3i_scale.objective.positions import grid_position


def pixels(objective: Objective, batch: Batch, view: int) -> Tensor:
    return objective.pixel_norm(batch.images_VBCHW[view - 1])


def tokens(objective: Objective, batch: Batch, view: int, *, averaged: bool = False) -> Tensor:
    """By the stock model alone: class token and patch tokens of a whole view."""
    backbone = objective.momentum.backbone if averaged else objective.student
    hidden: Tensor = backbone.model(pixel_values=pixels(objective, batch, view)).last_hidden_state
    return hidden.detach() if averaged else hidden


def mean_token(hidden: Tensor, pool: torch.nn.Module) -> Tensor:
    return F.layer_norm(hidden[:, 1:].mean(dim=1), (64,), pool.norm.weight, pool.norm.bias, eps=1e-6)


def z(objective: Objective, batch: Batch, view: int, *, predict: bool, averaged: bool = False) -> Tensor:
    """Mean token → projector (→ predictor) of the head `global`."""
    pool = objective.momentum.pools["pool"] if averaged else objective.decoders["pool"]
    head = objective.momentum.heads["global"] if averaged else objective.image_heads["global"]
    output = head.projector(mean_token(tokens(objective, batch, view, averaged=averaged), pool))
    if predict and head.predictor is not None:
        output = head.predictor(output)
    return output.detach() if averaged else output


def simclr(objective: Objective, batch: Batch) -> Tensor:
    return NTXentLoss(temperature=0.1)(*(z(objective, batch, view, predict=False) for view in (1, 2)))


def moco(objective: Objective, batch: Batch) -> Tensor:
    state = objective.states["global"]
    peer = NTXentLoss(temperature=0.2, memory_bank_size=(int(state.filled), 24))
    peer.memory_bank.bank = state.queue_QE[: int(state.filled)].clone()
    return peer(z(objective, batch, 2, predict=True), z(objective, batch, 1, predict=False, averaged=True))


def byol(objective: Objective, batch: Batch) -> Tensor:
    peer, loss = NegativeCosineSimilarity(), torch.zeros(())
    for here, there in ((1, 2), (2, 1)):
        target = z(objective, batch, there, predict=False, averaged=objective.momentum is not None)
        loss = loss + (2 + 2 * peer(z(objective, batch, here, predict=True), target.detach())) / 2
    return loss


def barlow(objective: Objective, batch: Batch) -> Tensor:
    return 0.025 * BarlowTwinsLoss(5e-3)(*(z(objective, batch, view, predict=False) for view in (1, 2)))


def vicreg(objective: Objective, batch: Batch) -> Tensor:
    return VICRegLoss()(*(z(objective, batch, view, predict=False) for view in (1, 2)))


def global_distillation(objective: Objective, batch: Batch) -> Tensor:
    name = "prototypes"
    peer = DINOLoss(output_dim=12, teacher_temp=0.04, student_temp=0.1)
    peer.center = objective.states[name].center_K.clone()[None, None]

    def logits(view: int, averaged: bool) -> Tensor:
        head = objective.momentum.heads[name] if averaged else objective.image_heads[name]
        projected = head.projector(tokens(objective, batch, view, averaged=averaged)[:, 0])
        return F.normalize(projected, dim=-1) @ F.normalize(head.prototypes.weight, dim=-1).T

    return peer([logits(view, True).detach() for view in (1, 2)], [logits(view, False) for view in (1, 2)])


def seen_parts(objective: Objective, batch: Batch) -> list[EncodedInput]:
    return build_inputs(objective.recipe.inputs, objective.recipe.mix, batch.seeds_B, objective.student.grid)


def masked_tokens(objective: Objective, batch: Batch, view: int, part: int = 0) -> Tensor:
    """The student on the visible patches: stock embeddings, a selection of rows, stock layers."""
    where = seen_parts(objective, batch)[part]
    embedded = objective.student.model.embeddings(pixels(objective, batch, view))
    kept = torch.cat([torch.zeros(len(embedded), 1, dtype=torch.int64), where.visible_BL + 1], dim=1)
    hidden = embedded.gather(1, kept[..., None].expand(-1, -1, embedded.shape[-1]))
    for layer in objective.student.model.layers:
        hidden = layer(hidden)
    return objective.student.model.layernorm(hidden)


def sim_global(objective: Objective, batch: Batch) -> Tensor:
    head, averaged = objective.image_heads["prototypes"], objective.momentum.heads["prototypes"]
    anchors = head.projector(masked_tokens(objective, batch, 2)[:, 0])
    targets = averaged.projector(tokens(objective, batch, 1, averaged=True)[:, 0]).detach()
    return MSNLoss(temperature=0.1, sinkhorn_iterations=0)(anchors, targets, head.prototypes.weight, 0.25)


def densecl(objective: Objective, batch: Batch) -> Tensor:
    online, averaged = tokens(objective, batch, 2)[:, 1:], tokens(objective, batch, 1, averaged=True)[:, 1:]
    keys = objective.momentum.heads["dense"].projector(averaged).detach()
    matched = select_most_similar(online, averaged, keys)
    state = objective.states["dense"]
    peer = NTXentLoss(temperature=0.2, memory_bank_size=(int(state.filled), 24))
    peer.memory_bank.bank = state.queue_QE[: int(state.filled)].clone()
    query = objective.image_heads["dense"].projector(online)
    return (peer(query.flatten(0, 1), matched.flatten(0, 1)) + moco(objective, batch)) / 2


def siglip(objective: Objective, batch: Batch) -> Tensor:
    """open_clip's loss on the outputs of `transformers`, with captions padded to full length."""
    head, pool = objective.heads["text"], objective.decoders["pool"]
    config = SiglipVisionConfig(hidden_size=64, num_attention_heads=2, intermediate_size=128, hidden_act="gelu")
    stock = SiglipMultiheadAttentionPoolingHead(config)
    stock.probe, stock.layernorm, stock.mlp.fc1, stock.mlp.fc2 = pool.probe, pool.norm, pool.fc1, pool.fc2
    attention, parts = stock.attention, (pool.query, pool.key, pool.value)
    del attention.in_proj_weight, attention.in_proj_bias
    attention.in_proj_weight = torch.cat([part.weight for part in parts])
    attention.in_proj_bias = torch.cat([part.bias for part in parts])
    attention.out_proj = pool.output
    image = F.normalize(stock(tokens(objective, batch, 1)[:, 1:]), dim=-1)
    ids = F.pad(batch.text_ids_BT * batch.text_mask_BT, (0, 16 - batch.text_ids_BT.shape[1]))
    text = F.normalize(objective.text.model(input_ids=ids).pooler_output, dim=-1)
    return SigLipLoss()(image, text, head.log_scale.exp(), head.bias - 10.0)


def coca(objective: Objective, batch: Batch) -> Tensor:
    """open_clip's loss on what BERT as a decoder says, given embeddings and padding of its own making."""
    head, captioner = objective.heads["caption"], objective.decoders["caption"]
    shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 128}
    decoder = {"is_decoder": True, "add_cross_attention": True, "attn_implementation": "sdpa"}
    stock = BertModel(BertConfig(vocab_size=50, **shape, **decoder), add_pooling_layer=False).eval()
    stock.embeddings.LayerNorm, stock.encoder.layer = captioner.norm, captioner.layers
    with torch.no_grad():
        stock.embeddings.token_type_embeddings.weight.zero_()
        angle = torch.arange(8.0)[:, None] * 10000.0 ** (-torch.arange(16) / 16)
        stock.embeddings.position_embeddings.weight[:8] = torch.cat([angle.sin(), angle.cos()], dim=1)
    patches = tokens(objective, batch, 1)[:, 1:]
    hidden = stock(
        inputs_embeds=F.embedding(batch.text_ids_BT, head.weight_VD) * 32**0.5,
        attention_mask=batch.text_mask_BT.long(),
        encoder_hidden_states=captioner.embed(patches),
        use_cache=False,
    ).last_hidden_state
    logits, labels = F.linear(hidden[:, :-1], head.weight_VD), batch.text_ids_BT[:, 1:]
    text = objective.heads["text"]
    image = F.normalize(objective.decoders["pool"](patches) @ text.projection.weight.T, dim=-1)
    caption = objective.text(batch.text_ids_BT, batch.text_mask_BT)
    losses = CoCaLoss(2.0, 1.0)(image, caption, logits, labels, text.log_scale.exp())
    return sum(losses)


def dense_distillation(objective: Objective, batch: Batch) -> Tensor:
    """Feature distillation: the teacher's LayerNorm-ed tokens by a linear map, mean squared error."""
    teacher = AutoModel.from_pretrained(objective.recipe.teachers["teacher"].from_pretrained).eval()
    seen = normalize(batch.images_VBCHW[0], (0.4, 0.5, 0.6), (0.2, 0.3, 0.25))
    with torch.no_grad():
        wanted = F.layer_norm(teacher(pixel_values=seen).last_hidden_state[:, 1:], (48,))
    return F.mse_loss(objective.heads["features"].projection(tokens(objective, batch, 1)[:, 1:]), wanted)


def multi_teacher(objective: Objective, batch: Batch) -> Tensor:
    """RADIO: a mean squared error of standardized patches, and a cosine of summaries; all teachers count alike."""
    student, losses = tokens(objective, batch, 1), []
    for name, kind, side, before in (
        ("clip", CLIPModel, 16, 1),
        ("dinov2", AutoModel, 32, 1),
        ("siglip", AutoModel, 64, 0),
    ):
        stock = kind.from_pretrained(objective.recipe.teachers[name].from_pretrained).eval()
        seen = resize(batch.images_VBCHW[0].float(), [side, side], antialias=True)
        with torch.no_grad():
            encode = stock.get_image_features if name == "clip" else stock
            output = encode(pixel_values=normalize(seen, (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)))
        patches, summary = output.last_hidden_state[:, before:], output.pooler_output
        wanted = F.layer_norm(patches, patches.shape[-1:])
        losses.append(F.mse_loss(objective.heads[f"{name}_map"].projection(student[:, 1:]), wanted))
        predicted = objective.image_heads[name].projector(student[:, 0])
        losses.append(2 - 2 * F.cosine_similarity(predicted, summary).mean())
    return torch.stack(losses).sum()


def autoencoder(objective: Objective, batch: Batch) -> Tensor:
    unfolded = F.unfold(pixels(objective, batch, 1), 8, stride=8).transpose(1, 2)  # channel first
    patches = unfolded.unflatten(-1, (3, 64)).transpose(2, 3).flatten(2)
    wanted = (patches - patches.mean(dim=-1, keepdim=True)) / (patches.var(dim=-1, keepdim=True) + 1e-6).sqrt()
    return F.mse_loss(objective.heads["pixels"].projection(tokens(objective, batch, 1)[:, 1:]), wanted)


def unigrad(objective: Objective, batch: Batch) -> Tensor:
    """‖u₁ − u₂‖² + λ u₁ᵀ F u₁ with the F of the batches before, of either view, halved."""
    correlation, loss = objective.states["global"].correlation_EE.clone(), torch.zeros(())
    for here, there in ((1, 2), (2, 1)):
        u1 = F.normalize(z(objective, batch, here, predict=True), dim=-1)
        u2 = F.normalize(z(objective, batch, there, predict=False, averaged=True), dim=-1)
        loss = loss + ((u1 - u2).square().sum(dim=-1) + 100.0 * torch.einsum("bi,ij,bj->b", u1, correlation, u1)).mean()
    return loss / 2


def capi(objective: Objective, batch: Batch) -> Tensor:
    """CAPI's algorithm, one position of the grid after the other, and a predictor that only attends to what is seen."""
    head, decoder = objective.heads["clusters"], objective.decoders["dense"]
    averaged = F.normalize(tokens(objective, batch, 1, averaged=True)[:, 1:], dim=-1)
    logits = averaged @ head.clusters.weight.T + head.clusters.bias
    assigned = torch.zeros_like(logits)
    for position in range(logits.shape[1]):
        shares = (logits[:, position].detach().double() / 0.06).exp()
        for _ in range(3):
            shares = shares / shares.sum(dim=0, keepdim=True)
            shares = shares / shares.sum(dim=1, keepdim=True)
        assigned[:, position] = shares
    clustering = F.cross_entropy(logits.flatten(0, 1) / 0.12, assigned.flatten(0, 1))

    (where,) = seen_parts(objective, batch)
    place = grid_position(objective.student.grid, decoder.width, torch.device("cpu"))
    seen = decoder.embed(masked_tokens(objective, batch, 1))
    seen = torch.cat([seen[:, :1], seen[:, 1:] + place[where.visible_BL]], dim=1)
    asked = decoder.mask_token + place[where.hidden_BM]
    for layer in decoder.layers:
        own = layer.attention
        query, key, value = own.q_proj(layer.layernorm_before(asked)), own.k_proj(seen), own.v_proj(seen)
        query, key, value = (x.unflatten(-1, (own.num_attention_heads, -1)) for x in (query, key, value))
        attention = (torch.einsum("bqhd,blhd->bhql", query, key) / query.shape[-1] ** 0.5).softmax(dim=-1)
        asked = asked + own.o_proj(torch.einsum("bhql,blhd->bqhd", attention, value).flatten(2))
        asked = asked + layer.mlp(layer.layernorm_after(asked))
    predicted = F.normalize(decoder.norm(asked), dim=-1) @ F.normalize(head.prototypes.weight, dim=-1).T
    wanted = assigned.gather(1, where.hidden_BM[..., None].expand(-1, -1, assigned.shape[-1]))
    return F.cross_entropy(predicted.flatten(0, 1) / 0.12, wanted.flatten(0, 1)) + clustering


def rows(tokens_BND: Tensor, index_BQ: Tensor) -> Tensor:
    return torch.stack([tokens_BND[sample, index_BQ[sample]] for sample in range(len(index_BQ))])


def ijepa(objective: Objective, batch: Batch) -> Tensor:
    """Block by block, as the paper has it: [context | mask tokens with positions] → predictor → smooth L1."""
    (where,), decoder = seen_parts(objective, batch), objective.decoders["predictor"]
    table = grid_position((4, 4), 32, torch.device("cpu"))
    context = decoder.embed(masked_tokens(objective, batch, 1))
    context = context + F.pad(table[where.visible_BL], (0, 0, 1, 0))
    wanted = F.layer_norm(tokens(objective, batch, 1, averaged=True)[:, 1:], (64,))
    losses = []
    for block in where.blocks_BKT.unbind(1):
        sequence = torch.cat([context, decoder.mask_token + table[block]], dim=1)
        for layer in decoder.layers:
            sequence = layer(sequence)
        predicted = objective.heads["features"].projection(decoder.norm(sequence)[:, -block.shape[1] :])
        error = (predicted - rows(wanted, block)).abs()
        losses.append(torch.where(error < 1, error.square() / 2, error - 0.5).mean())
    assert len(losses) == 4
    return torch.stack(losses).mean()


def data2vec2(objective: Objective, batch: Batch) -> Tensor:
    """Mask by mask: the grid with mask tokens → convolutions → the mean of two layers, each by image and channel with
    mean 0 and variance 1, then LayerNorm."""
    averaged, decoder = objective.momentum.backbone.model, objective.decoders["dense"]
    with torch.no_grad():
        hidden, layers = averaged.embeddings(pixels(objective, batch, 1)), []
        for layer in averaged.layers:
            hidden = layer(hidden)
            patches = hidden[:, 1:] - hidden[:, 1:].mean(dim=1, keepdim=True)
            layers.append(patches / (patches.square().mean(dim=1, keepdim=True) + 1e-5).sqrt())
        wanted = F.layer_norm(sum(layers[-2:]) / 2, (64,))
    losses = []
    for part, where in enumerate(seen_parts(objective, batch)):
        seen = masked_tokens(objective, batch, 1, part)[:, 1:]
        grid = decoder.mask_token.expand(len(seen), 16, -1).clone()
        for sample, visible in enumerate(where.visible_BL):
            grid[sample, visible] = seen[sample]
        x = grid.transpose(1, 2).reshape(-1, 64, 4, 4)
        for layer in decoder.layers:
            x = x + F.gelu(F.layer_norm(layer(x).permute(0, 2, 3, 1), (64,)).permute(0, 3, 1, 2))
        predicted = objective.heads["features"].projection(x.flatten(2).transpose(1, 2))
        error = (rows(predicted, where.hidden_BM) - rows(wanted, where.hidden_BM)).square()
        losses.append((error.sum(dim=-1) / 64**0.5).mean())  # data2vec_v2.py: scale = 1 / sqrt(D)
    assert len(losses) == 8
    return torch.stack(losses).mean()


PUBLISHED: dict[str, Callable[[Objective, Batch], Tensor]] = {
    "simclr": simclr,
    "moco": moco,
    "byol": byol,
    "simsiam": byol,
    "unigrad": unigrad,
    "barlow": barlow,
    "vicreg": vicreg,
    "global_distillation": global_distillation,
    "sim_global": sim_global,
    "densecl": densecl,
    "siglip": siglip,
    "coca": coca,
    "dense_distillation": dense_distillation,
    "multi_teacher": multi_teacher,
    "autoencoder": autoencoder,
    "capi": capi,
    "ijepa": ijepa,
    "data2vec2": data2vec2,
}


AT_TINY_WIDTH = {"data2vec2": ["recipe.targets.0.weight=8"]}
"""Numbers of a recipe that follow the width of its backbone, which is 64 here."""


def test_the_weight_of_data2vec2_is_the_root_of_its_width() -> None:
    run = load_run("data2vec2")
    width = backbone_config(run.backbone).hidden_size
    assert run.recipe["targets"][0]["weight"] == pytest.approx(width**0.5, rel=1e-3)


@pytest.mark.parametrize("recipe", PUBLISHED)
def test_a_recipe_is_the_published_loss_with_its_gradients(recipe: str) -> None:
    objective = tiny_objective(recipe, *AT_TINY_WIDTH.get(recipe, ()))
    if objective.momentum is not None:
        with torch.no_grad():  # an average that equals the model would hide which of the two is used
            for parameter in objective.momentum.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
    objective(random_batch(8, seed=1))  # fills queues and centers
    objective.eval()
    batch = random_batch(8, repeated_caption=False)
    batch.has_text_B[:] = True
    batch.captions_B = torch.arange(1, 9)
    loss, _ = objective(batch)
    loss.backward()
    ours = {name: p.grad.clone() for name, p in objective.named_parameters() if p.grad is not None}
    objective.zero_grad()
    wanted = PUBLISHED[recipe](objective, batch)
    wanted.backward()
    torch.testing.assert_close(loss, wanted, rtol=1e-5, atol=1e-5)
    largest = max(float(p.grad.abs().max()) for p in objective.parameters() if p.grad is not None)
    for name, parameter in objective.named_parameters():
        if parameter.grad is None:
            # Where the published step does not reach, ours must not either.
            assert name not in ours or not ours[name].any(), name
            continue
        torch.testing.assert_close(ours[name], parameter.grad, rtol=1e-4, atol=1e-5 * largest, msg=name)


def test_heads_remember_all_views_and_only_in_training() -> None:
    objective, batch = tiny_objective("global_distillation"), random_batch(6)
    state, head = objective.states["prototypes"], objective.momentum.heads["prototypes"]
    with torch.no_grad():
        objective(batch)
        assert not state.center_K.any()
        objective.eval()
    objective(batch)
    assert not state.center_K.any()
    objective.train()
    objective(batch)
    cosines = [head.prototypes(head.projector(tokens(objective, batch, view, averaged=True)[:, 0])) for view in (1, 2)]
    torch.testing.assert_close(state.center_K, 0.1 * torch.cat(cosines).mean(dim=0))


def test_the_nats_of_distributions_over_prototypes_and_of_both_sides() -> None:
    objective, batch = tiny_objective("global_distillation").eval(), random_batch(6)
    head = objective.momentum.heads["prototypes"]
    target = head.prototypes(head.projector(tokens(objective, batch, 1, averaged=True)[:, 0])) / 0.04
    mean = target.softmax(dim=-1).mean(dim=0)
    figures = objective(batch)[1]
    entropy = -(mean * mean.log()).sum().detach()
    torch.testing.assert_close(figures["view1/nats"], entropy - figures["view1/loss"], rtol=1e-4, atol=1e-5)
    figures = tiny_objective("simclr")(batch)[1]
    torch.testing.assert_close(figures["view1/nats"], torch.tensor(11.0).log() - figures["view1/loss"])
