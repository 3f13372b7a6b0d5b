"""A recipe: inputs × targets, as data.

Every approach of the paper's table is one choice of the input x = t_x(s), the target y = t_y(s), its representation
z_y = f_φ(y), the prediction ẑ_y = f_ψ(z_x), the distribution P̂ and what keeps z_y from collapsing. Nothing in this
package branches on the name of a method. Which choices hold together is said in `recipe_rules`.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator
from typing_extensions import Self

from m3i_scale.config import FixableError, RunConfig, Section, find_run_file, load_run, parse_section, run_values
from m3i_scale.config.explain import WhereOf, origin
from m3i_scale.errors import ConfigError, Faults
from m3i_scale.objective.recipe_rules import faults

Modality = Literal["category", "text", "pixels", "image"]
Regularizer = Literal[
    "none",
    "negatives",
    "stop_gradient",
    "unigrad",
    "centering",
    "mean_entropy",
    "cross_correlation",
    "variance_covariance",
]
Encoder = Literal["embedding", "text_tower", "patchify", "momentum", "online", "teacher"]
Distribution = Literal["gaussian", "boltzmann", "bernoulli"]
Norm = Literal["none", "layer", "batch"]


class MaskSpec(Section):
    """Which patches of an input the encoder does not see."""

    form: Literal["random", "block"] = "random"
    """random: independent patches; block: a union of rectangles."""
    ratio: float = Field(gt=0, lt=1)
    """Share of hidden patches; the count is rounded to a whole patch and is the same for every sample."""


class InputSpec(Section):
    """One input x of the backbone."""

    name: str
    """What targets refer to."""
    view: int = Field(ge=1)
    """Augmented view of the image, from 1."""
    mask: MaskSpec | None = None


class MixSpec(Section):
    """Several images in one input with complementary patch masks (paper, Fig. 2).

    The first input shows the share of patches that its equal part is, the second one what the first left over, and so
    on; all inputs of a mix come from different images of the local batch.
    """

    inputs: list[str] = Field(min_length=2, max_length=4)
    form: Literal["random", "block"] = "random"
    """How patches are dealt to the images."""


class DecoderSpec(Section):
    """The prediction f_ψ. Targets that name the same decoder share its weights."""

    kind: Literal["transformer", "pointwise", "attention_pool", "mean_pool", "class_token"]
    """transformer: mask tokens ask for any patch of any view; pointwise: every patch token predicts at its own place;
    the others give one vector for the image."""
    width: int | None = Field(default=None, ge=8)
    """Hidden size; default: the backbone's."""
    heads: int | None = Field(default=None, ge=1)
    """Attention heads; default: one per 64 channels."""
    depth: int = Field(default=4, ge=1)
    """Layers of a Transformer decoder."""
    position: Literal["relative", "absolute"] = "relative"
    """Where a Transformer's queries are: relative to the input view (the paper), or on a fixed grid (MAE)."""

    @model_validator(mode="after")
    def _no_idle_fields(self) -> Self:
        every = {"width", "heads", "depth", "position"}
        idle = {"attention_pool": {"depth", "position"}, "transformer": set[str]()}
        found = sorted(self.model_fields_set & idle.get(self.kind, every))
        if found:
            raise ValueError(f"{', '.join(found)}: no effect on a {self.kind} decoder")
        # An attention pool splits the width that it is fed, which the backbone decides.
        splits = self.kind == "transformer"
        if splits and self.width is not None and self.heads is not None and self.width % self.heads:
            raise ValueError(f"width {self.width} is no multiple of its {self.heads} heads")
        return self


class HeadSpec(Section):
    """What turns a decoded vector into z_y or ẑ_y of an image target. Targets that name the same head share it.

    The projector serves the prediction and the target (whose copy is averaged where the target's encoder is); the
    predictor follows on the prediction's side alone.
    """

    width: int = Field(default=256, ge=2)
    """Dimension of z_y."""
    hidden: int = Field(default=2048, ge=2)
    """Width of the projector's hidden layers."""
    depth: int = Field(default=2, ge=1)
    """Linear layers of the projector."""
    norm: Norm = "layer"
    """After every hidden layer. `batch` takes the statistics of the global batch."""
    output_norm: Norm = "none"
    """After the projector's last layer, without a scale of its own."""
    predictor_depth: int = Field(default=0, ge=0)
    """Linear layers of the predictor; 0 for none."""
    predictor_hidden: int = Field(default=512, ge=2)
    """Width of the predictor's hidden layers."""
    prototypes: int = Field(default=0, ge=0)
    """Number K of unit vectors that z_y is compared with; the target is then a distribution over them."""
    queue: int = Field(default=0, ge=0)
    """How many targets of earlier batches stay as negatives, instead of those of the batch."""
    state_momentum: float = Field(default=0.9, ge=0, lt=1)
    """Of the moving averages over batches: the center of `centering`, the correlation of `unigrad`."""

    @model_validator(mode="after")
    def _no_idle_fields(self) -> Self:
        hidden_layers = self.depth > 1 or self.predictor_depth > 1
        for field, counts in (
            ("hidden", self.depth > 1),
            ("norm", hidden_layers),
            ("predictor_hidden", self.predictor_depth > 1),
        ):
            if field in self.model_fields_set and not counts:
                raise ValueError(f"{field}: no effect on a head without hidden layers")
        return self


