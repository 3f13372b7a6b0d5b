"""What one rank does in the distributed tests: all cases in one process group, results written to files.

Run by `conftest.py` with one and with two ranks: `python cases.py OUT`.
"""

from __future__ import annotations

import gc
import json
import shutil
import sys
import traceback
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import tiny
import torch
import torch.distributed as dist
from compile_cases import COMPILED, CompileCases
from deepspeed.utils import safe_get_full_grad
from guard_cases import NONFINITE, GuardCases
from lasting_cases import ENGINES, REMEMBERED, LastingCases
from objects_found import shown
from open_clip.loss import ClipLoss, SigLipLoss
from precision_cases import PrecisionCases
from rank_parts import GLOBAL_BATCH
from safetensors.torch import save_file
from step_cases import TRUSTED, WHOLE_STEPS, StepCases
from tiny import LABEL_SETS, VOCABULARY, first_weights
from torch import Tensor, nn
from traffic_cases import BY_ALL_REDUCE, COMPARED, COUNTED, TrafficCases
from transformers import ViTModel
from weights import timm_model

from m3i_scale.backbones.build import backbone_config
from m3i_scale.checkpoint.saver import Saver
from m3i_scale.checkpoint.stream import buffers_of
from m3i_scale.engine.agree import agree, agree_and_average, max_over_ranks, mean_over_ranks
from m3i_scale.engine.engine import stream_into
from m3i_scale.engine.parameter_groups import parameter_groups
from m3i_scale.engine.partition import (
    construct,
    full_shape,
    initialize_sharded,
    is_partitioned,
)
from m3i_scale.engine.process_group import stop_ranks
from m3i_scale.errors import ConfigError, UserError
from m3i_scale.objective.build import build_objective, ema_pairs, initialize_module
from m3i_scale.objective.targets.text import BernoulliPairs, BoltzmannPairs, gather_targets
from m3i_scale.plan.memory import fresh_engine, memory_of, snapshot_sizes
from m3i_scale.plan.planning import Model
from m3i_scale.plan.planning import Vocabulary as LearntFrom
from m3i_scale.plan.settings import settings_of
from m3i_scale.run.setup import start_engine
from m3i_scale.tasks.detection.detector import DetectionScores

PLANNED = ("zero1_bf16", "zero1_cpu_fp32", "zero2_bf16", "zero3_cpu", "zero3_cpu_fp32")

RECIPES = {name: (name,) for name in tiny.RECIPES} | {
    "barlow_narrow": ("barlow", "recipe.heads.global.width=6"),  # fewer channels than samples
    "vicreg_narrow": ("vicreg", "recipe.heads.global.width=6"),
    "m3i_mixed": ("m3i", "backbone.attention=across_images"),
    "m3i_clip": ("m3i", "backbone.preset=clip-b/16"),
    "m3i_clip_mixed": ("m3i", "backbone.preset=clip-b/16", "backbone.attention=across_images"),
    "m3i_maps": ("m3i", *tiny.MAPS, "backbone.attention=across_images"),
    "mae_maps": ("mae", *tiny.MAPS),
    "m3i_dinov3": ("m3i", *tiny.DINOV3, "backbone.attention=across_images"),
    "m3i_siglip": ("m3i", *tiny.SIGLIP, "backbone.attention=across_images"),
    "dinov2_registers": ("dinov2", *tiny.REGISTERS),
    "m3i_forward": ("m3i", "recipe.targets.2.distribution.direction=forward"),
    "multi_crop": ("global_distillation", *tiny.MULTI_CROP),
    "multi_crop_clip": ("global_distillation", *tiny.MULTI_CROP, "backbone.preset=clip-b/16"),
    "m3i_sim": ("m3i", *tiny.SIM_PARTS),
    "m3i_learned": ("m3i", "recipe.balance={kind: learned}"),
    "m3i_followed": ("m3i", "recipe.balance={kind: gradient_norm, momentum: 0.5}"),
}
PARTITIONED = (
    "m3i",
    "m3i_maps",
    "m3i_clip",
    "m3i_mixed",
    "m3i_dinov3",
    "m3i_siglip",
    "m3i_sim",
    "dinov2_registers",
    "m3i_learned",
    "m3i_followed",
    "byol",
    "densecl",
    "unigrad",
    "barlow",
    "capi",
    "vicreg",
    "simsiam",
    "sim_global",
    "siglip",
    "coca",
    "continue_images",
    "siglip2",
    "global_distillation",
    "multi_crop",
    "multi_crop_clip",
    "dense_distillation",
    "dinov2",
    "ibot",
    "multi_teacher",
    "mae",
    "sim",
    "ijepa",
    "data2vec2",
)
"""Kinds of module, head and memory: the engine cannot know which recipe they make."""
RECOMPUTED = {
    "m3i": (("m3i",), ("full", "every_2", "selective", "offload")),
    "eager": (("m3i", "backbone.attention_kernel=eager"), ("none", "selective")),
    "maps": (RECIPES["m3i_maps"], ("full", "selective", "offload")),
    "dinov2": (("sim", *tiny.DINOV2), ("none", "full", "selective")),
    "dinov3": (("sim", *tiny.DINOV3), ("none", "selective")),
}
"""Arguments, and policies of activations."""


