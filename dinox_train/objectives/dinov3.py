"""DINOv3's objective: DINO on views, iBOT on masked patches, KoLeo on features, Gram anchoring on patches.

    teacher, 2 global views, unmasked ─┬─ CLS     ─ DINO head ─ balanced ─┐
                                       └─ masked patches ─ iBOT head ─────┤ balanced over the whole batch
    student, 2 global views, masked   ─┬─ CLS     ─ DINO head ────────────┤ dino (and with the local views)
             K local views            ─┘                                  │
                                       ├─ masked patches ─ iBOT head ─────┘ ibot
                                       ├─ CLS, before the head              koleo
    Gram teacher, undistorted         ─┴─ patches                           gram

(Siméoni et al., DINOv3, arXiv 2508.10104; Oquab et al., DINOv2, arXiv 2304.07193.) The mathematics of each term stands
in a file of its own; here is which features go into it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor, nn

from dinox_model import PrototypeHead, ViTConfig
from dinox_model.vit import ViTFeatures
from dinox_train import health
from dinox_train.masking import MaskSettings
from dinox_train.network import Network, Networks
from dinox_train.objectives.comparison import Comparison
from dinox_train.objectives.gram import gram_loss, resize_features, take_patches
from dinox_train.objectives.koleo import koleo_gradient, koleo_loss
from dinox_train.objectives.objective import LOCAL_NORM, Aim, Losses, Needs, Values
from dinox_train.ranks import ALONE, Ranks
from dinox_train.schedule import linear_ramp
from dinox_train.view_batch import NUM_GLOBAL, ViewBatch, all_rows


@dataclass(frozen=True, kw_only=True)
class DINOSettings:
    """The DINO term."""

    weight: float = 1.0
    local_weight: float = 1.0
    """Of the pairs with a local view, relative to those of two global ones. DINOv3's later stages have 0.5."""


@dataclass(frozen=True, kw_only=True)
class IBOTSettings:
    """The iBOT term."""

    weight: float = 1.0
    head: Literal["separate", "shared"] = "separate"
    """A head of its own for patches, or the DINO term's."""
    prototypes: int | None = None
    """Of the separate head; None: as many as the DINO head's."""
    masked_crops: float = 0.5
    """Share of the global views that have masked patches."""
    masked_share: tuple[float, float] = (0.1, 0.5)
    """Share of the patches that is masked in such a view, from the least masked to the most."""