class MomentumSpec(Section):
    """The exponential moving average that image targets are encoded with."""

    start: float = Field(default=0.995, ge=0, lt=1)
    """m at the first step; rises to `end` with a cosine."""
    end: float = Field(default=1.0, ge=0, le=1)
    projector_depth: int = Field(default=2, ge=0)
    """Residual MLP blocks after the backbone for dense targets, online and averaged; 0 for none."""

    @model_validator(mode="after")
    def _rises(self) -> Self:
        if self.end < self.start:
            raise FixableError(
                f"end ({self.end:g}) is below start ({self.start:g}): the average would forget faster and faster",
                f"end: {self.start:g} for a constant one, or 1, the default",
            )
        return self


class TeacherSpec(Section):
    """A frozen vision model that image targets are encoded with."""

    from_pretrained: str
    """A local `transformers` folder or a Hub id."""


class BalanceSpec(Section):
    """How the weights of the groups come about."""

    kind: Literal["fixed", "learned", "gradient_norm"] = "fixed"
    """fixed: `weight` of every target. learned: every group has a σ of its own, which is trained: weight × (loss / σ² +
    log σ). gradient_norm: the groups' gradients at the encoder output stand to each other as the weights do."""
    momentum: float = Field(default=0.9, ge=0, lt=1)
    """Of the measured norms, over micro-batches: they are averaged over the last 1 / (1 − momentum)."""

    @model_validator(mode="after")
    def _no_idle_fields(self) -> Self:
        if "momentum" in self.model_fields_set and self.kind != "gradient_norm":
            raise ValueError(f"momentum: no effect on {self.kind} weights")
        return self


