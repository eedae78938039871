"""How many prototypes a run has where its configuration leaves it open: as many as its batch can feed."""

from __future__ import annotations

from dinox_model import PRESETS
from dinox_train.config import Config
from dinox_train.masking import MaskSettings, masked_counts
from dinox_train.objectives.prototypes import suggested_prototypes
from dinox_train.view_batch import NUM_GLOBAL


def with_prototypes(config: Config, previous: Config | None = None) -> Config:
    """`config` with numbers in `objective.prototypes` and, for a head of its own, `objective.ibot.prototypes`.

    previous: the configuration that a resumed run began with, whose numbers stay.
    """
    objective = config.objective
    if objective.name != "dinov3":
        return config
    ibot = objective.ibot
    side = config.views.global_size // (config.model.patch_size or PRESETS[config.model.preset].patch_size)
    settings = MaskSettings(fraction=ibot.masked_crops, share=ibot.masked_share)
    counts = masked_counts(settings, num_crops=NUM_GLOBAL * config.train.batch_size, num_patches=side**2)
    fits = suggested_prototypes(config.train.batch_size, int(counts.sum()))
    alone = fits.dino if ibot.head == "separate" or not ibot.weight else fits.shared
    number = objective.prototypes or (previous and previous.objective.prototypes) or alone
    if ibot.head == "separate" and ibot.weight:
        # A number for the DINO head alone is one for both: few, where somebody wants few.
        wanted = ibot.prototypes or (previous and previous.objective.ibot.prototypes) or objective.prototypes
        ibot = ibot.model_copy(update={"prototypes": wanted or fits.ibot})
    found = objective.model_copy(update={"prototypes": number, "ibot": ibot})
    return config.model_copy(update={"objective": found})