@dataclass(frozen=True, kw_only=True)
class KoLeoSettings:
    """The KoLeo term."""

    weight: float = 0.1
    group: int | None = 16
    """Neighbours are looked for among so many images of the batch that follow one another; None: among all."""

    def rows(self, batch_size: int) -> int:
        """Images of a group: the largest divisor of the batch from half of `group` to `group`, or the whole batch."""
        wanted = min(self.group or batch_size, batch_size)
        divisors = (size for size in range(wanted, max(1, (wanted - 1) // 2), -1) if batch_size % size == 0)
        return next(divisors, batch_size)


@dataclass(frozen=True, kw_only=True)
class GramSettings:
    """Gram anchoring."""

    weight: float = 0.0
    start: int = 0
    """The Gram teacher is the teacher as it is after so many updates; from the next on, the term counts."""
    ramp_updates: int = 0
    """Updates over which the weight rises from 0 to `weight`, in a straight line."""
    refresh_every: int | None = None
    """After so many further updates the Gram teacher is the teacher of that moment; None: never."""
    max_refreshes: int = 3
    size: int | None = None
    """Side of what it sees, pixels; None: that of the global views. DINOv3 has twice that."""
    negatives: Literal["keep", "clamp_both", "clamp_teacher"] = "keep"
    """Whether similarities below 0 are set to 0, in both or in the teacher's only."""
    tokens: Literal["all", "masked", "unmasked"] = "all"
    """Patches whose similarities are compared."""
    max_patches: int | None = None
    """At most so many of a view's patches, drawn anew in each update, since pairs grow with the square; None: all."""
    views: Literal[1, 2] = 2
    """Of the two global views of an image, how many take part."""
    layers: tuple[int, ...] = (-1,)
    """Blocks whose output is compared, from 0, or from the end with -1 the last."""

    def weight_at(self, update: int) -> float:
        """Of update `update` (from 1)."""
        after = update - self.start
        if after <= 0:
            return 0.0
        return self.weight * min(1.0, after / (self.ramp_updates + 1))

    def taken_before(self, update: int) -> bool:
        """Whether the schedule makes the Gram teacher the teacher's copy before update `update` (from 1)."""
        after = update - 1 - self.start
        if not self.weight or after < 0:
            return False
        every = self.refresh_every
        return after == 0 or (every is not None and after % every == 0 and after // every <= self.max_refreshes)


@dataclass(frozen=True, kw_only=True)
class DINOv3Settings:
    """Settings of the objective `dinov3`."""

    prototypes: int = 4096
    head_hidden: int = 2048
    head_bottleneck: int = 256
    student_temperature: float = 0.1
    teacher_temperature: float = 0.07
    teacher_temperature_start: float = 0.04
    teacher_temperature_warmup_updates: int = 0
    balance: Literal["sinkhorn", "centering"] = "sinkhorn"
    """How the teacher is kept from saying the same of every image."""
    sinkhorn_iterations: int = 3
    centre_momentum: float = 0.9
    dino: DINOSettings = field(default_factory=DINOSettings)
    ibot: IBOTSettings = field(default_factory=IBOTSettings)
    koleo: KoLeoSettings = field(default_factory=KoLeoSettings)
    gram: GramSettings = field(default_factory=GramSettings)


@dataclass(frozen=True)
class Observed:
    """Of one micro-batch: the teacher's CLS (2b, d), its logits of CLS (2b, K) and of masked patches (m, K'), and how
    alike the patches of a view are (0-dim)."""

    features: Tensor
    cls_logits: Tensor
    patch_logits: Tensor | None
    patch_similarity: Tensor


@dataclass(frozen=True)
class Target:
    """What a micro-batch's student is measured by."""

    observed: Observed
    balance: Mapping[str, Tensor]
    """What balances the batch, a vector over prototypes for each head: Sinkhorn's potential, or the running centre."""
    koleo: tuple[Tensor, Tensor] | None = None
    """Where KoLeo's groups reach beyond micro-batches: this one's share of the term, 0-dim, and the gradient of the
    batch's term by the student's CLS of its global views, (2b, d)."""


class DINOv3:
    """DINO, iBOT, KoLeo and Gram anchoring. A term whose weight is 0 is not computed."""

    terms = ("dino", "ibot", "koleo", "gram")

    def __init__(self, settings: DINOv3Settings, *, fused: bool = False, ranks: Ranks = ALONE) -> None:
        """fused: Sinkhorn and cross-entropies by kernels (comparison.py); the same numbers, to fp32 rounding. ranks:
        those that an update's images are spread over."""
        self.settings, self._ranks = settings, ranks
        self._comparison = Comparison(settings, fused=fused, ranks=ranks)
        self._patch_head = "ibot" if settings.ibot.head == "separate" else "dino"

    @property
    def needs(self) -> Needs:
        ibot, gram = self.settings.ibot, self.settings.gram
        masks = MaskSettings(fraction=ibot.masked_crops, share=ibot.masked_share) if ibot.weight else None
        return Needs(masks=masks, gram=bool(gram.weight), gram_size=gram.size, gram_patches=gram.max_patches)

    @property
    def unread(self) -> tuple[str, ...]:
        own = self.settings
        masked = own.ibot.weight > 0
        heads_dino = own.dino.weight > 0 or (masked and own.ibot.head == "shared")
        return (
            *(() if masked else ("backbone.mask_token",)),
            *(() if own.dino.weight else (LOCAL_NORM,)),
            *(() if heads_dino else ("heads.dino.",)),
        )

    def heads(self, vit: ViTConfig, seed: int) -> dict[str, nn.Module]:
        own = self.settings
        sizes = (vit.width, own.head_hidden, own.head_bottleneck)
        heads: dict[str, nn.Module] = {"dino": PrototypeHead(*sizes, own.prototypes, seed=seed)}
        if own.ibot.weight and own.ibot.head == "separate":
            heads["ibot"] = PrototypeHead(*sizes, own.ibot.prototypes or own.prototypes, seed=seed + 1)
        return heads

    def first_state(self) -> dict[str, Tensor]:
        own = self.settings
        if own.balance == "sinkhorn":
            return {}
        state = {"dino_centre": torch.zeros(own.prototypes)}
        if own.ibot.weight:
            state["ibot_centre"] = torch.zeros(own.ibot.prototypes or own.prototypes)
        return state

    def values(self, update: int) -> dict[str, float]:
        own = self.settings
        return {
            "teacher_temperature": linear_ramp(
                update - 1,
                own.teacher_temperature_warmup_updates,
                start=own.teacher_temperature_start,
                final=own.teacher_temperature,
            ),
            "weight_dino": own.dino.weight,
            "weight_ibot": own.ibot.weight,
            "weight_koleo": own.koleo.weight,
            "weight_gram": own.gram.weight_at(update),
        }

    def koleo_rows(self, batch_size: int) -> int | None:
        """Images that KoLeo compares with each other; None where it is off."""
        koleo = self.settings.koleo
        return koleo.rows(batch_size) if koleo.weight else None

    def observe(self, networks: Networks, batch: ViewBatch, values: Values) -> Observed:
        teacher = networks.teacher
        seen = teacher.backbone(batch.global_views, mm_per_pixel=batch.teacher_mm)
        patch_logits = None
        if values["weight_ibot"]:
            patch_logits = teacher.heads[self._patch_head](_masked_patches(seen.patches, batch))
        cls = _cls(seen)
        similarity = health.patch_similarity(seen.patches)
        return Observed(cls.float(), teacher.heads["dino"](cls), patch_logits, similarity)

    def aim(self, observed: Sequence[Observed], values: Values, state: Mapping[str, Tensor]) -> Aim:
        logits = {"dino": [part.cls_logits for part in observed]}
        if values["weight_ibot"]:
            logits["ibot"] = [part.patch_logits for part in observed if part.patch_logits is not None]
        balance, new_state = self._comparison.balance(logits, values, state)
        targets = [Target(part, balance) for part in observed]
        make = self._comparison.targets
        cls_targets = torch.cat([make(part.cls_logits, balance["dino"], values) for part in observed])
        similarity = torch.stack([part.patch_similarity for part in observed]).mean()
        means = self._ranks.mean(torch.stack([health.teacher_entropy(cls_targets), similarity]))
        figures = {
            "teacher_entropy": means[0],
            "prototype_use": self._ranks.any(health.used_prototypes(cls_targets)).float().mean(),
            "patch_similarity": means[1],
        }
        return Aim(targets, figures, torch.cat([part.features for part in observed]), new_state)

    def couple(
        self, networks: Networks, batches: Sequence[ViewBatch], targets: Sequence[Target], values: Values
    ) -> Sequence[Target]:
        """Where KoLeo's neighbours may lie in other micro-batches, or with other ranks: a first pass of the student
        without gradients, which finds the term's gradient with regard to each feature; the second pass, in `losses`,
        carries it on."""
        sizes, ranks = [batch.num_images for batch in batches], self._ranks
        total = ranks.count * sum(sizes)
        rows = self.koleo_rows(total)
        if rows is None or all(size % rows == 0 for size in sizes):
            return targets
        parts = [self._student_cls(networks.student, batch).unflatten(0, (NUM_GLOBAL, -1)) for batch in batches]
        found = [koleo_gradient(view, group_size=rows) for view in all_rows([ranks.rows(part, 1) for part in parts])]
        loss = sum((part for part, _ in found), torch.zeros_like(found[0][0]))
        gradients = torch.stack([part for _, part in found]).split([ranks.count * size for size in sizes], dim=1)
        return [
            replace(target, koleo=(loss * (size / total), ranks.own_rows(gradient, 1).flatten(0, 1)))
            for target, size, gradient in zip(targets, sizes, gradients, strict=True)
        ]

    def losses(
        self, networks: Networks, batch: ViewBatch, targets: Target, values: Values, *, total_images: int
    ) -> Losses:
        student, own = networks.student, self.settings
        layers = own.gram.layers if values["weight_gram"] else ()
        seen = self._student_global(student, batch, layers)
        losses: Losses = {}
        if values["weight_dino"]:
            losses["dino"] = self._dino(student, batch, seen, targets, values, total_images)
        if values["weight_ibot"]:
            assert batch.masked is not None
            assert targets.observed.patch_logits is not None
            losses["ibot"] = self._comparison.ibot(
                student.heads[self._patch_head](_masked_patches(seen.patches, batch)),
                targets.observed.patch_logits,
                batch.masked.weights,
                targets.balance["ibot"],
                values,
                total_images=total_images,
            )
        if values["weight_koleo"]:
            losses["koleo"] = self._koleo(_cls(seen), targets, total_images)
        if values["weight_gram"]:
            losses["gram"] = self._gram(networks, batch, seen, total_images)
        return losses

    def _student_global(self, student: Network, batch: ViewBatch, layers: tuple[int, ...] = ()) -> ViTFeatures:
        masks = None if batch.masked is None else batch.masked.masks
        return student.backbone(
            batch.global_views, masks, layers=layers, draws=batch.global_draws, mm_per_pixel=batch.global_mm
        )

    def _student_cls(self, student: Network, batch: ViewBatch) -> Tensor:
        return _cls(self._student_global(student, batch))

    def _dino(
        self,
        student: Network,
        batch: ViewBatch,
        seen: ViTFeatures,
        targets: Target,
        values: Values,
        total_images: int,
    ) -> Tensor:
        cls = [_cls(seen)]
        if batch.local_views.shape[0]:
            local = student.backbone(
                batch.local_views, draws=batch.local_draws, mm_per_pixel=batch.local_mm, local_crops=True
            )
            cls.append(_cls(local))
        return self._comparison.dino(
            student.heads["dino"](torch.cat(cls)),
            targets.observed.cls_logits,
            targets.balance["dino"],
            values,
            local_weight=self.settings.dino.local_weight,
            total_images=total_images,
        )

    def _koleo(self, cls: Tensor, targets: Target, total_images: int) -> Tensor:
        """Sum over the two global views."""
        if targets.koleo is not None:
            share, gradient = targets.koleo
            carrier = (cls.float() * gradient).sum()
            return share + carrier - carrier.detach()
        rows = self.settings.koleo.rows(total_images)
        views = [koleo_loss(view, group_size=rows, total_rows=total_images) for view in cls.chunk(NUM_GLOBAL)]
        return torch.stack(views).sum()

    def _gram(self, networks: Networks, batch: ViewBatch, seen: ViTFeatures, total_images: int) -> Tensor:
        """Mean over the chosen layers."""
        own, gram = self.settings.gram, networks.gram
        assert gram is not None
        assert batch.gram_views is not None
        crops = own.views * batch.num_images
        mm = batch.gram_mm
        with torch.no_grad():
            anchor = gram(batch.gram_views[:crops], layers=own.layers, mm_per_pixel=None if mm is None else mm[:crops])
        tokens = None
        if own.tokens != "all" and batch.masked is not None:
            masks = batch.masked.masks[:crops]
            tokens = masks if own.tokens == "masked" else ~masks
        chosen = None if batch.gram_patches is None else batch.gram_patches[:crops]
        if chosen is not None and tokens is not None:
            tokens = tokens.gather(1, chosen)
        per_layer = [
            gram_loss(
                take_patches(ours.patches[:crops], chosen),
                take_patches(resize_features(theirs.patches, theirs.grid, ours.grid), chosen),
                negatives=own.negatives,
                tokens=tokens,
                total_crops=own.views * total_images,
            )
            for ours, theirs in zip(seen.layers, anchor.layers, strict=True)
        ]
        return torch.stack(per_layer).mean()


def _cls(seen: ViTFeatures) -> Tensor:
    """(b, d). Its network has a CLS token: a run's configuration makes no other."""
    assert seen.cls is not None
    return seen.cls


def _masked_patches(patches: Tensor, batch: ViewBatch) -> Tensor:
    """(m, d) of patches (2b, n, d)."""
    assert batch.masked is not None
    return patches.flatten(0, 1).index_select(0, batch.masked.indices)
