"""The section `objective`: what is learnt, and by which terms."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from dinox_train.sections.section import Fraction, Length, Positive, Range, Section, Side


class DINOSection(Section):
    weight: Annotated[float, Field(ge=0)] = 1.0
    """Of the DINO term in the loss; 0: off."""
    local_weight: Annotated[float, Field(gt=0)] = 1.0
    """Of pairs with a local view, relative to pairs of two global ones. DINOv3's later stages: 0.5."""


class IBOTSection(Section):
    weight: Annotated[float, Field(ge=0)] = 1.0
    """Of the iBOT term; 0: off, and nothing is masked."""
    head: Literal["separate", "shared"] = "separate"
    """A head of its own for patches, or the DINO term's."""
    prototypes: Length | None = None
    """Of the separate head; null: as many as the DINO head's."""
    masked_crops: Fraction = 0.5
    """Share of the global views that have masked patches."""
    masked_share: Range = (0.1, 0.5)
    """Share of the patches that is masked in such a view, from the least masked view of a batch to the most."""


class KoLeoSection(Section):
    weight: Annotated[float, Field(ge=0)] = 0.1
    """Of the KoLeo term, which keeps an image's features away from its nearest neighbour's; 0: off."""
    group: Annotated[int, Field(ge=2)] | None = 16
    """Neighbours are looked for among so many images that follow one another in a batch; null: in the whole batch. A
    micro-batch that does not hold whole groups costs a further forward pass of the global views."""


class GramSection(Section):
    weight: Annotated[float, Field(ge=0)] = 0.0
    """Of Gram anchoring, which keeps the similarities of patches as a frozen earlier teacher has them; 0: off. For long
    runs, when patch features get worse. DINOv3: 2."""
    start: Annotated[int, Field(ge=0)] = 0
    """The Gram teacher is the teacher as it is after so many updates; from the next one on, the term counts."""
    ramp_updates: Annotated[int, Field(ge=0)] = 0
    """Updates of a straight line from 0 to the weight."""
    refresh_every: Positive | None = None
    """After so many further updates the Gram teacher is the teacher of that moment; null: never."""
    max_refreshes: Annotated[int, Field(ge=0)] = 3
    """How often."""
    size: Side | None = None
    """Side of what the Gram teacher sees, pixels, a multiple of the patch size; null: that of the global views. DINOv3:
    twice that, which takes about half of the step's time."""
    negatives: Literal["keep", "clamp_both", "clamp_teacher"] = "keep"
    """Whether similarities below 0 count as 0: never, in both networks, or in the teacher."""
    tokens: Literal["all", "masked", "unmasked"] = "all"
    """Patches that are compared."""
    max_patches: Positive | None = None
    """At most so many of a view's patches, drawn anew in each update; null: all. Pairs of patches, and their memory,
    grow with the square: for views beyond 512 pixels, 1024."""
    views: Literal[1, 2] = 2
    """Of an image's two global views, how many take part."""
    layers: tuple[int, ...] = (-1,)
    """Blocks whose output is compared: from 0, or from the end, -1 the last."""

    @model_validator(mode="after")
    def _sensible(self) -> GramSection:
        if not self.layers:
            raise ValueError("layers is empty: [-1] is the last block")
        return self


class MAESection(Section):
    masked_share: Annotated[float, Field(gt=0, lt=1)] = 0.75
    """Share of the patches that is masked, in each view."""
    normalise: bool = True
    """The pixels of each patch are normalised before they are compared."""


class ClassificationSection(Section):
    labels: str = "marks"
    """Name of the labels: OUT/labels/NAME.jsonl of each set says which slices bear a mark."""


class ObjectiveSection(Section):
    name: Literal["dinov3", "mae", "classification"] = "dinov3"
    """What is learnt: dinov3, without labels; mae, masked pixels; classification, which slices bear a mark."""
    prototypes: Length | None = None
    """Classes that teacher and student sort views into; null: as many as fit the batch. A Sinkhorn needs samples for
    each."""
    head_hidden: Length = 2048
    """Width of the two hidden layers of the head."""
    head_bottleneck: Length = 256
    """Features between the hidden layers and the prototypes."""
    student_temperature: Annotated[float, Field(gt=0)] = 0.1
    """Divides the student's logits."""
    teacher_temperature: Annotated[float, Field(gt=0)] = 0.07
    """Divides the teacher's logits after its warm-up; lower is surer, and must be below the student's."""
    teacher_temperature_start: Annotated[float, Field(gt=0)] = 0.04
    """Where its warm-up begins."""
    teacher_temperature_warmup_updates: Annotated[int, Field(ge=0)] = 0
    """Updates of a straight line from the start to the final temperature."""
    balance: Literal["sinkhorn", "centering"] = "sinkhorn"
    """How the teacher is kept from saying the same of every image: by balancing the batch, or by a running centre."""
    sinkhorn_iterations: Positive = 3
    """Rounds of balancing prototypes and samples."""
    centre_momentum: Fraction = 0.9
    """Share of itself that the running centre keeps in an update."""
    dino: DINOSection = DINOSection()
    ibot: IBOTSection = IBOTSection()
    koleo: KoLeoSection = KoLeoSection()
    gram: GramSection = GramSection()
    mae: MAESection = MAESection()
    classification: ClassificationSection = ClassificationSection()

    @model_validator(mode="after")
    def _sensible(self) -> ObjectiveSection:
        if self.name == "dinov3" and not (self.dino.weight or self.ibot.weight):
            raise ValueError("dino.weight and ibot.weight are both 0: nothing is left to learn from")
        if self.ibot.head == "shared" and self.ibot.prototypes is not None:
            raise ValueError("ibot.prototypes is for a separate head: take it away, or set ibot.head to separate")
        low, high = self.ibot.masked_share
        if not 0 <= low <= high < 1:
            raise ValueError(f"ibot.masked_share must be [low, high] with 0 <= low <= high < 1, not [{low}, {high}]")
        if self.ibot.weight and not (high and self.ibot.masked_crops):
            raise ValueError(
                "ibot.masked_crops and ibot.masked_share mask nothing: set ibot.weight to 0, or raise them"
            )
        if self.gram.weight and self.gram.tokens != "all" and not self.ibot.weight:
            raise ValueError(f"gram.tokens is {self.gram.tokens}, and nothing is masked where ibot.weight is 0")
        if max(self.teacher_temperature, self.teacher_temperature_start) >= self.student_temperature:
            raise ValueError("teacher_temperature (and its start) must be below student_temperature")
        if self.name != "dinov3" and self.gram.weight:
            raise ValueError(f"gram is a term of the objective dinov3, not of {self.name}: set gram.weight to 0")
        return self