class Cases(LastingCases, PrecisionCases, TrafficCases, CompileCases, GuardCases, StepCases):
    """One method per case; each returns what the tests compare."""

    def run_all(self) -> None:
        cases: dict[str, Callable[[], Any]] = {
            "collectives": self.collectives,
            "shown_images": self.shown_images,
            "first_samples": self.first_samples,
            "construction": self.construction,
            "first_weights_plain": self.plain_first_weights,
            "first_weights_zero1": lambda: self.first_weights("zero1_bf16"),
            "first_weights_zero3": lambda: self.first_weights("zero3_cpu_fp32"),
            "first_weights_zero3_bf16": lambda: self.first_weights("zero3_cpu"),
            "from_pretrained": self.from_pretrained,
            "started": self.started,
            "torn": self.torn,
            "torn_otherwise": self.torn_otherwise,
        }
        for name, arguments in RECIPES.items():
            cases[f"plain_{name}"] = lambda arguments=arguments: self.plain_gradients(*arguments)
        for name in PARTITIONED:
            cases[f"zero3_{name}"] = lambda name=name: self.engine_gradients(*RECIPES[name])
        for name, (arguments, policies) in RECOMPUTED.items():
            for policy in policies:
                given = (*arguments, f"backbone.activation_checkpointing={policy}")
                cases[f"recomputed_{name}_{policy}"] = lambda given=given: self.engine_gradients(*given)
        cases["captions_of_one_rank"] = lambda: self.plain_gradients("coca", change=self.captions_of_the_first_half)
        cases["called_twice"] = self.called_twice
        for name in ("clip", "siglip"):
            cases[f"published_{name}"] = lambda name=name: self.published(name)
        for name, arguments in REMEMBERED.items():
            cases[f"remembered_{name}"] = lambda arguments=arguments: self.remembered(*arguments)
            cases[f"accumulated_{name}"] = lambda arguments=arguments: self.accumulated(*arguments)
        for name, stage in ENGINES.items():
            cases[f"momentum_{name}"] = lambda name=name, stage=stage: self.momentum(name, stage)
        for name in ("zero3_fp16", "zero2_bf16"):
            cases[f"fp16_{name}"] = lambda name=name: self.fp16(name)
        for name in NONFINITE:
            cases[f"nonfinite_{name}"] = lambda name=name: self.nonfinite(name)
        for name in ("zero3_cpu", "zero3_cpu_lean"):
            cases[f"added_up_{name}"] = lambda name=name: self.added_up(name)
        for name in PLANNED:
            cases[f"held_{name}"] = lambda name=name: self.held(name)
        for name in COUNTED if self.world > 1 else ():
            cases[f"traffic_{name}"] = lambda name=name: self.traffic(name)
        for engine, name in WHOLE_STEPS:
            cases[f"whole_step_{engine}_{name}"] = lambda engine=engine, name=name: self.whole_step(engine, name)
        for name in TRUSTED:
            cases[f"trust_ratio_{name}"] = lambda name=name: self.trust_ratio(name)
        for name in COMPARED:
            cases[f"compared_{name}"] = lambda name=name: self.compared(name)
        for name, arguments in COMPILED.items():
            cases[f"compiled_{name}"] = lambda arguments=arguments: self.compiled(*arguments)
        for name, case in cases.items():
            try:
                result = case()
            except BaseException:
                (self.out / f"failed-rank{self.rank}.txt").write_text(f"case {name}\n{traceback.format_exc()}")
                raise
            torch.save(result, self.out / f"{name}-rank{self.rank}.pt")
            gc.collect()

    # ------------------------------------------------------------ parts

    # ------------------------------------------------------------ cases

    def collectives(self) -> dict[str, Any]:
        own = torch.arange(6.0).view(3, 2) + 10 * self.rank
        own.requires_grad_()
        gathered = self.ranks.gather(own)
        weights = torch.arange(float(gathered.numel())).view_as(gathered) * (self.rank + 1)
        (gathered * weights).sum().backward()
        return {
            "gathered": gathered.detach(),
            "gradient": own.grad,
            "flags": self.ranks.gather(torch.tensor([self.rank == 0, True])),
            "integers": self.ranks.gather(torch.tensor([2**62 + self.rank])),
            "sum": self.ranks.sum(torch.tensor([1.0 + self.rank], requires_grad=True)),
            "largest": self.ranks.max(torch.tensor([1.0 - self.rank, self.rank], requires_grad=True)),
            "sum_gradient": self.sum_gradient(),
            "agree": agree(self.rank == self.world - 1, False, self.rank == 0),
            "agree_and_average": agree_and_average(
                torch.tensor(self.rank == self.world - 1),
                False,
                torch.tensor(False),
                value=torch.tensor(2.0 * self.rank),
            ),
            "votes": [self.vote(*case) for case in ((False, False), (False, True), (True, True))],
            "mean": mean_over_ranks({"b": 1.0 + self.rank, "a": float(10**9 + self.rank)}),
            "max": max_over_ranks({"b": 1.0 - self.rank, "a": float(self.rank)}),
            "nothing": (mean_over_ranks({}), max_over_ranks({})),
        }

    def shown_images(self) -> dict[str, Any]:
        """Of twelve images that ranks share, of which every rank shows the first too, and again in its next batch:
        found as they are; with the first one missed; and where there is nothing to find."""
        numbers = list(range(12))[self.rank :: self.world]
        told = {}
        for name, missed in (("exact", -1), ("missed", 0)):
            images = DetectionScores(["disc", "other disc"], masks=True)
            for part in ([0, *numbers[:2]], [*numbers[2:], 0]):
                batch, found = shown(part, missed=missed)
                images.add(batch, {"detections": found})
            told[name] = images.compute(self.ranks)
        batch, found = shown(numbers)
        images = DetectionScores(["disc", "other disc"], masks=False)
        images.add(replace(batch, box_labels_BN=torch.full_like(batch.box_labels_BN, -1)), {"detections": found})
        return told | {"nothing": images.compute(self.ranks)}

    def sum_gradient(self) -> tuple[Tensor, Tensor]:
        """A sum over ranks, and what every rank's share gets of a loss that weighs it by 1, 2, …"""
        own = torch.tensor([1.0 + self.rank], requires_grad=True)
        total = self.ranks.sum_with_gradient(own)
        (total * (self.rank + 1)).sum().backward()
        assert own.grad is not None
        return total.detach(), own.grad

    def construction(self) -> dict[str, Any]:
        """The most parameters that this rank held at a time, while the model was built and while it was filled."""
        plan = self.plan("zero3_cpu_fp32", "m3i", "recipe.decoders.pool={kind: attention_pool, width: 64}")
        alive: dict[int, Any] = {}
        peak = {"building": 0, "filling": 0}

        def held() -> int:
            return sum(parameter.numel() for reference in alive.values() if (parameter := reference()) is not None)

        def note(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
            if parameter is not None:
                alive[id(parameter)] = weakref.ref(parameter)
                peak["building"] = max(peak["building"], held())

        hook = nn.modules.module.register_module_parameter_registration_hook(note)
        try:
            module = construct(
                lambda: build_objective(plan.run, LABEL_SETS, VOCABULARY, self.ranks), plan.deepspeed.config
            )
        finally:
            hook.remove()

        def initialize(owner: nn.Module, child: nn.Module) -> None:
            peak["filling"] = max(peak["filling"], sum(parameter.numel() for parameter in module.parameters()))
            initialize_module(owner, child)

        initialize_sharded(module, initialize, seed=0, skip=("momentum.",))
        parameters = list(module.parameters())
        largest = max(
            sum(full_shape(parameter).numel() for parameter in child.parameters(recurse=False))
            for child in module.modules()
        )
        return {
            "peak": peak,
            "largest_module": largest,
            "full": sum(full_shape(parameter).numel() for parameter in parameters),
            "held_after": sum(parameter.numel() for parameter in parameters),
            "all_partitioned": all(is_partitioned(parameter) for parameter in parameters),
            "shards_fit": all(
                parameter.ds_tensor.numel() == -(-full_shape(parameter).numel() // self.world)
                for parameter in parameters
            ),
            "decayed": [len(group["params"]) for group in parameter_groups(module, 0.1, shape_of=full_shape)],
        }

    def plain_first_weights(self) -> dict[str, Tensor]:
        plan = self.plan("zero3_cpu_fp32", "m3i")
        objective = build_objective(plan.run, LABEL_SETS, VOCABULARY, self.ranks)
        initialize_sharded(objective, initialize_module, seed=plan.run.seed, skip=("momentum.",))
        return {name: p.detach() for name, p in objective.named_parameters() if not name.startswith("momentum.")}

    def first_weights(self, ds_config: str) -> dict[str, Tensor]:
        """The fp32 masters of an engine, and the averages of its EMA teacher."""
        engine, momentum = start_engine(self.plan(ds_config, "m3i"), self.ranks)
        assert momentum is not None
        named = dict(engine.module.named_parameters())
        values = {name: self._master(p) for name, p in named.items() if p.requires_grad}
        for online, target in ema_pairs(engine.module):
            values[target] = self._average(momentum, target, values[online])
        engine.destroy()
        return values

    def held(self, ds_config: str) -> dict[str, Any]:
        """Bytes that a fresh engine holds, and what the plan of the same run says; none of it is gathered yet."""
        plan = self.plan(ds_config, "m3i")
        engine, momentum = start_engine(plan, self.ranks)
        assert momentum is not None
        optimizer = engine.optimizer
        averages = [part for flat in momentum._flats for part in (flat.copy, flat.remainder)]
        storages = {part.untyped_storage().data_ptr(): part.untyped_storage().nbytes() for part in averages}
        held = {"EMA teacher": sum(storages.values())}
        if ds_config.startswith("zero3"):
            masters = {m.data_ptr(): m.nbytes for m in optimizer.fp32_partitioned_groups_flat}
            shards = {flat.data_ptr() for flat in optimizer.fp16_partitioned_groups_flat}
            held["parameters"] = optimizer.lp_param_buffer.nbytes
            held["optimizer"] = sum(size for place, size in masters.items() if place not in shards)
            held["gradients"] = optimizer.grad_partitions_flat_buffer.nbytes
            held["reduce buckets"] = sum(bucket.buffer.nbytes for bucket in optimizer.ipg_buckets.values())
        elif ds_config == "zero1_bf16":
            held["parameters"] = sum(flat.nbytes for flat in optimizer.bf16_groups_flat)
            held["optimizer"] = sum(part.nbytes for part in optimizer.fp32_groups_flat_partition)
            held["gradients"] = sum(flat.nbytes for flat in optimizer.fp32_groups_gradients_flat)
        else:
            held["parameters"] = sum(flat.nbytes for flat in optimizer.bit16_groups_flat)
            held["optimizer"] = sum(part.nbytes for part in optimizer.single_partition_of_fp32_groups)
        copied = self._copied_by_a_save(engine, momentum)
        engine.destroy()
        settings = settings_of(plan.deepspeed.config, world=self.world, on_host=True)
        model = Model(plan.run, LearntFrom(LABEL_SETS, VOCABULARY, ()), self.world, settings.precision)
        settings = replace(settings, snapshot=model.remembered_bytes)
        fresh = dict(+fresh_engine(model.parameters, settings)[0])
        planned = memory_of(model.parameters, model.trace("none", GLOBAL_BATCH // self.world), settings)
        # The plan is that of the first rank, which holds most.
        copies = sorted(snapshot_sizes(model.parameters, settings, self.rank))
        sizes = {"copies": copies, "first rank": planned.moments["forward"]["snapshot"]}
        return {"held": held, "planned": fresh, "copied": copied, "snapshot": sizes}

    def _copied_by_a_save(self, engine: Any, momentum: Any) -> dict[str, Any]:
        """What a save in the background has copied, once the optimizer has its moments; bytes."""
        self._train_step(engine, 0)
        saver = Saver(engine, momentum, background=True)
        folder = self.out / "copied" / str(self.world) / "checkpoints"
        saver.save(folder / "step-00000001", data_state={}, meta={"step": 1, "world_size": self.world}, run_yaml="")
        saver.close()
        dist.barrier()
        if self.rank == 0:
            shutil.rmtree(folder)
        dist.barrier()
        kept = sorted(copy.nbytes for copy in saver._copies.places)
        buffers = sum(buffer.nbytes for buffer in buffers_of(engine.module).values())
        return {"copies": kept, "buffers": buffers}

    def from_pretrained(self) -> dict[str, Any]:
        folder = self.out / "pretrained"
        plan = self.plan("zero3_cpu_fp32", "sim")
        if self.rank == 0:
            torch.manual_seed(5)
            model = ViTModel(backbone_config(plan.run.backbone), add_pooling_layer=False)
            model.save_pretrained(folder, max_shard_size="80KB")
        dist.barrier()
        backbone = plan.run.backbone.model_copy(update={"from_pretrained": str(folder), "config": {}})
        plan = replace(plan, run=plan.run.model_copy(update={"backbone": backbone}))
        engine, _ = start_engine(plan, self.ranks)
        values = self.full_values(engine.module)
        wanted = dict(ViTModel.from_pretrained(folder, add_pooling_layer=False).named_parameters())
        different = [
            name
            for name, value in wanted.items()
            for prefix in ("student.model.", "momentum.backbone.model.")
            if not torch.equal(values.get(prefix + name, value), value)  # frozen parts are those of the student
        ]
        ours = {name for name in values if name.startswith("student.model.")}
        shards = len(list(folder.glob("*.safetensors")))
        return {"different": different, "count": (len(ours), len(wanted)), "shards": shards}

    def started(self) -> dict[str, Any]:
        """The student and its EMA teacher after a start from another code base's file, at another image size."""
        path = self.out / "timm.safetensors"
        plan = self.plan("zero3_cpu_fp32", "sim")
        if self.rank == 0:
            save_file(timm_model(img_size=16).state_dict(), path)
        dist.barrier()
        fields = {"num_attention_heads": 4, "image_size": 32}
        backbone = plan.run.backbone.model_copy(update={"from_pretrained": str(path), "config": fields})
        plan = replace(plan, run=plan.run.model_copy(update={"backbone": backbone}))
        told: list[dict[str, Any]] = []
        engine, _ = start_engine(plan, self.ranks, told.append)
        values = {
            name: value
            for name, value in self.full_values(engine.module).items()
            if "backbone" in name or "student" in name
        }
        engine.destroy()
        return {"values": values, "told": told}

    def torn(self) -> dict[str, Any]:
        """Reading fails half-way on rank 0: every rank is told, and none waits for another."""
        plan = self.plan("zero3_cpu_fp32", "supervised")
        module = construct(lambda: build_objective(plan.run, LABEL_SETS, VOCABULARY, self.ranks), plan.deepspeed.config)
        names = [name.removeprefix("student.") for name, _ in module.named_parameters() if name.startswith("student.")]
        held: list[int] = []

        class Torn:
            def __init__(self) -> None:
                self.names = names

            def tensors(self) -> Iterator[Tensor]:
                for name in names[:5]:
                    held.append(sum(parameter.numel() for parameter in module.parameters()))
                    yield torch.full(full_shape(module.get_parameter(f"student.{name}")), 0.5)
                raise ConfigError("the disk is gone")

        try:
            stream_into(module, "student.", Torn)
            message = ""
        except UserError as error:
            message = str(error)
        written = self.full_values(module)
        return {
            "message": message,
            "held": held,
            "half": [bool((written[f"student.{name}"] == 0.5).all()) for name in names],
        }

    def torn_otherwise(self) -> dict[str, Any]:
        """Errors on rank 0 that are nobody's mistake: kind and message, on this rank."""
        plan = self.plan("zero3_cpu_fp32", "supervised")
        module = construct(lambda: build_objective(plan.run, LABEL_SETS, VOCABULARY, self.ranks), plan.deepspeed.config)
        names = [name for name, _ in module.named_parameters()][:3]

        def values(case: str) -> Iterator[Tensor]:
            yield torch.zeros(full_shape(module.get_parameter(names[0])))
            if case == "reading":
                raise OSError("the disk is gone")
            if case == "writing":
                yield torch.zeros(7, 7, 7)

        def open_stream(case: str) -> Any:
            if case == "opening":
                raise ValueError("no header")
            return SimpleNamespace(names=names, tensors=lambda: values(case))

        told = {}
        for case in ("opening", "reading", "writing", "short"):
            try:
                stream_into(module, "", lambda case=case: open_stream(case))
            except Exception as error:
                told[case] = (type(error).__name__, str(error))
        return told

    def captions_of_the_first_half(self, batch: Any) -> Any:
        keeps = torch.arange(len(batch)) + self.rank * len(batch) < GLOBAL_BATCH / 2
        mask = batch.text_mask_BT & (keeps[:, None] | (torch.arange(batch.text_mask_BT.shape[1]) == 0))
        return replace(batch, has_text_B=batch.has_text_B & keeps, text_mask_BT=mask)

    def plain_gradients(
        self, recipe: str, *overrides: str, change: Callable[[Any], Any] = lambda batch: batch
    ) -> dict[str, Any]:
        plan = self.plan("zero3_cpu_fp32", recipe, *overrides)
        objective = build_objective(plan.run, LABEL_SETS, plan.vocab_size, self.ranks)
        first_weights(objective, plan.run.seed, plan.run.backbone.weight_init)
        objective(self.batch(1))[0].backward()  # queues, centers and balanced weights are not empty any more
        objective.after_backward()
        objective.zero_grad()
        loss, figures = objective(change(self.batch()))
        loss.backward()
        gradients = {name: p.grad for name, p in objective.named_parameters() if p.requires_grad}
        for gradient in gradients.values():
            dist.all_reduce(gradient)
            gradient.div_(self.world)
        return self._told(loss, figures, gradients)

    def engine_gradients(self, recipe: str, *overrides: str) -> dict[str, Any]:
        engine, _ = start_engine(self.plan("zero3_cpu_fp32", recipe, *overrides), self.ranks)
        return self._gradients_of(engine)

    def called_twice(self) -> dict[str, Any]:
        """Gradients of an engine whose decoder has layers that two targets call, all in one bucket; by both ways of
        fetching; and of plain modules."""
        arguments = ("m3i", "recipe.decoders.dense.depth=3")
        told = {"plain": self.plain_gradients(*arguments)}
        for name, settings in (("engine", {}), ("by_all_reduce", BY_ALL_REDUCE)):
            plan = self.plan("zero3_cpu_fp32", *arguments)
            plan.deepspeed.config["zero_optimization"] |= {"reduce_bucket_size": 4_000_000, **settings}
            engine, _ = start_engine(plan, self.ranks)
            told[name] = self._gradients_of(engine)
        return told

    def _gradients_of(self, engine: Any) -> dict[str, Any]:
        for group in engine.optimizer.param_groups:
            group["lr"] = 0.0
        self._train_step(engine, 1)
        loss, figures = engine(self.batch())
        engine.backward(loss)
        gradients = {
            name: safe_get_full_grad(p).clone() for name, p in engine.module.named_parameters() if p.requires_grad
        }
        engine.destroy()
        return self._told(loss, figures, gradients)

    def _told(self, loss: Tensor, figures: dict[str, Tensor], gradients: dict[str, Tensor]) -> dict[str, Any]:
        values = {"loss": float(loss.detach())} | {name: float(value) for name, value in figures.items()}
        return {"figures": mean_over_ranks(values), "gradients": gradients if self.rank == 0 else {}}

    def published(self, loss: str) -> dict[str, Any]:
        """CLIP and SigLIP over the global batch, beside open_clip's own losses on the same features."""
        generator = torch.Generator().manual_seed(3)
        size = GLOBAL_BATCH // self.world
        rows = slice(self.rank * size, (self.rank + 1) * size)
        features = [torch.randn(GLOBAL_BATCH, 6, generator=generator)[rows].requires_grad_() for _ in range(2)]
        numbers = [torch.tensor([value], requires_grad=True) for value in (10.0, -3.0)]
        leaves = [*features, *(numbers if loss == "siglip" else numbers[:1])]

        def ours() -> Tensor:
            image, text = (nn.functional.normalize(side, dim=-1) for side in features)
            items = torch.arange(1, GLOBAL_BATCH + 1)[rows]
            targets = gather_targets(text, items, torch.ones(size, dtype=torch.bool), self.ranks)
            if loss == "siglip":
                return BernoulliPairs().loss(image, targets, numbers[0], numbers[1], self.ranks)[0]
            return BoltzmannPairs().loss(image, targets, numbers[0], None, self.ranks)[0]

        def theirs() -> Tensor:
            image, text = (nn.functional.normalize(side, dim=-1) for side in features)
            if loss == "siglip":
                peer = SigLipLoss(rank=self.rank, world_size=self.world, dist_impl="gather")
                value: Tensor = peer(image, text, *numbers)
                return value
            peer = ClipLoss(local_loss=True, gather_with_grad=True, rank=self.rank, world_size=self.world)
            value = peer(image, text, numbers[0])
            return value

        results = []
        for compute in (ours, theirs):
            value = compute()
            gradients = torch.autograd.grad(value, leaves)
            results.append({"loss": mean_over_ranks({"loss": float(value)})["loss"], "gradients": gradients})
        return {"ours": results[0], "theirs": results[1]}


def main() -> None:
    gc.freeze()  # DeepSpeed collects garbage for every engine, which would search all that was imported
    cases = Cases(Path(sys.argv[1]))
    clean = False
    try:
        cases.run_all()
        clean = True
    finally:
        stop_ranks(wait=clean)
    if cases.rank == 0:
        (cases.out / "done.json").write_text(json.dumps({"world": cases.world}))


if __name__ == "__main__":
    main()
