"""Hook that measures frozen features during training, of the student and of the EMA teacher.

Every rank keeps its part of the images in memory and encodes it, so that ZeRO-3 gathers the weights as in training.
Rank 0 computes the metrics from the features of all ranks. No random state is used, so the run does not change.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import cast

import numpy as np
import torch
from deepspeed.accelerator import get_accelerator
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from m3i_scale.backbones.base import Backbone
from m3i_scale.checkpoint.load import evaluating
from m3i_scale.config.run_control import PROBES, WITH_TEXT, OnlineEvaluationConfig
from m3i_scale.data.loader import TrainStream
from m3i_scale.engine.agree import from_rank_0, gather_on_rank_0
from m3i_scale.engine.partition import end_recorded_step
from m3i_scale.evaluation import NotMeasuredError
from m3i_scale.evaluation.online_metrics import (
    EncodedSplits,
    FallingMetrics,
    choose_metrics,
    measure_features,
    measure_text,
    token_statistics,
)
from m3i_scale.evaluation.online_samples import Split, count_reasons, read_split
from m3i_scale.evaluation.towers import Towers, class_embeddings, distinct_captions
from m3i_scale.objective.information import Objective
from m3i_scale.run.hooks import Hook, TrainState
from m3i_scale.text import printable

_MAX_SHARE = 0.03
"""Share of the training time above which the cost is reported."""
Floats = NDArray[np.float32]


def make_online_evaluation(state: TrainState, validation: TrainStream | None) -> Hook | None:
    """Return the hook of a run with `evaluation.online`."""
    online = state.resolved.run.evaluation.online
    return None if online is None else OnlineEvaluation(state, online)


class OnlineEvaluation(Hook):
    """Hook that measures the features at the first and last step and every `every_steps` steps. All ranks read their
    images when it is created. Raises DataError if the data do not support a requested metric."""

    def __init__(self, state: TrainState, online: OnlineEvaluationConfig) -> None:
        self._state, self._online = state, online
        self._module: Objective = state.engine.module
        self._test = read_split(state.resolved, state.ranks, "data", online.data, online.samples)
        self._train = None
        if online.train_data is not None:
            path, most = online.train_data, online.train_samples
            self._train = read_split(state.resolved, state.ranks, "train_data", path, most)
        annotations = None if self._train is None else self._train.annotations
        has_text = self._module.text is not None
        self._metrics, reasons = choose_metrics(online, has_text, annotations, self._test.annotations)
        if not set(self._metrics).intersection(PROBES):
            self._train = None
        self._falling = FallingMetrics(self._test.annotations)
        self._losses: list[float] = []
        self._ended: float | None = None
        """Time at the end of the last evaluation."""
        self._cost_reported = False
        run = state.resolved.run
        stages = [run.in_stage(number) for number in range(len(run.stages))] or [run]
        self._batch_size = min(stage.optim.micro_batch_size for stage in stages)
        for line in self._describe(reasons):
            state.tell(line)

    def on_start(self) -> None:
        """Measure the initial weights of a new run."""
        if self._state.step == 0:
            self._evaluate()

    def post_step(self) -> bool:
        state = self._state
        if math.isfinite(state.loss):
            self._losses.append(state.loss)
        if state.step % self._online.every_steps == 0 or state.step == state.resolved.run.optim.steps:
            self._evaluate()
        return False

    def on_rewind(self) -> None:
        self._losses.clear()
        self._falling = FallingMetrics(self._test.annotations)

    def on_finish(self) -> None:
        """Evaluate the last step if the run ended early because the data is exhausted."""
        state = self._state
        if not state.stopping and state.step < state.resolved.run.optim.steps and self._losses:
            self._evaluate()

    def _describe(self, reasons: dict[str, str]) -> list[str]:
        """Return lines for the user about data and metrics."""
        online, test = self._online, self._test.annotations
        images = f"{len(self._test.order_N):,} images"
        if self._train is not None:
            images += f", {len(self._train.annotations.labeled):,} labeled training images"
        lines = [f"online evaluation every {online.every_steps:,} steps: {', '.join(self._metrics)}; {images}"]
        if self._train is not None:
            missing = set(test.present.tolist()) - set(self._train.annotations.present.tolist())
            if missing:
                example, count = printable(test.classes[min(missing)]), len(self._train.order_N)
                lines.append(
                    f"warning: {len(missing)} of {len(test.present)} test classes, e.g. {example}, have no image among "
                    f"the {count:,} of evaluation.online.train_data. Fix: raise evaluation.online.train_samples"
                )
        lines += [f"not measured online: {name}: {reason}" for name, reason in reasons.items()]
        for split, key in ((self._test, "data"), (self._train, "train_data")):
            if split is not None and split.left_out:
                lines.append(f"warning: evaluation.online.{key}: skipped {count_reasons(split.left_out)}")
        return lines

    # ---------------------------------------------------------------- encoding

    def _evaluate(self) -> None:
        state = self._state
        started = time.monotonic()
        with state.timeouts.outside_of_steps("evaluate"):
            end_recorded_step(state.engine)
            with evaluating(self._module), torch.no_grad():
                encoded = {"student": self._encode_splits(self._module.student)}
                if self._module.momentum is not None and state.ema is not None:  # both or none
                    state.ema.wait()  # under ZeRO-1 and 2, its weights may still be gathered
                    encoded["ema"] = self._encode_splits(self._module.momentum.backbone)
                joint = self._encode_text() if set(self._metrics).intersection(WITH_TEXT) else None
            from_rank_0(lambda: self._report(encoded, joint, started))
        self._losses.clear()

    def _encode_splits(self, backbone: Backbone) -> EncodedSplits:
        """Return the features of all images on rank 0, empty on other ranks."""
        layers = () if backbone.stage_widths else (len(backbone.layers),)

        def features(images_BCHW: Tensor) -> Tensor:
            tokens, maps = backbone.encode_maps(self._module.pixel_norm(images_BCHW), layers)
            cls_BD, mean_BD = tokens[0][:, 0], tokens[1].mean(dim=1)
            parts = {"mean": [mean_BD], "cls": [cls_BD], "both": [mean_BD, cls_BD]}[self._online.pool]
            of_tokens_B2 = token_statistics(tokens[1], maps[-1] if layers else None)
            return torch.cat([*(part.float() for part in parts), of_tokens_B2], dim=1)

        test_MF = self._encode(self._test, features)
        train_NF = None if self._train is None else self._encode(self._train, features)
        return EncodedSplits(None if train_NF is None else train_NF[:, :-2], test_MF[:, :-2], test_MF[:, -2:])

    def _encode_text(self) -> tuple[Floats, Floats, Floats]:
        """Return the vectors of test images (on rank 0), classes and distinct captions in the joint space."""
        resolved, test = self._state.resolved, self._test.annotations
        target = next(item.name for item in resolved.recipe.targets if item.modality == "text")
        images_ME = self._encode(self._test, lambda images: self._module.embed_images(images, target).float())
        tokenizer = cast(PreTrainedTokenizerBase, resolved.tokenizer)  # required by text targets
        device = torch.device(get_accelerator().current_device_name())
        towers = Towers(self._module, tokenizer, target, resolved.run.text.max_tokens, device)
        empty = np.zeros((0, 0), dtype=np.float32)
        classes_KE = captions_UE = empty
        if "zero_shot" in self._metrics:
            classes_KE = class_embeddings([test.classes[number] for number in test.present], towers.texts)
        if "retrieval" in self._metrics:
            captions_UE = towers.texts(distinct_captions([test.captions[n] or "" for n in test.captioned])[0])
        return images_ME, classes_KE, captions_UE

    def _encode(self, split: Split, encode: Callable[[Tensor], Tensor]) -> Floats:
        """Return the result of `encode` for all images, in dataset order, on rank 0; an empty array on other ranks.

        All ranks encode the same number of batches of the same size: ZeRO-3 gathers weights in each, and compiled
        layers keep their shapes.
        """
        batch, images_NCHW = min(self._batch_size, split.most), split.images_NCHW
        rows: list[Tensor] = []
        for start in range(0, split.most, batch):
            images_BCHW = images_NCHW[start : start + batch]
            padding = images_NCHW.new_zeros(batch - len(images_BCHW), *images_NCHW.shape[1:])
            padded_BCHW = torch.cat([images_BCHW, padding]).to(get_accelerator().current_device_name())
            rows.append(encode(padded_BCHW))
        mine_NF = torch.cat(rows)[: len(images_NCHW)].float().cpu().numpy()
        parts = gather_on_rank_0(mine_NF)
        return cast(Floats, np.concatenate(parts)[split.order_N]) if parts else np.zeros((0, 2), dtype=np.float32)

    # ---------------------------------------------------------------- metrics, on rank 0

    def _report(
        self, encoded: dict[str, EncodedSplits], joint: tuple[Floats, Floats, Floats] | None, started: float
    ) -> None:
        state, test = self._state, self._test.annotations
        train = None if self._train is None else self._train.annotations
        values: dict[str, dict[str, float]] = {}
        for encoder, features in encoded.items():
            try:
                values[encoder] = measure_features(self._metrics, features, train, test)
                if encoder == "student" and joint is not None:
                    values[encoder] |= measure_text(self._metrics, *joint, test)
            except NotMeasuredError as reason:
                state.tell(f"no online evaluation of {encoder} at step {state.step:,}: {reason}")
        if not values:
            return
        seconds = time.monotonic() - started
        state.callbacks.on_evaluation(state.step, {**values, "online_s": seconds, "online_labeled": len(test.labeled)})
        flat = {f"{encoder}/{name}": value for encoder in values for name, value in values[encoder].items()}
        loss = sum(self._losses) / len(self._losses) if self._losses else math.inf
        for warning in self._falling.check(flat, loss):
            state.callbacks.on_warning(state.step, asdict(warning))
        self._report_cost(seconds, started)

    def _report_cost(self, seconds: float, started: float) -> None:
        """Report once that the evaluation takes a large share of the time, measured over a complete interval."""
        ended, self._ended = self._ended, time.monotonic()
        if ended is None or self._cost_reported or len(self._losses) != self._online.every_steps:
            return
        share = seconds / (started - ended + seconds)
        if share > _MAX_SHARE:
            ratio = seconds / (started - ended)
            every = math.ceil(self._online.every_steps * ratio * (1 - _MAX_SHARE) / _MAX_SHARE)
            if (checkpoint := self._state.resolved.run.checkpoint).keep_best is not None:  # it needs common steps
                every = math.ceil(every / checkpoint.every_steps) * checkpoint.every_steps
            longer = f"evaluation.online.every_steps={every}, or fewer evaluation.online.samples and train_samples"
            if every >= self._state.resolved.run.optim.steps:
                longer = "fewer evaluation.online.samples and train_samples"
            self._state.tell(
                f"warning: the online evaluation takes {share:.0%} of the time ({seconds:.1f} s every "
                f"{self._online.every_steps:,} steps). Fix: {longer}"
            )
            self._cost_reported = True