class TargetSpec(Section):
    """One group k of equation (5): a target, its representation, its prediction and its distribution."""

    name: str
    inputs: list[str] = Field(min_length=1)
    """Which inputs predict it; the group's loss is the mean over them."""
    modality: Modality
    view: int | None = Field(default=None, ge=1)
    """Target view of pixels and images."""
    tokens: Literal["masked", "all", "pooled"] | None = None
    """Of pixels and images: dense on the hidden patches, dense on all patches, or one vector for the view."""
    encoder: Encoder
    decoder: str
    """Name of a decoder of the recipe."""
    head: str | None = None
    """Name of a head of the recipe: image targets that are pooled or compared with negatives."""
    distribution: Distribution
    regularizer: Regularizer
    weight: float = Field(default=1.0, gt=0)
    """w_k of equation (6)."""
    match: Literal["position", "similarity"] = "position"
    """Which patch of the target view a dense prediction stands for: the one it asks for, or the one whose backbone
    feature is most similar to that of its own patch."""
    candidates: Literal["target", "both"] = "target"
    """Negatives: the other samples' targets, or their predictions too."""
    width: int = Field(default=512, ge=8)
    """Dimension of the shared space of a text target."""
    direction: Literal["both", "forward"] = "both"
    """Of a softmax over texts. both: images find their texts and texts their images (CLIP); forward: images find their
    texts, which is the formula's own P̂(z_y | ẑ_y)."""
    temperature: float = Field(default=0.07, gt=0)
    """Of a softmax: the first value of the learned one of a text target, the fixed one of an image target."""
    bias: float = -10.0
    """First value of the learned bias of a Bernoulli text target."""
    target_temperature: float = Field(default=0.04, gt=0)
    """Of the target's distribution over prototypes."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    """Of a category target."""
    normalize_pixels: bool = True
    """Pixels of each patch are standardised (MAE)."""
    sigma2: float = Field(default=0.5, gt=0)
    """Variance of the Gaussian; ½ makes the loss the plain squared error."""
    unigrad_lambda: float = Field(default=0.02, ge=0)
    """Strength of the UniGrad negative."""
    entropy_weight: float = Field(default=1.0, gt=0)
    """Strength of `mean_entropy`."""
    offdiagonal_weight: float = Field(default=0.005, gt=0)
    """Strength of the off-diagonal part of `cross_correlation`."""
    variance_weight: float = Field(default=25.0, gt=0)
    """Strength of the variance part of `variance_covariance`."""
    covariance_weight: float = Field(default=1.0, gt=0)
    """Strength of the covariance part of `variance_covariance`."""

    @property
    def pooled(self) -> bool:
        """Whether z_y is one vector for an image, with a head."""
        return self.modality == "image" and self.tokens == "pooled"

    @property
    def dense(self) -> bool:
        """Whether z_y is a map over patches."""
        return self.tokens in ("masked", "all")


class Recipe(Section):
    """Inputs × targets."""

    name: str
    family: str
    """Row of the paper's table."""
    inputs: list[InputSpec] = Field(min_length=1)
    mix: MixSpec | None = None
    decoders: dict[str, DecoderSpec]
    heads: dict[str, HeadSpec] = Field(default_factory=dict)
    momentum: MomentumSpec | None = None
    teacher: TeacherSpec | None = None
    balance: BalanceSpec = BalanceSpec()
    targets: list[TargetSpec] = Field(min_length=1)

    @property
    def views(self) -> int:
        """How many views of an image the loader has to make."""
        wanted = [spec.view for spec in self.inputs] + [target.view or 1 for target in self.targets]
        return max(wanted)

    @property
    def uses_text(self) -> bool:
        """Whether a text tower and captions are needed."""
        return any(target.modality == "text" for target in self.targets)

    @property
    def uses_categories(self) -> bool:
        """Whether label sets are needed."""
        return any(target.modality == "category" for target in self.targets)

    @property
    def uses_momentum(self) -> bool:
        """Whether a momentum copy of the backbone is needed."""
        return any(target.encoder == "momentum" for target in self.targets)

    @property
    def projects_dense_targets(self) -> bool:
        """Whether a dense momentum target without a head goes through the residual projector."""
        return any(t.encoder == "momentum" and t.dense and t.head is None for t in self.targets)

    @property
    def compares_samples(self) -> str | None:
        """What in the recipe needs at least two samples in the global micro-batch; None where nothing does."""
        for name, head in self.heads.items():
            if "batch" in (head.norm, head.output_norm):
                return f"head '{name}' has batch norm"
        for target in self.targets:
            inside = target.head is not None and not self.heads[target.head].queue and target.regularizer == "negatives"
            inside = inside or target.modality == "text"
            if inside or target.regularizer in ("cross_correlation", "variance_covariance", "mean_entropy"):
                return f"target '{target.name}' has {target.regularizer} within the batch"
        return None

    def input(self, name: str) -> InputSpec:
        """The input of that name."""
        return next(spec for spec in self.inputs if spec.name == name)

    def shows(self, view: int) -> str | None:
        """Name of the input that shows all of a view; None where there is none."""
        if self.mix is not None:
            return None
        return next((spec.name for spec in self.inputs if spec.view == view and spec.mask is None), None)

    @model_validator(mode="after")
    def _holds_together(self) -> Self:
        found = list(faults(self))
        if found:
            raise ValueError("; ".join(found))
        return self


def parse_recipe(values: dict[str, Any], *, where: str | WhereOf = "recipe") -> Recipe:
    """A checked recipe.

    Raises:
        ConfigError: an unknown key, or inputs and targets that do not hold together.
    """
    if not values:
        place = where(()) if callable(where) else where
        raise ConfigError("the run file has no recipe", where=place, fix="extend a built-in one: `extends: m3i`")
    return parse_section(Recipe, values, where=where, below="recipe")


def load_run_and_recipe(
    name_or_path: str, overrides: list[str] | None = None, values: dict[str, Any] | None = None
) -> tuple[RunConfig, Recipe]:
    """Read a run file and its recipe; arguments as of `load_run`.

    Raises:
        ConfigError: see `load_run` and `parse_recipe`; a FaultsError with the faults of both.
    """
    if values is None:
        values = run_values(name_or_path, overrides)
    faults, recipe = Faults(), None
    run = faults.note(load_run, name_or_path, overrides, values)
    described = values.get("recipe")
    if isinstance(described, dict):  # else the run file lacks it, which is told
        path = find_run_file(name_or_path)
        recipe = faults.note(
            lambda: parse_recipe(described, where=lambda place: origin(("recipe", *place), overrides or [], path))
        )
    faults.end()
    if run is None or recipe is None:
        raise RuntimeError("nothing is at fault, and nothing is there")
    return run, recipe
